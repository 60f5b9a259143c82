"""The whole state of fits, in a file or for another process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.device import CPU
from emsplat.errors import InputError
from emsplat.fitting.state import M, State
from emsplat.io.tensors import write_tensors
from emsplat.models.base import Reader, Saved
from emsplat.models.gaussians import read_gaussian_field
from emsplat.parallel import World


def save_checkpoint(path: Path, state: State[M]) -> None:
    """The whole state of a fit as safetensors, under a temporary name until it is complete.

    Raises:
        EmsplatError: the fit has diverged.
    """
    save_states(path, {"": state})


def save_states(path: Path, states: Mapping[str, State[M]], about: Mapping[str, Any] | None = None) -> None:
    """Several states by name, and what JSON can hold ``about`` them, in one file.

    Raises:
        EmsplatError: a fit has diverged.
    """
    held: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for name, state in states.items():
        state.require_finite()
        said[name], tensors = _packed(state)
        held |= {f"{name}/{own}" if name else own: tensor.cpu() for own, tensor in tensors.items()}
    told = said[""] if "" in said else {"states": said, "about": dict(about or {})}
    write_tensors(path, held, {"emsplat": json.dumps(told)})


def _packed(state: State[M]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    saved = state.model.state()
    tensors = {f"model.{name}": tensor for name, tensor in saved.tensors.items()}
    tensors |= {f"adam.{name}": moment for name, moment in state.optimiser.moments().items()}
    terms = {name: float(term) for name, term in state.terms.items()}
    about = {"step": state.step, "kind": saved.kind, "numbers": saved.numbers, "terms": terms}
    return about, {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _unpacked(about: Mapping[str, Any], tensors: Mapping[str, Tensor], read: Reader) -> State[Any]:
    """
    Raises:
        KeyError, TypeError, ValueError: not what `_packed` gives.
    """
    held = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    model = read(Saved(about["kind"], about["numbers"], held))
    moments = {name.removeprefix("adam."): t for name, t in tensors.items() if name.startswith("adam.")}
    state = State.begin(model, int(about["step"])).with_model(model, moments)
    device = next(iter(held.values())).device
    terms = {name: torch.tensor(value).to(device) for name, value in about.get("terms", {}).items()}
    return replace(state, terms=terms)


def load_checkpoint(path: Path, device: torch.device = CPU, read: Reader = read_gaussian_field) -> State[Any]:
    """What `save_checkpoint` wrote, on ``device``; ``read`` makes the model from what it had saved.

    Raises:
        InputError: missing, damaged, or not a checkpoint of emsplat.
    """
    with _reading(path):
        tensors, about = _read(path, device)
        return _unpacked(about, tensors, read)


def load_states(
    path: Path, device: torch.device = CPU, read: Reader = read_gaussian_field
) -> tuple[dict[str, State[Any]], dict[str, Any]]:
    """What `save_states` wrote, on ``device``: the states, and what was said about them.

    Raises:
        InputError: as `load_checkpoint`.
    """
    with _reading(path):
        tensors, told = _read(path, device)
        states = {}
        for name, about in told["states"].items():
            own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
            states[name] = _unpacked(about, own, read)
        return states, dict(told["about"])


def spread_state(
    state: State[Any] | None,
    world: World,
    source: int = 0,
    device: torch.device = CPU,
    read: Reader = read_gaussian_field,
) -> State[Any]:
    """The state that one process has, in all of them; what the others have does not count, and may be nothing."""
    return world.spread_packed(state, _packed, partial(_unpacked, read=read), source, device)


def _read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["emsplat"])
        return {name: file.get_tensor(name).to(device) for name in file.keys()}, about  # noqa: SIM118 (not a dict)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a checkpoint that can be resumed ({error}); remove it or start anew with --overwrite"
        ) from error
