"""The command line: options from the dataclasses of `emsplat.config`, errors as one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from emsplat import __version__
from emsplat.config import (
    AssessConfig,
    CheckConfig,
    ConvertConfig,
    InputConfig,
    NullTestConfig,
    PostprocessConfig,
    PreprocessConfig,
    ReconstructConfig,
    SimulateConfig,
)
from emsplat.errors import EmsplatError, InputError
from emsplat.process import started
from emsplat.run.files import REPORT
from emsplat.run.log import Log

_SAME = 1e-6  # by which an FSC may fall short of 1 by rounding
_Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


def reconstruct(
    particles: tyro.conf.Positional[Path],
    output: _Output,
    config: tyro.conf.OmitArgPrefixes[ReconstructConfig] = ReconstructConfig(),  # noqa: B008 (frozen)
) -> int:
    """Reconstruct a density map and two half maps from particles with known poses.

    Exit code 1 if the particles do not have the symmetry that is asked for (0 with --force).

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Run folder.
    """
    from emsplat.programs.finish import exit_code
    from emsplat.programs.reconstruct import reconstruct as run

    return exit_code(run(config, particles, output, _log()))


def backproject(
    particles: tyro.conf.Positional[Path],
    output: _Output,
    config: tyro.conf.OmitArgPrefixes[InputConfig] = InputConfig(),  # noqa: B008 (frozen)
) -> int:
    """Classical half maps and a full map, regularised by their signal-to-noise ratio, in one pass.

    Exit code 1 if the particles do not have the symmetry that is asked for (0 with --force).

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Run folder.
    """
    from emsplat.programs.finish import exit_code
    from emsplat.programs.reconstruct import backproject as run

    return exit_code(run(config, particles, output, _log()))


def simulate(
    model: tyro.conf.Positional[Path | None] = None,
    *,
    output: _Output,
    config: tyro.conf.OmitArgPrefixes[SimulateConfig] = SimulateConfig(),  # noqa: B008 (frozen)
) -> None:
    """Simulate a particle stack from an atomic model, or from a procedural protein where none is given.

    Args:
        model: mmCIF or PDB file (may be gzipped).
        output: Folder for particles.mrcs, particles.star and truth.mrc.
    """
    from emsplat.io.paths import say_start
    from emsplat.programs.simulate import simulate as run

    star = run(config, model, output)
    print(f"particles: {star}")
    print(f"  {say_start(star, output / 'particles.mrcs')}")


def check(
    particles: tyro.conf.Positional[Path],
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    json: bool = False,
    config: tyro.conf.OmitArgPrefixes[CheckConfig] = CheckConfig(),  # noqa: B008 (frozen)
) -> int:
    """Say what is understood of a particle set, with a verdict for each item: ok, look or wrong.

    Exit code 0 if all is ok, 1 if something asks for a look, 2 if something is wrong.

    Args:
        particles: Particles, as for `emsplat reconstruct`.
        output: Folder for report.html, slices.png and directions.png of a quick back-projection, and check.json.
        json: Print the result as one JSON object.
    """
    from emsplat.io.files import json_text
    from emsplat.programs.check import check as work
    from emsplat.programs.check import describe, exit_code

    result = work(config, particles, output)
    print(json_text(result) if json else describe(result))
    if output is not None and not json:
        print(f"report: {output / REPORT}")
    return exit_code(result)


def convert(
    particles: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
    config: tyro.conf.OmitArgPrefixes[ConvertConfig] = ConvertConfig(),  # noqa: B008 (frozen)
) -> None:
    """Convert particle metadata between RELION (.star), cryoSPARC (.cs) and cryoDRGN (.pkl), or Gaussians between .ply
    and pseudo-atoms (.cif, .pdb). Images stay as they are.

    Args:
        particles: Particles, as for `emsplat reconstruct`, or Gaussians or an atomic model.
        output: File to write, by its ending. For cryoDRGN poses.pkl, beside which ctf.pkl is written.
    """
    from emsplat.programs.convert import convert as run

    files = run(config, particles, output, say=print)
    print(f"written: {' and '.join(map(str, files))}")


def preprocess(
    particles: tyro.conf.Positional[Path],
    output: _Output,
    config: tyro.conf.OmitArgPrefixes[PreprocessConfig] = PreprocessConfig(),  # noqa: B008 (frozen)
) -> None:
    """Write a new particle stack: another box or pixel size, normalised, inverted, recentred; all metadata stay.

    Args:
        particles: Particles, as for `emsplat reconstruct`.
        output: Folder for particles.mrcs and particles.star.
    """
    from emsplat.programs.preprocess import preprocess as run

    run(config, particles, output, _log())


def assess(
    run: tyro.conf.Positional[Path],
    config: tyro.conf.OmitArgPrefixes[AssessConfig] = AssessConfig(),  # noqa: B008 (frozen)
) -> None:
    """Measure the maps of a run folder again: FSC, local resolution, resolution by direction; write the report.

    Args:
        run: Run folder of `emsplat reconstruct` or `emsplat backproject`.
    """
    from emsplat.programs.assess import reassess as work

    work(run, config, _log())


def nulltest(
    particles: tyro.conf.Positional[Path],
    output: _Output,
    config: tyro.conf.OmitArgPrefixes[NullTestConfig] = NullTestConfig(),  # noqa: B008 (frozen)
) -> int:
    """Reconstruct noise, random phases and shuffled poses, and see whether the resolution stays silent.

    Exit code 1 if it does not.

    Args:
        particles: RELION STAR file (3.0 or newer), cryoSPARC .cs file, or image stack with --poses and --ctf.
        output: Folder for the tests and their table.
    """
    from emsplat.programs.nulltest import null_test

    return 0 if null_test(config, particles, output, _log()) else 1


def postprocess(
    run: tyro.conf.Positional[Path],
    config: tyro.conf.OmitArgPrefixes[PostprocessConfig] = PostprocessConfig(),  # noqa: B008 (frozen)
) -> None:
    """Weight and sharpen the average of the half maps; write postprocess.mrc, postprocess.star and EMDB's FSC.

    Args:
        run: Run folder of `emsplat reconstruct` or `emsplat backproject`.
    """
    from emsplat.programs.postprocess import postprocess as work

    work(run, config, _log())


def fsc(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    mask: Path | None = None,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Fourier shell correlation of two maps: RELION's shells and first crossing, and cryoDRGN's beside them.

    With a mask also that of maps with random phases, and the curve corrected by it: these mean something for two half
    maps, not for a map and its model.

    Args:
        a: MRC map, or an atomic model or Gaussians (.cif, .pdb, .ply) where b is a map.
        b: MRC map of the same box and pixel size, or an atomic model or Gaussians that lie in map a.
        mask: MRC map of the same box, values from 0 to 1, that both maps are multiplied with.
        output: Write the curves to this STAR file as well.
    """
    import torch

    from emsplat.assessment.curves import half_map_curves
    from emsplat.assessment.maps import are_opposite, read_mask, read_pair, say_opposite
    from emsplat.measures.curves import Curves, crossing, last_crossing, never_falls, resolution
    from emsplat.measures.fsc import fsc_curve
    from emsplat.report.verdict import LIMIT, is_nyquist, spacing
    from emsplat.run.fsc_star import write_fsc_star
    from emsplat.run.log import Log

    log = Log()
    first, second, grid, origin = read_pair(a, b, log)
    soft = None if mask is None else read_mask(mask, grid, log, origin)
    plain = fsc_curve(first, second, grid)
    if torch.equal(first, second) or float(plain.value[1:].min()) > 1 - _SAME:
        log.warn(f"{a} and {b} are the same map, but for a factor: the FSC of a map with itself says nothing")
    if are_opposite(plain):
        log.warn(say_opposite(str(a), str(b)))
    curves = Curves(plain.frequency.numpy(), {}).joined(unmasked=plain.value)
    if soft is not None:
        known = half_map_curves((first, second), grid, soft).values
        curves = curves.joined(**{name: known[name] for name in ("masked", "corrected", "random_phases")})
    print("shell  resolution (Å)  " + "  ".join(f"{name.replace('_', ' '):>13}" for name in curves.values))
    for shell, frequency in enumerate(curves.frequency.tolist()):
        values = "  ".join(f"{float(value[shell]):13.4f}" for value in curves.values.values())
        print(f"{shell:5d}  {1 / frequency if shell else 999:14.3f}  {values}")
    finest = 1 / float(curves.frequency[-1])
    at_limit = f"{spacing(finest, finest)}, {LIMIT}"
    label = "masked" if "masked" in curves else "unmasked"
    print(f"mean over shells 1 to {grid.size // 2}, {label}: {float(curves[label].value[1:].mean()):.4f}")
    for label in [name for name in curves.values if name != "random_phases"]:
        for threshold in (0.143, 0.5):
            found, between = resolution(curves[label], threshold), crossing(curves[label], threshold)
            if never_falls(curves[label], threshold):
                print(f"FSC {threshold} {label}: {at_limit}: the curve never falls to {threshold}")
                continue
            print(
                f"FSC {threshold} {label}: "
                + ("never reached" if found is None else f"{found:.2f} Å (RELION's rule: last shell before the drop)")
                + ("" if between is None else f", {between:.2f} Å (interpolated)")
            )
    found = last_crossing(fsc_curve(first, second, grid, soft, "cryodrgn"), 0.143)
    text = "never reached" if found is None else at_limit if is_nyquist(found, finest) else spacing(found)
    print(f"FSC 0.143 by cryoDRGN's rule (other shells, last crossing; not comparable): {text}")
    if output:
        write_fsc_star(output, {}, curves)


