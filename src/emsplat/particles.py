"""Particles with their images on disk: half-sets, batches, normalisation, the noise spectrum."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emsplat.copies import first_rows, image_numbers, particle_numbers, shares, with_halves
from emsplat.ctf import flipped_from_multiplied
from emsplat.device import CPU, Lane
from emsplat.errors import InputError
from emsplat.fourier import crop, hermitian_weight, shell_index, sum_by_shell
from emsplat.geometry import symmetry_group
from emsplat.io.mrc import StackFile
from emsplat.io.particles import read_particles
from emsplat.io.table import OpticsGroup, ParticleTable
from emsplat.progress import counted
from emsplat.types import PHASE_FLIPPED, Batch, Grid, Optics, Poses

_OPEN_STACKS = 64
_READ_AHEAD = 2  # batches
_READERS = 8  # threads that fill a batch for a GPU, which takes images faster than one thread copies them
_MASKED = 1e-8  # variance of a background that is constant, relative to that of about 1,000 pixels of the image


class ImageFiles:
    """The stacks of a table; only a few are open at a time. Several threads may read."""

    def __init__(self, table: ParticleTable) -> None:
        self._table = table
        self._open: OrderedDict[int, StackFile] = OrderedDict()
        self._remarks: dict[Path, tuple[str, ...]] = {}
        self._lock = threading.Lock()

    def stack(self, index: int) -> StackFile:
        with self._lock:
            file = self._open.pop(index, None) or StackFile(self._table.stacks[index])
            self._open[index] = file
            self._remarks[file.path] = file.warnings
            if len(self._open) > _OPEN_STACKS:
                self._open.popitem(last=False)[1].close()
        return file

    def remarks(self) -> list[str]:
        """What had to be assumed of the stacks that have been opened, each assumption once."""
        of: dict[str, list[Path]] = {}
        for path, texts in self._remarks.items():
            for text in texts:
                of.setdefault(text, []).append(path)
        return [
            f"{paths[0]}{f' and {len(paths) - 1} other stacks' if len(paths) > 1 else ''}: {text}"
            for text, paths in of.items()
        ]

    def read(self, rows: Int[Tensor, " p"], lane: Lane | None = None) -> Float[Tensor, "p y x"]:
        """Images of these rows of the table, as they are on disk; for a ``lane`` in memory that it can send from."""
        stack, image = self._table.stack[rows].numpy(), self._table.image[rows].numpy()
        box = self.stack(int(stack[0])).box
        if lane is None:
            out = np.empty((len(rows), box, box), np.float32)
            self._read_into(out, stack, image, np.arange(len(rows)))
            return torch.from_numpy(out)
        buffer = lane.buffer(len(rows), box, box)
        shares = np.array_split(np.arange(len(rows)), _READERS)
        jobs = [_readers().submit(self._read_into, buffer.numpy(), stack, image, share) for share in shares]
        for job in jobs:
            job.result()
        return buffer

    def _read_into(
        self, out: NDArray[np.float32], stack: NDArray[np.int64], image: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        for index in np.unique(stack[places]):
            here = places[stack[places] == index]
            self.stack(int(index)).read_into(out, image[here].tolist(), here.tolist())


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, "emsplat-reader")


@cache
def _background_pixels(grid: Grid, diameter: float, device: torch.device) -> Int[Tensor, " b"]:
    return background(grid, diameter).flatten().nonzero()[:, 0].to(device)


@dataclass(frozen=True)
class _Read:
    """A batch as it was read, on the CPU: the images of each grid on disk with their places in the batch, and the
    metadata."""

    images: list[tuple[Grid, Int[Tensor, " i"], Float[Tensor, "i v u"]]]
    poses: Poses
    moves: Int[Tensor, "q 2"] | None
    optics: Optics
    group: Int[Tensor, " q"]
    rows: Int[Tensor, " q"]
    share: Float[Tensor, " q"] | None


@dataclass(frozen=True, eq=False)
class ParticleStack:
    """Some particles of a table with their images on disk; a subset is again a `ParticleStack`.

    Images come normalised: mean 0 and standard deviation 1 in the background, the pixels further than ``diameter`` / 2
    from the centre. ``sign`` -1 inverts the contrast first, so that protein is bright.

    Optics groups may differ in box and pixel size (``grids``, one per group). ``grid`` is that of most particles, and
    `parts` are stacks of one grid each; only those can be read. Images of another grid on ``disk`` (one per group) are
    resampled when they are read, and with ``recentre`` moved by whole pixels, so that what is left of each shift is
    below one pixel: images that are cut would lose a particle's rim otherwise.

    Batches come on ``device``; table and rows stay on the CPU. Half-sets are those of the table (`with_halves`).
    """

    table: ParticleTable
    files: ImageFiles
    grid: Grid
    grids: tuple[Grid, ...]
    disk: tuple[Grid, ...]
    rows: Int[Tensor, " p"]  # of the table
    symmetry: Float[Tensor, "s 3 3"]  # float64
    diameter: float  # Å
    sign: float = 1.0
    recentre: bool = False
    share: Float[Tensor, " n"] | None = None  # weight of each row of the table, below 1 for copies (`copies.shares`)
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, device: torch.device) -> Self:
        """The same particles with their batches on a device."""
        return replace(self, device=device)

    def parts(self) -> list[Self]:
        """The particles of each grid, those of ``grid`` first; together they are this stack."""
        group = self.table.optics_group[self.rows]
        within = [(grid, _with_grid(grid, self.grids, group)) for grid in self._kinds()]
        return [
            replace(self.take(here.nonzero()[:, 0]), grid=grid, diameter=self._within(grid)) for grid, here in within
        ]

    def _within(self, grid: Grid) -> float:
        """The diameter, or less where another grid is too small for it."""
        return self.diameter if grid == self.grid else min(self.diameter, 0.95 * grid.length)

    def _kinds(self) -> list[Grid]:
        """The grids that there are particles of, ``grid`` first."""
        present = set(torch.unique(self.table.optics_group[self.rows]).tolist())
        used = {grid for number, grid in enumerate(self.grids) if number in present}
        return [grid for grid in dict.fromkeys((self.grid, *self.grids)) if grid in used]

    def once(self) -> Self:
        """These particles with each image once, in its first row."""
        return self.take(first_rows(self.table.take(self.rows)))

    def written_to(self, paths: Sequence[Path]) -> ParticleTable:
        """The table of these particles once the images of each of its `parts`, as `sequential` gives them `once`, are
        the stack of that number. Copies go on naming one image, which is moved as its first row wants it."""
        table = self.table.take(self.rows)
        optics, group = table.optics, table.optics_group
        if optics.treatment is not None:
            optics = replace(optics, treatment=optics.treatment.clamp(max=PHASE_FLIPPED))
        stack, image = torch.zeros_like(group), torch.zeros_like(group)
        shift = table.poses.shift.clone()
        for number, grid in enumerate(self._kinds()):
            here = _with_grid(grid, self.grids, group)
            part = table.take(here.nonzero()[:, 0])
            stack[here], image[here] = number, image_numbers(part)
            shift[here] -= grid.pixel_size * self._moves(part.poses.shift[first_rows(part)], grid)[image[here]]
        groups = zip(table.groups, self.grids, strict=True)
        return replace(
            table,
            poses=Poses(table.poses.rotation, shift),
            optics=optics,
            groups=tuple(OpticsGroup(own.name, grid.pixel_size, grid.size) for own, grid in groups),
            stacks=tuple(path.absolute() for path in paths),
            stack=stack,
            image=image,
            sign=1.0,
        )

    def _moves(self, shift: Float[Tensor, "q 2"], grid: Grid) -> Int[Tensor, "q 2"]:
        """By how many whole pixels images are moved."""
        moves = torch.zeros_like(shift) if not self.recentre else (shift / grid.pixel_size).round()
        return moves.long()

    def take(self, rows: Int[Tensor, " q"]) -> Self:
        """The particles at these positions of this stack."""
        return replace(self, rows=self.rows[rows])

    def inverted(self) -> Self:
        """The same particles with the opposite contrast."""
        return replace(self, sign=-self.sign)

    def without_symmetry(self) -> Self:
        """The same particles, each in its own pose only."""
        return replace(self, symmetry=self.symmetry[:1])  # the identity

    def with_poses(self, poses: Poses) -> Self:
        """The same particles in other poses, one for each (float64); those of other rows of the table stay.

        Raises:
            ValueError: there is not one pose for each particle.
        """
        if len(poses) != len(self):
            raise ValueError(f"{len(poses)} poses for {len(self)} particles")
        old = self.table.poses
        rotation, shift = (
            getattr(old, name).index_copy(0, self.rows, getattr(poses, name).to(getattr(old, name)))
            for name in ("rotation", "shift")
        )
        return replace(self, table=replace(self.table, poses=Poses(rotation, shift)))

    @property
    def half(self) -> Int[Tensor, " p"]:
        """The half-set of each particle, 1 or 2.

        Raises:
            InputError: there are none yet.
        """
        if self.table.half is None:
            raise InputError(f"{self.table.name}: no half-sets; draw them with `with_halves`")
        return self.table.half[self.rows]

    def only(self, half: int) -> Self:
        """The particles of half-set 1 or 2.

        Raises:
            InputError: there are fewer than two.
        """
        chosen = self.take((self.half == half).nonzero()[:, 0])
        if len(chosen) < 2:
            text = f"{self.table.name}: half-set {half} has {counted(len(chosen), 'particle')}; expected at least 2"
            if self.table.half_of_file is not None:
                raise InputError(
                    f"{text} in each; draw new half-sets with --redraw-halves, or add the other half with --merge"
                )
            different = int(particle_numbers(self.table).max()) + 1
            raise InputError(
                f"{text}: copies stay in one half, and {len(self.table):,} rows show "
                f"{counted(different, 'different particle')}; take a file with more, or add one with --merge"
            )
        return chosen

    def with_halves(self, seed: int) -> Self:
        """With the half-sets of the file, or else with new ones drawn per micrograph; so also for those particles of
        several files whose file has none. Copies of an image share a half, and where their poses agree one weight.

        Raises:
            InputError: the half-sets of the file part copies of an image, or one has fewer than two particles.
        """
        settled = replace(self, table=with_halves(self.table, seed), share=shares(self.table, self.symmetry))
        for number in (1, 2):
            settled.only(number)
        return settled

    def batches(self, size: int, *, seed: int, epoch: int = 0, skip: int = 0) -> Iterator[Batch]:
        """One epoch in random order, every image presented with a random symmetry-equivalent pose.

        Order and poses follow from (seed, epoch) alone, and ``skip`` leaves out that many batches, so that a resumed
        run sees what the uninterrupted one would have seen. Images are read ahead by a thread.
        """
        self.require_one_grid()
        rng = torch.Generator().manual_seed((seed << 24) + epoch)
        order = torch.randperm(len(self), generator=rng)
        element = torch.randint(len(self.symmetry), (len(self),), generator=rng)
        parts = (slice(start, start + size) for start in range(skip * size, len(self), size))
        return self._stream(((order[part], element[part]) for part in parts), normalised=True)

    def sequential(self, size: int, *, normalised: bool = True) -> Iterator[Batch]:
        """The particles in order, with the poses of the file; bright, but with the grey values of the file where they
        are not to be ``normalised``."""
        self.require_one_grid()
        positions = torch.split(torch.arange(len(self)), size)
        return self._stream(((part, torch.zeros_like(part)) for part in positions), normalised=normalised)

    def require_one_grid(self) -> None:
        """
        Raises:
            InputError: the particles have several boxes or pixel sizes.
        """
        kinds = dict.fromkeys(self.grids[group] for group in sorted(set(self.table.optics_group[self.rows].tolist())))
        if any(grid != self.grid for grid in kinds):
            named = ", ".join(f"{grid.size} px of {grid.pixel_size:g} Å" for grid in kinds)
            raise InputError(
                f"{self.table.name}: optics groups with several boxes or pixel sizes ({named}) can only be "
                "accumulated; use --engine one-pass, select particles of one kind, or bring them to one with --box and "
                "--pixel-size"
            )

    def _stream(self, parts: Iterable[tuple[Tensor, Tensor]], *, normalised: bool) -> Iterator[Batch]:
        """Batches of these positions and elements of the symmetry, read and prepared ahead."""
        if self.device.type == "cpu":
            yield from _ahead(self._prepare(self._fetch(*part, None), normalised, self._keep) for part in parts)
            return
        # A thread reads, another sends and prepares on the device; neither waits for what the consumer does there.
        lane = Lane(self.device)
        fetched = _ahead(self._fetch(*part, lane) for part in parts)
        for batch, moment in _ahead(self._send(read, normalised, lane) for read in fetched):
            lane.arrive(moment, batch.tensors())
            yield batch

    def _send(self, read: _Read, normalised: bool, lane: Lane) -> tuple[Batch, torch.cuda.Event | None]:
        with lane.open():
            batch = self._prepare(read, normalised, lane.send)
            return batch, lane.depart()

    @staticmethod
    def _keep(tensor: Tensor) -> Tensor:
        return tensor

    def _fetch(self, positions: Int[Tensor, " q"], element: Int[Tensor, " q"], lane: Lane | None) -> _Read:
        """What the disk and the table say."""
        rows = self.rows[positions]
        poses, optics, group = self.table.poses[rows], self.table.optics[rows], self.table.optics_group[rows]
        moves = self._moves(poses.shift, self.grid)
        shift = poses.shift - self.grid.pixel_size * moves
        turned = Poses(poses.rotation @ self.symmetry[element], shift)
        images = []
        for disk in dict.fromkeys(self.disk[number] for number in torch.unique(group).tolist()):
            here = _with_grid(disk, self.disk, group).nonzero()[:, 0]
            images.append((disk, here, self.files.read(rows[here], lane)))
        return _Read(
            images,
            turned.to(torch.float32),
            moves if self.recentre else None,
            optics.to(torch.float32),
            group,
            rows,
            None if self.share is None else self.share[rows],
        )

    def _prepare(self, read: _Read, normalised: bool, send: Callable[[Tensor], Tensor]) -> Batch:
        """The batch on the device of the stack, its images on the grid of the stack."""
        parts = []
        for disk, here, on_disk in read.images:
            images = send(on_disk)
            self._refuse_bad(images, read.rows[here])
            if read.optics.treatment is not None:
                images = flipped_from_multiplied(images, read.optics[here].each(send), disk)
            moves = None if read.moves is None else read.moves[here]
            parts.append(resample(images, disk, self.grid, moves))
        together = parts[0]
        if len(parts) > 1:
            together = together.new_empty(len(read.rows), self.grid.size, self.grid.size)
            for (_, here, _), images in zip(read.images, parts, strict=True):
                together[send(here)] = images
        return Batch(
            self.normalise(together) if normalised else self.sign * together,
            read.poses.each(send),
            read.optics.each(send),
            send(read.group),
            send(read.rows),
            None if read.share is None else send(read.share),
        )

    def normalise(self, images: Float[Tensor, "p y x"]) -> Float[Tensor, "p y x"]:
        """Background mean 0 and standard deviation 1, bright protein; the images are changed in place.

        Raises:
            InputError: an image has no variance in the background, so that there is nothing to scale it by.
        """
        flat = images.reshape(len(images), -1)
        outside = _background_pixels(self.grid, self.diameter, images.device)
        variance, mean = torch.var_mean(flat[:, outside], 1, correction=0)
        masked = int((variance <= _MASKED * flat[:, :: max(1, flat.shape[1] // 1024)].var(1, correction=0)).sum())
        if masked:
            raise InputError(
                f"{self.table.name}: {masked} of {len(images)} images of a batch have no noise outside "
                f"{self.diameter:.0f} Å, they were masked; expected images with their background, which the noise is "
                "measured in; extract them without a mask, or give a smaller --diameter"
            )
        gain = self.sign / variance.clamp(min=1e-20).sqrt()
        return flat.sub_(mean[:, None]).mul_(gain[:, None]).reshape(images.shape)

    def _refuse_bad(self, images: Tensor, rows: Tensor) -> None:
        bad = is_bad(images).cpu()
        if bad.any():
            raise InputError(
                f"{self.table.place(int(rows[bad][0]))}: {int(bad.sum())} of {len(rows)} images of a batch are "
                "constant or hold values that are not finite, this is the first; leave such images out with --skip-bad"
            )

    def without_bad(self) -> tuple[Self, Int[Tensor, " b"]]:
        """Reads every image once; the stack without bad ones, and the rows of the bad ones."""
        bad = torch.zeros(len(self.table), dtype=torch.bool)
        group = self.table.optics_group[self.rows]
        for disk in dict.fromkeys(self.disk):
            here = _with_grid(disk, self.disk, group)
            for rows in torch.split(self.rows[here], 256):
                bad[rows] = is_bad(self.files.read(rows)) if len(rows) else bad[rows]
        return self.take((~bad[self.rows]).nonzero()[:, 0]), self.rows[bad[self.rows]]


def _with_grid(grid: Grid, grids: Sequence[Grid], group: Int[Tensor, " p"]) -> Bool[Tensor, " p"]:
    """Which particles, given by optics group, have a grid; ``grids`` has one for each group."""
    return torch.tensor([own == grid for own in grids])[group]


def is_bad(images: Float[Tensor, "p y x"]) -> Tensor:
    """Which images are constant or hold values that are not finite."""
    flat = images.flatten(1)
    low, high = flat.amin(1), flat.amax(1)  # NaN where any pixel is; five times as fast as aminmax
    return ~torch.isfinite(low) | ~torch.isfinite(high) | (low == high)


def background(grid: Grid, diameter: float) -> Bool[Tensor, "y x"]:
    """The pixels outside a circle of ``diameter`` Å about the centre."""
    axis = (torch.arange(grid.size) - grid.size // 2) * grid.pixel_size
    return (axis[:, None] ** 2 + axis**2).sqrt() > diameter / 2


_T = TypeVar("_T")


def _ahead(source: Iterable[_T]) -> Iterator[_T]:
    """Runs the source in a thread, a few batches ahead; ends the thread when the consumer stops early."""
    ready: queue.Queue[_T | BaseException | None] = queue.Queue(_READ_AHEAD)
    stop = threading.Event()

    def put(item: _T | BaseException | None) -> bool:
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

    thread = threading.Thread(target=read, name="emsplat-reader")
    thread.start()

    def items() -> Iterator[_T | BaseException]:
        while True:
            try:
                item = ready.get(timeout=1.0)
            except queue.Empty:
                if thread.is_alive():
                    continue
                return  # it gave up, since the interpreter shuts down
            if item is None:
                return
            yield item

    try:
        for item in items():
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def open_particles(
    path: Path,
    *,
    datadir: Path | None = None,
    symmetry: str = "C1",
    invert: bool = False,
    diameter: float | None = None,
    trust_star_pixel_size: bool = False,
) -> ParticleStack:
    """The particles of a metadata file (`io.particles.read_particles`), as `open_table`."""
    table = read_particles(path, datadir=datadir)
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
    box: int | None = None,
    pixel_size: float | None = None,
    finer: bool = False,
    recentre: bool | None = None,
) -> ParticleStack:
    """The particles of a table, checked against the headers of their stacks; no image is read.

    ``box``, ``pixel_size`` (Å) and ``finer`` resample the images while they are read, see `resampled_grid`;
    ``recentre`` moves them by whole pixels, by default where they are cut.

    Raises:
        InputError: an image index outside its stack, stacks of odd or unexpected boxes, pixel sizes that disagree, a
            diameter that leaves no background, fewer than 4 particles, a box or pixel size that the images do not have.
    """
    elements = symmetry_group(symmetry)
    if len(table) < 4:
        raise InputError(
            f"{table.name}: {counted(len(table), 'particle')}; expected at least 4, which are 2 in each half-set; take "
            "a file with more, or leave out what chooses so few (--first, --subset, --class, --unique)"
        )
    files = ImageFiles(table)
    disk = _grids(table, files, trust_star_pixel_size)
    table = replace(table, warnings=(*table.warnings, *files.remarks()))
    grids = tuple(resampled_grid(own, box, pixel_size, finer=finer) for own in disk)
    if recentre is None:
        recentre = any(grid.length < 0.999 * own.length for grid, own in zip(grids, disk, strict=True))
    particles = dict.fromkeys(grids, 0)
    for number, count in enumerate(torch.bincount(table.optics_group, minlength=len(grids)).tolist()):
        particles[grids[number]] += count
    grid = max(particles, key=particles.__getitem__)
    if diameter is not None and not 0 < diameter <= 0.98 * grid.length:
        raise InputError(
            f"--diameter {diameter:g} Å: the box is {grid.length:.1f} Å wide; expected a diameter above 0 that leaves "
            "background around the particle"
        )
    sign = -table.sign if invert else table.sign
    return ParticleStack(
        table,
        files,
        grid,
        grids=grids,
        disk=disk,
        rows=torch.arange(len(table)),
        symmetry=elements,
        diameter=0.9 * grid.length if diameter is None else diameter,
        sign=sign,
        recentre=recentre,
    )


def resampled_grid(disk: Grid, box: int | None, pixel_size: float | None, *, finer: bool = False) -> Grid:
    """The grid of images that are brought to another box or pixel size.

    With ``box`` alone the whole image on fewer pixels; with ``pixel_size`` (Å) the whole image on the even number of
    pixels that comes nearest to it; with both the middle of that, ``box`` pixels wide. ``finer`` pixels than on disk
    hold nothing new and are refused unless asked for.

    Raises:
        InputError: an odd box, one wider than the image, pixels finer than on disk.
    """
    if box is None and pixel_size is None:
        return disk
    if (box is not None and (box < 8 or box % 2)) or (pixel_size is not None and not pixel_size > 0):
        raise InputError(f"--box {box} --pixel-size {pixel_size}: expected an even number from 8 and Å above 0")
    whole = 2 * round(disk.length / pixel_size / 2) if pixel_size is not None else box or disk.size
    if whole < 8 or (whole > disk.size and not finer):
        raise InputError(
            f"--box {box} --pixel-size {pixel_size}: {whole} pixels over the {disk.length:.1f} Å of the images, which "
            f"have {disk.size} of {disk.pixel_size:g} Å; expected coarser pixels than theirs, and at least 8"
        )
    size = box or whole
    if size > whole:
        raise InputError(
            f"--box {box} --pixel-size {pixel_size}: wider than the images ({disk.length:.1f} Å); expected "
            f"at most {whole} pixels of that size"
        )
    return Grid(size, disk.length / whole)


def resample(
    images: Float[Tensor, "p y x"], disk: Grid, grid: Grid, moves: Int[Tensor, "p 2"] | None = None
) -> Float[Tensor, "p v u"]:
    """Images on a grid from `resampled_grid`: cropped or padded in Fourier space, moved by whole pixels (x, y), cut to
    the box. Grey values stay what they are; what leaves on one side comes in on the other."""
    whole = round(disk.length / grid.pixel_size)
    if whole != disk.size:
        # The first pixel lies half a box from the centre at both sizes, so no image has to be moved to the origin.
        spectrum = torch.fft.rfft2(images)
        spectrum = crop(spectrum, whole) if whole < disk.size else _padded(spectrum, whole)
        images = torch.fft.irfft2(spectrum, s=(whole, whole)).mul_((whole / disk.size) ** 2)
    edge = whole // 2 - grid.size // 2
    if moves is not None and moves.any():
        if images.device.type != "cpu":
            return _moved(images, moves, edge, grid.size)
        images = torch.stack([image.roll((y, x), (0, 1)) for image, (x, y) in zip(images, moves.tolist(), strict=True)])
    return images[:, edge : edge + grid.size, edge : edge + grid.size].contiguous()


def _moved(images: Float[Tensor, "p y x"], moves: Int[Tensor, "p 2"], edge: int, size: int) -> Float[Tensor, "p v u"]:
    """The middle of images that are moved by whole pixels, all of them at once: a GPU would wait for one by one."""
    device, whole = images.device, images.shape[-1]
    pixels, number = torch.arange(edge, edge + size, device=device), torch.arange(len(images), device=device)
    x, y = ((pixels - move[:, None]) % whole for move in moves.to(device).unbind(1))
    return images[number[:, None, None], y[:, :, None], x[:, None, :]]


def _padded(spectrum: Complex[Tensor, "p y k"], size: int) -> Complex[Tensor, "p v j"]:
    """A larger transform with 0 beyond the old Nyquist frequency, and at it, since it stands for two frequencies."""
    half = spectrum.shape[-1] - 1
    out = spectrum.new_zeros(len(spectrum), size, size // 2 + 1)
    out[:, :half, :half] = spectrum[:, :half, :half]
    out[:, -half + 1 :, :half] = spectrum[:, half + 1 :, :half]
    return out


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
                f"{path}: images of {file.box} pixels; expected {boxes[number]} as elsewhere in {table.name}"
            )
        if highest[index] >= file.count:
            row = int(((table.stack == index) & (table.image >= file.count)).nonzero()[0])
            raise InputError(
                f'{table.place(row)}: "{int(table.image[row]) + 1}@{path.name}" asks for image '
                f"{int(table.image[row]) + 1}, but the stack has {file.count} images. Was the stack re-extracted after "
                "the star file was written?"
            )
        said = file.pixel_size
        if said is not None and abs(said / group.pixel_size - 1) > 0.01 and not trust_star_pixel_size:
            raise InputError(
                f"{path}: pixel size {said:g} Å in the stack's header and {group.pixel_size:g} Å in {table.name}; "
                "mend the wrong one, or go by the STAR file with --trust-star-pixel-size"
            )
    sizes = torch.bincount(table.optics_group, minlength=len(table.groups)).tolist()
    for number, count in enumerate(sizes):
        box = boxes[number]
        if count and (box is None or box % 2):
            raise InputError(f"{table.name}: box of {box} pixels; expected an even number")
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    used = [number if count else largest for number, count in enumerate(sizes)]
    return tuple(Grid(boxes[number] or 0, table.groups[number].pixel_size) for number in used)


def estimate_noise(stack: ParticleStack, particles: int = 600) -> Float[Tensor, "o s"]:
    """Noise power of the normalised images per optics group and shell (0 ... N/2), 1 for unit white noise.

    From the pixels outside the particle, with a soft edge that keeps the signal from leaking in. Groups with fewer
    than 50 of the images looked at share one spectrum.
    """
    grid, device = stack.grid, stack.device
    axis = (torch.arange(grid.size, device=device) - grid.size // 2) * grid.pixel_size
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    edge = 0.05 * grid.length
    ramp = ((radius - stack.diameter / 2 + edge) / edge).clamp(0, 1)
    window = 0.5 - 0.5 * torch.cos(torch.pi * ramp)
    shells = shell_index(grid.size, device=device).clamp(max=grid.size // 2).flatten()
    weight = hermitian_weight(grid.size, device=device).expand(grid.size, -1).flatten()
    groups, count = len(stack.table.groups), grid.size // 2 + 1
    power = torch.zeros(groups, count, dtype=torch.float64, device=device)
    seen = torch.zeros(groups, device=device)
    positions = torch.linspace(0, len(stack) - 1, min(particles, len(stack))).long()
    for batch in stack.take(positions).sequential(64):
        images = batch.images * window
        spectrum = torch.fft.rfft2(images).abs().square().flatten(1) * weight
        by_shell = spectrum.new_zeros(len(images), count).index_add_(1, shells, spectrum)
        power.index_add_(0, batch.optics_group, by_shell.double())
        seen.index_add_(0, batch.optics_group, seen.new_ones(len(images)))
    per_shell = sum_by_shell(weight, shells, count)
    scale = per_shell * window.square().sum()
    shared = power.sum(0) / (seen.sum() * scale)
    own = power / (seen.clamp(min=1)[:, None] * scale)
    spectrum = torch.where(seen[:, None] >= 50, own, shared).float()
    # The mean that normalisation takes away leaves shell 0 empty.
    spectrum[:, 0] = spectrum[:, 1]
    return spectrum.clamp(min=1e-3)
