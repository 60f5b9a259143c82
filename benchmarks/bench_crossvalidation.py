"""Does the cross-validated FSC follow the FSC against the truth, which it does not know?

Five structures, three noise levels and numbers of Gaussians, both engines. In each shell where the back-projections of
the halves correlate above 0.1: estimate minus FSC of the two models against the truth (mean), in the mask of the run.
The truth is cut off at Nyquist in all directions, as the images cut it off: through the mask the corners beyond would
reach the last shells. The half-map FSC stands beside it, as the FSC of one half against the truth that it implies,
sqrt(F).

"dips" instead of a structure: particles whose transforms have zeros (hollow shells, one made like ferritin, a sphere,
rods), where the FSC has dips. Maps with noise that grows with k, and models that are smoothed and nowhere below a
level, stand for whole runs, so that there can be many: 16 pairs of each at two levels of noise.
Usage: bench_crossvalidation.py [folder of the test data] [name of one structure, or dips]
"""

import itertools
import math
import sys
import tempfile
from pathlib import Path

import gemmi
import numpy as np
import torch

from common import save
from emsplat.config import ReconstructConfig, SimulateConfig, configure
from emsplat.io.atoms import Atoms
from emsplat.io.mrc import read_map
from emsplat.maths.fourier import shell_index, shell_radius
from emsplat.maths.groups import parse_symmetry
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.fsc import fsc
from emsplat.measures.mask import solvent_mask
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.simulate import simulate
from emsplat.run.log import Log
from emsplat.simulation.images import truth_map
from emsplat.simulation.protein import procedural_protein
from emsplat.types import Grid

# Name, file, chains (None: all), pixel size in Å of a box of 96.
STRUCTURES = (
    ("procedural", None, None, 1.5),
    ("GroEL subunit", "1aon.pdb.gz", "A", 1.5),
    ("adenylate kinase", "adk_open.pdb", None, 1.2),
    ("spike", "6vxx.cif.gz", None, 2.7),
    ("GroES ring", "1aon.pdb.gz", "OPQRSTU", 1.7),
)
CONDITIONS = ((0.02, None), (0.05, 600), (0.2, 4000))  # SNR, Gaussians
PARTICLES = 3000


def model_file(data, name, chains, folder):
    if name is None:
        return None
    found = sorted((data / "models").glob(name.split(".")[0] + "*"))
    structure = gemmi.read_structure(str(found[0]))
    for chain in [c.name for c in structure[0] if chains and c.name not in chains]:
        structure[0].remove_chain(chain)
    structure.write_pdb(str(folder / "model.pdb"))
    return folder / "model.pdb"


