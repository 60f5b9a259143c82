"""Gaussians as pseudo-atoms in mmCIF or PDB files, and atomic models as Gaussians.

One atom per Gaussian: residue UNX, atom UNK, element X, which is what the PDB calls an unknown atom. 9,999 residues
of one atom make a chain.

- Coordinates are those of the map with MRC origin 0, where voxel (i, j, k) lies at (i, j, k) times the pixel size:
  the centre of the Gaussians is at ``size // 2`` pixels. Opened beside the map, the atoms lie on it.
- Occupancy is the amplitude divided by that of the largest Gaussian (mmCIF), or 99.99 times that, because PDB keeps two
  decimals. Negative amplitudes stay negative. The amplitude that occupancy 1 stands for is kept in the file.
- B = 8π²⟨u²⟩, u² the mean of the three variances; the covariance stands in full in ``_atom_site_anisotrop`` or ANISOU.
- Box and pixel size are kept in ``_emsplat_grid`` or in REMARK 6.

mmCIF keeps 1e-5 Å of a coordinate and seven digits of the rest. PDB keeps 1e-3 Å, 1e-4 Å² and 1e-4 of the largest
amplitude, and has no room for coordinates from 10,000 Å, variances from 1,000 Å², covariances from -100 Å² down or
more than 619,938 Gaussians; B is cut at 999.99 there, the covariance is not.
"""

from __future__ import annotations

import gzip
import math
import re
import string
from collections.abc import Iterable
from pathlib import Path

import gemmi
import numpy as np
import torch
from gemmi import cif
from numpy.typing import NDArray

from emsplat.errors import InputError, OutputError
from emsplat.io.atoms import Atoms, read_atoms, reading, scattering
from emsplat.io.files import replacing, require_finite
from emsplat.types import Gaussians, Grid

Array = NDArray[np.float64]

_PER_CHAIN = 9999  # what a PDB residue number can count to
_CHAINS = string.ascii_uppercase + string.ascii_lowercase + string.digits
_NARROWEST = 0.5  # pixels; a narrower Gaussian that is sampled does not keep its mass
_TENSOR = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
_CARTESIAN = ("Cartn_x", "Cartn_y", "Cartn_z")
_REMARK = re.compile(r"REMARK   6 EMSPLAT BOX (\S+) PIXEL SIZE (\S+) AMPLITUDE (\S+)\s*")
_INSTEAD = "write a .cif or .ply file instead"


