"""The maps of a run folder, the mask, and what they are compared with."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emsplat.config import MaskOptions
from emsplat.errors import InputError
from emsplat.imaging.project import voxelize
from emsplat.io.gaussians import holds_gaussians
from emsplat.io.mrc import StoredMap, misplaced, read_stored_map
from emsplat.io.mrc_arrays import Origin
from emsplat.maths.groups import C1, Symmetry, parse_symmetry
from emsplat.measures.curves import resolution
from emsplat.measures.fsc import common_grid, fsc_curve
from emsplat.measures.mask import check_mask, solvent_mask, spherical_mask
from emsplat.models.start_files import read_fitted
from emsplat.run.files import BACKPROJECTIONS, FULL_MAP, HALF_MAPS, MASK, SETTINGS
from emsplat.run.log import Log
from emsplat.types import Curve, Grid

_NOWHERE = (0.0, 0.0, 0.0)
FIRST_SHELLS = 4  # which show the outline
_SPILLED = 2  # shells that a mask carries detail over
_OPPOSITE = -0.3  # mean FSC of the first shells


@dataclass(frozen=True)
class RunMaps:
    """The maps of a run folder on one grid."""

    grid: Grid
    halves: tuple[Tensor, Tensor]
    raw: tuple[Tensor, Tensor] | None  # back-projections, where the half maps are models
    full: Tensor | None
    mask: Tensor
    origin: Origin = _NOWHERE
    symmetry: Symmetry = C1  # that was imposed on them

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """The half maps that no prior has touched."""
        return self.raw or self.halves

    def masked(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Two of the maps in the mask."""
        return pair[0] * self.mask, pair[1] * self.mask


def is_evident(halves: tuple[Tensor, Tensor], grid: Grid, diameter: float, shared: float | None = None) -> bool:
    """Whether two back-projections agree beyond the first shells, in a sphere that knows nothing of them, and beyond
    the band that their poses share to ``shared`` Å (`beyond_shared`).

    The start from a map and the shape of the box make two fits to noise alike in the first shells, so a model's FSC
    alone says nothing there. The back-projections carry no such likeness.
    """
    first = resolution(fsc_curve(*halves, grid, sphere(grid, diameter)), 0.143)
    return first is not None and first < grid.length / FIRST_SHELLS and beyond_shared(first, grid, shared)


def shared_shell(grid: Grid, shared: float | None) -> int:
    """The last shell that half-sets share whose poses were found with one map of ``shared`` Å: noise of all shells of
    that map was aligned, and a mask carries it two shells further."""
    return 0 if shared is None else math.ceil(grid.length / shared - 1e-6) + _SPILLED


def beyond_shared(resolution: float, grid: Grid, shared: float | None) -> bool:
    """Whether a resolution in Å says something that the half-sets do not share from the beginning."""
    return resolution * shared_shell(grid, shared) < grid.length * (1 - 1e-9)


def are_opposite(curve: Curve) -> bool:
    """Whether two maps have opposite contrast, by the FSC of their first shells."""
    return float(curve.value[1 : FIRST_SHELLS + 1].mean()) < _OPPOSITE


def say_opposite(one: str, other: str) -> str:
    """What to say of two maps that `are_opposite`."""
    return (
        f"{one} and {other} have opposite contrast, their FSC is below 0: one of them is inverted (protein dark); "
        "multiply that by -1"
    )


def particle_mask(volume: Tensor, grid: Grid, diameter: float, evident: bool) -> Tensor:
    """The automatic mask: solvent flattened where there is a particle, else a sphere.

    Cut out of noise, a mask would pick the places where both halves happen to be alike.
    """
    return solvent_mask(volume, grid, diameter) if evident else sphere(grid, diameter)


def sphere(grid: Grid, diameter: float) -> Tensor:
    """A spherical mask with an edge of 6 voxels, at most as large as the box holds.

    Raises:
        InputError: the diameter is not positive.
    """
    return spherical_mask(grid, min(diameter, _largest(grid)), _edge(grid))


def _edge(grid: Grid) -> float:
    return min(6 * grid.pixel_size, grid.length / 5)


def _largest(grid: Grid) -> float:
    """The diameter of the largest sphere that the box holds with its edge."""
    return grid.length - 2 * _edge(grid)


def read_beside(path: Path, grid: Grid, log: Log | None, beside: str, origin: Origin = _NOWHERE) -> Tensor:
    """A map on the grid of other maps, called ``beside``, whose voxel 0 lies at ``origin``, taken voxel by voxel.

    The log is told what had to be assumed of the file, and where its header puts it elsewhere than the others.

    Raises:
        InputError: the map cannot be read, or has another box or pixel size.
    """
    stored = read_stored_map(path)
    common_grid({beside: grid, str(path): stored.grid})
    if log is not None:
        _remark(stored, path, beside, origin, log)
    return stored.volume


def _remark(stored: StoredMap, path: Path, beside: str, origin: Origin, log: Log) -> None:
    shift = [own - other for own, other in zip(stored.origin, origin, strict=True)]
    apart = misplaced(beside, str(path), shift, stored.grid)
    for text in (*stored.warnings, *([] if apart is None else [apart])):
        log.warn(text)


