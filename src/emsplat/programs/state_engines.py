"""Models of all states, one per half-set: from the sums of cells, or fitted to the images themselves.

What a run goes on from after an interruption is in its folder: sums of cells, a fit on its way, models that are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.config import HeterogeneityConfig
from emsplat.errors import InputError
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint, spread_state
from emsplat.fitting.state import State
from emsplat.heterogeneity.cells import Cells, cells_of, few_memberships, overlap, sharing
from emsplat.heterogeneity.classes import Classes, common_classes
from emsplat.heterogeneity.embedding import Embedding, hard_embedding, latents_of_run, leading, spread_embedding
from emsplat.heterogeneity.evidence import Gain, mean_gain
from emsplat.heterogeneity.extent import Window
from emsplat.heterogeneity.frames import identity
from emsplat.heterogeneity.half import HalfModel, agreement, in_frame, read_half, spread_half, without_residual
from emsplat.heterogeneity.images import (
    ConformationOptions,
    ImageStart,
    follow_images,
    image_gain,
    place_latents,
    shares,
    steps_of,
)
from emsplat.heterogeneity.refresh import MOST_POINTS, PER_POINT, Refreshed, refreshed
from emsplat.heterogeneity.residual import RESIDUALS, Residual, left_over, with_residuals
from emsplat.heterogeneity.saved import read_cells, save_cells, spread_cells
from emsplat.heterogeneity.search import Search
from emsplat.heterogeneity.states import DecoderPlan, Fitting, coarse_decoder, fine_decoder
from emsplat.models.conformations import Conformations, read_conformations
from emsplat.models.decoder import Decoder
from emsplat.process import side_by_side
from emsplat.programs.run import Run
from emsplat.programs.state_options import conformation_options, starts_at_random
from emsplat.run.files import cells_name, checkpoint_name, coarse_model_name, half_model_name, state_name
from emsplat.run.history import History
from emsplat.run.stop import checkpoints, require_time
from emsplat.sums.statistics import equations_of, mark

_MOST_CELLS = 64  # of a fit to images


@dataclass(frozen=True)
class StatesFitted:
    """Both half-sets' models with what they were made from, and where each view lies."""

    models: tuple[HalfModel, HalfModel]
    cells: tuple[Cells, Cells]
    embeddings: tuple[Embedding, Embedding]
    latent: tuple[Float[Tensor, "v q"], Float[Tensor, "w q"]]  # of the views of each half, in the frame of the run
    kernels: tuple[Float[Tensor, "m m"], Float[Tensor, "n n"]]  # weights with which cells share their data
    members: tuple[Float[Tensor, "_v m"], Float[Tensor, "_w n"]]  # of the views in the cells, as these were made
    gain: Gain  # of the states over their mean, on images of the other half
    classes: Classes | None  # where latents form such


def fit_cells(run: Run[HeterogeneityConfig], searched: Search, window: Window) -> StatesFitted | None:
    """The fast road: decoders fitted to the sums of cells.

    A coarse decoder of the cells of the linear stage shows states more sharply than that could. Particles are placed
    anew by it, and sums over more and smaller cells make the fine decoder, by which they are placed for good.

    Several processes share the images out, and two of them fit the decoders of one half each; the first has the result.

    Raises:
        InputError: what an earlier run has kept is damaged.
    """
    if searched.found is None:
        raise ValueError("nothing was found")
    firsts, world = searched.found.embeddings(), run.world
    between = world.agree(world.first and not common_classes(*firsts).told)
    coarse = _coarse(run, firsts, window)
    kept, places = [], []
    for half, first in enumerate(firsts):
        gain = searched.found.densities[half].gain(searched.found.latents[half][1 - half])
        known = Refreshed(first, gain, torch.zeros_like(gain))
        placed = _placed_anew(run, searched, half, coarse[half], known, between=between)
        kept.append(gathered(run, half, placed.embedding, window, fine=True))
        places.append(placed)
    models = _fine(run, coarse, [placed.embedding for placed in places], kept)
    models = _with_residuals(run, models, [placed.embedding for placed in places], kept)
    embeddings, told = [], []
    for half, (model, before) in enumerate(zip(models, places, strict=True)):
        # Points that were spread once are not spread again.
        again = between and before.embedding is firsts[half]
        final = _placed_anew(run, searched, half, model, before, between=again)
        embeddings.append(final.embedding)
        told.append(mean_gain(final.gain - final.mean, run.stack.only(2 - half).image_of_view))
    if not world.first:
        return None
    made_of = [placed.embedding for placed in places]
    return _together(run, models, kept, made_of, (embeddings[0], embeddings[1]), (told[0], told[1]))


