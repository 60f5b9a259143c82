"""Particles of states as other programs take them back: of any format, merged, and under a symmetry."""

import json

import numpy as np
import pytest
import torch

from emsplat.config import ConvertConfig, HeterogeneityConfig, StatesConfig, configure
from emsplat.io.cryosparc import read_cs
from emsplat.io.particles import read_particles
from emsplat.io.relion.read import find_tables
from emsplat.io.star import read_star_file
from emsplat.maths.groups import parse_symmetry
from emsplat.particles.choose import open_stack
from emsplat.particles.copies import copies
from emsplat.programs.convert import convert
from emsplat.programs.state_particles import Views, row_numbers, write_particles
from emsplat.programs.states import states
from emsplat.sums.statistics import in_one_grey, mark

COUNT = 60


@pytest.fixture
def star(simulated):
    return simulated(particles=COUNT, box=32, pixel_size=3.0, snr=0.5, atoms=300, seed=3)


def views_of(stack, states=3):
    generator = torch.Generator().manual_seed(0)
    order = stack.symmetry.order
    row = torch.arange(len(stack)).repeat_interleave(order)
    count = len(row)
    state = torch.randint(states, (count,), generator=generator)
    return Views(
        row,
        stack.half[row],
        torch.arange(count) % order + 1,
        torch.randn(count, 2, generator=generator),
        torch.randn(count, generator=generator),
        torch.ones(count),
        None,
        state,
        torch.rand(count, generator=generator),
    )


def test_a_cs_file_gives_cs_files(star, tmp_path):
    source = tmp_path / "particles.cs"
    convert(ConvertConfig(), star, source)
    fields = np.load(source)
    stack = open_stack(configure(HeterogeneityConfig), source)
    views = views_of(stack)
    write_particles(stack, views, tmp_path / "run")
    own = read_particles(tmp_path / "run" / "run_data.star")
    assert torch.equal(own.particle_class, views.state + 1)
    assert torch.allclose(own.poses.rotation, stack.table.poses.rotation, atol=1e-6)
    for state in range(3):
        rows = (views.state == state).nonzero()[:, 0]
        part = read_cs(tmp_path / "run" / "states" / f"{state:03d}.cs")
        assert torch.equal(part.image, stack.table.image[rows])
        assert torch.equal(part.half, views.half[rows])
        data = np.load(tmp_path / "run" / "states" / f"{state:03d}.cs")
        assert data.dtype.names == fields.dtype.names
        assert np.array_equal(data["uid"], fields["uid"][rows.numpy()])


def test_the_class_of_the_input_stays(star, tmp_path):
    text = star.read_text().splitlines()
    first = next(i for i, line in enumerate(text) if "@" in line)
    column = [line.split()[0] for line in text[:first] if line.startswith("_rln")]
    place = column[column.index("_rlnImageName") :].index("_rlnClassNumber")
    before = []
    for number in range(COUNT):
        words = text[first + number].split()
        words[place] = str(number % 2 + 5)
        before.append(words[place])
        text[first + number] = " ".join(words)
    star.write_text("\n".join([*text, ""]))
    stack = open_stack(configure(HeterogeneityConfig), star)
    write_particles(stack, views_of(stack), tmp_path / "run")
    table = find_tables(read_star_file(tmp_path / "run" / "run_data.star"))[0]
    assert list(table.text("EmsplatInputClass")) == before


def test_copies_under_a_symmetry_are_rows(star, tmp_path):
    stack = open_stack(configure(HeterogeneityConfig, symmetry="C3"), star)
    views = views_of(stack)
    write_particles(stack, views, tmp_path / "run")
    own = read_particles(tmp_path / "run" / "run_data.star")
    assert len(own) == 3 * COUNT
    elements = parse_symmetry("C3").elements
    right = (stack.table.poses.rotation[:, None] @ elements).flatten(0, 1)
    assert torch.allclose(own.poses.rotation, right, atol=1e-6)
    assert torch.equal(own.half, stack.half.repeat_interleave(3))
    found = copies(own, parse_symmetry("C1"))
    assert found.expansion is not None
    assert found.expansion.symbol == "C3"
    assert found.crossing == 0
    table = find_tables(read_star_file(tmp_path / "run" / "run_data.star"))[0]
    assert list(table.text("EmsplatCopy"))[:4] == ["1", "2", "3", "1"]


def test_rows_of_merged_files_count_on(star, simulated, tmp_path):
    other = simulated(particles=40, box=32, pixel_size=3.0, snr=0.5, atoms=300, seed=4)
    stack = open_stack(configure(HeterogeneityConfig, merge=(other,)), star)
    assert row_numbers(stack).tolist() == list(range(1, COUNT + 41))
    write_particles(stack, views_of(stack), tmp_path / "run")
    own = read_particles(tmp_path / "run" / "run_data.star")
    assert len(own) == COUNT + 40
    assert len(own.stacks) == 2
    assert sum(len(read_particles(path)) for path in (tmp_path / "run" / "states").glob("*.star")) == COUNT + 40


def test_rows_of_merged_files_do_not_depend_on_the_order_of_boxes(star, simulated):
    """Where images of several grids are brought together, those of the commonest come first."""
    few = simulated(particles=20, box=40, pixel_size=2.4, snr=0.5, atoms=300, seed=4)
    stack = in_one_grey(open_stack(configure(HeterogeneityConfig, merge=(star,)), few))
    assert stack.rows.tolist() != sorted(stack.rows.tolist())
    assert row_numbers(stack).tolist() == list(range(1, COUNT + 21))


