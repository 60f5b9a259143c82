"""The loss of a fit over time."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from emsplat.io.files import number_text, replacing


class History:
    """The loss over time, one row per `_EVERY` steps and at the end of each epoch, kept in convergence.csv."""

    _EVERY = 20
    _COLUMNS = ("fit", "epoch", "step", "images", "loss")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[str, int, int, int, float]] = []
        self._pending: list[Tensor] = []
        self.recent = math.nan
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = [
                    (row["fit"], int(row["epoch"]), int(row["step"]), int(row["images"]), float(row["loss"] or "nan"))
                    for row in csv.DictReader(file)
                ]

    @property
    def loss(self) -> str:
        """The last loss as a remark; nothing before the first is known."""
        return f", loss {self.recent:.5f}" if math.isfinite(self.recent) else ""

    def rewind(self, name: str, step: int) -> None:
        """Forgets what this fit did after ``step``."""
        self._rows = [row for row in self._rows if row[0] != name or row[2] <= step]
        self._pending = []
        self.recent = next((row[4] for row in reversed(self._rows) if row[0] == name), math.nan)

    def add(self, name: str, step: int, loss: Tensor, steps_per_epoch: int, images: int) -> None:
        """The loss of a step; ``images`` were seen by then."""
        self._pending.append(loss)
        if step % steps_per_epoch == 0 or len(self._pending) == self._EVERY:
            self.recent = float(torch.stack(self._pending).mean())
            epoch = math.ceil(step / steps_per_epoch)
            self._rows.append((name, epoch, step, images, self.recent))
            self._pending = []

    def write(self) -> None:
        with replacing(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._COLUMNS)
            writer.writerows((*row[:4], number_text(row[4], "")) for row in self._rows)
