"""How large a molecule is taken to be."""

import pytest
import torch

from emsplat.heterogeneity.extent import reach_of, window_of
from emsplat.heterogeneity.subspace import Subspace
from emsplat.sums.lattice import Lattice
from emsplat.types import Grid


def seen(length, noise):
    """A rod of that length, in boxes, and a component at its ends, in noise."""
    size = Lattice(14).size
    axis = (torch.arange(size) - size // 2) / size
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    rod = ((x.abs() < length / 2) & (y.abs() < 0.1) & (z.abs() < 0.1)).float()
    ends = rod * (x.abs() > length / 2 - 0.1)
    rng = torch.Generator().manual_seed(0)
    maps = torch.stack([rod, ends]) + noise * torch.randn(2, size, size, size, generator=rng)
    return Subspace(Lattice(14), maps, torch.ones(2, 15))


@pytest.mark.parametrize("length", [0.3, 0.5, 0.7, 0.8, 0.86])
@pytest.mark.parametrize("noise", [1e-3, 0.05])
def test_a_molecule_is_seen_to_its_ends(length, noise):
    """Also one that comes near the faces of the box, where its surroundings are looked for."""
    reach = reach_of(seen(length, noise))
    assert length / 2 - 0.04 < reach < length / 2 + 0.14
    window = window_of((seen(length, noise),), Grid(60, 2.0))
    assert window.support >= min(2 * reach * 60, 56)


def test_where_nothing_is_seen_the_whole_box_is_taken():
    assert reach_of(seen(0.0, 1.0)) == 0.5
