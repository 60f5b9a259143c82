"""Null tests: what is done to the particles, and that the default pipeline passes while its half-map FSC does not."""

import csv
import io
import json
import os
import re
from dataclasses import replace

import pytest
import torch

from emsplat.cli import main
from emsplat.maths.fourier import randomise_phases, shell_index
from emsplat.particles.open import open_particles
from emsplat.programs.nulltest import Outcome
from emsplat.programs.nulltest import _noise_like as noise_like
from emsplat.programs.nulltest import _report as report_table
from emsplat.programs.nulltest import _without_radial_part as without_radial_part
from emsplat.programs.nulltest import _write as write_altered
from emsplat.report.page import null_tests
from emsplat.run.journal import Begun, Ended, Part, read_journal
from emsplat.run.log import Log

MEASURES = ("half_map_masked", "half_map_corrected", "backprojection_masked", "cross_validated", "reported")


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=600, snr=0.2)


def images():
    smooth = torch.nn.functional.avg_pool2d(torch.randn(8, 34, 34, generator=torch.Generator().manual_seed(0)), 3, 1)
    return smooth


def test_noise_has_the_spectrum_of_its_image():
    generator = torch.Generator().manual_seed(1)
    found = torch.stack([noise_like(images(), generator) for _ in range(200)])
    shells = shell_index(32).flatten()
    power = [torch.fft.rfft2(i).abs().square().flatten(-2) for i in (found, images())]
    sums = [torch.zeros(8, 24).index_add_(1, shells, p.mean(0) if p.dim() == 3 else p) for p in power]
    torch.testing.assert_close(sums[0][:, 1:16], sums[1][:, 1:16], rtol=0.15, atol=0)
    assert float((found.mean(0) * images()).mean().abs()) < 0.02 * float(images().square().mean())


