"""Fitting Gaussians to accumulated statistics: the two halves in step, then all particles on the same course.

The mean cross-validated FSC judges a stage with more Gaussians: it is kept unless it has made the halves worse by more
than could be chance. The gain and its error are all that passes between the halves, as the FSC does in RELION's prior.
Without a judge the course is fixed beforehand and nothing passes.

The burden of proof lies with the smaller number. More Gaussians seldom harm, since their width is bounded, and the full
map, of twice the data, gains where the halves no longer do. Gains that chance or rounding could reverse are common,
losses beyond chance are not: so threads, machines and half-sets agree on the course.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from emsplat.errors import InputError
from emsplat.fitting.checkpoint import load_states, save_states, spread_state
from emsplat.fitting.growth import grow
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective
from emsplat.imaging.project import voxelize
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.models.gaussians import GaussianField
from emsplat.parallel import ALONE, World
from emsplat.process import side_by_side

_COARSE = 0.25  # of the epochs of the first stage
_FIRST = 2 / 3  # of the epochs where stages follow: what is to be split need not have converged
_LATER = 0.5  # of the epochs, and of the rate: later stages start from a model that is nearly right
_SURE = 3.0  # standard errors by which a stage must have lost to be taken back
_HARM = 2e-3  # the least loss of score that matters
_PAIRED = 512  # voxels across up to which fits take steps side by side: wider ones would need a third more memory


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
    without the optimiser's memory. It is fitted by one process, ``rank`` (modulo their number)."""

    def __init__(self, name: str, objective: VolumeObjective, model: GaussianField, rank: int = 0) -> None:
        self.name, self.objective, self.rank = name, objective, rank
        self.state = self.kept = State.begin(model)

    def is_of(self, world: World) -> bool:
        """Whether this process fits it."""
        return self.rank % world.size == world.rank

    def spread(self, world: World) -> None:
        """What the process that fits it has, in all of them."""
        self.state = spread_state(self.state, world, self.rank % world.size, self.objective.device)

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
    fits: Sequence[VolumeFit],
    plan: Plan,
    growth: int,
    judge: CrossValidation | None,
    before: Sequence[Stage] = (),
    world: World = ALONE,
) -> Iterator[VolumeFit | Score | Stage]:
    """Fits in step on a course that the judge decides. Yields what happens: every fit after each step, the score
    after each epoch that was judged, each stage at its end, also that which is taken back.

    ``before`` are the stages that an interrupted course has behind it, when the fits are as they were left. Processes
    of a ``world`` take a fit each, have all of them at the end of an epoch, and hear from the first what the judge
    says.

    A first stage of ``plan``, then up to ``growth`` stages with half as many Gaussians more and half the rate. One that
    lowers the score by more than three of its standard errors and 0.002 is taken back and is the last. A judge is for
    two halves; without one there is one stage.
    """
    if before and not before[-1].kept:
        return
    planned = stage_epochs(plan.epochs, growth if judge is not None else 0)
    for number, epochs in enumerate(planned[len(before) :], len(before)):
        score = None
        for epoch in _epochs(fits, plan, epochs, world):
            yield from epoch
            if judge is not None and _can_be_judged(fits[-1]):
                (value,) = _first_says(world, partial(_score, judge, fits))
                score = Score(_epoch(fits[-1].state), _gaussians(fits), value)
                yield score
        stage = Stage(_gaussians(fits), epochs, None if score is None else score.value)
        if number and score is not None and judge is not None:
            gain, error = _first_says(world, partial(_gain, judge, fits))
            stage = replace(stage, gain=gain, gain_error=error, kept=is_kept(gain, error))
        yield stage
        if not stage.kept:
            return
        for one in fits:
            one.keep()


def follow_course(fits: Sequence[VolumeFit], plan: Plan, stages: Sequence[Stage]) -> Iterator[VolumeFit]:
    """Fits in step through the stages that a course has kept, from wherever they were left; yields every fit after each
    step."""
    done = 0
    for stage in stages:
        done += stage.epochs if stage.kept else 0
        if stage.kept and _epoch(fits[0].kept) < done:
            for epoch in _epochs(fits, plan, stage.epochs, ALONE):
                yield from epoch
            for one in fits:
                one.keep()


