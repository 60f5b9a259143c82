"""The main job on small simulated stacks: what is written, that halves stay apart, resuming, noise, every option."""

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from gemmi import cif
from tests.conftest import together

from emsplat.cli import main
from emsplat.config import BackprojectConfig, ReconstructConfig, SimulateConfig, change, configure, names
from emsplat.errors import InputError, Interrupted, OutputError
from emsplat.imaging.project import voxelize
from emsplat.io.mrc import read_map, write_map
from emsplat.io.ply import read_ply
from emsplat.measures.curves import crossing
from emsplat.measures.fsc import fsc_curve
from emsplat.measures.mask import spherical_mask
from emsplat.programs.reconstruct import backproject, reconstruct
from emsplat.programs.settings import RECIPES, settings_of
from emsplat.programs.simulate import simulate
from emsplat.report import verdict
from emsplat.report.verdict import Kind, kind_of
from emsplat.run.folder import check_same_run
from emsplat.run.log import Log
from emsplat.types import Grid

QUICK = configure(ReconstructConfig, epochs=2, gaussians=400)
IMAGES = configure(ReconstructConfig, engine="images", epochs=2, gaussians=400, batch=32)
ENGINES = {"one-pass": QUICK, "images": IMAGES}


@pytest.fixture(scope="module")
def particles(simulated):
    """300 images of a small protein, half-sets in the file."""
    return simulated(particles=300)


