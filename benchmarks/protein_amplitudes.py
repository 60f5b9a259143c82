"""The table in `emsplat.measures.sharpening`: how the amplitudes of proteins fall off before any B factor.

    python benchmarks/protein_amplitudes.py a.pdb b.cif.gz ...

Prints ln of the mean amplitude per frequency, the mean over the structures, and how far each structure's own B factor
in a range is from that of the mean. The table was made from 1AON, 1HZH, 4AKE, 6VSB, 6VXX and 8BK7.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from emsplat.io.atoms import Atoms, read_atoms
from emsplat.maths.fourier import rfft, shell_index
from emsplat.measures.sharpening import PROTEIN_FREQUENCIES
from emsplat.simulation.images import truth_map
from emsplat.simulation.protein import place_atoms
from emsplat.types import Grid

PIXEL = 0.9  # Å: Nyquist at 1.8 Å
LARGEST = 300  # pixels; of longer molecules the middle is taken
WIDTH = 0.006  # 1/Å: shells of small boxes are this far apart
RANGES = ((10.0, 7.0), (10.0, 6.0), (10.0, 5.0), (10.0, 4.0), (10.0, 3.0), (10.0, 2.0))  # Å


def profile(path: Path) -> np.ndarray:
    """ln of the mean amplitude of a structure with B = 0 at `PROTEIN_FREQUENCIES`, 0 at 10 Å."""
    atoms = read_atoms(path)
    span = float((atoms.position.max(0).values - atoms.position.min(0).values).max())
    grid = Grid(min(2 * int(0.65 * span / PIXEL), LARGEST), PIXEL)
    inside = (atoms.position - atoms.position.mean(0)).norm(dim=1) < 0.45 * grid.length
    atoms = place_atoms(
        Atoms(*(getattr(atoms, n)[inside] for n in ("position", "element", "weight", "b_factor"))), grid
    )
    amplitude = rfft(truth_map(atoms, grid, 0.0), 3).abs().double().flatten()
    shells = shell_index(grid.size, 3).flatten()
    mean = (torch.bincount(shells, amplitude) / torch.bincount(shells))[: grid.size // 2].log().numpy()
    frequency = np.arange(grid.size // 2) / grid.length
    near = np.exp(-0.5 * ((frequency - np.array(PROTEIN_FREQUENCIES)[:, None]) / WIDTH) ** 2)
    smooth: np.ndarray = near @ mean / near.sum(1)
    return smooth - np.interp(0.1, PROTEIN_FREQUENCIES, smooth)


def b_factor(values: np.ndarray, low: float, high: float) -> float:
    """Of a line through a profile from low to high Å."""
    k = np.array(PROTEIN_FREQUENCIES)
    chosen = (k >= 1 / low - 1e-9) & (k <= 1 / high + 1e-9)
    return float(4 * np.polyfit(k[chosen] ** 2, values[chosen], 1)[0])


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]]
    profiles = np.array([profile(path) for path in paths])
    mean = profiles.mean(0)
    print("table:", ", ".join(f"{value:.2f}" for value in mean))
    print("spread:", ", ".join(f"{value:.2f}" for value in profiles.std(0)))
    for low, high in RANGES:
        own = [b_factor(values, low, high) for values in profiles]
        off = [value - b_factor(mean, low, high) for value in own]
        names = ", ".join(f"{path.name} {value:.0f}" for path, value in zip(paths, own, strict=True))
        print(f"{low:g} to {high:g} Å: B {np.mean(own):.0f}, off by {np.std(off):.0f} Å² ({names})")


if __name__ == "__main__":
    main()
