"""What the parts of a decoder do: rigid motions and occupancies over the states, in numbers and in words.

The decoder's own parts have soft borders, and the motion that fits such a blend of Gaussians best is smaller than that
of any. Here each Gaussian belongs to the part whose rigid motion it follows (`members`).

A decoder moves its parts where no image holds them, too. Words are therefore of what the other half-set's model does in
the same place as well: where it has at least half of the motion, by its variance over states and Gaussians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor

from emsplat.heterogeneity.half import HalfModel
from emsplat.maths.geometry import matrix_to_quaternion
from emsplat.measures.states import common_mask
from emsplat.models.decoder import Decoder
from emsplat.types import Gaussians, Grid

_STILL_ANGLE, _STILL_SHIFT = 2.0, 1.0  # degrees and Å below which a part stands still
_LITTLE = 10.0  # degrees: what turns by less is rather still
_ROUND = 60.0  # degrees: largest gap between the angles of a full turn
_CHANGING = 0.25  # of a part's mass, that comes and goes
_SAME_AXIS = 20.0  # degrees between the axes of both half-sets, up to which there is one to tell
_CONFIRMED = 0.5  # of the variance of a motion, that the other half-set has too
_OFTEN = 0.5  # of the mean weight, from which a point of the density counts for how far parts move
_PLACES, _ROUNDS = 24, 10  # states by which Gaussians are sorted into parts, and how often
_ALIKE = 0.5  # Å: of parts that differ by less for a Gaussian, it belongs to the one that the decoder puts it in


@dataclass(frozen=True)
class PartMotion:
    """A part over the states, seen from the part that stands stillest for its mass (``against``).

    How far it turns and gets is over all that there are, the states and the points of the density. ``angles`` are
    signed turns about ``axis`` from the reference state, which the state of most particles is; ``through`` a point of
    the axis and ``slide`` the shift along it of the widest turn; ``shift`` is how far the centre of the part gets.
    ``mass`` is what it weighs in each state within the molecule, over what the still part weighs, relative to its
    largest. ``confirmed`` is how much of the variance of the motion the other half-set's model has, ``mass_confirmed``
    of that of the mass; ``other_turn`` and ``axes_apart`` are how far the other turns it between the same two states,
    and the angle between both axes, degrees.
    """

    number: int  # from 1
    gaussians: int
    share: float  # of the mass of the molecule
    centre: tuple[float, float, float]  # Å from the centre of the box, in the reference state
    turn: float  # degrees, between the two states that are furthest apart
    whole_turn: bool
    axis: tuple[float, float, float]
    through: tuple[float, float, float]
    slide: float
    shift: float
    angles: tuple[float, ...]
    shifts: tuple[float, ...]
    mass: tuple[float, ...]
    against: int | None
    confirmed: float
    mass_confirmed: float
    other_turn: float
    axes_apart: float

    @property
    def moves(self) -> bool:
        return self.turn >= _STILL_ANGLE or self.shift >= _STILL_SHIFT

    @property
    def changes(self) -> bool:
        return min(self.mass) < (1 - _CHANGING)

    @property
    def words(self) -> str:
        """As a sentence."""
        what = f"part {self.number}, {self.gaussians:,} Gaussians, {self.share:.0%} of the mass"
        if self.against is None:
            does = "is what the others are seen from"
        elif not self.moves:
            does = f"stands still against part {self.against}"
        elif self.confirmed < _CONFIRMED:
            does = f"moves against part {self.against} in no way that the other half-set confirms"
        else:
            axis = ", ".join(f"{value:.2f}" for value in self.axis)
            through = ", ".join(f"{value:.0f}" for value in self.through)
            turns = "turns all the way round" if self.whole_turn else f"turns by up to {self.turn:.0f}°"
            does = (
                f"{turns} about the axis ({axis}) through ({through}) Å against part {self.against}, and its centre "
                f"moves by up to {self.shift:.0f} Å"
            )
            if self.turn >= _STILL_ANGLE and self.axes_apart > _SAME_AXIS:
                does = (
                    f"moves against part {self.against}, its centre by up to {self.shift:.0f} Å; the half-sets do not "
                    f"agree on an axis ({self.axes_apart:.0f}° between theirs)"
                )
            elif self.turn < _STILL_ANGLE:
                does = f"moves by up to {self.shift:.0f} Å against part {self.against}"
        said = self.changes and self.mass_confirmed >= _CONFIRMED
        comes = f"; it comes and goes: {min(self.mass):.0%} to 100 % of its density" if said else ""
        return f"{what}, {does}{comes}"


def separable(model: HalfModel) -> Decoder:
    """The decoder of a model that has parts with soft borders.

    Raises:
        ValueError: it has another.
    """
    if not isinstance(model.decoder, Decoder):
        raise ValueError(f"a decoder of kind {type(model.decoder).__name__}; expected the separable one")
    return model.decoder


@torch.no_grad()
def members(model: HalfModel) -> Float[Tensor, "g p"]:
    """1 for the part that each Gaussian belongs to: the one whose rigid motion over the density it follows best. Begun
    from the decoder's parts, motions and members are found in turn."""
    decoder, density = separable(model), model.density
    places = density.point[density.weight.argsort(descending=True)[:_PLACES]]
    position, amplitude = (one.double() for one in decoder(places.float()))
    soft, mass = decoder.parts().double(), amplitude.mean(0).clamp(min=1e-30)
    label = soft.argmax(1)
    for _ in range(_ROUNDS):
        away = torch.full_like(soft, torch.inf)
        for part in sorted(set(label.tolist())):
            own = torch.where(label == part, mass, 0.0)
            left = _field(position[0], *_rigid(position[0], position, own)) - position
            away[:, part] = left.square().sum(2).mean(0) + _ALIKE**2 * (1 - soft[:, part])
        before, label = label, away.argmin(1)
        if torch.equal(label, before):
            break
    return torch.nn.functional.one_hot(label, soft.shape[1]).double()


