"""Parts of a decoder as rigid motions and masks, ways through the density, movies."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from emsplat.heterogeneity import states
from emsplat.heterogeneity.cells import Cells, raw_map
from emsplat.heterogeneity.corrected import corrected_maps, pulled_back
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.frames import identity
from emsplat.heterogeneity.half import HalfModel
from emsplat.heterogeneity.motions import members, motions, part_of
from emsplat.heterogeneity.paths import along, main_path, principal, through_density, traversal
from emsplat.heterogeneity.residual import RESIDUALS, with_residuals
from emsplat.imaging.project import voxelize
from emsplat.io.mrc import read_map
from emsplat.maths.geometry import axis_rotation
from emsplat.models.decoder import Decoder, Shape
from emsplat.programs.part_files import surface_level, write_parts
from emsplat.report.movie import draw_frame, write_movie
from emsplat.run.log import Log
from emsplat.types import Gaussians, Grid

GRID = Grid(40, 3.0)
THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64)
SHIFT = 6.0  # Å, of the arm along its axis, per whole turn


@pytest.fixture(scope="module")
def model():
    """A body and an arm that turns about z, at (30, 0, 0) Å, with the latent (cos θ - 1, sin θ), and a block that the
    third latent takes away."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(300, 3, generator=generator)
    centre = torch.cat([5 * spread[:100], 4 * spread[100:200], 4 * spread[200:]])
    centre[100:200] = centre[100:200] * torch.tensor([2.0, 0.7, 0.7]) + torch.tensor([30.0, 0.0, 0.0])
    centre[200:] += torch.tensor([0.0, -28.0, 0.0])
    shape = Shape(latents=3, parts=3, bends=1, changes=1)
    decoder = Decoder(centre, torch.full((300,), 3.0), torch.ones(300), shape, generator=generator)
    with torch.no_grad():
        part = torch.arange(3).repeat_interleave(100)
        decoder.logits.copy_(40 * torch.nn.functional.one_hot(part, 3).float())
        decoder.bend.zero_()
        decoder.change.copy_((part == 2).float()[:, None])
        for weight in decoder.weights:
            weight.zero_()
        own = decoder.weights[2][:, -3:]  # what the latents do directly
        own[9 + 0, 0] = own[9 + 4, 0] = 1.0  # cos θ - 1 of part 2
        own[9 + 1, 1], own[9 + 3, 1] = 1.0, -1.0  # sin θ
        own[9 + 8, 1] = SHIFT / decoder.length / 2  # along z
        own[27 + 1, 2] = -3.0
    density = Density(torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)
    return HalfModel(decoder, density, eye, torch.zeros(1, 40, 40, 40), GRID, GRID, identity(3))


def turned(degrees):
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos() - 1, angle.sin(), torch.zeros_like(angle)], -1)


def test_a_turning_part_is_described(model):
    found = motions((model, model), turned([-20.0, 0.0, 25.0, 70.0]), 1, members(model))
    body, arm, block = found
    assert arm.against is not None
    assert not arm.whole_turn
    assert arm.gaussians == 100
    assert arm.turn == pytest.approx(90, abs=0.1)
    assert np.allclose(np.abs(arm.axis), (0, 0, 1), atol=1e-3)
    assert np.allclose(np.sign(arm.axis[2]) * np.array(arm.angles), (-20, 0, 25, 70), atol=0.1)
    centre = model.decoder.centre.detach()[100:200].mean(0).double() * model.decoder.length
    assert np.allclose(arm.centre, centre, atol=1e-3)
    rise = SHIFT / 2 * (math.sin(math.radians(70)) - math.sin(math.radians(-20)))
    assert abs(arm.slide) == pytest.approx(rise, abs=1e-2)
    assert arm.shift == pytest.approx(rise, abs=1e-2)
    assert np.allclose(np.array(arm.through)[:2], centre[:2], atol=0.05)
    assert "turns by up to 90° about the axis (0.00, 0.00, 1.00)" in arm.words
    assert (arm.other_turn, arm.axes_apart) == pytest.approx((90, 0), abs=0.2)
    assert "do not agree on an axis (35° between theirs)" in replace(arm, axes_apart=35.0).words
    for one in (body, block):
        assert one.against is None or not one.moves
        assert not one.changes
    assert "stands still" in (block if body.against is None else body).words


