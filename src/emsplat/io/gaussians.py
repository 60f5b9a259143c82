"""Mixtures of Gaussians in any of the formats that they are kept in: PLY, and pseudo-atoms in mmCIF or PDB."""

from __future__ import annotations

from pathlib import Path

from emsplat import __version__
from emsplat.errors import InputError, OutputError
from emsplat.io.ply import read_ply, write_ply
from emsplat.io.pseudoatoms import MMCIF, PDB, read_pseudoatoms, suffix_of, write_pseudoatoms
from emsplat.maths.geometry import principal_axes
from emsplat.types import Gaussians, Grid


def holds_gaussians(path: Path) -> bool:
    """Whether the name is that of a mixture or of an atomic model."""
    return suffix_of(path) in (*MMCIF, *PDB) or path.suffix.lower() == ".ply"


def read_gaussians(path: Path, grid: Grid | None = None) -> tuple[Gaussians, Grid]:
    """The mixture in a .ply, .cif, .mmcif, .pdb or .ent file, and the grid that it was fitted on.

    ``grid`` stands in where the file names none. Atomic models name none: they are taken to lie in a map of that grid
    with MRC origin 0.

    Raises:
        InputError: another kind of file, one that cannot be read, or no grid at all.
    """
    if not holds_gaussians(path):
        raise InputError(f"{path}: expected Gaussians or an atomic model, in a file named .ply, .cif or .pdb")
    if path.suffix.lower() != ".ply":
        return read_pseudoatoms(path, grid)
    gaussians, own = read_ply(path)
    fitted = own or grid
    if fitted is None:
        raise InputError(f"{path}: does not say its box and pixel size; give --box and --pixel-size")
    return gaussians, fitted


def write_gaussians(path: Path, gaussians: Gaussians, grid: Grid) -> list[str]:
    """Writes a mixture in the format of the name; returns what that format does not hold, as warnings.

    Raises:
        OutputError: another suffix, no room for these Gaussians in the format, or the file cannot be written.
    """
    program = f"emsplat {__version__}"
    if not holds_gaussians(path):
        raise OutputError(f"{path}: expected a name that ends in .ply, .cif or .pdb")
    if path.suffix.lower() != ".ply":
        return write_pseudoatoms(path, gaussians, grid, program)
    scale, quaternion = principal_axes(gaussians.covariance)
    write_ply(path, gaussians.mean, scale, quaternion, gaussians.amplitude, grid, program)
    return []


def convert_model(source: Path, target: Path, grid: Grid | None = None) -> list[str]:
    """Rewrites a mixture, or an atomic model as one, in the format of the other name; returns warnings.

    ``grid`` is for a source that names no box and pixel size, see `read_gaussians`.

    Raises:
        InputError: the source cannot be read, or does not say its grid and none is given.
        OutputError: the target cannot be written.
    """
    if not holds_gaussians(target):
        raise OutputError(f"{target}: expected a name that ends in .ply, .cif or .pdb")
    return write_gaussians(target, *read_gaussians(source, grid))
