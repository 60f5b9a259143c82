"""Maps of a heterogeneous run at any latents: those of a table, or on the way between states."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from emsplat.config import StatesConfig
from emsplat.errors import InputError, OutputError
from emsplat.heterogeneity.half import HalfModel, read_half
from emsplat.heterogeneity.paths import along, through_density, traversal
from emsplat.io.columns import as_numbers, read_columns, read_latents
from emsplat.io.gaussians import write_gaussians
from emsplat.io.mrc import write_map
from emsplat.process import threads
from emsplat.programs.part_files import surface_level, write_series
from emsplat.programs.select_particles import select_particles
from emsplat.report.movie import draw_frame, write_movie
from emsplat.run.files import CHIMERAX, LATENTS, MOVIE, STATES, STATES_TABLE, half_model_name, state_map_name
from emsplat.run.log import Log


def states(run: Path, config: StatesConfig, output: Path, log: Log | None = None) -> list[Path]:
    """One map for each latent into ``output``: 000.mrc, 001.mrc, and so on, with a script that plays them in ChimeraX;
    or with ``config.select`` particles. Returns the paths of maps or files of particles.

    Raises:
        InputError: the run has no states, or what is asked for cannot be had.
        OutputError: files of these names are there already, or cannot be written.
    """
    log = log or Log()
    if config.select:
        maps = ("at", "half", "path", "straight", "traverse", "frames", "movie", "gaussians")
        if others := [name for name in maps if getattr(config, name) != getattr(StatesConfig(), name)]:
            raise InputError(f"--{others[0]} with --select: it belongs to maps; select particles without it")
        return select_particles(run, config.select, output, config.overwrite, log)
    with threads(config.threads):
        models = read_models(run)
        latents = _latents(run, config, models[0])
        paths = [output / state_map_name(number) for number in range(len(latents))]
        files = [*paths, output / CHIMERAX, *([output / MOVIE] if config.movie else [])]
        if not config.overwrite and (there := next((path for path in files if path.exists()), None)):
            raise OutputError(f"{there}: is there already; choose another folder with -o, or use --overwrite")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error
        chosen = models if config.half is None else [models[config.half - 1]]
        frames = list[NDArray[np.uint8]]()
        level = 0.0
        with log.progress("maps", len(latents), unit="maps") as update:
            for number, (path, latent) in enumerate(zip(paths, latents, strict=True)):
                volume = torch.stack([model.map(latent) for model in chosen]).mean(0)
                write_map(path, volume, chosen[0].box.pixel_size)
                level = level or surface_level(volume)
                if config.gaussians:
                    for half, model in zip([config.half] if config.half else (1, 2), chosen, strict=True):
                        write_gaussians(path.with_name(f"{path.stem}_half{half}.ply"), model.mixture(latent), model.box)
                if config.movie:
                    frames.append(draw_frame(volume.numpy(), level, chosen[0].grid.length / chosen[0].box.length))
                update(number + 1, path.name)
        write_series(output, level, len(latents))
        if config.movie:
            write_movie(output / MOVIE, frames)
        log.line(f"{len(latents)} maps in {output}" + f", {MOVIE} plays them" * config.movie)
    return paths


def read_models(run: Path) -> list[HalfModel]:
    """The models of both half-sets of a run folder.

    Raises:
        InputError: it is not the folder of a heterogeneous run, or no states were found.
    """
    paths = [run / half_model_name(half) for half in (1, 2)]
    if not all(path.is_file() for path in paths):
        raise InputError(
            f"{run}: no models of states ({', '.join(path.name for path in paths)}); expected the folder of an "
            "emsplat heterogeneity that has found any"
        )
    return [read_half(path) for path in paths]


def _latents(run: Path, config: StatesConfig, model: HalfModel) -> Float[Tensor, "n q"]:
    """What was asked for.

    Raises:
        InputError: both or none of a table and a path, or one that does not fit the run.
    """
    if config.half not in (None, 1, 2):
        raise InputError(f"--half {config.half}: expected 1 or 2")
    if (config.at is not None) + bool(config.path) + (config.traverse is not None) != 1:
        raise InputError(
            "states: expected either --at with a table of latents, --path with two states or more, --traverse with a "
            "component, or --select"
        )
    count = model.density.point.shape[1]
    if config.straight and not config.path:
        raise InputError("--straight belongs to --path; leave it out or add that")
    if config.at is not None:
        if config.frames != StatesConfig().frames:
            raise InputError("--frames with --at: there is one map for each row of the table; leave it out")
        return _table(config.at, count)
    if config.frames < 2:
        raise InputError(f"--frames {config.frames}: expected at least 2 frames")
    if config.traverse is not None:
        if not 1 <= config.traverse <= count:
            raise InputError(f"--traverse {config.traverse}: expected a component from 1 to {count}")
        return traversal(read_latents(run / LATENTS).z, config.traverse, config.frames, model.change_gram())
    known = _table(run / STATES / STATES_TABLE, count)
    if len(config.path) < 2 or any(not 1 <= number <= len(known) for number in config.path):
        raise InputError(
            f"--path {' '.join(map(str, config.path))}: expected two states or more from 1 to {len(known)} "
            f"({run / STATES / STATES_TABLE})"
        )
    if twice := next((one for one, other in itertools.pairwise(config.path) if one == other), None):
        raise InputError(f"--path: {twice} follows {twice}; expected two different states one after the other")
    corners = known[[number - 1 for number in config.path]]
    if not config.straight:
        corners = through_density(corners, model.density.point, model.density.weight, model.precision)
    return torch.stack(list(along(corners, config.frames)))


def _table(path: Path, count: int) -> Float[Tensor, "n q"]:
    names = [f"z{k + 1}" for k in range(count)]
    columns = read_columns(path, names)
    if more := [name for name in columns if name[:1] == "z" and name[1:].isdecimal() and name not in names]:
        raise InputError(
            f"{path}: column {more[0]}, but this run has {len(names)} components; expected those of "
            f"this run, columns {', '.join(names)}"
        )
    return torch.tensor([as_numbers(path, name, columns[name]) for name in names], dtype=torch.float64).T
