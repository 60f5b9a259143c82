"""Objective and loop on a stack in memory: the loss, its gradient, checkpoints, splitting."""

import pytest
import torch
from safetensors.torch import save_file

from emsplat.errors import EmsplatError, InputError
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint
from emsplat.fitting.growth import fit_doubling
from emsplat.fitting.images import ImageObjective, noise_weight
from emsplat.fitting.objective import error_and_gradient, squared_error
from emsplat.fitting.state import Plan, State
from emsplat.imaging.ctf import ctf
from emsplat.imaging.project import project
from emsplat.maths.fourier import shell_index
from emsplat.maths.geometry import random_rotations
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import ball
from emsplat.types import Gaussians, Grid, Optics, Poses
from memory import Memory

GRID = Grid(24, 2.0)


def optics(count, dtype=torch.float32):
    values = (300, 2.7, 0.1, 9000, 8500, 0.6, 0, 0, 1)
    return Optics(*(torch.full((count,), float(v), dtype=dtype) for v in values))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Problems this small are faster, and resuming is bit-identical, with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Hidden(Memory):
    """Images that a hidden mixture made."""

    def __init__(self, count=60, noise=0.0):
        rng = torch.Generator().manual_seed(0)
        self.truth = Gaussians(4 * torch.randn(8, 3, generator=rng), 9 * torch.eye(3).expand(8, 3, 3), torch.ones(8))
        poses = Poses(random_rotations(count, rng).float(), torch.randn(count, 2, generator=rng))
        clean = torch.fft.rfft2(project(self.truth, poses, GRID)) * ctf(optics(count), GRID)
        images = torch.fft.irfft2(clean, s=(24, 24)) + noise * torch.randn(count, 24, 24, generator=rng)
        super().__init__(GRID, images, poses, optics(count))


def start(seed=0, **options):
    return State.begin(ball(40, GRID, Bounds(12.0, 4.0, 1.0), seed, **options))


def run(state, objective, plan, doubling=()):
    *_, last = fit_doubling(state, objective, plan, doubling)
    return last


def test_loss_is_the_mean_squared_error_in_real_space():
    stack = Hidden(7, noise=0.1)
    stack.all.poses.shift.zero_()  # a fractional shift leaves a part at Nyquist that no real image has
    objective = ImageObjective(stack, batch=7, seed=0)
    seen, weight = objective.observe(stack.all)
    model = ball(20, GRID, Bounds(12.0, 4.0, 1.0), 0).gaussians()
    centred = Poses(stack.all.poses.rotation, torch.zeros(7, 2))
    predicted = torch.fft.irfft2(torch.fft.rfft2(project(model, centred, GRID)) * seen.transfer, s=(24, 24))
    observed = torch.fft.irfft2(seen.spectrum, s=(24, 24))
    expected = (predicted - observed).square().mean()
    torch.testing.assert_close(objective.loss(model, stack.all), expected, rtol=1e-4, atol=0)
    projection = project(model, centred, GRID)
    torch.testing.assert_close(
        squared_error(projection, seen.transfer, seen.spectrum, weight), expected, rtol=1e-4, atol=0
    )


def test_loss_vanishes_for_the_model_that_made_the_images():
    stack = Hidden(9)
    objective = ImageObjective(stack, batch=9, seed=0)
    power = stack.all.images.square().mean()
    # Shifting images in Fourier space wraps around, rendering them shifted does not: hence not exactly 0.
    assert objective.loss(stack.truth, stack.all) < 1e-4 * power


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_the_loss(weighted):
    rng = torch.Generator().manual_seed(0)
    projection = torch.randn(3, 8, 8, generator=rng, dtype=torch.float64, requires_grad=True)
    transfer = torch.randn(3, 8, 5, generator=rng, dtype=torch.float64)
    observed = torch.fft.rfft2(torch.randn(3, 8, 8, generator=rng, dtype=torch.float64))
    # A transfer function is real and even, as that of a real filter: make it so on the self-conjugate columns.
    for column in (0, 4):
        transfer[:, :, column] = 0.5 * (transfer[:, :, column] + transfer[:, -torch.arange(8) % 8, column])
    weight = 1.0 / (1 + shell_index(8).double()).expand(3, 8, 5) if weighted else torch.ones(1, 1).double()
    assert torch.autograd.gradcheck(lambda p: squared_error(p, transfer, observed, weight), [projection])
    error, gradient = error_and_gradient(projection.detach(), transfer, observed, weight)
    (automatic,) = torch.autograd.grad(squared_error(projection, transfer, observed, weight), projection)
    torch.testing.assert_close(gradient / 3, automatic)
    assert float(error) > 0


def test_noise_weights_are_per_shell_and_group():
    noise = torch.stack([torch.arange(1.0, 14.0), torch.full((13,), 2.0)])
    weight = noise_weight(noise, GRID)
    assert weight.shape == (2, 24, 13)
    assert weight[0, 0, 3] == pytest.approx(1 / 4)
    assert weight[1, 0, 3] == pytest.approx(1 / 2)
    assert weight[0, 12, 12] == 0  # a corner


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_fitting_lowers_the_loss(batch, device):
    stack = Hidden()
    stack.all = stack.all.to(device=device)
    objective = ImageObjective(stack, batch=batch, seed=0)
    state = State.begin(start().model.to(device))
    before = objective.loss(state.model.gaussians(), stack.all)
    state = run(state, objective, Plan({1: 4, 7: 30, 60: 150}[batch], 2e-2, 0.98))
    assert objective.loss(state.model.gaussians(), stack.all) < 0.2 * before


