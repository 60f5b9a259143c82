"""PLY files of Gaussians: what was written is read again, and what cannot be right is refused by name."""

import warnings

import numpy as np
import pytest
import torch

from emsplat.errors import InputError, OutputError
from emsplat.io.ply import read_ply, write_ply
from emsplat.maths.geometry import quaternion_to_matrix
from emsplat.types import Grid

COUNT, GRID = 5, Grid(64, 3.54)
VECTORS = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"]
SPLATTING = [*VECTORS, "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


def mixture(**changes):
    rng = torch.Generator().manual_seed(0)
    return {
        "mean": 30 * torch.randn(COUNT, 3, generator=rng),
        "scale": 1 + 5 * torch.rand(COUNT, 3, generator=rng),
        "quaternion": 3 * torch.randn(COUNT, 4, generator=rng),
        "amplitude": 1 + torch.rand(COUNT, generator=rng),
    } | changes


def saved(folder, **changes):
    path = folder / "g.ply"
    write_ply(path, **mixture(**changes), grid=GRID, program="emsplat test")
    return path


def test_round_trip(tmp_path):
    gaussians, grid = read_ply(saved(tmp_path))
    given = mixture()
    assert grid == GRID
    assert torch.equal(gaussians.mean, given["mean"])
    assert torch.equal(gaussians.amplitude, given["amplitude"])
    rotation = quaternion_to_matrix(torch.nn.functional.normalize(given["quaternion"], dim=1))
    covariance = rotation @ torch.diag_embed(given["scale"] ** 2) @ rotation.mT
    torch.testing.assert_close(gaussians.covariance, covariance, rtol=1e-4, atol=1e-4)


def test_long_axis_lies_where_the_quaternion_turns_it(tmp_path):
    """90° about z takes the first axis to y."""
    half = 0.5**0.5
    path = saved(
        tmp_path,
        scale=torch.tensor([[3.0, 2.0, 1.0]]).expand(COUNT, 3),
        quaternion=torch.tensor([[half, 0, 0, half]]).expand(COUNT, 4),
    )
    expected = torch.diag(torch.tensor([4.0, 9.0, 1.0])).expand(COUNT, 3, 3)
    torch.testing.assert_close(read_ply(path)[0].covariance, expected, rtol=1e-5, atol=1e-5)


def test_viewers_of_splats_find_their_attributes(tmp_path):
    head = saved(tmp_path).read_bytes().partition(b"end_header\n")[0].decode("ascii").splitlines()
    assert head[:2] == ["ply", "format binary_little_endian 1.0"]
    assert f"element vertex {COUNT}" in head
    assert [line.split()[2] for line in head if line.startswith("property float ")] == [
        *SPLATTING,
        "amplitude",
    ]


def test_attributes_may_come_in_another_order_and_without_grid(tmp_path):
    path = saved(tmp_path)
    expected = read_ply(path)[0]
    head, _, body = path.read_bytes().partition(b"end_header\n")
    order = [*range(17, -1, -1)]
    lines = [line for line in head.splitlines() if not line.startswith((b"property", b"comment"))]
    names = [*SPLATTING, "amplitude"]
    lines += [b"property float " + names[i].encode() for i in order]
    values = torch.frombuffer(bytearray(body), dtype=torch.float32).reshape(COUNT, 18)[:, order]
    path.write_bytes(b"\n".join([*lines, b"end_header\n"]) + values.numpy().tobytes())
    gaussians, grid = read_ply(path)
    assert grid is None
    assert torch.equal(gaussians.mean, expected.mean)
    assert torch.equal(gaussians.covariance, expected.covariance)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ply\n", b"plx\n", "not a binary little-endian PLY"),
        (b"binary_little_endian", b"ascii", "not a binary little-endian PLY"),
        (b"end_header\n", b"", "not a binary little-endian PLY"),
        (b"element vertex 5", b"element vertex 6", "cut short, 6 Gaussians need 432 bytes and 360 are there"),
        (b"element vertex 5", b"element vertex " + b"5" * 5000, "names no vertices"),
        (b"element vertex 5", b"element face 5", "names no vertices"),
        (b"element vertex 5", b"element vertex 0", "names no vertices"),
        (b"property float amplitude", b"property float other", "no property amplitude; expected x, y, z"),
        (b"property float y\n", b"property float x\n", "has property x twice"),
        (b"property float y\n", b"property list y\n", "property 'list y' is not understood"),
        (b"pixel_size 3.54", b"pixel_size x.54", "'comment box 64 pixel_size x.54' is not understood"),
        (b"pixel_size 3.54", b"pixel_size -3.5", "is not understood"),
        (b"pixel_size 3.54", b"pixel_size nan", "is not understood"),
        (b"box 64", b"box 0", "is not understood; expected 'comment box 64"),
        (b"box 64", b"box " + b"6" * 5000, "is not understood"),
    ],
)
def test_bad_headers_are_refused_by_name(tmp_path, old, new, message):
    path = saved(tmp_path)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        read_ply(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": torch.full((COUNT, 3), torch.nan)}, "x, y, z hold values that are not finite"),
        ({"amplitude": torch.full((COUNT,), torch.inf)}, "amplitude hold values that are not finite"),
        ({"scale": torch.zeros(COUNT, 3)}, "scale_0, scale_1, scale_2 hold values that are not finite"),
        ({"scale": torch.full((COUNT, 3), 1e30)}, "scale_. hold numbers that are too large"),
    ],
)
def test_numbers_that_make_no_gaussian_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("emsplat.io.ply.require_finite", lambda *_: None)  # which would not write them
    with pytest.raises(InputError, match=message):
        read_ply(saved(tmp_path, **changes))


@pytest.mark.parametrize("value", [1e300, np.nan])
def test_doubles_beyond_float32_are_refused_without_a_warning(tmp_path, value):
    path = saved(tmp_path)
    head, end, body = path.read_bytes().partition(b"end_header\n")
    rows = np.frombuffer(body, "<f4").reshape(COUNT, -1)
    wide = np.zeros(COUNT, np.dtype([("rest", "<f4", rows.shape[1] - 1), ("amplitude", "<f8")]))
    wide["rest"], wide["amplitude"] = rows[:, :-1], value
    path.write_bytes(head.replace(b"float amplitude", b"double amplitude") + end + wide.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="amplitude hold values that are not finite"):
            read_ply(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file; expected a PLY file"):
        read_ply(tmp_path / "none.ply")
    (tmp_path / "nowhere").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        saved(tmp_path / "nowhere")
