"""The one-pass engine: both halves in step, then all particles."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from emsplat.config import ReconstructConfig
from emsplat.fitting.checkpoint import save_checkpoint, spread_state
from emsplat.fitting.course import (
    Score,
    Stage,
    VolumeFit,
    coarse_steps,
    find_course,
    follow_course,
    is_kept,
    load_course,
    save_course,
    stage_epochs,
)
from emsplat.fitting.residual import map_of, residual_maps
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective, support_of
from emsplat.imaging.project import voxelize
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.parallel import ALONE, World
from emsplat.programs.begin import FINEST_DETAIL, start_model
from emsplat.programs.classical import Classical
from emsplat.programs.run import Fits, Fitted, Run
from emsplat.programs.settings import Settings
from emsplat.programs.shown import note_curve, show_slices
from emsplat.run.files import HALVES, course_name, state_name
from emsplat.run.history import History, write_tables
from emsplat.run.journal import Judged, Scored
from emsplat.run.log import Log
from emsplat.run.pace import Paced
from emsplat.run.stop import checkpoints

_SHOWN_EVERY = 5.0  # seconds between slices of maps on their way


def fit_volumes(run: Run[ReconstructConfig], settings: Settings, classical: Classical) -> Fits:
    """The one-pass engine: both halves in step, then all particles on the course that the halves found; each from where
    an interrupted run left it. Of several processes two take a half each, and the first takes all particles.

    Raises:
        EmsplatError: a fit diverged.
        Interrupted: asked to stop; the course so far is written.
    """
    judge, world = _judge(settings, classical), run.world
    growth = settings.growth if judge is not None else 0
    planned = stage_epochs(settings.epochs, growth)
    plan = Plan(settings.epochs, settings.learning_rate, settings.decay)
    with run.log.part("fits"):
        with run.log.step("starts of half1 and half2"):
            objectives = _objectives(run, settings, classical)
            halves = [_begin(name, run, settings, classical, objectives[name], world) for name in HALVES]
        _announce(run, len(halves[0].kept.model), support_of(classical.mask), planned)
        before = _taken_up(run, halves, "halves", world)
        course = find_course(halves, plan, growth, judge, before, world)
        stages, fitted = _carry_out(run, halves, "halves", course, before, sum(planned), world, judge)
        if not world.first:
            return Fits(settings, fitted, tuple(stages))
        run.go_on_alone()
        with run.log.step("start of class001"):
            full = [_begin("class001", run, settings, classical, objectives["class001"], ALONE)]
        _taken_up(run, full, "class001", ALONE)
        kept = sum(stage.epochs for stage in stages if stage.kept)
        _, of_all = _carry_out(run, full, "class001", follow_course(full, plan, stages), [], kept, ALONE)
        write_tables(run.folder)
        _say_stages(stages, run.log)
        fits = Fits(settings, fitted | of_all, tuple(stages))
        if judge is None or not settings.residual:
            return fits
        with run.log.step("residual maps"):
            return _with_residuals(run, fits, objectives, classical.mask, judge)


def _with_residuals(
    run: Run[ReconstructConfig],
    fits: Fits,
    objectives: dict[str, VolumeObjective],
    mask: Tensor,
    judge: CrossValidation,
) -> Fits:
    """The fits with what both halves agree on beyond their Gaussians, unless the halves' maps get worse by it."""
    models = {name: fitted.model for name, fitted in fits.by_name.items()}
    finest = float(judge.defined.nonzero().max())
    residuals = residual_maps(objectives, models, mask.to(run.stack.device), finest, run.stack.symmetry.order)
    pairs = [
        tuple(map_of(models[name].gaussians(), run.stack.grid, own.get(name)) for name in HALVES)
        for own in ({}, residuals)
    ]
    (one, other), (first, second) = pairs
    gain, error = judge.gain((one, other), (first, second))
    kept = is_kept(gain, error)
    run.log.line(
        f"  residual maps, what both halves agree on beyond the Gaussians: gain {gain:.4f} ± {error:.4f}"
        + ("" if kept else " (worse: left out)")
    )
    if kept:
        fitted = {name: replace(own, residual=residuals[name].cpu()) for name, own in fits.by_name.items()}
        fits = replace(fits, by_name=fitted)
    return replace(fits, residual={"gain": gain, "gain_error": error, "kept": kept})


