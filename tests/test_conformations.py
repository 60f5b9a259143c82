"""CryoSPIRE: its models on the seam, the parts that its features show, and fits to images of planted molecules."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from emsplat.errors import InputError
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint
from emsplat.fitting.images import ImageObjective
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.heterogeneity.images import (
    ConformationOptions,
    ImageStart,
    Pass,
    fit_images,
    follow_images,
    inherit,
    misfits,
    place_latents,
    seeds,
)
from emsplat.heterogeneity.parts import cluster, count_clusters, divide, find_anchors
from emsplat.imaging.ctf import ctf
from emsplat.imaging.project import project, voxelize
from emsplat.maths.geometry import axis_rotation, random_rotations, six_to_matrix
from emsplat.maths.groups import C1, cyclic
from emsplat.measures.fsc import fsc
from emsplat.models import decoder as separable
from emsplat.models.conformations import Conformations, read_conformations
from emsplat.models.cryospire import Hierarchy, NetworkShape, PartDiscovery, Perceptron, _Hidden
from emsplat.models.decoder import Decoder
from emsplat.particles.open import open_particles
from emsplat.particles.stack import ParticleStack
from emsplat.sums.statistics import equations_of
from emsplat.types import Batch, Gaussians, Grid, Optics, Poses

GRID = Grid(32, 4.0)
WIDTH = 6.0
HINGE = torch.tensor([8.0, 0.0, 0.0])
SMALL = NetworkShape(features=6, latents=2, hidden=8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# A body at the left of the hinge and an arm at its right, which turns about z.
BODY = HINGE + torch.tensor([-18.0, 0.0, 0.0]) + torch.tensor([7.0, 12.0, 9.0]) * torch.randn(30, 3, generator=rng(1))
ARM = HINGE + torch.tensor([18.0, 0.0, 0.0]) + torch.tensor([7.0, 5.0, 5.0]) * torch.randn(15, 3, generator=rng(2))


def molecule(angle):
    turn = torch.from_numpy(axis_rotation([0.0, 0.0, 1.0], float(angle))).float()
    mean = torch.cat([BODY, (ARM - HINGE) @ turn.T + HINGE])
    return Gaussians(mean, WIDTH**2 * torch.eye(3).expand(45, 3, 3), torch.ones(45))


def slid(by):
    """The arm away from the body, along y."""
    mean = torch.cat([BODY, ARM + torch.tensor([0.0, float(by), 0.0])])
    return Gaussians(mean, WIDTH**2 * torch.eye(3).expand(45, 3, 3), torch.ones(45))


def consensus(angles):
    return torch.stack([voxelize(molecule(angle), GRID) for angle in angles.unique()]).mean(0)


class Planted(ParticleStack):
    """Images of the molecule at some angles, which stay in memory."""

    def __init__(self, angles, noise=0.0, seed=0, first_row=0, shape=molecule):
        count, own = len(angles), rng(seed)
        poses = Poses(random_rotations(count, own).float(), torch.randn(count, 2, generator=own))
        mixtures = [shape(angle) for angle in angles]
        mean = torch.stack([one.mean for one in mixtures])
        values = (300, 2.7, 0.1, 9000, 8500, 0.6, 0, 0, 1)
        optics = Optics(*(torch.full((count,), float(v)) for v in values))
        shown = project(Gaussians(mean, mixtures[0].covariance, mixtures[0].amplitude), poses, GRID)
        images = torch.fft.irfft2(torch.fft.rfft2(shown) * ctf(optics, GRID), s=(GRID.size,) * 2)
        images = images / images.std() + noise * torch.randn(images.shape, generator=own)
        rows, every = first_row + torch.arange(count), torch.zeros(first_row + count, dtype=torch.int64)
        held = Poses(*(torch.cat([part.new_zeros(first_row, *part.shape[1:]), part]) for part in poses.tensors()))
        table = SimpleNamespace(groups=[None], optics_group=every, poses=held.to(torch.float64))
        batch = Batch(images, poses, optics, every[:count], rows)
        vars(self).update(grid=GRID, symmetry=C1, diameter=0.9 * GRID.length, table=table, rows=rows, all=batch)

    def holding(self, batch):
        other = object.__new__(Planted)
        vars(other).update(vars(self), all=batch, rows=batch.index)
        return other

    def take(self, rows):
        return self.holding(self.all[rows])

    def with_poses(self, poses):
        return self.holding(replace(self.all, poses=poses.to(torch.float32)))

    def without_symmetry(self):
        return self

    def batches(self, size, *, seed, epoch=0, skip=0):
        order = torch.randperm(len(self), generator=rng(100 * seed + epoch))
        for start in range(skip * size, len(self), size):
            yield self.all[order[start : start + size]]

    def sequential(self, size, *, normalised=True):
        for start in range(0, len(self), size):
            yield self.all[start : start + size]


def discovery(count=12, shape=SMALL, unit=0.7):
    return PartDiscovery(10 * torch.randn(count, 3, generator=rng(3)), shape, length=WIDTH, unit=unit, generator=rng(4))


def hierarchy(count=12, shape=SMALL):
    own = rng(5)
    return Hierarchy(
        10 * torch.randn(count, 3, generator=own),
        torch.arange(count) % 3,
        torch.randn(3, shape.features, generator=own),
        10 * torch.randn(3, 3, generator=own),
        torch.tensor([0, 0, 1]),
        shape,
        length=WIDTH,
        unit=1.3,
        generator=own,
    )


def separable_decoder(count=12):
    own = rng(6)
    centre = 10 * torch.randn(count, 3, generator=own)
    return Decoder(centre, torch.full((count,), WIDTH), torch.ones(count), separable.Shape(2, 2, 3, 3), generator=own)


DECODERS = pytest.mark.parametrize("make", [discovery, hierarchy, separable_decoder])


def test_hidden_layer_and_its_gradient():
    """A few images at a time are what all at once are, and hidden numbers that are made again are the same."""
    own, latent, weight = (
        torch.randn(*size, generator=rng(), dtype=torch.float64, requires_grad=True)
        for size in ((7, 5), (4, 5), (3, 5))
    )
    direct = torch.relu(own[None] + latent[:, None]) @ weight.T
    assert torch.allclose(_Hidden.apply(own, latent, weight), direct, rtol=1e-14)
    assert torch.autograd.gradcheck(_Hidden.apply, (own, latent, weight))


def test_hidden_layer_in_several_pieces(monkeypatch):
    perceptron, feature, latent = Perceptron(SMALL, 3, rng()), torch.randn(9, 6), torch.randn(5, 2)
    whole = perceptron(feature, latent)
    monkeypatch.setattr("emsplat.models.cryospire._CACHED", 1)
    assert torch.allclose(perceptron(feature, latent), whole, atol=1e-6)


def test_six_numbers_are_a_rotation():
    matrix = six_to_matrix(torch.randn(20, 6, generator=rng(), dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(3, dtype=torch.float64).expand(20, 3, 3), atol=1e-12)
    assert torch.allclose(torch.linalg.det(matrix), torch.ones(20, dtype=torch.float64))
    assert torch.equal(six_to_matrix(torch.zeros(6)), torch.eye(3))


@pytest.mark.parametrize("make", [discovery, hierarchy])
def test_peaks_are_those_of_the_supplement(make):
    """Eq. 8, Σ m exp(-|p - c|²/2s²) on the pixels of a projection along z; eq. 9, m/(√(2π) s) exp(…) on voxels."""
    model = make()
    with torch.no_grad():
        mixture, width = model.mixtures(torch.randn(1, 2, generator=rng()))[0], model.widths()
    peak = mixture.amplitude / (2 * math.pi * width**2)
    axis = (torch.arange(GRID.size) - GRID.size // 2) * GRID.pixel_size
    away = (axis[None, :, None] - mixture.mean[:, 1, None, None]) ** 2
    away = away + (axis[None, None, :] - mixture.mean[:, 0, None, None]) ** 2
    eq8 = (peak[:, None, None] * torch.exp(-away / (2 * width[:, None, None] ** 2))).sum(0)
    image = project(mixture, Poses(torch.eye(3)[None], torch.zeros(1, 2)), GRID, cutoff=8.0)[0]
    assert torch.allclose(image / GRID.pixel_size**2, eq8, atol=1e-4 * float(eq8.max()))
    away = away[:, None] + (axis[None, :, None, None] - mixture.mean[:, 2, None, None, None]) ** 2
    s = width[:, None, None, None]
    eq9 = (peak[:, None, None, None] / (math.sqrt(2 * math.pi) * s) * torch.exp(-away / (2 * s**2))).sum(0)
    volume = voxelize(mixture, GRID, cutoff=8.0) / GRID.pixel_size**3
    assert torch.allclose(volume, eq9, atol=1e-4 * float(eq9.max()))


def test_peaks_start_as_published():
    model = discovery(unit=1.0)
    model.modulation.weight.data.zero_()
    assert torch.allclose(model.peaks(torch.zeros(1, 2)), torch.tensor(0.15))
    assert torch.allclose(model.widths(), torch.tensor(WIDTH))


def test_anchors_move_rigidly():
    """Without the residual, distances between Gaussians of one anchor stay, and those between anchors do not."""
    model = hierarchy()
    model.rigid.weight.data.mul_(30)
    for parameter in model.displacement.parameters():
        parameter.data.zero_()
    place = model(torch.randn(2, 2, generator=rng(7)))[0].detach()
    distance = torch.cdist(place, place)
    same = model.anchor[:, None] == model.anchor
    change = (distance[0] - distance[1]).abs()
    assert float(change[same].max()) < 1e-3
    assert float(change[~same].max()) > 1.0


def test_second_stage_begins_as_the_first_one_ended():
    """Rigid turns that the first stage moves its Gaussians by are those of the anchors, and in the state that Gaussians
    were put into they are where they were put."""
    before, after = discovery(60, shape=replace(SMALL, features=3)), hierarchy(shape=replace(SMALL, features=3))
    member = torch.arange(60) % 3
    member[7] = -1
    centre = before.centre.detach()

    class Turning(PartDiscovery):
        """Everything turns about z by the first latent, where one anchor also slides by it."""

        def forward(self, latent):
            angle = latent[:, 0]
            one, zero = torch.ones_like(angle), torch.zeros_like(angle)
            turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, one], 1)
            slide = 2 * angle[:, None, None] * (member == 1)[:, None]
            return self.length * ((centre @ turn.reshape(-1, 3, 3).mT) + slide), torch.ones(len(latent), 60)

    before.__class__ = Turning
    latent = torch.rand(100, 2, generator=rng()) - 0.5
    put = after.length * after.centre.detach().clone()
    inherit(after, before, member, torch.ones(60), latent, latent[:1], rng())
    assert torch.allclose(after(latent[:1])[0][0], put, atol=1e-3)
    with torch.no_grad():
        rows = member >= 0
        start, seen = before(latent[:1])[0][0, rows] / after.length, before(latent)[0][:, rows] / after.length
        error = (after.carried(start, member[rows], latent) - seen).square().sum(2).mean()
        assert float(error) < 0.05 * float((seen - start).square().sum(2).mean())


@DECODERS
def test_gradients_reach_every_parameter(make):
    stack = Planted(torch.zeros(6))
    model = Conformations(make(), torch.randn(6, 2, generator=rng()), stack.rows)
    batch = stack.all
    ImageObjective(stack, batch=6, seed=0).loss(model.gaussians(batch), batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.to_dense()
        assert torch.isfinite(gradient).all(), name
        assert float(gradient.abs().max()) > 0, name
    offered = [own for group in model.groups() for own in group.parameters.values()]
    assert {id(own) for own in offered} == {id(own) for own in model.parameters()}


@DECODERS
def test_only_latents_of_the_batch_move(make):
    stack = Planted(torch.zeros(12), first_row=20)
    model = Conformations(make(), torch.randn(12, 2, generator=rng()), stack.rows, rate=3.0)
    states = fit(State.begin(model), ImageObjective(stack, batch=4, seed=0), Plan(1, 1e-2, 1.0))
    for batch in stack.batches(4, seed=0):
        before = model.latent.detach().clone()
        next(states)
        moved = (model.latent.detach() != before).any(1)
        assert sorted(stack.rows[moved].tolist()) == sorted(batch.index.tolist())


def test_views_have_latents_of_their_own():
    """The elements of a symmetry that were drawn for a particle are neighbours, as in the linear stage."""
    batch = replace(Planted(torch.zeros(3), first_row=5).all, element=torch.tensor([1, 0, 2]))
    model = Conformations(discovery(), torch.randn(9, 2, generator=rng()), batch.index, elements=3)
    assert model.views(batch).tolist() == [1, 3, 8]
    with pytest.raises(ValueError, match="3 latents; expected 9"):
        Conformations(discovery(), torch.zeros(3, 2), batch.index, elements=3)


@DECODERS
def test_models_are_written_and_read(make, tmp_path):
    """With Adam's memory: a step after reading is that without."""
    stack = Planted(torch.zeros(8))
    model = Conformations(make(), torch.randn(8, 2, generator=rng()), stack.rows, rate=5.0)
    objective, plan = ImageObjective(stack, batch=4, seed=0), Plan(2, 1e-2, 1.0)
    states = fit(State.begin(model), objective, plan)
    save_checkpoint(tmp_path / "state.safetensors", next(states))
    resumed = load_checkpoint(tmp_path / "state.safetensors", read=read_conformations)
    *_, last = states
    *_, again = fit(resumed, ImageObjective(stack, batch=4, seed=0), plan)
    for (name, own), other in zip(last.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(own, other), name
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "state.safetensors")
    shown, read = last.model.gaussians(stack.all), again.model.gaussians(stack.all)
    assert torch.equal(shown.mean, read.mean)
    assert torch.equal(shown.amplitude, read.amplitude)


