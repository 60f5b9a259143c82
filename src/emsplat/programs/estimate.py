"""How long a run will take, and how much memory and disk it will need; the only place where that is reckoned.

Rates are those of one core, measured on an AMD EPYC (docs/log.md), and scaled by how fast this one transforms a small
volume. What is not known before the images are read, the number of Gaussians, the size of the particle, how many states
it has and how soon a start or a refinement settles, is taken as usual.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from emsplat.config import AbinitioConfig, HeterogeneityConfig, RefineConfig, RunConfig
from emsplat.fitting.course import stage_epochs
from emsplat.fitting.volume import VolumeObjective
from emsplat.particles.stack import ParticleStack
from emsplat.programs.settings import Settings
from emsplat.run.journal import Foreseen
from emsplat.run.log import data_size, duration
from emsplat.sums.lattice import Lattice
from emsplat.sums.window import PADDING

if TYPE_CHECKING:
    from emsplat.heterogeneity.images import ConformationOptions

_TRANSFORM = 0.72e-3  # seconds of one core for the transform of 64³ numbers, where the rates below were measured
_PIXEL = 58e-9  # seconds to read, transform and insert a pixel of an image
_ELEMENT = (7e-9, 0.33e-9)  # to insert it once more under an element of a symmetry, and more for each pixel of the box
_STEP = 3e-3  # of a step of a fit
_VOXEL = (12e-9, 1e-15)  # for each point of its transforms, and more for each point, as caches are left behind
_GAUSSIAN = 1.5e-6  # for each Gaussian
_RENDERED = 9e-9  # to render and compare a pixel of an image, forward and back
_JUDGED = 4.5e-6  # seconds of the assessment for a voxel
_BEGIN, _REPORT, _OF_FITS = 2.5, 3.0, 1.6  # seconds of imports, and of a report with figures; of those of fits
_EXAMPLES = 0.4  # seconds to compare some images with the fits
_DISK = 3e8  # bytes per second that a disk gives
_PROGRAM = 3.8e8  # bytes of Python, PyTorch and what they load
_FITTING = 6e7  # bytes more that fits and their figures load
_PARTICLE = 1300  # bytes for what is known of a particle
_PIECES = 6e7  # bytes of what is looked at some planes at a time
_MAPS = 68  # bytes for each voxel of the box at the peak, when maps of halves are judged beside their equations
_DRAWING = (30, 5e8)  # and more where Gaussians are fitted, but at most so many bytes
_STEPPING = (31, 90)  # in steps of both fits: bytes for each voxel of the box, and of the middle that they look at
_GAINING_MAPS = (59, 36)  # and when two stages are compared
_MARGIN = 0.1  # of the box, that the fits look at beyond the particle
_SPARED = 0.9  # of another thread's time that is not spent on waiting
_USUAL = 0.6  # of the box, how wide a particle is, where nobody has measured it
_UNMEASURED = 0.89  # of the box: a diameter from there on nobody has given
_FILLED = 0.002  # Gaussians at the start for each voxel of the box


@dataclass(frozen=True)
class Estimate:
    """What a run will need: wall time, as a whole and of its parts, memory of each process, disk for its results."""

    parts: tuple[Foreseen, ...]
    memory: float  # bytes
    disk: float  # bytes
    begin: float = field(default=_BEGIN)  # seconds before the first part
    more: float = 0.0  # seconds, where starts from nothing do not agree until all are made

    @property
    def seconds(self) -> float:
        """From the command to its end."""
        return self.begin + sum(part.seconds for part in self.parts)

    @property
    def longest(self) -> float:
        """As `seconds`, where nothing goes as it usually does."""
        return self.seconds + self.more

    @property
    def text(self) -> str:
        """For the user."""
        longest = f" ({duration(self.longest)} where starts do not agree)" if self.more else ""
        needed = f"{data_size(self.memory)} of memory, {data_size(self.disk)} on disk"
        return f"about {duration(self.seconds)}{longest}, {needed}"

    def about(self) -> dict[str, Any]:
        """For the summary, to stand beside what was needed."""
        parts = {part.name: round(part.seconds, 1) for part in self.parts}
        return {
            "seconds": self.seconds,
            "longest": self.longest,
            "memory": self.memory,
            "disk": self.disk,
            "seconds_of_parts": parts,
        }


@dataclass(frozen=True)
class _Machine:
    """Who computes: threads of each of some processes, and the speed of a core."""

    threads: int
    processes: int
    speed: float

    @property
    def cores(self) -> float:
        """Of one process, in cores as they were measured."""
        return float(self.threads**_SPARED * self.speed)

    def shared(self, seconds: float) -> float:
        """Wall time of work that all processes share out."""
        return seconds / self.cores / self.processes

    def first(self, seconds: float) -> float:
        """Of work that the first does alone."""
        return seconds / self.cores

    def halves(self, seconds: float) -> float:
        """Of work on both half-sets, which two processes do at the same time."""
        return seconds / self.cores / min(self.processes, 2)

    def alone(self, seconds: float) -> float:
        """Of work on one core."""
        return seconds / self.speed


def _expected(*parts: tuple[str, float] | Sequence[tuple[str, float]]) -> tuple[Foreseen, ...]:
    """Parts in their order; those of a list come in each other's midst."""
    found = []
    for turn, given in enumerate(parts):
        together = [given] if isinstance(given, tuple) else given
        found += [Foreseen(name, round(seconds, 3), turn) for name, seconds in together]
    return tuple(found)


