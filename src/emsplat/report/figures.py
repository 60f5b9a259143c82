"""Figures of a run folder for papers: each ``draw_*`` writes one PNG and one SVG, and returns the PNG."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emsplat.errors import InputError
from emsplat.io.files import replacing
from emsplat.report import read
from emsplat.report.verdict import kind_of, spacing
from emsplat.report.words import CURVE_NAMES
from emsplat.run import files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from emsplat.measures.curves import Curves

# Okabe & Ito's colours stay apart for colour-blind readers; the dashes (drawn, left out, ... in line widths) keep the
# lines apart in grey.
LINES: Sequence[tuple[str, tuple[float, ...]]] = (
    ("#0072B2", ()),
    ("#D55E00", (4, 1.5)),
    ("#009E73", (5, 1.5, 1.2, 1.5)),
    ("#CC79A7", (1.5, 1.5)),
    ("#8C6D31", (7, 2)),
    ("#56B4E9", (2.5, 1, 2.5, 3)),
    ("#555555", (1, 1.2)),
    ("#E69F00", (8, 1.5, 3, 1.5)),
    ("#8A2BE2", (3, 3)),
)
LINE_WIDTH = 1.8
# Blue where resolution is fine, as most programs show it; no end so dark that it hides the shape.
LOCAL_COLOURS = ("#4575b4", "#74add1", "#abd9e9", "#fee090", "#fdae61", "#f46d43", "#d73027")
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": LINE_WIDTH,
    "svg.fonttype": "none",  # text stays text, to be edited for a journal
}


def draw_fsc(run: Path) -> Path:
    """Draw the curves of ``fsc.star`` as `fsc_panels` arranges them, return ``fsc.png``.

    Curves that the page shows on request only are left out.

    Raises:
        InputError: ``fsc.star`` is missing, cannot be read or has no curve.
        OutputError: the figure cannot be written.
    """
    panels = fsc_panels(run)
    entries = max(len([curve for curve in panel.curves if not curve.hidden]) for panel in panels)
    with _figure(run / files.FSC_FIGURE, 4.6 * len(panels), 3.9 + 0.17 * entries) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.axhline(0, color="#999999", linewidth=0.6)
            axes.axhline(panel.threshold, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)))
            axes.text(1.01, panel.threshold, f"{panel.threshold}", transform=axes.get_yaxis_transform(), va="center")
            if panel.band:
                axes.fill_between(panel.frequency, *panel.band, color=LINES[0][0], alpha=0.18, linewidth=0)
            for curve in panel.curves:
                if not curve.hidden:
                    axes.plot(panel.frequency, curve.values, label=curve.label, **_line(curve.place))
            axes.set(xlim=(0, panel.frequency[-1]), ylim=(panel.lowest, 1.04), ylabel=panel.quantity)
            axes.set(xlabel="spatial frequency (1/Å), spacing (Å)")
            axes.set_title(panel.title, size=10)
            axes.locator_params(axis="x", nbins=5)
            axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}\n{1 / k:.3g} Å" if k > 0 else "0")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), fontsize=8)
    return run / files.FSC_FIGURE


def draw_slices(run: Path) -> Path:
    """Draw central slices and projections of the full map along z, y and x; return ``slices.png``.

    Slices pass through the centre voxel ``size // 2``; the first named axis points right, the second up.

    Raises:
        InputError: the map is missing, is not a volume, or its header has no pixel size.
        OutputError: the figure cannot be written.
    """
    import numpy as np

    volume = read.read_full_map(run)
    with _figure(run / files.SLICES_FIGURE, 7.2, 5.2) as figure:
        panels = figure.subplots(2, 3)
        for row, kind in zip(panels, ("slice", "projection"), strict=True):
            for axis, (axes, plane) in enumerate(zip(row, ("xy", "xz", "yz"), strict=True)):
                image = central(volume.values, axis) if kind == "slice" else volume.values.sum(axis)
                _draw_plane(axes, image, volume.pixel_size, np.percentile(image, (0.5, 99.8)))
                axes.set_title(f"{plane} {kind}", size=10)
    return run / files.SLICES_FIGURE


def draw_convergence(run: Path) -> Path:
    """Draw the loss of every fit and its last half enlarged; return ``convergence.png``.

    Thin lines are single steps, thick lines running means over 1/40 of a fit.

    Raises:
        InputError: ``convergence.csv`` is missing, cannot be read or has no rows.
        OutputError: the figure cannot be written.
    """
    fits = read.read_convergence(run)
    with _figure(run / files.CONVERGENCE_FIGURE, 7.2, 3.3) as figure:
        whole, end = figure.subplots(1, 2)
        for axes, title, begin in ((whole, "whole fit", 0.0), (end, "last half, enlarged", 0.5)):
            for i, (name, (steps, losses)) in enumerate(fits.items()):
                first = int(begin * len(steps))
                smooth = running_mean(losses, max(1, len(losses) // 40))
                axes.plot(steps[first:], losses[first:], color=LINES[i % len(LINES)][0], linewidth=0.6, alpha=0.35)
                label = FITS.get(name, name) if axes is whole else None
                axes.plot(steps[first:], smooth[first:], label=label, **_line(i))
            axes.set_xlabel("step")
            axes.set_title(title, size=10)
        whole.set(ylabel="loss")
        figure.legend(loc="outside lower center", ncols=min(4, len(fits)), fontsize=9)
    return run / files.CONVERGENCE_FIGURE


def draw_local_resolution(run: Path) -> Path:
    """Draw the distribution of the local resolution inside the mask; return ``local_resolution.png``.

    Raises:
        InputError: ``local_resolution.mrc`` or the mask is missing where it is needed, damaged or on another grid.
        OutputError: the figure cannot be written.
    """
    distributions = local_resolutions(run)
    with _figure(run / files.LOCAL_RESOLUTION_FIGURE, 5.2, 3.4) as figure:
        axes = figure.add_subplot()
        edges = shared_bins(list(distributions.values()))
        for i, (name, values) in enumerate(distributions.items()):
            shares = [100 * share for share in histogram(values, edges)]
            axes.stairs(shares, edges, color=LINES[i][0], fill=True, alpha=0.2)
            axes.stairs(shares, edges, label=name, **_line(i))
        axes.set(xlabel="local resolution (Å)", ylabel="voxels inside the mask (%)")
        axes.legend(fontsize=9)
    return run / files.LOCAL_RESOLUTION_FIGURE


def draw_local_resolution_slices(run: Path) -> Path:
    """Draw central slices of the full map coloured by local resolution; return ``local_resolution_slices.png``.

    Raises:
        InputError: the map or ``local_resolution.mrc`` is missing, damaged or on another grid.
        OutputError: the figure cannot be written.
    """
    import numpy as np

    volume = read.read_full_map(run)
    local = read.read_local_resolution(run, volume.values.shape)
    mask = read.read_mask(run, volume.values.shape)
    shown = local if mask is None else np.where(mask, local, np.nan)
    low, high = resolution_range(shown)
    with _figure(run / files.LOCAL_RESOLUTION_SLICES_FIGURE, 7.2, 2.6) as figure:
        panels = figure.subplots(1, 3)
        for axis, (axes, plane) in enumerate(zip(panels, ("xy", "xz", "yz"), strict=True)):
            image = central(volume.values, axis)
            extent = _draw_plane(axes, image, volume.pixel_size, np.percentile(image, (0.5, 99.8)))
            # Colour is transparent where density is low, so that the shape of the map stays readable.
            floor, ceiling = np.percentile(image, (50, 99))
            opacity = np.clip((image - floor) / max(float(ceiling - floor), 1e-30), 0.25, 0.85)
            layer = np.ma.masked_invalid(central(shown, axis))
            opacity = np.where(layer.mask, 0, opacity)
            axes.imshow(layer, cmap=_local_colours(), vmin=low, vmax=high, origin="lower", extent=extent, alpha=opacity)
            axes.set_title(f"{plane} slice", size=10)
        figure.colorbar(_scale(low, high), ax=panels, shrink=0.9, label="local resolution (Å)")
    return run / files.LOCAL_RESOLUTION_SLICES_FIGURE


def draw_directions(run: Path) -> Path:
    """Draw correlation, resolution, sampling and views by direction; return ``directions.png``.

    Raises:
        InputError: ``directions.csv`` is missing, cannot be read or is no grid.
        OutputError: the figure cannot be written.
    """
    found = read.read_directions(run)
    shown = direction_maps(found)
    with _figure(run / files.DIRECTIONS_FIGURE, 7.2, 2.2 * ((len(shown) + 1) // 2)) as figure:
        panels = figure.subplots((len(shown) + 1) // 2, 2).flat
        for axes, one in zip(panels, shown, strict=True):
            scale = {"cmap": one.colours.lower(), "vmin": one.range[0], "vmax": one.range[1]}
            figure.colorbar(axes.pcolormesh(found.rot, found.tilt, one.values, rasterized=True, **scale), ax=axes)
            axes.set(xlabel="rot (°)", ylabel="tilt (°)", xticks=range(0, 361, 90), yticks=range(0, 181, 45))
            axes.set_title(one.title, size=10)
            axes.invert_yaxis()
    return run / files.DIRECTIONS_FIGURE


def draw_residual(run: Path) -> Path:
    """Draw the power of the residuals relative to the noise model; return ``residual.png``.

    Raises:
        InputError: ``residual.csv`` is missing, cannot be read or has no rows.
        OutputError: the figure cannot be written.
    """
    frequency, ratios = residual_ratios(run)
    with _figure(run / files.RESIDUAL_FIGURE, 5.6, 3.4) as figure:
        axes = figure.add_subplot()
        axes.axhline(1, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)))
        for i, (name, ratio) in enumerate(ratios.items()):
            axes.plot(frequency, ratio, label=name, **_line(i))
        axes.set(xlabel="spatial frequency (1/Å), spacing (Å)", ylabel="residual power / noise power")
        axes.set(ylim=residual_range(ratios))
        axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}\n{1 / k:.3g} Å" if k > 0 else f"{k:g}")
        axes.legend(fontsize=9)
    return run / files.RESIDUAL_FIGURE


def draw_gaussians(run: Path) -> Path:
    """Draw the distributions of widths and anisotropies of the Gaussians; return ``gaussians.png``.

    Raises:
        InputError: ``run_class001.ply`` is missing or damaged.
        OutputError: the figure cannot be written.
    """
    widths = read.read_widths(run)
    with _figure(run / files.GAUSSIANS_FIGURE, 7.2, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        edges = shared_bins([widths.sigma.ravel()])
        for i, (name, values) in enumerate(zip(AXES, widths.sigma.T, strict=True)):
            left.stairs([100 * share for share in histogram(values, edges)], edges, label=name, **_line(i))
        left.set(xlabel="standard deviation σ (Å)", ylabel="Gaussians (%)")
        left.legend(fontsize=9)
        edges = shared_bins([widths.anisotropy])
        shares = [100 * share for share in histogram(widths.anisotropy, edges)]
        right.stairs(shares, edges, color=LINES[0][0], fill=True, alpha=0.6)
        right.set(xlabel="anisotropy, largest / smallest σ", ylabel="Gaussians (%)")
    return run / files.GAUSSIANS_FIGURE


# What both kinds of figures show

AXES = ("smallest axis", "middle axis", "largest axis")
FITS = {"half1": "half 1", "half2": "half 2", "class001": "all particles"}


@dataclass(frozen=True)
class FscCurve:
    """A curve of `FscPanel`: its name with the resolution read from it, values, and its place in `LINES`."""

    label: str
    values: list[float]
    place: int
    hidden: bool = False  # shown on request


@dataclass(frozen=True)
class FscPanel:
    """Curves that estimate one quantity, the threshold they are read at, and a band of the first of them."""

    title: str
    quantity: str
    threshold: float
    frequency: list[float]  # 1/Å, from shell 1 on, as all values
    curves: list[FscCurve]
    band: tuple[list[float], list[float]] | None = None

    @property
    def lowest(self) -> float:
        """Where the axis of the values begins."""
        shown = (v for curve in self.curves if not curve.hidden for v in curve.values if math.isfinite(v))
        return min(-0.05, 1.1 * min(shown, default=0.0))


def fsc_panels(run: Path) -> list[FscPanel]:
    """The curves of ``fsc.star``, those against the truth apart from those between half maps.

    An FSC between half maps is no correlation with the truth and lies below it: for comparison with the curves that
    are, it is drawn as the correlation with the truth that it implies for the map of all particles. Where nothing was
    measured against the truth there is only the panel of the half maps.

    Raises:
        InputError: ``fsc.star`` is missing, cannot be read or has no curve.
    """
    curves = read.read_fsc(run)
    summary = read.read_summary_or_nothing(run)
    frequency = curves.frequency.tolist()
    kind, nyquist = kind_of(summary), 1 / frequency[-1]
    gaussians = kind.has_gaussians or "cross_validated" in curves
    maps = "half maps of the Gaussians" if gaussians else "half maps"
    places = {name: place for place, name in enumerate(CURVE_NAMES)}
    evident = summary.get("evident") is not False
    truth, between = [], []
    for name in in_order(curves):
        values, place = curves[name].value[1:].tolist(), places.get(name, len(places))
        plain = CURVE_NAMES.get(name, name)
        found = ""
        if evident and name not in _WITHOUT_RESOLUTION:
            found = f": {spacing(_reading(name, curves), nyquist)}"
        if name in _AGAINST_TRUTH:
            truth.append(FscCurve(plain + found, values, place))
            continue
        between.append(FscCurve(plain + found, values, place, hidden=name in _ON_REQUEST))
        if name in _IMPLYING:
            origin = plain if name == "backprojection" else f"{maps}, corrected"
            truth.append(FscCurve(f"{origin}, implied{found}", implied(values), place))
    panels = []
    truth = [curve for curve in truth if any(map(math.isfinite, curve.values))]
    if truth and any(name in curves for name in _AGAINST_TRUTH):
        low, high = (curves[name].value[1:].tolist() if name in curves else [] for name in _BAND)
        band = (low, high) if low and high else None
        panels.append(
            FscPanel("against the truth", "correlation with the truth (FSC)", 0.5, frequency[1:], truth, band)
        )
    if between:
        panels.append(FscPanel(f"between {maps}", "FSC between half maps", 0.143, frequency[1:], between))
    return panels


_AGAINST_TRUTH = ("cross_validated", "reference")
_BAND = ("cross_validated_low", "cross_validated_high")
_IMPLYING = ("backprojection", "corrected")
# What maps share that share nothing: its curve says something about the mask, a resolution nothing.
_WITHOUT_RESOLUTION = ("random_phases",)
_ON_REQUEST = ("particle", "masked_cryodrgn")


def implied(values: Sequence[float]) -> list[float]:
    """The correlation with the truth of the sum of two maps, √(2F / (1 + F)) of their FSC F.

    Rosenthal & Henderson 2003. 1/7 becomes 0.5. Undefined (NaN) from the first shell on whose F is not above 0.
    """
    end = next((shell for shell, value in enumerate(values) if not value > 0), len(values))
    return [math.sqrt(2 * f / (1 + f)) for f in values[:end]] + [math.nan] * (len(values) - end)


def in_order(curves: Curves) -> list[str]:
    """The names of the curves but those of the band, known ones first."""
    names = [name for name in curves.values if name not in _BAND]
    return sorted(names, key=lambda name: [*CURVE_NAMES, name].index(name))


def _reading(name: str, curves: Curves) -> float | None:
    """The resolution of a curve by the rule that its number in the headline follows."""
    from emsplat.measures.curves import crossing, last_crossing, resolution

    match name:
        case "cross_validated":
            return crossing(curves[name], 0.5)
        case "reference":
            return resolution(curves[name], 0.5)
        case "masked_cryodrgn":
            return last_crossing(curves[name], 0.143)
        case _:
            return resolution(curves[name], 0.143)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean over the last ``width`` values at each place; fewer at the start."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def local_resolutions(run: Path) -> dict[str, NDArray[np.float32]]:
    """Local resolutions in Å inside the mask, of the map that the headline uses and, if there, of the half maps."""
    import numpy as np

    shape = read.read_volume(run / files.LOCAL_RESOLUTION).values.shape
    mask = read.read_mask(run, shape)
    names = {"local resolution": files.LOCAL_RESOLUTION}
    if (run / files.LOCAL_RESOLUTION_HALF_MAPS).exists():
        names = {
            "cross-validated": files.LOCAL_RESOLUTION,
            "half maps of the Gaussians": files.LOCAL_RESOLUTION_HALF_MAPS,
        }
    maps = {label: read.read_local_resolution(run, shape, name) for label, name in names.items()}
    found = {label: values[np.isfinite(values) & (True if mask is None else mask)] for label, values in maps.items()}
    if not all(len(values) for values in found.values()):
        raise InputError(
            f"{run / files.LOCAL_RESOLUTION}: no resolution inside {files.MASK}; expected Å there; "
            "run the reconstruction again"
        )
    return found


def resolution_range(local: NDArray[np.float32]) -> tuple[float, float]:
    """The colour scale of a local resolution: its 5th to 95th percentile in Å, and at least a fifth of the finest.

    Less would paint differences that lie within the error of a local resolution.
    """
    import numpy as np

    known = local[np.isfinite(local)]
    low, high = np.percentile(known, (5, 95)) if known.size else (1.0, 1.0)
    return float(low), float(max(high, 1.2 * low))


def shared_bins(samples: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Edges of 50 equal bins between the 0.1st and the 99.9th percentile of all samples, a fifth of the least apart."""
    import numpy as np

    low, high = np.percentile(np.concatenate(samples), (0.1, 99.9))
    return np.linspace(low, max(high, 1.2 * low + 1e-6), 51)


