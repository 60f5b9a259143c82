"""How long 100,000 particles take before the first image is used: metadata, `emsplat check`, and the first batch."""

import tempfile
from pathlib import Path

import torch

from common import best_time, random_poses, save
from emsplat.config import CheckConfig
from emsplat.io.mrc import writing_stack
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import write_particles_star
from emsplat.particles.open import open_particles
from emsplat.programs.check import check
from emsplat.types import Grid, Optics, Poses

COUNT, GRID = 100_000, Grid(256, 1.0)


def write(folder):
    """A sparse stack of noise and nothing, with its STAR file."""
    with writing_stack(folder / "s.mrcs", 100, GRID) as out:
        out(torch.randn(100, GRID.size, GRID.size, generator=torch.Generator().manual_seed(0)))
    with (folder / "s.mrcs").open("r+b") as file:
        file.seek(8)
        file.write(COUNT.to_bytes(4, "little"))
        file.truncate(1024 + COUNT * GRID.size**2 * 4)
    one = torch.ones(COUNT, dtype=torch.float64)
    names = [f"{i + 1}@s.mrcs" for i in range(COUNT)]
    poses = Poses(random_poses(COUNT).rotation.double(), torch.zeros(COUNT, 2).double())
    optics = Optics(*(value * one for value in (300, 2.7, 0.1, 15000, 14000, 0.6, 0, 0, 1)))
    write_particles_star(folder / "p.star", names, ["m.mrc"] * COUNT, poses, optics, GRID, None)
    return folder / "p.star"


def main():
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        star = write(Path(temporary))
        for what, work in (
            ("metadata", lambda: read_star(star)),
            ("check --metadata-only", lambda: check(CheckConfig(metadata_only=True), star, None)),
            ("first batch of 50", lambda: next(open_particles(star).sequential(50))),
        ):
            rows.append({"what": what, "particles": COUNT, "seconds": best_time(work, 1)})
            print(f"{what}: {rows[-1]['seconds']:.2f} s", flush=True)
    save("start", rows)


if __name__ == "__main__":
    main()
