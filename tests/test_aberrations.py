"""Aberrations and treated images: against formulas written out here, and through files into both engines."""

import math
from dataclasses import replace

import pytest
import torch

from emsplat.fitting.images import ImageObjective
from emsplat.imaging.ctf import beam_tilt, ctf, ctf_at, in_image, observe, zernike, zernike_phase
from emsplat.imaging.project import voxelize
from emsplat.io.mrc import writing_stack
from emsplat.io.relion.write import write_table
from emsplat.io.table import OpticsGroup, ParticleTable
from emsplat.maths.fourier import frequencies, irfft
from emsplat.maths.geometry import random_rotations
from emsplat.particles.open import open_particles
from emsplat.sums.statistics import equations_of
from emsplat.types import PHASE_FLIPPED, PREMULTIPLIED, RAW, Aberrations, Gaussians, Grid, Optics, Poses

GRID = Grid(32, 2.0)
ODD = [
    lambda x, y: y,
    lambda x, y: x,
    lambda x, y: 3 * x**2 * y - y**3,
    lambda x, y: (3 * (x**2 + y**2) - 2) * y,
    lambda x, y: (3 * (x**2 + y**2) - 2) * x,
    lambda x, y: x**3 - 3 * x * y**2,
]
EVEN = [
    lambda x, y: torch.ones_like(x),
    lambda x, y: 2 * x * y,
    lambda x, y: 2 * (x**2 + y**2) - 1,
    lambda x, y: x**2 - y**2,
    lambda x, y: 4 * (x**3 * y - x * y**3),
    lambda x, y: (4 * (x**2 + y**2) - 3) * 2 * x * y,
    lambda x, y: 6 * (x**2 + y**2) ** 2 - 6 * (x**2 + y**2) + 1,
    lambda x, y: (4 * (x**2 + y**2) - 3) * (x**2 - y**2),
    lambda x, y: x**4 - 6 * x**2 * y**2 + y**4,
]
MAGNIFICATION = torch.tensor([[1.03, 0.01], [-0.02, 0.97]], dtype=torch.float64)
ODD_VALUES = torch.tensor([62.0, -93.0, 40.0, 30.0, -45.0, 36.0], dtype=torch.float64)
# Z0 - Z2 + Z6 = 0: a phase at k = 0 would be amplitude contrast, which no microscope has much of.
EVEN_VALUES = torch.tensor([-13.0, 2.0, -3.0, 4.0, 20.0, -15.0, 10.0, 12.0, -18.0], dtype=torch.float64)


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bend(count):
    return Aberrations(MAGNIFICATION.repeat(count, 1, 1), ODD_VALUES.repeat(count, 1), EVEN_VALUES.repeat(count, 1))


def optics(count, **more):
    rows = torch.tensor([300, 2.7, 0.1, 9000, 8500, 0.6, 0, 0, 1], dtype=torch.float64).repeat(count, 1)
    rows[:, 3:5] += 12000 * torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    return Optics(*rows.unbind(1), **more)


@pytest.mark.parametrize(("odd", "expected"), [(True, ODD), (False, EVEN)])
def test_zernike_polynomials_in_order(odd, expected):
    x, y = values(20, seed=1), values(20, seed=2)
    for index, formula in enumerate(expected):
        torch.testing.assert_close(zernike(index, x, y, odd=odd), formula(x, y))


def test_beam_tilt_is_the_published_phase():
    """-2π Cs λ² k² (tx kx + ty ky) with Cs and λ in Å and the tilt in rad."""
    tilt = torch.tensor([[0.5, -1.2]], dtype=torch.float64)
    bent = Aberrations(
        torch.eye(2).double()[None], beam_tilt(tilt, torch.tensor([300.0]), torch.tensor([2.7])), torch.zeros(1, 0)
    )
    kx, ky = 0.2 * values(30, seed=1), 0.2 * values(30, seed=2)
    expected = -2 * math.pi * 2.7e7 * 0.01968762**2 * (kx**2 + ky**2) * 1e-3 * (0.5 * kx - 1.2 * ky)
    torch.testing.assert_close(zernike_phase(bent, kx, ky, odd=True)[0], expected, rtol=1e-6, atol=1e-9)


