"""Molecules that move and change: is there anything, and what are the states.

Half-sets are separate from the first step to the last. Between them pass: how many components and points there are (the
gain on the other half decides), and the frame that leads from one latent space to the other (`cross_embedding`).
"""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat import report
from emsplat.assessment.maps import given_mask, particle_mask, read_mask
from emsplat.config import HeterogeneityConfig, HeterogeneityOptions
from emsplat.device import within_memory
from emsplat.errors import InputError
from emsplat.heterogeneity.cells import Cells, empirical_map, raw_map
from emsplat.heterogeneity.classes import Classes
from emsplat.heterogeneity.corrected import corrected_maps
from emsplat.heterogeneity.embedding import leading
from emsplat.heterogeneity.extent import window_of
from emsplat.heterogeneity.half import on_grid
from emsplat.heterogeneity.parts import cluster
from emsplat.heterogeneity.populations import Share
from emsplat.heterogeneity.saved import read_search, save_search
from emsplat.heterogeneity.search import Search, search, spread
from emsplat.heterogeneity.subspace import sphere
from emsplat.io.files import json_text, number_text, replacing
from emsplat.io.mrc import write_map
from emsplat.io.pickles import write_arrays
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.curves import resolution
from emsplat.measures.states import moving_mask
from emsplat.models.decoder import Decoder
from emsplat.parallel import ALONE, World
from emsplat.process import threads
from emsplat.programs.explore import explorer_numbers
from emsplat.programs.finish import circumstances, describe, what_it_took
from emsplat.programs.opening import open_run
from emsplat.programs.part_files import surface_level, write_chimerax, write_parts, write_state_gaussians
from emsplat.programs.populate import follows, populations, say_shares, write_populations
from emsplat.programs.proof import local_of, proofs, repeats
from emsplat.programs.run import Run
from emsplat.programs.shown import hide_slices, show_slices
from emsplat.programs.state_engines import (
    StatesFitted,
    finest,
    fit_cells,
    fit_on_images,
)
from emsplat.programs.state_options import conformation_options, engine_of
from emsplat.programs.state_particles import Views, row_numbers, write_particles
from emsplat.report.explorer import write_explorer
from emsplat.run.files import (
    CONSENSUS,
    CORRECTED,
    CRYODRGN_LATENTS,
    EXPLORER,
    HALVES,
    LATENTS,
    MEAN,
    SEARCH,
    STATES,
    STATES_TABLE,
    SUMMARY,
    cells_name,
    coarse_model_name,
    component_name,
    half_model_name,
    state_local_name,
    state_map_name,
    state_name,
)
from emsplat.run.folder import finished_summary, write_text
from emsplat.run.journal import Gained
from emsplat.run.log import Log
from emsplat.run.stop import require_time
from emsplat.sums.spectra import read_all_spectra
from emsplat.sums.statistics import in_one_grey, mark
from emsplat.types import Grid

_SHOWN = 4  # components to look at on the way
_FEWEST = 2  # states: one alone is no heterogeneity


@within_memory()
def heterogeneity(
    config: HeterogeneityConfig, particles: Path, output: Path, log: Log | None = None, world: World = ALONE
) -> dict[str, Any]:
    """States of the molecule with half maps, or the finding that there are none, into ``output``; returns summary.json.

    Processes of a ``world`` share the work out; the first writes, the others return nothing once their part is done.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
    """
    log = log or Log()
    _refuse(config)
    if (finished := _found_finished(config, particles, output, log, world)) is not None:
        return finished
    with threads(config.run.threads), log.to_the_end(config.run.profile):
        run = open_run(config, particles, output, log, program="heterogeneity", world=world)
        if engine_of(config) == "images":
            run.stack.require_one_grid()
        run = replace(run, stack=in_one_grey(run.stack, world))
        searched = _search(run)
        _say_gains(run.log, searched)
        _show(run, searched)
        if searched.found is None:
            return _conclude(run, searched, None) if world.first else {}
        window = window_of(searched.subspaces, run.stack.grid)
        fit = fit_on_images if engine_of(config) == "images" else fit_cells
        fitted = fit(run, searched, window)
        return {} if fitted is None else _conclude(run, searched, fitted)


