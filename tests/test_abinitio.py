"""Poses from nothing: grids, scores against direct ones, axes, alignment, the verdict, and the whole way."""

import json
import math
from dataclasses import replace

import pytest
import torch

from emsplat.config import AbinitioConfig, AbinitioOptions, ChoiceOptions, ImageOptions, RunOptions
from emsplat.errors import InputError
from emsplat.io.particles import read_particles
from emsplat.maths.geometry import axis_rotation, random_rotations
from emsplat.maths.groups import C1, cyclic, parse_symmetry
from emsplat.particles.choose import open_stack
from emsplat.poses.abinitio import Ascent, AscentStage, centre_of_mass
from emsplat.poses.axes import GroupFrame, Turning, find_frame, find_symmetry, in_frame, map_turned
from emsplat.poses.compare import compare_poses
from emsplat.poses.equivalents import examine, find_poses, remade
from emsplat.poses.grids import HALF_TURN, half_grid, shift_grid, sphere
from emsplat.poses.scores import Trial, expect, expect_slowly, most_likely
from emsplat.poses.starts import StartPlan, kinds, spherical_mean
from emsplat.poses.verdict import Verdict, agreement, brought_over, decide, last_shell, mirror_image, shell_correlation
from emsplat.programs.abinitio import _doubt, _posed, _unposed, abinitio
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra, half_plane
from emsplat.types import Poses

LENGTH = 100.0  # Å


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(size, seed, symmetry="C1", count=5, width=1.6):
    """A map of some Gaussians well within the box, under each element of a group."""
    generator = drawn(seed)
    centre = 0.22 * size * torch.randn(count, 3, generator=generator, dtype=torch.float64).clamp(-1.2, 1.2)
    axis = torch.arange(size) - size // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], -1).double()
    volume = torch.zeros(size, size, size, dtype=torch.float64)
    for element in parse_symmetry(symmetry).elements:
        for number, own in enumerate(centre @ element.T):
            volume += (1 + 0.3 * number) * torch.exp(-(points - own).square().sum(-1) / (2 * width**2))
    return volume.float()


def as_strong_as(volume, signal, radius=6):
    """A map of so much power in the images that `views` makes of it, in units of their noise."""
    images, _, _ = views(volume, 40, radius=radius, noise=0.0)
    return volume * math.sqrt(signal / float(images.values.abs().square().sum(1).mean()))


def views(volume, count, seed=0, radius=6, noise=1.0, spread=3.0):
    """Images of a map in units of their noise, and the poses that they were made in."""
    generator = drawn(seed)
    lattice = Lattice(radius)
    frequency, _ = half_plane(radius, 1.0, lattice.size)
    k = len(frequency)
    rotation = random_rotations(count, generator)
    shift = spread * torch.randn(count, 2, generator=generator)
    transfer = 0.5 + torch.rand(count, k, generator=generator)
    empty = Spectra(
        torch.zeros(count, k, dtype=torch.complex64),
        transfer,
        frequency,
        torch.arange(count, dtype=torch.int32),
        rotation.float(),
        torch.ones(count),
        torch.arange(count),
        LENGTH,
    )
    slices = lattice.slices(volume[None], empty)[:, 0]
    angle = 2 * math.pi / LENGTH * shift @ frequency.T
    random = torch.randn(count, k, generator=generator) + 1j * torch.randn(count, k, generator=generator)
    values = transfer * slices * torch.polar(torch.ones_like(angle), angle) + noise * math.sqrt(0.5) * random
    return replace(empty, values=values.to(torch.complex64)), rotation, shift


def angle_between(one, other):
    return (((one * other).sum((-1, -2)) - 1) / 2).clamp(-1, 1).arccos()


def mirrored(rotation):
    flip = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    return flip @ rotation @ flip


def agree(one, other):
    """The share of orientations that agree in one frame and hand."""
    none = torch.zeros(len(one), 2, dtype=torch.float64)
    return agreement(compare_poses(Poses(one.double(), none), Poses(other.double(), none), C1))


# Grids


