"""Everything but the kernels runs on the device that the data are on, and does not make the host wait for it.

What is tried here on `virtual_device` runs on CUDA as it stands; tests marked gpu do the same there.
"""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import mrcfile
import numpy as np
import pytest
import torch

from emsplat import device
from emsplat.config import BackprojectConfig, ReconstructConfig, RefineConfig, change, configure
from emsplat.device import choose_device, fits_memory, within_memory
from emsplat.errors import EmsplatError, InputError, Interrupted
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint
from emsplat.fitting.course import Score, VolumeFit, find_course
from emsplat.fitting.growth import fit_doubling, grow
from emsplat.fitting.images import ImageObjective
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective
from emsplat.imaging.ctf import observe
from emsplat.imaging.project import voxelize
from emsplat.io.mrc import read_map, writing_stack
from emsplat.io.particles import read_particles
from emsplat.maths.geometry import random_rotations
from emsplat.maths.groups import cyclic, dihedral
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.models.gaussians import PARAMETERS, Bounds
from emsplat.models.starts import ball
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_table
from emsplat.programs import opening
from emsplat.programs.reconstruct import backproject, reconstruct
from emsplat.programs.refine import refine
from emsplat.run import stop
from emsplat.run.stop import StopRequest
from emsplat.sums.equations import contrast, relative_gain
from emsplat.sums.statistics import accumulate, begin, equations_of
from emsplat.types import PREMULTIPLIED, Aberrations, Batch, Grid, Optics, Poses
from virtual_device import on_device, synchronisations

GRID = Grid(16, 2.0)


@pytest.fixture
def gpu(virtual_gpu):
    return virtual_gpu


def moved(bundle):
    """The same bundle on the virtual device."""
    return bundle.each(on_device)


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
def particles(simulated):
    """60 images of a small protein, in two optics groups with aberrations of their own."""
    return simulated(particles=60, snr=2.0, micrograph_particles=10)


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
    "cut, dark": {"box": 24, "pixel_size": 4.0, "symmetry": dihedral(2)},
}


def same_images(one, other):
    """Images that went through transforms and, where they had been multiplied by the CTF, were divided by it.

    Every error is relative to the largest value of an image. A transform there and back rounds log2(size²) times. A
    phase of up to 60 rad is known to 60 eps in each way to work it out, the CTF too, and where the CTF is as small as
    sqrt(1e-3) (below, 0 is put) a quotient has 32 times that error.
    """
    eps = torch.finfo(torch.float32).eps
    rounding = 2 * eps * math.log2(other.images[0].numel())
    multiplied = other.optics.treatment == PREMULTIPLIED
    allowed = torch.where(multiplied, rounding + 2 * 60 * eps / 1e-3**0.5, rounding)
    largest = other.images.abs().amax((1, 2))
    assert ((one.images.cpu() - other.images).abs().amax((1, 2)) <= allowed * largest).all()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_on_a_device(gpu, particles, kind):
    stack = opened(particles, **KINDS[kind])
    with synchronisations() as found:
        there = [*stack.on(gpu).batches(25, seed=1, epoch=2, skip=1), *stack.on(gpu).sequential(40, normalised=False)]
    assert not found  # but by the threads that read
    here = [*stack.batches(25, seed=1, epoch=2, skip=1), *stack.sequential(40, normalised=False)]
    for one, other in zip(there, here, strict=True):
        assert {tensor.device for tensor in one.tensors()} == {gpu}
        same_images(one, other)
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


