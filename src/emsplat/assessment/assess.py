"""The verdict on a reconstruction, from its run folder alone.

Half maps, back-projections and mask in; FSC curves, local resolution, resolution by direction and the numbers of
summary.json out. `measures` holds the measures, this module what is asked of a run: which maps, in which mask,
and which of the answers can be believed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from emsplat.assessment.curves import measure_shells
from emsplat.assessment.directions import directions
from emsplat.assessment.maps import (
    FIRST_SHELLS,
    RunMaps,
    beyond_shared,
    given_mask,
    is_evident,
    read_run,
    shared_shell,
)
from emsplat.config import AssessConfig
from emsplat.io.mrc import write_map
from emsplat.io.relion.read import read_rotations
from emsplat.measures.local_resolution import (
    LocalResolution,
    check_window,
    default_window,
    local_cross_validated,
    local_resolution,
)
from emsplat.run.files import DIRECTIONS, FSC, LOCAL_RESOLUTION, LOCAL_RESOLUTION_HALF_MAPS, MASK, PARTICLES
from emsplat.run.fsc_star import write_fsc_star
from emsplat.run.log import Log
from emsplat.types import Grid


def assess(
    run: Path, config: AssessConfig, log: Log, *, diameter: float | None, shared: float | None = None
) -> dict[str, Any]:
    """Measures a run folder, writes fsc.star, maps of local resolution and directions.csv into it.

    What poses share that were found with one map of all particles, down to ``shared`` Å, counts for no resolution.

    ``diameter`` of the particle in Å (None: 0.9 of the box) bounds the sphere in which it has to show. Returns
    "evident" (whether it shows), "resolution" (Å, None where undefined), "limit" (the finest spacing in Å that pixels
    carry, the names of the resolutions that reach it, whose curves never fall, and whether the cross-validated curve
    ends above its threshold where the data do), "masking", "local_resolution" and "directional" for summary.json.

    Raises:
        InputError: through `read_run`; the reference has another grid; the window does not fit the box.
    """
    maps = read_run(run, log=log)
    grid = maps.grid
    if config.window is not None:
        check_window(config.window, grid)
    mask = given_mask(config.mask, grid, log, maps.origin)
    if mask is not None:
        maps = replace(maps, mask=mask)
    evident = is_evident(maps.data, grid, diameter or 0.9 * grid.length, shared)
    with log.step("curves"):
        curves, found, with_data, masking = measure_shells(maps, config, log)
    if mask is not None or not (run / MASK).is_file():
        write_map(run / MASK, maps.mask, grid.pixel_size, maps.origin)
    found = _beyond(found, grid, shared)
    if not evident:
        found, with_data = dict.fromkeys(found), False
        log.warn(
            "the two half-sets, classically back-projected, do not agree beyond the first "
            f"{max(FIRST_SHELLS, shared_shell(grid, shared))} shells"
            + ("" if shared is None else f", which their poses share ({shared:g} Å)")
            + ": no particle was found in the images (noise, wrong poses or wrong CTF), and no resolution is given"
        )
    interval = found["cross_validated_interval"] or (None, None)
    ends = dict(zip(("cross_validated_coarse", "cross_validated_fine"), interval, strict=True))
    general = {name: value for name, value in found.items() if name != "cross_validated_interval"}
    write_fsc_star(run / FSC, general | ends, curves)
    result = {
        "evident": evident,
        "resolution": found,
        "limit": _limit(found, grid) | {"ends_with_data": with_data},
        "masking": masking,
        "local_resolution": None,
        "directional": None,
    }
    for stale in (LOCAL_RESOLUTION, LOCAL_RESOLUTION_HALF_MAPS, DIRECTIONS):
        (run / stale).unlink(missing_ok=True)
    if evident:
        with log.step("local resolution"):
            result["local_resolution"] = _local(run, maps, found, config)
        fine = found["cross_validated"] or found["backprojection_masked"] or grid.nyquist
        star = run / PARTICLES
        rotation = read_rotations(star) if star.is_file() else None
        with log.step("directions"):
            result["directional"] = directions(
                run, maps.masked(maps.halves), maps.raw and maps.masked(maps.raw), grid, fine, rotation, maps.symmetry
            )
    return result


def _beyond(found: dict[str, Any], grid: Grid, shared: float | None) -> dict[str, Any]:
    """Without resolutions that lie within the band that half-sets share; those against a reference do not ask."""

    def counts(name: str, value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return name.startswith("reference") or all(v is None or beyond_shared(v, grid, shared) for v in values)

    return {name: value if counts(name, value) else None for name, value in found.items()}


def _limit(found: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Which resolutions are no more than the end of the curve."""
    last = {"half_map_masked_cryodrgn": max(grid.size // 2 - 1, 1)}
    reached = [
        name
        for name, value in found.items()
        if isinstance(value, float) and value < grid.length / last.get(name, grid.size // 2) * (1 + 1e-9)
    ]
    return {"nyquist": grid.nyquist, "reached_by": reached}


def _local(run: Path, maps: RunMaps, found: dict[str, Any], config: AssessConfig) -> dict[str, Any] | None:
    grid = maps.grid
    window = config.window
    if window is None:
        window = min(default_window(found["backprojection_masked"]), grid.length / 2)
        if window < 4 * grid.pixel_size:
            return None

    def write(name: str, local: LocalResolution) -> dict[str, float] | None:
        write_map(run / name, local.filled(maps.mask), grid.pixel_size, maps.origin)
        return local.summary(maps.mask)

    half_maps = local_resolution(*maps.halves, grid, window=window)
    if maps.raw is None:
        return {"half_maps": write(LOCAL_RESOLUTION, half_maps), "cross_validated": None, "window": round(window, 2)}
    return {
        "half_maps": write(LOCAL_RESOLUTION_HALF_MAPS, half_maps),
        "cross_validated": write(LOCAL_RESOLUTION, local_cross_validated(maps.halves, maps.raw, grid, window=window)),
        "window": round(window, 2),
    }
