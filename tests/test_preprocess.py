"""New stacks: images and metadata change together, so that the map stays where it was."""

from dataclasses import replace

import mrcfile
import numpy as np
import pytest
import torch
from gemmi import cif

from emsplat.cli import main
from emsplat.io.cryosparc import write_cs
from emsplat.io.mrc import read_map
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.particles import read_particles
from emsplat.io.relion.read import read_star
from emsplat.io.relion.write import write_table
from emsplat.maths.fourier import crop, irfft, rfft
from emsplat.particles.background import background
from emsplat.particles.open import open_particles
from emsplat.particles.resample import resample, resampled_grid
from emsplat.sums.equations import _lowpass
from emsplat.sums.statistics import equations_of
from emsplat.types import Grid


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(box=48, pixel_size=3.0, particles=300, atoms=500, shift=8.0, seed=0)


def preprocess(*words):
    assert main(["preprocess", *map(str, words)]) == 0


def images(path):
    with mrcfile.open(path, permissive=True) as file:
        return torch.from_numpy(np.array(file.data, dtype=np.float32))


def classical(star, **options):
    return equations_of(open_particles(star, diameter=100.0, **options)).solve()


def likeness(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_grids():
    disk = Grid(64, 1.5)
    assert resampled_grid(disk, None, None) == disk
    assert resampled_grid(disk, 32, None) == Grid(32, 3.0)
    assert resampled_grid(disk, None, 3.1) == Grid(30, 3.2)
    assert resampled_grid(disk, 20, 3.0) == Grid(20, 3.0)
    assert resampled_grid(disk, 128, None, finer=True) == Grid(128, 0.75)


@pytest.mark.parametrize(
    ("box", "pixel_size"), [(31, None), (6, None), (128, None), (None, 1.0), (60, 3.0), (None, -1)]
)
def test_impossible_grids_are_refused(particles, tmp_path, capsys, box, pixel_size):
    words = [*(["--box", str(box)] if box else []), *(["--pixel-size", str(pixel_size)] if pixel_size else [])]
    assert main(["backproject", str(particles), "-o", str(tmp_path / "run"), *words]) == 2
    assert "expected" in capsys.readouterr().err


def test_a_smooth_image_is_the_same_on_fewer_and_on_more_pixels():
    disk = Grid(48, 2.0)

    def blob(grid):
        axis = (torch.arange(grid.size) - grid.size // 2) * grid.pixel_size
        return torch.exp(-((axis[:, None] - 9) ** 2 + (axis + 5) ** 2) / (2 * 6.0**2))[None]

    # A blob of 6 Å still has a share of exp(-(6 π / 8)² 2) = 1.5e-5 at the Nyquist frequency of pixels of 4 Å.
    rest = {"atol": 2e-4, "rtol": 0}
    for grid in (Grid(24, 4.0), Grid(32, 3.0), Grid(96, 1.0), Grid(16, 3.0)):
        torch.testing.assert_close(resample(blob(disk), disk, grid), blob(grid), **rest)
    moved = resample(blob(disk), disk, Grid(24, 4.0), torch.tensor([[1, -2]]))
    torch.testing.assert_close(moved[0, 4:-4, 4:-4], blob(Grid(24, 4.0)).roll((-2, 1), (1, 2))[0, 4:-4, 4:-4], **rest)


def test_images_are_those_of_the_source_cropped(particles, tmp_path):
    preprocess(particles, "-o", tmp_path / "small", "--box", 24, "--no-normalise", "--no-recentre")
    before, after = images(particles.parent / "particles.mrcs"), images(tmp_path / "small" / "particles.mrcs")
    torch.testing.assert_close(after, irfft(crop(rfft(before), 24)) / 4, atol=1e-4, rtol=1e-4)
    file = StackFile(tmp_path / "small" / "particles.mrcs")
    assert (file.count, file.box, file.pixel_size) == (300, 24, 6.0)
    table, source = read_star(tmp_path / "small" / "particles.star"), read_star(particles)
    assert (table.groups[0].pixel_size, table.groups[0].box) == (6.0, 24)
    torch.testing.assert_close(table.poses.shift, source.poses.shift, atol=1e-5, rtol=0)


def test_recentred_images_have_small_origins_and_the_same_map(particles, tmp_path):
    preprocess(particles, "-o", tmp_path / "centred")
    table = read_star(tmp_path / "centred" / "particles.star")
    assert float(read_star(particles).poses.shift.abs().max()) > 15
    assert float(table.poses.shift.abs().max()) <= 1.5 + 1e-6
    assert likeness(classical(tmp_path / "centred" / "particles.star"), classical(particles)) > 0.995
    stack = open_particles(tmp_path / "centred" / "particles.star")
    flat = images(tmp_path / "centred" / "particles.mrcs")[:, background(stack.grid, stack.diameter)]
    assert float(flat.mean(1).abs().max()) < 1e-4
    assert float((flat.std(1) - 1).abs().max()) < 1e-3


def test_cut_images_keep_the_particle(particles, tmp_path):
    """A box that is just wide enough holds the particle only once it is centred."""
    preprocess(particles, "-o", tmp_path / "cut", "--box", 40, "--pixel-size", 3.0, "--diameter", 100)
    truth = _lowpass(read_map(particles.parent / "truth.mrc")[0], 8.0)[4:-4, 4:-4, 4:-4]
    whole = _lowpass(classical(particles), 8.0)[4:-4, 4:-4, 4:-4]
    cut = _lowpass(classical(tmp_path / "cut" / "particles.star"), 8.0 * 40 / 48)
    assert likeness(cut, truth) > likeness(whole, truth) - 0.01 > 0.9


def test_float16_and_inversion(particles, tmp_path):
    preprocess(particles, "-o", tmp_path / "half", "--dtype", "float16", "--invert", "--no-normalise", "--no-recentre")
    after = images(tmp_path / "half" / "particles.mrcs")
    torch.testing.assert_close(after, -images(particles.parent / "particles.mrcs"), atol=1e-2, rtol=1e-3)
    with mrcfile.open(tmp_path / "half" / "particles.mrcs", permissive=True, header_only=True) as file:
        assert int(file.header.mode) == 12
        assert float(file.header.rms) == pytest.approx(float(after.double().std(correction=0)), rel=1e-4)


def test_other_columns_stay(particles, tmp_path):
    text = particles.read_text().replace("_rlnClassNumber", "_rlnOwn", 1)
    (tmp_path / "p.star").write_text(text)
    words = ["--datadir", particles.parent, "--first", 40, "--box", 32]
    preprocess(tmp_path / "p.star", "-o", tmp_path / "out", *words)
    before, after = (
        cif.read_file(str(path)).find_block("particles")
        for path in (tmp_path / "p.star", tmp_path / "out" / "particles.star")
    )
    for tag in ("_rlnOwn", "_rlnDefocusU", "_rlnAnglePsi", "_rlnMicrographName", "_rlnRandomSubset"):
        assert list(before.find_values(tag))[:40] == list(after.find_values(tag))


def test_from_cs_and_onto_several_grids(particles, tmp_path):
    assert main(["convert", str(particles), str(tmp_path / "p.cs")]) == 0
    preprocess(tmp_path / "p.cs", "-o", tmp_path / "out", "--box", 24)
    assert (
        likeness(classical(tmp_path / "out" / "particles.star"), classical(tmp_path / "out" / "particles.cs")) > 0.9999
    )
    preprocess(particles, "-o", tmp_path / "both", "--merge", tmp_path / "out" / "particles.star", "--no-recentre")
    assert {path.name for path in (tmp_path / "both").glob("*.mrcs")} == {"particles.mrcs", "particles2.mrcs"}
    table = read_star(tmp_path / "both" / "particles.star")
    assert [group.box for group in table.groups] == [48, 24]
    assert torch.bincount(table.optics_group).tolist() == [300, 300]


@pytest.mark.parametrize("engine", ["one-pass", pytest.param("images", marks=pytest.mark.slow)])
def test_on_the_fly_is_as_beforehand(particles, tmp_path, engine):
    words = ["--engine", engine, "--epochs", "2", "--gaussians", "200", "--diameter", "100"]
    grid = ["--box", "32", "--pixel-size", "4.0"]
    preprocess(particles, "-o", tmp_path / "small", *grid, "--diameter", 100)
    star = tmp_path / "small" / "particles.star"
    assert main(["reconstruct", str(star), "-o", str(tmp_path / "one"), *words]) == 0
    assert main(["reconstruct", str(particles), "-o", str(tmp_path / "two"), *words, *grid]) == 0
    for name in ("run_class001.mrc", "backprojection_half1.mrc"):
        one, two = (images(tmp_path / run / name) for run in ("one", "two"))
        assert one.shape == (32, 32, 32)
        assert likeness(one, two) > 0.9999


def test_output_folder_that_is_not_empty_stays(particles, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(["preprocess", str(particles), "-o", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_input_is_never_replaced(particles, tmp_path, capsys):
    preprocess(particles, "-o", tmp_path / "out")
    before = (tmp_path / "out" / "particles.mrcs").read_bytes()
    words = [str(tmp_path / "out" / "particles.star"), "-o", str(tmp_path / "out"), "--overwrite", "--box", "24"]
    assert main(["preprocess", *words]) == 2
    assert "is an input, and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "out" / "particles.mrcs").read_bytes() == before


@pytest.mark.parametrize("kind", ["star", "cs"])
def test_particles_stay_where_they_are_in_their_micrographs(particles, tmp_path, kind):
    """A box that is moved has another place; coordinate less origin is the particle's."""
    placed = replace(
        read_star(particles),
        coordinates=torch.linspace(500, 900, 600, dtype=torch.float64).reshape(300, 2),
        micrograph_pixel_size=torch.full((300,), 1.5, dtype=torch.float64),
    )
    groups = tuple(replace(group, original_pixel_size=1.5) for group in placed.groups)
    write_table(tmp_path / "p.star", replace(placed, groups=groups), placed.half)
    source = tmp_path / "p.star"
    if kind == "cs":
        source = tmp_path / "p.cs"
        write_cs(source, placed, placed.half)
        data = np.load(source)
        names = ("center_x_frac", "center_y_frac", "micrograph_psize_A")
        fields = [(f"location/{name}", "<f8") for name in names] + [("location/micrograph_shape", "<u4", (2,))]
        own = [name for name in data.dtype.names if name != "location/micrograph_psize_A"]
        wide = np.zeros(300, [*((name, data.dtype[name]) for name in own), *fields])
        for name in own:
            wide[name] = data[name]
        wide["location/micrograph_shape"], wide["location/micrograph_psize_A"] = [2000, 1000], 1.5
        wide["location/center_x_frac"] = placed.coordinates[:, 0] / 1000
        wide["location/center_y_frac"] = 1 - placed.coordinates[:, 1] / 2000
        with source.open("wb") as file:
            np.save(file, wide)
    preprocess(source, "-o", tmp_path / "out")
    before = read_particles(source)
    expected = before.position - before.poses.shift
    moved = 0.0
    for name in ("particles.star", *(["particles.cs"] if kind == "cs" else [])):
        after = read_particles(tmp_path / "out" / name)
        torch.testing.assert_close(after.position - after.poses.shift, expected, atol=1e-3, rtol=0)
        moved = float((after.poses.shift - before.poses.shift).abs().max())
    assert moved > 10
