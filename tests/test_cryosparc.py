"""cryoSPARC's .cs files: a real one against another program's reading of it, every dialect, joins, damage."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from emsplat.errors import InputError
from emsplat.io.cryosparc import read_cs, write_cs
from emsplat.io.particles import read_particles
from emsplat.maths.geometry import random_rotations
from emsplat.particles.copies import settle_halves
from emsplat.types import Poses

POSE = [0.337507, 0.927292, 1.621109]  # docs/conventions.md: (rot, tilt, psi) = (30, 50, 70)°
MATRIX = [[-0.279454, 0.923721, -0.262003], [-0.694109, -0.005813, 0.719846], [0.663414, 0.383022, 0.642788]]


def table(count=6, **change):
    """The fields of a refinement's particles."""
    rng = np.random.default_rng(0)
    fields = {
        "uid": rng.permutation(count).astype(np.uint64) + 100,
        "blob/path": np.array([b">J1/extract/a.mrc"] * count),
        "blob/idx": np.arange(count, dtype=np.uint32),
        "blob/shape": np.full((count, 2), 64, np.uint32),
        "blob/psize_A": np.full(count, 2.0, np.float32),
        "blob/sign": np.full(count, -1.0, np.float32),
        "ctf/exp_group_id": np.zeros(count, np.uint32),
        "ctf/accel_kv": np.full(count, 300.0, np.float32),
        "ctf/cs_mm": np.full(count, 2.7, np.float32),
        "ctf/amp_contrast": np.full(count, 0.1, np.float32),
        "ctf/df1_A": np.linspace(1e4, 2e4, count).astype(np.float32),
        "ctf/df2_A": np.linspace(9e3, 2e4, count).astype(np.float32),
        "ctf/df_angle_rad": np.full(count, 0.5, np.float32),
        "ctf/phase_shift_rad": np.full(count, 0.1, np.float32),
        "ctf/scale": np.ones(count, np.float32),
        "ctf/bfactor": np.full(count, 5.0, np.float32),
        "alignments3D/split": (np.arange(count) % 2).astype(np.uint32),
        "alignments3D/shift": np.tile([1.5, -2.0], (count, 1)).astype(np.float32),
        "alignments3D/pose": np.tile(POSE, (count, 1)).astype(np.float32),
        "alignments3D/psize_A": np.full(count, 4.0, np.float32),
    }
    fields |= change
    return {name: values for name, values in fields.items() if values is not None}


def write(path, fields):
    kinds = [(name, values.dtype, values.shape[1:]) for name, values in fields.items()]
    array = np.zeros(len(next(iter(fields.values()))), kinds)
    for name, values in fields.items():
        array[name] = values
    with path.open("wb") as file:
        np.save(file, array)
    return path


@pytest.fixture
def folder(tmp_path):
    job = tmp_path / "CS-project" / "J2"
    (tmp_path / "CS-project" / "J1" / "extract").mkdir(parents=True)
    (tmp_path / "CS-project" / "J1" / "extract" / "a.mrc").touch()
    job.mkdir()
    return job


def read(folder, fields, **options):
    return read_cs(write(folder / "particles.cs", fields), **options)


def test_house_units(folder):
    found = read(folder, table())
    torch.testing.assert_close(found.poses.rotation[0], torch.tensor(MATRIX).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.poses.shift[0], torch.tensor([6.0, -8.0]).double())  # pixels of the alignment
    assert found.sign == -1
    assert found.half.tolist() == [1, 2, 1, 2, 1, 2]
    assert found.image.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.stacks == (folder.parent / "J1" / "extract" / "a.mrc",)  # from the project folder, without ">"
    assert float(found.optics.defocus_u[-1]) == 2e4
    assert float(found.optics.defocus_angle[0]) == 0.5
    assert float(found.optics.phase_shift[0]) == pytest.approx(0.1)
    assert float(found.optics.b_factor[0]) == 5
    assert found.groups[0].pixel_size == 2.0
    assert found.groups[0].box == 64
    assert not found.warnings


def test_zero_rotation(folder):
    found = read(folder, table(**{"alignments3D/pose": np.zeros((6, 3), np.float32)}))
    torch.testing.assert_close(found.poses.rotation, torch.eye(3).double().expand(6, 3, 3))


