"""Post-processing of run folders: what is written, in whose terms, and that it sharpens what was blurred."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from io import StringIO

import mrcfile
import pytest
import torch
from gemmi import cif

from emsplat.cli import main
from emsplat.errors import InputError
from emsplat.imaging.project import voxelize
from emsplat.io.gaussians import write_gaussians
from emsplat.io.mrc import read_map, write_map
from emsplat.measures.fsc import fsc
from emsplat.measures.sharpening import guinier
from emsplat.programs.fsc import compare
from emsplat.run.files import BACKPROJECTIONS, FULL_MAP, HALF_MAPS
from emsplat.run.log import Log
from emsplat.types import Gaussians
from test_assessment import GRID, MODELS, RAW, TRUTH, lowpass, noise, write_run


def block(run, name):
    return cif.read(str(run / "postprocess.star")).find_block(name)


def number(run, name):
    return cif.as_number(block(run, "general").find_value(f"_{name}"))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_what_is_written(run):
    assert main(["postprocess", str(run)]) == 0
    masked, sharp = (read_map(run / f"postprocess{end}.mrc") for end in ("_masked", ""))
    mask = read_map(run / "mask.mrc")[0]
    torch.testing.assert_close(masked[0], sharp[0] * mask, atol=1e-5 * float(sharp[0].abs().max()), rtol=0)
    assert sharp[1] == GRID
    slope, protein = number(run, "rlnFittedSlopeGuinierPlot"), number(run, "emsplatSlopeOfProtein")
    assert number(run, "rlnBfactorUsedForSharpening") == pytest.approx(4 * (slope - protein), abs=1e-3)
    assert number(run, "rlnFinalResolution") > GRID.nyquist
    assert number(run, "rlnParticleBoxFractionSolventMask") == pytest.approx(0.476 / float(mask.mean()), rel=1e-3)
    assert len(list(block(run, "fsc").find_loop("_rlnFourierShellCorrelationCorrected"))) == 33
    plot = [block(run, "guinier").find_loop(f"_rlnLogAmplitudes{n}") for n in ("Original", "Weighted", "Sharpened")]
    assert [len(list(column)) for column in plot] == [33] * 3
    points = ElementTree.parse(run / "postprocess_fsc.xml").getroot().findall("coordinate")
    assert len(points) == 33


def test_sharpened_by_the_b_factor(run):
    assert main(["postprocess", str(run), "--b-factor", "-200"]) == 0
    with_b = read_map(run / "postprocess.mrc")[0]
    assert number(run, "rlnBfactorUsedForSharpening") == -200
    assert main(["postprocess", str(run), "--b-factor", "0"]) == 0
    without = read_map(run / "postprocess.mrc")[0]
    slopes = [guinier(v, GRID, torch.ones(33), low=40.0, high=12.0).slope for v in (with_b, without)]
    assert slopes[0] - slopes[1] == pytest.approx(50, rel=0.02)


def test_models_are_sharpened_by_what_the_images_show(run, tmp_path):
    """The B factor belongs to the images: that of the models' run is that of their back-projections alone."""
    other = write_run(tmp_path / "classical", halves=RAW, raw=None)
    assert main(["postprocess", str(run)]) == main(["postprocess", str(other)]) == 0
    found = [number(r, "rlnBfactorUsedForSharpening") for r in (run, other)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    habits = [number(r, "emsplatBfactorByRelionsRule") for r in (run, other)]
    assert abs(habits[0] - habits[1]) > 10  # of the maps themselves


def test_weights_of_models_are_the_cross_validated_ones(run):
    """Not what the models merely believe: amplitudes per shell fall with the estimate of their correlation."""
    assert main(["postprocess", str(run), "--b-factor", "0"]) == 0
    assert main(["assess", str(run)]) == 0
    assert block(run, "general").find_value("_emsplatWeight").strip("'\"") == "cross-validated FSC"
    volumes = read_map(run / "postprocess.mrc")[0], 0.5 * (MODELS[0] + MODELS[1])
    weighted, average = (guinier(v, GRID, torch.ones(33), low=60.0, high=5.0).original.exp() for v in volumes)
    table = cif.read(str(run / "fsc.star")).find_block("fsc")
    estimate = torch.tensor([cif.as_number(v) for v in table.find_loop("_emsplatCrossValidated")])
    seen = estimate.isfinite() & (estimate > 0.05)
    seen[0] = False
    torch.testing.assert_close((weighted / average)[seen], estimate[seen].double().clamp(max=1), atol=1e-3, rtol=0)
    assert float((weighted / average)[25:].max()) < 0.01


def test_back_projections_are_weighted_by_their_half_map_fsc(tmp_path):
    run = write_run(tmp_path / "run", halves=RAW, raw=None)
    assert main(["postprocess", str(run), "--b-factor", "0"]) == 0
    sharp, average = read_map(run / "postprocess.mrc")[0], 0.5 * (RAW[0] + RAW[1])
    assert block(run, "general").find_value("_emsplatWeight").strip("'\"") == "corrected half-map FSC"
    assert float((sharp - TRUTH).norm()) < 0.5 * float((average - TRUTH).norm())
    torch.testing.assert_close(fsc(sharp, average)[1:8], torch.ones(7, dtype=torch.float64), atol=1e-3, rtol=0)


def test_too_coarse_for_a_b_factor_is_said(tmp_path, capsys):
    truth = lowpass(noise(0), 30.0)
    halves = tuple(truth + 0.02 * noise(seed) for seed in (1, 2))
    run = write_run(tmp_path / "run", halves=halves, raw=None)
    assert main(["postprocess", str(run)]) == 0
    assert "not sharpened" in capsys.readouterr().out
    assert number(run, "rlnBfactorUsedForSharpening") == 0
    assert block(run, "guinier") is None


def test_a_resolution_at_the_limit_of_the_pixels_is_a_bound(tmp_path, capsys):
    halves = tuple(TRUTH + noise(0) + 0.5 * noise(seed) for seed in (1, 2))  # FSC 0.8 in every shell that noise fills
    run = write_run(tmp_path / "run", halves=halves, raw=None)
    assert main(["postprocess", str(run)]) == 0
    assert "resolution 4.00 Å or finer (corrected half-map FSC)" in capsys.readouterr().out


def test_noise_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run", halves=(noise(1), noise(2)), raw=None)
    assert main(["postprocess", str(run)]) == 2
    assert "no resolution" in capsys.readouterr().err
    assert not (run / "postprocess.mrc").exists()


def test_maps_lie_where_the_half_maps_lie(tmp_path):
    """Those of other programs may have an origin; what is made of them overlays them, and so does a model."""
    run, atoms = write_run(tmp_path / "run"), tmp_path / "model.ply"
    for name in [*HALF_MAPS, *BACKPROJECTIONS, FULL_MAP, "mask.mrc"]:
        write_map(run / name, read_map(run / name)[0], GRID.pixel_size, (-30.0, 12.0, 7.5))
    assert main(["postprocess", str(run)]) == 0
    for name in ("postprocess.mrc", "postprocess_masked.mrc"):
        with mrcfile.open(run / name) as file:
            assert [float(file.header.origin[axis]) for axis in "xyz"] == [-30, 12, 7.5]
    mixture = Gaussians(
        torch.tensor([[10.0, -5.0, 3.0], [-8.0, 4.0, 0.0]]), 30 * torch.eye(3).repeat(2, 1, 1), torch.ones(2)
    )
    write_map(tmp_path / "map.mrc", voxelize(mixture, GRID), GRID.pixel_size, (-30.0, 12.0, 7.5))
    moved = dataclasses.replace(mixture, mean=mixture.mean + torch.tensor([-30.0, 12.0, 7.5]))
    write_gaussians(atoms, moved, GRID)
    write_map(tmp_path / "voxel.mrc", torch.ones(1, 1, 1), 2.0)
    with pytest.raises(InputError, match="no shells"):
        compare(tmp_path / "voxel.mrc", tmp_path / "voxel.mrc", None, None, Log(StringIO()))
    curves = compare(tmp_path / "map.mrc", atoms, None, None, Log(StringIO()))
    assert float(curves["unmasked"].value[1:10].min()) > 0.999


def test_no_resolution_in_what_poses_share(run, capsys):
    (run / "summary.json").write_text('{"refinement": {"shared_to": 5.0}}')
    assert main(["postprocess", str(run)]) == 2
    assert "no resolution" in capsys.readouterr().err
    (run / "summary.json").write_text('{"evident": false}')
    assert main(["postprocess", str(run)]) == 2
    assert "no particle was found" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--b-factor-from", "0"], ["--b-factor-from", "nan"], ["--b-factor", "inf"]])
def test_senseless_numbers_are_refused(run, capsys, words):
    assert main(["postprocess", str(run), *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_an_output_is_not_an_input(run, capsys):
    half = str(run / HALF_MAPS[0])
    before = (run / HALF_MAPS[0]).read_bytes()
    assert main(["fsc", half, str(run / HALF_MAPS[1]), "-o", half]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert (run / HALF_MAPS[0]).read_bytes() == before
