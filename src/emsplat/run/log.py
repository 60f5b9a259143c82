"""What a run says while it works: lines in the terminal and in run.log, progress with rate and time left; the same for
programs in the journal."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol, cast, runtime_checkable

from emsplat.errors import OutputError
from emsplat.run.files import LOG
from emsplat.run.journal import Begun, Ended, Journal, Part, Progress, Spent, Warned, how_it_ended
from emsplat.run.profile import write_trace

IMPORTS = "imports"  # what passes before a command begins to work
_PLAIN_EVERY = 15.0  # seconds between progress lines where there is no terminal
_ROW_EVERY = 1.0  # seconds between rows of progress in the journal


@runtime_checkable
class Stream(Protocol):
    """Where lines go: standard output, or text in memory."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


class Log:
    """Lines for the user, kept in a file as well once there is a run folder, and rows in its journal; and how long the
    work takes.

    ``began`` (on the clock of `time.monotonic`) is when the user began to wait: for a command the start of its process.
    """

    def __init__(self, stream: Stream | None = None, began: float | None = None) -> None:
        self.stream: Stream = sys.stdout if stream is None else stream
        self._file: Path | None = None
        self.journal = Journal()
        self._began = time.monotonic() if began is None else began
        self.warnings: list[str] = []
        self.parts: dict[str, float] = {}  # seconds of each part of the work that `part` has timed
        self._early: list[Spent] = []  # what was over before there was a journal
        self._depth = 0
        if began is not None:
            self._early.append(_Stopwatch(self.seconds, processor=0.0).read(IMPORTS, 0))

    @property
    def seconds(self) -> float:
        """Wall time since the beginning."""
        return time.monotonic() - self._began

    @contextmanager
    def part(self, name: str, text: str | None = None) -> Iterator[None]:
        """A part of the work: ``text`` says what begins, and ``parts[name]`` how long all parts of this name took."""
        if text is not None:
            self.line(text)
        self.journal.add(Part(name, text or ""))
        start = time.monotonic()
        try:
            with self.step(name):
                yield
        finally:
            self.parts[name] = round(self.parts.get(name, 0.0) + time.monotonic() - start, 2)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step within a part: what it takes goes into the journal."""
        watch = _Stopwatch()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._note(watch.read(name, self._depth))

    def _note(self, spent: Spent) -> None:
        if self._file is None:
            self._early.append(spent)
        else:
            self.journal.add(spent)

    def keep_in(self, folder: Path, begun: Begun) -> None:
        """Appends every further line to run.log of a folder, with the time, and what happens to its journal, from
        ``begun`` on."""
        self._file = folder / LOG
        self.journal = Journal(folder)
        self.journal.add(begun)
        for spent in self._early:
            self.journal.add(spent)

    @contextmanager
    def to_the_end(self, profile: bool = False) -> Iterator[None]:
        """Work whose end, and how it ended, is the last row of the journal; ``profile`` says where its time went."""
        try:
            yield
            self.journal.add(Ended("finished", "", round(self.seconds, 2)))
            if profile and self._file is not None:
                for text in write_trace(self._file.parent):
                    self.line(text)
        except BaseException as error:
            with suppress(OutputError):  # the error that ended it is the one to tell
                self.journal.add(Ended(*how_it_ended(error), round(self.seconds, 2)))
            raise
        finally:
            self.journal = Journal()

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
        if self._file is not None:
            # Names of files may hold bytes that are no letters.
            try:
                with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            except OSError as error:
                raise OutputError(
                    f"{self._file}: cannot be written ({error.strerror or error}); free some space or choose another "
                    "folder with -o"
                ) from error

    def warn(self, text: str) -> None:
        """A line that also goes into the summary."""
        self.warnings.append(text)
        self.journal.add(Warned(text))
        self.line(f"Warning: {text}")

    @contextmanager
    def progress(
        self, name: str, total: int, done: int = 0, unit: str = "images"
    ) -> Iterator[Callable[[int, str], None]]:
        """Gives ``update(how many are done, remark)``: a bar on a terminal, now and then a plain line elsewhere, and
        rows of the journal."""
        noted = _Noted(self.journal, name, total, unit)
        with self._shown(name, total, done, unit) as show:

            def update(now: int, remark: str) -> None:
                noted.update(now, remark)
                show(now, remark)

            noted.update(done, "")
            yield update
            noted.close()

    @contextmanager
    def _shown(self, name: str, total: int, done: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        if self.stream.isatty():
            with self._bar(name, total, done, unit) as update:
                yield update
        else:
            yield self._plain(name, total, done, unit)

    @contextmanager
    def _bar(self, name: str, total: int, done: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        start = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  {task.fields[remark]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=cast("IO[str]", self.stream))) as bar:
            task = bar.add_task(name, total=total, completed=done, remark="")

            def update(images: int, remark: str) -> None:
                rate = (images - done) / max(time.monotonic() - start, 1e-9)
                bar.update(task, completed=images, remark=f"{rate:,.0f} {unit}/s  {remark}")

            yield update

    def _plain(self, name: str, total: int, done: int, unit: str) -> Callable[[int, str], None]:
        start = last = time.monotonic()

        def update(images: int, remark: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _PLAIN_EVERY:
                return
            last = now
            rate = (images - done) / max(now - start, 1e-9)
            left = (total - images) / max(rate, 1e-9)
            self.line(f"{name}: {100 * images / total:.0f} %, {rate:,.0f} {unit}/s, {left:.0f} s left, {remark}")

        return update


class _Stopwatch:
    """What has been spent since it was made, or since ``seconds`` before that, when ``processor`` seconds were."""

    def __init__(self, seconds: float = 0.0, processor: float | None = None) -> None:
        self._began = time.time() - seconds
        self._start = time.monotonic() - seconds
        self._processor = processor_seconds() if processor is None else processor

    def read(self, name: str, depth: int) -> Spent:
        seconds, processor = time.monotonic() - self._start, processor_seconds() - self._processor
        cost = round(seconds, 4), round(processor, 4), round(peak_memory(), 1)
        return Spent(name, depth, round(self._began, 4), *cost, os.getpid())


class _Noted:
    """Progress in the journal: the first, the last, and between them one in `_ROW_EVERY`."""

    def __init__(self, journal: Journal, name: str, total: int, unit: str) -> None:
        self._journal, self._about = journal, (name, total, unit)
        self._written = -math.inf
        self._unwritten: Progress | None = None

    def update(self, done: int, remark: str) -> None:
        name, total, unit = self._about
        self._unwritten = Progress(name, done, total, unit, remark)
        if time.monotonic() - self._written >= _ROW_EVERY:
            self._written = time.monotonic()
            self.close()

    def close(self) -> None:
        """Writes the last one, where it is not yet written."""
        if self._unwritten is not None:
            self._journal.add(self._unwritten)
            self._unwritten = None


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 stack", "1,200 stacks"; ``many`` where the plural is not the noun and an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def data_size(count: float) -> str:
    """Bytes as "13 MB" or "2.4 GB" (10^6, 10^9), never rounded to nothing."""
    if count < 1e6:
        return "less than 1 MB"
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def duration(seconds: float) -> str:
    """A time as "less than a second", "12 s", "3.5 min" or "2.1 h"."""
    if seconds < 1:
        return "less than a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def processor_seconds() -> float:
    """Seconds of processors that all threads of this process have taken so far, and processes of it that have ended."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent process held when it started this one.
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