@torch.no_grad()
def motions(
    models: tuple[HalfModel, HalfModel],
    states: Float[Tensor, "s q"],
    reference: int,
    weight: Float[Tensor, "g p"],
) -> list[PartMotion]:
    """The parts of the first half-set's decoder over some latents of the run, ``reference`` being one of these, and
    whether the second's confirms what they do. ``weight`` are the `members` of the parts; those without are left out.
    """
    count, density = len(states), models[0].density
    molecules = [_molecule(model, states) for model in models]
    often = density.point[density.weight >= _OFTEN / len(density)]
    states = torch.cat([states.double(), _of_run(models[0], often)])
    (position, amplitude), (others, other_amplitude) = (
        (one.double() for one in model.decoder(model.frame(states).float())) for model in models
    )
    # A Gaussian of the second belongs where the one of the first that is nearest to it does.
    nearest = cKDTree(position[reference].numpy()).query(others[reference].numpy())[1]
    moved, mass, typical = _parts(position, amplitude, weight, reference)
    its = weight[torch.from_numpy(nearest)]
    again, _, _ = _parts(others, other_amplitude, its, reference)
    still = _stillest(moved, mass.mean(0))
    dense = (amplitude * _within(position, molecules[0], models[0].grid)) @ weight
    other_dense = (other_amplitude * _within(others, molecules[1], models[1].grid)) @ its
    found = []
    for p in weight.sum(0).nonzero()[:, 0].tolist():
        rotation, shift = _against(moved[p], moved[still])
        place = position[reference]
        second = _against(again[p], again[still])
        field, other = (_field(place, *motion) for motion in ((rotation, shift), second))
        share = typical[:, p] / typical[:, p].sum()
        # Whole states may be brighter or fainter than others.
        ratios = [own[:, p] / own[:, still].clamp(min=1e-30) for own in (dense, other_dense)]
        masses, other_masses = (own / own.max().clamp(min=1e-30) for own in ratios)
        found.append(
            _describe(
                p,
                round(float(weight[:, p].sum())),
                float(mass[:, p].mean() / mass.sum(1).mean()),
                share @ place,
                rotation,
                shift,
                masses[:count],
                None if p == still else still + 1,
                (
                    _had(field, other, share[None, :, None].expand(len(states), -1, 3)),
                    _had(masses, other_masses, torch.ones_like(masses)),
                ),
                second[0],
            )
        )
    return found


def _molecule(model: HalfModel, states: Float[Tensor, "s q"]) -> Float[Tensor, "z y x"]:
    """A mask of where any state is: beyond it Gaussians are faint, and the residual takes back what they show."""
    highest = torch.stack([model.map(own, model.grid) for own in states.double()]).amax(0)
    return common_mask(highest, model.grid.pixel_size)


