"""Orientations: RELION's Euler angles, matrices and quaternions, point groups, uniform sampling of rotations.

Matrices map object to image coordinates (q = A p); see docs/conventions.md.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from emsplat.errors import InputError


def euler_to_matrix(angles: Float[Tensor, "*p 3"]) -> Float[Tensor, "*p 3 3"]:
    """Rotation matrices of RELION's (rot, tilt, psi) in radians: intrinsic Z-Y'-Z''.

    The third row is the viewing direction in the object frame.
    """
    (ca, cb, cg), (sa, sb, sg) = torch.cos(angles).unbind(-1), torch.sin(angles).unbind(-1)
    rows = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_euler(matrix: Float[Tensor, "*p 3 3"]) -> Float[Tensor, "*p 3"]:
    """RELION's (rot, tilt, psi) in radians; where tilt is 0 or π, rot is 0 and psi carries the in-plane angle."""
    a = matrix
    sine = torch.hypot(a[..., 2, 0], a[..., 2, 1])
    tilt = torch.atan2(sine, a[..., 2, 2])
    pole = sine < 1e-6
    rot = torch.where(pole, 0.0, torch.atan2(a[..., 2, 1], a[..., 2, 0]))
    psi = torch.where(pole, torch.atan2(a[..., 0, 1], a[..., 1, 1]), torch.atan2(a[..., 1, 2], -a[..., 0, 2]))
    return torch.stack([rot, tilt, psi], -1)


def quaternion_to_matrix(quaternion: Float[Tensor, "*g 4"]) -> Float[Tensor, "*g 3 3"]:
    """Rotation matrices of quaternions (w, x, y, z), which need not be normalised."""
    unit = torch.nn.functional.normalize(quaternion, dim=-1)
    products = (unit[..., :, None] * unit[..., None, :]).flatten(-2)
    return (products @ _products_to_matrix(unit.dtype, unit.device)).reshape(*unit.shape[:-1], 3, 3)


@cache
def _products_to_matrix(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "16 9"]:
    """What leads from the products of a unit quaternion's numbers to its matrix: one operation on a GPU, not fifty."""
    # Row of w, x, y, z times row of w, x, y, z: how often each enters the nine entries.
    sums = torch.zeros(4, 4, 3, 3, dtype=dtype)
    for i in range(4):
        for j in range(3):
            sums[i, i, j, j] = 1 if i in (0, j + 1) else -1
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):  # 2 (q_i q_j ∓ w q_k)
        sums[i + 1, j + 1, i, j] = sums[i + 1, j + 1, j, i] = 2
        sums[0, k + 1, i, j], sums[0, k + 1, j, i] = -2, 2
    return sums.reshape(16, 9).to(device)


def matrix_to_quaternion(matrix: Float[Tensor, "g 3 3"]) -> Float[Tensor, "g 4"]:
    """Unit quaternions (w, x, y, z) with w >= 0 of rotation matrices: the inverse of `quaternion_to_matrix`, not
    differentiable."""
    xyzw = Rotation.from_matrix(matrix.detach().numpy()).as_quat(canonical=True)
    return torch.from_numpy(xyzw[:, [3, 0, 1, 2]]).to(matrix.dtype)


def principal_axes(covariance: Float[Tensor, "g 3 3"]) -> tuple[Float[Tensor, "g 3"], Float[Tensor, "g 4"]]:
    """Standard deviations S and unit quaternions of axes R with R S² Rᵀ the covariance (positive definite).

    Rounding may leave the thinnest direction of a needle without variance: it keeps 1e-8 of the largest.
    """
    variance, axes = torch.linalg.eigh(covariance.double())
    variance = torch.maximum(variance, 1e-8 * variance[:, 2:])
    axes[:, :, 0] *= torch.linalg.det(axes).sign()[:, None]  # a rotation, not a mirror
    return variance.sqrt().to(covariance.dtype), matrix_to_quaternion(axes).to(covariance.dtype)


def random_rotations(count: int, generator: torch.Generator) -> Float[Tensor, "p 3 3"]:
    """Rotations distributed uniformly over SO(3), in float64 (normalised normal quaternions)."""
    return quaternion_to_matrix(torch.randn(count, 4, generator=generator, dtype=torch.float64))


def axis_rotation(axis: ArrayLike, angle: float) -> NDArray[np.float64]:
    """Right-handed rotation by ``angle`` rad about ``axis`` (need not be normalised), shape (3, 3) (Rodrigues)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation


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