def blobs(count, points=300, dimensions=24, apart=1.0):
    """Clusters in a feature space of 24 numbers, of which they fill a few directions only."""
    own = rng(count)
    centre = apart * torch.eye(dimensions)[:count] + 0.3
    label = torch.arange(points) % count
    return centre[label] + 0.12 * torch.randn(points, dimensions, generator=own), label


@pytest.mark.parametrize("count", [1, 2, 3])
def test_number_of_parts(count):
    points, label = blobs(count)
    weight = 0.1 + torch.rand(len(points), generator=rng())
    assert count_clusters(points, weight, rng()).count == count
    assert agreement(cluster(points, weight, count, rng()).label, label) == 1.0


def test_parts_are_what_has_weight():
    """Faint Gaussians, however many, make no part of their own."""
    points, _ = blobs(3)
    weight = torch.ones(len(points))
    weight[torch.arange(len(points)) % 3 == 1] = 1e-4
    assert count_clusters(points, weight, rng()).count == 2


def test_number_of_parts_of_few_or_equal_points():
    assert count_clusters(torch.ones(50, 24), torch.ones(50), rng()).count == 1
    assert count_clusters(torch.randn(1, 24, generator=rng()), torch.ones(1), rng()).count == 1
    assert len(cluster(torch.ones(5, 3), torch.ones(5), 4, rng())) == 1


