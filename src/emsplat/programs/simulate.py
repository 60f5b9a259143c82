"""Particle images of an atomic model or of a procedural protein, with everything that is true of them."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import tomli_w
import torch

from emsplat import __version__
from emsplat.config import SimulateConfig
from emsplat.errors import InputError, OutputError
from emsplat.io.atoms import Atoms, read_atoms
from emsplat.io.files import replacing
from emsplat.io.mrc import write_map, writing_stack
from emsplat.io.paths import Names
from emsplat.io.relion.write import write_particles_star
from emsplat.simulation.images import (
    chunks,
    clean_images,
    drawn_from,
    make_noise,
    perturb_poses,
    random_halves,
    random_optics,
    random_poses,
    signal_variance,
    truth_map,
)
from emsplat.simulation.protein import check_fits, place_atoms, procedural_protein
from emsplat.types import Grid


def _check_config(config: SimulateConfig) -> None:
    """Refuse settings that describe no experiment."""
    for name in ("particles", "pixel_size", "snr", "voltage", "micrograph_particles"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected a number above 0")
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


def _load_model(config: SimulateConfig, model: Path | None, grid: Grid) -> Atoms:
    """The atoms of the file, or else of the procedural protein, in house coordinates and inside the box."""
    if model is None:
        atoms = procedural_protein(config.atoms, config.model_seed)
    else:
        atoms = place_atoms(read_atoms(model), grid, config.keep_frame)
    check_fits(atoms, grid, str(model or "procedural protein"), model is not None and config.keep_frame)
    return atoms


def simulate(config: SimulateConfig, model: Path | None, output: Path) -> Path:
    """Write particles.mrcs, particles.star, truth.mrc and simulate.toml into ``output``; returns the STAR
    file.

    The noise has standard deviation 1, as RELION normalises the background, and the truth map has the grey
    scale of the images: its projection is the image without CTF and noise. With ``snr = inf`` the signal has
    standard deviation 1.

    Raises:
        InputError: a setting is impossible, the model is unusable or does not fit into the box.
        OutputError: the folder is not empty or cannot be written.
    """
    _check_config(config)
    grid = Grid(config.box, config.pixel_size)
    atoms = _load_model(config, model, grid)
    _prepare_folder(output, config.overwrite)

    poses, optics = random_poses(config), random_optics(config)
    drawn = poses.to(torch.float32), optics.to(torch.float32)
    variance = signal_variance(atoms, *drawn, grid, config.b_factor)
    noiseless = math.isinf(config.snr)
    gain = math.sqrt((1 if noiseless else config.snr) / variance)

    generator = drawn_from(config.seed, 3)
    with writing_stack(output / "particles.mrcs", config.particles, grid, config.dtype) as write:
        for rows in chunks(torch.arange(config.particles), grid.size):
            images = torch.zeros(len(rows), grid.size, grid.size)
            if not config.noise_only:
                images += gain * clean_images(atoms, drawn[0][rows], drawn[1][rows], grid, config.b_factor)
            if not noiseless:
                images += make_noise(len(rows), grid, config.noise, generator)
            write(images)
    write_map(output / "truth.mrc", gain * truth_map(atoms, grid, config.b_factor), grid.pixel_size)
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
        "model": str(model or "procedural"),
        "atoms": len(atoms),
        "signal_variance": variance,
        "gain": gain,
        "settings": asdict(config),
    }
    with replacing(output / "simulate.toml") as temporary:
        temporary.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return star
