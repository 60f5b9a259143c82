"""Sharpened and weighted maps from a run folder, with tables that RELION and EMDB read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emsplat.assess.crossvalidate import CrossValidation
from emsplat.assess.fsc import PROTEIN_VOLUME, crossing, resolution
from emsplat.assess.sharpening import Guinier, fsc_weight, fsc_xml, guinier, protein_amplitude, sharpen
from emsplat.assessment import HALF_MAPS, RunMaps, read_run, shell_curves
from emsplat.config import PostprocessConfig
from emsplat.errors import InputError
from emsplat.io.mrc import write_map
from emsplat.io.relion import write_fsc_star
from emsplat.naming import link_results
from emsplat.process import threads
from emsplat.progress import Log
from emsplat.report.verdict import spacing
from emsplat.run_folder import write_text
from emsplat.types import Curve, Grid

_CORRECTED = "rlnFourierShellCorrelationCorrected"


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
    maps = read_run(run, config.mask, log)
    grid = maps.grid
    columns, masking = shell_curves(maps)
    corrected = Curve(torch.arange(grid.size // 2 + 1).double() / grid.length, torch.tensor(columns[_CORRECTED]))
    weight, found, source = _weight(maps, corrected)
    if found is None:
        raise InputError(
            f"{run}: no resolution in this mask (the {source} is below its threshold from the start); expected maps "
            "with signal; see fsc.star"
        )
    average = 0.5 * (maps.halves[0] + maps.halves[1])
    line: Guinier | None = None
    try:
        line = _signal(maps, config.b_factor_from)
    except InputError as error:
        if config.b_factor is None:
            log.warn(f"not sharpened: {error}")
    b_factor = config.b_factor if config.b_factor is not None else line.b_factor if line else 0.0
    sharp = sharpen(average, grid, b_factor, weight)
    write_map(run / "postprocess.mrc", sharp, grid.pixel_size)
    write_map(run / "postprocess_masked.mrc", sharp * maps.mask, grid.pixel_size)
    about: dict[str, Any] = {
        "rlnFinalResolution": round(found, 6),
        "rlnBfactorUsedForSharpening": round(b_factor, 4),
        "rlnUnfilteredMapHalf1": HALF_MAPS[0],
        "rlnUnfilteredMapHalf2": HALF_MAPS[1],
        "rlnPostprocessedMap": "postprocess.mrc",
        "rlnPostprocessedMapMasked": "postprocess_masked.mrc",
        "rlnMaskName": str(config.mask or "mask.mrc"),
        "rlnParticleBoxFractionSolventMask": round(PROTEIN_VOLUME / masking["fraction"], 6),
        "emsplatWeight": source,
    }
    if masking["randomised_from"] is not None:
        about["rlnRandomiseFrom"] = masking["randomised_from"]
    plot = None
    habit = _relion_b_factor(average, grid, corrected, config.b_factor_from)
    if line is not None:
        about["rlnFittedSlopeGuinierPlot"] = round(line.slope, 5)
        about["rlnFittedInterceptGuinierPlot"] = round(line.intercept, 5)
        about["rlnCorrelationFitGuinierPlot"] = round(line.correlation, 6)
        about["emsplatSlopeOfProtein"] = round(line.protein_slope, 5)
        about["emsplatBfactorAgainstProtein"] = round(line.b_factor, 4)
    if habit is not None:
        about["emsplatBfactorByRelionsRule"] = round(habit, 4)
    if line is not None:
        square = line.frequency**2
        plot = {
            "rlnResolutionSquared": square.tolist(),
            "rlnLogAmplitudesOriginal": line.original.tolist(),
            "rlnLogAmplitudesWeighted": line.weighted.tolist(),
            "rlnLogAmplitudesSharpened": (line.weighted - b_factor * square / 4).tolist(),
            "rlnLogAmplitudesIntercept": [line.intercept] * len(square),
            "emsplatLogAmplitudesProtein": protein_amplitude(line.frequency).tolist(),
        }
    write_fsc_star(run / "postprocess.star", {name: str(value) for name, value in about.items()}, columns, plot)
    title = "emsplat half maps, masked and corrected"
    write_text(run / "postprocess_fsc.xml", fsc_xml(corrected, title))
    log.line(f"resolution {spacing(found, grid.nyquist)} ({source}), sharpened with a B factor of {b_factor:.1f} Å²")
    if line is not None:
        log.line(
            f"  in these shells the signal of the images has a B factor of {line.line_b_factor:.1f} Å², a protein with "
            f"B = 0 one of {4 * line.protein_slope:.1f} Å²; {line.b_factor:.1f} Å² brings the one to the other"
        )
    if habit is not None:
        log.line(f"  relion_postprocess would take {habit:.1f} Å² for these half maps (--b-factor {habit:.0f})")
    link_results(run)
    log.line(f"  map: {run / 'postprocess.mrc'}, masked: {run / 'postprocess_masked.mrc'}")
    log.line(f"  tables: {run / 'postprocess.star'}, FSC for EMDB: {run / 'postprocess_fsc.xml'}")
    return about


def _signal(maps: RunMaps, low: float) -> Guinier:
    """Guinier's plot of the signal in the images: of the classical maps, whose amplitudes no model has changed.

    In the mask, since the weights are those of the mask's FSC and leave the noise of the solvent in.

    Raises:
        InputError: too few shells.
    """
    columns, _ = shell_curves(RunMaps(maps.grid, maps.data, None, None, maps.mask))
    curve = Curve(torch.tensor(columns["rlnResolution"]), torch.tensor(columns[_CORRECTED]))
    high = resolution(curve, 0.143)
    return guinier(
        0.5 * (maps.data[0] + maps.data[1]) * maps.mask, maps.grid, fsc_weight(curve.value), low=low, high=high
    )


def _relion_b_factor(average: torch.Tensor, grid: Grid, corrected: Curve, low: float) -> float | None:
    """B by RELION's rule: a level line through the weighted amplitudes of the whole box; None with too few shells."""
    try:
        return guinier(average, grid, fsc_weight(corrected.value), low=low).line_b_factor
    except InputError:
        return None


def _weight(maps: RunMaps, corrected: Curve) -> tuple[torch.Tensor, float | None, str]:
    """Weight per shell, resolution in Å, and what both come from."""
    if maps.raw is None:
        return fsc_weight(corrected.value), resolution(corrected, 0.143), "corrected half-map FSC"
    curve = CrossValidation(maps.raw, maps.mask, maps.grid, maps.copies).curve(maps.halves)
    # The average of the halves is at least as good as one of them, which is what the estimate is about.
    value = curve.value.clamp(0, 1)
    value[0] = 1
    ended = ~(value >= 1e-2)
    weight = torch.where(torch.cumsum(ended, 0) > 0, 0.0, value.nan_to_num())
    return weight, crossing(curve, 0.5), "cross-validated FSC"