def test_real_file_as_another_program_reads_it(shared_data):
    """cryoDRGN's poses and CTF parameters of the same file, number by number."""
    from emsplat.io.pickles import load_arrays

    formats = shared_data / "formats"
    found = read_cs(formats / "cryosparc_P12_J24_001_particles.cs", need_stacks=False)
    rotation, shift = load_arrays(formats / "pose.cs.pkl")
    ctf = load_arrays(formats / "ctf2.pkl")
    assert len(found) == 2019
    assert found.half.bincount().tolist() == [0, 1010, 1009]
    assert found.sign == -1
    np.testing.assert_allclose(found.poses.rotation.numpy(), rotation, atol=1e-6)
    np.testing.assert_allclose(found.poses.shift.numpy(), shift * 180 * 2.95, atol=1e-5)
    optics = found.optics
    own = [optics.defocus_u, optics.defocus_v, torch.rad2deg(optics.defocus_angle), optics.voltage, optics.cs]
    own += [optics.amplitude_contrast, optics.phase_shift]
    for column, values in zip(ctf.T[2:], own, strict=True):
        np.testing.assert_allclose(values.numpy(), column, atol=1e-5)
    # The first particle by hand.
    assert float(optics.defocus_u[0]) == pytest.approx(45591.37, abs=0.01)
    assert found.poses.shift[0].tolist() == pytest.approx([11.334375 * 2.95, -1.828125 * 2.95])


@pytest.mark.parametrize("name", ["cryosparc_J2_particles_exported.cs", "empiar_10076_7.cs"])
def test_files_without_poses_say_so(shared_data, name):
    with pytest.raises(InputError, match="no 3D poses"):
        read_cs(shared_data / "formats" / name, need_stacks=False)


def test_passthrough_is_joined_on_uid(folder):
    whole = table()
    order = np.array([3, 0, 5, 1, 4, 2])
    kept = {name: whole[name] for name in whole if name == "uid" or name.startswith(("alignments3D", "blob"))}
    passed = {name: whole[name][order] for name in whole if name == "uid" or name.startswith("ctf")}
    write(folder / "J2_passthrough_particles.cs", passed)
    found = read(folder, kept)
    assert found.optics.defocus_u.tolist() == pytest.approx(whole["ctf/df1_A"].tolist())
    assert "J2_passthrough_particles.cs" in found.notes[0]
    assert len(found.notes) == 1
    assert not found.warnings
    (folder / "J2_passthrough_particles.cs").rename(folder / "other.cs")
    with pytest.raises(InputError, match="passthrough"):
        read(folder, kept)
    named = read(folder, kept, passthrough=[folder / "other.cs"])
    assert torch.equal(named.optics.defocus_u, found.optics.defocus_u)
    write(folder / "other.cs", {name: values[:5] for name, values in passed.items()})
    with pytest.raises(InputError, match="lacks some"):
        read(folder, kept, passthrough=[folder / "other.cs"])


def test_passthrough_files_that_differ_are_an_error_unless_named(folder):
    whole = table()
    kept = {name: whole[name] for name in whole if name == "uid" or name.startswith(("alignments3D", "blob"))}
    passed = {name: whole[name] for name in whole if name == "uid" or name.startswith("ctf")}
    one, two = (folder / f"J{number}_passthrough_particles.cs" for number in (2, 3))
    for path in (one, two):
        write(path, passed)
    assert "J2_passthrough" in read(folder, kept).notes[0]  # the same in both
    write(two, passed | {"ctf/df1_A": passed["ctf/df1_A"] + 500})
    with pytest.raises(InputError, match=r"ctf/df1_A may be that of .*J2_.* or of .*J3_.*, which differ"):
        read(folder, kept)
    assert read(folder, kept, passthrough=[two]).optics.defocus_u[0] == whole["ctf/df1_A"][0] + 500


def test_a_group_file_names_the_files(folder):
    """What cryoSPARC's exports have beside their .cs files."""
    whole = table()
    own = {name: values for name, values in whole.items() if name == "uid" or name.startswith(("alignments3D", "blob"))}
    write(folder / "J2_particles.cs", own)
    write(folder / "J2_kept.passthrough.cs", {name: v for name, v in whole.items() if name not in own or name == "uid"})
    (folder / "J2_particles.csg").write_text(
        "created: 2024-01-01\nresults:\n  blob:\n    metafile: '>J2_particles.cs'\n    num_items: 6\n"
        "  ctf:\n    metafile: '>J2_kept.passthrough.cs'\n  alignments3D:\n    metafile: >J2_particles.cs\n"
    )
    found = read_particles(folder / "J2_particles.csg")
    assert found.sources == (folder / "J2_particles.cs",)
    assert found.optics.defocus_u.tolist() == pytest.approx(whole["ctf/df1_A"].tolist())
    (folder / "empty.csg").write_text("created: 2024-01-01\n")
    with pytest.raises(InputError, match="names no metafile"):
        read_particles(folder / "empty.csg")


