"""Sharpened and weighted maps from a run folder, with tables that RELION and EMDB read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emsplat.assessment.curves import correction, half_map_curves
from emsplat.assessment.maps import RunMaps, beyond_shared, is_evident, read_run
from emsplat.config import PostprocessConfig
from emsplat.errors import InputError
from emsplat.io.mrc import write_map
from emsplat.io.paths import Names
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.curves import Line, crossing, resolution
from emsplat.measures.fsc import PROTEIN_VOLUME
from emsplat.measures.sharpening import Guinier, fsc_weight, fsc_xml, guinier, protein_amplitude, sharpen
from emsplat.process import threads
from emsplat.report.verdict import spacing
from emsplat.run.aliases import link_results
from emsplat.run.files import FSC, FSC_XML, HALF_MAPS, MASK, POSTPROCESS, SHARPENED, SHARPENED_MASKED
from emsplat.run.folder import read_summary, write_text
from emsplat.run.fsc_star import write_fsc_star
from emsplat.run.log import Log
from emsplat.types import Grid


def postprocess(run: Path, config: PostprocessConfig, log: Log) -> dict[str, Any]:
    """Averages the half maps of a run, weights and sharpens the average, and writes into the run folder:

    ``postprocess.mrc`` and ``postprocess_masked.mrc``; ``postprocess.star`` with RELION's columns; and FSC curves in
    EMDB's XML. Weights are the cross-validated FSC where there is one, since the half-map FSC of two models is too
    high, else sqrt(2F/(1+F)) of the corrected half-map FSC (Rosenthal & Henderson 2003). The B factor, unless given, is
    that of the signal in the images: measured on the back-projections in the mask, between 10 Å and their resolution,
    against a protein with B = 0 (`Guinier.b_factor`). What `relion_postprocess --auto_bfac` would take is told beside
    it. Returns the numbers of ``postprocess.star``.

    Raises:
        InputError: no finished run, a mask that does not fit, no resolution to weight up to.
    """
    with threads(config.threads):
        return _postprocess(run, config, log)


def _postprocess(run: Path, config: PostprocessConfig, log: Log) -> dict[str, Any]:
    if not (math.isfinite(config.b_factor_from) and config.b_factor_from > 0):
        raise InputError(f"--b-factor-from {config.b_factor_from:g}: expected a spacing above 0 Å, such as 10")
    if config.b_factor is not None and not math.isfinite(config.b_factor):
        raise InputError(f"--b-factor {config.b_factor:g}: expected a finite number of Å²; negative sharpens")
    maps = read_run(run, config.mask, log)
    grid = maps.grid
    summary = read_summary(run)
    shared = summary.get("refinement", {}).get("shared_to")
    evident = summary.get("evident")
    if evident is None:
        evident = is_evident(maps.data, grid, summary.get("input", {}).get("diameter") or 0.9 * grid.length, shared)
    if not evident:
        raise InputError(
            f"{run}: no resolution: no particle was found in the images, the half-sets agree no further than the "
            "first shells; expected maps with signal"
        )
    curves = half_map_curves(maps.halves, grid, maps.mask)
    corrected, masking = curves["corrected"], correction(curves, maps.mask)
    weight, found, source = _weight(maps, corrected)
    if found is None or not beyond_shared(found, grid, shared):
        why = "is below its threshold from the start" if found is None else "agrees only where poses share it"
        raise InputError(f"{run}: no resolution in this mask (the {source} {why}); see {FSC}")
    average = 0.5 * (maps.halves[0] + maps.halves[1])
    line = _signal_or_nothing(maps, config, log)
    b_factor = config.b_factor if config.b_factor is not None else line.b_factor if line else 0.0
    sharp = sharpen(average, grid, b_factor, weight)
    write_map(run / SHARPENED, sharp, grid.pixel_size, maps.origin)
    write_map(run / SHARPENED_MASKED, sharp * maps.mask, grid.pixel_size, maps.origin)
    if config.mask is None and not (run / MASK).is_file():
        write_map(run / MASK, maps.mask, grid.pixel_size, maps.origin)
    name = Names(run / POSTPROCESS).below
    habit = _relion_b_factor(average, grid, corrected, config.b_factor_from)
    about: dict[str, Any] = {
        "resolution": round(found, 6),
        "b_factor": round(b_factor, 4),
        "half_map_1": name(run, run / HALF_MAPS[0]),
        "half_map_2": name(run, run / HALF_MAPS[1]),
        "map": name(run, run / SHARPENED),
        "masked_map": name(run, run / SHARPENED_MASKED),
        "mask": name(run, config.mask or run / MASK),
        "particle_fraction": round(PROTEIN_VOLUME / masking["fraction"], 6),
        "weight": source,
    }
    about |= {name: value for name, value in masking.items() if name == "randomised_from" and value is not None}
    about |= {} if line is None else _numbers(line)
    about |= {} if habit is None else {"b_factor_by_relions_rule": round(habit, 4)}
    write_fsc_star(run / POSTPROCESS, about, curves, None if line is None else _plotted(line, b_factor))
    title = "emsplat half maps, masked and corrected"
    write_text(run / FSC_XML, fsc_xml(corrected, title))
    log.line(f"resolution {spacing(found, grid.nyquist)} ({source}), sharpened with a B factor of {b_factor:.1f} Å²")
    if line is not None:
        log.line(
            f"  in these shells the signal of the images has a B factor of {line.line_b_factor:.1f} Å², a protein with "
            f"B = 0 one of {4 * line.protein_slope:.1f} Å²; {line.b_factor:.1f} Å² brings the one to the other"
        )
    if habit is not None:
        log.line(f"  relion_postprocess would take {habit:.1f} Å² for these half maps (--b-factor {habit:.0f})")
    link_results(run)
    log.line(f"  map: {run / SHARPENED}, masked: {run / SHARPENED_MASKED}")
    log.line(f"  tables: {run / POSTPROCESS}, FSC for EMDB: {run / FSC_XML}")
    return about


def _signal_or_nothing(maps: RunMaps, config: PostprocessConfig, log: Log) -> Guinier | None:
    """`_signal`, or None with a word where there are too few shells for it and no B factor is given."""
    try:
        return _signal(maps, config.b_factor_from)
    except InputError as error:
        if config.b_factor is None:
            log.warn(f"not sharpened: {error}")
        return None


def _numbers(line: Guinier) -> dict[str, float]:
    """What postprocess.star says of Guinier's plot."""
    return {
        "slope": round(line.slope, 5),
        "intercept": round(line.intercept, 5),
        "correlation": round(line.correlation, 6),
        "protein_slope": round(line.protein_slope, 5),
        "b_factor_against_protein": round(line.b_factor, 4),
    }


