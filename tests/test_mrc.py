"""MRC files: every mode and byte order, headers that other programs accept, damage refused."""

import bz2
import gzip
import itertools
import lzma
import os

import mrcfile
import numpy as np
import pytest
import torch
from mrcfile.dtypes import HEADER_DTYPE

from emsplat.errors import InputError, OutputError
from emsplat.io.mrc import misplaced, read_map, read_stored_map, write_map, writing_stack
from emsplat.io.mrc_arrays import StackFile
from emsplat.types import Grid


def read_all(stack):
    out = np.empty((stack.count, stack.box, stack.box), np.float32)
    stack.read_into(out, range(stack.count), range(stack.count))
    return out


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_stacks_of_every_mode_and_byte_order(tmp_path, mode, dtype, order):
    values = np.arange(3 * 8 * 8).reshape(3, 8, 8) % 100
    path = tmp_path / "stack.mrcs"
    with mrcfile.new(path) as file:
        file.set_data(values.astype(dtype))
        file.set_image_stack()
        file.voxel_size = 1.5
    if order == ">":
        swap(path, np.dtype(dtype).itemsize)
    stack = StackFile(path)
    assert (stack.count, stack.box) == (3, 8)
    assert stack.pixel_size == pytest.approx(1.5)
    np.testing.assert_array_equal(read_all(stack), values)


def swap(path, width):
    """The same file in the other byte order."""
    content = bytearray(path.read_bytes())
    header = np.frombuffer(bytes(content[:1024]), mrcfile.dtypes.HEADER_DTYPE)
    swapped = header.astype(mrcfile.dtypes.HEADER_DTYPE.newbyteorder(">"))
    swapped["machst"] = [0x11, 0x11, 0, 0]
    data = np.frombuffer(bytes(content[1024:]), f"u{width}").byteswap()
    path.write_bytes(swapped.tobytes() + data.tobytes())


def test_map_round_trip_and_header(tmp_path):
    volume = torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "map.mrc"
    write_map(path, volume, 2.5)
    assert mrcfile.validate(path)
    with mrcfile.open(path) as file:
        header = file.header
        assert (int(header.mode), int(header.ispg), int(header.mz)) == (2, 1, 12)
        assert float(header.cella.x) == pytest.approx(30.0)
        assert header.origin.tolist() == (0, 0, 0)
        assert (int(header.nxstart), int(header.nystart), int(header.nzstart)) == (0, 0, 0)
        assert (int(header.mapc), int(header.mapr), int(header.maps)) == (1, 2, 3)
        assert int(header.nversion) >= 20140
        assert bytes(header.label[0]).startswith(b"emsplat")
    again, grid = read_map(path)
    assert torch.equal(again, volume)
    assert grid == Grid(12, 2.5)


@pytest.mark.parametrize(("dtype", "mode"), [("float32", 2), ("float16", 12)])
def test_written_stack_is_valid(tmp_path, dtype, mode):
    images = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "stack.mrcs"
    with writing_stack(path, 5, Grid(8, 1.25), dtype) as write:
        write(images[:2])
        write(images[2:])
    assert mrcfile.validate(path)
    with mrcfile.open(path) as file:
        assert (int(file.header.mode), int(file.header.ispg), int(file.header.mz)) == (mode, 0, 1)
        assert float(file.header.dmean) == pytest.approx(float(images.mean()), abs=1e-3)
    assert np.abs(read_all(StackFile(path)) - images.numpy()).max() < (1e-7 if mode == 2 else 2e-3)


def test_a_stack_that_is_not_finished_does_not_appear(tmp_path):
    path = tmp_path / "stack.mrcs"
    path.write_bytes(b"before")

    def interrupted():
        with writing_stack(path, 5, Grid(8, 1.0)) as write:
            write(torch.zeros(2, 8, 8))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["stack.mrcs"]


def test_a_map_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "nowhere").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_map(tmp_path / "nowhere" / "map.mrc", torch.zeros(4, 4, 4), 1.0)


