"""The model of a half-set: cells, decoder, residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.cells import Cells, few_memberships, gather_cells, joined, overlap
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.extent import Window
from emsplat.heterogeneity.half import HalfModel, half_model
from emsplat.heterogeneity.states import DecoderPlan, fit_decoder
from emsplat.particles.stack import ParticleStack
from emsplat.types import Grid

Tell = Callable[[str], None]


def cells_of(stack: ParticleStack, embedding: Embedding, window: Window, update: Callable[[int, str], None]) -> Cells:
    """The sums of all cells of a half-set; ``update`` is told how many are done."""
    membership, point = few_memberships(embedding.membership), embedding.density.point
    cells = []
    for number, cell in enumerate(gather_cells(stack, membership, point, window.support, window.grid)):
        cells.append(cell)
        update(number + 1, "")
    return joined(cells)


def model_of(
    cells: Cells, box: Grid, embedding: Embedding, plan: DecoderPlan, generator: torch.Generator, tell: Tell
) -> HalfModel:
    """Decoder and residual of a half-set."""
    decoder = fit_decoder(cells, overlap(embedding.membership), plan, generator, tell)
    return half_model(decoder, embedding, cells, box)


def kernel_of(membership: Float[Tensor, "v m"], power: float = 0.5) -> Float[Tensor, "m m"]:
    """Weights with which cells share their data: the overlap of their memberships to a power."""
    return overlap(membership).float() ** power
