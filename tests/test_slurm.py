"""Batch scripts, parts of the particles, and what a run is expected to need."""

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch

from emsplat.cli import main
from emsplat.config import (
    AbinitioConfig,
    BackprojectConfig,
    HeterogeneityConfig,
    ReconstructConfig,
    RefineConfig,
    configure,
)
from emsplat.errors import InputError
from emsplat.io.mrc import read_map
from emsplat.particles.choose import read_table
from emsplat.particles.copies import particle_numbers
from emsplat.particles.open import open_particles
from emsplat.programs.estimate import estimate_of, speed_of_core
from emsplat.programs.reconstruct import backproject
from emsplat.programs.settings import settings_of
from emsplat.run.folder import read_summary
from emsplat.run.journal import Foreseen, Part, read_journal


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=60)


def job(words, capsys):
    assert main(["slurm", *map(str, words)]) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    settings = dict(line[len("#SBATCH --") :].split("=") for line in text.splitlines() if line.startswith("#SBATCH"))
    return text, settings


def test_a_job_of_one_process(particles, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--threads", 16, "--time", "1:00:00", "reconstruct", particles, "-o", "a run", "--symmetry", "D2"]
    text, settings = job(words, capsys)
    assert settings["nodes"] == settings["ntasks-per-node"] == "1"
    assert settings["cpus-per-task"] == "16"
    assert settings["time"] == "1:00:00"
    assert "gpus-per-node" not in settings
    last = text.splitlines()[-1]
    assert last.startswith("exec srun python -m emsplat reconstruct ")
    assert shlex.split(last)[7:11] == ["-o", "a run", "--symmetry", "D2"]
    assert "--time-limit 55 $resume --threads 16" in last
    assert f"cd {tmp_path}" in text
    assert "if [ -f 'a run/config.toml' ]; then resume=--resume; fi" in text


def test_a_job_of_many_processes(particles, capsys):
    words = ["--nodes", 2, "--processes", 4, "--gpu", "--partition", "gpu", "--account", "lab"]
    text, settings = job([*words, "backproject", particles, "-o", "run"], capsys)
    wanted = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "32", "gpus-per-node": "4"}
    assert wanted.items() <= settings.items()
    assert (settings["partition"], settings["account"]) == ("gpu", "lab")
    assert "srun torchrun --nnodes 2 --nproc-per-node 4" in text


@pytest.mark.parametrize("command", ["refine", "abinitio", "heterogeneity"])
def test_a_job_of_what_takes_longer(particles, capsys, command):
    text, settings = job(["--processes", 2, command, particles, "-o", "run"], capsys)
    assert settings["job-name"] == f"emsplat-{command}"
    assert re.search(r"# Estimated for 60 images: about .* of memory, .* on disk for each process\.\n", text)
    assert f"-m emsplat {command} " in text.splitlines()[-1]


@pytest.mark.slow
def test_a_job_in_parts_runs_without_processes_that_talk(simulated, tmp_path, capsys, monkeypatch):
    """Its commands, run here one after the other, give the map of the whole."""
    particles = simulated(particles=300)
    monkeypatch.chdir(tmp_path)
    given = ["--parts", 3, "--threads", 1, "--time", "2:00:00"]  # not the estimate: this machine may have more to do
    text, _ = job([*given, "backproject", particles, "-o", "my run", "--diameter", 100], capsys)
    (tmp_path / "job.sh").write_text(text)
    assert "--array=2-3 job.sh" in text
    ran = []
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > words\n')
    (tmp_path / "srun").chmod(0o755)
    for task in ("2", "3", ""):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": task}
        subprocess.run(["bash", "job.sh"], env=environment, check=True, capture_output=True)
        ran.append((tmp_path / "words").read_text().split("\0")[3:-1])
        assert main(ran[-1]) == 0
    assert "./my run_part2" in ran[0]
    backproject(configure(BackprojectConfig, threads=1, diameter=100.0), particles, tmp_path / "whole")
    for name in ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc"):
        parts, whole = read_map(tmp_path / "my run" / name)[0], read_map(tmp_path / "whole" / name)[0]
        # Noise is weighted by the spectrum that each part shows, which of 50 images is not the same.
        assert float((parts * whole).sum() / parts.norm() / whole.norm()) > 0.95


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["reconstruct", "{}"], "give the run folder with -o"),
        (["--parts", "1", "reconstruct", "{}", "-o", "run"], "expected at least 2"),
        (["--parts", "3", "--nodes", "2", "reconstruct", "{}", "-o", "run"], "leave --nodes and --processes out"),
        (["--parts", "3", "reconstruct", "{}", "-o", "run", "--engine", "images"], "needs all of them in one run"),
        (["--parts", "3", "refine", "{}", "-o", "run"], "refine needs all particles in one run"),
        (["--time", "soon", "reconstruct", "{}", "-o", "run"], "--time soon: expected"),
        (["reconstruct", "none.star", "-o", "run"], "none.star"),
        (["reconstruct", "{}", "-o", "run", "--simmetry", "D2"], "no such option"),
    ],
)
def test_jobs_that_cannot_run_are_refused(particles, capsys, words, text):
    assert main(["slurm", *(word.format(particles) for word in words)]) == 2
    assert text in capsys.readouterr().err


