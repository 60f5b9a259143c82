"""Images of atoms, by the Fourier slice theorem without interpolation, and the poses, optics and noise that they have.

The transform of point atoms is evaluated by a non-uniform FFT of the projected atom positions, multiplied by the
electron form factors. Nothing here uses the Gaussians of the reconstruction, so each can test the other.

Grey scale: the sum over a map, and over a projection, is the sum of the form factors at k = 0 (Å). The map summed over
z is the projection at identity pose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import finufft
import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from emsplat.config import SimulateConfig
from emsplat.imaging.ctf import ctf
from emsplat.io.atoms import Atoms, scattering
from emsplat.maths import fourier
from emsplat.maths.geometry import quaternion_to_matrix, random_rotations
from emsplat.simulation.protein import Array
from emsplat.types import Grid, Optics, Poses


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
    form: Array  # rfft half space, zero on the Nyquist planes; that of all structures of a scene


@dataclass(frozen=True)
class Scene:
    """Structures on a grid, ready to be transformed in two or three dimensions."""

    structures: tuple[tuple[_Pair, ...], ...]
    grid: Grid
    dims: int
    dtype: torch.dtype


def _radius(grid: Grid, dims: int = 2, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*zy k"]:
    """|k| in 1/Å of each rfft coefficient."""
    return cast(Tensor, sum(axis**2 for axis in fourier.frequencies(grid, dims, dtype))).sqrt()


def make_scene(
    structures: Sequence[Atoms], grid: Grid, b_factor: float, dims: int = 2, dtype: torch.dtype = torch.float32
) -> Scene:
    """The atoms of each structure by pairs of elements, with form factors and B factor (Å²) on the rfft half space."""
    k = _radius(grid, dims, dtype)
    envelope = torch.exp(-b_factor / 4 * k**2)
    for axis in range(dims):
        envelope.select(axis, grid.size // 2).zero_()
    numbers = sorted({number for atoms in structures for number in set(atoms.element.tolist())})
    forms = []
    for first, second in zip(numbers[::2], [*numbers[1::2], None], strict=False):
        form = envelope * form_factor(first, k) / 2 + 0j
        if second is not None:
            form = form - 0.5j * envelope * form_factor(second, k)
        forms.append((first, second, form.numpy()))

    def pairs(atoms: Atoms) -> Iterator[_Pair]:
        for first, second, form in forms:
            rows = atoms.element == first
            strength = rows.to(torch.complex128)
            if second is not None:
                strength = strength + 1j * (atoms.element == second)
            rows = strength != 0
            if rows.any():
                strength = (strength * atoms.weight)[rows].to(dtype.to_complex())
                yield _Pair(atoms.position[rows].to(dtype).numpy(), strength.numpy(), form)

    return Scene(tuple(tuple(pairs(atoms)) for atoms in structures), grid, dims, dtype)


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


def project_scene(scene: Scene, poses: Poses, which: Int[Tensor, " p"] | None = None) -> Complex[Tensor, "p y k"]:
    """Transforms (as `fourier.rfft`) of projections of the structures ``which`` (the first without it) of a
    two-dimensional scene, zero at the Nyquist frequency.

    Point p appears at (A p)[:2] - shift, folded back into the box if outside. Precision follows the scene: relative
    error about 1e-5 in float32 and 1e-9 in float64. Uses as many threads as torch does; the result does not depend on
    their number.
    """
    grid, dtype = scene.grid, scene.dtype
    axes, shifts = poses.rotation[:, :2].to(dtype).numpy(), poses.shift.to(dtype).numpy()
    structure = [0] * len(poses) if which is None else which.tolist()
    complex_name = "complex64" if dtype == torch.float32 else "complex128"
    out = np.empty((len(poses), grid.size, grid.size // 2 + 1), complex_name)

    def work(rows: Array) -> None:
        plan = _plan(grid, 2, dtype)
        for row in rows:
            out[row] = _spectrum(plan, scene.structures[structure[row]], axes[row], shifts[row], grid)

    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, np.array_split(np.arange(len(poses)), workers)))
    return torch.from_numpy(out)


def project_atoms(atoms: Atoms, poses: Poses, grid: Grid, b_factor: float) -> Complex[Tensor, "p y k"]:
    """`project_scene` of one structure, in the precision of the poses; ``b_factor`` in Å²."""
    return project_scene(make_scene([atoms], grid, b_factor, dtype=poses.rotation.dtype), poses)


def truth_maps(scene: Scene) -> Iterator[Float[Tensor, "z y x"]]:
    """The map of each structure of a three-dimensional scene, whose projections `project_scene` gives, on the same grey
    scale; zero at Nyquist. Threads as there."""
    identity = torch.eye(3, dtype=scene.dtype).numpy()

    def spectrum(pairs: tuple[_Pair, ...]) -> Array:
        return _spectrum(_plan(scene.grid, 3, scene.dtype), pairs, identity, np.zeros_like(identity[0]), scene.grid)

    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(scene.structures), workers):  # no more at once: each takes memory
            for found in pool.map(spectrum, scene.structures[start : start + workers]):
                yield fourier.irfft(torch.from_numpy(found), dims=3)


def truth_map(atoms: Atoms, grid: Grid, b_factor: float, dtype: torch.dtype = torch.float32) -> Float[Tensor, "z y x"]:
    """The one of `truth_maps`; ``b_factor`` in Å²."""
    return next(truth_maps(make_scene([atoms], grid, b_factor, 3, dtype)))


def noise_filter(grid: Grid, noise: str) -> Float[Tensor, "y k"]:
    """Amplitude of the noise in rfft order, with mean power 1 over the full transform.

    "white" is flat. "coloured" has the power 14^((1 - k/k_Nyquist)²) and is constant beyond Nyquist: 14 times
    more at k = 0 than at Nyquist, as in images of particles in ice.
    """
    fraction = (_radius(grid) * grid.nyquist).clamp(max=1)
    power = 14 ** (1 - fraction) ** 2 if noise == "coloured" else torch.ones_like(fraction)
    weight = fourier.hermitian_weight(grid.size)
    return (power / ((power * weight).sum() / grid.size**2)).sqrt()


def drawn_from(seed: int, stream: int) -> torch.Generator:
    """Independent random numbers for each purpose, so that an option does not change the draws of another."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def random_poses(config: SimulateConfig) -> Poses:
    """Uniform orientations and normal shifts of ``config.shift`` Å, float64."""
    rotation = random_rotations(config.particles, drawn_from(config.seed, 0))
    shift = torch.randn(config.particles, 2, generator=drawn_from(config.seed, 1), dtype=torch.float64)
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
    generator = drawn_from(config.seed, 2)
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


