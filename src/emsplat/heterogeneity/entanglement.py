"""Do latents follow the structure, or what differs between images for other reasons?

Where a molecule stands has nothing to do with the direction it is seen from, its angle in the image, the defocus, the
grey scale. Then the mean of the posterior latents is the same in any group of images that these numbers make, however
little the images of a group say: posteriors shrink towards the mean of all, and the mean of posterior means is that of
the prior. (Their spread is not the same, and distance correlation sees that: a motion that some views hardly show
follows the view by it.) So the measure is how much of the variance of the latents the mean at given nuisance explains,
in the direction of latent space where it explains most, less what it explains of shuffled images.

What micrographs have in common is shuffled by micrograph. Families of functions: spherical harmonics up to degree 3 for
directions, two harmonics of angles, polynomials of degree 3 in the rank of numbers, means of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.heterogeneity.subspace import Subspace
from emsplat.maths.fourier import frequencies, irfft, rfft
from emsplat.sums.spectra import AnySpectra
from emsplat.types import Grid

SHUFFLES = 999
LEVEL = 0.01  # of the p value, over the number of tests
LARGE = 0.05  # of the variance along a direction of latent space
ALIKE = 0.8  # squared cosine between a change of the map and one of its brightness, or of where the whole of it is
_FEWEST_UNITS = 20  # micrographs that can be shuffled
_ENOUGH = 20000


@dataclass(frozen=True)
class Entangled:
    """How much latents follow something that is no structure."""

    what: str
    share: float  # of the variance along ``direction``, beyond that of shuffles
    p: float  # of a shuffle that explains as much
    direction: tuple[float, ...]  # in latent space, of length 1
    shuffled: str  # what was shuffled: images or micrographs
    tests: int = 1

    @property
    def component(self) -> int:
        """The component that stands for most of the direction, from 1."""
        return 1 + max(range(len(self.direction)), key=lambda k: abs(self.direction[k]))

    @property
    def warns(self) -> bool:
        return self.share >= LARGE and self.p <= LEVEL / self.tests


@dataclass(frozen=True)
class Circumstances:
    """What differs between images besides the structure; None where it is not known."""

    rotation: Float[Tensor, "v 3 3"]  # to the image
    defocus: Float[Tensor, " v"]
    brightness: Float[Tensor, " v"]  # of the image, relative to the mean map's
    micrograph: Int[Tensor, " v"] | None


def entanglement(latent: Float[Tensor, "v q"], about: Circumstances, seed: int) -> list[Entangled]:
    """All tests, those that warn first."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(latent), generator=generator)[:_ENOUGH]
    white, back = _whitened(latent[chosen].double())
    micrograph = None if about.micrograph is None else torch.unique(about.micrograph[chosen], return_inverse=True)[1]
    rotation = about.rotation[chosen].double()
    angle = torch.atan2(rotation[:, 1, 2], -rotation[:, 0, 2])  # psi of RELION
    defocus = about.defocus[chosen].double()
    by_image: dict[str, Tensor] = {
        "viewing direction": _harmonics(rotation[:, 2]),
        "angle in the image": torch.stack([f(k * angle) for k in (1, 2) for f in (torch.cos, torch.sin)], 1),
    }
    found = []
    units = 0 if micrograph is None else int(micrograph.max()) + 1
    if micrograph is not None and _FEWEST_UNITS <= units <= len(chosen) // 4:
        all_views = torch.ones(len(white), dtype=torch.bool)
        # An image's latent and brightness share its noise: some images tell the brightness, others the latents.
        some = torch.rand(len(white), generator=generator) < 0.5
        for what, values, telling, told in (
            ("defocus", defocus, all_views, all_views),
            ("grey scale of micrographs", about.brightness[chosen].double(), some, ~some),
        ):
            mean, known = _sums(values[telling, None], micrograph[telling], units)
            total, count = _sums(white[told], micrograph[told], units)
            kept = (known > 0) & (count > 0)
            features = _ranked((mean[:, 0] / known)[kept])
            found.append(_by_unit(what, total[kept], count[kept], features, int(told.sum()), generator))
        found.append(_by_group(white, micrograph, generator))
    else:
        by_image["defocus"] = _ranked(defocus)
    for what, features in by_image.items():
        found.append(_by_image(what, white, features, generator))
    found = [
        Entangled(one.what, one.share, one.p, _direction(back, one.direction), one.shuffled, len(found))
        for one in found
    ]
    return sorted(found, key=lambda one: (not one.warns, -one.share))


