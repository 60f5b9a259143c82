"""The Triton kernels against the dense reference: interpreted on the CPU, and compiled where there is a GPU.

Both run the same tests. The interpreter is slow, so the problems are small; sizes are odd on purpose, and footprints
take several tiles.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emsplat.kernels import cpu, levenberg, reference
from emsplat.maths.geometry import random_rotations, vector_to_matrix
from emsplat.poses import local
from emsplat.poses.local import NO_PRIOR, PoseViews, Prior, Reference
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra, half_plane
from emsplat.sums.statistics import FourierStatistics
from emsplat.sums.window import _window_polynomials
from emsplat.types import Gaussians, Grid, Poses
from test_project import WIDE, assert_gradients_agree, each, mixture, poses, rounding

gpu = pytest.importorskip("emsplat.kernels.gpu", reason="Triton is not installed", exc_type=ImportError)

WITHOUT = not torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreted", marks=pytest.mark.skipif(not WITHOUT, reason="compiled instead")),
        pytest.param(
            "cuda", id="compiled", marks=[pytest.mark.gpu, pytest.mark.skipif(WITHOUT, reason="no CUDA device")]
        ),
    ]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[(32, 32), pytest.param((4, 8), marks=pytest.mark.slow)], ids=["few tiles", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(gpu, "TILE", dict(zip(("ROWS", "COLUMNS"), request.param, strict=True)))


def inputs(device, gaussians, views=None):
    tensors = [gaussians.mean, gaussians.covariance, gaussians.amplitude]
    return [t.to(device) for t in (tensors if views is None else [*tensors, views.rotation, views.shift])]


def reference_gradients(function, leaves, cotangent):
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    return torch.autograd.grad((function(*leaves) * cotangent.double()).sum(), leaves)


def cotangent(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def relative(got, expected):
    return float((got.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("size", "count", "views"), [(16, 9, 2), (33, 7, 3), (50, 5, 1)])
def test_project_forward(device, tile, size, count, views):
    grid = Grid(size, 1.7)
    g, p = mixture(count, grid), poses(views)
    got = gpu.project(*inputs(device, g, p), size, grid.pixel_size, WIDE)
    assert got.device.type == device.type
    assert relative(got, reference.project(g, p, grid)) < rounding(size)


@pytest.mark.parametrize(("size", "count", "views"), [(16, 9, 2), (37, 5, 3)])
def test_project_gradient(device, tile, size, count, views):
    grid = Grid(size, 1.3)
    g, p = mixture(count, grid), poses(views)
    upstream = cotangent(views, size, size)

    def slow(m, s, a, r, t):
        return reference.project(Gaussians(m, s, a), Poses(r, t), grid)

    leaves = [g.mean, g.covariance, g.amplitude, p.rotation, p.shift]
    expected = reference_gradients(slow, leaves, upstream)
    arguments = (*inputs(device, g, p), upstream.to(device), grid.pixel_size, WIDE)
    got = gpu.project_gradient(*arguments, True)
    assert_gradients_agree([t.cpu() for t in got], expected, rounding(grid.size))
    without = gpu.project_gradient(*arguments, False)
    assert all(torch.equal(one, other) for one, other in zip(got[:3], without[:3], strict=True))
    assert not without[3].any()
    assert not without[4].any()


@pytest.mark.parametrize(("size", "count", "views"), [(16, 6, 3), (33, 4, 2)])
def test_every_image_may_have_its_own_mixture(device, tile, size, count, views):
    grid, g, p = Grid(size, 1.3), each(views, count, Grid(size, 1.3)), poses(views)
    arguments = inputs(device, g, p)
    got = gpu.project_each(*arguments, size, grid.pixel_size, WIDE)
    assert relative(got, reference.project(g, p, grid)) < rounding(grid.size)
    upstream = cotangent(views, size, size)

    def slow(m, s, a, r, t):
        return reference.project(Gaussians(m, s, a), Poses(r, t), grid)

    leaves = [g.mean, g.covariance, g.amplitude, p.rotation, p.shift]
    numbers = (upstream.to(device), grid.pixel_size, WIDE)
    found = gpu.project_each_gradient(*arguments, *numbers, True)
    assert_gradients_agree([t.cpu() for t in found], reference_gradients(slow, leaves, upstream), rounding(grid.size))
    without = gpu.project_each_gradient(*arguments, *numbers, False)
    assert all(torch.equal(a, b) for a, b in zip(without[:3], found[:3], strict=True))


@pytest.mark.parametrize(("size", "count"), [(8, 5), (13, 3)])
def test_voxelize_forward(device, tile, size, count):
    grid = Grid(size, 1.7)
    g = mixture(count, grid, largest=2.0)
    got = gpu.voxelize(*inputs(device, g), size, grid.pixel_size, WIDE)
    assert relative(got, reference.voxelize(g, grid)) < rounding(size)


@pytest.mark.parametrize(("size", "count"), [(8, 5), (13, 3)])
def test_voxelize_gradient(device, tile, size, count):
    grid = Grid(size, 1.3)
    g = mixture(count, grid, largest=2.0)
    upstream = cotangent(size, size, size)
    expected = reference_gradients(
        lambda m, s, a: reference.voxelize(Gaussians(m, s, a), grid), [g.mean, g.covariance, g.amplitude], upstream
    )
    got = gpu.voxelize_gradient(*inputs(device, g), upstream.to(device), grid.pixel_size, WIDE)
    assert_gradients_agree([t.cpu() for t in got], expected, rounding(grid.size))


def test_float64(device):
    """Positions and sums are of the inputs' dtype; pixel size and cutoff are float32 numbers on a GPU."""
    grid = Grid(16, 1.5)
    g, p = mixture(5, grid, torch.float64), poses(2, torch.float64)
    got = gpu.project(*inputs(device, g, p), grid.size, grid.pixel_size, WIDE)
    assert got.dtype == torch.float64
    assert relative(got, reference.project(g, p, grid)) < 1e-6