def suffix_of(path: Path) -> str:
    """The last part of the name in lower case, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


MMCIF, PDB = (".cif", ".mmcif"), (".pdb", ".ent")


def write_pseudoatoms(path: Path, gaussians: Gaussians, grid: Grid, program: str) -> list[str]:
    """Writes a mixture as mmCIF (.cif, .mmcif) or PDB (.pdb, .ent), compressed where the name ends in .gz.

    Returns what the file does not hold, as warnings: nothing with mmCIF.

    Raises:
        OutputError: the format has no room for these Gaussians, or the file cannot be written.
    """
    if suffix_of(path) not in MMCIF + PDB:
        raise OutputError(f"{path}: expected a name that ends in .cif, .mmcif, .pdb or .ent, perhaps with .gz")
    position = gaussians.mean.detach().double().numpy() + _origin(grid)
    covariance = gaussians.covariance.detach().double().numpy()
    amplitude = gaussians.amplitude.detach().double().numpy()
    for name, values in (("coordinates", position), ("covariances", covariance), ("amplitudes", amplitude)):
        require_finite(path, name, values)
    unit = float(np.abs(amplitude).max(initial=0)) or 1.0
    warnings: list[str] = []
    if suffix_of(path) in MMCIF:
        text = _mmcif(position, covariance, amplitude / unit, unit, grid, program)
    else:
        unit /= 99.99
        text, warnings = _pdb(path, position, covariance, amplitude / unit, unit, grid)
    content = text.encode()
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.name.lower().endswith(".gz") else content)
    return warnings


def read_pseudoatoms(path: Path, grid: Grid | None = None) -> tuple[Gaussians, Grid]:
    """The mixture in a file of `write_pseudoatoms`, or an atomic model as a mixture, and its grid.

    An atomic model has no grid: its atoms are taken to lie in a map with MRC origin 0 of the ``grid`` that is given.
    Means are house coordinates, whose origin is voxel ``size // 2``.

    Raises:
        InputError: not a readable PDB or mmCIF file, one without atoms, numbers that make no Gaussian, or an atomic
            model where no grid is given.
    """
    found = _read_mmcif(path) if suffix_of(path) in MMCIF else _read_pdb(path)
    if found is None:
        if grid is None:
            raise InputError(
                f"{path}: an atomic model does not say its box and pixel size; give --box and --pixel-size of the map "
                "that it was fitted into"
            )
        return gaussians_of(read_atoms(path), grid), grid
    position, covariance, amplitude, own = found
    numbers = (position - _origin(own), covariance, amplitude)
    if not all(np.isfinite(values).all() for values in numbers):
        raise InputError(f"{path}: holds numbers that are not finite; write the file again")
    if not np.linalg.eigvalsh(covariance).min() > 0:
        raise InputError(f"{path}: holds an anisotropic tensor that is not positive definite; write the file again")
    mean, tensor, mass = (torch.from_numpy(values).float() for values in numbers)
    return Gaussians(mean, tensor, mass), own


def gaussians_of(atoms: Atoms, grid: Grid) -> Gaussians:
    """One Gaussian per atom of a model that lies in a map of this grid with MRC origin 0.

    The amplitude is the scattering at k = 0, as in `emsplat.simulate.truth_map`. The variance is that of the form
    factor, Σ a b / (8π² Σ a), and of the atom's B factor together, and at least that of half a pixel.
    """
    numbers = atoms.element.tolist()
    table = {number: [np.array(part) for part in scattering(number)] for number in set(numbers)}
    strength = torch.tensor([float(table[n][0].sum()) for n in numbers])
    own = torch.tensor([float(table[n][0] @ table[n][1] / table[n][0].sum()) for n in numbers])
    variance = (own + atoms.b_factor.clamp(min=0)) / (8 * math.pi**2)
    variance = variance.clamp(min=(_NARROWEST * grid.pixel_size) ** 2)
    mean = atoms.position - _origin(grid)
    covariance = torch.diag_embed(variance[:, None].expand(-1, 3))
    return Gaussians(mean.float(), covariance.float(), (atoms.weight * strength).float())


def _origin(grid: Grid) -> float:
    """House origin, voxel ``size // 2``, in a map whose voxel 0 is at 0."""
    return grid.size // 2 * grid.pixel_size


def _b_factor(covariance: Array) -> Array:
    """8π²⟨u²⟩."""
    return np.asarray(8 * math.pi**2 * np.trace(covariance, axis1=1, axis2=2) / 3)


# --- mmCIF --------------------------------------------------------------------------------------------------


def _texts(values: Iterable[float], form: str) -> list[str]:
    return [form % value for value in values]


