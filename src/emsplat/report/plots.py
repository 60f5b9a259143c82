"""Interactive figures of a run folder: each ``plot_*`` returns a Plotly figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emsplat.report import read
from emsplat.report.figures import (
    AXES,
    FITS,
    LINE_WIDTH,
    LINES,
    LOCAL_COLOURS,
    POSE_CELLS,
    DirectionMap,
    FscCurve,
    FscPanel,
    direction_maps,
    fsc_panels,
    histogram,
    local_resolutions,
    pose_histograms,
    pose_maps,
    residual_range,
    residual_ratios,
    running_mean,
    shared_bins,
)
from emsplat.report.surface import UNIT, Surface
from emsplat.run.files import NULL_RUN

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_POINTS = 1500  # per curve; more cannot be seen and only makes the page larger
_GRID = "#e8ebef"


def plot_surface(surface: Surface, colours: tuple[float, float] | None) -> Any:
    """Isosurfaces with a slider of the level; ``colours`` is the range of the local resolution in Å."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, mesh in enumerate(surface.meshes):
        x, y, z = mesh.vertices.T.copy()
        a, b, c = mesh.triangles.T.copy()
        paint: dict[str, Any] = {"color": "#7fa8c9", "hoverinfo": "skip"}
        if mesh.resolution is not None:
            paint = {
                "intensity": mesh.resolution,
                "coloraxis": "coloraxis",
                "hovertemplate": "%{intensity:.2f} Å<extra></extra>",
            }
        figure.add_trace(
            go.Mesh3d(
                x=x,
                y=y,
                z=z,
                i=a,
                j=b,
                k=c,
                visible=i == surface.default,
                lighting={"ambient": 0.45, "diffuse": 0.7, "specular": 0.15, "roughness": 0.6, "fresnel": 0.1},
                # Relative to the camera, z away from the viewer: a light on his side, or nothing would be shaded.
                lightposition={"x": -60000, "y": 60000, "z": -80000},
                **paint,
            )
        )
    steps = [
        {
            "label": f"{mesh.level:g}",
            "method": "restyle",
            "args": [{"visible": [other == i for other in range(len(surface.meshes))]}],
        }
        for i, mesh in enumerate(surface.meshes)
    ]
    figure.update_layout(
        _layout(620),
        margin={"l": 0, "r": 0, "t": 8, "b": 8},
        sliders=[
            {
                "active": surface.default,
                "steps": steps,
                "currentvalue": {"prefix": "level: ", "suffix": " σ of the map"},
                "pad": {"t": 6, "b": 4, "l": 14, "r": 14},
            }
        ],
        scene={
            "aspectmode": "data",
            "dragmode": "orbit",
            "camera": {"eye": {"x": 0.8, "y": -0.8, "z": 0.5}, "projection": {"type": "orthographic"}},
            **{f"{axis}axis": _scene_axis(axis, surface, column) for column, axis in enumerate("xyz")},
        },
    )
    if colours:
        low, high = colours
        figure.update_layout(
            coloraxis={
                "colorscale": [[i / (len(LOCAL_COLOURS) - 1), colour] for i, colour in enumerate(LOCAL_COLOURS)],
                "cmin": low,
                "cmax": high,
                "colorbar": {"title": {"text": "Å", "side": "top"}, "thickness": 14, "len": 0.7},
            }
        )
    return figure


def _scene_axis(name: str, surface: Surface, column: int) -> dict[str, Any]:
    """An axis in Å from the box centre, although the vertices are whole numbers of a smaller unit."""
    largest = max(int(abs(mesh.vertices[:, column].astype(int)).max()) for mesh in surface.meshes) * UNIT
    step = _round_step(largest / 2)
    ticks = [i * step for i in range(-int(largest / step), int(largest / step) + 1)]
    return {
        "title": {"text": f"{name} (Å)", "font": {"size": 11}},
        "tickvals": [tick / UNIT for tick in ticks],
        "ticktext": [f"{tick:g}" for tick in ticks],
        "tickfont": {"size": 10, "color": "#7b838d"},
        "showbackground": False,
        "gridcolor": _GRID,
        "zeroline": False,
        "showspikes": False,
    }


