"""Everything but the kernels runs on the device that the data are on, and does not make the host wait for it.

What is tried here on `virtual_device` runs on CUDA as it stands; tests marked gpu do the same there.
"""

import dataclasses

import pytest
import torch

import virtual_device
from emsplat.ctf import observe
from emsplat.geometry import random_rotations
from emsplat.types import Aberrations, Batch, Grid, Optics, Poses
from virtual_device import on_device, synchronisations

GRID = Grid(16, 2.0)


@pytest.fixture
def gpu(monkeypatch):
    return virtual_device.install(monkeypatch)


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