@pytest.mark.parametrize("said", [0.0, 1.0])
def test_pixel_size_that_nobody_set_is_none(tmp_path, said):
    with mrcfile.new(tmp_path / "s.mrcs") as file:
        file.set_data(np.zeros((2, 8, 8), np.float32))
        file.set_image_stack()
        file.voxel_size = said
    assert StackFile(tmp_path / "s.mrcs").pixel_size is None


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 9, 9), "even size"), ((2, 8, 10), "square"), ((2, 7, 7), "even size")]
)
def test_images_that_are_odd_or_not_square(tmp_path, shape, message):
    with mrcfile.new(tmp_path / "s.mrcs") as file:
        file.set_data(np.zeros(shape, np.float32))
        file.set_image_stack()
    with pytest.raises(InputError, match=message):
        StackFile(tmp_path / "s.mrcs")


def damaged(tmp_path, change):
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(8, 8, 8), 2.0)
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content)))
    return path


def patch(offset, value):
    def change(content):
        content[offset : offset + 4] = int(value).to_bytes(4, "little", signed=True)
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-100], "truncated, the header says 8 sections .* holds 7"),
        (lambda c: c[:500], "too few for an MRC header"),
        (lambda c: b"", "too few"),
        (patch(12, 4), "mode 4 holds complex numbers"),
        (patch(12, 7), "mode 7 is not supported"),
        (patch(12, 0), "the header accounts for"),
        (patch(12, 12), "the header accounts for"),
        (patch(8, 7), "the header accounts for"),
        (patch(8, -1), "MRC"),
        (patch(92, 2_000_000_000), "more header than the file is long"),
        (patch(92, 64 << 24), "more header than the file is long"),  # 64 in the other byte order
        (lambda c: c + bytes(4000), "the header accounts for"),
    ],
)
def test_damage_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_map(damaged(tmp_path, change))


def test_maps_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_map(tmp_path / "none.mrc")
    write_map(tmp_path / "flat.mrc", torch.zeros(4, 8, 8), 1.0)
    with pytest.raises(InputError, match="cubic"):
        read_map(tmp_path / "flat.mrc")
    write_map(tmp_path / "nan.mrc", torch.zeros(4, 4, 4), 1.0)
    content = (tmp_path / "nan.mrc").read_bytes()
    (tmp_path / "nan.mrc").write_bytes(content[:-4] + np.array(np.nan, "<f4").tobytes())
    with pytest.raises(InputError, match="not finite"):
        read_map(tmp_path / "nan.mrc")
    write_map(tmp_path / "zero.mrc", torch.zeros(4, 4, 4), 0.0)
    with pytest.raises(InputError, match="pixel sizes"):
        read_map(tmp_path / "zero.mrc")


