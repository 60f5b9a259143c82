"""The command line: options from the dataclasses of `emsplat.config`, errors as one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from emsplat import __version__
from emsplat.config import InputConfig, ReconstructConfig, SimulateConfig
from emsplat.errors import EmsplatError, InputError

_Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


def reconstruct(
    particles: tyro.conf.Positional[Path],
    output: _Output,
    config: tyro.conf.OmitArgPrefixes[ReconstructConfig] = ReconstructConfig(),  # noqa: B008 (frozen)
) -> None:
    """Reconstruct a density map and two half maps from particles with known poses.

    Args:
        particles: RELION STAR file (3.0 or newer).
        output: Run folder.
    """
    from emsplat.reconstruct import reconstruct as run

    run(config, particles, output)


def backproject(
    particles: tyro.conf.Positional[Path],
    output: _Output,
    config: tyro.conf.OmitArgPrefixes[InputConfig] = InputConfig(),  # noqa: B008 (frozen)
) -> None:
    """Classical half maps and a full map, regularised by their signal-to-noise ratio, in one pass.

    Args:
        particles: RELION STAR file (3.0 or newer).
        output: Run folder.
    """
    from emsplat.reconstruct import backproject as run

    run(config, particles, output)


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
    from emsplat.simulate import simulate as run

    print(f"particles: {run(config, model, output)}")


def fsc(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    mask: Path | None = None,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Fourier shell correlation of two maps (RELION's shells and first crossing).

    Args:
        a: MRC map.
        b: MRC map of the same box and pixel size.
        mask: MRC map of the same box, values from 0 to 1, that both maps are multiplied with.
        output: Write the curve to this STAR file as well.
    """
    from emsplat.assess.fsc import common_grid, crossing, fsc_curve, resolution
    from emsplat.io.mrc import read_map
    from emsplat.io.relion import write_fsc_star

    paths = [a, b] + ([mask] if mask else [])
    maps = {str(path): read_map(path) for path in paths}
    grid = common_grid({name: grid for name, (_, grid) in maps.items()})
    volumes = [maps[str(path)][0] for path in paths]
    curve = fsc_curve(volumes[0], volumes[1], grid, volumes[2] if mask else None)
    print("shell  resolution (Å)  FSC")
    for shell, value in enumerate(curve.value.tolist()):
        print(f"{shell:5d}  {grid.length / shell if shell else 999:14.3f}  {value:.4f}")
    print(f"mean over shells 1 to {grid.size // 2}: {float(curve.value[1:].mean()):.4f}")
    for threshold in (0.143, 0.5):
        spacing, between = resolution(curve, threshold), crossing(curve, threshold)
        print(
            f"FSC {threshold}: "
            + ("never reached" if spacing is None else f"{spacing:.2f} Å (last shell before the first drop)")
            + ("" if between is None else f", {between:.2f} Å (interpolated)")
        )
    if output:
        column = "rlnFourierShellCorrelation" + ("MaskedMaps" if mask else "UnmaskedMaps")
        write_fsc_star(
            output,
            {},
            {
                "rlnSpectralIndex": list(range(len(curve.value))),
                "rlnResolution": curve.frequency.tolist(),
                column: curve.value.tolist(),
            },
        )


def voxelize(
    model: tyro.conf.Positional[Path],
    output: _Output,
    box: int | None = None,
    pixel_size: float | None = None,
) -> None:
    """Turn Gaussians into a density map.

    Args:
        model: PLY file of emsplat.
        output: MRC map to write.
        box: Box size in pixels; default: the one the model was fitted on.
        pixel_size: Pixel size in Å; default: the one the model was fitted on.
    """
    from emsplat.io.mrc import write_map
    from emsplat.io.ply import read_ply
    from emsplat.project import voxelize as run
    from emsplat.types import Grid

    gaussians, fitted = read_ply(model)
    if fitted is None and (box is None or pixel_size is None):
        raise InputError(f"{model}: does not say its box and pixel size; give --box and --pixel-size")
    size = box or (fitted.size if fitted else 0)
    spacing = pixel_size or (fitted.pixel_size if fitted else 0.0)
    if size < 2 or not spacing > 0:
        raise InputError(f"--box {size} --pixel-size {spacing}: expected at least 2 pixels of a size above 0")
    write_map(output, run(gaussians, Grid(size, spacing)), spacing)
    print(f"map: {output} ({size}³ voxels of {spacing:g} Å)")


def report(run: tyro.conf.Positional[Path]) -> None:
    """Draw the figures and the page of a run folder again.

    Args:
        run: Run folder.
    """
    from emsplat.report import write_report

    print(f"report: {write_report(run)}")


_COMMANDS: dict[str, Any] = {
    "reconstruct": reconstruct,
    "backproject": backproject,
    "simulate": simulate,
    "fsc": fsc,
    "voxelize": voxelize,
    "report": report,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit code is 0, 2 for input or output that cannot be used, 130 when interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    if words == ["--version"]:
        print(f"emsplat {__version__}")
        return 0
    try:
        tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="emsplat",
            description="Cryo-EM reconstruction with mixtures of 3D Gaussians.",
            args=words,
        )
    except EmsplatError as error:
        print(f"emsplat: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("emsplat: interrupted", file=sys.stderr)
        return 130
    return 0
