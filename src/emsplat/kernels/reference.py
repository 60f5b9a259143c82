"""The two operators as dense, differentiable PyTorch: the definition that the fast kernels are tested against.

Memory grows with Gaussians x pixels, so this is for small problems. Nothing is cut off.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.types import Gaussians, Grid, Poses


def _axis(grid: Grid, like: Tensor) -> Float[Tensor, " x"]:
    """Coordinates in Å of the pixels along one axis."""
    return (torch.arange(grid.size, dtype=like.dtype, device=like.device) - grid.size // 2) * grid.pixel_size


def _symmetric(covariance: Tensor) -> Tensor:
    return 0.5 * (covariance + covariance.mT)


def project(gaussians: Gaussians, poses: Poses, grid: Grid) -> Float[Tensor, "p y x"]:
    """Line integrals along z of the rotated mixture (GEM eq. 6, cryoSplat eq. 8), sampled at the pixel centres.

    Means, covariances and amplitudes may each have a leading axis, for images of mixtures of their own."""
    rows = poses.rotation[:, None, :2]  # p 1 2 3
    centre = (rows @ gaussians.mean[..., None]).squeeze(-1) - poses.shift[:, None]  # p g 2
    covariance = rows @ _symmetric(gaussians.covariance) @ rows.mT  # p g 2 2
    axis = _axis(grid, gaussians.mean)
    dx = axis - centre[..., 0, None]  # p g x
    dy = axis - centre[..., 1, None]
    conic = torch.linalg.inv(covariance)[..., None, None, :, :]
    exponent = (
        conic[..., 0, 0] * dx[..., None, :] ** 2
        + 2 * conic[..., 0, 1] * dx[..., None, :] * dy[..., :, None]
        + conic[..., 1, 1] * dy[..., :, None] ** 2
    )
    weight = gaussians.amplitude / (2 * math.pi * torch.sqrt(torch.linalg.det(covariance)))
    return torch.einsum("pg,pgyx->pyx", weight, torch.exp(-0.5 * exponent)) * grid.pixel_size**2


def voxelize(gaussians: Gaussians, grid: Grid) -> Float[Tensor, "z y x"]:
    """The mixture at the voxel centres, times the voxel volume: the sum over z is the projection at identity."""
    axis = _axis(grid, gaussians.mean)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    offset = torch.stack([x, y, z], -1) - gaussians.mean[:, None, None, None]  # g z y x 3
    covariance = _symmetric(gaussians.covariance)
    exponent = torch.einsum("gzyxi,gij,gzyxj->gzyx", offset, torch.linalg.inv(covariance), offset)
    weight = gaussians.amplitude / torch.sqrt((2 * math.pi) ** 3 * torch.linalg.det(covariance))
    return torch.einsum("g,gzyx->zyx", weight, torch.exp(-0.5 * exponent)) * grid.pixel_size**3
