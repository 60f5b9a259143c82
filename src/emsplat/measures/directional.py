"""Resolution by direction: Fourier slice correlation, conical FSC, and how evenly projections sample Fourier space.

Directions lie on a uniform grid of tilt (0 to 180° from +z) and rot (0 to 360° from +x towards +y).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from emsplat.errors import InputError
from emsplat.measures.curves import resolution
from emsplat.types import Curve, Grid

_FEW = 20  # frequencies
_POINTS = 2**18  # of planes at a time
_PIXELS = 2_000  # points of the sphere that frequencies are collected at for cones: 4.6° apart


@dataclass(frozen=True)
class Directions:
    """Cells of a uniform tilt-rot grid, tilt slowest."""

    tilt: Float[Tensor, " d"]  # degrees, cell centres
    rot: Float[Tensor, " d"]  # degrees, cell centres
    step: float  # degrees

    @property
    def vectors(self) -> Float[Tensor, "d 3"]:
        """Unit vectors (x, y, z)."""
        return _sphere(torch.deg2rad(self.tilt), torch.deg2rad(self.rot))

    @property
    def solid_angle(self) -> Float[Tensor, " d"]:
        """Part of the sphere that each cell covers; they add up to 1."""
        half = math.radians(self.step / 2)
        centre = torch.deg2rad(self.tilt)
        band = torch.cos(centre - half) - torch.cos(centre + half)
        return band / band.sum()


def direction_grid(step: float = 10.0) -> Directions:
    """All cells of ``step`` × ``step`` degrees; ``step`` divides 180.

    Raises:
        InputError: it does not.
    """
    rows = round(180 / step)
    if rows < 2 or not math.isclose(rows * step, 180):
        raise InputError(f"directions: step of {step:g}°; expected a divisor of 180 that is at most 90")
    tilt = (torch.arange(rows, dtype=torch.float64) + 0.5) * step
    rot = (torch.arange(2 * rows, dtype=torch.float64) + 0.5) * step
    return Directions(tilt.repeat_interleave(2 * rows), rot.repeat(rows), step)


def slice_correlation(
    a: Float[Tensor, "z y x"],
    b: Float[Tensor, "_z _y _x"],
    grid: Grid,
    directions: Directions,
    band: tuple[float, float],
) -> Float[Tensor, " d"]:
    """Fourier slice correlation of two maps: GEM, section 4.4 (Huang et al. 2024), float64.

    For each direction the normalised correlation Re Σ A* B / sqrt(Σ |A|² Σ |B|²) over the central plane of Fourier
    space perpendicular to it, i.e. of the two projections along it, for spacings from ``band[0]`` down to ``band[1]``
    Å. The three spectra are interpolated linearly between the voxels of Fourier space; planes along the axes are exact.

    Raises:
        InputError: the band holds no shell of the grid, or the maps are no cubes of its size.
    """
    size, low, high = _check_band(a, b, grid, band)
    rows = torch.arange(-high, high + 1, dtype=torch.float32)
    u, v = torch.meshgrid(rows, rows, indexing="ij")
    radius = (u**2 + v**2).sqrt()
    # The spectra are even: half of each plane is enough, half of the voxels, and one of two opposite directions.
    inside = (radius >= low - 0.5) & (radius < high + 0.5) & ((v > 0) | ((v == 0) & (u > 0)))
    u, v = u[inside], v[inside]
    spectra = torch.stack(_products(a, b))[None]
    scale = torch.tensor([2 / (size // 2), 2 / (size - 1), 2 / (size - 1)])
    shift = torch.tensor([0.0, size // 2, size // 2])
    lines, line = _lines(directions.vectors)
    out = []
    for axes in torch.split(lines.float(), max(1, _POINTS // len(u))):
        first, second = _perpendicular(axes)
        points = u[:, None] * first[:, None] + v[:, None] * second[:, None]  # d p 3: (x, y, z) in voxels of the spectra
        points = torch.where(points[..., :1] < 0, -points, points)
        place = (points + shift) * scale - 1
        found = functional.grid_sample(spectra, place[None, None], align_corners=True)[0, :, 0]
        ab, aa, bb = found.sum(-1, dtype=torch.float64)
        out.append(ab / (aa * bb).sqrt().clamp(min=1e-30))
    return torch.cat(out)[line]


def _lines(vectors: Float[Tensor, "d 3"]) -> tuple[Float[Tensor, "l 3"], Int[Tensor, " d"]]:
    """The lines along unit vectors, each once, and which of them each vector lies on."""
    steps = (vectors.double() * 2**24).round().long()
    leading = steps.gather(1, (steps != 0).long().argmax(1, keepdim=True))  # the first that is not zero
    lines, line = torch.unique(steps * leading.sign(), dim=0, return_inverse=True)
    return lines / 2**24, line


def conical_fsc(
    a: Float[Tensor, "z y x"],
    b: Float[Tensor, "_z _y _x"],
    directions: Directions,
    half_angle: float = 20.0,
) -> Float[Tensor, "d s"]:
    """FSC of two maps within a cone of ``half_angle`` degrees about each direction (Tan et al. 2017), float64.

    One value for each direction and shell 0 .. size // 2 (RELION's shells), from the sums over that shell and its two
    neighbours: a cone holds few independent frequencies, and a single shell of noise would end the curve. 1 where these
    are fewer than 20, which tell nothing. Frequencies are collected at 2,000 points of the sphere first, so the edge
    of a cone is 2° soft.
    """
    size = len(a)
    shells = size // 2 + 1
    full = torch.arange(size) - size // 2
    half = torch.arange(shells)
    points = _fibonacci(_PIXELS)
    sums = torch.zeros(4, _PIXELS * (shells + 1), dtype=torch.float64)
    products = [*_products(a, b), torch.ones(1, size, shells).expand(size, -1, -1)]
    twice = torch.where((half == 0) | (2 * half == size), 1.0, 2.0).double()
    for z, kz in enumerate(full.tolist()):
        x, y = half.float().expand(size, -1), full.float()[:, None].expand(-1, shells)
        radius = (x**2 + y**2 + kz**2).sqrt()
        inside = radius < shells - 0.5
        shell = torch.floor(radius[inside] + 0.5).long()
        vectors = torch.stack([x[inside], y[inside], torch.full_like(shell, kz).float()], 1)
        index = _nearest(vectors) * (shells + 1) + shell
        for row, product in enumerate(products):
            sums[row] += torch.bincount(index, (twice * product[z])[inside], minlength=sums.shape[1])
    table = sums.reshape(4, _PIXELS, shells + 1)[..., :shells]
    table = functional.avg_pool1d(table, 3, stride=1, padding=1)
    cosine = (directions.vectors @ points.double().T).abs()  # a cone and its opposite hold the same
    soft = 2.0
    angle = torch.rad2deg(torch.arccos(cosine.clamp(max=1)))
    weight = ((half_angle + soft - angle) / (2 * soft)).clamp(0, 1)
    ab, aa, bb, count = torch.einsum("dp,rps->rds", weight, table)
    norm = (aa * bb).sqrt()
    value = torch.where(norm > 0, ab / norm.clamp(min=1e-300), 0.0)
    return torch.where(3 * count < _FEW, 1.0, value)  # the mean over three shells


def conical_resolution(cones: Float[Tensor, "d s"], grid: Grid, threshold: float = 0.143) -> Float[Tensor, " d"]:
    """Resolution in Å of each cone: the last shell before the first drop; NaN where shell 1 is below already."""
    frequency = torch.arange(cones.shape[1], dtype=torch.float64) / grid.length
    found = [resolution(Curve(frequency, cone), threshold) for cone in cones]
    return torch.tensor([math.nan if value is None else value for value in found], dtype=torch.float64)


def view_histogram(rotation: Float[Tensor, "p 3 3"], directions: Directions) -> Float[Tensor, " d"]:
    """How many particles are seen from each cell, float64.

    ``rotation`` maps object to image coordinates (docs/conventions.md): the viewing direction in the object's frame is
    its last row. Opposite views are kept apart.
    """
    view = rotation[:, 2].double()
    tilt = torch.rad2deg(torch.arccos(view[:, 2].clamp(-1, 1)))
    rot = torch.rad2deg(torch.atan2(view[:, 1], view[:, 0])) % 360
    rows = round(180 / directions.step)
    row = (tilt / directions.step).long().clamp(max=rows - 1)
    column = (rot / directions.step).long().clamp(max=2 * rows - 1)
    return torch.bincount(row * 2 * rows + column, minlength=2 * rows * rows).double()


def fourier_sampling(rotation: Float[Tensor, "p 3 3"], symmetry: Float[Tensor, "g 3 3"]) -> Float[Tensor, "n 3+1"]:
    """How densely the particles' central planes cross 2,000 directions of Fourier space, 1 being uniform.

    Columns are (x, y, z, density). A plane counts where it passes within 2.5° of the direction. Every group element
    turns the object: its views are ``rotation`` @ element.
    """
    points = _fibonacci(_PIXELS).double()
    views = torch.zeros(_PIXELS, dtype=torch.float64)
    for element in symmetry.double():
        seen = rotation[:, 2].double() @ element
        views += torch.bincount(_nearest(seen.float()), minlength=_PIXELS)
    half = math.sin(math.radians(2.5))
    density = ((points @ points.T).abs() < half).double() @ views
    uniform = views.sum() * half  # the part of the sphere in the band
    return torch.cat([points, (density / uniform)[:, None]], 1)


def sampling_compensation(density: Float[Tensor, " n"]) -> tuple[float, float]:
    """Sampling compensation factor, and the part of all directions that no plane crosses.

    1 / <1 / density> (Baldwin & Lyumkis 2020): 1 for uniform views; it divides the SSNR, so that 0.5 costs as much as
    half of the particles. Directions without any sample would make it 0: where there are some, it is the factor of the
    sampled directions among themselves times the part of the sphere that they are.
    """
    measured = density > 0.02  # below that a voxel is regularised away
    part = float(measured.double().mean())
    if not part:
        return 0.0, 1.0
    # The mean density of the sampled directions is 1 / part.
    return part**2 * float(1 / (1 / density[measured]).mean()), 1 - part


_CELLS = 128  # per edge of a face of the cube: 0.7°


@functools.cache
def _table() -> Int[Tensor, " c"]:
    """The nearest of the `_PIXELS` points at the centre of each cell of a cube map."""
    centre = (torch.arange(_CELLS) + 0.5) / _CELLS * 2 - 1
    u, v = torch.meshgrid(centre, centre, indexing="ij")
    faces = []
    for axis in range(3):
        for sign in (1.0, -1.0):
            parts = [u, v]
            parts.insert(axis, torch.full_like(u, sign))
            faces.append(functional.normalize(torch.stack(parts, -1).reshape(-1, 3), dim=1))
    return torch.from_numpy(cKDTree(_fibonacci(_PIXELS).numpy()).query(torch.cat(faces).numpy())[1])


def _nearest(vectors: Float[Tensor, "n 3"]) -> Int[Tensor, " n"]:
    """Index of the nearest of the `_PIXELS` points on the sphere; the vectors need not be normalised."""
    longest, axis = vectors.abs().max(1)
    negative = vectors.gather(1, axis[:, None])[:, 0] < 0
    scaled = vectors / longest.clamp(min=1e-12)[:, None]
    u = torch.where(axis == 0, scaled[:, 1], scaled[:, 0])
    v = torch.where(axis == 2, scaled[:, 1], scaled[:, 2])
    row, column = (((w + 1) / 2 * _CELLS).long().clamp(0, _CELLS - 1) for w in (u, v))
    found: Tensor = _table()[((2 * axis + negative.long()) * _CELLS + row) * _CELLS + column]
    return found


def _products(a: Tensor, b: Tensor) -> list[Float[Tensor, "z y k"]]:
    """Re A* B, |A|², |B|² with kz and ky in ascending order and kx >= 0."""
    spectra = [torch.view_as_real(torch.fft.rfftn(v.float())) for v in (a, b)]
    size, half = len(a), len(a) // 2
    products = [torch.empty(size, size, half + 1) for _ in range(3)]
    for z in range(size):
        for product, (i, j) in zip(products, [(0, 1), (0, 0), (1, 1)], strict=True):
            product[(z + half) % size] = (spectra[i][z] * spectra[j][z]).sum(-1).roll(half, 0)
    return products


def _check_band(a: Tensor, b: Tensor, grid: Grid, band: tuple[float, float]) -> tuple[int, int, int]:
    size = grid.size
    if any(volume.shape != (size,) * 3 for volume in (a, b)):
        raise InputError(f"Fourier slice correlation: maps on another grid than {size}³ voxels; resample one of them")
    low, high = math.ceil(grid.length / band[0]), min(math.floor(grid.length / band[1] + 1e-6), size // 2 - 1)
    if not 1 <= low <= high:
        raise InputError(
            f"Fourier slice correlation: no shell from {band[0]:g} to {band[1]:g} Å; expected a coarser and a finer "
            f"spacing between the box ({grid.length:g} Å) and Nyquist ({grid.nyquist:g} Å)"
        )
    return size, low, high


def _perpendicular(axes: Float[Tensor, "d 3"]) -> tuple[Float[Tensor, "d 3"], Float[Tensor, "d 3"]]:
    helper = functional.one_hot(axes.abs().argmin(1), 3).to(axes.dtype)
    first = functional.normalize(torch.linalg.cross(axes, helper), dim=1)
    return first, torch.linalg.cross(axes, first)


def _sphere(tilt: Tensor, rot: Tensor) -> Tensor:
    across = torch.sin(tilt)
    return torch.stack([across * torch.cos(rot), across * torch.sin(rot), torch.cos(tilt)], 1)


def _fibonacci(count: int) -> Float[Tensor, "n 3"]:
    """Points that share the sphere almost equally (a spiral by the golden angle)."""
    i = torch.arange(count, dtype=torch.float64) + 0.5
    tilt = torch.arccos(1 - 2 * i / count)
    return _sphere(tilt, math.pi * (3 - math.sqrt(5)) * i % (2 * math.pi)).float()