def _found_finished(
    config: HeterogeneityConfig, particles: Path, output: Path, log: Log, world: World
) -> dict[str, Any] | None:
    """The summary of the run that ``resume`` asks for, where nothing is left of it to do; an empty one in processes
    that have no folder.

    Raises:
        InputError: the folder holds no such run.
    """
    summary = finished_summary(config, particles, output) if world.first else None
    if not world.agree(summary is not None):
        return None
    if summary is None:
        return {}
    log.line(f"{output}: this run is finished, nothing is left to resume and nothing was done; --overwrite starts anew")
    return summary


def _refuse(config: HeterogeneityConfig) -> None:
    """
    Raises:
        InputError: an option of other runs that means nothing here, or one of the other engine.
    """
    own, given = config.run, config.heterogeneity
    if own.add_statistics:
        raise InputError("--add-statistics: not for heterogeneity; --from takes the sums of an earlier run")
    if own.naming != "relion":
        raise InputError("--naming: not for heterogeneity; leave it out")
    if given.recipe == "cryospire" and given.engine == "cells":
        raise InputError("--recipe cryospire is fitted to images; leave --engine cells out")
    of_images = {
        "decoder": given.decoder,
        "start": given.start,
        "epochs": given.epochs,
        "learning-rate": given.learning_rate,
        "batch": given.batch,
    }
    if engine_of(config) == "cells" and (name := next((name for name, value in of_images.items() if value), None)):
        raise InputError(f"--{name} belongs to --engine images; leave it out or add that")
    if engine_of(config) == "images":
        conformation_options(config)
    for name, value, least in (
        ("points", given.points, 2),
        ("parts", given.parts, 1),
        ("states", given.states, 2),
        ("batch", given.batch, 1),
        ("gaussians", given.gaussians, 2 * (given.parts or 5)),
    ):
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: expected at least {least}")
    if not math.isfinite(given.resolution):
        raise InputError(f"--resolution {given.resolution}: expected cycles per box, such as 20")
    if given.from_run is not None:
        asked = HeterogeneityOptions()
        for name in ("components", "points", "resolution", "focus"):
            if getattr(given, name) != getattr(asked, name):
                raise InputError(f"--{name} with --from: the linear stage is that of {given.from_run}; leave it out")
        if not (given.from_run / SEARCH).is_file():
            raise InputError(
                f"{given.from_run}: no {SEARCH}; expected the folder of an emsplat heterogeneity of the same particles"
            )


def _search(run: Run[HeterogeneityConfig]) -> Search:
    options, stack, world = run.config.heterogeneity, run.stack, run.world
    kept = run.folder / SEARCH
    halves = [stack.only(half) for half in (1, 2)]
    of_particles = " ".join(map(mark, halves))
    if world.agree(world.first and kept.is_file()):
        run.log.line("resuming: the linear stage is done")
        return spread(read_search(kept, of_particles) if world.first else None, world)
    if options.from_run is not None:
        run.log.line(f"linear stage of {options.from_run}")
        return spread(read_search(options.from_run / SEARCH, of_particles) if world.first else None, world)
    radius = finest(run)
    for half, own in enumerate(halves):
        if len(own) <= options.components:
            raise InputError(
                f"{stack.table.name}: half-set {half + 1} has {len(own)} particles for {options.components} "
                "components; take more particles or fewer --components"
            )
    support = _focus(run)
    with run.log.part("reading", "reading the low frequencies of all images"):
        spectra = (read_all_spectra(halves[0], radius, world), read_all_spectra(halves[1], radius, world))

    def look() -> None:
        require_time(run.config.run.time_limit, "in the linear stage, which begins anew", world)

    with run.log.part("linear stage", "linear stage: directions in which particles differ"):
        searched = search(
            spectra,
            (halves[0].image_of_view, halves[1].image_of_view),
            options.components,
            radius,
            options.points,
            run.config.halves.seed,
            support,
            run.log.line,
            look,
        )
    if world.first:
        save_search(kept, searched, of_particles)
    return searched


def _focus(run: Run[HeterogeneityConfig]) -> Float[Tensor, "z y x"] | None:
    """The mask of ``--focus``, checked."""
    focus = run.config.heterogeneity.focus
    if focus is None:
        return None
    mask = read_mask(focus, run.stack.grid, run.log)
    if float((mask * sphere(run.stack.grid.size)).max()) < 0.5:
        raise InputError(
            f"--focus {focus}: nothing of the mask is left within the sphere of 0.9 boxes that the linear stage looks "
            "at; expected a region of the molecule, is its box shifted?"
        )
    return mask