def histogram(values: NDArray[Any], edges: NDArray[np.float64]) -> list[float]:
    """The part of the values in each bin; what lies beyond the ends counts in the first and last."""
    import numpy as np

    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return [float(share) for share in counts / max(len(values), 1)]


def residual_ratios(run: Path) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Frequencies in 1/Å and, by name, the power of the residuals over that of the noise model."""
    import numpy as np

    table = read.read_residual(run)
    noise = np.where(table["noise"] > 0, table["noise"], np.nan)
    return table["frequency"], {
        "less the model of their own half": table["own"] / noise,
        "less the model of the other half": table["other"] / noise,
    }


def residual_range(ratios: dict[str, NDArray[np.float64]]) -> tuple[float, float]:
    """Ends of the axis of `residual_ratios`, never so close that a gap of half a per cent looks large."""
    import numpy as np

    known = np.concatenate(list(ratios.values()))
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
    return min(0.9, low - 0.02), max(1.1, high + 0.02)


@dataclass(frozen=True)
class DirectionMap:
    """A map over the sphere with its colours, and the values at their ends."""

    title: str
    values: NDArray[np.float64]
    colours: str
    range: tuple[float, float]


def direction_maps(found: read.Directions) -> list[DirectionMap]:
    """What is known by direction. No scale is so narrow that it would paint noise."""
    import numpy as np

    def ends(values: NDArray[np.float64]) -> tuple[float, float]:
        known = values[np.isfinite(values)]
        return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)

    (low, _), (fine, coarse) = ends(found.fslc), ends(found.conical_resolution)
    always = [
        DirectionMap("Fourier slice correlation", found.fslc, "Viridis", (min(low, 0.9), 1.0)),
        DirectionMap("conical resolution (Å)", found.conical_resolution, "Viridis_r", (fine, max(coarse, 1.2 * fine))),
    ]
    if found.sampling is None or found.density is None:
        return always
    return [
        *always,
        DirectionMap("sampling, uniform = 1", found.sampling, "Viridis", (0.0, max(2.0, ends(found.sampling)[1]))),
        DirectionMap("views, uniform = 1", found.density, "Magma", (0.0, max(2.0, ends(found.density)[1]))),
    ]


# Drawing


def draw_poses(run: Path) -> Path:
    """Draw how far poses moved, and orientations before and after; return ``poses.png``.

    Raises:
        InputError: ``poses.csv`` is missing, cannot be read or has no rows.
        OutputError: the figure cannot be written.
    """
    found = read.read_poses(run)
    with _figure(run / files.POSES_FIGURE, 7.2, 5.2) as figure:
        above, below = figure.subplots(2, 2)
        for axes, (label, samples) in zip(above, pose_histograms(found).items(), strict=True):
            edges = shared_bins(list(samples.values()))
            for i, (name, values) in enumerate(samples.items()):
                axes.stairs([100 * share for share in histogram(values, edges)], edges, label=name, **_line(i))
            axes.set(xlabel=label, ylabel="particles (%)")
            axes.legend(fontsize=9)
        for axes, one in zip(below, pose_maps(found), strict=True):
            rot, tilt = POSE_CELLS
            scale = {"cmap": one.colours.lower(), "vmin": one.range[0], "vmax": one.range[1]}
            figure.colorbar(axes.pcolormesh(rot, tilt, one.values, rasterized=True, **scale), ax=axes)
            axes.set(xlabel="rot (°)", ylabel="tilt (°)", xticks=range(-180, 181, 90), yticks=range(0, 181, 45))
            axes.set_title(one.title, size=10)
            axes.invert_yaxis()
    return run / files.POSES_FIGURE


def pose_histograms(found: dict[str, NDArray[np.float64]]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """What is shown of turns and of shifts."""
    return {
        f"{what} ({unit})": {"moved by": found[f"{kind}_moved"], "uncertain by": found[f"{kind}_uncertainty"]}
        for kind, what, unit in (("angle", "turn", "°"), ("shift", "shift", "Å"))
    }


# Middles of the cells of `pose_maps` in degrees: rot, tilt.
POSE_CELLS = [float(x) for x in range(-170, 180, 20)], [float(x) for x in range(10, 180, 20)]


def pose_maps(found: dict[str, NDArray[np.float64]]) -> list[DirectionMap]:
    """Particles per solid angle before and after, on one scale."""
    import numpy as np

    edges = np.arange(0, 181, 20), np.arange(-180, 181, 20)
    area = np.diff(-np.cos(np.radians(edges[0])))[:, None] / (2 * (len(edges[1]) - 1))  # part of the sphere
    maps = []
    for ending in ("_given", ""):
        tilt, rot = found[f"tilt{ending}"], (found[f"rot{ending}"] + 180) % 360 - 180
        maps.append(np.histogram2d(tilt, rot, edges)[0] / area / max(len(tilt), 1))
    top = max(2.0, float(max(one.max() for one in maps)))
    titles = ("views as given, uniform = 1", "views as refined, uniform = 1")
    return [DirectionMap(title, one, "Magma", (0.0, top)) for title, one in zip(titles, maps, strict=True)]


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of width × height inches, saved to ``path`` and as SVG beside it at the end."""
    load_matplotlib()
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Whatever a matplotlibrc or the notebook around has set; it is theirs again afterwards. No pyplot: a figure of its
    # own asks for no back end.
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        yield figure
        # The canvases themselves: `savefig` draws everything twice.
        with replacing(path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)  # type: ignore[no-untyped-call]
        figure.set_layout_engine("none")  # the layout is found; finding it again takes most of the time
        with replacing(path.with_suffix(".svg")) as temporary:
            FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})  # type: ignore[no-untyped-call]


