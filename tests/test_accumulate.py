"""One pass over the particles: against exact sums, adjoint and symmetric, in pieces, resumed, refused; the map."""

from itertools import combinations, permutations

import finufft
import pytest
import torch

from emsplat.errors import InputError
from emsplat.fitting.volume import VolumeObjective
from emsplat.imaging.ctf import ctf, observe
from emsplat.imaging.project import project, voxelize
from emsplat.io.mrc import read_map
from emsplat.maths.fourier import frequencies, irfft, rfft, shell_index
from emsplat.maths.geometry import random_rotations
from emsplat.maths.groups import parse_symmetry
from emsplat.measures.fsc import fsc_curve
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_particles
from emsplat.sums import statistics as module
from emsplat.sums.equations import NormalEquations, contrast, relative_gain
from emsplat.sums.statistics import FourierStatistics, accumulate, begin, equations_of
from emsplat.types import Gaussians, Grid, Optics, Poses
from memory import Memory


@pytest.fixture(scope="module")
def star(simulated):
    return simulated(particles=400, snr=2.0)


def exact_sums(spectra, weights, rotation, images, grid):
    """b and K by summing exponentials: the definition. ``images`` is the grid of the images."""
    ky, kx = frequencies(images)
    kx, ky = kx.expand(images.size, -1), ky.expand(-1, images.size // 2 + 1)
    limit = (0.5 - 1e-6) / max(images.pixel_size, grid.pixel_size)  # what is on the edge is out, however it is rounded
    inside = kx**2 + ky**2 < limit**2
    twice = torch.where(kx == 0, 1.0, 2.0)[inside].double()
    points = torch.stack([kx, ky], -1)[inside].double()

    def positions(count):
        axis = (torch.arange(count).double() - count // 2) * grid.pixel_size
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        return torch.stack([x, y, z], -1).reshape(-1, 3)

    voxels, lags = positions(grid.size), positions(2 * module.kernel_reach(grid.size))
    linear, kernel = torch.zeros(len(voxels)).double(), torch.zeros(len(lags)).double()
    for spectrum, weight, turn in zip(spectra, weights, rotation.double(), strict=True):
        k = points @ turn[:2]
        phase = 2 * torch.pi * voxels @ k.T
        value = spectrum[inside].to(torch.complex128) * twice
        linear += torch.cos(phase) @ value.real - torch.sin(phase) @ value.imag
        kernel += torch.cos(2 * torch.pi * lags @ k.T) @ (weight[inside].double() * twice)
    shape = (grid.size,) * 3
    reach = module.kernel_reach(grid.size)
    return linear.reshape(shape), kernel.reshape((2 * reach,) * 3)[reach:]


@pytest.mark.parametrize(
    ("images", "grid"),
    [
        (Grid(16, 2.0), Grid(16, 2.0)),
        (Grid(20, 1.5), Grid(16, 2.0)),  # another box and pixel size than the volume, finer
        (Grid(12, 3.0), Grid(16, 2.0)),  # and coarser
        (Grid(18, 2.0), Grid(18, 2.0)),  # 3/4 of the box is no whole number
    ],
)
def test_sums_agree_with_exact_exponentials(images, grid, device):
    rng = torch.Generator().manual_seed(1)
    rotation = random_rotations(12, rng).float()
    spectra = rfft(torch.randn(12, images.size, images.size, generator=rng))
    weights = torch.rand(spectra.shape, generator=rng)
    statistics = FourierStatistics(grid, device=device)
    statistics.insert(spectra.to(device), weights.to(device), rotation.to(device), images)
    equations = statistics.equations().to(torch.device("cpu"))
    linear, kernel = exact_sums(spectra, weights, rotation, images, grid)
    assert (equations.linear - linear).norm() < 4e-3 * linear.norm()
    peak = float(kernel.max())
    middle = slice(len(kernel) - grid.size // 2, len(kernel) + grid.size // 2)
    near = (slice(grid.size // 2), middle, middle)
    difference = (equations.kernel - kernel).abs()
    assert float(difference[near].max()) < 1e-3 * peak
    # Beyond, K is faded out: nothing larger than itself may be left.
    outside = kernel.abs().clone()
    outside[near] = 0
    assert float(difference.max()) < 1.05 * float(outside.max())


def test_sums_do_not_depend_on_threads_nor_on_batches():
    rng = torch.Generator().manual_seed(2)
    rotation = random_rotations(9, rng).float()
    spectra = rfft(torch.randn(9, 24, 24, generator=rng))
    weights = torch.rand(spectra.shape, generator=rng)
    grid = Grid(24, 1.0)
    one, three = FourierStatistics(grid), FourierStatistics(grid)
    one.insert(spectra, weights, rotation, grid)
    torch.set_num_threads(3)
    try:
        for part in (slice(0, 2), slice(2, 9)):
            three.insert(spectra[part], weights[part], rotation[part], grid)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.numerator, three.numerator)
    assert torch.equal(one.weight, three.weight)


@pytest.mark.parametrize(
    ("symbol", "inserted"),
    [("C1", 1), ("C2", 1), ("C3", 3), ("C4", 1), ("C6", 3), ("D2", 1), ("D4", 1), ("D7", 7), ("T", 12), ("O", 1)]
    + [("I1", 5), ("I2", 5), ("I3", 30)],
)
def test_symmetry_is_as_if_each_image_were_there_once_under_every_element(symbol, inserted, device):
    grid, rng, symmetry = Grid(18, 2.0), torch.Generator().manual_seed(4), parse_symmetry(symbol)
    # None that puts points on the grid: where the window ends there, it depends on the side.
    rotation = random_rotations(5, rng).float()
    spectra = rfft(torch.randn(5, 18, 18, generator=rng))
    weights = torch.rand(spectra.shape, generator=rng)
    folded = FourierStatistics(grid, device=device, symmetry=symmetry)
    each = FourierStatistics(grid, device=device)
    assert len(folded.elements) == inserted == symmetry.inserted
    folded.insert(spectra.to(device), weights.to(device), rotation.to(device), grid)
    for element in symmetry.elements.float():
        each.insert(spectra.to(device), weights.to(device), (rotation @ element).to(device), grid)
    expected = each.equations()
    # Positions are rounded to 1e-6 voxels of the grid, sums to float32.
    for equations in (folded.equations(), folded.equations(), folded.used_up()):
        for name in ("linear", "kernel"):
            found, wanted = getattr(equations, name), getattr(expected, name)
            assert float((found - wanted).norm()) < 2e-5 * float(wanted.norm())
    assert not folded.numerator.numel()
    assert not folded.weight.numel()


def test_back_projection_is_the_truth_in_frame_hand_and_sign(star, device):
    truth, grid = read_map(star.parent / "truth.mrc")
    volume = equations_of(open_particles(star).on(device)).solve().cpu()
    right = fsc_curve(volume, truth, grid).value[1:12]
    assert float(right.mean()) > 0.9
    for axes in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        turned = torch.roll(truth.flip(axes), [1] * len(axes), axes)
        assert float(fsc_curve(volume, turned, grid).value[1:12].mean()) < 0.7


def test_grey_values_are_those_of_the_truth(star):
    """Up to the factor that normalisation put on the images, and what the regularisation takes away."""
    stack = open_particles(star)
    truth, _ = read_map(star.parent / "truth.mrc")
    equations = equations_of(stack)
    gain = equations.gain(truth)
    predicted = truth * gain
    assert float((predicted * equations.solve()).sum() / predicted.square().sum()) == pytest.approx(0.85, abs=0.1)
    assert equations.scaled(2.0).gain(truth) == pytest.approx(gain / 2, rel=1e-4)


def test_coarser_sums_give_the_same_low_resolution_map(star):
    stack = open_particles(star)
    coarse, full = equations_of(stack, 16).solve(), equations_of(stack).solve()
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(full)))[8:24, 8:24, 8:24]
    low = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(spectrum)).real) / 8
    centre = slice(4, 12)
    a, b = coarse[centre, centre, centre].flatten(), low[centre, centre, centre].flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.98


