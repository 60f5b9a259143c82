"""cryoDRGN's pickles: read without running them; the same particles in every format give the same map."""

import contextlib
import os
import pickle
import struct

import mrcfile
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from emsplat.cli import main
from emsplat.config import BackprojectConfig, configure
from emsplat.errors import InputError
from emsplat.io.cryodrgn import read_cryodrgn
from emsplat.io.mrc import read_map
from emsplat.io.particles import read_particles
from emsplat.io.pickles import load_arrays
from emsplat.io.relion.read import read_star
from emsplat.programs.reconstruct import backproject
from emsplat.run.log import Log
from test_cryosparc import write as write_cs


@pytest.fixture(scope="module")
def star(simulated):
    return simulated(particles=200)


def pickles(table, folder, protocol=4, box=32, pixel_size=4.0):
    count, optics = len(table), table.optics
    shift = table.poses.shift.numpy() / (box * pixel_size)
    ctf = [torch.full((count,), float(box)), torch.full((count,), pixel_size), optics.defocus_u, optics.defocus_v]
    ctf += [torch.rad2deg(optics.defocus_angle), optics.voltage, optics.cs, optics.amplitude_contrast]
    ctf += [torch.rad2deg(optics.phase_shift)]
    poses, parameters = folder / "poses.pkl", folder / "ctf.pkl"
    rotation = table.poses.rotation.numpy().astype(np.float32)
    poses.write_bytes(pickle.dumps((rotation, shift.astype(np.float32)), protocol))
    parameters.write_bytes(pickle.dumps(torch.stack(ctf, 1).numpy().astype(np.float32), protocol))
    return poses, parameters


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_arrays_that_lie_otherwise_in_memory(tmp_path, protocol, axes):
    """As a column, or in any order of the axes, which protocol 5 keeps."""
    array = np.arange(24.0).reshape(2, 3, 4).transpose(axes)
    (tmp_path / "array.pkl").write_bytes(pickle.dumps(array, protocol))
    np.testing.assert_array_equal(load_arrays(tmp_path / "array.pkl"), array)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_house_units(star, tmp_path, protocol):
    expected = read_star(star)
    found = read_cryodrgn(star.parent / "particles.mrcs", *pickles(expected, tmp_path, protocol))
    torch.testing.assert_close(found.poses.rotation, expected.poses.rotation, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.poses.shift, expected.poses.shift, atol=1e-4, rtol=0)
    for name in ("defocus_u", "defocus_v", "defocus_angle", "voltage", "cs", "amplitude_contrast", "phase_shift"):
        torch.testing.assert_close(getattr(found.optics, name), getattr(expected.optics, name), rtol=1e-6, atol=1e-5)
    assert found.groups[0].pixel_size == pytest.approx(4.0)
    assert found.image.tolist() == list(range(200))
    assert found.half is None


def test_pixel_size_follows_the_images(star, tmp_path):
    found = read_cryodrgn(star.parent / "particles.mrcs", *pickles(read_star(star), tmp_path, box=64, pixel_size=2.0))
    assert found.groups[0].pixel_size == pytest.approx(4.0)
    assert "box of 64" in found.warnings[0]


def test_list_of_stacks(star, tmp_path):
    with mrcfile.open(star.parent / "particles.mrcs") as file:
        images = file.data.copy()
    for name, part in (("a.mrcs", images[:50]), ("b.mrcs", images[50:])):
        with mrcfile.new(tmp_path / name) as file:
            file.set_data(part)
            file.set_image_stack()
    (tmp_path / "list.txt").write_text("a.mrcs\nb.mrcs\n")
    found = read_cryodrgn(tmp_path / "list.txt", *pickles(read_star(star), tmp_path))
    assert found.stack.tolist() == [0] * 50 + [1] * 150
    assert found.image[[0, 49, 50, 199]].tolist() == [0, 49, 0, 149]


class _Command:
    def __init__(self, command):
        self._command = command

    def __reduce__(self):
        return os.system, (self._command,)


