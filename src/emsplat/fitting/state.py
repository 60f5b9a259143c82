"""The state of a fit and its optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim._functional import sparse_adam
from torch.optim.adam import adam

from emsplat.errors import EmsplatError
from emsplat.models.base import Model, ParameterGroup
from emsplat.parallel import World

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Plan:
    """How long and how fast: the learning rate is multiplied by ``decay`` after every epoch.

    A plan may follow another: ``first`` counts the epochs before it.
    """

    epochs: int
    learning_rate: float
    decay: float
    first: int = 0


class Optimiser:
    """Adam for groups of parameters (`Model.groups`), each at its own multiple of the rate. Sparse groups have their
    own kind of it, which looks only at the rows that a gradient names.

    The arithmetic is PyTorch's. Its classes are not used: the first of them to be made imports the compiler, which
    takes longer than many fits, and 120 MB.
    """

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self._groups = groups
        self.parameters = {name: own for group in self._groups for name, own in group.parameters.items()}
        self._held: dict[str, dict[str, Tensor]] = {}

    def forget(self) -> None:
        """Throws gradients away."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def summed(self, terms: dict[str, Tensor], world: World) -> dict[str, Tensor]:
        """The losses of all processes of a ``world``; gradients are summed as well, but for those of sparse groups,
        whose rows are with the one process that has their particles."""
        if world.size == 1:
            return terms
        dense = list[torch.nn.Parameter]()
        for group in self._groups:
            for parameter in group.parameters.values():
                if parameter.grad is None:  # none of its particles in this step, which counts all the same
                    parameter.grad = _no_rows(parameter) if group.sparse else torch.zeros_like(parameter)
            dense += [] if group.sparse else group.parameters.values()
        gradients = [parameter.grad.contiguous() for parameter in dense if parameter.grad is not None]
        losses = torch.stack([term.detach() for term in terms.values()])
        together = torch.cat([losses, *(gradient.flatten() for gradient in gradients)])
        world.sum_(together)
        sizes = [len(losses), *(gradient.numel() for gradient in gradients)]
        losses, *parts = torch.split(together, sizes)
        for parameter, part in zip(dense, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return dict(zip(terms, losses, strict=True))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves every parameter that has a gradient."""
        for group in self._groups:
            moved = {name: own for name, own in group.parameters.items() if own.grad is not None}
            held = [self._moments_of(name, group.sparse) for name in moved]
            averages, squares, steps = ([moments[which] for moments in held] for which in _MOMENTS)
            gradients = [own.grad for own in moved.values() if own.grad is not None]
            numbers: dict[str, Any] = {"lr": group.rate * rate, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
            if group.sparse:
                counts = [int(count.add_(1)) for count in steps]
                sparse_adam([*moved.values()], gradients, averages, squares, counts, maximize=False, **numbers)
            else:
                numbers |= {"fused": True, "amsgrad": False, "weight_decay": 0.0, "maximize": False}
                adam([*moved.values()], gradients, averages, squares, [], steps, **numbers)

    def _moments_of(self, name: str, sparse: bool) -> dict[str, Tensor]:
        if name not in self._held:
            parameter = self.parameters[name]
            count = torch.zeros((), dtype=torch.int64) if sparse else torch.zeros((), device=parameter.device)
            values = [torch.zeros_like(parameter), torch.zeros_like(parameter), count]
            self._held[name] = dict(zip(_MOMENTS, values, strict=True))
        return self._held[name]

    def moments(self) -> dict[str, Tensor]:
        """Adam's memory by name, e.g. ``mean.exp_avg``."""
        return {f"{name}.{which}": value for name, held in self._held.items() for which, value in held.items()}

    def remember(self, moments: dict[str, Tensor]) -> None:
        """Takes over what `moments` gave.

        Raises:
            KeyError: some moments of a parameter are missing.
        """
        for name in self.parameters:
            if f"{name}.step" in moments:
                self._held[name] = {which: moments[f"{name}.{which}"] for which in _MOMENTS}


def _no_rows(parameter: Tensor) -> Tensor:
    """The gradient of a sparse parameter of which nothing was seen."""
    index = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
    return torch.sparse_coo_tensor(index, parameter.new_empty(0, *parameter.shape[1:]), parameter.shape)


@dataclass
class State(Generic[M]):
    """The fit after ``step`` steps; ``terms`` are the objective's at the last one, ``rate`` was its learning rate.

    ``watched`` is a sum of losses, those that nobody has looked at among them: it is finite only if they all are.
    """

    model: M
    optimiser: Optimiser
    step: int
    terms: dict[str, Tensor]
    watched: Tensor | None = None
    rate: float = 0.0

    @classmethod
    def begin(cls, model: M, step: int = 0) -> State[M]:
        """Before the first step, or at a later one with nothing remembered of those before."""
        return cls(model, Optimiser(model.groups()), step, {})

    def with_model(self, model: M, moments: dict[str, Tensor]) -> State[M]:
        """The same step of another model, with moments for its parameters."""
        optimiser = Optimiser(model.groups())
        optimiser.remember(moments)
        return replace(self, model=model, optimiser=optimiser)

    def require_finite(self) -> None:
        """
        Raises:
            EmsplatError: a loss since the beginning was not finite.
        """
        if self.watched is not None and not bool(torch.isfinite(self.watched)):
            raise EmsplatError(
                f"the fit diverged: by step {self.step + 1} the loss is not finite; try a smaller --learning-rate"
            )
