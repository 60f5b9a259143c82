"""One run while it works: what its journal, its summary and its log say so far."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from emsplat.errors import InputError
from emsplat.report import figures, page, read, verdict, words
from emsplat.report.figures import LINE_WIDTH, LINES, FscCurve, FscPanel
from emsplat.run import files
from emsplat.run.journal import (
    Begun,
    Ended,
    Following,
    Foreseen,
    Gained,
    Judged,
    Loss,
    Part,
    Progress,
    Resolved,
    Rewound,
    Row,
    Scored,
    Warned,
    What,
    takes_back,
)
from emsplat.viewer.folders import has_file, read_file
from emsplat.viewer.pictures import Picture, pictures_of

T = TypeVar("T")
_FRESH = 10.0  # seconds since the last row in which a run is at work, whatever is known of its process
_TRUST = 0.1  # of the whole estimate, which counts beside what finished parts took
_QUIET = 15 * 60.0  # seconds without a row after which one whose process cannot be asked is taken for stopped
_DAY = 86400.0
_POINTS = 500  # of a curve; more cannot be seen
_LOG = 2**16  # bytes of run.log that are shown, and lines
_LINES = 200
_PARTS = {
    "reconstruct": ("accumulation", "fits", "residuals", "assessment", "report"),
    "backproject": ("accumulation", "assessment", "report"),
    "refine": ("rounds", "fits", "residuals", "assessment", "report"),
    "abinitio": ("reading", "starts", "poses", "accumulation", "assessment", "report"),
    "heterogeneity": ("reading", "linear stage", "decoder", "latents", "states", "report"),
    "nulltest": ("unaltered", "noise", "phases", "poses"),
}
# How a run may stand, and what else is to be said of that.
STATUS = {
    "running": "",
    "finished": "",
    "interrupted": "--resume goes on with it",
    "failed": "",
    "stopped": "its process is gone; --resume goes on with it",
    "quiet": "nothing was heard of it for a while, and its process cannot be asked from here",
}
_PAGES = {files.REPORT: "Report", files.EXPLORER: "Explorer of the states"}


@dataclass
class _Pass:
    """A pass or a fit on its way: where it was when it was first heard of, and where it is."""

    name: str
    total: int
    unit: str
    first: tuple[float, int]
    last: tuple[float, int]
    remark: str

    @property
    def rate(self) -> float | None:
        """How many a second."""
        seconds, done = self.last[0] - self.first[0], self.last[1] - self.first[1]
        return done / seconds if seconds > 0.5 and done > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds to its end, counted from the last row."""
        return None if self.rate is None else max(self.total - self.last[1], 0) / self.rate


