"""Every curve of a pair of half maps over the shells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emsplat.assessment.maps import RunMaps, are_opposite, read_reference, say_opposite
from emsplat.config import AssessConfig
from emsplat.errors import InputError
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.fsc import (
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
from emsplat.run.files import FULL_MAP
from emsplat.run.log import Log
from emsplat.types import Curve, Grid

_TIGHT = 0.15  # FSC of random phases that a mask may cause


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


def measure_shells(
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
    return columns, found, with_data, masking | _tightness(maps, validation, log, given=config.mask.mask is not None)


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
