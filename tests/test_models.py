"""The seam of models, by its smallest second user: every particle shows one mixture, shifted by a latent of its own."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from emsplat.errors import InputError
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint
from emsplat.fitting.images import ImageObjective
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Optimiser, Plan, State
from emsplat.imaging.ctf import ctf
from emsplat.imaging.project import project
from emsplat.maths.geometry import axis_rotation, random_rotations
from emsplat.models.base import ParameterGroup, Saved, rows_of
from emsplat.models.gaussians import Bounds, read_gaussian_field
from emsplat.models.starts import ball
from emsplat.types import Batch, Gaussians, Grid, Optics, Poses
from memory import Memory

GRID = Grid(24, 2.0)
COUNT = 40


class ShiftedCopies(nn.Module):
    """A mixture that does not change, and where it lies in each particle: (p, 3) in Å."""

    def __init__(self, mixture, shift):
        super().__init__()
        self.mixture = mixture
        self.shift = nn.Parameter(shift)

    def gaussians(self, batch=None):
        if batch is None:
            return self.mixture
        moved = self.mixture.mean + rows_of(self.shift, batch.index)[:, None]
        return Gaussians(moved, self.mixture.covariance, self.mixture.amplitude)

    def poses(self, batch):
        return batch.poses

    def groups(self):
        return [ParameterGroup({"shift": self.shift}, rate=10.0, sparse=True)]

    def state(self):
        tensors = {name: getattr(self.mixture, name) for name in ("mean", "covariance", "amplitude")}
        return Saved("shifted copies", {}, tensors | {"shift": self.shift})

    @classmethod
    def read(cls, saved):
        return cls(
            Gaussians(*(saved.tensors[name] for name in ("mean", "covariance", "amplitude"))), saved.tensors["shift"]
        )


class TurnedTogether(ShiftedCopies):
    """All poses are wrong by one and the same turn about the beam and one shift in the image."""

    def __init__(self, mixture):
        super().__init__(mixture, torch.zeros(1, 3))
        self.angle, self.offset = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2))

    def gaussians(self, batch=None):
        return self.mixture

    def poses(self, batch):
        one, zero = torch.ones(()), torch.zeros(())
        cosine, sine = torch.cos(self.angle), torch.sin(self.angle)
        turn = torch.stack([cosine, -sine, zero, sine, cosine, zero, zero, zero, one]).reshape(3, 3)
        return Poses(turn @ batch.poses.rotation, batch.poses.shift + self.offset)

    def groups(self):
        return [ParameterGroup({"angle": self.angle}, rate=0.3), ParameterGroup({"offset": self.offset})]


class Shifted(Memory):
    """Images of shifted copies."""

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.mixture = Gaussians(4 * torch.randn(8, 3, generator=rng), 9 * torch.eye(3).expand(8, 3, 3), torch.ones(8))
        self.shift = 2 * torch.randn(COUNT, 3, generator=rng)
        poses = Poses(random_rotations(COUNT, rng).float(), torch.randn(COUNT, 2, generator=rng))
        moved = Gaussians(self.mixture.mean + self.shift[:, None], self.mixture.covariance, self.mixture.amplitude)
        values = (300, 2.7, 0.1, 9000, 8500, 0.6, 0, 0, 1)
        optics = Optics(*(torch.full((COUNT,), float(v)) for v in values))
        spectrum = torch.fft.rfft2(project(moved, poses, GRID)) * ctf(optics, GRID)
        images = torch.fft.irfft2(spectrum, s=(24, 24))
        super().__init__(GRID, images, poses, optics)


def run(state, objective, plan, until=None):
    *_, last = fit(state, objective, plan, until)
    return last


@pytest.mark.slow
def test_latents_are_found_from_a_wrong_start():
    """What lies in the image plane; along the beam a single projection says nothing, and nothing moves it."""
    stack = Shifted()
    state = run(
        State.begin(ShiftedCopies(stack.mixture, torch.zeros(COUNT, 3))),
        ImageObjective(stack, batch=8, seed=0),
        Plan(120, 3e-2, 0.96),
    )
    rows = stack.all.poses.rotation
    off = torch.einsum("pij,pj->pi", rows, state.model.shift.detach() - stack.shift)
    before = torch.einsum("pij,pj->pi", rows, stack.shift)
    assert float(off[:, :2].square().mean().sqrt()) < 0.02 * float(before[:, :2].square().mean().sqrt())


def test_only_the_rows_of_a_batch_move():
    stack = Shifted()
    model = ShiftedCopies(stack.mixture, torch.zeros(COUNT, 3))
    objective = ImageObjective(stack, batch=8, seed=0)
    states = fit(State.begin(model), objective, Plan(1, 1e-2, 1.0))
    seen = torch.zeros(COUNT, dtype=torch.bool)
    for batch in stack.batches(8, seed=0):
        before = model.shift.detach().clone()
        moments = next(states).optimiser.moments()
        moved = (model.shift.detach() != before).any(1)
        seen[batch.index] = True
        assert moved.nonzero()[:, 0].tolist() == sorted(batch.index.tolist())
        assert torch.equal(moments["shift.exp_avg"].any(1), seen)


def test_poses_of_a_model_are_fitted():
    stack = Shifted()
    still = Gaussians(stack.mixture.mean, stack.mixture.covariance, stack.mixture.amplitude)
    spectrum = torch.fft.rfft2(project(still, stack.all.poses, GRID)) * ctf(stack.all.optics, GRID)
    turn = axis_rotation([0.0, 0.0, 1.0], 0.1)
    told = Poses(
        torch.from_numpy(turn).float().T @ stack.all.poses.rotation, stack.all.poses.shift - torch.tensor([0.7, -0.4])
    )
    stack.all = Batch(
        torch.fft.irfft2(spectrum, s=(24, 24)), told, stack.all.optics, stack.all.optics_group, stack.all.index
    )
    state = run(State.begin(TurnedTogether(still)), ImageObjective(stack, batch=8, seed=0), Plan(60, 2e-2, 0.95))
    assert float(state.model.angle) == pytest.approx(0.1, abs=5e-3)
    assert state.model.offset.tolist() == pytest.approx([0.7, -0.4], abs=0.02)


def test_any_model_is_saved_and_goes_on_where_it_was(tmp_path):
    stack, plan = Shifted(), Plan(4, 1e-2, 0.8)
    whole = run(
        State.begin(ShiftedCopies(stack.mixture, torch.zeros(COUNT, 3))), ImageObjective(stack, batch=8, seed=0), plan
    )
    state = run(
        State.begin(ShiftedCopies(stack.mixture, torch.zeros(COUNT, 3))),
        ImageObjective(stack, batch=8, seed=0),
        plan,
        2,
    )
    save_checkpoint(tmp_path / "c.safetensors", state)
    begun = load_checkpoint(tmp_path / "c.safetensors", read=ShiftedCopies.read)
    again = run(begun, ImageObjective(stack, batch=8, seed=0), plan)
    assert torch.equal(again.model.shift, whole.model.shift)
    with pytest.raises(InputError, match="kind 'shifted copies'; expected 'gaussians'"):
        load_checkpoint(tmp_path / "c.safetensors")


def test_groups_have_rates_of_their_own():
    model = ball(5, GRID, Bounds(12.0, 1.0, 1.0), 0)
    fast, slow = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    model.groups = lambda: [ParameterGroup({"fast": fast}, rate=3.0), ParameterGroup({"slow": slow})]
    optimiser = Optimiser(model.groups())
    (fast + slow).sum().backward()
    optimiser.step(0.1)
    torch.testing.assert_close(fast.detach(), torch.full((3,), -0.3))
    torch.testing.assert_close(slow.detach(), torch.full((3,), -0.1))


def test_the_optimiser_is_that_of_pytorch():
    """Bit for bit: dense and sparse Adam, also where a parameter has no gradient at first."""
    generator = torch.Generator().manual_seed(0)
    model = ball(5, GRID, Bounds(12.0, 1.0, 1.0), 0)
    start, rows = torch.randn(4, 3, generator=generator), torch.randn(6, 2, generator=generator)
    own, theirs = ([nn.Parameter(start.clone()), nn.Parameter(rows.clone())] for _ in range(2))
    late, late_twin = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    dense, sparse = ParameterGroup({"a": own[0], "late": late}), ParameterGroup({"b": own[1]}, rate=2.0, sparse=True)
    model.groups = lambda: [dense, sparse]
    optimiser = Optimiser(model.groups())
    twins = [torch.optim.Adam([theirs[0], late_twin], lr=0.1, fused=True), torch.optim.SparseAdam([theirs[1]], lr=0.2)]
    for step in range(4):
        weight, index = torch.randn(4, 3, generator=generator), torch.tensor([step, 1, 5, 1])
        optimiser.forget()
        for one, more in ((own, late), (theirs, late_twin)):
            loss = (one[0].square() * weight).sum() + nn.functional.embedding(index, one[1], sparse=True).square().sum()
            (loss + (more.square().sum() if step else 0)).backward()
        optimiser.step(0.1)
        for twin in twins:
            twin.step()
            twin.zero_grad()
    assert torch.equal(own[0], theirs[0])
    assert torch.equal(own[1], theirs[1])
    assert torch.equal(late, late_twin)


def test_a_fit_does_not_import_the_compiler():
    """Which takes longer than many fits, and 120 MB; classes of torch.optim do."""
    code = """
import sys
import torch
from emsplat.fitting.state import Optimiser
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import ball
from emsplat.types import Grid
model = ball(5, Grid(8, 1.0), Bounds(12.0, 1.0, 1.0), 0)
optimiser = Optimiser(model.groups())
sum(p.sum() for p in model.parameters()).backward()
optimiser.step(0.1)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mixture_is_read_from_what_it_saved():
    model = ball(5, GRID, Bounds(12.0, 2.0, 1.0), 0, rotation=False)
    again = read_gaussian_field(model.state())
    assert again.bounds == model.bounds
    assert not again.rotation
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
