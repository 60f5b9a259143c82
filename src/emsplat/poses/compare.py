"""Two sets of poses of the same particles, brought into one frame: rotation, hand, and where the centre is.

Frames of two reconstructions differ by a rotation T, so that A_b T = A_a up to the point group, and by a shift d of the
object. T is first guessed from single particles, each of which names one per element of the group, and that which most
particles agree with is then averaged: half of the poses may be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.maths.geometry import vector_to_matrix
from emsplat.maths.groups import Symmetry
from emsplat.poses.prior import turns
from emsplat.types import Poses

_GUESSES = 150  # particles that name a frame
_JUDGES = 400  # particles that a frame is judged by
_NEAR = math.radians(20)  # what counts as agreement while a frame is looked for
_ITERATIONS = 20
_FLIP = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


@dataclass(frozen=True)
class PoseComparison:
    """Two sets of poses in one frame."""

    angle: Float[Tensor, " p"]  # rad, up to the point group
    shift: Float[Tensor, " p"]  # Å
    frame: Float[Tensor, "3 3"]  # T: poses of the second times this are in the frame of the first
    centre: Float[Tensor, " 3"]  # Å: minus the point of the second's object that is the origin of the first
    mirrored: bool  # whether the second has the other hand

    def numbers(self) -> dict[str, float | bool]:
        """What is said of it, in degrees and Å."""
        degrees = torch.rad2deg(self.angle)
        around = float(torch.linalg.vector_norm(turns(self.frame[None], torch.eye(3).double()[None])))
        return {
            "particles": len(degrees),
            "median": float(degrees.quantile(0.5)),
            "p90": float(degrees.quantile(0.9)),
            "within_5": float((degrees < 5).double().mean()),
            "within_10": float((degrees < 10).double().mean()),
            "shift_median": float(self.shift.quantile(0.5)),
            "shift_p90": float(self.shift.quantile(0.9)),
            "frame_turn": math.degrees(around),
            "frame_shift": float(torch.linalg.vector_norm(self.centre)),
            "mirrored": self.mirrored,
        }


def compare_poses(first: Poses, second: Poses, symmetry: Symmetry) -> PoseComparison:
    """How far two sets of poses of the same particles are apart once both are in one frame.

    Hands are told apart by which agrees more; where few particles agree in either, neither means anything.
    """
    found = [_in_one_frame(first, _mirror(second) if flip else second, symmetry, flip) for flip in (False, True)]
    straight, other = (_agreement(one.angle) for one in found)
    # Of two hands that agree alike, as of projections of a mirror-symmetric map, that which is given.
    return found[1] if other > straight + 1e-9 else found[0]


def _mirror(poses: Poses) -> Poses:
    """The poses of the other hand that show the same images (docs/conventions.md, 2)."""
    return Poses(_FLIP @ poses.rotation @ _FLIP, poses.shift)


def _agreement(angle: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """How well angles agree: near ones count, by how near."""
    agreement: Tensor = (1 - angle / _NEAR).clamp(min=0).mean(-1)
    return agreement


def _in_one_frame(first: Poses, second: Poses, symmetry: Symmetry, mirrored: bool) -> PoseComparison:
    elements = symmetry.elements
    one, other = first.rotation, second.rotation
    count = len(one)
    guesses, judges = (torch.linspace(0, count - 1, min(count, n)).long() for n in (_GUESSES, _JUDGES))
    # Which element a particle has depends on the frame alone for one particle, so one guess of each is enough.
    frames = other[guesses].mT @ one[guesses]
    angle = torch.stack([_angles(one[judges], other[judges] @ frame, elements)[0] for frame in frames])
    frame = frames[_agreement(angle).argmax()]
    for _ in range(_ITERATIONS):
        angle, element = _angles(one, other @ frame, elements)
        near = angle < _NEAR
        if not near.any():
            break
        # In the frame of the object: frame exp([w]×) brings the second nearer.
        own = one[near] @ elements[element[near]].mT
        step = turns((other[near] @ frame).mT, own.mT).median(0).values
        frame = frame @ vector_to_matrix(step[None])[0]
        if float(torch.linalg.vector_norm(step)) < 1e-7:
            break
    # Of frames that differ by an element of the group alone, that which turns least.
    traces = torch.einsum("ij,sjk->sik", frame, elements.to(frame)).diagonal(dim1=1, dim2=2).sum(1)
    frame = frame @ elements.to(frame)[traces.argmax()]
    angle, _ = _angles(one, other @ frame, elements)
    centre, shift = _common_shift(first.shift - second.shift, other, angle < _NEAR)
    return PoseComparison(angle, shift, frame, centre, mirrored)


def _angles(
    one: Float[Tensor, "p 3 3"], other: Float[Tensor, "p 3 3"], elements: Float[Tensor, "s 3 3"]
) -> tuple[Float[Tensor, " p"], Tensor]:
    """Angles between rotations up to a point group, other R ≈ one, and which R."""
    relative = other.mT @ one
    traces = torch.einsum("pij,sij->ps", relative, elements.to(relative))
    best = traces.max(1)
    # From the chord: the arc cosine of a trace near 3 has no digits left.
    chord = torch.linalg.matrix_norm(relative - elements.to(relative)[best.indices])
    angle: Tensor = 2 * torch.arcsin((chord / (2 * math.sqrt(2))).clamp(max=1))
    return angle, best.indices


def _common_shift(
    difference: Float[Tensor, "p 2"], rotation: Float[Tensor, "p 3 3"], near: Tensor
) -> tuple[Float[Tensor, " 3"], Float[Tensor, " p"]]:
    """The shift d of the object with (A d)₁₂ ≈ difference for most, and what is left of each."""
    used = near if int(near.sum()) >= 2 else torch.ones_like(near)
    centre = torch.zeros(3, dtype=torch.float64)
    left = difference
    for _ in range(_ITERATIONS):
        rows, right = rotation[used][:, :2], difference[used]
        centre = torch.linalg.lstsq(rows.reshape(-1, 3), right.reshape(-1, 1), driver="gelsd").solution[:, 0]
        left = difference - (rotation[:, :2] @ centre)
        length = torch.linalg.vector_norm(left, dim=1)
        kept = used & (length <= 3 * length[used].median() + 1e-9)
        if torch.equal(kept, used) or int(kept.sum()) < 2:
            break
        used = kept
    return centre, torch.linalg.vector_norm(left, dim=1)
