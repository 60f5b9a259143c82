"""The contrast transfer function."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.fourier import frequencies
from emsplat.types import Grid, Optics


def electron_wavelength(voltage: Float[Tensor, "*p"]) -> Float[Tensor, "*p"]:
    """Relativistic wavelength in Å of electrons of ``voltage`` kV (docs/conventions.md, 7)."""
    volts = 1000 * voltage
    return 12.2643247 / torch.sqrt(volts * (1 + 0.978466e-6 * volts))


def ctf(optics: Optics, grid: Grid) -> Float[Tensor, "p y k"]:
    """Contrast transfer function of each particle in rfft order, RELION's formula and sign (docs/conventions.md, 7).

    At k = 0 it is +amplitude_contrast, so protein is bright.
    """
    ky, kx = frequencies(grid, dtype=optics.voltage.dtype)
    return ctf_at(optics, kx.to(optics.voltage.device), ky.to(optics.voltage.device))


def ctf_at(optics: Optics, kx: Float[Tensor, "..."], ky: Float[Tensor, "..."]) -> Float[Tensor, "p *k"]:
    """The same at any frequencies (1/Å), which broadcast against each other."""
    dims = (-1,) + (1,) * max(kx.dim(), ky.dim())
    column = {name: getattr(optics, name).reshape(dims) for name in optics.__dataclass_fields__}
    wavelength = electron_wavelength(column["voltage"])
    cs = 1e7 * column["cs"]
    u, v, angle = column["defocus_u"], column["defocus_v"], column["defocus_angle"]
    # k² Δf(θ) = ½(u+v) k² + ½(u-v) (cos 2α (kx²-ky²) + sin 2α 2 kx ky): no trigonometry per pixel.
    k2 = kx**2 + ky**2
    astigmatism = torch.cos(2 * angle) * (kx**2 - ky**2) + torch.sin(2 * angle) * (2 * kx * ky)
    defocus_k2 = 0.5 * (u + v) * k2 + 0.5 * (u - v) * astigmatism
    q0 = column["amplitude_contrast"]
    offset = column["phase_shift"] + torch.atan2(q0, torch.sqrt(1 - q0**2))
    gamma = math.pi * wavelength * (0.5 * cs * wavelength**2 * k2**2 - defocus_k2) - offset
    transfer: Tensor = -torch.sin(gamma) * torch.exp(-0.25 * column["b_factor"] * k2) * column["scale"]
    return transfer
