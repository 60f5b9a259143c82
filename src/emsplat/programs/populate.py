"""How many particles are in which state, free energies, and whether latents follow the molecule: of a run that has
found states."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.heterogeneity.classes import Classes
from emsplat.heterogeneity.embedding import Embedding, leading
from emsplat.heterogeneity.entanglement import (
    ALIKE,
    Circumstances,
    Entangled,
    describe,
    entanglement,
    moving_whole,
    remedy,
    scaling,
)
from emsplat.heterogeneity.frames import Frame
from emsplat.heterogeneity.populations import (
    Cloud,
    FreeEnergy,
    Share,
    Weighed,
    bootstrap,
    resampled,
    smooth,
    span,
)
from emsplat.heterogeneity.search import Found, Search
from emsplat.io.files import number_text, replacing
from emsplat.particles.copies import first_of_particles
from emsplat.particles.stack import ParticleStack
from emsplat.run.files import DENSITY, FREE_ENERGY, LANDSCAPE
from emsplat.run.log import Log

_FEWEST = 20  # micrographs that a bootstrap can draw from
_PROFILE, _PLANE = 61, 41  # places along a component, and along each side of the plane


@dataclass(frozen=True)
class Populations:
    """Shares of states with errors, and what they were drawn from."""

    weighed: Weighed
    shares: list[Share]
    membership: Float[Tensor, "v s"]  # of the views of half 1, then of half 2
    resampled: str
    profiles: list[FreeEnergy]  # along each component; none where the latents form classes
    plane: FreeEnergy | None

    @property
    def about(self) -> dict[str, Any]:
        """What the summary says."""
        return {"populations_over": self.resampled, "landscape": self.plane is not None or bool(self.profiles)}


def populations(
    stack: ParticleStack,
    embeddings: tuple[Embedding, Embedding],
    found: Found | None,
    states: Float[Tensor, "s q"],
    classes: Classes | None,
    seed: int,
) -> Populations:
    """``states`` are latents of half 1, where there are ``classes`` one for each. Without ``found``, what the linear
    stage says of the images, or with classes there is no landscape."""
    order = stack.symmetry.order
    rows = [stack.only(half).rows.repeat_interleave(order) for half in (1, 2)]
    unit, said = _units(stack, torch.cat(rows))
    counts = torch.split(resampled(int(unit.max()) + 1, seed)[unit], [len(part) for part in rows])
    back = leading(embeddings[1], embeddings[0])
    points = [_points(own.density.point, own.density.weight) for own in embeddings]
    placed = [points[0], points[1].within(back)]
    members = [own.membership for own in embeddings]
    smoothed = None
    if found is not None and classes is None:
        image = [stack.only(half).image_of_view for half in (1, 2)]
        smoothed = _smoothed(found, back, (image[0], image[1]), counts, seed)
        # Points stand for what lies about them.
        placed = [replace(own, root=wide.root) for own, wide in zip(placed, smoothed.clouds, strict=True)]
    if classes is None:
        one, other = (cloud.shares(states, torch.Generator().manual_seed(seed)) for cloud in placed)
    else:
        one, other = classes.parts()
    membership = torch.cat([members[0] @ one, members[1] @ other])
    drawn = [
        bootstrap(cloud.weight, member / cloud.weight, count)
        for cloud, member, count in zip(points, members, counts, strict=True)
    ]
    weighed = Weighed((placed[0], placed[1]), (drawn[0], drawn[1]), (members[0], members[1]))
    profiles, plane = ([], None) if smoothed is None else _landscape(smoothed)
    return Populations(weighed, weighed.shares((one, other)), membership, said, profiles, plane)


_Counts = Sequence[Int[Tensor, "_ d"]]  # of the views of each half, how often they are drawn


def _smoothed(
    found: Found, back: Frame, image: tuple[Int[Tensor, " v"], Int[Tensor, " w"]], counts: _Counts, seed: int
) -> Weighed:
    """The density with a width, as the linear stage of each half sees it."""
    clouds, drawn, members = [], [], []
    for half, cloud in enumerate(smooth(found.densities, found.latents, image, seed)):
        latents = found.latents[half][half]
        clouds.append(cloud if half == 0 else cloud.within(back))
        drawn.append(bootstrap(cloud.weight, cloud.likelihood(latents), counts[half]))
        members.append(cloud.membership(latents))
    return Weighed((clouds[0], clouds[1]), (drawn[0], drawn[1]), (members[0], members[1]))


def _points(point: Float[Tensor, "m q"], weight: Float[Tensor, " m"]) -> Cloud:
    return Cloud(point, weight, torch.zeros(point.shape[1], point.shape[1], dtype=point.dtype))


def _units(stack: ParticleStack, rows: Int[Tensor, " v"]) -> tuple[Int[Tensor, " v"], str]:
    """What is drawn as a whole, by number, and what it is called."""
    table = stack.table
    micrograph = torch.unique(table.micrograph[rows], return_inverse=True)[1]
    image = torch.unique(table.stack[rows] * (int(table.image.max()) + 1) + table.image[rows], return_inverse=True)[1]
    units, images = int(micrograph.max()) + 1, int(image.max()) + 1
    if _FEWEST <= units < images:
        return micrograph, f"{units:,} {'micrographs' if table.micrograph_names else 'stacks'}"
    why = "no micrographs are known" if units in (1, images) else f"there are only {units} micrographs"
    return image, f"{images:,} particles ({why})"


def _landscape(weighed: Weighed) -> tuple[list[FreeEnergy], FreeEnergy | None]:
    count = weighed.clouds[0].point.shape[1]
    # A half may have found fewer components, and then no width along the others.
    count = next((k for k in range(count) if not all(cloud.fills([k]) for cloud in weighed.clouds)), count)
    lines = [torch.linspace(*span(weighed, axis), _PROFILE, dtype=torch.float64) for axis in range(count)]
    profiles = [weighed.free_energy(line[:, None], [axis]) for axis, line in enumerate(lines)]
    if count < 2 or not all(cloud.fills([0, 1]) for cloud in weighed.clouds):
        return profiles, None
    across, up = (torch.linspace(*span(weighed, axis), _PLANE, dtype=torch.float64) for axis in (0, 1))
    return profiles, weighed.free_energy(torch.cartesian_prod(across, up), [0, 1])


def follows(
    stack: ParticleStack,
    searched: Search,
    latent: Float[Tensor, "v q"],
    linear: bool,
    seed: int,
    log: Log,
) -> list[dict[str, Any]]:
    """Tests whether latents follow the circumstances of the images, with warnings; what the summary says of them.

    ``latent`` is that of the views of half 1, then of half 2, of which the first of each particle counts. ``linear``:
    it is that of the linear stage, whose maps say whether it is a matter of grey scale.
    """
    if searched.found is None:
        raise ValueError("nothing was found")
    first, about = circumstances(stack, torch.cat(searched.found.brightness))
    tests = entanglement(latent[first], about, seed)
    log.line("do latents follow the images instead of the molecule? what explains how much of their variance:")
    for test in tests:
        log.line(f"  {describe(test)}")
        if test.warns:
            log.warn(remedy(test))
    maps = searched.subspaces[0].maps[: searched.found.count + 1]
    return [_test(one) for one in tests] + (_of_the_whole(maps, log) if linear else [])


def circumstances(stack: ParticleStack, brightness: Float[Tensor, " v"]) -> tuple[Int[Tensor, " i"], Circumstances]:
    """Of each particle its first view, among those of half 1 and then of half 2, and what is known of it. What is
    shuffled has to be independent, as rows of one particle are not."""
    table = stack.table.take(torch.cat([stack.only(half).rows for half in (1, 2)]))
    first = first_of_particles(table)
    table, views = table.take(first), first * stack.symmetry.order
    micrographs, defocus = len(torch.unique(table.micrograph)), table.optics.defocus_u + table.optics.defocus_v
    known = table.micrograph if 1 < micrographs < len(table) else None
    return views, Circumstances(table.poses.rotation, defocus / 2, brightness[views], known)


def _test(one: Entangled) -> dict[str, Any]:
    return {
        "what": one.what,
        "explained": round(one.share, 4),
        "p": round(one.p, 4),
        "component": one.component,
        "direction": [round(value, 4) for value in one.direction],
        "shuffled": one.shuffled,
        "warns": one.warns,
    }


def _of_the_whole(maps: Float[Tensor, "c z y x"], log: Log) -> list[dict[str, Any]]:
    """Whether going along some direction of latent space makes the molecule brighter and nothing else, or moves the
    whole of it."""
    found = []
    for what, like, does, then, (cosine, direction) in (
        (
            "grey scale",
            "brightness",
            "the grey scale of the images: a direction of latent space (most along z{axis}) makes the whole molecule "
            "brighter",
            "normalise the images, or correct their scale",
            scaling(maps),
        ),
        (
            "position of the whole",
            "the place or turn of the whole molecule",
            "where the whole molecule is in the images: a direction of latent space (most along z{axis}) shifts and "
            "turns it as a whole",
            "states along it are copies of one map; refine poses and centres first (emsplat refine)",
            moving_whole(maps),
        ),
    ):
        axis = 1 + max(range(len(direction)), key=lambda k: abs(direction[k]))
        log.line(f"  {what}: the change most like one of {like} is so by {cosine:.0%} (most along z{axis})")
        if cosine >= ALIKE:
            log.warn(f"latents follow {does.format(axis=axis)} ({cosine:.0%} of that change); {then}")
        found.append(
            {
                "what": what,
                "explained": round(cosine, 4),
                "p": None,
                "component": axis,
                "direction": [round(value, 4) for value in direction],
                "shuffled": "",
                "warns": cosine >= ALIKE,
            }
        )
    return found


def say_shares(log: Log, shares: Sequence[Share], over: str) -> None:
    log.line(f"populations, with 95 % intervals from a bootstrap over {over}; and of each half-set:")
    for number, share in enumerate(shares):
        low, high = share.interval
        one, other = share.halves
        log.line(f"  state {number + 1}: {share.value:.1%} ({low:.1%} to {high:.1%}); {one:.1%}, {other:.1%}")


def write_populations(folder: Path, found: Populations) -> None:
    """density.csv, free_energy.csv and landscape.csv."""
    count = found.weighed.clouds[0].point.shape[1]
    latent = [f"z{k + 1}" for k in range(count)]
    rows: list[Sequence[Any]] = []
    for half, (cloud, drawn) in enumerate(zip(found.weighed.clouds, found.weighed.draws, strict=True)):
        ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=1).T
        for point, weight, (low, high) in zip(cloud.point.tolist(), cloud.weight.tolist(), ends.tolist(), strict=True):
            rows.append([half + 1, *point, weight, min(low, weight), max(high, weight)])
    _write(folder / DENSITY, ["half", *latent, "weight", "low", "high"], rows)
    columns = ["free_energy", "error", "half1", "half2"]
    if found.profiles:
        rows = []
        for axis, profile in enumerate(found.profiles):
            rows += [[latent[axis], *numbers] for numbers in _shown(profile)]
        _write(folder / FREE_ENERGY, ["component", "place", *columns], rows)
    if found.plane is not None:
        _write(folder / LANDSCAPE, ["z1", "z2", *columns], _shown(found.plane))


def _shown(energy: FreeEnergy) -> list[list[float]]:
    """Places with free energy, error and both halves, undefined where there are too few images."""
    values = torch.stack([energy.value, energy.error, *energy.halves], 1)
    values = torch.where(energy.shown[:, None], values, torch.nan)
    return torch.cat([energy.place, values], 1).tolist()


def _write(path: Path, names: list[str], rows: Sequence[Sequence[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([number_text(cell, ".5g") if isinstance(cell, float) else cell for cell in row])
