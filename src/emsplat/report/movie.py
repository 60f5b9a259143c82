"""Movies of a molecule in motion: shaded isosurfaces of maps, as animated WebP, which browsers and slides play."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emsplat.io.files import replacing
from emsplat.report.resample import resample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PIXELS = 300  # of a view along each side
_FINER = 2  # rays per pixel along each side
_LARGEST = 96  # voxels along the axis of a map that is drawn
_SMOOTH = 0.6  # voxels
_GROUND, _PAINT = (255, 255, 255), (98, 168, 216)
_LIGHT = (-0.4, 0.5, 0.75)  # towards the viewer's upper left
_MILLISECONDS = 120


def write_movie(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Frames [y, x, rgb] of one size as a movie, forward and back.

    Raises:
        OutputError: it cannot be written.
    """
    from PIL import Image

    played = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    with replacing(path) as temporary:
        played[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=played[1:],
            duration=_MILLISECONDS,
            loop=0,
            quality=80,
            method=4,
        )


def draw_frame(volume: NDArray[np.float32], level: float, reach: float = 1.0) -> NDArray[np.uint8]:
    """Views of the isosurface of a map side by side, [y, x, rgb], the first row on top.

    Seen along z from the front (x to the right, y up), and from -x (z to the right, y up).
    """
    import numpy as np
    from scipy.ndimage import gaussian_filter

    size = len(volume)
    edge = max(0, round(size * (1 - min(1.0, reach)) / 2))
    part = np.asarray(volume[edge : size - edge, edge : size - edge, edge : size - edge], np.float32)
    for axis in range(3):
        if part.shape[axis] > _LARGEST:
            part = resample(part, _LARGEST, axis=axis)
    smooth = gaussian_filter(np.asarray(part, np.float32), _SMOOTH)
    return np.concatenate([_view(smooth, level), _view(smooth.transpose(2, 1, 0)[::-1], level)], 1)


def _view(volume: NDArray[np.float32], level: float) -> NDArray[np.uint8]:
    """Where rays along z, from the largest, first meet the level; shaded by the gradient there, darker further away."""
    import numpy as np
    from scipy.ndimage import map_coordinates

    size, pixels = len(volume), _FINER * _PIXELS
    place = ((np.arange(pixels) + 0.5) / pixels) * size - 0.5
    rays = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size))).astype(np.float32)  # linear interpolation
    depth = np.full((pixels, pixels), np.nan)
    before = np.zeros_like(depth)
    for z in range(size - 1, -1, -1):
        value = rays @ volume[z] @ rays.T
        met = np.isnan(depth) & (value >= level)
        depth[met] = z + (value[met] - level) / np.maximum(value[met] - before[met], 1e-30)
        before = value
    image = np.empty((pixels, pixels, 3))
    image[:] = _GROUND
    there = np.isfinite(depth)
    if there.any():
        y, x = np.nonzero(there)
        at = np.stack([depth[there], place[y], place[x]])
        normal = np.stack([-map_coordinates(own, at, order=1) for own in np.gradient(volume)[::-1]])
        normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-30)
        diffuse = np.clip(np.array(_LIGHT) / np.linalg.norm(_LIGHT) @ normal, 0, 1)
        near = 0.6 + 0.4 * at[0] / size
        shine = 45 * np.clip(normal[2], 0, 1) ** 30
        image[there] = (near * (0.4 + 0.6 * diffuse))[:, None] * np.array(_PAINT) + (near * shine)[:, None]
    image = image.reshape(_PIXELS, _FINER, _PIXELS, _FINER, 3).mean((1, 3))[::-1]
    shown: NDArray[np.uint8] = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return shown
