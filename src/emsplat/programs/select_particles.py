"""Particles of a heterogeneous run that were selected, as RELION, cryoSPARC and cryoDRGN take them back."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emsplat.errors import InputError, OutputError
from emsplat.io.columns import as_numbers, as_whole, read_columns, row_column
from emsplat.io.cryosparc import read_cs, write_cs
from emsplat.io.particles import columns_kept, read_particles, write_used
from emsplat.io.pickles import load_arrays, write_arrays
from emsplat.io.table import ParticleTable
from emsplat.run.files import LATENTS, PARTICLES, SELECTED, SELECTED_INDEX, SUMMARY
from emsplat.run.log import Log

_CONDITION = re.compile(r"(?P<name>[a-z]+\d*)=(?P<what>.+)")
_EXPECTED = (
    "expected a file of row numbers (rows.txt or particles.csv of the explorer), class=2, class=1,3, half=1, or ranges "
    "such as z1=-0.5:1.2, z2=:0, gain=2:"
)


@dataclass(frozen=True)
class _Lines:
    """latents.csv, one line per view."""

    path: Path
    columns: dict[str, list[str]]
    row: Int[Tensor, " v"]  # from 1
    state: Int[Tensor, " v"]  # from 1, as in run_data.star

    def numbers(self, name: str) -> Tensor:
        return torch.tensor(as_numbers(self.path, name, self.columns[name]), dtype=torch.float64)


def select_particles(run: Path, conditions: Sequence[str], output: Path, overwrite: bool, log: Log) -> list[Path]:
    """The particles for which all conditions hold, into ``output``: a STAR file with all columns of run_data.star,
    a .cs file, and a pickle of row numbers of the input from 0. Returns the files written.

    Raises:
        InputError: the run has no latents, a condition cannot be read, or nothing is left.
        OutputError: the files are there already or cannot be written.
    """
    lines, table = _read(run)
    chosen = torch.ones(len(lines.row), dtype=torch.bool)
    for condition in conditions:
        chosen &= _holds(lines, condition, log)
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        raise InputError(f"--select {' '.join(conditions)}: no particle of {lines.path} is left; select more")
    star, index = output / SELECTED, output / SELECTED_INDEX
    cs = star.with_suffix(".cs")
    for path in (star, cs, index):
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: is there already; choose another folder with -o, or use --overwrite")
    written = [_write_star(table, star, rows), index]
    write_arrays(index, np.unique(lines.row[rows].numpy() - 1))
    try:
        _write_cs(run, table, lines, cs, rows, log)
        written.insert(1, cs)
    except InputError as error:
        log.warn(f"no {cs.name}: {error}")
    halves = [int((table.half[rows] == half).sum()) for half in (1, 2)] if table.half is not None else []
    said = f", half-sets {halves[0]:,} + {halves[1]:,}" if halves else ""
    log.line(f"{len(rows):,} of {len(lines.row):,} selected{said}: {', '.join(map(str, written))}")
    if halves and min(halves) < 1:
        log.warn("one half-set has none of the selected particles; a refinement of these has no half maps")
    return written


def _read(run: Path) -> tuple[_Lines, ParticleTable]:
    path = run / LATENTS
    if not path.is_file():
        raise InputError(f"{run}: no {LATENTS}; expected the folder of an emsplat heterogeneity that has found states")
    columns = read_columns(path, ["row", "z1"])
    table = read_particles(run / PARTICLES, need_stacks=False)
    row = as_whole(path, "row", columns["row"])
    state = table.particle_class
    if len(table) != len(row) or state is None:
        raise InputError(
            f"{run / PARTICLES}: {len(table):,} particles, but {len(row):,} in {path}; expected those of one run; was "
            "one of them replaced?"
        )
    return _Lines(path, columns, row, state), table


def _holds(lines: _Lines, condition: str, log: Log) -> Bool[Tensor, " v"]:
    """Which views a condition is true of."""
    path = Path(condition)
    if path.is_file():
        return _listed(lines, path, log)
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise InputError(f"--select {condition}: no such file and no condition; {_EXPECTED}")
    name, what = found.group("name"), found.group("what")
    if name in ("class", "half"):
        try:
            wanted = [int(part) for part in what.split(",")]
        except ValueError as error:
            raise InputError(f"--select {condition}: {_EXPECTED}") from error
        own = lines.state if name == "class" else as_whole(lines.path, "half", lines.columns["half"])
        if lost := set(wanted) - set(own.tolist()):
            there = ", ".join(map(str, sorted(set(own.tolist()))))
            raise InputError(f"--select {condition}: there is no {name} {min(lost)}; there are {there}")
        return torch.isin(own, torch.tensor(wanted))
    if name == "row" or name not in lines.columns or name == "copy":
        known = ", ".join(["class", *(own for own in lines.columns if own not in ("row", "copy", "class"))])
        raise InputError(f"--select {condition}: {name} is none of {known}; {_EXPECTED}")
    low, colon, high = what.partition(":")
    try:
        ends = (float(low) if low else -np.inf, float(high) if high else np.inf)
    except ValueError:
        ends = (np.nan, np.nan)
    if not colon or not ends[0] <= ends[1]:
        raise InputError(f"--select {condition}: {_EXPECTED}")
    values = lines.numbers(name)
    return (values >= ends[0]) & (values <= ends[1])


def _listed(lines: _Lines, path: Path, log: Log) -> Bool[Tensor, " v"]:
    """Views whose row number (from 1) a file lists: a CSV table with a column row, or one number per line; or a pickle
    of cryoDRGN, which counts from 0. Under a symmetry a table names copies as well; without them all are meant."""
    kind, copy = path.suffix.lower(), None
    if kind == ".pkl":
        values = np.asarray(load_arrays(path))
        if values.dtype.kind not in "iu" or values.ndim != 1:
            raise InputError(
                f"{path}: holds {values.dtype} {values.shape}; expected whole numbers, as cryoDRGN's --ind"
            )
        numbers = torch.from_numpy(values.astype(np.int64)) + 1
    elif kind == ".csv" or row_column(path) is not None:
        columns = read_columns(path, ["row"])
        numbers = as_whole(path, "row", columns["row"])
        copy = as_whole(path, "copy", columns["copy"]) if "copy" in columns else None
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an empty file, refused below
                values = np.loadtxt(path, ndmin=1)
            numbers = torch.from_numpy(values.astype(np.int64))
            if values.ndim != 1 or not (values == numbers.numpy()).all():
                raise ValueError("not whole numbers")
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: cannot be read ({str(error)[:80]}); {_EXPECTED}") from error
    if not len(numbers):
        raise InputError(f"{path}: lists no rows; {_EXPECTED}")
    unknown = numbers[~torch.isin(numbers, lines.row)]
    if len(unknown):
        raise InputError(
            f"{path}: row {int(unknown[0])} is not in {lines.path}, whose rows are from {int(lines.row.min())} to "
            f"{int(lines.row.max())}; expected rows of this run, counted from 1"
        )
    if "copy" not in lines.columns:
        return torch.isin(lines.row, numbers)
    if copy is None:
        log.warn(f"{path}: names no copies under the symmetry (column copy); all copies of its rows are taken")
        return torch.isin(lines.row, numbers)
    own = as_whole(lines.path, "copy", lines.columns["copy"])
    most = int(max(own.max(), copy.max())) + 1
    return torch.isin(lines.row * most + own, numbers * most + copy)


def _write_star(table: ParticleTable, target: Path, rows: Int[Tensor, " q"]) -> Path:
    own = table.take(rows)
    write_used(own, target, own.half)
    return target


def _write_cs(run: Path, table: ParticleTable, lines: _Lines, target: Path, rows: Int[Tensor, " q"], log: Log) -> None:
    """From the .cs file of the run where that is one and is there, with all its fields; else from run_data.star."""
    source, own = _source(run), table.take(rows)
    if source is not None and source.suffix.lower() == ".cs" and "copy" not in lines.columns:
        whole = read_cs(source, need_stacks=False) if source.is_file() else None
        if whole is not None and int(lines.row.max()) <= len(whole):
            chosen = whole.take(lines.row[rows] - 1)
            if _same_images(chosen, own):
                # The run may have taken the other hand.
                if not torch.allclose(chosen.poses.rotation, own.poses.rotation, atol=1e-5):
                    chosen = replace(chosen, poses=own.poses, changed=("poses",))
                write_cs(target, chosen, own.half)
                return
        said = "is not there any more" if whole is None else "holds other particles than those of the run"
        log.warn(
            f"{source}: {said}; {target.name} has the fields that {run / PARTICLES} knows, the others are left out"
        )
    write_cs(target, own, own.half, more=columns_kept(own)[0])


def _same_images(one: ParticleTable, other: ParticleTable) -> bool:
    """Whether rows of two tables are of the same images, by their numbers and the names of their stacks."""
    names = [[table.stacks[number].name for number in table.stack.tolist()] for table in (one, other)]
    return torch.equal(one.image, other.image) and names[0] == names[1]


def _source(run: Path) -> Path | None:
    """The file that the particles of the run came from; None of several."""
    try:
        summary: dict[str, Any] = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        return None if summary["options"].get("merge") else Path(summary["input"]["file"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