def scaling(maps: Float[Tensor, "c z y x"]) -> tuple[float, tuple[float, ...]]:
    """How much like a change of brightness the change along some direction of latent space is, and that direction.

    ``maps`` are the mean and its changes by each component. The squared cosine of the change that is most like the
    mean: 1 where a latent does nothing but make the molecule brighter.
    """
    return _most_like(maps[1:], maps[:1])


def moving_whole(maps: Float[Tensor, "c z y x"]) -> tuple[float, tuple[float, ...]]:
    """The same for a change of where the whole molecule is and how it is turned: centres and poses that are too wrong
    to be small errors."""
    mean, size = maps[0], maps.shape[-1]
    spectrum = rfft(mean, 3)
    wave = [2 * math.pi * k for k in frequencies(Grid(size, 1.0), 3)[::-1]]  # along x, y, z
    slope = [irfft(1j * k * spectrum, 3) for k in wave]
    axis = torch.arange(size, dtype=mean.dtype) - size // 2
    place = [axis, axis[:, None], axis[:, None, None]]
    turns = [place[a] * slope[b] - place[b] * slope[a] for a, b in ((1, 2), (2, 0), (0, 1))]
    return _most_like(maps[1:], torch.stack([*slope, *turns]))


def _most_like(changes: Float[Tensor, "q z y x"], others: Float[Tensor, "n z y x"]) -> tuple[float, tuple[float, ...]]:
    """The largest squared cosine between sums of changes and sums of others, and the sum of changes that has it."""
    one, other = changes.flatten(1).double(), others.flatten(1).double()
    across = one @ other.T
    within, known = one @ one.T, other @ other.T
    within = within + 1e-9 * within.trace() * torch.eye(len(one), dtype=within.dtype)
    told = across @ torch.linalg.lstsq(known, across.T, driver="gelsd").solution
    root = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(root, told, upper=False)
    value, vector = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    direction = torch.linalg.solve(root.T, vector[:, -1])
    direction = direction / torch.linalg.vector_norm(direction).clamp(min=1e-30)
    return min(1.0, float(value[-1])), tuple(direction.tolist())


def _whitened(latent: Float[Tensor, "v q"]) -> tuple[Float[Tensor, "v q"], Float[Tensor, "q q"]]:
    """Latents with mean 0 and covariance 1, and the matrix that makes directions of theirs directions of the old."""
    centred = latent - latent.mean(0)
    value, vector = torch.linalg.eigh(centred.T @ centred / len(centred))
    root = vector * value.clamp(min=1e-12 * float(value.max())).rsqrt()
    return centred @ root, root


def _direction(root: Float[Tensor, "q q"], own: tuple[float, ...]) -> tuple[float, ...]:
    """Of a direction of whitened latents: how the old latents move when they go along it."""
    moved = torch.linalg.inv(root).T @ torch.tensor(own, dtype=root.dtype)
    return tuple((moved / torch.linalg.vector_norm(moved)).tolist())


def _by_image(what: str, white: Tensor, features: Float[Tensor, "v k"], generator: torch.Generator) -> Entangled:
    basis = _orthonormal(features, torch.ones(len(features), dtype=features.dtype))

    def explained(order: Tensor | None) -> Tensor:
        inner = basis.T @ (white if order is None else white[order])
        return inner.T @ inner / len(white)

    return _judged(what, explained, len(white), "images", generator)


def _by_unit(
    what: str, total: Float[Tensor, "u q"], count: Tensor, features: Tensor, views: int, generator: torch.Generator
) -> Entangled:
    """``total`` are the sums of the latents of each micrograph, ``features`` what these have; they are shuffled."""

    def explained(order: Tensor | None) -> Tensor:
        inner = _orthonormal(features if order is None else features[order], count).T @ total
        return inner.T @ inner / views

    return _judged(what, explained, len(total), "micrographs", generator)


def _by_group(white: Tensor, group: Int[Tensor, " v"], generator: torch.Generator) -> Entangled:
    units = int(group.max()) + 1

    def explained(order: Tensor | None) -> Tensor:
        total, count = _sums(white if order is None else white[order], group, units)
        return total.T @ (total / count[:, None]) / len(white)

    return _judged("micrograph", explained, len(white), "images", generator)