def read_reference(path: Path, grid: Grid, log: Log, beside: str, origin: Origin = _NOWHERE) -> Tensor:
    """A map as `read_beside`, or Gaussians or an atomic model (.cif, .pdb, .ply) as a map on ``grid``.

    Atoms become Gaussians as wide as their form factor and the B factor of the file make them, at least half a pixel. A
    shell's FSC does not ask how fast amplitudes fall, so a B factor of all atoms matters little. Coordinates are those
    of the map's header, whose voxel 0 lies at ``origin``, as viewers show them.

    Raises:
        InputError: the file cannot be read, has another grid, or what it holds lies outside the box.
    """
    if not holds_gaussians(path):
        return read_beside(path, grid, log, beside, origin)
    gaussians = read_fitted(path, grid, origin)
    if any(origin):
        place = ", ".join(f"{value:g}" for value in origin)
        log.line(f"{path}: placed by the header of {beside}, whose voxel 0 lies at ({place}) Å")
    width = gaussians.covariance.diagonal(dim1=1, dim2=2).mean(1).sqrt()
    log.line(
        f"{path}: {len(gaussians):,} atoms or Gaussians on {grid.size}³ voxels of {grid.pixel_size:.4g} Å, σ from "
        f"{float(width.min()):.2f} to {float(width.max()):.2f} Å (of atoms: form factor and B factor of the file, at "
        "least half a pixel)"
    )
    return voxelize(gaussians, grid)


def read_pair(a: Path, b: Path, log: Log) -> tuple[Tensor, Tensor, Grid, Origin]:
    """Two maps on one grid, or one and a model on the grid of the map; and where the map places voxel 0.

    Raises:
        InputError: they cannot be read, have two grids, or neither is a map.
    """
    if holds_gaussians(a) and holds_gaussians(b):
        raise InputError(f"{a} and {b}: expected at least one map, `emsplat voxelize` makes one of a model")
    if holds_gaussians(a):
        second, first, grid, origin = read_pair(b, a, log)
        return first, second, grid, origin
    stored = read_stored_map(a)
    for text in stored.warnings:
        log.warn(text)
    second = read_reference(b, stored.grid, log, str(a), stored.origin)
    return stored.volume, second, stored.grid, stored.origin


def read_mask(path: Path, grid: Grid, log: Log | None = None, origin: Origin = _NOWHERE) -> Tensor:
    """A mask for maps on ``grid``, as `read_beside`.

    Raises:
        InputError: another box or pixel size, values outside [0, 1], or empty.
    """
    return check_mask(read_beside(path, grid, log, "the maps", origin), str(path))


def given_mask(
    options: MaskOptions,
    grid: Grid,
    log: Log | None = None,
    origin: Origin = _NOWHERE,
) -> Tensor | None:
    """The mask that the options ask for, None where they ask for none.

    Raises:
        InputError: they ask for two, or one that does not fit.
    """
    if options.mask is not None and options.mask_diameter is not None:
        raise InputError("--mask and --mask-diameter: expected one of them; leave the other out")
    if options.mask is not None:
        return read_mask(options.mask, grid, log, origin)
    if options.mask_diameter is None:
        return None
    if options.mask_diameter > _largest(grid) and log is not None:
        log.warn(
            f"--mask-diameter {options.mask_diameter:g}: a sphere and its soft edge fit into the box up to "
            f"{_largest(grid):.1f} Å, which is taken"
        )
    return sphere(grid, options.mask_diameter)


def read_run(run: Path, mask: Path | None = None, log: Log | None = None) -> RunMaps:
    """The maps of a run folder; ``mask`` in place of its own. A ``log`` is told what its files leave open.

    Raises:
        InputError: no such folder, no half maps, maps that do not belong together, half maps that are one map,
            or settings that cannot be read.
    """
    if not run.is_dir():
        raise InputError(f"{run}: not a folder; expected a run folder of emsplat; check the path")
    missing = [name for name in HALF_MAPS if not (run / name).is_file()]
    if missing:
        raise InputError(f"{run}: {missing[0]} is missing; expected a finished run; was it interrupted?")
    names = [name for name in (*HALF_MAPS, FULL_MAP, *BACKPROJECTIONS) if (run / name).is_file()]
    stored = {name: read_stored_map(run / name) for name in names}
    grid = common_grid({str(run / name): own.grid for name, own in stored.items()})
    origin = stored[HALF_MAPS[0]].origin
    if log is not None:
        for name, own in stored.items():
            _remark(own, run / name, HALF_MAPS[0], origin, log)
    found = {name: own.volume for name, own in stored.items()}
    first, second = (found[name] for name in HALF_MAPS)
    if torch.equal(first, second):
        raise InputError(
            f"{run}: {HALF_MAPS[0]} and {HALF_MAPS[1]} are the same map; expected two independent ones; "
            "an FSC of a map with itself says nothing"
        )
    raw = tuple(found[name] for name in BACKPROJECTIONS if name in found)
    full = found.get(FULL_MAP)
    path = mask or run / MASK
    if mask is None and not path.is_file():
        data = (raw[0], raw[1]) if len(raw) == 2 else (first, second)
        diameter = 0.9 * grid.length
        soft = particle_mask(data[0] + data[1], grid, diameter, is_evident(data, grid, diameter))
    else:
        soft = read_mask(path, grid, None if mask is None else log, origin)
    return RunMaps(
        grid, (first, second), (raw[0], raw[1]) if len(raw) == 2 else None, full, soft, origin, _imposed(run)
    )


def _imposed(run: Path) -> Symmetry:
    """The symmetry that a run imposed; C1 where its folder says none.

    Raises:
        InputError: its settings cannot be read, or name no point group.
    """
    path = run / SETTINGS
    if not path.is_file():
        return C1
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8")).get("options", {})
        return parse_symmetry(str(options.get("symmetry", C1.symbol)), "symmetry =")
    except (OSError, ValueError, AttributeError, InputError) as error:
        raise InputError(
            f"{path}: the symmetry of the run cannot be read ({error}); give a point group as `symmetry` below "
            "[options], or make the run again"
        ) from error
