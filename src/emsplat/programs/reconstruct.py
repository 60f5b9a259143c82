"""The programmes: particles in; half maps, a full map, their FSC and a run folder out.

`backproject` stops at the classical maps. `reconstruct` goes on from them to Gaussians, fitted to the accumulated sums
(engine one-pass) or to the images themselves (engine images). Half 1, half 2 and the full set are fits of one function
on three subsets of the particles. A fit sees nothing but its own subset: start, noise spectrum and grey scale come from
the same images that it is fitted to. What the halves share is written in `emsplat.one_pass`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emsplat import __version__
from emsplat.assessment.residuals import write_residuals
from emsplat.config import InputConfig, ReconstructConfig
from emsplat.device import (
    within_memory,
)
from emsplat.fitting.course import Stage
from emsplat.imaging.project import voxelize
from emsplat.io.mrc import write_map
from emsplat.io.ply import write_ply
from emsplat.models.gaussians import GaussianField
from emsplat.process import threads
from emsplat.programs.classical import accumulate_all, ssnr_prior
from emsplat.programs.finish import finish, found_finished
from emsplat.programs.image_engine import batch_before, fit_images, with_batch
from emsplat.programs.opening import introduce_fit, open_run
from emsplat.programs.settings import settings_of
from emsplat.programs.volume_engine import fit_volumes
from emsplat.run.files import CONVERGENCE, HALVES, backprojection_name, map_name, model_name
from emsplat.run.folder import plain
from emsplat.run.history import History
from emsplat.run.log import Log
from emsplat.types import Grid


@within_memory()
def backproject(config: InputConfig, particles: Path, output: Path, log: Log | None = None) -> dict[str, Any]:
    """Classical half maps and a full map regularised by their SSNR, into ``output``; returns summary.json.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the sums so far.
    """
    log = log or Log()
    if (finished := found_finished(config, particles, output, log)) is not None:
        return finished
    with threads(config.threads):
        return _backproject(config, particles, output, log)


def _backproject(config: InputConfig, particles: Path, output: Path, log: Log) -> dict[str, Any]:
    stack, skipped, symmetry = open_run(config, particles, output, log, {}, several_grids=True)
    with log.part("accumulation"):
        classical = accumulate_all(stack, config, output, log)
    grid = stack.grid
    maps = {name: classical.raw[name] for name in HALVES}
    maps["class001"] = classical.equations["class001"].solve(ssnr_prior(classical.validation.raw).to(stack.device))
    for name, volume in maps.items():
        write_map(output / map_name(name), volume, grid.pixel_size)
    return finish(log, output, stack, particles, skipped, symmetry, config, {}, classical, {}, [], [])


@within_memory()
def reconstruct(
    config: ReconstructConfig, particles: Path, output: Path, log: Log | None = None, altered: str | None = None
) -> dict[str, Any]:
    """Runs a whole reconstruction into ``output`` and returns what was written to summary.json.

    ``altered`` is what a null test did to the particles, for the words of the report.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the checkpoint.
    """
    log = log or Log()
    if (finished := found_finished(config, particles, output, log)) is not None:
        return finished
    with threads(config.threads):
        return _reconstruct(config, particles, output, log, altered)


def _reconstruct(
    config: ReconstructConfig, particles: Path, output: Path, log: Log, altered: str | None
) -> dict[str, Any]:
    settings = settings_of(config)
    if config.resume and settings.batch == "auto":
        settings = replace(settings, batch=batch_before(output))
    one_pass = settings.engine == "one-pass"
    stack, skipped, symmetry = open_run(config, particles, output, log, plain(settings), several_grids=one_pass)
    introduce_fit(log, settings)
    with log.part("accumulation"):
        classical = accumulate_all(stack, config, output, log)
    history = History(output / CONVERGENCE)
    stages: list[Stage] = []
    with log.part("fits"):
        if one_pass:
            models, fits = fit_volumes(stack, classical, settings, stages, output, history, log)
        else:
            settings = with_batch(stack, classical, settings, config, particles, output, log)
            models, fits = {}, {}
            for name in (*HALVES, "class001"):
                subset = stack.only(HALVES[name]) if name in HALVES else stack
                models[name], fits[name] = fit_images(
                    name, subset, classical.equations[name], classical.raw[name], settings, config, output, history, log
                )
    for name, model in models.items():
        _write_model(output, name, model, stack.grid)
    for name, volume in classical.raw.items():
        write_map(output / backprojection_name(name), volume, stack.grid.pixel_size)
    with log.part("residuals", "comparing projections with images of the other half"), torch.no_grad():
        examples = write_residuals(stack, {number: models[name].gaussians() for name, number in HALVES.items()}, output)
    return finish(
        log,
        output,
        stack,
        particles,
        skipped,
        symmetry,
        config,
        plain(settings),
        classical,
        fits,
        stages,
        examples,
        altered,
    )


def _write_model(output: Path, name: str, model: GaussianField, grid: Grid) -> None:
    with torch.no_grad():
        gaussians = model.gaussians()
        write_map(output / map_name(name), voxelize(gaussians, grid), grid.pixel_size)
        write_ply(
            output / model_name(name),
            gaussians.mean.cpu(),
            model.scales().cpu(),
            model.quaternion.cpu(),
            gaussians.amplitude.cpu(),
            grid,
            f"emsplat {__version__}",
        )