def _say_gains(log: Log, searched: Search) -> None:
    gain, found = searched.gain, searched.found
    told = ", ".join(f"{number}: {own.value:.2f}" for number, own in enumerate(searched.components))
    log.line(f"gain on the other half, nats per image, by components: {told}")
    if searched.points:
        told = ", ".join(f"{number}: {own.value:.2f}" for number, own in searched.points.items())
        log.line(f"  by points of the density: {told}")
    if found is None:
        log.line(
            f"no heterogeneity that these images support: best gain {gain.value:.3f} ± {gain.error:.3f} nats per image"
            + (" with any points of the density" if searched.points else "")
        )
        return
    log.line(f"  {found.count} components, {len(found.densities[0])} and {len(found.densities[1])} points")
    log.line(f"heterogeneity: {gain.value:.2f} ± {gain.error:.2f} nats per image on images that no model has seen")


def _show(run: Run[HeterogeneityConfig], searched: Search) -> None:
    """For who watches, until there are states: gains, the mean map and the strongest components of the first half."""
    for number, gain in enumerate(searched.components):
        run.log.journal.add(Gained("components", number, gain.value, gain.error))
    for number, gain in searched.points.items():
        run.log.journal.add(Gained("points", number, gain.value, gain.error))
    if not run.world.first:
        return
    subspace = searched.subspaces[0]
    grid = Grid(subspace.lattice.size, run.stack.grid.length / subspace.lattice.size)
    names = [MEAN, *map(component_name, range(1, min(len(subspace.maps), 1 + _SHOWN)))]
    show_slices(run.folder, dict(zip(names, subspace.maps, strict=False)), grid)


def _states(run: Run[HeterogeneityConfig], fitted: StatesFitted) -> Float[Tensor, "s q"]:
    """Latents of the states to look at: of the classes, or of as many groups as were asked for."""
    latent = torch.cat(fitted.latent)
    if fitted.classes is not None:
        first, second = fitted.embeddings
        point = torch.cat([first.density.point, leading(second, first)(second.density.point)])
        weight = torch.cat([first.density.weight, second.density.weight])[:, None] * torch.cat(fitted.classes.parts())
        return weight.T @ point / weight.sum(0)[:, None]
    count, generator = run.config.heterogeneity.states, torch.Generator().manual_seed(run.config.halves.seed)
    groups = cluster(latent, torch.ones(len(latent)), count, generator)
    # A centre may lie where no molecule is: the particle nearest to it stands for the group.
    return latent[torch.cdist(groups.centroid, latent).argmin(1)]


def _of_both(
    latent: tuple[Float[Tensor, "v q"], Float[Tensor, "w q"]], states: Float[Tensor, "s q"], kept: list[int]
) -> list[int]:
    """Of some states those that are the nearest to particles of either half-set: a half-set that has none of a state
    cannot confirm it."""
    while kept:
        there = [torch.cdist(own, states[kept]).argmin(1).bincount(minlength=len(kept)) > 0 for own in latent]
        both = (there[0] & there[1]).tolist()
        if all(both):
            break
        kept = [number for number, yes in zip(kept, both, strict=True) if yes]
    return kept


def _class_of_views(fitted: StatesFitted, classes: Classes) -> Int[Tensor, " v"]:
    """By the model of their own half."""
    members = [own.membership @ part for own, part in zip(fitted.embeddings, classes.parts(), strict=True)]
    return torch.cat(members).argmax(1)


def _conclude(run: Run[HeterogeneityConfig], searched: Search, fitted: StatesFitted | None) -> dict[str, Any]:
    log, gain, found = run.log, searched.gain, searched.found
    about: dict[str, Any] = {
        "found": found is not None,
        "gain": round(gain.value, 4),
        "gain_error": round(gain.error, 4),
        "components": 0 if found is None else found.count,
        "points": 0 if found is None else len(found.densities[0]),
        "gain_by_components": [asdict(own) for own in searched.components],
        "gain_by_points": {str(number): asdict(own) for number, own in searched.points.items()},
    }
    if found is not None and fitted is not None:
        about |= {"states_gain": round(fitted.gain.value, 4), "states_gain_error": round(fitted.gain.error, 4)}
        with log.part("states", "maps of the states"):
            about |= _write_states(run, searched, fitted)
    _clear(run, found=about["found"])
    summary = {"heterogeneity": about, "input": describe(run)} | circumstances(run)
    write_text(run.folder / SUMMARY, json_text(summary))
    with log.part("report", "drawing the report"):
        report.write_report(run.folder, log.step, torch.get_num_threads())
    summary["seconds"] = round(log.seconds, 1)
    write_text(run.folder / SUMMARY, json_text(summary))
    log.line(what_it_took(run, summary))
    log.line(f"  results in {run.folder}")
    return summary


