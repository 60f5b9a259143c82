"""The options of `reconstruct` with everything decided."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from emsplat.config import RECIPES, ReconstructConfig
from emsplat.errors import InputError
from emsplat.models.start_files import check_start, is_shared, starts_from_gaussians


@dataclass(frozen=True)
class Settings:
    """A `ReconstructConfig` with everything decided."""

    engine: str
    gaussians: int | None
    init: str
    epochs: int
    batch: int | Literal["auto"]  # auto: to be found by a trial
    learning_rate: float
    decay: float
    weighting: str
    min_scale: float
    length_unit: float | None
    split_after: tuple[int, ...]
    isotropic: bool
    rotation: bool
    growth: int
    independent_halves: bool
    seed: int


_OF_ONE_ENGINE = {
    "one-pass": ("growth", "independent_halves"),
    "images": ("batch", "weighting", "split_after"),
}


def settings_of(config: ReconstructConfig) -> Settings:
    """Options where given, the recipe's values elsewhere.

    Raises:
        InputError: a value that describes no fit, or an option of the other engine.
    """
    basis: str = "images" if config.recipe == "default" and config.engine == "images" else config.recipe
    recipe = asdict(RECIPES[basis])
    _require_of_the_engine(config, basis, recipe["engine"])
    counted = config.gaussians is not None or starts_from_gaussians(config.init or recipe["init"])
    if config.growth is None and (counted or config.independent_halves):
        recipe["growth"] = 0  # a number that was asked for stays; nobody judges independent halves
    recipe |= {
        key: value for key, value in (("batch", 0), ("weighting", "noise"), ("growth", 0)) if recipe[key] is None
    }
    chosen: dict[str, Any] = {f.name: getattr(config, f.name, None) for f in fields(Settings)}
    merged = Settings(
        **{name: recipe[name] if value is None and name in recipe else value for name, value in chosen.items()}
    )
    _require_possible(config, merged)
    return merged


def _require_of_the_engine(config: ReconstructConfig, basis: str, engine: str) -> None:
    """
    Raises:
        InputError: another engine than that of the recipe was asked for, or an option of another engine.
    """
    if config.engine not in (None, engine):
        raise InputError(f"--recipe {basis} trains on images; expected --engine images, or leave --engine out")
    for own, names in _OF_ONE_ENGINE.items():
        for option in names:
            if own != engine and getattr(config, option) not in (None, False, ()):
                raise InputError(f"--{option.replace('_', '-')} belongs to --engine {own}; leave it out or add that")


def _require_possible(config: ReconstructConfig, settings: Settings) -> None:
    """
    Raises:
        InputError: a value that describes no fit.
    """
    for option, least in (("gaussians", 1), ("epochs", 1), ("batch", 1), ("growth", 0)):
        value = getattr(config, option)
        if value not in (None, "auto") and value < least:
            raise InputError(f"--{option} {value}: expected at least {least}")
    _check_start(config, settings)
    if config.independent_halves and settings.growth:
        raise InputError("--growth with --independent-halves: only the other half can tell whether more Gaussians pay")
    for option in ("learning_rate", "decay", "min_scale"):
        if not 0 < getattr(settings, option) < math.inf:
            raise InputError(f"--{option.replace('_', '-')} {getattr(settings, option)}: expected a number above 0")
    if any(not 0 < epoch < settings.epochs for epoch in settings.split_after):
        raise InputError(f"--split-after {settings.split_after}: expected epochs from 1 to {settings.epochs - 1}")


def _check_start(config: ReconstructConfig, settings: Settings) -> None:
    check_start(settings.init)
    if config.gaussians is not None and starts_from_gaussians(settings.init):
        raise InputError(f"--gaussians with --init {settings.init}: the file says how many there are; leave it out")
    if config.independent_halves and is_shared(settings.init):
        raise InputError(f"--independent-halves with --init {settings.init}: both halves would start from it; use map")
