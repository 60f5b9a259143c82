"""The quadratic form of the accumulated sums, density control, and the course that the halves find."""

import dataclasses
import math
import threading

import pytest
import torch

from emsplat.fitting import course
from emsplat.fitting.course import Score, Stage, VolumeFit, find_course, follow_course
from emsplat.fitting.growth import grow, missing_power
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective, support_size
from emsplat.imaging.project import voxelize
from emsplat.io.mrc import read_map
from emsplat.maths.fourier import convolve, rfft, shell_index
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.mask import solvent_mask
from emsplat.models.gaussians import Bounds, GaussianField, inverse_softplus
from emsplat.models.starts import from_map
from emsplat.particles.open import open_particles
from emsplat.sums.equations import NormalEquations, mean_per_shell
from emsplat.sums.statistics import equations_of
from emsplat.types import Grid

GRID = Grid(16, 2.0)


def field(count=5, seed=0, spread=4.0, scale=2.0):
    rng = torch.Generator().manual_seed(seed)
    bounds = Bounds(10.0, 1.0, 0.5)
    quaternion = torch.randn(count, 4, generator=rng)
    raw_scale = inverse_softplus(
        torch.full((count, 3), (scale - 0.5) / 10) + 0.05 * torch.rand(count, 3, generator=rng)
    )
    mean = spread / 10 * torch.randn(count, 3, generator=rng)
    return GaussianField(mean, raw_scale, quaternion, 1 + torch.rand(count, generator=rng), bounds)


