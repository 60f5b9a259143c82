"""The objective of the one-pass engine: the map of a model against the normal equations of all images."""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.errors import InputError
from emsplat.fitting.objective import KnownGradient
from emsplat.imaging.project import CUTOFF, voxelize
from emsplat.maths.fourier import by_columns, convolve, crop, frequencies, is_smooth, middle, shell_slabs
from emsplat.models.base import Model
from emsplat.sums.equations import NormalEquations, mean_per_shell, response_of
from emsplat.types import Gaussians, Grid


class VolumeObjective:
    """The normal equations of all images against the voxelised model: ½ VᵀKV - bᵀV per image.

    The cost of a step does not depend on the number of images. V is looked at in the middle ``support`` voxels of the
    box, and K applied by FFT on a grid half as large again: lags beyond three quarters of the support are wrapped,
    where both ends of a particle that fills the support would have to be bright.

    The first ``coarse_steps`` steps take voxels twice as large and only the frequencies that they carry.

    What it needs of the equations it has by itself: they need not be kept. ``box`` is their grid.
    """

    steps_per_epoch = 10

    def __init__(
        self, equations: NormalEquations, support: int, *, coarse_steps: int = 0, cutoff: float = CUTOFF
    ) -> None:
        self.images, self.box, self.device = equations.particles, equations.grid, equations.linear.device
        self.support = support
        self.coarse_steps = coarse_steps
        self._fine = _Level(equations, support, 1, cutoff)
        self._coarse = _Level(equations, support, 2, cutoff) if coarse_steps else self._fine

    def __call__(self, model: Model, step: int) -> dict[str, Tensor]:
        """The loss of all images against the consensus of the model; every step sees the same."""
        level = self._coarse if step < self.coarse_steps else self._fine
        volume = level.render(model.gaussians())
        error, gradient = level.error_and_gradient(volume.detach())
        return {"loss": cast(Tensor, KnownGradient.apply(volume, error, gradient))}  # type: ignore[no-untyped-call]

    def render(self, gaussians: Gaussians) -> Float[Tensor, "z y x"]:
        """The mixture in the middle of the box."""
        return self._fine.render(gaussians)

    def error_and_gradient(self, volume: Float[Tensor, "z y x"]) -> tuple[Float[Tensor, ""], Float[Tensor, "z y x"]]:
        """½ VᵀKV - bᵀV per image, and its gradient KV - b."""
        return self._fine.error_and_gradient(volume)

    def best_gain(self, model: Model) -> float:
        """The factor on all amplitudes that makes the loss smallest; positive, 1 for a model that is outside of what is
        looked at."""
        with torch.no_grad():
            volume = self.render(model.gaussians())
        error, gradient = self.error_and_gradient(volume)
        slope = torch.dot(volume.flatten(), gradient.flatten())  # VᵀKV - bᵀV
        curvature = 2 * (slope - error)  # VᵀKV
        if not float(curvature) > 0:  # nothing of it is where this looks
            return 1.0
        gain = float(1 - slope / curvature)
        # Where the data do not correlate with the start, the amplitude of a random fit is a harmless beginning.
        return gain if gain > 0 else float(curvature.rsqrt())

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
        self._device = equations.linear.device
        response = response_of(equations.kernel, 3 * support // 2).clamp_(min=0)
        linear = middle(equations.linear, support)
        if coarsening > 1:
            # A sum over fewer lags; b keeps its values.
            response = crop(response, side, 3) / coarsening**3 * self._sharpening(side) ** 2
            spectrum = crop(torch.fft.rfftn(linear), size, 3) / coarsening**3
            linear = torch.fft.irfftn(spectrum * self._sharpening(size), s=(size,) * 3)
        self._response, self._linear = by_columns(response / equations.particles), linear / equations.particles

    def _sharpening(self, side: int) -> Float[Tensor, "z y k"]:
        kz, ky, kx = frequencies(Grid(side, self.grid.pixel_size), 3, device=self._device)
        return torch.exp(2 * math.pi**2 * self.blur**2 * (kz**2 + ky**2 + kx**2))

    def render(self, gaussians: Gaussians) -> Float[Tensor, "z y x"]:
        if self.blur:
            covariance = gaussians.covariance + self.blur**2 * torch.eye(3, device=self._device)
            gaussians = Gaussians(gaussians.mean, covariance, gaussians.amplitude)
        return voxelize(gaussians, self.grid, cutoff=self.cutoff)

    def error_and_gradient(self, volume: Float[Tensor, "z y x"]) -> tuple[Float[Tensor, ""], Float[Tensor, "z y x"]]:
        applied = convolve(volume, self._response)
        power, product = (torch.dot(volume.flatten(), other.flatten()) for other in (applied, self._linear))
        return 0.5 * power - product, applied.sub_(self._linear)

    def residual(self, volume: Float[Tensor, "z y x"]) -> Float[Tensor, "z y x"]:
        _, gradient = self.error_and_gradient(volume)
        return convolve(gradient.neg_(), self._inverse())

    def _inverse(self) -> Float[Tensor, "w v k"]:
        """1 / w, bounded where little was measured."""
        least, tiny = 0.1 * mean_per_shell(self._response), 1e-6 * self._response.max()
        least = torch.cat([least, least[-1:]])  # of the corners too
        inverse = torch.empty_like(self._response)
        for planes, shells in shell_slabs(len(inverse), self._device):
            inverse[planes] = 1 / (self._response[planes] + (least[shells] + tiny))
        return inverse


def support_size(extent: int, box: int) -> int:
    """A number of voxels that covers ``extent`` (as far as the box allows), with fast transforms at 3/2 of it.

    Multiples of 8 without prime factors above 5, so that it can be coarsened twice.
    """
    sizes = [8 * k for k in range(1, box // 8 + 1) if is_smooth(k)]
    if not sizes:
        raise InputError(f"box of {box} voxels: too small; expected at least 8")
    return next((size for size in sizes if size >= extent), sizes[-1])


def support_of(mask: Float[Tensor, "z y x"]) -> int:
    """Voxels across that hold the mask, with a margin for the Gaussians' tails."""
    positions = (mask > 0.01).nonzero() - len(mask) // 2
    reach = int(positions.abs().max()) if len(positions) else len(mask) // 2
    return support_size(2 * reach + 4, len(mask))
