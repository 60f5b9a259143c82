"""Classical back-projection: Fourier slices inserted into a padded grid (plain PyTorch).

With slices S_i, CTFs C_i and noise variance σ², the data term of a map V is Σ_k w |V|² - 2 Re(b* V) + const with
b = Σ S_iᵀ C_i Y_i / σ² and w = Σ S_iᵀ C_i² / σ². This module accumulates b and w by trilinear insertion and solves for
the map; it serves as the check of the contrast sign and as the baseline of the benchmarks.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from emsplat.ctf import ctf
from emsplat.fourier import crop, frequencies, rfft, shell_index, shift_phase
from emsplat.particles import ParticleStack
from emsplat.types import Batch, Grid

PADDING = 2


class FourierStatistics:
    """The sums b and w on a grid ``PADDING`` times finer than the Fourier transform of the box."""

    def __init__(self, grid: Grid) -> None:
        side = PADDING * grid.size
        self.grid = grid
        self.numerator = torch.zeros(side, side, side, dtype=torch.complex64)
        self.weight = torch.zeros(side, side, side)

    def add(
        self,
        spectrum: Complex[Tensor, "p y k"],
        transfer: Float[Tensor, "p y k"],
        rotation: Float[Tensor, "p 3 3"],
    ) -> None:
        """Inserts centred transforms of images (origin at the centre pixel, particles centred) at their slices."""
        side, size = len(self.weight), self.grid.size
        ky, kx = frequencies(Grid(size, 1.0 / size))
        inside = (kx**2 + ky**2 < (size / 2) ** 2).expand(size, -1)
        points = torch.stack([kx.expand(size, -1)[inside], ky.expand(-1, size // 2 + 1)[inside]], -1)
        # Rows of A span the slice: k = Aᵀ (kx, ky, 0), in x, y, z.
        target = PADDING * (points @ rotation[:, :2]).reshape(-1, 3)
        values = (transfer * spectrum)[:, inside].reshape(-1)
        weights = (transfer**2)[:, inside].reshape(-1)
        low = target.floor()
        fraction = target - low
        flat_numerator, flat_weight = torch.view_as_real(self.numerator).view(-1, 2), self.weight.view(-1)
        for corner in range(8):
            step = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2 & 1])
            share = torch.where(step.bool(), fraction, 1 - fraction).prod(1)
            x, y, z = ((low.long() + step) % side).unbind(1)
            index = (z * side + y) * side + x
            flat_numerator.index_add_(0, index, torch.view_as_real(values * share))
            flat_weight.index_add_(0, index, weights * share)

    def solve(self, regularisation: float = 0.05) -> Float[Tensor, "z y x"]:
        """The map b / (w + ε) with ε a fraction of the shell's mean weight, so that holes are not amplified."""
        size, side = self.grid.size, len(self.weight)
        # Only half of every slice was inserted; the other half is its Hermitian mirror.
        mirror = (-torch.arange(side)) % side
        half = slice(0, side // 2 + 1)
        numerator = self.numerator[..., half] + self.numerator[mirror][:, mirror][..., mirror[half]].conj()
        weight = self.weight[..., half] + self.weight[mirror][:, mirror][..., mirror[half]]
        shells = shell_index(side, 3)
        count = torch.bincount(shells.flatten())
        mean = torch.bincount(shells.flatten(), weight.flatten().double()) / count
        epsilon = (regularisation * mean[shells]).float() + 1e-12
        volume = torch.fft.irfftn(numerator / (weight + epsilon), s=(side,) * 3)
        start = (side - size) // 2
        box = slice(start, start + size)
        volume = torch.fft.fftshift(volume)[box, box, box]
        # Trilinear insertion multiplies the map by sinc² along each axis.
        window = torch.sinc((torch.arange(size) - size // 2) / side) ** 2
        corrected: Tensor = volume / (window[:, None, None] * window[:, None] * window)
        return corrected


def centred_spectrum(batch: Batch, grid: Grid) -> tuple[Complex[Tensor, "p y k"], Float[Tensor, "p y k"]]:
    """Transforms of a batch with the particles moved to the centre, and their CTFs."""
    return rfft(batch.images) * shift_phase(batch.poses.shift, grid), ctf(batch.optics, grid)


def backproject(stack: ParticleStack, size: int | None = None) -> Float[Tensor, "z y x"]:
    """The classical map of a stack, symmetry applied by inserting every image under every group element.

    ``size`` < box crops the transforms: the same box length at a coarser pixel.
    """
    grid = stack.grid if size is None else Grid(size, stack.grid.length / size)
    statistics = FourierStatistics(grid)
    for batch in stack.sequential(64):
        spectrum, transfer = centred_spectrum(batch, stack.grid)
        if grid != stack.grid:
            spectrum = crop(spectrum, grid.size) * (grid.size / stack.grid.size) ** 2
            transfer = crop(transfer, grid.size)
        for element in stack.symmetry.float():
            statistics.add(spectrum, transfer, batch.poses.rotation @ element)
    return statistics.solve()


def contrast(stack: ParticleStack, particles: int = 1000, size: int = 32) -> float:
    """How much brighter than its surroundings the centre of a quick low-resolution map is, in standard deviations.

    Positive for bright protein with the CTF's sign as in docs/conventions.md; negative when the images are inverted.
    """
    rows = torch.linspace(0, len(stack) - 1, min(particles, len(stack))).long()
    volume = backproject(stack.take(rows), min(size, stack.grid.size))
    axis = (torch.arange(len(volume)) - len(volume) // 2) / len(volume)
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    centre, around = volume[radius < 0.15], volume[(radius > 0.35) & (radius < 0.5)]
    return float((centre.mean() - around.mean()) / volume[radius < 0.5].std())
