"""Trajectories in DCD format, as CHARMM, NAMD, OpenMM, VMD and X-PLOR write them.

A DCD file is a row of Fortran records: each has its length in bytes before and after it (4 bytes each, or 8 where the
compiler was told so), in the byte order of the machine that wrote it. First come a head of 84 bytes ("CORD" and twenty
integers), titles and the number of atoms; then for every frame the unit cell, where the head has one, and x, y and z of
all atoms in float32 (Å). How many frames the head promises is not asked: programs that were stopped left a 0 there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.files import require_file

_HEAD = 84
_CELL = 48  # bytes
_TITLES = 1000  # more are no titles
_EXPECTED = "expected a trajectory in DCD format"
_LARGEST = 1e6  # Å


@dataclass(frozen=True)
class Trajectory:
    """Where the frames of a DCD file lie."""

    path: Path
    frames: int
    atoms: int
    order: str  # "<" or ">"
    marker: int  # bytes of a record's length
    start: int  # of the first frame in the file
    cell: bool  # a record of the unit cell before the coordinates

    @property
    def stride(self) -> int:
        """Bytes of a frame."""
        sizes = [*([_CELL] if self.cell else []), *[4 * self.atoms] * 3]
        return sum(sizes) + 2 * self.marker * len(sizes)

    def read(self, frames: list[int], rows: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
        """Coordinates (rows, 3) in Å of some atoms, one frame after the other.

        Raises:
            InputError: the file has changed or is damaged, or holds coordinates that are not finite.
        """
        try:
            with self.path.open("rb") as file:
                for frame in frames:
                    file.seek(self.start + frame * self.stride)
                    yield self._frame(file, frame)[rows]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); {_EXPECTED}") from error

    def _frame(self, file: BinaryIO, frame: int) -> NDArray[np.float64]:
        where = f"frame {frame + 1} of {self.frames}"
        if self.cell:
            _record(file, self, _CELL, where)
        axes = [np.frombuffer(_record(file, self, 4 * self.atoms, where), f"{self.order}f4") for _ in range(3)]
        with np.errstate(invalid="ignore"):  # a signalling NaN: refused below
            position = np.stack(axes, axis=1).astype(np.float64)
        if not (np.abs(position) < _LARGEST).all():
            raise InputError(
                f"{self.path}: {where} has coordinates that are not finite or beyond {_LARGEST:g} Å; expected Å; "
                "is the file damaged?"
            )
        return position


def _record(file: BinaryIO, head: Trajectory, size: int, where: str) -> bytes:
    """The content of the next record, which has to have that many bytes."""
    form = head.order + ("i" if head.marker == 4 else "q")
    data = file.read(size + 2 * head.marker)
    if len(data) < size + 2 * head.marker or not (
        struct.unpack(form, data[: head.marker]) == struct.unpack(form, data[-head.marker :]) == (size,)
    ):
        raise InputError(f"{head.path}: {where}: no record of {size} bytes where one has to be; is the file damaged?")
    return data[head.marker : -head.marker]


def open_dcd(path: Path) -> Trajectory:
    """What a DCD file holds, from its head and its size.

    Raises:
        InputError: it is missing, no DCD file or damaged; it holds velocities, fixed atoms or a fourth dimension, has
            no frames, or ends within one.
    """
    require_file(path, "a trajectory in DCD format")
    try:
        with path.open("rb") as file:
            return _open(path, file, path.stat().st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from error


def _open(path: Path, file: BinaryIO, size: int) -> Trajectory:
    order, marker = _layout(path, file.read(8))
    head = Trajectory(path, 0, 0, order, marker, 0, cell=False)
    file.seek(0)
    first = _record(file, head, _HEAD, "head")
    if first[:4] != b"CORD":
        raise InputError(f"{path}: holds {'velocities' if first[:4] == b'VELD' else 'no coordinates'}; {_EXPECTED}")
    words = struct.unpack(order + "20i", first[4:])
    charmm = words[19] != 0  # X-PLOR's files have none of the following
    if words[8] != 0:
        raise InputError(
            f"{path}: has {words[8]} fixed atoms, which only its first frame holds; write it again with all atoms in "
            "every frame (as VMD and catdcd do)"
        )
    if charmm and words[11] != 0:
        raise InputError(f"{path}: has coordinates in four dimensions; expected three; write it again without them")
    titles = _length(path, file, head, size)
    if titles % 80 != 4 or titles > 4 + 80 * _TITLES:
        raise InputError(f"{path}: titles of {titles} bytes; expected lines of 80; is the file damaged?")
    _record(file, head, titles, "titles")
    (atoms,) = struct.unpack(order + "i", _record(file, head, 4, "number of atoms"))
    if atoms < 1:
        raise InputError(f"{path}: {atoms} atoms; expected some; is the file damaged?")
    found = Trajectory(path, 0, atoms, order, marker, file.tell(), cell=charmm and words[10] != 0)
    frames, rest = divmod(size - found.start, found.stride)
    if frames == 0:
        raise InputError(
            f"{path}: no whole frame of {atoms:,} atoms ({size - found.start:,} bytes after its head); "
            f"{_EXPECTED}; was the file cut off?"
        )
    if rest:
        raise InputError(
            f"{path}: {rest:,} bytes beyond {frames:,} frames of {atoms:,} atoms; expected whole frames; was the "
            "file cut off while it was written or copied?"
        )
    return Trajectory(path, frames, atoms, order, marker, found.start, found.cell)


def _layout(path: Path, start: bytes) -> tuple[str, int]:
    """Byte order and the bytes of a record's length, from that of the head."""
    for order in "<>":
        if start[:4] == struct.pack(order + "i", _HEAD) and start[4:] in (b"CORD", b"VELD"):
            return order, 4
        if start == struct.pack(order + "q", _HEAD):
            return order, 8
    raise InputError(f"{path}: does not begin as a DCD file; {_EXPECTED} (CHARMM, NAMD, X-PLOR)")


def _length(path: Path, file: BinaryIO, head: Trajectory, size: int) -> int:
    """Bytes of the record that comes next, which has to lie within the file."""
    data = file.read(head.marker)
    file.seek(-len(data), 1)
    if len(data) == head.marker:
        (length,) = struct.unpack(head.order + ("i" if head.marker == 4 else "q"), data)
        if 0 < length <= size - file.tell() - 2 * head.marker:
            return int(length)
    raise InputError(f"{path}: ends within its head; {_EXPECTED}; was the file cut off?")
