"""Null tests: the same pipeline on particles that must not give a resolution, or none beyond a known one.

A method that fits a prior to noise reports detail wherever the two halves share the prior. Here the particles are
altered so that nothing true is left (noise), nothing beyond a spacing (phases), or nothing but the rotational average
(poses), and the table says which of the measures stay silent.
"""

from __future__ import annotations

import csv
import os
import platform
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.interpolate import BSpline
from torch import Tensor

from emsplat import __version__, report
from emsplat.assessment.curves import half_map_curves
from emsplat.assessment.maps import FIRST_SHELLS, read_run
from emsplat.config import ChoiceOptions, ImageOptions, NullTestConfig, ReconstructConfig
from emsplat.errors import InputError, OutputError
from emsplat.io.files import json_text, replacing
from emsplat.io.mrc import writing_stack
from emsplat.io.paths import say_folders
from emsplat.io.relion.write import write_table
from emsplat.maths.fourier import irfft, randomise_phases, rfft, shell_index, shell_radius
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.curves import crossing, resolution
from emsplat.measures.fsc import fsc_curve
from emsplat.particles.choose import open_stack
from emsplat.particles.stack import ParticleStack
from emsplat.programs.reconstruct import reconstruct
from emsplat.report.verdict import spacing
from emsplat.report.words import DECISIVE, NULL_MEASURES, SILENT
from emsplat.run.files import JOURNAL, NULL_RUN, NULL_TESTS, NULL_TESTS_TABLE
from emsplat.run.folder import write_text
from emsplat.run.journal import Begun, Journal, Part
from emsplat.run.log import Log
from emsplat.types import Grid

_POSE = ("AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst", "OriginYAngst", "OriginX", "OriginY")
_TOLERANCE = 2  # shells that interpolation and the mask carry detail across


@dataclass(frozen=True)
class Outcome:
    """What one test gave: resolutions in Å as the curves say (None: silent), and the one that the run reported."""

    name: str
    expected: str
    limit: float | None  # Å; None: nothing at all may be seen
    half_map_masked: float | None
    half_map_corrected: float | None
    backprojection_masked: float | None
    cross_validated: float | None
    reported: float | None

    def judged(self, measure: str) -> bool:
        """What a run reports of shuffled poses holds the rotational average, which both halves truly share."""
        return self.name != "unaltered" and (self.name, measure) != ("poses", "reported")

    def silent(self, measure: str) -> bool:
        """Whether a measure sees nothing finer than it may."""
        value = getattr(self, measure)
        return value is None or (self.limit is not None and value >= 0.999 * self.limit)

    @property
    def verdict(self) -> str:
        """What the decisive measures make of the test."""
        if self.name == "unaltered":
            return "FAILED" if self.reported is None else "has a resolution"
        return "passed" if all(self.silent(measure) for measure in DECISIVE if self.judged(measure)) else "FAILED"

    def cell(self, measure: str, nyquist: float) -> str:
        """What a measure gave, for a table."""
        value = getattr(self, measure)
        text = "none" if value is None else spacing(value, nyquist)
        if not self.judged(measure):
            return text
        return f"{text}, {'silent' if self.silent(measure) else 'NOT SILENT' if measure in DECISIVE else 'not silent'}"


def null_test(config: NullTestConfig, particles: Path, output: Path, log: Log | None = None) -> bool:
    """Runs the unaltered particles and the three tests, each in a folder of its own below ``output``.

    Up to ``config.particles`` are taken, evenly over the stack and from both half-sets. The altered images are written
    to disk, read by the same pipeline, and removed. ``nulltest.csv``, ``nulltest.json`` and ``report.html`` hold the
    table.

    "noise": Gaussian noise with each image's own radial spectrum. "phases": the phases of each image are random from
    ``config.randomise_from`` Å on. "poses": orientations and shifts change hands; what stays is the average over all
    rotations, which is taken out of the maps before they are judged; the first shells may see what is left of it.

    Returns whether the cross-validated resolution, which is the one to quote, stays silent where it must.

    Raises:
        InputError: the input or an option cannot be used; the unaltered particles give no resolution to be tested.
        OutputError: the folder is not empty or cannot be written.
    """
    log = log or Log()
    if output.exists() and any(output.iterdir()) and not config.reconstruct.run.overwrite:
        raise OutputError(f"{output}: is not empty; choose another with -o or start anew with --overwrite")
    stack = open_stack(config.reconstruct, particles)
    stack.require_one_grid()
    if config.randomise_from is not None:
        _shell_at(config.randomise_from, stack.grid)
    chosen = _choose(stack, config.particles)
    output.mkdir(parents=True, exist_ok=True)
    (output / JOURNAL).unlink(missing_ok=True)
    with log.to_the_end():
        log.journal = Journal(output)
        process = platform.node(), os.getpid()
        log.journal.add(Begun("emsplat nulltest", __version__, str(particles), False, *process))
        return _carry_out(config, particles, output, log, stack, chosen)


