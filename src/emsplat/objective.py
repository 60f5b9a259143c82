"""Objectives: what a model is compared with. An objective owns its data, so one loop (`fit`) serves all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from emsplat.accumulate import NormalEquations, mean_per_shell
from emsplat.ctf import Observed, in_image, observe
from emsplat.errors import InputError
from emsplat.fourier import crop, frequencies, hermitian_weight, is_smooth, shell_index
from emsplat.models.base import Model
from emsplat.particles import ParticleStack
from emsplat.project import CUTOFF, project, voxelize
from emsplat.types import Batch, Gaussians, Grid, Poses

_CACHED_PIXELS = 2**19


class Objective(Protocol):
    """A scalar to make small, in named terms; ``step`` chooses the data."""

    steps_per_epoch: int

    def __call__(self, model: Model, step: int) -> dict[str, Tensor]: ...


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
    error = (power.sum((0, 1)) * hermitian_weight(size, power.dtype, power.device)).sum() / size**4
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

    def __call__(self, model: Model, step: int) -> dict[str, Tensor]:
        """The loss of the mini-batch of ``step``, counted from the first step of the first epoch."""
        batch = self._load(step)
        return {"loss": self.loss(model.gaussians(batch), batch, model.poses(batch))}

    def loss(self, gaussians: Gaussians, batch: Batch, poses: Poses | None = None) -> Float[Tensor, ""]:
        """`squared_error` of a batch seen in ``poses`` (None: its own), differentiable in the Gaussians and the poses.

        Images are moved by the batch's shifts, and projected by what the poses' differ from these. On the CPU a few
        images are transformed at a time: they stay in the cache.
        """
        grid = self.stack.grid
        poses = batch.poses if poses is None else poses
        seen_as = Poses(in_image(poses.rotation, batch.optics), poses.shift - batch.poses.shift)
        projection = project(gaussians, seen_as, grid, cutoff=self.cutoff)
        on_cpu = projection.device.type == "cpu"
        few = max(1, _CACHED_PIXELS // grid.size**2) if on_cpu else max(1, len(projection))
        error, gradient = torch.zeros((), device=projection.device), torch.empty_like(projection)
        for start in range(0, len(projection), few):
            part = slice(start, start + few)
            seen, weight = self.observe(batch[part])
            added, gradient[part] = error_and_gradient(projection.detach()[part], seen.transfer, seen.spectrum, weight)
            error += added
        count = len(projection)
        return cast(Tensor, _KnownGradient.apply(projection, error / count, gradient / count))  # type: ignore[no-untyped-call]

    def observe(self, batch: Batch) -> tuple[Observed, Float[Tensor, "*p y k"]]:
        """Transforms and CTFs of a batch, and the weight of each coefficient."""
        seen = observe(batch, self.stack.grid, corner=True)
        weight = seen.transfer.new_ones(1, 1) if self._weight is None else self._weight[batch.optics_group]
        return seen, weight if batch.share is None else weight * batch.share[:, None, None]

    def _load(self, step: int) -> Batch:
        if step != self._next_step or step % self.steps_per_epoch == 0:
            epoch, skip = divmod(step, self.steps_per_epoch)
            self._batches = self.stack.batches(self.batch, seed=self.seed, epoch=epoch, skip=skip)
        self._next_step = step + 1
        return next(self._batches)


class VolumeObjective:
    """The normal equations of all images against the voxelised model: ½ VᵀKV - bᵀV per image.

    The cost of a step does not depend on the number of images. V is looked at in the middle ``support`` voxels of the
    box, and K applied by FFT on a grid half as large again: lags beyond three quarters of the support are wrapped,
    where both ends of a particle that fills the support would have to be bright.

    The first ``coarse_steps`` steps take voxels twice as large and only the frequencies that they carry.
    """

    steps_per_epoch = 10

    def __init__(
        self, equations: NormalEquations, support: int, *, coarse_steps: int = 0, cutoff: float = CUTOFF
    ) -> None:
        self.images = equations.particles
        self.coarse_steps = coarse_steps
        self._fine = _Level(equations, support, 1, cutoff)
        self._coarse = _Level(equations, support, 2, cutoff) if coarse_steps else self._fine

    def __call__(self, model: Model, step: int) -> dict[str, Tensor]:
        """The loss of all images against the consensus of the model; every step sees the same."""
        level = self._coarse if step < self.coarse_steps else self._fine
        volume = level.render(model.gaussians())
        error, gradient = level.error_and_gradient(volume.detach())
        return {"loss": cast(Tensor, _KnownGradient.apply(volume, error, gradient))}  # type: ignore[no-untyped-call]

    def render(self, gaussians: Gaussians) -> Float[Tensor, "z y x"]:
        """The mixture in the middle of the box."""
        return self._fine.render(gaussians)

    def error_and_gradient(self, volume: Float[Tensor, "z y x"]) -> tuple[Float[Tensor, ""], Float[Tensor, "z y x"]]:
        """½ VᵀKV - bᵀV per image, and its gradient KV - b."""
        return self._fine.error_and_gradient(volume)

    def best_gain(self, model: Model) -> float:
        """The factor on all amplitudes that makes the loss smallest; positive."""
        with torch.no_grad():
            volume = self.render(model.gaussians())
        error, gradient = self.error_and_gradient(volume)
        slope = torch.dot(volume.flatten(), gradient.flatten())  # VᵀKV - bᵀV
        curvature = 2 * (slope - error)  # VᵀKV
        gain = float(1 - slope / curvature) if float(curvature) > 0 else 0.0
        # Where the data do not correlate with the start, the amplitude of a random fit is a harmless beginning.
        return gain if gain > 0 else float(curvature.clamp(min=1e-30).rsqrt())

    def residual(self, volume: Float[Tensor, "z y x"]) -> Float[Tensor, "z y x"]:
        """The classical map of what a model leaves unexplained: (b - KV) / w, unmeasured frequencies left at 0."""
        return self._fine.residual(volume)


class _Level:
    """The quadratic form on one grid, ``coarsening`` times coarser than that of the equations.

    Gaussians too narrow for coarse voxels are blurred by a known Gaussian, which K and b take out again.
    """

    def __init__(self, equations: NormalEquations, support: int, coarsening: int, cutoff: float) -> None:
        size, side = support // coarsening, 3 * support // (2 * coarsening)
        self.grid = Grid(size, coarsening * equations.grid.pixel_size)
        self.cutoff = cutoff
        self.blur = 0.0 if coarsening == 1 else 0.5 * self.grid.pixel_size
        width = 3 * support // 2
        self._device = equations.linear.device
        centred = (torch.arange(width, device=self._device) + width // 2) % width - width // 2
        lag = centred + len(equations.kernel) // 2
        response = torch.fft.rfftn(equations.kernel[lag][:, lag][:, :, lag]).real.clamp(min=0)
        edge = equations.grid.size // 2 - support // 2
        inside = slice(edge, edge + support)
        linear = equations.linear[inside, inside, inside]
        if coarsening > 1:
            # A sum over fewer lags; b keeps its values.
            response = crop(response, side, 3) / coarsening**3 * self._sharpening(side) ** 2
            spectrum = crop(torch.fft.rfftn(linear), size, 3) / coarsening**3
            linear = torch.fft.irfftn(spectrum * self._sharpening(size), s=(size,) * 3)
        self._response, self._linear = response / equations.particles, linear / equations.particles

    def _sharpening(self, side: int) -> Float[Tensor, "z y k"]:
        kz, ky, kx = frequencies(Grid(side, self.grid.pixel_size), 3, device=self._device)
        return torch.exp(2 * math.pi**2 * self.blur**2 * (kz**2 + ky**2 + kx**2))

    def render(self, gaussians: Gaussians) -> Float[Tensor, "z y x"]:
        if self.blur:
            covariance = gaussians.covariance + self.blur**2 * torch.eye(3, device=self._device)
            gaussians = Gaussians(gaussians.mean, covariance, gaussians.amplitude)
        return voxelize(gaussians, self.grid, cutoff=self.cutoff)

    def error_and_gradient(self, volume: Float[Tensor, "z y x"]) -> tuple[Float[Tensor, ""], Float[Tensor, "z y x"]]:
        applied = self._filtered(volume, self._response)
        power, product = (torch.dot(volume.flatten(), other.flatten()) for other in (applied, self._linear))
        return 0.5 * power - product, applied.sub_(self._linear)

    def residual(self, volume: Float[Tensor, "z y x"]) -> Float[Tensor, "z y x"]:
        _, gradient = self.error_and_gradient(volume)
        side = len(self._response)
        shells = shell_index(side, 3, self._device).clamp(max=side // 2)
        floor = 0.1 * mean_per_shell(self._response)[shells] + 1e-6 * self._response.max()
        return self._filtered(-gradient, 1 / (self._response + floor))

    def _filtered(self, volume: Tensor, response: Tensor) -> Float[Tensor, "z y x"]:
        size, side = self.grid.size, len(response)
        spectrum = torch.fft.rfftn(volume, s=(side,) * 3).mul_(response)
        filtered: Tensor = torch.fft.irfftn(spectrum, s=(side,) * 3)[:size, :size, :size]
        return filtered.contiguous()


def support_size(extent: int, box: int) -> int:
    """A number of voxels that covers ``extent`` (as far as the box allows), with fast transforms at 3/2 of it.

    Multiples of 8 without prime factors above 5, so that it can be coarsened twice.
    """
    sizes = [8 * k for k in range(1, box // 8 + 1) if is_smooth(k)]
    if not sizes:
        raise InputError(f"box of {box} voxels: too small; expected at least 8")
    return next((size for size in sizes if size >= extent), sizes[-1])


def noise_weight(noise: Float[Tensor, "o s"], grid: Grid) -> Float[Tensor, "o y k"]:
    """1/σ² of each rfft coefficient, 0 beyond the last shell: the corners hold no shell of the map."""
    shells = shell_index(grid.size, device=noise.device)
    inside = shells <= grid.size // 2
    return inside / noise[:, shells.clamp(max=grid.size // 2)]
