"""The numbers of a heterogeneous run for its page."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from emsplat.heterogeneity.half import HalfModel
from emsplat.heterogeneity.motions import members
from emsplat.heterogeneity.paths import principal
from emsplat.particles.stack import ParticleStack
from emsplat.programs.state_particles import Views, row_numbers
from emsplat.report.explorer import DecoderNumbers, ExplorerNumbers, ParticleNumbers, StateNumbers


def explorer_numbers(
    name: str,
    models: tuple[HalfModel, HalfModel],
    stack: ParticleStack,
    views: Views,
    states: list[dict[str, Any]],
    places: Float[Tensor, "s q"],
    facts: list[str],
    warnings: list[str],
) -> ExplorerNumbers:
    """All that the page shows."""
    table = stack.table
    optics = table.optics[views.row]
    particles = ParticleNumbers(
        row=row_numbers(stack)[views.row].numpy(),
        half=views.half.numpy(),
        latent=views.latent.numpy(),
        gain=views.gain.numpy(),
        cluster=None if views.classes is None else views.classes.numpy(),
        defocus=(0.5 * (optics.defocus_u + optics.defocus_v)).numpy(),
        micrograph=table.micrograph[views.row].numpy(),
        grey=views.grey.numpy(),
        copy=views.copy.numpy() if stack.symmetry.order > 1 else None,
    )
    density = models[0].density
    components, _ = principal(views.latent, models[0].change_gram())
    return ExplorerNumbers(
        name,
        [_decoder(model, number + 1) for number, model in enumerate(models)],
        particles,
        density.point.numpy(),
        density.weight.numpy(),
        views.latent.mean(0).numpy(),
        [
            StateNumbers(
                f"state {state['state']}",
                place.numpy(),
                state["population"],
                (state["population_interval"][0], state["population_interval"][1]),
                state["moving_resolution"],
            )
            for state, place in zip(states, places, strict=True)
        ],
        facts,
        warnings,
        (components / torch.linalg.vector_norm(components, dim=1, keepdim=True)).numpy(),
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
        part=members(model).argmax(1).numpy(),
    )
