"""The pixels around a particle, by which images are normalised, and images without any."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.types import Grid

MASKED = 1e-8  # variance of a background that is constant, relative to that of about 1,000 pixels of the image


@cache
def background_pixels(grid: Grid, diameter: float, device: torch.device) -> Int[Tensor, " b"]:
    return background(grid, diameter).flatten().nonzero()[:, 0].to(device)


def is_bad(images: Float[Tensor, "p y x"]) -> Tensor:
    """Which images are constant or hold values that are not finite."""
    flat = images.flatten(1)
    low, high = flat.amin(1), flat.amax(1)  # NaN where any pixel is; five times as fast as aminmax
    return ~torch.isfinite(low) | ~torch.isfinite(high) | (low == high)


def background(grid: Grid, diameter: float) -> Bool[Tensor, "y x"]:
    """The pixels outside a circle of ``diameter`` Å about the centre."""
    axis = (torch.arange(grid.size) - grid.size // 2) * grid.pixel_size
    return (axis[:, None] ** 2 + axis**2).sqrt() > diameter / 2
