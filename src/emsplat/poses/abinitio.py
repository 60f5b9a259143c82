"""A map from images without poses: expectation maximisation over batches, from random poses.

Each step takes a batch, weighs all poses of a random grid by how well they fit (`expect`), and inserts what the images
say into sums that forget (Σ ← memory Σ + new). Nothing but the resolution moves on: from about 7 to 11 cycles per box,
where there are few minima.

What makes starts succeed (docs/log.md): no symmetry in the beginning, whatever the particle has. A point group holds a
map in its own wrong minima, with axes exchanged; without one they melt. Temperatures below 1 (a posterior sharper than
it should be) break the symmetry of the first, nearly spherical map sooner. And steps: what has not settled will.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.maths.fourier import frequencies, irfft, rfft, shell_index
from emsplat.maths.geometry import random_rotations
from emsplat.maths.groups import C1, Symmetry
from emsplat.measures.mask import spherical_mask
from emsplat.poses.grids import half_grid, shift_grid
from emsplat.poses.scores import Expected, MostLikely, Trial, best_few, expect, most_likely
from emsplat.sums.equations import circulant, mean_per_shell
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra
from emsplat.types import Grid

RIDGE = 0.2  # of the mean weight of each shell: what keeps poorly measured coefficients small
_PART = 0.4  # of the resolution: step between shifts
_FIRST = 500  # images at random poses that the first map is made of
_CENTRED = 20  # steps between which the map may drift
_NOISE = 0.1  # how fast the noise spectrum follows the residuals
_LEAST = 0.5  # of the noise around particles: what that of the residuals cannot go below
_WIDTHS, _MORE = 2.5, 2.0  # shifts are looked for within so many standard deviations, and a little (Å)
_EDGE = 2  # voxels of the mask
_FURTHEST = 0.1  # of the box: how far particles may spread from the middle of their images, unless more was given


@dataclass(frozen=True)
class AscentStage:
    """Some steps of one kind. Pairs are the values of the first and the last step."""

    steps: int
    batch: int
    radius: tuple[float, float]  # finest frequency, cycles per box
    temperature: tuple[float, float] = (0.6, 0.6)
    memory: float = 0.8
    turn: tuple[float, float] = (20.0, 20.0)  # between rotations, degrees

    def at(self, step: int) -> tuple[float, float, float]:
        """Radius, temperature and distance of rotations (rad)."""
        part = step / max(self.steps - 1, 1)
        radius, temperature, turn = (a * (b / a) ** part for a, b in (self.radius, self.temperature, self.turn))
        return radius, temperature, math.radians(turn)


@dataclass(frozen=True)
class Status:
    """Where an ascent stands after a step."""

    radius: float
    likelihood: float  # mean of the batch, nats per image
    certainty: float  # median of the largest weight
    spread: float  # standard deviation of shifts, Å


class Ascent:
    """Maps that climb: sums over the images that were seen lately, and what follows from them. Several maps compete for
    the images; ``share`` is what each has of these.

    ``images`` are spectra in the pose that their table gives them, which is not used but for the shift: they are
    looked for about it. ``spread`` is the standard deviation of shifts along an axis, in Å.
    """

    def __init__(
        self,
        images: Spectra,
        radius: int,
        diameter: float,
        seed: int,
        spread: float,
        symmetry: Symmetry = C1,
        maps: Float[Tensor, "c z y x"] | None = None,
        noise: Float[Tensor, " s"] | None = None,
        classes: int = 1,
    ) -> None:
        self.images, self.lattice, self.symmetry, self.spread = images, Lattice(radius), symmetry, spread
        self._given_spread = spread
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.zeros(0, dtype=torch.int64)
        self.shell = torch.linalg.vector_norm(images.frequency, dim=1).round().long()
        self.diameter = diameter
        size = self.lattice.size
        across = diameter / images.length * size  # half-way down the edge
        self.mask = spherical_mask(Grid(size, 1.0), max(across - _EDGE, 1.0), _EDGE)
        self._away = shell_index(size, 3)
        classes = classes if maps is None else len(maps)
        self._numerator = torch.zeros(classes, size, size, size // 2 + 1, dtype=torch.complex64)
        self._weight = torch.zeros(classes, size, size, size // 2 + 1)
        k = len(images.within(radius))
        power = _by_shell(images.values[:, :k].abs().square().mean(0), self.shell[:k])
        self.noise = power.clamp(min=1e-3) if noise is None else noise
        self.maps = torch.zeros(classes, size, size, size) if maps is None else maps
        self.share = torch.full((classes,), 1 / classes)
        self._begun = maps is not None

    @property
    def volume(self) -> Float[Tensor, "z y x"]:
        """The first map."""
        return self.maps[0]

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.images.values)

    def climb(self, stage: AscentStage) -> Iterator[Status]:
        """Takes the steps of a stage."""
        if not self._begun:
            self._begin(stage.radius[0])
        for step in range(stage.steps):
            radius, temperature, turn = stage.at(step)
            rows = self._next(stage.batch)
            trial = self.trial(radius, turn)
            found = expect(self.images, rows, trial, self.noise_at(trial), temperature)
            self._learn(found)
            self._insert(found, trial.rotation, stage.memory)
            self.maps = self._solve(radius)
            if step % _CENTRED == _CENTRED - 1:
                self._centre(radius)
            certainty = float(found.certainty.median())
            yield Status(radius, float(found.likelihood.mean()), certainty, self.spread)

    def trial(self, radius: float, turn: float, generator: torch.Generator | None = None) -> Trial:
        """The poses of a random grid, and the map in them up to a frequency."""
        generator = generator or self._generator
        frequency = self.images.within(radius)
        rotation = half_grid(turn, self.symmetry, generator)
        reach = _WIDTHS * self.spread + _MORE
        shift = shift_grid(_PART * self.images.length / radius, reach, generator)
        nothing = torch.zeros(len(rotation), len(frequency))
        seen = self._views(nothing.to(torch.complex64), nothing, rotation, C1)
        slices = self.lattice.slices(self.maps, seen).transpose(0, 1).flatten(0, 1).contiguous()
        return Trial(rotation, shift, slices, self.spread)

    def noise_at(self, trial: Trial) -> Float[Tensor, " k"]:
        """σ² of the coefficients that a trial looks at."""
        return self.noise[self.shell[: trial.slices.shape[1]]]

    def judge(
        self,
        radius: float,
        turn: float,
        rows: Int[Tensor, " i"],
        noise: Float[Tensor, " s"] | None = None,
        *,
        alike: bool = False,
    ) -> MostLikely:
        """Where images are most likely, and how likely, on a fixed grid (``turn`` in degrees); ``noise`` replaces the
        own spectrum where maps are compared. ``alike``: the map looks the same from everywhere."""
        trial = self.trial(radius, math.radians(turn), torch.Generator().manual_seed(0))
        own = (self.noise if noise is None else noise)[self.shell[: trial.slices.shape[1]]]
        if not alike:
            return most_likely(self.images, rows, trial, own)
        one = replace(trial, rotation=trial.rotation[:1], slices=trial.slices[:1])
        found = most_likely(self.images, rows, one, own)
        return replace(found, likelihood=found.likelihood + math.log(len(trial.rotation)))

    def candidates(
        self, radius: float, turn: float, rows: Int[Tensor, " i"], several: int
    ) -> tuple[Float[Tensor, "i n 3 3"], Float[Tensor, "i n 2"]]:
        """The best few poses of images on the grid of `judge`."""
        trial = self.trial(radius, math.radians(turn), torch.Generator().manual_seed(0))
        return best_few(self.images, rows, trial, self.noise_at(trial), several)

    def _next(self, batch: int) -> Int[Tensor, " b"]:
        """The next images in an order that is drawn anew once all were seen."""
        while len(self._order) < min(batch, self.count):
            self._order = torch.cat([self._order, torch.randperm(self.count, generator=self._generator)])
        rows, self._order = self._order[:batch], self._order[batch:]
        return rows

    def _begin(self, radius: float) -> None:
        rows = self._next(min(_FIRST, self.count))
        k = len(self.images.within(radius))
        noise = self.noise[self.shell[:k]]
        transfer = self.images.transfer[rows, :k]
        # Each map has its own poses of all of them.
        seen = self.images.values[rows, :k] * transfer / noise
        for number in range(len(self.maps)):
            rotation = random_rotations(len(rows), self._generator)
            self._add_to(number, seen, transfer.square() / noise, rotation)
        self.maps = self._solve(radius)
        self._begun = True

    def _learn(self, found: Expected) -> None:
        """Noise, shifts and shares as this batch has them."""
        residual = _by_shell(found.residual, self.shell[: len(found.residual)]).clamp(min=_LEAST)
        count = len(residual)
        self.noise = self.noise.clone()
        self.noise[:count] += _NOISE * (residual - self.noise[:count])
        spread = math.sqrt((1 - _NOISE) * self.spread**2 + _NOISE * found.spread / 2)
        # Shifts are looked for as far as they are found to go: where images are not centred on anything, ever further.
        self.spread = min(spread, max(self._given_spread, _FURTHEST * self.images.length))
        weight = found.weight.reshape(len(self.maps), -1).sum(1)
        self.share = self.share + _NOISE * (weight / weight.sum() - self.share)

    def _insert(self, found: Expected, rotation: Float[Tensor, "r 3 3"], memory: float) -> None:
        self._numerator *= memory
        self._weight *= memory
        self._add(found.numerator, found.weight, rotation)

    def _add(
        self, numerator: Complex[Tensor, "n k"], weight: Float[Tensor, "n k"], rotation: Float[Tensor, "r 3 3"]
    ) -> None:
        """What was found for all rotations of the first map, then of the next."""
        for number, (own, its) in enumerate(
            zip(numerator.chunk(len(self.maps)), weight.chunk(len(self.maps)), strict=True)
        ):
            self._add_to(number, own, its, rotation)

    def _add_to(self, number: int, numerator: Tensor, weight: Tensor, rotation: Tensor) -> None:
        strength = weight.clamp(min=1e-12).sqrt()
        views = self._views(numerator / strength, strength, rotation, self.symmetry)
        one = torch.ones(len(views), 1)
        linear, kernel = self.lattice.insert(one, one, views)
        self._numerator[number] += rfft(linear[0], 3)
        self._weight[number] += circulant(kernel[0], self.lattice.size).clamp(min=0)

    def _views(self, values: Tensor, transfer: Tensor, rotation: Tensor, symmetry: Symmetry) -> Spectra:
        """Slices as images, under each element of a group."""
        images = torch.arange(len(rotation), dtype=torch.int32).repeat_interleave(symmetry.order)
        turned = (rotation[:, None] @ symmetry.elements).flatten(0, 1).float().contiguous()
        return replace(
            self.images,
            values=values,
            transfer=transfer,
            frequency=self.images.frequency[: values.shape[1]],
            image=images,
            rotation=turned,
            share=torch.ones(len(turned)),
            row=torch.arange(len(values)),
        )

    def _solve(self, radius: float) -> Float[Tensor, "c z y x"]:
        maps = []
        for numerator, weight in zip(self._numerator, self._weight, strict=True):
            mean = mean_per_shell(weight)
            added = (RIDGE * mean)[self._away.clamp(max=self.lattice.size // 2)] + 1e-6 * mean.max() + 1e-20
            maps.append(irfft(numerator * (self._away <= radius) / (weight + added), 3) * self.mask)
        return torch.stack(maps)

    def _centre(self, radius: float) -> None:
        """Moves centres of mass to where the axes meet, or onto the axis."""
        free = self.symmetry.elements.mean(0).float()
        for number, volume in enumerate(self.maps):
            self._numerator[number] = moved(self._numerator[number], -(free @ centre_of_mass(volume)))
        self.maps = self._solve(radius)


def chosen(images: Spectra, rows: Int[Tensor, " i"]) -> Spectra:
    """Some of the images."""
    count = len(rows)
    return replace(
        images,
        values=images.values[rows],
        transfer=images.transfer[rows],
        image=torch.arange(count, dtype=torch.int32),
        rotation=images.rotation[rows],
        share=images.share[rows],
        row=images.row[rows],
    )


def centre_of_mass(volume: Float[Tensor, "z y x"]) -> Float[Tensor, "3"]:
    """Of the dense part of a map, (x, y, z) in voxels from the centre."""
    dense = (volume - 0.2 * volume.max()).clamp(min=0)
    axis = torch.arange(len(volume), dtype=volume.dtype) - len(volume) // 2
    total = dense.sum().clamp(min=1e-30)
    return torch.stack([(dense.sum(dims) * axis).sum() / total for dims in ((0, 1), (0, 2), (1, 2))])


def moved(spectrum: Complex[Tensor, "z y k"], by: Float[Tensor, "3"]) -> Complex[Tensor, "z y k"]:
    """The transform of a map that is moved by (x, y, z) voxels."""
    kz, ky, kx = frequencies(Grid(len(spectrum), 1.0), 3)
    angle = -2 * math.pi * (kx * by[0] + ky * by[1] + kz * by[2])
    return spectrum * torch.polar(torch.ones_like(angle), angle)


def _by_shell(values: Float[Tensor, " k"], shell: Int[Tensor, " k"]) -> Float[Tensor, " s"]:
    """Means over shells; shell 0, of which there is nothing, as shell 1."""
    count = int(shell[-1]) + 1
    mean = torch.zeros(count).index_add_(0, shell, values) / torch.bincount(shell, minlength=count).clamp(min=1)
    mean[0] = mean[1]
    return mean
