"""Conversion between programs: what is written reads back as it was, at several boxes and through every format."""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gemmi import cif

from emsplat.cli import main
from emsplat.errors import InputError
from emsplat.io.cryosparc import write_cs
from emsplat.io.gaussians import read_gaussians, write_gaussians
from emsplat.io.mrc import writing_stack
from emsplat.io.particles import read_particles
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import write_table
from emsplat.io.star import read_star_file
from emsplat.io.table import OpticsGroup, ParticleTable, merge_tables
from emsplat.maths.geometry import random_rotations
from emsplat.types import PREMULTIPLIED, Aberrations, Gaussians, Grid, Optics, Poses

COUNT = 24


def make(folder, box=64, pixel_size=1.35, **changes):
    """Particles with nothing at its default, in two stacks of which the files exist."""
    rng = torch.Generator().manual_seed(box)

    def draw(low, high):
        return low + (high - low) * torch.rand(COUNT, generator=rng, dtype=torch.float64)

    for name in ("a", "b"):
        with writing_stack(folder / f"{name}.mrcs", COUNT // 2, Grid(box, pixel_size)) as write:
            write(torch.randn(COUNT // 2, box, box, generator=rng))
    shift = torch.stack([draw(-9, 9), draw(-9, 9)], 1)
    optics = Optics(
        voltage=torch.full((COUNT,), 300.0).double(),
        cs=torch.full((COUNT,), 2.7).double(),
        amplitude_contrast=torch.full((COUNT,), 0.07).double(),
        defocus_u=draw(8000, 25000),
        defocus_v=draw(8000, 25000),
        defocus_angle=draw(0, 3),
        phase_shift=draw(0, 1),
        b_factor=torch.zeros(COUNT).double(),
        scale=torch.ones(COUNT).double(),
    )
    values = {
        "sources": (folder / "p.star",),
        "source": torch.zeros(COUNT, dtype=torch.int64),
        "row": torch.arange(COUNT),
        "poses": Poses(random_rotations(COUNT, rng), shift),
        "optics": optics,
        "groups": (OpticsGroup("one", pixel_size, box),),
        "optics_group": torch.zeros(COUNT, dtype=torch.int64),
        "half": 1 + torch.arange(COUNT) % 2,
        "micrograph": torch.arange(COUNT) // 4,
        "stacks": (folder / "a.mrcs", folder / "b.mrcs"),
        "stack": torch.arange(COUNT) // (COUNT // 2),
        "image": torch.arange(COUNT) % (COUNT // 2),
        "particle_class": torch.arange(COUNT) % 3,
        "micrograph_names": tuple(f"MotionCorr/m{i}.mrc" for i in range(COUNT // 4)),
    }
    return ParticleTable(**(values | changes))


def assert_same(found, expected, *, half=True, names=True):
    """Within 1e-6: rotations absolute, lengths in pixels, the rest relative."""
    assert len(found) == len(expected)
    pixel = expected.groups[0].pixel_size
    torch.testing.assert_close(found.poses.rotation, expected.poses.rotation, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.poses.shift / pixel, expected.poses.shift / pixel, atol=1e-6, rtol=1e-6)
    for name in ("voltage", "cs", "amplitude_contrast", "defocus_u", "defocus_v", "defocus_angle", "phase_shift"):
        torch.testing.assert_close(getattr(found.optics, name), getattr(expected.optics, name), rtol=1e-6, atol=1e-6)
    assert [found.stacks[i].resolve() for i in found.stack] == [expected.stacks[i].resolve() for i in expected.stack]
    assert torch.equal(found.image, expected.image)
    for one, other in zip(found.groups, expected.groups, strict=True):
        assert one.pixel_size == pytest.approx(other.pixel_size, rel=1e-6)
        assert one.box == other.box
    if half:
        assert torch.equal(found.half, expected.half)
    if names:
        assert found.micrograph_names == expected.micrograph_names
        assert torch.equal(found.micrograph, expected.micrograph)
        assert torch.equal(found.particle_class, expected.particle_class)


def convert(*words):
    assert main(["convert", *map(str, words)]) == 0


@pytest.mark.parametrize(("box", "pixel_size"), [(48, 3.3), (64, 1.35), (100, 0.83), (256, 1.0612)])
def test_round_trips_change_nothing(tmp_path, box, pixel_size):
    table = make(tmp_path, box, pixel_size)
    write_table(tmp_path / "p.star", table, table.half)
    assert_same(read_star(tmp_path / "p.star"), table)
    convert(tmp_path / "p.star", tmp_path / "p.cs")
    assert_same(read_particles(tmp_path / "p.cs"), table)
    convert(tmp_path / "p.cs", tmp_path / "back.star")
    assert_same(read_star(tmp_path / "back.star"), table)
    convert(tmp_path / "back.star", tmp_path / "poses.pkl")
    (tmp_path / "stacks.txt").write_text("a.mrcs\nb.mrcs\n")
    pickles = {"poses": tmp_path / "poses.pkl", "ctf": tmp_path / "ctf.pkl"}
    assert_same(read_particles(tmp_path / "stacks.txt", **pickles), table, half=False, names=False)
    convert(tmp_path / "stacks.txt", tmp_path / "last.cs", "--poses", pickles["poses"], "--ctf", pickles["ctf"])
    assert_same(read_particles(tmp_path / "last.cs"), table, half=False, names=False)


def test_pickles_are_arrays_as_cryodrgn_has_them(tmp_path):
    table = make(tmp_path)
    write_table(tmp_path / "p.star", table, table.half)
    convert(tmp_path / "p.star", tmp_path / "new_poses.pkl")
    rotation, shift = pickle.loads((tmp_path / "new_poses.pkl").read_bytes())  # noqa: S301 (our own)
    ctf = pickle.loads((tmp_path / "new_ctf.pkl").read_bytes())  # noqa: S301
    assert rotation.shape == (COUNT, 3, 3)
    np.testing.assert_allclose(shift, table.poses.shift / (64 * 1.35), atol=1e-7)
    assert ctf.dtype == np.float32
    np.testing.assert_allclose(ctf[:, :2], [[64, 1.35]] * COUNT, rtol=1e-6)
    np.testing.assert_allclose(ctf[:, 4], np.rad2deg(table.optics.defocus_angle), rtol=1e-5)
    assert b"numpy._core" not in (tmp_path / "new_ctf.pkl").read_bytes()


def test_star_to_star_keeps_unknown_columns(tmp_path):
    table = make(tmp_path)
    write_table(tmp_path / "p.star", table, table.half)
    text = (tmp_path / "p.star").read_text().replace("_rlnPhaseShift", "_rlnOwn", 1)
    (tmp_path / "q.star").write_text(text)
    convert(tmp_path / "q.star", tmp_path / "r.star", "--first", "5")
    block = cif.read_file(str(tmp_path / "r.star")).find_block("particles")
    assert len(block.find_values("_rlnOwn")) == 5


def test_cs_to_cs_keeps_all_fields(tmp_path):
    table = make(tmp_path)
    write_cs(tmp_path / "p.cs", table, table.half)
    data = np.load(tmp_path / "p.cs")
    wide = np.zeros(COUNT, [*data.dtype.descr, ("own/field", "<f4", (3,))])
    for name in data.dtype.names:
        wide[name] = data[name]
    wide["own/field"] = np.arange(3)
    with (tmp_path / "q.cs").open("wb") as file:
        np.save(file, wide)
    convert(tmp_path / "q.cs", tmp_path / "r.cs", "--class", "1")
    kept = np.load(tmp_path / "r.cs")
    assert kept["own/field"].tolist() == [[0, 1, 2]] * (COUNT // 3)
    assert kept["uid"].tolist() == data["uid"][1::3].tolist()
    assert len(set(data["uid"].tolist())) == COUNT


def test_what_a_format_cannot_say_is_refused_or_said(tmp_path, capsys):
    table = make(tmp_path)
    write_table(tmp_path / "p.star", table, table.half)
    convert(tmp_path / "p.star", tmp_path / "poses.pkl")
    assert "no place for half-sets" in capsys.readouterr().out
    bent = Aberrations(
        torch.eye(2).double().repeat(COUNT, 1, 1), torch.ones(COUNT, 6).double(), torch.zeros(COUNT, 0).double()
    )
    for name, change in (
        ("bent", {"aberrations": bent}),
        ("multiplied", {"treatment": torch.full((COUNT,), PREMULTIPLIED)}),
    ):
        optics = Optics(**(vars(table.optics) | change))
        write_table(tmp_path / f"{name}.star", make(tmp_path, optics=optics), table.half)
        assert main(["convert", str(tmp_path / f"{name}.star"), str(tmp_path / f"{name}.pkl")]) == 2
        assert "convert to a STAR file" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "bent.star"), str(tmp_path / "bent.cs")]) == 2
    assert main(["convert", str(tmp_path / "multiplied.star"), str(tmp_path / "m.cs")]) == 2


def test_an_existing_file_stays(tmp_path, capsys):
    table = make(tmp_path)
    write_table(tmp_path / "p.star", table, table.half)
    (tmp_path / "ctf.pkl").write_text("mine")
    assert main(["convert", str(tmp_path / "p.star"), str(tmp_path / "poses.pkl")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "ctf.pkl").read_text() == "mine"
    convert(tmp_path / "p.star", tmp_path / "poses.pkl", "--overwrite")
    assert main(["convert", str(tmp_path / "p.star"), str(tmp_path / "p.txt")]) == 2


def test_real_files_make_the_round_trip(shared_data, tmp_path):
    """cryoSPARC's own file through STAR and back."""
    source = shared_data / "formats" / "cryosparc_P12_J24_001_particles.cs"
    convert(source, tmp_path / "a.star")
    convert(tmp_path / "a.star", tmp_path / "b.cs")
    one, two = (read_particles(path, need_stacks=False) for path in (source, tmp_path / "b.cs"))
    torch.testing.assert_close(two.poses.rotation, one.poses.rotation, atol=1e-6, rtol=0)
    torch.testing.assert_close(two.poses.shift, one.poses.shift, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(two.optics.defocus_u, one.optics.defocus_u, rtol=1e-6, atol=0)
    assert torch.equal(two.image, one.image)


def test_all_real_star_files_keep_every_column(shared_data, tmp_path):
    for name in ("relion31.star", "relion31.v2.star", "relion5.star", "relion31.6opticsgroups.star"):
        source, target = shared_data / "formats" / name, tmp_path / name
        convert(source, target)
        before, after = (cif.read_file(str(path)) for path in (source, target))
        assert [block.name for block in before] == [block.name for block in after]
        for one, two in zip(before, after, strict=True):
            for loop in (item.loop for item in one if item.loop is not None):
                for tag in loop.tags:
                    expected, found = list(one.find_values(tag)), list(two.find_values(tag))
                    if tag == "_rlnImageName":  # one stack is there, and found from the new file too
                        expected = [t.replace("@relion31.mrcs", f"@{source.parent}/relion31.mrcs") for t in expected]
                        found = [cif.as_string(text) for text in found]  # that folder may have a blank in its name
                    assert expected == found, tag


def test_gaussians_to_pseudo_atoms_and_back(tmp_path):
    rng = torch.Generator().manual_seed(0)
    axes = torch.randn(9, 3, 3, generator=rng)
    mixture = Gaussians(
        10 * torch.randn(9, 3, generator=rng), axes @ axes.mT + torch.eye(3), torch.rand(9, generator=rng)
    )
    write_gaussians(tmp_path / "m.ply", mixture, Grid(64, 1.5))
    convert(tmp_path / "m.ply", tmp_path / "m.cif")
    convert(tmp_path / "m.cif", tmp_path / "n.ply")
    found, grid = read_gaussians(tmp_path / "n.ply")
    assert grid == Grid(64, 1.5)
    for name, value in vars(mixture).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-3, atol=1e-3)
    assert main(["convert", str(tmp_path / "m.ply"), str(tmp_path / "m.star")]) == 2
    assert main(["convert", str(tmp_path / "m.ply"), str(tmp_path / "m.cif")]) == 2


def test_a_30_file_gets_an_optics_table(shared_data, tmp_path):
    """RELION 5 wants one; every column of the old table stays."""
    source = shared_data / "formats" / "sample_particles_relion30.star"
    convert(source, tmp_path / "new.star")
    before, after = (read_particles(path, need_stacks=False) for path in (source, tmp_path / "new.star"))
    torch.testing.assert_close(after.poses.shift, before.poses.shift, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.optics.defocus_u, before.optics.defocus_u)
    assert after.groups[0].pixel_size == pytest.approx(before.groups[0].pixel_size, rel=1e-6)
    document = cif.read_file(str(tmp_path / "new.star"))
    assert {"optics", "particles"} <= {block.name for block in document}
    old = next(block for block in cif.read_file(str(source)) if block.find_values("_rlnImageName"))
    for tag in old.find_loop("_rlnImageName").get_loop().tags:
        assert list(old.find_values(tag)) == list(document.find_block("particles").find_values(tag)), tag


def test_a_poor_optics_table_is_completed(tmp_path):
    """Voltage and the like from the particles, the box from the stack."""
    table = make(tmp_path)
    write_table(tmp_path / "p.star", table, table.half)
    document = cif.read_file(str(tmp_path / "p.star"))
    optics, particles = (document.find_block(name) for name in ("optics", "particles"))
    moved = ("_rlnVoltage", "_rlnSphericalAberration", "_rlnAmplitudeContrast")
    columns = {tag: list(particles.find_values(tag)) for tag in particles.find_loop("_rlnImageName").get_loop().tags}
    columns |= {tag: [optics.find_values(tag)[0]] * COUNT for tag in moved}
    particles.init_loop("", list(columns)).set_all_values(list(columns.values()))
    optics.init_loop("", ["_rlnOpticsGroup", "_rlnImagePixelSize"]).set_all_values([["1"], ["1.35"]])
    document.write_file(str(tmp_path / "poor.star"))
    assert main(["backproject", str(tmp_path / "poor.star"), "-o", str(tmp_path / "run")]) == 0
    whole = cif.read_file(str(tmp_path / "run" / "run_data.star")).find_block("optics")
    assert [float(whole.find_values(tag)[0]) for tag in moved] == [300, 2.7, 0.07]
    assert whole.find_values("_rlnImageSize")[0] == "64"
    assert whole.find_values("_rlnImageDimensionality")[0] == "2"
    assert len(whole.find_values("_rlnOpticsGroupName")) == 1


def with_columns(tmp_path, **columns):
    """A STAR file with further columns, and with micrographs of smaller pixels than the images'."""
    table = make(tmp_path)
    groups = tuple(replace(group, name="K3 camera", original_pixel_size=0.675) for group in table.groups)
    write_table(tmp_path / "p.star", replace(table, groups=groups), table.half, None, columns)
    return tmp_path / "p.star"


def test_what_the_other_program_has_no_place_for_comes_back(tmp_path, capsys):
    """Coordinates, figures of merit and the micrographs' pixel size, through .cs; what is kept, and how, is said."""
    columns = {
        "CoordinateX": [f"{100 + i}.250000" for i in range(COUNT)],
        "CoordinateY": [f"{200 + i}.500000" for i in range(COUNT)],
        "AutopickFigureOfMerit": [f"0.{i:06d}" for i in range(COUNT)],
        "CtfFigureOfMerit": ["0.1"] * COUNT,
    }
    source = with_columns(tmp_path, **columns)
    convert(source, tmp_path / "p.cs")
    said = capsys.readouterr().out
    assert (
        "no fields for rlnCoordinateX, rlnCoordinateY, rlnAutopickFigureOfMerit, rlnCtfFigureOfMerit; they are" in said
    )
    assert np.load(tmp_path / "p.cs")["location/micrograph_psize_A"] == pytest.approx(0.675)
    convert(tmp_path / "p.cs", tmp_path / "back.star")
    (particles,) = read_star_file(tmp_path / "back.star").tables("_rlnImageName")
    optics = read_star_file(tmp_path / "back.star").table("optics")
    assert {name: particles.text(f"_rln{name}") for name in columns} == columns
    assert optics.text("_rlnOpticsGroupName") == ["K3 camera"]
    assert optics.numbers("_rlnMicrographOriginalPixelSize") == pytest.approx(0.675)
    assert not particles.has("_rlnOpticsGroupName")
    convert(source, tmp_path / "poses.pkl")
    said = capsys.readouterr().out
    assert all(f"rln{name}" in said for name in columns)
    assert "half-sets, classes, micrographs; they are left out" in said


def test_columns_of_optics_groups_that_cannot_be_kept_are_listed(tmp_path, capsys):
    source = with_columns(tmp_path)
    text = source.read_text().replace("_rlnImageDimensionality\n", "_rlnImageDimensionality\n_rlnMtfFileName\n")
    source.write_text(text.replace(" 2 0 0\n", " 2 mtf.star 0 0\n"))
    convert(source, tmp_path / "p.cs")
    assert "a .cs file has no place for rlnMtfFileName; they are left out" in capsys.readouterr().out


def test_coordinates_of_cryosparc(tmp_path, capsys):
    """Fractions of the micrograph, y from its last row, become its pixels; fields without a place are said."""
    table = make(tmp_path)
    write_cs(tmp_path / "p.cs", table, table.half)
    data = np.load(tmp_path / "p.cs")
    names = {"center_x_frac": 0.25, "center_y_frac": 0.75, "micrograph_psize_A": 0.5}
    more = [(f"location/{name}", "<f4") for name in names] + [("location/micrograph_shape", "<u4", (2,))]
    wide = np.zeros(COUNT, [*data.dtype.descr, *more, ("pick_stats/ncc_score", "<f4")])
    for name in data.dtype.names:
        wide[name] = data[name]
    for name, value in names.items():
        wide[f"location/{name}"] = value
    wide["location/micrograph_shape"] = [4000, 6000]  # y, x
    with (tmp_path / "q.cs").open("wb") as file:
        np.save(file, wide)
    convert(tmp_path / "q.cs", tmp_path / "q.star")
    assert "a .star file has no place for pick_stats/ncc_score; they are left out" in capsys.readouterr().out
    (particles,) = read_star_file(tmp_path / "q.star").tables("_rlnImageName")
    assert particles.numbers("_rlnCoordinateX").tolist() == [1500] * COUNT
    assert particles.numbers("_rlnCoordinateY").tolist() == [1000] * COUNT
    assert read_star_file(tmp_path / "q.star").table("optics").numbers("_rlnMicrographOriginalPixelSize").tolist() == [
        0.5
    ]


def test_merged_files_keep_coordinates_of_either(tmp_path, capsys):
    """Pixels of the micrograph from a STAR file and from fractions of a .cs file; an unknown one is no error there."""
    table = make(tmp_path)
    write_cs(tmp_path / "p.cs", table, table.half)
    data = np.load(tmp_path / "p.cs")
    names = ("center_x_frac", "center_y_frac", "micrograph_psize_A")
    more = [(f"location/{name}", "<f4") for name in names] + [("location/micrograph_shape", "<u4", (2,))]
    wide = np.zeros(COUNT, [*data.dtype.descr, *more])
    for name in data.dtype.names:
        wide[name] = data[name]
    wide["location/micrograph_shape"], wide["location/center_x_frac"] = [4000, 6000], np.linspace(0.1, 0.9, COUNT)
    wide["location/micrograph_psize_A"], wide["location/center_x_frac"][1] = 0.5, np.nan
    with (tmp_path / "q.cs").open("wb") as file:
        np.save(file, wide)
    alone = read_particles(tmp_path / "q.cs", need_stacks=False)
    assert torch.isfinite(alone.position).all(1).tolist() == [i != 1 for i in range(COUNT)]
    torch.testing.assert_close(alone.position[0], torch.tensor([0.1 * 6000, 4000.0]).double() * 0.5)
    merged = merge_tables([alone, replace(table, coordinates=torch.ones(COUNT, 2).double())])
    assert torch.isfinite(merged.coordinates).all(1).sum() == 2 * COUNT - 1
    assert torch.isfinite(merged.position).all(1).sum() == COUNT - 1  # of a STAR file without a pixel size


def test_no_micrograph_is_made_up(tmp_path, capsys):
    """Pickles know none; half-sets are then drawn particle by particle, which is said."""
    table = make(tmp_path)
    write_table(tmp_path / "p.star", table, table.half)
    convert(tmp_path / "p.star", tmp_path / "poses.pkl")
    (tmp_path / "stacks.txt").write_text("a.mrcs\nb.mrcs\n")
    pickles = ("--poses", tmp_path / "poses.pkl", "--ctf", tmp_path / "ctf.pkl")
    capsys.readouterr()
    convert(tmp_path / "stacks.txt", tmp_path / "new.star", *pickles)
    assert "micrographs are not known, rlnMicrographName is left out" in capsys.readouterr().out
    (particles,) = read_star_file(tmp_path / "new.star").tables("_rlnImageName")
    assert not particles.has("_rlnMicrographName")
    assert not read_star_file(tmp_path / "new.star").table("optics").has("_rlnMicrographOriginalPixelSize")
    assert any("half-sets are drawn per stack" in warning for warning in read_star(tmp_path / "new.star").warnings)


def test_dark_protein_is_not_forgotten(tmp_path, capsys):
    """RELION has no column for the contrast of the images; emsplat reads its own, and says what RELION needs."""
    table = make(tmp_path, sign=-1.0)
    write_cs(tmp_path / "p.cs", table, table.half)
    convert(tmp_path / "p.cs", tmp_path / "p.star")
    assert "protein is dark in these images" in capsys.readouterr().out
    assert read_particles(tmp_path / "p.star").sign == -1
    convert(tmp_path / "p.star", tmp_path / "again.star")
    convert(tmp_path / "again.star", tmp_path / "back.cs")
    assert set(np.load(tmp_path / "back.cs")["blob/sign"]) == {-1}
    assert main(["preprocess", str(tmp_path / "again.star"), "-o", str(tmp_path / "bright")]) == 0
    assert read_particles(tmp_path / "bright" / "particles.star").sign == 1
    text = (tmp_path / "p.star").read_text()
    (tmp_path / "odd.star").write_text(re.sub(r" -1$", " 0", text, count=1, flags=re.MULTILINE))
    with pytest.raises(InputError, match=r"emsplatContrast is -1, 0; expected 1"):
        read_particles(tmp_path / "odd.star")


def named_by_cryosparc(folder):
    """p.cs, and its table: cryoSPARC calls its stacks .mrc."""
    table = make(folder)
    for stack in table.stacks:
        stack.rename(stack.with_suffix(".mrc"))
    table = replace(table, stacks=tuple(stack.with_suffix(".mrc") for stack in table.stacks))
    write_cs(folder / "p.cs", table, table.half)
    return table


def test_relion_gets_stacks_by_names_that_it_takes(tmp_path, capsys):
    """cryoSPARC calls its stacks .mrc, which RELION takes for maps."""
    table = named_by_cryosparc(tmp_path)
    (tmp_path / "relion").mkdir()
    for source in ("p.cs", "relion/p.star"):  # and from a file that has them already
        convert(tmp_path / source, tmp_path / "relion" / "p.star", "--overwrite")
        assert ("called .mrcs" in capsys.readouterr().out) == (source == "p.cs")
        (particles,) = read_star_file(tmp_path / "relion" / "p.star").tables("_rlnImageName")
        names = {name.partition("@")[2] for name in particles.text("_rlnImageName")}
        assert {Path(name).suffix for name in names} == {".mrcs"}
        assert all((tmp_path / "relion" / name).resolve().suffix == ".mrc" for name in names)
        assert_same(read_particles(tmp_path / "relion" / "p.star"), table)


def test_no_stack_is_replaced_by_a_link(tmp_path):
    table = named_by_cryosparc(tmp_path)
    (tmp_path / "q_stacks").mkdir()
    (tmp_path / "q_stacks" / "a.mrcs").write_text("somebody's")
    convert(tmp_path / "p.cs", tmp_path / "q.star")
    assert (tmp_path / "q_stacks" / "a.mrcs").read_text() == "somebody's"
    assert_same(read_particles(tmp_path / "q.star"), table)


def test_beam_tilt_of_a_30_file_is_counted_once(tmp_path):
    table = make(tmp_path)
    write_table(tmp_path / "new.star", table, table.half)
    document = cif.read_file(str(tmp_path / "new.star"))
    particles = document.find_block("particles")
    tags = particles.find_loop("_rlnImageName").get_loop().tags
    columns = {tag: list(particles.find_values(tag)) for tag in tags if tag != "_rlnOpticsGroup"}
    more = {"Voltage": "300", "SphericalAberration": "2.7", "AmplitudeContrast": "0.07", "ImagePixelSize": "1.35"}
    more |= {"BeamTiltX": "0.5", "BeamTiltY": "-0.3"}
    columns |= {f"_rln{name}": [text] * COUNT for name, text in more.items()}
    old = cif.Document()
    old.add_new_block("").init_loop("", list(columns)).set_all_values(list(columns.values()))
    old.write_file(str(tmp_path / "old.star"))
    before = read_particles(tmp_path / "old.star")
    assert before.optics.aberrations.odd.any()
    convert(tmp_path / "old.star", tmp_path / "written.star")
    after = read_particles(tmp_path / "written.star")
    torch.testing.assert_close(after.optics.aberrations.odd, before.optics.aberrations.odd, rtol=1e-6, atol=1e-6)


def test_merged_files_keep_what_their_optics_groups_share(tmp_path, capsys):
    """And say what only one of them has."""
    source = with_columns(tmp_path)
    text = source.read_text().replace("_rlnImageDimensionality\n", "_rlnImageDimensionality\n_rlnMtfFileName\n")
    one, other = text.replace(" 2 0 0\n", " 2 k3.star 0 0\n"), text.replace(" 2 0 0\n", " 2 falcon.star 0 0\n")
    source.write_text(one)
    other = other.replace("_rlnVoltage\n", "_rlnVoltage\n_rlnOwn\n").replace(" 300.0000000 ", " 300.0000000 7 ")
    (tmp_path / "q.star").write_text(other)
    convert(source, tmp_path / "both.star", "--merge", tmp_path / "q.star")
    assert "rlnOwn are not in all of the files; they are left out" in capsys.readouterr().out
    optics = read_star_file(tmp_path / "both.star").table("optics")
    assert optics.text("_rlnMtfFileName") == ["k3.star", "falcon.star"]
