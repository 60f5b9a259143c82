"""emsplat for notebooks and scripts: particles in, maps and numbers out. `import emsplat as em` offers what is here.

Nothing changes the process around it, and nothing is printed unless it is asked for.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.assessment.curves import half_map_curves
from emsplat.assessment.maps import is_evident, particle_mask
from emsplat.config import ReconstructConfig, RefineConfig, checked, configure, names
from emsplat.errors import InputError
from emsplat.fitting.loop import fit as fit_steps
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective, support_of, support_size
from emsplat.io import gaussians as gaussian_files
from emsplat.io import mrc
from emsplat.io.particles import read_particles as read_table
from emsplat.io.table import ParticleTable, merge_tables
from emsplat.maths.groups import parse_symmetry
from emsplat.measures.curves import Curves, resolution
from emsplat.measures.fsc import Rule
from emsplat.measures.fsc import fsc_curve as measured_curve
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import from_gaussians, from_map
from emsplat.particles.open import open_table
from emsplat.particles.stack import ParticleStack
from emsplat.programs import reconstruct as programs
from emsplat.programs import refine as refinement
from emsplat.programs.begin import gaussian_count
from emsplat.programs.classical import judge
from emsplat.programs.settings import RECIPES
from emsplat.report import verdict
from emsplat.run import files
from emsplat.run.folder import read_summary
from emsplat.run.fsc_star import read_fsc_star
from emsplat.run.log import Log
from emsplat.sums.equations import NormalEquations
from emsplat.sums.statistics import equations_of
from emsplat.types import Curve, Gaussians, Grid


def read_particles(
    path: str | Path,
    *,
    merge: Sequence[str | Path] = (),
    datadir: str | Path | None = None,
    poses: str | Path | None = None,
    ctf: str | Path | None = None,
    passthrough: Sequence[str | Path] = (),
    symmetry: str = "C1",
    box: int | None = None,
    pixel_size: float | None = None,
    diameter: float | None = None,
    invert: bool = False,
    seed: int = 0,
) -> ParticleStack:
    """Particles of RELION (.star), cryoSPARC (.cs) or cryoDRGN (.mrcs with ``poses`` and ``ctf``), in half-sets.

    Half-sets are those of the file, or drawn per micrograph (``seed``). No image is read yet: ``next(p.sequential(8))``
    is a batch of the first eight, ``p.take(rows)`` chooses, ``p.table`` has poses, CTF and names. ``box`` (pixels) and
    ``pixel_size`` (Å) resample the images when they are read; pixels further than ``diameter`` / 2 (Å) from the centre
    are background; ``invert`` is for images that are dark where the file says they are bright.

    Raises:
        InputError: a file is missing or damaged, lacks poses or CTF, or does not fit its images.
    """
    first = read_table(
        Path(path),
        datadir=None if datadir is None else Path(datadir),
        poses=None if poses is None else Path(poses),
        ctf=None if ctf is None else Path(ctf),
        passthrough=[Path(other) for other in passthrough],
    )
    more = [read_table(Path(other), datadir=None if datadir is None else Path(datadir)) for other in merge]
    table = merge_tables([first, *more])
    stack = open_table(
        table,
        symmetry=parse_symmetry(symmetry),
        invert=invert,
        diameter=None if diameter is None else float(diameter),
        box=box,
        pixel_size=None if pixel_size is None else float(pixel_size),
    )
    return stack.with_halves(seed)


def read_map(path: str | Path) -> tuple[Float[Tensor, "z y x"], Grid]:
    """A map in MRC or CCP4 format, packed or not, and its voxels.

    Raises:
        InputError: missing, damaged, or not a cube.
    """
    return mrc.read_map(Path(path))


def write_map(path: str | Path, volume: Float[Tensor, "z y x"], pixel_size: float) -> None:
    """A map in MRC format, float32; ``pixel_size`` in Å.

    Raises:
        InputError: the pixel size is not above 0; no array of three axes, or values that are not finite.
        OutputError: it cannot be written.
    """
    _require_size(float(pixel_size))
    mrc.write_map(Path(path), as_map(volume, str(path)).cpu(), float(pixel_size))


def fsc_curve(
    a: Float[Tensor, "z y x"],
    b: Float[Tensor, "_z _y _x"],
    grid: Grid,
    mask: Float[Tensor, "_z _y _x"] | None = None,
    rule: Rule = "relion",
) -> Curve:
    """Fourier shell correlation of two maps, with the frequency of each shell, s / (N a) in 1/Å.

    The maps are multiplied by the mask first. ``rule`` says which frequencies shell s holds: "relion", those rounded to
    s; "cryodrgn", from s - 1 up to s (docs/conventions.md, 8).

    Raises:
        InputError: the maps are not cubes of one size on ``grid``, or not numbers; the mask has another shape, is empty
            or leaves [0, 1].
    """
    first, second = as_map(a, "the first map"), as_map(b, "the second map")
    return measured_curve(first, second, grid, None if mask is None else as_map(mask, "the mask"), rule)


def as_map(values: Any, what: str) -> Float[Tensor, "z y x"]:
    """A map as the others take it, float32: of a tensor or an array of any kind of real numbers.

    Raises:
        InputError: it is no array of three axes, or holds values that are not finite.
    """
    try:
        volume = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: {type(values).__name__}; expected a tensor or an array of numbers") from error
    if volume.dim() != 3 or volume.is_complex():
        raise InputError(f"{what}: {volume.dtype} of {tuple(volume.shape)}; expected real numbers along three axes")
    volume = volume.detach().float()
    if not bool(torch.isfinite(volume).all()):
        raise InputError(f"{what}: holds values that are not finite; expected numbers in every voxel")
    return volume


def _require_size(pixel_size: float) -> None:
    if not 0 < pixel_size < math.inf:
        raise InputError(f"pixels of {pixel_size:g} Å; expected a size above 0")


def read_gaussians(path: str | Path, grid: Grid | None = None) -> tuple[Gaussians, Grid]:
    """A mixture from PLY, or pseudo-atoms from mmCIF or PDB (then with the ``grid`` that their frame belongs to).

    Raises:
        InputError: missing, damaged, or no mixture.
    """
    return gaussian_files.read_gaussians(Path(path), grid)


def write_gaussians(path: str | Path, gaussians: Gaussians, grid: Grid) -> list[str]:
    """A mixture as PLY, or as pseudo-atoms in mmCIF or PDB, by the ending of the name; returns what that format does
    not hold.

    Raises:
        OutputError: another ending, no room for these Gaussians in the format, or the file cannot be written.
    """
    return gaussian_files.write_gaussians(Path(path), gaussians, grid)


def accumulate(particles: ParticleStack) -> NormalEquations:
    """One pass over the images: all that they say of a map, whatever is fitted to it later.

    ``.solve()`` is the classical map (z, y, x), ``.grid`` its voxels, ``a + b`` the equations of both sets.

    Raises:
        InputError: an image is constant or not finite.
    """
    return equations_of(particles)


@dataclass(frozen=True)
class Maps:
    """Half maps, the map of all particles, and how far the halves agree.

    Volumes are (z, y, x) on ``grid``, on the CPU. ``mask`` is where the particle is, 0 to 1.
    """

    grid: Grid
    half_maps: tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]
    map: Float[Tensor, "z y x"]
    mask: Float[Tensor, "z y x"]
    curves: Curves  # "unmasked", "masked", "corrected", ... over the shells
    equations: tuple[NormalEquations, NormalEquations] | None = None  # of the halves, where they were accumulated

    @property
    def resolution(self) -> float | None:
        """Å, where the masked half-map FSC, corrected for the mask, falls below 0.143; None if it is never above."""
        return resolution(self.curves["corrected"], 0.143)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes the maps as MRC under RELION's names; returns the files."""
        named = {**dict(zip(files.HALF_MAPS, self.half_maps, strict=True)), files.FULL_MAP: self.map}
        named[files.MASK] = self.mask
        for name, volume in named.items():
            mrc.write_map(Path(folder) / name, volume, self.grid.pixel_size)
        return [Path(folder) / name for name in named]

    def __repr__(self) -> str:
        found = "no resolution" if self.resolution is None else f"{self.resolution:.2f} Å at FSC 0.143"
        return f"<Maps of {self.grid.size}³ voxels of {self.grid.pixel_size:g} Å, {found}>"


