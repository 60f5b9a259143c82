"""Figures and one HTML page from a run folder alone, without torch.

Each ``draw_*`` writes one PNG into the run folder. `write_report` draws them all and writes ``report.html``:
one file with everything inside, no scripts, no network. What is missing from the folder is named in the page.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

from emsplat.errors import InputError
from emsplat.io.files import replacing

FULL_MAP = "run_class001.mrc"

# Okabe & Ito's colours stay apart for colour-blind readers; the dashes keep the lines apart in grey.
_LINES: Sequence[tuple[str, Any]] = (
    ("#0072B2", "-"),
    ("#D55E00", (0, (6, 1.5))),
    ("#009E73", (0, (3, 1, 1, 1))),
    ("#CC79A7", (0, (2, 1))),
    ("#E69F00", (0, (1, 1))),
)
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

_ABSCISSAE = ("rlnSpectralIndex", "rlnResolution", "rlnAngstromResolution")
_CURVE_NAMES = {
    "rlnFourierShellCorrelationUnmaskedMaps": "half maps, unmasked",
    "rlnFourierShellCorrelationMaskedMaps": "half maps, masked",
    "rlnFourierShellCorrelationCorrected": "half maps, masked and corrected",
    "emsplatCrossValidated": "cross-validated (models against unseen data)",
    "emsplatBackprojectionMasked": "classical half maps, masked",
    "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": "half maps, phases randomised, masked",
}

# Part of a key under "resolution" in summary.json, what the number is, what it means; the first match counts.
_MEANINGS = (
    (
        "cross",
        "Cross-validated",
        "The Gaussians of one half against the plain back-projection of the other half, whose noise they "
        "have never seen: an estimate of the correlation with the truth. This is the number to quote.",
    ),
    (
        "backproj",
        "Back-projections",
        "Agreement of the plain back-projections of the two halves, which no prior has touched.",
    ),
    (
        "half_map",
        "Half maps of the Gaussians",
        "Agreement of the Gaussians fitted to each half. It overestimates: use it to compare runs, "
        "not to claim a resolution.",
    ),
    ("truth", "Against the truth", "Agreement with the map that the images were simulated from."),
)
_CAUTION = (
    "The half-map FSC of a Gaussian model overestimates its resolution. Both halves are fitted with the same "
    "kind of compact, smooth Gaussians, so the two maps agree in what the model imposes and not only in what "
    "the images show. Expect the true resolution to be worse than the half-map numbers, and look at the "
    "map before you believe them. The model of one half against the plain back-projection of the other "
    "lacks this bias."
)

# What the files of a run folder are; the first pattern that matches counts.
_FILES = (
    (
        "run_half[12]_class*_unfil.mrc",
        "half map: the Gaussians of one half-set; no mask, filter or sharpening",
    ),
    ("run_class*.mrc", "full map: the Gaussians fitted to all particles"),
    ("run_data.star", "the particles as used, with their half-sets (RELION)"),
    ("*mask*.mrc", "mask"),
    ("*.mrc", "map"),
    ("fsc.star", "Fourier shell correlation of the half maps, in RELION's columns"),
    ("*fsc*.xml", "Fourier shell correlation for deposition in EMDB"),
    ("*.star", "table in RELION's format"),
    ("summary.json", "the numbers on this page"),
    ("config.toml", "the settings of the run"),
    ("convergence.csv", "loss at each step of each fit"),
    ("fsc.png", "figure: Fourier shell correlation"),
    ("slices.png", "figure: central slices and projections"),
    ("convergence.png", "figure: convergence of the fits"),
    ("*.safetensors", "Gaussians: means, covariances, amplitudes"),
    ("*.ply", "Gaussians for splat viewers"),
    ("*.log", "log of the run"),
    ("report.html", "this page"),
)


def draw_fsc(run: Path) -> Path:
    """Draw the curves of ``fsc.star`` with the thresholds 0.143 and 0.5, return ``fsc.png``.

    The legend gives resolutions by RELION's rule: the last shell before the first drop below the threshold.

    Raises:
        InputError: ``fsc.star`` is missing, cannot be read or has no curve.
        OutputError: the figure cannot be written.
    """
    frequency, curves = _read_fsc(run)
    with _figure(run / "fsc.png", 6.6, 4.8) as figure:
        axes = figure.add_subplot()
        axes.axhline(0, color="#999999", linewidth=0.6)
        for threshold in (0.143, 0.5):
            axes.axhline(threshold, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)))
            axes.text(1.01, threshold, f"{threshold}", transform=axes.get_yaxis_transform(), va="center")
        for i, (name, values) in enumerate(curves.items()):
            color, dashes = _LINES[i % len(_LINES)]
            ends = (f"{_spacing(_resolution(frequency, values, t))} at {t}" for t in (0.143, 0.5))
            label = f"{_CURVE_NAMES.get(name, name)}: {', '.join(ends)}"
            axes.plot(frequency[1:], values[1:], color=color, linestyle=dashes, label=label)
        low = min((v for values in curves.values() for v in values[1:] if math.isfinite(v)), default=0.0)
        axes.set(xlim=(0, frequency[-1]), ylim=(min(-0.05, 1.1 * low), 1.04))
        axes.set(ylabel="Fourier shell correlation", xlabel="spatial frequency (1/Å), spacing (Å)")
        axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}\n{1 / k:.3g} Å" if k > 0 else "0")
        figure.legend(loc="outside lower center", fontsize=9)
    return run / "fsc.png"


def draw_slices(run: Path) -> Path:
    """Draw central slices and projections of the full map along z, y and x; return ``slices.png``.

    Slices pass through the centre voxel ``size // 2``; the first named axis points right, the second up.

    Raises:
        InputError: the map is missing, is not a volume, or its header has no pixel size.
        OutputError: the figure cannot be written.
    """
    import mrcfile
    import numpy as np

    path = run / FULL_MAP
    try:
        with mrcfile.open(path) as file:
            volume, pixel_size = np.asarray(file.data, dtype=np.float32), float(file.voxel_size.x)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "an MRC volume") from error
    if volume.ndim != 3 or pixel_size <= 0:
        raise InputError(
            f"{path}: array of {volume.ndim} dimensions with pixel size {pixel_size:g} Å; "
            "expected a volume and a pixel size > 0; write the map again"
        )
    with _figure(run / "slices.png", 7.2, 5.2) as figure:
        panels = figure.subplots(2, 3)
        for row, kind in zip(panels, ("slice", "projection"), strict=True):
            for axis, (axes, plane) in enumerate(zip(row, ("xy", "xz", "yz"), strict=True)):
                image = volume.take(volume.shape[axis] // 2, axis) if kind == "slice" else volume.sum(axis)
                low, high = np.percentile(image, (0.5, 99.8))
                height, width = (n * pixel_size for n in image.shape)
                axes.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=high, extent=(0, width, 0, height))
                axes.set(xticks=[], yticks=[], title=f"{plane} {kind}")
                axes.title.set_size(10)
                _draw_scale_bar(axes, width, height)
    return run / "slices.png"


def draw_convergence(run: Path) -> Path:
    """Draw the loss of every fit and its last half enlarged; return ``convergence.png``.

    Thin lines are single steps, thick lines running means over 1/40 of a fit.

    Raises:
        InputError: ``convergence.csv`` is missing, cannot be read or has no rows.
        OutputError: the figure cannot be written.
    """
    fits = _read_convergence(run)
    with _figure(run / "convergence.png", 7.2, 3.3) as figure:
        whole, end = figure.subplots(1, 2)
        for axes, title, begin in ((whole, "whole fit", 0.0), (end, "last half, enlarged", 0.5)):
            for i, (name, (steps, losses)) in enumerate(fits.items()):
                color, dashes = _LINES[i % len(_LINES)]
                first = int(begin * len(steps))
                smooth = _running_mean(losses, max(1, len(losses) // 40))
                axes.plot(steps[first:], losses[first:], color=color, linewidth=0.6, alpha=0.35)
                label = name if axes is whole else None
                axes.plot(steps[first:], smooth[first:], color=color, linestyle=dashes, label=label)
            axes.set(xlabel="step", title=title)
            axes.title.set_size(10)
        whole.set(ylabel="loss")
        figure.legend(loc="outside lower center", ncols=min(4, len(fits)), fontsize=9)
    return run / "convergence.png"


def write_report(run: Path) -> Path:
    """Draw the figures of a run folder and write ``report.html``; return its path.

    A missing or damaged part of the folder is named in the page, whose other parts are written all the same.

    Raises:
        InputError: ``run`` is not a folder.
        OutputError: the page or a figure cannot be written.
    """
    if not run.is_dir():
        raise InputError(f"{run}: not a folder; expected the run folder of `emsplat reconstruct`; check the path")
    sections = [
        ("Resolution", _part(lambda: _headline(run))),
        ("Map", _part(lambda: _picture(draw_slices(run), "Central slices and projections of the full map"))),
        (
            "Fourier shell correlation",
            _part(lambda: _picture(draw_fsc(run), "FSC against spatial frequency")),
        ),
        ("Convergence", _part(lambda: _picture(draw_convergence(run), "Loss against step"))),
        ("Inputs and settings", _part(lambda: _numbers(run)) + _part(lambda: _config(run))),
    ]
    target = run / "report.html"
    # Listed last and with the page itself, so that the list shows what the reader finds.
    sections.append(("Files", _file_table({*(f.name for f in run.iterdir() if f.is_file()), target.name})))
    name = html.escape(run.resolve().name)
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections)
    with replacing(target) as temporary:
        temporary.write_text(_PAGE.format(style=_CSS, name=name, body=body), encoding="utf-8")
    return target


# Reading


def _read_fsc(run: Path) -> tuple[list[float], dict[str, list[float]]]:
    """Frequencies in 1/Å and the named curves of ``fsc.star``."""
    from gemmi import cif

    path = run / "fsc.star"
    try:
        block = cif.read(str(path)).find_block("fsc")
        loops = [item.loop for item in block or () if item.loop is not None]
        columns = {
            tag.removeprefix("_"): [cif.as_number(value) for value in block.find_loop(tag)]
            for loop in loops
            for tag in loop.tags
        }
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error, "a STAR file") from error
    curves = {name: values for name, values in columns.items() if name not in _ABSCISSAE}
    frequency = columns.get("rlnResolution", [])
    if not curves or len(frequency) < 2:
        raise InputError(
            f"{path}: no FSC curve; expected data_fsc with rlnResolution and "
            "rlnFourierShellCorrelationUnmaskedMaps; run the reconstruction again"
        )
    return frequency, curves


def _read_convergence(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and losses of each fit, in the order of the file."""
    path = run / "convergence.csv"
    fits: dict[str, tuple[list[float], list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                steps, losses = fits.setdefault(row["fit"], ([], []))
                step, loss = float(row["step"]), float(row["loss"])
                steps.append(step)
                losses.append(loss)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise _unreadable(path, error, "a CSV table with columns fit, step and loss") from error
    if not fits:
        raise InputError(f"{path}: no rows; expected one per step of a fit; did the fits run?")
    return fits


def _read_summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "a JSON object") from error
    if not isinstance(summary, dict):
        raise InputError(f"{path}: {type(summary).__name__}; expected a JSON object; run the reconstruction again")
    return summary


def _unreadable(path: Path, error: Exception, expected: str) -> InputError:
    reason = "missing" if not path.exists() else f"cannot be read ({' '.join(str(error).split())})"
    return InputError(f"{path}: {reason}; expected {expected}; was the run interrupted or the folder changed?")


# Drawing


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of width × height inches, saved to ``path`` at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160)


