"""The linear stage of both half-sets, and whether there is anything to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.heterogeneity.density import Density, fit_density
from emsplat.heterogeneity.embedding import Embedding, embedded
from emsplat.heterogeneity.entanglement import brightness
from emsplat.heterogeneity.evidence import (
    POINTS,
    Gain,
    component_gains,
    fewest,
    first_components,
    mean_gain,
    point_gains,
)
from emsplat.heterogeneity.subspace import (
    Latents,
    Placement,
    Subspace,
    SubspaceStage,
    consensus,
    fit_subspace,
    infer,
    posterior,
    space_of,
)
from emsplat.measures.mask import soft_region
from emsplat.parallel import World
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import AnySpectra

_RADII, _ITERATIONS = (0.4, 0.7, 1.0), 8  # of the finest frequency, and at each
_SAMPLE = 10000  # images of a half-set that tell coarse components
_DENSE = 0.1  # of the maximum of the mean map: less is no molecule
_EMPTY = 2e-3  # weight of a point that is left out

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What there is to find: ``count`` components and the density of each half.

    ``latents[a][b]`` are those of the views of half b (0 or 1) in the space of half a; ``brightness`` is that of each
    half's views, relative to what the mean map would show.
    """

    count: int
    densities: tuple[Density, Density]
    latents: tuple[tuple[Latents, Latents], tuple[Latents, Latents]]
    brightness: tuple[Float[Tensor, " v"], Float[Tensor, " w"]]

    def embeddings(self) -> tuple[Embedding, Embedding]:
        """The latent spaces of both halves."""
        first, second = self.latents
        return embedded(self.densities[0], *first), embedded(self.densities[1], second[1], second[0])


@dataclass(frozen=True)
class Search:
    """What the linear stage of both half-sets says: the gains on the other half, mean of both directions, with 0, 1, 2,
    ... ``components``, the strongest first, and by the number of ``points`` of the density of their latents, where a
    component gains. Nothing is ``found`` unless both do."""

    subspaces: tuple[Subspace, Subspace]
    components: list[Gain]
    points: dict[int, Gain]
    found: Found | None

    @property
    def gain(self) -> Gain:
        """The headline: of the best density, or of the best number of components where no density was tried."""
        return max(self.points.values() or self.components, key=lambda gain: gain.value)


def stages(radius: int) -> tuple[SubspaceStage, ...]:
    """Those of the linear stage. All images are needed where the smallest changes are to be seen."""
    radii = [max(4, round(share * radius)) for share in _RADII]
    return tuple(SubspaceStage(own, _ITERATIONS, None if own == radii[-1] else _SAMPLE) for own in radii)


def search(
    spectra: tuple[AnySpectra, AnySpectra],
    images: tuple[Int[Tensor, " v"], Int[Tensor, " w"]],
    components: int,
    radius: int,
    points: int | None,
    seed: int,
    support: Float[Tensor, "z y x"] | None,
    tell: Tell,
    look: Callable[[], None] = lambda: None,
) -> Search:
    """Mean and components of each half, their gain on the other, and the density of the latents.

    Components lie within ``support``; without it within each half's own molecule, and where nothing is found there, in
    the whole sphere: what fills the box learns ten times as much noise.

    Of several processes that share the images out all take part and ``look`` from time to time; the first then tells
    what follows.
    """
    if support is not None:
        return _search(spectra, images, components, radius, points, seed, (support, support), tell, look)
    molecules = _molecule(spectra[0], radius), _molecule(spectra[1], radius)
    inside = _search(spectra, images, components, radius, points, seed, molecules, tell, look)
    if inside.found is not None:
        return inside
    tell("  nothing within the molecule; in the whole sphere")
    whole = _search(spectra, images, components, radius, points, seed, (None, None), tell, look)
    return max(inside, whole, key=lambda own: (own.found is not None, own.gain.value))


def _molecule(spectra: AnySpectra, radius: int) -> Float[Tensor, "z y x"]:
    """Where the mean map is above a tenth of its maximum, and half a period of the finest frequency beyond, with a soft
    edge."""
    space = space_of(radius, None)
    mean, size = consensus(space, spectra).maps[0], space.lattice.size
    return soft_region(mean > _DENSE * mean.max(), 1 / size, extend=0.5 / radius, edge=0.75 / radius)