def _with_residuals(
    run: Run[HeterogeneityConfig], models: list[HalfModel], places: list[Embedding], cells: list[Cells]
) -> list[HalfModel]:
    """With the kind of residual by which both halves tell the other's cells best."""
    found: dict[Residual, list[HalfModel]] = {kind: [] for kind in RESIDUALS}
    score = dict.fromkeys(RESIDUALS, 0.0)
    with run.log.part("residual", "what the Gaussians leave of the cells"):
        for half, (model, own) in enumerate(zip(models, cells, strict=True)):
            left, frame = left_over(model, own), leading(places[1 - half], places[half])
            for kind, whole in with_residuals(model, places[half], own, left).items():
                found[kind].append(whole)
                score[kind] += agreement(whole, cells[1 - half], frame)
    best = RESIDUALS[int(run.world.told(str(RESIDUALS.index(max(score, key=lambda kind: score[kind])))))]
    said = ", ".join(f"{kind} {value / 2:.4f}" for kind, value in score.items())
    run.log.line(f"  agreement with cells of the other half: {said}; residual: {best}")
    return found[best]


def _generator(run: Run[HeterogeneityConfig], half: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * run.config.halves.seed + half)


def _told(run: Run[HeterogeneityConfig]) -> Callable[[str], None]:
    def tell(text: str) -> None:
        if run.world.size == 1:
            _look(run)
        run.log.line(f"  {text}")

    return tell


def _look(run: Run[HeterogeneityConfig]) -> None:
    require_time(run.config.run.time_limit, "in a decoder, which begins anew", run.world)


def _look_around(run: Run[HeterogeneityConfig]) -> None:
    require_time(run.config.run.time_limit, "while latents were looked for, which begins anew", run.world)


def _plan(run: Run[HeterogeneityConfig]) -> DecoderPlan:
    options = run.config.heterogeneity
    return DecoderPlan(options.parts or 5, options.gaussians)


def _coarse(run: Run[HeterogeneityConfig], embeddings: tuple[Embedding, Embedding], window: Window) -> list[HalfModel]:
    """A coarse model of each half."""

    def made(half: int, cells: Cells) -> Fitting[HalfModel]:
        shared = overlap(embeddings[half].membership)
        decoder = yield from coarse_decoder(cells, shared, _plan(run), _generator(run, half))
        return without_residual(decoder, embeddings[half], run.stack.grid)

    def completed(half: int, bare: HalfModel, cells: Cells) -> HalfModel:
        return with_residuals(bare, embeddings[half], cells, left_over(bare, cells), ("together",))["together"]

    def gather(half: int) -> Cells:
        return gathered(run, half, embeddings[half], window)

    return _of_halves(run, coarse_model_name, "coarse models of all states", gather, made, completed)


