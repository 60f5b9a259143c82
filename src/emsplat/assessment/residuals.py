"""What a model leaves unexplained in the images: residual power per shell, and a few particles to look at."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from emsplat.imaging.ctf import in_image, observe
from emsplat.imaging.project import project
from emsplat.io.files import number_text, replacing
from emsplat.io.mrc import writing_stack
from emsplat.maths.fourier import frequencies, hermitian_weight, shell_index, sum_by_shell
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.run.files import EXAMPLES, RESIDUAL
from emsplat.types import Batch, Gaussians, Grid, Poses

_SAMPLE = 300  # images of each half
_EXAMPLES = 4
_LOWPASS = 3.0  # pixels; noise of single pixels would hide the particle


def write_residuals(stack: ParticleStack, halves: Mapping[int, Gaussians], run: Path) -> list[dict[str, Any]]:
    """Writes ``residual.csv`` and ``examples.mrcs`` into a run folder; returns which particles the examples are.

    ``residual.csv`` has a row per shell: power of the noise model, of images minus projections of the model of their
    own half, and of the model of the other half, which has not seen them (held out); 1 is white noise of unit variance.
    Up to 300 images of each half are looked at, of the commonest box where there are several. ``examples.mrcs`` holds
    particle, CTF-modulated projection and residual in turn, centred and low-passed to 3 pixels.
    """
    stack = stack.parts()[0]
    noise = estimate_noise(stack)
    grid = stack.grid
    shells = grid.size // 2 + 1
    power = torch.zeros(3, shells, dtype=torch.float64, device=stack.device)
    images = 0
    examples: list[Tensor] = []
    about: list[dict[str, Any]] = []
    for half in halves:
        subset = stack.only(half) if (stack.half == half).sum() >= 2 else None
        if subset is None:
            continue
        chosen = subset.take(torch.linspace(0, len(subset) - 1, min(_SAMPLE, len(subset))).long())
        for batch in chosen.sequential(64):
            data = observe(batch, grid, corner=True)
            observed = data.spectrum
            power[0] += noise[batch.optics_group].sum(0)
            for row, other in ((1, False), (2, True)):
                gaussians = halves[3 - half if other else half]
                seen = _projection(gaussians, batch, data.transfer, grid)
                power[row] += _shell_power(observed - seen)
                # Held out, so that the residual shows what the data say and not what was fitted to them.
                if other and len(about) < _EXAMPLES // 2 * half:
                    examples += [_lowpass(s[:1], grid)[0] for s in (observed, seen, observed - seen)]
                    defocus = 0.5 * float(batch.optics.defocus_u[0] + batch.optics.defocus_v[0])
                    own = int(stack.table.row[int(batch.index[0])])
                    about.append({"row": own + 1, "half": half, "defocus": round(defocus)})
            images += len(batch)
    power /= max(images, 1)
    with (
        replacing(run / RESIDUAL) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["frequency", "noise", "own", "other"])
        for shell in range(1, shells):
            writer.writerow([f"{shell / grid.length:.6f}", *map(number_text, power[:, shell].tolist())])
    with writing_stack(run / EXAMPLES, len(examples), grid) as write:
        write(torch.stack(examples).cpu())
    return about


def _projection(gaussians: Gaussians, batch: Batch, transfer: Tensor, grid: Grid) -> Complex[Tensor, "p y k"]:
    poses = Poses(in_image(batch.poses.rotation, batch.optics), torch.zeros_like(batch.poses.shift))
    spectrum: Tensor = torch.fft.rfft2(project(gaussians, poses, grid)) * transfer
    return spectrum


def _shell_power(spectrum: Complex[Tensor, "p y k"]) -> Float[Tensor, " s"]:
    """Mean power per shell of unnormalised transforms, summed over the images; 1 for unit white noise."""
    size = spectrum.shape[-2]
    shells, limit = shell_index(size, device=spectrum.device), size // 2 + 1
    weight = hermitian_weight(size, torch.float64, spectrum.device).expand(size, -1)
    shells = shells.clamp(max=limit)  # corners hold no shell
    total = spectrum.abs().square().double().sum(0) * weight
    power, count = (sum_by_shell(values, shells, limit + 1)[:limit] for values in (total, weight))
    return power / count / size**2


def _lowpass(spectrum: Complex[Tensor, "p y k"], grid: Grid) -> Float[Tensor, "p y x"]:
    ky, kx = frequencies(grid, device=spectrum.device)
    width = _LOWPASS * grid.pixel_size
    soft = torch.exp(-math.log(2) * width**2 * (kx**2 + ky**2))
    image: Tensor = torch.fft.irfft2(spectrum * soft, s=(grid.size, grid.size))
    return image
