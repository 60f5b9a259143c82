"""Starts from a file: what the Gaussians are put on, that the fit gets to the data, and what is refused."""

import gzip
import shutil

import mrcfile
import pytest
import torch

from emsplat.config import ReconstructConfig, SimulateConfig, change, configure
from emsplat.errors import InputError
from emsplat.imaging.project import voxelize
from emsplat.io.atoms import read_atoms
from emsplat.io.gaussians import convert_model, read_gaussians, write_gaussians
from emsplat.io.mrc import read_map, write_map
from emsplat.measures.curves import crossing
from emsplat.measures.fsc import fsc_curve
from emsplat.models.start_files import check_start, read_start, start_remarks
from emsplat.programs.begin import start_model
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.settings import settings_of
from emsplat.programs.simulate import simulate
from emsplat.simulation.images import truth_map
from emsplat.simulation.protein import place_atoms
from emsplat.types import Gaussians, Grid

GRID = Grid(32, 4.0)
QUICK = configure(ReconstructConfig, epochs=4, gaussians=400, threads=1)


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=300)


@pytest.fixture(scope="module")
def files(particles, tmp_path_factory):
    """The truth as each kind of file: on another grid, as Gaussians and as pseudo-atoms, in other grey values."""
    folder = tmp_path_factory.mktemp("starts")
    truth, _ = read_map(particles.parent / "truth.mrc")
    gaussians = start_model(truth, GRID, settings_of(QUICK), GRID.pixel_size).gaussians()
    wide = Gaussians(gaussians.mean, gaussians.covariance + 9 * torch.eye(3), 1e4 * gaussians.amplitude)
    write_gaussians(folder / "model.ply", wide, GRID)
    for name in ("model.cif", "model.pdb.gz"):
        convert_model(folder / "model.ply", folder / name)
    fine = Grid(90, 1.5)
    write_map(folder / "map.mrc", 1e-3 * voxelize(wide, fine), fine.pixel_size)
    return folder


def error_to_truth(run, particles):
    truth, grid = read_map(particles.parent / "truth.mrc")
    return crossing(fsc_curve(read_map(run / "run_class001.mrc")[0], truth, grid), 0.5)


