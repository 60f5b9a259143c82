"""What a run says while it works: lines in the terminal and in run.log, progress with rate and time left."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_PLAIN_EVERY = 15.0  # seconds between progress lines where there is no terminal


class Log:
    """Lines for the user, kept in a file as well once there is a run folder."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._file: Path | None = None
        self.warnings: list[str] = []

    def keep_in(self, file: Path) -> None:
        """Appends every further line to ``file``, with the time."""
        self._file = file

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def warn(self, text: str) -> None:
        """A line that also goes into the summary."""
        self.warnings.append(text)
        self.line(f"Warning: {text}")

    @contextmanager
    def progress(
        self, name: str, total: int, done: int = 0, unit: str = "images"
    ) -> Iterator[Callable[[int, str], None]]:
        """Gives ``update(how many are done, remark)``: a bar on a terminal, now and then a plain line elsewhere."""
        if self._stream.isatty():
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
        with Progress(*columns, console=Console(file=self._stream)) as bar:
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


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent process held when it started this one.
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
