"""How many molecules are where: shares with errors, free energies without the shrinkage of posteriors."""

import pytest
import torch

from emsplat.heterogeneity.density import fit_density
from emsplat.heterogeneity.frames import Frame
from emsplat.heterogeneity.populations import Cloud, Weighed, bootstrap, resampled, smooth, span
from emsplat.heterogeneity.subspace import posterior

VIEWS = 3000
WELLS = torch.tensor([[-1.1], [1.5]], dtype=torch.float64)
SPREAD, SHARE = 0.3, 0.7


def seen(latent, generator, precision=2.0):
    """What noisy images say of latents: each sees them with another precision."""
    q = latent.shape[1]
    scale = torch.empty(len(latent), 1, 1, dtype=torch.float64).uniform_(0.3, 1.7, generator=generator)
    quadratic = precision * scale * torch.eye(q, dtype=torch.float64)
    noise = torch.randn(len(latent), q, 1, generator=generator, dtype=torch.float64)
    return posterior((quadratic @ latent[:, :, None] + quadratic.sqrt() @ noise).squeeze(-1), quadratic)


@pytest.fixture(scope="module")
def weighed():
    """Two wells of 70 and 30 %, as two half-sets see them."""
    generator = torch.Generator().manual_seed(0)
    latents = []
    for _ in (1, 2):
        first = torch.rand(VIEWS, 1, generator=generator, dtype=torch.float64) < SHARE
        noise = SPREAD * torch.randn(VIEWS, 1, generator=generator, dtype=torch.float64)
        latents.append(seen(torch.where(first, WELLS[0], WELLS[1]) + noise, generator))
    image = torch.arange(VIEWS)
    densities = [fit_density(own, 8, generator).without_small(2e-3).distinct(own.quadratic.mean(0)) for own in latents]
    pairs = ((latents[0], latents[1]), (latents[0], latents[1]))
    clouds = smooth((densities[0], densities[1]), pairs, (image, image), 0)
    counts = torch.split(resampled(2 * VIEWS, 0), VIEWS)
    drawn = [
        bootstrap(cloud.weight, cloud.likelihood(own), count)
        for cloud, own, count in zip(clouds, latents, counts, strict=True)
    ]
    members = [cloud.membership(own) for cloud, own in zip(clouds, latents, strict=True)]
    return Weighed(clouds, (drawn[0], drawn[1]), (members[0], members[1])), latents


def truth(place):
    density = SHARE * torch.exp(-0.5 * ((place - WELLS[0]) / SPREAD) ** 2)
    density = density + (1 - SHARE) * torch.exp(-0.5 * ((place - WELLS[1]) / SPREAD) ** 2)
    energy = -density.flatten().log()
    return energy - energy.min()


def test_shares_are_right_within_their_intervals(weighed):
    states, generator = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.Generator().manual_seed(0)
    one, other = (cloud.shares(states, generator) for cloud in weighed[0].clouds)
    shares = weighed[0].shares((one, other))
    assert sum(share.value for share in shares) == pytest.approx(1)
    for share, right in zip(shares, (SHARE, 1 - SHARE), strict=True):
        assert abs(share.value - right) < 4 * share.error
        assert share.interval[0] < share.value < share.interval[1]
        # Latents that were known would have √(0.7 · 0.3 / 6000); posteriors that overlap leave more open.
        assert (0.21 / (2 * VIEWS)) ** 0.5 < share.error < 0.02
        assert sum(share.halves) / 2 == pytest.approx(share.value)


def test_the_posterior_means_would_have_been_wrong(weighed):
    """Where a histogram of posterior means has no second well, the density has the right one."""
    found, latents = weighed
    place = torch.linspace(*span(found, 0), 81, dtype=torch.float64)[:, None]
    energy = found.free_energy(place, [0])
    well = (place.flatten() - WELLS[1]).abs().flatten().argmin()
    assert energy.shown[well]
    assert abs(energy.value[well] - truth(place)[well]) < 0.25
    mean = torch.cat([own.mean for own in latents]).flatten()
    count = torch.histc(mean.float(), 40, float(place.min()), float(place.max()))
    shrunk = -(count / count.max()).log()
    assert shrunk[torch.histc(WELLS[1].float(), 40, float(place.min()), float(place.max())).argmax()] > 1.1


