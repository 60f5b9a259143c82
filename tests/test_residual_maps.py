"""Residual maps: what Gaussians leave is found where there is something, and nothing is made of noise."""

import pytest
import torch

from emsplat.cli import main
from emsplat.config import ReconstructConfig, change, configure
from emsplat.errors import InputError
from emsplat.fitting.residual import map_of, residual_maps
from emsplat.fitting.volume import VolumeObjective
from emsplat.imaging.project import voxelize
from emsplat.io.mrc import read_map, write_map
from emsplat.io.ply import read_ply
from emsplat.maths.fourier import middle, rfft, shell_index
from emsplat.measures.fsc import fsc, fsc_curve
from emsplat.measures.mask import spherical_mask
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import from_map
from emsplat.particles.open import open_particles
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.settings import settings_of
from emsplat.sums.equations import mean_per_shell
from emsplat.sums.statistics import equations_of

FEW = configure(ReconstructConfig, epochs=4, gaussians=60)


@pytest.fixture(scope="module")
def good(simulated):
    """Images that show more than 60 Gaussians can."""
    return simulated(particles=800, snr=1.0)


def fitted(star, count):
    """Objectives of both halves and of all, and for each a model that has learned something of its map."""
    stack = open_particles(star)
    equations = {f"half{half}": equations_of(stack.only(half)) for half in (1, 2)}
    equations["class001"] = equations["half1"] + equations["half2"]
    objectives = {name: VolumeObjective(own, 24) for name, own in equations.items()}
    models = {}
    for name, own in equations.items():
        bounds = Bounds(10 * stack.grid.pixel_size, 1.0, 0.7 * stack.grid.pixel_size)
        model = from_map(own.solve(), stack.grid, count, bounds, 0, support=24)
        models[name] = model.with_unit(objectives[name].best_gain(model))
    return stack.grid, objectives, models


def test_half_maps_and_map_come_nearer_to_the_truth(good):
    grid, objectives, models = fitted(good, 60)
    mask = spherical_mask(grid, 80.0, 12.0)
    found = residual_maps(objectives, models, mask, 12.0)
    truth, _ = read_map(good.parent / "truth.mrc")
    for name, model in models.items():
        gaussians = model.gaussians()
        before = fsc_curve(voxelize(gaussians, grid), truth, grid, mask).value
        after = fsc_curve(map_of(gaussians, grid, found[name]), truth, grid, mask).value
        assert float(after[1:12].mean()) > float(before[1:12].mean()) + 0.05
        # Nothing but what was found is added, and only where the fit has looked.
        added = map_of(gaussians, grid, found[name]) - voxelize(gaussians, grid)
        assert torch.allclose(middle(added, 24), found[name], atol=1e-6 * float(found[name].abs().max()) + 1e-6)
        middle(added, 24).zero_()
        assert float(added.abs().max()) == 0


def test_shells_beyond_the_finest_are_left_out(good):
    grid, objectives, models = fitted(good, 60)
    mask = spherical_mask(grid, 80.0, 12.0)
    shells = shell_index(24, 3)
    for finest in (4.0, 8.0):
        last = int(finest * 24 / 32)
        for volume in residual_maps(objectives, models, mask, finest).values():
            power = rfft(volume, 3).abs().square()
            assert float(power[shells > last + 1].max()) < 1e-9 * float(power.max())
            assert float(power[shells == last].max()) > 1e-6 * float(power.max())


def test_noise_is_not_taken_for_detail(simulated):
    """Halves that have nothing in common: of a residual's power a few per cent stay, not half."""
    grid, objectives, models = fitted(simulated(particles=600, noise_only=True, seed=3), 200)
    mask = spherical_mask(grid, 90.0, 12.0)
    inside = middle(mask, 24)
    found = residual_maps(objectives, models, mask, 16.0)
    for name, own in objectives.items():
        left = own.residual(own.render(models[name].gaussians())).detach() * inside
        share = mean_per_shell(rfft(found[name], 3).abs().square()) / mean_per_shell(rfft(left, 3).abs().square())
        assert float(share[3:].mean()) < 0.03


