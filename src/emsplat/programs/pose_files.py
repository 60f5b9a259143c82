"""What a refinement of poses leaves in the run folder: the particles, a table, the summary, and what --resume reads."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.assessment.maps import shared_shell
from emsplat.config import RefineConfig
from emsplat.errors import InputError
from emsplat.io.files import number_text, replacing
from emsplat.io.particles import write_used
from emsplat.io.tensors import write_tensors
from emsplat.maths.geometry import matrix_to_euler
from emsplat.particles.choose import with_boxes
from emsplat.particles.stack import ParticleStack
from emsplat.poses.local import NO_PRIOR, Placed, Prior
from emsplat.poses.prior import turns
from emsplat.programs.opening import half_sets_from
from emsplat.programs.pose_round import Given, Refined, Round
from emsplat.programs.run import Run
from emsplat.run.files import PARTICLES, POSES, REFINEMENT
from emsplat.types import Aberrations, Poses

_FAR_OUT = 0.25  # of the box: shifts beyond are said
_KEPT = ("hessian", "before", "after", "given", "looks", "power")
_OPTICS = ("defocus_u", "defocus_v", "scale", "b_factor")
_BENT = ("magnification", "odd", "even")


def about_poses(run: Run[RefineConfig], given: ParticleStack, refined: Refined) -> dict[str, Any]:
    """What the summary says of the poses."""
    options, grid = run.config.refinement, given.grid
    shared = options.shared_to
    about: dict[str, Any] = {
        "shared_to": shared,
        "shared_shell": shared_shell(grid, shared),
        "half_sets_known_to_poses": half_sets_from(given.table, run.config) == "of the file",
        "refined": options.refine,
        "reference": options.reference,
        "rounds": [asdict(one) for one in refined.rounds],
        "moved": refined.placed is not None,
    }
    if refined.placed is not None:
        angle, shift = _moves(given, refined.stack)
        about |= {
            "angle_moved": _quantiles(angle),
            "shift_moved": _quantiles(shift),
            "angle_uncertainty": _quantiles(_uncertainty(refined)[0]),
            "shift_uncertainty": _quantiles(_uncertainty(refined)[1]),
        }
        far = int((refined.stack.table.poses.shift[refined.stack.rows].abs().amax(1) > _FAR_OUT * grid.length).sum())
        if far:
            run.log.warn(
                f"{far:,} particles lie more than a quarter of the box from its centre; extract them again where they "
                "are (`emsplat preprocess` recentres by whole pixels)"
            )
        run.log.line(
            f"poses moved by {about['angle_moved']['median']:.2f}° and {about['shift_moved']['median']:.2f} Å in the "
            f"median, 90 % by less than {about['angle_moved']['p90']:.2f}° and {about['shift_moved']['p90']:.2f} Å; "
            f"uncertain by {about['angle_uncertainty']['median']:.2f}° and "
            f"{about['shift_uncertainty']['median']:.2f} Å about each axis"
        )
    return about


def _quantiles(values: Float[Tensor, " p"]) -> dict[str, float]:
    """Median and 90th percentile."""
    return {"median": round(float(values.quantile(0.5)), 4), "p90": round(float(values.quantile(0.9)), 4)}


def _moves(given: ParticleStack, now: ParticleStack) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """How far poses moved, degrees and Å."""
    one, other = (stack.table.poses[stack.rows] for stack in (now, given))
    turned = torch.rad2deg(torch.linalg.vector_norm(turns(one.rotation, other.rotation), dim=1))
    return turned, torch.linalg.vector_norm(one.shift - other.shift, dim=1)


def _uncertainty(refined: Refined) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Standard deviations of the posterior about an axis (degrees) and along one (Å)."""
    if refined.placed is None or refined.prior is None:
        raise ValueError("nothing was placed")
    under = [refined.placed.uncertainty(prior, refined.stack.grid.length) for prior in (*refined.prior, NO_PRIOR)]
    own, rows = torch.where(refined.given.lost, 2, refined.stack.half - 1), torch.arange(len(refined.stack))
    turn, shift = (torch.stack(values)[own, rows] for values in zip(*under, strict=True))
    return turn, shift


