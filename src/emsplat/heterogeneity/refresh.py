"""Where particles lie, asked of a decoder: its states are sharper than a linear subspace can show them.

A state is drawn at each of many points of latent space, and each view is compared with all that the linear stage does
not exclude, brightness and pose integrated out as there. The weights of the points are the likeliest ones, as in
`density`; latents of views are means over the points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.device import CPU
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.embedding import Embedding, spread_embedding
from emsplat.heterogeneity.evidence import fewest
from emsplat.heterogeneity.half import HalfModel
from emsplat.heterogeneity.parts import cluster
from emsplat.heterogeneity.subspace import Latents, Subspace, infer
from emsplat.maths.fourier import crop
from emsplat.parallel import ALONE, World
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra, read_spectra

MOST_POINTS, PER_POINT = 100, 50  # points by which particles are placed, and views that each should have
_AT_ONCE = 10  # points whose inner products are made together: 32 numbers per voxel with all that goes with them
READ_AT_ONCE = 32768  # images
_FAR = 60.0  # nats below the likeliest point, by the linear stage, where a decoder need not be asked
_STEPS = 50
_EMPTY = 1e-3  # weight of a point that is left out


@dataclass(frozen=True)
class Refreshed:
    """The latent space of a half-set, and what it says of each view of the other half: the ``gain`` over the mean map
    of the linear stage, and that of the ``mean`` of its states alone. A sharper map gains as well; what states gain is
    the difference."""

    embedding: Embedding
    gain: Float[Tensor, " w"]
    mean: Float[Tensor, " w"]


@torch.no_grad()
def drawn(model: HalfModel, point: Float[Tensor, "m q"], lattice: Lattice) -> Float[Tensor, "m z y x"]:
    """The states at some points (latents of the half-set) with the frequencies of a lattice."""
    maps = []
    for one in point:
        spectrum = crop(torch.fft.rfftn(torch.fft.ifftshift(model.map(one))), lattice.size, 3)
        maps.append(torch.fft.fftshift(torch.fft.irfftn(spectrum, s=(lattice.size,) * 3)))
    return torch.stack(maps)


def evidence(
    maps: Float[Tensor, "m z y x"],
    subspace: Subspace,
    stack: ParticleStack,
    known: Float[Tensor, "v m"],
    world: World = ALONE,
) -> Float[Tensor, "v m"]:
    """log p(y|map) - log p(y|mean of the subspace) of each view, brightness and pose integrated out to first order.

    ``known`` is what the linear stage says of that. Maps that are out of the question by it are not compared; they stay
    as far below the likeliest. Those next to each other should be in question for the same views. Processes of a
    ``world`` share the images out, and have what is said of all.
    """
    lattice, mean, below = subspace.lattice, subspace.maps[:1], known - known.max(1, keepdim=True).values
    asked, found = below > -_FAR, torch.full_like(below, -torch.inf)
    theirs = torch.ones(len(below), dtype=torch.bool)
    for own, spectra in _read(stack, lattice.radius, world):
        theirs[own] = False
        for some in torch.split(torch.arange(len(maps)), _AT_ONCE):
            views = asked[own][:, some].any(1).nonzero()[:, 0]
            if not len(views):
                continue
            shown = torch.cat([mean, maps[some] - mean])
            power = torch.ones(len(shown), lattice.radius + 1)  # asked by nobody here
            latents = infer(Subspace(lattice, shown, power, subspace.placement), spectra.take(views))
            told = latents.linear - 0.5 * torch.diagonal(latents.quadratic, dim1=1, dim2=2)
            found[own[views][:, None], some] = told
    found[theirs] = 0
    world.sum_(found)
    return torch.where(found.isinf(), below + found.max(1, keepdim=True).values, found)


def _read(stack: ParticleStack, radius: int, world: World) -> Iterator[tuple[Int[Tensor, " v"], Spectra]]:
    """All images of this process, some at a time, with the numbers of their views among those of all."""
    start, elements = 0, torch.arange(stack.symmetry.order)
    for part in stack.parts():
        noise = estimate_noise(part.on(CPU))
        for rows in torch.split(part.shared(world), READ_AT_ONCE):
            if len(rows):
                views = ((start + rows)[:, None] * len(elements) + elements).flatten()
                yield views, read_spectra(part.take(rows), radius, stack.grid, noise)
        start += len(part)


def _chain(point: Float[Tensor, "m q"]) -> Float[Tensor, "m q"]:
    """Points in an order in which neighbours follow each other: each the nearest that is left."""
    left, order = set(range(1, len(point))), [0]
    distance = torch.cdist(point, point)
    while left:
        own = distance[order[-1]].tolist()
        order.append(min(left, key=own.__getitem__))
        left.remove(order[-1])
    return point[order]


def refreshed(
    model: HalfModel,
    placed: Refreshed,
    subspace: Subspace,
    latents: tuple[Latents, Latents],
    stacks: tuple[ParticleStack, ParticleStack],
    count: int,
    generator: torch.Generator,
    world: World = ALONE,
) -> Refreshed:
    """The latent space of a half-set as its model has it, and where the views of both halves lie.

    Tried are the points of before and up to ``count`` between them. What predicts the images of the other half best
    is taken, and what is ``placed`` where that is not less. ``stacks`` are the own half and the other one, ``latents``
    what the linear stage says of them. Processes of a ``world`` share the images out, and the first says what is taken.
    """
    before = placed.embedding
    tried = [before.density.point]
    if count > len(before.density):
        chain = _chain(cluster(before.own, torch.ones(len(before.own)), count, generator).centroid)
        tried.append(world.spread_named({"point": chain})["point"])
    weights = [
        torch.cdist(before.own, point).argmin(1).bincount(minlength=len(point)).double() / len(before.own)
        for point in tried
    ]
    maps = drawn(model, torch.cat(tried), subspace.lattice)
    sizes = [len(point) for point in tried]
    means = [
        torch.einsum("m,mzyx->zyx", weight.float(), own)
        for weight, own in zip(weights, torch.split(maps, sizes), strict=True)
    ]
    known = [_linear(torch.cat(tried), seen) for seen in latents]
    always = known[1].max(1, keepdim=True).values.expand(-1, len(means))
    own = torch.split(evidence(maps, subspace, stacks[0], known[0], world), sizes, 1)
    every = torch.cat([maps, torch.stack(means)])
    *other, alone = torch.split(
        evidence(every, subspace, stacks[1], torch.cat([known[1], always], 1), world), [*sizes, len(means)], 1
    )
    found = [placed]
    for point, weight, own_part, other_part, mean in zip(tried, weights, own, other, alone.T, strict=True):
        embedding, gain = _embedded(point, weight, own_part, other_part, before.precision)
        found.append(Refreshed(embedding, gain, mean))
    best = int(world.told(str(fewest([one.gain for one in found], stacks[1].image_of_view))))
    return _spread(found[best], world) if best else placed


def _spread(placed: Refreshed, world: World) -> Refreshed:
    """As the first process has it, in all of them."""
    gains = torch.stack([placed.gain, placed.mean])
    world.spread_(gains)
    return Refreshed(spread_embedding(placed.embedding, world), gains[0], gains[1])


def _linear(point: Float[Tensor, "m q"], latents: Latents) -> Float[Tensor, "v m"]:
    """What the linear stage says of points."""
    return Density(point, torch.ones(len(point), dtype=point.dtype)).evidence(latents)


def _embedded(
    point: Float[Tensor, "m q"],
    weight: Float[Tensor, " m"],
    own: Float[Tensor, "v m"],
    other: Float[Tensor, "w m"],
    precision: Float[Tensor, "q q"],
) -> tuple[Embedding, Float[Tensor, " w"]]:
    """With the likeliest weights of the points; and the gain of each view of the other half."""
    for _ in range(_STEPS):
        weight = torch.softmax(own + weight.clamp(min=1e-300).log(), 1).mean(0)
    kept = weight > _EMPTY
    weight = weight[kept] / weight[kept].sum()
    own, other, point = own[:, kept] + weight.log(), other[:, kept] + weight.log(), point[kept]
    membership, others, gain = torch.softmax(own, 1), torch.softmax(other, 1), torch.logsumexp(own, 1)
    embedding = Embedding(
        Density(point, weight), membership, others, membership @ point, others @ point, gain, precision
    )
    return embedding, torch.logsumexp(other, 1)
