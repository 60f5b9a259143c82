"""Classical back-projection: right frame, hand and sign; the contrast check."""

import pytest
import torch

from emsplat.accumulate import backproject, contrast
from emsplat.assess.fsc import fsc_curve
from emsplat.config import SimulateConfig
from emsplat.io.mrc import read_map
from emsplat.particles import open_particles
from emsplat.simulate import simulate


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
