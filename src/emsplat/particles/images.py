"""The stacks of a table on disk: few of them open at a time, read by several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emsplat.device import Lane
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.table import ParticleTable

_OPEN_STACKS = 64


_READERS = 8  # threads that fill a batch for a GPU, which takes images faster than one thread copies them


@dataclass(frozen=True)
class StackFacts:
    """What the header of a stack says, as `StackFile`."""

    count: int
    box: int
    pixel_size: float | None
    image_bytes: int


class ImageFiles:
    """The stacks of a table; only a few are open at a time. Several threads may read.

    Stacks that other processes have are known by what these say of them (``elsewhere``).
    """

    def __init__(self, table: ParticleTable) -> None:
        self.elsewhere: dict[int, StackFacts] = {}
        self._table = table
        self._open: OrderedDict[int, StackFile] = OrderedDict()
        self._remarks: dict[Path, tuple[str, ...]] = {}
        self._lock = threading.Lock()

    def stack(self, index: int) -> StackFile:
        with self._lock:
            file = self._open.pop(index, None) or StackFile(self._table.stacks[index])
            self._open[index] = file
            self._remarks[file.path] = file.warnings
            if len(self._open) > _OPEN_STACKS:
                self._open.popitem(last=False)[1].close()
        return file

    def facts(self, index: int) -> StackFacts:
        """What the header of a stack says, here or elsewhere."""
        if index in self.elsewhere:
            return self.elsewhere[index]
        file = self.stack(index)
        return StackFacts(file.count, file.box, file.pixel_size, file.image_bytes)

    def remarks(self) -> list[str]:
        """What had to be assumed of the stacks that have been opened, each assumption once."""
        of: dict[str, list[Path]] = {}
        for path, texts in self._remarks.items():
            for text in texts:
                of.setdefault(text, []).append(path)
        return [
            f"{paths[0]}{f' and {len(paths) - 1} other stacks' if len(paths) > 1 else ''}: {text}"
            for text, paths in of.items()
        ]

    def read(self, rows: Int[Tensor, " p"], lane: Lane | None = None) -> Float[Tensor, "p y x"]:
        """Images of these rows of the table, as they are on disk; for a ``lane`` in memory that it can send from."""
        stack, image = self._table.stack[rows].numpy(), self._table.image[rows].numpy()
        box = self.facts(int(stack[0])).box
        if lane is None:
            out = np.empty((len(rows), box, box), np.float32)
            self._read_into(out, stack, image, np.arange(len(rows)))
            return torch.from_numpy(out)
        buffer = lane.buffer(len(rows), box, box)
        shares = np.array_split(np.arange(len(rows)), _READERS)
        jobs = [_readers().submit(self._read_into, buffer.numpy(), stack, image, share) for share in shares]
        for job in jobs:
            job.result()
        return buffer

    def _read_into(
        self, out: NDArray[np.float32], stack: NDArray[np.int64], image: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        for index in np.unique(stack[places]):
            here = places[stack[places] == index]
            self.stack(int(index)).read_into(out, image[here].tolist(), here.tolist())


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, "emsplat-reader")