def test_even_aberrations_and_magnification_in_the_ctf():
    one = optics(1, aberrations=bend(1))
    kx, ky = 0.1 * values(30, seed=1), 0.1 * values(30, seed=2)
    x, y = (MAGNIFICATION @ torch.stack([kx, ky])).unbind(0)
    k2, wavelength, cs = x**2 + y**2, 0.01968762, 2.7e7
    defocus = 8750 + 250 * torch.cos(2 * (torch.atan2(y, x) - 0.6))
    gamma = -math.pi * wavelength * defocus * k2 + math.pi / 2 * cs * wavelength**3 * k2**2 - math.asin(0.1)
    gamma += sum(c * formula(x, y) for c, formula in zip(EVEN_VALUES, EVEN, strict=True))
    torch.testing.assert_close(ctf_at(one, kx, ky)[0], -torch.sin(gamma), atol=2e-5, rtol=0)


def test_aberrations_of_a_perfect_image_change_nothing():
    none = Aberrations(torch.eye(2).double().repeat(3, 1, 1), torch.zeros(3, 6).double(), torch.zeros(3, 9).double())
    torch.testing.assert_close(ctf(optics(3, aberrations=none), GRID), ctf(optics(3), GRID), atol=1e-12, rtol=0)


def test_magnification_acts_behind_the_pose():
    """A turn of the particle comes first, then Mᵀ: points of the turned particle lie at Mᵀ times their places."""
    turn, rotation = random_rotations(2, torch.Generator().manual_seed(4)).double()
    points = values(20, 3, seed=6)
    one = optics(1, aberrations=bend(1))
    seen = in_image((turn @ rotation)[None], one)[0]
    expected = (points @ rotation.T @ turn.T)[:, :2] @ MAGNIFICATION
    torch.testing.assert_close((points @ seen.T)[:, :2], expected)
    assert torch.equal(seen[2], (turn @ rotation)[2])
    assert torch.equal(in_image(rotation[None], optics(1))[0], rotation)
    torch.autograd.gradcheck(lambda matrix: in_image(matrix, one), rotation[None].requires_grad_())


def test_poses_of_a_batch_are_rotations(tmp_path):
    stack = write(tmp_path, bent=True, count=8)
    batch = next(stack.sequential(8))
    torch.testing.assert_close(batch.poses.rotation, stack.table.poses.rotation.float())
    assert float((batch.optics.aberrations.magnification[0] - MAGNIFICATION).abs().max()) < 1e-6


def mixture():
    rng = torch.Generator().manual_seed(0)
    mean = 5 * torch.randn(14, 3, generator=rng, dtype=torch.float64)
    covariance = 6 * torch.eye(3, dtype=torch.float64).repeat(14, 1, 1)
    return Gaussians(mean, covariance, 1 + torch.rand(14, generator=rng, dtype=torch.float64))


def true_spectra(poses, optics):
    """C(Mk) exp(iψ(Mk)) P(Mk) exp(2πi k·origin), frequency by frequency; nothing here is the package's but the CTF."""
    gaussians = mixture()
    ky, kx = frequencies(GRID, dtype=torch.float64)
    k = torch.stack(torch.broadcast_tensors(kx, ky), -1)
    bent = optics.aberrations
    matrix = torch.eye(2).double().repeat(len(optics), 1, 1) if bent is None else bent.magnification
    true = torch.einsum("pij,yxj->pyxi", matrix, k)
    rows = poses.rotation[:, :2]
    spread = rows[:, None] @ gaussians.covariance @ rows.mT[:, None]
    exponent = -2 * math.pi**2 * torch.einsum("pyxi,pgij,pyxj->pgyx", true, spread, true)
    phase = -2 * math.pi * torch.einsum("pyxi,pgi->pgyx", true, gaussians.mean @ rows.mT)
    slices = torch.einsum("g,pgyx->pyx", gaussians.amplitude + 0j, torch.exp(torch.complex(exponent, phase)))
    if bent is not None:
        slices = slices * torch.exp(
            1j * sum(c * formula(true[..., 0], true[..., 1]) for c, formula in zip(ODD_VALUES, ODD, strict=True))
        )
    shifted = torch.exp(2j * math.pi * torch.einsum("yxi,pi->pyx", k, poses.shift))
    return slices * shifted * ctf(optics, GRID)