def test_free_energies_are_shown_where_images_support_them(weighed):
    place = torch.linspace(*span(weighed[0], 0), 81, dtype=torch.float64)[:, None]
    energy, right = weighed[0].free_energy(place, [0]), truth(place)
    shown = energy.shown
    assert 0.3 < float(shown.double().mean()) < 0.95
    low = shown & (right < 1.5)
    assert low.sum() > 10
    assert (energy.value - right).abs()[low].max() < 0.5
    assert not shown[right > 6].any()  # the middle of the barrier, where no molecule is
    assert float(energy.value.min()) == pytest.approx(0, abs=1e-12)
    assert (energy.error[shown] <= 1).all()


def test_errors_grow_where_micrographs_differ():
    """All views of a micrograph in one state: there are only as many draws as micrographs."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.arange(1000) // 50
    state = torch.rand(20, generator=generator) < 0.5
    latents = seen(torch.where(state[unit][:, None], 3.0, -3.0).double(), generator)
    cloud = Cloud(torch.tensor([[-3.0], [3.0]]).double(), torch.tensor([0.5, 0.5]).double(), torch.zeros(1, 1).double())
    likely = cloud.likelihood(latents)
    by_image = bootstrap(cloud.weight, likely, resampled(1000, 0)).std(1)
    by_micrograph = bootstrap(cloud.weight, likely, resampled(20, 0)[unit]).std(1)
    assert float(by_micrograph[0] / by_image[0]) == pytest.approx(50**0.5, rel=0.3)


def test_a_wide_point_sees_the_integral_over_it():
    """log ∫ p(y|z)/p(y|0) N(z; μ, H) dz against a sum on a fine grid."""
    generator = torch.Generator().manual_seed(2)
    latents = seen(torch.randn(5, 1, generator=generator, dtype=torch.float64), generator)
    cloud = Cloud(torch.tensor([[0.4]]).double(), torch.ones(1).double(), torch.tensor([[0.6]]).double())
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    prior = torch.exp(-0.5 * ((z - 0.4) / 0.6) ** 2) / (0.6 * (2 * torch.pi) ** 0.5)
    likely = torch.exp(latents.linear * z - 0.5 * latents.quadratic[:, 0] * z**2)
    right = (likely * prior).sum(1).mul(z[1] - z[0]).log()
    assert torch.allclose(cloud.log_likelihood(latents)[:, 0], right, atol=1e-6)


def test_no_landscape_along_what_a_half_has_not_found():
    """Its points lie on a line there, in whatever direction, and have no width across it."""
    root = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    flat = Cloud(torch.zeros(1, 2).double(), torch.ones(1).double(), root)
    wide = Cloud(torch.zeros(1, 2).double(), torch.ones(1).double(), torch.eye(2).double())
    assert [flat.fills(axes) for axes in ([0], [1], [0, 1])] == [True, True, False]
    assert wide.fills([0, 1])


def test_a_cloud_in_another_frame():
    cloud = Cloud(torch.tensor([[1.0, 2.0]]).double(), torch.ones(1).double(), 0.1 * torch.eye(2).double())
    frame = Frame(torch.tensor([[0.0, -2.0], [1.0, 0.0]]).double(), torch.tensor([0.5, 0.0]).double())
    moved = cloud.within(frame)
    assert torch.allclose(moved.point, torch.tensor([[-3.5, 1.0]]).double())
    assert torch.allclose(moved.root @ moved.root.T, torch.diag(torch.tensor([0.04, 0.01])).double())
