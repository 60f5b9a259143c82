"""Simulated particles: exact image formation, and the statistics that the options promise."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import pytest
import scipy.spatial
import torch
from torch import Tensor

from emsplat.config import SimulateConfig
from emsplat.errors import InputError, OutputError
from emsplat.io.atoms import Atoms, read_atoms
from emsplat.io.mrc import read_map
from emsplat.io.relion.read import read_star
from emsplat.maths import fourier
from emsplat.maths.geometry import euler_to_matrix
from emsplat.programs.simulate import simulate
from emsplat.simulation.images import (
    clean_images,
    form_factor,
    make_noise,
    make_scene,
    noise_filter,
    perturb_poses,
    project_atoms,
    random_optics,
    random_poses,
    truth_map,
)
from emsplat.simulation.protein import check_fits, place_atoms, procedural_protein
from emsplat.types import Grid, Poses

GRID = Grid(32, 2.0)
ELEMENTS = [6, 7, 8, 16, 26]


def some_atoms(count: int = 12, seed: int = 0) -> Atoms:
    generator = torch.Generator().manual_seed(seed)
    return Atoms(
        12 * torch.randn(count, 3, generator=generator, dtype=torch.float64).clamp(-2, 2),
        torch.tensor(ELEMENTS)[torch.arange(count) % len(ELEMENTS)],
        torch.rand(count, generator=generator, dtype=torch.float64),
        torch.zeros(count, dtype=torch.float64),
    )


def identity(dtype: torch.dtype = torch.float64) -> Poses:
    return Poses(torch.eye(3, dtype=dtype)[None], torch.zeros(1, 2, dtype=dtype))


def direct_sum(atoms: Atoms, positions: Tensor, grid: Grid, b_factor: float) -> Tensor:
    """Transform of atoms at (x, y) or (x, y, z), one exponential per atom and frequency."""
    dims = positions.shape[1]
    axes = torch.broadcast_tensors(*fourier.frequencies(grid, dims, torch.float64))
    k = torch.stack(axes).square().sum(0).sqrt()
    total = torch.zeros(k.shape, dtype=torch.complex128)
    for position, element, weight in zip(positions, atoms.element, atoms.weight, strict=True):
        phase = sum(-2 * math.pi * axis * x for axis, x in zip(axes, position.flip(0), strict=True))
        total += weight * form_factor(int(element), k) * torch.polar(torch.exp(-b_factor / 4 * k**2), phase)
    for axis in range(dims):
        total.select(axis, grid.size // 2).zero_()
    return total


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- image formation


def test_form_factor_is_gemmis():
    k = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    for element in ELEMENTS:
        expected = [gemmi.Element(element).c4322.calculate_sf(float(x) ** 2 / 4) for x in k]
        torch.testing.assert_close(form_factor(element, k).tolist(), expected, rtol=1e-6, atol=0)


# In float32 the phase of an atom at the edge, up to π size / 2 at Nyquist, is rounded: an error of 1e-5.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize("count", [1, 12])
def test_projection_equals_direct_sum(dtype, tolerance, count):
    atoms = some_atoms(count)
    poses = random_poses(SimulateConfig(particles=3)).to(dtype)
    spectra = project_atoms(atoms, poses, GRID, 40.0)
    assert spectra.dtype == dtype.to_complex()
    for rotation, shift, spectrum in zip(poses.rotation.double(), poses.shift.double(), spectra, strict=True):
        expected = direct_sum(atoms, atoms.position @ rotation[:2].T - shift, GRID, 40.0)
        assert relative_error(spectrum, expected) < tolerance


def test_map_equals_direct_sum():
    atoms = some_atoms()
    expected = fourier.irfft(direct_sum(atoms, atoms.position, GRID, 40.0), dims=3)
    assert relative_error(truth_map(atoms, GRID, 40.0, torch.float64), expected) < 1e-8
    assert relative_error(truth_map(atoms, GRID, 40.0), expected) < 1e-4


def test_map_is_the_analytic_density():
    # With the B factor that makes Nyquist negligible, the map samples a sum of 3D Gaussians.
    b_factor, grid = 400.0, Grid(40, 1.5)
    x = (torch.arange(40, dtype=torch.float64) - 20) * 1.5
    r2 = (x[:, None, None] - 4) ** 2 + (x[:, None] + 3) ** 2 + (x - 5) ** 2
    coefficients = gemmi.Element("C").c4322
    expected = sum(
        a * 1.5**3 * (4 * math.pi / b) ** 1.5 * torch.exp(-4 * math.pi**2 / b * r2)
        for a, b in zip(coefficients.a, np.array(coefficients.b) + b_factor, strict=True)
    )
    atom = Atoms(
        torch.tensor([[5.0, -3.0, 4.0]], dtype=torch.float64), torch.tensor([6]), torch.ones(1), torch.zeros(1)
    )
    torch.testing.assert_close(truth_map(atom, grid, b_factor, torch.float64), expected, rtol=0, atol=1e-6)


def test_map_summed_over_z_is_the_projection():
    atoms = some_atoms()
    image = fourier.irfft(project_atoms(atoms, identity(), GRID, 30.0))[0]
    volume = truth_map(atoms, GRID, 30.0, torch.float64)
    assert relative_error(volume.sum(0), image) < 1e-8
    at_zero = torch.stack([form_factor(element, torch.zeros(())) for element in atoms.element.tolist()])
    assert float(image.sum()) == pytest.approx(float(atoms.weight @ at_zero.double()), rel=1e-6)


def test_projection_along_another_axis_is_the_map_summed_over_it():
    # The image axes are the object's y and z, so the sum is over x.
    atoms = some_atoms()
    rotation = torch.tensor([[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]], dtype=torch.float64)
    image = fourier.irfft(project_atoms(atoms, Poses(rotation, torch.zeros(1, 2)), GRID, 30.0))[0]
    assert relative_error(truth_map(atoms, GRID, 30.0, torch.float64).sum(2), image) < 1e-8


def test_conventions_frame():
    # docs/conventions.md, 7: orientation test vector.
    angles = torch.deg2rad(torch.tensor([[30.0, 50.0, 70.0]], dtype=torch.float64))
    poses = Poses(euler_to_matrix(angles), torch.tensor([[3.0, -4.0]], dtype=torch.float64))
    atom = Atoms(
        torch.tensor([[20.0, -10.0, 5.0]], dtype=torch.float64), torch.tensor([6]), torch.ones(1), torch.zeros(1)
    )
    grid = Grid(64, 1.5)
    image = fourier.irfft(project_atoms(atom, poses, grid, 300.0))[0]
    x = (torch.arange(64, dtype=torch.float64) - 32) * 1.5
    centre = torch.stack([image.sum(0) @ x, image.sum(1) @ x]) / image.sum()
    torch.testing.assert_close(centre.tolist(), [-19.136, -6.225], atol=1e-3, rtol=0)
    peak = divmod(int(image.argmax()), 64)
    assert peak == (round(-6.225 / 1.5) + 32, round(-19.136 / 1.5) + 32)


def test_protein_is_bright_and_zero_frequency_carries_the_amplitude_contrast():
    config = SimulateConfig(particles=2)
    atoms, grid = procedural_protein(500), Grid(48, 2.0)
    poses, optics = random_poses(config), random_optics(config)
    images = clean_images(make_scene([atoms], grid, 60.0, dtype=torch.float64), poses, optics)
    plain = fourier.irfft(project_atoms(atoms, poses, grid, 60.0))
    torch.testing.assert_close(images.sum((1, 2)), 0.1 * plain.sum((1, 2)))
    assert (plain.sum((1, 2)) > 0).all()
    assert (plain.amax((1, 2)) > -10 * plain.amin((1, 2))).all()


def test_result_does_not_depend_on_threads():
    poses = random_poses(SimulateConfig(particles=5)).to(torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(project_atoms(some_atoms(), poses, GRID, 10.0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# --- noise and metadata


def radial_power(images: Tensor) -> Tensor:
    power = fourier.rfft(images.double()).abs().square().mean(0) / images[0].numel()
    shells = fourier.shell_index(images.shape[-1])
    weight = fourier.hermitian_weight(images.shape[-1]).double().expand(power.shape)
    total = torch.bincount(shells.ravel(), (power * weight).ravel())
    return (total / torch.bincount(shells.ravel(), weight.ravel()))[: images.shape[-1] // 2 + 1]


@pytest.mark.parametrize("noise", ["white", "coloured"])
def test_noise_spectrum(noise):
    images = make_noise(400, GRID, noise, torch.Generator().manual_seed(1))
    assert float(images.var()) == pytest.approx(1, rel=0.02)
    power = radial_power(images)
    if noise == "white":
        torch.testing.assert_close(power, torch.ones_like(power), rtol=0.15, atol=0)
    else:
        fraction = torch.arange(17) / 16
        expected = 14 ** (1 - fraction) ** 2
        ratio = power / expected
        torch.testing.assert_close(ratio / ratio.mean(), torch.ones_like(ratio), rtol=0.15, atol=0)


def test_noise_filter_has_unit_variance():
    power = noise_filter(GRID, "coloured").square()
    assert float((power * fourier.hermitian_weight(32)).sum() / 32**2) == pytest.approx(1, rel=1e-5)
    assert float(power[0, 0] / power[0, 16]) == pytest.approx(14, rel=1e-4)


def test_pose_error_has_the_wanted_angle():
    poses = random_poses(SimulateConfig(particles=4000))
    written = perturb_poses(poses, math.radians(3), torch.Generator().manual_seed(0))
    trace = (written.rotation @ poses.rotation.mT).diagonal(dim1=1, dim2=2).sum(1)
    angle = torch.arccos(((trace - 1) / 2).clamp(-1, 1))
    assert math.degrees(float(angle.square().mean().sqrt())) == pytest.approx(3, rel=0.05)
    assert torch.equal(written.shift, poses.shift)


def test_micrographs_share_their_optics():
    config = SimulateConfig(particles=250, defocus_spread=50)
    optics = random_optics(config)
    mean = (optics.defocus_u + optics.defocus_v) / 2
    assert len(optics.defocus_angle.unique()) == 3
    assert float(mean[:100].std()) == pytest.approx(50, rel=0.3)
    assert ((optics.defocus_u - optics.defocus_v) <= config.astigmatism).all()
    assert mean.min() > config.defocus_min - 250
    assert mean.max() < config.defocus_max + 250


# --- models


@pytest.fixture(scope="module")
def protein() -> Atoms:
    return procedural_protein()


def test_procedural_protein_looks_like_protein(protein):
    assert 3980 < len(protein) <= 4000
    position = protein.position.numpy()
    tree = scipy.spatial.cKDTree(position)
    assert tree.query(position, k=2)[0][:, 1].min() > 1.15
    # A bond ends at 1.9 Å; what is closer than 2.2 Å beyond that would be a clash.
    near = tree.query_pairs(2.2, output_type="ndarray")
    distance = np.linalg.norm(position[near[:, 0]] - position[near[:, 1]], axis=1)
    assert (distance > 1.9).mean() < 0.01
    # Rg of globular proteins is about 2.2 n^0.38 Å for n residues.
    assert np.sqrt((position**2).sum(1).mean()) == pytest.approx(2.2 * 500**0.38, rel=0.15)
    # Heavy atoms around an atom of the core, per Å³; this quartile is 0.046 in 1AON and 0.048 in 6VXX.
    local = [len(found) / (4 / 3 * math.pi * 8**3) for found in tree.query_ball_point(position, 8.0)]
    assert np.percentile(local, 75) == pytest.approx(0.047, rel=0.06)
    # Three unlike principal axes: no symmetry.
    assert np.min(np.diff(np.sqrt(np.linalg.eigvalsh(np.cov(position.T))))) > 1


def test_residues_are_left_handed(protein):
    position, element = protein.position.numpy(), protein.element.numpy()
    starts = [i for i in range(len(position) - 4) if tuple(element[i : i + 5]) == (7, 6, 6, 8, 6)]
    n, ca, c, cb = (position[[i + j for i in starts]] for j in (0, 1, 2, 4))
    bonded = np.linalg.norm(n - ca, axis=1) < 1.7
    chirality = np.einsum("ij,ij->i", np.cross(n - ca, c - ca), cb - ca)[bonded]
    assert (chirality > 0).mean() > 0.98


def test_procedural_protein_is_deterministic():
    a, b, other = (procedural_protein(200, seed) for seed in (1, 1, 2))
    assert torch.equal(a.position, b.position)
    assert a.position.shape != other.position.shape or not torch.equal(a.position, other.position)


PDB = """\
ATOM      1  N   ALA A   1      10.000   0.000   0.000  1.00 20.00           N
ATOM      2  CA AALA A   1      11.000   0.000   0.000  0.60 20.00           C
ATOM      3  CA BALA A   1      11.500   0.000   0.000  0.40 20.00           C
ATOM      4  HA  ALA A   1      12.000   0.000   0.000  1.00 20.00           H
ATOM      5  C   ALA A   1      12.000   1.000   0.000  0.00 20.00           C
HETATM    6  O   HOH A   2      20.000   0.000   0.000  1.00 20.00           O
HETATM    7 ZN    ZN A   3      10.000   4.000   0.000  1.00 20.00          ZN
"""


def test_read_atoms_drops_waters_and_hydrogens_and_weighs_conformers(tmp_path):
    (tmp_path / "a.pdb").write_text(PDB)
    atoms = read_atoms(tmp_path / "a.pdb")
    assert atoms.element.tolist() == [7, 6, 6, 30]
    torch.testing.assert_close(atoms.weight, torch.tensor([1, 0.6, 0.4, 1], dtype=torch.float64))
    structure = gemmi.read_structure(str(tmp_path / "a.pdb"))
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "a.cif"))
    torch.testing.assert_close(read_atoms(tmp_path / "a.cif").position, atoms.position)


def test_elements_of_simulation_files_are_repaired(tmp_path):
    names = ["N   ", "CA  ", "CB  ", "HB1 ", "CG  ", "SD  ", "HG  "]
    lines = [
        f"ATOM  {i:5d} {name} MET     1    {i:8.3f}   0.000   0.000  1.00  0.00      4AKE\n"
        for i, name in enumerate(names)
    ]
    (tmp_path / "md.pdb").write_text("".join(lines) + "END\n")
    assert read_atoms(tmp_path / "md.pdb").element.tolist() == [7, 6, 6, 6, 16]


def test_frames_of_a_model():
    atoms = some_atoms()
    centred = place_atoms(atoms, GRID)
    mass = atoms.weight * torch.tensor([gemmi.Element(e).weight for e in atoms.element.tolist()])
    torch.testing.assert_close((mass @ centred.position).tolist(), [0.0] * 3, atol=1e-9, rtol=0)
    atom = Atoms(torch.zeros(1, 3).double(), torch.tensor([6]), torch.ones(1), torch.zeros(1))
    corner = place_atoms(atom, GRID, keep_frame=True)
    volume = truth_map(corner, GRID, 200.0)
    assert int(volume.argmax()) == 0


# --- the programme

SMALL = SimulateConfig(box=48, pixel_size=2.0, particles=60, atoms=600, micrograph_particles=25)
CLEAN = dataclasses.replace(SMALL, snr=math.inf)


def run(config: SimulateConfig, folder: Path) -> Tensor:
    """The written images."""
    simulate(config, None, folder)
    return torch.from_numpy(np.array(mrcfile.read(folder / "particles.mrcs"), dtype=np.float32))


@pytest.mark.parametrize("noise", ["white", "coloured"])
def test_snr_is_reached(tmp_path, noise):
    config = dataclasses.replace(SMALL, snr=0.1, noise=noise)
    noisy = run(config, tmp_path / "noisy")
    clean = run(CLEAN, tmp_path / "clean") * math.sqrt(0.1)
    assert float((noisy - clean).var()) == pytest.approx(1, rel=0.03)
    assert float(clean.var() / (noisy - clean).var()) == pytest.approx(0.1, rel=0.03)


def test_images_agree_with_the_written_star_file_and_map(tmp_path):
    # The road back: images made from the poses and CTF that the STAR file gives, on the grey scale of the map.
    config = dataclasses.replace(CLEAN, shift=4.0)
    images = run(config, tmp_path)
    table = read_star(tmp_path / "particles.star")
    grid = Grid(config.box, config.pixel_size)
    atoms = procedural_protein(config.atoms, config.model_seed)
    scene = make_scene([atoms], grid, config.b_factor)
    again = clean_images(scene, table.poses.to(torch.float32), table.optics.to(torch.float32))
    volume, written_grid = read_map(tmp_path / "truth.mrc")
    gain = float(volume.sum() / truth_map(atoms, grid, config.b_factor).sum())
    assert written_grid == grid
    assert relative_error(gain * again, images) < 1e-3


def test_noise_only_keeps_the_noise_of_the_run(tmp_path):
    noisy, empty = (run(dataclasses.replace(SMALL, noise_only=flag), tmp_path / str(flag)) for flag in (False, True))
    clean = run(CLEAN, tmp_path / "clean") * math.sqrt(SMALL.snr)
    torch.testing.assert_close(noisy - empty, clean, atol=1e-5, rtol=1e-4)


def test_same_seed_same_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(dataclasses.replace(SMALL, seed=seed), None, tmp_path / name)
    for name in ("particles.mrcs", "particles.star", "truth.mrc"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    images = [mrcfile.read(tmp_path / name / "particles.mrcs") for name in "ac"]
    assert not np.allclose(*images)


@pytest.mark.parametrize("name", ["adk_open.pdb", "6vxx.pdb.gz"])
def test_real_models(shared_data, name):
    grid = Grid(64, 4.0)
    atoms = place_atoms(read_atoms(shared_data / "models" / name), grid)
    check_fits(atoms, grid)
    assert set(atoms.element.tolist()) <= {6, 7, 8, 16}
    image = fourier.irfft(project_atoms(atoms, identity(torch.float32), grid, 100.0))[0]
    assert relative_error(truth_map(atoms, grid, 100.0).sum(0), image) < 1e-4


# --- errors


def test_model_bigger_than_the_box(tmp_path):
    with pytest.raises(InputError, match=r"reaches .* more than half the box of 16 × 2 Å; use --box \d+") as caught:
        simulate(dataclasses.replace(SMALL, box=16), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fitting = int(str(caught.value).split("--box ")[1].split()[0])
    check_fits(procedural_protein(600), Grid(fitting, 2.0))
    with pytest.raises(InputError):
        check_fits(procedural_protein(600), Grid(fitting - 2, 2.0))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.pdb", None, "no such file"),
        ("empty.pdb", "END\n", "no atoms"),
        ("water.pdb", PDB.splitlines()[5] + "\n", "no atoms"),
        ("broken.cif", "data_x\nloop_\n_a.b\n_a.c\n1 2 3\n", "not readable"),
        ("odd.pdb", PDB.splitlines()[6].replace("ZN", "ES") + "\n", "no electron form factor for element Es"),
    ],
)
def test_bad_models(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_atoms(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"box": 47},
        {"snr": 0.0},
        {"particles": 0},
        {"defocus_min": 30000.0},
        {"noise_only": True, "snr": math.inf},
        {"amplitude_contrast": 2.0},
        {"atoms": 5},
    ],
)
def test_bad_settings(tmp_path, change):
    with pytest.raises(InputError, match=f"--{next(iter(change)).replace('_', '-')}"):
        simulate(dataclasses.replace(SMALL, **change), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_folder_is_kept(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(OutputError, match="--overwrite"):
        simulate(SMALL, None, tmp_path)
    simulate(dataclasses.replace(SMALL, overwrite=True), None, tmp_path)
    assert (tmp_path / "particles.star").is_file()
