"""The particle table: what every metadata format is turned into."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from emsplat.errors import InputError
from emsplat.io.paths import existing_files
from emsplat.types import RAW, Aberrations, Optics, Poses


@dataclass(frozen=True)
class OpticsGroup:
    """Particles that were recorded alike; ``box`` in pixels (None when only the stack knows), ``pixel_size`` in Å.

    ``original_pixel_size`` in Å is that of the micrographs before any binning, where the file says it.
    """

    name: str
    pixel_size: float
    box: int | None
    original_pixel_size: float | None = None


@dataclass(frozen=True)
class ParticleTable:
    """Metadata of particles in house units, in the order of their file or files."""

    sources: tuple[Path, ...]
    source: Int[Tensor, " p"]  # index into sources
    row: Int[Tensor, " p"]  # 0-based row in its source
    poses: Poses  # float64
    optics: Optics  # float64
    groups: tuple[OpticsGroup, ...]
    optics_group: Int[Tensor, " p"]  # index into groups
    half: Int[Tensor, " p"] | None  # 1 or 2, 0 where a merged file does not say; None when none does
    micrograph: Int[Tensor, " p"]  # equal for particles of one micrograph
    stacks: tuple[Path, ...]  # each file once; absolute, or as written where it is missing
    stack: Int[Tensor, " p"]  # index into stacks
    image: Int[Tensor, " p"]  # 0-based index in the stack
    drawn: Bool[Tensor, " p"] | None = None  # whether the half is not the file's; None: of none
    particle_class: Int[Tensor, " p"] | None = None
    micrograph_names: tuple[str, ...] = ()  # of each number in ``micrograph``; empty when not known
    uid: Int[Tensor, " p"] | None = None  # cryoSPARC's, as signed integers
    origin: Int[Tensor, " p"] | None = None  # equal for rows of one particle, over files; -1 where not said
    coordinates: Float[Tensor, "p 2"] | None = None  # (x, y) of the box in pixels of the micrograph; NaN where not said
    micrograph_pixel_size: Float[Tensor, " p"] | None = None  # Å, of the coordinates; NaN where not said
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was read from where, to be said once and no cause for concern
    sign: float = 1.0  # factor that makes protein bright
    mirrored: bool = False  # poses are those of the other hand than in the sources
    folders: tuple[Path, ...] = ()  # that the names of the stacks start from
    passthrough: tuple[Path, ...] = ()  # files of cryoSPARC that were named to have what the source lacks
    left_out: int = 0  # rows that repeated an image and were left out for it
    changed: tuple[str, ...] = ()  # not as in the sources: poses, ctf (defocus, scale, B factor), aberrations

    def __len__(self) -> int:
        return len(self.poses)

    @property
    def half_of_file(self) -> Int[Tensor, " p"] | None:
        """The half-sets as the files have them: 0 where one was drawn, None where all were."""
        if self.half is None or self.drawn is None:
            return self.half
        return None if bool(self.drawn.all()) else torch.where(self.drawn, 0, self.half)

    @property
    def name(self) -> str:
        """The files that the particles come from, for messages."""
        return " + ".join(map(str, self.sources))

    @property
    def position(self) -> Float[Tensor, "p 2"] | None:
        """Where the boxes lie in their micrographs, (x, y) in Å, NaN where that is not said; None where it is said of
        none, or is the same of all."""
        if self.coordinates is None or self.micrograph_pixel_size is None:
            return None
        place = self.coordinates * self.micrograph_pixel_size[:, None]
        known = place[torch.isfinite(place).all(1)]
        return None if not len(known) or bool((known == known[0]).all()) else place

    def place(self, particle: int) -> str:
        """The file and row of a particle, for messages."""
        return f"{self.sources[int(self.source[particle])]}, row {int(self.row[particle]) + 1}"

    def take(self, rows: Int[Tensor, " q"]) -> ParticleTable:
        """These particles; stacks, groups and micrographs keep their numbers."""
        return replace(
            self,
            source=self.source[rows],
            row=self.row[rows],
            poses=self.poses[rows],
            optics=self.optics[rows],
            optics_group=self.optics_group[rows],
            half=None if self.half is None else self.half[rows],
            drawn=None if self.drawn is None else self.drawn[rows],
            micrograph=self.micrograph[rows],
            stack=self.stack[rows],
            image=self.image[rows],
            particle_class=None if self.particle_class is None else self.particle_class[rows],
            uid=None if self.uid is None else self.uid[rows],
            origin=None if self.origin is None else self.origin[rows],
            coordinates=None if self.coordinates is None else self.coordinates[rows],
            micrograph_pixel_size=None if self.micrograph_pixel_size is None else self.micrograph_pixel_size[rows],
        )


def merge_tables(tables: Sequence[ParticleTable]) -> ParticleTable:
    """The particles of several tables one after the other; optics groups of one name are told apart by a number.

    Raises:
        InputError: images of different contrast.
    """
    first = tables[0]
    if len(tables) == 1:
        micrograph, known = _micrographs(tables)
        # Where stacks stand for micrographs there are no names to be had.
        return replace(first, micrograph=micrograph, micrograph_names=known if first.micrograph_names else ())
    other = next((table for table in tables if table.sign != first.sign), None)
    if other is not None:
        raise InputError(
            f"{other.name}: protein is {'bright' if other.sign > 0 else 'dark'}, and the opposite in {first.name}; "
            "merge particles of one contrast, `emsplat preprocess --invert` writes the other one"
        )

    def numbers(name: str, counts: Sequence[int]) -> Tensor:
        """A column of numbers that count on from table to table."""
        start = [sum(counts[:i]) for i in range(len(counts))]
        return torch.cat([getattr(table, name) + offset for table, offset in zip(tables, start, strict=True)])

    def optional(name: str, missing: int | float | None) -> Tensor | None:
        """A column that tables may lack: filled up, or given up where nothing can stand for it."""
        columns = [getattr(table, name) for table in tables]
        if all(column is None for column in columns) or (missing is None and any(column is None for column in columns)):
            return None
        like = next(column for column in columns if column is not None)
        filled = [
            like.new_full((len(t), *like.shape[1:]), missing or 0) if c is None else c
            for t, c in zip(tables, columns, strict=True)
        ]
        return torch.cat(filled)

    groups: list[OpticsGroup] = []
    for group in (group for table in tables for group in table.groups):
        taken = {other.name for other in groups}
        names = (group.name if number == 1 else f"{group.name}_{number}" for number in itertools.count(1))
        groups.append(replace(group, name=next(name for name in names if name not in taken)))
    micrograph, micrograph_names = _micrographs(tables)
    return ParticleTable(
        sources=tuple(path for table in tables for path in table.sources),
        source=numbers("source", [len(table.sources) for table in tables]),
        row=torch.cat([table.row for table in tables]),
        poses=Poses(*(torch.cat([getattr(table.poses, name) for table in tables]) for name in ("rotation", "shift"))),
        optics=joined_optics([table.optics for table in tables]),
        groups=tuple(groups),
        optics_group=numbers("optics_group", [len(table.groups) for table in tables]),
        half=optional("half", 0),
        micrograph=micrograph,
        stacks=tuple(path for table in tables for path in table.stacks),
        stack=numbers("stack", [len(table.stacks) for table in tables]),
        image=torch.cat([table.image for table in tables]),
        particle_class=optional("particle_class", None),
        micrograph_names=micrograph_names,
        uid=optional("uid", None),
        origin=optional("origin", -1),
        coordinates=optional("coordinates", torch.nan),
        micrograph_pixel_size=optional("micrograph_pixel_size", torch.nan),
        warnings=tuple(warning for table in tables for warning in table.warnings),
        notes=tuple(dict.fromkeys(note for table in tables for note in table.notes)),
        sign=first.sign,
        folders=tuple(dict.fromkeys(folder for table in tables for folder in table.folders)),
    )


def _micrographs(tables: Sequence[ParticleTable]) -> tuple[Int[Tensor, " p"], tuple[str, ...]]:
    """The micrographs of tables with one number for each, and their names, empty where some have none.

    One that is found is known by its file, links followed, another by its name, however that is spelled, and by the
    whole name of one that its own ends with, if that has a folder: two projects may then share a number, which keeps
    particles together that might have been parted, and costs nothing else. Where a table has no names and stacks stand
    for micrographs, these do so here.
    """
    entries: list[tuple[str | None, str | None]] = []  # name and file
    start = []
    for table in tables:
        start.append(len(entries))
        if table.micrograph_names:
            entries += zip(
                table.micrograph_names, existing_files(table.micrograph_names, table.sources[0]), strict=True
            )
        elif torch.equal(table.micrograph, table.stack):
            names = [str(path) for path in table.stacks]
            entries += zip(names, existing_files(names, table.sources[0]), strict=True)
        else:
            entries += [(None, None)] * (int(table.micrograph.max()) + 1)
    number: list[int] = [-1] * len(entries)
    of_file: dict[str, int] = {}
    of_name: dict[str, int] = {}
    of_tail: dict[str, int] = {}
    gone: list[tuple[list[str], int]] = []
    for place, (name, file) in enumerate(entries):
        if name is None:
            number[place] = place
        elif file is None:
            gone.append((_tails(name), place))
        else:
            number[place] = of_file.setdefault(file, place)
            whole, *others = _tails(name)
            of_name.setdefault(whole, number[place])
            for tail in others:
                of_tail.setdefault(tail, number[place])
    for (whole, *others), place in sorted(gone, key=lambda one: len(one[0])):  # short names first, in order
        known = (of_name.get(name) for name in (whole, *others))
        number[place] = next((found for found in known if found is not None), of_tail.get(whole, place))
        of_name.setdefault(whole, number[place])
    kept = {first: count for count, first in enumerate(dict.fromkeys(number))}
    lookup = torch.tensor([kept[first] for first in number])
    names_kept = tuple(entries[first][0] or "" for first in kept)
    merged = torch.cat([lookup[table.micrograph + offset] for table, offset in zip(tables, start, strict=True)])
    return merged, names_kept if all(names_kept) else ()


def _tails(name: str) -> list[str]:
    """A name, and what it ends with that has a folder, longest first; absolute or not."""
    parts = os.path.normpath(name).lstrip("/").split("/")
    return ["/".join(parts[start:]) for start in range(max(1, len(parts) - 1))]


def joined_optics(parts: Sequence[Optics]) -> Optics:
    """One after the other; parts without aberrations get those of a perfect image."""
    columns: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(Optics)
        if field.name not in ("aberrations", "treatment")
    }
    treatment = None
    if any(part.treatment is not None for part in parts):
        treatment = torch.cat([torch.full((len(p),), RAW) if p.treatment is None else p.treatment for p in parts])
    found = [part.aberrations for part in parts]
    if all(one is None for one in found):
        return Optics(**columns, treatment=treatment)
    known = [_perfect(len(part)) if one is None else one for part, one in zip(parts, found, strict=True)]
    odd, even = (max(getattr(one, kind).shape[1] for one in known) for kind in ("odd", "even"))
    aberrations = Aberrations(
        torch.cat([one.magnification for one in known]),
        torch.cat([pad(one.odd, (0, odd - one.odd.shape[1])) for one in known]),
        torch.cat([pad(one.even, (0, even - one.even.shape[1])) for one in known]),
    )
    return Optics(**columns, aberrations=aberrations, treatment=treatment)


def _perfect(count: int) -> Aberrations:
    """The aberrations of images that have none."""
    none = torch.zeros(count, 0, dtype=torch.float64)
    return Aberrations(torch.eye(2, dtype=torch.float64).repeat(count, 1, 1), none, none)


_SMALL_DEFOCUS = 100.0  # Å, below which no set of images is

# kV, mm and a fraction; other units lie far outside
_POSSIBLE = {
    "voltage": (1.0, 1e4, "in kV"),
    "cs": (-100.0, 100.0, "in mm"),
    "amplitude_contrast": (-1.0, 1.0, "as a fraction"),
}


def refuse_impossible(path: Path, optics: Optics, names: Sequence[str]) -> None:
    """Refuses voltage, Cs and amplitude contrast (``names`` in the file, in this order) of no microscope.

    Raises:
        InputError: names the first row.
    """
    for name, (field, (low, high, unit)) in zip(names, _POSSIBLE.items(), strict=True):
        values = getattr(optics, field)
        bad = (~((values >= low) & (values <= high))).nonzero()
        if len(bad):
            row = int(bad[0])
            raise InputError(
                f"{path}, row {row + 1}: {name} is {values[row]:g}; expected a possible value {unit}, from {low:g} to "
                f"{high:g}"
            )


def doubts(path: Path, optics: Optics) -> list[str]:
    """What a CTF says that may be meant, but seldom is."""
    count = int(((optics.defocus_u == 0) & (optics.defocus_v == 0)).sum())
    if count:
        return [
            f"{path}: the defocus of {count:,} of {len(optics):,} particles is 0, and their images are taken to be in "
            "focus; where it was never estimated, take the file of a job after CTF estimation"
        ]
    largest = float(optics.defocus_u.abs().max())
    if largest < _SMALL_DEFOCUS:
        return [
            f"{path}: the defocus of all particles is {largest:.3g} or less and is taken in Å; where that is µm, as "
            "other programs have it, multiply the columns by 10,000"
        ]
    if bool((optics.defocus_u + optics.defocus_v < 0).all()):
        return [
            f"{path}: the defocus of all particles is below 0, and is taken as overfocus; where it is underfocus with "
            "the sign of another program, turn the sign of the columns round"
        ]
    return []
