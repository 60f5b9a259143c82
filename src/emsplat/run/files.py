"""The names of the files in a run folder."""

from __future__ import annotations

HALVES = {"half1": 1, "half2": 2}  # the fits of half-sets and the numbers of these; that of all is "class001"
HALF_MAPS = ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc")
FULL_MAP = "run_class001.mrc"
BACKPROJECTIONS = ("backprojection_half1.mrc", "backprojection_half2.mrc")


def map_name(fit: str) -> str:
    """The map of a fit, called as RELION calls those of a refinement."""
    return FULL_MAP if fit == "class001" else HALF_MAPS[HALVES[fit] - 1]
