"""Frames of the explorer per second while the molecule moves, in a headless Chromium that draws in software.

    PYTHONPATH=tests python benchmarks/bench_explorer.py

8,192 Gaussians in five parts, 10,000 and 100,000 particles with eight latents. Beside the frames, which other work on
the machine slows down, the processor time that a frame took: of the page, and of the process that draws. Two quiet
cores do both at once, so the longer of them bounds the rate. Linux only (/proc).
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from browser import browsing
from common import save
from emsplat.models.decoder import Decoder, Shape
from emsplat.report.explorer import DecoderNumbers, ExplorerNumbers, ParticleNumbers, write_explorer

GAUSSIANS, LATENTS, SECONDS = 8192, 8, 6


def three_arms(generator):
    """Three lumps of some 60 Å, as of an antibody."""
    arm = torch.randint(3, (GAUSSIANS,), generator=generator)
    angle = arm * (2 * torch.pi / 3)
    middle = 40 * torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    return middle + torch.randn(GAUSSIANS, 3, generator=generator) * torch.tensor([15.0, 15.0, 12.0])


def write(path, particles):
    generator = torch.Generator().manual_seed(0)
    width = 1.2 + 2 * torch.rand(GAUSSIANS, generator=generator) ** 2
    decoder = Decoder(
        three_arms(generator), width, torch.rand(GAUSSIANS, generator=generator), Shape(LATENTS), generator=generator
    )
    own = {name: value.detach().numpy() for name, value in decoder.named_parameters()}
    numbers = DecoderNumbers(
        **{name: own[name] for name in ("centre", "width", "amplitude", "logits", "bend", "change")},
        weights=[own[f"weights.{number}"] for number in range(3)],
        biases=[own[f"biases.{number}"] for number in range(3)],
        length=decoder.length,
        unit=decoder.unit,
    )
    latent = np.random.default_rng(0).normal(size=(particles, LATENTS))
    rows = np.arange(particles)
    table = ParticleNumbers(rows + 1, 1 + rows % 2, latent, np.ones(particles))
    page = ExplorerNumbers("benchmark", [numbers], table, latent[:16], np.ones(16) / 16, np.zeros(LATENTS))
    return write_explorer(path, page)


def processor_times(profile):
    """Seconds of the page's process and of the one that draws, among those of the browser with this profile."""
    found = {"page": 0.0, "drawing": 0.0}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, times = (process / "cmdline").read_text(), (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        kind = "page" if "--type=renderer" in words else "drawing" if "--type=gpu-process" in words else None
        if kind and str(profile) in words:
            found[kind] += (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return found


def main():
    rows = []
    for particles in (10_000, 100_000):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            path = write(folder / "page.html", particles)
            with browsing(folder / "profile", 1440, 900) as page:
                page.open(path)
                page.wait("explorer.counts.molecule > 0")
                page.evaluate("document.getElementById('play').click()")
                for view in ("surface", "projection"):
                    for difference in (False, True):
                        page.evaluate(f"document.querySelector('#view [data-value={view}]').click()")
                        page.evaluate(
                            f"if (explorer.molecule.difference !== {str(difference).lower()})"
                            " document.getElementById('difference').click()"
                        )
                        time.sleep(3)  # until the detail has found its level
                        before, frames = processor_times(folder), page.evaluate("explorer.counts.molecule")
                        start = time.perf_counter()
                        time.sleep(SECONDS)
                        frames = page.evaluate("explorer.counts.molecule") - frames
                        seconds, after = time.perf_counter() - start, processor_times(folder)
                        row = {
                            "view": view,
                            "difference": difference,
                            "particles": particles,
                            "megabytes": path.stat().st_size / 1e6,
                            "frames_per_second": frames / seconds,
                            **{f"{kind}_ms": 1000 * (after[kind] - before[kind]) / frames for kind in before},
                            "detail": page.evaluate("explorer.molecule.detail"),
                            "load": os.getloadavg()[0],
                        }
                        rows.append(row)
                        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    save("explorer", rows)


if __name__ == "__main__":
    main()
