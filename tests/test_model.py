"""Gaussians as parameters: starts, bounds, splitting."""

import pytest
import torch

from emsplat.imaging.project import voxelize
from emsplat.models.gaussians import Bounds, GaussianField, inverse_softplus
from emsplat.models.starts import ball, from_gaussians, from_map, uniform
from emsplat.types import Gaussians, Grid

GRID = Grid(32, 2.0)
BOX = Bounds(GRID.length, 3.0, 0.2)


def wild(count=30, seed=0, **options):
    rng = torch.Generator().manual_seed(seed)
    scale = torch.randn(count, 1 if options.pop("isotropic", False) else 3, generator=rng) - 2
    return GaussianField(
        0.1 * torch.randn(count, 3, generator=rng),
        scale,
        torch.randn(count, 4, generator=rng),
        torch.randn(count, generator=rng),
        Bounds(10.0, 2.0, 0.5),
        **options,
    )


def test_inverse_softplus():
    values = torch.tensor([1e-12, 1e-3, 1.0, 50.0])
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(values)), values, rtol=1e-3, atol=0)


def test_ball_is_cryosplat_s_start():
    model = ball(4000, GRID, BOX, seed=1)
    assert model.gaussians().mean.std(0).tolist() == pytest.approx([0.075 * 64] * 3, rel=0.05)
    torch.testing.assert_close(model.scales(), torch.full((4000, 3), 0.0075 * 64))
    torch.testing.assert_close(model.amplitudes(), torch.full((4000,), 3.0 / 8000), rtol=1e-4, atol=0)
    other_unit = ball(4000, GRID, Bounds(10.0, 3.0, 0.2), seed=1)
    torch.testing.assert_close(other_unit.gaussians().mean, model.gaussians().mean)


def test_uniform_is_gem_s_start():
    model = uniform(3000, GRID, BOX, seed=1)
    mean = model.gaussians().mean.detach()
    assert float(mean.abs().max()) <= 32
    assert mean.std(0).tolist() == pytest.approx([64 / 12**0.5] * 3, rel=0.05)
    distance = torch.cdist(mean, mean).sort(1).values[:, 1:4].mean(1)
    torch.testing.assert_close(model.scales()[:, 0], distance, rtol=1e-3, atol=1e-3)


def test_starts_follow_from_the_seed():
    for start in (ball, uniform):
        assert torch.equal(start(50, GRID, BOX, 3).gaussians().mean, start(50, GRID, BOX, 3).gaussians().mean)
        assert not torch.equal(start(50, GRID, BOX, 3).gaussians().mean, start(50, GRID, BOX, 4).gaussians().mean)


def test_start_from_a_map_lies_on_its_density():
    centre = torch.tensor([[8.0, -12.0, 4.0]])
    blob = Gaussians(centre, 25 * torch.eye(3)[None], torch.ones(1))
    noise = torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(0))
    volume = voxelize(blob, GRID) + 1e-6 * noise
    model = from_map(volume, GRID, 200, Bounds(20.0, 1.0, 1.0), seed=0)
    assert len(model) == 200
    assert (model.gaussians().mean - centre).norm(dim=1).max() < 30
    weighted = (model.amplitudes()[:, None] * model.gaussians().mean).sum(0) / model.amplitudes().sum()
    assert (weighted - centre[0]).norm() < 1.5
    assert len(from_map(torch.zeros(32, 32, 32), GRID, 50, Bounds(20.0, 1.0, 1.0), seed=0)) == 50


def test_a_start_lies_where_the_fit_looks():
    """The brightest place of a map of few images may be at the rim of the box."""
    place = torch.tensor([[0.0, 0.0, 0.0], [0.0, 22.0, 0.0]])
    blobs = Gaussians(place, (9 * torch.eye(3)).repeat(2, 1, 1), torch.tensor([1.0, 5.0]))
    noise = torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(0))
    volume, bounds = voxelize(blobs, GRID) + 1e-6 * noise, Bounds(20.0, 1.0, 1.0)
    anywhere = from_map(volume, GRID, 100, bounds, seed=0).gaussians().mean.detach()
    assert float(anywhere[:, 1].median()) > 15
    within = from_map(volume, GRID, 100, bounds, seed=0, support=16).gaussians().mean.detach()
    assert float(within.abs().max()) < 8 * GRID.pixel_size + 1
    assert float(within.norm(dim=1).median()) < 10


def test_bounds_hold_whatever_the_parameters():
    model = wild()
    with torch.no_grad():
        model.scale.fill_(-1e4)
        model.amplitude.fill_(-1e4)
    assert float(model.scales().detach().min()) >= 0.5
    assert float(model.amplitudes().detach().min()) >= 0
    assert torch.linalg.eigvalsh(model.gaussians().covariance.double()).min() > 0.2


def moments(gaussians):
    weight = gaussians.amplitude[:, None]
    mass = weight.sum()
    mean = (weight * gaussians.mean).sum(0) / mass
    centred = gaussians.mean - mean
    spread = gaussians.covariance + centred[:, :, None] * centred[:, None, :]
    return mass, mean, (weight[..., None] * spread).sum(0) / mass


