"""Maps of a heterogeneous run at any latents: those of a table, or on the way between states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.config import StatesConfig
from emsplat.errors import InputError, OutputError
from emsplat.heterogeneity.half import HalfModel, read_half
from emsplat.io.columns import as_numbers, read_columns
from emsplat.io.gaussians import write_gaussians
from emsplat.io.mrc import write_map
from emsplat.process import threads
from emsplat.run.files import STATES, STATES_TABLE, half_model_name, state_map_name
from emsplat.run.log import Log


def states(run: Path, config: StatesConfig, output: Path, log: Log | None = None) -> list[Path]:
    """One map for each latent into ``output``: 000.mrc, 001.mrc, and so on; returns their paths.

    Raises:
        InputError: the run has no states, or the latents cannot be used.
        OutputError: maps of these names are there already, or cannot be written.
    """
    log = log or Log()
    with threads(config.threads):
        models = read_models(run)
        latents = _latents(run, config, models[0])
        paths = [output / state_map_name(number) for number in range(len(latents))]
        if not config.overwrite and (there := next((path for path in paths if path.exists()), None)):
            raise OutputError(f"{there}: is there already; choose another folder with -o, or use --overwrite")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error
        chosen = models if config.half is None else [models[config.half - 1]]
        with log.progress("maps", len(latents), unit="maps") as update:
            for number, (path, latent) in enumerate(zip(paths, latents, strict=True)):
                volume = torch.stack([model.map(latent) for model in chosen]).mean(0)
                write_map(path, volume, chosen[0].box.pixel_size)
                if config.gaussians:
                    for half, model in zip([config.half] if config.half else (1, 2), chosen, strict=True):
                        write_gaussians(path.with_name(f"{path.stem}_half{half}.ply"), model.mixture(latent), model.box)
                update(number + 1, path.name)
        log.line(f"{len(latents)} maps in {output}")
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
    if (config.at is None) == (not config.path):
        raise InputError("states: expected either --at with a table of latents or --path with two states or more")
    count = model.density.point.shape[1]
    if config.at is not None:
        return _table(config.at, count)
    known = _table(run / STATES / STATES_TABLE, count)
    if len(config.path) < 2 or any(not 1 <= number <= len(known) for number in config.path) or config.frames < 2:
        raise InputError(
            f"--path {' '.join(map(str, config.path))} --frames {config.frames}: expected two states or more from 1 to "
            f"{len(known)} ({run / STATES / STATES_TABLE}), and at least 2 frames"
        )
    return torch.stack(list(along(known[[number - 1 for number in config.path]], config.frames)))


def along(corners: Float[Tensor, "n q"], frames: int) -> Iterator[Float[Tensor, " q"]]:
    """Points at equal steps along straight lines from corner to corner."""
    lengths = torch.linalg.vector_norm(corners.diff(dim=0), dim=1)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    for place in torch.linspace(0, float(ends[-1]), frames, dtype=corners.dtype):
        leg = min(int((ends[1:] < place).sum()), len(lengths) - 1)
        share = (place - ends[leg]) / lengths[leg].clamp(min=1e-12)
        yield corners[leg] + share.clamp(0, 1) * (corners[leg + 1] - corners[leg])


def _table(path: Path, count: int) -> Float[Tensor, "n q"]:
    names = [f"z{k + 1}" for k in range(count)]
    columns = read_columns(path, names)
    return torch.tensor([as_numbers(path, name, columns[name]) for name in names], dtype=torch.float64).T
