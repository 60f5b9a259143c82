"""Which particles: what the options of a command say about files, choice, hand and grid."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from emsplat.config import ChoiceOptions, ImageOptions, SourceConfig
from emsplat.errors import InputError
from emsplat.io.columns import row_column
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.particles import image_keys, read_particles
from emsplat.io.paths import find_stacks, real_paths
from emsplat.io.pickles import load_arrays
from emsplat.io.table import ParticleTable, merge_tables
from emsplat.maths.groups import Symmetry
from emsplat.parallel import ALONE, World
from emsplat.particles.copies import particle_numbers, unique_rows
from emsplat.particles.open import open_table
from emsplat.particles.stack import ParticleStack
from emsplat.types import Poses

_MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
_HALF_TURN = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))


def read_table(
    choice: ChoiceOptions, particles: Path, *, need_stacks: bool = True, need_poses: bool = True
) -> ParticleTable:
    """The particles that the options describe: files merged, some of them chosen, in the hand asked for.

    Raises:
        InputError: a file cannot be read, or nothing is left.
    """
    if choice.datadir is not None and not choice.datadir.is_dir():
        raise InputError(f"--datadir {choice.datadir}: no such folder; expected the one that image paths start from")
    first = read_particles(
        particles,
        datadir=choice.datadir,
        poses=choice.poses,
        ctf=choice.ctf,
        passthrough=choice.passthrough,
        need_stacks=need_stacks,
        need_poses=need_poses,
    )
    more = [
        read_particles(path, datadir=choice.datadir, need_stacks=need_stacks, need_poses=need_poses)
        for path in choice.merge
    ]
    table = _choose(choice, merge_tables([first, *more]))
    return flip_hand(table, choice.point_group) if choice.flip_hand else table


def read_source(
    config: SourceConfig, particles: Path, *, need_stacks: bool = True, need_poses: bool = True
) -> ParticleTable:
    """As `read_table`, without the half-sets of the files where new ones are wanted.

    Raises:
        InputError: through `read_table`.
    """
    table = read_table(config.choice, particles, need_stacks=need_stacks, need_poses=need_poses)
    return replace(table, half=None) if config.halves.redraw_halves else table


def with_boxes(table: ParticleTable) -> ParticleTable:
    """With the boxes that only the stacks know, where these are there."""
    groups = list(table.groups)
    for number, group in enumerate(groups):
        rows = (table.optics_group == number).nonzero()[:1, 0]
        if group.box is None and len(rows):
            stack = table.stacks[int(table.stack[rows[0]])]
            if stack.is_file():
                file = StackFile(stack)
                groups[number] = replace(group, box=file.box)
                file.close()
    return replace(table, groups=tuple(groups))


def open_images(
    choice: ChoiceOptions,
    images: ImageOptions,
    table: ParticleTable,
    *,
    finer: bool = False,
    recentre: bool | None = None,
    world: World = ALONE,
) -> ParticleStack:
    """The images of a table as the options describe them; ``finer``, ``recentre`` and ``world`` as in `open_table`.

    Raises:
        InputError: through `open_table`.
    """
    return open_table(
        table,
        symmetry=choice.point_group,
        invert=images.invert,
        diameter=images.diameter,
        trust_star_pixel_size=images.trust_star_pixel_size,
        box=images.box,
        pixel_size=images.pixel_size,
        finer=finer,
        recentre=recentre,
        world=world,
    )


def open_stack(
    config: SourceConfig, particles: Path, *, need_poses: bool = True, world: World = ALONE
) -> ParticleStack:
    """The particles that the options describe, with half-sets; without ``need_poses`` their poses may be missing.
    Processes of a ``world`` may have different ones of the stacks.

    Raises:
        InputError: through `read_table` and `open_table`.
    """
    table = read_source(config, particles, need_stacks=world.size == 1, need_poses=need_poses)
    return open_images(config.choice, config.images, table, world=world).with_halves(config.halves.seed)


def _choose(choice: ChoiceOptions, table: ParticleTable) -> ParticleTable:
    """A subset of all particles, of these one class, of these each image or particle once, of these the first, of
    these one part."""
    if choice.subset is not None:
        rows, said = _listed(choice.subset, table, choice.datadir)
        table = replace(table.take(rows), warnings=(*table.warnings, *said))
    if choice.particle_class is not None:
        if table.particle_class is None:
            raise InputError(f"{table.name}: not every file has classes (rlnClassNumber); leave --class out")
        found = (table.particle_class == choice.particle_class).nonzero()[:, 0]
        if not len(found):
            there = ", ".join(map(str, torch.unique(table.particle_class).tolist()[:20]))
            raise InputError(f"{table.name}: no particle of class {choice.particle_class}; there are {there}")
        table = table.take(found)
    if choice.unique:
        rows = unique_rows(table, choice.point_group)
        table = replace(table.take(rows), left_out=len(table) - len(rows))
    if choice.first is not None:
        if choice.first < 1:
            raise InputError(f"--first {choice.first}: expected at least 1")
        table = table.take(torch.arange(min(choice.first, len(table))))
    return table if choice.part is None else table.take(_part(choice.part, table))


def _part(text: str, table: ParticleTable) -> Int[Tensor, " q"]:
    """The rows of a part, given as "2/8"."""
    number, _, count = text.partition("/")
    if not (
        number.isascii() and number.isdigit() and count.isascii() and count.isdigit() and 0 < int(number) <= int(count)
    ):
        raise InputError(f"--part {text}: expected a part and how many there are, such as 2/8")
    rows = World(int(number) - 1, int(count)).share(torch.arange(len(table)), particle_numbers(table))
    if not len(rows):
        raise InputError(f"--part {text}: nothing is left; {table.name} has {len(table):,} particles")
    return rows


def _listed(path: Path, table: ParticleTable, datadir: Path | None) -> tuple[Int[Tensor, " q"], list[str]]:
    """Rows of a table that a file lists: 0-based numbers (.txt, .pkl, .npy), a column ``row``, which counts from 1, or
    particles (.star, .cs); and what is assumed."""
    kind = path.suffix.lower()
    if kind in (".star", ".cs"):
        return _same_images(path, table, datadir)
    if kind == ".pkl":
        numbers = np.asarray(load_arrays(path))
    elif kind != ".npy" and (counted := row_column(path)) is not None:
        rows = torch.unique(counted) - 1  # copies under a symmetry have rows of their own
        if not 0 <= int(rows.min()) <= int(rows.max()) < len(table):
            raise InputError(f"{path}: expected rows from 1 to {len(table)}, the particles of {table.name}")
        return rows, []
    else:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # refused below
                numbers = np.load(path, allow_pickle=False) if kind == ".npy" else np.loadtxt(path, ndmin=1)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); expected row numbers from 0, one per line, a table with a "
                "column row, which counts from 1, or a .star or .cs file"
            ) from error
    rows = numbers.astype(np.int64) if numbers.dtype.kind in "fiu" and np.isfinite(numbers).all() else np.zeros(0)
    if rows.ndim != 1 or not len(rows) or (rows != numbers).any() or rows.min() < 0 or rows.max() >= len(table):
        raise InputError(f"{path}: expected row numbers from 0 to {len(table) - 1}, the particles of {table.name}")
    if len(np.unique(rows)) < len(rows):
        raise InputError(f"{path}: names a row twice; expected each once")
    return torch.from_numpy(rows), []


def _same_images(path: Path, table: ParticleTable, datadir: Path | None) -> tuple[Int[Tensor, " q"], list[str]]:
    """Rows whose image a metadata file names, in the order of the table; the rest of that file is not looked at.

    An image is known by its number and its stack. The stack is the file that is found from there, links followed; where
    that is none of the table's, as after a move, it goes by its name, and where several folders hold a stack of that
    name, by as much of the path as the file gives.
    """
    index, names = zip(*image_keys(path), strict=True)
    own = list(dict.fromkeys(names))
    files: dict[str, list[int]] = {}
    alike: dict[str, list[int]] = {}
    for number, (stack, file) in enumerate(zip(table.stacks, real_paths(table.stacks), strict=True)):
        files.setdefault(file, []).append(number)
        alike.setdefault(stack.name, []).append(number)
    meant = {}
    stacks = find_stacks(own, path, datadir, required=False)
    named = real_paths(stacks.paths[number] for number in stacks.stack.tolist())
    for name, file in zip(own, named, strict=True):
        same, parts = alike.get(Path(name).name, []), Path(name.lstrip("/")).parts
        within = [number for number in same if table.stacks[number].parts[-len(parts) :] == parts]
        meant[name] = files.get(file) or (same if len(same) == 1 else within)
    span = max(int(table.image.max()), *index) + 1
    wanted = [stack * span + image for image, name in zip(index, names, strict=True) for stack in meant[name]]
    found = np.flatnonzero(np.isin((table.stack * span + table.image).numpy(), np.array(wanted, np.int64)))
    if not len(found):
        raise InputError(f"{path}: names none of the images of {table.name}; expected a selection of these particles")
    said = [
        f"{path}: names {len(index):,} rows, and {len(found):,} of {table.name} show their images; all of these are "
        "taken, where single rows of repeated images are meant give their numbers (.txt), or that file in place of the "
        "particles"
    ]
    return torch.from_numpy(found), said if len(found) > len(index) else []


def flip_hand(table: ParticleTable, symmetry: Symmetry) -> ParticleTable:
    """The same images as projections of the mirrored molecule, which they are as well (docs/conventions.md, 2).

    The map is mirrored in z through its centre, A' = F A F. Where the symmetry group does not allow that without a
    change of setting, it is mirrored in all three axes, which every group allows: a half turn about z more.
    """
    rotation = _MIRROR @ table.poses.rotation @ _MIRROR
    group = symmetry.elements
    mirrored = _MIRROR @ group @ _MIRROR
    distance = (mirrored[:, None] - group).flatten(2).norm(dim=2).min(1).values
    if float(distance.max()) > 1e-6:
        rotation = rotation @ _HALF_TURN
    return replace(table, poses=Poses(rotation, table.poses.shift), mirrored=not table.mirrored)
