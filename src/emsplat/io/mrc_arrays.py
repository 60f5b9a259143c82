"""MRC files as NumPy arrays: headers, maps, and image stacks that are read image by image (MRC2014).

What is read may have any order of axes, its bytes may be signed or not, and maps may be packed with gzip or bzip2
(docs/conventions.md, 9). Nothing here loads torch, so that a report is drawn without it; `io.mrc` makes tensors of it.
"""

from __future__ import annotations

import bz2
import gzip
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from emsplat.errors import InputError

Origin = tuple[float, float, float]  # (x, y, z) in Å, where a header places voxel 0

HEADER_BYTES = 1024
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_NO_DENSITY = {
    3: "complex 16-bit integers, a transform",
    4: "complex numbers, a transform",
    16: "colours",
    101: "4-bit numbers",
}
_SAMPLED_IMAGES = 16
_IMOD_STAMP, _IMOD_SIGNED, _IMOD_4_BIT = 1146047817, 1, 16
_PIECE = 2**20  # bytes unpacked at once


class _Packing(NamedTuple):
    start: bytes  # what such a file begins with
    name: str
    remedy: str
    opened: Callable[[BinaryIO], gzip.GzipFile | bz2.BZ2File] | None  # None: not read here
    most: int  # times its length that a file may hold


_PACKINGS = (
    _Packing(b"\x1f\x8b\x08", "gzip", "gunzip", lambda file: gzip.GzipFile(fileobj=file), 1032),  # deflate's limit
    _Packing(b"BZh", "bzip2", "bunzip2", bz2.BZ2File, 10_000),
    _Packing(b"\xfd7zXZ\0", "xz", "unxz", None, 0),
    _Packing(b"\x28\xb5\x2f\xfd", "zstd", "unzstd", None, 0),
    _Packing(b"\x1f\x9d", "compress", "uncompress", None, 0),
    _Packing(b"PK\x03\x04", "zip", "unzip", None, 0),
)


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
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be unpacked ({error}); copy or download it again") from error
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise InputError(f"{path}: not a readable MRC file ({error}); expected {expected}") from error