def _clear(run: Run[HeterogeneityConfig], *, found: bool) -> None:
    """Takes away what was kept to go on from, unless it is to be used again, and models whose states are not
    confirmed."""
    hide_slices(run.folder)
    for name, half in HALVES.items():
        passing = [state_name(name), coarse_model_name(half), cells_name(half, fine=True)]
        passing += [] if run.config.run.keep_statistics else [cells_name(half)]
        passing += [] if found else [half_model_name(half)]
        for one in passing:
            (run.folder / one).unlink(missing_ok=True)


def _write_states(run: Run[HeterogeneityConfig], searched: Search, fitted: StatesFitted) -> dict[str, Any]:
    """The states that both half-sets confirm with all that belongs to them; nothing where there are not two."""
    stack, folder, grid, log, seed = run.stack, run.folder, run.stack.grid, run.log, run.config.halves.seed
    tried, whole = _states(run, fitted), torch.cat(fitted.latent)
    one, other = (on_grid(_consensus(cells), cells.grid, grid) for cells in fitted.cells)
    consensus = (one + other) / 2
    given = given_mask(run.config.mask, grid, log)

    def mask_of(volume: Tensor) -> Tensor:
        return particle_mask(volume, grid, stack.diameter, True) if given is None else given

    weight = torch.cdist(whole, tried).argmin(1).bincount(minlength=len(tried)).double()
    found = proofs(
        fitted,
        tried,
        weight,
        consensus,
        grid,
        mask_of,
        searched.subspaces[0].lattice.radius,
        (stack.only(1).image_of_view, stack.only(2).image_of_view),
    )
    kept = [number for number, proof in enumerate(found) if proof.confirmed]
    for number, proof in enumerate(found):
        if proof.like is not None:
            log.line(
                f"  of those that were tried the other half-set's particles do not tell {number + 1} from "
                f"{proof.like + 1}, but perhaps by grey scale: one structure, counted once"
            )
    if fitted.classes is None:
        kept = _of_both(fitted.latent, tried, kept)
    linear = searched.found if engine_of(run.config) == "cells" else None
    about: dict[str, Any] = {"states_tried": len(tried), "states_confirmed": len(kept)}
    if len(kept) < _FEWEST:
        log.line(
            f"no states: of {len(tried)} that were tried the half-sets confirm {len(kept)}. Particles differ, but not "
            "in a way that one half-set could tell the other; nothing is written of it"
        )
        about |= {"found": False, "components": 0, "points": 0}
        return about | {"follows": follows(stack, searched, whole, linear is not None, seed, log)}
    if len(kept) < len(tried):
        log.line(
            f"of {len(tried)} states that were tried the half-sets confirm {len(kept)}; the particles of the others "
            "count with the nearest of these"
        )
    latents, classes = tried[kept], fitted.classes
    if classes is not None:
        into = torch.cdist(tried, latents).argmin(1)
        for number, proof in enumerate(found):
            if proof.like is not None:
                into[number] = kept.index(proof.like)
        classes = classes.merged(into)
        nearest = _class_of_views(fitted, classes)
    else:
        nearest = torch.cdist(whole, latents).argmin(1)
    shared = populations(stack, fitted.embeddings, linear, latents, classes, seed)
    views = _views(run, searched, fitted, nearest, classes is not None, shared.membership)
    _write_latents(run, views)
    write_map(folder / CONSENSUS, consensus, grid.pixel_size)
    (folder / STATES).mkdir(exist_ok=True)
    rows = []
    for number, (latent, share, proof) in enumerate(
        zip(latents, shared.shares, (found[number] for number in kept), strict=True)
    ):
        halves = (fitted.models[0].map(latent), fitted.models[1].map(latent))
        volume = (halves[0] + halves[1]) / 2
        path = folder / STATES / state_map_name(number)
        write_map(path, volume, grid.pixel_size)
        for half, own in enumerate(halves):
            write_map(folder / STATES / state_map_name(number, half + 1), own, grid.pixel_size)
        write_state_gaussians(fitted.models, latent, path.with_suffix(".ply"))
        local = local_of(fitted, latent, halves, proof.resolution, grid)
        about_local = None
        if local is not None:
            mask = mask_of(volume)
            write_map(folder / STATES / state_local_name(number), local.filled(mask), grid.pixel_size)
            about_local = {"window": round(local.window, 2)} | (local.summary(mask) or {})
        row = {"state": number + 1} | proof.about | {"local_resolution": about_local}
        rows.append(row | _population(share, shared.shares))
        told = [f"{name} {_spacing(rows[-1][name])}" for name in ("resolution", "moving_resolution")]
        log.line(f"  state {number + 1}: {share.value:.1%}, {', '.join(told)}")
    _write_table(folder / STATES / STATES_TABLE, rows, latents)
    say_shares(log, shared.shares, shared.resampled)
    _warn_of_empty_halves(log, views, len(latents))
    write_populations(folder, shared)
    write_particles(stack, views, folder)
    about |= {"classes": classes is not None, "states": rows} | shared.about
    about["follows"] = follows(stack, searched, whole, linear is not None, seed, log)
    parts = list[int]()
    if all(isinstance(model.decoder, Decoder) for model in fitted.models):
        parts = write_parts(fitted.models, latents, [row["population"] for row in rows], folder, log)
        if run.config.heterogeneity.motion_corrected:
            with log.part("motion correction", "a consensus in one state: motions are taken back"):
                about["motion_corrected"] = _correct(run, fitted, latents, rows, consensus)
        _write_page(run, searched, fitted, views, rows, latents)
    else:
        log.line("  no page of all states, and no parts: these need the separable decoder (--decoder separable)")
    write_chimerax(folder, surface_level(consensus), len(rows), parts)
    return about


