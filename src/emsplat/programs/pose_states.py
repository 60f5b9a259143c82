"""The maps of a heterogeneous run as references: each particle is compared with that of its own state, so that motion
is not mistaken for a wrong pose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2
from torch import Tensor

from emsplat.errors import InputError
from emsplat.heterogeneity.half import HalfModel
from emsplat.io.columns import as_whole, read_columns, read_latents
from emsplat.measures.states import common_mask
from emsplat.parallel import ALONE, World
from emsplat.particles.stack import ParticleStack
from emsplat.poses.local import Reference, make_reference
from emsplat.programs.state_particles import row_numbers
from emsplat.programs.states import read_models
from emsplat.run.files import LATENTS, PARTICLES
from emsplat.sums.equations import NormalEquations

_STATES = 20  # maps of a half at most
_SHARE = 50  # particles that a map is worth being made for
_ITERATIONS = 30


@dataclass(frozen=True)
class Target:
    """A reference, and the particles of a half that are compared with it (rows of that half's stack)."""

    reference: Reference
    rows: Int[Tensor, " p"]


@dataclass(frozen=True)
class KnownStates:
    """The models of both half-sets, and the latent of each particle of a stack in the frame of the run."""

    models: tuple[HalfModel, HalfModel]
    latent: Float[Tensor, "p q"]


def read_known_states(run: Path, stack: ParticleStack) -> KnownStates:
    """What a heterogeneous run found of these particles.

    Raises:
        InputError: it is no such run, found no states, or is one of other particles, half-sets or boxes.
    """
    first, second = read_models(run)
    path = run / LATENTS
    columns = read_columns(path, ("row", "half", "z1"))
    if "copy" in columns:
        raise InputError(
            f"{path}: particles stand there once for each element of a symmetry; --states needs a run without one"
        )
    known = read_latents(path)
    if known.row is None:
        raise InputError(f"{path}: no column row; expected the table of an emsplat heterogeneity")
    number = row_numbers(stack)[stack.rows] - 1
    place = torch.full((int(max(known.row.max(), number.max())) + 1,), -1)
    place[known.row] = torch.arange(len(known.row))
    line = place[number]
    half = as_whole(path, "half", columns["half"])
    if (missing := int((line < 0).sum())) or not torch.equal(half[line], stack.half.to(half)):
        said = f"{missing:,} particles are not in it" if missing else "half-sets are others"
        raise InputError(
            f"{path}: {said}; expected the run of these particles in these half-sets (those of its own {PARTICLES})"
        )
    if (first.box.size, round(first.box.pixel_size, 4)) != (stack.grid.size, round(stack.grid.pixel_size, 4)):
        raise InputError(
            f"{run}: maps of {first.box.size} voxels of {first.box.pixel_size:g} Å, images of {stack.grid.size} pixels "
            f"of {stack.grid.pixel_size:g} Å; expected the same"
        )
    return KnownStates((first, second), known.z[line])


def state_targets(
    known: KnownStates, half: int, stack: ParticleStack, own: NormalEquations, cut: int, world: World = ALONE
) -> list[Target]:
    """Maps of the states of a half (1 or 2), made by the model of that half alone, and the particles near each.

    Latents are parted by k-means, in units of how well an image tells them. Processes of a ``world`` take the parting
    of the first.
    """
    model = known.models[half - 1]
    latent = known.latent[stack.half == half]
    scale = torch.linalg.cholesky(model.precision.double())
    seen = (latent @ scale).numpy()
    count = max(1, min(_STATES, len(latent) // _SHARE, len(np.unique(latent.numpy(), axis=0))))
    centre, state = kmeans2(seen, count, iter=_ITERATIONS, minit="++", rng=np.random.default_rng(half))
    middle = torch.linalg.solve_triangular(scale.T, torch.from_numpy(centre).T, upper=True).T.contiguous()
    parted = torch.from_numpy(state).long()
    world.spread_(middle, parted)
    numbers = [number for number in range(count) if bool((parted == number).any())]
    rows = [(parted == number).nonzero()[:, 0] for number in numbers]
    maps = torch.stack([model.map(middle[number]) for number in numbers])
    share = torch.tensor([len(one) for one in rows]).double()
    mean = torch.einsum("m,mzyx->zyx", (share / share.sum()).float(), maps)
    mask = common_mask(maps.amax(0), stack.grid.pixel_size)
    # Sums of all particles tell the grey scale of the images.
    factor = mask * own.gain((mean * mask).to(own.linear.device))
    return [
        Target(make_reference(volume * factor, stack.grid, cut, device=stack.device), one)
        for volume, one in zip(maps, rows, strict=True)
    ]
