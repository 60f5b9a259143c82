"""Particle images of an atomic model, by the Fourier slice theorem without interpolation.

The transform of point atoms is evaluated by a non-uniform FFT of the projected atom positions, multiplied by
the electron form factors. Nothing here uses the Gaussians of the reconstruction, so each can test the other.

Grey scale: the sum over a map, and over a projection, is the sum of the form factors at k = 0 (Å). The map
summed over z is the projection at identity pose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import finufft
import gemmi
import numpy as np
import scipy.spatial
import tomli_w
import torch
from jaxtyping import Complex, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emsplat import __version__
from emsplat.config import SimulateConfig
from emsplat.errors import InputError, OutputError
from emsplat.imaging.ctf import ctf
from emsplat.io.atoms import Atoms, read_atoms, scattering
from emsplat.io.files import replacing
from emsplat.io.mrc import write_map, writing_stack
from emsplat.io.paths import Names
from emsplat.io.relion import write_particles_star
from emsplat.maths import fourier
from emsplat.maths.geometry import quaternion_to_matrix, random_rotations
from emsplat.types import Grid, Optics, Poses

Array = NDArray[Any]


# --- atomic models ------------------------------------------------------------------------------------------


def place_atoms(atoms: Atoms, grid: Grid, keep_frame: bool = False) -> Atoms:
    """Atoms in house coordinates, whose origin is voxel ``size // 2`` of the grid.

    The centre of mass goes to the origin; with ``keep_frame`` coordinate 0 goes to voxel (0, 0, 0), as in a
    map with MRC origin 0.
    """
    if keep_frame:
        origin = torch.full((3,), grid.size // 2 * grid.pixel_size, dtype=torch.float64)
    else:
        numbers = atoms.element.tolist()
        masses = {number: gemmi.Element(number).weight for number in set(numbers)}
        mass = atoms.weight * torch.tensor([masses[number] for number in numbers])
        origin = mass @ atoms.position / mass.sum()
    return replace(atoms, position=atoms.position - origin)


def check_fits(atoms: Atoms, grid: Grid, name: str = "model", keep_frame: bool = False) -> None:
    """Check that the atoms stay inside the box in every orientation.

    Raises:
        InputError: they do not; says by how much and what would fit.
    """
    radius = float(atoms.position.norm(dim=1).max())
    excess = radius - grid.length / 2
    if excess <= 0:
        return
    fitting = f"use --box {2 * math.ceil(radius / grid.pixel_size)} or larger"
    if keep_frame:
        fitting = "with --keep-frame give --box and --pixel-size of the map that the model was fitted into"
    raise InputError(
        f"{name}: reaches {radius:.1f} Å from the box centre, {excess:.1f} Å more than half the box of "
        f"{grid.size} × {grid.pixel_size:g} Å; {fitting}"
    )


# Backbone and CB of an ideal α-helix (φ -57°, ψ -47°): element, x, y, z in Å. The axis is z; CA lies on x.
_BACKBONE = ((7, 1.388, -0.698, -0.921), (6, 2.278, 0, 0), (6, 1.483, 0.751, 1.063), (8, 1.796, 0.665, 2.251))
_CB = (6, 3.177, 0.982, -0.754)
_TURN, _RISE = math.radians(99.43), 1.556  # per residue

# Side chains beyond CB in rotamers that occur in helices: element, index of the atom it is bound to (N, CA
# and CB are 0, 1, 2, the rest follow) and torsion angle in degrees. In order: A S V L K E M Q D R.
_SIDE_CHAINS: tuple[tuple[tuple[int, int, float], ...], ...] = (
    (),
    ((8, 2, -65),),
    ((6, 2, 175), (6, 2, -65)),
    ((6, 2, -65), (6, 3, 175), (6, 3, -65)),
    ((6, 2, -65), (6, 3, 180), (6, 4, 180), (7, 5, 180)),
    ((6, 2, -65), (6, 3, 180), (8, 4, -10), (8, 4, 170)),
    ((6, 2, -65), (16, 3, 180), (6, 4, 70)),
    ((6, 2, -65), (6, 3, 180), (8, 4, -10), (7, 4, 170)),
    ((6, 2, -70), (8, 3, -15), (8, 3, 165)),
    ((6, 2, -65), (6, 3, 180), (7, 4, 180), (6, 5, 180), (7, 6, 0), (7, 6, 180)),
)
_RESIDUE_ATOMS = 5 + sum(map(len, _SIDE_CHAINS)) / len(_SIDE_CHAINS)
# Å³; the mean residue above weighs 115.7 Da with its hydrogens, and protein has 1.35 g/cm³ = 0.813 Da/Å³.
_RESIDUE_VOLUME = 115.7 / 0.813


def _bond(a: Array, b: Array, c: Array, torsion: float) -> Array:
    """Position of an atom 1.5 Å from c, at an angle of 112° to b and ``torsion`` degrees about b-c from a."""
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    angle, turn = math.radians(112), math.radians(torsion)
    side = math.cos(turn) * np.cross(normal, along) + math.sin(turn) * normal
    position: Array = c + 1.5 * (math.sin(angle) * side - math.cos(angle) * along)
    return position


def _residue(side_chain: tuple[tuple[int, int, float], ...]) -> Array:
    """Atoms (element, x, y, z) of a residue of a helix along z: N, CA, C, O, CB, side chain; shape (a, 4)."""
    chain = [np.array(row[1:], float) for row in (_BACKBONE[0], _BACKBONE[1], _CB)]
    parents = [-1, 0, 1]
    for _, parent, torsion in side_chain:
        middle = parents[parent]
        chain.append(_bond(chain[parents[middle]], chain[middle], chain[parent], torsion))
        parents.append(parent)
    tail = [(element, *position) for (element, _, _), position in zip(side_chain, chain[3:], strict=True)]
    return np.array([*_BACKBONE, _CB, *tail], float)


_RESIDUES = tuple(map(_residue, _SIDE_CHAINS))


def _helix(length: int, first: Array, axis: Array, turn: float, rng: np.random.Generator) -> Iterator[Array]:
    """Residues of a helix of random sequence that starts at ``first`` and runs along a unit vector."""
    helper = np.eye(3)[np.argmin(np.abs(axis))]
    x = np.cross(helper, axis) / np.linalg.norm(np.cross(helper, axis))
    frame = np.stack([x, np.cross(axis, x), axis])
    for i, kind in enumerate(rng.integers(len(_RESIDUES), size=length)):
        c, s = math.cos(turn + i * _TURN), math.sin(turn + i * _TURN)
        residue = _RESIDUES[kind].copy()
        screw = residue[:, 1:] @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + [0, 0, i * _RISE]
        residue[:, 1:] = screw @ frame + first
        yield residue


def _layers(half: float, rng: np.random.Generator) -> Iterator[tuple[int, Array]]:
    """Helix number and residue of layers of parallel helices that fill a cube of 2 ``half`` Å.

    Each layer is turned by about 50° against the one below, and helices run up or down at random.
    """
    spacing = math.sqrt(_RESIDUE_VOLUME / _RISE)
    count = math.ceil(half / spacing)
    direction, helix = rng.uniform(0, 2 * math.pi), 0
    for z in spacing * (np.arange(-count, count + 1) + rng.uniform()):
        direction += math.radians(rng.uniform(35, 65))
        along = np.array([math.cos(direction), math.sin(direction), 0])
        across = np.array([-along[1], along[0], 0])
        for offset in spacing * (np.arange(-count, count + 1) + rng.uniform()):
            axis = along * rng.choice([-1, 1])
            first = across * offset - axis * (half + rng.uniform(0, 5)) + [0, 0, z]
            for residue in _helix(math.ceil(2 * half / _RISE), first, axis, rng.uniform(0, 2 * math.pi), rng):
                yield helix, residue
            helix += 1


def _relax(position: Array, helix: Array, residue: Array, backbone: Array, closest: float = 3.3) -> Array:
    """Push atoms closer than ``closest`` Å apart, while springs keep each helix and each residue in shape."""
    pairs = scipy.spatial.cKDTree(position).query_pairs(6.0, output_type="ndarray")
    i, j = pairs[np.lexsort(pairs.T)].T
    kept = (residue[i] == residue[j]) | ((helix[i] == helix[j]) & backbone[i] & backbone[j])
    rest = np.where(kept, np.linalg.norm(position[i] - position[j], axis=1), closest)
    velocity = np.zeros_like(position)
    # Gradient descent with momentum: a minimiser from a library spends most of its time in threads that wait.
    for _ in range(150):
        difference = position[i] - position[j]
        distance = np.sqrt((difference**2).sum(1)) + 1e-9
        strain = np.where(kept | (distance < rest), rest / distance - 1, 0.0)
        force = (strain[:, None] * difference).T
        push = [np.bincount(i, f, len(position)) - np.bincount(j, f, len(position)) for f in force]
        velocity = 0.9 * velocity + 0.05 * np.stack(push, axis=1)
        position = position + velocity
    return position


def procedural_protein(atoms: int = 4000, seed: int = 0) -> Atoms:
    """A protein-like globule made by code: layers of α-helices with side chains, at the density of protein.

    Its outline is the union of three overlapping balls, so that it has clefts and no symmetry. Whole residues
    are kept, so there are at most ``atoms`` atoms and fewer by less than a residue. The centre of mass is the
    origin.

    Raises:
        InputError: fewer than 100 atoms are asked for.
    """
    if atoms < 100:
        raise InputError(f"--atoms {atoms}: too few for a protein; use --atoms 100 or more")
    rng = np.random.default_rng(seed)
    ball = (3 / (4 * math.pi) * atoms / _RESIDUE_ATOMS * _RESIDUE_VOLUME) ** (1 / 3)
    centres = rng.standard_normal((3, 3))
    centres *= 0.6 * ball / np.linalg.norm(centres, axis=1, keepdims=True)
    radii = rng.uniform(0.8, 1.1, 3)
    helices, residues = zip(*_layers(1.6 * ball, rng), strict=True)
    alpha = np.stack([residue[1, 1:] for residue in residues])
    order = np.argsort(np.min(np.linalg.norm(alpha[:, None] - centres, axis=2) / radii, axis=1))
    sizes = np.array([len(residue) for residue in residues])
    chosen = order[np.cumsum(sizes[order]) <= atoms]

    sites = np.concatenate([residues[row] for row in chosen])
    residue = np.repeat(chosen, sizes[chosen])
    backbone = np.concatenate([np.arange(size) < 5 for size in sizes[chosen]])
    position = _relax(sites[:, 1:], np.array(helices)[residue], residue, backbone)
    protein = Atoms(
        torch.from_numpy(position),
        torch.from_numpy(sites[:, 0]).long(),
        torch.ones(len(sites), dtype=torch.float64),
        torch.zeros(len(sites), dtype=torch.float64),
    )
    return place_atoms(protein, Grid(2, 1.0))


# --- image formation ----------------------------------------------------------------------------------------


def form_factor(element: int, k: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Electron form factor in Å of an element (atomic number) at spatial frequencies |k| in 1/Å."""
    terms = [a * torch.exp(-b / 4 * k**2) for a, b in zip(*scattering(element), strict=True)]
    return torch.stack(terms).sum(0)


