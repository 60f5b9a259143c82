"""MRC files: every mode and byte order, headers that other programs accept, damage refused."""

import mrcfile
import numpy as np
import pytest
import torch

from emsplat.errors import InputError, OutputError
from emsplat.io.mrc import StackFile, read_map, write_map, writing_stack
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
        (patch(12, 4), "mode 4 is not supported"),
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
    with pytest.warns(RuntimeWarning, match="NaN"):
        write_map(tmp_path / "nan.mrc", torch.full((4, 4, 4), torch.nan), 1.0)
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
