"""How well images fit a map in many poses at once, and what they say of the map: the two halves of a step of
expectation maximisation, as matrix products.

In units of the noise an image is y = C P(A) e^{2πi k·s} + n, E|n|² = σ² on each coefficient of half a plane, with P(A)
the slice of the map, C the contrast transfer function and s the origin. With X(s) = y e^{-2πi k·s} C / σ²

    log p(y | A, s) - log p(y | nothing) = 2 Re Σ X̄(s) P(A) - Σ C²/σ² |P(A)|².

The first sum is a product of two real matrices, (images · shifts) × 2k and 2k × rotations; the second needs one number
per image and rotation. A slice turned by π in its plane is the complex conjugate, so that the products of real and of
imaginary parts, added and subtracted, give two poses. The posterior w ∝ p^{1/T} over all poses gives Σ w X and
Σ w C²/σ² of each rotation by products with the transposed matrices: however many images there are, only the rotations
are inserted into the map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.poses.grids import HALF_TURN
from emsplat.sums.spectra import Spectra

_SCORES = 2_000_000  # at once: little more than the caches hold
_LEAST = math.log(1e-3)  # weights below this part of the largest count as none where few are above it
_FEW = 0.004


@dataclass(frozen=True)
class Trial:
    """The poses that are tried, and the slices of maps in them. Each rotation stands for `HALF_TURN` of it too."""

    rotation: Float[Tensor, "r 3 3"]
    shift: Float[Tensor, "s 2"]  # Å
    slices: Complex[Tensor, "n k"]  # of the first map in all rotations, then of the next
    spread: float  # standard deviation of shifts along each axis before any image is seen, Å

    @property
    def prior(self) -> Float[Tensor, " s"]:
        """Logarithm of the prior of each shift."""
        return -self.shift.square().sum(1) / (2 * self.spread**2)

    def poses(self, place: Int[Tensor, "i 3"]) -> tuple[Float[Tensor, "i 3 3"], Float[Tensor, "i 2"]]:
        """Rotation and shift at (half turns, shift, slice)."""
        turned = (place[:, 0] == 1)[:, None, None]
        rotation = self.rotation[place[:, 2] % len(self.rotation)]
        return torch.where(turned, HALF_TURN @ rotation, rotation), self.shift[place[:, 1]]


@dataclass(frozen=True)
class Expected:
    """What images say under their posterior of poses."""

    numerator: Complex[Tensor, "n k"]  # Σ w X of each slice, those turned by π brought back
    weight: Float[Tensor, "n k"]  # Σ w C²/σ²
    residual: Float[Tensor, " k"]  # mean |y - C P e|²
    likelihood: Float[Tensor, " i"]  # T log Σ p^{1/T} over the grid, nats
    certainty: Float[Tensor, " i"]  # the largest weight
    spread: float  # mean |s|², Å²


@dataclass(frozen=True)
class MostLikely:
    """The best pose of each image among those tried."""

    rotation: Float[Tensor, "i 3 3"]  # float64
    shift: Float[Tensor, "i 2"]
    kind: Int[Tensor, " i"]  # which map
    likelihood: Float[Tensor, " i"]  # log Σ p over the grid: of the maps, whatever the pose
    best: Float[Tensor, " i"]  # log p at that pose


def expect(
    images: Spectra, rows: Int[Tensor, " i"], trial: Trial, noise: Float[Tensor, " k"], temperature: float = 1.0
) -> Expected:
    """The posterior over all poses of the trial, and what it gives for the map; ``noise`` is σ²."""
    k, rotations, shifts = len(noise), len(trial.slices), len(trial.shift)
    real, imaginary = torch.zeros(rotations, k), torch.zeros(rotations, k)
    weight, power = torch.zeros(rotations, k), torch.zeros(k)
    likelihood, certainty, spread = [], [], 0.0
    squared = trial.shift.square().sum(1)
    for part in _scored(images, rows, trial, noise, temperature):
        scores = part.scores.flatten(1)
        largest = scores.amax(1)
        scores -= largest[:, None]
        above = scores > _LEAST
        place = above.nonzero()
        if len(place) < _FEW * scores.numel():
            image, entry = place.T
            own = scores[above].exp_()
            total = torch.zeros(len(scores)).index_add_(0, image, own)
            own /= total[image]
            turned, shift, rotation = _unravel(entry, shifts, rotations)
            row = image * shifts + shift
            real.index_add_(0, rotation, part.real[row] * own[:, None])
            imaginary.index_add_(0, rotation, part.imaginary[row] * (own * (1 - 2 * turned))[:, None])
            weight.index_add_(0, rotation, part.precision[image] * own[:, None])
            spread += float(own @ squared[shift])
        else:
            scores.exp_()
            total = scores.sum(1)
            scores /= total[:, None]
            straight, turned = part.scores.unbind(1)
            together, apart = straight + turned, straight - turned
            real += together.flatten(0, 1).T @ part.real
            imaginary += apart.flatten(0, 1).T @ part.imaginary
            weight += together.sum(1).T @ part.precision
            spread += float((together.sum(2) @ squared).sum())
        power += images.values[part.rows, :k].abs().square().sum(0)
        likelihood.append(temperature * (largest + total.log()))
        certainty.append(1 / total)
    numerator = torch.complex(real, imaginary)
    seen = 2 * (numerator.conj() * trial.slices).real - weight * trial.slices.abs().square()
    residual = (power - noise * seen.sum(0)) / len(rows)
    return Expected(numerator, weight, residual, torch.cat(likelihood), torch.cat(certainty), spread / len(rows))


def most_likely(images: Spectra, rows: Int[Tensor, " i"], trial: Trial, noise: Float[Tensor, " k"]) -> MostLikely:
    """The pose of the trial that fits each image best, against the map that fits it best."""
    places, likelihood, best = [], [], []
    for part in _scored(images, rows, trial, noise, 1.0):
        scores = part.scores.flatten(1)
        largest, entry = scores.max(1)
        places.append(torch.stack(_unravel(entry, len(trial.shift), len(trial.slices)), 1))
        best.append(largest)
        likelihood.append(torch.logsumexp(scores, 1))
    place = torch.cat(places)
    rotation, shift = trial.poses(place)
    return MostLikely(rotation, shift, place[:, 2] // len(trial.rotation), torch.cat(likelihood), torch.cat(best))


def best_few(
    images: Spectra, rows: Int[Tensor, " i"], trial: Trial, noise: Float[Tensor, " k"], several: int
) -> tuple[Float[Tensor, "i n 3 3"], Float[Tensor, "i n 2"]]:
    """The poses of the trial that fit each image best, of any map."""
    places = []
    for part in _scored(images, rows, trial, noise, 1.0):
        entry = part.scores.flatten(1).topk(several, 1).indices
        places.append(torch.stack(_unravel(entry, len(trial.shift), len(trial.slices)), 2))
    rotation, shift = trial.poses(torch.cat(places).flatten(0, 1))
    return rotation.reshape(len(rows), several, 3, 3), shift.reshape(len(rows), several, 2)


@dataclass(frozen=True)
class _Scored:
    rows: Int[Tensor, " b"]
    scores: Float[Tensor, "b 2 s r"]  # log p / T, without and with half a turn
    real: Float[Tensor, "bs k"]  # of X
    imaginary: Float[Tensor, "bs k"]
    precision: Float[Tensor, "b k"]  # C²/σ²


def _scored(
    images: Spectra, rows: Int[Tensor, " i"], trial: Trial, noise: Float[Tensor, " k"], temperature: float
) -> Iterator[_Scored]:
    k, rotations, shifts = len(noise), len(trial.slices), len(trial.shift)
    angle = -2 * math.pi / images.length * trial.shift @ images.frequency[:k].T
    phase = torch.polar(torch.ones_like(angle), angle)
    # Half the prior is a further coefficient of the images, which every slice has as 1.
    one, prior = torch.ones(1, rotations), 0.5 * trial.prior[:, None]
    of_real = torch.cat([trial.slices.real.T, one]).mul_(2 / temperature)
    of_imaginary = (2 / temperature) * trial.slices.imag.T
    power = trial.slices.abs().square().T / temperature
    for own in torch.split(rows, max(1, _SCORES // (2 * rotations * shifts))):
        transfer = images.transfer[own, :k]
        moved = ((images.values[own, :k] * transfer / noise)[:, None] * phase).flatten(0, 1)
        real, imaginary = moved.real.contiguous(), moved.imag.contiguous()
        precision = transfer.square() / noise
        even = torch.cat([real, prior.repeat(len(own), 1)], 1) @ of_real
        odd = (imaginary @ of_imaginary).reshape(len(own), shifts, rotations)
        even = even.reshape(len(own), shifts, rotations).sub_((precision @ power)[:, None])
        scores = torch.empty(len(own), 2, shifts, rotations)
        torch.add(even, odd, out=scores[:, 0])
        torch.sub(even, odd, out=scores[:, 1])
        yield _Scored(own, scores, real, imaginary, precision)


def _unravel(entry: Int[Tensor, "*e"], shifts: int, rotations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half turns, shift and rotation of entries of an image's scores."""
    return entry // (shifts * rotations), entry // rotations % shifts, entry % rotations