def clean_images(
    scene: Scene, poses: Poses, optics: Optics, which: Int[Tensor, " p"] | None = None
) -> Float[Tensor, "p y x"]:
    """CTF-modulated images without noise, on the grey scale of `truth_maps`; structures as for `project_scene`."""
    return fourier.irfft(project_scene(scene, poses, which) * ctf(optics, scene.grid))


def make_noise(count: int, grid: Grid, noise: str, generator: torch.Generator) -> Float[Tensor, "p y x"]:
    """Normal noise of variance 1 with the spectrum of `noise_filter`."""
    white = torch.randn(count, grid.size, grid.size, generator=generator)
    return fourier.irfft(fourier.rfft(white) * noise_filter(grid, noise)) if noise == "coloured" else white


def chunks(rows: Int[Tensor, " p"], size: int) -> Iterator[Int[Tensor, " q"]]:
    """The rows in runs whose images together have about four million pixels."""
    step = max(1, 2**22 // size**2)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def signal_variance(
    scene: Scene, poses: Poses, optics: Optics, which: Int[Tensor, " p"], contrast: Float[Tensor, " p"]
) -> float:
    """Variance of all pixels of the clean images, from at most 1,000 images spread evenly over the stack; ``contrast``
    is the factor of each image."""
    rows = torch.linspace(0, len(poses) - 1, min(len(poses), 1000)).long()
    moments = torch.zeros(2, dtype=torch.float64)
    for chunk in chunks(rows, scene.grid.size):
        images = clean_images(scene, poses[chunk], optics[chunk], which[chunk]).double()
        images *= contrast[chunk, None, None]
        moments += torch.stack([images.sum(), images.square().sum()])
    mean, square = (moments / (len(rows) * scene.grid.size**2)).tolist()
    return float(square - mean**2)
