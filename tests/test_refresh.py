"""Where particles lie by the states of a decoder: compared with images as the linear stage compares its own maps."""

import pytest
import torch
from tests.test_heterogeneity import particles  # noqa: F401 (a fixture)

from emsplat.config import ReconstructConfig, configure
from emsplat.heterogeneity import refresh
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.embedding import embedded
from emsplat.heterogeneity.refresh import Refreshed, _chain, _linear, evidence, refreshed
from emsplat.heterogeneity.subspace import SubspaceStage, fit_subspace, infer
from emsplat.particles.choose import open_stack
from emsplat.sums.spectra import read_spectra


@pytest.fixture(scope="module")
def stage(particles):  # noqa: F811
    """A linear stage of 150 views with two components, and what it says of these."""
    stack = open_stack(configure(ReconstructConfig, first=300), particles).only(1)
    spectra = read_spectra(stack, 7)
    for subspace in fit_subspace(spectra, 2, torch.Generator().manual_seed(0), (SubspaceStage(7, 4),)):
        last = subspace
    return stack, last, infer(last, spectra)


def test_maps_of_the_linear_stage_have_its_likelihood(stage, monkeypatch):
    """b·z - zᵀA z/2 of V0 + Σ z U, whose brightness and pose are integrated out in the same way."""
    stack, subspace, latents = stage
    monkeypatch.setattr(refresh, "_FAR", 1e9)
    point = torch.randn(13, subspace.components, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps = subspace.maps[0] + torch.einsum("mq,qzyx->mzyx", point.float(), subspace.maps[1:])
    known = _linear(point, latents)
    found = evidence(maps, subspace, stack, torch.zeros_like(known))
    assert float(known.abs().max()) > 1
    assert torch.allclose(found, known, atol=2e-3)


def test_maps_out_of_the_question_are_as_far_below_as_the_linear_stage_says(stage, monkeypatch):
    stack, subspace, latents = stage
    scale = torch.linspace(-8, 8, 25, dtype=torch.float64)[:, None]
    point = _chain(torch.cat([scale, 0 * scale], 1)[torch.randperm(25, generator=torch.Generator().manual_seed(2))])
    point = point[:, : subspace.components]
    maps = subspace.maps[0] + torch.einsum("mq,qzyx->mzyx", point.float(), subspace.maps[1:])
    known = _linear(point, latents)
    whole = evidence(maps, subspace, stack, torch.zeros_like(known))
    asked = []
    kept = refresh.infer
    monkeypatch.setattr(refresh, "infer", lambda own, spectra: asked.append(len(spectra)) or kept(own, spectra))
    monkeypatch.setattr(refresh, "_FAR", 4.0)
    found = evidence(maps, subspace, stack, known)
    assert sum(asked) < 0.8 * 3 * len(stack)
    assert torch.allclose(found, whole, atol=5e-3)


def test_one_state_gains_nothing_over_its_mean(stage, monkeypatch):
    """However much sharper its map is than the mean of the linear stage."""
    stack, subspace, latents = stage
    one = Density(torch.zeros(1, subspace.components).double(), torch.ones(1).double())
    sharper = 1.3 * subspace.maps[:1]
    monkeypatch.setattr(refresh, "drawn", lambda model, point, lattice: sharper)
    monkeypatch.setattr(refresh, "fewest", lambda gains, image: 1)
    before = embedded(one, latents, latents)
    known = torch.zeros(len(latents)).double()
    placed = refreshed(None, Refreshed(before, known, known), subspace, (latents, latents), (stack, stack), 1, None)
    assert float(placed.gain.abs().mean()) > 1e-3
    assert torch.equal(placed.gain, placed.mean)


def test_two_states_gain_over_their_mean(stage, monkeypatch):
    stack, subspace, latents = stage
    point = torch.zeros(2, subspace.components).double()
    point[:, 0] = torch.tensor([-1.0, 1.0])
    maps = subspace.maps[0] + torch.einsum("mq,qzyx->mzyx", point.float(), subspace.maps[1:])
    monkeypatch.setattr(refresh, "drawn", lambda model, point, lattice: 1.3 * maps)
    monkeypatch.setattr(refresh, "fewest", lambda gains, image: 1)
    before = embedded(Density(point, torch.full((2,), 0.5).double()), latents, latents)
    known = torch.zeros(len(latents)).double()
    placed = refreshed(None, Refreshed(before, known, known), subspace, (latents, latents), (stack, stack), 2, None)
    weight = torch.cdist(before.own, point).argmin(1).bincount(minlength=2) / len(before.own)
    mean = 1.3 * torch.einsum("m,mzyx->zyx", weight.float(), maps)
    alone = evidence(mean[None], subspace, stack, torch.zeros(len(latents), 1).double())[:, 0]
    assert torch.allclose(placed.mean, alone, atol=2e-3)
    assert float((placed.gain - placed.mean).mean()) > 1


def test_a_chain_goes_from_neighbour_to_neighbour():
    line = torch.tensor([[0.0], [3.0], [1.0], [2.0], [7.0]])
    assert _chain(line).flatten().tolist() == [0, 1, 2, 3, 7]
