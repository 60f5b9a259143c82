"""What Gaussians leave of cells, as maps: of what is alike, of pieces that change together, of near cells."""

from types import SimpleNamespace

import pytest
import torch

from emsplat.heterogeneity.cells import Cells, empirical_map, information_of, joint_maps
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.frames import identity
from emsplat.heterogeneity.half import HalfModel
from emsplat.heterogeneity.residual import RESIDUALS, left_over, with_residuals
from emsplat.imaging.project import voxelize
from emsplat.maths.fourier import filtered
from emsplat.maths.independent import rotation_to_independence
from emsplat.types import Gaussians, Grid

GRID = Grid(32, 4.0)
CORNERS = torch.tensor([[-24.0, -20, 0], [24, -20, 8], [0, 28, -8]])  # of three blocks, Å
COUNT = 8  # every way in which blocks can be there
PRESENT = torch.tensor([[number >> bit & 1 for bit in range(3)] for number in range(COUNT)]).float()
PARTICLES = torch.linspace(500.0, 1500.0, COUNT)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def mixture(amplitude):
    mean = torch.cat([torch.zeros(1, 3), CORNERS])
    return Gaussians(mean, torch.tensor([144.0, 36, 36, 36])[:, None, None] * torch.eye(3), amplitude)


def blocks(latent):
    """A core that is always there, and blocks as the latent has them."""
    return [mixture(torch.cat([torch.tensor([20.0]), 3 * own])) for own in latent]


def model_of(states):
    nothing = torch.zeros(0, 8, 8, 8)
    density = Density(torch.zeros(1, 3).double(), torch.ones(1).double())
    decoder = SimpleNamespace(mixtures=states)
    return HalfModel(decoder, density, torch.eye(3).double(), nothing, GRID, GRID, identity(3))


def embedding_of(membership):
    nothing, latent = torch.zeros(0, COUNT).double(), torch.zeros(0, 3).double()
    density = Density(torch.zeros(COUNT, 3).double(), torch.full((COUNT,), 1 / COUNT).double())
    return Embedding(density, membership, nothing, latent, latent, latent[:, 0], torch.eye(3).double())


