"""The only optimisation loop, for any model.

Adam, for the parameters of Gaussians with one rate: unequal rates bend the descent direction and let Gaussians spread
(cryoSplat, 4.1). The caller owns the loop: ``for state in fit(...)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from emsplat.fitting.objective import Objective
from emsplat.fitting.state import M, Plan, State
from emsplat.parallel import ALONE, World

_LOOK = 50  # steps after which a GPU is asked whether the loss is still finite; each time the host waits for it


def fit(
    state: State[M], objective: Objective, plan: Plan, until: int | None = None, world: World = ALONE
) -> Iterator[State[M]]:
    """Fits a model step by step, from `State.begin` or from wherever a checkpoint left off (`load_checkpoint`), to the
    end of the plan or of epoch ``until``. Where processes of a ``world`` see a share of the data each, their losses and
    gradients add up, and all make the same step.

    Raises:
        EmsplatError: the loss is no longer finite; on a GPU this is found at the end of an epoch at the latest.
    """
    steps = objective.steps_per_epoch
    last = plan.first + plan.epochs if until is None else until
    while state.step < last * steps:
        state.optimiser.forget()
        terms = objective(state.model, state.step)
        total = torch.stack(list(terms.values())).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        terms = state.optimiser.summed(terms, world)
        total = torch.stack(list(terms.values())).sum()
        watched = total.detach() if state.watched is None else state.watched + total.detach()
        rate = plan.learning_rate * plan.decay ** (state.step // steps - plan.first)
        state = replace(state, terms={name: term.detach() for name, term in terms.items()}, watched=watched, rate=rate)
        if total.device.type == "cpu":
            state.require_finite()  # before the model is changed
        state.optimiser.step(rate)
        state = replace(state, step=state.step + 1)
        if total.device.type != "cpu" and (state.step % steps == 0 or state.step % _LOOK == 0):
            state.require_finite()
        yield state
