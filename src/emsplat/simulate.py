"""Particle images of an atomic model, by the Fourier slice theorem without interpolation.

The transform of point atoms is evaluated with a non-uniform FFT at the projected atom positions, multiplied by the
electron form factors. Nothing here uses the Gaussians of the reconstruction, so the two can be tested on each other.

Grey scale: the sum over a map, and over a projection, is the sum of the form factors at k = 0 (Å). The map summed over
z is the projection at identity pose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import finufft
import gemmi
import numpy as np
import scipy.optimize
import scipy.spatial
import tomli_w
import torch
from jaxtyping import Complex, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emsplat import fourier
from emsplat.config import SimulateConfig
from emsplat.ctf import ctf
from emsplat.errors import InputError, OutputError
from emsplat.geometry import quaternion_to_matrix, random_rotations
from emsplat.types import Grid, Optics, Poses

Array = NDArray[Any]


@dataclass(frozen=True)
class Atoms:
    """Point atoms; ``weight`` is the occupancy, so that alternative conformers share one atom's scattering."""

    position: Float[Tensor, "a 3"]  # Å, float64
    element: Int[Tensor, " a"]  # atomic number
    weight: Float[Tensor, " a"]

    def __len__(self) -> int:
        return len(self.element)


# --- atomic models ---------------------------------------------------------------------------------------------------