def backproject(particles: ParticleStack) -> Maps:
    """Classical half maps, and the map of all particles regularised by their agreement (Scheres 2012).

    Raises:
        InputError: a half-set has fewer than two particles, or an image cannot be used.
    """
    equations = {name: accumulate(particles.only(half)) for name, half in files.HALVES.items()}
    classical, grid = judge(equations, particles), particles.grid
    raw = classical.raw["half1"], classical.raw["half2"]
    curves = half_map_curves(raw, grid, classical.mask)
    full = classical.regularised().cpu()
    return Maps(grid, raw, full, classical.mask, curves, (equations["half1"], equations["half2"]))


def fit(
    equations: NormalEquations,
    *,
    gaussians: int | None = None,
    start: Gaussians | None = None,
    epochs: int | None = None,
    mask: Float[Tensor, "z y x"] | None = None,
    seed: int = 0,
) -> Gaussians:
    """Gaussians for one set of particles: the normal equations of their images, minimised (docs/architecture.md).

    They start on the set's own classical map, or from ``start``; without ``gaussians`` there are as many as the dense
    part of the map has room for. ``mask`` says how much of the box has to be looked at. For maps to be compared fit
    each half by itself. ``em.voxelize(gaussians, equations.grid)`` is the map.

    Raises:
        InputError: ``gaussians`` is below 1, or given together with ``start``; no epochs; a mask of another shape.
        EmsplatError: the fit diverged.
    """
    if gaussians is not None and (gaussians < 1 or start is not None):
        raise InputError("gaussians: expected a number from 1, without start, which has a number of its own")
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs: {epochs}; expected a number from 1")
    if mask is not None:
        mask = as_map(mask, "mask")
        if tuple(mask.shape) != 3 * (equations.grid.size,):
            raise InputError(f"mask of {tuple(mask.shape)}; expected {equations.grid.size}³ voxels")
    recipe, grid = RECIPES["default"], equations.grid
    raw = equations.solve().cpu()
    unit = grid.length if recipe.length_unit is None else recipe.length_unit * grid.pixel_size
    bounds = Bounds(unit, 1.0, recipe.min_scale * grid.pixel_size)
    support = support_size(grid.size, grid.size) if mask is None else support_of(mask)
    if start is None:
        count = gaussians or gaussian_count(raw, grid, grid.pixel_size, 3, support)
        model = from_map(raw, grid, count, bounds, seed, support=support)
    else:
        model = from_gaussians(start, bounds)
    objective = VolumeObjective(equations, support)
    model = model.to(equations.linear.device)
    model = model.with_unit(objective.best_gain(model))
    plan = Plan(recipe.epochs if epochs is None else epochs, recipe.learning_rate, recipe.decay)
    *_, last = fit_steps(State.begin(model), objective, plan)
    with torch.no_grad():
        return last.model.gaussians()