def _within(position: Float[Tensor, "s g 3"], mask: Float[Tensor, "z y x"], grid: Grid) -> Bool[Tensor, "s g"]:
    """Whether places (Å from the centre) are where a mask is at least one half."""
    voxel = (position / grid.pixel_size).round().long() + grid.size // 2
    there = ((voxel >= 0) & (voxel < grid.size)).all(2)
    x, y, z = voxel.clamp(0, grid.size - 1).unbind(2)
    return there & (mask[z, y, x] >= 0.5)


def _of_run(model: HalfModel, latent: Float[Tensor, "m q"]) -> Float[Tensor, "m q"]:
    """Latents of the run that lead to some of a half-set's own."""
    found: Tensor = torch.linalg.lstsq(model.frame.turn, (latent - model.frame.offset).T, driver="gelsd").solution.T
    return found


_Motion = tuple[Float[Tensor, "s 3 3"], Float[Tensor, "s 3"]]


def _parts(
    position: Float[Tensor, "s g 3"], amplitude: Float[Tensor, "s g"], weight: Float[Tensor, "g p"], reference: int
) -> tuple[list[_Motion], Float[Tensor, "s p"], Float[Tensor, "g p"]]:
    """Motions of the parts from the reference, their mass in each state, and what they have of each Gaussian."""
    typical = (amplitude.mean(0)[:, None] * weight).clamp(min=1e-30)
    return [_rigid(position[reference], position, own) for own in typical.T], amplitude @ weight, typical


def _against(motion: _Motion, base: _Motion) -> _Motion:
    """What is left of a motion when the base is put back where it is in the reference."""
    (rotation, shift), (base_rotation, base_shift) = motion, base
    return base_rotation.mT @ rotation, (base_rotation.mT @ (shift - base_shift)[..., None]).squeeze(-1)


def _field(place: Float[Tensor, "g 3"], rotation: Tensor, shift: Tensor) -> Float[Tensor, "s g 3"]:
    """Where a motion brings places."""
    return torch.einsum("sxy,gy->sgx", rotation, place) + shift[:, None]


def _had(own: Float[Tensor, "s *n"], other: Float[Tensor, "s *n"], weight: Float[Tensor, "s *n"]) -> float:
    """How much of the variance of something over states is in something else as well; below 0 where that differs by
    more than this varies."""
    centred = own - own.mean(0)
    left = centred - (other - other.mean(0))
    return 1 - float((weight * left.square()).sum() / (weight * centred.square()).sum().clamp(min=1e-30))


@torch.no_grad()
def rigid_motions(
    decoder: Decoder, reference: Float[Tensor, " q"], latent: Float[Tensor, "m q"], weight: Float[Tensor, "g p"]
) -> list[tuple[Float[Tensor, "m 3 3"], Float[Tensor, "m 3"]]]:
    """Of each part the rotations and shifts (Å) from a reference to some latents of a decoder's own; ``weight`` are the
    `members`."""
    position, amplitude = (one.double() for one in decoder(torch.cat([reference[None], latent]).float()))
    mass = (amplitude.mean(0)[:, None] * weight).clamp(min=1e-30)
    return [_rigid(position[0], position[1:], own) for own in mass.T]


def _rigid(
    reference: Float[Tensor, "g 3"], position: Float[Tensor, "s g 3"], weight: Float[Tensor, " g"]
) -> tuple[Float[Tensor, "s 3 3"], Float[Tensor, "s 3"]]:
    """The rotations and shifts x -> R x + t that bring weighted points nearest to where they are (Kabsch 1976)."""
    weight = weight / weight.sum()
    centre, centres = weight @ reference, torch.einsum("g,sgx->sx", weight, position)
    across = torch.einsum("g,sgx,gy->sxy", weight, position - centres[:, None], reference - centre)
    u, _, v = torch.linalg.svd(across)
    flip = torch.ones(len(u), 3, dtype=u.dtype)
    flip[:, 2] = torch.det(u @ v).sign()
    rotation = u * flip[:, None] @ v
    return rotation, centres - rotation @ centre


