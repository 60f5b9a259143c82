"""Poses refined against the maps of their own half-sets, then a reconstruction.

A round makes the sums of each half, a reference of it within its own mask, and finds the pose of each of its particles
(`poses.local`). What passes between the halves: how far they agree, which is where references are cut; how well, which
says whether a round has gained; and two numbers per stage of the fits in the end. No map, no mask, no pose.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.assessment.maps import given_mask, is_evident, particle_mask, shared_shell
from emsplat.config import RefineConfig
from emsplat.device import within_memory
from emsplat.errors import InputError
from emsplat.fitting.course import Stage, VolumeFit, follow_course
from emsplat.fitting.state import Plan
from emsplat.fitting.volume import VolumeObjective, support_of
from emsplat.imaging.project import voxelize
from emsplat.io.files import number_text, replacing
from emsplat.io.particles import write_used
from emsplat.io.table import joined_optics
from emsplat.io.tensors import write_tensors
from emsplat.maths.geometry import matrix_to_euler
from emsplat.particles.choose import with_boxes
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.poses.local import Placed, Prior, Reference, Search, make_reference, nearest, noise_of, place, stay
from emsplat.poses.optics import Spread, refine_optics
from emsplat.poses.prior import estimate_prior, turns
from emsplat.poses.search import everywhere, within
from emsplat.process import threads
from emsplat.programs.begin import FINEST_DETAIL, start_model
from emsplat.programs.classical import Classical, accumulate_all, judge, settle, show
from emsplat.programs.finish import finish, found_finished
from emsplat.programs.opening import half_sets_from, introduce_fit, open_run
from emsplat.programs.reconstruct import compared_with_images, write_fits
from emsplat.programs.run import Run
from emsplat.programs.settings import Settings, settings_of
from emsplat.programs.volume_engine import fit_volumes
from emsplat.run.files import HALVES, PARTICLES, POSES, REFINEMENT
from emsplat.run.log import Log
from emsplat.run.stop import Checkpoints, checkpoints
from emsplat.sums.equations import NormalEquations, combined
from emsplat.sums.statistics import accumulate, begin
from emsplat.types import Optics, Poses

_EPOCHS = 8  # of the Gaussians that are compared with: longer fits and more Gaussians gain nothing (docs/log.md)
_SAMPLE = 400  # particles of each half that tell the errors of the poses
_WIDE = (math.radians(20), 0.1)  # a prior that hardly holds: rad, part of the box
_STALLED = 2e-3  # gain of the score that is none
_HARM = 1e-3  # loss of the score beyond which a round is taken back
_ELSEWHERE = 5.0  # widths of the prior
_FAR_OUT = 0.25  # of the box: shifts beyond are said
_KEPT = ("hessian", "before", "after", "given", "looks", "power")
_OPTICS = ("defocus_u", "defocus_v", "scale", "b_factor")
_DEFOCUS, _SCALE = "defocus", "scale"
_REFINED = ("poses", _DEFOCUS, _SCALE)


@dataclass(frozen=True)
class Round:
    """What a round did, for the summary."""

    compared_to: float  # Å, where the references were cut
    angle_error: list[float]  # degrees about each axis, of the poses that were given, for each half
    shift_error: list[float]  # Å
    looks: float  # comparisons per particle
    gain: float  # of the log-likelihood, nats per particle
    score: float  # afterwards: mean correlation of the back-projections with the truth, over all shells
    gained: float = math.nan  # of the score
    kept: bool = True
    defocus_spread: list[float] | None = None  # Å, of the change that images ask for beyond noise, for each half
    scale_spread: list[float] | None = None  # of ln scale
    b_factor_spread: list[float] | None = None  # Å²


@dataclass(frozen=True)
class Refined:
    """Particles with their poses, and what is known of these; rows as in the stack."""

    stack: ParticleStack
    placed: Placed | None  # None: nothing was moved
    prior: tuple[Prior, Prior] | None
    centre: Poses  # of the priors: the poses that were given, or found by a search far from these
    rounds: tuple[Round, ...] = ()


@within_memory()
def refine(config: RefineConfig, particles: Path, output: Path, log: Log | None = None) -> dict[str, Any]:
    """Refines poses and reconstructs with them into ``output``; returns what was written to summary.json.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on from the last round.
    """
    log = log or Log()
    if (finished := found_finished(config, particles, output, log)) is not None:
        return finished
    with threads(config.run.threads), log.to_the_end():
        settings = _settled(config)
        run = open_run(config, particles, output, log, settings, program="refine")
        _require_poses(run.stack)
        introduce_fit(log, settings)
        _say_origin(run)
        given = run.stack
        refined, sums = _rounds(run, settings)
        run = replace(run, stack=refined.stack)
        about = _about(run, given, refined)
        _write_particles(run, refined, given)
        classical = accumulate_all(run) if config.run.keep_statistics else settle(run, sums)
        fits = fit_volumes(run, settings, classical)
        write_fits(run, fits, classical)
        return finish(run, classical, compared_with_images(run, fits), refinement=about)


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
    if unknown := [name for name in own.refine.split(",") if name not in _REFINED]:
        raise InputError(f"--refine {own.refine}: {unknown[0]!r} is none of {', '.join(_REFINED)}")
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
    state = _resumed(run) or Refined(given, None, None, given.table.poses[given.rows])
    with log.part("rounds"), checkpoints(math.inf) as moment:
        sums, classical, score = _judged(run, state.stack, moment)
        if not is_evident(_raw(classical), given.grid, given.diameter):
            log.warn(
                "the half-sets do not agree beyond the first shells: there is nothing that poses could be refined "
                "against, and they stay as they were given; if they are wrong, find new ones with `emsplat abinitio`"
            )
            return state, sums
        log.line(f"poses as they are: mean correlation with the truth {score:.4f} (of the back-projections)")
        while len(state.rounds) < options.rounds and not _has_stalled(state):
            after = _round(run, settings, state, classical, moment)
            new_sums, new_classical, new_score = _judged(run, after.stack, moment)
            kept = new_score > score - _HARM
            gained = new_score - score
            done = replace(after.rounds[-1], score=round(new_score, 5), gained=round(gained, 5), kept=kept)
            log.line(
                f"  afterwards {new_score:.4f}, gain {new_score - score:+.4f}"
                + ("" if kept else " (worse: taken back)")
            )
            rounds = (*after.rounds[:-1], done)
            if not kept:
                state = replace(state, rounds=rounds)
                _save(run, state)
                continue
            state, sums, classical, score = replace(after, rounds=rounds), new_sums, new_classical, new_score
            _save(run, state)
    return state, sums


def _has_stalled(state: Refined) -> bool:
    """Whether the last round has gained no more."""
    return bool(state.rounds) and state.rounds[-1].gained < _STALLED


def _raw(classical: Classical) -> tuple[Tensor, Tensor]:
    return classical.raw["half1"], classical.raw["half2"]


def _judged(
    run: Run[RefineConfig], stack: ParticleStack, moment: Checkpoints
) -> tuple[dict[str, NormalEquations], Classical, float]:
    """The sums of both halves, what they say, and how well the halves agree."""
    sums = {}
    for name, half in HALVES.items():
        parts = []
        own = stack.only(half)
        with run.log.progress(f"sums of {name}", len(own)) as update:
            done = 0
            for part in own.parts():
                statistics = begin(part, stack.grid)
                for _ in accumulate(statistics, part, estimate_noise(part)):
                    update(done + min(statistics.particles, len(part)), "")
                    _look_up(moment)
                done += len(part)
                parts.append(statistics.equations())
        sums[name] = combined(parts)
    classical = judge(sums, stack, given_mask(run.config.mask, stack.grid))
    show(classical, run)
    return sums, classical, _score(run, classical)


def _score(run: Run[RefineConfig], classical: Classical) -> float:
    """The mean correlation with the truth that the back-projections imply for their sum, √(2F/(1+F)), over all shells
    that the halves do not share; 0 where they do not agree beyond chance."""
    validation = classical.validation
    value = torch.where(validation.defined, validation.raw.clamp(0, 1), 0.0)
    counted = value[1 + shared_shell(run.stack.grid, run.config.refinement.shared_to) :]
    return float((2 * counted / (1 + counted)).sqrt().mean()) if len(counted) else 0.0


def _look_up(moment: Checkpoints) -> None:
    """
    Raises:
        Interrupted: asked to stop.
    """
    if moment.due():
        moment.saved("between rounds; go on with --resume (the round begins anew)")


def _round(
    run: Run[RefineConfig], settings: Settings, before: Refined, classical: Classical, moment: Checkpoints
) -> Refined:
    """Every particle placed against the reference of its own half."""
    log, stack, grid = run.log, before.stack, run.stack.grid
    number = len(before.rounds) + 1
    cut = min(grid.size // 2 - 1, math.floor(grid.length / (classical.resolution or grid.nyquist) + 1e-6))
    options = run.config.refinement
    asked = options.refine.split(",")
    search = _search(run, number)
    log.line(f"round {number}: compared down to {grid.length / cut:.2f} Å, where the halves agree")
    given = before.centre
    found: list[Placed] = []
    priors: list[Prior] = []
    optics: list[Optics] = []
    spreads: list[Spread] = []
    rows = [(stack.half == half).nonzero()[:, 0] for half in HALVES.values()]
    for (name, half), own_rows in zip(HALVES.items(), rows, strict=True):
        own = stack.only(half)
        reference = _reference(run, settings, classical, name, cut)
        noise = noise_of(own)
        prior = _prior(run, reference, own, given[own_rows], noise, search)
        priors.append(prior)
        with log.progress(f"poses of {name}", len(own)) as update:
            told = partial(_told, update, moment)
            placed = place(reference, own, given[own_rows], prior, noise, search, told)
        found.append(placed)
        log.line(
            f"  {name}: given poses are off by {math.degrees(prior.turn):.2f}° and {prior.shift:.2f} Å per axis; "
            f"log-likelihood {float((placed.after - placed.before).mean()):+.2f} per particle in "
            f"{float(placed.looks.double().mean()):.1f} comparisons"
        )
        if options.refine != "poses":
            moved = own.with_poses(placed.poses)
            with log.progress(f"optics of {name}", len(own)) as update:
                changed, spread = refine_optics(
                    reference,
                    moved,
                    noise,
                    defocus=_DEFOCUS in asked,
                    strength=_SCALE in asked,
                    told=partial(_told, update, moment),
                )
            optics.append(changed)
            spreads.append(spread)
            said = [f"defocus by {spread.defocus:.0f} Å"] * (_DEFOCUS in asked)
            said += [f"scale by {spread.scale:.1%}, B factor by {spread.b_factor:.1f} Å²"] * (_SCALE in asked)
            if said:
                log.line(f"  {name}: changed with a spread of: {', '.join(said)}")
    order = torch.argsort(torch.cat(rows))
    placed = Placed.joined(found, order)
    done = Round(
        round(grid.length / cut, 3),
        [round(math.degrees(prior.turn), 4) for prior in priors],
        [round(prior.shift, 4) for prior in priors],
        round(float(placed.looks.double().mean()), 2),
        round(float((placed.after - placed.before).mean()), 4),
        math.nan,
        defocus_spread=[round(one.defocus, 2) for one in spreads] if _DEFOCUS in asked else None,
        scale_spread=[round(one.scale, 4) for one in spreads] if _SCALE in asked else None,
        b_factor_spread=[round(one.b_factor, 3) for one in spreads] if _SCALE in asked else None,
    )
    stack = stack.with_poses(placed.poses)
    if optics:
        stack = stack.with_optics(joined_optics(optics)[order])
    centre = _recentred(given, placed, stack.half, priors) if search is not nearest else given
    return Refined(stack, placed, (priors[0], priors[1]), centre, (*before.rounds, done))


def _recentred(given: Poses, placed: Placed, half: Int[Tensor, " p"], priors: list[Prior]) -> Poses:
    """Where priors are centred after a search: what was found far away says that the pose that was given is none."""
    width = torch.tensor([prior.turn for prior in priors], dtype=torch.float64)[half - 1]
    far = torch.linalg.vector_norm(turns(placed.poses.rotation, given.rotation), dim=1) > _ELSEWHERE * width
    rotation = torch.where(far[:, None, None], placed.poses.rotation, given.rotation)
    return Poses(rotation, torch.where(far[:, None], placed.poses.shift, given.shift))


def _told(update: Callable[[int, str], None], moment: Checkpoints, done: int) -> None:
    update(done, "")
    _look_up(moment)


def _search(run: Run[RefineConfig], number: int) -> Search:
    """How poses are looked for in a round."""
    if "poses" not in run.config.refinement.refine.split(","):
        return stay
    asked = run.config.refinement.search
    if asked is None or number > 1:
        return nearest
    if asked in ("global", "poor"):
        return everywhere(run.stack.symmetry.elements, poor_alone=asked == "poor")
    return within(math.radians(float(asked)))


def _reference(run: Run[RefineConfig], settings: Settings, classical: Classical, name: str, cut: int) -> Reference:
    """What the particles of a half are compared with, from its own sums in its own mask."""
    stack, grid = run.stack, run.stack.grid
    mask = given_mask(run.config.mask, grid)
    if mask is None:
        mask = particle_mask(classical.raw[name], grid, stack.diameter, True)
    equations = classical.equations[name]
    if run.config.refinement.reference == "map":
        fsc = classical.validation.raw.float().clamp(1e-3, 0.999)
        volume = equations.solve(((1 - fsc) / fsc).to(equations.linear.device)).cpu()
    else:
        detail = max(grid.pixel_size, FINEST_DETAIL * (classical.resolution or 0.0))
        objective = VolumeObjective(equations, support_of(mask))
        model = start_model(classical.raw[name], grid, settings, detail, name).to(stack.device)
        fitted = VolumeFit(name, equations, objective, model.with_unit(objective.best_gain(model)))
        plan = Plan(_EPOCHS, settings.learning_rate, settings.decay)
        for _ in follow_course([fitted], plan, [Stage(len(model), _EPOCHS)]):
            pass
        with torch.no_grad():
            volume = voxelize(fitted.kept.model.gaussians(), grid).cpu()
    return make_reference(volume * mask, grid, cut)


def _prior(
    run: Run[RefineConfig],
    reference: Reference,
    own: ParticleStack,
    given: Poses,
    noise: list[Tensor],
    search: Search,
) -> Prior:
    """How far the poses that were given are off: as the user says, or as a sample of a half shows."""
    options = run.config.refinement
    turn, shift = options.angle_error, options.shift_error
    if turn is None or shift is None:
        some = torch.linspace(0, len(own) - 1, min(_SAMPLE, len(own))).long()
        wide = Prior(_WIDE[0], _WIDE[1] * own.grid.length)
        sample = own.take(some)
        placed = place(reference, sample, given[some], wide, _noise_for(sample, own, noise), search)
        found = estimate_prior(placed, given[some])
        turn = math.degrees(found.turn) if turn is None else turn
        shift = found.shift if shift is None else shift
    return Prior(math.radians(turn), shift)


def _noise_for(sample: ParticleStack, own: ParticleStack, noise: list[Tensor]) -> list[Tensor]:
    """The spectra of the grids that a sample has."""
    of_grid = {part.grid: spectrum for part, spectrum in zip(own.parts(), noise, strict=True)}
    return [of_grid[part.grid] for part in sample.parts()]


def _about(run: Run[RefineConfig], given: ParticleStack, refined: Refined) -> dict[str, Any]:
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
            "angle_moved": _spread(angle),
            "shift_moved": _spread(shift),
            "angle_uncertainty": _spread(_uncertainty(refined)[0]),
            "shift_uncertainty": _spread(_uncertainty(refined)[1]),
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


def _spread(values: Float[Tensor, " p"]) -> dict[str, float]:
    """Median and 90th percentile."""
    return {"median": round(float(values.quantile(0.5)), 4), "p90": round(float(values.quantile(0.9)), 4)}


def _moves(given: ParticleStack, now: ParticleStack) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """How far poses moved, degrees and Å."""
    one, other = (stack.table.poses[stack.rows] for stack in (now, given))
    turned = torch.rad2deg(torch.linalg.vector_norm(turns(one.rotation, other.rotation), dim=1))
    return turned, torch.linalg.vector_norm(one.shift - other.shift, dim=1)


def _uncertainty(refined: Refined) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Standard deviations of the posterior about an axis (degrees) and along one (Å), in the mean of the axes."""
    if refined.placed is None or refined.prior is None:
        raise ValueError("nothing was placed")
    half = refined.stack.half
    first, second = (torch.diagonal(refined.placed.covariance(prior), dim1=1, dim2=2) for prior in refined.prior)
    variance = torch.where((half == 1)[:, None], first, second)
    return torch.rad2deg(variance[:, :3].mean(1).sqrt()), variance[:, 3:].mean(1).sqrt()


