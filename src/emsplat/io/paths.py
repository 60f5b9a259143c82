"""Which file an image name means: one rule for every metadata format, for reading and for writing.

A name that is an absolute path of a file is that file. Any other starts from the folder of the metadata file or one of
its parents; where the metadata file is a link, then from the folder of its target and the parents of that; then from
``--datadir``, below which the last parts of the name suffice; then from where the program runs. The first of these
wins, but all are looked at: files that differ are an error, copies and links are not. The endings .mrc and .mrcs stand
for each other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from emsplat.errors import InputError

_OTHER_ENDING = {".mrc": ".mrcs", ".mrcs": ".mrc"}
_BLOCK, _BLOCKS = 2**12, 8  # bytes and number of the pieces by which files are compared; smaller files wholly


def group_equal(texts: Sequence[str]) -> Int[Tensor, " n"]:
    """Equal numbers for equal texts, in order of appearance."""
    seen: dict[str, int] = {}
    return torch.tensor([seen.setdefault(text, len(seen)) for text in texts], dtype=torch.int64)


def real_paths(paths: Iterable[Path]) -> list[str]:
    """Paths with links followed, equal for one file; those of files that are not there as far as they exist."""
    folders: dict[str, str] = {}
    real = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        whole = os.path.join(folders[folder], name)
        real.append(os.path.realpath(whole) if os.path.islink(whole) else whole)
    return real


def file_numbers(paths: Sequence[Path]) -> Int[Tensor, " n"]:
    """Equal numbers for paths of one file, over symbolic and hard links; a file that is not there goes by its path."""
    keys = []
    for path in real_paths(paths):
        try:
            status = os.stat(path)
            keys.append(f"{status.st_dev} {status.st_ino}")
        except (OSError, ValueError):
            keys.append(path)
    return group_equal(keys)


def existing_files(names: Sequence[str], source: Path) -> list[str | None]:
    """Where files named in a metadata file lie, links followed, and None for those that are not there.

    Looked for from the folders that the names of stacks start from, and as written; a folder that many share is looked
    for once.
    """
    roots = [*_folders_of(source), ""]
    places: dict[str, list[str]] = {}
    found = list[str | None]()
    for name in names:
        inner, last = os.path.split(name)
        if inner not in places:
            candidates = [os.path.join(root, inner.lstrip("/") if root else inner) for root in roots]
            places[inner] = [os.path.realpath(place) for place in candidates if os.path.isdir(place or ".")]
        paths = (os.path.join(place, last) for place in places[inner])
        found.append(next((os.path.realpath(path) for path in paths if os.path.isfile(path)), None))
    return found


@dataclass(frozen=True)
class Stacks:
    """The image stacks that a metadata file names."""

    paths: tuple[Path, ...]  # each file once, whatever its names and links; absolute, or as written where it is missing
    stack: Int[Tensor, " n"]  # index into paths, of each name
    folders: tuple[Path, ...]  # that the names start from; / for absolute ones
    notes: tuple[str, ...] = ()


def find_stacks(names: Sequence[str], source: Path, datadir: Path | None, *, required: bool = True) -> Stacks:
    """The stacks of these names, one for each image, by the rule above. Missing ones keep their names where they are
    not ``required``.

    Raises:
        InputError: some that are required are missing; a name may mean two files that differ; two names mean one file
            that is no link.
    """
    search = _Search(_folders_of(source), datadir)
    paths: list[Path] = []
    counts: dict[str, int] = {}
    number_of: dict[str, int] = {}
    number_of_file: dict[tuple[int, int], int] = {}
    name_of: dict[str, str] = {}
    missing: list[str] = []
    for name in dict.fromkeys(names):
        file = search.find(name, source)
        if file is None:
            missing.append(name)
            number_of[name] = len(paths)
            paths.append(Path(name))
            continue
        counts[file.folder] = counts.get(file.folder, 0) + 1
        number_of[name] = number_of_file.setdefault(file.identity, len(paths))
        if number_of[name] == len(paths):
            paths.append(Path(file.path))
        whole = os.path.normpath(_relative(name))
        if whole != file.path.lstrip("/"):  # an absolute name leaves no doubt
            other = name_of.setdefault(file.path, whole)
            if other != whole:
                raise InputError(
                    f'{source}: "{other}" and "{whole}" are two names, and {file.path} would be found for both; give '
                    "--datadir the folder that both names start from, or make one a link if they are the same file"
                )
    if missing and required:
        raise InputError(
            f"{source}: {len(missing)} of {len(paths)} image stacks are missing, the first is "
            f'"{missing[0]}"; looked for it from {search.said}; give the folder that the paths start from with '
            "--datadir"
        )
    relative = {folder: count for folder, count in counts.items() if folder != "/"}
    mixed = ", ".join(f"{count:,} from {folder}" for folder, count in list(relative.items())[:5])
    return Stacks(
        tuple(paths),
        torch.tensor([number_of[name] for name in names], dtype=torch.int64),
        tuple(map(Path, counts)),
        (f"{source}: its image stacks lie in several folders: {mixed}; are they all of this set?",)
        if len(relative) > 1
        else (),
    )


def say_folders(folders: Sequence[Path]) -> str:
    """Where image paths start from, for a log."""
    shown = [str(folder) if folder.parent != folder else "/ (absolute)" for folder in folders[:5]]
    return "image paths start from " + ", ".join(shown) + (" and others" if len(folders) > 5 else "")


def say_start(target: Path, stack: Path) -> str:
    """Where other programs have to look for a stack as a STAR file beside it names it (`Names.below`), for a log."""
    name = Names(target).below(target.parent, stack)
    if os.path.isabs(name):
        return "image names are absolute paths: other programs take them from anywhere, until the folder is moved"
    folder = Path(os.path.abspath(stack)).parents[len(Path(name).parts) - 1]
    return (
        f"image names start from {folder}: run RELION there, give that to cryoSPARC's import as particle data path, to "
        "cryoDRGN as --datadir; emsplat finds the images by itself"
    )


class Names:
    """How a metadata file at ``target`` names stacks so that `find_stacks` finds them, wherever the program runs."""

    def __init__(self, target: Path) -> None:
        self._inside = _Search(_folders_of(target), None)
        self._known: dict[tuple[str, str], str] = {}

    def kept(self, name: str, stack: Path) -> str:
        """The name as another file wrote it where it leads to ``stack`` from here too, or where that is missing; else
        the absolute path, which every program takes."""
        key = (name, str(stack))
        if key not in self._known:
            leads = not stack.is_absolute() or self._leads(name, stack)
            self._known[key] = name if leads else str(stack)
        return self._known[key]

    def below(self, folder: Path, stack: Path) -> str:
        """The path of a stack from ``folder``; from a parent of that where it would mean another file as well, and from
        the folder of RELION's project within one, since RELION runs there."""
        path = os.path.abspath(stack)
        folders = (folder.absolute(), *folder.absolute().parents)
        for start in (*filter(_is_project, folders), *folders):
            name = os.path.relpath(path, start)
            if not name.startswith("..") and self._leads(name, Path(path)):
                return name
        return path

    def _leads(self, name: str, stack: Path) -> bool:
        try:
            file, own = self._inside.find(name, stack), _file("/", str(stack), exact=True)
        except InputError:
            return False
        # What is found only where the program runs now is not found elsewhere.
        return file is not None and own is not None and file.identity == own.identity and not file.here


