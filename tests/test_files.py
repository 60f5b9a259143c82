"""What is written: only finite numbers, by the umask, complete or not at all."""

import json
import math
import os
import stat

import numpy as np
import pytest
import torch

from emsplat.cli import main
from emsplat.errors import OutputError
from emsplat.io.files import json_text, number_text, replacing, require_finite
from emsplat.io.gaussians import write_gaussians
from emsplat.io.mrc import write_map, writing_stack
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.pickles import write_arrays
from emsplat.io.relion.write import write_particles_star
from emsplat.measures.curves import Curves
from emsplat.run.fsc_star import write_fsc_star
from emsplat.types import Gaussians, Grid, Optics, Poses

GRID = Grid(8, 2.0)
ONE = torch.ones(4, dtype=torch.float64)


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize(
    "umask",
    [0o022, pytest.param(0o027, marks=[pytest.mark.report, pytest.mark.slow]), 0o002],
    indirect=True,
    ids=["022", "027", "002"],
)
def test_every_file_of_a_run_obeys_the_umask(tmp_path, umask):
    """Also folders, checkpoints, hard links under other programs' names and what a report draws."""
    made, run = tmp_path / "particles", tmp_path / "run"
    star = str(made / "particles.star")
    size = ["--box", "16", "--pixel-size", "8", "--particles", "60", "--atoms", "300"]
    commands = [
        ["simulate", "-o", str(made), *size],
        ["reconstruct", star, "-o", str(run), "--epochs", "1", "--gaussians", "40", "--keep-statistics"]
        + ["--naming", "cryosparc", "--threads", "1"],
        ["preprocess", star, "-o", str(tmp_path / "preprocessed"), "--dtype", "float16"],
        ["convert", star, str(tmp_path / "poses.pkl")],
        ["convert", star, str(tmp_path / "p.cs")],
        ["convert", str(run / "run_class001.ply"), str(tmp_path / "model.cif.gz")],
        ["voxelize", str(run / "run_class001.ply"), "-o", str(tmp_path / "map.mrc")],
    ]
    for words in commands:
        assert main(words) in (0, 1), words
    written = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path in written
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong
    kinds = {path.suffix for path in written}
    assert {".mrc", ".mrcs", ".star", ".ply", ".json", ".toml", ".csv", ".log", ".safetensors", ".cs"} <= kinds
    assert (".png" in kinds) == (umask == 0o027)


def test_json_is_strict():
    text = json_text({"a": math.nan, "b": [1.5, math.inf, (2, -math.inf)], "c": "NaN", "d": {"e": None, "f": True}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None, [2, None]],
        "c": "NaN",
        "d": {"e": None, "f": True},
    }


def test_numbers_of_tables():
    assert [number_text(value) for value in (0.1234567, math.nan, math.inf)] == ["0.123457", "", ""]
    assert number_text(math.nan, ".6f", "?") == "?"


def test_what_is_not_finite_is_counted(tmp_path):
    require_finite(tmp_path / "x", "voxels", torch.ones(2, 3))
    with pytest.raises(OutputError, match=r"x: 2 of 6 voxels are infinite or undefined"):
        require_finite(tmp_path / "x", "voxels", np.array([[1, np.nan, 1], [1, 1, np.inf]]))


def gaussians(value):
    return Gaussians(torch.full((3, 3), value), torch.eye(3).repeat(3, 1, 1), torch.ones(3))


def stack(path, value):
    with writing_stack(path, 1, GRID) as write:
        write(torch.full((1, 8, 8), value))


def particles(path, value):
    optics = Optics(*(v * ONE for v in (300, 2.7, 0.1, value, 14000, 0.6, 0, 0, 1)))
    poses = Poses(torch.eye(3).double().repeat(4, 1, 1), torch.zeros(4, 2).double())
    write_particles_star(path, [f"{i + 1}@s.mrcs" for i in range(4)], ["m.mrc"] * 4, poses, optics, GRID, None)


WRITERS = {
    "map.mrc": lambda path, value: write_map(path, torch.full((4, 4, 4), value), 2.0),
    "wide.mrc": lambda path, _: write_map(path, torch.full((4, 4, 4), 1e300, dtype=torch.float64), 2.0),
    "s.mrcs": stack,
    "g.ply": lambda path, value: write_gaussians(path, gaussians(value), GRID),
    "g.cif": lambda path, value: write_gaussians(path, gaussians(value), GRID),
    "g.pdb": lambda path, value: write_gaussians(path, gaussians(value), GRID),
    "p.star": particles,
    "p.pkl": lambda path, value: write_arrays(path, (np.ones(3), np.array([value]))),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_writer_leaves_a_number_that_is_none(tmp_path, name, value):
    path = tmp_path / name
    with pytest.raises(OutputError, match=rf"{name}: [\d,]+ of [\d,]+ .* are infinite or undefined"):
        WRITERS[name](path, value)
    assert not list(tmp_path.iterdir())


def test_undefined_shells_of_a_curve_are_unknown(tmp_path):
    curves = Curves(np.array([0.0, 0.1]), {"cross_validated": np.array([0.5, math.nan])})
    write_fsc_star(tmp_path / "fsc.star", {}, curves)
    assert (tmp_path / "fsc.star").read_text().split()[-4:] == ["1", "0.100000", "10.000000", "?"]


@pytest.mark.parametrize(
    ("images", "fits"),
    [
        (lambda noise: noise, True),
        (lambda noise: 1000 * noise + 20_000, True),
        (lambda noise: 20_000 * noise + 60_000, False),  # beyond 65504
        (lambda noise: 1e-9 * noise, False),  # below the smallest number: all would be 0
        (lambda noise: 1e-6 * noise, False),  # a few steps of the smallest number
        (lambda noise: noise + 30_000, False),  # steps of 16 there
        (lambda noise: 0 * noise, True),  # constant, but told exactly
    ],
)
def test_float16_where_it_holds_the_images(tmp_path, images, fits):
    values = images(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)))
    path = tmp_path / "s.mrcs"

    def run():
        with writing_stack(path, 3, Grid(16, 2.0), "float16") as write:
            write(values)

    if not fits:
        with pytest.raises(OutputError, match=r"3 of 3 images .* do not fit float16 .* or write --dtype float32"):
            run()
        assert not list(tmp_path.iterdir())
        return
    run()
    out = np.empty((3, 16, 16), np.float32)
    StackFile(path).read_into(out, range(3), range(3))
    assert np.abs(out - values.numpy()).max() <= 2**-11 * float(values.abs().max())


def test_the_folder_of_a_file_is_made(tmp_path):
    with replacing(tmp_path / "a" / "b" / "x.txt") as temporary:
        temporary.write_text("whole")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x.txt"]


def test_a_file_where_a_folder_should_be_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.txt", tmp_path / "file" / "deeper" / "x.txt"):
        with pytest.raises(OutputError, match=r"x\.txt: cannot be written"), replacing(path) as temporary:
            temporary.write_text("whole")
