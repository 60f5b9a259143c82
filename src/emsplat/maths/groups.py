"""Point groups: their elements and generators, about the axes that RELION sets them on."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths.geometry import axis_rotation


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
    return bool((np.abs(group - element).max((1, 2)) < 1e-4).any())


# Axes (two-fold, five-fold, three-fold) that generate the icosahedral group in RELION's settings (I = I2).
_ICOSAHEDRAL_AXES = {
    "1": ([1.0, 0.0, 0.0], [0.8506508, 0.0, -0.5257311], [0.9341724, 0.3568221, 0.0]),
    "2": ([0.0, 0.0, 1.0], [0.5257311, 0.0, 0.8506508], [0.0, 0.3568221, 0.9341724]),
    "3": ([-0.5257311, 0.0, 0.8506508], [0.0, 0.0, 1.0], [-0.4911235, 0.3568221, 0.7946545]),
    "4": ([0.5257311, 0.0, 0.8506508], [0.8944272, 0.0, 0.4472136], [0.4911235, 0.3568221, 0.7946545]),
}


def symmetry_group(symbol: str) -> Float[Tensor, "s 3 3"]:
    """Rotations R of a point group in RELION's setting, float64, the identity first.

    A particle with pose A has the equivalent poses A R. Cn and Dn have their main axis on z (Dn: a two-fold on x),
    T, O and I1 to I4 as in RELION (I = I2).

    Raises:
        InputError: the symbol is not one of Cn, Dn, T, O, I, I1, I2, I3, I4.
    """
    name = symbol.strip().upper()
    z, x = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])
    if match := re.fullmatch(r"([CD])([1-9]\d?)", name):
        generators = [axis_rotation(z, 2 * np.pi / int(match[2]))]
        if match[1] == "D":
            generators.append(axis_rotation(x, np.pi))
    elif name == "T":
        # RELION: three-fold on z, two-fold at the tetrahedral angle to it.
        generators = [
            axis_rotation(z, 2 * np.pi / 3),
            axis_rotation(np.array([0.0, np.sqrt(2 / 3), np.sqrt(1 / 3)]), np.pi),
        ]
    elif name == "O":
        generators = [axis_rotation(z, np.pi / 2), axis_rotation(np.ones(3), 2 * np.pi / 3)]
    elif match := re.fullmatch(r"I([1-4]?)", name):
        generators = [
            axis_rotation(np.array(axis), 2 * np.pi / order)
            for axis, order in zip(_ICOSAHEDRAL_AXES[match[1] or "2"], (2, 5, 3), strict=True)
        ]
    else:
        raise InputError(f"--symmetry {symbol}: not a point group; expected Cn, Dn, T, O, I (= I2), I1, I2, I3 or I4")
    return torch.from_numpy(_close(generators))


def generators(group: Float[Tensor, "s 3 3"]) -> Float[Tensor, "g 3 3"]:
    """A few elements of a group that generate it, the first that do; none for the trivial group."""
    chosen: list[NDArray[np.float64]] = []
    known = np.eye(3)[None]
    for element in group.numpy():
        if not _contains(known, element):
            chosen.append(element)
            known = _close(chosen)
    return torch.from_numpy(np.stack(chosen)) if chosen else torch.zeros(0, 3, 3, dtype=group.dtype)
