"""Cross-validated FSC: follows the true FSC where the half-map FSC of the models does not; silent where data are."""

import math

import pytest
import torch

from emsplat.assess.crossvalidate import CrossValidation, independent_coefficients
from emsplat.assess.fsc import fsc
from emsplat.assess.mask import spherical_mask
from emsplat.fourier import frequencies, irfft, rfft
from emsplat.types import Grid

GRID = Grid(48, 2.0)
MASK = spherical_mask(GRID, 50.0, 10.0)


def filtered(volume, power):
    kz, ky, kx = frequencies(Grid(GRID.size, 1 / GRID.size), 3)
    return irfft(rfft(volume, 3) * power((kz**2 + ky**2 + kx**2).sqrt()), 3)


def noise(seed):
    return torch.randn(48, 48, 48, generator=torch.Generator().manual_seed(seed))


def experiment(level):
    """A truth whose power falls with k, two noisy maps of it, and two models that share a bias and see the noise."""
    truth = filtered(noise(0), lambda k: torch.exp(-k / 6)) * MASK
    scale = float(truth[MASK > 0.5].std())
    raw = [truth + level * scale * noise(seed) for seed in (1, 2)]
    bias = filtered(noise(3), lambda k: torch.exp(-k / 9)) * MASK * 0.15 * scale
    models = [filtered(r, lambda k: torch.exp(-((k / 14) ** 2))) + bias for r in raw]
    return truth, raw, models


@pytest.mark.parametrize("level", [0.3, 1.0, 2.0])
def test_estimate_follows_the_truth(level):
    truth, raw, models = experiment(level)
    validation = CrossValidation(tuple(raw), MASK, GRID)
    curve = validation.curve(tuple(models))
    estimate, (low, high) = curve.value, validation.interval(curve)
    true = torch.stack([fsc(model, truth, MASK) for model in models]).mean(0)
    trusted = (validation.raw > 0.1) & validation.defined
    trusted[:2] = False
    assert int(trusted.sum()) >= 4
    # Within 0.05; shells of this small box that hold too few numbers for that, within their own band.
    allowed = ((high - low) / 2).clamp(min=0.05)
    assert bool(((estimate - true).abs() < allowed)[trusted].all())
    assert float((estimate - true)[trusted].abs().mean()) < 0.02
    # The models' own half-map FSC claims more than that.
    claimed = torch.sqrt(2 * fsc(*models, MASK) / (1 + fsc(*models, MASK)))
    assert float((claimed - true)[trusted].max()) > 0.1


def test_true_curve_lies_in_the_band():
    truth, raw, models = experiment(1.0)
    validation = CrossValidation(tuple(raw), MASK, GRID)
    curve = validation.curve(tuple(models))
    low, high = validation.interval(curve)
    true = torch.stack([fsc(model, truth, MASK) for model in models]).mean(0)
    shells = validation.defined.clone()
    shells[:2] = False
    inside = (low <= true) & (true <= high)
    assert float(inside[shells].double().mean()) > 0.85
    assert bool((high > low)[shells].all())


def test_pure_noise_is_undefined():
    validation = CrossValidation((noise(1), noise(2)), MASK, GRID)
    curve = validation.curve((noise(3), noise(4)))
    assert int(validation.defined[1:].sum()) <= 1
    assert bool(torch.isnan(curve.value[3:]).all())


def test_score_is_the_mean_over_defined_shells():
    _, raw, models = experiment(1.0)
    validation = CrossValidation(tuple(raw), MASK, GRID)
    value = validation.curve(tuple(models)).value[1:]
    assert validation.score(tuple(models)) == pytest.approx(float(value[~torch.isnan(value)].mean()))
    assert validation.score((raw[0], raw[1])) < validation.score(tuple(models))


def test_directions_are_averaged():
    _, raw, models = experiment(1.0)
    one = CrossValidation((raw[0], raw[1]), MASK, GRID).curve((models[0], models[1])).value
    other = CrossValidation((raw[1], raw[0]), MASK, GRID).curve((models[1], models[0])).value
    assert torch.allclose(one, other, equal_nan=True)


def test_number_of_independent_coefficients():
    """The spread of the FSC of masked white noise is 1 / sqrt(count)."""
    count = independent_coefficients(MASK)
    values = torch.stack([fsc(noise(2 * s), noise(2 * s + 1), MASK) for s in range(20)])
    shells = slice(8, 24)
    spread = (values[:, shells] ** 2).mean().sqrt()
    expected = (1 / (2 * count[shells])).mean().sqrt()
    assert math.log(float(spread / expected)) == pytest.approx(0, abs=0.2)
