"""Where image stacks are: the same search for every metadata format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from emsplat.errors import InputError


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
        whole = os.path.join(folders[folder], name)  # noqa: PTH118 (a tenth of the time for many thousand stacks)
        real.append(os.path.realpath(whole) if os.path.islink(whole) else whole)  # noqa: PTH114
    return real


def existing_files(names: Sequence[str], source: Path) -> list[str | None]:
    """Where files named in a metadata file lie, links followed, and None for those that are not there.

    Looked for in the folder of ``source``, its parents, and as written; a folder that many share is looked for once.
    """
    folder = source.absolute().parent
    roots = [*map(str, (folder, *folder.parents)), ""]
    places: dict[str, list[str]] = {}
    found = list[str | None]()
    for name in names:
        inner, last = os.path.split(name)
        if inner not in places:
            candidates = [os.path.join(root, inner.lstrip("/") if root else inner) for root in roots]  # noqa: PTH118
            places[inner] = [os.path.realpath(place) for place in candidates if os.path.isdir(place or ".")]  # noqa: PTH112
        paths = (os.path.join(place, last) for place in places[inner])  # noqa: PTH118
        found.append(next((os.path.realpath(path) for path in paths if os.path.isfile(path)), None))  # noqa: PTH113
    return found


def relative_to(path: Path, folder: Path) -> Path:
    """A path as seen from a folder, over the parents that both have."""
    return Path(os.path.relpath(path.absolute(), folder.absolute()))


def find_stacks(files: Sequence[str], source: Path, datadir: Path | None, *, required: bool = True) -> tuple[Path, ...]:
    """The stacks named in a metadata file, each once, in order of appearance.

    Looked for as written, in the folder of ``source`` and its parents, and below ``datadir``, also as plain file names;
    .mrc and .mrcs stand for each other. Missing ones keep the name as written where they are not ``required``.

    Raises:
        InputError: some that are required are missing; names the first and how to help.
    """
    places = _search_places(source, datadir)
    found: list[Path] = []
    missing: list[str] = []
    for file in dict.fromkeys(files):
        place = next((p for p in places(file) if os.path.isfile(p)), None)  # noqa: PTH113 (False where a path is impossible)
        found.append(place or Path(file))
        missing += [file] if place is None else []
    if missing and required:
        raise InputError(
            f"{source}: {len(missing)} of {len(found)} image stacks are missing, the first is "
            f'"{missing[0]}"; looked for it as written, in {source.absolute().parent} and its parents'
            + (f" and in {datadir}" if datadir else "")
            + "; give the folder that the paths start from with --datadir"
        )
    return tuple(found)


def _search_places(path: Path, datadir: Path | None) -> Callable[[str], list[Path]]:
    folder = path.absolute().parent
    roots = [folder, *folder.parents, *([datadir] if datadir else [])]

    def places(file: str) -> list[Path]:
        # A leading "/" would make the root disappear from root / file.
        relative = file.lstrip("/")
        candidates = [Path(file), *(root / relative for root in roots)]
        if datadir:
            candidates.append(datadir / Path(file).name)
        other = {".mrc": ".mrcs", ".mrcs": ".mrc"}
        swapped = [p.with_suffix(other[p.suffix]) for p in candidates if p.suffix in other]
        return candidates + swapped

    return places
