"""RELION STAR files: every dialect reads right, and what cannot be read right is refused by name."""

import gzip
import math
import re

import pytest
import torch

from emsplat.errors import InputError, OutputError
from emsplat.io.mrc import writing_stack
from emsplat.io.particles import read_particles, write_used
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import rewrite_star, write_particles_star
from emsplat.io.star import read_star_file
from emsplat.io.table import merge_tables
from emsplat.maths.geometry import euler_to_matrix, random_rotations
from emsplat.maths.groups import C1
from emsplat.particles.choose import flip_hand
from emsplat.types import PHASE_FLIPPED, PREMULTIPLIED, RAW, Grid, Optics, Poses


@pytest.fixture
def folder(tmp_path):
    """A project folder with two stacks of 8 images of 8 x 8 pixels."""
    for name in ("a", "b"):
        with writing_stack(tmp_path / f"{name}.mrcs", 8, Grid(8, 2.0)) as write:
            write(torch.randn(8, 8, 8))
    return tmp_path


OPTICS = """
data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
1 first 300.0 2.7 0.1 2.0 8
2 second 200.0 1.4 0.07 2.0 8
"""
COLUMNS = "ImageName OpticsGroup DefocusU DefocusV DefocusAngle AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst"
ROWS = [
    "000002@a.mrcs 1 15000 14000 35 30 50 70 3 -4",
    "000001@b.mrcs 2 16000 15500 10 -30 90 0 0 0",
    "8@a.mrcs 1 12000 12000 0 0 0 45 1.5 2.5",
    "5@b.mrcs 1 12000 12000 0 0 180 45 -1 -2",
]


def particles(rows=ROWS, columns=COLUMNS, name="particles"):
    head = "".join(f"_rln{column} #{i + 1}\n" for i, column in enumerate(columns.split()))
    return f"\ndata_{name}\n\nloop_\n{head}" + "\n".join(rows) + "\n"


def remarks(table):
    """What is said of a table, but for the missing half-sets and micrographs of all tables here."""
    return tuple(text for text in table.warnings if "no columns rlnRandomSubset and rlnMicrographName" not in text)