def test_symmetry_leaves_fewer_independent_coefficients(good):
    """Of images that are there four times as often the agreement has to be larger to be believed."""
    grid, objectives, models = fitted(good, 60)
    mask = spherical_mask(grid, 80.0, 12.0)
    once, four = (residual_maps(objectives, models, mask, 12.0, copies) for copies in (1, 4))
    for name in once:
        assert 0 < float(four[name].norm()) < float(once[name].norm())
        assert float(fsc(once[name], four[name])[2:8].min()) > 0.99  # shell by shell it is the same map


@pytest.mark.report
def test_a_run_holds_them_in_its_maps_and_not_in_its_gaussians(good, tmp_path):
    truth, grid = read_map(good.parent / "truth.mrc")
    mean = {}
    for name, residual in (("with", None), ("without", False)):
        summary = reconstruct(change(FEW, residual=residual), good, tmp_path / name)
        volume, _ = read_map(tmp_path / name / "run_class001.mrc")
        gaussians, _ = read_ply(tmp_path / name / "run_class001.ply")
        apart = float((voxelize(gaussians, grid) - volume).norm() / volume.norm())
        mean[name] = float(fsc_curve(volume, truth, grid).value[1:12].mean())
        if residual is None:
            assert summary["residual"]["kept"] is True
            assert summary["residual"]["gain"] > 3 * summary["residual"]["gain_error"] > 0
            assert apart > 0.1
            assert "gain" in (tmp_path / name / "run.log").read_text().partition("residual maps")[2]
            assert "both half-sets agree on, too" in (tmp_path / name / "report.html").read_text(encoding="utf-8")
        else:
            assert summary["residual"] is None
            assert apart < 1e-5
    assert mean["with"] > mean["without"] + 0.02


@pytest.mark.report
def test_they_are_left_out_where_half_maps_get_worse(good, tmp_path, monkeypatch):
    monkeypatch.setattr("emsplat.measures.crossvalidate.CrossValidation.gain", lambda *_, **__: (-0.5, 0.01))
    summary = reconstruct(FEW, good, tmp_path / "run")
    assert summary["residual"] == {"gain": -0.5, "gain_error": 0.01, "kept": False}
    gaussians, grid = read_ply(tmp_path / "run" / "run_class001.ply")
    volume, _ = read_map(tmp_path / "run" / "run_class001.mrc")
    assert (voxelize(gaussians, grid) - volume).norm() < 1e-5 * volume.norm()
    assert "makes their maps worse" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_mask_decides_where(good, tmp_path):
    """Far from the mask of the user the map is that of the Gaussians."""
    grid = read_map(good.parent / "truth.mrc")[1]
    small = spherical_mask(grid, 32.0, 12.0)
    write_map(tmp_path / "mask.mrc", small, grid.pixel_size)
    reconstruct(change(FEW, mask=tmp_path / "mask.mrc"), good, tmp_path / "run")
    gaussians, _ = read_ply(tmp_path / "run" / "run_class001.ply")
    added = (read_map(tmp_path / "run" / "run_class001.mrc")[0] - voxelize(gaussians, grid)).abs()
    far = spherical_mask(grid, 80.0, 12.0) == 0
    assert float(added[small > 0.9].mean()) > 20 * float(added[far].mean())


def test_recipes_and_options(good, tmp_path):
    assert settings_of(FEW).residual
    assert not settings_of(change(FEW, residual=False)).residual
    for words in ({"recipe": "gem"}, {"engine": "images"}, {"independent_halves": True}):
        assert not settings_of(configure(ReconstructConfig, **words)).residual
        with pytest.raises(InputError, match="--residual"):
            settings_of(configure(ReconstructConfig, **words, residual=True))
    assert main(["reconstruct", str(good), "-o", str(tmp_path / "run"), "--residual", "--recipe", "gem"]) == 2
