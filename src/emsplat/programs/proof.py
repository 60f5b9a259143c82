"""What the particles of one half-set say of the states that the other half-set's model shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.heterogeneity.cells import raw_map
from emsplat.heterogeneity.evidence import SIGNIFICANT
from emsplat.heterogeneity.half import HalfModel, on_grid
from emsplat.maths.fourier import crop, hermitian_weight, rfft
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.curves import resolution
from emsplat.measures.local_resolution import LocalResolution, default_window, local_cross_validated
from emsplat.measures.states import moving_mask
from emsplat.programs.state_engines import StatesFitted
from emsplat.types import Grid

Images = tuple[Int[Tensor, " v"], Int[Tensor, " w"]]

_NOTHING = 1e-4  # of an FSC: rounding


@dataclass(frozen=True)
class Proof:
    """Of a state: cross-validated resolutions (Å) in the mask of the molecule and where it differs from the consensus;
    and ``fsc_gain``, how much better its map of one half-set tells the other's particles of that state than the mean of
    all other states does (cross-validated FSC, mean over the shells by which particles were placed), with the standard
    error. ``like`` is the state of more particles, from 0, from whose map its own is not told in that way: the same
    structure, perhaps in another grey scale, which an FSC does not see."""

    resolution: float | None
    moving_resolution: float | None
    fsc_gain: float
    fsc_gain_error: float
    like: int | None = None

    @property
    def confirmed(self) -> bool:
        """Whether the half-sets agree that there is such a state, and that it is one of its own."""
        return self.like is None and self.fsc_gain > SIGNIFICANT * self.fsc_gain_error

    @property
    def about(self) -> dict[str, float | None]:
        """What the summary says."""
        own = asdict(self)
        del own["like"]
        return own


def proofs(
    fitted: StatesFitted,
    latents: Float[Tensor, "s q"],
    weight: Float[Tensor, " s"],
    consensus: Float[Tensor, "z y x"],
    grid: Grid,
    mask_of: Callable[[Float[Tensor, "z y x"]], Float[Tensor, "z y x"]],
    last: int,
    images: Images,
) -> list[Proof]:
    """``weight`` says how many particles each state has, ``mask_of`` makes the mask of a state's map, ``last`` is the
    finest frequency, in cycles per box, at which particles were placed, ``images`` are those of the views of each half:
    one may have several views, under a symmetry or in a set that was expanded before."""
    total = [sum(w * model.map(z) for w, z in zip(weight.tolist(), latents, strict=True)) for model in fitted.models]
    rest = float(weight.sum()) - weight
    found: dict[int, Proof] = {}
    shapes: dict[int, Complex[Tensor, "z y k"]] = {}  # of the states that are confirmed
    for number in weight.argsort(descending=True, stable=True).tolist():
        latent = latents[number]
        one, other = (model.map(latent) for model in fitted.models)
        others = [
            (whole - float(weight[number]) * own) / float(rest[number].clamp(min=1e-12))
            for whole, own in zip(total, (one, other), strict=True)
        ]
        raw, copies = _raw(fitted, latent, grid), _copies(fitted, latent, images)
        volume = (one + other) / 2
        seen = []
        molecule = mask_of(volume)
        for mask in (molecule, moving_mask(volume - consensus, grid.pixel_size)):
            curve = None if mask is None else CrossValidation(raw, mask, grid, copies).curve((one, other))
            seen.append(None if curve is None else resolution(curve, 0.5))
        proof = Proof(seen[0], seen[1], math.nan, math.nan)
        where = moving_mask(volume - (others[0] + others[1]) / 2, grid.pixel_size)
        if where is not None and float(rest[number]) > 0:
            # With the molecule, too: what a state lacks shows only beside what it has.
            judge = CrossValidation(raw, torch.maximum(molecule, where), grid, copies)
            gain, error = judge.gain((others[0], others[1]), (one, other), last)
            proof = replace(proof, fsc_gain=gain, fsc_gain_error=error)
            if proof.confirmed:
                shape = _shape(volume, last)
                twin = max(shapes, key=lambda known: _likeness(shape, shapes[known]), default=None)
                if twin is not None:
                    its = fitted.models[0].map(latents[twin]), fitted.models[1].map(latents[twin])
                    gain, error = judge.gain(its, (one, other), last)
                    proof = replace(proof, like=twin if gain <= max(SIGNIFICANT * error, _NOTHING) else None)
                if proof.like is None:
                    shapes[number] = shape
        found[number] = proof
    return [found[number] for number in range(len(latents))]


def _shape(volume: Float[Tensor, "z y x"], last: int) -> Complex[Tensor, "w v k"]:
    """The coarse frequencies of a map, of length 1."""
    spectrum = rfft(volume, 3)
    low = crop(spectrum, 2 * last + 2, 3) if 2 * last + 2 < len(volume) else spectrum
    low = low * hermitian_weight(len(low)).sqrt()
    low[0, 0, 0] = 0  # the mean, that background decides
    shape: Tensor = low / torch.linalg.vector_norm(low).clamp(min=1e-30)
    return shape


def _likeness(one: Complex[Tensor, "z y k"], other: Complex[Tensor, "z y k"]) -> float:
    """Correlation of two maps from their `_shape`."""
    return float((one.conj() * other).real.sum())


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


def _copies(fitted: StatesFitted, latent: Float[Tensor, " q"], images: Images) -> float:
    """How often the data of a state repeat: as often as an image has views where all of these belong to the state, and
    not at all where one of them does."""
    found = []
    for model, member, kernel, own in zip(fitted.models, fitted.members, fitted.kernels, images, strict=True):
        weight = member @ kernel[_cell(model, latent)].to(member)
        found.append(repeats(own, weight))
    return sum(found) / len(found)


def repeats(image: Int[Tensor, " v"], weight: Float[Tensor, " v"]) -> float:
    """How much noisier sums of views are than if each had an image of its own: by (Σ over images (Σ w)²) / Σ w²."""
    total = torch.zeros(int(image.max()) + 1 if len(image) else 0, dtype=weight.dtype).index_add_(0, image, weight)
    square = float(weight.square().sum())
    return float(total.square().sum()) / square if square > 0 else 1.0