def test_malicious_pickle_is_refused_and_nothing_runs(star, tmp_path, capsys):
    mark = tmp_path / "ran"
    poses, ctf = pickles(read_star(star), tmp_path)
    for protocol in range(6):
        poses.write_bytes(pickle.dumps(_Command(f"touch {mark}"), protocol))
        with pytest.raises(InputError, match="refused"):
            load_arrays(poses)
    words = ["backproject", str(star.parent / "particles.mrcs"), "-o", str(tmp_path / "run")]
    assert main([*words, "--poses", str(poses), "--ctf", str(ctf)]) == 2
    assert "nothing of it has run" in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core\nmultiarray\n.",
        b"cnumpy.core.evil.multiarray\n_reconstruct\n.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I1000000000000\ntS'b'\ntR.",
        # Memory, and a stack, without end: lengths of text and bytes, arrays, tuples in tuples.
        b"\x8e\xff\xff\xff\xff\x1f\0\0\0.",
        b"\x96\xff\xff\xff\xff\x1f\0\0\0.",
        b"cnumpy\nndarray\n(I40000000000\ntR.",
        b"}N" + b"\x85" * 1_000_000 + b"Ns.",  # its hash overflows the C stack
        # numpy believes what a dtype says about itself: an object at a place that holds a number.
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt}S'a'\n(cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI0\ntsI8\nI1\nI0\ntb"
        b"I00\nS'12345678'\ntb.",
        # Functions have attributes: what the reader itself is made of is not to be changed.
        b"cnumpy.core.multiarray\n_reconstruct\nN(lp0\n\x86b.",
        b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR.",
        b"((lt.",
        b"0.",
        b".",
    ],
)
def test_other_names_are_refused(tmp_path, code):
    path = tmp_path / "x.pkl"
    path.write_bytes(code)
    with pytest.raises(InputError, match=r"x\.pkl"):
        load_arrays(path)


def test_a_far_place_in_the_memory_costs_nothing(tmp_path):
    """Python's own unpickler would take tens of GB."""
    path = tmp_path / "x.pkl"
    path.write_bytes(b"Nr\xff\xff\xff\xff.")
    assert load_arrays(path) is None


@given(st.integers(0, 600), st.integers(0, 255), st.booleans())
def test_damaged_pickles_give_our_error_or_arrays(tmp_path_factory, place, value, cut):
    path = tmp_path_factory.mktemp("pkl") / "poses.pkl"
    data = bytearray(pickle.dumps((np.eye(3)[None].repeat(3, 0), np.zeros((3, 2)))))
    data[place % len(data)] = value
    path.write_bytes(data[: place % len(data)] if cut else data)
    with contextlib.suppress(InputError):  # anything else fails
        load_arrays(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((5, 3)), "shape"),
        (np.array(["a"] * 5), "shape"),
        (2 * np.eye(3)[None].repeat(5, 0), "no rotations"),
        (np.eye(3)[None].repeat(5, 0) * [1, 1, -1], "no rotations"),
        (np.full((5, 3, 3), np.nan), "finite"),
        ((np.eye(3)[None].repeat(5, 0), np.full((5, 2), 3.0)), "fractions of the box"),
        ((np.eye(3)[None].repeat(5, 0), np.zeros((4, 2))), "same number"),
        (np.eye(3)[None].repeat(5, 0), "200 images, but 5 poses"),
        ({}, "EMPTY_DICT"),
    ],
)
def test_what_is_refused(star, tmp_path, content, message):
    poses, ctf = pickles(read_star(star), tmp_path)
    poses.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        read_cryodrgn(star.parent / "particles.mrcs", poses, ctf)


def test_options_go_with_their_files(star, tmp_path):
    poses, ctf = pickles(read_star(star), tmp_path)
    with pytest.raises(InputError, match="--poses"):
        read_particles(star.parent / "particles.mrcs")
    with pytest.raises(InputError, match="leave them out"):
        read_particles(star, poses=poses, ctf=ctf)
    with pytest.raises(InputError, match="--passthrough"):
        read_particles(star, passthrough=[poses])


