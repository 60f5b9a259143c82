"""A batch script for Slurm, with what the estimate of a run says it needs."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import torch

from emsplat import __version__
from emsplat.config import (
    BackprojectConfig,
    ReconstructConfig,
    RefineConfig,
    RunConfig,
    SlurmConfig,
    change,
    configure,
    flat,
    names,
)
from emsplat.errors import InputError
from emsplat.particles.choose import open_stack
from emsplat.programs.estimate import Estimate, estimate_of
from emsplat.programs.settings import settings_of
from emsplat.run.files import SETTINGS
from emsplat.run.log import counted
from emsplat.run.stop import time_limit

_SURE_TIME, _SURE_MEMORY = 2.0, 1.4  # of what is estimated, so that the queue ends nothing too early
_BEFORE = 5  # minutes before the end of the job in which a run stops in order
_FEWEST = 4  # particles of a part: two of each half-set
_PORT = 29_400  # of the first machine, where processes find each other


def script(
    command: str, words: list[str], particles: Path, output: Path, config: RunConfig, options: SlurmConfig
) -> str:
    """The text of a batch script that runs ``emsplat command words``.

    Args:
        command: As in `cli.slurm`.
        words: As on the command line, without the name of the command.
        particles: The file that they name.
        output: The run folder that they name.
        config: The options that they come to.
        options: How the work is shared out.

    Raises:
        InputError: the particles cannot be used, or the options do not fit each other.
    """
    settings = settings_of(config) if isinstance(config, ReconstructConfig | RefineConfig) else None
    for name in ("nodes", "processes"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: expected at least 1")
    processes = options.nodes * options.processes
    if options.parts == 1 or options.parts < 0:
        raise InputError(f"--parts {options.parts}: expected at least 2; without it processes share the particles out")
    if options.parts and command not in ("reconstruct", "backproject"):
        raise InputError(f"--parts: {command} needs all particles in one run; leave it out, or take --processes")
    if options.parts and (processes > 1 or (settings is not None and settings.engine == "images")):
        raise InputError(
            "--parts: goes with one process, and with the one-pass engine: leave --nodes and --processes out"
            if processes > 1
            else "--parts: the engine of images needs all of them in one run; leave it out, or take --engine one-pass"
        )
    here = change(config, datadir=None) if "{" in str(config.choice.datadir) else config
    stack = open_stack(here, particles, need_poses=command != "abinitio")
    if options.parts and len(stack) < _FEWEST * options.parts:
        raise InputError(
            f"--parts {options.parts}: {len(stack):,} particles; expected at least {_FEWEST} of a part, two of each "
            "half-set"
        )
    if options.parts:
        stack = stack.take(torch.arange(-(-len(stack) // options.parts)))
    needed = estimate_of(
        config,
        stack,
        settings,
        threads=options.threads,
        processes=processes,
        kept=config.run.keep_statistics or options.parts > 0,
    )
    minutes = _minutes(options.time) if options.time else math.ceil(_SURE_TIME * needed.longest / 60 / 10 + 1) * 10
    lines = _head(command, len(stack), needed, minutes, options)
    stop = f"--time-limit {max(minutes - _BEFORE, 1)}"
    words = [word for word in words if word != "--resume"]
    if options.parts and isinstance(config, ReconstructConfig | BackprojectConfig):
        return "\n".join([*lines, *_parts(command, words, particles, output, config, options, stop), ""])
    text = shlex.join([command, *words])
    lines += [*_going_on(output), *_launch(f"-m emsplat {text} {stop} $resume", options)]
    return "\n".join([*lines, ""])


def _minutes(text: str) -> int:
    return max(1, int(time_limit(text, "--time") // 60))


def _head(command: str, images: int, needed: Estimate, minutes: int, options: SlurmConfig) -> list[str]:
    processes = options.processes
    each = max(1, math.ceil(_SURE_MEMORY * needed.memory * processes / 1e9))
    hours, rest = divmod(minutes, 60)
    given = {
        "job-name": f"emsplat-{command}",
        "nodes": options.nodes,
        "ntasks-per-node": 1,  # torchrun, which starts the processes of its machine
        "cpus-per-task": processes * options.threads,
        "mem": f"{each}G",
        "time": f"{hours}:{rest:02d}:00",
        "gpus-per-node": processes if options.gpu else None,
        "partition": options.partition,
        "account": options.account,
        "output": "emsplat-%j.out" if not options.parts else "emsplat-%A_%a.out",
    }
    per = " for each process" if processes * options.nodes > 1 else ""
    where = " (on CPUs; a GPU is faster)" if options.gpu else ""
    part = f" in each of {options.parts} parts" if options.parts else ""
    return [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in given.items() if value is not None),
        f"# Written by emsplat {__version__}.",
        f"# Estimated for {counted(images, 'image')}{part}: {needed.text}{per}{where}.",
        f"# Asked for are {_SURE_TIME:g} times the time (without --time) and {_SURE_MEMORY:g} times the memory.",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
    ]


def _going_on(output: Path) -> list[str]:
    return [
        "# The same job again goes on where it was stopped.",
        "resume=",
        f"if [ -f {shlex.quote(str(output / SETTINGS))} ]; then resume=--resume; fi",
    ]


def _launch(text: str, options: SlurmConfig) -> list[str]:
    threads = f"--threads {options.threads}"
    if options.nodes * options.processes == 1:
        return [f"exec srun python {text} {threads}"]
    return [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"exec srun torchrun --nnodes {options.nodes} --nproc-per-node {options.processes} \\",
        f'  --rdzv-backend c10d --rdzv-endpoint "$head:{_PORT}" --rdzv-id "$SLURM_JOB_ID" \\',
        f"  {text} {threads}",
    ]


def _parts(
    command: str,
    words: list[str],
    particles: Path,
    output: Path,
    config: ReconstructConfig | BackprojectConfig,
    options: SlurmConfig,
    stop: str,
) -> list[str]:
    """Sums of each part in a job of its own, and the run that adds them up to its own."""
    folders = [output.with_name(f"{output.name}_part{number}") for number in range(2, options.parts + 1)]
    text = shlex.join([command, *words, "--part", f"1/{options.parts}", "--add-statistics", *map(str, folders)])
    own = {name: value for name, value in flat(config).items() if name in set(names(BackprojectConfig))}
    sums = configure(BackprojectConfig, **own)
    part = shlex.join(["backproject", str(particles), *_spelled(sums), "--keep-statistics"])
    folder = f"{output.name}_part$SLURM_ARRAY_TASK_ID"
    folder = f'{shlex.quote(str(output.parent))}/"{folder}"'
    return [
        "# Submit the parts, and then the run that adds their sums to its own:",
        f"#   parts=$(sbatch --parsable --array=2-{options.parts} job.sh)",
        "#   sbatch --dependency=afterok:$parts job.sh",
        "resume=",
        'if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then',
        f"  if [ -f {folder}/{SETTINGS} ]; then resume=--resume; fi",
        f"  exec srun python -m emsplat {part} --part $SLURM_ARRAY_TASK_ID/{options.parts} -o {folder} "
        f"{stop} --threads {options.threads} $resume",
        "fi",
        *_going_on(output)[2:],
        *_launch(f"-m emsplat {text} {stop} $resume", options),
    ]


def _spelled(config: BackprojectConfig) -> list[str]:
    """The options that are not as by default, as on the command line."""
    usual, words = flat(BackprojectConfig()), list[str]()
    spelled = {"particle_class": "class"}
    for name, value in flat(config).items():
        if value == usual[name] or name in ("keep_statistics", "resume", "overwrite", "threads", "time_limit", "part"):
            continue
        flag = spelled.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words
