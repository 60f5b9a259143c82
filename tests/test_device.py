"""Everything but the kernels runs on the device that the data are on, and does not make the host wait for it.

What is tried here on `virtual_device` runs on CUDA as it stands; tests marked gpu do the same there.
"""

import dataclasses
import shutil
import threading

import mrcfile
import pytest
import torch

from emsplat.accumulate import accumulate, begin, contrast, equations_of, relative_gain
from emsplat.assess.crossvalidate import CrossValidation
from emsplat.config import SimulateConfig
from emsplat.ctf import observe
from emsplat.density import grow
from emsplat.errors import EmsplatError, InputError
from emsplat.fit import Plan, State, fit, load_checkpoint, save_checkpoint
from emsplat.geometry import random_rotations
from emsplat.io.mrc import writing_stack
from emsplat.io.particles import read_particles
from emsplat.model import PARAMETERS, Bounds, ball
from emsplat.objective import ImageObjective, VolumeObjective
from emsplat.one_pass import VolumeFit, fit_course
from emsplat.particles import estimate_noise, open_table
from emsplat.simulate import simulate
from emsplat.types import Aberrations, Batch, Grid, Optics, Poses
from virtual_device import on_device, synchronisations

GRID = Grid(16, 2.0)


@pytest.fixture
def gpu(virtual_gpu):
    return virtual_gpu


