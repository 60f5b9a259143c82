"""What all benchmarks share: synthetic mixtures, timing, and results with machine, commit and versions."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from emsplat.maths.geometry import random_rotations
from emsplat.types import Gaussians, Grid, Poses

RESULTS = Path(__file__).parent / "results"


def best_time(work, repeats=3):
    """Shortest of several timings in seconds; the first call, which warms up, does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def whole_command(*words, folder=None, silent=False):
    """A program as a user runs it: wall time, processor time (user and system), peak memory and exit code."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    said = subprocess.DEVNULL if silent else None
    start = time.monotonic()
    process = subprocess.Popen([str(word) for word in words], cwd=folder, env=environment, stdout=said, stderr=said)
    _, status, usage = os.wait4(process.pid, 0)
    return {
        "wall_s": round(time.monotonic() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "exit": os.waitstatus_to_exitcode(status),
    }


def emsplat(*words, silent=False):
    return whole_command(Path(sys.executable).with_name("emsplat"), *words, silent=silent)


def globule(count, grid, sigma, seed=0):
    """Gaussians of about ``sigma`` pixels, evenly in a ball of 0.6 box lengths."""
    rng = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=rng), dim=1)
    mean = 0.3 * grid.length * direction * torch.rand(count, 1, generator=rng) ** (1 / 3)
    axes = random_rotations(count, rng).float()
    scale = sigma * grid.pixel_size * torch.exp(0.2 * torch.randn(count, 3, generator=rng))
    return Gaussians(mean, axes @ torch.diag_embed(scale**2) @ axes.mT, torch.rand(count, generator=rng))


def random_poses(count, seed=1):
    return Poses(random_rotations(count, torch.Generator().manual_seed(seed)).float(), torch.zeros(count, 2))


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor()


def commit():
    """The commit, "-dirty" where anything but results differs from it."""

    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False)

    differs = git("diff", "--quiet", "HEAD", "--", ":/", f":(exclude){RESULTS}").returncode
    return git("describe", "--always").stdout.strip() + "-dirty" * bool(differs)


def rows_of(name):
    """The rows of results/<name>.json, read again each time: several processes may add to them."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add(name, rows, key):
    """Writes rows, each with its commit, beside those of earlier runs that differ from them in the columns ``key``."""
    new = {tuple(row.get(column) for column in key) for row in rows}
    before = [row for row in rows_of(name) if tuple(row.get(column) for column in key) not in new]
    save(name, [*before, *({**row, "commit": commit()} for row in rows)])


def save(name, rows, **machine):
    """Writes results/<name>.json; ``machine`` is what else there is to say of it."""
    about = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": {package: version(package) for package in ("emsplat", "torch", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
        **machine,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


__all__ = [
    "Grid",
    "add",
    "best_time",
    "emsplat",
    "globule",
    "random_poses",
    "rows_of",
    "save",
    "whole_command",
]
