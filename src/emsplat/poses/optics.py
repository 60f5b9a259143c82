"""Defocus, grey scale and B factor of single images, at their poses, against slices of a map.

With q = Re ȳ P and p = |P|² an image says of a contrast transfer function C: log p(y|C) = Σ 2 C q - C² p. A change δ of
the defocus turns the phase of C by πλk²δ; scale and B factor multiply C by exp(u - B k²/4). Each has a normal prior
about what it was, as wide as the images themselves show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.imaging.ctf import ctf_at, electron_wavelength
from emsplat.parallel import ALONE, World
from emsplat.particles.stack import ParticleStack
from emsplat.poses.local import Reference
from emsplat.sums.spectra import Spectra, read_spectra, whitening
from emsplat.types import RAW, Optics

_CHUNK = 256
_SAMPLE = 400
_STEPS = 12
_SCAN = 25  # values of the defocus that are tried
_REACH = 3.0  # of its widths that they span
_WIDE = (800.0, 0.5, 100.0)  # priors that hardly hold: defocus (Å), ln scale, B factor (Å²)
# Of EM: at most, and the part of the variances that an iteration changes in the end. It creeps: a larger one would
# leave the result to how often rounding lets it go on.
_ITERATIONS, _SETTLED = 1000, 1e-5
_LEAST = 1e-6


@dataclass(frozen=True)
class Spread:
    """Standard deviations of what was given, of each image about its own, and what all have in common: a reference that
    is smoother than the images, or a defocus that is wrong for all, is no difference between images."""

    defocus: float  # Å
    scale: float  # of ln scale
    b_factor: float  # Å²
    common: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the same


WIDE = Spread(*_WIDE)


@dataclass(frozen=True)
class Changes:
    """What the images say should be added to what was given, with the precision of the data alone."""

    defocus: Float[Tensor, " p"]  # Å
    logscale: Float[Tensor, " p"]
    b_factor: Float[Tensor, " p"]  # Å²
    defocus_precision: Float[Tensor, " p"]
    strength_precision: Float[Tensor, "p 2 2"]  # of ln scale and B factor

    @classmethod
    def joined(cls, parts: list[Changes]) -> Changes:
        """Several one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    @classmethod
    def gathered(cls, parts: list[Changes], rows: Int[Tensor, " q"], count: int, world: World) -> Changes:
        """What the processes of a ``world`` have found for their own ``rows`` of ``count``, in all of them."""
        none = torch.zeros(0, dtype=torch.float64)
        own = cls.joined([cls(none, none, none, none, none.view(0, 2, 2)), *parts])
        return cls(*(world.gathered(getattr(own, name), rows, count) for name in cls.__dataclass_fields__))


def refine_optics(
    reference: Reference,
    stack: ParticleStack,
    noise: list[Tensor],
    *,
    defocus: bool,
    strength: bool,
    told: Callable[[int], None] = lambda _: None,
    world: World = ALONE,
) -> tuple[Optics, Spread]:
    """The optics of the particles of a stack, refined at the poses that they have, and how wide the changes are.

    ``noise`` are the spectra of its `parts`; ``strength`` is scale and B factor. Means over all stay, of the scale
    those over each part. Processes of a ``world`` share the particles out, hear equally often, and have all in the end.

    Raises:
        InputError: an image cannot be used.
    """
    optics = stack.table.optics[stack.rows]
    position = torch.full((len(stack.table),), -1)
    position[stack.rows] = torch.arange(len(stack))
    parts = list(zip(stack.parts(), noise, strict=True))

    def asked(some: ParticleStack, spectrum: Tensor, spread: Spread, before: int | None = None) -> Changes:
        """Of particles of one grid; ``before`` are done, where these count."""
        own, its, done = some.shared(world), list[Changes](), 0
        for rows in world.in_step(torch.split(own, _CHUNK)):
            if rows is not None and len(rows):
                chosen = some.take(rows)
                its.append(changes_of(reference, chosen, spectrum, spread, defocus=defocus, strength=strength))
                done += len(rows)
            if before is not None:
                told(before + min(world.size * done, len(some)))
        return Changes.gathered(its, own, len(some), world)

    sampled = [asked(part.take(_evenly(len(part), _SAMPLE)), spectrum, WIDE) for part, spectrum in parts]
    spread = estimate_spread(Changes.joined(sampled))
    found, places = list[Changes](), list[Tensor]()
    for part, spectrum in parts:
        found.append(asked(part, spectrum, spread, sum(map(len, places))))
        places.append(position[part.rows])
    # A common factor is the map's, or that of a grid's grey values; a common defocus is hardly told from it.
    found = [replace(own, logscale=own.logscale - own.logscale.mean()) for own in found]
    changes, order = Changes.joined(found), torch.argsort(torch.cat(places))
    moved, logscale, b_factor = (x[order] for x in (changes.defocus, changes.logscale, changes.b_factor))
    moved, b_factor = moved - moved.mean(), b_factor - b_factor.mean()
    changed = replace(
        optics,
        defocus_u=optics.defocus_u + moved,
        defocus_v=optics.defocus_v + moved,
        scale=optics.scale * logscale.exp(),
        b_factor=optics.b_factor + b_factor,
    )
    return changed, spread


