"""Poses refined against the maps of their own half-sets, then a reconstruction.

A round makes the sums of each half, a reference of it within its own mask, and finds the pose of each of its particles
(`poses.local`). What passes between the halves: how far they agree, which is where references are cut; how well, which
says whether a round has gained; and two numbers per stage of the fits in the end. No map, no mask, no pose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.assessment.maps import given_mask, shared_shell
from emsplat.config import RefineConfig
from emsplat.device import within_memory
from emsplat.errors import InputError
from emsplat.parallel import ALONE, World
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.process import threads
from emsplat.programs.classical import Classical, accumulate_all, judge, settle, show
from emsplat.programs.finish import finish, found_finished
from emsplat.programs.opening import half_sets_from, introduce_fit, open_run
from emsplat.programs.pose_files import about_poses, resumed_rounds, save_rounds, write_particles
from emsplat.programs.pose_round import REFINED, Given, Refined, look_up, make_round
from emsplat.programs.pose_states import read_known_states
from emsplat.programs.reconstruct import compared_with_images, write_fits
from emsplat.programs.run import Fits, Run
from emsplat.programs.settings import Settings, settings_of
from emsplat.programs.volume_engine import fit_volumes
from emsplat.run.files import HALVES
from emsplat.run.log import Log, counted
from emsplat.run.stop import Checkpoints, checkpoints
from emsplat.sums.equations import NormalEquations, combined, relative_gains
from emsplat.sums.statistics import accumulate, begin
from emsplat.types import PHASE_FLIPPED, PREMULTIPLIED

_STALLED = 2e-3  # gain of the score that is none
_HARM = 1e-3  # loss of the score beyond which a round is taken back


@dataclass(frozen=True)
class _Judged:
    """What the sums of both halves say."""

    sums: dict[str, NormalEquations]
    classical: Classical
    score: float  # how well the halves agree
    grey: Float[Tensor, " n"]  # of images relative to the maps of their half, for each row of the table


@within_memory()
def refine(
    config: RefineConfig, particles: Path, output: Path, log: Log | None = None, world: World = ALONE
) -> dict[str, Any]:
    """Refines poses and reconstructs with them into ``output``; returns what was written to summary.json.

    Processes of a ``world`` share the work out; the first writes, the others return nothing once their part is done.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the last round.
    """
    log = log or Log()
    if (finished := found_finished(config, particles, output, log, world)) is not None:
        return finished
    with threads(config.run.threads), log.to_the_end(config.run.profile):
        settings = _settled(config)
        run = open_run(config, particles, output, log, settings, program="refine", world=world)
        _require_poses(run.stack)
        _require_untreated(run.stack, config.refinement.refine)
        introduce_fit(log, settings)
        _say_origin(run)
        given = run.stack
        refined, sums = _rounds(run, settings)
        run = replace(run, stack=refined.stack)
        about = about_poses(run, given, refined)
        if world.first:
            write_particles(run, refined, given)
        fits, coverage = _fit(run, settings, sums)
        return finish(run, coverage, compared_with_images(run, fits), refinement=about) if world.first else {}


def _fit(run: Run[RefineConfig], settings: Settings, sums: dict[str, NormalEquations]) -> tuple[Fits, float]:
    """The fits in the poses found, their maps written, and the coverage of the sums, which are let go of."""
    classical = accumulate_all(run) if run.config.run.keep_statistics else settle(run, sums)
    fits = fit_volumes(run, settings, classical)
    return fits, write_fits(run, fits, classical)


def _settled(config: RefineConfig) -> Settings:
    """
    Raises:
        InputError: an option that means nothing here, or out of its bounds.
    """
    settings, own = settings_of(config), config.refinement
    if settings.engine != "one-pass":
        raise InputError("--engine images: poses are refined against sums; leave it out")
    if config.run.add_statistics:
        raise InputError(
            "--add-statistics: sums of other particles have other poses; give these particles with --merge"
        )
    if own.rounds < 1:
        raise InputError(f"--rounds {own.rounds}: expected at least 1")
    for name in ("angle_error", "shift_error", "shared_to"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0")
    _check_search(own.search)
    if own.states is not None:
        if own.reference != "gaussians":
            raise InputError("--reference map: with --states particles are compared with maps of states; leave it out")
        if {"defocus", "scale"} & set(own.refine.split(",")):
            raise InputError(f"--refine {own.refine}: with --states poses and tilt are refined; leave the others out")
    if unknown := [name for name in own.refine.split(",") if name not in REFINED]:
        raise InputError(f"--refine {own.refine}: {unknown[0]!r} is none of {', '.join(REFINED)}")
    if "poses" not in own.refine.split(","):
        for name in ("search", "angle_error", "shift_error"):
            if getattr(own, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')}: --refine {own.refine} leaves the poses alone; leave it out"
                )
    return settings


def _check_search(asked: str | None) -> None:
    """
    Raises:
        InputError: it is no search.
    """
    if asked in (None, "global", "poor"):
        return
    try:
        degrees = float(asked)
    except ValueError:
        degrees = math.nan
    if not 0 < degrees <= 90:
        raise InputError(f"--search {asked}: expected degrees from above 0 to 90, global, or poor")


def _require_poses(stack: ParticleStack) -> None:
    """
    Raises:
        InputError: all particles have one orientation.
    """
    rotation = stack.table.poses.rotation[stack.rows]
    if bool(((rotation - rotation[0]).abs().amax((1, 2)) < 1e-6).all()):
        raise InputError(
            f"{stack.table.name}: all particles have the same orientation, their poses are not known yet; find them "
            "with `emsplat abinitio`"
        )


def _require_untreated(stack: ParticleStack, refine: str) -> None:
    """
    Raises:
        InputError: the CTF that is to be refined has been applied to images.
    """
    asked, treatment = set(refine.split(",")) & {"defocus", "scale"}, stack.table.optics.treatment
    if not asked or treatment is None:
        return
    least = PHASE_FLIPPED if "defocus" in asked else PREMULTIPLIED  # a scale changes no sign
    if treated := int((treatment[stack.rows] >= least).sum()):
        how = "phase-flipped or multiplied" if least == PHASE_FLIPPED else "multiplied"
        raise InputError(
            f"--refine {refine}: {treated:,} of {counted(len(stack), 'image')} of {stack.table.name} were {how} by the "
            "CTF that the file gives, which has to stay; expected raw images: extract them again without CTF, "
            f"or leave {' and '.join(sorted(asked))} out"
        )


def _say_origin(run: Run[RefineConfig]) -> None:
    """Whether the poses that were given know of half-sets."""
    shared, how = run.config.refinement.shared_to, half_sets_from(run.stack.table, run.config)
    if shared is not None:
        shell = shared_shell(run.stack.grid, shared)
        run.log.line(
            f"  the poses that are given were found with one map at {shared:g} Å: both half-sets share shells up to "
            f"{shell} ({run.stack.grid.length / shell:.1f} Å), and no resolution counts these"
        )
    elif how != "of the file":
        run.log.warn(
            f"half-sets are {how}: the poses that are given were refined without them, and have aligned noise of both "
            "halves to one map. What that leaves no comparison of halves can see; say with --shared-to which "
            "resolution that map had, and only what is finer counts"
        )


def _rounds(run: Run[RefineConfig], settings: Settings) -> tuple[Refined, dict[str, NormalEquations]]:
    """Rounds until the maps gain no more: the particles in their new poses, and the sums with these."""
    options, log, given = run.config.refinement, run.log, run.stack
    known = read_known_states(options.states, given) if options.states is not None else None
    most = options.rounds if known is None else 1  # their maps are not made anew
    state = resumed_rounds(run) or Refined(given, None, None, Given.all_of(given.table.poses[given.rows]))
    with log.part("rounds"), checkpoints(math.inf, run.world, run.config.run.time_limit) as moment:
        judged = _judged(run, state.stack, moment)
        if not judged.classical.evident or judged.classical.resolution is None:
            where = (
                "in the mask, which may lie beside the particle"
                if judged.classical.evident
                else "beyond the first shells"
            )
            log.warn(
                f"the half-sets do not agree {where}: there is nothing that poses could be refined against, and they "
                "stay as they were given; if they are wrong, find new ones with `emsplat abinitio`"
            )
            return state, judged.sums
        log.line(f"poses as they are: mean correlation with the truth {judged.score:.4f} (of the back-projections)")
        while judged.classical.resolution is not None and len(state.rounds) < most and not _has_stalled(state):
            after = make_round(run, settings, state, judged.classical, judged.grey, moment, known)
            new = _judged(run, after.stack, moment)
            gained = new.score - judged.score
            # The map of all particles is sharpest in poses that make up for motion: it is no judge of states.
            kept = known is not None or gained > -_HARM
            done = replace(after.rounds[-1], score=round(new.score, 5), gained=round(gained, 5), kept=kept)
            log.line(f"  afterwards {new.score:.4f}, gain {gained:+.4f}" + ("" if kept else " (worse: taken back)"))
            rounds = (*after.rounds[:-1], done)
            if not kept:
                state = replace(state, rounds=rounds)
                save_rounds(run, state)
                continue
            state, judged = replace(after, rounds=rounds), new
            save_rounds(run, state)
    return state, judged.sums


def _has_stalled(state: Refined) -> bool:
    """Whether the last round has gained no more."""
    return bool(state.rounds) and state.rounds[-1].gained < _STALLED


def _judged(run: Run[RefineConfig], stack: ParticleStack, moment: Checkpoints) -> _Judged:
    """The sums of both halves of a stack."""
    sums, world, grey = {}, run.world, torch.ones(len(stack.table), dtype=torch.float64)
    for name, half in HALVES.items():
        parts = []
        own = stack.only(half)
        with run.log.step(f"sums of {name}"), run.log.progress(f"sums of {name}", len(own)) as update:
            done = 0
            for part in own.parts():
                statistics = begin(part, stack.grid)
                for _ in accumulate(statistics, part, estimate_noise(part), world):
                    update(done + min(world.size * statistics.particles, len(part)), "")
                    look_up(moment)
                statistics.gather(world)
                done += len(part)
                parts.append(statistics.used_up())
        gains = relative_gains(parts)
        sums[name] = combined(parts, gains)
        for part, gain in zip(own.parts(), gains, strict=True):
            grey[part.rows] = gain
    world.spread_(grey)
    classical = judge(sums, stack, given_mask(run.config.mask, stack.grid), world)
    show(classical, run)
    return _Judged(sums, classical, float(world.told(repr(_score(run, classical)))), grey)


def _score(run: Run[RefineConfig], classical: Classical) -> float:
    """The mean correlation with the truth that the back-projections imply for their sum, √(2F/(1+F)), over all shells
    that the halves do not share; 0 where they do not agree beyond chance."""
    validation = classical.validation
    value = torch.where(validation.defined, validation.raw.clamp(0, 1), 0.0)
    counted = value[1 + shared_shell(run.stack.grid, run.config.refinement.shared_to) :]
    return float((2 * counted / (1 + counted)).sqrt().mean()) if len(counted) else 0.0
