"""The particle table: what every metadata format is turned into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from emsplat.types import Optics, Poses


@dataclass(frozen=True)
class OpticsGroup:
    """Particles that were recorded alike; ``box`` in pixels (None when only the stack knows), ``pixel_size`` in Å."""

    name: str
    pixel_size: float
    box: int | None


@dataclass(frozen=True)
class ParticleTable:
    """Metadata of all particles of one file in house units, row by row in the order of the file."""

    source: Path
    poses: Poses  # float64
    optics: Optics  # float64
    groups: tuple[OpticsGroup, ...]
    optics_group: Int[Tensor, " p"]  # index into groups
    half: Int[Tensor, " p"] | None  # 1 or 2; None when the file does not say
    micrograph: Int[Tensor, " p"]  # equal for particles of one micrograph
    stacks: tuple[Path, ...]
    stack: Int[Tensor, " p"]  # index into stacks
    image: Int[Tensor, " p"]  # 0-based index in the stack
    warnings: tuple[str, ...] = ()
    sign: float = 1.0  # factor that makes protein bright

    def __len__(self) -> int:
        return len(self.poses)