@pytest.mark.parametrize("options", [{}, {"rotation": False}, {"isotropic": True}])
def test_splitting_doubles_and_keeps_the_moments(options):
    model = wild(**options)
    twice = model.split()
    assert len(twice) == 2 * len(model)
    before, after = moments(model.gaussians()), moments(twice.gaussians())
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-5)
    if not options.get("isotropic"):
        torch.testing.assert_close(after[2], before[2], rtol=0.02, atol=1e-3)


def test_constraints():
    round_ones = wild(isotropic=True).gaussians()
    scale = round_ones.covariance[:, 0, 0]
    torch.testing.assert_close(round_ones.covariance, scale[:, None, None] * torch.eye(3))
    straight = wild(rotation=False)
    off = straight.gaussians().covariance - torch.diag_embed(straight.gaussians().covariance.diagonal(dim1=1, dim2=2))
    assert off.abs().max() == 0
    for model in (straight, wild(isotropic=True)):
        assert not model.quaternion.requires_grad


def test_unit_scales_the_amplitudes_only():
    model = wild()
    other = model.with_unit(8.0)
    torch.testing.assert_close(other.amplitudes(), 4 * model.amplitudes())
    assert torch.equal(other.gaussians().covariance, model.gaussians().covariance)


@pytest.mark.parametrize("options", [{}, {"rotation": False}, {"isotropic": True}])
def test_each_pair_stands_for_the_gaussian_it_replaces(options):
    model = wild(**options)
    old, new = model.gaussians(), model.split().gaussians()
    count = len(old)
    pairs = [Gaussians(*(t[[i, i + count]].detach() for t in vars(new).values())) for i in range(count)]
    for i, pair in enumerate(pairs):
        mass, mean, spread = moments(pair)
        torch.testing.assert_close(mass, old.amplitude[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, old.mean[i], rtol=0, atol=1e-4)
        if not options.get("isotropic"):
            torch.testing.assert_close(
                spread, old.covariance[i], rtol=0, atol=1e-3 * float(spread.diagonal().max().detach())
            )
        volume = torch.linalg.det(pair.covariance).sqrt() / torch.linalg.det(old.covariance[i]).sqrt()
        torch.testing.assert_close(volume, torch.full((2,), 0.8), rtol=1e-3, atol=0)


def test_start_from_a_map_leaves_the_empty_part_empty():
    centres = torch.tensor([[14.0, 0.0, -6.0], [-14.0, 4.0, 6.0]])
    blobs = Gaussians(centres, 9 * torch.eye(3).expand(2, 3, 3), torch.tensor([1.0, 1.0]))
    noise = torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"isotropic": True}, {"rotation": False}):
        model = from_map(voxelize(blobs, GRID) + 1e-6 * noise, GRID, 60, Bounds(20.0, 1.0, 1.0), seed=0, **options)
        distance = torch.cdist(model.gaussians().mean, centres)
        assert distance.min(1).values.max() < 14
        near = distance.argmin(1)
        assert 20 <= int(near.sum()) <= 40
        assert model.quaternion.requires_grad == (not options)
        assert float(model.amplitudes().detach().mean()) == pytest.approx(1, abs=0.1)
        twin = from_map(voxelize(blobs, GRID) + 1e-6 * noise, GRID, 60, Bounds(20.0, 1.0, 1.0), seed=0, **options)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_splitting_is_along_the_longest_axis():
    model = wild()
    halves = model.split().gaussians().mean.detach()
    step = torch.nn.functional.normalize(halves[:30] - halves[30:], dim=1)
    along = torch.linalg.eigh(model.gaussians().covariance.detach()).eigenvectors[:, :, -1]
    torch.testing.assert_close((step * along).sum(1).abs(), torch.ones(30), rtol=0, atol=1e-3)


def test_a_mixture_becomes_parameters_and_the_mixture_again():
    before = wild().gaussians()
    model = from_gaussians(before, Bounds(20.0, 3.0, 0.2))
    after = model.gaussians()
    torch.testing.assert_close(after.mean, before.mean)
    torch.testing.assert_close(after.covariance, before.covariance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.amplitude / 3, before.amplitude / before.amplitude.mean(), rtol=1e-3, atol=1e-3)


def test_a_mixture_that_the_model_cannot_hold_comes_close():
    """Below the bound, at and below zero, round, and not turned."""
    covariance = torch.tensor([[4.0, 1, 0], [1, 9, 0], [0, 0, 0.01]]).repeat(3, 1, 1)
    mixture = Gaussians(torch.zeros(3, 3), covariance, torch.tensor([2.0, 0.0, -5.0]))
    bounds = Bounds(10.0, 1.0, 1.5)
    model = from_gaussians(mixture, bounds)
    torch.testing.assert_close(model.amplitudes(), torch.tensor([1.0, 0.01, 0.01]), rtol=1e-4, atol=0)
    assert float(model.scales().detach().min()) == pytest.approx(1.515, rel=1e-3)
    straight = from_gaussians(mixture, bounds, rotation=False)
    torch.testing.assert_close(straight.scales()[0], torch.tensor([2.0, 3.0, 1.515]))
    round_one = from_gaussians(mixture, bounds, isotropic=True)
    assert round_one.scale.shape == (3, 1)
    assert float(round_one.scales().detach()[0, 0]) == pytest.approx((13.01 / 3) ** 0.5, rel=1e-4)