def write(folder, text, name="p.star"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_version_31_in_house_units(folder):
    table = read_star(write(folder, OPTICS + particles()))
    assert len(table) == 4
    torch.testing.assert_close(
        table.poses.rotation[0], euler_to_matrix(torch.deg2rad(torch.tensor([30.0, 50, 70]).double()))
    )
    assert table.poses.shift.tolist() == [[3, -4], [0, 0], [1.5, 2.5], [-1, -2]]
    assert table.optics.voltage.tolist() == [300, 200, 300, 300]
    assert table.optics.cs.tolist() == [2.7, 1.4, 2.7, 2.7]
    assert table.optics.amplitude_contrast.tolist() == [0.1, 0.07, 0.1, 0.1]
    assert table.optics.defocus_v.tolist() == [14000, 15500, 12000, 12000]
    assert table.optics.defocus_angle[0] == pytest.approx(math.radians(35))
    assert table.optics_group.tolist() == [0, 1, 0, 0]
    assert [g.pixel_size for g in table.groups] == [2.0, 2.0]
    # index@stack is honoured, not the order of the rows
    assert [table.stacks[i].name for i in table.stack] == ["a.mrcs", "b.mrcs", "a.mrcs", "b.mrcs"]
    assert table.image.tolist() == [1, 0, 7, 4]
    assert table.half is None


@pytest.mark.parametrize(
    "text",
    [
        particles() + OPTICS,
        (OPTICS + particles()).replace("\n", "\r\n"),
        (OPTICS + particles()).replace(" ", "\t"),
        "# version 50001\n\n" + OPTICS + "# a remark\n" + particles().replace("loop_\n", "loop_ \n"),
        (OPTICS + particles()).replace("8@a.mrcs", "'8@a.mrcs'").replace("first", '"first group"'),
        (OPTICS + particles()).replace("#1\n", "\n").replace("\n8@a", "\n\n8@a"),
    ],
    ids=["optics last", "CRLF", "tabs", "remarks", "quotes", "blank lines"],
)
def test_spellings_of_the_same_table(folder, text):
    expected = read_star(write(folder, OPTICS + particles()))
    table = read_star(write(folder, text, "other.star"))
    assert torch.equal(table.poses.rotation, expected.poses.rotation)
    assert torch.equal(table.poses.shift, expected.poses.shift)
    assert torch.equal(table.image, expected.image)
    assert torch.equal(table.optics.defocus_u, expected.optics.defocus_u)


def test_column_order_is_free(folder):
    order = [9, 3, 0, 5, 1, 2, 8, 4, 7, 6]
    columns = " ".join(COLUMNS.split()[i] for i in order)
    rows = [" ".join(row.split()[i] for i in order) for row in ROWS]
    table = read_star(write(folder, OPTICS + particles(rows, columns)))
    expected = read_star(write(folder, OPTICS + particles(), "q.star"))
    assert torch.equal(table.poses.rotation, expected.poses.rotation)
    assert torch.equal(table.poses.shift, expected.poses.shift)


def test_particle_column_wins_over_optics_column(folder):
    rows = [f"{row} {300 + i} 40 0.5 90" for i, row in enumerate(ROWS)]
    columns = f"{COLUMNS} Voltage CtfBfactor CtfScalefactor PhaseShift"
    optics = read_star(write(folder, OPTICS + particles(rows, columns))).optics
    assert optics.voltage.tolist() == [300, 301, 302, 303]
    assert optics.b_factor.tolist() == [40] * 4
    assert optics.scale.tolist() == [0.5] * 4
    assert optics.phase_shift[0] == pytest.approx(math.pi / 2)


def test_version_30(folder):
    columns = (
        "ImageName MicrographName DefocusU DefocusV DefocusAngle Voltage SphericalAberration AmplitudeContrast "
        "DetectorPixelSize Magnification AngleRot AngleTilt AnglePsi OriginX OriginY RandomSubset"
    )
    rows = [
        f"{i + 1}@a.mrcs m{i // 2}.mrc 15000 14000 35 300 2.7 0.1 5.0 25000 30 50 70 1.5 -2 {i % 2 + 1}"
        for i in range(4)
    ]
    for name in ("", "images", "particles"):
        table = read_star(write(folder, particles(rows, columns, name)))
        assert table.groups[0].pixel_size == pytest.approx(2.0)  # 5 µm / 25,000
        assert table.poses.shift[0].tolist() == [3.0, -4.0]  # pixels to Å
        assert table.half.tolist() == [1, 2, 1, 2]
        assert table.micrograph.tolist() == [0, 0, 1, 1]


def test_paths_are_tried_in_order(folder, tmp_path_factory, monkeypatch):
    deep = folder / "Refine3D" / "job001"
    deep.mkdir(parents=True)
    star = write(deep, OPTICS + particles())
    assert read_star(star).stacks[0] == folder / "a.mrcs"  # a parent of the STAR file
    far = write(tmp_path_factory.mktemp("far"), OPTICS + particles())
    assert read_star(far, folder).stacks[0] == folder / "a.mrcs"  # --datadir
    elsewhere = write(far.parent, OPTICS + particles().replace("a.mrcs", "Extract/job2/a.mrcs"), "q.star")
    assert read_star(elsewhere, folder).stacks[0] == folder / "a.mrcs"  # --datadir and the file name
    (folder / "a.mrcs").rename(folder / "a.mrc")
    assert read_star(far, folder).stacks[0] == folder / "a.mrc"
    monkeypatch.chdir(folder)
    assert read_star(far).stacks[1] == folder / "b.mrcs"  # where the program runs
    monkeypatch.chdir(far.parent)
    with pytest.raises(InputError, match=r'2 of 2 image stacks are missing, the first is "a\.mrcs".*--datadir'):
        read_star(far)


def change(old, new):
    return (OPTICS + particles()).replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (change("_rlnAngleTilt #7", "_rlnSomething #7"), "no column rlnAngleTilt; .*known orientations"),
        (change("_rlnDefocusU #3", "_rlnOther #3"), "no column rlnDefocusU; .*CTF"),
        (change("_rlnVoltage #3", "_rlnOther #3"), "no column rlnVoltage"),
        (change("_rlnImageName #1", "_rlnOther #1"), "no table has a column rlnImageName"),
        (change("15000", "nan"), r'row 1 of data_particles: rlnDefocusU is "nan".*finite number'),
        (change("16000", "1_6000"), r'row 2 of data_particles: rlnDefocusU is "1_6000"'),
        (change("-30 90", "west 90"), r'row 2 of data_particles: rlnAngleRot is "west"'),
        (change("8@a.mrcs", "0@a.mrcs"), r'row 3 of data_particles: rlnImageName is "0@a\.mrcs"; .*index from 1'),
        (change("8@a.mrcs", "x@a.mrcs"), "row 3 of data_particles: rlnImageName"),
        (change("b.mrcs 2", "b.mrcs 7"), "row 2 of data_particles: rlnOpticsGroup 7 is not in data_optics"),
        (change("2 second", "1 second"), "names an rlnOpticsGroup twice"),
        (change("0.1 2.0 8", "0.1 -2.0 8"), "rlnImagePixelSize in data_optics is -2"),
        (change("first 300.0", "first 0.0"), "rlnVoltage is 0"),
        (
            change(" 3 -4\n", " 3\n"),
            r"p\.star, line 28: a row of data_particles has 9 values; expected 10, .*left empty",
        ),
        (change("_rlnImageSize #7", "_rlnCtfDataAreCtfCorrected #7"), "rlnCtfDataAreCtfCorrected is set"),
        (change("_rlnImageSize #7", "_rlnMagMat00 #7"), "rlnMagMat00 .* differ from 1 0 0 1"),
        (change("_rlnImageSize #7", "_rlnOddZernike #7").replace("2.0 8", "2.0 [1,x]"), "rlnOddZernike is"),
        ("", "no line begins with data_; expected a RELION STAR file"),
        ("data_particles\nloop_\n", "STAR"),
    ],
)
def test_bad_tables_are_refused_by_name(folder, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_star(write(folder, text))
    assert str(folder / "p.star") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_half_sets(folder):
    with pytest.raises(InputError, match=r"is a folder; expected .*name the file in it"):
        read_star(folder)
    with pytest.raises(InputError, match="no such file"):
        read_star(folder / "none.star")
    rows = [f"{row} {half}" for row, half in zip(ROWS, (1, 2, 3, 1), strict=True)]
    with pytest.raises(InputError, match="row 3 of data_particles: rlnRandomSubset is 3"):
        read_star(write(folder, OPTICS + particles(rows, f"{COLUMNS} RandomSubset")))


def test_beam_tilt_of_a_particle_is_coma(folder):
    rows = [f"{row} 0.2" for row in ROWS]
    bent = read_star(write(folder, OPTICS + particles(rows, f"{COLUMNS} BeamTiltX"))).optics.aberrations
    assert bent.magnification[0].tolist() == [[1, 0], [0, 1]]
    coma = -2 * math.pi * 2.7e4 * 0.01968762**2 * 0.2 / 3
    assert bent.odd[0].tolist() == pytest.approx([0, 2 * coma, 0, 0, coma, 0], rel=1e-5)
    assert bent.even.shape == (4, 0)


def test_flags_of_treated_images(folder):
    text = OPTICS.replace("_rlnImageSize #7", "_rlnCtfDataAreCtfPremultiplied #7")
    text = text.replace("0.1 2.0 8", "0.1 2.0 1").replace("0.07 2.0 8", "0.07 2.0 0")
    table = read_star(write(folder, text + particles()))
    assert torch.equal(table.optics.treatment, torch.tensor([PREMULTIPLIED, RAW])[table.optics_group])
    rows = [f"{row} 1" for row in ROWS]
    table = read_star(write(folder, OPTICS + particles(rows, f"{COLUMNS} CtfDataArePhaseFlipped")))
    assert table.optics.treatment.tolist() == [PHASE_FLIPPED] * 4


def test_rewriting_keeps_every_column(folder):
    rows = [f"{row} 'two words' 1e-3" for row in ROWS]
    source = write(folder, OPTICS + particles(rows, f"{COLUMNS} Unknown Other"))
    rewrite_star(source, folder / "out.star", torch.tensor([0, 2, 3]), torch.tensor([2, 1, 1]))
    text = (folder / "out.star").read_text()
    assert "'two words' 1e-3" in text
    assert "000001@b.mrcs" not in text
    table, before = read_star(folder / "out.star"), read_star(source)
    assert table.half.tolist() == [2, 1, 1]
    torch.testing.assert_close(table.poses.rotation, before.poses.rotation[[0, 2, 3]], rtol=0, atol=1e-14)
    assert torch.equal(table.optics.voltage, before.optics.voltage[[0, 2, 3]])


def test_written_particles_read_back(folder):
    rng = torch.Generator().manual_seed(0)
    poses = Poses(random_rotations(6, rng), torch.randn(6, 2, generator=rng).double())
    values = (300, 2.7, 0.1, 15000.5, 14000.25, 0.6, 0.3, 20, 0.9)
    optics = Optics(*(torch.full((6,), float(v), dtype=torch.float64) for v in values))
    names, half = [f"{i + 1}@a.mrcs" for i in range(6)], torch.tensor([1, 2, 1, 2, 1, 2])
    write_particles_star(folder / "w.star", names, ["m.mrc"] * 6, poses, optics, Grid(8, 2.0), half)
    table = read_star(folder / "w.star")
    torch.testing.assert_close(table.poses.rotation, poses.rotation, atol=1e-7, rtol=0)
    torch.testing.assert_close(table.poses.shift, poses.shift, atol=1e-6, rtol=0)
    for name in vars(optics):
        torch.testing.assert_close(getattr(table.optics, name), getattr(optics, name), atol=1e-6, rtol=1e-6)
    assert torch.equal(table.half, half)


def test_experimental_particles(shared_data):
    table = read_star(shared_data / "bgal" / "particles.star")
    assert len(table) == 2374
    assert len(table.stacks) == 10
    assert (table.groups[0].pixel_size, table.groups[0].box) == (3.54, 64)
    assert table.optics.voltage.unique().tolist() == [200]
    assert table.optics.cs.unique().tolist() == [1.4]
    # first row of the file: rot 167.257, tilt 42.1381, psi -93.6008, origin (-7.08, -7.08), subset 2
    angles = torch.deg2rad(torch.tensor([167.257, 42.1381, -93.6008], dtype=torch.float64))
    torch.testing.assert_close(table.poses.rotation[0], euler_to_matrix(angles))
    assert table.poses.shift[0].tolist() == [-7.08, -7.08]
    assert table.optics.defocus_u[0].item() == pytest.approx(10863.857422)
    assert int(table.half[0]) == 2
    assert int(table.image[0]) == 0


@pytest.mark.parametrize(
    ("name", "count", "groups", "pixel_size"),
    [
        ("FinalRefinement-OriginalParticles-PfCRT.star", None, 1, 1.035),
        ("relion31.star", 5, 1, 2.806),
        ("relion31.v2.star", 5, 1, 2.806),
        ("relion31.6opticsgroups.star", None, 6, None),
        ("sample_particles_relion30.star", None, 1, None),
        ("sample_particles_relion31.star", None, 2, 1.4),
    ],
)
def test_files_of_other_programs(shared_data, tmp_path, name, count, groups, pixel_size):
    """With empty stacks of the right names: counts, groups and pixel sizes as the files give them."""
    source = shared_data / "formats" / name
    star = tmp_path / name
    star.write_bytes(source.read_bytes())
    for word in source.read_text().split():
        if "@" in word:
            stack = tmp_path / word.split("@")[1]
            stack.parent.mkdir(parents=True, exist_ok=True)
            stack.touch()
    table = read_star(star)
    assert len(table) == (count or sum("@" in line for line in source.read_text().splitlines()))
    assert len(table.groups) == groups
    if pixel_size:
        assert table.groups[0].pixel_size == pytest.approx(pixel_size, rel=1e-3)
    assert torch.isfinite(table.poses.rotation).all()


ONE_COLUMN = particles(["1@a.mrcs", "2@a.mrcs", "3@a.mrcs", "4@a.mrcs"], "ImageName")
SPLIT = OPTICS + ONE_COLUMN + "\nloop_\n" + "".join(f"_rln{name}\n" for name in COLUMNS.split()[2:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # a second loop of other length would shift the table
        (SPLIT + "1 2 3 4 5 6 7 8\n" * 3, "line 24: .*a second table in one block; write all its columns in one loop_"),
        (SPLIT + "1 2 3 4 5 6 7 8\n" * 5, "line 24: .*a second table in one block; write all its columns in one loop_"),
        (OPTICS + particles() + "_rlnVoltage 300\n", "line 32: .*a second table in one block; .*_rlnVoltage 300"),
        (OPTICS + "_rlnPhaseShift 3\n" + particles(), "line 14: .*a second table in one block; .*_rlnPhaseShift 3"),
        # numbers that do not fit
        (change("15000", "1e300"), r'row 1 of data_particles: rlnDefocusU is "1e300"; expected a finite number'),
        (change("b.mrcs 2", "b.mrcs 1e30"), r"row 2 of data_particles: rlnOpticsGroup is 1e\+30; expected a whole"),
        (change("b.mrcs 2", "b.mrcs 1.5"), r"row 2 of data_particles: rlnOpticsGroup is 1\.5; expected a whole"),
        (change("8@a.mrcs", "9" * 20 + "@a.mrcs"), "row 3 of data_particles: rlnImageName"),
        (change("8@a.mrcs", "9" * 5000 + "@a.mrcs"), "row 3 of data_particles: rlnImageName"),
        (change("8@a.mrcs", "-8@a.mrcs"), r'row 3 of data_particles: rlnImageName is "-8@a\.mrcs"'),
        (change("8@a.mrcs", "8@"), r'row 3 of data_particles: rlnImageName is "8@"'),
        (change("2.7 0.1 2.0", "2.7 1.5 2.0"), r"row 1: rlnAmplitudeContrast is 1\.5"),
        (change("_rlnImagePixelSize #6", "_rlnOther #6"), "data_optics has no rlnImagePixelSize; add it"),
        (change("_rlnOriginYAngst #10", "_rlnCtfDataAreCtfCorrected #10"), "CtfCorrected is set; .*extract"),
        (OPTICS + particles() + particles(), "line 33: a second table data_particles, the first .* 15; .*--merge"),
        (OPTICS + particles() + particles(name="more"), "data_particles and data_more both have a column rlnImageName"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_right_are_refused_by_name(folder, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_star(write(folder, text))
    assert str(folder / "p.star") in str(caught.value)
    assert "\n" not in str(caught.value)


OLD = "ImageName DefocusU Voltage SphericalAberration AngleRot AngleTilt AnglePsi DetectorPixelSize Magnification"


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("5 0", "rlnMagnification is not above 0"),
        ("6 25000", r"pixel sizes from 2 to 2\.4 Å; .*one microscope setting"),
    ],
)
def test_old_files_need_one_pixel_size(folder, last, message):
    rows = [f"{i + 1}@a.mrcs 15000 300 2.7 0 0 0 {'5 25000' if i < 3 else last}" for i in range(4)]
    with pytest.raises(InputError, match=message):
        read_star(write(folder, particles(rows, OLD, "")))


def test_defaults_of_what_the_file_leaves_out_are_said(folder):
    rows = [f"{i + 1}@a.mrcs 15000 300 2.7 0 0 0 5 25000" for i in range(4)]
    table = read_star(write(folder, particles(rows, OLD, "")))
    said = ("rlnAmplitudeContrast; 0 is used", "rlnDefocusV; rlnDefocusU is used", "rlnOriginYAngst; .*centred")
    assert all(any(re.search(text, warning) for warning in table.warnings) for text in said)
    assert len(remarks(table)) == len(said)
    expected = {
        "amplitude_contrast": 0,
        "defocus_v": 15000,
        "defocus_angle": 0,
        "phase_shift": 0,
        "b_factor": 0,
        "scale": 1,
    }
    for name, value in expected.items():
        assert getattr(table.optics, name).tolist() == [value] * 4
    assert table.poses.shift.tolist() == [[0, 0]] * 4


def test_particles_without_optics_group(folder):
    """One group is clear, several are not."""
    columns, rows = COLUMNS.replace("OpticsGroup ", ""), [" ".join(row.split()[:1] + row.split()[2:]) for row in ROWS]
    with pytest.raises(InputError, match=r"no column rlnOpticsGroup, but data_optics has 2 groups.*add the column"):
        read_star(write(folder, OPTICS + particles(rows, columns)))
    table = read_star(write(folder, OPTICS.replace("2 second 200.0 1.4 0.07 2.0 8\n", "") + particles(rows, columns)))
    assert table.optics.voltage.tolist() == [300] * 4
    assert remarks(table) == ()


@pytest.mark.parametrize("name", ["MicrographPixelSize", "MicrographOriginalPixelSize"])
def test_pixel_size_of_the_micrograph_is_taken_with_a_word(folder, name):
    table = read_star(write(folder, OPTICS.replace("ImagePixelSize", name) + particles()))
    assert [group.pixel_size for group in table.groups] == [2, 2]
    (warning,) = remarks(table)
    assert f"taken from rln{name}, 2 Å, which is right only if they were not binned; add rlnImagePixelSize" in warning


def test_origins_in_pixels_beside_an_optics_table_are_said(folder):
    table = read_star(write(folder, OPTICS + particles(columns=COLUMNS.replace("Angst", ""))))
    assert table.poses.shift[0].tolist() == [6, -8]
    assert any("pixels of the images, up to 2 Å" in warning for warning in table.warnings)
    with pytest.raises(InputError, match="no column rlnOriginYAngst"):
        read_star(write(folder, OPTICS + particles(columns=COLUMNS.replace("OriginYAngst", "Other"))))


def test_astigmatism_needs_its_angle(folder):
    columns = COLUMNS.replace("DefocusAngle", "Other")
    with pytest.raises(InputError, match=r"no column rlnDefocusAngle, but .* differ by up to 1000 Å; add the angle"):
        read_star(write(folder, OPTICS + particles(columns=columns)))
    rows = [row.replace("15000 14000", "15000 15000").replace("16000 15500", "16000 16000") for row in ROWS]
    assert remarks(read_star(write(folder, OPTICS + particles(rows, columns)))) == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("first 300.0", "first 300000", "row 1: rlnVoltage is 300000; expected a possible value in kV"),
        ("300.0 2.7", "300.0 2.7e7", r"row 1: rlnSphericalAberration is 2\.7e\+07; expected a possible value in mm"),
        ("2.7 0.1", "2.7 10", "row 1: rlnAmplitudeContrast is 10; expected a possible value as a fraction"),
        ("15000", "15000,5", 'rlnDefocusU is "15000,5"; expected decimal points, not commas'),
    ],
)
def test_other_units_are_refused(folder, old, new, message):
    with pytest.raises(InputError, match=message):
        read_star(write(folder, change(old, new)))


def test_images_in_focus_are_said(folder):
    (warning,) = remarks(read_star(write(folder, change("12000 12000", "0 0"))))
    assert "the defocus of 2 of 4 particles is 0" in warning


@pytest.mark.parametrize(
    ("factor", "words"), [(1e-4, "the defocus of all particles is 1.6 or less and is taken in Å"), (-1, "as overfocus")]
)
def test_defocus_of_another_unit_or_sign_is_said(folder, factor, words):
    rows = [row.split() for row in ROWS]
    scaled = [[*row[:2], *(f"{factor * float(value):.6f}" for value in row[2:4]), *row[4:]] for row in rows]
    (warning,) = remarks(read_star(write(folder, OPTICS + particles([" ".join(row) for row in scaled]))))
    assert words in warning


@pytest.mark.parametrize("files", [1, 2])
def test_priors_follow_the_hand(folder, files):
    """Local searches of RELION start from them."""
    path = write(folder, OPTICS + particles([f"{row} 90 5" for row in ROWS], f"{COLUMNS} AngleTiltPrior Other"))
    table = flip_hand(merge_tables([read_star(path)] * files), C1)
    write_used(table, folder / "flipped.star", None)
    written = read_star_file(folder / "flipped.star").table("particles")
    assert written.text("_rlnOther") == ["5"] * 4 * files
    if files == 1:
        assert written.text("_rlnAngleTiltPrior") == written.text("_rlnAngleTilt")
    else:
        assert not written.has("_rlnAngleTiltPrior")


def test_an_empty_line_among_the_rows_is_said(folder):
    (warning,) = remarks(read_star(write(folder, change("8@a", "\n8@a"))))
    assert "RELION reads only the 2 rows before it" in warning


def test_compressed_file(folder):
    (folder / "p.star.gz").write_bytes(gzip.compress((OPTICS + particles()).encode()))
    expected = read_star(write(folder, OPTICS + particles()))
    assert torch.equal(read_particles(folder / "p.star.gz").poses.shift, expected.poses.shift)
    with pytest.raises(InputError, match=r"is compressed; unpack it first: gunzip p\.cs\.gz"):
        read_particles(folder / "p.cs.gz")


def test_optics_groups_are_joined_by_number(folder):
    optics = OPTICS.replace("1 first", "7 first").replace("2 second", "3 second")
    table = read_star(write(folder, optics + particles().replace("mrcs 1 ", "mrcs 7 ").replace("mrcs 2 ", "mrcs 3 ")))
    assert table.optics.voltage.tolist() == [300, 200, 300, 300]
    assert [table.groups[g].name for g in table.optics_group] == ["first", "second", "first", "first"]


def test_stack_with_a_space_in_its_name(folder):
    (folder / "b.mrcs").rename(folder / "b c.mrcs")
    rows = [row.replace("000001@b.mrcs", "'000001@b c.mrcs'").replace("5@b.mrcs", '"5@b c.mrcs"') for row in ROWS]
    table = read_star(write(folder, OPTICS + particles(rows)))
    assert [table.stacks[i].name for i in table.stack] == ["a.mrcs", "b c.mrcs", "a.mrcs", "b c.mrcs"]


def test_names_in_other_alphabets(folder):
    """gemmi's CIF is ASCII outside quotes; the file systems that names come from are not."""
    name = "/data/Müller/粒子 1.mrcs"
    text = (
        "# für\n"
        + OPTICS
        + particles([row.replace("a.mrcs", "é#ö'.mrcs").replace("b.mrcs", "é#ö'.mrcs") for row in ROWS])
    )
    path = write(folder, text)
    table = read_star(path, need_stacks=False)
    assert [str(stack) for stack in table.stacks] == ["é#ö'.mrcs"]
    rewrite_star(path, folder / "new.star", torch.arange(2), torch.tensor([1, 2]), {"MicrographName": [name] * 2})
    again = read_star(folder / "new.star", need_stacks=False)
    assert again.stacks == table.stacks
    assert set(again.micrograph_names) == {name}
    quoted = text.replace("1 first", "1 'ein é Name'").replace("data_optics", "data_note\n_a\n;é é\n;\ndata_optics", 1)
    assert read_star(write(folder, quoted), need_stacks=False).stacks == table.stacks
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"p\.star, line 1: byte 0xfc is no UTF-8"):
        read_star(path, need_stacks=False)


