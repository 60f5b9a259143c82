"""Masks: range, centre, profile of the edge, volume."""

from __future__ import annotations

import math

import pytest
import torch

from emsplat.assess.mask import spherical_mask
from emsplat.errors import InputError
from emsplat.types import Grid


@pytest.mark.parametrize("size", [16, 17])
def test_centre_and_symmetry(size: int) -> None:
    """The sphere stands on voxel size // 2 and looks the same along and against each axis."""
    mask = spherical_mask(Grid(size, 1.5), 9.0, 4.5)
    centre = size // 2
    assert mask[centre, centre, centre] == 1
    line = mask[centre, centre, centre + 1 :]
    assert torch.equal(line, mask[centre, centre, :centre].flip(0)[: len(line)])
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
