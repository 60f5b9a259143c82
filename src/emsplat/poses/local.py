"""Poses of single images, by Levenberg's method on turn and shift against slices of a map.

In units of the noise an image is y = C P(A) e^{2πi k·s} + n, E|n|² = 1, with P(A) the slice, C the contrast transfer
function and s the origin. Each pose minimises

    Σ |y - C P(A') e|² + |w|²/2σ_w² + |t|²/2σ_t²,   A' = exp([w]×) A, s' = s + t,

the posterior of its turn w and move t about the pose that was given. The sum goes over half a plane, and is minus the
log-likelihood. Derivatives are those of the interpolated transform itself. The Hessian of the data, Jᴴ J, gives the
uncertainty of the pose: covariance (2 (Jᴴ J + prior))⁻¹.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from emsplat.device import CPU
from emsplat.kernels import backend
from emsplat.maths.fourier import irfft, rfft
from emsplat.parallel import ALONE, World
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra, read_spectra
from emsplat.sums.window import polynomials_on
from emsplat.types import Grid, Optics, Poses

_CHUNK = 512  # images in memory at once
_STEPS = 12
_ENOUGH = 2e-2  # nats that a further step would gain
_LONGEST = 0.15  # rad, of one step
_NOTHING = 1e-12
_MANY = 48  # cycles per box, from which on one look at all frequencies takes a good part of a millisecond
_OFF = 1.5  # cycles that a turn moves the finest frequencies by: from here on the lower half saves more than it costs


@dataclass(frozen=True)
class Prior:
    """How far poses may be from where they were given: standard deviations about each axis and along x and y."""

    turn: float  # rad
    shift: float  # Å

    @property
    def precision(self) -> tuple[float, float]:
        """Of turn and shift: one over twice the variance."""
        turn, shift = (0.5 / max(value, 1e-6) ** 2 for value in (self.turn, self.shift))
        return turn, shift


_NUMBERS = ("hessian", "before", "after", "given", "looks", "power")
NO_PRIOR = Prior(math.inf, math.inf)


@dataclass(frozen=True)
class Reference:
    """A map that images are compared with, up to ``lattice.radius`` cycles per box."""

    lattice: Lattice
    volume: Float[Tensor, "z y x"]  # on the voxels of the lattice
    grid: Grid  # of the map it was made from
    device: torch.device = CPU  # where poses are compared

    @cached_property
    def space(self) -> Complex[Tensor, "Z Y X"]:
        """Its transform on the device, ready to be sliced."""
        space: Tensor = self.lattice.half_space(self.volume).to(self.device)
        return space

    @cached_property
    def field(self) -> Float[Tensor, "Z Y X p"]:
        """The same as a field of `Lattice.slices`."""
        return self.lattice.field(self.volume[None])


def make_reference(
    volume: Float[Tensor, "z y x"],
    grid: Grid,
    radius: int,
    filtered: Float[Tensor, " s"] | None = None,
    device: torch.device = CPU,
) -> Reference:
    """A map on ``grid`` as a reference up to ``radius`` cycles per box; ``filtered`` are factors of its shells.

    What images say of their poses is worked out on ``device``, all else on the CPU.
    """
    lattice = Lattice(radius)
    spectrum = rfft(volume.cpu(), 3)
    if filtered is not None:
        shells = torch.arange(len(filtered), dtype=torch.float64)
        size = grid.size
        axis = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
        away = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis[: size // 2 + 1].abs() ** 2).sqrt()
        # Between shells linearly: steps of a filter would ring.
        low = away.long().clamp(max=len(shells) - 1)
        rest = (away - low).clamp(0, 1)
        high = (low + 1).clamp(max=len(shells) - 1)
        spectrum = spectrum * ((1 - rest) * filtered[low] + rest * filtered[high]).float()
    return Reference(lattice, irfft(resized(spectrum, lattice.size), 3), grid, device)


def resized(spectrum: Complex[Tensor, "z y k"], size: int) -> Complex[Tensor, "Z Y K"]:
    """The transform of the same map on ``size`` voxels of the box, which holds the frequencies that both grids carry;
    sums over voxels stay, not grey values."""
    old = len(spectrum)
    half = min(old, size) // 2
    wide: Tensor = spectrum.new_zeros(size, size, size // 2 + 1)
    places = torch.arange(1 - half, half)
    rows = places[:, None, None], places[:, None], places[places >= 0]
    wide[rows[0] % size, rows[1] % size, rows[2]] = spectrum[rows[0] % old, rows[1] % old, rows[2]]
    return wide


@dataclass(frozen=True)
class Placed:
    """Where images were found, one row each."""

    poses: Poses  # float64
    hessian: Float[Tensor, "p 5 5"]  # Jᴴ J: turns about x, y, z of the image (rad), shifts along x, y (Å)
    before: Float[Tensor, " p"]  # log p(y | pose) - log p(y | no particle) at the start, nats
    after: Float[Tensor, " p"]  # where it was found
    given: Float[Tensor, " p"]  # and in the middle of the prior
    looks: Int[Tensor, " p"]  # how often the image was compared
    power: Float[Tensor, " p"]  # Σ |C P|²: the mean of `after` where the reference is right

    def covariance(self, prior: Prior) -> Float[Tensor, "p 5 5"]:
        """Of turn and shift, under a prior."""
        turn, shift = prior.precision
        own = torch.diag(torch.tensor([turn] * 3 + [shift] * 2, dtype=torch.float64) + _NOTHING)
        covariance: Tensor = torch.linalg.inv(2 * (self.hessian + own))
        return covariance

    def uncertainty(self, prior: Prior, length: float) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
        """Standard deviations about an axis (degrees) and along one (Å), in the mean of the axes; at most half a turn
        and the ``length`` of the box."""
        variance = torch.diagonal(self.covariance(prior), dim1=1, dim2=2)
        turn, shift = variance[:, :3].mean(1).sqrt(), variance[:, 3:].mean(1).sqrt()
        return torch.rad2deg(turn).clamp(max=180.0), shift.clamp(max=length)

    def take(self, rows: Int[Tensor, " q"]) -> Placed:
        """Some of the images."""
        return Placed(self.poses[rows], *(getattr(self, name)[rows] for name in _NUMBERS))

    def with_rows(self, rows: Int[Tensor, " q"], other: Placed) -> Placed:
        """With others in the place of these rows."""
        poses = Poses(
            *(getattr(self.poses, n).index_copy(0, rows, getattr(other.poses, n)) for n in ("rotation", "shift"))
        )
        return Placed(poses, *(getattr(self, name).index_copy(0, rows, getattr(other, name)) for name in _NUMBERS))

    @classmethod
    def joined(cls, parts: list[Placed], order: Int[Tensor, " p"]) -> Placed:
        """Several one after the other, in another order."""
        return cls(
            Poses(*(torch.cat([getattr(p.poses, name) for p in parts])[order] for name in ("rotation", "shift"))),
            *(torch.cat([getattr(p, name) for p in parts])[order] for name in _NUMBERS),
        )

    @classmethod
    def gathered(cls, parts: list[Placed], rows: Int[Tensor, " q"], count: int, world: World) -> Placed:
        """What the processes of a ``world`` have found for their own ``rows`` of ``count``, in all of them."""
        own = cls.joined([_nothing_placed(), *parts], torch.arange(len(rows)))
        return cls(
            Poses(*(world.gathered(getattr(own.poses, name), rows, count) for name in ("rotation", "shift"))),
            *(world.gathered(getattr(own, name), rows, count) for name in _NUMBERS),
        )


def _nothing_placed() -> Placed:
    none = torch.zeros(0, dtype=torch.float64)
    return Placed(Poses(none.view(0, 3, 3), none.view(0, 2)), none.view(0, 5, 5), none, none, none, none.long(), none)


@dataclass(frozen=True)
class PoseViews:
    """Images with the poses that a search starts from: several poses may belong to one image."""

    spectra: Spectra  # centred by the poses of the stack
    magnification: Float[Tensor, "i 2 2"]
    image: Int[Tensor, " v"]  # int32
    rotation: Float[Tensor, "v 3 3"]  # float64
    move: Float[Tensor, "v 2"]  # of the shift, Å
    given: Float[Tensor, "v 3 3"]  # where the prior has the rotation
    origin: Float[Tensor, "v 2"]  # and the move
    length: float  # of the images' box, Å

    @property
    def are_given(self) -> Bool[Tensor, " v"]:
        """Whose search starts from the pose that was given."""
        return (self.rotation == self.given).all(2).all(1) & (self.move == self.origin).all(1)

    def take(self, views: Int[Tensor, " w"]) -> PoseViews:
        """Some of the poses."""
        own = {name: getattr(self, name)[views] for name in ("image", "rotation", "move", "given", "origin")}
        return replace(self, **own)


def descend(reference: Reference, views: PoseViews, prior: Prior, radius: float, steps: int = _STEPS) -> Placed:
    """The nearest minimum of each view; shifts of the result are moves. ``steps`` 0 looks and moves nothing."""
    spectra = views.spectra
    ratio = spectra.length / views.length  # cycles per box of the map for one of an image
    point = (spectra.within(min(radius, reference.lattice.radius)) / ratio).round().int().contiguous()
    unit = views.length / (2 * math.pi)
    turn, shift = prior.precision
    device = reference.device
    row = backend(device).place(
        reference.space,
        spectra.values.to(device),
        spectra.transfer.to(device),
        point.to(device),
        views.magnification.to(device),
        views.image.to(device),
        views.rotation.to(device),
        views.given.to(device),
        (views.move / unit).to(device),
        ((views.move - views.origin) / unit).to(device),
        polynomials_on(device),
        reference.lattice.step * ratio,
        (turn, shift * unit**2),
        steps,
        _ENOUGH,
        _LONGEST,
    )
    row = row.cpu()
    units = torch.tensor([1.0, 1.0, 1.0, unit, unit], dtype=torch.float64)
    hessian = row[:, 11:36].reshape(-1, 5, 5) / units / units[:, None]
    poses = Poses(row[:, :9].reshape(-1, 3, 3).clone(), unit * row[:, 9:11])
    before, after, looks, power = row[:, 36:].T.contiguous()
    return Placed(poses, hessian, before, after, before.clone(), looks.long(), power)


Search = Callable[[Reference, PoseViews, Prior], Placed]


def nearest(reference: Reference, views: PoseViews, prior: Prior) -> Placed:
    """`descend` with all frequencies of the reference.

    Where these are many and a pose that was given may be far off, the lower half of them leads most of the way, for a
    quarter of the work each time.
    """
    radius = reference.lattice.radius
    if radius < _MANY or prior.turn * radius < _OFF:
        return descend(reference, views, prior, radius)
    given, moved = views.are_given.nonzero()[:, 0], (~views.are_given).nonzero()[:, 0]
    parts = [_led(reference, views.take(given), prior)] if len(given) else []
    parts += [descend(reference, views.take(moved), prior, radius)] if len(moved) else []
    return Placed.joined(parts, torch.argsort(torch.cat([given, moved])))


def _led(reference: Reference, views: PoseViews, prior: Prior) -> Placed:
    """`nearest` by way of the lower half of the frequencies. Whom these lead astray goes the way of all."""
    radius = reference.lattice.radius
    start = descend(reference, views, prior, radius, steps=0)
    rough = descend(reference, views, prior, radius / 2)
    found = descend(reference, replace(views, rotation=rough.poses.rotation, move=rough.poses.shift), prior, radius)
    looks = start.looks + rough.looks + found.looks
    astray = (found.after < start.before).nonzero()[:, 0]
    if len(astray):
        own = descend(reference, views.take(astray), prior, radius)
        found = found.with_rows(astray, own)
        looks[astray] += own.looks
    return replace(found, before=start.before, given=start.given, looks=looks)


def stay(reference: Reference, views: PoseViews, prior: Prior) -> Placed:
    """Where the views are: what they say of their poses, without a step."""
    return descend(reference, views, prior, reference.lattice.radius, steps=0)


def noise_of(stack: ParticleStack) -> list[Tensor]:
    """The noise of each of the `parts` of a stack, (groups, shells), from what surrounds the particles."""
    return [estimate_noise(part) for part in stack.on(CPU).parts()]


def place(
    reference: Reference,
    stack: ParticleStack,
    given: Poses,
    prior: Prior,
    noise: list[Tensor],
    search: Search = nearest,
    told: Callable[[int], None] = lambda _: None,
    world: World = ALONE,
) -> Placed:
    """Finds the pose of each particle of a stack from that which it has, under a prior about those ``given``, on the
    device of the reference.

    ``noise`` are the spectra of its `parts`. Images are read once, some at a time; ``told`` hears how many are done.
    Processes of a ``world`` share the particles out, hear equally often, and have all poses in the end.

    Raises:
        InputError: an image cannot be used.
    """
    position = torch.full((len(stack.table),), -1)
    position[stack.rows] = torch.arange(len(stack))
    found, places, done = [], [], 0
    for part, spectrum in zip(stack.parts(), noise, strict=True):
        own, parted = part.shared(world), list[Placed]()
        for rows in world.in_step(torch.split(own, _CHUNK)):
            if rows is not None and len(rows):
                parted.append(_placed(reference, part.take(rows), given, prior, spectrum, search, position))
                done += len(rows)
            told(min(world.size * done, len(stack)))
        found.append(Placed.gathered(parted, own, len(part), world))
        places.append(position[part.rows])
    told(len(stack))  # shares may differ
    return Placed.joined(found, torch.argsort(torch.cat(places)))


def _placed(
    reference: Reference,
    stack: ParticleStack,
    given: Poses,
    prior: Prior,
    noise: Float[Tensor, "o s"],
    search: Search,
    position: Int[Tensor, " n"],
) -> Placed:
    """`place` for some particles of one grid; ``position`` says where each row of the table stands in ``given``."""
    views = views_of(reference, stack, given[position[stack.rows]], noise)
    one = search(reference, views, prior)
    if search in (nearest, stay) and bool(views.are_given.all()):
        known = one.before
    else:
        before = replace(views, rotation=views.given, move=views.origin)
        known = descend(reference, before, prior, reference.lattice.radius, steps=0).before
    moved = stack.table.poses.shift[stack.rows] + one.poses.shift
    return replace(one, poses=Poses(one.poses.rotation, moved), given=known)


def views_of(reference: Reference, stack: ParticleStack, given: Poses, noise: Float[Tensor, "o s"]) -> PoseViews:
    """The images of a stack of one grid as they are compared with a reference, each in the pose that it has."""
    spectra = read_spectra(stack.without_symmetry(), reference.lattice.radius, reference.grid, noise)
    device = reference.device
    spectra = replace(spectra, values=spectra.values.to(device), transfer=spectra.transfer.to(device))
    poses, optics = stack.table.poses[stack.rows], stack.table.optics[stack.rows]
    return PoseViews(
        spectra,
        _magnification(optics),
        torch.arange(len(stack), dtype=torch.int32),
        poses.rotation.double(),
        torch.zeros(len(stack), 2, dtype=torch.float64),
        given.rotation.double(),
        given.shift - poses.shift,
        stack.grid.length,
    )


def _magnification(optics: Optics) -> Float[Tensor, "p 2 2"]:
    if optics.aberrations is None:
        return torch.eye(2).repeat(len(optics), 1, 1)
    return optics.aberrations.magnification.float()
