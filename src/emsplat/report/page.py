"""The parts of the page: HTML from the numbers, figures and notes of a run folder."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from emsplat.errors import InputError
from emsplat.report import figures, plots, read, words
from emsplat.report.surface import make_surface

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_EXAMPLES = 8  # particles shown
_EXAMPLE_PIXELS = 112  # of a particle's image in the page; noise compresses badly

# Keys of summary.json that have a place of their own in the page.
_SHOWN = ("resolution", "warnings", "local_resolution", "directional", "course", "examples")


def part(write: Callable[[], str]) -> str:
    """What ``write`` returns, or a note that names what is missing."""
    try:
        return write()
    except InputError as error:
        return f'<p class="missing">Not shown. {html.escape(str(error))}</p>\n'


def headline(run: Path) -> str:
    """A card for each curve that a resolution was read from, the caution, and the warnings of the run."""
    summary = read.read_summary(run)
    found = read.group(summary, "resolution")
    curves: dict[str, dict[str, object]] = {}
    for key, value in found.items():
        if key != "cross_validated_interval":
            match = re.fullmatch(r"(.+)_(0\.\d+)", key)
            curve, threshold = match.groups() if match else (key, "")
            curves.setdefault(curve, {})[threshold] = value
    nyquist, interval = _nyquist(run), _interval(found.get("cross_validated_interval"))
    cards = "".join(
        _card(curve, curves[curve], nyquist, interval if curve == "cross_validated" else "")
        for curve in sorted(curves, key=words.rank)
    )
    if not cards:
        cards = '<p class="missing">Not shown. summary.json has no "resolution".</p>'
    warnings = summary.get("warnings") or []
    texts = [_text(w) for w in (warnings if isinstance(warnings, list) else [warnings])]
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return (
        f'<div class="cards">{cards}</div>\n'
        + f'<div class="warnings"><h3>Warnings</h3><ul>{items}</ul></div>\n' * bool(items)
        + f'<p class="caution">{html.escape(words.CAUTION)}</p>\n'
    )


def surface(run: Path) -> str:
    """The isosurface of the full map, coloured by local resolution where that is known."""
    volume = read.read_full_map(run)
    shape = volume.values.shape
    mask = read.read_mask(run, shape)
    note, colours, local = "", None, None
    try:
        local = read.read_local_resolution(run, shape)
    except InputError as error:
        note = f'<p class="missing">Not coloured by local resolution. {html.escape(str(error))}</p>\n'
    else:
        colours = figures.resolution_range(local if mask is None else local[mask])
    found = make_surface(volume, mask, local, run)
    box = "the whole box: there is no mask.mrc" if mask is None else "the box around mask.mrc"
    colour = "Colour is local resolution, blue where it is finest. " if colours else ""
    return (
        _plot(plots.plot_surface(found, colours), "Isosurface of the full map")
        + _note(
            f"Drag to turn, scroll to zoom; the slider moves the level. {colour}Reduced to voxels of "
            f"{found.voxel:.2f} Å for this page and cut to {box}; open {read.FULL_MAP} in a viewer for full detail."
        )
        + note
    )


def slices(run: Path) -> str:
    """Central slices and projections of the full map."""
    return _picture(figures.draw_slices(run), "Central slices and projections of the full map") + _saved("slices")


def local_resolution_slices(run: Path) -> str:
    """Central slices of the full map in the colours of its local resolution."""
    path = figures.draw_local_resolution_slices(run)
    return _picture(path, "Central slices coloured by local resolution") + _saved(path.stem)


def fsc(run: Path) -> str:
    """The curves of ``fsc.star``."""
    figures.draw_fsc(run)
    return (
        _plot(plots.plot_fsc(run), "FSC against spatial frequency")
        + _note(
            "Click a name to hide its curve, twice to see it alone. Each number names the threshold it was read at."
        )
        + _saved("fsc")
    )


def local_resolution(run: Path) -> str:
    """The distribution of the local resolution and its percentiles."""
    figures.draw_local_resolution(run)
    shown = _plot(plots.plot_local_resolution(run), "Distribution of the local resolution inside the mask")
    return shown + _saved("local_resolution")


def local_resolution_table(run: Path) -> str:
    """Percentiles of the local resolution from summary.json."""
    found = read.group(read.read_summary(run), "local_resolution")
    kinds = {name: read.group(found, key) for key, name in words.LOCAL_RESOLUTION_KINDS.items()}
    kinds = {name: values for name, values in kinds.items() if values}
    if not kinds:
        return _absent("local_resolution")
    rows = [
        (text, *(_angstrom(values.get(key)) for values in kinds.values())) for key, text in words.PERCENTILES.items()
    ]
    window = found.get("window")
    note = f"Within windows of {_angstrom(window)}, inside the mask." if window is not None else ""
    return _grid(("Local resolution", *kinds), rows) + _note(note) * bool(note)


def directions(run: Path) -> str:
    """Maps over the sphere of resolution, sampling and views."""
    figures.draw_directions(run)
    return (
        _pairs(plots.plot_directions(run), "Map over directions")
        + _note(
            "Elevation is the angle from the z axis, azimuth the angle around it. Views are particles per solid angle: "
            "an even colour near 1 means that every direction was seen alike."
        )
        + _saved("directions")
    )


def directional_table(run: Path) -> str:
    """The numbers of summary.json about directions, with their meaning."""
    found = read.group(read.read_summary(run), "directional")
    if not found:
        return _absent("directional")
    rows = []
    for key, value in found.items():
        name, meaning = words.DIRECTIONAL.get(key, (key.replace("_", " "), ""))
        match value:
            case [low, high] if key == "band":
                text = f"{_angstrom(low)} to {_angstrom(high)}".replace(" Å to", " to")
            case _ if key in ("conical_best", "conical_worst"):
                text = _angstrom(value)
            case _:
                text = f"{value:.3f}" if isinstance(value, float) else _text(value)
        rows.append((name, text, meaning))
    return _grid(("Measure", "Value", "Meaning"), rows)


def examples(run: Path) -> str:
    """Particles, the projections of the model at their poses, and what is left."""
    triples = read.read_examples(run, _EXAMPLES)
    captions = read.entries(_summary_or_nothing(run), "examples")
    shown = []
    for place, (particle, projection, residual) in enumerate(triples):
        limits = _limits(particle)
        pictures = zip(
            ("particle", "projection", "residual"),
            ((particle, limits), (projection, _limits(projection)), (residual, limits)),
            strict=True,
        )
        images = "".join(_grey(image, scale, name) for name, (image, scale) in pictures)
        caption = _example_caption(captions[place]) if place < len(captions) else f"example {place + 1}"
        shown.append(f"<figure>{images}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="triples">{"".join(shown)}</div>\n' + _note(
        "From left to right: particle, projection with its CTF of the model of the other half, which has not seen "
        "it, and what is left; centred and low-passed. Particle and residual share one grey scale, the projection "
        "has its own. The residual should look like noise: a particle that shows through is signal which the model "
        "lacks."
    )


def residual(run: Path) -> str:
    """Power of the residuals of both halves against the noise model."""
    figures.draw_residual(run)
    return (
        _plot(plots.plot_residual(run), "Power of the residuals relative to the noise")
        + _note(
            "At 1 the residuals are as strong as the noise model says. The curve of the other half above that of the "
            "own half is overfitting: the model describes noise of the images that it was fitted to. Both curves above "
            "1 are signal that no model explains, or noise that the noise model lacks; both below 1, noise that is "
            "overestimated."
        )
        + _saved("residual")
    )


def convergence(run: Path) -> str:
    """The loss of every fit."""
    figures.draw_convergence(run)
    return _plot(plots.plot_convergence(run), "Loss against step") + _saved("convergence")


def stages(run: Path) -> str:
    """The stages of the fit, and the scores of their epochs where the run wrote them."""
    course = read.entries(_summary_or_nothing(run), "course")
    rows = [tuple(_text(stage.get(key)) for key in ("gaussians", "epochs", "score", "kept")) for stage in course]
    return _grid(("Gaussians", "epochs", "mean cross-validated FSC", "kept"), rows) * bool(rows)


def scores(run: Path) -> str:
    """The cross-validated score after each epoch; nothing where the engine of the run keeps none."""
    return _plot(plots.plot_scores(run), "Score against epoch") if (run / "scores.csv").exists() else ""


def gaussians(run: Path) -> str:
    """Distributions of the widths and shapes of the Gaussians."""
    figures.draw_gaussians(run)
    return (
        _pairs(plots.plot_gaussians(run), "Distribution over the Gaussians")
        + _note(
            "A pile at the left edge are Gaussians at the smallest width allowed; a long tail of anisotropies are "
            "needles, which follow noise more often than structure."
        )
        + _saved("gaussians")
    )


def numbers(run: Path) -> str:
    """Every number of summary.json that has no place elsewhere, a table for each of its groups."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in read.read_summary(run).items():
        if key not in _SHOWN:
            rows = list(_leaves(value))
            name = key if isinstance(value, dict) else "general"
            groups.setdefault(name, []).extend((leaf or key, text) for leaf, text in rows)
    tables = "".join(_table(name, rows) for name, rows in groups.items())
    return f'<div class="groups">{tables}</div>\n'


