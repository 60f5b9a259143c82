"""Batches read ahead of whoever consumes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

_READ_AHEAD = 2  # batches


_T = TypeVar("_T")


def ahead(source: Iterable[_T]) -> Iterator[_T]:
    """Runs the source in a thread, a few batches ahead; ends the thread when the consumer stops early."""
    ready: queue.Queue[_T | BaseException | None] = queue.Queue(_READ_AHEAD)
    stop = threading.Event()

    def put(item: _T | BaseException | None) -> bool:
        # The main thread is over when the interpreter shuts down, whether or not the consumer was closed.
        while not stop.is_set() and threading.main_thread().is_alive():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for batch in source:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 (raised again by the consumer)
            put(error)

    thread = threading.Thread(target=read, name="emsplat-reader")
    thread.start()

    def items() -> Iterator[_T | BaseException]:
        while True:
            try:
                item = ready.get(timeout=1.0)
            except queue.Empty:
                if thread.is_alive():
                    continue
                return  # it gave up, since the interpreter shuts down
            if item is None:
                return
            yield item

    try:
        for item in items():
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