class Watched:
    """A run folder below ``root``. `refresh` reads what was added; the rest tells what is known, as JSON has it."""

    def __init__(self, root: Path, folder: str) -> None:
        self.root, self.folder = root, folder
        self.key = hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
        self.path = root / folder
        self.name = shown_name(folder or root.name or "/")
        self._following = Following(self.path / files.JOURNAL)
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._forget()

    def _forget(self) -> None:
        self._begun: Row | None = None
        self._ended: Ended | None = None
        self._first = self._last = math.nan
        self._parts: list[tuple[float, Part]] = []
        self._expected: dict[str, Foreseen] = {}
        self._pass: _Pass | None = None
        self._of_fits: list[What] = []
        self._gained: dict[tuple[str, int], Gained] = {}
        self._warnings: dict[str, None] = {}

    # What is known

    def refresh(self) -> None:
        """Reads what was added to the journal."""
        if not has_file(self.root, self.folder, files.JOURNAL):
            return
        try:
            anew, rows = self._following.new_rows()
        except InputError as error:
            self._following.problem = str(error).partition(";")[0]
            return
        if anew:
            self._forget()
        for row in rows:
            self._take(row)

    def _take(self, row: Row) -> None:
        what = row.what
        if math.isfinite(row.time):
            self._first = row.time if math.isnan(self._first) else self._first
            self._last = row.time
        match what:
            case Begun():
                self._begun, self._ended, self._pass = row, None, None
                self._parts, self._expected = [], {}
            case Part():
                self._parts.append((row.time, what))
                self._pass = None
            case Foreseen():
                self._expected[what.name] = what
            case Progress():
                self._progress(row.time, what)
            case Gained():
                self._gained[what.by, what.count] = what
            case Warned():
                self._warnings[what.text] = None
            case Ended():
                self._ended = what
            case Rewound():
                self._of_fits = [one for one in self._of_fits if not takes_back(what, one)]
            case Judged() if not what.kept:
                # The fits are again what they were after the stage before.
                kept = max((one.step for one in self._of_fits if isinstance(one, Judged)), default=0)
                taken_back = Rewound(what.fit, kept)
                self._of_fits = [
                    one for one in self._of_fits if not (isinstance(one, Resolved) and takes_back(taken_back, one))
                ]
            case Loss() | Scored() | Judged() | Resolved():
                self._of_fits.append(what)

    def _progress(self, now: float, what: Progress) -> None:
        here, before = (now, what.done), self._pass
        if before is None or before.name != what.name or before.total != what.total or what.done < before.last[1]:
            self._pass = _Pass(what.name, what.total, what.unit, here, here, what.remark)
        else:
            before.last, before.remark = here, what.remark

    @property
    def status(self) -> str:
        """A key of `STATUS`."""
        if self._ended is not None:
            return self._ended.how if self._ended.how in STATUS else "failed"
        if self._begun is None:
            return "finished" if self._summary() else "quiet"
        silent = time.time() - self.changed
        if silent < _FRESH:
            return "running"
        begun = self._begun.what
        assert isinstance(begun, Begun)  # noqa: S101 (for the types)
        if begun.process and begun.host == platform.node():
            return "running" if is_alive(begun.process, self._begun.time) else "stopped"
        return "running" if silent < _QUIET else "quiet"

    @property
    def is_open(self) -> bool:
        """Whether it may go on at any moment: it has begun and not ended, and was heard of within a day."""
        return self._begun is not None and self._ended is None and time.time() - self.changed < _DAY

    @property
    def changed(self) -> float:
        """When it was last heard of, seconds since 1970; 0 where that is not known."""
        if math.isfinite(self._last):
            return self._last
        return self._following.changed or self._modified(files.SUMMARY) or 0.0

    @property
    def program(self) -> str:
        """Its command, as "reconstruct"; of a folder without a journal what its summary says."""
        if self._begun is not None and isinstance(self._begun.what, Begun):
            return self._begun.what.program.removeprefix("emsplat ")
        config = self.settings()
        return str(config.get("command", "")) or ("nulltest" if has_file(self.path, files.NULL_TESTS) else "")

    def settings(self) -> Mapping[str, Any]:
        """What is in config.toml; nothing where it cannot be read."""
        return self._keep(files.SETTINGS, lambda: tomllib.loads(self._text(files.SETTINGS)), {})

    def _summary(self) -> Mapping[str, Any]:
        for name in files.SUMMARIES:
            found = self._keep(name, partial(self._json, name), None)
            if isinstance(found, dict) and found:
                return found
        return {}

    def _json(self, name: str) -> Any:
        return json.loads(self._text(name))

    def _text(self, name: str) -> str:
        return read_file(self.root, self.folder, name).decode("utf-8", "replace")

    def _keep(self, name: str, make: Callable[[], T], otherwise: T) -> T:
        """What was made of a file, until that has changed."""
        modified = self._modified(name)
        if modified is None:
            return otherwise
        if name not in self._kept or self._kept[name][0] != modified:
            try:
                made: Any = make()
            except (InputError, ValueError, RecursionError):
                made = otherwise  # half written: it is read again once it has changed
            self._kept[name] = (modified, made)
        value: T = self._kept[name][1]
        return value

    def _modified(self, name: str) -> float | None:
        try:
            status = (self.path / name).lstat()
        except OSError:
            return None
        return status.st_mtime + status.st_size * 1e-12

    # What is told

    def headline(self) -> dict[str, Any] | None:
        """The resolution so far, or the number of a finished run, with what it is and whether that is final."""
        summary = self._summary()
        try:
            final = self._final(summary) if summary else None
        except (InputError, TypeError, KeyError, ValueError):
            final = None  # a damaged summary: the report says what is wrong with it
        if final is not None:
            return final
        for one in reversed(self._of_fits):
            if isinstance(one, Resolved):
                name = words.CURVE_NAMES.get(one.curve, one.curve)
                number = verdict.spacing(one.resolution, 2 * one.length / max(2 * (len(one.values) - 1), 1))
                return {"number": number, "measure": f"so far: {name}, FSC {one.threshold:g}", "final": False}
        return None

    def _final(self, summary: Mapping[str, Any]) -> dict[str, Any] | None:
        kind = verdict.kind_of(summary)
        if kind is verdict.Kind.STATES:
            first: verdict.Headline | None = verdict.states_headline(read.group(summary, "heterogeneity"))
        elif kind is verdict.Kind.NULL_TESTS:
            first = verdict.Headline("passed" if summary.get("passed") is True else "failed", "null tests")
        elif kind is verdict.Kind.CHECK:
            found = [str(one.get("verdict")) for one in read.entries(summary, "items")]
            worst = next((word for word in ("wrong", "look") if word in found), "ok")
            first = verdict.Headline(worst, f"check of the input: {len(found)} items")
        else:
            first = verdict.headline(summary)
        if first is None:
            return None
        return {"number": first.number, "measure": first.measure, "remarks": list(first.remarks), "final": True}

    def warnings(self) -> list[str]:
        """What the run has warned of, and what is wrong with its journal."""
        found = dict(self._warnings)
        told = self._summary().get("warnings")
        found |= dict.fromkeys(one for one in (told if isinstance(told, list) else []) if isinstance(one, str))
        if self._following.problem:
            found[f"The journal is damaged, and what can be read of it is shown. {self._following.problem}"] = None
        return [shown_name(text) for text in found]

    def row(self) -> dict[str, Any]:
        """What the list of runs shows."""
        status = self.status
        return {
            "key": self.key,
            "name": self.name,
            "program": shown_name(self.program),
            "status": status,
            "status_text": STATUS[status],
            "began": finite(self._first if self._begun is None else self._begun.time),
            "changed": finite(self.changed),
            "seconds": finite(self._ended.seconds) if self._ended else None,
            "part": self._parts[-1][1].name if self._parts and status == "running" else "",
            "progress": self._progress_json() if status == "running" else None,
            "left": finite(self.left()) if status == "running" else None,
            "headline": self.headline(),
            "warnings": len(self.warnings()),
            "report": self.pages()[0]["url"] if self.pages() and status != "running" else None,
        }

    def _progress_json(self) -> dict[str, Any] | None:
        now = self._pass
        if now is None or now.total <= 0:
            return None
        return {
            "name": fit_names(now.name),
            "done": now.last[1],
            "total": now.total,
            "unit": now.unit,
            "remark": now.remark,
            "rate": finite(now.rate),
            "left": finite(now.left),
            "at": finite(now.last[0]),
        }

    def _took(self) -> dict[str, float]:
        """Seconds that the parts of each name have taken so far."""
        times = [when for when, _ in self._parts] + [self._last]
        took: dict[str, float] = {}
        for number, (when, part) in enumerate(self._parts):
            seconds = times[number + 1] - when
            took[part.name] = took.get(part.name, 0.0) + (max(seconds, 0.0) if math.isfinite(seconds) else 0.0)
        return took

    def left(self) -> float | None:
        """Seconds to the end of the run, counted from the last row: what parts to come are expected to take, by how
        those that are done compare with what was expected of them."""
        if not self._expected or not self._parts:
            return None
        took, expected = self._took(), list(self._expected.values())
        now = max((one.turn for one in expected if one.name in took), default=-1)
        past = [one for one in expected if one.turn < now and one.name in took]
        trust = _TRUST * sum(one.seconds for one in expected)
        pace = (sum(took[one.name] for one in past) + trust) / (sum(one.seconds for one in past) + max(trust, 1e-9))
        rest = sum(max(pace * one.seconds - took.get(one.name, 0.0), 0.0) for one in expected if one.turn == now)
        to_come = sum(pace * one.seconds for one in expected if one.turn > now)
        passing = self._pass.left if self._pass is not None else None
        return max(rest, passing or 0.0) + to_come

    def pages(self) -> list[dict[str, str]]:
        """Pages that the run has written."""
        return [
            {"name": title, "url": f"/files/{self.key}/{name}"}
            for name, title in _PAGES.items()
            if has_file(self.root, self.folder, name)
        ]

    def detail(self) -> dict[str, Any]:
        """What the page of a run shows."""
        began = self._begun.what if self._begun is not None else None
        return self.row() | {
            "particles": shown_name(began.particles) if isinstance(began, Begun) else "",
            "version": began.version if isinstance(began, Begun) else "",
            "resumed": isinstance(began, Begun) and began.resumed,
            "host": shown_name(began.host) if isinstance(began, Begun) else "",
            "why": shown_name(self._ended.text) if self._ended else "",
            "facts": [shown_name(fact) for fact in page.facts_of(self._summary())],
            "parts": self._part_list(),
            "warned": self.warnings(),
            "pages": self.pages(),
            "panels": self.panels(),
            "pictures": [one.described(self.key) for one in self.pictures()],
            "log": self.log(),
            "settings": settings_rows(self.settings()),
        }

    def _part_list(self) -> list[dict[str, Any]]:
        """Parts that have begun with the seconds that they took, and those that are still to come."""
        parts: dict[str, dict[str, Any]] = {}
        took = self._took()
        for _, part in self._parts:
            own = parts.setdefault(part.name, {"name": part.name, "seconds": took[part.name], "state": "done"})
            own["text"] = shown_name(part.text)
        shown = list(parts.values())
        status = self.status
        if self._parts and status != "finished":
            parts[self._parts[-1][1].name]["state"] = "now" if status == "running" else "ended"
        if status != "finished":
            last = self._parts[-1][1].name if self._parts else ""
            expected = _PARTS.get(self.program, ())
            after = expected[expected.index(last) + 1 :] if last in expected else expected if not shown else ()
            shown += [
                {"name": name, "text": "", "seconds": None, "state": "to come"} for name in after if name not in parts
            ]
        return shown

    def log(self) -> list[str]:
        """The last lines of run.log."""

        def lines() -> list[str]:
            text = read_file(self.root, self.folder, files.LOG, most=_LOG).decode("utf-8", "replace")
            return text.splitlines()[-_LINES:]

        return self._keep(files.LOG, lines, [])

    def pictures(self) -> list[Picture]:
        """Maps that there are slices of."""
        return pictures_of(self.root, self.folder)

    # Curves

    def panels(self) -> list[dict[str, Any]]:
        """Plots: the FSC, the gain on the other half, the score after each epoch, the loss."""
        own = [_fsc_json(panel) for panel in self.fsc_panels()]
        gains = self.gains()
        if gains:
            curves = [curve_of_points(name, points, place) for place, (name, points) in enumerate(gains.items())]
            own.append(panel_json("gains", "Gain on the other half", "how many", "nats per image", curves))
        scores = self.scores()
        if scores:
            curves = [
                curve_of_points(fit_names(name), points, place) for place, (name, points) in enumerate(scores.items())
            ]
            own.append(panel_json("scores", "Score", "epoch", "mean cross-validated FSC", curves))
        losses = self.losses()
        if losses:
            curves = [
                curve_of_points(fit_names(name), points, place) for place, (name, points) in enumerate(losses.items())
            ]
            own.append(panel_json("loss", "Loss", "step", "loss, running mean", curves))
        return own

    def gains(self) -> dict[str, list[tuple[float, float]]]:
        """What numbers of components, and of points, say of images of the other half."""
        found: dict[str, list[tuple[float, float]]] = {}
        for one in self._gained.values():
            found.setdefault(f"by {one.by}", []).append((one.count, one.gain))
        return {name: thinned(sorted(points)) for name, points in found.items()}

    def scores(self) -> dict[str, list[tuple[float, float]]]:
        """Epoch and mean cross-validated FSC of each fit."""
        found: dict[str, list[tuple[float, float]]] = {}
        for one in self._of_fits:
            if isinstance(one, Scored):
                points = found.setdefault(one.fit, [])
                points.append((len(points) + 1, one.score))
        return {name: thinned(points) for name, points in found.items()}

    def losses(self) -> dict[str, list[tuple[float, float]]]:
        """Step and loss of each fit, averaged over a fortieth of it."""
        found: dict[str, list[Loss]] = {}
        for one in self._of_fits:
            if isinstance(one, Loss):
                found.setdefault(one.fit, []).append(one)
        smooth = {
            name: figures.running_mean([one.loss for one in rows], max(1, len(rows) // 40))
            for name, rows in found.items()
        }
        return {
            name: thinned([(one.step, loss) for one, loss in zip(rows, smooth[name], strict=True)])
            for name, rows in found.items()
        }

    def fsc_panels(self) -> list[FscPanel]:
        """The curves of a finished run; of one on its way those of its journal."""
        if has_file(self.root, self.folder, files.FSC) and (self._summary() or not self._resolved()):
            panels: list[FscPanel] = self._keep(files.FSC, lambda: figures.fsc_panels(self.path), [])
            if panels:
                return panels
        return self._panels_so_far()

    def _resolved(self) -> list[Resolved]:
        return [one for one in self._of_fits if isinstance(one, Resolved) and len(one.values) > 2]

    def _panels_so_far(self) -> list[FscPanel]:
        """The last curve of each name, and where there are several also the first."""
        titles = {
            "cross_validated": ("against the truth, so far", "correlation with the truth (FSC)"),
            "backprojection": ("between classical half maps, so far", "FSC between half maps"),
        }
        panels = []
        for name, (title, quantity) in titles.items():
            own = [one for one in self._resolved() if one.curve == name]
            if not own:
                continue
            last = own[-1]
            frequency = [shell / last.length for shell in range(1, len(last.values))]
            nyquist = 1 / frequency[-1]
            curves = [
                FscCurve(
                    f"{words.CURVE_NAMES[name]}{'' if one is last else ', at first'}: "
                    f"{verdict.spacing(one.resolution, nyquist)}",
                    one.values[1:],
                    place,
                )
                for place, one in enumerate([last, *own[:1]] if len(own) > 1 else own)
                if len(one.values) == len(last.values)
            ]
            panels.append(FscPanel(title, quantity, last.threshold, frequency, curves))
        return panels


def is_alive(process: int, began: float) -> bool:
    """Whether a process of this machine is that which began its work at ``began`` (seconds since 1970)."""
    try:
        os.kill(process, 0)  # no signal: it asks
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        started = boot + int(stat[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return True  # the system does not say more
    return stat[0] != b"Z" and started < began + 5  # else its number was given to another one


def settings_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings in words, without those that are not set."""
    rows = []
    for name, value in config.items():
        for key, one in value.items() if isinstance(value, dict) else [(name, value)]:
            if one not in ([], "", None):
                text = ", ".join(map(str, one)) if isinstance(one, list) else str(one)
                rows.append((shown_name(str(key)).replace("_", "-"), shown_name(text)))
    return rows


def shown_name(text: str) -> str:
    """Text that every browser takes: bytes that are no letters and signs that steer are written out."""
    plain = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in plain)


def fit_names(text: str) -> str:
    """A fit, or what names fits, in the words of the report."""
    for name, said in figures.FITS.items():
        text = text.replace(name, said)
    return shown_name(text)


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def thinned(points: Sequence[T]) -> list[T]:
    """So many of them that all can be seen, the last among them."""
    stride = math.ceil(len(points) / _POINTS) or 1
    return [*points[: len(points) - 1 : stride], *points[-1:]]


def curve_json(
    name: str, x: Sequence[float], y: Sequence[float], place: int, dashes: int | None = None
) -> dict[str, Any]:
    """A curve with colour and dashes of the figures; ``dashes`` may be those of another place."""
    color, own = LINES[place % len(LINES)]
    dash = own if dashes is None else LINES[dashes % len(LINES)][1]
    return {
        "name": shown_name(name),
        "x": list(map(finite, x)),
        "y": list(map(finite, y)),
        "color": color,
        "dash": [length * LINE_WIDTH for length in dash],
    }


def curve_of_points(
    name: str, points: Sequence[tuple[float, float]], place: int, dashes: int | None = None
) -> dict[str, Any]:
    """`curve_json` of pairs."""
    return curve_json(name, [x for x, _ in points], [y for _, y in points], place, dashes)


def panel_json(kind: str, title: str, across: str, up: str, curves: list[dict[str, Any]]) -> dict[str, Any]:
    """A plot."""
    return {"kind": kind, "title": title, "across": across, "up": up, "curves": curves}


def _fsc_json(panel: FscPanel) -> dict[str, Any]:
    curves = [
        curve_json(one.label, panel.frequency, one.values, one.place) | {"hidden": one.hidden} for one in panel.curves
    ]
    plot = panel_json("fsc", panel.title, "spatial frequency (1/Å), spacing (Å)", panel.quantity, curves)
    plot |= {"threshold": panel.threshold, "low": panel.lowest, "high": 1.04}
    if panel.band:
        plot["band"] = [list(map(finite, side)) for side in panel.band]
    return plot
