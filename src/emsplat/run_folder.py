"""The run folder: made, checked, resumed; what a run writes down while it goes on."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emsplat.config import InputConfig, ReconstructConfig
from emsplat.errors import InputError, Interrupted, OutputError
from emsplat.fit import State
from emsplat.io.files import number_text, replacing


def prepare_folder(config: InputConfig, particles: Path, output: Path) -> None:
    """An empty folder, or with ``resume`` one that holds the same run. Files of a RELION job do not count and stay.

    Raises:
        OutputError: it holds something else.
        InputError: it holds a run with other settings.
    """
    if config.resume:
        check_same_run(config, particles, output)
    elif output.exists() and (not output.is_dir() or _contents(output)):
        if not config.overwrite:
            raise OutputError(
                f"{output}: is not empty; choose another with -o, go on with --resume or start anew with --overwrite"
            )
        if not (output / "config.toml").is_file():
            raise OutputError(
                f"{output}: does not look like a run folder (no config.toml); --overwrite removes only those"
            )
        if particles.resolve().is_relative_to(output.resolve()):
            raise OutputError(f"{output}: holds the input {particles}; choose another folder with -o")
        for path in _contents(output):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error


# What RELION keeps in the folder of a job (RELION_*: how it ended, what it wrote), its pipeliner in hidden files.
_RELION_FILES = (
    "run.out",
    "run.err",
    "run.job",
    "note.txt",
    "job.star",
    "continue_job.star",
    "job_pipeline.star",
    "default_pipeline.star",
    "run_submit.script",
    "RELION_*",
    ".*",
)


def _contents(output: Path) -> list[Path]:
    return [path for path in output.iterdir() if not any(path.match(pattern) for pattern in _RELION_FILES)]


_MAY_CHANGE = {"resume", "overwrite", "threads", "device", "checkpoint_every", "datadir", "force"}


def check_same_run(config: InputConfig, particles: Path, output: Path) -> None:
    """
    Raises:
        InputError: the folder holds no run, or one of other particles or with other options.
    """
    import tomllib

    try:
        before = tomllib.loads((output / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{output}: no run to resume ({error}); start it without --resume") from error
    # What the run does not say it had by default: it may be older than an option.
    options = plain(type(config)()) | before.get("options", {})
    now = json.loads(json.dumps(plain(config)))
    changed = [
        name for name in now.keys() | options.keys() if name not in _MAY_CHANGE and now.get(name) != options.get(name)
    ]
    if Path(before.get("particles", "")).absolute() != particles.absolute():
        changed.append("particles")
    if bool(before.get("settings")) != isinstance(config, ReconstructConfig):  # those of a fit
        changed.append("command")
    if changed:
        raise InputError(
            f"{output}: was run with another {', '.join(sorted(changed))}; resume with the same options, see "
            f"{output / 'config.toml'}"
        )


def is_finished(summary: dict[str, Any]) -> bool:
    """Whether a summary is that of a run which came to its end: the time of the whole is written last."""
    return "seconds" in summary


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as TOML and JSON can hold it: without None, paths as text."""

    def simple(value: Any) -> Any:
        if isinstance(value, tuple):
            return [simple(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: simple(value) for name, value in asdict(config).items() if value is not None}


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

    def add(self, name: str, state: State[Any], steps_per_epoch: int, images: int) -> None:
        self._pending.append(state.terms["loss"])
        if state.step % steps_per_epoch == 0 or len(self._pending) == self._EVERY:
            self.recent = float(torch.stack(self._pending).mean())
            epoch = math.ceil(state.step / steps_per_epoch)
            self._rows.append((name, epoch, state.step, images, self.recent))
            self._pending = []

    def write(self) -> None:
        with replacing(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._COLUMNS)
            writer.writerows((*row[:4], number_text(row[4], "")) for row in self._rows)


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


def read_summary(run: Path) -> dict[str, Any]:
    """The numbers of a finished run; empty where there are none yet.

    Raises:
        InputError: summary.json cannot be read.
    """
    path = run / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected JSON; remove it to go on without") from error
    return summary


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
