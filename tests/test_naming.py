"""Results under the names of other programs."""

import numpy as np
import pytest

from emsplat.cli import main
from emsplat.io.cryosparc import read_cs
from emsplat.io.pickles import load_arrays
from emsplat.io.relion.read import read_star


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=200)


def backproject(particles, run, program):
    assert main(["backproject", str(particles), "-o", str(run), "--naming", program]) == 0


def same(one, other):
    return one.read_bytes() == other.read_bytes()


def test_cryosparc(particles, tmp_path):
    run = tmp_path / "J7"
    backproject(particles, run, "cryosparc")
    for ours, theirs in (
        ("run_class001.mrc", "J7_volume_map.mrc"),
        ("run_half1_class001_unfil.mrc", "J7_volume_map_half_A.mrc"),
        ("run_half2_class001_unfil.mrc", "J7_volume_map_half_B.mrc"),
        ("mask.mrc", "J7_volume_mask_fsc.mrc"),
    ):
        assert same(run / ours, run / "cryosparc" / theirs)
    used = read_cs(run / "cryosparc" / "J7_particles.cs")
    assert used.half.tolist() == read_star(particles).half.tolist()
    assert main(["postprocess", str(run)]) == 0
    assert same(run / "postprocess.mrc", run / "cryosparc" / "J7_volume_map_sharp.mrc")
    assert main(["assess", str(run), "--mask-diameter", "80"]) == 0
    assert same(run / "mask.mrc", run / "cryosparc" / "J7_volume_mask_fsc.mrc")


def test_cryodrgn(particles, tmp_path):
    run = tmp_path / "run"
    backproject(particles, run, "cryodrgn")
    folder = run / "cryodrgn"
    assert same(run / "run_half1_class001_unfil.mrc", folder / "half_map_a.mrc")
    assert same(run / "run_half2_class001_unfil.mrc", folder / "half_map_b.mrc")
    rotation, shift = load_arrays(folder / "poses.pkl")
    assert rotation.shape == (200, 3, 3)
    assert np.abs(shift).max() < 0.2
    assert load_arrays(folder / "ctf.pkl")[0, :2].tolist() == [32, 4]
    lines = (folder / "fsc-vals.txt").read_text().splitlines()
    assert lines[0] == "pixres no_mask mask mask_corrected"
    assert len(lines) == 1 + 17
    assert lines[-1].startswith("0.500000 ")