def test_tables_without_rows(folder):
    empty = "data_particles\nloop_\n" + "".join(f"_rln{name}\n" for name in COLUMNS.split())
    for text in (OPTICS + empty, empty):
        with pytest.raises(InputError, match="data_particles has no rows"):
            read_star(write(folder, text), need_stacks=False)


def test_messages_are_one_line(folder):
    rows = [row.replace("000002@a.mrcs", "x@\u2028bad" + "x" * 5000, 1) for row in ROWS]
    with pytest.raises(InputError, match=r"row 1 .*expected index@stack") as caught:
        read_star(write(folder, OPTICS + particles(rows)), need_stacks=False)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_rewriting_replaces_half_sets_and_leaves_the_other_tables(folder):
    rows = [f"{row} 1 -0.000000" for row in ROWS]
    extra = "\ndata_job\n_rlnJobTypeLabel  'relion.refine3d'\n"
    source = write(folder, OPTICS + extra + particles(rows, f"{COLUMNS} RandomSubset Other"))
    before = source.read_bytes()
    rewrite_star(source, folder / "out.star", torch.tensor([3, 1]), torch.tensor([2, 1]))
    lines = (folder / "out.star").read_text().splitlines()
    assert "1 first 300.0 2.7 0.1 2.0 8" in lines
    assert any("'relion.refine3d'" in line for line in lines)
    assert [line for line in lines if "@" in line] == [f"{ROWS[3]} 2 -0.000000", f"{ROWS[1]} 1 -0.000000"]
    assert source.read_bytes() == before


