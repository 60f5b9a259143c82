"""Fourier transforms of centred images and volumes in rfft order, shells and shifts.

Data are never fft-shifted: ``rfft`` moves the centre pixel ``size // 2`` to the origin first, so that a real symmetric
object has a real transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from typing import cast

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor

from emsplat.device import CPU
from emsplat.types import Grid

_SLAB = 2**20  # coefficients that are looked at together, where a whole volume would take as much memory again
_CACHED = 2**18  # complex numbers that a core transforms in its caches


def slabs(count: int, each: int, at_once: int = _SLAB) -> Iterator[slice]:
    """Consecutive slices of ``count`` planes of ``each`` numbers, about so many numbers ``at_once``."""
    step = max(1, at_once // each)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def middle(volume: Float[Tensor, "z y x"], size: int) -> Float[Tensor, "w v u"]:
    """The ``size`` voxels around the centre of a map, along each axis; a view."""
    edge = len(volume) // 2 - size // 2
    inside = slice(edge, edge + size)
    return volume[inside, inside, inside]


def rfft(image: Float[Tensor, "*p y x"], dims: int = 2) -> Complex[Tensor, "*p y k"]:
    """Transform of centred images (``dims=2``) or volumes (``dims=3``) over their last axes, unnormalised."""
    axes = tuple(range(-dims, 0))
    spectrum: Tensor = torch.fft.rfftn(torch.fft.ifftshift(image, dim=axes), dim=axes)
    return spectrum


def irfft(spectrum: Complex[Tensor, "*p y k"], dims: int = 2) -> Float[Tensor, "*p y x"]:
    """Inverse of `rfft` for even sizes."""
    axes = tuple(range(-dims, 0))
    size = spectrum.shape[-2]
    image: Tensor = torch.fft.fftshift(torch.fft.irfftn(spectrum, s=(size,) * dims, dim=axes), dim=axes)
    return image


def padded_spectrum(volume: Float[Tensor, "*p z y x"], side: int) -> Complex[Tensor, "*p w v k"]:
    """The transform of volumes with zeros behind them, on a periodic grid of even ``side``.

    Axis by axis: rows of zeros are not transformed.
    """
    planes = torch.fft.rfft2(volume, s=(side, side))
    spectrum: Tensor = torch.fft.fft(planes, n=side, dim=-3)
    return spectrum


def cropped_volume(spectrum: Complex[Tensor, "*p w v k"], size: int) -> Float[Tensor, "*p z y x"]:
    """The first ``size`` voxels along each axis of the volumes that are transformed; the grid is of even side.

    Axis by axis: what is cut off is not transformed back. For a grid 3/2 as wide, there and back takes two thirds of
    the time of whole transforms (docs/log.md).
    """
    planes = torch.fft.ifft(spectrum, dim=-3)[..., :size, :, :]
    rows = torch.fft.ifft(planes, dim=-2)[..., :size, :]
    volume: Tensor = torch.fft.irfft(rows, n=spectrum.shape[-2])[..., :size]
    return volume.contiguous()


def convolve(volume: Float[Tensor, "z y x"], response: Float[Tensor, "w v k"]) -> Float[Tensor, "z y x"]:
    """A volume filtered with zeros behind it, on the grid of the response (of even side), and cut to its size again.

    On CPUs some columns of a large transform at a time, all the way there and back: what is at work stays in caches,
    and the system need not hand out and clear memory for the whole grid in every step of a fit. Quickest with a
    response in the order `by_columns`.
    """
    size, side = len(volume), len(response)
    cached = _CACHED * torch.get_num_threads()
    if volume.device.type != "cpu" or response.numel() <= cached:
        return cropped_volume(padded_spectrum(volume, side).mul_(response), size)
    columns = response.permute(2, 0, 1)
    spectrum = volume.new_empty(len(columns), size, size, dtype=volume.dtype.to_complex())
    for planes in slabs(size, size * side, cached):
        spectrum[:, planes] = torch.fft.rfft(volume[planes], n=side).permute(2, 0, 1)
    for some in slabs(len(columns), side**2, cached):
        part = torch.fft.fft(torch.fft.fft(spectrum[some], n=side, dim=2), n=side, dim=1).mul_(columns[some])
        spectrum[some] = torch.fft.ifft(torch.fft.ifft(part, dim=1)[:, :size], dim=2)[:, :, :size]
    filtered = torch.empty_like(volume)
    for planes in slabs(size, size * side, cached):
        filtered[planes] = torch.fft.irfft(spectrum[:, planes].permute(1, 2, 0), n=side)[..., :size]
    return filtered


def by_columns(response: Float[Tensor, "*m w v k"]) -> Float[Tensor, "*m w v k"]:
    """The same in the order of memory in which `convolve` reads it."""
    return response.movedim(-1, -3).contiguous().movedim(-3, -1) if response.device.type == "cpu" else response


def frequencies(
    grid: Grid, dims: int = 2, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Tensor, ...]:
    """Broadcastable spatial frequencies in 1/Å of the rfft half space, slowest axis first: (ky, kx) or (kz, ky, kx).

    They are kept for the next call: not to be changed in place.
    """
    full, half = _axes(grid, dtype, device)
    axes = [full] * (dims - 1) + [half]
    return tuple(axis.reshape([-1 if i == j else 1 for j in range(dims)]) for i, axis in enumerate(axes))


# What is kept for later calls is made on the CPU. The copy waits until it has arrived, so that any stream of a device
# may use it.
@cache
def _axes(grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    full = torch.fft.fftfreq(grid.size, grid.pixel_size, dtype=dtype)
    half = torch.fft.rfftfreq(grid.size, grid.pixel_size, dtype=dtype)
    return full.to(device), half.to(device)


def shell_radius(size: int, dims: int = 2, device: torch.device = CPU) -> Float[Tensor, "*zy k"]:
    """|k| N a of each rfft coefficient, float64."""
    return _radius(frequencies(Grid(size, 1.0 / size), dims, torch.float64, device))


def _radius(axes: tuple[Tensor, ...]) -> Tensor:
    return cast(Tensor, sum(axis**2 for axis in axes)).sqrt()


def shell_index(size: int, dims: int = 2, device: torch.device = CPU) -> Int[Tensor, "*zy k"]:
    """Shell round(|k| N a) of each rfft coefficient (RELION's rule); corners lie beyond ``size // 2``."""
    return torch.floor(shell_radius(size, dims, device) + 0.5).long()


def radius_slabs(size: int, device: torch.device = CPU) -> Iterator[tuple[slice, Float[Tensor, "z y k"]]]:
    """`shell_radius` of a volume, some planes at a time: the whole takes as much memory as two maps."""
    kz, ky, kx = frequencies(Grid(size, 1.0 / size), 3, torch.float64, device)
    for planes in slabs(size, size * kx.numel()):
        yield planes, _radius((kz[planes], ky, kx))


def shell_slabs(size: int, device: torch.device = CPU) -> Iterator[tuple[slice, Int[Tensor, "z y k"]]]:
    """`shell_index` of a volume, some planes at a time; corners beyond shell ``size // 2`` are ``size // 2 + 1``."""
    for planes, radius in radius_slabs(size, device):
        yield planes, radius.add_(0.5).floor_().clamp_(max=size // 2 + 1).long()


def sum_by_shell(values: Shaped[Tensor, "..."], shells: Int[Tensor, "..."], count: int) -> Shaped[Tensor, " s"]:
    """Sums of the values of shells 0 ... ``count`` - 1; where the values are decides the device."""
    return values.new_zeros(count).scatter_add_(0, shells.flatten(), values.flatten())


def filtered(
    volume: Float[Tensor, "z y x"], response: Callable[[Float[Tensor, "z y k"]], Float[Tensor, "z y k"]]
) -> Float[Tensor, "z y x"]:
    """A centred volume whose transform is multiplied by a function of |k| N a (`shell_radius`, float32)."""
    spectrum = rfft(volume, 3)
    for planes, radius in radius_slabs(len(volume), volume.device):
        spectrum[planes] *= response(radius.float())
    return irfft(spectrum, 3)


def blurred(volume: Float[Tensor, "z y x"], grid: Grid, width: float) -> Float[Tensor, "z y x"]:
    """Convolved with a Gaussian of ``width`` Å (standard deviation); the box repeats."""
    steepness = 2 * (math.pi * width / grid.length) ** 2
    return filtered(volume, lambda radius: torch.exp(-steepness * radius**2))


def randomise_phases(
    image: Float[Tensor, "*p y x"], shell: int, generator: torch.Generator, dims: int = 2
) -> Float[Tensor, "*p y x"]:
    """Images or volumes with random phases in all shells from ``shell`` on, amplitudes unchanged."""
    axes = tuple(range(-dims, 0))
    # The phases of white noise obey the symmetry of the transform of a real image.
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=generator.device).to(image.device)
    phase = torch.fft.rfftn(noise, dim=axes)
    del noise
    spectrum = torch.fft.rfftn(image, dim=axes)
    size = image.shape[-1]
    whole = [(slice(None), shell_index(size, dims, image.device))] if dims < 3 else shell_slabs(size, image.device)
    for rows, shells in whole:
        part = (..., rows, *[slice(None)] * (dims - 1))
        own, other = spectrum[part], phase[part]
        random = own.abs() * other / other.abs().clamp(min=1e-30)
        spectrum[part] = torch.where(shells >= shell, random, own)
    del phase
    moved: Tensor = torch.fft.irfftn(spectrum, s=image.shape[-dims:], dim=axes)
    return moved


def is_smooth(size: int) -> bool:
    """Whether a length has no prime factor above 5, so that it transforms fast."""
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    return size == 1


def smooth_size(least: int) -> int:
    """The first even length from ``least`` on that transforms fast (`is_smooth`)."""
    return next(size for size in count(least + least % 2, 2) if is_smooth(size))


def hermitian_weight(size: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Float[Tensor, " k"]:
    """How often each rfft column stands in the full transform: 1 for kx = 0 and the Nyquist of even sizes, else 2.

    Kept for the next call: not to be changed in place.
    """
    return _hermitian_weight(size, dtype, device)


@cache
def _hermitian_weight(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = torch.full((size // 2 + 1,), 2.0, dtype=dtype)
    weight[0] = 1.0
    if size % 2 == 0:
        weight[-1] = 1.0
    return weight.to(device)


def shift_phase(shift: Float[Tensor, "p 2"], grid: Grid, *, centring: bool = False) -> Complex[Tensor, "p y k"]:
    """Factors that move each image by +shift (x, y) in Å: exp(-2πi (kx sx + ky sy)) (docs/conventions.md, 3).

    With ``centring`` they also make of a plain transform of a centred image what `rfft` gives: half a box of even size
    is a sign, alternating along both axes.
    """
    ky, kx = frequencies(grid, dtype=shift.dtype, device=shift.device)
    x, y = shift[:, 0, None], shift[:, 1, None]
    phase_x = torch.polar(torch.ones_like(x * kx[0]), -2 * torch.pi * x * kx[0])
    phase_y = torch.polar(torch.ones_like(y * ky[:, 0]), -2 * torch.pi * y * ky[:, 0])
    if centring:
        phase_x[:, 1::2].neg_()
        phase_y[:, 1::2].neg_()
    return phase_y[:, :, None] * phase_x[:, None, :]


def crop(spectrum: Shaped[Tensor, "..."], size: int, dims: int = 2) -> Shaped[Tensor, "..."]:
    """The low frequencies of a larger transform, as the transform of a ``size`` box with the same box length.

    The values are unnormalised: divide by (old size / new size)**dims to keep grey values. The Nyquist planes of the
    smaller box are set to zero, since they would alias two frequencies.
    """
    half = size // 2
    for axis in range(-dims, -1):
        length = spectrum.shape[axis]
        spectrum = torch.cat([spectrum.narrow(axis, 0, half), spectrum.narrow(axis, length - half, half)], axis)
    out = spectrum[..., : half + 1].clone()
    out[..., half] = 0
    for axis in range(-dims, -1):
        out.select(axis, half).zero_()
    return out


def widen(spectrum: Shaped[Tensor, "*c z y k"], size: int) -> Shaped[Tensor, "*c Z Y K"]:
    """A transform over three axes as that of more voxels in a box of the same length, zero beyond; `crop` takes it
    back. Nyquist planes are left out."""
    old = spectrum.shape[-2]
    reach = old // 2
    places = torch.arange(-reach + 1, reach)
    wide = spectrum.new_zeros(*spectrum.shape[:-3], size, size, size // 2 + 1)
    to, own = ((places % n)[:, None, None] for n in (size, old))
    half = places[places >= 0]
    wide[..., to, to[:, 0], half] = spectrum[..., own, own[:, 0], half]
    return wide
