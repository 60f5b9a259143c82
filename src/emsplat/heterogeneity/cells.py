"""Cells of latent space: the one-pass sums of the particles near each point of the density.

From here on no image is needed. A cell's sums say of any map how well it fits the particles of that cell
(`NormalEquations`); a model of all states is fitted to all cells at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from emsplat.device import CPU
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.extent import Window
from emsplat.maths.fourier import convolve, crop, frequencies, middle, shell_index
from emsplat.parallel import ALONE, World
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.sums.equations import NormalEquations, circulant, mean_per_shell, response_of
from emsplat.sums.statistics import accumulate, begin
from emsplat.types import Grid, Poses

_MOST_PRIOR = 1e4  # of the largest information: nothing is left of a map
_KERNEL = 0.5  # power of their overlap with which cells share their data
_MOST, _LEAST = 3, 0.02  # cells that a view may belong to, and the smallest membership that counts


@dataclass(frozen=True)
class Cells:
    """Quadratic forms ½ VᵀKV - bᵀV of the maps in the middle ``grid.size`` voxels of the box, one for each cell.

    ``linear`` is b; ``response`` the transform of K on a grid half as large again, so that lags up to three quarters of
    ``grid.size`` are exact. Gaussians that are narrow for the voxels are drawn ``blur`` Å wider, which both allow for.
    """

    grid: Grid
    linear: Float[Tensor, "m z y x"]
    response: Float[Tensor, "m w v k"]
    point: Float[Tensor, "m q"]
    particles: Float[Tensor, " m"]  # how many a cell holds; memberships add up
    noise: Float[Tensor, " m"]  # variance of b over K: memberships below 1 say less, and are less noisy still
    blur: float = 0.0

    def __len__(self) -> int:
        return len(self.point)

    def coarse(self, nyquist: float) -> Cells:
        """The same on voxels of about ``nyquist`` / 2 Å, with the frequencies that these carry."""
        size = self.grid.size
        smaller = 8 * max(1, math.ceil(size * 2 * self.grid.pixel_size / nyquist / 8))
        if smaller >= size:
            return self
        side, ratio = 3 * smaller // 2, size / smaller
        grid = Grid(smaller, self.grid.length / smaller)
        blur = 0.5 * grid.pixel_size
        response = crop(self.response, side, 3) / ratio**3 * _sharpening(side, grid.pixel_size, blur) ** 2
        spectrum = crop(torch.fft.rfftn(self.linear, dim=(1, 2, 3)), smaller, 3) / ratio**3
        linear = torch.fft.irfftn(spectrum * _sharpening(smaller, grid.pixel_size, blur), s=(smaller,) * 3)
        return replace(self, grid=grid, linear=linear, response=response, blur=blur)

    def error_and_gradient(
        self, cell: int, volume: Float[Tensor, "z y x"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "z y x"]]:
        """½ VᵀKV - bᵀV and KV - b of one cell."""
        applied = convolve(volume, self.response[cell])
        linear = self.linear[cell]
        error = 0.5 * torch.dot(volume.flatten(), applied.flatten()) - torch.dot(volume.flatten(), linear.flatten())
        return error, applied - linear

    def spectrum(self, cell: int) -> tuple[Complex[Tensor, "z y k"], Float[Tensor, "z y k"]]:
        """The transform of b of one cell, and the circulant matrix nearest to its K."""
        return torch.fft.rfftn(self.linear[cell]), _information(self.response[cell], self.grid.size)


def _sharpening(side: int, pixel_size: float, blur: float) -> Float[Tensor, "z y k"]:
    kz, ky, kx = frequencies(Grid(side, pixel_size), 3)
    return torch.exp(2 * math.pi**2 * blur**2 * (kz**2 + ky**2 + kx**2))


def few_memberships(membership: Float[Tensor, "v m"]) -> Float[Tensor, "v m"]:
    """Only the largest memberships of each view, adding up to 1."""
    value, index = membership.topk(min(_MOST, membership.shape[1]), dim=1)
    value[:, 1:] = torch.where(value[:, 1:] < _LEAST, 0.0, value[:, 1:])  # the largest stays, however small
    kept = torch.zeros_like(membership).scatter_(1, index, value)
    return kept / kept.sum(1, keepdim=True)


def cells_of(
    stack: ParticleStack,
    embedding: Embedding,
    window: Window,
    update: Callable[[int, str], None],
    world: World = ALONE,
) -> Cells:
    """The sums of all cells of a half-set; ``update`` is told how many are done. Processes of a ``world`` share the
    images of each cell out, as the first has placed them, and have the sums of all."""
    membership, point = few_memberships(embedding.membership), embedding.density.point
    world.spread_(membership)
    cells = []
    for number, cell in enumerate(gather_cells(stack, membership, point, window.support, window.grid, world)):
        cells.append(cell)
        update(number + 1, "")
    return joined(cells)


def gather_cells(
    stack: ParticleStack,
    membership: Float[Tensor, "v m"],
    point: Float[Tensor, "m q"],
    support: int,
    grid: Grid | None = None,
    world: World = ALONE,
) -> Iterator[Cells]:
    """The sums of each cell, one cell after the other (each a `Cells` of one; `joined` brings them together).

    ``membership`` has a row for each view, the elements of the symmetry of a particle being neighbours. ``support`` is
    in voxels of ``grid``, which covers the box, as fine as the images or coarser.
    """
    noise = {part.grid: estimate_noise(part) for part in stack.parts()}
    own = membership.reshape(len(stack), stack.symmetry.order, -1)
    for number in range(membership.shape[1]):
        weight = own[:, :, number]
        equations = _gather(stack, grid or stack.grid, noise, weight, world)
        yield _reduced(equations, support, point[number], weight)


def _gather(
    stack: ParticleStack,
    grid: Grid,
    noise: dict[Grid, Float[Tensor, "o n"]],
    weight: Float[Tensor, "p s"],
    world: World,
) -> NormalEquations:
    statistics = begin(stack.without_symmetry(), grid)
    for number, element in enumerate(stack.symmetry.elements):
        rows = (weight[:, number] > 0).nonzero()[:, 0]
        part = stack.take(rows)
        poses = part.table.poses[part.rows]
        turned = part.with_poses(Poses(poses.rotation @ element, poses.shift)).without_symmetry()
        before = torch.ones(len(part.table)) if part.share is None else part.share
        share = before.index_copy(0, part.rows, before[part.rows] * weight[rows, number].to(before))
        for some in replace(turned, share=share).parts():
            statistics.next_stack()
            for _ in accumulate(statistics, some, noise[some.grid], world):
                pass
    statistics.gather(world)
    return statistics.used_up().to(CPU)


def _reduced(
    equations: NormalEquations, support: int, point: Float[Tensor, " q"], weight: Float[Tensor, "p s"]
) -> Cells:
    """The middle of the box alone."""
    return Cells(
        Grid(support, equations.grid.pixel_size),
        middle(equations.linear, support).clone()[None],
        response_of(equations.kernel, 3 * support // 2).clamp_(min=0)[None],
        point[None],
        weight.sum()[None].float(),
        # Of a point that is nobody's, none: views keep only their largest memberships.
        (weight.square().sum() / weight.sum().clamp(min=1e-30))[None].float(),
    )


def joined(cells: list[Cells]) -> Cells:
    """Several cells of one kind as one object."""
    linear, response, point, particles, noise = (
        torch.cat([getattr(one, name) for one in cells])
        for name in ("linear", "response", "point", "particles", "noise")
    )
    return Cells(cells[0].grid, linear, response, point, particles, noise)


def overlap(membership: Float[Tensor, "v m"]) -> Float[Tensor, "m m"]:
    """How much cells share views: Σ w_im w_in over its largest value in each row's diagonal, 1 on the diagonal."""
    gram = membership.T @ membership
    scale = torch.diagonal(gram).clamp(min=1e-30).rsqrt()
    return gram * scale[:, None] * scale


