"""One pass over the particles: Fourier slices inserted into a grid, and what follows from the sums alone.

With slices S_i, CTFs C_i and noise precision 1/σ², the images' negative log-likelihood of a map V is

    ½ Σ_i |Y_i - C_i S_i V|² / σ² = ½ VᵀKV - bᵀV + const,   b = Σ S_iᵀ C_i Y_i / σ²,   K = Σ S_iᵀ C_i² S_i / σ².

Known poses make K a convolution: its kernel K(τ) is the inverse transform of Σ C_i²/σ² placed on the slices. So b and
K(τ) are all that any later step needs, and no image is looked at twice (`NormalEquations`).

Off-grid points are spread over 4³ voxels of a grid 1.5 times as fine as the transform of the box, with a Kaiser-Bessel
window (Jackson et al. 1991; width and shape after Beatty et al. 2005), and the window's own transform is divided out of
b(x) and K(τ) afterwards. Against exact sums the error of b is below 0.4 % everywhere in the box, and that of K below
1e-3 of its peak at lags up to half the box; beyond 0.6 of it, where only the ends of a particle that fills the
box could meet, K is faded out (tests).

Elements of a symmetry that carry the grid onto itself need no slices of their own: the sums are turned, once and
exactly. That is all of D2 and O, and 12 of the 60 elements of I.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.device import CPU
from emsplat.errors import InputError
from emsplat.imaging.ctf import in_image, observe, stretch_of
from emsplat.io.tensors import write_tensors
from emsplat.kernels import backend
from emsplat.maths.fourier import shell_index, slabs
from emsplat.maths.groups import C1, Symmetry
from emsplat.parallel import ALONE, World
from emsplat.particles.copies import image_marks
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import Particles, ParticleStack
from emsplat.sums.equations import NormalEquations, combined, relative_gains, synthesis
from emsplat.sums.window import PADDING, kernel_fade, kernel_reach, polynomials_on, window_transform
from emsplat.types import Grid, Optics

_BATCH = 64  # images; on a GPU as many as fill it
_BATCH_GPU, _PIXELS_GPU = 256, 2**25
_COARSE = 32  # voxels across maps whose grey values are compared


class FourierStatistics:
    """The sums of one set of particles, on the half space x >= 0 of a Fourier grid.

    ``numerator`` and ``weight`` are (2R + 3, 2R + 3, R + 3), where ``side`` = 2R is ``PADDING`` times the box: plane z,
    row y and column x stand for the frequencies z - R - 1, y - R - 1 and x - 1 in units of 1 / (padded box length).
    ``particles`` counts the rows in the sums, ``done`` says which of the stack they are; ``about`` says what they are
    sums of, in terms that `load` compares, and ``images`` which images they will hold when they are complete
    (`copies.image_marks`). An image counts once under each element of ``symmetry``: it is inserted under some of them,
    ``elements``, and sums become equations under all ``turns`` (`Symmetry.about_grid`).
    The sums are kept on ``device``.
    """

    def __init__(
        self,
        grid: Grid,
        about: dict[str, str] | None = None,
        device: torch.device = CPU,
        images: Int[Tensor, "i 3"] | None = None,
        symmetry: Symmetry = C1,
    ) -> None:
        reach = math.ceil(PADDING * grid.size / 2)
        shape = (2 * reach + 3, 2 * reach + 3, reach + 3)
        self.grid = grid
        self.side = 2 * reach
        self.particles = 0
        self.done = torch.zeros(0, dtype=torch.bool)
        self.images = torch.zeros(0, 3, dtype=torch.int64) if images is None else images
        self.about = {"box": str(grid.size), "pixel size": f"{grid.pixel_size:.4f}", **(about or {})}
        self.turns, elements = symmetry.about_grid
        self.elements = elements.float().to(device)
        if device.type == "cpu":
            # NumPy asks the system for large pages, PyTorch does not: scattered writes are a third faster.
            self.numerator = torch.from_numpy(np.zeros(shape, np.complex64))
            self.weight = torch.from_numpy(np.zeros(shape, np.float32))
        else:
            self.numerator = torch.zeros(shape, dtype=torch.complex64, device=device)
            self.weight = torch.zeros(shape, device=device)

    def insert(
        self,
        numerator: Complex[Tensor, "p y k"],
        weight: Float[Tensor, "p y k"],
        rotation: Float[Tensor, "p 3 3"],
        grid: Grid,
    ) -> None:
        """Adds C Y/σ² and C²/σ² of centred transforms (origin at the centre pixel) of images on ``grid``.

        Images may have another box and pixel size than the volume; what lies beyond either's Nyquist frequency is left
        out.

        Raises:
            InputError: a value is not finite; nothing is added.
        """
        # A sum is finite only if all its terms are, and takes a fraction of the time of looking at each. All that has
        # to be known is asked for at once: a GPU is waited for once per call.
        sums = [numerator.sum().abs(), weight.sum(), rotation.sum(), stretch_of(rotation)]
        *totals, stretch = torch.stack([value.double() for value in sums]).tolist()
        for name, total in zip(("image", "weight", "pose"), totals, strict=True):
            if not math.isfinite(total):
                raise InputError(f"a {name} holds values that are not finite; look at its CTF, pose and noise spectrum")
        # A hair less, so that no rounding carries a tap beyond the grid. Anisotropic magnification stretches slices.
        radius = (0.5 - 1e-6) / stretch * min(grid.size, self.grid.size * grid.length / self.grid.length)
        step = self.side / self.grid.size * self.grid.length / grid.length
        kernels, polynomials = backend(weight.device), polynomials_on(weight.device)
        for element in self.elements:
            kernels.insert(
                self.numerator, self.weight, numerator, weight, rotation @ element, polynomials, radius, step
            )

    def merge(self, other: FourierStatistics) -> None:
        """Adds the sums of other particles of the same kind.

        Raises:
            InputError: see `check_addable`.
        """
        self.check_addable(other, f"statistics of {other.particles} particles")
        self.numerator.add_(other.numerator)
        self.weight.add_(other.weight)
        self.particles += other.particles
        self.images = torch.cat([self.images, other.images[~torch.isin(other.images[:, 0], self.images[:, 0])]])
        names = sorted([self.about.get("particles", ""), other.about.get("particles", "")])
        self.about["particles"] = hashlib.sha256("+".join(names).encode()).hexdigest()[:16]

    def gather(self, world: World) -> None:
        """The sums of all processes in each of them. They have read different particles of one stack."""
        world.sum_(self.numerator, self.weight)
        self._know_all(world)

    def collect(self, world: World) -> None:
        """The sums of all processes in the first; the others go on from nothing, with which particles are done."""
        world.collect_(self.numerator, self.weight)
        self._know_all(world)

    def _know_all(self, world: World) -> None:
        if world.size > 1:
            done = self.done.to(torch.uint8)
            world.most_(done)
            self.done = done.bool()
            self.particles = int(self.done.sum())

    def expect(self, particles: int) -> None:
        """Sums of a stack of so many ``particles``, from where they stand; those that do not say which they hold hold
        the first."""
        if len(self.done) != particles:
            self.done = torch.arange(particles) < self.particles

    def next_stack(self) -> None:
        """What is added from here on is another stack, none of whose particles is in the sums yet."""
        self.particles, self.done = 0, self.done[:0]

    def check_addable(self, other: FourierStatistics, name: str) -> None:
        """
        Raises:
            InputError: ``other`` differs in box, pixel size or symmetry, or has the same particles.
        """
        self._check(other.about, name, but={"particles"})
        if other.about.get("particles") is not None and other.about["particles"] == self.about.get("particles"):
            raise InputError(
                f"{name}: sums of the same particles; adding them would count every particle twice, leave one out"
            )

    def _check(self, found: dict[str, str], name: str, but: set[str]) -> None:
        for key in self.about.keys() - but:
            if found.get(key) != self.about[key]:
                raise InputError(
                    f"{name}: made with another {key} ({found.get(key, 'not stated')}; expected {self.about[key]}); "
                    "make them again with the same settings"
                )

    def save(self, path: Path) -> None:
        """Writes the sums as safetensors, under a temporary name until they are complete."""
        about = json.dumps({"particles": self.particles, "about": self.about})
        sums = {"numerator": torch.view_as_real(self.numerator).cpu(), "weight": self.weight.cpu()}
        partly = {} if bool(self.done.all()) else {"done": self.done.to(torch.uint8)}
        write_tensors(path, {**sums, **partly, "images": self.images}, {"emsplat.statistics": about})

    def load(self, path: Path, *, but: set[str] | None = None) -> None:
        """Takes over saved sums.

        Args:
            path: What `save` wrote.
            but: Names in ``about`` that need not agree; their values are taken over as well.

        Raises:
            InputError: damaged, not statistics of emsplat, or made with other settings.
        """
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads(file.metadata()["emsplat.statistics"])
                found, particles = dict(said["about"]), int(said["particles"])
                self._check(found, str(path), but or set())
                numerator, weight = file.get_tensor("numerator"), file.get_tensor("weight")
                images = _images_of(file)
                done = file.get_tensor("done").bool() if "done" in file.keys() else self.done[:0]  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not statistics of emsplat, or damaged ({error}); make them again") from error
        if numerator.shape != (*self.weight.shape, 2) or weight.shape != self.weight.shape:
            raise InputError(f"{path}: sums of {tuple(weight.shape)}; expected {tuple(self.weight.shape)}")
        torch.view_as_real(self.numerator).copy_(numerator)
        self.weight.copy_(weight)
        self.particles, self.about, self.images, self.done = particles, found, images, done

    def equations(self) -> NormalEquations:
        """b and K, with the window divided out."""
        linear, kernel = self._linear(self.numerator.clone()), self._kernel(self.weight.clone())
        return NormalEquations(self.grid, linear, kernel, self.particles)

    def used_up(self) -> NormalEquations:
        """`equations` from sums that are done with: their memory is given back on the way, and they are empty."""
        nothing = self.weight[:0].clone()
        linear = self._linear(self.numerator)
        self.numerator = nothing.to(torch.complex64)
        kernel = self._kernel(self.weight)
        self.weight = nothing
        return NormalEquations(self.grid, linear, kernel, self.particles)

    def _linear(self, numerator: Complex[Tensor, "Z Y X"]) -> Float[Tensor, "z y x"]:
        parts = torch.view_as_real(numerator)
        add_turned_(parts[..., 0], self.turns)
        add_turned_(parts[..., 1], self.turns, mirror=-1)
        return self._without_window(synthesis(numerator, self.grid.size))

    def _kernel(self, weight: Float[Tensor, "Z Y X"]) -> Float[Tensor, "w v u"]:
        add_turned_(weight, self.turns)
        reach = kernel_reach(self.grid.size)
        lags = synthesis(weight, 2 * reach, first=reach)
        return self._without_window(lags, kernel_fade(self.grid.size))

    def _without_window(self, volume: Float[Tensor, "z y x"], fade: Tensor | float = 1.0) -> Float[Tensor, "z y x"]:
        """The volume with the transform of the window divided out, times ``fade`` along each axis; in place. Its planes
        may be the last ones of a cube."""
        size = volume.shape[2]
        factor = (1 / window_transform((np.arange(size) - size // 2) / self.side) * fade).to(volume.device)
        for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)):
            volume *= factor[-len(volume) :].reshape(shape) if shape[0] < 0 else factor.reshape(shape)
        return volume


def add_turned_(values: Float[Tensor, "Z Y X"], turns: Int[Tensor, "t 3 3"], mirror: int = 1) -> None:
    """Makes sums on a half space those over all ``turns`` R of the grid, Σ_R F(R k), in place.

    ``values`` are as the sums of `FourierStatistics`, real or imaginary parts: what they stand for at -k is ``mirror``
    times that at k. Turns are signed permutations of the axes x, y, z, the identity among them.
    """
    if len(turns) == 1:
        return
    rows, columns = len(values), values.shape[2] - 1
    middle = rows // 2
    # From here on plane x = 0 holds whole values, and that at x = -1 nothing.
    values[..., 2] += mirror * values[..., 0].flip(0, 1)
    values[..., 1] += mirror * values[..., 1].flip(0, 1)
    values[..., 0] = 0
    whole, sums = values[..., 1:].flatten(), values[..., 1:]
    sums.zero_()
    strides = torch.tensor([1, columns, rows * columns])
    axis = torch.arange(-middle, middle + 1, device=values.device)
    for turn in turns:
        leading = int(turn[0].abs().argmax())  # the axis along which the turned x runs
        for sign in (1, -1):  # of the turned x; below 0 its mirror is there
            upper = slice(middle, None)
            part = [slice(None), slice(None), upper]
            if leading == 0 and int(turn[0, 0]) != sign:
                continue
            if leading > 0:
                part[2 - leading] = upper if int(turn[0, leading]) == sign else slice(0, middle)
            z, y, x = (axis[own] for own in part)
            a, b, c = (sign * strides @ turn).tolist()
            start = middle * int(strides[1:].sum())
            for planes in slabs(len(z), len(y) * len(x)):
                place = start + c * z[planes, None, None] + b * y[:, None] + a * x
                found = whole[place]
                sums[part[0], part[1]][planes] += found if sign > 0 else mirror * found
    sums[..., 0] *= 0.5


def memory_of_sums(size: int) -> float:
    """The most bytes that the sums of two halves take one after the other, while the second become equations beside
    those of the first; ``size`` voxels across the box."""
    side = PADDING * size
    sums = 12 * (side + 3) ** 2 * (side / 2 + 3)
    equations = 4 * (size**3 + 4 * kernel_reach(size) ** 3)
    unfinished = 8 * size**2 * (side / 2 + 1) + 4 * size**3  # b: transformed along two axes, and itself
    return sums + equations + unfinished


def fingerprint(stack: ParticleStack) -> str:
    """A short name of a list of particles with all that enters their sums but the grey values."""
    table, rows = stack.table, stack.rows
    digest = hashlib.sha256("\n".join(path.name for path in table.stacks).encode())
    poses, optics = table.poses[rows], table.optics[rows]
    columns = [table.stack[rows], table.image[rows], poses.rotation, poses.shift]
    columns += [getattr(optics, f.name) for f in fields(Optics) if f.name != "aberrations"]
    if (aberrations := optics.aberrations) is not None:
        columns += [aberrations.magnification, aberrations.odd, aberrations.even]
    for column in [column for column in columns if column is not None]:
        digest.update(column.contiguous().numpy().tobytes())
    digest.update(f"{stack.sign} {stack.diameter}".encode())
    return digest.hexdigest()[:16]


def mark(stack: ParticleStack) -> str:
    """A short name of all that sums over these particles depend on: their list, the symmetry, and the grid."""
    elements = stack.symmetry.elements.numpy().round(6).tobytes()
    about = f"{fingerprint(stack)} {stack.grid.size} {stack.grid.pixel_size:.6f}".encode()
    return hashlib.sha256(about + elements).hexdigest()[:16]


def _name_of(symmetry: Symmetry) -> str:
    """A group about its axes, and how many of its elements are inserted if not all of them."""
    elements = hashlib.sha256(symmetry.elements.numpy().round(6).tobytes()).hexdigest()[:8]
    some = f", {symmetry.inserted} inserted" if symmetry.inserted < symmetry.order else ""
    return f"{symmetry.order} elements, {elements}{some}"


def begin(stack: ParticleStack, grid: Grid | None = None) -> FourierStatistics:
    """Empty sums for a stack, on its own grid or another, where its images come."""
    about = {"symmetry": _name_of(stack.symmetry), "particles": fingerprint(stack)}
    images = image_marks(stack.table.take(stack.rows))
    return FourierStatistics(grid or stack.grid, about, stack.device, images, stack.symmetry)


def held_images(path: Path) -> Int[Tensor, "i 3"]:
    """Which images saved sums hold (`copies.image_marks`); none where an earlier version did not say.

    Raises:
        InputError: not statistics of emsplat, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _images_of(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not statistics of emsplat, or damaged ({error}); make them again") from error


def _images_of(file: Any) -> Int[Tensor, "i 3"]:
    """Which images an open file of sums holds; earlier versions knew them by the paths of their stacks alone."""
    if "images" not in file.keys():  # noqa: SIM118
        return torch.zeros(0, 3, dtype=torch.int64)
    images: Tensor = file.get_tensor("images")
    if images.dtype != torch.int64 or images.shape[1:] not in ((), (3,)):
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}")
    return images if images.dim() == 2 else torch.nn.functional.pad(images[:, None], (0, 2))