@pytest.mark.parametrize("flip", [False, True])
def test_selected_particles_have_the_hand_of_the_run(star, tmp_path, flip):
    source, run = tmp_path / "particles.cs", tmp_path / "run"
    convert(ConvertConfig(), star, source)
    stack = open_stack(configure(HeterogeneityConfig, flip_hand=flip), source)
    views = views_of(stack)
    write_particles(stack, views, run)
    rows = "".join(f"{row + 1},{half},0\n" for row, half in zip(views.row.tolist(), views.half.tolist(), strict=True))
    (run / "latents.csv").write_text("row,half,z1\n" + rows)
    (run / "summary.json").write_text(json.dumps({"options": {}, "input": {"file": str(source)}}))
    paths = states(run, StatesConfig(select=("class=1",)), tmp_path / "out")
    one, other = (read_particles(path) for path in paths[:2])
    assert {path.suffix for path in paths[:2]} == {".star", ".cs"}
    torch.testing.assert_close(one.poses.rotation, other.poses.rotation, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.poses.shift, other.poses.shift, atol=1e-4, rtol=0)
    assert torch.equal(one.image, other.image)


def test_selected_particles_are_those_of_the_run(star, tmp_path, capsys):
    """Also where another file has the name of the one that the run read."""
    source, run = tmp_path / "particles.cs", tmp_path / "run"
    convert(ConvertConfig(), star, source)
    stack = open_stack(configure(HeterogeneityConfig), source)
    views = views_of(stack)
    write_particles(stack, views, run)
    rows = "".join(f"{row + 1},{half},0\n" for row, half in zip(views.row.tolist(), views.half.tolist(), strict=True))
    (run / "latents.csv").write_text("row,half,z1\n" + rows)
    (run / "summary.json").write_text(json.dumps({"options": {}, "input": {"file": str(source)}}))
    whole = np.load(source)
    with source.open("wb") as file:
        np.save(file, whole[::-1], allow_pickle=False)
    for said in ("holds other particles", "is not there any more"):
        paths = states(run, StatesConfig(select=("class=1",)), tmp_path / said.replace(" ", "_"))
        one, other = (read_particles(path) for path in paths[:2])
        assert torch.equal(one.image, other.image)
        torch.testing.assert_close(one.poses.rotation, other.poses.rotation, atol=1e-5, rtol=0)
        assert f"{source}: {said}" in "".join(capsys.readouterr())
        source.unlink(missing_ok=True)


def test_views_of_one_image_go_together(star, tmp_path):
    """Rows that repeat an image add nothing independent, as little as the elements of a symmetry."""
    text = star.read_text().rstrip()
    (star.parent / "twice.star").write_text(text + "\n" + text.splitlines()[-1] + "\n")
    stack = open_stack(configure(HeterogeneityConfig, symmetry="C2"), star.parent / "twice.star")
    number = stack.image_of_view
    assert len(number) == 2 * (COUNT + 1)
    assert len(torch.unique(number)) == COUNT
    assert torch.equal(number[::2], number[1::2])
    assert number[-1] == number[-3]


def test_sums_know_what_they_depend_on(star):
    """Those of other half-sets, symmetries and boxes are not taken for the same."""
    configs = [{}, {"symmetry": "C2"}, {"box": 24}, {"redraw_halves": True, "seed": 5}]
    stacks = [open_stack(configure(HeterogeneityConfig, **one), star).only(1) for one in configs]
    assert len({mark(stack) for stack in stacks}) == len(configs)
    assert mark(open_stack(configure(HeterogeneityConfig), star).only(1)) == mark(stacks[0])


def test_rows_are_those_of_the_input(star, tmp_path):
    (tmp_path / "some.txt").write_text("7\n3\n12\n20\n21\n22\n30\n31\n")
    stack = open_stack(configure(HeterogeneityConfig, subset=tmp_path / "some.txt"), star)
    assert sorted(row_numbers(stack).tolist()) == [4, 8, 13, 21, 22, 23, 31, 32]


def test_selected_copies_under_a_symmetry_are_those_that_were_meant(star, tmp_path, capsys):
    """A molecule in which one subunit differs is in another state in each of its copies."""
    run = tmp_path / "run"
    stack = open_stack(configure(HeterogeneityConfig, symmetry="C2"), star)
    views = views_of(stack)
    write_particles(stack, views, run)
    columns = (views.row + 1, views.half, views.copy, views.state)
    rows = "".join(
        f"{row},{half},{copy},0\n" for row, half, copy, _ in zip(*(own.tolist() for own in columns), strict=True)
    )
    (run / "latents.csv").write_text("row,half,copy,z1\n" + rows)
    (run / "summary.json").write_text(json.dumps({"options": {}, "input": {"file": str(star)}}))
    wanted = views.state == 1
    text = "".join(f"{row + 1},{copy}\n" for row, copy in zip(views.row[wanted], views.copy[wanted], strict=True))
    (tmp_path / "rows.txt").write_text("row,copy\n" + text)
    chosen = read_particles(states(run, StatesConfig(select=(str(tmp_path / "rows.txt"),)), tmp_path / "one")[0])
    assert len(chosen) == int(wanted.sum())
    assert set(chosen.particle_class.tolist()) == {2}
    (tmp_path / "bare.txt").write_text("1\n2\n")
    capsys.readouterr()
    chosen = read_particles(states(run, StatesConfig(select=(str(tmp_path / "bare.txt"),)), tmp_path / "all")[0])
    assert len(chosen) == 4
    assert "all copies of its rows are taken" in "".join(capsys.readouterr())
