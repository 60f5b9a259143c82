"""The model: a mixture of anisotropic 3D Gaussians with 11 free numbers each.

The parameters are raw numbers that one learning rate can serve (cryoSplat, 4.1): means and scales in units of
``Bounds.length`` (the papers take the box length), amplitudes in units of ``Bounds.unit``. Scale and amplitude pass
through softplus, quaternions are normalised.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from emsplat.imaging.project import covariances
from emsplat.maths.geometry import quaternion_to_matrix
from emsplat.models.base import ParameterGroup, Saved
from emsplat.types import Batch, Gaussians, Poses

KIND = "gaussians"
PARAMETERS = ("mean", "scale", "quaternion", "amplitude")


def unturned(like: Tensor) -> Float[Tensor, "g 4"]:
    """Quaternions that turn nothing, one for each row."""
    return torch.eye(1, 4, dtype=like.dtype, device=like.device).repeat(len(like), 1)


def inverse_softplus(value: Tensor) -> Tensor:
    """The x with softplus(x) = value > 0, without overflow."""
    return value + torch.log(-torch.expm1(-value))


@dataclass(frozen=True)
class Bounds:
    """What does not change while the model is fitted."""

    length: float  # the unit of means and scales in Å
    unit: float  # amplitude that a raw amplitude of softplus 1 stands for
    smallest: float  # lower bound on every scale, Å


class GaussianField(torch.nn.Module):
    """N Gaussians as optimisable parameters.

    ``mean`` (g, 3), ``scale`` (g, 3) or (g, 1) when isotropic, ``quaternion`` (g, 4; w, x, y, z) and ``amplitude``
    (g) are raw: `gaussians` gives the mixture in Å. A model that must not rotate, or whose Gaussians are round, keeps
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
        if not self.rotation:
            quaternion = unturned(mean)
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

    def gaussians(self, batch: Batch | None = None) -> Gaussians:
        """The mixture in Å, the same for every particle: covariance R S² Rᵀ (GEM eq. 4)."""
        scale = self.scales()
        covariance = covariances(scale, self.quaternion) if self.rotation else torch.diag_embed(scale**2)
        return Gaussians(self.bounds.length * self.mean, covariance, self.amplitudes())

    def poses(self, batch: Batch) -> Poses:
        """Those of the batch."""
        return batch.poses

    def groups(self) -> list[ParameterGroup]:
        """All raw parameters at one rate (cryoSplat, 4.1)."""
        return [ParameterGroup({name: own for name, own in self.named_parameters() if own.requires_grad})]

    def state(self) -> Saved:
        """The raw parameters, from which `read_gaussian_field` makes the model again."""
        numbers = {"rotation": self.rotation, "bounds": asdict(self.bounds)}
        return Saved(KIND, numbers, {name: getattr(self, name).detach() for name in PARAMETERS})

    def with_unit(self, unit: float) -> GaussianField:
        """The same raw parameters with amplitudes in another unit."""
        raw = {name: getattr(self, name).detach() for name in PARAMETERS}
        return GaussianField(**raw, bounds=replace(self.bounds, unit=unit), rotation=self.rotation)

    def copy(self) -> GaussianField:
        """The same numbers, no longer changed by an optimiser that holds this model."""
        return self.take(torch.arange(len(self), device=self.mean.device))

    def take(self, rows: Tensor) -> GaussianField:
        """Some of the Gaussians: by index or by a Boolean per Gaussian."""
        raw = {name: getattr(self, name).detach()[rows] for name in PARAMETERS}
        return GaussianField(**raw, bounds=self.bounds, rotation=self.rotation)

    @torch.no_grad()
    def split(self, chosen: Bool[Tensor, " g"] | None = None) -> GaussianField:
        """The chosen Gaussians (all by default) give way to two halves along their longest axes.

        The halves sit ±0.6 s from the old centre with 0.8 s in that direction, so that mass, mean and covariance of
        every pair are those of the Gaussian it replaces (as far as the lower bound on the scale allows; an isotropic
        pair shrinks in all directions by the same volume). The first halves stand where the Gaussians stood, the second
        ones follow in the same order.
        """
        device = self.mean.device
        chosen = torch.ones(len(self), dtype=torch.bool, device=device) if chosen is None else chosen
        scale = self.scales()
        longest = scale.argmax(1)
        axes = quaternion_to_matrix(self.quaternion)
        direction = axes.gather(2, longest[:, None, None].expand(-1, 3, 1)).squeeze(2)
        rows = torch.arange(len(self), device=device)
        offset = 0.6 * scale[rows, longest, None] * direction / self.bounds.length
        if self.scale.shape[1] == 1:
            smaller = 0.8 ** (1 / 3) * scale[:, :1]
        else:
            smaller = scale.clone()
            smaller[rows, longest] *= 0.8
        half = {
            "scale": raw_scale(smaller, self.bounds),
            "quaternion": self.quaternion.detach(),
            "amplitude": inverse_softplus(0.5 * functional.softplus(self.amplitude)),
        }
        first = half | {"mean": self.mean + offset}
        second = half | {"mean": self.mean - offset}
        raw = {}
        for name in PARAMETERS:
            before = getattr(self, name).detach()
            changed = chosen.reshape(-1, *[1] * (before.dim() - 1))
            raw[name] = torch.cat([torch.where(changed, first[name], before), second[name][chosen]])
        return GaussianField(**raw, bounds=self.bounds, rotation=self.rotation)


def read_gaussian_field(saved: Saved) -> GaussianField:
    """The model that `GaussianField.state` describes.

    Raises:
        KeyError, TypeError, ValueError: it describes another.
    """
    if saved.kind != KIND:
        raise ValueError(f"a model of kind {saved.kind!r}; expected {KIND!r}")
    tensors = {name: saved.tensors[name] for name in PARAMETERS}
    bounds = Bounds(**saved.numbers["bounds"])
    return GaussianField(**tensors, bounds=bounds, rotation=saved.numbers["rotation"])


def raw_scale(scale: Tensor, bounds: Bounds) -> Tensor:
    """Raw parameters of scales in Å; a scale at or below the bound starts 1 % above it, where the gradient lives."""
    free = torch.clamp(scale - bounds.smallest, min=0.01 * bounds.smallest)
    return inverse_softplus(free / bounds.length)
