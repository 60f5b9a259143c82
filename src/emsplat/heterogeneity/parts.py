"""Parts of a molecule: clusters of the Gaussians' features, their number, and regions of space within them.

Gaussians count by their weight, so that the many faint ones do not make parts of their own. How many clusters there are
is decided by prediction strength (Tibshirani & Walther 2005), which can say one: of two halves of the points, one is
clustered, and so is the other; the strength is, for the worst cluster of the other, the share of its pairs that the
centroids of the one keep together. The number is the largest whose strength, mean over halvings plus its standard
error, is at least 0.8. The gap statistic found ever more clusters, for features fill their space like nothing uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.models.cryospire import PartDiscovery

MOST = 16
STRONG = 0.8
_HALVINGS = 5
_RESTARTS, _STEPS = 4, 50
_ENOUGH = 1000  # points that the number of clusters is judged by
_REACH = 0.5  # of the root mean square radius of all: that of regions


@dataclass(frozen=True)
class Clusters:
    """Points by cluster."""

    label: Int[Tensor, " g"]
    centroid: Float[Tensor, "k d"]
    error: float  # weighted sum of squared distances to the centroids

    def __len__(self) -> int:
        return len(self.centroid)


def cluster(
    points: Float[Tensor, "g d"], weight: Float[Tensor, " g"], count: int, generator: torch.Generator
) -> Clusters:
    """k-means++ (Arthur & Vassilvitskii 2007), the best of four. There are fewer clusters where fewer points differ."""
    tries = (_cluster(points, weight, count, generator) for _ in range(_RESTARTS if count > 1 else 1))
    return min(tries, key=lambda one: one.error)


def _cluster(points: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> Clusters:
    chosen = [int(torch.multinomial(weight, 1, generator=generator))]
    distance = weight * (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count and float(distance.max()) > 0:
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        distance = torch.minimum(distance, weight * (points - points[chosen[-1]]).square().sum(1))
    centroid = points[chosen].clone()
    label = torch.cdist(points, centroid).argmin(1)
    for _ in range(_STEPS):
        size = torch.zeros(len(centroid)).index_add_(0, label, weight)
        total = torch.zeros_like(centroid).index_add_(0, label, weight[:, None] * points)
        centroid = torch.where(size[:, None] > 0, total / size.clamp(min=1e-30)[:, None], centroid)
        before, label = label, torch.cdist(points, centroid).argmin(1)
        if torch.equal(label, before):
            break
    return Clusters(label, centroid, float((weight * (points - centroid[label]).square().sum(1)).sum()))


@dataclass(frozen=True)
class Strength:
    """The prediction strength of 1, 2, … clusters, its standard error, and the number that follows."""

    strength: tuple[float, ...]
    error: tuple[float, ...]
    count: int


def count_clusters(
    points: Float[Tensor, "g d"], weight: Float[Tensor, " g"], generator: torch.Generator, most: int = MOST
) -> Strength:
    """How many clusters there are, up to ``most``, by the rule of this module."""
    chosen = torch.randperm(len(points), generator=generator)[:_ENOUGH]
    points, weight = points[chosen], weight[chosen] / weight.max()
    strengths, errors, best = [1.0], [0.0], 1
    for count in range(2, min(most, len(points) // 4) + 1):
        found = torch.tensor([_strength(points, weight, count, generator) for _ in range(_HALVINGS)])
        strengths.append(float(found.mean()))
        errors.append(float(found.std() / _HALVINGS**0.5))
        if strengths[-1] + errors[-1] >= STRONG:
            best = count
    return Strength(tuple(strengths), tuple(errors), best)


def _strength(points: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> float:
    """Of one halving, the mean of both directions."""
    order = torch.randperm(len(points), generator=generator)
    halves = order[: len(points) // 2], order[len(points) // 2 :]
    found = [cluster(points[own], weight[own], count, generator) for own in halves]
    if min(len(one) for one in found) < count:
        return 0.0  # fewer points differ
    total = 0.0
    for (one, other), own in zip((found, found[::-1]), halves[::-1], strict=True):
        said = torch.cdist(points[own], one.centroid).argmin(1)
        together = torch.zeros(count, count).index_put_((other.label, said), weight[own], accumulate=True)
        self_pairs = torch.zeros(count).index_add_(0, other.label, weight[own].square())
        pairs = together.sum(1).square() - self_pairs
        kept = (together.square().sum(1) - self_pairs) / pairs.clamp(min=1e-30)
        total += float(torch.where(pairs > 1e-6 * self_pairs, kept, 1.0).min())  # one point alone has no pairs
    return total / 2


def divide(
    position: Float[Tensor, "g 3"], weight: Float[Tensor, " g"], label: Int[Tensor, " g"], generator: torch.Generator
) -> tuple[Int[Tensor, " g"], Int[Tensor, " a"]]:
    """Each cluster into the fewest regions of space that have, taken together, at most half the radius of all.

    Radii are root mean square distances from the centroids. Returns the region of each Gaussian, and the cluster of
    each region.
    """
    whole = cluster(position, weight, 1, generator).error / float(weight.sum())
    region, owner = torch.zeros_like(label), list[int]()
    for number in torch.unique(label).tolist():
        here = (label == number).nonzero()[:, 0]
        most = _REACH**2 * whole * float(weight[here].sum())
        found = cluster(position[here], weight[here], 1, generator)
        while found.error > most and len(found) < len(here):
            found = cluster(position[here], weight[here], len(found) + 1, generator)
        kept, which = torch.unique(found.label, return_inverse=True)
        region[here] = len(owner) + which
        owner += [number] * len(kept)
    return region, torch.tensor(owner)


@dataclass(frozen=True)
class Anchors:
    """Where the rigid motions of the second stage hang (supplement D).

    ``feature`` is the centroid of a region's features, ``position`` (Å) that of the region's Gaussian whose feature
    is the closest to it. ``part`` is the cluster of features, whose number ``strength`` tells, unless it was given.
    """

    feature: Float[Tensor, "a f"]
    position: Float[Tensor, "a 3"]
    part: Int[Tensor, " a"]
    member: Int[Tensor, " g"]  # the anchor of each Gaussian of the first stage; -1: not used
    strength: Strength | None


@torch.no_grad()
def find_anchors(
    model: PartDiscovery,
    position: Float[Tensor, "g 3"],
    weight: Float[Tensor, " g"],
    used: Bool[Tensor, " g"],
    parts: int | None,
    generator: torch.Generator,
) -> Anchors:
    """Parts and anchors of a first stage, from the Gaussians that are ``used``; ``position`` (Å) is where they are in
    the state that the second stage starts from. ``parts`` overrides the rule."""
    rows = used.nonzero()[:, 0]
    feature, place, mass = model.feature[rows], position[rows], weight[rows]
    strength = None
    if parts is None:
        strength = count_clusters(feature, mass, generator)
        parts = strength.count
    label = cluster(feature, mass, parts, generator).label
    region, part = divide(place, mass, label, generator)
    count = len(part)
    size = torch.zeros(count).index_add_(0, region, mass)
    centroid = torch.zeros(count, feature.shape[1]).index_add_(0, region, mass[:, None] * feature) / size[:, None]
    nearest = [
        int(torch.where(region == k, (feature - centroid[k]).square().sum(1), torch.inf).argmin()) for k in range(count)
    ]
    member = torch.full((len(model),), -1)
    member[rows] = region
    return Anchors(centroid, place[nearest], part, member, strength)
