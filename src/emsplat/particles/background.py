"""The pixels around a particle, by which images are normalised, and images without any."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.types import Grid

_LARGEST = 1e15  # of a value: squares of larger ones are no float32 any more
_HOT = 0.25  # of an image's variance, in a single pixel
MASKED = 1e-8  # variance of a background that is constant, relative to that of about 1,000 pixels of the image


@cache
def background_pixels(grid: Grid, diameter: float, device: torch.device) -> Int[Tensor, " b"]:
    return background(grid, diameter).flatten().nonzero()[:, 0].to(device)


def is_bad(images: Float[Tensor, "p y x"]) -> Tensor:
    """Which images are constant or hold values that are not finite, or too large to be squared."""
    flat = images.flatten(1)
    low, high = flat.amin(1), flat.amax(1)  # NaN where any pixel is; five times as fast as aminmax
    return ~((low > -_LARGEST) & (high < _LARGEST) & (low != high))


def has_hot_pixel(images: Float[Tensor, "p y x"]) -> Tensor:
    """Which images have a quarter of all their variance in one pixel, as a defect of a camera puts it there. In noise
    the largest of N pixels would have to be √N / 2 standard deviations away."""
    flat = images.flatten(1)
    mean = flat.mean(1, keepdim=True)
    largest = torch.maximum(flat.amax(1) - mean[:, 0], mean[:, 0] - flat.amin(1))
    return largest.square() > _HOT * flat.var(1, correction=0) * flat.shape[1]


def background(grid: Grid, diameter: float) -> Bool[Tensor, "y x"]:
    """The pixels outside a circle of ``diameter`` Å about the centre."""
    axis = (torch.arange(grid.size) - grid.size // 2) * grid.pixel_size
    return (axis[:, None] ** 2 + axis**2).sqrt() > diameter / 2
