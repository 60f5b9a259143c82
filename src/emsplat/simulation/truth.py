"""What is true of simulated particles in several states: a folder of tables and maps, written and read.

``labels.csv`` has a row per particle, in the order of the STAR file: ``row`` and ``state``, both counted from 1, where
it stands on what varies (``angle`` in degrees, ``frame`` counted from 1, ``missing``, ``model``), and ``contrast``.
``states.csv`` has a row per state with its ``population`` and the ``file`` of its map, on the grey scale of the images.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from emsplat.io.files import replacing
from emsplat.simulation.states import States

TRUTH = "truth"  # the folder
LABELS = "labels.csv"
STATES = "states.csv"


def state_map_name(state: int) -> str:
    """The map of a state, counted from 0."""
    return f"{state:03d}.mrc"


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
        folder / STATES,
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
