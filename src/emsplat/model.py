"""The model: a mixture of anisotropic 3D Gaussians with 11 free numbers each, its initialisers and its files.

The parameters live in box units, so that one learning rate serves all of them (cryoSplat, 4.1): means and scales as
fractions of the box length, amplitudes as fractions of ``unit``. Scale and amplitude pass through softplus, quaternions
are normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional

from emsplat.geometry import quaternion_to_matrix
from emsplat.types import Gaussians, Grid

PARAMETERS = ("mean", "scale", "quaternion", "amplitude")


def inverse_softplus(value: Tensor) -> Tensor:
    """The x with softplus(x) = value > 0, without overflow."""
    return value + torch.log(-torch.expm1(-value))


@dataclass(frozen=True)
class Bounds:
    """What does not change while the model is fitted."""

    length: float  # box length in Å: the unit of means and scales
    unit: float  # amplitude that a raw amplitude of softplus 1 stands for
    smallest: float  # lower bound on every scale, Å


class GaussianField(torch.nn.Module):
    """N Gaussians as optimisable parameters.

    ``mean`` (g, 3), ``scale`` (g, 3) or (g, 1) when isotropic, ``quaternion`` (g, 4; w, x, y, z) and ``amplitude``
    (g) are raw: `forward` gives the mixture in Å. A model that must not rotate, or whose Gaussians are round, keeps
    its quaternions at identity and does not offer them to the optimiser.
    """

    def __init__(
        self,
        mean: Float[Tensor, "g 3"],
        scale: Float[Tensor, "g s"],
        quaternion: Float[Tensor, "g 4"],
        amplitude: Float[Tensor, " g"],
        bounds: Bounds,
        *,
        rotation: bool = True,
    ) -> None:
        super().__init__()
        self.bounds = bounds
        self.rotation = rotation and scale.shape[1] == 3
        self.mean = torch.nn.Parameter(mean)
        self.scale = torch.nn.Parameter(scale)
        self.quaternion = torch.nn.Parameter(quaternion, requires_grad=self.rotation)
        self.amplitude = torch.nn.Parameter(amplitude)

    def __len__(self) -> int:
        return len(self.mean)

    def scales(self) -> Float[Tensor, "g 3"]:
        """Standard deviations along the Gaussians' own axes in Å: smallest + length * softplus(raw)."""
        scale = self.bounds.smallest + self.bounds.length * functional.softplus(self.scale)
        return scale.expand(-1, 3)

    def amplitudes(self) -> Float[Tensor, " g"]:
        """Integrals of the Gaussians: unit * softplus(raw)."""
        return self.bounds.unit * functional.softplus(self.amplitude)

    def forward(self) -> Gaussians:
        """The mixture in Å: covariance R S² Rᵀ (GEM eq. 4)."""
        scale = self.scales()
        if self.rotation:
            axes = quaternion_to_matrix(self.quaternion) * scale[:, None, :]
            covariance = axes @ axes.mT
        else:
            covariance = torch.diag_embed(scale**2)
        return Gaussians(self.bounds.length * self.mean, covariance, self.amplitudes())

    @torch.no_grad()
    def split(self) -> GaussianField:
        """Twice as many Gaussians: each gives way to two halves along its longest axis.

        The halves sit ±0.6 s from the old centre with 0.8 s in that direction, so that mass, mean and covariance of
        every pair are those of the Gaussian it replaces (as far as the lower bound on the scale allows; an isotropic
        pair shrinks in all directions by the same volume).
        """
        scale = self.scales()
        longest = scale.argmax(1)
        axes = quaternion_to_matrix(self.quaternion)
        direction = axes.gather(2, longest[:, None, None].expand(-1, 3, 1)).squeeze(2)
        rows = torch.arange(len(self))
        offset = 0.6 * scale[rows, longest, None] * direction / self.bounds.length
        if self.scale.shape[1] == 1:
            smaller = 0.8 ** (1 / 3) * scale[:, :1]
        else:
            smaller = scale.clone()
            smaller[rows, longest] *= 0.8
        raw_scale = _raw_scale(smaller, self.bounds)
        raw_amplitude = inverse_softplus(0.5 * functional.softplus(self.amplitude))
        return GaussianField(
            torch.cat([self.mean + offset, self.mean - offset]),
            raw_scale.repeat(2, 1),
            self.quaternion.detach().repeat(2, 1),
            raw_amplitude.repeat(2),
            self.bounds,
            rotation=self.rotation,
        )


def _raw_scale(scale: Tensor, bounds: Bounds) -> Tensor:
    """Raw parameters of scales in Å; a scale at or below the bound starts 1 % above it, where the gradient lives."""
    free = torch.clamp(scale - bounds.smallest, min=0.01 * bounds.smallest)
    return inverse_softplus(free / bounds.length)


def ball(
    count: int, grid: Grid, bounds: Bounds, seed: int, *, isotropic: bool = False, rotation: bool = True
) -> GaussianField:
    """Means normal with σ = 0.075 of the box, scales 0.0075 of the box, softplus amplitudes 1/(2N) (cryoSplat, 4.1)."""
    rng = torch.Generator().manual_seed(seed)
    mean = 0.075 * torch.randn(count, 3, generator=rng)
    scale = torch.full((count, 1 if isotropic else 3), 0.0075 * grid.length)
    return _field(mean, scale, bounds, rotation)


def uniform(
    count: int, grid: Grid, bounds: Bounds, seed: int, *, isotropic: bool = False, rotation: bool = True
) -> GaussianField:
    """Means uniform in the cube, scale of each the mean distance to its three nearest neighbours (GEM)."""
    rng = torch.Generator().manual_seed(seed)
    mean = torch.rand(count, 3, generator=rng) - 0.5
    distance, _ = cKDTree(mean.numpy()).query(mean.numpy(), k=min(4, count))
    nearest = np.atleast_2d(distance)[:, 1:].mean(1) if count > 1 else np.full(1, 0.5)
    scale = torch.from_numpy(nearest).float()[:, None] * grid.length
    return _field(mean, scale.repeat(1, 1 if isotropic else 3), bounds, rotation)


def _field(mean: Tensor, scale: Tensor, bounds: Bounds, rotation: bool) -> GaussianField:
    count = len(mean)
    quaternion = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(count, 1)
    amplitude = inverse_softplus(torch.full((count,), 0.5 / count))
    return GaussianField(mean, _raw_scale(scale, bounds), quaternion, amplitude, bounds, rotation=rotation)


INITIALISERS = {"ball": ball, "uniform": uniform}
