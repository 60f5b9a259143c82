"""The image engine: one fit after the other, in mini-batches."""

from __future__ import annotations

import math
import time
import tomllib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.config import RECIPES, ReconstructConfig
from emsplat.device import (
    fits_memory,
)
from emsplat.errors import InputError
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint
from emsplat.fitting.growth import fit_doubling
from emsplat.fitting.images import ImageObjective
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective, support_size
from emsplat.models.gaussians import GaussianField
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.programs.begin import start_model
from emsplat.programs.classical import Classical
from emsplat.programs.opening import write_config
from emsplat.programs.settings import Settings
from emsplat.run.files import SETTINGS, checkpoint_name, state_name
from emsplat.run.folder import plain
from emsplat.run.history import History
from emsplat.run.log import Log
from emsplat.run.stop import interruptible
from emsplat.sums.equations import NormalEquations


def batch_before(output: Path) -> int | Literal["auto"]:
    """The batch that an interrupted run with ``--batch auto`` found."""
    try:
        batch = tomllib.loads((output / SETTINGS).read_text(encoding="utf-8"))["settings"]["batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"  # whether there is a run to resume is asked later
    return batch if isinstance(batch, int) and batch > 0 else "auto"


def with_batch(
    stack: ParticleStack,
    classical: Classical,
    settings: Settings,
    config: ReconstructConfig,
    particles: Path,
    output: Path,
    log: Log,
) -> Settings:
    """The settings with a batch that fits the memory of the device, written down for a run that is resumed.

    Raises:
        InputError: the batch that was asked for does not fit, or no batch at all.
    """
    wanted = settings.batch
    if wanted != "auto" and config.batch == "auto":
        return settings  # found before the run was interrupted
    basis = "images" if config.recipe == "default" else config.recipe
    size = most = RECIPES[basis].batch or 1 if wanted == "auto" else wanted
    if stack.device.type != "cpu":
        model = start_model(classical.raw["class001"], stack.grid, settings, stack.grid.pixel_size).to(stack.device)
        for _ in settings.split_after:
            model = model.split()
        noise = None if settings.weighting == "none" else estimate_noise(stack)

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
    if wanted != "auto" and size < most:
        raise InputError(
            f"--batch {most}: does not fit the memory of the GPU; {size} would, give --batch {size} or --batch auto"
        )
    if wanted == "auto":
        log.line(f"batches of {size} images" + (f", since {2 * size} do not fit the memory" if size < most else ""))
        settings = replace(settings, batch=size)
        write_config(config, particles, output, plain(settings))
    return settings


def fit_images(
    name: str,
    stack: ParticleStack,
    equations: NormalEquations,
    raw: Float[Tensor, "z y x"],
    settings: Settings,
    config: ReconstructConfig,
    output: Path,
    history: History,
    log: Log,
) -> tuple[GaussianField, dict[str, Any]]:
    """The image-domain engine: one fit, from the checkpoint if there is one; the model and what is to be reported."""
    start = time.monotonic()
    grid = stack.grid
    finished, checkpoint = output / state_name(name), output / checkpoint_name(name)
    noise = None if settings.weighting == "none" else estimate_noise(stack)
    if noise is not None and settings.weighting == "ramp":
        noise = noise / ramp(grid.size).to(noise.device)
    assert settings.batch != "auto"  # noqa: S101 (`with_batch`)
    objective = ImageObjective(stack, batch=settings.batch, seed=settings.seed, noise=noise)
    plan = Plan(settings.epochs, settings.learning_rate, settings.decay)
    total = plan.epochs * len(stack)
    saved = next((path for path in (finished, checkpoint) if config.resume and path.is_file()), None)
    if saved is not None:
        state = load_checkpoint(saved, stack.device)
        where = "finished before" if saved == finished else f"goes on after step {state.step:,}"
        log.line(f"resuming {name}: {where}")
        history.rewind(name, state.step)
    else:
        history.rewind(name, 0)
        model = start_model(raw, grid, settings, grid.pixel_size, name).to(stack.device)
        whole = VolumeObjective(equations, support_size(grid.size, grid.size))
        state = State.begin(model.with_unit(whole.best_gain(model)))
    start_state, first = state, state.step
    with log.progress(name, total, _images_seen(first, objective)) as update, interruptible() as stop:
        last_save = time.monotonic()
        for state in fit_doubling(start_state, objective, plan, settings.split_after):
            seen = _images_seen(state.step, objective)
            history.add(name, state.step, state.terms["loss"], objective.steps_per_epoch, seen)
            update(seen, f"epoch {math.ceil(state.step / objective.steps_per_epoch)}{history.loss}")
            if stop or time.monotonic() - last_save > config.checkpoint_every:
                save_checkpoint(checkpoint, state)
                history.write()
                last_save = time.monotonic()
            if stop:
                raise stop.interruption(f"stopped in {name} at step {state.step}; go on with --resume")
    save_checkpoint(finished, state)
    history.write()
    checkpoint.unlink(missing_ok=True)
    seconds = time.monotonic() - start
    rate = (total - _images_seen(first, objective)) / max(seconds, 1e-9)
    log.line(f"{name}: {len(stack):,} particles, {len(state.model):,} Gaussians, {seconds:.0f} s, {rate:,.0f} images/s")
    about = {
        "particles": len(stack),
        "gaussians": len(state.model),
        "steps": state.step,
        "loss": history.recent,
        "seconds": round(seconds, 1),
        "images_per_second": round(rate),
    }
    return state.model, about


def _images_seen(step: int, objective: ImageObjective) -> int:
    epoch, position = divmod(step, objective.steps_per_epoch)
    return epoch * len(objective.stack) + min(position * objective.batch, len(objective.stack))


def ramp(size: int) -> Float[Tensor, " s"]:
    """|k| relative to Nyquist per shell. Slices through the origin sample a map with density 1/|k|: this evens it out,
    so that fine detail converges at the pace of the coarse."""
    shells = torch.arange(size // 2 + 1)
    return shells.clamp(min=1) / (size // 2)
