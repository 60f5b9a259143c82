"""What the Gaussians of a half-set's model leave of its cells, as maps that are added to those of states.

What stands still is one map, known from all particles. What changes is confined to where it does, of one of two kinds:
pieces of the molecule that change together, each with one map and a course over the cells (what comes and goes is
known from all particles then), or a map of each cell and those that overlap with it (what moves has no map of its own).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.cells import Cells, empirical_map, information_of, joint_maps, sharing
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.half import COARSE, HalfModel, coarse_grid
from emsplat.imaging.project import voxelize
from emsplat.maths.fourier import blurred, convolve, irfft, rfft, widen
from emsplat.maths.independent import rotation_to_independence
from emsplat.measures.mask import soft_region
from emsplat.types import Grid

Residual = Literal["nearby", "together"]
RESIDUALS: tuple[Residual, ...] = ("nearby", "together")

_FILLED = 0.3  # of the cells' box, by the particle
_WIDER = 3.0  # times its mask, what a change is expected to fill: less lets noise in, more is too smooth
_CHANGED, _GROWN, _EDGE = 0.2, 3.0, 6.0  # of the largest change; Å beyond it; Å
_SMALLEST, _MOST_PIECES = 0.01, 24  # share of a piece in the variance of the maps
_ROUNDING = 1e-5  # of the brightest voxel
_SEEN = 0.02  # of the largest change: voxels where changes are looked at


@torch.no_grad()
def left_over(model: HalfModel, cells: Cells) -> Float[Tensor, "m z y x"]:
    """What the Gaussians of a model leave unexplained in the cells: b - K V of each."""
    maps = (voxelize(one, cells.grid) for one in model.decoder.mixtures(cells.point.float()))
    return torch.stack([-cells.error_and_gradient(number, volume)[1] for number, volume in enumerate(maps)])


def with_residuals(
    model: HalfModel,
    embedding: Embedding,
    cells: Cells,
    left: Float[Tensor, "m z y x"],
    kinds: Sequence[Residual] = RESIDUALS,
) -> dict[Residual, HalfModel]:
    """With maps of what is `left_over`, by their kind."""
    change, coarse = _changes(model, cells)
    course, pieces = _pieces(change, cells.particles)
    masks = [_mask(one, coarse, cells.grid) for one in pieces]
    information = information_of(cells)
    design = torch.cat([torch.ones(len(cells), 1), course], 1)
    shares = [_FILLED, *(_share(mask) for mask in masks)]
    mean, *of_pieces = joint_maps(cells, left, information, design, shares)
    found: dict[Residual, HalfModel] = {}
    for kind in kinds:
        rest = mean.repeat(len(cells), 1, 1, 1)
        if kind == "together":
            for own, mask, volume in zip(course.T, masks, of_pieces, strict=True):
                rest += own[:, None, None, None] * (mask * volume)
        else:
            still = torch.stack([one - convolve(mean, k) for one, k in zip(left, cells.response, strict=True)])
            kernel = sharing(embedding.membership)
            for own, weight, away in zip(rest, kernel, change, strict=True):
                mask = _mask(away, coarse, cells.grid)
                own += mask * empirical_map(cells, weight, still, _share(mask), information)
        found[kind] = replace(model, residual=rest.half().float(), grid=cells.grid)  # as it is kept
    return found


def _share(mask: Float[Tensor, "z y x"]) -> float:
    return max(1e-6, min(1.0, _WIDER * float(mask.mean())))


@torch.no_grad()
def _changes(model: HalfModel, cells: Cells) -> tuple[Float[Tensor, "m z y x"], Grid]:
    """By what the maps of the cells differ from their mean, without detail: a quarter of the amplitude at `COARSE`."""
    grid = coarse_grid(cells.grid)
    drawn = torch.stack([voxelize(one, grid) for one in model.decoder.mixtures(cells.point.float())])
    rounding = _ROUNDING * drawn.abs().max()
    drawn -= torch.einsum("m,mzyx->zyx", cells.particles / cells.particles.sum(), drawn)
    drawn[drawn.abs() < rounding] = 0  # of maps that are alike
    width = math.sqrt(math.log(2)) * COARSE / math.pi
    return torch.stack([blurred(one, grid, width) for one in drawn]), grid


def _pieces(
    change: Float[Tensor, "m z y x"], particles: Float[Tensor, " m"]
) -> tuple[Float[Tensor, "m j"], Float[Tensor, "j z y x"]]:
    """Pieces of the molecule that change together, and how much of each is in every cell (mean 0, variance 1 over the
    particles): independent sources of the maps' changes, which are where a piece is and nowhere else."""
    size = change.abs().amax(0)
    seen = size > _SEEN * size.max()
    weight = (particles / particles.sum()).double()
    of_voxels = change[:, seen].double()
    scaled = weight.sqrt()[:, None] * of_voxels
    value, vector = torch.linalg.eigh(scaled @ scaled.T)
    many = min(int((value > _SMALLEST * value.sum()).sum()), _MOST_PIECES) if bool(seen.any()) else 0
    if not many:
        return change.new_zeros(len(change), 0), change.new_zeros(0, *change.shape[1:])
    white = (vector[:, -many:].T @ scaled) * (of_voxels.shape[1] / value[-many:, None]).sqrt()
    sources = rotation_to_independence(white) @ white
    course = of_voxels @ sources.T / of_voxels.shape[1]
    spread = (weight @ course.square()).sqrt()
    pieces = change.new_zeros(many, *change.shape[1:])
    pieces[:, seen] = (spread[:, None] * sources).float()
    return (course / spread).float(), pieces


def _mask(change: Float[Tensor, "z y x"], own: Grid, grid: Grid) -> Float[Tensor, "Z Y X"]:
    """A soft mask of where it is large, on a finer grid of the same box."""
    size = change.abs()
    region = soft_region(size > _CHANGED * size.max(), own.pixel_size, _GROWN, _EDGE)
    if own.size == grid.size:
        return region
    return irfft(widen(rfft(region, 3), grid.size) * (grid.size / own.size) ** 3, 3).clamp(0, 1)
