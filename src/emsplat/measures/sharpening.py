"""Sharpening of a map: B factor from Guinier's plot, weights from its FSC (Rosenthal & Henderson 2003)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths.fourier import irfft, radius_slabs, rfft, shell_index
from emsplat.measures.curves import Sampled
from emsplat.types import Grid

# ln of the mean amplitude of a protein whose atoms stand still (B = 0) at these frequencies in 1/Å, 0 at 10 Å: the mean
# over 1AON, 1HZH, 4AKE, 6VSB, 6VXX and 8BK7, which differ by 0.1 (benchmarks/protein_amplitudes.py). From 10 to 6 Å it
# falls as if B were 100 Å², as helices lie about 10 Å apart; from 6 to 4.5 Å it rises again.
PROTEIN_FREQUENCIES = tuple(0.04 + 0.01 * step for step in range(47))
# fmt: off
_PROTEIN = (
    1.06, 0.65, 0.43, 0.28, 0.20, 0.12, 0.00, -0.13, -0.23, -0.31, -0.37, -0.40, -0.39, -0.35, -0.31, -0.25,
    -0.19, -0.16, -0.17, -0.22, -0.29, -0.36, -0.43, -0.49, -0.54, -0.60, -0.66, -0.71, -0.75, -0.80, -0.84, -0.87,
    -0.89, -0.91, -0.92, -0.93, -0.93, -0.93, -0.94, -0.94, -0.95, -0.96, -0.97, -0.99, -1.01, -1.03, -1.06,
)
# fmt: on


@dataclass(frozen=True)
class Guinier:
    """Logarithm of the mean amplitude per shell against squared frequency, and a line through part of it.

    Amplitudes are those of a transform divided by the number of voxels, as in RELION's table.
    """

    frequency: Float[Tensor, " s"]  # 1/Å
    original: Float[Tensor, " s"]  # ln of the mean amplitude
    weighted: Float[Tensor, " s"]  # the same after the FSC weights
    slope: float  # Å²
    intercept: float
    correlation: float
    protein_slope: float  # Å²; of a protein with B = 0 in the same shells

    @property
    def line_b_factor(self) -> float:
        """B in Å² that makes the line level when amplitudes are multiplied by exp(-B k²/4): negative sharpens."""
        return 4 * self.slope

    @property
    def b_factor(self) -> float:
        """B in Å² that makes the line as steep as that of a protein whose atoms stand still: negative sharpens.

        A protein's own amplitudes are level from 10 Å on only in a long range (`line_b_factor` is then the same within
        20 Å²). Between 10 and 7 Å they fall as if B were 150 Å², and a level line amplifies noise.
        """
        return 4 * (self.slope - self.protein_slope)


def fsc_weight(fsc: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """Correlation of the average of two half maps with the truth, sqrt(2 F / (1 + F)) (Rosenthal & Henderson 2003).

    0 from the first shell after 0 where F is below 1e-4 or undefined. Shell 0, the mean, is kept: in a mask the means
    of two maps of mean 0 may have any sign.
    """
    ended = ~(fsc >= 1e-4)
    ended[0] = False
    value = fsc.clamp(0, 1).nan_to_num()
    value[0] = 1
    return torch.where(torch.cumsum(ended, 0) > 0, 0.0, (2 * value / (1 + value)).sqrt())


def guinier(
    volume: Float[Tensor, "z y x"],
    grid: Grid,
    weight: Float[Tensor, " s"],
    *,
    low: float = 10.0,
    high: float | None = None,
) -> Guinier:
    """Guinier's plot of a map with a line fitted from ``low`` down to ``high`` Å (Nyquist if None).

    Mean amplitudes, times ``weight`` (one per shell), of whole shells; the fit weighs all its shells alike. With the
    weights of `fsc_weight` the amplitudes are those of the signal alone, where no noise of the solvent is among them:
    the map should be masked (Rosenthal & Henderson 2003).

    Raises:
        InputError: fewer than 3 shells with amplitude in that range.
    """
    shells = shell_index(grid.size, 3).flatten()
    limit = grid.size // 2 + 1
    amplitude = (rfft(volume.double(), 3).abs() / grid.size**3).flatten()
    total = torch.bincount(shells, amplitude)[:limit]
    mean = total / torch.bincount(shells)[:limit]
    frequency = torch.arange(limit, dtype=torch.float64) / grid.length
    floor = torch.finfo(torch.float32).tiny
    original, weighted = (values.clamp(min=floor).log() for values in (mean, mean * weight.double()))
    high = grid.nyquist if high is None else high
    chosen = (frequency >= 1 / low) & (frequency <= 1 / high + 1e-9) & (mean * weight > floor)
    if int(chosen.sum()) < 3:
        raise InputError(
            f"B factor: {int(chosen.sum())} shells from {low:g} to {high:.3g} Å; expected at least 3 for a line; the "
            "resolution is too low for it, give a B factor with --b-factor"
        )
    x = frequency[chosen] ** 2
    slope, intercept, correlation = _line(x, weighted[chosen])
    protein_slope, _, _ = _line(x, protein_amplitude(frequency[chosen]))
    return Guinier(frequency, original, weighted, slope, intercept, correlation, protein_slope)


def _line(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> tuple[float, float, float]:
    """Slope, intercept and correlation of a line."""
    x0, y0 = x - x.mean(), y - y.mean()
    slope = float((x0 * y0).sum() / (x0 * x0).sum())
    spread = float((x0.square().sum() * y0.square().sum()).sqrt())
    return slope, float(y.mean()) - slope * float(x.mean()), float((x0 * y0).sum()) / spread if spread > 0 else 0.0


def protein_amplitude(frequency: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """ln of a protein's mean amplitude at these frequencies (1/Å), 0 at 10 Å; beyond 2 Å as at 2 Å."""
    values = np.interp(frequency.numpy(), PROTEIN_FREQUENCIES, _PROTEIN)
    return torch.from_numpy(values).to(frequency.dtype)


def sharpen(
    volume: Float[Tensor, "z y x"], grid: Grid, b_factor: float, weight: Float[Tensor, " s"]
) -> Float[Tensor, "z y x"]:
    """The map with amplitudes times weight(shell) exp(-B k²/4), k in 1/Å; nothing beyond Nyquist."""
    spectrum = rfft(volume.float(), 3)
    ended = torch.cat([weight.double(), torch.zeros(1, dtype=torch.float64)])
    for planes, radius in radius_slabs(grid.size):
        shell = torch.floor(radius + 0.5).long().clamp(max=grid.size // 2 + 1)
        exponent = (-b_factor / 4 / grid.length**2 * radius.square()).clamp(max=math.log(1e12))
        spectrum[planes] *= (ended[shell] * exponent.exp()).float()
    sharpened: Tensor = irfft(spectrum, 3)
    return sharpened


def fsc_xml(curve: Sampled, title: str) -> str:
    """An FSC curve in EMDB's XML; undefined shells are left out."""
    points = "".join(
        f"  <coordinate>\n    <x>{k:.6f}</x>\n    <y>{value:.6f}</y>\n  </coordinate>\n"
        for k, value in zip(curve.frequency.tolist(), curve.value.tolist(), strict=True)
        if math.isfinite(value)
    )
    return f'<fsc title="{title}" xaxis="Resolution (A-1)" yaxis="Correlation Coefficient">\n{points}</fsc>\n'
