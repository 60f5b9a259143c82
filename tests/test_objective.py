"""The image loss: against real space, against the analytic transform of Gaussians, its gradient and its weights."""

import math

import pytest
import torch

from emsplat.fitting import images as module
from emsplat.fitting.images import ImageObjective, noise_weight
from emsplat.fitting.objective import error_and_gradient, squared_error
from emsplat.imaging.ctf import ctf
from emsplat.imaging.project import project
from emsplat.maths.fourier import frequencies, hermitian_weight, shell_index, shift_phase
from emsplat.maths.geometry import random_rotations
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import ball
from emsplat.types import Gaussians, Grid, Optics, Poses
from memory import Memory

GRID = Grid(32, 2.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64, **options)


def optics(count):
    rows = torch.tensor([300, 2.7, 0.1, 9000, 8500, 0.6, 0, 0, 1], dtype=torch.float64).repeat(count, 1)
    rows[:, 3] += 500 * torch.arange(count)
    return Optics(*rows.unbind(1))


def mixture(count=6):
    axes = 2 * normal(count, 3, 3, seed=1) / 3
    covariance = axes @ axes.mT + 12 * torch.eye(3, dtype=torch.float64)
    amplitude = 1 + torch.rand(count, generator=seeded(2), dtype=torch.float64)
    return Gaussians(4 * normal(count, 3, seed=3), covariance, amplitude)


def analytic_spectrum(gaussians, poses, grid):
    """Transform of the projections, centre pixel at the origin: Σ a exp(-2π² kᵀΣk - 2πi k·(Ap - shift))."""
    ky, kx = frequencies(grid, dtype=torch.float64)
    k = torch.stack(torch.broadcast_tensors(kx, ky), -1)
    rows = poses.rotation[:, :2]
    centre = gaussians.mean @ rows.mT - poses.shift[:, None]
    spread = rows[:, None] @ gaussians.covariance @ rows.mT[:, None]
    exponent = -2 * math.pi**2 * torch.einsum("yxi,pgij,yxj->pgyx", k, spread, k)
    phase = -2 * math.pi * torch.einsum("yxi,pgi->pgyx", k, centre)
    return torch.einsum(
        "g,pgyx->pyx", gaussians.amplitude.to(torch.complex128), torch.exp(torch.complex(exponent, phase))
    )


def corner(spectrum):
    """From a transform about the centre pixel to one about the first pixel in memory."""
    shift = torch.full((1, 2), GRID.length / 2, dtype=torch.float64)
    return spectrum * shift_phase(shift, GRID)


def in_memory(images, poses, groups=None):
    return Memory(GRID, images.float(), poses.to(torch.float32), optics(len(images)).to(torch.float32), groups)


def simulated(count=5, groups=None):
    """Images that were never rendered: the analytic transform of the shifted mixture times the CTF."""
    poses = Poses(random_rotations(count, seeded(4)), 3 * normal(count, 2, seed=5))
    spectrum = analytic_spectrum(mixture(), poses, GRID) * ctf(optics(count), GRID)
    images = torch.fft.irfft2(corner(spectrum), s=(GRID.size,) * 2)
    return in_memory(images, poses, groups)


def test_rendered_projections_have_the_analytic_transform():
    poses = Poses(random_rotations(4, seeded(4)), 3 * normal(4, 2, seed=5))
    rendered = torch.fft.rfft2(project(mixture(), poses, GRID, cutoff=8.0))
    torch.testing.assert_close(rendered, corner(analytic_spectrum(mixture(), poses, GRID)), atol=1e-6, rtol=0)


def test_loss_of_the_truth_is_nothing_beside_the_images_and_grows_in_every_parameter(device):
    stack = simulated()
    stack.all = stack.all.to(device=device)
    goal = ImageObjective(stack, batch=5, seed=0, cutoff=6.0)
    truth = Gaussians(*(t.float().to(device) for t in vars(mixture()).values()))
    best = goal.loss(truth, stack.all)
    assert best < 1e-6 * stack.all.images.square().mean()
    for name, change in (("mean", 0.1), ("covariance", 0.3 * torch.eye(3, device=device)), ("amplitude", 0.02)):
        other = Gaussians(**(vars(truth) | {name: getattr(truth, name) + change}))
        assert goal.loss(other, stack.all) > 5 * best, name


