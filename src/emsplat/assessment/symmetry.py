"""Whether particles have the point group they are said to have, about the axes it is said to have them.

Half maps of a sample are back-projected without symmetry, and one is compared with the other turned by an element of
the group. In each shell where the half maps agree the correlation FSC(h₁, R h₂) of a true axis is that of the halves
themselves, FSC(h₁, h₂), noise and all; about a wrong axis it is near 0 beyond the first shells, which show an outline.
The agreement is the ratio of their sums over shells, each weighted by its number of coefficients.

Poses often lie in one asymmetric unit (RELION searches no other), so that a half map has measured only a part of
Fourier space, and the turned one another part. So only coefficients that both have measured well are compared. Measured
(docs/log.md): true axes 0.87 to 1.01 with 2,000 particles; axes off by 1° 0.8 to 0.96, by 2° 0.4 to 0.9; wrong ones at
most 0.17, but up to 0.6 where 20 to 200 particles show little more than the outline of a long one at 15 to 20 Å.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy.typing import NDArray
from torch import Tensor

from emsplat.device import CPU
from emsplat.maths.fourier import hermitian_weight, irfft, rfft, shell_index
from emsplat.maths.geometry import axis_rotation
from emsplat.maths.groups import (
    Symmetry,
    cyclic,
    dihedral,
    generators,
    icosahedral,
    octahedral,
    tetrahedral,
)
from emsplat.measures.mask import spherical_mask
from emsplat.particles.stack import ParticleStack
from emsplat.sums.equations import mean_per_shell
from emsplat.sums.statistics import equations_of
from emsplat.types import Grid

HOLDS, FAILS = 0.7, 0.4  # agreement from which on an axis is there, below which it is not
_ERROR = 0.1  # largest standard error of an agreement that says anything
_SAMPLE = 1000  # particles of each half
_VOXELS = 64  # at most, across their maps
_RATE = 4000.0  # particles of box 96 for each half
_FIRST_SHELL = 4  # those before it show the outline
_MEASURED = 0.4  # weight of a well measured coefficient, relative to the mean of its shell
_HIGHEST = 12  # fold of the axes that are tried where none is given or the given one fails


@dataclass(frozen=True)
class Finding:
    """What is to be said about a symmetry: "ok", "look" (cannot be told, or something between) or "wrong"."""

    verdict: Literal["ok", "look", "wrong"]
    text: str


class AxisTest:
    """Half maps of a sample of the particles, without symmetry, to be compared about any axis."""

    def __init__(self, stack: ParticleStack) -> None:
        size = min(_VOXELS, stack.grid.size)
        self.grid = Grid(size, stack.grid.length / size)
        self._shells = shell_index(size, 3).clamp(max=size // 2 + 1)
        self._twice = hermitian_weight(size)
        diameter = min(stack.diameter, self.grid.length - 12 * self.grid.pixel_size)
        mask = spherical_mask(self.grid, diameter, 6 * self.grid.pixel_size)
        self._filled = float(mask.square().mean())
        count = max(100, min(_SAMPLE, int(_RATE * (96 / stack.grid.size) ** 2)))
        self.particles = 0
        maps, weights = [], []
        for half in (1, 2):
            own = stack.only(half)
            sample = own.take(torch.linspace(0, len(own) - 1, min(count, len(own))).long()).without_symmetry()
            equations = equations_of(sample, None if size == stack.grid.size else size).to(CPU)
            self.particles += len(sample)
            maps.append(equations.solve() * mask)
            weight = equations.weight()
            mean = mean_per_shell(weight)[self._shells.clamp(max=size // 2)]
            weights.append(weight / mean.clamp(min=1e-30))
        self._spectrum, second = rfft(maps[0], 3), rfft(maps[1], 3)
        self._measured = weights[0] > _MEASURED
        # Linear interpolation needs the map on finer voxels; the weight is smooth.
        self._fine = _finer(second)
        self._weight = _whole(weights[1])
        self._unturned, _ = self._shell_curve(second, weights[1])
        below = (self._unturned[1:] < 0.143).nonzero()
        self.last = int(below[0]) if len(below) else size // 2

    @property
    def resolution(self) -> float:
        """Finest spacing in Å at which the half maps agree."""
        return self.grid.length / max(self.last, 1)

    def agreement(self, rotation: Float[Tensor, "3 3"]) -> tuple[float, float]:
        """FSC with one half turned, relative to FSC without, and its standard error (infinite: nothing to compare)."""
        turned = rfft(_turned(self._fine, rotation, self.grid.size), 3)
        weight = _half(_turned(self._weight, rotation, self.grid.size))
        curve, count = self._shell_curve(turned, weight)
        shells = slice(_FIRST_SHELL, self.last + 1)
        expected = float((count * self._unturned)[shells].sum())
        if not expected > 0:
            return 0.0, math.inf
        error = math.sqrt(float(count[shells].sum()) / self._filled)
        return float((count * curve)[shells].sum()) / expected, error / expected

    def _shell_curve(
        self, other: Complex[Tensor, "z y k"], weight: Float[Tensor, "z y k"]
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
        """FSC of the first half with another map over what both have measured, and over how many coefficients."""
        both = (self._measured & (weight > _MEASURED)) * self._twice
        one = self._spectrum
        cross, first, second = (
            self._per_shell(both * values)
            for values in ((one * other.conj()).real, one.abs().square(), other.abs().square())
        )
        return cross / (first * second).sqrt().clamp(min=1e-30), self._per_shell(both)

    def _per_shell(self, values: Float[Tensor, "z y k"]) -> Float[Tensor, " s"]:
        half = self.grid.size // 2
        return torch.bincount(self._shells.flatten(), values.double().flatten(), half + 2)[: half + 1]


def examine_symmetry(stack: ParticleStack) -> Finding | None:
    """Looks whether a sample of at most 2,000 particles has the symmetry of its stack, about its axes; two seconds.

    For C1, None where the particles have no symmetry that could be asked for. ``stack`` needs half-sets.

    Raises:
        InputError: an image cannot be used.
    """
    test = AxisTest(stack)
    sample = f"{test.particles:,} particles, to {test.resolution:.1f} Å"
    symbol, wanted = stack.symmetry.symbol, generators(stack.symmetry.elements)
    found = [test.agreement(rotation) for rotation in wanted]
    if not found:
        best = _best_group(test)
        if best is None:
            return None
        name = best.symbol
        return Finding(
            "look", f"none is given, but the map agrees with {name}; --symmetry {name} makes use of that ({sample})"
        )
    if max(error for _, error in found) > _ERROR:
        return Finding("look", f"{symbol}: too few particles, or too much noise, to see its axes ({sample})")
    axes = ", ".join(f"{name_axis(rotation)} {value:.2f}" for rotation, (value, _) in zip(wanted, found, strict=True))
    least = min(value for value, _ in found)
    text = f"{symbol}: agreement of the map with itself turned about the {axes}; 1 is perfect ({sample})"
    if least >= HOLDS:
        return Finding("ok", text)
    if least >= FAILS and not _holds_elsewhere(test, stack.symmetry):
        reason = "; less than that of a true axis: it is off by a degree or two, or the symmetry is not exact"
        return Finding("look", text + reason)
    return Finding("wrong", f"{text}; {_remedy(test, stack.symmetry)}")


def _holds_elsewhere(test: AxisTest, wanted: Symmetry) -> bool:
    """Whether the map has a group about other axes: of few particles, wrong axes may look half right."""
    settings = [group for _, group in _other_settings(wanted)]
    if wanted.symbol.startswith("I"):
        settings += [group.elements for group in map(icosahedral, "1234") if group != wanted]
    return any(_holds(test, group) for group in settings)


def _remedy(test: AxisTest, wanted: Symmetry) -> str:
    best, symbol = _best_group(test), wanted.symbol
    turned = next((words for words, group in _other_settings(wanted) if _holds(test, group)), None)
    if turned is not None:
        text = f"the map has {symbol} {turned}: turn map and particles first (relion_align_symmetry), or use "
    else:
        text = f"the map does not have {symbol} about these axes; use "
    return text + (f"--symmetry {best.symbol}, which agrees" if best is not None else "--symmetry C1")


def _holds(test: AxisTest, group: Float[Tensor, "s 3 3"]) -> bool:
    found = (test.agreement(rotation) for rotation in generators(group))
    return all(value >= HOLDS and error <= _ERROR for value, error in found)


def _best_group(test: AxisTest) -> Symmetry | None:
    """The largest group in RELION's setting that the map agrees with, None where it agrees with none."""
    folds = [n for n in range(_HIGHEST, 1, -1) if _holds(test, cyclic(n).elements)]
    groups = [*(icosahedral(setting) for setting in "1234"), octahedral(), tetrahedral()]
    groups += [kind(n) for kind in (dihedral, cyclic) for n in folds]
    return next((group for group in groups if _holds(test, group.elements)), None)


