"""cryoDRGN's inputs: an image stack with poses and CTF parameters in pickles (docs/conventions.md, 9).

A pickle is a programme that runs when it is read. The reader here knows five names, all of which build numpy arrays,
and refuses every other.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.mrc import StackFile
from emsplat.io.paths import find_stacks, group_equal
from emsplat.io.table import OpticsGroup, ParticleTable
from emsplat.types import Optics, Poses

_LARGEST = float(np.finfo(np.float32).max)
_COLUMNS = 9  # box, pixel size, defocus U, V, angle (degrees), kV, Cs, amplitude contrast, phase shift (degrees)


def read_cryodrgn(particles: Path, poses: Path, ctf: Path, datadir: Path | None = None) -> ParticleTable:
    """Particles of a stack (.mrcs, .mrc) or of a list of stacks (.txt), in the order of the pickles.

    ``poses`` holds rotations (n, 3, 3), RELION's matrix, and shifts (n, 2) in boxes; ``ctf`` holds (n, 9) numbers. The
    pixel size is that of ``ctf``, scaled where its box is not that of the images.

    Raises:
        InputError: a file is missing, holds anything but such arrays, or they do not belong together.
    """
    rotation, fraction = _poses(poses)
    table = _ctf(ctf)
    names = _stack_names(particles)
    stacks = find_stacks(names, particles, datadir)
    if len(names) != len(stacks):
        raise InputError(f"{particles}: names a stack twice; expected each once")
    files = [StackFile(path) for path in stacks]
    counts, boxes = [file.count for file in files], {file.box for file in files}
    for file in files:
        file.close()
    count = sum(counts)
    if not len(rotation) == len(table) == count:
        raise InputError(
            f"{particles}: {count} images, but {len(rotation)} poses in {poses} and {len(table)} rows in {ctf}; "
            "expected the same number, parse them from the same particles"
        )
    if len(boxes) != 1:
        raise InputError(f"{particles}: stacks with boxes of {sorted(boxes)} pixels; expected one box")
    box = boxes.pop()
    pixel_size = table[:, 0] * table[:, 1] / box
    if not pixel_size.min() > 0:
        raise InputError(f"{ctf}: box {table[:, 0].min():g} at {table[:, 1].min():g} Å; expected both above 0")
    note = (f"{ctf}: is for a box of {table[0, 0]:g}, the images have {box}: pixel size {pixel_size[0]:.4g} Å",)
    unique, group = np.unique(np.stack([pixel_size.round(5), *table[:, 5:8].T], 1), axis=0, return_inverse=True)
    columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in table.T]
    image = np.concatenate([np.arange(n) for n in counts])
    stack = group_equal(names).repeat_interleave(torch.tensor(counts))
    return ParticleTable(
        source=particles,
        poses=Poses(
            torch.from_numpy(rotation),
            torch.from_numpy(fraction * (table[:, 0] * table[:, 1])[:, None]),
        ),
        optics=Optics(
            voltage=columns[5],
            cs=columns[6],
            amplitude_contrast=columns[7],
            defocus_u=columns[2],
            defocus_v=columns[3],
            defocus_angle=torch.deg2rad(columns[4]),
            phase_shift=torch.deg2rad(columns[8]),
            b_factor=torch.zeros(count, dtype=torch.float64),
            scale=torch.ones(count, dtype=torch.float64),
        ),
        groups=tuple(OpticsGroup(f"opticsGroup{i + 1}", float(row[0]), box) for i, row in enumerate(unique)),
        optics_group=torch.from_numpy(group.reshape(-1).astype(np.int64)),
        half=None,
        micrograph=torch.arange(count),  # not known: half-sets are drawn particle by particle
        stacks=stacks,
        stack=stack,
        image=torch.from_numpy(image),
        warnings=note if (table[:, 0] != box).any() else (),
    )


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


def _poses(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    loaded = load_arrays(path)
    parts = loaded if isinstance(loaded, tuple) else (loaded,)
    rotation = _numbers(path, parts[0] if parts else None, (3, 3))
    orthogonal = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(initial=0)
    if orthogonal > 1e-3 or not (np.linalg.det(rotation) > 0).all():
        raise InputError(f"{path}: matrices that are no rotations (off by {orthogonal:.3g}); expected cryoDRGN's poses")
    if len(parts) == 1:
        return rotation, np.zeros((len(rotation), 2))
    shift = _numbers(path, parts[1], (2,))
    if len(shift) != len(rotation):
        raise InputError(f"{path}: {len(rotation)} rotations and {len(shift)} shifts; expected the same number")
    if np.abs(shift).max(initial=0) > 1:
        raise InputError(f"{path}: shifts up to {np.abs(shift).max():.3g} boxes; expected fractions of the box")
    return rotation, shift


def _ctf(path: Path) -> NDArray[np.float64]:
    return _numbers(path, load_arrays(path), (_COLUMNS,))


def _numbers(path: Path, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """An array (n, *shape) of finite numbers as float64."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or value.shape[1:] != shape or not len(value):
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{path}: holds {found}; expected numbers of shape (n, {', '.join(map(str, shape))})")
    numbers = value.astype(np.float64)
    if not (np.abs(numbers) <= _LARGEST).all():
        raise InputError(f"{path}: holds values that are not finite; expected numbers")
    return numbers


def _stack_names(particles: Path) -> list[str]:
    if particles.suffix != ".txt":
        return [particles.name]
    try:
        lines = particles.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{particles}: cannot be read ({error}); expected a list of stacks") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{particles}: names no stack; expected one per line")
    return names
