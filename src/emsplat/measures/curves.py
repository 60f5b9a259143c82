"""Curves over the shells of a map by name, and the resolutions that are read from a curve.

Nothing here loads torch: a curve may hold tensors on the CPU as well as arrays, and the report reads it by the rules of
the program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@runtime_checkable
class Sampled(Protocol):
    """Values at spatial frequencies in 1/Å, one for each shell 0, 1, ...: a `types.Curve`, or one of `Curves`."""

    @property
    def frequency(self) -> Any: ...

    @property
    def value(self) -> Any: ...


@dataclass(frozen=True)
class Line:
    """One of `Curves`."""

    frequency: Values
    value: Values


@dataclass(frozen=True)
class Curves:
    """What is known of a map over its shells; values are NaN where a curve is undefined.

    Of two half maps: "unmasked", "masked", "random_phases" (masked, with phases that share nothing), "corrected" (for
    these), "particle" (unmasked, scaled to the particle) and "masked_cryodrgn" (in cryoDRGN's shells). Of the classical
    half maps beneath them: "backprojection". "cross_validated" and the ends of its 95 % interval,
    "cross_validated_low" and "cross_validated_high". Of the full map and one that was given: "reference". Any of them
    may be missing.
    """

    frequency: Values  # 1/Å of shell 0, 1, ...
    values: Mapping[str, Values]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Line:
        return Line(self.frequency, self.values[name])

    def joined(self, **values: Any) -> Curves:
        """These curves and others, arrays or tensors on the CPU."""
        more = {name: np.asarray(value, np.float64) for name, value in values.items()}
        return replace(self, values={**self.values, **more})


def resolution(curve: Sampled, threshold: float) -> float | None:
    """Resolution in Å by RELION's rule: the last shell before the *first* drop below the threshold.

    There is no interpolation: shell s stands for N a / s. The threshold for half maps is 0.143 (Rosenthal &
    Henderson 2003), for a map against the truth 0.5. Shell 0 does not count, and an undefined value (NaN) is
    a drop. None if shell 1 is below already; the last shell (Nyquist) if no shell is.
    """
    shell = first_below(curve, threshold) - 1
    return 1 / float(curve.frequency[shell]) if shell > 0 else None


def never_falls(curve: Sampled, threshold: float) -> bool:
    """Whether every shell after 0 reaches the threshold.

    Then `resolution` and `crossing` are Nyquist, the limit of the pixel size: where the curve would have fallen is not
    known.
    """
    return first_below(curve, threshold) == len(curve.value)


def crossing(curve: Sampled, threshold: float) -> float | None:
    """Spacing in Å where the linearly interpolated curve first crosses the threshold.

    A smooth number for comparing methods, and for curves that come with an interval; of a half-map FSC quote
    `resolution`, which is never the finer of the two. None and Nyquist as there.
    """
    shell = first_below(curve, threshold)
    if shell == 1:
        return None
    if shell == len(curve.value) or math.isnan(float(curve.value[shell])):
        return 1 / float(curve.frequency[shell - 1])
    high, low = map(float, curve.value[shell - 1 : shell + 1])
    start, end = map(float, curve.frequency[shell - 1 : shell + 1])
    return 1 / (start + (end - start) * (high - threshold) / (high - low))


def ends_undefined(curve: Sampled, threshold: float) -> bool:
    """Whether the curve is undefined (NaN) from some shell on and has not fallen below the threshold before.

    Then `resolution` and `crossing` are the last spacing at which the data say something.
    """
    shell = first_below(curve, threshold)
    return 1 < shell < len(curve.value) and math.isnan(float(curve.value[shell]))


def last_crossing(curve: Sampled, threshold: float) -> float | None:
    """Spacing in Å of the last shell at or above the threshold, whatever lies before it (cryoDRGN, CryoBench).

    Not comparable with `resolution`. None if no shell after 0 reaches the threshold.
    """
    above = np.flatnonzero(np.asarray(curve.value)[1:] >= threshold)
    return 1 / float(curve.frequency[1 + int(above[-1])]) if len(above) else None


def first_below(curve: Sampled, threshold: float) -> int:
    """The first shell after 0 that does not reach the threshold; the number of shells if all do."""
    below = np.flatnonzero(~(np.asarray(curve.value)[1:] >= threshold))
    return 1 + int(below[0]) if len(below) else len(curve.value)
