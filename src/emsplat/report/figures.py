"""Figures of a run folder for papers: each ``draw_*`` writes one PNG and one SVG, and returns the PNG."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emsplat.errors import InputError
from emsplat.io.files import replacing
from emsplat.report import read
from emsplat.report.words import CURVE_NAMES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Okabe & Ito's colours stay apart for colour-blind readers; the dashes keep the lines apart in grey.
LINES: Sequence[tuple[str, Any]] = (
    ("#0072B2", "-"),
    ("#D55E00", (0, (6, 1.5))),
    ("#009E73", (0, (3, 1, 1, 1))),
    ("#CC79A7", (0, (2, 1))),
    ("#E69F00", (0, (1, 1))),
    ("#56B4E9", (0, (8, 2, 1, 2))),
    ("#555555", (0, (4, 1, 1, 1, 1, 1))),
    ("#8C6D31", (0, (5, 3))),
    ("#8A2BE2", (0, (3, 3))),
)
LOCAL_COLOURS = "RdYlBu_r"  # blue where resolution is fine, as most programs show it; both libraries know the name
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text, to be edited for a journal
}


def draw_fsc(run: Path) -> Path:
    """Draw the curves of ``fsc.star`` with the thresholds 0.143 and 0.5, return ``fsc.png``.

    Raises:
        InputError: ``fsc.star`` is missing, cannot be read or has no curve.
        OutputError: the figure cannot be written.
    """
    shells = read.read_fsc(run)
    with _figure(run / "fsc.png", 6.6, 4.0 + 0.2 * len(shells.curves)) as figure:
        axes = figure.add_subplot()
        axes.axhline(0, color="#999999", linewidth=0.6)
        for threshold in (0.143, 0.5):
            axes.axhline(threshold, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)))
            axes.text(1.01, threshold, f"{threshold}", transform=axes.get_yaxis_transform(), va="center")
        if shells.band:
            lower, upper = (end[1:] for end in shells.band)
            axes.fill_between(shells.frequency[1:], lower, upper, color=LINES[0][0], alpha=0.18, linewidth=0)
        for i, name in enumerate(in_order(shells.curves)):
            color, dashes = LINES[i % len(LINES)]
            values = shells.curves[name]
            label = f"{CURVE_NAMES.get(name, name)}: {reading(name, shells.frequency, values)}"
            axes.plot(shells.frequency[1:], values[1:], color=color, linestyle=dashes, label=label)
        low = min((v for values in shells.curves.values() for v in values[1:] if math.isfinite(v)), default=0.0)
        axes.set(xlim=(0, shells.frequency[-1]), ylim=(min(-0.05, 1.1 * low), 1.04))
        axes.set(ylabel="Fourier shell correlation", xlabel="spatial frequency (1/Å), spacing (Å)")
        axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}\n{1 / k:.3g} Å" if k > 0 else "0")
        figure.legend(loc="outside lower center", fontsize=8)
    return run / "fsc.png"


def draw_slices(run: Path) -> Path:
    """Draw central slices and projections of the full map along z, y and x; return ``slices.png``.

    Slices pass through the centre voxel ``size // 2``; the first named axis points right, the second up.

    Raises:
        InputError: the map is missing, is not a volume, or its header has no pixel size.
        OutputError: the figure cannot be written.
    """
    import numpy as np

    volume = read.read_full_map(run)
    with _figure(run / "slices.png", 7.2, 5.2) as figure:
        panels = figure.subplots(2, 3)
        for row, kind in zip(panels, ("slice", "projection"), strict=True):
            for axis, (axes, plane) in enumerate(zip(row, ("xy", "xz", "yz"), strict=True)):
                image = _central(volume.values, axis) if kind == "slice" else volume.values.sum(axis)
                _draw_plane(axes, image, volume.pixel_size, np.percentile(image, (0.5, 99.8)))
                axes.set_title(f"{plane} {kind}", size=10)
    return run / "slices.png"


def draw_convergence(run: Path) -> Path:
    """Draw the loss of every fit and its last half enlarged; return ``convergence.png``.

    Thin lines are single steps, thick lines running means over 1/40 of a fit.

    Raises:
        InputError: ``convergence.csv`` is missing, cannot be read or has no rows.
        OutputError: the figure cannot be written.
    """
    fits = read.read_convergence(run)
    with _figure(run / "convergence.png", 7.2, 3.3) as figure:
        whole, end = figure.subplots(1, 2)
        for axes, title, begin in ((whole, "whole fit", 0.0), (end, "last half, enlarged", 0.5)):
            for i, (name, (steps, losses)) in enumerate(fits.items()):
                color, dashes = LINES[i % len(LINES)]
                first = int(begin * len(steps))
                smooth = running_mean(losses, max(1, len(losses) // 40))
                axes.plot(steps[first:], losses[first:], color=color, linewidth=0.6, alpha=0.35)
                label = name if axes is whole else None
                axes.plot(steps[first:], smooth[first:], color=color, linestyle=dashes, label=label)
            axes.set_xlabel("step")
            axes.set_title(title, size=10)
        whole.set(ylabel="loss")
        figure.legend(loc="outside lower center", ncols=min(4, len(fits)), fontsize=9)
    return run / "convergence.png"


def draw_local_resolution(run: Path) -> Path:
    """Draw the distribution of the local resolution inside the mask; return ``local_resolution.png``.

    Raises:
        InputError: ``local_resolution.mrc`` or the mask is missing where it is needed, damaged or on another grid.
        OutputError: the figure cannot be written.
    """
    distributions = local_resolutions(run)
    with _figure(run / "local_resolution.png", 5.2, 3.4) as figure:
        axes = figure.add_subplot()
        edges = shared_bins(list(distributions.values()))
        for (name, values), (color, dashes) in zip(distributions.items(), LINES, strict=False):
            shares = [100 * share for share in histogram(values, edges)]
            axes.stairs(shares, edges, color=color, fill=True, alpha=0.2)
            axes.stairs(shares, edges, color=color, linestyle=dashes, label=name, linewidth=1.5)
        axes.set(xlabel="local resolution (Å)", ylabel="voxels inside the mask (%)")
        axes.legend(fontsize=9)
    return run / "local_resolution.png"


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
    with _figure(run / "local_resolution_slices.png", 7.2, 2.6) as figure:
        panels = figure.subplots(1, 3)
        for axis, (axes, plane) in enumerate(zip(panels, ("xy", "xz", "yz"), strict=True)):
            image = _central(volume.values, axis)
            extent = _draw_plane(axes, image, volume.pixel_size, np.percentile(image, (0.5, 99.8)))
            # Colour is transparent where density is low, so that the shape of the map stays readable.
            floor, ceiling = np.percentile(image, (50, 99))
            opacity = np.clip((image - floor) / max(float(ceiling - floor), 1e-30), 0.25, 0.85)
            layer = np.ma.masked_invalid(_central(shown, axis))
            opacity = np.where(layer.mask, 0, opacity)
            axes.imshow(layer, cmap=LOCAL_COLOURS, vmin=low, vmax=high, origin="lower", extent=extent, alpha=opacity)
            axes.set_title(f"{plane} slice", size=10)
        figure.colorbar(_scale(low, high), ax=panels, shrink=0.9, label="local resolution (Å)")
    return run / "local_resolution_slices.png"


def draw_directions(run: Path) -> Path:
    """Draw correlation, resolution, sampling and views by direction; return ``directions.png``.

    Raises:
        InputError: ``directions.csv`` is missing, cannot be read or is no grid.
        OutputError: the figure cannot be written.
    """
    found = read.read_directions(run)
    shown = direction_maps(found)
    with _figure(run / "directions.png", 7.2, 2.2 * ((len(shown) + 1) // 2)) as figure:
        panels = figure.subplots((len(shown) + 1) // 2, 2).flat
        for axes, (title, values, colours) in zip(panels, shown, strict=True):
            drawn = axes.pcolormesh(found.azimuth, found.elevation, values, cmap=colours.lower(), rasterized=True)
            figure.colorbar(drawn, ax=axes)
            axes.set(xlabel="azimuth (°)", ylabel="elevation (°)")
            axes.set_title(title, size=10)
            axes.invert_yaxis()
    return run / "directions.png"


def draw_residual(run: Path) -> Path:
    """Draw the power of the residuals relative to the noise model; return ``residual.png``.

    Raises:
        InputError: ``residual.csv`` is missing, cannot be read or has no rows.
        OutputError: the figure cannot be written.
    """
    frequency, ratios = residual_ratios(run)
    with _figure(run / "residual.png", 5.6, 3.4) as figure:
        axes = figure.add_subplot()
        axes.axhline(1, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)))
        for (name, ratio), (color, dashes) in zip(ratios.items(), LINES, strict=False):
            axes.plot(frequency, ratio, color=color, linestyle=dashes, label=name)
        axes.set(xlabel="spatial frequency (1/Å), spacing (Å)", ylabel="residual power / noise power")
        axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}\n{1 / k:.3g} Å" if k > 0 else f"{k:g}")
        axes.legend(fontsize=9)
    return run / "residual.png"


def draw_gaussians(run: Path) -> Path:
    """Draw the distributions of widths and anisotropies of the Gaussians; return ``gaussians.png``.

    Raises:
        InputError: ``run_class001.ply`` is missing or damaged.
        OutputError: the figure cannot be written.
    """
    import numpy as np

    widths = read.read_widths(run)
    with _figure(run / "gaussians.png", 7.2, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        edges = shared_bins([widths.sigma.ravel()])
        for name, values, (color, dashes) in zip(AXES, widths.sigma.T, LINES, strict=False):
            left.stairs(np.histogram(values, edges)[0], edges, color=color, linestyle=dashes, label=name, linewidth=1.5)
        left.set(xlabel="standard deviation σ (Å)", ylabel="Gaussians")
        left.legend(fontsize=9)
        edges = shared_bins([widths.anisotropy])
        right.stairs(np.histogram(widths.anisotropy, edges)[0], edges, color=LINES[0][0], fill=True, alpha=0.6)
        right.set(xlabel="anisotropy, largest / smallest σ")
    return run / "gaussians.png"


# What both kinds of figures show

AXES = ("smallest axis", "middle axis", "largest axis")


def in_order(curves: dict[str, list[float]]) -> list[str]:
    """The columns of fsc.star, known ones first."""
    known = [name for name in CURVE_NAMES if name in curves]
    return known + [name for name in curves if name not in CURVE_NAMES]


def reading(name: str, frequency: Sequence[float], values: Sequence[float]) -> str:
    """The resolution of a curve by the rule that its number in the headline follows."""
    match name:
        case "emsplatCrossValidated":
            return f"{spacing(read.crossing(frequency, values, 0.5))} at 0.5, interpolated"
        case "emsplatCryodrgnMaskedMaps":
            return f"{spacing(read.last_crossing(frequency, values, 0.143))} at 0.143, cryoDRGN's rule"
        case _:
            return ", ".join(f"{spacing(read.resolution(frequency, values, t))} at {t}" for t in (0.143, 0.5))


def spacing(value: object) -> str:
    """A resolution in Å; None and NaN are curves that never reach the threshold."""
    match value:
        case bool():
            return str(value)
        case float() | int() if math.isfinite(value):
            return f"{value:.2f} Å"
        case None | float():
            return "not reached"
        case _:
            return str(value)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean over the last ``width`` values at each place; fewer at the start."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def local_resolutions(run: Path) -> dict[str, NDArray[np.float32]]:
    """Local resolutions in Å inside the mask, of the map that the headline uses and, if there, of the half maps."""
    import numpy as np

    shape = read.read_volume(run / read.LOCAL_RESOLUTION).values.shape
    mask = read.read_mask(run, shape)
    names = {"local resolution": read.LOCAL_RESOLUTION}
    if (run / read.LOCAL_RESOLUTION_HALF_MAPS).exists():
        names = {
            "cross-validated": read.LOCAL_RESOLUTION,
            "half maps of the Gaussians": read.LOCAL_RESOLUTION_HALF_MAPS,
        }
    maps = {label: read.read_local_resolution(run, shape, name) for label, name in names.items()}
    found = {label: values[np.isfinite(values) & (True if mask is None else mask)] for label, values in maps.items()}
    if not all(len(values) for values in found.values()):
        raise InputError(
            f"{run / read.LOCAL_RESOLUTION}: no resolution inside {read.MASK}; expected Å there; "
            "run the reconstruction again"
        )
    return found


def resolution_range(local: NDArray[np.float32]) -> tuple[float, float]:
    """The colour scale of a local resolution: its 5th and 95th percentile in Å, at least 0.1 Å apart."""
    import numpy as np

    known = local[np.isfinite(local)]
    low, high = np.percentile(known, (5, 95)) if known.size else (0.0, 1.0)
    return float(low), float(max(high, low + 0.1))


def shared_bins(samples: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Edges of 50 equal bins between the 0.1st and the 99.9th percentile of all samples."""
    import numpy as np

    low, high = np.percentile(np.concatenate(samples), (0.1, 99.9))
    return np.linspace(low, max(high, low * 1.01 + 1e-6), 51)


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
        "model of the own half / noise": table["own"] / noise,
        "model of the other half (held out) / noise": table["other"] / noise,
    }