def assess(
    half1: Float[Tensor, "z y x"],
    half2: Float[Tensor, "z y x"],
    pixel_size: float,
    *,
    mask: Float[Tensor, "z y x"] | None = None,
    diameter: float | None = None,
) -> Maps:
    """How far two half maps of any program agree: curves, and the resolution by RELION's rule.

    Without ``mask`` one is made around the particle, which is looked for within ``diameter`` (Å; 0.9 of the box).

    Raises:
        InputError: the maps are not cubes of one size with an even number of voxels, or hold values that are not
            finite; the pixel size is not above 0.
    """
    half1, half2 = as_map(half1, "half map 1"), as_map(half2, "half map 2")
    if half1.shape != half2.shape or len(set(half1.shape)) != 1 or len(half1) % 2:
        raise InputError(f"half maps of {tuple(half1.shape)} and {tuple(half2.shape)}; expected two even cubes alike")
    _require_size(float(pixel_size))
    grid = Grid(len(half1), float(pixel_size))
    whole = 0.5 * (half1 + half2)
    if mask is None:
        reach = 0.9 * grid.length if diameter is None else float(diameter)
        mask = particle_mask(whole, grid, reach, is_evident((half1, half2), grid, reach))
    else:
        mask = as_map(mask, "mask")
    return Maps(grid, (half1, half2), whole, mask, half_map_curves((half1, half2), grid, mask))


