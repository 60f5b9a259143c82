"""The GPU benchmark runs through, on a device that keeps its tensors apart: a real one is at hand for minutes only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import emsplat.imaging.project
import gpu as benchmark
import roofline
import virtual_device

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(virtual_gpu, monkeypatch):
    monkeypatch.setattr(benchmark, "STEPS", 0.0)
    monkeypatch.setattr(benchmark.Scene, "noise", 1.0)
    monkeypatch.setattr(benchmark, "backend", emsplat.imaging.project.backend)
    loops = roofline.Loops(134, 33, 53)
    monkeypatch.setattr(roofline, "splat_loops", lambda name: loops)  # the compiler has a test of its own
    return benchmark.Bench(virtual_device.DEVICE, roofline.H100, [], smoke=True)


@pytest.mark.parametrize("part", ["kernels", "step", "accumulation", "readers"])
def test_every_part_runs_on_a_device(bench, part):
    benchmark.PARTS[part](bench)
    assert bench.rows
    rates = [row.get("images_per_second", row.get("milliseconds", row.get("seconds"))) for row in bench.rows]
    assert all(rate > 0 for rate in rates)


@pytest.mark.slow
def test_images_made_on_a_device_give_back_their_mixture(bench):
    benchmark.volume_fit(bench)
    assert bench.rows[-1]["correlation_with_truth"] > 0.8


@pytest.mark.slow
def test_a_whole_run_of_images_made_on_a_device(bench, monkeypatch):
    monkeypatch.setattr(benchmark.opening, "choose_device", lambda wanted: (bench.device, "a device"))
    monkeypatch.setattr("emsplat.report.write_report", lambda run, *_: None)
    benchmark.whole(bench)
    assert bench.rows[-1]["seconds"] > 0


def test_counted_instructions_give_the_bounds():
    """A footprint of 13 x 13 pixels takes one column of two tiles of 8 x 16."""
    from emsplat.types import Gaussians, Grid

    one = Gaussians(torch.zeros(1, 3), 1.5**2 * torch.eye(3)[None], torch.ones(1))
    work = roofline.project_instructions(roofline.Loops(100, 10, 1), one, benchmark.random_poses(3), Grid(64, 1.0))
    assert work == 100 + 10 + 2


@pytest.mark.slow
def test_machine_code_is_counted(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, FOLDER / "roofline.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("project: instructions per view or slice")
    assert sum("accumulation:" in line for line in lines) == 3