def _evenly(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(most, count)).long()


def estimate_spread(changes: Changes) -> Spread:
    """How wide the changes of all are about their mean, beyond what noise makes of them, by EM from changes under
    `WIDE`."""
    defocus, scale, b_factor = (width**2 for width in _WIDE)
    middle, centre = 0.0, torch.zeros(2, dtype=torch.float64)
    known = torch.stack([changes.logscale, changes.b_factor], 1)
    # Back from the posterior under the wide prior to what the data alone say.
    wide = torch.diag(1 / torch.tensor([scale, b_factor], dtype=torch.float64))
    own = changes.strength_precision
    linear = ((own + wide) @ known[..., None]).squeeze(-1)
    first = (changes.defocus_precision + 1 / defocus) * changes.defocus
    for _ in range(_ITERATIONS):
        before = torch.tensor([defocus, scale, b_factor], dtype=torch.float64)
        precision = changes.defocus_precision + 1 / defocus
        moved = (first + middle / defocus) / precision
        middle = float(moved.mean())
        defocus = max(float(((moved - middle).square() + 1 / precision).mean()), _LEAST)
        prior = torch.diag(1 / torch.tensor([scale, b_factor], dtype=torch.float64))
        covariance = torch.linalg.inv(own + prior)
        mean = (covariance @ (linear + prior @ centre)[..., None]).squeeze(-1)
        centre = mean.mean(0)
        second = ((mean - centre).square() + torch.diagonal(covariance, dim1=1, dim2=2)).mean(0)
        scale, b_factor = (max(float(value), _LEAST) for value in second)
        after = torch.tensor([defocus, scale, b_factor], dtype=torch.float64)
        if bool(((after - before).abs() < _SETTLED * before).all()):
            break
    return Spread(
        math.sqrt(defocus), math.sqrt(scale), math.sqrt(b_factor), (middle, float(centre[0]), float(centre[1]))
    )


def changes_of(
    reference: Reference,
    stack: ParticleStack,
    noise: Float[Tensor, "o s"],
    spread: Spread,
    *,
    defocus: bool = True,
    strength: bool = True,
) -> Changes:
    """The most likely changes of the images of a stack of one grid under a prior."""
    spectra = read_spectra(stack.without_symmetry(), reference.lattice.radius, reference.grid, noise)
    optics = stack.table.optics[stack.rows]
    slices = reference.lattice.slices(reference.volume[None], spectra, reference.field)[:, 0]
    cross = (spectra.values.conj() * slices).real.double()
    power = slices.abs().square().double()
    ratio = reference.grid.length / stack.grid.length
    whitened = whitening(noise, spectra.frequency, ratio, stack.grid.size)[stack.table.optics_group[stack.rows]]
    curve = _Curve.of(optics, spectra, whitened.double())
    nothing = torch.zeros(len(stack), dtype=torch.float64)
    moved, precision = _best_defocus(curve, cross, power, spread) if defocus else (nothing, nothing)
    transfer = curve.at(moved)
    if not strength:
        return Changes(moved, nothing, nothing, precision, torch.zeros(len(stack), 2, 2, dtype=torch.float64))
    logscale, b_factor, both = _best_strength(transfer * cross, transfer.square() * power, curve.squared / 4, spread)
    return Changes(moved, logscale, b_factor, precision, both)


