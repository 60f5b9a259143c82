"""The numbers of a heterogeneous run for its page."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emsplat.heterogeneity.half import HalfModel
from emsplat.particles.stack import ParticleStack
from emsplat.report.explorer import DecoderNumbers, ExplorerNumbers, ParticleNumbers, StateNumbers


def explorer_numbers(
    name: str,
    models: tuple[HalfModel, HalfModel],
    stack: ParticleStack,
    rows: Int[Tensor, " v"],
    latent: Float[Tensor, "v q"],
    gain: Float[Tensor, " v"],
    classes: Int[Tensor, " v"] | None,
    states: list[dict[str, Any]],
    places: Float[Tensor, "s q"],
    facts: list[str],
    warnings: list[str],
) -> ExplorerNumbers:
    """All that the page shows, of views in the order of the input; ``rows`` are those of the particle table."""
    table = stack.table
    optics = table.optics[rows]
    half = table.half[rows] if table.half is not None else torch.zeros_like(rows)
    particles = ParticleNumbers(
        row=table.row[rows].numpy() + 1,
        half=half.numpy(),
        latent=latent.numpy(),
        gain=gain.numpy(),
        cluster=None if classes is None else classes.numpy(),
        defocus=(0.5 * (optics.defocus_u + optics.defocus_v)).numpy(),
        micrograph=table.micrograph[rows].numpy(),
    )
    density = models[0].density
    return ExplorerNumbers(
        name,
        [_decoder(model, number + 1) for number, model in enumerate(models)],
        particles,
        density.point.numpy(),
        density.weight.numpy(),
        latent.mean(0).numpy(),
        [
            StateNumbers(
                f"state {state['state']}", place.numpy(), state["population"], resolution=state["moving_resolution"]
            )
            for state, place in zip(states, places, strict=True)
        ],
        facts,
        warnings,
    )


def _decoder(model: HalfModel, half: int) -> DecoderNumbers:
    own: dict[str, NDArray[Any]] = {name: value.detach().numpy() for name, value in model.decoder.named_parameters()}
    frame = np.concatenate([model.frame.turn.numpy(), model.frame.offset.numpy()[:, None]], 1)
    return DecoderNumbers(
        **{name: own[name] for name in ("centre", "width", "amplitude", "logits", "bend", "change")},
        weights=[own[f"weights.{number}"] for number in range(3)],
        biases=[own[f"biases.{number}"] for number in range(3)],
        length=model.decoder.length,
        unit=model.decoder.unit,
        half=half,
        frame=frame,
    )