@dataclass(frozen=True)
class _Header:
    """What an MRC header says, in the order of the file where nothing else is said."""

    path: Path
    shape: tuple[int, int, int]  # sections, rows, columns
    axes: tuple[int, int, int]  # of columns, rows, sections: 1, 2, 3 for x, y, z
    dtype: np.dtype[Any]
    offset: int  # bytes before the data
    voxel: NDArray[np.float64]  # (x, y, z) in Å, 0 where not said
    origin: Origin
    angles: NDArray[np.float64]  # of the cell in degrees, 0 where not said
    volumes: int  # in a stack of volumes, else 1
    images: bool  # sections are images
    signed: bool | None  # whether bytes are; None where IMOD's stamp does not say
    statistics: tuple[float, float, float]  # smallest, largest, mean
    version: int
    warnings: tuple[str, ...]

    @property
    def section_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Bytes that the file should have."""
        return self.offset + self.shape[0] * self.section_bytes

    def check_length(self, length: int) -> None:
        """
        Raises:
            InputError: the file is shorter than its header says, or longer by a section.
        """
        if self.offset > length:
            raise InputError(
                f"{self.path}: the header announces more header than the file is long; copy or extract it again"
            )
        if self.end > length:
            held = max(length - self.offset, 0) // self.section_bytes
            raise InputError(
                f"{self.path}: truncated, the header says {self.shape[0]} sections of {self.shape[2]} x "
                f"{self.shape[1]} and the file holds {held}; copy or extract it again"
            )
        if length - self.end >= self.section_bytes:
            raise InputError(
                f"{self.path}: {length} bytes, and the header accounts for {self.end}; the header or the copy is "
                "damaged, copy or extract it again"
            )


def _parse(path: Path, raw: bytes, expected: str) -> _Header:
    """
    Raises:
        InputError: too short, a mode without densities, axes that are not x, y and z, stacks of volumes.
    """
    if len(raw) < HEADER_BYTES:
        raise InputError(f"{path}: {len(raw)} bytes are too few for an MRC header; expected {expected}")
    header = _in_byte_order(raw)
    shape = (int(header["nz"]), int(header["ny"]), int(header["nx"]))
    mode, extended = int(header["mode"]), int(header["nsymbt"])
    order = header["mode"].dtype.byteorder
    stamp, flags = (int(word) for word in np.frombuffer(raw, np.dtype("i4").newbyteorder(order), 2, 152))
    imod = stamp == _IMOD_STAMP
    if mode == 0 and imod and flags & _IMOD_4_BIT:
        mode = 101
    if mode in _NO_DENSITY:
        raise InputError(f"{path}: MRC mode {mode} holds {_NO_DENSITY[mode]}; expected {expected} of real numbers")
    if mode not in _MODES:
        raise InputError(f"{path}: MRC mode {mode} is not supported; expected one of {sorted(_MODES)}")
    if min(shape) < 1 or extended < 0:
        raise InputError(f"{path}: the header says {shape[::-1]} points (x, y, z); not a readable MRC file")
    axes = (int(header["mapc"]), int(header["mapr"]), int(header["maps"]))
    said: tuple[str, ...] = ()
    if axes == (0, 0, 0):
        axes = (1, 2, 3)
        said = ("the header names no axes (MAPC, MAPR and MAPS are 0); x, y, z were assumed",)
    elif sorted(axes) != [1, 2, 3]:
        raise InputError(
            f"{path}: axes {axes[0]}, {axes[1]}, {axes[2]} (MAPC, MAPR, MAPS); expected 1, 2 and 3 in any order, mend "
            "the header"
        )
    cell = np.array(header["cella"].item(), float)
    sampling = np.array([header["mx"], header["my"], header["mz"]], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        voxel = np.where((sampling > 0) & np.isfinite(cell), cell / sampling, 0.0)
    group, depth = int(header["ispg"]), int(header["mz"])
    volumes = shape[0] // depth if 401 <= group <= 630 and 0 < depth < shape[0] else 1
    return _Header(
        path,
        shape,
        axes,
        np.dtype(_MODES[mode]).newbyteorder(order),
        HEADER_BYTES + extended,
        voxel,
        _origin(header, axes, voxel),
        np.array(header["cellb"].item(), float),
        volumes,
        images=axes[2] == 3 and depth == 1 < shape[0],
        signed=bool(flags & _IMOD_SIGNED) if imod else None,
        statistics=(float(header["dmin"]), float(header["dmax"]), float(header["dmean"])),
        version=int(header["nversion"]),
        warnings=said,
    )


def _in_byte_order(raw: bytes) -> NDArray[Any]:
    """The header in the byte order of the machine stamp, or in the other one where only that gives a known mode and
    axes; mode 0 is the same in both."""
    orders = "><" if raw[212:214] == b"\x11\x11" else "<>"
    headers = [np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order), 1).reshape(()) for order in orders]
    known = [header for header in headers if int(header["mode"]) in {*_MODES, *_NO_DENSITY}]
    return next((header for header in known if 0 <= int(header["mapc"]) <= 3), (known or headers)[0])


def _origin(header: NDArray[Any], axes: tuple[int, int, int], voxel: NDArray[np.float64]) -> Origin:
    """Where voxel 0 lies: ORIGIN, in Å, where it is set, else N.START, in voxels along the axes of the file.

    Programs differ in which they write and read; the one that is not 0 was meant.
    """
    said = np.array(header["origin"].item(), float)
    if not bytes(header["map"]).startswith(b"MAP") or not np.isfinite(said).all() or not said.any():
        start = [int(header[name]) for name in ("nxstart", "nystart", "nzstart")]
        said = np.array([start[axes.index(axis)] for axis in (1, 2, 3)]) * voxel
    x, y, z = said.tolist()
    return x, y, z


def _signed_bytes(header: _Header, sample: NDArray[np.uint8]) -> tuple[bool, tuple[str, ...]]:
    """Whether bytes (mode 0) are signed, as the standard says, or not, as older programs meant; and what to say of it.

    IMOD's stamp decides where it is; then the statistics of the header, which one of the two readings must give; then
    a version of the standard.
    """
    if header.signed is not None or int(sample.max()) < 128:
        return header.signed is not False, ()
    low, high, mean = header.statistics
    if low < high and low <= mean <= high:
        near = [abs(float(sample.view(kind).mean()) - mean) for kind in ("i1", "u1")]
        if (low >= 0 and 128 <= high <= 255) or near[1] < 2 < near[0]:
            return False, (
                f"bytes (mode 0) were read as 0 to 255, since the header says that values go from {low:g} to {high:g} "
                f"with a mean of {mean:g}; the standard has them signed, convert the file if that is meant",
            )
        if (low < 0 and high < 128) or near[0] < 2 < near[1]:
            return True, ()
    if header.version >= 20140:
        return True, ()
    return True, (
        "nothing in the header says whether bytes (mode 0) are signed; they were read as -128 to 127, as the standard "
        "has it; if they are 0 to 255, convert the file to another mode",
    )


@dataclass(frozen=True)
class StoredArray:
    """A cubic map as its file has it, [z, y, x]."""

    values: NDArray[np.float32]
    pixel_size: float  # Å
    origin: Origin
    warnings: tuple[str, ...]  # what was assumed, each with the name of the file


def read_array(path: Path) -> StoredArray:
    """A cubic map of any MRC mode, byte order and order of axes as float32, also packed with gzip or bzip2.

    Raises:
        InputError: missing, not MRC, truncated, not cubic, a stack of images or of volumes, no or unequal pixel sizes.
    """
    expected = "a cubic MRC map"
    with _speaking(path, expected), path.open("rb") as file:
        start = file.read(HEADER_BYTES)
        packing = _packing(start)
        if packing is not None:
            header, content = _unpacked(path, packing, file, expected)
            data = np.frombuffer(content, header.dtype, math.prod(header.shape), header.offset)
        else:
            header = _parse(path, start, expected)
            header.check_length(path.stat().st_size)
            _check_map(header)
            data = np.fromfile(path, header.dtype, math.prod(header.shape), offset=header.offset)
    said = header.warnings
    if header.angles.any() and (np.abs(header.angles - 90) > 0.1).any():
        angles = ", ".join(f"{angle:.4g}" for angle in header.angles)
        said += (f"the angles of its cell are {angles} degrees; 90 were assumed, resample the map if that is meant",)
    if header.dtype.itemsize == 1:
        signed, more = _signed_bytes(header, data.view(np.uint8))
        said, data = (*said, *more), data.view(np.int8 if signed else np.uint8)
    # Axis 0 of the data runs along axes[2]; z, y, x are wanted.
    order = [2 - header.axes.index(axis) for axis in (3, 2, 1)]
    with np.errstate(invalid="ignore"):  # signalling NaNs of float16: whoever wants finite values asks
        values = np.ascontiguousarray(data.reshape(header.shape).transpose(order).astype(np.float32))
    return StoredArray(values, float(header.voxel[0]), header.origin, tuple(f"{path}: {text}" for text in said))


def _check_map(header: _Header) -> None:
    path, shape, voxel = header.path, header.shape, header.voxel
    if header.volumes > 1:
        raise InputError(
            f"{path}: a stack of {header.volumes} volumes (ISPG 401); expected one map, in a file of its own"
        )
    if header.images:
        raise InputError(
            f"{path}: a stack of {shape[0]} images (MZ is 1); expected a map; if it is one, set MZ to NZ and ISPG to 1 "
            "in the header"
        )
    if len(set(shape)) != 1:
        x, y, z = (shape[2 - header.axes.index(axis)] for axis in (1, 2, 3))
        raise InputError(f"{path}: {x} x {y} x {z} points; expected a cubic map, pad or crop it")
    if not voxel.min() > 0 or voxel.max() / voxel.min() > 1.001:
        raise InputError(f"{path}: pixel sizes {voxel.round(4).tolist()} Å; expected one above 0, set it in the header")


def _packing(start: bytes) -> _Packing | None:
    return next((packing for packing in _PACKINGS if start.startswith(packing.start)), None)


def _unpacked(path: Path, packing: _Packing, file: BinaryIO, expected: str) -> tuple[_Header, bytearray]:
    """Header and content of a packed map; no more than the header announces, and than such a file can hold."""
    if packing.opened is None:
        raise InputError(f"{path}: packed with {packing.name}; unpack it first ({packing.remedy} {path.name})")
    most = packing.most * path.stat().st_size
    file.seek(0)
    with packing.opened(file) as inside:
        content = bytearray(inside.read(HEADER_BYTES))
        header = _parse(path, bytes(content), expected)
        _check_map(header)
        wanted = min(header.end + header.section_bytes, most)
        while len(content) < wanted and (piece := inside.read(min(_PIECE, wanted - len(content)))):
            content += piece
    header.check_length(len(content))
    return header, content


def count_sections(path: Path) -> int:
    """How many sections a stack has, also where they are volumes or not square.

    Raises:
        InputError: missing, not MRC, packed, truncated.
    """
    return _header_of_stack(path).shape[0]


def _header_of_stack(path: Path) -> _Header:
    with _speaking(path, "an MRC image stack"), path.open("rb") as file:
        start = file.read(HEADER_BYTES)
        if packing := _packing(start):
            raise InputError(
                f"{path}: packed with {packing.name}, and images are read in place; unpack it first "
                f"({packing.remedy} {path.name})"
            )
        header = _parse(path, start, "an MRC image stack")
        header.check_length(path.stat().st_size)
    return header


class _Reading:
    """A file that is open as long as somebody holds this."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self._close = os.close  # at the end of Python the module may be gone

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self._close(self.descriptor)