def test_symmetry_is_imposed(star):
    volume = equations_of(open_particles(star, symmetry=parse_symmetry("C2"))).solve()
    turned = torch.roll(volume.flip([1, 2]), [1, 1], [1, 2])
    inner = slice(4, 28)
    a, b = volume[inner, inner, inner].flatten(), turned[inner, inner, inner].flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.99


def test_contrast_tells_bright_from_dark(star):
    stack = open_particles(star)
    assert contrast(equations_of(stack).solve()) > 1
    assert contrast(equations_of(stack.inverted()).solve()) == pytest.approx(
        -contrast(equations_of(stack).solve()), rel=1e-3
    )


def test_gradient_of_the_sums_is_that_of_the_images(star):
    """Two roads to one gradient with respect to the map: residuals of every image put back exactly, or KV - b."""
    stack = open_particles(star)
    grid, noise = stack.grid, estimate_noise(stack)
    rng = torch.Generator().manual_seed(4)
    mixture = Gaussians(
        12 * torch.randn(60, 3, generator=rng),
        (25.0 * torch.eye(3)).repeat(60, 1, 1),
        50 * torch.rand(60, generator=rng),
    )
    ky, kx = (k.expand(32, 17) for k in frequencies(grid))
    inside = kx**2 + ky**2 < (0.5 / grid.pixel_size) ** 2
    twice = torch.where(kx == 0, 1.0, 2.0)[inside]
    points, values = [], []
    for batch in stack.sequential(100):
        centred = Poses(batch.poses.rotation, torch.zeros_like(batch.poses.shift))
        seen = observe(batch, grid)
        transfer = seen.transfer
        predicted = transfer * rfft(project(mixture, centred, grid, cutoff=6.0))
        precision = 1 / noise[batch.optics_group][:, shell_index(32).clamp(max=16)] / 32**2
        residual = (predicted - seen.spectrum) * transfer * precision
        points.append(torch.stack([kx, ky], -1)[inside] @ batch.poses.rotation[:, :2])
        values.append((residual[:, inside] * twice).to(torch.complex128))
    x, y, z = (2 * torch.pi * grid.pixel_size * torch.cat(points).reshape(-1, 3).double()).T.contiguous().numpy()
    by_images = finufft.nufft3d1(z, y, x, torch.cat(values).flatten().numpy(), (32, 32, 32), isign=1, eps=1e-9).real
    objective = VolumeObjective(equations_of(stack), 32, cutoff=6.0)
    _, by_sums = objective.error_and_gradient(objective.render(mixture))
    # Where a particle can be; at the very edge of the box K is faded out.
    near = ((torch.arange(32) - 16).abs() / 32 < 0.4).double()
    middle = near[:, None, None] * near[:, None] * near
    a, b = rfft(middle * torch.from_numpy(by_images) / len(stack), 3), rfft(middle * by_sums, 3)
    shell = shell_index(32, 3)
    worst = max(float((a - b)[shell == s].norm() / a[shell == s].norm()) for s in range(1, int(0.9 * 16) + 1))
    assert worst < 0.02