def test_gaussians_belong_to_the_part_that_they_follow(model):
    """However soft the decoder's borders are: of an arm that belongs to a tenth to the body, all turns with the arm."""
    soft = replace(model, decoder=copy.deepcopy(model.decoder), density=Density(turned([0.0, 45.0, 90.0]), THIRDS))
    with torch.no_grad():
        soft.decoder.logits[100:200, 0] = soft.decoder.logits[100:200, 1] - math.log(9)
    member = members(soft)
    assert torch.equal(member.argmax(1), torch.arange(3).repeat_interleave(100))
    with torch.no_grad():
        soft.decoder.logits[100:110, 0] += 3  # some nearer to the body, in words alone
        soft.decoder.logits[:10, 1] += 80
    again = members(soft).argmax(1)
    assert (again[10:100] == 0).all()
    assert (again[110:200] == 1).all()


def hinge(degrees):
    """A body, and an arm that turns about z through (4, 0, 0) Å."""
    generator = torch.Generator().manual_seed(0)
    body = torch.randn(150, 3, generator=generator) * torch.tensor([9.0, 6.0, 5.0]) + torch.tensor([-12.0, 0.0, 0.0])
    arm = torch.randn(100, 3, generator=generator) * torch.tensor([3.5, 9.0, 4.5]) + torch.tensor([8.0, 12.0, 0.0])
    turn = torch.from_numpy(axis_rotation(np.array([0.0, 0.0, 1.0]), math.radians(degrees))).float()
    mean = torch.cat([body, arm @ turn.T + torch.tensor([4.0, 0.0, 0.0])])
    return voxelize(Gaussians(mean, (9 * torch.eye(3)).expand(250, 3, 3), torch.ones(250)), Grid(32, 3.0))


def result_of(fitting):
    """What a fit comes to."""
    while True:
        try:
            next(fitting)
        except StopIteration as end:
            return end.value


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_hinge_is_told_as_it_is(seed, monkeypatch):
    """A decoder that may change density from the start feigns the motion: 14° to 19° were told of these 100°."""
    monkeypatch.setattr(states, "_FIRST", 512)
    angle = torch.linspace(0, 100, 16)
    maps = torch.stack([hinge(-float(own)) for own in angle])
    z = (angle.double() - 50) / 30
    latent = torch.stack([z, 0.3 * (z.square() - 1)], 1)
    ones = torch.ones(16)
    cells = Cells(Grid(32, 3.0), 1e5 * maps, 1e5 * torch.ones(16, 48, 48, 25), latent, 100 * ones, ones)
    place = torch.arange(16)
    shared = torch.exp(-(place[:, None] - place).square() / 2)
    generator = torch.Generator().manual_seed(seed)
    decoder = result_of(states.coarse_decoder(cells, shared, states.DecoderPlan(3), generator))
    even, eye = Density(latent, torch.full((16,), 1 / 16).double()), torch.eye(2).double()
    own = HalfModel(decoder, even, eye, torch.zeros(0, 8, 8, 8), Grid(8, 3.0), Grid(32, 3.0), identity(2))
    found = motions((own, own), latent[[0, 5, 10]], 0, members(own))  # few states; the points go all the way
    arm = max(found, key=lambda part: part.turn)
    assert arm.turn == pytest.approx(100, abs=15)
    assert abs(arm.axis[2]) > 0.97
    assert np.allclose(arm.through[:2], (4, 0), atol=5)
    assert f"turns by up to {arm.turn:.0f}°" in arm.words


def test_as_many_gaussians_as_are_asked_for(model, monkeypatch):
    """What is taken by itself has a limit, what is asked for has none."""
    monkeypatch.setattr(states, "run_stage", lambda *given: iter(()))
    monkeypatch.setattr(states, "_FIRST", len(model.decoder))
    monkeypatch.setattr(states, "_MOST", 2 * len(model.decoder))
    monkeypatch.setattr(states, "_PER_VOXEL", 1e6)
    latent = turned([0.0, 35.0, 70.0, 100.0])
    cells, _ = cells_of(model, latent)
    for asked, found in ((None, 2), (5 * len(model.decoder), 5)):
        plan = states.DecoderPlan(3, asked)
        fine = result_of(states.fine_decoder(model.decoder, cells, torch.eye(4), plan, torch.Generator()))
        assert len(fine) == found * len(model.decoder)


