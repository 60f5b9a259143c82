"""Damaged files: an error of ours in one line, or a right read; never a traceback, never wrong numbers in silence."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emsplat.errors import InputError
from emsplat.io.mrc import read_map, write_map, writing_stack
from emsplat.io.ply import read_ply, write_ply
from emsplat.io.relion.write import write_particles_star
from emsplat.maths.geometry import random_rotations
from emsplat.particles.open import open_particles
from emsplat.types import Grid, Optics, Poses

COUNT = 6
STRANGE = ["nan", "inf", "abc", "1e999", "", "'", '"', "#", "?", ".", "0", "-1", "1_0", "٣", "9" * 400, "loop_"]
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A readable stack, STAR file, map and PLY, as bytes."""
    folder = tmp_path_factory.mktemp("good")
    rng = torch.Generator().manual_seed(0)
    with writing_stack(folder / "s.mrcs", COUNT, Grid(8, 2.0)) as write:
        write(torch.randn(COUNT, 8, 8, generator=rng))
    one = torch.ones(COUNT, dtype=torch.float64)
    write_particles_star(
        folder / "p.star",
        [f"{i + 1}@s.mrcs" for i in range(COUNT)],
        [f"m{i}.mrc" for i in range(COUNT)],
        Poses(random_rotations(COUNT, rng), torch.randn(COUNT, 2, generator=rng).double()),
        Optics(*(v * one for v in (300, 2.7, 0.1, 15000, 14000, 0.6, 0, 0, 1))),
        Grid(8, 2.0),
        torch.tensor([1, 2] * 3),
    )
    write_map(folder / "map.mrc", torch.randn(8, 8, 8, generator=rng), 2.0)
    write_ply(
        folder / "g.ply", torch.randn(5, 3), torch.ones(5, 3), torch.randn(5, 4), torch.ones(5), Grid(8, 2.0), "x"
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attempt(read):
    """The result, or None where it was refused in one line; anything else is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read()
        except InputError as error:
            message = str(error)
    assert "\n" not in message
    return None


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


def flip(content: bytes, where) -> bytes:
    out = bytearray(content)
    for position, value in where:
        out[position % len(out)] = value
    return bytes(out)


@settings(max_examples=150, suppress_health_check=HEALTH)
@given(where=flips)
def test_star_with_changed_bytes(good, tmp_path, where):
    folder = lay_out(tmp_path, {**good, "p.star": flip(good["p.star"], where)})
    attempt(lambda: next(open_particles(folder / "p.star").sequential(COUNT)))


@settings(max_examples=100, suppress_health_check=HEALTH)
@given(length=st.integers(0, 4000))
def test_star_cut_short(good, tmp_path, length):
    content = good["p.star"]
    folder = lay_out(tmp_path, {**good, "p.star": content[: length % len(content)]})
    stack = attempt(lambda: open_particles(folder / "p.star"))
    if stack is not None:  # whole rows only, each with its own numbers
        whole = open_particles(lay_out(tmp_path, good) / "p.star").table
        torch.testing.assert_close(stack.table.poses.rotation, whole.poses.rotation[: len(stack)])


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=HEALTH)
@given(line=st.integers(0, 100), other=st.integers(0, 100), deed=st.sampled_from(["drop", "double", "swap"]))
def test_star_with_lines_dropped_doubled_or_swapped(good, tmp_path, line, other, deed):
    """A row that is read belongs to the image that it names."""
    lines = good["p.star"].decode().splitlines()
    line, other = line % len(lines), other % len(lines)
    if deed == "drop":
        del lines[line]
    elif deed == "double":
        lines.insert(line, lines[line])
    else:
        lines[line], lines[other] = lines[other], lines[line]
    folder = lay_out(tmp_path, {**good, "p.star": "\n".join(lines).encode() + b"\n"})
    table = attempt(lambda: open_particles(folder / "p.star"))
    moved = [*lines[line : line + 1], *lines[other : other + 1]]
    headers_moved = deed == "swap" and any(text.startswith(("_", "loop_", "data_", "1 opt")) for text in moved)
    if table is not None and not headers_moved:
        whole = open_particles(lay_out(tmp_path, good) / "p.star").table
        rows = table.table.image
        torch.testing.assert_close(table.table.poses.rotation, whole.poses.rotation[rows])
        torch.testing.assert_close(table.table.poses.shift, whole.poses.shift[rows])


@settings(max_examples=100, suppress_health_check=HEALTH)
@given(
    row=st.integers(0, COUNT - 1),
    column=st.integers(0, 15),
    token=st.sampled_from(STRANGE),
)
def test_star_with_a_strange_value(good, tmp_path, row, column, token):
    lines = good["p.star"].decode().splitlines()
    first = next(i for i, text in enumerate(lines) if "@" in text)
    words = lines[first + row].split()
    words[column % len(words)] = token
    lines[first + row] = " ".join(words)
    folder = lay_out(tmp_path, {**good, "p.star": "\n".join(lines).encode() + b"\n"})
    batch = attempt(lambda: next(open_particles(folder / "p.star").sequential(COUNT)))
    if batch is not None:
        assert torch.isfinite(batch.poses.rotation).all()
        assert torch.isfinite(batch.optics.defocus_u).all()


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=HEALTH)
@given(where=st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 255)), min_size=1, max_size=4))
def test_stack_with_changed_header(good, tmp_path, where):
    """What is read in spite of the damage is what was written."""
    folder = lay_out(tmp_path, good)
    expected = next(open_particles(folder / "p.star").sequential(COUNT)).images
    lay_out(tmp_path, {"s.mrcs": flip(good["s.mrcs"][:1024], where) + good["s.mrcs"][1024:]})
    batch = attempt(lambda: next(open_particles(folder / "p.star").sequential(COUNT)))
    if batch is not None:
        np.testing.assert_allclose(batch.images, expected)


@settings(max_examples=60, suppress_health_check=HEALTH)
@given(length=st.integers(0, 3000), name=st.sampled_from(["s.mrcs", "map.mrc", "g.ply"]))
def test_files_cut_short_are_refused(good, tmp_path, length, name):
    content = good[name]
    folder = lay_out(tmp_path, {**good, name: content[: length % len(content)]})
    read = {
        "s.mrcs": lambda: open_particles(folder / "p.star"),
        "map.mrc": lambda: read_map(folder / "map.mrc"),
        "g.ply": lambda: read_ply(folder / "g.ply"),
    }[name]
    assert attempt(read) is None


@settings(max_examples=100, suppress_health_check=HEALTH)
@given(where=flips)
def test_ply_with_changed_bytes(good, tmp_path, where):
    folder = lay_out(tmp_path, {"g.ply": flip(good["g.ply"], where)})
    attempt(lambda: read_ply(folder / "g.ply"))


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=HEALTH)
@given(
    row=st.integers(0, COUNT - 1),
    column=st.integers(0, 15),
    token=st.sampled_from([*STRANGE, "1e300", "1e30", "9" * 20]),
)
def test_a_strange_value_changes_no_other_row(good, tmp_path, row, column, token):
    """Not even where the strange value itself can be read."""
    lines = good["p.star"].decode().splitlines()
    first = next(i for i, text in enumerate(lines) if "@" in text)
    words = lines[first + row].split()
    words[column % len(words)] = token
    lines[first + row] = " ".join(words)
    whole = next(open_particles(lay_out(tmp_path, good) / "p.star").sequential(COUNT))
    folder = lay_out(tmp_path, {"p.star": "\n".join(lines).encode() + b"\n"})
    batch = attempt(lambda: next(open_particles(folder / "p.star").sequential(COUNT)))
    if batch is not None and len(batch) == COUNT:
        others = torch.arange(COUNT) != row
        for a, b in ((batch, whole), (batch.poses, whole.poses), (batch.optics, whole.optics)):
            for name, value in vars(a[others]).items():
                if isinstance(value, torch.Tensor):  # to rounding: vectors of numbers are worked out together
                    torch.testing.assert_close(value, getattr(b[others], name))


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=HEALTH)
@given(
    row=st.integers(0, COUNT - 1), index=st.text("0123456789-+.eE_x", max_size=30), repeat=st.sampled_from([1, 1, 400])
)
def test_an_image_index_is_right_or_refused(good, tmp_path, row, index, repeat):
    text = good["p.star"].decode().replace(f"\n{row + 1}@", f"\n{index * repeat}@")
    folder = lay_out(tmp_path, {**good, "p.star": text.encode()})
    stack = attempt(lambda: open_particles(folder / "p.star"))
    if stack is not None:
        assert int(stack.table.image[row]) == int(index * repeat) - 1


@settings(max_examples=150, suppress_health_check=HEALTH)
@given(where=st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 255)), min_size=1, max_size=4))
def test_map_with_changed_header(good, tmp_path, where):
    folder = lay_out(tmp_path, good)
    expected, _ = read_map(folder / "map.mrc")
    lay_out(tmp_path, {"map.mrc": flip(good["map.mrc"][:1024], where) + good["map.mrc"][1024:]})
    read = attempt(lambda: read_map(folder / "map.mrc"))
    if read is not None:
        assert torch.equal(read[0], expected)
        assert 0 < read[1].pixel_size < float("inf")


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=HEALTH)
@given(where=flips)
def test_damaged_pixels_stay_in_their_image(good, tmp_path, where):
    where = [(1024 + position % (len(good["s.mrcs"]) - 1024), value) for position, value in where]
    folder = lay_out(tmp_path, good)
    expected = next(open_particles(folder / "p.star").sequential(COUNT)).images
    lay_out(tmp_path, {"s.mrcs": flip(good["s.mrcs"], where)})
    batch = attempt(lambda: next(open_particles(folder / "p.star").sequential(COUNT)))
    if batch is not None:
        touched = {(position - 1024) // 256 for position, _ in where}
        untouched = [i for i in range(COUNT) if i not in touched]
        assert torch.equal(batch.images[untouched], expected[untouched])
        assert torch.isfinite(batch.images).all()


def test_messages_are_one_printable_line_of_bounded_length():
    text = str(InputError("two\nlines, " + 5000 * "a\x01"))
    assert text.startswith("two lines, ")
    assert text.isprintable()
    assert len(text) < 900
