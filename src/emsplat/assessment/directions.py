"""How the resolution depends on the direction, and how directions are sampled."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emsplat.assessment.maps import FIRST_SHELLS
from emsplat.io.files import number_text, replacing
from emsplat.maths.groups import Symmetry
from emsplat.measures.directional import (
    conical_fsc,
    conical_resolution,
    direction_grid,
    fourier_sampling,
    sampling_compensation,
    slice_correlation,
    view_histogram,
)
from emsplat.run.files import DIRECTIONS
from emsplat.types import Grid

_STEP = 10.0  # degrees


Pair = tuple[Tensor, Tensor]


def directions(
    folder: Path, halves: Pair, data: Pair | None, grid: Grid, fine: float, rotation: Tensor | None, symmetry: Symmetry
) -> dict[str, Any]:
    """Writes directions.csv into a folder and returns its summary.

    Slices through two half maps in their mask go down to ``fine`` Å. Cones go through ``data``, their back-projections
    in the same mask; None: the half maps are such. Where ``rotation`` is known the views of the particles are added,
    under ``symmetry``.
    """
    cells = direction_grid(_STEP)
    coarse = grid.length / FIRST_SHELLS
    band = (coarse, min(coarse, max(fine, grid.length / (grid.size // 2 - 1))))  # in a wrong mask none may be finer
    slices = slice_correlation(*halves, grid, cells, band)
    cones = conical_resolution(conical_fsc(*(data or halves), cells), grid)
    columns = {"rot": cells.rot, "tilt": cells.tilt, "fslc": slices, "conical_resolution": cones}
    weight = cells.solid_angle
    mean = float((weight * slices).sum())
    defined = cones[cones.isfinite()]
    about: dict[str, Any] = {
        "fslc_mean": round(mean, 5),
        "fslc_std": round(float((weight * (slices - mean) ** 2).sum().sqrt()), 5),
        "band": [round(end, 3) for end in band],
        "conical_best": round(float(defined.min()), 3) if len(defined) else None,
        "conical_worst": round(float(defined.max()), 3) if len(defined) else None,
        "conical_of": "half maps" if data is None else "back-projections",
    }
    if rotation is not None:
        density = fourier_sampling(rotation, symmetry.elements)
        factor, unsampled = sampling_compensation(density[:, 3])
        about |= {"sampling_compensation": round(factor, 4), "unsampled": round(unsampled, 4)}
        nearest = (cells.vectors @ density[:, :3].T).argmax(1)
        views = torch.stack([view_histogram(rotation @ element, cells) for element in symmetry.elements]).mean(0)
        columns |= {"sampling": density[nearest, 3], "particles": views}
    with (
        replacing(folder / DIRECTIONS) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        writer.writerows(map(number_text, row) for row in rows)
    return about