def test_a_whole_turn_is_called_one(model):
    arm = motions((model, model), turned(torch.arange(0, 360, 30.0)), 0, members(model))[1]
    assert arm.whole_turn
    assert arm.turn == pytest.approx(180, abs=1)
    assert "turns all the way round" in arm.words


def test_a_motion_of_all_is_none_of_the_parts(model):
    """Where everything turns but one small part, that is the one that moves."""
    model.decoder.logits.data[:100] = torch.tensor([0.0, 40.0, 0.0])
    try:
        body, found = motions((model, model), turned([0.0, 60.0]), 0, members(model))
    finally:
        model.decoder.logits.data[:100] = torch.tensor([40.0, 0.0, 0.0])
    assert (body.number, body.gaussians, body.against) == (2, 200, None)
    assert (found.number, found.turn) == (3, pytest.approx(60, abs=0.1))


def test_a_part_that_comes_and_goes(model):
    gone = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    found = motions((model, model), gone, 0, members(model))
    assert [part.changes for part in found] == [False, False, True]
    # softplus(x) at the amplitude of 1, and three below it
    raw = math.log(math.expm1(1.0))
    assert found[2].mass[1] == pytest.approx(math.log1p(math.exp(raw - 3)), rel=1e-3)
    assert "comes and goes" in found[2].words


def test_masks_of_parts_hold_their_parts(model, tmp_path):
    found = write_parts((model, model), turned([0.0, 40.0]), [0.4, 0.6], tmp_path, Log())
    assert found == [1, 2, 3]
    masks = [read_map(tmp_path / "parts" / f"part{part}_mask.mrc")[0] for part in found]
    place = model.mixture(turned(40.0)).mean
    index = (place / GRID.pixel_size).round().long() + GRID.size // 2
    for number, mask in enumerate(masks):
        assert 0 <= float(mask.min()) <= float(mask.max()) == 1
        value = mask[index[:, 2], index[:, 1], index[:, 0]].reshape(3, 100).mean(1)
        assert value[number] > 0.8
        assert max(float(value[other]) for other in range(3) if other != number) < 0.5
    assert "part 2, 100 Gaussians" in (tmp_path / "parts" / "parts.txt").read_text()
    own = part_of(model, turned(0.0), members(model)[:, 1])
    assert float(own.amplitude[:100].abs().max()) < 1e-6 < float(own.amplitude[100:200].min())