def is_kept(gain: float, error: float) -> bool:
    """Whether what was added stays: unless the score has fallen by more than could be chance."""
    return gain >= -max(_SURE * error, _HARM)


def _epochs(fits: Sequence[VolumeFit], plan: Plan, epochs: int, world: World) -> Iterator[Iterator[VolumeFit]]:
    """A stage from what is kept, grown where that is not the start, or from where it was left; an iterator of steps for
    each epoch that is not yet at its end, and one without any where an interrupted stage stands at one."""
    before, step = _epoch(fits[0].kept), fits[0].state.step
    begun = step > fits[0].kept.step
    if before and not begun:
        for one in fits:
            if one.is_of(world):
                one.grow()
            else:
                one.state = State.begin(one.kept.model, one.kept.step)
    part = Plan(epochs, plan.learning_rate * (_LATER if before else 1.0), plan.decay, first=before)
    running = {one.name: fit(one.state, one.objective, part) for one in fits if one.is_of(world)}
    # The end of an epoch at which an interrupted run stands has not been judged.
    here = -(-step // VolumeObjective.steps_per_epoch) if begun else before + 1
    for epoch in range(here, before + epochs + 1):
        yield _steps(fits, running, epoch * VolumeObjective.steps_per_epoch, world)


def _steps(
    fits: Sequence[VolumeFit], running: dict[str, Iterator[State[GaussianField]]], last: int, world: World
) -> Iterator[VolumeFit]:
    """Every fit in step until it stands at the ``last``."""
    objective = fits[0].objective
    paired = objective.device.type == "cpu" and objective.support <= _PAIRED
    with side_by_side(len(running) if paired else 1) as all_of:
        while fits[0].state.step < last:
            moved = dict(zip(running, all_of(next, running.values()), strict=True))
            for one in fits:
                one.state = moved.get(one.name) or replace(one.state, step=one.state.step + 1)
            _tell_losses(fits, world)
            yield from fits
    for one in fits:
        one.spread(world)


def _tell_losses(fits: Sequence[VolumeFit], world: World) -> None:
    if world.size == 1:
        return
    own = [float(one.state.terms["loss"]) if one.is_of(world) else 0.0 for one in fits]
    losses = torch.tensor(own, dtype=torch.float64)
    world.sum_(losses)
    for one, loss in zip(fits, losses, strict=True):
        if not one.is_of(world):
            one.state = replace(one.state, terms={"loss": loss.float()})


def _score(judge: CrossValidation, fits: Sequence[VolumeFit]) -> tuple[float]:
    return (judge.score(_volumes(fits)),)


def _gain(judge: CrossValidation, fits: Sequence[VolumeFit]) -> tuple[float, float]:
    return judge.gain(_volumes(fits, kept=True), _volumes(fits))


def _first_says(world: World, value: Callable[[], tuple[float, ...]]) -> list[float]:
    """Numbers on which something is decided, as the first process finds them."""
    said: list[float] = json.loads(world.told(json.dumps(value()) if world.first else ""))
    return said


def save_course(path: Path, fits: Sequence[VolumeFit], stages: Sequence[Stage]) -> None:
    """All that an interrupted course needs to go on from here to the same end, bit for bit.

    Raises:
        EmsplatError: a fit has diverged.
    """
    states = {f"{one.name}.last": one.state for one in fits} | {f"{one.name}.kept": one.kept for one in fits}
    save_states(path, states, {"stages": [asdict(stage) for stage in stages]})


def load_course(path: Path, fits: Sequence[VolumeFit]) -> list[Stage]:
    """Brings fits to where `save_course` found them, and returns the stages that they have behind them.

    Raises:
        InputError: not a course of these fits, or damaged.
    """
    states, about = load_states(path, fits[0].objective.device)
    try:
        for one in fits:
            one.state, one.kept = states[f"{one.name}.last"], states[f"{one.name}.kept"]
        return [Stage(**stage) for stage in about["stages"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not the course of these fits ({error}); remove it, the fits begin anew") from error


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
    first, second = (voxelize((one.kept if kept else one.state).model.gaussians(), one.objective.box) for one in fits)
    return first, second
