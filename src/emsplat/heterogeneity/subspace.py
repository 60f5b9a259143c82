"""The linear stage: a mean map and a few directions in which molecules differ from it, with all images' CTFs and noise.

Probabilistic principal components by variational EM: V_i = V0 + Σ z_ik U_k, z ~ N(0, 1), y_i = c S V_i + n (Tipping &
Bishop 1999; Bishop 1999 for the prior that prunes components; exact CTFs as in Tagare et al. 2015). The E step needs a
few inner products per image (`Lattice.products`), the M step solves per Fourier coefficient for mean and components
together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import map_coordinates
from torch import Tensor

from emsplat.maths.fourier import (
    cropped_volume,
    hermitian_weight,
    irfft,
    padded_spectrum,
    rfft,
    shell_index,
    smooth_size,
    widen,
)
from emsplat.measures.mask import spherical_mask
from emsplat.parallel import ALONE, World
from emsplat.sums.equations import circulant, response_of
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import AnySpectra
from emsplat.types import Grid

_START = 0.1  # power of a new component, relative to the mean map
_DEAD = 1e-6  # share of the mean map's power below which a component has vanished
_SEED_AMPLITUDE, _SEED_POWER = 0.02, 0.1  # of a component that is put there
_CORRECTIONS = 2
_MOST_BRIGHTNESS, _MOST_TURN = 0.5**2, 0.06**2  # beyond, first order is no approximation
_PATIENCE = 3  # iterations at each radius before components are pruned
_LEAST_DETERMINED, _NOTHING = 1e-2, 1e-12
_ROUNDING = 1e-6
_SPHERE, _EDGE = 0.9, 0.06  # of the box: its diameter at half height, and how far the edge goes


@dataclass(frozen=True)
class Latents:
    """Posterior of each view, and what the data say of its latents: log p(y|z) - log p(y|0) = b·z - zᵀA z/2."""

    mean: Float[Tensor, "v q"]
    covariance: Float[Tensor, "v q q"]
    linear: Float[Tensor, "v q"]  # b
    quadratic: Float[Tensor, "v q q"]  # A
    gain: Float[Tensor, " v"]  # log evidence over that of the mean map alone, nats

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Placement:
    """How far images may be from where and how bright they are said to be: variances of what every view has besides its
    latents. They are estimated, so that wrong poses and grey scales are not taken for states."""

    brightness: float = 0.05**2
    turn: float = 0.02**2  # rad², about each axis
    shift: float = 0.01**2  # (box / 2π)²

    def variances(self) -> Float[Tensor, " n"]:
        """Of brightness, three turns and two shifts, in the order of `Lattice.products`."""
        values = [self.brightness, *[self.turn] * 3, *[self.shift] * 2]
        return torch.tensor(values, dtype=torch.float64).clamp(min=_NOTHING)


@dataclass(frozen=True)
class Subspace:
    """The mean map and its components on a lattice, with their power per shell."""

    lattice: Lattice
    maps: Float[Tensor, "c z y x"]  # V0, U_1, ..., U_q
    power: Float[Tensor, "c s"]  # prior variance of a Fourier coefficient, shells 0 ... radius
    placement: Placement = Placement()

    @property
    def components(self) -> int:
        return len(self.maps) - 1

    def on(self, lattice: Lattice) -> Subspace:
        """The same maps on a larger lattice; beyond the old radius components have the power of its last shell."""
        power = torch.cat([self.power, self.power[:, -1:].expand(-1, lattice.radius - self.lattice.radius)], 1)
        return replace(self, lattice=lattice, maps=irfft(widen(rfft(self.maps, 3), lattice.size), 3), power=power)


@dataclass(frozen=True)
class _Seen:
    """What the images say of everything that a view has: log p(y|x) - log p(y|0) = b·x - xᵀA x/2, x being the errors of
    brightness and pose (six), then the latents."""

    linear: Float[Tensor, "v n"]
    quadratic: Float[Tensor, "v n n"]

    def latents(self, placement: Placement) -> Latents:
        """Posteriors of the latents, brightness and pose integrated out."""
        linear, quadratic = self.linear, self.quadratic
        root = _root_of(quadratic[:, :6, :6] + torch.diag(1 / placement.variances()))
        known = torch.cholesky_solve(torch.cat([linear[:, :6, None], quadratic[:, :6, 6:]], 2), root)
        across = quadratic[:, 6:, :6]
        return posterior(
            linear[:, 6:] - (across @ known[:, :, :1]).squeeze(-1), quadratic[:, 6:, 6:] - across @ known[:, :, 1:]
        )

    def placement(self, before: Placement, latents: Latents, spectra: AnySpectra) -> Placement:
        """The variances that the posteriors of brightness and pose say (one EM step)."""
        precision = self.quadratic[:, :6, :6] + torch.diag(1 / before.variances())
        across = self.quadratic[:, :6, 6:]
        covariance = torch.linalg.inv(precision)
        mean = covariance @ (self.linear[:, :6, None] - across @ latents.mean[..., None])
        moved = covariance @ across
        spread = torch.diagonal(covariance + moved @ latents.covariance @ moved.mT, dim1=1, dim2=2)
        second = _weight(spectra) @ (mean.squeeze(-1).square() + spread)
        spectra.portion.world.sum_(second)
        brightness, turn, shift = float(second[0]), float(second[1:4].mean()), float(second[4:6].mean())
        return Placement(min(brightness, _MOST_BRIGHTNESS), min(turn, _MOST_TURN), shift)


def _weight(spectra: AnySpectra) -> Float[Tensor, " v"]:
    """Of views among those of all processes; adds up to 1."""
    return spectra.share.double() / (_images(spectra) * spectra.copies)


def _images(spectra: AnySpectra) -> float:
    """How many images all processes have, shares of one being one."""
    total = spectra.share.double().sum()[None]
    spectra.portion.world.sum_(total)
    return float(total) / spectra.copies


def _look(subspace: Subspace, spectra: AnySpectra) -> _Seen:
    products = 2 * subspace.lattice.products(subspace.maps, spectra, with_pose=True).double()
    return _Seen(products[:, 1:, 0] - products[:, 1:, 1], products[:, 1:, 1:])


def infer(subspace: Subspace, spectra: AnySpectra) -> Latents:
    """The E step: posteriors of all views.

    Brightness and pose of each view are integrated out, to first order in their errors: b and A are those of the data
    with the six derivatives of the mean map's image projected out as far as `Placement` allows.
    """
    return _look(subspace, spectra).latents(subspace.placement)


def _root_of(matrix: Float[Tensor, "n c c"]) -> Float[Tensor, "n c c"]:
    """Cholesky factors of matrices that are positive but for the rounding of single precision."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrix)
    if (bad := failed > 0).any():
        value, vector = torch.linalg.eigh(matrix[bad])
        value = torch.maximum(value, _ROUNDING * value[:, -1:])
        root[bad] = torch.linalg.cholesky(vector @ (value[:, :, None] * vector.mT))
    return root