def cells_of(model, latent):
    """Noiseless cells that everything is measured of alike."""
    with torch.no_grad():
        maps = torch.stack([voxelize(model.mixture(own), GRID) for own in latent])
    count, side = len(latent), 3 * GRID.size // 2
    response = torch.ones(count, side, side, side // 2 + 1)
    particles = 1e5 * torch.arange(1.0, count + 1)
    weight = particles[:, None, None, None]
    return Cells(GRID, weight * maps, weight * response, latent, particles, torch.full((count,), 1e-4)), maps


def likeness(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_a_consensus_in_one_state(model):
    latent = turned([0.0, 35.0, 70.0, 100.0])
    cells, maps = cells_of(model, latent)
    plain = raw_map(cells, torch.ones(4))
    filtered, raw = corrected_maps(model, cells, latent[1])
    assert likeness(plain, maps[1]) < 0.975
    assert likeness(raw, maps[1]) > 0.99
    assert likeness(filtered, maps[1]) > 0.99
    assert float(raw.sum() / maps[1].sum()) == pytest.approx(1, abs=0.1)


def test_residuals_of_states_are_one_map_where_nothing_moves(model):
    """What the Gaussians lack there is one map; elsewhere each kind has one for each cell."""
    latent = turned([0.0, 35.0, 70.0, 100.0])
    cells, maps = cells_of(model, latent)
    generator = torch.Generator().manual_seed(1)
    axis = torch.arange(float(GRID.size)) - GRID.size // 2
    gap = (axis[:, None, None] ** 2 + (axis[:, None] + 7) ** 2 + axis**2) * GRID.pixel_size**2
    detail = 0.2 * float(maps.max()) * torch.exp(-gap / 50)  # in what stands still
    noise = 0.02 * float(maps.max()) * torch.randn(maps.shape, generator=generator)
    weight = cells.particles[:, None, None, None]
    noisy = replace(cells, noise=torch.full((4,), 1.0))
    left = weight * (detail + 0.2 * (maps - maps.mean(0))) + weight.sqrt() * noise
    place = replace(embedded_nowhere(4), membership=torch.eye(4, dtype=torch.float64) + 0.1, density=model.density)
    found = with_residuals(model, place, noisy, left)
    assert list(found) == list(RESIDUALS)
    spread = {kind: own.residual.std(0) for kind, own in found.items()}
    still = gap < 40
    moving = maps.std(0) > 0.1 * float(maps.max())
    for kind, own in found.items():
        # Kept in 16 bits.
        assert float(spread[kind][still].max()) < 3e-3 * float(own.residual.abs().max())
        assert float(spread[kind][moving].mean()) > 5 * float(spread[kind][still].mean())
        assert likeness(own.residual[0][still], detail[still]) > 0.9
    assert float((found["nearby"].residual - found["together"].residual)[:, moving].abs().max()) > 0
    assert list(with_residuals(model, place, noisy, left, ("together",))) == ["together"]


def embedded_nowhere(count):
    nothing, latent = torch.zeros(0, count).double(), torch.zeros(0, 3).double()
    density = Density(torch.zeros(count, 3).double(), torch.full((count,), 1 / count).double())
    return Embedding(density, nothing, nothing, latent, latent, latent[:, 0], torch.eye(3).double())


def test_a_turned_convolution():
    """K(R x) acts on V(R x) as K on V, turned."""
    rotation = torch.from_numpy(axis_rotation(np.array([0.0, 0.0, 1.0]), math.pi / 2))[None].float()
    size, side = 16, 24
    kz, ky, kx = (torch.fft.fftfreq(side), torch.fft.fftfreq(side), torch.fft.rfftfreq(side))
    response = torch.exp(-30 * (kz[:, None, None] ** 2 + 4 * ky[:, None] ** 2 + kx**2))[None]
    grid = Grid(size, 2.0)
    zero = torch.zeros(1, size, size, size)
    one = torch.ones(1)
    cells = Cells(grid, zero, response, torch.zeros(1, 1).double(), one, one)
    back = pulled_back(cells, rotation, torch.zeros(1, 3))
    right = torch.exp(-30 * (kz[:, None, None] ** 2 + ky[:, None] ** 2 + 4 * kx**2))
    assert torch.allclose(back.response[0], right, atol=2e-3)
    same = pulled_back(cells, torch.eye(3)[None], torch.zeros(1, 3))
    assert torch.allclose(same.response[0], response[0], atol=1e-5)


def ring(count=40):
    angle = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_the_way_goes_round_what_is_empty():
    point, weight = ring(), torch.full((40,), 1 / 40, dtype=torch.float64)
    corners = torch.tensor([[1.0, 0.0], [-0.99, 0.05]], dtype=torch.float64)
    way = through_density(corners, point, weight, 30 * torch.eye(2, dtype=torch.float64))
    assert torch.equal(way[0], corners[0])
    assert torch.equal(way[-1], corners[1])
    assert (torch.linalg.vector_norm(way, dim=1) > 0.9).all()
    assert len(list(along(way, 7))) == 7
    assert float(torch.linalg.vector_norm(torch.stack(list(along(corners, 21))), dim=1).min()) < 0.1  # straight
    three = through_density(point[[0, 10, 20]], point, weight, 30 * torch.eye(2, dtype=torch.float64))
    assert (torch.cdist(three, point[[10]]) == 0).any()
    far = main_path(point[[0, 5, 21]], [0.5, 0.3, 0.2], point, weight, torch.eye(2, dtype=torch.float64))
    assert torch.equal(far[-1], point[21])


def test_a_traversal_stays_among_the_particles():
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(4000, generator=generator, dtype=torch.float64) - 1
    latent = torch.stack([3 * x, x**2], 1) + 0.01 * torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    way = traversal(latent, 1, 9, torch.eye(latent.shape[1], dtype=latent.dtype))
    assert way[0, 0].abs() == pytest.approx(2.7, abs=0.1)
    assert way[-1, 0] == pytest.approx(-float(way[0, 0]), abs=0.15)
    assert torch.allclose(way[:, 1], (way[:, 0] / 3) ** 2, atol=0.08)
    assert torch.allclose(way.diff(dim=0)[:, 0], way.diff(dim=0)[:, 0].mean().expand(8), atol=0.02)


def test_principal_components_are_those_of_the_maps(model):
    """Of latents with one variance, as the linear stage makes them, the one whose changes of the map are largest."""
    latent = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).double()
    mixed = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.1], [0.0, 0.2, 0.0]]).double()  # of what each latent changes
    places, directions = principal(latent, mixed.T @ mixed)
    assert torch.allclose(places @ directions.T, torch.eye(3).double(), atol=1e-5)
    seen = (latent @ mixed.T).T
    own = places @ (latent - latent.mean(0)).T
    assert float(own.var(1).diff().max()) < 0
    assert abs(float(torch.corrcoef(torch.stack([own[0], seen[0]]))[0, 1])) > 0.99
    # The arm and the block of this one change, along one latent each.
    points = Density(
        turned([-20.0, 0.0, 20.0, 0.0]) + torch.tensor([[0.0, 0, 0]] * 3 + [[0, 0, 1.0]]), torch.ones(4).double()
    )
    gram = replace(model, density=points).change_gram()
    assert float(gram[1, 1]) > 0
    assert float(gram[2, 2]) > 0
    assert torch.allclose(gram, gram.T)


