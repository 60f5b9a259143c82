"""`emsplat check`: what is understood, the verdicts, the exit code, and that it needs no images where it must not."""

import json
import shutil

import mrcfile
import numpy as np
import pytest
import torch
from gemmi import cif
from numpy.lib.recfunctions import repack_fields

from emsplat.cli import main
from emsplat.io.cryosparc import write_cs
from emsplat.io.mrc import read_map
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import rewrite_star

ITEMS = {"particles", "half-sets", "voltage", "pixel size", "defocus", "shifts", "orientations", "images"}


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=400)


def run(capsys, *words):
    code = main(["check", *map(str, words), "--json"])
    result = json.loads(capsys.readouterr().out)
    return code, result, {item["name"]: item for item in result["items"]}


def altered(particles, tmp_path, change):
    """A copy of the particles whose named columns are changed text by text."""
    folder = tmp_path / "copy"
    shutil.copytree(particles.parent, folder)
    block = cif.read_file(str(particles)).find_block("particles")
    columns = {name: [cif.as_string(text) for text in block.find_values(f"_rln{name}")] for name in change}
    new = {name: [change[name](i, text) for i, text in enumerate(texts)] for name, texts in columns.items()}
    half = torch.tensor([int(h) for h in block.find_values("_rlnRandomSubset")])
    rewrite_star(particles, folder / "particles.star", torch.arange(400), half, new)
    return folder / "particles.star"


@pytest.mark.report
def test_good_particles(particles, tmp_path, capsys):
    code, result, items = run(capsys, particles, "-o", tmp_path / "look")
    assert code == 0
    assert {item["verdict"] for item in result["items"]} == {"ok"}
    assert set(items) >= ITEMS | {"signal", "contrast", "cost"}
    assert result["particles"] == 400
    assert result["half_sets"] == [200, 200]
    assert result["missing_files"] == []
    (group,) = result["optics_groups"]
    assert (group["particles"], group["box"], group["pixel_size"]) == (400, 32, 4.0)
    assert (group["voltage"], group["cs"], group["amplitude_contrast"]) == (300, 2.7, 0.1)
    low, high = result["defocus_range"]
    assert 7000 < low < high < 23000
    assert 2 < result["shift_rms"] < 6
    for name in ("slices.png", "directions.png"):
        assert (tmp_path / "look" / name).stat().st_size > 5000
    page = (tmp_path / "look" / "report.html").read_text()
    assert "Check of the input" in page
    assert "Not shown" not in page
    # It does not look like the folder of a run: the map has a name of its own.
    assert read_map(tmp_path / "look" / "check.mrc")[1].size == 32
    assert "slices of check.mrc" in page
    assert not (tmp_path / "look" / "run_class001.mrc").exists()
    # What is not looked at again is not shown as if it had been.
    assert main(["check", str(particles), "--metadata-only", "-o", str(tmp_path / "look")]) == 0
    assert "slices of check.mrc" not in (tmp_path / "look" / "report.html").read_text()
    assert {path.name for path in (tmp_path / "look").iterdir()} == {"check.json", "report.html"}
    # Over a run it would replace the page.
    (tmp_path / "look" / "config.toml").write_text("")
    capsys.readouterr()
    assert main(["check", str(particles), "-o", str(tmp_path / "look")]) == 2
    assert "holds a run" in capsys.readouterr().err


def test_terminal_output(particles, capsys):
    assert main(["check", str(particles)]) == 0
    text = capsys.readouterr().out
    assert "400 particles, box 32 px of 4 Å (STAR file), 300 kV" in text
    assert "    ok  contrast: protein is bright" in text


def test_wrong_contrast(particles, capsys):
    code, _, items = run(capsys, particles, "--invert")
    assert code == 2
    assert items["contrast"]["verdict"] == "wrong"
    assert "without --invert" in items["contrast"]["text"]


def test_masked_images_are_wrong(particles, tmp_path, capsys):
    folder = tmp_path / "masked"
    shutil.copytree(particles.parent, folder)
    with mrcfile.open(folder / "particles.mrcs", "r+") as file:
        axis = np.arange(32) - 16
        file.data[:, np.hypot(axis[:, None], axis) > 12] = 0
    code, _, items = run(capsys, folder / "particles.star")
    assert code == 2
    assert "masked" in items["image values"]["text"]


def test_noise_asks_for_a_look(simulated, capsys):
    code, _, items = run(capsys, simulated(particles=200, noise_only=True))
    assert code == 1
    assert items["signal"]["verdict"] == "look"


def test_missing_stacks_and_the_folder_that_would_help(particles, tmp_path, capsys):
    (tmp_path / "star").mkdir()
    (tmp_path / "star" / "images").mkdir()
    star = shutil.copy(particles, tmp_path / "star" / "particles.star")
    code, result, items = run(capsys, star)
    assert code == 2
    assert result["missing_files"] == ["particles.mrcs"]
    assert "--datadir" in items["images"]["text"]
    shutil.copy(particles.parent / "particles.mrcs", tmp_path / "star" / "images" / "particles.mrcs")
    _, _, items = run(capsys, star)
    folder = tmp_path / "star" / "images"
    assert f"--datadir {folder} would find it" in items["images"]["text"]
    assert run(capsys, star, "--datadir", folder)[0] == 0


