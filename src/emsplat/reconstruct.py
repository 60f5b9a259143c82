"""The programmes: particles in; half maps, a full map, their FSC and a run folder out.

`backproject` stops at the classical maps. `reconstruct` goes on from them to Gaussians, fitted to the accumulated sums
(engine one-pass) or to the images themselves (engine images). Half 1, half 2 and the full set are fits of one function
on three subsets of the particles. A fit sees nothing but its own subset: start, noise spectrum and grey scale come from
the same images that it is fitted to. What the halves share is written in `emsplat.one_pass`.
"""

from __future__ import annotations

import math
import platform
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat import __version__, report
from emsplat.accumulate import (
    PADDING,
    NormalEquations,
    accumulate,
    begin,
    combined,
    contrast,
    held_images,
    mean_per_shell,
    relative_gain,
)
from emsplat.assess.crossvalidate import CrossValidation
from emsplat.assess.fsc import resolution
from emsplat.assessment import assess, given_mask, is_evident, particle_mask
from emsplat.config import RECIPES, AssessConfig, InputConfig, ReconstructConfig
from emsplat.copies import Copies, copies, image_marks, marks_in, mixed_classes
from emsplat.density import fit_doubling
from emsplat.device import (
    choose_device,
    device_name,
    fits_memory,
    forget_peak_memory,
    peak_device_memory,
    within_memory,
)
from emsplat.errors import InputError
from emsplat.fit import Plan, State, fit, load_checkpoint, save_checkpoint
from emsplat.fourier import shell_index
from emsplat.inputs import open_stack, with_boxes
from emsplat.io.files import json_text, number_text
from emsplat.io.mrc import write_map
from emsplat.io.particles import count_stacks, write_used
from emsplat.io.paths import say_folders
from emsplat.io.ply import write_ply
from emsplat.io.table import ParticleTable
from emsplat.models.gaussians import Bounds, GaussianField
from emsplat.models.starts import ball, dense_part, from_gaussians, from_map, uniform
from emsplat.naming import link_results, name_results
from emsplat.objective import ImageObjective, VolumeObjective, support_size
from emsplat.one_pass import Stage, VolumeFit, coarse_steps, fit_course, stage_epochs
from emsplat.particles import ParticleStack, estimate_noise
from emsplat.process import describe_threads, threads
from emsplat.progress import Log, counted, data_size, peak_memory
from emsplat.project import voxelize
from emsplat.report import verdict
from emsplat.residuals import write_residuals
from emsplat.run_folder import (
    History,
    check_same_run,
    interruptible,
    is_finished,
    plain,
    prepare_folder,
    read_summary,
    write_text,
)
from emsplat.start import LOWPASS, check_start, is_shared, read_start, start_remarks, starts_from_gaussians
from emsplat.symmetry import Finding, examine_symmetry
from emsplat.types import Curve, Gaussians, Grid

_HALVES = {"half1": 1, "half2": 2}
_OF_THE_FILE = "of the file"
_PACKAGES = ("emsplat", "torch", "numpy", "scipy", "gemmi", "mrcfile")
_DISK = 2e8  # bytes per second of a slow disk: sums are kept where reading the images again would take longer
_FINEST_DETAIL = 0.4  # voxels as large as this part of the classical resolution are fine enough for the Gaussians


@dataclass(frozen=True)
class Settings:
    """A `ReconstructConfig` with everything decided."""

    engine: str
    gaussians: int | None
    init: str
    epochs: int
    batch: int | Literal["auto"]  # auto: to be found by a trial
    learning_rate: float
    decay: float
    weighting: str
    min_scale: float
    length_unit: float | None
    split_after: tuple[int, ...]
    isotropic: bool
    rotation: bool
    growth: int
    independent_halves: bool
    seed: int


_OF_ONE_ENGINE = {
    "one-pass": ("growth", "independent_halves"),
    "images": ("batch", "weighting", "split_after"),
}


def settings_of(config: ReconstructConfig) -> Settings:
    """Options where given, the recipe's values elsewhere.

    Raises:
        InputError: a value that describes no fit, or an option of the other engine.
    """
    basis: str = "images" if config.recipe == "default" and config.engine == "images" else config.recipe
    recipe = asdict(RECIPES[basis])
    if config.engine not in (None, recipe["engine"]):
        raise InputError(f"--recipe {basis} trains on images; expected --engine images, or leave --engine out")
    for engine, names in _OF_ONE_ENGINE.items():
        for option in names:
            if engine != recipe["engine"] and getattr(config, option) not in (None, False, ()):
                raise InputError(f"--{option.replace('_', '-')} belongs to --engine {engine}; leave it out or add that")
    chosen: dict[str, Any] = {f.name: getattr(config, f.name, None) for f in fields(Settings)}
    counted = config.gaussians is not None or starts_from_gaussians(config.init or recipe["init"])
    if config.growth is None and (counted or config.independent_halves):
        recipe["growth"] = 0  # a number that was asked for stays; nobody judges independent halves
    recipe |= {
        key: value for key, value in (("batch", 0), ("weighting", "noise"), ("growth", 0)) if recipe[key] is None
    }
    merged = Settings(
        **{name: recipe[name] if value is None and name in recipe else value for name, value in chosen.items()}
    )
    for option, least in (("gaussians", 1), ("epochs", 1), ("batch", 1), ("growth", 0)):
        value = getattr(config, option)
        if value not in (None, "auto") and value < least:
            raise InputError(f"--{option} {value}: expected at least {least}")
    _check_start(config, merged)
    if config.independent_halves and merged.growth:
        raise InputError("--growth with --independent-halves: only the other half can tell whether more Gaussians pay")
    for option in ("learning_rate", "decay", "min_scale"):
        if not 0 < getattr(merged, option) < math.inf:
            raise InputError(f"--{option.replace('_', '-')} {getattr(merged, option)}: expected a number above 0")
    if any(not 0 < epoch < merged.epochs for epoch in merged.split_after):
        raise InputError(f"--split-after {merged.split_after}: expected epochs from 1 to {merged.epochs - 1}")
    return merged


