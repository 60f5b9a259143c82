"""The state of a fit and its optimiser."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from emsplat.errors import EmsplatError
from emsplat.models.base import Model
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
    """Adam for the parameter groups of a model, each at its own multiple of the rate. Sparse groups have their own kind
    of it, which looks only at the rows that a gradient names."""

    def __init__(self, model: Model) -> None:
        groups = model.groups()
        self.parameters = {name: own for group in groups for name, own in group.parameters.items()}
        self._rates = [group.rate for sparse in (False, True) for group in groups if group.sparse == sparse]
        dense, rows = (
            [{"params": [*group.parameters.values()]} for group in groups if group.sparse == sparse]
            for sparse in (False, True)
        )
        self._kinds: list[torch.optim.Optimizer] = []
        if dense:
            self._kinds.append(torch.optim.Adam(dense, lr=0.0, fused=True))
        if rows:
            self._kinds.append(torch.optim.SparseAdam(rows))

    def forget(self) -> None:
        """Throws gradients away."""
        for kind in self._kinds:
            kind.zero_grad(set_to_none=True)

    def summed(self, terms: dict[str, Tensor], world: World) -> dict[str, Tensor]:
        """The losses of all processes of a ``world``; gradients are summed as well. Not for sparse groups."""
        if world.size == 1:
            return terms
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [
            parameter.grad.contiguous() for parameter in self.parameters.values() if parameter.grad is not None
        ]
        losses = torch.stack([term.detach() for term in terms.values()])
        together = torch.cat([losses, *(gradient.flatten() for gradient in gradients)])
        world.sum_(together)
        sizes = [len(losses), *(gradient.numel() for gradient in gradients)]
        losses, *parts = torch.split(together, sizes)
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return dict(zip(terms, losses, strict=True))

    def step(self, rate: float) -> None:
        """Moves every parameter that has a gradient."""
        groups = (group for kind in self._kinds for group in kind.param_groups)
        for own, group in zip(self._rates, groups, strict=True):
            group["lr"] = own * rate
        for kind in self._kinds:
            kind.step()

    def moments(self) -> dict[str, Tensor]:
        """Adam's memory by name, e.g. ``mean.exp_avg``."""
        held = {parameter: state for kind in self._kinds for parameter, state in kind.state.items()}
        return {
            f"{name}.{moment}": torch.as_tensor(held[parameter][moment])
            for name, parameter in self.parameters.items()
            if held.get(parameter)
            for moment in _MOMENTS
        }

    def remember(self, moments: dict[str, Tensor]) -> None:
        """Takes over what `moments` gave.

        Raises:
            KeyError: some moments of a parameter are missing.
        """
        for name, parameter in self.parameters.items():
            if f"{name}.step" not in moments:
                continue
            for kind in self._kinds:
                if any(parameter is own for group in kind.param_groups for own in group["params"]):
                    state = {moment: moments[f"{name}.{moment}"] for moment in _MOMENTS}
                    if isinstance(kind, torch.optim.SparseAdam):
                        state["step"] = int(state["step"])  # type: ignore[assignment]
                    kind.state[parameter] = state


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
        return cls(model, Optimiser(model), step, {})

    def with_model(self, model: M, moments: dict[str, Tensor]) -> State[M]:
        """The same step of another model, with moments for its parameters."""
        optimiser = Optimiser(model)
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