def test_statistics_in_pieces_and_from_disk_are_the_same(star, tmp_path):
    stack = open_particles(star)
    noise = estimate_noise(stack)
    whole = begin(stack)
    for _ in accumulate(whole, stack, noise):
        pass
    first, second = stack.take(torch.arange(150)), stack.take(torch.arange(150, 400))
    pieces = [begin(part) for part in (first, second)]
    for piece, part in zip(pieces, (first, second), strict=True):
        for _ in accumulate(piece, part, noise):
            pass
    pieces[1].save(tmp_path / "second.safetensors")
    loaded = begin(second)
    loaded.load(tmp_path / "second.safetensors")
    assert torch.equal(loaded.numerator, pieces[1].numerator)
    pieces[0].merge(loaded)
    assert pieces[0].particles == 400
    assert (pieces[0].numerator - whole.numerator).abs().max() < 1e-5 * whole.numerator.abs().max()
    assert (pieces[0].weight - whole.weight).abs().max() < 1e-5 * whole.weight.abs().max()


def test_interrupted_pass_goes_on_to_the_same_sums(star, tmp_path):
    stack = open_particles(star)
    noise = estimate_noise(stack)
    whole = begin(stack)
    for _ in accumulate(whole, stack, noise):
        pass
    started = begin(stack)
    for _ in accumulate(started, stack, noise):
        if started.particles >= 128:
            break
    started.save(tmp_path / "s.safetensors")
    resumed = begin(stack)
    resumed.load(tmp_path / "s.safetensors")
    assert 0 < resumed.particles < 400
    for _ in accumulate(resumed, stack, noise):
        pass
    assert torch.equal(resumed.numerator, whole.numerator)
    assert torch.equal(resumed.weight, whole.weight)