def _check_start(config: ReconstructConfig, settings: Settings) -> None:
    check_start(settings.init)
    if config.gaussians is not None and starts_from_gaussians(settings.init):
        raise InputError(f"--gaussians with --init {settings.init}: the file says how many there are; leave it out")
    if config.independent_halves and is_shared(settings.init):
        raise InputError(f"--independent-halves with --init {settings.init}: both halves would start from it; use map")


@dataclass(frozen=True)
class Classical:
    """What one pass over the particles gives: equations and unregularised maps of the halves and of all, a mask.

    The equations are on the device of the run, the maps on the CPU.
    """

    equations: dict[str, NormalEquations]
    raw: dict[str, Tensor]
    mask: Tensor
    validation: CrossValidation
    resolution: float | None  # Å, half maps in the mask at 0.143
    evident: bool  # whether the halves agree beyond the first shells, in a sphere that knows nothing of them


@within_memory()
def backproject(config: InputConfig, particles: Path, output: Path, log: Log | None = None) -> dict[str, Any]:
    """Classical half maps and a full map regularised by their SSNR, into ``output``; returns summary.json.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the sums so far.
    """
    log = log or Log()
    if (finished := _finished(config, particles, output, log)) is not None:
        return finished
    with threads(config.threads):
        return _backproject(config, particles, output, log)


def _backproject(config: InputConfig, particles: Path, output: Path, log: Log) -> dict[str, Any]:
    stack, skipped, symmetry = _open(config, particles, output, log, {}, several_grids=True)
    with log.part("accumulation"):
        classical = _accumulate_all(stack, config, output, log)
    grid = stack.grid
    maps = {name: classical.raw[name] for name in _HALVES}
    maps["class001"] = classical.equations["class001"].solve(_prior(classical.validation.raw).to(stack.device))
    for name, volume in maps.items():
        write_map(output / _map_name(name), volume, grid.pixel_size)
    return _finish(log, output, stack, particles, skipped, symmetry, config, {}, classical, {}, [], [])


@within_memory()
def reconstruct(
    config: ReconstructConfig, particles: Path, output: Path, log: Log | None = None, altered: str | None = None
) -> dict[str, Any]:
    """Runs a whole reconstruction into ``output`` and returns what was written to summary.json.

    ``altered`` is what a null test did to the particles, for the words of the report.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the checkpoint.
    """
    log = log or Log()
    if (finished := _finished(config, particles, output, log)) is not None:
        return finished
    with threads(config.threads):
        return _reconstruct(config, particles, output, log, altered)


def _reconstruct(
    config: ReconstructConfig, particles: Path, output: Path, log: Log, altered: str | None
) -> dict[str, Any]:
    settings = settings_of(config)
    if config.resume and settings.batch == "auto":
        settings = replace(settings, batch=_batch_before(output))
    one_pass = settings.engine == "one-pass"
    stack, skipped, symmetry = _open(config, particles, output, log, plain(settings), several_grids=one_pass)
    _introduce_fit(log, settings)
    with log.part("accumulation"):
        classical = _accumulate_all(stack, config, output, log)
    history = History(output / "convergence.csv")
    stages: list[Stage] = []
    with log.part("fits"):
        if one_pass:
            models, fits = _fit_volumes(stack, classical, settings, stages, output, history, log)
        else:
            settings = _with_batch(stack, classical, settings, config, particles, output, log)
            models, fits = {}, {}
            for name in (*_HALVES, "class001"):
                subset = stack.only(_HALVES[name]) if name in _HALVES else stack
                models[name], fits[name] = _fit_images(
                    name, subset, classical.equations[name], classical.raw[name], settings, config, output, history, log
                )
    for name, model in models.items():
        _write_model(output, name, model, stack.grid)
    for name, volume in classical.raw.items():
        write_map(output / f"backprojection_{name}.mrc", volume, stack.grid.pixel_size)
    with log.part("residuals", "comparing projections with images of the other half"), torch.no_grad():
        examples = write_residuals(
            stack, {number: models[name].gaussians() for name, number in _HALVES.items()}, output
        )
    return _finish(
        log,
        output,
        stack,
        particles,
        skipped,
        symmetry,
        config,
        plain(settings),
        classical,
        fits,
        stages,
        examples,
        altered,
    )


def exit_code(summary: dict[str, Any]) -> int:
    """1 where the particles do not have the symmetry of the run and ``force`` does not say that this is meant."""
    symmetry = summary.get("symmetry")
    return int(symmetry is not None and symmetry["verdict"] == "wrong" and not summary["options"]["force"])


