"""The verdict on a reconstruction, from its run folder alone.

Half maps, back-projections and mask in; FSC curves, local resolution, resolution by direction and the numbers of
summary.json out. `emsplat.assess` holds the measures, this module what is asked of a run: which maps, in which mask,
and which of the answers can be believed.
"""

from __future__ import annotations

import csv
import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emsplat.assess.crossvalidate import CrossValidation
from emsplat.assess.directional import (
    conical_fsc,
    conical_resolution,
    direction_grid,
    fourier_sampling,
    sampling_compensation,
    slice_correlation,
    view_histogram,
)
from emsplat.assess.fsc import (
    common_grid,
    corrected_fsc,
    crossing,
    ends_undefined,
    fsc_curve,
    last_crossing,
    particle_fsc,
    randomisation_shell,
    randomise_phases,
    resolution,
)
from emsplat.assess.local_resolution import (
    LocalResolution,
    default_window,
    local_cross_validated,
    local_resolution,
)
from emsplat.assess.mask import check_mask, solvent_mask, spherical_mask
from emsplat.config import AssessConfig, InputConfig
from emsplat.errors import InputError
from emsplat.geometry import symmetry_group
from emsplat.io.files import number_text, replacing
from emsplat.io.gaussians import holds_gaussians
from emsplat.io.mrc import Origin, StoredMap, misplaced, read_stored_map, write_map
from emsplat.io.relion import read_rotations, write_fsc_star
from emsplat.progress import Log
from emsplat.project import voxelize
from emsplat.start import read_fitted
from emsplat.types import Curve, Grid

HALF_MAPS = ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc")
FULL_MAP = "run_class001.mrc"
BACKPROJECTIONS = ("backprojection_half1.mrc", "backprojection_half2.mrc")

FIRST_SHELLS = 4
_OPPOSITE = -0.3  # mean FSC of the first shells
_TIGHT = 0.15  # FSC of random phases that a mask may cause
_NOWHERE = (0.0, 0.0, 0.0)
_STEP = 10.0  # degrees
_LOCAL = "local_resolution.mrc"
_LOCAL_HALF_MAPS = "local_resolution_half_maps.mrc"


@dataclass(frozen=True)
class RunMaps:
    """The maps of a run folder on one grid."""

    grid: Grid
    halves: tuple[Tensor, Tensor]
    raw: tuple[Tensor, Tensor] | None  # back-projections, where the half maps are models
    full: Tensor | None
    mask: Tensor
    origin: Origin = _NOWHERE
    copies: int = 1  # elements of the symmetry that was imposed on them

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """The half maps that no prior has touched."""
        return self.raw or self.halves


def is_evident(halves: tuple[Tensor, Tensor], grid: Grid, diameter: float) -> bool:
    """Whether two back-projections agree beyond the first shells, in a sphere that knows nothing of them.

    The start from a map and the shape of the box make two fits to noise alike in the first shells, so a model's FSC
    alone says nothing there. The back-projections carry no such likeness.
    """
    first = resolution(fsc_curve(*halves, grid, sphere(grid, diameter)), 0.143)
    return first is not None and first < grid.length / FIRST_SHELLS


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
    edge = 6 * grid.pixel_size
    return spherical_mask(grid, min(diameter, grid.length - 2 * edge), edge)


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
    shell's FSC does not ask how fast amplitudes fall, so a B factor of all atoms matters little.

    Raises:
        InputError: the file cannot be read, has another grid, or what it holds lies outside the box.
    """
    if not holds_gaussians(path):
        return read_beside(path, grid, log, beside, origin)
    gaussians = read_fitted(path, grid)
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
    config: InputConfig | AssessConfig,
    grid: Grid,
    log: Log | None = None,
    origin: Origin = _NOWHERE,
) -> Tensor | None:
    """The mask that the options ask for, None where they ask for none.

    Raises:
        InputError: they ask for two, or one that does not fit.
    """
    if config.mask is not None and config.mask_diameter is not None:
        raise InputError("--mask and --mask-diameter: expected one of them; leave the other out")
    if config.mask is not None:
        return read_mask(config.mask, grid, log, origin)
    return None if config.mask_diameter is None else sphere(grid, config.mask_diameter)


def read_run(run: Path, mask: Path | None = None, log: Log | None = None) -> RunMaps:
    """The maps of a run folder; ``mask`` in place of its own. A ``log`` is told what its files leave open.

    Raises:
        InputError: no such folder, no half maps, maps that do not belong together, half maps that are one map.
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
    path = mask or run / "mask.mrc"
    if mask is None and not path.is_file():
        data = raw or (first, second)
        soft = particle_mask(data[0] + data[1], grid, 0.9 * grid.length, True)
    else:
        soft = read_mask(path, grid, None if mask is None else log, origin)
    return RunMaps(grid, (first, second), (raw[0], raw[1]) if len(raw) == 2 else None, full, soft, origin, _copies(run))