def plot_fsc(run: Path) -> list[Any]:
    """The curves of ``fsc.star``, a figure for each panel of `fsc_panels`."""
    return _plot_fsc_panels(fsc_panels(run))


def _plot_fsc_panels(panels: Sequence[FscPanel]) -> list[Any]:
    entries = max(len(panel.curves) for panel in panels)
    return [_plot_fsc_panel(panel, entries) for panel in panels]


def _plot_fsc_panel(panel: FscPanel, entries: int) -> Any:
    """The margin below has room for so many ``entries`` of the legend, that panels side by side are of one height."""
    import plotly.graph_objects as go

    spacings = [1 / k if k > 0 else math.inf for k in panel.frequency]
    figure = go.Figure()
    if panel.band:
        low, high = panel.band
        known = [i for i in range(len(panel.frequency)) if math.isfinite(low[i]) and math.isfinite(high[i])]
        outline = [*known, *reversed(known)]
        figure.add_trace(
            go.Scatter(
                x=[panel.frequency[i] for i in outline],
                y=[high[i] for i in known] + [low[i] for i in reversed(known)],
                fill="toself",
                fillcolor="rgba(0, 114, 178, 0.18)",
                line={"width": 0},
                mode="lines",
                name="its 95 % band",
                hoverinfo="skip",
                showlegend=False,
            )
        )
    for curve in panel.curves:
        figure.add_trace(
            go.Scatter(
                x=panel.frequency,
                y=curve.values,
                customdata=spacings,
                mode="lines",
                name=escape(curve.label),
                line=_line(curve.place),
                hovertemplate="%{y:.3f} at %{customdata:.2f} Å",
                visible="legendonly" if curve.hidden else True,
            )
        )
    figure.add_hline(
        panel.threshold,
        line={"color": "#555555", "width": 1, "dash": "dash"},
        annotation_text=panel.threshold,
        annotation_position="top left",
    )
    # One name under the other: side by side they are cut off on a narrow page.
    legend = _BELOW | {"orientation": "v"}
    room = 80 + 20 * entries
    figure.update_layout(_layout(360 + room), hovermode="x unified", legend=legend, margin_t=34, margin_b=room)
    figure.update_layout(title={"text": panel.title, "font": {"size": 14}, "x": 0.02})
    figure.update_xaxes(_frequency_axis(panel.frequency[-1], 5))
    figure.update_yaxes(title=panel.quantity, range=[panel.lowest, 1.04])
    return figure


def plot_null_curves(run: Path, names: Sequence[str]) -> list[Any]:
    """The cross-validated curve and that of the half maps of each null test, a figure for each."""
    tests = {name: read.read_fsc(run / name / NULL_RUN) for name in names}
    panels = []
    for column, title, quantity, threshold in (
        ("cross_validated", "cross-validated", "correlation with the truth (FSC)", 0.5),
        ("corrected", "half maps, masked and corrected", "FSC between half maps", 0.143),
    ):
        shown = [
            FscCurve(name, curves[column].value[1:].tolist(), place)
            for place, (name, curves) in enumerate(tests.items())
            if column in curves
        ]
        if shown:
            frequency = next(iter(tests.values())).frequency[1:].tolist()
            panels.append(FscPanel(title, quantity, threshold, frequency, shown))
    return _plot_fsc_panels(panels) if panels else []


def plot_local_resolution(run: Path) -> Any:
    """The distribution of the local resolution inside the mask."""
    found = local_resolutions(run)
    return _histogram(found, shared_bins(list(found.values())), "local resolution (Å)", "voxels inside the mask (%)")


