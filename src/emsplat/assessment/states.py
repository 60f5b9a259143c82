"""Reconstructed states against the true ones of simulated particles (`measures.states` defines the scores)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.errors import InputError
from emsplat.measures.states import (
    adjusted_rand_index,
    auc,
    circular,
    common_mask,
    masked_spectrum,
    moving_mask,
    nearest_rows,
    neighbourhood_similarity,
)
from emsplat.simulation.truth import Truth
from emsplat.types import Grid

Map = Float[Tensor, "z y x"]
MapsAt = Callable[[Float[Tensor, "m d"]], Iterable[Map]]  # the maps at some latents, one after the other


@dataclass(frozen=True)
class Score:
    """A map against a true state: areas under the FSC in the mask of all states and where the state moves (None where
    it does not)."""

    auc: float
    moving: float | None


@dataclass(frozen=True)
class StateScore:
    """A state: the map that was reconstructed for it, and what a map that knows of no states scores."""

    state: int  # from 0
    particles: int
    found: Score
    consensus: Score | None  # of the same run
    mean: Score  # of the true states, without noise


@dataclass(frozen=True)
class Scores:
    """What `score` finds; None where it was not asked for or is not known."""

    states: tuple[StateScore, ...]
    images: tuple[tuple[Score, Score | None], ...] | None  # of particles evenly spread: found, consensus
    neighbours: tuple[float, float] | None  # share of neighbours that are true ones, and by chance
    k: int
    rand_index: float | None


class _Judge:
    """Scores maps against true states with the masks of these."""

    def __init__(self, truth: Truth, grid: Grid, mask: Map | None) -> None:
        self.truth, self.grid = truth, grid
        highest, self.mean = torch.full((grid.size,) * 3, -torch.inf), torch.zeros((grid.size,) * 3)
        for state, share in enumerate(truth.population.tolist()):
            volume, _ = truth.read(state, grid)
            highest, self.mean = torch.maximum(highest, volume), self.mean + share * volume
        self.mask = common_mask(highest, grid.pixel_size) if mask is None else mask

    def judge(self, state: int, maps: Sequence[Map | None]) -> list[Score | None]:
        """Each map against a state."""
        true, _ = self.truth.read(state, self.grid)
        moving = moving_mask(true - self.mean, self.grid.pixel_size)
        masks = [self.mask, *([] if moving is None else [moving])]
        spectra = [masked_spectrum(true, mask) for mask in masks]

        def areas(volume: Map) -> Score:
            if volume.shape != true.shape:
                raise InputError(
                    f"states: a map of {len(volume)} voxels per axis against true maps of {len(true)}; expected the "
                    "same box"
                )
            pairs = zip(masks, spectra, strict=True)
            found = [auc(masked_spectrum(volume, mask), spectrum) for mask, spectrum in pairs]
            return Score(found[0], found[1] if len(found) > 1 else None)

        return [None if volume is None else areas(volume) for volume in maps]


def score(
    truth: Truth,
    grid: Grid,
    latents: Float[Tensor, "p d"] | None,
    *,
    rows: Int[Tensor, " p"] | None = None,
    classes: Int[Tensor, " p"] | None = None,
    map_at: MapsAt | None = None,
    state_maps: Iterable[Map] | None = None,
    consensus: Map | None = None,
    mask: Map | None = None,
    images: int = 100,
) -> Scores:
    """CryoBench's scores: per conformation, per image, neighbourhoods, adjusted Rand index; each area also where the
    state moves, and beside those of the consensus.

    ``latents`` are of the particles ``rows`` (from 0; all without it) of the truth, on whose ``grid`` all maps are.
    ``map_at`` gives maps at latents: a state is scored by that at the particle whose latent is nearest to the mean
    latent of the state, and ``images`` particles evenly spread each by their own. ``state_maps`` are one map for each
    state, in order, and take the place of the former.

    Raises:
        InputError: neither kind of maps, or too few of them; maps of another box; a state without particles.
    """
    state = truth.state if rows is None else truth.state[rows]
    judge = _Judge(truth, grid, mask)
    count = torch.bincount(state, minlength=len(truth)).tolist()
    if state_maps is None:
        if map_at is None or latents is None:
            raise InputError("states: no maps to score; expected one for each state, or latents and maps at these")
        state_maps = map_at(latents[nearest_rows(latents, state, len(truth))])
    states = []
    for i, volume in enumerate(state_maps):
        found, base, mean = judge.judge(i, [volume, consensus, judge.mean])
        if found is not None and mean is not None:
            states.append(StateScore(i, count[i], found, base, mean))
        if len(states) == len(truth):
            break
    if len(states) < len(truth):
        raise InputError(f"states: {len(states)} maps for {len(truth)} states; expected one for each")
    alone = None
    if map_at is not None and latents is not None:
        chosen = torch.linspace(0, len(latents) - 1, min(images, len(latents))).long()
        alone = []
        for own, volume in zip(state[chosen].tolist(), map_at(latents[chosen]), strict=True):
            found, base = judge.judge(own, [volume, consensus])
            if found is not None:
                alone.append((found, base))
    neighbours, k = None, 0
    if latents is not None:
        coordinates, k = true_coordinates(truth)
        coordinates = coordinates if rows is None else coordinates[rows]
        k = max(1, min(k, len(latents) // 20))
        neighbours = neighbourhood_similarity(latents, coordinates, k)
    rand = None if classes is None else adjusted_rand_index(classes, state)
    return Scores(tuple(states), None if alone is None else tuple(alone), neighbours, k, rand)


def true_coordinates(truth: Truth) -> tuple[Float[Tensor, "p c"], int]:
    """Where particles stand in truth, float64, and how many neighbours can be told apart there: n / 20, but no more
    than are in the smallest state where states have no order.

    Angles (degrees) lie on a circle of radius 1, other numbers between 0 and 1; of missing blocks each is 0 or 1. Where
    there is nothing of that kind, each state is as far from every other.
    """
    parts, n = [], len(truth.state)
    for name, values in truth.columns.items():
        numbers = _numbers(values)
        if name == "missing":
            blocks = sorted({block for value in set(values) for block in value.split("+") if block != "none"})
            present = [[block in value.split("+") for block in blocks] for value in values]
            parts.append(torch.tensor(present, dtype=torch.float64).reshape(n, len(blocks)))
        elif numbers is not None and name == "angle":
            parts.append(circular(numbers))
        elif numbers is not None:
            low, high = numbers.aminmax()
            parts.append(((numbers - low) / (high - low).clamp(min=1e-30))[:, None])
    if parts:
        return torch.cat(parts, dim=1), max(1, n // 20)
    every = torch.nn.functional.one_hot(truth.state, len(truth)).double()
    smallest = int(torch.bincount(truth.state, minlength=len(truth)).min())
    return every, max(1, min(n // 20, smallest))


def _numbers(values: Sequence[str]) -> Float[Tensor, " p"] | None:
    try:
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
    except ValueError:
        return None
    return numbers if bool(torch.isfinite(numbers).all()) else None