def _draw_scale_bar(axes: Any, width: float, height: float) -> None:
    """A bar of a round number of Å, about a quarter of the panel, at the lower left."""
    from matplotlib.patheffects import withStroke

    length = _round_length(width / 3)
    outline = [withStroke(linewidth=2.5, foreground="black")]
    x, y = 0.05 * width, 0.06 * height
    axes.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt",
              path_effects=[withStroke(linewidth=4.5, foreground="black")])  # fmt: skip
    axes.text(x, y + 0.025 * height, f"{length:g} Å", color="white", fontsize=8, path_effects=outline)


def _round_length(limit: float) -> float:
    """The largest of 1, 2, 5 × 10^n that does not exceed ``limit``."""
    power = 10.0 ** math.floor(math.log10(limit))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= limit)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean over the last ``width`` values at each place; fewer at the start."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _resolution(frequency: Sequence[float], values: Sequence[float], threshold: float) -> float | None:
    """`emsplat.assess.fsc.resolution` without torch; a test holds the two together."""
    shells = range(1, len(values))
    shell = next((s for s in shells if not values[s] >= threshold), len(values)) - 1
    return 1 / frequency[shell] if shell > 0 else None


# HTML


def _part(write: Callable[[], str]) -> str:
    """What ``write`` returns, or a note that names what is missing."""
    try:
        return write()
    except InputError as error:
        return f'<p class="missing">Not shown. {html.escape(str(error))}</p>\n'