def posterior(linear: Float[Tensor, "v q"], quadratic: Float[Tensor, "v q q"]) -> Latents:
    """Posteriors under z ~ N(0, 1)."""
    precision = quadratic + torch.eye(linear.shape[1], dtype=linear.dtype)
    root = _root_of(precision)
    covariance = torch.cholesky_inverse(root)
    mean = (covariance @ linear[..., None]).squeeze(-1)
    determinant = 2 * torch.log(torch.diagonal(root, dim1=-2, dim2=-1)).sum(-1)
    gain = 0.5 * (linear * mean).sum(-1) - 0.5 * determinant
    return Latents(mean, covariance, linear, quadratic, gain)


@dataclass(frozen=True)
class _Equations:
    """The data as a quadratic form of mean and components: b = Σ ⟨z̃_j⟩ Sᵀ c y as maps, and the convolutions
    K = Σ ⟨z̃_j z̃_k⟩ Sᵀ c² S (the upper triangle) as responses on a padded grid."""

    linear: Float[Tensor, "c z y x"]
    response: Float[Tensor, "t w v u"]
    quadratic: Float[Tensor, "k c c"]  # the circulant matrix nearest to K, per coefficient within the radius

    def misfit(self, maps: Float[Tensor, "c z y x"]) -> Float[Tensor, "c z y x"]:
        """b - K V."""
        count, size, side = len(maps), maps.shape[-1], self.response.shape[1]
        spectrum = padded_spectrum(maps, side)
        applied = torch.zeros_like(spectrum)
        for (j, k), response in zip(torch.triu_indices(count, count).T.tolist(), self.response, strict=True):
            applied[j] += response * spectrum[k]
            if j != k:
                applied[k] += response * spectrum[j]
        return self.linear - cropped_volume(applied, size)