@pytest.mark.parametrize("parts", [1, 3, 1000])
def test_the_work_may_be_shared_out_anyhow(device, monkeypatch, parts):
    grid = Grid(12, 1.5)
    g, p = mixture(3, grid), poses(5)
    monkeypatch.setattr(gpu, "_PROGRAMS", 3 * parts)
    flat, solid = inputs(device, g, p), inputs(device, g)
    numbers = (grid.pixel_size, WIDE)
    assert relative(gpu.project(*flat, 12, *numbers), reference.project(g, p, grid)) < rounding(12)
    assert relative(gpu.voxelize(*solid, 12, *numbers), reference.voxelize(g, grid)) < rounding(12)
    leaves, images, volume = inputs("cpu", g, p), cotangent(5, 12, 12), cotangent(12, 12, 12)
    for got, expected in (
        (
            gpu.project_gradient(*flat, images.to(device), *numbers, True),
            cpu.project_gradient(*leaves, images, *numbers, True),
        ),
        (
            gpu.voxelize_gradient(*solid, volume.to(device), *numbers),
            cpu.voxelize_gradient(*leaves[:3], volume, *numbers),
        ),
    ):
        assert_gradients_agree([t.cpu() for t in got], expected, rounding(grid.size))


def test_only_the_symmetric_part_of_a_covariance_counts(device):
    grid = Grid(16, 1.5)
    g, p = mixture(3, grid), poses(2)
    skewed = Gaussians(g.mean, g.covariance + 0.3 * torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]]), g.amplitude)
    upright = gpu.project(*inputs(device, g, p), 16, 1.5, WIDE)
    torch.testing.assert_close(gpu.project(*inputs(device, skewed, p), 16, 1.5, WIDE), upright)


@pytest.mark.parametrize("cutoff", [2.0, 4.0])
def test_footprint_is_cut_at_the_ellipse(device, cutoff):
    """What is left out is at most exp(-cutoff²/2) of a Gaussian's peak, and nothing within the ellipse."""
    grid = Grid(32, 1.0)
    g = mixture(1, grid, largest=4.0)
    g = Gaussians(torch.zeros_like(g.mean), g.covariance, g.amplitude)
    whole = reference.project(g, poses(1), grid)
    cut = gpu.project(*inputs(device, g, poses(1)), grid.size, 1.0, cutoff).cpu()
    left_out = cut == 0
    assert left_out.any()
    assert float(whole[left_out].max()) <= float(torch.exp(torch.tensor(-(cutoff**2) / 2))) * float(whole.max()) * 1.001
    assert relative(cut[~left_out], whole[~left_out]) < 1e-5