def always_there() -> bool:
    """Whether the back end that MPLBACKEND names, if any, comes with matplotlib."""
    return os.environ.get("MPLBACKEND", "agg") == "agg"


def load_matplotlib() -> None:
    """Imports matplotlib where MPLBACKEND names a back end that may not be installed here (a notebook's), which a plain
    import does not survive; elsewhere there is nothing to do."""
    if "matplotlib" in sys.modules or always_there():
        return
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with suppress(ValueError):  # pyplot, should anybody import it, chooses one by itself then
            mpl.rcParams["backend"] = wanted  # as matplotlib does


def load_back_ends() -> None:
    """Imports matplotlib with what PNG and SVG take."""
    load_matplotlib()
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401


def draw_states(run: Path) -> Path:
    """Draw gains, populations and, where there are any, free energies of a heterogeneous run; return ``states.png``.

    Raises:
        InputError: the summary or a table is damaged.
        OutputError: the figure cannot be written.
    """
    import numpy as np

    found = read.group(read.read_summary(run), "heterogeneity")
    rows = read.entries(found, "states")
    energies = read.read_free_energy(run) if found.get("landscape") is True else {}
    plane = read.read_landscape(run) if (run / files.LANDSCAPE).exists() else None
    panels = [_draw_gain(found)] + [_draw_populations(rows)] * bool(rows)
    panels += [_draw_plane_of_energy(plane)] if plane is not None else []
    panels += [_draw_energies(energies)] * bool(energies)
    with _figure(run / files.STATES_FIGURE, 7.2, 3.2 * math.ceil(len(panels) / 2)) as figure:
        axes = list(np.atleast_1d(figure.subplots(math.ceil(len(panels) / 2), 2)).flat)
        for place, draw in zip(axes, panels, strict=False):
            draw(place, figure)
        for place in axes[len(panels) :]:
            place.axis("off")
    return run / files.STATES_FIGURE


