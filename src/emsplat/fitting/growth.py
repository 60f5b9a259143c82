"""Density control: more Gaussians where the data ask for them, none where they carry nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.fitting.loop import fit
from emsplat.fitting.objective import Objective
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective
from emsplat.models.gaussians import GaussianField
from emsplat.parallel import ALONE, World
from emsplat.types import Gaussians

SPLIT = 0.5  # of the Gaussians, those under which most is missing
EMPTY = 0.02  # of the mean amplitude: below it a Gaussian carries nothing


def grow(model: GaussianField, objective: VolumeObjective) -> GaussianField:
    """Splits the half of the Gaussians under which the residual map has most power, and prunes empty ones.

    The same model and data always give the same result.
    """
    lacking = missing_power(model, objective)
    with torch.no_grad():
        amplitude = model.amplitudes()
    carries = amplitude > EMPTY * amplitude.mean()
    order = torch.argsort(torch.where(carries, lacking, -torch.inf), descending=True, stable=True)
    chosen = torch.zeros_like(carries)
    chosen[order[: int(SPLIT * int(carries.sum()))]] = True
    return model.split(chosen).take(torch.cat([carries, carries[chosen]]))


def fit_doubling(
    state: State[GaussianField], objective: Objective, plan: Plan, after: Sequence[int], world: World = ALONE
) -> Iterator[State[GaussianField]]:
    """`fit`, with every Gaussian split in two ``after`` these epochs (1-based), in ascending order.

    Raises:
        EmsplatError: as `fit`.
    """
    for last in (*after, plan.epochs):
        for reached in fit(state, objective, plan, until=last, world=world):
            state = reached
            yield state
        # A fit that was resumed may be further, and has been split then.
        if last != plan.epochs and state.step == last * objective.steps_per_epoch:
            state = doubled(state)


def doubled(state: State[GaussianField]) -> State[GaussianField]:
    """Both halves of a Gaussian inherit its moments."""
    moments = {
        name: moment if name.endswith(".step") else torch.cat([moment, moment])
        for name, moment in state.optimiser.moments().items()
    }
    return state.with_model(state.model.split(), moments)


def missing_power(model: GaussianField, objective: VolumeObjective) -> Float[Tensor, " g"]:
    """Mean squared residual density under each Gaussian, weighted with its own shape.

    The residual is the classical map of what the model leaves unexplained. Its mean under a Gaussian is the derivative
    of Σ r² V with respect to the Gaussian's amplitude.
    """
    with torch.no_grad():
        mixture = model.gaussians()
        square = objective.residual(objective.render(mixture)).square()
    amplitude = mixture.amplitude.clone().requires_grad_()
    volume = objective.render(Gaussians(mixture.mean, mixture.covariance, amplitude))
    gradient: Tensor = torch.autograd.grad((volume * square).sum(), amplitude)[0]
    return gradient
