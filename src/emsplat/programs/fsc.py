"""How far two maps agree: their curves, for the terminal and as a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from emsplat.assessment.curves import half_map_curves
from emsplat.assessment.maps import are_opposite, read_mask, read_pair, say_opposite
from emsplat.errors import InputError
from emsplat.io.files import require_another
from emsplat.measures.curves import Curves, crossing, last_crossing, never_falls, resolution
from emsplat.measures.fsc import fsc_curve
from emsplat.report.verdict import LIMIT, is_nyquist, spacing
from emsplat.run.fsc_star import write_fsc_star
from emsplat.run.log import Log

_SAME = 1e-6  # by which an FSC may fall short of 1 by rounding


def compare(a: Path, b: Path, mask: Path | None, output: Path | None, log: Log) -> Curves:
    """The curves of two maps, or of a map and a model, said line by line and written to ``output``.

    They are "unmasked", and with a mask also "masked", "corrected" and "random_phases".

    Raises:
        InputError: a file cannot be read, their grids differ, or are of a single voxel.
        OutputError: the curves cannot be written.
    """
    if output is not None:
        require_another(output, a, b, mask)
    first, second, grid, origin = read_pair(a, b, log)
    soft = None if mask is None else read_mask(mask, grid, log, origin)
    if grid.size < 2:
        raise InputError(f"{a}: a map of one voxel has no shells; expected two voxels or more along each axis")
    plain = fsc_curve(first, second, grid)
    if torch.equal(first, second) or float(plain.value[1:].min()) > 1 - _SAME:
        log.warn(f"{a} and {b} are the same map, but for a factor: the FSC of a map with itself says nothing")
    if are_opposite(plain):
        log.warn(say_opposite(str(a), str(b)))
    curves = Curves(plain.frequency.numpy(), {}).joined(unmasked=plain.value)
    if soft is not None:
        known = half_map_curves((first, second), grid, soft).values
        curves = curves.joined(**{name: known[name] for name in ("masked", "corrected", "random_phases")})
    for line in (*_table(curves), *_resolutions(curves)):
        log.line(line)
    if soft is not None and bool(torch.from_numpy(curves["random_phases"].value).isnan().all()):
        log.line("not corrected for the mask: the unmasked FSC does not fall below 0.8, where random phases begin")
    finest = grid.length / max(grid.size // 2 - 1, 1)  # its shells end one before ours
    found = last_crossing(fsc_curve(first, second, grid, soft, "cryodrgn"), 0.143)
    text = "never reached" if found is None else _limit(finest) if is_nyquist(found, finest) else spacing(found)
    log.line(f"FSC 0.143 by cryoDRGN's rule (other shells, last crossing; not comparable): {text}")
    if output is not None:
        write_fsc_star(output, {}, curves)
    return curves


def _table(curves: Curves) -> Iterator[str]:
    yield "shell  resolution (Å)  " + "  ".join(f"{name.replace('_', ' '):>13}" for name in curves.values)
    for shell, frequency in enumerate(curves.frequency.tolist()):
        values = "  ".join(f"{float(value[shell]):13.4f}" for value in curves.values.values())
        yield f"{shell:5d}  {1 / frequency if shell else 999:14.3f}  {values}"


def _resolutions(curves: Curves) -> Iterator[str]:
    label = "masked" if "masked" in curves else "unmasked"
    yield f"mean over shells 1 to {len(curves.frequency) - 1}, {label}: {float(curves[label].value[1:].mean()):.4f}"
    for label in [name for name in curves.values if name != "random_phases"]:
        for threshold in (0.143, 0.5):
            found, between = resolution(curves[label], threshold), crossing(curves[label], threshold)
            if never_falls(curves[label], threshold):
                limit = _limit(_finest(curves))
                yield f"FSC {threshold} {label}: {limit}: the curve never falls to {threshold}"
                continue
            yield (
                f"FSC {threshold} {label}: "
                + ("never reached" if found is None else f"{found:.2f} Å (RELION's rule: last shell before the drop)")
                + ("" if between is None else f", {between:.2f} Å (interpolated)")
            )


def _finest(curves: Curves) -> float:
    """The finest spacing in Å."""
    return 1 / float(curves.frequency[-1])


def _limit(finest: float) -> str:
    return f"{spacing(finest, finest)}, {LIMIT}"
