"""Cross-validated FSC: follows the true FSC where the half-map FSC of the models does not; silent where data are."""

import math

import pytest
import torch

from emsplat.maths.fourier import frequencies, irfft, rfft
from emsplat.maths.groups import parse_symmetry
from emsplat.measures.crossvalidate import CrossValidation, _smooth, independent_coefficients
from emsplat.measures.fsc import fsc
from emsplat.measures.mask import spherical_mask
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
    curve, low, high = validation.band(tuple(models))
    estimate = curve.value
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
    _, low, high = validation.band(tuple(models))
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
    seen = torch.stack([fsc(models[0], raw[1], MASK), fsc(models[1], raw[0], MASK)]).mean(0)
    value = (seen / fsc(*raw, MASK).clamp(min=1e-3).sqrt())[1:][validation.defined[1:]]
    assert validation.score(tuple(models)) == pytest.approx(float(value.mean()), rel=1e-6)
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


def points(positions):
    """A map of points, each spread over the eight voxels around it; positions in voxels from the centre."""
    volume = torch.zeros(48, 48, 48)
    low, part = positions.floor().long(), positions - positions.floor()
    for corner in torch.cartesian_prod(*[torch.arange(2)] * 3):
        weight = torch.where(corner.bool(), part, 1 - part).prod(1).float()
        volume.index_put_(tuple((low + corner + 24).T), weight, accumulate=True)
    return volume


def directions(count, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=rng, dtype=torch.float64), dim=1), rng


def hollow_shell(seed):
    """Octahedral, 14 to 16 voxels from the centre."""
    axis, rng = directions(120, seed)
    radius = 14 + 2 * torch.rand(len(axis), 1, generator=rng, dtype=torch.float64)
    return points(torch.cat([radius * axis @ element.T for element in parse_symmetry("O").elements]))


def sphere(seed):
    axis, rng = directions(4000, seed)
    return points(13 * torch.rand(len(axis), 1, generator=rng, dtype=torch.float64) ** (1 / 3) * axis)


def rod(seed):
    axis, rng = directions(3000, seed)
    across = 5 * torch.rand(len(axis), 1, generator=rng, dtype=torch.float64).sqrt()
    ring = torch.nn.functional.normalize(axis[:, :2], dim=1) * across
    return points(torch.cat([ring, 34 * torch.rand(len(axis), 1, generator=rng, dtype=torch.float64) - 17], 1))


def measured(truth, level, seed):
    """Two back-projections, whose noise grows with k, and two models: smoothed, and nowhere below a level."""
    truth = filtered(truth, lambda k: torch.exp(-((k / 16) ** 2)))
    truth = truth / truth.std()
    raw = [truth + filtered(noise(2 * seed + h), lambda k: level * (k / 12).sqrt()) for h in (10, 11)]
    models = []
    for one in raw:
        soft = filtered(one, lambda k: torch.exp(-((k / 18) ** 2))) * MASK
        models.append(filtered((soft - 0.3 * soft.std()).clamp(min=0), lambda k: torch.exp(-((k / 21) ** 2))))
    return truth, raw, models


@pytest.mark.parametrize("particle", [hollow_shell, sphere, rod])
def test_dips_are_seen_and_the_band_is_honest(particle):
    """The transforms of these have zeros, where the FSC dips. Smoothing over five shells hid 0.1 to 0.2 of it."""
    inside, off, widths = [], [], []
    for seed in range(6):
        truth, raw, models = measured(particle(0), 2.0, seed)
        validation = CrossValidation(tuple(raw), MASK, GRID)
        curve, low, high = validation.band(tuple(models))
        true = torch.stack([fsc(model, truth, MASK) for model in models]).mean(0)
        chosen = validation.defined & (validation.raw > 0.1)
        chosen[0] = False
        off.append((curve.value - true)[chosen])
        inside.append(((low <= true) & (true <= high))[chosen].double())
        widths.append((high - low)[chosen])
    off, inside, widths = map(torch.cat, (off, inside, widths))
    assert len(off) >= 6 * 12
    assert float(inside.mean()) >= 0.9
    assert float(off.square().mean().sqrt()) < 0.02
    assert float(off.abs().max()) < 0.08
    assert float(widths.mean()) < 0.08  # and no wider than it has to be


def test_a_level_curve_is_smoothed():
    """Where neighbours agree within their errors, they help each other."""
    rng = torch.Generator().manual_seed(0)
    error, defined = torch.full((40,), 0.05, dtype=torch.float64), torch.ones(40, dtype=torch.bool)
    line = 0.9 - 0.01 * torch.arange(40, dtype=torch.float64)
    seen = line + 0.05 * torch.randn(50, 40, generator=rng, dtype=torch.float64)
    smooth = torch.stack([_smooth(row, error, defined) for row in seen])
    assert float((smooth - line)[:, 1:].square().mean().sqrt()) < 0.65 * 0.05
    dip = line.clone()
    dip[20:23] -= 0.3
    kept = torch.stack([_smooth(row - line + dip, error, defined) for row in seen]).mean(0)
    assert float((kept - dip)[20:23].abs().max()) < 0.04


def test_imposed_symmetry_leaves_fewer_numbers():
    """Maps averaged over a group: the spread of the FSC of noise is that of one coefficient in each orbit."""

    def averaged(volume):
        inner = volume[1:, 1:, 1:]  # turned about voxel 24
        inner = sum(torch.rot90(inner, k, (1, 2)) for k in range(4)) / 4
        return torch.nn.functional.pad(inner, (1, 0, 1, 0, 1, 0))

    pairs = [(averaged(noise(2 * s)), averaged(noise(2 * s + 1))) for s in range(12)]
    values = torch.stack([fsc(*pair, MASK) for pair in pairs])
    count = CrossValidation(pairs[0], MASK, GRID, copies=4).count
    assert torch.allclose(count, (independent_coefficients(MASK) / 4).clamp(min=1))
    shells = slice(10, 24)
    expected = (1 / (2 * count[shells])).mean().sqrt()
    assert math.log(float((values[:, shells] ** 2).mean().sqrt() / expected)) == pytest.approx(0, abs=0.2)


def test_gain_comes_with_its_error():
    """Of two models compared with fresh noise again and again: the spread of the gain is the error that is given."""
    _, _, models = measured(sphere(0), 2.0, 0)
    _, _, others = measured(sphere(0), 2.2, 0)
    gains, errors = [], []
    for seed in range(1, 25):
        _, raw, _ = measured(sphere(0), 2.0, seed)
        validation = CrossValidation(tuple(raw), MASK, GRID)
        validation.defined[:] = torch.arange(25) < 18  # the same shells each time
        gain, error = validation.gain(tuple(others), tuple(models))
        assert gain == pytest.approx(validation.score(tuple(models)) - validation.score(tuple(others)), abs=1e-9)
        gains.append(gain)
        errors.append(error)
    spread, expected = float(torch.tensor(gains).std()), sum(errors) / len(errors)
    assert math.log(spread / expected) == pytest.approx(0, abs=0.4)
    assert validation.gain(tuple(models), tuple(models)) == (0.0, pytest.approx(0.0, abs=1e-6))