def _search(
    spectra: tuple[AnySpectra, AnySpectra],
    images: tuple[Int[Tensor, " v"], Int[Tensor, " w"]],
    components: int,
    radius: int,
    points: int | None,
    seed: int,
    supports: tuple[Float[Tensor, "z y x"] | None, Float[Tensor, "z y x"] | None],
    tell: Tell,
    look: Callable[[], None],
) -> Search:
    found = []
    plan = stages(radius)
    for half, (own, support) in enumerate(zip(spectra, supports, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + half)
        steps = fit_subspace(own, components, generator, plan, support)
        total = sum(stage.iterations for stage in plan)
        for step, latest in enumerate(steps):
            subspace = latest
            if (step + 1) % 8 == 0 or step + 1 == total:
                tell(f"  half {half + 1}: iteration {step + 1} of {total}")
                look()
        found.append(subspace)
    subspaces = (found[0], found[1])
    embedded = tuple(tuple(_all_of(infer(subspace, views), views) for views in spectra) for subspace in subspaces)
    bright = brightness(subspaces[0], spectra[0]), brightness(subspaces[1], spectra[1])
    image = torch.cat([images[1], images[0] + int(images[1].max()) + 1])
    world = spectra[0].portion.world
    told = _judged(subspaces, embedded, bright, image, points, seed, tell) if world.first else None
    return spread(told, world)


def _all_of(latents: Latents, spectra: AnySpectra) -> Latents:
    """Of the views of all processes."""
    portion = spectra.portion
    if portion.rows is None:
        return latents
    return posterior(portion.whole(latents.linear), portion.whole(latents.quadratic))


def _judged(
    subspaces: tuple[Subspace, Subspace],
    embedded: tuple[tuple[Latents, ...], ...],
    bright: tuple[Float[Tensor, " v"], Float[Tensor, " w"]],
    image: Int[Tensor, " n"],
    points: int | None,
    seed: int,
    tell: Tell,
) -> Search:
    """What the latents of all views say; ``image`` is that of the views of half 2, then of half 1."""
    crossed = _even([component_gains(embedded[half][1 - half]) for half in (0, 1)])
    together = [torch.cat(pair) for pair in zip(*crossed, strict=True)]
    gains = [mean_gain(values, image) for values in together]
    count = fewest(together, image)
    if not count or not gains[count].significant:
        return Search(subspaces, gains, {}, None)
    if not all(subspace.components for subspace in subspaces):  # nothing that both half-sets have
        tell(f"  half {1 + [own.components for own in subspaces].index(0)} has no components of its own")
        return Search(subspaces, gains, {}, None)
    kept = tuple(tuple(first_components(latents, count) for latents in own) for own in embedded)
    latents = ((kept[0][0], kept[0][1]), (kept[1][0], kept[1][1]))
    tell("how many points")
    tried = POINTS if points is None else (points,)
    by_points = [
        point_gains(latents[half][half], latents[half][1 - half], torch.Generator().manual_seed(seed), tried)
        for half in (0, 1)
    ]
    joint = [torch.cat(pair) for pair in zip(*by_points, strict=True)]
    by_number = {number: mean_gain(values, image) for number, values in zip(tried, joint, strict=True)}
    chosen = tried[fewest(joint, image)]
    if not by_number[chosen].significant:
        return Search(subspaces, gains, by_number, None)
    densities = [
        fit_density(latents[half][half], chosen, torch.Generator().manual_seed(seed))
        .without_small(_EMPTY)
        .distinct(latents[half][half].quadratic.mean(0))
        for half in (0, 1)
    ]
    if min(map(len, densities)) < 2:  # one state each: halves that differ in their mean map
        return Search(subspaces, gains, by_number, None)
    return Search(subspaces, gains, by_number, Found(count, (densities[0], densities[1]), latents, bright))


def packed(search: Search) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What JSON can hold of it, and tensors by name: for a file or another process."""
    about: dict[str, Any] = {
        "components": [asdict(gain) for gain in search.components],
        "points": [[number, asdict(gain)] for number, gain in search.points.items()],
    }
    tensors: dict[str, Tensor] = {}
    for half, own in enumerate(search.subspaces):
        about[f"subspace{half}"] = {"radius": own.lattice.radius, "placement": asdict(own.placement)}
        tensors |= {f"subspace{half}.maps": own.maps, f"subspace{half}.power": own.power}
    if (found := search.found) is not None:
        about["count"] = found.count
        for half in (0, 1):
            density = found.densities[half]
            tensors |= {f"density{half}.point": density.point, f"density{half}.weight": density.weight}
            tensors[f"brightness{half}"] = found.brightness[half]
            for other in (0, 1):
                latents = found.latents[half][other]
                tensors |= {f"latents{half}{other}.b": latents.linear, f"latents{half}{other}.a": latents.quadratic}
    return about, tensors


def unpacked(about: dict[str, Any], own: dict[str, Tensor]) -> Search:
    """From what `packed` gives.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    subspaces = [
        Subspace(
            Lattice(int(about[f"subspace{half}"]["radius"])),
            own[f"subspace{half}.maps"],
            own[f"subspace{half}.power"],
            Placement(**about[f"subspace{half}"]["placement"]),
        )
        for half in (0, 1)
    ]
    gains = [Gain(**gain) for gain in about["components"]]
    points = {int(number): Gain(**gain) for number, gain in about["points"]}
    if "count" not in about:
        return Search((subspaces[0], subspaces[1]), gains, points, None)
    densities = [Density(own[f"density{half}.point"], own[f"density{half}.weight"]) for half in (0, 1)]
    latents = [
        [posterior(own[f"latents{half}{other}.b"], own[f"latents{half}{other}.a"]) for other in (0, 1)]
        for half in (0, 1)
    ]
    found = Found(
        int(about["count"]),
        (densities[0], densities[1]),
        ((latents[0][0], latents[0][1]), (latents[1][0], latents[1][1])),
        (own["brightness0"], own["brightness1"]),
    )
    return Search((subspaces[0], subspaces[1]), gains, points, found)


def spread(search: Search | None, world: World) -> Search:
    """What the first process has found, in all of them."""
    return world.spread_packed(search, packed, unpacked)


def _even(gains: list[list[Tensor]]) -> list[list[Tensor]]:
    """With the gains of all its components for what a half has no components for."""
    most = max(map(len, gains))
    return [own + own[-1:] * (most - len(own)) for own in gains]
