"""Local resolution: the definition window by window, a map whose blur varies by a known amount, noise."""

import math

import mrcfile
import pytest
import torch

from emsplat.errors import InputError
from emsplat.measures import local_resolution as module
from emsplat.measures.local_resolution import _band_products as band_products
from emsplat.measures.local_resolution import _ratio as ratio
from emsplat.measures.local_resolution import default_window, local_cross_validated, local_resolution, windowed_fsc
from emsplat.types import Grid

GRID = Grid(96, 2.0)
WINDOW = 30.0


def noise(size, seed):
    return torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed))


def varying(grid, level):
    """White noise blurred by exp(-k²/2c²), c varying along x, and the spacing where its FSC in noise is 0.143."""
    size = grid.size
    full, half = torch.fft.fftfreq(size, grid.pixel_size), torch.fft.rfftfreq(size, grid.pixel_size)
    square = full[:, None, None] ** 2 + full[:, None] ** 2 + half**2
    spectrum = torch.fft.rfftn(noise(size, 0))
    widths = torch.linspace(0.04, 0.1, 13)
    c = 0.07 + 0.025 * torch.cos(2 * math.pi * torch.arange(size) / size)
    place = (c - widths[0]) / (widths[1] - widths[0])
    signal = torch.zeros(size, size, size)
    for i, width in enumerate(widths.tolist()):
        weight = (1 - (place - i).abs()).clamp(min=0)
        signal += torch.fft.irfftn(spectrum * torch.exp(-square / (2 * width**2)), s=(size,) * 3) * weight
    # SNR = exp(-k²/c²)/level² = 0.143/0.857
    return signal, 1 / (c * math.sqrt(-math.log(0.1669 * level**2)))


@pytest.mark.parametrize("level", [0.15, 0.4])
def test_known_blur_is_found(level):
    signal, expected = varying(GRID, level)
    a, b = (signal + level * noise(GRID.size, seed) for seed in (1, 2))
    found = local_resolution(a, b, GRID, window=WINDOW).volume
    profile = found.mean((0, 1))
    # Where the map is blurred most, the window lets in what is sharper beside it.
    assert bool(((profile / expected - 1).abs() < 0.17).all())
    assert float((profile / expected - 1).abs().mean()) < 0.1
    order = expected.argsort()
    assert float(profile[order[-10:]].mean()) > 1.4 * float(profile[order[:10]].mean())
    assert float(found.std((0, 1)).max()) < 0.1 * float(expected.max())


def test_equal_to_windows_cut_out_one_by_one():
    signal, _ = varying(GRID, 0.3)
    a, b = (signal + 0.3 * noise(GRID.size, seed) for seed in (1, 2))
    fast = [(k, ratio(ab, aa, bb)) for k, (ab, aa, bb) in band_products([a, b], [(0, 1), (0, 0), (1, 1)], GRID, WINDOW)]
    coarse = len(fast[0][1])
    assert coarse < GRID.size  # products are smoothed onto a coarser grid
    for centre in ((48, 48, 48), (24, 48, 0), (72, 12, 84)):
        slow = windowed_fsc(a, b, GRID, centre, WINDOW)
        assert slow.frequency.tolist() == pytest.approx([k for k, _ in fast])
        place = [c * coarse / GRID.size for c in centre]
        assert all(p == int(p) for p in place)
        values = torch.tensor([float(value[tuple(map(int, place))]) for _, value in fast])
        assert float((values - slow.value).abs().max()) < 0.1
        assert float((values - slow.value).abs().mean()) < 0.03


def test_noise_has_no_resolution():
    found = local_resolution(noise(96, 1), noise(96, 2), GRID, window=WINDOW)
    summary = found.summary(torch.ones(96, 96, 96))
    assert summary["p5"] > 0.4 * WINDOW  # the first bands
    models = noise(96, 3), noise(96, 4)
    cross = local_cross_validated(models, (noise(96, 1), noise(96, 2)), GRID, window=WINDOW)
    assert cross.summary(torch.ones(96, 96, 96))["p5"] > 0.4 * WINDOW


