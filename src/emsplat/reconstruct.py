"""The programme: particles in, two half maps, a full map, their FSC and a run folder out.

Half 1, half 2 and the full set are three fits of one function on three subsets of the particles. A fit sees nothing
but its own subset: start, noise spectrum and grey scale come from the same images that it is fitted to.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch
from jaxtyping import Float
from torch import Tensor

from emsplat import __version__, report
from emsplat.accumulate import backproject, contrast
from emsplat.assess.fsc import fsc_curve, resolution
from emsplat.assess.mask import spherical_mask
from emsplat.config import RECIPES, ReconstructConfig
from emsplat.errors import EmsplatError, InputError, OutputError
from emsplat.fit import Plan, State, fit, load_checkpoint, save_checkpoint
from emsplat.io.files import replacing
from emsplat.io.mrc import write_map
from emsplat.io.ply import write_ply
from emsplat.io.relion import rewrite_star, write_fsc_star
from emsplat.model import Bounds, GaussianField, ball, dense_part, from_map, uniform
from emsplat.objective import ImageObjective
from emsplat.particles import ParticleStack, estimate_noise, open_particles
from emsplat.progress import Log, peak_memory
from emsplat.project import project, voxelize
from emsplat.types import Curve, Grid, Poses

_INSERTIONS = 8000  # images times symmetry elements of the quick back-projection
_QUICK_BOX = 96  # its largest box
_FITS = {"half1": 1, "half2": 2, "class001": None}
_PACKAGES = ("emsplat", "torch", "numpy", "scipy", "gemmi", "mrcfile")


class Interrupted(EmsplatError):
    """The user or the system asked the run to end; a checkpoint has been written."""

    exit_code = 130


@dataclass(frozen=True)
class Settings:
    """A `ReconstructConfig` with everything decided."""

    gaussians: int | None
    init: str
    epochs: int
    batch: int
    learning_rate: float
    decay: float
    weighting: str
    min_scale: float
    length_unit: float | None
    split_after: tuple[int, ...]
    isotropic: bool
    rotation: bool
    seed: int


def settings_of(config: ReconstructConfig) -> Settings:
    """Options where given, the recipe's values elsewhere.

    Raises:
        InputError: a value that describes no fit.
    """
    recipe = asdict(RECIPES[config.recipe])
    chosen: dict[str, Any] = {f.name: getattr(config, f.name, None) for f in fields(Settings)}
    merged = Settings(
        **{name: recipe[name] if value is None and name in recipe else value for name, value in chosen.items()}
    )
    for name, least in (("gaussians", 1), ("epochs", 1), ("batch", 1)):
        value = getattr(merged, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: expected at least {least}")
    for name in ("learning_rate", "decay", "min_scale"):
        if not 0 < getattr(merged, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(merged, name)}: expected a number above 0")
    if any(not 0 < epoch < merged.epochs for epoch in merged.split_after):
        raise InputError(f"--split-after {merged.split_after}: expected epochs from 1 to {merged.epochs - 1}")
    return merged


def gaussian_count(quick: Float[Tensor, "z y x"], grid: Grid) -> int:
    """One Gaussian per three voxels of the dense part of a quick map, within 1,000 and 50,000."""
    occupied = int(dense_part(quick.numpy())[1].sum()) * (grid.size / len(quick)) ** 3
    return int(min(max(occupied / 3, 1_000), 50_000))


def reconstruct(config: ReconstructConfig, particles: Path, output: Path, log: Log | None = None) -> dict[str, Any]:
    """Runs a whole reconstruction into ``output`` and returns what was written to summary.json.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the checkpoint.
    """
    start = time.monotonic()
    log = log or Log()
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    settings = settings_of(config)
    stack = open_particles(
        particles,
        datadir=config.datadir,
        symmetry=config.symmetry,
        invert=config.invert,
        diameter=config.diameter,
        trust_star_pixel_size=config.trust_star_pixel_size,
    ).with_halves(config.seed)
    for half in (1, 2):
        stack.only(half)
    prepare_folder(config, particles, output)
    log.keep_in(output / "run.log")
    for warning in stack.table.warnings:
        log.warn(warning)
    skipped: list[int] = []
    if config.skip_bad:
        stack, bad = stack.without_bad()
        skipped = [row + 1 for row in bad.tolist()]
        if skipped:
            log.warn(f"left out {len(skipped)} bad images, rows {', '.join(map(str, skipped[:10]))}")
    _introduce(log, stack, settings, config)
    rewrite_star(particles, output / "run_data.star", stack.rows, stack.half[stack.rows])  # type: ignore[index]
    about = {"program": f"emsplat {__version__}", "particles": str(particles)}
    _write_text(
        output / "config.toml", tomli_w.dumps({**about, "settings": _plain(settings), "options": _plain(config)})
    )
    _check_contrast(log, stack)

    history = History(output / "convergence.csv")
    maps: dict[str, Tensor] = {}
    fits: dict[str, Any] = {}
    quick: dict[str, Tensor] = {}
    for name, number in _FITS.items():
        subset = stack if number is None else stack.only(number)
        model, quick[name], fits[name] = _fit_subset(name, subset, settings, config, output, history, log)
        with torch.no_grad():
            maps[name] = voxelize(model(), stack.grid)
        _write_model(output, name, model, maps[name], stack.grid)
    shells, resolutions = assess(maps["half1"], maps["half2"], quick, stack)
    _judge(log, resolutions, stack)
    write_fsc_star(output / "fsc.star", {name: str(value) for name, value in resolutions.items()}, shells)
    summary = {
        "resolution": resolutions,
        "input": _describe(stack, particles, skipped),
        "fits": fits,
        "settings": _plain(settings),
        "options": _plain(config),
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_mb": round(peak_memory()),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "warnings": log.warnings,
    }
    _write_text(output / "summary.json", json.dumps(summary, indent=2))
    report.write_report(output)  # and every figure in it
    _conclude(log, summary, output)
    return summary


def prepare_folder(config: ReconstructConfig, particles: Path, output: Path) -> None:
    """An empty folder, or with ``resume`` one that holds the same run.

    Raises:
        OutputError: it holds something else.
        InputError: it holds a run with other settings.
    """
    if config.resume:
        _check_same_run(config, particles, output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not config.overwrite:
            raise OutputError(
                f"{output}: is not empty; choose another with -o, go on with --resume or start anew with --overwrite"
            )
        if not (output / "config.toml").is_file():
            raise OutputError(
                f"{output}: does not look like a run folder (no config.toml); --overwrite removes only those"
            )
        if particles.resolve().is_relative_to(output.resolve()):
            raise OutputError(f"{output}: holds the input {particles}; choose another folder with -o")
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error


_MAY_CHANGE = {"resume", "overwrite", "threads", "checkpoint_every", "datadir"}


def _check_same_run(config: ReconstructConfig, particles: Path, output: Path) -> None:
    import tomllib

    try:
        before = tomllib.loads((output / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{output}: no run to resume ({error}); start it without --resume") from error
    options = before.get("options", {})
    now = json.loads(json.dumps(_plain(config)))
    changed = [
        name for name in now.keys() | options.keys() if name not in _MAY_CHANGE and now.get(name) != options.get(name)
    ]
    if before.get("particles") != str(particles):
        changed.append("particles")
    if changed:
        raise InputError(
            f"{output}: was run with another {', '.join(sorted(changed))}; resume with the same options, see "
            f"{output / 'config.toml'}"
        )


def _plain(config: Any) -> dict[str, Any]:
    """A dataclass as TOML and JSON can hold it: without None, paths as text."""
    items = asdict(config).items()
    return {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in items if v is not None
    }


def _introduce(log: Log, stack: ParticleStack, settings: Settings, config: ReconstructConfig) -> None:
    grid, table = stack.grid, stack.table
    halves = [int((stack.half[stack.rows] == h).sum()) for h in (1, 2)]  # type: ignore[index]
    log.line(f"emsplat {__version__}: {len(stack):,} particles of {table.source} in {len(table.stacks)} stacks")
    log.line(
        f"  box {grid.size} px of {grid.pixel_size:g} Å, optics groups {len(table.groups)}, symmetry {config.symmetry}"
    )
    source = "of the STAR file" if table.half is not None else f"drawn per micrograph with seed {config.seed}"
    log.line(f"  half-sets {halves[0]:,} + {halves[1]:,}, {source}")
    log.line(
        "  contrast: " + ("inverted with --invert" if config.invert else "bright protein, as a STAR file means it")
    )
    count = f"{settings.gaussians:,}" if settings.gaussians else "as many as needed"
    log.line(f"  Gaussians: {count}, from {settings.init}")
    log.line(f"  {settings.epochs} epochs in batches of {settings.batch}, {torch.get_num_threads()} threads")


def _check_contrast(log: Log, stack: ParticleStack) -> None:
    brightness = contrast(stack)
    if brightness < -0.5:
        log.warn(
            f"a quick back-projection is dark in the centre ({brightness:.1f} standard deviations): the contrast of "
            "the images seems to be the opposite of what was assumed, try "
            + ("without --invert" if stack.sign < 0 else "--invert")
        )


def _fit_subset(
    name: str,
    stack: ParticleStack,
    settings: Settings,
    config: ReconstructConfig,
    output: Path,
    history: History,
    log: Log,
) -> tuple[GaussianField, Tensor, dict[str, Any]]:
    """One fit, from the checkpoint if there is one: the model, the quick back-projection and what is to be reported."""
    start = time.monotonic()
    log.line(f"{name}: {len(stack):,} particles, quick back-projection")
    finished, checkpoint = output / f"run_{name}.safetensors", output / f"run_{name}.checkpoint.safetensors"
    quick = quick_map(stack)
    noise = None if settings.weighting == "none" else estimate_noise(stack)
    if noise is not None and settings.weighting == "ramp":
        noise = noise / ramp(stack.grid.size)
    objective = ImageObjective(stack, batch=settings.batch, seed=settings.seed, noise=noise)
    plan = Plan(settings.epochs, settings.learning_rate, settings.decay, settings.split_after)
    total = plan.epochs * len(stack)
    saved = next((path for path in (finished, checkpoint) if config.resume and path.is_file()), None)
    if saved is not None:
        state = load_checkpoint(saved)
        history.rewind(name, state.step)
    else:
        history.rewind(name, 0)
        state = State.begin(initial_model(stack, quick, objective, settings))
    start_state, first = state, state.step
    with log.progress(name, total, _images_seen(first, objective)) as update, interruptible() as stop:
        last_save = time.monotonic()
        for state in fit(start_state, objective, plan):
            seen = _images_seen(state.step, objective)
            history.add(name, state, objective.steps_per_epoch, seen)
            update(seen, f"epoch {math.ceil(state.step / objective.steps_per_epoch)}, loss {history.recent:.5f}")
            if stop.is_set() or time.monotonic() - last_save > config.checkpoint_every:
                save_checkpoint(checkpoint, state)
                history.write()
                last_save = time.monotonic()
            if stop.is_set():
                raise Interrupted(f"stopped in {name} at step {state.step}; go on with --resume")
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
    return state.model, quick, about


def _images_seen(step: int, objective: ImageObjective) -> int:
    epoch, position = divmod(step, objective.steps_per_epoch)
    return epoch * len(objective.stack) + min(position * objective.batch, len(objective.stack))


def ramp(size: int) -> Float[Tensor, " s"]:
    """|k| relative to Nyquist per shell. Slices through the origin sample a map with density 1/|k|: this evens it out,
    so that fine detail converges at the pace of the coarse."""
    shells = torch.arange(size // 2 + 1)
    return shells.clamp(min=1) / (size // 2)


def quick_map(stack: ParticleStack) -> Float[Tensor, "z y x"]:
    """A back-projection of at most `_INSERTIONS` slices in a box of at most `_QUICK_BOX`."""
    rows = min(len(stack), max(_INSERTIONS // len(stack.symmetry), 200))
    positions = torch.linspace(0, len(stack) - 1, rows).long()
    return backproject(stack.take(positions), min(stack.grid.size, _QUICK_BOX))


def initial_model(
    stack: ParticleStack, quick: Float[Tensor, "z y x"], objective: ImageObjective, settings: Settings
) -> GaussianField:
    """The start of the recipe, its total amplitude matched to the images by least squares."""
    grid = stack.grid
    count = settings.gaussians or gaussian_count(quick, grid)
    length = grid.length if settings.length_unit is None else settings.length_unit * grid.pixel_size
    bounds = Bounds(length, 1.0, settings.min_scale * grid.pixel_size)
    shape = {"isotropic": settings.isotropic, "rotation": settings.rotation}
    if settings.init == "map":
        coarse = Grid(len(quick), grid.length / len(quick))
        model = from_map(quick, coarse, count, bounds, settings.seed, **shape)
    else:
        start = {"ball": ball, "uniform": uniform}[settings.init]
        model = start(count, grid, bounds, settings.seed, **shape)
    return model.with_unit(matching_unit(model, objective))


def matching_unit(model: GaussianField, objective: ImageObjective, particles: int = 512) -> float:
    """The factor on all amplitudes that brings projections closest to the images; positive."""
    stack = objective.stack
    numerator, denominator = 0.0, 0.0
    positions = torch.linspace(0, len(stack) - 1, min(particles, len(stack))).long()
    with torch.no_grad():
        gaussians = model()
        for batch in stack.take(positions).sequential(32):
            seen = objective.observe(batch)
            centred = Poses(batch.poses.rotation, torch.zeros_like(batch.poses.shift))
            predicted = torch.fft.rfft2(project(gaussians, centred, stack.grid)) * seen.transfer
            numerator += float(((predicted.conj() * seen.spectrum).real * seen.weight).sum())
            denominator += float((predicted.abs().square() * seen.weight).sum())
    factor = numerator / max(denominator, 1e-30)
    # Where the images do not correlate with the start, a tenth of their own power is a harmless beginning.
    return factor if factor > 0 else 0.1 * stack.grid.size / math.sqrt(max(denominator, 1e-30) / particles)


def assess(
    half1: Tensor, half2: Tensor, quick: dict[str, Tensor], stack: ParticleStack
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Columns of the FSC table and resolutions in Å (None where a curve does not reach the threshold)."""
    grid = stack.grid
    edge = 6 * grid.pixel_size
    mask = spherical_mask(grid, min(stack.diameter, grid.length - 2 * edge), edge)
    curves = {"unmasked": fsc_curve(half1, half2, grid), "masked": fsc_curve(half1, half2, grid, mask)}
    coarse = Grid(len(quick["half1"]), grid.length / len(quick["half1"]))
    coarse_edge = max(edge, 3 * coarse.pixel_size)
    coarse_mask = spherical_mask(coarse, min(stack.diameter, grid.length - 2 * coarse_edge), coarse_edge)
    classical = fsc_curve(quick["half1"], quick["half2"], coarse, coarse_mask)
    resolutions = {
        f"half_map_{name}{suffix}": resolution(curve, threshold)
        for name, curve in curves.items()
        for suffix, threshold in (("", 0.143), ("_0.5", 0.5))
    }
    resolutions["quick_backprojection_masked"] = resolution(classical, 0.143)
    return _fsc_columns(curves["unmasked"], curves["masked"], grid), resolutions


