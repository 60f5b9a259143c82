"""Independent sources of signals."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_STEPS, _ENOUGH = 200, 1e-6


def rotation_to_independence(white: Float[Tensor, "k n"]) -> Float[Tensor, "k k"]:
    """The rotation W of white signals (WWᵀ = 1, signals Xᵢ·Xⱼ/n = δᵢⱼ) after which they are as independent as a
    rotation can make them: FastICA, symmetric, with tanh (Hyvärinen 1999, IEEE Trans. Neural Netw. 10:626).

    It begins with samples that are far from each other, so that the result does not hang on the basis that the signals
    come in. Signals without independent sources come back turned in some way: no error.
    """
    rest, chosen = white.clone(), list[Tensor]()
    for _ in range(len(white)):
        farthest = rest[:, rest.square().sum(0).argmax()]
        chosen.append(farthest / farthest.norm())
        rest -= torch.outer(chosen[-1], chosen[-1] @ rest)
    turn = torch.stack(chosen)
    for _ in range(_STEPS):
        bent = torch.tanh(turn @ white)
        step = bent @ white.T / white.shape[1] - (1 - bent.square()).mean(1)[:, None] * turn
        left, _, right = torch.linalg.svd(step, full_matrices=False)
        before, turn = turn, left @ right
        if float((1 - (turn * before).sum(1).abs()).max()) < _ENOUGH:
            break
    return turn
