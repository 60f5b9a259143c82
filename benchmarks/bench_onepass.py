"""Cost of the one-pass engine: images per second accumulated, seconds and memory of a fit, steps against particles.

Images are read from disk. Where cryoDRGN is installed (`cryodrgn` on the path), its backproject_voxel runs on the same
particles; it is no dependency. Usage: bench_onepass.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import save
from emsplat.accumulate import accumulate, begin, equations_of
from emsplat.config import ReconstructConfig, SimulateConfig
from emsplat.fit import Plan, State, fit
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import from_map
from emsplat.objective import VolumeObjective
from emsplat.particles import estimate_noise, open_particles
from emsplat.progress import Log
from emsplat.reconstruct import reconstruct
from emsplat.simulate import simulate


def report(rows, **row):
    rows.append(row)
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def accumulation(rows, star, name):
    stack = open_particles(star)
    start = time.perf_counter()
    statistics = begin(stack)
    for _ in accumulate(statistics, stack, estimate_noise(stack)):
        pass
    seconds = time.perf_counter() - start
    row = {"what": f"accumulation, {name}", "images": len(stack), "images_per_second": round(len(stack) / seconds)}
    if shutil.which("cryodrgn") and stack.grid.size <= 128:  # it needs minutes for larger boxes
        row |= cryodrgn(star, row["images_per_second"])
    report(rows, **row)


def cryodrgn(star, ours):
    """The same particles through cryoDRGN, its own conversion of the metadata not counted."""
    with tempfile.TemporaryDirectory() as folder:
        poses, ctf, out = (str(Path(folder) / name) for name in ("poses.pkl", "ctf.pkl", "out"))
        stack = open_particles(star)
        side = str(stack.grid.size)
        words = ["cryodrgn", "parse_pose_star", str(star), "-D", side, "-o", poses]
        subprocess.run(words, check=True, capture_output=True)
        words = ["cryodrgn", "parse_ctf_star", str(star), "-D", side, "--Apix", str(stack.grid.pixel_size), "-o", ctf]
        subprocess.run(words, check=True, capture_output=True)
        words = ["cryodrgn", "backproject_voxel", str(star), "--poses", poses, "--ctf", ctf, "-o", out]
        seconds = []
        for few in (200, 1200):  # the difference leaves out the start of the program
            start = time.perf_counter()
            subprocess.run([*words, "--first", str(few)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        theirs = 1000 / (seconds[1] - seconds[0])
    return {"cryodrgn_images_per_second": round(theirs, 1), "ratio": round(ours / theirs, 1)}


def steps(rows, folder):
    """The same model fitted to sums of more and more images."""
    for count in (1_000, 10_000, 100_000):
        config = SimulateConfig(box=32, pixel_size=4.0, particles=count, snr=0.2, atoms=1500, overwrite=True)
        stack = open_particles(simulate(config, None, folder / "many"))
        equations = equations_of(stack)
        objective = VolumeObjective(equations, 32)
        bounds = Bounds(40.0, 1.0, 2.8)
        model = from_map(equations.solve(), stack.grid, 1000, bounds, 0)
        state = State.begin(model.with_unit(objective.best_gain(model)))
        seconds = []
        for _ in fit(state, objective, Plan(30, 2e-2, 0.9)):
            seconds.append(time.perf_counter())
        gaps = torch.tensor(seconds, dtype=torch.float64).diff()[50:]
        report(rows, what="step", images=count, milliseconds=round(1000 * float(gaps.median()), 2))


def whole_run(rows, folder, name, box, pixel_size, particles, gaussians, atoms):
    """One reconstruction in a process of its own, so that the peak memory is its own."""
    config = SimulateConfig(box=box, pixel_size=pixel_size, particles=particles, snr=0.1, atoms=atoms, overwrite=True)
    star = simulate(config, None, folder / name)
    words = [sys.executable, "-m", "emsplat", "reconstruct", str(star), "-o", str(folder / f"run_{name}")]
    subprocess.run([*words, "--gaussians", str(gaussians), "--overwrite"], check=True, capture_output=True)
    summary = json.loads((folder / f"run_{name}" / "summary.json").read_text())
    fits = summary["fits"].values()
    report(
        rows,
        what=f"reconstruct, {name}",
        images=particles,
        gaussians=gaussians,
        seconds_per_map=max(one["seconds"] for one in fits),
        milliseconds_per_step=max(one["milliseconds_per_step"] for one in fits),
        seconds=summary["seconds"],
        peak_memory_mb=summary["peak_memory_mb"],
    )
    return star


def main():
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        star = whole_run(rows, folder, "box96", 96, 1.5, 6000, 3000, 4000)
        accumulation(rows, star, "box 96")
        star = whole_run(rows, folder, "box256", 256, 1.0, 2000, 30_000, 20_000)
        accumulation(rows, star, "box 256")
        steps(rows, folder)
        default = folder / "default"
        summary = reconstruct(ReconstructConfig(), folder / "box96" / "particles.star", default, Log(sys.stderr))
        report(rows, what="reconstruct, box96, default settings", images=6000, seconds=summary["seconds"])
    save("onepass", rows)


if __name__ == "__main__":
    main()
