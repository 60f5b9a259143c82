"""Classes of latents: what two half-sets sort alike, and what is cut by chance."""

import math

import pytest
import torch

from emsplat.heterogeneity.classes import Classes, common_classes, kappa
from emsplat.heterogeneity.density import fit_density
from emsplat.heterogeneity.embedding import embedded
from emsplat.heterogeneity.subspace import posterior
from emsplat.measures.states import adjusted_rand_index

VIEWS = 1500


def seen(latent, precision, generator):
    """What noisy images say of latents."""
    quadratic = (precision * torch.eye(latent.shape[1]).double()).expand(len(latent), -1, -1)
    noise = precision**0.5 * torch.randn(latent.shape, generator=generator, dtype=torch.float64)
    return posterior(precision * latent + noise, quadratic)


def halves(latents, precision, counts, seed=0):
    """The spaces of two half-sets that see the same latents in the same frame, with so many points."""
    generator = torch.Generator().manual_seed(seed)
    views = [seen(latent, precision, generator) for latent in latents]
    densities = [fit_density(own, count, generator) for own, count in zip(views, counts, strict=True)]
    return embedded(densities[0], *views), embedded(densities[1], *views[::-1])


def test_states_with_nothing_between_are_classes_however_many_points_they_have():
    generator = torch.Generator().manual_seed(1)
    place = torch.tensor([[-1.5, -1.0], [1.5, -1.0], [-1.5, 1.0], [1.5, 1.0]]).double()
    state = [torch.randint(4, (VIEWS,), generator=generator) for _ in (1, 2)]
    both = halves([place[own] for own in state], 30.0, (9, 7))
    found = common_classes(*both)
    assert len(found) == 4
    assert found.told
    member = [own.membership @ part for own, part in zip(both, found.parts(), strict=True)]
    assert adjusted_rand_index(torch.cat(member).argmax(1), torch.cat(state)) > 0.99


@pytest.mark.parametrize("count", [4, 12, 40])
def test_a_continuum_is_not_cut_into_classes(count):
    """A circle: views are sure of their points, but those of the other half lie elsewhere."""
    generator = torch.Generator().manual_seed(2)
    angle = [2 * math.pi * torch.rand(VIEWS, generator=generator).double() for _ in (1, 2)]
    one, other = halves([1.4 * torch.stack([own.cos(), own.sin()], 1) for own in angle], 400.0, (count, count), count)
    if count == 4:
        assert one.membership.max(1).values.mean() > 0.9
    found = common_classes(one, other)
    assert not found.told
    assert found.agreement < 0.85


def test_agreement_beyond_chance():
    both = torch.arange(2)
    # 20 + 15 of 50 alike; by chance 0.5 (Cohen's own measure, by hand).
    assert kappa(torch.tensor([[20.0, 5.0], [10.0, 15.0]]).double() / 50, both, both) == pytest.approx(0.4)
    assert kappa(torch.tensor([[0.0, 0.9], [0.1, 0.0]], dtype=torch.float64), both, both.flip(0)) == pytest.approx(1)
    alike = torch.tensor([[0.81, 0.09], [0.09, 0.01]], dtype=torch.float64)
    assert kappa(alike, both, both) == pytest.approx(0, abs=1e-12)
    # A third group of one rater has no partner: 0.7 alike, by chance 0.4 · 0.6 + 0.3 · 0.4.
    table = torch.tensor([[0.4, 0.0], [0.2, 0.1], [0.0, 0.3]], dtype=torch.float64)
    assert kappa(table, torch.tensor([0, 2]), both) == pytest.approx((0.7 - 0.36) / 0.64)


@pytest.mark.parametrize("points", [(18, 20), (30, 24)])
def test_a_path_between_two_ends_is_not_cut_into_classes(points):
    """Ends that are visited more, as of a trajectory; the half-sets find points in other places and other numbers."""
    generator = torch.Generator().manual_seed(3)
    latents = []
    for _ in (1, 2):
        place = torch.sin(math.pi * (torch.rand(VIEWS, generator=generator).double() - 0.5))
        latents.append(torch.stack([2.5 * place, place.square()], 1))
    found = common_classes(*halves(latents, 150.0, points))
    assert not found.told
    assert found.agreement < 0.85


def test_merged_classes():
    found = Classes((torch.tensor([0, 1, 2, 1]), torch.tensor([2, 0, 1])), 1.0).merged(torch.tensor([0, 1, 1]))
    assert len(found) == 2
    assert found.parts()[0].tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    assert found.parts()[1].tolist() == [[0, 1], [1, 0], [0, 1]]