def _correct(
    run: Run[HeterogeneityConfig], fitted: StatesFitted, latents: Tensor, rows: list[dict[str, Any]], consensus: Tensor
) -> dict[str, Any]:
    """The consensus in the state of most particles, and its cross-validated resolution beside that of the plain one."""
    grid, log = run.stack.grid, run.log
    reference = max(range(len(rows)), key=lambda s: rows[s]["population"])
    latent = latents[reference]
    state = torch.stack([model.map(latent) for model in fitted.models]).mean(0)
    masks = {
        "resolution": particle_mask(state, grid, run.stack.diameter, True),
        "moving_resolution": moving_mask(state - consensus, grid.pixel_size),
    }
    images = [run.stack.only(half).image_of_view for half in (1, 2)]
    copies = sum(repeats(own, torch.ones(len(own))) for own in images) / len(images)
    maps, plain = [], []
    for model, cells in zip(fitted.models, fitted.cells, strict=True):
        maps.append([on_grid(own, cells.grid, grid) for own in corrected_maps(model, cells, latent)])
        raw = raw_map(cells, torch.ones(len(cells)))
        plain.append([on_grid(own, cells.grid, grid) for own in (_consensus(cells), raw)])
    write_map(run.folder / CORRECTED, (maps[0][0] + maps[1][0]) / 2, grid.pixel_size)
    for half, (own, _) in enumerate(maps):
        name = CORRECTED.replace(".mrc", f"_half{half + 1}.mrc")
        write_map(run.folder / name, own, grid.pixel_size)
    about: dict[str, Any] = {"state": reference + 1}
    for kind, ((one, raw_one), (other, raw_other)) in (("", maps), ("plain_", plain)):
        for name, mask in masks.items():
            if mask is not None:
                validation = CrossValidation((raw_one, raw_other), mask, grid, copies)
                curve = validation.curve((one, other))
                about[kind + name] = resolution(curve, 0.5)
    for name, where in (("resolution", "in the mask"), ("moving_resolution", "where the state differs")):
        corrected, uncorrected = (_spacing(about.get(kind + name)) for kind in ("", "plain_"))
        log.line(f"  consensus in state {reference + 1}, {where}: {corrected}; without correction {uncorrected}")
    if (about.get("resolution") or math.inf) > (about.get("plain_resolution") or math.inf):
        log.warn(
            "taking back the motions of rigid parts makes the consensus worse: the model moves by bending or by "
            "changes of density; use the plain consensus"
        )
    return about


