"""Every MRC file that any command writes, found by looking: valid MRC2014, by mrcfile's own judgement."""

import io

import mrcfile
import pytest

from emsplat import report
from emsplat.cli import main

SMALL = ["--epochs", "1", "--gaussians", "60"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in which each command has written what it writes."""
    folder = tmp_path_factory.mktemp("written")
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "write_report", lambda run, *_: run / "report.html")  # draws, writes no map
    made = folder / "particles"
    star = str(made / "particles.star")
    commands = [
        ["simulate", "-o", str(made), "--box", "20", "--pixel-size", "6", "--particles", "200", "--atoms", "800"],
        ["simulate", "-o", str(folder / "half"), "--box", "16", "--pixel-size", "8", "--particles", "20"]
        + ["--atoms", "500", "--dtype", "float16"],
        ["check", star, "-o", str(folder / "check")],
        ["reconstruct", star, "-o", str(folder / "run"), *SMALL],
        ["backproject", star, "-o", str(folder / "backproject"), "--naming", "cryosparc"],
        ["preprocess", star, "-o", str(folder / "preprocess"), "--box", "16"],
        ["assess", str(folder / "run")],
        ["postprocess", str(folder / "run")],
        ["voxelize", str(folder / "run" / "run_class001.ply"), "-o", str(folder / "voxels.mrc"), "--box", "24"],
        ["nulltest", star, "-o", str(folder / "nulltest"), "--particles", "60", *SMALL],
    ]
    for words in commands:
        assert main(words) in (0, 1), words  # 1: a verdict, which so few particles cannot pass
    patch.undo()
    return folder


def test_every_file_is_valid(written):
    found = sorted([*written.rglob("*.mrc"), *written.rglob("*.mrcs")])
    names = {path.name for path in found}
    for expected in ("particles.mrcs", "truth.mrc", "run_half1_class001_unfil.mrc", "examples.mrcs", "mask.mrc"):
        assert expected in names
    assert {"postprocess.mrc", "voxels.mrc"} <= names
    complaints = {}
    for path in found:
        said = io.StringIO()
        if not mrcfile.validate(path, print_file=said):
            complaints[str(path.relative_to(written))] = said.getvalue()
    assert not complaints
    for path in found:
        with mrcfile.open(path, header_only=True) as file:
            stack = path.suffix == ".mrcs"
            assert int(file.header.ispg) == (0 if stack else 1), path
            assert int(file.header.mz) == (1 if stack else int(file.header.nz)), path
            assert float(file.voxel_size.x) > 1, path
