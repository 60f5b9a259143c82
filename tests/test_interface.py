"""emsplat in a notebook: what `import emsplat as em` offers, on simulated particles."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import emsplat as em
from emsplat.config import ReconstructConfig, checked
from emsplat.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def star(simulated):
    return simulated(particles=300, snr=1.0)


@pytest.fixture(scope="module")
def maps(star):
    return em.backproject(em.read_particles(star))


def likeness(one, other, mask):
    return float(torch.corrcoef(torch.stack([(one * mask).flatten(), (other * mask).flatten()]))[0, 1])


def test_particles_are_looked_at_and_chosen(star):
    particles = em.read_particles(str(star), symmetry="C2", diameter=100)
    assert len(particles) == 300
    assert particles.half.bincount().tolist() == [0, 150, 150]
    assert particles.symmetry.order == 2
    assert "300 particles" in repr(particles)
    few = particles.take(torch.arange(10))
    assert next(few.sequential(10)).images.shape == (10, 32, 32)
    assert em.read_particles(star, box=24, pixel_size=4.0).grid == em.Grid(24, 4.0)


def test_maps_and_gaussians(star, maps, tmp_path):
    truth, _ = em.read_map(star.parent / "truth.mrc")
    assert likeness(maps.map, truth, maps.mask) > 0.9
    assert 8.0 <= maps.resolution < 12
    gaussians = em.fit(maps.equations[0], gaussians=400, epochs=4, mask=maps.mask)
    fitted = em.voxelize(gaussians, maps.grid)
    assert len(gaussians) == 400
    assert likeness(fitted, truth, maps.mask) > 0.9
    again = em.fit(maps.equations[0], start=gaussians, epochs=1)
    assert likeness(em.voxelize(again, maps.grid), fitted, maps.mask) > 0.99
    saved = maps.save(tmp_path)
    assert torch.equal(em.read_map(saved[0])[0], maps.half_maps[0])
    nowhere = torch.zeros_like(maps.mask)  # says nothing of where to look: the whole box
    assert len(em.fit(maps.equations[0], gaussians=10, epochs=1, mask=nowhere)) == 10
    with pytest.raises(em.InputError, match="without start"):
        em.fit(maps.equations[0], gaussians=10, start=gaussians)


def test_half_maps_of_any_program_are_assessed(tmp_path, maps):
    found = em.assess(*maps.half_maps, maps.grid.pixel_size, mask=maps.mask)
    arrays = [one.numpy() for one in (*maps.half_maps, maps.mask)]
    same = em.assess(arrays[0], arrays[1].astype("f8"), maps.grid.pixel_size, mask=arrays[2][::1])
    assert (same.curves["masked"].value == found.curves["masked"].value).all()
    curve = em.fsc_curve(arrays[0], arrays[1], maps.grid, arrays[2])
    assert (curve.value == em.fsc_curve(*maps.half_maps, maps.grid, maps.mask).value).all()
    em.write_map(tmp_path / "array.mrc", arrays[0][::-1, ::-1, ::-1], 2.0)
    assert bool((em.read_map(tmp_path / "array.mrc")[0] == maps.half_maps[0].flip(0, 1, 2)).all())
    for wrong, said in (
        (arrays[0][0], "three axes"),
        ("map", "an array of numbers"),
        (maps.map * float("nan"), "not finite"),
        (maps.map + 1j, "real numbers"),
    ):
        for call in (
            lambda wrong=wrong: em.fsc_curve(wrong, maps.map, maps.grid),
            lambda wrong=wrong: em.write_map(tmp_path / "no.mrc", wrong, 2.0),
            lambda wrong=wrong: em.assess(wrong, maps.map, 2.0),
            lambda wrong=wrong: em.fit(maps.equations[0], mask=wrong),
        ):
            with pytest.raises(em.InputError, match=said):
                call()
    assert found.resolution == maps.resolution
    assert (found.curves["masked"].value == maps.curves["masked"].value).all()
    assert f"{found.resolution:.2f} Å" in repr(found)
    with pytest.raises(em.InputError, match="two even cubes alike"):
        em.assess(maps.map, maps.map[:30], 4.0)


def test_a_run_folder_in_a_notebook(star, tmp_path, capsys):
    run = em.reconstruct(star, tmp_path / "run", epochs=4, gaussians=300, threads=1)
    assert capsys.readouterr().out == ""
    again = em.read_run(tmp_path / "run")
    assert again.resolution == run.summary["resolution"]["cross_validated"]
    assert torch.equal(again.map, em.read_map(tmp_path / "run" / "run_class001.mrc")[0])
    assert [volume.shape for volume in again.half_maps] == [(32, 32, 32)] * 2
    assert len(again.gaussians) == 300
    assert len(again.particles) == 300
    assert again.grid == em.Grid(32, 4.0)
    assert again.local_resolution.shape == again.mask.shape
    assert float(again.curves["masked"].value[1]) > 0.9
    assert again.warnings == run.summary["warnings"]
    assert "Å" in repr(again)
    page = again._repr_html_()
    assert page.startswith("<div>")
    assert "report.html" in page
    with pytest.raises(em.InputError, match="no such option"):
        em.reconstruct(star, tmp_path / "other", epoch=4)
    with pytest.raises(em.InputError, match=r"summary\.json"):
        em.read_run(tmp_path)


def test_public_names_are_documented_and_typed():
    assert set(em.__all__) == set(em._MODULE)
    for name in em.__all__:
        public = getattr(em, name)
        assert public.__doc__, name
        if inspect.isfunction(public):
            hints = inspect.signature(public)
            assert all(p.annotation is not p.empty for p in hints.parameters.values()), name
            assert hints.return_annotation is not hints.empty, name
    assert set(em.__all__) <= set(dir(em))
    with pytest.raises(AttributeError, match="nothing"):
        em.nothing  # noqa: B018


def test_interface_loads_no_command_line_and_draws_nothing():
    code = "import sys, emsplat as em; em.read_run, em.fit, em.reconstruct; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "torch" in loaded
    assert not {"matplotlib", "plotly", "emsplat.commandline", "rich", "emsplat.cli"} & loaded


def test_the_example_of_the_readme(star, tmp_path, monkeypatch):
    """The lines that a newcomer copies, in the folder of the particles."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import emsplat as em\n.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 12
    monkeypatch.chdir(star.parent)
    exec(compile(example, "README.md", "exec"), {})  # the project's own lines
    assert (star.parent / "fitted.mrc").is_file()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("isotropic", "no", "True or False"),
        ("device", "tpu", "one of auto, cpu, cuda"),
        ("recipe", "foo", "one of default"),
        ("first", "many", "a whole number"),
        ("symmetry", 2, "a text"),
        ("merge", "b.star", "a list"),
        ("batch", "all", "one of auto"),
    ],
)
def test_options_of_another_kind_are_refused(tmp_path, option, value, said):
    with pytest.raises(InputError, match=rf"^{option}: .*expected {said}"):
        em.reconstruct("nowhere.star", tmp_path / "run", **{option: value})
    assert not (tmp_path / "run").exists()


def test_options_are_of_the_kinds_that_the_command_line_makes():
    given = {"batch": "auto", "first": None, "merge": ["b.star"], "isotropic": True, "diameter": 90, "mask": "m.mrc"}
    found = checked(ReconstructConfig, given)
    assert found == given | {"merge": (Path("b.star"),), "mask": Path("m.mrc")}


def test_impossible_grids_and_maps_are_refused():
    volume = torch.randn(8, 8, 8)
    for size in (0.0, -3.0, float("nan")):
        with pytest.raises(InputError, match="size above 0"):
            em.assess(volume, volume + 1, size)
    with pytest.raises(InputError, match="not finite"):
        em.assess(volume * torch.nan, volume, 1.0)
