"""The splatting kernels against the dense reference, forward and backward, and the laws that they obey."""

import math

import pytest
import torch

from emsplat import _native
from emsplat.imaging.project import CUTOFF, _covariances_gradient, covariances, project, voxelize
from emsplat.kernels import reference
from emsplat.kernels.cpu import covariances_gradient
from emsplat.maths.geometry import axis_rotation, quaternion_to_matrix, random_rotations
from emsplat.types import Gaussians, Grid, Poses

WIDE = 9.0  # footprint at which cutting is below the rounding of either dtype


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request):
    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(before)


def mixture(count, grid, dtype=torch.float32, seed=0, smallest=0.6, largest=3.0):
    """Random Gaussians, some of them partly or wholly outside the box; scales in pixels."""
    rng = torch.Generator().manual_seed(seed)
    draw = {"generator": rng, "dtype": torch.float64}
    mean = 0.25 * grid.length * torch.randn(count, 3, **draw)
    scale = grid.pixel_size * torch.exp(
        torch.rand(count, 3, **draw) * math.log(largest / smallest) + math.log(smallest)
    )
    axes = random_rotations(count, rng)
    covariance = axes @ torch.diag_embed(scale**2) @ axes.mT
    amplitude = torch.rand(count, **draw) + 0.1
    return Gaussians(*(t.to(dtype) for t in (mean, covariance, amplitude)))


