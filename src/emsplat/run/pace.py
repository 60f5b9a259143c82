"""What is done beside the work, and must not cost it much."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Paced:
    """When something is due again: after ``every`` seconds, and never so often that it takes over 1 % of the time."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def doing(self) -> Iterator[None]:
        """It is being done."""
        began = time.monotonic()
        yield
        now = time.monotonic()
        self._next = now + max(self._every, 100 * (now - began))