def test_experimental_stack_without_identifier(shared_data):
    stack = StackFile(shared_data / "formats" / "relion31.mrcs")
    assert (stack.count, stack.box, stack.pixel_size) == (5, 256, None)
    assert read_all(stack).std() == pytest.approx(1.013, abs=1e-3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_maps_of_every_mode_and_byte_order(tmp_path, mode, dtype, order):
    values = np.arange(6**3).reshape(6, 6, 6) % 100 - (0 if dtype == "u2" else 50)
    path = tmp_path / "map.mrc"
    with mrcfile.new(path) as file:
        file.set_data(values.astype(dtype))
        file.voxel_size = 1.5
        assert int(file.header.mode) == mode
    if order == ">":
        swap(path, np.dtype(dtype).itemsize)
    volume, grid = read_map(path)
    assert volume.dtype == torch.float32
    np.testing.assert_array_equal(volume, values)
    assert (grid.size, grid.pixel_size) == (6, pytest.approx(1.5))


def test_header_of_a_written_stack(tmp_path):
    with writing_stack(tmp_path / "s.mrcs", 3, Grid(8, 1.25)) as write:
        write(torch.arange(192.0).reshape(3, 8, 8))
    with mrcfile.open(tmp_path / "s.mrcs") as file:
        header = file.header
        assert header.origin.tolist() == (0, 0, 0)
        assert (int(header.nxstart), int(header.nystart), int(header.nzstart)) == (0, 0, 0)
        assert (int(header.mapc), int(header.mapr), int(header.maps)) == (1, 2, 3)
        assert header.cella.tolist() == (10.0, 10.0, 1.25)
        assert header.cellb.tolist() == (90, 90, 90)
        assert (float(header.dmin), float(header.dmax), float(header.dmean)) == (0, 191, 95.5)
        assert float(header.rms) == pytest.approx(np.arange(192).std())
        assert bytes(header.label[0]).startswith(b"emsplat")


def test_same_content_gives_the_same_bytes(tmp_path):
    """No clock in the header, so that runs can be compared."""
    for name in ("a.mrc", "b.mrc"):
        write_map(tmp_path / name, torch.ones(4, 4, 4), 1.5)
    assert (tmp_path / "a.mrc").read_bytes() == (tmp_path / "b.mrc").read_bytes()


def test_a_full_disk_keeps_the_old_map(tmp_path, monkeypatch):
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(4, 4, 4), 1.5)
    before = path.read_bytes()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mrcfile.mrcfile.MrcFile, "set_data", full)
    with pytest.raises(OutputError, match=r"map\.mrc: cannot be written \(No space left on device\)"):
        write_map(path, torch.zeros(4, 4, 4), 1.5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["map.mrc"]


def test_images_are_read_only_when_asked_for(tmp_path):
    """A header is enough to open a stack; an image shows what the disk holds at the time of reading."""
    path = tmp_path / "s.mrcs"
    with writing_stack(path, 4, Grid(8, 2.0)) as write:
        write(torch.zeros(4, 8, 8))
    stack = StackFile(path)
    with path.open("r+b") as file:
        file.seek(1024 + 2 * 256)
        file.write(np.full(64, 7, "<f4").tobytes())
    out = np.full((3, 8, 8), -1, np.float32)
    stack.read_into(out, [2, 0], [0, 2])
    assert [set(image.ravel().tolist()) for image in out] == [{7.0}, {-1.0}, {0.0}]
    stack.close()
    stack.read_into(out, [3], [1])  # opens again
    assert set(out[1].ravel().tolist()) == {0.0}


def test_a_stack_that_is_cut_while_it_is_read_is_named(tmp_path):
    with writing_stack(tmp_path / "s.mrcs", 4, Grid(8, 2.0)) as write:
        write(torch.zeros(4, 8, 8))
    stack = StackFile(tmp_path / "s.mrcs")
    os.truncate(tmp_path / "s.mrcs", 1024 + 3 * 256 + 7)
    out = np.ones((4, 8, 8), np.float32)
    stack.read_into(out, [0, 2], [0, 2])
    assert not out[[0, 2]].any()
    with pytest.raises(InputError, match=r"s\.mrcs: ends after [\d,]+ bytes, within an image .*--resume"):
        stack.read_into(out, [3], [3])


@pytest.mark.parametrize("read", [read_map, StackFile])
def test_what_is_no_mrc_file_is_refused(tmp_path, read):
    (tmp_path / "t.mrc").write_text("some text\n" * 500)
    for path, message in (
        (tmp_path / "none.mrc", "no such file; expected"),
        (tmp_path / "t.mrc", "MRC|header"),
        (tmp_path, "cannot be read .*; expected"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_truncated_stack_says_how_many_images_are_there(tmp_path):
    path = tmp_path / "s.mrcs"
    with writing_stack(path, 4, Grid(8, 2.0)) as write:
        write(torch.zeros(4, 8, 8))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match="the header says 4 sections of 8 x 8 and the file holds 2; copy or extract"):
        StackFile(path)


def in_words(path, **fields):
    """Sets fields of a header in the byte order of the file, also IMOD's, which lie in mrcfile's extra2."""
    content = bytearray(path.read_bytes())
    order = "big" if content[212:214] == b"\x11\x11" else "little"
    header = np.frombuffer(bytes(content[:1024]), HEADER_DTYPE.newbyteorder({"big": ">", "little": "<"}[order])).copy()
    for name, value in fields.items():
        if not name.startswith("imod"):
            header[name] = value
    content[:1024] = header.tobytes()
    for name, at in (("imod_stamp", 152), ("imod_flags", 156)):
        if name in fields:
            content[at : at + 4] = fields[name].to_bytes(4, order)
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("axes", list(itertools.permutations((1, 2, 3))))
def test_axes_of_the_header_are_honoured(tmp_path, axes, order):
    """The density at (x, y, z) is the same in whatever order the file counts."""
    x, y, z = np.meshgrid(range(6), range(6), range(6), indexing="ij")
    volume = (x + 10 * y + 100 * z).astype("f4")  # [x, y, z]
    columns, rows, sections = axes
    stored = volume.transpose([sections - 1, rows - 1, columns - 1])
    path = tmp_path / "map.mrc"
    with mrcfile.new(path) as file:
        file.set_data(np.ascontiguousarray(stored))
        file.voxel_size = 1.5
    if order == ">":
        swap(path, 4)
    in_words(path, mapc=columns, mapr=rows, maps=sections, nxstart=7, nystart=8, nzstart=9)
    found = read_stored_map(path)
    np.testing.assert_array_equal(found.volume.numpy(), volume.transpose(2, 1, 0))
    assert not found.warnings
    # N.START count along the axes of the file.
    assert found.origin == pytest.approx(tuple(1.5 * {columns: 7, rows: 8, sections: 9}[axis] for axis in (1, 2, 3)))


@pytest.mark.parametrize("axes", [(1, 1, 3), (0, 2, 3), (1, 2, 4), (-1, 2, 3), (3, 3, 3)])
@pytest.mark.parametrize("read", [read_map, StackFile])
def test_axes_that_are_none_are_refused(tmp_path, axes, read):
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(4, 4, 4), 1.5)
    in_words(path, mapc=axes[0], mapr=axes[1], maps=axes[2])
    with pytest.raises(
        InputError, match=rf"axes {axes[0]}, {axes[1]}, {axes[2]} \(MAPC, MAPR, MAPS\); expected 1, 2 and 3"
    ):
        read(path)


def test_axes_that_nobody_set_are_assumed_with_a_word(tmp_path):
    path = tmp_path / "map.mrc"
    volume = torch.arange(64.0).reshape(4, 4, 4)
    write_map(path, volume, 1.5)
    in_words(path, mapc=0, mapr=0, maps=0)
    found = read_stored_map(path)
    assert torch.equal(found.volume, volume)
    assert len(found.warnings) == 1
    assert "map.mrc: the header names no axes" in found.warnings[0]
    assert "x, y, z were assumed" in StackFile(path).warnings[0]


def test_images_with_x_and_y_exchanged(tmp_path):
    path = tmp_path / "s.mrcs"
    images = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    with writing_stack(path, 3, Grid(8, 2.0)) as write:
        write(images.transpose(1, 2))
    in_words(path, mapc=2, mapr=1)
    np.testing.assert_array_equal(read_all(StackFile(path)), images)
    in_words(path, mapc=2, mapr=3, maps=1)
    with pytest.raises(InputError, match=r"follow each other along x \(MAPS 1\); expected MAPS 3"):
        StackFile(path)


BYTES = np.random.default_rng(0).integers(100, 157, (4, 4, 4)).astype("u1")  # on both sides of 128
UNSIGNED = BYTES.astype("f4")
SIGNED = BYTES.view("i1").astype("f4")


def write_bytes(folder, order, header, **fields):
    path = folder / "b.mrc"
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(BYTES.view("i1"))
        file.voxel_size = 2.0
    if order == ">":
        swap(path, 1)
    low, high, mean = header
    return in_words(path, dmin=low, dmax=high, dmean=mean, nversion=0, **fields)


NOT_SET = (0, -1, -2)
OF_UNSIGNED = (float(UNSIGNED.min()), float(UNSIGNED.max()), float(UNSIGNED.mean()))
OF_SIGNED = (float(SIGNED.min()), float(SIGNED.max()), float(SIGNED.mean()))
STAMP = {"imod_stamp": 1146047817}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("header", "fields", "expected", "said"),
    [
        (OF_UNSIGNED, {**STAMP, "imod_flags": 1}, SIGNED, None),  # IMOD's stamp goes before everything
        (OF_SIGNED, {**STAMP, "imod_flags": 0}, UNSIGNED, None),
        (NOT_SET, {**STAMP, "imod_flags": 5}, SIGNED, None),
        (OF_UNSIGNED, {}, UNSIGNED, "read as 0 to 255, since the header says that values go from 100 to 156"),
        (OF_SIGNED, {}, SIGNED, None),  # as the standard says, and the statistics agree
        ((0, 100, OF_UNSIGNED[2] - 30), {"nversion": 20141}, SIGNED, None),  # of neither reading: the version decides
        ((0, 300, OF_UNSIGNED[2]), {}, UNSIGNED, "mean of"),
        (NOT_SET, {}, SIGNED, "nothing in the header says whether bytes"),
        ((0, 0, 0), {}, SIGNED, "nothing in the header says whether bytes"),
        ((np.nan, np.nan, np.nan), {}, SIGNED, "nothing in the header says whether bytes"),
    ],
)
def test_signed_and_unsigned_bytes(tmp_path, order, header, fields, expected, said):
    path = write_bytes(tmp_path, order, header, **{key: value for key, value in fields.items() if key != "nversion"})
    if "nversion" in fields:
        in_words(path, nversion=fields["nversion"])
    found, stack = read_stored_map(path), StackFile(path)
    np.testing.assert_array_equal(found.volume, expected)
    np.testing.assert_array_equal(read_all(stack), expected)
    for warnings in (found.warnings, stack.warnings):
        assert (len(warnings), said is None or said in warnings[0]) == (0 if said is None else 1, True)


