"""Errors that speak to the user: what, where, expected, remedy, in one line."""

from __future__ import annotations


class EmsplatError(Exception):
    """Base of every error that emsplat raises on purpose; the command line prints its text and nothing else."""

    exit_code = 1


class InputError(EmsplatError):
    """Something the user gave cannot be used: a file, a column, a value, an option.

    The text is one line that says what is wrong, where (file, row, field), what was expected and what to do.
    """

    exit_code = 2


class OutputError(EmsplatError):
    """A result cannot be written: folder not empty, disk full, no permission."""

    exit_code = 2
