"""Atomic models in PDB or mmCIF format, and how their atoms scatter electrons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
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


@dataclass(frozen=True)
class Sites:
    """The atoms of a file that are simulated, in its order, and what it calls them."""

    atoms: Atoms
    chain: NDArray[Any]  # texts
    segment: NDArray[Any]
    residue: NDArray[np.int64]  # number; insertion codes do not count
    residue_name: NDArray[Any]
    name: NDArray[Any]
    row: NDArray[np.int64]  # in the file, waters and hydrogens counted
    rows: int  # atoms in the file

    def __len__(self) -> int:
        return len(self.atoms)


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


# As simulation programs call water; gemmi knows the names in the PDB.
_WATERS = frozenset(("TIP", "TIP3", "TIP4", "TIP5", "TP3", "SOL", "SPC", "SPCE"))


def _is_solvent(site: gemmi.CRA) -> bool:
    return site.residue.is_water() or site.residue.name in _WATERS or site.atom.element.is_hydrogen


def read_sites(path: Path, *, absent: bool = False) -> Sites:
    """Atoms of the first model of a PDB or mmCIF file (also .gz), in the frame of the file, with their names.

    Waters are left out, since the images have no other solvent, and hydrogens, since most deposited models have none;
    so are atoms of occupancy 0. ``absent``: take these too and every occupancy as 1, as in topologies of simulations,
    whose occupancies mean nothing.

    Raises:
        InputError: the file is missing or unreadable, has no atoms, or has an element without form factor.
    """
    with reading(path):
        structure = gemmi.read_structure(str(path), merge_chain_parts=False)  # the order of the file
    _repair_elements(structure)
    every = list(structure[0].all()) if len(structure) else []
    found = [(row, site) for row, site in enumerate(every) if not _is_solvent(site) and (absent or site.atom.occ > 0)]
    if not found:
        raise InputError(
            f"{path}: no atoms of occupancy above 0 besides waters and hydrogens; expected an atomic model"
        )
    rows, sites = zip(*found, strict=True)
    atoms = [site.atom for site in sites]
    if not all(math.isfinite(value) for a in atoms for value in (*a.pos.tolist(), a.b_iso)):
        raise InputError(f"{path}: a position or B factor of an atom is no finite number; remove or mend that atom")
    unknown = {a.element.name for a in atoms if a.element.atomic_number == 0 or a.element.c4322 is None}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InputError(f"{path}: no electron form factor for element {names}; remove or rename these atoms")
    return Sites(
        Atoms(
            torch.tensor([atom.pos.tolist() for atom in atoms], dtype=torch.float64),
            torch.tensor([atom.element.atomic_number for atom in atoms]),
            torch.tensor([1.0 if absent else atom.occ for atom in atoms], dtype=torch.float64),
            torch.tensor([atom.b_iso for atom in atoms], dtype=torch.float64),
        ),
        np.array([site.chain.name for site in sites]),
        np.array([site.residue.segment for site in sites]),
        np.array([site.residue.seqid.num for site in sites], dtype=np.int64),
        np.array([site.residue.name for site in sites]),
        np.array([atom.name for atom in atoms]),
        np.array(rows, dtype=np.int64),
        len(every),
    )


def read_atoms(path: Path) -> Atoms:
    """The atoms of `read_sites`."""
    return read_sites(path).atoms


def scattering(element: int) -> tuple[list[float], list[float]]:
    """(a, b) of the electron form factor Σ a exp(-b k²/4) in Å of an element (atomic number), k in 1/Å, b in Å².

    Five Gaussians (International Tables for Crystallography C, table 4.3.2.2, whose variable is k/2).
    """
    coefficients = gemmi.Element(element).c4322
    return list(coefficients.a), list(coefficients.b)
