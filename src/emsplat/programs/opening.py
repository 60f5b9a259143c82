"""Particles and the run folder with what is known before the work begins."""

from __future__ import annotations

import hashlib
import os
import platform
from itertools import product
from pathlib import Path
from typing import TypeVar

import tomli_w
import torch

from emsplat import __version__
from emsplat.assessment.maps import given_mask, shared_shell
from emsplat.assessment.symmetry import Finding, examine_symmetry
from emsplat.config import RefineConfig, RunConfig, change
from emsplat.device import choose_device, forget_peak_memory
from emsplat.errors import InputError
from emsplat.granted import free_memory
from emsplat.io.particles import count_stacks, write_used
from emsplat.io.paths import say_folders
from emsplat.io.table import ParticleTable
from emsplat.models.start_files import LOWPASS, is_shared, read_start, start_remarks, starts_from_gaussians
from emsplat.parallel import ALONE, World
from emsplat.particles.choose import open_stack, with_boxes
from emsplat.particles.copies import Copies, copies, mixed_classes, particle_numbers
from emsplat.particles.stack import ParticleStack
from emsplat.process import describe_threads
from emsplat.programs.estimate import estimate_of, speed_of_core
from emsplat.programs.run import Run
from emsplat.programs.settings import Settings
from emsplat.run.files import HALVES, PARTICLES, SETTINGS
from emsplat.run.folder import added_statistics, command_of, plain, prepare_folder, write_text
from emsplat.run.journal import Begun
from emsplat.run.log import Log, counted, data_size
from emsplat.run.stop import require_spacing, time_limit
from emsplat.sums.statistics import fingerprint, memory_of_sums
from emsplat.types import Grid

C = TypeVar("C", bound=RunConfig)
_OF_THE_FILE = "of the file"


def open_run(
    config: C,
    particles: Path,
    folder: Path,
    log: Log,
    settings: Settings | None = None,
    program: str = "reconstruct",
    need_poses: bool = True,
    world: World = ALONE,
) -> Run[C]:
    """The particles with half-sets, what is to be said of their symmetry, and the run folder with what is known before
    the work begins. ``settings`` are those of a fit, ``program`` the command; without ``need_poses`` particles may have
    none, and nothing is asked of those that they have. Of a ``world`` the first process has the folder.

    Raises:
        InputError: the input or an option cannot be used; nothing was written yet.
        OutputError: the folder is not empty or cannot be written.
    """
    device, device_said = choose_device(config.run.device)
    forget_peak_memory(device)
    time_limit(config.run.time_limit)
    require_spacing(config.run.checkpoint_every)
    added = [path.resolve() for path in config.run.add_statistics]
    if twice := next((path for path in added if added.count(path) > 1), None):
        raise InputError(f"--add-statistics: {twice} is given twice; its particles would count twice, give it once")
    if world.first:
        for other, half in product(config.run.add_statistics, HALVES):
            added_statistics(other, half)
    with log.step("particles"):
        stack = open_stack(_here(config, world), particles, need_poses=need_poses, world=world).on(device)
        _require_usable(stack, config, settings)
    _require_shared_out(stack, world)
    if world.first:
        prepare_folder(config, particles, folder, stack.table.stacks)
        process = platform.node(), os.getpid()
        log.keep_in(folder, Begun(f"emsplat {program}", __version__, str(particles), config.run.resume, *process))
    init = "map" if settings is None else settings.init
    for warning in (*stack.table.warnings, *start_remarks(init, stack.grid)):
        log.warn(warning)
    stack, skipped = leave_out_bad(stack, log, world) if config.run.skip_bad else (stack, ())
    _introduce(log, stack, config)
    log.line(f"  {device_said}")
    if world.size > 1:
        log.line(f"  shared out over {world.size} processes on {counted(len(set(world.hosts)), 'machine')}")
    if stack.holding is not None:
        log.line(f"  {stack.holding.text}")
    finding = _look_for_symmetry(stack, log) if need_poses and world.first else None
    needed = None
    if device.type == "cpu":
        needed = estimate_of(
            config,
            stack,
            settings,
            threads=torch.get_num_threads(),
            processes=world.size,
            kept=config.run.keep_statistics,
            speed=speed_of_core(),
        )
        log.line(f"  estimated{', from the beginning' if config.run.resume else ''}: {needed.text}")
        _look_at_memory(needed.memory * world.on_this_machine, stack.grid, log)
        for part in needed.parts:
            log.journal.add(part)
    run = Run(config, particles, folder, log, stack, skipped, finding, world, needed)
    if world.first:
        with log.step("particles written"):
            if need_poses:  # else they are written once there are some
                write_used(with_boxes(stack.table.take(stack.rows)), folder / PARTICLES, stack.half)
        write_config(run, settings)
    log.parts["start"] = round(log.seconds, 2)
    return run