def cells_of(maps, noise, seed=0):
    """Sums of particles, which say the same of every frequency; white noise of one is ``noise`` times as strong as the
    maps."""
    side = 3 * GRID.size // 2
    weight = PARTICLES[:, None, None, None] / (noise * maps.std()) ** 2
    linear = weight * maps + weight.sqrt() * torch.randn(maps.shape, generator=drawn(seed))
    response = weight * torch.ones(len(maps), side, side, side // 2 + 1)
    return Cells(GRID, linear, response, PRESENT.double(), PARTICLES, torch.ones(len(maps)))


def likeness(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def detail_at(centre, width, seed):
    """A pattern finer than the Gaussians, at a place."""
    axis = GRID.pixel_size * (torch.arange(float(GRID.size)) - GRID.size // 2)
    x, y, z = centre
    square = (axis[:, None, None] - z) ** 2 + (axis[:, None] - y) ** 2 + (axis - x) ** 2
    noise = torch.randn((GRID.size,) * 3, generator=drawn(seed))
    return torch.exp(-square / (2 * width**2)) * filtered(noise, lambda radius: (radius < 10).float())


@pytest.fixture(scope="module")
def pieces():
    """Model, states' maps without and with details of the core and of each block, and the place of each block."""
    model = model_of(blocks)
    coarse = torch.stack([voxelize(one, GRID) for one in blocks(PRESENT)])
    details = torch.stack([detail_at(centre, 5.0, number) for number, centre in enumerate(CORNERS.tolist())])
    size = 3 * coarse.std()
    truth = coarse + size * torch.einsum("mj,jzyx->mzyx", PRESENT, details) + size * detail_at((0, 0, 0), 10.0, 9)
    places = torch.stack([(voxelize(mixture(own), GRID)) for own in torch.eye(4)[1:]])
    return model, coarse, truth, places > 0.3 * places.amax((1, 2, 3), keepdim=True)


def test_rotations_to_independence_find_sparse_sources_whatever_the_basis():
    generator = drawn(1)
    sources = torch.zeros(4, 4000, dtype=torch.float64)
    for number in range(4):
        sources[number, 1000 * number : 1000 * number + 400] = torch.randn(400, generator=generator).double()
    sources *= (4000 / sources.square().sum(1, keepdim=True)).sqrt()
    found = []
    for seed in (2, 3):
        mixing, _ = torch.linalg.qr(torch.randn(4, 4, generator=drawn(seed), dtype=torch.float64))
        turn = rotation_to_independence(mixing @ sources)
        torch.testing.assert_close(turn @ turn.T, torch.eye(4, dtype=torch.float64))
        found.append(turn @ mixing @ sources)
        match = (found[-1] @ sources.T / 4000).abs()
        assert float(match.amax(1).min()) > 0.999
        assert sorted(match.argmax(1).tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found[0].abs(), found[1].abs(), atol=1e-5, rtol=1e-5)


def test_joint_maps_are_classical_maps_of_what_all_cells_share(pieces):
    _, _, truth, _ = pieces
    cells = cells_of(truth, 20.0)
    information = information_of(cells)
    (alone,) = joint_maps(cells, cells.linear, information, torch.ones(COUNT, 1), [0.4])
    known = empirical_map(cells, torch.ones(COUNT), None, 0.4, information)
    torch.testing.assert_close(alone, known, rtol=1e-4, atol=1e-5 * float(known.abs().max()))
    plain = empirical_map(cells, torch.ones(COUNT), None, 0.4)
    torch.testing.assert_close(plain, known, rtol=1e-4, atol=1e-5 * float(known.abs().max()))
    # Each map of a design, from cells that need all of them.
    cells = cells_of(truth, 0.01)
    design = torch.cat([torch.ones(COUNT, 1), PRESENT], 1)
    found = joint_maps(cells, cells.linear, information_of(cells), design, [1.0] * 4)
    for state, volume in zip(design, truth, strict=True):
        told = torch.einsum("j,jzyx->zyx", state, found)
        assert likeness(told, volume) > 0.999


def test_what_comes_and_goes_is_known_from_all_particles(pieces):
    model, coarse, truth, places = pieces
    cells = cells_of(truth, 10.0)
    left = left_over(model, cells)
    found = with_residuals(model, embedding_of(torch.eye(COUNT).double()), cells, left)
    assert list(found) == list(RESIDUALS)
    rest = truth - coarse

    def error(kind, where):
        return float((found[kind].residual - rest)[:, where].square().mean() / rest[:, where].square().mean())

    for where in places:
        assert error("together", where) < 0.5 * error("nearby", where) < 0.5
    alike = voxelize(mixture(torch.tensor([1.0, 0, 0, 0])), GRID)
    core = alike > 0.7 * alike.max()  # far from all blocks
    for kind, own in found.items():
        # The same of all states: masks that are interpolated ring a little.
        assert float(own.residual[:, core].std(0).max()) < 0.01 * float(own.residual.abs().max()), kind
        assert error(kind, core) < 0.5
    assert list(with_residuals(model, embedding_of(torch.eye(COUNT).double()), cells, left, ("together",))) == [
        "together"
    ]


def test_cells_that_share_particles_share_residuals(pieces):
    model, coarse, truth, places = pieces
    cells = cells_of(truth[:1].expand(COUNT, -1, -1, -1), 20.0)
    own = torch.zeros(COUNT, COUNT).double() + torch.eye(COUNT)
    left = left_over(model_of(lambda latent: [mixture(torch.tensor([20.0, 0, 0, 0]))] * len(latent)), cells)
    rest = (truth - coarse)[0]
    error = []
    for membership in (own, own + 0.5):
        found = with_residuals(model, embedding_of(membership), cells, left, ("nearby",))["nearby"].residual
        error.append(float((found - rest)[:, places.any(0)].square().mean()))
    assert error[1] < error[0]


@pytest.mark.parametrize("kind", RESIDUALS)
def test_states_that_are_alike_have_one_residual(pieces, kind):
    _, coarse, truth, _ = pieces
    model = model_of(lambda latent: [mixture(torch.tensor([20.0, 3, 3, 3]))] * len(latent))
    cells = cells_of(truth[-1:].expand(COUNT, -1, -1, -1), 2.0)
    membership = embedding_of(torch.eye(COUNT).double())
    found = with_residuals(model, membership, cells, left_over(model, cells), (kind,))[kind]
    assert bool((found.residual == found.residual[0]).all())
    assert likeness(found.residual[0], (truth - coarse)[-1]) > 0.9


def test_a_cell_without_particles_does_no_harm(pieces):
    model, coarse, truth, places = pieces
    full = cells_of(truth, 5.0)
    some = torch.arange(COUNT) != 3
    empty = Cells(
        full.grid,
        torch.where(some[:, None, None, None], full.linear, 0.0),
        torch.where(some[:, None, None, None], full.response, 0.0),
        full.point,
        torch.where(some, full.particles, 0.0),
        torch.where(some, full.noise, 0.0),
    )
    membership = torch.diag(some.double())
    found = with_residuals(model, embedding_of(membership), empty, left_over(model, empty))
    for own in found.values():
        assert bool(torch.isfinite(own.residual).all())
    rest = (truth - coarse)[:, places.any(0)]
    told = found["together"].residual[:, places.any(0)]
    assert likeness(told[3], rest[3]) > 0.9  # by what the others say of its blocks
