"""Gaussians as a PLY file with the attribute names of 3D Gaussian splatting, so that its viewers open it.

Positions in Å from the box centre, ``scale_*`` the natural logarithm of the standard deviations in Å, ``rot_*`` a unit
quaternion (w, x, y, z), ``amplitude`` the integral of each Gaussian (emsplat's own; viewers ignore it). ``opacity``
(a logit) and ``f_dc_*`` (grey) are there for viewers and are not read back. Box and pixel size stand in a comment.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.files import replacing, require_file, require_finite
from emsplat.maths.geometry import quaternion_to_matrix
from emsplat.types import Gaussians, Grid

_NAMES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3", "amplitude"),
)
_UNITS = (
    "comment units: x y z in angstrom from the box centre, scale_* = ln(sigma in angstrom),"
    " rot_* = quaternion w x y z, amplitude = integral of the Gaussian in image grey values times pixels"
)
_NUMPY_TYPES = {
    "float": "<f4",
    "float32": "<f4",
    "double": "<f8",
    "float64": "<f8",
    "uchar": "u1",
    "uint8": "u1",
}


def write_ply(
    path: Path, mean: Tensor, scale: Tensor, quaternion: Tensor, amplitude: Tensor, grid: Grid, program: str
) -> None:
    """Writes (g, 3) means and scales in Å, (g, 4) quaternions and (g) amplitudes as binary little-endian PLY."""
    count = len(mean)
    peak = amplitude / scale.prod(1)
    opacity = torch.logit((peak / peak.max().clamp(min=1e-30)).clamp(0.01, 0.99))
    unit = torch.nn.functional.normalize(quaternion, dim=1)
    zeros = torch.zeros(count, 6)
    columns = torch.cat([mean, zeros, opacity[:, None], scale.log(), unit, amplitude[:, None]], 1)
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment {program}",
        f"comment box {grid.size} pixel_size {grid.pixel_size:.9g}",
        _UNITS,
        f"element vertex {count}",
        *(f"property float {name}" for name in _NAMES),
        "end_header",
    ]
    rows = columns.detach().float()
    require_finite(path, "numbers of the Gaussians", rows)
    with replacing(path) as temporary:
        temporary.write_bytes("\n".join(header).encode() + b"\n" + rows.numpy().astype("<f4").tobytes())


def read_ply(path: Path) -> tuple[Gaussians, Grid | None]:
    """The mixture in a PLY file of emsplat, and the grid it was fitted on (None when the file does not say).

    Raises:
        InputError: no such file, not a PLY that emsplat wrote, cut short, or numbers that are not finite.
    """
    require_file(path, "a PLY file of Gaussians")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a PLY file of Gaussians") from error
    head, found, body = content.partition(b"end_header\n")
    lines = head.decode("ascii", "replace").splitlines()
    if not found or not lines or lines[0] != "ply" or "format binary_little_endian 1.0" not in lines:
        raise InputError(f"{path}: not a binary little-endian PLY file; expected one that emsplat wrote")
    count, fields = _layout(path, lines)
    record = np.dtype(fields)
    if len(body) < count * record.itemsize:
        raise InputError(
            f"{path}: cut short, {count} Gaussians need {count * record.itemsize} bytes and {len(body)} are there; "
            "write it again"
        )
    table = np.frombuffer(body, record, count)

    def columns(*names: str) -> Tensor:
        missing = [name for name in names if name not in _names(table)]
        if missing:
            raise InputError(f"{path}: has no property {missing[0]}; expected {', '.join(_NAMES)}")
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            values = np.stack([table[name].astype(np.float32) for name in names], 1)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: {', '.join(names)} hold values that are not finite; write the file again")
        return torch.from_numpy(values)

    rotation = quaternion_to_matrix(columns("rot_0", "rot_1", "rot_2", "rot_3"))
    axes = rotation * columns("scale_0", "scale_1", "scale_2").exp()[:, None, :]
    covariance = axes @ axes.mT
    if not torch.isfinite(covariance).all():
        raise InputError(f"{path}: scale_* hold numbers that are too large; expected ln(sigma in Å)")
    return Gaussians(columns("x", "y", "z"), covariance, columns("amplitude")[:, 0]), _grid(path, lines)


def _grid(path: Path, lines: list[str]) -> Grid | None:
    """The grid of the comment, None where the file has no such comment."""
    line = next((line for line in lines if line.startswith("comment box ")), None)
    if line is None:
        return None
    found = re.fullmatch(r"comment box (\d{1,9}) pixel_size ([\d.e+-]+)", line)
    try:
        grid = Grid(int(found[1]), float(found[2])) if found else Grid(0, 0.0)
    except ValueError:
        grid = Grid(0, 0.0)
    if not (grid.size > 0 and 0 < grid.pixel_size < math.inf):
        raise InputError(f"{path}: '{line}' is not understood; expected 'comment box 64 pixel_size 3.54' or none")
    return grid


def _names(table: NDArray[Any]) -> tuple[str, ...]:
    return table.dtype.names or ()


def _layout(path: Path, lines: list[str]) -> tuple[int, list[tuple[str, str]]]:
    """Number of vertices and the fields of one vertex."""
    count, fields = -1, list[tuple[str, str]]()
    for words in map(str.split, lines):
        if words[:2] == ["element", "vertex"] and re.fullmatch(r"\d{1,9}", " ".join(words[2:])):
            count = int(words[2])
        elif words[:1] == ["property"]:
            if len(words) != 3 or words[1] not in _NUMPY_TYPES:
                raise InputError(f"{path}: property '{' '.join(words[1:])}' is not understood; expected float numbers")
            if words[2] in (name for name, _ in fields):
                raise InputError(f"{path}: has property {words[2]} twice; write the file again")
            fields.append((words[2], _NUMPY_TYPES[words[1]]))
    if count < 1 or not fields:
        raise InputError(f"{path}: the PLY header names no vertices; expected one vertex per Gaussian, at least one")
    return count, fields