@pytest.mark.parametrize("size", [8, 10])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_is_exact_for_any_spectra(size, weighted, device):
    """Even where the observed transform or the CTF is not that of a real image (fractional shifts, Nyquist)."""
    half = size // 2 + 1
    projection = normal(3, size, size).to(device).requires_grad_()
    transfer = normal(3, size, half, seed=1).to(device)
    observed = torch.complex(normal(3, size, half, seed=2), normal(3, size, half, seed=3)).to(device)
    weight = 1 / (1 + shell_index(size).double()) if weighted else torch.ones(1, 1, dtype=torch.float64)
    weight = weight.expand(3, -1, -1).to(device)
    assert torch.autograd.gradcheck(lambda p: squared_error(p, transfer, observed, weight), [projection])

    def direct(p):
        residual = (
            (torch.fft.rfft2(p) * transfer - observed).abs() ** 2 * weight * hermitian_weight(size, device=device)
        )
        return residual.sum() / (3 * size**4)

    value = squared_error(projection, transfer, observed, weight)
    torch.testing.assert_close(value, direct(projection))
    for factor in (1.0, -2.5):  # the upstream gradient counts
        torch.testing.assert_close(
            torch.autograd.grad(factor * squared_error(projection, transfer, observed, weight), projection),
            torch.autograd.grad(factor * direct(projection), projection),
        )


def test_weights_multiply_the_shells():
    """A residual in one shell only: the loss is the plain one times that shell's weight."""
    size, shell = 12, 3
    residual = torch.fft.rfft2(normal(2, size, size)) * (shell_index(size) == shell)
    zero, one = torch.zeros(2, size, size).double(), torch.ones(2, size, size // 2 + 1).double()
    plain, _ = error_and_gradient(zero, one, residual, one)
    weight = noise_weight(torch.arange(1.0, size // 2 + 2).double()[None], Grid(size, 1.0))
    weighted, _ = error_and_gradient(zero, one, residual, weight)
    torch.testing.assert_close(weighted, plain / (shell + 1))
    torch.testing.assert_close(plain, torch.fft.irfft2(residual, s=(size, size)).square().mean((1, 2)).sum())


def test_noise_of_the_own_optics_group_weights_an_image():
    groups = torch.tensor([0, 1, 1, 0, 1])
    stack = simulated(groups=groups)
    unit = ImageObjective(stack, batch=5, seed=0, noise=torch.ones(2, GRID.size // 2 + 1))
    noise = torch.tensor([[2.0], [5.0]]).expand(2, GRID.size // 2 + 1)
    goal = ImageObjective(stack, batch=5, seed=0, noise=noise)
    _, weight = goal.observe(stack.all)
    inside = shell_index(GRID.size) <= GRID.size // 2
    for row, group in enumerate(groups):
        torch.testing.assert_close(weight[row], inside / noise[group, 0])
    model = ball(20, GRID, Bounds(12.0, 4.0, 1.0), 0).gaussians()
    expected = sum(unit.loss(model, stack.all[r : r + 1]) / noise[groups[r], 0] for r in range(5)) / 5
    torch.testing.assert_close(goal.loss(model, stack.all), expected, rtol=1e-5, atol=0)


def test_loss_does_not_depend_on_how_many_images_are_transformed_together(monkeypatch):
    stack = simulated()
    goal = ImageObjective(stack, batch=5, seed=0)
    results = []
    for cached in (1, 2 * GRID.size**2, 2**19):
        monkeypatch.setattr(module, "_CACHED_PIXELS", cached)
        model = ball(20, GRID, Bounds(12.0, 4.0, 1.0), 0)
        loss = goal.loss(model.gaussians(), stack.all)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-7)


def test_an_epoch_is_the_same_from_any_step():
    stack = simulated()
    model = ball(20, GRID, Bounds(12.0, 4.0, 1.0), 0)
    goal = ImageObjective(stack, batch=2, seed=3)
    assert goal.steps_per_epoch == 3
    whole = [float(goal(model, step)["loss"].detach()) for step in range(9)]
    assert len({tuple(whole[start : start + 3]) for start in (0, 3, 6)}) == 3
    for start in (1, 3, 5, 8):
        fresh = ImageObjective(stack, batch=2, seed=3)
        assert [float(fresh(model, step)["loss"].detach()) for step in range(start, 9)] == whole[start:]
    assert [float(goal(model, step)["loss"].detach()) for step in (4, 0, 5)] == [whole[4], whole[0], whole[5]]