def read_atoms(path: Path) -> Atoms:
    """Atoms of the first model of a PDB or mmCIF file (also .gz), in the frame of the file.

    Waters are left out, since the images have no other solvent, and hydrogens, since most deposited models have none.

    Raises:
        InputError: the file is missing or unreadable, has no atoms, or has an element without form factor.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an atomic model in PDB or mmCIF format")
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: not readable as PDB or mmCIF: {' '.join(str(error).split())}; expected .pdb, .cif, .pdb.gz or .cif.gz"
        ) from error
    structure.remove_waters()
    structure.remove_hydrogens()
    sites = [site.atom for site in structure[0].all() if site.atom.occ > 0] if len(structure) else []
    if not sites:
        raise InputError(f"{path}: no atoms with occupancy above 0 besides waters and hydrogens; expected an atomic model")
    unknown = {atom.element.name for atom in sites if atom.element.c4322 is None}
    if unknown:
        raise InputError(f"{path}: no electron form factor for element {', '.join(sorted(unknown))}; remove these atoms")
    return Atoms(
        torch.tensor([atom.pos.tolist() for atom in sites], dtype=torch.float64),
        torch.tensor([atom.element.atomic_number for atom in sites]),
        torch.tensor([atom.occ for atom in sites], dtype=torch.float64),
    )


def place_atoms(atoms: Atoms, grid: Grid, keep_frame: bool = False) -> Atoms:
    """Atoms in house coordinates, whose origin is voxel ``size // 2`` of the grid.

    The centre of mass goes to the origin; with ``keep_frame`` coordinate 0 goes to voxel (0, 0, 0), as in a map with
    MRC origin 0.
    """
    if keep_frame:
        origin = torch.full((3,), grid.size // 2 * grid.pixel_size, dtype=torch.float64)
    else:
        masses = {number: gemmi.Element(number).weight for number in atoms.element.unique().tolist()}
        mass = atoms.weight * torch.tensor([masses[number] for number in atoms.element.tolist()])
        origin = mass @ atoms.position / mass.sum()
    return Atoms(atoms.position - origin, atoms.element, atoms.weight)


def check_fits(atoms: Atoms, grid: Grid, name: str = "model") -> None:
    """Check that the atoms stay inside the box in every orientation.

    Raises:
        InputError: they do not; says by how much and which box would fit.
    """
    radius = float(atoms.position.norm(dim=1).max())
    if radius > grid.length / 2:
        fitting = 2 * math.ceil(radius / grid.pixel_size)
        raise InputError(
            f"{name}: reaches {radius:.1f} Å from the box centre, {radius - grid.length / 2:.1f} Å more than the box "
            f"of {grid.size} × {grid.pixel_size:g} Å has; expected a model inside the box; use --box {fitting} or larger"
        )


# Backbone and CB of an ideal α-helix (φ -57°, ψ -47°): element, x, y, z in Å. The axis is z; CA lies on x.
_BACKBONE = ((7, 1.388, -0.698, -0.921), (6, 2.278, 0, 0), (6, 1.483, 0.751, 1.063), (8, 1.796, 0.665, 2.251))
_CB = (6, 3.177, 0.982, -0.754)
_TURN, _RISE = math.radians(99.43), 1.556  # per residue

# Side chains beyond CB in rotamers that occur in helices: element, index of the atom it is bound to (N, CA and CB are
# 0, 1, 2, the rest follow) and torsion angle in degrees. In order: A S V L K E M Q D R.
_SIDE_CHAINS: tuple[tuple[tuple[int, int, float], ...], ...] = (
    (),
    ((8, 2, -65),),
    ((6, 2, 175), (6, 2, -65)),
    ((6, 2, -65), (6, 3, 175), (6, 3, -65)),
    ((6, 2, -65), (6, 3, 180), (6, 4, 180), (7, 5, 180)),
    ((6, 2, -65), (6, 3, 180), (8, 4, -10), (8, 4, 170)),
    ((6, 2, -65), (16, 3, 180), (6, 4, 70)),
    ((6, 2, -65), (6, 3, 180), (8, 4, -10), (7, 4, 170)),
    ((6, 2, -70), (8, 3, -15), (8, 3, 165)),
    ((6, 2, -65), (6, 3, 180), (7, 4, 180), (6, 5, 180), (7, 6, 0), (7, 6, 180)),
)
_RESIDUE_ATOMS = 5 + sum(map(len, _SIDE_CHAINS)) / len(_SIDE_CHAINS)
# Å³; the mean residue above weighs 115.7 Da with its hydrogens, and protein has 1.35 g/cm³ = 0.813 Da/Å³.
_RESIDUE_VOLUME = 115.7 / 0.813


def _bond(a: Array, b: Array, c: Array, torsion: float) -> Array:
    """Position of an atom bound to c, 1.5 Å away at a bond angle of 112° and ``torsion`` degrees about b-c from a."""
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    angle, turn = math.radians(112), math.radians(torsion)
    side = math.cos(turn) * np.cross(normal, along) + math.sin(turn) * normal
    position: Array = c + 1.5 * (math.sin(angle) * side - math.cos(angle) * along)
    return position


def _residue(side_chain: tuple[tuple[int, int, float], ...]) -> Array:
    """Atoms (element, x, y, z) of one residue of a helix along z, shape (atoms, 4): N, CA, C, O, CB, side chain."""
    chain = [np.array(row[1:], float) for row in (_BACKBONE[0], _BACKBONE[1], _CB)]
    parents = [-1, 0, 1]
    for _, parent, torsion in side_chain:
        middle = parents[parent]
        chain.append(_bond(chain[parents[middle]], chain[middle], chain[parent], torsion))
        parents.append(parent)
    tail = [(element, *position) for (element, _, _), position in zip(side_chain, chain[3:], strict=True)]
    return np.array([*_BACKBONE, _CB, *tail], float)


_RESIDUES = tuple(map(_residue, _SIDE_CHAINS))


def _helix(length: int, first: Array, axis: Array, turn: float, rng: np.random.Generator) -> Iterator[Array]:
    """Residues of a helix with random sequence that starts at ``first`` and runs along the unit vector ``axis``."""
    helper = np.eye(3)[np.argmin(np.abs(axis))]
    x = np.cross(helper, axis) / np.linalg.norm(np.cross(helper, axis))
    frame = np.stack([x, np.cross(axis, x), axis])
    for i, kind in enumerate(rng.integers(len(_RESIDUES), size=length)):
        c, s = math.cos(turn + i * _TURN), math.sin(turn + i * _TURN)
        residue = _RESIDUES[kind].copy()
        screw = residue[:, 1:] @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + [0, 0, i * _RISE]
        residue[:, 1:] = screw @ frame + first
        yield residue


def _layers(half: float, rng: np.random.Generator) -> Iterator[tuple[int, Array]]:
    """Helix number and residue of layers of parallel helices that fill a cube of 2 ``half`` Å.

    Each layer is turned by about 50° against the one below, and helices run up or down at random.
    """
    spacing = math.sqrt(_RESIDUE_VOLUME / _RISE)
    count = math.ceil(half / spacing)
    direction, helix = rng.uniform(0, 2 * math.pi), 0
    for z in spacing * (np.arange(-count, count + 1) + rng.uniform()):
        direction += math.radians(rng.uniform(35, 65))
        along = np.array([math.cos(direction), math.sin(direction), 0])
        across = np.array([-along[1], along[0], 0])
        for offset in spacing * (np.arange(-count, count + 1) + rng.uniform()):
            axis = along * rng.choice([-1, 1])
            first = across * offset - axis * (half + rng.uniform(0, 5)) + [0, 0, z]
            for residue in _helix(math.ceil(2 * half / _RISE), first, axis, rng.uniform(0, 2 * math.pi), rng):
                yield helix, residue
            helix += 1


def _relax(position: Array, helix: Array, residue: Array, backbone: Array, closest: float = 3.3) -> Array:
    """Push atoms apart that are closer than ``closest`` Å, while springs keep each helix and each residue in shape."""
    pairs = scipy.spatial.cKDTree(position).query_pairs(6.0, output_type="ndarray")
    i, j = pairs[np.lexsort(pairs.T)].T
    kept = (residue[i] == residue[j]) | ((helix[i] == helix[j]) & backbone[i] & backbone[j])
    rest = np.where(kept, np.linalg.norm(position[i] - position[j], axis=1), closest)

    def energy(flat: Array) -> tuple[float, Array]:
        difference = flat.reshape(-1, 3)[i] - flat.reshape(-1, 3)[j]
        distance = np.linalg.norm(difference, axis=1) + 1e-9
        strain = np.where(kept | (distance < rest), distance - rest, 0.0)
        force = (2 * strain / distance)[:, None] * difference
        gradient = np.stack(
            [np.bincount(i, f, len(position)) - np.bincount(j, f, len(position)) for f in force.T], axis=1
        )
        return float(strain @ strain), gradient.ravel()

    options = {"maxiter": 100}
    relaxed = scipy.optimize.minimize(energy, position.ravel(), jac=True, method="L-BFGS-B", options=options)
    result: Array = relaxed.x.reshape(-1, 3)
    return result


def procedural_protein(atoms: int = 4000, seed: int = 0) -> Atoms:
    """A protein-like globule made by code: layers of α-helices with side chains, at the density of protein.

    Its outline is the union of three overlapping balls, so that it has clefts and no symmetry. Whole residues are
    kept, so the number of atoms is at most ``atoms`` and less by at most a residue. The centre of mass is the origin.
    """
    if atoms < 100:
        raise InputError(f"--atoms {atoms}: too few for a protein; use --atoms 100 or more")
    rng = np.random.default_rng(seed)
    ball = (3 / (4 * math.pi) * atoms / _RESIDUE_ATOMS * _RESIDUE_VOLUME) ** (1 / 3)
    centres = rng.standard_normal((3, 3))
    centres *= 0.6 * ball / np.linalg.norm(centres, axis=1, keepdims=True)
    radii = rng.uniform(0.8, 1.1, 3)
    helices, residues = zip(*_layers(1.6 * ball, rng), strict=True)
    alpha = np.stack([residue[1, 1:] for residue in residues])
    order = np.argsort(np.min(np.linalg.norm(alpha[:, None] - centres, axis=2) / radii, axis=1))
    sizes = np.array([len(residue) for residue in residues])
    chosen = order[np.cumsum(sizes[order]) <= atoms]

    sites = np.concatenate([residues[row] for row in chosen])
    residue = np.repeat(chosen, sizes[chosen])
    backbone = np.concatenate([np.arange(size) < 5 for size in sizes[chosen]])
    position = _relax(sites[:, 1:], np.array(helices)[residue], residue, backbone)
    protein = Atoms(
        torch.from_numpy(position),
        torch.from_numpy(sites[:, 0]).long(),
        torch.ones(len(sites), dtype=torch.float64),
    )
    return place_atoms(protein, Grid(2, 1.0))


# --- image formation -------------------------------------------------------------------------------------------------


def form_factor(element: int, k: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Electron form factor in Å of an element (atomic number) at spatial frequencies |k| in 1/Å.

    Five Gaussians, Peng et al. (1996) as in International Tables C, table 4.3.2.2; the tabulated variable is k/2.
    """
    coefficients = gemmi.Element(element).c4322
    terms = [a * torch.exp(-b / 4 * k**2) for a, b in zip(coefficients.a, coefficients.b, strict=True)]
    return torch.stack(terms).sum(0)


