"""Does the cross-validated FSC follow the FSC against the truth, which it does not know?

Five structures, three noise levels and numbers of Gaussians, both engines. In each shell where the back-projections of
the halves correlate above 0.1: estimate minus FSC of the two models against the truth (mean), in the mask of the run.
The truth is cut off at Nyquist in all directions, as the images cut it off: through the mask the corners beyond would
reach the last shells. The half-map FSC stands beside it, as the FSC of one half against the truth that it implies,
sqrt(F).
Usage: bench_crossvalidation.py [folder of the test data] [name of one structure]
"""

import itertools
import sys
import tempfile
from pathlib import Path

import gemmi
import torch

from common import save
from emsplat.assess.crossvalidate import CrossValidation
from emsplat.assess.fsc import fsc
from emsplat.config import ReconstructConfig, SimulateConfig
from emsplat.fourier import shell_index
from emsplat.io.mrc import read_map
from emsplat.progress import Log
from emsplat.reconstruct import reconstruct
from emsplat.simulate import simulate

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
    estimate = validation.curve((halves[0], halves[1])).value
    true = torch.stack([fsc(half, truth, mask) for half in halves]).mean(0)
    implied = fsc(*halves, mask).clamp(min=0).sqrt()
    chosen = validation.defined & (validation.raw > 0.1)
    chosen[0] = False
    band = validation.interval(validation.curve((halves[0], halves[1])))
    inside = (true >= band[0]) & (true <= band[1])
    off = (estimate - true)[chosen]
    return {
        "shells": int(chosen.sum()),
        "largest": float(off.abs().max()),
        "mean": float(off.mean()),
        "within_band": float(inside[chosen].float().mean()),
        "half_map_largest": float((implied - true)[chosen].abs().max()),
        "worst_shell": [round(float(v[chosen][off.abs().argmax()]), 3) for v in (validation.raw, estimate, true)],
    }


def main():
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
                    ReconstructConfig(engine=engine, gaussians=gaussians),
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