class Space:
    """Where maps of a lattice live: the coefficients within the radius, their shells, and a support."""

    def __init__(self, lattice: Lattice, support: Float[Tensor, "z y x"] | None = None) -> None:
        self.lattice = lattice
        size = lattice.size
        shells = shell_index(size, 3)
        self.inside = shells <= lattice.radius
        self.shells = shells[self.inside]
        self.weight = hermitian_weight(size).expand(size, size, -1)[self.inside].double()
        self.count = torch.zeros(lattice.radius + 1, dtype=torch.float64).index_add_(0, self.shells, self.weight)
        self.sphere = sphere(size)
        self.support = self.sphere if support is None else self.sphere * support

    def per_shell(self, values: Float[Tensor, "k *c"]) -> Float[Tensor, "s *c"]:
        """Means over shells."""
        weight = self.weight.reshape(-1, *[1] * (values.dim() - 1))
        total = values.new_zeros(len(self.count), *values.shape[1:]).double()
        total.index_add_(0, self.shells, values.double() * weight)
        return total / self.count.reshape(-1, *[1] * (values.dim() - 1))

    def coefficients(self, maps: Float[Tensor, "c z y x"]) -> Float[Tensor, "k c 2"]:
        return torch.view_as_real(rfft(maps, 3)[:, self.inside].T.contiguous())

    def maps(self, coefficients: Float[Tensor, "k c 2"]) -> Float[Tensor, "c z y x"]:
        """Real maps: the first, the mean, in the sphere, components within the support."""
        size = self.lattice.size
        spectrum = torch.zeros(coefficients.shape[1], size, size, size // 2 + 1, dtype=torch.complex64)
        spectrum[:, self.inside] = torch.view_as_complex(coefficients.float().contiguous()).T
        maps = irfft(spectrum, 3)
        return torch.cat([maps[:1] * self.sphere, maps[1:] * self.support])


def sphere(size: int) -> Float[Tensor, "z y x"]:
    """The sphere that molecules lie in, in the middle of a box."""
    return spherical_mask(Grid(size, 1 / size), _SPHERE - _EDGE, _EDGE)


def _sums(space: Space, spectra: AnySpectra, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """b, and the kernels of K, over the images of all processes; ``mean`` is ⟨z̃⟩ and ``second`` ⟨z̃ z̃ᵀ⟩ of each view,
    z̃ = (1, z)."""
    upper, share = torch.triu_indices(mean.shape[1], mean.shape[1]), spectra.share[:, None]
    linear, kernels = space.lattice.insert(mean.float() * share, second[:, upper[0], upper[1]].float() * share, spectra)
    spectra.portion.world.sum_(linear, kernels)
    return linear, kernels


def _equations(space: Space, linear: Float[Tensor, "c z y x"], kernels: Float[Tensor, "t w v u"]) -> _Equations:
    size, count = space.lattice.size, len(linear)
    upper = torch.triu_indices(count, count)
    quadratic = torch.empty(len(space.shells), count, count)
    responses = []
    for number, kernel in enumerate(kernels):
        j, k = upper[:, number].tolist()
        quadratic[:, j, k] = quadratic[:, k, j] = circulant(kernel, size)[space.inside] / size**3
        responses.append(response_of(kernel, smooth_size(2 * len(kernel))))
    return _Equations(linear, torch.stack(responses), quadratic)


def _solve(space: Space, equations: _Equations, power: Float[Tensor, "c s"]) -> tuple[Tensor, Tensor]:
    """Posterior mean of the maps' coefficients and its covariance.

    The circulant matrix gives both; what its mean then leaves of b - K V is solved for again (within the support): it
    errs by some percent where the density of views changes from one coefficient to the next.
    """
    voxels = space.lattice.size**3
    prior = (1 / power.clamp(min=1e-30)).T[space.shells].double()
    root, scale = _factors(equations.quadratic.double(), prior)

    def solved(linear: Float[Tensor, "k c 2"]) -> Float[Tensor, "k c 2"]:
        return torch.cholesky_solve(linear.double() * scale[:, :, None], root) * scale[:, :, None]

    solution = before = solved(space.coefficients(equations.linear) / voxels)
    left = math.inf
    for _ in range(_CORRECTIONS):
        maps = space.maps(solution)
        solution = space.coefficients(maps).double()
        rest = space.coefficients(equations.misfit(maps)) / voxels - prior[:, :, None] * solution
        correction = solved(rest)
        if (now := float((rest * correction).sum())) > left:  # the views are too few: the circulant matrix is far off
            solution = before
            break
        left, before, solution = now, solution, solution + correction
    covariance = torch.cholesky_inverse(root) * scale[:, :, None] * scale[:, None, :]
    return solution, covariance


def _factors(quadratic: Float[Tensor, "k c c"], prior: Float[Tensor, "k c"]) -> tuple[Tensor, Tensor]:
    """Cholesky factors of quadratic + prior in units in which the diagonal is 1, and one over these units."""

    def tried(quadratic: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        matrix = quadratic + torch.diag_embed(prior)
        scale = 1 / torch.diagonal(matrix, dim1=1, dim2=2).sqrt()
        # Tapering keeps the matrix positive; rounding may not where a component is all but gone.
        unit = matrix * scale[:, :, None] * scale[:, None, :] + 1e-6 * torch.eye(prior.shape[1], dtype=torch.float64)
        root, failed = torch.linalg.cholesky_ex(unit)
        return root, scale, (failed > 0) | ~scale.isfinite().all(1)

    root, scale, failed = tried(quadratic, prior)
    if failed.any():
        # Few views: lags beyond `REACH` that would make it positive are missing.
        value, vector = torch.linalg.eigh(quadratic[failed])
        least = _ROUNDING * float(quadratic.diagonal(dim1=1, dim2=2).max())
        positive = vector @ (value.clamp(min=least)[:, :, None] * vector.mT)
        root[failed], scale[failed], _ = tried(positive, prior[failed])
    return root, scale


def maximise(
    space: Space,
    spectra: AnySpectra,
    power: Float[Tensor, "c s"],
    latents: Latents | None,
    *,
    pruning: bool = True,
) -> Subspace:
    """The M step: mean and components from the posteriors, with the prior's power estimated anew, latents made standard
    normal, and components orthogonal.

    The power is that of the solution over the share of it that the data determine (MacKay 1992). Components that the
    data do not support vanish in a few steps, where the EM update (without ``pruning``) takes hundreds. Components that
    have just been drawn at random need that patience.

    Of several processes the first solves for the maps.
    """
    views, world = len(spectra), spectra.portion.world
    own = torch.zeros(views, 0, dtype=torch.float64) if latents is None else latents.mean
    mean = torch.cat([torch.ones(views, 1, dtype=torch.float64), own], 1)
    second = mean[:, :, None] * mean[:, None]
    if latents is not None:
        second[:, 1:, 1:] += latents.covariance
    moments, (linear, kernels) = _moments(second, spectra), _sums(space, spectra, mean, second)
    found = Subspace(space.lattice, torch.empty_like(linear), torch.empty_like(power))
    if world.first:
        found = _solved(space, _equations(space, linear, kernels), power, moments, pruning=pruning)
    world.spread_(found.maps, found.power)
    return found


def _solved(
    space: Space, equations: _Equations, power: Float[Tensor, "c s"], moments: Float[Tensor, "c c"], *, pruning: bool
) -> Subspace:
    """`maximise` from the sums over all images."""
    coefficients, covariance = _solve(space, equations, power)
    variance = space.per_shell(torch.diagonal(covariance, dim1=1, dim2=2))
    found = space.per_shell(coefficients.square().sum(2))
    if pruning:
        found = found / (1 - variance / power.T.double().clamp(min=1e-30)).clamp(min=_LEAST_DETERMINED)
    else:
        found = found + variance
    turn = _standardised(moments)
    turn = turn @ _principal(torch.einsum("czyx,cd->dzyx", space.maps(coefficients), turn.float()))
    maps = space.maps(torch.einsum("kcr,cd->kdr", coefficients, turn))
    return Subspace(space.lattice, maps, (found @ turn.square()).T.float().clamp(min=_NOTHING).contiguous())


def _moments(second: Float[Tensor, "v c c"], spectra: AnySpectra) -> Float[Tensor, "c c"]:
    """The mean of ⟨z̃ z̃ᵀ⟩ over all views."""
    moments = torch.einsum("v,vab->ab", _weight(spectra), second).contiguous()
    spectra.portion.world.sum_(moments)
    return moments


def _standardised(moments: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """How (V0, U) change so that the latents have mean 0 and covariance 1 over all views."""
    mean = moments[0, 1:]
    covariance = moments[1:, 1:] - mean[:, None] * mean
    turn = torch.eye(len(moments), dtype=torch.float64)
    turn[1:, 0] = mean
    if len(mean):
        turn[1:, 1:] = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(len(mean)))
    return turn


def _principal(maps: Float[Tensor, "c z y x"]) -> Float[Tensor, "c c"]:
    """The rotation that makes components orthogonal, the strongest first."""
    flat = maps[1:].flatten(1).double()
    turn = torch.eye(len(maps), dtype=torch.float64)
    if len(flat):
        turn[1:, 1:] = torch.linalg.eigh(flat @ flat.T)[1].flip(1)
    return turn


def consensus(space: Space, spectra: AnySpectra, steps: int = 3) -> Subspace:
    """The mean map alone."""
    power = torch.full((1, space.lattice.radius + 1), torch.inf)
    for _ in range(steps):
        found = maximise(space, spectra, power, None)
        power = found.power
    return found


def begin(space: Space, spectra: AnySpectra, components: int, generator: torch.Generator) -> Subspace:
    """Mean and components that random latents give."""
    power = consensus(space, spectra).power
    views = spectra.portion.total(len(spectra))
    drawn = spectra.portion.of(torch.randn(views, components, generator=generator, dtype=torch.float64))
    none = torch.zeros(len(spectra), components, components, dtype=torch.float64)
    latents = Latents(drawn, none, drawn, none, torch.zeros(len(spectra)))
    return maximise(space, spectra, torch.cat([power, _START * power.expand(components, -1)]), latents, pruning=False)


def alive(subspace: Subspace, world: World = ALONE) -> Subspace:
    """Without components that have vanished, as the first process of a ``world`` finds."""
    strength = subspace.maps.square().sum((1, 2, 3))
    kept = (strength > _DEAD * strength[0]).to(torch.uint8)
    kept[0] = 1
    world.spread_(kept)
    kept = kept.bool()
    return replace(subspace, maps=subspace.maps[kept], power=subspace.power[kept])


def reseeded(subspace: Subspace, space: Space, components: int, generator: torch.Generator) -> Subspace:
    """With faint noise for the components that have vanished, so that a larger radius may find what a smaller one could
    not see."""
    missing = components - subspace.components
    strongest = subspace.power[1:].max(0).values
    noise = torch.randn(missing + 1, *subspace.maps.shape[1:], generator=generator)
    spectrum = space.coefficients(noise)
    shape = (strongest / space.per_shell(spectrum.square().sum(2)).mean(1).float()).sqrt()
    seeds = space.maps(spectrum * (_SEED_AMPLITUDE**0.5 * shape)[space.shells][:, None, None])[1:]
    power = torch.cat([subspace.power, _SEED_POWER * strongest.expand(missing, -1)])
    return replace(subspace, maps=torch.cat([subspace.maps, seeds]), power=power)


@dataclass(frozen=True)
class SubspaceStage:
    """So many iterations at a radius, in cycles per box; over at most so many ``images`` of a half-set, which are drawn
    at random, or over all. Rows of one image count as one."""

    radius: int
    iterations: int
    images: int | None = None


def fit_subspace(
    spectra: AnySpectra,
    components: int,
    generator: torch.Generator,
    stages: Sequence[SubspaceStage],
    support: Float[Tensor, "z y x"] | None = None,
) -> Iterator[Subspace]:
    """Mean and components by EM, low frequencies first, after each iteration. Components lie within ``support``, a mask
    of the box at any sampling; those that the images do not support vanish.
    """
    subspace: Subspace | None = None
    images = _images(spectra)
    for stage in stages:
        space, views = space_of(stage.radius, support), spectra
        if stage.images is not None and stage.images < images:
            views = spectra.sample(stage.images / images, generator)
        if subspace is None or not subspace.components:
            placement = Placement() if subspace is None else subspace.placement
            subspace = replace(begin(space, views, components, generator), placement=placement)
        else:
            subspace = reseeded(_widened(subspace, space, views), space, components, generator)
        for iteration in range(stage.iterations):
            seen = _look(subspace, views)
            latents = seen.latents(subspace.placement)
            placement = seen.placement(subspace.placement, latents, views)
            found = maximise(space, views, subspace.power, latents, pruning=iteration >= _PATIENCE)
            subspace = replace(alive(found, views.portion.world), placement=placement)
            yield subspace


def space_of(radius: int, support: Float[Tensor, "z y x"] | None) -> Space:
    """Where maps of a radius live; the support is brought to their sampling."""
    lattice = Lattice(radius)
    if support is None:
        return Space(lattice)
    size, fine = lattice.size, len(support)
    axis = fine // 2 + (np.arange(size) - size // 2) * fine / size
    places = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    return Space(lattice, torch.from_numpy(map_coordinates(support.numpy(), places, order=1)))


def _widened(subspace: Subspace, space: Space, spectra: AnySpectra) -> Subspace:
    """The maps of a smaller lattice on that of a space, with the power of the mean map known beyond."""
    wide = subspace.on(space.lattice)
    mean = consensus(space, spectra)
    ratio = wide.power[1:] / wide.power[:1].clamp(min=1e-30)
    last = subspace.lattice.radius
    beyond = torch.arange(space.lattice.radius + 1) > last
    power = torch.where(beyond, mean.power * ratio[:, last, None].clamp(max=1), wide.power[1:])
    maps = torch.cat([mean.maps, wide.maps[1:]])
    return Subspace(space.lattice, maps, torch.cat([mean.power, power]), subspace.placement)
