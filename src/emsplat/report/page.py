"""The parts of the page: HTML from the numbers, figures and notes of a run folder."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from emsplat.errors import InputError
from emsplat.report import figures, plots, read, verdict, words
from emsplat.report.resample import resample
from emsplat.report.surface import make_surface
from emsplat.report.verdict import Kind
from emsplat.run import files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_EXAMPLES = 8  # particles shown
_EXAMPLE_PIXELS = 112  # of a particle's image in the page; noise compresses badly


def part(write: Callable[[], str]) -> str:
    """What ``write`` returns, or a note that names what is missing."""
    try:
        return write()
    except InputError as error:
        return f'<p class="missing">Not shown. {html.escape(str(error))}</p>\n'


def facts(run: Path) -> str:
    """One line about what went in."""
    return html.escape(" · ".join(facts_of(read.read_summary_or_nothing(run))))


def facts_of(summary: Mapping[str, Any]) -> list[str]:
    """What went in, in words."""
    about, options = read.group(summary, "input"), read.group(summary, "options")
    said = []
    if isinstance(count := about.get("particles", summary.get("particles")), int):
        said.append(f"{count:,} particles")
    if "box" in about and "pixel_size" in about:
        said.append(f"box {_text(about['box'])} px of {_text(about['pixel_size'])} Å")
    if "symmetry" in options:
        said.append(f"symmetry {_text(options['symmetry'])}")
    if "half_sets" in about:
        said.append(f"half-sets {_input_text('half_sets', about['half_sets'])}")
    return said


def warnings(run: Path) -> str:
    """What the run warned of, and what it noted: before anything that they may spoil."""
    summary = read.read_summary_or_nothing(run)
    shown = ""
    for key, title, look in (("warnings", "Warnings", "warnings"), ("notes", "Notes", "warnings notes")):
        found = summary.get(key) or []
        texts = dict.fromkeys(_text(one) for one in (found if isinstance(found, list) else [found]))
        items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
        shown += f'<div class="{look}"><h2>{title}</h2><ul>{items}</ul></div>\n' * bool(items)
    return shown


def headline(run: Path) -> str:
    """The number to quote with its remarks, and a table of the others."""
    summary = read.read_summary(run)
    first = verdict.headline(summary)
    if first is None:
        return _absent("resolution")
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in first.remarks)
    shown = (
        f'<div class="headline"><div class="number">{html.escape(first.number[:1].upper() + first.number[1:])}</div>'
        f"<p>{html.escape(first.measure[:1].upper() + first.measure[1:])}.</p>"
        + f"<ul>{remarks}</ul>" * bool(remarks)
        + "</div>\n"
    )
    if summary.get("evident") is False:
        return shown
    rows = [(row.name, row.lenient, row.strict, row.meaning) for row in verdict.comparisons(summary)]
    if rows:
        shown += _grid(("To compare", "at 0.143", "at 0.5", "What it says"), rows)
    return shown + _note(words.CAUTION) * verdict.kind_of(summary).has_gaussians


def items(run: Path) -> str:
    """What `emsplat check` looked at, with its verdicts; what asks for a look comes first."""
    found = sorted(read.entries(read.read_summary(run), "items"), key=lambda item: item.get("verdict") == "ok")
    rows = [tuple(_text(item.get(key)) for key in ("verdict", "name", "text")) for item in found]
    return _grid(("Verdict", "Item", "What was found"), rows) + _note(
        "ok: as expected. look: unusual, but it may be meant. wrong: a run would fail or mislead. The map below is a "
        "quick back-projection of a sample on a coarse grid, for a look and not for a resolution."
    )


def null_tests(run: Path) -> str:
    """The table of `emsplat nulltest`."""
    summary = read.read_summary(run)
    rows = []
    for test in read.entries(summary, "tests"):
        name, silent = _text(test.get("name")), read.group(test, "silent")
        cells = []
        for measure in words.NULL_MEASURES:
            text = "none" if test.get(measure) is None else _angstrom(test.get(measure), verdict.nyquist_of(summary))
            if measure in silent:
                decides = measure in words.DECISIVE
                text += ", silent" if silent[measure] else ", NOT SILENT" if decides else ", not silent"
            cells.append(text)
        done = words.ALTERED.get(name, "").removeprefix("Null test: ")
        rows.append(
            (name, done[:1].upper() + done[1:], _text(test.get("expected")), *cells, _text(test.get("verdict", "")))
        )
    passed = summary.get("passed") is True
    number = "Passed" if passed else "Failed"
    said = (
        "The cross-validated resolution stays silent where it must."
        if passed
        else "The cross-validated resolution is not silent where it must be, or the unaltered particles give none."
    )
    links = " · ".join(
        f'<a href="{quote(name)}/{files.NULL_RUN}/{files.REPORT}">{html.escape(name)}</a>'
        for name, *_ in rows
        if (run / name / files.NULL_RUN / files.REPORT).is_file()
    )
    head = ("Test", "What was done to the images", "Expected", *words.NULL_MEASURES.values(), "Verdict")
    return (
        f'<div class="headline"><div class="number">{number}</div><p>{said}</p></div>\n'
        f'<div class="scroll">{_grid(head, rows)}</div>\n'
        + _note(
            f"{words.SILENT} Resolutions are those that the curves of each run give before its own caution takes any "
            "back; the last of them is what the run reported. Only this and the cross-validated one have to be silent "
            "for a test to pass: the half maps of two Gaussian models agree also where nothing true is left, which is "
            "why their FSC is not the one to quote."
        )
        + f'<p class="saved">Pages of the runs: {links}</p>\n' * bool(links)
    )


def null_curves(run: Path) -> str:
    """The curves of each test."""
    names = [_text(test.get("name")) for test in read.entries(read.read_summary(run), "tests")]
    return _pairs(plots.plot_null_curves(run, names), "FSC of the null tests") + _note(
        "Cross-validated, the curve to quote: beyond the spacing that a test leaves true it should end, where the "
        "data cannot say, or lie below 0.5. Half maps: what rises above 0.143 there with altered particles is the "
        "models' own."
    )


def surface(run: Path) -> str:
    """The isosurface of the full map, coloured by local resolution where that is known."""
    summary = read.read_summary_or_nothing(run)
    if _has_no_map(run, summary):
        return ""
    if summary.get("evident") is False:
        return _note("Not drawn: the surface of a map without a particle is that of noise. Look at the slices.")
    volume = read.read_full_map(run)
    shape = volume.values.shape
    mask = read.read_mask(run, shape)
    note, colours, local = "", None, None
    try:
        local = read.read_local_resolution(run, shape)
    except InputError as error:
        reason = "It was not measured." if _was_not_measured(summary, "local_resolution") else str(error)
        note = f'<p class="missing">Not coloured by local resolution. {html.escape(reason)}</p>\n'
    else:
        colours = figures.resolution_range(local if mask is None else local[mask])
    found = make_surface(volume, mask, local, run)
    box = f"the whole box: there is no {files.MASK}" if mask is None else f"the box around {files.MASK}"
    colour = (
        "Colour is the local resolution in Å, blue where it is finest; one colour all over means that it varies by "
        "less than a fifth. "
        if colours
        else ""
    )
    reduced = f" and reduced to voxels of {found.voxel:.2f} Å" if found.is_reduced else ""
    return (
        _plot(plots.plot_surface(found, colours), "Isosurface of the full map")
        + _note(
            f"The surface of {files.FULL_MAP} where its density has the level of the slider, in standard deviations of "
            f"the map. Drag to turn, scroll to zoom. {colour}Look for one solid body that keeps its shape over several "
            "levels; crumbs in the surroundings that grow as fast as the body are noise or a wrong mask. Cut to "
            f"{box}{reduced}; a viewer of maps shows more."
        )
        + note
    )


def slices(run: Path) -> str:
    """Central slices and projections of the full map."""
    if _has_no_map(run, read.read_summary_or_nothing(run)):
        return ""
    return (
        _picture(figures.draw_slices(run), "Central slices and projections of the full map")
        + _note(
            f"Above, slices of {read.shown_map(run)} one voxel thick through the centre; below, sums along the same "
            "axes. The first letter points right, the second up; white is dense. A good map has a bright particle in "
            "even surroundings. A dark particle has the wrong contrast; streaks, rings and specks outside are noise, "
            "missing views or a wrong CTF."
        )
        + _saved("slices")
    )


def local_resolution_slices(run: Path) -> str:
    """Central slices of the full map in the colours of its local resolution."""
    summary = read.read_summary_or_nothing(run)
    if verdict.kind_of(summary) is Kind.CHECK or _was_not_measured(summary, "local_resolution"):
        return ""
    path = figures.draw_local_resolution_slices(run)
    return (
        _picture(path, "Central slices coloured by local resolution")
        + _note("The same slices with the local resolution in Å as colour, inside the mask; blue is finest.")
        + _saved(path.stem)
    )


def fsc(run: Path) -> str:
    """The curves of ``fsc.star``."""
    figures.draw_fsc(run)
    shown = plots.plot_fsc(run)
    summary = read.read_summary_or_nothing(run)
    notes = []
    if len(shown) == 2:
        notes.append(
            "Against the truth: correlations with it, read at 0.5. The cross-validated curve with its 95 % band is "
            "the one to quote: the Gaussians of a half against the plain back-projection of the other; the map of all "
            "particles is at least as good. An FSC F between half maps is no such correlation; it is drawn as √(2F / "
            "(1 + F)), the correlation with the truth that it implies for the map of all particles if all agreement "
            "is signal, and 0.143 becomes 0.5. Of half maps of Gaussians it is an upper limit: how far it lies above "
            "the other curves is what the models have in common without the data. Where a curve is undefined it ends."
        )
    notes.append(
        "Between half maps: their FSC as RELION draws it, read at 0.143. A "
        "good curve is near 1 at the left and falls to 0 once. With random phases the maps share nothing beyond the "
        "shell where the randomising begins: there this curve should drop to about 0, and where it stays above 0.1 "
        "the mask is too tight. A curve that does not fall by the right edge says that the pixels are too coarse; "
        "one that falls and rises again that particles are duplicated, or the mask is too tight."
    )
    if summary.get("evident") is False:
        notes.insert(0, "No resolution is read from these curves: no particle was found in the images.")
    return (
        _pairs(shown, "FSC against spatial frequency")
        + "".join(map(_note, notes))
        + _note("Click a name to hide or show its curve, twice to see it alone.")
        + _saved("fsc")
    )


def local_resolution(run: Path) -> str:
    """The distribution of the local resolution."""
    if _was_not_measured(read.read_summary_or_nothing(run), "local_resolution"):
        return ""
    figures.draw_local_resolution(run)
    return (
        _plot(plots.plot_local_resolution(run), "Distribution of the local resolution inside the mask")
        + _note(
            "How many voxels inside the mask have which local resolution, in Å. One narrow peak is a rigid particle; a "
            "long tail to the right are parts that move or are poorly occupied. A pile at the left edge, 2 voxels, is "
            "the limit of the pixel size."
        )
        + _saved("local_resolution")
    )


def local_resolution_table(run: Path) -> str:
    """Percentiles of the local resolution from summary.json."""
    summary = read.read_summary(run)
    if _was_not_measured(summary, "local_resolution"):
        return ""
    found = read.group(summary, "local_resolution")
    names = words.LOCAL_RESOLUTION_KINDS
    if not verdict.kind_of(summary).has_gaussians:
        names = {"half_maps": "Half maps"}
    kinds = {name: read.group(found, key) for key, name in names.items()}
    kinds = {name: values for name, values in kinds.items() if values}
    if not kinds:
        return _absent("local_resolution")
    nyquist = verdict.nyquist_of(summary)
    rows = [
        (text, *(_angstrom(values.get(key), nyquist) for values in kinds.values()))
        for key, text in words.PERCENTILES.items()
    ]
    window = found.get("window")
    note = f"Within windows of {_angstrom(window)}, inside the mask." if window is not None else ""
    return _grid(("Local resolution", *kinds), rows) + _note(note) * bool(note)


def directions(run: Path) -> str:
    """Maps over the sphere of resolution, sampling and views."""
    if _was_not_measured(read.read_summary_or_nothing(run), "directional"):
        return ""
    figures.draw_directions(run)
    return (
        _pairs(plots.plot_directions(run), "Map over directions")
        + _note(
            "Directions in the frame of the map: tilt is the angle from the z axis, rot the angle around it, as in "
            "the angles of RELION. Fourier slice correlation: how alike the half maps look along a direction. Conical "
            "resolution: FSC 0.143 in a cone around it. Sampling: how many slices of Fourier space go through it. "
            "Views: particles per solid angle that were seen from there. Even colours mean that every direction was "
            "seen and resolved alike; blurred detail along the dark directions of the sampling is preferred "
            "orientation."
        )
        + _saved("directions")
    )


def directional_table(run: Path) -> str:
    """The numbers of summary.json about directions, with their meaning."""
    summary = read.read_summary(run)
    if verdict.kind_of(summary) is Kind.CHECK or _was_not_measured(summary, "directional"):
        return ""
    found = read.group(summary, "directional")
    if not found:
        return _absent("directional")
    rows = []
    for key, value in found.items():
        name, meaning = words.DIRECTIONAL.get(key, (key.replace("_", " "), ""))
        match value:
            case [low, high] if key == "band":
                text = f"{_angstrom(low)} to {_angstrom(high)}".replace(" Å to", " to")
            case _ if key in ("conical_best", "conical_worst"):
                text = _angstrom(value, verdict.nyquist_of(summary))
            case _:
                text = f"{value:.3f}" if isinstance(value, float) else _text(value)
        rows.append((name, text, meaning))
    return _grid(("Measure", "Value", "Meaning"), rows)


def examples(run: Path) -> str:
    """Particles, the projections of the model at their poses, and what is left."""
    triples = read.read_examples(run, _EXAMPLES)
    captions = read.entries(read.read_summary_or_nothing(run), "examples")
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
            "Power of what is left of up to 300 images of each half when the projection of a model is taken away, "
            "over the power of the noise model, by spatial frequency. Both curves together and near 1 are good. Slow "
            "swings of 10 to 20 % are usual, and so are first shells far above 1: the noise is estimated in the rim "
            "of the images, outside the particle, which blurs its spectrum and knows nothing of ice and neighbours. "
            "What counts is the gap: the curve of the other half, whose model has not seen the images, above that of "
            "their own half is overfitting, of which half a per cent is usual. Both well above 1 where the FSC is "
            "high are signal that no model explains: poses, CTF, several conformations."
        )
        + _saved("residual")
    )


def convergence(run: Path) -> str:
    """The loss of every fit."""
    figures.draw_convergence(run)
    return (
        _plot(plots.plot_convergence(run), "Loss against step")
        + _note(
            "The loss of each fit, averaged over a fortieth of it; its unit and zero are arbitrary. A curve that is "
            "flat at the end has converged. A jump where Gaussians are split and a constant distance between the "
            "fits, whose images differ in noise, are normal; a curve that rises at the end, or still falls steeply, "
            "is not."
        )
        + _saved("convergence")
    )


def stages(run: Path) -> str:
    """The stages of the fit."""
    course = read.entries(read.read_summary_or_nothing(run), "course")
    keys = [key for key in words.STAGES if any(key in stage for stage in course)]
    rows = [tuple("not judged" if stage.get(key) is None else _text(stage[key]) for key in keys) for stage in course]
    head = [words.STAGES[key] for key in keys]
    note = (
        "Gaussians are added in stages. A stage is taken back if it lowers the mean cross-validated FSC by more than "
        "three standard errors and 0.002; a gain within its error, of either sign, is kept."
    )
    return (_grid(head, rows) + _note(note) + _residual(run)) * bool(rows)


def _residual(run: Path) -> str:
    """What the maps hold beyond the Gaussians."""
    found = read.group(read.read_summary_or_nothing(run), "residual")
    if not found:
        return ""
    text = (
        "The maps hold what the Gaussians leave and both half-sets agree on, too"
        if found.get("kept") is True
        else "What both half-sets agree on beyond the Gaussians makes their maps worse and was left out"
    )
    gain, error = (_text(found[key]) for key in ("gain", "gain_error"))
    return _note(f"{text}: gain {gain} ± {error} in mean cross-validated FSC.")


def scores(run: Path) -> str:
    """The cross-validated score after each epoch; nothing where the engine of the run keeps none."""
    if not (run / files.SCORES).exists():
        return ""
    return _plot(plots.plot_scores(run), "Score against epoch") + _note(
        "The mean over all shells of the cross-validated FSC after each epoch, stages one after another; 1 would be "
        "the truth. It rises and levels off; a slight fall at the end is chance or the beginning of fitted noise."
    )


def poses(run: Path) -> str:
    """What a refinement did to the poses: rounds, moves, orientations."""
    found = read.group(read.read_summary_or_nothing(run), "refinement")
    if not found:
        return ""
    rows = []
    for number, one in enumerate(read.entries(found, "rounds"), 1):
        match one.get("angle_error"), one.get("shift_error"):
            case [float() | int() as a, float() | int() as b], [float() | int() as c, float() | int() as d]:
                errors = f"{a:.2f}, {b:.2f}° and {c:.2f}, {d:.2f} Å"
            case _:
                errors = ""
        kept = "" if one.get("kept", True) else " (taken back)"
        score, gain = _text(one.get("score")) + kept, _text(one.get("gain"))
        rows.append((str(number), _angstrom(one.get("compared_to")), errors, gain, score))
    head = ("Round", "Compared down to", "Errors of the given poses per axis, halves 1 and 2", "Gain, nats", "Score")
    shown = _grid(head, rows) if rows else ""
    if found.get("moved") is not True:
        return shown + _note("No pose was moved.")
    figures.draw_poses(run)
    return (
        shown
        + _note(
            "Gain is that of the log-likelihood per particle. The score is the mean correlation with the truth, over "
            "all shells, that the back-projections of the two halves imply; it needs no model, and a round that lowers "
            "it is taken back."
        )
        + _pairs(plots.plot_poses(run), "Poses before and after the refinement")
        + _note(
            "Above, by how much each particle was turned and moved from the pose that was given, and the standard "
            "deviations of what is left about one axis. Below, directions of view before and after: they should hardly "
            "differ. Views that gather in a few spots after a refinement are drawn there by noise."
        )
        + _saved("poses")
    )


def gaussians(run: Path) -> str:
    """Distributions of the widths and shapes of the Gaussians."""
    figures.draw_gaussians(run)
    sigma = read.read_widths(run).sigma[:, 0]
    smallest = float(sigma.min())
    share = float((sigma < 1.01 * smallest).mean())
    return (
        _pairs(plots.plot_gaussians(run), "Distribution over the Gaussians")
        + _note(
            f"Widths σ of the {len(sigma):,} Gaussians of the full model along their three axes, in Å, and how "
            f"elongated they are. {share:.0%} have their smallest axis at the smallest width, {smallest:.2f} Å. In "
            "one pass 60 to 85 % are normal: the finest detail is drawn with the narrowest Gaussians, and the bound "
            "keeps them from following noise; all of them is what noise alone gives. Trained on images few reach the "
            "bound. Anisotropies of 1 to 1.5 are usual; a long tail are needles, which follow noise more often than "
            "structure."
        )
        + _saved("gaussians")
    )


def gain(run: Path) -> str:
    """Whether there is anything: the headline of a run that looks for states."""
    found = read.group(read.read_summary(run), "heterogeneity")
    first = verdict.states_headline(found)
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in first.remarks)
    link = ""
    if (run / files.EXPLORER).exists():
        link = f'<p><a href="{files.EXPLORER}">Move through the states: the molecule follows the pointer</a></p>'
    return (
        f'<div class="headline"><div class="number">{html.escape(first.number)}</div>'
        f"<p>{html.escape(first.measure)}</p>{f'<ul>{remarks}</ul>' * bool(remarks)}{link}</div>\n"
    )


def gain_curves(run: Path) -> str:
    """The gain against the number of components, and of points."""
    found = read.group(read.read_summary(run), "heterogeneity")
    components = [(number, *_gain(own)) for number, own in enumerate(read.entries(found, "gain_by_components"))]
    points = [
        (int(number), *_gain(own)) for number, own in read.group(found, "gain_by_points").items() if number.isdecimal()
    ]
    shown = [
        plots.plot_gains(values, title)
        for values, title in ((components, "components of the linear stage"), (points, "points of the density"))
        if values
    ]
    figures.draw_states(run)
    return (
        _pairs(shown, "Gain on the other half-set")
        + _note(
            "Everything was fitted to one half-set, and this is how much better it predicts the images of the other "
            "half-set than one map does, with its standard error. It rises with what is real and falls with what is "
            "noise; the fewest that are not clearly below the best are taken."
        )
        + _saved(files.STATES_FIGURE.removesuffix(".png"))
    )


def _gain(own: Mapping[str, Any]) -> tuple[float, float]:
    value, error = (own.get(key) for key in ("value", "error"))
    known = isinstance(value, int | float) and isinstance(error, int | float)
    return (float(value), float(error)) if known else (math.nan, math.nan)  # type: ignore[arg-type]


def states(run: Path) -> str:
    """A row for each state."""
    found = read.group(read.read_summary(run), "heterogeneity")
    rows = []
    for row in read.entries(found, "states"):
        low, high = read.pair(row, "population_interval")
        one, other = read.pair(row, "population_halves")
        energy, error = row.get("free_energy"), row.get("free_energy_error")
        told = f"{energy:.2f} ± {error:.2f}" if isinstance(energy, float) and isinstance(error, float) else ""
        rows.append(
            (
                _text(row.get("state")),
                f"{_share(row.get('population'))} ({_share(low)} to {_share(high)})",
                f"{_share(one)}, {_share(other)}",
                told,
                _angstrom(row.get("resolution")),
                _angstrom(row.get("moving_resolution")),
                _spread(read.group(row, "local_resolution")),
            )
        )
    if not rows:
        return ""
    head = ("State", "Particles (95 %)", "Half-sets", "-ln p (kT)", "Resolution", "Where it differs", "Local (90 %)")
    kind = "classes of latents" if found.get("classes") is True else "groups along a continuous distribution"
    return (
        f'<div class="scroll">{_grid(head, rows)}</div>\n'
        + _note(
            f"States are {kind}. Populations are shares of the density of the latents, which no posterior shrinks; "
            f"intervals come from a bootstrap over {_text(found.get('populations_over'))}. Resolutions are "
            "cross-validated at 0.5: the map of each half-set against the back-projection of the other half's "
            "particles, in the mask of the molecule and where the state differs from the consensus; local ones so in "
            "windows, median and 5 to 95 % of the voxels in the mask. Shown are states "
            "that both half-sets confirm: the map of one tells the other's particles of that state better than the "
            "mean of all other states does, beyond three standard errors. Maps, half maps, local resolution, "
            f"Gaussians and particles of each state are in {files.STATES}/; {files.CHIMERAX} opens all in ChimeraX."
        )
        + _corrected(read.group(found, "motion_corrected"))
    )


def _spread(local: Mapping[str, Any]) -> str:
    """Median and percentiles of a local resolution."""
    if local.get("median") is None:
        return ""
    low, high = (_angstrom(local.get(key)).removesuffix(" Å") for key in ("p5", "p95"))
    return f"{_angstrom(local['median'])} ({low} to {high})"


def _corrected(found: Mapping[str, Any]) -> str:
    """What taking back the motions brings."""
    if not found:
        return ""
    rows = [
        (where, _angstrom(found.get(name)), _angstrom(found.get(f"plain_{name}")))
        for name, where in (("resolution", "in the mask"), ("moving_resolution", "where the state differs"))
    ]
    head = (f"Consensus in state {_text(found.get('state'))}", "motions taken back", "without")
    return _grid(head, rows) + _note(
        f"All particles in one map ({files.CORRECTED}), the rigid motions of the parts taken back; cross-validated "
        "at 0.5, in the same masks as the plain consensus."
    )


def populations(run: Path) -> str:
    """The shares of the states with their intervals."""
    rows = []
    for row in read.entries(read.group(read.read_summary(run), "heterogeneity"), "states"):
        number, value = row.get("state"), row.get("population")
        ends = (*read.pair(row, "population_interval"), *read.pair(row, "population_halves"))
        if isinstance(number, int) and isinstance(value, float):
            rows.append((number, value, *ends))
    return _plot(plots.plot_populations(rows), "Populations of the states") if rows else ""


def landscape(run: Path) -> str:
    """Free energies over the latents, where these form no classes."""
    found = read.group(read.read_summary(run), "heterogeneity")
    if found.get("landscape") is not True:
        return ""
    shown = ""
    if (run / files.LANDSCAPE).exists():
        shown += _plot(plots.plot_landscape(read.read_landscape(run)), "Free energy over two components")
    lines = [plots.plot_free_energy(name, own) for name, own in read.read_free_energy(run).items()]
    return (
        shown
        + _pairs(lines, "Free energy along a component")
        + _note(
            "-ln p in kT above the most populated place, for a sample that was frozen in equilibrium. The density p is "
            "deconvolved: a histogram of the particles' latents is blurred by noise and shrunk towards the mean, this "
            "is fitted to what the images say. The band is two standard errors, of a bootstrap and of the difference "
            "between half-sets. It is left out where an error is above 1 kT, or fewer than ten images are known to be. "
            "A barrier that is narrower than the images resolve is at least as high as it looks."
        )
    )


def follows(run: Path) -> str:
    """The tests whether latents follow the images."""
    rows = []
    for row in read.entries(read.group(read.read_summary(run), "heterogeneity"), "follows"):
        chance = row.get("p")
        rows.append(
            (
                _text(row.get("what")),
                _share(row.get("explained")),
                "" if chance is None else f"{chance:.3g}",
                f"z{row.get('component')}",
                "look" if row.get("warns") is True else "ok",
            )
        )
    if not rows:
        return ""
    return _grid(("Latents follow", "Variance explained", "p", "Most along", "Verdict"), rows) + _note(
        "The state of a molecule has nothing to do with the direction that it is seen from, with defocus or "
        "micrograph. Shown is how much of the variance of the latents, along the direction that follows most, the mean "
        "at a given direction, defocus and so on explains, beyond what it explains of shuffled images or micrographs, "
        "and the part of the shuffles that explain as much. 5 % and more are warned of. Grey scale: how much the "
        "change of the map along some direction is that of making it brighter; 80 % and more are warned of."
    )


def parts(run: Path) -> str:
    """What the rigid parts do."""
    path = run / files.PARTS / files.PARTS_TABLE
    if not path.exists():
        return ""
    rows = [
        (_text(part.get("number")), _text(part.get("words")), _text(part.get("mask") or "none"))
        for part in read.entries(read.read_json(path), "parts")
    ]
    return _grid(("Part", "What it does over the states", "Mask"), rows) + _note(
        "Parts of the model of half-set 1; lengths are in Å from the centre of the box, axes in its frame (x, y, z), "
        "turns right-handed. Masks show where each part is in the state of most particles, for focused or multi-body "
        "refinement."
    )


def _share(value: object) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.1%}" if known else "not given"


def numbers(run: Path) -> str:
    """What went in and how it was computed; settings are those of config.toml, and shown there alone."""
    summary = read.read_summary(run)
    about = [
        (words.LABELS.get(key, key), _input_text(key, value)) for key, value in read.group(summary, "input").items()
    ]
    groups: dict[str, list[tuple[str, str]]] = {"input": about} if about else {}
    for key, value in summary.items():
        if key not in words.ELSEWHERE:
            rows = list(_leaves(value))
            name = key if isinstance(value, dict) and key not in words.LABELS else "computation"
            if name == "computation":
                label = words.LABELS.get(key, key)
                groups.setdefault(name, []).extend((f"{label}: {leaf}" if leaf else label, text) for leaf, text in rows)
            else:
                groups.setdefault(name, []).extend((words.LABELS.get(leaf, leaf or key), text) for leaf, text in rows)
    versions = read.group(summary, "versions")
    if versions:
        text = ", ".join(f"{name} {_text(value)}" for name, value in versions.items())
        groups.setdefault("computation", []).append(("versions", text))
    tables = "".join(_table(name, rows) for name, rows in groups.items())
    return f'<div class="groups">{tables}</div>\n' * bool(tables) + _fits(read.group(summary, "fits"))


def _fits(found: Mapping[str, Any]) -> str:
    """A row for each fit."""
    rows = {figures.FITS.get(name, name): fit for name, fit in found.items() if isinstance(fit, dict)}
    columns = list(dict.fromkeys(key for fit in rows.values() for key in fit))
    cells = [(name, *(_text(fit[key]) if key in fit else "" for key in columns)) for name, fit in rows.items()]
    return _grid(("fit", *(key.replace("_", " ") for key in columns)), cells) if cells else ""


def config(run: Path) -> str:
    """The settings as they were given."""
    path = run / files.SETTINGS
    if verdict.kind_of(read.read_summary_or_nothing(run)) is Kind.HALF_MAPS and not path.exists():
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise read.unreadable(path, error, "the settings of the run") from error
    return f"<details><summary>All settings ({files.SETTINGS})</summary><pre>{html.escape(text)}</pre></details>\n"


def checks(run: Path) -> str:
    """What to look for when something looks wrong, as far as the run has it."""
    fitted = verdict.kind_of(read.read_summary_or_nothing(run)).has_gaussians
    shown = (*words.CHECKS, *(words.CHECKS_OF_GAUSSIANS if fitted else ()))
    entries = "".join(f"<dt>{html.escape(sign)}</dt><dd>{html.escape(cure)}</dd>" for sign, cure in shown)
    return f"<dl>{entries}</dl>\n"


def file_table(names: set[str]) -> str:
    """The files of the folder with what they hold."""
    rows = "".join(
        f'<tr><td><a href="{quote(name)}">{html.escape(name)}</a></td><td>{words.describe(name)}</td></tr>'
        for name in sorted(names)
        if not name.startswith(".")
    )
    return f"<table>{rows}</table>\n"


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


def _has_no_map(run: Path, summary: Mapping[str, Any]) -> bool:
    """Whether a full map is neither there nor to be expected: two half maps are enough to be measured."""
    return verdict.kind_of(summary) is Kind.HALF_MAPS and not (run / files.FULL_MAP).exists()


def _was_not_measured(summary: Mapping[str, Any], name: str) -> bool:
    """Whether the run says itself that there is no such measurement, for want of a particle or of room."""
    return "evident" in summary and name in summary and summary[name] is None


def _input_text(key: str, value: object) -> str:
    match key, value:
        case "half_sets", [int() as one, int() as two]:
            return f"{one:,} + {two:,}"
        case "defocus_range", [float() | int() as low, float() | int() as high]:
            return f"{low / 1e4:.2f} to {high / 1e4:.2f} µm"
        case "pixel_size" | "diameter" | "shift_rms", float() | int():
            return f"{value:.4g} Å"
        case _, bool():
            return _text(value)
        case _, int():
            return f"{value:,}"
        case _:
            return _text(value)


def _absent(name: str) -> str:
    return f'<p class="missing">Not shown. {files.SUMMARY} has no "{name}".</p>\n'


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
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<table class="grid"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>\n'


def _cell(text: str) -> str:
    look = (
        ' class="bad"'
        if text == "wrong" or text == "FAILED" or "NOT SILENT" in text
        else ' class="short"' * (len(text) < 18)
    )
    return f"<td{look}>{html.escape(text)}</td>"


def _angstrom(value: object, nyquist: float | None = None) -> str:
    """A length in Å; with ``nyquist`` a resolution, which is a bound there."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return verdict.spacing(value, nyquist) if known else "not given"


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
