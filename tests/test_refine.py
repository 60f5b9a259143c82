"""Poses of single images against direct sums; priors, searches; whole refinements, and what halves may share."""

import json
import math
from dataclasses import replace

import pytest
import torch
from gemmi import cif

import emsplat as em
from emsplat.assessment.maps import sphere
from emsplat.config import ComparePosesConfig, RefineConfig, SimulateConfig, configure
from emsplat.errors import InputError, Interrupted
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.frames import identity
from emsplat.heterogeneity.half import HalfModel
from emsplat.io.mrc import read_map, write_map
from emsplat.io.particles import read_particles, write_used
from emsplat.maths.fourier import irfft, rfft
from emsplat.maths.geometry import random_rotations, vector_to_matrix
from emsplat.maths.groups import C1, dihedral
from emsplat.measures.fsc import fsc_curve
from emsplat.models.decoder import Decoder, Shape
from emsplat.parallel import ALONE
from emsplat.particles.open import open_particles
from emsplat.poses import local
from emsplat.poses.local import (
    NO_PRIOR,
    Placed,
    PoseViews,
    Prior,
    Reference,
    descend,
    make_reference,
    nearest,
    noise_of,
    place,
    resized,
)
from emsplat.poses.optics import refine_optics
from emsplat.poses.prior import estimate_prior, turns
from emsplat.poses.search import ball_lattice, everywhere, poor, rotations, unlike, within
from emsplat.poses.tilt import PhaseSums, phase_likelihood, phase_sums, solve_tilt, tilted
from emsplat.programs import compare_poses
from emsplat.programs.pose_files import _uncertainty
from emsplat.programs.pose_round import Given, Refined, _placed
from emsplat.programs.pose_states import Target
from emsplat.programs.refine import refine
from emsplat.programs.simulate import simulate
from emsplat.report import write_report
from emsplat.run.files import half_model_name
from emsplat.run.log import Log
from emsplat.simulation.truth import read_truth
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import Spectra, frequencies_within, half_plane
from emsplat.sums.statistics import equations_of
from emsplat.types import Aberrations, Grid, Poses

RADIUS, LENGTH, IMAGES = 8, 96.0, 4
FREQUENCY, _ = half_plane(RADIUS, 1.0, 32)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=drawn(seed), dtype=dtype)