def estimate_of(
    config: RunConfig,
    stack: ParticleStack,
    settings: Settings | None,
    *,
    threads: int,
    processes: int = 1,
    kept: bool = False,
    speed: float = 1.0,
) -> Estimate:
    """What the command of these options will need on CPUs.

    ``settings`` are those of its fit, where it has one; ``threads`` are those of each of so many ``processes``;
    ``kept`` says that sums stay on disk; ``speed`` is that of a core, in units of the one that was measured
    (`speed_of_core`).
    """
    machine = _Machine(threads, processes, speed)
    if isinstance(config, RefineConfig) and settings is not None:
        return _of_refinement(config, stack, settings, machine, kept)
    if isinstance(config, AbinitioConfig):
        return _of_abinitio(config, stack, machine)
    if isinstance(config, HeterogeneityConfig):
        return _of_heterogeneity(config, stack, machine)
    return _of_reconstruction(stack, settings, machine, kept)


_HELD_EACH, _WRITTEN_EACH = 780, 350  # bytes of memory and of disk for each Gaussian of all fits


def _of_reconstruction(stack: ParticleStack, settings: Settings | None, machine: _Machine, kept: bool) -> Estimate:
    voxels, padded = stack.grid.size**3, (PADDING * stack.grid.size) ** 3
    passing = _passing(stack)
    reading = stack.stored / _DISK
    fits = []
    if settings is not None:
        fits = [("fits", _fits(stack, settings, machine)), ("residuals", machine.alone(_EXAMPLES))]
    parts = _expected(
        ("accumulation", max(machine.shared(passing), reading / machine.processes)),
        *fits,
        ("assessment", machine.first(voxels * _JUDGED)),
        ("report", machine.alone(_REPORT + (_OF_FITS if fits else 0.0))),
    )
    each, count = float(_MAPS), 0
    memory = _PROGRAM + _PIECES + _PARTICLE * len(stack)
    if settings is not None:
        each, count = max(_MAPS, _fitting(stack)), _started_with(stack, settings)
        memory += _FITTING + _HELD_EACH * count + min(_DRAWING[0] * voxels, _DRAWING[1])
    memory += each * voxels
    maps = 9 if settings is None else 12
    sums = 2 * 12 * padded / 2 if kept or machine.first(passing) > 2 * 12 * padded / 2 / 2e8 else 0.0
    return Estimate(parts, memory, 4 * voxels * maps + sums + _WRITTEN_EACH * count + 5e6, machine.alone(_BEGIN))


def _fitting(stack: ParticleStack) -> float:
    """Bytes for each voxel of the box while two halves are fitted to their sums."""
    share = min(_width(stack) + _MARGIN, 1.0) ** 3
    return max(whole + middle * share for whole, middle in (_STEPPING, _GAINING_MAPS))