@dataclass(frozen=True)
class _Curve:
    """Contrast transfer functions, in units of the noise, as functions of a change of defocus."""

    sine: Float[Tensor, "p k"]
    cosine: Float[Tensor, "p k"]
    rate: Float[Tensor, "p k"]  # πλk², rad/Å
    squared: Float[Tensor, "p k"]  # k² in 1/Å², of the undistorted image
    positive: Bool[Tensor, "p 1"]  # whether the images are phase-flipped

    @classmethod
    def of(cls, optics: Optics, spectra: Spectra, whitened: Float[Tensor, "p k"]) -> _Curve:
        kx, ky = (spectra.frequency.double() / spectra.length).T
        sine = ctf_at(optics, kx, ky)
        cosine = ctf_at(replace(optics, phase_shift=optics.phase_shift + math.pi / 2), kx, ky)
        k = torch.stack([kx, ky])
        if optics.aberrations is not None:
            squared = (optics.aberrations.magnification @ k).square().sum(1)
        else:
            squared = k.square().sum(0).expand(len(optics), -1)
        rate = math.pi * electron_wavelength(optics.voltage)[:, None] * squared
        flipped = torch.zeros(len(optics), 1, dtype=torch.bool)
        if optics.treatment is not None:
            flipped = (optics.treatment != RAW)[:, None]
        return cls(sine * whitened, cosine * whitened, rate, squared, flipped)

    def at(self, defocus: Float[Tensor, " p"]) -> Float[Tensor, "p k"]:
        return self.both(defocus)[0]

    def both(self, defocus: Float[Tensor, " p"]) -> tuple[Float[Tensor, "p k"], Float[Tensor, "p k"]]:
        """The function, and its derivative by the defocus."""
        phase = self.rate * defocus[:, None]
        sine, cosine = phase.sin(), phase.cos()
        value = self.sine * cosine + self.cosine * sine
        slope = self.rate * (self.cosine * cosine - self.sine * sine)
        sign = torch.where(self.positive & (value < 0), -1.0, 1.0)
        return sign * value, sign * slope


def _best_defocus(
    curve: _Curve, cross: Float[Tensor, "p k"], power: Float[Tensor, "p k"], spread: Spread
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """The most likely change within some widths, whatever the grey scale: the best of a scan, then Gauss-Newton; with
    the data's precision.

    Below the first maximum of the function more defocus is more signal. With the scale free (its best value put in) a
    faint reference is not mistaken for it.
    """
    width, middle = spread.defocus, spread.common[0]

    def gain(change: Tensor) -> Tensor:
        transfer = curve.at(change)
        seen, shown = (transfer * cross).sum(1), (transfer.square() * power).sum(1)
        return seen.clamp(min=0).square() / shown.clamp(min=1e-30) - 0.5 * ((change - middle) / width) ** 2

    scanned = middle + torch.linspace(-_REACH * width, _REACH * width, _SCAN, dtype=torch.float64)
    tried = torch.stack([gain(value.expand(len(cross))) for value in scanned], 1)
    change = scanned[tried.argmax(1)]
    precision = torch.zeros_like(change)
    longest = 2 * _REACH * width / _SCAN
    for _ in range(_STEPS):
        transfer, slope = curve.both(change)
        shown = (transfer.square() * power).sum(1).clamp(min=1e-30)
        scale = ((transfer * cross).sum(1) / shown).clamp(min=0)[:, None]
        across = (slope * transfer * power).sum(1)
        precision = 2 * scale[:, 0] ** 2 * ((slope.square() * power).sum(1) - across.square() / shown)
        force = 2 * (scale * slope * (cross - scale * transfer * power)).sum(1) - (change - middle) / width**2
        step = force / (precision + 1 / width**2)
        change = (change + step.clamp(-longest, longest)).clamp(middle - _REACH * width, middle + _REACH * width)
    return change, precision


def _best_strength(
    cross: Float[Tensor, "p k"], power: Float[Tensor, "p k"], square: Float[Tensor, "p k"], spread: Spread
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"], Float[Tensor, "p 2 2"]]:
    """The most likely ln scale and B factor by Gauss-Newton, and the data's precision of both."""
    prior = torch.diag(1 / torch.tensor([spread.scale, spread.b_factor], dtype=torch.float64).square())
    middle = torch.tensor(spread.common[1:], dtype=torch.float64)
    value = middle.expand(len(cross), -1)
    precision = torch.zeros(len(cross), 2, 2, dtype=torch.float64)
    limit = 4 * torch.tensor([spread.scale, spread.b_factor], dtype=torch.float64)
    for _ in range(_STEPS):
        factor = (value[:, :1] - value[:, 1:] * square).exp()
        rest, own = 2 * factor * (cross - factor * power), 2 * factor.square() * power
        slope = torch.stack([rest.sum(1), -(square * rest).sum(1)], 1) - (value - middle) @ prior
        mixed = -(square * own).sum(1)
        rows = [own.sum(1), mixed, mixed, (square.square() * own).sum(1)]
        precision = torch.stack(rows, 1).reshape(-1, 2, 2)
        step = torch.linalg.solve(precision + prior, slope[..., None]).squeeze(-1)
        step = torch.maximum(torch.minimum(step, limit / 4), -limit / 4)
        value = torch.maximum(torch.minimum(value + step, middle + limit), middle - limit)
    return value[:, 0], value[:, 1], precision
