"""The only optimisation loop, its schedule and its checkpoints.

Adam with one learning rate for all parameters: unequal rates bend the descent direction and let Gaussians spread
(cryoSplat, 4.1). The caller owns the loop: ``for state in fit(...)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.device import CPU
from emsplat.errors import EmsplatError, InputError
from emsplat.io.tensors import write_tensors
from emsplat.models.gaussians import PARAMETERS, Bounds, GaussianField
from emsplat.objective import Objective

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_LOOK = 50  # steps after which a GPU is asked whether the loss is still finite; each time the host waits for it


@dataclass(frozen=True)
class Plan:
    """How long and how fast: the learning rate is multiplied by ``decay`` after every epoch.

    A plan may follow another: ``first`` counts the epochs before it.
    """

    epochs: int
    learning_rate: float
    decay: float
    splits: tuple[int, ...] = ()  # after these epochs (1-based) the number of Gaussians doubles
    first: int = 0


@dataclass
class State:
    """The fit after ``step`` steps; ``terms`` are the objective's at the last one.

    ``watched`` is a sum of losses, those that nobody has looked at among them: it is finite only if they all are.
    """

    model: GaussianField
    optimiser: torch.optim.Adam
    step: int
    terms: dict[str, Tensor]
    watched: Tensor | None = None

    @classmethod
    def begin(cls, model: GaussianField, step: int = 0) -> State:
        """Before the first step, or at a later one with nothing remembered of those before."""
        return cls(model, _adam(model), step, {})

    def require_finite(self) -> None:
        """
        Raises:
            EmsplatError: a loss since the beginning was not finite.
        """
        if self.watched is not None and not bool(torch.isfinite(self.watched)):
            raise EmsplatError(
                f"the fit diverged: by step {self.step + 1} the loss is not finite; try a smaller --learning-rate"
            )


def fit(state: State, objective: Objective, plan: Plan) -> Iterator[State]:
    """Fits a model step by step, from `State.begin` or from wherever a checkpoint left off (`load_checkpoint`).

    Raises:
        EmsplatError: the loss is no longer finite; on a GPU this is found at the end of an epoch at the latest.
    """
    steps = objective.steps_per_epoch
    while state.step < (plan.first + plan.epochs) * steps:
        epoch, position = divmod(state.step, steps)
        if position == 0 and epoch in plan.splits:
            state = _split(state)
        for group in state.optimiser.param_groups:
            group["lr"] = plan.learning_rate * plan.decay ** (epoch - plan.first)
        state.optimiser.zero_grad(set_to_none=True)
        terms = objective(state.model, state.step)
        total = torch.stack(list(terms.values())).sum()
        watched = total.detach() if state.watched is None else state.watched + total.detach()
        state = replace(state, terms={name: term.detach() for name, term in terms.items()}, watched=watched)
        if total.device.type == "cpu":
            state.require_finite()  # before the model is changed
        total.backward()  # type: ignore[no-untyped-call]
        state.optimiser.step()
        state = replace(state, step=state.step + 1)
        if total.device.type != "cpu" and (state.step % steps == 0 or state.step % _LOOK == 0):
            state.require_finite()
        yield state


def _adam(model: GaussianField) -> torch.optim.Adam:
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(free, lr=0.0, fused=True)


def _moments(state: State) -> dict[str, Tensor]:
    """Adam's memory by name, e.g. ``mean.exp_avg``."""
    return {
        f"{name}.{moment}": state.optimiser.state[parameter][moment]
        for name, parameter in state.model.named_parameters()
        if parameter in state.optimiser.state
        for moment in _MOMENTS
    }


def _restore(model: GaussianField, moments: dict[str, Tensor]) -> torch.optim.Adam:
    optimiser = _adam(model)
    for name, parameter in model.named_parameters():
        if f"{name}.step" in moments:
            optimiser.state[parameter] = {moment: moments[f"{name}.{moment}"] for moment in _MOMENTS}
    return optimiser


def _split(state: State) -> State:
    """Both halves of a Gaussian inherit its moments."""
    moments = {
        name: moment if name.endswith(".step") else torch.cat([moment, moment])
        for name, moment in _moments(state).items()
    }
    model = state.model.split()
    return replace(state, model=model, optimiser=_restore(model, moments))


def save_checkpoint(path: Path, state: State) -> None:
    """The whole state of a fit as safetensors, under a temporary name until it is complete.

    Raises:
        EmsplatError: the fit has diverged.
    """
    state.require_finite()
    tensors = {f"model.{name}": getattr(state.model, name).detach() for name in PARAMETERS}
    tensors |= {f"adam.{name}": moment for name, moment in _moments(state).items()}
    about = {"step": state.step, "rotation": state.model.rotation, "bounds": asdict(state.model.bounds)}
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, held, {"emsplat": json.dumps(about)})


def load_checkpoint(path: Path, device: torch.device = CPU) -> State:
    """What `save_checkpoint` wrote, on ``device``.

    Raises:
        InputError: missing, damaged, or not a checkpoint of emsplat.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["emsplat"])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a dict)
        model = GaussianField(
            **{name: tensors[f"model.{name}"] for name in PARAMETERS},
            bounds=Bounds(**about["bounds"]),
            rotation=about["rotation"],
        )
        moments = {name.removeprefix("adam."): t for name, t in tensors.items() if name.startswith("adam.")}
        return State(model, _restore(model, moments), int(about["step"]), {})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a checkpoint that can be resumed ({error}); remove it or start anew with --overwrite"
        ) from error