def test_fields_from_a_passthrough_file_are_a_note(particles, tmp_path, capsys):
    """Said once, in the run, its summary and the check, where it is no reason for a look."""
    table = read_star(particles)
    write_cs(tmp_path / "whole.cs", table, table.half)
    whole = np.load(tmp_path / "whole.cs")
    (tmp_path / "whole.cs").unlink()
    names = whole.dtype.names
    passed = ["uid", *(name for name in names if name.startswith("ctf/"))]
    kept = [name for name in names if name not in passed[1:]]
    for name, chosen in (("J1.cs", kept), ("J1_passthrough_particles.cs", passed)):
        with (tmp_path / name).open("wb") as file:
            np.save(file, repack_fields(whole[chosen]))
    code, _, items = run(capsys, tmp_path / "J1.cs")
    note = f"{tmp_path / 'J1.cs'}: fields that it lacks are taken from {tmp_path / 'J1_passthrough_particles.cs'}"
    assert code == 0
    assert items["metadata"] == {"name": "metadata", "verdict": "ok", "text": note}
    assert main(["backproject", str(tmp_path / "J1.cs"), "-o", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.count(note) == 1
    assert f"\n  {note}\n" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["notes"] == [note]
    assert note not in summary["warnings"]


def test_metadata_only(particles, tmp_path, capsys):
    star = shutil.copy(particles, tmp_path / "particles.star")
    code, result, items = run(capsys, star, "--metadata-only")
    assert code == 0
    assert result["missing_files"] == []
    assert "not looked at" in items["images"]["text"]
    assert "signal" not in items


@pytest.mark.parametrize(
    ("change", "name", "verdict"),
    [
        ({"DefocusU": lambda i, t: "0", "DefocusV": lambda i, t: "0"}, "defocus", "wrong"),
        ({"DefocusU": lambda i, t: "900000"}, "defocus", "look"),
        ({"OriginXAngst": lambda i, t: "100"}, "shifts", "wrong"),
        ({"OriginXAngst": lambda i, t: "30" if i == 3 else t}, "shifts", "look"),
        ({"AngleRot": lambda i, t: "0", "AngleTilt": lambda i, t: "0", "AnglePsi": lambda i, t: "0"},
         "orientations", "wrong"),
        ({"AngleTilt": lambda i, t: f"{i / 80}"}, "orientations", "look"),
        ({"ImageName": lambda i, t: f"{i // 2 + 1}@particles.mrcs"}, "repeated images", "wrong"),
        ({"ImageName": lambda i, t: f"{i + 2}@particles.mrcs"}, "images", "wrong"),
    ],
)  # fmt: skip
def test_verdicts(particles, tmp_path, capsys, change, name, verdict):
    code, _, items = run(capsys, altered(particles, tmp_path, change))
    assert items[name]["verdict"] == verdict
    assert code >= {"look": 1, "wrong": 2}[verdict]


@pytest.mark.parametrize(
    ("file", "particles", "half_sets", "groups"),
    [
        ("relion31.6opticsgroups.star", 139, [74, 65], 6),
        ("relion5.star", 17, [11, 6], 1),
        ("sample_particles_relion30.star", 17, [10, 7], 1),
        ("sample_particles_relion31.star", 17, [10, 7], None),
        ("cryosparc_P12_J24_001_particles.cs", 2019, [1010, 1009], 1),
    ],
)
def test_files_of_other_programs(shared_data, capsys, file, particles, half_sets, groups):
    _, result, _ = run(capsys, shared_data / "formats" / file, "--metadata-only")
    assert result["particles"] == particles
    assert result["half_sets"] == half_sets
    assert groups is None or len(result["optics_groups"]) == groups


def test_experimental_particles(shared_data, capsys):
    code, _, items = run(capsys, shared_data / "bgal" / "particles.star", "--symmetry", "D2")
    assert code == 0
    assert "bright" in items["contrast"]["text"]


def test_unreadable_metadata_is_one_line(tmp_path, capsys):
    (tmp_path / "x.star").write_text("data_\n")
    assert main(["check", str(tmp_path / "x.star")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_many_rows(particles, tmp_path, capsys):
    """A hundred thousand rows; the million of the documentation takes ten times as long."""
    text = particles.read_text()
    head, _, body = text.rpartition("_rlnRandomSubset\n") if "_rlnRandomSubset\n" in text else (text, "", "")
    rows = [line for line in body.splitlines() if "@" in line]
    assert len(rows) == 400
    (tmp_path / "many.star").write_text(head + "_rlnRandomSubset\n" + "\n".join(rows * 250) + "\n")
    _, result, items = run(capsys, tmp_path / "many.star", "--metadata-only")
    assert result["particles"] == 100_000
    assert items["repeated images"]["verdict"] in ("look", "wrong")