def write(folder, *, bent=False, treatment=None, count=300, noise=0.3, say=True):
    """Particles as files; with ``say`` false the STAR file is silent about aberrations and treatment."""
    rng = torch.Generator().manual_seed(1)
    poses = Poses(random_rotations(count, rng), 2 * values(count, 2, seed=5))
    plain = optics(count)
    seen = replace(plain, aberrations=bend(count)) if bent else plain
    images = irfft(true_spectra(poses, seen)).float()
    images = images / images.std() + noise * torch.randn(images.shape, generator=rng)
    if treatment is not None:
        transfer = ctf(seen.to(torch.float32), GRID)
        factor = {PHASE_FLIPPED: transfer.sign(), PREMULTIPLIED: transfer}[treatment]
        images = torch.fft.irfft2(torch.fft.rfft2(images) * factor, s=images.shape[-2:])
        seen = replace(seen, treatment=torch.full((count,), treatment))
    folder.mkdir(parents=True, exist_ok=True)
    with writing_stack(folder / "p.mrcs", count, GRID) as out:
        out(images)
    zero = torch.zeros(count, dtype=torch.int64)
    table = ParticleTable(
        sources=(folder / "p.star",),
        source=zero,
        row=torch.arange(count),
        poses=poses,
        optics=seen if say else plain,
        groups=(OpticsGroup("one", GRID.pixel_size, GRID.size),),
        optics_group=zero,
        half=1 + torch.arange(count) % 2,
        micrograph=torch.arange(count) // 10,
        stacks=(folder / "p.mrcs",),
        stack=zero,
        image=torch.arange(count),
    )
    write_table(folder / "p.star", table, table.half)
    return open_particles(folder / "p.star", diameter=50.0)


def likeness(stack):
    volume, truth = equations_of(stack).solve(), voxelize(mixture(), GRID)
    return float(torch.corrcoef(torch.stack([volume.flatten(), truth.flatten().float()]))[0, 1])


def relative_loss(stack):
    """Loss of the true mixture, scaled to the images, beside that of nothing."""
    goal = ImageObjective(stack, batch=64, seed=0, cutoff=6.0)
    batch = next(iter(stack.sequential(64)))
    truth = Gaussians(*(part.float() for part in vars(mixture()).values()))

    def loss(gain):
        return float(goal.loss(Gaussians(truth.mean, truth.covariance, gain * truth.amplitude), batch))

    nothing, one, two = loss(0.0), loss(1.0), loss(2.0)
    curve, slope = 0.5 * (two - 2 * one + nothing), 0.5 * (4 * one - two - 3 * nothing)
    return (nothing - slope**2 / (4 * curve)) / nothing


def test_written_aberrations_read_back(tmp_path):
    found = write(tmp_path, bent=True, count=20).table.optics.aberrations
    assert found is not None
    for name, expected in vars(bend(20)).items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-8, atol=0)


def test_both_engines_undo_aberrations(tmp_path):
    straight = write(tmp_path / "straight")
    known = write(tmp_path / "known", bent=True)
    ignored = write(tmp_path / "ignored", bent=True, say=False)
    assert likeness(known) > likeness(straight) - 0.005
    assert likeness(ignored) < likeness(straight) - 0.03
    assert relative_loss(known) < 1.1 * relative_loss(straight) < 0.12
    assert relative_loss(ignored) > 1.7 * relative_loss(straight)


@pytest.mark.parametrize("treatment", [PHASE_FLIPPED, PREMULTIPLIED])
@pytest.mark.parametrize("bent", [False, True])
def test_both_engines_read_treated_images(tmp_path, treatment, bent):
    raw = write(tmp_path / "raw", bent=bent)
    known = write(tmp_path / "known", treatment=treatment, bent=bent)
    ignored = write(tmp_path / "ignored", treatment=treatment, bent=bent, say=False)
    assert likeness(known) > likeness(raw) - 0.005
    assert likeness(ignored) < likeness(raw) - 0.15
    assert relative_loss(known) < 1.1 * relative_loss(raw) < 0.12
    assert relative_loss(ignored) > 3 * relative_loss(raw)


def test_premultiplied_noise_is_white_again(tmp_path):
    """Background noise that was multiplied by the CTF has one power at all frequencies after reading."""
    stack = write(tmp_path, treatment=PREMULTIPLIED, noise=20.0)
    batch = next(iter(stack.sequential(64)))
    power = observe(batch, GRID).spectrum.abs().square().mean(0)
    ky, kx = frequencies(GRID)
    k = (kx**2 + ky**2).sqrt()
    bands = [power[(k > low) & (k <= low + 0.05)].mean() for low in (0.05, 0.1, 0.15, 0.2)]
    assert max(bands) < 1.15 * min(bands)


def test_raw_and_treated_images_in_one_set():
    mixed = optics(3, treatment=torch.tensor([RAW, PHASE_FLIPPED, PREMULTIPLIED]))
    assert mixed[1:].treatment.tolist() == [PHASE_FLIPPED, PREMULTIPLIED]
    assert mixed.to(torch.float32).treatment.dtype == torch.int64
