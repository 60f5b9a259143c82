"""What the particles of one half-set say of the states that the other half-set's model shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.cells import few_memberships, raw_map
from emsplat.heterogeneity.evidence import SIGNIFICANT
from emsplat.heterogeneity.half import HalfModel, on_grid
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.curves import resolution
from emsplat.measures.local_resolution import LocalResolution, default_window, local_cross_validated
from emsplat.measures.states import moving_mask
from emsplat.programs.state_engines import StatesFitted
from emsplat.types import Grid


@dataclass(frozen=True)
class Proof:
    """Of a state: cross-validated resolutions (Å) in the mask of the molecule and where it differs from the consensus;
    and ``fsc_gain``, how much better its map of one half-set tells the other's particles of that state than the mean of
    all other states does (cross-validated FSC, mean over the shells by which particles were placed), with the standard
    error."""

    resolution: float | None
    moving_resolution: float | None
    fsc_gain: float
    fsc_gain_error: float

    @property
    def confirmed(self) -> bool:
        """Whether the half-sets agree that there is such a state."""
        return self.fsc_gain > SIGNIFICANT * self.fsc_gain_error


def proofs(
    fitted: StatesFitted,
    latents: Float[Tensor, "s q"],
    weight: Float[Tensor, " s"],
    consensus: Float[Tensor, "z y x"],
    grid: Grid,
    mask_of: Callable[[Float[Tensor, "z y x"]], Float[Tensor, "z y x"]],
    last: int,
    order: int = 1,
) -> list[Proof]:
    """``weight`` says how many particles each state has, ``mask_of`` makes the mask of a state's map, ``last`` is the
    finest frequency, in cycles per box, at which particles were placed, ``order`` the number of views of each image
    under a symmetry, which are neighbours."""
    total = [sum(w * model.map(z) for w, z in zip(weight.tolist(), latents, strict=True)) for model in fitted.models]
    rest = float(weight.sum()) - weight
    found = []
    for number, latent in enumerate(latents):
        one, other = (model.map(latent) for model in fitted.models)
        others = [
            (whole - float(weight[number]) * own) / float(rest[number].clamp(min=1e-12))
            for whole, own in zip(total, (one, other), strict=True)
        ]
        raw, copies = _raw(fitted, latent, grid), _copies(fitted, latent, order)
        volume = (one + other) / 2
        seen = []
        molecule = mask_of(volume)
        for mask in (molecule, moving_mask(volume - consensus, grid.pixel_size)):
            curve = None if mask is None else CrossValidation(raw, mask, grid, copies).curve((one, other))
            seen.append(None if curve is None else resolution(curve, 0.5))
        gain, error = math.nan, math.nan
        where = moving_mask(volume - (others[0] + others[1]) / 2, grid.pixel_size)
        if where is not None and float(rest[number]) > 0:
            # With the molecule, too: what a state lacks shows only beside what it has.
            both = torch.maximum(molecule, where)
            gain, error = CrossValidation(raw, both, grid, copies).gain((others[0], others[1]), (one, other), last)
        found.append(Proof(seen[0], seen[1], gain, error))
    return found


def local_of(
    fitted: StatesFitted,
    latent: Float[Tensor, " q"],
    halves: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]],
    resolution: float | None,
    grid: Grid,
) -> LocalResolution | None:
    """The cross-validated local resolution of a state: its half maps against what the other half-set's particles say.
    None where a window would have fewer than four voxels."""
    window = min(default_window(resolution), grid.length / 2)
    if window < 4 * grid.pixel_size:
        return None
    return local_cross_validated(halves, _raw(fitted, latent, grid), grid, window=window)


def _raw(
    fitted: StatesFitted, latent: Float[Tensor, " q"], grid: Grid
) -> tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]:
    """What each half-set's particles near a state say, without any model."""
    maps = []
    for model, cells, kernel in zip(fitted.models, fitted.cells, fitted.kernels, strict=True):
        maps.append(on_grid(raw_map(cells, kernel[_cell(model, latent)]), cells.grid, grid))
    return maps[0], maps[1]


def _cell(model: HalfModel, latent: Float[Tensor, " q"]) -> int:
    """The nearest one."""
    return int((model.density.point - model.frame(latent[None])).square().sum(1).argmin())


def _copies(fitted: StatesFitted, latent: Float[Tensor, " q"], order: int) -> float:
    """How often the data of a state repeat under a symmetry: as often as it has elements where all views of an image
    belong to the state, and not at all where one of them does."""
    if order == 1:
        return 1.0
    found = []
    for model, embedding, kernel in zip(fitted.models, fitted.embeddings, fitted.kernels, strict=True):
        weight = few_memberships(embedding.membership) @ kernel[_cell(model, latent)].to(embedding.membership)
        weight = weight.reshape(-1, order)
        found.append(float(weight.sum(1).square().sum() / weight.square().sum().clamp(min=1e-30)))
    return sum(found) / len(found)
