"""Fits a model of all states to the sums of all cells.

What moves is explained by motion, if motion comes first: changes of density can feign any motion, and Gaussians that
fade here and appear there never move. The first fit of all cells is therefore of rigid parts alone. It begins where it
is clear what moves, with the cells around the reference and at the resolution at which neighbours overlap. And which
Gaussians belong to a part is learnt much faster than where they are; else all parts stay blends of the whole molecule.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.fitting.objective import KnownGradient
from emsplat.fitting.state import Optimiser
from emsplat.heterogeneity.cells import Cells, empirical_map
from emsplat.imaging.project import voxelize
from emsplat.maths.fourier import blurred
from emsplat.models.base import ParameterGroup
from emsplat.models.decoder import Decoder, Shape
from emsplat.types import Gaussians

T = TypeVar("T")
Fitting = Generator[str, None, T]  # says what begins, and "" after each step; what it returns is the result

_RATE = 5e-3
_FEWEST_STEPS = 64  # of a stage


@dataclass(frozen=True)
class DecoderStage:
    """Some epochs over the cells at one resolution."""

    resolution: float  # Å
    epochs: int
    rate: float = 1.0
    batch: int = 4
    growing: bool = False  # cells join by their distance to the reference
    rigid: bool = False  # parts alone: no bending, no changes of density
    sorting: float = 1.0  # rate of what says which Gaussians belong to a part, times that of all else


def render(mixture: Gaussians, cells: Cells) -> Float[Tensor, "z y x"]:
    """A mixture on the grid of the cells, with their blur."""
    if cells.blur:
        mixture = Gaussians(mixture.mean, mixture.covariance + cells.blur**2 * torch.eye(3), mixture.amplitude)
    return voxelize(mixture, cells.grid, cutoff=3.0)


def loss(decoder: Decoder, cells: Cells, chosen: Int[Tensor, " b"]) -> Tensor:
    """-log p of the particles of some cells, per particle."""
    total = torch.zeros(())
    for cell, mixture in zip(chosen.tolist(), decoder.mixtures(cells.point[chosen].float()), strict=True):
        volume = render(mixture, cells)
        error, gradient = cells.error_and_gradient(cell, volume.detach())
        total = total + KnownGradient.apply(volume, error, gradient)  # type: ignore[no-untyped-call]
    return total / cells.particles.sum() * len(cells) / len(chosen)


def orders(
    cells: Cells, stage: DecoderStage, reference: int, generator: torch.Generator
) -> Iterator[Int[Tensor, " b"]]:
    """The cells of each step of a stage."""
    distance = (cells.point - cells.point[reference]).square().sum(1)
    rank = distance.argsort()
    # Few cells are seen more often.
    epochs = max(stage.epochs, math.ceil(_FEWEST_STEPS * stage.batch / len(cells)))
    for epoch in range(epochs):
        count = len(cells)
        if stage.growing:
            count = min(count, max(stage.batch, round(count * (epoch + 1) / (0.75 * epochs))))
        yield from torch.split(rank[:count][torch.randperm(count, generator=generator)], stage.batch)


_SORTING = 30.0
_REFERENCE = DecoderStage(24.0, 8, rigid=True, sorting=_SORTING)
_COARSE = (
    DecoderStage(20.0, 64, growing=True, rigid=True, sorting=_SORTING),
    DecoderStage(24.0, 8, sorting=_SORTING),
    DecoderStage(19.0, 8, rate=0.7, sorting=_SORTING),
    DecoderStage(13.0, 8, rate=0.5, sorting=_SORTING),
)
# After the particles were placed anew by these: cells are other and more.
_AGAIN = (DecoderStage(19.0, 4, rate=0.7), DecoderStage(13.0, 4, rate=0.5))
_FINE = (0.4, 0.2, 0.1, 0.05)  # rates of the stages with all frequencies
_FINE_EPOCHS, _FINE_STEPS = 6, 240  # at most, of each: few cells overfit when they are seen more often
_LIKE = 2e5  # Å³ of the molecule for which the resolutions and widths are meant; others scale with its diameter
_FIRST, _MOST = 2048, 24576  # Gaussians
_WIDTH = 7.0  # Å
_PER_VOXEL = 1.2
_CRISP = 2.0  # how much sharper the borders of parts are at the start than those of a decoder drawn at random


@dataclass(frozen=True)
class DecoderPlan:
    """How a decoder is fitted."""

    parts: int
    gaussians: int | None = None  # at the end; None: about one per voxel of the molecule


def coarse_decoder(
    cells: Cells,
    shared: Float[Tensor, "m m"],
    plan: DecoderPlan,
    generator: torch.Generator,
) -> Fitting[Decoder]:
    """A decoder of all cells with few wide Gaussians, which says where things go."""
    reference = reference_cell(cells)
    scale = _scale(molecule_volume(cells, shared))
    shape = Shape(latents=cells.point.shape[1], parts=plan.parts)
    decoder = start(cells, shared, _FIRST, scale * _WIDTH, shape, generator)
    yield "the reference cell"
    first = replace(_REFERENCE, resolution=scale * _REFERENCE.resolution)
    yield from run_stage(decoder, cells, first, generator, only=reference)
    yield from _run_stages(decoder, cells, _COARSE, scale, generator)
    return decoder


def fine_decoder(
    decoder: Decoder,
    cells: Cells,
    shared: Float[Tensor, "m m"],
    plan: DecoderPlan,
    generator: torch.Generator,
) -> Fitting[Decoder]:
    """A decoder of all cells with many narrow Gaussians, from a coarse one."""
    volume = molecule_volume(cells, shared)
    decoder = copy.deepcopy(decoder)
    yield from _run_stages(decoder, cells, _AGAIN, _scale(volume), generator)
    count = plan.gaussians or min(round(_PER_VOXEL * volume / cells.grid.pixel_size**3), _MOST)
    copies = max(1, round(count / _FIRST))
    spacing = (volume / (copies * _FIRST)) ** (1 / 3)
    decoder = decoder.split(copies, max(spacing, 0.8 * cells.grid.pixel_size), generator)
    for rate in _FINE:
        yield f"all frequencies, {len(decoder):,} Gaussians, rate {rate:g}"
        epochs = max(1, min(_FINE_EPOCHS, round(_FINE_STEPS / len(cells))))
        yield from run_stage(decoder, cells, DecoderStage(0.0, epochs, rate, batch=1), generator)
    return decoder


def _scale(volume: float) -> float:
    """Times the resolutions and widths that are meant for a molecule of `_LIKE`."""
    return float(min(max((volume / _LIKE) ** (1 / 3), 0.6), 2.5))


def _run_stages(
    decoder: Decoder,
    cells: Cells,
    stages: Iterable[DecoderStage],
    scale: float,
    generator: torch.Generator,
) -> Fitting[None]:
    for stage in stages:
        yield f"all cells at {scale * stage.resolution:.0f} Å"
        yield from run_stage(decoder, cells, replace(stage, resolution=scale * stage.resolution), generator)


def molecule_volume(cells: Cells, shared: Float[Tensor, "m m"]) -> float:
    """Å³ in which the reference cell and those that overlap with it are brighter than a quarter of their maximum, at a
    resolution of about 15 Å."""
    near = shared[reference_cell(cells)].float()
    smooth = blurred(empirical_map(cells, torch.where(near > 0.05, near, 0.0)), cells.grid, 5.0)
    return float((smooth > 0.25 * smooth.max()).sum()) * cells.grid.pixel_size**3


def reference_cell(cells: Cells) -> int:
    """The cell with most particles."""
    return int(cells.particles.argmax())


def start(
    cells: Cells, shared: Float[Tensor, "m m"], count: int, width: float, shape: Shape, generator: torch.Generator
) -> Decoder:
    """Gaussians drawn from the density of the reference cell and those that overlap with it."""
    reference = reference_cell(cells)
    near = shared[reference].float()
    volume = empirical_map(cells, torch.where(near > 0.05, near, 0.0))
    grid = cells.grid
    size = grid.size
    axis = (torch.arange(size) - size // 2).float()
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    smooth = blurred(volume, grid, width)
    outside = smooth[radius > 0.47 * size]
    level = outside.mean() + 3 * outside.std()
    density = torch.where((smooth > level) & (radius < 0.5 * size - 2), smooth - level, 0.0)
    drawn = torch.multinomial(density.flatten().clamp(min=0) + 1e-12, count, replacement=True, generator=generator)
    index = torch.stack([drawn % size, drawn // size % size, drawn // size**2], 1).float()
    index += torch.rand(count, 3, generator=generator) - 0.5
    decoder = Decoder(
        (index - size // 2) * grid.pixel_size,
        torch.full((count,), width),
        torch.ones(count),
        shape,
        generator=generator,
    )
    with torch.no_grad():
        decoder.logits.mul_(_CRISP)
        decoder.bend.zero_()
        decoder.change.zero_()
    decoder.unit = _best_unit(decoder, cells, reference)
    return decoder


@torch.no_grad()
def _best_unit(decoder: Decoder, cells: Cells, cell: int) -> float:
    """The amplitude with which a mixture fits a cell best."""
    volume = render(decoder.mixtures(cells.point[cell][None].float())[0], cells)
    error, gradient = cells.error_and_gradient(cell, volume)
    slope = torch.dot(volume.flatten(), gradient.flatten())
    curvature = 2 * (slope - error)
    return decoder.unit * float(1 - slope / curvature)


def _groups(decoder: Decoder, stage: DecoderStage) -> list[ParameterGroup]:
    still = {"logits", "bend", "change"} if stage.rigid else {"logits"}
    own = {name: value for name, value in decoder.named_parameters() if name not in still}
    return [ParameterGroup(own), ParameterGroup({"logits": decoder.logits}, rate=stage.sorting)]


def run_stage(
    decoder: Decoder, cells: Cells, stage: DecoderStage, generator: torch.Generator, only: int | None = None
) -> Fitting[None]:
    """Fits the decoder to cells at one resolution (to one cell with ``only``)."""
    coarse = cells.coarse(stage.resolution) if stage.resolution else cells
    optimiser = Optimiser(_groups(decoder, stage))
    reference = reference_cell(cells)
    steps = orders(coarse, stage, reference, generator)
    if only is not None:
        steps = (torch.tensor([only]) for _ in range(16 * stage.epochs))
    for chosen in steps:
        optimiser.forget()
        value = loss(decoder, coarse, chosen)
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step(_RATE * stage.rate)
        yield ""
