"""The loss of a fit over time, and the tables of losses and scores."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emsplat.io.files import number_text, replacing
from emsplat.run.files import CONVERGENCE, SCORES
from emsplat.run.journal import Journal, Loss, Scored, read_journal


class History:
    """The loss of one fit over time, one row of the journal per `_EVERY` steps and at the end of each epoch."""

    _EVERY = 20

    def __init__(self, journal: Journal, name: str) -> None:
        self.name = name
        self._journal = journal
        self._pending: list[Tensor] = []
        self.recent = math.nan

    @property
    def loss(self) -> str:
        """The last loss as a remark; nothing before the first is known."""
        return f", loss {self.recent:.5f}" if math.isfinite(self.recent) else ""

    def rewind(self, step: int) -> None:
        """Forgets what the fit did after ``step``."""
        self._journal.rewind(self.name, step)
        losses = [row.what for row in self._journal.rows() if isinstance(row.what, Loss)]
        self._pending = []
        self.recent = next((one.loss for one in reversed(losses) if one.fit == self.name), math.nan)

    def add(self, step: int, loss: Tensor, steps_per_epoch: int, images: int) -> None:
        """The loss of a step; ``images`` were seen by then."""
        self._pending.append(loss)
        if step % steps_per_epoch == 0 or len(self._pending) == self._EVERY:
            self.recent = float(torch.stack(self._pending).mean())
            self._journal.add(Loss(self.name, step, math.ceil(step / steps_per_epoch), images, self.recent))
            self._pending = []


def write_tables(folder: Path) -> None:
    """convergence.csv and, where there are any scores, scores.csv, from the journal of a run.

    Raises:
        InputError: the journal cannot be read.
        OutputError: they cannot be written.
    """
    happened = [row.what for row in read_journal(folder)]
    losses = [one for one in happened if isinstance(one, Loss)]
    scores = [one for one in happened if isinstance(one, Scored)]
    _write_table(
        folder / CONVERGENCE,
        ("fit", "epoch", "step", "images", "loss"),
        ((one.fit, one.epoch, one.step, one.images, number_text(one.loss, "")) for one in losses),
    )
    if scores:
        _write_table(
            folder / SCORES,
            ("epoch", "gaussians", "score"),
            ((one.epoch, one.gaussians, number_text(one.score, ".6f")) for one in scores),
        )


def _write_table(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
