"""Classical back-projection: right frame, hand and sign; the contrast check."""

from itertools import combinations, permutations

import pytest
import torch

from emsplat.accumulate import FourierStatistics, backproject, contrast
from emsplat.assess.fsc import fsc_curve
from emsplat.config import SimulateConfig
from emsplat.ctf import ctf
from emsplat.fourier import irfft, rfft
from emsplat.geometry import random_rotations
from emsplat.io.mrc import read_map
from emsplat.particles import open_particles
from emsplat.project import project, voxelize
from emsplat.simulate import simulate
from emsplat.types import Batch, Gaussians, Grid, Optics, Poses


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack") / "p"
    return simulate(SimulateConfig(box=32, pixel_size=4.0, particles=400, snr=2.0, atoms=1500), None, folder)


def test_back_projection_is_the_truth_in_frame_hand_and_sign(star):
    truth, grid = read_map(star.parent / "truth.mrc")
    volume = backproject(open_particles(star))
    right = fsc_curve(volume, truth, grid).value[1:12]
    assert float(right.mean()) > 0.9
    for axes in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        turned = torch.roll(truth.flip(axes), [1] * len(axes), axes)
        assert float(fsc_curve(volume, turned, grid).value[1:12].mean()) < 0.7


def test_cropping_first_gives_the_same_low_resolution_map(star):
    stack = open_particles(star)
    coarse, full = backproject(stack, 16), backproject(stack)
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(full)))[8:24, 8:24, 8:24]
    low = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(spectrum)).real) / 8
    centre = slice(4, 12)
    a, b = coarse[centre, centre, centre].flatten(), low[centre, centre, centre].flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.98


def test_symmetry_is_imposed(star):
    volume = backproject(open_particles(star, symmetry="C2"))
    turned = torch.roll(volume.flip([1, 2]), [1, 1], [1, 2])
    inner = slice(4, 28)
    a, b = volume[inner, inner, inner].flatten(), turned[inner, inner, inner].flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.99


def test_contrast_tells_bright_from_dark(star):
    stack = open_particles(star)
    assert contrast(stack) > 1
    assert contrast(stack.inverted()) == pytest.approx(-contrast(stack), rel=1e-3)


def test_experimental_particles_are_bright(shared_data):
    assert contrast(open_particles(shared_data / "bgal" / "particles.star", symmetry="D2"), particles=400) > 1


class Memory:
    """Noise-free images of a smooth mixture with the interface of a ParticleStack, never written or normalised."""

    def __init__(self, count=500, sign=1.0):
        rng = torch.Generator().manual_seed(0)
        self.grid = Grid(32, 3.0)
        self.symmetry = torch.eye(3, dtype=torch.float64)[None]
        mean = 11 * torch.randn(12, 3, generator=rng) * torch.tensor([1.0, 0.8, 0.6])
        self.truth = Gaussians(mean, 25 * torch.eye(3).expand(12, 3, 3), 1 + torch.rand(12, generator=rng))
        poses = Poses(random_rotations(count, rng).float(), 3 * torch.randn(count, 2, generator=rng))
        rows = torch.tensor([300, 2.7, 0.1, 9000, 8500, 0.6, 0, 0, 1]).repeat(count, 1)
        rows[:, 3:5] += 12000 * torch.rand(count, 1, generator=rng)
        optics = Optics(*rows.unbind(1))
        images = irfft(rfft(project(self.truth, poses, self.grid)) * ctf(optics, self.grid))
        self.all = Batch(sign * images, poses, optics, torch.zeros(count).long(), torch.arange(count))

    def __len__(self):
        return len(self.all)

    def take(self, rows):
        part = object.__new__(Memory)
        vars(part).update(vars(self), all=self.all[rows])
        return part

    def sequential(self, size):
        for rows in torch.arange(len(self)).split(size):
            yield self.all[rows]


def test_noise_free_images_give_the_map_in_frame_and_hand():
    stack = Memory()
    truth, volume = voxelize(stack.truth, stack.grid), backproject(stack)

    def likeness(other):
        inner = slice(3, 29)
        pair = torch.stack([volume[inner, inner, inner].flatten(), other[inner, inner, inner].flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    assert likeness(truth) > 0.95
    flips = [axes for n in (1, 2, 3) for axes in combinations(range(3), n)]
    assert max(likeness(torch.roll(truth.flip(axes), [1] * len(axes), axes)) for axes in flips) < 0.85
    assert max(likeness(truth.permute(order)) for order in list(permutations(range(3)))[1:]) < 0.85


def test_noise_free_images_give_the_grey_values_of_the_map():
    stack = Memory()
    truth, volume = voxelize(stack.truth, stack.grid), backproject(stack)
    dense = truth > 0.3 * truth.max()
    assert float((volume[dense] * truth[dense]).sum() / truth[dense].square().sum()) == pytest.approx(1, abs=0.15)


def test_brightness_does_not_fade_away_from_the_centre():
    stack = Memory()
    truth, volume = voxelize(stack.truth, stack.grid), backproject(stack)
    axis = torch.arange(32) - 16
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    dense = truth > 0.15 * truth.max()
    inner, outer = dense & (radius < 5), dense & (radius > 7)
    assert int(outer.sum()) > 50
    gain = [float((volume[part] * truth[part]).sum() / truth[part].square().sum()) for part in (inner, outer)]
    assert gain[1] / gain[0] == pytest.approx(1, abs=0.02)


def test_contrast_of_noise_free_images():
    assert contrast(Memory(200)) > 1
    assert contrast(Memory(200, sign=-1.0)) < -1


def test_one_slice_lands_in_the_plane_of_its_first_two_rows():
    """Linear weights: a slice puts its whole weight within one cell of its plane, and nothing else anywhere."""
    grid = Grid(16, 1.0)
    rotation = random_rotations(1, torch.Generator().manual_seed(3)).float()
    statistics = FourierStatistics(grid)
    ones = torch.ones(1, 16, 9)
    statistics.add(torch.complex(ones, 0 * ones), ones, rotation)
    side = len(statistics.weight)
    ky, kx = torch.meshgrid(torch.fft.fftfreq(16, 1 / 16), torch.fft.rfftfreq(16, 1 / 16), indexing="ij")
    assert float(statistics.weight.sum()) == pytest.approx(int((kx**2 + ky**2 < 64).sum()), rel=1e-4)
    torch.testing.assert_close(statistics.numerator.real, statistics.weight)
    place = torch.fft.fftfreq(side, 1 / side)
    zyx = torch.stack(torch.meshgrid(place, place, place, indexing="ij"), -1)[statistics.weight > 0]
    assert float((zyx.flip(-1) @ rotation[0, 2]).abs().max()) < 3**0.5
