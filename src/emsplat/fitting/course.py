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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emsplat.fitting.growth import grow
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective
from emsplat.imaging.project import voxelize
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.models.gaussians import GaussianField
from emsplat.sums.equations import NormalEquations

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


@dataclass(frozen=True)
class Score:
    """The mean cross-validated FSC after an epoch that was judged."""

    epoch: int  # since the beginning of the course
    gaussians: int
    value: float


class VolumeFit:
    """One set of particles being fitted: ``state`` is that of the last step, ``kept`` that of the last stage kept,
    without the optimiser's memory."""

    def __init__(self, name: str, equations: NormalEquations, objective: VolumeObjective, model: GaussianField) -> None:
        self.name, self.equations, self.objective = name, equations, objective
        self.state = self.kept = State.begin(model)

    def keep(self) -> None:
        """Takes the last step for the result so far."""
        last = self.state
        self.kept = replace(State.begin(last.model.copy(), last.step), terms=last.terms)

    def grow(self) -> None:
        """More Gaussians than the result so far has, to go on from it. The steps are counted on."""
        self.state = State.begin(grow(self.kept.model, self.objective), self.kept.step)


def coarse_steps(epochs: int) -> int:
    """How many steps of the first stage see coarse voxels only."""
    return int(_COARSE * epochs) * VolumeObjective.steps_per_epoch


def stage_epochs(epochs: int, growth: int) -> list[int]:
    """How many epochs the stages of a course have: ``epochs`` where the number of Gaussians stays."""
    if not growth:
        return [epochs]
    return [max(1, round(_FIRST * epochs)), *[max(1, round(_LATER * epochs))] * growth]


def find_course(
    fits: Sequence[VolumeFit], plan: Plan, growth: int, judge: CrossValidation | None
) -> Iterator[VolumeFit | Score | Stage]:
    """Fits in step on a course that the judge decides. Yields what happens: a fit after each of its steps, the score
    after each epoch that was judged, each stage at its end, also that which is taken back.

    A first stage of ``plan``, then up to ``growth`` stages with half as many Gaussians more and half the rate. One that
    lowers the score by more than three of its standard errors and 0.002 is taken back and is the last. A judge is for
    two halves; without one there is one stage.
    """
    for number, epochs in enumerate(stage_epochs(plan.epochs, growth if judge is not None else 0)):
        score = None
        for one in _steps(fits, plan, epochs):
            yield one
            if judge is not None and one is fits[-1] and _can_be_judged(one):
                score = Score(_epoch(one.state), _gaussians(fits), judge.score(_volumes(fits)))
                yield score
        stage = Stage(_gaussians(fits), epochs, None if score is None else score.value)
        if number and score is not None and judge is not None:
            gain, error = judge.gain(_volumes(fits, kept=True), _volumes(fits))
            stage = replace(stage, gain=gain, gain_error=error, kept=gain >= -max(_SURE * error, _HARM))
        yield stage
        if not stage.kept:
            return
        for one in fits:
            one.keep()


def follow_course(fits: Sequence[VolumeFit], plan: Plan, stages: Sequence[Stage]) -> Iterator[VolumeFit]:
    """Fits in step through the stages that a course has kept; yields a fit after each of its steps."""
    for stage in stages:
        if stage.kept:
            yield from _steps(fits, plan, stage.epochs)
            for one in fits:
                one.keep()


def _steps(fits: Sequence[VolumeFit], plan: Plan, epochs: int) -> Iterator[VolumeFit]:
    """A stage from what is kept, grown where that is not the start; epoch by epoch, one fit after the other."""
    before = _epoch(fits[0].kept)
    if before:
        for one in fits:
            one.grow()
    part = Plan(epochs, plan.learning_rate * (_LATER if before else 1.0), plan.decay, first=before)
    running = [fit(one.state, one.objective, part) for one in fits]
    for _ in range(epochs):
        for one, states in zip(fits, running, strict=True):
            for _ in range(VolumeObjective.steps_per_epoch):
                one.state = next(states)
                yield one


def _epoch(state: State[GaussianField]) -> int:
    return state.step // VolumeObjective.steps_per_epoch


def _can_be_judged(one: VolumeFit) -> bool:
    """At the end of an epoch. Before the fine steps nothing holds the high shells."""
    step = one.state.step
    return step % VolumeObjective.steps_per_epoch == 0 and step >= one.objective.coarse_steps


def _gaussians(fits: Sequence[VolumeFit]) -> int:
    """How many a fit has, in the mean."""
    return round(sum(len(one.state.model) for one in fits) / len(fits))


@torch.no_grad()
def _volumes(fits: Sequence[VolumeFit], *, kept: bool = False) -> tuple[Tensor, Tensor]:
    """The maps of two halves on the whole box: of their last steps, or of what is kept."""
    first, second = (voxelize((one.kept if kept else one.state).model.gaussians(), one.equations.grid) for one in fits)
    return first, second
