"""The states of a molecule that is simulated: several models, frames of a trajectory, a hinge, missing pieces.

All states stand in one frame, that of the first; what the consensus has is subtracted from all alike.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.config import StateOptions
from emsplat.errors import InputError
from emsplat.io.atoms import Atoms, Sites, read_atoms, read_sites
from emsplat.io.dcd import open_dcd
from emsplat.maths.geometry import axis_rotation
from emsplat.simulation.selection import Chosen, select

MOST = 2000  # states
_FRAMES = 200  # of a trajectory, where no number is given
_ANGLES = 100  # of a hinge, where no number is given
_BLOCKS = 10
_ALPHA = ("CA", "P", "C1'")  # the atom that stands for a residue: of protein, of nucleic acids

Value = float | str


@dataclass(frozen=True)
class States:
    """Structures with their shares of the particles, and where each stands on what varies."""

    atoms: tuple[Atoms, ...]
    population: Float[Tensor, " s"]  # float64, sum 1
    coordinates: dict[str, tuple[Value, ...]]  # name: one value per state

    def __len__(self) -> int:
        return len(self.atoms)


def one_state(atoms: Atoms) -> States:
    """A molecule that does not change."""
    return States((atoms,), torch.ones(1, dtype=torch.float64), {})


def load_states(options: StateOptions, model: Path | None) -> States | None:
    """The states that the options ask for, in the frame of their files; None where they ask for none.

    Raises:
        InputError: options that exclude or need one another; a file that cannot be used or does not belong to the
            others; a selection that means nothing; populations that are none.
    """
    varied = options.rotate is not None or bool(options.missing)
    kinds = {"--states": bool(options.states), "--trajectory": options.trajectory is not None}
    kinds |= {"--rotate or --missing": varied}
    given = [name for name, there in kinds.items() if there]
    _check_company(options, model, given)
    if not given:
        return None
    if options.states:
        coordinates: dict[str, tuple[Value, ...]] = {"model": tuple(map(str, options.states))}
        atoms = tuple(map(read_atoms, options.states))
    elif options.trajectory is not None and options.topology is not None:
        atoms, frames = _frames(options.trajectory, options.topology, options.frames)
        coordinates = {"frame": tuple(frame + 1 for frame in frames)}
    elif model is not None:
        atoms, coordinates = _varied(options, read_sites(model))
    return States(atoms, _populations(options.populations, len(atoms)), coordinates)


def _check_company(options: StateOptions, model: Path | None, given: list[str]) -> None:
    """Refuse options that exclude or need one another."""
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: expected one source of states; leave all but one out")
    if given in (["--states"], ["--trajectory"]) and model is not None:
        raise InputError(f"{model}: a model beside {given[0]}, which has its own; name one or the other")
    if given == ["--rotate or --missing"] and model is None:
        raise InputError("--rotate or --missing: no model; name an mmCIF or PDB file")
    topology, about = options.topology is not None, bool(options.about)
    needs = (  # what is given, what it needs, and whether that is there
        ("--trajectory", options.trajectory is not None, "--topology", topology),
        ("--topology", topology, "--trajectory", options.trajectory is not None),
        ("--frames", options.frames is not None, "--trajectory", options.trajectory is not None),
        ("--rotate", options.rotate is not None, "--about", about),
        ("--about", about, "--rotate", options.rotate is not None),
        ("--angles", options.angles is not None, "--rotate", options.rotate is not None),
        ("--turn", options.turn is not None, "--rotate", options.rotate is not None),
        ("--missing-states", bool(options.missing_states), "--missing", bool(options.missing)),
    )
    for name, there, needed, found in needs:
        if there and not found:
            raise InputError(f"{name}: needs {needed}; give both or neither")
    if options.populations and not given:
        raise InputError("--populations: expected several states; give --states, --trajectory, --rotate or --missing")


def _populations(given: Sequence[float], count: int) -> Float[Tensor, " s"]:
    if not given:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    if len(given) != count:
        raise InputError(f"--populations: {len(given)} numbers for {count} states; expected one for each")
    share = torch.tensor(given, dtype=torch.float64)
    if not (bool(torch.isfinite(share).all()) and bool((share > 0).all())):
        raise InputError(f"--populations {' '.join(f'{x:g}' for x in given)}: expected numbers above 0")
    share = share / share.max()  # whose sum is finite
    return share / share.sum()


# Frames of a trajectory


def _frames(trajectory: Path, topology: Path, count: int | None) -> tuple[tuple[Atoms, ...], list[int]]:
    """Structures of evenly spread frames, and the numbers of these from 0."""
    dcd, sites = open_dcd(trajectory), read_sites(topology, absent=True)
    if dcd.atoms != sites.rows:
        raise InputError(
            f"{trajectory}: {dcd.atoms:,} atoms in each frame, but {topology} has {sites.rows:,}; expected the "
            "topology that the trajectory was written with, hydrogens and waters included"
        )
    count = min(dcd.frames, _FRAMES) if count is None else count
    if not 1 <= count <= min(dcd.frames, MOST):
        raise InputError(
            f"--frames {count}: expected 1 to {min(dcd.frames, MOST):,}; {trajectory} has {dcd.frames:,} frames"
        )
    frames = np.linspace(0, dcd.frames - 1, count).round().astype(int).tolist()
    read = dcd.read(frames, sites.row)
    return tuple(replace(sites.atoms, position=torch.from_numpy(position)) for position in read), frames


# A hinge and missing pieces


def _varied(options: StateOptions, sites: Sites) -> tuple[tuple[Atoms, ...], dict[str, tuple[Value, ...]]]:
    """Every angle of the hinge with every set of missing blocks."""
    angles, missing = [0.0], [frozenset[int]()]
    positions = [sites.atoms.position]
    if options.rotate is not None:
        angles = turn_angles(
            _ANGLES if options.angles is None else options.angles, 360.0 if options.turn is None else options.turn
        )
        positions = list(turned(sites, options.rotate, options.about, angles))
    blocks = [select(sites, text, "--missing") for text in options.missing]
    if blocks:
        missing = _missing_sets(len(blocks), options.missing_states)
    if len(angles) * len(missing) > MOST:
        raise InputError(f"{len(angles)} angles with {len(missing)} sets of missing blocks; expected up to {MOST:,}")
    kept = [_without(blocks, absent, len(sites)) for absent in missing]
    atoms = tuple(_part(replace(sites.atoms, position=position), rows) for position in positions for rows in kept)
    pairs = list(itertools.product(angles, map(_missing_text, missing)))
    coordinates: dict[str, tuple[Value, ...]] = {}
    if options.rotate is not None:
        coordinates["angle"] = tuple(angle for angle, _ in pairs)
    if blocks:
        coordinates["missing"] = tuple(text for _, text in pairs)
    return atoms, coordinates


def turn_angles(count: int, turn: float) -> list[float]:
    """Equal steps, in degrees: of a full turn, whose end is its beginning; otherwise from 0 to ``turn``.

    Raises:
        InputError: fewer than two angles, or a turn of 0 or beyond 360°.
    """
    if not 2 <= count <= MOST:
        raise InputError(f"--angles {count}: expected 2 to {MOST:,}")
    if not 0 < abs(turn) <= 360:
        raise InputError(f"--turn {turn:g}: expected up to 360 degrees, but not 0")
    steps = count if abs(turn) == 360 else count - 1
    return [turn * i / steps for i in range(count)]


def turned(sites: Sites, text: str, about: Sequence[str], angles: Sequence[float]) -> Iterator[Float[Tensor, "a 3"]]:
    """Positions with the selected atoms turned by each angle (degrees) about the axis through two residues; from the
    first to the second the turn is right-handed.

    Raises:
        InputError: the selection means no atom; a residue is not found, or in several chains.
    """
    chosen = select(sites, text, "--rotate")
    if chosen.all():
        raise InputError(f'--rotate "{text}": selects every atom; expected a part that turns against the rest')
    if len(about) != 2:
        raise InputError(f"--about: {len(about)} residues; expected two, such as --about H:213 H:244")
    start, end = _axis(sites, chosen, about)
    if float((end - start).norm()) < 0.1:
        raise InputError(f"--about {' '.join(about)}: both are at one place; expected two residues along an axis")
    mobile = torch.from_numpy(chosen)
    for angle in angles:
        turn = torch.from_numpy(axis_rotation(end - start, math.radians(angle)))
        position = sites.atoms.position.clone()
        position[mobile] = (position[mobile] - start) @ turn.T + start
        yield position


_RESIDUE = re.compile(r"(?:([^:\s]*):)?(-?\d{1,9})")


def _axis(sites: Sites, chosen: Chosen, about: Sequence[str]) -> list[Float[Tensor, " 3"]]:
    """The places of the two residues, in the one chain of the selection that has both where no chain is named."""
    parts = [_RESIDUE.fullmatch(text) for text in about]
    if None in parts:
        raise InputError(f"--about {' '.join(about)}: expected residue numbers, such as 213 244 or H:213 H:244")
    named = [(part[1], int(part[2])) for part in parts if part is not None]
    chains = sorted(set(sites.chain[chosen].tolist()))
    having = [chain for chain in chains if all(len(_places(sites, own or chain, number)) for own, number in named)]
    if any(own is None for own, _ in named) and len(having) != 1:
        found = f"chains {' '.join(having)} have" if having else f"none of the chains {' '.join(chains)} has"
        raise InputError(f"--about {' '.join(about)}: {found} both residues; name the chain, such as H:213 H:244")
    places = []
    for own, number in named:
        chain = having[0] if own is None else own
        rows = _places(sites, chain, number)
        if not len(rows):
            raise InputError(f"--about {chain}:{number}: no such residue with an atom CA (or P); look into the model")
        places.append(sites.atoms.position[int(rows[0])])
    return places


def _places(sites: Sites, chain: str, number: int) -> Int[Tensor, " a"]:
    """Rows of the atoms that stand for a residue, the best first."""
    here = (sites.chain == chain) & (sites.residue == number)
    return torch.from_numpy(np.concatenate([np.flatnonzero(here & (sites.name == name)) for name in _ALPHA]))


def _missing_sets(blocks: int, named: Sequence[str]) -> list[frozenset[int]]:
    """Which blocks (from 0) each state lacks: those that are named, or every combination, the whole first."""
    if blocks > _BLOCKS:
        raise InputError(f"--missing: {blocks} blocks; expected up to {_BLOCKS}")
    if not named:
        every = range(blocks)
        sizes = range(blocks + 1)
        return [frozenset(own) for size in sizes for own in itertools.combinations(every, size)]
    sets = []
    for text in named:
        words = [] if text == "none" else text.split("+")
        if not all(word.isdecimal() and 1 <= int(word) <= blocks for word in words):
            raise InputError(
                f'--missing-states {text}: expected "none" or numbers of blocks from 1 to {blocks}, such as 1+2'
            )
        sets.append(frozenset(int(word) - 1 for word in words))
    if len(set(sets)) < len(sets):
        raise InputError(f"--missing-states {' '.join(named)}: names a state twice; expected each once")
    return sets


def _missing_text(absent: frozenset[int]) -> str:
    return "+".join(str(block + 1) for block in sorted(absent)) or "none"


def _without(blocks: Sequence[Chosen], absent: frozenset[int], count: int) -> Chosen:
    rows = np.ones(count, bool)
    for block in absent:
        rows &= ~blocks[block]
    if not rows.any():
        raise InputError(
            f"--missing: without blocks {_missing_text(absent)} there are no atoms; expected some that stay"
        )
    return rows


def _part(atoms: Atoms, rows: Chosen) -> Atoms:
    keep = torch.from_numpy(rows)
    return Atoms(atoms.position[keep], atoms.element[keep], atoms.weight[keep], atoms.b_factor[keep])


# Which particle is in which state


def draw_states(population: Float[Tensor, " s"], count: int, generator: torch.Generator) -> Int[Tensor, " p"]:
    """The state (from 0) of each particle, in random order: as many of each as its population says, to within one.

    Raises:
        InputError: a state gets no particle.
    """
    exact = population * count
    number = exact.floor().long()
    rest = (exact - number).argsort(descending=True, stable=True)
    number[rest[: count - int(number.sum())]] += 1
    if int(number.min()) == 0:
        raise InputError(
            f"--particles {count}: state {int(number.argmin()) + 1} of {len(population)} gets none; expected one for "
            "each state at least; use more particles or larger --populations"
        )
    state = torch.repeat_interleave(torch.arange(len(population)), number)
    return state[torch.randperm(count, generator=generator)] if len(population) > 1 else state


def draw_contrast(spread: float, count: int, generator: torch.Generator) -> Float[Tensor, " p"]:
    """Grey scales of particles: log-normal with mean 1 and standard deviation ``spread``, float64."""
    width = math.sqrt(math.log1p(spread**2))
    drawn = torch.randn(count, generator=generator, dtype=torch.float64)
    return torch.exp(width * drawn - width**2 / 2)
