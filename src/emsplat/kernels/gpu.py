"""Launching of the Triton kernels (splat_triton.py, insert_triton.py, pose_triton.py): float32 and float64, one device.

Nothing but the search for poses waits for the device or copies to the host. Gradients and what images say of poses are
sums in a fixed order and the same in each run; images, volumes and Fourier sums are added up by atomic operations in
any order and differ by their rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.kernels import levenberg, unpacked
from emsplat.kernels.insert_triton import insert_kernel
from emsplat.kernels.pose_triton import SUMS, pose_kernel
from emsplat.kernels.splat_triton import (
    pose_gradient_kernel,
    project_gradient_kernel,
    project_kernel,
    voxelize_gradient_kernel,
    voxelize_kernel,
)

TILE = {"ROWS": 8, "COLUMNS": 16}  # pixels that a warp draws at a time; chosen by counting, see docs/gpu.md
POINTS = 32  # Fourier coefficients per warp
_PROGRAMS = 2**15  # enough to fill a device several times over


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
    inputs = _contiguous(mean, covariance, amplitude, rotation, shift)
    return _draw(inputs, len(mean), _shared_out(len(rotation), len(mean)), 0, size, pixel_size, cutoff)


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
    gaussians = mean.shape[1]
    inputs = _contiguous(mean, covariance, amplitude, rotation, shift)
    return _draw(inputs, gaussians, (len(rotation), 1), gaussians, size, pixel_size, cutoff)


def _draw(
    inputs: list[Tensor],
    gaussians: int,
    shared_out: tuple[int, int],
    apart: int,
    size: int,
    pixel_size: float,
    cutoff: float,
) -> Float[Tensor, "p y x"]:
    images = len(inputs[3])
    image = inputs[0].new_zeros(images, size, size)
    parts, per_program = shared_out
    counts = (images, size, 1 / pixel_size, cutoff, per_program, apart)
    _launch(project_kernel, (gaussians, parts), *inputs, image, *counts, **TILE)
    return image


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
    inputs = _contiguous(mean, covariance, amplitude, rotation, shift, upstream)
    shared_out = _shared_out(len(rotation), len(mean))
    packed, *poses = _gather(inputs, len(mean), shared_out, 0, pixel_size, cutoff, with_pose)
    return (*_added_up(packed), poses[0], poses[1])


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
    gaussians = mean.shape[1]
    inputs = _contiguous(mean, covariance, amplitude, rotation, shift, upstream)
    packed, *poses = _gather(inputs, gaussians, (len(rotation), 1), gaussians, pixel_size, cutoff, with_pose)
    return (*unpacked(packed), poses[0], poses[1])


def _gather(
    inputs: list[Tensor],
    gaussians: int,
    shared_out: tuple[int, int],
    apart: int,
    pixel_size: float,
    cutoff: float,
    with_pose: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the Gaussians (parts, g, 13), one part for each image where mixtures are ``apart``, and of poses."""
    rotation, shift, upstream = inputs[3:]
    images, size = len(rotation), upstream.shape[-1]
    parts, per_program = shared_out
    packed = rotation.new_empty(parts, gaussians, 13)
    counts = (gaussians, images, size, 1 / pixel_size, cutoff, per_program, apart)
    _launch(project_gradient_kernel, (gaussians, parts), *inputs, packed, *counts, **TILE)
    rotation_gradient, shift_gradient = torch.zeros_like(rotation), torch.zeros_like(shift)
    if with_pose:
        parts, per_program = _shared_out(gaussians, images)
        poses = rotation.new_empty(images, parts, 8)
        counts = (gaussians, parts, size, 1 / pixel_size, cutoff, per_program, apart)
        _launch(pose_gradient_kernel, (images, parts), *inputs, poses, *counts, **TILE)
        summed = poses.sum(1)
        # The third row of a rotation does not enter a projection.
        rotation_gradient[:, :2], shift_gradient = summed[:, :6].reshape(-1, 2, 3), summed[:, 6:]
    return packed, rotation_gradient, shift_gradient