@pytest.mark.parametrize("symbol", ["C1", "C3", "D2", "O"])
def test_every_pose_has_a_neighbour_in_the_grid(symbol):
    symmetry, step = parse_symmetry(symbol), math.radians(25)
    rotation = half_grid(step, symmetry, drawn())
    both = torch.cat([rotation, HALF_TURN @ rotation])
    assert torch.allclose(both @ both.mT, torch.eye(3, dtype=torch.float64).expand_as(both), atol=1e-12)
    asked = random_rotations(200, drawn(1))
    copies = (asked[:, None] @ symmetry.elements)[:, :, None]
    nearest = torch.stack([angle_between(own, both).amin() for own in copies])
    assert float(nearest.max()) < step  # the cell of a grid point reaches to √3/2 steps, and a little at its borders


def test_an_asymmetric_unit_is_a_part_of_all_directions():
    whole = len(half_grid(0.2, C1, drawn()))
    for symbol in ("C7", "D3", "I1"):
        symmetry = parse_symmetry(symbol)
        assert len(half_grid(0.2, symmetry, drawn())) * symmetry.order == pytest.approx(whole, rel=0.25)


def test_directions_are_even():
    direction = sphere(500)
    assert torch.allclose(direction.mean(0), torch.zeros(3, dtype=torch.float64), atol=5e-3)
    assert torch.allclose(direction.T @ direction / 500, torch.eye(3, dtype=torch.float64) / 3, atol=5e-3)


def test_shifts_reach_as_far_as_they_should_and_hold_one_at_least():
    shift = shift_grid(2.0, 9.0, drawn())
    assert float(torch.linalg.vector_norm(shift, dim=1).max()) <= 9.0
    assert len(shift) == pytest.approx(math.pi * 9**2 / 2**2, rel=0.15)
    assert all(len(shift_grid(5.0, 0.0, drawn(seed))) >= 1 for seed in range(20))


# Scores


@pytest.fixture
def trial_and_images():
    images, _, _ = views(blobs(16, 1), 6)
    lattice = Lattice(6)
    tried = half_grid(math.radians(50), C1, drawn(3))
    k = images.values.shape[1]
    slices = lattice.slices(
        blobs(16, 1)[None],
        replace(
            images,
            values=torch.zeros(len(tried), k, dtype=torch.complex64),
            transfer=torch.zeros(len(tried), k),
            image=torch.arange(len(tried), dtype=torch.int32),
            rotation=tried.float(),
            share=torch.ones(len(tried)),
            row=torch.arange(len(tried)),
        ),
    )[:, 0].contiguous()
    return Trial(tried, shift_grid(4.0, 8.0, drawn(4)), 0.02 * slices, 5.0), images


@pytest.mark.parametrize("temperature", [0.02, 1.0, 30.0])
def test_products_are_the_direct_sums(trial_and_images, temperature):
    """Where few weights count, and where many do."""
    trial, images = trial_and_images
    noise = 0.7 + torch.rand(images.values.shape[1], generator=drawn(5))
    rows = torch.tensor([4, 0, 3])
    fast, slow = (one(images, rows, trial, noise, temperature) for one in (expect, expect_slowly))
    for name in ("numerator", "weight", "residual", "likelihood", "certainty"):
        own, other = getattr(fast, name), getattr(slow, name)
        # Weights below a thousandth of the largest are left out where few are above it.
        assert float((own - other).abs().max()) < 5e-3 * float(other.abs().max()), name
    assert fast.spread == pytest.approx(slow.spread, rel=5e-3)


def test_the_pose_that_an_image_was_made_in_is_found():
    volume = as_strong_as(blobs(16, 2, width=1.0), 200)
    images, rotation, shift = views(volume, 8)
    ascent = Ascent(images, 6, 90.0, 0, 3.0, maps=volume[None], noise=torch.ones(7))
    trial = ascent.trial(6.0, math.radians(12))
    found = most_likely(images, torch.arange(8), trial, ascent.noise_at(trial))
    assert float(angle_between(found.rotation, rotation).median()) < math.radians(9)
    assert float((found.shift - shift).abs().median()) < 0.4 * LENGTH / 6
    assert bool((found.likelihood >= found.best).all())


def test_spherical_mean_has_no_direction_left():
    mean = spherical_mean(blobs(16, 3))
    assert torch.allclose(mean, mean.transpose(0, 2), atol=1e-5)
    assert float(mean.sum()) == pytest.approx(float(blobs(16, 3).sum()), rel=1e-4)


