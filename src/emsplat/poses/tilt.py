"""The beam tilt of optics groups, at the poses of their images, against slices of maps.

A beam tilt t and a common move d turn the phases of all images of a group alike: y = C P e^{iφ} + n with
φ = t·u(k) + 2π k·d, u the phase of a unit of tilt. The log-likelihood of a group is then a function of few numbers,

    L(t, d) = 2 Re Σ q(k) e^{iφ(k)} + const,   q(k) = Σ ȳ C P over its images,

so that images are read once, whatever steps are taken. Gradient and Hessian are those of L itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from emsplat.imaging.ctf import beam_tilt, zernike_phase
from emsplat.parallel import ALONE, World
from emsplat.particles.copies import image_numbers
from emsplat.particles.stack import ParticleStack
from emsplat.poses.local import Reference
from emsplat.sums.spectra import frequencies_within, read_spectra
from emsplat.types import Aberrations, Optics

_CHUNK = 512
_STEPS = 30
_ENOUGH = 1e-6  # of the standard error: a step that is none
_STIFFER, _SOFTER, _FIRST = 8.0, 0.2, 1e-3  # Levenberg's damping


@dataclass(frozen=True)
class PhaseSums:
    """What the images of an optics group say of phases that they share."""

    basis: Float[Tensor, "4 k"]  # rad per mrad of tilt x, y and per Å of move x, y; float64
    cross: Complex[Tensor, " k"]  # q, complex128


@dataclass(frozen=True)
class Tilt:
    """A beam tilt that is to be added, and the move that goes with it."""

    tilt: Float[Tensor, "2"]  # mrad
    move: Float[Tensor, "2"]  # Å
    error: Float[Tensor, "2"]  # mrad, standard deviation
    gain: float  # nats, of all images of the group


def phase_sums(
    reference: Reference,
    stack: ParticleStack,
    noise: list[Tensor],
    told: Callable[[int], None] = lambda _: None,
    world: World = ALONE,
    *,
    among: ParticleStack | None = None,
) -> dict[int, list[PhaseSums]]:
    """Of each optics group, one for each grid that its images have; ``noise`` are the spectra of the `parts`. An image
    counts once, however many rows name it here or, where this is a part of others, ``among`` these. Processes of a
    ``world`` share the images out, hear equally often, and have the sums of all.

    Raises:
        InputError: an image cannot be used.
    """
    found: dict[int, list[PhaseSums]] = {}
    done = 0
    named = (among or stack).rows
    number, weight = image_numbers(stack.table.take(named)), torch.zeros(len(stack.table))
    weight[named] = 1 / torch.bincount(number)[number]
    for part, spectrum in zip(stack.parts(), noise, strict=True):
        groups, mine = part.table.optics_group[part.rows], part.shared(world)
        length = reference.grid.length
        frequency, _ = frequencies_within(reference.lattice.radius, part, reference.grid)
        for group in torch.unique(groups).tolist():
            cross = torch.zeros(len(frequency), dtype=torch.complex128)
            for rows in world.in_step(torch.split(mine[groups[mine] == group], _CHUNK)):
                if rows is not None and len(rows):
                    own = part.take(rows).without_symmetry()
                    spectra = read_spectra(own, reference.lattice.radius, reference.grid, spectrum)
                    slices = reference.lattice.slices(reference.volume[None], spectra, reference.field)[:, 0]
                    each = (spectra.values.conj() * spectra.transfer * slices).to(torch.complex128)
                    cross += (weight[own.rows, None] * each).sum(0)
                    done += len(rows)
                told(min(world.size * done, len(stack)))
            world.sum_(cross)
            first = part.table.optics[part.rows[(groups == group).nonzero()[:1, 0]]]
            found.setdefault(group, []).append(PhaseSums(_basis(first, frequency.double() / length), cross))
    return found


def _basis(optics: Optics, frequency: Float[Tensor, "k 2"]) -> Float[Tensor, "4 k"]:
    """Phases of one mrad of tilt and of one Å of move at frequencies in 1/Å; ``optics`` of one particle."""
    kx, ky = frequency.T
    matrix = torch.eye(2, dtype=torch.float64)[None] if optics.aberrations is None else optics.aberrations.magnification
    none = torch.zeros(1, 0, dtype=torch.float64)
    tilts = [
        zernike_phase(Aberrations(matrix, beam_tilt(unit[None], optics.voltage, optics.cs), none), kx, ky, odd=True)[0]
        for unit in torch.eye(2, dtype=torch.float64)
    ]
    return torch.stack([*tilts, 2 * math.pi * kx, 2 * math.pi * ky])


def phase_likelihood(
    sums: list[PhaseSums], values: Float[Tensor, "4"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "4"], Float[Tensor, "4 4"]]:
    """L, its gradient, and minus its Hessian."""
    total, slope, curve = torch.zeros((), dtype=torch.float64), torch.zeros(4).double(), torch.zeros(4, 4).double()
    for own in sums:
        turned = own.cross * torch.polar(torch.ones(len(own.cross)).double(), values @ own.basis)
        total = total + 2 * turned.real.sum()
        slope = slope - 2 * own.basis @ turned.imag
        curve = curve + 2 * (own.basis * turned.real) @ own.basis.T
    return total, slope, curve


def solve_tilt(sums: list[PhaseSums]) -> Tilt:
    """The most likely beam tilt, by Levenberg's steps from none."""
    values, damping = torch.zeros(4, dtype=torch.float64), _FIRST
    start, slope, curve = phase_likelihood(sums, values)
    now = start
    for _ in range(_STEPS):
        # In units in which the diagonal is 1. Where L is not concave a step along its eigenvectors still climbs.
        unit = curve.diagonal().abs().clamp(min=1e-30).sqrt()
        power, axes = torch.linalg.eigh(curve / unit / unit[:, None])
        step = axes @ ((axes.T @ (slope / unit)) / (power.abs().clamp(min=1e-9) * (1 + damping))) / unit
        after, new_slope, new_curve = phase_likelihood(sums, values + step)
        if after < now:
            damping *= _STIFFER
            continue
        values, now, slope, curve, damping = values + step, after, new_slope, new_curve, damping * _SOFTER
        if float((step.square() * curve.diagonal().abs()).max()) < _ENOUGH**2:
            break
    covariance = torch.linalg.pinv(curve, hermitian=True)
    return Tilt(values[:2], values[2:], covariance.diagonal()[:2].clamp(min=0).sqrt(), float(now - start))


def tilted(optics: Optics, tilt: Float[Tensor, "p 2"]) -> Aberrations:
    """The aberrations of particles with a further beam tilt of each (mrad)."""
    bent = optics.aberrations
    if bent is None:
        none = torch.zeros(len(optics), 0, dtype=torch.float64)
        bent = Aberrations(torch.eye(2, dtype=torch.float64).repeat(len(optics), 1, 1), none, none)
    more = beam_tilt(tilt.double(), optics.voltage, optics.cs)
    odd = pad(bent.odd, (0, max(0, more.shape[1] - bent.odd.shape[1])))
    return replace(bent, odd=odd + pad(more, (0, odd.shape[1] - more.shape[1])))