@pytest.mark.parametrize(
    ("scale", "size"),
    [((1e-3, 1e-3, 1e-3), 17), ((40.0, 40.0, 40.0), 17), ((0.05, 3.0, 3.0), 17), ((1e6, 1e6, 1e6), 9)],
)
def test_extreme_scales(device, scale, size):
    """As on the CPU, up to the pixels of a footprint's bounding box that the ellipse leaves out."""
    axes = random_rotations(4, torch.Generator().manual_seed(3)).float()
    covariance = axes @ torch.diag(torch.tensor(scale) ** 2) @ axes.mT
    mean = torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0.25], [-7.0, 8.0, 3.0], [1e5, 0, 0]])
    g, p = Gaussians(mean, covariance, torch.ones(4)), poses(2)
    flat, solid = inputs(device, g, p), inputs(device, g)
    small = cotangent(2, size, size)
    for got, expected in (
        (gpu.project(*flat, size, 1.0, WIDE), cpu.project(*inputs("cpu", g, p), size, 1.0, WIDE)),
        (gpu.voxelize(*solid, size, 1.0, WIDE), cpu.voxelize(*inputs("cpu", g), size, 1.0, WIDE)),
    ):
        assert torch.isfinite(got).all()
        assert float((got.cpu() - expected).abs().max()) <= 1e-4 * float(expected.abs().max()) + 1e-12
    gradients = gpu.project_gradient(*flat, small.to(device), 1.0, WIDE, True)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_gaussians_that_are_not_finite_draw_nothing(device):
    """They must not reach memory outside the image; the loss says that the fit diverged."""
    grid = Grid(16, 1.0)
    g = mixture(4, grid)
    g.mean[0], g.mean[1], g.covariance[2] = float("nan"), float("inf"), float("nan")
    p = poses(2)
    expected = gpu.project(*(t[3:] for t in inputs(device, g)), *inputs(device, g, p)[3:], 16, 1.0, WIDE)
    assert torch.equal(gpu.project(*inputs(device, g, p), 16, 1.0, WIDE), expected)


def test_nothing_to_draw(device):
    none, p = mixture(0, Grid(8, 1.0)), poses(2)
    assert not gpu.project(*inputs(device, none, p), 8, 1.0, 4.0).any()
    assert not gpu.voxelize(*inputs(device, none), 8, 1.0, 4.0).any()
    upstream = torch.ones(2, 8, 8, device=device)
    gradients = gpu.project_gradient(*inputs(device, none, p), upstream, 1.0, 4.0, True)
    assert [tuple(t.shape) for t in gradients] == [(0, 3), (0, 3, 3), (0,), (2, 3, 3), (2, 2)]
    assert not gradients[3].any()
    assert [len(t) for t in gpu.voxelize_gradient(*inputs(device, none), upstream[:1].expand(8, 8, 8), 1.0, 4.0)] == [
        0
    ] * 3
    g, nobody = mixture(3, Grid(8, 1.0)), poses(0)
    assert gpu.project(*inputs(device, g, nobody), 8, 1.0, 4.0).shape == (0, 8, 8)
    gradients = gpu.project_gradient(*inputs(device, g, nobody), upstream[:0], 1.0, 4.0, False)
    assert not any(bool(t.any()) for t in gradients)


def test_gradients_are_the_same_in_each_run(device):
    grid = Grid(24, 1.0)
    g, p = mixture(6, grid), poses(3)
    arguments = (*inputs(device, g, p), cotangent(3, 24, 24).to(device), 1.0, 4.0, True)
    first, second = gpu.project_gradient(*arguments), gpu.project_gradient(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("box", "side"), [(12, 12), (10, 16)])