# Axes


@pytest.mark.parametrize("symbol", ["C2", "C5", "D2", "D3", "T"])
def test_the_axes_of_a_map_are_found_wherever_they_lie(symbol):
    symmetry = parse_symmetry(symbol)
    turn = random_rotations(1, drawn(5))
    centre = torch.tensor([0.6, -0.8, 0.5])
    volume = map_turned(blobs(24, 6, symbol, count=4), turn, centre)[0]
    turning = Turning(volume, 9, 22)
    frame = find_frame(turning, symmetry)
    assert frame.agreement > 0.93
    straight = in_frame(volume, replace(frame, symmetry=C1))
    for element in symmetry.elements[1:]:
        again = map_turned(straight, element[None], torch.zeros(3))[0]
        assert float(shell_correlation(straight, again)[2:7].min()) > 0.9


@pytest.mark.parametrize(("symbol", "found"), [("C1", "C1"), ("D2", "D2")])
def test_the_largest_group_of_a_map_is_found(symbol, found):
    volume = map_turned(blobs(24, 7, symbol, count=4), random_rotations(1, drawn(8)), torch.zeros(3))[0]
    assert find_symmetry(Turning(volume, 9, 22)).symmetry.symbol == found


@pytest.mark.parametrize(("refused", "found"), [("D2", "C2"), ("C2", "C1")])
def test_what_is_left_of_a_group_that_was_refused(refused, found):
    volume = map_turned(blobs(24, 7, "D2", count=4), random_rotations(1, drawn(8)), torch.zeros(3))[0]
    assert find_symmetry(Turning(volume, 9, 22), refused=[parse_symmetry(refused)]).symmetry.symbol == found


def test_a_map_that_is_turned_into_its_frame_is_the_mean_over_its_group():
    frame = GroupFrame(parse_symmetry("C2"), torch.from_numpy(axis_rotation([1.0, 0.0, 0.0], 0.3)), torch.zeros(3), 1.0)
    straight = in_frame(blobs(24, 9), frame)
    again = map_turned(straight, frame.symmetry.elements[1:], torch.zeros(3))[0]
    assert float((straight - again).abs().max()) < 0.05 * float(straight.max())


# Alignment and verdict


@pytest.mark.parametrize("hand", [False, True])
def test_a_second_map_is_brought_over(hand):
    """Made from the first by a turn, a move and a mirror; poses and shifts against both tell these."""
    size, voxel = 24, LENGTH / 24
    volume = blobs(size, 3)
    turn, centre = random_rotations(1, drawn(7))[0], torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
    other = map_turned(volume, turn[None], centre)[0]  # V₂(p) = V₁(Q p + c)
    first, shift = random_rotations(60, drawn(8)), 3 * torch.randn(60, 2, generator=drawn(9), dtype=torch.float64)
    second, second_shift = first @ turn, shift - voxel * (first @ centre)[:, :2]
    if hand:
        other, second = mirror_image(other), mirrored(second)
    comparison = compare_poses(Poses(first, shift), Poses(second, second_shift), C1)
    assert agreement(comparison) == 1
    again = brought_over(other, comparison, LENGTH)
    assert float(shell_correlation(volume, again)[1:8].min()) > 0.97


def test_unrelated_poses_do_not_agree():
    none = torch.zeros(300, 2, dtype=torch.float64)
    first, second = (Poses(random_rotations(300, drawn(seed)), none) for seed in (1, 2))
    assert agreement(compare_poses(first, second, C1)) < 0.1


def test_a_mirror_image_at_mirrored_poses_shows_the_same():
    volume = blobs(16, 4)
    images, rotation, _ = views(volume, 5, spread=0.0)
    lattice = Lattice(6)
    other = replace(images, rotation=mirrored(rotation).float().contiguous())
    one, two = lattice.slices(volume[None], images), lattice.slices(mirror_image(volume)[None], other)
    assert float((one - two).abs().max()) < 2e-3 * float(one.abs().max())


