"""The results of a run once more under the names that other programs give them, in a folder for each program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from emsplat.errors import InputError
from emsplat.io.cryodrgn import write_pickles
from emsplat.io.cryosparc import write_cs
from emsplat.io.files import replacing
from emsplat.io.table import ParticleTable
from emsplat.run.files import FSC, FULL_MAP, HALF_MAPS, MASK, SHARPENED
from emsplat.run.fsc_star import read_fsc_star
from emsplat.run.log import Log

_MAPS = {
    "cryosparc": {
        FULL_MAP: "{run}_volume_map.mrc",
        HALF_MAPS[0]: "{run}_volume_map_half_A.mrc",
        HALF_MAPS[1]: "{run}_volume_map_half_B.mrc",
        SHARPENED: "{run}_volume_map_sharp.mrc",
        MASK: "{run}_volume_mask_fsc.mrc",
    },
    "cryodrgn": {
        FULL_MAP: "backproject.mrc",
        HALF_MAPS[0]: "half_map_a.mrc",
        HALF_MAPS[1]: "half_map_b.mrc",
        MASK: MASK,
    },
}
_CURVES = {"no_mask": "unmasked", "mask": "masked", "mask_corrected": "corrected"}


def link_results(run: Path) -> None:
    """Brings the maps and curves in the folders of other programs' names up to date, those that the run has.

    Files are the same on disk where the file system can, else copies.

    Raises:
        OutputError: they cannot be written.
    """
    for program, names in _MAPS.items():
        folder = run / program
        if not folder.is_dir():
            continue
        for ours, theirs in names.items():
            if (run / ours).is_file():
                with replacing(folder / theirs.format(run=run.absolute().name)) as temporary:
                    try:
                        os.link(run / ours, temporary)
                    except OSError:
                        shutil.copyfile(run / ours, temporary)
        if program == "cryodrgn" and (run / FSC).is_file():
            _write_fsc(run / FSC, folder / "fsc-vals.txt")


def name_results(run: Path, program: str, table: ParticleTable, log: Log) -> None:
    """Makes the folder for a program: maps, and the particles of ``table`` in its format where that can say them.

    Raises:
        OutputError: they cannot be written.
    """
    folder = run / program
    folder.mkdir(exist_ok=True)
    try:
        if program == "cryosparc":
            write_cs(folder / f"{run.absolute().name}_particles.cs", table, table.half)
        else:
            write_pickles(folder / "poses.pkl", folder / "ctf.pkl", table)
    except InputError as error:
        log.warn(f"{folder}: no particles there; {error}")
    link_results(run)
    log.line(f"  under {program}'s names: {folder}")


def _write_fsc(star: Path, target: Path) -> None:
    """cryoDRGN's table: frequency in 1/pixel and a column for each mask."""
    known = read_fsc_star(star)
    curves = {theirs: known[name].value for theirs, name in _CURVES.items() if name in known}
    shells = len(known.frequency)
    rows = np.column_stack([np.arange(shells) / (2 * (shells - 1)), *curves.values()])
    with replacing(target) as temporary:
        np.savetxt(temporary, rows, fmt="%.6f", header=" ".join(["pixres", *curves]), comments="")
