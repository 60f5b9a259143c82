"""Masks: volumes with values in [0, 1] on the grid of a map."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.errors import InputError
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