def _open(
    config: InputConfig, particles: Path, output: Path, log: Log, settings: dict[str, Any], *, several_grids: bool
) -> tuple[ParticleStack, list[int], Finding | None]:
    """The particles with half-sets, what is to be said of their symmetry, and the run folder with what is known before
    the work begins."""
    device, said = choose_device(config.device)
    forget_peak_memory(device)
    stack = open_stack(config, particles).on(device)
    for half in _HALVES.values():
        stack.only(half)
    if not several_grids:
        stack.require_one_grid()
    given_mask(config, stack.grid)
    for name in _HALVES:
        read_start(settings.get("init", "map"), stack.grid, name)
    prepare_folder(config, particles, output)
    log.keep_in(output / "run.log")
    for warning in (*stack.table.warnings, *start_remarks(settings.get("init", "map"), stack.grid)):
        log.warn(warning)
    skipped: list[int] = []
    if config.skip_bad:
        stack, bad = stack.without_bad()
        skipped = [row + 1 for row in stack.table.row[bad].tolist()]
        if skipped:
            log.warn(f"left out {len(skipped)} bad images, rows {', '.join(map(str, skipped[:10]))}")
    _introduce(log, stack, config)
    log.line(f"  {said}")
    write_used(with_boxes(stack.table.take(stack.rows)), output / "run_data.star", stack.half)
    _write_config(config, particles, output, settings)
    symmetry = examine_symmetry(stack, config.symmetry) if len(stack.symmetry) > 1 else None
    if symmetry is not None:
        (log.warn if symmetry.verdict == "wrong" else log.line)(f"symmetry {symmetry.text}")
    log.parts["start"] = round(log.seconds, 2)
    return stack, skipped, symmetry


def _finished(config: InputConfig, particles: Path, output: Path, log: Log) -> dict[str, Any] | None:
    """The summary of the run that ``resume`` asks for, with a word, where nothing is left of it to do.

    Raises:
        InputError: the folder holds no such run.
    """
    if not config.resume:
        return None
    check_same_run(config, particles, output)
    summary = read_summary(output)
    if not is_finished(summary):
        return None
    log.line(
        f"{output}: this run is finished, nothing is left to resume and nothing was done; `emsplat report` draws its "
        "page again, --overwrite starts anew"
    )
    for text in verdict.lines(summary):
        log.line(text)
    _say_results(log, output)
    return summary


def _write_config(config: InputConfig, particles: Path, output: Path, settings: dict[str, Any]) -> None:
    about = {"program": f"emsplat {__version__}", "particles": str(particles)}
    write_text(output / "config.toml", tomli_w.dumps({**about, "settings": settings, "options": plain(config)}))


def _accumulate_all(stack: ParticleStack, config: InputConfig, output: Path, log: Log) -> Classical:
    """One pass over the particles; the full set is the sum of the halves."""
    _check_added(stack, config, log)
    equations = {name: _accumulate_half(name, stack, config, output, log) for name in _HALVES}
    equations["class001"] = equations["half1"] + equations["half2"]
    solved = {name: part.solve() for name, part in equations.items()}
    raw = {name: volume.cpu() for name, volume in solved.items()}
    brightness = contrast(raw["class001"])
    if brightness < -0.5:
        log.warn(
            f"the classical map is dark in the centre ({brightness:.1f} standard deviations): the contrast of the "
            "images seems to be the opposite of what was assumed, try "
            + ("without --invert" if stack.sign < 0 else "--invert")
        )
    evident = is_evident((raw["half1"], raw["half2"]), stack.grid, stack.diameter)
    mask = given_mask(config, stack.grid, log)
    if mask is None:
        mask = particle_mask(raw["class001"], stack.grid, stack.diameter, evident)
    write_map(output / "mask.mrc", mask, stack.grid.pixel_size)
    validation = CrossValidation(
        (solved["half1"], solved["half2"]), mask.to(stack.device), stack.grid, len(stack.symmetry)
    )
    curve = Curve(torch.arange(len(validation.raw)).double() / stack.grid.length, validation.raw)
    covered = equations["class001"].coverage()
    if covered < 0.97:
        log.warn(
            f"{1 - covered:.0%} of the Fourier voxels within Nyquist are hardly measured (preferred orientations or "
            "too few particles); they are left empty, not amplified: see the sampling in the report"
        )
    found = resolution(curve, 0.143)
    text = "nowhere above" if found is None else f"{verdict.spacing(found, stack.grid.nyquist)} at"
    log.line(f"classical half maps in the mask: {text} FSC 0.143; Fourier voxels measured: {covered:.1%}")
    return Classical(equations, raw, mask, validation, found, evident)


def _check_added(stack: ParticleStack, config: InputConfig, log: Log) -> None:
    """
    Raises:
        InputError: sums to be added hold images of the other half, or are not there.
    """
    if not config.add_statistics:
        return
    held = {name: [(stack.table.name, _images_of(stack.only(half)))] for name, half in _HALVES.items()}
    for folder in config.add_statistics:
        for name in _HALVES:
            found = sorted(folder.glob(f"run_{name}_statistics*.safetensors"))
            if not found:
                raise InputError(f"{folder}: no run_{name}_statistics.safetensors; run that with --keep-statistics")
            own = [held_images(path) for path in found]
            if not all(map(len, own)):
                log.warn(f"{folder}: does not say which images its sums hold; that none of them is here is assumed")
            for one, other in product(held[name], own):
                if again := len(marks_in(other, one[1])):
                    log.warn(f"{again:,} images of {one[0]}, {name}, are in the sums of {folder} too, and count twice")
            held[name] += [(str(folder), images) for images in own]
    for first, second in product(*held.values()):
        if len(marks_in(first[1], second[1])):
            raise InputError(
                f"{first[0]}, half1, and {second[0]}, half2, hold the same images; their noise would be compared with "
                "itself. Make the sums again with half-sets that agree, or from other particles"
            )