def _other_settings(symmetry: Symmetry) -> list[tuple[str, Float[Tensor, "s 3 3"]]]:
    """The same group about other axes that programs use, with words for them."""
    group = symmetry.elements
    quarter = math.pi / 2
    turns = [
        ("with its main axis along x", axis_rotation([0.0, 1.0, 0.0], quarter)),
        ("with its main axis along y", axis_rotation([-1.0, 0.0, 0.0], quarter)),
    ]
    if symmetry.symbol.startswith("D"):
        n = symmetry.order // 2
        turns.append((f"with its 2-folds turned by {90 / n:g}° about z", axis_rotation([0.0, 0.0, 1.0], quarter / n)))
    if symmetry == tetrahedral():
        # RELION has a 3-fold on z; the 2-folds, at right angles to each other, may as well be the axes.
        twofolds = [_axis(element) for element in group if abs(float(element.trace()) + 1) < 1e-4]
        turns.append(("with its 2-folds along x, y and z", np.stack(twofolds)))
    matrices = [(words, torch.from_numpy(matrix)) for words, matrix in turns]
    return [(words, matrix @ group @ matrix.T) for words, matrix in matrices]


def name_axis(rotation: Float[Tensor, "3 3"]) -> str:
    """A rotation as "7-fold along z"."""
    angle = math.acos(min(max((float(rotation.trace()) - 1) / 2, -1.0), 1.0))
    x, y, z = _axis(rotation)
    place = next((name for name, value in (("x", x), ("y", y), ("z", z)) if value > 0.9999), None)
    return f"{round(2 * math.pi / angle)}-fold along {place or f'({x:z.2f}, {y:z.2f}, {z:z.2f})'}"


