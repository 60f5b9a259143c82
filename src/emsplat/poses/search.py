"""Poses further away than local steps lead: many starts at low frequencies, of which the best go on.

A start is caught from as far as the rim of a particle of two thirds of the box moves by a quarter of the finest period:
3/(4 r) rad at r cycles per box, and starts of a lattice are twice as far apart. What they reach at low frequencies is
compared, and the best few are followed to all of them. A global search looks at orientations that are four times as far
apart, and moves from those that look best.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.maths.geometry import quaternion_to_matrix, vector_to_matrix
from emsplat.poses.local import Placed, PoseViews, Prior, Reference, Search, descend, nearest

_COARSE = 8  # cycles per box of the first comparison
_CAUGHT = 0.75  # rad times the radius
_STEPS = 4
_BEST = 4  # of the starts of an image that go on
_LOOKED = 24  # orientations of a global search whose images are moved
_AT_ONCE = 200_000  # views of one call
_LOOSE = 0.1  # of the box: how far a shift may be from where it was given when all orientations are open
_POOR = 0.75  # of the agreement that good views have


def within(extent: float) -> Search:
    """A search through all poses within ``extent`` rad of that which each view has."""

    def search(reference: Reference, views: PoseViews, prior: Prior) -> Placed:
        radius = _coarse(reference)
        starts = ball_lattice(extent, 2 * _CAUGHT / radius)
        loose = Prior(max(extent, prior.turn), max(_LOOSE * reference.grid.length, prior.shift))
        found = nearest(reference, views, prior)
        return _better(found, _from_starts(reference, views, loose, radius, starts), len(starts))

    return search


def everywhere(elements: Float[Tensor, "s 3 3"]) -> Search:
    """A search through all orientations that a point group leaves different."""

    def search(reference: Reference, views: PoseViews, prior: Prior) -> Placed:
        radius = _coarse(reference)
        grid = unlike(rotations(4 * _CAUGHT / radius), elements)
        loose = Prior(math.inf, max(_LOOSE * reference.grid.length, prior.shift))
        best = _looked_at(reference, views, loose, radius, grid)
        further = _followed(reference, views, loose, radius, best)
        return _better(nearest(reference, views, prior), further, len(grid))

    return search


def poor(found: Placed) -> Int[Tensor, " v"]:
    """Views that agree with their slices by much less than good ones of all do: Re Σ ȳ C P / Σ |C P|², which is 1 for a
    right pose and a right reference."""
    agreement = 0.5 * (found.after / found.power.clamp(min=1e-30) + 1)
    return (agreement < _POOR * agreement.quantile(0.75)).nonzero()[:, 0]


def ball_lattice(extent: float, spacing: float) -> Float[Tensor, "n 3"]:
    """Rotation vectors within ``extent`` rad, the origin first, on a cubic lattice of at most ``spacing``."""
    count = math.ceil(extent / spacing)
    axis = torch.arange(-count, count + 1, dtype=torch.float64) * (extent / max(count, 1))
    points = torch.cartesian_prod(axis, axis, axis)
    length = torch.linalg.vector_norm(points, dim=1)
    inside = length <= extent * (1 + 1e-9)
    return points[inside][torch.argsort(length[inside], stable=True)]


def rotations(spacing: float) -> Float[Tensor, "n 3 3"]:
    """Rotations spread evenly, about ``spacing`` rad apart, on a spiral through the quaternions (Alexa 2022)."""
    count = math.ceil(8 * math.pi**2 / spacing**3)  # SO(3) measures 8π² where angles are distances
    place = torch.arange(count, dtype=torch.float64) + 0.5
    inner, outer = (place / count).sqrt(), (1 - place / count).sqrt()
    alpha, beta = 2 * math.pi * place / math.sqrt(2), 2 * math.pi * place / 1.533751168755204288118041413
    quaternion = [inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()]
    return quaternion_to_matrix(torch.stack(quaternion, 1))


def unlike(grid: Float[Tensor, "n 3 3"], elements: Float[Tensor, "s 3 3"]) -> Float[Tensor, "m 3 3"]:
    """Those of the rotations A that are nearest to the identity among all A R of a point group {R}."""
    nearness = torch.einsum("nij,sji->ns", grid, elements.to(grid))
    return grid[nearness[:, 0] >= nearness.max(1).values - 1e-9]


def _coarse(reference: Reference) -> int:
    return min(_COARSE, reference.lattice.radius)


def _from_starts(
    reference: Reference, views: PoseViews, prior: Prior, radius: int, starts: Float[Tensor, "n 3"]
) -> Placed:
    """The best of what is reached from each of some turns of the views' own poses."""
    count = len(views.image)
    kept_rotation, kept_move, kept_gain = [], [], []
    turn = vector_to_matrix(starts)
    for some in torch.split(torch.arange(len(turn)), max(1, _AT_ONCE // max(count, 1))):
        every = views.take(torch.arange(count).repeat_interleave(len(some)))
        every = replace(every, rotation=(turn[some] @ views.rotation[:, None]).flatten(0, 1))
        found = descend(reference, every, prior, radius, _STEPS)
        kept_rotation.append(found.poses.rotation.reshape(count, len(some), 3, 3))
        kept_move.append(found.poses.shift.reshape(count, len(some), 2))
        kept_gain.append(found.after.reshape(count, len(some)))
    rotation, move, gain = (torch.cat(parts, 1) for parts in (kept_rotation, kept_move, kept_gain))
    best = gain.topk(min(_BEST, gain.shape[1]), 1).indices
    row = torch.arange(count)[:, None]
    return _followed(reference, views, prior, radius, (rotation[row, best], move[row, best]))


def _looked_at(
    reference: Reference, views: PoseViews, prior: Prior, radius: int, grid: Float[Tensor, "n 3 3"]
) -> tuple[Float[Tensor, "v b 3 3"], Float[Tensor, "v b 2"]]:
    """The orientations of a grid that show the views best, after some steps from each."""
    rotation, move = [], []
    for view in torch.split(torch.arange(len(views.image)), max(1, _AT_ONCE // len(grid))):
        own = views.take(view.repeat_interleave(len(grid)))
        own = replace(own, rotation=grid.repeat(len(view), 1, 1))
        gain = descend(reference, own, prior, radius, steps=0).before.reshape(len(view), len(grid))
        best = gain.topk(min(_LOOKED, len(grid)), 1).indices
        own = views.take(view.repeat_interleave(best.shape[1]))
        found = descend(reference, replace(own, rotation=grid[best.flatten()]), prior, radius, _STEPS)
        after = found.after.reshape(best.shape).topk(min(_BEST, best.shape[1]), 1).indices
        row = torch.arange(len(view))[:, None]
        rotation.append(found.poses.rotation.reshape(*best.shape, 3, 3)[row, after])
        move.append(found.poses.shift.reshape(*best.shape, 2)[row, after])
    return torch.cat(rotation), torch.cat(move)


def _followed(
    reference: Reference,
    views: PoseViews,
    prior: Prior,
    radius: int,
    starts: tuple[Float[Tensor, "v b 3 3"], Float[Tensor, "v b 2"]],
) -> Placed:
    """The best of some starts of each view, each followed through higher and higher frequencies."""
    rotation, move = starts
    count, several = rotation.shape[:2]
    every = views.take(torch.arange(count).repeat_interleave(several))
    every = replace(every, rotation=rotation.flatten(0, 1).contiguous(), move=move.flatten(0, 1).contiguous())
    last = reference.lattice.radius
    while radius < last:
        radius = min(2 * radius, last)
        found = descend(reference, every, prior, radius)
        every = replace(every, rotation=found.poses.rotation, move=found.poses.shift)
    found = descend(reference, every, prior, last)
    best = found.after.reshape(count, several).argmax(1)
    return found.take(torch.arange(count) * several + best)


def _better(one: Placed, other: Placed, tried: int) -> Placed:
    """Of two results for each view the first, unless the second has the higher likelihood even as the best of so many
    that were tried."""
    rows = (other.after > one.after + math.log(tried)).nonzero()[:, 0]
    return one.with_rows(rows, other.take(rows))
