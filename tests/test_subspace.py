"""The linear stage: slices and sums against direct ones, posteriors, planted components, the gain on the other half."""

import math
from dataclasses import replace

import pytest
import torch

from emsplat.heterogeneity.density import Density, fit_density
from emsplat.heterogeneity.evidence import Gain, component_gains, fewest, first_components, mean_gain
from emsplat.heterogeneity.frames import cross_embedding
from emsplat.heterogeneity.search import _judged
from emsplat.heterogeneity.subspace import (
    Latents,
    Space,
    Subspace,
    SubspaceStage,
    consensus,
    fit_subspace,
    infer,
    posterior,
    sphere,
)
from emsplat.maths.geometry import random_rotations
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra, SpectraOfGrids, half_plane


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(size: int, x: float, y: float, z: float, width: float) -> torch.Tensor:
    """A Gaussian of height 1; lengths are fractions of the box."""
    axis = (torch.arange(size) - size // 2) / size
    gap = (axis - x) ** 2 + (axis[:, None] - y) ** 2 + (axis[:, None, None] - z) ** 2
    return torch.exp(-gap / (2 * width**2))


def positions(size: int) -> torch.Tensor:
    axis = (torch.arange(size) - size // 2).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([x, y, z], -1).reshape(-1, 3)


def waves(rotation: torch.Tensor, frequency: torch.Tensor, size: int, lags: int | None = None) -> torch.Tensor:
    """exp(-2πi k x) at every voxel, for every point of every view."""
    k = torch.einsum("vij,ki->vkj", rotation[:, :2].double(), frequency.double()) / size
    return torch.exp(-2j * math.pi * torch.einsum("vkj,xj->vkx", k, positions(lags or size)))


@pytest.fixture(scope="module")
def seen() -> Spectra:
    """Five views of four images of random coefficients."""
    frequency, _ = half_plane(6, 1.0, 32)
    generator = drawn(1)
    rotation = random_rotations(5, generator).float()
    values = torch.randn(4, len(frequency), dtype=torch.complex64, generator=generator)
    transfer = torch.randn(4, len(frequency), generator=generator)
    image = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)
    return Spectra(values, transfer, frequency, image, rotation, torch.ones(5), torch.arange(4), 100.0)


@pytest.fixture(scope="module")
def lattice() -> Lattice:
    return Lattice(6)


@pytest.fixture(scope="module")
def maps(lattice: Lattice) -> torch.Tensor:
    noise = torch.randn(3, *(lattice.size,) * 3, generator=drawn(2))
    return noise * blob(lattice.size, 0, 0, 0, 0.17)


def shown(maps: torch.Tensor, rotation: torch.Tensor, seen: Spectra) -> torch.Tensor:
    phases = waves(rotation, seen.frequency, maps.shape[-1])
    return torch.einsum("vkx,cx->vck", phases, maps.double().reshape(len(maps), -1) + 0j)


def test_every_coefficient_of_a_real_image_once():
    frequency, place = half_plane(5, 1.0, 16)
    image = torch.randn(16, 16, generator=drawn(0))
    spectrum = torch.fft.rfft2(image).flatten()[place]
    axis = torch.arange(16) - 8
    expected = torch.stack([torch.fft.fft2(image)[int(y), int(x)] for x, y in frequency.tolist()])
    assert torch.allclose(spectrum, expected, atol=1e-4)
    full = {(x, y) for x in axis.tolist() for y in axis.tolist() if 0 < x * x + y * y <= 25}
    found = {(int(x), int(y)) for x, y in frequency.tolist()}
    assert found | {(-x, -y) for x, y in found} == full
    assert len(found) * 2 == len(full)
    assert torch.linalg.vector_norm(frequency, dim=1).diff().min() >= -1e-6


def test_slices_of_maps(lattice, maps, seen):
    expected = shown(maps, seen.rotation, seen)
    error = (lattice.slices(maps, seen) - expected).abs().max() / expected.abs().max()
    assert error < 4e-3  # of the window (`emsplat.sums.statistics`)


def test_products_with_images_and_derivatives(lattice, maps, seen):
    """All inner products against columns made by direct sums, derivatives by differences."""
    image = seen.image.long()
    transfer = seen.transfer[image].double()
    step = 1e-5
    slices = shown(maps, seen.rotation, seen)
    columns = [seen.values[image].to(torch.complex128), transfer * slices[:, 0]]
    for axis in range(3):
        generator = torch.zeros(3, 3, dtype=torch.float64)
        generator[(axis + 2) % 3, (axis + 1) % 3] = step
        generator -= generator.T.clone()
        turn = torch.linalg.matrix_exp(generator)
        after = shown(maps[:1], turn @ seen.rotation.double(), seen)
        before = shown(maps[:1], turn.T @ seen.rotation.double(), seen)
        columns.append(transfer * (after - before)[:, 0] / (2 * step))
    columns += [transfer * slices[:, 0] * (-1j * seen.frequency[:, axis]) for axis in range(2)]
    columns += [transfer * slices[:, k] for k in (1, 2)]
    stacked = torch.stack(columns, 1)
    expected = torch.einsum("vak,vbk->vab", stacked.conj(), stacked).real
    length = torch.diagonal(expected, dim1=1, dim2=2).sqrt()
    found = lattice.products(maps, seen, with_pose=True)
    assert ((found - expected).abs() / (length[:, :, None] * length[:, None])).max() < 5e-3
    plain = lattice.products(maps, seen)
    rows = torch.tensor([0, 1, 7, 8])
    assert torch.allclose(plain, found[:, rows][:, :, rows], rtol=1e-4, atol=1e-2)


def test_sums_of_views(lattice, seen):
    """Σ m Sᵀ c y and the kernels of Σ m Sᵀ c² S, against direct sums over all points and their mirrors."""
    first, second = torch.randn(5, 2, generator=drawn(3)), torch.randn(5, 3, generator=drawn(4))
    linear, kernels = lattice.insert(first, second, seen)
    image = seen.image.long()
    values, transfer = seen.values[image].to(torch.complex128), seen.transfer[image].double()
    phases = waves(seen.rotation, seen.frequency, lattice.size).conj()
    expected = 2 * torch.einsum("va,vk,vkx->ax", first.double() + 0j, transfer * values, phases).real
    assert (linear.flatten(1) - expected).abs().max() < 8e-3 * expected.abs().max()
    size = kernels.shape[-1]
    phases = waves(seen.rotation, seen.frequency, lattice.size, size).conj()
    expected = 2 * torch.einsum("va,vk,vkx->ax", second.double() + 0j, transfer.square() + 0j, phases).real
    edge = size // 2 - lattice.size // 2
    inside = slice(edge, edge + lattice.size)  # beyond, lags are faded out
    expected = expected.reshape(-1, size, size, size)[:, size // 2 :]
    difference = (kernels - expected)[:, : lattice.size // 2, inside, inside]
    assert difference.abs().max() < 4e-3 * expected.abs().max()


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_do_not_depend_on_threads(lattice, seen, threads):
    first = torch.randn(5, 2, generator=drawn(3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found, _ = lattice.insert(first, first, seen)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, lattice.insert(first, first, seen)[0])


def test_posterior_is_that_of_the_model():
    """Mean, covariance and evidence against the joint Gaussian of image and latents."""
    generator = drawn(5)
    design = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    image = torch.randn(12, generator=generator, dtype=torch.float64)
    # log p = -|y - Xz|² is noise of variance ½.
    found = posterior((2 * design.T @ image)[None], (2 * design.T @ design)[None])
    marginal = 0.5 * torch.eye(12, dtype=torch.float64) + design @ design.T
    assert torch.allclose(found.mean[0], design.T @ torch.linalg.solve(marginal, image))
    expected = torch.eye(3, dtype=torch.float64) - design.T @ torch.linalg.solve(marginal, design)
    assert torch.allclose(found.covariance[0], expected)
    zero = torch.zeros(12, dtype=torch.float64)
    with_latents = torch.distributions.MultivariateNormal(zero, marginal).log_prob(image)
    without = torch.distributions.MultivariateNormal(zero, 0.5 * torch.eye(12, dtype=torch.float64)).log_prob(image)
    assert float(found.gain[0]) == pytest.approx(float(with_latents - without))


def planted(count: int, amplitude: float, seed: int, noise: float = 1.0) -> tuple[Spectra, torch.Tensor]:
    """Images of a blob with a second one whose density varies, and how much there is of it in each."""
    lattice = Lattice(6)
    mean = 0.15 * blob(lattice.size, 0, 0, 0, 0.1)
    change = 0.15 * amplitude * blob(lattice.size, 0.18, 0.05, -0.1, 0.08)
    frequency, _ = half_plane(6, 1.0, 32)
    generator = drawn(seed)
    rotation = random_rotations(count, generator).float()
    nothing = torch.zeros(count, len(frequency), dtype=torch.complex64)
    transfer = torch.cos(0.02 * (30 + 30 * torch.rand(count, 1, generator=generator)) * frequency.square().sum(1))
    views = torch.arange(count, dtype=torch.int32)
    empty = Spectra(nothing, transfer, frequency, views, rotation, torch.ones(count), torch.arange(count), 100.0)
    slices = lattice.slices(torch.stack([mean, change]), empty)
    latent = torch.randn(count, generator=generator)
    signal = transfer * (slices[:, 0] + latent[:, None] * slices[:, 1])
    values = signal + noise * torch.randn(signal.shape, dtype=torch.complex64, generator=generator)
    return Spectra(values, transfer, frequency, views, rotation, torch.ones(count), torch.arange(count), 100.0), latent


STAGES = (SubspaceStage(4, 12), SubspaceStage(6, 12))


def last(spectra: Spectra, components: int, seed: int):
    return list(fit_subspace(spectra, components, drawn(seed), STAGES))[-1]


def test_a_planted_component_is_found():
    spectra, latent = planted(1500, 0.5, 7)
    subspace = last(spectra, 4, 0)
    found = infer(subspace, spectra)
    assert subspace.components == 1
    correlation = torch.corrcoef(torch.stack([found.mean[:, 0].float(), latent]))[0, 1].abs()
    assert correlation > 0.9
    change = blob(subspace.lattice.size, 0.18, 0.05, -0.1, 0.08).flatten()
    likeness = torch.corrcoef(torch.stack([subspace.maps[1].flatten(), change]))[0, 1].abs()
    assert likeness > 0.9
    # Standard normal, by the expansion of the parameters.
    assert float(found.mean[:, 0].var() + found.covariance[:, 0, 0].mean()) == pytest.approx(1.0, abs=0.1)
    other, _ = planted(1500, 0.5, 8)
    gain = mean_gain(infer(subspace, other).gain, other.image)
    assert gain.significant
    assert gain.value == pytest.approx(float(found.gain.mean()), rel=0.2)


def test_some_of_the_images_tell_coarse_components():
    spectra, latent = planted(3000, 0.5, 7)
    stages = (SubspaceStage(4, 12, 1000), SubspaceStage(6, 12))
    subspace = list(fit_subspace(spectra, 4, drawn(0), stages))[-1]
    assert subspace.components == 1
    found = infer(subspace, spectra)
    assert torch.corrcoef(torch.stack([found.mean[:, 0].float(), latent]))[0, 1].abs() > 0.9
    # The last know all images: as if there had been no others, but for what EM still moves.
    whole = infer(last(spectra, 4, 0), spectra)
    assert float(found.gain.mean()) == pytest.approx(float(whole.gain.mean()), rel=5e-3)


def test_a_sample_has_all_views_of_its_images(seen):
    image, rotation = torch.arange(4, dtype=torch.int32).repeat_interleave(2), random_rotations(8, drawn(2)).float()
    spectra = replace(seen, image=image, share=torch.ones(8), rotation=rotation, copies=2)
    found = spectra.sample(0.75, drawn(3))
    chosen = found.image[::2]
    assert len(chosen) == 3
    assert chosen.unique().tolist() == chosen.tolist() == found.image[1::2].tolist()
    assert torch.equal(found.rotation, spectra.rotation.reshape(4, 2, 3, 3)[chosen.long()].flatten(0, 1))
    assert torch.equal(spectra.sample(1.0, drawn(3)).image, spectra.image)
    both = SpectraOfGrids((spectra, spectra)).sample(0.5, drawn(4))
    assert [len(part) for part in both.parts] == [4, 4]


def test_rows_of_one_image_are_sampled_as_one():
    """Eight rows of each: 500 images are 4,000 rows, and a limit of 500 leaves all of them."""
    spectra, _ = planted(500, 0.5, 7)
    rows = torch.arange(500).repeat_interleave(8)
    image, share = rows.to(torch.int32), torch.full((4000,), 1 / 8)
    many = replace(spectra, image=image, rotation=spectra.rotation[rows], share=share)
    (all_of_them,) = fit_subspace(many, 1, drawn(0), (SubspaceStage(4, 1),))
    (limited,) = fit_subspace(many, 1, drawn(0), (SubspaceStage(4, 1, 500),))
    assert torch.equal(limited.maps, all_of_them.maps)
    (fewer,) = fit_subspace(many, 1, drawn(0), (SubspaceStage(4, 1, 400),))
    assert not torch.equal(fewer.maps, all_of_them.maps)


def test_nothing_is_found_where_nothing_is():
    spectra, _ = planted(1500, 0.0, 9)
    assert last(spectra, 4, 0).components == 0
    gains = component_gains(infer(last(spectra, 4, 0), spectra))
    assert len(gains) == 1
    assert gains[0].abs().max() == 0


def test_what_one_half_set_has_no_component_for_is_not_found():
    """Its gain is that of the other alone, however large."""
    generator, lattice = drawn(5), Lattice(4)
    latent = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    quadratic = torch.full((400, 1, 1), 9.0, dtype=torch.float64)
    told = posterior(9 * latent + 3 * torch.randn(400, 1, generator=generator, dtype=torch.float64), quadratic)
    nothing = posterior(latent[:, :0], quadratic[:, :0, :0])
    subspaces = [Subspace(lattice, torch.zeros(count, *[lattice.size] * 3), torch.ones(count, 5)) for count in (2, 1)]
    said, bright, image = [], torch.ones(400), torch.arange(800)
    searched = _judged(
        (subspaces[0], subspaces[1]), ((told, told), (nothing, nothing)), (bright, bright), image, None, 0, said.append
    )
    assert searched.gain.significant
    assert searched.found is None
    assert said == ["  half 2 has no components of its own"]


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_hardly_more_images_than_components(seed):
    """What a few views say of a coefficient is no positive matrix, and the circulant ones are far off."""
    spectra, _ = planted(6, 0.5, seed)
    for subspace in fit_subspace(spectra, 4, drawn(seed), (SubspaceStage(4, 8), SubspaceStage(6, 8))):
        assert subspace.maps.isfinite().all()
        assert subspace.maps.abs().max() < 1  # of 0.15 for what is there


def test_the_mean_map_of_noiseless_images():
    spectra, _ = planted(800, 0.0, 10, noise=0.0)
    found = consensus(Space(Lattice(6)), spectra)
    expected = 0.15 * blob(found.lattice.size, 0, 0, 0, 0.1) * sphere(found.lattice.size)
    kept = torch.fft.irfftn(torch.fft.rfftn(expected) * 1.0, s=expected.shape)
    assert torch.corrcoef(torch.stack([found.maps[0].flatten(), kept.flatten()]))[0, 1] > 0.995


def test_density_finds_points():
    """Three states, two numbers each; weights and places come back, and superfluous points get no weight."""
    generator = drawn(11)
    truth = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    state = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 4000, replacement=True, generator=generator)
    precision = torch.eye(2, dtype=torch.float64).expand(4000, 2, 2) * 8.0
    seen = truth[state] + torch.randn(4000, 2, generator=generator, dtype=torch.float64) / 8**0.5
    latents = posterior((precision @ seen[..., None]).squeeze(-1), precision)
    density = fit_density(latents, 3, generator)
    order = torch.cdist(truth, density.point).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert (density.point[order] - truth).abs().max() < 0.15  # points are drawn towards 0 by their prior
    assert (density.weight[order] - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.03
    assert (density.membership(latents).argmax(1) == order[state]).double().mean() > 0.97
    assert float(density.gain(latents).mean()) > float(latents.gain.mean())


def test_density_of_one_point_at_zero_gains_nothing():
    latents = posterior(torch.randn(10, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64).expand(10, 2, 2))
    density = Density(torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert density.gain(latents).abs().max() < 1e-12


def test_points_that_no_image_tells_apart_are_one():
    point = torch.tensor([[0.0, 0.0], [0.4, 0.0], [0.0, 0.6], [3.0, 0.0]], dtype=torch.float64)
    weight = torch.tensor([0.4, 0.2, 0.1, 0.3], dtype=torch.float64)
    precision = torch.diag(torch.tensor([4.0, 4.0], dtype=torch.float64))
    found = Density(point, weight).distinct(precision)
    assert torch.allclose(found.weight, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    assert torch.allclose(found.point[0], torch.tensor([0.4 * 0.2 / 0.6, 0.0], dtype=torch.float64))


def test_fewest_takes_the_first_that_is_not_clearly_worse():
    generator = drawn(12)
    image = torch.arange(2000)
    base = torch.randn(2000, generator=generator, dtype=torch.float64)
    better = base + 0.5 + 0.1 * torch.randn(2000, generator=generator, dtype=torch.float64)
    chance = better + 0.001 * torch.randn(2000, generator=generator, dtype=torch.float64)
    assert fewest([base, better, chance], image) == 1
    assert fewest([base, base - 1], image) == 0
    assert fewest([better + 99, better + 99.1], image) == 0  # a tenth of a percent of the gain


def test_views_of_one_image_count_once():
    values = torch.tensor([1.0, 3.0, 2.0, 2.0])
    assert mean_gain(values, torch.tensor([0, 0, 1, 1])) == Gain(2.0, 0.0)


def test_fewer_components_are_those_of_the_smaller_model():
    generator = drawn(13)
    quadratic = torch.diag_embed(torch.rand(5, 3, generator=generator, dtype=torch.float64) + 1)
    latents = posterior(torch.randn(5, 3, generator=generator, dtype=torch.float64), quadratic)
    fewer = first_components(latents, 2)
    assert isinstance(fewer, Latents)
    assert torch.allclose(fewer.mean, latents.mean[:, :2])  # a diagonal model


def test_frames_lead_from_one_space_to_the_other():
    generator = drawn(14)
    own = torch.randn(100, 2, generator=generator, dtype=torch.float64)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    frame = cross_embedding(own, own @ turn.T + 3)
    assert torch.allclose(frame.turn, turn)
    assert torch.allclose(frame(own), own @ turn.T + 3)


def moved(count: int, seed: int, turn: float, brightness: float) -> Spectra:
    """Images of one molecule whose poses are known with an error of ``turn`` rad about each axis, and whose brightness
    varies."""
    lattice = Lattice(6)
    mean = 0.25 * (blob(lattice.size, 0.1, 0, 0, 0.08) + blob(lattice.size, -0.1, 0.12, 0.05, 0.08))
    frequency, _ = half_plane(6, 1.0, 32)
    generator = drawn(seed)
    said = random_rotations(count, generator).float()
    angle = turn * torch.randn(count, 3, generator=generator)
    x, y, z = angle.unbind(1)
    none = torch.zeros_like(x)
    generators = torch.stack([none, -z, y, z, none, -x, -y, x, none], 1).reshape(-1, 3, 3)
    true = torch.linalg.matrix_exp(generators) @ said
    nothing = torch.zeros(count, len(frequency), dtype=torch.complex64)
    transfer = torch.cos(0.02 * (30 + 30 * torch.rand(count, 1, generator=generator)) * frequency.square().sum(1))
    views = torch.arange(count, dtype=torch.int32)
    empty = Spectra(nothing, transfer, frequency, views, true, torch.ones(count), torch.arange(count), 100.0)
    scale = 1 + brightness * torch.randn(count, 1, generator=generator)
    signal = scale * transfer * lattice.slices(mean[None], empty)[:, 0]
    values = signal + torch.randn(signal.shape, dtype=torch.complex64, generator=generator)
    return Spectra(values, transfer, frequency, views, said, torch.ones(count), torch.arange(count), 100.0)


@pytest.mark.parametrize(("turn", "brightness"), [(0.05, 0.0), (0.0, 0.2), (0.04, 0.15)])
def test_errors_of_pose_and_brightness_are_no_states(turn, brightness):
    """They are found as what they are, and leave nothing for components."""
    spectra, other = moved(1500, 15, turn, brightness), moved(1500, 16, turn, brightness)
    subspace = last(spectra, 3, 0)
    gains = [mean_gain(gain, other.image) for gain in component_gains(infer(subspace, other))]
    assert not any(gain.significant for gain in gains)
    assert subspace.placement.turn**0.5 == pytest.approx(turn, abs=0.017)  # EM comes slowly to 0
    assert subspace.placement.brightness**0.5 == pytest.approx(brightness, abs=0.04)
