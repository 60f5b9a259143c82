"""Ways through latent space that stay where molecules are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

_ENDS = (0.05, 0.95)  # of the particles along a component, where a traversal begins and ends
_AROUND = 0.15  # of the spread along a component: the particles that tell the other components
_TURNS = 3  # of smoothing


def along(corners: Float[Tensor, "n q"], frames: int) -> Iterator[Float[Tensor, " q"]]:
    """Points at equal steps along straight lines from corner to corner."""
    lengths = torch.linalg.vector_norm(corners.diff(dim=0), dim=1)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    for place in torch.linspace(0, float(ends[-1]), frames, dtype=corners.dtype):
        leg = min(int((ends[1:] < place).sum()), len(lengths) - 1)
        share = (place - ends[leg]) / lengths[leg].clamp(min=1e-12)
        yield corners[leg] + share.clamp(0, 1) * (corners[leg + 1] - corners[leg])


def through_density(
    corners: Float[Tensor, "n q"],
    point: Float[Tensor, "m q"],
    weight: Float[Tensor, " m"],
    precision: Float[Tensor, "q q"],
) -> Float[Tensor, "k q"]:
    """The corners with points of the density between them: the way whose steps, squared, add up to least.

    Lengths are in standard deviations of an average image (``precision``); steps to points of small weight count for
    more. Squares make many short steps cheaper than one long one, so that the way does not cross what is empty.
    """
    root = torch.linalg.cholesky(precision + 1e-9 * torch.eye(len(precision), dtype=precision.dtype))
    nodes = torch.cat([corners, point])
    distance = torch.cdist(nodes @ root, nodes @ root).square()
    cost = torch.cat([torch.ones(len(corners), dtype=weight.dtype), (weight.max() / weight.clamp(min=1e-12)).sqrt()])
    graph = csr_array((distance * (cost[:, None] + cost) / 2).clamp(min=1e-9).numpy())
    _, before = dijkstra(graph, indices=np.arange(len(corners)), return_predecessors=True)
    way = [0]
    for corner in range(1, len(corners)):
        leg = [corner]
        while leg[-1] != corner - 1:
            leg.append(int(before[corner - 1, leg[-1]]))
        way += leg[-2::-1]
    found = nodes[way]
    kept = torch.ones(len(found), dtype=torch.bool)
    kept[1:] = torch.linalg.vector_norm(found.diff(dim=0), dim=1) > 0
    return _smoothed(found[kept], {i for i, node in enumerate(torch.tensor(way)[kept].tolist()) if node < len(corners)})


def _smoothed(way: Float[Tensor, "k q"], fixed: set[int]) -> Float[Tensor, "k q"]:
    """Corners stay, what is between them moves towards its neighbours."""
    own = way.clone()
    for _ in range(_TURNS):
        new = own.clone()
        new[1:-1] = (own[:-2] + 2 * own[1:-1] + own[2:]) / 4
        for number in fixed:
            new[number] = way[number]
        own = new
    return own


def principal(
    latent: Float[Tensor, "v q"], gram: Float[Tensor, "q q"]
) -> tuple[Float[Tensor, "q q"], Float[Tensor, "q q"]]:
    """Principal components of the maps of all views, those that change maps most first, as rows: the first give the
    place of a view along each, the second the direction in which that place and no other changes.

    Latents have much the same variance along any direction, whatever it does to the map; ``gram`` are the inner
    products of its changes along the latents.
    """
    centred = latent - latent.mean(0)
    root = torch.linalg.cholesky(gram + 1e-9 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype))
    vector = torch.linalg.eigh(root.T @ centred.T @ centred @ root).eigenvectors.flip(1)
    place, direction = (root @ vector).T, torch.linalg.solve(root.T, vector).T
    sign = direction.gather(1, direction.abs().argmax(1, keepdim=True)).sign()
    return sign * place, sign * direction


def traversal(
    latent: Float[Tensor, "v q"], component: int, frames: int, gram: Float[Tensor, "q q"]
) -> Float[Tensor, "f q"]:
    """From the 5th to the 95th percentile of the particles along a `principal` component (from 1), each time at the
    mean of the particles that lie about there."""
    centred = latent - latent.mean(0)
    places, directions = principal(latent, gram)
    axis, direction = places[component - 1], directions[component - 1]
    own = centred @ axis
    low, high = torch.quantile(_few(own), torch.tensor(_ENDS, dtype=own.dtype)).tolist()
    found = []
    for place in torch.linspace(low, high, frames, dtype=own.dtype):
        away = (own - place) / (_AROUND * own.std().clamp(min=1e-12))
        likely = torch.softmax(-0.5 * away.square(), 0)
        mean = likely @ centred
        found.append(latent.mean(0) + mean + (place - mean @ axis) * direction)
    return torch.stack(found)


def _few(values: Float[Tensor, " v"]) -> Float[Tensor, " w"]:
    """torch.quantile takes no more than 16 million."""
    return values[:: 1 + len(values) // 10**6]


def main_path(
    states: Float[Tensor, "s q"], weight: Sequence[float], point: Tensor, density: Tensor, precision: Tensor
) -> Float[Tensor, "k q"]:
    """Through the density from the most populated state to the one that is furthest along it."""
    start = max(range(len(states)), key=lambda s: weight[s])
    ways = [
        through_density(states[[start, other]], point, density, precision)
        for other in range(len(states))
        if other != start
    ]
    return max(ways, key=lambda way: float(torch.linalg.vector_norm(way.diff(dim=0), dim=1).sum()))