def _passing(stack: ParticleStack) -> float:
    """Seconds of one core to make the sums of all images."""
    box = stack.grid.size
    more = (stack.symmetry.inserted - 1) * (_ELEMENT[0] + _ELEMENT[1] * box)
    return len(stack) * box**2 * (_PIXEL + more)


def _fits(stack: ParticleStack, settings: Settings, machine: _Machine) -> float:
    """Seconds of the fits of both halves and of all particles."""
    box = stack.grid.size
    if settings.engine == "images":
        each = box**2 * (_RENDERED + _PIXEL / 2)
        return machine.shared(2 * settings.epochs * len(stack) * each)
    steps = VolumeObjective.steps_per_epoch * sum(stage_epochs(settings.epochs, settings.growth))
    # Both halves at a time, then all.
    return machine.first(steps * _step(stack, settings) * (3 if machine.processes == 1 else 2))


def _step(stack: ParticleStack, settings: Settings, growth: float = 1.6) -> float:
    """Seconds of one core for a step of a fit to sums."""
    box = stack.grid.size
    count = _started_with(stack, settings)
    points = (1.5 * _width(stack) * box) ** 3
    return _STEP + points * (_VOXEL[0] + _VOXEL[1] * points) + growth * count * _GAUSSIAN


def _started_with(stack: ParticleStack, settings: Settings) -> int:
    """Gaussians at the start of a fit."""
    return settings.gaussians or round(min(max(_FILLED * stack.grid.size**3, 1000), 100_000))


def _width(stack: ParticleStack) -> float:
    """Of the box, how wide the particle is: as the user says, or as usual."""
    share = stack.diameter / stack.grid.length
    return _USUAL if share > _UNMEASURED else share


# Of poses that are refined: rounds that are made as a rule, and seconds of one core to find the pose of an image.
_ROUNDS, _PLACED = 3, 5.7e-7  # for each coefficient that it is compared in
_LOOKED_AT = 3e-6  # seconds for each voxel of the box, when the sums of both halves are judged
_AGREED = 0.75  # of Nyquist's frequency, where the halves agree
_SAMPLED = 800  # images that are placed once more


def _of_refinement(
    config: RefineConfig, stack: ParticleStack, settings: Settings, machine: _Machine, kept: bool
) -> Estimate:
    own = _of_reconstruction(stack, settings, machine, kept)
    rounds, passing = min(config.refinement.rounds, _ROUNDS), _passing(stack)
    radius = _AGREED * stack.grid.size / 2
    each = _PLACED * math.pi / 2 * radius**2
    fits = 0.0
    if config.refinement.reference == "gaussians" and config.refinement.states is None:
        fits = 2 * _REFERENCE_EPOCHS * VolumeObjective.steps_per_epoch * _step(stack, settings, 1.0)
    placed = machine.shared((len(stack) + min(_SAMPLED, len(stack))) * each)
    wide = 1.0 if config.refinement.search is None else _SEARCHED
    judged = machine.shared(passing) + machine.first(stack.grid.size**3 * _LOOKED_AT)
    cost = rounds * (judged + machine.halves(fits) + placed) + (wide - 1) * placed
    by_name = {part.name: part.seconds for part in own.parts}
    parts = _expected(
        ("rounds", cost + judged),
        *([("accumulation", by_name["accumulation"])] if kept else []),
        *((name, by_name[name]) for name in ("fits", "residuals", "assessment", "report")),
    )
    return Estimate(parts, own.memory + _CHUNKED * stack.grid.size**2, own.disk, own.begin)


_REFERENCE_EPOCHS = 8  # of the Gaussians that images are compared with (`pose_round`)
_SEARCHED = 12.0  # times the comparisons of a round, where poses are looked for
_CHUNKED = 6e3  # bytes for each pixel of an image, of which so many are placed at once

# Of starts without poses.
_START, _SETTLED = 0.17, 0.6  # seconds of a step of 200 images, and how many of the steps are made as a rule
_MADE = 2  # starts, one of each half, which agree as a rule
_FOUND = (3.3, 2.6e-3)  # seconds to find poses: to begin with, and for each image
_WIDE = 0.8  # of the box: a particle that nobody has measured (`abinitio`)


