"""How the resolution depends on the direction, and how directions are sampled."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emsplat.assessment.maps import FIRST_SHELLS, RunMaps
from emsplat.io.files import number_text, replacing
from emsplat.measures.directional import (
    conical_fsc,
    conical_resolution,
    direction_grid,
    fourier_sampling,
    sampling_compensation,
    slice_correlation,
    view_histogram,
)

_STEP = 10.0  # degrees


def directions(run: Path, maps: RunMaps, fine: float, rotation: Tensor | None, group: Tensor) -> dict[str, Any]:
    """Writes directions.csv: slices through the half maps down to ``fine`` Å, cones through the back-projections, and
    where ``rotation`` is known the views of the particles under the symmetry ``group``; returns their summary."""
    grid, cells = maps.grid, direction_grid(_STEP)
    coarse = grid.length / FIRST_SHELLS
    band = (coarse, min(coarse, max(fine, grid.length / (grid.size // 2 - 1))))  # in a wrong mask none may be finer
    masked = [half * maps.mask for half in maps.halves]
    slices = slice_correlation(masked[0], masked[1], grid, cells, band)
    data = [half * maps.mask for half in maps.data]
    cones = conical_resolution(conical_fsc(data[0], data[1], cells), grid)
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
        "conical_of": "back-projections" if maps.raw else "half maps",
    }
    if rotation is not None:
        density = fourier_sampling(rotation, group)
        factor, unsampled = sampling_compensation(density[:, 3])
        about |= {"sampling_compensation": round(factor, 4), "unsampled": round(unsampled, 4)}
        nearest = (cells.vectors @ density[:, :3].T).argmax(1)
        views = torch.stack([view_histogram(rotation @ element, cells) for element in group]).mean(0)
        columns |= {"sampling": density[nearest, 3], "particles": views}
    with (
        replacing(run / "directions.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        writer.writerows(map(number_text, row) for row in rows)
    return about