def within_nyquist(volume):
    spectrum = torch.fft.rfftn(volume)
    spectrum[shell_index(len(volume), 3) > len(volume) // 2] = 0
    return torch.fft.irfftn(spectrum, s=volume.shape)


def differences(run, truth):
    halves = [read_map(run / f"run_half{h}_class001_unfil.mrc")[0] for h in (1, 2)]
    raw = [read_map(run / f"backprojection_half{h}.mrc")[0] for h in (1, 2)]
    mask, grid = read_map(run / "mask.mrc")
    validation = CrossValidation((raw[0], raw[1]), mask, grid)
    curve, low, high = validation.band((halves[0], halves[1]))
    estimate = curve.value
    true = torch.stack([fsc(half, truth, mask) for half in halves]).mean(0)
    implied = fsc(*halves, mask).clamp(min=0).sqrt()
    chosen = validation.defined & (validation.raw > 0.1)
    chosen[0] = False
    inside = (true >= low) & (true <= high)
    off = (estimate - true)[chosen]
    return {
        "shells": int(chosen.sum()),
        "largest": float(off.abs().max()),
        "mean": float(off.mean()),
        "within_band": float(inside[chosen].float().mean()),
        "half_map_largest": float((implied - true)[chosen].abs().max()),
        "worst_shell": [round(float(v[chosen][off.abs().argmax()]), 3) for v in (validation.raw, estimate, true)],
    }


def atoms_in(positions, rng):
    element = torch.from_numpy(rng.choice([6, 7, 8], size=len(positions), p=[0.63, 0.17, 0.2]))
    ones = torch.ones(len(positions), dtype=torch.float64)
    return Atoms(torch.from_numpy(positions - positions.mean(0)), element, ones, 0 * ones)


def ball(inner, outer, volume, rng):
    """Points at a density of one per 17 Å³, as in protein, of which there are ``volume`` Å³."""
    axis = rng.standard_normal((int(volume / 17), 3))
    radius = rng.uniform(inner**3, outer**3, (len(axis), 1)) ** (1 / 3)
    return radius * axis / np.linalg.norm(axis, axis=1, keepdims=True)


def hollow(inner, outer, rng, group="O"):
    elements = parse_symmetry(group).elements.numpy()
    part = ball(inner, outer, 4 / 3 * math.pi * (outer**3 - inner**3) / len(elements), rng)
    return np.concatenate([part @ element.T for element in elements])


def ferritin(rng):
    part = procedural_protein(1300, 0).position.numpy() + [0.0, 20.0, 44.0]
    return np.concatenate([part @ element.T for element in parse_symmetry("O").elements.numpy()])


def rod(radius, length, rng):
    count = int(math.pi * radius**2 * length / 17)
    angle, across = rng.uniform(0, 2 * math.pi, count), radius * np.sqrt(rng.uniform(size=count))
    return np.stack([across * np.cos(angle), across * np.sin(angle), length * rng.uniform(-0.5, 0.5, count)], 1)


DIPS = (
    ("hollow shell, 46 to 56 Å", lambda rng: hollow(46, 56, rng)),
    ("hollow shell, 50 to 56 Å", lambda rng: hollow(50, 56, rng)),
    ("hollow shell without symmetry, 35 to 50 Å", lambda rng: hollow(35, 50, rng, "C1")),
    ("24 helical proteins in a shell", ferritin),
    ("sphere of 45 Å", lambda rng: ball(0, 45, 4 / 3 * math.pi * 45**3, rng)),
    ("rod, 15 Å by 110 Å", lambda rng: rod(15, 110, rng)),
    ("rod, 9 Å by 120 Å", lambda rng: rod(9, 120, rng)),
)


def filtered(volume, factor):
    return torch.fft.irfftn(torch.fft.rfftn(volume) * factor, s=volume.shape)


def dips(pairs=16, grid=Grid(48, 10 / 3)):  # noqa: B008 (frozen)
    radius, half = shell_radius(grid.size, 3).float(), grid.size // 2
    rows = []
    for (name, make), level in itertools.product(DIPS, (1.5, 4.0)):
        rng = np.random.default_rng(0)
        truth = within_nyquist(truth_map(atoms_in(make(rng), rng), grid, 60.0))
        truth = truth / truth.std()
        growing = level * (radius / (half / 2)).clamp(min=0.05).sqrt()
        off, inside, width, mask = [], [], [], None
        for seed in range(pairs):
            noise = torch.Generator().manual_seed(seed)
            raw = [truth + filtered(torch.randn(truth.shape, generator=noise), growing) for _ in range(2)]
            if mask is None:
                mask = solvent_mask((raw[0] + raw[1]) / 2, grid, 0.9 * grid.length)
            models = []
            for one in raw:
                soft = filtered(one, torch.exp(-((radius / (0.75 * half)) ** 2)))
                model = (soft * mask - 0.3 * soft.std()).clamp(min=0)
                models.append(filtered(model, torch.exp(-((radius / (0.875 * half)) ** 2))))
            validation = CrossValidation((raw[0], raw[1]), mask, grid)
            curve, low, high = validation.band((models[0], models[1]))
            true = torch.stack([fsc(model, truth, mask) for model in models]).mean(0)
            chosen = validation.defined & (validation.raw > 0.1)
            chosen[0] = False
            off.append((curve.value - true)[chosen])
            inside.append(((true >= low) & (true <= high))[chosen].double())
            width.append((high - low)[chosen])
        off, inside, width = map(torch.cat, (off, inside, width))
        row = {
            "particle": name,
            "noise": level,
            "shells": len(off),
            "rms": float(off.square().mean().sqrt()),
            "largest": float(off.abs().max()),
            "within_band": float(inside.mean()),
            "half_width": float(width.mean()) / 2,
        }
        rows.append(row)
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    save("crossvalidation_dips", rows)


def main():
    if sys.argv[2:] == ["dips"]:
        return dips()
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    rows = []
    for (name, file, chains, pixel_size), (snr, gaussians) in itertools.product(STRUCTURES, CONDITIONS):
        if len(sys.argv) > 2 and sys.argv[2] != name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            config = SimulateConfig(box=96, pixel_size=pixel_size, particles=PARTICLES, snr=snr)
            star = simulate(config, model_file(data, file, chains, folder), folder / "particles")
            truth = read_map(folder / "particles" / "truth.mrc")[0]
            truth = within_nyquist(truth)
            for engine in ("one-pass", "images"):
                run = folder / engine
                reconstruct(
                    configure(ReconstructConfig, engine=engine, gaussians=gaussians),
                    star,
                    run,
                    Log((run.parent / "log").open("a")),
                )
                row = {
                    "structure": name,
                    "snr": snr,
                    "gaussians": gaussians,
                    "engine": engine,
                    **differences(run, truth),
                }
                rows.append(row)
                print(
                    ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )
    print(f"largest difference of {len(rows)} runs: {max(row['largest'] for row in rows):.3f}")
    if len(sys.argv) < 3:
        save("crossvalidation", rows)


if __name__ == "__main__":
    main()
