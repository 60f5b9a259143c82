"""When a run writes what it needs to go on, and being asked to stop, without a step cut in two."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emsplat.errors import Interrupted


class StopRequest:
    """Whether somebody has asked the work to end, and by which signal."""

    number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def interruption(self, text: str) -> Interrupted:
        """The error to raise once what is needed to go on is written."""
        return Interrupted(text, self.number or signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """What Ctrl-C, a polite kill or the end of the terminal turns true, so that a step is never cut in two.

    Signals that are ignored stay so (nohup), and the handlers of before come back at the end.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: object) -> None:
        stop.number = number

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # One that was not set from Python cannot be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
        yield stop
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


class Checkpoints:
    """When to save what is needed to go on: ``every`` so many seconds, and where the work is asked to stop.

    The caller asks `due` once per step, and says `saved` when it has done so. Nothing else looks at the clock or at the
    request: several processes have to agree on this one answer only.
    """

    def __init__(self, every: float, stop: StopRequest) -> None:
        self._every, self._stop = every, stop
        self._stopping = False
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether to save now."""
        self._stopping = bool(self._stop)
        return self._stopping or time.monotonic() - self._last > self._every

    def saved(self, where: str) -> None:
        """What was due is on disk; ``where`` the work stands, for the message.

        Raises:
            Interrupted: the work was asked to stop.
        """
        if self._stopping:
            raise self._stop.interruption(f"stopped {where}")
        self._last = time.monotonic()


@contextmanager
def checkpoints(every: float) -> Iterator[Checkpoints]:
    """Steps that are not cut in two, and saved as `Checkpoints` says."""
    with interruptible() as stop:
        yield Checkpoints(every, stop)