def moved(bundle):
    """The same bundle on the virtual device."""
    values = {f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle)}
    kept = {name: moved(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    return type(bundle)(**{k: on_device(v) if isinstance(v, torch.Tensor) else v for k, v in kept.items()})


def aberrations(count, rng):
    magnification = torch.eye(2) + 0.02 * torch.randn(2, 2, 2, generator=rng)
    odd, even = 5 * torch.randn(count, 6, generator=rng), 5 * torch.randn(count, 9, generator=rng)
    return Aberrations(magnification[torch.arange(count) % 2], odd, even)


def some_particles(count=6, bent=True):
    rng = torch.Generator().manual_seed(1)

    def numbers(low, high):
        return low + (high - low) * torch.rand(count, generator=rng)

    optics = Optics(
        torch.full((count,), 300.0),
        torch.full((count,), 2.7),
        torch.full((count,), 0.1),
        numbers(8e3, 1e4),
        numbers(8e3, 1e4),
        numbers(0, 3),
        numbers(0, 1),
        numbers(0, 50),
        numbers(0.9, 1.1),
        aberrations(count, rng) if bent else None,
        torch.arange(count) % 3,
    )
    poses = Poses(random_rotations(count, rng).float(), 3 * torch.randn(count, 2, generator=rng))
    images = torch.randn(count, GRID.size, GRID.size, generator=rng)
    return Batch(images, poses, optics, torch.zeros(count, dtype=torch.int64), torch.arange(count))


@pytest.mark.parametrize("corner", [True, False])
def test_observing_is_the_same_on_a_device(gpu, corner):
    batch = some_particles()
    there = moved(batch)
    observe(there, GRID)  # constants of the grid arrive
    with synchronisations() as found:
        seen = observe(there, GRID, corner=corner)
    assert not found
    expected = observe(batch, GRID, corner=corner)
    torch.testing.assert_close(seen.transfer.cpu(), expected.transfer, rtol=0, atol=2e-5)
    torch.testing.assert_close(seen.spectrum.cpu(), expected.spectrum, rtol=0, atol=2e-4)


def same(found, expected, **tolerances):
    """Bundles or tensors with the same numbers, wherever they are."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found.cpu(), expected, **(tolerances or {"rtol": 0, "atol": 0}))
        return
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        same(one, other, **tolerances)


@pytest.fixture(scope="module")
def particles(tmp_path_factory):
    """60 images of a small protein, in two optics groups with aberrations of their own."""
    folder = tmp_path_factory.mktemp("device") / "particles"
    config = SimulateConfig(box=32, pixel_size=4.0, particles=60, snr=2.0, atoms=1500, seed=3, micrograph_particles=10)
    return simulate(config, None, folder)


def opened(path, **change):
    """The stack of a file with whatever may stand in the way of a batch."""
    table = read_particles(path)
    rng = torch.Generator().manual_seed(2)
    bent = aberrations(len(table), rng)
    even = Aberrations(bent.magnification.double(), bent.odd.double(), bent.even.double())
    optics = dataclasses.replace(table.optics, aberrations=even, treatment=torch.arange(len(table)) % 3)
    return open_table(dataclasses.replace(table, optics=optics), **change)


KINDS = {
    "as they are": {},
    "coarser": {"pixel_size": 5.5},
    "cut": {"box": 20, "pixel_size": 5.0},
    "cut, dark": {"box": 24, "pixel_size": 4.0, "symmetry": "D2"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_on_a_device(gpu, particles, kind):
    stack = opened(particles, **KINDS[kind])
    with synchronisations() as found:
        there = [*stack.on(gpu).batches(25, seed=1, epoch=2, skip=1), *stack.on(gpu).sequential(40, normalised=False)]
    assert not found  # but by the threads that read
    here = [*stack.batches(25, seed=1, epoch=2, skip=1), *stack.sequential(40, normalised=False)]
    for one, other in zip(there, here, strict=True):
        assert {tensor.device for tensor in one.tensors()} == {gpu}
        same(one.images, other.images, rtol=0, atol=2e-4)  # where a phase of an aberration is divided by almost 0
        for name in ("poses", "optics", "optics_group", "index"):
            same(getattr(one, name), getattr(other, name))


def test_bad_images_are_named_on_a_device(gpu, particles, tmp_path):
    with mrcfile.open(particles.parent / "particles.mrcs", permissive=True) as file:
        images = file.data.copy()
    images[7] = 5.0
    shutil.copy(particles, tmp_path / "particles.star")
    with writing_stack(tmp_path / "particles.mrcs", len(images), Grid(32, 4.0)) as write:
        write(torch.from_numpy(images))
    stack = open_table(read_particles(tmp_path / "particles.star")).on(gpu)
    with pytest.raises(InputError, match=r"row 8: 1 of 60 .* constant"):
        list(stack.sequential(64))


def test_readers_end_when_the_consumer_stops_early(gpu, particles):
    before = threading.active_count()
    stack = open_table(read_particles(particles)).on(gpu)
    next(stack.sequential(1))  # the pool of readers stays
    for _ in range(3):
        batches = stack.sequential(1)
        next(batches)
        batches.close()
    pool = sum(thread.name.startswith("emsplat-reader_") for thread in threading.enumerate())
    assert threading.active_count() <= before + pool


def test_sums_are_the_same_on_a_device(gpu, particles, tmp_path):
    stack = opened(particles, symmetry="C2")
    there = stack.on(gpu)
    noise = estimate_noise(stack)
    same(estimate_noise(there), noise, rtol=1e-5, atol=1e-6)
    expected, found = begin(stack), begin(there)
    for _ in accumulate(expected, stack, noise):
        pass
    with synchronisations() as waits:
        for _ in accumulate(found, there, on_device(noise)):
            pass
    assert [wait[1] for wait in waits if "cpu to" not in wait[1]] == ["copy gpu:0 to cpu"]  # one look per batch
    assert len(waits) <= 4  # symmetry, window and grid arrive, once
    same(found.weight, expected.weight, rtol=1e-4, atol=1e-3)
    found.save(tmp_path / "sums.safetensors")
    for kind in (stack, there):
        again = begin(kind)
        again.load(tmp_path / "sums.safetensors")
        same(again.numerator, found.numerator.cpu())
    one, other = found.equations(), expected.equations()
    scale = float(other.linear.abs().max())
    same(one.linear, other.linear, rtol=0, atol=1e-5 * scale)
    same(one.solve(), other.solve(), rtol=0, atol=1e-4 * float(other.solve().abs().max()))
    assert one.coverage() == pytest.approx(other.coverage(), abs=1e-3)
    assert contrast(one.solve()) == pytest.approx(contrast(other.solve()), rel=1e-3)
    assert relative_gain(one, one.scaled(2.0)) == pytest.approx(0.5, rel=1e-5)


BOUNDS = Bounds(40.0, 4.0, 2.0)


def run(state, objective, plan):
    *_, last = fit(state, objective, plan)
    return last


def equal_models(one, other):
    for name in PARAMETERS:
        same(getattr(one, name).detach(), getattr(other, name).detach(), rtol=1e-3, atol=1e-4)


def test_a_fit_to_images_does_not_wait(gpu, particles, tmp_path):
    stack = opened(particles)
    noise = estimate_noise(stack)
    model = ball(50, stack.grid, BOUNDS, 0)
    plan = Plan(2, 1e-2, 0.5, splits=(1,))
    expected = run(State.begin(model.copy()), ImageObjective(stack, batch=20, seed=0, noise=noise), plan)
    objective = ImageObjective(stack.on(gpu), batch=20, seed=0, noise=on_device(noise))
    run(State.begin(model.copy().to(gpu)), objective, Plan(1, 1e-2, 0.5))  # constants of the grid arrive
    steps = fit(State.begin(model.copy().to(gpu)), objective, plan)
    for number in range(6):
        with synchronisations() as waits:
            state = next(steps)
        looked = ["_local_scalar_dense"] if number in (2, 5) else []  # at the end of each epoch
        assert [wait[1] for wait in waits if "device.py" not in wait[2]] == looked or number == 3  # splits
        if number == 3:
            save_checkpoint(tmp_path / "half.safetensors", state)
    assert next(steps, None) is None
    same(state.terms["loss"], expected.terms["loss"], rtol=1e-4, atol=0)
    equal_models(state.model, expected.model)
    for device in (gpu, torch.device("cpu")):
        data = stack.on(device)
        weight = noise if device.type == "cpu" else on_device(noise)
        begun = load_checkpoint(tmp_path / "half.safetensors", device)
        resumed = run(begun, ImageObjective(data, batch=20, seed=0, noise=weight), plan)
        equal_models(resumed.model, expected.model)


def test_a_fit_to_sums_does_not_wait(gpu, particles):
    stack = open_table(read_particles(particles))
    equations = equations_of(stack)
    there = equations_of(stack.on(gpu))
    model = ball(50, stack.grid, BOUNDS, 0)
    plan = Plan(2, 1e-2, 0.5)
    expected = run(State.begin(model.copy()), VolumeObjective(equations, 32, coarse_steps=5), plan)
    objective = VolumeObjective(there, 32, coarse_steps=5)
    run(State.begin(model.copy().to(gpu)), objective, Plan(1, 1e-2, 0.5))
    begun = State.begin(model.copy().to(gpu))
    with synchronisations() as waits:
        state = run(begun, objective, plan)
    assert [wait[1] for wait in waits] == ["_local_scalar_dense"] * 2  # at the end of each epoch
    equal_models(state.model, expected.model)
    assert objective.best_gain(state.model) == pytest.approx(
        VolumeObjective(equations, 32).best_gain(expected.model), rel=1e-3
    )
    more = grow(state.model, objective)
    assert more.mean.device == gpu
    assert len(more) == len(grow(expected.model, VolumeObjective(equations, 32)))


def test_a_diverged_fit_ends_on_a_device(gpu, particles, tmp_path):
    stack = open_table(read_particles(particles))
    objective = VolumeObjective(equations_of(stack.on(gpu)), 32)
    state = State.begin(ball(50, stack.grid, BOUNDS, 0).to(gpu))
    with torch.no_grad():
        state.model.amplitude[3] = torch.nan
    steps = fit(state, objective, Plan(1, 1e-2, 1.0))
    state = next(steps)
    with pytest.raises(EmsplatError, match=r"diverged.*--learning-rate"):
        save_checkpoint(tmp_path / "x.safetensors", state)
    with pytest.raises(EmsplatError, match="diverged"):
        list(steps)


def test_judging_and_the_course_are_the_same_on_a_device(gpu, particles):
    stack = open_table(read_particles(particles)).with_halves(0)
    scores = {}
    for device in (torch.device("cpu"), gpu):
        halves = [equations_of(stack.only(half).on(device)) for half in (1, 2)]
        raw = tuple(half.solve() for half in halves)
        mask = torch.ones(32, 32, 32) if device.type == "cpu" else on_device(torch.ones(32, 32, 32))
        judge = CrossValidation(raw, mask, stack.grid)
        fits = [
            VolumeFit(str(n), half, VolumeObjective(half, 32), ball(60, stack.grid, BOUNDS, n).to(device))
            for n, half in enumerate(halves)
        ]
        stages = []
        for _ in fit_course(fits, Plan(3, 2e-2, 0.8), 1, judge, stages):
            pass
        scores[device.type] = [score for stage in stages for _, score in stage.scores]
        curve = judge.curve((fits[0].volume(), fits[1].volume()))
        assert all(len(part) == 17 for part in judge.interval(curve))
    assert len(scores["cpu"]) >= 3
    assert scores["gpu"][:3] == pytest.approx(scores["cpu"][:3], abs=2e-3)
