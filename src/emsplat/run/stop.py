"""Being asked to stop, without a step cut in two."""

from __future__ import annotations

import signal
import threading
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