def test_a_written_file_has_what_passed_through(folder):
    whole = table() | {"location/micrograph_uid": np.arange(6, dtype=np.uint64)}
    own = {name: values for name, values in whole.items() if name == "uid" or name.startswith("blob/")}
    write(folder / "J2_passthrough_particles.cs", {n: v for n, v in whole.items() if n not in own or n == "uid"})
    found = read(folder, own)
    (folder / "out").mkdir()
    write_cs(folder / "out" / "p.cs", found.take(torch.tensor([4, 1])), torch.tensor([2, 1]))
    data = np.load(folder / "out" / "p.cs")
    assert set(data.dtype.names) == set(whole)
    for name in set(whole) - {"blob/path", "alignments3D/split"}:
        assert np.array_equal(data[name], whole[name][[4, 1]]), name
    assert data["alignments3D/split"].tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["alignments3D", "alignments3D_multi", None])
def test_new_poses_and_ctf_take_the_place_of_the_sources(folder, kind):
    """Of a refinement, of several classes, and of particles that had no poses; other fields stay."""
    fields = table() | {"alignments3D/alpha": np.full(6, 0.5, np.float32), "own/number": np.arange(6)}
    if kind != "alignments3D":
        fields = {name: values for name, values in fields.items() if not name.startswith("alignments3D")}
    if kind == "alignments3D_multi":
        fields |= {f"{kind}/{name}": np.zeros((6, 2, n), np.float32) for name, n in (("pose", 3), ("shift", 2))}
        fields |= {f"{kind}/class_posterior": np.tile(np.array([[0.2, 0.8]], np.float32), (6, 1))}
    before = read(folder, fields, need_poses=False)
    rotation = random_rotations(6, torch.Generator().manual_seed(1))
    poses = Poses(rotation, torch.arange(12.0, dtype=torch.float64).reshape(6, 2))
    optics = replace(before.optics, defocus_u=before.optics.defocus_u + 100, scale=torch.full((6,), 0.7).double())
    half = 1 + torch.arange(6) % 2
    write_cs(folder / "new.cs", replace(before, poses=poses, optics=optics, changed=("poses", "ctf")), half)
    after = read_cs(folder / "new.cs")
    torch.testing.assert_close(after.poses.rotation, rotation, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.poses.shift, poses.shift, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.optics.defocus_u, optics.defocus_u, rtol=1e-6, atol=0)
    torch.testing.assert_close(after.optics.scale, optics.scale, rtol=1e-6, atol=0)
    assert torch.equal(after.half, half)
    data = np.load(folder / "new.cs")
    assert data["own/number"].tolist() == list(range(6))
    if kind == "alignments3D_multi":
        assert after.particle_class.tolist() == [1] * 6
        assert not any(name.startswith(kind) for name in data.dtype.names)


def test_poses_of_the_job_go_before_those_that_pass_through(folder):
    """After a heterogeneous refinement of refined particles the file has classes, the passthrough file a consensus."""
    pose = np.zeros((6, 2, 3), np.float32)
    pose[:, 1] = POSE
    multi = {
        "alignments3D_multi/pose": pose,
        "alignments3D_multi/shift": np.zeros((6, 2, 2), np.float32),
        "alignments3D_multi/class_posterior": np.tile(np.array([[0.2, 0.8]], np.float32), (6, 1)),
        "alignments3D_multi/psize_A": np.full(6, 2.0, np.float32),
    }
    consensus = table(**{"alignments3D/pose": np.full((6, 3), 0.1, np.float32)})
    write(folder / "J2_passthrough_particles.cs", consensus)
    found = read(folder, without_alignment(**multi))
    torch.testing.assert_close(found.poses.rotation[0], torch.tensor(MATRIX).double(), atol=1e-5, rtol=0)
    assert found.particle_class.tolist() == [1] * 6
    assert found.half.tolist() == [1, 2] * 3  # which the job has not drawn anew


