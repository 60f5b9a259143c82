"""Images on another box or pixel size."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths.fourier import crop
from emsplat.types import Grid


def resampled_grid(disk: Grid, box: int | None, pixel_size: float | None, *, finer: bool = False) -> Grid:
    """The grid of images that are brought to another box or pixel size.

    With ``box`` alone the whole image on fewer pixels; with ``pixel_size`` (Å) the whole image on the even number of
    pixels that comes nearest to it; with both the middle of that, ``box`` pixels wide. ``finer`` pixels than on disk
    hold nothing new and are refused unless asked for.

    Raises:
        InputError: an odd box, one wider than the image, pixels finer than on disk.
    """
    if box is None and pixel_size is None:
        return disk
    given = {"--box": box, "--pixel-size": pixel_size}
    said = " ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
    if (box is not None and (box < 8 or box % 2)) or (pixel_size is not None and not pixel_size > 0):
        raise InputError(f"{said}: expected an even number from 8 and Å above 0")
    whole = 2 * round(disk.length / pixel_size / 2) if pixel_size is not None else box or disk.size
    if whole < 8 or (whole > disk.size and not finer):
        raise InputError(
            f"{said}: {whole} pixels over the {disk.length:.1f} Å of the images, which "
            f"have {disk.size} of {disk.pixel_size:g} Å; expected coarser pixels than theirs, and at least 8"
        )
    size = box or whole
    if size > whole:
        raise InputError(
            f"{said}: wider than the images ({disk.length:.1f} Å); expected at most {whole} pixels of that size"
        )
    return Grid(size, disk.length / whole)


def resample(
    images: Float[Tensor, "p y x"], disk: Grid, grid: Grid, moves: Int[Tensor, "p 2"] | None = None
) -> Float[Tensor, "p v u"]:
    """Images on a grid from `resampled_grid`: cropped or padded in Fourier space, moved by whole pixels (x, y), cut to
    the box. Grey values stay what they are; what leaves on one side comes in on the other."""
    whole = round(disk.length / grid.pixel_size)
    if whole != disk.size:
        # The first pixel lies half a box from the centre at both sizes, so no image has to be moved to the origin.
        spectrum = torch.fft.rfft2(images)
        spectrum = crop(spectrum, whole) if whole < disk.size else _padded(spectrum, whole)
        images = torch.fft.irfft2(spectrum, s=(whole, whole)).mul_((whole / disk.size) ** 2)
    edge = whole // 2 - grid.size // 2
    if moves is not None and moves.any():
        if images.device.type != "cpu":
            return _moved(images, moves, edge, grid.size)
        images = torch.stack([image.roll((y, x), (0, 1)) for image, (x, y) in zip(images, moves.tolist(), strict=True)])
    return images[:, edge : edge + grid.size, edge : edge + grid.size].contiguous()


def _moved(images: Float[Tensor, "p y x"], moves: Int[Tensor, "p 2"], edge: int, size: int) -> Float[Tensor, "p v u"]:
    """The middle of images that are moved by whole pixels, all of them at once: a GPU would wait for one by one."""
    device, whole = images.device, images.shape[-1]
    pixels, number = torch.arange(edge, edge + size, device=device), torch.arange(len(images), device=device)
    x, y = ((pixels - move[:, None]) % whole for move in moves.to(device).unbind(1))
    return images[number[:, None, None], y[:, :, None], x[:, None, :]]


def _padded(spectrum: Complex[Tensor, "p y k"], size: int) -> Complex[Tensor, "p v j"]:
    """A larger transform with 0 beyond the old Nyquist frequency, and at it, since it stands for two frequencies."""
    half = spectrum.shape[-1] - 1
    out = spectrum.new_zeros(len(spectrum), size, size // 2 + 1)
    out[:, :half, :half] = spectrum[:, :half, :half]
    out[:, -half + 1 :, :half] = spectrum[:, half + 1 :, :half]
    return out
