"""Poses from nothing: starts on both half-sets until two agree, then every particle against the map of its own half.

Half-sets share nothing but the point group that is asked for, until they are found: then the map of one is turned to
lie on the other, which changes neither.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emsplat.config import AbinitioConfig
from emsplat.device import within_memory
from emsplat.errors import InputError
from emsplat.io.files import json_text
from emsplat.io.particles import write_used
from emsplat.io.tensors import write_tensors
from emsplat.maths.groups import Symmetry
from emsplat.parallel import ALONE, World
from emsplat.particles.choose import flip_hand, with_boxes
from emsplat.particles.stack import ParticleStack
from emsplat.poses.abinitio import chosen
from emsplat.poses.equivalents import find_poses, remade
from emsplat.poses.local import NO_PRIOR, Placed, make_reference, nearest, noise_of, place
from emsplat.poses.starts import (
    Pair,
    Start,
    StartPlan,
    at_map,
    common_group,
    find_pair,
    kinds,
    packed_start,
    spread_start,
    unpacked_start,
)
from emsplat.poses.verdict import Verdict, brought_over
from emsplat.process import threads
from emsplat.programs.classical import accumulate_all
from emsplat.programs.finish import circumstances, describe, finish, found_finished, what_it_took
from emsplat.programs.opening import open_run
from emsplat.programs.reconstruct import write_classical
from emsplat.programs.run import Run
from emsplat.run.files import HALVES, PARTICLES, SUMMARY, start_name
from emsplat.run.folder import check_same_run, is_finished, read_summary, write_text
from emsplat.run.log import Log
from emsplat.run.stop import Checkpoints, checkpoints
from emsplat.sums.spectra import Spectra, read_everywhere, read_spectra
from emsplat.types import Grid, Poses

_FILLED = 0.8  # of the box: the diameter of a particle that nobody has named
_FINEST = 11.5  # cycles per diameter: the finest that starts look at
_MOST_CLASSES = 64
_FEWEST, _FEW = 100, 500  # images of a half without which no start can be made; without which it may well fail
_LOOKED = 500  # images at once
_FAR = 0.25  # of the box: shifts beyond leave a part of a particle outside
_TELLING = 1000  # images of a half-set that tell a trimer with one arm raised from a trimer


@within_memory()
def abinitio(
    config: AbinitioConfig, particles: Path, output: Path, log: Log | None = None, world: World = ALONE
) -> dict[str, Any]:
    """Finds poses, or finds that there are none to be believed, and writes maps with them into ``output``; returns
    summary.json.

    Processes of a ``world`` make a start each at a time, and share the particles out in the end; the first writes, the
    others return nothing once their part is done.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
        Interrupted: asked to stop; ``resume`` goes on with the starts that were made.
    """
    log = log or Log()
    if (finished := _finished(config, particles, output, log, world)) is not None:
        return finished
    _refuse(config)
    with threads(config.run.threads), log.to_the_end(config.run.profile):
        run = open_run(config, particles, output, log, program="abinitio", need_poses=False, world=world)
        run = replace(run, stack=_unposed(run.stack))
        plan = _plan(run)
        halves = _read(run, plan)
        with log.part("starts", "starts from random poses, without symmetry"):
            pairs, count = _search(run, plan, halves)
        best = max(pairs, key=lambda own: (own.verdict.word == "found", own.verdict.agreement))
        about = _about(run, best, count, plan)
        _say(log, best.verdict, run.stack)
        if best.verdict.word == "not found":
            return _conclude_without(run, about) if world.first else {}
        with log.part("poses", "all particles against the map of their half"):
            group = common_group(best.starts, run.stack.symmetry)
            found = _found(run, best, plan, halves, group)
        about |= _symmetry_found(run, best, group) | _spread(run, found.placed)
        run = replace(run, stack=_posed(run.stack, found.placed.poses, group, mirrored=config.choice.flip_hand))
        if world.first:
            _write_particles(run, found, plan)
        if plan.classes > 1:
            about |= _classes(run, found, plan)
            run = replace(run, stack=run.stack.take((found.kind == 0).nonzero()[:, 0]))
        coverage = write_classical(run, accumulate_all(run))
        return finish(run, coverage, abinitio=about) if world.first else {}


def exit_code(summary: dict[str, Any]) -> int:
    """1 where nothing was found."""
    return int(summary.get("abinitio", {}).get("verdict") == "not found")


def _finished(config: AbinitioConfig, particles: Path, output: Path, log: Log, world: World) -> dict[str, Any] | None:
    """As `found_finished`, also of a run that found nothing."""
    in_vain = dict[str, Any]()
    if config.run.resume and world.first:
        check_same_run(config, particles, output)
        summary = read_summary(output)
        in_vain = summary if is_finished(summary) and exit_code(summary) else {}
    if world.agree(bool(in_vain)):
        log.line(f"{output}: this run is finished: not found; --overwrite starts anew")
        return in_vain
    return found_finished(config, particles, output, log, world)


def _refuse(config: AbinitioConfig) -> None:
    """
    Raises:
        InputError: an option out of its bounds, or one of other runs that means nothing here.
    """
    own = config.abinitio
    for name in ("starts", "steps", "batch", "sample", "classes"):
        least = 2 if name == "steps" else 1
        if getattr(own, name) < least:
            raise InputError(f"--{name} {getattr(own, name)}: expected at least {least}")
    if own.classes > _MOST_CLASSES:
        raise InputError(f"--classes {own.classes}: expected at most {_MOST_CLASSES}")
    if not 0 < own.offset < math.inf:
        raise InputError(f"--offset {own.offset:g}: expected a number above 0, in Å")
    if config.run.add_statistics:
        raise InputError("--add-statistics: sums of other particles have poses in another frame; leave it out")


def _unposed(stack: ParticleStack) -> ParticleStack:
    """Every particle as it lies in its image, seen from one side, in no hand."""
    unturned = torch.eye(3, dtype=torch.float64).repeat(len(stack), 1, 1)
    stack = stack.with_poses(Poses(unturned, torch.zeros(len(stack), 2, dtype=torch.float64)))
    return replace(stack, table=replace(stack.table, mirrored=False))


def _posed(stack: ParticleStack, poses: Poses, group: Symmetry, *, mirrored: bool) -> ParticleStack:
    """The particles in the poses that were found, or in those of the other hand, with the axes of ``group`` in its
    setting."""
    stack = stack.with_poses(poses)
    return replace(stack, table=flip_hand(stack.table, group)) if mirrored else stack


def _plan(run: Run[AbinitioConfig]) -> StartPlan:
    """
    Raises:
        InputError: several boxes, or too few images for a start.
    """
    stack, options = run.stack, run.config.abinitio
    if len(stack.parts()) > 1:
        raise InputError(
            f"{stack.table.name}: images of several boxes or pixel sizes; select particles of one kind, or extract all "
            "with one box and pixel size"
        )
    for half in (1, 2):
        count = len(stack.only(half))
        if count < _FEWEST:
            raise InputError(
                f"{stack.table.name}: half-set {half} has {count} images; a start from nothing needs at least "
                f"{_FEWEST} in each, and a few thousand are better"
            )
        if count < _FEW:
            run.log.warn(f"half-set {half} has {count} images; below {_FEW} starts often fail")
    length = stack.grid.length
    particle = run.config.images.diameter or _FILLED * length
    radius = length / particle
    largest = min(math.ceil(_FINEST * radius), stack.grid.size // 2 - 1)
    return StartPlan(radius, options.offset, stack.diameter, largest, options.steps, options.batch, options.classes)


def _read(run: Run[AbinitioConfig], plan: StartPlan) -> tuple[Spectra, Spectra]:
    """Low frequencies of the images of both halves, at most a sample of each."""
    parts = []
    with run.log.part("reading", "reading the low frequencies of the images"):
        for half in (1, 2):
            own = run.stack.only(half).without_symmetry()
            rows = torch.linspace(0, len(own) - 1, min(run.config.abinitio.sample, len(own))).long()
            parts.append(read_everywhere(own.take(rows), plan.largest, run.world))
    return parts[0], parts[1]


def _search(run: Run[AbinitioConfig], plan: StartPlan, halves: tuple[Spectra, Spectra]) -> tuple[list[Pair], int]:
    """The pairs that were compared, and how many starts that took."""
    log, options, stack, world = run.log, run.config.abinitio, run.stack, run.world
    climb = plan.stages()[0].radius
    length = stack.grid.length
    log.line(
        f"  {length / climb[0]:.0f} to {length / climb[1]:.0f} Å, at most {options.starts} starts of each half, "
        f"of at most {options.steps} steps of {options.batch} images each"
    )
    before = _made_before(run)
    pairs: list[Pair] = []
    count = len(before)
    names = list(HALVES)
    steps = plan.steps + plan.stages()[2].steps
    with (
        checkpoints(math.inf, world, run.config.run.time_limit) as moment,
        log.progress("starts", 2 * options.starts * steps, unit="steps") as update,
    ):

        def told(half: int, number: int, done: int, total: int) -> None:
            update((2 * number + half) * total + done, f"{names[half]}, start {number + 1}")
            if world.size == 1:
                _look_up(moment)

        seed, look = run.config.halves.seed, partial(_look_up, moment)
        for got in find_pair(halves, plan, stack.symmetry, seed, options.starts, before, told, world, look):
            if isinstance(got, Start):
                count += 1
                _save(run, got)
                axes = f", {got.group.symbol}, axes {got.axes:.2f}" if got.group.order > 1 else ""
                axes += f", {got.share:.0%} of the images in its first class" if plan.classes > 1 else ""
                log.line(
                    f"  {names[got.half]}, start {got.number + 1}: log-likelihood {got.likelihood:.2f} per image after "
                    f"{got.steps} steps{axes}"
                )
                continue
            pairs.append(got)
            own = got.verdict
            log.line(
                f"    starts {got.starts[0].number + 1} and {got.starts[1].number + 1}: poses agree for "
                f"{own.agreement:.0%}, maps to {length / max(own.shell, 1):.0f} Å: {own.word}"
            )
    return pairs, count


def _look_up(moment: Checkpoints) -> None:
    """
    Raises:
        Interrupted: asked to stop.
    """
    if moment.due():
        moment.saved("during a start; go on with --resume (finished starts are kept)")


def _save(run: Run[AbinitioConfig], start: Start) -> None:
    if not run.world.first:
        return
    name = list(HALVES)[start.half]
    about, tensors = packed_start(start)
    write_tensors(run.folder / start_name(name, start.number + 1), tensors, {"emsplat.start": json.dumps(about)})


def _made_before(run: Run[AbinitioConfig]) -> dict[tuple[int, int], Start]:
    """Starts that an interrupted run has made, as the first process reads them.

    Raises:
        InputError: a file cannot be used.
    """
    world, found = run.world, dict[tuple[int, int], Start]()
    if not run.config.run.resume:
        return found
    read = list(_read_starts(run).values()) if world.first else []
    for which in range(int(world.told(str(len(read))))):
        start = spread_start(read[which] if world.first else None, world)
        found[start.half, start.number] = start
    if found:
        run.log.line(f"resuming with {len(found)} starts")
    return found


def _read_starts(run: Run[AbinitioConfig]) -> dict[tuple[int, int], Start]:
    """
    Raises:
        InputError: a file cannot be used.
    """
    found = dict[tuple[int, int], Start]()
    for half, name in enumerate(HALVES):
        for number in range(run.config.abinitio.starts):
            path = run.folder / start_name(name, number + 1)
            if not path.is_file():
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    about = json.loads(file.metadata()["emsplat.start"])
                    own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    found[half, number] = unpacked_start(about, own)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: damaged ({error}); remove it, or start anew with --overwrite") from error
    return found


def _say(log: Log, verdict: Verdict, stack: ParticleStack) -> None:
    agreed = (
        f"poses of the same images against maps of disjoint halves agree for {verdict.agreement:.0%}, the maps to "
        f"{stack.grid.length / max(verdict.shell, 1):.0f} Å; gain on unseen images {verdict.gain:.2f} ± "
        f"{verdict.gain_error:.2f} nats"
    )
    log.line(f"{verdict.word}: {agreed}")
    if verdict.word == "uncertain":
        log.warn(f"uncertain whether poses were found: {agreed}; try more --starts, or another --seed")
    if verdict.word == "found":
        log.line("  the hand is not determined: images do not tell it (--flip-hand gives the other one)")


@dataclass(frozen=True)
class _Found:
    """Where particles were found, rows as in the stack."""

    placed: Placed
    kind: Int[Tensor, " p"]  # the map of the start that each fits best, 0 being that of the result


def _found(
    run: Run[AbinitioConfig], pair: Pair, plan: StartPlan, halves: tuple[Spectra, Spectra], group: Symmetry
) -> _Found:
    """Every particle against the map of its own half: the best of a grid, then the nearest minimum. The second map is
    turned to lie on the first. Of a group that nobody has asked for each particle has an element drawn at random: all
    of them are as good, and what follows may know nothing of the group."""
    second = brought_over(pair.starts[1].volume, pair.comparison, run.stack.grid.length).contiguous()
    run.world.spread_(second)
    parts, rows = [], []
    for half, (name, volume) in enumerate(zip(HALVES, (pair.starts[0].volume, second), strict=True)):
        parts.append(_of_half(run, name, pair.starts[half], plan, halves[half], volume, group))
        rows.append((run.stack.half == half + 1).nonzero()[:, 0])
    order = torch.argsort(torch.cat(rows))
    placed = Placed.joined([own.placed for own in parts], order)
    if group.order > run.stack.symmetry.order:
        generator = torch.Generator().manual_seed(run.config.halves.seed)
        element = group.elements[torch.randint(0, group.order, (len(order),), generator=generator)]
        placed = replace(placed, poses=Poses(placed.poses.rotation @ element, placed.poses.shift))
    return _Found(placed, torch.cat([own.kind for own in parts])[order])


def _of_half(
    run: Run[AbinitioConfig],
    name: str,
    start: Start,
    plan: StartPlan,
    images: Spectra,
    volume: Float[Tensor, "z y x"],
    symmetry: Symmetry,
) -> _Found:
    """The particles of a half, each process its share."""
    stack, log, world = run.stack.only(HALVES[name]), run.log, run.world
    maps = torch.cat([volume[None], start.others])
    if plan.classes > 1:
        rows = (kinds(images, maps, start.noise, start.spread, plan) == 0).nonzero()[:, 0]
        images = chosen(images, rows) if len(rows) else images
    again = remade(at_map(images, start, plan, symmetry, volume), plan.compared, plan.largest).contiguous()
    world.spread_(again)
    size = len(again)
    reference = make_reference(again, Grid(size, stack.grid.length / size), plan.largest, device=stack.device)
    noise, own, done = noise_of(stack), stack.shared(world), 0
    placed, kind = list[Placed](), [own[:0]]
    with log.progress(f"poses of {name}", len(stack)) as update:
        for part in world.in_step(torch.split(own, _LOOKED)):
            if part is not None and len(part):
                some = stack.take(part)
                spectra = read_spectra(some.without_symmetry(), plan.largest, noise=noise[0])
                seen = at_map(spectra, start, plan, symmetry, again)
                coarse = find_poses(seen, again, torch.arange(len(part)), symmetry, plan.compared, plan.largest)
                placed.append(place(reference, some.with_poses(coarse), coarse, NO_PRIOR, noise, nearest))
                kind.append(torch.zeros_like(part))
                if plan.classes > 1:
                    them = torch.cat([again[None], start.others])
                    kind[-1] = kinds(spectra, them, start.noise, start.spread, plan).to(part)
                done += len(part)
            update(min(world.size * done, len(stack)), "")
    return _Found(Placed.gathered(placed, own, len(stack), world), world.gathered(torch.cat(kind), own, len(stack)))


def _about(run: Run[AbinitioConfig], pair: Pair, starts: int, plan: StartPlan) -> dict[str, Any]:
    own = pair.verdict
    return {
        "verdict": own.word,
        "agreement": round(own.agreement, 4),
        "agrees_to": round(run.stack.grid.length / max(own.shell, 1), 2),
        "gain": round(own.gain, 3),
        "gain_error": round(own.gain_error, 3),
        "starts": starts,
        "finest": round(run.stack.grid.length / plan.stages()[2].radius[1], 2),
        "fsc_of_starts": [round(value, 4) for value in pair.correlation.tolist()],
        "hand": "not determined",
    }


def _symmetry_found(run: Run[AbinitioConfig], pair: Pair, group: Symmetry) -> dict[str, Any]:
    if run.stack.symmetry.order > 1:
        return {}
    if group.order > 1:
        run.log.line(
            f"  the particle has {group.symbol}: in both half-sets, images that were left out fit no map without it "
            f"better than the symmetric one; its axes are turned into RELION's setting, and --symmetry {group.symbol} "
            "makes use of them"
        )
        if doubt := _doubt(group, min(len(run.stack.only(half)) for half in (1, 2))):
            run.log.warn(doubt)
    agreement = min(own.axes for own in pair.starts)
    return {"symmetry_found": group.symbol, "symmetry_agreement": round(agreement, 3)}


def _doubt(group: Symmetry, images: int) -> str:
    """What there is to say of a group that so many images of a half-set have told; "" where they are enough."""
    if images >= _TELLING:
        return ""
    return (
        f"{group.symbol} was judged by {images:,} images of a half-set, too few to tell a particle that has it from "
        f"one that nearly has it; expected {_TELLING:,} or more, take more particles to be sure"
    )


def _spread(run: Run[AbinitioConfig], placed: Placed) -> dict[str, Any]:
    """How far particles lie from the centres of their images, and how well poses are known."""
    away = torch.linalg.vector_norm(placed.poses.shift, dim=1)
    limit = _FAR * run.stack.grid.length
    if far := int((away > limit).sum()):
        run.log.warn(
            f"{far:,} of {len(away):,} particles lie more than {limit:.0f} Å from the centre of their image, a part of "
            "them is cut off; extract them again about the origins that were found"
        )
    turn, shift = placed.uncertainty(NO_PRIOR, run.stack.grid.length)
    return {
        "shift_rms": round(float(away.square().mean().sqrt()), 3),
        "angle_uncertainty": round(float(turn.median()), 3),
        "origin_uncertainty": round(float(shift.median()), 3),
    }


def _classes(run: Run[AbinitioConfig], found: _Found, plan: StartPlan) -> dict[str, Any]:
    """How many particles each class has."""
    counts = torch.bincount(found.kind, minlength=plan.classes).tolist()
    told = ", ".join(f"{count:,}" for count in counts)
    run.log.line(f"  particles of each class: {told}; the maps are those of the first (--class 1)")
    return {"particles_of_classes": counts}


def _write_particles(run: Run[AbinitioConfig], found: _Found, plan: StartPlan) -> None:
    """run_data.star: poses, their uncertainty and likelihood."""
    stack, placed = run.stack, found.placed
    turn, shift = placed.uncertainty(NO_PRIOR, stack.grid.length)
    numbers = {
        "LogLikeliContribution": placed.after,
        "emsplatAngleUncertainty": turn,
        "emsplatOriginUncertainty": shift,
    }
    more = {name: [f"{value:.6g}" for value in values.tolist()] for name, values in numbers.items()}
    more |= {"ClassNumber": [str(kind + 1) for kind in found.kind.tolist()]} if plan.classes > 1 else {}
    write_used(with_boxes(stack.table.take(stack.rows)), run.folder / PARTICLES, stack.half, more=more)


def _conclude_without(run: Run[AbinitioConfig], about: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that found nothing; no map that would look like one."""
    log = run.log
    log.line(
        "  no poses and no maps are written. More --starts, another --seed, --diameter of the particle, its "
        "--symmetry or a cleaner set may help; images of noise end here too"
    )
    summary = {"abinitio": about, "input": describe(run)} | circumstances(run)
    summary["seconds"] = round(log.seconds, 1)
    write_text(run.folder / SUMMARY, json_text(summary))
    log.line(what_it_took(run, summary))
    log.line(f"  summary in {run.folder}")
    return summary
