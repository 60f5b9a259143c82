"""The only optimisation loop and its checkpoints, for any model.

Adam, for the parameters of Gaussians with one rate: unequal rates bend the descent direction and let Gaussians spread
(cryoSplat, 4.1). The caller owns the loop: ``for state in fit(...)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.device import CPU
from emsplat.errors import EmsplatError, InputError
from emsplat.io.tensors import write_tensors
from emsplat.models.base import Model, Reader, Saved
from emsplat.models.gaussians import read_gaussian_field
from emsplat.objective import Objective

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_LOOK = 50  # steps after which a GPU is asked whether the loss is still finite; each time the host waits for it

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


def fit(state: State[M], objective: Objective, plan: Plan, until: int | None = None) -> Iterator[State[M]]:
    """Fits a model step by step, from `State.begin` or from wherever a checkpoint left off (`load_checkpoint`), to the
    end of the plan or of epoch ``until``.

    Raises:
        EmsplatError: the loss is no longer finite; on a GPU this is found at the end of an epoch at the latest.
    """
    steps = objective.steps_per_epoch
    last = plan.first + plan.epochs if until is None else until
    while state.step < last * steps:
        state.optimiser.forget()
        terms = objective(state.model, state.step)
        total = torch.stack(list(terms.values())).sum()
        watched = total.detach() if state.watched is None else state.watched + total.detach()
        rate = plan.learning_rate * plan.decay ** (state.step // steps - plan.first)
        state = replace(state, terms={name: term.detach() for name, term in terms.items()}, watched=watched, rate=rate)
        if total.device.type == "cpu":
            state.require_finite()  # before the model is changed
        total.backward()  # type: ignore[no-untyped-call]
        state.optimiser.step(rate)
        state = replace(state, step=state.step + 1)
        if total.device.type != "cpu" and (state.step % steps == 0 or state.step % _LOOK == 0):
            state.require_finite()
        yield state


def save_checkpoint(path: Path, state: State[M]) -> None:
    """The whole state of a fit as safetensors, under a temporary name until it is complete.

    Raises:
        EmsplatError: the fit has diverged.
    """
    state.require_finite()
    saved = state.model.state()
    tensors = {f"model.{name}": tensor for name, tensor in saved.tensors.items()}
    tensors |= {f"adam.{name}": moment for name, moment in state.optimiser.moments().items()}
    about = {"step": state.step, "kind": saved.kind, "numbers": saved.numbers}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, held, {"emsplat": json.dumps(about)})


def load_checkpoint(path: Path, device: torch.device = CPU, read: Reader = read_gaussian_field) -> State[Any]:
    """What `save_checkpoint` wrote, on ``device``; ``read`` makes the model from what it had saved.

    Raises:
        InputError: missing, damaged, or not a checkpoint of emsplat.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["emsplat"])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a dict)
        held = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        model = read(Saved(about["kind"], about["numbers"], held))
        moments = {name.removeprefix("adam."): t for name, t in tensors.items() if name.startswith("adam.")}
        return State.begin(model, int(about["step"])).with_model(model, moments)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a checkpoint that can be resumed ({error}); remove it or start anew with --overwrite"
        ) from error