def test_bytes_in_the_other_byte_order_without_a_stamp(tmp_path):
    """Mode 0 is the same in both orders, axes are not."""
    path = write_bytes(tmp_path, ">", OF_SIGNED)
    content = path.read_bytes()
    path.write_bytes(content[:212] + bytes(4) + content[216:])
    np.testing.assert_array_equal(read_stored_map(path).volume, SIGNED)
    np.testing.assert_array_equal(read_all(StackFile(path)), SIGNED)


def test_cells_with_other_angles_are_told(tmp_path):
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(4, 4, 4), 1.5)
    with mrcfile.mmap(path, mode="r+") as file:
        file.header.cellb = (90, 90, 120)
    (warning,) = read_stored_map(path).warnings
    assert "the angles of its cell are 90, 90, 120 degrees; 90 were assumed" in warning


def test_bytes_below_128_need_no_word(tmp_path):
    path = write_bytes(tmp_path, "<", NOT_SET)
    content = path.read_bytes()
    path.write_bytes(content[:1024] + bytes(range(64)))
    assert not read_stored_map(path).warnings
    assert not StackFile(path).warnings


@pytest.mark.parametrize(
    ("mode", "what"), [(3, "complex"), (4, "complex numbers, a transform"), (16, "colours"), (101, "4-bit")]
)
@pytest.mark.parametrize("read", [read_map, StackFile])
def test_modes_without_densities_are_named(tmp_path, mode, what, read):
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(4, 4, 4), 1.5)
    in_words(path, mode=mode)
    with pytest.raises(InputError, match=f"MRC mode {mode} holds .*{what}"):
        read(path)
    swap(path, 4)
    with pytest.raises(InputError, match=f"MRC mode {mode} holds .*{what}"):
        read(path)