def _look_at_memory(needed: float, grid: Grid, log: Log) -> None:
    """Warns where there is less than will be needed."""
    free = free_memory()
    if free is not None and needed > free:
        log.warn(
            f"about {data_size(needed)} of memory will be needed, and {data_size(free)} are free: the system may end "
            f"this run. Close other programs, ask the queue for more, or take fewer pixels than {grid.size} (--box)"
        )


def _require_usable(stack: ParticleStack, config: RunConfig, settings: Settings | None) -> None:
    """
    Raises:
        InputError: a half-set is empty, mask or start do not fit, or the engine takes one kind of images only.
    """
    for half in HALVES.values():
        stack.only(half)
    if settings is not None and settings.engine != "one-pass":
        stack.require_one_grid()
    shared = config.refinement.shared_to if isinstance(config, RefineConfig) else None
    if shared is not None and (not shared > 0 or shared_shell(stack.grid, shared) >= stack.grid.size // 2):
        raise InputError(
            f"--shared-to {shared:g}: no shell is left to judge by up to two pixels, {stack.grid.nyquist:.3g} Å; "
            "expected the spacing in Å to which the poses that are given were found with one map of all particles"
        )
    given_mask(config.mask, stack.grid)
    for name in HALVES:
        read_start("map" if settings is None else settings.init, stack.grid, name)


def _here(config: C, world: World) -> C:
    """The options with the folder of images that this process has."""
    datadir = config.choice.datadir
    return config if datadir is None else change(config, datadir=Path(world.here(str(datadir))))


def _require_shared_out(stack: ParticleStack, world: World) -> None:
    """
    Raises:
        InputError: a process would have nothing to do, or has other particles, half-sets or images than the first.
    """
    if world.size == 1:
        return
    different = len(torch.unique(particle_numbers(stack.table.take(stack.rows))))
    if world.size > different:
        raise InputError(
            f"{world.size} processes for {counted(different, 'particle')}: expected no more processes than particles; "
            "start fewer with --nproc-per-node"
        )
    half = hashlib.sha256(stack.half.numpy().tobytes()).hexdigest()[:16]
    used = torch.unique(stack.table.stack[stack.rows]).tolist()
    there = stack.holding is None  # otherwise each stack was compared by itself
    sizes = sum(stack.table.stacks[number].stat().st_size for number in used) if there else 0
    world.require_same(
        {
            "list of particles": fingerprint(stack),
            "division into half-sets": half,
            "size of the image stacks": f"{sizes:,} bytes",
            "kind of device": stack.device.type,
        }
    )


def leave_out_bad(stack: ParticleStack, log: Log, world: World = ALONE) -> tuple[ParticleStack, tuple[int, ...]]:
    """The images that can be used, and the rows (from 1) of the others."""
    stack, bad = stack.without_bad(world)
    skipped = tuple(row + 1 for row in stack.table.row[bad].tolist())
    if skipped:
        log.warn(f"left out {len(skipped)} bad images, rows {', '.join(map(str, skipped[:10]))}")
    return stack, skipped


def _look_for_symmetry(stack: ParticleStack, log: Log) -> Finding | None:
    if stack.symmetry.order == 1:
        return None
    with log.step("symmetry"):
        own = stack.here()
        found = None if min(int((own.half == half).sum()) for half in (1, 2)) < 2 else examine_symmetry(own)
    if found is not None:
        (log.warn if found.verdict == "wrong" else log.line)(f"symmetry {found.text}")
    return found


def write_config(run: Run[RunConfig], settings: Settings | None) -> None:
    """config.toml: what was asked for, and what that came to."""
    write_text(
        run.folder / SETTINGS,
        tomli_w.dumps(
            {
                "program": f"emsplat {__version__}",
                "command": command_of(run.config),
                "particles": str(run.particles),
                "settings": {} if settings is None else plain(settings),
                "options": plain(run.config),
            }
        ),
    )


def _introduce(log: Log, stack: ParticleStack, config: RunConfig) -> None:
    grid, table = stack.grid, stack.table
    stacks = counted(count_stacks(table.take(stack.rows)), "stack")
    log.line(f"emsplat {__version__}: {len(stack):,} particles of {table.name} in {stacks}")
    for text in (say_folders(table.folders), *table.notes, *_other_grids(stack)):
        log.line(f"  {text}")
    log.line(
        f"  box {grid.size} px of {grid.pixel_size:g} Å, {counted(len(table.groups), 'optics group')}, symmetry "
        f"{stack.symmetry.symbol}"
    )
    halves = [int((stack.half == h).sum()) for h in (1, 2)]
    how = half_sets_from(table, config)
    seed = "" if how == _OF_THE_FILE else f", seed {config.halves.seed}"
    log.line(f"  half-sets {halves[0]:,} + {halves[1]:,}: {how}{seed}")
    _say_copies(log, copies(table, stack.symmetry), table, config)
    if text := mixed_classes(table):
        log.warn(text)
    said = "bright protein" if table.sign > 0 else "dark protein"
    log.line(f"  contrast: {said}, as the file says" + (", inverted with --invert" if config.images.invert else ""))
    read = data_size(stack.stored)
    log.line(
        f"  one pass over {read} of images; {data_size(memory_of_sums(grid.size))} of memory for the sums, "
        f"{describe_threads(config.run.threads)}"
    )


def _other_grids(stack: ParticleStack) -> list[str]:
    others = [own for own in dict.fromkeys(stack.grids) if own != stack.grid]
    kinds = ", ".join(f"{own.size} px of {own.pixel_size:g} Å" for own in others)
    return [f"several kinds of images are put on the grid of most of them; others: {kinds}"] if others else []


def half_sets_from(table: ParticleTable, config: RunConfig) -> str:
    how = "drawn particle by particle"
    if 1 < len(torch.unique(table.micrograph)) < len(table):  # one unit or as many as particles: not known
        how = "drawn per micrograph" if table.micrograph_names else "drawn per stack"
    half = table.half_of_file
    if half is None:
        return f"re{how}" if config.halves.redraw_halves else how
    return _OF_THE_FILE if bool((half > 0).all()) else f"{_OF_THE_FILE}, the rest {how}"


def _say_copies(log: Log, found: Copies, table: ParticleTable, config: RunConfig) -> None:
    if table.left_out:
        log.line(f"  {table.left_out:,} rows that show an image or particle again are left out (--unique)")
    if found.expansion is not None:
        log.line(f"  {found.text}; copies share a half-set")
        symmetry = config.choice.point_group
        if symmetry.order > 1:
            log.warn(
                f"the set is {found.text}; --symmetry {symmetry.symbol} does that again and adds nothing: leave it "
                "out, or leave the copies out with --unique"
            )
    elif found.text:
        log.warn(
            f"{found.text}; they share a half-set and count once where their poses agree, --unique leaves them out"
        )
    if found.close:
        log.warn(found.near)


def introduce_fit(log: Log, settings: Settings) -> None:
    count = f"{settings.gaussians:,}" if settings.gaussians else "as many as needed"
    if starts_from_gaussians(settings.init):
        count = "those of the file"
    log.line(f"  Gaussians: {count}, from {settings.init}; engine {settings.engine}")
    if is_shared(settings.init):
        _warn_of_shared_start(log, settings.init)
    if settings.engine == "images":
        size = "as many images as fit the memory" if settings.batch == "auto" else settings.batch
        log.line(f"  {settings.epochs} epochs in batches of {size}")
    elif settings.independent_halves:
        log.line("  nothing passes between the half-sets")
    else:
        more = "; in the end, how far their residual maps agree in each shell" if settings.residual else ""
        log.line(f"  the halves share two numbers per stage: the gain in mean cross-validated FSC, and its error{more}")


def _warn_of_shared_start(log: Log, init: str) -> None:
    if starts_from_gaussians(init):
        log.warn(
            f"both half-sets start from {init}: their maps share what it holds and the data leave open, and their FSC "
            "flatters; so does the cross-validated FSC where it was made from these particles (a name with half1 in it "
            "gives each half its own file)"
        )
    else:
        log.warn(
            f"both half-sets start from {init}, low-passed at {LOWPASS:g} Å: what is coarser they share; go by the "
            "cross-validated FSC"
        )
