"""The runs below a folder: found by a walk that is bounded, and reached by a way that no link leads out of."""

from __future__ import annotations

import math
import os
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from emsplat.errors import InputError
from emsplat.run.files import JOURNAL, PARTS, STATES, SUMMARIES

_MARKS = frozenset({JOURNAL, *SUMMARIES})
_WITHOUT_RUNS = frozenset({STATES, PARTS})
_FOLDERS, _ENTRIES, _DEPTH = 20_000, 1_000_000, 12  # the most that a walk looks at


class Walk:
    """Looks for every folder at or below ``root`` that holds a journal or a summary, the nearest first, some time at a
    time. Links are not followed, hidden folders not entered, and what cannot be read is left out.

    ``runs`` are relative to ``root`` ("" is that folder itself). ``cut``: there is more than a walk looks at.
    """

    def __init__(self, root: Path, folders: int = _FOLDERS, entries: int = _ENTRIES, depth: int = _DEPTH) -> None:
        self.runs: list[str] = []
        self.cut = self.ended = False
        self._root, self._depth = root, depth
        self._left = [folders, entries]
        self._waiting = deque([("", 0)])

    def go_on(self, seconds: float = math.inf) -> None:
        """Looks further for about so long."""
        end = time.monotonic() + seconds
        while not self.ended:
            if not self._waiting or min(self._left) <= 0:
                self.cut |= bool(self._waiting)
                self.ended = True
                return
            self._look_into(*self._waiting.popleft())
            if time.monotonic() > end:
                return

    def _look_into(self, folder: str, level: int) -> None:
        self._left[0] -= 1
        below, is_run = [], False
        for entry in _entries(self._root / folder):
            self._left[1] -= 1
            if self._left[1] <= 0:
                self.cut = True
                break
            if entry.name in _MARKS and entry.is_file(follow_symlinks=False):
                is_run = True
            elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
        if is_run:
            self.runs.append(folder)
        # Maps of states and masks of parts are many, and no runs.
        below = [name for name in below if not (is_run and name in _WITHOUT_RUNS)]
        if level >= self._depth:
            self.cut |= bool(below)
            return
        self._waiting.extend((f"{folder}/{name}" if folder else name, level + 1) for name in sorted(below))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(folder) as found:  # no permission, or gone meanwhile
        yield from found


def inside(root: Path, *parts: str) -> Path:
    """A regular file below ``root``, which is a resolved path: no link lies on the way to it, and it is none.

    Raises:
        InputError: there is no such file, or it lies elsewhere.
    """
    path = root.joinpath(*parts)
    try:
        way = path.resolve(strict=True)
        if way == path and way.is_relative_to(root) and stat.S_ISREG(path.lstat().st_mode):
            return path
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path.name}: no such file ({error}); expected one of a run") from error
    raise InputError(f"{path.name}: lies behind a link, or is no file; expected a file of the run itself")


def has_file(root: Path, *parts: str) -> bool:
    """Whether `inside` gives a file."""
    try:
        inside(root, *parts)
    except InputError:
        return False
    return True


def read_file(root: Path, *parts: str, most: int = 2**26) -> bytes:
    """What is in a file `inside` ``root``; of a longer one its last bytes.

    Raises:
        InputError: it is not there, lies elsewhere or cannot be read.
    """
    path = inside(root, *parts)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return file.read(most)
    except OSError as error:
        raise InputError(
            f"{path.name}: cannot be read ({error.strerror or error}); expected a file of a run"
        ) from error
