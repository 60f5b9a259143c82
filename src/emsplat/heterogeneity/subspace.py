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

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.heterogeneity.lattice import Lattice
from emsplat.heterogeneity.spectra import Spectra
from emsplat.maths.fourier import hermitian_weight, irfft, rfft, shell_index
from emsplat.sums.equations import kernel_size

_START = 0.1  # power of a new component, relative to the mean map
_DEAD = 1e-3  # below this share of the strongest component's power another one is put in its place
_SEED_AMPLITUDE, _SEED_POWER = 0.02, 0.1  # of a component that is put there
_LEAST_DETERMINED, _NOTHING = 1e-2, 1e-12


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
class Subspace:
    """The mean map and its components on a lattice, with their power per shell."""

    lattice: Lattice
    maps: Float[Tensor, "c z y x"]  # V0, U_1, ..., U_q
    power: Float[Tensor, "c s"]  # prior variance of a Fourier coefficient, shells 0 ... radius

    @property
    def components(self) -> int:
        return len(self.maps) - 1

    def on(self, lattice: Lattice) -> Subspace:
        """The same maps on a larger lattice; beyond the old radius components have the power of its last shell."""
        size, old = lattice.size, self.lattice.size
        spectrum = rfft(self.maps, 3)
        wide = torch.zeros(len(self.maps), size, size, size // 2 + 1, dtype=spectrum.dtype)
        reach = old // 2
        places = torch.arange(-reach + 1, reach)
        wide[:, (places % size)[:, None, None], (places % size)[:, None], places[places >= 0]] = spectrum[
            :, (places % old)[:, None, None], (places % old)[:, None], places[places >= 0]
        ]
        power = torch.cat([self.power, self.power[:, -1:].expand(-1, lattice.radius - self.lattice.radius)], 1)
        return Subspace(lattice, irfft(wide, 3), power)


def infer(subspace: Subspace, spectra: Spectra) -> Latents:
    """The E step: posteriors of all views."""
    products = subspace.lattice.products(subspace.maps, spectra).double()
    residual = products[:, 2:, 0] - products[:, 2:, 1]
    return posterior(2 * residual, 2 * products[:, 2:, 2:])


def posterior(linear: Float[Tensor, "v q"], quadratic: Float[Tensor, "v q q"]) -> Latents:
    """Posteriors under z ~ N(0, 1)."""
    precision = quadratic + torch.eye(linear.shape[1], dtype=linear.dtype)
    root = torch.linalg.cholesky(precision)
    covariance = torch.cholesky_inverse(root)
    mean = (covariance @ linear[..., None]).squeeze(-1)
    determinant = 2 * torch.log(torch.diagonal(root, dim1=-2, dim2=-1)).sum(-1)
    gain = 0.5 * (linear * mean).sum(-1) - 0.5 * determinant
    return Latents(mean, covariance, linear, quadratic, gain)


@dataclass(frozen=True)
class _Equations:
    """Per Fourier coefficient within the radius: Σ ⟨z̃_j⟩ c y and Σ ⟨z̃_j z̃_k⟩ c² around it."""

    linear: Float[Tensor, "k c 2"]
    quadratic: Float[Tensor, "k c c"]


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
        self.support = ball(size) if support is None else support

    def per_shell(self, values: Float[Tensor, "k *c"]) -> Float[Tensor, "s *c"]:
        """Means over shells."""
        weight = self.weight.reshape(-1, *[1] * (values.dim() - 1))
        total = values.new_zeros(len(self.count), *values.shape[1:]).double()
        total.index_add_(0, self.shells, values.double() * weight)
        return total / self.count.reshape(-1, *[1] * (values.dim() - 1))

    def coefficients(self, maps: Float[Tensor, "c z y x"]) -> Float[Tensor, "k c 2"]:
        return torch.view_as_real(rfft(maps, 3)[:, self.inside].T.contiguous())

    def maps(self, coefficients: Float[Tensor, "k c 2"]) -> Float[Tensor, "c z y x"]:
        """Real maps within the support."""
        size = self.lattice.size
        spectrum = torch.zeros(coefficients.shape[1], size, size, size // 2 + 1, dtype=torch.complex64)
        spectrum[:, self.inside] = torch.view_as_complex(coefficients.float().contiguous()).T
        return irfft(spectrum, 3) * self.support

    def filtered(self, maps: Float[Tensor, "c z y x"]) -> Float[Tensor, "c z y x"]:
        """Maps without what lies beyond the radius."""
        spectrum = rfft(maps, 3)
        return irfft(spectrum * self.inside, 3)


def ball(size: int, diameter: float = 0.9, edge: float = 0.06) -> Float[Tensor, "z y x"]:
    """A sphere with a soft edge in the middle of a box; lengths are fractions of the box."""
    axis = (torch.arange(size) - size // 2) / size
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    return 0.5 + 0.5 * torch.cos(math.pi * ((radius - diameter / 2) / edge + 0.5).clamp(0, 1))


def _equations(space: Space, spectra: Spectra, mean: Tensor, second: Tensor) -> _Equations:
    """``mean`` is ⟨z̃⟩ and ``second`` ⟨z̃ z̃ᵀ⟩ of each view, z̃ = (1, z)."""
    size, count = space.lattice.size, mean.shape[1]
    upper = torch.triu_indices(count, count)
    share = spectra.share[:, None]
    linear, kernels = space.lattice.insert(mean.float() * share, second[:, upper[0], upper[1]].float() * share, spectra)
    quadratic = torch.empty(len(space.shells), count, count)
    for number, kernel in enumerate(kernels):
        j, k = upper[:, number].tolist()
        quadratic[:, j, k] = quadratic[:, k, j] = _weight(kernel, size)[space.inside] / size**3
    return _Equations(space.coefficients(linear) / size**3, quadratic)


def _weight(kernel: Float[Tensor, "w v u"], size: int) -> Float[Tensor, "z y k"]:
    """The circulant matrix nearest to a convolution (`NormalEquations.weight`), of either sign."""
    length = kernel_size(size)
    axis = torch.arange(length) - length // 2
    taper = (1 - axis.abs() / (length // 2)).clamp(min=0)
    tapered = kernel * taper[:, None, None] * taper[:, None] * taper
    for dim in range(3):
        shape = list(tapered.shape)
        shape[dim] = size
        tapered = tapered.new_zeros(shape).index_add_(dim, axis % size, tapered)
    spectrum: Tensor = torch.fft.rfftn(tapered).real
    return spectrum


def _solve(space: Space, equations: _Equations, power: Float[Tensor, "c s"]) -> tuple[Tensor, Tensor]:
    """Posterior mean of the maps' coefficients and its covariance."""
    count = len(power)
    prior = (1 / power.clamp(min=1e-30)).T[space.shells].double()
    matrix = equations.quadratic.double() + torch.diag_embed(prior)
    # Tapering keeps the matrix positive; rounding may not where a component is all but gone.
    scale = 1 / torch.diagonal(matrix, dim1=1, dim2=2).sqrt()
    matrix = matrix * scale[:, :, None] * scale[:, None, :] + 1e-6 * torch.eye(count, dtype=torch.float64)
    root = torch.linalg.cholesky(matrix)
    solution = torch.cholesky_solve(equations.linear.double() * scale[:, :, None], root) * scale[:, :, None]
    covariance = torch.cholesky_inverse(root) * scale[:, :, None] * scale[:, None, :]
    return solution, covariance


def maximise(space: Space, spectra: Spectra, power: Float[Tensor, "c s"], latents: Latents | None) -> Subspace:
    """The M step: mean and components from the posteriors, with the prior's power estimated anew, latents made standard
    normal, and components orthogonal.

    The power is that of the solution over the share of it that the data determine (MacKay 1992). Components that the
    data do not support vanish in a few steps, where the plain EM update takes hundreds.
    """
    views = len(spectra)
    own = torch.zeros(views, 0, dtype=torch.float64) if latents is None else latents.mean
    mean = torch.cat([torch.ones(views, 1, dtype=torch.float64), own], 1)
    second = mean[:, :, None] * mean[:, None]
    if latents is not None:
        second[:, 1:, 1:] += latents.covariance
    coefficients, covariance = _solve(space, _equations(space, spectra, mean, second), power)
    variance = space.per_shell(torch.diagonal(covariance, dim1=1, dim2=2))
    determined = (1 - variance / power.T.double().clamp(min=1e-30)).clamp(min=_LEAST_DETERMINED)
    found = space.per_shell(coefficients.square().sum(2)) / determined
    turn = _standardised(second, spectra.share)
    turn = turn @ _principal(torch.einsum("czyx,cd->dzyx", space.maps(coefficients), turn.float()))
    maps = space.maps(torch.einsum("kcr,cd->kdr", coefficients, turn))
    return Subspace(space.lattice, maps, (found @ turn.square()).T.float().clamp(min=_NOTHING))


def _standardised(second: Float[Tensor, "v c c"], share: Float[Tensor, " v"]) -> Float[Tensor, "c c"]:
    """How (V0, U) change so that the latents have mean 0 and covariance 1 over all views."""
    weight = share.double() / share.double().sum()
    moments = torch.einsum("v,vab->ab", weight, second)
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


def consensus(space: Space, spectra: Spectra, steps: int = 3) -> Subspace:
    """The mean map alone."""
    power = torch.full((1, space.lattice.radius + 1), torch.inf)
    for _ in range(steps):
        found = maximise(space, spectra, power, None)
        power = found.power
    return found


def begin(space: Space, spectra: Spectra, components: int, generator: torch.Generator) -> tuple[Tensor, Latents]:
    """Random latents, and the power of mean and components to go with them."""
    power = consensus(space, spectra).power
    drawn = torch.randn(len(spectra), components, generator=generator, dtype=torch.float64)
    none = torch.zeros(len(spectra), components, components, dtype=torch.float64)
    latents = Latents(drawn, none, drawn, none, torch.zeros(len(spectra)))
    return torch.cat([power, _START * power.expand(components, -1)]), latents


def reseeded(subspace: Subspace, space: Space, generator: torch.Generator) -> Subspace:
    """Weak components replaced by faint noise, so that a larger radius may find what a smaller one could not see."""
    strength = subspace.maps[1:].square().sum((1, 2, 3))
    dead = (strength < _DEAD * strength.max()).nonzero()[:, 0] + 1
    if not len(dead) or not float(strength.max()) > 0:
        return subspace
    maps, power = subspace.maps.clone(), subspace.power.clone()
    strongest = power[1:].max(0).values
    noise = torch.randn(len(dead), *maps.shape[1:], generator=generator)
    spectrum = space.coefficients(noise)
    shape = (strongest / space.per_shell(spectrum.square().sum(2)).mean(1).float()).sqrt()
    maps[dead] = space.maps(spectrum * (_SEED_AMPLITUDE**0.5 * shape)[space.shells][:, None, None])
    power[dead] = _SEED_POWER * strongest
    return replace(subspace, maps=maps, power=power)


def fit_subspace(
    spectra: Spectra,
    components: int,
    generator: torch.Generator,
    stages: Sequence[tuple[int, int]],
) -> Iterator[Subspace]:
    """Mean and components by EM, low frequencies first, after each iteration: ``stages`` are (radius in cycles per box,
    iterations)."""
    space = Space(Lattice(stages[0][0]))
    power, latents = begin(space, spectra, components, generator)
    subspace = maximise(space, spectra, power, latents)
    for number, (radius, iterations) in enumerate(stages):
        if number:
            space = Space(Lattice(radius))
            subspace = reseeded(_widened(subspace, space, spectra), space, generator)
        for _ in range(iterations):
            subspace = maximise(space, spectra, subspace.power, infer(subspace, spectra))
            yield subspace


def _widened(subspace: Subspace, space: Space, spectra: Spectra) -> Subspace:
    """The maps of a smaller lattice on that of a space, with the power of the mean map known beyond."""
    wide = subspace.on(space.lattice)
    mean = consensus(space, spectra)
    ratio = wide.power[1:] / wide.power[:1].clamp(min=1e-30)
    last = subspace.lattice.radius
    beyond = torch.arange(space.lattice.radius + 1) > last
    power = torch.where(beyond, mean.power * ratio[:, last, None].clamp(max=1), wide.power[1:])
    maps = torch.cat([mean.maps, wide.maps[1:]])
    return Subspace(space.lattice, maps, torch.cat([mean.power, power]))
