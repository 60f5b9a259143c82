"""The verdict on run folders made of known maps: which numbers, which warnings, what is refused, what is missing."""

import csv
import json
import math
from io import StringIO

import mrcfile
import pytest
import torch
from gemmi import cif

from emsplat.assessment.assess import assess
from emsplat.assessment.curves import correction, half_map_curves
from emsplat.assessment.maps import read_run
from emsplat.cli import main
from emsplat.config import AssessConfig, configure
from emsplat.errors import InputError
from emsplat.imaging.project import voxelize
from emsplat.io.gaussians import write_gaussians
from emsplat.io.mrc import read_map, write_map
from emsplat.maths.groups import C1, dihedral
from emsplat.measures.mask import spherical_mask
from emsplat.report import verdict
from emsplat.run.files import BACKPROJECTIONS, FULL_MAP, HALF_MAPS
from emsplat.run.log import Log
from emsplat.types import Gaussians, Grid

GRID = Grid(64, 2.0)
SIZE = GRID.size


def noise(seed):
    return torch.randn(SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def lowpass(volume, spacing):
    full, half = torch.fft.fftfreq(SIZE, GRID.pixel_size), torch.fft.rfftfreq(SIZE, GRID.pixel_size)
    square = full[:, None, None] ** 2 + full[:, None] ** 2 + half**2
    return torch.fft.irfftn(torch.fft.rfftn(volume) * torch.exp(-square * spacing**2), s=(SIZE,) * 3)


MASK = spherical_mask(GRID, 56.0, 12.0)
TRUTH = 10 * lowpass(noise(0), 9.0) * MASK
RAW = tuple(TRUTH + 2.0 * noise(seed) for seed in (1, 2))
PRIOR = 0.3 * lowpass(noise(9), 3.0) * MASK  # what both models believe without the data
MODELS = tuple(lowpass(raw, 7.0) * MASK + PRIOR for raw in RAW)


def write_run(folder, *, halves=MODELS, raw=RAW, mask=MASK, full=TRUTH):
    folder.mkdir(exist_ok=True)
    maps = [*zip(HALF_MAPS, halves, strict=True), *zip(BACKPROJECTIONS, raw or (), strict=False)]
    for name, volume in [*maps, (FULL_MAP, full), ("mask.mrc", mask)]:
        if volume is not None:
            write_map(folder / name, volume, GRID.pixel_size)
    return folder


def measure(run, **options):
    log = Log(StringIO())
    result = assess(run, configure(AssessConfig, **options), log, diameter=None)
    return result, log.warnings


def columns(run):
    block = cif.read(str(run / "fsc.star")).find_block("fsc")
    tags = next(item.loop for item in block if item.loop is not None).tags
    return {tag[1:]: torch.tensor([cif.as_number(v) for v in block.find_loop(tag)]) for tag in tags}


def test_cross_validation_is_beside_what_the_models_claim(tmp_path):
    run = write_run(tmp_path / "run")
    result, warnings = measure(run)
    found = result["resolution"]
    assert not warnings
    low, high = sorted(found["cross_validated_interval"])
    assert low <= found["cross_validated"] <= high
    assert found["half_map_masked"] < 0.8 * found["cross_validated"]
    last = GRID.length / (GRID.size // 2 - 1)  # of cryoDRGN
    assert found["half_map_masked_cryodrgn"] <= max(found["half_map_masked"], last)
    assert found["backprojection_masked"] > found["half_map_masked"]
    curves = columns(run)
    shells = len(curves["rlnResolution"])
    assert shells == SIZE // 2 + 1
    band = curves["emsplatCrossValidatedLow"] <= curves["emsplatCrossValidatedHigh"]
    assert bool((band | curves["emsplatCrossValidated"].isnan()).all())
    assert math.isnan(curves["emsplatCrossValidated"][-1])  # no data there
    assert result["masking"]["fraction"] == pytest.approx(float(MASK.mean()), abs=1e-5)


def test_local_and_directional_parts_are_written(tmp_path):
    run = write_run(tmp_path / "run")
    result, _ = measure(run)
    local = result["local_resolution"]
    volume, grid = read_map(run / "local_resolution.mrc")
    assert grid == GRID
    inside = volume[MASK > 0.5]
    assert local["cross_validated"]["median"] == pytest.approx(float(inside.median()), abs=0.01)
    assert local["half_maps"]["median"] < local["cross_validated"]["median"]
    assert float(volume.min()) >= GRID.nyquist - 1e-4
    assert float(volume.max()) <= local["window"] + 1e-4
    assert (run / "local_resolution_half_maps.mrc").is_file()
    with (run / "directions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 648
    assert set(rows[0]) == {"tilt", "rot", "fslc", "conical_resolution"}  # no particles, no views
    direction = result["directional"]
    assert 0.5 < direction["fslc_mean"] <= 1
    assert direction["fslc_std"] < 0.1
    assert direction["conical_of"] == "back-projections"


def test_back_projections_alone(tmp_path):
    run = write_run(tmp_path / "run", halves=RAW, raw=None)
    result, _ = measure(run)
    found = result["resolution"]
    assert found["cross_validated"] is None
    assert found["half_map_masked"] == found["backprojection_masked"]
    assert "emsplatCrossValidated" not in columns(run)
    assert result["local_resolution"]["cross_validated"] is None
    assert (run / "local_resolution.mrc").is_file()
    assert not (run / "local_resolution_half_maps.mrc").exists()


def test_noise_has_no_resolution_and_no_old_maps_of_it(tmp_path):
    run = write_run(tmp_path / "run")
    measure(run)
    shared = lowpass(noise(9), 8.0) * MASK
    models = tuple(shared + 0.3 * lowpass(noise(seed), 6.0) * MASK for seed in (1, 2))
    write_run(run, halves=models, raw=(noise(1), noise(2)))
    result, warnings = measure(run)
    assert all(value is None for value in result["resolution"].values())
    assert result["local_resolution"] is None
    assert result["directional"] is None
    assert any("no particle was found" in text for text in warnings)
    assert not (run / "local_resolution.mrc").exists()
    assert not (run / "directions.csv").exists()


def test_resolutions_that_are_the_limit_of_the_pixels_are_named(tmp_path):
    result, _ = measure(write_run(tmp_path / "run"))
    assert result["limit"]["nyquist"] == pytest.approx(GRID.nyquist)
    assert "half_map_masked" in result["limit"]["reached_by"]  # what the models share has no end
    assert not {"cross_validated", "backprojection_masked"} & {*result["limit"]["reached_by"]}
    sharp = tuple(5 * noise(0) + noise(seed) for seed in (1, 2))  # FSC 0.96 in every shell
    result, _ = measure(write_run(tmp_path / "sharp", halves=sharp, raw=None))
    reached = result["limit"]["reached_by"]
    assert {"half_map_unmasked", "half_map_masked", "half_map_corrected", "backprojection_masked"} <= {*reached}
    finest = dict.fromkeys(reached, GRID.nyquist) | {
        "half_map_masked_cryodrgn": GRID.length / (GRID.size // 2 - 1)  # its last shell
    }
    assert all(result["resolution"][name] == pytest.approx(finest[name]) for name in reached)
    assert "cross_validated" not in reached  # back-projections alone have none


def test_reference(tmp_path):
    run = write_run(tmp_path / "run", full=MODELS[0])
    write_map(tmp_path / "truth.mrc", TRUTH, GRID.pixel_size)
    result, _ = measure(run, reference=tmp_path / "truth.mrc")
    # An estimate of exactly this, made without it.
    assert result["resolution"]["reference_masked_0.5"] == pytest.approx(
        result["resolution"]["cross_validated"], rel=0.15
    )
    curves = columns(run)
    trusted = curves["emsplatBackprojectionMasked"] > 0.1
    trusted[:2] = False
    off = (curves["emsplatCrossValidated"] - curves["emsplatReferenceMasked"])[trusted]
    assert float(off.abs().mean()) < 0.05
    assert not measure(run, reference=tmp_path / "truth.mrc")[1]
    write_map(tmp_path / "dark.mrc", -TRUTH, GRID.pixel_size)
    _, (said,) = measure(run, reference=tmp_path / "dark.mrc")
    assert "dark.mrc and run_class001.mrc have opposite contrast" in said
    (run / FULL_MAP).unlink()
    with pytest.raises(InputError, match=r"run_class001.mrc is missing"):
        measure(run, reference=tmp_path / "truth.mrc")


def test_another_mask_becomes_the_mask_of_the_run(tmp_path):
    run = write_run(tmp_path / "run")
    wide = spherical_mask(GRID, 70.0, 12.0)
    write_map(tmp_path / "wide.mrc", wide, GRID.pixel_size)
    result, _ = measure(run, mask=tmp_path / "wide.mrc")
    assert result["masking"]["fraction"] == pytest.approx(float(wide.mean()), abs=1e-5)
    torch.testing.assert_close(read_map(run / "mask.mrc")[0], wide)


def test_spherical_mask(tmp_path):
    run = write_run(tmp_path / "run")
    result, _ = measure(run, mask_diameter=80.0)
    mask = read_map(run / "mask.mrc")[0]
    torch.testing.assert_close(mask, spherical_mask(GRID, 80.0, 12.0))
    assert result["masking"]["fraction"] == pytest.approx(float(mask.mean()), abs=1e-5)
    with pytest.raises(InputError, match="diameter"):
        measure(run, mask_diameter=-1.0)
    with pytest.raises(InputError, match="one of them"):
        measure(run, mask_diameter=80.0, mask=run / "mask.mrc")


def test_tight_mask_is_warned_of(tmp_path):
    tight = (lowpass(RAW[0] + RAW[1], 2.0) * MASK > 5.0).float()  # ragged, hard, along the density
    run = write_run(tmp_path / "run", mask=tight)
    result, warnings = measure(run)
    assert result["masking"]["random_phases"] > 0.15
    assert any("too tight" in text for text in warnings)
    soft, _ = measure(write_run(tmp_path / "soft"))
    assert abs(soft["masking"]["random_phases"]) < 0.1


def test_mask_that_is_cut_off_is_warned_of(tmp_path):
    run = write_run(tmp_path / "run")
    write_map(tmp_path / "large.mrc", torch.ones(SIZE, SIZE, SIZE), GRID.pixel_size)
    _, warnings = measure(run, mask=tmp_path / "large.mrc")
    assert any("edge of the box" in text for text in warnings)


def test_without_a_mask_one_is_made(tmp_path):
    run = write_run(tmp_path / "run", mask=None)
    mask = read_run(run).mask
    assert 0.2 < float((mask * MASK).sum() / MASK.sum()) <= 1
    assert float(mask.mean()) < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / HALF_MAPS[1]).unlink(), "missing"),
        (lambda run: write_map(run / HALF_MAPS[1], MODELS[0], GRID.pixel_size), "same map"),
        (lambda run: write_map(run / HALF_MAPS[1], torch.randn(32, 32, 32), GRID.pixel_size), "box 32"),
        (lambda run: write_map(run / HALF_MAPS[1], MODELS[1], 3.0), "3 Å"),
        (lambda run: write_map(run / "mask.mrc", torch.zeros(SIZE, SIZE, SIZE), GRID.pixel_size), "mask"),
        (lambda run: write_map(run / "mask.mrc", torch.ones(32, 32, 32), GRID.pixel_size), "box 32"),
        (lambda run: write_map(run / "mask.mrc", 3 * MASK, GRID.pixel_size), "0 to 1"),
    ],
)
def test_maps_that_do_not_belong_together(tmp_path, change, message, capsys):
    run = write_run(tmp_path / "run")
    change(run)
    with pytest.raises(InputError, match=message):
        read_run(run)
    assert main(["assess", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.report
def test_assess_command_renews_summary_and_report(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    before = {"fits": {"half1": {}}, "seconds": 3.0, "resolution": {}}
    before |= {"warnings": ["symmetry is wrong", "the mask is too tight"]}
    before |= {"assessment": {"warnings": ["the mask is too tight"]}}
    (run / "summary.json").write_text(json.dumps(before))
    assert main(["assess", str(run), "--window", "40"]) == 0
    said = capsys.readouterr().out
    assert "cross-validated FSC 0.5" in said
    summary = json.loads((run / "summary.json").read_text())
    # What the run warned of stays, what was measured is measured again.
    assert "symmetry is wrong" in summary["warnings"]
    assert "the mask is too tight" not in summary["warnings"]
    assert summary["evident"] is True
    assert summary["limit"]["nyquist"] == pytest.approx(2 * GRID.pixel_size)
    first = said.splitlines().index(next(line for line in said.splitlines() if line.startswith("resolution: ")))
    assert verdict.lines(summary) == said.splitlines()[first : first + len(verdict.lines(summary))]
    assert summary["seconds"] == 3.0
    assert summary["local_resolution"]["window"] == 40
    assert summary["assessment"]["window"] == 40
    assert "Local resolution" in (run / "report.html").read_text()
    assert main(["assess", str(run), "--window", "900"]) == 2
    (run / "summary.json").write_text("{")
    assert main(["assess", str(run)]) == 2


def test_correction_begins_where_the_unmasked_curve_falls(tmp_path):
    maps = read_run(write_run(tmp_path / "run", halves=RAW, raw=None))
    curves = half_map_curves(maps.halves, maps.grid, maps.mask)
    start = round(GRID.length / correction(curves, maps.mask)["randomised_from"])
    unmasked, masked, corrected = (curves[name].value for name in ("unmasked", "masked", "corrected"))
    assert (unmasked[1:start] >= 0.8).all()
    assert unmasked[start] < 0.8
    assert (corrected[: start + 2] == masked[: start + 2]).all()


def test_a_run_knows_the_symmetry_that_was_imposed(tmp_path):
    """Of as many coefficients only one is independent: the band of the cross-validated FSC is wider for it."""
    run = write_run(tmp_path / "run", halves=RAW, raw=RAW)
    assert read_run(run).symmetry == C1
    (run / "config.toml").write_text('[options]\nsymmetry = "D2"\n')
    assert read_run(run).symmetry == dihedral(2)
    (run / "config.toml").write_text("[options]\ninvert = true\n")
    assert read_run(run).symmetry == C1


@pytest.mark.parametrize(
    "settings", [b"[options]\nsymmetry = 7\n", b'[options]\nsymmetry = "Q7"\n', b"options = 1\n", b"[options", b"\xff"]
)
def test_a_symmetry_that_cannot_be_read_is_none_that_is_guessed(tmp_path, settings):
    run = write_run(tmp_path / "run", halves=RAW, raw=RAW)
    (run / "config.toml").write_bytes(settings)
    with pytest.raises(InputError, match=r"config\.toml: the symmetry of the run cannot be read .*; give a point"):
        read_run(run)


def put(path, **fields):
    """Sets fields of the header of a map."""
    with mrcfile.open(path, "r+") as file:
        for name, value in fields.items():
            file.header[name] = value
    return path


@pytest.mark.slow
def test_masks_and_references_whose_headers_put_them_elsewhere_are_told(tmp_path):
    run = write_run(tmp_path / "run")
    write_map(tmp_path / "mask.mrc", MASK, GRID.pixel_size)
    write_map(tmp_path / "truth.mrc", TRUTH, GRID.pixel_size)
    options = {"mask": tmp_path / "mask.mrc", "reference": tmp_path / "truth.mrc"}
    before, warnings = measure(run, **options)
    assert not warnings
    put(tmp_path / "mask.mrc", nxstart=2)
    put(tmp_path / "truth.mrc", origin=(0.0, 0.0, 1.5 * GRID.pixel_size))
    result, warnings = measure(run, **options)
    assert result["resolution"] == before["resolution"]  # voxel by voxel, as before
    assert len(warnings) == 2
    assert "mask.mrc: its header (NXSTART or ORIGIN) puts it (2, 0, 0) voxels away from the maps" in warnings[0]
    assert "truth.mrc: its header (NXSTART or ORIGIN) puts it (0, 0, 1.5) voxels away from the maps of" in warnings[1]
    for name in (*HALF_MAPS, FULL_MAP, *BACKPROJECTIONS):  # a folder that lies there as a whole
        put(run / name, nxstart=2)
    put(tmp_path / "truth.mrc", origin=(2 * GRID.pixel_size, 0.0, 0.0))
    assert not measure(run, **options)[1]


def test_an_inverted_mask_is_asked_about(tmp_path):
    run = write_run(tmp_path / "run")
    write_map(tmp_path / "negative.mrc", -MASK, GRID.pixel_size)
    with pytest.raises(InputError, match=r"values from -1 to 0; expected 0 to 1; is it inverted"):
        measure(run, mask=tmp_path / "negative.mrc")
    write_map(tmp_path / "outside.mrc", 1 - MASK, GRID.pixel_size)
    _, warnings = measure(run, mask=tmp_path / "outside.mrc")
    assert any("is it inverted (0 on the particle)?" in text for text in warnings)


def test_a_model_as_reference(tmp_path):
    """Voxelised on the grid of the run; the same curve as its map gives."""
    blobs = Gaussians(
        10 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0)),
        9 * torch.eye(3).repeat(20, 1, 1),
        torch.ones(20),
    )
    run = write_run(tmp_path / "run", full=voxelize(blobs, GRID))
    write_gaussians(tmp_path / "model.pdb.gz", blobs, GRID)
    measure(run, reference=tmp_path / "model.pdb.gz")
    assert float(columns(run)["emsplatReferenceMasked"][1:12].min()) > 0.999
    away = Gaussians(blobs.mean + 500, blobs.covariance, blobs.amplitude)
    write_gaussians(tmp_path / "away.cif", away, GRID)
    with pytest.raises(InputError, match=r"away\.cif: 100% of it lies outside the box"):
        measure(run, reference=tmp_path / "away.cif")


def test_what_cannot_be_done_changes_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    measure(run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(InputError, match="window of 5000"):
        measure(run, window=5000.0)
    write_map(tmp_path / "mask.mrc", torch.ones_like(TRUTH), GRID.pixel_size)
    with pytest.raises(InputError, match="nowhere"):
        measure(run, mask=tmp_path / "mask.mrc", reference=tmp_path / "nowhere.mrc")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
