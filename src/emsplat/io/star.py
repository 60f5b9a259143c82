"""STAR files as RELION reads them: a row is a line, a word ends at white space (docs/conventions.md, 4).

CIF, from which the format comes, gives a meaning to words that begin with ``data_``, ``loop_``, ``save_``, ``_``, ``$``
or a quote; RELION does not, and folders are called ``data_raw``. The text of the file stays as it is and a table knows
where its words lie: tables of a million rows are read in seconds, and what is not changed is written as it was read.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.files import replacing, require_file

_BOM = b"\xef\xbb\xbf"
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # UTF-16, what spreadsheets call Unicode
_PACKED = {
    b"BZh": "by bzip2; unpack it first: bunzip2",
    b"\xfd7zXZ\0": "by xz; unpack it first: unxz",
    b"\x28\xb5\x2f\xfd": "by zstd; unpack it first: unzstd",
    b"PK\x03\x04": "as zip or a spreadsheet; unpack it, or save it as text separated by tabs:",
}
_GZIP = b"\x1f\x8b"
_LARGEST_PACKED, _PACKING = 2**22, 100  # bytes; tables become about ten times smaller
_QUOTES = (b"'"[0], b'"'[0])
_HASH, _LINE = b"#"[0], b"\n"[0]
_CHUNK = 2**23  # bytes of a table looked at together
_ROWS = 2**16
# Quoted text, which ends at a quote before white space, and bare words.
_WORD = re.compile(rb"""'[^\n]*?'(?![^\x00-\x20])|"[^\n]*?"(?![^\x00-\x20])|[^\x00-\x20]+""")
_DIGITS = 18  # of which an int64 surely holds the number, sign and point among them
_EXACT = 2**53  # whole numbers below are exact as floats, and so are the powers of ten to the 22nd


@dataclass(frozen=True)
class Words:
    """Words of a column as they are written, taken out of the text when they are asked for."""

    content: bytes
    start: NDArray[np.int64]
    stop: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: slice) -> list[bytes]:
        content = self.content
        return [content[a:b] for a, b in zip(self.start[rows].tolist(), self.stop[rows].tolist(), strict=True)]


@dataclass(frozen=True)
class Table:
    """One table of a STAR file: a loop, or pairs of name and value, which are a loop of one row."""

    path: Path
    name: str  # of its block, without "data_"
    tags: tuple[str, ...]  # with what they begin with, "_rln"
    content: bytes
    start: NDArray[np.int64] | NDArray[np.int32]  # (rows, columns): where each word begins, quotes included
    stop: NDArray[np.int64] | NDArray[np.int32]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.start)

    def has(self, tag: str) -> bool:
        return tag in self.tags

    def line(self, row: int) -> int:
        """The line of the file that a row stands on, from 1."""
        return _line(self.content, int(self.start[row].min()))

    def words(self, tag: str) -> Words:
        """A column as it is written, quotes included."""
        return Words(self.content, *self._spans(tag))

    def text(self, tag: str) -> list[str]:
        """A column without quotes."""
        start, stop = self._bare(tag)
        content = self.content
        return [content[a:b].decode() for a, b in zip(start.tolist(), stop.tolist(), strict=True)]

    def word(self, tag: str, row: int) -> str:
        start, stop = self._bare(tag)
        return self.content[int(start[row]) : int(stop[row])].decode()

    def numbers(self, tag: str) -> NDArray[np.float64]:
        """A column as numbers, each the float nearest to its text; not a number where the text is none."""
        start, stop = self._bare(tag)
        parts = (_parsed(self.content, start[i : i + _ROWS], stop[i : i + _ROWS]) for i in range(0, len(start), _ROWS))
        return np.concatenate([*parts, np.zeros(0)])

    def take(self, rows: NDArray[np.int64]) -> Table:
        return replace(self, start=self.start[rows], stop=self.stop[rows])

    def _spans(self, tag: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        column = self.tags.index(tag)
        return self.start[:, column].astype(np.int64), self.stop[:, column].astype(np.int64)

    def _bare(self, tag: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start, stop = self._spans(tag)
        quoted = _closed(np.frombuffer(self.content, np.uint8), start, stop)
        return start + quoted, stop - quoted


@dataclass(frozen=True)
class StarFile:
    """The blocks of a STAR file: name, and where its text begins and ends."""

    path: Path
    content: bytes
    blocks: tuple[tuple[str, int, int], ...]

    def tables(self, having: str) -> list[Table]:
        """The tables of the blocks in whose text a column is named.

        Raises:
            InputError: rows and columns do not fit together; two tables in one block.
        """
        wanted = having.encode()
        return [self._table(*block) for block in self.blocks if self.content.find(wanted, block[1], block[2]) >= 0]

    def table(self, name: str) -> Table | None:
        """The table of the block of this name.

        Raises:
            InputError: as `tables`.
        """
        return next((self._table(*block) for block in self.blocks if block[0] == name), None)

    def _table(self, name: str, start: int, stop: int) -> Table:
        return _read_table(self.path, self.content, name, start, stop)


def read_star_file(path: Path) -> StarFile:
    """The blocks of a STAR file, plain or compressed by gzip. Lines before the first ``data_`` are skipped.

    Raises:
        InputError: it cannot be read, is no text, or names a block twice.
    """
    content = _content(path)
    starts = list(_block_starts(content))
    if not starts:
        remedy = "save it as text separated by tabs or blanks" if _separators(content) else "take another file"
        raise InputError(f"{path}: no line begins with data_; expected a RELION STAR file; {remedy}")
    ends = [*(start for _, start in starts[1:]), len(content)]
    blocks = [(name, start, end) for (name, start), end in zip(starts, ends, strict=True)]
    seen: dict[str, int] = {}
    for name, start, _ in blocks:
        if name in seen:
            raise InputError(
                f"{path}, line {_line(content, start)}: a second table data_{name}, the first is in line "
                f"{_line(content, seen[name])}; files that were pasted together cannot be told apart, give them one by "
                "one with --merge"
            )
        seen[name] = start
    return StarFile(path, content, tuple(blocks))


def write_star_file(path: Path, blocks: Sequence[bytes | tuple[str, Mapping[str, Sequence[str] | Words]]]) -> None:
    """Blocks as they were read, or made of a name and columns (with what they begin with); texts are quoted where
    they must be.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        for block in blocks:
            if isinstance(block, bytes):
                file.write(block.rstrip() + b"\n\n")
                continue
            name, columns = block
            head = "".join(f"{tag}\n" for tag in columns)
            file.write(f"data_{name}\n\nloop_\n{head}".encode())
            values = list(columns.values())
            for first in range(0, len(values[0]) if values else 0, _ROWS):
                rows = zip(*(map(_word, column[first : first + _ROWS]) for column in values), strict=True)
                file.write(b"".join(b" ".join(row) + b"\n" for row in rows))
            file.write(b"\n")


