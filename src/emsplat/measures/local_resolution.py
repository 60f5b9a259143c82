"""Local resolution: Fourier shell correlation in a soft window that moves through two maps.

Windowing both maps about every voxel and transforming them costs one transform per voxel. The same sums come from
filtering first: in a band of frequencies the two maps a_f, b_f are correlated locally,

    FSC_f(x) = (w * a_f b_f)(x) / sqrt((w * a_f²)(x) (w * b_f²)(x)),

where w is the square of the window and * a convolution (Cardone et al. 2013 put the same question to windows that are
cut out one by one; `windowed_fsc` is that definition). Up to what the window blurs across the borders of a band the two
are equal by Parseval's theorem. Each band needs only the grid that carries its products, and the smoothed products only
a grid as fine as the window, so the work is that of a few transforms.

Both maps are divided by their common radial amplitude first. No FSC of a shell feels that, but otherwise the strong low
frequencies that leak through the edge of a band would decide what the weak high ones look like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths.fourier import crop, radius_slabs, shell_radius, shell_slabs, smooth_size, sum_by_shell
from emsplat.types import Curve, Grid

_SIGNIFICANT = 3.0  # standard deviations of a local correlation of noise
_PERCENTILES = (5, 25, 75, 95)


@dataclass(frozen=True)
class LocalResolution:
    """Resolution in Å at every voxel; NaN where the maps say nothing."""

    volume: Float[Tensor, "z y x"]
    window: float  # Å, full width of the window at half its height

    def filled(self, mask: Float[Tensor, "z y x"]) -> Float[Tensor, "z y x"]:
        """With a number at every voxel: outside the mask the coarsest value inside, so that no surface turns fine by
        interpolation, and the width of the window where the maps say nothing, for they have no detail that it could
        see."""
        inside = mask > 0.01
        known = self.volume.nan_to_num(self.window, posinf=self.window)
        return torch.where(inside, known, known[inside].max() if inside.any() else self.window)

    def summary(self, mask: Float[Tensor, "z y x"]) -> dict[str, float] | None:
        """Mean, median and percentiles over the voxels where mask > 0.5; None if nothing is defined there."""
        values = self.volume[(mask > 0.5) & self.volume.isfinite()]
        if not len(values):
            return None
        values = values.double()
        percent = torch.tensor([50, *_PERCENTILES], dtype=torch.float64) / 100
        middle, *others = torch.quantile(values[:: max(1, len(values) // 1_000_000)], percent).tolist()
        named = {f"p{p}": round(value, 3) for p, value in zip(_PERCENTILES, others, strict=True)}
        return {"mean": round(float(values.mean()), 3), "median": round(middle, 3), **named}


def default_window(resolution: float | None) -> float:
    """Width of the window in Å: 25, or five times the resolution of the whole map where that is more.

    Fewer periods leave too few independent numbers in a window: with five, a local FSC of noise is 0.07 or less.
    """
    return 25.0 if resolution is None else max(25.0, 5 * resolution)


def local_resolution(
    a: Float[Tensor, "z y x"],
    b: Float[Tensor, "_z _y _x"],
    grid: Grid,
    *,
    window: float,
    threshold: float = 0.143,
) -> LocalResolution:
    """Where the local FSC of two half maps first falls below the threshold, interpolated between bands.

    Never finer than Nyquist and never coarser than the window.

    Raises:
        InputError: the maps are no cubes of the grid's size; the window is narrower than 4 or wider than half the box.
    """
    first = _First(grid, window, threshold)
    for frequency, (ab, aa, bb) in _band_products([a, b], [(0, 1), (0, 0), (1, 1)], grid, window):
        first.add(frequency, _ratio(ab, aa, bb))
        if first.everywhere:
            break
    return first.result()


def local_cross_validated(
    models: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]],
    raw: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]],
    grid: Grid,
    *,
    window: float,
    threshold: float = 0.5,
) -> LocalResolution:
    """Local resolution from the cross-validated FSC of two models (`emsplat.measures.crossvalidate`).

    In each window and band FSC(M_A, R_B) / sqrt(FSC(R_A, R_B)), mean of both directions. Where the back-projections do
    not agree beyond chance the data end: that band counts as the first below the threshold.

    Raises:
        InputError: as for `local_resolution`.
    """
    # In an order in which no more than two filtered maps are needed at a time.
    pairs = [(0, 0), (3, 3), (0, 3), (2, 2), (2, 3), (1, 1), (1, 2)]
    first = _First(grid, window, threshold)
    for frequency, (aa, raw_b, ab, raw_a, both, bb, ba) in _band_products([*models, *raw], pairs, grid, window):
        seen = 0.5 * (_ratio(ab, aa, raw_b) + _ratio(ba, bb, raw_a))
        support = _ratio(both, raw_a, raw_b)
        value = seen / support.clamp(min=1e-6).sqrt()
        first.add(frequency, torch.where(support > _chance(frequency, window), value, 0.0))
        if first.everywhere:
            break
    return first.result()


def windowed_fsc(
    a: Float[Tensor, "z y x"],
    b: Float[Tensor, "_z _y _x"],
    grid: Grid,
    centre: Sequence[int],
    window: float,
) -> Curve:
    """FSC in the bands of this module of two maps multiplied by one window about voxel ``centre`` [z, y, x].

    The definition that `local_resolution` is tested against; one transform of the box for each centre.
    """
    axes = [(torch.arange(grid.size) - c) * grid.pixel_size for c in centre]
    square = axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2
    # The root of w: both maps carry it.
    soft = torch.exp(-square / (4 * _sigma(window) ** 2))
    white = [torch.fft.irfftn(s, s=a.shape) for s in _whitened([a, b])]
    spectra = [torch.fft.rfftn(volume * soft) for volume in white]
    radius, columns = shell_radius(grid.size, 3).float() / grid.length, torch.full((grid.size // 2 + 1,), 2.0)
    columns[0] = columns[-1] = 1.0
    frequencies, values = [], []
    for frequency in _bands(grid, window):
        weight = _band(radius, frequency, window).square() * columns

        def sums(p: Tensor, q: Tensor, weight: Tensor = weight) -> Tensor:
            return (weight * (p.conj() * q).real).sum()

        ab, aa, bb = sums(spectra[0], spectra[1]), sums(spectra[0], spectra[0]), sums(spectra[1], spectra[1])
        frequencies.append(frequency)
        values.append(float(_ratio(ab, aa, bb)))
    return Curve(torch.tensor(frequencies, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))


class _First:
    """The first crossing of a threshold at each point of the coarse grid, band by band."""

    def __init__(self, grid: Grid, window: float, threshold: float) -> None:
        self._grid, self._window, self._threshold = grid, window, threshold
        self._before: Float[Tensor, "z y x"] | None = None
        self._found: Float[Tensor, "z y x"] | None = None  # 1/Å; 0 where the curve is still above
        self._open: Bool[Tensor, "z y x"] | None = None
        self._last = 0.0

    def add(self, frequency: float, value: Float[Tensor, "z y x"]) -> None:
        if self._before is None or self._found is None or self._open is None:
            self._found = torch.zeros_like(value)
            self._open = torch.ones_like(value, dtype=torch.bool)
            # Coarser than the window nothing can be told.
            self._before, self._last = torch.ones_like(value), 1 / self._window
        below = self._open & ~(value >= self._threshold)
        drop = (self._before - value).clamp(min=1e-6)
        part = ((self._before - self._threshold) / drop).clamp(0, 1)
        self._found = torch.where(below, self._last + part * (frequency - self._last), self._found)
        self._open = self._open & ~below
        self._before, self._last = value, frequency

    @property
    def everywhere(self) -> bool:
        """Whether all points have crossed it: finer bands, which cost most, say nothing more."""
        return self._open is not None and not bool(self._open.any())

    def result(self) -> LocalResolution:
        found = self._found
        if found is None or self._open is None:
            raise InputError(
                f"local resolution: no band of frequencies between the window of {self._window:g} Å and Nyquist "
                f"({self._grid.nyquist:g} Å); expected a window of several times that; give a wider one"
            )
        nyquist = 1 / self._grid.nyquist
        frequency = torch.where(self._open, nyquist, found).clamp(1 / self._window, nyquist)
        # Enlarged by Fourier padding of the frequency, which is as smooth as the window, then clamped again.
        full = _enlarge(frequency, self._grid.size).clamp(1 / self._window, nyquist)
        return LocalResolution(1 / full, self._window)


def check_window(window: float, grid: Grid) -> None:
    """
    Raises:
        InputError: maps on this grid cannot be looked at through a window of so many Å.
    """
    if not 4 * grid.pixel_size <= window <= grid.length / 2:
        raise InputError(
            f"local resolution: window of {window:g} Å; expected {4 * grid.pixel_size:g} (4 voxels) to "
            f"{grid.length / 2:g} Å (half the box)"
        )


def _band_products(
    volumes: Sequence[Tensor], pairs: Sequence[tuple[int, int]], grid: Grid, window: float
) -> Iterator[tuple[float, list[Tensor]]]:
    """For each band its frequency and the products of pairs of filtered maps, smoothed, on the coarse grid."""
    size = grid.size
    if any(volume.shape != (size,) * 3 for volume in volumes):
        shapes = ", ".join("×".join(map(str, volume.shape)) for volume in volumes)
        raise InputError(f"local resolution: maps of {shapes} voxels; expected cubes of {size}; resample one of them")
    check_window(window, grid)
    spectra = _whitened(volumes)
    coarse = min(size, smooth_size(math.ceil(grid.length / (0.5 * _sigma(window)))))
    for frequency in _bands(grid, window):
        # Products reach twice the band; what they fold onto must stay clear of the frequencies that w lets through.
        need = grid.length * (2 * (frequency + _step(window)) + 3 / (2 * math.pi * _sigma(window)))
        fine = min(size, smooth_size(max(coarse, math.ceil(need))))
        filtered: dict[int, Tensor] = {}  # as long as a later pair needs them
        products = []
        for number, pair in enumerate(pairs):
            for one in set(pair) - filtered.keys():
                filtered[one] = _filtered(spectra[one], fine, frequency, grid, window)
            products.append(_smooth(filtered[pair[0]] * filtered[pair[1]], coarse, grid, window))
            later = {one for other in pairs[number + 1 :] for one in other}
            filtered = {one: volume for one, volume in filtered.items() if one in later}
        yield frequency, products


def _whitened(volumes: Sequence[Tensor]) -> list[Tensor]:
    """Transforms of the maps, each divided by its own radial amplitude; 0 in the corners beyond Nyquist."""
    size = len(volumes[0])
    white = [torch.fft.rfftn(volume.float()) for volume in volumes]
    power = torch.zeros(len(volumes), size // 2 + 2, dtype=torch.float64)
    count = torch.zeros(size // 2 + 2, dtype=torch.int64)
    for planes, shells in shell_slabs(size):
        count += torch.bincount(shells.flatten(), minlength=len(count))
        for total, spectrum in zip(power, white, strict=True):
            total += sum_by_shell(spectrum[planes].abs().square().double(), shells, len(count))
    power /= count.clamp(min=1)
    scale = power.sqrt().clamp(min=1e-30).reciprocal().float()
    scale[power <= power.amax(1, keepdim=True) * 1e-20] = 0
    scale[:, -1] = 0
    for planes, shells in shell_slabs(size):
        for spectrum, own in zip(white, scale, strict=True):
            spectrum[planes] *= size**1.5 * own[shells]
    return white


def _filtered(spectrum: Tensor, fine: int, frequency: float, grid: Grid, window: float) -> Float[Tensor, "f f f"]:
    """A map in the band about a frequency, on the grid that carries it."""
    own = crop(spectrum, fine, 3) if fine < len(spectrum) else spectrum.clone()
    for planes, radius in radius_slabs(fine):
        own[planes] *= _band(radius.float() / grid.length, frequency, window)
    filtered: Tensor = torch.fft.irfftn(own, s=(fine,) * 3)
    return filtered


def _smooth(product: Tensor, coarse: int, grid: Grid, window: float) -> Float[Tensor, "c c c"]:
    spectrum = torch.fft.rfftn(product)
    if coarse < len(product):
        spectrum = crop(spectrum, coarse, 3)
    for planes, radius in radius_slabs(coarse):
        spectrum[planes] *= torch.exp(-2 * (math.pi * _sigma(window) * (radius.float() / grid.length)) ** 2)
    smooth: Tensor = torch.fft.irfftn(spectrum, s=(coarse,) * 3)
    return smooth


def _ratio(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    norm = (aa.clamp(min=0) * bb.clamp(min=0)).sqrt()
    return torch.where(norm > 0, ab / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)


def _chance(frequency: float, window: float) -> float:
    """The local FSC that noise does not exceed: from the independent numbers in a window and a band."""
    volume = (4 * math.pi * _sigma(window) ** 2) ** 1.5
    shell = 4 * math.pi * frequency**2 * 1.5 * _step(window)
    return min(math.tanh(_SIGNIFICANT / math.sqrt(max(volume * shell, 2.0))), 0.9)


def _sigma(window: float) -> float:
    return window / (2 * math.sqrt(2 * math.log(2)))


def _step(window: float) -> float:
    """Half width of a band in 1/Å: what a window of that width can tell apart."""
    return 0.5 / window


def _bands(grid: Grid, window: float) -> list[float]:
    """Centres of the bands in 1/Å: the first is two periods in a window, the last ends at Nyquist."""
    step, nyquist = _step(window), 1 / grid.nyquist
    return [step * i for i in range(4, math.floor(nyquist / step + 1e-6))]


def _band(radius: Tensor, frequency: float, window: float) -> Tensor:
    """A half cosine about ``frequency`` that is 0 one step away, so that the squares of all bands add up to 1."""
    away = ((radius - frequency).abs() / _step(window)).clamp(max=1)
    return torch.cos(0.5 * math.pi * away)


def _enlarge(volume: Tensor, size: int) -> Tensor:
    """The coarse grid on the fine one, linear between its points; both begin at the same corner and repeat."""
    coarse = len(volume)
    if coarse == size:
        return volume
    place = torch.arange(size) * (coarse / size)
    low = place.floor().long()
    part = (place - low).to(volume.dtype)
    for axis in range(3):
        shape = [-1 if i == axis else 1 for i in range(3)]
        weight = part.reshape(shape)
        volume = volume.index_select(axis, low) * (1 - weight) + volume.index_select(axis, (low + 1) % coarse) * weight
    return volume
