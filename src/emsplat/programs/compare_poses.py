"""Poses of two files of the same particles, compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emsplat.config import ComparePosesConfig
from emsplat.errors import InputError
from emsplat.io.particles import read_particles
from emsplat.io.table import ParticleTable
from emsplat.poses.compare import compare_poses
from emsplat.run.log import counted

_FEW = 0.3  # share within 10° below which the frames have hardly been found


def compare(first: Path, second: Path, config: ComparePosesConfig) -> dict[str, Any]:
    """The numbers of `poses.compare.PoseComparison` for the particles that both files have.

    Particles are matched by their images, else row by row where both have as many.

    Raises:
        InputError: a file cannot be read, or they share fewer than two particles.
    """
    group = config.point_group
    tables = [read_particles(path, need_stacks=False) for path in (first, second)]
    rows = matched(tables[0], tables[1])
    one, other = (table.poses[torch.tensor(own)] for table, own in zip(tables, rows, strict=True))
    return {
        "first": str(first),
        "second": str(second),
        "symmetry": group.symbol,
        "of": [len(table) for table in tables],
        **compare_poses(one, other, group).numbers(),
    }


def matched(first: ParticleTable, second: ParticleTable) -> tuple[list[int], list[int]]:
    """Rows of the same particles in two tables.

    Raises:
        InputError: fewer than two.
    """
    for depth in (1, 2, 3):
        keys = [_keys(table, depth) for table in (first, second)]
        if all(len(set(own)) == len(own) for own in keys):
            place = {key: row for row, key in enumerate(keys[1])}
            pairs = [(row, place[key]) for row, key in enumerate(keys[0]) if key in place]
            if len(pairs) >= 2:
                return [row for row, _ in pairs], [row for _, row in pairs]
            break
    if len(first) == len(second) >= 2:
        return list(range(len(first))), list(range(len(second)))
    raise InputError(
        f"{first.name} and {second.name}: {counted(len(first), 'particle')} and {counted(len(second), 'particle')}, "
        "of which fewer than two have the same image; expected files of the same particles"
    )


def _keys(table: ParticleTable, depth: int) -> Sequence[tuple[int, tuple[str, ...]]]:
    """Number and stack of each image, by the last parts of its path."""
    names = [path.parts[-depth:] for path in table.stacks]
    return [(image, names[stack]) for image, stack in zip(table.image.tolist(), table.stack.tolist(), strict=True)]


def describe(found: dict[str, Any]) -> str:
    """The numbers in words."""
    of = found["of"]
    said = [
        f"{found['particles']:,} particles in both ({of[0]:,} and {of[1]:,}), symmetry {found['symmetry']}",
        f"orientations: median {found['median']:.2f}°, 90 % below {found['p90']:.2f}°; within 5° "
        f"{found['within_5']:.1%}, within 10° {found['within_10']:.1%}",
        f"shifts: median {found['shift_median']:.2f} Å, 90 % below {found['shift_p90']:.2f} Å",
        f"frames: turned by {found['frame_turn']:.2f}° and moved by {found['frame_shift']:.2f} Å against each other, "
        + ("of opposite hand" if found["mirrored"] else "of the same hand"),
    ]
    if found["within_10"] < _FEW:
        said.append("few poses agree in any frame: what is said of frames and hand means little")
    return "\n".join(said)