def _axis(rotation: Float[Tensor, "3 3"]) -> NDArray[np.float64]:
    """The axis of a rotation, its largest component positive."""
    values, vectors = np.linalg.eigh((rotation + rotation.T).numpy())
    axis = vectors[:, values.argmax()]
    signed: NDArray[np.float64] = axis * np.sign(axis[np.abs(axis).argmax()])
    return signed


def _turned(volume: Float[Tensor, "Z Y X"], rotation: Float[Tensor, "3 3"], size: int) -> Float[Tensor, "z y x"]:
    """V(R p) on ``size``³ voxels p of the same box length, between voxels linearly, 0 outside the box."""
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    position = torch.stack([x, y, z], -1) @ rotation.T.float() * (len(volume) / size) + len(volume) // 2
    place = (2 * position / (len(volume) - 1) - 1)[None]
    sampled: Tensor = torch.nn.functional.grid_sample(volume[None, None], place, align_corners=True)
    return sampled[0, 0]


def _finer(spectrum: Complex[Tensor, "z y k"]) -> Float[Tensor, "Z Y X"]:
    """The map of a transform on voxels of half the size, without the Nyquist planes."""
    size = len(spectrum)
    half = size // 2
    wide = torch.zeros(2 * size, 2 * size, size + 1, dtype=spectrum.dtype)
    rows = torch.arange(1 - half, half)
    wide[rows[:, None] % (2 * size), rows % (2 * size), :half] = spectrum[rows[:, None] % size, rows % size, :half]
    return 8 * irfft(wide, 3)


def _whole(values: Float[Tensor, "z y k"]) -> Float[Tensor, "z y x"]:
    """Real values on the half space of a transform as a volume with the origin at its centre."""
    size = len(values)
    mirror = (-torch.arange(size)) % size
    rest = values[mirror][:, mirror][..., mirror[size // 2 + 1 :]]
    centred: Tensor = torch.fft.fftshift(torch.cat([values, rest], -1))
    return centred


def _half(volume: Float[Tensor, "z y x"]) -> Float[Tensor, "z y k"]:
    """Undoes `_whole`."""
    values: Tensor = torch.fft.ifftshift(volume)
    return values[..., : len(volume) // 2 + 1]