def direction_maps(found: read.Directions) -> list[tuple[str, NDArray[np.float64], str]]:
    """Title, values and colour scale of each map over the sphere."""
    always = [
        ("Fourier slice correlation", found.fslc, "Viridis"),
        ("conical resolution (Å)", found.conical_resolution, "Viridis_r"),
    ]
    if found.sampling is None or found.density is None:
        return always
    return [
        *always,
        ("sampling, uniform = 1", found.sampling, "Viridis"),
        ("views, uniform = 1", found.density, "Magma"),
    ]


# Drawing


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of width × height inches, saved to ``path`` and as SVG beside it at the end."""
    load_matplotlib()
    from matplotlib import style
    from matplotlib.figure import Figure

    # Whatever a matplotlibrc or the notebook around has set; it is theirs again afterwards. No pyplot: a figure of its
    # own asks for no back end.
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160)
        figure.set_layout_engine("none")  # the layout is found; finding it again takes most of the time
        with replacing(path.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, format="svg", dpi=160, metadata={"Date": None})


def load_matplotlib() -> None:
    """Imports matplotlib also where MPLBACKEND names a back end that is not installed here (a notebook's)."""
    if "matplotlib" in sys.modules:
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


def _central(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
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

    return ScalarMappable(Normalize(low, high), LOCAL_COLOURS)


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
