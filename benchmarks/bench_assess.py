"""Cost of the assessment: FSC of large maps, local resolution, resolution by direction, the report.

The plain twin of the FSC transforms both maps with numpy in float64 and sorts the shells.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import best_time, save
from emsplat.config import ReconstructConfig, SimulateConfig, configure
from emsplat.measures.directional import conical_fsc, direction_grid, slice_correlation
from emsplat.measures.fsc import fsc
from emsplat.measures.local_resolution import local_cross_validated, local_resolution, windowed_fsc
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.simulate import simulate
from emsplat.report import write_report
from emsplat.run.log import Log
from emsplat.types import Grid


def maps(size, count):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(size, size, size, generator=generator)
    return [shared + torch.randn(size, size, size, generator=generator) for _ in range(count)]


def plain_fsc(a, b):
    size = len(a)
    fa, fb = np.fft.fftn(a.numpy()), np.fft.fftn(b.numpy())
    k = np.fft.fftfreq(size, 1 / size)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int).ravel()
    sums = [np.bincount(shell, v.ravel()) for v in ((fa.conj() * fb).real, np.abs(fa) ** 2, np.abs(fb) ** 2)]
    return (sums[0] / np.sqrt(sums[1] * sums[2]))[: size // 2 + 1]


def main():
    rows = []

    def record(what, **values):
        rows.append({"what": what, **values})
        texts = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{what}: {', '.join(texts)}", flush=True)

    a, b = maps(256, 2)
    seconds, plain = best_time(lambda: fsc(a, b), 2), best_time(lambda: plain_fsc(a, b), 1)
    record("FSC", box=256, seconds=seconds, plain_numpy_seconds=plain, ratio=plain / seconds)
    a, b, c, d = maps(128, 4)
    grid = Grid(128, 1.5)
    seconds = best_time(lambda: local_resolution(a, b, grid, window=25.0))
    window = best_time(lambda: windowed_fsc(a, b, grid, (64, 64, 64), 25.0), 1)
    record(
        "local resolution",
        box=128,
        seconds=seconds,
        seconds_of_one_window=window,
        windows_in_that_time=seconds / window,
    )
    seconds = best_time(lambda: local_cross_validated((a, b), (c, d), grid, window=25.0))
    record("local resolution, cross-validated", box=128, seconds=seconds)
    cells = direction_grid()
    record("slices", box=128, seconds=best_time(lambda: slice_correlation(a, b, grid, cells, (30.0, 4.0)), 1))
    record("cones", box=128, seconds=best_time(lambda: conical_fsc(a, b, cells), 1))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        star = simulate(SimulateConfig(box=128, pixel_size=1.5, particles=1000), None, folder / "particles")
        with (folder / "log").open("w") as log:
            reconstruct(configure(ReconstructConfig, epochs=3), star, folder / "run", Log(log))
        start = time.perf_counter()
        page = write_report(folder / "run")
        record("report", box=128, seconds=time.perf_counter() - start, megabytes=page.stat().st_size / 1e6)
    save("assess", rows)


if __name__ == "__main__":
    main()
