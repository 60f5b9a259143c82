"""The explorer of a heterogeneous run: one HTML page in which the molecule follows the pointer through latent space.

The numbers of the decoder and of the particles lie in the page, and its script decodes (``assets/decoder.js`` is
`emsplat.models.decoder` once more). Nothing is fetched. Arrays travel as base64 of little-endian numbers: as float32
what decides where a Gaussian is, as 16-bit numbers between the ends of each column what tolerates 1.5e-5 of its range.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.files import replacing

_Array = NDArray[Any]
_LEVELS = 2**16 - 1
_SCRIPTS = ("numbers.js", "decoder.js", "surface.js", "molecule.js", "latents.js", "explorer.js")


@dataclass(frozen=True)
class DecoderNumbers:
    """What a fitted decoder consists of, with the names, shapes and units of `emsplat.models.decoder.Decoder`.

    ``half`` is 1 or 2, or 0 for a model of all particles. Its own latent is ``frame[:, :-1] @ z + frame[:, -1]`` for
    the latent z of the page; None where they are the same.
    """

    centre: _Array  # (g, 3), in units of `length`
    width: _Array  # (g,), log of σ in units of `length`
    amplitude: _Array  # (g,), before softplus
    logits: _Array  # (g, p)
    bend: _Array  # (g, k, 3)
    change: _Array  # (g, l)
    weights: Sequence[_Array]  # of the trunk's three layers
    biases: Sequence[_Array]
    length: float  # Å
    unit: float
    half: int = 0
    frame: _Array | None = None  # (own q, q + 1)
    part: _Array | None = None  # (g,), from 0: what it is shown as; None: the part that it belongs to most

    @property
    def own_latents(self) -> int:
        """Numbers of its own latent."""
        return int(np.shape(self.weights[0])[1])


@dataclass(frozen=True)
class ParticleNumbers:
    """The particles in the order of the input; latents of both halves in the one frame of the page."""

    row: _Array  # (n,), counted from 1
    half: _Array  # (n,), 1 or 2, or 0
    latent: _Array  # (n, q)
    gain: _Array  # (n,), nats
    cluster: _Array | None = None  # (n,), whole numbers from 0
    defocus: _Array | None = None  # (n,), Å
    micrograph: _Array | None = None  # (n,), whole numbers
    grey: _Array | None = None  # (n,), grey scale relative to the average
    copy: _Array | None = None  # (n,), counted from 1: which copy of the row under a symmetry

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class StateNumbers:
    """A state with a name: where it is, how much of the particles, how well it is resolved."""

    name: str
    latent: _Array  # (q,)
    population: float  # a fraction of 1
    interval: tuple[float, float] | None = None  # of the population, 95 %
    resolution: float | None = None  # Å


@dataclass(frozen=True)
class ExplorerNumbers:
    """All that the page shows. ``points`` and ``weights`` are the density of the latents, ``consensus`` the latent that
    displacements and differences are counted from; ``facts`` and ``warnings`` are lines of text for the head."""

    name: str
    decoders: Sequence[DecoderNumbers]
    particles: ParticleNumbers
    points: _Array  # (m, q)
    weights: _Array  # (m,)
    consensus: _Array  # (q,)
    states: Sequence[StateNumbers] = ()
    facts: Sequence[str] = ()
    warnings: Sequence[str] = ()
    principal: _Array | None = None  # (q, q), rows: places along what changes maps most; None: variances of latents


def write_explorer(path: Path, numbers: ExplorerNumbers) -> Path:
    """Write the page to ``path``; return it.

    Raises:
        InputError: arrays that do not belong together, or hold what is not finite.
        OutputError: the page cannot be written.
    """
    _check(numbers)
    assets = {
        file.name: file.read_text(encoding="utf-8") for file in (resources("emsplat.report") / "assets").iterdir()
    }
    # A "<" could end the script that holds the numbers.
    data = json.dumps(_encoded(numbers), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = "\n".join(assets[name] for name in _SCRIPTS)
    facts = html.escape(" · ".join(numbers.facts))
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in numbers.warnings)
    text = assets["explorer.html"].format(
        name=html.escape(numbers.name),
        facts=f"<p>{facts}</p>" * bool(facts),
        warnings=f'<ul class="warnings">{warnings}</ul>' * bool(warnings),
        style=assets["explorer.css"],
        data=data,
        library=assets["twgl.min.js"],
        script=f'(() => {{\n"use strict";\n{script}\n}})();',
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _encoded(numbers: ExplorerNumbers) -> dict[str, Any]:
    particles = numbers.particles
    columns = {
        "gain": _quantised(particles.gain),
        "cluster": _whole(particles.cluster),
        "defocus": _quantised(particles.defocus),
        "micrograph": _whole(particles.micrograph),
        "grey": _quantised(particles.grey),
        "copy": _whole(particles.copy),
    }
    return {
        "name": numbers.name,
        "decoders": [_encoded_decoder(own) for own in numbers.decoders],
        "particles": {
            "row": _whole(particles.row),
            "half": _whole(particles.half),
            "latent": _quantised(particles.latent),
            **{name: column for name, column in columns.items() if column is not None},
        },
        "points": _floats(numbers.points),
        "weights": _floats(numbers.weights),
        "consensus": _list(numbers.consensus),
        "principal": None if numbers.principal is None else [_list(row) for row in numbers.principal],
        "states": [
            {
                "name": state.name,
                "latent": _list(state.latent),
                "population": float(state.population),
                "interval": None if state.interval is None else _list(state.interval),
                "resolution": None if state.resolution is None else float(state.resolution),
            }
            for state in numbers.states
        ],
    }


def _encoded_decoder(own: DecoderNumbers) -> dict[str, Any]:
    return {
        "half": int(own.half),
        "length": float(own.length),
        "unit": float(own.unit),
        **{name: _floats(getattr(own, name)) for name in ("centre", "width", "amplitude", "logits")},
        "bend": _quantised(np.reshape(own.bend, (len(own.centre), -1))),
        "change": _quantised(own.change),
        "weights": [_floats(weight) for weight in own.weights],
        "biases": [_floats(bias) for bias in own.biases],
        "frame": None if own.frame is None else _floats(own.frame),
        "part": None if own.part is None else _whole(own.part),
    }


def _list(values: Any) -> list[float]:
    return [float(value) for value in values]


def _packed(kind: str, values: _Array) -> dict[str, Any]:
    return {"kind": kind, "shape": list(values.shape), "data": base64.b64encode(values.tobytes()).decode("ascii")}


def _floats(values: _Array) -> dict[str, Any]:
    return _packed("float32", np.ascontiguousarray(values, "<f4"))


def _whole(values: _Array | None) -> dict[str, Any] | None:
    return None if values is None else _packed("int32", np.ascontiguousarray(values, "<i4"))


def _quantised(values: _Array | None) -> dict[str, Any] | None:
    """16 bits for each number, between the smallest and the largest of its column."""
    if values is None:
        return None
    table = np.asarray(values, np.float64)
    low, high = (end(table, axis=0) if len(table) else np.zeros(table.shape[1:]) for end in (np.min, np.max))
    step = (high - low) / _LEVELS
    level = np.rint((table - low) / np.where(step > 0, step, 1)).astype("<u2")
    return _packed("uint16", level) | {"low": _list(np.atleast_1d(low)), "step": _list(np.atleast_1d(step))}


def _check(numbers: ExplorerNumbers) -> None:
    if not numbers.decoders:
        raise InputError("explorer: no decoder; expected one, or one for each half; fit one first")
    particles = numbers.particles
    latents = np.shape(particles.latent)[1] if np.ndim(particles.latent) == 2 else 0
    expected: list[tuple[str, Any, tuple[int | None, ...]]] = [
        ("latents of particles", particles.latent, (len(particles), latents or None)),
        ("points of the density", numbers.points, (None, latents)),
        ("weights of the density", numbers.weights, (len(numbers.points),)),
        ("latent of the consensus", numbers.consensus, (latents,)),
        *([] if numbers.principal is None else [("principal components", numbers.principal, (latents, latents))]),
        *((f"latent of state {state.name}", state.latent, (latents,)) for state in numbers.states),
    ]
    for name in ("row", "half", "gain", "cluster", "defocus", "micrograph", "grey", "copy"):
        if (column := getattr(particles, name)) is not None:
            expected.append((f"{name} of particles", column, (len(particles),)))
    for own in numbers.decoders:
        expected += _of_decoder(own, latents)
    for what, values, shape in expected:
        found = np.shape(values)
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
            wanted = " × ".join("any" if length is None else str(length) for length in shape)
            raise InputError(f"explorer: {what} have shape {found}; expected {wanted}; do they come from one run?")
        if not np.isfinite(np.asarray(values, np.float64)).all():
            raise InputError(f"explorer: {what} are not all finite; expected numbers; leave such particles out")
    for state in numbers.states:
        ends = (state.population, *(state.interval or ()), 0.0 if state.resolution is None else state.resolution)
        if not all(map(math.isfinite, ends)):
            raise InputError(f"explorer: state {state.name}: population or resolution is not finite; leave it out")


def _of_decoder(own: DecoderNumbers, latents: int) -> Iterator[tuple[str, Any, tuple[int | None, ...]]]:
    count, hidden = len(own.centre), len(own.biases[0])
    parts, bends, changes = np.shape(own.logits)[1], np.shape(own.bend)[1], np.shape(own.change)[1]
    outputs = 9 * parts + bends + changes
    sizes = [(hidden, own.own_latents), (hidden, hidden), (outputs, hidden + own.own_latents)]
    yield "centres of Gaussians", own.centre, (count, 3)
    yield "widths of Gaussians", own.width, (count,)
    yield "amplitudes of Gaussians", own.amplitude, (count,)
    yield "parts of Gaussians", own.logits, (count, parts)
    if own.part is not None:
        yield "parts that Gaussians are shown as", own.part, (count,)
    yield "displacements of Gaussians", own.bend, (count, bends, 3)
    yield "changes of Gaussians", own.change, (count, changes)
    for weight, bias, size in zip(own.weights, own.biases, sizes, strict=True):
        yield "weights of the decoder", weight, size
        yield "biases of the decoder", bias, size[:1]
    frame = np.eye(own.own_latents, latents + 1) if own.frame is None else own.frame
    yield "frame of the decoder", frame, (own.own_latents, latents + 1)
    if own.frame is None:
        yield "weights of the decoder's first layer", own.weights[0], (hidden, latents)
