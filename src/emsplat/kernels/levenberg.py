"""Levenberg's steps on the poses of many views at once, in plain PyTorch: what `Placing` in native/bindings.cpp does
for one after the other.

A kernel says how well each view agrees with its slice, and with what slope and curvature; the rest is small matrices in
float64. Views that have arrived are left out of the next look.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

_DAMPING = 1e-3
_LEAST, _MOST = 1e-6, 1e6
_EASED, _RAISED = 5, 8
_RIDGE = 1e-12

# What a kernel says of views in their poses: sums as `emsplat.kernels.pose_triton` has them.
Look = Callable[[Int[Tensor, " w"], Float[Tensor, "w 3 3"], Float[Tensor, "w 2"]], Float[Tensor, "w 22"]]


@dataclass
class _State:
    rotation: Float[Tensor, "v 3 3"]
    move: Float[Tensor, "v 2"]
    offset: Float[Tensor, "v 2"]  # from where the prior has the shift
    sums: Float[Tensor, "v 22"]
    pull: Float[Tensor, "v 5"]  # of the prior
    cost: Float[Tensor, " v"]  # of the prior, less the gain

    def take(self, views: Int[Tensor, " w"]) -> _State:
        return _State(*(getattr(self, one.name)[views] for one in fields(self)))

    def put(self, views: Int[Tensor, " w"], other: _State) -> None:
        for one in fields(self):
            getattr(self, one.name).index_copy_(0, views, getattr(other, one.name))

    @property
    def gain(self) -> Float[Tensor, " v"]:
        return self.sums[:, 0]

    @property
    def force(self) -> Float[Tensor, "v 5"]:
        return self.sums[:, 2:7] - self.pull

    @property
    def hessian(self) -> Float[Tensor, "v 5 5"]:
        row, column = torch.triu_indices(5, 5, device=self.sums.device)
        whole = self.sums.new_zeros(len(self.sums), 5, 5)
        whole[:, row, column] = self.sums[:, 7:]
        whole[:, column, row] = self.sums[:, 7:]
        return whole


def descend(
    look: Look,
    rotation: Float[Tensor, "v 3 3"],
    given: Float[Tensor, "v 3 3"],
    move: Float[Tensor, "v 2"],
    offset: Float[Tensor, "v 2"],
    precision: tuple[float, float],
    most: int,
    enough: float,
    longest: float,
) -> Float[Tensor, "v 40"]:
    """As `emsplat.kernels.Kernels.place` says; all of it in float64 but the sums of ``look``."""
    turn, shift = precision
    strength = torch.tensor([turn, turn, turn, shift, shift], dtype=torch.float64, device=rotation.device)

    def seen(views: Tensor, rotation: Tensor, move: Tensor, offset: Tensor) -> _State:
        sums = look(views, rotation, move).double()
        away = torch.cat([between(rotation, given[views]), offset], 1)
        return _State(rotation, move, offset, sums, strength * away, (strength * away.square()).sum(1) - sums[:, 0])

    going = torch.arange(len(rotation), device=rotation.device)
    at = seen(going, rotation.clone(), move.clone(), offset.clone())
    before, looks = at.gain.clone(), torch.ones_like(at.gain)
    damping = torch.full_like(looks, _DAMPING)
    for _ in range(most):
        here = at.take(going)
        matrix = here.hessian + torch.diag(strength)
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + damping[going, None]).add_(_RIDGE)
        root, failed = torch.linalg.cholesky_ex(matrix)
        step = torch.cholesky_solve(here.force[..., None], root)[..., 0]
        worth = ((failed == 0) & ((step * here.force).sum(1) > enough)).nonzero()[:, 0]
        if not len(worth):
            break
        going, here, step = going[worth], here.take(worth), step[worth]
        angle = torch.linalg.vector_norm(step[:, :3], dim=1, keepdim=True)
        step = step * (longest / angle.clamp(min=longest))
        moved = step[:, 3:]
        further = seen(going, turned(step[:, :3], here.rotation), here.move + moved, here.offset + moved)
        looks[going] += 1
        better = further.cost < here.cost
        gained = better.nonzero()[:, 0]
        at.put(going[gained], further.take(gained))
        eased, raised = (damping[going] / _EASED).clamp(min=_LEAST), damping[going] * _RAISED
        damping[going] = torch.where(better, eased, raised)
        going = going[damping[going] <= _MOST]
    flat = (at.rotation.flatten(1), at.move, at.hessian.flatten(1))
    return torch.cat([*flat, torch.stack([before, at.gain, looks, at.sums[:, 1]], 1)], 1)


def turned(vector: Float[Tensor, "n 3"], rotation: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 3 3"]:
    """exp([w]×) A."""
    angle = torch.linalg.vector_norm(vector, dim=1)[:, None, None]
    sine = torch.sinc(angle / math.pi)
    cosine = 0.5 * torch.sinc(angle / (2 * math.pi)).square()  # (1 - cos a) / a²
    cross = vector.new_zeros(len(vector), 3, 3)
    cross[:, 0, 1], cross[:, 0, 2], cross[:, 1, 2] = -vector[:, 2], vector[:, 1], -vector[:, 0]
    cross = cross - cross.mT
    return rotation + (sine * cross + cosine * cross @ cross) @ rotation


def between(rotation: Float[Tensor, "n 3 3"], other: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 3"]:
    """The rotation vector of A Bᵀ, |w| <= π."""
    turn = rotation @ other.mT
    odd = turn - turn.mT
    twice = torch.stack([odd[:, 2, 1], odd[:, 0, 2], odd[:, 1, 0]], 1)
    sine = 0.5 * torch.linalg.vector_norm(twice, dim=1)
    angle = torch.atan2(sine, 0.5 * (turn.diagonal(dim1=1, dim2=2).sum(1) - 1))
    return twice * torch.where(sine > 1e-9, 0.5 * angle / sine.clamp(min=1e-9), 0.5)[:, None]
