"""Transforms of centred images, shells, shifts and cropping."""

from itertools import product

import pytest
import torch

from emsplat.maths import fourier
from emsplat.maths.fourier import (
    blurred,
    by_columns,
    convolve,
    crop,
    frequencies,
    hermitian_weight,
    irfft,
    rfft,
    shell_index,
    shift_phase,
    widen,
)
from emsplat.types import Grid


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_symmetric_object_about_the_centre_pixel_is_real(dims):
    size = 12
    axis = (torch.arange(size) - size // 2).double()
    square = sum(axis.reshape([-1 if i == j else 1 for j in range(dims)]) ** 2 for i in range(dims))
    spectrum = rfft(torch.exp(-square / 5), dims)
    assert spectrum.imag.abs().max() < 1e-12
    assert spectrum.flatten()[0].real > 0


@pytest.mark.parametrize("dims", [2, 3])
def test_irfft_inverts_rfft(dims):
    image = noise(*[10] * dims)
    torch.testing.assert_close(irfft(rfft(image, dims), dims), image)


def test_shifting_by_the_origin_centres_the_particle():
    """A particle at pixel (x, y) = centre - origin comes to the centre (RELION's sign)."""
    grid = Grid(16, 2.0)
    image = torch.zeros(1, 16, 16, dtype=torch.float64)
    origin = torch.tensor([[6.0, -4.0]], dtype=torch.float64)  # Å: 3 and -2 pixels
    image[0, 8 + 2, 8 - 3] = 1
    moved = irfft(rfft(image) * shift_phase(origin, grid))
    assert moved[0, 8, 8] == pytest.approx(1)


def test_shift_phase_is_a_roll_for_whole_pixels():
    grid = Grid(12, 1.5)
    images = noise(2, 12, 12)
    moved = irfft(rfft(images) * shift_phase(torch.tensor([[1.5, 3.0], [-4.5, 0.0]]).double(), grid))
    # At Nyquist a real image cannot tell +k from -k; whole pixels agree there too.
    torch.testing.assert_close(moved[0], torch.roll(images[0], (2, 1), (0, 1)))
    torch.testing.assert_close(moved[1], torch.roll(images[1], -3, 1))


def test_centring_makes_of_a_plain_transform_that_of_the_centred_image():
    grid, shift = Grid(12, 1.5), torch.tensor([[1.0, 3.0], [-4.5, 0.3]]).double()
    images = noise(2, 12, 12)
    centred = torch.fft.rfft2(images) * shift_phase(shift, grid, centring=True)
    torch.testing.assert_close(centred, rfft(images) * shift_phase(shift, grid))


def test_frequencies_are_those_of_numpy():
    ky, kx = frequencies(Grid(8, 2.0))
    assert ky[:, 0].tolist() == [0, 1 / 16, 2 / 16, 3 / 16, -4 / 16, -3 / 16, -2 / 16, -1 / 16]
    assert kx[0].tolist() == [0, 1 / 16, 2 / 16, 3 / 16, 4 / 16]


def test_shells_are_rounded():
    shells = shell_index(8)
    assert shells[0].tolist() == [0, 1, 2, 3, 4]
    assert shells[1, 1] == 1  # sqrt(2)
    assert shells[1, 2] == 2  # sqrt(5)
    assert shells[2, 2] == 3  # sqrt(8)
    assert shells[-1, 1] == 1
    assert shell_index(8, 3)[1, 1, 1] == 2  # sqrt(3)


def test_hermitian_weights_make_parseval_true():
    image = noise(10, 10)
    power = torch.fft.rfft2(image).abs() ** 2 * hermitian_weight(10)
    assert float(power.sum()) == pytest.approx(float((image**2).sum()) * 100)


@pytest.mark.parametrize("dims", [2, 3])
def test_cropping_is_sampling_a_smooth_object_more_coarsely(dims):
    def blob(size, pixel):
        axis = (torch.arange(size) - size // 2).double() * pixel
        coordinates = torch.meshgrid(*[axis] * dims, indexing="ij")
        return torch.exp(-sum((c - 1.3 * i) ** 2 for i, c in enumerate(coordinates)) / (2 * 3.0**2))

    small = irfft(crop(rfft(blob(32, 1.0), dims), 16, dims), dims) / 2**dims
    torch.testing.assert_close(small, blob(16, 2.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_cropping_keeps_every_frequency_below_the_new_nyquist_and_no_other(dims):
    large = rfft(noise(*[16] * dims), dims)
    small = crop(large, 8, dims)
    assert small.shape == (8,) * (dims - 1) + (5,)
    full = [0, 1, 2, 3, -4, -3, -2, -1]
    for place in product(*[full] * (dims - 1), range(5)):
        assert small[place] == (0 if -4 in place or 4 in place else large[place])


@pytest.mark.parametrize(("size", "larger"), [(8, 12), (10, 20), (12, 14)])
def test_a_spectrum_on_more_voxels_and_back(size, larger):
    spectrum = rfft(torch.randn(2, size, size, size, generator=torch.Generator().manual_seed(1)), 3)
    band = crop(spectrum, size, 3)
    wide = widen(spectrum, larger)
    assert wide.shape == (2, larger, larger, larger // 2 + 1)
    assert torch.equal(crop(wide, size, 3), band)
    assert torch.count_nonzero(wide) == torch.count_nonzero(band)


@pytest.mark.parametrize("cached", [1, 500, 10**6])  # a plane at a time, some, and all at once
@pytest.mark.parametrize(("size", "side"), [(8, 12), (7, 12), (12, 12)])
def test_convolving_is_multiplying_the_padded_transform(size, side, cached, monkeypatch):
    """Against whole transforms, and adjoint: <K v, u> = <v, K u> for a real response."""
    monkeypatch.setattr(fourier, "_CACHED", cached)
    volume, other = noise(size, size, size), noise(size, size, size) + 1
    response = torch.fft.rfftn(noise(side, side, side)).abs()  # even, as the transform of a symmetric kernel
    whole = torch.fft.irfftn(torch.fft.rfftn(volume, s=(side,) * 3) * response, s=(side,) * 3)
    torch.testing.assert_close(convolve(volume, response), whole[:size, :size, :size])
    assert torch.equal(convolve(volume, by_columns(response)), convolve(volume, response))
    first, second = (convolve(volume, response) * other).sum(), (volume * convolve(other, response)).sum()
    torch.testing.assert_close(first, second)


def test_blurring_spreads_by_its_width():
    grid, width = Grid(32, 2.0), 5.0
    point = torch.zeros(32, 32, 32)
    point[16, 16, 16] = 1
    spread = blurred(point, grid, width)
    axis = grid.pixel_size * (torch.arange(32.0) - 16)
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum((0, 1)) * axis**2).sum()) == pytest.approx(width**2, rel=0.01)
