"""CryoSPIRE's mixtures: every Gaussian has a free feature vector, and small networks read it beside a latent.

In the first stage a feature says how a Gaussian moves and changes (`PartDiscovery`); Gaussians that move alike come to
have like features. In the second stage a few anchors move rigidly and carry the Gaussians near them (`Hierarchy`).

Peaks (supplement C): a Gaussian of amplitude m and width s adds m exp(-|p - c|²/2s²) to a projection (eq. 8), whatever
its width; the density is m/(√(2π) s) exp(-|p - c|²/2s²) (eq. 9). A normalised Gaussian therefore weighs m 2π s². With
s = exp(s̃) and m = ReLU(m̃), the free numbers are c, s̃ and m̃. The first layer of a network is a sum of what the feature
gives, once per step, and what the latent gives, once per image.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from emsplat.maths.geometry import six_to_matrix
from emsplat.models.base import Saved
from emsplat.types import Gaussians

AMPLITUDE = 0.15  # m at the start (supplement D)
EMPTY = 0.02  # of the mean peak: below it a Gaussian is not used
_FEATURE = 0.1  # spread of features at the start: Gaussians begin alike
_OUTPUT = 0.02  # spread of the last layer's weights at the start
_CACHED = 2**18  # hidden numbers that are made at a time on a CPU


@dataclass(frozen=True)
class NetworkShape:
    """How large the networks are."""

    features: int = 24
    latents: int = 4
    hidden: int = 64


class _Hidden(torch.autograd.Function):
    """weight · ReLU(own + latent) for every row and image, a few images at a time; hidden numbers are not kept."""

    @staticmethod
    def forward(own: Tensor, latent: Tensor, weight: Tensor) -> Tensor:
        out = own.new_empty(len(latent), len(own), len(weight))
        for part in _parts(own, latent):
            out[part] = (own + latent[part, None]).clamp_(min=0) @ weight.T
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own, latent, weight = ctx.saved_tensors
        to_own, to_latent, to_weight = torch.zeros_like(own), torch.empty_like(latent), torch.zeros_like(weight)
        for part in _parts(own, latent):
            hidden = (own + latent[part, None]).clamp_(min=0)
            to_weight += upstream[part].flatten(0, 1).T @ hidden.flatten(0, 1)
            back = torch.ops.aten.threshold_backward(upstream[part] @ weight, hidden, 0.0)
            to_own += back.sum(0)
            to_latent[part] = back.sum(1)
        return to_own, to_latent, to_weight


def _parts(own: Tensor, latent: Tensor) -> list[slice]:
    few = max(1, _CACHED // own.numel()) if own.device.type == "cpu" else 16
    return [slice(start, start + few) for start in range(0, len(latent), few)]


class Perceptron(torch.nn.Module):
    """One hidden layer (ReLU) over all pairs of a feature and a latent."""

    def __init__(self, shape: NetworkShape, outputs: int, generator: torch.Generator) -> None:
        super().__init__()

        def normal(rows: int, columns: int, spread: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(spread * torch.randn(rows, columns, generator=generator))

        self.feature = normal(shape.hidden, shape.features, shape.features**-0.5)
        self.latent = normal(shape.hidden, shape.latents, shape.latents**-0.5)
        self.bias = torch.nn.Parameter(2 * torch.rand(shape.hidden, generator=generator) - 1)
        self.weight = normal(outputs, shape.hidden, _OUTPUT)
        self.constant = torch.nn.Parameter(torch.zeros(outputs))

    def forward(self, feature: Float[Tensor, "g f"], latent: Float[Tensor, "b q"]) -> Float[Tensor, "b g o"]:
        own, given = feature @ self.feature.T, latent @ self.latent.T + self.bias
        hidden: Tensor = _Hidden.apply(own, given, self.weight)  # type: ignore[no-untyped-call]
        return hidden + self.constant


class PartDiscovery(torch.nn.Module):
    """The first stage: x_i(z) = c_i + D(f_i, z), peak m_i ReLU(1 + A(f_i, z)), round Gaussians.

    D and A are perceptrons. Amplitude changes multiply, so that what shares a feature comes and goes together whatever
    its peaks (the supplement does not say how they act). Positions and widths are in units of ``length`` Å, which is
    the width at the start; peaks in units of ``unit``, density of a projection per Å².
    """

    KIND = "cryospire parts"

    def __init__(
        self,
        centre: Float[Tensor, "g 3"],
        shape: NetworkShape,
        *,
        length: float,
        unit: float = 1.0,
        generator: torch.Generator,
    ) -> None:
        """Gaussians at ``centre`` (Å), all of width ``length`` (Å) and of peak 0.15."""
        super().__init__()
        self.shape, self.length, self.unit = shape, length, unit
        count = len(centre)
        self.centre = torch.nn.Parameter(centre / length)
        self.width = torch.nn.Parameter(torch.zeros(count))
        self.amplitude = torch.nn.Parameter(torch.full((count,), AMPLITUDE))
        self.feature = torch.nn.Parameter(_FEATURE * torch.randn(count, shape.features, generator=generator))
        self.displacement = Perceptron(shape, 3, generator)
        self.modulation = Perceptron(shape, 1, generator)

    def __len__(self) -> int:
        return len(self.centre)

    def forward(self, latent: Float[Tensor, "b q"]) -> tuple[Float[Tensor, "b g 3"], Float[Tensor, "b g"]]:
        """Positions (Å) and weights of all Gaussians in some states."""
        position = self.centre + self.displacement(self.feature, latent)
        return self.length * position, _weights(self, self.peaks(latent))

    def peaks(self, latent: Float[Tensor, "b q"]) -> Float[Tensor, "b g"]:
        """m in some states, in units of ``unit``."""
        return _peaks(self.amplitude, self.modulation(self.feature, latent))

    @torch.no_grad()
    def used(self, latent: Float[Tensor, "b q"]) -> Bool[Tensor, " g"]:
        """Which Gaussians carry something in the mean of some states: 2 % of the mean peak at least."""
        peak = self.peaks(latent).mean(0)
        return peak > EMPTY * peak.mean()

    def widths(self) -> Float[Tensor, " g"]:
        """s of each Gaussian in Å."""
        return self.length * self.width.exp()

    def mixtures(self, latent: Float[Tensor, "b q"]) -> list[Gaussians]:
        """The molecule in some states."""
        return _mixtures(self, latent)

    def state(self) -> Saved:
        return _state(self)


class Hierarchy(torch.nn.Module):
    """The second stage: x_i(z) = R_a(z)(c_i - p_a) + p_a + t_a(z) + D(F_a + δ_i, z), a the anchor of Gaussian i.

    R_a and t_a come from a perceptron of the anchor's feature F_a, D and the amplitudes, as in `PartDiscovery`, from
    those of the Gaussian's own feature F_a + δ_i. Anchor positions p_a stay: t_a can take up any change of theirs.
    ``part`` is the cluster of features that an anchor belongs to. Units are those of `PartDiscovery`.
    """

    KIND = "cryospire hierarchy"

    def __init__(
        self,
        centre: Float[Tensor, "g 3"],
        anchor: Int[Tensor, " g"],
        feature: Float[Tensor, "a f"],
        position: Float[Tensor, "a 3"],
        part: Int[Tensor, " a"],
        shape: NetworkShape,
        *,
        length: float,
        unit: float = 1.0,
        generator: torch.Generator,
    ) -> None:
        """Gaussians at ``centre`` (Å) connected to anchors at ``position`` (Å); all widths are ``length`` (Å)."""
        super().__init__()
        self.shape, self.length, self.unit = shape, length, unit
        count = len(centre)
        self.centre = torch.nn.Parameter(centre / length)
        self.width = torch.nn.Parameter(torch.zeros(count))
        self.amplitude = torch.nn.Parameter(torch.full((count,), AMPLITUDE))
        self.feature = torch.nn.Parameter(feature.clone())
        self.offset = torch.nn.Parameter(torch.zeros(count, shape.features))
        self.rigid = Perceptron(shape, 9, generator)
        self.displacement = Perceptron(shape, 3, generator)
        self.modulation = Perceptron(shape, 1, generator)
        self.position: Tensor
        self.anchor: Tensor
        self.part: Tensor
        self.register_buffer("position", position / length)
        self.register_buffer("anchor", anchor)
        self.register_buffer("part", part)

    def __len__(self) -> int:
        return len(self.centre)

    def motions(self, latent: Float[Tensor, "b q"]) -> tuple[Float[Tensor, "b a 3 3"], Float[Tensor, "b a 3"]]:
        """Rotation of each anchor about its position, and shift in units of ``length``."""
        numbers = self.rigid(self.feature, latent)
        return six_to_matrix(numbers[..., :6]), numbers[..., 6:]

    def features(self) -> Float[Tensor, "g f"]:
        """F_a + δ_i of each Gaussian."""
        return self.feature[self.anchor] + self.offset

    def carried(
        self, point: Float[Tensor, "n 3"], anchor: Int[Tensor, " n"], latent: Float[Tensor, "b q"]
    ) -> Float[Tensor, "b n 3"]:
        """Points that hang on anchors, moved rigidly with them; in units of ``length``."""
        rotation, shift = self.motions(latent)
        # One product (n, 4a) times (4a, 3): rows are zero but for the anchor's R (c - p) + (p + t).
        lever = torch.cat([point - self.position[anchor], torch.ones_like(point[:, :1])], 1)
        member = torch.nn.functional.one_hot(anchor, len(self.feature)).to(lever)
        own = (member[:, :, None] * lever[:, None]).flatten(1)
        act = torch.cat([rotation.mT, (shift + self.position)[:, :, None]], 2).flatten(1, 2)
        return own @ act

    def forward(self, latent: Float[Tensor, "b q"]) -> tuple[Float[Tensor, "b g 3"], Float[Tensor, "b g"]]:
        """Positions (Å) and weights of all Gaussians in some states."""
        feature = self.features()
        position = self.carried(self.centre, self.anchor, latent) + self.displacement(feature, latent)
        return self.length * position, _weights(self, _peaks(self.amplitude, self.modulation(feature, latent)))

    def penalty(self) -> Float[Tensor, ""]:
        """Mean |δ_i|²: how far features are from those of their anchors."""
        return self.offset.square().sum(1).mean()

    def widths(self) -> Float[Tensor, " g"]:
        """s of each Gaussian in Å."""
        return self.length * self.width.exp()

    def mixtures(self, latent: Float[Tensor, "b q"]) -> list[Gaussians]:
        """The molecule in some states."""
        return _mixtures(self, latent)

    def state(self) -> Saved:
        return _state(self)


def _peaks(amplitude: Float[Tensor, " g"], change: Float[Tensor, "b g 1"]) -> Float[Tensor, "b g"]:
    return torch.relu(amplitude) * torch.relu(1 + change.squeeze(-1))


def _weights(own: PartDiscovery | Hierarchy, peak: Float[Tensor, "b g"]) -> Float[Tensor, "b g"]:
    """m 2π s²: the integrals of Gaussians with these peaks."""
    return own.unit * 2 * math.pi * own.widths().square() * peak


def _mixtures(own: PartDiscovery | Hierarchy, latent: Float[Tensor, "b q"]) -> list[Gaussians]:
    variance = own.widths().square()
    covariance = torch.diag_embed(variance[:, None].expand(-1, 3))
    return [Gaussians(mean, covariance, weight) for mean, weight in zip(*own(latent), strict=True)]


def _state(own: PartDiscovery | Hierarchy) -> Saved:
    numbers: dict[str, Any] = {"shape": asdict(own.shape), "length": own.length, "unit": own.unit}
    return Saved(own.KIND, numbers, {name: tensor.detach() for name, tensor in own.state_dict().items()})


def read_part_discovery(saved: Saved) -> PartDiscovery:
    """The model that `PartDiscovery.state` describes.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it describes another.
    """
    own = PartDiscovery(torch.zeros_like(saved.tensors["centre"]), **_numbers(saved, PartDiscovery.KIND))
    own.to(saved.tensors["centre"].device).load_state_dict(saved.tensors)
    return own


def read_hierarchy(saved: Saved) -> Hierarchy:
    """The model that `Hierarchy.state` describes.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it describes another.
    """
    held = {name: torch.zeros_like(saved.tensors[name]) for name in ("centre", "anchor", "feature", "position", "part")}
    own = Hierarchy(**(_numbers(saved, Hierarchy.KIND) | held))
    own.to(saved.tensors["centre"].device).load_state_dict(saved.tensors)
    return own


def _numbers(saved: Saved, kind: str) -> dict[str, Any]:
    if saved.kind != kind:
        raise ValueError(f"a model of kind {saved.kind!r}; expected {kind!r}")
    length, unit = float(saved.numbers["length"]), float(saved.numbers["unit"])
    generator = torch.Generator().manual_seed(0)
    return {"shape": NetworkShape(**saved.numbers["shape"]), "length": length, "unit": unit, "generator": generator}