def _fsc_columns(unmasked: Curve, masked: Curve, grid: Grid) -> dict[str, list[float]]:
    shells = range(len(unmasked.value))
    return {
        "rlnSpectralIndex": list(shells),
        "rlnResolution": [s / grid.length for s in shells],
        "rlnAngstromResolution": [grid.length / s if s else 999.0 for s in shells],
        "rlnFourierShellCorrelationUnmaskedMaps": unmasked.value.tolist(),
        "rlnFourierShellCorrelationMaskedMaps": masked.value.tolist(),
    }


def _judge(log: Log, resolutions: dict[str, float | None], stack: ParticleStack) -> None:
    """Takes back resolutions that the particles themselves do not bear out.

    The start from a map and the shape of the box make two fits to noise alike in the first shells, so a model's FSC
    alone says nothing there. The classical maps of the halves carry no such likeness: where they do not correlate
    beyond the first few shells, there is no particle to resolve.
    """
    classical = resolutions["quick_backprojection_masked"]
    if classical is None or classical > stack.grid.length / _FIRST_SHELLS:
        for name in [name for name in resolutions if name.startswith("half_map")]:
            resolutions[name] = None
        log.warn(
            "the two half-sets, classically back-projected, do not agree beyond the first "
            f"{_FIRST_SHELLS} shells: no particle was found in the images (noise, wrong poses or wrong CTF), and no "
            "resolution is given"
        )


