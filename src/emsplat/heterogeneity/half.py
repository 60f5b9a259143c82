"""A half-set's own model of all states: decoder, density, and what the decoder leaves in each cell."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.errors import InputError
from emsplat.heterogeneity.cells import Cells
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.frames import Frame, identity
from emsplat.imaging.project import voxelize
from emsplat.io.tensors import write_tensors
from emsplat.maths.fourier import middle, widen
from emsplat.measures.states import common_mask
from emsplat.models.base import Saved
from emsplat.models.conformations import StateDecoder, read_state_decoder
from emsplat.parallel import World
from emsplat.sums.equations import mean_per_shell
from emsplat.types import Gaussians, Grid

COARSE = 12.0  # Å: what tells where states differ
_JUDGED = 24  # cells of the other half by which residuals are judged


@dataclass(frozen=True)
class HalfModel:
    """The map of any state: Gaussians, and the residual of the cells around it, where there is one.

    ``box`` is that of the images, ``residual`` are maps of its middle; ``precision`` is what an average image says of
    its latent; ``frame`` leads from the latents of the run (those of half 1) to those of this half.
    """

    decoder: StateDecoder
    density: Density
    precision: Float[Tensor, "q q"]
    residual: Float[Tensor, "m z y x"]
    grid: Grid  # of the residual
    box: Grid
    frame: Frame

    def mixture(self, latent: Float[Tensor, " q"]) -> Gaussians:
        """The Gaussians of a state."""
        with torch.no_grad():
            return self.decoder.mixtures(self.frame(latent.double()[None]).float())[0]

    def map(self, latent: Float[Tensor, " q"], grid: Grid | None = None) -> Float[Tensor, "z y x"]:
        """The map of a state in the box of the images, or on the grid of the residual; ``latent`` is one of the run."""
        grid = grid or self.box
        drawn = voxelize(self.mixture(latent), grid)
        if not len(self.residual):
            return drawn
        own = self.frame(latent.double()[None])[0]
        away = self.density.point - own
        likely = torch.softmax(-0.5 * torch.einsum("mq,qr,mr->m", away, self.precision, away), 0)
        rest = torch.einsum("m,mzyx->zyx", likely.float(), self.residual.float())
        return drawn + (rest if grid == self.grid else on_grid(rest, self.grid, self.box))

    @torch.no_grad()
    def change_gram(self) -> Float[Tensor, "q q"]:
        """Inner products of how the map changes along the latents of the run, by regression over the points of the
        density: what makes lengths in latent space differences of maps. Coarse maps of the Gaussians alone."""
        grid = coarse_grid(self.box)
        point, weight = self.density.point.double(), self.density.weight.double()
        mixtures = self.decoder.mixtures(point.float())
        drawn = torch.stack([voxelize(one, grid).flatten() for one in mixtures]).double()
        mean = weight @ drawn / weight.sum()
        away = point - weight @ point / weight.sum()
        scaled = weight.sqrt()[:, None]
        slope = torch.linalg.lstsq(scaled * away, scaled * (drawn - mean), driver="gelsd").solution
        along = self.frame.turn.double().T @ slope  # of the latents of the run
        gram: Tensor = along @ along.T
        return gram

    def save(self, path: Path) -> None:
        """Writes all of it."""
        about, tensors = self.packed()
        write_tensors(path, tensors, {"emsplat.half": json.dumps(about)})

    def packed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold of it, and tensors by name: for a file or another process."""
        state = self.decoder.state()
        tensors = {f"decoder.{name}": value for name, value in state.tensors.items()}
        tensors |= {
            "point": self.density.point,
            "weight": self.density.weight,
            "precision": self.precision,
            "residual": self.residual.half(),
            "turn": self.frame.turn,
            "offset": self.frame.offset,
        }
        grids = {name: [grid.size, grid.pixel_size] for name, grid in (("grid", self.grid), ("box", self.box))}
        about = {"kind": state.kind, "decoder": state.numbers, **grids}
        return about, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def read_half(path: Path) -> HalfModel:
    """What `HalfModel.save` wrote.

    Raises:
        InputError: it is missing, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["emsplat.half"])
            own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unpacked(about, own)
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not the model of a half-set, or damaged ({error}); run it again") from error


def _unpacked(about: dict[str, Any], own: dict[str, Tensor]) -> HalfModel:
    decoder = {name.removeprefix("decoder."): value for name, value in own.items() if name.startswith("decoder.")}
    grid, box = (Grid(int(about[name][0]), float(about[name][1])) for name in ("grid", "box"))
    return HalfModel(
        read_state_decoder(Saved(about["kind"], about["decoder"], decoder)),
        Density(own["point"], own["weight"]),
        own["precision"],
        own["residual"].float(),
        grid,
        box,
        Frame(own["turn"], own["offset"]),
    )


def spread_half(model: HalfModel | None, world: World, source: int) -> HalfModel:
    """The model that one process has, in all of them."""
    return world.spread_packed(model, HalfModel.packed, _unpacked, source)


def coarse_grid(grid: Grid) -> Grid:
    """The same box on voxels of half of `COARSE` Å or a little less, or on its own where these are no finer."""
    size = min(grid.size, 8 * math.ceil(2 * grid.length / COARSE / 8))
    return Grid(size, grid.length / size)


def agreement(model: HalfModel, cells: Cells, frame: Frame) -> float:
    """How well a model tells the sums of cells of the other half, whose latents ``frame`` leads to its own: correlation
    of its maps, where the molecule is, with what the cells say, mean over shells, so that fine detail counts."""
    chosen = cells.particles.argsort(descending=True)[:_JUDGED]
    maps = [model.map(one, cells.grid) for one in frame(cells.point[chosen])]
    mask = common_mask(torch.stack(maps).amax(0), cells.grid.pixel_size)
    told, power, seen = (torch.zeros(cells.grid.size // 2 + 1) for _ in range(3))
    for cell, volume in zip(chosen.tolist(), maps, strict=True):
        own, linear, weight = torch.fft.rfftn(volume * mask), *cells.spectrum(cell)
        told += mean_per_shell((own.conj() * linear).real)
        power += mean_per_shell(own.abs().square() * weight)
        seen += mean_per_shell(linear.abs().square() / weight.clamp(min=1e-6 * float(weight.max())))
    return float((told / (power * seen).clamp(min=1e-30).sqrt())[1:].mean())


def without_residual(decoder: StateDecoder, embedding: Embedding, box: Grid) -> HalfModel:
    """The Gaussians alone."""
    nothing, frame = torch.zeros(0, 8, 8, 8), identity(embedding.density.point.shape[1])
    return HalfModel(decoder, embedding.density, embedding.precision, nothing, box, box, frame)


def in_frame(model: HalfModel, frame: Frame) -> HalfModel:
    """The same model, asked with latents of the run."""
    return replace(model, frame=frame)


def on_grid(volume: Float[Tensor, "z y x"], own: Grid, grid: Grid) -> Float[Tensor, "Z Y X"]:
    """A map of the middle of the box, on voxels of the box or coarser ones, in the whole box; grey values are those of
    the fine map's projections."""
    size = round(grid.length / own.pixel_size)
    whole = volume.new_zeros(size, size, size)
    middle(whole, own.size).copy_(volume)
    if size == grid.size:
        return whole
    spectrum = torch.fft.rfftn(torch.fft.ifftshift(whole))
    wide = widen(spectrum, grid.size)
    fine: Tensor = torch.fft.fftshift(torch.fft.irfftn(wide, s=(grid.size,) * 3))
    return fine
