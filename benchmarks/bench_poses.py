"""Poses refined: experimental beta-galactosidase against 8BK7, and a simulated spike from known errors of its poses.

Times are processor seconds (user and system of this process), since walls mean nothing on a busy machine. "round" is
what placing 1,000 particles once takes, at about 1,500 coefficients each, the reading of the images included.
``--large`` times the steps of one round of a ribosomal subunit in images of 256² instead: sums, references of both
halves, poses. Only sums and poses grow with the images. Its times are those of the clock, on a quiet machine.
Usage: bench_poses.py [folder of the test data] [seed ...]
       bench_poses.py folder_of_the_test_data --large [images]
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench_quality import score
from common import add, whole_command
from emsplat.config import (
    ComparePosesConfig,
    ReconstructConfig,
    RefineConfig,
    SimulateConfig,
    configure,
)
from emsplat.io.atoms import read_atoms
from emsplat.io.mrc import read_map
from emsplat.io.particles import write_used
from emsplat.maths.geometry import vector_to_matrix
from emsplat.measures.mask import solvent_mask
from emsplat.particles.open import open_particles
from emsplat.poses.local import Prior, make_reference, noise_of, place
from emsplat.programs.compare_poses import compare
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.refine import refine
from emsplat.programs.simulate import simulate
from emsplat.run.log import Log
from emsplat.simulation.images import truth_map
from emsplat.simulation.protein import place_atoms
from emsplat.sums.statistics import equations_of
from emsplat.types import Poses
from heterogeneity_data import merged

_COEFFICIENTS = 31  # cycles per box: 1,500 of them


def timed(work, config, star, folder):
    start = time.process_time()
    summary = work(config, star, folder, Log((folder.parent / "log").open("a")))
    return summary, time.process_time() - start


def both(rows, name, star, folder, truth, true_star=None, also=(), **options):
    """A reconstruction in the poses as they are, and one after their refinement; ``also`` further refinements."""
    volume, grid, mask = truth
    works = [(reconstruct, ReconstructConfig, {}), (refine, RefineConfig, {})]
    for work, kind, more in works + [(refine, RefineConfig, own) for own in also]:
        told = f"{name}: {work.__name__} {' '.join(more.values())}".strip()
        output = folder / told.replace(" ", "_").replace("/", "_")
        summary, seconds = timed(work, configure(kind, **options, **more), star, output)
        row = {"name": told, "processor_seconds": round(seconds, 1)}
        row |= score(output / "run_class001.mrc", volume, grid, mask)
        row["back_projection"] = score(output / "backprojection_class001.mrc", volume, grid, mask)
        row["cross_validated"] = summary["resolution"]["cross_validated"]
        if "refinement" in summary:
            row["rounds"] = summary["refinement"]["rounds"]
        if true_star is not None:
            found = compare(true_star, output / "run_data.star", ComparePosesConfig())
            row |= {key: round(found[key], 4) for key in ("median", "p90", "within_5", "within_10", "shift_median")}
        rows.append(row)
        shown = {key: value for key, value in row.items() if key not in ("rounds", "name")}
        print(row["name"], shown, flush=True)


def wrong(star, true, turn, shift, seed):
    """A STAR file beside the true one, with errors of so many degrees and Å about and along each axis."""
    stack = open_particles(star)
    rng = torch.Generator().manual_seed(seed)
    poses = stack.table.poses
    errors = math.radians(turn) * torch.randn(len(stack), 3, generator=rng, dtype=torch.float64)
    moved = poses.shift + shift * torch.randn(len(stack), 2, generator=rng, dtype=torch.float64)
    target = star.parent / f"{true.stem}_{turn:g}_{shift:g}_{seed}.star"
    given = Poses(vector_to_matrix(errors) @ poses.rotation, moved)
    write_used(stack.with_poses(given).table, target, stack.table.half)
    return target


def speed(rows, star, truth):
    volume, grid, mask = truth
    stack = open_particles(star)
    gain = equations_of(stack).gain(volume)
    stack = stack.take(torch.arange(min(2000, len(stack))))
    poses = stack.table.poses[stack.rows]
    reference = make_reference(gain * volume * mask, grid, min(_COEFFICIENTS, grid.size // 2 - 1))
    noise, space = noise_of(stack), reference.space
    start = time.process_time()
    found = place(reference, stack, poses, Prior(math.radians(3), 2.0), noise)
    seconds = (time.process_time() - start) / len(stack) * 1000
    row = {"name": "one round of 1,000 particles", "processor_seconds": round(seconds, 2)}
    row |= {"comparisons": round(float(found.looks.double().mean()), 1), "voxels": space.numel()}
    rows.append(row)
    print(row, flush=True)


def bgal_truth(data):
    mask, grid = read_map(data / "bgal" / "mask_soft.mrc")
    atoms = place_atoms(read_atoms(data / "bgal" / "8bk7_in_map_frame.cif.gz"), grid, keep_frame=True)
    return truth_map(atoms, grid, 60.0), grid, mask


def experimental(rows, data, folder):
    star = data / "bgal" / "particles.star"
    truth = bgal_truth(data)
    others = [{"refine": "poses,scale"}, {"reference": "map"}]
    both(rows, "8BK7", star, folder, truth, also=others, symmetry="D2")
    speed(rows, star, truth)


def simulated(rows, data, folder, seed):
    config = SimulateConfig(box=64, pixel_size=3.0, particles=6000, snr=0.1, seed=seed)
    star = simulate(config, data / "models" / "6vsb.pdb.gz", folder / f"particles_{seed}")
    volume, grid = read_map(star.parent / "truth.mrc")
    truth = volume, grid, solvent_mask(volume, grid, 0.9 * grid.length, lowpass=8.0, extend=3.0, edge=9.0)
    for turn, shift, options in ((3.0, 2.0, {}), (8.0, 4.0, {}), (0.0, 0.0, {}), (3.0, 2.0, {"first": 500})):
        name = f"spike {turn:g}°/{shift:g} Å, {options.get('first', 6000)} images, seed {seed}"
        both(rows, name, wrong(star, star, turn, shift, seed), folder, truth, star, **options)


def large(data, folder, images):
    """The steps of a round, and what one of 100,000 images takes in proportion."""
    config = SimulateConfig(box=256, pixel_size=1.4, particles=images, snr=0.05, pose_error=2.0)
    merged(data / "models" / "50s", folder / "50s.cif")
    star, run = simulate(config, folder / "50s.cif", folder / "images"), folder / "run"
    whole_command(
        *(Path(sys.executable).with_name("emsplat"), "refine", star, "-o", run, "--rounds", "1"),
        *("--epochs", "1", "--growth", "0"),  # of the maps in the end, which are not timed
        silent=True,
    )
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    spent = [row for row in journal if row["kind"] == "spent" and row.get("depth") == 1]
    own = dict.fromkeys(("sums", "references", "poses"), 0.0)
    for row in spent:
        name = row["name"].split()[0]
        if name in own:
            own[name] += row["seconds"] * (0.5 if name == "sums" else 1.0)  # before and after: a round has one
    summary = json.loads((run / "summary.json").read_text())
    grown = (own["sums"] + own["poses"]) * 100_000 / images
    row = {
        "name": f"a round of {images:,} images of 256²",
        "compared_to": summary["refinement"]["rounds"][0]["compared_to"],
    }
    row |= {f"{name}_wall_seconds": round(value, 1) for name, value in own.items()}
    return row | {"minutes_of_100,000": round((grown + own["references"]) / 60, 1)}


def main():
    if "--large" in sys.argv:
        data, _, *images = sys.argv[1:]
        with tempfile.TemporaryDirectory() as folder:
            row = large(Path(data), Path(folder), int(images[0]) if images else 6000)
        print(row)
        add("poses", [row], ["name"])
        return
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        experimental(rows, data, Path(folder))
        for seed in map(int, sys.argv[2:] or ["1", "2"]):
            simulated(rows, data, Path(folder), seed)
    add("poses", rows, ["name"])


if __name__ == "__main__":
    main()
