"""Writing a new stack of images of 256² beside a plain copy of the file: how far from the speed of the disk.

Both read the same file and flush what they wrote. Usage: bench_preprocess.py [images]
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import random_poses, save
from emsplat.config import PreprocessConfig, configure
from emsplat.io.mrc import writing_stack
from emsplat.io.relion.write import write_particles_star
from emsplat.programs.preprocess import preprocess
from emsplat.run.log import Log
from emsplat.types import Grid, Optics

GRID = Grid(256, 1.0)


def make(folder, count):
    rng = torch.Generator().manual_seed(0)
    with writing_stack(folder / "p.mrcs", count, GRID) as write:
        block = torch.randn(500, 256, 256, generator=rng)
        for start in range(0, count, 500):
            write(block[: min(500, count - start)])
    values = (300, 2.7, 0.1, 15000, 14000, 0.6, 0, 0, 1)
    optics = Optics(*(torch.full((count,), float(value), dtype=torch.float64) for value in values))
    poses = random_poses(count).to(torch.float64)
    names = [f"{i + 1}@p.mrcs" for i in range(count)]
    write_particles_star(folder / "p.star", names, ["m.mrc"] * count, poses, optics, GRID, None)


def flushed(work):
    os.sync()
    start = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - start


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, count)
        for what, options in (
            ("normalised", {}),
            ("float16", {"dtype": "float16"}),
            ("cropped to 128", {"box": 128}),
        ):
            copied = flushed(lambda: shutil.copyfile(folder / "p.mrcs", folder / "copy.mrcs"))
            config = configure(PreprocessConfig, **options)
            ours = flushed(lambda config=config: preprocess(config, folder / "p.star", folder / "out", Log()))
            shutil.rmtree(folder / "out")
            row = {
                "what": what,
                "images": count,
                "images_per_second": round(count / ours),
                "copied_per_second": round(count / copied),
                "times_a_copy": round(ours / copied, 2),
            }
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    save("preprocess", {"rows": rows})


if __name__ == "__main__":
    main()
