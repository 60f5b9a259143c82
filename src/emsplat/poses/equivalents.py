"""Whether a particle has the axes that its map seems to have.

At low resolution a trimer with one arm raised looks like a trimer: a climb ends in the mean of the three views of it,
each image in one of three poses that fit alike. There every small asymmetry is outweighed by the two thirds of images
that are turned away from it, so that more steps of the climb do not leave it.

What is unknown then is small: poses are right up to the group, and each image has one element of it. Expectation
maximisation over the elements alone, from random ones, settles within a few steps. Images that were left out tell
whether the map that has broken the symmetry is a better one, or has fitted noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.maths.fourier import irfft, rfft, shell_index
from emsplat.maths.groups import C1, Symmetry
from emsplat.poses.abinitio import RIDGE, Ascent, chosen
from emsplat.poses.axes import GroupFrame, in_frame
from emsplat.poses.local import NO_PRIOR, PoseViews, descend, make_reference
from emsplat.sums.equations import circulant, mean_per_shell
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra
from emsplat.types import Grid, Poses

_TURN, _SEVERAL = 12.0, 6  # degrees between the rotations of a grid, and how many of them go on
_VIEWS = 3000  # images times elements
_FEWEST = 400  # images, however large the group
_LEFT_OUT = 4  # one of so many images
_STEPS = 15
_SETTLED = 2e-3  # part of the likelihood that a step gains, below which it has settled
_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Examined:
    """What images say of a group that a map seems to have."""

    symmetry: Symmetry  # the group, or none
    volume: Float[Tensor, "z y x"]  # the map to go on from, in the frame of the group
    loss: float  # nats per image left out: what the best map without the group has beyond that with it
    loss_error: float


def examine(ascent: Ascent, frame: GroupFrame, coarse: float, radius: int, seed: int) -> Examined:
    """Whether the first map of an ascent has a group: maps with it, as it is, and with its symmetry broken, on images
    that were left out of all three. Poses are looked for up to ``coarse`` cycles per box, and compared up to
    ``radius``."""
    generator = torch.Generator().manual_seed(seed)
    count = min(ascent.count, max(_FEWEST, _VIEWS // frame.symmetry.order))
    rows = torch.randperm(ascent.count, generator=generator)[:count]
    tested = torch.arange(count) % _LEFT_OUT == 0
    symmetric = find_poses(ascent, in_frame(ascent.volume, frame), rows, frame.symmetry, coarse, radius)
    plain = find_poses(ascent, in_frame(ascent.volume, replace(frame, symmetry=C1)), rows, C1, coarse, radius)
    views = _Elements.of(ascent, rows, symmetric, frame.symmetry, radius)
    with_it = views.seen(views.solved(views.equal(tested)))
    found = [views.settled(views.random(tested, generator), tested)]
    own = _Elements.of(ascent, rows, plain, frame.symmetry, radius)
    found.append(own.settled(own.first(tested), tested))
    without, volume = max(found, key=lambda one: float(one[0][tested].mean()))
    difference = (without - with_it)[tested]
    loss, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    if loss > 3 * error:
        return Examined(C1, volume, loss, error)
    return Examined(frame.symmetry, in_frame(ascent.volume, frame), loss, error)


def remade(ascent: Ascent, coarse: float, radius: int) -> Float[Tensor, "z y x"]:
    """The first map of an ascent made anew from all its images, each in its most likely pose, with its symmetry."""
    rows, symmetry = torch.arange(ascent.count), ascent.symmetry
    poses = find_poses(ascent, ascent.volume, rows, symmetry, coarse, radius)
    views = _Elements.of(ascent, rows, poses, symmetry, radius)
    return views.solved(views.equal(torch.zeros(len(rows), dtype=torch.bool)))


def find_poses(
    ascent: Ascent,
    volume: Float[Tensor, "z y x"],
    rows: Int[Tensor, " i"],
    symmetry: Symmetry,
    coarse: float,
    radius: int,
) -> Poses:
    """Images of an ascent against another map: from the best few of a grid at ``coarse`` cycles per box to the nearest
    minimum of each at ``radius``, and the best of these."""
    images, size = ascent.images, len(volume)
    own = chosen(images, rows)
    args = (images, radius, ascent.diameter, 0, ascent.spread, symmetry)
    rotation, shift = Ascent(*args, volume[None], ascent.noise).candidates(coarse, _TURN, rows, _SEVERAL)
    rotation, shift = rotation.flatten(0, 1).double(), shift.flatten(0, 1).double()
    reference = make_reference(volume, Grid(size, images.length / size), radius)
    sigma = ascent.noise[ascent.shell].sqrt()
    views = PoseViews(
        replace(own, values=own.values / sigma, transfer=own.transfer / sigma),
        torch.eye(2).repeat(len(rows), 1, 1),
        torch.arange(len(rows), dtype=torch.int32).repeat_interleave(_SEVERAL),
        rotation,
        shift,
        rotation,
        shift,
        images.length,
    )
    found = descend(reference, views, NO_PRIOR, radius)
    best = found.after.reshape(len(rows), _SEVERAL).argmax(1)
    return found.poses[_SEVERAL * torch.arange(len(rows)) + best]


@dataclass(frozen=True)
class _Elements:
    """Images in poses that are right up to a group, seen under each of its elements."""

    spectra: Spectra  # views: elements of the first image, then of the next
    moved: Complex[Tensor, "i k"]  # X, shifted to the centre
    precision: Float[Tensor, "i k"]  # C²/σ²
    lattice: Lattice
    mask: Float[Tensor, "z y x"]
    order: int

    @classmethod
    def of(cls, ascent: Ascent, rows: Int[Tensor, " i"], poses: Poses, symmetry: Symmetry, radius: int) -> _Elements:
        images = ascent.images
        frequency = images.within(radius)
        k, noise = len(frequency), ascent.noise[ascent.shell[: len(frequency)]]
        angle = -2 * math.pi / images.length * poses.shift.float() @ frequency.T
        transfer = images.transfer[rows, :k]
        moved = images.values[rows, :k] * torch.polar(torch.ones_like(angle), angle) * transfer / noise
        precision = transfer.square() / noise
        strength = precision.clamp(min=1e-12).sqrt()
        rotation = (poses.rotation[:, None] @ symmetry.elements).flatten(0, 1).float().contiguous()
        spectra = replace(
            images,
            values=moved / strength,
            transfer=strength,
            frequency=images.frequency[:k],
            image=torch.arange(len(rows), dtype=torch.int32).repeat_interleave(symmetry.order),
            rotation=rotation,
            share=torch.ones(len(rotation)),
            row=torch.arange(len(rows)),
        )
        return cls(spectra, moved, precision, ascent.lattice, ascent.mask, symmetry.order)

    def equal(self, left_out: Tensor) -> Float[Tensor, "i e"]:
        """Weights of the elements that make the map symmetric."""
        return torch.full((len(self.moved), self.order), 1 / self.order) * ~left_out[:, None]

    def random(self, left_out: Tensor, generator: torch.Generator) -> Float[Tensor, "i e"]:
        """One element for each image."""
        chosen = torch.randint(0, self.order, (len(self.moved),), generator=generator)
        return torch.nn.functional.one_hot(chosen, self.order).float() * ~left_out[:, None]

    def first(self, left_out: Tensor) -> Float[Tensor, "i e"]:
        """The pose of each image as it is."""
        return torch.eye(self.order)[0].repeat(len(self.moved), 1) * ~left_out[:, None]

    def solved(self, weight: Float[Tensor, "i e"]) -> Float[Tensor, "z y x"]:
        """The map of images in their weighted poses."""
        own, size = weight.reshape(-1, 1).contiguous(), self.lattice.size
        linear, kernel = self.lattice.insert(own, own, self.spectra)
        power = circulant(kernel[0], size).clamp(min=0)
        away, mean = shell_index(size, 3), mean_per_shell(power)
        added = (RIDGE * mean)[away.clamp(max=size // 2)] + 1e-6 * mean.max() + 1e-20
        return irfft(rfft(linear[0], 3) * (away <= self.lattice.radius) / (power + added), 3) * self.mask

    def scores(self, volume: Float[Tensor, "z y x"]) -> Float[Tensor, "i e"]:
        """Log-likelihood of each image under each element, over that of no particle."""
        slices = self.lattice.slices(volume[None], self.spectra)[:, 0].reshape(len(self.moved), self.order, -1)
        across = 2 * torch.einsum("ik,iek->ie", self.moved.conj(), slices).real
        return across - torch.einsum("ik,iek->ie", self.precision, slices.abs().square())

    def seen(self, volume: Float[Tensor, "z y x"]) -> Float[Tensor, " i"]:
        """Log-likelihood of each image, every element being as likely before."""
        return torch.logsumexp(self.scores(volume), 1) - math.log(self.order)

    def settled(
        self, weight: Float[Tensor, "i e"], left_out: Tensor
    ) -> tuple[Float[Tensor, " i"], Float[Tensor, "z y x"]]:
        """Log-likelihood and map once elements change no more; images left out have no part in it."""
        last = -math.inf
        for _ in range(_STEPS):
            volume = self.solved(weight)
            scores = self.scores(volume)
            seen = torch.logsumexp(scores, 1) - math.log(self.order)
            now = float(seen[~left_out].mean())
            if now - last < _SETTLED * abs(now):
                break
            last = now
            weight = (scores / _TEMPERATURE).softmax(1) * ~left_out[:, None]
        return seen, volume
