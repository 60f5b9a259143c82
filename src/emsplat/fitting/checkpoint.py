"""The whole state of a fit in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from emsplat.device import CPU
from emsplat.errors import InputError
from emsplat.fitting.state import M, State
from emsplat.io.tensors import write_tensors
from emsplat.models.base import Reader, Saved
from emsplat.models.gaussians import read_gaussian_field


def save_checkpoint(path: Path, state: State[M]) -> None:
    """The whole state of a fit as safetensors, under a temporary name until it is complete.

    Raises:
        EmsplatError: the fit has diverged.
    """
    state.require_finite()
    saved = state.model.state()
    tensors = {f"model.{name}": tensor for name, tensor in saved.tensors.items()}
    tensors |= {f"adam.{name}": moment for name, moment in state.optimiser.moments().items()}
    about = {"step": state.step, "kind": saved.kind, "numbers": saved.numbers}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, held, {"emsplat": json.dumps(about)})


def load_checkpoint(path: Path, device: torch.device = CPU, read: Reader = read_gaussian_field) -> State[Any]:
    """What `save_checkpoint` wrote, on ``device``; ``read`` makes the model from what it had saved.

    Raises:
        InputError: missing, damaged, or not a checkpoint of emsplat.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["emsplat"])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a dict)
        held = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        model = read(Saved(about["kind"], about["numbers"], held))
        moments = {name.removeprefix("adam."): t for name, t in tensors.items() if name.startswith("adam.")}
        return State.begin(model, int(about["step"])).with_model(model, moments)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a checkpoint that can be resumed ({error}); remove it or start anew with --overwrite"
        ) from error
