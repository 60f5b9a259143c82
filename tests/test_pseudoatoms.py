"""Gaussians as pseudo-atoms in mmCIF and PDB files: nothing is lost, they lie on the map, others can read them."""

import contextlib
import dataclasses
import gzip
import math

import gemmi
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from emsplat import report
from emsplat.cli import main
from emsplat.config import ReconstructConfig, configure
from emsplat.errors import InputError, OutputError
from emsplat.imaging.project import voxelize
from emsplat.io.atoms import read_atoms
from emsplat.io.gaussians import convert_model, read_gaussians, write_gaussians
from emsplat.io.mrc import read_map
from emsplat.io.ply import read_ply
from emsplat.io.pseudoatoms import gaussians_of, read_pseudoatoms, write_pseudoatoms
from emsplat.maths.geometry import quaternion_to_matrix
from emsplat.measures.fsc import fsc_curve
from emsplat.programs.reconstruct import reconstruct
from emsplat.simulation.images import truth_map
from emsplat.simulation.protein import place_atoms
from emsplat.types import Gaussians, Grid

GRID = Grid(64, 3.54)
NAMES = ["g.cif", "g.mmcif.gz", "g.pdb", "g.ent.gz"]


def mixture(count=20, seed=0, spread=40.0, widest=14.0, decades=3.0):
    rng = torch.Generator().manual_seed(seed)
    scale = 0.5 * (widest / 0.5) ** torch.rand(count, 3, generator=rng)
    axes = quaternion_to_matrix(torch.randn(count, 4, generator=rng)) * scale[:, None]
    amplitude = 10 ** (decades * torch.rand(count, generator=rng))
    return Gaussians(spread * torch.randn(count, 3, generator=rng), axes @ axes.mT, amplitude)


def written(folder, name="g.cif", gaussians=None, grid=GRID):
    write_pseudoatoms(folder / name, mixture() if gaussians is None else gaussians, grid, "emsplat test")
    return folder / name


mixtures = st.builds(
    mixture,
    count=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    spread=st.floats(0, 200),
    widest=st.floats(0.5, 14),
    decades=st.floats(0, 9),
)


@given(gaussians=mixtures, size=st.integers(2, 1024), pixel_size=st.floats(0.1, 10), negative=st.booleans())
def test_mmcif_loses_nothing(tmp_path_factory, gaussians, size, pixel_size, negative):
    if negative:
        gaussians = Gaussians(gaussians.mean, gaussians.covariance, -gaussians.amplitude)
    grid = Grid(size, pixel_size)
    again, found = read_pseudoatoms(written(tmp_path_factory.mktemp("cif"), "g.cif", gaussians, grid))
    assert found.size == grid.size
    assert found.pixel_size == pytest.approx(pixel_size, rel=1e-8)
    torch.testing.assert_close(again.mean, gaussians.mean, atol=2e-5, rtol=1e-6)
    largest = gaussians.covariance.abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(again.covariance / largest, gaussians.covariance / largest, atol=6e-7, rtol=0)
    torch.testing.assert_close(again.amplitude, gaussians.amplitude, atol=0, rtol=1e-6)