_Draw = Callable[[Any, Any], None]


def _draw_gain(found: Mapping[str, Any]) -> _Draw:
    gains = read.entries(found, "gain_by_components")

    def draw(axes: Any, _: Any) -> None:
        values, errors = ([float(own.get(key) or 0) for own in gains] for key in ("value", "error"))
        axes.errorbar(range(len(gains)), values, errors, capsize=2, color=LINES[0][0])
        axes.axhline(0, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set(xlabel="components", ylabel="gain (nats per image)")

    return draw


def _draw_populations(rows: Sequence[Mapping[str, Any]]) -> _Draw:
    def draw(axes: Any, _: Any) -> None:
        number = [row.get("state") for row in rows]
        value = [100 * float(row.get("population") or 0) for row in rows]
        ends = [read.pair(row, "population_interval") for row in rows]
        reach = [[v - 100 * low for v, (low, _) in zip(value, ends, strict=True)]]
        reach += [[100 * high - v for v, (_, high) in zip(value, ends, strict=True)]]
        axes.bar(number, value, yerr=reach, color=LINES[0][0], alpha=0.6, capsize=2)
        axes.set(xlabel="state", ylabel="particles (%)")

    return draw


def _draw_plane_of_energy(plane: dict[str, NDArray[np.float64]]) -> _Draw:
    import numpy as np

    across, up = np.unique(plane["z1"]), np.unique(plane["z2"])
    table = plane["free_energy"].reshape(len(across), len(up)).T

    def draw(axes: Any, figure: Any) -> None:
        shown = axes.pcolormesh(across, up, np.ma.masked_invalid(table), cmap="viridis_r", rasterized=True)
        figure.colorbar(shown, ax=axes, label="-ln p (kT)")
        known = np.isfinite(table)
        axes.set(xlabel="z1", ylabel="z2", aspect="equal")
        if known.any():
            axes.set(xlim=_ends(across[known.any(0)]), ylim=_ends(up[known.any(1)]))

    return draw


def _ends(places: NDArray[np.float64]) -> tuple[float, float]:
    edge = 0.08 * float(places[-1] - places[0]) + 1e-6
    return float(places[0]) - edge, float(places[-1]) + edge


def _draw_energies(energies: dict[str, dict[str, list[float]]]) -> _Draw:
    import numpy as np

    def draw(axes: Any, _: Any) -> None:
        for place, (name, own) in enumerate(list(energies.items())[: len(LINES)]):
            value, error = np.array(own["free_energy"]), np.array(own["error"])
            axes.plot(own["place"], value, label=name, **_line(place))
            axes.fill_between(
                own["place"], value - 2 * error, value + 2 * error, color=LINES[place][0], alpha=0.15, linewidth=0
            )
        axes.set(xlabel="latent", ylabel="-ln p (kT)")
        axes.legend(fontsize=8)

    return draw


def _line(place: int) -> dict[str, Any]:
    color, dashes = LINES[place % len(LINES)]
    return {"color": color, "linestyle": (0, dashes) if dashes else "-"}


def _local_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("local resolution", LOCAL_COLOURS)


def central(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """The slice across an axis through the centre voxel ``size // 2``."""
    plane: NDArray[np.float32] = values.take(values.shape[axis] // 2, axis)
    return plane


def _draw_plane(
    axes: Any, image: NDArray[np.float32], pixel_size: float, limits: NDArray[Any]
) -> tuple[float, float, float, float]:
    """A grey image with a scale bar; returns its extent in Å."""
    height, width = (n * pixel_size for n in image.shape)
    extent = (0.0, width, 0.0, height)
    axes.imshow(image, cmap="gray", origin="lower", vmin=limits[0], vmax=limits[1], extent=extent)
    axes.set(xticks=[], yticks=[])
    _draw_scale_bar(axes, width, height)
    return extent


def _scale(low: float, high: float) -> Any:
    """The colour scale alone: of the images themselves, transparency would pale it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), _local_colours())


def _draw_scale_bar(axes: Any, width: float, height: float) -> None:
    """A bar of a round number of Å, about a quarter of the panel, at the lower left."""
    from matplotlib.patheffects import withStroke

    length = round_length(width / 3)
    outline = [withStroke(linewidth=2.5, foreground="black")]
    x, y = 0.05 * width, 0.06 * height
    axes.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt",
              path_effects=[withStroke(linewidth=4.5, foreground="black")])  # fmt: skip
    axes.text(x, y + 0.025 * height, f"{length:g} Å", color="white", fontsize=8, path_effects=outline)


def round_length(limit: float) -> float:
    """The largest of 1, 2, 5 × 10^n that does not exceed ``limit``."""
    power = 10.0 ** math.floor(math.log10(limit))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= limit)
