"""Fitting Gaussians to accumulated statistics: the two halves in step, then all particles on the same course.

How many Gaussians to take is judged by the mean cross-validated FSC: a stage with more of them is kept if it gains more
than could be chance, and enough to matter. The gain and its error are all that passes between the halves, as the FSC
does in RELION's prior. Without a judge the course is fixed beforehand and nothing passes.

Rounding is not the same on every machine and with every number of threads, and a fit carries it into the fourth digit
of the score. So nothing is decided that close: a stage has its epochs, whichever of the last happens to score best.
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
_FIRST = 2 / 3  # of the epochs where stages follow: what is to be split need not have converged
_LATER = 0.5  # of the epochs, and of the rate: later stages start from a model that is nearly right
_SURE = 2.0  # standard errors by which one model must be better than another to count as better
_WORTH = 2e-3  # the least difference of scores that matters
_CONVERGED = 3e-4  # relative; an epoch that lowers the loss by less ends a stage that nobody judges


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

    @torch.no_grad()
    def best_volume(self) -> Tensor:
        """The map of ``model`` on the whole box."""
        return voxelize(self.model(), self.equations.grid)


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
    up to ``growth`` stages with half as many Gaussians more and half the rate, as long as the judge finds the gain in
    score to exceed two of its standard errors and 0.002. Should the score of a stage fall by as much, it ends at its
    best epoch. Without a judge there is one stage, which ends when an epoch lowers the loss by less than 3e-4 of
    itself.
    """
    following = bool(stages)
    planned = [stage.epochs for stage in stages] or stage_epochs(plan.epochs, growth if judge is not None else 0)
    epochs_before = 0
    for number, epochs in enumerate(planned):
        if following and not stages[number].kept:
            break
        if number:
            # The step counter goes on from the stage before, as it will where the course is followed.
            for one in fits:
                one.state = State.begin(grow(one.model, one.objective), epochs_before * one.objective.steps_per_epoch)
        rate = plan.learning_rate * (_LATER if number else 1.0)
        part = Plan(epochs, rate, plan.decay, first=epochs_before)
        length, scores = yield from _stage(fits, part, None if following else judge, follow=following)
        if not following:
            stage = _judged(fits, judge, length, scores, first=number == 0)
            stages.append(stage)
            if not stage.kept:
                break
        for one in fits:
            one.model = one.state.model.copy()
        epochs_before += length
    for one in fits:
        one.state.step = epochs_before * one.objective.steps_per_epoch


def _judged(
    fits: Sequence[VolumeFit],
    judge: CrossValidation | None,
    length: int,
    scores: list[tuple[int, float]],
    *,
    first: bool,
) -> Stage:
    """What a stage has brought: the last states against the models of the stage before."""
    count = round(sum(len(one.state.model) for one in fits) / len(fits))
    if judge is None or not scores:
        return Stage(count, length)
    now = (fits[0].volume(), fits[1].volume())
    score = judge.score(now)
    if first:
        return Stage(count, length, score, scores=tuple(scores))
    gain, error = judge.gain((fits[0].best_volume(), fits[1].best_volume()), now)
    return Stage(count, length, score, gain, error, _better(gain, error), tuple(scores))


def _better(gain: float, error: float) -> bool:
    return gain > max(_SURE * error, _WORTH)


def _stage(
    fits: Sequence[VolumeFit], plan: Plan, judge: CrossValidation | None, *, follow: bool
) -> Generator[VolumeFit, None, tuple[int, list[tuple[int, float]]]]:
    """One stage; returns how many epochs it had and the score after each epoch judged."""
    running = [fit(one.state, one.objective, plan) for one in fits]
    before, top = math.inf, -math.inf
    best: tuple[int, tuple[Tensor, Tensor], list[GaussianField]] | None = None
    scores: list[tuple[int, float]] = []
    for epoch in range(1, plan.epochs + 1):
        for one, states in zip(fits, running, strict=True):
            for _ in range(one.objective.steps_per_epoch):
                one.state = next(states)
                yield one
        if judge is not None and len(fits) == 2:
            if fits[0].state.step < fits[0].objective.coarse_steps:
                continue  # nothing holds the high shells yet
            now = (fits[0].volume(), fits[1].volume())
            score = judge.score(now)
            scores.append((plan.first + epoch, score))
            if best is None or score > top:
                top, best = score, (epoch, now, [one.state.model.copy() for one in fits])
            elif _better(*judge.gain(now, best[1])):
                for one, model in zip(fits, best[2], strict=True):
                    one.state.model = model
                return best[0], scores
        elif not follow:
            loss = sum(float(one.state.terms["loss"]) for one in fits)
            if before - loss < _CONVERGED * abs(loss):
                return epoch, scores
            before = loss
    return plan.epochs, scores
