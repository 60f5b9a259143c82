"""What happens in a run, one JSON object per line, written while it happens; read without PyTorch.

Nothing written is ever changed: what a run that went back did anew is marked by a row of its own (`Rewound`), and the
reader leaves it out. A line that a crash has cut off counts as not written.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from emsplat.errors import InputError, Interrupted, OutputError
from emsplat.run.files import JOURNAL


@dataclass(frozen=True)
class Begun:
    """A program goes to work on a folder, anew or where another has left off; ``process`` is its number on ``host``."""

    program: str
    version: str
    particles: str
    resumed: bool
    host: str = ""  # journals of before 2026-11-26 have neither
    process: int = 0


@dataclass(frozen=True)
class Part:
    """A part of the work begins."""

    name: str
    text: str


@dataclass(frozen=True)
class Foreseen:
    """How long parts of this name are expected to take in all. They come in the order of their ``turn``; those of one
    turn in each other's midst, each perhaps several times."""

    name: str
    seconds: float
    turn: int


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
class Resolved:
    """A resolution on the way in Å (NaN where the curve never reaches ``threshold``), and the curve that it was read
    from: values of the shells 0, 1, 2, ... at multiples of 1/``length``. ``curve`` is a name of `Curves`."""

    fit: str
    step: int
    curve: str
    threshold: float
    resolution: float
    length: float  # of the box, Å
    values: list[float]


@dataclass(frozen=True)
class Gained:
    """What ``count`` components of a linear model of states, or points of their density (``by``), say of images of the
    other half, in nats per image."""

    by: str
    count: int
    gain: float
    error: float


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


What = (
    Begun | Part | Foreseen | Spent | Progress | Loss | Scored | Judged | Resolved | Gained | Rewound | Warned | Ended
)
_KINDS: dict[str, type[What]] = {
    kind.__name__.lower(): kind
    for kind in (
        Begun,
        Part,
        Foreseen,
        Spent,
        Progress,
        Loss,
        Scored,
        Judged,
        Resolved,
        Gained,
        Rewound,
        Warned,
        Ended,
    )
}
_OF_A_FIT = (Loss, Scored, Judged, Resolved)
_MOST = 2**22  # bytes of a growing journal that are read at once
_LONGEST = 2**20  # bytes of a line; a longer one is none of ours


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
        finite = {name: _finite(value) for name, value in row.items()}
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


class Following:
    """The journal of a folder while it grows: each `new_rows` reads what was added since the last.

    It is for those who watch and must not stop at what is damaged: a line that is no row is left out, and the first is
    named in ``problem``. `Rewound` comes as a row: who follows takes back what `takes_back` says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, bytes] | None = None  # the file, how far it was read, and how it begins
        self.changed = 0.0  # when it was last written to, seconds since 1970
        self.problem = ""
        self._line = 0

    def new_rows(self) -> tuple[bool, list[Row]]:
        """Whether the journal is another one than before, of which all has to be forgotten, and the rows that are new.

        Raises:
            InputError: it is not there, or cannot be read.
        """
        try:
            with open(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                self.changed = status.st_mtime
                number, offset, start = self._seen or (status.st_ino, 0, b"")
                anew = self._seen is not None and (
                    number != status.st_ino or status.st_size < offset or file.read(len(start)) != start
                )
                if anew:
                    offset, start, self.problem, self._line = 0, b"", "", 0
                if status.st_size == offset:
                    self._seen = (status.st_ino, offset, start)
                    return anew, []
                file.seek(offset)
                added = file.read(_MOST)
        except OSError as error:
            raise InputError(
                f"{self._path}: cannot be read ({error.strerror or error}); expected the journal of a run"
            ) from error
        whole = added[: added.rfind(b"\n") + 1]
        if not whole and len(added) > _LONGEST:
            self.problem = self.problem or f"{self._path.name}: a line of more than {_LONGEST:,} bytes; not a journal"
            whole = added
        self._seen = (status.st_ino, offset + len(whole), start or whole[:256])
        return anew, list(self._rows(whole))

    def _rows(self, text: bytes) -> Iterator[Row]:
        for line in text.split(b"\n")[:-1]:
            self._line += 1
            try:
                row = _row(line, f"{self._path.name}, line {self._line}")
            except InputError as error:
                self.problem = self.problem or str(error).partition(";")[0]
                continue
            if row is not None:
                yield row

    @property
    def position(self) -> int:
        """How many bytes were read."""
        return 0 if self._seen is None else self._seen[1]


def takes_back(rewound: Rewound, what: What) -> bool:
    """Whether a row before `Rewound` no longer counts."""
    return _is_taken_back(what, rewound)


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
        values = {
            f.name: _value(given[f.name], f.type)
            for f in fields(kind)
            if f.name in given or f.default is MISSING  # rows of earlier versions lack what has a default
        }
        return Row(_value(given["time"], "float"), kind(**values))
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
    if wanted == "list[float]":
        if not isinstance(given, list):
            raise TypeError(f"{given!r} is no list")
        return [_value(one, "float") for one in given]
    if not isinstance(given, _TYPES[wanted]) or isinstance(given, bool) != (wanted == "bool"):
        raise TypeError(f"{given!r} is no {wanted}")
    return float(given) if wanted == "float" else given


def _finite(value: Any) -> Any:
    """JSON has no words for what is infinite or undefined."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