class RunFolder:
    """A run folder: maps as tensors, numbers as attributes; each file is read when it is asked for.

    Raises (when something is asked for):
        InputError: it is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.summary: dict[str, Any] = read_summary(self.folder)
        if not self.summary:
            raise InputError(f"{self.folder}: no {files.SUMMARY}; expected the folder of a finished run")

    @cached_property
    def map(self) -> Float[Tensor, "z y x"]:
        """The map of all particles."""
        return mrc.read_map(self.folder / files.FULL_MAP)[0]

    @cached_property
    def half_maps(self) -> tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]:
        """Unfiltered half maps."""
        first, second = (mrc.read_map(self.folder / name)[0] for name in files.HALF_MAPS)
        return first, second

    @cached_property
    def mask(self) -> Float[Tensor, "z y x"]:
        """Where the particle is, 0 to 1."""
        return mrc.read_map(self.folder / files.MASK)[0]

    @cached_property
    def local_resolution(self) -> Float[Tensor, "z y x"]:
        """Å in each voxel."""
        return mrc.read_map(self.folder / files.LOCAL_RESOLUTION)[0]

    @cached_property
    def grid(self) -> Grid:
        """The voxels of the maps."""
        return mrc.read_map(self.folder / files.FULL_MAP)[1]

    @cached_property
    def gaussians(self) -> Gaussians:
        """The mixture of all particles (not of a back-projection, which has none)."""
        return gaussian_files.read_gaussians(self.folder / files.FULL_MODEL)[0]

    @cached_property
    def particles(self) -> ParticleTable:
        """The particles that were used, with their half-sets; the images need not be there."""
        return read_table(self.folder / files.PARTICLES, need_stacks=False)

    @cached_property
    def curves(self) -> Curves:
        """FSC curves by name: "cross_validated", "masked", "unmasked", ..."""
        return read_fsc_star(self.folder / files.FSC)

    @property
    def resolution(self) -> float | None:
        """The number to quote in Å: cross-validated where there are Gaussians, else of the masked half maps. None where
        there is no resolution."""
        name = "cross_validated" if verdict.kind_of(self.summary).has_gaussians else "half_map_corrected"
        value: float | None = self.summary["resolution"].get(name)
        return value

    @property
    def warnings(self) -> list[str]:
        """What the run warned of."""
        return list(self.summary.get("warnings", []))

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.folder / files.REPORT

    def __repr__(self) -> str:
        return "\n".join([f"{self.folder}:", *verdict.lines(self.summary)])

    def _repr_html_(self) -> str:
        """The verdict, the FSC and slices of the map, for a notebook."""
        lines = "<br>".join(html.escape(line) for line in verdict.lines(self.summary))
        figures = "".join(self._picture(name) for name in (files.FSC_FIGURE, files.SLICES_FIGURE))
        link = f'<a href="{html.escape(self.report.as_posix(), quote=True)}">{html.escape(str(self.report))}</a>'
        return f"<div><p>{lines}</p>{figures}<p>{link}</p></div>"

    def _picture(self, name: str) -> str:
        path = self.folder / name
        if not path.is_file():
            return ""
        content = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{name}" style="max-width: 48%" src="data:image/png;base64,{content}">'


def reconstruct(particles: str | Path, folder: str | Path, *, verbose: bool = False, **options: Any) -> RunFolder:
    """A whole reconstruction, as `emsplat reconstruct`, into a new folder.

    ``options`` are those of the command line with underscores: ``symmetry="D2"``, ``engine="images"``. ``verbose``
    prints what the command would print.

    Raises:
        InputError: an option that there is not, or what the command refuses.
        OutputError: the folder is not empty or cannot be written.
    """
    if unknown := sorted(options.keys() - set(names(ReconstructConfig))):
        raise InputError(f"{', '.join(unknown)}: no such option; expected those of `emsplat reconstruct --help`")
    log = Log() if verbose else Log(io.StringIO())
    programs.reconstruct(
        configure(ReconstructConfig, **checked(ReconstructConfig, options)), Path(particles), Path(folder), log
    )
    return RunFolder(folder)


def refine(particles: str | Path, folder: str | Path, *, verbose: bool = False, **options: Any) -> RunFolder:
    """Poses refined and a reconstruction with them, as `emsplat refine`, into a new folder; as `reconstruct`.

    Raises:
        InputError: an option that there is not, or what the command refuses.
        OutputError: the folder is not empty or cannot be written.
    """
    if unknown := sorted(options.keys() - set(names(RefineConfig))):
        raise InputError(f"{', '.join(unknown)}: no such option; expected those of `emsplat refine --help`")
    log = Log() if verbose else Log(io.StringIO())
    refinement.refine(configure(RefineConfig, **checked(RefineConfig, options)), Path(particles), Path(folder), log)
    return RunFolder(folder)


def read_run(folder: str | Path) -> RunFolder:
    """A finished run of `reconstruct` or `backproject`.

    Raises:
        InputError: there is none.
    """
    return RunFolder(folder)