def voxelize(
    model: tyro.conf.Positional[Path],
    output: _Output,
    box: int | None = None,
    pixel_size: float | None = None,
) -> None:
    """Turn Gaussians into a density map.

    Args:
        model: Gaussians of emsplat (.ply, .cif, .pdb), or an atomic model (.cif, .pdb) in a map of this box and pixel
            size with MRC origin 0.
        output: MRC map to write.
        box: Box size in pixels; default: the one the model was fitted on.
        pixel_size: Pixel size in Å; default: the one the model was fitted on.
    """
    from emsplat.imaging.project import voxelize as run
    from emsplat.io.gaussians import read_gaussians
    from emsplat.io.mrc import write_map
    from emsplat.types import Grid

    given = None if box is None or pixel_size is None else Grid(box, pixel_size)
    if (box is not None and box < 2) or (pixel_size is not None and not pixel_size > 0):
        raise InputError(f"--box {box} --pixel-size {pixel_size}: expected at least 2 pixels of a size above 0")
    gaussians, fitted = read_gaussians(model, given)
    size, spacing = box or fitted.size, pixel_size or fitted.pixel_size
    write_map(output, run(gaussians, Grid(size, spacing)), spacing)
    print(f"map: {output} ({size}³ voxels of {spacing:g} Å)")


