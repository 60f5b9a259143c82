"""The one-pass engine: both halves in step, then all particles."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from emsplat.fitting.checkpoint import save_checkpoint
from emsplat.fitting.course import Stage, VolumeFit, coarse_steps, fit_course, stage_epochs
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective, support_size
from emsplat.io.files import number_text
from emsplat.models.gaussians import GaussianField
from emsplat.particles.stack import ParticleStack
from emsplat.programs.begin import FINEST_DETAIL, start_model
from emsplat.programs.classical import Classical
from emsplat.programs.settings import Settings
from emsplat.run.files import HALVES, SCORES, state_name
from emsplat.run.folder import write_text
from emsplat.run.history import History
from emsplat.run.log import Log
from emsplat.run.stop import interruptible


def fit_volumes(
    stack: ParticleStack,
    classical: Classical,
    settings: Settings,
    stages: list[Stage],
    output: Path,
    history: History,
    log: Log,
) -> tuple[dict[str, GaussianField], dict[str, Any]]:
    """The one-pass engine: both halves in step, then all particles on the course that the halves found (``stages``)."""
    grid = stack.grid
    shared = not settings.independent_halves
    judge = classical.validation if shared and classical.evident and classical.validation.defined[1:].any() else None
    detail = grid.pixel_size
    if judge is not None and classical.resolution is not None:
        detail = max(detail, FINEST_DETAIL * classical.resolution)
    support = _support(classical.mask, stack)
    coarse = coarse_steps(settings.epochs) if grid.size > 128 else 0
    plan = Plan(settings.epochs, settings.learning_rate, settings.decay)

    def begin_fit(name: str) -> VolumeFit:
        objective = VolumeObjective(classical.equations[name], support, coarse_steps=coarse)
        model = start_model(classical.raw[name], grid, settings, detail, name).to(stack.device)
        return VolumeFit(name, classical.equations[name], objective, model.with_unit(objective.best_gain(model)))

    halves = [begin_fit(name) for name in HALVES]
    memory = 4 * (6 * grid.size**3 + 5 * (3 * support // 2) ** 3 + 400 * len(halves[0].model)) / 2**20
    planned = " + ".join(map(str, stage_epochs(settings.epochs, settings.growth if judge is not None else 0)))
    log.line(
        f"fits of {len(halves[0].model):,} Gaussians in {support}³ voxels, at most {planned} epochs of "
        f"{VolumeObjective.steps_per_epoch} steps; about {memory:,.0f} MB more"
    )
    models: dict[str, GaussianField] = {}
    about: dict[str, Any] = {}
    for fits in (halves, None):
        fits = fits or [begin_fit("class001")]
        start = time.monotonic()
        label = " and ".join(one.name for one in fits)
        total = _course_steps(settings, stages) * len(fits)
        with log.progress(label, total, unit="steps") as update, interruptible() as stop:
            done = 0
            for one in fit_course(fits, plan, settings.growth, judge if len(fits) == 2 else None, stages):
                done += 1
                loss, steps = one.state.terms["loss"], VolumeObjective.steps_per_epoch
                history.add(one.name, one.state.step, loss, steps, one.equations.particles)
                update(min(done, total), f"{len(one.state.model):,} Gaussians{history.loss}")
                if stop:
                    raise stop.interruption(f"stopped in {label}; go on with --resume (the fits begin anew)")
        seconds = time.monotonic() - start
        for one in fits:
            history.rewind(one.name, one.state.step)
            models[one.name] = one.model
            save_checkpoint(output / state_name(one.name), State.begin(one.model, one.state.step))
            about[one.name] = {
                "particles": one.equations.particles,
                "gaussians": len(one.model),
                "steps": one.state.step,
                "loss": float(one.state.terms["loss"]),
                "seconds": round(seconds / len(fits), 1),
                "milliseconds_per_step": round(1000 * seconds / max(done, 1), 1),
            }
        log.line(f"{label}: {', '.join(f'{len(one.model):,}' for one in fits)} Gaussians, {seconds:.1f} s")
    history.write()
    _write_scores(output / SCORES, stages)
    for number, stage in enumerate(stages):
        log.line(
            f"  stage {number + 1}: {stage.gaussians:,} Gaussians, {stage.epochs} epochs"
            + ("" if stage.score is None else f", mean cross-validated FSC {stage.score:.4f}")
            + ("" if stage.gain is None else f", gain {stage.gain:.4f} ± {stage.gain_error:.4f}")
            + ("" if stage.kept else " (worse: taken back)")
        )
    return models, about


def _write_scores(path: Path, stages: list[Stage]) -> None:
    """The mean cross-validated FSC after each epoch that was judged: what the data of the other half say of the fit."""
    rows = [
        f"{epoch},{stage.gaussians},{number_text(score, '.6f')}\n" for stage in stages for epoch, score in stage.scores
    ]
    if rows:
        write_text(path, "".join(["epoch,gaussians,score\n", *rows]))


def _course_steps(settings: Settings, stages: list[Stage]) -> int:
    kept = [stage.epochs for stage in stages if stage.kept]
    epochs = sum(kept or stage_epochs(settings.epochs, settings.growth))
    return epochs * VolumeObjective.steps_per_epoch


def _support(mask: Tensor, stack: ParticleStack) -> int:
    """Voxels across that hold the mask, with a margin for the Gaussians' tails."""
    positions = (mask > 0.01).nonzero() - len(mask) // 2
    reach = int(positions.abs().max()) if len(positions) else len(mask) // 2
    return support_size(2 * reach + 4, stack.grid.size)