def _judge(settings: Settings, classical: Classical) -> CrossValidation | None:
    """What decides on the course, where the halves agree on anything and may pass something."""
    if settings.independent_halves or not classical.evident or not classical.validation.defined[1:].any():
        return None
    return classical.validation


def _objectives(run: Run[ReconstructConfig], settings: Settings, classical: Classical) -> dict[str, VolumeObjective]:
    """What is fitted to: of the halves, and of all particles in the process that takes them. The equations, which are
    larger than all of these in most boxes, are gone afterwards."""
    coarse = coarse_steps(settings.epochs) if run.stack.grid.size > 128 else 0
    support, equations = support_of(classical.mask), classical.equations
    made = {name: VolumeObjective(equations[name], support, coarse_steps=coarse) for name in HALVES}
    if run.world.first:
        made["class001"] = VolumeObjective(classical.whole(), support, coarse_steps=coarse)
    equations.clear()
    return made


def _begin(
    name: str,
    run: Run[ReconstructConfig],
    settings: Settings,
    classical: Classical,
    objective: VolumeObjective,
    world: World,
) -> VolumeFit:
    """A fit before its first step, as the first process begins it."""
    stack, grid = run.stack, run.stack.grid
    detail = grid.pixel_size
    if _judge(settings, classical) is not None and classical.resolution is not None:
        detail = max(detail, FINEST_DETAIL * classical.resolution)
    support = objective.support
    model = start_model(classical.raw[name], grid, settings, detail, name, support).to(stack.device)
    model = model.with_unit(objective.best_gain(model))
    model = spread_state(State.begin(model), world, device=stack.device).model
    return VolumeFit(name, objective, model, list(HALVES).index(name) if name in HALVES else 0)


def _taken_up(run: Run[ReconstructConfig], fits: list[VolumeFit], label: str, world: World) -> list[Stage]:
    """The stages that an interrupted run has behind it, the fits brought to where it left them."""
    path = run.folder / course_name(label)
    found = world.first and run.config.run.resume and path.is_file()
    if not world.agree(found):
        return []
    stages = load_course(path, fits) if found else []
    for one in fits:
        one.state = spread_state(one.state, world, device=run.stack.device)
        one.kept = spread_state(one.kept, world, device=run.stack.device)
    run.log.line(f"resuming {_label(fits)}: goes on after step {fits[0].state.step}")
    return [Stage(**stage) for stage in json.loads(world.told(json.dumps([asdict(stage) for stage in stages])))]


def _label(fits: list[VolumeFit]) -> str:
    return " and ".join(one.name for one in fits)