def _sums(values: Float[Tensor, "v k"], unit: Int[Tensor, " v"], units: int) -> tuple[Tensor, Tensor]:
    """Sums over units, and how many they are of."""
    total = torch.zeros(units, values.shape[1], dtype=values.dtype).index_add_(0, unit, values)
    return total, torch.bincount(unit, minlength=units).to(values)


def _judged(
    what: str, explained: Callable[[Tensor | None], Tensor], count: int, shuffled: str, generator: torch.Generator
) -> Entangled:
    """``explained`` is the covariance of whitened latents that their means explain, in an order of what is shuffled."""
    value, vector = torch.linalg.eigh(explained(None))
    chance = torch.stack(
        [torch.linalg.eigvalsh(explained(torch.randperm(count, generator=generator)))[-1] for _ in range(SHUFFLES)]
    )
    share = float((value[-1] - chance.mean()) / (1 - chance.mean()))
    p = (1 + int((chance >= value[-1]).sum())) / (1 + SHUFFLES)
    return Entangled(what, max(0.0, share), p, tuple(vector[:, -1].tolist()), shuffled)


def _orthonormal(features: Float[Tensor, "u k"], weight: Float[Tensor, " u"]) -> Float[Tensor, "u k"]:
    """Functions of mean 0 with FᵀWF = 1, so that |Fᵀ Σ z|² is what they explain of the sums Σ z of units."""
    centred = features - (weight @ features) / weight.sum()
    value, vector = torch.linalg.eigh(centred.T @ (weight[:, None] * centred))
    kept = value > 1e-9 * value.max().clamp(min=1e-30)
    basis: Tensor = centred @ (vector[:, kept] * value[kept].rsqrt())
    return basis


def _ranked(values: Float[Tensor, " v"]) -> Float[Tensor, "v 3"]:
    """Polynomials in the rank, from -1 to 1; equal values have one rank."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count + 1) / 2)[place].double()
    x = 2 * rank / max(1, len(values) - 1) - 1
    return torch.stack([x, x**2, x**3], 1)


def _harmonics(direction: Float[Tensor, "v 3"]) -> Float[Tensor, "v 15"]:
    """What spans the spherical harmonics of degrees 1 to 3."""
    x, y, z = direction.unbind(1)
    second = [x * y, x * z, y * z, x**2 - y**2, 3 * z**2 - 1]
    third = [z * (5 * z**2 - 3), x * (5 * z**2 - 1), y * (5 * z**2 - 1), z * (x**2 - y**2), x * y * z]
    third += [x * (x**2 - 3 * y**2), y * (3 * x**2 - y**2)]
    return torch.stack([x, y, z, *second, *third], 1)


def describe(found: Entangled) -> str:
    """One sentence."""
    chance = f"p {'<' if found.p <= 1 / (1 + SHUFFLES) else '='} {max(found.p, 1 / SHUFFLES):.2g}"
    return (
        f"{found.what}: explains {found.share:.1%} of the variance of latents (most along z{found.component}; {chance} "
        f"of {SHUFFLES} shuffles of {found.shuffled})"
    )


def remedy(found: Entangled) -> str:
    """What a warning says."""
    return f"latents follow the images and not the molecule alone: {describe(found)}; {_REMEDIES[found.what]}"


_REMEDIES = {
    "viewing direction": "poses or the consensus may be wrong for some views; look at states from the direction that "
    "they were seen from least",
    "angle in the image": "shifts, magnification or beam tilt may be off; refine these first",
    "defocus": "refine the CTF, and compare states from images of one defocus",
    "grey scale of micrographs": "normalise the images, or correct their scale per micrograph (relion_refine --scale)",
    "micrograph": "ice or treatment may differ from micrograph to micrograph; look which ones a state comes from",
}


def brightness(subspace: Subspace, spectra: AnySpectra) -> Float[Tensor, " v"]:
    """How bright each view is, relative to what the mean map would show; of those of all processes."""
    products = subspace.lattice.products(subspace.maps[:1], spectra).double()
    return spectra.portion.whole(products[:, 0, 1] / products[:, 1, 1].clamp(min=1e-30))