def _mmcif(position: Array, covariance: Array, occupancy: Array, unit: float, grid: Grid, program: str) -> str:
    count = len(position)
    document = cif.Document()
    block = document.add_new_block("gaussians")
    block.set_pair("_entry.id", "gaussians")
    for item, value in (
        ("program", cif.quote(program)),
        ("box", f"{grid.size}"),
        ("pixel_size", f"{grid.pixel_size:.9g}"),
    ):
        block.set_pair(f"_emsplat_grid.{item}", value)
    block.set_pair("_emsplat_amplitude.of_occupancy_one", f"{unit:.9g}")
    serial = [str(number + 1) for number in range(count)]
    chain = [_chain(number) for number in range(count)]
    residue = [str(number % _PER_CHAIN + 1) for number in range(count)]
    columns = {
        "group_PDB": ["HETATM"] * count,
        "id": serial,
        "type_symbol": ["X"] * count,
        "label_atom_id": ["UNK"] * count,
        "label_alt_id": ["."] * count,
        "label_comp_id": ["UNX"] * count,
        "label_asym_id": chain,
        "label_entity_id": ["1"] * count,
        "label_seq_id": ["."] * count,
        **{name: _texts(values, "%.5f") for name, values in zip(_CARTESIAN, position.T, strict=True)},
        "occupancy": _texts(occupancy, "%.7g"),
        "B_iso_or_equiv": _texts(_b_factor(covariance), "%.2f"),
        "auth_seq_id": residue,
        "auth_asym_id": chain,
        "pdbx_PDB_model_num": ["1"] * count,
    }
    block.init_loop("_atom_site.", list(columns)).set_all_values(list(columns.values()))
    tensor = {f"U[{i + 1}][{j + 1}]": _texts(covariance[:, i, j], "%.7g") for i, j in _TENSOR}
    columns = {"id": serial, "type_symbol": ["X"] * count, **tensor}
    block.init_loop("_atom_site_anisotrop.", list(columns)).set_all_values(list(columns.values()))
    text: str = document.as_string()
    return text


def _chain(number: int) -> str:
    """A to Z, a to z, 0 to 9, then names of two letters, as spreadsheets count."""
    place, name = number // _PER_CHAIN, ""
    while True:
        place, letter = divmod(place, len(_CHAINS))
        name = _CHAINS[letter] + name
        if place == 0:
            return name
        place -= 1


def _read_mmcif(path: Path) -> tuple[Array, Array, Array, Grid] | None:
    """Coordinates as in the file, covariances, amplitudes and grid; None when it is an atomic model."""
    with reading(path):
        document = cif.read(str(path))
        block = next((b for b in document if b.find_value("_emsplat_grid.box")), None)
        if block is None:
            return None
        items = ("_emsplat_grid.box", "_emsplat_grid.pixel_size", "_emsplat_amplitude.of_occupancy_one")
        grid, unit = _grid(path, *(block.find_value(item) or "" for item in items))
        position = np.stack([_column(path, block, f"_atom_site.{name}") for name in _CARTESIAN], 1)
        occupancy = _column(path, block, "_atom_site.occupancy")
        tensor = [_column(path, block, f"_atom_site_anisotrop.U[{i + 1}][{j + 1}]") for i, j in _TENSOR]
        serial, tensor_of = (list(block.find_values(f"_{name}.id")) for name in ("atom_site", "atom_site_anisotrop"))
    if {len(serial), len(tensor_of), len(occupancy), len(position), *map(len, tensor)} != {len(serial)}:
        raise InputError(f"{path}: not every pseudo-atom has an anisotropic tensor; write the file again")
    if serial != tensor_of:
        raise InputError(f"{path}: atoms and anisotropic tensors stand in different order; write the file again")
    return position, _symmetric(np.stack(tensor, 1)), occupancy * unit, grid


def _column(path: Path, block: cif.Block, tag: str) -> Array:
    texts = list(block.find_values(tag))
    if not texts:
        raise InputError(f"{path}: has no {tag}; expected a file of pseudo-atoms that emsplat wrote")
    try:
        return np.array([float(text) for text in texts])
    except ValueError as error:
        raise InputError(f"{path}: {tag} holds something that is no number; write the file again") from error


def _symmetric(tensor: Array) -> Array:
    """(g, 3, 3) of the six numbers in the order of `_TENSOR`."""
    full = np.zeros((len(tensor), 3, 3))
    for column, (i, j) in enumerate(_TENSOR):
        full[:, i, j] = full[:, j, i] = tensor[:, column]
    return full


def _grid(path: Path, box: str, pixel_size: str, unit: str) -> tuple[Grid, float]:
    """Grid and amplitude of occupancy 1 from their texts."""
    try:
        grid, amplitude = Grid(int(box), float(pixel_size)), float(unit)
    except ValueError:
        grid, amplitude = Grid(0, 0.0), 0.0
    if not (0 < grid.size < 10**9 and 0 < grid.pixel_size < math.inf and 0 < amplitude < math.inf):
        raise InputError(
            f"{path}: box '{box}', pixel size '{pixel_size}' and amplitude '{unit}' of emsplat are not understood; "
            "expected numbers above 0; write the file again"
        )
    return grid, amplitude