def agreement(a, b):
    """Adjusted Rand index (Hubert & Arabie 1985)."""
    table = torch.nn.functional.one_hot(a).T.double() @ torch.nn.functional.one_hot(b).double()
    pairs = lambda n: (n * (n - 1) / 2).sum()  # noqa: E731
    both, first, second, every = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum())
    expected = first * second / every
    most = (first + second) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


def test_clusters_are_divided_in_space():
    """One cluster at two places is two regions; another at one place stays."""
    own = rng()
    places = torch.tensor([[-30.0, 0.0, 0.0], [30.0, 0.0, 0.0], [0.0, 30.0, 0.0]])
    which = torch.arange(90) % 3
    place = places[which] + 3 * torch.randn(90, 3, generator=own)
    region, part = divide(place, torch.ones(90), torch.tensor([0, 0, 1])[which], own)
    assert agreement(region, which) == 1.0
    assert sorted(part.tolist()) == [0, 0, 1]


def test_anchors_follow_from_features():
    """Features of the anchors are centroids, positions those of Gaussians; Gaussians without amplitude have none."""
    points, label = blobs(2, points=40)
    model = discovery(40, replace(SMALL, features=24))
    model.feature.data.copy_(points)
    model.amplitude.data[4] = -0.1
    place = torch.where(label[:, None] == 0, -20.0, 20.0) + torch.randn(40, 3, generator=rng())
    used = model.used(torch.randn(5, 2, generator=rng()))
    assert (~used).nonzero().tolist() == [[4]]
    anchors = find_anchors(model, place, torch.ones(40), used, None, rng())
    assert anchors.strength.count == 2
    assert anchors.member[4] == -1
    assert agreement(anchors.member[used], label[used]) == 1.0
    for number in range(2):
        here = anchors.member == number
        assert torch.allclose(anchors.feature[number], points[here].mean(0), atol=1e-5)
        nearest = place[here][(points[here] - anchors.feature[number]).norm(dim=1).argmin()]
        assert torch.equal(anchors.position[number], nearest)


