"""Molecules that move and change: is there anything, and what are the states.

Half-sets are separate from the first step to the last. Between them pass: how many components and points there are (the
gain on the other half decides), and the frame that leads from one latent space to the other (`cross_embedding`).
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.assessment.maps import given_mask, particle_mask, read_mask
from emsplat.config import HeterogeneityConfig, HeterogeneityOptions
from emsplat.device import within_memory
from emsplat.errors import InputError
from emsplat.heterogeneity.cells import Cells, empirical_map, raw_map
from emsplat.heterogeneity.density import start_points
from emsplat.heterogeneity.extent import window_of
from emsplat.heterogeneity.half import on_grid
from emsplat.heterogeneity.saved import read_search, save_search
from emsplat.heterogeneity.search import Search, search
from emsplat.io.files import json_text, number_text, replacing
from emsplat.io.mrc import write_map
from emsplat.io.pickles import write_arrays
from emsplat.measures.crossvalidate import CrossValidation
from emsplat.measures.curves import resolution
from emsplat.measures.states import moving_mask
from emsplat.models.decoder import Decoder
from emsplat.process import threads
from emsplat.programs.explore import explorer_numbers
from emsplat.programs.finish import circumstances, describe
from emsplat.programs.opening import open_run
from emsplat.programs.run import Run
from emsplat.programs.state_engines import (
    StatesFitted,
    conformation_options,
    engine_of,
    finest,
    fit_cells,
    fit_on_images,
)
from emsplat.report.explorer import write_explorer
from emsplat.run.files import (
    CONSENSUS,
    CRYODRGN_LATENTS,
    EXPLORER,
    HALVES,
    LATENTS,
    SEARCH,
    STATES,
    STATES_TABLE,
    SUMMARY,
    cells_name,
    coarse_model_name,
    state_map_name,
    state_name,
)
from emsplat.run.folder import check_same_run, is_finished, read_summary, write_text
from emsplat.run.log import Log
from emsplat.sums.spectra import read_spectra
from emsplat.sums.statistics import fingerprint
from emsplat.types import Grid


@within_memory()
def heterogeneity(config: HeterogeneityConfig, particles: Path, output: Path, log: Log | None = None) -> dict[str, Any]:
    """States of the molecule with half maps, or the finding that there are none, into ``output``; returns summary.json.

    Raises:
        InputError: the input or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
    """
    log = log or Log()
    _refuse(config)
    if (finished := _found_finished(config, particles, output, log)) is not None:
        return finished
    with threads(config.run.threads), log.to_the_end():
        run = open_run(config, particles, output, log, program="heterogeneity")
        searched = _search(run)
        _say_gains(run.log, searched)
        if searched.found is None:
            return _conclude(run, searched, None)
        window = window_of(searched.subspaces, run.stack.grid)
        fit = fit_on_images if engine_of(config) == "images" else fit_cells
        return _conclude(run, searched, fit(run, searched, window))


def _found_finished(config: HeterogeneityConfig, particles: Path, output: Path, log: Log) -> dict[str, Any] | None:
    """The summary of the run that ``resume`` asks for, where nothing is left of it to do.

    Raises:
        InputError: the folder holds no such run.
    """
    if not config.run.resume:
        return None
    check_same_run(config, particles, output)
    summary = read_summary(output)
    if not is_finished(summary):
        return None
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
    options, stack = run.config.heterogeneity, run.stack
    kept, mark = run.folder / SEARCH, fingerprint(stack)
    if kept.is_file():
        run.log.line("resuming: the linear stage is done")
        return read_search(kept, mark)
    if options.from_run is not None:
        run.log.line(f"linear stage of {options.from_run}")
        return read_search(options.from_run / SEARCH, mark)
    stack.require_one_grid()
    radius = finest(run)
    halves = [stack.only(half) for half in (1, 2)]
    for half, own in enumerate(halves):
        if len(own) <= options.components:
            raise InputError(
                f"{stack.table.name}: half-set {half + 1} has {len(own)} particles for {options.components} "
                "components; take more particles or fewer --components"
            )
    support = _focus(run)
    with run.log.part("reading", "reading the low frequencies of all images"):
        spectra = (read_spectra(halves[0], radius), read_spectra(halves[1], radius))
    with run.log.part("linear stage", "linear stage: directions in which particles differ"):
        searched = search(
            spectra,
            options.components,
            radius,
            options.points,
            run.config.halves.seed,
            support,
            run.log.line,
        )
    save_search(kept, searched, mark)
    return searched


def _focus(run: Run[HeterogeneityConfig]) -> Float[Tensor, "z y x"] | None:
    """The mask of ``--focus``, checked."""
    focus = run.config.heterogeneity.focus
    return None if focus is None else read_mask(focus, run.stack.grid, run.log)


def _say_gains(log: Log, searched: Search) -> None:
    gain, found = searched.gain, searched.found
    told = ", ".join(f"{number}: {own.value:.2f}" for number, own in enumerate(searched.components))
    log.line(f"gain on the other half, nats per image, by components: {told}")
    if found is None:
        log.line(
            f"no heterogeneity that these images support: best gain {gain.value:.3f} ± {gain.error:.3f} nats per image"
        )
        return
    told = ", ".join(f"{number}: {own.value:.2f}" for number, own in found.points.items())
    log.line(f"  {found.count} components; by points of the density: {told}")
    log.line(f"heterogeneity: {gain.value:.2f} ± {gain.error:.2f} nats per image on images that no model has seen")


def _states(run: Run[HeterogeneityConfig], fitted: StatesFitted) -> tuple[Tensor, Tensor | None]:
    """Latents of the states to show, and the state of each view (None: latents form no classes)."""
    latent = torch.cat(fitted.latent)
    if fitted.crisp:
        point = fitted.models[0].density.point
        return point, torch.cdist(latent, point).argmin(1)
    count = min(run.config.heterogeneity.states, len(latent))
    generator = torch.Generator().manual_seed(run.config.halves.seed)
    centre = start_points(latent, count, generator)
    for _ in range(30):
        nearest = torch.cdist(latent, centre).argmin(1)
        sums = torch.zeros_like(centre).index_add_(0, nearest, latent)
        counts = torch.bincount(nearest, minlength=count)
        centre = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centre)
    # A centre may lie where no molecule is: the particle nearest to it stands for the group.
    return latent[torch.cdist(centre, latent).argmin(1)], None


def _conclude(run: Run[HeterogeneityConfig], searched: Search, fitted: StatesFitted | None) -> dict[str, Any]:
    log, gain, found = run.log, searched.gain, searched.found
    about: dict[str, Any] = {
        "found": found is not None,
        "gain": round(gain.value, 4),
        "gain_error": round(gain.error, 4),
        "components": 0 if found is None else found.count,
        "points": 0 if found is None else len(found.densities[0]),
        "gain_by_components": [asdict(own) for own in searched.components],
        "gain_by_points": {} if found is None else {str(number): asdict(own) for number, own in found.points.items()},
    }
    if found is not None and fitted is not None:
        about |= {"states_gain": round(fitted.gain.value, 4), "states_gain_error": round(fitted.gain.error, 4)}
        with log.part("states", "maps of the states"):
            about |= _write_states(run, searched, fitted)
    _clear(run)
    summary = {"heterogeneity": about, "input": describe(run)} | circumstances(run)
    summary["seconds"] = round(log.seconds, 1)
    write_text(run.folder / SUMMARY, json_text(summary))
    log.line(f"{summary['seconds']:.0f} s in all, {summary['peak_memory_mb']:,} MB at most; results in {run.folder}")
    return summary


def _clear(run: Run[HeterogeneityConfig]) -> None:
    """Takes away what was kept to go on from, unless it is to be used again."""
    for name, half in HALVES.items():
        passing = [state_name(name), coarse_model_name(half), cells_name(half, fine=True)]
        passing += [] if run.config.run.keep_statistics else [cells_name(half)]
        for one in passing:
            (run.folder / one).unlink(missing_ok=True)


def _write_states(run: Run[HeterogeneityConfig], searched: Search, fitted: StatesFitted) -> dict[str, Any]:
    stack, folder, grid = run.stack, run.folder, run.stack.grid
    latents, classes = _states(run, fitted)
    nearest = torch.cdist(torch.cat(fitted.latent), latents).argmin(1) if classes is None else classes
    views = _views(run, fitted, classes)
    _write_latents(run, views)
    one, other = (on_grid(_consensus(cells), cells.grid, grid) for cells in fitted.cells)
    consensus = (one + other) / 2
    write_map(folder / CONSENSUS, consensus, grid.pixel_size)
    mask = given_mask(run.config.mask, grid, run.log)
    (folder / STATES).mkdir(exist_ok=True)
    rows = []
    share = torch.bincount(nearest, minlength=len(latents)) / len(nearest)
    for number, latent in enumerate(latents):
        halves = [model.map(latent) for model in fitted.models]
        whole = (halves[0] + halves[1]) / 2
        write_map(folder / STATES / state_map_name(number), whole, grid.pixel_size)
        for half, volume in enumerate(halves):
            write_map(folder / STATES / state_map_name(number, half + 1), volume, grid.pixel_size)
        own = particle_mask(whole, grid, stack.diameter, True) if mask is None else mask
        rows.append(_judge(fitted, number, latent, own, whole - consensus, grid) | {"population": float(share[number])})
        told = [f"{name} {_spacing(rows[-1][name])}" for name in ("resolution", "moving_resolution")]
        run.log.line(f"  state {number + 1}: {share[number]:.1%}, {', '.join(told)}")
    _write_table(folder / STATES / STATES_TABLE, rows, latents)
    if all(isinstance(model.decoder, Decoder) for model in fitted.models):
        _write_page(run, searched, fitted, views, rows, latents)
    else:
        run.log.line("  no page of all states: it needs the separable decoder (--decoder separable)")
    return {"classes": classes is not None, "states": rows}


def _write_page(
    run: Run[HeterogeneityConfig],
    searched: Search,
    fitted: StatesFitted,
    views: _Views,
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
        views.row,
        views.latent,
        views.gain,
        views.classes,
        rows,
        latents,
        facts,
        run.log.warnings,
    )
    run.log.line(f"  move through the states: {write_explorer(run.folder / EXPLORER, numbers)}")


def _spacing(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} Å"


def _consensus(cells: Cells) -> Tensor:
    return empirical_map(cells, torch.ones(len(cells)))


def _judge(
    fitted: StatesFitted, number: int, latent: Tensor, mask: Tensor, difference: Tensor, grid: Grid
) -> dict[str, Any]:
    """Cross-validated resolution of a state in its mask, and where it differs from the consensus."""
    raw = []
    for model, cells, kernel in zip(fitted.models, fitted.cells, fitted.kernels, strict=True):
        cell = int((model.density.point - model.frame(latent[None])).square().sum(1).argmin())
        raw.append(on_grid(raw_map(cells, kernel[cell]), cells.grid, grid))
    models = [model.map(latent) for model in fitted.models]
    found: dict[str, Any] = {"state": number + 1}
    for name, own in (("resolution", mask), ("moving_resolution", moving_mask(difference, grid.pixel_size))):
        curve = None if own is None else CrossValidation((raw[0], raw[1]), own, grid).curve((models[0], models[1]))
        found[name] = None if curve is None else resolution(curve, 0.5)
    return found


@dataclass(frozen=True)
class _Views:
    """All views in the order of the input: one per particle, or per copy of it under the symmetry."""

    row: Int[Tensor, " v"]  # of the particle table
    half: Int[Tensor, " v"]
    copy: Int[Tensor, " v"]  # from 1
    latent: Float[Tensor, "v q"]
    gain: Float[Tensor, " v"]
    classes: Int[Tensor, " v"] | None


def _views(run: Run[HeterogeneityConfig], fitted: StatesFitted, classes: Int[Tensor, " v"] | None) -> _Views:
    stack = run.stack
    copies = stack.symmetry.order
    rows = [stack.only(half).rows.repeat_interleave(copies) for half in (1, 2)]
    gains = [embedding.gain for embedding in fitted.embeddings]
    row = torch.cat(rows)
    copy = torch.arange(len(row)) % copies + 1
    half = torch.cat([torch.full_like(own, number + 1) for number, own in enumerate(rows)])
    order = torch.argsort(row * copies + copy)
    return _Views(
        row[order],
        half[order],
        copy[order],
        torch.cat(fitted.latent)[order],
        torch.cat(gains)[order],
        None if classes is None else classes[order],
    )


def _write_latents(run: Run[HeterogeneityConfig], views: _Views) -> None:
    """latents.csv and cryoDRGN's z.pkl: one line per particle in the order of the input, or one per copy of it."""
    several = run.stack.symmetry.order > 1
    names = ["row", "half", *(["copy"] if several else [])]
    names += [f"z{k + 1}" for k in range(views.latent.shape[1])]
    names += ([] if views.classes is None else ["class"]) + ["gain"]
    number = run.stack.table.row[views.row] + 1
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
    names = ["state", "population", "resolution", "moving_resolution"]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, *(f"z{k + 1}" for k in range(latents.shape[1]))])
        for row, latent in zip(rows, latents.tolist(), strict=True):
            cells = ["" if row[name] is None else number_text(row[name], ".5g") for name in names[1:]]
            writer.writerow([row["state"], *cells, *(number_text(value) for value in latent)])
