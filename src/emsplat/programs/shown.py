"""What a run shows while it works, for `emsplat view`: resolutions with their curves, and slices of maps so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from emsplat.io.mrc import writing_stack
from emsplat.measures.curves import Sampled, resolution
from emsplat.run.files import slices_name
from emsplat.run.journal import Journal, Resolved
from emsplat.types import Grid


def note_curve(journal: Journal, fit: str, step: int, name: str, curve: Sampled, threshold: float, grid: Grid) -> None:
    """A row of the journal with the resolution of a curve; ``name`` is that of `Curves`."""
    found = resolution(curve, threshold)
    values = [round(float(value), 4) for value in curve.value]
    journal.add(Resolved(fit, step, name, threshold, math.nan if found is None else found, grid.length, values))


@torch.no_grad()
def show_slices(folder: Path, maps: Mapping[str, Tensor], grid: Grid) -> None:
    """Central slices of the map of each fit, xy, xz and yz, until `hide_slices`.

    Raises:
        OutputError: they cannot be written.
    """
    centre = grid.size // 2
    for fit, volume in maps.items():
        planes = torch.stack([volume[centre], volume[:, centre], volume[:, :, centre]])
        with writing_stack(folder / slices_name(fit), len(planes), grid) as write:
            write(planes.detach().cpu())


def hide_slices(folder: Path) -> None:
    """The maps themselves are there."""
    for path in folder.glob(slices_name("*")):
        path.unlink()
