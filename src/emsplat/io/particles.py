"""One door for all particle metadata: the file's kind decides who reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.cryodrgn import read_cryodrgn
from emsplat.io.cryosparc import read_cs
from emsplat.io.relion import read_star, rewrite_star, write_table
from emsplat.io.table import ParticleTable


def read_particles(
    path: Path,
    *,
    datadir: Path | None = None,
    poses: Path | None = None,
    ctf: Path | None = None,
    passthrough: Sequence[Path] = (),
    need_stacks: bool = True,
) -> ParticleTable:
    """Particles of RELION (.star), cryoSPARC (.cs, with ``passthrough``), or cryoDRGN (.mrcs, .mrc or .txt with
    ``poses`` and ``ctf``). Without ``need_stacks`` image stacks may be missing, except those of cryoDRGN, which alone
    know how many images there are.

    Raises:
        InputError: another kind of file, options that do not go with it, or what its reader refuses.
    """
    kind = path.suffix.lower()
    pickles = poses is not None or ctf is not None
    if pickles and kind not in (".mrcs", ".mrc", ".txt"):
        raise InputError(f"{path}: --poses and --ctf go with an image stack (.mrcs, .txt); leave them out")
    if passthrough and kind != ".cs":
        raise InputError(f"{path}: --passthrough goes with a cryoSPARC .cs file; leave it out")
    if kind == ".cs":
        return read_cs(path, datadir, passthrough, need_stacks=need_stacks)
    if kind in (".mrcs", ".mrc", ".txt"):
        if poses is None or ctf is None:
            raise InputError(
                f"{path}: an image stack has no poses; expected --poses poses.pkl and --ctf ctf.pkl (cryoDRGN), or "
                "the .star or .cs file in its place"
            )
        return read_cryodrgn(path, poses, ctf, datadir)
    return read_star(path, datadir, need_stacks=need_stacks)


def write_used(source: Path, table: ParticleTable, target: Path, rows: Tensor, half: Tensor | None) -> None:
    """The particles that were used as a STAR file: of a STAR file with all its columns, else with what was read.

    Raises:
        InputError: the source is no longer readable.
        OutputError: the target cannot be written.
    """
    if is_star(source) and half is not None:
        rewrite_star(source, target, rows, half)
    else:
        write_table(target, table, rows, half)


def is_star(path: Path) -> bool:
    return path.suffix.lower() not in (".cs", ".mrcs", ".mrc", ".txt")
