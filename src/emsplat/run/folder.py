"""The run folder: made, checked, resumed; what a run writes down while it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emsplat.config import ReconstructConfig, RunConfig, flat
from emsplat.errors import InputError, OutputError
from emsplat.io.files import TEMPORARY, replacing
from emsplat.run.files import SETTINGS, SUMMARY, statistics_name


def prepare_folder(config: RunConfig, particles: Path, output: Path, stacks: Sequence[Path] = ()) -> None:
    """An empty folder, or with ``resume`` one that holds the same run. Files of a RELION job do not count and stay.
    ``stacks`` are those of the particles, which are not to be removed any more than other input.

    Raises:
        OutputError: it holds something else.
        InputError: it holds a run with other settings.
    """
    if config.run.resume:
        check_same_run(config, particles, output)
        for path in output.glob(TEMPORARY):  # of a process that was killed while it wrote
            path.unlink(missing_ok=True)
    elif output.exists() and (not output.is_dir() or _contents(output)):
        if not config.run.overwrite:
            raise OutputError(
                f"{output}: is not empty; choose another with -o, go on with --resume or start anew with --overwrite"
            )
        if not (output / SETTINGS).is_file():
            raise OutputError(
                f"{output}: does not look like a run folder (no {SETTINGS}); --overwrite removes only those"
            )
        if inside := next((path for path in (particles, *_given(config), *stacks) if _is_below(path, output)), None):
            raise OutputError(f"{output}: holds the input {inside}; choose another folder with -o")
        for path in _contents(output):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error


def _given(config: RunConfig) -> Iterator[Path]:
    """The files and folders that options name."""
    for value in flat(config).values():
        for one in value if isinstance(value, tuple) else (value,):
            if (isinstance(one, Path) and one.exists()) or (isinstance(one, str) and Path(one).is_file()):
                yield Path(one)


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


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


OWN_OF_PROCESS = frozenset({"threads", "datadir", "device"})  # options that processes may differ in
_MAY_CHANGE = OWN_OF_PROCESS | {"resume", "overwrite", "checkpoint_every", "time_limit", "force", "profile"}


def check_same_run(config: RunConfig, particles: Path, output: Path) -> None:
    """
    Raises:
        InputError: the folder holds no run, or one of other particles or with other options; or the run is to be thrown
            away at the same time.
    """
    import tomllib

    if config.run.overwrite:
        raise InputError("--resume goes on with a run and --overwrite throws it away: expected one of them")
    try:
        before = tomllib.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "there is none" if isinstance(error, FileNotFoundError) else error
        raise InputError(f"{output}: no run to resume ({why}); start it without --resume") from error
    # What the run does not say it had by default: it may be older than an option.
    options = plain(type(config)()) | before.get("options", {})
    now = json.loads(json.dumps(plain(config)))
    changed = [
        name for name in now.keys() | options.keys() if name not in _MAY_CHANGE and now.get(name) != options.get(name)
    ]
    if Path(before.get("particles", "")).absolute() != particles.absolute():
        changed.append("particles")
    fitted = isinstance(config, ReconstructConfig)  # what an earlier version has written is known by its settings alone
    if before.get("command", command_of(config)) != command_of(config) or bool(before.get("settings")) != fitted:
        changed.append("command")
    if changed:
        raise InputError(
            f"{output}: was run with another {', '.join(sorted(changed))}; resume with the same options, see "
            f"{output / SETTINGS}"
        )


def command_of(config: RunConfig) -> str:
    """The command whose options these are."""
    return type(config).__name__.removesuffix("Config").lower()


def finished_summary(config: RunConfig, particles: Path, output: Path) -> dict[str, Any] | None:
    """The summary of the run that ``resume`` asks for, where nothing is left of it to do.

    Raises:
        InputError: the folder holds no such run.
    """
    if not config.run.resume:
        return None
    check_same_run(config, particles, output)
    summary = read_summary(output)
    return summary if is_finished(summary) else None


def is_finished(summary: dict[str, Any]) -> bool:
    """Whether a summary is that of a run which came to its end: the time of the whole is written last."""
    return "seconds" in summary


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as TOML and JSON can hold it: without None, paths as text."""

    def simple(value: Any) -> Any:
        if isinstance(value, tuple):
            return [simple(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: simple(value) for name, value in flat(config).items() if value is not None}


def added_statistics(folder: Path, fit: str) -> list[Path]:
    """The sums of a fit that a finished run has kept.

    Raises:
        InputError: it has kept none.
    """
    found = sorted(folder.glob(statistics_name(fit, "*")))
    if not found:
        raise InputError(f"{folder}: no {statistics_name(fit)}; run that with --keep-statistics")
    return found


def read_summary(run: Path) -> dict[str, Any]:
    """The numbers of a finished run; empty where there are none yet.

    Raises:
        InputError: summary.json cannot be read.
    """
    path = run / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected JSON; remove it to go on without") from error
    return summary


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