def test_a_map_without_shape_is_alike_from_everywhere():
    volume = spherical_mean(as_strong_as(blobs(16, 2, width=1.0), 60))
    images, _, _ = views(volume, 5)
    ascent = Ascent(images, 6, 90.0, 0, 3.0, maps=volume[None], noise=torch.ones(7))
    whole, once = (ascent.judge(5.0, 30.0, torch.arange(5), alike=alike).likelihood for alike in (False, True))
    # Every rotation stands for two, and turns between voxels round a little.
    assert torch.allclose(whole, once, atol=0.05 * float(whole.abs().max()))


def test_three_words():
    assert decide(0.8, 10, 5.0, 0.3).word == "found"
    assert decide(0.8, 3, 5.0, 0.3).word == "uncertain"  # an outline alone
    assert decide(0.8, 10, 0.2, 0.3).word == "uncertain"
    assert decide(0.35, 10, 5.0, 0.3).word == "uncertain"
    assert decide(0.61, 10, 50.0, 2.0).word == "uncertain"  # a quarter of the poses off by a turn
    assert decide(0.05, 10, 5.0, 0.3).word == "not found"
    assert decide(0.9, 10, -0.1, 0.3).word == "not found"


def test_the_last_shell_is_that_before_the_first_drop_beyond_the_outline():
    assert last_shell(torch.tensor([1.0, 0.2, 0.9, 0.8, 0.4, 0.9])) == 3
    assert last_shell(torch.tensor([1.0, 1.0, 0.9, 0.8])) == 3


# Axes that a map seems to have


def examined(volume, count=320):
    """What is said of the C3 of a map that images of ``volume`` have been averaged to, whichever of its turns they
    show."""
    images, rotation, _ = views(volume, count, radius=9, spread=1.0)
    symmetric = map_turned(volume, parse_symmetry("C3").elements, torch.zeros(3)).mean(0)
    ascent = Ascent(images, 9, 90.0, 0, 2.0, maps=symmetric[None], noise=torch.ones(10))
    frame = GroupFrame(parse_symmetry("C3"), torch.eye(3, dtype=torch.float64), torch.zeros(3), 0.98)
    return examine(ascent, frame, 7.0, 9, 0), ascent, rotation


def test_a_trimer_with_one_arm_raised_is_none():
    """Its mean over three turns is what climbs come to; images tell that it is none, and which turn each shows."""
    size = 20
    trimer = blobs(size, 21, "C3", count=4)
    raised = as_strong_as(trimer + 2 * blobs(size, 25, count=1), 300, 9)
    found, ascent, rotation = examined(raised)
    assert found.symmetry.order == 1
    assert found.loss > 3 * found.loss_error
    rows = torch.arange(100)
    poses = find_poses(ascent, found.volume, rows, C1, 7.0, 9)
    assert agree(rotation[rows], poses.rotation) > 0.8
    before = find_poses(ascent, ascent.volume, rows, C1, 7.0, 9)
    assert agree(rotation[rows], before.rotation) < 0.6


def test_a_trimer_is_one():
    found, _, _ = examined(as_strong_as(blobs(20, 21, "C3", count=4), 300, 9))
    assert found.symmetry.symbol == "C3"
    assert found.loss < 3 * found.loss_error


def test_a_map_made_anew_is_that_which_the_images_show():
    volume = as_strong_as(blobs(16, 12, count=8, width=1.0), 200)
    images, _, _ = views(volume, 200, spread=1.0)
    rough = volume + as_strong_as(blobs(16, 13, count=8, width=1.0), 60)
    ascent = Ascent(images, 6, 90.0, 0, 2.0, maps=rough[None], noise=torch.ones(7))
    again = remade(ascent, 6.0, 6)

    assert float(shell_correlation(volume, again)[2:6].mean()) > float(shell_correlation(volume, rough)[2:6].mean())


# The whole way