def test_insert(device, box, side):
    """As the CPU's, for images on the volume's box and on another one."""
    expected = FourierStatistics(Grid(side, 2.0))
    total, total_weight = expected.numerator.clone().to(device), expected.weight.clone().to(device)
    rng = torch.Generator().manual_seed(0)
    numerator = torch.randn(3, box, box // 2 + 1, generator=rng, dtype=torch.complex64)
    weight = torch.rand(3, box, box // 2 + 1, generator=rng)
    rotation = random_rotations(3, rng).float()
    rotation[0] = torch.eye(3)  # points on the edge between the half spaces
    polynomials = torch.from_numpy(_window_polynomials()).float()
    numbers = (0.499 * box, 1.5 * side / box)
    cpu.insert(expected.numerator, expected.weight, numerator, weight, rotation, polynomials, *numbers)
    slices = (t.to(device) for t in (numerator, weight, rotation, polynomials))
    gpu.insert(total, total_weight, *slices, *numbers)
    assert relative(total_weight, expected.weight) < 3e-6
    assert relative(total, expected.numerator) < 3e-6


@pytest.fixture
def sights():
    """A volume, and images of it in poses that are off: magnified differently, some coefficients without meaning."""
    rng = torch.Generator().manual_seed(3)
    lattice = Lattice(7)
    axis = (torch.arange(lattice.size) - lattice.size // 2) / lattice.size
    envelope = torch.exp(-(axis**2 + axis[:, None] ** 2 + axis[:, None, None] ** 2) / (2 * 0.15**2))
    volume = torch.randn(3 * (lattice.size,), generator=rng) * envelope
    reference = Reference(lattice, volume, Grid(32, 3.0))
    frequency, _ = half_plane(6, 1.0, 32)
    true = random_rotations(4, rng)
    values = torch.complex(*(torch.randn(4, len(frequency) + 3, generator=rng) for _ in range(2)))
    transfer = torch.randn(values.shape, generator=rng)
    magnification = torch.eye(2) + 0.02 * torch.randn(4, 2, 2, generator=rng)
    known = torch.cat([frequency, torch.full((3, 2), 7.5)])
    image, none = torch.arange(4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.float64)
    spectra = Spectra(values, transfer, known, image, true.float(), torch.ones(4), image, 96.0)
    shown = lattice.slices(volume[None], replace(spectra, frequency=known @ magnification[0].T))[:, 0]
    spectra = replace(spectra, values=0.5 * values + transfer * torch.cat([shown, values[:, shown.shape[1] :]], 1))
    start = vector_to_matrix(0.1 * torch.randn(4, 3, generator=rng, dtype=torch.float64)) @ true
    views = PoseViews(spectra, magnification, image, start, none, true, none + 0.3, 96.0)
    return reference, views.take(torch.tensor([0, 1, 2, 3, 1]))


@pytest.mark.parametrize(("steps", "prior"), [(0, NO_PRIOR), (12, NO_PRIOR), (12, Prior(0.02, 0.5))])
def test_poses(device, monkeypatch, sights, steps, prior):
    """As the CPU finds them: what views say where they are, and where they go; one image in two views."""
    reference, views = sights
    expected, start = local.descend(reference, views, prior, 6, steps), views.rotation.clone()
    with monkeypatch.context() as patch:
        patch.setattr(local, "backend", lambda _: gpu)
        found = local.descend(replace(reference, device=device), views, prior, 6, steps)
    assert (expected.looks > 1).all() == (steps > 0)
    assert torch.equal(views.rotation, start)
    size = expected.power
    for name in ("before", "after", "power"):
        assert ((getattr(found, name) - getattr(expected, name)) / size).abs().max() < 1e-4
    # Rounding may decide whether a last step of less than 0.02 nats is made.
    assert (found.looks - expected.looks).abs().max() <= (steps > 0)
    assert (found.poses.rotation - expected.poses.rotation).abs().max() < (1e-3 if steps else 1e-12)
    assert (found.poses.shift - expected.poses.shift).abs().max() < (1e-2 if steps else 1e-12)
    diagonal = expected.hessian.diagonal(dim1=1, dim2=2).sqrt()
    away = (found.hessian - expected.hessian) / diagonal[:, None] / diagonal[..., None]
    assert away.abs().max() < (1e-2 if steps else 1e-5)


def test_turns_of_poses():
    vector = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vector *= torch.cat([torch.logspace(-12, 0, 49, dtype=torch.float64), torch.zeros(1)])[:, None]
    known = random_rotations(50, torch.Generator().manual_seed(2))
    after = levenberg.turned(vector, known)
    assert (after - vector_to_matrix(vector) @ known).abs().max() < 1e-14
    assert (levenberg.between(after, known) - vector).abs().max() < 1e-14


_COMPILE = """
from emsplat.kernels import gpu, insert_triton, pose_triton, splat_triton
from roofline import compiled

for capability in (75, 80, 90):
    for name in ("project", "project_gradient", "pose_gradient", "voxelize", "voxelize_gradient"):
        made = compiled(getattr(splat_triton, name + "_kernel"), capability, **gpu.TILE)
        print(capability, name, made.metadata.shared, ".local" in made.asm["ptx"])
    made = compiled(insert_triton.insert_kernel, capability, DEGREE=7, POINTS=gpu.POINTS)
    print(capability, "insert", made.metadata.shared, ".local" in made.asm["ptx"])
    made = compiled(pose_triton.pose_kernel, capability, DEGREE=7, POINTS=gpu.POINTS)
    print(capability, "pose", made.metadata.shared, ".local" in made.asm["ptx"])
"""


@pytest.mark.slow
def test_kernels_compile_without_a_gpu(tmp_path):
    """For three generations of GPUs; the interpreter would not notice what the compiler refuses."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _COMPILE]
    folder = Path(__file__).parents[1] / "benchmarks"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 21
    assert all(spilled == "False" for *_, spilled in lines)
    assert all(shared == "0" for _, name, shared, _ in lines if name not in ("insert", "pose"))