def _stillest(moved: list[tuple[Tensor, Tensor]], mass: Float[Tensor, " p"]) -> int:
    """The part from which most mass stands still: not one halfway between two that move."""
    rotations = torch.stack([rotation for rotation, _ in moved])
    between = torch.einsum("psxy,qsxz->pqsyz", rotations, rotations)
    square = _angle(between).square()
    return int(((square / (square + _LITTLE**2)).mean(2) @ mass).argmin())


def _angle(rotation: Float[Tensor, "*s 3 3"]) -> Float[Tensor, "*s"]:
    """Degrees."""
    trace = torch.diagonal(rotation, dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))


def _describe(
    part: int,
    gaussians: int,
    share: float,
    centre: Tensor,
    rotation: Float[Tensor, "s 3 3"],
    shift: Float[Tensor, "s 3"],
    mass: Tensor,
    against: int | None,
    confirmed: tuple[float, float],
    second: Float[Tensor, "s 3 3"],
) -> PartMotion:
    apart = _angle(rotation[:, None] @ rotation.mT)
    one, other = divmod(int(apart.argmax()), len(rotation))
    between = rotation[other] @ rotation[one].T
    axis = _axis(between, rotation)
    again = second[other] @ second[one].T
    first_axis, second_axis = (matrix_to_quaternion(own[None])[0] for own in (between, again))
    # The turn from the one state to the other; a quaternion and its negative are one rotation.
    first_axis, second_axis = (own[1:] * own[0].sign() for own in (first_axis, second_axis))
    cosine = torch.nn.functional.cosine_similarity(first_axis, second_axis, dim=0)
    if float(apart.max() + _angle(again)) > 360 - _ROUND:  # about half a turn each: either way round
        cosine = cosine.abs()
    # About this axis: twist of each rotation, from the state in the middle of what is seen.
    quaternion = matrix_to_quaternion(rotation)
    twist = torch.rad2deg(2 * torch.atan2(quaternion[:, 1:] @ axis, quaternion[:, 0]))
    twist = (twist + 180) % 360 - 180
    places = (rotation @ centre) + shift
    reach = torch.cdist(places, places)
    rest = places[other] - between @ places[one]
    slide = float(rest @ axis)
    through = _point_of(between, rest - slide * axis)
    gaps = torch.cat([twist.sort().values, twist.min()[None] + 360]).diff()
    return PartMotion(
        part + 1,
        gaussians,
        share,
        _three(centre),
        float(apart.max()),
        bool(gaps.max() < _ROUND),
        _three(axis),
        _three(through),
        slide,
        float(reach.max()),
        tuple(twist[: len(mass)].tolist()),
        tuple(torch.linalg.vector_norm(places - centre, dim=1)[: len(mass)].tolist()),
        tuple(mass.tolist()),
        against,
        *confirmed,
        float(_angle(again)),
        float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))),
    )


def _axis(between: Float[Tensor, "3 3"], rotation: Float[Tensor, "s 3 3"]) -> Float[Tensor, " 3"]:
    """That of the widest turn; z > 0, or the first number that is not 0."""
    quaternion = matrix_to_quaternion(between[None])[0, 1:]
    length = float(torch.linalg.vector_norm(quaternion))
    if length < 1e-9:
        return between.new_tensor([0.0, 0.0, 1.0])
    axis = quaternion / length
    lead = next(value for value in axis.flip(0).tolist() if abs(value) > 1e-6)
    return axis * math.copysign(1.0, lead)


def _point_of(rotation: Float[Tensor, "3 3"], shift: Float[Tensor, " 3"]) -> Float[Tensor, " 3"]:
    """The point of the axis of x -> R x + t that is nearest to the origin, t being across the axis."""
    eye = torch.eye(3, dtype=rotation.dtype)
    point: Tensor = torch.linalg.lstsq(eye - rotation, shift[:, None], rcond=1e-6, driver="gelsd").solution[:, 0]
    return point


def _three(values: Tensor) -> tuple[float, float, float]:
    x, y, z = values.tolist()
    return x, y, z


@torch.no_grad()
def part_of(model: HalfModel, latent: Float[Tensor, " q"], member: Float[Tensor, " g"]) -> Gaussians:
    """The Gaussians of a part, a column of `members`."""
    mixture = model.mixture(latent)
    return Gaussians(mixture.mean, mixture.covariance, mixture.amplitude * member.float())
