"""What is true of simulated particles in several states: a folder of tables and maps, written and read.

``labels.csv`` has a row per particle, in the order of the STAR file: ``row`` and ``state``, both counted from 1, where
it stands on what varies (``angle`` in degrees, ``frame`` counted from 1, ``missing``, ``model``), and ``contrast``.
``states.csv`` has a row per state with its ``population`` and the ``file`` of its map, on the grey scale of the images.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.errors import InputError, OutputError
from emsplat.io.columns import as_numbers, as_whole, read_columns
from emsplat.io.files import replacing, require_file
from emsplat.io.mrc import read_map
from emsplat.measures.fsc import common_grid
from emsplat.run.files import STATES_TABLE, state_map_name
from emsplat.simulation.states import States
from emsplat.types import Grid

TRUTH = "truth"  # the folder
LABELS = "labels.csv"


def remove_truth(folder: Path) -> None:
    """Takes away the tables and maps of an earlier simulation, whose particles are about to be replaced.

    Raises:
        OutputError: they cannot be removed.
    """
    for path in (folder / LABELS, folder / STATES_TABLE, *folder.glob("[0-9][0-9][0-9]*.mrc")):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be removed ({error.strerror}); choose another folder with -o") from error


def write_truth(folder: Path, states: States, which: Int[Tensor, " p"], contrast: Float[Tensor, " p"]) -> None:
    """labels.csv and states.csv.

    Raises:
        OutputError: they cannot be written.
    """
    own = {name: tuple(map(_text, values)) for name, values in states.coordinates.items()}
    several = len(states) > 1
    _write(
        folder / LABELS,
        ["row", "state", *own, "contrast"],
        (
            [row + 1, state + 1, *(values[state] for values in own.values()), _text(scale)]
            for row, (state, scale) in enumerate(zip(which.tolist(), contrast.tolist(), strict=True))
        ),
    )
    _write(
        folder / STATES_TABLE,
        ["state", "population", *own, "file"],
        (
            [
                i + 1,
                _text(share),
                *(values[i] for values in own.values()),
                state_map_name(i) if several else "../truth.mrc",
            ]
            for i, share in enumerate(states.population.tolist())
        ),
    )


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else format(value, ".10g")


def _write(path: Path, head: Sequence[str], rows: Any) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


@dataclass(frozen=True)
class Truth:
    """A folder as `write_truth` leaves it."""

    folder: Path
    state: Int[Tensor, " p"]  # from 0
    columns: dict[str, list[str]]  # where each particle stands: angle, frame, missing, model
    population: Float[Tensor, " s"]
    maps: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.maps)

    def read(self, state: int, grid: Grid | None = None) -> tuple[Float[Tensor, "z y x"], Grid]:
        """The map of a state (from 0) and its grid.

        Raises:
            InputError: it cannot be read, or is not on ``grid``.
        """
        path = self.maps[state]
        volume, own = read_map(path)
        if grid is not None:
            common_grid({str(self.maps[0]): grid, str(path): own})
        return volume, own


def read_truth(folder: Path) -> Truth:
    """The truth of simulated particles, from the folder truth or the one that it is in.

    Raises:
        InputError: there is none; tables that cannot be read or do not belong together; a map that is missing.
    """
    folder = folder if (folder / LABELS).is_file() else folder / TRUTH
    labels, states = (
        read_columns(folder / LABELS, ("state",)),
        read_columns(folder / STATES_TABLE, ("state", "population", "file")),
    )
    state = as_whole(folder / LABELS, "state", labels["state"])
    number = as_whole(folder / STATES_TABLE, "state", states["state"])
    if number.tolist() != list(range(1, len(number) + 1)):
        raise InputError(f"{folder / STATES_TABLE}: column state; expected 1, 2, 3 and so on, one row for each")
    if not bool(((state >= 1) & (state <= len(number))).all()):
        raise InputError(
            f"{folder / LABELS}: states from {int(state.min())} to {int(state.max())}; expected 1 to {len(number)}"
        )
    if "row" in labels and as_whole(folder / LABELS, "row", labels["row"]).tolist() != list(range(1, len(state) + 1)):
        raise InputError(f"{folder / LABELS}: column row; expected 1, 2, 3 and so on, as the particles are")
    population = torch.tensor(
        as_numbers(folder / STATES_TABLE, "population", states["population"]), dtype=torch.float64
    )
    if not bool((population > 0).all()):
        raise InputError(f"{folder / STATES_TABLE}: column population; expected numbers above 0")
    maps = tuple(folder / name for name in states["file"])
    for path in maps:
        require_file(path, f"the map of a state, as {folder / STATES_TABLE} names it")
    own = {name: values for name, values in labels.items() if name not in ("row", "state", "contrast")}
    return Truth(folder, state - 1, own, population / population.sum(), maps)
