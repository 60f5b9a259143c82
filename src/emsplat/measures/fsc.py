"""Fourier shell correlation of two maps and its corrections; `curves` reads resolutions from it.

Shells follow RELION: shell s holds the frequencies with round(|k| N a) = s, s = 0 .. N // 2, and a resolution is the
last shell before the first drop below a threshold. cryoDRGN (and CryoBench) put s - 1 <= |k| N a < s into shell s, end
with shell N / 2 - 1 and take the last shell above the threshold, which reads half a shell to a shell finer and ignores
dips: `fsc` and `last_crossing` give these as well, and every output names its rule (docs/conventions.md, 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths import fourier
from emsplat.measures.curves import Sampled, first_below
from emsplat.types import Curve, Grid

Rule = Literal["relion", "cryodrgn"]

PROTEIN_VOLUME = 0.476  # part of a mask around a particle that the protein fills, as RELION assumes


def fsc(
    a: Float[Tensor, "z y x"],
    b: Float[Tensor, "_z _y _x"],
    mask: Float[Tensor, "_z _y _x"] | None = None,
    rule: Rule = "relion",
) -> Float[Tensor, " s"]:
    """Fourier shell correlation of two cubic maps, float64, one value for each shell 0 .. size // 2.

    FSC_s = Re Σ F_a* F_b / sqrt(Σ |F_a|² Σ |F_b|²) over the whole shell (Harauz & van Heel 1986); 0 where
    either map has no power. The maps are multiplied by the mask first. Transforms are taken in the dtype of
    the maps, sums in float64. ``rule`` says which frequencies shell s holds: those rounded to s ("relion"), or
    s - 1 <= |k| N a < s with shell 0 set to 1, and no last shell (NaN), as cryoDRGN has none ("cryodrgn").

    Raises:
        InputError: the maps are not cubes of one size; the mask has another shape, is empty or leaves [0, 1].
    """
    _check_maps(a, b)
    if mask is not None:
        _check_mask(mask, a)
    # Neither map is moved to the origin: both would turn by the same phase.
    spectrum_a, spectrum_b = (torch.fft.rfftn(one if mask is None else one * mask) for one in (a, b))
    size = len(a)
    shells = size // 2 + 1
    full = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=a.device).round()
    half = full[:shells].abs()
    twice = torch.where((half == 0) | (2 * half == size), 1.0, 2.0).double()
    plane = full[:, None] ** 2 + half**2
    sums = torch.zeros(3, shells + 1, dtype=torch.float64, device=a.device)
    # Some z planes at a time: the memory is that of the two transforms.
    for planes in fourier.slabs(size, plane.numel()):
        offset = 0.5 if rule == "relion" else 1.0
        radius = torch.sqrt(plane + full[planes, None, None] ** 2)
        shell = torch.floor(radius + offset).long().clamp(max=shells).flatten()
        slab_a, slab_b = (torch.view_as_real(s[planes]).double() for s in (spectrum_a, spectrum_b))
        for row, (p, q) in enumerate([(slab_a, slab_b), (slab_a, slab_a), (slab_b, slab_b)]):
            product = p * q  # its parts added as two: a sum over so short an axis takes several times as long
            sums[row] += torch.bincount(
                shell, (twice * (product[..., 0] + product[..., 1])).flatten(), minlength=shells + 1
            )
    cross, power_a, power_b = sums[:, :shells]
    norm = power_a.sqrt() * power_b.sqrt()
    if rule == "cryodrgn":
        cross[0] = norm[0] = 1
    value = torch.where(norm > 0, cross / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
    if rule == "cryodrgn" and shells > 1:
        value[-1] = torch.nan
    return value


def fsc_curve(
    a: Float[Tensor, "z y x"],
    b: Float[Tensor, "_z _y _x"],
    grid: Grid,
    mask: Float[Tensor, "_z _y _x"] | None = None,
    rule: Rule = "relion",
) -> Curve:
    """`fsc` with the frequency of each shell, s / (N a) in 1/Å; both float64 on the CPU.

    Raises:
        InputError: as for `fsc`, or the maps are not on ``grid``.
    """
    if len(a) != grid.size:
        raise InputError(
            f"FSC: map of {len(a)} voxels per axis on a grid of {grid.size}; expected the same size; "
            "pass the grid that the map was read with"
        )
    value = fsc(a, b, mask, rule).cpu()
    return Curve(torch.arange(len(value), dtype=torch.float64) / grid.length, value)


def randomise_phases(volume: Float[Tensor, "z y x"], shell: int, seed: int) -> Float[Tensor, "z y x"]:
    """The map with random phases in all shells from ``shell`` on, amplitudes unchanged (Chen et al. 2013)."""
    return fourier.randomise_phases(volume, shell, torch.Generator().manual_seed(seed), dims=3)


def randomisation_shell(unmasked: Sampled, threshold: float = 0.8) -> int | None:
    """The first shell where the FSC without mask falls below ``threshold`` (RELION's rule); None where none does."""
    shell = first_below(unmasked, threshold)
    return shell if shell < len(unmasked.value) else None


def corrected_fsc(masked: Curve, randomised: Curve, start: int) -> Curve:
    """FSC without what the mask alone contributes (Chen et al. 2013, eq. 4, with RELION's rule for where it begins).

    ``randomised`` is the masked FSC of the maps with random phases from shell ``start`` on. The curve is the masked
    one before shell ``start`` + 2 and (FSC - FSC_random) / (1 - FSC_random) from there on; 0 where the random phases
    agree fully.
    """
    rest = 1 - randomised.value
    value = torch.where(rest > 1e-9, (masked.value - randomised.value) / rest.clamp(min=1e-9), 0.0)
    shells = torch.arange(len(value), device=value.device)
    return Curve(masked.frequency, torch.where(shells < start + 2, masked.value, value))


def particle_fsc(unmasked: Curve, mask_fraction: float) -> Curve:
    """FSC of the particle alone, from that of the whole box (Grant et al. 2018, cisTEM; RELION's column of that name).

    f F / (1 + (f - 1) F) with f = 0.476 / ``mask_fraction``, the part of the box that a mask around the particle
    fills, of which protein fills 0.476.
    """
    factor = PROTEIN_VOLUME / mask_fraction
    return Curve(unmasked.frequency, factor * unmasked.value / (1 + (factor - 1) * unmasked.value))


def common_grid(grids: Mapping[str, Grid]) -> Grid:
    """The one grid that all named maps share; pixel sizes may differ by the rounding of an MRC header (1e-4).

    Raises:
        InputError: two maps differ in box or pixel size.
    """
    (first, grid), *others = grids.items()
    for name, other in others:
        if other.size != grid.size or not math.isclose(other.pixel_size, grid.pixel_size, rel_tol=1e-4):
            raise InputError(
                f"{name}: box {other.size} at {other.pixel_size:.5g} Å, but {first} has box {grid.size} at "
                f"{grid.pixel_size:.5g} Å; expected the same; resample one of them or correct its header"
            )
    return grid


def _check_maps(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or len(set(a.shape)) != 1:
        raise InputError(
            f"FSC: maps of {_shape(a)} and {_shape(b)} voxels; expected two cubes of one size; "
            "crop, pad or resample one of them"
        )


def _check_mask(mask: Tensor, volume: Tensor) -> None:
    if mask.shape != volume.shape:
        raise InputError(
            f"FSC mask: {_shape(mask)} voxels, but the maps have {_shape(volume)}; expected the same; "
            "make the mask from one of these maps"
        )
    low, high = mask.min().item(), mask.max().item()
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise InputError(
            f"FSC mask: values from {low:.4g} to {high:.4g}; expected 0 to 1; "
            "threshold the map to make a mask, or rescale it"
        )
    if high < 1e-6:
        raise InputError("FSC mask: empty, every voxel is 0; expected some voxels of 1; lower its threshold")


def _shape(volume: Tensor) -> str:
    return "×".join(map(str, volume.shape))
