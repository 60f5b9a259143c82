"""Rows that show one image, and half-sets that never part them.

An image is known by its file, links followed, and its number there, whichever metadata name it. Its noise is the same
in every row, so copies in different half-sets correlate whether or not they hold a particle, and no FSC between the
halves could be believed, the cross-validated one neither. Copies come from selections that overlap, from jobs that
repeat rows, and from symmetry expansion, where their poses differ by elements of a point group.

A particle may have several images: written into another stack, or with something subtracted, once for each pose of an
expanded set. Where files say so, by uids or names of originals, these are copies as well; under poses that differ they
are different images of it. One that was picked or extracted twice is known by its place, where the metadata give
micrographs and coordinates.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.paths import file_numbers, real_paths
from emsplat.io.table import ParticleTable
from emsplat.maths.groups import C1, Symmetry, cyclic, dihedral, icosahedral, octahedral, tetrahedral

SAME_PLACE = 20.0  # Å, as programs that remove duplicates take it
_SAME_POSE = 10.0  # degrees: more than two alignments of one image differ by, less than units of most helices
_REFINED = 30.0  # degrees that local refinement takes two copies of an expanded set apart, 15 each
_LARGEST_UNIT = 1 / 3  # of all particles that go to one half together
_FEW = 5000  # copies whose poses tell how a set was expanded
_EXPANDED = 0.95  # of the copies' poses that differ by elements of one group
_HIGHEST_FOLD = 24
_MOST_POSES = 120  # of one image that are told apart; point groups of particles have at most 60 elements
_CROWD = 16  # particles in a square of 14 Å: picks do not lie so, dummy coordinates do
_NAMED = 6  # classes in a message
_ODD = 0x9E3779B97F4A7C15  # large, so that marks of neighbours of two stacks do not meet
_FARTHEST = 1e6  # Å; no micrograph is as wide


@dataclass(frozen=True)
class Copies:
    """What is repeated in a table."""

    images: int  # that are different
    rows: int  # that name an image which an earlier row names
    again: int  # further images that show a particle of an earlier row
    crossing: int  # rows whose particle is in both half-sets
    close: int  # rows with another particle within `SAME_PLACE` in the other half-set
    drawn: bool  # the half-sets are not those of the file
    expansion: Symmetry | None  # point group whose elements turn copies into each other
    turned: float  # degrees, median over the copies, from the first row of an image

    @property
    def text(self) -> str:
        """What there is, for messages; empty where nothing is repeated."""
        if not self.rows and not self.again:
            return ""
        if self.expansion is not None:
            what = f"{self.images - self.again:,} {'particles' if self.again else 'images'}"
            own = ", with images of their own (by uid or rlnImageOriginalName)" if self.again else ""
            return f"symmetry-expanded by {self.expansion.symbol}: {what} in {self.rows + self.images:,} rows{own}"
        found = []
        if self.rows:
            found.append(
                f"{self.rows:,} rows name an image that an earlier row names too ({self.images:,} different images)"
            )
        if self.again:
            found.append(
                f"{self.again:,} images show a particle that an earlier row shows in another image (by uid or "
                f"rlnImageOriginalName; {self.images - self.again:,} different particles)"
            )
        text = ", ".join(found)
        return text if self.turned < _SAME_POSE else f"{text}, with poses that differ by {self.turned:.0f}°"

    @property
    def near(self) -> str:
        """What is close to each other in different half-sets, for messages; empty where nothing is."""
        if not self.close:
            return ""
        text = f"{self.close:,} particles lie within {SAME_PLACE:g} Å of one of the other half-set in their micrograph"
        if self.drawn:
            return (
                f"{text}: neighbours that touch neighbours are more than a third of all, and were dealt out one by "
                "one; they share noise, and the FSC flatters: add particles of other micrographs, or remove duplicates"
            )
        return (
            f"{text}: picked or extracted twice, they share noise, and the FSC flatters; --redraw-halves keeps them "
            "together"
        )


def mixed_classes(table: ParticleTable) -> str:
    """A sentence where one of the files holds particles of several classes; empty where none does.

    Numbers of two files come from two classifications and mean nothing beside each other.
    """
    if table.particle_class is None:
        return ""
    for number, path in enumerate(table.sources):
        found, count = torch.unique(table.particle_class[table.source == number], return_counts=True)
        if len(found) > 1:
            pairs = zip(found.tolist(), count.tolist(), strict=True)
            named = ", ".join(f"class {name}: {many:,}" for name, many in list(pairs)[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            return (
                f"{path}: {len(found)} classes are mixed ({named}{more}); where they are those of a 3D classification, "
                "take one with --class"
            )
    return ""


def copies(table: ParticleTable, symmetry: Symmetry) -> Copies:
    """Counts what is repeated, with the half-sets of the table; ``symmetry`` is the first group that is tried as the
    one that the set was expanded by."""
    half = table.half
    image = image_numbers(table)
    same = particle_numbers(table, image)
    images, particles = int(image.max()) + 1, int(same.max()) + 1
    crossing = close = 0
    if half is not None:
        both = _in_both(same, half)
        crossing = int(both.sum())
        close = int((_beside_other_half(table, half) & ~both).sum())
    expansion, turned = _expansion(same, table.poses.rotation, symmetry)
    drawn = table.half_of_file is None
    return Copies(images, len(image) - images, images - particles, crossing, close, drawn, expansion, turned)


def image_numbers(table: ParticleTable) -> Int[Tensor, " p"]:
    """Equal numbers for rows of one image, counted from 0 in order of appearance.

    A stack that is not there is known by its name as written.
    """
    file = file_numbers(table.stacks)[table.stack]
    return _counted(file * (int(table.image.max()) + 1) + table.image)


def particle_numbers(table: ParticleTable, image: Int[Tensor, " p"] | None = None) -> Int[Tensor, " p"]:
    """Equal numbers for rows of one image, or of one particle before it was expanded, extracted again or subtracted
    from, where the files say so. ``image`` is `image_numbers` where that is known. Counted from 0 in order of
    appearance."""
    image = image_numbers(table) if image is None else image
    origin = table.origin
    if origin is None:
        return image
    alone = int(image.max()) + 1 + torch.arange(len(origin))
    return linked(image, torch.where(origin == -1, alone, int(alone[-1]) + 1 + _counted(origin)))


def image_marks(table: ParticleTable) -> Int[Tensor, "i 3"]:
    """Numbers of 64 bits that stand for the images of a table in any run, each image once, sorted by the first.

    The first follows from the path of the stack, links followed; the second from its file, so that hard links and other
    mounts are seen (inode, size and time of change: without the time a later file could have the same); the third from
    the particle, by uid or rlnImageOriginalName. 0 is not known.
    """
    number = table.image.numpy().astype(np.uint64)
    columns = [
        np.array([_digest(text) for text in texts], np.uint64)[table.stack.numpy()] + number * np.uint64(_ODD)
        for texts in (real_paths(table.stacks), [_file_of(path) for path in table.stacks])
    ]
    if table.origin is None:
        columns.append(np.zeros_like(number))
    else:
        columns.append(np.where(table.origin.numpy() == -1, 0, table.origin.numpy()).view(np.uint64))
    marks = np.stack(columns, 1).view(np.int64)
    return torch.from_numpy(marks[np.unique(marks[:, 0], return_index=True)[1]])


def marks_in(marks: Int[Tensor, "i 3"], others: Int[Tensor, "j 3"]) -> Int[Tensor, " k"]:
    """Positions of the images (`image_marks`) that are among others."""
    pairs = zip(marks.numpy().T, others.numpy().T, strict=True)
    found = [(one != 0) & np.isin(one, other[other != 0]) for one, other in pairs]
    return torch.from_numpy(np.flatnonzero(np.any(found, 0)))


def _file_of(path: Path) -> str:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return str(path)
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def first_rows(table: ParticleTable) -> Int[Tensor, " q"]:
    """The first row of each image."""
    return _firsts(image_numbers(table))


def first_of_particles(table: ParticleTable) -> Int[Tensor, " q"]:
    """The first row of each particle, as `particle_numbers` knows them."""
    return _firsts(particle_numbers(table))


def unique_rows(table: ParticleTable, symmetry: Symmetry) -> Int[Tensor, " q"]:
    """The first row of each image; of several images of one particle, the first of those whose poses agree (`shares`).

    So one that is in two stacks is left once, and what was subtracted under each pose of an expanded set stays.
    """
    image = image_numbers(table)
    first = torch.zeros(len(table), dtype=torch.bool).index_fill(0, _firsts(image), True)
    same = particle_numbers(table, image)
    several = (torch.bincount(same)[same] > 1).nonzero()[:, 0]
    if len(several):
        kind = _counted(_pose_classes(same[several], table.poses.rotation[several], symmetry))
        later = torch.ones(len(several), dtype=torch.bool).index_fill(0, _firsts(kind), False)
        first[several[later]] = False
    return first.nonzero()[:, 0]


def with_halves(table: ParticleTable, seed: int) -> ParticleTable:
    """With the half-sets of `settle_halves`, and which of them were drawn.

    Raises:
        InputError: the half-sets of the file part copies of an image.
    """
    told = table.half_of_file
    drawn = torch.ones(len(table), dtype=torch.bool) if told is None else told == 0
    return replace(table, half=settle_halves(table, seed), drawn=drawn)


def settle_halves(table: ParticleTable, seed: int) -> Int[Tensor, " p"]:
    """Half-sets 1 and 2: those of the file, else drawn (`draw_halves`); rows without one follow their copies.

    Raises:
        InputError: the half-sets of the file part copies of an image.
    """
    image = image_numbers(table)
    same, place = particle_numbers(table, image), _places(table)
    half = torch.zeros_like(same) if table.half is None else table.half
    _refuse_crossing(table, same, half)
    if not bool((half == 0).any()):
        return half
    if bool((half > 0).any()):
        for labels in (same, linked(same, place)):
            one, two = (_holds(labels, half == number) for number in (1, 2))
            half = torch.where((half == 0) & (one != two), torch.where(one, 1, 2), half)
    rest = (half == 0).nonzero()[:, 0]
    if not len(rest):
        return half
    totals = [int((half == number).sum()) for number in (1, 2)]
    drawn = draw_halves(table.micrograph[rest], seed, same[rest], place[rest], totals)
    return half.index_copy(0, rest, drawn)


def _refuse_crossing(table: ParticleTable, same: Int[Tensor, " p"], half: Int[Tensor, " p"]) -> None:
    both = _in_both(same, half)
    if not bool(both.any()):
        return
    first = int(both.nonzero()[0])
    other = int(((same == same[first]) & (half > 0) & (half != half[first])).nonzero()[0])
    name = f"{int(table.image[first]) + 1}@{table.stacks[int(table.stack[first])]}"
    image = image_numbers(table)
    known = bool(image[first] == image[other])
    left = unique_rows(table, C1)
    helps = not bool(_in_both(same[left], half[left]).any())
    what = "an image" if known else "a particle (by its uid, or by its image before it was expanded or subtracted from)"
    raise InputError(
        f"{table.name}: half-sets cross: {int(both.sum()):,} of {len(both):,} rows name {what} that is in both, the "
        f"first is {name} ({table.place(first)}, and {table.place(other)}); its noise would be compared with itself. "
        f"Draw new half-sets with --redraw-halves{', or keep the first row of each with --unique' * helps}"
    )


def draw_halves(
    micrograph: Int[Tensor, " n"],
    seed: int,
    image: Int[Tensor, " n"] | None = None,
    place: Int[Tensor, " n"] | None = None,
    totals: Sequence[int] = (0, 0),
) -> Int[Tensor, " n"]:
    """Half-sets 1 and 2, rows of one image and whole micrographs together: neighbours share noise and sometimes are the
    same particle.

    Units are dealt out in random order, each to the half that has fewer particles; ``totals`` are there already. A unit
    with more than a third of all rows would leave the halves unlike: of a single micrograph, or a stack that stands
    for many, rows of one ``place`` and of one image stay together, or if these are as many again, rows of one image
    alone.
    """
    image = torch.arange(len(micrograph)) if image is None else image
    near = image if place is None else linked(image, place)
    unit = linked(micrograph, near)
    for finer in (near, image):
        large = torch.bincount(unit)[unit] > _LARGEST_UNIT * len(unit)
        unit = _counted(torch.where(large, int(unit.max()) + 1 + finer, unit))
    sizes = torch.bincount(unit).tolist()
    rng = torch.Generator().manual_seed(seed)
    dealt, half = list(totals), torch.empty(len(sizes), dtype=torch.int64)
    for number in torch.randperm(len(sizes), generator=rng).tolist():
        lesser = int(dealt[1] < dealt[0])
        half[number] = lesser + 1
        dealt[lesser] += sizes[number]
    return half[unit]


def linked(*labels: Int[Tensor, " p"]) -> Int[Tensor, " p"]:
    """Equal numbers for rows that are connected: directly by an equal label of one kind, or over other rows. Counted
    from 0 in order of appearance."""
    counted = [_counted(label) for label in labels]
    if len(counted) == 1:
        return counted[0]
    starts = np.cumsum([0, *(int(label.max()) + 1 for label in counted)])
    first = counted[0].numpy()
    start = np.tile(first, len(counted) - 1)
    end = np.concatenate([label.numpy() + offset for label, offset in zip(counted[1:], starts[1:-1], strict=True)])
    graph = coo_array((np.ones(len(start), np.int8), (start, end)), shape=(starts[-1], starts[-1]))
    _, component = connected_components(graph, directed=False)
    return _counted(torch.from_numpy(component.astype(np.int64)[first]))


def shares(table: ParticleTable, symmetry: Symmetry) -> Float[Tensor, " p"] | None:
    """The weight of each row with which every particle counts once under each pose; None where all weigh 1.

    Rows of one image, or of one particle in several images, whose poses are equivalent under ``symmetry`` share the
    weight of one. Under poses that the group does not connect it counts each time: a set that was expanded by D2 and is
    reconstructed without symmetry gives the sums of the set before, reconstructed with D2; so it does if D2 is asked
    for as well.

    Poses are equivalent to within 10°; in a set that was expanded by a point group to within 30°, but no more than a
    third of its smallest angle: refined locally, copies move by up to 15° each, and are still nearer to their own pose
    than to that of another element. Where no group is known that would be too much, since neighbours of a helix lie 20°
    to 30° apart.
    """
    same = particle_numbers(table)
    rows = (torch.bincount(same)[same] > 1).nonzero()[:, 0]
    if not len(rows):
        return None
    kind = _pose_classes(same[rows], table.poses.rotation[rows], symmetry)
    share = torch.ones(len(table))
    share[rows] = 1 / torch.bincount(kind)[kind]
    return share if bool((share != 1).any()) else None


def _pose_classes(same: Int[Tensor, " q"], rotation: Float[Tensor, "q 3 3"], symmetry: Symmetry) -> Int[Tensor, " q"]:
    """Equal numbers for rows of one particle whose poses are equivalent to that of the first among them, as `shares`
    takes it; beyond `_MOST_POSES` all others of a particle are one."""
    expansion, _ = _expansion(_counted(same), rotation, C1)
    tolerance = _SAME_POSE if expansion is None else _tolerance(expansion.elements.numpy())
    least = 1 + 2 * math.cos(math.radians(tolerance))  # trace of a turn
    labels, pose, elements = same.numpy(), rotation.numpy(), symmetry.elements.numpy()
    found = np.full(len(labels), -1)
    left, number = np.arange(len(labels)), 0
    for count in range(_MOST_POSES + 1):
        if not len(left):
            break
        _, first, own = np.unique(labels[left], return_index=True, return_inverse=True)
        own = own.reshape(-1)
        near = np.full(len(left), count == _MOST_POSES)
        if not near.all():
            mine, leaders = pose[left].reshape(-1, 9), pose[left[first]]
            for element in elements:
                near |= np.einsum("pi,pi->p", (leaders @ element).reshape(-1, 9)[own], mine) > least
        found[left[near]] = number + own[near]
        left, number = left[~near], number + len(first)
    return torch.from_numpy(found)


def _turns(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """R with ``other`` = ``one`` R, for each pair of poses."""
    return one.transpose(0, 2, 1) @ other


def _angle_to(turn: NDArray[np.float64], group: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Degrees from each rotation to the nearest element of a group, and which that is."""
    cosine, nearest = np.full(len(turn), -1.0), np.zeros(len(turn), np.int64)
    for number, element in enumerate(group):
        own = (np.einsum("pij,ij->p", turn, element) - 1) / 2
        nearest[own > cosine] = number
        cosine = np.maximum(cosine, own)
    return np.degrees(np.arccos(cosine.clip(-1, 1))), nearest