def test_four_bits_in_bytes_of_imod_are_named(tmp_path):
    path = write_bytes(tmp_path, "<", NOT_SET, **STAMP, imod_flags=17)
    with pytest.raises(InputError, match="4-bit"):
        read_map(path)


def test_a_part_of_a_cell_has_the_pixel_size_of_the_cell(tmp_path):
    """MX counts the intervals of the cell, of which the map may be a part."""
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(8, 8, 8), 1.5)
    in_words(path, mx=16, my=16, mz=16, cella=(32.0, 32.0, 32.0))
    assert read_map(path)[1] == Grid(8, 2.0)
    in_words(path, cella=(32.0, 32.0, 48.0))
    with pytest.raises(InputError, match=r"pixel sizes \[2.0, 2.0, 3.0\] Å"):
        read_map(path)


def test_stacks_are_no_maps_and_volumes_no_images(tmp_path):
    path = tmp_path / "s.mrcs"
    with writing_stack(path, 8, Grid(8, 2.0)) as write:
        write(torch.zeros(8, 8, 8))
    with pytest.raises(InputError, match=r"a stack of 8 images \(MZ is 1\); expected a map"):
        read_map(path)
    in_words(path, ispg=401, mz=4)
    for read in (read_map, StackFile):
        with pytest.raises(InputError, match=r"a stack of 2 volumes \(ISPG 401\)"):
            read(path)


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gz"), (bz2.compress, "bz2")])
@pytest.mark.parametrize("named", [True, False])
def test_packed_maps_are_read_whatever_their_name(tmp_path, pack, name, named):
    volume = torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0))
    write_map(tmp_path / "map.mrc", volume, 2.5)
    content = (tmp_path / "map.mrc").read_bytes()
    path = tmp_path / (f"emd_0001.map.{name}" if named else "map.mrc")
    path.write_bytes(pack(content))
    found, grid = read_map(path)
    assert torch.equal(found, volume)
    assert grid == Grid(12, 2.5)
    for damage, message in (
        (pack(content[:-100]), "truncated, the header says 12 sections of 12 x 12 and the file holds 11"),
        (pack(content[:500]), "too few for an MRC header"),
        (pack(content + bytes(2000)), "the header accounts for"),
        (pack(content)[:-40], "packed|truncated|ended"),
        (pack(content)[:9], "packed|few"),
        (pack(b"text" * 400), "MRC"),
    ):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=message) as caught:
            read_map(path)
        assert str(path) in str(caught.value)