@pytest.fixture(scope="module")
def volume():
    """Eight cycles per box of something compact, on voxels that carry nine."""
    size = Lattice(RADIUS).size
    axis = (torch.arange(size) - size // 2) / size
    envelope = torch.exp(-(axis**2 + axis[:, None] ** 2 + axis[:, None, None] ** 2) / (2 * 0.15**2))
    noise = torch.randn(size, size, size, generator=drawn(0)) * envelope
    return irfft(resized(rfft(noise, 3), Lattice(RADIUS + 1).size), 3)


@pytest.fixture(scope="module")
def reference(volume):
    return Reference(Lattice(RADIUS + 1), volume, Grid(32, 3.0))


TRANSFER = normal(IMAGES, len(FREQUENCY), seed=3).float()
MAGNIFICATION = torch.eye(2) + 0.02 * normal(IMAGES, 2, 2, seed=4).float()
ROTATION = random_rotations(IMAGES, drawn(1))
SHIFT = 2 * normal(IMAGES, 2, seed=5)


def shown(volume, rotation, shift, image, magnification=MAGNIFICATION):
    """C P e of one image by direct sums in float64."""
    axis = (torch.arange(len(volume)) - len(volume) // 2).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], -1).reshape(-1, 3)
    k = FREQUENCY.double() @ magnification[image].double().T @ rotation[:2]
    slices = torch.exp(-2j * math.pi * (k @ points.T) / len(volume)) @ (volume.double().flatten() + 0j)
    return TRANSFER[image] * slices * torch.exp(2j * math.pi * (FREQUENCY.double() @ shift) / LENGTH)


def seen(values, rotation, given=None, move=None, magnification=MAGNIFICATION):
    """Views of images, as `descend` takes them."""
    count = len(rotation)
    image = torch.arange(count, dtype=torch.int32)
    spectra = Spectra(
        values.to(torch.complex64), TRANSFER, FREQUENCY, image, rotation.float(), torch.ones(count), image, LENGTH
    )
    none = torch.zeros(count, 2, dtype=torch.float64)
    return PoseViews(
        spectra,
        magnification,
        image,
        rotation,
        none if move is None else move,
        rotation if given is None else given,
        none,
        LENGTH,
    )


def test_likelihood_and_hessian_against_direct_sums(volume, reference):
    """With anisotropic magnification, and images off their centres; derivatives by differences."""
    values = 3 * torch.complex(normal(IMAGES, len(FREQUENCY), seed=6), normal(IMAGES, len(FREQUENCY), seed=7))
    found = descend(reference, seen(values, ROTATION, move=SHIFT), NO_PRIOR, RADIUS, steps=0)
    for image in range(IMAGES):
        model = shown(volume, ROTATION[image], SHIFT[image], image)
        power = model.abs().square().sum()
        gain = 2 * (values[image].conj() * model).real.sum() - power
        # The window errs by 2e-3 of the largest value.
        assert abs(found.before[image] - gain) < 4e-3 * power
        assert found.power[image] == pytest.approx(float(power), rel=4e-3)
        columns = []
        for axis in range(5):
            step = torch.zeros(5, dtype=torch.float64)
            step[axis] = 1e-4
            turn = vector_to_matrix(step[None, :3])[0]
            after = shown(volume, turn @ ROTATION[image], SHIFT[image] + step[3:], image)
            before = shown(volume, turn.T @ ROTATION[image], SHIFT[image] - step[3:], image)
            columns.append((after - before) / 2e-4)
        jacobian = torch.stack(columns)
        expected = (jacobian.conj() @ jacobian.T).real
        size = expected.diagonal().sqrt()
        # The derivative of the window errs more than the window.
        assert ((found.hessian[image] - expected) / size / size[:, None]).abs().max() < 0.04


def test_the_pose_of_a_clean_image_is_found(volume, reference):
    values = torch.stack([shown(volume, ROTATION[i], SHIFT[i], i) for i in range(IMAGES)])
    start = vector_to_matrix(0.1 * normal(IMAGES, 3, seed=8)) @ ROTATION
    found = descend(reference, seen(values, start), NO_PRIOR, RADIUS, steps=40)
    assert (found.poses.rotation - ROTATION).abs().max() < 1e-3
    assert (found.poses.shift - SHIFT).abs().max() < 1e-2
    identity = torch.eye(3, dtype=torch.float64)
    assert (found.poses.rotation @ found.poses.rotation.mT - identity).abs().max() < 1e-12


def test_derivatives_are_those_of_what_is_searched(volume, reference):
    """In a minimum the likelihood falls in every direction, by half of what the Hessian says: to second order."""
    values = torch.stack([shown(volume, ROTATION[i], SHIFT[i], i) for i in range(IMAGES)])
    found = descend(reference, seen(values, ROTATION, move=SHIFT), NO_PRIOR, RADIUS, steps=40)
    for axis in range(5):
        size = found.hessian[:, axis, axis].rsqrt()[:, None]
        step = torch.zeros(IMAGES, 5, dtype=torch.float64)
        step[:, axis] = 1
        falls = []
        for sign in (1, -1):
            moved = sign * size * step
            views = seen(
                values, vector_to_matrix(moved[:, :3]) @ found.poses.rotation, move=found.poses.shift + moved[:, 3:]
            )
            falls.append(found.after - descend(reference, views, NO_PRIOR, RADIUS, steps=0).before)
        for fall in falls:
            assert ((fall - 1).abs() < 0.15).all()


def test_a_prior_holds_poses_where_they_were_given(volume, reference):
    values = torch.stack([shown(volume, ROTATION[i], SHIFT[i], i) for i in range(IMAGES)])
    given = vector_to_matrix(torch.full((IMAGES, 3), 0.05, dtype=torch.float64)) @ ROTATION
    free, held, firm = (
        descend(reference, seen(values, given), prior, RADIUS, steps=30)
        for prior in (NO_PRIOR, Prior(0.002, 0.05), Prior(1e-5, 1e-4))
    )
    way = [torch.linalg.vector_norm(turns(one.poses.rotation, given), dim=1) for one in (free, held, firm)]
    assert (way[0] > way[1]).all()
    assert (way[1] > way[2]).all()
    assert way[2].max() < 1e-3
    assert firm.poses.shift.abs().max() < 1e-2
    covariance = torch.diagonal(held.covariance(Prior(0.002, 0.05)), dim1=1, dim2=2)
    assert (covariance[:, :3] < 0.002**2).all()
    assert (covariance[:, 3:] < 0.05**2).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_poses_do_not_depend_on_threads(volume, reference, threads):
    values = torch.stack([shown(volume, ROTATION[i], SHIFT[i], i) for i in range(IMAGES)])
    expected = descend(reference, seen(values, ROTATION), NO_PRIOR, RADIUS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = descend(reference, seen(values, ROTATION), NO_PRIOR, RADIUS)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.poses.rotation, expected.poses.rotation)


def planted(count, turn, shift, seed):
    """What images of known Hessians say of poses that are off by known widths."""
    given = random_rotations(count, drawn(seed))
    root = normal(count, 5, 5, seed=seed + 1) * torch.tensor([30.0, 30, 30, 0.5, 0.5]).double()
    hessian = root.mT @ root + torch.diag(torch.tensor([400.0, 400, 400, 0.2, 0.2]).double())
    true = torch.cat([turn * normal(count, 3, seed=seed + 2), shift * normal(count, 2, seed=seed + 3)], 1)
    noise = torch.linalg.cholesky(torch.linalg.inv(2 * hessian)) @ normal(count, 5, 1, seed=seed + 4)
    found = true + noise[..., 0]
    nothing = torch.zeros(count, dtype=torch.float64)
    poses = Poses(vector_to_matrix(found[:, :3]) @ given, found[:, 3:])
    placed = Placed(poses, hessian, nothing, nothing, nothing, nothing.long(), nothing)
    return placed, Poses(given, torch.zeros(count, 2, dtype=torch.float64))


@pytest.mark.parametrize(("turn", "shift"), [(0.05, 2.0), (0.02, 0.7)])
def test_the_errors_of_poses_are_estimated(turn, shift):
    prior = estimate_prior(*planted(600, turn, shift, 10))
    assert prior.shift == pytest.approx(shift, rel=0.1)


def test_errors_of_poses_below_the_noise_of_single_images():
    """Images that noise takes far away count as well, and it goes on while there is something to be gained."""
    prior = estimate_prior(*planted(4000, 0.004, 0.15, 10))
    assert prior.turn == pytest.approx(0.004, rel=0.3)
    assert prior.shift == pytest.approx(0.15, rel=0.3)
    none = estimate_prior(*planted(4000, 0.0, 0.0, 10))
    assert none.turn < 0.002
    assert none.shift < 0.12


def test_images_that_were_found_elsewhere_do_not_widen_the_prior():
    placed, given = planted(600, 0.03, 1.0, 20)
    rotation = placed.poses.rotation.clone()
    rotation[:60] = random_rotations(60, drawn(21))
    prior = estimate_prior(replace(placed, poses=Poses(rotation, placed.poses.shift)), given)
    assert prior.turn == pytest.approx(0.03, rel=0.1)


def test_starts_cover_what_is_searched():
    starts = ball_lattice(0.5, 0.2)
    assert (starts[0] == 0).all()
    anywhere = normal(500, 3, seed=1)
    anywhere = 0.5 * anywhere / torch.linalg.vector_norm(anywhere, dim=1, keepdim=True)
    anywhere *= torch.rand(500, 1, generator=drawn(2), dtype=torch.float64) ** (1 / 3)
    assert torch.cdist(anywhere, starts).min(1).values.max() < 0.2 * math.sqrt(3)


def test_orientations_cover_the_group_evenly():
    grid = rotations(0.3)
    anywhere = random_rotations(300, drawn(3))
    trace = torch.einsum("aij,bij->ab", anywhere, grid).max(1).values
    furthest = torch.arccos(((trace - 1) / 2).clamp(max=1)).max()
    assert furthest < 0.3
    rest = unlike(grid, dihedral(2).elements)
    assert len(rest) == pytest.approx(len(grid) / 4, rel=0.1)
    every = (rest[:, None] @ dihedral(2).elements).flatten(0, 1)
    trace = torch.einsum("aij,bij->ab", anywhere, every).max(1).values
    assert torch.arccos(((trace - 1) / 2).clamp(max=1)).max() < 0.3


def test_low_frequencies_lead_to_the_same_pose_and_never_to_a_worse_one(volume, reference, monkeypatch):
    """From 3° the end is the same with half of the frequencies first, and `before` that of the start. Where they lead
    astray (here they are told to) the way is that of all frequencies."""
    values = torch.stack([shown(volume, ROTATION[i], SHIFT[i], i) for i in range(IMAGES)])
    views = seen(values, vector_to_matrix(0.05 * normal(IMAGES, 3, seed=8)) @ ROTATION)
    expected = nearest(reference, views, NO_PRIOR)
    monkeypatch.setattr(local, "_MANY", 1)
    led = nearest(reference, views, NO_PRIOR)
    assert (led.poses.rotation - expected.poses.rotation).abs().max() < 1e-3
    torch.testing.assert_close(led.before, expected.before)
    torch.testing.assert_close(led.after, expected.after, rtol=1e-4, atol=0.1)
    own = local.descend

    def astray(reference, views, prior, radius, steps=40):
        found = own(reference, views, prior, radius, steps)
        if radius < reference.lattice.radius:
            found.poses.rotation[0] = ROTATION[0].T
        return found

    monkeypatch.setattr(local, "descend", astray)
    kept = nearest(reference, views, NO_PRIOR)
    assert (kept.poses.rotation - expected.poses.rotation).abs().max() < 1e-3
    assert (kept.looks > expected.looks).all()
    for some in (replace(views, given=ROTATION), replace(views, given=torch.cat([ROTATION[:2], views.given[2:]]))):
        searched = nearest(reference, some, NO_PRIOR)  # who was placed before is not led
        torch.testing.assert_close(searched.after, expected.after, rtol=1e-4, atol=0.1)
    well = Prior(0.1, 1.0)  # nor who is known well
    assert torch.equal(nearest(reference, views, well).looks, own(reference, views, well, RADIUS + 1).looks)


def test_poses_far_away_are_searched_for(volume, reference):
    values = torch.stack([shown(volume, ROTATION[i], 0 * SHIFT[i], i) for i in range(IMAGES)])
    start = (
        vector_to_matrix(torch.tensor([[0.5, 0, 0], [0, -0.5, 0.1], [0.3, 0.3, 0.3], [0, 0, 0.55]]).double()) @ ROTATION
    )
    views = seen(values, start)
    away = [
        torch.linalg.vector_norm(turns(search(reference, views, NO_PRIOR).poses.rotation, ROTATION), dim=1)
        for search in (nearest, within(0.6), everywhere(C1.elements))
    ]
    assert away[0].max() > 0.1
    assert away[1].max() < 0.01
    assert away[2].max() < 0.01
    known = nearest(reference, seen(values, torch.cat([ROTATION[:3], start[3:]])), Prior(1e-4, 1e-3))
    assert poor(known).tolist() == [3]


# Whole refinements


@pytest.fixture
def wrong(simulated):
    """Particles in poses that are off by known widths, in a file of their own, and the true ones."""

    def give(turn, shift, particles=400, **settings):
        star = simulated(particles=particles, **settings)
        stack = open_particles(star)
        poses = stack.table.poses
        moved = Poses(
            vector_to_matrix(math.radians(turn) * normal(particles, 3, seed=1)) @ poses.rotation,
            poses.shift + shift * normal(particles, 2, seed=2),
        )
        write_used(stack.with_poses(moved).table, star.parent / "wrong.star", stack.table.half)
        return star.parent / "wrong.star", star

    return give


def compare(first, second):
    return compare_poses.compare(first, second, ComparePosesConfig())


def run(star, folder, **options):
    config = configure(RefineConfig, **{"rounds": 2, "epochs": 3, "growth": 0, "gaussians": 300, **options})
    return refine(config, star, folder, Log((folder.parent / "said.txt").open("a")))


def test_refinement_brings_poses_back(wrong, tmp_path):
    star, true = wrong(4.0, 3.0)
    summary = run(star, tmp_path / "run")
    before, after = compare(true, star), compare(true, tmp_path / "run" / "run_data.star")
    assert after["median"] < 0.5 * before["median"]
    assert after["shift_median"] < 0.5 * before["shift_median"]
    found = summary["refinement"]
    assert found["rounds"][0]["angle_error"] == pytest.approx([4.0, 4.0], rel=0.25)
    assert found["rounds"][0]["shift_error"] == pytest.approx([3.0, 3.0], rel=0.25)
    truth, grid = read_map(star.parent / "truth.mrc")
    refined, _ = read_map(tmp_path / "run" / "run_class001.mrc")
    score = fsc_curve(refined, truth, grid).value[1:12].mean()
    stack = open_particles(star)
    assert score > fsc_curve(equations_of(stack).solve(), truth, grid).value[1:12].mean() + 0.05


def test_what_is_written_of_poses(wrong, tmp_path):
    star, _ = wrong(3.0, 2.0, particles=200)
    run(star, tmp_path / "run", rounds=1)
    before, after = (read_particles(path) for path in (star, tmp_path / "run" / "run_data.star"))
    text = (tmp_path / "run" / "run_data.star").read_text()
    for name in ("_rlnLogLikeliContribution", "_emsplatAngleUncertainty", "_emsplatOriginUncertainty"):
        assert name in text
    assert torch.equal(before.image, after.image)
    assert torch.equal(before.half, after.half)
    assert torch.allclose(before.optics.defocus_u, after.optics.defocus_u)
    assert (before.poses.rotation - after.poses.rotation).abs().max() > 0.01


def test_true_poses_stay(simulated, tmp_path):
    star = simulated(particles=400)
    run(star, tmp_path / "run")
    after = compare(star, tmp_path / "run" / "run_data.star")
    assert after["median"] < 1.0
    assert after["shift_median"] < 0.5


@pytest.mark.slow
def test_an_interrupted_refinement_goes_on(wrong, tmp_path, monkeypatch):
    star, _ = wrong(4.0, 3.0, particles=200)
    whole = run(star, tmp_path / "whole")

    def stop(*_):
        raise Interrupted("stopped", 2)

    with monkeypatch.context() as patched:
        patched.setattr("emsplat.programs.refine.fit_volumes", stop)
        with pytest.raises(Interrupted):
            run(star, tmp_path / "run")
    resumed = run(star, tmp_path / "run", resume=True)
    assert resumed["refinement"] == whole["refinement"]
    assert "resuming after round" in (tmp_path / "run" / "run.log").read_text()


@pytest.fixture
def aligned_noise(simulated, tmp_path):
    """Images of noise alone in the poses in which each looks most like one map of low resolution, and that resolution:
    the half-sets share the map, and nothing else is there."""
    star = simulated(particles=600, noise_only=True, seed=9)
    truth, grid = read_map(simulated(particles=60, snr=1.0).parent / "truth.mrc")
    stack = open_particles(star)
    shared = 6
    reference = make_reference(truth / truth.std(), grid, shared)
    poses = stack.table.poses
    found = place(reference, stack, poses, NO_PRIOR, noise_of(stack), everywhere(C1.elements))
    write_used(stack.with_poses(found.poses).table, tmp_path / "noise.star", stack.table.half)
    return tmp_path / "noise.star", grid.length / shared


@pytest.mark.slow
def test_noise_aligned_to_one_map_gives_no_resolution(aligned_noise, tmp_path):
    """The half maps agree within the band that their poses share, and only there: it must not count."""
    star, shared = aligned_noise
    stack = open_particles(star)
    halves = [equations_of(stack.only(half)).solve() for half in (1, 2)]
    # Not the rim, where normalised images of anything bright have an edge.
    agreement = fsc_curve(*halves, stack.grid, sphere(stack.grid, stack.diameter)).value
    assert agreement[2:6].mean() > 0.5
    assert agreement[9:].mean() < 0.1
    told = run(star, tmp_path / "told", shared_to=shared)
    assert told["evident"] is False
    assert all(value is None for value in told["resolution"].values())
    assert told["refinement"]["shared_shell"] == 8
    # Without the word the same maps would have one, so the test could fail.
    untold = run(star, tmp_path / "untold")
    assert untold["evident"] is True
    assert json.loads((tmp_path / "told" / "summary.json").read_text())["refinement"]["shared_to"] == shared


def test_noise_alone_has_nothing_to_refine_against(simulated, tmp_path):
    star = simulated(particles=200, noise_only=True)
    summary = run(star, tmp_path / "run")
    assert summary["refinement"]["rounds"] == []
    assert any("emsplat abinitio" in text for text in summary["warnings"])
    assert compare(star, tmp_path / "run" / "run_data.star")["p90"] < 1e-3


def test_a_mask_beside_the_particle_shows_nothing_to_refine_against(wrong, tmp_path):
    """As far as the halves go, which do not agree in it: not to the end of the pixels."""
    star, _ = wrong(3.0, 2.0, particles=120)
    away = (torch.arange(32) - 29).square()
    distance = (away + away[:, None] + away[:, None, None]).sqrt()
    write_map(tmp_path / "mask.mrc", (3 - distance).clamp(0, 1), 4.0)
    summary = run(star, tmp_path / "run", mask=tmp_path / "mask.mrc")
    assert summary["refinement"]["rounds"] == []
    assert any("in the mask, which may lie beside" in text for text in summary["warnings"])


@pytest.mark.slow
def test_poses_without_half_sets_are_said(simulated, tmp_path):
    star = simulated(particles=200, half_sets=False)
    summary = run(star, tmp_path / "run", rounds=1)
    assert summary["refinement"]["half_sets_known_to_poses"] is False
    assert any("--shared-to" in text for text in summary["warnings"])


def test_poses_that_are_not_there(simulated, tmp_path):
    star = simulated(particles=60)
    stack = open_particles(star)
    same = Poses(torch.eye(3).double().repeat(60, 1, 1), stack.table.poses.shift)
    write_used(stack.with_poses(same).table, star.parent / "same.star", stack.table.half)
    with pytest.raises(InputError, match="emsplat abinitio"):
        run(star.parent / "same.star", tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0},
        {"search": "wide"},
        {"search": "-3"},
        {"refine": "poses,colour"},
        {"angle_error": -1.0},
        {"shared_to": 0.0},
        {"engine": "images"},
        {"refine": "scale", "search": "global"},
    ],
)
def test_options_that_mean_nothing(simulated, tmp_path, options):
    star = simulated(particles=60)
    with pytest.raises(InputError):
        run(star, tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("column", "refine", "refused"),
    [
        ("ArePhaseFlipped", "poses,defocus", True),
        ("AreCtfPremultiplied", "defocus", True),
        ("AreCtfPremultiplied", "poses,scale", True),
        ("ArePhaseFlipped", "scale", False),  # |C| times a factor is still |C|
        ("AreCtfPremultiplied", "poses,tilt", False),
    ],
)
def test_the_ctf_of_treated_images_is_not_refined(simulated, tmp_path, monkeypatch, column, refine, refused):
    star = simulated(particles=60)
    document = cif.read_file(str(star))
    document.find_block("optics").find_loop(f"_rlnCtfData{column}")[0] = "1"
    document.write_file(str(star))

    def stop(*_):
        raise Interrupted("stopped", 2)

    monkeypatch.setattr("emsplat.programs.refine._rounds", stop)
    with pytest.raises(InputError if refused else Interrupted, match="expected raw images" if refused else "stopped"):
        run(star, tmp_path / "run", refine=refine)


