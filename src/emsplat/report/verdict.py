"""The verdict of a run in words, from summary.json alone: what to quote, what limits it, what the others are for.

The terminal and the page say the same, because both take it from here. Each kind of run has its own headline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from emsplat.report.read import entries
from emsplat.report.words import ALTERED, CURVES, RELIONS_RULE, Measured
from emsplat.run.files import SLICES_FIGURE


class Kind(StrEnum):
    """What left a folder, by the name that its page carries."""

    ONE_PASS = "Reconstruction with Gaussians in one pass"
    IMAGES = "Reconstruction with Gaussians trained on images"
    CLASSICAL = "Classical back-projection"
    HALF_MAPS = "Two half maps, measured"
    CHECK = "Check of the input, with a quick back-projection"
    NULL_TESTS = "Null tests"
    STATES = "States of a molecule that moves and changes"

    @property
    def has_gaussians(self) -> bool:
        """Whether Gaussians were fitted."""
        return self in (Kind.ONE_PASS, Kind.IMAGES)


NOTHING = "no resolution"
LIMIT = "the limit of the pixel size"
_OR_FINER = " or finer"


@dataclass(frozen=True)
class Headline:
    """The number to quote, what it was read from, and what has to be known with it."""

    number: str
    measure: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One more curve of the run: its resolutions at 0.143 and 0.5, "" where it has none, and what they are for."""

    name: str
    lenient: str
    strict: str
    meaning: str


def kind_of(summary: Mapping[str, Any]) -> Kind:
    """Which program left the folder; a summary that says nothing is taken for that of a reconstruction."""
    if isinstance(summary.get("tests"), list):
        return Kind.NULL_TESTS
    if isinstance(summary.get("items"), list):
        return Kind.CHECK
    if isinstance(summary.get("heterogeneity"), dict):
        return Kind.STATES
    if summary.get("fits") or _group(summary, "resolution").get("cross_validated") is not None or not summary:
        return Kind.IMAGES if _group(summary, "settings").get("engine") == "images" else Kind.ONE_PASS
    return Kind.CLASSICAL if "fits" in summary else Kind.HALF_MAPS


def spacing(value: object, nyquist: float | None = None) -> str:
    """A resolution in Å; one at Nyquist is a bound, None and NaN are curves that never reach the threshold."""
    match value:
        case bool():
            return str(value)
        case float() | int() if math.isfinite(value):
            return f"{value:.2f} Å" + (_OR_FINER if is_nyquist(value, nyquist) else "")
        case None | float():
            return "not reached"
        case _:
            return str(value)


def is_nyquist(value: object, nyquist: float | None) -> bool:
    """Whether a resolution is the finest that the pixels allow: the curve has not fallen to its threshold there."""
    return nyquist is not None and isinstance(value, int | float) and math.isclose(value, nyquist, rel_tol=1e-3)


def nyquist_of(summary: Mapping[str, Any]) -> float | None:
    """The spacing of the last shell in Å."""
    value = _group(summary, "limit").get("nyquist")
    return float(value) if isinstance(value, int | float) and value > 0 else None


def headline(summary: Mapping[str, Any]) -> Headline | None:
    """The number to quote; None where the summary holds no resolution."""
    kind = kind_of(summary)
    found = _group(summary, "resolution")
    remarks = [ALTERED[altered]] if (altered := summary.get("altered")) in ALTERED else []
    if not found:
        return None
    if summary.get("evident") is False:
        if not remarks:
            remarks = [
                f"Look at poses, CTF and contrast with `emsplat check`, at {SLICES_FIGURE}, and whether there are "
                "enough particles."
            ]
        return Headline(NOTHING, _NOTHING, tuple(remarks))
    name, measure = "half_map_corrected", f"{_MAPS[kind]}, masked and corrected for the mask; {RELIONS_RULE}"
    if kind.has_gaussians:
        name, measure = "cross_validated", _CROSS_VALIDATED
    value = found.get(name)
    nyquist = nyquist_of(summary)
    if value is None:
        return Headline(NOTHING, f"{measure}. The curve is below it from the first shell on", tuple(remarks))
    if kind.has_gaussians and (interval := _interval(summary)):
        remarks.append(interval)
    if shared := _shared(summary):
        remarks.append(shared)
    if is_nyquist(value, nyquist):
        remarks.append(_coarse_pixels(summary, nyquist))
    elif kind.has_gaussians and _group(summary, "limit").get("ends_with_data") is True:
        remarks.append(_END_OF_DATA)
    assessment = _group(summary, "assessment")
    if mask := assessment.get("mask"):
        remarks.append(f"In the mask {mask}, which was given to `emsplat assess`.")
    elif diameter := assessment.get("mask_diameter"):
        remarks.append(f"In a sphere of {diameter} Å, which was given to `emsplat assess`.")
    return Headline(spacing(value, nyquist), measure, tuple(remarks))


