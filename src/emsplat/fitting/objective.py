"""Objectives: what a model is compared with. An objective owns its data, so one loop (`fit`) serves all of them."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from emsplat.maths.fourier import hermitian_weight
from emsplat.models.base import Model


@runtime_checkable
class Objective(Protocol):
    """A scalar to make small, in named terms; ``step`` chooses the data."""

    steps_per_epoch: int

    def __call__(self, model: Model, step: int) -> dict[str, Tensor]: ...


class KnownGradient(torch.autograd.Function):
    """A value whose gradient with respect to ``projection`` is known already."""

    @staticmethod
    def forward(projection: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream * ctx.saved_tensors[0], None, None


def error_and_gradient(
    projection: Float[Tensor, "p y x"],
    transfer: Float[Tensor, "p y k"],
    observed: Complex[Tensor, "p y k"],
    weight: Float[Tensor, "*#p #y #k"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "p y x"]]:
    """Sum over the images of Σ_k h w |C P̂ - Ŷ|² / N⁴, and its gradient with respect to the projections.

    For w = 1 an image adds its mean squared error per pixel (Parseval); h counts the coefficients that the half plane
    leaves out. The gradient is 2 irfft(w C (C P̂ - Ŷ)) / N²: one inverse transform, where automatic differentiation of
    rfft would take a full complex one.
    """
    size = projection.shape[-1]
    residual = torch.fft.rfft2(projection) * transfer - observed
    power = (residual.real**2 + residual.imag**2) * weight
    error = (power.sum((0, 1)) * hermitian_weight(size, power.dtype, power.device)).sum() / size**4
    gradient = torch.fft.irfft2(residual * (transfer * weight), s=(size, size))
    return error, gradient * (2 / size**2)


def squared_error(
    projection: Float[Tensor, "p y x"],
    transfer: Float[Tensor, "p y k"],
    observed: Complex[Tensor, "p y k"],
    weight: Float[Tensor, "*#p #y #k"],
) -> Float[Tensor, ""]:
    """Weighted squared error between CTF-modulated projections and observed images, mean over images and pixels.

    Transforms are those of images as they lie in memory (origin in the corner): the phase of the true centre is the
    same in both and cancels. ``weight`` is 1 for the plain mean squared error (GEM eq. 7, cryoSplat 3.3.5), or
    1/σ²(shell) of the particle's noise.
    """
    error, gradient = error_and_gradient(projection.detach(), transfer, observed, weight)
    count = len(projection)
    return cast(Tensor, KnownGradient.apply(projection, error / count, gradient / count))  # type: ignore[no-untyped-call]