# --- PDB ----------------------------------------------------------------------------------------------------


def _pdb(
    path: Path, position: Array, covariance: Array, occupancy: Array, unit: float, grid: Grid
) -> tuple[str, list[str]]:
    _check_room(path, position, covariance)
    model = gemmi.Model(1)
    element = gemmi.Element("X")
    b_factor = _b_factor(covariance)
    for start in range(0, len(position), _PER_CHAIN):
        chain = gemmi.Chain(_chain(start))
        for row in range(start, min(start + _PER_CHAIN, len(position))):
            atom = gemmi.Atom()
            atom.name, atom.element, atom.serial = "UNK", element, row + 1
            atom.pos = gemmi.Position(*position[row])
            atom.occ, atom.b_iso = occupancy[row], b_factor[row]
            atom.aniso = gemmi.SMat33f(*(covariance[row, i, j] for i, j in _TENSOR))
            residue = gemmi.Residue()
            residue.name, residue.seqid = "UNX", gemmi.SeqId(row - start + 1, " ")
            residue.het_flag = "H"
            residue.add_atom(atom)
            chain.add_residue(residue)
        model.add_chain(chain)
    structure = gemmi.Structure()
    structure.add_model(model)
    remark = f"REMARK   6 EMSPLAT BOX {grid.size} PIXEL SIZE {grid.pixel_size:.9g} AMPLITUDE {unit:.9g}"
    records = structure.make_minimal_pdb()
    lost = int((np.abs(occupancy) < 0.005).sum())
    warnings = [
        f"{path}: {lost:,} of {len(position):,} amplitudes are below 5e-5 of the largest and 0 in PDB; {_INSTEAD}"
    ]
    return f"{remark:<80}\n{records}", warnings if lost else []


def _check_room(path: Path, position: Array, covariance: Array) -> None:
    """What the columns of PDB can hold.

    Raises:
        OutputError: not these Gaussians.
    """
    kept = np.round(covariance, 4)
    most = _PER_CHAIN * len(_CHAINS)
    for fits, problem in (
        (len(position) <= most, f"{len(position):,} Gaussians are more than the {most:,} that PDB can number"),
        (position.min(initial=0) > -1000 and position.max(initial=0) < 9999.9995, "PDB has no room for coordinates"),
        (kept.min(initial=0) > -100 and kept.max(initial=0) < 1000, "PDB has no room for Gaussians so wide"),
        (len(kept) == 0 or np.linalg.eigvalsh(kept).min() > 0, "PDB has no decimals for Gaussians so narrow"),
    ):
        if not fits:
            raise OutputError(f"{path}: {problem}; {_INSTEAD}")


def _read_pdb(path: Path) -> tuple[Array, Array, Array, Grid] | None:
    """Coordinates as in the file, covariances, amplitudes and grid; None when it is an atomic model."""
    with reading(path):
        structure = gemmi.read_pdb(str(path))
        found = next(filter(None, map(_REMARK.fullmatch, structure.raw_remarks)), None)
        if found is None:
            return None
        grid, unit = _grid(path, *found.groups())
        atoms = [site.atom for site in structure[0].all()] if len(structure) else []
        if not atoms:
            raise InputError(f"{path}: has no atoms; expected one per Gaussian")
        if not all(atom.aniso.nonzero() for atom in atoms):
            raise InputError(f"{path}: not every pseudo-atom has an ANISOU record; write the file again")
        position = np.array([atom.pos.tolist() for atom in atoms])
        occupancy = np.array([atom.occ for atom in atoms])
        tensor = np.array([atom.aniso.elements_pdb() for atom in atoms])
    return position, _symmetric(tensor), occupancy * unit, grid
