"""Where the views of both half-sets lie in the latent space of one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.frames import Frame, cross_embedding
from emsplat.heterogeneity.parts import cluster
from emsplat.heterogeneity.subspace import Latents
from emsplat.parallel import World


@dataclass(frozen=True)
class Embedding:
    """The latent space of a half-set: the density of its views, and where they and those of the other half lie."""

    density: Density
    membership: Float[Tensor, "v m"]  # of the own views, in the points of the density
    others: Float[Tensor, "w m"]  # of those of the other half
    own: Float[Tensor, "v q"]
    other: Float[Tensor, "w q"]
    gain: Float[Tensor, " v"]  # of the own views, nats
    precision: Float[Tensor, "q q"]  # what an average view says of its latent


def embedded(density: Density, own: Latents, other: Latents) -> Embedding:
    """By what the linear stage says of all views."""
    membership, others = density.membership(own), density.membership(other)
    return Embedding(
        density,
        membership,
        others,
        membership @ density.point,
        others @ density.point,
        density.gain(own),
        own.quadratic.mean(0),
    )


def spread_embedding(embedding: Embedding, world: World) -> Embedding:
    """As the first process has it, in all of them."""
    if world.size == 1:
        return embedding
    fields = ("membership", "others", "own", "other", "gain", "precision")
    tensors = {name: getattr(embedding, name) for name in fields}
    own = world.spread_named(tensors | {"point": embedding.density.point, "weight": embedding.density.weight})
    return Embedding(Density(own["point"], own["weight"]), *(own[name] for name in fields))


def hard_embedding(
    own: Float[Tensor, "v q"], other: Float[Tensor, "w q"], count: int, generator: torch.Generator
) -> Embedding:
    """By latents alone, as a fit to images gives them: each view belongs to the nearest of ``count`` points (fewer
    where fewer latents differ). Gains are unknown (0)."""
    groups = cluster(own, torch.ones(len(own)), count, generator)
    membership = torch.nn.functional.one_hot(groups.label, len(groups)).double()
    share = membership.mean(0)
    kept = share > 0
    density = Density(groups.centroid[kept].double(), share[kept])
    nearest = torch.cdist(other.double(), density.point).argmin(1)
    away = own.double() - own.double().mean(0)
    precision = torch.linalg.pinv(away.T @ away / len(own)) * len(groups)
    return Embedding(
        density,
        membership[:, kept],
        torch.nn.functional.one_hot(nearest, len(density)).double(),
        own.double(),
        other.double(),
        torch.zeros(len(own), dtype=torch.float64),
        precision,
    )


def leading(source: Embedding, target: Embedding) -> Frame:
    """The frame that leads from the latent space of one half to that of the other, by all views."""
    own, other = torch.cat([source.own, source.other]), torch.cat([target.other, target.own])
    return cross_embedding(own, other)


def latents_of_run(first: Embedding, second: Embedding) -> tuple[Float[Tensor, "v q"], Float[Tensor, "w q"]]:
    """Of the views of both halves, each by its own half's model, in the space of the run, which is that of half 1."""
    return first.own, leading(second, first)(second.own)
