"""Whole commands on a data set of full size: a twin of EMPIAR-10028.

The twin has the published CTFs of the 105,247 particles (the file that cryoDRGN's tutorial uses), random poses and
shifts, and projections of the large ribosomal subunit at SNR 0.05 in the field of view of the original (482 Å), written
as float16. `emsplat check` and `emsplat reconstruct` then run as a user would run them; each row says the processor
time, the wall time and the peak memory of the command. With --rows, STAR files that repeat the particles, turned about
the axis of view as augmented sets are, show how the cost of metadata grows: `emsplat check` on each.

Usage: full_scale.py FOLDER --ctf 10028_ctf.pkl --model 50s/ [--box 128] [--particles N] [--rows 1000000]
The twin is made when FOLDER has none (box 128: 3.4 GB, box 256: 13.8 GB); nothing is deleted.
"""

import argparse
import json
import math
from dataclasses import fields
from pathlib import Path

import mrcfile
import torch

from common import emsplat, save
from emsplat.io.atoms import Atoms, read_atoms
from emsplat.io.cryodrgn import read_cryodrgn
from emsplat.io.mrc import write_map, writing_stack
from emsplat.io.particles import read_particles
from emsplat.io.paths import Names
from emsplat.io.relion.write import write_particles_star
from emsplat.maths.geometry import random_rotations
from emsplat.run.log import Log
from emsplat.simulation.images import (
    chunks,
    clean_images,
    drawn_from,
    make_noise,
    make_scene,
    random_halves,
    signal_variance,
    truth_map,
)
from emsplat.simulation.protein import place_states
from emsplat.types import Grid, Poses

PUBLISHED = 105_247
B_FACTOR, SNR, SHIFT = 80.0, 0.05, 4.0  # Å², ratio, Å


def subunit(folder, grid):
    """All chains of the subunit as one structure, its centre of mass at the centre of the box."""
    parts = [read_atoms(path) for path in sorted(folder.glob("*.pdb*"))]
    atoms = Atoms(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Atoms)))
    return place_states([atoms], [1.0], grid, keep_frame=False)[0]


def published_optics(ctf, box, folder):
    """The CTFs of all particles and the grid; the reader wants a stack to go with them, which is empty here."""
    placeholder = folder / "placeholder.mrcs"
    mrcfile.new_mmap(placeholder, (PUBLISHED, box, box), mrc_mode=12, overwrite=True).close()
    try:
        table = read_cryodrgn(placeholder, None, ctf)
    finally:
        placeholder.unlink()
    return table.optics, Grid(box, table.groups[0].pixel_size)


def make_twin(folder, ctf, model, box, count):
    """particles.mrcs, particles.star and truth.mrc; every particle has a CTF of the published ones, in their order."""
    optics, grid = published_optics(ctf, box, folder)
    optics = optics[torch.arange(count)]
    poses = Poses(
        random_rotations(count, drawn_from(0, 0)),
        SHIFT * torch.randn(count, 2, generator=drawn_from(0, 1), dtype=torch.float64),
    )
    atoms = subunit(model, grid)
    scene = make_scene([atoms], grid, B_FACTOR)
    drawn = poses.to(torch.float32), optics.to(torch.float32)
    variance = signal_variance(scene, *drawn, torch.zeros(count, dtype=torch.int64), torch.ones(count))
    gain, noise = math.sqrt(SNR / variance), drawn_from(0, 3)
    stack = folder / "particles.mrcs"
    with (
        Log(None).progress("images", count, unit="images") as update,
        writing_stack(stack, count, grid, "float16") as write,
    ):
        for rows in chunks(torch.arange(count), box):
            images = gain * clean_images(scene, drawn[0][rows], drawn[1][rows])
            write(images + make_noise(len(rows), grid, "white", noise))
            update(int(rows[-1]) + 1, "")
    write_map(folder / "truth.mrc", gain * truth_map(atoms, grid, B_FACTOR), grid.pixel_size)
    write_star(folder / "particles.star", stack, poses, optics, grid, torch.arange(count))


def write_star(star, stack, poses, optics, grid, image):
    """Rows that name the images ``image`` of a stack; micrographs of 100 particles."""
    file = Names(star).below(star.parent, stack)
    halves = random_halves(int(image.max()) + 1, drawn_from(0, 5))[image]  # copies of an image share its half
    write_particles_star(
        star,
        [f"{number + 1:06d}@{file}" for number in image.tolist()],
        [f"micrograph_{number // 100 + 1:05d}.mrc" for number in image.tolist()],
        poses,
        optics,
        grid,
        halves,
    )


def repeat(folder, rows):
    """A STAR file of that many rows over the stack of the twin: its particles again and again, turned in the plane."""
    table = read_particles(folder / "particles.star")
    image = torch.arange(rows) % len(table)
    angle = 2 * math.pi * torch.rand(rows, generator=drawn_from(1, 0), dtype=torch.float64)
    turn = torch.zeros(rows, 3, 3, dtype=torch.float64)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 1, 0] = angle.sin()
    turn[:, 0, 1] = -angle.sin()
    turn[:, 2, 2] = 1
    star = folder / f"rows_{rows}.star"
    grid = Grid(table.groups[0].box, table.groups[0].pixel_size)
    poses = table.poses[image]
    write_star(star, table.stacks[0], Poses(turn @ poses.rotation, poses.shift), table.optics[image], grid, image)
    return star


def command(rows, name, *words):
    rows.append({"what": name} | emsplat(*words))
    print(rows[-1], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ctf", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--particles", type=int, default=PUBLISHED)
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    given = parser.parse_args()
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    star, run = folder / "particles.star", folder / "run"
    if not star.exists():
        make_twin(folder, given.ctf, given.model, given.box, given.particles)
    rows = []
    command(rows, "check", "check", star)
    command(rows, "reconstruct", "reconstruct", star, "-o", run, "--overwrite", "--profile")
    command(rows, "fsc", "fsc", run / "run_class001.mrc", folder / "truth.mrc", "-o", folder / "fsc")
    for count in given.rows:
        command(rows, f"check --metadata-only, {count:,} rows", "check", repeat(folder, count), "--metadata-only")
    summary = json.loads((run / "summary.json").read_text())
    save(f"full_scale_{given.box}", rows, box=given.box, particles=given.particles, resolution=summary["resolution"])


if __name__ == "__main__":
    main()
