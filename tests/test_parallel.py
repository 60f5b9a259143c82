"""Particles shared out over processes: the sums are those of one."""

import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from emsplat.heterogeneity.cells import gather_cells
from emsplat.heterogeneity.refresh import evidence
from emsplat.heterogeneity.subspace import SubspaceStage, fit_subspace, infer
from emsplat.io.mrc import read_map, writing_stack
from emsplat.io.mrc_arrays import StackFile
from emsplat.maths.groups import cyclic
from emsplat.parallel import ALONE, World, joined
from emsplat.particles.holding import readers
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_particles
from emsplat.poses.local import Prior, make_reference, noise_of, place
from emsplat.poses.optics import refine_optics
from emsplat.poses.tilt import phase_sums
from emsplat.sums.spectra import read_all_spectra
from emsplat.sums.statistics import accumulate, begin, equations_of
from emsplat.types import Grid
from processes import ends, start

_ONE_OF_MANY = """
import sys
from emsplat.heterogeneity.cells import gather_cells
from emsplat.heterogeneity.refresh import evidence
from emsplat.heterogeneity.subspace import SubspaceStage, fit_subspace, infer
from emsplat.sums.spectra import read_all_spectra, read_everywhere
from pathlib import Path
import torch
from emsplat.maths.groups import cyclic
from emsplat.parallel import joined
from emsplat.io.particles import read_particles
from emsplat.particles.open import open_table
from emsplat.particles.noise import estimate_noise
from emsplat.poses.local import Prior, make_reference, noise_of, place
from emsplat.poses.optics import refine_optics
from emsplat.poses.tilt import phase_sums
from emsplat.sums.statistics import accumulate, begin, equations_of
torch.set_num_threads(1)
with joined() as world:
    table = read_particles(Path(sys.argv[1]), datadir=Path(sys.argv[4]) / str(world.rank), need_stacks=False)
    stack = open_table(table, symmetry=cyclic(2), world=world)
    assert world.agree(world.rank == 1) and not world.agree(False)
    sums, together = begin(stack), torch.arange(len(stack)) // 3
    for _ in accumulate(sums, stack, estimate_noise(stack), world):
        if world.agree(sums.particles > 10):  # as at a checkpoint
            sums.collect(world)
            assert world.first or not sums.numerator.any()
    own = world.share(torch.arange(len(stack)), together)
    assert len(torch.unique(together[own])) * 3 == len(own) < len(stack)
    sums.gather(world)
    assert world.told(f"rank {world.rank}") == "rank 0" and world.texts(str(world.rank))[world.rank] == str(world.rank)
    equations = equations_of(stack, world=world)
    found = {"numerator": sums.numerator, "weight": sums.weight, "particles": sums.particles}
    found |= {"linear": equations.linear, "kernel": equations.kernel}
    said = []
    reference, noise = make_reference(torch.load(sys.argv[3]), stack.grid, 8), noise_of(stack)
    placed = place(reference, stack, stack.table.poses, Prior(0.1, 3.0), noise, told=said.append, world=world)
    assert said[-1] == len(stack) and len(world.texts(str(len(said)))) == world.size
    assert len(set(world.texts(str(len(said))))) == 1
    optics, spread = refine_optics(reference, stack, noise, defocus=True, strength=True, world=world)
    phases = phase_sums(reference, stack, noise, world=world)[0][0]
    found |= {"rotation": placed.poses.rotation, "shift": placed.poses.shift, "hessian": placed.hessian}
    found |= {"looks": placed.looks, "defocus": optics.defocus_u, "b_factor": optics.b_factor}
    found |= {"basis": phases.basis, "phases": torch.view_as_real(phases.cross)}
    everywhere = read_everywhere(stack, 5, world)
    found |= {"values": torch.view_as_real(everywhere.values), "turns": everywhere.rotation, "rows": everywhere.row}
    spectra = read_all_spectra(stack, 6, world)
    assert len(spectra) < 2 * len(stack)
    stages = (SubspaceStage(4, 2), SubspaceStage(6, 2, 20))
    *_, subspace = fit_subspace(spectra, 2, torch.Generator().manual_seed(0), stages)
    linear = spectra.portion.whole(infer(subspace, spectra).linear)
    (cell,) = gather_cells(stack, torch.ones(2 * len(stack), 1), torch.zeros(1, 1), 24, world=world)
    told = evidence(subspace.maps, subspace, stack, torch.zeros(2 * len(stack), len(subspace.maps)).double(), world)
    found |= {"maps": subspace.maps, "latents": linear, "cell": cell.linear, "response": cell.response, "told": told}
    torch.save(found | {"size": world.size}, Path(sys.argv[2]) / f"{world.rank}.pt")
"""


