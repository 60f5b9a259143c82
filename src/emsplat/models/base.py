"""What a model is to an objective, to the optimiser and to a file.

A model says which Gaussians each particle of a batch shows and in which pose. How it holds them is its own affair: one
mixture for all, shifted copies of one, parts that move. It is written and read as a `Saved`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from emsplat.types import Batch, Gaussians, Poses


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one rate.

    Rows of ``sparse`` parameters belong to particles: their gradients come as sparse tensors (`rows_of`), and a step
    moves the rows of its batch alone, whose moments are the only ones that change.
    """

    parameters: dict[str, torch.nn.Parameter]  # names are unique in the model
    rate: float = 1.0  # times the learning rate of the plan
    sparse: bool = False


@dataclass(frozen=True)
class Saved:
    """All that a model needs to be made again: which kind it is, what JSON can hold, and tensors."""

    kind: str
    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


@runtime_checkable
class Model(Protocol):
    """What can be fitted to particles."""

    def gaussians(self, batch: Batch | None = None) -> Gaussians:
        """One mixture for all particles, or one for each of the batch (`Gaussians.each`); the consensus for None."""
        ...

    def poses(self, batch: Batch) -> Poses:
        """The poses in which the particles are seen, as a rule those of the batch."""
        ...

    def groups(self) -> list[ParameterGroup]:
        """What the optimiser may change."""
        ...

    def state(self) -> Saved: ...


Reader = Callable[[Saved], Model]


def rows_of(parameter: torch.nn.Parameter, index: Tensor) -> Tensor:
    """Rows of a sparse parameter, whose gradient will name these rows only."""
    return torch.nn.functional.embedding(index, parameter, sparse=True)
