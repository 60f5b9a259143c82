"""Particles shared out over processes: the sums are those of one."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from emsplat.maths.groups import cyclic
from emsplat.parallel import ALONE, World, joined
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_particles
from emsplat.sums.statistics import accumulate, begin, equations_of

_ONE_OF_MANY = """
import sys
from pathlib import Path
import torch
from emsplat.maths.groups import cyclic
from emsplat.parallel import joined
from emsplat.particles.open import open_particles
from emsplat.particles.noise import estimate_noise
from emsplat.sums.statistics import accumulate, begin, equations_of
torch.set_num_threads(1)
stack = open_particles(Path(sys.argv[1]), symmetry=cyclic(2))
with joined() as world:
    assert world.agree(world.rank == 1) and not world.agree(False)
    sums, together = begin(stack), torch.arange(len(stack)) // 3
    for _ in accumulate(sums, stack, estimate_noise(stack), world, together):
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
    torch.save(found | {"size": world.size}, Path(sys.argv[2]) / f"{world.rank}.pt")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_world(size, star, folder):
    """The equations as each of several processes has them."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ONE_OF_MANY, str(star), str(folder)],
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


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_the_particles_out(simulated, tmp_path, size):
    particles = simulated(particles=150)
    stack = open_particles(particles, symmetry=cyclic(2))
    alone, equations = begin(stack), equations_of(stack)
    for _ in accumulate(alone, stack, estimate_noise(stack)):
        pass
    expected = {"numerator": alone.numerator, "weight": alone.weight}
    expected |= {"linear": equations.linear, "kernel": equations.kernel}
    found = run_world(size, particles, tmp_path)
    for one in found:
        assert one["size"] == size
        assert one["particles"] == len(stack)
        for name, whole in expected.items():
            # The same terms in another order; the window's transform, by which the equations are divided, falls to a
            # tenth at the edge of a map and to less at that of the kernel.
            error = {"linear": 1e-5, "kernel": 3e-5}.get(name, 1e-6)
            assert float((one[name] - whole).norm() / whole.norm()) < error, name
            assert torch.equal(one[name], found[0][name])


def test_shares_are_all_particles_once():
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    parts = [World(rank, 4).share(order) for rank in range(4)]
    assert torch.equal(torch.cat(parts), order)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


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
