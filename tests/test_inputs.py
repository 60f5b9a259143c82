"""Which particles are taken, in which hand; and the same particles in every format give the same map."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gemmi import cif

from emsplat.cli import main
from emsplat.config import BackprojectConfig, ChoiceOptions, configure
from emsplat.errors import InputError
from emsplat.imaging.project import project
from emsplat.io.cryosparc import write_cs
from emsplat.io.mrc import read_map, writing_stack
from emsplat.io.particles import count_stacks
from emsplat.io.pickles import write_arrays
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import write_table
from emsplat.io.table import OpticsGroup
from emsplat.maths.groups import parse_symmetry
from emsplat.particles.choose import flip_hand, open_stack, read_table
from emsplat.sums.equations import _lowpass
from emsplat.sums.statistics import equations_of
from emsplat.types import Gaussians, Grid, Poses


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=400, atoms=500, snr=0.3, astigmatism=800.0, seed=0)


def table_of(particles, **options):
    return read_table(ChoiceOptions(**options), particles)


def classical(stack):
    return equations_of(stack).solve()


def likeness(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_first_and_class(particles, tmp_path):
    table = read_star(particles)
    write_table(tmp_path / "p.star", replace(table, particle_class=torch.arange(400) % 4), table.half)
    assert table_of(tmp_path / "p.star", first=30).image.tolist() == list(range(30))
    assert table_of(tmp_path / "p.star", particle_class=3).image.tolist() == list(range(3, 400, 4))
    assert table_of(tmp_path / "p.star", particle_class=3, first=2).image.tolist() == [3, 7]
    with pytest.raises(InputError, match=r"no particle of class 9; there are 0, 1, 2, 3"):
        table_of(tmp_path / "p.star", particle_class=9)
    with pytest.raises(InputError, match=r"--first 0"):
        table_of(tmp_path / "p.star", first=0)


def test_subset_by_numbers_and_by_names(particles, tmp_path):
    rows = np.array([5, 17, 2, 300])
    np.savetxt(tmp_path / "rows.txt", rows, fmt="%d")
    np.save(tmp_path / "rows.npy", rows)
    write_arrays(tmp_path / "rows.pkl", rows)
    for name in ("rows.txt", "rows.npy", "rows.pkl"):
        assert table_of(particles, subset=tmp_path / name).image.tolist() == rows.tolist()
    table = read_star(particles)
    chosen = table.take(torch.from_numpy(rows))
    write_table(tmp_path / "some.star", chosen, None)
    write_cs(tmp_path / "some.cs", chosen, None)
    for name in ("some.star", "some.cs"):
        assert table_of(particles, subset=tmp_path / name).image.tolist() == sorted(rows.tolist())


def test_subset_of_a_table_counts_from_1(particles, tmp_path):
    for name, text in (("rows.txt", "row\n6\n18\n3\n"), ("latents.csv", "row,copy,z1\n6,1,0\n6,2,0\n18,1,0\n3,1,0\n")):
        (tmp_path / name).write_text(text)
        assert table_of(particles, subset=tmp_path / name).image.tolist() == [2, 5, 17]
    (tmp_path / "rows.txt").write_text("row\n0\n")
    with pytest.raises(InputError, match=r"rows from 1 to 400"):
        table_of(particles, subset=tmp_path / "rows.txt")


@pytest.mark.parametrize("text", ["400\n", "-1\n", "1.5\n", "3\n3\n", "nan\n", "one\n", "", "row\n", "row\n401\n"])
def test_subsets_that_name_no_rows(particles, tmp_path, text):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(InputError, match=r"rows\.txt"):
        table_of(particles, subset=tmp_path / "rows.txt")


def test_subset_of_other_images(particles, tmp_path):
    table = read_star(particles)
    write_table(tmp_path / "other.star", replace(table, stacks=(Path("/nowhere/other.mrcs"),)), None)
    with pytest.raises(InputError, match="names none of the images"):
        table_of(particles, subset=tmp_path / "other.star")


def test_stacks_of_one_name_are_told_apart_by_their_folders(particles, tmp_path):
    table = read_star(particles)
    for job in ("job1", "job2"):
        (tmp_path / job).mkdir()
        (tmp_path / job / "s.mrcs").write_bytes((particles.parent / "particles.mrcs").read_bytes())
    stacks = (tmp_path / "job1" / "s.mrcs", tmp_path / "job2" / "s.mrcs")
    two = replace(table, stacks=stacks, stack=torch.arange(400) // 200)
    write_table(tmp_path / "p.star", two, two.half, tmp_path)
    write_table(tmp_path / "sub.star", two.take(torch.tensor([3, 250])), None, tmp_path)
    assert table_of(tmp_path / "p.star", subset=tmp_path / "sub.star").row.tolist() == [3, 250]


def test_used_particles_are_the_chosen_ones(particles, tmp_path):
    words = ["--first", "100", "--diameter", "100"]
    assert main(["backproject", str(particles), "-o", str(tmp_path / "run"), *words]) == 0
    used = read_star(tmp_path / "run" / "run_data.star", need_stacks=False)
    assert used.image.tolist() == list(range(100))


def test_merged_files(particles, tmp_path):
    """Two halves of one set, one of them without half-sets and with aberrations, are the whole set again."""
    table = read_star(particles)
    write_table(tmp_path / "a.star", table.take(torch.arange(200)), table.half[:200])
    write_table(tmp_path / "b.star", table.take(torch.arange(200, 400)), None)
    merged = table_of(tmp_path / "a.star", merge=(tmp_path / "b.star",))
    torch.testing.assert_close(merged.poses.rotation, table.poses.rotation, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged.optics.defocus_u, table.optics.defocus_u)
    assert merged.image.tolist() == table.image.tolist()
    assert [group.name for group in merged.groups] == ["opticsGroup1", "opticsGroup1_2"]
    assert merged.micrograph_names == table.micrograph_names
    assert merged.half.tolist() == table.half[:200].tolist() + [0] * 200
    stack = open_stack(configure(BackprojectConfig, merge=(tmp_path / "b.star",)), tmp_path / "a.star")
    assert torch.equal(stack.half[:200], table.half[:200])
    assert set(stack.half[200:].tolist()) == {1, 2}
    assert merged.place(250).endswith("b.star, row 51")
    assert likeness(classical(stack), classical(open_stack(BackprojectConfig(), particles))) > 0.9999
    run = tmp_path / "run"
    words = ["--merge", str(tmp_path / "b.star"), "-o", str(run)]
    assert main(["backproject", str(tmp_path / "a.star"), *words]) == 0
    assert len(read_star(run / "run_data.star")) == 400
    # Both files name one stack, which counts once, and not where no particle is left of it.
    assert count_stacks(merged) == 1
    assert json.loads((run / "summary.json").read_text())["input"]["stacks"] == 1
    other = replace(table, stacks=(*table.stacks, tmp_path / "other.mrcs"))
    assert count_stacks(other) == 1
    assert count_stacks(replace(other, stack=other.image % 2)) == 2


def test_merged_star_files_keep_the_columns_that_they_share(particles, tmp_path):
    text = particles.read_text()
    (tmp_path / "a.star").write_text(text.replace("_rlnClassNumber", "_rlnOwn"))
    (tmp_path / "b.star").write_text(text.replace("_rlnClassNumber", "_rlnOwn").replace("_rlnPhaseShift", "_rlnLonely"))
    words = ["--merge", str(tmp_path / "b.star"), "--datadir", str(particles.parent)]
    assert main(["convert", str(tmp_path / "a.star"), str(tmp_path / "both.star"), *words]) == 0
    block = cif.read_file(str(tmp_path / "both.star")).find_block("particles")
    assert list(block.find_values("_rlnOwn")) == ["1"] * 800
    assert not block.find_values("_rlnLonely")
    assert len(read_star(tmp_path / "both.star", particles.parent)) == 800


def test_images_of_two_signs_are_not_merged(particles, tmp_path):
    table = read_star(particles)
    write_cs(tmp_path / "dark.cs", replace(table, sign=-1.0), table.half)
    with pytest.raises(InputError, match=r"protein is dark.*preprocess"):
        table_of(particles, merge=(tmp_path / "dark.cs",))


@pytest.mark.parametrize("symbol", ["C1", "C3", "D2", "D7", "T", "O", "I1", "I2", "I3"])
def test_flipped_poses_project_the_mirrored_molecule(symbol):
    """The same images; and the mirror image of a symmetric molecule has the symmetry in the same setting."""
    rng = torch.Generator().manual_seed(0)
    group = parse_symmetry(symbol).elements
    one = 12 * torch.randn(5, 3, generator=rng, dtype=torch.float64)
    mean = torch.cat([one @ element.T for element in group])
    count, grid = len(mean), Grid(48, 2.0)
    shape = 9 * torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    amplitude = torch.arange(1.0, 6.0, dtype=torch.float64).repeat(len(group))
    from emsplat.maths.geometry import random_rotations

    poses = Poses(random_rotations(4, rng), 3 * torch.randn(4, 2, generator=rng, dtype=torch.float64))
    table = replace(_bare(4), poses=poses)
    flipped = flip_hand(table, parse_symmetry(symbol))
    assert flipped.mirrored
    axes = [-1.0, -1.0, -1.0] if symbol in ("T", "I1", "I3") else [1.0, 1.0, -1.0]
    mirrored = mean * torch.tensor(axes, dtype=torch.float64)
    before = project(Gaussians(mean, shape, amplitude), poses, grid)
    after = project(Gaussians(mirrored, shape, amplitude), flipped.poses, grid)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    for element in group:
        distance = torch.cdist(mirrored @ element.T, mirrored).min(1).values
        assert float(distance.max()) < 1e-5


def _bare(count):
    from emsplat.io.table import ParticleTable
    from emsplat.types import Optics

    zero = torch.zeros(count, dtype=torch.int64)
    return ParticleTable(
        sources=(Path("p.star"),),
        source=zero,
        row=torch.arange(count),
        poses=Poses(torch.eye(3).double().repeat(count, 1, 1), torch.zeros(count, 2).double()),
        optics=Optics(*(torch.ones(count).double() for _ in range(9))),
        groups=(OpticsGroup("one", 2.0, 48),),
        optics_group=zero,
        half=None,
        micrograph=zero,
        stacks=(Path("p.mrcs"),),
        stack=zero,
        image=torch.arange(count),
    )


@pytest.mark.slow
def test_flipped_map_is_the_mirrored_map_and_its_poses_are_written(particles, tmp_path):
    words = ["--diameter", "100"]
    for name, more in (("right", []), ("left", ["--flip-hand"])):
        assert main(["backproject", str(particles), "-o", str(tmp_path / name), *words, *more]) == 0
    right, left = (read_map(tmp_path / name / "run_class001.mrc")[0] for name in ("right", "left"))
    assert likeness(left, torch.roll(right.flip(0), 1, 0)) > 0.98
    assert likeness(left, right) < 0.9
    again = ["backproject", str(tmp_path / "left" / "run_data.star"), "-o", str(tmp_path / "again"), *words]
    assert main([*again, "--datadir", str(particles.parent)]) == 0
    assert likeness(read_map(tmp_path / "again" / "run_class001.mrc")[0], left) > 0.9999


def star_30(path, table):
    """RELION 3.0: one table, pixel size from detector and magnification, origins in pixels."""
    write_table(path, table, table.half, path.parent)
    document = cif.read_file(str(path))
    block = document.find_block("particles")
    tags = [tag for tag in block.find_loop("_rlnImageName").get_loop().tags if tag != "_rlnOpticsGroup"]
    columns = {tag: list(block.find_values(tag)) for tag in tags}
    pixel_size = table.groups[0].pixel_size
    for axis in "XY":
        values = columns.pop(f"_rlnOrigin{axis}Angst")
        columns[f"_rlnOrigin{axis}"] = [f"{float(value) / pixel_size:.8f}" for value in values]
    constant = {"Voltage": 300, "SphericalAberration": 2.7, "AmplitudeContrast": 0.1, "Magnification": 10000}
    constant["DetectorPixelSize"] = pixel_size
    columns |= {f"_rln{name}": [str(value)] * len(table) for name, value in constant.items()}
    old = cif.Document()
    old.add_new_block("").init_loop("", list(columns)).set_all_values(list(columns.values()))
    path.write_text(old.as_string().replace("data_ ", "data_"))


def test_every_format_gives_the_same_map(particles, tmp_path):
    """STAR 3.0, 3.1 with three optics groups, .cs aligned on binned images, and cryoDRGN's pickles."""
    table = read_star(particles)
    paths = {"old": tmp_path / "old.star", "three": tmp_path / "three.star", "cs": tmp_path / "p.cs"}
    here = tmp_path / "particles.mrcs"
    here.write_bytes((particles.parent / "particles.mrcs").read_bytes())
    table = replace(table, stacks=(here,))
    star_30(paths["old"], table)
    groups = tuple(OpticsGroup(name, 4.0, 32) for name in ("one", "two", "three"))
    three = replace(table, groups=groups, optics_group=torch.arange(400) % 3)
    write_table(paths["three"], three, table.half)
    write_cs(paths["cs"], table, table.half)
    data = np.load(paths["cs"])
    data["alignments3D/psize_A"] *= 1.7
    data["alignments3D/shift"] /= 1.7
    with paths["cs"].open("wb") as file:
        np.save(file, data)
    assert main(["convert", str(particles), str(tmp_path / "poses.pkl")]) == 0
    pickles = {"poses": tmp_path / "poses.pkl", "ctf": tmp_path / "ctf.pkl"}
    expected = classical(open_stack(BackprojectConfig(), particles))
    stacks = {name: open_stack(BackprojectConfig(), path) for name, path in paths.items()}
    stacks["pkl"] = open_stack(configure(BackprojectConfig, **pickles), here)
    assert len(stacks["three"].table.groups) == 3
    for name, stack in stacks.items():
        assert likeness(classical(stack), expected) > 0.9999, name
        torch.testing.assert_close(stack.table.poses.shift, table.poses.shift, atol=1e-4, rtol=0)
    for name in ("old", "three", "cs"):
        assert torch.equal(stacks[name].half, table.half)