def without_alignment(**extra):
    return {name: v for name, v in table().items() if not name.startswith("alignments3D")} | extra


def test_class_of_highest_posterior(folder):
    best = np.array([0, 1, 1, 0, 1, 0])
    posterior = np.stack([1.0 - best, best], 1).astype(np.float32)
    pose = np.zeros((6, 2, 3), np.float32)
    pose[:, 1] = POSE
    shift = np.stack([np.full((6, 2), 1.0), np.full((6, 2), 3.0)], 1).astype(np.float32)
    alpha = np.tile(np.array([[0.5, 1.5]], np.float32), (6, 1))
    expected = [[2.0, 6.0][b] for b in best]
    multi = read(
        folder,
        without_alignment(
            **{
                "alignments3D_multi/pose": pose,
                "alignments3D_multi/shift": shift,
                "alignments3D_multi/class_posterior": posterior,
                "alignments3D_multi/psize_A": np.full(6, 2.0, np.float32),
                "alignments3D_multi/alpha": alpha,
            }
        ),
    )
    assert multi.optics.scale.tolist() == [[0.5, 1.5][b] for b in best]
    assert multi.poses.shift[:, 0].tolist() == expected
    old = {}
    for i in (0, 1):
        old |= {
            f"alignments_class_{i}/pose": pose[:, i],
            f"alignments_class_{i}/shift": shift[:, i],
            f"alignments_class_{i}/class_posterior": posterior[:, i],
            f"alignments_class_{i}/psize_A": np.full(6, 2.0, np.float32),
            f"alignments_class_{i}/alpha": alpha[:, i],
        }
    classes = read(folder, without_alignment(**old))
    assert torch.equal(classes.optics.scale, multi.optics.scale)
    assert torch.equal(classes.poses.shift, multi.poses.shift)
    assert torch.equal(classes.poses.rotation, multi.poses.rotation)


def of_two_classes(**more):
    """Columns of particles in two classes, the second the more likely; ``more`` of the same group."""
    columns = {
        "pose": np.zeros((6, 2, 3), np.float32),
        "shift": np.zeros((6, 2, 2), np.float32),
        "class_posterior": np.tile(np.array([[0.2, 0.8]], np.float32), (6, 1)),
        "psize_A": np.full((6, 1), 2.0, np.float32),
    }
    return without_alignment(**{f"alignments3D_multi/{name}": values for name, values in (columns | more).items()})


def test_scales_of_classes_are_written_with_new_poses(folder):
    """In the place of all factors, also of one that a passthrough file has of an older job."""
    alpha = np.tile(np.array([[np.nan, 1.5]], np.float32), (6, 1))  # nobody is of the first class
    older = {"uid": table()["uid"], "alignments3D/alpha": np.full(6, 0.7, np.float32)}
    write(folder / "p_passthrough_particles.cs", older)
    found = read(folder, of_two_classes(alpha=alpha))
    assert found.optics.scale.tolist() == [1.5] * 6
    for changed in (("poses",), ("ctf",), ("poses", "ctf")):
        write_cs(folder / "new.cs", replace(found, changed=changed), None)
        assert read_cs(folder / "new.cs").optics.scale.tolist() == pytest.approx([1.5] * 6), changed
    shared = read(folder, of_two_classes(alpha=np.full((6, 1), 0.5, np.float32)))
    assert shared.optics.scale.tolist() == [0.5] * 6


