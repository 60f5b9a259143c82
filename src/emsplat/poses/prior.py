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
_ITERATIONS = 60
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
    turn, shift = _BEGIN.turn**2, _BEGIN.shift**2
    for _ in range(_ITERATIONS):
        prior = torch.diag(torch.tensor([1 / turn] * 3 + [1 / shift] * 2, dtype=torch.float64))
        covariance = torch.linalg.inv(precision + prior)
        mean = (covariance @ precision @ away[..., None]).squeeze(-1)
        second = mean.square() + torch.diagonal(covariance, dim1=1, dim2=2)
        near = (away[:, :3].square().mean(1) < _FAR**2 * turn) & (away[:, 3:].square().mean(1) < _FAR**2 * shift)
        if not near.any():
            break
        turn, shift = (max(float(part[near].mean()), 1e-12) for part in (second[:, :3], second[:, 3:]))
    return Prior(math.sqrt(turn), math.sqrt(shift))
