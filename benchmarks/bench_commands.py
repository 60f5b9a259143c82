"""Whole commands, from the start of the process to the end of the report, beside RELION's back-projection.

`emsplat backproject` writes two half maps and the full map, mask, FSC, local resolution, directions and a report;
`relion_reconstruct` (an optional rival, where it is on the path) writes one map, so it runs once for each half-set.
``half_maps_s`` is when both half maps of emsplat were there, for those who compare nothing but these.
Each command of emsplat runs several times, and the quickest counts. Nothing else should run: see docs/measuring.md.

Usage: bench_commands.py DATA FOLDER [--repeats 3]   # DATA holds bgal/
"""

import argparse
import shutil
import time
from pathlib import Path

import mrcfile

from common import emsplat, save, whole_command
from emsplat.config import SimulateConfig, configure
from emsplat.programs.simulate import simulate
from emsplat.run.files import HALF_MAPS

SIMULATED = {"5,000 images of 128²": (128, 3.0, 5000), "6,000 images of 96²": (96, 1.5, 6000)}


def quickest(run, repeats):
    return min((run() for _ in range(repeats)), key=lambda one: one["wall_s"])


def single_precision(star, folder):
    """The particles with images of 32 bits: RELION 3.1 reads no others."""
    copied = folder / "single" / star.name
    if not copied.exists():
        for stack in star.parent.rglob("*.mrcs"):
            place = copied.parent / stack.relative_to(star.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            with mrcfile.open(stack, permissive=True) as file, mrcfile.new(place) as written:
                written.set_data(file.data.astype("f4"))
                written.voxel_size = file.voxel_size
                written.set_image_stack()
        shutil.copy(star, copied)
    return copied


def relion(star, folder, half, symmetry):
    words = ["--i", star.name, "--o", folder / f"relion{half}.mrc", "--subset", half, "--ctf", "--sym", symmetry]
    return whole_command("relion_reconstruct", *words, folder=star.parent, silent=True)


def timed(program, star, folder, symmetry):
    """A whole command, and when its half maps were written."""
    begun = time.time()
    row = emsplat(program, star, "-o", folder, "--symmetry", symmetry, "--overwrite", silent=True)
    written = max((folder / half).stat().st_mtime for half in HALF_MAPS)
    return row | {"half_maps_s": round(written - begun, 1)}


def compared(name, star, folder, symmetry, repeats):
    row = {"particles": name}
    for program in ("backproject", "reconstruct"):
        row[program] = quickest(lambda program=program: timed(program, star, folder / "run", symmetry), repeats)
    if shutil.which("relion_reconstruct"):
        halves = [quickest(lambda half=half: relion(star, folder, half, symmetry), 1) for half in (1, 2)]
        row["relion_reconstruct, two half maps"] = {
            "wall_s": round(sum(one["wall_s"] for one in halves), 1),
            "peak_mb": max(one["peak_mb"] for one in halves),
            "exit": max(one["exit"] for one in halves),
        }
        rival = row["relion_reconstruct, two half maps"]["wall_s"]
        row["ratio"] = {program: round(rival / row[program]["wall_s"], 2) for program in ("backproject", "reconstruct")}
        row["ratio"]["half maps of backproject"] = round(rival / row["backproject"]["half_maps_s"], 2)
    print(row, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stars = {"bgal": (single_precision(given.data.resolve() / "bgal" / "particles.star", folder), "D2")}
    for name, (box, pixel_size, count) in SIMULATED.items():
        star = folder / f"box{box}" / "particles.star"
        if not star.exists():
            config = configure(SimulateConfig, box=box, pixel_size=pixel_size, particles=count, snr=0.1, atoms=4000)
            simulate(config, None, star.parent)
        stars[name] = star, "C1"
    rows = [compared(name, star, folder, group, given.repeats) for name, (star, group) in stars.items()]
    save("commands", rows)


if __name__ == "__main__":
    main()