def _is_project(folder: Path) -> bool:
    """Whether this is a project of RELION; folders of its jobs hold a pipeline as well, and what the job is."""
    return (folder / "default_pipeline.star").is_file() and not (folder / "job.star").is_file()


class _File(NamedTuple):
    """A file that a name may mean."""

    folder: str  # that the name starts from
    path: str
    exact: bool  # with the ending that was written
    identity: tuple[int, int]  # device and inode: the same for links to one file
    size: int
    here: bool = False  # only found from where the program runs


class _Search:
    """The files that names may mean, in the order of the rule."""

    def __init__(self, folders: Sequence[str], datadir: Path | None) -> None:
        self._folders = folders
        self._datadir = None if datadir is None else os.path.abspath(datadir)
        here = _here()
        self._here = None if here in [os.path.realpath(folder) for folder in folders] else here
        starts = [folders[0], *[f for f in folders[1:] if not _is_parent(f, folders)]]
        places = [f"{folder} and its parents" for folder in starts]
        places += [place for place in (self._datadir, self._here) if place is not None]
        self.said = ", ".join(places)
        self._known: dict[str, list[tuple[str, str]]] = {}

    def find(self, name: str, source: Path) -> _File | None:
        """The file of a name, None where there is none.

        Raises:
            InputError: it may mean two files that differ.
        """
        written = name.lstrip(">")
        if written.startswith("/"):
            found = list(_with_endings("/", *os.path.split(written)))
            if found:
                return found[0]
        head, tail = os.path.split(_relative(name))
        places = self._known.get(head)
        if places is None:
            places = self._known[head] = list(self._places(head))
        found = [file for folder, place in places for file in _with_endings(folder, place, tail)]
        if not found:
            return None
        written_so = next((file for file in found if file.exact), None)
        if written_so is not None:
            # A micrograph or a map may lie beside a stack that is called like it: images of another size are no
            # candidates, nor is a volume for a stack.
            same = written_so.path
            found = [file for file in found if file.exact or _kind(file.path) == _kind(same)]
        first = found[0]
        for other in found[1:]:
            if other.identity != first.identity and not _alike(first, other):
                leave = " or leave --datadir out," if other.folder == self._datadir else ""
                leave = " or start elsewhere," if other.folder == self._here else leave
                raise InputError(
                    f'{source}: "{name}" may be {first.path} or {other.path}, which differ; expected one file, move '
                    f"the other away,{leave} or name it by its full path"
                )
        return first._replace(here=first.folder == self._here)

    def _places(self, head: str) -> Iterator[tuple[str, str]]:
        """The folders that a name starts from and those that it leads to, where these are there."""
        parts = head.split("/") if head else []
        for folder in self._folders:
            yield from _folder(folder, head)
        if self._datadir is not None:
            for skipped in range(len(parts) + 1):
                yield from _folder(self._datadir, "/".join(parts[skipped:]))
        if self._here is not None:
            yield from _folder(self._here, head)