def _images_of(stack: ParticleStack) -> Int[Tensor, "i 3"]:
    return image_marks(stack.table.take(stack.rows))


def _accumulate_half(name: str, stack: ParticleStack, config: InputConfig, output: Path, log: Log) -> NormalEquations:
    """The sums of one half, from where an interrupted run left them, with those of other runs."""
    subset = stack.only(_HALVES[name])
    parts = []
    start = time.monotonic()
    with log.progress(name, len(subset)) as update:
        for number, part in enumerate(subset.parts()):
            saved = output / f"run_{name}_statistics{number or ''}.safetensors"
            parts.append(_accumulate_part(name, part, stack.grid, saved, len(subset), config, update, log))
    seconds = time.monotonic() - start
    rate = "" if config.resume else f", {len(subset) / max(seconds, 1e-9):,.0f} images/s"
    log.line(f"{name}: {len(subset):,} particles accumulated, {seconds:.1f} s{rate}")
    for folder in config.add_statistics:
        for path in sorted(folder.glob(f"run_{name}_statistics*.safetensors")):
            other = begin(subset)
            other.load(path, but={"particles"})
            for part in subset.parts():
                begin(part, stack.grid).check_addable(other, str(path))
            parts.append(other.equations())
            log.line(
                f"{name}: {other.particles:,} particles added from {path}, grey values "
                f"{relative_gain(parts[0], parts[-1]):.3f} times these"
            )
    return combined(parts)


def _accumulate_part(
    name: str,
    part: ParticleStack,
    grid: Grid,
    saved: Path,
    total: int,
    config: InputConfig,
    update: Callable[[int, str], None],
    log: Log,
) -> NormalEquations:
    """The sums over particles of one box and pixel size."""
    statistics = begin(part, grid)
    if config.resume and saved.is_file():
        statistics.load(saved)
        done = f"{statistics.particles:,} of {len(part):,} particles were accumulated before"
        if statistics.particles >= len(part):
            log.line(f"resuming {name}: all {done}")
            return statistics.equations()
        log.line(f"resuming {name}: {done}")
    start = last_save = time.monotonic()
    with interruptible() as stop:
        for _ in accumulate(statistics, part, estimate_noise(part)):
            update(min(statistics.particles, total), "one pass over the particles")
            if stop or time.monotonic() - last_save > config.checkpoint_every:
                statistics.save(saved)
                last_save = time.monotonic()
            if stop:
                raise stop.interruption(
                    f"stopped after {statistics.particles:,} particles of {saved.stem}; go on with --resume"
                )
    # A run that is interrupted later finds them here; they go in the end.
    if config.keep_statistics or time.monotonic() - start > 12 * statistics.weight.numel() / _DISK:
        statistics.save(saved)
    return statistics.equations()


