"""Binding of the C++ kernels (native/): float32 and float64, threads as many as PyTorch uses.

Images are shared out over threads going forward, Gaussians going back, so no two threads write the same number and
every sum has a fixed order: results do not depend on timing. Gradients do not depend on the number of threads either;
an image can (in its last bit) when there are fewer images than threads.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Complex, Float
from numpy.typing import NDArray
from torch import Tensor

from emsplat import _native


def _arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    return [t.detach().contiguous().numpy() for t in tensors]


def project(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    rotation: Float[Tensor, "p 3 3"],
    shift: Float[Tensor, "p 2"],
    size: int,
    pixel_size: float,
    cutoff: float,
) -> Float[Tensor, "p y x"]:
    inputs = _arrays(mean, covariance, amplitude, rotation, shift)
    return torch.from_numpy(_native.project(*inputs, size, pixel_size, cutoff, torch.get_num_threads()))


def project_gradient(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    rotation: Float[Tensor, "p 3 3"],
    shift: Float[Tensor, "p 2"],
    upstream: Float[Tensor, "p y x"],
    pixel_size: float,
    cutoff: float,
    with_pose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _arrays(mean, covariance, amplitude, rotation, shift, upstream)
    packed, poses = map(
        torch.from_numpy,
        _native.project_gradient(*inputs, pixel_size, cutoff, with_pose, torch.get_num_threads()),
    )
    # The third row of a rotation does not enter a projection.
    rotation_gradient = torch.cat([poses[:, :6].reshape(-1, 2, 3), poses.new_zeros(len(poses), 1, 3)], 1)
    return (*_unpack(packed), rotation_gradient, poses[:, 6:])


def voxelize(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    size: int,
    pixel_size: float,
    cutoff: float,
) -> Float[Tensor, "z y x"]:
    inputs = _arrays(mean, covariance, amplitude)
    return torch.from_numpy(_native.voxelize(*inputs, size, pixel_size, cutoff, torch.get_num_threads()))


def voxelize_gradient(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    upstream: Float[Tensor, "z y x"],
    pixel_size: float,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _arrays(mean, covariance, amplitude, upstream)
    return _unpack(torch.from_numpy(_native.voxelize_gradient(*inputs, pixel_size, cutoff, torch.get_num_threads())))


def insert(
    total: Complex[Tensor, "z y x"],
    total_weight: Float[Tensor, "z y x"],
    numerator: Complex[Tensor, "p v u"],
    weight: Float[Tensor, "p v u"],
    rotation: Float[Tensor, "p 3 3"],
    polynomials: Float[Tensor, "d t"],
    radius: float,
    step: float,
) -> None:
    """Threads share out planes of the volume: sums do not depend on their number."""
    inputs = (_arrays(t)[0] for t in (numerator, weight, rotation, polynomials))
    _native.insert(total.numpy(), total_weight.numpy(), *inputs, radius, step, torch.get_num_threads())


def _unpack(packed: Float[Tensor, "g 13"]) -> tuple[Tensor, Tensor, Tensor]:
    return packed[:, :3], packed[:, 3:12].reshape(-1, 3, 3), packed[:, 12]