def _tolerance(group: NDArray[np.float64]) -> float:
    """Degrees within which copies of a set that was expanded by a group are taken to have the same pose."""
    apart = _angle_to(group, np.eye(3)[None])[0][1:].min(initial=180.0)
    return min(_REFINED, float(apart) / 3)


def _expansion(
    same: Int[Tensor, " p"], rotation: Float[Tensor, "p 3 3"], symmetry: Symmetry
) -> tuple[Symmetry | None, float]:
    """The point group whose elements turn copies into each other, the smallest if it is not ``symmetry``; None where
    there is none. And by how many degrees copies are turned from the first row of their particle, the median."""
    first = _firsts(same)
    repeated = torch.ones(len(same), dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    if not len(repeated):
        return None, 0.0
    few = repeated[torch.linspace(0, len(repeated) - 1, min(_FEW, len(repeated))).long()]
    turn = _turns(rotation[first[same[few]]].numpy(), rotation[few].numpy())
    turned = float(np.median(_angle_to(turn, np.eye(3)[None])[0]))
    if turned < _SAME_POSE:
        return None, turned
    for known in [symmetry, *_known_groups()]:
        group = known.elements.numpy()
        tolerance = _tolerance(group)
        if turned < tolerance:  # most are not turned to another element; so also without symmetry
            continue
        angle, nearest = _angle_to(turn, group)
        near = angle < tolerance
        if near.mean() >= _EXPANDED and len({0, *nearest[near].tolist()}) == len(group) > 1:
            return known, turned
    return None, turned


def _known_groups() -> list[Symmetry]:
    """Point groups, small ones first."""
    groups = [kind(fold) for fold in range(2, _HIGHEST_FOLD + 1) for kind in (cyclic, dihedral)]
    groups += [tetrahedral(), octahedral(), *(icosahedral(setting) for setting in "1234")]
    return sorted(groups, key=lambda group: group.order)


def _places(table: ParticleTable) -> Int[Tensor, " p"]:
    """Equal numbers for particles of one micrograph that lie within `SAME_PLACE` of each other, or are connected by
    others that do.

    Those in a square whose diagonal is that long do. Between squares neighbours are looked for, in a crowd those of a
    few: dummy coordinates put thousands into one place, and all their pairs would never end.
    """
    rows, place = _points(table)
    if not len(rows):
        return torch.arange(len(table))
    cell = np.floor(place / [SAME_PLACE / math.sqrt(2), SAME_PLACE / math.sqrt(2), 1.0]).astype(np.int64)
    order = np.lexsort(cell.T)
    new = np.append(True, (np.diff(cell[order], axis=0) != 0).any(1))
    start = np.flatnonzero(new)[np.cumsum(new) - 1]
    few = order[np.arange(len(order)) - start < _CROWD]
    pairs = few[cKDTree(place[few]).query_pairs(SAME_PLACE, output_type="ndarray")]
    one = np.concatenate([order[start], pairs[:, 0]])
    other = np.concatenate([order, pairs[:, 1]])
    graph = coo_array((np.ones(len(one), np.int8), (rows[one], rows[other])), shape=(len(table),) * 2)
    _, component = connected_components(graph, directed=False)
    return _counted(torch.from_numpy(component.astype(np.int64)))


def same_places(table: ParticleTable, first: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Rows before ``first`` and rows from there on that are nearest to each other in their micrograph, and lie within
    `SAME_PLACE`."""
    rows, place = _points(table)
    sides = [np.flatnonzero(rows < first), np.flatnonzero(rows >= first)]
    if not all(map(len, sides)):
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    trees = [cKDTree(place[side]) for side in sides]
    away, forth = map(np.asarray, trees[1].query(place[sides[0]]))
    back = np.asarray(trees[0].query(place[sides[1]])[1])
    mutual = (away <= SAME_PLACE) & (back[forth] == np.arange(len(forth)))
    return torch.from_numpy(rows[sides[0][mutual]]), torch.from_numpy(rows[sides[1][forth[mutual]]])


def _beside_other_half(table: ParticleTable, half: Int[Tensor, " p"]) -> Tensor:
    """Which rows have one of the other half-set within `SAME_PLACE` in their micrograph."""
    found = torch.zeros(len(table), dtype=torch.bool)
    rows, place = _points(table)
    own = half.numpy()[rows]
    for number in (1, 2):
        # Each place once: trees do not part equal points.
        others = np.unique(place[own == 3 - number], axis=0)
        if len(others):
            mine = own == number
            distance, _ = cKDTree(others).query(place[mine], distance_upper_bound=np.nextafter(SAME_PLACE, np.inf))
            found[torch.from_numpy(rows[mine])] = torch.from_numpy(np.isfinite(distance))
    return found


def _points(table: ParticleTable) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows whose places are known, and these (x, y, z) in Å: z parts micrographs, and no two lie within reach.

    The place is that of the particle, not of the box that it was found in.
    """
    if table.position is None:
        return np.zeros(0, np.int64), np.zeros((0, 3))
    place = (table.position - table.poses.shift).clamp(-_FARTHEST, _FARTHEST)
    known = torch.isfinite(place).all(1)
    depth = 2 * SAME_PLACE * table.micrograph.double()
    return known.nonzero()[:, 0].numpy(), torch.cat([place, depth[:, None]], 1)[known].numpy()


def _in_both(labels: Int[Tensor, " p"], half: Int[Tensor, " p"]) -> Tensor:
    """Which rows have a label that is found in both half-sets."""
    return _holds(labels, half == 1) & _holds(labels, half == 2)


def _holds(labels: Int[Tensor, " p"], wanted: Tensor) -> Tensor:
    """Which rows have the label of a row that is wanted."""
    found = torch.zeros(int(labels.max()) + 1, dtype=torch.bool)
    found[labels[wanted]] = True
    return found[labels]


def _counted(labels: Int[Tensor, " p"]) -> Int[Tensor, " p"]:
    """The same labels as numbers from 0 in order of appearance."""
    _, first, inverse = np.unique(labels.numpy(), return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return torch.from_numpy(rank[inverse.reshape(-1)])


def _firsts(counted: Int[Tensor, " p"]) -> Int[Tensor, " q"]:
    """The first row of each number of `_counted`."""
    return torch.from_numpy(np.unique(counted.numpy(), return_index=True)[1])
