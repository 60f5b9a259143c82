"""Particles of a metadata file, checked against the headers of their stacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from emsplat.errors import InputError
from emsplat.io.particles import read_particles
from emsplat.io.table import ParticleTable
from emsplat.maths.groups import C1, Symmetry
from emsplat.parallel import ALONE, World
from emsplat.particles.holding import hold
from emsplat.particles.images import ImageFiles
from emsplat.particles.resample import resampled_grid
from emsplat.particles.stack import ParticleStack
from emsplat.run.log import counted
from emsplat.types import Grid


def open_particles(
    path: Path,
    *,
    datadir: Path | None = None,
    symmetry: Symmetry = C1,
    invert: bool = False,
    diameter: float | None = None,
    trust_star_pixel_size: bool = False,
) -> ParticleStack:
    """The particles of a metadata file (`io.particles.read_particles`), as `open_table`."""
    table = read_particles(path, datadir=datadir)
    return open_table(
        table, symmetry=symmetry, invert=invert, diameter=diameter, trust_star_pixel_size=trust_star_pixel_size
    )


def open_table(
    table: ParticleTable,
    *,
    symmetry: Symmetry = C1,
    invert: bool = False,
    diameter: float | None = None,
    trust_star_pixel_size: bool = False,
    box: int | None = None,
    pixel_size: float | None = None,
    finer: bool = False,
    recentre: bool | None = None,
    world: World = ALONE,
) -> ParticleStack:
    """The particles of a table, checked against the headers of their stacks; no image is read. Processes of a ``world``
    may have different ones of the stacks (`hold`).

    ``box``, ``pixel_size`` (Å) and ``finer`` resample the images while they are read, see `resampled_grid`;
    ``recentre`` moves them by whole pixels, by default where they are cut.

    Raises:
        InputError: an image index outside its stack, stacks of odd or unexpected boxes, pixel sizes that disagree, a
            diameter that leaves no background, fewer than 4 particles, a box or pixel size that the images do not have.
    """
    if len(table) < 4:
        raise InputError(
            f"{table.name}: {counted(len(table), 'particle')}; expected at least 4, which are 2 in each half-set; take "
            "a file with more, or leave out what chooses so few (--first, --subset, --class, --unique)"
        )
    files = ImageFiles(table)
    holding = hold(table, files, world)
    disk = _grids(table, files, trust_star_pixel_size)
    table = replace(table, warnings=(*table.warnings, *files.remarks()))
    if holding is not None:
        groups = tuple(replace(own, box=grid.size) for own, grid in zip(table.groups, disk, strict=True))
        table = replace(table, groups=groups)
    grids = tuple(resampled_grid(own, box, pixel_size, finer=finer) for own in disk)
    if recentre is None:
        recentre = any(grid.length < 0.999 * own.length for grid, own in zip(grids, disk, strict=True))
    particles = dict.fromkeys(grids, 0)
    for number, count in enumerate(torch.bincount(table.optics_group, minlength=len(grids)).tolist()):
        particles[grids[number]] += count
    grid = max(particles, key=particles.__getitem__)
    if diameter is not None and not 0 < diameter <= 0.98 * grid.length:
        raise InputError(
            f"--diameter {diameter:g} Å: the box is {grid.length:.1f} Å wide; expected a diameter above 0 that leaves "
            "background around the particle"
        )
    sign = -table.sign if invert else table.sign
    return ParticleStack(
        table,
        files,
        grid,
        grids=grids,
        disk=disk,
        rows=torch.arange(len(table)),
        symmetry=symmetry,
        diameter=0.9 * grid.length if diameter is None else diameter,
        sign=sign,
        recentre=recentre,
        holding=holding,
    )


def _grids(table: ParticleTable, files: ImageFiles, trust_star_pixel_size: bool) -> tuple[Grid, ...]:
    """The grid of each optics group; groups without particles take that of the largest one."""
    highest = torch.zeros(len(table.stacks), dtype=torch.int64).scatter_reduce(0, table.stack, table.image, "amax")
    boxes = {number: group.box for number, group in enumerate(table.groups)}
    pairs = torch.unique(torch.stack([table.stack, table.optics_group], 1), dim=0).tolist()
    for index, number in pairs:
        path, group, file = table.stacks[index], table.groups[number], files.facts(index)
        boxes[number] = boxes[number] or file.box
        if file.box != boxes[number]:
            raise InputError(
                f"{path}: images of {file.box} pixels; expected {boxes[number]} as elsewhere in {table.name}"
            )
        if highest[index] >= file.count:
            row = int(((table.stack == index) & (table.image >= file.count)).nonzero()[0])
            raise InputError(
                f'{table.place(row)}: "{int(table.image[row]) + 1}@{path.name}" asks for image '
                f"{int(table.image[row]) + 1}, but the stack has {file.count} images. Was the stack re-extracted after "
                "the star file was written?"
            )
        said = file.pixel_size
        if said is not None and abs(said / group.pixel_size - 1) > 0.01 and not trust_star_pixel_size:
            raise InputError(
                f"{path}: pixel size {said:g} Å in the stack's header and {group.pixel_size:g} Å in {table.name}; "
                "mend the wrong one, or go by the STAR file with --trust-star-pixel-size"
            )
    sizes = torch.bincount(table.optics_group, minlength=len(table.groups)).tolist()
    for number, count in enumerate(sizes):
        box = boxes[number]
        if count and (box is None or box % 2):
            raise InputError(f"{table.name}: box of {box} pixels; expected an even number")
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    used = [number if count else largest for number, count in enumerate(sizes)]
    return tuple(Grid(boxes[number] or 0, table.groups[number].pixel_size) for number in used)