def plot_directions(run: Path) -> list[Any]:
    """Correlation, resolution, sampling and views by direction, a figure for each."""
    found = read.read_directions(run)
    rot, tilt = (values.astype("float32") for values in (found.rot, found.tilt))
    return [_heatmap(one, rot, tilt) for one in direction_maps(found)]


def _heatmap(one: DirectionMap, rot: Any, tilt: Any) -> Any:
    """A map over directions, in degrees."""
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Heatmap(
            x=rot,
            y=tilt,
            z=one.values.astype("float32"),
            zmin=one.range[0],
            zmax=one.range[1],
            colorscale=one.colours,
            colorbar={"thickness": 12},
            hovertemplate="rot %{x:g}°, tilt %{y:g}°: %{z:.3g}<extra></extra>",
        )
    )
    figure.update_layout(_layout(300), margin_t=34, title={"text": one.title, "font": {"size": 14}, "x": 0.02})
    figure.update_xaxes(title="rot (°)", dtick=90, ticks="outside")
    figure.update_yaxes(title="tilt (°)", dtick=45, autorange="reversed", ticks="outside")
    return figure


def plot_poses(run: Path) -> list[Any]:
    """How far poses moved, and orientations before and after, a figure for each."""
    found = read.read_poses(run)
    moved = [
        _histogram(samples, shared_bins(list(samples.values())), label, "particles (%)")
        for label, samples in pose_histograms(found).items()
    ]
    rot, tilt = POSE_CELLS
    return moved + [_heatmap(one, rot, tilt) for one in pose_maps(found)]


def plot_residual(run: Path) -> Any:
    """Power of the residuals relative to the noise model."""
    import plotly.graph_objects as go

    frequency, ratios = residual_ratios(run)
    figure = go.Figure(
        [
            go.Scatter(x=frequency, y=ratio, mode="lines", name=name, line=_line(i), hovertemplate="%{y:.4f}")
            for i, (name, ratio) in enumerate(ratios.items())
        ]
    )
    figure.add_hline(1, line={"color": "#555555", "width": 1, "dash": "dash"})
    figure.update_layout(_layout(380), hovermode="x unified")
    figure.update_xaxes(_frequency_axis(float(max(frequency))))
    figure.update_yaxes(title="residual power / noise power", range=residual_range(ratios))
    return figure


def plot_convergence(run: Path) -> Any:
    """Running means of the loss of every fit."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (name, (steps, losses)) in enumerate(read.read_convergence(run).items()):
        smooth = running_mean(losses, max(1, len(losses) // 40))
        figure.add_trace(
            go.Scatter(
                x=_thinned(steps),
                y=_thinned(smooth),
                mode="lines",
                name=escape(FITS.get(name, name)),
                line=_line(i),
                hovertemplate="%{y:.6g}",
            )
        )
    figure.update_layout(_layout(380), hovermode="x unified")
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, running mean")
    return figure


def plot_scores(run: Path) -> Any:
    """The cross-validated score after each epoch, stages one after another."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (name, rows) in enumerate(read.read_scores(run).items()):
        figure.add_trace(
            go.Scatter(
                x=_thinned(range(1, len(rows) + 1)),
                y=_thinned([score for _, _, score in rows]),
                customdata=_thinned([[epoch, gaussians] for epoch, gaussians, _ in rows]),
                mode="lines+markers",
                name=escape(name),
                line=_line(i),
                hovertemplate="%{y:.5f}, epoch %{customdata[0]:g} with %{customdata[1]:,} Gaussians",
            )
        )
    figure.update_layout(_layout(360), hovermode="x unified", showlegend=len(figure.data) > 1)
    figure.update_xaxes(title="epoch, through all stages")
    figure.update_yaxes(title="mean cross-validated FSC")
    return figure


def plot_gaussians(run: Path) -> list[Any]:
    """Distributions of the standard deviations and of the anisotropy of the Gaussians."""
    widths = read.read_widths(run)
    sigma = dict(zip(AXES, widths.sigma.T, strict=True))
    shape = {"anisotropy": widths.anisotropy}
    return [
        _histogram(sigma, shared_bins([widths.sigma.ravel()]), "standard deviation σ (Å)", "Gaussians (%)"),
        _histogram(shape, shared_bins([widths.anisotropy]), "anisotropy, largest / smallest σ", "Gaussians (%)"),
    ]


