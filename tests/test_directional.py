"""Slices, cones and sampling by direction: exact slices, known cones, analytic sampling of known view distributions."""

import math

import pytest
import torch

from emsplat.errors import InputError
from emsplat.maths.geometry import random_rotations
from emsplat.maths.groups import parse_symmetry
from emsplat.measures.directional import (
    Directions,
    conical_fsc,
    conical_resolution,
    direction_grid,
    fourier_sampling,
    sampling_compensation,
    slice_correlation,
    view_histogram,
)
from emsplat.measures.fsc import fsc
from emsplat.types import Grid

SIZE = 64
GRID = Grid(SIZE, 2.0)
CELLS = direction_grid(15.0)
IDENTITY = parse_symmetry("C1").elements


def noise(seed, size=SIZE):
    return torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed))


def noisy_pair(size=SIZE):
    return tuple(noise(0, size) + noise(seed, size) for seed in (1, 2))


def without_cone(volume, degrees, seed):
    """Noise in place of the frequencies within an angle of z."""
    full, half = torch.fft.fftfreq(SIZE), torch.fft.rfftfreq(SIZE)
    radius = (full[:, None, None] ** 2 + full[:, None] ** 2 + half**2).sqrt()
    cone = full.abs()[:, None, None] > math.cos(math.radians(degrees)) * radius
    return torch.fft.irfftn(torch.where(cone, torch.fft.rfftn(noise(seed)), torch.fft.rfftn(volume)), s=(SIZE,) * 3)


def test_grid_covers_the_sphere():
    assert len(CELLS.tilt) == 12 * 24
    assert float(CELLS.solid_angle.sum()) == pytest.approx(1)
    # Cells at the equator are as many times larger as their circle is longer.
    first, equator = CELLS.solid_angle[0], CELLS.solid_angle[6 * 24]
    assert float(equator / first) == pytest.approx(math.sin(math.radians(82.5)) / math.sin(math.radians(7.5)), rel=1e-6)
    torch.testing.assert_close(CELLS.vectors.norm(dim=1), torch.ones(288, dtype=torch.float64))
    with pytest.raises(InputError, match="divisor"):
        direction_grid(17.0)


@pytest.mark.parametrize(("axis", "tilt", "rot"), [(0, 0.0, 0.0), (1, 90.0, 90.0), (2, 90.0, 0.0)])
def test_slice_is_the_transform_of_the_projection(axis, tilt, rot):
    a, b = noisy_pair()
    fa, fb = (torch.fft.fftshift(torch.fft.fft2(v.sum(axis))) for v in (a, b))
    k = torch.arange(SIZE) - SIZE // 2
    radius = (k[:, None] ** 2 + k**2).double().sqrt()
    chosen = (radius >= 6.5) & (radius < 24.5)
    cross = (fa.conj() * fb).real[chosen].sum()
    expected = float(cross / (fa.abs()[chosen].square().sum() * fb.abs()[chosen].square().sum()).sqrt())
    one = Directions(torch.tensor([tilt]).double(), torch.tensor([rot]).double(), 15.0)
    # Spacings from 128/7 to 128/24 Å: shells 7 to 24.
    found = float(slice_correlation(a, b, GRID, one, (128 / 7, 128 / 24))[0])
    assert found == pytest.approx(expected, abs=1e-5)


def test_slices_of_isotropic_maps_are_alike():
    a, b = noisy_pair()
    values = slice_correlation(a, b, GRID, CELLS, (20.0, 5.0))
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(values.std()) < 0.03
    # A direction and its opposite see the same plane.
    table = values.reshape(12, 24)
    torch.testing.assert_close(table, table.flip(0).roll(12, 1), atol=1e-4, rtol=0)


def test_missing_cone_shows_in_slices_and_cones():
    a, b = noisy_pair()
    b = without_cone(b, 40.0, 5)
    slices = slice_correlation(a, b, GRID, CELLS, (20.0, 5.0)).reshape(12, 24).mean(1)
    # The slice along z has no frequency near z; the slices from the side cross the cone.
    assert float(slices[0]) > float(slices[5]) + 0.1
    cones = conical_fsc(a, b, CELLS)
    profile = cones[:, 10:25].mean(1).reshape(12, 24).mean(1)
    assert float(profile[0].abs()) < 0.1
    assert float(profile[5]) == pytest.approx(0.5, abs=0.08)
    worst = conical_resolution(cones, GRID).reshape(12, 24)
    assert float(worst[0].nan_to_num(128.0).min()) > 20
    assert float(worst[5].max()) < 5


def test_cone_of_all_directions_is_the_fsc():
    a, b = noisy_pair(32)
    whole = conical_fsc(a, b, CELLS, half_angle=95.0)
    expected = torch.nn.functional.avg_pool1d(fsc(a, b)[None], 3, stride=1)[0]
    assert float((whole[0, 3:-1] - expected[2:]).abs().max()) < 0.03  # sums over three shells, not a mean of ratios
    torch.testing.assert_close(whole, whole[:1].expand_as(whole))


@pytest.mark.parametrize("band", [(5.0, 20.0), (3.0, 2.5), (1e4, 500.0)])
def test_empty_bands_are_refused(band):
    with pytest.raises(InputError, match="no shell"):
        slice_correlation(*noisy_pair(), GRID, CELLS, band)


def rotations(count=20_000):
    return random_rotations(count, torch.Generator().manual_seed(0))


def test_views_of_uniform_poses_fill_the_cells():
    found = view_histogram(rotations(), CELLS)
    assert float(found.sum()) == 20_000
    expected = CELLS.solid_angle * 20_000
    assert float(((found - expected) ** 2 / expected).mean()) == pytest.approx(1, abs=0.3)


def test_view_is_the_direction_that_the_image_sums_along():
    # The last row of the rotation: A p has its z there.
    turned = parse_symmetry("D2").elements[1:2]  # a half turn about z or x keeps z up to its sign
    assert float(view_histogram(turned, CELLS).reshape(12, 24)[[0, -1]].sum()) == 1


def test_sampling_of_known_views():
    uniform = fourier_sampling(rotations(), IDENTITY)[:, 3]
    assert float(uniform.mean()) == pytest.approx(1, abs=0.01)
    assert sampling_compensation(uniform) == (pytest.approx(1, abs=0.02), 0)
    # All views from the side: density 1/(π/2 sin θ) · ..., whose inverse averages to π²/8 (Baldwin & Lyumkis 2020).
    poses = rotations(200_000)
    side = fourier_sampling(poses[poses[:, 2, 2].abs() < 0.03], IDENTITY)[:, 3]
    assert sampling_compensation(side) == (pytest.approx(8 / math.pi**2, abs=0.03), 0)
    top = fourier_sampling(poses[poses[:, 2, 2].abs() > 0.95], IDENTITY)[:, 3]
    factor, empty = sampling_compensation(top)
    assert factor < 0.3
    assert empty > 0.4
    half = torch.tensor([2.0, 2.0, 0.0, 0.0])
    assert sampling_compensation(half) == (pytest.approx(0.5), pytest.approx(0.5))


def test_symmetry_fills_directions():
    poses = rotations(200_000)
    top = poses[poses[:, 2, 2].abs() > 0.95]
    alone, _ = sampling_compensation(fourier_sampling(top, IDENTITY)[:, 3])
    cubic, empty = sampling_compensation(fourier_sampling(top, parse_symmetry("O").elements)[:, 3])
    assert cubic > 1.5 * alone
    assert empty < 0.6


def test_nothing_sampled():
    assert sampling_compensation(torch.zeros(10)) == (0.0, 1.0)
