"""Which file an image name means, when it is read and when it is written."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from emsplat.errors import InputError
from emsplat.io.cryosparc import read_cs, write_cs
from emsplat.io.mrc import write_map, writing_stack
from emsplat.io.particles import read_particles, write_used
from emsplat.io.paths import Names, find_stacks, say_folders, say_start
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import write_table
from emsplat.io.table import merge_tables
from emsplat.types import Grid
from test_relion import COLUMNS, OPTICS, ROWS, particles, write


def stack(path, seed=0, count=8, box=8):
    """A stack whose images follow from the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_stack(path, count, Grid(box, 2.0)) as writer:
        writer(torch.randn(count, box, box, generator=torch.Generator().manual_seed(seed)))
    return path


def star(path, *stacks):
    """A STAR file of four particles, the first ones in these stacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [stacks[min(i, len(stacks) - 1)] for i in range(4)]
    rows = [f"{i + 1}@{names[i]} " + row.split(" ", 1)[1] for i, row in enumerate(ROWS)]
    return write(path.parent, OPTICS + particles(rows), path.name)


def where(path, name, datadir=None):
    found = find_stacks([name], path, datadir)
    return found.paths[0], found.folders[0]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The program runs in an empty folder that is no parent of the files."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_folder_of_the_file_then_datadir_then_where_the_program_runs(tmp_path, elsewhere):
    source, data = tmp_path / "project" / "Refine3D" / "job1" / "p.star", tmp_path / "data"
    for folder in (elsewhere, data, tmp_path / "project"):  # each found goes before the last, and all are copies
        stack(folder / "Extract" / "a.mrcs")
        assert where(source, "Extract/a.mrcs", data) == (folder / "Extract" / "a.mrcs", folder)


@pytest.mark.parametrize("name", ["Extract/a.mrcs", "/Extract/a.mrcs", ">Extract/a.mrcs", "./Extract//a.mrcs"])
def test_spellings_of_a_name(tmp_path, elsewhere, name):
    a = stack(tmp_path / "project" / "Extract" / "a.mrcs")
    assert where(tmp_path / "project" / "p.star", name) == (a, a.parents[1])


def test_an_absolute_path_that_exists_is_meant(tmp_path, elsewhere):
    a = stack(tmp_path / "project" / "a.mrcs", 1)
    stack(tmp_path / "far" / str(a).lstrip("/"), 2)
    assert where(tmp_path / "far" / "p.star", str(a)) == (a, Path("/"))
    assert where(tmp_path / "far" / "p.star", str(a.with_suffix(".mrc"))) == (a, Path("/"))


def test_the_last_parts_of_a_name_suffice_below_datadir(tmp_path, elsewhere):
    a = stack(tmp_path / "data" / "Movies" / "a.mrcs")
    for datadir in (tmp_path / "data", a.parent):
        assert where(tmp_path / "far" / "p.star", "Extract/job1/Movies/a.mrcs", datadir) == (a, datadir)


@pytest.mark.parametrize("other", ["project", "data", "elsewhere"])
def test_candidates_that_differ_are_an_error_that_names_both(tmp_path, elsewhere, other):
    source = star(tmp_path / "project" / "job1" / "p.star", "a.mrcs")
    first, second = stack(source.parent / "a.mrcs", 1), stack(tmp_path / other / "a.mrcs", 2)
    remedy = {"project": "full path", "data": "leave --datadir out", "elsewhere": "start elsewhere"}[other]
    with pytest.raises(InputError, match=rf'"a\.mrcs" may be {first} or {second}, which differ; .*{remedy}'):
        read_star(source, tmp_path / "data", need_stacks=False)
    second.unlink()
    assert read_star(source, tmp_path / "data").stacks == (first,)


def test_one_byte_is_a_difference_and_a_copy_or_a_link_is_none(tmp_path, elsewhere):
    """Also in a file that is compared at some places alone; the end is one of them."""
    source = tmp_path / "project" / "p.star"
    first = stack(source.parent / "a.mrcs", count=600, box=32)
    assert first.stat().st_size > 2**21
    other = tmp_path / "a.mrcs"
    shutil.copyfile(first, other)
    assert where(source, "a.mrcs")[0] == first
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(InputError, match="differ"):
        find_stacks(["a.mrcs"], source, None)
    other.unlink()
    other.symlink_to(first)
    assert where(source, "a.mrcs")[0] == first


def test_endings_stand_for_each_other_and_may_not_differ(tmp_path, elsewhere):
    source = tmp_path / "p.star"
    one = stack(tmp_path / "a.mrc", 1)
    assert where(source, "a.mrcs")[0] == one
    other = stack(tmp_path / "a.mrcs", 2)
    with pytest.raises(InputError, match=rf"may be {other} or {one}, which differ"):
        find_stacks(["a.mrcs"], source, None)
    stack(one, 1, count=1, box=64)  # a micrograph that is called like it
    assert where(source, "a.mrcs")[0] == other
    write_map(one, torch.ones(8, 8, 8), 2.0)  # the map that came of it
    assert where(source, "a.mrcs")[0] == other
    shutil.copyfile(other, one)
    assert where(source, "a.mrc")[0] == one


def test_two_names_of_one_file_are_an_error_but_for_links(tmp_path, elsewhere):
    flat = tmp_path / "flat"
    stack(flat / "stack.mrcs")
    source = star(tmp_path / "p.star", "grid1/stack.mrcs", "grid2/stack.mrcs")
    with pytest.raises(InputError, match=r'"grid1/stack\.mrcs" and "grid2/stack\.mrcs" are two names.*--datadir'):
        read_star(source, flat, need_stacks=False)
    for name in ("grid1", "grid2"):
        (flat / name).mkdir()
        (flat / name / "stack.mrcs").symlink_to(flat / "stack.mrcs")
    table = read_star(source, flat)
    assert table.stacks == (flat / "grid1" / "stack.mrcs",)  # one file is one stack
    assert table.stack.tolist() == [0, 0, 0, 0]
    assert (
        read_star(star(tmp_path / "flat" / "q.star", "stack.mrcs", str(flat / "stack.mrcs"))).stack.tolist() == [0] * 4
    )


def test_links_to_the_metadata_file_are_followed(tmp_path, elsewhere):
    a = stack(tmp_path / "project" / "Extract" / "a.mrcs", 1)
    target = star(tmp_path / "project" / "Refine3D" / "job1" / "run_data.star", "Extract/a.mrcs")
    link = tmp_path / "home" / "run_data.star"
    link.parent.mkdir()
    link.symlink_to(os.path.relpath(target, link.parent))
    assert where(link, "Extract/a.mrcs") == (a, tmp_path / "project")
    b = stack(link.parent / "Extract" / "a.mrcs", 1)
    assert where(link, "Extract/a.mrcs") == (b, link.parent)  # a copy where the link is goes first
    stack(b, 2)
    with pytest.raises(InputError, match=f"may be {b} or {a}, which differ"):
        read_star(link)


def test_parents_are_those_of_the_folder_and_not_of_its_spelling(tmp_path, elsewhere):
    """../project/p.star does not lie below where the program runs; neither does what is reached through a link."""
    a = stack(tmp_path / "project" / "a.mrcs", 1)
    stack(elsewhere / "deep" / "a.mrcs", 2)
    os.chdir(elsewhere / "deep" / "..")
    assert where(Path("deep/../../project/p.star"), "a.mrcs")[0] == a
    (elsewhere / "link").symlink_to(tmp_path / "project")
    assert where(Path("link/p.star"), "a.mrcs") == (elsewhere / "link" / "a.mrcs", elsewhere / "link")


def test_a_missing_stack_says_where_it_was_looked_for(tmp_path, elsewhere):
    source = star(tmp_path / "project" / "p.star", "a.mrcs", "b.mrcs")
    stack(source.parent / "b.mrcs")
    expected = (
        rf'1 of 2 image stacks are missing, the first is "a\.mrcs"; looked for it from {source.parent} and its '
        rf"parents, {tmp_path / 'data'}, {elsewhere}; .*--datadir"
    )
    with pytest.raises(InputError, match=expected):
        read_star(source, tmp_path / "data")
    table = read_star(source, need_stacks=False)
    assert table.stacks == (Path("a.mrcs"), source.parent / "b.mrcs")  # as written where it is missing


def test_the_folders_that_were_used_are_told(tmp_path, elsewhere):
    source = star(tmp_path / "project" / "p.star", "a.mrcs", "b.mrcs")
    stack(source.parent / "a.mrcs")
    stack(elsewhere / "b.mrcs")
    table = read_star(source)
    assert table.folders == (source.parent, elsewhere)
    assert say_folders(table.folders) == f"image paths start from {source.parent}, {elsewhere}"
    assert any(f"1 from {source.parent}, 1 from {elsewhere}" in warning for warning in table.warnings)
    assert merge_tables([table, table]).folders == table.folders


# Writing.


def same_files(one, other):
    return [one.stacks[i].resolve() for i in one.stack] == [other.stacks[i].resolve() for i in other.stack]


@pytest.fixture
def project(tmp_path, elsewhere):
    """A RELION project: stacks, and a STAR file that names them from the project folder."""
    stack(tmp_path / "project" / "Extract" / "a.mrcs", 1)
    stack(tmp_path / "project" / "Extract" / "b.mrcs", 2)
    source = tmp_path / "project" / "Refine3D" / "job1" / "run_data.star"
    return star(source, "Extract/a.mrcs", "Extract/b.mrcs").parents[2]


def image_names(path):
    return [word.strip("'") for word in path.read_text().split() if "@" in word]


@pytest.mark.parametrize("ending", [".star", ".cs"])
def test_written_files_find_their_images_from_where_they_lie(project, tmp_path, monkeypatch, ending):
    source = project / "Refine3D" / "job1" / "run_data.star"
    table = read_star(source)
    for folder in (project / "External" / "job2", tmp_path / "results"):
        folder.mkdir(parents=True)
        target = folder / f"out{ending}"
        if ending == ".star":
            write_used(table, target, None)
        else:
            write_cs(target, table, None)
        assert same_files(read_particles(target), table)
        if ending == ".star":
            names = image_names(target)
            if folder.is_relative_to(project):  # as RELION needs them
                assert names == image_names(source)
            else:
                assert names[0] == f"000001@{project}/Extract/a.mrcs"
        monkeypatch.chdir(folder.parent)
        assert same_files(read_particles(Path(folder.name) / f"out{ending}"), table)


def test_a_name_that_means_another_file_from_there_is_not_kept(project, tmp_path):
    table = read_star(project / "Refine3D" / "job1" / "run_data.star")
    other = stack(tmp_path / "results" / "Extract" / "a.mrcs", 3)
    write_used(table, tmp_path / "results" / "out.star", None)
    assert same_files(read_star(tmp_path / "results" / "out.star"), table)
    inside = project / "External" / "out.star"
    stack(project / "External" / "Extract" / "b.mrcs", 4)
    write_used(table, inside, None)
    assert image_names(inside)[0] == "1@Extract/a.mrcs"
    assert image_names(inside)[1] == f"000002@{project}/Extract/b.mrcs"
    assert other.is_file()


def test_merged_files_keep_names_that_lead_there(project, tmp_path):
    source = project / "Refine3D" / "job1" / "run_data.star"
    both = merge_tables([read_star(source)] * 2)
    for target, expected in ((project / "both.star", "1@Extract/a.mrcs"), (tmp_path / "b.star", f"000001@{project}")):
        write_used(both, target, None)
        assert image_names(target)[0].startswith(expected)
        assert same_files(read_star(target), both)


def test_missing_stacks_keep_their_names(project, tmp_path):
    """No path is made up from the folder in which the program happens to run."""
    source = star(tmp_path / "gone" / "p.star", "Extract/none.mrcs")
    table = read_star(source, need_stacks=False)
    write_used(table, tmp_path / "gone" / "q.star", None)
    write_cs(tmp_path / "gone" / "q.cs", table, None)
    write_used(read_cs(tmp_path / "gone" / "q.cs", need_stacks=False), tmp_path / "gone" / "r.star", None)
    assert image_names(tmp_path / "gone" / "q.star")[0] == "1@Extract/none.mrcs"
    assert np.load(tmp_path / "gone" / "q.cs")["blob/path"].tolist() == [b"Extract/none.mrcs"] * 4
    assert image_names(tmp_path / "gone" / "r.star")[0] == "000001@Extract/none.mrcs"


def test_cs_paths_are_kept_or_made_absolute(project, tmp_path):
    write_cs(tmp_path / "p.cs", read_star(project / "Refine3D" / "job1" / "run_data.star"), None)
    data = np.load(tmp_path / "p.cs")
    marked = np.zeros(len(data), [(n, "S30" if n == "blob/path" else data.dtype[n]) for n in data.dtype.names])
    for name in data.dtype.names:
        marked[name] = data[name]
    marked["blob/path"] = [b">Extract/a.mrcs", b">Extract/b.mrcs"] * 2
    (project / "J1").mkdir()
    np.save(project / "J1" / "p.npy", marked)
    source = (project / "J1" / "p.npy").rename(project / "J1" / "p.cs")
    table = read_cs(source)
    assert table.folders == (project,)
    write_cs(project / "out.cs", table, None)
    assert np.load(project / "out.cs")["blob/path"].tolist() == marked["blob/path"].tolist()
    write_cs(tmp_path / "out.cs", table, None)
    assert np.load(tmp_path / "out.cs")["blob/path"][0].decode() == f"{project}/Extract/a.mrcs"
    assert same_files(read_cs(tmp_path / "out.cs"), table)


def test_a_cs_file_carries_what_passed_through(project, tmp_path):
    """An alignment without images is joined with its passthrough file; what is written from it needs none."""
    write_cs(tmp_path / "whole.cs", read_star(project / "Refine3D" / "job1" / "run_data.star"), None)
    data = np.load(tmp_path / "whole.cs")
    (project / "J2").mkdir()
    kept = ["uid", *[name for name in data.dtype.names if name.startswith("alignments3D")]]
    for name, fields in (("J2_particles", kept), ("J2_passthrough_particles", list(data.dtype.names))):
        np.save(project / "J2" / "x.npy", data[fields])
        (project / "J2" / "x.npy").rename(project / "J2" / f"{name}.cs")
    link = tmp_path / "J2_particles.cs"
    link.symlink_to(project / "J2" / "J2_particles.cs")
    table = read_cs(link)  # the passthrough file lies beside the target of the link
    write_cs(tmp_path / "results.cs", table, None)
    again = read_cs(tmp_path / "results.cs")
    assert same_files(again, table)
    torch.testing.assert_close(again.poses.rotation, table.poses.rotation)
    assert np.load(tmp_path / "results.cs").dtype.names[: len(kept)] == tuple(kept)


def test_new_stacks_are_named_so_that_they_mean_no_other_file(tmp_path, elsewhere):
    """A plain name where that suffices; with its folder where a stack of that name lies above or where one works."""
    own = stack(tmp_path / "sim" / "small" / "particles.mrcs", 1)
    target = own.parent / "particles.star"
    assert Names(target).below(own.parent, own) == "particles.mrcs"
    other = stack(tmp_path / "sim" / "particles.mrcs", 2)
    assert Names(target).below(own.parent, own) == "small/particles.mrcs"
    other.rename(elsewhere / "particles.mrcs")
    assert Names(target).below(own.parent, own) == "small/particles.mrcs"
    table = read_star(star(own.parent / "p.star", "small/particles.mrcs"))
    write_table(target, table, None, own.parent)
    assert same_files(read_star(target), table)


def test_new_stacks_in_a_project_of_relion_are_named_from_its_folder(tmp_path):
    """Where RELION runs; folders of its jobs hold a pipeline of their own. The line for the user names that folder."""
    project = tmp_path / "project"
    own = stack(project / "External" / "job007" / "particles.mrcs", 1)
    target = own.parent / "particles.star"
    assert say_start(target, own).startswith(f"image names start from {own.parent}:")
    for name in ("default_pipeline.star", "job.star", "../../default_pipeline.star"):
        (own.parent / name).touch()
    assert Names(target).below(own.parent, own) == "External/job007/particles.mrcs"
    assert say_start(target, own).startswith(f"image names start from {project}:")
    table = read_star(star(own.parent / "p.star", "External/job007/particles.mrcs"))
    assert same_files(read_star(target.parent / "p.star"), table)


# Lists of stacks, and stacks themselves.


def test_a_list_of_stacks_is_searched_and_a_stack_is_itself(tmp_path, elsewhere):
    from test_cryodrgn import pickles

    a = stack(tmp_path / "project" / "a.mrcs", 1, count=4)
    table = read_star(star(tmp_path / "project" / "p.star", "a.mrcs"))
    options = dict(zip(("poses", "ctf"), pickles(table, tmp_path), strict=True))
    listed = tmp_path / "project" / "deep" / "list.txt"
    listed.parent.mkdir()
    listed.write_text("a.mrcs\n")
    assert read_particles(listed, **options).stacks == (a,)
    below = stack(tmp_path / "project" / "deep" / "a.mrcs", 2, count=4)
    assert read_particles(below, **options).stacks == (below,)  # whatever else is called so
    with pytest.raises(InputError, match=f"may be {below} or {a}, which differ"):
        read_particles(listed, **options)
    below.unlink()
    with pytest.raises(InputError, match=f"{below}: no such file"):
        read_particles(below, **options)


# Image names.


def row(name):
    return OPTICS + particles([f"{name} " + ROWS[0].split(" ", 1)[1], *ROWS[1:]])


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        stack(tmp_path / f"{name}.mrcs")
    return tmp_path


def test_a_name_without_index_is_a_file_of_one_image(folder):
    stack(folder / "one.mrc", count=1)
    table = read_star(write(folder, row("one.mrc")))
    assert int(table.image[0]) == 0
    with pytest.raises(InputError, match=r'row 1 .* rlnImageName is "a\.mrcs", and .*/a\.mrcs has 8 sections; .*index'):
        read_star(write(folder, row("a.mrcs")), need_stacks=False)
    assert len(read_star(write(folder, row("none.mrcs")), need_stacks=False)) == 4  # cannot be told yet


@pytest.mark.parametrize("name", ["0@a.mrcs", "-1@a.mrcs", "1@", "1@>", "1@/", "@a.mrcs", "1.0@a.mrcs", "'1 @a.mrcs'",
                                  "' 1@a.mrcs'", "'1@ '", "+1@a.mrcs", "٣@a.mrcs", "0x1@a.mrcs"])  # fmt: skip
def test_indices_that_are_none(folder, name):
    with pytest.raises(InputError, match=r"row 1 of data_particles: rlnImageName .*index from 1"):
        read_star(write(folder, row(name)), need_stacks=False)


# Tomography.


def with_columns(*columns):
    rows = [f"{one} " + " ".join("1" for _ in columns) for one in ROWS]
    return OPTICS + particles(rows, " ".join((COLUMNS, *columns)))


TOMOGRAPHY = {
    "visible frames": (with_columns("TomoName", "TomoVisibleFrames"), "TomoName"),
    "z": (with_columns("CoordinateX", "CoordinateY", "CoordinateZ"), "CoordinateZ"),
    "3D CTF": (with_columns("CtfImage"), "CtfImage"),
    "volumes": (OPTICS.replace("ImageSize #7", "ImageDimensionality #7").replace("2.0 8", "2.0 3") + particles(),
                "ImageDimensionality 3"),
    "optics": (OPTICS.replace("ImagePixelSize", "TomoTiltSeriesPixelSize") + particles(), "TomoTiltSeriesPixelSize"),
    "not extracted": ("data_particles\nloop_\n_rlnTomoName\n_rlnCenteredCoordinateZAngst\nTS_1 3\n", "TomoName"),
    "tomograms": ("data_global\nloop_\n_rlnTomoName\n_rlnTomoTiltSeriesStarFile\nTS_1 x.star\n", "TomoName"),
    "optimisation set": ("data_\n_rlnTomoParticlesFile particles.star\n", "TomoParticlesFile"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOMOGRAPHY)
def test_tilt_series_and_subtomograms_are_named_as_such(folder, kind):
    text, column = TOMOGRAPHY[kind]
    with pytest.raises(InputError, match=f"has rln{column}, .*tilt series and subtomograms are not read"):
        read_star(write(folder, text), need_stacks=False)


def test_tomography_in_a_cs_file(folder):
    write_cs(folder / "p.cs", read_star(write(folder, OPTICS + particles())), None)
    data = np.load(folder / "p.cs")
    for name, kind in (("tomo/id", ("tomo/id", "<u8")), ("three dimensions", ("blob/shape", "<u4", (3,)))):
        fields = [(n, data.dtype[n]) for n in data.dtype.names if n != kind[0]]
        changed = np.zeros(len(data), [*fields, kind])
        for own, _ in fields:
            changed[own] = data[own]
        with (folder / "t.cs").open("wb") as file:
            np.save(file, changed)
        with pytest.raises(InputError, match=rf"{name}.*tilt series and subtomograms are not read"):
            read_cs(folder / "t.cs", need_stacks=False)
