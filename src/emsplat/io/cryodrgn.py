"""cryoDRGN's inputs: an image stack with poses and CTF parameters in pickles (docs/conventions.md, 9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.paths import Stacks, find_stacks
from emsplat.io.pickles import load_arrays, write_arrays
from emsplat.io.table import OpticsGroup, ParticleTable, doubts, refuse_impossible
from emsplat.types import Optics, Poses

_LARGEST = float(np.finfo(np.float32).max)
_COLUMNS = 9  # box, pixel size, defocus U, V, angle (degrees), kV, Cs, amplitude contrast, phase shift (degrees)


def read_cryodrgn(particles: Path, poses: Path | None, ctf: Path, datadir: Path | None = None) -> ParticleTable:
    """Particles of a stack (.mrcs, .mrc) or of a list of stacks (.txt), in the order of the pickles.

    ``poses`` holds rotations (n, 3, 3), RELION's matrix, and shifts (n, 2) in boxes; ``ctf`` holds (n, 9) numbers. The
    pixel size is that of ``ctf``, scaled where its box is not that of the images. Without ``poses`` particles are seen
    from one side.

    Raises:
        InputError: a file is missing, holds anything but such arrays, or they do not belong together.
    """
    table = _ctf(ctf)
    rotation, fraction, notes = _unknown(len(table)) if poses is None else _poses(poses)
    found = _stacks(particles, datadir)
    stacks = found.paths
    if len(found.stack) != len(stacks):
        raise InputError(f"{particles}: names a stack twice; expected each once")
    files = [StackFile(path) for path in stacks]
    counts, boxes = [file.count for file in files], {file.box for file in files}
    for file in files:
        file.close()
    count = sum(counts)
    if not len(rotation) == len(table) == count:
        raise InputError(
            f"{particles}: {count} images, but {len(rotation)} poses in {poses or ctf} and {len(table)} rows in {ctf}; "
            "expected the same number, parse them from the same particles"
        )
    if len(boxes) != 1:
        raise InputError(f"{particles}: stacks with boxes of {sorted(boxes)} pixels; expected one box")
    box = boxes.pop()
    pixel_size = table[:, 0] * table[:, 1] / box
    if not pixel_size.min() > 0:
        raise InputError(f"{ctf}: box {table[:, 0].min():g} at {table[:, 1].min():g} Å; expected both above 0")
    if (table[:, 0] != box).any():
        notes.append(
            f"{ctf}: is for a box of {table[0, 0]:g} pixels of {table[0, 1]:.5g} Å, the images have {box}; these are "
            f"taken as the same area, in pixels of {pixel_size[0]:.5g} Å; where they were cropped, parse the CTF again"
        )
    unique, group = np.unique(np.stack([pixel_size.round(5), *table[:, 5:8].T], 1), axis=0, return_inverse=True)
    columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in table.T]
    image = np.concatenate([np.arange(n) for n in counts])
    stack = found.stack.repeat_interleave(torch.tensor(counts))
    optics = Optics(
        voltage=columns[5],
        cs=columns[6],
        amplitude_contrast=columns[7],
        defocus_u=columns[2],
        defocus_v=columns[3],
        defocus_angle=torch.deg2rad(columns[4]),
        phase_shift=torch.deg2rad(columns[8]),
        b_factor=torch.zeros(count, dtype=torch.float64),
        scale=torch.ones(count, dtype=torch.float64),
    )
    refuse_impossible(ctf, optics, ("kV", "Cs", "amplitude contrast"))
    return ParticleTable(
        sources=(particles,),
        source=torch.zeros(count, dtype=torch.int64),
        row=torch.arange(count),
        poses=Poses(
            torch.from_numpy(rotation),
            torch.from_numpy(fraction * (table[:, 0] * table[:, 1])[:, None]),
        ),
        optics=optics,
        groups=tuple(OpticsGroup(f"opticsGroup{i + 1}", float(row[0]), box) for i, row in enumerate(unique)),
        optics_group=torch.from_numpy(group.reshape(-1).astype(np.int64)),
        half=None,
        micrograph=torch.arange(count),  # not known: half-sets are drawn particle by particle
        stacks=stacks,
        stack=stack,
        image=torch.from_numpy(image),
        warnings=(*notes, *doubts(ctf, optics), *found.notes),
        folders=found.folders,
    )


def write_pickles(poses: Path, ctf: Path, table: ParticleTable) -> None:
    """Poses and CTF parameters as cryoDRGN reads them, for the images in the order of the table.

    The pickles hold float32 arrays and nothing else (docs/decisions/0007).

    Raises:
        InputError: a box is not known; images that were phase-flipped or multiplied by their CTF; aberrations.
        OutputError: they cannot be written.
    """
    optics, group = table.optics, table.optics_group
    if any(own.box is None for own in table.groups):
        raise InputError(f"{table.name}: the box of the images is not known; convert where the stacks can be found")
    if optics.treatment is not None or optics.aberrations is not None:
        raise InputError(
            f"{table.name}: has aberrations or images that were phase-flipped or multiplied by their CTF, for which "
            "cryoDRGN's pickles have no place; convert to a STAR file"
        )
    box = torch.tensor([own.box for own in table.groups], dtype=torch.float64)[group]
    pixel_size = torch.tensor([own.pixel_size for own in table.groups], dtype=torch.float64)[group]
    angle, phase = torch.rad2deg(optics.defocus_angle), torch.rad2deg(optics.phase_shift)
    columns = [box, pixel_size, optics.defocus_u, optics.defocus_v, angle, optics.voltage, optics.cs]
    columns += [optics.amplitude_contrast, phase]
    shift = table.poses.shift / (box * pixel_size)[:, None]
    if bool((shift.abs() > 1).any()):
        raise InputError(f"{table.name}: shifts beyond the box; cryoDRGN takes none, leave such particles out")
    write_arrays(poses, tuple(part.numpy().astype(np.float32) for part in (table.poses.rotation, shift)))
    write_arrays(ctf, torch.stack(columns, 1).numpy().astype(np.float32))


def _unknown(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    return np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 2)), []


def _poses(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Rotations, shifts in boxes, and what is assumed."""
    loaded = load_arrays(path)
    parts = loaded if isinstance(loaded, tuple) else (loaded,)
    rotation = _numbers(path, parts[0] if parts else None, (3, 3))
    orthogonal = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(initial=0)
    if orthogonal > 1e-3 or not (np.linalg.det(rotation) > 0).all():
        raise InputError(f"{path}: matrices that are no rotations (off by {orthogonal:.3g}); expected cryoDRGN's poses")
    if len(parts) == 1:
        note = f"{path}: holds rotations and no shifts; the particles are taken to be centred"
        return rotation, np.zeros((len(rotation), 2)), [note]
    shift = _numbers(path, parts[1], (2,))
    if len(shift) != len(rotation):
        raise InputError(f"{path}: {len(rotation)} rotations and {len(shift)} shifts; expected the same number")
    if np.abs(shift).max(initial=0) > 1:
        raise InputError(f"{path}: shifts up to {np.abs(shift).max():.3g} boxes; expected fractions of the box")
    return rotation, shift, []


def _ctf(path: Path) -> NDArray[np.float64]:
    return _numbers(path, load_arrays(path), (_COLUMNS,))


def _numbers(path: Path, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """An array (n, *shape) of finite numbers as float64."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or value.shape[1:] != shape or not len(value):
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{path}: holds {found}; expected numbers of shape (n, {', '.join(map(str, shape))})")
    with np.errstate(invalid="ignore"):  # not a number: refused below
        numbers = value.astype(np.float64)
    if not (np.abs(numbers) <= _LARGEST).all():
        raise InputError(f"{path}: holds values that are not finite; expected numbers")
    return numbers


def _stacks(particles: Path, datadir: Path | None) -> Stacks:
    """A stack is itself, a list of stacks is searched for."""
    if particles.suffix.lower() != ".txt":
        path = particles.absolute()
        return Stacks((path,), torch.zeros(1, dtype=torch.int64), (path.parent,))
    try:
        lines = particles.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{particles}: cannot be read ({error}); expected a list of stacks") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{particles}: names no stack; expected one per line")
    return find_stacks(names, particles, datadir)
