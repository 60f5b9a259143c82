"""How cost grows: with particles, with the box, with Gaussians, each beside the limit that the hardware sets.

Processor seconds of one thread. The limit is the larger of two times: the arithmetic that the step cannot do without,
at the rate of this machine's matrix products, and the bytes that it reads and writes, at the rate of its copies; both
are measured in the same run. The exponent of a row is the slope of log cost over log size from the row before.

Usage: bench_cost.py [--largest]   # with 10^6 particles and a box of 512
Writes results/cost.json; docs/pictures.py draws docs/images/cost.png from it.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

from bench_kernels import make_stack
from common import Grid, best_time, globule, random_poses, save
from emsplat.config import SimulateConfig, configure
from emsplat.imaging.project import project, voxelize
from emsplat.io.particles import read_particles
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_particles
from emsplat.programs.simulate import simulate
from emsplat.sums.statistics import accumulate, begin, equations_of
from emsplat.types import Gaussians
from full_scale import repeat

WINDOW = 4 * 4 * 4 * 3  # numbers that a Fourier coefficient adds to: voxels of its window, three sums
DRAWN, TAKEN_BACK = 4, 9  # operations for a pixel of a footprint: drawn, and its share of the gradient
CUTOFF = 4.0


def rates():
    """Operations and bytes per second of one thread."""
    a = torch.randn(1024, 1024)
    operations = 2 * 1024**3 / best_time(lambda: a @ a)
    source, target = torch.randn(2**25), torch.empty(2**25)
    return operations, 2 * 4 * 2**25 / best_time(lambda: target.copy_(source))


def spent(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def summed(stack):
    statistics = begin(stack)
    for _ in accumulate(statistics, stack, estimate_noise(stack)):
        pass


def of_image(box):
    """Operations and bytes that an image takes on its way into the sums."""
    coefficients = math.pi / 8 * box**2
    return coefficients * 2 * WINDOW + 2.5 * box**2 * math.log2(box**2), 4 * box**2 + coefficients * WINDOW * 2 * 4


class Series:
    """Costs over one size, and what they cannot go below."""

    def __init__(self, rows, limits, name, unit):
        self._rows, self._limits, self._name, self._unit = rows, limits, name, unit

    def add(self, size, seconds, operations, moved):
        arithmetic, memory = operations / self._limits[0], moved / self._limits[1]
        row = {"series": self._name, self._unit: size, "seconds": seconds, "limit": max(arithmetic, memory)}
        row["bound_by"] = "arithmetic" if arithmetic > memory else "memory"
        before = [own for own in self._rows if own["series"] == self._name]
        if before:
            gap = math.log(size / before[-1][self._unit])
            row["exponent"] = round(math.log(seconds / before[-1]["seconds"]) / gap, 2)
        self._rows.append(row)
        print(row, flush=True)


def particles(rows, limits, folder, most):
    """Rows of metadata over one stack of 1,000 images of 32²."""
    config = configure(SimulateConfig, box=32, pixel_size=6.0, particles=1000, snr=0.1)
    simulate(config, None, folder / "rows")
    reading = Series(rows, limits, "metadata read and checked", "particles")
    adding = Series(rows, limits, "images of 32² summed", "particles")
    for count in (10**n for n in range(3, most + 1)):
        star = repeat(folder / "rows", count)
        reading.add(count, spent(lambda star=star: read_particles(star)), 0, 2 * star.stat().st_size)
        stack = open_particles(star)
        operations, moved = of_image(32)
        adding.add(count, spent(lambda stack=stack: summed(stack)), count * operations, count * moved)


def boxes(rows, limits, folder, largest):
    adding = Series(rows, limits, "an image summed", "box")
    solving = Series(rows, limits, "a classical map from its sums", "box")
    for box in (64, 128, 256, *([512] if largest else [])):
        place = folder / f"box{box}"
        place.mkdir()
        stack = make_stack(place, box, 64)  # of noise: what images show has no part in this
        summed(stack)
        operations, moved = of_image(box)
        adding.add(box, min(spent(lambda stack=stack: summed(stack)) for _ in range(2)) / len(stack), operations, moved)
        equations = equations_of(stack)
        points = (1.5 * box) ** 3
        seconds = spent(lambda equations=equations: equations.solve())
        solving.add(box, seconds, 2.5 * points * math.log2(points), 4 * 4 * points)


def gaussians(rows, limits):
    """Of 1.5 pixels in a box of 128, forward and back."""
    grid, poses = Grid(128, 1.0), random_poses(1)
    drawing = Series(rows, limits, "an image of 128² drawn, and the gradient", "Gaussians")
    filling = Series(rows, limits, "a map of 128³ drawn, and the gradient", "Gaussians")
    pixels, voxels = (2 * CUTOFF * 1.5) ** 2, math.pi / 6 * (2 * CUTOFF * 1.5) ** 3

    def both(draw, mixture):
        leaves = [t.detach().requires_grad_() for t in (mixture.mean, mixture.covariance, mixture.amplitude)]
        torch.autograd.grad(draw(Gaussians(*leaves)).sum(), leaves)

    for count in (1_000, 10_000, 100_000, 500_000):
        mixture, work = globule(count, grid, 1.5), count * (DRAWN + TAKEN_BACK)
        held = 4 * 10 * count * 3
        for series, draw, points, image in (
            (drawing, lambda own: project(own, poses, grid), pixels, 128**2),
            (filling, lambda own: voxelize(own, grid), voxels, 128**3),
        ):
            seconds = min(spent(lambda draw=draw, mixture=mixture: both(draw, mixture)) for _ in range(3))
            series.add(count, seconds, work * points, held + 3 * 4 * image)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, limits = [], rates()
    print(f"{limits[0]:.3g} operations/s, {limits[1]:.3g} bytes/s", flush=True)
    with tempfile.TemporaryDirectory() as name:
        gaussians(rows, limits)
        boxes(rows, limits, Path(name), given.largest)
        particles(rows, limits, Path(name), 6 if given.largest else 5)
    save("cost", rows, operations_per_second=limits[0], bytes_per_second=limits[1])


if __name__ == "__main__":
    main()
