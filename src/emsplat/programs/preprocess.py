"""A new particle stack: resampled, normalised, inverted, recentred, with all its metadata carried along."""

from __future__ import annotations

import time
from pathlib import Path

from emsplat.config import PreprocessConfig
from emsplat.errors import OutputError
from emsplat.io.cryosparc import write_cs
from emsplat.io.mrc import writing_stack
from emsplat.io.particles import write_used
from emsplat.io.paths import say_folders, say_start
from emsplat.particles.choose import open_images, read_table
from emsplat.particles.stack import ParticleStack
from emsplat.process import threads
from emsplat.programs.opening import leave_out_bad
from emsplat.run.log import Log
from emsplat.types import PREMULTIPLIED

_PIXELS = 2**23  # of a batch


def preprocess(config: PreprocessConfig, particles: Path, output: Path, log: Log | None = None) -> Path:
    """Writes particles.mrcs and particles.star into ``output`` and returns the path of the latter.

    Images are brought to the box and pixel size asked for (`resampled_grid`), moved by whole pixels so that
    origins are below one, normalised to mean 0 and standard deviation 1 outside the particle, and bright. Those that
    were multiplied by their CTF become phase-flipped ones. An image that several rows name is written once, and they
    go on naming it. A STAR file keeps its columns; particles of a .cs file get a
    particles.cs as well. Further grids get stacks of their own (particles2.mrcs, ...).

    Raises:
        InputError: the particles or an option cannot be used.
        OutputError: the folder is not empty or cannot be written.
    """
    with threads(config.threads):
        return _preprocess(config, particles, output, log or Log())


def _preprocess(config: PreprocessConfig, particles: Path, output: Path, log: Log) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not config.overwrite:
        raise OutputError(f"{output}: is not empty; choose another with -o or add --overwrite")
    table = read_table(config.choice, particles)
    log.line(f"{len(table):,} particles of {table.name}; {say_folders(table.folders)}")
    for note in table.notes:
        log.line(f"  {note}")
    stack = open_images(config.choice, config.images, table, finer=True, recentre=config.recentre)
    for warning in stack.table.warnings:
        log.warn(warning)
    if config.skip_bad:
        stack, _ = leave_out_bad(stack, log)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error
    parts = stack.parts()
    paths = [output / f"particles{number or ''}.mrcs" for number in (0, *range(2, len(parts) + 1))]
    own = {path.resolve() for path in (*table.sources, *table.stacks)}
    for path in (*paths, output / "particles.star", output / "particles.cs"):
        if path.resolve() in own:
            raise OutputError(f"{path}: is an input, and would be replaced; choose another folder with -o")
    start = time.monotonic()
    for part, path in zip(parts, paths, strict=True):
        _write_images(part.once(), path, config, log)
    rate = len(stack) / max(time.monotonic() - start, 1e-9)
    written = stack.written_to(paths)
    star = output / "particles.star"
    write_used(written, star, written.half, new_images=True)
    if all(source.suffix.lower() == ".cs" for source in table.sources):
        write_cs(output / "particles.cs", written, written.half, new_images=True)
    treatment = table.optics.treatment
    if treatment is not None and bool((treatment == PREMULTIPLIED).any()):
        log.warn(
            "images that were multiplied by their CTF are phase-flipped now, and the file says so; RELION's programs "
            "want to be told as well (--ctf_phase_flipped; 'Have data been phase-flipped?')"
        )
    log.line(f"particles: {star} ({len(stack):,}, {rate:,.0f} images/s, {log.seconds:.0f} s in all)")
    log.line(f"  {say_start(star, paths[0])}")
    return star


def _write_images(part: ParticleStack, path: Path, config: PreprocessConfig, log: Log) -> None:
    grid = part.grid
    done = 0
    with (
        log.progress(path.name, len(part)) as update,
        writing_stack(path, len(part), grid, config.dtype) as write,
    ):
        for batch in part.sequential(max(1, _PIXELS // grid.size**2), normalised=config.normalise):
            write(batch.images)
            done += len(batch)
            update(done, f"{grid.size} px of {grid.pixel_size:.4g} Å")