def plot_gains(values: Sequence[tuple[float, float, float]], title: str) -> Any:
    """Gains on the other half with their standard errors, against a number of components or points."""
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Scatter(
            x=[number for number, _, _ in values],
            y=[gain for _, gain, _ in values],
            error_y={"type": "data", "array": [error for _, _, error in values], "thickness": 1.2, "width": 3},
            mode="lines+markers",
            line=_line(0),
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
        )
    )
    figure.add_hline(0, line={"color": "#555555", "width": 1, "dash": "dash"})
    figure.update_layout(_layout(320), margin_t=44, title={"text": title, "font": {"size": 14}, "x": 0.02})
    figure.update_xaxes(title="number", dtick=1 if len(values) < 8 else None)
    figure.update_yaxes(title="gain (nats per image)")
    return figure


def plot_populations(states: Sequence[tuple[int, float, float, float, float, float]]) -> Any:
    """Share of each state with its 95 % interval, and those of the half-sets."""
    import plotly.graph_objects as go

    number, value, low, high, one, other = (list(column) for column in zip(*states, strict=True))
    figure = go.Figure(
        go.Bar(
            x=number,
            y=[100 * share for share in value],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [100 * (b - a) for a, b in zip(value, high, strict=True)],
                "arrayminus": [100 * (a - b) for a, b in zip(value, low, strict=True)],
            },
            marker={"color": LINES[0][0]},
            opacity=0.6,
            name="all particles, 95 % interval",
            hovertemplate="%{y:.1f} %",
        )
    )
    for place, (name, shares) in enumerate((("half-set 1", one), ("half-set 2", other)), 1):
        figure.add_trace(
            go.Scatter(
                x=number,
                y=[100 * share for share in shares],
                mode="markers",
                name=name,
                marker={"color": LINES[place][0], "size": 8, "symbol": "diamond-open"},
                hovertemplate="%{y:.1f} %",
            )
        )
    figure.update_layout(_layout(340))
    figure.update_xaxes(title="state", dtick=1 if len(number) < 25 else None)
    figure.update_yaxes(title="particles (%)", rangemode="tozero")
    return figure


def plot_landscape(found: dict[str, NDArray[np.float64]]) -> Any:
    """Free energy over the first two components; empty where too few images are."""
    import numpy as np
    import plotly.graph_objects as go

    across, up = np.unique(found["z1"]), np.unique(found["z2"])
    table, error = (found[name].reshape(len(across), len(up)).T for name in ("free_energy", "error"))
    figure = go.Figure(
        go.Heatmap(
            x=across,
            y=up,
            z=table,
            customdata=error,
            colorscale="Viridis_r",
            colorbar={"title": {"text": "kT"}, "thickness": 14},
            hovertemplate="z1 %{x:.2f}, z2 %{y:.2f}: %{z:.2f} ± %{customdata:.2f} kT<extra></extra>",
        )
    )
    figure.add_trace(
        go.Contour(
            x=across,
            y=up,
            z=table,
            contours={"start": 0, "end": 12, "size": 1, "coloring": "none"},
            line={"color": "#ffffff", "width": 0.7},
            showscale=False,
            hoverinfo="skip",
        )
    )
    figure.update_layout(_layout(460), margin_t=20)
    known = np.isfinite(table)
    figure.update_xaxes(title="z1", range=_around(across[known.any(0)]), constrain="domain")
    figure.update_yaxes(title="z2", range=_around(up[known.any(1)]), scaleanchor="x", constrain="domain")
    return figure


def _around(places: Sequence[float] | NDArray[np.float64]) -> list[float] | None:
    """The ends of an axis that shows some places."""
    if not len(places):
        return None
    low, high = float(min(places)), float(max(places))
    edge = 0.08 * (high - low) + 1e-6
    return [low - edge, high + edge]


