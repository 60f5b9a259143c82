"""How near reconstructed states of a molecule come to the true ones: the scores of CryoBench (Jeon et al. 2024), and
the same where the molecule moves.

FSC-AUC is the area under the Fourier shell correlation of a map with the true map of its state, both multiplied by one
mask. A consensus that knows of no states gets most of it where most of the molecule stands still; so there is the
same area inside a mask of what differs between the true state and the mean of the states ("moving").
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from emsplat.errors import InputError
from emsplat.measures.mask import soft_region

_QUERIES = 2000  # points whose neighbours are compared; more change the mean by less than it can mean
_AT_ONCE = 2**24  # distances


# Area under the FSC


def masked_spectrum(volume: Float[Tensor, "z y x"], mask: Float[Tensor, "z y x"]) -> Complex[Tensor, "z y k"]:
    """What `auc` compares: the transform of a map times a mask."""
    spectrum: Tensor = torch.fft.rfftn(volume * mask)
    return spectrum


def auc(a: Complex[Tensor, "z y k"], b: Complex[Tensor, "z y k"]) -> float:
    """CryoBench's area under the FSC of two masked maps of D³ voxels, from their transforms.

    Shell i = 1 … D/2 - 1 holds i - 1 <= r < i; FSC_0 = 1; values below 0 count as 0; trapezoids over i / D, not
    normalised: at most (D/2 - 1) / D. A shell without power in either map has FSC 0.
    """
    size = len(a)
    shell, weight = _shells(size)
    p, q = torch.view_as_real(a), torch.view_as_real(b)
    products = [(weight * (x * y).sum(-1)).flatten() for x, y in ((p, q), (p, p), (q, q))]
    cross, power_a, power_b = (
        torch.bincount(shell, product.double(), minlength=size // 2 + 1)[: size // 2] for product in products
    )
    norm = power_a.sqrt() * power_b.sqrt()
    value = torch.where(norm > 0, cross / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0).clamp(0, 1)
    value[0] = 1
    return float(torch.trapezoid(value) / size)


def fsc_auc(a: Float[Tensor, "z y x"], b: Float[Tensor, "z y x"], mask: Float[Tensor, "z y x"]) -> float:
    """`auc` of two maps in a mask."""
    return auc(masked_spectrum(a, mask), masked_spectrum(b, mask))


@cache
def _shells(size: int) -> tuple[Int[Tensor, " v"], Float[Tensor, "1 1 k"]]:
    """Shell of each coefficient of a half space, size // 2 for those in none, and how often it stands in the whole."""
    full = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64).round()
    half = full[: size // 2 + 1].abs()
    radius = (full[:, None, None] ** 2 + full[:, None] ** 2 + half**2).sqrt()
    weight = torch.where((half == 0) | (2 * half == size), 1.0, 2.0)
    return (torch.floor(radius) + 1).long().clamp(max=size // 2).flatten(), weight[None, None].float()


# Masks


def common_mask(highest: Float[Tensor, "z y x"], pixel_size: float) -> Float[Tensor, "z y x"]:
    """One mask for all states, from the largest value that any of them has at each voxel: where that is above a
    twentieth of its maximum, grown by 6 Å (at least 2 voxels), with a raised cosine of 9 Å (at least 3 voxels).

    Raises:
        InputError: no voxel is above 0.
    """
    if not float(highest.max()) > 0:
        raise InputError("states: no voxel of the true maps is above 0; expected bright density")
    return _grown(highest > 0.05 * highest.max(), pixel_size)


def moving_mask(difference: Float[Tensor, "z y x"], pixel_size: float) -> Float[Tensor, "z y x"] | None:
    """Where a true state differs from the mean of the states: voxels whose absolute difference is above a fifth of its
    maximum, grown and softened as `common_mask`. None where there is no difference."""
    size = difference.abs()
    return None if not float(size.max()) > 0 else _grown(size > 0.2 * size.max(), pixel_size)


def _grown(region: Bool[Tensor, "z y x"], pixel_size: float) -> Float[Tensor, "z y x"]:
    return soft_region(region, pixel_size, extend=max(6.0, 2 * pixel_size), edge=max(9.0, 3 * pixel_size))


# Latents


def nearest_rows(latents: Float[Tensor, "p d"], state: Int[Tensor, " p"], states: int) -> Int[Tensor, " s"]:
    """For each state the particle whose latent is nearest to the mean latent of the particles in that state.

    Raises:
        InputError: a state without particles.
    """
    count = torch.bincount(state, minlength=states)
    if int(count.min()) == 0:
        raise InputError(f"states: state {int(count.argmin()) + 1} has no particles; expected some in each")
    mean = torch.zeros(states, latents.shape[1], dtype=latents.dtype).index_add_(0, state, latents) / count[:, None]
    return torch.stack([(latents - centre).square().sum(1).argmin() for centre in mean])


def neighbourhood_similarity(
    latents: Float[Tensor, "p d"], truth: Float[Tensor, "p c"], neighbours: int | None = None
) -> tuple[float, float]:
    """Share of a particle's k nearest neighbours by latent that are among its k nearest in truth (Euclidean, the
    particle itself counted, k = n / 20 without ``neighbours``), and what latents that say nothing would get.

    Particles as near in truth as the k-th count as near; of those as near by latent as the k-th each counts in part.
    The mean is over at most 2,000 particles evenly spread.
    """
    count = len(latents)
    k = max(1, count // 20) if neighbours is None else neighbours
    queries = torch.linspace(0, count - 1, min(count, _QUERIES)).long()
    shared = chance = 0.0
    step = max(1, _AT_ONCE // count)
    for start in range(0, len(queries), step):
        rows = queries[start : start + step]
        own, true = _distances(latents, rows), _distances(truth, rows)
        limit = own.kthvalue(k, dim=1, keepdim=True).values
        inside, tied = own < limit, own == limit
        part = (k - inside.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
        furthest = true.kthvalue(k, dim=1, keepdim=True).values
        near = true <= furthest * (1 + 1e-9) + 1e-12
        shared += float(((inside + part * tied) * near).sum()) / k
        # The particle itself, and each of the others as likely as any.
        others = (near.double().sum(1) - 1) / max(count - 1, 1)
        chance += float((1 + (k - 1) * others).sum()) / k
    return shared / len(queries), chance / len(queries)


def _distances(points: Float[Tensor, "p d"], rows: Int[Tensor, " q"]) -> Float[Tensor, "q p"]:
    """Squared distances, float64; differences rather than products, so that equal points are at equal distances."""
    wide = points.double()
    return sum(((axis[rows, None] - axis) ** 2 for axis in wide.T), torch.zeros(len(rows), len(points)).double())


def adjusted_rand_index(a: Int[Tensor, " p"], b: Int[Tensor, " p"]) -> float:
    """Agreement of two partitions: 1 where they are the same, 0 in the mean of random ones (Hubert & Arabie 1985)."""
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)

    def pairs(n: Float[Tensor, "..."]) -> float:
        return float((n * (n - 1) / 2).sum())

    both, first, second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = first * second / max(pairs(torch.tensor([float(len(a))])), 1.0)
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def circular(degrees: Float[Tensor, " p"]) -> Float[Tensor, "p 2"]:
    """Angles as points of a circle of radius 1: 0 is as near to 359 as to 1."""
    turn = torch.deg2rad(degrees.double())
    return torch.stack([torch.cos(turn), torch.sin(turn)], dim=1)