def test_statistics_of_other_settings_are_refused_by_name(star, tmp_path):
    stack = open_particles(star)
    begin(stack).save(tmp_path / "s.safetensors")
    for other, word in (
        (open_particles(star, symmetry=parse_symmetry("C2")), "symmetry"),
        (stack.take(torch.arange(10)), "particles"),
        (stack.inverted(), "particles"),
    ):
        with pytest.raises(InputError, match=f"another {word}.*same settings"):
            begin(other).load(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"another (box|pixel size)"):
        begin(stack, Grid(16, 8.0)).load(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"same particles.*twice"):
        begin(stack).merge(begin(stack))
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        begin(stack).load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["image", "weight", "pose"])
def test_values_that_are_not_finite_never_reach_the_sums(where, value):
    grid = Grid(16, 1.0)
    inputs = {
        "image": rfft(torch.randn(3, 16, 16)),
        "weight": torch.rand(3, 16, 9),
        "pose": torch.eye(3).repeat(3, 1, 1),
    }
    inputs[where][1, 2, 2] = value
    statistics = FourierStatistics(grid)
    with pytest.raises(InputError, match=f"a {where} holds values that are not finite"):
        statistics.insert(*inputs.values(), grid)
    assert float(statistics.weight.abs().max()) == 0


def test_holes_are_not_amplified():
    """Views along one axis only: outside the measured plane the map has no power, and the coverage says so."""
    size = 24
    grid = Grid(size, 2.0)
    rng = torch.Generator().manual_seed(5)
    turns = random_rotations(300, rng).float()
    angle = torch.rand(300, generator=rng) * 2 * torch.pi
    turns = torch.zeros(300, 3, 3)  # in-plane rotations: every slice is the plane kz = 0
    turns[:, 0, 0], turns[:, 0, 1], turns[:, 1, 0], turns[:, 1, 1] = angle.cos(), angle.sin(), -angle.sin(), angle.cos()
    turns[:, 2, 2] = 1
    statistics = FourierStatistics(grid)
    spectra = rfft(torch.randn(300, size, size, generator=rng))
    statistics.insert(spectra, torch.ones(300, size, size // 2 + 1), turns, grid)
    equations = statistics.equations()
    assert equations.coverage() < 0.5
    power = rfft(equations.solve(), 3).abs().square()
    measured, empty = power[0], power[6:18]
    assert float(empty.mean()) < 1e-3 * float(measured.mean())


def test_octahedral_views_in_the_plane_of_the_lattice():
    """One Gaussian seen from the 24 directions of a cube: its centre and width come back."""
    grid = Grid(32, 2.0)
    mixture = Gaussians(torch.tensor([[6.0, -4.0, 8.0]]), 16.0 * torch.eye(3)[None], torch.tensor([100.0]))
    rotations = []
    for order in permutations(range(3)):
        for flips in [c for r in range(4) for c in combinations(range(3), r)]:
            m = torch.zeros(3, 3)
            for row, column in enumerate(order):
                m[row, column] = -1.0 if row in flips else 1.0
            if torch.det(m) > 0:
                rotations.append(m)
    turns = torch.stack([*rotations, *random_rotations(200, torch.Generator().manual_seed(0)).float()])
    poses = Poses(turns, torch.zeros(len(turns), 2))
    spectra = rfft(project(mixture, poses, grid))
    statistics = FourierStatistics(grid)
    statistics.insert(spectra, torch.ones(spectra.shape), turns, grid)
    volume = statistics.equations().solve()
    expected = voxelize(mixture, grid)
    a, b = volume.flatten(), expected.flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.98


def test_empty_equations_solve_to_nothing():
    size = 16
    reach = module.kernel_reach(size)
    kernel = torch.zeros(reach, 2 * reach, 2 * reach)
    empty = NormalEquations(Grid(size, 1.0), torch.zeros((size,) * 3), kernel, 0)
    assert float(empty.solve().abs().max()) == 0
    assert empty.coverage() == 0


def test_parts_of_noisy_images_have_one_grey_scale(simulated):
    """A map of a few images fits their noise too; another set, which has other noise, is not fainter for that."""
    stack = open_particles(simulated(particles=400, snr=0.05))
    parts = [equations_of(stack.take(torch.arange(first, 400, 8))) for first in range(4)]
    first, *others = parts
    for scale in (1.0, 2.0, -0.5):
        gains = [relative_gain(first, other.scaled(1 / scale)) / scale for other in others]
        assert gains == pytest.approx([1] * len(gains), abs=0.15)
        assert relative_gain(others[0].scaled(1 / scale), first) == pytest.approx(1 / (scale * gains[0]), rel=0.1)
    nothing = [equations_of(open_particles(simulated(particles=40, noise_only=True, seed=seed))) for seed in (1, 2)]
    assert 0.3 < relative_gain(*nothing) < 3


def test_experimental_particles_are_bright(shared_data):
    assert (
        contrast(
            equations_of(open_particles(shared_data / "bgal" / "particles.star", symmetry=parse_symmetry("D2"))).solve()
        )
        > 1
    )


class Smooth(Memory):
    """Noise-free images of a smooth mixture."""

    def __init__(self, count=500, sign=1.0):
        rng = torch.Generator().manual_seed(0)
        grid = Grid(32, 3.0)
        mean = 11 * torch.randn(12, 3, generator=rng) * torch.tensor([1.0, 0.8, 0.6])
        self.truth = Gaussians(mean, 25 * torch.eye(3).expand(12, 3, 3), 1 + torch.rand(12, generator=rng))
        poses = Poses(random_rotations(count, rng).float(), 3 * torch.randn(count, 2, generator=rng))
        rows = torch.tensor([300, 2.7, 0.1, 9000, 8500, 0.6, 0, 0, 1]).repeat(count, 1)
        rows[:, 3:5] += 12000 * torch.rand(count, 1, generator=rng)
        optics = Optics(*rows.unbind(1))
        images = irfft(rfft(project(self.truth, poses, grid)) * ctf(optics, grid))
        super().__init__(grid, sign * images, poses, optics)


def classical(stack):
    statistics = FourierStatistics(stack.grid)
    for _ in accumulate(statistics, stack, torch.ones(1, stack.grid.size // 2 + 1)):
        pass
    return statistics.equations().solve()


def test_noise_free_images_give_the_map_in_frame_and_hand():
    stack = Smooth()
    truth, volume = voxelize(stack.truth, stack.grid), classical(stack)

    def likeness(other):
        inner = slice(3, 29)
        pair = torch.stack([volume[inner, inner, inner].flatten(), other[inner, inner, inner].flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    assert likeness(truth) > 0.95
    flips = [axes for n in (1, 2, 3) for axes in combinations(range(3), n)]
    assert max(likeness(torch.roll(truth.flip(axes), [1] * len(axes), axes)) for axes in flips) < 0.85
    assert max(likeness(truth.permute(order)) for order in list(permutations(range(3)))[1:]) < 0.85


def test_noise_free_images_give_the_grey_values_of_the_map():
    stack = Smooth()
    truth, volume = voxelize(stack.truth, stack.grid), classical(stack)
    dense = truth > 0.3 * truth.max()
    assert float((volume[dense] * truth[dense]).sum() / truth[dense].square().sum()) == pytest.approx(0.9, abs=0.1)


def test_brightness_does_not_fade_away_from_the_centre():
    stack = Smooth()
    truth, volume = voxelize(stack.truth, stack.grid), classical(stack)
    axis = torch.arange(32) - 16
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    dense = truth > 0.15 * truth.max()
    inner, outer = dense & (radius < 5), dense & (radius > 7)
    assert int(outer.sum()) > 50
    gain = [float((volume[part] * truth[part]).sum() / truth[part].square().sum()) for part in (inner, outer)]
    assert gain[1] / gain[0] == pytest.approx(1, abs=0.06)


def test_contrast_of_noise_free_images():
    assert contrast(classical(Smooth(200))) > 1
    assert contrast(classical(Smooth(200, sign=-1.0))) < -1
