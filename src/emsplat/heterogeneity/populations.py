"""How many molecules are where: shares of states and free energies, with errors from resampled micrographs.

The latents of single images are shrunk towards the mean and blurred by noise, and so would be any histogram of them. A
density that is fitted to what all images say of every place (b·z - zᵀA z/2) is neither: it is deconvolved. The points
of `Density` are its likeliest form, but have no width; here they are widened by as much as the other half-set allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.evidence import fewest
from emsplat.heterogeneity.frames import Frame
from emsplat.heterogeneity.subspace import Latents

DRAWS = 200  # of the bootstrap
WIDTHS = (1.5, 1.0, 0.7, 0.5, 0.35, 0.25)  # of a point, in standard deviations of an average image's latent
_STEPS = 20
_TRIED, _ENOUGH = 6000, 20000  # views that tell the width, and that a density is fitted to
_DRAWN = 25  # draws at a time
_AT_ONCE = 2**15  # views
_SAMPLES = 256  # of a point, that tell which states it belongs to
_ROUNDING = 1e-4  # of all particles
_FLAT = 1e-6  # of the largest variance: no width
_SURE, _SEEN = 10.0, 1.0  # images that are known to be at a place, and its standard error in kT, if it is shown


@dataclass(frozen=True)
class _Blurred:
    """What views say of points whose latents spread about them: log p(y|μ) - log p(y|0) = base + b·μ - μᵀA μ/2, and the
    latent is expected at centre + pull μ.

    With W the root of the width and S = W (1 + Wᵀ A₀ W)⁻¹ Wᵀ, the covariance of a latent about its point given the
    view, completing the square in b₀·z - zᵀA₀ z/2 under z ~ N(μ, W Wᵀ) gives b = b₀ - A₀ S b₀, A = A₀ - A₀ S A₀,
    centre = S b₀ and pull = 1 - S A₀. None of it depends on the points.
    """

    base: Float[Tensor, "v 1"]
    linear: Float[Tensor, "v q"]  # b
    quadratic: Float[Tensor, "v q q"]  # A
    centre: Float[Tensor, "v q"]
    pull: Float[Tensor, "v q q"]

    @classmethod
    def of(cls, latents: Latents, root: Float[Tensor, "q q"], rows: slice = slice(None)) -> _Blurred:
        """For some views."""
        linear, quadratic = latents.linear[rows], latents.quadratic[rows]
        eye = torch.eye(len(root), dtype=root.dtype)
        factor = torch.linalg.cholesky(eye + root.T @ quadratic @ root)
        half = torch.linalg.solve_triangular(factor, root.T.expand_as(quadratic), upper=False)
        spread = half.mT @ half
        centre = (spread @ linear[..., None]).squeeze(-1)
        pull = eye - spread @ quadratic
        determinant = torch.log(torch.diagonal(factor, dim1=1, dim2=2)).sum(1)
        base = 0.5 * (linear * centre).sum(1) - determinant
        return cls(base[:, None], (pull.mT @ linear[..., None]).squeeze(-1), quadratic @ pull, centre, pull)

    def log_likelihood(self, point: Float[Tensor, "m q"]) -> Float[Tensor, "v m"]:
        square = (point[:, :, None] * point[:, None]).flatten(1)
        return self.base + self.linear @ point.T - 0.5 * (self.quadratic.flatten(1) @ square.T)

    def place(self, point: Float[Tensor, "m q"], member: Float[Tensor, "v m"]) -> Float[Tensor, "m q"]:
        """Σ of the expected latents of each point's views, as far as they are members."""
        pull = (member.T @ self.pull.flatten(1)).reshape(-1, *self.pull.shape[1:])
        return member.T @ self.centre + (pull @ point[..., None]).squeeze(-1)