def pairs(name: str, values: Mapping[str, str]) -> bytes:
    """A block of pairs of name and value."""
    return b"\n".join([f"data_{name}\n".encode(), *(f"{tag} ".encode() + quote(text) for tag, text in values.items())])


def quote(text: str) -> bytes:
    """A text as a word: plain where it can be, as RELION before 4.0 knows no quotes, else between those that it does
    not hold."""
    if text and not any(character <= " " for character in text) and text[0] not in "'\"#;":
        return text.encode()
    mark = "'" if '"' in text else '"'
    return f"{mark}{text}{mark}".encode()


def _word(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else quote(value)


# Reading.


def _content(path: Path) -> bytes:
    require_file(path, "a RELION STAR file of particles")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a RELION STAR file") from error
    for start, remedy in _PACKED.items():
        if content.startswith(start):
            raise InputError(f"{path}: is compressed {remedy} {path.name}")
    content = _unpacked(path, content) if content.startswith(_GZIP) else content
    try:
        if content.startswith(_WIDE):
            content = content.decode("utf-16").encode()
        content = content.removeprefix(_BOM)
        if not content.isascii():
            content.decode()
    except UnicodeError as error:
        place = ""
        if isinstance(error, UnicodeDecodeError):
            line = content.count(b"\n", 0, error.start) + 1
            place = f", line {line}: byte {content[error.start]:#x}"
        raise InputError(
            f"{path}{place or ': its text'} is no UTF-8 text; expected names in ASCII or UTF-8, save the file as UTF-8"
        ) from error
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return content if content.endswith(b"\n") else content + b"\n"


def _unpacked(path: Path, content: bytes) -> bytes:
    most = max(_LARGEST_PACKED, _PACKING * len(content))
    parts: list[bytes] = []
    try:
        while content:  # files that were compressed one by one and pasted are one file
            machine = zlib.decompressobj(wbits=31)
            parts.append(machine.decompress(content, most))
            most -= len(parts[-1])
            if not machine.eof:
                raise zlib.error("too large, or cut off" if most <= 0 else "cut off")
            content = machine.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise InputError(
            f"{path}: cannot be unpacked ({error}); unpack it with gunzip and give what comes out"
        ) from error
    return b"".join(parts)


def _block_starts(content: bytes) -> Iterator[tuple[str, int]]:
    """Names of the blocks and where their lines begin. Such a line has one word; a spreadsheet may have quoted it."""
    at = content.find(b"data_")
    while at >= 0:
        start, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at)
        before = content[start:at].strip()
        if before in (b"", b"'", b'"'):
            words = content[at:end].partition(b"#")[0].split()
            if len(words) == 1 or (len(words) > 1 and _is_padding(words[1:])):
                name = words[0].removeprefix(b"data_").rstrip(before + b",;" if before else b",;")
                yield name.decode(), start
            at = content.find(b"data_", end)
        else:
            at = content.find(b"data_", at + 1)