def _write_particles(run: Run[RefineConfig], refined: Refined, given: ParticleStack) -> None:
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


def _save(run: Run[RefineConfig], state: Refined) -> None:
    """What --resume needs to go on after a round."""
    poses = state.stack.table.poses[state.stack.rows]
    tensors: dict[str, Tensor] = {"rotation": poses.rotation, "shift": poses.shift}
    tensors |= {"centre_rotation": state.centre.rotation, "centre_shift": state.centre.shift}
    if "ctf" in state.stack.table.changed:
        optics = state.stack.table.optics[state.stack.rows]
        tensors |= {name: getattr(optics, name) for name in _OPTICS}
    priors = []
    if state.placed is not None and state.prior is not None:
        tensors |= {name: getattr(state.placed, name) for name in _KEPT}
        priors = [[prior.turn, prior.shift] for prior in state.prior]
    about = {"rounds": [asdict(one) for one in state.rounds], "priors": priors}
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(run.folder / REFINEMENT, held, {"emsplat.refinement": json.dumps(about)})


def _resumed(run: Run[RefineConfig]) -> Refined | None:
    """Where an interrupted run left off, None where it made no round.

    Raises:
        InputError: the file cannot be used.
    """
    path = run.folder / REFINEMENT
    if not run.config.run.resume or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["emsplat.refinement"])
            own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        poses = Poses(own["rotation"], own["shift"])
        rounds = tuple(Round(**one) for one in about["rounds"])
        stack = run.stack.with_poses(poses)
        if _OPTICS[0] in own:
            optics = stack.table.optics[stack.rows]
            stack = stack.with_optics(replace(optics, **{name: own[name] for name in _OPTICS}))
        run.log.line(f"resuming after round {len(rounds)}")
        centre = Poses(own["centre_rotation"], own["centre_shift"])
        if not about["priors"]:
            return Refined(stack, None, None, centre, rounds)
        placed = Placed(poses, *(own[name] for name in _KEPT))
        first, second = (Prior(*pair) for pair in about["priors"])
        return Refined(stack, placed, (first, second), centre, rounds)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, or start anew with --overwrite") from error
