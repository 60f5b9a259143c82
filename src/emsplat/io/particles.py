"""One door for all particle metadata: the file's kind decides who reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.cryodrgn import read_cryodrgn
from emsplat.io.cryosparc import cs_columns, cs_image_keys, cs_names, read_cs, read_group
from emsplat.io.paths import real_paths
from emsplat.io.relion.read import read_star, star_image_keys
from emsplat.io.relion.write import (
    common_columns,
    further_columns,
    optics_columns,
    rewrite_table,
    star_names,
    write_table,
)
from emsplat.io.table import ParticleTable


def read_particles(
    path: Path,
    *,
    datadir: Path | None = None,
    poses: Path | None = None,
    ctf: Path | None = None,
    passthrough: Sequence[Path] = (),
    need_stacks: bool = True,
    need_poses: bool = True,
) -> ParticleTable:
    """Particles of RELION (.star, .star.gz), of cryoSPARC (.cs, with ``passthrough``, or the .csg of an export that
    names both), or of cryoDRGN (.mrcs, .mrc or .txt with ``poses`` and ``ctf``).

    Without ``need_stacks`` image stacks may be missing, except cryoDRGN's, which alone know how many images there are.
    Without ``need_poses`` particles that have none are seen from one side, in the centre of their images.

    Raises:
        InputError: another kind of file, options that do not go with it, or what its reader refuses.
    """
    kind = path.suffix.lower()
    pickles = poses is not None or ctf is not None
    if pickles and kind not in (".mrcs", ".mrc", ".txt"):
        raise InputError(f"{path}: --poses and --ctf go with an image stack (.mrcs, .txt); leave them out")
    if kind == ".csg":
        path, listed = read_group(path)
        kind, passthrough = ".cs", passthrough or listed
    if passthrough and kind != ".cs":
        raise InputError(f"{path}: --passthrough goes with a cryoSPARC .cs file; leave it out")
    if kind == ".gz" and path.with_suffix("").suffix.lower() != ".star":
        raise InputError(f"{path}: is compressed; unpack it first: gunzip {path.name}")
    if kind == ".cs":
        return read_cs(path, datadir, passthrough, need_stacks=need_stacks, need_poses=need_poses)
    if kind in (".mrcs", ".mrc", ".txt"):
        if (poses is None and need_poses) or ctf is None:
            asked = "--poses poses.pkl and --ctf ctf.pkl" if need_poses else "--ctf ctf.pkl"
            raise InputError(
                f"{path}: an image stack has no {'poses' if need_poses else 'CTF'}; expected {asked} (cryoDRGN), or "
                "the .star or .cs file in its place"
            )
        return read_cryodrgn(path, poses, ctf, datadir)
    return read_star(path, datadir, need_stacks=need_stacks, need_poses=need_poses)


def count_stacks(table: ParticleTable) -> int:
    """Files that the images of a table lie in. One that several names or links lead to, as in merged files, counts
    once; a stack that no particle is left of does not."""
    return len(set(real_paths(_used_stacks(table))))


def lost_stacks(table: ParticleTable) -> list[str]:
    """Stacks of a table that are not there, each once, as they are named."""
    return list(dict.fromkeys(str(path) for path in _used_stacks(table) if not path.is_file()))


def _used_stacks(table: ParticleTable) -> list[Path]:
    return [table.stacks[number] for number in torch.unique(table.stack).tolist()]


def write_used(
    table: ParticleTable,
    target: Path,
    half: Tensor | None,
    *,
    new_images: bool = False,
    more: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """The particles of a table as a STAR file: of one STAR file with all its columns, of several with those that they
    share, else with what was read.

    ``more`` are further columns (without "rln"), or others in the place of the source's, one text per particle.

    With ``new_images`` the images are others than those of the source, beside the target, and so are their origins and
    the optics groups' boxes and pixel sizes. ``more`` are further columns, names of RELION's without "rln".

    Raises:
        InputError: the source is no longer readable.
        OutputError: the target cannot be written.
    """
    stars = all(is_star(path) for path in table.sources)
    if len(table.sources) > 1 or not stars:
        kept = {**(common_columns(table) if stars else columns_kept(table)[0]), **(more or {})}
        groups = optics_columns(table) if stars else []
        write_table(target, table, half, target.parent if new_images else None, kept, groups)
    else:
        rewrite_table(table, target, half, new_images=new_images, more=more)


def columns_kept(table: ParticleTable) -> tuple[dict[str, list[str]], list[str]]:
    """Columns of STAR files (without "rln") beyond what a table carries, with the text of each particle, and the names
    of what cannot be kept so: columns of optics groups, fields of .cs files.

    Raises:
        InputError: a source is no longer readable.
    """
    if all(is_star(path) for path in table.sources):
        return further_columns(table)
    if all(path.suffix.lower() == ".cs" for path in table.sources):
        return cs_columns(table)
    lost = [name for path in table.sources for name in _further_names(path)]
    return {}, list(dict.fromkeys(lost))


def _further_names(path: Path) -> list[str]:
    """What a file holds besides that which a table carries."""
    if is_star(path):
        return star_names(path)
    return cs_names(path) if path.suffix.lower() == ".cs" else []


def image_keys(path: Path) -> Iterator[tuple[int, str]]:
    """0-based index and stack, as written, of each particle of a STAR or .cs file; nothing else of it is read.

    Raises:
        InputError: it cannot be read, or names no images.
    """
    return cs_image_keys(path) if path.suffix.lower() == ".cs" else star_image_keys(path)


def is_star(path: Path) -> bool:
    return path.suffix.lower() not in (".cs", ".mrcs", ".mrc", ".txt")