def _is_padding(words: Sequence[bytes]) -> bool:
    """What R writes into the empty cells of a table."""
    return all(word.strip(b"\"'") in (b"NA", b"") for word in words)


def _separators(content: bytes) -> bool:
    return re.search(rb"(?m)^\W*loop_[,;]|^\W*_rln\w+[^\n]*[,;]{2}", content[:100_000]) is not None


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def _read_table(path: Path, content: bytes, name: str, start: int, stop: int) -> Table:
    """The one table of a block."""
    at = content.find(b"\n", start) + 1
    loop: Table | None = None
    tags: list[str] = []  # of pairs
    values: list[tuple[int, int]] = []
    while at < stop:
        end = content.find(b"\n", at)
        words = content[at:end].split()
        first = words[0].strip(b"\"'") if words else b""
        is_loop, is_tag = first.rstrip(b",;").lower() == b"loop_", first.startswith(b"_")
        if _is_padding(words) or first.startswith(b"#"):
            at = end + 1
        elif is_loop and first[-1:] in b",;":
            raise _unexpected(path, content, at, "cells separated by commas or semicolons instead of tabs or blanks")
        elif loop is not None or (is_loop and tags):
            raise _unexpected(path, content, at, "a second table in one block; write all its columns in one loop_")
        elif is_loop and (len(words) == 1 or _is_padding(words[1:])):
            loop, at = _read_loop(path, content, name, end + 1, stop)
        elif is_tag:
            tags.append(_tag(path, content, at, first, tags))
            spans = _without_comment(content, _spans_of(content, at, end))
            if len(spans) != 2 and not (len(spans) > 2 and _is_padding(words[2:])):
                what = f"{len(spans) - 1} values of {tags[-1]} instead of one; is loop_ missing?"
                raise _unexpected(path, content, at, what)
            values.append(spans[1])
            at = end + 1
        else:
            raise _unexpected(path, content, at, "a row outside of a loop_")
    if loop is not None:
        return loop
    where = np.array(values, np.int64).reshape(-1, 2)
    shape = (1, len(values)) if values else (0, 0)
    return Table(path, name, tuple(tags), content, where[:, 0].reshape(shape), where[:, 1].reshape(shape))


