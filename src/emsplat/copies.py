"""Rows that show one image, and half-sets that never part them.

An image is known by its file, links followed, and its number there, whichever metadata name it. Its noise is the same
in every row, so copies in different half-sets correlate whether or not they hold a particle, and no FSC between the
halves could be believed, the cross-validated one neither. Copies come from selections that overlap, from jobs that
repeat rows, and from symmetry expansion, where their poses differ by elements of a point group.

A particle that was picked or extracted twice is another image with nearly the same pixels. It is known by its place,
where the metadata give micrographs and coordinates.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from emsplat.errors import InputError
from emsplat.geometry import symmetry_group
from emsplat.io.paths import file_numbers, real_paths
from emsplat.io.table import ParticleTable

SAME_PLACE = 20.0  # Å, as programs that remove duplicates take it
_SAME_POSE = 10.0  # degrees: more than two alignments of one image differ by, less than elements of point groups
_LARGEST_UNIT = 1 / 3  # of all particles that go to one half together
_FEW = 5000  # copies whose poses tell how a set was expanded
_EXPANDED = 0.95  # of the copies' poses that differ by elements of one group
_HIGHEST_FOLD = 24
_NAMED = 6  # classes in a message
_FARTHEST = 1e6  # Å; no micrograph is as wide


@dataclass(frozen=True)
class Copies:
    """What is repeated in a table."""

    images: int  # that are different
    rows: int  # that name an image which an earlier row names
    crossing: int  # rows whose image is in both half-sets of the file
    close: int  # rows with another image of the same place in the other half-set of the file
    expansion: str | None  # point group whose elements turn copies into each other
    turned: float  # degrees, median over the copies, from the first row of an image

    @property
    def text(self) -> str:
        """What there is, for messages; empty where nothing is repeated."""
        if not self.rows:
            return ""
        if self.expansion:
            return f"symmetry-expanded by {self.expansion}: {self.images:,} images in {self.rows + self.images:,} rows"
        text = f"{self.rows:,} rows name an image that an earlier row names too ({self.images:,} different images)"
        return text if self.turned < _SAME_POSE else f"{text}, with poses that differ by {self.turned:.0f}°"

    @property
    def near(self) -> str:
        """What is close to each other in different half-sets, for messages; empty where nothing is."""
        if not self.close:
            return ""
        return (
            f"{self.close:,} particles lie within about {SAME_PLACE:g} Å of one of the other half-set in their "
            "micrograph: picked or extracted twice, they share noise, and the FSC flatters; --redraw-halves keeps them "
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


def copies(table: ParticleTable, symmetry: str) -> Copies:
    """Counts what is repeated, with the half-sets of the table; ``symmetry`` is the first group that is tried as the
    one that the set was expanded by."""
    image = image_numbers(table)
    images = int(image.max()) + 1
    crossing = close = 0
    half = table.half_of_file
    if half is not None:
        same = _same_particle(table, image)
        crossing = int(_in_both(same, half).sum())
        places = _places(table)
        close = int((_in_both(linked(same, *places), half) & ~_in_both(same, half)).sum()) if places else 0
    expansion, turned = _expansion(image, table.poses.rotation, symmetry)
    return Copies(images, len(image) - images, crossing, close, expansion, turned)


def image_numbers(table: ParticleTable) -> Int[Tensor, " p"]:
    """Equal numbers for rows of one image, counted from 0 in order of appearance.

    A stack that is not there is known by its name as written.
    """
    file = file_numbers(table.stacks)[table.stack]
    return _counted(file * (int(table.image.max()) + 1) + table.image)


def image_marks(table: ParticleTable) -> Int[Tensor, " i"]:
    """Numbers of 64 bits that stand for the images of a table in any run, sorted, each once."""
    digests = (hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in real_paths(table.stacks))
    stack = np.frombuffer(b"".join(digests), "<u8")[table.stack.numpy()]
    # A large odd factor, so that neighbours of two stacks do not meet.
    marks = stack + table.image.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return torch.from_numpy(np.unique(marks).view(np.int64))


def first_rows(table: ParticleTable) -> Int[Tensor, " q"]:
    """The first row of each image."""
    return _firsts(image_numbers(table))


def settle_halves(table: ParticleTable, seed: int) -> Int[Tensor, " p"]:
    """Half-sets 1 and 2: those of the file, else drawn (`draw_halves`); rows without one follow their copies.

    Raises:
        InputError: the half-sets of the file part copies of an image.
    """
    image = image_numbers(table)
    same, places = _same_particle(table, image), _places(table)
    half = torch.zeros_like(same) if table.half is None else table.half
    _refuse_crossing(table, same, half)
    if not bool((half == 0).any()):
        return half
    if bool((half > 0).any()):
        for labels in (same, linked(same, *places)):
            one, two = (_holds(labels, half == number) for number in (1, 2))
            half = torch.where((half == 0) & (one != two), torch.where(one, 1, 2), half)
    rest = (half == 0).nonzero()[:, 0]
    if not len(rest):
        return half
    totals = [int((half == number).sum()) for number in (1, 2)]
    drawn = draw_halves(table.micrograph[rest], seed, same[rest], [place[rest] for place in places], totals)
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
    what = "an image" if known else "a particle (by its uid, or by its image before it was expanded or subtracted from)"
    raise InputError(
        f"{table.name}: half-sets cross: {int(both.sum()):,} of {len(both):,} rows name {what} that is in both, the "
        f"first is {name} ({table.place(first)}, and {table.place(other)}); its noise would be compared with itself. "
        f"Draw new half-sets with --redraw-halves{', or keep the first row of each image with --unique' * known}"
    )


def draw_halves(
    micrograph: Int[Tensor, " n"],
    seed: int,
    image: Int[Tensor, " n"] | None = None,
    places: Sequence[Int[Tensor, " n"]] = (),
    totals: Sequence[int] = (0, 0),
) -> Int[Tensor, " n"]:
    """Half-sets 1 and 2, rows of one image and whole micrographs together: neighbours share noise and sometimes are the
    same particle.

    Units are dealt out in random order, each to the half that has fewer particles; ``totals`` are there already. A unit
    with more than a third of all rows would leave the halves unlike: of a single micrograph, or a stack that stands
    for many, rows of one place (``places``, see `linked`) and of one image stay together, or if these are as many
    again, rows of one image alone.
    """
    image = torch.arange(len(micrograph)) if image is None else image
    unit = linked(micrograph, image, *places)
    for finer in (linked(image, *places), image):
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


def shares(table: ParticleTable, group: Float[Tensor, "s 3 3"]) -> Float[Tensor, " p"] | None:
    """The weight of each row with which every image counts once under each pose; None where all weigh 1.

    Rows of one image whose poses are equivalent under ``group``, to within 10°, share the weight of one. Under poses
    that the group does not connect an image counts each time: a set that was expanded by D2 and is reconstructed
    without symmetry gives the sums of the set before, reconstructed with D2; so it does if D2 is asked for as well.
    """
    image = image_numbers(table)
    rows = (torch.bincount(image)[image] > 1).nonzero()[:, 0]
    if not len(rows):
        return None
    kind = _pose_classes(image[rows].numpy(), table.poses.rotation[rows].numpy(), group.numpy())
    share = torch.ones(len(table))
    share[rows] = 1 / torch.bincount(kind)[kind]
    return share if bool((share != 1).any()) else None


def _pose_classes(
    image: NDArray[np.int64], rotation: NDArray[np.float64], group: NDArray[np.float64]
) -> Int[Tensor, " q"]:
    """Equal numbers for rows of one image whose poses are equivalent to that of the first among them."""
    found = np.full(len(image), -1)
    left, number = np.arange(len(image)), 0
    while len(left):
        _, first, own = np.unique(image[left], return_index=True, return_inverse=True)
        turn = _turns(rotation[left[first]][own], rotation[left])
        near = _angle_to(turn, group)[0] < _SAME_POSE
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


def _expansion(image: Int[Tensor, " p"], rotation: Float[Tensor, "p 3 3"], symmetry: str) -> tuple[str | None, float]:
    """The point group whose elements turn copies into each other, the smallest if it is not ``symmetry``; None where
    there is none. And by how many degrees copies are turned from the first of their image, the median."""
    first = _firsts(image)
    repeated = torch.ones(len(image), dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    if not len(repeated):
        return None, 0.0
    few = repeated[torch.linspace(0, len(repeated) - 1, min(_FEW, len(repeated))).long()]
    turn = _turns(rotation[first[image[few]]].numpy(), rotation[few].numpy())
    turned = float(np.median(_angle_to(turn, np.eye(3)[None])[0]))
    if turned < _SAME_POSE:
        return None, turned
    for name in [symmetry, *_known_groups()]:
        group = _group(name)
        angle, nearest = _angle_to(turn, group)
        apart = _angle_to(group, np.eye(3)[None])[0][1:].min(initial=180.0)
        near = angle < min(_SAME_POSE, apart / 3)
        if near.mean() >= _EXPANDED and len({0, *nearest[near].tolist()}) == len(group):
            return name, turned
    return None, turned


@cache
def _group(name: str) -> NDArray[np.float64]:
    group: NDArray[np.float64] = symmetry_group(name).numpy()
    return group


def _known_groups() -> list[str]:
    """Symbols of point groups, small groups first."""
    sizes = {f"{kind}{n}": n * order for n in range(2, _HIGHEST_FOLD + 1) for kind, order in (("C", 1), ("D", 2))}
    sizes |= {"T": 12, "O": 24, "I1": 60, "I2": 60, "I3": 60, "I4": 60}
    return sorted(sizes, key=sizes.__getitem__)


def _same_particle(table: ParticleTable, image: Int[Tensor, " p"]) -> Int[Tensor, " p"]:
    """Equal numbers for rows of one image, or of one particle before it was expanded, extracted again or subtracted
    from, where the files say so."""
    origin = table.origin
    if origin is None:
        return image
    alone = int(image.max()) + 1 + torch.arange(len(origin))
    return linked(image, torch.where(origin == -1, alone, int(alone[-1]) + 1 + _counted(origin)))


def _places(table: ParticleTable) -> list[Int[Tensor, " p"]]:
    """Labels that are equal for particles of one micrograph that lie close together; none where places are not known.

    Squares of `SAME_PLACE`, and the same shifted by half of that in x, in y and in both: neighbours up to half of it
    share a square of one of the four. The place is that of the particle, not of the box that it was found in.
    """
    if table.position is None:
        return []
    place = (table.position - table.poses.shift).clamp(-_FARTHEST, _FARTHEST)
    known = torch.isfinite(place).all(1)
    if not bool(known.any()):
        return []
    alone = -1 - torch.arange(len(place))
    found = []
    for x in (0.0, 0.5):
        for y in (0.0, 0.5):
            cell = torch.floor(torch.where(known[:, None], place, 0.0) / SAME_PLACE + torch.tensor([x, y])).long()
            cell -= cell.min(0).values
            columns, rows = (int(most) + 1 for most in cell.max(0).values)
            key = (table.micrograph * rows + cell[:, 1]) * columns + cell[:, 0]
            found.append(torch.where(known, key, alone))
    return found


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
