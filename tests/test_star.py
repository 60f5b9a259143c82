"""STAR files as RELION reads them: words, rows, what spreadsheets and scripts make of a file, and numbers."""

import gzip

import numpy as np
import pytest

from emsplat.errors import InputError
from emsplat.io import star
from emsplat.io.star import quote, read_star_file, write_star_file

HEAD = "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n1 first\n\ndata_particles\n\nloop_\n"
NAMES = ["_rlnImageName #1", "_rlnMicrographName #2", "_rlnDefocusU #3"]
ROWS = [["1@a.mrcs", "m1.mrc", "15000.5"], ["2@a.mrcs", "m2.mrc", "-3e2"], ["3@b.mrcs", "m3.mrc", "0.1"]]
PLAIN = HEAD + "\n".join([*NAMES, *map(" ".join, ROWS)]) + "\n"


def particles(tmp_path, text, name="p.star"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (table,) = read_star_file(path).tables("_rlnImageName")
    return table


def values(table):
    return [list(row) for row in zip(*(table.text(tag) for tag in table.tags), strict=True)]


# What spreadsheets and R do: cells in quotes, empty cells behind the last column, a title above, other encodings.
QUOTED = PLAIN.replace("_rlnDefocusU #3", '"_rlnDefocusU"\t"#3"').replace("data_particles", '"data_particles"')
SPELLINGS = {
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "CR": PLAIN.replace("\n", "\r"),
    "byte order mark": "\ufeff" + PLAIN,
    "UTF-16": PLAIN.encode("utf-16"),
    "gzip": gzip.compress(PLAIN.encode()),
    "gzip in two parts": gzip.compress(PLAIN[:90].encode()) + gzip.compress(PLAIN[90:].encode()),
    "empty cells at the ends": PLAIN.replace(" ", "\t").replace("\n", "\t\t\t\n"),
    "NA in empty cells": PLAIN.replace("loop_", "loop_ NA NA").replace("data_p", "data_p").replace("#3", "#3 NA"),
    "title above": "Sheet 1\tof 3\n\n_rlnX 5\nloop_\n1 2 3\n" + PLAIN,
    "quoted cells": QUOTED.replace("m1.mrc", '"m1.mrc"').replace("-3e2", '"-3e2"'),
    "numbers glued to names": PLAIN.replace(" #", "#"),
    "quoted names": PLAIN.replace("_rlnImageName #1", '"_rlnImageName #1"'),
    "no newline at the end": PLAIN.rstrip("\n"),
    "control Z of DOS": PLAIN + "\x1a",
    "remarks": PLAIN.replace("m2.mrc -3e2", "m2.mrc -3e2 # doubtful 'pick").replace("2@a", "# a remark\n2@a"),
    "blank lines in the header": PLAIN.replace("_rlnMic", "\n\n_rlnMic").replace("1@a", "\n \t\n1@a"),
    "another table behind": PLAIN + "\ndata_job\n_rlnJobType 'relion.x y'\n;\ntext of any kind 1 2 3\n;\n",
    "many blanks": PLAIN.replace(" ", "  \t ").replace("\n", "  \n  "),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_rows(tmp_path, name):
    table = particles(tmp_path, SPELLINGS[name])
    assert values(table) == ROWS
    assert table.notes == ()
    assert read_star_file(tmp_path / "p.star").table("optics").text("_rlnOpticsGroupName") == ["first"]


@pytest.mark.parametrize(
    "word",
    [
        *("data_raw/m.mrc", "data_", "loop_", "save_x", "stop_", "global_", "_m.mrc", "_rlnX", "$grid/m.mrc", ";m"),
        *("'m.mrc", 'm"', "it's", "'tis", "\"a'b", "a#1.mrc", "[1,2]", "?", ".", "Müller/粒子.mrc", "{a}", "a\\b"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_words_that_mean_something_to_cif_alone(tmp_path, word, place):
    """In any column, the first one too, and through a file written anew."""
    columns = [[word, "x"], ["1@a.mrcs", "2@a.mrcs"], ["1.5", "2"]]
    columns[:2] = columns[:2] if place == 0 else [columns[1], columns[0]]
    names = ["_rlnMicrographName", "_rlnImageName"][:: 1 if place == 0 else -1] + ["_rlnDefocusU"]
    text = "data_\nloop_\n" + "\n".join([f"{name} #{i}" for i, name in enumerate(names, 1)]) + "\n"
    text += "\n".join(" ".join(row) for row in zip(*columns, strict=True)) + "\n"
    table = particles(tmp_path, text)
    assert [table.text(name) for name in names] == columns
    write_star_file(tmp_path / "q.star", [("", dict(zip(names, columns, strict=True)))])
    again = particles(tmp_path, (tmp_path / "q.star").read_bytes())
    assert [again.text(name) for name in names] == columns


def test_quotes_are_those_of_relion(tmp_path):
    """A quote ends before white space or at the end of the line, and may hold blanks and the other quote."""
    words = ["'two words'", '"it\'s"', "'a'b c'", "''", '"#1 x"', "'1.5'"]
    rows = "\n".join(
        f"1@a.mrcs {word} {number}" for word, number in zip(words, ["1", "2", "3", "4", "5", "'6.5'"], strict=True)
    )
    table = particles(tmp_path, HEAD + "\n".join(NAMES) + "\n" + rows + "\n")
    assert table.text("_rlnMicrographName") == ["two words", "it's", "a'b c", "", "#1 x", "1.5"]
    assert table.numbers("_rlnDefocusU").tolist() == [1, 2, 3, 4, 5, 6.5]
    assert table.words("_rlnMicrographName")[:] == [word.encode() for word in words]
    for text in ("plain", "two words", "", "'x", "#x", 'a "b c', "a\tb", ";x"):
        write_star_file(tmp_path / "q.star", [("", {"_rlnImageName": ["1@a"], "_b": [text], "_c": ["x"]})])
        assert particles(tmp_path, (tmp_path / "q.star").read_bytes()).text("_b") == [text]
    assert quote("data_raw/a'b.mrc") == b"data_raw/a'b.mrc"  # RELION before 4.0 knows no quotes


@pytest.mark.parametrize("mark", ["'", '"'])
def test_a_row_that_begins_with_a_quote_and_a_blank_is_a_row(tmp_path, mark):
    """It is no empty line of a spreadsheet."""
    table = particles(tmp_path, PLAIN.replace("1@a.mrcs", f"{mark} 1@a.mrcs{mark}"))
    assert table.text("_rlnImageName")[0] == " 1@a.mrcs"
    assert len(table) == len(ROWS)


def test_pairs_are_a_table_of_one_row(tmp_path):
    text = "data_particles\n_rlnImageName 1@a.mrcs\n\n_rlnMicrographName 'm 1.mrc' # remark\n_rlnDefocusU  2.5\t\n"
    assert values(particles(tmp_path, text)) == [["1@a.mrcs", "m 1.mrc", "2.5"]]


def test_an_empty_line_among_the_rows_is_said(tmp_path):
    """RELION would stop there."""
    table = particles(tmp_path, PLAIN.replace("3@b", "\n \n3@b"))
    assert values(table) == ROWS
    (note,) = table.notes
    assert "line 16: an empty line among the rows of data_particles; RELION reads only the 2 rows" in note
    assert "all 3 are used" in note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN.replace(" m2.mrc", ""), "line 15: a row of data_particles has 2 values; expected 3, .*cell left empty"),
        (PLAIN.replace("m2.mrc", "m 2.mrc"), "line 15: a row of data_particles has 4 values; expected 3"),
        (PLAIN.replace("m2.mrc", "#2.mrc"), "line 15: a row of data_particles has 1 values; expected 3"),
        (PLAIN.rstrip()[:-9], "line 16: a row of data_particles has 2 values; expected 3, .*cut off"),
        (PLAIN.replace(" ", ","), "line 14: .*separated by ','"),
        (PLAIN.replace(" ", ";"), "line 14: .*separated by ';'"),
        (PLAIN.replace("loop_\n", "loop_,,,\n"), "line 10: .*separated by commas"),
        (PLAIN.replace("loop_\n", ""), "line 9: .*0 values of _rlnImageName instead of one; is loop_ missing"),
        (PLAIN.replace("_rlnDefocusU", "_rlnImageName"), "line 13: .*a second column rlnImageName"),
        (PLAIN + PLAIN, "line 17: a second table data_optics, the first is in line 1; .*pasted together.*--merge"),
        (b"BZh91AY", "compressed by bzip2; unpack it first: bunzip2 p.star"),
        (b"PK\x03\x04", "as zip or a spreadsheet"),
        (gzip.compress(PLAIN.encode())[:-20], "cannot be unpacked .*gunzip"),
        (gzip.compress(b"\0" * 10**7), "cannot be unpacked .*too large.*gunzip"),
        (b"\xff\xfe\x00\xd8a", "UTF-8"),
        (b"", "no line begins with data_"),
        (b"x" * 100, "no line begins with data_"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        particles(tmp_path, text)
    assert str(tmp_path / "p.star") in str(caught.value)


def test_numbers_are_the_nearest_floats(tmp_path):
    """As Python reads them, bit by bit; what is no number is not a number."""
    rng = np.random.default_rng(0)
    texts = [f"{value:.{digits}f}" for digits in range(12) for value in rng.normal(scale=10.0**digits, size=50)]
    texts += [repr(value) for value in (rng.normal(size=200) * 10.0 ** rng.integers(-20, 20, 200)).tolist()]
    texts += ["0", "-0.000000", "+1.5", "5.", ".5", "9007199254740993", "123456789012345678", "1e5", "-1.421115e+05"]
    rows = "".join(f"{text} 1@a.mrcs\n" for text in texts)
    found = particles(tmp_path, "data_\nloop_\n_x\n_rlnImageName\n" + rows).numbers("_x")
    assert found.tobytes() == np.array([float(text) for text in texts]).tobytes()
    none = ["", "-", ".", "+.", "1.2.3", "1-2", "--1", "1,5", "0x10", "1_000", "٣", "nan", "a", "1e", "e5"]
    rows = "".join(f"'{text}' 1@a.mrcs\n" for text in none)
    assert np.isnan(particles(tmp_path, "data_\nloop_\n_x\n_rlnImageName\n" + rows).numbers("_x")).all()


def test_tables_larger_than_what_is_looked_at_together(tmp_path, monkeypatch):
    """Pieces, with odd rows in some of them, make the same table."""
    lines = [
        f"{i + 1}@a.mrcs 'm {i}.mrc' {i}.25" if i % 7 == 0 else f"{i + 1}@a.mrcs m{i}.mrc {i}.25" for i in range(300)
    ]
    lines[40:40] = ["# remark", "", ""]
    text = HEAD + "\n".join([*NAMES, *lines]) + "\n\ndata_more\n_rlnX 1\n"
    whole = particles(tmp_path, text)
    for name, size in (("_CHUNK", 200), ("_ROWS", 11)):
        monkeypatch.setattr(star, name, size)
    table = particles(tmp_path, text)
    assert values(table) == values(whole)
    assert table.notes == whole.notes
    assert "only the 40 rows before it" in table.notes[0]
    assert table.numbers("_rlnDefocusU").tolist() == [i + 0.25 for i in range(300)]
    write_star_file(tmp_path / "w.star", [("particles", {tag: table.words(tag) for tag in table.tags})])
    assert values(particles(tmp_path, (tmp_path / "w.star").read_bytes())) == values(whole)