def test_random_phases_begin_at_their_shell():
    altered = torch.fft.rfft2(randomise_phases(images(), 6, torch.Generator().manual_seed(0)))
    before, low = torch.fft.rfft2(images()), shell_index(32) < 6
    torch.testing.assert_close(altered[:, low], before[:, low], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(altered.abs(), before.abs(), rtol=1e-3, atol=1e-3)
    high = ~low & (shell_index(32) < 16)
    assert float((altered.conj() * before).real[:, high].sum() / before[:, high].abs().square().sum()) < 0.2


def test_shuffled_poses_keep_everything_else(particles, tmp_path):
    stack = open_particles(particles).with_halves(0)
    star = write_altered("poses", stack, tmp_path, 0, seed=0)
    altered = open_particles(star)
    assert len(altered) == len(stack)
    assert torch.equal(altered.half, stack.half)
    torch.testing.assert_close(altered.table.optics.defocus_u, stack.table.optics.defocus_u)
    same = (altered.table.poses.rotation - stack.table.poses.rotation).abs().flatten(1).max(1).values < 1e-5
    assert float(same.float().mean()) < 0.02
    order = altered.table.poses.shift[:, 0].sort().values
    torch.testing.assert_close(order, stack.table.poses.shift[:, 0].sort().values)
    first, second = (next(iter(s.take(torch.arange(4)).sequential(4))).images for s in (stack, altered))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_rotational_average_is_taken_out():
    """All of a radial map, and nothing of an odd one."""
    axis = torch.arange(32) - 16.0
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    shell = torch.exp(-((radius - 7) ** 2) / 4)
    odd = shell * axis / 8
    nothing, rest = without_radial_part((shell, shell + odd))
    assert float(nothing.norm()) < 0.01 * float(shell.norm())
    assert float((rest - odd).norm()) < 0.02 * float(odd.norm())


def test_each_row_of_the_table_has_its_verdict_and_says_what_silent_means(tmp_path):
    nyquist = 7.08
    outcomes = [
        Outcome("unaltered", "a resolution", None, nyquist, nyquist, 7.31, nyquist, nyquist),
        Outcome("noise", "no resolution", None, 144.0, None, None, None, None),
        Outcome("phases", "none finer than 13.33 Å", 13.33, 12.59, 13.33, 14.16, 15.1, 15.1),
        Outcome("poses", "none finer than 56.64 Å", 56.64, None, None, 75.52, 50.0, 50.0),
    ]
    log = Log(io.StringIO())
    assert not report_table(outcomes, nyquist, tmp_path, log)
    said = {line.split("  ")[0]: re.split(" {2,}", line)[1:] for line in log.stream.getvalue().splitlines()}
    assert said["expected"] == [one.expected for one in outcomes]
    assert said["half maps, masked"] == [
        "7.08 Å or finer",
        "144.00 Å, not silent",
        "12.59 Å, not silent",
        "none, silent",
    ]
    assert said["half maps, corrected"][2] == "13.33 Å, silent"
    assert said["cross-validated"][1:] == ["none, silent", "15.10 Å, silent", "50.00 Å, NOT SILENT"]
    assert said["reported by the run"][3] == "50.00 Å"  # the rotational average is truly shared
    assert said["verdict"] == ["has a resolution", "passed", "passed", "FAILED"]
    assert "Silent: no resolution, or none finer than" in log.stream.getvalue()
    assert report_table(outcomes[:3], nyquist, tmp_path, log)
    assert not report_table([replace(outcomes[0], reported=None), *outcomes[1:3]], nyquist, tmp_path, log)
    result = json.loads((tmp_path / "nulltest.json").read_text())
    assert [test["verdict"] for test in result["tests"]] == ["FAILED", "passed", "passed"]
    page = null_tests(tmp_path)
    assert "7.08 Å or finer" in page
    assert page.count(">passed<") == 2
    assert "Silent: no resolution" in page


@pytest.mark.slow
def test_default_pipeline_passes(particles, tmp_path, capsys):
    output = tmp_path / "null"
    assert main(["nulltest", str(particles), "-o", str(output), "--epochs", "3", "--gaussians", "500"]) == 0
    said = capsys.readouterr().out
    # What is not judged is neither silent nor loud, and the end says so.
    assert "NOT SILENT" not in said
    assert "not silent, so upper limits at best: half maps, masked" in said
    result = json.loads((output / "nulltest.json").read_text())
    assert result["passed"]
    tests = {row["name"]: row for row in result["tests"]}
    assert tests["unaltered"]["reported"] < 16
    assert tests["noise"]["reported"] is None
    assert tests["poses"]["cross_validated"] is None or tests["poses"]["cross_validated"] >= 128 / 4.01
    limit = tests["phases"]["limit"]
    assert tests["phases"]["reported"] is None or tests["phases"]["reported"] >= 0.999 * limit
    # Two models of noise agree all the same: the measure that stays silent is not theirs.
    assert tests["noise"]["half_map_masked"] is not None
    with (output / "nulltest.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["unaltered", "noise", "phases", "poses"]
    assert not list(output.rglob("particles.mrcs"))
    for name, test in tests.items():
        run = output / name / "run"
        assert (run / "report.html").is_file()
        assert json.loads((run / "summary.json").read_text())["altered"] == name
        assert test["silent"].get("cross_validated", True)
    assert tests["noise"]["silent"]["half_map_masked"] is False
    assert (output / "report.html").is_file()
    happened = [row.what for row in read_journal(output)]
    assert isinstance(happened[0], Begun)
    assert (happened[0].program, happened[0].process) == ("emsplat nulltest", os.getpid())
    assert [one.name for one in happened if isinstance(one, Part)] == ["unaltered", "noise", "phases", "poses"]
    assert isinstance(happened[-1], Ended)
    assert main(["nulltest", str(particles), "-o", str(output)]) == 2  # not empty


def test_impossible_requests(particles, tmp_path, capsys):
    assert main(["nulltest", str(particles), "-o", str(tmp_path / "a"), "--particles", "2"]) == 2
    assert "--particles" in capsys.readouterr().err
    words = ["--randomise-from", "1", "--epochs", "1", "--gaussians", "100", "--particles", "100"]
    assert main(["nulltest", str(particles), "-o", str(tmp_path / "b"), *words]) == 2
    assert "--randomise-from" in capsys.readouterr().err