_FIRST_SHELLS = 4


def _write_model(output: Path, name: str, model: GaussianField, volume: Tensor, grid: Grid) -> None:
    suffix = "class001" if name == "class001" else f"{name}_class001_unfil"
    write_map(output / f"run_{suffix}.mrc", volume, grid.pixel_size)
    with torch.no_grad():
        gaussians = model()
        write_ply(
            output / f"run_{name}.ply",
            gaussians.mean,
            model.scales(),
            model.quaternion,
            gaussians.amplitude,
            grid,
            f"emsplat {__version__}",
        )


def _describe(stack: ParticleStack, particles: Path, skipped: list[int]) -> dict[str, Any]:
    table = stack.table
    optics, shift = table.optics[stack.rows], table.poses.shift[stack.rows]
    defocus = 0.5 * (optics.defocus_u + optics.defocus_v)
    return {
        "file": str(particles),
        "particles": len(stack),
        "half_sets": [int((stack.half[stack.rows] == h).sum()) for h in (1, 2)],  # type: ignore[index]
        "half_sets_from": "input" if table.half is not None else "drawn per micrograph",
        "optics_groups": len(table.groups),
        "stacks": len(table.stacks),
        "micrographs": int(table.micrograph.max()) + 1,
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
    values = summary["resolution"]

    def text(name: str) -> str:
        return "none" if values[name] is None else f"{values[name]:.2f} Å"

    log.line(
        f"half-map FSC 0.143 (RELION's rule): {text('half_map_unmasked')} unmasked, {text('half_map_masked')} in a "
        f"soft sphere; 0.5: {text('half_map_unmasked_0.5')}, {text('half_map_masked_0.5')}"
    )
    log.line("  (two Gaussian models agree beyond what the data support: read these as upper limits)")
    log.line(f"{summary['seconds']:.0f} s, {summary['peak_memory_mb']:,} MB at most")
    for what, name in (
        ("map", "run_class001.mrc"),
        ("half maps", "run_half1_class001_unfil.mrc and run_half2_class001_unfil.mrc"),
        ("FSC", "fsc.star, fsc.png"),
        ("report", "report.html"),
    ):
        log.line(f"  {what}: {output / name}")


class History:
    """The loss over time, one row per `_EVERY` steps and at the end of each epoch, kept in convergence.csv."""

    _EVERY = 20
    _COLUMNS = ("fit", "epoch", "step", "images", "loss")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[str, int, int, int, float]] = []
        self._pending: list[Tensor] = []
        self.recent = math.nan
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = [
                    (row["fit"], int(row["epoch"]), int(row["step"]), int(row["images"]), float(row["loss"]))
                    for row in csv.DictReader(file)
                ]

    def rewind(self, name: str, step: int) -> None:
        """Forgets what this fit did after ``step``."""
        self._rows = [row for row in self._rows if row[0] != name or row[2] <= step]
        self._pending = []
        self.recent = next((row[4] for row in reversed(self._rows) if row[0] == name), math.nan)

    def add(self, name: str, state: State, steps_per_epoch: int, images: int) -> None:
        self._pending.append(state.terms["loss"])
        if state.step % steps_per_epoch == 0 or len(self._pending) == self._EVERY:
            self.recent = float(torch.stack(self._pending).mean())
            epoch = math.ceil(state.step / steps_per_epoch)
            self._rows.append((name, epoch, state.step, images, self.recent))
            self._pending = []

    def write(self) -> None:
        with replacing(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._COLUMNS)
            writer.writerows(self._rows)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a polite kill sets, so that a step is never cut in two."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