@given(gaussians=mixtures, size=st.integers(2, 512), pixel_size=st.floats(0.1, 10))
def test_pdb_keeps_what_its_columns_hold(tmp_path_factory, gaussians, size, pixel_size):
    again, _ = read_pseudoatoms(written(tmp_path_factory.mktemp("pdb"), "g.pdb", gaussians, Grid(size, pixel_size)))
    torch.testing.assert_close(again.mean, gaussians.mean, atol=6e-4, rtol=0)
    torch.testing.assert_close(again.covariance, gaussians.covariance, atol=1.2e-4, rtol=1e-6)
    unit = float(gaussians.amplitude.max())
    torch.testing.assert_close(again.amplitude / unit, gaussians.amplitude / unit, atol=6e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gemmi_reads_what_the_module_promises(tmp_path, name):
    gaussians = mixture()
    structure = gemmi.read_structure(str(written(tmp_path, name, gaussians)))
    atoms = [site.atom for site in structure[0].all()]
    assert len(atoms) == structure[0].count_atom_sites() == 20
    assert {(a.name, a.element.name) for a in atoms} == {("UNK", "X")}
    position = torch.tensor([a.pos.tolist() for a in atoms]) - 32 * 3.54
    torch.testing.assert_close(position.float(), gaussians.mean, atol=1e-3, rtol=0)
    variance = gaussians.covariance.diagonal(dim1=1, dim2=2).mean(1)
    b_factor = torch.tensor([a.b_iso for a in atoms])
    expected = 8 * math.pi**2 * variance
    torch.testing.assert_close(
        b_factor, expected if "cif" in name else expected.clamp(max=999.99), atol=0.01, rtol=1e-5
    )
    occupancy = torch.tensor([a.occ for a in atoms])
    full = 1.0 if "cif" in name else 99.99
    torch.testing.assert_close(occupancy, full * gaussians.amplitude / gaussians.amplitude.max(), atol=6e-3, rtol=0)
    first = gaussians.covariance[0]
    assert atoms[0].aniso.u13 == pytest.approx(float(first[0, 2]), abs=1e-3)
    assert atoms[0].aniso.u22 == pytest.approx(float(first[1, 1]), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many.cif", "many.pdb"])
def test_120000_gaussians(tmp_path, name):
    """More than PDB's five columns of serial numbers count; every residue has a name of its own."""
    gaussians = mixture(120_000)
    path = written(tmp_path, name, gaussians)
    again, _ = read_pseudoatoms(path)
    torch.testing.assert_close(again.mean, gaussians.mean, atol=6e-4, rtol=0)
    structure = gemmi.read_structure(str(path))
    names = {(chain.name, str(residue.seqid)) for chain in structure[0] for residue in chain}
    assert len(names) == 120_000
    assert [len(chain) for chain in structure[0]] == 12 * [9999] + [12]


@pytest.mark.parametrize("target", [*NAMES, "again.ply"])
def test_conversion_keeps_the_map(tmp_path, target):
    grid = Grid(32, 4.0)
    gaussians = mixture(30, spread=15.0, widest=12.0, decades=1.0)
    write_gaussians(tmp_path / "g.ply", gaussians, grid)
    assert convert_model(tmp_path / "g.ply", tmp_path / target) == []
    convert_model(tmp_path / target, tmp_path / "back.ply")
    again, found = read_ply(tmp_path / "back.ply")
    assert found == grid
    before, after = voxelize(gaussians, grid), voxelize(again, grid)
    assert float((after - before).norm()) < 1e-3 * float(before.norm())
    assert main(["voxelize", str(tmp_path / target), "-o", str(tmp_path / "map.mrc")]) == 0
    volume, _ = read_map(tmp_path / "map.mrc")
    assert float((volume - before).norm()) < 1e-3 * float(before.norm())


def test_small_amplitudes_that_pdb_drops_are_named(tmp_path):
    gaussians = mixture(50, decades=0.0)
    gaussians.amplitude[:3] = 1e-6
    warnings = write_pseudoatoms(tmp_path / "g.pdb", gaussians, GRID, "emsplat test")
    assert len(warnings) == 1
    assert "3 of 50 amplitudes" in warnings[0]
    assert write_pseudoatoms(tmp_path / "g.cif", gaussians, GRID, "emsplat test") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.full((1, 3), 12_000.0)}, "coordinates"),
        ({"mean": torch.full((1, 3), -2_000.0)}, "coordinates"),
        ({"covariance": 1_100 * torch.eye(3)[None]}, "so wide"),
        ({"covariance": 1e-5 * torch.eye(3)[None]}, "narrow"),
    ],
)
def test_what_pdb_has_no_room_for_is_refused(tmp_path, change, message):
    values = {"mean": torch.zeros(1, 3), "covariance": torch.eye(3)[None], "amplitude": torch.ones(1)} | change
    with pytest.raises(OutputError, match=rf"{message}.*write a \.cif or \.ply") as caught:
        written(tmp_path, "g.pdb", Gaussians(**values))
    assert "\n" not in str(caught.value)
    written(tmp_path, "g.cif", Gaussians(**values))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("g.cif", "_emsplat_grid.box 64", "_emsplat_grid.box many", "'many'"),
        ("g.cif", "_emsplat_grid.pixel_size 3.54", "_emsplat_grid.pixel_size 0", "not understood"),
        ("g.cif", "_emsplat_amplitude.of_occupancy_one", "_emsplat_amplitude.other", "not understood"),
        ("g.cif", "_atom_site.Cartn_x", "_atom_site.other", "no _atom_site.Cartn_x"),
        ("g.cif", "_atom_site_anisotrop.id", "_atom_site_anisotrop.other", "not every pseudo-atom"),
        ("g.cif", "loop_\n_atom_site_anisotrop", "#", "not readable"),
        ("g.cif", "HETATM 2 X UNK . UNX A 1 . ", "HETATM 2 X UNK . UNX A 1 . nan ", "not readable"),
        ("g.pdb", "BOX 64", "BOX 6.4", "'6.4'"),
        ("g.pdb", "PIXEL SIZE 3.54", "PIXEL SIZE -1", "not understood"),
        ("g.pdb", "ANISOU    3", "REMARK    3", "ANISOU"),
        ("g.pdb", "HETATM", "REMARK", "not readable"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, old, new, message):
    path = written(tmp_path, name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        read_pseudoatoms(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@given(where=st.integers(0, 10**6), name=st.sampled_from(NAMES), cut=st.booleans(), byte=st.integers(0, 255))
def test_any_damage_is_an_input_error_or_gives_gaussians(tmp_path_factory, where, name, cut, byte):
    path = written(tmp_path_factory.mktemp("damaged"), name, mixture(4))
    content = bytearray(path.read_bytes())
    where %= len(content)
    content[where] = byte
    path.write_bytes(content[: where + 1] if cut else content)
    with contextlib.suppress(InputError):
        gaussians, grid = read_pseudoatoms(path)
        assert torch.isfinite(gaussians.covariance).all()
        assert grid.size > 0


def test_names_and_missing_files(tmp_path):
    with pytest.raises(OutputError, match=r"ends in \.cif"):
        write_pseudoatoms(tmp_path / "g.xyz", mixture(), GRID, "emsplat test")
    with pytest.raises(InputError, match="no such file"):
        read_gaussians(tmp_path / "none.cif")
    with pytest.raises(InputError, match=r"named \.ply, \.cif or \.pdb"):
        read_gaussians(tmp_path / "map.mrc")
    with pytest.raises(OutputError, match=r"ends in \.ply"):
        convert_model(tmp_path / "none.cif", tmp_path / "map.mrc")
    (tmp_path / "nowhere").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        written(tmp_path / "nowhere")


def test_same_gaussians_same_bytes(tmp_path):
    first, second = (written(tmp_path, name).read_bytes() for name in ("a.cif.gz", "b.cif.gz"))
    assert first == second
    assert gzip.decompress(first) == written(tmp_path, "c.cif").read_bytes()


@pytest.fixture(scope="module")
def run(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda run, *_: None)  # drawing takes longer than the run
        reconstruct(configure(ReconstructConfig, epochs=4, gaussians=400, threads=1), simulated(particles=300), folder)
    return folder


@pytest.mark.parametrize("name", ["model.cif", "model.pdb"])
def test_atoms_of_a_run_lie_on_its_map(run, tmp_path, name):
    """Where a program that knows MRC origin 0 looks for them, the map is dense; a voxel away it is less so."""
    convert_model(run / "run_class001.ply", tmp_path / name)
    volume, grid = read_map(run / "run_class001.mrc")
    structure = gemmi.read_structure(str(tmp_path / name))
    atoms = [site.atom for site in structure[0].all()]
    voxels = np.array([a.pos.tolist() for a in atoms])[:, ::-1].T / grid.pixel_size  # as z, y, x
    weight = np.array([a.occ for a in atoms])

    def density(offset):
        return np.average(map_coordinates(volume.numpy(), voxels + np.reshape(offset, (3, 1)), order=1), weights=weight)

    here = density((0, 0, 0))
    assert here > 3 * float(volume.std())
    for axis in np.eye(3):
        assert density(axis) < here
        assert density(-axis) < here


def test_an_atomic_model_is_the_density_that_the_simulation_makes_of_it(shared_data):
    """Adenylate kinase at 2 Å per pixel: same sum, same map up to 6 Å."""
    path = shared_data / "models" / "adk_open.pdb"
    grid = Grid(64, 2.0)
    atoms = place_atoms(read_atoms(path), grid)
    truth = truth_map(atoms, grid, 0.0)
    gaussians = gaussians_of(place_in_map(atoms, grid), grid)
    volume = voxelize(gaussians, grid)
    assert len(gaussians) == len(atoms)
    assert float(gaussians.amplitude.sum()) == pytest.approx(float(truth.sum()), rel=1e-3)
    curve = fsc_curve(volume, truth, grid)
    assert float(curve.value[1 : int(grid.length / 6)].min()) > 0.98
    low = torch.tensor([float(part.abs()[0, 0, 1]) for part in map(torch.fft.rfftn, (volume, truth))])
    assert float(low[0] / low[1]) == pytest.approx(1, abs=0.05)


def place_in_map(atoms, grid):
    """The same atoms in the frame of MRC origin 0."""
    return dataclasses.replace(atoms, position=atoms.position + grid.size // 2 * grid.pixel_size)


def test_b_factors_widen_and_narrow_atoms_are_kept_above_half_a_pixel(shared_data):
    path = shared_data / "bgal" / "8bk7_in_map_frame.cif.gz"
    atoms = read_atoms(path)
    gaussians, _ = read_pseudoatoms(path, Grid(256, 0.2))
    variance = gaussians.covariance[:, 0, 0]
    assert float(atoms.b_factor.max()) > 20
    added = variance - atoms.b_factor.float() / (8 * math.pi**2)
    carbon = added[atoms.element == 6]
    torch.testing.assert_close(carbon, torch.full_like(carbon, 16.88 / (8 * math.pi**2)), rtol=0.01, atol=1e-3)
    coarse, grid = read_gaussians(path, GRID)
    assert grid == GRID
    assert float(coarse.covariance[:, 0, 0].min()) >= (0.5 * 3.54) ** 2 * 0.999


def test_an_atomic_model_needs_a_grid(shared_data, tmp_path, capsys):
    """With it, `voxelize` gives the map that it was fitted into."""
    path = shared_data / "bgal" / "8bk7_in_map_frame.cif.gz"
    with pytest.raises(InputError, match="--box and --pixel-size of the map"):
        read_pseudoatoms(path)
    assert main(["voxelize", str(path), "-o", str(tmp_path / "none.mrc")]) == 2
    assert "--pixel-size" in capsys.readouterr().err
    words = ["--box", "64", "--pixel-size", "3.54", "-o", str(tmp_path / "map.mrc")]
    assert main(["voxelize", str(path), *words]) == 0
    volume, _ = read_map(tmp_path / "map.mrc")
    atoms = place_atoms(read_atoms(path), GRID, keep_frame=True)
    curve = fsc_curve(volume, truth_map(atoms, GRID, 60.0), GRID)
    assert float(curve.value[1:20].min()) > 0.98
