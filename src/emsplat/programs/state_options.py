"""What the options of `emsplat heterogeneity` say of a fit to images: a recipe, and what the user puts in its place."""

from __future__ import annotations

from dataclasses import replace

from emsplat.config import HeterogeneityConfig
from emsplat.errors import InputError
from emsplat.heterogeneity.images import ConformationOptions, Pass

_RECIPES = {
    # The separable decoder from latents of the linear stage, by the noise spectrum.
    "default": ConformationOptions(
        decoder="separable", weighted=True, coarse=Pass(2048, 0.02, 6, 5e-3), fine=Pass(8192, 0.01, 4, 2e-3)
    ),
    "cryospire": ConformationOptions(),
}


def engine_of(config: HeterogeneityConfig) -> str:
    """cells or images."""
    given = config.heterogeneity
    return given.engine or ("images" if given.recipe == "cryospire" else "cells")


def conformation_options(config: HeterogeneityConfig) -> ConformationOptions:
    """The recipe with what the user puts in place of it.

    Raises:
        InputError: a number that describes no fit.
    """
    given = config.heterogeneity
    own = _RECIPES[given.recipe]
    epochs = given.epochs or (own.coarse.epochs, own.fine.epochs)
    if len(epochs) != 2 or min(epochs) < 1:
        raise InputError(f"--epochs {' '.join(map(str, epochs))}: expected two numbers above 0, coarse and fine")
    rate = 1.0 if given.learning_rate is None else given.learning_rate / own.coarse.learning_rate
    if not 0 < rate < float("inf"):
        raise InputError(f"--learning-rate {given.learning_rate}: expected a number above 0")
    coarse, fine = (
        replace(one, epochs=count, learning_rate=rate * one.learning_rate)
        for one, count in zip((own.coarse, own.fine), epochs, strict=True)
    )
    if given.gaussians is not None:
        fine = replace(fine, gaussians=given.gaussians)
    return replace(
        own,
        decoder=given.decoder or own.decoder,
        parts=given.parts,
        batch=given.batch or own.batch,
        seed=config.halves.seed,
        coarse=coarse,
        fine=fine,
    )


def starts_at_random(config: HeterogeneityConfig) -> bool:
    """Whether latents of a fit to images are drawn, or those of the linear stage."""
    start = config.heterogeneity.start
    return (config.heterogeneity.recipe == "cryospire") if start is None else start == "random"
