"""The normal equations of all images: what Gaussians are fitted to, and the classical map that solves them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor

from emsplat.maths.fourier import (
    crop,
    filtered,
    hermitian_weight,
    irfft,
    rfft,
    shell_index,
    shell_slabs,
    slabs,
    sum_by_shell,
)
from emsplat.types import Grid

_ANGLES = 45  # of arctan(gain), to each side, that are tried at first
_USUAL_GAIN = 0.7  # spread of ln gain that is expected


def synthesis(half_space: Tensor, size: int, first: int = 0) -> Float[Tensor, "z y x"]:
    """The middle ``size`` voxels of Σ_k F(k) exp(2πi k x) on its whole periodic grid, centred, F being Hermitian; of
    these the planes from the ``first`` on.

    Axis by axis, some columns and then some planes at a time: what is cut off is not transformed further, and neither
    the whole spectrum nor the whole grid is ever there.
    """
    reach = (len(half_space) - 3) // 2
    side, device = 2 * reach, half_space.device
    middle = (torch.arange(size, device=device) - size // 2) % side
    mirror = (-torch.arange(side, device=device)) % side
    # Every entry stands for its Hermitian mirror too; only here does the mirror lie in x >= 0 (or wrap into it).
    ends = ((0, 1), (1, 0), (reach, reach + 1), (reach - 1, reach + 2))
    mirrored = [
        (x, _wrapped(half_space[:, :, column : column + 1])[..., 0][mirror][:, mirror].conj()) for x, column in ends
    ]
    rows = torch.empty(size - first, size, reach + 1, dtype=torch.complex64, device=device)
    for columns in slabs(reach + 1, side**2):
        part = _wrapped(half_space[:, :, columns.start + 1 : columns.stop + 1])
        for x, opposite in mirrored:
            if columns.start <= x < columns.stop:
                part[:, :, x - columns.start] += opposite
        planes = torch.fft.ifft(part, dim=0, norm="forward")[middle[first:]]
        rows[:, :, columns] = torch.fft.ifft(planes, dim=1, norm="forward")[:, middle]
    volume = torch.empty(size - first, size, size, device=device)
    for some in slabs(size - first, size * side):
        volume[some] = torch.fft.irfft(rows[some], n=side, norm="forward")[..., middle]
    return volume


def _wrapped(columns: Shaped[Tensor, "w v k"]) -> Shaped[Tensor, "z y k"]:
    """Columns of a half space, whose first frequency is -R - 1, on the periodic grid of 2R with frequency 0 first."""
    side = len(columns) - 3
    out = columns[:side, :side].clone()
    out[:3] += columns[side:, :side]
    out[:, :3] += columns[:side, side:]
    out[:3, :3] += columns[side:, side:]
    return out.roll((side // 2 - 1,) * 2, (0, 1))


@dataclass(frozen=True)
class NormalEquations:
    """The data as a quadratic form of the map: ½ VᵀKV - bᵀV, a negative log-likelihood up to a constant.

    ``linear`` is b on the box; ``kernel`` holds K(τ), which is K(-τ), up to R = `kernel_reach`, where it has come to 0:
    at lags from 0 to R - 1 along z, and from -R to R - 1 along y and x.
    """

    grid: Grid
    linear: Float[Tensor, "z y x"]
    kernel: Float[Tensor, "w v u"]
    particles: int

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The equations of both sets of particles."""
        return NormalEquations(
            self.grid, self.linear + other.linear, self.kernel + other.kernel, self.particles + other.particles
        )

    def to(self, device: torch.device) -> NormalEquations:
        """The same on a device."""
        return NormalEquations(self.grid, self.linear.to(device), self.kernel.to(device), self.particles)

    def scaled(self, gain: float) -> NormalEquations:
        """The same data with grey values divided by ``gain``."""
        return NormalEquations(self.grid, gain * self.linear, gain**2 * self.kernel, self.particles)

    def gain(self, volume: Float[Tensor, "z y x"]) -> float:
        """The factor that brings a map closest to these data."""
        spectrum = rfft(volume, 3)
        twice = hermitian_weight(self.grid.size, device=volume.device)
        power = (spectrum.abs().square() * self.weight() * twice).sum() / volume.numel()
        return float(torch.dot(volume.flatten(), self.linear.flatten()) / power.clamp(min=1e-30))

    def weight(self) -> Float[Tensor, "z y k"]:
        """The data's weight Σ C²/σ² around each coefficient of the box, in rfft order; not negative.

        K tapered by a triangle (whose transform is positive) and wrapped into the box: the circulant matrix that
        stands for K.
        """
        return circulant(self.kernel, self.grid.size).clamp_(min=0)

    def solve(self, prior: Float[Tensor, " s"] | None = None) -> Float[Tensor, "z y x"]:
        """The classical map, as `ClassicalEquations.solve`."""
        return ClassicalEquations(self.linear, self.weight()).solve(prior)

    def coverage(self, threshold: float = 0.1) -> float:
        """As `ClassicalEquations.coverage`."""
        return ClassicalEquations(self.linear, self.weight()).coverage(threshold)


