"""How long a run will take, and how much memory and disk it will need; the only place where that is reckoned.

Rates are those of one core, measured on an AMD EPYC (docs/log.md), and scaled by how fast this one transforms a small
volume. What is not known before the images are read, the number of Gaussians and the size of the particle, is taken as
usual.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from emsplat.fitting.course import stage_epochs
from emsplat.fitting.volume import VolumeObjective
from emsplat.particles.stack import ParticleStack
from emsplat.programs.settings import Settings
from emsplat.run.log import data_size, duration
from emsplat.sums.window import PADDING

_TRANSFORM = 0.96e-3  # seconds of one core for the transform of 64³ numbers, where the rates below were measured
_PIXEL = 58e-9  # seconds to read, transform and insert a pixel of an image
_ELEMENT = (7e-9, 0.33e-9)  # to insert it once more under an element of a symmetry, and more for each pixel of the box
_STEP = 3e-3  # of a step of a fit
_VOXEL = (12e-9, 1e-15)  # for each point of its transforms, and more for each point, as caches are left behind
_GAUSSIAN = 1.5e-6  # for each Gaussian
_RENDERED = 9e-9  # to render and compare a pixel of an image, forward and back
_JUDGED = 4.5e-6  # seconds of the assessment for a voxel
_FIXED = 10.5  # seconds of imports, and of a report with figures
_DISK = 3e8  # bytes per second that a disk gives
_PROGRAM = 3.8e8  # bytes of Python, PyTorch and what they load
_FITTING = 2e7  # bytes more that optimisers load
_PIECES = 6e7  # bytes of what is looked at some planes at a time
_MAPS = 82  # bytes for each voxel of the box at the peak, when maps of halves are judged beside their equations
_SPARED = 0.9  # of another thread's time that is not spent on waiting
_USUAL = 0.52  # of the box, how wide a particle is
_FILLED = 0.0015  # Gaussians at the start for each voxel of the box


@dataclass(frozen=True)
class Estimate:
    """What a run will need: wall time, memory of each process, and disk for its results."""

    seconds: float
    memory: float  # bytes
    disk: float  # bytes

    @property
    def text(self) -> str:
        """For the user."""
        return f"about {duration(self.seconds)}, {data_size(self.memory)} of memory, {data_size(self.disk)} on disk"


def estimate(
    stack: ParticleStack,
    settings: Settings | None,
    *,
    threads: int,
    processes: int = 1,
    kept: bool = False,
    speed: float = 1.0,
) -> Estimate:
    """What a reconstruction of ``stack`` on CPUs will need, or with no ``settings`` of a fit a back-projection.

    ``threads`` are those of each of so many ``processes``; ``kept`` says that sums stay on disk; ``speed`` is that of a
    core, in units of the one that was measured (`speed_of_core`).
    """
    box, images = stack.grid.size, len(stack)
    pixels, padded, voxels = box**2, (PADDING * box) ** 3, box**3
    more = (stack.symmetry.order - 1) * (_ELEMENT[0] + _ELEMENT[1] * box)
    passing = images * pixels * (_PIXEL + more)
    reading = images * sum(own.size**2 for own in stack.disk[:1]) * 4 / _DISK
    fitting, shared = 0.0, 1
    if settings is not None and settings.engine == "images":
        fitting = 2 * settings.epochs * images * pixels * (_RENDERED + _PIXEL / 2)
        shared = processes
    elif settings is not None:
        steps = VolumeObjective.steps_per_epoch * sum(stage_epochs(settings.epochs, settings.growth))
        points, count = (1.5 * _USUAL * box) ** 3, settings.gaussians or min(max(_FILLED * voxels, 1000), 100_000)
        step = _STEP + points * (_VOXEL[0] + _VOXEL[1] * points) + 1.6 * count * _GAUSSIAN
        fitting = steps * step * (3 if processes == 1 else 2)  # both halves at a time, then all
    cores = threads**_SPARED * speed
    judged = _FIXED / speed + voxels * _JUDGED / cores
    seconds = max(passing / cores, reading) / processes + fitting / cores / shared + judged
    memory = _PROGRAM + (0.0 if settings is None else _FITTING) + _PIECES + _MAPS * voxels
    maps = 9 if settings is None else 12
    sums = 2 * 12 * padded / 2 if kept or passing / cores > 2 * 12 * padded / 2 / 2e8 else 0.0
    return Estimate(seconds, memory, 4 * voxels * maps + sums + 5e6)


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
