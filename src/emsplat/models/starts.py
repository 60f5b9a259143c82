"""Models to start from: random, on the lattice of a map, or the Gaussians of a file."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from torch import Tensor

from emsplat.maths.fourier import slabs
from emsplat.maths.geometry import principal_axes
from emsplat.models.gaussians import Bounds, GaussianField, inverse_softplus, raw_scale, unturned
from emsplat.types import Gaussians, Grid


def ball(
    count: int, grid: Grid, bounds: Bounds, seed: int, *, isotropic: bool = False, rotation: bool = True
) -> GaussianField:
    """Means normal with σ = 0.075 of the box, scales 0.0075 of the box, softplus amplitudes 1/(2N) (cryoSplat, 4.1)."""
    rng = torch.Generator().manual_seed(seed)
    mean = 0.075 * torch.randn(count, 3, generator=rng)
    scale = torch.full((count, 1 if isotropic else 3), 0.0075 * grid.length)
    return _field(mean * grid.length / bounds.length, scale, bounds, rotation)


def uniform(
    count: int, grid: Grid, bounds: Bounds, seed: int, *, isotropic: bool = False, rotation: bool = True
) -> GaussianField:
    """Means uniform in the cube, scale of each the mean distance to its three nearest neighbours (GEM)."""
    rng = torch.Generator().manual_seed(seed)
    mean = torch.rand(count, 3, generator=rng) - 0.5
    distance, _ = cKDTree(mean.numpy()).query(mean.numpy(), k=min(4, count))
    nearest = np.atleast_2d(distance)[:, 1:].mean(1) if count > 1 else np.full(1, 0.5)
    scale = torch.from_numpy(nearest).float()[:, None] * grid.length
    return _field(mean * grid.length / bounds.length, scale.repeat(1, 1 if isotropic else 3), bounds, rotation)


def from_map(
    volume: Float[Tensor, "z y x"],
    grid: Grid,
    count: int,
    bounds: Bounds,
    seed: int,
    *,
    support: int | None = None,
    isotropic: bool = False,
    rotation: bool = True,
) -> GaussianField:
    """Gaussians on a jittered lattice over the dense part of a map, in its middle ``support`` voxels (None: anywhere),
    with the map's values as amplitudes.

    The spacing is such that about ``count`` lattice points lie in the dense part; the densest ``count`` are taken.
    Scales are 0.45 of the spacing, amplitudes have mean 1 (in units of ``bounds.unit``), and axes are turned at random
    so that the three directions of a Gaussian do not start alike. ``grid`` is the map's.
    """
    size, rng = grid.size, np.random.default_rng(seed)
    smooth, dense = dense_part(volume.numpy(), support)
    threshold = float(smooth[dense].min()) if dense.any() else np.inf
    # A finer lattice than half a voxel would add points, but no detail.
    spacing = max((int(dense.sum()) / count) ** (1 / 3), 0.5)  # voxels
    points, density = np.empty((0, 3)), np.empty(0)
    while dense.any():
        points, density = _lattice(smooth, spacing, threshold, rng, support)
        if len(points) >= count or spacing == 0.5:
            break
        spacing = max(0.97 * spacing, 0.5)
    densest = np.argsort(-density, kind="stable")[:count]
    points, density = points[densest], density[densest]
    missing = count - len(points)
    if missing and len(points):  # too little density for so many: crowd around it
        extra = points[rng.integers(len(points), size=missing)] + rng.normal(0, spacing, (missing, 3))
        points, density = np.concatenate([points, extra]), np.append(density, np.full(missing, density.mean()))
    elif missing:  # no density at all: anywhere will do
        points, density = rng.normal(0, 0.15 * size, (missing, 3)), np.ones(missing)
    weight = np.clip(density / density.mean(), 0.1, 10.0)
    mean = torch.from_numpy(points[:, ::-1] * grid.pixel_size / bounds.length).float()
    scale = torch.full((count, 1 if isotropic else 3), 0.45 * spacing * grid.pixel_size)
    quaternion = torch.from_numpy(rng.normal(0, 0.1, (count, 4)) + [1, 0, 0, 0]).float()
    amplitude = inverse_softplus(torch.from_numpy(weight).float())
    return GaussianField(mean, raw_scale(scale, bounds), quaternion, amplitude, bounds, rotation=rotation)


@torch.no_grad()
def from_gaussians(
    gaussians: Gaussians, bounds: Bounds, *, isotropic: bool = False, rotation: bool = True
) -> GaussianField:
    """The parameters of a mixture, the inverse of `GaussianField.forward` except that the amplitudes are scaled.

    Amplitudes above 0 get the mean 1 (in units of ``bounds.unit``); the others, which the model cannot hold, and very
    small ones become 0.01. Widths below the bound are raised to 1 % above it. Round Gaussians take the mean of the
    three variances, those that cannot turn the diagonal of the covariance.
    """
    positive = gaussians.amplitude[gaussians.amplitude > 0]
    weight = (gaussians.amplitude / positive.mean()).clamp(min=0.01)
    variance = gaussians.covariance.diagonal(dim1=1, dim2=2)
    quaternion = unturned(gaussians.mean)
    if isotropic:
        scale = variance.mean(1, keepdim=True).sqrt()
    elif rotation:
        scale, quaternion = principal_axes(gaussians.covariance)
    else:
        scale = variance.sqrt()
    mean = gaussians.mean / bounds.length
    return GaussianField(
        mean, raw_scale(scale, bounds), quaternion, inverse_softplus(weight), bounds, rotation=rotation
    )


_REACH = 0.42  # of the box: beyond it a map is surroundings


def dense_part(
    volume: NDArray[np.float32], support: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A map smoothed by half a voxel, and where it exceeds its surroundings by three of their standard deviations.

    With ``support`` only its middle voxels count: where a fit does not look, a few bright ones of a map of few images
    would draw all Gaussians.
    """
    size = len(volume)
    smooth = gaussian_filter(volume, 0.5)
    axis = np.arange(size) - size // 2
    inside, around = np.empty(smooth.shape, bool), np.empty(smooth.shape, bool)
    for z, height in enumerate(axis):  # the radius of all voxels would take as much memory as two maps
        radius = np.sqrt(height**2 + axis[:, None] ** 2 + axis**2) / size
        inside[z], around[z] = radius < _REACH, (radius > _REACH) & (radius < 0.5)
    surroundings = smooth[around]
    dense = inside & (smooth > surroundings.mean() + 3 * surroundings.std())
    if support is not None:
        edge = size // 2 - support // 2
        middle = (slice(edge, edge + support),) * 3
        for values, nothing in ((smooth, smooth.min()), (dense, False)):
            kept = values[middle].copy()
            values[:] = nothing
            values[middle] = kept
    return smooth, dense


