"""Binding of the C++ kernels (native/): float32 and float64, threads as many as PyTorch uses.

Images are shared out over threads going forward, Gaussians going back, so no two threads write the same number and
every sum has a fixed order: results do not depend on timing. Gradients do not depend on the number of threads either;
an image can (in its last bit) when there are fewer images than threads. Where each image has a mixture of its own, a
thread draws it, or takes its gradient, alone.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emsplat import _native
from emsplat.kernels import unpacked


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().contiguous().numpy()
    return array


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
    mixture, pose = (_array(mean), _array(covariance), _array(amplitude)), (_array(rotation), _array(shift))
    return torch.from_numpy(_native.project(*mixture, *pose, size, pixel_size, cutoff, torch.get_num_threads()))


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
    mixture, pose = (_array(mean), _array(covariance), _array(amplitude)), (_array(rotation), _array(shift))
    packed, poses = _native.project_gradient(
        *mixture, *pose, _array(upstream), pixel_size, cutoff, with_pose, torch.get_num_threads()
    )
    return (*unpacked(torch.from_numpy(packed)), *_unpack_poses(torch.from_numpy(poses)))


def project_each(
    mean: Float[Tensor, "p g 3"],
    covariance: Float[Tensor, "p g 3 3"],
    amplitude: Float[Tensor, "p g"],
    rotation: Float[Tensor, "p 3 3"],
    shift: Float[Tensor, "p 2"],
    size: int,
    pixel_size: float,
    cutoff: float,
) -> Float[Tensor, "p y x"]:
    mixture, pose = (_array(mean), _array(covariance), _array(amplitude)), (_array(rotation), _array(shift))
    return torch.from_numpy(_native.project_each(*mixture, *pose, size, pixel_size, cutoff, torch.get_num_threads()))


def project_each_gradient(
    mean: Float[Tensor, "p g 3"],
    covariance: Float[Tensor, "p g 3 3"],
    amplitude: Float[Tensor, "p g"],
    rotation: Float[Tensor, "p 3 3"],
    shift: Float[Tensor, "p 2"],
    upstream: Float[Tensor, "p y x"],
    pixel_size: float,
    cutoff: float,
    with_pose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mixture, pose = (_array(mean), _array(covariance), _array(amplitude)), (_array(rotation), _array(shift))
    packed, poses = _native.project_each_gradient(
        *mixture, *pose, _array(upstream), pixel_size, cutoff, with_pose, torch.get_num_threads()
    )
    return (*unpacked(torch.from_numpy(packed)), *_unpack_poses(torch.from_numpy(poses)))


def voxelize(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    size: int,
    pixel_size: float,
    cutoff: float,
) -> Float[Tensor, "z y x"]:
    mixture = _array(mean), _array(covariance), _array(amplitude)
    return torch.from_numpy(_native.voxelize(*mixture, size, pixel_size, cutoff, torch.get_num_threads()))


def voxelize_gradient(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    upstream: Float[Tensor, "z y x"],
    pixel_size: float,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mixture = _array(mean), _array(covariance), _array(amplitude)
    return unpacked(
        torch.from_numpy(
            _native.voxelize_gradient(*mixture, _array(upstream), pixel_size, cutoff, torch.get_num_threads())
        )
    )


def covariances(scale: Float[Tensor, "g 3"], quaternion: Float[Tensor, "g 4"]) -> Float[Tensor, "g 3 3"]:
    return torch.from_numpy(_native.covariances(_array(scale), _array(quaternion), torch.get_num_threads()))


def covariances_gradient(
    scale: Float[Tensor, "g 3"], quaternion: Float[Tensor, "g 4"], upstream: Float[Tensor, "g 3 3"]
) -> tuple[Float[Tensor, "g 3"], Float[Tensor, "g 4"]]:
    scales, quaternions = _native.covariances_gradient(
        _array(scale), _array(quaternion), _array(upstream), torch.get_num_threads()
    )
    return torch.from_numpy(scales), torch.from_numpy(quaternions)


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
    slices = _array(numerator), _array(weight), _array(rotation), _array(polynomials)
    _native.insert(total.numpy(), total_weight.numpy(), *slices, radius, step, torch.get_num_threads())


def place(
    space: Complex[Tensor, "Z Y X"],
    values: Complex[Tensor, "i s"],
    transfer: Float[Tensor, "i s"],
    point: Int[Tensor, "k 2"],
    magnification: Float[Tensor, "i 2 2"],
    image: Int[Tensor, " v"],
    rotation: Float[Tensor, "v 3 3"],
    given: Float[Tensor, "v 3 3"],
    move: Float[Tensor, "v 2"],
    offset: Float[Tensor, "v 2"],
    polynomials: Float[Tensor, "d t"],
    step: float,
    precision: tuple[float, float],
    most: int,
    enough: float,
    longest: float,
) -> Float[Tensor, "v 40"]:
    images = _array(space), _array(values), _array(transfer), _array(point), _array(magnification), _array(image)
    views = _array(rotation), _array(given), _array(move), _array(offset)
    return torch.from_numpy(
        _native.place_views(
            *images,
            *views,
            _array(polynomials),
            step,
            precision,
            most,
            enough,
            longest,
            torch.get_num_threads(),
        )
    )


def _unpack_poses(poses: Float[Tensor, "p 8"]) -> tuple[Float[Tensor, "p 3 3"], Float[Tensor, "p 2"]]:
    # The third row of a rotation does not enter a projection.
    return torch.cat([poses[:, :6].reshape(-1, 2, 3), poses.new_zeros(len(poses), 1, 3)], 1), poses[:, 6:]
