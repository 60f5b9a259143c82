"""Particles with their images on disk: half-sets, batches, normalisation, the noise spectrum."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.errors import InputError
from emsplat.fourier import hermitian_weight, shell_index
from emsplat.geometry import symmetry_group
from emsplat.io.mrc import StackFile
from emsplat.io.particles import read_particles
from emsplat.io.table import ParticleTable
from emsplat.types import Batch, Grid, Poses

_OPEN_STACKS = 64
_READ_AHEAD = 2  # batches
_MASKED = 1e-8  # variance of a background that is constant, relative to that of about 1,000 pixels of the image


class ImageFiles:
    """The stacks of a table; only a few are open at a time."""

    def __init__(self, table: ParticleTable) -> None:
        self._table = table
        self._open: OrderedDict[int, StackFile] = OrderedDict()

    def stack(self, index: int) -> StackFile:
        file = self._open.pop(index, None) or StackFile(self._table.stacks[index])
        self._open[index] = file
        if len(self._open) > _OPEN_STACKS:
            self._open.popitem(last=False)[1].close()
        return file

    def read(self, rows: Int[Tensor, " p"]) -> Float[Tensor, "p y x"]:
        """Images of these rows of the table, as they are on disk."""
        stack, image = self._table.stack[rows].numpy(), self._table.image[rows].numpy()
        box = self.stack(int(stack[0])).box
        out = np.empty((len(rows), box, box), np.float32)
        for index in np.unique(stack):
            here = np.flatnonzero(stack == index)
            self.stack(int(index)).read_into(out, image[here].tolist(), here.tolist())
        return torch.from_numpy(out)


class ParticleStack:
    """Some particles of a table with their images on disk; a subset is again a `ParticleStack`.

    Images come normalised: mean 0 and standard deviation 1 in the background, the pixels further than ``diameter`` / 2
    from the centre (default: 0.9 of the box). ``sign`` -1 inverts the contrast first, so that protein is bright.

    Optics groups may differ in box and pixel size (``grids``, one per group). ``grid`` is that of most particles, and
    `parts` are stacks of one grid each; only those can be read.
    """

    def __init__(
        self,
        table: ParticleTable,
        files: ImageFiles,
        grid: Grid,
        *,
        rows: Int[Tensor, " p"] | None = None,
        half: Int[Tensor, " n"] | None = None,
        symmetry: Float[Tensor, "s 3 3"] | None = None,
        sign: float = 1.0,
        diameter: float | None = None,
        grids: tuple[Grid, ...] = (),
    ) -> None:
        self.table = table
        self.grid = grid
        self.grids = grids or (grid,) * len(table.groups)
        self.rows = torch.arange(len(table)) if rows is None else rows
        self.half = table.half if half is None else half  # one entry per row of the table
        self.symmetry = torch.eye(3, dtype=torch.float64)[None] if symmetry is None else symmetry
        self.sign = sign
        self.diameter = 0.9 * grid.length if diameter is None else diameter
        self._files = files
        self._background = background(grid, self.diameter).flatten().nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.rows)

    def _like(self, rows: Tensor, half: Tensor | None, sign: float, grid: Grid | None = None) -> Self:
        grid = grid or self.grid
        return type(self)(
            self.table,
            self._files,
            grid,
            rows=rows,
            half=half,
            symmetry=self.symmetry,
            sign=sign,
            diameter=min(self.diameter, 0.95 * grid.length) if grid != self.grid else self.diameter,
            grids=self.grids,
        )

    def parts(self) -> list[Self]:
        """The particles of each grid, those of ``grid`` first; together they are this stack."""
        group = self.table.optics_group[self.rows]
        found = []
        for grid in dict.fromkeys((self.grid, *self.grids)):
            here = torch.tensor([own == grid for own in self.grids])[group]
            if here.any():
                found.append(self._like(self.rows[here], self.half, self.sign, grid))
        return found

    def take(self, rows: Int[Tensor, " q"]) -> Self:
        """The particles at these positions of this stack."""
        return self._like(self.rows[rows], self.half, self.sign)

    def inverted(self) -> Self:
        """The same particles with the opposite contrast."""
        return self._like(self.rows, self.half, -self.sign)

    def only(self, half: int) -> Self:
        """The particles of half-set 1 or 2.

        Raises:
            InputError: there are fewer than two.
        """
        if self.half is None:
            raise InputError(f"{self.table.source}: no half-sets; draw them with `with_halves`")
        chosen = self.take((self.half[self.rows] == half).nonzero()[:, 0])
        if len(chosen) < 2:
            raise InputError(
                f"{self.table.source}: half-set {half} has {len(chosen)} particles; expected at least 2 in each half, "
                "add particles or remove the column rlnRandomSubset to have new halves drawn"
            )
        return chosen

    def with_halves(self, seed: int) -> Self:
        """With the half-sets of the file, or else with new ones drawn per micrograph."""
        if self.half is not None:
            return self
        return self._like(self.rows, draw_halves(self.table.micrograph, seed), self.sign)

    def batches(self, size: int, *, seed: int, epoch: int = 0, skip: int = 0) -> Iterator[Batch]:
        """One epoch in random order, every image presented with a random symmetry-equivalent pose.

        Order and poses follow from (seed, epoch) alone, and ``skip`` leaves out that many batches, so that a resumed
        run sees what the uninterrupted one would have seen. Images are read ahead by a thread.
        """
        self.require_one_grid()
        rng = torch.Generator().manual_seed((seed << 24) + epoch)
        order = torch.randperm(len(self), generator=rng)
        element = torch.randint(len(self.symmetry), (len(self),), generator=rng)
        parts = range(skip * size, len(self), size)
        return _ahead(self._batch(order[start : start + size], element[start : start + size]) for start in parts)

    def sequential(self, size: int) -> Iterator[Batch]:
        """The particles in order, with the poses of the file."""
        self.require_one_grid()
        positions = torch.split(torch.arange(len(self)), size)
        return _ahead(self._batch(part, torch.zeros_like(part)) for part in positions)

    def require_one_grid(self) -> None:
        """
        Raises:
            InputError: the particles have several boxes or pixel sizes.
        """
        kinds = dict.fromkeys(self.grids[group] for group in sorted(set(self.table.optics_group[self.rows].tolist())))
        if any(grid != self.grid for grid in kinds):
            named = ", ".join(f"{grid.size} px of {grid.pixel_size:g} Å" for grid in kinds)
            raise InputError(
                f"{self.table.source}: optics groups with several boxes or pixel sizes ({named}) can only be "
                "accumulated; use --engine one-pass, or select particles of one kind"
            )

    def _batch(self, positions: Int[Tensor, " q"], element: Int[Tensor, " q"]) -> Batch:
        rows = self.rows[positions]
        images = self._files.read(rows)
        self._refuse_bad(images, rows)
        poses = self.table.poses[rows]
        turned = Poses(poses.rotation @ self.symmetry[element], poses.shift)
        return Batch(
            self.normalise(images),
            turned.to(torch.float32),
            self.table.optics[rows].to(torch.float32),
            self.table.optics_group[rows],
            rows,
        )

    def normalise(self, images: Float[Tensor, "p y x"]) -> Float[Tensor, "p y x"]:
        """Background mean 0 and standard deviation 1, bright protein; the images are changed in place.

        Raises:
            InputError: an image has no variance in the background, so that there is nothing to scale it by.
        """
        flat = images.reshape(len(images), -1)
        variance, mean = torch.var_mean(flat[:, self._background], 1, correction=0)
        masked = int((variance <= _MASKED * flat[:, :: max(1, flat.shape[1] // 1024)].var(1, correction=0)).sum())
        if masked:
            raise InputError(
                f"{self.table.source}: {masked} of {len(images)} images of a batch have no noise outside "
                f"{self.diameter:.0f} Å, they were masked; expected images with their background, which the noise is "
                "measured in; extract them without a mask, or give a smaller --diameter"
            )
        gain = self.sign / variance.clamp(min=1e-20).sqrt()
        return flat.sub_(mean[:, None]).mul_(gain[:, None]).reshape(images.shape)

    def _refuse_bad(self, images: Tensor, rows: Tensor) -> None:
        bad = is_bad(images)
        if bad.any():
            raise InputError(
                f"{self.table.source}: {int(bad.sum())} of {len(rows)} images of a batch are constant or hold values "
                f"that are not finite, {_name_rows(rows[bad])}; leave such images out with --skip-bad"
            )

    def without_bad(self) -> tuple[Self, Int[Tensor, " b"]]:
        """Reads every image once; the stack without bad ones, and the rows of the bad ones."""
        bad = torch.zeros(len(self.table), dtype=torch.bool)
        for part in self.parts():
            for rows in torch.split(part.rows, 256):
                bad[rows] = is_bad(self._files.read(rows))
        return self.take((~bad[self.rows]).nonzero()[:, 0]), self.rows[bad[self.rows]]


def _name_rows(rows: Tensor) -> str:
    """Row numbers as the STAR file counts them, the first few."""
    first = sorted(row + 1 for row in rows.tolist())[:5]
    return f"row {', '.join(map(str, first))}" + (", ..." if len(rows) > 5 else "")


def is_bad(images: Float[Tensor, "p y x"]) -> Tensor:
    """Which images are constant or hold values that are not finite."""
    low, high = images.flatten(1).aminmax(dim=1)  # NaN where any pixel is
    return ~torch.isfinite(low) | ~torch.isfinite(high) | (low == high)


def background(grid: Grid, diameter: float) -> Bool[Tensor, "y x"]:
    """The pixels outside a circle of ``diameter`` Å about the centre."""
    axis = (torch.arange(grid.size) - grid.size // 2) * grid.pixel_size
    return (axis[:, None] ** 2 + axis**2).sqrt() > diameter / 2


def _ahead(source: Iterable[Batch]) -> Iterator[Batch]:
    """Runs the source in a thread, a few batches ahead; ends the thread when the consumer stops early."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_READ_AHEAD)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        # The main thread is over when the interpreter shuts down, whether or not the consumer was closed.
        while not stop.is_set() and threading.main_thread().is_alive():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for batch in source:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 (raised again by the consumer)
            put(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def draw_halves(micrograph: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """Half-sets 1 and 2, whole micrographs together: neighbours share noise and sometimes are the same particle.

    Micrographs are dealt out in random order, each to the half that has fewer particles. Particles of a single
    micrograph are dealt out one by one.
    """
    codes = torch.arange(len(micrograph)) if (micrograph == micrograph[:1]).all() else micrograph
    names, member = torch.unique(codes, return_inverse=True)
    sizes = torch.bincount(member).tolist()
    rng = torch.Generator().manual_seed(seed)
    totals, half = [0, 0], torch.empty(len(names), dtype=torch.int64)
    for name in torch.randperm(len(names), generator=rng).tolist():
        lesser = int(totals[1] < totals[0])
        half[name] = lesser + 1
        totals[lesser] += sizes[name]
    return half[member]


def open_particles(
    path: Path,
    *,
    datadir: Path | None = None,
    symmetry: str = "C1",
    invert: bool = False,
    diameter: float | None = None,
    trust_star_pixel_size: bool = False,
    poses: Path | None = None,
    ctf: Path | None = None,
    passthrough: Sequence[Path] = (),
) -> ParticleStack:
    """The particles of a metadata file (`io.particles.read_particles`), checked against the headers of their stacks; no
    image is read.

    Raises:
        InputError: see `read_particles`; an image index outside its stack, stacks of odd or unexpected boxes, pixel
            sizes that disagree, a diameter that leaves no background, fewer than 4 particles.
    """
    table = read_particles(path, datadir=datadir, poses=poses, ctf=ctf, passthrough=passthrough)
    return open_table(
        table, symmetry=symmetry, invert=invert, diameter=diameter, trust_star_pixel_size=trust_star_pixel_size
    )


def open_table(
    table: ParticleTable,
    *,
    symmetry: str = "C1",
    invert: bool = False,
    diameter: float | None = None,
    trust_star_pixel_size: bool = False,
) -> ParticleStack:
    """The particles of a table whose stacks are all there; otherwise as `open_particles`."""
    elements = symmetry_group(symmetry)
    if len(table) < 4:
        raise InputError(f"{table.source}: {len(table)} particles; expected at least 2 in each of two halves")
    files = ImageFiles(table)
    grids = _grids(table, files, trust_star_pixel_size)
    particles = dict.fromkeys(grids, 0)
    for number in table.optics_group.tolist():
        particles[grids[number]] += 1
    grid = max(particles, key=particles.__getitem__)
    if diameter is not None and not 0 < diameter <= 0.98 * grid.length:
        raise InputError(
            f"--diameter {diameter:g} Å: the box is {grid.length:.1f} Å wide; expected a diameter above 0 that leaves "
            "background around the particle"
        )
    sign = -table.sign if invert else table.sign
    return ParticleStack(table, files, grid, symmetry=elements, sign=sign, diameter=diameter, grids=grids)


def _grids(table: ParticleTable, files: ImageFiles, trust_star_pixel_size: bool) -> tuple[Grid, ...]:
    """The grid of each optics group; groups without particles take that of the largest one."""
    highest = torch.zeros(len(table.stacks), dtype=torch.int64).scatter_reduce(0, table.stack, table.image, "amax")
    boxes = {number: group.box for number, group in enumerate(table.groups)}
    pairs = torch.unique(torch.stack([table.stack, table.optics_group], 1), dim=0).tolist()
    for index, number in pairs:
        path, group, file = table.stacks[index], table.groups[number], files.stack(index)
        boxes[number] = boxes[number] or file.box
        if file.box != boxes[number]:
            raise InputError(
                f"{path}: images of {file.box} pixels; expected {boxes[number]} as elsewhere in {table.source}"
            )
        if highest[index] >= file.count:
            row = int(((table.stack == index) & (table.image >= file.count)).nonzero()[0])
            raise InputError(
                f'{table.source}, row {row + 1}: rlnImageName "{int(table.image[row]) + 1}@{path.name}" asks for image '
                f"{int(table.image[row]) + 1}, but the stack has {file.count} images. Was the stack re-extracted after "
                "the star file was written?"
            )
        said = file.pixel_size
        if said is not None and abs(said / group.pixel_size - 1) > 0.01 and not trust_star_pixel_size:
            raise InputError(
                f"{path}: pixel size {said:g} Å in the stack's header and {group.pixel_size:g} Å in {table.source}; "
                "mend the wrong one, or go by the STAR file with --trust-star-pixel-size"
            )
    sizes = torch.bincount(table.optics_group, minlength=len(table.groups)).tolist()
    for number, count in enumerate(sizes):
        box = boxes[number]
        if count and (box is None or box % 2):
            raise InputError(f"{table.source}: box of {box} pixels; expected an even number")
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    used = [number if count else largest for number, count in enumerate(sizes)]
    return tuple(Grid(boxes[number] or 0, table.groups[number].pixel_size) for number in used)


def estimate_noise(stack: ParticleStack, particles: int = 600) -> Float[Tensor, "o s"]:
    """Noise power of the normalised images per optics group and shell (0 ... N/2), 1 for unit white noise.

    From the pixels outside the particle, with a soft edge that keeps the signal from leaking in. Groups with fewer
    than 50 of the images looked at share one spectrum.
    """
    grid = stack.grid
    axis = (torch.arange(grid.size) - grid.size // 2) * grid.pixel_size
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    edge = 0.05 * grid.length
    ramp = ((radius - stack.diameter / 2 + edge) / edge).clamp(0, 1)
    window = 0.5 - 0.5 * torch.cos(torch.pi * ramp)
    shells = shell_index(grid.size).clamp(max=grid.size // 2).flatten()
    weight = hermitian_weight(grid.size).expand(grid.size, -1).flatten()
    groups, count = len(stack.table.groups), grid.size // 2 + 1
    power, seen = torch.zeros(groups, count, dtype=torch.float64), torch.zeros(groups)
    positions = torch.linspace(0, len(stack) - 1, min(particles, len(stack))).long()
    for batch in stack.take(positions).sequential(64):
        images = batch.images * window
        spectrum = torch.fft.rfft2(images).abs().square().flatten(1) * weight
        by_shell = torch.zeros(len(images), count).index_add_(1, shells, spectrum)
        power.index_add_(0, batch.optics_group, by_shell.double())
        seen.index_add_(0, batch.optics_group, torch.ones(len(images)))
    per_shell = torch.zeros(count).index_add_(0, shells, weight)
    scale = per_shell * window.square().sum()
    shared = power.sum(0) / (seen.sum() * scale)
    own = power / (seen.clamp(min=1)[:, None] * scale)
    spectrum = torch.where(seen[:, None] >= 50, own, shared).float()
    # The mean that normalisation takes away leaves shell 0 empty.
    spectrum[:, 0] = spectrum[:, 1]
    return spectrum.clamp(min=1e-3)
