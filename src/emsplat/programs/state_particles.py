"""The particles of a heterogeneous run as other programs take them back: with classes and latents, state by state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.io.cryosparc import write_cs
from emsplat.io.files import number_text
from emsplat.io.particles import columns_kept, write_used
from emsplat.io.relion.write import split_star
from emsplat.io.table import ParticleTable
from emsplat.maths.geometry import matrix_to_euler
from emsplat.particles.choose import with_boxes
from emsplat.particles.stack import ParticleStack
from emsplat.run.files import PARTICLES, STATES, state_star_name
from emsplat.types import Poses


@dataclass(frozen=True)
class Views:
    """All views in the order of the input: one per particle, or per copy of it under the symmetry."""

    row: Int[Tensor, " v"]  # of the particle table
    half: Int[Tensor, " v"]
    copy: Int[Tensor, " v"]  # from 1
    latent: Float[Tensor, "v q"]
    gain: Float[Tensor, " v"]
    grey: Float[Tensor, " v"]  # brightness, relative to the mean map
    classes: Int[Tensor, " v"] | None  # from 0, where latents form classes
    state: Int[Tensor, " v"]  # from 0: the class, or the nearest of the states that are shown
    membership: Float[Tensor, " v"]  # posterior probability of that


def row_numbers(stack: ParticleStack) -> Int[Tensor, " p"]:
    """The number of each particle of the table, from 1: its row in the input, or where several files were merged its
    place among all particles that are used."""
    number = stack.table.row + 1
    if len(stack.table.sources) > 1:
        number = torch.zeros_like(number).index_copy(0, stack.rows.sort().values, torch.arange(1, len(stack) + 1))
    return number


def write_particles(stack: ParticleStack, views: Views, folder: Path) -> None:
    """run_data.star and a STAR file for each state; of a .cs file also a .cs file for each.

    Columns of the input stay; rlnClassNumber is the state. Under a symmetry every copy of a particle has a row with its
    own pose, as in an expanded set.
    """
    table = _of_views(stack, views)
    more = {
        "ClassNumber": [str(state + 1) for state in views.state.tolist()],
        "EmsplatMembership": [number_text(value, ".4f") for value in views.membership.tolist()],
        **{
            f"EmsplatLatent{k + 1}": [number_text(z, ".5f") for z in own]
            for k, own in enumerate(views.latent.T.tolist())
        },
        "EmsplatGain": [number_text(value, ".3f") for value in views.gain.tolist()],
    }
    if table.particle_class is not None and len(torch.unique(table.particle_class)) > 1:
        more["EmsplatInputClass"] = [str(number) for number in table.particle_class.tolist()]
    if stack.symmetry.order > 1:
        more["EmsplatCopy"] = [str(number) for number in views.copy.tolist()]
        more |= _poses(table)
    write_used(replace(table, particle_class=views.state + 1), folder / PARTICLES, views.half, more=more)
    states = range(int(views.state.max()) + 1)
    rows = {number: (views.state == number).nonzero()[:, 0] for number in states}
    split_star(
        folder / PARTICLES,
        {folder / STATES / state_star_name(number): own for number, own in rows.items() if len(own)},
    )
    if stack.symmetry.order == 1 and _is_cs(table):
        for number, own in rows.items():
            if len(own):
                path = (folder / STATES / state_star_name(number)).with_suffix(".cs")
                write_cs(path, table.take(own), views.half[own])


def _is_cs(table: ParticleTable) -> bool:
    return len(table.sources) == 1 and table.sources[0].suffix.lower() == ".cs"


def _of_views(stack: ParticleStack, views: Views) -> ParticleTable:
    table = with_boxes(stack.table.take(views.row))
    if stack.symmetry.order == 1:
        return table
    element = stack.symmetry.elements[views.copy - 1].to(table.poses.rotation)
    return replace(table, poses=Poses(table.poses.rotation @ element, table.poses.shift))


def _poses(table: ParticleTable) -> dict[str, list[str]]:
    """Angles as text; where the input has priors, these as well."""
    angles = torch.rad2deg(matrix_to_euler(table.poses.rotation)).T.tolist()
    names = ("AngleRot", "AngleTilt", "AnglePsi")
    turned = {name: [f"{value:.7f}" for value in values] for name, values in zip(names, angles, strict=True)}
    known = columns_kept(table)[0]
    return turned | {f"{name}Prior": turned[name] for name in names if f"{name}Prior" in known}