def test_parts_are_all_particles_once_and_keep_images_of_a_particle_together(particles):
    config = configure(BackprojectConfig)
    whole = read_table(config.choice, particles)
    copied = replace(whole, origin=torch.arange(len(whole)) // 2)
    numbers = particle_numbers(copied)
    rows = []
    for number in range(1, 5):
        part = read_table(replace(config.choice, part=f"{number}/4"), particles)
        rows += part.row.tolist()
    assert sorted(rows) == whole.row.tolist()
    assert len(torch.unique(numbers)) == 30


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "a/b", "2/1000"])
def test_what_is_no_part_is_refused(particles, text):
    with pytest.raises(InputError, match="--part"):
        read_table(configure(BackprojectConfig, part=text).choice, particles)


def test_estimates_grow_with_the_work_and_shrink_with_who_shares_it(particles):
    config = configure(ReconstructConfig)
    stack, settings, estimate = open_particles(particles), settings_of(config), partial(estimate_of, config)
    many = stack.take(torch.arange(60).repeat(100))
    one = estimate(many, settings, threads=1)
    assert one.seconds > estimate(stack, settings, threads=1).seconds
    assert one.seconds > estimate(many, None, threads=1).seconds
    assert one.seconds > estimate(many, settings, threads=2).seconds
    assert one.seconds > estimate(many, settings, threads=1, processes=2).seconds
    assert one.seconds > estimate(many, settings, threads=1, speed=2.0).seconds
    assert one.disk <= estimate(many, settings, threads=1, kept=True).disk
    assert 0 < speed_of_core() < 1000


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (RefineConfig, {"rounds": 1}),
        (AbinitioConfig, {"starts": 2, "steps": 20}),
        (HeterogeneityConfig, {"components": 2}),
        (HeterogeneityConfig, {"engine": "images", "epochs": (1, 1), "components": 2}),
        (HeterogeneityConfig, {"recipe": "cryospire", "epochs": (1, 1), "components": 2}),
    ],
)
def test_estimates_of_every_command(particles, kind, more):
    """More particles take longer in every part; who shares the work is done earlier."""
    stack = open_particles(particles).with_halves(0)
    config, many = configure(kind, **more), stack.take(torch.arange(60).repeat(400))
    settings = settings_of(config) if isinstance(config, RefineConfig) else None
    one, more_images = (estimate_of(config, own, settings, threads=1) for own in (stack, many))
    assert more_images.seconds > 1.5 * one.seconds
    assert all(after.seconds >= before.seconds > 0 for before, after in zip(one.parts, more_images.parts, strict=True))
    for shared in ({"threads": 2}, {"threads": 1, "processes": 2}, {"threads": 1, "speed": 2.0}):
        assert estimate_of(config, many, settings, **shared).seconds < more_images.seconds
    assert one.seconds == pytest.approx(one.begin + sum(part.seconds for part in one.parts))
    assert one.memory > 3e8
    assert one.disk > 1e6
    assert (one.longest > one.seconds) == (kind is AbinitioConfig)
    assert ("where starts do not agree" in one.text) == (kind is AbinitioConfig)
    longer = {
        RefineConfig: {"rounds": 3},
        AbinitioConfig: {"batch": 400},
        HeterogeneityConfig: {"components": 8},
    }[kind]
    assert estimate_of(configure(kind, **(more | longer)), stack, settings, threads=1).seconds > one.seconds


def test_a_run_says_what_it_needed_beside_what_was_expected(particles, tmp_path):
    summary = backproject(configure(BackprojectConfig, threads=1), particles, tmp_path / "run")
    assert summary["estimated"]["seconds"] > 0
    rows = [row.what for row in read_journal(tmp_path / "run")]
    expected = {row.name: round(row.seconds, 1) for row in rows if isinstance(row, Foreseen)}
    assert summary["estimated"]["seconds_of_parts"] == expected
    assert set(expected) <= {row.name for row in rows if isinstance(row, Part)}
    text = (tmp_path / "run" / "run.log").read_text()
    assert "  estimated: about " in text
    assert re.search(r"MB at most, .* on disk \(estimated: about ", text)
    assert read_summary(tmp_path / "run")["processes"] == 1
    shutil.rmtree(tmp_path / "run")