def _of_abinitio(config: AbinitioConfig, stack: ParticleStack, machine: _Machine) -> Estimate:
    own, options = _of_reconstruction(stack, None, machine, config.run.keep_statistics), config.abinitio
    length = stack.grid.length
    finer = (length / (config.images.diameter or _WIDE * length) * _WIDE) ** 2
    step = _START * finer * options.batch / 200 * options.classes
    made = (_SETTLED * options.steps + options.steps / 15) * step
    by_name = {part.name: part.seconds for part in own.parts}
    parts = _expected(
        ("reading", machine.first(min(len(stack), 2 * options.sample) * stack.grid.size**2 * _READ)),
        ("starts", machine.halves(_MADE * made)),
        ("poses", machine.shared(len(stack) * _FOUND[1] * finer) + machine.first(2 * _FOUND[0] * finer / 2)),
        *((name, by_name[name]) for name in ("accumulation", "assessment", "report")),
    )
    more = max(machine.shared(2 * options.starts * made) - machine.halves(_MADE * made), 0.0)
    return Estimate(parts, own.memory, own.disk, own.begin, more)


_READ = 26e-9  # seconds of one core to read a pixel of an image and keep its low frequencies

# Of states. Pairs of components have a kernel each on the lattice of the linear stage.
_LINEAR = (1.5, 2.2e-7, 1.6e-8)  # seconds; for each point and pair of an iteration; for each coefficient, pair, image
_PAIRED = 69  # bytes for each point and pair
_POINTS, _FEW = 64, 32  # cells of a half at most, and images of each as a rule
_MEMBER = 3.0  # cells that an image has a part in
_CELL = 1.2e-8  # seconds for each point of the padded box of a cell
_COARSE, _FINE = 5.8e-3, (3.05e-8, 2.7e-6)  # seconds to draw a coarse state; a fine one, for each voxel and Gaussian
_SOME_STEPS, _FINE_STEPS = 64, 240  # of a stage at least; of a fine one (`heterogeneity.states`)
_LOOKED = (1.5e-3, 1.26e-4)  # seconds to place an image four times, and more for each state
_RESIDUAL = 9e-7  # seconds for each voxel of a cell
_STATE = 3e-6  # seconds for each voxel of a state
_WINDOW, _MOLECULE = 0.6, 0.006  # of the box: how wide a molecule is with its surroundings, and its volume
_MOST_ACROSS = 120  # voxels (`heterogeneity.extent`)
_HELD = 31  # bytes for each voxel of a cell of a half, and of what its model leaves of it
_COEFFICIENT, _LOOKING, _KNOWN = 12, 5e3, 2.5e3  # bytes; for each view while components are looked for, and later
_STATES_REPORT = 2.0


