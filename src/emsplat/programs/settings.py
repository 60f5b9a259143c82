"""The options of `reconstruct` with everything decided: a recipe, and what the user puts in place of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from emsplat.config import FitOptions, ModelOptions, ReconstructConfig
from emsplat.errors import InputError
from emsplat.models.start_files import check_start, is_shared, starts_from_gaussians

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """All that a fit goes by."""

    engine: Literal["one-pass", "images"]
    gaussians: int | None  # None: from the volume of the particle, see begin.gaussian_count
    init: str
    epochs: int
    learning_rate: float
    decay: float
    min_scale: float  # pixels
    length_unit: float | None  # pixels that one unit of means and scales stands for; None: the box
    growth: int = 0
    batch: int | Literal["auto"] = 0  # auto: to be found by a trial; 0: the engine has none
    weighting: Literal["none", "noise", "ramp"] = "noise"
    split_after: tuple[int, ...] = ()
    isotropic: bool = False
    rotation: bool = True
    independent_halves: bool = False
    residual: bool = False
    seed: int = 0


RECIPES = {
    "default": Settings("one-pass", None, "map", 12, 2e-2, 0.75, 0.7, 10.0, growth=2, residual=True),
    "images": Settings("images", None, "map", 12, 4e-2, 0.75, 0.5, 10.0, batch=128, weighting="ramp"),
    # cryoSplat, section 4.1. The paper has no lower bound on the scale; 0.1 px keeps float32 away from zero.
    "cryosplat": Settings("images", 30_000, "ball", 5, 1e-3, 0.1, 0.1, None, batch=1, weighting="none"),
    # GEM gives its number of Gaussians, start and batch size; rate and decay are cryoSplat's.
    "gem": Settings("images", 50_000, "uniform", 5, 1e-3, 0.1, 0.1, None, batch=1, weighting="none"),
}


def recipe_of(fit: FitOptions) -> Settings:
    """The recipe that the options start from: emsplat has its own for each engine."""
    return RECIPES["images" if fit.recipe == "default" and fit.engine == "images" else fit.recipe]


def settings_of(config: ReconstructConfig) -> Settings:
    """Options where given, the recipe's values elsewhere.

    Raises:
        InputError: a value that describes no fit, or an option of the other engine.
    """
    model, fit, recipe = config.model, config.fit, recipe_of(config.fit)
    if fit.engine not in (None, recipe.engine):
        raise InputError(f"--recipe {fit.recipe} trains on images; expected --engine images, or leave --engine out")
    _require_own_options(model, fit, recipe.engine)
    init = _given(model.init, recipe.init)
    # A number that was asked for stays; nobody judges independent halves.
    stays = model.gaussians is not None or starts_from_gaussians(init) or fit.independent_halves
    settings = replace(
        recipe,
        gaussians=_given(model.gaussians, recipe.gaussians),
        growth=_given(model.growth, 0 if stays else recipe.growth),
        init=init,
        min_scale=_given(model.min_scale, recipe.min_scale),
        isotropic=model.isotropic,
        rotation=model.rotation,
        independent_halves=fit.independent_halves,
        residual=_given(fit.residual, recipe.residual and not fit.independent_halves),
        epochs=_given(fit.epochs, recipe.epochs),
        batch=_given(fit.batch, recipe.batch),
        learning_rate=_given(fit.learning_rate, recipe.learning_rate),
        decay=_given(fit.decay, recipe.decay),
        weighting=_given(fit.weighting, recipe.weighting),
        split_after=fit.split_after,
        seed=config.halves.seed,
    )
    _require_sensible(model, fit, settings)
    return settings


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _require_own_options(model: ModelOptions, fit: FitOptions, engine: str) -> None:
    """
    Raises:
        InputError: an option of the other engine is given.
    """
    given = {
        "--growth": ("one-pass", model.growth is not None),
        "--independent-halves": ("one-pass", fit.independent_halves),
        "--residual": ("one-pass", fit.residual is True),
        "--batch": ("images", fit.batch is not None),
        "--weighting": ("images", fit.weighting is not None),
        "--split-after": ("images", bool(fit.split_after)),
    }
    for option, (owner, is_given) in given.items():
        if is_given and owner != engine:
            raise InputError(f"{option} belongs to --engine {owner}; leave it out or add that")


def _require_sensible(model: ModelOptions, fit: FitOptions, settings: Settings) -> None:
    """
    Raises:
        InputError: a number out of its bounds, or a start that contradicts another option.
    """
    counts = {"gaussians": (model.gaussians, 1), "epochs": (fit.epochs, 1), "batch": (fit.batch, 1)}
    for option, (count, least) in (counts | {"growth": (model.growth, 0)}).items():
        if isinstance(count, int) and count < least:
            raise InputError(f"--{option} {count}: expected at least {least}")
    check_start(settings.init)
    if model.gaussians is not None and starts_from_gaussians(settings.init):
        raise InputError(f"--gaussians with --init {settings.init}: the file says how many there are; leave it out")
    if fit.independent_halves and is_shared(settings.init):
        raise InputError(f"--independent-halves with --init {settings.init}: both halves would start from it; use map")
    if fit.independent_halves and settings.growth:
        raise InputError("--growth with --independent-halves: only the other half can tell whether more Gaussians pay")
    if fit.independent_halves and fit.residual:
        raise InputError("--residual with --independent-halves: it is what both halves agree on; leave one of them out")
    numbers = {"learning-rate": settings.learning_rate, "decay": settings.decay, "min-scale": settings.min_scale}
    for option, number in numbers.items():
        if not 0 < number < math.inf:
            raise InputError(f"--{option} {number}: expected a number above 0")
    if any(not 0 < epoch < settings.epochs for epoch in settings.split_after):
        raise InputError(f"--split-after {settings.split_after}: expected epochs from 1 to {settings.epochs - 1}")