@dataclass(frozen=True)
class Cloud:
    """Σ weight N(point, root rootᵀ): points with one width; ``root`` is 0 where they have none."""

    point: Float[Tensor, "m q"]
    weight: Float[Tensor, " m"]
    root: Float[Tensor, "q q"]

    def log_likelihood(self, latents: Latents) -> Float[Tensor, "v m"]:
        """log p(y|point) - log p(y|0) of each view, with the latent spread about the point."""
        parts = [
            _Blurred.of(latents, self.root, slice(i, i + _AT_ONCE)).log_likelihood(self.point)
            for i in range(0, len(latents), _AT_ONCE)
        ]
        return torch.cat(parts)

    def likelihood(self, latents: Latents) -> Float[Tensor, "v m"]:
        """The same without its logarithm, over the largest of each view."""
        likely = self.log_likelihood(latents)
        return torch.exp(likely - likely.max(1, keepdim=True).values)

    def membership(self, latents: Latents) -> Float[Tensor, "v m"]:
        """Posterior probability of each point for each view."""
        return torch.softmax(self.log_likelihood(latents) + self.weight.clamp(min=1e-300).log(), 1)

    def gain(self, latents: Latents) -> Float[Tensor, " v"]:
        """log p(y)/p(y|0) of each view, nats."""
        return torch.logsumexp(self.log_likelihood(latents) + self.weight.clamp(min=1e-300).log(), 1)

    def fitted(self, latents: Latents, steps: int = _STEPS) -> Cloud:
        """Points and weights that make these views likelier, by EM; the width stays."""
        blurred, point, weight = _Blurred.of(latents, self.root), self.point, self.weight
        for _ in range(steps):
            member = torch.softmax(blurred.log_likelihood(point) + weight.clamp(min=1e-300).log(), 1)
            mass = member.sum(0)
            point = blurred.place(point, member) / mass.clamp(min=1e-12)[:, None]
            weight = mass / mass.sum()
        return Cloud(point, weight, self.root)

    def within(self, frame: Frame) -> Cloud:
        """In another latent space."""
        return Cloud(frame(self.point), self.weight, frame.turn @ self.root)

    def fills(self, axes: Sequence[int]) -> bool:
        """Whether its width is of as many dimensions as these axes."""
        own = torch.linalg.eigvalsh((self.root @ self.root.T)[list(axes)][:, list(axes)])
        whole = torch.linalg.eigvalsh(self.root @ self.root.T)
        return bool(own[0] > _FLAT * whole[-1])

    def kernel(self, place: Float[Tensor, "p d"], axes: Sequence[int]) -> tuple[Float[Tensor, "p m"], float]:
        """How much each point counts at places along some of the axes, 1 at itself, and the integral of that."""
        own = (self.root @ self.root.T)[list(axes)][:, list(axes)]
        away = place[:, None] - self.point[:, list(axes)]
        shape = torch.exp(-0.5 * torch.einsum("pmd,de,pme->pm", away, torch.linalg.inv(own), away))
        return shape, float(((2 * math.pi) ** len(axes) * torch.linalg.det(own)).sqrt())

    def shares(self, states: Float[Tensor, "s q"], generator: torch.Generator) -> Float[Tensor, "m s"]:
        """What part of each point lies nearest to each state."""
        spread = torch.randn(_SAMPLES, self.root.shape[1], generator=generator, dtype=self.root.dtype) @ self.root.T
        nearest = torch.stack([torch.cdist(own + spread, states).argmin(1) for own in self.point])
        return torch.nn.functional.one_hot(nearest, len(states)).to(states).mean(1)


def smooth(
    densities: tuple[Density, Density],
    latents: tuple[tuple[Latents, Latents], tuple[Latents, Latents]],
    image: tuple[Int[Tensor, " v"], Int[Tensor, " w"]],
    seed: int,
) -> tuple[Cloud, Cloud]:
    """Both halves' densities with the largest width that predicts the other half's images as well as any.

    ``latents[a][b]`` are those of the views of half b in the space of half a.
    """
    tried, gains = [], []
    for half in (0, 1):
        own, other = (_some(latents[half][number], _TRIED, seed) for number in (half, 1 - half))
        quadratic = own.quadratic.mean(0)
        root = torch.linalg.cholesky(torch.linalg.inv(quadratic + torch.eye(len(quadratic), dtype=quadratic.dtype)))
        density = densities[half]
        clouds = [Cloud(density.point, density.weight, width * root).fitted(own, _STEPS // 2) for width in WIDTHS]
        tried.append(clouds)
        gains.append([cloud.gain(other) for cloud in clouds])
    seen = [own[_chosen(len(own), _TRIED, seed)] for own in image]
    both = torch.cat([seen[1], seen[0] + int(seen[1].max()) + 1])
    best = fewest([torch.cat(pair) for pair in zip(*gains, strict=True)], both)
    first, second = (tried[half][best].fitted(_some(latents[half][half], _ENOUGH, seed)) for half in (0, 1))
    return first, second


def _chosen(count: int, most: int, seed: int) -> Int[Tensor, " w"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]


def _some(latents: Latents, most: int, seed: int) -> Latents:
    chosen, own = _chosen(len(latents), most, seed), latents
    return Latents(
        own.mean[chosen], own.covariance[chosen], own.linear[chosen], own.quadratic[chosen], own.gain[chosen]
    )


def resampled(units: int, seed: int, draws: int = DRAWS) -> Int[Tensor, "u d"]:
    """How often each of some units is drawn in each draw of a bootstrap; 16-bit numbers."""
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), draws)
    return torch.from_numpy(drawn.T.astype(np.int16))


