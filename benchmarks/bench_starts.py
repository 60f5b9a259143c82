"""Poses from nothing, over sets and seeds: how often `emsplat abinitio` finds them, and how often it says so.

Times are processor seconds (user and system of this process). Rows are added to results/starts.json, one for each set
and seed, as each run ends; those that are there are made again with --again only. With --relion, RELION's InitialModel
(`relion_refine --denovo_3dref`, an optional rival) makes a map from the same images.

Usage: bench_starts.py DATA FOLDER [--sets NAME ...] [--seeds 0 1 ...] [--again] [--relion]
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench_poses import bgal_truth, timed
from bench_quality import score
from common import add, emsplat, rows_of, whole_command
from emsplat.config import AbinitioConfig, ComparePosesConfig, RefineConfig, SimulateConfig, configure
from emsplat.io.particles import write_used
from emsplat.maths.groups import parse_symmetry
from emsplat.particles.open import open_particles
from emsplat.poses.compare import compare_poses
from emsplat.programs.abinitio import abinitio
from emsplat.programs.compare_poses import compare
from emsplat.programs.refine import refine
from emsplat.programs.simulate import simulate
from emsplat.types import Poses
from heterogeneity_data import merged


@dataclass(frozen=True)
class Set:
    """Images, the symmetry that is given, and the one that the particle has."""

    symmetry: str
    group: str
    model: str = ""  # below models/; experimental beta-galactosidase where there is none
    pixel_size: float = 3.54  # Å, of 64 pixels
    noise: bool = False
    particles: int = 3000
    snr: float = 0.1


RIVAL = "relion_refine --denovo_3dref"
KEY = ("set", "seed", "rival")
SETS = {
    "bgal D2": Set("D2", "D2"),
    "bgal C1": Set("C1", "D2"),
    "GroEL/ES C7": Set("C7", "C7", "1aon.pdb.gz", 3.8),
    "GroEL/ES C1": Set("C1", "C7", "1aon.pdb.gz", 3.8),
    "spike": Set("C1", "C1", "6vsb.pdb.gz", 3.2),
    "IgG": Set("C1", "C1", "1hzh.pdb.gz", 3.4),
    "50S": Set("C1", "C1", "50s", 5.0),
    "noise": Set("C1", "C1", "6vsb.pdb.gz", 3.2, noise=True),
    # So little that not every search can succeed: is that said?
    **{f"50S, SNR {snr}": Set("C1", "C1", "50s", 5.0, particles=400, snr=snr) for snr in (0.05, 0.02, 0.012, 0.008)},
    **{f"spike, SNR {snr}": Set("C1", "C1", "6vsb.pdb.gz", 3.2, particles=400, snr=snr) for snr in (0.1, 0.03, 0.015)},
}


def particles(data, folder, name, seed):
    """The images of a set. Noise and small sets are drawn anew for every seed, of others only the search differs."""
    chosen = SETS[name]
    if not chosen.model:
        return data / "bgal" / "particles.star"
    few = chosen.particles < 3000
    kept = chosen.model.split(".")[0] + f"_noise{seed}" * chosen.noise
    kept += f"_{chosen.particles}_{chosen.snr}_{seed}" * few
    star = folder / kept / "particles.star"
    if not star.exists():
        model = data / "models" / chosen.model
        if model.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            model = merged(model, folder / f"{chosen.model}.cif")
        made = {"box": 64, "pixel_size": chosen.pixel_size, "particles": chosen.particles, "snr": chosen.snr}
        made |= {"noise_only": chosen.noise, "seed": seed if chosen.noise or few else 0}
        simulate(configure(SimulateConfig, **made), model, star.parent)
    return star


def in_the_frame_of(given, found, symmetry, target):
    """The same poses in the frame and hand of those that are given: what images cannot tell."""
    first, second = (open_particles(path) for path in (given, found))
    poses = second.table.poses[second.rows]
    known = first.table.poses[first.rows]
    comparison = compare_poses(known, poses, parse_symmetry(symmetry))
    flip = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    rotation = flip @ poses.rotation @ flip if comparison.mirrored else poses.rotation
    shift = poses.shift + (rotation @ comparison.centre)[:, :2]
    moved = second.with_poses(Poses(rotation @ comparison.frame, shift))
    write_used(moved.table, target, second.table.half)
    return target


def refined_from_nothing(rows, found, star, data, folder, seed):
    """beta-galactosidase from images alone, refined, against 8BK7."""
    told = in_the_frame_of(star, found, "D2", found.with_name("framed.star"))
    volume, grid, mask = bgal_truth(data)
    for more in ({}, {"refine": "poses,scale"}):
        output = folder / f"nothing_refined_{seed}_{len(more)}"
        summary, seconds = timed(refine, configure(RefineConfig, symmetry="D2", **more), told, output)
        row = {"name": f"8BK7 from images alone, refine {' '.join(more.values())}, seed {seed}".replace(" ,", ",")}
        row |= {"processor_seconds": round(seconds, 1)} | score(output / "run_class001.mrc", volume, grid, mask)
        row["back_projection"] = score(output / "backprojection_class001.mrc", volume, grid, mask)
        row["cross_validated"] = summary["resolution"]["cross_validated"]
        rows.append(row)
        print(row, flush=True)


def found(data, folder, name, seed):
    """One search: what it says of itself, and how far its poses are from those that are known."""
    chosen, star = SETS[name], particles(data, folder, name, seed)
    output = folder / "runs" / f"{name.replace('/', '_').replace(' ', '_')}_{seed}"
    output.mkdir(parents=True, exist_ok=True)
    config = configure(AbinitioConfig, symmetry=chosen.symmetry, seed=seed, overwrite=True)
    wall = time.monotonic()
    summary, seconds = timed(abinitio, config, star, output)
    said = summary["abinitio"]
    row = {"set": name, "seed": seed, "processor_seconds": round(seconds, 1)}
    row |= {"wall_seconds": round(time.monotonic() - wall, 1)}
    row |= {key: said[key] for key in ("verdict", "agreement", "gain", "starts")}
    row |= {"group": said.get("symmetry_found", chosen.symmetry)}
    written = output / "run_data.star"
    if written.exists() and said["verdict"] != "not found" and not chosen.noise:
        away = compare(star, written, configure(ComparePosesConfig, symmetry=chosen.group))
        row |= {key: round(away[key], 4) for key in ("median", "p90", "within_5", "within_10", "shift_median")}
    if name == "bgal D2" and written.exists():
        refined = []
        refined_from_nothing(refined, written, star, data, output, seed)
        row["refined"] = refined
    return row


def rival(data, folder, name, seed):
    """RELION's InitialModel on the same images, with the schedule of its interface. It places particles in subsets, so
    poses are those of the last time that each was looked at; many are of a map that was still coarse."""
    chosen, star = SETS[name], particles(data, folder, name, seed)
    output = folder / "relion" / f"{name.replace('/', '_').replace(' ', '_')}_{seed}"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    copy = output / "images"  # RELION 3.1 does not read images of 16 bits
    emsplat("preprocess", star, "-o", copy, "--no-recentre", silent=True)
    words = "--denovo_3dref --sgd --ctf --zero_mask --K 1 --flatten_solvent --oversampling 1 --healpix_order 1"
    words += " --pad 1 --norm --scale --offset_range 6 --offset_step 2 --sgd_ini_resol 35 --sgd_fin_resol 15"
    words += " --sgd_ini_iter 50 --sgd_inbetween_iter 200 --sgd_fin_iter 50 --sgd_ini_subset 100 --sgd_fin_subset 500"
    size = 0.9 * 64 * chosen.pixel_size
    own = ["--sym", chosen.symmetry, "--particle_diameter", f"{size:.0f}", "--j", 2, "--random_seed", seed]
    row = {"set": name, "seed": seed, "rival": RIVAL}
    row |= whole_command(
        "relion_refine", "--i", "particles.star", "--o", output / "run", *words.split(), *own, folder=copy, silent=True
    )
    if (last := output / "run_it300_data.star").exists() and not chosen.noise:
        away = compare(star, last, configure(ComparePosesConfig, symmetry=chosen.group, datadir=copy))
        row |= {key: round(away[key], 4) for key in ("median", "p90", "within_5", "within_10", "shift_median")}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(10)))
    parser.add_argument("--relion", action="store_true")
    parser.add_argument("--again", action="store_true", help="also what results/starts.json has")
    given = parser.parse_args()
    run, who = (rival, RIVAL) if given.relion else (found, None)
    for seed in given.seeds:
        for name in given.sets:
            of = name, seed, who
            if not given.again and of in [tuple(map(row.get, KEY)) for row in rows_of("starts")]:
                continue
            row = run(given.data.resolve(), given.folder.resolve(), name, seed)
            print(row, flush=True)
            add("starts", [row], KEY)


if __name__ == "__main__":
    main()