_FROM_MAPS = ("linear", "maps", "latents", "told", "cell", "response")


# A decoder and a latent for each view, fitted by all: to images of one half; then latents of others under it.
_STATES = """
import sys
from pathlib import Path
import torch
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint
from emsplat.heterogeneity import images
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.images import ConformationOptions, ImageStart, Pass, follow_images, image_gain, place_latents
from emsplat.heterogeneity.images import shares
from emsplat.maths.groups import cyclic
from emsplat.models.conformations import read_conformations
from emsplat.parallel import joined
from emsplat.particles.open import open_particles
from emsplat.sums.statistics import equations_of
torch.set_num_threads(1)
images._LESSONS = 5
folder = Path(sys.argv[2])
stack = open_particles(Path(sys.argv[1]), symmetry=cyclic(2)).with_halves(0)
one, other = stack.only(1), stack.only(2)
stages = {"coarse": Pass(24, 0.05, 1, 1e-2), "fine": Pass(40, 0.04, 1, 1e-2)}
small = ConformationOptions(sys.argv[3], 12, 2, 16, 1, batch=10, latent_rate=3.0, weighted=True, **stages)
with joined() as world:
    among = shares(one, world)
    start, found, resumed = ImageStart(equations_of(one, world=world).solve()), {}, None
    if (folder / "left").is_file():
        resumed = load_checkpoint(folder / "left", read=read_conformations)
    for state in follow_images(one, small, start, resumed, among):
        assert len(state.model.latent) < 2 * len(one) or world.size == 1
        found |= {f"{name} {state.step}": term for name, term in state.terms.items()}
        whole = among.whole(state)
        if state.step == 2 and world.size == 2 and world.first:
            save_checkpoint(folder / "left", whole)
    model = whole.model
    assert torch.equal(model.rows, one.rows)
    placed = place_latents(model, other, small, candidates=3, epochs=1, among=shares(other, world))
    assert torch.equal(placed.rows, other.rows)
    density = Density(model.latent.detach()[:5].double(), torch.full((5,), 0.2, dtype=torch.float64))
    gain = image_gain(model, density, other, world)
    found |= {"latent": model.latent.detach(), "placed": placed.latent.detach(), "gain": torch.tensor(gain.value)}
    found |= {f"decoder.{name}": own for name, own in model.decoder.state().tensors.items()}
    torch.save(found, folder / f"{world.size}_{world.rank}.pt")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_world(size, star, folder, volume):
    """The equations and poses as each of several processes has them; each may have stacks of its own in a subfolder of
    that of the particles."""
    torch.save(volume, folder / "volume.pt")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ONE_OF_MANY, str(star), str(folder), str(folder / "volume.pt"), str(star.parent)],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said[-1000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def in_stacks(star, counts):
    """The particles of a STAR file with their images in several stacks, of so many each."""
    images, grid = StackFile(star.parent / "particles.mrcs"), Grid(32, 4.0)
    text, first = star.read_text(), 0
    for number, count in enumerate(counts):
        part = np.empty((count, 32, 32), np.float32)
        images.read_into(part, range(first, first + count), range(count))
        with writing_stack(star.parent / f"part{number}.mrcs", count, grid) as write:
            write(torch.from_numpy(part))
        for own in range(count):
            whole = f"{first + own + 1}@particles.mrcs"
            text = re.sub(rf"(?<!\d)0*{whole}", f"{own + 1}@part{number}.mrcs", text)
        first += count
    star.write_text(text)
    (star.parent / "particles.mrcs").unlink()
    return star


def lie_apart(star, folders):
    """Moves stacks into subfolders, which are those of each process: numbers of stacks, a list for each; a stack may be
    in several."""
    for rank, numbers in enumerate(folders):
        (star.parent / str(rank)).mkdir()
        for number in numbers:
            shutil.copy2(star.parent / f"part{number}.mrcs", star.parent / str(rank))
    for path in star.parent.glob("part*.mrcs"):
        path.unlink()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("apart", [False, True])
def test_processes_share_the_particles_out(simulated, tmp_path, size, apart):
    particles = in_stacks(simulated(particles=150), (40, 70, 40))
    stack = open_particles(particles, symmetry=cyclic(2))
    alone, equations = begin(stack), equations_of(stack)
    for _ in accumulate(alone, stack, estimate_noise(stack)):
        pass
    expected = {"numerator": alone.numerator, "weight": alone.weight}
    expected |= {"linear": equations.linear, "kernel": equations.kernel}
    volume = equations.solve()
    reference, noise = make_reference(volume, stack.grid, 8), noise_of(stack)
    placed = place(reference, stack, stack.table.poses, Prior(0.1, 3.0), noise)
    optics, _ = refine_optics(reference, stack, noise, defocus=True, strength=True)
    phases = phase_sums(reference, stack, noise)[0][0]
    expected |= {"rotation": placed.poses.rotation, "shift": placed.poses.shift, "hessian": placed.hessian}
    expected |= {"looks": placed.looks.double(), "defocus": optics.defocus_u, "b_factor": optics.b_factor}
    expected |= {"basis": phases.basis, "phases": torch.view_as_real(phases.cross)}
    spectra = read_all_spectra(stack, 6)
    stages = (SubspaceStage(4, 2), SubspaceStage(6, 2, 20))
    *_, subspace = fit_subspace(spectra, 2, torch.Generator().manual_seed(0), stages)
    known = torch.zeros(2 * len(stack), len(subspace.maps)).double()
    expected |= {"maps": subspace.maps, "latents": infer(subspace, spectra).linear}
    expected |= {"told": evidence(subspace.maps, subspace, stack, known)}
    (cell,) = gather_cells(stack, torch.ones(2 * len(stack), 1), torch.zeros(1, 1), 24)
    expected |= {"cell": cell.linear, "response": cell.response}
    everywhere = read_all_spectra(stack, 5)
    expected |= {"values": torch.view_as_real(everywhere.values), "turns": everywhere.rotation}
    if apart:
        lie_apart(particles, ([0, 2], [1, 2], [2])[:size])
    found = run_world(size, particles, tmp_path, volume)
    for one in found:
        assert one["size"] == size
        assert one["particles"] == len(stack)
        assert torch.equal(one["rows"], torch.arange(len(stack)))
        for name, whole in expected.items():
            # The same terms in another order; the window's transform, by which the equations are divided, falls to a
            # tenth at the edge of a map and to less at that of the kernel.
            error = {"kernel": 3e-5}.get(name, 1e-5 if name in _FROM_MAPS else 1e-6)
            assert float((one[name] - whole).norm() / whole.norm()) < error, name
            assert torch.equal(one[name], found[0][name])


def test_each_particle_has_one_reader_that_has_its_images():
    """Ten stacks of which three processes have some; two rows of each particle, in two neighbouring stacks."""
    particle, generator = torch.arange(600).repeat_interleave(2), torch.Generator().manual_seed(0)
    stack = torch.randint(0, 9, (600,), generator=generator).repeat_interleave(2) + torch.arange(1200) % 2
    has = torch.zeros(3, 10, dtype=torch.bool)
    has[0, :6], has[1, 3:], has[2] = True, True, True
    reader = readers(particle, stack, has)
    assert torch.equal(reader[::2], reader[1::2])
    assert bool(has[reader, stack].all())
    assert torch.bincount(reader).tolist() == pytest.approx([400] * 3, abs=4)
    has[2] = False
    has[:, 4] = False
    reader = readers(particle, stack, has)
    lost = (stack == 4)[::2] | (stack == 4)[1::2]
    assert torch.equal(reader[::2] < 0, lost)
    assert bool(has[reader, stack][reader >= 0].all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("reconstruct", ("--epochs", 4)),
        ("reconstruct", ("--engine", "images", "--epochs", 2, "--gaussians", 200)),
        ("refine", ("--rounds", 1)),
    ],
)
def test_machines_may_have_different_images(simulated, tmp_path, program, words):
    star = in_stacks(simulated(particles=400), (100, 200, 100))
    whole = shutil.copytree(star.parent, tmp_path / "whole") / "particles.star"
    lie_apart(star, ([0, 2], [1, 2]))
    (alone,) = ends(start(1, program, whole, "-o", tmp_path / "one", *words))
    own = ("--datadir", star.parent / "{rank}")
    apart = ends(start(2, program, star, "-o", tmp_path / "two", *words, *own))
    assert [(code, errors) for code, _, errors in (alone, *apart)] == [(0, "")] * 3
    assert "images lie with different processes: 200 with rank 0 of 2" in apart[0][1]
    for name in ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc"):
        one, two = (read_map(tmp_path / folder / name)[0] for folder in ("one", "two"))
        assert float((one - two).norm() / one.norm()) < 1e-3  # rounding goes through a fit


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nobody", "other"])
def test_stacks_that_nobody_has_or_that_differ_are_named(simulated, tmp_path, fault):
    star = in_stacks(simulated(particles=60), (20, 20, 20))
    lie_apart(star, ([0, 2], [1, 2]) if fault == "other" else ([0], [1]))
    if fault == "other":
        with writing_stack(star.parent / "1" / "part2.mrcs", 20, Grid(32, 3.9)) as write:
            write(torch.randn(20, 32, 32))
    said = ends(start(2, "backproject", star, "-o", tmp_path / "run", "--datadir", star.parent / "{rank}"))
    assert [code for code, *_ in said] == [2, 2]
    (line,) = [errors for *_, errors in said if errors]
    assert "part2.mrcs" in line
    assert ("different files of this name" if fault == "other" else "with none of the 2 processes") in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("decoder", "sizes"), [("perceptron", (1, 2, 1)), pytest.param("separable", (1, 2, 3, 1), marks=pytest.mark.slow)]
)
def test_latents_live_with_their_particles(simulated, tmp_path, decoder, sizes):
    """Losses, decoder and latents are those of one process, also where one goes on with what two have left."""
    particles, found = simulated(particles=60), list[dict[str, torch.Tensor]]()
    for size in sizes:
        said = ends(start(size, particles, tmp_path, decoder, program=_STATES))
        assert [(code, errors) for code, _, errors in said] == [(0, "")] * size
        every = [torch.load(tmp_path / f"{size}_{rank}.pt", weights_only=True) for rank in range(size)]
        for own in every:
            for name, value in own.items():
                assert torch.equal(value, every[0][name]), name
        found.append(every[0])
    for size, own in zip(sizes[1:], found[1:], strict=True):
        assert len(own) >= len(found[0]) - 6
        for name, value in own.items():
            # Adam's first steps are as long for a gradient that is all rounding as for any other.
            error = float((value - found[0][name]).double().norm() / found[0][name].double().norm().clamp(min=1e-6))
            assert error < 2e-3, (size, name, error)


def test_shares_are_all_particles_once():
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    parts = [World(rank, 4).share(order) for rank in range(4)]
    assert torch.equal(torch.cat(parts), order)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_of_one_machine_are_counted():
    assert World(1, 4, ("a", "b", "a", "b")).on_this_machine == 2
    assert World(0, 3).on_this_machine == 3
    assert ALONE.on_this_machine == 1


def test_a_folder_of_each_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("platform.node", lambda: "node7.cluster")
    assert World(11, 16).here("/scratch/{host}/{local_rank}/{rank}") == "/scratch/node7/3/11"


def test_a_process_that_nobody_started_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    tensor = torch.ones(3)
    with joined() as world:
        assert world == ALONE
        world.sum_(tensor)
        assert world.agree(True)
        assert not world.agree(False)
    assert torch.equal(tensor, torch.ones(3))
    assert torch.equal(ALONE.share(torch.arange(5)), torch.arange(5))
    assert list(ALONE.in_step([1, 2])) == [1, 2]
    assert ALONE.apart(lambda: 7, lambda: None) == 7
    assert torch.equal(ALONE.gathered(torch.tensor([5.0, 6.0]), torch.tensor([1, 0]), 2), torch.tensor([6.0, 5.0]))
    named = ALONE.spread_named({"one": tensor})
    assert named["one"] is tensor