@pytest.mark.parametrize("cross", [False, True])
def test_bands_that_say_nothing_more_are_left_out(monkeypatch, cross):
    """The same map, bit by bit, as with all bands."""
    a, b = (noise(48, seed) for seed in (1, 2))
    looked_at = []

    def counted(*given):
        for band in band_products(*given):
            looked_at.append(None)
            yield band

    def found():
        looked_at.clear()
        grid = Grid(48, 2.0)
        resolved = local_cross_validated((a, b), (a, b), grid, window=24.0) if cross else None
        return resolved or local_resolution(a, b, grid, window=24.0)

    monkeypatch.setattr(module, "_band_products", counted)
    early, few = found(), len(looked_at)
    monkeypatch.setattr(module._First, "everywhere", False)
    whole, many = found(), len(looked_at)
    assert few < many
    assert torch.equal(early.volume, whole.volume)


def test_equal_maps_are_resolved_to_nyquist():
    a = noise(48, 0)
    found = local_resolution(a, a, Grid(48, 2.0), window=24.0)
    torch.testing.assert_close(found.volume, torch.full((48, 48, 48), 4.0))


def test_cross_validation_sees_overfitting_where_it_is():
    """Two models that share a prior on the right side only: their half-map local resolution believes it."""
    signal, _ = varying(GRID, 0.3)
    raw = [signal + 0.3 * noise(GRID.size, seed) for seed in (1, 2)]
    right = (torch.arange(GRID.size) >= GRID.size // 2).float()
    prior = 0.5 * noise(GRID.size, 7) * right
    models = signal + prior, signal + prior
    claimed = local_resolution(*models, GRID, window=WINDOW).volume[..., 72].mean()
    cross = local_cross_validated(models, (raw[0], raw[1]), GRID, window=WINDOW).volume
    assert float(claimed) < 4.2  # Nyquist
    assert float(cross[..., 72].mean()) > 5.5
    assert float(cross[..., 24].mean()) < 0.9 * float(cross[..., 72].mean())


def test_symmetric_in_its_maps_and_blind_to_scale():
    a, b = (noise(48, seed) + noise(48, 9) for seed in (1, 2))
    grid = Grid(48, 2.0)
    one = local_resolution(a, b, grid, window=24.0).volume
    torch.testing.assert_close(local_resolution(b, 1e-3 * a, grid, window=24.0).volume, one, rtol=1e-3, atol=1e-3)


def test_moves_with_the_maps():
    a, b = (noise(48, seed) + noise(48, 9) for seed in (1, 2))
    grid = Grid(48, 2.0)
    one = local_resolution(a, b, grid, window=24.0).volume
    moved = local_resolution(*(m.roll((12, 24, -12), (0, 1, 2)) for m in (a, b)), grid, window=24.0).volume
    torch.testing.assert_close(moved, one.roll((12, 24, -12), (0, 1, 2)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("window", [1.0, 200.0])
def test_impossible_windows_are_refused(window):
    with pytest.raises(InputError, match="window"):
        local_resolution(noise(32, 0), noise(32, 1), Grid(32, 2.0), window=window)


def test_other_sizes_are_refused():
    with pytest.raises(InputError, match="32×32×32"):
        local_resolution(noise(32, 0), noise(32, 1), Grid(48, 2.0), window=20.0)


def test_window_follows_the_resolution():
    assert default_window(None) == default_window(3.0) == 25.0
    assert default_window(8.0) == 40.0


def test_beside_another_program(shared_data):
    """A single map with another program's local resolution: white noise as strong as the map drowns detail first where
    that program found less of it."""
    volumes = []
    for name in ("betaGal.mrc", "localResolution.mrc"):
        with mrcfile.open(shared_data / "fsc" / name, permissive=True) as file:
            volumes.append(torch.from_numpy(file.data.astype("float32")))
    density, other = volumes
    grid = Grid(len(density), 3.54)
    inside = (density > 2 * density.std()) & (other > other.min())
    level = float(density[inside].std())
    halves = [density + level * noise(grid.size, seed) for seed in (1, 2)]
    found = local_resolution(*halves, grid, window=35.0).volume
    ranks = torch.stack([volume[inside].argsort().argsort().double() for volume in (found, other)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.35
    assert float((found - other)[inside].mean().abs()) < 2.5
