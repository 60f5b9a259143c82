"""Fitting Gaussians to accumulated statistics: the two halves in step, then all particles on the same course.

The mean cross-validated FSC judges a stage with more Gaussians: it is kept unless it has made the halves worse by more
than could be chance. The gain and its error are all that passes between the halves, as the FSC does in RELION's prior.
Without a judge the course is fixed beforehand and nothing passes.

The burden of proof lies with the smaller number. More Gaussians seldom harm, since their width is bounded, and the full
map, of twice the data, gains where the halves no longer do. Gains that chance or rounding could reverse are common,
losses beyond chance are not: so threads, machines and half-sets agree on the course.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emsplat.accumulate import NormalEquations
from emsplat.assess.crossvalidate import CrossValidation
from emsplat.density import grow
from emsplat.fit import Plan, State, fit
from emsplat.models.gaussians import GaussianField
from emsplat.objective import VolumeObjective
from emsplat.project import voxelize

_COARSE = 0.25  # of the epochs of the first stage
_FIRST = 2 / 3  # of the epochs where stages follow: what is to be split need not have converged
_LATER = 0.5  # of the epochs, and of the rate: later stages start from a model that is nearly right
_SURE = 3.0  # standard errors by which a stage must have lost to be taken back
_HARM = 2e-3  # the least loss of score that matters


@dataclass(frozen=True)
class Stage:
    """A number of Gaussians and how long they are fitted; later stages start from grown models."""

    gaussians: int
    epochs: int
    score: float | None = None  # mean cross-validated FSC at its end
    gain: float | None = None  # of the score over the stage before
    gain_error: float | None = None  # standard error of the gain
    kept: bool = True
    scores: tuple[tuple[int, float], ...] = ()  # the same after each epoch that was judged


@dataclass
class VolumeFit:
    """One set of particles being fitted. ``model`` is that of the last stage kept; ``state`` the last step."""

    name: str
    equations: NormalEquations
    objective: VolumeObjective
    model: GaussianField
    state: State[GaussianField] = field(init=False)

    def __post_init__(self) -> None:
        self.state = State.begin(self.model)

    @torch.no_grad()
    def volume(self) -> Tensor:
        """The map of the last step on the whole box."""
        return voxelize(self.state.model.gaussians(), self.equations.grid)

    @torch.no_grad()
    def kept_volume(self) -> Tensor:
        """The map of ``model`` on the whole box."""
        return voxelize(self.model.gaussians(), self.equations.grid)


def coarse_steps(epochs: int) -> int:
    """How many steps of the first stage see coarse voxels only."""
    return int(_COARSE * epochs) * VolumeObjective.steps_per_epoch


def stage_epochs(epochs: int, growth: int) -> list[int]:
    """How many epochs the stages of a course have: ``epochs`` where the number of Gaussians stays."""
    if not growth:
        return [epochs]
    return [max(1, round(_FIRST * epochs)), *[max(1, round(_LATER * epochs))] * growth]


def fit_course(
    fits: Sequence[VolumeFit], plan: Plan, growth: int, judge: CrossValidation | None, stages: list[Stage]
) -> Iterator[VolumeFit]:
    """Fits in step, and yields after each step of each fit.

    Given ``stages`` are followed. Otherwise the course is found, and ``stages`` filled: a first stage of ``plan``, then
    up to ``growth`` stages with half as many Gaussians more and half the rate. One that lowers the score by more than
    three of its standard errors and 0.002 is taken back and is the last. Without a judge there is one stage.
    """
    following = bool(stages)
    if following or len(fits) != 2:
        judge = None
    planned = [stage.epochs for stage in stages if stage.kept]
    planned = planned or stage_epochs(plan.epochs, growth if judge is not None else 0)
    epochs_before = 0
    for number, epochs in enumerate(planned):
        if number:
            # The step counter goes on from the stage before, as it will where the course is followed.
            for one in fits:
                one.state = State.begin(grow(one.model, one.objective), epochs_before * one.objective.steps_per_epoch)
        rate = plan.learning_rate * (_LATER if number else 1.0)
        running = [fit(one.state, one.objective, Plan(epochs, rate, plan.decay, first=epochs_before)) for one in fits]
        scores: list[tuple[int, float]] = []
        for epoch in range(epochs_before + 1, epochs_before + epochs + 1):
            for one, states in zip(fits, running, strict=True):
                for _ in range(one.objective.steps_per_epoch):
                    one.state = next(states)
                    yield one
            # Before the fine steps nothing holds the high shells.
            if judge is not None and fits[0].state.step >= fits[0].objective.coarse_steps:
                scores.append((epoch, judge.score((fits[0].volume(), fits[1].volume()))))
        if not following:
            stages.append(_judged(fits, judge, epochs, scores, first=number == 0))
            if not stages[-1].kept:
                break
        for one in fits:
            one.model = one.state.model.copy()
        epochs_before += epochs
    for one in fits:
        one.state.step = epochs_before * one.objective.steps_per_epoch


def _judged(
    fits: Sequence[VolumeFit],
    judge: CrossValidation | None,
    epochs: int,
    scores: list[tuple[int, float]],
    *,
    first: bool,
) -> Stage:
    """What a stage has brought: the last states against the models of the stage before."""
    count = round(sum(len(one.state.model) for one in fits) / len(fits))
    if judge is None or not scores:
        return Stage(count, epochs)
    if first:
        return Stage(count, epochs, scores[-1][1], scores=tuple(scores))
    gain, error = judge.gain((fits[0].kept_volume(), fits[1].kept_volume()), (fits[0].volume(), fits[1].volume()))
    kept = gain >= -max(_SURE * error, _HARM)
    return Stage(count, epochs, scores[-1][1], gain, error, kept, tuple(scores))
