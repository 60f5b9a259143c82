"""`emsplat-relion`: a reconstruction as a job of type External of RELION 4 and 5 (docs/relion.md).

RELION runs `emsplat-relion --o External/job005/ --in_parts ... --label value ... --j 4` in the project directory; the
folder holds files of its own already. It learns how the job ended from an empty file in that folder, and which files
other jobs can take from RELION_OUTPUT_NODES.star.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emsplat.commandline.arguments import Command, command_of
from emsplat.commandline.parse import call
from emsplat.config import ReconstructConfig, change
from emsplat.errors import EmsplatError, InputError, Interrupted
from emsplat.io.star import read_star_file, write_star_file
from emsplat.process import Stopped, started
from emsplat.run.files import BACKPROJECTIONS, FULL_MAP, HALF_MAPS, LOCAL_RESOLUTION, MASK, PARTICLES, REPORT, SETTINGS
from emsplat.run.folder import check_same_run, read_summary
from emsplat.run.log import Log

_ABORT = "RELION_JOB_ABORT_NOW"
_ENDINGS = ("SUCCESS", "FAILURE", "ABORTED")
_LOOK_EVERY = 0.5  # seconds between looks for a request to abort
_LAST_FILE = REPORT  # that a reconstruction writes
_UNUSED = {
    "in_movies": "Input movies",
    "in_mics": "Input micrographs",
    "in_coords": "Input coordinates",
    "in_3dref": "Input 3D reference",
}
_PARTICLE_FILE = "ParticleGroupMetadata.star.relion"  # what RELION 5 calls a particle file
_NODE_NAME, _NODE_KIND = "_rlnPipeLineNodeName", "_rlnPipeLineNodeTypeLabel"
# RELION's file browsers go by the words before the first dot, and offer half maps by "half1" in the file name.
_NODES = {
    FULL_MAP: "DensityMap.mrc",
    **dict.fromkeys((*HALF_MAPS, *BACKPROJECTIONS), "DensityMap.mrc.halfmap"),
    MASK: "Mask3D.mrc",
    LOCAL_RESOLUTION: "Image3D.mrc.localresmap",
}


def job(
    o: Path,
    in_parts: Path | None = None,
    in_mask: Path | None = None,
    in_movies: Path | None = None,
    in_mics: Path | None = None,
    in_coords: Path | None = None,
    in_3dref: Path | None = None,
    j: int = 1,
    pipeline_control: Path | None = None,
    config: ReconstructConfig = ReconstructConfig(),  # noqa: B008 (frozen)
) -> None:
    """Reconstruct a density map and two half maps, as a job of type External of RELION.

    RELION's GUI fills in the first options; every other one can be given as a parameter of the job, label and value
    (label "symmetry", value "D2"; of a switch such as "isotropic" the label alone).

    Args:
        o: Folder of the job.
        in_parts: Particles.
        in_mask: Mask for the FSC.
        in_movies: Not used.
        in_mics: Not used.
        in_coords: Not used.
        in_3dref: Not used: emsplat starts from the particles' own classical map.
        j: Threads.
        pipeline_control: Folder of the job once more; RELION adds this where the command contains "relion_".
    """
    given = {"in_movies": in_movies, "in_mics": in_mics, "in_coords": in_coords, "in_3dref": in_3dref}
    for option, box in _UNUSED.items():
        if given[option] is not None:
            raise InputError(
                f'--{option} {given[option]}: emsplat starts from the particles alone; leave the box "{box}" empty'
                + ("; `emsplat assess --reference` compares with a map afterwards" if option == "in_3dref" else "")
            )
    if in_parts is None:
        raise InputError('--in_parts: missing; give a particle STAR file in the box "Input particles"')
    if pipeline_control is not None and pipeline_control.resolve() != o.resolve():
        raise InputError(f"--pipeline_control {pipeline_control}: another folder than --o {o}; expected the same")
    if config.run.threads is not None:
        raise InputError('--threads: set "Number of threads" on the tab Running instead')
    if in_mask is not None and config.mask.mask is not None:
        raise InputError('--mask and the box "Input 3D mask": expected one of them; leave the other out')
    config = change(config, threads=j, mask=in_mask or config.mask.mask)
    if (o / SETTINGS).is_file() and not config.run.overwrite:
        config = change(config, resume=True)
        if (o / _LAST_FILE).is_file():
            check_same_run(config, in_parts, o)
            _require_symmetry(o, force=config.run.force)
            print(f"{o}: the run is finished; its files are listed for RELION again")
            write_nodes(o, in_parts)
            return
    from emsplat.programs.reconstruct import reconstruct

    reconstruct(config, in_parts, o, Log(began=started()))
    _require_symmetry(o, force=config.run.force)
    write_nodes(o, in_parts)


def _require_symmetry(output: Path, *, force: bool) -> None:
    """A job whose maps are averaged over a wrong symmetry fails, so that no other job takes them.

    Raises:
        EmsplatError: the finished run found that its particles do not have the symmetry.
    """
    symmetry = read_summary(output).get("symmetry")
    if symmetry is not None and symmetry["verdict"] == "wrong" and not force:
        raise EmsplatError(
            f"symmetry {symmetry['text']}; the job counts as failed: start another one with the right symmetry, or "
            "add the parameter force (no value) and continue"
        )


def write_nodes(output: Path, particles: Path) -> None:
    """RELION_OUTPUT_NODES.star: the files that other jobs can take, named from the project directory, and their kinds.

    Raises:
        OutputError: it cannot be written.
    """
    folder = Path(os.path.relpath(output))
    kinds = {PARTICLES: _particle_label(output, particles), **_NODES}
    there = {(folder / name).as_posix(): kind for name, kind in kinds.items() if (output / name).is_file()}
    columns = {_NODE_NAME: list(there), _NODE_KIND: list(there.values())}
    write_star_file(output / "RELION_OUTPUT_NODES.star", [("output_nodes", columns)])


def _particle_label(output: Path, particles: Path) -> str:
    """What this RELION calls a particle file; betas of RELION 4 said ParticlesData.

    RELION lists the inputs of a job, with their kinds, in job_pipeline.star of its folder.
    """
    path = output / "job_pipeline.star"
    if path.is_file():
        nodes = read_star_file(path).table("pipeline_nodes")
        if nodes is not None and nodes.has(_NODE_NAME) and nodes.has(_NODE_KIND):
            for name, kind in zip(nodes.text(_NODE_NAME), nodes.text(_NODE_KIND), strict=True):
                if Path(name) == particles and kind.startswith("Particle"):
                    return f"{kind.split('.')[0]}.star.relion"
    return _PARTICLE_FILE


@contextmanager
def _abortable(folder: Path) -> Iterator[None]:
    """Within this block a request to abort ends the work like a kill: with a checkpoint where there is one to write.

    A run that can write one has a handler of its own while it does (`emsplat.run.stop`).

    Raises:
        Stopped: asked to, by RELION or the queueing system.
    """
    over = threading.Event()

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    def watch() -> None:
        while not over.wait(_LOOK_EVERY):
            if (folder / _ABORT).exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_folder(command: Command, words: list[str]) -> int:
    """The help, or what is wrong with the words."""
    try:
        call(command, words)
    except EmsplatError as error:
        print(f"emsplat-relion: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a job and says in its folder how it ended; the exit code is that of `emsplat`."""
    words = sys.argv[1:] if arguments is None else arguments
    command = command_of(job, "emsplat-relion")
    if "--o" not in words[:-1] or {"-h", "--help"} & set(words):
        return _without_folder(command, words)
    folder = Path(words[words.index("--o") + 1])
    for ending in _ENDINGS:
        (folder / f"RELION_JOB_EXIT_{ending}").unlink(missing_ok=True)
    ending = "FAILURE"
    try:
        with _abortable(folder):
            call(command, words)
        ending = "SUCCESS"
        return 0
    except Interrupted as error:
        ending = "ABORTED"
        print(f"emsplat-relion: {error} (in RELION: Continue)", file=sys.stderr)
        return error.exit_code
    except EmsplatError as error:
        print(f"emsplat-relion: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        ending = "ABORTED"
        raise
    finally:
        # Also where the options could not be read, and where a bug ends the program.
        (folder / _ABORT).unlink(missing_ok=True)
        if folder.is_dir():
            (folder / f"RELION_JOB_EXIT_{ending}").touch()
