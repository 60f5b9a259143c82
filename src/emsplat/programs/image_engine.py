"""The image engine: one fit after the other, in mini-batches."""

from __future__ import annotations

import json
import math
import time
import tomllib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.config import ReconstructConfig
from emsplat.device import fits_memory
from emsplat.errors import InputError
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint, spread_state
from emsplat.fitting.growth import fit_doubling
from emsplat.fitting.images import ImageObjective
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective, support_size
from emsplat.imaging.project import voxelize
from emsplat.models.gaussians import GaussianField
from emsplat.parallel import ALONE, World
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.programs.begin import start_model
from emsplat.programs.classical import Classical
from emsplat.programs.opening import write_config
from emsplat.programs.run import Fits, Fitted, Run
from emsplat.programs.settings import Settings, recipe_of
from emsplat.programs.shown import show_slices
from emsplat.run.files import HALVES, SETTINGS, checkpoint_name, state_name
from emsplat.run.history import History, write_tables
from emsplat.run.stop import checkpoints


def batch_before(output: Path, world: World = ALONE) -> int | Literal["auto"]:
    """The batch that an interrupted run with ``--batch auto`` found."""
    batch = json.loads(world.told(json.dumps(_batch_in(output)) if world.first else ""))
    return batch if isinstance(batch, int) else "auto"