def _write_page(
    run: Run[HeterogeneityConfig],
    searched: Search,
    fitted: StatesFitted,
    views: Views,
    rows: list[dict[str, Any]],
    latents: Float[Tensor, "s q"],
) -> None:
    gain = searched.gain
    facts = [
        f"gain on images that no model has seen: {gain.value:.2f} ± {gain.error:.2f} nats per image",
        f"{latents.shape[1]} components, {len(fitted.models[0].density)} points of the density",
    ]
    numbers = explorer_numbers(
        run.particles.name,
        fitted.models,
        run.stack,
        views,
        rows,
        latents,
        facts,
        run.log.warnings,
    )
    run.log.line(f"  move through the states: {write_explorer(run.folder / EXPLORER, numbers)}")


def _population(share: Share, shares: list[Share]) -> dict[str, Any]:
    """What the summary says of how many particles a state has; the free energy is that over the most populated, kT."""
    most = max(other.value for other in shares)
    return {
        "population": share.value,
        "population_error": share.error,
        "population_interval": list(share.interval),
        "population_halves": list(share.halves),
        "free_energy": math.log(most / share.value) if share.value > 0 else None,
        "free_energy_error": share.error / share.value if share.value > 0 else None,
    }


def _warn_of_empty_halves(log: Log, views: Views, states: int) -> None:
    """Where a half-set has none of a state's particles, its half map is what its model makes of others."""
    for half in (1, 2):
        there = torch.bincount(views.state[views.half == half], minlength=states)
        empty = [str(number + 1) for number in range(states) if not there[number]]
        if empty:
            log.warn(
                f"half-set {half} has no particle of {'states' if len(empty) > 1 else 'state'} {', '.join(empty)}; its "
                "half map there is the model's guess, and resolutions of such a state say nothing"
            )


def _spacing(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} Å"


def _consensus(cells: Cells) -> Tensor:
    return empirical_map(cells, torch.ones(len(cells)))


def _views(
    run: Run[HeterogeneityConfig],
    searched: Search,
    fitted: StatesFitted,
    nearest: Int[Tensor, " v"],
    classes: bool,
    membership: Float[Tensor, "v s"],
) -> Views:
    stack = run.stack
    if searched.found is None:
        raise ValueError("nothing was found")
    copies = stack.symmetry.order
    rows = [stack.only(half).rows.repeat_interleave(copies) for half in (1, 2)]
    row = torch.cat(rows)
    copy = torch.arange(len(row)) % copies + 1
    half = torch.cat([torch.full_like(own, number + 1) for number, own in enumerate(rows)])
    order = torch.argsort(row * copies + copy)
    state = nearest[order]
    return Views(
        row[order],
        half[order],
        copy[order],
        torch.cat(fitted.latent)[order],
        torch.cat([embedding.gain for embedding in fitted.embeddings])[order],
        torch.cat(searched.found.brightness)[order],
        state if classes else None,
        state,
        membership[order].gather(1, state[:, None]).squeeze(1),
    )


def _write_latents(run: Run[HeterogeneityConfig], views: Views) -> None:
    """latents.csv and cryoDRGN's z.pkl: one line per particle in the order of the input, or one per copy of it."""
    several = run.stack.symmetry.order > 1
    names = ["row", "half", *(["copy"] if several else [])]
    names += [f"z{k + 1}" for k in range(views.latent.shape[1])]
    names += ([] if views.classes is None else ["class"]) + ["gain"]
    number = row_numbers(run.stack)[views.row]
    with replacing(run.folder / LATENTS) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for view, latent in enumerate(views.latent.tolist()):
            cells: list[Any] = [int(number[view]), int(views.half[view])]
            cells += [int(views.copy[view])] if several else []
            cells += [number_text(value) for value in latent]
            cells += [] if views.classes is None else [int(views.classes[view]) + 1]
            writer.writerow([*cells, number_text(float(views.gain[view]))])
    write_arrays(run.folder / CRYODRGN_LATENTS, views.latent.float().numpy())


def _write_table(path: Path, rows: list[dict[str, Any]], latents: Float[Tensor, "s q"]) -> None:
    names = ["state", "population", "resolution", "moving_resolution", "population_low", "population_high"]
    names += ["free_energy", "free_energy_error"]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, *(f"z{k + 1}" for k in range(latents.shape[1]))])
        for row, latent in zip(rows, latents.tolist(), strict=True):
            low, high = row["population_interval"]
            own = row | {"population_low": low, "population_high": high}
            cells = ["" if own[name] is None else number_text(own[name], ".5g") for name in names[1:]]
            writer.writerow([row["state"], *cells, *(number_text(value) for value in latent)])
