"""Arrays on fewer samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def resample(values: NDArray[Any], count: int, axis: int) -> NDArray[Any]:
    """The frequencies that fewer samples along an axis can hold, as if it were periodic.

    The Nyquist frequency of an even ``count`` gathers both of its signs. (That of scipy.signal, which takes a second to
    import.)
    """
    import numpy as np
    from scipy import fft

    if count >= values.shape[axis]:
        return values
    spectrum = np.moveaxis(fft.rfft(values, axis=axis), axis, -1)[..., : count // 2 + 1]
    if count % 2 == 0:
        spectrum[..., -1] *= 2
    fewer: NDArray[Any] = np.moveaxis(fft.irfft(spectrum, count), -1, axis) * (count / values.shape[axis])
    return fewer
