"""What happens in a run, one JSON object per line, written while it happens; read without PyTorch.

Nothing written is ever changed: what a run that went back did anew is marked by a row of its own (`Rewound`), and the
reader leaves it out. A line that a crash has cut off counts as not written.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from emsplat.errors import InputError, Interrupted, OutputError
from emsplat.run.files import JOURNAL


@dataclass(frozen=True)
class Begun:
    """A program goes to work on a folder, anew or where another has left off."""

    program: str
    version: str
    particles: str
    resumed: bool


@dataclass(frozen=True)
class Part:
    """A part of the work begins."""

    name: str
    text: str


@dataclass(frozen=True)
class Spent:
    """A part of the work, or a step within one, is over."""

    name: str
    depth: int  # of how many others it is a part
    began: float  # seconds since 1970, UTC
    seconds: float
    processor: float  # seconds, of all threads and of processes that have ended
    peak_mb: float  # the most memory that the process has held until now
    process: int


@dataclass(frozen=True)
class Progress:
    """How far a pass or a fit has come."""

    name: str
    done: int
    total: int
    unit: str
    remark: str


@dataclass(frozen=True)
class Loss:
    """The mean loss of a fit over the last steps; ``images`` were seen by then."""

    fit: str
    step: int
    epoch: int
    images: int
    loss: float


@dataclass(frozen=True)
class Scored:
    """The mean cross-validated FSC of fits in step, after an epoch that was judged."""

    fit: str
    step: int
    epoch: int
    gaussians: int
    score: float


@dataclass(frozen=True)
class Judged:
    """The end of a stage of fits in step: what it brought over the one before, and whether it is kept."""

    fit: str
    step: int
    gaussians: int
    epochs: int
    score: float
    gain: float
    gain_error: float
    kept: bool


@dataclass(frozen=True)
class Rewound:
    """What a fit did after ``step`` no longer counts."""

    fit: str
    step: int


@dataclass(frozen=True)
class Warned:
    """Something was assumed, or should be looked at."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The end: "finished", "interrupted" (``--resume`` goes on) or "failed". A process that was killed has none."""

    how: str
    text: str
    seconds: float  # since the user began to wait


What = Begun | Part | Spent | Progress | Loss | Scored | Judged | Rewound | Warned | Ended
_KINDS: dict[str, type[What]] = {
    kind.__name__.lower(): kind for kind in (Begun, Part, Spent, Progress, Loss, Scored, Judged, Rewound, Warned, Ended)
}
_OF_A_FIT = (Loss, Scored, Judged)


@dataclass(frozen=True)
class Row:
    """What happened, and when (seconds since 1970, UTC)."""

    time: float
    what: What


class Journal:
    """Appends rows to the journal of a folder; without one to none. A row is on disk when `add` returns."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        if folder is not None:
            with _writing(folder / JOURNAL):
                _drop_cut_line(folder / JOURNAL)

    def add(self, what: What) -> None:
        """
        Raises:
            OutputError: it cannot be written.
        """
        if self._folder is None:
            return
        row = {"kind": type(what).__name__.lower(), "time": round(time.time(), 3)} | asdict(what)
        finite = {name: None if _undefined(value) else value for name, value in row.items()}
        path = self._folder / JOURNAL
        with _writing(path), path.open("ab") as file:
            file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def rewind(self, fit: str, step: int) -> None:
        """What a fit did after ``step`` no longer counts.

        Raises:
            InputError, OutputError: as `read_journal` and `add`.
        """
        rewound = Rewound(fit, step)
        if any(_is_taken_back(row.what, rewound) for row in self.rows()):
            self.add(rewound)

    def rows(self) -> list[Row]:
        """What `read_journal` gives; nothing without a folder."""
        return [] if self._folder is None else read_journal(self._folder)


def how_it_ended(error: BaseException) -> tuple[str, str]:
    """The words of `Ended` for a run that an error has ended."""
    text = str(error) or type(error).__name__
    return ("interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"), text


def read_journal(folder: Path) -> list[Row]:
    """The rows that count, in the order in which they were written; none where there is no journal.

    Rows of kinds that this version does not know are left out, and so is what was rewound.

    Raises:
        InputError: the journal cannot be read, or holds something else.
    """
    path = folder / JOURNAL
    try:
        text = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected the journal of a run"
        ) from error
    rows: list[Row] = []
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        row = _row(line, f"{path}, line {number}")
        if row is None:
            continue
        if isinstance(row.what, Rewound):
            rows = [kept for kept in rows if not _is_taken_back(kept.what, row.what)]
        rows.append(row)
    return rows


def _is_taken_back(what: What, rewound: Rewound) -> bool:
    return isinstance(what, _OF_A_FIT) and what.fit == rewound.fit and what.step > rewound.step


def _row(line: bytes, where: str) -> Row | None:
    """
    Raises:
        InputError: not a row of a journal; ``where`` it stands.
    """
    try:
        given = json.loads(line)
        kind = _KINDS.get(given["kind"])
        if kind is None:
            return None
        return Row(
            _value(given["time"], "float"), kind(**{f.name: _value(given[f.name], f.type) for f in fields(kind)})
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{where}: not a row of a journal ({type(error).__name__}: {error}); expected a JSON object as emsplat "
            "writes it; remove the file to go on without"
        ) from error


_TYPES: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def _value(given: Any, wanted: Any) -> Any:
    """A value of the type that is ``wanted``; undefined numbers are null in JSON.

    Raises:
        TypeError: it is of another one.
    """
    if wanted == "float" and given is None:
        return math.nan
    if not isinstance(given, _TYPES[wanted]) or isinstance(given, bool) != (wanted == "bool"):
        raise TypeError(f"{given!r} is no {wanted}")
    return float(given) if wanted == "float" else given


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _drop_cut_line(path: Path) -> None:
    """The next row begins a line of its own, whatever a crash has left at the end."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another folder with -o"
        ) from error