def sharing(membership: Float[Tensor, "v m"]) -> Float[Tensor, "m m"]:
    """How far cells share their data: a power of their `overlap`."""
    return overlap(membership).float() ** _KERNEL


def information_of(cells: Cells) -> Float[Tensor, "m z y k"]:
    """The circulant matrix nearest to K of every cell: what `empirical_map` and `joint_maps` take of it, once for many
    maps."""
    return torch.stack([_information(one, cells.grid.size, signed=True) for one in cells.response])


def empirical_map(
    cells: Cells,
    weight: Float[Tensor, " m"],
    linear: Float[Tensor, "m z y x"] | None = None,
    filled: float = 1.0,
    information: Float[Tensor, "m z y k"] | None = None,
) -> Float[Tensor, "z y x"]:
    """The classical map b / (w + 1/τ²) of weighted cells on their grid; other right-hand sides may be given.

    w is the circulant matrix nearest to K (``information`` of all cells, where it is known). τ² per shell is what |b|²
    has more than its noise, over w²; signal that fills only a part of the box (``filled``) is that much stronger where
    it is.
    """
    size = cells.grid.size
    total = torch.fft.rfftn(torch.einsum("m,mzyx->zyx", weight, cells.linear if linear is None else linear))

    def summed(of_cells: Float[Tensor, " m"]) -> Float[Tensor, "z y k"]:
        if information is None:
            return _information(torch.einsum("m,mzyk->zyk", of_cells, cells.response), size)
        return torch.einsum("m,mzyk->zyk", of_cells, information).clamp_(min=0)

    known = summed(weight)
    prior = _prior(total, known, summed(weight.square() * cells.noise), filled)
    spectrum = total * (shell_index(size, 3) <= size // 2) / (known + prior)
    filtered: Tensor = torch.fft.irfftn(spectrum, s=(size,) * 3)
    return filtered


def _prior(
    total: Complex[Tensor, "z y k"], information: Float[Tensor, "z y k"], noise: Float[Tensor, "z y k"], filled: float
) -> Float[Tensor, "z y k"]:
    """1/τ² of each coefficient, in units of the information."""
    size = len(total)
    signal = mean_per_shell(total.abs().square()) - size**3 * mean_per_shell(noise)
    power = _smoothed(signal / mean_per_shell(information.square()).clamp(min=1e-30)).clamp(min=1e-30) / filled
    return (size**3 / power)[shell_index(size, 3).clamp(max=size // 2)]


def joint_maps(
    cells: Cells,
    linear: Float[Tensor, "m z y x"],
    information: Float[Tensor, "m z y k"],
    design: Float[Tensor, "m j"],
    filled: Sequence[float],
) -> Float[Tensor, "j z y x"]:
    """The classical maps R_j of which that of every cell is made: V_m = Σ_j D_mj R_j.

    All cells say something of each, so that what is alike in all is known from all particles. Each has a prior as in
    `empirical_map` and fills its own share of the box.
    """
    size, count = cells.grid.size, design.shape[1]
    found = torch.stack([torch.fft.rfftn(torch.einsum("m,mzyx->zyx", own, linear)) for own in design.T])
    priors = []
    for own, total, share in zip(design.T, found, filled, strict=True):
        known, noise = (
            torch.einsum("m,mzyk->zyk", weight, information) for weight in (own.square(), own.square() * cells.noise)
        )
        prior = _prior(total, known, noise.clamp_(min=0), share)
        priors.append(torch.minimum(prior, _MOST_PRIOR * known.max()))
    products = (design[:, :, None] * design[:, None]).flatten(1)
    inside = shell_index(size, 3) <= size // 2
    for z, there in enumerate(inside):  # matrices of all frequencies at once would take count² maps
        matrix = (information[:, z, there].T @ products).reshape(-1, count, count)
        matrix.diagonal(dim1=1, dim2=2).add_(torch.stack([one[z, there] for one in priors], 1))
        right = torch.view_as_real(found[:, z, there].T.contiguous())
        found[:, z] = 0
        found[:, z, there] = torch.view_as_complex(torch.linalg.solve(matrix, right).contiguous()).T
    maps: Tensor = torch.fft.irfftn(found, s=(size,) * 3, dim=(1, 2, 3))
    return maps


def raw_map(cells: Cells, weight: Float[Tensor, " m"]) -> Float[Tensor, "z y x"]:
    """The same without a prior; a hundredth of a shell's mean keeps unmeasured frequencies at 0."""
    size = cells.grid.size
    total = torch.fft.rfftn(torch.einsum("m,mzyx->zyx", weight, cells.linear))
    information = _information(torch.einsum("m,mzyk->zyk", weight, cells.response), size)
    shells = shell_index(size, 3).clamp(max=size // 2)
    floor = 0.01 * mean_per_shell(information)[shells] + 1e-30
    raw: Tensor = torch.fft.irfftn(total / (information + floor), s=(size,) * 3)
    return raw


def _smoothed(curve: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """Over five shells."""
    window = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]) / 9
    padded = torch.nn.functional.pad(curve[None, None], (2, 2), mode="replicate")
    return torch.nn.functional.conv1d(padded, window[None, None])[0, 0]


def _information(response: Float[Tensor, "w v k"], size: int, *, signed: bool = False) -> Float[Tensor, "z y k"]:
    """The circulant matrix nearest to a convolution on a box of ``size`` voxels; not negative unless ``signed``."""
    side = len(response)
    kernel = torch.fft.fftshift(torch.fft.irfftn(response, s=(side,) * 3)[: side // 2], dim=(1, 2))
    return circulant(kernel, size) if signed else circulant(kernel, size).clamp_(min=0)
