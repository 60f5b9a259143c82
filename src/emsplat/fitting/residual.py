"""Residual maps: what Gaussians leave unexplained of the data, as far as both half-sets agree on it.

Gaussians tell signal from noise by their shape, which pays where noise is strong. Where data are good, fine detail of
a large molecule would take more of them than a fit can afford; it is in the classical map (b - KV) / w of what they
leave, beside noise. How much of that is signal, the correlation F of the residual maps of both half-sets tells in each
shell: a half's counts F times, that of all particles 2F / (1 + F) times (Wiener filters; Rosenthal & Henderson 2003).
Where the halves agree on nothing, nothing is added.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.fitting.volume import VolumeObjective
from emsplat.imaging.project import voxelize
from emsplat.maths.fourier import filtered, middle
from emsplat.measures.crossvalidate import independent_coefficients
from emsplat.measures.fsc import fsc
from emsplat.models.gaussians import GaussianField
from emsplat.types import Gaussians, Grid


@torch.no_grad()
def residual_maps(
    objectives: dict[str, VolumeObjective],
    models: dict[str, GaussianField],
    mask: Float[Tensor, "z y x"],
    finest: float,
    copies: int = 1,
) -> dict[str, Float[Tensor, "w v u"]]:
    """What both half-sets agree on beyond the Gaussians: of the halves and of all particles, in the middle voxels that
    the objectives look at.

    Args:
        objectives: The data by name, those of half1 and half2 among them.
        models: What was fitted to each.
        mask: Where there is a particle, on the box.
        finest: The last frequency that halves agree on, in shells of the box; nothing is added beyond.
        copies: Elements of the symmetry; of as many coefficients one is independent.
    """
    inside = middle(mask, objectives["half1"].support)
    left = {name: own.residual(own.render(models[name].gaussians())) * inside for name, own in objectives.items()}
    agreed = fsc(left["half1"], left["half2"]).cpu()
    # Less a standard error: where there is nothing, half of the shells would agree a little.
    count = independent_coefficients(inside).cpu() / copies
    agreed = (agreed - (2 * count).rsqrt()).clamp(min=0).float().to(mask.device)
    agreed[0] = 0  # the mean of a map means nothing
    agreed[int(finest * len(inside) / len(mask)) + 1 :] = 0
    shares = {name: agreed if name.startswith("half") else 2 * agreed / (1 + agreed) for name in left}
    return {name: _weighted(volume, shares[name]) for name, volume in left.items()}


def _weighted(volume: Float[Tensor, "z y x"], share: Float[Tensor, " s"]) -> Float[Tensor, "z y x"]:
    """A map whose shells count by their ``share``, linearly between them and not at all beyond."""
    known = torch.cat([share, share.new_zeros(len(volume))])

    def response(radius: Float[Tensor, "z y k"]) -> Float[Tensor, "z y k"]:
        before = radius.long()
        return torch.lerp(known[before], known[before + 1], radius - before)

    return filtered(volume, response)


@torch.no_grad()
def map_of(gaussians: Gaussians, grid: Grid, residual: Float[Tensor, "w v u"] | None = None) -> Float[Tensor, "z y x"]:
    """The map of a fit: its Gaussians on ``grid``, and in the middle what is known beyond them."""
    volume = voxelize(gaussians, grid)
    if residual is not None:
        middle(volume, len(residual)).add_(residual.to(volume.device))
    return volume
