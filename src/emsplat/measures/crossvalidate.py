"""Cross-validated FSC: a model against the plain back-projection of the particles that it has never seen.

Two models agree beyond what the data support, because they share a prior. The back-projection R_B of the other half has
noise that nothing in the model M_A knows of, so that in each shell

    v = FSC(M_A, truth) ≈ FSC(M_A, R_B) / sqrt(FSC(R_A, R_B)),

and the other way round. The denominator is FSC(R, truth) of one half if the noise of the two is independent; where it
is within that noise the ratio says nothing. Resolution is read at 0.5, the level for a map against the truth that 0.143
between half maps stands for (Rosenthal & Henderson 2003).

**Its error.** In a shell of n independent coefficients let the truth T have power 1 and the noise N of each half power
q = (1 - F)/F, F = FSC(R_A, R_B). With the model scaled to power 1, M_A = v T + sqrt(1 - v²) E_A, where E_A is all that
is not truth. The overlap <T, N> stands in numerator and denominator alike and cancels when both directions are
averaged. There remain <E_A, N_B> and <E_B, N_A>, and <N_A, N_B> in the denominator. Fitting noise makes E_A like N_A:
the model is closer to its own half by d = (FSC(M_A, R_A) - FSC(M_A, R_B)) / sqrt(F), and that part of the numerator's
noise is <N_A, N_B> again. Taken together, an overlap having the product of both powers over 2n as its variance,

    var v = [(d - v q / 2)² + ½ ((1 - v²) q - d²)] / 2n.

**Smoothing.** A curve need not be smooth: where the transform of the particle is weak (shells, spheres, rods) it has
dips. Each value is therefore compared with a local line through its neighbours, and the mean square S of these
differences, in units of their errors, tells whether the line will do: S = 1 if it does. What is kept of a difference is
1 - 1/S, nothing where S < 1 (James & Stein 1961, positive part).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emsplat.maths.fourier import hermitian_weight, radius_slabs, shell_slabs, slabs, sum_by_shell
from emsplat.types import Curve, Grid

_SIGNIFICANT = 3.0  # standard deviations of the FSC of pure noise
_LINE = 5  # shells on each side of a local line
_NEAR = 3  # shells on each side that tell whether it will do
_SYSTEMATIC = 0.004  # interpolation on the way to the back-projections: error of the estimate where noise has none


def independent_coefficients(mask: Float[Tensor, "z y x"]) -> Float[Tensor, " s"]:
    """How many independent complex numbers the shells 0 ... N/2 of a masked map of white noise hold.

    A mask m correlates coefficients that are Δ apart by |M(Δ)| / M(0), M being the transform of m². The variance of a
    sum over a shell therefore grows by Σ |M(Δ)/M(0)|² p(Δ), where p is the chance that a neighbour at Δ lies in the
    same shell of thickness 1: 1 - |Δ|/2 for |Δ| < 1 and 1/(2|Δ|) beyond, if Δ points anywhere with equal chance.
    Hermitian symmetry leaves half of the voxels.
    """
    size = len(mask)
    transform = torch.fft.rfftn(mask**2)
    whole = transform[0, 0, 0].real.double().clamp(min=1e-30)
    twice = hermitian_weight(size, torch.float64, mask.device)
    neighbours = torch.zeros((), dtype=torch.float64, device=mask.device)
    for planes, distance in radius_slabs(size, mask.device):
        chance = torch.where(distance < 1, 1 - distance / 2, 0.5 / distance.clamp(min=1))
        likeness = (transform[planes].abs() / whole).square()
        neighbours += (likeness * chance).sum((0, 1)) @ twice
    count: Tensor = (0.5 * _voxels(size, mask.device) / neighbours).clamp(min=1.0)
    return count


def _voxels(size: int, device: torch.device) -> Float[Tensor, " s"]:
    """How many voxels of Fourier space the shells 0 ... N/2 hold."""
    twice = hermitian_weight(size, torch.float64, device)
    total = twice.new_zeros(size // 2 + 2)
    for _, shells in shell_slabs(size, device):
        total += sum_by_shell(twice.expand(shells.shape), shells, len(total))
    return total[:-1]


class CrossValidation:
    """The two back-projections and a mask: all that stays the same while models come and go.

    ``copies`` is the number of elements of the symmetry that was imposed on the maps, or fewer where only some images
    count under all of them: of as many coefficients only one is independent. Maps may be on a GPU, all on the same
    device; what is made of their shells is on the CPU.

    Raises:
        InputError: through `fsc`, when maps and mask do not belong together.
    """

    def __init__(
        self,
        raw: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]],
        mask: Float[Tensor, "z y x"],
        grid: Grid,
        copies: float = 1.0,
    ) -> None:
        self.grid = grid
        self._mask = mask
        self.count = (independent_coefficients(mask).cpu() / copies).clamp(min=1.0)
        # Short numbers: as indices they would take twice the memory of a map.
        self._shell = torch.cat([shells.short() for _, shells in shell_slabs(grid.size, mask.device)])
        self._raw = [self._transform(volume) for volume in raw]
        self._power = [self._sum(spectrum, spectrum) for spectrum in self._raw]
        self.raw = self._correlation(*self._raw, *self._power)
        voxels = _voxels(grid.size, mask.device).cpu()
        second, fourth = (sum((plane.double() ** power).sum() for plane in mask) for power in (2, 4))
        # Of a sum over many shells, neighbours in other shells are correlated too: Σ |M(Δ)/M(0)|² by Parseval.
        self.together = 0.5 * voxels / copies * float(second**2 / fourth / grid.size**3)
        # The first shells hold hardly more than one independent number: no level is beyond chance there.
        noise = torch.tanh(_SIGNIFICANT / (2 * self.count).sqrt()).clamp(max=0.5)
        below = ~(self.raw > noise)
        below[0] = False
        self.defined: Bool[Tensor, " s"] = torch.cumsum(below, 0) == 0
        self._support = self.raw.clamp(1e-3, 1.0)
        self._noise = (1 - self._support) / self._support  # power of a half's noise, the truth having 1

    def curve(self, models: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]) -> Curve:
        """Estimated FSC of the two models against the truth, mean of both directions; NaN where undefined.

        Values slightly above 1 are possible: they are estimates.
        """
        curve, _, _ = self.band(models)
        return curve

    def band(
        self, models: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]
    ) -> tuple[Curve, Float[Tensor, " s"], Float[Tensor, " s"]]:
        """`curve` with the lower and upper end of its 95 % interval in each shell.

        The interval is that of single shells, although the curve is smoothed where that does no harm, with 0.004 added
        for what does not come from noise. It knows nothing of errors that both halves share, such as wrong poses.
        """
        spectra = [self._transform(model) for model in models]
        power = [self._sum(spectrum, spectrum) for spectrum in spectra]
        value = self._ratio(spectra, power)
        own = self._overlap(spectra, power, other=False) / self._support.sqrt()
        fitted, level, noise = own - value, value.clamp(0, 1), self._noise
        both = (fitted - level * noise / 2).square()
        single = 0.5 * ((1 - level.square()) * noise - fitted.square()).clamp(min=0)
        error = ((both + single) / (2 * self.count)).sqrt()
        value = torch.where(self.defined, _smooth(value, error, self.defined), torch.nan)
        half = 1.96 * (error.square() + _SYSTEMATIC**2).sqrt()
        frequency = torch.arange(len(value), dtype=torch.float64) / self.grid.length
        return Curve(frequency, value), value - half, value + half

    def score(self, models: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]) -> float:
        """Mean of the unsmoothed values over the defined shells, every shell counted equally; NaN if there is none.

        The total loss is dominated by the low shells and goes on falling while the high ones begin to fit noise.
        """
        spectra = [self._transform(model) for model in models]
        value = self._ratio(spectra, [self._sum(spectrum, spectrum) for spectrum in spectra])
        return float(value[self._counted()].mean())

    def gain(
        self,
        before: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]],
        after: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]],
        last: int | None = None,
    ) -> tuple[float, float]:
        """How much the score of ``after`` exceeds that of ``before``, and the standard error of this difference; over
        all defined shells or those up to the ``last`` one.

        Both are compared with the same back-projections, whose noise counts only where the models differ: with
        both scaled to power 1, the difference D_A = M'_A - M_A has power 2 (1 - ρ), ρ being their correlation, and

            var (v' - v) = var ½ (<D_A, N_B> + <D_B, N_A>) = (1 - ρ) q / 2n.

        Shells share noise through the mask; n is therefore that of all shells together.
        """
        alike, rises = [], []
        for half, models in enumerate(zip(before, after, strict=True)):  # one at a time: a transform is a map more
            spectra = [self._transform(model) for model in models]
            power = [self._sum(spectrum, spectrum) for spectrum in spectra]
            alike.append(self._correlation(*spectra, *power))
            other, sums = self._raw[1 - half], self._power[1 - half]
            first, second = (
                self._correlation(own, other, square, sums) for own, square in zip(spectra, power, strict=True)
            )
            rises.append(second - first)
        rise = torch.stack(rises).mean(0) / self._support.sqrt()
        variance = (1 - torch.stack(alike).mean(0)).clamp(min=0) * self._noise / (2 * self.together)
        counted = self._counted()
        if last is not None:
            counted = counted & (torch.arange(len(counted)) <= last)
        error = variance[counted].sum().sqrt() / counted.sum()
        return float(rise[counted].mean()), float(error)

    def _counted(self) -> Bool[Tensor, " s"]:
        """The defined shells, without the mean of the map."""
        return self.defined & (torch.arange(len(self.defined)) > 0)

    def _ratio(self, spectra: list[Tensor], power: list[Tensor]) -> Float[Tensor, " s"]:
        return self._overlap(spectra, power, other=True) / self._support.sqrt()

    def _overlap(self, spectra: list[Tensor], power: list[Tensor], *, other: bool) -> Float[Tensor, " s"]:
        """FSC of the models with the back-projections of the other half, or of their own; mean of both."""
        raw, sums = (values[::-1] if other else values for values in (self._raw, self._power))
        return torch.stack([self._correlation(*each) for each in zip(spectra, raw, power, sums, strict=True)]).mean(0)

    def _correlation(self, a: Tensor, b: Tensor, power_a: Tensor, power_b: Tensor) -> Float[Tensor, " s"]:
        return self._sum(a, b) / (power_a * power_b).sqrt().clamp(min=1e-30)

    def _transform(self, volume: Tensor) -> Float[Tensor, "z y k 2"]:
        return torch.view_as_real(torch.fft.rfftn(volume * self._mask))

    def _sum(self, a: Tensor, b: Tensor) -> Float[Tensor, " s"]:
        twice = hermitian_weight(self.grid.size, torch.float64, a.device)
        total = twice.new_zeros(self.grid.size // 2 + 2)
        for planes in slabs(self.grid.size, self._shell[0].numel()):
            product = (a[planes] * b[planes]).sum(-1).double().mul_(twice)
            total += sum_by_shell(product, self._shell[planes].long(), len(total))
        return total[:-1].cpu()


def _smooth(value: Float[Tensor, " s"], error: Float[Tensor, " s"], defined: Bool[Tensor, " s"]) -> Float[Tensor, " s"]:
    """Values drawn towards local lines as far as their errors explain the difference; see above.

    Undefined shells and shell 0, the mean of the map, stay out.
    """
    shells = torch.arange(len(value), dtype=torch.float64)
    away = shells - shells[:, None]
    inside = (defined & (shells > 0)).double()
    error = error.clamp(min=1e-4)

    def near(reach: int) -> Float[Tensor, "s s"]:
        return (1 - (away / (reach + 1)).abs().clamp(max=1) ** 3) ** 3 * inside

    weight = near(_LINE) / error.square()
    first, second = (weight * away).sum(1, keepdim=True), (weight * away**2).sum(1, keepdim=True)
    line = weight * (second - first * away)
    alone = line.sum(1).abs() <= 1e-12 * weight.sum(1) ** 2
    line[alone] = torch.eye(len(value), dtype=torch.float64)[alone]
    rest = torch.eye(len(value), dtype=torch.float64) - line / line.sum(1, keepdim=True)
    difference = rest @ value
    expected = rest.square() @ error.square()
    square = near(_NEAR) @ (difference.square() / expected.clamp(min=1e-30))
    mean = square / near(_NEAR).sum(1).clamp(min=1e-30)
    kept = (1 - 1 / mean.clamp(min=1e-30)).clamp(min=0)
    return torch.where(alone | (inside == 0), value, value - (1 - kept) * difference)
