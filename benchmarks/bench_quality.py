"""Quality of whole reconstructions: five seeds, the papers' ablations, the classical map, and experimental particles.

Simulated: one subunit of GroEL (1AON chain A) where the atomic models are at hand, else the procedural protein; box
96 at 1.5 Å, 6,000 images, SNR 0.05. Experimental: beta-galactosidase (EMPIAR-10204), against the atomic model 8BK7.
Usage: bench_quality.py [folder of the test data]
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import gemmi
import numpy as np

from common import save
from emsplat.accumulate import backproject
from emsplat.assess.fsc import crossing, fsc_curve
from emsplat.assess.mask import spherical_mask
from emsplat.config import ReconstructConfig, SimulateConfig
from emsplat.io.mrc import read_map
from emsplat.particles import open_particles
from emsplat.progress import Log
from emsplat.reconstruct import reconstruct
from emsplat.simulate import place_atoms, read_atoms, simulate, truth_map


def score(volume, truth, grid, mask=None):
    curve = fsc_curve(volume, truth, grid, mask)
    return {"mean_fsc": float(curve.value[1:].mean()), "crossing_0.5": crossing(curve, 0.5)}


def report(rows, name, result, seconds):
    rows.append({"name": name, "seconds": seconds, **result})
    print(
        f"{name:40} mean FSC {result['mean_fsc']:.3f}, 0.5 at {result['crossing_0.5']:.2f} Å, {seconds} s", flush=True
    )


def one_subunit(data, folder):
    if not (data / "models" / "1aon.pdb.gz").is_file():
        return None
    structure = gemmi.read_structure(str(data / "models" / "1aon.pdb.gz"))
    for name in [chain.name for chain in structure[0] if chain.name != "A"]:
        structure[0].remove_chain(name)
    structure.write_pdb(str(folder / "subunit.pdb"))
    return folder / "subunit.pdb"


def run(rows, name, particles, config, truth, grid, mask, folder):
    output = folder / name.replace(" ", "_")
    summary = reconstruct(config, particles, output, Log((folder / "log").open("a")))
    volume, _ = read_map(output / "run_class001.mrc")
    report(rows, name, score(volume, truth, grid, mask), summary["seconds"])


def simulated(rows, data, folder):
    config = SimulateConfig(box=96, pixel_size=1.5, particles=6000, snr=0.05)
    star = simulate(config, one_subunit(data, folder), folder / "particles")
    truth, grid = read_map(folder / "particles" / "truth.mrc")
    classical = backproject(open_particles(star))
    report(rows, "back-projection", score(classical, truth, grid), 0)
    edge = 6 * grid.pixel_size
    sphere = spherical_mask(grid, 0.75 * grid.length, edge)
    report(rows, "back-projection in a sphere", score(classical, truth, grid, sphere), 0)
    default = ReconstructConfig()
    for seed in range(5):
        run(rows, f"default, seed {seed}", star, dataclasses.replace(default, seed=seed), truth, grid, None, folder)
    for name in ("isotropic", "no rotation"):
        change = {"isotropic": True} if name == "isotropic" else {"rotation": False}
        run(rows, name, star, dataclasses.replace(default, **change), truth, grid, None, folder)
    crossings = [row["crossing_0.5"] for row in rows if row["name"].startswith("default")]
    means = [row["mean_fsc"] for row in rows if row["name"].startswith("default")]
    print(f"five seeds: 0.5 crossings within {np.ptp(crossings):.3f} Å, mean FSC ± {np.std(means):.4f}")


def experimental(rows, data, folder):
    star = data / "bgal" / "particles.star"
    if not star.is_file():
        print(f"no {star}: the experimental part is left out")
        return
    stack = open_particles(star, symmetry="D2")
    grid = stack.grid
    atoms = place_atoms(read_atoms(data / "bgal" / "8bk7_in_map_frame.cif.gz"), grid, keep_frame=True)
    truth, (mask, _) = truth_map(atoms, grid, 60.0), read_map(data / "bgal" / "mask_soft.mrc")
    report(rows, "8BK7 back-projection", score(backproject(stack), truth, grid, mask), 0)
    run(rows, "8BK7 default", star, ReconstructConfig(symmetry="D2"), truth, grid, mask, folder)


def main():
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        experimental(rows, data, Path(folder))
        simulated(rows, data, Path(folder))
    save("quality", rows)


if __name__ == "__main__":
    main()