def test_a_file_can_be_rewritten_in_place_or_not_at_all(folder):
    source = write(folder, OPTICS + particles())
    (folder / "nowhere").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        rewrite_star(source, folder / "nowhere" / "out.star", torch.arange(4), torch.ones(4, dtype=torch.int64))
    rewrite_star(source, source, torch.arange(3), torch.tensor([1, 2, 1]))
    assert read_star(source).half.tolist() == [1, 2, 1]
    assert not list(folder.glob(".*"))


def with_empty_stacks(source, folder):
    """A copy of the STAR file, with empty files where it expects image stacks."""
    star = folder / source.name
    star.write_bytes(source.read_bytes())
    for word in source.read_text().split():
        if "@" in word:
            (folder / word.split("@")[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / word.split("@")[1]).touch()
    return star


def test_golden_values_of_relion_30_from_cryosparc(shared_data, tmp_path):
    source = shared_data / "formats" / "FinalRefinement-OriginalParticles-PfCRT.star"
    table = read_star(with_empty_stacks(source, tmp_path))
    angles = torch.deg2rad(torch.tensor([16.09353, 86.352776, 98.22569], dtype=torch.float64))
    torch.testing.assert_close(table.poses.rotation[0], euler_to_matrix(angles))
    # -0.14063 and -0.04688 pixels of 1.035 µm / 10,000
    assert table.poses.shift[0].tolist() == pytest.approx([-0.14555205, -0.0485208])
    assert table.optics[:1].defocus_v.tolist() == [17521.4]
    assert (table.optics.voltage[0], table.optics.cs[0]) == (300, 0.001)
    assert math.degrees(table.optics.defocus_angle[0]) == pytest.approx(87.62907)
    assert table.half.tolist() == [2, 1, 2, 2, 2]
    assert table.image.tolist() == [0, 1, 2, 3, 4]  # of rlnImageName, not of rlnImageOriginalName
    assert table.micrograph.tolist() == [0, 0, 1, 1, 2]


def test_golden_values_of_relion_30(shared_data, tmp_path):
    table = read_star(with_empty_stacks(shared_data / "formats" / "sample_particles_relion30.star", tmp_path))
    # 5 µm / 37,369.207 = 1.338 Å; 0.1996, 0.4496 and 0.9496 pixels
    assert table.groups[0].pixel_size == pytest.approx(1.338, abs=1e-6)
    assert table.poses.shift[0].tolist() == pytest.approx([0.2670648, 0.2670648], abs=1e-6)
    assert table.poses.shift[5].tolist() == pytest.approx([0.6015648, 1.2705648], abs=1e-6)
    assert table.optics.voltage.tolist() == [300] * 8 + [200] * 9
    assert table.half[:6].tolist() == [2, 2, 1, 1, 1, 2]


def test_golden_values_of_relion_31(shared_data, tmp_path):
    table = read_star(with_empty_stacks(shared_data / "formats" / "sample_particles_relion31.star", tmp_path))
    assert table.optics.voltage.tolist() == [300] * 8 + [200] * 9  # of the optics group
    assert table.poses.shift[5].tolist() == [0.4496, 0.9496]  # already in Å
    angles = torch.deg2rad(torch.tensor([-2.063664, 91.760648, -136.161912], dtype=torch.float64))
    torch.testing.assert_close(table.poses.rotation[11], euler_to_matrix(angles))
    assert [(g.name, g.pixel_size, g.box) for g in table.groups] == [
        ("opticsGroup1", 1.4, None),
        ("opticsGroup2", 1.4, None),
    ]


def test_golden_values_of_six_optics_groups(shared_data, tmp_path):
    table = read_star(with_empty_stacks(shared_data / "formats" / "relion31.6opticsgroups.star", tmp_path))
    assert torch.bincount(table.optics_group).tolist() == [48, 29, 5, 7, 26, 24]
    assert [g.pixel_size for g in table.groups] == [1.25, 1.24, 1.25, 1.25, 1.24, 1.25]
    assert table.groups[table.optics_group[0]].name == "opticsGroup6"
    # opticsGroup1 is the fourth row of data_optics and the only one of Cs 2.6
    assert torch.equal(table.optics.cs == 2.6, table.optics_group == 3)
    assert (int(table.image[0]), int(table.image[1])) == (2, 278)
    assert table.stacks[table.stack[1]] == tmp_path / "Polish/job520/Micrographs/0027_shiny.mrcs"
    assert table.poses.shift[0].tolist() == [13.284554, -3.21701]
    # opticsGroup5 is the first row: tilt (0.657334, 0.884982) mrad at 200 kV, Cs 2.7 mm
    bent = table.optics.aberrations[(table.optics_group == 0).nonzero()[0]]
    tilt = -2 * math.pi * 2.7e4 * 0.02507949**2  # of Z(3, 1) with two parts of Z(1, 1), 3 in all
    assert bent.odd[0].tolist() == pytest.approx(
        [
            1.70554063513 + 2 / 3 * tilt * 0.884982,
            1.2131261042 + 2 / 3 * tilt * 0.657334,
            2.54522458134,
            tilt / 3 * 0.884982,
            tilt / 3 * 0.657334,
            3.56183614819,
        ],
        rel=1e-6,
    )
    assert bent.even.shape == (1, 9)
    assert float((bent.magnification - torch.eye(2)).abs().max()) < 0.05
    assert table.optics.treatment is None


def test_golden_values_of_relion_5(shared_data, tmp_path):
    table = read_star(with_empty_stacks(shared_data / "formats" / "relion5.star", tmp_path))
    assert (table.groups[0].pixel_size, table.groups[0].box) == (0.89, 448)
    assert (table.optics.voltage[0], table.optics.cs[0]) == (100, 1.6)
    assert table.optics.defocus_u[0] == 11949.06133
    assert [table.stacks[i].name[-6] for i in table.stack[:5]] == ["a", "b", "a", "a", "b"]
    assert table.image[:5].tolist() == [0, 1, 2, 3, 4]
    assert table.optics.aberrations.magnification[0].flatten().tolist() == [
        1.001833,
        -7.04404e-4,
        -8.23335e-4,
        1.000381,
    ]
    assert table.optics.aberrations.even[0, :2].tolist() == [45.4677386628, -1.53244542745]
    assert table.optics.aberrations.odd[0, [2, 5]].tolist() == [-1.79877045848, -1.36333410593]


def test_file_without_orientations_says_what_to_take(shared_data):
    with pytest.raises(InputError, match=r"no column rlnAngleRot; .*known orientations"):
        read_star(shared_data / "formats" / "empiar_10076_7.star")
