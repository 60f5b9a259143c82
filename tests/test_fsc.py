"""Fourier shell correlation: laws, a naive twin, and the rules that turn a curve into a resolution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from emsplat.errors import InputError
from emsplat.maths.fourier import shell_index
from emsplat.measures.curves import crossing, ends_undefined, last_crossing, never_falls, resolution
from emsplat.measures.fsc import (
    PROTEIN_VOLUME,
    common_grid,
    corrected_fsc,
    fsc,
    fsc_curve,
    particle_fsc,
    randomisation_shell,
    randomise_phases,
)
from emsplat.measures.mask import spherical_mask
from emsplat.types import Curve, Grid

SIZES = [10, 11]


def noise(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_fsc(a: Tensor, b: Tensor) -> np.ndarray:
    """The definition, one Fourier coefficient of the full transform at a time."""
    size = len(a)
    fa, fb = np.fft.fftn(a.numpy()), np.fft.fftn(b.numpy())
    k = np.fft.fftfreq(size, 1 / size)
    sums = np.zeros((3, size // 2 + 1))
    for index in np.ndindex(fa.shape):
        shell = round(math.sqrt(sum(k[i] ** 2 for i in index)))
        if shell <= size // 2:
            p, q = fa[index], fb[index]
            sums[:, shell] += [(p.conjugate() * q).real, abs(p) ** 2, abs(q) ** 2]
    return sums[0] / np.sqrt(sums[1] * sums[2])


@pytest.mark.parametrize("size", SIZES)
def test_naive_twin(size: int) -> None:
    a, b = noise(size, 0), noise(size, 1)
    np.testing.assert_allclose(fsc(a, a + b).numpy(), naive_fsc(a, a + b), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_self_is_one(size: int, dtype: torch.dtype) -> None:
    a = noise(size, 0, dtype)
    one = torch.ones(size // 2 + 1, dtype=torch.float64)
    torch.testing.assert_close(fsc(a, a), one, rtol=0, atol=1e-12)
    torch.testing.assert_close(fsc(a, -a), -one, rtol=0, atol=1e-12)


def test_symmetric_and_blind_to_scale() -> None:
    a, b = noise(12, 0), noise(12, 1)
    torch.testing.assert_close(fsc(a, b), fsc(b, a), rtol=0, atol=1e-14)
    torch.testing.assert_close(fsc(1e-9 * a, 1e9 * b), fsc(a, b), rtol=0, atol=1e-12)


def test_blind_to_common_shift() -> None:
    a, b = noise(12, 0), noise(12, 1)
    moved = (v.roll((1, -4, 6), (0, 1, 2)) for v in (a, b))
    torch.testing.assert_close(fsc(*moved), fsc(a, b), rtol=0, atol=1e-12)


def test_bounded() -> None:
    assert fsc(noise(12, 0), noise(12, 1)).abs().max() <= 1 + 1e-12


def test_float32_agrees_with_float64() -> None:
    a, b = noise(16, 0), noise(16, 1)
    torch.testing.assert_close(fsc(a.float(), b.float()), fsc(a, b), rtol=0, atol=1e-6)


def test_independent_noise_is_small() -> None:
    """Independent maps: FSC ~ N(0, 1/n) with n the coefficients of the full shell."""
    size = 48
    count = torch.bincount(shell_index(size, 3).flatten())[: size // 2 + 1]
    pairs = torch.stack([fsc(noise(size, 2 * i), noise(size, 2 * i + 1)) for i in range(8)])
    # `count` is of the half space, so that n is about twice as much.
    score = pairs[:, 4:] * (2 * count[4:]).sqrt()
    assert score.abs().max() < 4.5
    assert 0.8 < score.std() < 1.25


def test_known_signal_to_noise() -> None:
    """a = s + n1 and b = s + n2 correlate as S / (S + N) in every shell."""
    size, ratio = 48, 0.5
    signal = noise(size, 0)
    value = fsc(signal + noise(size, 1) / ratio**0.5, signal + noise(size, 2) / ratio**0.5)
    expected = torch.full_like(value[8:], ratio / (1 + ratio))
    torch.testing.assert_close(value[8:], expected, rtol=0, atol=0.07)
    assert value[8:].mean().item() == pytest.approx(ratio / (1 + ratio), abs=0.01)


def test_shell_rule_rounds() -> None:
    """A wave of |k| = sqrt(6) = 2.449 stands in shell 2, one of sqrt(8) = 2.828 in shell 3."""
    size = 16
    x = torch.arange(size, dtype=torch.float64) * 2 * torch.pi / size
    background = 1e-3 * noise(size, 0), 1e-3 * noise(size, 1)
    for (kz, ky, kx), shell in [((1, 1, 2), 2), ((2, 0, 2), 3), ((0, 2, 2), 3)]:
        wave = torch.cos(kz * x[:, None, None] + ky * x[:, None] + kx * x)
        value = fsc(wave + background[0], wave + background[1])
        assert value[1:].argmax().item() + 1 == shell
        assert value[shell] > 0.99


def test_shell_without_power_is_zero() -> None:
    assert fsc(torch.zeros(8, 8, 8), noise(8, 0, torch.float32)).tolist() == [0.0] * 5


def test_mask_multiplies_both_maps() -> None:
    a, b = noise(12, 0), noise(12, 1)
    mask = spherical_mask(Grid(12, 1.0), 6.0, 2.0).double()
    torch.testing.assert_close(fsc(a, b, mask), fsc(a * mask, b * mask), rtol=0, atol=1e-14)
    torch.testing.assert_close(fsc(a, b, torch.ones_like(a)), fsc(a, b), rtol=0, atol=1e-14)


def test_curve_frequencies() -> None:
    a = noise(10, 0)
    curve = fsc_curve(a, a, Grid(10, 1.5))
    np.testing.assert_allclose(curve.frequency.numpy(), np.arange(6) / 15.0)
    assert resolution(curve, 0.143) == pytest.approx(Grid(10, 1.5).nyquist)


def hand_curve(*values: float) -> Curve:
    """Shells of a box of 60 Å, so that shell s stands for 60 / s Å."""
    return Curve(torch.arange(len(values)).double() / 60, torch.tensor(values, dtype=torch.float64))


def test_resolution_is_the_last_shell_before_the_first_drop() -> None:
    curve = hand_curve(1, 1, 0.9, 0.5, 0.2, 0.1, 0.3, 0.05)
    assert resolution(curve, 0.5) == pytest.approx(60 / 3)
    assert resolution(curve, 0.143) == pytest.approx(60 / 4)


def test_resolution_at_the_ends() -> None:
    assert resolution(hand_curve(1, 0.1, 0.9), 0.143) is None
    assert crossing(hand_curve(1, 0.1, 0.9), 0.143) is None
    assert resolution(hand_curve(1, 0.9, 0.8), 0.143) == pytest.approx(60 / 2)
    assert crossing(hand_curve(1, 0.9, 0.8), 0.143) == pytest.approx(60 / 2)


def test_resolution_ignores_shell_zero_and_stops_at_undefined() -> None:
    assert resolution(hand_curve(0, 0.9, 0.8), 0.143) == pytest.approx(60 / 2)
    undefined = hand_curve(1, 0.9, 0.8, math.nan, 0.9)
    assert resolution(undefined, 0.5) == pytest.approx(60 / 2)
    assert crossing(undefined, 0.5) == pytest.approx(60 / 2)


def test_a_curve_that_ends_is_told_from_one_that_falls() -> None:
    for values, expected in (
        ([1, 0.9, 0.6, math.nan], True),
        ([1, 0.9, 0.8, 0.6], False),
        ([1, 0.9, 0.4, math.nan], False),
        ([1, 0.9, 0.4, 0.6], False),
        ([1, math.nan, 0.8, 0.6], False),
    ):
        curve = Curve(torch.arange(4) / 12.0, torch.tensor(values, dtype=torch.float64))
        assert ends_undefined(curve, 0.5) is expected, values


def test_a_curve_that_never_falls_is_known() -> None:
    """Its resolution is the limit of the pixel size; one that ends undefined has ended for another reason."""
    assert never_falls(hand_curve(0, 0.9, 0.143, 0.5), 0.143)
    assert not never_falls(hand_curve(1, 0.9, 0.142, 0.5), 0.143)
    assert not never_falls(hand_curve(1, 0.9, 0.9, math.nan), 0.143)


def test_crossing_interpolates() -> None:
    curve = hand_curve(1, 1, 0.9, 0.5, 0.2, 0.1, 0.3)
    assert crossing(curve, 0.4) == pytest.approx(60 / (3 + 1 / 3))
    assert crossing(curve, 0.5) == pytest.approx(60 / 3)


def test_crossing_is_at_least_as_fine_as_resolution() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        curve = hand_curve(1.0, 0.95, *torch.rand(12, generator=generator).tolist())
        step, line = resolution(curve, 0.5), crossing(curve, 0.5)
        assert step is not None
        assert line is not None
        assert line <= step + 1e-12


def test_errors_name_both_values_and_the_way_out() -> None:
    a = noise(8, 0, torch.float32)
    with pytest.raises(InputError, match=r"8×8×8 and 10×10×10 .* resample"):
        fsc(a, noise(10, 0, torch.float32))
    with pytest.raises(InputError, match="two cubes"):
        fsc(a[:, :6], a[:, :6])
    with pytest.raises(InputError, match=r"10×10×10 voxels, but the maps have 8×8×8"):
        fsc(a, a, torch.ones(10, 10, 10))
    with pytest.raises(InputError, match="every voxel is 0"):
        fsc(a, a, torch.zeros_like(a))
    with pytest.raises(InputError, match="from 0 to 2; expected 0 to 1"):
        fsc(a, a, 2 * spherical_mask(Grid(8, 1.0), 3.0, 0.0))
    with pytest.raises(InputError, match="grid of 10"):
        fsc_curve(a, a, Grid(10, 1.0))


def test_common_grid() -> None:
    assert common_grid({"a.mrc": Grid(64, 1.06), "b.mrc": Grid(64, 1.06 + 1e-7)}) == Grid(64, 1.06)
    with pytest.raises(InputError, match=r"b.mrc: box 64 at 1.1 Å, but a.mrc has box 64 at 1.06 Å"):
        common_grid({"a.mrc": Grid(64, 1.06), "b.mrc": Grid(64, 1.1)})
    with pytest.raises(InputError, match="box 66"):
        common_grid({"a.mrc": Grid(64, 1.06), "b.mrc": Grid(66, 1.06)})


def star_column(path, name: str) -> Tensor:
    from gemmi import cif

    values = cif.read(str(path)).find_block("fsc").find_loop(f"_rln{name}")
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def test_corrections_are_those_of_relion(shared_data) -> None:
    path = shared_data / "fsc" / "postprocess.star"
    frequency = star_column(path, "Resolution")
    unmasked = Curve(frequency, star_column(path, "FourierShellCorrelationUnmaskedMaps"))
    masked = Curve(frequency, star_column(path, "FourierShellCorrelationMaskedMaps"))
    random = Curve(frequency, star_column(path, "CorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"))
    start = randomisation_shell(unmasked)
    assert start is not None
    assert 1 / float(frequency[start]) == pytest.approx(7.005406, abs=1e-5)  # rlnRandomiseFrom
    corrected = corrected_fsc(masked, random, start)
    expected = star_column(path, "FourierShellCorrelationCorrected")
    torch.testing.assert_close(corrected.value, expected, rtol=0, atol=1e-5)
    assert resolution(corrected, 0.143) == pytest.approx(3.323077, abs=1e-4)  # rlnFinalResolution
    particle = particle_fsc(unmasked, PROTEIN_VOLUME / 10.682012)
    expected = star_column(path, "FourierShellCorrelationParticleMaskFraction")
    torch.testing.assert_close(particle.value, expected, rtol=0, atol=1e-4)


def test_random_phases_keep_amplitudes_and_low_shells() -> None:
    a, b = noise(24, 0), noise(24, 1)
    both = [randomise_phases(a + b, 6, seed) for seed in (1, 2)]
    torch.testing.assert_close(
        torch.fft.rfftn(both[0]).abs(), torch.fft.rfftn(a + b).abs(), rtol=0, atol=1e-6 * float((a + b).norm())
    )
    curve = fsc(both[0], both[1])
    assert float(curve[:6].min()) > 1 - 1e-9
    assert float(curve[6:].abs().max()) < 0.15


def test_correction_removes_what_a_tight_mask_adds() -> None:
    """Noise in a tight mask correlates with noise in the same mask; corrected it does not."""
    size, grid = 48, Grid(48, 2.0)
    mask = spherical_mask(grid, 28.0, 0.0).double()
    shared = noise(size, 0)
    low = shell_index(size, 3) < 5

    def half(seed: int) -> Tensor:
        spectrum = torch.where(low, torch.fft.rfftn(8 * shared), torch.fft.rfftn(noise(size, seed)))
        return torch.fft.irfftn(spectrum, s=(size,) * 3)

    halves = half(1), half(2)
    unmasked, masked = fsc_curve(*halves, grid), fsc_curve(*halves, grid, mask)
    start = randomisation_shell(unmasked)
    assert start == 5
    random = fsc_curve(randomise_phases(halves[0], 5, 3), randomise_phases(halves[1], 5, 4), grid, mask)
    corrected = corrected_fsc(masked, random, start)
    assert float(masked.value[7:12].mean()) > 0.15
    assert abs(float(corrected.value[7:12].mean())) < 0.4 * float(masked.value[7:12].mean())
    assert torch.equal(corrected.value[:7], masked.value[:7])


def test_no_shell_to_begin_with() -> None:
    a = noise(12, 0)
    assert randomisation_shell(fsc_curve(a, a, Grid(12, 1.0))) is None


@pytest.mark.parametrize("size", SIZES)
def test_shells_of_cryodrgn(size: int) -> None:
    """Shell i holds i - 1 <= r < i, one coefficient of the full transform at a time."""
    a, b = noise(size, 0), noise(size, 1)
    fa, fb = np.fft.fftn(a.numpy()), np.fft.fftn((a + b).numpy())
    k = np.fft.fftfreq(size, 1 / size)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    expected = [1.0]
    for i in range(1, size // 2 + 1):
        p, q = (f[(radius >= i - 1) & (radius < i)] for f in (fa, fb))
        expected.append((p.conj() * q).real.sum() / np.sqrt((abs(p) ** 2).sum() * (abs(q) ** 2).sum()))
    expected[-1] = np.nan  # which cryoDRGN does not have
    np.testing.assert_allclose(fsc(a, a + b, rule="cryodrgn").numpy(), expected, atol=1e-12)


def test_two_rules_read_a_dip_differently() -> None:
    curve = Curve(torch.arange(6).double() / 60, torch.tensor([1.0, 0.9, 0.1, 0.5, 0.2, 0.0]).double())
    assert resolution(curve, 0.143) == pytest.approx(60)
    assert last_crossing(curve, 0.143) == pytest.approx(15)
    assert last_crossing(curve, 0.95) is None