def bootstrap(
    weight: Float[Tensor, " m"], likely: Float[Tensor, "v m"], counts: Int[Tensor, "v d"]
) -> Float[Tensor, "m d"]:
    """The weights of points when each view counts so often, likeliest anew in each draw. ``likely`` is how likely each
    point makes each view, in any unit of the view."""
    likely = likely / likely.max(1, keepdim=True).values.clamp(min=1e-300)
    drawn = []
    for some in torch.split(counts, _DRAWN, 1):
        count = some.to(likely)
        own = weight[:, None].expand(-1, count.shape[1])
        for _ in range(_STEPS):
            own = own * (likely.T @ (count / (likely @ own).clamp(min=1e-300)))
            own = own / own.sum(0)
        drawn.append(own)
    return torch.cat(drawn, 1)


@dataclass(frozen=True)
class Share:
    """A part of all particles: of both half-sets, its standard error and 95 % interval, and of each half-set."""

    value: float
    error: float
    interval: tuple[float, float]
    halves: tuple[float, float]


@dataclass(frozen=True)
class Weighed:
    """Both halves' densities in the frame of the run, the weights of their points in each draw, and to which points
    their views belong."""

    clouds: tuple[Cloud, Cloud]
    draws: tuple[Float[Tensor, "m d"], Float[Tensor, "n d"]]
    members: tuple[Float[Tensor, "v m"], Float[Tensor, "w n"]]

    def shares(self, parts: tuple[Float[Tensor, "m s"], Float[Tensor, "n s"]]) -> list[Share]:
        """Of each state, ``parts`` being what it has of each half's points."""
        own, drawn = [], []
        for cloud, weights, part in zip(self.clouds, self.draws, parts, strict=True):
            own.append(cloud.weight @ part)
            drawn.append(part.T @ weights)
        value, draws = self._both(own), self._both(drawn)
        # What a bootstrap with the points as they are cannot know, the half-sets do: if they differ by more than it
        # says, it is scaled (Birge 1932).
        difference = (own[0] - own[1]).square() / (drawn[0] - drawn[1]).var(1).clamp(min=_ROUNDING**2)
        scale = max(1.0, float(difference.mean().sqrt()))
        low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=1)
        low = (value - scale * (value - low).clamp(min=0)).clamp(min=0)
        high = (value + scale * (high - value).clamp(min=0)).clamp(max=1)
        error = scale * draws.std(1)
        return [
            Share(
                float(value[s]),
                float(error[s]),
                (float(low[s]), float(high[s])),
                (float(own[0][s]), float(own[1][s])),
            )
            for s in range(len(value))
        ]

    def _both(self, halves: Sequence[Tensor]) -> Tensor:
        views = [len(member) for member in self.members]
        return (views[0] * halves[0] + views[1] * halves[1]) / sum(views)

    def free_energy(self, place: Float[Tensor, "p d"], axes: Sequence[int]) -> FreeEnergy:
        """-ln p at places along some axes of the latents, the others integrated out."""
        kernels = [cloud.kernel(place, axes) for cloud in self.clouds]
        own = [shape @ cloud.weight / area for (shape, area), cloud in zip(kernels, self.clouds, strict=True)]
        drawn = [shape @ weights / area for (shape, area), weights in zip(kernels, self.draws, strict=True)]
        density = self._both(own)
        peak = density.max()
        value, first, second = (-(part / peak).clamp(min=1e-300).log() for part in (density, *own))
        spread = self._both(drawn).clamp(min=1e-300).log().std(1)
        error = (spread.square() + (first - second).square() / 4).sqrt()
        sure = torch.zeros_like(value)
        for (shape, _), member in zip(kernels, self.members, strict=True):
            for some in torch.split(member, 2**11):
                sure += (some @ shape.T).square().sum(0)
        return FreeEnergy(place, value, error, (first, second), (sure >= _SURE) & (error <= _SEEN))


@dataclass(frozen=True)
class FreeEnergy:
    """In kT above the most populated of some places.

    The standard error is that of the bootstrap and of the difference between the half-sets. A place is not ``shown``
    where that is above 1 kT, or where fewer than ten images are known to be: Σ w², w the part of an image's posterior
    that lies within the width of the density.
    """

    place: Float[Tensor, "p d"]
    value: Float[Tensor, " p"]
    error: Float[Tensor, " p"]
    halves: tuple[Float[Tensor, " p"], Float[Tensor, " p"]]
    shown: Bool[Tensor, " p"]


def span(weighed: Weighed, axis: int) -> tuple[float, float]:
    """From where to where the density reaches along an axis."""
    low, high = math.inf, -math.inf
    for cloud in weighed.clouds:
        width = 2 * float((cloud.root @ cloud.root.T)[axis, axis].sqrt())
        kept = cloud.point[cloud.weight > 1e-3, axis]
        low, high = min(low, float(kept.min()) - width), max(high, float(kept.max()) + width)
    return low, high