def test_a_rough_map_climbs_to_the_one_that_the_images_show():
    """From a map that is a third another one."""
    volume = as_strong_as(blobs(16, 12, count=8, width=1.0), 100)
    images, rotation, _ = views(volume, 300, spread=2.0)
    rows = torch.arange(80)
    rough = volume + as_strong_as(blobs(16, 13, count=8, width=1.0), 25)
    ascent = Ascent(images, 6, 90.0, 0, 3.0, maps=rough[None], noise=torch.ones(7))
    before = ascent.judge(6.0, 15.0, rows).likelihood.mean()
    for status in ascent.climb(AscentStage(12, 100, (5.0, 6.0))):
        assert math.isfinite(status.likelihood)
    found = ascent.judge(6.0, 15.0, rows, torch.ones(7))
    assert float(found.likelihood.mean()) > float(before) + 5
    assert agree(rotation[rows], found.rotation) > 0.5
    assert float(shell_correlation(volume, ascent.volume)[2:6].mean()) > 0.85


def test_maps_compete_for_the_images():
    """Images of two maps, and rough ones of both: each image goes to its own, and so do the shares."""
    one, other = (as_strong_as(blobs(16, seed, count=8, width=1.0), 100) for seed in (12, 13))
    first, _, _ = views(one, 180, spread=2.0)
    second, _, _ = views(other, 120, seed=1, spread=2.0)
    names = ("values", "transfer", "rotation", "share")
    both = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    images = replace(first, **both, image=torch.arange(300, dtype=torch.int32), row=torch.arange(300))
    rough = torch.stack([one + 0.3 * other, other + 0.3 * one])
    ascent = Ascent(images, 6, 90.0, 0, 3.0, maps=rough, noise=torch.ones(7))
    for _ in ascent.climb(AscentStage(10, 100, (6.0, 6.0))):
        pass
    kind = kinds(images, ascent.maps, torch.ones(7), 3.0, StartPlan(6 / 8.8, 3.0, 90.0, 6))
    assert float((kind[:180] == 0).double().mean()) > 0.8
    assert float((kind[180:] == 1).double().mean()) > 0.8
    assert float(ascent.share[0]) == pytest.approx(0.6, abs=0.1)
    assert float(ascent.share.sum()) == pytest.approx(1)


def test_the_centre_of_mass_is_kept_in_the_centre():
    volume = torch.roll(blobs(16, 12, count=6), (2, -1, 1), (0, 1, 2))
    images, _, _ = views(volume, 200, noise=1.0, spread=2.0)
    ascent = Ascent(images, 6, 90.0, 0, 4.0, maps=volume[None], noise=torch.ones(7))
    assert float(torch.linalg.vector_norm(centre_of_mass(volume))) > 1.5
    for _ in ascent.climb(AscentStage(20, 60, (6.0, 6.0))):
        pass
    assert float(torch.linalg.vector_norm(centre_of_mass(ascent.volume))) < 0.7


def options(**own):
    given = {"steps": 40, "batch": 60, "starts": 1, "offset": 3.0} | own
    run = RunOptions(threads=1)
    return AbinitioConfig(abinitio=AbinitioOptions(**given), images=ImageOptions(diameter=115.0), run=run)


def without_poses(star):
    """The same file as a program writes it that has only picked particles."""
    lines = star.read_text().splitlines()
    header = [line for line in lines if line.startswith("_rln")]
    start = next(number for number, line in enumerate(lines) if line.startswith("data_particles"))
    names = [line.split()[0] for line in lines[start:] if line.startswith("_rln")]
    kept = [n for n, name in enumerate(names) if not name.startswith(("_rlnAngle", "_rlnOrigin"))]
    out = lines[:start] + ["data_particles", "", "loop_", *(names[n] for n in kept)]
    rows = [line.split() for line in lines[start:] if line and not line.startswith(("_", "loop_", "data_"))]
    assert header
    star.write_text("\n".join(out + [" ".join(row[n] for n in kept) for row in rows]) + "\n")
    return star


def test_poses_that_are_missing_are_no_obstacle_here_and_named_elsewhere(simulated):
    star = without_poses(simulated(particles=20))
    with pytest.raises(InputError, match=r"no column rlnAngleRot; .*emsplat abinitio"):
        read_particles(star)
    table = read_particles(star, need_poses=False)
    assert torch.equal(table.poses.rotation, torch.eye(3, dtype=torch.float64).expand(20, 3, 3))
    assert not table.poses.shift.any()


