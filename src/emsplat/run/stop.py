"""When a run writes what it needs to go on, and being asked to stop, without a step cut in two."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from emsplat.errors import InputError, Interrupted
from emsplat.parallel import ALONE, World
from emsplat.process import started


class StopRequest:
    """Whether somebody has asked the work to end, and by which signal."""

    number: int | None = None
    reason = ""

    def __bool__(self) -> bool:
        return self.number is not None

    def interruption(self, text: str) -> Interrupted:
        """The error to raise once what is needed to go on is written."""
        return Interrupted(f"{self.reason}{text}", self.number or signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """What Ctrl-C, a polite kill or the end of the terminal turns true, so that a step is never cut in two.

    Signals that are ignored stay so (nohup), and the handlers of before come back at the end: one that nobody has
    looked for by then is theirs.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: object) -> None:
        stop.number = number

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            # One that was not set from Python cannot be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
        yield stop
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
    if stop.number in before and not stop.reason:
        signal.raise_signal(stop.number)


class Checkpoints:
    """When to save what is needed to go on: ``every`` so many seconds, and where the work is asked to stop or has
    reached its ``limit`` (on the clock of `time.monotonic`).

    The caller asks `due` once per step, and says `saved` when it has done so. Nothing else looks at the clock or at the
    request. Several processes agree on this one answer: all have to ask equally often, and the clock is that of the
    first.
    """

    def __init__(self, every: float, stop: StopRequest, world: World = ALONE, limit: float = math.inf) -> None:
        self._every, self._stop, self._limit, self._world = every, stop, limit, world
        self._stopping = False
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether to save now."""
        now = time.monotonic()
        if self._world.first and now > self._limit and not self._stop:
            self._stop.number, self._stop.reason = signal.SIGUSR1, "--time-limit is reached: "
        if self._world.size == 1:
            self._stopping = bool(self._stop)
            return self._stopping or now - self._last > self._every
        late = self._world.first and now - self._last > self._every
        said = torch.tensor([self._stop.number or 0, int(late)])
        self._world.most_(said)
        # A signal that came while this process waited for the others is for the next time: they do not know of it.
        number = int(said[0])
        self._stopping = bool(number)
        if number:
            self._stop.number = number
        return self._stopping or bool(said[1])

    def saved(self, where: str) -> None:
        """What was due is on disk; ``where`` the work stands, for the message.

        Raises:
            Interrupted: the work was asked to stop.
        """
        self._world.agree(False)  # none goes before it is written
        if self._stopping:
            raise self._stop.interruption(f"stopped {where}")
        self._last = time.monotonic()


@contextmanager
def checkpoints(every: float, world: World = ALONE, limit: str | None = None) -> Iterator[Checkpoints]:
    """Steps that are not cut in two, and saved as `Checkpoints` says; ``limit`` as `time_limit` reads it, since the
    process began.

    Raises:
        InputError: the limit is no time, or checkpoints are to be less than no time apart.
    """
    require_spacing(every)
    end = started() + time_limit(limit)
    with interruptible() as stop:
        yield Checkpoints(every, stop, world, end)


def require_spacing(every: float) -> None:
    """
    Raises:
        InputError: checkpoints cannot be so many seconds apart.
    """
    if not every >= 0:  # nan as well
        raise InputError(f"--checkpoint-every {every:g}: expected seconds from 0 (after each batch) on")


def require_time(limit: str | None, where: str, world: World = ALONE) -> None:
    """For work that a signal may cut anywhere, since what it goes on from is written whole: asked from time to time, of
    several processes by all equally often.

    Raises:
        Interrupted: the ``limit`` is reached.
        InputError: it is no time.
    """
    moment = Checkpoints(math.inf, StopRequest(), world, started() + time_limit(limit))
    if moment.due():
        moment.saved(f"{where}; go on with --resume")


def time_limit(text: str | None, option: str = "--time-limit") -> float:
    """Seconds of a time as batch systems write it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:...].

    Raises:
        InputError: it is none.
    """
    if text is None:
        return math.inf
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isascii() and part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise InputError(f"{option} {text}: expected minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:  # minutes[:seconds], or all three
        hours, minutes, seconds = numbers if len(numbers) == 3 else [0, *numbers, 0][:3]
    total = ((int(days) if dash else 0) * 24 + hours) * 3600 + minutes * 60 + seconds
    if not total:
        raise InputError(f"{option} {text}: expected a time above 0")
    return float(total)