def test_resumed_fit_is_bit_identical(tmp_path):
    objective, plan = ImageObjective(Hidden(), batch=8, seed=0), Plan(4, 1e-2, 0.8)
    whole = run(start(), objective, plan, (2,)).model
    for stop in (3, 8, 17, 20):
        for state in fit_doubling(start(), objective, plan, (2,)):
            if state.step == stop:
                save_checkpoint(tmp_path / "c.safetensors", state)
                break
        objective = ImageObjective(Hidden(), batch=8, seed=0)
        again = run(load_checkpoint(tmp_path / "c.safetensors"), objective, plan, (2,)).model
        for a, b in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)


def test_splitting_and_learning_rate_follow_the_plan():
    objective, plan = ImageObjective(Hidden(), batch=20, seed=0), Plan(4, 1e-2, 0.5)
    counts, rates = [], []
    for state in fit_doubling(start(), objective, plan, (1, 3)):
        counts.append(len(state.model))
        rates.append(state.rate)
    assert counts == [40] * 3 + [80] * 6 + [160] * 3
    assert rates == pytest.approx([1e-2] * 3 + [5e-3] * 3 + [2.5e-3] * 3 + [1.25e-3] * 3)
    moments = state.optimiser.moments()
    assert {float(value) for name, value in moments.items() if name.endswith(".step")} == {12.0}


def test_constrained_models_are_fitted_and_saved(tmp_path):
    for options in ({"isotropic": True}, {"rotation": False}):
        state = run(start(**options), ImageObjective(Hidden(), batch=20, seed=0), Plan(2, 1e-2, 1.0))
        save_checkpoint(tmp_path / "c.safetensors", state)
        again = load_checkpoint(tmp_path / "c.safetensors").model
        assert torch.equal(again.gaussians().covariance, state.model.gaussians().covariance)
        assert again.rotation == state.model.rotation


def test_divergence_is_said():
    stack = Hidden()
    stack.all.images[3] = torch.inf
    with pytest.raises(EmsplatError, match=r"diverged.*--learning-rate"):
        run(start(), ImageObjective(stack, batch=60, seed=0), Plan(1, 1e-2, 1.0))


@pytest.mark.parametrize("damage", [lambda c: c[:50], lambda c: b"", lambda c: b"x" * 200, lambda c: c[:-40]])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, start())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"not a checkpoint that can be resumed .*--overwrite"):
        load_checkpoint(path)


def test_a_fit_stopped_right_before_it_splits_splits_when_it_is_resumed(tmp_path):
    plan = Plan(2, 1e-2, 0.8)
    whole = run(start(), ImageObjective(Hidden(), batch=20, seed=0), plan, (1,)).model
    for state in fit_doubling(start(), ImageObjective(Hidden(), batch=20, seed=0), plan, (1,)):
        if state.step == 3:
            assert len(state.model) == 40
            save_checkpoint(tmp_path / "c.safetensors", state)
    objective = ImageObjective(Hidden(), batch=20, seed=0)
    again = run(load_checkpoint(tmp_path / "c.safetensors"), objective, plan, (1,)).model
    assert len(again) == 80
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_both_halves_of_a_gaussian_inherit_its_moments():
    stack = Hidden()
    plan = Plan(2, 0.0, 1.0)  # a rate of 0: parameters rest, moments move
    before, after = list(fit_doubling(start(), ImageObjective(stack, batch=60, seed=0), plan, (1,)))
    gradient = torch.autograd.grad(
        ImageObjective(stack, batch=60, seed=0)(after.model, 1)["loss"], list(after.model.parameters())
    )
    old = start().model
    ImageObjective(stack, batch=60, seed=0)(old, 0)["loss"].backward()
    moments = after.optimiser.moments()
    for (name, _), origin, g in zip(after.model.named_parameters(), old.parameters(), gradient, strict=True):
        inherited = 0.1 * torch.cat([origin.grad, origin.grad])
        moment = moments[f"{name}.exp_avg"]
        torch.testing.assert_close(moment, 0.9 * inherited + 0.1 * g, rtol=1e-3, atol=1e-7)
    assert len(before.model) == 40


def test_checkpoint_holds_the_whole_state(tmp_path):
    state = run(start(), ImageObjective(Hidden(), batch=20, seed=0), Plan(2, 1e-2, 1.0), (1,))
    save_checkpoint(tmp_path / "c.safetensors", state)
    again = load_checkpoint(tmp_path / "c.safetensors")
    assert again.step == state.step == 6
    assert again.model.bounds == state.model.bounds
    for a, b in zip(state.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = state.optimiser.moments()
    assert moments.keys() == again.optimiser.moments().keys()
    assert len(moments) == 12
    assert all(torch.equal(moment, moments[name]) for name, moment in again.optimiser.moments().items())
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_missing_and_foreign_checkpoints_are_refused(tmp_path):
    save_file({"mean": torch.zeros(3)}, tmp_path / "foreign")
    for name in ("missing", "foreign"):
        with pytest.raises(InputError, match=rf"{name}: not a checkpoint that can be resumed .*--overwrite"):
            load_checkpoint(tmp_path / name)
