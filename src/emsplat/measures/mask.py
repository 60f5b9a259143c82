"""Masks: volumes with values in [0, 1] on the grid of a map."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths.fourier import filtered
from emsplat.types import Grid


def spherical_mask(grid: Grid, diameter: float, edge: float) -> Float[Tensor, "z y x"]:
    """A soft sphere about the centre ``size // 2``, float32.

    1 up to ``diameter`` / 2 Å from the centre; then ½ + ½ cos(π d / edge) at d Å further out (RELION); 0 from
    d = ``edge`` Å on.
    ``edge`` = 0 gives a hard sphere.

    Raises:
        InputError: the diameter is not positive or the edge is negative.
    """
    if not (diameter > 0 and edge >= 0):
        raise InputError(
            f"spherical mask: diameter {diameter:g} Å and edge {edge:g} Å; expected diameter > 0 and "
            f"edge >= 0; a diameter near the particle's, at most the box of {grid.length:g} Å, is usual"
        )
    square = ((torch.arange(grid.size) - grid.size // 2) * grid.pixel_size) ** 2
    radius = (square[:, None, None] + square[:, None] + square).sqrt()
    outside = radius - diameter / 2
    if edge == 0:
        return (outside <= 0).float()
    return 0.5 + 0.5 * torch.cos(math.pi / edge * outside.clamp(0, edge))


def solvent_mask(
    volume: Float[Tensor, "z y x"],
    grid: Grid,
    diameter: float,
    *,
    lowpass: float = 15.0,
    extend: float = 4.0,
    edge: float = 8.0,
) -> Float[Tensor, "z y x"]:
    """A soft mask around the particle in a map, float32 in [0, 1].

    The map is low-passed (Gaussian, half amplitude at ``lowpass`` Å or 4 voxels) and cut at the larger of: half of
    Otsu's threshold above the surroundings; three standard deviations of the surroundings above them. Components of at
    least 5 % of the largest stay, holes are filled, the region grows by ``extend`` Å (at least a voxel), and a raised
    cosine of ``edge`` Å (at least 3 voxels) follows. Nothing lies beyond ``diameter`` Å and its own edge. Where nothing
    exceeds the threshold the mask is the sphere of that diameter.
    """
    size = grid.size
    extend, edge = max(extend, grid.pixel_size), max(edge, 3 * grid.pixel_size)
    diameter = min(diameter, grid.length - 2 * edge)
    sphere = spherical_mask(grid, diameter, edge)
    width = max(lowpass, 4 * grid.pixel_size) / grid.length
    low = filtered(volume, lambda radius: torch.exp(-math.log(2) * (width * radius).square())).numpy()
    axis = (np.arange(size) - size // 2) / size
    outside, inside = np.empty(low.shape, bool), np.empty(low.shape, bool)
    for z, height in enumerate(axis):  # the radius of all voxels would take as much memory as two maps
        radius = np.sqrt(height**2 + axis[:, None] ** 2 + axis**2)
        outside[z], inside[z] = (radius > 0.42) & (radius < 0.5), radius * grid.length < diameter / 2
    around = low[outside]
    mean = float(around.mean())
    level = mean + max(0.5 * (_otsu(low[inside]) - mean), 3 * float(around.std()))
    label, found = ndimage.label((low > level) & inside)
    if not found:
        return sphere
    sizes = np.bincount(label.ravel())
    sizes[0] = 0
    region = ndimage.binary_fill_holes((sizes >= 0.05 * sizes.max())[label])
    return soft_region(torch.from_numpy(region), grid.pixel_size, extend, edge) * sphere


def soft_region(region: Bool[Tensor, "z y x"], pixel_size: float, extend: float, edge: float) -> Float[Tensor, "z y x"]:
    """1 in a region and up to ``extend`` Å from it, then a raised cosine of ``edge`` Å; float32."""
    soft = torch.zeros(region.shape)
    reach = math.ceil((extend + edge) / pixel_size)
    inside = region.numpy()
    ends = [_ends(np.logical_or.reduce(inside, axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    # Only about the region: beyond its reach there is nothing. Some planes at a time, with those within reach of them:
    # a distance transform takes 50 bytes a voxel.
    rows, columns = (slice(max(0, start - reach), end + reach) for start, end in ends[1:])
    for start in range(max(0, ends[0][0] - reach), min(len(soft), ends[0][1] + reach), 4 * reach):
        end = start + 4 * reach
        first = max(0, start - reach)
        near = inside[first : end + reach, rows, columns]
        if near.any():
            distance = ndimage.distance_transform_edt(~near)[start - first : end - first] * pixel_size - extend
            cosine = 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / edge, 0, 1))
            soft[start:end, rows, columns] = torch.from_numpy(cosine).float()
    return soft


def _ends(inside: NDArray[np.bool_]) -> tuple[int, int]:
    """The first place that is inside, and that after the last; (0, 0) where none is."""
    places = inside.nonzero()[0]
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _otsu(values: NDArray[np.float32]) -> float:
    """The threshold that parts values into two classes of the largest variance between them (Otsu 1979)."""
    count, edges = np.histogram(values, 256)
    centre = 0.5 * (edges[1:] + edges[:-1])
    below, total = np.cumsum(count), np.cumsum(count * centre)
    between = (total[-1] * below / below[-1] - total) ** 2 / np.maximum(below * (below[-1] - below), 1)
    return float(centre[between.argmax()])


def check_mask(mask: Float[Tensor, "z y x"], name: str) -> Float[Tensor, "z y x"]:
    """A mask as it can be used: values from 0 to 1, excursions of at most 1e-3 (interpolation) clipped.

    Raises:
        InputError: values beyond that, none above one half, or not a number.
    """
    low, high = float(mask.min()), float(mask.max()) + 0.0  # not -0
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        remedy = "is it inverted? Then multiply it by -1" if high <= 1e-3 else "threshold or rescale it"
        raise InputError(f"{name}: mask with values from {low:.4g} to {high:.4g}; expected 0 to 1; {remedy}")
    if high <= 0.5:
        raise InputError(f"{name}: mask without a voxel above 0.5; expected 1 inside the particle; lower its threshold")
    return mask.clamp(0, 1)
