"""Copies of an image: known over files and links, never in both half-sets, counted once."""

import json
import os
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from emsplat.cli import main
from emsplat.config import BackprojectConfig, ChoiceOptions, PreprocessConfig, SimulateConfig, configure
from emsplat.errors import InputError
from emsplat.fitting.images import ImageObjective
from emsplat.io.cryosparc import write_cs
from emsplat.io.mrc import writing_stack
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import write_table
from emsplat.maths.geometry import axis_rotation, matrix_to_euler, random_rotations
from emsplat.maths.groups import C1, dihedral, parse_symmetry
from emsplat.measures.fsc import fsc_curve
from emsplat.particles.choose import open_stack, read_table
from emsplat.particles.copies import (
    _places,
    copies,
    draw_halves,
    image_marks,
    image_numbers,
    linked,
    marks_in,
    mixed_classes,
    settle_halves,
    shares,
)
from emsplat.programs.nulltest import _write
from emsplat.programs.populate import circumstances
from emsplat.programs.preprocess import preprocess
from emsplat.programs.reconstruct import backproject
from emsplat.programs.simulate import simulate
from emsplat.run.log import Log
from emsplat.sums.statistics import begin, equations_of, held_images
from emsplat.types import Gaussians, Grid, Poses

GRID = Grid(16, 4.0)
IMAGES = 24


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Noise alone: whatever correlates between two half-sets is the same image in both."""
    folder = tmp_path_factory.mktemp("noise")
    with writing_stack(folder / "s.mrcs", IMAGES, GRID) as write:
        write(torch.randn(IMAGES, 16, 16, generator=torch.Generator().manual_seed(1)))
    return folder / "s.mrcs"


@pytest.fixture(scope="module")
def poses():
    return random_rotations(IMAGES, torch.Generator().manual_seed(2))


def star(path, stack, rows, poses, *, shift=None, pixel=4.0, **columns):
    """A STAR file of images (from 0) with their poses, one per row, and further columns."""
    names = [str(stack)] * len(rows) if isinstance(stack, (str, Path)) else list(map(str, stack))
    shift = torch.zeros(len(rows), 2) if shift is None else shift
    table = {
        "ImageName": [f"{row + 1}@{name}" for row, name in zip(rows, names, strict=True)],
        "DefocusU": ["15000"] * len(rows),
        "OpticsGroup": ["1"] * len(rows),
    }
    angles = torch.rad2deg(matrix_to_euler(poses)).tolist()
    for name, values in zip(("AngleRot", "AngleTilt", "AnglePsi"), zip(*angles, strict=True), strict=True):
        table[name] = [f"{value:.9f}" for value in values]
    for axis, values in zip("XY", shift.T.tolist(), strict=True):
        table[f"Origin{axis}Angst"] = [f"{value:.7f}" for value in values]
    table |= {name: list(map(str, values)) for name, values in columns.items()}
    optics = "data_optics\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
    optics += f"_rlnImagePixelSize\n_rlnImageSize\n_rlnMicrographOriginalPixelSize\n1 300 2.7 0.1 {pixel} 16 1.0\n\n"
    lines = [" ".join(row) for row in zip(*table.values(), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(optics + "\n".join(["data_particles", "loop_", *(f"_rln{name}" for name in table), *lines]) + "\n")
    return path


def parted(stack):
    """How many images are in both half-sets of a stack."""
    image = image_numbers(stack.table)
    both = Counter(number for number, _ in set(zip(image.tolist(), stack.half.tolist(), strict=True)))
    return sum(count > 1 for count in both.values())


def test_an_image_is_known_over_spellings_and_links(stack, poses, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "link.mrcs").symlink_to(stack)
    (tmp_path / "folder").symlink_to(stack.parent)
    spellings = [stack, tmp_path / "job" / "link.mrcs", tmp_path / "folder" / "s.mrcs", f"{stack.parent}/./s.mrcs"]
    table = read_star(star(tmp_path / "p.star", spellings, [3, 3, 3, 4], poses[:4]))
    assert image_numbers(table).tolist() == [0, 0, 0, 1]
    other = star(tmp_path / "job" / "q.star", "link.mrcs", [4, 5], poses[:2])
    merged = read_table(ChoiceOptions(merge=(other,)), tmp_path / "p.star")
    assert image_numbers(merged).tolist() == [0, 0, 0, 1, 1, 2]
    # Stacks that are not there go by their names.
    absent = star(tmp_path / "absent.star", ["a/s.mrcs", "a/./s.mrcs", "b/s.mrcs"], [1, 1, 1], poses[:3])
    assert image_numbers(read_star(absent, need_stacks=False)).tolist() == [0, 0, 1]


def test_an_image_is_known_over_hard_links_of_several_files(stack, poses, tmp_path):
    other = tmp_path / "again.mrcs"
    shutil.copy(stack, tmp_path / "one.mrcs")
    os.link(tmp_path / "one.mrcs", other)
    one = star(tmp_path / "a.star", tmp_path / "one.mrcs", range(8), poses[:8], RandomSubset=[1] * 8)
    two = star(tmp_path / "b.star", other, range(8), poses[:8], RandomSubset=[2] * 8)
    table = read_table(ChoiceOptions(merge=(two,)), one)
    assert copies(table, C1).rows == 8
    with pytest.raises(InputError, match="16 of 16 rows name an image that is in both"):
        settle_halves(table, 0)


def test_a_particle_is_known_before_something_was_subtracted(stack, poses, tmp_path):
    """Each copy of an expanded set has an image of its own then, with the same noise."""
    names = [f"{row // 2 + 1:06d}@Extract/x.mrcs" for row in range(8)]
    one = star(tmp_path / "a.star", stack, range(8), poses[:8], ImageOriginalName=names, RandomSubset=[1, 2] * 4)
    with pytest.raises(InputError, match=r"8 of 8 rows name a particle .* in both"):
        settle_halves(read_table(ChoiceOptions(), one), 0)
    half = settle_halves(replace(read_table(ChoiceOptions(), one), half=None), 0)
    assert torch.equal(half[::2], half[1::2])
    away = star(tmp_path / "away" / "a.star", tmp_path / "gone.mrcs", range(8), poses[:8], ImageOriginalName=names)
    projects = [read_star(path, need_stacks=False).origin for path in (one, away)]
    assert not set(projects[0].tolist()) & set(projects[1].tolist())
    unknown = star(
        tmp_path / "b.star", stack, range(8), poses[:8], ImageOriginalName=["None"] * 8, RandomSubset=[1, 2] * 4
    )
    assert copies(read_table(ChoiceOptions(), unknown), C1).crossing == 0


def test_a_particle_of_cryosparc_is_known_in_another_stack(stack, poses, tmp_path):
    """Jobs that write particles into new stacks keep their uid."""
    shutil.copy(stack, tmp_path / "restacked.mrcs")
    halves = torch.tensor([1, 2] * 4)
    files = []
    for name, file, half in (("a", stack, halves), ("b", tmp_path / "restacked.mrcs", 3 - halves)):
        table = read_star(star(tmp_path / f"{name}.star", file, range(8), poses[:8]))
        uid = torch.arange(8) + 2**60
        for kind, numbers in ((name, uid), (f"{name}_counted", torch.arange(8))):
            files.append(tmp_path / f"{kind}.cs")
            write_cs(files[-1], replace(table, uid=numbers), half)
    one, counted, two, other = files
    with pytest.raises(InputError, match=r"16 of 16 rows name a particle .* in both"):
        settle_halves(read_table(ChoiceOptions(merge=(two,)), one), 0)
    assert copies(read_table(ChoiceOptions(merge=(other,)), counted), C1).crossing == 0


def restacked(tmp_path, stack, poses, count=8):
    """Two .cs files with the same particles in two stacks, by uid."""
    shutil.copy(stack, tmp_path / "restacked.mrcs")
    files = []
    for name, file in (("a", stack), ("b", tmp_path / "restacked.mrcs")):
        table = read_star(star(tmp_path / f"{name}.star", file, range(count), poses[:count]))
        files.append(tmp_path / f"{name}.cs")
        write_cs(files[-1], replace(table, uid=torch.arange(count) + 2**60), None)
    return files


def test_a_particle_in_two_stacks_counts_once(stack, poses, tmp_path, capsys):
    one, two = restacked(tmp_path, stack, poses)
    table = read_table(ChoiceOptions(merge=(two,)), one)
    found = copies(table, C1)
    assert (found.images, found.rows, found.again) == (16, 0, 8)
    assert found.text == (
        "8 images show a particle that an earlier row shows in another image (by uid or rlnImageOriginalName; "
        "8 different particles)"
    )
    assert open_stack(configure(BackprojectConfig, merge=(two,)), one).share.tolist() == [0.5] * 16
    unique = read_table(ChoiceOptions(merge=(two,), unique=True), one)
    assert (unique.source.tolist(), unique.row.tolist(), unique.left_out) == ([0] * 8, list(range(8)), 8)
    assert main(["check", str(one), "--merge", str(two), "--metadata-only"]) == 1
    assert "look  repeated images: 8 images show a particle that an earlier row shows" in capsys.readouterr().out
    # Both in one file, with its own images beside them.
    rows = [*range(10), 0, 9]
    particle = torch.tensor(rows) % 4
    names = [f"{number + 1:06d}@Extract/x.mrcs" for number in particle.tolist()]
    path = star(tmp_path / "c.star", stack, rows, poses[particle], ImageOriginalName=names)
    found = copies(read_star(path), C1)
    assert (found.images, found.rows, found.again) == (10, 2, 6)
    assert read_table(ChoiceOptions(unique=True), path).row.tolist() == [0, 1, 2, 3]


def test_copies_in_both_halves_may_be_left_out_where_one_of_them_stays(stack, poses, tmp_path):
    names = [f"{row // 2 + 1:06d}@Extract/x.mrcs" for row in range(8)]
    halves = {"ImageOriginalName": names, "RandomSubset": [1, 2] * 4}
    alike = star(tmp_path / "a.star", stack, range(8), poses[torch.arange(8) // 2], **halves)
    with pytest.raises(InputError, match=r"a particle .*--redraw-halves, or keep the first row of each with --unique"):
        settle_halves(read_star(alike), 0)
    assert settle_halves(read_table(ChoiceOptions(unique=True), alike), 0).tolist() == [1] * 4
    turned = star(tmp_path / "b.star", stack, range(8), poses[:8], **halves)
    with pytest.raises(InputError, match=r"--redraw-halves$"):
        settle_halves(read_star(turned), 0)


def test_subtracted_after_expansion_are_images_of_their_own(stack, poses, tmp_path):
    """A part is left in each under another pose: they share noise and a half-set, not their weight."""
    group = dihedral(2).elements
    turned = torch.cat([pose @ group for pose in poses[:6]])
    names = [f"{row // 4 + 1}@Extract/x.mrcs" for row in range(24)]
    path = star(tmp_path / "a.star", stack, range(24), turned, ImageOriginalName=names)
    found = copies(read_star(path), C1)
    assert (found.images, found.rows, found.again, found.expansion) == (24, 0, 18, dihedral(2))
    assert found.text == (
        "symmetry-expanded by D2: 6 particles in 24 rows, with images of their own (by uid or rlnImageOriginalName)"
    )
    particles = open_stack(BackprojectConfig(), path)
    assert particles.share is None
    assert torch.equal(particles.half, particles.half[torch.arange(24) // 4 * 4])
    assert read_table(ChoiceOptions(unique=True), path).left_out == 0
    # Where all poses are one by the symmetry that is asked for, so are they.
    assert open_stack(configure(BackprojectConfig, symmetry="D2"), path).share.tolist() == [0.25] * 24
    assert read_table(ChoiceOptions(unique=True, symmetry="D2"), path).row.tolist() == list(range(0, 24, 4))
    # One is left per particle by ordinary subtraction.
    plain = star(tmp_path / "b.star", stack, range(6), poses[:6], ImageOriginalName=names[::4])
    assert copies(read_star(plain), C1).text == ""


def test_marks_know_links_and_particles(stack, poses, tmp_path):
    """As much of what an image is known by as another run, or another machine, can know."""
    shutil.copy(stack, tmp_path / "one.mrcs")
    os.link(tmp_path / "one.mrcs", tmp_path / "linked.mrcs")
    one, linked_to = (
        image_marks(read_star(star(tmp_path / f"{name}.star", tmp_path / f"{name}.mrcs", rows, poses[:4])))
        for name, rows in (("one", range(4)), ("linked", range(2, 6)))
    )
    assert one.shape == (4, 3)
    assert len(marks_in(one, linked_to)) == len(marks_in(linked_to, one)) == 2
    first, second = (image_marks(read_table(ChoiceOptions(), path)) for path in restacked(tmp_path, stack, poses))
    assert len(marks_in(first, second)) == 8
    assert len(marks_in(one, first)) == 0
    twice = image_marks(read_star(star(tmp_path / "t.star", stack, [0, 1, 0], poses[:3])))
    assert len(twice) == 2


def test_one_micrograph_however_its_name_is_spelled(stack, poses, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "there.mrc").touch()
    names = [
        "m/there.mrc",
        "./m/there.mrc",
        str(tmp_path / "m/there.mrc"),
        "m//there.mrc",
        "m/gone.mrc",
        "./m/gone.mrc",
    ]
    table = read_table(ChoiceOptions(), star(tmp_path / "a.star", stack, range(6), poses[:6], MicrographName=names))
    assert table.micrograph.tolist() == [0, 0, 0, 0, 1, 1]
    assert table.micrograph_names == ("m/there.mrc", "m/gone.mrc")


def test_micrographs_that_are_gone_go_by_the_end_of_their_names(stack, poses, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "there.mrc").touch()
    first = ["/old/project/m/gone.mrc", "/other/project/m/gone.mrc", "/old/project/m/there.mrc", "am/gone.mrc"]
    second = ["m/gone.mrc", "m/there.mrc", "gone.mrc", "project/m/gone.mrc"]
    one = star(tmp_path / "a.star", stack, range(4), poses[:4], MicrographName=first)
    two = star(tmp_path / "b.star", stack, range(4, 8), poses[4:8], MicrographName=second)
    merged = read_table(ChoiceOptions(merge=(two,)), one)
    assert merged.micrograph.tolist() == [0, 0, 1, 2, 0, 1, 3, 0]
    assert merged.micrograph_names == ("m/gone.mrc", "m/there.mrc", "am/gone.mrc", "gone.mrc")
    other_way = read_table(ChoiceOptions(merge=(one,)), two)
    assert other_way.micrograph.tolist() == [0, 1, 2, 0, 0, 0, 1, 3]


def test_coordinates_that_are_none_are_places_that_are_not_known(stack, poses, tmp_path):
    columns = {"MicrographName": ["m.mrc"] * 4, "CoordinateX": ["nan", 10, 900, "-nan"], "CoordinateY": [5, 10, 900, 5]}
    table = read_star(star(tmp_path / "a.star", stack, range(4), poses[:4], **columns))
    assert torch.isfinite(table.position).all(1).tolist() == [False, True, True, False]


def test_linked_rows_are_connected_over_others():
    one, other = torch.tensor([7, 7, 3, 4, 5]), torch.tensor([1, 2, 2, 9, 8])
    assert linked(one, other).tolist() == [0, 0, 0, 1, 2]
    assert linked(one).tolist() == [0, 0, 1, 2, 3]


def test_overlapping_selections_share_no_image_between_halves(stack, poses, tmp_path):
    micrographs = [f"mic{i // 3}.mrc" for i in range(IMAGES)]
    a = star(tmp_path / "a" / "a.star", stack, range(16), poses[:16], MicrographName=micrographs[:16])
    b = star(tmp_path / "b" / "b.star", stack, range(8, 24), poses[8:], MicrographName=micrographs[8:])
    for seed in range(4):
        merged = open_stack(configure(BackprojectConfig, merge=(b,), seed=seed), a)
        assert parted(merged) == 0
        assert [int((merged.half == half).sum()) for half in (1, 2)] == pytest.approx([16, 16], abs=6)
        for number in merged.table.micrograph.unique():
            assert len(merged.half[merged.table.micrograph == number].unique()) == 1
    assert len(merged.table.micrograph_names) == len(merged.table.micrograph.unique()) == 8
    found = copies(merged.table, C1)
    assert (found.images, found.rows, found.expansion, found.crossing) == (24, 8, None, 0)


def test_noise_in_both_halves_would_correlate(stack, poses, tmp_path):
    """What is at stake: the same images in both halves give noise an FSC near 1, whole copies give none."""
    twice = [i for i in range(IMAGES) for _ in "12"]
    path = star(tmp_path / "p.star", stack, twice, poses[twice])
    good = open_stack(BackprojectConfig(), path)
    assert parted(good) == 0
    bad = open_stack(BackprojectConfig(), path)
    bad = replace(bad, table=replace(bad.table, half=torch.tensor([1, 2] * IMAGES)))

    def likeness(particles):
        maps = [equations_of(particles.only(half)).solve() for half in (1, 2)]
        return float(fsc_curve(*maps, GRID).value[3:].mean())

    assert likeness(bad) > 0.99
    assert abs(likeness(good)) < 0.2


def test_half_sets_of_the_file_that_cross_are_refused(stack, poses, tmp_path, capsys):
    rows = [*range(12), *range(9)]
    half = [1 + i % 2 for i in range(12)] + [2 - i % 2 for i in range(6)] + [1 + i % 2 for i in range(6, 9)]
    path = star(tmp_path / "p.star", stack, rows, poses[rows], RandomSubset=half)
    with pytest.raises(InputError, match=r"cross: 12 of 21 rows .* row 1, .* row 13.*--redraw-halves.*--unique"):
        open_stack(BackprojectConfig(), path)
    assert main(["backproject", str(path), "-o", str(tmp_path / "run")]) == 2
    assert "--redraw-halves" in capsys.readouterr().err
    redrawn = open_stack(configure(BackprojectConfig, redraw_halves=True), path)
    assert parted(redrawn) == 0
    kept = open_stack(configure(BackprojectConfig, unique=True), path)
    assert kept.half.tolist() == half[:12]


def test_rows_without_a_half_follow_their_copies(stack, poses, tmp_path):
    a = star(tmp_path / "a.star", stack, range(12), poses[:12], RandomSubset=[1 + i % 2 for i in range(12)])
    b = star(tmp_path / "b.star", stack, range(6, 20), poses[6:20])
    for first, second in ((a, b), (b, a)):
        merged = open_stack(configure(BackprojectConfig, merge=(second,)), first)
        assert parted(merged) == 0
        assert merged.half[~merged.table.drawn].tolist() == [1 + i % 2 for i in range(12)]
        assert [int((merged.half == half).sum()) for half in (1, 2)] == [13, 13]


def test_all_rows_without_a_half_may_be_copies(stack, poses, tmp_path):
    one = star(tmp_path / "a.star", stack, range(4), poses[:4], RandomSubset=[1, 2, 1, 2])
    two = star(tmp_path / "b.star", stack, range(4), poses[:4])
    assert settle_halves(read_table(ChoiceOptions(merge=(two,)), one), 0).tolist() == [1, 2, 1, 2] * 2


def test_drawing_keeps_copies_and_places_together():
    alone = torch.zeros(40, dtype=torch.int64)
    image = torch.arange(40) // 2
    half = draw_halves(alone, 0, image)
    assert half[::2].tolist() == half[1::2].tolist()
    assert int((half == 1).sum()) == 20
    place = torch.cat([torch.arange(20), torch.arange(20)])
    half = draw_halves(alone, 0, torch.arange(40), place)
    assert half[:20].tolist() == half[20:].tolist()
    # Places that are the same of all mean nothing, nor do two stacks that stand for the micrographs of all.
    assert sorted(torch.bincount(draw_halves(alone, 0, torch.arange(40), alone)).tolist()) == [0, 20, 20]
    half = draw_halves(torch.arange(40) // 20, 0)
    assert {tuple(half[part].unique().tolist()) for part in (slice(20), slice(20, 40))} == {(1, 2)}


def test_micrographs_over_files(stack, poses, tmp_path):
    """Found ones go by their files, others by their names."""
    for project in ("one", "two"):
        (tmp_path / project / "mics").mkdir(parents=True)
        for name in ("a", "b"):
            (tmp_path / project / "mics" / f"{name}.mrc").write_text(project)
    (tmp_path / "one" / "mics" / "alias.mrc").symlink_to(tmp_path / "one" / "mics" / "b.mrc")
    first = ["mics/a.mrc", "mics/b.mrc", "mics/gone.mrc"]
    second = ["mics/a.mrc", "../one/mics/alias.mrc", "mics/gone.mrc"]
    one = star(tmp_path / "one" / "p.star", stack, range(3), poses[:3], MicrographName=first)
    two = star(tmp_path / "two" / "p.star", stack, range(3, 6), poses[3:6], MicrographName=second)
    merged = read_table(ChoiceOptions(merge=(two,)), one)
    a, b, gone, other_a, alias, other_gone = merged.micrograph.tolist()
    assert b == alias
    assert gone == other_gone
    assert len({a, other_a, b, gone}) == 4
    assert merged.micrograph_names[a] == merged.micrograph_names[other_a] == "mics/a.mrc"
    away = star(tmp_path / "three" / "p.star", stack, [6], poses[6:7], MicrographName=["mics/a.mrc"])
    assert read_table(ChoiceOptions(merge=(away,)), one).micrograph.tolist() == [0, 1, 2, 0]
    # Stacks that stand for micrographs do so in a merged table.
    plain = star(tmp_path / "plain.star", stack, [7, 8], poses[:2])
    merged = read_table(ChoiceOptions(merge=(star(tmp_path / "more.star", stack, [9], poses[:1]),)), plain)
    assert merged.micrograph.tolist() == [0, 0, 0]


def test_particles_picked_twice(stack, poses, tmp_path):
    """Other images of the same place: together where half-sets are drawn, and told where the file parts them."""
    half = [1 + i // 12 for i in range(24)]
    x = [100.0 * (i % 12) for i in range(24)]
    shift = torch.zeros(24, 2)
    x[12:] = [value + 30 for value in x[12:]]
    shift[12:, 0] = 30  # the boxes lie 30 Å apart, the particles in the same place
    columns = {"MicrographName": ["m.mrc"] * 24, "CoordinateX": x, "CoordinateY": [50] * 24}
    path = star(tmp_path / "p.star", stack, range(24), poses, shift=shift, RandomSubset=half, **columns)
    found = copies(read_star(path), C1)
    assert (found.rows, found.crossing, found.close) == (0, 0, 24)
    assert "--redraw-halves" in found.near
    assert settle_halves(read_star(path), 0).tolist() == half
    drawn = open_stack(configure(BackprojectConfig, redraw_halves=True), path)
    assert drawn.half[:12].tolist() == drawn.half[12:].tolist()
    assert set(drawn.half.tolist()) == {1, 2}
    apart = star(tmp_path / "q.star", stack, range(24), poses, RandomSubset=half, **columns)
    assert copies(read_star(apart), C1).close == 0


def placed(table, x, y, micrograph=None):
    """A table with the particles at these places (Å)."""
    at = torch.stack([torch.as_tensor(x), torch.as_tensor(y)], 1).double()
    own = torch.zeros(len(table), dtype=torch.int64) if micrograph is None else micrograph
    return replace(
        table, coordinates=at, micrograph_pixel_size=torch.ones(len(table)).double(), micrograph=own, half=None
    )


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_those_within_twenty_angstroms(stack, poses, tmp_path, seed):
    """Against all pairs."""
    rng = torch.Generator().manual_seed(seed)
    count = 200
    table = read_star(
        star(tmp_path / "p.star", tmp_path / "s.mrcs", range(count), poses[:1].expand(count, 3, 3)), need_stacks=False
    )
    micrograph = torch.randint(4, (count,), generator=rng)
    at = 200 * torch.rand(count, 2, generator=rng).double()
    at[0], at[1], micrograph[:2] = torch.tensor([500.0, 500.0]), torch.tensor([520.0, 500.0]), 0
    table = placed(table, *at.T, micrograph)
    half = 1 + torch.randint(2, (count,), generator=rng)
    half[0], half[1] = 1, 2
    near = (torch.cdist(at, at) <= 20) & (micrograph[:, None] == micrograph)
    assert near[0, 1]
    wanted = (near & (half[:, None] != half)).any(1)
    assert copies(replace(table, half=half), C1).close == int(wanted.sum())
    reach = near
    for _ in range(8):
        reach = (reach.float() @ reach.float()) > 0
    place = _places(table)
    assert torch.equal(place[:, None] == place, reach)


def test_a_crowd_in_one_place_ends(stack, poses, tmp_path):
    """Dummy coordinates: all pairs of 20,000 would be 200,000,000."""
    count = 20_000
    table = read_star(star(tmp_path / "p.star", "s.mrcs", range(4), poses[:4]), need_stacks=False)
    table = table.take(torch.arange(4).repeat(count // 4))
    table = replace(table, image=torch.arange(count))
    x = 1e-3 * torch.rand(count, generator=torch.Generator().manual_seed(0)).double()
    x[-1] = 100.0
    assert _places(placed(table, x, x)).tolist() == [0] * (count - 1) + [1]
    assert copies(replace(placed(table, x, x), half=1 + torch.arange(count) % 2), C1).close == count - 1


def test_halves_that_part_neighbours_say_so(stack, poses, tmp_path, capsys):
    """A chain of neighbours with more than a third of all is dealt out one by one."""
    x = [15.0 * i for i in range(20)] + [1000.0, 2000, 3000, 4000]
    columns = {"MicrographName": ["m.mrc"] * 24, "CoordinateX": x, "CoordinateY": [50] * 24}
    path = star(tmp_path / "p.star", stack, range(24), poses, **columns)
    table = read_star(path)
    half = settle_halves(table, 0).tolist()
    beside = sum(any(half[j] != half[i] for j in (i - 1, i + 1) if 0 <= j < 20) for i in range(20))
    assert copies(replace(table, half=torch.tensor(half)), C1).close == beside > 0
    assert main(["check", str(path), "--metadata-only"]) == 1
    said = f"look  repeated particles: {beside} particles lie within 20 Å of one of the other half-set"
    assert said in capsys.readouterr().out
    log = Log()
    summary = backproject(BackprojectConfig(), path, tmp_path / "run", log)
    assert any(
        text.startswith(f"{beside} particles lie within 20 Å") and "more than a third" in text for text in log.warnings
    )
    assert summary["input"]["close_to_other_half"] == beside


def expanded(path, stack, poses, group, count=IMAGES, noise=0.0):
    """Every image under every element, its poses off by about ``noise`` degrees."""
    rng = np.random.default_rng(0)
    off = [axis_rotation(rng.normal(size=3), np.radians(noise)) for _ in range(count * len(group))]
    rows = np.repeat(np.arange(count), len(group))
    turned = torch.cat([pose @ group for pose in poses[:count]]) @ torch.from_numpy(np.stack(off))
    return star(path, stack, rows, turned)


@pytest.mark.parametrize(
    ("symbol", "noise"),
    [("C2", 0.0), ("C7", 2.0), ("D2", 3.0), ("D3", 0.0), ("T", 1.0), ("I2", 2.0), ("O", 4.0), ("I1", 4.0), ("C2", 9.0)],
)
def test_symmetry_expanded_sets_are_recognised(stack, poses, tmp_path, symbol, noise):
    path = expanded(tmp_path / "p.star", stack, poses, parse_symmetry(symbol).elements, 8, noise)
    for asked in ("C1", symbol):
        found = copies(read_star(path), parse_symmetry(asked))
        assert found.expansion == parse_symmetry(symbol)
        assert found.images == 8
    assert parted(open_stack(BackprojectConfig(), path)) == 0
    assert len(read_table(ChoiceOptions(unique=True), path)) == 8
    some = read_star(path).take(torch.arange(4 if symbol == "I2" else 3))
    assert copies(some, C1).expansion is None or parse_symmetry(symbol).order < 4


def test_copies_that_are_not_expanded(stack, poses, tmp_path):
    twice = [*range(IMAGES), *range(IMAGES)]
    again = star(tmp_path / "a.star", stack, twice, poses[twice])
    assert copies(read_star(again), dihedral(2)).expansion is None
    assert "poses" not in copies(read_star(again), dihedral(2)).text
    other = random_rotations(IMAGES, torch.Generator().manual_seed(9))
    realigned = star(tmp_path / "b.star", stack, twice, torch.cat([poses, other]))
    assert copies(read_star(realigned), dihedral(2)).expansion is None
    assert "poses that differ by" in copies(read_star(realigned), dihedral(2)).text


def test_expanded_sets_give_the_sums_of_the_symmetry(stack, poses, tmp_path):
    """Σ over n copies without symmetry is Σ over images with it; with both, copies count once."""
    group = dihedral(2).elements
    plain = star(tmp_path / "plain.star", stack, range(IMAGES), poses)
    more = expanded(tmp_path / "more.star", stack, poses, group)

    def sums(path, symmetry):
        return equations_of(open_stack(configure(BackprojectConfig, symmetry=symmetry), path))

    wanted = sums(plain, "D2")
    for symmetry in ("C1", "D2"):
        found = sums(more, symmetry)
        for name in ("linear", "kernel"):
            value = getattr(wanted, name)
            # The noise spectrum is that of 96 rows instead of 24 images: the same mean, summed in another order.
            torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("symmetry", ["C1", "D2"])
def test_what_latents_follow_is_asked_of_each_image_once(stack, poses, tmp_path, symmetry):
    """Rows of one image are no independent draws, and shuffles would take them for such."""
    path = expanded(tmp_path / "more.star", stack, poses, dihedral(2).elements)
    opened = open_stack(configure(BackprojectConfig, symmetry=symmetry), path)
    rows = torch.cat([opened.only(half).rows for half in (1, 2)])
    assert len(rows) == 4 * IMAGES
    first, about = circumstances(opened, torch.arange(len(rows) * opened.symmetry.order).double())
    assert first.tolist() == list(range(0, len(rows) * opened.symmetry.order, 4 * opened.symmetry.order))
    assert len(about.rotation) == IMAGES
    assert torch.equal(about.brightness, first.double())
    assert torch.equal(about.rotation, opened.table.poses.rotation[rows[::4]])


def test_copies_of_an_expanded_set_that_were_refined_count_once(stack, poses, tmp_path):
    """Local searches move a copy by up to 15°: still nearer to its own pose than to that of another element."""
    group = dihedral(2).elements
    axes = torch.from_numpy(np.random.default_rng(1).normal(size=(96, 3)))
    off = torch.from_numpy(np.stack([axis_rotation(axis, np.radians(13)) for axis in axes.numpy()]))
    turned = torch.cat([pose @ group for pose in poses]) @ off
    refined = read_star(star(tmp_path / "a.star", stack, np.repeat(range(24), 4), turned))
    assert copies(refined, C1).expansion == dihedral(2)
    assert shares(refined, dihedral(2)).tolist() == [0.25] * 96
    assert shares(refined, C1) is None
    # So do two of a set without expansion only where they agree: neighbours of a helix would be lost otherwise.
    turn = torch.from_numpy(axis_rotation([0.0, 0, 1], np.radians(22)))
    helix = read_star(star(tmp_path / "b.star", stack, [*range(24)] * 2, torch.cat([poses, poses @ turn])))
    assert copies(helix, C1).expansion is None
    assert shares(helix, C1) is None


def test_shares_of_an_image_with_many_poses_are_bounded(stack, poses, tmp_path):
    """Each pose of few, and the rest as one."""
    table = read_star(star(tmp_path / "p.star", "s.mrcs", [0] * 24, poses), need_stacks=False)
    few = shares(table, C1)
    assert few is None or float(few.sum()) <= 24
    rotation = random_rotations(20_000, torch.Generator().manual_seed(3))
    many = table.take(torch.zeros(20_000, dtype=torch.int64))
    many = replace(many, poses=Poses(rotation, many.poses.shift))
    assert float(shares(many, C1).double().sum()) == pytest.approx(121, abs=1e-3)


def test_copies_count_once(stack, poses, tmp_path):
    rows = [*range(IMAGES), *range(10)]
    turn = torch.from_numpy(axis_rotation([1.0, 2, 3], np.radians(1.5)))
    path = star(tmp_path / "p.star", stack, rows, torch.cat([poses, poses[:10] @ turn]))
    doubled = open_stack(BackprojectConfig(), path)
    assert doubled.share.tolist() == [0.5] * 10 + [1.0] * 14 + [0.5] * 10
    once = open_stack(configure(BackprojectConfig, unique=True), path)
    assert once.share is None
    weights = [equations_of(part).kernel.max() for part in (doubled, once)]
    assert float(weights[0] / weights[1]) == pytest.approx(1, abs=0.05)


def test_image_engine_counts_copies_once(stack, poses, tmp_path):
    rows = [*range(IMAGES), *range(10)]
    path = star(tmp_path / "p.star", stack, rows, poses[rows])
    gaussians = Gaussians(torch.zeros(1, 3), 100 * torch.eye(3)[None], torch.ones(1))

    def total(unique):
        particles = open_stack(configure(BackprojectConfig, unique=unique), path)
        (batch,) = particles.sequential(100)
        return float(ImageObjective(particles, batch=100, seed=0).loss(gaussians, batch)) * len(batch)

    assert total(False) == pytest.approx(total(True), rel=1e-5)


def test_unique_comes_after_subset_and_class_and_before_first(stack, poses, tmp_path):
    rows = [0, 1, 2, 0, 1, 2, 3, 4]
    path = star(tmp_path / "p.star", stack, rows, poses[rows], ClassNumber=[1, 1, 1, 2, 2, 2, 2, 2])

    def chosen(**options):
        table = read_table(ChoiceOptions(unique=True, **options), path)
        return table.row.tolist(), table.left_out

    assert chosen() == ([0, 1, 2, 6, 7], 3)
    assert chosen(first=4) == ([0, 1, 2, 6], 3)
    assert chosen(particle_class=2, first=2) == ([3, 4], 0)
    np.savetxt(tmp_path / "rows.txt", [4, 1, 7], fmt="%d")
    assert chosen(subset=tmp_path / "rows.txt") == ([4, 7], 1)
    merged = read_table(ChoiceOptions(unique=True, merge=(path,)), path)
    assert (merged.row.tolist(), merged.left_out) == ([0, 1, 2, 6, 7], 11)


def test_subsets_find_images_through_links(stack, poses, tmp_path):
    path = star(tmp_path / "p.star", stack, range(8), poses[:8])
    (tmp_path / "import").mkdir()
    (tmp_path / "import" / "123_s.mrcs").symlink_to(stack)
    chosen = star(tmp_path / "import" / "sub.star", "123_s.mrcs", [5, 2], poses[:2])
    assert read_table(ChoiceOptions(subset=chosen), path).row.tolist() == [2, 5]
    # Folders are compared whole: "job1" is not the end of "myjob1".
    table = read_star(path)
    for folder in ("myjob1", "job1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.mrcs").write_bytes(stack.read_bytes())
    stacks = tuple(tmp_path / folder / "t.mrcs" for folder in ("myjob1", "job1"))
    two = replace(table, stacks=stacks, stack=torch.arange(8) // 4, image=torch.arange(8) % 4)
    write_table(tmp_path / "two.star", two, None, tmp_path)
    (tmp_path / "away").mkdir()
    named = star(tmp_path / "away" / "sub.star", "/elsewhere/job1/t.mrcs", [1], poses[:1])
    named.write_text(named.read_text().replace("/elsewhere/", ""))
    assert read_table(ChoiceOptions(subset=named), tmp_path / "two.star").row.tolist() == [5]


def test_a_subset_that_names_fewer_rows_than_images_have_is_told(stack, poses, tmp_path):
    rows = [0, 0, 1, 1, 2, 2]
    whole = star(tmp_path / "a.star", stack, rows, poses[:6])
    part = star(tmp_path / "b.star", stack, rows[::2], poses[:3])
    table = read_table(ChoiceOptions(subset=part), whole)
    assert len(table) == 6
    assert any("names 3 rows, and 6 of" in text for text in table.warnings)
    assert not any("names 6 rows" in text for text in read_table(ChoiceOptions(subset=whole), whole).warnings)


def test_preprocess_writes_an_image_once(stack, poses, tmp_path):
    """Copies go on naming one image, also where their origins differ."""
    rows = [*range(IMAGES), *range(IMAGES)]
    shift = torch.cat([torch.full((IMAGES, 2), 9.0), torch.full((IMAGES, 2), 14.0)])
    path = star(tmp_path / "p.star", stack, rows, poses[rows], shift=shift)
    made = read_star(preprocess(PreprocessConfig(), path, tmp_path / "new"))
    assert StackFile(tmp_path / "new" / "particles.mrcs").count == IMAGES
    assert made.image.tolist() == rows
    before = read_star(path)
    moved = before.poses.shift - made.poses.shift
    torch.testing.assert_close(moved, torch.full((2 * IMAGES, 2), 8.0).double(), rtol=0, atol=1e-6)  # two whole pixels


def test_null_tests_alter_an_image_once(stack, poses, tmp_path):
    twice = [*range(IMAGES), *range(IMAGES)]
    particles = open_stack(BackprojectConfig(), star(tmp_path / "p.star", stack, twice, poses[twice]))
    table = read_star(_write("noise", particles, tmp_path, 3, seed=0))
    assert StackFile(tmp_path / "particles.mrcs").count == IMAGES
    assert table.image.tolist() == twice
    assert settle_halves(table, 0).tolist() == particles.half.tolist()


def test_copies_get_uids_of_their_own(stack, poses, tmp_path):
    twice = [*range(6), *range(6)]
    write_cs(tmp_path / "p.cs", read_star(star(tmp_path / "p.star", stack, twice, poses[twice])), None)
    uid = np.load(tmp_path / "p.cs")["uid"]
    assert len(np.unique(uid)) == 12


@pytest.mark.slow
def test_check_and_run_say_what_is_repeated(tmp_path, capsys):
    config = SimulateConfig(
        box=24, pixel_size=6.0, particles=60, atoms=300, snr=0.5, micrograph_particles=6, half_sets=False
    )
    path = simulate(config, None, tmp_path / "sim")
    table = read_star(path)
    a, b = path.parent / "a.star", path.parent / "b.star"
    write_table(a, replace(table, particle_class=torch.arange(60) % 3).take(torch.arange(40)), None)
    write_table(b, table.take(torch.arange(20, 60)), None)
    code = main(["check", str(a), "--merge", str(b), "--metadata-only", "--json"])
    items = {item["name"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert code == 1
    assert items["repeated images"]["verdict"] == "look"
    assert items["repeated images"]["text"].startswith("20 rows name an image that an earlier row names too")
    assert items["classes"]["verdict"] == "look"
    assert "class 0: 14, class 1: 13, class 2: 13" in items["classes"]["text"]
    log = Log()
    summary = backproject(configure(BackprojectConfig, merge=(b,)), a, tmp_path / "run", log)
    about = summary["input"]
    assert (about["particles"], about["images"], about["repeated_rows"], about["micrographs"]) == (80, 60, 20, 10)
    assert about["half_sets_from"] == "drawn per micrograph"
    assert any("20 rows name an image" in text for text in log.warnings)
    assert any("3 classes are mixed" in text and "--class" in text for text in log.warnings)
    used = read_star(tmp_path / "run" / "run_data.star")
    assert copies(used, C1).crossing == 0
    unique = backproject(configure(BackprojectConfig, merge=(b,), unique=True), a, tmp_path / "unique", log)
    assert (unique["input"]["particles"], unique["input"]["left_out_rows"]) == (60, 20)
    again = backproject(
        configure(BackprojectConfig, redraw_halves=True, seed=5), tmp_path / "run" / "run_data.star", tmp_path / "again"
    )
    assert again["input"]["half_sets_from"] == "redrawn per micrograph"


def test_classes_of_several_files_are_not_compared(stack, poses, tmp_path):
    one = star(tmp_path / "a.star", stack, range(4), poses[:4], ClassNumber=[1] * 4)
    two = star(tmp_path / "b.star", stack, range(4, 8), poses[:4], ClassNumber=[2] * 4)
    assert mixed_classes(read_table(ChoiceOptions(merge=(two,)), one)) == ""
    mixed = star(tmp_path / "c.star", stack, range(4), poses[:4], ClassNumber=[1, 2, 2, 2])
    assert "c.star: 2 classes are mixed (class 1: 1, class 2: 3)" in mixed_classes(
        read_table(ChoiceOptions(merge=(mixed,)), one)
    )
    assert mixed_classes(read_table(ChoiceOptions(particle_class=2), mixed)) == ""


def test_added_sums_may_not_hold_images_of_the_other_half(stack, poses, tmp_path):
    half = [1 + i % 2 for i in range(12)]
    one = star(tmp_path / "a.star", stack, range(12), poses[:12], RandomSubset=half)
    same = star(tmp_path / "b.star", stack, range(6, 18), poses[6:18], RandomSubset=half)
    other = star(tmp_path / "c.star", stack, range(7, 19), poses[7:19], RandomSubset=half)
    backproject(configure(BackprojectConfig, keep_statistics=True), one, tmp_path / "one")
    add, log = configure(BackprojectConfig, add_statistics=(tmp_path / "one",)), Log()
    backproject(add, same, tmp_path / "same", log)
    assert any("3 images" in text and "count twice" in text for text in log.warnings)
    with pytest.raises(InputError, match=r"half1, and .*half2, hold the same images"):
        backproject(add, other, tmp_path / "other")
    with pytest.raises(InputError, match="is given twice"):
        backproject(configure(BackprojectConfig, add_statistics=(tmp_path / "one",) * 2), same, tmp_path / "twice")


def test_added_sums_of_particles_in_another_stack_are_noticed(stack, poses, tmp_path):
    one, two = restacked(tmp_path, stack, poses, 12)
    backproject(configure(BackprojectConfig, keep_statistics=True), one, tmp_path / "one")
    log = Log()
    backproject(configure(BackprojectConfig, add_statistics=(tmp_path / "one",)), two, tmp_path / "same", log)
    assert sum("6 images" in text and "count twice" in text for text in log.warnings) == 2
    with pytest.raises(InputError, match=r"half1, and .*half2, hold the same images"):
        backproject(
            configure(BackprojectConfig, add_statistics=(tmp_path / "one",), redraw_halves=True, seed=1),
            two,
            tmp_path / "other",
        )


def test_sums_of_earlier_versions_know_their_images_by_path(stack, poses, tmp_path):
    path = star(tmp_path / "a.star", stack, range(12), poses[:12])
    sums = begin(open_stack(BackprojectConfig(), path))
    marks = sums.images
    sums.images = marks[:, 0].contiguous()
    sums.save(tmp_path / "old.safetensors")
    assert len(marks_in(held_images(tmp_path / "old.safetensors"), marks)) == 12
    sums.load(tmp_path / "old.safetensors")
    assert sums.images.shape == (12, 3)
    sums.images = marks[:, :2].contiguous()
    sums.save(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="not statistics of emsplat, or damaged"):
        held_images(tmp_path / "bad.safetensors")


def test_an_empty_list_of_rows_is_refused_in_our_words(stack, poses, tmp_path):
    path = star(tmp_path / "a.star", stack, range(4), poses[:4])
    (tmp_path / "rows.txt").write_text("")
    config = ChoiceOptions(subset=tmp_path / "rows.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"rows\.txt: expected row numbers from 0 to 3"):
            read_table(config, path)


def test_too_few_different_particles_are_told(stack, poses, tmp_path, capsys):
    same = star(tmp_path / "a.star", stack, [0] * 6, poses[:6])
    with pytest.raises(InputError, match=r"half-set 2 has 0 particles.* 6 rows show 1 different particle; .*--merge"):
        open_stack(BackprojectConfig(), same)
    assert main(["check", str(same), "--metadata-only"]) == 2
    assert "6 in 1 stack from 1 micrograph or group, which show 1; expected at least 4" in capsys.readouterr().out
    one = star(tmp_path / "b.star", stack, range(6), poses[:6], RandomSubset=[1] * 6)
    with pytest.raises(InputError, match=r"half-set 2 has 0 particles; .*--redraw-halves.*--merge"):
        open_stack(BackprojectConfig(), one)
    assert sorted(open_stack(configure(BackprojectConfig, redraw_halves=True), one).half.tolist()) == [1, 1, 1, 2, 2, 2]
    three = star(tmp_path / "c.star", stack, range(3), poses[:3])
    with pytest.raises(InputError, match=r"c\.star: 3 particles; expected at least 4, .*--first"):
        open_stack(BackprojectConfig(), three)