def _read_loop(path: Path, content: bytes, name: str, at: int, stop: int) -> tuple[Table, int]:
    """The table after loop_, and where its text ends. Names of columns may have their number beside them."""
    tags: list[str] = []
    while at < stop:
        end = content.find(b"\n", at)
        words = content[at:end].split()
        first = words[0].strip(b"\"'") if words else b""
        # A word of a first row may begin with _ as well, but has others beside it.
        numbered = len(words) < 2 or words[1].lstrip(b"\"'").startswith(b"#") or _is_padding(words[1:])
        if first.startswith(b"_") and (numbered or not tags):
            tags.append(_tag(path, content, at, first, tags))
        elif not _is_padding(words) and not first.startswith(b"#"):
            break
        at = end + 1
    if not tags:
        raise _unexpected(path, content, min(at, stop - 1), "loop_ without names of columns")
    return _rows(path, content, name, tags, at, stop)


def _tag(path: Path, content: bytes, at: int, word: bytes, tags: Sequence[str]) -> str:
    tag = re.sub(rb"#\d+$", b"", word.rstrip(b",;")).decode()  # its number may be glued to it
    if tag in tags:
        raise _unexpected(path, content, at, f"a second column {tag.removeprefix('_')}")
    return tag


def _unexpected(path: Path, content: bytes, at: int, what: str) -> InputError:
    text = content[at : min(at + 60, content.find(b"\n", at))].decode(errors="replace").strip()
    return InputError(
        f'{path}, line {_line(content, at)}: not a well-formed STAR file: {what}, "{text}"; expected data_, loop_, '
        "names of columns and one row a line, write it again"
    )


def _rows(path: Path, content: bytes, name: str, tags: Sequence[str], at: int, stop: int) -> tuple[Table, int]:
    """The rows of a loop, and where its text ends."""
    kind = np.int32 if len(content) < 2**31 else np.int64
    parts: list[NDArray[np.int64]] = []  # (rows, columns, 2)
    gap: int | None = None  # the first empty line after a row
    ended = False
    while at < stop and not ended:
        end = stop
        if stop - at > _CHUNK:
            end = content.rfind(b"\n", at, at + _CHUNK) + 1 or content.find(b"\n", at) + 1
        spans, empty, after = _some_rows(path, content, name, tags, at, end)
        if gap is None and len(empty) and (parts or len(spans)):
            later = empty[empty >= (at if parts else spans[0, 0, 0])]
            gap = int(later[0]) if len(later) else None
        if len(spans):
            parts.append(spans.astype(kind))
        ended, at = after < end, after
    spans = np.concatenate([np.zeros((0, len(tags), 2), kind), *parts])
    notes = []
    before = len(spans) if gap is None else int((spans[:, 0, 0] < gap).sum())
    if gap is not None and before < len(spans):
        notes.append(
            f"{path}, line {_line(content, gap)}: an empty line among the rows of data_{name}; RELION reads only the "
            f"{before:,} rows before it, here all {len(spans):,} are used; take the line out where they belong together"
        )
    return Table(path, name, tuple(tags), content, spans[..., 0], spans[..., 1], tuple(notes)), at