def accumulate(
    statistics: FourierStatistics,
    stack: Particles,
    noise: Float[Tensor, "o s"],
    world: World = ALONE,
) -> Iterator[FourierStatistics]:
    """Adds particles, and yields after each batch.

    Goes on where the sums left off (``statistics.done``). ``noise`` is `estimate_noise` of the stack. Processes of a
    ``world`` share out what is left, and yield equally often; their sums are to be brought together
    (`FourierStatistics.gather`).

    Raises:
        InputError: an image, CTF or pose is not finite.
    """
    statistics.expect(len(stack))
    rest = (~statistics.done).nonzero()[:, 0]
    if not len(rest):
        return
    grid = stack.grid
    device = statistics.weight.device
    shells = shell_index(grid.size, device=device)
    precision = (shells <= grid.size // 2) / noise[:, shells.clamp(max=grid.size // 2)] / grid.size**2
    own = stack.shared(world, rest)
    size = _BATCH if device.type == "cpu" else min(_BATCH_GPU, max(1, _PIXELS_GPU // grid.size**2))
    batches = stack.take(own).sequential(size) if len(own) else iter(())
    for turn in range(world.turns(-(-len(own) // size))):
        batch = next(batches, None)
        if batch is None:  # others have more to do
            yield statistics
            continue
        seen = observe(batch, grid)
        weighted = seen.transfer * precision[batch.optics_group]
        if batch.share is not None:
            weighted.mul_(batch.share[:, None, None])
        numerator = seen.spectrum.mul_(weighted)
        weight = weighted.mul_(seen.transfer)
        statistics.insert(numerator, weight, in_image(batch.poses.rotation, batch.optics), grid)
        statistics.particles += len(batch)
        statistics.done[own[turn * size : turn * size + len(batch)]] = True
        yield statistics


def equations_of(stack: ParticleStack, size: int | None = None, world: World = ALONE) -> NormalEquations:
    """The normal equations of a stack in one go; ``size`` < box gives the same box length at a coarser pixel. The
    processes of a ``world`` share the particles out, and each has the equations of all."""
    grid = stack.grid if size is None else Grid(size, stack.grid.length / size)
    return combined(_equations_by_grid(stack, grid, world))


def _equations_by_grid(stack: ParticleStack, grid: Grid, world: World) -> list[NormalEquations]:
    """Those of each of the stack's `parts`, in its own grey scale."""
    equations = []
    for part in stack.parts():
        statistics = begin(part, grid)
        # The spectrum of the whole part: weights must not depend on who reads an image.
        for _ in accumulate(statistics, part, estimate_noise(part), world):
            pass
        statistics.gather(world)
        equations.append(statistics.used_up())
    return equations


def in_one_grey(stack: ParticleStack, world: World = ALONE) -> ParticleStack:
    """The particles of all grids, those of one beside each other, with the CTF's factor such that one map fits all.

    Each half-set is compared with itself (`relative_gains`); processes of a ``world`` share its images out.
    """
    parts = stack.parts()
    if len(parts) == 1:
        return stack
    grid, grey = Grid(_COARSE, stack.grid.length / _COARSE), torch.ones_like(stack.table.optics.scale)
    for half in (1, 2):
        own = stack.only(half)
        equations = _equations_by_grid(own.without_symmetry(), grid, world)
        for part, gain in zip(own.parts(), relative_gains(equations), strict=True):
            # A thousandth is enough, and the same in every run.
            grey[part.rows] = round(gain, 3)
    world.spread_(grey)
    return replace(stack.in_grey(grey), rows=torch.cat([part.rows for part in parts]))