def _of_heterogeneity(config: HeterogeneityConfig, stack: ParticleStack, machine: _Machine) -> Estimate:
    # Here, since no other command needs them.
    from emsplat.heterogeneity.refresh import MOST_POINTS, PER_POINT, READ_AT_ONCE
    from emsplat.heterogeneity.search import stages
    from emsplat.programs.state_options import conformation_options, engine_of

    options, box, images = config.heterogeneity, stack.grid.size, len(stack) * stack.symmetry.order
    radius = min(math.floor(options.resolution), box // 2 - 1)
    pairs = (options.components + 1) * (options.components + 2) / 2
    plan = stages(max(radius, 1))
    solving = sum(2 * own.iterations * Lattice(own.radius).size ** 3 * pairs * _LINEAR[1] for own in plan)
    seen = [min(1.0, 2 * (own.images or len(stack)) / len(stack)) for own in plan]
    looked = sum(own.iterations * math.pi / 2 * own.radius**2 * part for own, part in zip(plan, seen, strict=True))
    looking = looked * pairs * _LINEAR[2] * images
    linear = 0.0 if options.from_run else _LINEAR[0] + machine.first(solving) + machine.shared(looking)
    points = options.points or max(2, min(_POINTS, images // 2 // _FEW))
    support = min(_WINDOW * box, _MOST_ACROSS)
    grid = box * min(1.0, _MOST_ACROSS / (_WINDOW * box))
    gaussians = options.gaussians or min(max(1.2 * _MOLECULE * grid**3, 2048), 24576)
    # Of each half once.
    cells = 2 * points * (PADDING * grid) ** 3 * _CELL + _MEMBER * images * box**2 * _PIXEL
    if engine_of(config) == "images":
        finer, fitted = points, _fits_to_images(conformation_options(config), images, points, cells, machine)
    else:
        finer = max(points, min(MOST_POINTS, images // 2 // PER_POINT))
        renders = 4 * max(4 * _SOME_STEPS, 16 * points)
        coarse = 2 * (128 + renders + 2 * max(4 * _SOME_STEPS, 4 * points)) * _COARSE
        steps = 4 * max(_SOME_STEPS, min(_FINE_STEPS, 6 * points))
        fine = 2 * steps * (support**3 * _FINE[0] + gaussians * _FINE[1])
        together = [
            ("cells", machine.shared(2 * cells)),
            ("decoder", machine.halves(coarse + fine)),
            ("latents", machine.shared(images * (_LOOKED[0] + _LOOKED[1] * points))),
            ("residual", machine.first(points * support**3 * _RESIDUAL)),
        ]
        fitted = (together,)
    parts = _expected(
        ("reading", 0.0 if options.from_run else machine.shared(len(stack) * box**2 * _READ)),
        ("linear stage", linear),
        *fitted,
        ("states", machine.first(options.states * box**3 * _STATE)),
        ("report", machine.alone(_STATES_REPORT)),
    )
    read = _COEFFICIENT * math.pi / 2 * radius**2
    dense = ((options.components + 7) / 19) ** 2  # numbers of a view, those of 12 components being 1
    share, first = 1 / machine.processes, 0.0
    if not options.from_run:
        first = share * (len(stack) * read + images * dense * _LOOKING)
        first += _PAIRED * pairs * Lattice(max(radius, 1)).size ** 3
    held = 2 * finer * support**3 * _HELD + max(_MAPS * box**3, min(share * len(stack) / 2, READ_AT_ONCE) * read)
    memory = _PROGRAM + _FITTING + _PIECES + max(first, held + images * dense * _KNOWN)
    disk = 4 * box**3 * (4 * options.states + 2) + 4 * points * support**3 + 1e7
    return Estimate(parts, memory, disk, machine.alone(_BEGIN))


# Of a fit of states to images: seconds to draw a Gaussian of an image and compare, forward and back; forward alone;
# between the stages of the paper's networks.
_DRAWN, _SHOWN, _BETWEEN = {"separable": 3.1e-7, "perceptron": 7.2e-7}, 1e-7, 7.8
_PLACING, _CANDIDATES = 5, 16  # epochs, and states that are tried (`heterogeneity.images`)
_GAINING, _GAINING_STATES, _SHOWN_ALIKE = 512, 32, 6e-8  # images of a half, states; seconds where all images show one


def _fits_to_images(
    options: ConformationOptions, images: int, points: int, cells: float, machine: _Machine
) -> tuple[tuple[str, float] | list[tuple[str, float]], ...]:
    each, fine = _DRAWN[options.decoder], options.fine.gaussians
    fit = images * each * (options.coarse.epochs * options.coarse.gaussians + options.fine.epochs * fine)
    between = 2 * _BETWEEN if options.decoder == "perceptron" else 0.0
    placing = images * fine * (_PLACING * each / 2 + _CANDIDATES * _SHOWN)
    states = 1 + min(points, _GAINING_STATES)
    gain = 2 * min(_GAINING, images // 2) * states * fine * _SHOWN_ALIKE
    return (
        ("fit", machine.shared(fit) + machine.first(between)),
        [("latents", machine.shared(placing)), ("gain", machine.shared(gain))],
        ("cells", machine.shared(cells)),
    )


def speed_of_core() -> float:
    """How fast one core of this machine is, in units of the one that rates were measured on; some hundredths of a
    second. The time of the process is taken, not that of the clock: others may be at work."""
    volume = torch.zeros(64, 64, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(24):  # the first ten of a process take up to five times as long
            start = time.process_time()
            torch.fft.rfftn(volume)
            best = min(best, time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return _TRANSFORM / max(best, 1e-6)
