"""Particles with their images on disk: half-sets, batches, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.device import CPU, Lane
from emsplat.errors import InputError
from emsplat.imaging.ctf import flipped_from_multiplied
from emsplat.io.table import ParticleTable
from emsplat.maths.groups import C1, Symmetry
from emsplat.parallel import ALONE, World
from emsplat.particles.background import MASKED, background_pixels, has_hot_pixel, is_bad
from emsplat.particles.copies import first_rows, image_numbers, particle_numbers, shares, with_halves
from emsplat.particles.holding import Holding
from emsplat.particles.images import ImageFiles
from emsplat.particles.prefetch import ahead
from emsplat.particles.resample import resample
from emsplat.run.log import counted
from emsplat.types import PHASE_FLIPPED, Aberrations, Batch, Grid, Optics, Poses


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
    element: Int[Tensor, " q"]


@runtime_checkable
class Particles(Protocol):
    """Particles in batches, which is all that sums and objectives ask of a `ParticleStack`."""

    @property
    def grid(self) -> Grid: ...
    @property
    def symmetry(self) -> Symmetry: ...
    def __len__(self) -> int: ...
    def take(self, rows: Int[Tensor, " q"]) -> Particles: ...
    def shared(self, world: World, positions: Int[Tensor, " p"] | None = None) -> Int[Tensor, " m"]: ...
    def sequential(self, size: int) -> Iterator[Batch]: ...
    def batches(
        self,
        size: int,
        *,
        seed: int,
        epoch: int = 0,
        skip: int = 0,
        world: World = ALONE,
        own: Bool[Tensor, " p"] | None = None,
    ) -> Iterator[Batch]: ...


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
    symmetry: Symmetry
    diameter: float  # Å
    sign: float = 1.0
    recentre: bool = False
    share: Float[Tensor, " n"] | None = None  # weight of each row of the table, below 1 for copies (`copies.shares`)
    device: torch.device = CPU
    holding: Holding | None = None  # who reads which images, where processes have different ones

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        """As a notebook shows it: what there is, not every number of it."""
        table, grid = self.table, self.grid
        halves = "" if table.half is None else " + ".join(f"{int((self.half == half).sum()):,}" for half in (1, 2))
        parts = [
            f"{len(self):,} particles of {table.name}",
            f"{grid.size} px of {grid.pixel_size:g} Å",
            f"half-sets {halves}" if halves else "no half-sets",
            f"symmetry {self.symmetry.symbol}" if self.symmetry.order > 1 else "",
        ]
        return f"<{', '.join(filter(None, parts))}>"

    @property
    def stored(self) -> int:
        """Bytes of the images on disk."""
        if not len(self):
            return 0
        # As in the first: to open thousands takes its time.
        each = self.files.facts(int(self.table.stack[self.rows[0]]))
        group = torch.bincount(self.table.optics_group[self.rows], minlength=len(self.disk)).tolist()
        pixels: int = sum(own.size**2 * some for own, some in zip(self.disk, group, strict=True))
        return pixels * each.image_bytes // each.box**2

    def on(self, device: torch.device) -> ParticleStack:
        """The same particles with their batches on a device."""
        return replace(self, device=device)

    def parts(self) -> list[ParticleStack]:
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

    @property
    def image_of_view(self) -> Int[Tensor, " v"]:
        """Equal numbers for views of one particle: all its rows, each under every element of the symmetry. Views of a
        row are neighbours."""
        return particle_numbers(self.table.take(self.rows)).repeat_interleave(self.symmetry.order)

    def once(self) -> ParticleStack:
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
        place, spacing = table.coordinates, table.micrograph_pixel_size
        for number, grid in enumerate(self._kinds()):
            here = _with_grid(grid, self.grids, group)
            part = table.take(here.nonzero()[:, 0])
            stack[here], image[here] = number, image_numbers(part)
            shift[here] -= grid.pixel_size * self._moves(part.poses.shift[first_rows(part)], grid)[image[here]]
        if place is not None and spacing is not None:  # the box moves with the image, the particle does not
            known = torch.where(spacing > 0, spacing, torch.inf)[:, None]
            place = place + (shift - table.poses.shift) / known
        groups = zip(table.groups, self.grids, strict=True)
        return replace(
            table,
            coordinates=place,
            poses=Poses(table.poses.rotation, shift),
            optics=optics,
            groups=tuple(replace(own, pixel_size=grid.pixel_size, box=grid.size) for own, grid in groups),
            stacks=tuple(path.absolute() for path in paths),
            stack=stack,
            image=image,
            sign=1.0,
        )

    def _moves(self, shift: Float[Tensor, "q 2"], grid: Grid) -> Int[Tensor, "q 2"]:
        """By how many whole pixels images are moved."""
        moves = torch.zeros_like(shift) if not self.recentre else (shift / grid.pixel_size).round()
        return moves.long()

    def take(self, rows: Int[Tensor, " q"]) -> ParticleStack:
        """The particles at these positions of this stack."""
        return replace(self, rows=self.rows[rows])

    def inverted(self) -> ParticleStack:
        """The same particles with the opposite contrast."""
        return replace(self, sign=-self.sign)

    def shared(self, world: World, positions: Int[Tensor, " p"] | None = None) -> Int[Tensor, " m"]:
        """Those of the ``positions`` (None: all) that this process of a ``world`` takes: all rows of one particle go to
        the same."""
        wanted = torch.arange(len(self)) if positions is None else positions
        if world.size == 1:
            return wanted
        if self.holding is not None:
            return wanted[self.holding.own(self.rows[wanted])]
        return world.share(wanted, particle_numbers(self.table.take(self.rows[wanted])))

    def here(self) -> ParticleStack:
        """The particles whose images this process can read, and nothing of others."""
        if self.holding is None:
            return self
        return replace(self.take(self.holding.own(self.rows).nonzero()[:, 0]), holding=None)

    def without_symmetry(self) -> ParticleStack:
        """The same particles, each in its own pose only."""
        return replace(self, symmetry=C1)

    def in_grey(self, grey: Float[Tensor, " n"]) -> ParticleStack:
        """The same particles with the CTF's factor times one of each row of the table, such that one map fits all
        grids. It is not for files: columns of the table stay those that were read."""
        optics = self.table.optics
        return replace(self, table=replace(self.table, optics=replace(optics, scale=optics.scale * grey)))

    def with_poses(self, poses: Poses) -> ParticleStack:
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
        changed = tuple(dict.fromkeys([*self.table.changed, "poses"]))
        return replace(self, table=replace(self.table, poses=Poses(rotation, shift), changed=changed))

    def with_optics(self, optics: Optics) -> ParticleStack:
        """The same particles with another defocus, scale and B factor of each (float64); other rows of the table stay.

        Raises:
            ValueError: there is not one for each particle.
        """
        if len(optics) != len(self):
            raise ValueError(f"{len(optics)} optics for {len(self)} particles")
        old = self.table.optics
        names = ("defocus_u", "defocus_v", "scale", "b_factor")
        columns = {name: getattr(old, name).index_copy(0, self.rows, getattr(optics, name)) for name in names}
        changed = tuple(dict.fromkeys([*self.table.changed, "ctf"]))
        return replace(self, table=replace(self.table, optics=replace(old, **columns), changed=changed))

    def with_aberrations(self, aberrations: Aberrations) -> ParticleStack:
        """The same particles with other aberrations, which are given for all rows of the table.

        Raises:
            ValueError: there are not as many.
        """
        if len(aberrations.odd) != len(self.table):
            raise ValueError(f"{len(aberrations.odd)} aberrations for {len(self.table)} rows")
        changed = tuple(dict.fromkeys([*self.table.changed, "aberrations"]))
        optics = replace(self.table.optics, aberrations=aberrations)
        return replace(self, table=replace(self.table, optics=optics, changed=changed))

    @property
    def half(self) -> Int[Tensor, " p"]:
        """The half-set of each particle, 1 or 2.

        Raises:
            InputError: there are none yet.
        """
        if self.table.half is None:
            raise InputError(f"{self.table.name}: no half-sets; draw them with `with_halves`")
        return self.table.half[self.rows]

    def only(self, half: int) -> ParticleStack:
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

    def with_halves(self, seed: int) -> ParticleStack:
        """With the half-sets of the file, or else with new ones drawn per micrograph; so also for those particles of
        several files whose file has none. Copies of an image share a half, and where their poses agree one weight.

        Raises:
            InputError: the half-sets of the file part copies of an image, or one has fewer than two particles.
        """
        settled = replace(self, table=with_halves(self.table, seed), share=shares(self.table, self.symmetry))
        for number in (1, 2):
            settled.only(number)
        return settled

    def batches(
        self,
        size: int,
        *,
        seed: int,
        epoch: int = 0,
        skip: int = 0,
        world: World = ALONE,
        own: Bool[Tensor, " p"] | None = None,
    ) -> Iterator[Batch]:
        """One epoch in random order, every image presented with a random symmetry-equivalent pose.

        Order and poses follow from (seed, epoch) alone, and ``skip`` leaves out that many batches, so that a resumed
        run sees what the uninterrupted one would have seen. Images are read ahead by a thread. Processes of a ``world``
        share each batch out, or each takes those particles of it that are its ``own``; a share may be empty.
        """
        self.require_one_grid()
        rng = torch.Generator().manual_seed((seed << 24) + epoch)
        order = torch.randperm(len(self), generator=rng)
        element = torch.randint(self.symmetry.order, (len(self),), generator=rng)
        starts = range(skip * size, len(self), size)
        parts = (torch.arange(start, min(start + size, len(self))) for start in starts)
        if own is None and self.holding is not None:
            own = self.holding.own(self.rows)
        mine = (world.share(part) if own is None else part[own[order[part]]] for part in parts)
        return self._stream(((order[part], element[part]) for part in mine), normalised=True)

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
                "accumulated; use --engine one-pass, select particles of one kind, or extract all with one box and "
                "pixel size"
            )

    def _stream(self, parts: Iterable[tuple[Tensor, Tensor]], *, normalised: bool) -> Iterator[Batch]:
        """Batches of these positions and elements of the symmetry, read and prepared ahead."""
        if self.device.type == "cpu":
            yield from ahead(self._prepare(self._fetch(*part, None), normalised, self._keep) for part in parts)
            return
        # A thread reads, another sends and prepares on the device; neither waits for what the consumer does there.
        lane = Lane(self.device)
        fetched = ahead(self._fetch(*part, lane) for part in parts)
        for batch, moment in ahead(self._send(read, normalised, lane) for read in fetched):
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
        turned = Poses(poses.rotation @ self.symmetry.elements[element], shift)
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
            element,
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
        together = parts[0] if parts else torch.empty(0, self.grid.size, self.grid.size, device=self.device)
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
            send(read.element),
        )

    def normalise(self, images: Float[Tensor, "p y x"]) -> Float[Tensor, "p y x"]:
        """Background mean 0 and standard deviation 1, bright protein; the images are changed in place.

        Raises:
            InputError: an image has no variance in the background, so that there is nothing to scale it by.
        """
        flat = images.reshape(len(images), -1)
        outside = background_pixels(self.grid, self.diameter, images.device)
        variance, mean = torch.var_mean(flat[:, outside], 1, correction=0)
        masked = int((variance <= MASKED * flat[:, :: max(1, flat.shape[1] // 1024)].var(1, correction=0)).sum())
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
                "constant or hold values that are not finite or above 1e15, this is the first; leave such images out "
                "with --skip-bad"
            )

    def without_bad(self, world: World = ALONE) -> tuple[ParticleStack, Int[Tensor, " b"]]:
        """Reads every image once, each process its share; the stack without bad ones, and the rows of the bad ones."""
        flags = torch.zeros(len(self.table), dtype=torch.uint8)
        group = self.table.optics_group[self.rows]
        for disk in dict.fromkeys(self.disk):
            here = _with_grid(disk, self.disk, group).nonzero()[:, 0]
            for rows in torch.split(self.rows[self.shared(world, here)], 256):
                if len(rows):
                    images = self.files.read(rows)
                    flags[rows] = (is_bad(images) | has_hot_pixel(images)).to(torch.uint8)
        world.most_(flags)
        bad = flags.bool()
        return self.take((~bad[self.rows]).nonzero()[:, 0]), self.rows[bad[self.rows]]


def _with_grid(grid: Grid, grids: Sequence[Grid], group: Int[Tensor, " p"]) -> Bool[Tensor, " p"]:
    """Which particles, given by optics group, have a grid; ``grids`` has one for each group."""
    return torch.tensor([own == grid for own in grids])[group]