def voxelize(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    size: int,
    pixel_size: float,
    cutoff: float,
) -> Float[Tensor, "z y x"]:
    gaussians = len(mean)
    volume = mean.new_zeros(size, size, size)
    parts, _ = _shared_out(size, gaussians)
    inputs = _contiguous(mean, covariance, amplitude)
    _launch(voxelize_kernel, (gaussians, parts), *inputs, volume, size, 1 / pixel_size, cutoff, parts, **TILE)
    return volume


def voxelize_gradient(
    mean: Float[Tensor, "g 3"],
    covariance: Float[Tensor, "g 3 3"],
    amplitude: Float[Tensor, " g"],
    upstream: Float[Tensor, "z y x"],
    pixel_size: float,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gaussians, size = len(mean), upstream.shape[-1]
    parts, _ = _shared_out(size, gaussians)
    packed = mean.new_empty(parts, gaussians, 13)
    inputs = _contiguous(mean, covariance, amplitude, upstream)
    counts = (gaussians, size, 1 / pixel_size, cutoff, parts)
    _launch(voxelize_gradient_kernel, (gaussians, parts), *inputs, packed, *counts, **TILE)
    return _added_up(packed)


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
    images, box, columns = weight.shape
    inputs = _contiguous(torch.view_as_real(numerator), weight, rotation, polynomials)
    sums = (torch.view_as_real(total), total_weight)
    grid = (triton.cdiv(box * columns, POINTS), images)
    numbers = (box, len(total), radius, step)
    _launch(insert_kernel, grid, *inputs, *sums, *numbers, DEGREE=len(polynomials) - 1, POINTS=POINTS)


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
    if not bool((rotation.abs() < 1.001).all() & (image >= 0).all() & (image < len(values)).all()):
        raise ValueError("expected rotations, of images that there are")
    degree = len(polynomials) - 1
    slopes = polynomials[:-1] * torch.arange(degree, 0, -1, device=polynomials.device)[:, None]
    seen = _contiguous(torch.view_as_real(space), torch.view_as_real(values), transfer, point, magnification)
    window = _contiguous(polynomials, slopes)
    blocks = triton.cdiv(len(point), POINTS)
    furthest = int(point.abs().max()) if len(point) else 0
    along = torch.arange(-furthest, furthest + 1, dtype=torch.float64, device=point.device)

    def look(views: Tensor, rotation: Tensor, move: Tensor) -> Tensor:
        parts, per_program = _shared_out(blocks, len(views))
        sums = transfer.new_zeros(len(views), parts, SUMS.value)
        angles = torch.cat([move[:, :1] * along[furthest:], move[:, 1:] * along], 1)
        phases = torch.stack([angles.cos(), -angles.sin()], -1).float()
        own = _contiguous(image[views], rotation.float(), phases)
        counts = (len(point), transfer.shape[1], len(space), furthest, step, per_program, parts)
        _launch(pose_kernel, (len(views), parts), *seen, *own, *window, sums, *counts, DEGREE=degree, POINTS=POINTS)
        return sums.sum(1)

    return levenberg.descend(look, rotation, given, move, offset, precision, most, enough, longest)


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: int) -> None:
    """One warp per program: the tiles are as small as that, and no warp waits for another."""
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **constants, num_warps=1, enable_fp_fusion=True)


def _shared_out(work: int, others: int) -> tuple[int, int]:
    """In how many parts to share out what each of ``others`` has to do, and how much work a part is."""
    parts = max(1, min(work, _PROGRAMS // max(others, 1)))
    per_program = triton.cdiv(work, parts)
    return triton.cdiv(work, max(per_program, 1)), per_program


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in tensors]


def _added_up(packed: Float[Tensor, "parts g 13"]) -> tuple[Tensor, Tensor, Tensor]:
    return unpacked(packed[0] if len(packed) == 1 else packed.sum(0))
