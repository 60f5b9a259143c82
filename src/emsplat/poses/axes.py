"""Which point group a map has, and about which axes.

A map is compared with itself turned. Directions over the half sphere are tried for each fold; the best are refined,
together with the centre that the axes go through, and completed to larger groups by a second axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from torch import Tensor

from emsplat.maths.fourier import irfft, rfft, shell_index, widen
from emsplat.maths.geometry import axis_rotation
from emsplat.maths.groups import C1, Symmetry, cyclic, dihedral, generators, icosahedral, octahedral, tetrahedral
from emsplat.poses.grids import sphere

HOLDS = 0.8  # correlation of a map with itself turned from which on it has an axis
_FOLDS = range(2, 13)
_FOLDS_TRIED = 4  # of them; a map without shape agrees about all
_LIKELY = 0.6  # of that, for directions that are some degrees beside the axis
_DIRECTIONS = 1200  # over the sphere, 6 degrees apart
_BEST = 6  # axes of a fold that are looked at closely
_REFINED = 2  # of them, together with a second axis
_TWISTS = 60  # places of the second axis about the first
_OUTLINE = 3  # shells before this one show the outline of the particle
_BATCH = 64
_LOOKED_AT, _ROUGHLY = 3000, 1000  # voxels of a map
_LARGE = 14  # elements of a group
_TURNED, _ASIDE = 3.0, 2.0  # how far a frame is refined: tenths of a radian about each axis, voxels


@dataclass(frozen=True)
class GroupFrame:
    """Where the axes of a group lie in a map.

    The map turned so, V'(x) = V(Rᵀ x + c), has the group in RELION's setting; poses A of the map become A Rᵀ.
    """

    symmetry: Symmetry
    rotation: Float[Tensor, "3 3"]  # R, float64
    centre: Float[Tensor, "3"]  # c, voxels from the centre
    agreement: float  # least correlation of the map with itself turned by an element of the group


class Turning:
    """A map to be compared with itself turned: its fine detail, and the points where it is looked at."""

    def __init__(self, volume: Float[Tensor, "z y x"], radius: float, diameter: float) -> None:
        size = len(volume)
        away = shell_index(size, 3)
        self._fine = _finer(irfft(rfft(volume, 3) * ((away >= _OUTLINE) & (away <= radius)), 3))
        points = _points(size)
        inside = points[torch.linalg.vector_norm(points, dim=1) <= min(diameter / 2, size // 2 - 2)]
        some = torch.randperm(len(inside), generator=torch.Generator().manual_seed(0))[:_LOOKED_AT]
        self._points = inside[some]

    def agreement(
        self, rotation: Float[Tensor, "r 3 3"], centre: Float[Tensor, "3"] | None = None, *, roughly: bool = False
    ) -> Float[Tensor, " r"]:
        """Correlation of the map with itself turned about a centre by each rotation; ``roughly`` at few points."""
        middle = torch.zeros(3) if centre is None else centre
        points = self._points[: _ROUGHLY if roughly else None]
        plain = _sampled(self._fine, points, torch.eye(3)[None], middle)
        turned = _sampled(self._fine, points, rotation, middle)
        norm = torch.linalg.vector_norm(turned, dim=1) * torch.linalg.vector_norm(plain)
        correlation: Tensor = (turned @ plain[0]) / norm.clamp(min=1e-30)
        return correlation


def find_frame(turning: Turning, symmetry: Symmetry) -> GroupFrame:
    """Where a group fits a map best."""
    if symmetry.order == 1:
        return GroupFrame(symmetry, torch.eye(3, dtype=torch.float64), torch.zeros(3), 1.0)
    first, *others = sorted(generators(symmetry.elements), key=_angle)
    axis, angle = _axis(first), _angle(first)
    direction = _half_sphere()
    found = turning.agreement(_about(direction, angle), roughly=True)
    starts = []
    for number in found.argsort(descending=True)[:_BEST].tolist():
        onto = _onto(direction[number].numpy(), axis)
        twists = np.linspace(0, 2 * math.pi, _TWISTS if others else 1, endpoint=False)
        rotations = torch.from_numpy(np.stack([axis_rotation(axis, twist) @ onto for twist in twists]))
        worth = torch.zeros(len(rotations))
        for other in others:
            worth += turning.agreement(rotations.mT @ other @ rotations)
        starts.append((float(found[number] + worth.max()), rotations[int(worth.argmax())]))
    starts.sort(key=lambda own: -own[0])
    refined = [_refined(turning, symmetry, rotation) for _, rotation in starts[:_REFINED]]
    return max(refined, key=lambda own: own.agreement)


def find_symmetry(turning: Turning, holds: float = HOLDS, refused: Sequence[Symmetry] = ()) -> GroupFrame:
    """The largest group that a map has. Where some were ``refused`` none that contains one of them counts, and of the
    others not the largest is given but the one that fits best: a part of the group that was refused."""
    folds = _likely_folds(turning, _LIKELY * holds)
    found = {fold: frame for fold in folds if (frame := find_frame(turning, cyclic(fold))).agreement >= holds}
    larger = [own for own in (icosahedral(), octahedral(), tetrahedral()) if set(_folds(own)) <= set(found)]
    larger += [dihedral(fold) for fold in sorted(found, reverse=True) if 2 in found]
    fitting = []
    for symmetry in larger:
        if any(_contains(symmetry, own) for own in refused):
            continue
        frame = find_frame(turning, symmetry)
        if frame.agreement >= holds:
            if not refused:
                return frame
            fitting.append(frame)
    fitting += [found[fold] for fold in sorted(found, reverse=True)]
    fitting = [frame for frame in fitting if not any(_contains(frame.symmetry, own) for own in refused)]
    if not fitting:
        return find_frame(turning, C1)
    return max(fitting, key=lambda frame: frame.agreement) if refused else fitting[0]


def _contains(group: Symmetry, part: Symmetry) -> bool:
    return group.order >= part.order and set(_folds(part)) <= set(_folds(group))


def _likely_folds(turning: Turning, least: float) -> list[int]:
    """Folds of which there is a direction about which every turn leaves the map similar. Turns by a small angle alone
    do so about the long axis of any rod."""
    direction = _half_sphere()
    parts = {Fraction(k, fold) for fold in _FOLDS for k in range(1, fold // 2 + 1)}
    found = {part: turning.agreement(_about(direction, 2 * math.pi * float(part)), roughly=True) for part in parts}
    worst = {fold: torch.stack([found[Fraction(k, fold)] for k in range(1, fold // 2 + 1)]).amin(0) for fold in _FOLDS}
    best = sorted(_FOLDS, key=lambda fold: -float(worst[fold].max()))[:_FOLDS_TRIED]
    return sorted(fold for fold in best if float(worst[fold].max()) >= least)


def in_frame(volume: Float[Tensor, "z y x"], frame: GroupFrame) -> Float[Tensor, "z y x"]:
    """A map turned into RELION's setting, the mean over its group."""
    rotation = frame.rotation.T @ frame.symmetry.elements
    return map_turned(volume, rotation, frame.centre).mean(0)


