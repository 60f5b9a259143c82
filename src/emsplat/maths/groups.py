"""Point groups: their elements and generators, about the axes that RELION sets them on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths.geometry import axis_rotation

_SAME = 1e-4  # largest difference of an entry between matrices of one rotation


@dataclass(frozen=True)
class Symmetry:
    """A point group in RELION's setting.

    A particle with pose A has the equivalent poses A R for each of its elements R.
    """

    symbol: str
    elements: Float[Tensor, "s 3 3"] = field(compare=False, repr=False)  # float64, the identity first

    @property
    def order(self) -> int:
        """How many elements there are."""
        return len(self.elements)

    @property
    def inserted(self) -> int:
        """How many times sums on a grid take in each image: what `about_grid` leaves to be inserted."""
        return len(self.about_grid[1])

    @cached_property
    def about_grid(self) -> tuple[Int[Tensor, "t 3 3"], Float[Tensor, "c 3 3"]]:
        """The elements that carry a cubic grid onto itself, and some that make up the group with them: each element is
        one of the second times one of the first (left cosets)."""
        elements = self.elements.numpy()
        turns = elements[np.abs(elements - elements.round()).max((1, 2)) < _SAME].round()
        chosen, reached = [], np.zeros((0, 3, 3))
        for element in elements:
            if not _contains(reached, element):
                chosen.append(element)
                reached = np.concatenate([reached, element @ turns])
        return torch.from_numpy(turns).long(), torch.from_numpy(np.stack(chosen))


def _close(generators: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """All products of the generators."""
    group = frontier = np.eye(3)[None]
    while len(frontier):
        known = len(group)
        for element, generator in product(frontier, generators):
            candidate = generator @ element
            if not _contains(group, candidate):
                group = np.concatenate([group, candidate[None]])
        frontier = group[known:]
    return group


def _contains(group: NDArray[np.float64], element: NDArray[np.float64]) -> bool:
    return bool((np.abs(group - element).max((1, 2)) < _SAME).any())


# Axes (two-fold, five-fold, three-fold) that generate the icosahedral group in RELION's settings (I = I2).
_ICOSAHEDRAL_AXES = {
    "1": ([1.0, 0.0, 0.0], [0.8506508, 0.0, -0.5257311], [0.9341724, 0.3568221, 0.0]),
    "2": ([0.0, 0.0, 1.0], [0.5257311, 0.0, 0.8506508], [0.0, 0.3568221, 0.9341724]),
    "3": ([-0.5257311, 0.0, 0.8506508], [0.0, 0.0, 1.0], [-0.4911235, 0.3568221, 0.7946545]),
    "4": ([0.5257311, 0.0, 0.8506508], [0.8944272, 0.0, 0.4472136], [0.4911235, 0.3568221, 0.7946545]),
}


_X, _Z = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])


def _symmetry(symbol: str, generators: list[NDArray[np.float64]]) -> Symmetry:
    return Symmetry(symbol, torch.from_numpy(_close(generators)))


@cache
def cyclic(fold: int) -> Symmetry:
    """Cn: the axis on z."""
    return _symmetry(f"C{fold}", [axis_rotation(_Z, 2 * np.pi / fold)])


@cache
def dihedral(fold: int) -> Symmetry:
    """Dn: the main axis on z, a two-fold on x."""
    return _symmetry(f"D{fold}", [axis_rotation(_Z, 2 * np.pi / fold), axis_rotation(_X, np.pi)])


@cache
def tetrahedral() -> Symmetry:
    """T: a three-fold on z, a two-fold at the tetrahedral angle to it."""
    twofold = np.array([0.0, np.sqrt(2 / 3), np.sqrt(1 / 3)])
    return _symmetry("T", [axis_rotation(_Z, 2 * np.pi / 3), axis_rotation(twofold, np.pi)])


@cache
def octahedral() -> Symmetry:
    """O: the four-folds on x, y and z."""
    return _symmetry("O", [axis_rotation(_Z, np.pi / 2), axis_rotation(np.ones(3), 2 * np.pi / 3)])


@cache
def icosahedral(setting: str = "") -> Symmetry:
    """I1 to I4 by their number, as RELION sets them; I without one is I2."""
    axes = zip(_ICOSAHEDRAL_AXES[setting or "2"], (2, 5, 3), strict=True)
    return _symmetry(f"I{setting}", [axis_rotation(np.array(axis), 2 * np.pi / order) for axis, order in axes])


C1 = cyclic(1)


def parse_symmetry(text: str, where: str = "--symmetry") -> Symmetry:
    """The point group that a user or a file names, in capitals or not; ``where`` is for the error.

    Raises:
        InputError: it is not one of Cn, Dn, T, O, I, I1, I2, I3, I4.
    """
    name = text.strip().upper()
    if match := re.fullmatch(r"([CD])([1-9]\d?)", name, re.ASCII):
        return (cyclic if match[1] == "C" else dihedral)(int(match[2]))
    if match := re.fullmatch(r"I([1-4]?)", name):
        return icosahedral(match[1])
    if name in ("T", "O"):
        return tetrahedral() if name == "T" else octahedral()
    raise InputError(f"{where} {text}: not a point group; expected Cn, Dn, T, O, I (= I2), I1, I2, I3 or I4")


def generators(group: Float[Tensor, "s 3 3"]) -> Float[Tensor, "g 3 3"]:
    """A few elements of a group that generate it, the first that do; none for the trivial group."""
    chosen: list[NDArray[np.float64]] = []
    known = np.eye(3)[None]
    for element in group.numpy():
        if not _contains(known, element):
            chosen.append(element)
            known = _close(chosen)
    return torch.from_numpy(np.stack(chosen)) if chosen else torch.zeros(0, 3, 3, dtype=group.dtype)
