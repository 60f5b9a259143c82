"""The device of a run, and all that emsplat does with CUDA beyond running PyTorch on it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import Tensor

from emsplat.errors import InputError

CPU = torch.device("cpu")
_CAPABILITY = (7, 5)  # what the kernels are compiled for in the tests: Turing, 2018
_GIB = 2**30
_T = TypeVar("_T")


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> tuple[torch.device, str]:
    """The device to run on, and a line that says which it is, or why it is not a GPU.

    Raises:
        InputError: a GPU was asked for and cannot be had.
    """
    if wanted == "cpu":
        return CPU, "device: CPU, as asked for"
    obstacle = _obstacle()
    if obstacle is None:
        index = torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / _GIB
        name = torch.cuda.get_device_name(index)
        line = f"device: {name}, {memory:.0f} GiB, compute capability {major}.{minor}"
        return torch.device("cuda", index), line
    reason, remedy = obstacle
    if wanted == "cuda":
        raise InputError(f"--device cuda: {reason}; {remedy}, or run on the CPU without --device")
    return CPU, f"device: CPU ({reason})"


def _obstacle() -> tuple[str, str] | None:
    """Why CUDA cannot be used, and what would help; None if it can."""
    if torch.version.cuda is None:
        return "PyTorch was built without CUDA", "install PyTorch with CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device found", "nvidia-smi should list one, with a driver for CUDA " + torch.version.cuda
    index = torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(index)
    if capability < _CAPABILITY:
        has, needed = (".".join(map(str, numbers)) for numbers in (capability, _CAPABILITY))
        name = torch.cuda.get_device_name(index)
        return f"{name} (compute capability {has}) is too old, {needed} is needed", "choose a newer one"
    if find_spec("triton") is None:
        return "Triton is missing: pip install emsplat[gpu]", "install it"
    return None


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def forget_peak_memory(device: torch.device) -> None:
    """Lets `peak_device_memory` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_memory(device: torch.device) -> float | None:
    """Most memory that PyTorch has held on a GPU, in MB; None for the CPU."""
    return torch.cuda.max_memory_reserved(device) / 1e6 if device.type == "cuda" else None


def fits_memory(work: Callable[[], object]) -> bool:
    """Whether a trial ends well, or runs out of the memory of a GPU; nothing of it stays there."""
    try:
        work()
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits


@contextmanager
def within_memory() -> Iterator[None]:
    """
    Raises:
        InputError: the memory of a GPU has run out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the memory of the GPU is not enough ({str(error).split('. ')[0]}); end other programs on it, take "
            "coarser pixels with --box, or run with --device cpu"
        ) from error


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all lanes: memory that PyTorch keeps for one stream is of no use to another."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Lane:
    """The way of data to a device, beside what runs there: on CUDA a stream of its own.

    A thread that reads works inside `open`, sends what it has read and ends with `depart`; who uses the tensors calls
    `arrive` first. On other devices all this is a plain copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _side_stream(device) if device.type == "cuda" else None

    @contextmanager
    def open(self) -> Iterator[None]:
        """What is computed inside waits for what came before in this lane, and for nothing else."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def buffer(self, *shape: int) -> Tensor:
        """Memory of the host that `send` takes without waiting. PyTorch reuses it once its copy is complete."""
        return torch.empty(shape, pin_memory=self._stream is not None)

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, as soon as the lane gets to it."""
        if self._stream is None:
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def depart(self) -> torch.cuda.Event | None:
        """The moment at which all that was sent and computed so far is complete."""
        return None if self._stream is None else self._stream.record_event()

    def arrive(self, moment: torch.cuda.Event | None, tensors: Iterator[Tensor]) -> None:
        """What the caller does next on the device waits for that moment; the host does not.

        The memory of the tensors goes back to the lane no earlier than the caller's stream is done with them.
        """
        if moment is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(moment)
        for tensor in tensors:
            tensor.record_stream(stream)
