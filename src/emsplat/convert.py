"""Particle metadata, and Gaussians, from one program's format to another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emsplat.config import ConvertConfig
from emsplat.errors import InputError, OutputError
from emsplat.inputs import read_table, with_boxes
from emsplat.io.cryodrgn import write_pickles
from emsplat.io.cryosparc import write_cs
from emsplat.io.gaussians import convert_model, holds_gaussians
from emsplat.io.particles import write_used
from emsplat.types import Grid

_KINDS = (".star", ".cs", ".pkl")


def convert(
    config: ConvertConfig, particles: Path, target: Path, say: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Writes particles as RELION's .star, cryoSPARC's .cs or cryoDRGN's .pkl, by the name of ``target``.

    From STAR to STAR and from .cs to .cs all columns stay. For cryoDRGN two files are written, see `ctf_beside`; the
    images are those of the source, in its order. What the target has no place for is said through ``say``.

    Gaussians and atomic models (.ply, .cif, .pdb) become one another likewise; an atomic model is taken to lie in a map
    of ``config.box`` and ``config.pixel_size`` with MRC origin 0.

    Returns the files written.

    Raises:
        InputError: the particles cannot be read, or hold what the target cannot say.
        OutputError: the target exists, or cannot be written.
    """
    kind = target.suffix.lower()
    model = holds_gaussians(particles)
    if kind not in _KINDS and not model:
        raise InputError(f"{target}: expected a name that ends with {', '.join(_KINDS)}")
    files = [target, ctf_beside(target)] if kind == ".pkl" else [target]
    for path in files:
        if path.exists() and not config.overwrite:
            raise OutputError(f"{path}: exists; choose another name or add --overwrite")
    if model:
        given = None if config.box is None or config.pixel_size is None else Grid(config.box, config.pixel_size)
        for warning in convert_model(particles, target, given):
            say(f"look: {warning}")
        return files
    table = read_table(config, particles, need_stacks=False)
    for warning in table.warnings:
        say(f"look: {warning}")
    missing = [stack for stack in table.stacks if not stack.is_file()]
    if missing and kind != ".pkl":
        say(
            f"look: {len(missing):,} of {len(table.stacks):,} stacks are missing, the first is {missing[0]}; their "
            f"paths stay as they are and may not lead to them from {target.parent}; give the folder that they start "
            "from with --datadir"
        )
    table = with_boxes(table)
    half = table.half
    if half is not None and not bool((half > 0).all()):
        say("look: some of the files have no half-sets; the column is left out, a refinement will draw new ones")
        half = None
    if kind == ".star":
        write_used(table, target, half)
    elif kind == ".cs":
        write_cs(target, table, half)
    else:
        lost = ["half-sets"] if half is not None else []
        lost += ["B factors"] if bool(table.optics.b_factor.any()) else []
        lost += ["scales"] if bool((table.optics.scale != 1).any()) else []
        if lost:
            say(f"look: cryoDRGN's pickles have no place for {' and '.join(lost)}; they are left out")
        if table.sign < 0:
            say("look: protein is dark in these images; give cryoDRGN --uninvert-data")
        write_pickles(target, ctf_beside(target), table)
    return files


def ctf_beside(poses: Path) -> Path:
    """The file for CTF parameters that goes with one for poses: ctf.pkl with poses.pkl, a_ctf.pkl with a.pkl."""
    name = poses.name.replace("poses", "ctf") if "poses" in poses.name else f"{poses.stem}_ctf{poses.suffix}"
    return poses.with_name(name)
