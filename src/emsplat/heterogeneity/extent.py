"""How large the molecule is, from the maps of the linear stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emsplat.heterogeneity.subspace import Subspace
from emsplat.maths.fourier import is_smooth
from emsplat.types import Grid

_MARGIN = 0.02  # of the box, beyond what is seen
_SEEN = 0.01  # of the largest power
_NOISE = 200.0  # times the median of squared noise, which its largest of 10⁵ voxels does not reach
_MOST = 120  # voxels across the middle of the box


@dataclass(frozen=True)
class Window:
    """The middle of the box that holds the molecule: ``support`` voxels of ``grid``, which covers the whole box."""

    grid: Grid
    support: int


def reach_of(subspace: Subspace) -> float:
    """Largest distance from the centre, in boxes, at which the mean map or the variance stands out of its
    surroundings; half a box where neither does.

    The surroundings are the median of a shell near the faces of the box, which a large molecule crosses here and there:
    its own density must not hide it.
    """
    size = subspace.lattice.size
    axis = (torch.arange(size) - size // 2) / size
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    reach = [0.0]
    for power in (subspace.maps[0].square(), subspace.maps[1:].square().sum(0)):
        around = float(power[(radius > 0.40) & (radius < 0.44)].median())
        bright = power > max(_NOISE * around, _SEEN * float(power.max()))
        reach += [float(radius[bright].max())] if bright.any() else []
    return max(reach) or 0.5


def window_of(subspaces: tuple[Subspace, ...], grid: Grid) -> Window:
    """For the sums of cells: the molecule with a margin, on voxels coarser than the images' where it is large."""
    share = min(1.0, 2 * (max(map(reach_of, subspaces)) + _MARGIN))
    size = grid.size
    if share * size > _MOST:
        size = 2 * int(_MOST / share / 2)
    support = next(n for n in range(8, 2 * size, 8) if (n >= share * size and is_smooth(n // 8)) or n + 8 > size)
    return Window(Grid(size, grid.length / size), support)
