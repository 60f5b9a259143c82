"""The programmes: particles in; half maps, a full map, their FSC and a run folder out.

`backproject` stops at the classical maps. `reconstruct` goes on from them to Gaussians, fitted to the accumulated sums
(engine one-pass) or to the images themselves (engine images). Half 1, half 2 and the full set are fits of one function
on three subsets of the particles. A fit sees nothing but its own subset: start, noise spectrum and grey scale come from
the same images that it is fitted to. What the halves share is written in `emsplat.fitting.course`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emsplat import __version__
from emsplat.assessment.residuals import write_residuals
from emsplat.config import BackprojectConfig, ReconstructConfig, RunConfig
from emsplat.device import within_memory
from emsplat.fitting.residual import map_of
from emsplat.io.mrc import write_map
from emsplat.io.ply import write_ply
from emsplat.parallel import ALONE, World
from emsplat.process import threads
from emsplat.programs.classical import Classical, accumulate_all
from emsplat.programs.finish import finish, found_finished
from emsplat.programs.image_engine import batch_before, fit_images, with_batch
from emsplat.programs.opening import introduce_fit, open_run
from emsplat.programs.run import Fits, Fitted, Run
from emsplat.programs.settings import Settings, settings_of
from emsplat.programs.volume_engine import fit_volumes
from emsplat.run.files import HALVES, SAMPLING, backprojection_name, map_name, model_name
from emsplat.run.log import Log


@within_memory()
def backproject(
    config: BackprojectConfig, particles: Path, output: Path, log: Log | None = None, world: World = ALONE
) -> dict[str, Any]:
    """Classical half maps and a full map regularised by their SSNR, into ``output``; returns summary.json. Processes of
    a ``world`` share the particles out; the first writes, and the others return nothing once their part is done.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the sums so far.
    """
    log = log or Log()
    if (finished := found_finished(config, particles, output, log, world)) is not None:
        return finished
    with threads(config.run.threads), log.to_the_end(config.run.profile):
        run = open_run(config, particles, output, log, program="backproject", world=world)
        coverage = write_classical(run, accumulate_all(run))
        return finish(run, coverage) if world.first else {}


@within_memory()
def reconstruct(
    config: ReconstructConfig,
    particles: Path,
    output: Path,
    log: Log | None = None,
    altered: str | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Runs a whole reconstruction into ``output`` and returns what was written to summary.json.

    Processes of a ``world`` share the work out; the first writes, the others return nothing once their part is done.

    ``altered`` is what a null test did to the particles, for the words of the report.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the checkpoint.
    """
    log = log or Log()
    if (finished := found_finished(config, particles, output, log, world)) is not None:
        return finished
    with threads(config.run.threads), log.to_the_end(config.run.profile):
        settings = _settled(config, output, world)
        run = open_run(config, particles, output, log, settings, world=world)
        introduce_fit(log, settings)
        fits, coverage = _fit(run, settings)
        return finish(run, coverage, compared_with_images(run, fits), altered) if world.first else {}


def _fit(run: Run[ReconstructConfig], settings: Settings) -> tuple[Fits, float]:
    """The fits, their maps written, and the coverage of the sums beneath them."""
    classical = accumulate_all(run)
    if settings.engine == "one-pass":
        fits = fit_volumes(run, settings, classical)
    else:
        fits = fit_images(run, with_batch(run, settings, classical), classical)
    return fits, write_fits(run, fits, classical)


def _settled(config: ReconstructConfig, output: Path, world: World) -> Settings:
    """What the options come to; a run that is resumed keeps the batch that it has found."""
    settings = settings_of(config)
    return (
        replace(settings, batch=batch_before(output, world))
        if config.run.resume and settings.batch == "auto"
        else settings
    )


def write_classical(run: Run[RunConfig], classical: Classical) -> float:
    """Classical maps of the halves and of all as those of the run, in its first process; returns their coverage."""
    classical.equations.clear()
    if not run.world.first:
        return classical.coverage
    maps = {name: classical.raw[name] for name in HALVES} | {"class001": classical.regularised()}
    for name, volume in maps.items():
        write_map(run.folder / map_name(name), volume, run.stack.grid.pixel_size)
    return _write_sampling(run, classical)


def _write_sampling(run: Run[RunConfig], classical: Classical) -> float:
    write_map(run.folder / SAMPLING, classical.all_particles.sampling(), run.stack.grid.pixel_size)
    return classical.coverage


def write_fits(run: Run[ReconstructConfig], fits: Fits, classical: Classical) -> float:
    """The maps and Gaussians of all fits, and the classical maps beneath them, in the first process; returns the
    coverage of the sums."""
    classical.equations.clear()
    if not run.world.first:
        return classical.coverage
    for name, fitted in fits.by_name.items():
        _write_fit(run, name, fitted)
    for name, volume in classical.raw.items():
        write_map(run.folder / backprojection_name(name), volume, run.stack.grid.pixel_size)
    return _write_sampling(run, classical)


@torch.no_grad()
def _write_fit(run: Run[ReconstructConfig], name: str, fitted: Fitted) -> None:
    grid, model = run.stack.grid, fitted.model
    gaussians = model.gaussians()
    write_map(run.folder / map_name(name), map_of(gaussians, grid, fitted.residual), grid.pixel_size)
    write_ply(
        run.folder / model_name(name),
        gaussians.mean.cpu(),
        model.scales().cpu(),
        model.quaternion.cpu(),
        gaussians.amplitude.cpu(),
        grid,
        f"emsplat {__version__}",
    )


@torch.no_grad()
def compared_with_images(run: Run[ReconstructConfig], fits: Fits) -> Fits:
    """The fits with examples of particles beside their projections; writes what the images leave unexplained."""
    with run.log.part("residuals", "comparing projections with images of the other half"):
        of_halves = {number: fits.by_name[name].model.gaussians() for name, number in HALVES.items()}
        own = run.stack.here()
        return replace(fits, examples=tuple(write_residuals(own, of_halves, run.folder)) if len(own) else ())