def states_headline(found: Mapping[str, Any]) -> Headline:
    """What a run that looked for states says: of its summary what is under "heterogeneity"."""
    gain, error = (
        f"{value:.2f}" if isinstance(value, int | float) and math.isfinite(value) else "unknown"
        for value in (found.get("gain"), found.get("gain_error"))
    )
    if found.get("found") is not True and found.get("states_tried"):
        return Headline(
            "No states that both half-sets confirm",
            f"Particles differ: the best model predicts the images of the other half-set by {gain} ± {error} nats per "
            f"image better than one map does. But of {found.get('states_tried')} states that were tried "
            f"{found.get('states_confirmed')} are such that the maps of one half-set tell the other's particles of "
            "that state better than the mean of all other states does, beyond three standard errors. Nothing was "
            "written of them.",
            _warned(found),
        )
    if found.get("found") is not True:
        return Headline(
            "No heterogeneity that these images support",
            f"The best model with states predicts the images of the other half-set by {gain} ± {error} nats per image "
            "better than one map, which is not beyond three standard errors. No states were made.",
            _components_alone(found),
        )
    remarks = [
        f"{found.get('components')} components, {found.get('points')} points of the density; "
        + ("the latents form classes." if found.get("classes") is True else "the latents form no classes.")
    ]
    tried, kept = found.get("states_tried"), found.get("states_confirmed")
    if tried != kept:
        remarks.append(f"Of {tried} states that were tried the half-sets confirm {kept}; the others are not shown.")
    return Headline(
        f"{gain} ± {error} nats per image",
        "Heterogeneity: so much better than one map does a model with states predict images that it has never seen.",
        (*remarks, *_warned(found)),
    )