def plot_free_energy(name: str, found: dict[str, list[float]]) -> Any:
    """Free energy along a component with a band of two standard errors, and that of each half-set."""
    import plotly.graph_objects as go

    place, value, error = found["place"], found["free_energy"], found["error"]
    known = [i for i, own in enumerate(value) if math.isfinite(own)]
    outline = [*known, *reversed(known)]
    figure = go.Figure(
        go.Scatter(
            x=[place[i] for i in outline],
            y=[value[i] + 2 * error[i] for i in known] + [value[i] - 2 * error[i] for i in reversed(known)],
            fill="toself",
            fillcolor="rgba(0, 114, 178, 0.18)",
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for i, (column, label) in enumerate((("free_energy", "both"), ("half1", "half-set 1"), ("half2", "half-set 2"))):
        figure.add_trace(
            go.Scatter(x=place, y=found[column], mode="lines", name=label, line=_line(i), hovertemplate="%{y:.2f} kT")
        )
    figure.update_layout(_layout(320), hovermode="x unified")
    figure.update_xaxes(title=escape(name), range=_around([place[i] for i in known]))
    figure.update_yaxes(title="-ln p (kT)")
    return figure


def _histogram(samples: dict[str, NDArray[Any]], edges: NDArray[np.float64], x: str, y: str) -> Any:
    """Overlaid histograms, counted here so that the page holds no samples."""
    import plotly.graph_objects as go

    middles, width = (edges[:-1] + edges[1:]) / 2, float(edges[1] - edges[0])
    figure = go.Figure(
        [
            go.Bar(
                x=middles,
                y=[100 * share for share in histogram(values, edges)],
                width=width,
                name=name,
                marker={"color": LINES[i][0], "line": {"width": 0}},
                opacity=0.55 if len(samples) > 1 else 0.8,
                hovertemplate=f"%{{x:.3g}} ± {width / 2:.2g}: %{{y:.2f}} %",
            )
            for i, (name, values) in enumerate(samples.items())
        ]
    )
    figure.update_layout(_layout(340), barmode="overlay", bargap=0, showlegend=len(samples) > 1)
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return figure


_BELOW = {"yanchor": "top", "y": -0.2}


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "none",
        "height": height,
        "autosize": True,
        "font": {"family": 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', "size": 13, "color": "#1b1f24"},
        "margin": {"l": 60, "r": 16, "t": 56, "b": 60},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"},
        "xaxis": {"gridcolor": _GRID, "zeroline": False, "automargin": True},
        "yaxis": {"gridcolor": _GRID, "zeroline": False, "automargin": True},
    }


def _line(place: int) -> dict[str, Any]:
    """The colour and dashes that the figures for papers have too."""
    color, dashes = LINES[place % len(LINES)]
    dash = ",".join(f"{length * LINE_WIDTH:g}px" for length in dashes) or "solid"
    return {"color": color, "dash": dash, "width": LINE_WIDTH}


def _frequency_axis(last: float, ticks: int = 9) -> dict[str, Any]:
    """About so many ticks at round frequencies, labelled with the spacing as well."""
    step = _round_step(max(last, 1e-6) / ticks)
    places = [i * step for i in range(int(last / step + 1e-6) + 1)]
    return {
        "title": {"text": "spatial frequency (1/Å), spacing (Å)"},
        "range": [0, last],
        "tickvals": places,
        "ticktext": [f"{k:.4g}<br>{1 / k:.3g} Å" if k > 0 else "0" for k in places],
        "hoverformat": ".4f",
    }


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 × 10^n that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _thinned(values: Sequence[Any]) -> list[Any]:
    """Every n-th value and the last one, so that few enough are left."""
    stride = math.ceil(len(values) / _POINTS) or 1
    return [*values[: len(values) - 1 : stride], *values[-1:]]
