"""Between a few small maps and what images show of them: fields of Fourier values, slices, and the sums' way back.

The window is that of the one-pass sums (`emsplat.sums.window`): off-grid points are spread over 4³ voxels of a grid
1.5 times as fine, and the window's transform is divided out of the maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from emsplat import _native
from emsplat.device import CPU
from emsplat.maths.fourier import smooth_size
from emsplat.sums.spectra import AnySpectra, Spectra
from emsplat.sums.window import PADDING, kernel_fade, kernel_reach, polynomials_on, window_transform

_LANES = 8


def _pitch(numbers: int) -> int:
    """Numbers per voxel, in whole vectors."""
    return -(-numbers // _LANES) * _LANES


@dataclass(frozen=True)
class Lattice:
    """The grid of maps that hold frequencies up to ``radius`` cycles per box.

    Maps are real, (n, n, n), centred on voxel n // 2, and cover the same length as the box of the images; their grey
    values are such that the plain transform Σ v exp(-2πi k x) is that of the fine map. Fields are Fourier values
    of several channels on a padded grid of ``side`` voxels, half space x >= 0 (as `FourierStatistics`), all channels of
    a voxel side by side.
    """

    radius: int

    @property
    def size(self) -> int:
        """n."""
        return smooth_size(2 * self.radius + 2)

    @property
    def reach(self) -> int:
        return smooth_size(2 * math.ceil(PADDING * self.size / 2)) // 2

    @property
    def step(self) -> float:
        """Voxels of a field per cycle per box."""
        return 2 * self.reach / self.size

    def _window(self, length: int) -> Float[Tensor, " x"]:
        """One over the window's transform at the voxels of a centred axis."""
        return 1 / window_transform((np.arange(length) - length // 2) / (2 * self.reach))

    def field(self, maps: Float[Tensor, "c z y x"], *, with_pose: bool = False) -> Float[Tensor, "Z Y X p"]:
        """The transforms of maps, ready to be sliced; ``with_pose`` puts the gradient of the first behind it."""
        side = 2 * self.reach
        axis = (torch.arange(self.size) - self.size // 2).float()
        shapes = ((1, 1, -1), (1, -1, 1), (-1, 1, 1))
        channels = maps.to(torch.complex64)
        if with_pose:
            # d/dk of Σ v exp(-2πi k x / side) with k in voxels.
            moments = [maps[0] * axis.reshape(shape) * (-2j * math.pi / side) for shape in shapes]
            channels = torch.cat([channels[:1], torch.stack(moments), channels[1:]])
        half = self._half_space(channels)
        field = torch.zeros(*half.shape[1:], _pitch(2 * len(channels)))
        field[..., : 2 * len(channels)] = torch.view_as_real(half.permute(1, 2, 3, 0).contiguous()).flatten(-2)
        return field

    def half_space(self, volume: Float[Tensor, "z y x"]) -> Complex[Tensor, "Z Y X"]:
        """The transform of one map, laid out as a field of one number per voxel."""
        return self._half_space(volume[None].to(torch.complex64))[0].contiguous()

    def _half_space(self, channels: Complex[Tensor, "c z y x"]) -> Complex[Tensor, "c Z Y X"]:
        """The transforms of maps with the window divided out, with room for the taps."""
        side, factor = 2 * self.reach, self._window(self.size)
        channels = channels * (factor[:, None, None] * factor[:, None] * factor)
        place = (torch.arange(self.size) - self.size // 2) % side
        padded = torch.zeros(len(channels), side, side, side, dtype=torch.complex64)
        padded[:, place[:, None, None], place[:, None], place] = channels
        spectrum = torch.fft.fftn(padded, dim=(1, 2, 3))
        rows, columns = torch.arange(-self.reach - 1, self.reach + 2) % side, torch.arange(-1, self.reach + 2) % side
        half: Tensor = spectrum[:, rows[:, None, None], rows[:, None], columns]
        return half

    def products(
        self, maps: Float[Tensor, "c z y x"], spectra: AnySpectra, *, with_pose: bool = False
    ) -> Float[Tensor, "v k k"]:
        """Inner products Σ Re x̄ y of what each view shows: its image, the first map through its CTF, with
        ``with_pose`` the derivatives of that by turns about x, y, z of the image (radians) and by shifts along x, y (in
        units of the box over 2π), and the other maps."""
        channels, field = len(maps) + 3 * with_pose, self.field(maps, with_pose=with_pose).numpy()
        parts = [
            _native.view_products(
                field, channels, with_pose, part.values.numpy(), part.transfer.numpy(), *self._views(part)
            )
            for part in spectra.parts
        ]
        products = torch.cat([torch.from_numpy(part) for part in parts])
        if with_pose:
            # The kernel counts frequencies in voxels.
            products[:, 5:7] /= self.step
            products[:, :, 5:7] /= self.step
        return products

    def slices(
        self, maps: Float[Tensor, "c z y x"], spectra: Spectra, field: Float[Tensor, "Z Y X p"] | None = None
    ) -> Complex[Tensor, "v c k"]:
        """What each view shows of each map, before its CTF; ``field`` is that of the maps where it is known."""
        frequency, _, *rest = self._views(spectra)
        known = self.field(maps) if field is None else field
        return torch.from_numpy(_native.view_slices(known.numpy(), len(maps), frequency, *rest))

    def insert(
        self, first: Float[Tensor, "v a"], second: Float[Tensor, "v b"], spectra: AnySpectra
    ) -> tuple[Float[Tensor, "a z y x"], Float[Tensor, "b w t s"]]:
        """Σ first Sᵀ c y as maps, and Σ second Sᵀ c² S as kernels of convolutions (as that of
        `NormalEquations`); each coefficient counts with its Hermitian mirror."""
        means, numbers = first.shape[1], 2 * first.shape[1] + second.shape[1]
        moments = torch.zeros(len(spectra), _pitch(numbers))
        moments[:, : 2 * means] = first.repeat_interleave(2, dim=1)
        moments[:, 2 * means : numbers] = second
        side = 2 * self.reach
        field = np.zeros((side + 3, side + 3, self.reach + 3, moments.shape[1]), np.float32)
        for part, own in zip(spectra.parts, torch.split(moments, list(map(len, spectra.parts))), strict=True):
            views = self._views(part)
            _native.insert_views(field, means, own.numpy(), part.values.numpy(), part.transfer.numpy(), *views)
        folded = self._folded(torch.from_numpy(field)[..., :numbers], means)
        reach, fade = kernel_reach(self.size), kernel_fade(self.size)
        linear = torch.view_as_complex(folded[..., : 2 * means].reshape(*folded.shape[:3], means, 2).contiguous())
        return (
            self._synthesis(linear, self.size),
            self._synthesis(folded[..., 2 * means :].contiguous(), 2 * reach, first=reach)
            * (fade[reach:, None, None] * fade[:, None] * fade),
        )

    def _views(self, spectra: Spectra) -> tuple[Any, ...]:
        frequency = spectra.within(self.radius) * self.step
        polynomials = polynomials_on(CPU).numpy()
        return (
            frequency.contiguous().numpy(),
            spectra.image.numpy(),
            spectra.rotation.contiguous().numpy(),
            polynomials,
            torch.get_num_threads(),
        )

    def _folded(self, field: Float[Tensor, "Z Y X p"], means: int) -> Float[Tensor, "z y k p"]:
        """The half space with its margins, wrapped into the half space of an rfftn."""
        side, reach = 2 * self.reach, self.reach
        row = (torch.arange(side + 3) - reach - 1) % side
        wrapped = field.new_zeros(side, *field.shape[1:]).index_add_(0, row, field)
        wrapped = wrapped.new_zeros(side, side, *field.shape[2:]).index_add_(1, row, wrapped)
        sign = torch.ones(field.shape[-1])
        sign[1 : 2 * means : 2] = -1
        mirror = (-torch.arange(side)) % side
        out = wrapped[:, :, 1 : reach + 2].clone()
        # Every entry stands for its Hermitian mirror too; only here does the mirror lie in x >= 0 (or wrap into it).
        for x, column in ((0, 1), (1, 0), (reach, reach + 1), (reach - 1, reach + 2)):
            out[:, :, x] += sign * wrapped[:, :, column][mirror][:, mirror]
        return out

    def _synthesis(self, spectrum: Tensor, size: int, first: int = 0) -> Float[Tensor, "c z y x"]:
        """The middle of the maps that a half space stands for, with the window divided out; the planes from the
        ``first`` on."""
        side = 2 * self.reach
        index = (torch.arange(size) - size // 2) % side
        factor = self._window(size)
        maps = []
        for channel in spectrum.to(torch.complex64).unbind(-1):
            volume = torch.fft.irfftn(channel, s=(side,) * 3, norm="forward")
            volume = volume[index[first:, None, None], index[:, None], index]
            maps.append(volume * factor[first:, None, None] * factor[:, None] * factor)
        return torch.stack(maps)
