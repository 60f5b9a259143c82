"""Cross-validated FSC: a model against the plain back-projection of the particles that it has never seen.

Two models agree beyond what the data support, because they share a prior. The back-projection R_B of the other half has
noise that nothing in the model M_A knows of, so that in each shell

    FSC(M_A, truth) ≈ FSC(M_A, R_B) / sqrt(FSC(R_A, R_B)),

and the other way round. The denominator is FSC(R, truth) of one half if the noise of the two is independent; where it
is within that noise the ratio says nothing. Where a shell holds too few independent numbers for a precise ratio, both
sides of it are smoothed over up to five neighbours on each side (a local line). Resolution is read at 0.5, the level
for a map against the truth that 0.143 between half maps stands for (Rosenthal & Henderson 2003).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.fourier import shell_index, sum_by_shell
from emsplat.types import Curve, Grid

_SIGNIFICANT = 3.0  # standard deviations of the FSC of pure noise
_PRECISE = 0.03  # relative error of the denominator that needs no smoothing
_NEIGHBOURS = 5
_SYSTEMATIC = 0.004  # interpolation on the way to the back-projections: error of the estimate where noise has none


def independent_coefficients(mask: Float[Tensor, "z y x"]) -> Float[Tensor, " s"]:
    """How many independent complex numbers the shells 0 ... N/2 of a masked map of white noise hold.

    A mask m correlates coefficients that are Δ apart by |M(Δ)| / M(0), M being the transform of m². The variance of a
    sum over a shell therefore grows by Σ |M(Δ)/M(0)|² p(Δ), where p is the chance that a neighbour at Δ lies in the
    same shell of thickness 1: 1 - |Δ|/2 for |Δ| < 1 and 1/(2|Δ|) beyond, if Δ points anywhere with equal chance.
    Hermitian symmetry leaves half of the voxels.
    """
    size = len(mask)
    transform = torch.fft.rfftn(mask.double() ** 2)
    axis = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=mask.device)
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis[: size // 2 + 1] ** 2).sqrt()
    chance = torch.where(distance < 1, 1 - distance / 2, 0.5 / distance.clamp(min=1))
    shells, twice = _shells(size, mask.device)
    likeness = (transform.abs() / transform[0, 0, 0].real.clamp(min=1e-30)).square()
    neighbours = (likeness * chance).flatten() @ twice
    voxels = sum_by_shell(twice, shells, size // 2 + 2)[: size // 2 + 1]
    count: Tensor = (0.5 * voxels / neighbours).clamp(min=1.0)
    return count


class CrossValidation:
    """The two back-projections and a mask: all that stays the same while models come and go.

    Maps may be on a GPU, all on the same device; what is made of their shells is on the CPU.

    Raises:
        InputError: through `fsc`, when maps and mask do not belong together.
    """

    def __init__(
        self, raw: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]], mask: Float[Tensor, "z y x"], grid: Grid
    ) -> None:
        self.grid = grid
        self._mask = mask
        self._shell, self._twice = _shells(grid.size, mask.device)
        self._raw = [self._transform(volume) for volume in raw]
        self._power = [self._sum(spectrum, spectrum) for spectrum in self._raw]
        self.raw = self._sum(*self._raw) / (self._power[0] * self._power[1]).sqrt().clamp(min=1e-30)
        self.count = independent_coefficients(mask).cpu()
        # The first shells hold hardly more than one independent number: no level is beyond chance there.
        noise = torch.tanh(_SIGNIFICANT / (2 * self.count).sqrt()).clamp(max=0.5)
        self._smooth = _local_lines(self.raw, self.count)
        self._support = (self._smooth @ self.raw).clamp(min=1e-3)
        below = ~(self.raw > noise)
        below[0] = False
        self.defined: Bool[Tensor, " s"] = torch.cumsum(below, 0) == 0

    def curve(self, models: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]) -> Curve:
        """Estimated FSC of the two models against the truth, mean of both directions; NaN where undefined.

        Values slightly above 1 are possible: they are estimates.
        """
        ratios = []
        for model, other in ((models[0], 1), (models[1], 0)):
            spectrum = self._transform(model)
            power = self._sum(spectrum, spectrum) * self._power[other]
            ratios.append(self._sum(spectrum, self._raw[other]) / power.sqrt().clamp(min=1e-30))
        value = self._smooth @ torch.stack(ratios).mean(0) / self._support.sqrt()
        value = torch.where(self.defined, value, torch.nan)
        return Curve(torch.arange(len(value), dtype=torch.float64) / self.grid.length, value)

    def score(self, models: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]) -> float:
        """Mean of the curve over the defined shells, every shell counted equally; NaN if there is none.

        The total loss is dominated by the low shells and goes on falling while the high ones begin to fit noise.
        """
        return float(self.curve(models).value[1:].nanmean())

    def interval(self, curve: Curve) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
        """A 95 % band of a curve of `curve`, from the number of independent coefficients (Fisher's transform).

        It is that of single shells: where the curve is smoothed it is wider than need be.

        The uncertainty of FSC(M_A, R_B) and of FSC(R_A, R_B) is added as if they were independent, and 0.004 for what
        does not come from noise.
        """
        raw = self.raw.clamp(1e-6, 0.999999)
        seen = (curve.value * raw.sqrt()).clamp(-0.999999, 0.999999)
        # Both directions are averaged, but they share the noise of R_A and R_B: no gain is claimed.
        spread = (2 * self.count).rsqrt()
        relative = ((1 - seen**2) / seen.abs().clamp(min=1e-6)) ** 2 + (0.5 * (1 - raw**2) / raw) ** 2
        half = 1.96 * ((spread * curve.value) ** 2 * relative + _SYSTEMATIC**2).sqrt()
        return curve.value - half, curve.value + half

    def _transform(self, volume: Tensor) -> Float[Tensor, "n 2"]:
        return torch.view_as_real(torch.fft.rfftn(volume * self._mask)).reshape(-1, 2)

    def _sum(self, a: Tensor, b: Tensor) -> Float[Tensor, " s"]:
        shells = self.grid.size // 2 + 1
        product = (a * b).sum(1).double().mul_(self._twice)
        return sum_by_shell(product, self._shell, shells + 1)[:shells].cpu()


def _local_lines(raw: Float[Tensor, " s"], count: Float[Tensor, " s"]) -> Float[Tensor, "s s"]:
    """Smoothing as a matrix: at each shell the value of a line fitted to its neighbours.

    The width grows with the relative error of sqrt(FSC), to 5 shells on each side; where that is below a quarter of
    `_PRECISE` a shell stands alone. Neighbours count by distance (tricube) and by their variance.
    """
    level = raw.clamp(0.01, 0.9999)
    error = 0.5 * (1 - level**2) / level * (2 * count).rsqrt()
    width = 1 + _NEIGHBOURS * (error / _PRECISE).clamp(max=1)
    width[error < _PRECISE / 4] = 1
    shells = torch.arange(len(raw), dtype=torch.float64)
    away = shells - shells[:, None]
    weight = (1 - (away / width[:, None]).abs().clamp(max=1) ** 3) ** 3
    weight = weight * (2 * count / (1 - level**2) ** 2).clamp(max=1e8)
    weight[1:, 0] = 0  # shell 0 is the mean of the map
    first, second = (weight * away).sum(1, keepdim=True), (weight * away**2).sum(1, keepdim=True)
    line = weight * (second - first * away)
    alone = line.sum(1).abs() < 1e-12 * weight.sum(1) ** 2
    line[alone] = torch.eye(len(raw), dtype=torch.float64)[alone]
    return line / line.sum(1, keepdim=True)


def _shells(size: int, device: torch.device) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Shell of each coefficient of a transform that has not been centred, and how often it counts."""
    half = torch.arange(size // 2 + 1, device=device)
    twice = torch.where((half == 0) | (2 * half == size), 1.0, 2.0).double()
    return shell_index(size, 3, device).clamp(max=size // 2 + 1).flatten(), twice.expand(size, size, -1).flatten()
