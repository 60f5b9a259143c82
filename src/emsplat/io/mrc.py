"""MRC files: cubic maps in and out, image stacks memory-mapped in and streamed out (MRC2014).

Volumes are written with mode 2, ISPG 1, MZ = NZ and origin 0; stacks with ISPG 0 and MZ = 1 (docs/conventions.md, 9).
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
from emsplat.errors import InputError
from emsplat.io.files import replacing
from emsplat.types import Grid

_HEADER_BYTES = 1024
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_DROP_AFTER = 64 * 2**20  # bytes read before mapped pages are handed back


@contextmanager
def _speaking(path: Path, expected: str) -> Iterator[None]:
    """mrcfile's and the system's complaints as one line of ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected {expected}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); expected {expected}") from error
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise InputError(f"{path}: not a readable MRC file ({error}); expected {expected}") from error


def _header(path: Path, expected: str) -> tuple[tuple[int, int, int], np.dtype[Any], int, NDArray[Any]]:
    """Shape (nz, ny, nx), number type, offset of the data and pixel sizes (x, y, z); the file is that long."""
    with _speaking(path, expected):
        length = path.stat().st_size
        if length < _HEADER_BYTES:
            raise InputError(f"{path}: {length} bytes are too few for an MRC header; expected {expected}")
        header = _read_header(path)
        shape = (int(header["nz"]), int(header["ny"]), int(header["nx"]))
        mode, extended = int(header["mode"]), int(header["nsymbt"])
        if mode not in _MODES:
            raise InputError(f"{path}: MRC mode {mode} is not supported; expected one of {sorted(_MODES)}")
        dtype = np.dtype(_MODES[mode]).newbyteorder(header["mode"].dtype.byteorder)
        cell = np.array(header["cella"].item(), float)
        sampling = np.array([header["mx"], header["my"], header["mz"]], float)
    if min(shape) < 1 or extended < 0:
        raise InputError(f"{path}: the header says {shape[::-1]} points (x, y, z); not a readable MRC file")
    offset = _HEADER_BYTES + extended
    if offset > length:
        raise InputError(f"{path}: the header announces more header than the file is long; copy or extract it again")
    needed = offset + shape[0] * shape[1] * shape[2] * dtype.itemsize
    if needed > length:
        held = max(length - offset, 0) // (shape[1] * shape[2] * dtype.itemsize)
        raise InputError(
            f"{path}: truncated, the header says {shape[0]} sections of {shape[2]} x {shape[1]} and the file holds "
            f"{held}; copy or extract it again"
        )
    if length - needed >= shape[1] * shape[2] * dtype.itemsize:
        raise InputError(
            f"{path}: {length} bytes, and the header accounts for {needed}; the header or the copy is damaged, copy or "
            "extract it again"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        voxel = np.where((sampling > 0) & np.isfinite(cell), cell / sampling, 0.0)
    return shape, dtype, offset, voxel


def _read_header(path: Path) -> NDArray[Any]:
    """The header in the byte order of the machine stamp, or in the other one where only that gives a known mode."""
    with path.open("rb") as file:
        raw = file.read(_HEADER_BYTES)
    orders = "><" if raw[212:214] == b"\x11\x11" else "<>"
    headers = [np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order)).reshape(()) for order in orders]
    return next((header for header in headers if int(header["mode"]) in _MODES), headers[0])


def read_map(path: Path) -> tuple[Float[Tensor, "z y x"], Grid]:
    """A cubic map of any MRC mode and byte order as float32, with the grid of its header.

    Raises:
        InputError: missing, not MRC, truncated, not cubic, no or unequal pixel sizes, values that are not finite.
    """
    shape, dtype, offset, voxel = _header(path, "a cubic MRC map")
    if len(set(shape)) != 1:
        raise InputError(f"{path}: {shape[2]} x {shape[1]} x {shape[0]} points; expected a cubic map")
    if not voxel.min() > 0 or voxel.max() / voxel.min() > 1.001:
        raise InputError(f"{path}: pixel sizes {voxel.round(4).tolist()} Å; expected one above 0, set it in the header")
    with _speaking(path, "a cubic MRC map"):
        data = np.fromfile(path, dtype, shape[0] ** 3, offset=offset).reshape(shape)
    if not np.isfinite(data).all():
        raise InputError(f"{path}: holds values that are not finite; expected a map of numbers")
    return torch.from_numpy(data.astype(np.float32)), Grid(shape[0], float(voxel[0]))


