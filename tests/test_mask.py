"""Masks: range, centre, profile of the edge, volume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from emsplat.errors import InputError
from emsplat.io.mrc import read_map
from emsplat.maths.groups import dihedral
from emsplat.measures.mask import check_mask, solvent_mask, spherical_mask
from emsplat.particles.open import open_particles
from emsplat.sums.statistics import equations_of
from emsplat.types import Grid


@pytest.mark.parametrize("size", [16, 17])
def test_centre_and_symmetry(size: int) -> None:
    """The sphere stands on voxel size // 2 and looks the same along and against each axis."""
    mask = spherical_mask(Grid(size, 1.5), 9.0, 4.5)
    centre = size // 2
    assert mask[centre, centre, centre] == 1
    line = mask[centre, centre, centre + 1 :]
    torch.testing.assert_close(line, mask[centre, centre, :centre].flip(0)[: len(line)])
    for axes in [(1, 0, 2), (2, 1, 0), (0, 2, 1)]:
        torch.testing.assert_close(mask.permute(axes), mask)


def test_profile_of_the_edge() -> None:
    """½ + ½ cos(π d / edge), d in Å beyond the radius, independent of the pixel size."""
    for pixel_size in (0.5, 1.0, 2.0):
        mask = spherical_mask(Grid(64, pixel_size), 12.0, 8.0)
        profile = dict(zip((torch.arange(32) * pixel_size).tolist(), mask[32, 32, 32:].tolist(), strict=True))
        quarter = 0.5 + 0.5 * math.cos(math.pi / 4)
        for radius, expected in [(0.0, 1.0), (6.0, 1.0), (8.0, quarter), (10.0, 0.5)]:
            assert profile[radius] == pytest.approx(expected, abs=1e-6)
        assert all(value == pytest.approx(0, abs=1e-6) for radius, value in profile.items() if radius >= 14)


def test_range_and_volume() -> None:
    mask = spherical_mask(Grid(64, 1.0), 40.0, 0.0)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.sum().item() == pytest.approx(math.pi / 6 * 40**3, rel=0.01)
    soft = spherical_mask(Grid(64, 1.0), 40.0, 6.0)
    assert soft.min() >= 0
    assert soft.max() <= 1
    assert soft.sum() > mask.sum()


@pytest.mark.parametrize(("diameter", "edge"), [(0.0, 3.0), (-5.0, 3.0), (20.0, -1.0), (math.nan, 1.0)])
def test_errors(diameter: float, edge: float) -> None:
    with pytest.raises(InputError, match="expected diameter > 0 and edge >= 0"):
        spherical_mask(Grid(16, 1.0), diameter, edge)


def noisy_particle(level: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """A dumbbell with noise of ``level`` times its density, its inside, and the grid."""
    grid = Grid(64, 3.0)
    axis = (torch.arange(64) - 32) * 3.0
    z, y, x = axis[:, None, None], axis[:, None], axis
    inside = ((x - 25) ** 2 + y**2 + z**2 < 30**2) | ((x + 25) ** 2 + y**2 + z**2 < 20**2)
    noise = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(seed))
    return inside + level * noise, inside, grid


@pytest.mark.parametrize("level", [0.0, 0.5, 2.0])
def test_solvent_mask_covers_the_particle_and_little_else(level: float) -> None:
    volume, inside, grid = noisy_particle(level)
    mask = solvent_mask(volume, grid, 160.0)
    assert mask.dtype == torch.float32
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1
    assert float(mask[inside].mean()) > 0.98
    assert float((mask > 0.5).sum()) < 2.6 * float(inside.sum())


def test_solvent_mask_drops_specks_and_fills_holes() -> None:
    volume, _, grid = noisy_particle(0.0)
    volume = volume.clone()
    volume[30:35, 30:35, 38:42] = 0  # a hole
    volume[8:12, 32, 32] = 3.0  # a speck far away
    mask = solvent_mask(volume, grid, 180.0)
    assert float(mask[32, 32, 40]) == 1
    assert float(mask[8, 32, 32]) == 0


def test_solvent_mask_of_nothing_is_the_sphere() -> None:
    grid = Grid(32, 4.0)
    mask = solvent_mask(torch.zeros(32, 32, 32), grid, 80.0)
    torch.testing.assert_close(mask, spherical_mask(grid, 80.0, 12.0))


def test_solvent_mask_of_experimental_particles(shared_data: Path) -> None:
    stack = open_particles(shared_data / "bgal" / "particles.star", symmetry=dihedral(2))
    mask = solvent_mask(equations_of(stack).solve(), stack.grid, stack.diameter)
    reference = read_map(shared_data / "bgal" / "mask_soft.mrc")[0] > 0.5
    assert float(mask[reference].mean()) > 0.95
    assert float((mask > 0.5).sum()) < 1.6 * float(reference.sum())


def test_masks_of_users_are_checked() -> None:
    good = torch.linspace(-0.0005, 1.0005, 64).reshape(4, 4, 4)
    assert float(check_mask(good, "m.mrc").max()) == 1
    for bad, word in ((good * 2, "expected 0 to 1"), (good * 0.4, "above 0.5"), (good * math.nan, "expected 0 to 1")):
        with pytest.raises(InputError, match=rf"m\.mrc: .*{word}"):
            check_mask(bad, "m.mrc")
