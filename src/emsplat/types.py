"""The nouns: frozen bundles of tensors in house units.

Lengths in Å, angles in radians, voltages in kV, spherical aberration in mm. Arrays are indexed [z, y, x], points are
(x, y, z), and images and volumes are centred on pixel ``size // 2`` of every axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

_R = TypeVar("_R", bound="_Rows")


class _Rows:
    """Bundles whose tensors share a leading particle axis can be indexed as one. Parts may be bundles, or None."""

    def __getitem__(self: _R, rows: Tensor | slice) -> _R:
        return self._each(lambda part: part[rows])

    def to(self: _R, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> _R:
        """The same bundle with floating tensors in another dtype and all tensors on another device."""

        return self.each(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def each(self: _R, change: Callable[[Tensor], Tensor]) -> _R:
        """The same bundle with every tensor changed, also in bundles within."""
        return self._each(lambda part: part.each(change) if isinstance(part, _Rows) else change(part))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, also in bundles within."""
        for part in (getattr(self, f.name) for f in fields(self)):  # type: ignore[arg-type]
            if isinstance(part, _Rows):
                yield from part.tensors()
            elif part is not None:
                yield part

    def _each(self: _R, change: Callable[[Any], Any]) -> _R:
        parts = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return type(self)(*(None if part is None else change(part) for part in parts))

    def __len__(self) -> int:
        first: Tensor = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        return len(first)


@dataclass(frozen=True)
class Grid:
    """A square image or cubic volume: ``size`` pixels of ``pixel_size`` Å on each axis, centre at ``size // 2``."""

    size: int
    pixel_size: float

    @property
    def length(self) -> float:
        """Box length in Å."""
        return self.size * self.pixel_size

    @property
    def nyquist(self) -> float:
        """Smallest spacing that the grid carries, in Å."""
        return self.length / (self.size // 2)


@dataclass(frozen=True)
class Poses(_Rows):
    """Orientation and position of each particle.

    ``rotation`` A maps object to image coordinates, q = A p (RELION's matrix, docs/conventions.md).
    ``shift`` (x, y) in Å is RELION's origin: shifting the image by +shift centres the particle, so that the object
    point p appears at (A p)[:2] - shift.
    """

    rotation: Float[Tensor, "p 3 3"]
    shift: Float[Tensor, "p 2"]


@dataclass(frozen=True)
class Aberrations(_Rows):
    """What bends an image beyond defocus and spherical aberration (one row per particle).

    The image's frequency k shows the frequency M k of the undistorted image (M: ``magnification``, RELION's MagMat).
    Phases are sums of Zernike polynomials of M k in 1/Å, in RELION's order: ``odd`` ones turn the phase of the image
    (beam tilt among them), ``even`` ones add to the phase of the CTF. Widths may be 0.
    """

    magnification: Float[Tensor, "p 2 2"]
    odd: Float[Tensor, "p a"]  # rad
    even: Float[Tensor, "p b"]  # rad


RAW, PHASE_FLIPPED, PREMULTIPLIED = range(3)


@dataclass(frozen=True)
class Optics(_Rows):
    """What the contrast transfer function of each particle depends on (one row per particle)."""

    voltage: Float[Tensor, " p"]  # kV
    cs: Float[Tensor, " p"]  # mm
    amplitude_contrast: Float[Tensor, " p"]  # fraction
    defocus_u: Float[Tensor, " p"]  # Å, underfocus positive
    defocus_v: Float[Tensor, " p"]  # Å
    defocus_angle: Float[Tensor, " p"]  # rad, from +x towards +y
    phase_shift: Float[Tensor, " p"]  # rad, of a phase plate
    b_factor: Float[Tensor, " p"]  # Å², amplitudes fall as exp(-B k²/4)
    scale: Float[Tensor, " p"]  # factor
    aberrations: Aberrations | None = None  # None: none at all
    treatment: Int[Tensor, " p"] | None = None  # RAW, PHASE_FLIPPED or PREMULTIPLIED images; None: all raw


@dataclass(frozen=True)
class Gaussians:
    """A mixture of normalised anisotropic 3D Gaussians, or one for each of some particles.

    ``amplitude`` is the integral of each Gaussian; a covariance row is symmetric and positive definite. Whatever
    differs from particle to particle has a leading axis, the rest has none: means (p, g, 3) beside covariances
    (g, 3, 3) are mixtures that move and keep their shapes.
    """

    mean: Float[Tensor, "*p g 3"]  # Å
    covariance: Float[Tensor, "*q g 3 3"]  # Å²
    amplitude: Float[Tensor, "*r g"]

    def __len__(self) -> int:
        """How many Gaussians a mixture has."""
        return self.mean.shape[-2]

    @property
    def each(self) -> bool:
        """Whether every particle has a mixture of its own."""
        return self.mean.dim() > 2 or self.covariance.dim() > 3 or self.amplitude.dim() > 1


@dataclass(frozen=True)
class Batch(_Rows):
    """Some particles with their images, as an objective sees them."""

    images: Float[Tensor, "p y x"]
    poses: Poses
    optics: Optics
    optics_group: Int[Tensor, " p"]  # 0-based index of the noise model
    index: Int[Tensor, " p"]  # row in the particle table
    share: Float[Tensor, " p"] | None = None  # weight among the copies of an image; None: 1
    element: Int[Tensor, " p"] | None = None  # of the symmetry: how the pose was turned; None: it was not


@dataclass(frozen=True)
class Curve:
    """A function of spatial frequency at shells: shell s holds |k| in [s - 1/2, s + 1/2) / box length."""

    frequency: Float[Tensor, " s"]  # 1/Å
    value: Float[Tensor, " s"]