class StackFile:
    """An image stack on disk: ``count`` square images of ``box`` pixels, ``image_bytes`` each.

    ``pixel_size`` is the header's in Å, or None where it says 0 or exactly 1, as programs do that do not set it.
    ``warnings`` say what had to be assumed of the file.

    Raises:
        InputError: missing, not MRC, packed, truncated, images not square or of odd size, volumes instead of images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _header_of_stack(path)
        (self.count, rows, self.box) = header.shape
        if header.volumes > 1:
            raise InputError(
                f"{path}: a stack of {header.volumes} volumes (ISPG 401), as subtomograms are; expected images"
            )
        if header.axes[2] != 3:
            raise InputError(
                f"{path}: its sections are not images, they follow each other along {'xy'[header.axes[2] - 1]} (MAPS "
                f"{header.axes[2]}); expected MAPS 3, rewrite the stack"
            )
        if rows != self.box or self.box % 2:
            raise InputError(
                f"{path}: images of {self.box} x {rows} pixels; expected square images of even size, "
                "re-extract or pad them"
            )
        self.pixel_size = None if header.voxel[0] in (0.0, 1.0) else float(header.voxel[0])
        self.warnings = header.warnings
        self._dtype, self._offset, self._swapped = header.dtype, header.offset, header.axes[0] == 2
        self.image_bytes = self.box**2 * self._dtype.itemsize
        self._file: _Reading | None = None
        if self._dtype.itemsize == 1:
            signed, said = _signed_bytes(header, self._sample())
            self._dtype, self.warnings = np.dtype("i1" if signed else "u1"), (*self.warnings, *said)

    def _sample(self) -> NDArray[np.uint8]:
        """The bytes of some images, spread over the stack."""
        length = self.box**2
        chosen = np.unique(np.linspace(0, self.count - 1, _SAMPLED_IMAGES).astype(int)).tolist()
        with _speaking(self.path, "an MRC image stack"):
            images = [np.fromfile(self.path, np.uint8, length, offset=self._offset + i * length) for i in chosen]
        return np.concatenate(images)

    def read_into(self, out: NDArray[np.float32], images: Iterable[int], places: Iterable[int]) -> None:
        """Copies the images with these 0-based indices to these places of ``out`` (n, y, x)."""
        # Not a memory map: images that are read here and there would bring their surroundings into memory, and a file
        # that was cut meanwhile would end the process.
        file = self._file  # another thread may close it: it stays open while this one reads
        length = self.image_bytes
        with _speaking(self.path, "an MRC image stack"):
            if file is None:
                file = self._file = _Reading(self.path)
            for place, image in zip(places, images, strict=True):
                flat = np.frombuffer(self._read(file, self._offset + image * length, length), self._dtype)
                data = flat.reshape(self.box, self.box)
                out[place] = data.T if self._swapped else data

    def _read(self, file: _Reading, begin: int, length: int) -> bytes:
        """So many bytes; a system may give fewer at a time."""
        data = os.pread(file.descriptor, length, begin)
        while len(data) < length:
            more = os.pread(file.descriptor, length - len(data), begin + len(data))
            if not more:
                raise InputError(
                    f"{self.path}: ends after {begin + len(data):,} bytes, within an image that was there when it was "
                    "opened; something has cut it meanwhile: write or copy it again, and go on with --resume"
                )
            data += more
        return data

    def close(self) -> None:
        """Lets go of the file; the next `read_into` opens it again."""
        self._file = None
