"""The normal equations of all images: what Gaussians are fitted to, and the classical map that solves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.maths.fourier import frequencies, hermitian_weight, irfft, rfft, shell_index, sum_by_shell
from emsplat.sums.window import REACH
from emsplat.types import Grid


def kernel_size(size: int) -> int:
    return 2 * math.ceil(REACH * size)


def synthesis(half_space: Tensor) -> Float[Tensor, "z y x"]:
    """Σ_k F(k) exp(2πi k x) over the whole periodic grid, origin at index 0, F being Hermitian."""
    reach = (len(half_space) - 3) // 2
    side, device = 2 * reach, half_space.device
    spectrum = torch.zeros(side, side, reach + 1, dtype=torch.complex64, device=device)
    row = (torch.arange(side + 3, device=device) - reach - 1) % side
    mirror = (-torch.arange(side, device=device)) % side
    # Plane by plane: a copy of the half space in another order would cost as much memory again.
    for index, plane in enumerate(half_space):
        z = (index - reach - 1) % side
        wrapped = torch.zeros(side, reach + 3, dtype=plane.dtype, device=device).index_add_(0, row, plane)
        spectrum[z] += wrapped[:, 1 : reach + 2]
        # Every entry stands for its Hermitian mirror too; only here does the mirror lie in x >= 0 (or wrap into it).
        mirrored = wrapped[mirror].conj()
        for x, column in ((0, 1), (1, 0), (reach, reach + 1), (reach - 1, reach + 2)):
            spectrum[-z % side, :, x] += mirrored[:, column]
    volume: Tensor = torch.fft.irfftn(spectrum, s=(side,) * 3, norm="forward")
    return volume


def centre(volume: Float[Tensor, "Z Y X"], size: int) -> Float[Tensor, "z y x"]:
    """The middle of a periodic volume with its origin at index 0, as a centred box."""
    index = (torch.arange(size, device=volume.device) - size // 2) % len(volume)
    return volume[index][:, index][:, :, index]


@dataclass(frozen=True)
class NormalEquations:
    """The data as a quadratic form of the map: ½ VᵀKV - bᵀV, a negative log-likelihood up to a constant.

    ``linear`` is b on the box; ``kernel`` holds K(τ) at lags up to ``REACH`` of the box, lag 0 at its centre.
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
        """The classical map b / (w + 1/τ²).

        ``prior`` is 1/τ² in units of the mean weight of each shell (1/SSNR in RELION's terms); without it a tenth of
        that weight keeps unmeasured frequencies at 0 instead of amplifying their noise.
        """
        size = self.grid.size
        weight = self.weight()
        shells = shell_index(size, 3, weight.device)
        inside, shells = shells <= size // 2, shells.clamp(max=size // 2)
        mean = mean_per_shell(weight)
        share = torch.full_like(mean, 0.1) if prior is None else prior.clamp(min=0.01)
        added = (share * mean)[shells] + 1e-6 * mean.max() + 1e-30
        return irfft(rfft(self.linear, 3) * inside / (weight + added), 3)

    def coverage(self, threshold: float = 0.1) -> float:
        """Fraction of the Fourier voxels within Nyquist whose weight is above a fraction of their shell's mean."""
        size = self.grid.size
        weight, shells = self.weight(), shell_index(size, 3, self.kernel.device)
        inside = shells <= size // 2
        covered = weight > threshold * mean_per_shell(weight)[shells.clamp(max=size // 2)]
        return float((covered & inside).sum() / inside.sum())


def circulant(kernel: Float[Tensor, "w v u"], size: int) -> Float[Tensor, "z y k"]:
    """The circulant matrix on a box of ``size`` voxels that stands for a convolution, lag 0 at its kernel's centre: in
    rfft order, of either sign.

    The kernel is tapered by a triangle (whose transform is positive) and wrapped into the box.
    """
    length = len(kernel)
    axis = torch.arange(length, device=kernel.device) - length // 2
    taper = (1 - axis.abs() / (length // 2)).clamp(min=0)
    tapered = kernel * taper[:, None, None] * taper[:, None] * taper
    for dim in range(3):
        shape = list(tapered.shape)
        shape[dim] = size
        tapered = tapered.new_zeros(shape).index_add_(dim, axis % size, tapered)
    spectrum: Tensor = torch.fft.rfftn(tapered).real
    return spectrum


def mean_per_shell(values: Float[Tensor, "z y k"]) -> Float[Tensor, " s"]:
    """Mean over each shell 0 ... N/2 of a half-space array; shells are so symmetric that the half is enough."""
    size = len(values)
    shells = shell_index(size, 3, values.device).clamp(max=size // 2 + 1)
    total, count = (sum_by_shell(v, shells, size // 2 + 2) for v in (values.double(), torch.ones_like(shells)))
    return (total / count)[: size // 2 + 1].float()


def combined(parts: list[NormalEquations]) -> NormalEquations:
    """The sum of several sets of particles, brought to the grey scale of the first."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part.scaled(relative_gain(parts[0], part))
    return total


def relative_gain(one: NormalEquations, other: NormalEquations) -> float:
    """Grey values of ``other`` relative to ``one``, from the low frequencies, where noise is no matter.

    Normalised images of another pixel size or dose show the same particle with another brightness.
    """
    volume = _lowpass(one.solve(), len(one.linear) / 8)
    return other.gain(volume) / one.gain(volume)


def _lowpass(volume: Float[Tensor, "z y x"], width: float) -> Float[Tensor, "z y x"]:
    """A Gaussian filter of ``width`` shells."""
    kz, ky, kx = frequencies(Grid(len(volume), 1.0 / len(volume)), 3, device=volume.device)
    return irfft(rfft(volume, 3) * torch.exp(-(kx**2 + ky**2 + kz**2) / (2 * width**2)), 3)


def contrast(volume: Float[Tensor, "z y x"]) -> float:
    """How much brighter than its surroundings the centre of a classical map is, in standard deviations.

    Low frequencies only (32 voxels across). Positive for bright protein with the CTF's sign as in docs/conventions.md;
    negative when the images are inverted.
    """
    size = len(volume)
    low = _lowpass(volume, 8.0)
    axis = (torch.arange(size, device=volume.device) - size // 2) / size
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    centre, around = low[radius < 0.15], low[(radius > 0.35) & (radius < 0.5)]
    return float((centre.mean() - around.mean()) / low[radius < 0.5].std())


def sampling(equations: NormalEquations) -> Float[Tensor, "z y x"]:
    """The data's weight in Fourier space relative to the mean of its shell, origin at the centre voxel; 0 beyond
    Nyquist."""
    size = equations.grid.size
    weight, shells = equations.weight(), shell_index(size, 3, equations.kernel.device)
    relative = weight / mean_per_shell(weight).clamp(min=1e-30)[shells.clamp(max=size // 2)]
    relative[shells > size // 2] = 0
    mirror = (-torch.arange(size, device=weight.device)) % size
    rest = relative[mirror][:, mirror][..., mirror[size // 2 + 1 :]]
    centred: Tensor = torch.fft.fftshift(torch.cat([relative, rest], -1))
    return centred