def config(run: Path) -> str:
    """The settings as they were given."""
    path = run / "config.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise read.unreadable(path, error, "the settings of the run") from error
    return f"<details><summary>config.toml</summary><pre>{html.escape(text)}</pre></details>\n"


def checks() -> str:
    """What to look for when something looks wrong."""
    items = "".join(f"<dt>{html.escape(sign)}</dt><dd>{html.escape(cure)}</dd>" for sign, cure in words.CHECKS)
    return f"<dl>{items}</dl>\n"


def file_table(names: set[str]) -> str:
    """The files of the folder with what they hold."""
    rows = "".join(
        f'<tr><td><a href="{quote(name)}">{html.escape(name)}</a></td><td>{words.describe(name)}</td></tr>'
        for name in sorted(names)
        if not name.startswith(".")
    )
    return f"<table>{rows}</table>\n"


# Headline


def _card(key: str, values: Mapping[str, object], nyquist: float | None, interval: str) -> str:
    """The resolutions of one curve by threshold ("" where the key names none), the first of them in large."""
    unknown = ("", key.replace("_", " "), "")
    _, name, meaning = next((entry for entry in words.MEANINGS if entry[0] in key), unknown)
    (first, value), *others = sorted(values.items())
    lines = [interval] * bool(interval) + [words.rule(key, first) + _limit(value, nyquist)]
    lines += [f"{words.rule(key, other)}: {figures.spacing(more)}{_limit(more, nyquist)}" for other, more in others]
    detail = "<br>".join(html.escape(line) for line in lines)
    return (
        f'<div class="card"><div class="number">{html.escape(figures.spacing(value))}</div>'
        f'<h3>{html.escape(name)}</h3><div class="detail">{detail}</div><p>{html.escape(meaning)}</p></div>'
    )


