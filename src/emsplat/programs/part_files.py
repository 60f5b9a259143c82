"""Parts of the molecule as masks and in words, states as Gaussians, and a script that opens all of it in ChimeraX."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.half import HalfModel
from emsplat.heterogeneity.motions import PartMotion, members, motions, part_of
from emsplat.imaging.project import voxelize
from emsplat.io.files import json_text
from emsplat.io.gaussians import write_gaussians
from emsplat.io.mrc import write_map
from emsplat.measures.mask import soft_region
from emsplat.run.files import (
    CHIMERAX,
    CONSENSUS,
    PARTS,
    PARTS_TABLE,
    PARTS_TEXT,
    STATES,
    part_mask_name,
    state_map_name,
)
from emsplat.run.folder import write_text
from emsplat.run.log import Log
from emsplat.types import Gaussians, Grid

_BLUR = 6.0  # Å, of the density that masks are made of
_LEVEL = 0.15  # of its largest value, where the molecule begins
_MINE = 0.3  # of the density there, where a part begins
# Okabe & Ito's colours stay apart for colour-blind eyes.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c6d31")


def write_parts(
    models: tuple[HalfModel, HalfModel], states: Float[Tensor, "s q"], populations: list[float], folder: Path, log: Log
) -> list[int]:
    """Masks of the parts of half 1's model as they stand in the state of most particles, and what they do over the
    states, as parts.json and parts.txt; returns the numbers of the parts that have a mask."""
    model, reference = models[0], max(range(len(states)), key=lambda s: populations[s])
    member = members(model)
    found = motions(models, states, reference, member)
    made = []
    whole = _density(model.mixture(states[reference]), model.box)
    inside = whole > _LEVEL * whole.max()
    for part in found:
        own = _density(part_of(model, states[reference], member[:, part.number - 1]), model.box)
        region = inside & (own > _MINE * whole)
        if region.any():
            mask = soft_region(region, model.box.pixel_size, _edge(model.box, 2), _edge(model.box, 3))
            (folder / PARTS).mkdir(exist_ok=True)
            write_map(folder / PARTS / part_mask_name(part.number), mask, model.box.pixel_size)
            made.append(part.number)
    said = [part.words for part in found]
    log.line(f"parts of the model of half-set 1, as they stand in state {reference + 1}:")
    for text in said:
        log.line(f"  {text}")
    (folder / PARTS).mkdir(exist_ok=True)
    write_text(folder / PARTS / PARTS_TEXT, "\n".join([*said, ""]))
    write_text(folder / PARTS / PARTS_TABLE, json_text(about(found, reference, made)))
    return made


def about(found: list[PartMotion], reference: int, masks: list[int]) -> dict[str, Any]:
    """The parts as JSON has them: places in Å from the centre of the box, angles in degrees from the reference."""
    parts = []
    for part in found:
        mask = f"{PARTS}/{part_mask_name(part.number)}" if part.number in masks else None
        parts.append(_rounded(asdict(part)) | {"mask": mask, "words": part.words})
    return {"reference_state": reference + 1, "half": 1, "parts": parts}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, tuple):
            return [short(item) for item in value]
        return round(value, 4) if isinstance(value, float) else value

    return {name: short(value) for name, value in values.items()}


def _edge(grid: Grid, voxels: int) -> float:
    """As masks of states: 6 or 9 Å, at least 2 or 3 voxels."""
    return max(3.0 * voxels, voxels * grid.pixel_size)


def _density(mixture: Gaussians, grid: Grid) -> Float[Tensor, "z y x"]:
    wide = mixture.covariance + _BLUR**2 * torch.eye(3)
    return voxelize(Gaussians(mixture.mean, wide, mixture.amplitude), grid)


def write_state_gaussians(models: tuple[HalfModel, HalfModel], latent: Float[Tensor, " q"], path: Path) -> None:
    """The Gaussians of both halves, each at half its amplitude: their map is the mean of both, without residuals."""
    own = [model.mixture(latent) for model in models]
    mixture = Gaussians(
        torch.cat([one.mean for one in own]),
        torch.cat([one.covariance.expand(len(one.mean), 3, 3) for one in own]),
        torch.cat([one.amplitude for one in own]) / 2,
    )
    write_gaussians(path, mixture, models[0].box)


def write_chimerax(folder: Path, level: float, states: int, parts: list[int]) -> None:
    """A script that opens consensus, the series of states and the masks of the parts."""
    lines = [
        f"# ChimeraX: open {CHIMERAX}",
        f"open {CONSENSUS}",
        f"volume #1 style surface step 1 level {level:.6g} color #b8c0c8",
        "transparency #1 70",
        *_series(2, [f"{STATES}/{state_map_name(state)}" for state in range(states)], level),
    ]
    model = 3 if states > 1 else 2
    if parts:
        lines += ["# parts: masks for focused or multi-body refinement", "hide #1 models"]
    for part in parts:
        lines += [
            f"open {PARTS}/{part_mask_name(part)}",
            f"volume #{model} style surface step 1 level 0.5 color {COLOURS[(part - 1) % len(COLOURS)]}",
            f"transparency #{model} 60",
        ]
        model += 1
    write_text(folder / CHIMERAX, "\n".join([*lines, "lighting soft", "view", ""]))


def write_series(folder: Path, level: float, maps: int) -> None:
    """A script that plays the maps 000.mrc, 001.mrc, ... of a folder."""
    lines = _series(1, [state_map_name(number) for number in range(maps)], level)
    write_text(folder / CHIMERAX, "\n".join([f"# ChimeraX: open {CHIMERAX}", *lines, "lighting soft", "view", ""]))


def _series(model: int, names: list[str], level: float) -> list[str]:
    series = len(names) > 1
    lines = [
        f"open {' '.join(names)}" + " vseries true" * series,
        f"volume #{model} style surface step 1 level {level:.6g} color {COLOURS[4]}",
    ]
    return lines + [f"vseries play #{model} direction oscillate loop true maxFrameRate 8"] * series


def surface_level(volume: Float[Tensor, "z y x"], share: float = 0.7) -> float:
    """A level for the isosurface of a map: its brightest voxels above that hold a share of all density that stands out
    by 3 standard deviations."""
    bright = volume[volume > volume.mean() + 3 * volume.std()].sort(descending=True).values
    if not len(bright):
        return float(volume.max()) / 2
    mass = bright.cumsum(0)
    return float(bright[int((mass < share * mass[-1]).sum().clamp(max=len(bright) - 1))])
