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
from emsplat.measures.curves import Curves, Line, crossing, ends_undefined, last_crossing, resolution
from emsplat.measures.fsc import corrected_fsc, fsc_curve, particle_fsc, randomisation_shell, randomise_phases
from emsplat.run.files import FULL_MAP
from emsplat.run.log import Log
from emsplat.types import Curve, Grid

_TIGHT = 0.15  # FSC of random phases that a mask may cause


def half_map_curves(halves: tuple[Tensor, Tensor], grid: Grid, mask: Tensor) -> Curves:
    """What two half maps alone say: unmasked, masked, corrected for the mask and what the correction was made with."""
    unmasked, masked = fsc_curve(*halves, grid), fsc_curve(*halves, grid, mask)
    start = randomisation_shell(unmasked)
    # Where the unmasked FSC never falls there is no noise to find out from what the mask does.
    corrected, random = masked, Curve(masked.frequency, torch.full_like(masked.value, torch.nan))
    if start is not None:
        random = _random_phases(halves, start, grid, mask)
        corrected = corrected_fsc(masked, random, start)
    return Curves(unmasked.frequency.numpy(), {}).joined(
        corrected=corrected.value,
        particle=particle_fsc(unmasked, float(mask.double().mean())).value,
        unmasked=unmasked.value,
        masked=masked.value,
        random_phases=random.value,
        masked_cryodrgn=fsc_curve(*halves, grid, mask, "cryodrgn").value,
    )


def correction(curves: Curves, mask: Tensor) -> dict[str, Any]:
    """What the curves of half maps were corrected with: part of the box in the mask, and from where phases are random
    (Å, None: nowhere)."""
    start = randomisation_shell(curves["unmasked"])
    return {
        "fraction": round(float(mask.double().mean()), 6),
        "randomised_from": None if start is None else round(1 / float(curves.frequency[start]), 3),
    }


def measure_shells(
    maps: RunMaps, config: AssessConfig, log: Log
) -> tuple[Curves, dict[str, Any], bool, dict[str, Any]]:
    """The curves of a run, resolutions, whether the cross-validated curve ends with the data, what the mask does."""
    grid, mask = maps.grid, maps.mask
    curves = half_map_curves(maps.halves, grid, mask)
    masking = correction(curves, mask)
    found: dict[str, Any] = {"cross_validated": None, "cross_validated_interval": None}
    with_data = False
    for name in ("unmasked", "masked", "corrected"):
        found[f"half_map_{name}"] = resolution(curves[name], 0.143)
        if name != "corrected":
            found[f"half_map_{name}_0.5"] = resolution(curves[name], 0.5)
    found["half_map_masked_cryodrgn"] = last_crossing(curves["masked_cryodrgn"], 0.143)
    validation = CrossValidation(maps.data, mask, grid, maps.symmetry.order)
    found["backprojection_masked"] = resolution(Line(curves.frequency, validation.raw.numpy()), 0.143)
    if maps.raw is not None:
        curve, low, high = validation.band(maps.halves)
        curves = curves.joined(
            backprojection=validation.raw,
            cross_validated=curve.value,
            cross_validated_low=low,
            cross_validated_high=high,
        )
        found["cross_validated"] = crossing(curve, 0.5)
        with_data = ends_undefined(curve, 0.5)
        ends = [crossing(curves[f"cross_validated_{end}"], 0.5) for end in ("high", "low")]
        if None not in ends and found["cross_validated"] is not None:
            found["cross_validated_interval"] = ends
    if config.reference is not None:
        if maps.full is None:
            raise InputError(f"{FULL_MAP} is missing; expected it for --reference")
        reference = read_reference(config.reference, grid, log, "the maps of the run", maps.origin)
        curve = fsc_curve(maps.full, reference, grid, mask)
        if are_opposite(curve):
            log.warn(say_opposite(str(config.reference), FULL_MAP))
        curves = curves.joined(reference=curve.value)
        found["reference_masked_0.5"] = resolution(curve, 0.5)
    return curves, found, with_data, masking | _tightness(maps, validation, log, given=config.mask.mask is not None)


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
