"""Two runs side by side: their curves in one plot, the settings that differ, the difference of their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emsplat.errors import InputError
from emsplat.report import read, verdict
from emsplat.run import files
from emsplat.viewer.folders import has_file, inside
from emsplat.viewer.pictures import png
from emsplat.viewer.watched import (
    Watched,
    curve_json,
    curve_of_points,
    fit_names,
    panel_json,
    settings_rows,
    shown_name,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LARGEST = 400  # voxels along an edge; transforms of more would take seconds and memory from those who compute
_RUN_OPTIONS = frozenset({"threads", "device", "resume", "overwrite", "checkpoint-every", "datadir", "force"})


@dataclass(frozen=True)
class Difference:
    """Central slices of two maps, the second scaled to the first, and of their difference; and how that was done."""

    picture: bytes
    remarks: tuple[str, ...]


def compare(first: Watched, second: Watched) -> dict[str, Any]:
    """What the page of two runs shows; colours tell the runs apart, dashes the curves."""
    both = (first, second)
    return {
        "runs": [one.row() for one in both],
        "panels": _panels(both),
        "settings": _settings(both),
        "maps": [shown is not None for shown in map(_map_of, both)],
    }


def _panels(both: Sequence[Watched]) -> list[dict[str, Any]]:
    panels = []
    of_fsc = [{panel.quantity: panel for panel in one.fsc_panels()} for one in both]
    for quantity in dict.fromkeys(quantity for found in of_fsc for quantity in found):
        shown = [found[quantity] for found in of_fsc if quantity in found]
        curves = [
            curve_json(f"{'AB'[run]}: {curve.label}", found[quantity].frequency, curve.values, run, curve.place)
            for run, found in enumerate(of_fsc)
            if quantity in found
            for curve in found[quantity].curves
            if not curve.hidden
        ]
        title = ", ".join(dict.fromkeys(panel.title.removesuffix(", so far") for panel in shown))
        plot = panel_json("fsc", title, "spatial frequency (1/Å), spacing (Å)", quantity, curves)
        plot |= {"threshold": shown[0].threshold, "low": min(panel.lowest for panel in shown), "high": 1.04}
        panels.append(plot)
    for kind, title, across, up in (
        ("scores", "Score", "epoch", "mean cross-validated FSC"),
        ("loss", "Loss", "step", "loss, running mean"),
    ):
        curves = []
        for run, one in enumerate(both):
            fits = one.scores() if kind == "scores" else one.losses()
            curves += [
                curve_of_points(f"{'AB'[run]}: {fit_names(name)}", points, run, place)
                for place, (name, points) in enumerate(fits.items())
            ]
        if curves:
            panels.append(panel_json(kind, title, across, up, curves))
    return panels


def _settings(both: Sequence[Watched]) -> list[tuple[str, str, str]]:
    """Settings that differ, those of the work before those of the machine."""
    tables = [dict(settings_rows(one.settings())) for one in both]
    for table, one in zip(tables, both, strict=True):
        table["program"] = shown_name(f"{one.program} ({table.get('program', 'version not known')})")
        table.pop("command", None)
    names = dict.fromkeys(name for table in tables for name in table)
    of_a, of_b = tables
    rows = [(name, of_a.get(name, "not set"), of_b.get(name, "not set")) for name in names]
    return sorted((row for row in rows if row[1] != row[2]), key=lambda row: row[0] in _RUN_OPTIONS)


def _map_of(one: Watched) -> str | None:
    """The map that a run is about."""
    names = (files.FULL_MAP, files.CONSENSUS, files.CHECK_MAP)
    return next((name for name in names if has_file(one.root, one.folder, name)), None)


def difference(first: Watched, second: Watched) -> Difference:
    """A minus B. B is scaled shell by shell to the amplitudes of A, so that another sharpening is no difference; both
    end at the coarser of the two resolutions, beyond which they hold noise.

    Raises:
        InputError: a run has no map, cannot be read, or the two are on different grids.
    """
    names = [_map_of(one) for one in (first, second)]
    paths: list[Path] = []
    for one, name in zip((first, second), names, strict=True):
        if name is None:
            raise InputError(f"{one.name}: has no map yet; it comes at the end of the run")
        paths.append(inside(one.root, one.folder, name))
    versions = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    limits = [_resolution(one) for one in (first, second)]
    known = [limit for limit in limits if limit is not None]
    return _difference(versions, max(known) if known else None)


def _resolution(one: Watched) -> float | None:
    """Å, of a finished run."""
    found = read.group(read.read_summary_or_nothing(one.path), "resolution")
    value = found.get("cross_validated", found.get("half_map_corrected"))
    return float(value) if isinstance(value, int | float) and value > 0 else None


@lru_cache(8)
def _difference(versions: tuple[tuple[Path, int, int], ...], limit: float | None) -> Difference:
    import numpy as np

    for path, _, size in versions:
        if size > 4 * _LARGEST**3 + 2**20:
            raise InputError(f"{path.name}: more than {_LARGEST} voxels across; compare such maps with `emsplat fsc`")
    a, b = (read.read_volume(path) for path, _, _ in versions)
    if a.values.shape != b.values.shape or abs(a.pixel_size - b.pixel_size) > 1e-3 * a.pixel_size:
        raise InputError(
            f"A has {a.values.shape[0]} voxels of {a.pixel_size:.4g} Å across, B {b.values.shape[0]} of "
            f"{b.pixel_size:.4g} Å; a difference needs one grid: run again with the --box and --pixel-size of the other"
        )
    if not (np.isfinite(a.values).all() and np.isfinite(b.values).all()):
        raise InputError("a map holds values that are not finite; expected maps; did a fit diverge?")
    one, other = matched(a.values, b.values, a.pixel_size, limit)
    gap = one - other
    likeness = float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) if one.std() > 0 and other.std() > 0 else np.nan
    remarks = (
        "B is scaled shell by shell to the amplitudes of A"
        + (f", and both end at {verdict.spacing(limit)}, the coarser of the two resolutions." if limit else ".")
        + " Nothing is turned or moved: maps in other frames differ everywhere.",
        f"Correlation of the two: {likeness:.4f}. Standard deviation of the difference: "
        f"{float(gap.std() / max(float(one.std()), 1e-30)):.1%} of that of A.",
        "Blue: more density in A; orange: more in B; full colour at three standard deviations of A's map.",
    )
    return Difference(_drawn(one, other, gap), remarks)


def matched(
    a: NDArray[np.float32], b: NDArray[np.float32], pixel_size: float, limit: float | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two maps [z, y, x] without what is finer than ``limit`` Å, the second with the first one's power in each shell;
    the mean is taken out of both."""
    import numpy as np

    spectra = [np.fft.rfftn(volume.astype(np.float32)) for volume in (a, b)]
    axes = [np.fft.fftfreq(size, 1 / size) for size in a.shape[:2]]
    axes.append(np.arange(a.shape[2] // 2 + 1))
    radius = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2)
    shell = np.round(radius).astype(int)
    last = a.shape[0] // 2
    if limit is not None:
        last = min(last, int(np.floor(a.shape[0] * pixel_size / limit + 1e-6)))
    kept = (shell > 0) & (shell <= last)
    twice = np.full(shell.shape, 2.0)
    twice[..., 0] = 1
    if a.shape[2] % 2 == 0:
        twice[..., -1] = 1
    power = [np.bincount(shell.ravel(), (twice * np.abs(one) ** 2).ravel()) for one in spectra]
    gain = np.sqrt(power[0] / np.maximum(power[1], 1e-30 + 1e-12 * power[1].max()))
    first = np.fft.irfftn(np.where(kept, spectra[0], 0), a.shape, axes=(0, 1, 2))
    second = np.fft.irfftn(np.where(kept, spectra[1] * gain[shell], 0), a.shape, axes=(0, 1, 2))
    return first.astype(np.float32), second.astype(np.float32)


def _drawn(one: NDArray[np.float32], other: NDArray[np.float32], gap: NDArray[np.float32]) -> bytes:
    """The planes xy, xz and yz in rows; A, B and A - B in columns."""
    import numpy as np

    low, high = np.percentile(one, (0.5, 99.9))
    top = 3 * max(float(one.std()), 1e-30)
    white, blue, orange = np.ones(3), np.array([0, 0.447, 0.698]), np.array([0.835, 0.369, 0])
    columns = []
    for volume in (one, other):
        planes = [volume.take(volume.shape[axis] // 2, axis) for axis in range(3)]
        columns.append([np.clip((plane - low) / max(float(high - low), 1e-30), 0, 1) for plane in planes])
    planes = []
    for axis in range(3):
        ratio = np.clip(gap.take(gap.shape[axis] // 2, axis) / top, -1, 1)[..., None]
        planes.append(white + np.maximum(ratio, 0) * (blue - white) + np.maximum(-ratio, 0) * (orange - white))
    columns.append(planes)
    stacked = [np.concatenate([np.repeat(p[..., None], 3, 2) if p.ndim == 2 else p for p in c[::-1]]) for c in columns]
    return png(stacked)
