"""Fitting Gaussians to accumulated statistics: the two halves in step, then all particles on the same course.

How long to fit and how many Gaussians to take is judged by the mean cross-validated FSC, one number per candidate (an
epoch, a number of Gaussians). That number is all that passes between the halves, as the FSC does in RELION's prior.
Without a judge the course is fixed beforehand and nothing passes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emsplat.accumulate import NormalEquations
from emsplat.assess.crossvalidate import CrossValidation
from emsplat.density import grow
from emsplat.fit import Plan, State, fit
from emsplat.model import GaussianField
from emsplat.objective import VolumeObjective
from emsplat.project import voxelize

_COARSE = 0.25  # of the epochs of the first stage
_PATIENCE = 2  # epochs without a better score before a stage ends
_BETTER = 2e-4  # what an epoch must add to the score to count
_CONVERGED = 3e-4  # relative; an epoch that lowers the loss by less ends a stage that nobody judges
_WORTH = 5e-4  # what a stage with more Gaussians must add to be kept


@dataclass(frozen=True)
class Stage:
    """A number of Gaussians and how long they are fitted; later stages start from grown models."""

    gaussians: int
    epochs: int
    score: float | None = None  # mean cross-validated FSC at its end
    kept: bool = True
    scores: tuple[tuple[int, float], ...] = ()  # the same after each epoch that was judged


@dataclass
class VolumeFit:
    """One set of particles being fitted. ``model`` is the best so far; ``state`` the last step."""

    name: str
    equations: NormalEquations
    objective: VolumeObjective
    model: GaussianField
    state: State = field(init=False)

    def __post_init__(self) -> None:
        self.state = State.begin(self.model)

    @torch.no_grad()
    def volume(self) -> Tensor:
        """The map of the last step on the whole box."""
        return voxelize(self.state.model(), self.equations.grid)


def coarse_steps(epochs: int) -> int:
    """How many steps of the first stage see coarse voxels only."""
    return int(_COARSE * epochs) * VolumeObjective.steps_per_epoch


def fit_course(
    fits: Sequence[VolumeFit], plan: Plan, growth: int, judge: CrossValidation | None, stages: list[Stage]
) -> Iterator[VolumeFit]:
    """Fits in step, and yields after each step of each fit.

    Given ``stages`` are followed. Otherwise the course is found, and ``stages`` filled: a first stage of ``plan``, then
    up to ``growth`` stages with half as many Gaussians more and half the rate, as long as the judge finds them worth
    it. A stage ends with its epochs, when the judge has seen no better epoch for two, or without a judge when an epoch
    lowers the loss by less than 3e-4 of itself; the best epoch counts.
    """
    following = bool(stages)
    epochs_before = 0
    best = -math.inf
    for number in range(len(stages) if following else growth + 1):
        if following and not stages[number].kept:
            break
        if number:
            # The step counter goes on from the best epoch, as it will where the course is followed.
            for one in fits:
                one.state = State.begin(grow(one.model, one.objective), epochs_before * one.objective.steps_per_epoch)
        epochs = stages[number].epochs if following else plan.epochs
        rate = plan.learning_rate * (0.5 if number else 1.0)
        part = Plan(epochs, rate, plan.decay, first=epochs_before)
        score, length, scores = yield from _stage(fits, part, None if following else judge, best, follow=following)
        if not following:
            count = round(sum(len(one.state.model) for one in fits) / len(fits))
            kept = number == 0 or score > best + _WORTH
            stages.append(Stage(count, length, score if math.isfinite(score) else None, kept, tuple(scores)))
            if not kept:
                break
            best = score
        epochs_before += length
        if not following and judge is None:
            break
    for one in fits:
        one.state.step = epochs_before * one.objective.steps_per_epoch


def _stage(
    fits: Sequence[VolumeFit], plan: Plan, judge: CrossValidation | None, to_beat: float, *, follow: bool
) -> Generator[VolumeFit, None, tuple[float, int, list[tuple[int, float]]]]:
    """One stage; returns its best score, the epochs up to there, and the score after each epoch judged.

    Models are kept where it beats ``to_beat``.
    """
    running = [fit(one.state, one.objective, plan) for one in fits]
    top, length, before = -math.inf, plan.epochs, math.inf
    scores: list[tuple[int, float]] = []
    for epoch in range(1, plan.epochs + 1):
        for one, states in zip(fits, running, strict=True):
            for _ in range(one.objective.steps_per_epoch):
                one.state = next(states)
                yield one
        if judge is not None and len(fits) == 2:
            if fits[0].state.step < fits[0].objective.coarse_steps:
                continue  # nothing holds the high shells yet
            score = judge.score((fits[0].volume(), fits[1].volume()))
            scores.append((plan.first + epoch, score))
            if score > top + _BETTER or top == -math.inf:
                top, length = score, epoch
                if score > to_beat + _WORTH or to_beat == -math.inf:
                    _keep(fits)
            elif epoch >= length + _PATIENCE:
                break
        elif not follow:
            loss = sum(float(one.state.terms["loss"]) for one in fits)
            if before - loss < _CONVERGED * abs(loss):
                length = epoch
                break
            before = loss
    if judge is None:
        _keep(fits)
    return top, length, scores


def _keep(fits: Sequence[VolumeFit]) -> None:
    for one in fits:
        one.model = one.state.model.copy()