def _announce(run: Run[ReconstructConfig], count: int, support: int, planned: Sequence[int]) -> None:
    memory = 4 * (6 * run.stack.grid.size**3 + 5 * (3 * support // 2) ** 3 + 400 * count) / 2**20
    run.log.line(
        f"fits of {count:,} Gaussians in {support}³ voxels, at most {' + '.join(map(str, planned))} epochs of "
        f"{VolumeObjective.steps_per_epoch} steps; about {memory:,.0f} MB more"
    )


def _carry_out(
    run: Run[ReconstructConfig],
    fits: list[VolumeFit],
    name: str,
    course: Iterable[VolumeFit | Score | Stage],
    before: list[Stage],
    epochs: int,
    world: World,
    judge: CrossValidation | None = None,
) -> tuple[list[Stage], dict[str, Fitted]]:
    """Goes through a course of at most so many ``epochs``, from the stages ``before`` on: all its stages, and what the
    fits have become.

    Raises:
        Interrupted: asked to stop; the course so far is written.
    """
    start, journal, options = time.monotonic(), run.log.journal, run.config.run
    label, path = _label(fits), run.folder / course_name(name)
    total = epochs * VolumeObjective.steps_per_epoch * len(fits)
    begun = done = fits[0].state.step * len(fits)
    stages = list(before)
    showing = Paced(_SHOWN_EVERY)
    # An interrupted run may have come further; where it stands within a stage, the end of an epoch is judged once more.
    within = fits[0].state.step > fits[0].kept.step and not (stages and not stages[-1].kept)
    journal.rewind(label, fits[0].state.step - within)
    histories = {one.name: History(journal, one.name) for one in fits}
    for one in fits:
        histories[one.name].rewind(one.state.step)

    def save() -> None:
        for one in fits:
            one.spread(world)
        if world.first:
            save_course(path, fits, stages)

    with (
        run.log.step(label),
        run.log.progress(label, total, done, unit="steps") as update,
        checkpoints(options.checkpoint_every, world, options.time_limit) as moment,
    ):
        for happened in course:
            if isinstance(happened, VolumeFit):
                done += 1
                history = histories[happened.name]
                _add_loss(history, happened)
                update(done, f"{len(happened.state.model):,} Gaussians{history.loss}")
                if world.size == 1 and happened is fits[-1] and _is_epoch(happened) and showing.due():
                    with showing.doing():
                        _show(run, fits, judge)
                if happened is fits[-1] and moment.due():
                    save()
                    moment.saved(f"in {label} after step {happened.state.step}; go on with --resume")
            else:
                journal.add(_row(happened, label, fits[0].state.step))
                if isinstance(happened, Stage):
                    stages.append(happened)
                    if happened.kept and world.first:
                        _show(run, fits, judge)
    seconds = time.monotonic() - start
    save()  # for a run that is interrupted in what follows
    for one in fits:
        histories[one.name].rewind(one.kept.step)
        if world.first:
            save_checkpoint(run.folder / state_name(one.name), one.kept)
    run.log.line(f"{label}: {', '.join(f'{len(one.kept.model):,}' for one in fits)} Gaussians, {seconds:.1f} s")
    steps = (done - begun) / len(fits)
    return stages, {one.name: _fitted(one, seconds / len(fits), steps) for one in fits}


def _is_epoch(one: VolumeFit) -> bool:
    """Whether an epoch has ended that knows fine voxels."""
    step = one.state.step
    return step % VolumeObjective.steps_per_epoch == 0 and step >= one.objective.coarse_steps


@torch.no_grad()
def _show(run: Run[ReconstructConfig], fits: list[VolumeFit], judge: CrossValidation | None) -> None:
    """The maps so far, for those who watch."""
    grid = run.stack.grid
    maps = {one.name: voxelize(one.state.model.gaussians(), grid) for one in fits}
    if judge is not None:
        first, second = maps.values()
        label = " and ".join(maps)
        curve = judge.curve((first, second))
        note_curve(run.log.journal, label, fits[0].state.step, "cross_validated", curve, 0.5, grid)
    show_slices(run.folder, maps, grid)


def _add_loss(history: History, one: VolumeFit) -> None:
    """The loss of the last step."""
    history.add(one.state.step, one.state.terms["loss"], VolumeObjective.steps_per_epoch, one.objective.images)


def _row(happened: Score | Stage, fit: str, step: int) -> Scored | Judged:
    """What the journal says of it."""
    if isinstance(happened, Score):
        return Scored(fit, step, happened.epoch, happened.gaussians, happened.value)
    score, gain, error = (
        math.nan if value is None else value for value in (happened.score, happened.gain, happened.gain_error)
    )
    return Judged(fit, step, happened.gaussians, happened.epochs, score, gain, error, happened.kept)


def _fitted(one: VolumeFit, seconds: float, steps: float) -> Fitted:
    """``seconds`` were spent on this fit and its ``steps``, also on those of a stage that was taken back."""
    about = {
        "particles": one.objective.images,
        "gaussians": len(one.kept.model),
        "steps": one.kept.step,
        "loss": float(one.kept.terms["loss"]),
        "seconds": round(seconds, 1),
        "milliseconds_per_step": round(1000 * seconds / max(steps, 1), 1),
    }
    return Fitted(one.kept.model, about)


def _say_stages(stages: list[Stage], log: Log) -> None:
    for number, stage in enumerate(stages):
        log.line(
            f"  stage {number + 1}: {stage.gaussians:,} Gaussians, {stage.epochs} epochs"
            + ("" if stage.score is None else f", mean cross-validated FSC {stage.score:.4f}")
            + ("" if stage.gain is None else f", gain {stage.gain:.4f} ± {stage.gain_error:.4f}")
            + ("" if stage.kept else " (worse: taken back)")
        )