@pytest.fixture(scope="module")
def usual(particles, tmp_path_factory):
    """Resolution against the truth with the usual start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emsplat.report.write_report", lambda run, *_: None)
        reconstruct(QUICK, particles, run := tmp_path_factory.mktemp("usual") / "run")
    return error_to_truth(run, particles)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["one-pass", "images"])
@pytest.mark.parametrize("name", ["model.ply", "model.cif", "model.pdb.gz", "map.mrc"])
def test_a_start_from_each_kind_of_file(files, particles, usual, tmp_path, name, engine):
    """The Gaussians of the file, or as many as asked for, reach the truth whatever the grey values of the file."""
    init = str(files / name)
    count = 300 if name == "map.mrc" else None
    config = configure(ReconstructConfig, init=init, gaussians=count, epochs=4, engine=engine, threads=1)
    summary = reconstruct(config, particles, tmp_path / "run")
    assert {fit["gaussians"] for fit in summary["fits"].values()} == {count or 400}
    assert summary["settings"]["init"] == init
    assert any(init in warning and "half" in warning for warning in summary["warnings"])
    assert error_to_truth(tmp_path / "run", particles) < usual + 1.0


@pytest.mark.parametrize("init", ["map", "ball", "uniform"])
def test_starts_without_a_file_warn_of_nothing(particles, tmp_path, init):
    summary = reconstruct(change(QUICK, init=init, epochs=1), particles, tmp_path / "run")
    assert summary["warnings"] == []
    assert read_start(init, GRID) is None


def test_each_half_starts_from_its_own_file(files, particles, tmp_path):
    """Named as RELION names half maps; without the other half there is no start."""
    first, second = tmp_path / "run_half1.ply", tmp_path / "run_half2.ply"
    shutil.copy(files / "model.ply", first)
    with pytest.raises(InputError, match=r"run_half2.ply: no such file"):
        settings_of(configure(ReconstructConfig, init=str(first)))
    gaussians, _ = read_gaussians(first)
    write_gaussians(
        second, Gaussians(gaussians.mean[:350], gaussians.covariance[:350], gaussians.amplitude[:350]), GRID
    )
    config = configure(ReconstructConfig, init=str(first), epochs=2, independent_halves=True, threads=1)
    summary = reconstruct(config, particles, tmp_path / "run")
    found = {name: fit["gaussians"] for name, fit in summary["fits"].items()}
    assert found == {"half1": 400, "half2": 350, "class001": 400}
    assert summary["warnings"] == []


def test_a_model_keeps_its_number_unless_growth_is_asked_for(files):
    one = settings_of(configure(ReconstructConfig, init=str(files / "model.ply")))
    assert one.growth == 0
    assert settings_of(configure(ReconstructConfig, init=str(files / "model.ply"), growth=1)).growth == 1
    assert settings_of(configure(ReconstructConfig, init=str(files / "map.mrc"))).growth == 2


def test_a_map_of_another_grid_lies_where_ours_does_and_has_no_fine_detail(files, tmp_path):
    """Odd box, other pixel size: the centres of the boxes coincide."""
    blob = Gaussians(torch.tensor([[10.0, -20.0, 5.0]]), 100 * torch.eye(3)[None], torch.ones(1))
    other = Grid(41, 2.7)
    write_map(tmp_path / "odd.mrc", voxelize(blob, other), other.pixel_size)
    start = read_start(str(tmp_path / "odd.mrc"), GRID)
    axis = (torch.arange(32) - 16) * 4.0
    total = start.sum()
    centre = [float((start.sum(dims) * axis).sum() / total) for dims in ((0, 1), (0, 2), (1, 2))]
    assert centre == pytest.approx([10, -20, 5], abs=0.3)
    # Width: that of the blob and of a filter that leaves 1/e at 20 Å, less what lies below a tenth.
    expected = voxelize(Gaussians(blob.mean, (100 + 4.5**2) * torch.eye(3)[None], blob.amplitude), GRID)
    curve = fsc_curve(start, expected, GRID)
    assert float(curve.value[1:5].min()) > 0.97
    noise = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0)).abs()
    write_map(tmp_path / "noise.mrc", noise, 2.0)
    smooth = read_start(str(tmp_path / "noise.mrc"), GRID)
    power = torch.fft.rfftn(smooth[4:28, 4:28, 4:28] - smooth[4:28, 4:28, 4:28].mean()).abs().square()
    assert float(power[11:13, 11:13, 11:13].mean()) < 1e-3 * float(power[:3, :3, :3].mean())


def test_an_atomic_model_is_a_start(shared_data, tmp_path):
    """Adenylate kinase, started from the model in the frame of its map: every atom a Gaussian, in place."""
    path = shared_data / "models" / "adk_open.pdb"
    config = SimulateConfig(box=32, pixel_size=4.0, particles=200, snr=0.5)
    star = simulate(config, path, tmp_path / "p")
    atoms = read_atoms(path)
    with pytest.raises(InputError, match=r"lies outside the box.*fit it into the map"):
        read_start(str(moved(path, tmp_path / "off.pdb", [500.0, 0, 0])), GRID)
    # The simulation moves the centre of mass to the centre of the box: so must the model, as if fitted into the map.
    shift = 64.0 - (atoms.position - place_atoms(atoms, GRID).position)[0]
    fitted = moved(path, tmp_path / "fitted.pdb", shift.tolist())
    summary = reconstruct(configure(ReconstructConfig, init=str(fitted), epochs=3, threads=1), star, tmp_path / "run")
    assert summary["fits"]["class001"]["gaussians"] == len(atoms)
    volume, _ = read_map(tmp_path / "run" / "run_class001.mrc")
    truth = truth_map(place_atoms(atoms, GRID), GRID, 60.0)
    assert crossing(fsc_curve(volume, truth, GRID), 0.5) < 9


def moved(source, target, shift):
    import gemmi

    structure = gemmi.read_structure(str(source))
    for site in structure[0].all():
        site.atom.pos += gemmi.Position(*shift)
    structure.write_pdb(str(target))
    return target


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("sphere", "expected map, ball, uniform or a file"),
        ("none.ply", r"no such file; expected map, ball"),
        ("none.mrc", "no such file"),
    ],
)
def test_starts_that_do_not_exist_are_refused(init, message):
    with pytest.raises(InputError, match=f"--init {init}: .*{message}|--init {init}: {message}"):
        check_start(init)
    with pytest.raises(InputError, match=message):
        settings_of(configure(ReconstructConfig, init=init))


def test_options_that_contradict_the_file_are_refused(files):
    with pytest.raises(InputError, match="the file says how many"):
        settings_of(configure(ReconstructConfig, init=str(files / "model.cif"), gaussians=10))
    for name in ("model.ply", "map.mrc"):
        with pytest.raises(InputError, match="--independent-halves with --init"):
            settings_of(configure(ReconstructConfig, init=str(files / name), independent_halves=True))


def test_files_that_hold_no_start_are_refused_before_the_run_folder_is_made(particles, tmp_path):
    write_map(tmp_path / "dark.mrc", -torch.ones(32, 32, 32), 4.0)
    write_map(tmp_path / "tiny.mrc", torch.ones(32, 32, 32), 1.0)
    nothing = Gaussians(torch.zeros(3, 3), 9 * torch.eye(3).repeat(3, 1, 1), torch.zeros(3))
    write_gaussians(tmp_path / "empty.ply", nothing, GRID)
    (tmp_path / "broken.cif").write_text("data_x\nloop_\n_a.b\n_a.c\n1 2 3\n")
    volume, grid = read_map(particles.parent / "truth.mrc")
    write_map(tmp_path / "inverted.mrc", 0.01 * volume.std() - volume, grid.pixel_size)
    for name, message in (
        ("dark.mrc", r"no density above 0.*inverted\?"),
        ("inverted.mrc", r"further below its surroundings than above.*is it inverted \(protein dark\)\?"),
        ("tiny.mrc", r"span 32 Å.*pixel size in its header"),
        ("empty.ply", "no amplitude above 0"),
        ("broken.cif", "not readable"),
    ):
        config = configure(ReconstructConfig, init=str(tmp_path / name))
        with pytest.raises(InputError, match=message) as caught:
            reconstruct(config, particles, tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_experimental_particles_from_an_atomic_model(shared_data, tmp_path):
    """Beta-galactosidase from the model that lies in its map: at least what the usual start gives."""
    folder = shared_data / "bgal"
    path = folder / "8bk7_in_map_frame.cif.gz"
    config = configure(ReconstructConfig, symmetry="D2", init=str(path), threads=1)
    summary = reconstruct(config, folder / "particles.star", tmp_path / "run")
    volume, grid = read_map(tmp_path / "run" / "run_class001.mrc")
    mask, _ = read_map(folder / "mask_soft.mrc")
    atoms = read_atoms(path)
    truth = truth_map(place_atoms(atoms, grid, keep_frame=True), grid, 60.0)
    curve = fsc_curve(volume, truth, grid, mask)
    assert summary["fits"]["class001"]["gaussians"] == len(atoms)
    assert summary["resolution"]["cross_validated"] < 7.2
    assert crossing(curve, 0.5) < 7.2
    assert float(curve.value[1:].mean()) > 0.864


def test_a_start_whose_header_puts_it_elsewhere_is_told(tmp_path):
    """Centres are put on each other; a header that agrees, or that says nothing, needs no word."""
    path = tmp_path / "part.mrc"
    write_map(path, torch.ones(24, 24, 24), 4.0)
    grid = Grid(32, 4.0)

    def remarks(*start):
        with mrcfile.open(path, "r+") as file:
            file.header.nxstart, file.header.nystart, file.header.nzstart = start
        return start_remarks(str(path), grid)

    assert not remarks(0, 0, 0)
    assert not remarks(4, 4, 4)  # the middle of a map of 32
    assert not remarks(-12, -12, -12)  # the origin of coordinates in the centre
    (said,) = remarks(7, 4, 4)
    assert "part.mrc: its header (NXSTART or ORIGIN) puts the centre of its box (12, 0, 0) Å from that of the" in said
    packed = tmp_path / "part.map.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    check_start(str(packed))
    assert len(start_remarks(str(packed), grid)) == 1
    assert start_remarks("ball", grid) == []
