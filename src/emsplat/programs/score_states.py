"""Reconstructed states of simulated particles, scored against the truth."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.assessment.states import Map, MapsAt, Score, Scores, score
from emsplat.config import ScoreStatesConfig
from emsplat.errors import InputError, OutputError
from emsplat.io.columns import LatentTable, read_latents
from emsplat.io.files import number_text, replacing
from emsplat.io.mrc import read_map
from emsplat.measures.fsc import common_grid
from emsplat.measures.mask import check_mask
from emsplat.process import threads
from emsplat.programs.states import read_models
from emsplat.run.files import CONSENSUS, CRYODRGN_LATENTS, FULL_MAP, LATENTS, SCORES, half_model_name, state_map_name
from emsplat.run.log import Log
from emsplat.simulation.truth import Truth, read_truth
from emsplat.types import Grid

_COLUMNS = ("state", "particles", "auc", "moving", "consensus_auc", "consensus_moving", "mean_auc", "mean_moving")


def score_states(run: Path, config: ScoreStatesConfig, log: Log | None = None) -> Scores:
    """Scores a run folder of ``emsplat heterogeneity``, or a folder of any program with a map for each true state
    (000.mrc, 001.mrc, …) and, where it has them, latents (latents.csv or cryoDRGN's z.pkl); writes scores.csv there.

    Raises:
        InputError: a folder that cannot be used; a truth of another box, pixel size or number of particles; latents
            that are not finite; a state without particles.
        OutputError: scores.csv cannot be written, or is a table of something else.
    """
    with threads(config.threads):
        return _score_states(run, config, log or Log())


def _score_states(run: Path, config: ScoreStatesConfig, log: Log) -> Scores:
    if config.images < 0:
        raise InputError(f"--images {config.images}: expected 0 or more")
    truth = read_truth(config.truth)
    _, grid = truth.read(0)
    found = _results(run, truth, grid, config)
    table = (config.output or run) / SCORES
    _check_table(table)
    mask = None
    if config.mask is not None:
        volume, own = read_map(config.mask)
        common_grid({str(truth.maps[0]): grid, str(config.mask): own})
        mask = check_mask(volume, str(config.mask))
    latents = found.latents
    log.line(
        f"{run}: {len(truth)} states, {len(truth.state) if latents is None else len(latents.z):,} particles, box "
        f"{grid.size} of {grid.pixel_size:g} Å"
    )
    total = len(truth) + (0 if found.map_at is None or latents is None else min(config.images, len(latents.z)))
    with log.progress("maps", total, unit="maps") as update:
        counter = itertools.count(1)

        def seen(maps: Iterable[Map]) -> Iterator[Map]:
            for volume in maps:
                yield volume
                update(next(counter), "against the truth")

        map_at = found.map_at
        scores = score(
            truth,
            grid,
            None if latents is None else latents.z,
            rows=found.rows,
            classes=None if latents is None else latents.classes,
            map_at=None if map_at is None else lambda z: seen(map_at(z)),
            state_maps=None if found.state_maps is None else seen(found.state_maps),
            consensus=found.consensus,
            mask=mask,
            images=config.images,
        )
    for text in lines(scores):
        log.line(text)
    _write(table, scores)
    log.line(f"  each state: {table}")
    return scores


@dataclass(frozen=True)
class _Results:
    """What a program has found, as far as its folder tells."""

    latents: LatentTable | None
    rows: Int[Tensor, " p"] | None  # of the truth, from 0; None: all of them
    map_at: MapsAt | None
    state_maps: Iterator[Map] | None
    consensus: Map | None


def _results(run: Path, truth: Truth, grid: Grid, config: ScoreStatesConfig) -> _Results:
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; expected a run folder, or one with maps of states and latents")
    path = next((run / name for name in (LATENTS, CRYODRGN_LATENTS) if (run / name).exists()), None)
    latents = None if path is None else read_latents(path)
    rows = None if path is None or latents is None else _matched(path, latents, truth, partial=config.partial)
    plain = (run / state_map_name(0)).is_file()
    if not plain and path is None:
        raise InputError(
            f"{run}: neither {LATENTS} nor {state_map_name(0)}; expected a run folder of emsplat heterogeneity, or a "
            "map for each true state and latents"
        )
    return _Results(
        latents,
        rows,
        None if plain else maps_of_run(run, truth, grid),
        _plain_maps(run, truth, grid) if plain else None,
        _consensus(run, truth, grid, config.consensus),
    )


def _matched(path: Path, latents: LatentTable, truth: Truth, *, partial: bool) -> Int[Tensor, " p"] | None:
    """The rows of the truth that latents belong to."""
    count, known = len(latents.z), len(truth.state)
    row = latents.row
    if row is not None and len(torch.unique(row)) < len(row):
        raise InputError(
            f"{path}: particles stand there once for each element of a symmetry, which the truth does not have; "
            "score a run without --symmetry"
        )
    if row is not None and int(row.max()) >= known:
        raise InputError(
            f"{path}: row {int(row.max()) + 1}, but {truth.folder} has {known:,} particles; expected the truth of the "
            "particles that were reconstructed"
        )
    if count != known and not (partial and row is not None):
        remedy = (
            "where only a part of the particles was reconstructed, add --partial"
            if row is not None
            else ("a table with their numbers in a column row may have fewer, with --partial")
        )
        raise InputError(
            f"{path}: latents of {count:,} particles, but {truth.folder} has {known:,}; expected the same number; "
            f"{remedy}"
        )
    return row


def maps_of_run(run: Path, truth: Truth, grid: Grid) -> MapsAt:
    """The maps at latents of a run folder of ``emsplat heterogeneity``.

    Raises:
        InputError: the folder has none.
    """
    if not (run / half_model_name(1)).is_file():
        raise InputError(
            f"{run}: has latents, but no maps; expected a run folder of emsplat heterogeneity, or a map for each true "
            f"state in order, {state_map_name(0)}, {state_map_name(1)} and so on"
        )
    models = read_models(run)
    common_grid({str(truth.maps[0]): grid, str(run): models[0].box})

    def maps_at(latents: Float[Tensor, "n d"]) -> Iterator[Map]:
        for latent in latents:
            yield (models[0].map(latent) + models[1].map(latent)) / 2

    return maps_at


def _plain_maps(run: Path, truth: Truth, grid: Grid) -> Iterator[Map]:
    for state in range(len(truth)):
        path = run / state_map_name(state)
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected a map for each of the {len(truth)} true states, in order")
        volume, own = read_map(path)
        common_grid({str(truth.maps[state]): grid, str(path): own})
        yield volume


def _consensus(run: Path, truth: Truth, grid: Grid, named: Path | None) -> Float[Tensor, "z y x"] | None:
    path = named or next((run / name for name in (CONSENSUS, FULL_MAP) if (run / name).is_file()), None)
    if path is None:
        return None
    volume, own = read_map(path)
    common_grid({str(truth.maps[0]): grid, str(path): own})
    return volume


# What is said


def lines(scores: Scores) -> Iterator[str]:
    """The table that the terminal shows."""
    states = scores.states
    yield f"  {'':28}{'found':>16}{'consensus':>12}{'mean of truth':>16}"
    for name, key in (("AUC", "auc"), ("moving", "moving")):
        found = _values([own.found for own in states], key)
        spread = f" ± {_std(found):.3f}" if len(found) > 1 else ""
        others = [_values([getattr(own, kind) for own in states], key) for kind in ("consensus", "mean")]
        base, mean = (_mean(values) for values in others)
        yield f"  {'per conformation, ' + name:28}{_mean(found) + spread:>16}{base:>12}{mean:>16}"
    for name, key in (("AUC", "auc"), ("moving", "moving")):
        if scores.images:
            found = _values([own for own, _ in scores.images], key)
            base = _mean(_values([other for _, other in scores.images], key))
            yield f"  {'per image, ' + name:28}{_mean(found) + f' ± {_std(found):.3f}':>16}{base:>12}"
    if scores.neighbours is not None:
        shared, chance = scores.neighbours
        yield (
            f"  of the {scores.k:,} nearest particles by latent {shared:.3f} are among the nearest in truth (by chance "
            f"{chance:.3f})"
        )
    if scores.rand_index is not None:
        yield f"  adjusted Rand index of classes and true states {scores.rand_index:.3f}"
    if len(states) > 3:
        worst = sorted(states, key=lambda own: own.found.auc)[:3]
        yield "  lowest: " + ", ".join(f"state {own.state + 1} ({own.found.auc:.3f})" for own in worst)


def _values(scores: Sequence[Score | None], key: str) -> list[float]:
    values = [None if own is None else getattr(own, key) for own in scores]
    return [value for value in values if value is not None]


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _std(values: list[float]) -> float:
    return float(torch.tensor(values).std(correction=0)) if values else 0.0


def _check_table(path: Path) -> None:
    """Refuse to write over a table of another kind."""
    try:
        first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if path.exists() else ""
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); name another folder with -o") from error
    if first and tuple(first.split(",")) != _COLUMNS:
        raise OutputError(f"{path}: is a table of something else; name another folder with -o")


def _write(path: Path, scores: Scores) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for own in scores.states:
            pairs = [(None, None) if s is None else (s.auc, s.moving) for s in (own.found, own.consensus, own.mean)]
            cells = ["" if value is None else number_text(value, ".5f") for pair in pairs for value in pair]
            writer.writerow([own.state + 1, own.particles, *cells])