def test_refinement_in_python(wrong, tmp_path):
    star, _ = wrong(3.0, 2.0, particles=120)
    found = em.refine(star, tmp_path / "run", rounds=1, epochs=2, growth=0, gaussians=200, threads=1)
    assert found.summary["refinement"]["moved"] is True
    with pytest.raises(InputError, match="no such option"):
        em.refine(star, tmp_path / "other", round=1)


@pytest.mark.slow
def test_only_particles_that_were_asked_for_are_refined_and_written(wrong, tmp_path):
    star, _ = wrong(3.0, 2.0, particles=300)
    run(star, tmp_path / "run", rounds=1, first=200)
    before, after = (read_particles(path) for path in (star, tmp_path / "run" / "run_data.star"))
    assert torch.equal(before.image[:200], after.image)
    assert len((tmp_path / "run" / "poses.csv").read_text().splitlines()) == 201


def test_particles_of_several_boxes(wrong, tmp_path):
    """One set on two grids: each is compared on its own, in its own grey values, which are no factors of particles."""
    sets = [wrong(4.0, 3.0, particles=200), wrong(4.0, 3.0, particles=150, box=48, pixel_size=8 / 3, seed=4)]
    (star, _), (other, _) = sets
    summary = run(star, tmp_path / "run", merge=(other,), rounds=1, refine="poses,scale")
    after = read_particles(tmp_path / "run" / "run_data.star")
    for number, (own, true) in enumerate(sets):
        found = after.poses[after.optics_group == number].rotation
        given, known = (read_particles(path).poses.rotation for path in (own, true))
        error = [turns(one, known).square().mean().sqrt() for one in (found, given)]
        assert error[0] < 0.65 * error[1]
        assert after.optics.scale[after.optics_group == number].log().mean() == pytest.approx(0, abs=1e-3)
    assert summary["refinement"]["moved"] is True