def write_map(path: Path, volume: Float[Tensor, "z y x"], pixel_size: float) -> None:
    """Writes a map as MRC2014 mode 2, under a temporary name until it is complete.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as temporary, mrcfile.new(temporary, overwrite=True) as file:
        file.set_data(volume.detach().cpu().numpy().astype(np.float32))
        file.set_volume()
        file.voxel_size = pixel_size
        _label(file)


def _label(file: Any) -> None:
    """The first label names the program; mrcfile's own would change with the clock."""
    file.header.nlabl = 1
    file.header.label[:] = b""
    file.header.label[0] = f"emsplat {__version__}"


def count_sections(path: Path) -> int:
    """
    Raises:
        InputError: missing, not MRC, truncated.
    """
    return _header(path, "an MRC image stack")[0][0]


class StackFile:
    """An image stack on disk, memory-mapped: ``count`` square images of ``box`` pixels.

    ``pixel_size`` is the header's in Å, or None where it says 0 or exactly 1, as programs do that do not set it.

    Raises:
        InputError: missing, not MRC, truncated, images not square or of odd size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        (self.count, rows, self.box), self._dtype, self._offset, voxel = _header(path, "an MRC image stack")
        if rows != self.box or self.box % 2:
            raise InputError(
                f"{path}: images of {self.box} x {rows} pixels; expected square images of even size, "
                "re-extract or pad them"
            )
        self.pixel_size = None if voxel[0] in (0.0, 1.0) else float(voxel[0])
        self._map: mmap.mmap | None = None
        self._since_drop = 0

    def read_into(self, out: NDArray[np.float32], images: Iterable[int], places: Iterable[int]) -> None:
        """Copies the images with these 0-based indices to these places of ``out`` (n, y, x)."""
        mapped = self._map  # another thread may close the file: it stays open while this one reads
        if mapped is None:
            with _speaking(self.path, "an MRC image stack"), self.path.open("rb") as file:
                mapped = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(mapped, self._dtype, self.count * self.box**2, self._offset)
        data = flat.reshape(self.count, self.box, self.box)
        for place, image in zip(places, images, strict=True):
            out[place] = data[image]
            self._since_drop += data[image].nbytes
        if self._since_drop > _DROP_AFTER and hasattr(mmap, "MADV_DONTNEED"):
            # Pages that were read stay in the system's cache, but no longer count as this process's memory.
            mapped.madvise(mmap.MADV_DONTNEED)
            self._since_drop = 0

    def close(self) -> None:
        """Lets go of the file; the next `read_into` opens it again."""
        self._map = None


@contextmanager
def writing_stack(
    path: Path, count: int, grid: Grid, dtype: Literal["float32", "float16"] = "float32"
) -> Iterator[Callable[[Float[Tensor, "p y x"]], None]]:
    """Streams ``count`` images into a stack: ``with writing_stack(...) as write: write(images)``.

    The file appears under its name when the block ends well.

    Raises:
        OutputError: it cannot be written.
    """
    number = np.dtype(dtype).newbyteorder("<")
    sums, extremes = np.zeros(2), [np.inf, -np.inf]
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(_HEADER_BYTES))

        def write(images: Tensor) -> None:
            data = np.ascontiguousarray(images.numpy().astype(number, copy=False))
            file.write(data.data)
            kept = torch.from_numpy(data).float().flatten(1)
            squares = torch.linalg.vector_norm(kept, dim=1).double().square()
            sums[:] += float(kept.sum(1).double().sum()), float(squares.sum())
            extremes[:] = min(extremes[0], float(kept.amin())), max(extremes[1], float(kept.amax()))

        yield write
        file.seek(0)
        file.write(_stack_header(count, grid, number, sums, extremes).tobytes())


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
