"""What is done axis by axis and some planes at a time, against the same in one piece."""

import math

import pytest
import torch

from emsplat.assessment.maps import sphere
from emsplat.maths import fourier
from emsplat.maths.fourier import crop, irfft, rfft, shell_index, shell_radius
from emsplat.maths.geometry import random_rotations
from emsplat.measures import directional, local_resolution
from emsplat.measures.crossvalidate import CrossValidation, independent_coefficients
from emsplat.particles.open import open_particles
from emsplat.programs.classical import judge
from emsplat.run.files import HALVES
from emsplat.sums.equations import (
    ClassicalEquations,
    circulant,
    combined,
    contrast,
    mean_per_shell,
    relative_gain,
    response_of,
    synthesis,
)
from emsplat.sums.statistics import FourierStatistics, equations_of, memory_of_sums
from emsplat.types import Grid

pytestmark = pytest.mark.parametrize("pieces", [True, False], ids=["pieces", "whole"])


@pytest.fixture(autouse=True)
def _pieces(pieces, monkeypatch):
    """Some planes at a time in small boxes too."""
    if pieces:
        monkeypatch.setattr(fourier, "_SLAB", 700)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blob(size, seed):
    radius = (torch.arange(size) - size // 2).square()
    square = radius[:, None, None] + radius[:, None] + radius
    return torch.exp(-square / (0.03 * size**2)) + 0.05 * noise(size, size, size, seed=seed)


def close(one, other, tolerance=3e-6):
    """Equal but for the rounding of float32 in transforms."""
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def filled_sums(size, seed=3):
    grid, count = Grid(size, 2.0), 6
    rng = torch.Generator().manual_seed(seed)
    statistics = FourierStatistics(grid)
    spectra = rfft(torch.randn(count, size, size, generator=rng))
    weights = torch.rand(spectra.shape, generator=rng)
    statistics.insert(spectra, weights, random_rotations(count, rng).float(), grid)
    statistics.particles = count
    return statistics


def equations(size, seed=3):
    return filled_sums(size, seed).equations()


def whole_synthesis(half_space):
    """Σ_k F(k) exp(2πi k x) over the whole periodic grid, origin at index 0, from the whole spectrum."""
    reach = (len(half_space) - 3) // 2
    side = 2 * reach
    axes = [torch.arange(side + 3) - reach - 1] * 2 + [torch.arange(reach + 3) - 1]
    z, y, x = (axis % side for axis in torch.meshgrid(*axes, indexing="ij"))
    full = torch.zeros(side, side, side, dtype=torch.complex128)
    values = half_space.to(torch.complex128)
    full.index_put_((z, y, x), values, accumulate=True)
    full.index_put_((-z % side, -y % side, -x % side), values.conj(), accumulate=True)
    # Where x > 0 entry and mirror are two coefficients of the full transform; where x = 0 they are one, of two entries.
    return torch.fft.ifftn(full, norm="forward").real.float()


def centre(volume, size):
    index = (torch.arange(size) - size // 2) % len(volume)
    return volume[index][:, index][:, :, index]


@pytest.mark.parametrize("reach", [2, 6, 9])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_synthesis_is_one_transform_of_the_whole_spectrum(reach, dtype):
    half_space = noise(2 * reach + 3, 2 * reach + 3, reach + 3, dtype=dtype)
    expected = whole_synthesis(half_space)
    for size in (2 * reach, 4 * reach // 3, 1):
        assert close(synthesis(half_space, size), centre(expected, size))
        assert torch.equal(synthesis(half_space, size, size // 2), synthesis(half_space, size)[size // 2 :])


def test_sums_that_are_used_up_give_the_same_equations():
    statistics = filled_sums(16)
    kept, gone = statistics.equations(), None
    gone = statistics.used_up()
    assert torch.equal(kept.linear, gone.linear)
    assert torch.equal(kept.kernel, gone.kernel)
    assert kept.particles == gone.particles == 6
    assert statistics.numerator.numel() == statistics.weight.numel() == 0


def test_memory_of_sums_is_that_of_their_arrays():
    statistics = filled_sums(64)
    equations = statistics.equations()
    held = [statistics.numerator, statistics.weight, equations.linear, equations.linear, equations.kernel]
    rows = 8 * 64 * 64 * (statistics.side // 2 + 1)
    assert memory_of_sums(64) == pytest.approx(sum(part.nbytes for part in held) + rows, rel=1e-6)


def whole_circulant(kernel, size):
    length = len(kernel)
    axis = torch.arange(length) - length // 2
    taper = (1 - axis.abs() / (length // 2)).clamp(min=0)
    tapered = kernel * taper[:, None, None] * taper[:, None] * taper
    for dim in range(3):
        shape = list(tapered.shape)
        shape[dim] = size
        tapered = tapered.new_zeros(shape).index_add_(dim, axis % size, tapered)
    return torch.fft.rfftn(tapered).real


def symmetric(reach, seed=0):
    """A kernel that is 0 from its end on, as `NormalEquations` has it, and with all of its lags."""
    inner = noise(2 * reach - 1, 2 * reach - 1, 2 * reach - 1, seed=seed)
    every = torch.nn.functional.pad(inner + inner.flip(0, 1, 2), (1, 0) * 3)
    return every[reach:], every


@pytest.mark.parametrize(("reach", "size"), [(12, 16), (14, 18), (8, 16), (7, 9)])
def test_circulant_folds_the_kernel(reach, size):
    kernel, every = symmetric(reach)
    assert close(circulant(kernel, size), whole_circulant(every, size))


@pytest.mark.parametrize(("reach", "side"), [(6, 12), (6, 16), (7, 20)])
def test_response_is_the_transform_of_all_lags(reach, side):
    kernel, every = symmetric(reach)
    place = torch.arange(-reach, reach) % side
    periodic = torch.zeros(side, side, side)
    periodic[place[:, None, None], place[:, None], place] = every
    assert close(response_of(kernel, side), torch.fft.rfftn(periodic).real)


def test_response_leaves_out_lags_beyond_half_of_the_grid():
    kernel, every = symmetric(8)
    lag = torch.arange(-5, 6)
    share = torch.where(lag.abs() == 5, 0.5, 1.0)
    inside = every[3:14, 3:14, 3:14] * share[:, None, None] * share[:, None] * share
    periodic = torch.zeros(10, 10, 10)
    periodic.index_put_(torch.meshgrid(*[lag % 10] * 3, indexing="ij"), inside, accumulate=True)
    assert close(response_of(kernel, 10), torch.fft.rfftn(periodic).real)


@pytest.mark.parametrize("prior", [None, torch.linspace(0.02, 2, 9)])
def test_classical_map_is_b_over_weight(prior):
    own = equations(16)
    weight, shells = own.weight(), shell_index(16, 3)
    inside, shells = shells <= 8, shells.clamp(max=8)
    mean = mean_per_shell(weight)
    share = torch.full_like(mean, 0.1) if prior is None else prior.clamp(min=0.01)
    expected = irfft(rfft(own.linear, 3) * inside / (weight + (share * mean)[shells] + 1e-6 * mean.max() + 1e-30), 3)
    assert close(own.solve(prior), expected, 1e-5)
    covered = (weight > 0.1 * mean[shells]) & inside
    assert own.coverage() == pytest.approx(float(covered.sum() / inside.sum()), abs=1e-6)
    assert 0 < own.coverage() < 1


def test_mean_per_shell_is_a_mean():
    values, shells = noise(12, 12, 7).square(), shell_index(12, 3)
    for shell, mean in enumerate(mean_per_shell(values).tolist()):
        assert mean == pytest.approx(float(values[shells == shell].double().mean()), rel=1e-6)


def test_sampling_is_the_weight_of_each_frequency():
    own = equations(16)
    weight = own.weight()
    centred = ClassicalEquations(own.linear, weight).sampling()
    mean = mean_per_shell(weight)
    for z in range(-8, 8):
        for y, x in ((0, 0), (3, 2), (-3, 2), (5, -4), (-8, 1), (2, -8)):
            place = (z, y, x) if x >= 0 or x == -8 else (-z, -y, -x)
            shell = math.floor(math.sqrt(z * z + y * y + x * x) + 0.5)
            expected = float(weight[place[0], place[1], abs(place[2])] / mean[shell]) if shell <= 8 else 0.0
            assert float(centred[z + 8, y + 8, x + 8]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_sets_of_other_brightness_add_up():
    parts = [equations(16, seed) for seed in (1, 2, 3)]
    before = [part.kernel.clone() for part in parts]
    total = parts[0]
    for part in parts[1:]:
        total = total + part.scaled(relative_gain(parts[0], part))
    found = combined(parts)
    assert close(found.linear, total.linear)
    assert close(found.kernel, total.kernel)
    assert found.particles == 18
    assert all(torch.equal(part.kernel, kernel) for part, kernel in zip(parts, before, strict=True))


def test_contrast_is_centre_against_surroundings():
    volume = blob(24, 1)
    axis = (torch.arange(24) - 12) / 24
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    low = irfft(rfft(volume, 3) * torch.exp(-(shell_radius(24, 3).float() ** 2) / 128), 3)
    inside, around = low[radius < 0.15].mean(), low[(radius > 0.35) & (radius < 0.5)].mean()
    assert contrast(volume) == pytest.approx(float((inside - around) / low[radius < 0.5].std()), rel=1e-3)


@pytest.mark.parametrize("size", [16, 15])
def test_independent_coefficients_in_one_piece(size):
    mask = sphere(Grid(size, 4.0), 30.0)
    transform = torch.fft.fftn(mask.double() ** 2)
    axis = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    chance = torch.where(radius < 1, 1 - radius / 2, 0.5 / radius.clamp(min=1))
    neighbours = ((transform.abs() / transform[0, 0, 0].real).square() * chance).sum()
    voxels = torch.bincount((radius + 0.5).floor().long().flatten())[: size // 2 + 1]
    expected = (0.5 * voxels.double() / neighbours).clamp(min=1)
    assert torch.allclose(independent_coefficients(mask), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [16, 15])
def test_cross_validation_sums_over_whole_shells(size):
    grid = Grid(size, 4.0)
    maps = [blob(size, seed) for seed in range(4)]
    mask = sphere(grid, 30.0)
    judge_of_both = CrossValidation((maps[0], maps[1]), mask, grid)
    first, second = (torch.fft.fftn((volume * mask).double()) for volume in maps[:2])
    axis = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    shells = ((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() + 0.5).floor()
    for shell, value in enumerate(judge_of_both.raw.tolist()):
        a, b = first[shells == shell], second[shells == shell]
        expected = (a.conj() * b).sum().real / (a.abs().square().sum() * b.abs().square().sum()).sqrt()
        assert value == pytest.approx(float(expected), abs=1e-5)


def test_random_phases_in_one_piece():
    volume = blob(16, 0)
    spectrum = torch.fft.rfftn(volume)
    phase = torch.fft.rfftn(torch.randn(volume.shape, generator=torch.Generator().manual_seed(5)))
    random = spectrum.abs() * phase / phase.abs().clamp(min=1e-30)
    expected = torch.fft.irfftn(torch.where(shell_index(16, 3) >= 3, random, spectrum), s=volume.shape)
    found = fourier.randomise_phases(volume, 3, torch.Generator().manual_seed(5), dims=3)
    assert close(found, expected)


def test_white_maps_and_bands_in_one_piece():
    grid, size, window = Grid(24, 3.0), 24, 20.0
    volume = blob(size, 1)
    spectrum, shell = torch.fft.rfftn(volume), shell_index(size, 3).clamp(max=13)
    power = torch.bincount(shell.flatten(), spectrum.abs().square().flatten().double()) / torch.bincount(
        shell.flatten()
    )
    scale = power.sqrt().reciprocal().float()
    scale[-1] = 0
    (white,) = local_resolution._whitened([volume])
    assert close(white, spectrum * (size**1.5 * scale[shell]))
    for fine in (16, 24):
        radius = shell_radius(fine, 3).float() / grid.length
        band = local_resolution._band(radius, 0.1, window)
        expected = torch.fft.irfftn((crop(white, fine, 3) if fine < size else white) * band, s=(fine,) * 3)
        assert close(local_resolution._filtered(white, fine, 0.1, grid, window), expected)
    kernel = torch.exp(-2 * (math.pi * local_resolution._sigma(window) * shell_radius(size, 3) / grid.length) ** 2)
    smooth = torch.fft.irfftn(crop(torch.fft.rfftn(volume) * kernel.float(), 12, 3), s=(12,) * 3)
    assert close(local_resolution._smooth(volume, 12, grid, window), smooth)


@pytest.mark.parametrize("size", [12, 13])
def test_products_of_spectra_are_centred(size):
    a, b = noise(size, size, size, seed=1), noise(size, size, size, seed=2)
    first, second = (torch.fft.fftshift(torch.fft.rfftn(volume), dim=(0, 1)) for volume in (a, b))
    expected = [(first.conj() * second).real, first.abs().square(), second.abs().square()]
    for found, product in zip(directional._products(a, b), expected, strict=True):
        assert close(found, product)


def test_equations_of_all_particles_are_the_sum_and_the_halves_are_gone(simulated):
    stack = open_particles(simulated(particles=80, snr=2.0))
    halves = {name: equations_of(stack.only(half)) for name, half in HALVES.items()}
    total = halves["half1"] + halves["half2"]
    found = judge(dict(halves), stack)
    assert close(found.all_particles.weight, total.weight(), 1e-5)
    assert close(found.raw["class001"], total.solve(), 1e-4)
    assert found.coverage == pytest.approx(total.coverage(), abs=2e-3)
    whole = found.whole()
    assert torch.equal(whole.kernel, total.kernel)
    assert torch.equal(whole.linear, total.linear)
    assert whole.particles == total.particles == 80
    assert not found.equations