@dataclass(frozen=True)
class _Pair:
    """Two elements that share a transform: their weights are its real and imaginary strengths.

    Each element alone has a Hermitian transform, hence with F the transform of the strengths and g = (f₁ - i f₂)/2
    (``form``) the scattering of both is F(k) g(k) + conj(F(-k) g(k)).
    """

    position: Array  # Å, (atoms, 3)
    strength: Array  # (atoms,)
    form: Array  # rfft half space, zero on the Nyquist planes


def _pairs(atoms: Atoms, grid: Grid, b_factor: float, dims: int, dtype: torch.dtype) -> Iterator[_Pair]:
    """The atoms by pairs of elements, with form factors and B factor on the rfft half space."""
    axes = fourier.frequencies(grid, dims, dtype)
    k = torch.stack(torch.broadcast_tensors(*(axis**2 for axis in axes))).sum(0).sqrt()
    envelope = torch.exp(-b_factor / 4 * k**2)
    for axis in range(dims):
        envelope.select(axis, grid.size // 2).zero_()
    numbers = atoms.element.unique().tolist()
    for first, second in zip(numbers[::2], [*numbers[1::2], None], strict=False):
        rows = atoms.element == first
        strength = rows.to(torch.complex128)
        form = envelope * form_factor(first, k) / 2 + 0j
        if second is not None:
            strength = strength + 1j * (atoms.element == second)
            form = form - 0.5j * envelope * form_factor(second, k)
        rows = strength != 0
        strength = (strength * atoms.weight)[rows].to(form.dtype)
        yield _Pair(atoms.position[rows].to(dtype).numpy(), strength.numpy(), form.numpy())


def _plan(grid: Grid, dims: int, dtype: torch.dtype) -> Any:
    """A one-threaded type 1 transform with modes in FFT order."""
    name, eps = ("complex64", 2e-5) if dtype == torch.float32 else ("complex128", 1e-9)
    return finufft.Plan(
        1, (grid.size,) * dims, eps=eps, isign=-1, dtype=name, nthreads=1, modeord=1, upsampfac=1.25
    )


def _spectrum(plan: Any, pairs: Iterator[_Pair] | list[_Pair], axes: Array, shift: Array, grid: Grid) -> Array:
    """Transform of the atoms at ``axes`` p - ``shift``, in rfft order; ``axes`` are the 2 or 3 rows of a rotation."""
    half = np.arange(grid.size // 2 + 1)
    opposite = np.ix_(*[-np.arange(grid.size)] * (len(axes) - 1), -half)
    total: Any = 0
    for pair in pairs:
        points = (2 * math.pi / grid.length) * (axes @ pair.position.T - shift[:, None])
        plan.setpts(*points[::-1])
        modes = plan.execute(pair.strength)
        total = total + modes[..., half] * pair.form + np.conj(modes[opposite] * pair.form)
    return np.asarray(total)


def project_atoms(atoms: Atoms, poses: Poses, grid: Grid, b_factor: float) -> Complex[Tensor, "p y k"]:
    """Transforms (as `fourier.rfft`) of the projections of the atoms, zero at the Nyquist frequency.

    Point p appears at (A p)[:2] - shift, folded back into the box if outside. ``b_factor`` in Å². Precision follows
    the poses: relative error about 1e-5 in float32 and 1e-9 in float64. Uses as many threads as torch does; the result
    does not depend on their number.
    """
    dtype = poses.rotation.dtype
    pairs = list(_pairs(atoms, grid, b_factor, 2, dtype))
    axes, shifts = poses.rotation[:, :2].numpy(), poses.shift.to(dtype).numpy()
    out = np.empty((len(poses), grid.size, grid.size // 2 + 1), pairs[0].form.dtype)

    def work(rows: Array) -> None:
        plan = _plan(grid, 2, dtype)
        for row in rows:
            out[row] = _spectrum(plan, pairs, axes[row], shifts[row], grid)

    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, np.array_split(np.arange(len(poses)), workers)))
    return torch.from_numpy(out)


def truth_map(
    atoms: Atoms, grid: Grid, b_factor: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "z y x"]:
    """The map whose projections `project_atoms` gives, on the same grey scale; zero at the Nyquist frequency."""
    identity = torch.eye(3, dtype=dtype).numpy()
    pairs = _pairs(atoms, grid, b_factor, 3, dtype)
    spectrum = _spectrum(_plan(grid, 3, dtype), pairs, identity, np.zeros_like(identity[0]), grid)
    return fourier.irfft(torch.from_numpy(spectrum), dims=3)


def noise_filter(grid: Grid, noise: str) -> Float[Tensor, "y k"]:
    """Amplitude of the noise in rfft order, with mean power 1 over the full transform.

    Power of "coloured": 14^((1 - k/k_Nyquist)²), constant beyond Nyquist; 14 times more at k = 0 than at Nyquist, as in
    images of particles in ice.
    """
    ky, kx = fourier.frequencies(grid)
    if noise == "white":
        return torch.ones_like(ky * kx)
    fraction = (torch.hypot(*torch.broadcast_tensors(ky, kx)) * grid.nyquist).clamp(max=1)
    power = 14 ** (1 - fraction) ** 2
    weight = fourier.hermitian_weight(grid.size)
    return (power / ((power * weight).sum() / grid.size**2)).sqrt()


# --- the particles ---------------------------------------------------------------------------------------------------


def _generator(seed: int, stream: int) -> torch.Generator:
    """Independent random numbers for each purpose, so that one option does not change the draws of another."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def random_poses(config: SimulateConfig) -> Poses:
    """Uniform orientations and normal shifts of ``config.shift`` Å, float64."""
    rotation = random_rotations(config.particles, _generator(config.seed, 0))
    shift = torch.randn(config.particles, 2, generator=_generator(config.seed, 1), dtype=torch.float64)
    return Poses(rotation, config.shift * shift)


def perturb_poses(poses: Poses, error: float, generator: torch.Generator) -> Poses:
    """The poses turned about random axes by normal angles of root-mean-square ``error`` radians."""
    axis = torch.randn(len(poses), 3, generator=generator, dtype=poses.rotation.dtype)
    half = error / 2 * torch.randn(len(poses), 1, generator=generator, dtype=poses.rotation.dtype)
    axis = torch.nn.functional.normalize(axis, dim=-1)
    turn = quaternion_to_matrix(torch.cat([torch.cos(half), torch.sin(half) * axis], dim=-1))
    return Poses(turn @ poses.rotation, poses.shift)


def random_optics(config: SimulateConfig) -> Optics:
    """Optics of each particle, float64; particles of one micrograph share defocus, up to the spread, and astigmatism."""
    count = config.particles
    micrograph = torch.arange(count) // config.micrograph_particles
    generator = _generator(config.seed, 2)
    defocus, astigmatism, angle = torch.rand(
        3, int(micrograph[-1]) + 1, generator=generator, dtype=torch.float64
    )[:, micrograph]
    mean = config.defocus_min + (config.defocus_max - config.defocus_min) * defocus
    mean = mean + config.defocus_spread * torch.randn(count, generator=generator, dtype=torch.float64)

    def constant(value: float) -> Float[Tensor, " p"]:
        return torch.full((count,), value, dtype=torch.float64)

    return Optics(
        voltage=constant(config.voltage),
        cs=constant(config.cs),
        amplitude_contrast=constant(config.amplitude_contrast),
        defocus_u=mean + config.astigmatism / 2 * astigmatism,
        defocus_v=mean - config.astigmatism / 2 * astigmatism,
        defocus_angle=math.pi * angle,
        phase_shift=constant(math.radians(config.phase_shift)),
        b_factor=constant(0.0),
        scale=constant(1.0),
    )


def random_halves(count: int, generator: torch.Generator) -> Int[Tensor, " p"]:
    """Half-set 1 or 2 of each particle, equally many of each."""
    return 1 + torch.randperm(count, generator=generator) % 2
