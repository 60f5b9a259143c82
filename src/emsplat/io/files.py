"""Writing files so that nothing is lost: to a temporary name first, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emsplat.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well, and goes when it does not.

    Raises:
        OutputError: the file cannot be written (disk full, no permission, no such folder).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another folder with -o"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
