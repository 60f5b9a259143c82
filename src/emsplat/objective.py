"""Objectives: what a model is compared with. An objective owns its data, so one loop (`fit`) serves all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from emsplat.ctf import ctf
from emsplat.fourier import hermitian_weight, shell_index, shift_phase
from emsplat.model import GaussianField
from emsplat.particles import ParticleStack
from emsplat.project import CUTOFF, project
from emsplat.types import Batch, Gaussians, Grid, Poses

_CACHED_PIXELS = 2**19


class Objective(Protocol):
    """A scalar to make small, in named terms; ``step`` chooses the data."""

    steps_per_epoch: int

    def __call__(self, model: GaussianField, step: int) -> dict[str, Tensor]: ...


class _KnownGradient(torch.autograd.Function):
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
    weight: Float[Tensor, "*p y k"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "p y x"]]:
    """Sum over the images of Σ_k h w |C P̂ - Ŷ|² / N⁴, and its gradient with respect to the projections.

    For w = 1 an image adds its mean squared error per pixel (Parseval); h counts the coefficients that the half plane
    leaves out. The gradient is 2 irfft(w C (C P̂ - Ŷ)) / N²: one inverse transform, where automatic differentiation of
    rfft would take a full complex one.
    """
    size = projection.shape[-1]
    residual = torch.fft.rfft2(projection) * transfer - observed
    power = (residual.real**2 + residual.imag**2) * weight
    error = (power.sum((0, 1)) * hermitian_weight(size).to(power)).sum() / size**4
    gradient = torch.fft.irfft2(residual * (transfer * weight), s=(size, size))
    return error, gradient * (2 / size**2)


def squared_error(
    projection: Float[Tensor, "p y x"],
    transfer: Float[Tensor, "p y k"],
    observed: Complex[Tensor, "p y k"],
    weight: Float[Tensor, "*p y k"],
) -> Float[Tensor, ""]:
    """Weighted squared error between CTF-modulated projections and observed images, mean over images and pixels.

    Transforms are those of images as they lie in memory (origin in the corner): the phase of the true centre is the
    same in both and cancels. ``weight`` is 1 for the plain mean squared error (GEM eq. 7, cryoSplat 3.3.5), or
    1/σ²(shell) of the particle's noise.
    """
    error, gradient = error_and_gradient(projection.detach(), transfer, observed, weight)
    count = len(projection)
    return cast(Tensor, _KnownGradient.apply(projection, error / count, gradient / count))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Observed:
    """A batch as the loss needs it."""

    spectrum: Complex[Tensor, "p y k"]  # of the images, shifted so that their particles are centred
    transfer: Float[Tensor, "p y k"]
    weight: Float[Tensor, "*p y k"]


class ImageObjective:
    """Images against projections: the papers' training in the image domain, in mini-batches of any size.

    Every epoch presents each particle once, in an order that follows from (seed, epoch) alone, so that a run can be
    resumed at any step. ``noise`` (optics groups, shells) turns the mean squared error into a noise-weighted one.
    """

    def __init__(
        self,
        stack: ParticleStack,
        *,
        batch: int,
        seed: int,
        noise: Float[Tensor, "o s"] | None = None,
        cutoff: float = CUTOFF,
    ) -> None:
        self.stack = stack
        self.batch = batch
        self.seed = seed
        self.cutoff = cutoff
        self.steps_per_epoch = math.ceil(len(stack) / batch)
        self._weight = None if noise is None else noise_weight(noise, stack.grid)
        self._next_step = -1
        self._batches: Iterator[Batch] = iter(())

    def __call__(self, model: GaussianField, step: int) -> dict[str, Tensor]:
        """The loss of the mini-batch of ``step``, counted from the first step of the first epoch."""
        return {"loss": self.loss(model(), self._load(step))}

    def loss(self, gaussians: Gaussians, batch: Batch) -> Float[Tensor, ""]:
        """`squared_error` of a batch, the transforms a few images at a time so that they stay in the cache."""
        grid = self.stack.grid
        centred = Poses(batch.poses.rotation, torch.zeros_like(batch.poses.shift))
        projection = project(gaussians, centred, grid, cutoff=self.cutoff)
        few = max(1, _CACHED_PIXELS // grid.size**2)
        error, gradient = torch.zeros(()), torch.empty_like(projection)
        for start in range(0, len(projection), few):
            part = slice(start, start + few)
            seen = self.observe(batch[part])
            added, gradient[part] = error_and_gradient(
                projection.detach()[part], seen.transfer, seen.spectrum, seen.weight
            )
            error += added
        count = len(projection)
        return cast(Tensor, _KnownGradient.apply(projection, error / count, gradient / count))  # type: ignore[no-untyped-call]

    def observe(self, batch: Batch) -> Observed:
        """Transforms the images, moves their particles to the centre and works out CTF and weight."""
        grid = self.stack.grid
        spectrum = torch.fft.rfft2(batch.images) * shift_phase(batch.poses.shift, grid)
        weight = torch.ones(1, 1) if self._weight is None else self._weight[batch.optics_group]
        return Observed(spectrum, ctf(batch.optics, grid), weight)

    def _load(self, step: int) -> Batch:
        if step != self._next_step or step % self.steps_per_epoch == 0:
            epoch, skip = divmod(step, self.steps_per_epoch)
            self._batches = self.stack.batches(self.batch, seed=self.seed, epoch=epoch, skip=skip)
        self._next_step = step + 1
        return next(self._batches)


def noise_weight(noise: Float[Tensor, "o s"], grid: Grid) -> Float[Tensor, "o y k"]:
    """1/σ² of each rfft coefficient, 0 beyond the last shell: the corners hold no shell of the map."""
    shells = shell_index(grid.size)
    inside = shells <= grid.size // 2
    return inside / noise[:, shells.clamp(max=grid.size // 2)]