def _some_rows(
    path: Path, content: bytes, name: str, tags: Sequence[str], at: int, end: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Places of the words of each row between two ends of lines, places of the empty lines, and where the table ends.

    Most lines have the right number of words; the others are looked at one by one.
    """
    text = np.frombuffer(content, np.uint8)[at:end]
    inside = text > 32
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    edges = np.concatenate([np.zeros(int(inside[0]), np.int64), edges])  # a line ends what is read together
    start, stop = edges[::2], edges[1::2]
    lines = np.flatnonzero(text == _LINE)
    upto = np.searchsorted(start, lines)
    counts = np.diff(upto, prepend=0)
    first = text[start]
    odd = (counts != 0) & (counts != len(tags))
    strange = first == _HASH
    quoted = (first == _QUOTES[0]) | (first == _QUOTES[1])
    if quoted.any():
        strange[quoted] = ~_closed(text, start[quoted], stop[quoted])
    if len(tags) == 1:
        strange |= stop - start == len("loop_")
    odd[np.searchsorted(lines, start[strange])] = True
    regular = np.repeat(~odd, counts)
    spans = np.stack([start[regular], stop[regular]], 1).reshape(-1, len(tags), 2)
    empty = lines[counts == 0] + at
    if not odd.any():
        return spans + at, empty, end
    number = np.flatnonzero((counts == len(tags)) & ~odd)
    more: list[list[tuple[int, int]]] = []
    places: list[int] = []
    for line in np.flatnonzero(odd).tolist():
        begin = (int(lines[line - 1]) + 1 if line else 0) + at
        words = _without_comment(content, _spans_of(content, begin, int(lines[line]) + at))
        if words and _ends_table(content, words, len(tags)):
            spans, end = spans[number < line], begin
            empty, number = empty[empty < begin], number[number < line]
            break
        if len(words) == len(tags):
            more.append(words)
            places.append(line)
        elif words:
            raise InputError(_uneven(path, content, name, tags, begin, words))
    if not more:
        return spans + at, empty, end
    order = np.argsort(np.concatenate([number, np.array(places, np.int64)]), kind="stable")
    return np.concatenate([spans + at, np.array(more, np.int64)])[order], empty, end


def _ends_table(content: bytes, words: Sequence[tuple[int, int]], columns: int) -> bool:
    """Whether a line begins something else: loop_, or a pair of name and value."""
    first = content[slice(*words[0])]
    is_pair = first.startswith(b"_") and len(words) <= 2 and len(words) != columns
    return is_pair or (first.lower() == b"loop_" and len(words) == 1)


def _uneven(
    path: Path, content: bytes, name: str, tags: Sequence[str], begin: int, words: Sequence[tuple[int, int]]
) -> str:
    line = content[begin : content.find(b"\n", begin)]
    separator = next((mark for mark in (",", ";") if line.count(mark.encode()) >= max(len(tags) - 1, 1)), None)
    remedy = "repair the row or leave it out; was the file cut off, or a cell left empty?"
    if separator:
        remedy = f"its values are separated by {separator!r}: save it as text separated by tabs or blanks"
    return (
        f"{path}, line {_line(content, begin)}: a row of data_{name} has {len(words)} values; expected {len(tags)}, "
        f"one for each column; {remedy}"
    )


def _spans_of(content: bytes, start: int, stop: int) -> list[tuple[int, int]]:
    """Where the words of a line are."""
    return [match.span() for match in _WORD.finditer(content, start, stop)]


def _without_comment(content: bytes, words: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return words[: next((number for number, (start, _) in enumerate(words) if content[start] == _HASH), len(words))]


def _closed(text: NDArray[np.uint8], start: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which words are quoted: they begin and end with the same quote."""
    if not len(start):
        return np.zeros(0, bool)
    first = text[start]
    quoted: NDArray[np.bool_] = ((first == _QUOTES[0]) | (first == _QUOTES[1])) & (text[stop - 1] == first)
    return quoted & (stop - start > 1)


def _parsed(content: bytes, start: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers between these places.

    Plain decimals are read digit by digit for all rows at once: a whole number below 2^53 over a power of ten that is
    exact gives the nearest float. Python reads the others.
    """
    text = np.frombuffer(content, np.uint8)
    length = stop - start
    whole = np.zeros(len(start), np.int64)
    decimals = np.zeros(len(start), np.int64)
    point = np.zeros(len(start), bool)
    odd = (length < 1) | (length > _DIGITS)
    figures = np.zeros(len(start), np.int64)
    negative = np.zeros(len(start), bool)
    for place in range(min(int(length.max(initial=0)), _DIGITS)):
        within = place < length
        letter = text[np.where(within, start + place, 0)]
        digit = letter - np.uint8(48)  # wraps: what is no digit is above 9
        is_digit = within & (digit < 10)
        whole = np.where(is_digit, 10 * whole + digit, whole)
        figures += is_digit
        decimals += is_digit & point
        is_point = within & (letter == 46)
        is_sign = within & ((letter == 45) | (letter == 43)) & (place == 0)
        odd |= (is_point & point) | (within & ~(is_digit | is_point | is_sign))
        point |= is_point
        negative |= is_sign & (letter == 45)
    values = whole / 10.0**decimals
    values = np.where(negative, -values, values)
    odd |= (figures == 0) | (whole >= _EXACT)
    for row in np.flatnonzero(odd).tolist():
        values[row] = _number(content[int(start[row]) : int(stop[row])])
    return values


def _number(word: bytes) -> float:
    try:
        return float("nan") if b"_" in word or not word.isascii() else float(word)  # Python reads 1_000
    except ValueError:
        return float("nan")
