"""The command line: what each command takes and says, and the functions that it calls."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from emsplat import __version__
from emsplat.commandline.arguments import Command, command_of
from emsplat.commandline.help import program_help, terminal
from emsplat.commandline.parse import call, did_you_mean
from emsplat.config import (
    AbinitioConfig,
    Angstrom,
    AssessConfig,
    BackprojectConfig,
    CheckConfig,
    ComparePosesConfig,
    ConvertConfig,
    File,
    Folder,
    HeterogeneityConfig,
    MapFile,
    NullTestConfig,
    Pixels,
    PostprocessConfig,
    PreprocessConfig,
    ReconstructConfig,
    RefineConfig,
    RunOptions,
    ScoreStatesConfig,
    SimulateConfig,
    SlurmConfig,
    StatesConfig,
)
from emsplat.errors import EmsplatError, InputError, OutputError
from emsplat.granted import granted_cores
from emsplat.process import imports, started
from emsplat.process import threads as with_threads
from emsplat.run.files import REPORT
from emsplat.run.log import Log

if TYPE_CHECKING:
    from emsplat.parallel import World


def reconstruct(
    particles: Path,
    /,
    output: Folder | None = None,
    config: ReconstructConfig = ReconstructConfig(),  # noqa: B008 (frozen)
) -> int:
    """Reconstruct a density map and two half maps from particles with known poses.

    Exit code 1 if the particles do not have the symmetry that is asked for (0 with --force).

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Run folder; without it a new one here, reconstruct_001 or the next free number.

    Examples:
        # particles of RELION (Refine3D) or cryoSPARC (refinement), results in run/
        emsplat reconstruct run_data.star -o run --symmetry D2
        # quickly, to see what the particles hold: a part of them, on fewer pixels
        emsplat reconstruct particles.cs --first 20000 --box 128
        # go on with a run that was interrupted
        emsplat reconstruct run_data.star -o run --symmetry D2 --resume
    """
    with imports():
        from emsplat.programs.finish import exit_code
        from emsplat.programs.reconstruct import reconstruct as run

    with _together(config) as (log, world), _folder(output, "reconstruct", _again(config.run), world) as folder:
        return exit_code(run(config, particles, folder, log, world=world))


def backproject(
    particles: Path,
    /,
    output: Folder | None = None,
    config: BackprojectConfig = BackprojectConfig(),  # noqa: B008 (frozen)
) -> int:
    """Classical half maps and a full map, regularised by their signal-to-noise ratio, in one pass.

    Exit code 1 if the particles do not have the symmetry that is asked for (0 with --force).

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Run folder; without it a new one here, backproject_001 or the next free number.

    Examples:
        # the maps of a RELION refinement again, in minutes
        emsplat backproject run_data.star -o classical --symmetry C4
        # images that lie elsewhere than the STAR file says
        emsplat backproject particles.star --datadir /data/project
        # one class, with a spherical mask for the FSC
        emsplat backproject run_data.star --class 2 --mask-diameter 180
    """
    with imports():
        from emsplat.programs.finish import exit_code
        from emsplat.programs.reconstruct import backproject as run

    with _together(config) as (log, world), _folder(output, "backproject", _again(config.run), world) as folder:
        return exit_code(run(config, particles, folder, log, world=world))


def refine(
    particles: Path,
    /,
    output: Folder | None = None,
    config: RefineConfig = RefineConfig(),  # noqa: B008 (frozen)
) -> int:
    """Refine the poses of particles against Gaussians of their own half-set, then reconstruct with them.

    Each particle is turned and moved until it fits best, no further from the pose that was given than poses are wrong,
    as the particles themselves show. Results are those of `emsplat reconstruct`; run_data.star has the new poses with
    their uncertainty. Exit code 1 if the particles do not have the symmetry that is asked for (0 with --force).

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Run folder; without it a new one here, refine_001 or the next free number.

    Examples:
        # particles of a refinement, or of an earlier and coarser one
        emsplat refine run_data.star -o refined --symmetry D2
        # poses that may be off by ten degrees and more
        emsplat refine run_data.star -o refined --search 15
        # poses found with one map of all particles at 15 Å: only finer shells count
        emsplat refine particles.star -o refined --shared-to 15
    """
    with imports():
        from emsplat.programs.finish import exit_code
        from emsplat.programs.refine import refine as run

    with _together(config) as (log, world), _folder(output, "refine", _again(config.run), world) as folder:
        return exit_code(run(config, particles, folder, log, world=world))


def heterogeneity(
    particles: Path,
    /,
    output: Folder | None = None,
    config: HeterogeneityConfig = HeterogeneityConfig(),  # noqa: B008 (frozen)
) -> None:
    """Find out whether particles show different states of a molecule, and make maps of these.

    The headline is how much better a model with states predicts images that it has not seen. Where it does not, that
    is the result, and no states are made.

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Run folder; without it a new one here, heterogeneity_001 or the next free number.

    Examples:
        # is there anything, and what?
        emsplat heterogeneity run_data.star -o states
        # only in one region
        emsplat heterogeneity run_data.star --focus head_mask.mrc
        # quickly, with a part of the particles
        emsplat heterogeneity particles.cs --first 20000
    """
    with imports():
        from emsplat.programs.heterogeneity import heterogeneity as run

    with _together(config) as (log, world), _folder(output, "heterogeneity", _again(config.run), world) as folder:
        run(config, particles, folder, log, world=world)


def abinitio(
    particles: Path,
    /,
    output: Folder | None = None,
    config: AbinitioConfig = AbinitioConfig(),  # noqa: B008 (frozen)
) -> int:
    """Find the poses of particles from nothing, and whether they can be believed.

    Starts are made from both half-sets apart until two agree: found, uncertain, or not found. Then every particle is
    given a pose with its uncertainty (run_data.star), and maps are made. Poses that the file has are not used.

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --ctf.
        output: Run folder; without it a new one here, abinitio_001 or the next free number.

    Examples:
        # poses of picked particles, and a map; emsplat refine goes on from run_data.star
        emsplat abinitio particles.star -o first --diameter 180
        # of a particle with known symmetry
        emsplat abinitio particles.star --symmetry D2
        # when the first seeds were not found
        emsplat abinitio particles.star --starts 8 --seed 1
    """
    with imports():
        from emsplat.programs.abinitio import abinitio as run
    from emsplat.programs.abinitio import exit_code

    with _together(config) as (log, world), _folder(output, "abinitio", _again(config.run), world) as folder:
        return exit_code(run(config, particles, folder, log, world=world))


def simulate(
    model: Path | None = None,
    /,
    output: Folder | None = None,
    threads: int | None = None,
    config: SimulateConfig = SimulateConfig(),  # noqa: B008 (frozen)
) -> None:
    """Simulate a particle stack from an atomic model, or from a procedural protein where none is given.

    Args:
        model: mmCIF or PDB file (may be gzipped).
        output: Folder for particles.mrcs, particles.star and truth.mrc (and truth/, where particles differ); without it
            a new one here, simulate_001 or the next free number.
        threads: Threads of the computation; without it as many as cores were granted.

    Examples:
        # a small set to try emsplat with
        emsplat simulate -o demo --particles 2000 --box 64 --pixel-size 3
        # particles of a known structure
        emsplat simulate 6z6u.cif -o apoferritin --box 192 --pixel-size 1.2
        # an antibody with one Fab turned about its hinge in 100 steps
        emsplat simulate 1hzh.pdb -o igg --rotate "(chain H and resid 1-213) or chain L" --about 213 244
    """
    from emsplat.io.paths import say_start
    from emsplat.programs.simulate import simulate as run

    with _folder(output, "simulate") as folder, with_threads(threads):
        star = run(config, model, folder, _log())
        print(f"particles: {star}")
        print(f"  {say_start(star, folder / 'particles.mrcs')}")


def check(
    particles: Path,
    /,
    output: Folder | None = None,
    json: bool = False,
    threads: int | None = None,
    config: CheckConfig = CheckConfig(),  # noqa: B008 (frozen)
) -> int:
    """Say what is understood of a particle set, with a verdict for each item: ok, look or wrong.

    Exit code 0 if all is ok, 1 if something asks for a look, 2 if something is wrong.

    Args:
        particles: Particles, as for `emsplat reconstruct`.
        output: Folder for report.html, slices.png and directions.png of a quick back-projection, and check.json;
            without it nothing is written.
        json: Print the result as one JSON object.
        threads: Threads of the computation; without it as many as cores were granted.

    Examples:
        # before a long run
        emsplat check particles.star --symmetry D2
        # with a page of slices and views
        emsplat check particles.cs -o look
        # only the metadata, where the images are not at hand
        emsplat check particles.star --metadata-only
    """
    from emsplat.io.files import json_text
    from emsplat.programs.check import check as work
    from emsplat.programs.check import describe, exit_code

    with with_threads(threads):
        result = work(config, particles, output)
    print(json_text(result) if json else describe(result))
    if output is not None and not json:
        print(f"report: {output / REPORT}")
    return exit_code(result)


def convert(
    particles: Path,
    output: Path,
    /,
    config: ConvertConfig = ConvertConfig(),  # noqa: B008 (frozen)
) -> None:
    """Convert particle metadata between RELION (.star), cryoSPARC (.cs) and cryoDRGN (.pkl), or Gaussians between .ply
    and pseudo-atoms (.cif, .pdb). Images stay as they are.

    Args:
        particles: Particles, as for `emsplat reconstruct`, or Gaussians or an atomic model.
        output: File to write, by its ending. For cryoDRGN poses.pkl, beside which ctf.pkl is written.

    Examples:
        # cryoSPARC to RELION
        emsplat convert J24/cryosparc_P12_J24_particles.cs particles.star
        # RELION to cryoDRGN
        emsplat convert run_data.star poses.pkl
        # Gaussians to pseudo-atoms, for ChimeraX
        emsplat convert run/run_half1.ply model.cif
    """
    from emsplat.programs.convert import convert as run

    files = run(config, particles, output, say=print)
    print(f"written: {' and '.join(map(str, files))}")


def preprocess(
    particles: Path,
    /,
    output: Folder | None = None,
    config: PreprocessConfig = PreprocessConfig(),  # noqa: B008 (frozen)
) -> None:
    """Write a new particle stack: another box or pixel size, normalised, inverted, recentred; all metadata stay.

    Args:
        particles: Particles, as for `emsplat reconstruct`.
        output: Folder for particles.mrcs and particles.star; without it a new one here, preprocess_001 or the next free
            number.

    Examples:
        # on fewer pixels
        emsplat preprocess particles.star -o small --box 128
        # half the disk space
        emsplat preprocess particles.star -o half --dtype float16
        # other contrast, nothing else
        emsplat preprocess particles.star --invert --no-normalise --no-recentre
    """
    from emsplat.programs.preprocess import preprocess as run

    with _folder(output, "preprocess") as folder:
        run(config, particles, folder, _log())


def assess(
    run: Path,
    /,
    config: AssessConfig = AssessConfig(),  # noqa: B008 (frozen)
) -> None:
    """Measure the maps of a run folder again: FSC, local resolution, resolution by direction; write the report.

    Args:
        run: Run folder of `emsplat reconstruct` or `emsplat backproject`.

    Examples:
        # with a mask of your own
        emsplat assess run --mask mask.mrc
        # against a model that lies in the map
        emsplat assess run --reference model.cif
        # finer detail in the local resolution
        emsplat assess run --window 15
    """
    from emsplat.programs.assess import reassess as work

    work(run, config, _log())


def nulltest(
    particles: Path,
    /,
    output: Folder | None = None,
    config: NullTestConfig = NullTestConfig(),  # noqa: B008 (frozen)
) -> int:
    """Reconstruct noise, random phases and shuffled poses, and see whether the resolution stays silent.

    Exit code 1 if it does not.

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Folder for the tests and their table; without it a new one here, nulltest_001 or the next free number.

    Examples:
        # is the resolution of these particles real?
        emsplat nulltest run_data.star -o null --symmetry D2
        # more particles, for a surer answer
        emsplat nulltest run_data.star -o null --particles 10000
        # random phases from 8 Å on
        emsplat nulltest run_data.star --randomise-from 8
    """
    from emsplat.programs.nulltest import null_test

    with _folder(output, "nulltest", _again(config.reconstruct.run)) as folder:
        return 0 if null_test(config, particles, folder, _log()) else 1


def postprocess(
    run: Path,
    /,
    config: PostprocessConfig = PostprocessConfig(),  # noqa: B008 (frozen)
) -> None:
    """Weight and sharpen the average of the half maps; write postprocess.mrc, postprocess.star and EMDB's FSC.

    Args:
        run: Run folder of `emsplat reconstruct` or `emsplat backproject`.

    Examples:
        # with the B factor that the data show
        emsplat postprocess run
        # less sharp
        emsplat postprocess run --b-factor -40
        # with a mask of your own
        emsplat postprocess run --mask mask.mrc
    """
    from emsplat.programs.postprocess import postprocess as work

    work(run, config, _log())


def score_states(
    run: Path,
    /,
    config: ScoreStatesConfig,
) -> None:
    """Score the states of simulated particles against the truth: CryoBench's FSC-AUC per state and per image, the same
    where the state moves, neighbourhoods of latents, adjusted Rand index; each beside the consensus.

    Args:
        run: Run folder of `emsplat heterogeneity`, or a folder of any program with a map for each true state in order
            (000.mrc, 001.mrc, ...) and, where there are any, latents (latents.csv or cryoDRGN's z.pkl).

    Examples:
        # a run on particles of `emsplat simulate -o particles --states ...`
        emsplat score-states run --truth particles
        # classes of another program: maps 000.mrc, 001.mrc, ... in the order of the true states
        emsplat score-states classes --truth particles --consensus refined.mrc
        # a run on a part of the particles
        emsplat score-states run --truth particles --partial
    """
    from emsplat.programs.score_states import score_states as work

    work(run, config, _log())


def states(
    run: Path,
    /,
    output: Folder,
    config: StatesConfig = StatesConfig(),  # noqa: B008 (frozen)
) -> None:
    """Write maps of a heterogeneous run at any latents, or the particles that lie there.

    Args:
        run: Run folder of `emsplat heterogeneity`.
        output: Folder for the maps, 000.mrc, 001.mrc, ..., or for the particles.

    Examples:
        # one map for each row of a table with columns z1, z2, ...
        emsplat states run --at z.csv -o maps
        # 20 maps on the way from state 1 to state 4, and a movie of them
        emsplat states run --path 1 4 --movie -o way
        # the particles that were selected with the lasso of the explorer, for RELION, cryoSPARC and cryoDRGN
        emsplat states run --select rows.txt -o chosen
    """
    from emsplat.programs.states import states as work

    work(run, config, output, _log())


def fsc(
    a: Path,
    b: Path,
    /,
    mask: MapFile | None = None,
    output: File | None = None,
    threads: int | None = None,
) -> None:
    """Fourier shell correlation of two maps: RELION's shells and first crossing, and cryoDRGN's beside them.

    With a mask also that of maps with random phases, and the curve corrected by it: these mean something for two half
    maps, not for a map and its model.

    Args:
        a: MRC map, or an atomic model or Gaussians (.cif, .pdb, .ply) where b is a map.
        b: MRC map of the same box and pixel size, or an atomic model or Gaussians that lie in map a.
        mask: MRC map of the same box, values from 0 to 1, that both maps are multiplied with.
        output: Write the curves to this STAR file as well.
        threads: Threads of the computation; without it as many as cores were granted.

    Examples:
        # two half maps
        emsplat fsc run/run_half1_class001_unfil.mrc run/run_half2_class001_unfil.mrc --mask mask.mrc
        # a map and the model in it
        emsplat fsc run/run_class001.mrc model.cif
        # the curves as a file
        emsplat fsc a.mrc b.mrc -o fsc.star
    """
    from emsplat.programs.fsc import compare

    with with_threads(threads):
        compare(a, b, mask, output, _log())


def compare_poses(
    a: Path,
    b: Path,
    /,
    json: bool = False,
    threads: int | None = None,
    config: ComparePosesConfig = ComparePosesConfig(),  # noqa: B008 (frozen)
) -> None:
    """Compare the poses of two files of the same particles, in one frame: how far they are apart.

    Frames of two reconstructions may be turned and moved against each other, and of either hand: that is found and
    taken out first. Particles are matched by their images.

    Args:
        a: Particles, as for `emsplat reconstruct`.
        b: The same particles in other poses.
        json: Print the result as one JSON object.
        threads: Threads of the computation; without it as many as cores were granted.

    Examples:
        # what a refinement has changed
        emsplat compare-poses particles.star refined/run_data.star --symmetry D2
        # two programs
        emsplat compare-poses run_data.star J24/cryosparc_P12_J24_particles.cs
        # for a script
        emsplat compare-poses a.star b.star --json
    """
    from emsplat.io.files import json_text
    from emsplat.programs.compare_poses import compare, describe

    with with_threads(threads):
        found = compare(a, b, config)
    print(json_text(found) if json else describe(found))


def voxelize(
    model: Path,
    /,
    output: MapFile,
    box: Pixels | None = None,
    pixel_size: Angstrom | None = None,
    threads: int | None = None,
) -> None:
    """Turn Gaussians into a density map.

    Args:
        model: Gaussians of emsplat (.ply, .cif, .pdb), or an atomic model (.cif, .pdb) in a map of this box and pixel
            size with MRC origin 0.
        output: MRC map to write.
        box: Box size in pixels; without it the one the model was fitted on.
        pixel_size: Pixel size in Å; without it the one the model was fitted on.
        threads: Threads of the computation; without it as many as cores were granted.

    Examples:
        # on the grid of the particles
        emsplat voxelize run/run_half1.ply -o half1.mrc
        # on finer voxels
        emsplat voxelize run/run_half1.ply -o fine.mrc --box 512 --pixel-size 0.5
        # a map of an atomic model
        emsplat voxelize model.cif -o model.mrc --box 256 --pixel-size 1.1
    """
    from emsplat.imaging.project import voxelize as run
    from emsplat.io.files import require_another
    from emsplat.io.gaussians import read_gaussians
    from emsplat.io.mrc import write_map
    from emsplat.types import Grid

    require_another(output, model)
    given = None if box is None or pixel_size is None else Grid(box, pixel_size)
    if (box is not None and box < 2) or (pixel_size is not None and not pixel_size > 0):
        raise InputError(f"--box {box} --pixel-size {pixel_size}: expected at least 2 pixels of a size above 0")
    gaussians, fitted = read_gaussians(model, given)
    size, spacing = box or fitted.size, pixel_size or fitted.pixel_size
    with with_threads(threads):
        write_map(output, run(gaussians, Grid(size, spacing)), spacing)
    print(f"map: {output} ({size}³ voxels of {spacing:g} Å)")


def report(run: Path, /) -> None:
    """Draw the figures and the page of a run folder again.

    Args:
        run: Run folder.

    Examples:
        # of any run
        emsplat report run
        # of a null test
        emsplat report null
        # of an interrupted run: what there is
        emsplat report reconstruct_001
    """
    from emsplat.report import write_report

    print(f"report: {write_report(run, processes=granted_cores().cores)}")


def slurm(
    command: Literal["reconstruct", "backproject", "refine", "abinitio", "heterogeneity"],
    words: str,
    /,
    config: SlurmConfig = SlurmConfig(),  # noqa: B008 (frozen)
) -> None:
    """Print a batch script for Slurm that runs a command, with the time, memory and cores that it is estimated to need.

    The options of the job stand before the command, those of the command after it. A job that is submitted again goes
    on where it was stopped.

    Args:
        command: Command that the job runs.
        words: What follows it, as on the command line; -o names the run folder.

    Examples:
        # on one machine with 16 cores
        emsplat slurm --threads 16 reconstruct particles.star -o run --symmetry D2 > job.sh
        # two machines with four GPUs each
        emsplat slurm --nodes 2 --processes 4 --gpu reconstruct particles.star -o run > job.sh
        # parts of the particles as jobs of their own, whose sums are added
        emsplat slurm --parts 20 reconstruct particles.star -o run > job.sh
    """
    from emsplat.commandline.parse import parse
    from emsplat.config import configure, names
    from emsplat.programs.slurm import script

    kinds: dict[str, tuple[Any, Callable[..., Any]]] = {
        "reconstruct": (ReconstructConfig, reconstruct),
        "backproject": (BackprojectConfig, backproject),
        "refine": (RefineConfig, refine),
        "abinitio": (AbinitioConfig, abinitio),
        "heterogeneity": (HeterogeneityConfig, heterogeneity),
    }
    kind, function = kinds[command]
    own = shlex.split(words)
    (particles,), given = parse(command_of(function, f"emsplat {command}"), own)
    output = given.pop("output", None)
    if output is None:
        raise InputError(
            f"slurm {command}: give the run folder with -o, so that the job can go on when it is submitted again"
        )
    chosen: Any = configure(kind, **{name: value for name, value in given.items() if name in set(names(kind))})
    print(script(command, own, particles, output, chosen, config), end="")


def view(
    folder: Path = Path(),
    /,
    port: Annotated[int, "PORT"] | None = None,
    host: Annotated[str, "ADDRESS"] = "127.0.0.1",
) -> None:
    """Show the runs below a folder in a browser while they work: progress, resolution, curves, slices, logs, reports,
    two runs side by side.

    The page is for this machine alone, and for who has the address that is printed; it reads, and writes nothing.
    From another machine it is reached through an ssh tunnel, whose command is printed too.

    Args:
        folder: Folder with runs in it or below it.
        port: Port to listen on; without it 8765, or the next that is free.
        host: Address of this machine to listen on. One that is not local lets others read every run below the folder,
            if they have the address with its token.

    Examples:
        # the runs below the folder that one is in
        emsplat view
        # of a project
        emsplat view /data/project/emsplat
        # on a port that a tunnel is set up for
        emsplat view --port 9000
    """
    from emsplat.viewer.serving import serve

    serve(folder, port, host, lambda text: print(text, flush=True))


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script with which a shell completes commands, options and their values.

    Args:
        shell: bash, zsh or fish.

    Examples:
        # bash, for all that are opened from now on (needs the package bash-completion)
        emsplat completion bash > ~/.local/share/bash-completion/completions/emsplat
        # zsh: a folder of $fpath
        emsplat completion zsh > ~/.zfunc/_emsplat
        # fish
        emsplat completion fish > ~/.config/fish/completions/emsplat.fish
    """
    from emsplat.commandline.completion import script

    print(script(shell, commands()))


@contextmanager
def _together(config: Any) -> Iterator[tuple[Log, World]]:
    """The processes that torchrun has started, which have to be of one kind, and the log of this one: others than the
    first are silent.

    Raises:
        InputError: through `parallel.joined`.
    """
    from emsplat.parallel import joined, started_together
    from emsplat.run.folder import OWN_OF_PROCESS, plain

    facts = {}
    if started_together():
        import torch

        facts = {"version of emsplat": __version__, "version of PyTorch": torch.__version__}
        facts |= {
            f"--{key.replace('_', '-')}": str(value)
            for key, value in plain(config).items()
            if key not in OWN_OF_PROCESS
        }
    with joined(facts) as world:
        yield Log(began=started(), silent=not world.first), world


@contextmanager
def _folder(output: Path | None, name: str, again: str = "", world: World | None = None) -> Iterator[Path]:
    """The folder that results go to: the one that was named, or here a new one under the next free number, which goes
    again where nothing was written into it. ``again``: an option that means an earlier folder. Of several processes the
    first finds it.

    Raises:
        InputError: no folder is named, but an earlier one is meant.
        OutputError: a folder cannot be made here.
    """
    if output is not None:
        yield output
        return
    if world is not None and not world.first:
        yield Path(world.told(""))
        return
    taken = {int(path.name.rpartition("_")[2]): path for path in Path().glob(f"{name}_*[0-9]") if _is_numbered(path)}
    if again:
        newest = f"; the newest here is -o {taken[max(taken)]}" if taken else ""
        raise InputError(f"--{again}: say of which run, with -o FOLDER{newest}")
    number = max(taken, default=0)
    while True:
        number += 1
        folder = Path(f"{name}_{number:03d}")
        try:
            folder.mkdir()  # at once, so that no other process takes the number
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another with -o") from error
    print(f"output: {folder} (new; -o names another)", flush=True)
    if world is not None:
        world.told(str(folder))
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _is_numbered(path: Path) -> bool:
    return path.name.rpartition("_")[2].isdecimal()


def _again(run: RunOptions) -> str:
    """The option that means the folder of an earlier run."""
    return "resume" if run.resume else "overwrite" if run.overwrite else ""


def _log() -> Log:
    """Times that a command prints count from its own start: Python and the imports take seconds too."""
    return Log(began=started())


_COMMANDS: dict[str, tuple[Any, ...]] = {
    "Reconstruct": (abinitio, reconstruct, backproject, refine, heterogeneity),
    "Look at the input": (check, convert, preprocess, simulate),
    "Look at the result": (
        *(view, report, assess, postprocess, nulltest, states, score_states, fsc, compare_poses, voxelize),
    ),
    "Cluster and shell": (slurm, completion),
}
# Long runs: over processes where `torchrun` starts them, and what `slurm` writes scripts for.
_SHARED = ("reconstruct", "backproject", "refine", "heterogeneity", "abinitio")
_ABOUT = "Cryo-EM reconstruction with mixtures of 3D Gaussians."
_FOOTER = (
    "`emsplat COMMAND --help` lists the options of a command, with examples; `emsplat --version` tells the version.",
    "New here? `emsplat check particles.star` says what is understood of a particle file.",
)


def commands() -> dict[str, Command]:
    """Every command of `emsplat` by its name."""
    return {_name(run): command_of(run, f"emsplat {_name(run)}") for group in _COMMANDS.values() for run in group}


def job_words(words: list[str]) -> list[str]:
    """The words of a job with those of its command, which stand after it, as one."""
    at = next(place for place, word in enumerate(words) if word in _SHARED)
    return [*words[: at + 1], "--", shlex.join(words[at + 1 :])]


def _is_one_of_many() -> bool:
    """Whether torchrun has started several processes (`parallel.started_together`, which loads torch)."""
    return "MASTER_ADDR" in os.environ and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _name(run: Any) -> str:
    """What a command is called."""
    return str(run.__name__).replace("_", "-")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit code is 0, 1 for a failed null test, a wrong symmetry or a check that asks for a look, 2
    for input or output that cannot be used, 128 and the number of the signal for a run that was interrupted.

    Streams, signals and environment of the process are left as they are: the program is `emsplat.__main__`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(words)
    except EmsplatError as error:
        if _is_one_of_many() and os.environ.get("RANK") != "0":  # what all say, the first says
            return error.exit_code
        print(f"emsplat: {error}", file=sys.stderr)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _run(words: list[str]) -> Any:
    runs = {_name(run): run for group in _COMMANDS.values() for run in group}
    match words:
        case ["--version" | "-V", *_]:
            print(f"emsplat {__version__}")
        case [] | ["-h" | "--help" | "help"]:
            all_of_them = commands()
            groups = {title: {_name(run): all_of_them[_name(run)] for run in _COMMANDS[title]} for title in _COMMANDS}
            print(program_help(_ABOUT, groups, _FOOTER, terminal()))
            return 0 if words else 2
        case ["help", name, *_] if name in runs:
            return call(command_of(runs[name], f"emsplat {name}"), ["--help"])
        case ["slurm", *rest] if "--help" not in rest[:1] and set(rest) & set(_SHARED):
            return call(command_of(slurm, "emsplat slurm"), job_words(rest))
        case [name, *_] if name in runs and name not in _SHARED and _is_one_of_many():
            raise InputError(f"{name}: is not shared out over processes; start it without torchrun")
        case [name, *rest] if name in runs:
            return call(command_of(runs[name], f"emsplat {name}"), rest)
        case [name, *_]:
            raise InputError(f"{name}: no such command{did_you_mean(name, runs)} (see emsplat --help)")
