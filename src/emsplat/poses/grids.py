"""Grids of poses that are tried, each turned and moved at random, so that none is preferred in the long run."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.maths.geometry import random_rotations
from emsplat.maths.groups import Symmetry

HALF_TURN = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))  # in the image plane
_GENERIC = (0.21, 0.36, 0.91)  # a direction on no axis of any group in RELION's setting


def sphere(count: int) -> Float[Tensor, "n 3"]:
    """Directions spread evenly over the sphere (Fibonacci's spiral), float64."""
    place = torch.arange(count, dtype=torch.float64) + 0.5
    z, longitude = 1 - 2 * place / count, math.pi * (1 + math.sqrt(5)) * place
    radius = (1 - z * z).sqrt()
    return torch.stack([radius * longitude.cos(), radius * longitude.sin(), z], 1)


def half_grid(step: float, symmetry: Symmetry, generator: torch.Generator) -> Float[Tensor, "r 3 3"]:
    """Rotations about ``step`` rad apart that see an asymmetric unit of directions, turned at random, float64.

    In-plane angles cover half a turn: each rotation A stands for `HALF_TURN` A too, whose slice is the complex
    conjugate.
    """
    count = max(12, round(4 * math.pi / step**2))
    direction = sphere(count) @ random_rotations(1, generator)[0]
    if symmetry.order > 1:
        middle = torch.nn.functional.normalize(torch.tensor(_GENERIC, dtype=torch.float64), dim=0)
        own, others = direction @ middle, direction @ (symmetry.elements @ middle).T
        direction = direction[(own[:, None] >= others - 1e-9).all(1)]
    turns = max(3, round(math.pi / step))
    angle = (torch.arange(turns) + torch.rand(1, generator=generator)).double() * math.pi / turns
    return towards(direction, angle)


def towards(direction: Float[Tensor, "d 3"], angle: Float[Tensor, " a"]) -> Float[Tensor, "r 3 3"]:
    """Rotations that see an object from each direction (third row) at each in-plane angle (rad); the angles of a
    direction are neighbours."""
    z = direction.double()
    steep = z[:, 2:].abs() > 0.9
    aside = torch.where(steep, z.new_tensor([1.0, 0.0, 0.0]), z.new_tensor([0.0, 0.0, 1.0]))
    x = torch.nn.functional.normalize(torch.linalg.cross(aside, z), dim=1)
    y = torch.linalg.cross(z, x)
    cosine, sine = angle.cos()[None, :, None], angle.sin()[None, :, None]
    rows = [cosine * x[:, None] + sine * y[:, None], cosine * y[:, None] - sine * x[:, None]]
    return torch.stack([*rows, z[:, None].expand_as(rows[0])], 2).flatten(0, 1)


def shift_grid(step: float, reach: float, generator: torch.Generator) -> Float[Tensor, "s 2"]:
    """Shifts ``step`` apart within ``reach`` of none, all moved at random by less than a step (Å)."""
    most = math.ceil(reach / step) + 1
    axis = torch.arange(-most, most + 1) * step
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shift = torch.stack([x.flatten(), y.flatten()], 1) + (torch.rand(2, generator=generator) - 0.5) * step
    return shift[torch.linalg.vector_norm(shift, dim=1) <= max(reach, 0.75 * step)]
