"""Errors that speak to the user: what, where, expected, remedy, in one line."""

from __future__ import annotations

import signal

_LONGEST = 800  # characters of a message


class EmsplatError(Exception):
    """Base of every error that emsplat raises on purpose; the command line prints its text and nothing else."""

    exit_code = 1

    def __init__(self, text: str) -> None:
        super().__init__(_one_line(text))


class Interrupted(EmsplatError):
    """The user or the system asked the work to end (by a signal); what is needed to go on has been written."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


class InputError(EmsplatError):
    """Something the user gave cannot be used: a file, a column, a value, an option.

    The text is one line that says what is wrong, where (file, row, field), what was expected and what to do.
    """

    exit_code = 2


class OutputError(EmsplatError):
    """A result cannot be written: folder not empty, disk full, no permission."""

    exit_code = 2


def _one_line(text: str) -> str:
    """Texts out of a damaged file may be anything: line breaks, control characters, a million digits."""
    line = _shortened(" ".join(text.splitlines()))
    if line.isprintable():
        return line
    return _shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