def map_turned(
    volume: Float[Tensor, "z y x"], rotation: Float[Tensor, "r 3 3"], centre: Float[Tensor, "3"]
) -> Float[Tensor, "r z y x"]:
    """V(R x + c) for each rotation, c in voxels."""
    return _sampled(_finer(volume), _points(len(volume)), rotation, centre).reshape(len(rotation), *volume.shape)


def _points(size: int) -> Float[Tensor, "p 3"]:
    """The voxels of a box, (x, y, z) from its centre."""
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([x, y, z], -1).flatten(0, 2)


def _finer(volume: Float[Tensor, "z y x"]) -> Float[Tensor, "Z Y X"]:
    """A map on voxels of half the size, between which one may go linearly."""
    size = len(volume)
    return 8 * irfft(widen(rfft(volume, 3), 2 * size), 3)


def _sampled(
    fine: Float[Tensor, "Z Y X"],
    points: Float[Tensor, "p 3"],
    rotation: Float[Tensor, "r 3 3"],
    centre: Float[Tensor, "3"],
) -> Float[Tensor, "r p"]:
    """V(R x + c) at points x in voxels of the map, of which ``fine`` has twice as many along each axis."""
    found = []
    for own in torch.split(rotation.float(), _BATCH):
        place = 2 * (points @ own.mT + centre.float()) + len(fine) // 2
        place = (2 * place / (len(fine) - 1) - 1)[None, :, :, None]
        found.append(torch.nn.functional.grid_sample(fine[None, None], place, align_corners=True)[0, 0, :, :, 0])
    return torch.cat(found)


def _refined(turning: Turning, symmetry: Symmetry, start: Float[Tensor, "3 3"]) -> GroupFrame:
    def placed(numbers: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        turn = torch.from_numpy(Rotation.from_rotvec(numbers[:3] / 10).as_matrix())
        return turn @ start, torch.from_numpy(numbers[3:]).float()

    # All elements of large groups say no more than those that generate them.
    elements = symmetry.elements[1:] if symmetry.order <= _LARGE else generators(symmetry.elements)

    def loss(numbers: NDArray[np.float64]) -> float:
        rotation, centre = placed(numbers)
        return -float(turning.agreement(rotation.T @ elements @ rotation, centre).mean())

    # Outside the particle everything is alike: axes that go through its middle are meant.
    options: Any = {"xtol": 0.03, "ftol": 1e-3, "maxfev": 250}
    bounds = [(-_TURNED, _TURNED)] * 3 + [(-_ASIDE, _ASIDE)] * 3
    found = minimize(loss, np.zeros(6), method="Powell", bounds=bounds, options=options)
    rotation, centre = placed(found.x)
    own = turning.agreement(rotation.T @ symmetry.elements[1:] @ rotation, centre)
    return GroupFrame(symmetry, rotation, centre, float(own.min()))


def _half_sphere() -> Float[Tensor, "d 3"]:
    direction = sphere(_DIRECTIONS)
    return direction[direction[:, 2] >= 0]


def _about(direction: Float[Tensor, "d 3"], angle: float) -> Float[Tensor, "d 3 3"]:
    return torch.from_numpy(Rotation.from_rotvec(angle * direction.numpy()).as_matrix())


def _onto(direction: NDArray[np.float64], axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """A rotation that brings one direction onto another."""
    cross, cosine = np.cross(direction, axis), float(direction @ axis)
    if np.linalg.norm(cross) < 1e-9:
        return np.eye(3) if cosine > 0 else axis_rotation(np.cross(axis, np.roll(axis, 1) + 0.1), math.pi)
    return axis_rotation(cross, math.atan2(float(np.linalg.norm(cross)), cosine))


def _angle(rotation: Float[Tensor, "3 3"]) -> float:
    return float(np.linalg.norm(Rotation.from_matrix(rotation.numpy()).as_rotvec()))


def _axis(rotation: Float[Tensor, "3 3"]) -> NDArray[np.float64]:
    vector: NDArray[np.float64] = Rotation.from_matrix(rotation.numpy()).as_rotvec()
    return vector / np.linalg.norm(vector)


def _folds(symmetry: Symmetry) -> list[int]:
    return sorted({round(2 * math.pi / _angle(own)) for own in symmetry.elements[1:]})