def random_equations(grid=GRID, reach=12, seed=1):
    """K symmetric and short enough that nothing is wrapped, positive definite in the sense of a spectrum above 0."""
    rng = torch.Generator().manual_seed(seed)
    half = torch.randn((reach // 2 + 1,) * 3, generator=rng).double()
    small = torch.nn.functional.conv3d(half[None, None], half[None, None], padding=reach // 2)[0, 0]
    correlation = torch.nn.functional.conv3d(
        torch.nn.functional.pad(half, (reach // 2,) * 6)[None, None], half[None, None]
    )[0, 0]
    assert small.shape == correlation.shape
    side = 2 * ((3 * grid.size + 3) // 4)
    kernel = torch.zeros((side,) * 3, dtype=torch.float64)
    middle = slice(side // 2 - reach // 2, side // 2 + reach // 2 + 1)
    kernel[middle, middle, middle] = correlation
    kernel = kernel[side // 2 :].float()
    return NormalEquations(grid, torch.randn((grid.size,) * 3, generator=rng), kernel, 10)


def every_lag(half):
    """K at lags from -R on along all axes; at z = -R it is 0."""
    opposite = half[1:].flip(0, 1, 2).roll((1, 1), (1, 2))
    return torch.cat([torch.zeros_like(half[:1]), opposite, half])


def dense(equations):
    """K as a matrix over the voxels of the box."""
    size, middle = equations.grid.size, len(equations.kernel)
    kernel = every_lag(equations.kernel)
    axis = torch.arange(size)
    lag = axis[:, None] - axis + middle
    inside = (lag >= 0) & (lag < len(kernel))
    lag = lag.clamp(0, len(kernel) - 1)
    matrix = kernel[lag][:, :, lag][:, :, :, :, lag]
    known = inside[:, :, None, None, None, None] & inside[:, :, None, None] & inside
    return (matrix * known).permute(0, 2, 4, 1, 3, 5).reshape(size**3, size**3).double()


def test_value_and_gradient_are_those_of_the_dense_form():
    grid = Grid(8, 2.0)
    equations = random_equations(grid, reach=4)
    objective = VolumeObjective(equations, 8)
    volume = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(3))
    matrix, v, b = dense(equations) / 10, volume.flatten().double(), equations.linear.flatten().double() / 10
    error, gradient = objective.error_and_gradient(volume)
    assert float(error) == pytest.approx(float(0.5 * v @ matrix @ v - b @ v), rel=1e-5)
    torch.testing.assert_close(gradient.flatten().double(), matrix @ v - b, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_parameter():
    equations, model = random_equations(), field()
    objective = VolumeObjective(equations, 16)
    objective(model, 0)["loss"].backward()
    rng = torch.Generator().manual_seed(4)
    direction = {name: torch.randn(p.shape, generator=rng) for name, p in model.named_parameters()}
    slope = sum(float((p.grad * direction[name]).sum()) for name, p in model.named_parameters())
    values = []
    for sign in (1, -1):
        moved = model.copy()
        for name, p in moved.named_parameters():
            p.data += sign * 1e-3 * direction[name]
        values.append(float(objective(moved, 0)["loss"]))
    rounding = 4 * torch.finfo(torch.float32).eps * abs(values[0]) / 2e-3
    assert abs((values[0] - values[1]) / 2e-3 - slope) < 5e-2 * abs(slope) + rounding


def test_support_cuts_out_the_middle():
    equations, model = random_equations(), field(spread=1.0, scale=1.5)
    whole, part = VolumeObjective(equations, 16), VolumeObjective(equations, 12)
    assert part.render(model.gaussians()).shape == (12, 12, 12)
    torch.testing.assert_close(part.render(model.gaussians()), whole.render(model.gaussians())[2:14, 2:14, 2:14])


def test_coarse_level_is_the_same_form_of_low_frequencies(stack):
    """For a model without fine detail both levels agree."""
    equations = equations_of(stack)
    fine, coarse = VolumeObjective(equations, 32), VolumeObjective(equations, 32, coarse_steps=5)
    model = field(30, spread=15.0, scale=9.0).with_unit(20.0)
    model = model.with_unit(20.0 * fine.best_gain(model))
    assert float(coarse(model, 0)["loss"]) == pytest.approx(float(fine(model, 0)["loss"]), rel=0.03)
    assert float(coarse(model, 5)["loss"]) == pytest.approx(float(fine(model, 5)["loss"]), rel=1e-6)


def test_a_model_that_is_not_seen_keeps_its_amplitude():
    objective = VolumeObjective(random_equations(), 8)
    model = field(spread=0.5)
    model.mean.data += 1000.0 / model.bounds.length
    assert objective.best_gain(model) == 1.0


def test_best_gain_is_at_the_minimum(stack):
    objective = VolumeObjective(equations_of(stack), 32)
    model = field(30, spread=15.0, scale=5.0)
    gain = objective.best_gain(model)
    losses = [float(objective(model.with_unit(f * gain), 0)["loss"]) for f in (0.95, 1.0, 1.05)]
    assert losses[1] < min(losses[0], losses[2])


def test_support_sizes_have_fast_transforms():
    assert support_size(50, 96) == 64
    assert support_size(97, 100) == 96
    assert support_size(10, 8) == 8
    for extent in range(1, 200, 7):
        size = support_size(extent, 256)
        assert size >= extent
        assert size % 8 == 0


@pytest.fixture(scope="module")
def star(simulated):
    return simulated(particles=400, snr=0.1, seed=2)


@pytest.fixture(scope="module")
def stack(star):
    return open_particles(star)


def test_cost_of_a_step_knows_no_number_of_images(stack):
    few, many = equations_of(stack.take(torch.arange(50))), equations_of(stack)
    a, b = VolumeObjective(few, 32), VolumeObjective(many, 32)
    assert [t.shape for t in vars(a._fine).values() if torch.is_tensor(t)] == [
        t.shape for t in vars(b._fine).values() if torch.is_tensor(t)
    ]


def test_missing_detail_is_found_where_it_is(stack):
    """The residual of a model that lacks one of its Gaussians is largest under that one's neighbours."""
    equations = equations_of(stack)
    whole = field(40, seed=5, spread=14.0, scale=5.0)
    with torch.no_grad():
        truth = voxelize(whole.gaussians(), stack.grid)
    objective = VolumeObjective(equations, 32)
    # Noise-free data of exactly this mixture.
    applied = convolve(truth, objective._fine._response)
    clean = dataclasses.replace(equations, linear=applied * equations.particles)
    objective = VolumeObjective(clean, 32)
    lacking = whole.copy()
    lacking.amplitude.data[0] = inverse_softplus(torch.tensor(0.02))
    power = missing_power(lacking, objective)
    distance = (whole.mean - whole.mean[0]).norm(dim=1)
    near = distance.argsort()[:8]
    assert int(power.argmax()) in near.tolist()
    assert float(missing_power(whole, objective).max()) < 0.05 * float(power.max())


def test_growth_is_deterministic_and_keeps_the_map(stack):
    equations = equations_of(stack)
    objective = VolumeObjective(equations, 32)
    model = from_map(equations.solve(), stack.grid, 100, Bounds(40.0, 1.0, 2.0), 0)
    model = model.with_unit(objective.best_gain(model))
    model.amplitude.data[3] = -12.0  # carries nothing
    one, two = grow(model, objective), grow(model, objective)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(one) == 99 + 49
    before, after = (voxelize(m.gaussians(), stack.grid).detach() for m in (model, one))
    assert float((before - after).norm()) < 0.1 * float(before.norm())
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-3)


@pytest.fixture(scope="module")
def halves(star):
    stack = open_particles(star).with_halves(0)
    equations = [equations_of(stack.only(half)) for half in (1, 2)]
    raw = [part.solve() for part in equations]
    mask = solvent_mask((raw[0] + raw[1]) / 2, stack.grid, stack.diameter)
    return stack, equations, CrossValidation((raw[0], raw[1]), mask, stack.grid)


def begin(equations, count=120, seed=0):
    fits = []
    for number, part in enumerate(equations):
        objective = VolumeObjective(part, 32)
        model = from_map(part.solve(), part.grid, count, Bounds(40.0, 1.0, 2.8), seed)
        fits.append(VolumeFit(f"half{number + 1}", objective, model.with_unit(objective.best_gain(model))))
    return fits


def find(fits, plan, growth, judge):
    """The stages of a course that is gone through to its end."""
    return [one for one in find_course(fits, plan, growth, judge) if isinstance(one, Stage)]


def follow(fits, plan, stages):
    assert len(list(follow_course(fits, plan, stages))) == len(fits) * fits[0].kept.step
    return fits


def test_found_course_can_be_followed_to_the_same_models(halves):
    _, equations, judge = halves
    found = begin(equations)
    stages = find(found, Plan(5, 2e-2, 0.75), 1, judge)
    assert 1 <= len(stages) <= 2
    again = follow(begin(equations), Plan(5, 2e-2, 0.75), stages)
    for a, b in zip(found, again, strict=True):
        assert a.kept.step == b.kept.step
        assert a.kept.terms["loss"] == b.kept.terms["loss"]
        assert len(a.kept.model) == len(b.kept.model)
        for p, q in zip(a.kept.model.parameters(), b.kept.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_fits_side_by_side_are_those_of_one_thread(halves):
    """Two threads: each half takes one, and every bit is as with one thread for both."""
    _, equations, judge = halves
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        fits, shares = begin(equations), []
        torch.set_num_threads(threads)
        for one in fits:
            own = one.objective._fine.error_and_gradient

            def seen(volume, own=own, shares=shares):
                shares.append((threading.get_ident(), torch.get_num_threads()))
                return own(volume)

            one.objective._fine.error_and_gradient = seen
        try:
            find(fits, Plan(2, 2e-2, 0.75), 0, judge)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert (len({thread for thread, _ in shares}) > 1) == (threads > 1)
        assert {share for _, share in shares} == {1}
        found.append([one.kept.model for one in fits])
    for alone, beside in zip(*found, strict=True):
        for a, b in zip(alone.parameters(), beside.parameters(), strict=True):
            assert torch.equal(a, b)


def test_wide_fits_take_one_step_at_a_time(halves, monkeypatch):
    """Side by side they would need more memory than one after the other, each with all threads."""
    _, equations, judge = halves
    fits, shares = begin(equations), []
    monkeypatch.setattr(course, "_PAIRED", fits[0].objective.support - 1)
    own = VolumeObjective.__call__

    def seen(self, model, step):
        shares.append((threading.get_ident(), torch.get_num_threads()))
        return own(self, model, step)

    monkeypatch.setattr(VolumeObjective, "__call__", seen)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        find(fits, Plan(2, 2e-2, 0.75), 0, judge)
    finally:
        torch.set_num_threads(before)
    assert set(shares) == {(threading.get_ident(), 2)}


def test_residual_is_divided_by_what_was_measured(halves):
    """(b - KV) / w, w no less than a tenth of the mean of its shell: beside the whole response at a time."""
    _, equations, _ = halves
    one = begin(equations)[0]
    level = one.objective._fine
    with torch.no_grad():
        volume = one.objective.render(one.kept.model.gaussians())
    found = one.objective.residual(volume)
    response = level._response
    shells = shell_index(len(response), 3).clamp(max=len(response) // 2)
    count = torch.bincount(shells.flatten())
    mean = torch.bincount(shells.flatten(), response.double().flatten()) / count
    # The last shell's mean is that of its own, without the corners beyond.
    inner = shell_index(len(response), 3) == len(response) // 2
    mean[-1] = response[inner].double().mean()
    least = 0.1 * mean[shells] + 1e-6 * response.max()
    expected = convolve(-one.objective.error_and_gradient(volume)[1], (1 / (response + least)).float())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_course_tells_what_happens_in_order(halves):
    """Ten steps of both halves by turns, the score of the epoch; at its end the stage."""
    _, equations, judge = halves
    fits = begin(equations)
    told = list(find_course(fits, Plan(3, 2e-2, 0.75), 1, Told(judge, (1e-3, 1e-3))))
    epoch = ["half1", "half2"] * 10 + [Score]
    names = [one.name if isinstance(one, VolumeFit) else type(one) for one in told]
    assert names == (epoch * 2 + [Stage]) * 2
    scores = [one for one in told if isinstance(one, Score)]
    stages = [one for one in told if isinstance(one, Stage)]
    assert [score.epoch for score in scores] == [1, 2, 3, 4]
    assert [score.gaussians for score in scores] == [120, 120, stages[1].gaussians, stages[1].gaussians]
    assert [stage.score for stage in stages] == [scores[1].value, scores[3].value]
    assert stages[1].gaussians > 120


class Told(CrossValidation):
    """A judge with given opinions of each comparison: the gain and its error."""

    def __init__(self, judge, *gains):
        vars(self).update(vars(judge))
        self.gains = iter(gains)

    def gain(self, before, after):
        return next(self.gains)


def test_growth_that_harms_is_taken_back(halves):
    """The models of the first stage are the result, and no stage follows."""
    _, equations, judge = halves
    fits = begin(equations)
    losses = {}
    stages = []
    for one in find_course(fits, Plan(3, 2e-2, 0.75), 3, Told(judge, (-1e-2, 1e-3))):
        if isinstance(one, VolumeFit):
            losses[one.name, one.state.step] = one.state.terms["loss"]
        elif isinstance(one, Stage):
            stages.append(one)
    assert [stage.kept for stage in stages] == [True, False]
    assert [len(one.kept.model) for one in fits] == [120, 120]
    assert [stage.epochs for stage in stages] == [2, 2]  # of 3: two thirds, then half
    assert [one.kept.terms["loss"] for one in fits] == [losses["half1", 20], losses["half2", 20]]
    full = follow(begin(equations[:1]), Plan(3, 2e-2, 0.75), stages)
    assert len(full[0].kept.model) == 120
    assert full[0].kept.step == fits[0].kept.step == 20
    assert fits[0].state.step == 40


@pytest.mark.parametrize(
    ("gain", "error", "kept"),
    [
        (5e-3, 1e-3, True),
        (0.0, 1e-6, True),
        (-5e-3, 2e-3, True),  # within three standard errors
        (-1e-3, 1e-5, True),  # certain, and of no matter
        (-5e-3, 1e-3, False),
        (math.nan, math.nan, False),
    ],
)
def test_more_gaussians_are_kept_unless_worse_beyond_error(halves, gain, error, kept):
    _, equations, judge = halves
    stages = find(begin(equations), Plan(2, 2e-2, 0.75), 1, Told(judge, (gain, error)))
    assert stages[1].kept is kept
    assert (stages[1].gain, stages[1].gain_error) == pytest.approx((gain, error), nan_ok=True)


@pytest.mark.slow
def test_rounding_does_not_change_the_course(halves):
    """Equations that differ by more than the rounding of any machine: as many Gaussians after as many epochs."""
    _, equations, judge = halves
    courses = []
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        noisy = [
            dataclasses.replace(part, linear=part.linear * (1 + 1e-5 * seed * torch.randn(32, 32, 32, generator=rng)))
            for part in equations
        ]
        stages = find(begin(noisy), Plan(6, 2e-2, 0.75), 2, judge)
        courses.append([(stage.gaussians, stage.epochs, stage.kept) for stage in stages])
    assert courses[0] == courses[1] == courses[2]


def test_without_a_judge_the_number_of_epochs_is_fixed(halves):
    """A loss that has long converged ends nothing: when it does so hangs on rounding."""
    _, equations, _ = halves
    fits = begin(equations)
    assert find(fits, Plan(40, 2e-2, 0.6), 2, None) == [Stage(120, 40)]
    assert fits[0].kept.step == 400


def test_fit_is_better_than_the_classical_map(halves):
    stack, equations, judge = halves
    truth, _ = read_map(stack.table.stacks[0].parent / "truth.mrc")
    from emsplat.measures.fsc import fsc

    fits = begin(equations, 600)
    find(fits, Plan(8, 2e-2, 0.75), 1, judge)
    for one, part in zip(fits, equations, strict=True):
        with torch.no_grad():
            fitted = voxelize(one.kept.model.gaussians(), stack.grid)
        gained, plain = (float(fsc(volume, truth, judge._mask)[1:].mean()) for volume in (fitted, part.solve()))
        assert gained > plain


def test_plan_after_a_plan_goes_on_counting(stack):
    objective = VolumeObjective(equations_of(stack), 32)
    model = field(10, spread=10.0)
    states = list(fit(State.begin(model, 20), objective, Plan(1, 1e-3, 0.5, first=2)))
    assert [state.step for state in states] == list(range(21, 31))
    assert states[0].rate == 1e-3


def test_unmeasured_frequencies_are_not_amplified(star):
    """Views near one axis only: in the empty cone the Gaussians have no more power than the truth."""
    stack = open_particles(star)
    top = (stack.table.poses.rotation[:, 2, 2].abs() > 0.7).nonzero()[:, 0]
    equations = equations_of(stack.take(top))
    assert equations.coverage() < 0.9
    [one] = follow(begin([equations], 600), Plan(8, 2e-2, 0.75), [Stage(600, 8)])
    truth, _ = read_map(stack.table.stacks[0].parent / "truth.mrc")
    with torch.no_grad():
        fitted = voxelize(one.kept.model.gaussians(), stack.grid) / equations.gain(truth)
    shells = shell_index(32, 3)
    relative = equations.weight() / mean_per_shell(equations.weight())[shells.clamp(max=16)]
    empty = (relative < 0.1) & (shells > 2) & (shells < 14)
    power = [float(rfft(volume, 3)[empty].abs().square().sum()) for volume in (fitted, truth)]
    assert 0.1 * power[1] < power[0] < 1.2 * power[1]
