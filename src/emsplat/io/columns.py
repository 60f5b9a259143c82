"""Tables of a few columns of text (CSV), and the latents of particles."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.files import require_file
from emsplat.io.pickles import load_arrays


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a CSV table by the names in its first line.

    Raises:
        InputError: it is missing or unreadable, lacks one of ``names``, has a column twice, rows of other lengths or
            none.
    """
    expected = f"expected a CSV table with columns {', '.join(names)}"
    require_file(path, expected.removeprefix("expected "))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            head, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({_short(str(error))}); {expected}") from error
    if set(names) - set(head) or len(set(head)) < len(head):
        raise InputError(f"{path}: columns {_short(', '.join(head))}; {expected}, each once")
    if not rows:
        raise InputError(f"{path}: no rows; {expected}; was it cut off?")
    wrong = next((i for i, row in enumerate(rows) if len(row) != len(head)), None)
    if wrong is not None:
        raise InputError(f"{path}, row {wrong + 1}: {len(rows[wrong])} cells; expected {len(head)}; was it cut off?")
    return dict(zip(head, map(list, zip(*rows, strict=True)), strict=True))


def as_numbers(path: Path, name: str, values: Sequence[str]) -> list[float]:
    """A column as finite numbers.

    Raises:
        InputError: a cell holds something else.
    """
    numbers = []
    for row, value in enumerate(values):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{path}, row {row + 1}, column {_short(name)}: {_short(value)}; expected a finite number")
        numbers.append(number)
    return numbers


def as_whole(path: Path, name: str, values: Sequence[str]) -> Int[Tensor, " p"]:
    """A column as whole numbers from 0.

    Raises:
        InputError: a cell holds something else.
    """
    for row, value in enumerate(values):
        if not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise InputError(f"{path}, row {row + 1}, column {_short(name)}: {_short(value)}; expected a whole number")
    return torch.tensor(list(map(int, values)))


def row_column(path: Path) -> Int[Tensor, " p"] | None:
    """The column ``row`` of a table, which counts from 1 as latents.csv does; None where the first line names none.

    Raises:
        InputError: it is missing, or not a table of whole numbers after all.
    """
    require_file(path, "file of row numbers")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head = file.readline(10_000)
    if "row" not in head.strip().split(","):
        return None
    return as_whole(path, "row", read_columns(path, ["row"])["row"])


def _short(text: str) -> str:
    """What a file holds, as a message can show it."""
    return ascii(text[:60])[1:-1]


@dataclass(frozen=True)
class LatentTable:
    """Where particles stand in what was found to vary."""

    row: Int[Tensor, " p"] | None  # in the input, from 0; None where the file does not say
    z: Float[Tensor, "p d"]  # float64
    classes: Int[Tensor, " p"] | None  # from 0


def read_latents(path: Path) -> LatentTable:
    """``latents.csv`` (columns z1, z2, …, and where known row, from 1, and class), or an array of cryoDRGN (z.pkl).

    Raises:
        InputError: it is missing or damaged, or holds something else; latents that are not finite; a row twice.
    """
    if path.suffix == ".pkl":
        return LatentTable(None, _of_pickle(path), None)
    columns = read_columns(path, ("z1",))
    names = [f"z{i + 1}" for i in range(sum(name[:1] == "z" and name[1:].isdecimal() for name in columns))]
    if not columns.keys() >= set(names):
        raise InputError(f"{path}: columns {_short(', '.join(columns))}; expected z1, z2 and so on without a gap")
    z = torch.tensor([as_numbers(path, name, columns[name]) for name in names], dtype=torch.float64).T.contiguous()
    row = classes = None
    if "row" in columns:
        row = as_whole(path, "row", columns["row"]) - 1
        copy = columns.get("copy", [""] * len(row))  # under a symmetry
        if len(set(zip(row.tolist(), copy, strict=True))) < len(row) or int(row.min()) < 0:
            raise InputError(f"{path}: column row; expected each particle once, counted from 1")
    if "class" in columns and any(columns["class"]):
        _, number = np.unique(np.array(columns["class"]), return_inverse=True)
        classes = torch.from_numpy(number.reshape(-1).astype(np.int64))
    return LatentTable(row, z, classes)


def _of_pickle(path: Path) -> Float[Tensor, "p d"]:
    value = load_arrays(path)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != 2 or 0 in value.shape:
        raise InputError(f"{path}: expected an array of latents, particles × dimensions, as cryoDRGN writes them")
    if not np.isfinite(value).all():
        raise InputError(f"{path}: holds latents that are not finite; expected numbers; did the training diverge?")
    return torch.from_numpy(value.astype(np.float64))
