"""Projection forward + backward with each instruction set of this processor, and a whole training step with the one
that is chosen, against naive twins in the same run.

The naive twin is the dense reference (`emsplat.kernels.reference`), timed on 200 Gaussians and one image and scaled
linearly: its cost is Gaussians x pixels. The training step is the image-domain engine as `emsplat reconstruct` runs it:
reading from disk, normalising, FFTs, CTF, loss, gradient and Adam.
"""

import tempfile
from pathlib import Path

import torch

from common import Grid, best_time, globule, random_poses, save
from emsplat import _native
from emsplat.fitting.images import ImageObjective
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.imaging.project import project
from emsplat.io.mrc import writing_stack
from emsplat.io.relion.write import write_particles_star
from emsplat.kernels import reference
from emsplat.models.gaussians import Bounds, GaussianField, inverse_softplus
from emsplat.particles.open import open_particles
from emsplat.types import Gaussians, Optics, Poses

CASES = [(256, 30_000, 1.5), (256, 30_000, 1.0), (256, 10_000, 2.0), (256, 2_048, 4.0), (128, 10_000, 1.2)]
IMAGES = 32


def forward_backward(function, gaussians, poses):
    leaves = [t.detach().requires_grad_() for t in (gaussians.mean, gaussians.covariance, gaussians.amplitude)]
    images = function(Gaussians(*leaves), poses)
    torch.autograd.grad(images.sum(), leaves)


def kernel_rate(size, count, sigma):
    grid = Grid(size, 1.0)
    gaussians, poses = globule(count, grid, sigma), random_poses(IMAGES)
    return IMAGES / best_time(lambda: forward_backward(lambda g, p: project(g, p, grid), gaussians, poses))


def naive_rate(size, count, sigma):
    grid, few = Grid(size, 1.0), 200
    gaussians, poses = globule(few, grid, sigma), random_poses(1)
    work = best_time(lambda: forward_backward(lambda g, p: reference.project(g, p, grid), gaussians, poses), 1)
    return 1 / (work * count / few)


def as_model(gaussians, sigma, grid):
    """The mixture as a model with free rotations."""
    count = len(gaussians)
    bounds = Bounds(10.0, 1.0, 0.1)
    scale = inverse_softplus(torch.full((count, 3), (sigma - 0.1) / 10.0))
    return GaussianField(
        gaussians.mean / 10.0, scale, torch.randn(count, 4), inverse_softplus(gaussians.amplitude + 0.1), bounds
    )


def make_stack(folder, size, count=512):
    grid = Grid(size, 1.0)
    with writing_stack(folder / "particles.mrcs", count, grid) as write:
        for _ in range(count // 64):
            write(torch.randn(64, size, size))
    one = torch.ones(count)
    values = (300, 2.7, 0.1, 15000, 14000, 0.6, 0, 0, 1)
    write_particles_star(
        folder / "particles.star",
        [f"{i + 1}@particles.mrcs" for i in range(count)],
        [f"micrograph_{i // 50}.mrc" for i in range(count)],
        Poses(random_poses(count).rotation, torch.randn(count, 2)),
        Optics(*(value * one for value in values)),
        grid,
        None,
    )
    return open_particles(folder / "particles.star")


def step_rate(stack, size, count, sigma):
    """Images per second over one epoch of 512 images in batches of 32."""
    grid = Grid(size, 1.0)
    objective = ImageObjective(stack, batch=IMAGES, seed=0)
    plan = Plan(1, 1e-4, 1.0)

    def epoch():
        for _ in fit(State.begin(as_model(globule(count, grid, sigma), sigma, grid)), objective, plan):
            pass

    return len(stack) / best_time(epoch, 2)


def main():
    rows = []
    chosen = _native.instruction_set()
    print(f"{torch.get_num_threads()} threads, instruction set {chosen}; images/s")
    print(" box Gaussians  σ/px  instructions   kernel    naive    ratio     step kernel/step")
    with tempfile.TemporaryDirectory() as folder:
        stacks = {}
        for size, count, sigma in CASES:
            if size not in stacks:
                (Path(folder) / str(size)).mkdir()
                stacks[size] = make_stack(Path(folder) / str(size), size)
            naive = naive_rate(size, count, sigma)
            for instructions in _native.instruction_sets():
                _native.use_instruction_set(instructions)
                kernel = kernel_rate(size, count, sigma)
                row = {"box": size, "gaussians": count, "sigma": sigma, "instruction_set": instructions}
                row |= {"kernel": kernel, "naive": naive}
                rates = f"{kernel:8.0f} {naive:8.3f} {kernel / naive:8,.0f}"
                if instructions == chosen:
                    row["step"] = step = step_rate(stacks[size], size, count, sigma)
                    rates += f" {step:8.0f} {kernel / step:11.2f}"
                rows.append(row)
                print(f"{size:4d} {count:9,d} {sigma:5.1f}  {instructions:12} {rates}")
            _native.use_instruction_set(chosen)
    save("kernels", rows)


if __name__ == "__main__":
    main()