def _fine(
    run: Run[HeterogeneityConfig], coarse: list[HalfModel], embeddings: list[Embedding], cells: list[Cells]
) -> list[HalfModel]:
    """A fine model of each half, in the latents of that half."""

    def made(half: int, cells: Cells) -> Fitting[HalfModel]:
        before = coarse[half].decoder
        if not isinstance(before, Decoder):
            raise InputError(f"{run.folder / coarse_model_name(half + 1)}: holds another decoder; start anew")
        shared = overlap(embeddings[half].membership)
        decoder = yield from fine_decoder(before, cells, shared, _plan(run), _generator(run, half))
        return without_residual(decoder, embeddings[half], run.stack.grid)

    models = _of_halves(run, half_model_name, "fine models of all states", lambda half: cells[half], made)
    return [
        in_frame(model, identity(own.density.point.shape[1])) for model, own in zip(models, embeddings, strict=True)
    ]


def _of_halves(
    run: Run[HeterogeneityConfig],
    name: Callable[[int], str],
    said: str,
    cells: Callable[[int], Cells],
    made: Callable[[int, Cells], Fitting[HalfModel]],
    completed: Callable[[int, HalfModel, Cells], HalfModel] = lambda half, model, cells: model,
) -> list[HalfModel]:
    """A model of each half: from its file in the folder, or made now, ``completed`` and written. Of several processes
    two make one each, from the cells that all of them have, and the first writes."""
    world = run.world
    paths = [run.folder / name(half + 1) for half in (0, 1)]
    there = [world.agree(world.first and path.is_file()) for path in paths]
    makers = [0 if known else half % world.size for half, known in enumerate(there)]
    given = [None if there[half] else cells(half) for half in (0, 1)]  # before a process goes to work alone

    def mine() -> list[HalfModel | None]:
        found = [read_half(path) if known and world.first else None for path, known in zip(paths, there, strict=True)]
        own = {half: its for half, its in enumerate(given) if its is not None and makers[half] == world.rank}
        if own:
            with run.log.part("decoder", said):
                fits = {half: made(half, its) for half, its in own.items()}
                for half, model in _results(fits, _told(run)).items():
                    found[half] = completed(half, model, own[half])
        return found

    found = world.apart(mine, partial(_look, run))
    models = [spread_half(model, world, maker) for model, maker in zip(found, makers, strict=True)]
    for path, model, before in zip(paths, models, there, strict=True):
        if world.first and not before:
            model.save(path)
    return models


def _results(fits: dict[int, Fitting[HalfModel]], tell: Callable[[str], None]) -> dict[int, HalfModel]:
    """What fits of halves come to, a step of each at a time."""
    found: dict[int, HalfModel] = {}
    while going := {half: fit for half, fit in fits.items() if half not in found}:
        with side_by_side(len(going)) as all_of:  # the last has all threads
            while not found.keys() & going.keys():
                for half, happened in zip(going, list(all_of(_next_of, going.values())), strict=True):
                    if isinstance(happened, HalfModel):
                        found[half] = happened
                    elif happened:
                        tell(f"half {half + 1}: {happened}")
    return found


def _next_of(fit: Fitting[HalfModel]) -> HalfModel | str:
    try:
        return next(fit)
    except StopIteration as end:
        return cast(HalfModel, end.value)


