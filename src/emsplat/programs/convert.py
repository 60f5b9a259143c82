"""Particle metadata, and Gaussians, from one program's format to another's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from emsplat.config import ConvertConfig
from emsplat.errors import InputError, OutputError
from emsplat.io.cryodrgn import write_pickles
from emsplat.io.cryosparc import write_cs
from emsplat.io.files import replacing
from emsplat.io.gaussians import convert_model, holds_gaussians
from emsplat.io.particles import columns_kept, count_stacks, is_star, lost_stacks, write_used
from emsplat.io.relion.write import lost_in_merging
from emsplat.io.table import ParticleTable
from emsplat.particles.choose import read_table, with_boxes
from emsplat.particles.copies import copies
from emsplat.run.log import counted
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
    table = with_boxes(read_table(config.choice, particles, need_stacks=False))
    for text in _remarks(table, config, target):
        say(text)
    half = table.half
    if half is not None and not bool((half > 0).all()):
        say("look: some of the files have no half-sets; the column is left out, a refinement will draw new ones")
        half = None
    write = {".star": _to_star, ".cs": _to_cs, ".pkl": _to_pickles}[kind]
    for text in write(table, target, half):
        say(f"look: {text}")
    return files


def _remarks(table: ParticleTable, config: ConvertConfig, target: Path) -> Iterator[str]:
    """What there is to say of the particles, whatever they become."""
    yield from table.notes
    yield from (f"look: {warning}" for warning in table.warnings)
    missing = lost_stacks(table)
    if missing and target.suffix.lower() != ".pkl":
        yield (
            f"look: missing are {len(missing):,} of {counted(count_stacks(table), 'stack')}, the first is "
            f"{missing[0]}; their paths stay as they are and may not lead to them from {target.parent}; give the "
            "folder that they start from with --datadir"
        )
    found = copies(table, config.choice.point_group)
    if found.text:
        yield f"look: {found.text}" + ("; some are in both half-sets" if found.crossing else "")


# Each writer returns what is to be said of what its format has no place for.


def _to_star(table: ParticleTable, target: Path, half: Tensor | None) -> list[str]:
    kept, lost = columns_kept(table)
    said = []
    links = _linked(table, target)
    write_used(table, target, half, more={"ImageName": links} if links else None)
    if links:
        said.append(
            f"RELION takes stacks that are named .mrc for maps; the file names links that are called .mrcs, in "
            f"{_link_folder(target)}"
        )
    if table.sign < 0:
        said.append(
            "protein is dark in these images, which emsplat reads from a column of its own, and RELION cannot know; "
            "for RELION write bright ones: emsplat preprocess"
        )
    if not table.micrograph_names and "MicrographName" not in kept and not is_star(table.sources[0]):
        said.append(
            "the micrographs are not known, rlnMicrographName is left out; without half-sets they are drawn particle "
            "by particle, or per stack where there are several"
        )
    if ".cs" in _kinds(table) and _has_classes(table):
        said.append("classes keep cryoSPARC's numbers, which begin with 0; those of RELION begin with 1")
    if _kinds(table) == {".star"}:
        if lost := lost_in_merging(table):
            said.append(f"{_listed(lost, 'rln')} are not in all of the files; they are left out")
    elif lost:
        said.append(f"a .star file has no place for {_listed(lost, _prefix(table))}; they are left out")
    return said


def _linked(table: ParticleTable, target: Path) -> list[str]:
    """Image names by links to stacks that RELION would take for maps; none where there are no such stacks, or a link
    cannot be made."""
    used = torch.unique(table.stack).tolist()
    files = {number: table.stacks[number] for number in used}
    wrong = {number: file for number, file in files.items() if file.suffix.lower() == ".mrc" and file.is_file()}
    if not wrong:
        return []
    folder = _link_folder(target).absolute()  # RELION looks from where it runs
    several = len({file.stem for file in wrong.values()}) < len(wrong)
    links = {
        number: folder / (f"{number + 1:06d}_{file.stem}.mrcs" if several else f"{file.stem}.mrcs")
        for number, file in wrong.items()
    }
    if any(link.exists() and not link.is_symlink() for link in links.values()):  # a stack of somebody's
        return []
    try:
        for number, link in links.items():
            with replacing(link) as temporary:
                temporary.symlink_to(wrong[number].absolute())
    except OutputError:
        return []
    files |= links
    return [f"{i + 1:06d}@{files[s]}" for i, s in zip(table.image.tolist(), table.stack.tolist(), strict=True)]


def _link_folder(target: Path) -> Path:
    return target.with_name(f"{target.stem}_stacks")


def _to_cs(table: ParticleTable, target: Path, half: Tensor | None) -> list[str]:
    kept, lost = columns_kept(table)
    write_cs(target, table, half, more=kept)
    said = []
    if kept and _kinds(table) == {".star"}:
        said.append(
            f"cryoSPARC has no fields for {_listed(kept, 'rln')}; they are kept as rln/..., which `emsplat convert` "
            "puts back into a STAR file"
        )
    if lost and _kinds(table) != {".cs"}:
        said.append(f"a .cs file has no place for {_listed(lost, _prefix(table))}; they are left out")
    return said


def _to_pickles(table: ParticleTable, target: Path, half: Tensor | None) -> list[str]:
    kept, lost = columns_kept(table)
    write_pickles(target, ctf_beside(target), table)
    lost = [*(f"rln{name}" for name in kept), *(f"{_prefix(table)}{name}" for name in lost)]
    lost += ["half-sets"] if half is not None else []
    lost += ["classes"] if table.particle_class is not None else []
    lost += ["micrographs"] if table.micrograph_names else []
    lost += ["B factors"] if bool(table.optics.b_factor.any()) else []
    lost += ["scales"] if bool((table.optics.scale != 1).any()) else []
    said = [f"cryoDRGN's pickles have no place for {_listed(lost)}; they are left out"] if lost else []
    if table.sign < 0:
        said.append("protein is dark in these images; give cryoDRGN --uninvert-data")
    if not _in_order(table):
        said.append(
            f"rows are not the images of one stack in its order: give cryoDRGN {table.name} as particles; images of "
            "the stack itself would take each other's poses"
        )
    return said


def _has_classes(table: ParticleTable) -> bool:
    return table.particle_class is not None and len(torch.unique(table.particle_class)) > 1


def _in_order(table: ParticleTable) -> bool:
    """Whether rows are images of one stack, from its first on."""
    return len(torch.unique(table.stack)) == 1 and torch.equal(table.image, torch.arange(len(table.image)))


def _kinds(table: ParticleTable) -> set[str]:
    """The formats that the particles come from."""
    return {".star" if is_star(path) else path.suffix.lower() for path in table.sources}


def _prefix(table: ParticleTable) -> str:
    """What the names of columns begin with in the files that they come from."""
    return "rln" if any(map(is_star, table.sources)) else ""


def _listed(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}" for name in names)


def ctf_beside(poses: Path) -> Path:
    """The file for CTF parameters that goes with one for poses: ctf.pkl with poses.pkl, a_ctf.pkl with a.pkl."""
    name = poses.name.replace("poses", "ctf") if "poses" in poses.name else f"{poses.stem}_ctf{poses.suffix}"
    return poses.with_name(name)
