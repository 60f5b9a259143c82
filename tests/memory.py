"""Particles in memory: images that were never on disk, and are not normalised."""

import torch

from emsplat.maths.groups import C1
from emsplat.types import Batch


class Memory:
    """The part of a ParticleStack that sums and objectives ask for (`Particles`)."""

    def __init__(self, grid, images, poses, optics, groups=None):
        rows = torch.arange(len(images))
        self.grid, self.symmetry = grid, C1
        self.all = Batch(images, poses, optics, torch.zeros_like(rows) if groups is None else groups, rows)

    def __len__(self):
        return len(self.all)

    def take(self, rows):
        part = object.__new__(type(self))
        vars(part).update(vars(self), all=self.all[rows])
        return part

    def shared(self, world, positions):
        return world.share(positions)

    def sequential(self, size):
        for rows in torch.arange(len(self)).split(size):
            yield self.all[rows]

    def batches(self, size, *, seed, epoch=0, skip=0):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(100 * seed + epoch))
        for start in range(skip * size, len(self), size):
            yield self.all[order[start : start + size]]