ABANDONED = """
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import virtual_device
from emsplat.io.particles import read_particles
from emsplat.particles.images import ImageFiles
from emsplat.particles.open import open_table
read = ImageFiles.read
ImageFiles.read = lambda *inputs: time.sleep(0.5) or read(*inputs)  # one thread waits for the other
batches = open_table(read_particles(Path(sys.argv[1]))).on(virtual_device.make()).sequential(2)
next(batches)
sys.modules["kept"] = batches  # neither used up nor closed when the interpreter ends
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_readers_do_not_keep_the_interpreter_alive(particles):
    command = [sys.executable, "-c", ABANDONED, str(particles), str(Path(__file__).parent)]
    subprocess.run(command, check=True)  # or hangs


def test_sums_are_the_same_on_a_device(gpu, particles, tmp_path):
    stack = opened(particles, symmetry=cyclic(2))
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
    assert relative_gain(one, one.scaled(2.0)) == pytest.approx(0.5, rel=1e-3)  # the prior of few images


BOUNDS = Bounds(40.0, 4.0, 2.0)


def run(state, objective, plan, doubling=()):
    *_, last = fit_doubling(state, objective, plan, doubling)
    return last


def equal_models(one, other):
    for name in PARAMETERS:
        same(getattr(one, name).detach(), getattr(other, name).detach(), rtol=1e-3, atol=1e-4)


def test_a_fit_to_images_does_not_wait(gpu, particles, tmp_path):
    stack = opened(particles)
    noise = estimate_noise(stack)
    model = ball(50, stack.grid, BOUNDS, 0)
    plan = Plan(2, 1e-2, 0.5)
    expected = run(State.begin(model.copy()), ImageObjective(stack, batch=20, seed=0, noise=noise), plan, (1,))
    objective = ImageObjective(stack.on(gpu), batch=20, seed=0, noise=on_device(noise))
    run(State.begin(model.copy().to(gpu)), objective, Plan(1, 1e-2, 0.5))  # constants of the grid arrive
    steps = fit_doubling(State.begin(model.copy().to(gpu)), objective, plan, (1,))
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
    for place in (gpu, torch.device("cpu")):
        data = stack.on(place)
        weight = noise if place.type == "cpu" else on_device(noise)
        begun = load_checkpoint(tmp_path / "half.safetensors", place)
        resumed = run(begun, ImageObjective(data, batch=20, seed=0, noise=weight), plan, (1,))
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
    for place in (torch.device("cpu"), gpu):
        halves = [equations_of(stack.only(half).on(place)) for half in (1, 2)]
        raw = tuple(half.solve() for half in halves)
        mask = torch.ones(32, 32, 32) if place.type == "cpu" else on_device(torch.ones(32, 32, 32))
        judge = CrossValidation(raw, mask, stack.grid)
        fits = [
            VolumeFit(str(n), VolumeObjective(half, 32), ball(60, stack.grid, BOUNDS, n).to(place))
            for n, half in enumerate(halves)
        ]
        happened = find_course(fits, Plan(3, 2e-2, 0.8), 1, judge)
        scores[place.type] = [one.value for one in happened if isinstance(one, Score)]
        maps = tuple(voxelize(one.kept.model.gaussians(), stack.grid).detach() for one in fits)
        assert all(len(part) == 17 for part in judge.band(maps)[1:])
    assert len(scores["cpu"]) >= 3
    assert scores["gpu"][:3] == pytest.approx(scores["cpu"][:3], abs=2e-3)


class Card:
    """What PyTorch says of a GPU."""

    def __init__(self, monkeypatch, *, cuda="12.8", available=True, capability=(9, 0), triton=True):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GTX 980")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        properties = SimpleNamespace(total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(device, "find_spec", lambda name: object() if triton else None)


def test_a_gpu_is_chosen_where_it_can_be_used(monkeypatch):
    Card(monkeypatch)
    for wanted in ("auto", "cuda"):
        chosen, line = choose_device(wanted)
        assert chosen == torch.device("cuda:0")
        assert line == "device: NVIDIA GTX 980, 80 GiB, compute capability 9.0"
    assert choose_device("cpu") == (torch.device("cpu"), "device: CPU, as asked for")


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ({"cuda": None, "available": False}, "PyTorch was built without CUDA"),
        ({"available": False}, "no CUDA device found"),
        (
            {"capability": (5, 2)},
            r"NVIDIA GTX 980 \(compute capability 5.2\) is too old, 7.5 is needed",
        ),
        ({"triton": False}, r"Triton is missing: pip install emsplat\[gpu\]"),
    ],
)
def test_why_there_is_no_gpu_is_said(monkeypatch, card, reason):
    Card(monkeypatch, **card)
    chosen, line = choose_device("auto")
    assert chosen.type == "cpu"
    assert re.fullmatch(rf"device: CPU \({reason}\)", line)
    with pytest.raises(InputError, match=rf"^--device cuda: {reason}; .*or run on the CPU without --device"):
        choose_device("cuda")


def test_memory_that_runs_out_is_said_in_a_line():
    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 has ...")

    assert not fits_memory(too_much)
    assert fits_memory(lambda: None)
    with pytest.raises(InputError, match=r"memory of the GPU .*CUDA out of memory\).*--device cpu"):
        within_memory()(too_much)()


QUICK = {
    "one-pass": configure(ReconstructConfig, epochs=4, gaussians=200, threads=1),
    "images": configure(
        ReconstructConfig, engine="images", epochs=2, gaussians=200, batch=16, threads=1, split_after=(1,)
    ),
}


def on(monkeypatch, chosen):
    """Lets runs choose this device."""
    monkeypatch.setattr(opening, "choose_device", lambda wanted: (chosen, f"device: {chosen}"))


def likeness(one, other, name):
    maps = [read_map(folder / name)[0].flatten() for folder in (one, other)]
    return float(torch.corrcoef(torch.stack(maps))[0, 1])


def check_same_runs(here, there, likeness_at_least=0.99999, residual=2e-3):
    names = {path.name for path in here.iterdir()}
    assert {path.name for path in there.iterdir()} == names
    for name in [name for name in names if name.endswith(".mrc") and not name.startswith("local")]:
        assert likeness(here, there, name) > likeness_at_least, name
    rows = [np.loadtxt(run / "residual.csv", delimiter=",", skiprows=1) for run in (here, there)]
    np.testing.assert_allclose(rows[1], rows[0], rtol=residual)


@pytest.mark.slow
@pytest.mark.parametrize("engine", QUICK)
def test_a_run_is_the_same_on_a_device(gpu, monkeypatch, particles, tmp_path, engine):
    reconstruct(QUICK[engine], particles, tmp_path / "cpu")
    on(monkeypatch, gpu)
    summary = reconstruct(QUICK[engine], particles, tmp_path / "gpu")
    check_same_runs(tmp_path / "cpu", tmp_path / "gpu")
    assert summary["device"] == "gpu"
    assert "device: gpu:0" in (tmp_path / "gpu" / "run.log").read_text()


@pytest.mark.slow
def test_poses_are_the_same_on_a_device(gpu, monkeypatch, particles, tmp_path):
    config = configure(RefineConfig, rounds=1, search="6", epochs=1, growth=0, gaussians=60, threads=1)
    refine(config, particles, tmp_path / "cpu")
    on(monkeypatch, gpu)
    summary = refine(config, particles, tmp_path / "gpu")
    check_same_runs(tmp_path / "cpu", tmp_path / "gpu")
    assert summary["device"] == "gpu"
    here, there = (read_particles(tmp_path / name / "run_data.star").poses for name in ("cpu", "gpu"))
    assert (here.rotation - there.rotation).abs().max() < 1e-3
    assert (here.shift - there.shift).abs().max() < 1e-2


@pytest.mark.slow
def test_a_back_projection_is_the_same_on_a_device(gpu, monkeypatch, particles, tmp_path):
    config = configure(BackprojectConfig, symmetry="C2", threads=1, keep_statistics=True, box=28)
    backproject(config, particles, tmp_path / "cpu")
    on(monkeypatch, gpu)
    added = change(config, add_statistics=())
    backproject(added, particles, tmp_path / "gpu")
    for name in ("run_class001.mrc", "run_half1_class001_unfil.mrc", "sampling.mrc", "mask.mrc"):
        assert likeness(tmp_path / "cpu", tmp_path / "gpu", name) > 0.99999


@pytest.mark.slow
def test_experimental_particles_on_a_device(gpu, monkeypatch, shared_data, tmp_path):
    star = shared_data / "bgal" / "particles.star"
    config = configure(BackprojectConfig, symmetry="D2", first=400, threads=1)
    backproject(config, star, tmp_path / "cpu")
    on(monkeypatch, gpu)
    backproject(config, star, tmp_path / "gpu")
    assert likeness(tmp_path / "cpu", tmp_path / "gpu", "run_class001.mrc") > 0.99999


def stopped_after(monkeypatch, steps):
    """The run is stopped after so many batches and steps, and writes a checkpoint."""
    left = iter(range(steps))

    class Stop(StopRequest):
        def __bool__(self):
            return next(left, None) is None

    @contextmanager
    def interruptible():
        yield Stop()

    monkeypatch.setattr(stop, "interruptible", interruptible)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_on_either_device(gpu, monkeypatch, particles, tmp_path):
    config = QUICK["images"]
    reconstruct(config, particles, tmp_path / "cpu")
    with monkeypatch.context() as patch:
        on(patch, gpu)
        stopped_after(patch, 4)
        with pytest.raises(Interrupted, match="step"):
            reconstruct(config, particles, tmp_path / "gpu")
    assert list((tmp_path / "gpu").glob("*.checkpoint.safetensors"))
    resumed = change(config, resume=True)
    with monkeypatch.context() as patch:
        on(patch, gpu)
        stopped_after(patch, 3)
        with pytest.raises(Interrupted, match="step"):
            reconstruct(resumed, particles, tmp_path / "gpu")
    reconstruct(resumed, particles, tmp_path / "gpu")  # on the CPU
    check_same_runs(tmp_path / "cpu", tmp_path / "gpu")


def small_memory(monkeypatch, images):
    """Losses of more images than that run out of memory."""
    loss = ImageObjective.loss

    def limited(self, gaussians, batch, poses=None, count=None):
        if len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return loss(self, gaussians, batch, poses, count)

    monkeypatch.setattr(ImageObjective, "loss", limited)


@pytest.mark.slow
def test_the_batch_that_fits_is_found_and_kept(gpu, monkeypatch, particles, tmp_path):
    config = change(QUICK["images"], batch="auto")
    on(monkeypatch, gpu)
    with monkeypatch.context() as patch:
        small_memory(patch, 20)
        stopped_after(patch, 8)
        with pytest.raises(Interrupted):
            reconstruct(config, particles, tmp_path)
    assert "batches of 16 images, since 32 do not fit the memory" in (tmp_path / "run.log").read_text()
    assert tomllib.loads((tmp_path / "config.toml").read_text())["settings"]["batch"] == 16
    summary = reconstruct(change(config, resume=True), particles, tmp_path)  # 128 would fit now
    assert summary["settings"]["batch"] == 16
    assert summary["options"]["batch"] == "auto"
    assert summary["fits"]["half1"]["steps"] == 2 * 2


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(gpu, monkeypatch, particles, tmp_path):
    on(monkeypatch, gpu)
    small_memory(monkeypatch, 5)
    with pytest.raises(InputError, match=r"--batch 16: does not fit .* give --batch 4 or --batch auto"):
        reconstruct(QUICK["images"], particles, tmp_path / "a")
    small_memory(monkeypatch, 0)
    with pytest.raises(InputError, match="not even one image of 32 px"):
        reconstruct(QUICK["images"], particles, tmp_path / "b")


def test_the_batch_of_the_recipe_is_taken_on_the_cpu(monkeypatch, particles, tmp_path):
    on(monkeypatch, torch.device("cpu"))
    summary = reconstruct(change(QUICK["images"], batch="auto"), particles, tmp_path)
    assert summary["settings"]["batch"] == 128


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_job_for_a_gpu_is_red_without_one():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent / "test_ctf.py"),
    ]
    command += [str(Path(__file__)), "-m", "gpu", "-k", "batches"]
    for option, code in (([], 0), (["--error-for-skips"], 1)):
        done = subprocess.run([*command, *option], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", QUICK)
def test_a_run_is_the_same_with_cuda(particles, tmp_path, engine):
    """Up to what pixels at the rim of a footprint do to a fit of few noisy images: the CPU draws some beyond the
    ellipse. A dense fit on the CPU that is cut at the ellipse (or at 1.25 of it) is as far from the CPU's: 2e-4."""
    reconstruct(change(QUICK[engine], device="cpu"), particles, tmp_path / "cpu")
    summary = reconstruct(change(QUICK[engine], device="cuda"), particles, tmp_path / "gpu")
    check_same_runs(tmp_path / "cpu", tmp_path / "gpu", likeness_at_least=0.9995, residual=5e-3)
    assert summary["device"] == torch.cuda.get_device_name()
    assert summary["peak_gpu_memory_mb"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_with_cuda(particles, kind):
    stack = opened(particles, **KINDS[kind])
    there = stack.on(torch.device("cuda:0"))
    for _ in range(5):  # what a stream overtakes is wrong only sometimes
        for one, other in zip(there.batches(7, seed=1), stack.batches(7, seed=1), strict=True):
            same_images(one, other)
            same(one.poses, other.poses)