def expect_slowly(
    images: Spectra, rows: Int[Tensor, " i"], trial: Trial, noise: Float[Tensor, " k"], temperature: float = 1.0
) -> Expected:
    """What `expect` is: pose by pose, in float64."""
    k = len(noise)
    slices = trial.slices.to(torch.complex128)
    numerator, weight = torch.zeros_like(slices), torch.zeros(slices.shape, dtype=torch.float64)
    residual, likelihood, certainty, spread = torch.zeros(k, dtype=torch.float64), [], [], 0.0
    frequency, sigma = images.frequency[:k].double(), noise.double()
    for row in rows.tolist():
        value, transfer = images.values[row, :k].to(torch.complex128), images.transfer[row, :k].double()
        found = []
        for number, plain in enumerate(slices):
            for turned in (False, True):
                for shift, prior in zip(trial.shift.double(), trial.prior.double(), strict=True):
                    moved = torch.polar(torch.ones(k).double(), 2 * math.pi / images.length * frequency @ shift)
                    model = transfer * (plain.conj() if turned else plain) * moved
                    gain = ((value.abs() ** 2 - (value - model).abs() ** 2) / sigma).sum() + prior
                    found.append((float(gain) / temperature, number, turned, shift, moved, model))
        score = torch.tensor([own[0] for own in found], dtype=torch.float64)
        likelihood.append(temperature * torch.logsumexp(score, 0))
        for own, (_, number, turned, shift, moved, model) in zip(score.softmax(0), found, strict=True):
            seen = value * moved.conj() * transfer / sigma
            numerator[number] += own * (seen.conj() if turned else seen)
            weight[number] += own * transfer**2 / sigma
            residual += own * (value - model).abs() ** 2 / len(rows)
            spread += float(own * shift.square().sum()) / len(rows)
        certainty.append(score.softmax(0).max())
    return Expected(numerator, weight, residual, torch.stack(likelihood), torch.stack(certainty), spread)