def _plotted(line: Guinier, b_factor: float) -> dict[str, NDArray[np.float64]]:
    """Guinier's plot: logarithms of the amplitudes over the squared frequency."""
    square = line.frequency**2
    return {
        "square_frequency": square.numpy(),
        "original": line.original.numpy(),
        "weighted": line.weighted.numpy(),
        "sharpened": (line.weighted - b_factor * square / 4).numpy(),
        "intercept": np.full(len(square), line.intercept),
        "protein": protein_amplitude(line.frequency).numpy(),
    }


def _signal(maps: RunMaps, low: float) -> Guinier:
    """Guinier's plot of the signal in the images: of the classical maps, whose amplitudes no model has changed.

    In the mask, since the weights are those of the mask's FSC and leave the noise of the solvent in.

    Raises:
        InputError: too few shells.
    """
    curve = half_map_curves(maps.data, maps.grid, maps.mask)["corrected"]
    high = resolution(curve, 0.143)
    return guinier(0.5 * (maps.data[0] + maps.data[1]) * maps.mask, maps.grid, _weight_of(curve), low=low, high=high)


def _relion_b_factor(average: torch.Tensor, grid: Grid, corrected: Line, low: float) -> float | None:
    """B by RELION's rule: a level line through the weighted amplitudes of the whole box; None with too few shells."""
    try:
        return guinier(average, grid, _weight_of(corrected), low=low).line_b_factor
    except InputError:
        return None


def _weight_of(curve: Line) -> torch.Tensor:
    return fsc_weight(torch.from_numpy(curve.value))


def _weight(maps: RunMaps, corrected: Line) -> tuple[torch.Tensor, float | None, str]:
    """Weight per shell, resolution in Å, and what both come from."""
    if maps.raw is None:
        return _weight_of(corrected), resolution(corrected, 0.143), "corrected half-map FSC"
    curve = CrossValidation(maps.raw, maps.mask, maps.grid, maps.symmetry.order).curve(maps.halves)
    # The average of the halves is at least as good as one of them, which is what the estimate is about.
    value = curve.value.clamp(0, 1)
    value[0] = 1
    ended = ~(value >= 1e-2)
    weight = torch.where(torch.cumsum(ended, 0) > 0, 0.0, value.nan_to_num())
    return weight, crossing(curve, 0.5), "cross-validated FSC"
