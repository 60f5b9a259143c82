"""Particle images of an atomic model or of a procedural protein, with everything that is true of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import tomli_w
import torch

from emsplat import __version__
from emsplat.config import SimulateConfig
from emsplat.errors import InputError, OutputError
from emsplat.io.atoms import read_atoms
from emsplat.io.files import replacing
from emsplat.io.mrc import write_map, writing_stack
from emsplat.io.paths import Names
from emsplat.io.relion.write import write_particles_star
from emsplat.run.files import state_map_name
from emsplat.run.folder import plain
from emsplat.run.log import Log, counted
from emsplat.simulation.images import (
    chunks,
    clean_images,
    drawn_from,
    make_noise,
    make_scene,
    perturb_poses,
    random_halves,
    random_optics,
    random_poses,
    signal_variance,
    truth_maps,
)
from emsplat.simulation.protein import check_fits, place_states, procedural_protein
from emsplat.simulation.states import States, draw_contrast, draw_states, load_states, one_state
from emsplat.simulation.truth import TRUTH, remove_truth, write_truth
from emsplat.types import Grid


def _check_config(config: SimulateConfig) -> None:
    """Refuse settings that describe no experiment."""
    finite = ("pixel_size", "voltage", "cs", "shift", "defocus_min", "defocus_max", "defocus_spread", "astigmatism")
    for name in (*finite, "amplitude_contrast", "phase_shift", "b_factor", "pose_error"):
        if not math.isfinite(getattr(config, name)):
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected a finite number")
    for name in ("particles", "pixel_size", "snr", "voltage", "micrograph_particles"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected a number above 0")
    spread = config.heterogeneity.contrast_spread
    if not 0 <= spread <= 1:
        raise InputError(f"--contrast-spread {spread}: expected 0 to 1, such as 0.2")
    for name in ("cs", "shift", "defocus_spread", "astigmatism", "pose_error"):
        if not getattr(config, name) >= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected 0 or more")
    if config.box < 8 or config.box % 2:
        raise InputError(f"--box {config.box}: expected an even number of at least 8 pixels; use --box 96")
    if config.defocus_min > config.defocus_max:
        raise InputError(
            f"--defocus-min {config.defocus_min:g} is above --defocus-max {config.defocus_max:g}; swap them"
        )
    if not 0 <= config.amplitude_contrast <= 1:
        raise InputError(f"--amplitude-contrast {config.amplitude_contrast}: expected a fraction from 0 to 1")
    if config.noise_only and math.isinf(config.snr):
        raise InputError("--noise-only with --snr inf gives empty images; give a finite --snr, such as 0.05")


def _prepare_folder(output: Path, overwrite: bool) -> None:
    """Make the folder, or check that nothing in it would be lost."""
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output}: the folder is not empty; choose another with -o, or use --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error


def _load(config: SimulateConfig, model: Path | None, grid: Grid) -> States:
    """The states that are asked for, the one of the file, or the procedural protein, in house coordinates and inside
    the box."""
    states = load_states(config.heterogeneity, model)
    named = states is not None or model is not None
    if states is None:
        states = one_state(procedural_protein(config.atoms, config.model_seed) if model is None else read_atoms(model))
    if named:
        placed = place_states(states.atoms, states.population.tolist(), grid, config.keep_frame)
        states = replace(states, atoms=placed)
    for i, atoms in enumerate(states.atoms):
        name = str(model or "procedural protein") if len(states) == 1 else f"state {i + 1} of {len(states)}"
        check_fits(atoms, grid, name, named and config.keep_frame)
    return states


def simulate(config: SimulateConfig, model: Path | None, output: Path, log: Log | None = None) -> Path:
    """Write particles.mrcs, particles.star, truth.mrc and simulate.toml into ``output``; returns the STAR file. Where
    the particles differ in state or contrast, a folder truth says how: labels.csv and states.csv (see `write_truth`)
    and the map of each state. ``log`` is told of progress.

    The noise has standard deviation 1, as RELION normalises the background, and the truth map, the mean of the states,
    has the grey scale of the images: its projection is the image without CTF and noise. With ``snr = inf`` the signal
    has standard deviation 1.

    Raises:
        InputError: a setting is impossible, a model is unusable or does not fit into the box.
        OutputError: the folder is not empty or cannot be written.
    """
    _check_config(config)
    grid = Grid(config.box, config.pixel_size)
    states = _load(config, model, grid)
    which = draw_states(states.population, config.particles, drawn_from(config.seed, 6))
    contrast = draw_contrast(config.heterogeneity.contrast_spread, config.particles, drawn_from(config.seed, 7))
    _prepare_folder(output, config.overwrite)

    poses, optics = random_poses(config), random_optics(config)
    drawn = poses.to(torch.float32), optics.to(torch.float32)
    scene = make_scene(states.atoms, grid, config.b_factor)
    variance = signal_variance(scene, *drawn, which, contrast)
    noiseless = math.isinf(config.snr)
    gain = math.sqrt((1 if noiseless else config.snr) / variance)

    remove_truth(output / TRUTH)
    generator, start = drawn_from(config.seed, 3), time.monotonic()
    with (
        _progress(log, "images", config.particles, "images") as update,
        writing_stack(output / "particles.mrcs", config.particles, grid, config.dtype) as write,
    ):
        for rows in chunks(torch.arange(config.particles), grid.size):
            images = torch.zeros(len(rows), grid.size, grid.size)
            if not config.noise_only:
                scale = (gain * contrast[rows, None, None]).to(images.dtype)
                images += scale * clean_images(scene, drawn[0][rows], drawn[1][rows], which[rows])
            if not noiseless:
                images += make_noise(len(rows), grid, config.noise, generator)
            write(images)
            update(int(rows[-1]) + 1, f"{grid.size} px of {grid.pixel_size:g} Å")
    if log is not None:
        rate = config.particles / max(time.monotonic() - start, 1e-9)
        log.line(f"{config.particles:,} images of {counted(len(states), 'state')}, {rate:,.0f} images/s")
    with _progress(log, "maps of states", len(states), "maps") as update:
        _write_maps(output, states, gain, grid, config.b_factor, update)
    if len(states) > 1 or config.heterogeneity.contrast_spread:
        write_truth(output / TRUTH, states, which, contrast)
    written = perturb_poses(poses, math.radians(config.pose_error), drawn_from(config.seed, 4))
    star = output / "particles.star"
    file = Names(star).below(output, output / "particles.mrcs")
    write_particles_star(
        star,
        [f"{i + 1:06d}@{file}" for i in range(config.particles)],
        [f"micrograph_{i // config.micrograph_particles + 1:05d}.mrc" for i in range(config.particles)],
        written,
        optics,
        grid,
        random_halves(config.particles, drawn_from(config.seed, 5)) if config.half_sets else None,
    )
    settings = {
        "program": f"emsplat {__version__}",
        "model": str(model or "procedural") if len(states) == 1 else f"{len(states)} states",
        "atoms": len(states.atoms[0]),
        "signal_variance": variance,
        "gain": gain,
        "settings": plain(config),
    }
    with replacing(output / "simulate.toml") as temporary:
        temporary.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return star


def _progress(log: Log | None, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[int, str], None]]:
    return nullcontext(lambda done, remark: None) if log is None else log.progress(name, total, unit=unit)


def _write_maps(
    output: Path, states: States, gain: float, grid: Grid, b_factor: float, update: Callable[[int, str], None]
) -> None:
    """truth.mrc, and where there are several states the map of each."""
    mean = torch.zeros((grid.size,) * 3)
    maps = truth_maps(make_scene(states.atoms, grid, b_factor, dims=3))
    for i, (volume, share) in enumerate(zip(maps, states.population.tolist(), strict=True)):
        mean += share * gain * volume
        if len(states) > 1:
            write_map(output / TRUTH / state_map_name(i), gain * volume, grid.pixel_size)
        update(i + 1, "")
    write_map(output / "truth.mrc", mean, grid.pixel_size)