# States


def atoms(path, places):
    """Carbon atoms of one chain."""
    lines = [
        f"ATOM  {i + 1:5d}  CA  ALA A{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           C\n"
        for i, (x, y, z) in enumerate(places.tolist())
    ]
    path.write_text("".join(lines) + "END\n")
    return path


@pytest.fixture
def moving(tmp_path):
    """Particles with an arm in one of two places, in poses that are off; their true poses; and the folder of a run that
    knows the states."""
    body, arm = 9 * normal(300, 3, seed=40), 7 * normal(200, 3, seed=41) + torch.tensor([0.0, 0.0, 32.0])
    turn = vector_to_matrix(torch.tensor([[1.4, 0.0, 0.0]], dtype=torch.float64))[0]
    models = [atoms(tmp_path / f"{n}.pdb", torch.cat([body, own])) for n, own in enumerate((arm, arm @ turn.T))]
    known = {"box": 32, "pixel_size": 4.0, "snr": 0.5, "seed": 3, "particles": 500, "states": tuple(models)}
    true = simulate(configure(SimulateConfig, **known), None, tmp_path / "particles")
    labels = read_truth(tmp_path / "particles" / "truth").state
    stack = open_particles(true)
    poses = stack.table.poses
    error = math.radians(6) * normal(500, 3, seed=1)
    moved = Poses(vector_to_matrix(error) @ poses.rotation, poses.shift + 3 * normal(500, 2, seed=2))
    star = true.parent / "wrong.star"
    write_used(stack.with_poses(moved).table, star, stack.table.half)
    folder = tmp_path / "states"
    folder.mkdir()
    maps = torch.stack([read_map(true.parent / "truth" / f"{n:03d}.mrc")[0] for n in (0, 1)])
    point = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for half in (1, 2):
        faint = Decoder(
            torch.zeros(8, 3), torch.full((8,), 4.0), torch.full((8,), 1e-6), Shape(1, 1), generator=drawn(6)
        )
        density = Density(point, torch.tensor([0.5, 0.5]).double())
        own = HalfModel(faint, density, torch.eye(1).double() * 50, maps, stack.grid, stack.grid, identity(1))
        own.save(folder / half_model_name(half))
    rows = [f"{row + 1},{stack.table.half[row]},{2 * int(labels[row]) - 1}" for row in range(500)]
    (folder / "latents.csv").write_text("\n".join(["row,half,z1", *rows]) + "\n")
    return star, true, folder


