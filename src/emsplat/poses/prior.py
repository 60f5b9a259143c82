"""How far poses are from where they were given, from the data."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor

from emsplat.poses.local import Placed, Prior
from emsplat.types import Poses

_BEGIN = Prior(math.radians(3), 3.0)
_ITERATIONS = 1000
_SETTLED = 1e-5  # part of the variances that an iteration changes: where there is no error they shrink by less and less
_FAR = 3.0  # widths beyond which an image is no measure of the width: it was found elsewhere, or shows something else


def turns(one: Float[Tensor, "p 3 3"], other: Float[Tensor, "p 3 3"]) -> Float[Tensor, "p 3"]:
    """Rotation vectors w, in the frames of the images, with exp([w]×) other = one."""
    return torch.from_numpy(Rotation.from_matrix((one @ other.mT).double().numpy()).as_rotvec())


def estimate_prior(placed: Placed, given: Poses) -> Prior:
    """The spread of true poses about those given, by EM, from images that were placed under a prior that hardly holds.

    Where an image was found differs from the truth by about the inverse of its Hessian. What the spread of all has
    beyond that is the error of the poses that were given.
    """
    away = torch.cat([turns(placed.poses.rotation, given.rotation), placed.poses.shift - given.shift], 1)
    precision = 2 * placed.hessian
    widths = torch.tensor([_BEGIN.turn**2, _BEGIN.shift**2], dtype=torch.float64)  # variances
    # How far an image was found, and how far noise alone takes it.
    distance = _by_kind(away.square())
    noise = _by_kind(torch.diagonal(torch.linalg.inv(precision + _precision(widths)), dim1=1, dim2=2))
    for _ in range(_ITERATIONS):
        covariance = torch.linalg.inv(precision + _precision(widths))
        mean = (covariance @ precision @ away[..., None]).squeeze(-1)
        near = (distance < _FAR**2 * (widths + noise)).all(1)
        if not near.any():
            break
        second = _by_kind(mean.square() + torch.diagonal(covariance, dim1=1, dim2=2))
        before, widths = widths, second[near].mean(0).clamp(min=1e-12)
        if bool(((widths - before).abs() < _SETTLED * before).all()):
            break
    return Prior(*widths.sqrt().tolist())


def _by_kind(values: Float[Tensor, "p 5"]) -> Float[Tensor, "p 2"]:
    """Means over the axes of turns and of shifts."""
    return torch.stack([values[:, :3].mean(1), values[:, 3:].mean(1)], 1)


def _precision(widths: Float[Tensor, "2"]) -> Float[Tensor, "5 5"]:
    return torch.diag(1 / widths.repeat_interleave(torch.tensor([3, 2])))
