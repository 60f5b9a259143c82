"""The noise spectrum of images, from what surrounds the particles."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.maths.fourier import hermitian_weight, shell_index, sum_by_shell
from emsplat.particles.stack import ParticleStack


def estimate_noise(stack: ParticleStack, particles: int = 600) -> Float[Tensor, "o s"]:
    """Noise power of the normalised images per optics group and shell (0 ... N/2), 1 for unit white noise.

    From the pixels outside the particle, with a soft edge that keeps the signal from leaking in. Groups with fewer
    than 50 of the images looked at share one spectrum. Where processes have different images (`Holding`), all of them
    look at theirs, at the same time.
    """
    grid, device = stack.grid, stack.device
    axis = (torch.arange(grid.size, device=device) - grid.size // 2) * grid.pixel_size
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    edge = 0.05 * grid.length
    ramp = ((radius - stack.diameter / 2 + edge) / edge).clamp(0, 1)
    window = 0.5 - 0.5 * torch.cos(torch.pi * ramp)
    shells = shell_index(grid.size, device=device).clamp(max=grid.size // 2).flatten()
    weight = hermitian_weight(grid.size, device=device).expand(grid.size, -1).flatten()
    groups, count = len(stack.table.groups), grid.size // 2 + 1
    power = torch.zeros(groups, count, dtype=torch.float64, device=device)
    seen = torch.zeros(groups, device=device)
    positions = torch.linspace(0, len(stack) - 1, min(particles, len(stack))).long()
    sample = stack.take(positions)
    for batch in sample.here().sequential(64):
        spectrum = torch.view_as_real(torch.fft.rfft2(batch.images.mul_(window)))
        present, group = torch.unique(batch.optics_group, return_inverse=True)  # of groups there may be hundreds
        total = power.new_zeros(len(present), weight.numel())
        total.index_add_(0, group, spectrum.square_().sum(-1).flatten(1).double())
        by_shell = power.new_zeros(len(present), count).index_add_(1, shells, total.mul_(weight))
        power.index_add_(0, present, by_shell)
        seen.index_add_(0, batch.optics_group, seen.new_ones(len(batch)))
    if sample.holding is not None:
        sample.holding.world.sum_(power, seen)
    per_shell = sum_by_shell(weight, shells, count)
    scale = per_shell * window.square().sum()
    shared = power.sum(0) / (seen.sum() * scale)
    own = power / (seen.clamp(min=1)[:, None] * scale)
    spectrum = torch.where(seen[:, None] >= 50, own, shared).float()
    # The mean that normalisation takes away leaves shell 0 empty.
    spectrum[:, 0] = spectrum[:, 1]
    return spectrum.clamp(min=1e-3)
