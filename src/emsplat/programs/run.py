"""What the parts of a reconstruction hand on: the run itself, and the fits when they are done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jaxtyping import Float
from torch import Tensor

from emsplat.assessment.symmetry import Finding
from emsplat.config import RunConfig
from emsplat.fitting.course import Stage
from emsplat.models.gaussians import GaussianField
from emsplat.parallel import ALONE, World
from emsplat.particles.stack import ParticleStack
from emsplat.process import go_on_alone
from emsplat.programs.estimate import Estimate
from emsplat.programs.settings import Settings
from emsplat.run.log import Log

C_co = TypeVar("C_co", bound=RunConfig, covariant=True)


@dataclass(frozen=True)
class Run(Generic[C_co]):
    """A run that is open: its folder is made, its particles are chosen."""

    config: C_co
    particles: Path  # the file that the user gave
    folder: Path
    log: Log
    stack: ParticleStack
    skipped: tuple[int, ...]  # rows of the file (from 1) that were left out as bad
    finding: Finding | None  # what a look at the particles says of their symmetry; None: none was asked for
    world: World = ALONE  # the first process alone reads and writes the folder
    estimate: Estimate | None = None  # what it was expected to need

    def go_on_alone(self) -> None:
        """The other processes are done (`process.go_on_alone`)."""
        go_on_alone(self.config.run.threads, self.world.on_this_machine)


@dataclass(frozen=True)
class Fitted:
    """A fit that is done."""

    model: GaussianField
    about: dict[str, Any]  # what summary.json says of it
    residual: Float[Tensor, "w v u"] | None = None  # beyond its Gaussians, in the middle of the box; on the CPU


@dataclass(frozen=True)
class Fits:
    """All fits of a run by name: those of the halves and that of all particles."""

    settings: Settings  # with which they were made
    by_name: dict[str, Fitted]
    stages: tuple[Stage, ...] = ()  # of their course, also one that was taken back
    residual: dict[str, Any] | None = None  # what summary.json says of residual maps
    examples: tuple[dict[str, Any], ...] = ()  # particles beside their projections, as summary.json names them
