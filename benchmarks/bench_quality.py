"""Quality of whole reconstructions: both engines and the classical map, seeds, ablations, few images, wrong poses.

Simulated: one subunit of GroEL (1AON chain A) where the atomic models are at hand, else the procedural protein; box
96 at 1.5 Å, 6,000 images, SNR 0.05. Experimental: beta-galactosidase (EMPIAR-10204), against the atomic model 8BK7.
Every map is masked with the same mask (of the truth) before it is compared with the truth.
Usage: bench_quality.py [folder of the test data]
"""

import sys
import tempfile
from pathlib import Path

import gemmi
import numpy as np

from common import save
from emsplat.config import ReconstructConfig, SimulateConfig, change, configure
from emsplat.io.atoms import read_atoms
from emsplat.io.mrc import read_map
from emsplat.measures.curves import crossing
from emsplat.measures.fsc import fsc_curve
from emsplat.measures.mask import solvent_mask
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.simulate import simulate
from emsplat.run.log import Log
from emsplat.simulation.images import truth_map
from emsplat.simulation.protein import place_atoms


def score(path, truth, grid, mask):
    curve = fsc_curve(read_map(path)[0], truth, grid, mask)
    return {"mean_fsc": float(curve.value[1:].mean()), "crossing_0.5": crossing(curve, 0.5)}


def report(rows, name, result, **more):
    rows.append({"name": name, **result, **more})
    extra = "".join(f", {key} {value}" for key, value in more.items())
    print(f"{name:40} mean FSC {result['mean_fsc']:.4f}, 0.5 at {result['crossing_0.5']:.2f} Å{extra}", flush=True)


def one_subunit(data, folder):
    if not (data / "models" / "1aon.pdb.gz").is_file():
        return None
    structure = gemmi.read_structure(str(data / "models" / "1aon.pdb.gz"))
    for name in [chain.name for chain in structure[0] if chain.name != "A"]:
        structure[0].remove_chain(name)
    structure.write_pdb(str(folder / "subunit.pdb"))
    return folder / "subunit.pdb"


def run(rows, name, particles, config, truth, grid, mask, folder, *, classical=False):
    output = folder / name.replace(" ", "_")
    summary = reconstruct(config, particles, output, Log((folder / "log").open("a")))
    if classical:
        report(rows, f"{name}: classical map", score(output / "backprojection_class001.mrc", truth, grid, mask))
    about = {"seconds": summary["seconds"], "cross_validated": summary["resolution"]["cross_validated"]}
    report(rows, name, score(output / "run_class001.mrc", truth, grid, mask), **about)


def simulated(rows, data, folder):
    config = SimulateConfig(box=96, pixel_size=1.5, particles=6000, snr=0.05)
    model, default, images = (
        one_subunit(data, folder),
        ReconstructConfig(),
        configure(ReconstructConfig, engine="images"),
    )
    star = simulate(config, model, folder / "particles")
    truth, grid = read_map(folder / "particles" / "truth.mrc")
    mask = solvent_mask(truth, grid, 0.9 * grid.length, lowpass=8.0, extend=3.0, edge=9.0)
    same = (truth, grid, mask, folder)
    for seed in range(5):
        run(rows, f"one-pass, seed {seed}", star, change(default, seed=seed), *same, classical=seed == 0)
    run(rows, "images", star, images, *same)
    run(rows, "one-pass, independent halves", star, change(default, independent_halves=True), *same)
    run(rows, "one-pass, isotropic", star, change(default, isotropic=True), *same)
    run(rows, "one-pass, no rotation", star, change(default, rotation=False), *same)
    run(rows, "one-pass, from a ball", star, change(default, init="ball"), *same)
    seeds = [
        row["mean_fsc"] for row in rows if row["name"].startswith("one-pass, seed") and "classical" not in row["name"]
    ]
    print(f"five seeds: mean FSC ± {np.std(seeds):.5f}")
    for name, changed in (("500 images", {"particles": 500}), ("pose error of 2 degrees", {"pose_error": 2.0})):
        hard = simulate(change(config, **changed), model, folder / f"particles_{name.replace(' ', '_')}")
        run(rows, name, hard, default, *same, classical=True)


def experimental(rows, data, folder):
    star = data / "bgal" / "particles.star"
    if not star.is_file():
        print(f"no {star}: the experimental part is left out")
        return
    _, grid = read_map(data / "bgal" / "mask_soft.mrc")
    atoms = place_atoms(read_atoms(data / "bgal" / "8bk7_in_map_frame.cif.gz"), grid, keep_frame=True)
    truth, (mask, _) = truth_map(atoms, grid, 60.0), read_map(data / "bgal" / "mask_soft.mrc")
    default = configure(ReconstructConfig, symmetry="D2")
    same = (truth, grid, mask, folder)
    for seed in range(5):
        run(rows, f"8BK7, seed {seed}", star, change(default, seed=seed), *same, classical=seed == 0)
    run(rows, "8BK7, images", star, change(default, engine="images"), *same)
    run(rows, "8BK7, independent halves", star, change(default, independent_halves=True), *same)


def main():
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        experimental(rows, data, Path(folder))
        simulated(rows, data, Path(folder))
    save("quality", rows)


if __name__ == "__main__":
    main()
