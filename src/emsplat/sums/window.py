"""The window that spreads Fourier coefficients over voxels, and its transform, by which maps are divided."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

PADDING = 1.5


TAPS, DEGREE = 4, 7  # as in native/kernels.hpp


REACH = 0.75  # of the box: where the kernel ends


FADE = 0.6  # of the box: from here on it is faded out, since the window hardly carries it there


def kernel_reach(size: int) -> int:
    """R, where the kernel of `NormalEquations` ends, in voxels of a box of ``size``."""
    return math.ceil(REACH * size)


def kernel_fade(size: int) -> Float[Tensor, " u"]:
    """What the kernel is multiplied by at lags from -R to R - 1 along an axis."""
    reach = kernel_reach(size)
    lag = torch.arange(-reach, reach).abs() / size
    return 0.5 + 0.5 * torch.cos(math.pi * ((lag - FADE) / (REACH - FADE)).clamp(0, 1))


@cache
def _window_polynomials() -> NDArray[np.float64]:
    """The weight of each tap as a polynomial in the fraction, highest power first: (DEGREE + 1, TAPS).

    Tap t lies at t - 1 - fraction from the point. The window is *defined* by these polynomials.
    """
    beta = math.pi * math.sqrt((TAPS / PADDING * (PADDING - 0.5)) ** 2 - 0.8)
    fraction = 0.5 - 0.5 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    columns = []
    for tap in range(TAPS):
        inside = 1 - ((tap - 1 - fraction) / (TAPS / 2)) ** 2
        window = np.i0(beta * np.sqrt(inside)) / np.i0(beta)
        fitted = np.polynomial.Polynomial.fit(fraction, window, DEGREE, domain=[0, 1], window=[0, 1])
        columns.append(fitted.coef[::-1])
    return np.stack(columns, 1)


@cache
def polynomials_on(device: torch.device) -> Float[Tensor, "d t"]:
    return torch.from_numpy(_window_polynomials()).float().to(device)


def window_transform(position: NDArray[np.float64]) -> Tensor:
    """The window's Fourier transform at positions in units of the padded box, -½ to ½."""
    node, weight = np.polynomial.legendre.leggauss(24)
    fraction, weight = (node + 1) / 2, weight / 2
    taps = np.stack([np.polyval(column, fraction) for column in _window_polynomials().T], 1)
    distance = np.arange(TAPS) - 1 - fraction[:, None]
    phase = np.cos(2 * np.pi * position[:, None, None] * distance)
    return torch.from_numpy((phase * taps * weight[:, None]).sum((1, 2))).float()
