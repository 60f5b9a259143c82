"""Gaussians as a PLY file with the attribute names of 3D Gaussian splatting, so that its viewers open it.

Positions in Å from the box centre, ``scale_*`` the natural logarithm of the standard deviations in Å, ``rot_*`` a unit
quaternion (w, x, y, z), ``amplitude`` the integral of each Gaussian (emsplat's own; viewers ignore it). ``opacity``
(a logit) and ``f_dc_*`` (grey) are there for viewers and are not read back. Box and pixel size stand in a comment.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.files import replacing, require_finite
from emsplat.io.ply_arrays import PROPERTIES, read_vertices
from emsplat.maths.geometry import quaternion_to_matrix
from emsplat.types import Gaussians, Grid

_UNITS = (
    "comment units: x y z in angstrom from the box centre, scale_* = ln(sigma in angstrom),"
    " rot_* = quaternion w x y z, amplitude = integral of the Gaussian in image grey values times pixels"
)


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
        *(f"property float {name}" for name in PROPERTIES),
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
    table = read_vertices(path)

    def columns(*names: str) -> Tensor:
        return torch.from_numpy(table.columns(*names))

    rotation = quaternion_to_matrix(columns("rot_0", "rot_1", "rot_2", "rot_3"))
    axes = rotation * columns("scale_0", "scale_1", "scale_2").exp()[:, None, :]
    covariance = axes @ axes.mT
    if not torch.isfinite(covariance).all():
        raise InputError(f"{path}: scale_* hold numbers that are too large; expected ln(sigma in Å)")
    return Gaussians(columns("x", "y", "z"), covariance, columns("amplitude")[:, 0]), _grid(path, table.lines)


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
