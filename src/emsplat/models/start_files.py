"""Where the Gaussians of a fit start: on the data's own map, at random, or on a model or map that the user gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.gaussians import holds_gaussians, read_gaussians
from emsplat.io.mrc import read_map, read_stored_map
from emsplat.types import Gaussians, Grid

STARTS = ("map", "ball", "uniform")
LOWPASS = 20.0  # Å; what is finer in a map that both halves start from comes from neither
_MAPS = (".mrc", ".map", ".ccp4")
_PACKED = (".gz", ".bz2")
_SURROUNDINGS = 0.1  # of the largest value


def check_start(init: str) -> None:
    """Whether a start has been named that there is.

    Raises:
        InputError: neither one of `STARTS` nor a file of Gaussians, an atomic model or a map.
    """
    choices = "expected map, ball, uniform or a file named .ply, .cif, .pdb or .mrc"
    if init in STARTS:
        return
    if not holds_gaussians(Path(init)) and not _is_map(Path(init)):
        raise InputError(f"--init {init}: {choices}")
    for path in {start_file(init, name) for name in ("half1", "half2", "class001")}:
        if not path.is_file():
            raise InputError(f"--init {path}: no such file; {choices}")


def _is_map(path: Path) -> bool:
    """By its name, which may end in .gz or .bz2."""
    inside = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return inside.suffix.lower() in _MAPS


def starts_from_gaussians(init: str) -> bool:
    """Whether the start is a file that says how many Gaussians there are."""
    return init not in STARTS and holds_gaussians(Path(init))


def is_shared(init: str) -> bool:
    """Whether both half-sets start from the same file."""
    return init not in STARTS and start_file(init, "half1") == start_file(init, "half2")


def start_file(init: str, name: str) -> Path:
    """The file that the fit of half1, half2 or class001 starts from.

    Where the file's name contains half1 or half2, each half takes its own, as RELION finds the other half map.
    """
    path = Path(init)
    return path.with_name(re.sub("half[12]", name, path.name)) if name.startswith("half") else path


def read_start(init: str, grid: Grid, name: str = "class001") -> Gaussians | Float[Tensor, "z y x"] | None:
    """The Gaussians or the map, on ``grid``, that the `start_file` of a fit gives; None for a start without a file.

    Atomic models are taken to lie in a map of ``grid`` with MRC origin 0. Maps may have another box and pixel size.

    Raises:
        InputError: the file cannot be read, or what it holds is not where the particle is.
    """
    if init in STARTS:
        return None
    check_start(init)
    path = start_file(init, name)
    if not starts_from_gaussians(init):
        return _low_resolution(path, grid)
    return read_fitted(path, grid)


def start_remarks(init: str, grid: Grid) -> list[str]:
    """What had to be assumed of the maps that a run starts from, and headers that put them elsewhere than we do.

    Raises:
        InputError: through `read_stored_map`.
    """
    if init in STARTS or starts_from_gaussians(init):
        return []
    remarks: list[str] = []
    ours = grid.size // 2 * grid.pixel_size
    for path in dict.fromkeys(start_file(init, name) for name in ("half1", "half2", "class001")):
        stored = read_stored_map(path)
        remarks += stored.warnings
        centre = [start + stored.grid.size // 2 * stored.grid.pixel_size for start in stored.origin]
        # 0 is what programs say that write no position, and the centre at 0 what those that put the origin there do.
        known = any(stored.origin) and max(map(abs, centre)) > stored.grid.pixel_size
        if known and max(abs(c - ours) for c in centre) > 0.5 * grid.pixel_size:
            apart = ", ".join(f"{c - ours:.4g}" for c in centre)
            remarks.append(
                f"{path}: its header (NXSTART or ORIGIN) puts the centre of its box ({apart}) Å from that of the "
                "images; the centres were put on each other. If the header is right, resample it onto the map of the "
                "particle first (in ChimeraX: volume resample)"
            )
    return remarks


def read_fitted(path: Path, grid: Grid, origin: Sequence[float] = (0.0, 0.0, 0.0)) -> Gaussians:
    """Gaussians, or the atoms of a model, that lie in a map of ``grid`` whose voxel 0 is at ``origin`` (x, y, z in Å).

    Raises:
        InputError: the file cannot be read, or what it holds is not where the particle is.
    """
    gaussians, _ = read_gaussians(path, grid)
    gaussians = replace(gaussians, mean=gaussians.mean - torch.tensor(origin, dtype=gaussians.mean.dtype))
    mass = gaussians.amplitude.clamp(min=0)
    inside = (gaussians.mean.abs() < grid.length / 2).all(1)
    if not float(mass.sum()) > 0:
        raise InputError(
            f"{path}: has no amplitude above 0; expected Gaussians of bright protein; are they of an inverted map?"
        )
    if float(mass[inside].sum()) < 0.9 * float(mass.sum()):
        raise InputError(
            f"{path}: {float(mass[~inside].sum() / mass.sum()):.0%} of it lies outside the box of {grid.length:.0f} Å; "
            "fit it into the map of the particle first"
        )
    return gaussians


def _low_resolution(path: Path, grid: Grid) -> Float[Tensor, "z y x"]:
    """A map of any box and pixel size on our grid, box centre on box centre, as a start that both halves may share.

    Amplitudes are multiplied by exp(-(k d)²), d = `LOWPASS`, which suppresses 10 Å fifty times. Below a tenth of the
    largest value are surroundings, 0, as everything beyond the box of the map.
    """
    volume, own = read_map(path)
    if own.length < grid.length / 2:
        raise InputError(
            f"{path}: {own.size} voxels of {own.pixel_size:g} Å span {own.length:.0f} Å, the images {grid.length:.0f} "
            "Å; expected a map of the whole particle, is the pixel size in its header right?"
        )
    width = max(LOWPASS, 2 * grid.nyquist) / (np.pi * np.sqrt(2)) / own.pixel_size
    smooth = gaussian_filter(volume.numpy(), width, mode="constant")
    axis = (np.arange(grid.size) - grid.size // 2) * grid.pixel_size / own.pixel_size + own.size // 2
    points = np.meshgrid(axis, axis, axis, indexing="ij")
    start = map_coordinates(smooth, points, order=1, mode="constant")
    highest, around = float(start.max()), float(np.median([start[[0, -1]], start[:, [0, -1]].swapaxes(0, 1)]))
    if around - float(start.min()) > highest - around:
        raise InputError(
            f"{path}: its density reaches further below its surroundings than above them; expected a map with bright "
            "protein; is it inverted (protein dark)? Then multiply it by -1"
        )
    if not highest > 0:
        raise InputError(
            f"{path}: has no density above 0; expected a map with bright protein; is it empty or inverted?"
        )
    return torch.from_numpy(np.where(start > _SURROUNDINGS * highest, start, 0.0).astype(np.float32))