@dataclass(frozen=True)
class _Pair:
    """Two elements that share a transform: their weights are its real and imaginary strengths.

    Each element alone has a Hermitian transform, hence with F the transform of the strengths and
    g = (f₁ - i f₂)/2 (``form``) the scattering of both is F(k) g(k) + conj(F(-k) g(k)).
    """

    position: Array  # Å, (atoms, 3)
    strength: Array  # (atoms,)
    form: Array  # rfft half space, zero on the Nyquist planes


def _radius(grid: Grid, dims: int = 2, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*zy k"]:
    """|k| in 1/Å of each rfft coefficient."""
    return cast(Tensor, sum(axis**2 for axis in fourier.frequencies(grid, dims, dtype))).sqrt()


def _pairs(atoms: Atoms, grid: Grid, b_factor: float, dims: int, dtype: torch.dtype) -> Iterator[_Pair]:
    """The atoms by pairs of elements, with form factors and B factor on the rfft half space."""
    k = _radius(grid, dims, dtype)
    envelope = torch.exp(-b_factor / 4 * k**2)
    for axis in range(dims):
        envelope.select(axis, grid.size // 2).zero_()
    numbers = sorted(set(atoms.element.tolist()))
    for first, second in zip(numbers[::2], [*numbers[1::2], None], strict=False):
        rows = atoms.element == first
        strength = rows.to(torch.complex128)
        form = envelope * form_factor(first, k) / 2 + 0j
        if second is not None:
            strength = strength + 1j * (atoms.element == second)
            form = form - 0.5j * envelope * form_factor(second, k)
        rows = strength != 0
        strength = (strength * atoms.weight)[rows].to(form.dtype)
        yield _Pair(atoms.position[rows].to(dtype).numpy(), strength.numpy(), form.numpy())


def _plan(grid: Grid, dims: int, dtype: torch.dtype) -> Any:
    """A one-threaded type 1 transform with modes in FFT order."""
    name, eps = ("complex64", 2e-5) if dtype == torch.float32 else ("complex128", 1e-9)
    return finufft.Plan(1, (grid.size,) * dims, eps=eps, isign=-1, dtype=name, nthreads=1, modeord=1, upsampfac=1.25)


def _spectrum(plan: Any, pairs: Iterable[_Pair], axes: Array, shift: Array, grid: Grid) -> Array:
    """Transform of atoms at ``axes`` p - ``shift``, in rfft order; ``axes`` are 2 or 3 rows of a rotation."""
    half = np.arange(grid.size // 2 + 1)
    opposite = np.ix_(*[-np.arange(grid.size)] * (len(axes) - 1), -half)
    total: Any = 0
    for pair in pairs:
        points = (2 * math.pi / grid.length) * (axes @ pair.position.T - shift[:, None])
        plan.setpts(*points[::-1])
        modes = plan.execute(pair.strength)
        total = total + modes[..., half] * pair.form + np.conj(modes[opposite] * pair.form)
    return np.asarray(total)


def project_atoms(atoms: Atoms, poses: Poses, grid: Grid, b_factor: float) -> Complex[Tensor, "p y k"]:
    """Transforms (as `fourier.rfft`) of the projections of the atoms, zero at the Nyquist frequency.

    Point p appears at (A p)[:2] - shift, folded back into the box if outside. ``b_factor`` in Å². Precision
    follows the poses: relative error about 1e-5 in float32 and 1e-9 in float64. Uses as many threads as torch
    does; the result does not depend on their number.
    """
    dtype = poses.rotation.dtype
    pairs = list(_pairs(atoms, grid, b_factor, 2, dtype))
    axes, shifts = poses.rotation[:, :2].numpy(), poses.shift.to(dtype).numpy()
    out = np.empty((len(poses), grid.size, grid.size // 2 + 1), pairs[0].form.dtype)

    def work(rows: Array) -> None:
        plan = _plan(grid, 2, dtype)
        for row in rows:
            out[row] = _spectrum(plan, pairs, axes[row], shifts[row], grid)

    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, np.array_split(np.arange(len(poses)), workers)))
    return torch.from_numpy(out)


def truth_map(atoms: Atoms, grid: Grid, b_factor: float, dtype: torch.dtype = torch.float32) -> Float[Tensor, "z y x"]:
    """The map whose projections `project_atoms` gives, on the same grey scale; zero at Nyquist."""
    identity = torch.eye(3, dtype=dtype).numpy()
    pairs = _pairs(atoms, grid, b_factor, 3, dtype)
    spectrum = _spectrum(_plan(grid, 3, dtype), pairs, identity, np.zeros_like(identity[0]), grid)
    return fourier.irfft(torch.from_numpy(spectrum), dims=3)


def noise_filter(grid: Grid, noise: str) -> Float[Tensor, "y k"]:
    """Amplitude of the noise in rfft order, with mean power 1 over the full transform.

    "white" is flat. "coloured" has the power 14^((1 - k/k_Nyquist)²) and is constant beyond Nyquist: 14 times
    more at k = 0 than at Nyquist, as in images of particles in ice.
    """
    fraction = (_radius(grid) * grid.nyquist).clamp(max=1)
    power = 14 ** (1 - fraction) ** 2 if noise == "coloured" else torch.ones_like(fraction)
    weight = fourier.hermitian_weight(grid.size)
    return (power / ((power * weight).sum() / grid.size**2)).sqrt()


# --- the particles ------------------------------------------------------------------------------------------


def _generator(seed: int, stream: int) -> torch.Generator:
    """Independent random numbers for each purpose, so that an option does not change the draws of another."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def random_poses(config: SimulateConfig) -> Poses:
    """Uniform orientations and normal shifts of ``config.shift`` Å, float64."""
    rotation = random_rotations(config.particles, _generator(config.seed, 0))
    shift = torch.randn(config.particles, 2, generator=_generator(config.seed, 1), dtype=torch.float64)
    return Poses(rotation, config.shift * shift)


def perturb_poses(poses: Poses, error: float, generator: torch.Generator) -> Poses:
    """The poses turned about random axes by normal angles of root-mean-square ``error`` radians."""
    axis = torch.randn(len(poses), 3, generator=generator, dtype=poses.rotation.dtype)
    half = error / 2 * torch.randn(len(poses), 1, generator=generator, dtype=poses.rotation.dtype)
    axis = torch.nn.functional.normalize(axis, dim=-1)
    turn = quaternion_to_matrix(torch.cat([torch.cos(half), torch.sin(half) * axis], dim=-1))
    return Poses(turn @ poses.rotation, poses.shift)


def random_optics(config: SimulateConfig) -> Optics:
    """Optics of each particle, float64; a micrograph shares astigmatism and, up to the spread, defocus."""
    count = config.particles
    micrograph = torch.arange(count) // config.micrograph_particles
    generator = _generator(config.seed, 2)
    defocus, astigmatism, angle = torch.rand(3, int(micrograph[-1]) + 1, generator=generator, dtype=torch.float64)[
        :, micrograph
    ]
    mean = config.defocus_min + (config.defocus_max - config.defocus_min) * defocus
    mean = mean + config.defocus_spread * torch.randn(count, generator=generator, dtype=torch.float64)

    def constant(value: float) -> Float[Tensor, " p"]:
        return torch.full((count,), value, dtype=torch.float64)

    return Optics(
        voltage=constant(config.voltage),
        cs=constant(config.cs),
        amplitude_contrast=constant(config.amplitude_contrast),
        defocus_u=mean + config.astigmatism / 2 * astigmatism,
        defocus_v=mean - config.astigmatism / 2 * astigmatism,
        defocus_angle=math.pi * angle,
        phase_shift=constant(math.radians(config.phase_shift)),
        b_factor=constant(0.0),
        scale=constant(1.0),
    )


def random_halves(count: int, generator: torch.Generator) -> Int[Tensor, " p"]:
    """Half-set 1 or 2 of each particle, equally many of each."""
    return 1 + torch.randperm(count, generator=generator) % 2


def clean_images(atoms: Atoms, poses: Poses, optics: Optics, grid: Grid, b_factor: float) -> Float[Tensor, "p y x"]:
    """CTF-modulated images without noise, on the grey scale of `truth_map`."""
    return fourier.irfft(project_atoms(atoms, poses, grid, b_factor) * ctf(optics, grid))


def make_noise(count: int, grid: Grid, noise: str, generator: torch.Generator) -> Float[Tensor, "p y x"]:
    """Normal noise of variance 1 with the spectrum of `noise_filter`."""
    white = torch.randn(count, grid.size, grid.size, generator=generator)
    return fourier.irfft(fourier.rfft(white) * noise_filter(grid, noise)) if noise == "coloured" else white


def _chunks(rows: Int[Tensor, " p"], size: int) -> Iterator[Int[Tensor, " q"]]:
    """The rows in runs whose images together have about four million pixels."""
    step = max(1, 2**22 // size**2)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def signal_variance(atoms: Atoms, poses: Poses, optics: Optics, grid: Grid, b_factor: float) -> float:
    """Variance of all pixels of the clean images, from at most 1,000 images spread evenly over the stack."""
    rows = torch.linspace(0, len(poses) - 1, min(len(poses), 1000)).long()
    moments = torch.zeros(2, dtype=torch.float64)
    for chunk in _chunks(rows, grid.size):
        images = clean_images(atoms, poses[chunk], optics[chunk], grid, b_factor).double()
        moments += torch.stack([images.sum(), images.square().sum()])
    mean, square = (moments / (len(rows) * grid.size**2)).tolist()
    return float(square - mean**2)


def _check_config(config: SimulateConfig) -> None:
    """Refuse settings that describe no experiment."""
    for name in ("particles", "pixel_size", "snr", "voltage", "micrograph_particles"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected a number above 0")
    for name in ("cs", "shift", "defocus_spread", "astigmatism", "pose_error"):
        if not getattr(config, name) >= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected 0 or more")
    if config.box < 8 or config.box % 2:
        raise InputError(f"--box {config.box}: expected an even number of at least 8 pixels; use --box 96")
    if config.defocus_min > config.defocus_max:
        raise InputError(
            f"--defocus-min {config.defocus_min:g} is above --defocus-max {config.defocus_max:g}; swap them"
        )
    if not 0 <= config.amplitude_contrast <= 1:
        raise InputError(f"--amplitude-contrast {config.amplitude_contrast}: expected a fraction from 0 to 1")
    if config.noise_only and math.isinf(config.snr):
        raise InputError("--noise-only with --snr inf gives empty images; give a finite --snr, such as 0.05")


def _prepare_folder(output: Path, overwrite: bool) -> None:
    """Make the folder, or check that nothing in it would be lost."""
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output}: the folder is not empty; choose another with -o, or use --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error


def _load_model(config: SimulateConfig, model: Path | None, grid: Grid) -> Atoms:
    """The atoms of the file, or else of the procedural protein, in house coordinates and inside the box."""
    if model is None:
        atoms = procedural_protein(config.atoms, config.model_seed)
    else:
        atoms = place_atoms(read_atoms(model), grid, config.keep_frame)
    check_fits(atoms, grid, str(model or "procedural protein"), model is not None and config.keep_frame)
    return atoms


def simulate(config: SimulateConfig, model: Path | None, output: Path) -> Path:
    """Write particles.mrcs, particles.star, truth.mrc and simulate.toml into ``output``; returns the STAR
    file.

    The noise has standard deviation 1, as RELION normalises the background, and the truth map has the grey
    scale of the images: its projection is the image without CTF and noise. With ``snr = inf`` the signal has
    standard deviation 1.

    Raises:
        InputError: a setting is impossible, the model is unusable or does not fit into the box.
        OutputError: the folder is not empty or cannot be written.
    """
    _check_config(config)
    grid = Grid(config.box, config.pixel_size)
    atoms = _load_model(config, model, grid)
    _prepare_folder(output, config.overwrite)

    poses, optics = random_poses(config), random_optics(config)
    drawn = poses.to(torch.float32), optics.to(torch.float32)
    variance = signal_variance(atoms, *drawn, grid, config.b_factor)
    noiseless = math.isinf(config.snr)
    gain = math.sqrt((1 if noiseless else config.snr) / variance)

    generator = _generator(config.seed, 3)
    with writing_stack(output / "particles.mrcs", config.particles, grid, config.dtype) as write:
        for rows in _chunks(torch.arange(config.particles), grid.size):
            images = torch.zeros(len(rows), grid.size, grid.size)
            if not config.noise_only:
                images += gain * clean_images(atoms, drawn[0][rows], drawn[1][rows], grid, config.b_factor)
            if not noiseless:
                images += make_noise(len(rows), grid, config.noise, generator)
            write(images)
    write_map(output / "truth.mrc", gain * truth_map(atoms, grid, config.b_factor), grid.pixel_size)
    written = perturb_poses(poses, math.radians(config.pose_error), _generator(config.seed, 4))
    star = output / "particles.star"
    file = Names(star).below(output, output / "particles.mrcs")
    write_particles_star(
        star,
        [f"{i + 1:06d}@{file}" for i in range(config.particles)],
        [f"micrograph_{i // config.micrograph_particles + 1:05d}.mrc" for i in range(config.particles)],
        written,
        optics,
        grid,
        random_halves(config.particles, _generator(config.seed, 5)) if config.half_sets else None,
    )
    settings = {
        "program": f"emsplat {__version__}",
        "model": str(model or "procedural"),
        "atoms": len(atoms),
        "signal_variance": variance,
        "gain": gain,
        "settings": asdict(config),
    }
    with replacing(output / "simulate.toml") as temporary:
        temporary.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return star
