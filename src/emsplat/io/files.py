"""Files: refused in one line where they are not there, and written so that nothing is lost and everything can be read:
complete or not at all, finite, for whom the user shares files with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from emsplat.errors import InputError, OutputError

TEMPORARY = ".*.part"  # pattern of the names of `replacing`


def require_file(path: Path, expected: str) -> None:
    """Refuses a path that is no file.

    Raises:
        InputError: it is a folder, or there is nothing; ``expected`` says what should be there.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected {expected}, name the file in it")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {expected}")


def require_another(output: Path, *inputs: Path | None) -> None:
    """
    Raises:
        InputError: what is to be written would take the place of what is read.
    """
    for path in inputs:
        if path is not None and output.exists() and path.exists() and output.samefile(path):
            raise InputError(f"{output}: would replace the input {path}; expected another name for the output")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well, and goes when it does not. The
    folder is made where there is none.

    Raises:
        OutputError: the file cannot be written (disk full, no permission, a file where a folder should be).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def require_finite(path: Path, name: str, values: Any) -> None:
    """The guard before an array or a tensor on the CPU is written.

    Raises:
        OutputError: some are infinite or not a number; ``name`` says what they are.
    """
    import numpy as np

    finite = np.isfinite(np.asarray(values))
    if not finite.all():
        raise OutputError(
            f"{path}: {(~finite).sum():,} of {finite.size:,} {name} are infinite or undefined; expected numbers, "
            "nothing was written; did the fit diverge, or does the input hold such values (--skip-bad)?"
        )


def number_text(value: float, form: str = ".6g", undefined: str = "") -> str:
    """A number as tables have it; where it is infinite or undefined an empty cell, or what stands for one."""
    return format(value, form) if math.isfinite(value) else undefined


def json_text(value: Any) -> str:
    """JSON that every reader takes: infinite and undefined numbers, for which it has no word, become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(own) for key, own in part.items()}
        if isinstance(part, list | tuple):
            return [finite(own) for own in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=2, allow_nan=False)
