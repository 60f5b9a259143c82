"""MRC files and tensors: cubic maps in and out, image stacks streamed out (MRC2014). `mrc_arrays` reads.

Volumes are written with mode 2, ISPG 1, MZ = NZ and origin 0; stacks with ISPG 0 and MZ = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mrcfile
import numpy as np
import torch
from jaxtyping import Float
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray
from torch import Tensor

from emsplat import __version__
from emsplat.errors import InputError, OutputError
from emsplat.io.files import replacing, require_finite
from emsplat.io.mrc_arrays import HEADER_BYTES, Origin, read_array
from emsplat.types import Grid

_SAME_PLACE = 0.01  # voxels
_ROUNDING = 0.01  # of the standard deviation of an image


@dataclass(frozen=True)
class StoredMap:
    """A cubic map as its file has it."""

    volume: Float[Tensor, "z y x"]
    grid: Grid
    origin: Origin
    warnings: tuple[str, ...]  # what was assumed, each with the name of the file


def read_map(path: Path) -> tuple[Float[Tensor, "z y x"], Grid]:
    """Density and grid of `read_stored_map`."""
    stored = read_stored_map(path)
    return stored.volume, stored.grid


def read_stored_map(path: Path) -> StoredMap:
    """A cubic map of any MRC mode, byte order and order of axes as float32, also packed with gzip or bzip2.

    Raises:
        InputError: missing, not MRC, truncated, not cubic, a stack of images or of volumes, no or unequal pixel sizes,
            values that are not finite.
    """
    stored = read_array(path)
    if not np.isfinite(stored.values).all():
        raise InputError(f"{path}: holds values that are not finite; expected a map of numbers")
    grid = Grid(len(stored.values), stored.pixel_size)
    return StoredMap(torch.from_numpy(stored.values), grid, stored.origin, stored.warnings)


def misplaced(first: str, second: str, shift: Iterable[float], grid: Grid) -> str | None:
    """A line about two maps of a grid that their headers put ``shift`` Å (x, y, z) apart; None where they do not.

    Maps are compared voxel by voxel as they are stored, since positions in headers cannot be relied on: many programs
    write none, some put the origin of coordinates into the corner and some into the centre of the box.
    """
    voxels = [distance / grid.pixel_size for distance in shift]
    if max(map(abs, voxels)) < _SAME_PLACE:
        return None
    apart = ", ".join(f"{voxel:.4g}" for voxel in voxels)
    half = all(abs(abs(voxel) - grid.size // 2) < 1 for voxel in voxels)
    return (
        f"{second}: its header (NXSTART or ORIGIN) puts it ({apart}) voxels away from {first}; both were taken voxel "
        "by voxel as they are stored. "
        + (
            "Half a box: one program puts the origin into the corner of the box and another into its centre, so that "
            "nothing needs to be done"
            if half
            else "If that is right, resample one onto the other (in ChimeraX: volume resample); if not, set both to 0"
        )
    )


def write_map(path: Path, volume: Float[Tensor, "z y x"], pixel_size: float, origin: Origin = (0.0, 0.0, 0.0)) -> None:
    """Writes a map as MRC2014 mode 2, under a temporary name until it is complete. Voxel 0 lies at ``origin`` (x, y, z
    in Å).

    Raises:
        OutputError: it cannot be written, or holds values that are not finite.
    """
    with np.errstate(over="ignore"):  # refused below
        data = volume.detach().cpu().numpy().astype(np.float32)
    require_finite(path, "voxels", data)
    with replacing(path) as temporary, mrcfile.new(temporary, overwrite=True) as file:
        file.set_data(data)
        file.set_volume()
        file.voxel_size = pixel_size
        file.header.origin = origin
        _label(file)


def _label(file: Any) -> None:
    """The first label names the program; mrcfile's own would change with the clock."""
    file.header.nlabl = 1
    file.header.label[:] = b""
    file.header.label[0] = f"emsplat {__version__}"


@contextmanager
def writing_stack(
    path: Path, count: int, grid: Grid, dtype: Literal["float32", "float16"] = "float32"
) -> Iterator[Callable[[Float[Tensor, "p y x"]], None]]:
    """Streams ``count`` images into a stack: ``with writing_stack(...) as write: write(images)``.

    The file appears under its name when the block ends well. float16 holds numbers from 6e-8 to 65504 with three
    digits: images that would lose more than a hundredth of their standard deviation are refused, since a factor for the
    whole stack is not known before its last image.

    Raises:
        OutputError: it cannot be written; values are not finite or do not fit the type.
    """
    number = np.dtype(dtype).newbyteorder("<")
    sums, extremes = np.zeros(2), [np.inf, -np.inf]
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER_BYTES))

        def write(images: Tensor) -> None:
            with np.errstate(over="ignore"):  # refused below
                data = np.ascontiguousarray(images.numpy().astype(number, copy=False))
            require_finite(path, "pixels", images)
            if number.itemsize == 2:
                _require_narrow(path, images.flatten(1), torch.from_numpy(data).float().flatten(1))
            file.write(data.data)
            kept = torch.from_numpy(data).float().flatten(1)
            squares = torch.linalg.vector_norm(kept, dim=1).double().square()
            sums[:] += float(kept.sum(1).double().sum()), float(squares.sum())
            extremes[:] = min(extremes[0], float(kept.amin())), max(extremes[1], float(kept.amax()))

        yield write
        file.seek(0)
        file.write(_stack_header(count, grid, number, sums, extremes).tobytes())


def _require_narrow(path: Path, images: Float[Tensor, "p x"], narrow: Float[Tensor, "p x"]) -> None:
    """
    Raises:
        OutputError: rounding to float16 changes images by more than `_ROUNDING` of their standard deviation.
    """
    lost = (narrow - images).square().mean(1)
    bad = int((~(lost <= _ROUNDING**2 * images.var(1, correction=0))).sum())
    if bad:
        low, high = (float(value) for value in images.aminmax())
        raise OutputError(
            f"{path}: {bad:,} of {len(images):,} images with grey values from {low:.4g} to {high:.4g} do not fit "
            "float16 (up to 65504, three digits); normalise them (leave out --no-normalise) or write --dtype float32"
        )


def _stack_header(
    count: int, grid: Grid, number: np.dtype[Any], sums: NDArray[Any], extremes: list[float]
) -> NDArray[Any]:
    header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
    header["nx"] = header["ny"] = header["mx"] = header["my"] = grid.size
    header["nz"], header["mz"], header["ispg"] = count, 1, 0
    header["mode"] = 12 if number.itemsize == 2 else 2
    header["cella"] = (grid.length, grid.length, grid.pixel_size)
    header["cellb"] = (90, 90, 90)
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    header["map"], header["machst"] = b"MAP ", [0x44, 0x44, 0, 0]
    header["nversion"] = 20141
    mean, square = sums / (count * grid.size**2)
    header["dmin"], header["dmax"] = extremes
    header["dmean"], header["rms"] = mean, np.sqrt(max(square - mean**2, 0.0))
    header["nlabl"] = 1
    header["label"][0] = f"emsplat {__version__}"
    return header