@pytest.mark.parametrize(("poses", "classes", "spacings"), [(0, 2, 2), (1, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_numbers_of_classes_that_disagree_are_refused(folder, poses, classes, spacings):
    prefix = "alignments3D_multi"
    columns = {
        f"{prefix}/pose": np.zeros((6, poses, 3), np.float32),
        f"{prefix}/shift": np.zeros((6, 2, 2), np.float32),
        f"{prefix}/class_posterior": np.ones((6, classes), np.float32),
        f"{prefix}/psize_A": np.ones((6, spacings), np.float32),
    }
    with pytest.raises(InputError, match=prefix):
        read(folder, without_alignment(**columns))


def test_symmetry_copies_stay_in_one_half(folder):
    source = np.array([7, 7, 8, 8, 9, 9], np.uint64)
    found = read(folder, table(**{"sym_expand/src_uid": source}))
    assert found.half.tolist() == [1, 1, 1, 1, 1, 1] or all(
        found.half[2 * i] == found.half[2 * i + 1] for i in range(3)
    )
    assert any("symmetry-expanded" in text for text in found.warnings)
    unsplit = read(folder, table(**{"sym_expand/src_uid": source, "alignments3D/split": None}))
    assert unsplit.half is None
    assert unsplit.origin.tolist() == source.tolist()
    drawn = settle_halves(unsplit, 0)
    assert drawn[::2].tolist() == drawn[1::2].tolist()
    assert set(drawn.tolist()) == {1, 2}


def test_optics_groups(folder):
    fields = table(
        **{
            "ctf/exp_group_id": np.array([4, 4, 9, 9, 9, 9], np.uint32),
            "blob/psize_A": np.array([2, 2, 2, 2, 3, 3], np.float32),
        }
    )
    found = read(folder, fields)
    assert [group.name for group in found.groups] == ["exp_group_4", "exp_group_9", "exp_group_9"]
    assert found.optics_group.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.groups[2].pixel_size == 3


def test_missing_alignment_pixel_size_is_said(folder):
    found = read(folder, table(**{"alignments3D/psize_A": None}))
    assert found.poses.shift[0].tolist() == [3.0, -4.0]
    assert "psize_A" in found.warnings[0]


def test_alignment_pixel_size_of_zero(folder):
    """Of all particles it is as good as missing, of some it is damage; images in focus are said too."""
    zero = np.zeros(6, np.float32)
    found = read(folder, table(**{"alignments3D/psize_A": zero}))
    assert found.poses.shift[0].tolist() == [3, -4]  # pixels of blob/psize_A
    assert "alignments3D/psize_A is 0 for all particles; shifts are taken in pixels of the images" in found.warnings[0]
    some = np.array([2, 2, 0, 2, 2, 2], np.float32)
    with pytest.raises(InputError, match=r"row 3: alignments3D/psize_A is 0, but shifts are in pixels of this size"):
        read(folder, table(**{"alignments3D/psize_A": some}))
    (warning,) = read(folder, table(**{"ctf/df1_A": zero, "ctf/df2_A": zero})).warnings
    assert "the defocus of 6 of 6 particles is 0" in warning


def test_missing_sign_is_said(folder):
    found = read(folder, table(**{"blob/sign": None}))
    assert found.sign == 1
    assert "no blob/sign; protein is taken to be bright, else use --invert" in found.warnings[0]


def test_never_split_means_no_half_sets(folder):
    assert read(folder, table(**{"alignments3D/split": np.zeros(6, np.uint32)})).half is None


def test_aberrations_whose_units_are_not_known_are_said(folder):
    found = read(folder, table(**{"ctf/trefoil_A": np.full((6, 2), 0.5, np.float32)}))
    assert "ctf/trefoil_A" in found.warnings[0]
    assert found.optics.aberrations is None


def test_beam_tilt_and_anisotropic_magnification(folder):
    """tilt_A is Cs sin(tilt); the matrix lacks its identity."""
    change = {
        "ctf/tilt_A": np.tile(np.array([2.7e7 * 2e-4, 0], np.float32), (6, 1)),
        "ctf/anisomag": np.tile(np.array([0.01, 0.002, 0.003, -0.01], np.float32), (6, 1)),
    }
    bent = read(folder, table(**change)).optics.aberrations
    coma = -2 * math.pi * 2.7e4 * 0.01968762**2 * 0.2 / 3
    assert bent.odd[0].tolist() == pytest.approx([0, 2 * coma, 0, 0, coma, 0], rel=1e-5)
    assert bent.magnification[0].flatten().tolist() == pytest.approx([1.01, 0.002, 0.003, 0.99], abs=1e-6)


def test_scale_of_each_particle(folder):
    alpha = np.array([1, 1.5, 0.5, 1, 1, 1], np.float32)
    assert read(folder, table(**{"alignments3D/alpha": alpha})).optics.scale.tolist() == alpha.tolist()
    alpha[0] = 0
    found = read(folder, table(**{"alignments3D/alpha": alpha}))
    assert found.optics.scale.tolist() == [1] * 6
    assert "alignments3D/alpha" in found.warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blob/sign": np.array([1, -1, 1, 1, 1, 1], np.float32)}, "blob/sign"),
        ({"blob/psize_A": np.zeros(6, np.float32)}, "psize_A"),
        ({"ctf/df1_A": np.array([1, 2, math.nan, 4, 5, 6], np.float32)}, "row 3: ctf/df1_A"),
        ({"alignments3D/pose": np.full((6, 3), math.inf, np.float32)}, "alignments3D/pose"),
        ({"alignments3D/pose": np.zeros((6, 4), np.float32)}, "shape"),
        ({"alignments3D/split": np.full(6, 7, np.uint32)}, "split"),
        ({"blob/path": np.array([b"\xff\xfe"] * 6)}, "UTF-8"),
        ({"blob/path": np.array([b"J9/none.mrc"] * 6)}, "--datadir"),
        ({"ctf/accel_kv": None}, "passthrough"),
        ({"alignments3D/pose": None}, "known orientations"),
        ({"blob/idx": np.full(6, 1e30)}, "whole numbers"),
        ({"blob/idx": np.full(6, 1.5)}, "whole numbers"),
        ({"alignments3D/class": np.full(6, 1e19)}, "alignments3D/class has values up to 1e.19; expected whole numbers"),
        ({"alignments3D/class": np.full((6, 2), 0.5)}, "whole numbers"),
        ({"blob/idx": np.full(6, np.finfo(np.longdouble).max)}, "row 1: blob/idx"),
        ({"blob/shape": np.zeros((6, 2), "u4")}, "without size"),
        ({"sym_expand/src_uid": np.zeros((6, 2), "u8")}, "one integer per particle"),
        ({"ctf/tilt_A": np.full((6, 2), b"x")}, "tilt_A has type"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_refused(folder, change, message):
    with pytest.raises(InputError, match=message):
        read(folder, table(**change))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"CSDAT\x00" * 20, b"not an array"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "particles.cs"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"\.cs file"):
        read_cs(path)


@pytest.mark.parametrize("kind", [[("uid", "S8")], [("uid", "u8", (2,))], [("uid", object)]])
def test_passthrough_files_are_joined_by_integers(folder, kind):
    other = folder / "J1_passthrough_particles.cs"
    header = str({"descr": np.dtype(kind).descr, "fortran_order": False, "shape": (6,)}).encode()
    other.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100))
    with pytest.raises(InputError, match=str(other)):
        read(folder, table())


@pytest.mark.parametrize(
    ("rows", "message"), [("(0,)", "no particles"), ("(100000000000,)", "cut off"), ("(-1,)", "cut off")]
)
def test_rows_that_are_not_there(tmp_path, rows, message):
    """Not even memory is taken for them."""
    path = write(tmp_path / "particles.cs", table())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(6,), }", f"{rows}, }}".encode(), 1))
    assert path.read_bytes() != content
    with pytest.raises(InputError, match=message) as caught:
        read_cs(path)
    assert not isinstance(caught.value.__cause__, MemoryError)