@pytest.mark.parametrize("symbol", ["C1", "T"])
def test_the_other_hand_of_poses_that_were_found(simulated, symbol):
    """Whatever hand the poses of the file would have had, which are not used."""
    group = parse_symmetry(symbol)
    config = AbinitioConfig(choice=ChoiceOptions(flip_hand=True))
    stack = _unposed(open_stack(config, simulated(particles=20), need_poses=False))
    assert not stack.table.mirrored
    found = Poses(random_rotations(20, drawn(1)), torch.randn(20, 2, generator=drawn(2)).double())
    one, other = (_posed(stack, found, group, mirrored=flip).table for flip in (False, True))
    assert torch.equal(one.poses.rotation, found.rotation)
    assert torch.equal(other.poses.shift, found.shift)
    assert other.mirrored
    compared = compare_poses(one.poses, other.poses, group)
    assert compared.mirrored
    assert compared.angle.max() < 1e-6


@pytest.mark.slow
def test_what_is_written_of_poses_that_may_be_right(simulated, tmp_path, monkeypatch):
    """Whatever the images say: the verdict of two short starts is given."""
    star = without_poses(simulated(particles=240, snr=1.0, shift=2.0))
    given = Verdict("uncertain", 0.4, 8, 1.0, 0.1)
    monkeypatch.setattr("emsplat.poses.starts.decide", lambda *_: given)
    monkeypatch.setattr("emsplat.poses.starts._LOOKS", 0)  # a map of two steps seems to have all axes
    config = options(steps=2, classes=2)
    summary = abinitio(config, star, tmp_path / "run")
    assert summary["abinitio"]["verdict"] == "uncertain"
    assert summary["abinitio"]["hand"] == "not determined"
    assert sum(summary["abinitio"]["particles_of_classes"]) == 240
    run = read_particles(tmp_path / "run" / "run_data.star")
    assert len(run) == 240
    assert int((run.particle_class == 1).sum()) == summary["abinitio"]["particles_of_classes"][0]
    assert len(torch.unique(run.poses.rotation[:, 0, 0])) > 200
    assert (tmp_path / "run" / "run_class001.mrc").is_file()
    text = (tmp_path / "run" / "run_data.star").read_text()
    assert "_emsplatAngleUncertainty" in text
    assert "_rlnLogLikeliContribution" in text
    again = abinitio(replace(config, run=RunOptions(threads=1, resume=True)), star, tmp_path / "run")
    assert again["abinitio"] == summary["abinitio"]


@pytest.mark.slow
def test_noise_is_not_found_and_leaves_no_map(simulated, tmp_path):
    star = simulated(particles=240, noise_only=True)
    summary = abinitio(options(steps=12), star, tmp_path / "run")
    assert summary["abinitio"]["verdict"] == "not found"
    assert not list((tmp_path / "run").glob("*.mrc"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["abinitio"]["verdict"] == "not found"


@pytest.mark.slow
def test_starts_that_were_made_are_not_made_again(simulated, tmp_path, monkeypatch):
    monkeypatch.setattr("emsplat.poses.starts._LOOKS", 0)
    star = simulated(particles=240, noise_only=True)
    config = options(steps=2)
    abinitio(config, star, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr("emsplat.poses.starts.make_start", never)
    again = abinitio(replace(config, run=RunOptions(threads=1, resume=True)), star, tmp_path / "run")
    assert again["abinitio"]["starts"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choice": ChoiceOptions(first=60)}, r"images; a start from nothing needs at least 100"),
        ({"abinitio": AbinitioOptions(steps=1)}, r"--steps 1: expected at least 2"),
        ({"abinitio": AbinitioOptions(classes=0)}, r"--classes 0: expected at least 1"),
        ({"abinitio": AbinitioOptions(offset=0.0)}, r"--offset 0: expected a number above 0"),
        ({"run": RunOptions(add_statistics=("elsewhere",))}, r"--add-statistics"),
    ],
)
def test_what_cannot_be_started_from(simulated, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        abinitio(replace(options(), **change), simulated(particles=240, noise_only=True), tmp_path / "run")


def test_a_group_that_few_images_tell_is_said():
    """Too few cannot break the symmetry of a trimer with one arm raised."""
    assert _doubt(cyclic(3), 400).startswith("C3 was judged by 400 images of a half-set, too few")
    assert not _doubt(cyclic(3), 1000)
