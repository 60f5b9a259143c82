"""Verdict, summary and report of a run folder whose maps are written."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from emsplat import report
from emsplat.assessment.assess import assess
from emsplat.config import AssessConfig, RunConfig
from emsplat.device import device_name, peak_device_memory
from emsplat.io.files import json_text
from emsplat.io.particles import count_stacks
from emsplat.parallel import ALONE, World
from emsplat.particles.choose import with_boxes
from emsplat.particles.copies import copies
from emsplat.programs.opening import half_sets_from
from emsplat.programs.run import Fits, Run
from emsplat.programs.shown import hide_slices
from emsplat.report import verdict
from emsplat.run.aliases import name_results
from emsplat.run.files import (
    FSC,
    FSC_FIGURE,
    FULL_MAP,
    HALF_MAPS,
    REPORT,
    SUMMARY,
    course_name,
    statistics_name,
)
from emsplat.run.folder import finished_summary, plain, write_text
from emsplat.run.log import Log, data_size, peak_memory

_PACKAGES = ("emsplat", "torch", "numpy", "scipy", "gemmi", "mrcfile")


def exit_code(summary: dict[str, Any]) -> int:
    """1 where the particles do not have the symmetry of the run and ``force`` does not say that this is meant."""
    symmetry = summary.get("symmetry")
    return int(symmetry is not None and symmetry["verdict"] == "wrong" and not summary["options"]["force"])


def found_finished(
    config: RunConfig, particles: Path, output: Path, log: Log, world: World = ALONE
) -> dict[str, Any] | None:
    """The summary of the run that ``resume`` asks for, with a word, where nothing is left of it to do; an empty one in
    processes that have no folder.

    Raises:
        InputError: the folder holds no such run.
    """
    summary = finished_summary(config, particles, output) if world.first else None
    if not world.agree(summary is not None):
        return None
    if summary is None:
        return {}
    log.line(
        f"{output}: this run is finished, nothing is left to resume and nothing was done; `emsplat report` draws its "
        "page again, --overwrite starts anew"
    )
    for text in verdict.lines(summary):
        log.line(text)
    _say_results(log, output)
    return summary


def finish(
    run: Run[RunConfig],
    coverage: float,
    fits: Fits | None = None,
    altered: str | None = None,
    refinement: dict[str, Any] | None = None,
    abinitio: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Verdict, summary and report of a run folder whose maps are written. ``coverage`` is that of its `Classical`,
    which should be gone by now: the assessment reads as many maps again. ``altered`` as in `reconstruct`;
    ``refinement`` says what was done to the poses, ``abinitio`` how they were found."""
    log, folder = run.log, run.folder
    run.go_on_alone()
    hide_slices(folder)
    told = len(log.warnings)
    with log.part("assessment", "assessing the maps: FSC, local resolution, directions"):
        shared = None if refinement is None else refinement["shared_to"]
        measured = assess(folder, AssessConfig(), log, diameter=run.stack.diameter, shared=shared)
    for path in folder.glob(course_name("*")):
        path.unlink()
    if not run.config.run.keep_statistics:
        for path in folder.glob(statistics_name("half?", "*")):
            path.unlink()
    summary = measured | _found(run, coverage, fits) | circumstances(run)
    summary |= {} if refinement is None else {"refinement": refinement}
    summary |= {} if abinitio is None else {"abinitio": abinitio}
    summary |= {"assessment": {"warnings": log.warnings[told:]}} | ({} if altered is None else {"altered": altered})
    write_text(folder / SUMMARY, json_text(summary))
    with log.part("report", "drawing the figures and the report"):
        report.write_report(folder, log.step, torch.get_num_threads())
    # That of the whole nobody knows before the page is drawn.
    summary["seconds"] = round(log.seconds, 1)
    write_text(folder / SUMMARY, json_text(summary))
    _conclude(run, summary)
    return summary