def _picture(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">\n'


def _headline(run: Path) -> str:
    """A card for each curve that a resolution was read from, the caution, and the warnings of the run."""
    summary = _read_summary(run)
    found = summary.get("resolution")
    curves: dict[str, dict[str, object]] = {}
    for key, value in (found if isinstance(found, dict) else {}).items():
        match = re.fullmatch(r"(.+)_(0\.\d+)", key)
        curve, threshold = match.groups() if match else (key, "")
        curves.setdefault(curve, {})[threshold] = value
    nyquist = _nyquist(run)
    cards = "".join(_card(curve, curves[curve], nyquist) for curve in sorted(curves, key=_rank))
    if not cards:
        cards = '<p class="missing">Not shown. summary.json has no "resolution".</p>'
    warnings = summary.get("warnings") or []
    texts = [_text(w) for w in (warnings if isinstance(warnings, list) else [warnings])]
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return (
        f'<div class="cards">{cards}</div>\n<p class="caution">{html.escape(_CAUTION)}</p>\n'
        + f'<div class="warnings"><h3>Warnings</h3><ul>{items}</ul></div>\n' * bool(items)
    )


def _rank(key: str) -> int:
    """Place in `_MEANINGS` of the kind of resolution that ``key`` names."""
    return next((i for i, (part, _, _) in enumerate(_MEANINGS) if part in key), len(_MEANINGS))


def _card(key: str, values: Mapping[str, object], nyquist: float | None) -> str:
    """The resolutions of one curve by threshold ("" where the key names none), the first of them in large."""
    name, meaning = key.replace("_", " "), ""
    if _rank(key) < len(_MEANINGS):
        _, name, meaning = _MEANINGS[_rank(key)]
    (first, headline), *others = sorted(values.items())
    words = [word for word in key.split("_") if word in ("unmasked", "masked", "corrected")]
    if threshold := first or ("0.143" if "half_map" in key else ""):
        words.append(f"FSC {threshold}")
    lines = [", ".join(words) + _limit(headline, nyquist)]
    lines += [f"FSC {other}: {_spacing(value)}{_limit(value, nyquist)}" for other, value in others]
    detail = "<br>".join(html.escape(line) for line in lines)
    return (
        f'<div class="card"><div class="number">{html.escape(_spacing(headline))}</div>'
        f'<h3>{html.escape(name)}</h3><div class="detail">{detail}</div><p>{html.escape(meaning)}</p></div>'
    )


def _limit(value: object, nyquist: float | None) -> str:
    """A note where a resolution is the finest that the pixels allow, and so says nothing about the data."""
    at_limit = nyquist and isinstance(value, int | float) and math.isclose(value, nyquist, rel_tol=0.01)
    return " (the limit set by the pixel size)" if at_limit else ""


def _nyquist(run: Path) -> float | None:
    """Spacing of the last shell in Å, where ``fsc.star`` gives it."""
    try:
        return 1 / _read_fsc(run)[0][-1]
    except (InputError, ZeroDivisionError):
        return None


def _numbers(run: Path) -> str:
    """Every number of summary.json that the headline does not show, a table for each of its groups."""
    summary = _read_summary(run)
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in summary.items():
        if key not in ("resolution", "warnings"):
            rows = list(_leaves(value))
            group = key if isinstance(value, dict) else "general"
            groups.setdefault(group, []).extend((name or key, text) for name, text in rows)
    return "".join(_table(group, rows) for group, rows in groups.items())


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts of the leaves of a nested mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} / {key}" if name else str(key))
    else:
        yield name, _text(value)


