"""What this process may use of its machine: cores and memory, whoever limits them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Cores of a job as queueing systems say them, in the order of how exactly they mean this process and this machine.
_JOB = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "PBS_NUM_PPN", "NCPUS", "LSB_DJOB_NUMPROC", "NSLOTS")
_CGROUPS = (Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


@dataclass(frozen=True)
class Granted:
    """How many cores this process may use, and what says so ("" where nothing holds it back)."""

    cores: int
    source: str


def granted_cores(
    environment: Mapping[str, str] | None = None,
    allowed: int | None = None,
    cgroups: tuple[Path, Path] = _CGROUPS,
) -> Granted:
    """The fewest of: cores that exist, CPU affinity (``allowed``), quotas of control groups (v1 and v2), the cores of
    the job (SLURM, PBS, LSF, Grid Engine), OMP_NUM_THREADS.

    ``cgroups``: the file that says which groups a process is in, and the folder that they are mounted at. A quota of
    2.5 cores is 3 threads, which together get all of it.
    """
    environment = os.environ if environment is None else environment
    existing = os.cpu_count() or 1
    if allowed is None:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else existing
    found = [Granted(existing, ""), Granted(allowed, "CPU affinity")]
    quota = min(_limits("cpu", _quota_v2, _quota_v1, *cgroups), default=None)
    if quota is not None:
        found.append(Granted(max(1, math.ceil(quota)), "CPU quota"))
    for name in (next((name for name in _JOB if _count(environment.get(name))), None), "OMP_NUM_THREADS"):
        if name is not None and (count := _count(environment.get(name))):
            found.append(Granted(count, name))
    return min(found, key=lambda one: one.cores)  # the first of equals


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroups: tuple[Path, Path] = _CGROUPS) -> float | None:
    """Bytes that this process can still have: what the machine has to spare, or what is left to its control groups
    (v1 and v2; jobs of Slurm and containers are such groups) where that is less. None where the system does not say."""
    try:
        rows = [line.split() for line in meminfo.read_text(encoding="ascii").splitlines()]
        machine = next(1024.0 * int(row[1]) for row in rows if row[0] == "MemAvailable:")
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return min([machine, *_limits("memory", _memory_v2, _memory_v1, *cgroups)])


def _count(text: str | None) -> int | None:
    """A number of cores above 0; of a list, as OMP_NUM_THREADS may hold, the first."""
    first = (text or "").split(",")[0].strip()
    return int(first) or None if first.isascii() and first.isdigit() else None


def _limits(
    controller: str,
    read_v2: Callable[[Path], float | None],
    read_v1: Callable[[Path], float | None],
    memberships: Path,
    root: Path,
) -> Iterator[float]:
    """The limits of the control groups of this process and of those they lie in.

    In a container the groups' names may be those outside, where only the root of the mount tells.
    """
    try:
        lines = memberships.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            bases, read = [root, root / "unified"], read_v2
        elif controller in controllers.split(","):
            bases, read = [root / controllers, root / controller], read_v1
        else:
            continue
        below = Path(group.strip("/"))
        for base in bases:
            for folder in (below, *below.parents):
                try:
                    limit = read(base / folder)
                except (OSError, ValueError, ZeroDivisionError):
                    continue
                if limit is not None:
                    yield limit


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii")) for name in ("quota", "period"))
    return quota / period if quota > 0 else None


def _memory_v2(folder: Path) -> float | None:
    limit = (folder / "memory.max").read_text(encoding="ascii").strip()
    return None if limit == "max" else int(limit) - _used(folder / "memory.current", folder)


def _memory_v1(folder: Path) -> float | None:
    limit = int((folder / "memory.limit_in_bytes").read_text(encoding="ascii"))  # about 2⁶³ where there is none
    return limit - _used(folder / "memory.usage_in_bytes", folder)


def _used(current: Path, folder: Path) -> int:
    """What cannot be given back: pages of files that nobody has asked for in a while can."""
    used = int(current.read_text(encoding="ascii"))
    rows = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return used - next((int(value) for name, value in rows if name in ("inactive_file", "total_inactive_file")), 0)
