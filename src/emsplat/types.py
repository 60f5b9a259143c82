"""The nouns: frozen bundles of tensors in house units.

Lengths in Å, angles in radians, voltages in kV, spherical aberration in mm. Arrays are indexed [z, y, x], points are
(x, y, z), and images and volumes are centred on pixel ``size // 2`` of every axis.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


class _Rows:
    """Bundles whose tensors share a leading particle axis can be indexed as one."""

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """The same bundle with floating tensors in another dtype and all tensors on another device."""
        tensors = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return type(self)(*(t.to(device=device, dtype=dtype if t.is_floating_point() else None) for t in tensors))

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
        return 2 * self.pixel_size


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


@dataclass(frozen=True)
class Gaussians:
    """A mixture of normalised anisotropic 3D Gaussians.

    ``amplitude`` is the integral of each Gaussian; a covariance row is symmetric and positive definite.
    """

    mean: Float[Tensor, "g 3"]  # Å
    covariance: Float[Tensor, "g 3 3"]  # Å²
    amplitude: Float[Tensor, " g"]

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Batch(_Rows):
    """Some particles with their images, as an objective sees them."""

    images: Float[Tensor, "p y x"]
    poses: Poses
    optics: Optics
    optics_group: Int[Tensor, " p"]  # 0-based index of the noise model
    index: Int[Tensor, " p"]  # row in the particle table


@dataclass(frozen=True)
class Curve:
    """A function of spatial frequency at shells: shell s holds |k| in [s - 1/2, s + 1/2) / box length."""

    frequency: Float[Tensor, " s"]  # 1/Å
    value: Float[Tensor, " s"]
