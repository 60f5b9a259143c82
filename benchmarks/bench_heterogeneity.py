"""States that `emsplat heterogeneity` finds in simulated particles, scored against the truth.

    python benchmarks/heterogeneity_data.py MODELS DATA
    python benchmarks/bench_heterogeneity.py DATA OUTPUT [SET ...]

For each set: what was found, CryoBench's scores (AUC per conformation) and the same where the molecule moves, each
beside the consensus; the time of the whole command and its memory. ``--recipe cryospire`` runs the paper's
engine on the same images beside the default. A rival that was run elsewhere is scored from its folder (``--rival
NAME=FOLDER``): maps 000.mrc, 001.mrc, ... in the order of the true states. Null sets have nothing to score: what
counts is that nothing is found. Any folder of DATA with particles.star is a set. Results go to
results/heterogeneity.json; rows of other sets, engines and numbers of particles stay there.
``--linear`` times iterations of the linear stage instead (10,000 images of a set, shell 14, six components).
"""

import argparse
import csv
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import add
from emsplat.heterogeneity import subspace
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_particles
from emsplat.sums.spectra import read_spectra

NULL_SETS = tuple(f"null{kind}{seed}" for kind in ("", "_pose", "_noise") for seed in ("", "_2", "_3"))
SETS = ("igg", "igg5", "assembly", "rl", "spike", "adk", "mixture", "grey", *NULL_SETS)
KEY = ("set", "engine", "particles")
_FURTHER = ("states_gain", "states_gain_error", "states_tried", "states_confirmed", "classes")


def measured(*arguments):
    """A whole command: its processor seconds, those of the clock, and what it said."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "emsplat", *map(str, arguments)]
    said = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - start, said


def scores(table):
    """Means over states of what score-states has written."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    names = ("auc", "moving", "consensus_auc", "consensus_moving")
    columns = {name: [float(row[name]) for row in rows if row.get(name)] for name in names}
    means = {name: sum(values) / len(values) for name, values in columns.items() if values}
    spread = columns["auc"]
    means["auc_spread"] = (sum((value - means["auc"]) ** 2 for value in spread) / len(spread)) ** 0.5
    means["auc_lowest"] = min(spread)
    return {name: round(value, 4) for name, value in means.items()}


def run(data, output, name, recipe, options):
    folder = output / f"{name}_{recipe}"
    seconds, wall, _ = measured(
        "heterogeneity", data / name / "particles.star", "-o", folder, "--overwrite", "--recipe", recipe, *options
    )
    summary = json.loads((folder / "summary.json").read_text())
    own = summary["heterogeneity"]
    row = {
        "set": name,
        "engine": recipe,
        "particles": summary["input"]["particles"],
        "cpu_seconds": round(seconds),
        "wall_seconds": round(wall),
        "peak_memory_mb": summary["peak_memory_mb"],
        **{key: own[key] for key in ("found", "gain", "gain_error", "components", "points")},
        **{key: own[key] for key in _FURTHER if key in own},
        "warned": [test["what"] for test in own.get("follows", []) if test["warns"]],
    }
    if own["found"] and not name.startswith("null"):
        partial = ["--partial"] if "--first" in options else []
        _, _, said = measured("score-states", folder, "--truth", data / name, "--images", "0", *partial)
        row |= scores(folder / "scores.csv")
        for key, pattern in (("neighbours", r"by latent ([\d.]+)"), ("rand_index", r"true states (-?[\d.]+)")):
            if found := re.search(pattern, said):
                row[key] = float(found[1])
    return row


def linear(data, name, images=10000, radius=14, components=6):
    """Images per second of an iteration of the linear stage: the quickest of six, in wall and in processor time."""
    stack = open_particles(data / name / "particles.star")
    stack = stack.only(1).take(torch.arange(min(images, len(stack.only(1)))))
    spectra = read_spectra(stack, radius, stack.grid, estimate_noise(stack))
    space = subspace.space_of(radius, None)
    found = subspace.begin(space, spectra, components, torch.Generator().manual_seed(0))
    wall, processor = [], []
    for _ in range(6):
        start = time.monotonic(), time.process_time()
        latents = subspace.infer(found, spectra)
        found = subspace.maximise(space, spectra, found.power, latents, pruning=False)
        wall.append(time.monotonic() - start[0])
        processor.append(time.process_time() - start[1])
    row = {"set": name, "engine": f"linear stage, shell {radius}, {components} components", "particles": len(stack)}
    rates = {"images_per_second": wall, "images_per_processor_second": processor}
    return row | {key: round(len(stack) / min(seconds)) for key, seconds in rates.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--first", type=int)
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=FOLDER")
    given = parser.parse_args()
    options = [] if given.first is None else ["--first", given.first]

    def keep(row):
        print(row, flush=True)
        add("heterogeneity", [row], KEY)

    for name in given.sets:
        if given.linear:
            keep(linear(given.data, name))
            continue
        for recipe in ("default", *given.recipe):
            keep(run(given.data, given.output, name, recipe, options))
        for rival in given.rival:
            engine, _, folder = rival.partition("=")
            scored = given.output / f"{name}_{engine}"
            scored.mkdir(parents=True, exist_ok=True)
            measured("score-states", folder, "--truth", given.data / name, "--images", "0", "-o", scored)
            keep({"set": name, "engine": engine, **scores(scored / "scores.csv")})


if __name__ == "__main__":
    main()
