"""PLY files of Gaussians as NumPy arrays; `io.ply` makes a mixture of them and says what they mean.

Nothing here loads torch, so that a report is drawn without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.files import require_file

PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3", "amplitude"),
)
_NUMPY_TYPES = {
    "float": "<f4",
    "float32": "<f4",
    "double": "<f8",
    "float64": "<f8",
    "uchar": "u1",
    "uint8": "u1",
}


@dataclass(frozen=True)
class Vertices:
    """The table of a PLY file, one record per Gaussian, and the lines of its header."""

    path: Path
    table: NDArray[Any]
    lines: list[str]

    def columns(self, *names: str) -> NDArray[np.float32]:
        """These properties of each Gaussian, (g, properties).

        Raises:
            InputError: one is not there, or values are not finite.
        """
        missing = [name for name in names if name not in (self.table.dtype.names or ())]
        if missing:
            raise InputError(f"{self.path}: has no property {missing[0]}; expected {', '.join(PROPERTIES)}")
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            values = np.stack([self.table[name].astype(np.float32) for name in names], 1)
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: {', '.join(names)} hold values that are not finite; write the file again")
        return values


def read_vertices(path: Path) -> Vertices:
    """
    Raises:
        InputError: no such file, not a PLY that emsplat wrote, or cut short.
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
    return Vertices(path, np.frombuffer(body, record, count), lines)


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