def test_seeds_lie_in_the_density():
    volume = torch.zeros(32, 32, 32)
    volume[20, 10, 12], volume[5, 5, 5], volume[1, 1, 1] = 3.0, 1.0, 0.4
    points = seeds(volume, GRID, 4000, 0.5, rng()) / GRID.pixel_size + 16
    near = (points - torch.tensor([12.0, 10.0, 20.0])).abs().max(1).values <= 0.5
    far = (points - 5.0).abs().max(1).values <= 0.5
    assert bool((near | far).all())
    assert abs(float(near.double().mean()) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)
    with pytest.raises(InputError, match="no density above 4"):
        seeds(volume, GRID, 10, 4.0, rng())


def quick(**changes):
    small = {"features": 12, "hidden": 16, "batch": 32, "latent_rate": 3.0}
    stages = {"coarse": Pass(96, 0.05, 12, 2e-2, 0.3), "fine": Pass(192, 0.04, 6, 1e-2, 0.4)}
    return ConformationOptions(**(small | stages | changes))


@pytest.fixture(scope="module")
def hinge():
    """Two states, 80° apart, 250 images, and one half's worth of others."""
    angles = math.radians(40) * torch.tensor([-1.0, 1.0])[torch.arange(250) % 2]
    return Planted(angles, noise=1.0, seed=3), angles


