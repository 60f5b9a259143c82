"""The linear stage and the sums of cells as files: what a run goes on from, or another run of the same particles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.errors import InputError
from emsplat.heterogeneity.cells import Cells
from emsplat.heterogeneity.search import Search, packed, unpacked
from emsplat.io.tensors import write_tensors
from emsplat.parallel import World
from emsplat.types import Grid

_CELLS = ("linear", "response", "point", "particles", "noise")


def save_search(path: Path, search: Search, particles: str) -> None:
    """``particles`` is the fingerprint of all particles with their half-sets.

    Raises:
        OutputError: it cannot be written.
    """
    about, tensors = packed(search)
    about["particles"] = particles
    write_tensors(path, {k: v.contiguous() for k, v in tensors.items()}, {"emsplat.search": json.dumps(about)})


def read_search(path: Path, particles: str) -> Search:
    """What `save_search` wrote.

    Raises:
        InputError: it is missing, damaged, something else, or of other particles.
    """
    with _opened(path, "search", particles) as (about, own):
        return unpacked(about, own)


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


def spread_cells(cells: Cells | None, world: World) -> Cells:
    """What the first process has, in all of them."""
    if cells is not None and world.size == 1:
        return cells
    numbers = [] if cells is None else [cells.grid.size, cells.grid.pixel_size, cells.blur]
    size, pixel_size, blur = json.loads(world.told(json.dumps(numbers)))
    own = world.spread_named({} if cells is None else {name: getattr(cells, name).contiguous() for name in _CELLS})
    return Cells(Grid(size, pixel_size), **own, blur=blur)


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
