"""The low frequencies of all images of a half-set, in units of their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.device import CPU
from emsplat.imaging.ctf import in_image, observe, stretch_of
from emsplat.parallel import ALONE, EVERYTHING, Portion, World
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.types import Grid

_BATCH = 64


@dataclass(frozen=True)
class Spectra:
    """Centred Fourier coefficients y = c S V + n of some images, with E|n|² = 1.

    V is the transform Σ v(x) exp(-2πi k x) of a map in the images' grey scale, c the contrast transfer function over
    the noise. Each coefficient of a real image stands here once, without the origin. Coefficients are sorted by
    frequency, so that those within a radius are the first ones. A view is an image under one element of the symmetry;
    views of an image are neighbours. ``portion`` says which views of how many these are, where other processes have
    the others.
    """

    values: Complex[Tensor, "i s"]
    transfer: Float[Tensor, "i s"]
    frequency: Float[Tensor, "s 2"]  # x, y in cycles per ``length``
    image: Int[Tensor, " v"]  # of each view, int32
    rotation: Float[Tensor, "v 3 3"]
    share: Float[Tensor, " v"]  # weight among the copies of an image
    row: Int[Tensor, " i"]  # of each image in the particle table
    length: float  # of the map's box, Å
    portion: Portion = EVERYTHING
    copies: int = 1  # views of an image

    def __len__(self) -> int:
        """How many views there are."""
        return len(self.image)

    @property
    def parts(self) -> tuple[Spectra, ...]:
        """As of images of several grids."""
        return (self,)

    def sample(self, part: float, generator: torch.Generator) -> Spectra:
        """All views of such a part of the images, drawn at random: of several processes each has its own of them."""
        portion, copies = self.portion, self.copies
        views = torch.arange(len(self)) if portion.rows is None else portion.rows
        place = torch.full((portion.total(len(self)) // copies,), -1)
        count = max(1, round(part * len(place)))
        place[torch.randperm(len(place), generator=generator)[:count].sort().values] = torch.arange(count)
        place = place[views // copies]
        kept = (place >= 0).nonzero()[:, 0]
        found = self.take(kept)
        if portion.rows is None:
            return found
        rows = place[kept] * copies + views[kept] % copies
        return replace(found, portion=replace(portion, rows=rows, count=count * copies))

    def within(self, radius: float) -> Float[Tensor, "k 2"]:
        """The frequencies of up to ``radius`` cycles per box, which are the first ones."""
        inside = torch.linalg.vector_norm(self.frequency, dim=1) <= radius
        return self.frequency[: int(inside.sum())]

    def take(self, views: Int[Tensor, " w"]) -> Spectra:
        """Some of the views."""
        return replace(self, image=self.image[views], rotation=self.rotation[views], share=self.share[views])


@dataclass(frozen=True)
class SpectraOfGrids:
    """Spectra of images of several boxes or pixel sizes, one part for each; views are counted through."""

    parts: tuple[Spectra, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def image(self) -> Int[Tensor, " v"]:
        """Of each view, int32."""
        before, images = 0, []
        for part in self.parts:
            images.append(part.image + before)
            before += len(part.row)
        return torch.cat(images)

    @property
    def copies(self) -> int:
        """Views of an image."""
        return self.parts[0].copies

    def sample(self, part: float, generator: torch.Generator) -> SpectraOfGrids:
        """All views of such a part of the images of each grid, drawn at random."""
        return SpectraOfGrids(tuple(own.sample(part, generator) for own in self.parts))

    @property
    def row(self) -> Int[Tensor, " i"]:
        """Of each image in the particle table."""
        return torch.cat([part.row for part in self.parts])

    @property
    def share(self) -> Float[Tensor, " v"]:
        """Weight of each view among the copies of an image."""
        return torch.cat([part.share for part in self.parts])

    @property
    def portion(self) -> Portion:
        """Which views these are, those of all processes in one grid before those in the next."""
        own = [part.portion for part in self.parts]
        before, rows = 0, []
        for one in own:
            if one.rows is None:
                return one
            rows.append(one.rows + before)
            before += one.count
        return Portion(own[0].world, torch.cat(rows), before)


AnySpectra = Spectra | SpectraOfGrids


def half_plane(radius: float, ratio: float, size: int) -> tuple[Float[Tensor, "s 2"], Int[Tensor, " s"]]:
    """Frequencies within ``radius`` in cycles per box of the map, and within Nyquist of the images, each once, and
    their places in a flattened rfft2 of ``size`` pixels; ``ratio`` is the map's box over that of the images."""
    reach = min(math.floor(radius / ratio), size // 2 - 1)
    ky, kx = torch.meshgrid(torch.arange(-reach, reach + 1), torch.arange(reach + 1), indexing="ij")
    kx, ky = kx.flatten(), ky.flatten()
    squared = kx**2 + ky**2
    kept = ((kx > 0) | (ky > 0)) & (squared * ratio**2 <= radius**2) & (squared <= (size // 2) ** 2)
    kx, ky, squared = kx[kept], ky[kept], squared[kept]
    order = torch.argsort(squared, stable=True)
    kx, ky = kx[order], ky[order]
    place = (ky % size) * (size // 2 + 1) + kx
    return torch.stack([kx, ky], 1) * ratio, place


def frequencies_within(
    radius: float, stack: ParticleStack, grid: Grid
) -> tuple[Float[Tensor, "s 2"], Int[Tensor, " s"]]:
    """`half_plane` of the images of a stack of one grid: those frequencies that lie within ``radius`` cycles per box of
    ``grid`` in the object too, however anisotropic magnification stretches them. The whole table counts, so that all
    parts of a stack have the same."""
    bent = stack.table.optics.aberrations
    stretch = 1.0 if bent is None else float(stretch_of(bent.magnification.mT))
    return half_plane(radius / stretch, grid.length / stack.grid.length, stack.grid.size)


def whitening(
    noise: Float[Tensor, "o n"], frequency: Float[Tensor, "s 2"], ratio: float, size: int
) -> Float[Tensor, "o s"]:
    """What makes E|n|² = 1 of transforms of images of ``size`` pixels; frequencies and ratio as in `half_plane`."""
    shell = torch.linalg.vector_norm(frequency / ratio, dim=1).round().long()
    whitened: Tensor = 1 / (noise[:, shell].sqrt() * size)
    return whitened


def read_all_spectra(stack: ParticleStack, radius: float, world: World = ALONE) -> AnySpectra:
    """`read_spectra` of a stack of any grids (`in_one_grey`), up to ``radius`` cycles per box of its grid; of those
    images that this process of a ``world`` takes.

    Raises:
        InputError: a value is not finite.
    """
    parts = tuple(_read_portion(part, radius, stack.grid, world) for part in stack.parts())
    return parts[0] if len(parts) == 1 else SpectraOfGrids(parts)


def _read_portion(stack: ParticleStack, radius: float, grid: Grid, world: World) -> Spectra:
    stack = stack.on(CPU)
    noise = estimate_noise(stack)  # whoever reads an image
    if world.size == 1:
        return read_spectra(stack, radius, grid, noise)
    own, elements = stack.shared(world), stack.symmetry.order
    views = (own[:, None] * elements + torch.arange(elements)).flatten()
    portion = Portion(world, views, len(stack) * elements)
    return replace(read_spectra(stack.take(own), radius, grid, noise), portion=portion)


def read_everywhere(stack: ParticleStack, radius: float, world: World = ALONE) -> Spectra:
    """`read_spectra` of all images in every process of a ``world``, each of which reads a share.

    Raises:
        InputError: as `read_spectra`.
    """
    own = _read_portion(stack, radius, stack.grid, world)
    if world.size == 1:
        return own
    images, views = stack.shared(world), own.portion
    row, count = world.gathered(own.row, images, len(stack)), len(stack)
    return replace(
        own,
        values=world.gathered(own.values, images, count),
        transfer=world.gathered(own.transfer, images, count),
        image=torch.arange(count, dtype=torch.int32).repeat_interleave(stack.symmetry.order),
        rotation=views.whole(own.rotation),
        share=views.whole(own.share),
        row=row,
        portion=EVERYTHING,
    )


def read_spectra(
    stack: ParticleStack, radius: float, grid: Grid | None = None, noise: Float[Tensor, "o n"] | None = None
) -> Spectra:
    """The coefficients of a stack of one grid, up to ``radius`` cycles per box of ``grid`` (that of the stack), in the
    images and in the object (`frequencies_within`); read and kept on the CPU.

    ``noise`` is the power of noise per optics group and shell where it is known, else `estimate_noise` of the stack.

    Raises:
        InputError: the images have several grids, or a value is not finite.
    """
    stack = stack.on(CPU)
    box = grid or stack.grid
    own = stack.grid
    frequency, place = frequencies_within(radius, stack, box)
    noise = estimate_noise(stack) if noise is None else noise
    scale = whitening(noise, frequency, box.length / own.length, own.size)
    values = torch.empty(len(stack), len(place), dtype=torch.complex64)
    transfer = torch.empty(len(stack), len(place))
    rotation, share = torch.empty(len(stack), 3, 3), torch.ones(len(stack))
    done = 0
    for batch in stack.sequential(_BATCH):
        seen, rows = observe(batch, own), slice(done, done + len(batch))
        whitened = scale[batch.optics_group]
        values[rows] = seen.spectrum.flatten(1)[:, place] * whitened
        transfer[rows] = seen.transfer.flatten(1)[:, place] * whitened
        rotation[rows] = in_image(batch.poses.rotation, batch.optics)
        if batch.share is not None:
            share[rows] = batch.share
        done += len(batch)
    elements = stack.symmetry.elements.float()
    views = (rotation[:, None] @ elements).flatten(0, 1)
    image = torch.arange(len(stack), dtype=torch.int32).repeat_interleave(len(elements))
    return Spectra(
        values,
        transfer,
        frequency,
        image,
        views.contiguous(),
        share.repeat_interleave(len(elements)),
        stack.rows,
        box.length,
        copies=len(elements),
    )