def test_header_longer_than_the_file(tmp_path):
    path = tmp_path / "particles.cs"
    path.write_bytes(b"\x93NUMPY\x02\x00" + (2**32 - 2).to_bytes(4, "little") + b"{'descr'")
    with pytest.raises(InputError, match="a header of 4294967294 bytes"):
        read_cs(path)


def test_arrays_that_are_no_tables_are_refused(tmp_path):
    for number, array in enumerate((np.zeros(5), np.zeros((2, 2), [("uid", "u8")]))):
        path = tmp_path / f"{number}.cs"
        with path.open("wb") as file:
            np.save(file, array)
        with pytest.raises(InputError, match="not a table"):
            read_cs(path)
    path = tmp_path / "object.cs"
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_cs(path)  # an object would be unpickled


@given(st.integers(0, 2000), st.integers(0, 255))
def test_damaged_bytes_give_our_error_or_a_table(tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("cs")
    (folder / "J1" / "extract").mkdir(parents=True)
    (folder / "J1" / "extract" / "a.mrc").touch()
    path = write(folder / "particles.cs", table())
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(InputError):  # anything else fails
        assert len(read_cs(path)) == 6


def test_pose_convention_is_the_inverse_of_the_axis_and_angle():
    expected = Rotation.from_rotvec(POSE).as_matrix().T
    np.testing.assert_allclose(expected, MATRIX, atol=1e-5)
