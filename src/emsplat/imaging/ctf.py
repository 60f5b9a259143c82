"""The contrast transfer function, aberrations, and what an image says once both are accounted for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from emsplat.maths.fourier import frequencies, shift_phase
from emsplat.types import PREMULTIPLIED, RAW, Aberrations, Batch, Grid, Optics

_WEAK = 1e-3  # C² below which an image that was multiplied by C is not divided by it


def electron_wavelength(voltage: Float[Tensor, "*p"]) -> Float[Tensor, "*p"]:
    """Relativistic wavelength in Å of electrons of ``voltage`` kV (docs/conventions.md, 7)."""
    volts = 1000 * voltage
    return 12.2643247 / torch.sqrt(volts * (1 + 0.978466e-6 * volts))


def ctf(optics: Optics, grid: Grid) -> Float[Tensor, "p y k"]:
    """Contrast transfer function of each particle in rfft order, RELION's formula and sign (docs/conventions.md, 7).

    At k = 0 it is +amplitude_contrast, so protein is bright. Even aberrations and anisotropic magnification are in it;
    odd ones turn the image instead (`observe`).
    """
    ky, kx = frequencies(grid, dtype=optics.voltage.dtype, device=optics.voltage.device)
    return ctf_at(optics, kx, ky)


def ctf_at(optics: Optics, kx: Float[Tensor, "..."], ky: Float[Tensor, "..."]) -> Float[Tensor, "p *k"]:
    """The same at any frequencies (1/Å), which broadcast against each other."""
    x, y = _stacked(kx, ky)
    squares = torch.stack([x * x, 2 * x * y, y * y])
    wavelength = electron_wavelength(optics.voltage)
    half_pi = math.pi * wavelength / 2
    mean, spread = half_pi * (optics.defocus_u + optics.defocus_v), half_pi * (optics.defocus_u - optics.defocus_v)
    along, across = spread * torch.cos(2 * optics.defocus_angle), spread * torch.sin(2 * optics.defocus_angle)
    # πλ k² Δf(θ) = form · (kx², 2 kx ky, ky²): no trigonometry per pixel, and one operation for all particles.
    form = torch.stack([mean + along, across, mean - along], 1)
    k2 = squares[0] + squares[2]
    offset = _phase_offset(optics)
    if optics.aberrations is not None:
        form, metric = _distorted(form, optics.aberrations.magnification)
        k2 = torch.tensordot(metric, squares, 1)
    phase = torch.addmm(offset[:, None], form, squares.reshape(3, -1)).reshape(-1, *squares.shape[1:])

    def column(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (squares.dim() - 1))

    phase.addcmul_(column(half_pi * 1e7 * optics.cs * wavelength**2), k2**2, value=-1)
    if optics.aberrations is not None:
        phase -= zernike_phase(optics.aberrations, kx, ky, odd=False)
    transfer: Tensor = phase.sin_().mul_(torch.exp(column(-0.25 * optics.b_factor) * k2)).mul_(column(optics.scale))
    return transfer


def _distorted(
    form: Float[Tensor, "p 3"], magnification: Float[Tensor, "p 2 2"]
) -> tuple[Float[Tensor, "p 3"], Float[Tensor, "p 3"]]:
    """Mᵀ F M for quadratic forms F given as (xx, xy, yy), and Mᵀ M."""
    whole = torch.stack([form[:, :2], form[:, 1:]], 1)
    seen = [magnification.mT @ whole @ magnification, magnification.mT @ magnification]
    through, metric = (torch.stack([m[:, 0, 0], m[:, 0, 1], m[:, 1, 1]], 1) for m in seen)
    return through, metric


def _phase_offset(optics: Optics) -> Float[Tensor, " p"]:
    q0 = optics.amplitude_contrast
    return optics.phase_shift + torch.atan2(q0, torch.sqrt(1 - q0**2))


def _undistorted(aberrations: Aberrations, kx: Tensor, ky: Tensor) -> tuple[Float[Tensor, "p *k"], ...]:
    """M k for each particle."""
    rows = torch.einsum("pij,j...->pi...", aberrations.magnification, _stacked(kx, ky))
    return rows[:, 0], rows[:, 1]


def _stacked(kx: Tensor, ky: Tensor) -> Float[Tensor, "2 *k"]:
    return torch.stack([kx + torch.zeros_like(ky), ky + torch.zeros_like(kx)])


def zernike_phase(
    aberrations: Aberrations, kx: Float[Tensor, "..."], ky: Float[Tensor, "..."], *, odd: bool
) -> Float[Tensor, "p *k"]:
    """Phase in rad of the odd or even aberrations of each particle at frequencies of the image (1/Å)."""
    coefficients = aberrations.odd if odd else aberrations.even
    phase = coefficients.new_zeros(len(coefficients), *_stacked(kx, ky).shape[1:])
    if not coefficients.shape[1]:
        return phase
    if coefficients.device.type != "cpu":
        # To find out which particles share M would make the host wait, and the device has flops to spare.
        kx_true, ky_true = _undistorted(aberrations, kx, ky)
        for index, column in enumerate(coefficients.unbind(1)):
            value = zernike(index, kx_true, ky_true, odd=odd)
            phase.addcmul_(value, column.reshape(-1, *[1] * (value.dim() - 1)))
        return phase
    kinds, kind = torch.unique(aberrations.magnification, dim=0, return_inverse=True)
    for number, magnification in enumerate(kinds):
        # Particles of an optics group share M, so the polynomials are worked out once for all of them.
        kx_true, ky_true = torch.einsum("ij,j...->i...", magnification, _stacked(kx, ky))
        basis = torch.stack([zernike(index, kx_true, ky_true, odd=odd) for index in range(coefficients.shape[1])])
        phase[kind == number] = torch.einsum("pa,a...->p...", coefficients[kind == number], basis)
    return phase


def zernike(index: int, x: Float[Tensor, "*k"], y: Float[Tensor, "*k"], *, odd: bool) -> Float[Tensor, "*k"]:
    """Zernike polynomial R_n^|m|(ρ) cos mφ, or sin |m|φ for m < 0, in the order of RELION's rlnOddZernike and
    rlnEvenZernike: by n, then by m in steps of 2 from -n; n odd, or even from 0 (docs/conventions.md, 7)."""
    n, before = (1, 0) if odd else (0, 0)
    while index - before > n:
        n, before = n + 2, before + n + 1
    m = 2 * (index - before) - n
    order = abs(m)
    angular = torch.complex(x, y) ** order
    rho2 = x**2 + y**2
    radial = torch.zeros_like(rho2)
    for s in range((n - order) // 2 + 1):
        factor = math.factorial
        size = factor(n - s) / (factor(s) * factor((n + order) // 2 - s) * factor((n - order) // 2 - s))
        radial = radial + (-1) ** s * size * rho2 ** ((n - order) // 2 - s)
    value: Tensor = radial * (angular.imag if m < 0 else angular.real)
    return value


def beam_tilt(
    tilt: Float[Tensor, "p 2"], voltage: Float[Tensor, " p"], cs: Float[Tensor, " p"]
) -> Float[Tensor, "p 6"]:
    """Odd Zernike coefficients of a beam tilt (x, y) in mrad: the phase -2π Cs λ² k² (tx kx + ty ky) 1e-3, which is
    coma Z(3, ±1) with two parts of Z(1, ±1) (docs/conventions.md, 7)."""
    x, y = (-2e4 * math.pi / 3 * cs * electron_wavelength(voltage) ** 2 * t for t in tilt.unbind(1))
    none = torch.zeros_like(x)
    return torch.stack([2 * y, 2 * x, none, y, x, none], 1)


def tilt_of_coma(
    odd: Float[Tensor, "p k"], voltage: Float[Tensor, " p"], cs: Float[Tensor, " p"]
) -> tuple[Float[Tensor, "p 2"], Float[Tensor, "p j"]]:
    """Undoes `beam_tilt`: the tilts (x, y) in mrad whose coma odd Zernike coefficients hold, and the coefficients
    without them, at least six. Without spherical aberration there are none, and coma stays where it is."""
    odd = torch.nn.functional.pad(odd, (0, max(0, 6 - odd.shape[1])))
    unit = beam_tilt(torch.ones_like(odd[:, :2]), voltage, cs)[:, 3:5]
    tilt = torch.where(unit != 0, odd[:, 3:5] / unit, 0.0).flip(1)  # Z(3, -1) is the y component
    rest = odd - torch.nn.functional.pad(beam_tilt(tilt, voltage, cs), (0, odd.shape[1] - 6))
    rest[:, 3:5] = torch.where(unit != 0, 0.0, odd[:, 3:5])  # exactly
    return tilt, rest


def in_image(rotation: Float[Tensor, "p 3 3"], optics: Optics) -> Float[Tensor, "p 3 3"]:
    """Matrices whose first two rows lead into the images as they were recorded: rotations, or with anisotropic
    magnification M no longer such.

    Frequency k of the image lies at Aᵀ M k of the volume, so x and y of the image are Mᵀ times those of A p. Shifts are
    those of the image, whatever M.
    """
    if optics.aberrations is None:
        return rotation
    seen = optics.aberrations.magnification.mT @ rotation[:, :2]
    return torch.cat([seen, rotation[:, 2:]], 1)


def stretch_of(seen: Float[Tensor, "p r d"]) -> Float[Tensor, ""]:
    """The largest factor by which the first two rows of matrices (`in_image`, or magnifications transposed) stretch a
    frequency of an image; 1 for rotations, which no further rotation of the object changes."""
    x, y = seen[:, 0], seen[:, 1]
    xx, xy, yy = (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)
    largest = 0.5 * (xx + yy) + torch.hypot(0.5 * (xx - yy), xy)  # eigenvalue of the rows' inner products
    return largest.max().sqrt().clamp(min=1.0)


@dataclass(frozen=True)
class Observed:
    """A batch as a model is compared with it: its transforms, and the real factor between a projection and them."""

    spectrum: Complex[Tensor, "p y k"]
    transfer: Float[Tensor, "p y k"]


def observe(batch: Batch, grid: Grid, *, corner: bool = False) -> Observed:
    """Transforms of a batch with particles moved to the centre and odd aberrations undone, and their CTFs.

    The origin is the centre pixel, or with ``corner`` the first one, as in a plain transform of a centred image.
    Phase-flipped images have |C| for a transfer function.
    """
    spectrum: Tensor = torch.fft.rfft2(batch.images)
    spectrum.mul_(shift_phase(batch.poses.shift, grid, centring=not corner))
    transfer = ctf(batch.optics, grid)
    aberrations, treatment = batch.optics.aberrations, batch.optics.treatment
    if aberrations is not None and aberrations.odd.shape[1]:
        ky, kx = frequencies(grid, dtype=transfer.dtype, device=transfer.device)
        phase = zernike_phase(aberrations, kx, ky, odd=True)
        spectrum.mul_(torch.polar(torch.ones_like(phase), -phase))
    if treatment is not None:
        transfer = torch.where((treatment == RAW)[:, None, None], transfer, transfer.abs())
    return Observed(spectrum, transfer)


def flipped_from_multiplied(images: Float[Tensor, "p y x"], optics: Optics, grid: Grid) -> Float[Tensor, "p y x"]:
    """Images that were multiplied by their CTF as if they had only been phase-flipped, others as they are.

    C (C P + n) divided by |C| is |C| P ± n, with noise that is white again. Where C is almost 0 a quotient of small
    numbers tells nothing, and 0 is put; such coefficients count by C² later.
    """
    if optics.treatment is None or not (multiplied := optics.treatment == PREMULTIPLIED).any():
        return images
    strength = ctf(optics[multiplied], grid).abs()
    factor = torch.where(strength**2 > _WEAK, 1 / strength, 0.0)
    images[multiplied] = torch.fft.irfft2(torch.fft.rfft2(images[multiplied]) * factor, s=images.shape[-2:])
    return images