def report(run: tyro.conf.Positional[Path]) -> None:
    """Draw the figures and the page of a run folder again.

    Args:
        run: Run folder.
    """
    from emsplat.report import write_report

    print(f"report: {write_report(run)}")


def _log() -> Log:
    """Times that a command prints count from its own start: Python and the imports take seconds too."""
    return Log(began=started())


_COMMANDS: dict[str, Any] = {
    "reconstruct": reconstruct,
    "backproject": backproject,
    "check": check,
    "convert": convert,
    "preprocess": preprocess,
    "assess": assess,
    "postprocess": postprocess,
    "nulltest": nulltest,
    "simulate": simulate,
    "fsc": fsc,
    "voxelize": voxelize,
    "report": report,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit code is 0, 1 for a failed null test, a wrong symmetry or a check that asks for a look, 2
    for input or output that cannot be used, 128 and the number of the signal for a run that was interrupted.

    Streams, signals and environment of the process are left as they are: the program is `emsplat.__main__`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words == ["--version"]:
        print(f"emsplat {__version__}")
        return 0
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="emsplat",
            description="Cryo-EM reconstruction with mixtures of 3D Gaussians.",
            args=words,
        )
    except EmsplatError as error:
        print(f"emsplat: {error}", file=sys.stderr)
        return error.exit_code
    return code if isinstance(code, int) else 0
