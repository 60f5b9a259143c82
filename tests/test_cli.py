"""The command line beside `reconstruct`: every option once, exit codes, one-line errors."""

import dataclasses
import gzip
import subprocess
import sys
import tomllib

import mrcfile
import pytest
import torch

from emsplat.cli import main
from emsplat.config import SimulateConfig, StateOptions, names
from emsplat.imaging.project import voxelize
from emsplat.io.gaussians import write_gaussians
from emsplat.io.mrc import read_map, write_map
from emsplat.io.relion.read import read_star
from emsplat.types import Gaussians, Grid


def test_every_option_of_simulate(tmp_path):
    options = {
        "--box": "32",
        "--pixel-size": "4",
        "--particles": "30",
        "--snr": "0.2",
        "--noise": "coloured",
        "--shift": "2",
        "--defocus-min": "9000",
        "--defocus-max": "10000",
        "--defocus-spread": "10",
        "--astigmatism": "100",
        "--voltage": "200",
        "--cs": "1.4",
        "--amplitude-contrast": "0.07",
        "--phase-shift": "30",
        "--micrograph-particles": "10",
        "--b-factor": "80",
        "--atoms": "800",
        "--model-seed": "3",
        "--pose-error": "2",
        "--dtype": "float16",
        "--seed": "4",
    }
    # Which states: tests/test_states.py.
    options |= {"--contrast-spread": "0.2"}
    of_states = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(StateOptions)} - {"--contrast-spread"}
    flags = ["--keep-frame", "--noise-only", "--no-half-sets", "--overwrite"]
    words = [word for pair in options.items() for word in pair]
    assert main(["simulate", "-o", str(tmp_path / "out"), *words, *flags]) == 0
    named = {f"--{name.replace('_', '-')}" for name in names(SimulateConfig)} - of_states
    assert named - {"--half-sets"} == set(options) | set(flags) - {"--no-half-sets"}
    written = tomllib.loads((tmp_path / "out" / "simulate.toml").read_text())["settings"]
    for name, value in options.items():
        assert str(written[name[2:].replace("-", "_")]).removesuffix(".0") == value.removesuffix(".0")
    table = read_star(tmp_path / "out" / "particles.star")
    assert (len(table), table.half) == (30, None)
    assert table.optics.voltage.unique().tolist() == [200]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "particles"
    words = ["--box", "32", "--pixel-size", "4", "--particles", "20", "--atoms", "800"]
    assert main(["simulate", "-o", str(folder), *words]) == 0
    return folder / "truth.mrc"


def test_fsc_of_a_map_with_itself(truth, tmp_path, capsys):
    words = ["--mask", str(truth), "-o", str(tmp_path / "fsc.star")]
    assert main(["fsc", str(truth), str(truth)]) == 0
    printed = capsys.readouterr().out
    assert "FSC 0.143 unmasked: 8.00 Å or finer, the limit of the pixel size: the curve never falls to 0.143" in printed
    assert "last shell before the drop" not in printed
    assert "are the same map" in printed
    assert (
        "cryoDRGN's rule (other shells, last crossing; not comparable): 8.53 Å or finer, the limit of the pixel size\n"
        in printed
    )
    assert "mean over shells 1 to 16, unmasked: 1.0000" in printed
    assert "shell" in printed
    assert main(["fsc", str(truth), str(truth), *words]) == 2  # a density is no mask: values outside 0 to 1
    assert "mask" in capsys.readouterr().err
    volume, grid = read_map(truth)
    write_map(tmp_path / "mask.mrc", (volume > volume.mean()).float(), grid.pixel_size)
    assert main(["fsc", str(truth), str(truth), "--mask", str(tmp_path / "mask.mrc"), *words[2:]]) == 0
    written = (tmp_path / "fsc.star").read_text()
    assert "rlnFourierShellCorrelationMaskedMaps" in written
    assert "rlnFourierShellCorrelationCorrected" in written
    printed = capsys.readouterr().out
    assert "corrected" in printed
    assert "mean over shells 1 to 16, masked: 1.0000" in printed


@pytest.mark.report
@pytest.mark.parametrize(
    "words",
    [
        ["reconstruct", "none.star", "-o", "run"],
        ["fsc", "none.mrc", "none.mrc"],
        ["voxelize", "none.ply", "-o", "map.mrc"],
        ["report", "nowhere"],
        ["simulate", "none.cif", "-o", "out"],
        ["reconstruct", "none.star", "-o", "run", "--epochs", "0"],
        ["reconstruct", "none.star", "-o", "run", "--decay", "0"],
        ["reconstruct", "none.star", "-o", "run", "--split-after", "99"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("emsplat: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.report
def test_report_draws_what_is_there(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_a_reader_that_leaves_makes_no_traceback(truth):
    command = f'"{sys.executable}" -m emsplat fsc "{truth}" "{truth}" | true'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 141)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("emsplat 0.")


def test_fsc_of_maps_whose_headers_put_them_apart(truth, tmp_path, capsys):
    volume, grid = read_map(truth)
    path = tmp_path / "moved.map"
    with mrcfile.new(path) as file:
        file.set_data(volume.roll(-3, 2).numpy())
        file.voxel_size = grid.pixel_size
        file.header.nxstart = 3
    (tmp_path / "moved.map.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("moved.map", "moved.map.gz"):
        assert main(["fsc", str(truth), str(tmp_path / name)]) == 0
        printed = capsys.readouterr().out
        assert f"{name}: its header (NXSTART or ORIGIN) puts it (3, 0, 0) voxels away from {truth}" in printed
        assert "same map" not in printed


def test_fsc_of_a_map_and_a_model(tmp_path, capsys):
    """The model is voxelised on the grid of the map; in either order, from a packed file."""
    rng = torch.Generator().manual_seed(0)
    grid = Grid(32, 4.0)
    mean = 25 * torch.randn(30, 3, generator=rng)
    gaussians = Gaussians(mean, 60 * torch.eye(3).repeat(30, 1, 1), torch.ones(30))
    write_gaussians(tmp_path / "model.cif.gz", gaussians, grid)
    write_map(tmp_path / "map.mrc", voxelize(gaussians, grid), grid.pixel_size)
    names = [str(tmp_path / name) for name in ("map.mrc", "model.cif.gz")]
    for words in (names, names[::-1]):
        assert main(["fsc", *words]) == 0
        printed = capsys.readouterr().out
        assert "model.cif.gz: 30 atoms or Gaussians on 32³ voxels of 4 Å, σ from 7.75 to 7.75 Å" in printed
        shells = [line.split() for line in printed.splitlines() if line.split()[0].isdigit()]
        assert min(float(line[2]) for line in shells[:8]) > 0.999
    assert main(["fsc", names[1], names[1]]) == 2
    assert "expected at least one map" in capsys.readouterr().err


def test_a_run_is_gone_on_with_or_thrown_away(truth, tmp_path, capsys):
    words = ["backproject", str(truth.parent / "particles.star"), "-o", str(tmp_path / "run"), "--threads", "1"]
    assert main([*words, "--resume"]) == 2
    assert "no run to resume (there is none)" in capsys.readouterr().err
    assert main(words) == 0
    assert main([*words, "--resume", "--overwrite"]) == 2
    assert "expected one of them" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").is_file()
