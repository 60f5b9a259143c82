"""Whether a map was found: what runs that share nothing have in common.

Two maps that were started apart and climbed on disjoint halves of the particles can agree only on what the images show.
Poses of the same images against either map are aligned (turn and hand are free), and so are the maps. Wrong minima and
noise leave next to nothing in common (docs/log.md has the runs that the bounds were set on).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.maths.fourier import hermitian_weight, rfft, shell_index, sum_by_shell
from emsplat.maths.groups import Symmetry
from emsplat.poses.axes import turned

Word = Literal["found", "uncertain", "not found"]

NEAR = math.radians(15)  # poses of coarse grids that agree
FOUND, FAILED = 0.5, 0.2  # share of poses that agree, from which on a map was found, below which it was not
CORRELATED = 0.5  # FSC of the aligned maps up to which they agree
_SHELLS = 6  # that they have to agree to, in shells of the box, beyond an outline
_CANDIDATES = 80
_ROUNDS = 8
_MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


@dataclass(frozen=True)
class Alignment:
    """How a second set of poses of the same images follows from a first: A₂ = [F] A₁ g Q [F], g of the group."""

    rotation: Float[Tensor, "3 3"]  # Q
    mirrored: bool  # whether the second has the other hand
    agreement: float  # share of images whose poses then agree (`NEAR`)
    median: float  # rad, between the poses


def mirrored(rotation: Float[Tensor, "*p 3 3"]) -> Float[Tensor, "*p 3 3"]:
    """The poses of the same images against the mirror image of a map, z turned round."""
    return _MIRROR @ rotation @ _MIRROR


def angle_between(one: Float[Tensor, "*p 3 3"], other: Float[Tensor, "*p 3 3"]) -> Float[Tensor, "*p"]:
    """The angle of the turn from one rotation to another, rad."""
    return (((one * other).sum((-1, -2)) - 1) / 2).clamp(-1, 1).arccos()


def align_poses(first: Float[Tensor, "p 3 3"], second: Float[Tensor, "p 3 3"], symmetry: Symmetry) -> Alignment:
    """The turn, and the hand, under which most poses of two sets agree modulo a point group.

    Each of some images proposes the turn between its two poses; the best is refined on those that agree with it.
    """
    found = [_aligned(first, mirrored(second) if hand else second, symmetry, hand) for hand in (False, True)]
    return max(found, key=lambda own: own.agreement)


def _aligned(first: Tensor, second: Tensor, symmetry: Symmetry, hand: bool) -> Alignment:
    group = symmetry.elements
    proposed = first[:_CANDIDATES].mT @ second[:_CANDIDATES]
    copies = first[:, None] @ group
    agreed = torch.stack([(angle_between(copies @ own, second[:, None]).amin(1) < NEAR).sum() for own in proposed])
    rotation = proposed[int(agreed.argmax())]
    for _ in range(_ROUNDS):
        angle, element = angle_between(copies @ rotation, second[:, None]).min(1)
        near = angle < NEAR
        own = copies[torch.arange(len(copies)), element]
        u, _, v = torch.linalg.svd((own.mT @ second)[near].sum(0))
        sign = torch.diag(torch.stack([u.new_ones(()), u.new_ones(()), torch.det(u @ v).sign()]))
        rotation = u @ sign @ v
    angle = angle_between(copies @ rotation, second[:, None]).amin(1)
    return Alignment(rotation, hand, float((angle < NEAR).double().mean()), float(angle.median()))


def align_shifts(
    rotation: Float[Tensor, "p 3 3"], first: Float[Tensor, "p 2"], second: Float[Tensor, "p 2"]
) -> Float[Tensor, "3"]:
    """Where the centre of the second map lies in the first, in the unit of the shifts: s₂ = s₁ - (A₁ c)₁₂. The median
    residual decides which images count."""
    design, value = rotation[:, :2].double(), (first - second).double()
    weight = torch.ones(len(design), dtype=torch.float64)
    centre = torch.zeros(3, dtype=torch.float64)
    for _ in range(_ROUNDS):
        scaled = design * weight[:, None, None]
        centre = torch.linalg.lstsq(scaled.flatten(0, 1), (value * weight[:, None]).flatten()[:, None]).solution[:, 0]
        miss = torch.linalg.vector_norm(value - design @ centre, dim=1)
        weight = (miss <= 2 * miss.median()).double()
    return centre


def brought_over(
    volume: Float[Tensor, "z y x"], alignment: Alignment, centre: Float[Tensor, "3"]
) -> Float[Tensor, "z y x"]:
    """The second map where the first lies: V(p) = V₂(Qᵀ (p - c)), c in voxels; of its mirror image where hands
    differ."""
    own = mirror_image(volume) if alignment.mirrored else volume
    rotation = alignment.rotation.T
    return turned(own, rotation[None], -(rotation @ centre.double()))[0]


def mirror_image(volume: Float[Tensor, "z y x"]) -> Float[Tensor, "z y x"]:
    """V(x, y, -z) about the centre voxel."""
    return volume.flip(0).roll(1, 0) if len(volume) % 2 == 0 else volume.flip(0)


def shell_correlation(one: Float[Tensor, "z y x"], other: Float[Tensor, "z y x"]) -> Float[Tensor, " s"]:
    """FSC of two maps by shell."""
    size = len(one)
    first, second = rfft(one, 3), rfft(other, 3)
    shells = shell_index(size, 3).clamp(max=size // 2 + 1)
    twice = hermitian_weight(size)
    products = ((first * second.conj()).real, first.abs().square(), second.abs().square())
    cross, a, b = (sum_by_shell((twice * own).double(), shells, size // 2 + 2)[: size // 2 + 1] for own in products)
    return (cross / (a * b).sqrt().clamp(min=1e-30)).float()


def last_shell(curve: Float[Tensor, " s"], threshold: float = CORRELATED) -> int:
    """The last shell before the first, beyond the outline, that falls below a threshold."""
    below = (curve[2:] < threshold).nonzero()
    return int(below[0]) + 1 if len(below) else len(curve) - 1


@dataclass(frozen=True)
class Verdict:
    """What is to be believed, and why."""

    word: Word
    agreement: float  # share of images whose poses against both maps agree
    shell: int  # up to which the aligned maps correlate above `CORRELATED`
    gain: float  # nats per image: what a map predicts of the other half's images beyond its spherical mean
    gain_error: float


def decide(agreement: float, shell: int, gain: float, gain_error: float) -> Verdict:
    """Three words. Agreement of poses, maps that correlate beyond the outline, and a gain on images that no map has
    seen must all say so; a map that fails in the first was not found."""
    if agreement >= FOUND and shell >= _SHELLS and gain > 3 * gain_error:
        word: Word = "found"
    elif agreement < FAILED or gain <= 0:
        word = "not found"
    else:
        word = "uncertain"
    return Verdict(word, agreement, shell, gain, gain_error)
