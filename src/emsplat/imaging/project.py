"""Projection and voxelisation of a Gaussian mixture: the two operators, differentiable in every input.

A Gaussian is drawn only where it is within ``cutoff`` standard deviations of its centre (GEM eq. 8 skips negligible
contributions by a threshold on their value; a cut in σ gives a bound that does not depend on the amplitude). What is
left out is at most exp(-cutoff²/2) of a Gaussian's peak at any pixel and of its mass in all: 3.4e-4 at the default.
GEM's ordering along z changes nothing in a sum and is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from emsplat.kernels import backend, cpu
from emsplat.maths.geometry import quaternion_to_matrix
from emsplat.types import Gaussians, Grid, Poses

CUTOFF = 4.0


class _Project(torch.autograd.Function):
    """One mixture for all images, or with a leading axis one for each."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        kernels = backend(inputs[0].device)
        return (kernels.project_each if inputs[0].dim() == 3 else kernels.project)(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.numbers = inputs[6:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with_pose = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        mean, covariance, amplitude, rotation, shift = ctx.saved_tensors
        pixel_size, cutoff = ctx.numbers
        kernels = backend(upstream.device)
        gradient_of = kernels.project_each_gradient if mean.dim() == 3 else kernels.project_gradient
        gradients = gradient_of(mean, covariance, amplitude, rotation, shift, upstream, pixel_size, cutoff, with_pose)
        return (*gradients[:3], *(gradients[3:] if with_pose else (None, None)), None, None, None)


class _Voxelize(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return backend(inputs[0].device).voxelize(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.numbers = inputs[4:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        mean, covariance, amplitude = ctx.saved_tensors
        pixel_size, cutoff = ctx.numbers
        gradients = backend(upstream.device).voxelize_gradient(
            mean, covariance, amplitude, upstream, pixel_size, cutoff
        )
        return (*gradients, None, None, None)


class _Covariances(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        if inputs[0].device.type == "cpu":
            return cpu.covariances(*inputs)
        axes: Tensor = quaternion_to_matrix(inputs[1]) * inputs[0][:, None, :]
        return axes @ axes.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        scale, quaternion = ctx.saved_tensors
        gradient = cpu.covariances_gradient if scale.device.type == "cpu" else _covariances_gradient
        return gradient(scale, quaternion, upstream)


def _covariances_gradient(
    scale: Float[Tensor, "g 3"], quaternion: Float[Tensor, "g 4"], upstream: Float[Tensor, "g 3 3"]
) -> tuple[Tensor, Tensor]:
    """As native/covariance.hpp."""
    axes = quaternion_to_matrix(quaternion)
    inner = axes.mT @ (upstream + upstream.mT) @ axes
    after, last = scale.roll(-1, 1), scale.roll(-2, 1)
    turn = torch.stack([inner[:, 1, 2], inner[:, 2, 0], inner[:, 0, 1]], 1) * (after - last) * (after + last)
    length = torch.linalg.vector_norm(quaternion, dim=1, keepdim=True).clamp(min=1e-12)
    real, imaginary = (quaternion / length).split([1, 3], 1)
    along = -(imaginary * turn).sum(1, keepdim=True)
    across = real * turn + torch.linalg.cross(imaginary, turn)
    return scale * torch.diagonal(inner, dim1=1, dim2=2), 2 / length * torch.cat([along, across], 1)


def covariances(scale: Float[Tensor, "g 3"], quaternion: Float[Tensor, "g 4"]) -> Float[Tensor, "g 3 3"]:
    """R S² Rᵀ of Gaussians with standard deviations ``scale`` along axes that quaternions (w, x, y, z) of any length
    turn (GEM eq. 4).

    Round Gaussians have no gradient of their turn, not even one of rounding, from which Adam would make steps. On a CPU
    PyTorch's many small matrices would take a quarter of a fit.
    """
    found: Tensor = _Covariances.apply(scale, quaternion)  # type: ignore[no-untyped-call]
    return found


def project(gaussians: Gaussians, poses: Poses, grid: Grid, *, cutoff: float = CUTOFF) -> Float[Tensor, "p y x"]:
    """Projection images: mean (A p)[:2] - shift, covariance (A Σ Aᵀ)[:2, :2], normalisation 1/(2π√det) kept.

    GEM eq. 6, cryoSplat eq. 8. Pixel values are line integrals times the pixel area, so that an image sums to the
    total amplitude. Pixel ``size // 2`` is the origin. ``cutoff`` is the footprint in standard deviations.

    Where particles have mixtures of their own, there is one for each pose; gradients are then those of each.
    """
    count = len(poses)
    mixture = [gaussians.mean, gaussians.covariance, gaussians.amplitude]
    if gaussians.each:
        mixture = [t.expand(count, *t.shape[-own:]) for t, own in zip(mixture, (2, 3, 1), strict=True)]
    image: Tensor = _Project.apply(  # type: ignore[no-untyped-call]
        *mixture,
        poses.rotation,
        poses.shift,
        grid.size,
        grid.pixel_size,
        cutoff,
    )
    return image


def voxelize(gaussians: Gaussians, grid: Grid, *, cutoff: float = CUTOFF) -> Float[Tensor, "z y x"]:
    """The mixture on the voxel grid, times the voxel volume: its sum over z is `project` at the identity pose."""
    volume: Tensor = _Voxelize.apply(  # type: ignore[no-untyped-call]
        gaussians.mean, gaussians.covariance, gaussians.amplitude, grid.size, grid.pixel_size, cutoff
    )
    return volume