def _components_alone(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Where some components gain, although no density of their latents does."""
    if not found.get("gain_by_points"):
        return ()
    return (
        "Components alone predict the other half-set better than one map, but no density of their latents does: what "
        "they follow is no set of states.",
    )


def _warned(found: Mapping[str, Any]) -> tuple[str, ...]:
    warned = [str(one.get("what")) for one in entries(found, "follows") if one.get("warns") is True]
    return (f"Latents follow {', '.join(warned)}: see below.",) if warned else ()


def comparisons(summary: Mapping[str, Any]) -> list[Comparison]:
    """What else a resolution was read from, most telling first; not the curve of the headline."""
    kind, nyquist = kind_of(summary), nyquist_of(summary)
    curves: dict[str, dict[str, object]] = {}
    for key, value in _group(summary, "resolution").items():
        match = re.fullmatch(r"(.+)_(0\.\d+)", key)
        curve, threshold = match.groups() if match else (key, "")
        curves.setdefault(curve, {})[threshold] = value
    skipped = {"cross_validated_interval", "cross_validated"}
    if not kind.has_gaussians:  # the half maps are the back-projections
        skipped |= {"half_map_corrected", "backprojection_masked"}
    rows = []
    for curve in sorted(curves.keys() - skipped, key=lambda name: (*CURVES, name).index(name)):
        about = CURVES.get(curve, Measured(curve.replace("_", " "), "", ""))
        # cryoDRGN's shells end before Nyquist.
        ended = curve == "half_map_masked_cryodrgn" and curve in _group(summary, "limit").get("reached_by", ())
        values = {
            threshold: spacing(value, value if ended and isinstance(value, float) else nyquist)
            for threshold, value in curves[curve].items()
        }
        name = re.sub("^half maps", _MAPS[kind], about.name)
        if curve == "reference_masked" and isinstance(reference := _group(summary, "assessment").get("reference"), str):
            name = name.replace("the reference", reference)
        meaning = about.meaning if kind.has_gaussians else about.classical
        rows.append(Comparison(name, values.get("", values.get("0.143", "")), values.get("0.5", ""), meaning))
    return rows


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The verdict for a terminal."""
    first, nyquist = headline(summary), nyquist_of(summary)
    if first is None:
        return []
    opening = f"resolution: {first.number} ({first.measure})"
    if first.number == NOTHING:
        opening = f"{first.number}: {first.measure}"
    said = [opening, *(f"  {remark}" for remark in first.remarks)]
    if summary.get("evident") is not False:
        rows = comparisons(summary)
        ended = [row.name for row in rows if (row.lenient or row.strict).endswith(_OR_FINER)]
        shown = [
            f"  {row.name}: {row.lenient or row.strict}{'' if row.lenient else ' at 0.5'}"
            for row in rows
            if row.name not in ended
        ]
        if ended:
            shown.append(f"  at {LIMIT}: {'; '.join(ended)}")
        if shown:
            upper = "; half maps of Gaussians are upper limits" if kind_of(summary).has_gaussians else ""
            said += [f"to compare (FSC 0.143{upper}):", *shown]
    local, direction = summary.get("local_resolution"), summary.get("directional")
    if local is not None and (found := local["cross_validated"] or local["half_maps"]):
        fine, coarse = spacing(found["p5"], nyquist), spacing(found["p95"], nyquist)
        said.append(
            f"local resolution in the mask: at {LIMIT} in 95 % of it"
            if is_nyquist(found["p95"], nyquist)
            else f"local resolution in the mask: median {spacing(found['median'], nyquist)}, 90 % between {coarse} and "
            f"{fine}"
        )
    if direction is not None:
        factor = direction.get("sampling_compensation")
        said.append(
            f"Fourier slice correlation {direction['fslc_mean']:.3f} ± {direction['fslc_std']:.3f}"
            + (f", sampling compensation {factor:.2f}" if factor else "")
        )
    return said


_MAPS = {
    Kind.ONE_PASS: "half maps of the Gaussians",
    Kind.IMAGES: "half maps of the Gaussians",
    Kind.CLASSICAL: "classical half maps",
    Kind.HALF_MAPS: "half maps",
    Kind.CHECK: "classical half maps",
    Kind.NULL_TESTS: "half maps",
    Kind.STATES: "half maps",
}
_CROSS_VALIDATED = (
    "cross-validated FSC 0.5: the Gaussians of each half against the plain back-projection of the other; the number "
    "to quote"
)
_NOTHING = (
    "no particle was found in the images: the two half-sets, classically back-projected, do not agree beyond the "
    "first shells"
)
_END_OF_DATA = (
    "The curve ends there above 0.5: the back-projections agree no further, so the data cannot show more. The map may "
    "be somewhat finer."
)


def _group(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside the summary; empty where it is absent or something else."""
    found = summary.get(name)
    return found if isinstance(found, Mapping) else {}


def _interval(summary: Mapping[str, Any]) -> str:
    """The 95 % interval of the cross-validated resolution, coarse end first; without a width where it has none that the
    shells of the FSC could show."""
    match _group(summary, "resolution").get("cross_validated_interval"):
        case [float() | int() as one, float() | int() as other]:
            nyquist = nyquist_of(summary)
            coarse, fine = (spacing(end, nyquist) for end in (max(one, other), min(one, other)))
            bounded = not is_nyquist(min(one, other), nyquist)
            if coarse == fine:
                return f"95 % interval: {'within one shell, at ' * bounded}{fine}{' at both ends' * (not bounded)}."
            narrow = bounded and _in_one_shell(one, other, summary)
            return f"95 % interval: {coarse} to {fine}{', within one shell' * narrow}."
        case _:
            return ""


def _shared(summary: Mapping[str, Any]) -> str:
    """What the poses of a refinement share between the half-sets."""
    found = _group(summary, "refinement")
    shared, shell = found.get("shared_to"), found.get("shared_shell")
    if isinstance(shared, int | float) and isinstance(shell, int):
        return (
            f"The half-sets share shells up to {shell}: the poses that were given were found with one map of "
            f"{shared:g} Å. No resolution counts these."
        )
    if found.get("half_sets_known_to_poses") is False:
        return (
            "The poses that were given were refined without these half-sets; what noise of both they have aligned to "
            "one map no comparison of the halves can see."
        )
    return ""


def _in_one_shell(one: float, other: float, summary: Mapping[str, Any]) -> bool:
    """Whether two spacings lie between the same two shells."""
    match _group(summary, "input"):
        case {"box": int() as box, "pixel_size": float() | int() as pixel_size} if one > 0 and other > 0:
            first, second = (box * pixel_size / end for end in (one, other))
            return math.ceil(max(first, second) - 1e-3) - math.floor(min(first, second) + 1e-3) <= 1
        case _:
            return False


def _coarse_pixels(summary: Mapping[str, Any], nyquist: float | None) -> str:
    """What to do about a resolution that is the limit of the pixel size."""
    brought = [name for name in ("box", "pixel_size") if _group(summary, "options").get(name)]
    remedy = "extract the particles again with smaller pixels (less binning)"
    if brought:
        remedy = f"run again without --{' or --'.join(brought).replace('_', '-')}, or {remedy}"
    return (
        f"This is {LIMIT}, 2 × {(nyquist or 0) / 2:.4g} Å, and no property of the map: the curve "
        f"has not fallen to its threshold there. To see more, {remedy}."
    )