def _config(run: Path) -> str:
    path = run / "config.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "the settings of the run") from error
    return f"<details><summary>config.toml</summary><pre>{html.escape(text)}</pre></details>\n"


def _file_table(names: set[str]) -> str:
    rows = "".join(
        f'<tr><td><a href="{quote(name)}">{html.escape(name)}</a></td><td>{_describe(name)}</td></tr>'
        for name in sorted(names)
        if not name.startswith(".")
    )
    return f"<table>{rows}</table>\n"


def _describe(name: str) -> str:
    return next((text for pattern, text in _FILES if fnmatch(name, pattern)), "")


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(text)}</td></tr>" for name, text in rows
    )
    return f"<h3>{html.escape(title.replace('_', ' '))}</h3><table>{cells}</table>\n"


def _text(value: object) -> str:
    match value:
        case None:
            return "not given"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list():
            return ", ".join(_text(item) for item in value) or "none"
        case _:
            return str(value)


def _spacing(value: object) -> str:
    """A resolution in Å; None and NaN are curves that never reach the threshold."""
    match value:
        case float() | int() if math.isfinite(value):
            return f"{value:.2f} Å"
        case None | float():
            return "not reached"
        case _:
            return _text(value)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>emsplat: {name}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{name}</h1><p>Reconstruction with Gaussians by emsplat</p></header>
{body}
</main>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f4f6; color: #1b1f24; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
header p { margin: 0 0 1rem; color: #555d68; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .8rem; font-size: 1.2rem; }
h3 { margin: 1.1rem 0 .35rem; font-size: .95rem; }
section { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; }
section { padding: 1.1rem 1.2rem; margin: 0 0 1rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; }
.card { border-left: 4px solid #0072b2; background: #f7f9fb; border-radius: 4px; padding: .7rem .9rem; }
.card h3 { margin: .1rem 0 0; }
.card p { margin: .4rem 0 0; font-size: .88rem; color: #3d454f; }
.number { font-size: 1.6rem; font-weight: 650; line-height: 1.2; }
.detail { font-size: .85rem; color: #555d68; }
.caution, .warnings { border-left: 4px solid #d55e00; background: #fdf3ec; border-radius: 4px; }
.caution, .warnings { padding: .7rem .9rem; margin: .9rem 0 0; }
.warnings h3 { margin: 0; }
.warnings ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.missing { color: #555d68; font-style: italic; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
td, th { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid #e8ebef; }
td, th { text-align: left; vertical-align: top; }
th { width: 40%; font-weight: 400; color: #555d68; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
a { color: #005a8e; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-size: .95rem; font-weight: 650; }
pre { overflow-x: auto; background: #f7f9fb; padding: .8rem; border-radius: 4px; font-size: .82rem; }
@media print {
  body { background: #fff; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { border: 0; padding: 0; margin: 0 0 1.2rem; }
  img, .card, .caution, .warnings, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; }
}
"""
