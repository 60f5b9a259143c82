"""Poses of two files of the same particles, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from emsplat.config import ComparePosesConfig
from emsplat.errors import InputError
from emsplat.io.particles import read_particles
from emsplat.io.table import ParticleTable, merge_tables
from emsplat.particles.copies import image_numbers, particle_numbers, same_places
from emsplat.poses.compare import compare_poses
from emsplat.run.log import counted

_FEW = 0.3  # share within 10° below which the frames have hardly been found


def compare(first: Path, second: Path, config: ComparePosesConfig) -> dict[str, Any]:
    """The numbers of `poses.compare.PoseComparison` for the particles that both files have.

    Raises:
        InputError: a file cannot be read, or they share fewer than two particles.
    """
    group = config.point_group
    tables = [read_particles(path, need_stacks=False) for path in (first, second)]
    how, *rows = matched(tables[0], tables[1])
    one, other = (table.poses[own] for table, own in zip(tables, rows, strict=True))
    return {
        "first": str(first),
        "second": str(second),
        "symmetry": group.symbol,
        "of": [len(table) for table in tables],
        "matched_by": how,
        **compare_poses(one, other, group).numbers(),
    }


def matched(first: ParticleTable, second: ParticleTable) -> tuple[str, Int[Tensor, " m"], Int[Tensor, " m"]]:
    """How rows of two tables were found to show the same particles, and which.

    By what tells most of them: the image (file and number), the particle (uid or rlnImageOriginalName), or the place in
    the micrograph. Else by the names of stacks, where one of the two is not there: stacks that are there and are not
    one file hold different images, whatever their names. Else row by row where both have as many.

    Raises:
        InputError: fewer than two.
    """
    count = len(first)
    both = merge_tables([first, replace(second, sign=first.sign)])
    ways = {
        "image": _pairs(image_numbers(both), count),
        "uid or original name": _pairs(particle_numbers(both), count),
        "place in the micrograph": same_places(both, count),
    }
    ways = {name: (rows, others - count) for name, (rows, others) in ways.items()}
    how = max(ways, key=lambda name: len(ways[name][0]))
    if len(ways[how][0]) >= 2:
        return (how, *ways[how])
    names = _by_names(first, second)
    if len(names[0]) >= 2:
        return ("names of stacks", *names)
    if count == len(second) >= 2:
        return "row", torch.arange(count), torch.arange(count)
    raise InputError(
        f"{first.name} and {second.name}: {counted(count, 'particle')} and {counted(len(second), 'particle')}, of "
        "which fewer than two have the same image, uid, original name or place in a micrograph; expected files of the "
        "same particles"
    )


def _pairs(label: Int[Tensor, " p"], first: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Rows before ``first`` and rows from there on with the same label, which no other row of either side has."""
    sides = [np.unique(side.numpy(), return_index=True, return_counts=True) for side in (label[:first], label[first:])]
    (one, row), (other, place) = ((value[count == 1], where[count == 1]) for value, where, count in sides)
    _, here, there = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    order = np.argsort(row[here])
    return torch.from_numpy(row[here][order]), torch.from_numpy(place[there][order] + first)


def _by_names(first: ParticleTable, second: ParticleTable) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Rows whose image has one number and whose stacks end in the same name, in as few parts of their paths as tell
    images apart, where one of the two stacks is missing."""
    there = [[path.is_file() for path in table.stacks] for table in (first, second)]
    for depth in (1, 2, 3):
        keys = [_keys(table, depth) for table in (first, second)]
        if all(len(set(own)) == len(own) for own in keys):
            place = {key: row for row, key in enumerate(keys[1])}
            pairs = [(row, place[key]) for row, key in enumerate(keys[0]) if key in place]
            stacks = [(int(first.stack[row]), int(second.stack[other])) for row, other in pairs]
            kept = [pair for pair, (s, t) in zip(pairs, stacks, strict=True) if not (there[0][s] and there[1][t])]
            rows = torch.tensor(kept, dtype=torch.int64).reshape(-1, 2)
            return rows[:, 0], rows[:, 1]
    return torch.arange(0), torch.arange(0)


def _keys(table: ParticleTable, depth: int) -> Sequence[tuple[int, tuple[str, ...]]]:
    """Number and stack of each image, by the last parts of its path."""
    names = [path.parts[-depth:] for path in table.stacks]
    return [(image, names[stack]) for image, stack in zip(table.image.tolist(), table.stack.tolist(), strict=True)]


def describe(found: dict[str, Any]) -> str:
    """The numbers in words."""
    of = found["of"]
    said = [
        f"{found['particles']:,} particles in both ({of[0]:,} and {of[1]:,}), matched by {found['matched_by']}, "
        f"symmetry {found['symmetry']}",
        f"orientations: median {found['median']:.2f}°, 90 % below {found['p90']:.2f}°; within 5° "
        f"{found['within_5']:.1%}, within 10° {found['within_10']:.1%}",
        f"shifts: median {found['shift_median']:.2f} Å, 90 % below {found['shift_p90']:.2f} Å",
        f"frames: turned by {found['frame_turn']:.2f}° and moved by {found['frame_shift']:.2f} Å against each other, "
        + ("of opposite hand" if found["mirrored"] else "of the same hand"),
    ]
    if found["within_10"] < _FEW:
        said.append("few poses agree in any frame: what is said of frames and hand means little")
    return "\n".join(said)