def ball(radius, centre=(0.0, 0.0, 0.0), size=40):
    axis = torch.arange(size) - size // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    away = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).float().sqrt()
    return (radius + 0.5 - away).clamp(0, 1)


def test_a_frame_shows_the_surface():
    volume = ball(8.0, (6.0, 10.0, -4.0)).numpy()
    frame = draw_frame(volume, 0.5)
    assert frame.shape == (300, 600, 3)
    for view, right in ((frame[:, :300], 6.0), (frame[:, 300:], -4.0)):
        y, x = np.nonzero((view < 250).any(2))
        pixel = 40 / 300
        assert x.mean() * pixel - 20 == pytest.approx(right, abs=0.6)
        assert 20 - y.mean() * pixel == pytest.approx(10.0, abs=0.6)
        assert len(x) * pixel**2 == pytest.approx(math.pi * 8.0**2, rel=0.06)
    assert (draw_frame(volume, 5.0) == 255).all()


def test_a_movie_plays_forward_and_back(tmp_path):
    from PIL import Image

    frames = [draw_frame(ball(radius).numpy(), 0.5) for radius in (4.0, 6.0, 8.0)]
    write_movie(tmp_path / "movie.webp", frames)
    with Image.open(tmp_path / "movie.webp") as movie:
        assert movie.n_frames == 4
        assert movie.size == (600, 300)
        dark = []
        for number in range(4):
            movie.seek(number)
            dark.append(int((np.asarray(movie.convert("RGB")).min(2) < 200).sum()))
    assert dark[0] < dark[1] < dark[2]
    assert dark[3] == pytest.approx(dark[1], rel=0.02)


def test_the_level_of_a_surface():
    volume = ball(8.0) * 2 + 0.01 * torch.randn(40, 40, 40, generator=torch.Generator().manual_seed(0))
    assert 0.5 < surface_level(volume) <= 2.1
    assert surface_level(torch.zeros(4, 4, 4)) == 0


def test_motions_that_the_other_half_set_does_not_have_are_not_told(model):
    """It turns the arm the other way, and keeps the block."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        own = other.decoder.weights[2][:, -3:]
        own[9 + 1, 1], own[9 + 3, 1] = -own[9 + 1, 1], -own[9 + 3, 1]
        own[27 + 1, 2] = 0.0
    states = turned([-20.0, 0.0, 25.0, 70.0])
    states[:, 2] = torch.tensor([0.0, 0.0, 1.0, 2.0]).double()
    _, arm, block = motions((model, model), states, 1, members(model))
    assert arm.confirmed == pytest.approx(1)
    assert block.mass_confirmed == pytest.approx(1)
    assert "it comes and goes" in block.words
    _, arm, block = motions((model, other), states, 1, members(model))
    assert arm.turn == pytest.approx(90, abs=0.1)
    assert arm.confirmed < 0
    assert arm.words.endswith(f"moves against part {arm.against} in no way that the other half-set confirms")
    assert arm.axes_apart == pytest.approx(180, abs=0.1)
    half_turn = motions((model, other), turned([0.0, 178.0]), 0, members(model))[1]
    assert (half_turn.turn, half_turn.axes_apart) == pytest.approx((178, 0), abs=0.1)
    assert block.changes
    assert block.mass_confirmed == pytest.approx(0, abs=1e-6)
    assert "comes and goes" not in block.words
