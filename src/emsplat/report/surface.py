"""Isosurfaces of the full map, small enough to travel inside one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emsplat.errors import InputError
from emsplat.report import read
from emsplat.report.resample import resample
from emsplat.run.files import FULL_MAP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNIT = 0.1  # Å; vertices are whole multiples of it, which halves their size in the page
_LARGEST = 72  # voxels along the longest axis of the map that is drawn
_BUDGET = 2_200_000  # bytes of all meshes; a page holds 4/3 of it, as base64
_STEPS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5)  # levels relative to the default
_FILLED = 0.4  # part of the mask that the surface encloses at the default level
_ABOVE_NOISE = 3  # standard deviations of the surroundings that the lowest level keeps
_MARGIN = 2  # voxels kept around the mask


@dataclass(frozen=True)
class Mesh:
    """One isosurface: vertices (n, 3) as x, y, z in `UNIT` from the box centre, triangles (m, 3) of vertices.

    Seen from outside the corners of a triangle go round anticlockwise.
    """

    level: float  # in standard deviations of the map
    vertices: NDArray[np.int16]
    triangles: NDArray[np.unsignedinteger]
    resolution: NDArray[np.float32] | None  # (n) local resolution in Å

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        colours = 0 if self.resolution is None else self.resolution.nbytes
        return self.vertices.nbytes + self.triangles.nbytes + colours


@dataclass(frozen=True)
class Surface:
    """Isosurfaces at several levels, the place of the default one among them, and the voxel that they resolve in Å."""

    meshes: list[Mesh]
    default: int
    voxel: float
    is_reduced: bool  # whether that is larger than the voxel of the map


def make_surface(
    volume: read.Volume, mask: NDArray[np.bool_] | None, local: NDArray[np.float32] | None, run: Path
) -> Surface:
    """Isosurfaces of a map around the level that encloses 0.4 of its mask (3 standard deviations without one).

    All are above the noise outside the mask.

    The map is cut to the bounding box of the mask and reduced by Fourier cropping until the meshes fit the page.

    Raises:
        InputError: the map is flat, so that no level has a surface.
    """
    spread = float(volume.values.std())
    corner, shape = _bounding_box(mask, volume.values.shape)
    box = tuple(slice(start, start + size) for start, size in zip(corner, shape, strict=True))
    part = volume.values[box]
    inside = None if mask is None else mask[box]
    least = _least_level(part, inside, spread)
    default = max(_default_level(part, inside, spread), least)
    levels = sorted({round(step * default, 1) for step in _STEPS if step * default >= least})
    centre = [size // 2 - start for size, start in zip(volume.values.shape, corner, strict=True)]
    known = None if local is None else _filled(local[box])
    size = _LARGEST
    while True:
        reduced, step = _reduce(part, size)
        meshes = [
            _mesh(reduced, level, spread, step, centre, volume.pixel_size, known)
            for level in levels
            if reduced.min() < level * spread < reduced.max()
        ]
        used = sum(mesh.nbytes for mesh in meshes)
        if used <= _BUDGET or size <= 16:
            break
        size = max(16, int(0.97 * size * math.sqrt(_BUDGET / used)))  # the area of a surface grows with size²
    if not meshes:
        why = "inverted (protein dark)" if -float(part.min()) > float(part.max()) else "empty"
        raise InputError(
            f"{run / FULL_MAP}: no level has a surface (standard deviation {spread:g}); expected a map with "
            f"bright protein; is it {why}?"
        )
    nearest = min(range(len(meshes)), key=lambda i: abs(meshes[i].level - default))
    return Surface(meshes, nearest, max(step) * volume.pixel_size, max(step) > 1)


def _default_level(part: NDArray[np.float32], inside: NDArray[np.bool_] | None, spread: float) -> float:
    """The level in standard deviations that encloses the wanted part of the mask; 3 where that says nothing."""
    import numpy as np

    if inside is None or not inside.any() or not spread > 0:
        return 3.0
    level = float(np.quantile(part[inside], 1 - _FILLED)) / spread
    return level if level >= 0.2 else 3.0


def _least_level(part: NDArray[np.float32], inside: NDArray[np.bool_] | None, spread: float) -> float:
    """3 standard deviations of what surrounds the mask: below, noise would hide the particle and fill the page."""
    if inside is None or inside.all() or not inside.any() or not spread > 0:
        return 0.0
    return _ABOVE_NOISE * float(part[~inside].std()) / spread


def _bounding_box(mask: NDArray[np.bool_] | None, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """First voxel and extent of the box around the mask with its margin; the whole map without a mask."""
    import numpy as np

    if mask is None or not mask.any():
        return [0] * len(shape), list(shape)
    corner, extent = [], []
    for axis, size in enumerate(shape):
        filled = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        first = max(0, int(filled[0]) - _MARGIN)
        corner.append(first)
        extent.append(min(size, int(filled[-1]) + 1 + _MARGIN) - first)
    return corner, extent


def _reduce(part: NDArray[np.float32], size: int) -> tuple[NDArray[np.float32], list[float]]:
    """The map with at most ``size`` voxels along its longest axis, and the old voxels per new one along each."""
    import numpy as np

    factor = min(1.0, size / max(part.shape))
    reduced = part
    for axis, old in enumerate(part.shape):
        new = max(2, round(old * factor))
        if new < old:
            reduced = resample(reduced, new, axis=axis)
    return np.asarray(reduced, np.float32), [a / b for a, b in zip(part.shape, reduced.shape, strict=True)]


def _filled(local: NDArray[np.float32]) -> NDArray[np.float32]:
    """The local resolution with unknown voxels taking the value of the nearest known one."""
    import numpy as np
    from scipy.ndimage import distance_transform_edt

    unknown = np.isnan(local)
    if unknown.all():
        return local
    nearest = distance_transform_edt(unknown, return_distances=False, return_indices=True)
    filled: NDArray[np.float32] = local[tuple(np.asarray(nearest))]
    return filled


def _mesh(
    reduced: NDArray[np.float32],
    level: float,
    spread: float,
    step: Sequence[float],
    centre: Sequence[int],
    pixel_size: float,
    local: NDArray[np.float32] | None,
) -> Mesh:
    """The isosurface at ``level`` standard deviations, coloured from the local resolution on the unreduced grid."""
    import numpy as np
    from scipy.ndimage import map_coordinates
    from skimage.measure import marching_cubes

    # A frame of low density closes the surface where it leaves the box.
    framed = np.pad(reduced, 1, constant_values=float(reduced.min()))
    vertices, triangles, _, _ = marching_cubes(framed, level * spread)
    voxel = (vertices - 1) * np.asarray(step)  # z, y, x on the unreduced grid
    angstrom = (voxel - np.asarray(centre))[:, ::-1] * pixel_size
    colours = None if local is None else map_coordinates(local, voxel.T, order=1, mode="nearest").astype(np.float32)
    return Mesh(
        level,
        np.clip(np.rint(angstrom / UNIT), -32768, 32767).astype(np.int16),
        triangles.astype(np.uint16 if len(vertices) < 2**16 else np.uint32),
        colours,
    )