def write_particles(run: Run[RefineConfig], refined: Refined, given: ParticleStack) -> None:
    """run_data.star: new poses, their uncertainty and likelihood; poses.csv."""
    stack = refined.stack
    more: dict[str, list[str]] = {}
    if refined.placed is not None:
        angle, shift = _uncertainty(refined)
        moved = _moves(given, stack)
        before, after = (torch.rad2deg(matrix_to_euler(one.table.poses.rotation[one.rows])).T for one in (given, stack))
        table = {"row": stack.table.row[stack.rows] + 1, "half": stack.half}
        table |= {"rot_given": before[0], "tilt_given": before[1], "rot": after[0], "tilt": after[1]}
        table |= {"angle_moved": moved[0], "shift_moved": moved[1]}
        table |= {"angle_uncertainty": angle, "shift_uncertainty": shift}
        table |= {"gain": refined.placed.after - refined.placed.given}
        _write_table(run.folder / POSES, table)
        numbers = {
            "LogLikeliContribution": refined.placed.after,
            "emsplatLogLikelihoodGain": refined.placed.after - refined.placed.given,
            "emsplatAngleUncertainty": angle,
            "emsplatOriginUncertainty": shift,
            "emsplatAngleMoved": moved[0],
            "emsplatOriginMoved": moved[1],
        }
        more = {name: [f"{value:.6g}" for value in values.tolist()] for name, values in numbers.items()}
    write_used(with_boxes(stack.table.take(stack.rows)), run.folder / PARTICLES, stack.half, more=more)


def _write_table(path: Path, table: dict[str, Tensor]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        for row in zip(*(values.tolist() for values in table.values()), strict=True):
            writer.writerow([value if isinstance(value, int) else number_text(value) for value in row])


def save_rounds(run: Run[RefineConfig], state: Refined) -> None:
    """What --resume needs to go on after a round; the first process writes it."""
    if not run.world.first:
        return
    poses = state.stack.table.poses[state.stack.rows]
    tensors: dict[str, Tensor] = {"rotation": poses.rotation, "shift": poses.shift}
    given = state.given
    tensors |= {"given_rotation": given.poses.rotation, "given_shift": given.poses.shift, "lost": given.lost.byte()}
    if "ctf" in state.stack.table.changed:
        optics = state.stack.table.optics[state.stack.rows]
        tensors |= {name: getattr(optics, name) for name in _OPTICS}
    bent = state.stack.table.optics.aberrations
    if "aberrations" in state.stack.table.changed and bent is not None:
        tensors |= {name: getattr(bent, name) for name in _BENT}
    priors = []
    if state.placed is not None and state.prior is not None:
        tensors |= {name: getattr(state.placed, name) for name in _KEPT}
        priors = [[prior.turn, prior.shift] for prior in state.prior]
    about = {"rounds": [asdict(one) for one in state.rounds], "priors": priors}
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(run.folder / REFINEMENT, held, {"emsplat.refinement": json.dumps(about)})


def resumed_rounds(run: Run[RefineConfig]) -> Refined | None:
    """Where an interrupted run left off, as the first process reads it; None where it made no round.

    Raises:
        InputError: the file cannot be used.
    """
    path, world = run.folder / REFINEMENT, run.world
    there = world.first and run.config.run.resume and path.is_file()
    if not world.agree(there):
        return None
    said, own = "", dict[str, Any]()
    try:
        if there:
            with safe_open(path, framework="pt") as file:
                said = file.metadata()["emsplat.refinement"]
                own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(world.told(said))
        own = dict[str, Any](world.spread_named(own))
        poses = Poses(own["rotation"], own["shift"])
        rounds = tuple(Round(**one) for one in about["rounds"])
        stack = run.stack.with_poses(poses)
        if _OPTICS[0] in own:
            optics = stack.table.optics[stack.rows]
            stack = stack.with_optics(replace(optics, **{name: own[name] for name in _OPTICS}))
        if _BENT[0] in own:
            stack = stack.with_aberrations(Aberrations(*(own[name] for name in _BENT)))
        run.log.line(f"resuming after round {len(rounds)}")
        given = Given(Poses(own["given_rotation"], own["given_shift"]), own["lost"].bool())
        if not about["priors"]:
            return Refined(stack, None, None, given, rounds)
        placed = Placed(poses, *(own[name] for name in _KEPT))
        first, second = (Prior(*pair) for pair in about["priors"])
        return Refined(stack, placed, (first, second), given, rounds)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, or start anew with --overwrite") from error