def _copies(run: Path) -> int:
    """Elements of the symmetry that a run imposed; 1 where its settings do not say."""
    try:
        options = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["options"]
        return len(symmetry_group(options["symmetry"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        return 1


def assess(run: Path, config: AssessConfig, log: Log, *, diameter: float | None, symmetry: str) -> dict[str, Any]:
    """Measures a run folder, writes fsc.star, maps of local resolution and directions.csv into it.

    ``diameter`` of the particle in Å (None: 0.9 of the box) bounds the sphere in which it has to show. Returns
    "evident" (whether it shows), "resolution" (Å, None where undefined), "limit" (the finest spacing in Å that pixels
    carry, the names of the resolutions that reach it, whose curves never fall, and whether the cross-validated curve
    ends above its threshold where the data do), "masking", "local_resolution" and "directional" for summary.json.

    Raises:
        InputError: through `read_run`; the reference has another grid; the window does not fit the box.
    """
    maps = read_run(run, log=log)
    grid = maps.grid
    mask = given_mask(config, grid, log, maps.origin)
    if mask is not None:
        maps = replace(maps, mask=mask)
        write_map(run / "mask.mrc", mask, grid.pixel_size)
    evident = is_evident(maps.data, grid, diameter or 0.9 * grid.length)
    columns, found, with_data, masking = _shells(maps, config, log)
    if not evident:
        found, with_data = dict.fromkeys(found), False
        log.warn(
            "the two half-sets, classically back-projected, do not agree beyond the first "
            f"{FIRST_SHELLS} shells: no particle was found in the images (noise, wrong poses or wrong CTF), and no "
            "resolution is given"
        )
    general = {name: str(value) for name, value in found.items() if not isinstance(value, list)}
    write_fsc_star(run / "fsc.star", {**general, "emsplatResolutionRule": "RELION"}, columns)
    result = {
        "evident": evident,
        "resolution": found,
        "limit": _limit(found, grid) | {"ends_with_data": with_data},
        "masking": masking,
        "local_resolution": None,
        "directional": None,
    }
    for stale in (_LOCAL, _LOCAL_HALF_MAPS, "directions.csv"):
        (run / stale).unlink(missing_ok=True)
    if evident:
        result["local_resolution"] = _local(run, maps, found, config)
        fine = found["cross_validated"] or found["backprojection_masked"] or grid.nyquist
        star = run / "run_data.star"
        rotation = read_rotations(star) if star.is_file() else None
        result["directional"] = directions(run, maps, fine, rotation, symmetry_group(symmetry))
    return result


def _limit(found: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Which resolutions are no more than the end of the curve."""
    finest = grid.length / (grid.size // 2)
    reached = [name for name, value in found.items() if isinstance(value, float) and value < finest * (1 + 1e-9)]
    return {"nyquist": finest, "reached_by": reached}


def shell_curves(maps: RunMaps) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns of an FSC table with RELION's names for the half maps of a run, and what the correction was made with.

    The last column, emsplatCryodrgnMaskedMaps, counts its shells by cryoDRGN's rule.
    """
    grid, mask = maps.grid, maps.mask
    unmasked, masked = fsc_curve(*maps.halves, grid), fsc_curve(*maps.halves, grid, mask)
    shells = range(len(unmasked.value))
    start = randomisation_shell(unmasked)
    corrected = random = masked
    if start is not None:
        random = _random_phases(maps.halves, start, grid, mask)
        corrected = corrected_fsc(masked, random, start)
    fraction = float(mask.double().mean())
    columns: dict[str, list[Any]] = {
        "rlnSpectralIndex": list(shells),
        "rlnResolution": unmasked.frequency.tolist(),
        "rlnAngstromResolution": [grid.length / s if s else 999.0 for s in shells],
        "rlnFourierShellCorrelationCorrected": corrected.value.tolist(),
        "rlnFourierShellCorrelationParticleMaskFraction": particle_fsc(unmasked, fraction).value.tolist(),
        "rlnFourierShellCorrelationUnmaskedMaps": unmasked.value.tolist(),
        "rlnFourierShellCorrelationMaskedMaps": masked.value.tolist(),
        "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": random.value.tolist(),
        "emsplatCryodrgnMaskedMaps": fsc_curve(*maps.halves, grid, mask, "cryodrgn").value.tolist(),
    }
    masking = {
        "fraction": round(fraction, 6),
        "randomised_from": None if start is None else round(grid.length / start, 3),
    }
    return columns, masking


def _shells(
    maps: RunMaps, config: AssessConfig, log: Log
) -> tuple[dict[str, list[Any]], dict[str, Any], bool, dict[str, Any]]:
    """Columns of fsc.star, resolutions, whether the cross-validated curve ends with the data, what the mask does."""
    grid, mask = maps.grid, maps.mask
    columns, masking = shell_curves(maps)
    frequency = torch.tensor(columns["rlnResolution"], dtype=torch.float64)

    def curve_of(name: str) -> Curve:
        return Curve(frequency, torch.tensor(columns[name], dtype=torch.float64))

    found: dict[str, Any] = {"cross_validated": None, "cross_validated_interval": None}
    with_data = False
    for name, column in (("unmasked", "UnmaskedMaps"), ("masked", "MaskedMaps"), ("corrected", "Corrected")):
        curve = curve_of(f"rlnFourierShellCorrelation{column}")
        found[f"half_map_{name}"] = resolution(curve, 0.143)
        if name != "corrected":
            found[f"half_map_{name}_0.5"] = resolution(curve, 0.5)
    found["half_map_masked_cryodrgn"] = last_crossing(curve_of("emsplatCryodrgnMaskedMaps"), 0.143)
    validation = CrossValidation(maps.data, mask, grid, maps.copies)
    raw = Curve(frequency, validation.raw)
    found["backprojection_masked"] = resolution(raw, 0.143)
    if maps.raw is not None:
        columns["emsplatBackprojectionMasked"] = raw.value.tolist()
        curve, low, high = validation.band(maps.halves)
        columns |= {
            "emsplatCrossValidated": curve.value.tolist(),
            "emsplatCrossValidatedLow": low.tolist(),
            "emsplatCrossValidatedHigh": high.tolist(),
        }
        found["cross_validated"] = crossing(curve, 0.5)
        with_data = ends_undefined(curve, 0.5)
        ends = [crossing(Curve(frequency, end), 0.5) for end in (high, low)]
        if None not in ends and found["cross_validated"] is not None:
            found["cross_validated_interval"] = ends
    if config.reference is not None:
        if maps.full is None:
            raise InputError(f"{FULL_MAP} is missing; expected it for --reference")
        reference = read_reference(config.reference, grid, log, "the maps of the run", maps.origin)
        curve = fsc_curve(maps.full, reference, grid, mask)
        if are_opposite(curve):
            log.warn(say_opposite(str(config.reference), FULL_MAP))
        columns["emsplatReferenceMasked"] = curve.value.tolist()
        found["reference_masked_0.5"] = resolution(curve, 0.5)
    return columns, found, with_data, masking | _tightness(maps, validation, log, given=config.mask is not None)


def _random_phases(halves: tuple[Tensor, Tensor], start: int, grid: Grid, mask: Tensor) -> Curve:
    """Masked FSC of two maps whose phases share nothing from shell ``start`` on."""
    first, second = (randomise_phases(half, start, seed) for seed, half in enumerate(halves))
    return fsc_curve(first, second, grid, mask)


def _tightness(maps: RunMaps, validation: CrossValidation, log: Log, *, given: bool) -> dict[str, Any]:
    """What the mask does to maps that share nothing: the FSC of random phases, of the untouched half maps."""
    grid, mask = maps.grid, maps.mask
    agreed = None
    unmasked = fsc_curve(*maps.data, grid)
    begin = randomisation_shell(unmasked)
    end = resolution(Curve(unmasked.frequency, validation.raw), 0.143)
    last = 0 if end is None else round(grid.length / end)
    if begin is not None and last > begin + 2:
        shells = slice(begin + 2, last + 1)
        agreed = float(_random_phases(maps.data, begin, grid, mask).value[shells].mean())
        chance = 3 / math.sqrt(2 * float(validation.together[shells].sum()))
        if agreed > max(_TIGHT, chance):
            log.warn(
                f"the mask is too tight: maps with random phases beyond {grid.length / begin:.1f} Å still correlate by "
                f"{agreed:.2f} inside it; use a softer or wider one (--mask), and read the masked FSC with care"
            )
    edge = torch.ones_like(mask, dtype=torch.bool)
    edge[1:-1, 1:-1, 1:-1] = False
    if given and float(mask[edge].mean()) > float(mask[~edge].mean()):
        log.warn(
            "the mask is larger at the edge of the box than within: is it inverted (0 on the particle)? Then give 1 "
            "minus that mask"
        )
    elif given and float(mask[edge].max()) > 0.1:
        log.warn("the mask reaches the edge of the box and is cut off there; use a larger box or a smaller mask")
    return {"random_phases": None if agreed is None else round(agreed, 4)}


def _local(run: Path, maps: RunMaps, found: dict[str, Any], config: AssessConfig) -> dict[str, Any] | None:
    grid = maps.grid
    window = config.window or min(default_window(found["backprojection_masked"]), grid.length / 2)
    if config.window is None and window < 4 * grid.pixel_size:
        return None

    def write(name: str, local: LocalResolution) -> dict[str, float] | None:
        # Outside the mask the coarsest value inside, so that no surface turns fine by interpolation. Where the maps say
        # nothing they have no detail that the window could see.
        inside = maps.mask > 0.01
        known = local.volume.nan_to_num(local.window, posinf=local.window)
        volume = torch.where(inside, known, known[inside].max())
        write_map(run / name, volume, grid.pixel_size)
        return local.summary(maps.mask)

    half_maps = local_resolution(*maps.halves, grid, window=window)
    if maps.raw is None:
        return {"half_maps": write(_LOCAL, half_maps), "cross_validated": None, "window": round(window, 2)}
    return {
        "half_maps": write(_LOCAL_HALF_MAPS, half_maps),
        "cross_validated": write(_LOCAL, local_cross_validated(maps.halves, maps.raw, grid, window=window)),
        "window": round(window, 2),
    }


def directions(run: Path, maps: RunMaps, fine: float, rotation: Tensor | None, group: Tensor) -> dict[str, Any]:
    """Writes directions.csv: slices through the half maps down to ``fine`` Å, cones through the back-projections, and
    where ``rotation`` is known the views of the particles under the symmetry ``group``; returns their summary."""
    grid, cells = maps.grid, direction_grid(_STEP)
    coarse = grid.length / FIRST_SHELLS
    band = (coarse, min(coarse, max(fine, grid.length / (grid.size // 2 - 1))))  # in a wrong mask none may be finer
    masked = [half * maps.mask for half in maps.halves]
    slices = slice_correlation(masked[0], masked[1], grid, cells, band)
    data = [half * maps.mask for half in maps.data]
    cones = conical_resolution(conical_fsc(data[0], data[1], cells), grid)
    columns = {"rot": cells.rot, "tilt": cells.tilt, "fslc": slices, "conical_resolution": cones}
    weight = cells.solid_angle
    mean = float((weight * slices).sum())
    defined = cones[cones.isfinite()]
    about: dict[str, Any] = {
        "fslc_mean": round(mean, 5),
        "fslc_std": round(float((weight * (slices - mean) ** 2).sum().sqrt()), 5),
        "band": [round(end, 3) for end in band],
        "conical_best": round(float(defined.min()), 3) if len(defined) else None,
        "conical_worst": round(float(defined.max()), 3) if len(defined) else None,
        "conical_of": "back-projections" if maps.raw else "half maps",
    }
    if rotation is not None:
        density = fourier_sampling(rotation, group)
        factor, unsampled = sampling_compensation(density[:, 3])
        about |= {"sampling_compensation": round(factor, 4), "unsampled": round(unsampled, 4)}
        nearest = (cells.vectors @ density[:, :3].T).argmax(1)
        views = torch.stack([view_histogram(rotation @ element, cells) for element in group]).mean(0)
        columns |= {"sampling": density[nearest, 3], "particles": views}
    with (
        replacing(run / "directions.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        writer.writerows(map(number_text, row) for row in rows)
    return about
