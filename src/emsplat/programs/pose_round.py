"""One round of refinement: the reference of each half, and every particle of it placed against that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.assessment.maps import given_mask, particle_mask
from emsplat.config import RefineConfig
from emsplat.fitting.course import Stage, VolumeFit, follow_course
from emsplat.fitting.state import Plan
from emsplat.fitting.volume import VolumeObjective, support_of
from emsplat.imaging.project import voxelize
from emsplat.io.table import joined_optics
from emsplat.parallel import World
from emsplat.particles.stack import ParticleStack
from emsplat.poses.local import (
    NO_PRIOR,
    Placed,
    Prior,
    Reference,
    Search,
    make_reference,
    nearest,
    noise_of,
    place,
    stay,
)
from emsplat.poses.optics import Spread, refine_optics
from emsplat.poses.prior import estimate_prior, turns
from emsplat.poses.search import everywhere, poor, within
from emsplat.poses.tilt import PhaseSums, Tilt, phase_sums, solve_tilt, tilted
from emsplat.programs.begin import FINEST_DETAIL, start_model
from emsplat.programs.classical import Classical
from emsplat.programs.pose_states import KnownStates, Target, state_targets
from emsplat.programs.run import Run
from emsplat.programs.settings import Settings
from emsplat.run.files import HALVES
from emsplat.run.stop import Checkpoints
from emsplat.types import Optics, Poses

_EPOCHS = 8  # of the Gaussians that are compared with: longer fits and more Gaussians gain nothing (docs/log.md)
_SAMPLE = 400  # particles of each half that tell the errors of the poses
_WIDE = (math.radians(20), 0.1)  # a prior that hardly holds: rad, part of the box
_ELSEWHERE = 5.0  # widths of the prior
_DEFOCUS, _SCALE, _TILT = "defocus", "scale", "tilt"
REFINED = ("poses", _DEFOCUS, _SCALE, _TILT)
_CERTAIN = 3.0  # standard errors of a beam tilt from which on it is believed


@dataclass(frozen=True)
class Round:
    """What a round did, for the summary."""

    compared_to: float  # Å, where the references were cut
    angle_error: list[float] | None  # degrees about each axis, of the poses that were given, for each half
    shift_error: list[float] | None  # Å; None where poses stay, which then tell nothing of their errors
    looks: float  # comparisons per particle
    gain: float  # of the log-likelihood, nats per particle
    score: float  # afterwards: mean correlation of the back-projections with the truth, over all shells
    gained: float = math.nan  # of the score
    kept: bool = True
    defocus_spread: list[float] | None = None  # Å, of the change that images ask for beyond noise, for each half
    scale_spread: list[float] | None = None  # of ln scale
    b_factor_spread: list[float] | None = None  # Å²
    beam_tilt: dict[str, list[float]] | None = None  # of optics groups: x and y to be added, and their errors, mrad


@dataclass(frozen=True)
class Given:
    """The poses that were given."""

    poses: Poses
    lost: Bool[Tensor, " p"]  # whether a search has found the particle elsewhere: no prior holds it to this one

    @classmethod
    def all_of(cls, poses: Poses) -> Given:
        """Before any search."""
        return cls(poses, torch.zeros(len(poses), dtype=torch.bool))

    def take(self, rows: Int[Tensor, " q"]) -> Given:
        """Those of some particles."""
        return Given(self.poses[rows], self.lost[rows])


@dataclass(frozen=True)
class Refined:
    """Particles with their poses, and what is known of these; rows as in the stack."""

    stack: ParticleStack
    placed: Placed | None  # None: nothing was moved
    prior: tuple[Prior, Prior] | None
    given: Given
    rounds: tuple[Round, ...] = ()


def make_round(
    run: Run[RefineConfig],
    settings: Settings,
    before: Refined,
    classical: Classical,
    grey: Float[Tensor, " n"],
    moment: Checkpoints,
    known: KnownStates | None = None,
) -> Refined:
    """Every particle placed against the reference of its own half, or where states are known that of its state;
    ``grey`` are factors of rows of the table that bring it to their grey values (`ParticleStack.in_grey`).
    Processes share the particles out, and have all of them in the end."""
    log, world, stack, grid = run.log, run.world, before.stack, run.stack.grid
    number = len(before.rounds) + 1
    if classical.resolution is None:
        raise ValueError("the halves agree nowhere: there is nothing to compare particles with")
    cut = min(grid.size // 2 - 1, math.floor(grid.length / classical.resolution + 1e-6))
    options = run.config.refinement
    asked = options.refine.split(",")
    search, again = _search(run, number)
    log.line(f"round {number}: compared down to {grid.length / cut:.2f} Å, where the halves agree")
    given = before.given
    found: list[Placed] = []
    priors: list[Prior] = []
    optics: list[Optics] = []
    spreads: list[Spread] = []
    phases: dict[int, list[PhaseSums]] = {}
    references = []
    if known is None:
        with log.step("references"):
            references = _references(run, settings, classical, cut)
    rows = [(stack.half == half).nonzero()[:, 0] for half in HALVES.values()]
    for (name, half), own_rows in zip(HALVES.items(), rows, strict=True):
        own = stack.in_grey(grey).only(half)
        if known is None:
            targets = [Target(references[half - 1], torch.arange(len(own)))]
        else:
            targets = state_targets(known, half, stack, classical.equations[name], cut, world)
            log.line(f"  {name}: compared with maps of {len(targets)} states")
        noise = noise_of(own)
        prior = NO_PRIOR if search is stay else _prior(run, targets, own, given.take(own_rows), noise, search, again)
        priors.append(prior)
        with log.step(f"poses of {name}"), log.progress(f"poses of {name}", len(own)) as update:
            told = partial(_told, update, moment)
            placed = _placed(targets, own, given.take(own_rows), prior, noise, search, again, world, told)
        found.append(placed)
        if search is not stay:
            log.line(
                f"  {name}: given poses are off by {math.degrees(prior.turn):.2f}° and {prior.shift:.2f} Å per axis; "
                f"log-likelihood {float((placed.after - placed.before).mean()):+.2f} per particle in "
                f"{float(placed.looks.double().mean()):.1f} comparisons"
            )
        if _TILT in asked:
            with log.step(f"beam tilt of {name}"), log.progress(f"beam tilt of {name}", len(own)) as update:
                told = partial(_told, update, moment)
                moved = own.with_poses(placed.poses)
                for target in targets:
                    some = moved.take(target.rows)
                    its = _noise_for(some, own, noise)
                    sums = phase_sums(target.reference, some, its, told, world, among=moved)
                    for group, parts in sums.items():
                        phases.setdefault(group, []).extend(parts)
        if _DEFOCUS in asked or _SCALE in asked:
            moved = own.with_poses(placed.poses)
            with log.step(f"optics of {name}"), log.progress(f"optics of {name}", len(own)) as update:
                changed, spread = refine_optics(
                    targets[0].reference,
                    moved,
                    noise,
                    defocus=_DEFOCUS in asked,
                    strength=_SCALE in asked,
                    told=partial(_told, update, moment),
                    world=world,
                )
            optics.append(replace(changed, scale=changed.scale / grey[own.rows]))
            spreads.append(spread)
            said = [f"defocus by {spread.defocus:.0f} Å"] * (_DEFOCUS in asked)
            said += [f"scale by {spread.scale:.1%}, B factor by {spread.b_factor:.1f} Å²"] * (_SCALE in asked)
            if said:
                log.line(f"  {name}: changed with a spread of: {', '.join(said)}")
    order = torch.argsort(torch.cat(rows))
    placed = Placed.joined(found, order)
    done = Round(
        round(grid.length / cut, 3),
        None if search is stay else [round(math.degrees(prior.turn), 4) for prior in priors],
        None if search is stay else [round(prior.shift, 4) for prior in priors],
        round(float(placed.looks.double().mean()), 2),
        round(float((placed.after - placed.before).mean()), 4),
        math.nan,
        defocus_spread=[round(one.defocus, 2) for one in spreads] if _DEFOCUS in asked else None,
        scale_spread=[round(one.scale, 4) for one in spreads] if _SCALE in asked else None,
        b_factor_spread=[round(one.b_factor, 3) for one in spreads] if _SCALE in asked else None,
    )
    tilts = {group: solve_tilt(sums) for group, sums in phases.items()}
    done = replace(done, beam_tilt=_said_of(run, stack, tilts))
    stack = stack.with_poses(placed.poses)
    if optics:
        stack = stack.with_optics(joined_optics(optics)[order])
    if tilts:
        stack, placed, given = _tilted(stack, placed, given, tilts)
    if search is not nearest or again is not None:
        given = replace(given, lost=given.lost | _far(given.poses, placed, stack.half, priors))
    return Refined(stack, placed, (priors[0], priors[1]), given, (*before.rounds, done))


def _said_of(run: Run[RefineConfig], stack: ParticleStack, tilts: dict[int, Tilt]) -> dict[str, list[float]] | None:
    """What is to be added to the beam tilt of each optics group (x, y) with its standard errors, mrad."""
    for group, own in tilts.items():
        believed = "" if _is_certain(own) else ", which is none"
        run.log.line(
            f"  beam tilt of {stack.table.groups[group].name}: {own.tilt[0]:+.3f} ± {own.error[0]:.3f}, "
            f"{own.tilt[1]:+.3f} ± {own.error[1]:.3f} mrad to be added{believed}"
        )
    found = {
        stack.table.groups[group].name: [round(value, 4) for value in (*own.tilt.tolist(), *own.error.tolist())]
        for group, own in tilts.items()
    }
    return found or None


def _is_certain(tilt: Tilt) -> bool:
    return bool((tilt.tilt.abs() > _CERTAIN * tilt.error).any())


def _tilted(
    stack: ParticleStack, placed: Placed, given: Given, tilts: dict[int, Tilt]
) -> tuple[ParticleStack, Placed, Given]:
    """Particles with the beam tilt of their groups, and with the move that goes with it; so are the poses that were
    given, about which priors are."""
    change, move = torch.zeros(2, len(stack.table.groups), 2, dtype=torch.float64)
    for group, own in tilts.items():
        if _is_certain(own):
            change[group], move[group] = own.tilt, own.move
    by = move[stack.table.optics_group[stack.rows]]
    placed = replace(placed, poses=Poses(placed.poses.rotation, placed.poses.shift + by))
    stack = stack.with_poses(placed.poses)
    aberrations = tilted(stack.table.optics, change[stack.table.optics_group])
    given = replace(given, poses=Poses(given.poses.rotation, given.poses.shift + by))
    return stack.with_aberrations(aberrations), placed, given


def _far(given: Poses, placed: Placed, half: Int[Tensor, " p"], priors: list[Prior]) -> Bool[Tensor, " p"]:
    """What a search has found so far away that the pose that was given is none."""
    width = torch.tensor([prior.turn for prior in priors], dtype=torch.float64)[half - 1]
    away: Tensor = torch.linalg.vector_norm(turns(placed.poses.rotation, given.rotation), dim=1)
    return away > _ELSEWHERE * width


def _told(update: Callable[[int, str], None], moment: Checkpoints, done: int) -> None:
    update(done, "")
    look_up(moment)


def _search(run: Run[RefineConfig], number: int) -> tuple[Search, Search | None]:
    """How poses are looked for in a round, and how once more those of particles that agree poorly then."""
    if "poses" not in run.config.refinement.refine.split(","):
        return stay, None
    asked = run.config.refinement.search
    if asked is None or number > 1:
        return nearest, None
    if asked in ("global", "poor"):
        far = everywhere(run.stack.symmetry.elements)
        return (far, None) if asked == "global" else (nearest, far)
    return within(math.radians(float(asked))), None


def _references(run: Run[RefineConfig], settings: Settings, classical: Classical, cut: int) -> list[Reference]:
    """What the particles of each half are compared with. Of several processes two make one each."""
    world, grid = run.world, run.stack.grid
    makers = {name: half % world.size for half, name in enumerate(HALVES)}
    masks = {name: _mask_of(run, classical, name) for name, maker in makers.items() if maker == world.rank}
    if run.config.refinement.reference == "map":
        made = {name: _solved(classical, name) for name in masks}
    else:
        made = _fitted(run, settings, classical, masks) if masks else {}
    references = []
    for name, maker in makers.items():
        if maker == world.rank:
            volume = (made.pop(name) * masks[name]).contiguous()
        else:
            volume = torch.empty(grid.size, grid.size, grid.size)
        world.spread_(volume, source=maker)
        references.append(make_reference(volume, grid, cut, device=run.stack.device))
    return references


def _mask_of(run: Run[RefineConfig], classical: Classical, name: str) -> Tensor:
    """The mask of a half, which no other half has seen."""
    given = given_mask(run.config.mask, run.stack.grid)
    return particle_mask(classical.raw[name], run.stack.grid, run.stack.diameter, True) if given is None else given


def _solved(classical: Classical, name: str) -> Tensor:
    """The classical map of a half."""
    fsc, equations = classical.validation.raw.float().clamp(1e-3, 0.999), classical.equations[name]
    return equations.solve(((1 - fsc) / fsc).to(equations.linear.device)).cpu()


def _fitted(
    run: Run[RefineConfig], settings: Settings, classical: Classical, masks: dict[str, Tensor]
) -> dict[str, Float[Tensor, "z y x"]]:
    """Maps of Gaussians of the halves that have a mask here, each from its own sums alone; side by side, where there
    are threads for it."""
    grid, fits = run.stack.grid, []
    detail = max(grid.pixel_size, FINEST_DETAIL * (classical.resolution or 0.0))
    for name, mask in masks.items():
        objective = VolumeObjective(classical.equations[name], support_of(mask))
        start = start_model(classical.raw[name], grid, settings, detail, name, objective.support)
        model = start.to(run.stack.device)
        fits.append(VolumeFit(name, objective, model.with_unit(objective.best_gain(model))))
    plan = Plan(_EPOCHS, settings.learning_rate, settings.decay)
    for _ in follow_course(fits, plan, [Stage(len(fits[0].state.model), _EPOCHS)]):
        pass
    with torch.no_grad():
        return {one.name: voxelize(one.kept.model.gaussians(), grid).cpu() for one in fits}


def _prior(
    run: Run[RefineConfig],
    targets: list[Target],
    own: ParticleStack,
    given: Given,
    noise: list[Tensor],
    search: Search,
    again: Search | None,
) -> Prior:
    """How far the poses that were given are off: as the user says, or as a sample of a half shows."""
    options = run.config.refinement
    turn, shift = options.angle_error, options.shift_error
    if turn is None or shift is None:
        wide = Prior(_WIDE[0], _WIDE[1] * own.grid.length)
        part = min(1.0, _SAMPLE / len(own))
        some = []
        for target in targets:
            chosen = torch.linspace(0, len(target.rows) - 1, max(1, round(part * len(target.rows)))).long()
            some.append(target.rows[chosen])
        rows = torch.cat(some).sort().values
        sample = own.take(rows)
        placed = _placed(
            _targets_of(targets, rows),
            sample,
            given.take(rows),
            wide,
            _noise_for(sample, own, noise),
            search,
            again,
            run.world,
        )
        found = estimate_prior(placed, given.poses[rows])
        turn = math.degrees(found.turn) if turn is None else turn
        shift = found.shift if shift is None else shift
    return Prior(math.radians(turn), shift)


def _placed(
    targets: list[Target],
    own: ParticleStack,
    given: Given,
    prior: Prior,
    noise: list[Tensor],
    search: Search,
    again: Search | None,
    world: World,
    told: Callable[[int], None] = lambda _: None,
) -> Placed:
    """Every particle against its own target; then ``again`` those that agree with it by much less than good ones of
    all, whatever part of these is looked at together."""
    found, order, done = list[Placed](), list[Tensor](), 0
    for target in targets:
        lost = given.lost[target.rows]
        for held, rows in ((prior, target.rows[~lost]), (NO_PRIOR, target.rows[lost])):
            if not len(rows):
                continue
            some = own.take(rows)
            also = partial(_told_after, told, done)
            spectra = _noise_for(some, own, noise)
            found.append(place(target.reference, some, given.poses[rows], held, spectra, search, also, world))
            order.append(rows)
            done += len(rows)
    placed = Placed.joined(found, torch.argsort(torch.cat(order)))
    if again is None or not len(rows := poor(placed)):
        return placed
    some, its = own.take(rows), _targets_of(targets, rows)
    spectra = _noise_for(some, own, noise)
    better = _placed(its, some, given.take(rows), prior, spectra, again, None, world, lambda _: told(len(own)))
    return placed.with_rows(rows, better)


def _told_after(told: Callable[[int], None], before: int, count: int) -> None:
    told(before + count)


def _targets_of(targets: list[Target], rows: Int[Tensor, " q"]) -> list[Target]:
    """The targets of some particles, with their places among these; ``rows`` are sorted."""
    some = [(target.reference, target.rows[torch.isin(target.rows, rows)]) for target in targets]
    return [Target(reference, torch.searchsorted(rows, own)) for reference, own in some if len(own)]


def _noise_for(sample: ParticleStack, own: ParticleStack, noise: list[Tensor]) -> list[Tensor]:
    """The spectra of the grids that a sample has."""
    of_grid = {part.grid: spectrum for part, spectrum in zip(own.parts(), noise, strict=True)}
    return [of_grid[part.grid] for part in sample.parts()]


def look_up(moment: Checkpoints) -> None:
    """
    Raises:
        Interrupted: asked to stop.
    """
    if moment.due():
        moment.saved("between rounds; go on with --resume (the round begins anew)")
