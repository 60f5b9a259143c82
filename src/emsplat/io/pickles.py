"""Pickles of numpy arrays, as cryoDRGN keeps its parameters in.

A pickle is a programme that runs when it is read. The reader here knows five names, all of which build numpy arrays,
and refuses every other.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.files import replacing


def write_arrays(path: Path, arrays: NDArray[Any] | tuple[NDArray[Any], ...]) -> None:
    """Arrays of numbers as a pickle that every numpy can read.

    Raises:
        OutputError: it cannot be written.
    """
    # Protocol 2 names numpy's function once, before any data; under its old name every numpy finds it.
    data = pickle.dumps(arrays, protocol=2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_arrays(path: Path) -> Any:
    """What a pickle holds, if it is made of numpy arrays of numbers, tuples, lists and numbers alone.

    Raises:
        InputError: it is missing, damaged, or names anything else; nothing of it has run.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a pickle of cryoDRGN")
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except _RefusedError as error:
        raise InputError(
            f"{path}: asks for {error}, which no array needs; the file is refused and nothing of it has run; expected "
            "a pickle written by cryodrgn parse_pose_star or parse_ctf_star"
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read as a pickle ({type(error).__name__}: {text}); expected arrays; was it cut off?"
        ) from error


class _RefusedError(Exception):
    """A pickle named something that is not on the list."""


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("multiarray", "_reconstruct"): _reconstruct,
            ("numeric", "_frombuffer"): _from_buffer,
            ("_codecs", "encode"): _encode,
        }
        parts = module.split(".")
        inner = parts[-1] if parts[:2] in (["numpy", "core"], ["numpy", "_core"]) and len(parts) == 3 else module
        found = allowed.get((inner, name))
        if found is None:
            raise _RefusedError(f"{module}.{name}"[:100])
        return found


def _reconstruct(subtype: type, shape: tuple[int, ...], code: bytes) -> NDArray[Any]:
    """numpy's start of an array; its content follows as state."""
    if subtype is not np.ndarray or math.prod(shape) > 1:
        raise ValueError("an array that does not begin empty")
    return np.ndarray((0,), np.int8)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in protocol 2, which knows only text."""
    if encoding != "latin1":
        raise ValueError(f"text encoded as {encoding}")
    return text.encode("latin1")


def _from_buffer(data: bytes | bytearray, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    """numpy's array of protocol 5."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)
