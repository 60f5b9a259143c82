"""One pass over the particles: sums, classical maps, mask, cross-validation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat import report
from emsplat.assessment.maps import given_mask, is_evident, particle_mask
from emsplat.config import RunConfig
from emsplat.errors import InputError
from emsplat.io.mrc import write_map
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.curves import resolution
from emsplat.parallel import ALONE, World
from emsplat.particles.copies import image_marks, marks_in
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.programs.run import Run
from emsplat.programs.shown import note_curve, show_slices
from emsplat.report import verdict
from emsplat.run.files import HALVES, MASK, statistics_name
from emsplat.run.folder import added_statistics
from emsplat.run.log import Log
from emsplat.run.stop import checkpoints
from emsplat.sums.equations import ClassicalEquations, NormalEquations, circulant, combined, contrast, relative_gain
from emsplat.sums.statistics import FourierStatistics, accumulate, begin, held_images
from emsplat.types import Curve

_DISK = 2e8  # bytes per second of a slow disk: sums are kept where reading the images again would take longer


@dataclass(frozen=True)
class Classical:
    """What one pass over the particles gives: equations and unregularised maps of the halves and of all, a mask.

    The equations are on the device of the run, the maps on the CPU. ``equations`` has those of the halves, which are
    the largest things that a run holds, until `whole` takes them or nothing needs them any more and it is emptied.
    """

    equations: dict[str, NormalEquations]
    all_particles: ClassicalEquations
    raw: dict[str, Tensor]
    mask: Tensor
    validation: CrossValidation
    coverage: float  # as `ClassicalEquations.coverage`
    resolution: float | None  # Å, half maps in the mask at 0.143
    evident: bool  # whether the halves agree beyond the first shells, in a sphere that knows nothing of them

    def regularised(self) -> Float[Tensor, "z y x"]:
        """The map of all particles: what the halves agree on decides how far it is trusted."""
        both = self.all_particles
        return both.solve(ssnr_prior(self.validation.raw).to(both.linear.device))

    def whole(self) -> NormalEquations:
        """The equations of all particles, in the memory of those of the halves, which are gone."""
        first, second = (self.equations.pop(name) for name in HALVES)
        first.linear.add_(second.linear)
        first.kernel.add_(second.kernel)
        return replace(first, particles=first.particles + second.particles)


def accumulate_all(run: Run[RunConfig]) -> Classical:
    """One pass over the particles; the full set is the sum of the halves.

    Raises:
        InputError: sums that are to be added do not fit.
        Interrupted: asked to stop; the sums so far are in the folder.
    """
    with run.log.part("accumulation"):
        _check_added(run)
        sums = {name: _accumulate_half(run, name) for name in HALVES}
        with run.log.step("classical maps"):
            return settle(run, sums)


def _decided(world: World, classical: Classical) -> Classical:
    """What follows from the maps as the first process has it: other processors may round in another way."""
    world.spread_(classical.mask)
    evident, found = json.loads(world.told(json.dumps([classical.evident, classical.resolution])))
    return replace(classical, evident=evident, resolution=found)


def settle(run: Run[RunConfig], equations: dict[str, NormalEquations]) -> Classical:
    """Classical maps from the sums of the halves, the mask written, and what is to be said of them.

    The report's imports begin here: before, they would hold up the first maps.
    """
    classical = judge(equations, run.stack, given_mask(run.config.mask, run.stack.grid, run.log), run.world)
    if run.world.first:
        write_map(run.folder / MASK, classical.mask, run.stack.grid.pixel_size)
    _tell(classical, run)
    show(classical, run)
    if run.world.first:
        report.prepare(torch.get_num_threads())
    return classical


def judge(
    halves: dict[str, NormalEquations], stack: ParticleStack, mask: Tensor | None = None, world: World = ALONE
) -> Classical:
    """Maps from the sums of the halves of ``stack``, and how far these agree; without ``mask`` in one that is made.
    Processes of a ``world`` have the sums of all."""
    both = _of_all(halves["half1"], halves["half2"])
    solved = {name: part.solve() for name, part in halves.items()} | {"class001": both.solve()}
    raw = {name: volume.cpu() for name, volume in solved.items()}
    grid = stack.grid
    evident = is_evident((raw["half1"], raw["half2"]), grid, stack.diameter)
    if mask is None:
        mask = particle_mask(raw["class001"], grid, stack.diameter, evident)
    pair = solved["half1"], solved["half2"]
    validation = CrossValidation(pair, mask.to(pair[0].device), grid, stack.symmetry.order)
    curve = Curve(torch.arange(len(validation.raw)).double() / grid.length, validation.raw)
    found = resolution(curve, 0.143)
    return _decided(world, Classical(halves, both, raw, mask, validation, both.coverage(), found, evident))


def _of_all(one: NormalEquations, other: NormalEquations) -> ClassicalEquations:
    """What the classical map of both sets needs, without a sum of their kernels."""
    weight = circulant(one.kernel, one.grid.size).add_(circulant(other.kernel, one.grid.size))
    return ClassicalEquations(one.linear + other.linear, weight.clamp_(min=0))


def show(classical: Classical, run: Run[RunConfig]) -> None:
    """The classical maps so far, for those who watch."""
    grid = run.stack.grid
    curve = Curve(torch.arange(len(classical.validation.raw)).double() / grid.length, classical.validation.raw)
    note_curve(run.log.journal, "class001", 0, "backprojection", curve, 0.143, grid)
    show_slices(run.folder, classical.raw, grid)


def _tell(classical: Classical, run: Run[RunConfig]) -> None:
    """What the user should know of the classical maps."""
    _warn_of_contrast(classical.raw["class001"], run)
    covered, found = classical.coverage, classical.resolution
    if covered < 0.97:
        run.log.warn(
            f"{1 - covered:.0%} of the Fourier voxels within Nyquist are hardly measured (preferred orientations or "
            "too few particles); they are left empty, not amplified: see the sampling in the report"
        )
    text = "nowhere above" if found is None else f"{verdict.spacing(found, run.stack.grid.nyquist)} at"
    run.log.line(f"classical half maps in the mask: {text} FSC 0.143; Fourier voxels measured: {covered:.1%}")


def _warn_of_contrast(volume: Tensor, run: Run[RunConfig]) -> None:
    brightness = contrast(volume)
    if brightness < -0.5:
        run.log.warn(
            f"the classical map is dark in the centre ({brightness:.1f} standard deviations): the contrast of the "
            "images seems to be the opposite of what was assumed, try "
            + ("without --invert" if run.stack.sign < 0 else "--invert")
        )


def _check_added(run: Run[RunConfig]) -> None:
    """
    Raises:
        InputError: sums to be added hold images of the other half, or are not there.
    """
    if not run.config.run.add_statistics or not run.world.first:
        return
    held = {name: [(run.stack.table.name, _images_of(run.stack.only(half)))] for name, half in HALVES.items()}
    for folder, name in product(run.config.run.add_statistics, HALVES):
        held[name] += _held_by(folder, name, held[name], run.log)
    for first, second in product(*held.values()):
        if len(marks_in(first[1], second[1])):
            raise InputError(
                f"{first[0]}, half1, and {second[0]}, half2, hold the same images; their noise would be compared with "
                "itself. Make the sums again with half-sets that agree, or from other particles"
            )


_Held = tuple[str, Int[Tensor, "_ 3"]]  # who holds images, and which


def _held_by(folder: Path, name: str, before: list[_Held], log: Log) -> list[_Held]:
    """The images in the sums of another run; warns of those that are there ``before``.

    Raises:
        InputError: the folder has no sums.
    """
    own = [held_images(path) for path in added_statistics(folder, name)]
    if not all(map(len, own)):
        log.warn(f"{folder}: does not say which images its sums hold; that none of them is here is assumed")
    for one, other in product(before, own):
        if again := len(marks_in(other, one[1])):
            log.warn(f"{again:,} images of {one[0]}, {name}, are in the sums of {folder} too, and count twice")
    return [(str(folder), images) for images in own]


def _images_of(stack: ParticleStack) -> Int[Tensor, "i 3"]:
    return image_marks(stack.table.take(stack.rows))


def _accumulate_half(run: Run[RunConfig], name: str) -> NormalEquations:
    """The sums of one half, from where an interrupted run left them, with those of other runs."""
    subset = run.stack.only(HALVES[name])
    start = time.monotonic()
    parts: list[NormalEquations] = []
    with run.log.step(name), run.log.progress(name, len(subset)) as update:
        done = 0
        for number, part in enumerate(subset.parts()):
            saved = run.folder / statistics_name(name, number or "")
            parts.append(_accumulate_part(run, name, part, saved, _counted_from(done, update)))
            done += len(part)
    seconds = time.monotonic() - start
    rate = "" if run.config.run.resume else f", {len(subset) / max(seconds, 1e-9):,.0f} images/s"
    run.log.line(f"{name}: {len(subset):,} particles accumulated, {seconds:.1f} s{rate}")
    for folder in run.config.run.add_statistics if run.world.first else ():
        for path in added_statistics(folder, name):
            other = _added(path, subset)
            parts.append(other.used_up())
            gain = relative_gain(parts[0], parts[-1])
            run.log.line(f"{name}: {other.particles:,} particles added from {path}, grey values {gain:.3f} times these")
            if gain < 0:
                run.log.warn(
                    f"{path}: its images have the contrast opposite to these, and were turned; was --invert right in "
                    "both runs?"
                )
    equations = combined(parts)
    if run.config.run.add_statistics:
        run.world.spread_(equations.linear, equations.kernel)
        equations = replace(equations, particles=int(run.world.told(str(equations.particles))))
    return equations


def _counted_from(before: int, update: Callable[[int, str], None]) -> Callable[[int], None]:
    """Progress within one part of a pass that had ``before`` images before it."""
    return lambda done: update(before + done, "one pass over the particles")


def _added(path: Path, subset: ParticleStack) -> FourierStatistics:
    """The sums of another run over more of the same particles.

    Raises:
        InputError: they hold other particles, or do not fit.
    """
    other = begin(subset)
    other.load(path, but={"particles"})
    for part in subset.parts():
        begin(part, subset.grid).check_addable(other, str(path))
    return other


def _accumulate_part(
    run: Run[RunConfig], name: str, part: ParticleStack, saved: Path, update: Callable[[int], None]
) -> NormalEquations:
    """The sums over particles of one box and pixel size."""
    world, options = run.world, run.config.run
    statistics = begin(part, run.stack.grid)
    if world.first and options.resume and saved.is_file():
        statistics.load(saved)
        statistics.expect(len(part))
        everything = "all " if statistics.particles >= len(part) else ""
        run.log.line(
            f"resuming {name}: {everything}{statistics.particles:,} of {len(part):,} particles were accumulated before"
        )
    statistics.expect(len(part))
    statistics.collect(world)  # which are done
    if statistics.particles >= len(part):
        statistics.gather(world)
        return statistics.used_up()
    start, before = time.monotonic(), statistics.particles
    with checkpoints(options.checkpoint_every, world, options.time_limit) as moment:
        for _ in accumulate(statistics, part, estimate_noise(part), world):
            update(min(before + world.size * (statistics.particles - before), len(part)))
            if moment.due():
                statistics.collect(world)
                if world.first:
                    statistics.save(saved)
                before = statistics.particles
                moment.saved(f"after {statistics.particles:,} particles of {saved.stem}; go on with --resume")
    # A run that is interrupted later finds them here; they go in the end.
    long = time.monotonic() - start > 12 * statistics.weight.numel() / _DISK
    statistics.gather(world)
    if world.first and (options.keep_statistics or long):
        statistics.save(saved)
    return statistics.used_up()


def ssnr_prior(fsc: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """1/SSNR of the full set per shell from the FSC of the half maps (Scheres 2012, as RELION uses it).

    The SSNR of a half is FSC / (1 - FSC), that of both together twice as much. From the first shell below 0.143 on it
    is taken as good as empty.
    """
    value = fsc.float().clamp(1e-3, 0.999)
    below = torch.cumsum(fsc < 0.143, 0) > 0
    return torch.where(below, torch.tensor(1e3), (1 - value) / (2 * value))