def test_a_packed_file_is_unpacked_no_further_than_it_can_be_right(tmp_path):
    """4 kB do not become gigabytes, whatever the header announces."""
    path = tmp_path / "map.mrc"
    write_map(path, torch.zeros(4, 4, 4), 2.0)
    in_words(path, nx=1200, ny=1200, nz=1200)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="truncated, the header says 1200 sections"):
        read_map(path)


@pytest.mark.parametrize(
    ("pack", "remedy"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (lzma.compress, "unxz")]
)
def test_packed_stacks_are_named_with_the_way_out(tmp_path, pack, remedy):
    path = tmp_path / "s.mrcs"
    with writing_stack(path, 3, Grid(8, 2.0)) as write:
        write(torch.zeros(3, 8, 8))
    path.write_bytes(pack(path.read_bytes()))
    with pytest.raises(
        InputError, match=rf"packed with \w+, and images are read in place; unpack it first \({remedy} s"
    ):
        StackFile(path)
    if remedy == "unxz":
        with pytest.raises(InputError, match=r"packed with xz; unpack it first \(unxz s.mrcs\)"):
            read_map(path)


def test_where_a_header_puts_a_map(tmp_path):
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(8, 8, 8), 2.0)
    assert read_stored_map(path).origin == (0, 0, 0)
    in_words(path, nxstart=-4, nystart=-4, nzstart=3)
    assert read_stored_map(path).origin == (-8, -8, 6)
    in_words(path, origin=(1.5, 0.0, 0.0))  # ORIGIN, where it is set, is what was meant
    assert read_stored_map(path).origin == (1.5, 0, 0)
    in_words(path, origin=(np.nan, 0.0, 0.0))
    assert read_stored_map(path).origin == (-8, -8, 6)


def test_maps_that_lie_apart_are_told():
    grid = Grid(8, 2.0)
    assert misplaced("a", "b", (0.0, 0.0, 0.0), grid) is None
    assert misplaced("a", "b", (0.001, 0.0, -0.001), grid) is None  # rounding of a header
    text = misplaced("a", "b", (6.0, 0.0, -1.0), grid)
    assert "b: its header (NXSTART or ORIGIN) puts it (3, 0, -0.5) voxels away from a" in text
    assert "resample" in text
    assert "Half a box" in misplaced("a", "b", (-8.0, -8.0, -8.0), grid)