def _folder(folder: str, head: str) -> Iterator[tuple[str, str]]:
    place = os.path.join(folder, head) if head else folder
    if os.path.isdir(place):  # False where a path is impossible
        yield folder, place


def _with_endings(folder: str, place: str, tail: str) -> Iterator[_File]:
    """The file as it is written, then with the other ending."""
    stem, ending = os.path.splitext(tail)
    for name in (tail, stem + _OTHER_ENDING[ending]) if ending in _OTHER_ENDING else (tail,):
        file = _file(folder, os.path.join(place, name), exact=name == tail)
        if file is not None:
            yield file


def _file(folder: str, path: str, *, exact: bool) -> _File | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    # Behind a link ".." is not what it seems.
    plain = path if ".." in path else os.path.normpath(path)
    return _File(folder, plain, exact, (status.st_dev, status.st_ino), status.st_size)


def _relative(name: str) -> str:
    """A name without cryoSPARC's mark, and relative: a leading "/" would make a folder before it disappear."""
    return name.lstrip(">").lstrip("/")


def _folders_of(path: Path) -> list[str]:
    """The folder of a file and its parents, then those of the file that it links to; each once, by its first name."""
    folder = os.path.dirname(path) or "."
    starts = [os.path.realpath(folder), os.path.dirname(os.path.realpath(path))]
    named = os.path.abspath(folder)
    if os.path.realpath(named) == starts[0]:  # not so where ".." follows a link
        starts.insert(0, named)
    found: dict[str, str] = {}
    for start in starts:
        for place in (start, *map(str, Path(start).parents)):
            found.setdefault(os.path.realpath(place), place)
    return list(found.values())


def _is_parent(folder: str, others: Sequence[str]) -> bool:
    return any(Path(other) != Path(folder) and Path(other).is_relative_to(folder) for other in others)


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # the folder was removed
        return None


def _kind(path: str) -> tuple[bytes, bool]:
    """Columns and rows of an MRC file, as the header has them, and whether it says that it is a volume."""
    try:
        with open(path, "rb") as stream:
            header = stream.read(92)
    except OSError:
        return b"", False
    # Space group 1, and all sections in one cell; in the byte order of whoever wrote it.
    sections, in_cell, group = header[8:12], header[36:40], header[88:92]
    one = (b"\1\0\0\0", b"\0\0\0\1")
    return header[:8], group in one and sections == in_cell and sections not in one


def _alike(one: _File, other: _File) -> bool:
    """Whether one file is a copy of the other. Large ones are compared at their beginning, at their end and at places
    in between; two extractions differ everywhere."""
    if one.size != other.size:
        return False
    if one.size <= _BLOCK * _BLOCKS:
        places = list(range(0, one.size, _BLOCK))
    else:
        places = [(one.size - _BLOCK) * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
    try:
        with open(one.path, "rb", 0) as mine, open(other.path, "rb", 0) as theirs:
            for place in places:
                mine.seek(place)
                theirs.seek(place)
                if mine.read(_BLOCK) != theirs.read(_BLOCK):
                    return False
    except OSError:  # cannot be told
        return False
    return True