@pytest.mark.slow
def test_motion_is_not_mistaken_for_wrong_poses(moving, tmp_path):
    """Against maps of their own states particles come nearer to their true poses than against one map of all."""
    star, true, folder = moving
    summary = run(star, tmp_path / "own", states=folder)
    run(star, tmp_path / "one", rounds=1)
    given = compare(true, star)
    own, one = (compare(true, tmp_path / name / "run_data.star") for name in ("own", "one"))
    assert own["median"] < 0.8 * one["median"]
    assert own["median"] < 0.5 * given["median"]
    assert own["shift_median"] < one["shift_median"]
    assert len(summary["refinement"]["rounds"]) == 1


def test_states_of_other_particles(moving, tmp_path):
    star, _, folder = moving
    with pytest.raises(InputError, match="with --states poses and tilt"):
        run(star, tmp_path / "optics", states=folder, refine="poses,defocus")
    text = (folder / "latents.csv").read_text()
    (folder / "latents.csv").write_text(text.replace("\n1,1,", "\n1,2,").replace("\n1,2,", "\n1,1,"))
    lines = text.splitlines()
    (folder / "latents.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="1 particles are not in it"):
        run(star, tmp_path / "run", states=folder)
    first = lines[1].split(",")
    lines[1] = ",".join([first[0], str(3 - int(first[1])), first[2]])
    (folder / "latents.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="half-sets are others"):
        run(star, tmp_path / "other", states=folder)


# Optics


def test_defocus_and_grey_scale_of_each_particle(simulated):
    """Particles whose table is wrong about them, against the true map: a map of two micrographs has the zeros of its
    contrast transfer functions in it."""
    star = simulated(particles=200, box=48, pixel_size=3.0, snr=2.0, b_factor=20.0)
    stack = open_particles(star)
    optics = stack.table.optics
    off = [size * normal(200, seed=30 + n) for n, size in enumerate((400.0, 0.3, 40.0))]
    told = replace(
        optics,
        defocus_u=optics.defocus_u + off[0],
        defocus_v=optics.defocus_v + off[0],
        scale=optics.scale * off[1].exp(),
        b_factor=optics.b_factor + off[2],
    )
    truth, grid = read_map(star.parent / "truth.mrc")
    reference = make_reference(equations_of(stack).gain(truth) * truth, grid, 20)
    wrong = stack.with_optics(told)
    found, spread = refine_optics(reference, wrong, noise_of(wrong), defocus=True, strength=True)
    assert (found.defocus_u - optics.defocus_u).std() < 0.4 * off[0].std()
    assert (found.scale / optics.scale).log().std() < 0.5 * off[1].std()
    assert (found.b_factor - optics.b_factor).std() < 0.8 * off[2].std()
    assert torch.allclose(found.defocus_u - found.defocus_v, optics.defocus_u - optics.defocus_v)
    assert spread.defocus == pytest.approx(400, rel=0.25)
    assert spread.scale == pytest.approx(0.3, rel=0.35)
    alone, _ = refine_optics(reference, wrong, noise_of(wrong), defocus=True, strength=False)
    assert torch.equal(alone.scale, told.scale)


def test_the_likelihood_of_a_beam_tilt_has_its_own_derivatives():
    cross = torch.complex(normal(50, seed=1), normal(50, seed=2))
    sums = [PhaseSums(normal(4, 50, seed=3), cross), PhaseSums(normal(4, 50, seed=4), cross.conj())]
    values = (0.3 * normal(4, seed=5)).requires_grad_()
    direct = sum(2 * (own.cross * torch.exp(1j * (values @ own.basis))).real.sum() for own in sums)
    found, slope, curve = phase_likelihood(sums, values.detach())
    assert float(found) == pytest.approx(float(direct.detach()), rel=1e-12)
    (first,) = torch.autograd.grad(direct, values, create_graph=True)
    assert torch.allclose(slope, first.detach(), rtol=1e-10)
    second = torch.stack([torch.autograd.grad(part, values, retain_graph=True)[0] for part in first])
    assert torch.allclose(curve, -second, rtol=1e-10)


def test_a_wrong_beam_tilt_is_found(simulated):
    """The table says a tilt that the images have not."""
    star = simulated(particles=200, box=48, pixel_size=3.0, snr=2.0)
    stack = open_particles(star)
    truth, grid = read_map(star.parent / "truth.mrc")
    reference = make_reference(equations_of(stack).gain(truth) * truth, grid, 22)
    said = torch.tensor([2.0, -1.2], dtype=torch.float64)
    wrong = stack.with_aberrations(tilted(stack.table.optics, said.expand(200, 2)))
    moved = wrong.with_poses(Poses(stack.table.poses.rotation, stack.table.poses.shift + 0.5))
    for known, move in ((wrong, 0.0), (moved, -0.5)):
        ((group, sums),) = phase_sums(reference, known, noise_of(known)).items()
        found = solve_tilt(sums)
        assert group == 0
        assert bool((found.error < 0.2).all())
        assert bool(((found.tilt + said).abs() < 4 * found.error).all())
        assert found.move.tolist() == pytest.approx([move, move], abs=0.1)
    twice = wrong.take(torch.arange(200).repeat(2))
    (sums,) = phase_sums(reference, twice, noise_of(twice))[0]
    assert torch.allclose(solve_tilt([sums]).error, found.error, rtol=0.02)  # copies of an image are no further ones
    # Nor are those that are compared with the map of another state.
    (whole,), (part,) = (phase_sums(reference, wrong, noise_of(wrong), among=those)[0] for those in (None, twice))
    assert torch.allclose(2 * part.cross, whole.cross)
    again = wrong.with_aberrations(tilted(wrong.table.optics, found.tilt.expand(200, 2)))
    left = solve_tilt(phase_sums(reference, again, noise_of(again))[0])
    assert bool((left.tilt.abs() < 0.02).all())


def test_distorted_images_are_compared_within_the_reference(simulated):
    """Anisotropic magnification carries frequencies of an image beyond those that the map is cut at, of some images
    only: all are compared up to the same."""
    stack = open_particles(simulated(particles=60, snr=2.0))
    magnification = torch.eye(2).double().repeat(60, 1, 1)
    magnification[30:] = torch.tensor([[1.1, 0.05], [-0.05, 0.9]]).double()
    none = torch.zeros(60, 0).double()
    bent = stack.with_aberrations(Aberrations(magnification, none, none))
    truth, grid = read_map(stack.table.sources[0].parent / "truth.mrc")
    reference, noise = make_reference(equations_of(stack).gain(truth) * truth, grid, 14), noise_of(bent)
    within = [frequencies_within(14, some, grid)[0] for some in (stack, bent, bent.take(torch.arange(30)))]
    assert torch.equal(within[1], within[2])
    furthest = [torch.linalg.vector_norm(frequency, dim=1).max() for frequency in within]
    assert furthest[0] == pytest.approx(14, abs=0.1)
    assert furthest[1] == pytest.approx(14 / 1.1, abs=0.3)
    found = place(reference, bent, bent.table.poses, NO_PRIOR, noise)
    away = torch.linalg.vector_norm(turns(found.poses.rotation, bent.table.poses.rotation), dim=1)
    assert away[:30].median() < math.radians(3)
    ((_, (sums,)),) = phase_sums(reference, bent, noise).items()
    assert len(sums.cross) == len(within[1])
    refine_optics(reference, bent, noise, defocus=True, strength=True)


@pytest.mark.slow
def test_the_beam_tilt_that_is_refined_is_written(simulated, tmp_path):
    star = simulated(particles=300, snr=2.0)
    stack = open_particles(star)
    wrong = stack.with_aberrations(tilted(stack.table.optics, torch.tensor([8.0, 0.0]).expand(300, 2)))
    write_used(wrong.table, star.parent / "wrong.star", stack.table.half)
    given = read_particles(star.parent / "wrong.star").optics.aberrations
    assert torch.allclose(given.odd, wrong.table.optics.aberrations.odd, rtol=1e-6)
    summary = run(star.parent / "wrong.star", tmp_path / "run", refine="poses,tilt", rounds=1)
    ((x, _, *errors),) = summary["refinement"]["rounds"][0]["beam_tilt"].values()
    assert x < -3 * errors[0]
    after = read_particles(tmp_path / "run" / "run_data.star").optics.aberrations
    assert float(after.odd.square().sum()) < 0.5 * float(given.odd.square().sum())


def test_a_tilt_is_written_so_that_every_relion_reads_it(simulated, tmp_path):
    """RELION 3.1 puts the coma of rlnBeamTilt in the place of that in rlnOddZernike, RELION 5 adds it: there must be
    none in the polynomials."""
    star = simulated(particles=20)
    document = cif.read_file(str(star))
    optics = document.find_block("optics").find_loop("_rlnOpticsGroup").get_loop()
    optics.add_columns(["_rlnBeamTiltX", "_rlnBeamTiltY"], "0.8")
    document.write_file(str(star))
    table = read_particles(star)
    turned = open_particles(star).with_aberrations(tilted(table.optics, torch.tensor([3.0, -2.0]).expand(20, 2))).table
    write_used(turned, tmp_path / "new.star", None)
    written = cif.read_file(str(tmp_path / "new.star")).find_block("optics")
    odd = [float(v) for v in written.find_values("_rlnOddZernike")[0].strip("'\"[]").split(",")]
    assert odd[3:5] == [0, 0]
    tilt = [float(written.find_values(f"_rlnBeamTilt{axis}")[0]) for axis in "XY"]
    assert tilt == pytest.approx([3.8, -1.2], abs=1e-5)
    again = read_particles(tmp_path / "new.star").optics.aberrations
    assert torch.allclose(again.odd, turned.optics.aberrations.odd, rtol=1e-5, atol=1e-3)


def test_the_defocus_that_is_refined_is_written(wrong, tmp_path):
    """Poses that stay tell nothing of their errors, and have no prior: their uncertainty is what the images say."""
    star, _ = wrong(4.0, 3.0, particles=200)
    summary = run(star, tmp_path / "run", refine="defocus,scale", rounds=1)
    (done,) = summary["refinement"]["rounds"]
    assert done["angle_error"] is None
    assert done["shift_error"] is None
    assert "given poses are off" not in (tmp_path / "run" / "run.log").read_text()
    assert summary["refinement"]["angle_uncertainty"]["median"] > 1.0
    before, after = (read_particles(path) for path in (star, tmp_path / "run" / "run_data.star"))
    assert (before.optics.defocus_u - after.optics.defocus_u).abs().max() > 1
    assert (after.optics.scale - 1).abs().max() > 1e-3
    assert torch.allclose(before.poses.rotation, after.poses.rotation, atol=1e-5)


@pytest.mark.slow
@pytest.mark.report
def test_the_page_shows_the_poses(wrong, tmp_path):
    star, _ = wrong(3.0, 2.0, particles=200)
    run(star, tmp_path / "run", rounds=1, shared_to=40.0)
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="poses"' in page
    assert "Poses before and after the refinement" in page
    assert "The half-sets share shells up to" in page
    assert (tmp_path / "run" / "poses.png").is_file()
    (tmp_path / "run" / "poses.csv").write_text("rot\n")
    write_report(tmp_path / "run")
    assert "poses.csv" in (tmp_path / "run" / "report.html").read_text()


def test_which_particles_are_poor_is_said_of_all(simulated, monkeypatch):
    """Lost ones stand side by side, most of those that are looked at together."""
    stack = open_particles(simulated(particles=60, snr=2.0))
    truth, grid = read_map(stack.table.sources[0].parent / "truth.mrc")
    fine = (torch.arange(17) > 3).float()  # what all views show says nothing of them
    reference = make_reference(equations_of(stack).gain(truth) * truth, grid, 12, fine)
    true = stack.table.poses
    lost = stack.with_poses(Poses(torch.cat([random_rotations(9, drawn(1)), true.rotation[9:]]), true.shift))
    found = []
    for chunk in (512, 10):
        monkeypatch.setattr("emsplat.poses.local._CHUNK", chunk)
        target, prior, far = Target(reference, torch.arange(60)), Prior(math.radians(2), 2.0), everywhere(C1.elements)
        own = _placed([target], lost, Given.all_of(lost.table.poses), prior, noise_of(lost), nearest, far, ALONE)
        found.append(torch.linalg.vector_norm(turns(own.poses.rotation, true.rotation), dim=1))
    assert (found[0][:9] < math.radians(15)).sum() >= 5
    torch.testing.assert_close(found[1], found[0])


def test_what_was_found_far_away_is_held_to_nothing(simulated):
    """Neither where it is looked for nor in what is said of it; its gain is over the pose that was given."""
    stack = open_particles(simulated(particles=60, snr=2.0)).with_halves(0)
    truth, grid = read_map(stack.table.sources[0].parent / "truth.mrc")
    reference = make_reference(equations_of(stack).gain(truth) * truth, grid, 12)
    true, lost = stack.table.poses, torch.arange(60) < 9
    wrong = Poses(torch.cat([random_rotations(9, drawn(1)), true.rotation[9:]]), true.shift)
    prior, targets = Prior(math.radians(0.5), 0.5), [Target(reference, torch.arange(60))]
    placed = _placed(targets, stack, Given(wrong, lost), prior, noise_of(stack), nearest, None, ALONE)
    free = place(reference, stack, true, NO_PRIOR, noise_of(stack))
    torch.testing.assert_close(placed.poses.rotation[:9], free.poses.rotation[:9])
    assert (placed.after - placed.given)[:9].median() > 20
    turn, _ = _uncertainty(Refined(stack, placed, (prior, prior), Given(wrong, lost)))
    assert turn[9:].max() < 0.5
    torch.testing.assert_close(turn[:9], free.uncertainty(NO_PRIOR, grid.length)[0][:9], rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("search", ["50", "poor", "global"])
def test_poses_that_are_far_off_are_searched_for(wrong, tmp_path, search):
    """One in ten is nowhere near; local steps leave them there."""
    star, true = wrong(2.0, 2.0, particles=300, snr=1.0)
    stack = open_particles(star)
    poses = stack.table.poses
    axis = normal(300, 3, seed=5)
    far = vector_to_matrix(
        math.radians(45 if search == "50" else 110) * axis / torch.linalg.vector_norm(axis, dim=1)[:, None]
    )
    rotation = poses.rotation.clone()
    rotation[::10] = (far @ rotation)[::10]
    lost = star.parent / "lost.star"
    write_used(stack.with_poses(Poses(rotation, poses.shift)).table, lost, stack.table.half)
    run(lost, tmp_path / "local")
    run(lost, tmp_path / "run", search=search)
    away = [compare(true, folder / "run_data.star")["within_10"] for folder in (tmp_path / "local", tmp_path / "run")]
    assert away[1] > 0.93
    assert away[0] < away[1] - 0.02