@dataclass(frozen=True)
class ClassicalEquations:
    """b, and in place of K the circulant matrix nearest to it: all that a classical map needs, in a third of the memory
    of `NormalEquations`.

    ``weight`` is Σ C²/σ² around each coefficient of the box, in rfft order; not negative.
    """

    linear: Float[Tensor, "z y x"]
    weight: Float[Tensor, "z y k"]

    def solve(self, prior: Float[Tensor, " s"] | None = None) -> Float[Tensor, "z y x"]:
        """The classical map b / (w + 1/τ²).

        ``prior`` is 1/τ² in units of the mean weight of each shell (1/SSNR in RELION's terms); without it a tenth of
        that weight keeps unmeasured frequencies at 0 instead of amplifying their noise.
        """
        size = len(self.linear)
        mean = mean_per_shell(self.weight)
        share = torch.full_like(mean, 0.1) if prior is None else prior.clamp(min=0.01)
        # Beyond Nyquist is nothing.
        added = torch.cat([share * mean + 1e-6 * mean.max() + 1e-30, mean.new_full((1,), torch.inf)])
        spectrum = rfft(self.linear, 3)
        for planes, shells in shell_slabs(size, self.weight.device):
            spectrum[planes] *= 1 / (self.weight[planes] + added[shells])
        return irfft(spectrum, 3)

    def coverage(self, threshold: float = 0.1) -> float:
        """Fraction of the Fourier voxels within Nyquist whose weight is above a fraction of their shell's mean."""
        size = len(self.linear)
        least = torch.cat([threshold * mean_per_shell(self.weight), self.weight.new_full((1,), torch.inf)])
        covered, inside = (torch.zeros((), dtype=torch.int64, device=self.weight.device) for _ in range(2))
        for planes, shells in shell_slabs(size, self.weight.device):
            covered += (self.weight[planes] > least[shells]).sum()
            inside += (shells <= size // 2).sum()
        return int(covered) / int(inside)

    def sampling(self) -> Float[Tensor, "z y x"]:
        """The data's weight in Fourier space relative to the mean of its shell, origin at the centre voxel; 0 beyond
        Nyquist."""
        size = len(self.linear)
        mean = mean_per_shell(self.weight).clamp(min=1e-30)
        mean = torch.cat([mean, mean.new_full((1,), torch.inf)])
        mirror = (-torch.arange(size, device=self.weight.device)) % size
        centred = self.weight.new_empty((size,) * 3)
        half = size // 2
        for planes, shells in shell_slabs(size, self.weight.device):
            relative = self.weight[planes] / mean[shells]
            z = torch.arange(size, device=self.weight.device)[planes]
            centred[(z + half) % size, :, half:] = relative[..., :half].roll(half, 1)
            # Column x < 0 holds what stands at -k; that of Nyquist is the first.
            opposite = relative[:, mirror][..., mirror[half:]].roll(half, 1)
            centred[(half - z) % size, :, :half] = opposite
        return centred


def circulant(kernel: Float[Tensor, "w v u"], size: int) -> Float[Tensor, "z y k"]:
    """The circulant matrix on a box of ``size`` voxels, at least as many as the kernel reaches, that stands for a
    convolution (its kernel as that of `NormalEquations`): in rfft order, of either sign.

    The kernel is tapered by a triangle (whose transform is positive) and wrapped into the box.
    """
    reach = len(kernel)
    lag = torch.arange(2 * reach, device=kernel.device) - reach
    return _transform(kernel, lag, 1 - lag.abs() / reach, size)


def response_of(kernel: Float[Tensor, "w v u"], side: int) -> Float[Tensor, "z y k"]:
    """The transform of a convolution (its kernel as that of `NormalEquations`) on a periodic grid of even ``side``, in
    rfft order, of either sign. Lags beyond half of it are left out; of two that meet there the mean counts."""
    reach = side // 2
    least = max(-reach, -len(kernel))
    lag = torch.arange(min(-least + 1, len(kernel)) - least, device=kernel.device) + least
    inside = slice(least + len(kernel), least + len(kernel) + len(lag))
    return _transform(kernel[: reach + 1, inside, inside], lag, torch.where(lag.abs() == reach, 0.5, 1.0), side)


def _transform(
    half: Float[Tensor, "w v v"], lag: Int[Tensor, " v"], share: Float[Tensor, " v"], side: int
) -> Float[Tensor, "z y k"]:
    """The transform of a kernel that is its own mirror on a periodic grid of ``side``, in rfft order: of its planes at
    z = 0, 1, ..., at most ``side``, which stand for their mirrors too, with lags along y and x wrapped, each times the
    ``share`` of its lag along every axis. Neither the whole grid nor the whole spectrum is ever there."""
    height = share[-len(half) :].clone()
    height[0] *= 0.5  # z = 0 holds each lag and its mirror
    rows = torch.empty(len(half), side, side // 2 + 1, dtype=torch.complex64, device=half.device)
    for planes in slabs(len(half), max(side, len(lag)) ** 2):
        part = half[planes] * height[planes, None, None] * share[:, None] * share
        for dim in (1, 2):
            shape = list(part.shape)
            shape[dim] = side
            part = part.new_zeros(shape).index_add_(dim, lag % side, part)
        rows[planes] = torch.fft.rfft2(part)
    out = half.new_empty(side, side, side // 2 + 1)
    for columns in slabs(side // 2 + 1, side**2):
        out[..., columns] = 2 * torch.fft.fft(rows[..., columns], n=side, dim=0).real
    return out


def mean_per_shell(values: Float[Tensor, "z y k"]) -> Float[Tensor, " s"]:
    """Mean over each shell 0 ... N/2 of a half-space array; shells are so symmetric that the half is enough."""
    size = len(values)
    total = torch.zeros(size // 2 + 2, dtype=torch.float64, device=values.device)
    count = torch.zeros_like(total)
    for planes, shells in shell_slabs(size, values.device):
        total += sum_by_shell(values[planes].double(), shells, len(total))
        count += sum_by_shell(torch.ones_like(shells), shells, len(total))
    return (total / count)[: size // 2 + 1].float()


def combined(parts: list[NormalEquations], gains: list[float] | None = None) -> NormalEquations:
    """The sum of several sets of particles, brought to the grey scale of the first; ``gains`` are their
    `relative_gains` where these are known."""
    first, *others = parts
    if not others:
        return first
    linear, kernel = first.linear.clone(), first.kernel.clone()
    for gain, other in zip((gains or relative_gains(parts))[1:], others, strict=True):
        linear.add_(other.linear, alpha=gain)
        kernel.add_(other.kernel, alpha=gain**2)
    return NormalEquations(first.grid, linear, kernel, sum(part.particles for part in parts))


def relative_gains(parts: list[NormalEquations]) -> list[float]:
    """`relative_gain` of each of several sets, and of the first, to the first."""
    return [1.0, *(relative_gain(parts[0], other) for other in parts[1:])]


def relative_gain(one: NormalEquations, other: NormalEquations) -> float:
    """Grey values of ``other`` relative to ``one``, from the low frequencies; below 0 for opposite contrast.

    Normalised images of another pixel size or dose show the same particle with another brightness. The factor is the
    likeliest with the map that fits both sets best, b₁ = w₁ V + n₁ and b₂ = g w₂ V + n₂: a map of one set alone is
    right for its own noise too, and makes the other look fainter by what is noise in it. Where the sets tell nothing, a
    broad prior keeps it at 1.
    """
    size = len(one.linear)
    small = min(size, max(8, 2 * round(size / 4)))
    (first, w), (second, u) = (_low_frequencies(own, small) for own in (one, other))
    radius = shell_index(small, 3, device=first.device).float() / (size / 8)
    trust = hermitian_weight(small, device=first.device) * torch.exp(-radius.square()) / size**3

    def likelihood(gain: float) -> float:
        fit = (first + gain * second).abs().square() / (w + gain**2 * u).clamp(min=1e-30)
        return float((0.5 * trust * fit).double().sum()) - 0.5 * (math.log(abs(gain)) / _USUAL_GAIN) ** 2

    def best(angles: Iterable[float]) -> float:
        return max(angles, key=lambda angle: likelihood(math.tan(angle)))

    # Over the angle there is one maximum: half turns around are one gain.
    step = math.pi / 2 / _ANGLES
    angle = best((number + 0.5) * step for number in range(-_ANGLES, _ANGLES))
    while step > 1e-7:
        step /= 2
        angle = best((angle - step, angle, angle + step))
    return math.tan(angle)


def _low_frequencies(own: NormalEquations, size: int) -> tuple[Complex[Tensor, "z y k"], Float[Tensor, "z y k"]]:
    """b and the weight of the lowest ``size`` frequencies along each axis."""
    return crop(rfft(own.linear, 3), size, 3), crop(own.weight(), size, 3)


def _lowpass(volume: Float[Tensor, "z y x"], width: float) -> Float[Tensor, "z y x"]:
    """A Gaussian filter of ``width`` shells."""
    return filtered(volume, lambda radius: torch.exp(-(radius**2) / (2 * width**2)))


def contrast(volume: Float[Tensor, "z y x"]) -> float:
    """How much brighter than its surroundings the centre of a classical map is, in standard deviations.

    Low frequencies only (32 voxels across). Positive for bright protein with the CTF's sign as in docs/conventions.md;
    negative when the images are inverted.
    """
    size = min(len(volume), 64)  # enough for 8 shells
    small = volume if size == len(volume) else irfft(crop(rfft(volume, 3), size, 3), 3)
    low = _lowpass(small, 8.0)
    axis = (torch.arange(size, device=volume.device) - size // 2) / size
    regions = [(-1.0, 0.15), (0.35, 0.5), (-1.0, 0.5)]
    sums = torch.zeros(len(regions), 3, dtype=torch.float64, device=volume.device)  # of values to the power of 0, 1, 2
    for planes in slabs(size, size**2):
        radius = (axis[planes, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
        values = torch.stack([low[planes].double() ** power for power in range(3)])
        for row, (inner, outer) in enumerate(regions):
            sums[row] += (values * ((radius > inner) & (radius < outer))).sum((1, 2, 3))
    (_, centre, _), (_, around, _), (_, mean, square) = (sums / sums[:, :1]).tolist()
    return float((centre - around) / math.sqrt(max(square - mean**2, 1e-300)))