def _prior(fsc: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """1/SSNR of the full set per shell from the FSC of the half maps (Scheres 2012, as RELION uses it).

    The SSNR of a half is FSC / (1 - FSC), that of both together twice as much. From the first shell below 0.143 on it
    is taken as good as empty.
    """
    value = fsc.float().clamp(1e-3, 0.999)
    below = torch.cumsum(fsc < 0.143, 0) > 0
    return torch.where(below, torch.tensor(1e3), (1 - value) / (2 * value))


def _fit_volumes(
    stack: ParticleStack,
    classical: Classical,
    settings: Settings,
    stages: list[Stage],
    output: Path,
    history: History,
    log: Log,
) -> tuple[dict[str, GaussianField], dict[str, Any]]:
    """The one-pass engine: both halves in step, then all particles on the course that the halves found (``stages``)."""
    grid = stack.grid
    shared = not settings.independent_halves
    judge = classical.validation if shared and classical.evident and classical.validation.defined[1:].any() else None
    detail = grid.pixel_size
    if judge is not None and classical.resolution is not None:
        detail = max(detail, _FINEST_DETAIL * classical.resolution)
    support = _support(classical.mask, stack)
    coarse = coarse_steps(settings.epochs) if grid.size > 128 else 0
    plan = Plan(settings.epochs, settings.learning_rate, settings.decay)

    def begin_fit(name: str) -> VolumeFit:
        objective = VolumeObjective(classical.equations[name], support, coarse_steps=coarse)
        model = start_model(classical.raw[name], grid, settings, detail, name).to(stack.device)
        return VolumeFit(name, classical.equations[name], objective, model.with_unit(objective.best_gain(model)))

    halves = [begin_fit(name) for name in _HALVES]
    memory = 4 * (6 * grid.size**3 + 5 * (3 * support // 2) ** 3 + 400 * len(halves[0].model)) / 2**20
    planned = " + ".join(map(str, stage_epochs(settings.epochs, settings.growth if judge is not None else 0)))
    log.line(
        f"fits of {len(halves[0].model):,} Gaussians in {support}³ voxels, at most {planned} epochs of "
        f"{VolumeObjective.steps_per_epoch} steps; about {memory:,.0f} MB more"
    )
    models: dict[str, GaussianField] = {}
    about: dict[str, Any] = {}
    for fits in (halves, None):
        fits = fits or [begin_fit("class001")]
        start = time.monotonic()
        label = " and ".join(one.name for one in fits)
        total = _course_steps(settings, stages) * len(fits)
        with log.progress(label, total, unit="steps") as update, interruptible() as stop:
            done = 0
            for one in fit_course(fits, plan, settings.growth, judge if len(fits) == 2 else None, stages):
                done += 1
                history.add(one.name, one.state, VolumeObjective.steps_per_epoch, one.equations.particles)
                update(min(done, total), f"{len(one.state.model):,} Gaussians{history.loss}")
                if stop:
                    raise stop.interruption(f"stopped in {label}; go on with --resume (the fits begin anew)")
        seconds = time.monotonic() - start
        for one in fits:
            history.rewind(one.name, one.state.step)
            models[one.name] = one.model
            save_checkpoint(output / f"run_{one.name}.safetensors", State.begin(one.model, one.state.step))
            about[one.name] = {
                "particles": one.equations.particles,
                "gaussians": len(one.model),
                "steps": one.state.step,
                "loss": float(one.state.terms["loss"]),
                "seconds": round(seconds / len(fits), 1),
                "milliseconds_per_step": round(1000 * seconds / max(done, 1), 1),
            }
        log.line(f"{label}: {', '.join(f'{len(one.model):,}' for one in fits)} Gaussians, {seconds:.1f} s")
    history.write()
    _write_scores(output / "scores.csv", stages)
    for number, stage in enumerate(stages):
        log.line(
            f"  stage {number + 1}: {stage.gaussians:,} Gaussians, {stage.epochs} epochs"
            + ("" if stage.score is None else f", mean cross-validated FSC {stage.score:.4f}")
            + ("" if stage.gain is None else f", gain {stage.gain:.4f} ± {stage.gain_error:.4f}")
            + ("" if stage.kept else " (worse: taken back)")
        )
    return models, about


def _write_scores(path: Path, stages: list[Stage]) -> None:
    """The mean cross-validated FSC after each epoch that was judged: what the data of the other half say of the fit."""
    rows = [
        f"{epoch},{stage.gaussians},{number_text(score, '.6f')}\n" for stage in stages for epoch, score in stage.scores
    ]
    if rows:
        write_text(path, "".join(["epoch,gaussians,score\n", *rows]))


def _course_steps(settings: Settings, stages: list[Stage]) -> int:
    kept = [stage.epochs for stage in stages if stage.kept]
    epochs = sum(kept or stage_epochs(settings.epochs, settings.growth))
    return epochs * VolumeObjective.steps_per_epoch


def _support(mask: Tensor, stack: ParticleStack) -> int:
    """Voxels across that hold the mask, with a margin for the Gaussians' tails."""
    positions = (mask > 0.01).nonzero() - len(mask) // 2
    reach = int(positions.abs().max()) if len(positions) else len(mask) // 2
    return support_size(2 * reach + 4, stack.grid.size)


def start_model(
    raw: Float[Tensor, "z y x"], grid: Grid, settings: Settings, detail: float, name: str = "class001"
) -> GaussianField:
    """The start of a fit; ``detail`` (Å, at least a voxel) is the finest spacing that the data resolve."""
    length = grid.length if settings.length_unit is None else settings.length_unit * detail
    bounds = Bounds(length, 1.0, settings.min_scale * detail)
    shape = {"isotropic": settings.isotropic, "rotation": settings.rotation}
    given = read_start(settings.init, grid, name)
    if isinstance(given, Gaussians):
        return from_gaussians(given, bounds, **shape)
    fraction = 6 if settings.engine == "one-pass" and settings.growth else 3
    count = settings.gaussians or gaussian_count(raw, grid, detail, fraction)
    if settings.init in ("ball", "uniform"):
        start = ball if settings.init == "ball" else uniform
        return start(count, grid, bounds, settings.seed, **shape)
    return from_map(raw if given is None else given, grid, count, bounds, settings.seed, **shape)


def gaussian_count(raw: Float[Tensor, "z y x"], grid: Grid, detail: float, fraction: int) -> int:
    """One Gaussian per ``fraction`` cells of ``detail``³ in the dense part of a classical map, 1,000 to 100,000."""
    volume = int(dense_part(raw.numpy())[1].sum()) * grid.pixel_size**3
    return int(min(max(volume / detail**3 / fraction, 1_000), 100_000))


def _batch_before(output: Path) -> int | Literal["auto"]:
    """The batch that an interrupted run with ``--batch auto`` found."""
    try:
        batch = tomllib.loads((output / "config.toml").read_text(encoding="utf-8"))["settings"]["batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"  # whether there is a run to resume is asked later
    return batch if isinstance(batch, int) and batch > 0 else "auto"


def _with_batch(
    stack: ParticleStack,
    classical: Classical,
    settings: Settings,
    config: ReconstructConfig,
    particles: Path,
    output: Path,
    log: Log,
) -> Settings:
    """The settings with a batch that fits the memory of the device, written down for a run that is resumed.

    Raises:
        InputError: the batch that was asked for does not fit, or no batch at all.
    """
    wanted = settings.batch
    if wanted != "auto" and config.batch == "auto":
        return settings  # found before the run was interrupted
    basis = "images" if config.recipe == "default" else config.recipe
    size = most = RECIPES[basis].batch or 1 if wanted == "auto" else wanted
    if stack.device.type != "cpu":
        model = start_model(classical.raw["class001"], stack.grid, settings, stack.grid.pixel_size).to(stack.device)
        for _ in settings.split_after:
            model = model.split()
        noise = None if settings.weighting == "none" else estimate_noise(stack)

        def trial() -> None:
            objective = ImageObjective(stack, batch=size, seed=settings.seed, noise=noise)
            for _ in islice(fit(State.begin(model.copy()), objective, Plan(2, 0.0, 1.0)), 2):
                pass

        while not fits_memory(trial):
            if size == 1:
                raise InputError(
                    f"not even one image of {stack.grid.size} px fits the memory of the GPU beside {len(model):,} "
                    "Gaussians; take coarser pixels with --box, fewer --gaussians, or --device cpu"
                )
            size //= 2
    if wanted != "auto" and size < most:
        raise InputError(
            f"--batch {most}: does not fit the memory of the GPU; {size} would, give --batch {size} or --batch auto"
        )
    if wanted == "auto":
        log.line(f"batches of {size} images" + (f", since {2 * size} do not fit the memory" if size < most else ""))
        settings = replace(settings, batch=size)
        _write_config(config, particles, output, plain(settings))
    return settings


def _fit_images(
    name: str,
    stack: ParticleStack,
    equations: NormalEquations,
    raw: Float[Tensor, "z y x"],
    settings: Settings,
    config: ReconstructConfig,
    output: Path,
    history: History,
    log: Log,
) -> tuple[GaussianField, dict[str, Any]]:
    """The image-domain engine: one fit, from the checkpoint if there is one; the model and what is to be reported."""
    start = time.monotonic()
    grid = stack.grid
    finished, checkpoint = output / f"run_{name}.safetensors", output / f"run_{name}.checkpoint.safetensors"
    noise = None if settings.weighting == "none" else estimate_noise(stack)
    if noise is not None and settings.weighting == "ramp":
        noise = noise / ramp(grid.size).to(noise.device)
    assert settings.batch != "auto"  # noqa: S101 (`_with_batch`)
    objective = ImageObjective(stack, batch=settings.batch, seed=settings.seed, noise=noise)
    plan = Plan(settings.epochs, settings.learning_rate, settings.decay)
    total = plan.epochs * len(stack)
    saved = next((path for path in (finished, checkpoint) if config.resume and path.is_file()), None)
    if saved is not None:
        state = load_checkpoint(saved, stack.device)
        where = "finished before" if saved == finished else f"goes on after step {state.step:,}"
        log.line(f"resuming {name}: {where}")
        history.rewind(name, state.step)
    else:
        history.rewind(name, 0)
        model = start_model(raw, grid, settings, grid.pixel_size, name).to(stack.device)
        whole = VolumeObjective(equations, support_size(grid.size, grid.size))
        state = State.begin(model.with_unit(whole.best_gain(model)))
    start_state, first = state, state.step
    with log.progress(name, total, _images_seen(first, objective)) as update, interruptible() as stop:
        last_save = time.monotonic()
        for state in fit_doubling(start_state, objective, plan, settings.split_after):
            seen = _images_seen(state.step, objective)
            history.add(name, state, objective.steps_per_epoch, seen)
            update(seen, f"epoch {math.ceil(state.step / objective.steps_per_epoch)}{history.loss}")
            if stop or time.monotonic() - last_save > config.checkpoint_every:
                save_checkpoint(checkpoint, state)
                history.write()
                last_save = time.monotonic()
            if stop:
                raise stop.interruption(f"stopped in {name} at step {state.step}; go on with --resume")
    save_checkpoint(finished, state)
    history.write()
    checkpoint.unlink(missing_ok=True)
    seconds = time.monotonic() - start
    rate = (total - _images_seen(first, objective)) / max(seconds, 1e-9)
    log.line(f"{name}: {len(stack):,} particles, {len(state.model):,} Gaussians, {seconds:.0f} s, {rate:,.0f} images/s")
    about = {
        "particles": len(stack),
        "gaussians": len(state.model),
        "steps": state.step,
        "loss": history.recent,
        "seconds": round(seconds, 1),
        "images_per_second": round(rate),
    }
    return state.model, about


def _images_seen(step: int, objective: ImageObjective) -> int:
    epoch, position = divmod(step, objective.steps_per_epoch)
    return epoch * len(objective.stack) + min(position * objective.batch, len(objective.stack))


def ramp(size: int) -> Float[Tensor, " s"]:
    """|k| relative to Nyquist per shell. Slices through the origin sample a map with density 1/|k|: this evens it out,
    so that fine detail converges at the pace of the coarse."""
    shells = torch.arange(size // 2 + 1)
    return shells.clamp(min=1) / (size // 2)


def _finish(
    log: Log,
    output: Path,
    stack: ParticleStack,
    particles: Path,
    skipped: list[int],
    symmetry: Finding | None,
    config: InputConfig,
    settings: dict[str, Any],
    classical: Classical,
    fits: dict[str, Any],
    stages: list[Stage],
    examples: list[dict[str, Any]],
    altered: str | None = None,
) -> dict[str, Any]:
    """Verdict, summary and report of a run folder whose maps are written."""
    grid = stack.grid
    write_map(output / "sampling.mrc", sampling(classical.equations["class001"]), grid.pixel_size)
    told = len(log.warnings)
    with log.part("assessment", "assessing the maps: FSC, local resolution, directions"):
        measured = assess(output, AssessConfig(), log, diameter=stack.diameter, symmetry=config.symmetry)
    if not config.keep_statistics:
        for path in output.glob("run_half?_statistics*.safetensors"):
            path.unlink()
    summary = {
        **measured,
        "input": _describe(stack, particles, skipped, config),
        "coverage": round(classical.equations["class001"].coverage(), 4),
        "fits": fits,
        "course": [{key: value for key, value in asdict(stage).items() if key != "scores"} for stage in stages],
        "examples": examples,
        "settings": settings,
        "symmetry": None if symmetry is None else asdict(symmetry),
        "options": plain(config),
        "seconds_of_parts": log.parts,
        "peak_memory_mb": round(peak_memory()),
        "device": device_name(stack.device),
        **({} if (peak := peak_device_memory(stack.device)) is None else {"peak_gpu_memory_mb": round(peak)}),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "warnings": log.warnings,
        "notes": list(stack.table.notes),
        "assessment": {"warnings": log.warnings[told:]},
        **({} if altered is None else {"altered": altered}),
    }
    write_text(output / "summary.json", json_text(summary))
    with log.part("report", "drawing the figures and the report"):
        report.write_report(output)
    # That of the whole nobody knows before the page is drawn.
    summary["seconds"] = round(log.seconds, 1)
    write_text(output / "summary.json", json_text(summary))
    _conclude(log, summary, output)
    if config.naming != "relion":
        table = stack.table.take(stack.rows)
        name_results(output, config.naming, with_boxes(table), log)
    if exit_code(summary):
        log.line(f"exit code 1: not of symmetry {config.symmetry}, and --force does not say that this is meant")
    return summary


def reassess(run: Path, config: AssessConfig, log: Log | None = None) -> dict[str, Any]:
    """Measures the maps of a run folder again, with another mask, a reference or another window; returns the summary.

    Raises:
        InputError: no finished run in the folder, or an option that does not fit it.
    """
    with threads(config.threads):
        return _reassess(run, config, log or Log())


def _reassess(run: Path, config: AssessConfig, log: Log) -> dict[str, Any]:
    summary = read_summary(run)
    about, options = summary.get("input", {}), summary.get("options", {})
    measured = assess(run, config, log, diameter=about.get("diameter"), symmetry=options.get("symmetry", "C1"))
    # Those of the run stay, those of the assessment before this one do not.
    outdated = summary.get("assessment", {}).get("warnings", [])
    kept = [text for text in summary.get("warnings", []) if text not in outdated]
    assessment = {**plain(config), "warnings": log.warnings}
    summary = summary | measured | {"assessment": assessment, "warnings": kept + log.warnings}
    write_text(run / "summary.json", json_text(summary))
    log.line("drawing the figures and the report")
    report.write_report(run)
    link_results(run)
    for text in verdict.lines(summary):
        log.line(text)
    log.line(f"  FSC: {run / 'fsc.star'}; report: {run / 'report.html'}")
    return summary


def sampling(equations: NormalEquations) -> Float[Tensor, "z y x"]:
    """The data's weight in Fourier space relative to the mean of its shell, origin at the centre voxel; 0 beyond
    Nyquist."""
    size = equations.grid.size
    weight, shells = equations.weight(), shell_index(size, 3, equations.kernel.device)
    relative = weight / mean_per_shell(weight).clamp(min=1e-30)[shells.clamp(max=size // 2)]
    relative[shells > size // 2] = 0
    mirror = (-torch.arange(size, device=weight.device)) % size
    rest = relative[mirror][:, mirror][..., mirror[size // 2 + 1 :]]
    centred: Tensor = torch.fft.fftshift(torch.cat([relative, rest], -1))
    return centred


def _map_name(name: str) -> str:
    return "run_class001.mrc" if name == "class001" else f"run_{name}_class001_unfil.mrc"


def _write_model(output: Path, name: str, model: GaussianField, grid: Grid) -> None:
    with torch.no_grad():
        gaussians = model.gaussians()
        write_map(output / _map_name(name), voxelize(gaussians, grid), grid.pixel_size)
        write_ply(
            output / f"run_{name}.ply",
            gaussians.mean.cpu(),
            model.scales().cpu(),
            model.quaternion.cpu(),
            gaussians.amplitude.cpu(),
            grid,
            f"emsplat {__version__}",
        )


def _introduce(log: Log, stack: ParticleStack, config: InputConfig) -> None:
    grid, table = stack.grid, stack.table
    halves = [int((stack.half == h).sum()) for h in (1, 2)]
    log.line(
        f"emsplat {__version__}: {len(stack):,} particles of {table.name} in "
        + counted(count_stacks(table.take(stack.rows)), "stack")
    )
    for text in (say_folders(table.folders), *table.notes):
        log.line(f"  {text}")
    others = [own for own in dict.fromkeys(stack.grids) if own != grid]
    if others:
        kinds = ", ".join(f"{own.size} px of {own.pixel_size:g} Å" for own in others)
        log.line(f"  several kinds of images are put on the grid of most of them; others: {kinds}")
    log.line(
        f"  box {grid.size} px of {grid.pixel_size:g} Å, {counted(len(table.groups), 'optics group')}, symmetry "
        f"{config.symmetry}"
    )
    how = _half_sets_from(table, config)
    seed = "" if how == _OF_THE_FILE else f", seed {config.seed}"
    log.line(f"  half-sets {halves[0]:,} + {halves[1]:,}: {how}{seed}")
    _say_copies(log, copies(table, config.symmetry), table, config)
    if text := mixed_classes(table):
        log.warn(text)
    said = "bright protein" if table.sign > 0 else "dark protein"
    log.line(f"  contrast: {said}, as the file says" + (", inverted with --invert" if config.invert else ""))
    sums = 12 * (PADDING * grid.size) ** 3 / 2
    read = data_size(len(stack) * grid.size**2 * 4)
    log.line(
        f"  one pass over {read} of images; {data_size(3 * sums)} of memory for the sums, "
        f"{describe_threads(config.threads)}"
    )


def _half_sets_from(table: ParticleTable, config: InputConfig) -> str:
    how = "drawn particle by particle"
    if 1 < len(torch.unique(table.micrograph)) < len(table):  # one unit or as many as particles: not known
        how = "drawn per micrograph" if table.micrograph_names else "drawn per stack"
    half = table.half_of_file
    if half is None:
        return f"re{how}" if config.redraw_halves else how
    return _OF_THE_FILE if bool((half > 0).all()) else f"{_OF_THE_FILE}, the rest {how}"


def _say_copies(log: Log, found: Copies, table: ParticleTable, config: InputConfig) -> None:
    if table.left_out:
        log.line(f"  {table.left_out:,} rows that show an image or particle again are left out (--unique)")
    if found.expansion:
        log.line(f"  {found.text}; copies share a half-set")
        if config.symmetry.upper() != "C1":
            log.warn(
                f"the set is {found.text}; --symmetry {config.symmetry} does that again and adds nothing: leave it "
                "out, or leave the copies out with --unique"
            )
    elif found.text:
        log.warn(
            f"{found.text}; they share a half-set and count once where their poses agree, --unique leaves them out"
        )
    if found.close:
        log.warn(found.near)


def _introduce_fit(log: Log, settings: Settings) -> None:
    count = f"{settings.gaussians:,}" if settings.gaussians else "as many as needed"
    if starts_from_gaussians(settings.init):
        count = "those of the file"
    log.line(f"  Gaussians: {count}, from {settings.init}; engine {settings.engine}")
    if is_shared(settings.init):
        _warn_of_shared_start(log, settings.init)
    if settings.engine == "images":
        size = "as many images as fit the memory" if settings.batch == "auto" else settings.batch
        log.line(f"  {settings.epochs} epochs in batches of {size}")
    elif settings.independent_halves:
        log.line("  nothing passes between the half-sets")
    else:
        log.line("  the halves share one number per candidate: the mean cross-validated FSC")


def _warn_of_shared_start(log: Log, init: str) -> None:
    if starts_from_gaussians(init):
        log.warn(
            f"both half-sets start from {init}: their maps share what it holds and the data leave open, and their FSC "
            "flatters; so does the cross-validated FSC where it was made from these particles (a name with half1 in it "
            "gives each half its own file)"
        )
    else:
        log.warn(
            f"both half-sets start from {init}, low-passed at {LOWPASS:g} Å: what is coarser they share; go by the "
            "cross-validated FSC"
        )


def _describe(stack: ParticleStack, particles: Path, skipped: list[int], config: InputConfig) -> dict[str, Any]:
    table = stack.table
    found = copies(table.take(stack.rows), config.symmetry)
    optics, shift = table.optics[stack.rows], table.poses.shift[stack.rows]
    defocus = 0.5 * (optics.defocus_u + optics.defocus_v)
    return {
        "file": str(particles),
        "particles": len(stack),
        "half_sets": [int((stack.half == h).sum()) for h in (1, 2)],
        "half_sets_from": _half_sets_from(table, config),
        "images": found.images,
        "repeated_rows": found.rows,
        "repeated_particles": found.again,
        "left_out_rows": table.left_out,
        "symmetry_expanded": found.expansion,
        "close_to_other_half": found.close,
        "optics_groups": len(table.groups),
        "stacks": count_stacks(table.take(stack.rows)),
        "image_folders": [str(folder) for folder in table.folders],
        "micrographs": len(torch.unique(table.micrograph[stack.rows])),
        "box": stack.grid.size,
        "pixel_size": stack.grid.pixel_size,
        "diameter": round(stack.diameter, 2),
        "contrast": "inverted" if stack.sign < 0 else "bright protein",
        "defocus_range": [round(float(defocus.min())), round(float(defocus.max()))],
        "shift_rms": round(float(shift.square().sum(1).mean().sqrt()), 3),
        "symmetry_elements": len(stack.symmetry),
        "skipped_rows": skipped,
    }


def _conclude(log: Log, summary: dict[str, Any], output: Path) -> None:
    for text in [*verdict.lines(summary), *_said_again(summary["warnings"])]:
        log.line(text)
    log.line(f"{summary['seconds']:.0f} s in all, {summary['peak_memory_mb']:,} MB at most")
    _say_results(log, output)


def _say_results(log: Log, output: Path) -> None:
    for what, name in (
        ("map", "run_class001.mrc"),
        ("half maps", "run_half1_class001_unfil.mrc and run_half2_class001_unfil.mrc"),
        ("FSC", "fsc.star, fsc.png"),
        ("report", "report.html"),
    ):
        log.line(f"  {what}: {output / name}")


def _said_again(warnings: list[str]) -> list[str]:
    """All warnings of a run again at its end, beside the numbers that they concern."""
    return ["warnings of this run:", *(f"  {text}" for text in dict.fromkeys(warnings))] if warnings else []
