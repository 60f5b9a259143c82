"""Several processes that share the particles out. Alone by default: the same code for one process and for many.

The processes are PyTorch's own (`torch.distributed`), started by ``torchrun``; nothing here starts any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from jaxtyping import Int
from torch import Tensor

_PIECE = 2**24  # numbers that are summed at a time, so that no copy of a whole volume is made
_PATIENCE = timedelta(minutes=30)  # with the slowest reader


@dataclass(frozen=True)
class World:
    """Who takes part, and which of them this process is."""

    rank: int = 0
    size: int = 1

    def share(self, order: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """The part of this process: neighbours stay together, as on disk."""
        return torch.tensor_split(order, self.size)[self.rank]

    def sum_(self, *tensors: Tensor) -> None:
        """Replaces tensors by their sums over all processes, the same bits in each. All give the same shapes in the
        same order; a tensor is contiguous, real or complex."""
        if self.size == 1:
            return
        import torch.distributed as distributed

        for tensor in tensors:
            flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)
            for piece in torch.split(flat, _PIECE):
                distributed.all_reduce(piece)

    def agree(self, flag: bool) -> bool:
        """Whether any process says so. What all have to do together is never decided by the clock of one."""
        said = torch.tensor([int(flag)], device=_device_of_messages(self))
        self.sum_(said)
        return bool(said[0] > 0)


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The world that ``torchrun`` has started this process into, or `ALONE` where it has not.

    Sums go over NCCL between GPUs (each process takes that of its local rank) and over Gloo between CPUs.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    import torch.distributed as distributed

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def _device_of_messages(world: World) -> torch.device:
    """Where flags are summed."""
    if world.size == 1:
        return torch.device("cpu")
    import torch.distributed as distributed

    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
