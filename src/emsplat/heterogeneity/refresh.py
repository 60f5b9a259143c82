"""Where particles lie, asked of a decoder: its states are sharper than a linear subspace can show them.

A state is drawn at each of many points of latent space, and each view is compared with all of them, brightness and pose
integrated out as in the linear stage. The weights of the points are the likeliest ones, as in `density`; latents of
views are means over the points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.evidence import Gain, fewest, mean_gain
from emsplat.heterogeneity.lattice import Lattice
from emsplat.heterogeneity.parts import cluster
from emsplat.heterogeneity.spectra import Spectra, read_spectra
from emsplat.heterogeneity.subspace import Placement, Subspace, infer
from emsplat.imaging.project import voxelize
from emsplat.maths.fourier import crop
from emsplat.models.conformations import StateDecoder
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.types import Grid

_AT_ONCE = 8  # points whose inner products are made together
_IMAGES = 8192  # that are read together
_STEPS = 50
_EMPTY = 1e-3  # weight of a point that is left out


@dataclass(frozen=True)
class States:
    """Some states of a decoder at low resolution, beside their mean."""

    lattice: Lattice
    mean: Float[Tensor, "1 z y x"]
    maps: Float[Tensor, "m z y x"]
    placement: Placement

    def evidence(self, spectra: Spectra) -> Float[Tensor, "v m"]:
        """log p(y|state) - log p(y|mean) of each view, brightness and pose integrated out to first order."""
        seen = []
        for maps in torch.split(self.maps, _AT_ONCE):
            shown = torch.cat([self.mean, maps - self.mean])
            power = torch.ones(len(shown), self.lattice.radius + 1)  # asked by nobody here
            latents = infer(Subspace(self.lattice, shown, power, self.placement), spectra)
            seen.append(latents.linear - 0.5 * torch.diagonal(latents.quadratic, dim1=1, dim2=2))
        return torch.cat(seen, 1)


@torch.no_grad()
def drawn(
    decoder: StateDecoder, point: Float[Tensor, "m q"], radius: int, box: Grid
) -> tuple[Lattice, Float[Tensor, "m z y x"]]:
    """The states at some points with the frequencies up to ``radius`` cycles per box."""
    lattice = Lattice(radius)
    maps = []
    for one in point:
        volume = voxelize(decoder.mixtures(one[None].float())[0], box)
        spectrum = crop(torch.fft.rfftn(torch.fft.ifftshift(volume)), lattice.size, 3)
        maps.append(torch.fft.fftshift(torch.fft.irfftn(spectrum, s=(lattice.size,) * 3)))
    return lattice, torch.stack(maps)


def refreshed(
    decoder: StateDecoder,
    before: Embedding,
    placement: Placement,
    stacks: tuple[ParticleStack, ParticleStack],
    radius: int,
    count: int,
    generator: torch.Generator,
) -> tuple[Embedding, Gain]:
    """The latent space of a half-set as its decoder has it, where the views of both halves lie, and the gain on the
    other half.

    There are the points of ``before``, or up to ``count`` between them where images of the other half say that these
    tell more. ``stacks`` are the own half and the other one.
    """
    spread = cluster(before.own, torch.ones(len(before.own)), count, generator).centroid
    tried = [before.density.point, *([spread] if count > len(before.density) else [])]
    image = torch.arange(len(before.other)) // stacks[1].symmetry.order
    found: list[Embedding] = []
    gains: list[Tensor] = []
    for point in tried:
        lattice, maps = drawn(decoder, point, radius, stacks[0].grid)
        weight = torch.cdist(before.own, point).argmin(1).bincount(minlength=len(point)).double() / len(before.own)
        mean = torch.einsum("m,mzyx->zyx", weight.float(), maps)[None]
        if not found:
            consensus = mean  # gains are relative to one map
        states = States(lattice, consensus, maps, placement)
        own, other = (_evidence(states, stack, radius) for stack in stacks)
        embedding, gain = _embedded(point, weight, own, other, before.precision)
        found.append(embedding)
        gains.append(gain)
    best = fewest(gains, image)
    return found[best], mean_gain(gains[best], image)


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
    membership = torch.softmax(own, 1)
    placed = torch.softmax(other, 1) @ point
    gain = torch.logsumexp(own, 1)
    embedding = Embedding(Density(point, weight), membership, membership @ point, placed, gain, precision)
    return embedding, torch.logsumexp(other, 1)


def _evidence(states: States, stack: ParticleStack, radius: int) -> Float[Tensor, "v m"]:
    noise = estimate_noise(stack)
    parts = torch.split(torch.arange(len(stack)), _IMAGES)
    return torch.cat([states.evidence(read_spectra(stack.take(rows), radius, noise=noise)) for rows in parts])
