"""The maps of a run folder measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emsplat import report
from emsplat.assessment.assess import assess
from emsplat.config import AssessConfig
from emsplat.granted import granted_cores
from emsplat.io.files import json_text
from emsplat.process import threads
from emsplat.report import verdict
from emsplat.run.aliases import link_results
from emsplat.run.files import FSC, REPORT, SUMMARY
from emsplat.run.folder import plain, read_summary, write_text
from emsplat.run.log import Log


def reassess(run: Path, config: AssessConfig, log: Log | None = None) -> dict[str, Any]:
    """Measures the maps of a run folder again, with another mask, a reference or another window; returns the summary.

    Raises:
        InputError: no finished run in the folder, or an option that does not fit it.
    """
    with threads(config.threads):
        return _reassess(run, config, log or Log())


def _reassess(run: Path, config: AssessConfig, log: Log) -> dict[str, Any]:
    summary = read_summary(run)
    shared = summary.get("refinement", {}).get("shared_to")
    measured = assess(run, config, log, diameter=summary.get("input", {}).get("diameter"), shared=shared)
    # Those of the run stay, those of the assessment before this one do not.
    outdated = summary.get("assessment", {}).get("warnings", [])
    kept = [text for text in summary.get("warnings", []) if text not in outdated]
    assessment = {**plain(config), "warnings": log.warnings}
    summary = summary | measured | {"assessment": assessment, "warnings": kept + log.warnings}
    write_text(run / SUMMARY, json_text(summary))
    log.line("drawing the figures and the report")
    report.write_report(run, log.step, config.threads or granted_cores().cores)
    link_results(run)
    for text in verdict.lines(summary):
        log.line(text)
    log.line(f"  FSC: {run / FSC}; report: {run / REPORT}")
    return summary