def _placed_anew(
    run: Run[HeterogeneityConfig],
    searched: Search,
    half: int,
    model: HalfModel,
    before: Refreshed,
    *,
    between: bool,
) -> Refreshed:
    """The latent space as a model has it; also with points ``between`` those that there are."""
    if searched.found is None:
        raise ValueError("nothing was found")
    require_time(run.config.run.time_limit, f"before particles of half {half + 1} were placed anew")
    stacks = (run.stack.only(half + 1), run.stack.only(2 - half))
    latents = (searched.found.latents[half][half], searched.found.latents[half][1 - half])
    subspace, count = searched.subspaces[half], len(before.embedding.density)
    if between:
        count = max(count, min(MOST_POINTS, len(before.embedding.own) // PER_POINT))
    with run.log.part("latents", f"half {half + 1}: where particles lie, by up to {count} states"):
        placed = refreshed(model, before, subspace, latents, stacks, count, _generator(run, half), run.world)
    gain, mean = float(placed.gain.mean()), float(placed.mean.mean())
    told = f"{len(placed.embedding.density)} states, gain {gain:.2f} nats per image of the other half"
    run.log.line(f"  {'as before' if placed is before else told + f', {gain - mean:.2f} of it over their mean'}")
    return placed


def finest(run: Run[HeterogeneityConfig]) -> int:
    """Finest frequency at which particles are placed, in cycles per box.

    Raises:
        InputError: ``resolution`` or ``components`` describe no linear stage.
    """
    options = run.config.heterogeneity
    radius = min(math.floor(options.resolution), run.stack.grid.size // 2 - 1)
    if radius < 4 or options.components < 1:
        raise InputError(
            f"--resolution {options.resolution:g} and --components {options.components}: expected at least 4 cycles "
            "per box and 1 component"
        )
    return radius


def gathered(
    run: Run[HeterogeneityConfig], half: int, embedding: Embedding, window: Window, *, fine: bool = False
) -> Cells:
    """The sums of the cells of a half-set (0 or 1): of this run or of the one that it is ``--from``, or made now."""
    stack, log, world = run.stack.only(half + 1), run.log, run.world
    of_particles, name = mark(stack), cells_name(half + 1, fine)
    path, source = run.folder / name, run.config.heterogeneity.from_run
    if source is not None and not fine and not path.is_file() and (source / name).is_file():
        path = source / name
    if world.agree(world.first and path.is_file()):
        log.line(f"half {half + 1}: sums of cells from {path}")
        return spread_cells(read_cells(path, of_particles) if world.first else None, world)
    count = len(embedding.density)
    said = f"half {half + 1}: sums of {count} cells, {window.support} voxels across"
    with log.part("cells", said), log.progress("cells", count, unit="cells") as update:

        def told(number: int, text: str) -> None:
            require_time(run.config.run.time_limit, f"after {number} of {count} cells of half {half + 1}", world)
            update(number, text)

        cells = cells_of(stack, embedding, window, told, world)
    if world.first:
        save_cells(path, cells, of_particles)
    return cells


def fit_on_images(run: Run[HeterogeneityConfig], searched: Search, window: Window) -> StatesFitted | None:
    """The paper's road: a decoder and a latent for each image, fitted to the images (`heterogeneity.images`).

    Several processes share each mini-batch out, a particle always to the same; the first has the result.

    Raises:
        InputError: the images do not show their own consensus map.
        EmsplatError: a fit diverged.
        Interrupted: asked to stop; a checkpoint is written.
    """
    if searched.found is None:
        raise ValueError("nothing was found")
    options, embeddings, world = conformation_options(run.config), searched.found.embeddings(), run.world
    fitted = [_fitted_images(run, half, embedding, options) for half, embedding in enumerate(embeddings)]
    found, gains = [], []
    for half, model in enumerate(fitted):
        others = run.stack.only(2 - half)
        with run.log.part("latents", f"half {half + 1}: latents of the other half's images"):
            placed = place_latents(model, others, options, among=shares(others, world), look=partial(_look_around, run))
        count = min(_MOST_CELLS, len(embeddings[half].density))
        here, others_here = model.latent.detach().cpu(), placed.latent.detach().cpu()
        own = hard_embedding(here, others_here, count, _generator(run, half))
        found.append(spread_embedding(own, world))
        with run.log.part("gain", f"half {half + 1}: what its states say of the other half's images"):
            gains.append(image_gain(model, found[half].density, others, world))
    found = [replace(own, gain=before.gain) for own, before in zip(found, embeddings, strict=True)]
    models, cells = [], []
    for half, model in enumerate(fitted):
        cells.append(gathered(run, half, found[half], window, fine=True))
        models.append(without_residual(model.decoder.cpu(), found[half], run.stack.grid))
    if not world.first:
        return None
    return _together(run, models, cells, found, (found[0], found[1]), (gains[0], gains[1]))


def _fitted_images(
    run: Run[HeterogeneityConfig], half: int, embedding: Embedding, options: ConformationOptions
) -> Conformations:
    stack, world = run.stack.only(half + 1), run.world
    finished, name = run.folder / state_name(f"half{half + 1}"), f"half{half + 1}"
    state = _saved(run, name)
    if world.agree(world.first and finished.is_file()) and state is not None:
        return state.model
    among = shares(stack, world)
    with run.log.part("fit", f"half {half + 1}: a decoder and a latent for each image, fitted to the images"):
        equations = equations_of(stack, world=world)
        start = ImageStart(equations.solve().cpu(), None if starts_at_random(run.config) else embedding.own)
        total = steps_of(stack, options)
        before = 0 if state is None else state.step
        history = History(run.log.journal, name)
        history.rewind(before)
        steps = math.ceil(len(stack) / options.batch)
        with (
            run.log.progress(name, total, before, unit="steps") as update,
            checkpoints(run.config.run.checkpoint_every, world, run.config.run.time_limit) as moment,
        ):
            for state in follow_images(stack, options, start, state, among):  # noqa: B020 (its last is the result)
                seen = min(state.step * options.batch, state.step * len(stack) // steps)
                history.add(state.step, state.terms["loss"], steps, seen)
                update(state.step, f"loss {float(state.terms['loss']):.4g}")
                if moment.due():
                    whole = among.whole(state)
                    if world.first:
                        save_checkpoint(run.folder / checkpoint_name(name), whole)
                    moment.saved(f"in {name} at step {state.step}; go on with --resume")
    assert state is not None  # noqa: S101 (options have epochs)
    whole = among.whole(state)
    if world.first:
        save_checkpoint(finished, whole)
        (run.folder / checkpoint_name(name)).unlink(missing_ok=True)
    return whole.model


def _saved(run: Run[HeterogeneityConfig], name: str) -> State[Conformations] | None:
    """Where an interrupted run left a fit, with the latents of all particles."""
    paths = (run.folder / state_name(name), run.folder / checkpoint_name(name)) if run.world.first else ()
    saved = next((path for path in paths if path.is_file()), None)
    if not run.world.agree(saved is not None):
        return None
    state: State[Conformations] | None = None
    if saved is not None:
        state = load_checkpoint(saved, run.stack.device, read_conformations)
        run.log.line(f"resuming {name}: goes on after step {state.step:,}")
    return spread_state(state, run.world, device=run.stack.device, read=read_conformations)


def _together(
    run: Run[HeterogeneityConfig],
    models: list[HalfModel],
    cells: list[Cells],
    made_of: Sequence[Embedding],
    embeddings: tuple[Embedding, Embedding],
    gains: tuple[Gain, Gain],
) -> StatesFitted:
    """Both halves in the latents of the run, by the first process alone; their models are written. The cells were
    ``made_of`` views as they were placed then."""
    run.go_on_alone()
    first, second = embeddings
    frames = (identity(first.own.shape[1]), leading(first, second))
    framed = [in_frame(model, frame) for model, frame in zip(models, frames, strict=True)]
    for half, model in enumerate(framed):
        model.save(run.folder / half_model_name(half + 1))
    gain = Gain(sum(own.value for own in gains) / 2, sum(own.error**2 for own in gains) ** 0.5 / 2)
    run.log.line(
        f"gain of the states over their mean: {gain.value:.2f} ± {gain.error:.2f} nats per image of the other half"
    )
    classes = common_classes(first, second)
    run.log.line(
        f"the half-sets' models sort all particles into {len(classes)} groups, and agree on them by "
        f"{classes.agreement:.3f} (kappa): " + ("classes" if classes.told else "no classes")
    )
    return StatesFitted(
        (framed[0], framed[1]),
        (cells[0], cells[1]),
        embeddings,
        latents_of_run(*embeddings),
        (sharing(made_of[0].membership), sharing(made_of[1].membership)),
        (few_memberships(made_of[0].membership), few_memberships(made_of[1].membership)),
        gain,
        classes if classes.told else None,
    )