def _found(run: Run[RunConfig], coverage: float, fits: Fits | None) -> dict[str, Any]:
    """What the run has found out, beside what is measured on its maps."""
    return {
        "input": describe(run),
        "coverage": round(coverage, 4),
        "fits": {} if fits is None else {name: fitted.about for name, fitted in fits.by_name.items()},
        "course": [] if fits is None else [asdict(stage) for stage in fits.stages],
        "residual": None if fits is None else fits.residual,
        "examples": [] if fits is None else list(fits.examples),
        "settings": {} if fits is None else plain(fits.settings),
        "symmetry": None if run.finding is None else asdict(run.finding),
    }


def circumstances(run: Run[RunConfig]) -> dict[str, Any]:
    """With what, where and how long it was run, and what was said on the way."""
    log, device = run.log, run.stack.device
    peak = peak_device_memory(device)
    return {
        "options": plain(run.config),
        "seconds_of_parts": log.parts,
        "peak_memory_mb": round(peak_memory()),
        "device": device_name(device),
        **({} if peak is None else {"peak_gpu_memory_mb": round(peak)}),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "estimated": None if run.estimate is None else run.estimate.about(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "warnings": log.warnings,
        "notes": list(run.stack.table.notes),
    }


def what_it_took(run: Run[RunConfig], summary: dict[str, Any]) -> str:
    """Time, memory and disk, beside what was expected."""
    files = [path.lstat().st_size for path in run.folder.rglob("*") if path.is_file()]
    expected = "" if run.estimate is None else f" (estimated: {run.estimate.text})"
    took = f"{summary['seconds']:.0f} s in all, {summary['peak_memory_mb']:,} MB at most"
    return f"{took}, {data_size(sum(files))} on disk{expected}"


def describe(run: Run[RunConfig]) -> dict[str, Any]:
    """The particles as they were used."""
    stack, table = run.stack, run.stack.table
    found = copies(table.take(stack.rows), stack.symmetry)
    optics, shift = table.optics[stack.rows], table.poses.shift[stack.rows]
    defocus = 0.5 * (optics.defocus_u + optics.defocus_v)
    return {
        "file": str(run.particles.absolute()),
        "particles": len(stack),
        "half_sets": [int((stack.half == h).sum()) for h in (1, 2)],
        "half_sets_from": half_sets_from(table, run.config),
        "images": found.images,
        "repeated_rows": found.rows,
        "repeated_particles": found.again,
        "left_out_rows": table.left_out,
        "symmetry_expanded": None if found.expansion is None else found.expansion.symbol,
        "close_to_other_half": found.close,
        "optics_groups": len(table.groups),
        "stacks": count_stacks(table.take(stack.rows)),
        "image_folders": [str(folder) for folder in table.folders],
        "micrographs": len(torch.unique(table.micrograph[stack.rows])),
        "box": stack.grid.size,
        "pixel_size": stack.grid.pixel_size,
        "diameter": round(stack.diameter, 2),
        "contrast": "inverted" if stack.sign < 0 else "bright protein",
        "defocus_range": [round(float(defocus.min())), round(float(defocus.max()))],
        "shift_rms": round(float(shift.square().sum(1).mean().sqrt()), 3),
        "symmetry_elements": stack.symmetry.order,
        "skipped_rows": list(run.skipped),
    }


def _conclude(run: Run[RunConfig], summary: dict[str, Any]) -> None:
    log = run.log
    for text in [*verdict.lines(summary), *_said_again(summary["warnings"])]:
        log.line(text)
    log.line(what_it_took(run, summary))
    _say_results(log, run.folder)
    if run.config.run.naming != "relion":
        name_results(run.folder, run.config.run.naming, with_boxes(run.stack.table.take(run.stack.rows)), log)
    if exit_code(summary):
        log.line(
            f"exit code 1: not of symmetry {run.stack.symmetry.symbol}, and --force does not say that this is meant"
        )


def _say_results(log: Log, output: Path) -> None:
    for what, name in (
        ("map", FULL_MAP),
        ("half maps", " and ".join(HALF_MAPS)),
        ("FSC", f"{FSC}, {FSC_FIGURE}"),
        ("report", REPORT),
    ):
        log.line(f"  {what}: {output / name}")


def _said_again(warnings: list[str]) -> list[str]:
    """All warnings of a run again at its end, beside the numbers that they concern."""
    return ["warnings of this run:", *(f"  {text}" for text in dict.fromkeys(warnings))] if warnings else []
