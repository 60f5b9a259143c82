"""Is there anything? How much better a model that differs from particle to particle predicts images it has not seen.

Everything is fitted to one half-set. The gain is the log-likelihood of the images of the other half, their latents
integrated out, over that of the mean map alone, in nats per image. Noise that a model has learnt makes it negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.heterogeneity.density import fit_density
from emsplat.heterogeneity.subspace import Latents, posterior

SIGNIFICANT = 3.0  # standard errors of a gain that is believed
_CLOSE = 2.0  # standard errors of a difference that does not count
_HARDLY = 0.002  # of the best gain
POINTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 24, 28, 32, 40, 48, 64)
_ENOUGH = 6000  # views that tell how many points there should be


@dataclass(frozen=True)
class Gain:
    """Nats per image and their standard error."""

    value: float
    error: float

    @property
    def significant(self) -> bool:
        return self.value > SIGNIFICANT * self.error


def mean_gain(values: Float[Tensor, " v"], image: Int[Tensor, " v"]) -> Gain:
    """Of views, of which those that show one image count as one."""
    count = int(image.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, image.long(), values.double())
    views = torch.zeros(count, dtype=torch.float64).index_add_(0, image.long(), torch.ones_like(values.double()))
    own = (total / views.clamp(min=1))[views > 0]
    return Gain(float(own.mean()), float(own.std() / len(own) ** 0.5) if len(own) > 1 else float("inf"))


def first_components(latents: Latents, count: int) -> Latents:
    """Posteriors with only the first, strongest components; with all where there are fewer."""
    return posterior(latents.linear[:, :count], latents.quadratic[:, :count, :count])


def fewest(gains: Sequence[Float[Tensor, " v"]], image: Int[Tensor, " v"]) -> int:
    """The first of several models whose gain is not clearly below the best (paired over images), or hardly."""
    best = max(range(len(gains)), key=lambda number: float(gains[number].mean()))
    for number in range(best):
        lost = mean_gain(gains[best] - gains[number], image)
        if lost.value <= max(_CLOSE * lost.error, _HARDLY * float(gains[best].mean())):
            return number
    return best


def component_gains(latents: Latents) -> list[Float[Tensor, " v"]]:
    """The gain of each view with 0, 1, 2, ... components."""
    none = torch.zeros(len(latents), dtype=latents.linear.dtype)
    return [none, *(first_components(latents, count).gain for count in range(1, latents.linear.shape[1] + 1))]


def point_gains(
    own: Latents, other: Latents, generator: torch.Generator, points: Sequence[int] = POINTS
) -> list[Float[Tensor, " v"]]:
    """The gain of each view of the other half with densities of so many points, fitted to views of the own half."""
    chosen = torch.randperm(len(own), generator=generator)[:_ENOUGH]
    some = Latents(
        own.mean[chosen], own.covariance[chosen], own.linear[chosen], own.quadratic[chosen], own.gain[chosen]
    )
    return [fit_density(some, min(count, len(some)), generator).gain(other) for count in points]