def near_truth(angles, spread=0.3):
    """Latents that know the state but for some noise, beside one that knows nothing."""
    return torch.stack([angles.sign(), torch.zeros_like(angles)], 1) + spread * torch.randn(
        len(angles), 2, generator=rng()
    )


@pytest.fixture(scope="module", params=["perceptron", "separable"])
def fitted(request, hinge):
    stack, angles = hinge
    start = ImageStart(consensus(angles), near_truth(angles))
    return fit_images(stack, quick(decoder=request.param), start), request.param


def state_maps(model, latent, angles):
    with torch.no_grad():
        for angle in angles.unique():
            mean = latent[angles == angle].mean(0, keepdim=True)
            yield angle, voxelize(model.mixtures(mean)[0], GRID)


def test_a_hinge_is_reconstructed(fitted, hinge):
    """Each state better than by the consensus, which is the best map that images of both states could give."""
    (model, latent), _ = fitted
    angles = hinge[1]
    mixed = consensus(angles)
    for angle, found in state_maps(model, latent, angles):
        truth = voxelize(molecule(angle), GRID)
        shells = slice(1, 7)  # beyond them Gaussians of 6 Å are fainter than the noise
        assert 1 - fsc(found, truth)[shells].mean() < 0.5 * (1 - fsc(mixed, truth)[shells].mean())
    assert torch.equal(latent, model.latent.detach())