def as_cs(table, folder, binning=2.0):
    """The same particles as cryoSPARC would write them, aligned on images ``binning`` times as coarse."""
    count, optics = len(table), table.optics
    names = np.array([os.fsencode(str(stack)) for stack in table.stacks])[table.stack.numpy()]
    pose = Rotation.from_matrix(table.poses.rotation.mT.numpy()).as_rotvec()
    fields = {
        "uid": np.arange(count, dtype=np.uint64),
        "blob/path": names,
        "blob/idx": table.image.numpy().astype(np.uint32),
        "blob/shape": np.full((count, 2), 32, np.uint32),
        "blob/psize_A": np.full(count, 4.0, np.float32),
        "blob/sign": np.ones(count, np.float32),
        "alignments3D/pose": pose.astype(np.float32),
        "alignments3D/shift": (table.poses.shift.numpy() / (4.0 * binning)).astype(np.float32),
        "alignments3D/psize_A": np.full(count, 4.0 * binning, np.float32),
        "alignments3D/split": (table.half.numpy() - 1).astype(np.uint32),
    }
    for name, values in (
        ("accel_kv", optics.voltage),
        ("cs_mm", optics.cs),
        ("amp_contrast", optics.amplitude_contrast),
        ("df1_A", optics.defocus_u),
        ("df2_A", optics.defocus_v),
        ("df_angle_rad", optics.defocus_angle),
        ("phase_shift_rad", optics.phase_shift),
    ):
        fields[f"ctf/{name}"] = values.numpy().astype(np.float32)
    return write_cs(folder / "particles.cs", fields)


def test_every_format_gives_the_same_map(star, tmp_path):
    table = read_star(star)
    poses, ctf = pickles(table, tmp_path)
    stack = star.parent / "particles.mrcs"
    inputs = {
        "star": (star, BackprojectConfig()),
        "cs": (as_cs(table, tmp_path), BackprojectConfig()),
        "pkl": (stack, configure(BackprojectConfig, poses=poses, ctf=ctf)),
    }
    maps = {}
    for name, (path, config) in inputs.items():
        with (tmp_path / "log").open("a") as file:
            summary = backproject(config, path, tmp_path / name, Log(file))
        assert summary["input"]["particles"] == 200
        maps[name] = [read_map(tmp_path / name / f"run_{part}.mrc")[0] for part in ("class001", "half1_class001_unfil")]
        # What was used, as RELION reads it, is read again as the same.
        again = read_star(tmp_path / name / "run_data.star", star.parent)
        torch.testing.assert_close(again.poses.rotation, table.poses.rotation, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.poses.shift, table.poses.shift, atol=1e-3, rtol=0)
        torch.testing.assert_close(again.optics.defocus_u, table.optics.defocus_u, atol=1e-2, rtol=0)
        assert sorted(again.half.bincount().tolist()) == [0, 100, 100]

    def alike(a, b):
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert alike(maps["star"][0], maps["cs"][0]) > 0.9999
    assert alike(maps["star"][1], maps["cs"][1]) > 0.9999  # the half-sets of the file
    # cryoDRGN has no half-sets: others are drawn, and with them the filter of the full map.
    assert alike(maps["star"][0], maps["pkl"][0]) > 0.98
    raw = [read_map(tmp_path / name / "run_half1_class001_unfil.mrc")[0] for name in ("star", "pkl")]
    assert alike(*raw) < 0.98


def test_real_pickles(shared_data):
    """Another program's reading of a STAR file, by its own path: Euler angles by scipy, origins in boxes."""
    from gemmi import cif

    rotation, shift = load_arrays(shared_data / "formats" / "pose.star.pkl")
    block = cif.read(str(shared_data / "formats" / "FinalRefinement-OriginalParticles-PfCRT.star")).sole_block()
    names = ("AngleRot", "AngleTilt", "AnglePsi", "OriginX", "OriginY")
    columns = np.array([[float(value) for value in block.find_loop(f"_rln{name}")] for name in names])
    expected = Rotation.from_euler("ZYZ", columns[:3].T, degrees=True).as_matrix().transpose(0, 2, 1)
    np.testing.assert_allclose(rotation, expected, atol=1e-6)
    np.testing.assert_allclose(shift, columns[3:].T / 300, atol=1e-6)
    assert load_arrays(shared_data / "formats" / "ctf1.pkl").shape == (5, 9)


def test_long_counts_do_not_ask_for_memory(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + b"\x8e" + struct.pack("<Q", 2**40) + b"abc.")
    with pytest.raises(InputError, match="cannot be read"):
        load_arrays(path)


def test_rotations_alone_mean_centred_particles_with_a_word(star, tmp_path):
    poses, ctf = pickles(read_star(star), tmp_path)
    poses.write_bytes(pickle.dumps(load_arrays(poses)[0]))
    found = read_cryodrgn(star.parent / "particles.mrcs", poses, ctf)
    assert not found.poses.shift.any()
    assert found.warnings == (f"{poses}: holds rotations and no shifts; the particles are taken to be centred",)