def _lattice(
    volume: NDArray[np.float32],
    spacing: float,
    threshold: float,
    rng: np.random.Generator,
    support: int | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Jittered lattice points (z, y, x from the centre, in voxels) above the threshold, and the map's values there.
    Nothing is above it outside of the middle ``support`` voxels."""
    half = len(volume) // 2
    axis = np.arange(-half, half, spacing)
    found = []
    for planes in slabs(len(axis), len(axis) ** 2):  # a box of 512 has a billion points of half a voxel
        points = np.stack(np.meshgrid(axis[planes], axis, axis, indexing="ij"), -1).reshape(-1, 3)
        points += rng.uniform(-0.25, 0.25, points.shape) * spacing
        if support is not None:
            points = points[(np.abs(points) < support / 2 + 1).all(1)]
        points = points[(points**2).sum(1) < (_REACH * len(volume)) ** 2]
        density = map_coordinates(volume, (points + half).T, order=1).astype(np.float64)
        dense = density > threshold
        found.append((points[dense], density[dense]))
    kept, densities = zip(*found, strict=True)
    return np.concatenate(kept), np.concatenate(densities)


def _field(mean: Tensor, scale: Tensor, bounds: Bounds, rotation: bool) -> GaussianField:
    count = len(mean)
    amplitude = inverse_softplus(torch.full((count,), 0.5 / count))
    return GaussianField(mean, raw_scale(scale, bounds), unturned(mean), amplitude, bounds, rotation=rotation)