def poses(count, dtype=torch.float32, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return Poses(random_rotations(count, rng).to(dtype), torch.randn(count, 2, generator=rng, dtype=dtype))


def gradients(function, leaves, cotangent):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad((function(*leaves) * cotangent).sum(), leaves)


def moved(gaussians, device):
    return Gaussians(*(t.to(device) for t in (gaussians.mean, gaussians.covariance, gaussians.amplitude)))


def rounding(size, dtype=torch.float32):
    """Bound on the relative error of what is splatted: places of up to size / 2 pixels are rounded, and an error of
    them counts against the smallest scale, 0.6 pixels. Twenty roundings, which do not all point the same way:
    turning, shifting, inverting, the exponential, sums."""
    return 20 * torch.finfo(dtype).eps * (size / 2) / 0.6


def assert_gradients_agree(got, expected, error):
    for a, b in zip(got, expected, strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        assert (a - b).norm() <= error * b.norm()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 1 - 1e-7


@pytest.mark.parametrize("size", [16, 33, 50])
def test_project_forward(instruction_set, size):
    grid = Grid(size, 1.7)
    g, p = mixture(40, grid), poses(3)
    expected = reference.project(g, p, grid)
    got = project(g, p, grid, cutoff=WIDE)
    assert (got - expected).norm() <= rounding(size) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_gradient(instruction_set, dtype):
    grid = Grid(38, 1.3)
    g, p = mixture(60, grid, dtype), poses(4, dtype)
    cotangent = torch.randn(4, 38, 38, generator=torch.Generator().manual_seed(2), dtype=dtype)
    leaves = [g.mean, g.covariance, g.amplitude, p.rotation, p.shift]

    def fast(m, s, a, r, t):
        return project(Gaussians(m, s, a), Poses(r, t), grid, cutoff=WIDE)

    def slow(m, s, a, r, t):
        return reference.project(Gaussians(m, s, a), Poses(r, t), grid)

    expected = gradients(slow, [leaf.double() for leaf in leaves], cotangent.double())
    assert_gradients_agree(gradients(fast, leaves, cotangent), expected, rounding(grid.size, dtype))


def each(count, gaussians, grid, dtype=torch.float32):
    """A mixture for each of ``count`` images."""
    found = [mixture(gaussians, grid, dtype, seed=10 + number) for number in range(count)]
    return Gaussians(
        *(torch.stack(parts) for parts in zip(*((g.mean, g.covariance, g.amplitude) for g in found), strict=True))
    )


def test_every_image_may_have_its_own_mixture(instruction_set):
    grid, p = Grid(33, 1.7), poses(5)
    g = each(5, 40, grid)
    got = project(g, p, grid, cutoff=WIDE)
    expected = reference.project(g, p, grid)
    assert (got - expected).norm() <= rounding(grid.size) * expected.norm()
    for number in range(5):
        own = Gaussians(g.mean[number], g.covariance[number], g.amplitude[number])
        alone = project(own, p[number : number + 1], grid, cutoff=WIDE)
        assert (got[number] - alone[0]).norm() <= rounding(grid.size) * alone.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_every_image_stay_apart(instruction_set, dtype):
    grid, p = Grid(38, 1.3), poses(4, dtype)
    g = each(4, 50, grid, dtype)
    cotangent = torch.randn(4, 38, 38, generator=torch.Generator().manual_seed(2), dtype=dtype)
    leaves = [g.mean, g.covariance, g.amplitude, p.rotation, p.shift]

    def fast(m, s, a, r, t):
        return project(Gaussians(m, s, a), Poses(r, t), grid, cutoff=WIDE)

    def slow(m, s, a, r, t):
        return reference.project(Gaussians(m, s, a), Poses(r, t), grid)

    got, expected = (
        gradients(fast, leaves, cotangent),
        gradients(slow, [t.double() for t in leaves], cotangent.double()),
    )
    assert_gradients_agree(got, expected, rounding(grid.size, dtype))
    # What only one image sees has a gradient in that image alone.
    only = cotangent * torch.tensor([0.0, 1, 0, 0], dtype=dtype)[:, None, None]
    for part in gradients(fast, leaves, only):
        assert part[1].abs().max() > 0
        assert not part[[0, 2, 3]].any()


def test_what_mixtures_share_has_no_particle_axis():
    """Means of each image beside shared widths and amplitudes: the same images, and gradients that are sums."""
    grid, p = Grid(24, 1.5), poses(3, torch.float64)
    g = mixture(20, grid, torch.float64)
    means = g.mean + torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = Gaussians(means, g.covariance, g.amplitude)
    assert moved.each
    assert len(moved) == len(g) == 20
    assert not g.each
    cotangent = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = gradients(
        lambda m, s, a: project(Gaussians(m, s, a), p, grid, cutoff=WIDE), [means, g.covariance, g.amplitude], cotangent
    )
    expected = gradients(
        lambda m, s, a: reference.project(Gaussians(m, s, a), p, grid), [means, g.covariance, g.amplitude], cotangent
    )
    assert [t.shape for t in got] == [t.shape for t in (means, g.covariance, g.amplitude)]
    assert_gradients_agree(got, expected, rounding(grid.size, torch.float64))


def test_gradients_of_every_image_do_not_depend_on_threads():
    grid, p = Grid(30, 1.3), poses(3)
    g = each(3, 200, grid)
    cotangent = torch.randn(3, 30, 30, generator=torch.Generator().manual_seed(2))
    leaves = [g.mean, g.covariance, g.amplitude, p.rotation, p.shift]
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                gradients(lambda m, s, a, r, t: project(Gaussians(m, s, a), Poses(r, t), grid), leaves, cotangent)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [12, 21])
def test_voxelize_forward(instruction_set, size):
    grid = Grid(size, 1.7)
    g = mixture(30, grid)
    expected = reference.voxelize(g, grid)
    got = voxelize(g, grid, cutoff=WIDE)
    assert (got - expected).norm() <= rounding(size) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_voxelize_gradient(instruction_set, dtype):
    grid = Grid(20, 1.3)
    g = mixture(40, grid, dtype)
    cotangent = torch.randn(20, 20, 20, generator=torch.Generator().manual_seed(2), dtype=dtype)
    leaves = [g.mean, g.covariance, g.amplitude]
    expected = gradients(
        lambda m, s, a: reference.voxelize(Gaussians(m, s, a), grid),
        [leaf.double() for leaf in leaves],
        cotangent.double(),
    )
    got = gradients(lambda m, s, a: voxelize(Gaussians(m, s, a), grid, cutoff=WIDE), leaves, cotangent)
    assert_gradients_agree(got, expected, rounding(grid.size, dtype))


def test_gradcheck_in_float64():
    grid = Grid(10, 1.5)
    g, p = mixture(3, grid, torch.float64, smallest=1.0, largest=1.5), poses(2, torch.float64)
    leaves = [t.requires_grad_() for t in (g.mean, g.covariance, g.amplitude, p.rotation, p.shift)]
    # A footprint beyond the whole box: a cut that moves with the parameters is not differentiable.
    assert torch.autograd.gradcheck(
        lambda m, s, a, r, t: project(Gaussians(m, s, a), Poses(r, t), grid, cutoff=40.0), leaves
    )
    own = [torch.stack([t.detach(), 1.1 * t.detach()]).requires_grad_() for t in leaves[:3]] + leaves[3:]
    assert torch.autograd.gradcheck(
        lambda m, s, a, r, t: project(Gaussians(m, s, a), Poses(r, t), grid, cutoff=40.0), own
    )
    assert torch.autograd.gradcheck(lambda m, s, a: voxelize(Gaussians(m, s, a), grid, cutoff=40.0), leaves[:3])
    assert torch.autograd.gradcheck(
        lambda m, s, a, r, t: reference.project(Gaussians(m, s, a), Poses(r, t), grid), leaves
    )


def test_footprint_cut_stays_within_its_bound(instruction_set):
    grid = Grid(48, 1.0)
    g, p = mixture(1, grid, seed=5, smallest=2.0), poses(1)
    full = reference.project(g, p, grid)
    for cutoff in (2.5, 3.5, CUTOFF):
        missing = full - project(g, p, grid, cutoff=cutoff)
        bound = math.exp(-(cutoff**2) / 2)
        assert missing.max() <= bound * full.max() * (1 + 1e-4)
        assert missing.min() >= -rounding(grid.size) * full.max()
        assert missing.sum() <= bound * full.sum() * 1.02


def test_sum_over_z_of_voxelize_is_project_at_identity(device):
    grid = Grid(40, 1.3)
    g = moved(mixture(200, grid, smallest=1.0, largest=2.5), device)
    identity = Poses(torch.eye(3)[None], torch.zeros(1, 2)).to(device=device)
    inside = Gaussians(*(t[g.mean.abs().amax(1) < 13] for t in (g.mean, g.covariance, g.amplitude)))
    flat = voxelize(inside, grid, cutoff=WIDE).sum(0)
    image = project(inside, identity, grid, cutoff=WIDE)[0]
    assert (flat - image).norm() <= rounding(grid.size) * image.norm()


def test_mass_is_conserved(device):
    grid = Grid(64, 1.3)
    g = moved(mixture(50, grid, smallest=1.0, largest=2.0), device)
    inside = Gaussians(0.5 * g.mean, g.covariance, g.amplitude)
    total = inside.amplitude.sum()
    torch.testing.assert_close(voxelize(inside, grid, cutoff=WIDE).sum(), total, rtol=1e-5, atol=0)
    images = project(inside, poses(3).to(device=device), grid, cutoff=WIDE)
    torch.testing.assert_close(images.sum((1, 2)), total.expand(3), rtol=1e-5, atol=0)


def test_project_is_linear_in_the_amplitude():
    grid = Grid(24, 1.0)
    g, p = mixture(20, grid), poses(2)
    twice = Gaussians(g.mean, g.covariance, 2 * g.amplitude)
    torch.testing.assert_close(project(twice, p, grid), 2 * project(g, p, grid))


def test_rotating_object_and_pose_together_changes_nothing():
    grid = Grid(32, 1.2)
    g, p = mixture(20, grid, torch.float64), poses(2, torch.float64)
    turn = torch.from_numpy(axis_rotation([1.0, 2.0, -0.5], 0.7))
    turned = Gaussians(g.mean @ turn.T, turn @ g.covariance @ turn.T, g.amplitude)
    got = project(turned, Poses(p.rotation @ turn.T, p.shift), grid)
    torch.testing.assert_close(got, project(g, p, grid))


def test_point_lands_where_the_convention_says(device):
    # docs/conventions.md: Euler (30, 50, 70)°, point (20, -10, 5) Å, origin (3, -4) Å -> (-19.136, -6.225) Å.
    from emsplat.maths.geometry import euler_to_matrix

    grid = Grid(64, 1.0)
    point = Gaussians(torch.tensor([[20.0, -10.0, 5.0]]), 4 * torch.eye(3)[None], torch.ones(1))
    rotation = euler_to_matrix(torch.deg2rad(torch.tensor([[30.0, 50.0, 70.0]])))
    pose = Poses(rotation, torch.tensor([[3.0, -4.0]])).to(device=device)
    image = project(moved(point, device), pose, grid, cutoff=WIDE)[0].cpu()
    axis = torch.arange(64.0) - 32
    assert float((image.sum(0) * axis).sum()) == pytest.approx(-19.136, abs=1e-3)
    assert float((image.sum(1) * axis).sum()) == pytest.approx(-6.225, abs=1e-3)


@pytest.mark.parametrize("shape", [(30.0, 0.3, 0.3), (0.05, 0.05, 0.05), (60.0, 60.0, 60.0), (25.0, 25.0, 0.2)])
def test_extreme_scales(instruction_set, shape):
    """Needles, points and clouds: finite, and equal to the reference where that resolves them."""
    grid = Grid(40, 1.0)
    axes = random_rotations(8, torch.Generator().manual_seed(3)).float()
    covariance = axes @ torch.diag(torch.tensor(shape) ** 2) @ axes.mT
    g = Gaussians(torch.linspace(-9, 9, 24).reshape(8, 3), covariance, torch.ones(8))
    expected = reference.project(Gaussians(*(t.double() for t in vars(g).values())), poses(2, torch.float64), grid)
    got = project(g, poses(2, torch.float64).to(torch.float32), grid, cutoff=WIDE)
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= 2e-3 * expected.norm() + 1e-6


def test_nothing_to_draw():
    grid = Grid(16, 1.0)
    none = Gaussians(torch.zeros(0, 3), torch.zeros(0, 3, 3), torch.zeros(0))
    assert project(none, poses(2), grid).abs().sum() == 0
    assert voxelize(none, grid).abs().sum() == 0
    assert project(mixture(3, grid), poses(0), grid).shape == (0, 16, 16)


def test_same_bits_for_any_number_of_threads():
    grid = Grid(48, 1.0)
    g, p = mixture(500, grid), poses(4)
    upstream = torch.randn(4, 48, 48, generator=torch.Generator().manual_seed(0))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [g.mean, g.covariance, g.amplitude, p.rotation, p.shift]
        results.append(
            [
                project(g, p, grid),
                *gradients(lambda m, s, a, r, t: project(Gaussians(m, s, a), Poses(r, t), grid), leaves, upstream),
            ]
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_covariances_and_their_gradients_are_those_of_the_formula(dtype, count):
    """Along a random upstream gradient, which need not be symmetric; quaternions of any length."""
    rng = torch.Generator().manual_seed(0)
    scale, quaternion, upstream = (
        torch.randn(count, *shape, generator=rng, dtype=torch.float64) for shape in ((3,), (4,), (3, 3))
    )

    def of(function, dtype):
        leaves = [values.to(dtype).requires_grad_() for values in (scale, quaternion)]
        result = function(*leaves)
        return [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(dtype))]

    def formula(scale, quaternion):
        axes = quaternion_to_matrix(quaternion) * scale[:, None, :]
        return axes @ axes.mT

    for found, expected in zip(of(covariances, dtype), of(formula, torch.float64), strict=True):
        assert found.dtype == dtype
        error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-300)
        assert error < 10 * torch.finfo(dtype).eps
    given = [values.to(dtype) for values in (scale, quaternion, upstream)]
    for one, other in zip(covariances_gradient(*given), _covariances_gradient(*given), strict=True):  # of a GPU
        assert (one - other).norm() <= 10 * torch.finfo(dtype).eps * other.norm()
    if dtype == torch.float64 and count == 1:
        leaves = [values.requires_grad_() for values in (scale, quaternion)]
        assert torch.autograd.gradcheck(covariances, leaves)


@pytest.mark.parametrize("gradient", [covariances_gradient, _covariances_gradient])
def test_nothing_turns_round_gaussians(gradient):
    rng = torch.Generator().manual_seed(0)
    quaternion, upstream = torch.randn(50, 4, generator=rng), torch.randn(50, 3, 3, generator=rng)
    scale = torch.rand(50, 1, generator=rng).expand(50, 3).contiguous()
    of_scale, of_quaternion = gradient(scale, quaternion, upstream)
    assert not of_quaternion.any()
    assert of_scale.all()