@pytest.mark.slow
def test_parts_are_found(monkeypatch):
    """An arm that slides: its Gaussians move alike, and features that began alike say which they are."""
    monkeypatch.setattr("emsplat.heterogeneity.images._LESSONS", 1)  # how well anchors begin is another matter
    slides = torch.linspace(-10, 10, 250)
    stack = Planted(slides, noise=0.5, seed=3, shape=slid)
    volume = torch.stack([voxelize(slid(by), GRID) for by in slides[::25]]).mean(0)
    known = torch.stack([slides / 6, torch.zeros(250)], 1) + 0.2 * torch.randn(250, 2, generator=rng())
    options = quick(coarse=Pass(96, 0.05, 15, 2e-2, 0.2), fine=Pass(96, 0.04, 1, 1e-2))
    first, last = changes(follow_images(stack, options, ImageStart(volume, known)))
    own, used = first.decoder, first.decoder.used(first.latent.detach())
    with torch.no_grad():
        place, weight = (both[0, used] for both in own(first.latent[-20:].mean(0, keepdim=True)))
    feature = own.feature.detach()[used]
    truth = (torch.cdist(place, slid(slides[-10]).mean).argmin(1) >= len(BODY)).long()
    heavy = weight > 0.25 * weight.mean()
    assert agreement(cluster(feature, weight, 2, rng()).label[heavy], truth[heavy]) > 0.7
    assert count_clusters(feature, weight, rng()).count == 2
    assert sorted(set(last.decoder.part.tolist())) == [0, 1]


def changes(states):
    """The last model of each stage."""
    return dict.fromkeys(state.model for state in states)


