"""A consensus of all particles in one state: what each cell says of a part, moved back with that part.

If the part of a molecule moved by T from the reference to a cell, the cell's right-hand side b and its convolution K
become those of the reference as b(T x) and K(R x), R being the rotation of T. Their sums over all cells are solved for
each part, and the maps of the parts are put together where these are. Only the rigid motions of parts are taken back.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from torch import Tensor

from emsplat.heterogeneity.cells import Cells, empirical_map, raw_map
from emsplat.heterogeneity.half import HalfModel
from emsplat.heterogeneity.motions import members, part_of, rigid_motions, separable
from emsplat.imaging.project import voxelize
from emsplat.types import Gaussians, Grid

_BLUR = 6.0  # Å, of the borders between parts
_STILL = 1e-3  # rad, below which nothing is turned
_NOWHERE = 0.02  # of the largest density: there parts have equal shares


def corrected_maps(
    model: HalfModel, cells: Cells, latent: Float[Tensor, " q"]
) -> tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]:
    """The consensus in the state at a latent of the run, on the grid of the cells: filtered, and raw."""
    own = model.frame(latent.double()[None])[0]
    member = members(model)
    motions = rigid_motions(separable(model), own, cells.point, member)
    share = _shares(model, latent, member, cells.grid)
    together = [torch.zeros_like(share[0]), torch.zeros_like(share[0])]
    for part, (rotation, shift) in enumerate(motions):
        back = pulled_back(cells, rotation, shift)
        for volume, solve in zip(together, (empirical_map, raw_map), strict=True):
            volume += share[part] * solve(back, torch.ones(1))
    return together[0], together[1]


def pulled_back(cells: Cells, rotation: Float[Tensor, "m 3 3"], shift: Float[Tensor, "m 3"]) -> Cells:
    """All cells as one, each with x -> R x + t (Å) undone."""
    linear, response = torch.zeros_like(cells.linear[0]), torch.zeros_like(cells.response[0])
    for number in range(len(cells)):
        moved = shift[number] / cells.grid.pixel_size
        turn = rotation[number].flip(0, 1).double().numpy()  # in z, y, x
        linear += _moved(cells.linear[number].numpy(), turn, moved.flip(0).double().numpy(), 3)
        response += _turned(cells.response[number], turn)
    weight = cells.particles / cells.particles.sum()
    return Cells(
        cells.grid,
        linear[None],
        response.clamp(min=0)[None],
        cells.point[:1],
        cells.particles.sum()[None],
        (weight @ cells.noise)[None],
        cells.blur,
    )


def _moved(
    volume: NDArray[np.float32], turn: NDArray[np.float64], shift: NDArray[np.float64], order: Literal[1, 3]
) -> Tensor:
    """V(R x + t) for places x from the middle voxel."""
    if np.abs(turn - np.eye(3)).max() < _STILL and np.abs(shift).max() < _STILL:
        return torch.from_numpy(volume)
    centre = np.array(volume.shape) // 2
    offset = centre - turn @ centre + shift
    moved: NDArray[np.float32] = affine_transform(volume, turn, offset, order=order, mode="constant")
    return torch.from_numpy(moved)


def _turned(response: Float[Tensor, "w v k"], turn: NDArray[np.float64]) -> Float[Tensor, "w v k"]:
    """The transform of a convolution, turned: it is real, even and smooth."""
    side = len(response)
    whole = torch.fft.fftshift(torch.fft.fftn(torch.fft.irfftn(response, s=(side,) * 3)).real)
    turned = _moved(whole.numpy(), turn, np.zeros(3), 1)
    half: Tensor = torch.fft.ifftshift(turned)[:, :, : side // 2 + 1]
    return half


@torch.no_grad()
def _shares(
    model: HalfModel, latent: Float[Tensor, " q"], member: Float[Tensor, "g p"], grid: Grid
) -> Float[Tensor, "p z y x"]:
    """How much each place belongs to each part."""
    densities = []
    for column in member.T:
        mixture = part_of(model, latent, column)
        wide = mixture.covariance + _BLUR**2 * torch.eye(3)
        densities.append(voxelize(Gaussians(mixture.mean, wide, mixture.amplitude), grid).clamp(min=0))
    own = torch.stack(densities)
    return (own + _NOWHERE * own.max() / len(own)) / (own.sum(0) + _NOWHERE * own.max())
