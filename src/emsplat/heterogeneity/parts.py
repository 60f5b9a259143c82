"""Parts of a molecule: clusters of the Gaussians' features, their number, and regions of space within them.

How many clusters there are is decided by the gap statistic (Tibshirani, Walther & Hastie 2001), which can say one:
k-means++ for 1, 2, … clusters is held against the same on points without clusters, drawn uniformly from the box of
the principal axes. The number is the smallest k with gap(k) ≥ gap(k+1) - s(k+1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.models.cryospire import PartDiscovery

MOST = 16
_REFERENCES = 10
_RESTARTS, _STEPS = 4, 50
_ENOUGH = 1000  # points that the number of clusters is judged by
_REACH = 0.5  # of the root mean square radius of all: regions are no larger


@dataclass(frozen=True)
class Clusters:
    """Points by cluster."""

    label: Int[Tensor, " g"]
    centroid: Float[Tensor, "k d"]
    error: float  # sum of squared distances to the centroids

    def __len__(self) -> int:
        return len(self.centroid)


def cluster(points: Float[Tensor, "g d"], count: int, generator: torch.Generator) -> Clusters:
    """k-means++ (Arthur & Vassilvitskii 2007), the best of four. There are fewer clusters where fewer points differ."""
    tries = (_cluster(points, count, generator) for _ in range(_RESTARTS if count > 1 else 1))
    return min(tries, key=lambda one: one.error)


def _cluster(points: Float[Tensor, "g d"], count: int, generator: torch.Generator) -> Clusters:
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count and float(distance.max()) > 0:
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    centroid = points[chosen].clone()
    label = torch.cdist(points, centroid).argmin(1)
    for _ in range(_STEPS):
        size = torch.bincount(label, minlength=len(centroid))
        total = torch.zeros_like(centroid).index_add_(0, label, points)
        centroid = torch.where(size[:, None] > 0, total / size.clamp(min=1)[:, None], centroid)
        before, label = label, torch.cdist(points, centroid).argmin(1)
        if torch.equal(label, before):
            break
    return Clusters(label, centroid, float((points - centroid[label]).square().sum()))


@dataclass(frozen=True)
class Gap:
    """The gap statistic for 1, 2, … clusters, its standard error, and the number that follows."""

    gap: tuple[float, ...]
    error: tuple[float, ...]
    count: int


def count_clusters(points: Float[Tensor, "g d"], generator: torch.Generator, most: int = MOST) -> Gap:
    """How many clusters there are, up to ``most``, by the rule of this module."""
    points = points[torch.randperm(len(points), generator=generator)[:_ENOUGH]]
    most = min(most, len(points))
    centred = points - points.mean(0)
    # Directions without spread hold no clusters, and their box no volume.
    _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
    along = centred @ axes[spread > 1e-6 * spread[:1]].T
    if not along.shape[1]:
        return Gap((0.0,), (0.0,), 1)
    low, high = along.min(0).values, along.max(0).values
    drawn = torch.rand(_REFERENCES, *along.shape, generator=generator, dtype=along.dtype)
    references = low + drawn * (high - low)
    gaps: list[float] = []
    errors: list[float] = []
    for count in range(1, most + 1):
        expected = torch.tensor([_log_error(one, count, generator) for one in references], dtype=torch.float64)
        gaps.append(float(expected.mean()) - _log_error(along, count, generator))
        errors.append(float(expected.std(correction=0)) * math.sqrt(1 + 1 / _REFERENCES))
        if count > 1 and gaps[-2] >= gaps[-1] - errors[-1]:
            return Gap(tuple(gaps), tuple(errors), count - 1)
    return Gap(tuple(gaps), tuple(errors), most)


def _log_error(points: Tensor, count: int, generator: torch.Generator) -> float:
    return math.log(max(cluster(points, count, generator).error, 1e-30))


def divide(
    position: Float[Tensor, "g 3"], label: Int[Tensor, " g"], generator: torch.Generator
) -> tuple[Int[Tensor, " g"], Int[Tensor, " a"]]:
    """Each cluster into the fewest regions of space whose root mean square radius is at most half that of all.

    Returns the region of each Gaussian, and the cluster of each region.
    """
    reach = _REACH * _radius(position)
    region, owner = torch.zeros_like(label), list[int]()
    for number in torch.unique(label).tolist():
        here = (label == number).nonzero()[:, 0]
        for count in range(1, len(here) + 1):
            found = cluster(position[here], count, generator)
            if len(found) < count or max(_radius(position[here][found.label == k]) for k in range(len(found))) <= reach:
                break
        kept, own = torch.unique(found.label, return_inverse=True)
        region[here] = len(owner) + own
        owner += [number] * len(kept)
    return region, torch.tensor(owner)


def _radius(position: Float[Tensor, "g 3"]) -> float:
    """Root mean square distance from the centroid."""
    return float((position - position.mean(0)).square().sum(1).mean().sqrt())


@dataclass(frozen=True)
class Anchors:
    """Where the rigid motions of the second stage hang (supplement D).

    ``feature`` is the centroid of a region's features, ``position`` (Å) that of the region's Gaussian whose feature
    is the closest to it. ``part`` is the cluster of features, of which ``gap`` tells the number, unless it was given.
    """

    feature: Float[Tensor, "a f"]
    position: Float[Tensor, "a 3"]
    part: Int[Tensor, " a"]
    member: Int[Tensor, " g"]  # the anchor of each Gaussian of the first stage; -1: not used
    gap: Gap | None


@torch.no_grad()
def find_anchors(
    model: PartDiscovery,
    position: Float[Tensor, "g 3"],
    used: Tensor,
    parts: int | None,
    generator: torch.Generator,
) -> Anchors:
    """Parts and anchors of a first stage, from the Gaussians that are ``used``; ``position`` (Å) is where they are in
    the state that the second stage starts from. ``parts`` overrides the rule."""
    rows = used.nonzero()[:, 0]
    feature, place = model.feature[rows].cpu(), position[rows].cpu()
    gap = count_clusters(feature, generator) if parts is None else None
    label = cluster(feature, gap.count if gap else parts or 1, generator).label
    region, part = divide(place, label, generator)
    count = len(part)
    size = torch.bincount(region, minlength=count)
    centroid = torch.zeros(count, feature.shape[1]).index_add_(0, region, feature) / size[:, None]
    nearest = [
        int(torch.where(region == k, (feature - centroid[k]).square().sum(1), torch.inf).argmin()) for k in range(count)
    ]
    member = torch.full((len(model),), -1)
    member[rows.cpu()] = region
    return Anchors(centroid, place[nearest], part, member, gap)