def test_latents_of_other_images(fitted, hinge, monkeypatch):
    """Images that the model has not seen find their state under it; the model stays."""
    (model, latent), _ = fitted
    angles = hinge[1]
    other = Planted(angles[:60], noise=1.0, seed=11, first_row=1000)
    white = torch.ones(1, GRID.size // 2 + 1)  # the images have noise of variance 1
    monkeypatch.setattr("emsplat.heterogeneity.images.estimate_noise", lambda stack: white)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    placed = place_latents(model, other, quick(), candidates=6, epochs=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(own.requires_grad for own in model.parameters())
    assert [list(group.parameters) for group in placed.groups()] == [["latent"]]
    centre = torch.stack([latent[angles == angle].mean(0) for angle in angles.unique()])
    said = torch.cdist(placed.latent.detach(), centre).argmin(1)
    assert float((said == (angles[:60] > 0)).double().mean()) > 0.9
    with torch.no_grad():
        nats = misfits(other, [placed, *model.mixtures(centre)])
    assert nats.shape == (60, 3)
    assert float(nats[:, 0].sum()) < float(nats[:, 1:].sum(0).min())


def test_a_fit_goes_on_where_it_was_left(hinge, tmp_path, monkeypatch):
    """In either stage, and between them."""
    monkeypatch.setattr("emsplat.heterogeneity.images._LESSONS", 5)
    stack, angles = hinge
    stack = stack.take(torch.arange(40))
    options = quick(batch=20, parts=2, coarse=Pass(24, 0.05, 2, 1e-2), fine=Pass(40, 0.04, 1, 1e-2))
    start = ImageStart(consensus(angles), near_truth(angles)[:40])
    states = []
    for number, state in enumerate(follow_images(stack, options, start)):
        save_checkpoint(tmp_path / f"{number}", state)
        states.append(state)
    assert [state.step for state in states] == [1, 2, 3, 4, 5, 6]
    for number in (1, 3, 4):
        resumed = load_checkpoint(tmp_path / f"{number}", read=read_conformations)
        *_, last = follow_images(stack, options, start, resumed)
        for (name, own), other in zip(
            states[-1].model.state_dict().items(), last.model.state_dict().values(), strict=True
        ):
            assert torch.equal(own, other), (number, name)


def test_starts_that_do_not_fit(hinge):
    stack, angles = hinge
    volume = consensus(angles)
    with pytest.raises(InputError, match="expected 32³"):
        fit_images(stack, quick(), ImageStart(volume[:16, :16, :16]))
    with pytest.raises(InputError, match="expected 250 finite rows"):
        fit_images(stack, quick(), ImageStart(volume, torch.zeros(3, 2)))
    with pytest.raises(InputError, match="expected 250 finite rows"):
        fit_images(stack, quick(), ImageStart(volume, torch.full((250, 2), torch.nan)))
    with pytest.raises(InputError, match="no density"):
        fit_images(stack, quick(), ImageStart(torch.zeros(32, 32, 32)))
    dark = stack.holding(replace(stack.all, images=-stack.all.images))
    with pytest.raises(InputError, match="--invert"):
        fit_images(dark, quick(), ImageStart(volume))


@pytest.mark.slow
@pytest.mark.parametrize("symmetry", [C1, cyclic(2)], ids=["C1", "C2"])
def test_half_sets_of_a_file(simulated, symmetry):
    """From the stacks on disk, one half fitted, the other placed: every view of every particle has a latent."""
    stack = open_particles(simulated(particles=60), symmetry=symmetry).with_halves(0)
    one, other = stack.only(1), stack.only(2)
    options = quick(weighted=True, parts=1, coarse=Pass(40, 0.05, 2, 1e-2), fine=Pass(60, 0.04, 1, 1e-2))
    model, latent = fit_images(one, options, ImageStart(equations_of(one).solve()))
    views = symmetry.order
    assert latent.shape == (views * len(one), 4)
    assert torch.equal(model.rows, one.rows)
    placed = place_latents(model, other, options, candidates=3, epochs=1)
    assert placed.latent.shape == (views * len(other), 4)
    assert torch.equal(placed.rows, other.rows)
    nats = misfits(other, [placed, model.gaussians()])
    assert nats.shape == (len(other), 2)
    assert torch.isfinite(nats).all()


def test_misfits_are_in_nats(monkeypatch):
    """White noise of variance v costs v/2 for each coefficient within Nyquist, by a spectrum of 1."""
    stack = Planted(torch.zeros(50))
    noise = 2 * torch.randn(stack.all.images.shape, generator=rng())
    stack = stack.holding(replace(stack.all, images=noise))
    white = torch.ones(1, GRID.size // 2 + 1)
    monkeypatch.setattr("emsplat.heterogeneity.images.estimate_noise", lambda stack: white)
    nothing, something = replace(molecule(0.0), amplitude=torch.zeros(45)), molecule(0.0)
    nats = misfits(stack, [nothing, something])
    k = torch.fft.fftfreq(GRID.size, 1 / GRID.size)
    count = int(((k[:, None] ** 2 + k**2).sqrt().round() <= GRID.size // 2).sum())
    # As many real numbers are free; each costs v/2 times χ² with one degree of freedom.
    error = 2 * math.sqrt(2 * count / len(stack))
    assert abs(float(nats[:, 0].mean()) - 2 * count) < 5 * error
    assert float(nats[:, 1].min() - nats[:, 0].min()) > 0