@pytest.fixture(scope="module", params=list(ENGINES))
def run(request, particles, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    summary = reconstruct(change(ENGINES[request.param], epochs=6), particles, output)
    return output, summary


def test_map_is_the_truth_in_frame_hand_and_sign(run, particles):
    output, _ = run
    truth, grid = read_map(particles.parent / "truth.mrc")
    volume, _ = read_map(output / "run_class001.mrc")
    curve = fsc_curve(volume, truth, grid)
    assert crossing(curve, 0.5) < 12
    # The right frame and hand: no mirror or half turn of the truth fits better.
    right = float(curve.value[1:].mean())
    for axes in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        turned = torch.roll(truth.flip(axes), [1] * len(axes), axes)
        assert float(fsc_curve(volume, turned, grid).value[1:].mean()) < right - 0.2


def test_run_folder_is_complete(run):
    output, _ = run
    names = {path.name for path in output.iterdir()}
    maps = {"run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc", "run_class001.mrc"}
    assert maps <= names
    assert {"run_half1.ply", "run_half2.ply", "run_class001.ply"} <= names
    assert {"run_half1.safetensors", "run_half2.safetensors", "run_class001.safetensors"} <= names
    assert {"fsc.star", "fsc.png", "slices.png", "report.html", "summary.json", "config.toml", "run.log"} <= names
    assert {"run_data.star", "convergence.csv", "mask.mrc", "sampling.mrc"} <= names
    maps |= {f"backprojection_{name}.mrc" for name in ("half1", "half2", "class001")}
    assert not any("statistics" in name for name in names)
    assert not any("checkpoint" in name or name.endswith(".part") for name in names)
    for name in maps:
        assert mrcfile.validate(output / name)
        with mrcfile.open(output / name) as file:
            assert float(file.voxel_size.x) == pytest.approx(4.0)


def test_summary_holds_what_the_terminal_showed(run, particles):
    output, summary = run
    saved = json.loads((output / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    assert saved["input"]["particles"] == 300
    assert saved["input"]["half_sets"] == [150, 150]
    assert set(saved["fits"]) == {"half1", "half2", "class001"}
    assert saved["resolution"]["half_map_masked"] >= 8.0
    assert 8.0 <= saved["resolution"]["cross_validated"] < 16
    assert 0.9 < saved["coverage"] <= 1
    assert saved["peak_memory_mb"] > 0
    config = tomllib.loads((output / "config.toml").read_text())
    assert config["settings"]["epochs"] == 6
    assert config["particles"] == str(particles)
    log = (output / "run.log").read_text()
    said = verdict.lines(saved)
    assert f"{saved['resolution']['cross_validated']:.2f} Å" in said[0]
    assert "cross-validated" in said[0]
    assert all(line in log for line in said)


def test_fsc_star_follows_relion(run):
    output, _ = run
    block = cif.read_file(str(output / "fsc.star"))["fsc"]
    values = np.array([float(v) for v in block.find_values("_rlnFourierShellCorrelationUnmaskedMaps")])
    a, grid = read_map(output / "run_half1_class001_unfil.mrc")
    b, _ = read_map(output / "run_half2_class001_unfil.mrc")
    np.testing.assert_allclose(values, fsc_curve(a, b, grid).value.numpy(), atol=1e-5)


def test_ply_gives_the_map_again(run, tmp_path):
    """But for what the Gaussians leave (tests/test_residual_maps.py)."""
    output, summary = run
    gaussians, grid = read_ply(output / "run_class001.ply")
    volume, _ = read_map(output / "run_class001.mrc")
    drawn = voxelize(gaussians, grid)
    assert (drawn - volume).norm() < (1e-5 if summary["residual"] is None else 0.5) * volume.norm()
    assert main(["voxelize", str(output / "run_class001.ply"), "-o", str(tmp_path / "again.mrc")]) == 0
    assert (read_map(tmp_path / "again.mrc")[0] - drawn).norm() < 1e-5 * drawn.norm()
    fine = ["--box", "64", "--pixel-size", "2", "-o", str(tmp_path / "fine.mrc")]
    assert main(["voxelize", str(output / "run_class001.ply"), *fine]) == 0
    assert read_map(tmp_path / "fine.mrc")[1].size == 64


@pytest.mark.slow
@pytest.mark.parametrize("config", [change(QUICK, independent_halves=True), IMAGES])
def test_a_half_map_depends_on_its_own_half_only(config, particles, tmp_path):
    """Spoiling every image of half 2 leaves half 1 as it was, bit for bit."""
    mask = tmp_path / "mask.mrc"  # the automatic one is made from both halves
    write_map(mask, spherical_mask(Grid(32, 4.0), 90.0, 12.0), 4.0)
    config = change(config, mask=mask)
    reconstruct(config, particles, tmp_path / "before")
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    (spoiled / "particles.star").write_bytes(particles.read_bytes())
    stack = spoiled / "particles.mrcs"
    stack.write_bytes((particles.parent / "particles.mrcs").read_bytes())
    block = cif.read_file(str(particles))["particles"]
    half = np.array([int(v) for v in block.find_values("_rlnRandomSubset")])
    with mrcfile.mmap(stack, mode="r+") as file:
        file.data[half == 2] = np.random.default_rng(0).normal(size=(int((half == 2).sum()), 32, 32))
    reconstruct(config, spoiled / "particles.star", tmp_path / "after")
    one, two = "run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc"
    assert torch.equal(read_map(tmp_path / "before" / one)[0], read_map(tmp_path / "after" / one)[0])
    assert not torch.equal(read_map(tmp_path / "before" / two)[0], read_map(tmp_path / "after" / two)[0])


KILLED_AT_STEP_30 = """
import os, signal, sys
import emsplat.programs.image_engine as programme
from emsplat.__main__ import main
save = programme.save_checkpoint
def save_and_kill(path, state):
    save(path, state)
    if state.step == 30:
        os.kill(os.getpid(), signal.SIGTERM)
programme.save_checkpoint = save_and_kill
sys.exit(main())
"""


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_map(particles, tmp_path):
    """A kill in a fit: exit code 143, a checkpoint, and bit for bit the same map in the end at one thread."""
    options = ["--engine", "images", "--epochs", "40", "--gaussians", "400", "--batch", "16", "--threads", "1"]
    command = [sys.executable, "-m", "emsplat", "reconstruct", str(particles), *options]
    whole = tmp_path / "whole"
    subprocess.run([*command, "-o", str(whole)], check=True, capture_output=True)
    cut = tmp_path / "cut"
    # The kill comes from within, at one step: one from here could come too late on a busy machine.
    program = [sys.executable, "-c", KILLED_AT_STEP_30, *command[3:], "-o", str(cut), "--checkpoint-every", "0"]
    process = subprocess.run(program, stderr=subprocess.PIPE, text=True, check=False)
    errors = process.stderr
    assert process.returncode == 143
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not (cut / "run_half1.safetensors").exists()
    resumed = subprocess.run([*command, "-o", str(cut), "--resume"], check=True, capture_output=True, text=True)
    # The sums of both halves are on disk, and it says where each part goes on.
    for name in ("half1", "half2"):
        assert f"resuming {name}: all 150 of 150 particles were accumulated before" in resumed.stdout
    assert "resuming half1: goes on after step" in resumed.stdout
    assert "loss nan" not in resumed.stdout
    for name in ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc", "run_class001.mrc"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    with (cut / "convergence.csv").open() as file:
        steps = [(row["fit"], int(row["step"])) for row in csv.DictReader(file)]
    assert len(set(steps)) == len(steps)


@pytest.mark.slow
def test_interrupted_pass_over_the_particles_goes_on(particles, tmp_path):
    """The sums of an interrupted run are taken up again; the map is the same, and they are removed in the end."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    reconstruct(QUICK, particles, whole)
    config = change(QUICK, checkpoint_every=0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it

    class Stopping(Log):
        def line(self, text):
            super().line(text)
            if text.startswith("half1: "):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        reconstruct(config, particles, cut, Stopping())
    signal.signal(signal.SIGINT, before)
    assert (cut / "run_half1_statistics.safetensors").is_file()
    reconstruct(change(config, resume=True), particles, cut)
    name = "run_class001.mrc"
    assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert not list(cut.glob("*statistics*"))


@pytest.mark.slow
def test_sums_of_other_particles_are_added(particles, tmp_path):
    """Two runs on a third and on the rest, the second with the sums of the first: as good as one run on all."""
    document = cif.read_file(str(particles))
    block = document["particles"]
    table = block.find(block.find_loop("_rlnImageName").get_loop().tags)
    rows = [list(row) for row in table]
    for name, part in (("first", rows[:100]), ("rest", rows[100:])):
        loop = block.init_loop("", list(table.tags))
        for row in part:
            loop.add_row(row)
        document.write_file(str(particles.parent / f"{name}.star"))
    keep = change(QUICK, keep_statistics=True)
    reconstruct(keep, particles.parent / "first.star", tmp_path / "first")
    add = change(QUICK, add_statistics=(tmp_path / "first",))
    reconstruct(add, particles.parent / "rest.star", tmp_path / "both")
    backproject(BackprojectConfig(), particles, tmp_path / "whole")
    both, _ = read_map(tmp_path / "both" / "backprojection_half1.mrc")
    whole, grid = read_map(tmp_path / "whole" / "run_half1_class001_unfil.mrc")
    assert float(fsc_curve(both, whole, grid).value[1:].min()) > 0.98
    with pytest.raises(InputError, match="same particles"):
        reconstruct(add, particles.parent / "first.star", tmp_path / "twice")
    nothing = change(QUICK, add_statistics=(particles.parent,))
    with pytest.raises(InputError, match="run that with --keep-statistics"):
        reconstruct(nothing, particles.parent / "first.star", tmp_path / "none")
    assert not (tmp_path / "none").exists()  # free for the next try


def test_back_projection_is_a_run_of_its_own(particles, tmp_path, capsys):
    summary = backproject(configure(BackprojectConfig, symmetry="C1"), particles, tmp_path / "run")
    said = capsys.readouterr().out
    assert "resolution: " in said
    assert "classical half maps, masked and corrected for the mask; FSC 0.143" in said
    assert not re.search("Gaussian|ross-validated|not reached", said)
    assert kind_of(summary) is Kind.CLASSICAL
    truth, grid = read_map(particles.parent / "truth.mrc")
    volume, _ = read_map(tmp_path / "run" / "run_class001.mrc")
    mask, _ = read_map(tmp_path / "run" / "mask.mrc")
    assert crossing(fsc_curve(volume, truth, grid, mask), 0.5) < 14
    assert 8 <= summary["resolution"]["half_map_masked"] < 20
    assert summary["resolution"]["cross_validated"] is None  # nothing to validate
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"fsc.star", "report.html", "summary.json", "run_data.star", "sampling.mrc"} <= names
    sampling, _ = read_map(tmp_path / "run" / "sampling.mrc")
    # Relative to its shell: mean 1, and the same at k and -k.
    assert float(sampling[16, 16, 20:30].mean()) == pytest.approx(1, abs=0.4)
    assert torch.allclose(sampling[12:21, 12:21, 12:21], sampling[12:21, 12:21, 12:21].flip([0, 1, 2]), rtol=1e-3)


@pytest.fixture(scope="module")
def several_grids(particles):
    """150 of the particles with others of the same molecule in a finer, larger box, as two optics groups."""
    folder = particles.parent
    config = SimulateConfig(box=48, pixel_size=3.0, particles=120, snr=0.5, atoms=1500, seed=9)
    finer = simulate(config, None, folder / "finer")  # its images are finer/particles.mrcs
    return together(particles, finer, folder / "mixed.star")


def test_several_boxes_and_pixel_sizes_make_one_map(several_grids, particles, tmp_path):
    summary = backproject(BackprojectConfig(), several_grids, tmp_path / "mixed")
    assert summary["input"]["particles"] == 420
    assert summary["input"]["box"] == 32
    backproject(BackprojectConfig(), particles, tmp_path / "alone")
    truth, grid = read_map(particles.parent / "truth.mrc")
    mask, _ = read_map(tmp_path / "mixed" / "mask.mrc")
    scores = []
    for name in ("mixed", "alone"):
        volume, _ = read_map(tmp_path / name / "run_class001.mrc")
        scores.append(float(fsc_curve(volume, truth, grid, mask).value[1:].mean()))
    assert scores[0] > scores[1] + 0.005
    with pytest.raises(InputError, match=r"48 px of 3 Å.*--engine one-pass"):
        reconstruct(IMAGES, several_grids, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_options_of_the_other_engine_are_refused(particles, tmp_path):
    for given, word in (
        ({"batch": 5}, "--batch belongs to --engine images"),
        ({"engine": "images", "growth": 1}, "--growth belongs to --engine one-pass"),
        ({"engine": "one-pass", "recipe": "gem"}, "--recipe gem trains on images"),
    ):
        with pytest.raises(InputError, match=word):
            reconstruct(configure(ReconstructConfig, **given), particles, tmp_path / "run")


def test_masks_are_checked_before_the_work(particles, tmp_path):
    write_map(tmp_path / "mask.mrc", torch.full((32, 32, 32), 2.0), 4.0)
    with pytest.raises(InputError, match="expected 0 to 1"):
        reconstruct(change(QUICK, mask=tmp_path / "mask.mrc"), particles, tmp_path / "run")
    write_map(tmp_path / "mask.mrc", torch.ones(16, 16, 16), 4.0)
    with pytest.raises(InputError, match="box 16"):
        reconstruct(change(QUICK, mask=tmp_path / "mask.mrc"), particles, tmp_path / "run")


def test_stages_are_taken_back_where_they_lose(particles, tmp_path):
    summary = reconstruct(change(QUICK, epochs=4, growth=2), particles, tmp_path / "run")
    stages = summary["course"]
    assert stages[0]["gaussians"] == 400
    kept = [stage for stage in stages if stage["kept"]]
    for stage in stages[1:]:
        assert stage["kept"] == (stage["gain"] >= -max(3 * stage["gain_error"], 0.002))
    assert summary["fits"]["class001"]["gaussians"] == pytest.approx(kept[-1]["gaussians"], rel=0.05)
    assert {fit["steps"] for fit in summary["fits"].values()} == {10 * sum(stage["epochs"] for stage in kept)}
    with (tmp_path / "run" / "convergence.csv").open() as file:
        rows = [(row["fit"], int(row["step"])) for row in csv.DictReader(file)]
    with (tmp_path / "run" / "scores.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert any(score == pytest.approx(kept[-1]["score"], abs=1e-5) for score in scores)
    for name in ("half1", "half2", "class001"):  # epochs that were taken back are not in the record
        steps = [step for fit, step in rows if fit == name]
        assert steps == list(range(10, summary["fits"][name]["steps"] + 1, 10))


@pytest.fixture(scope="module")
def finished(particles, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, reconstruct(QUICK, particles, output)


def test_resume_refuses_another_run(finished, particles):
    output, _ = finished
    with pytest.raises(InputError, match=r"was run with another .*epochs.*config\.toml"):
        reconstruct(change(QUICK, resume=True, epochs=3), particles, output)
    with pytest.raises(InputError, match=r"was run with another .*recipe"):
        backproject(configure(BackprojectConfig, resume=True), particles, output)


def test_resume_of_a_finished_run_does_nothing_and_says_so(finished, particles, monkeypatch):
    output, summary = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    log = Log(io.StringIO())
    again = reconstruct(change(QUICK, resume=True), particles, output, log)
    assert again["resolution"] == json.loads(json.dumps(summary["resolution"]))
    said = log.stream.getvalue()
    assert "this run is finished" in said
    assert "resolution: " in said
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    # The same file by another name is the same input.
    monkeypatch.chdir(particles.parent)
    reconstruct(change(QUICK, resume=True), Path(particles.name), output)


def test_resume_of_a_run_that_is_older_than_an_option(finished, particles, tmp_path):
    """What its config.toml does not say had the default; with another value it is another run."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    text = (output / "config.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("skip_bad", "naming"))]
    assert len(lines) == len(text.splitlines()) - 2
    (output / "config.toml").write_text("\n".join(lines))
    check_same_run(change(QUICK, resume=True), particles, output)
    with pytest.raises(InputError, match="was run with another naming, skip_bad;"):
        check_same_run(change(QUICK, resume=True, skip_bad=True, naming="cryodrgn"), particles, output)


def test_a_fit_does_not_resume_a_back_projection(particles, tmp_path):
    backproject(BackprojectConfig(), particles, tmp_path / "run")
    with pytest.raises(InputError, match="was run with another command"):
        reconstruct(configure(ReconstructConfig, resume=True), particles, tmp_path / "run")


def test_folder_that_holds_something_is_left_alone(particles, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        reconstruct(QUICK, particles, tmp_path)
    with pytest.raises(OutputError, match="does not look like a run folder"):
        reconstruct(change(QUICK, overwrite=True), particles, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("name", ["mask", "init"])
def test_a_run_does_not_remove_what_it_needs(particles, tmp_path, name):
    backproject(configure(BackprojectConfig), particles, tmp_path / "run")
    given = tmp_path / "run" / ("mask.mrc" if name == "mask" else "run_class001.mrc")
    config = change(QUICK, overwrite=True, **{name: given if name == "mask" else str(given)})
    with pytest.raises(OutputError, match="holds the input"):
        reconstruct(config, particles, tmp_path / "run")
    assert given.exists()


def test_bad_input_leaves_nothing_behind(particles, tmp_path):
    with pytest.raises(InputError):
        reconstruct(change(QUICK, symmetry="Q7"), particles, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_noise_alone_has_no_resolution(simulated, tmp_path, capsys):
    star = simulated(box=48, pixel_size=3.0, particles=600, snr=0.05, noise_only=True, seed=0)
    summary = reconstruct(change(QUICK, epochs=4, gaussians=1500), star, tmp_path / "run")
    assert set(summary["resolution"].values()) == {None}
    assert any("no particle" in warning for warning in summary["warnings"])
    assert summary["evident"] is False
    # The warnings at the end are those of the whole run: the assessment's stand there too.
    end = capsys.readouterr().out.partition("warnings of this run:\n")[2]
    assert summary["assessment"]["warnings"]
    assert all(f"  {warning}\n" in end for warning in summary["warnings"])


def test_inverted_images_are_noticed(particles, tmp_path, capsys):
    summary = reconstruct(change(QUICK, invert=True), particles, tmp_path / "run")
    assert any("--invert" in warning for warning in summary["warnings"])
    assert "inverted with --invert" in capsys.readouterr().out


def test_half_sets_are_drawn_and_written_where_the_file_has_none(particles, tmp_path):
    document = cif.read_file(str(particles))
    loop = document["particles"].find_loop("_rlnRandomSubset").get_loop()
    loop.remove_column("_rlnRandomSubset")
    star = particles.parent / "no_halves.star"
    document.write_file(str(star))
    summary = reconstruct(QUICK, star, tmp_path / "run")
    assert summary["input"]["half_sets_from"] == "drawn per micrograph"
    block = cif.read_file(str(tmp_path / "run" / "run_data.star"))["particles"]
    halves = [int(v) for v in block.find_values("_rlnRandomSubset")]
    micrographs = list(block.find_values("_rlnMicrographName"))
    assert len(halves) == 300
    assert all(
        len({h for h, m in zip(halves, micrographs, strict=True) if m == name}) == 1 for name in set(micrographs)
    )


def test_skip_bad_leaves_out_and_records(particles, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("particles.star", "particles.mrcs"):
        (folder / name).write_bytes((particles.parent / name).read_bytes())
    with mrcfile.mmap(folder / "particles.mrcs", mode="r+") as file:
        file.data[6] = np.nan
        file.data[11] = 1.0
    with pytest.raises(InputError, match=r"row (7|12): [12] of .*--skip-bad"):
        reconstruct(QUICK, folder / "particles.star", tmp_path / "refused")
    summary = reconstruct(change(QUICK, skip_bad=True), folder / "particles.star", tmp_path / "run")
    assert summary["input"]["skipped_rows"] == [7, 12]
    assert summary["input"]["particles"] == 298


@pytest.mark.parametrize("recipe", ["default", "cryosplat", "gem"])
def test_recipes_give_what_they_promise(recipe):
    settings = settings_of(configure(ReconstructConfig, recipe=recipe))
    assert settings.epochs == RECIPES[recipe].epochs
    assert settings.init == RECIPES[recipe].init
    assert settings.engine == RECIPES[recipe].engine
    assert settings_of(configure(ReconstructConfig, recipe=recipe, epochs=7)).epochs == 7


def test_every_option_of_reconstruct(particles, tmp_path):
    """Each option is understood and changes what it says."""
    mask, other = tmp_path / "mask.mrc", tmp_path / "other"
    write_map(mask, spherical_mask(Grid(32, 4.0), 90.0, 12.0), 4.0)
    config = configure(BackprojectConfig, symmetry="C2", keep_statistics=True, invert=True, diameter=90.0)
    backproject(config, particles, other)
    options = {
        "--symmetry": ["C2"],
        "--datadir": [str(particles.parent)],
        "--diameter": ["100"],
        "--recipe": ["gem"],
        "--engine": ["images"],
        "--mask": [str(mask)],
        "--add-statistics": [str(other)],
        "--gaussians": ["60"],
        "--init": ["ball"],
        "--epochs": ["2"],
        "--batch": ["50"],
        "--learning-rate": ["0.002"],
        "--decay": ["0.5"],
        "--weighting": ["noise"],
        "--min-scale": ["0.4"],
        "--split-after": ["1"],
        "--seed": ["5"],
        "--first": ["299"],
        "--naming": ["cryodrgn"],
        "--threads": ["1"],
        "--device": ["cpu"],
        "--checkpoint-every": ["0"],
        "--time-limit": ["1:00:00"],
    }
    flags = [
        "--profile",
        "--isotropic",
        "--no-rotation",
        "--skip-bad",
        "--trust-star-pixel-size",
        "--invert",
        "--keep-statistics",
    ]
    flags += ["--flip-hand", "--unique", "--force", "--overwrite"]
    words = [word for name, values in options.items() for word in (name, *values)]
    output = tmp_path / "run"
    assert main(["reconstruct", str(particles), "-o", str(output), *words, *flags]) == 0
    summary = json.loads((output / "summary.json").read_text())
    settings = summary["settings"]
    assert summary["fits"]["half1"]["gaussians"] == 120
    assert (settings["init"], settings["epochs"], settings["batch"]) == ("ball", 2, 50)
    assert (settings["learning_rate"], settings["decay"], settings["weighting"]) == (0.002, 0.5, "noise")
    assert (settings["isotropic"], settings["rotation"], settings["min_scale"]) == (True, False, 0.4)
    assert summary["input"]["symmetry_elements"] == 2
    assert summary["input"]["diameter"] == 100
    assert summary["input"]["contrast"] == "inverted"
    assert summary["input"]["particles"] == 299
    assert (output / "cryodrgn" / "poses.pkl").is_file()
    assert (output / "trace.json").is_file()
    assert summary["threads"] == 1
    assert summary["device"] == "cpu"
    named = {f"--{name.replace('_', '-')}" for name in names(ReconstructConfig)}
    elsewhere = {"--growth", "--independent-halves", "--residual", "--mask-diameter"}  # not beside these
    elsewhere |= {"--poses", "--ctf", "--passthrough"}  # of other formats
    elsewhere |= {"--merge", "--subset", "--particle-class"}  # tests/test_inputs.py
    elsewhere |= {"--box", "--pixel-size"}  # tests/test_preprocess.py
    elsewhere |= {"--redraw-halves"}  # tests/test_copies.py
    elsewhere |= {"--part"}  # tests/test_slurm.py
    assert named - {"--resume", "--rotation"} - elsewhere == set(options) | set(flags) - {"--no-rotation"}
    assert (output / "run_half1_statistics.safetensors").is_file()
    # A second time: refused as it is, done with --resume, which finds everything finished.
    assert main(["reconstruct", str(particles), "-o", str(output), *words, *flags[:-1]]) == 2
    assert main(["reconstruct", str(particles), "-o", str(output), *words, *flags[:-1], "--resume"]) == 0


@pytest.mark.slow
def test_experimental_particles(shared_data, tmp_path):
    """Beta-galactosidase with default settings: Nyquist against the atomic model, above the classical map."""
    config = configure(ReconstructConfig, symmetry="D2")
    reconstruct(config, shared_data / "bgal" / "particles.star", tmp_path / "run")
    volume, grid = read_map(tmp_path / "run" / "run_class001.mrc")
    from emsplat.io.atoms import read_atoms
    from emsplat.simulation.images import truth_map
    from emsplat.simulation.protein import place_atoms

    atoms = place_atoms(read_atoms(shared_data / "bgal" / "8bk7_in_map_frame.cif.gz"), grid, keep_frame=True)
    mask, _ = read_map(shared_data / "bgal" / "mask_soft.mrc")
    curve = fsc_curve(volume, truth_map(atoms, grid, 60.0), grid, mask)
    assert crossing(curve, 0.5) < 7.3
    classical, _ = read_map(tmp_path / "run" / "backprojection_class001.mrc")
    baseline = fsc_curve(classical, truth_map(atoms, grid, 60.0), grid, mask)
    assert float(curve.value[1:].mean()) > max(0.862, float(baseline.value[1:].mean()) + 0.005)


def test_full_disk_is_one_line(particles, tmp_path, monkeypatch, capsys):
    """A write that fails for want of space ends with exit code 2, one line and no half-written file."""
    from pathlib import Path

    genuine = Path.replace

    def full(self, target):
        if Path(target).suffix == ".mrc":
            raise OSError(28, "No space left on device")
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", full)
    words = ["--epochs", "1", "--gaussians", "100"]
    assert main(["reconstruct", str(particles), "-o", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.mrc")) + list((tmp_path / "run").glob(".*.part"))


def test_a_stack_without_micrographs_is_drawn_particle_by_particle(tmp_path, capsys):
    """And what the terminal says of pixels that carry no more than the data: a bound, as in the summary."""
    config = SimulateConfig(box=16, pixel_size=8.0, particles=80, snr=10.0, atoms=300)
    star = simulate(config, None, tmp_path / "made")
    assert main(["convert", str(star), str(tmp_path / "new" / "poses.pkl")]) == 0
    files = configure(BackprojectConfig, poses=tmp_path / "new" / "poses.pkl", ctf=tmp_path / "new" / "ctf.pkl")
    words = ["--poses", str(files.choice.poses), "--ctf", str(files.choice.ctf), "--metadata-only"]
    assert main(["check", str(star.with_suffix(".mrcs")), *words]) in (0, 1)
    assert "80 in 1 stack from micrographs that are not known" in capsys.readouterr().out
    summary = backproject(files, star.with_suffix(".mrcs"), tmp_path / "run")
    assert summary["input"]["half_sets_from"] == "drawn particle by particle"
    printed = capsys.readouterr().out
    assert "particles.mrcs in 1 stack\n" in printed
    assert "classical half maps in the mask: 16.00 Å or finer at FSC 0.143" in printed
