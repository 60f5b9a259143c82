"""Where the time of a run has gone, from its journal: a table, and a trace for the profiler of a browser.

The trace is in the format of Chrome's trace events (JSON), which about:tracing, Perfetto, Speedscope and Firefox's
profiler open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emsplat.io.files import replacing
from emsplat.run.files import TRACE
from emsplat.run.journal import Begun, Ended, Progress, Row, Spent, read_journal


@dataclass(frozen=True)
class Line:
    """All spans of one name within one other: how often, and what they took together."""

    name: str
    depth: int
    times: int
    seconds: float
    processor: float
    peak_mb: float  # after the last of them


def last_session(rows: Sequence[Row]) -> list[Row]:
    """The rows since a program last went to work on the folder."""
    begins = [number for number, row in enumerate(rows) if isinstance(row.what, Begun)]
    return list(rows[begins[-1] :] if begins else rows)


def spans(rows: Sequence[Row]) -> list[Spent]:
    """What was spent on what, in the order in which it began."""
    return sorted((row.what for row in rows if isinstance(row.what, Spent)), key=lambda one: (one.began, one.depth))


def time_line(rows: Sequence[Row]) -> list[Line]:
    """The spans with those of one name within the same other taken together."""
    lines: dict[tuple[str, ...], Line] = {}
    path: list[str] = []
    for one in spans(rows):
        path[one.depth :] = [one.name]
        before = lines.get(tuple(path), Line(one.name, one.depth, 0, 0.0, 0.0, 0.0))
        lines[tuple(path)] = Line(
            one.name,
            one.depth,
            before.times + 1,
            before.seconds + one.seconds,
            before.processor + one.processor,
            max(before.peak_mb, one.peak_mb),
        )
    return [lines[key] for key in _in_tree(list(lines))]


def _in_tree(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Each path before those within it, which follow it in the order in which they began."""
    place = {path: number for number, path in enumerate(paths)}
    return sorted(paths, key=lambda path: [place[path[: n + 1]] for n in range(len(path))])


def table(rows: Sequence[Row]) -> list[str]:
    """The time line as lines of text."""
    said = [f"{'where the time went':<44}{'seconds':>9}{'processor':>11}{'peak MB':>9}"]
    for line in time_line(rows):
        name = "  " * (line.depth + 1) + line.name + (f" ({line.times} times)" if line.times > 1 else "")
        said.append(f"{name:<44}{line.seconds:>9.2f}{line.processor:>11.2f}{line.peak_mb:>9,.0f}")
    said += [f"{'  in all':<44}{row.what.seconds:>9.2f}" for row in rows if isinstance(row.what, Ended)]
    return said


def trace(rows: Sequence[Row]) -> dict[str, Any]:
    """The trace events of a run: spans, and how far its passes have come."""
    found = spans(rows)
    zero = min((one.began for one in found), default=0.0)
    begun = next((row.what for row in rows if isinstance(row.what, Begun)), None)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "args": {"name": begun.program if begun is not None else "emsplat"}}
    ]
    for one in found:
        about = {"processor seconds": one.processor, "peak MB": one.peak_mb}
        times = {"ts": round(1e6 * (one.began - zero)), "dur": round(1e6 * one.seconds)}
        events.append({"ph": "X", "name": one.name, "tid": one.process, **times, "args": about})
    for row in rows:
        at = {"ts": round(1e6 * (row.time - zero))}
        if isinstance(row.what, Progress):
            events.append({"ph": "C", "name": row.what.name, **at, "args": {row.what.unit: row.what.done}})
        elif isinstance(row.what, Ended):
            events.append({"ph": "i", "s": "p", "name": row.what.how, **at})
    return {"traceEvents": [{"pid": 1, "tid": 0, **event} for event in events], "displayTimeUnit": "ms"}


def write_trace(folder: Path) -> list[str]:
    """Writes the trace of a run's last session into its folder; returns the `table` of it.

    Raises:
        InputError: the journal cannot be read.
        OutputError: the trace cannot be written.
    """
    rows = last_session(read_journal(folder))
    with replacing(folder / TRACE) as temporary:
        temporary.write_text(json.dumps(trace(rows)), encoding="utf-8")
    return table(rows)