def test_three_optics_groups_of_three_pixel_sizes_give_one_map(particles, tmp_path):
    """The same molecule at three magnifications, put together, is as good as at one."""
    truth = read_map(particles.parent / "truth.mrc")[0]
    table = read_star(particles)
    source = open_stack(BackprojectConfig(), particles)
    raw = source.files.read(torch.arange(400))
    from emsplat.particles.resample import resample

    grids = [Grid(32, 4.0), Grid(28, 128 / 28), Grid(24, 128 / 24)]
    rows = torch.arange(400) % 3
    for number, grid in enumerate(grids):
        images = resample(raw[rows == number], grids[0], grid)
        with writing_stack(tmp_path / f"s{number}.mrcs", len(images), grid) as write:
            write(images)
    place = torch.zeros(400, dtype=torch.int64)
    for number in range(3):
        place[rows == number] = torch.arange(int((rows == number).sum()))
    mixed = replace(
        table,
        groups=tuple(OpticsGroup(f"g{i}", grid.pixel_size, grid.size) for i, grid in enumerate(grids)),
        optics_group=rows,
        stacks=tuple(tmp_path / f"s{number}.mrcs" for number in range(3)),
        stack=rows,
        image=place,
    )
    write_table(tmp_path / "mixed.star", mixed, table.half)
    one, several = (classical(open_stack(BackprojectConfig(), path)) for path in (particles, tmp_path / "mixed.star"))
    one, several, truth = (_lowpass(volume, 4.0) for volume in (one, several, truth))
    assert likeness(several, one) > 0.98
    assert likeness(several, truth) > likeness(one, truth) - 0.01


def test_a_datadir_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--datadir .*/none: no such folder"):
        read_table(ChoiceOptions(datadir=tmp_path / "none"), tmp_path / "p.star")