def _batch_in(output: Path) -> int | Literal["auto"]:
    try:
        batch = tomllib.loads((output / SETTINGS).read_text(encoding="utf-8"))["settings"]["batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"  # whether there is a run to resume is asked later
    return batch if isinstance(batch, int) and batch > 0 else "auto"


def with_batch(run: Run[ReconstructConfig], settings: Settings, classical: Classical) -> Settings:
    """The settings with a batch that fits the memory of the device, written down for a run that is resumed.

    Raises:
        InputError: the batch that was asked for does not fit, or no batch at all.
    """
    wanted = settings.batch
    if wanted != "auto" and run.config.fit.batch == "auto":
        return settings  # found before the run was interrupted
    recipe = recipe_of(run.config.fit).batch
    most = wanted if wanted != "auto" else recipe if recipe != "auto" else 1
    size = most if run.stack.device.type == "cpu" else _batch_that_fits(run.stack, settings, classical, most)
    size = -run.world.turns(-size)  # of all processes the smallest
    if wanted != "auto" and size < most:
        raise InputError(
            f"--batch {most}: does not fit the memory of the GPU; {size} would, give --batch {size} or --batch auto"
        )
    if wanted == "auto":
        found = f", since {2 * size} do not fit the memory" if size < most else ""
        run.log.line(f"batches of {size} images{found}")
        settings = replace(settings, batch=size)
        if run.world.first:
            write_config(run, settings)
    return settings


def _batch_that_fits(stack: ParticleStack, settings: Settings, classical: Classical, most: int) -> int:
    """The largest of ``most``, half of it and so on with which two steps of the largest model fit the memory.

    Raises:
        InputError: not even one image fits.
    """
    model = start_model(classical.raw["class001"], stack.grid, settings, stack.grid.pixel_size).to(stack.device)
    for _ in settings.split_after:
        model = model.split()
    noise = None if settings.weighting == "none" else estimate_noise(stack)
    size = most

    def trial() -> None:
        objective = ImageObjective(stack, batch=size, seed=settings.seed, noise=noise)
        for _ in islice(fit(State.begin(model.copy()), objective, Plan(2, 0.0, 1.0)), 2):
            pass

    while not fits_memory(trial):
        if size == 1:
            raise InputError(
                f"not even one image of {stack.grid.size} px fits the memory of the GPU beside {len(model):,} "
                "Gaussians; take coarser pixels with --box, fewer --gaussians, or --device cpu"
            )
        size //= 2
    return size


def fit_images(run: Run[ReconstructConfig], settings: Settings, classical: Classical) -> Fits:
    """The image-domain engine: one fit after the other, each from its checkpoint where there is one. Several processes
    share each mini-batch out.

    Raises:
        EmsplatError: a fit diverged.
        Interrupted: asked to stop; a checkpoint is written.
    """
    with run.log.part("fits"):
        return Fits(settings, {name: _fit(run, settings, classical, name) for name in (*HALVES, "class001")})


def _fit(run: Run[ReconstructConfig], settings: Settings, classical: Classical, name: str) -> Fitted:
    """One fit, from the checkpoint if there is one, to its end."""
    start = time.monotonic()
    stack = run.stack.only(HALVES[name]) if name in HALVES else run.stack
    objective = _objective(stack, settings, run.world)
    state = _saved(run, name) or _begin(name, objective, settings, classical, run.world)
    history = History(run.log.journal, name)
    history.rewind(state.step)
    before = _images_seen(state.step, objective)
    finished, checkpoint = _files(run, name)
    state = _trained(run, settings, objective, state, history)
    if run.world.first:
        save_checkpoint(finished, state)
        write_tables(run.folder)
        checkpoint.unlink(missing_ok=True)
    seconds, count = time.monotonic() - start, len(state.model)
    rate = (settings.epochs * len(stack) - before) / max(seconds, 1e-9)
    run.log.line(f"{name}: {len(stack):,} particles, {count:,} Gaussians, {seconds:.0f} s, {rate:,.0f} images/s")
    about = {
        "particles": len(stack),
        "gaussians": count,
        "steps": state.step,
        "loss": history.recent,
        "seconds": round(seconds, 1),
        "images_per_second": round(rate),
    }
    return Fitted(state.model, about)


def _objective(stack: ParticleStack, settings: Settings, world: World) -> ImageObjective:
    noise = None if settings.weighting == "none" else estimate_noise(stack)
    if noise is not None and settings.weighting == "ramp":
        noise = noise / ramp(stack.grid.size).to(noise.device)
    assert settings.batch != "auto"  # noqa: S101 (`with_batch`)
    return ImageObjective(stack, batch=settings.batch, seed=settings.seed, noise=noise, world=world)


def _files(run: Run[ReconstructConfig], name: str) -> tuple[Path, Path]:
    """Where the state of a fit is kept: at its end, and on the way."""
    return run.folder / state_name(name), run.folder / checkpoint_name(name)


def _saved(run: Run[ReconstructConfig], name: str) -> State[GaussianField] | None:
    """Where an interrupted run left a fit, if it is to be resumed."""
    finished, checkpoint = _files(run, name)
    mine = (finished, checkpoint) if run.world.first and run.config.run.resume else ()
    saved = next((path for path in mine if path.is_file()), None)
    if not run.world.agree(saved is not None):
        return None
    state: State[GaussianField] | None = None
    if saved is not None:
        state = load_checkpoint(saved, run.stack.device)
        where = "finished before" if saved == finished else f"goes on after step {state.step:,}"
        run.log.line(f"resuming {name}: {where}")
    return spread_state(state, run.world, device=run.stack.device)


def _begin(
    name: str, objective: ImageObjective, settings: Settings, classical: Classical, world: World
) -> State[GaussianField]:
    """The start, as bright as fits the sums of all its images."""
    grid = objective.stack.grid
    model = start_model(classical.raw[name], grid, settings, grid.pixel_size, name)
    equations = classical.equations[name] if name in HALVES else classical.whole()
    model = model.to(equations.linear.device)
    whole = VolumeObjective(equations, support_size(grid.size, grid.size))
    start = State.begin(model.with_unit(whole.best_gain(model)))
    return spread_state(start, world, device=model.mean.device)


def _trained(
    run: Run[ReconstructConfig],
    settings: Settings,
    objective: ImageObjective,
    state: State[GaussianField],
    history: History,
) -> State[GaussianField]:
    """The state at the end of the plan, with checkpoints on the way."""
    name, steps = history.name, objective.steps_per_epoch
    plan = Plan(settings.epochs, settings.learning_rate, settings.decay)
    total, before = settings.epochs * len(objective.stack), _images_seen(state.step, objective)
    options, fitted = run.config.run, fit_doubling(state, objective, plan, settings.split_after, run.world)
    with (
        run.log.progress(name, total, before) as update,
        checkpoints(options.checkpoint_every, run.world, options.time_limit) as moment,
    ):
        for state in fitted:
            seen = _images_seen(state.step, objective)
            history.add(state.step, state.terms["loss"], steps, seen)
            update(seen, f"epoch {math.ceil(state.step / steps)}{history.loss}")
            if moment.due():
                if run.world.first:
                    save_checkpoint(_files(run, name)[1], state)
                    write_tables(run.folder)
                    with torch.no_grad():
                        volume = voxelize(state.model.gaussians(), run.stack.grid)
                    show_slices(run.folder, {name: volume}, run.stack.grid)
                moment.saved(f"in {name} at step {state.step}; go on with --resume")
    return state


def _images_seen(step: int, objective: ImageObjective) -> int:
    epoch, position = divmod(step, objective.steps_per_epoch)
    return epoch * len(objective.stack) + min(position * objective.batch, len(objective.stack))


def ramp(size: int) -> Float[Tensor, " s"]:
    """|k| relative to Nyquist per shell. Slices through the origin sample a map with density 1/|k|: this evens it out,
    so that fine detail converges at the pace of the coarse."""
    shells = torch.arange(size // 2 + 1)
    return shells.clamp(min=1) / (size // 2)
