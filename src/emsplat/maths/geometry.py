"""Orientations: RELION's Euler angles, matrices and quaternions, uniform sampling of rotations.

Matrices map object to image coordinates (q = A p); see docs/conventions.md.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor


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


def six_to_matrix(numbers: Float[Tensor, "*p 6"]) -> Float[Tensor, "*p 3 3"]:
    """Rotation matrices without a seam (Zhou et al. 2019), the identity for zeros.

    The numbers are what is added to the first two columns of the identity; these are then made orthonormal.
    """
    first = torch.cat([numbers[..., :1] + 1, numbers[..., 1:3]], -1)
    second = torch.cat([numbers[..., 3:4], numbers[..., 4:5] + 1, numbers[..., 5:]], -1)
    x = torch.nn.functional.normalize(first, dim=-1)
    y = torch.nn.functional.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], -1)


def matrix_to_quaternion(matrix: Float[Tensor, "g 3 3"]) -> Float[Tensor, "g 4"]:
    """Unit quaternions (w, x, y, z) with w >= 0 of rotation matrices: the inverse of `quaternion_to_matrix`, not
    differentiable."""
    xyzw = Rotation.from_matrix(matrix.detach().numpy()).as_quat(canonical=True)
    return torch.from_numpy(xyzw[:, [3, 0, 1, 2]]).to(matrix.dtype)


def vector_to_matrix(vector: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 3"]:
    """Rotation vectors (axis times angle, rad) to matrices exp([w]×)."""
    cross = vector.new_zeros(len(vector), 3, 3)
    cross[:, 0, 1], cross[:, 0, 2], cross[:, 1, 2] = -vector[:, 2], vector[:, 1], -vector[:, 0]
    matrices: Tensor = torch.linalg.matrix_exp(cross - cross.mT)
    return matrices


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
