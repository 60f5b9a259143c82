"""Two half-sets have latent spaces of their own; how one leads to the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """An affine map between latent spaces: z' = turn z + offset."""

    turn: Float[Tensor, "r q"]
    offset: Float[Tensor, " r"]

    def __call__(self, latent: Float[Tensor, "b q"]) -> Float[Tensor, "b r"]:
        return latent @ self.turn.T + self.offset


def cross_embedding(own: Float[Tensor, "v q"], other: Float[Tensor, "v r"]) -> Frame:
    """The frame that leads from one space to another, from views that were embedded in both."""
    ones = torch.ones(len(own), 1, dtype=own.dtype)
    solution = torch.linalg.lstsq(torch.cat([own, ones], 1), other, driver="gelsd").solution
    return Frame(solution[:-1].T.contiguous(), solution[-1])


def identity(count: int) -> Frame:
    return Frame(torch.eye(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64))
