"""The linear stage and the sums of cells as files: what a run goes on from, or another run of the same particles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.errors import InputError
from emsplat.heterogeneity.cells import Cells
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.evidence import Gain
from emsplat.heterogeneity.search import Found, Search
from emsplat.heterogeneity.subspace import Placement, Subspace, posterior
from emsplat.io.tensors import write_tensors
from emsplat.sums.lattice import Lattice
from emsplat.types import Grid

_CELLS = ("linear", "response", "point", "particles", "noise")


def save_search(path: Path, search: Search, particles: str) -> None:
    """``particles`` is the fingerprint of all particles with their half-sets.

    Raises:
        OutputError: it cannot be written.
    """
    about: dict[str, Any] = {
        "particles": particles,
        "components": [asdict(gain) for gain in search.components],
        "points": [[number, asdict(gain)] for number, gain in search.points.items()],
    }
    tensors: dict[str, Tensor] = {}
    for half, own in enumerate(search.subspaces):
        about[f"subspace{half}"] = {"radius": own.lattice.radius, "placement": asdict(own.placement)}
        tensors |= {f"subspace{half}.maps": own.maps, f"subspace{half}.power": own.power}
    if (found := search.found) is not None:
        about["count"] = found.count
        for half in (0, 1):
            density = found.densities[half]
            tensors |= {f"density{half}.point": density.point, f"density{half}.weight": density.weight}
            tensors[f"brightness{half}"] = found.brightness[half]
            for other in (0, 1):
                latents = found.latents[half][other]
                tensors |= {f"latents{half}{other}.b": latents.linear, f"latents{half}{other}.a": latents.quadratic}
    write_tensors(path, {k: v.contiguous() for k, v in tensors.items()}, {"emsplat.search": json.dumps(about)})


def read_search(path: Path, particles: str) -> Search:
    """What `save_search` wrote.

    Raises:
        InputError: it is missing, damaged, something else, or of other particles.
    """
    with _opened(path, "search", particles) as (about, own):
        subspaces = [
            Subspace(
                Lattice(int(about[f"subspace{half}"]["radius"])),
                own[f"subspace{half}.maps"],
                own[f"subspace{half}.power"],
                Placement(**about[f"subspace{half}"]["placement"]),
            )
            for half in (0, 1)
        ]
        gains = [Gain(**gain) for gain in about["components"]]
        points = {int(number): Gain(**gain) for number, gain in about["points"]}
        if "count" not in about:
            return Search((subspaces[0], subspaces[1]), gains, points, None)
        densities = [Density(own[f"density{half}.point"], own[f"density{half}.weight"]) for half in (0, 1)]
        latents = [
            [posterior(own[f"latents{half}{other}.b"], own[f"latents{half}{other}.a"]) for other in (0, 1)]
            for half in (0, 1)
        ]
        found = Found(
            int(about["count"]),
            (densities[0], densities[1]),
            ((latents[0][0], latents[0][1]), (latents[1][0], latents[1][1])),
            (own["brightness0"], own["brightness1"]),
        )
        return Search((subspaces[0], subspaces[1]), gains, points, found)


def save_cells(path: Path, cells: Cells, particles: str) -> None:
    """
    Raises:
        OutputError: it cannot be written.
    """
    about = {"particles": particles, "size": cells.grid.size, "pixel_size": cells.grid.pixel_size, "blur": cells.blur}
    tensors = {name: getattr(cells, name).contiguous() for name in _CELLS}
    write_tensors(path, tensors, {"emsplat.cells": json.dumps(about)})


def read_cells(path: Path, particles: str) -> Cells:
    """What `save_cells` wrote.

    Raises:
        as `read_search`.
    """
    with _opened(path, "cells", particles) as (about, own):
        grid = Grid(int(about["size"]), float(about["pixel_size"]))
        return Cells(grid, **{name: own[name] for name in _CELLS}, blur=float(about["blur"]))


@contextmanager
def _opened(path: Path, kind: str, particles: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()[f"emsplat.{kind}"])
            # Copies lie where vectors want them, as in the run that made them: sums round alike.
            own = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if about["particles"] != particles:
            raise InputError(f"{path}: is of other particles, or of the same with other poses, optics or half-sets")
        yield about, own
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not the {kind} of a heterogeneous run, or damaged ({error})") from error
