"""Atomic models in PDB or mmCIF format, and how their atoms scatter electrons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gemmi
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.files import require_file


@dataclass(frozen=True)
class Atoms:
    """Point atoms; ``weight`` is the occupancy, so that alternative conformers share one scattering."""

    position: Float[Tensor, "a 3"]  # Å, float64
    element: Int[Tensor, " a"]  # atomic number
    weight: Float[Tensor, " a"]
    b_factor: Float[Tensor, " a"]  # Å², of the file

    def __len__(self) -> int:
        return len(self.element)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """gemmi's complaints about a file as one line of ours.

    Raises:
        InputError: the file is missing, or is neither PDB nor mmCIF.
    """
    require_file(path, "an atomic model in PDB or mmCIF format")
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: not readable as an atomic model: {' '.join(str(error).split())}; "
            "expected PDB or mmCIF, named .pdb, .cif, .pdb.gz or .cif.gz"
        ) from error


_ORGANIC = frozenset(("H", "D", "C", "N", "O", "P", "S", "Se", "F", "Cl", "Br", "I"))


def _repair_elements(structure: gemmi.Structure) -> None:
    """Take elements that cannot be right from the atom's name.

    PDB files of simulation programs lack the element column and shift the names, so that CA is read as
    calcium and CB as unknown. Ions and ligands known to gemmi may contain anything and are left alone.
    """
    for site in structure[0].all() if len(structure) else ():
        residue = gemmi.find_tabulated_residue(site.residue.name)
        polymer = residue.is_amino_acid() or residue.is_nucleic_acid()
        doubtful = polymer or (not residue.found() and len(site.residue) > 1)
        if doubtful and site.atom.element.name not in _ORGANIC:
            site.atom.element = gemmi.Element(site.atom.name.lstrip("0123456789")[:1])


def read_atoms(path: Path) -> Atoms:
    """Atoms of the first model of a PDB or mmCIF file (also .gz), in the frame of the file.

    Waters are left out, since the images have no other solvent, and hydrogens, since most deposited models
    have none.

    Raises:
        InputError: the file is missing or unreadable, has no atoms, or has an element without form factor.
    """
    with reading(path):
        structure = gemmi.read_structure(str(path))
    _repair_elements(structure)
    structure.remove_waters()
    structure.remove_hydrogens()
    sites = [site.atom for site in structure[0].all() if site.atom.occ > 0] if len(structure) else []
    if not sites:
        raise InputError(
            f"{path}: no atoms of occupancy above 0 besides waters and hydrogens; expected an atomic model"
        )
    unknown = {a.element.name for a in sites if a.element.atomic_number == 0 or a.element.c4322 is None}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InputError(f"{path}: no electron form factor for element {names}; remove or rename these atoms")
    return Atoms(
        torch.tensor([atom.pos.tolist() for atom in sites], dtype=torch.float64),
        torch.tensor([atom.element.atomic_number for atom in sites]),
        torch.tensor([atom.occ for atom in sites], dtype=torch.float64),
        torch.tensor([atom.b_iso for atom in sites], dtype=torch.float64),
    )


def scattering(element: int) -> tuple[list[float], list[float]]:
    """(a, b) of the electron form factor Σ a exp(-b k²/4) in Å of an element (atomic number), k in 1/Å, b in Å².

    Five Gaussians (International Tables for Crystallography C, table 4.3.2.2, whose variable is k/2).
    """
    coefficients = gemmi.Element(element).c4322
    return list(coefficients.a), list(coefficients.b)
