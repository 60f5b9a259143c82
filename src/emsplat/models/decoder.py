"""A mixture that moves and changes with a latent: a few rigid parts with soft borders, smooth bending, amplitudes.

Position and amplitude of every Gaussian are sums of few terms, each a number of the Gaussian times a number of the
latent, so that all Gaussians of a state cost two small matrix products. The numbers of a latent come from a small
network, the trunk.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from emsplat.maths.geometry import six_to_matrix
from emsplat.models.base import Saved
from emsplat.models.gaussians import inverse_softplus
from emsplat.types import Gaussians

KIND = "decoder"
_HIDDEN = 64


@dataclass(frozen=True)
class Shape:
    """How large a decoder is."""

    latents: int
    parts: int = 5
    bends: int = 8  # displacement fields
    changes: int = 8  # amplitude fields


class Decoder(torch.nn.Module):
    """x_i(z) = Σ_p w_ip [R_p(z)(c_i - o_p) + o_p + t_p(z)] + Σ_k a_k(z) φ_ki, amplitude softplus(α_i + Σ b_k(z) ψ_ki).

    Positions are in units of ``length`` Å, amplitudes in units of ``unit``, widths σ = ``length`` exp(raw). The weights
    w_i are the softmax of the logits of a Gaussian; o_p is the centre of part p, which follows from both.
    """

    def __init__(
        self,
        centre: Float[Tensor, "g 3"],
        width: Float[Tensor, " g"],
        amplitude: Float[Tensor, " g"],
        shape: Shape,
        *,
        length: float = 10.0,
        unit: float = 1.0,
        generator: torch.Generator,
    ) -> None:
        """From Gaussians at ``centre`` (Å) of ``width`` (Å) and relative ``amplitude``; parts are drawn at random."""
        super().__init__()
        self.shape, self.length, self.unit = shape, length, unit
        count = len(centre)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        def parameter(value: Tensor) -> torch.nn.Parameter:
            return torch.nn.Parameter(value)

        self.centre = parameter(centre / length)
        self.width = parameter((width / length).log())
        self.amplitude = parameter(inverse_softplus(amplitude))
        seeds = self.centre.detach()[torch.randperm(count, generator=generator)[: shape.parts]]
        distance = torch.cdist(self.centre.detach(), seeds)
        self.logits = parameter(-distance / distance.std().clamp(min=1e-6))
        self.bend = parameter(0.01 * normal(count, shape.bends, 3))
        self.change = parameter(0.1 * normal(count, shape.changes))
        outputs = 9 * shape.parts + shape.bends + shape.changes
        sizes = [(shape.latents, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN + shape.latents, outputs)]
        self.weights = torch.nn.ParameterList([parameter(normal(b, a) / a**0.5) for a, b in sizes[:2]])
        self.weights.append(parameter(0.02 * normal(outputs, sizes[2][0])))
        self.biases = torch.nn.ParameterList([parameter(torch.zeros(b)) for _, b in sizes])

    def __len__(self) -> int:
        return len(self.centre)

    def trunk(self, latent: Float[Tensor, "b q"]) -> Float[Tensor, "b o"]:
        """What a latent does: per part six numbers of a rotation and three of a shift, then a_k and b_k."""
        hidden = latent
        for weight, bias in zip(self.weights[:2], self.biases[:2], strict=True):
            hidden = functional.silu(hidden @ weight.T + bias)
        numbers: Tensor = torch.cat([hidden, latent], 1) @ self.weights[2].T + self.biases[2]
        return numbers

    def motions(self, numbers: Float[Tensor, "b o"]) -> tuple[Float[Tensor, "b p 3 3"], Float[Tensor, "b p 3"]]:
        """Rotation and shift of each part."""
        own = numbers[:, : 9 * self.shape.parts].reshape(-1, self.shape.parts, 9)
        return six_to_matrix(own[..., :6]), own[..., 6:]

    def parts(self) -> Float[Tensor, "g p"]:
        """How much each Gaussian belongs to each part."""
        return torch.softmax(self.logits, 1)

    def forward(self, latent: Float[Tensor, "b q"]) -> tuple[Float[Tensor, "b g 3"], Float[Tensor, "b g"]]:
        """Positions (Å) and amplitudes of all Gaussians in some states."""
        numbers = self.trunk(latent)
        rotation, shift = self.motions(numbers)
        weight = self.parts()
        mass = weight * functional.softplus(self.amplitude.detach())[:, None]
        origin = (mass.T @ self.centre.detach()) / mass.sum(0)[:, None]
        moved = shift + origin - (rotation @ origin[..., None]).squeeze(-1)
        # (g, 4p) times (4p, 3): a part's rotation acts on w c, its shift on w.
        own = torch.cat([(weight[:, :, None] * self.centre[:, None]).flatten(1), weight], 1)
        act = torch.cat([rotation.mT.flatten(1, 2), moved], 1)
        bends = numbers[:, 9 * self.shape.parts :][:, : self.shape.bends]
        changes = numbers[:, 9 * self.shape.parts + self.shape.bends :]
        position = own @ act + torch.einsum("bk,gkx->bgx", bends, self.bend)
        return self.length * position, self.unit * functional.softplus(self.amplitude + changes @ self.change.T)

    def widths(self) -> Float[Tensor, " g"]:
        """σ of each Gaussian in Å."""
        return self.length * self.width.exp()

    def mixtures(self, latent: Float[Tensor, "b q"]) -> list[Gaussians]:
        """The molecule in some states."""
        variance = self.widths().square()
        covariance = torch.diag_embed(variance[:, None].expand(-1, 3))
        return [Gaussians(mean, covariance, amplitude) for mean, amplitude in zip(*self(latent), strict=True)]

    @torch.no_grad()
    def split(self, copies: int, width: float, generator: torch.Generator) -> Decoder:
        """Each Gaussian as ``copies`` narrower ones that lie within it and move like it."""
        spread = (self.widths().square() - width**2).clamp(min=0).sqrt() / self.length
        rows = torch.arange(len(self)).repeat_interleave(copies)
        offset = torch.randn(len(rows), 3, generator=generator) * spread[rows, None]
        new = Decoder(
            self.length * (self.centre[rows] + offset),
            torch.full((len(rows),), width),
            functional.softplus(self.amplitude[rows]),
            self.shape,
            length=self.length,
            unit=self.unit / copies,
            generator=generator,
        )
        for name in ("logits", "bend", "change"):
            getattr(new, name).copy_(getattr(self, name)[rows])
        for own, other in ((new.weights, self.weights), (new.biases, self.biases)):
            for a, b in zip(own, other, strict=True):
                a.copy_(b)
        return new

    def state(self) -> Saved:
        numbers: dict[str, Any] = {"shape": asdict(self.shape), "length": self.length, "unit": self.unit}
        return Saved(KIND, numbers, {name: own.detach() for name, own in self.named_parameters()})


def read_decoder(saved: Saved) -> Decoder:
    """The model that `Decoder.state` describes.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it describes another.
    """
    if saved.kind != KIND:
        raise ValueError(f"a model of kind {saved.kind!r}; expected {KIND!r}")
    count = len(saved.tensors["centre"])
    shape = Shape(**saved.numbers["shape"])
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(
        torch.zeros(count, 3),
        torch.ones(count),
        torch.ones(count),
        shape,
        length=float(saved.numbers["length"]),
        unit=float(saved.numbers["unit"]),
        generator=generator,
    )
    decoder.load_state_dict(saved.tensors)
    return decoder
