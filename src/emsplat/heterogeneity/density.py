"""How molecules are distributed over latent space: the likeliest density, on points.

The non-parametric maximum likelihood estimate of a mixing density is a few points (Laird 1978, Lindsay 1983). Every
view says log p(y|z) - log p(y|0) = b·z - zᵀA z/2, so no image is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.subspace import Latents

_STEPS = 40


@dataclass(frozen=True)
class Density:
    """Σ weight δ(z - point)."""

    point: Float[Tensor, "m q"]
    weight: Float[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.weight)

    def evidence(self, latents: Latents) -> Float[Tensor, "v m"]:
        """log weight p(y|point)/p(y|0) of each view."""
        seen = latents.linear @ self.point.T
        seen -= 0.5 * (latents.quadratic.flatten(1) @ (self.point[:, :, None] * self.point[:, None]).flatten(1).T)
        return seen + self.weight.clamp(min=1e-300).log()

    def gain(self, latents: Latents) -> Float[Tensor, " v"]:
        """log p(y)/p(y|0) of each view, nats."""
        return torch.logsumexp(self.evidence(latents), 1)

    def membership(self, latents: Latents) -> Float[Tensor, "v m"]:
        """Posterior probability of each point for each view."""
        return torch.softmax(self.evidence(latents), 1)

    def embed(self, latents: Latents) -> Float[Tensor, "v q"]:
        """The latent of each view: the posterior mean over the points."""
        return self.membership(latents) @ self.point

    def without_small(self, least: float) -> Density:
        """Without points of a weight below ``least``."""
        kept = self.weight >= least
        return Density(self.point[kept], self.weight[kept] / self.weight[kept].sum())

    def distinct(self, precision: Float[Tensor, "q q"]) -> Density:
        """With points joined that an image of this ``precision`` cannot tell apart (less than one standard deviation
        between them), the heaviest first."""
        points, weights = [], []
        left = self.weight.argsort(descending=True)
        while len(left):
            away = self.point[left] - self.point[left[0]]
            near = torch.einsum("mq,qr,mr->m", away, precision, away) < 1
            own = self.weight[left[near]]
            points.append(own @ self.point[left[near]] / own.sum())
            weights.append(own.sum())
            left = left[~near]
        return Density(torch.stack(points), torch.stack(weights))


def start_points(mean: Float[Tensor, "v q"], count: int, generator: torch.Generator) -> Float[Tensor, "m q"]:
    """Means of views that lie far from each other (k-means++; Arthur & Vassilvitskii 2007)."""
    chosen = [int(torch.randint(len(mean), (1,), generator=generator))]
    distance = (mean - mean[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chosen.append(int(torch.multinomial(distance.clamp(min=1e-12), 1, generator=generator)))
        distance = torch.minimum(distance, (mean - mean[chosen[-1]]).square().sum(1))
    return mean[chosen].clone()


def fit_density(latents: Latents, count: int, generator: torch.Generator, steps: int = _STEPS) -> Density:
    """``count`` points and their weights by EM, the points with the prior N(0, 1)."""
    points = start_points(latents.mean, count, generator)
    density = Density(points, torch.full((count,), 1 / count, dtype=points.dtype))
    eye = torch.eye(points.shape[1], dtype=points.dtype)
    for _ in range(steps):
        member = density.membership(latents)
        linear = member.T @ latents.linear
        quadratic = (member.T @ latents.quadratic.flatten(1)).reshape(-1, *eye.shape)
        points = torch.linalg.solve(quadratic + eye, linear)
        density = Density(points, member.mean(0))
    return density