def _carry_out(
    config: NullTestConfig, particles: Path, output: Path, log: Log, stack: ParticleStack, chosen: ParticleStack
) -> bool:
    """The tests one after the other, and their table."""
    log.line(f"{len(stack):,} particles of {stack.table.name}; {say_folders(stack.table.folders)}")
    for note in stack.table.notes:
        log.line(f"  {note}")
    settings = _settings(config)
    outcomes = []
    from_shell = 0
    for name in ("unaltered", "noise", "phases", "poses"):
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another with -o") from error
        log.journal.add(Part(name, f"{name}: {len(chosen):,} particles"))
        log.line(f"--- {name}: {len(chosen):,} particles")
        star = _write(name, chosen, folder, from_shell, config.reconstruct.halves.seed)
        summary = reconstruct(settings, star, folder / NULL_RUN, Log(log.stream), name)
        (folder / "particles.mrcs").unlink()
        reported = summary["resolution"]["cross_validated"]
        if name == "unaltered":
            from_shell = _from_shell(config, chosen.grid, summary["resolution"], particles)
        shell = {"phases": from_shell + _TOLERANCE, "poses": FIRST_SHELLS}.get(name)
        limit = None if shell is None else chosen.grid.length / shell
        expected = "no resolution" if limit is None else f"none finer than {limit:.2f} Å"
        if name == "unaltered":
            expected = "a resolution"
        outcomes.append(_judge(name, expected, limit, folder / NULL_RUN, reported))
    passed = _report(outcomes, chosen.grid.length / (chosen.grid.size // 2), output, log)
    log.line(f"  report: {report.write_report(output)}")
    return passed


def _settings(config: NullTestConfig) -> ReconstructConfig:
    """Those of a reconstruction of the altered particles, which are bright and lie beside their STAR file."""
    own = config.reconstruct
    return replace(
        own,
        choice=ChoiceOptions(symmetry=own.choice.symmetry),
        images=ImageOptions(diameter=own.images.diameter),
        run=replace(own.run, add_statistics=(), overwrite=True, resume=False),
    )


def _choose(stack: ParticleStack, count: int) -> ParticleStack:
    """Evenly spread particles, as many of each half."""
    if count < 4:
        raise InputError(f"--particles {count}: expected at least 4, two in each half-set")
    half = stack.half
    places = []
    for number in (1, 2):
        own = (half == number).nonzero()[:, 0]
        places.append(own[torch.linspace(0, len(own) - 1, min(count // 2, len(own))).long()])
    return stack.take(torch.cat(places).sort().values)


def _from_shell(config: NullTestConfig, grid: Grid, found: dict[str, Any], particles: Path) -> int:
    """The first shell whose phases are made random."""
    spacing = config.randomise_from
    if spacing is None:
        reached = found["cross_validated"] or found["backprojection_masked"]
        if reached is None:
            raise InputError(
                f"{particles}: the unaltered particles give no resolution; expected some for the test with random "
                "phases; give --randomise-from, or take more particles"
            )
        spacing = 2 * reached
    return _shell_at(spacing, grid)


def _shell_at(spacing: float, grid: Grid) -> int:
    """
    Raises:
        InputError: there is no such shell, or none beyond it.
    """
    shell = round(grid.length / spacing) if spacing > 0 else 0
    if not 1 < shell < grid.size // 2 - _TOLERANCE:
        raise InputError(
            f"--randomise-from {spacing:g}: expected a spacing from {grid.nyquist:g} to {grid.length / 2:g} Å"
        )
    return shell


def _write(name: str, stack: ParticleStack, folder: Path, from_shell: int, seed: int) -> Path:
    """The altered particles as a stack and a STAR file beside it; images bright, normalised."""
    rng = torch.Generator().manual_seed(seed + 1)
    images, star = folder / "particles.mrcs", folder / "particles.star"
    once = stack.once()
    with writing_stack(images, len(once), stack.grid) as write:
        for batch in once.sequential(64):
            altered = batch.images
            if name == "noise":
                altered = _noise_like(altered, rng)
            elif name == "phases":
                altered = randomise_phases(altered, from_shell, rng)
            write(altered)
    table = stack.written_to([images])
    if name == "poses":
        order = torch.randperm(len(stack), generator=rng)
        table = replace(table, poses=table.poses[order])
    write_table(star, table, table.half, folder)
    return star


def _noise_like(images: Float[Tensor, "p y x"], rng: torch.Generator) -> Float[Tensor, "p y x"]:
    """White noise filtered to the radial power spectrum of each image."""
    size = images.shape[-1]
    shells = shell_index(size)
    flat, count = shells.flatten(), int(shells.max()) + 1
    power = torch.fft.rfft2(images).abs().square().flatten(1)
    mean = torch.zeros(len(images), count).index_add_(1, flat, power) / torch.bincount(flat, minlength=count)
    white = torch.fft.rfft2(torch.randn(images.shape, generator=rng)) / size
    noise: Tensor = torch.fft.irfft2(white * mean.sqrt()[:, shells], s=images.shape[-2:])
    return noise


def _judge(name: str, expected: str, limit: float | None, run: Path, reported: float | None) -> Outcome:
    """Resolutions as the curves of a run give them, before the run's own caution takes any back."""
    maps = read_run(run)
    halves, raw = maps.halves, maps.raw
    assert raw is not None  # noqa: S101 (reconstruct writes them)
    if name == "poses":
        halves, raw = _without_radial_part(halves), _without_radial_part(raw)
    curves = half_map_curves(halves, maps.grid, maps.mask)
    validation = CrossValidation(raw, maps.mask, maps.grid, maps.symmetry.order)
    return Outcome(
        name,
        expected,
        limit,
        resolution(curves["masked"], 0.143),
        resolution(curves["corrected"], 0.143),
        resolution(fsc_curve(*raw, maps.grid, maps.mask), 0.143),
        crossing(validation.curve(halves), 0.5),
        reported,
    )


def _without_radial_part(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two maps less their averages over all rotations about the centre.

    The transform of such an average is real and a function of |k| alone: a cubic spline with two knots per shell,
    fitted to the transform of each map.
    """
    size = len(pair[0])
    radius = shell_radius(size, 3).flatten().numpy()
    inner = np.arange(0, radius.max() + 0.5, 0.5)
    knots = np.concatenate([[0.0] * 3, inner, [inner[-1]] * 3])
    basis = BSpline.design_matrix(np.minimum(radius, inner[-1] - 1e-9), knots, 3)
    gram = (basis.T @ basis).toarray()
    gram += 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram))

    def rest(volume: Tensor) -> Tensor:
        spectrum = rfft(volume.double(), 3)
        profile = np.linalg.solve(gram, basis.T @ spectrum.real.flatten().numpy())
        radial = torch.from_numpy(basis @ profile).reshape(spectrum.shape)
        return irfft(spectrum - radial, 3).to(volume.dtype)

    return rest(pair[0]), rest(pair[1])


def _report(outcomes: list[Outcome], nyquist: float, output: Path, log: Log) -> bool:
    """The table, to the terminal and into the folder."""
    passed = all(one.verdict != "FAILED" for one in outcomes)
    aside = [name for name in NULL_MEASURES if name not in DECISIVE]
    lines = [("", [one.name for one in outcomes]), ("expected", [one.expected for one in outcomes])]
    lines += [(NULL_MEASURES[name], [one.cell(name, nyquist) for one in outcomes]) for name in aside]
    lines += [("to quote:", [])]
    lines += [(NULL_MEASURES[name], [one.cell(name, nyquist) for one in outcomes]) for name in DECISIVE]
    lines += [("verdict", [one.verdict for one in outcomes])]
    log.line("")
    for title, cells in lines:
        log.line(f"{title:<22}{''.join(f'{cell:<25}  ' for cell in cells)}".rstrip())
    log.line(f"{SILENT} Only the measures to quote decide.")
    loud = [
        NULL_MEASURES[measure]
        for measure in aside
        if not all(one.silent(measure) for one in outcomes if one.judged(measure))
    ]
    if passed:
        log.line("passed: the cross-validated resolution, which is the one to quote, stays silent where it must")
    else:
        log.line("FAILED: see the line of verdicts")
    if loud:
        log.line(f"  not silent, so upper limits at best: {'; '.join(loud)}")
    log.line(f"{log.seconds:.0f} s in all")
    rows = [{field.name: getattr(one, field.name) for field in fields(one)} for one in outcomes]
    silent = [{name: one.silent(name) for name in NULL_MEASURES if one.judged(name)} for one in outcomes]
    tests = [
        row | {"silent": found, "verdict": one.verdict} for row, found, one in zip(rows, silent, outcomes, strict=True)
    ]
    result = {"passed": passed, "tests": tests, "limit": {"nyquist": nyquist}}
    write_text(output / NULL_TESTS, json_text(result))
    with replacing(output / NULL_TESTS_TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return passed
