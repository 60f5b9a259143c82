"""Whether a map was found: what runs that share nothing have in common.

Two maps that were started apart and climbed on disjoint halves of the particles can agree only on what the images show.
Poses of the same images against either map are aligned (turn and hand are free), and so are the maps. Wrong minima and
noise leave next to nothing in common (docs/log.md has the runs that the bounds were set on).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from emsplat.maths.fourier import hermitian_weight, rfft, shell_index, sum_by_shell
from emsplat.poses.axes import map_turned
from emsplat.poses.compare import PoseComparison

Word = Literal["found", "uncertain", "not found"]

NEAR = math.radians(15)  # poses of coarse grids that agree
FOUND, FAILED = 0.7, 0.2  # share of poses that agree, from which on a map was found, below which it was not
CORRELATED = 0.5  # FSC of the aligned maps up to which they agree
SHELLS = 6  # that they have to agree to, in shells of the box, beyond an outline


def agreement(comparison: PoseComparison) -> float:
    """Share of the images whose poses agree."""
    return float((comparison.angle < NEAR).double().mean())


def brought_over(volume: Float[Tensor, "z y x"], comparison: PoseComparison, length: float) -> Float[Tensor, "z y x"]:
    """A second map where the first lies, in a box of ``length`` Å; of its mirror image where hands differ."""
    own = mirror_image(volume) if comparison.mirrored else volume
    return map_turned(own, comparison.frame[None], -comparison.centre * len(volume) / length)[0]


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
    if agreement >= FOUND and shell >= SHELLS and gain > 3 * gain_error:
        word: Word = "found"
    elif agreement < FAILED or gain <= 0:
        word = "not found"
    else:
        word = "uncertain"
    return Verdict(word, agreement, shell, gain, gain_error)