def _interval(ends: object) -> str:
    """The 95 % interval of the cross-validated resolution, coarse end first."""
    match ends:
        case [float() | int() as low, float() | int() as high]:
            return f"95 % interval: {max(low, high):.2f} to {min(low, high):.2f} Å"
        case _:
            return ""


def _limit(value: object, nyquist: float | None) -> str:
    """A note where a resolution is the finest that the pixels allow, and so says nothing about the data."""
    at_limit = nyquist and isinstance(value, int | float) and math.isclose(value, nyquist, rel_tol=0.01)
    return " (the limit set by the pixel size)" if at_limit else ""


def _nyquist(run: Path) -> float | None:
    """Spacing of the last shell in Å, where ``fsc.star`` gives it."""
    try:
        return 1 / read.read_fsc(run).frequency[-1]
    except (InputError, ZeroDivisionError):
        return None


# Pictures


def _plot(figure: Any, description: str) -> str:
    """An interactive figure; its data wait as JSON for the script at the end of the page."""
    height = figure.layout.height
    # No "<" may stand in a script, lest a name in the data end it.
    data = figure.to_json().replace("<", "\\u003c")
    return (
        f'<div class="plot" role="img" aria-label="{html.escape(description)}" style="min-height: {height}px">'
        f'<script type="application/json">{data}</script></div>\n'
    )


def _pairs(shown: Iterable[Any], description: str) -> str:
    """Figures side by side, two in a row where the page is wide enough."""
    return f'<div class="pair">{"".join(_plot(figure, description) for figure in shown)}</div>\n'


def _picture(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">\n'


def _saved(stem: str) -> str:
    """Where the figure lies for use in a paper."""
    links = " · ".join(f'<a href="{stem}.{kind}">{stem}.{kind}</a>' for kind in ("png", "svg"))
    return f'<p class="saved">For papers: {links}</p>\n'


def _grey(image: NDArray[np.float32], limits: tuple[float, float], name: str) -> str:
    """A grey image of a few kilobytes."""
    figures.load_matplotlib()
    from matplotlib.image import imsave
    from scipy.signal import resample

    reduced = image
    for axis, size in enumerate(image.shape):
        if size > _EXAMPLE_PIXELS:
            reduced = resample(reduced, round(size * _EXAMPLE_PIXELS / max(image.shape)), axis=axis)
    buffer = io.BytesIO()
    imsave(buffer, reduced, cmap="gray", origin="lower", vmin=limits[0], vmax=limits[1], format="png")
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _limits(image: NDArray[np.float32]) -> tuple[float, float]:
    import numpy as np

    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-12))


def _example_caption(entry: Mapping[str, Any]) -> str:
    defocus = entry.get("defocus")
    named = [f"{key} {_text(entry[key])}" for key in ("row", "half") if key in entry]
    if isinstance(defocus, int | float):
        named.append(f"defocus {defocus / 1e4:.2f} µm")
    return ", ".join(named)


# Tables and texts


def _summary_or_nothing(run: Path) -> dict[str, Any]:
    """The summary for what may be left out; the headline says what is wrong with it."""
    try:
        return read.read_summary(run)
    except InputError:
        return {}


def _absent(name: str) -> str:
    return f'<p class="missing">Not shown. summary.json has no "{name}".</p>\n'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>\n'


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts of the leaves of a nested mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} / {key}" if name else str(key))
    else:
        yield name, _text(value)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(text)}</td></tr>" for name, text in rows
    )
    return f"<div><h3>{html.escape(title.replace('_', ' '))}</h3><table>{cells}</table></div>\n"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a heading for each column."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="grid"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>\n'


def _angstrom(value: object) -> str:
    return f"{value:.2f} Å" if isinstance(value, int | float) and math.isfinite(value) else "not given"


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
