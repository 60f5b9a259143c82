"""Images against projections, in mini-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emsplat.fitting.objective import KnownGradient, error_and_gradient
from emsplat.imaging.ctf import Observed, in_image, observe
from emsplat.imaging.project import CUTOFF, project
from emsplat.maths.fourier import shell_index
from emsplat.models.base import Model
from emsplat.parallel import ALONE, World
from emsplat.particles.stack import Particles
from emsplat.types import Batch, Gaussians, Grid, Poses

_CACHED_PIXELS = 2**19


class ImageObjective:
    """Images against projections: the papers' training in the image domain, in mini-batches of any size.

    Every epoch presents each particle once, in an order that follows from (seed, epoch) alone, so that a run can be
    resumed at any step. Processes of a ``world`` share each mini-batch out, or each takes what is its ``own`` of it:
    the loss of all is the sum of theirs. ``noise`` (optics groups, shells) turns the mean squared error into a
    noise-weighted one.
    """

    def __init__(
        self,
        stack: Particles,
        *,
        batch: int,
        seed: int,
        noise: Float[Tensor, "o s"] | None = None,
        cutoff: float = CUTOFF,
        world: World = ALONE,
        own: Bool[Tensor, " p"] | None = None,
    ) -> None:
        self.stack = stack
        self.world = world
        self.own = own
        self.batch = batch
        self.seed = seed
        self.cutoff = cutoff
        self.steps_per_epoch = math.ceil(len(stack) / batch)
        self._weight = None if noise is None else noise_weight(noise, stack.grid)
        self._next_step = -1
        self._batches: Iterator[Batch] = iter(())

    def __call__(self, model: Model, step: int) -> dict[str, Tensor]:
        """The loss of the mini-batch of ``step``, counted from the first step of the first epoch."""
        batch = self._load(step)
        if not len(batch):
            return {"loss": torch.zeros((), device=batch.images.device)}
        position = step % self.steps_per_epoch * self.batch
        count = min(self.batch, len(self.stack) - position)
        return {"loss": self.loss(model.gaussians(batch), batch, model.poses(batch), count)}

    def loss(
        self, gaussians: Gaussians, batch: Batch, poses: Poses | None = None, count: int | None = None
    ) -> Float[Tensor, ""]:
        """`squared_error` of a batch seen in ``poses`` (None: its own), differentiable in the Gaussians and the poses;
        its share of the mean over ``count`` images, of which it is a part.

        Images are moved by the batch's shifts, and projected by what the poses' differ from these. On the CPU a few
        images are transformed at a time: they stay in the cache.
        """
        grid = self.stack.grid
        poses = batch.poses if poses is None else poses
        seen_as = Poses(in_image(poses.rotation, batch.optics), poses.shift - batch.poses.shift)
        projection = project(gaussians, seen_as, grid, cutoff=self.cutoff)
        on_cpu = projection.device.type == "cpu"
        few = max(1, _CACHED_PIXELS // grid.size**2) if on_cpu else max(1, len(projection))
        error, gradient = torch.zeros((), device=projection.device), torch.empty_like(projection)
        for start in range(0, len(projection), few):
            part = slice(start, start + few)
            seen, weight = self.observe(batch[part])
            added, gradient[part] = error_and_gradient(projection.detach()[part], seen.transfer, seen.spectrum, weight)
            error += added
        count = count or len(projection)
        return cast(Tensor, KnownGradient.apply(projection, error / count, gradient / count))  # type: ignore[no-untyped-call]

    def observe(self, batch: Batch) -> tuple[Observed, Float[Tensor, "*#p #y #k"]]:
        """Transforms and CTFs of a batch, and the weight of each coefficient."""
        seen = observe(batch, self.stack.grid, corner=True)
        weight = seen.transfer.new_ones(1, 1) if self._weight is None else self._weight[batch.optics_group]
        return seen, weight if batch.share is None else weight * batch.share[:, None, None]

    def _load(self, step: int) -> Batch:
        if step != self._next_step or step % self.steps_per_epoch == 0:
            epoch, skip = divmod(step, self.steps_per_epoch)
            shared: dict[str, Any] = {} if self.world.size == 1 else {"world": self.world, "own": self.own}
            self._batches = self.stack.batches(self.batch, seed=self.seed, epoch=epoch, skip=skip, **shared)
        self._next_step = step + 1
        return next(self._batches)


def noise_weight(noise: Float[Tensor, "o s"], grid: Grid) -> Float[Tensor, "o y k"]:
    """1/σ² of each rfft coefficient, 0 beyond the last shell: the corners hold no shell of the map."""
    shells = shell_index(grid.size, device=noise.device)
    inside = shells <= grid.size // 2
    return inside / noise[:, shells.clamp(max=grid.size // 2)]
