"""Atoms to simulate with: a procedural protein, or a model brought to its place in the box."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gemmi
import numpy as np
import scipy.spatial
import torch
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.atoms import Atoms
from emsplat.types import Grid

Array = NDArray[Any]


def place_states(
    states: Sequence[Atoms], population: Sequence[float], grid: Grid, keep_frame: bool
) -> tuple[Atoms, ...]:
    """Atoms in house coordinates, whose origin is voxel ``size // 2`` of the grid; the states keep their places to one
    another.

    The centre of mass of their mean goes to the origin; with ``keep_frame`` coordinate 0 goes to voxel (0, 0, 0), as
    in a map with MRC origin 0.
    """
    if keep_frame:
        origin = torch.full((3,), grid.size // 2 * grid.pixel_size, dtype=torch.float64)
    else:
        numbers = sorted({number for atoms in states for number in set(atoms.element.tolist())})
        weights = torch.zeros(numbers[-1] + 1)
        weights[numbers] = torch.tensor([gemmi.Element(number).weight for number in numbers])
        masses = [
            share * atoms.weight * weights[atoms.element] for share, atoms in zip(population, states, strict=True)
        ]
        moments = [mass @ atoms.position for mass, atoms in zip(masses, states, strict=True)]
        origin = torch.stack(moments).sum(0) / torch.stack([mass.sum() for mass in masses]).sum()
    return tuple(replace(atoms, position=atoms.position - origin) for atoms in states)


def place_atoms(atoms: Atoms, grid: Grid, keep_frame: bool = False) -> Atoms:
    """`place_states` of one structure."""
    return place_states([atoms], [1.0], grid, keep_frame)[0]


def check_fits(atoms: Atoms, grid: Grid, name: str = "model", keep_frame: bool = False) -> None:
    """Check that the atoms stay inside the box in every orientation.

    Raises:
        InputError: they do not; says by how much and what would fit.
    """
    radius = float(atoms.position.norm(dim=1).max())
    excess = radius - grid.length / 2
    if excess <= 0:
        return
    fitting = f"use --box {2 * math.ceil(radius / grid.pixel_size)} or larger"
    if keep_frame:
        fitting = "with --keep-frame give --box and --pixel-size of the map that the model was fitted into"
    raise InputError(
        f"{name}: reaches {radius:.1f} Å from the box centre, {excess:.1f} Å more than half the box of "
        f"{grid.size} × {grid.pixel_size:g} Å; {fitting}"
    )


# Backbone and CB of an ideal α-helix (φ -57°, ψ -47°): element, x, y, z in Å. The axis is z; CA lies on x.
_BACKBONE = ((7, 1.388, -0.698, -0.921), (6, 2.278, 0, 0), (6, 1.483, 0.751, 1.063), (8, 1.796, 0.665, 2.251))


_CB = (6, 3.177, 0.982, -0.754)


_TURN, _RISE = math.radians(99.43), 1.556  # per residue


# Side chains beyond CB in rotamers that occur in helices: element, index of the atom it is bound to (N, CA
# and CB are 0, 1, 2, the rest follow) and torsion angle in degrees. In order: A S V L K E M Q D R.
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
    """Position of an atom 1.5 Å from c, at an angle of 112° to b and ``torsion`` degrees about b-c from a."""
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    angle, turn = math.radians(112), math.radians(torsion)
    side = math.cos(turn) * np.cross(normal, along) + math.sin(turn) * normal
    position: Array = c + 1.5 * (math.sin(angle) * side - math.cos(angle) * along)
    return position


def _residue(side_chain: tuple[tuple[int, int, float], ...]) -> Array:
    """Atoms (element, x, y, z) of a residue of a helix along z: N, CA, C, O, CB, side chain; shape (a, 4)."""
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
    """Residues of a helix of random sequence that starts at ``first`` and runs along a unit vector."""
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
    """Push atoms closer than ``closest`` Å apart, while springs keep each helix and each residue in shape."""
    pairs = scipy.spatial.cKDTree(position).query_pairs(6.0, output_type="ndarray")
    i, j = pairs[np.lexsort(pairs.T)].T
    kept = (residue[i] == residue[j]) | ((helix[i] == helix[j]) & backbone[i] & backbone[j])
    rest = np.where(kept, np.linalg.norm(position[i] - position[j], axis=1), closest)
    velocity = np.zeros_like(position)
    # Gradient descent with momentum: a minimiser from a library spends most of its time in threads that wait.
    for _ in range(150):
        difference = position[i] - position[j]
        distance = np.sqrt((difference**2).sum(1)) + 1e-9
        strain = np.where(kept | (distance < rest), rest / distance - 1, 0.0)
        force = (strain[:, None] * difference).T
        push = [np.bincount(i, f, len(position)) - np.bincount(j, f, len(position)) for f in force]
        velocity = 0.9 * velocity + 0.05 * np.stack(push, axis=1)
        position = position + velocity
    return position


def procedural_protein(atoms: int = 4000, seed: int = 0) -> Atoms:
    """A protein-like globule made by code: layers of α-helices with side chains, at the density of protein.

    Its outline is the union of three overlapping balls, so that it has clefts and no symmetry. Whole residues
    are kept, so there are at most ``atoms`` atoms and fewer by less than a residue. The centre of mass is the
    origin.

    Raises:
        InputError: fewer than 100 atoms are asked for.
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
        torch.zeros(len(sites), dtype=torch.float64),
    )
    return place_atoms(protein, Grid(2, 1.0))
