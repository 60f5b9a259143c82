"""RELION's STAR files, 3.0 and 3.1 or newer, in: what the tables of `star` mean."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from emsplat.errors import InputError
from emsplat.imaging.ctf import beam_tilt
from emsplat.io.mrc_arrays import count_sections
from emsplat.io.paths import Stacks, find_stacks, group_equal
from emsplat.io.star import StarFile, Table, read_star_file
from emsplat.io.table import OpticsGroup, ParticleTable, doubts, refuse_impossible
from emsplat.maths.geometry import euler_to_matrix
from emsplat.types import PHASE_FLIPPED, PREMULTIPLIED, Aberrations, Optics, Poses

_PIXEL_SIZES = ("ImagePixelSize", "MicrographPixelSize", "MicrographOriginalPixelSize")
# Where a column is in neither table, RELION takes a value of its own, and so is done here, with a word.
_ASSUMED = {
    "AmplitudeContrast": "0 is used, as RELION does; 0.07 to 0.1 is usual, add the column",
    "DefocusV": "rlnDefocusU is used in its place: no astigmatism",
}
_CORRECTED = "CtfDataAreCtfCorrected"
TREATMENTS = {"CtfDataArePhaseFlipped": PHASE_FLIPPED, "CtfDataAreCtfPremultiplied": PREMULTIPLIED}
CONTRAST = "emsplatContrast"  # -1 where protein is dark in the images, for which RELION has no column
MAGNIFICATION = ("MagMat00", "MagMat01", "MagMat10", "MagMat11")
# What a `ParticleTable` carries from one format to another.
CARRIED = {
    *("ImageName", "MicrographName", "OpticsGroup", "OpticsGroupName", "ClassNumber", "RandomSubset"),
    *("Voltage", "SphericalAberration", "AmplitudeContrast", "PhaseShift", "CtfBfactor", "CtfScalefactor"),
    *("DefocusU", "DefocusV", "DefocusAngle", "AngleRot", "AngleTilt", "AnglePsi"),
    *("OriginX", "OriginY", "OriginXAngst", "OriginYAngst", "Magnification", "DetectorPixelSize", "ImageSize"),
    *("BeamTiltX", "BeamTiltY", "OddZernike", "EvenZernike", *MAGNIFICATION, *TREATMENTS, _CORRECTED),
    *("ImagePixelSize", "MicrographOriginalPixelSize", "ImageDimensionality"),
}
_LARGEST = float(np.finfo(np.float32).max)  # batches are float32
_INDEX_DIGITS = 9
_LARGEST_TILT = 100.0  # mrad
_TOMOGRAPHY = ("CoordinateZ", "CenteredCoordinateZAngst", "CtfImage")  # and all that begin with Tomo
_ZERNIKES = 64  # at most, of each kind; RELION fits 6 odd and 9 even ones


@dataclass(frozen=True)
class Block:
    """One table of a STAR file; columns are named without their ``_rln``."""

    table: Table

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def name(self) -> str:
        return self.table.name

    def has(self, column: str) -> bool:
        return self.table.has(f"_rln{column}")

    @property
    def columns(self) -> list[str]:
        """The names of all columns, without their ``_rln``."""
        return [tag.removeprefix("_rln") for tag in self.table.tags if tag.startswith("_rln")]

    def _needs(self, column: str) -> str:
        """The name of a column in the file, which has it and rows."""
        if not self.has(column):
            raise InputError(f"{self.path}: the table data_{self.name} has no column rln{column}; {_remedy(column)}")
        if not len(self.table):
            raise InputError(f"{self.path}: the table data_{self.name} has no rows; expected at least one")
        return f"_rln{column}"

    def text(self, column: str) -> list[str]:
        return self.table.text(self._needs(column))

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A numeric column; every value is finite."""
        tag = self._needs(column)
        values = self.table.numbers(tag)
        bad = np.flatnonzero(~(np.abs(values) <= _LARGEST))
        if len(bad):
            text = self.table.word(tag, int(bad[0]))
            expected = "decimal points, not commas" if "," in text and not text.startswith("[") else "a finite number"
            raise InputError(
                f'{self.path}, row {bad[0] + 1} of data_{self.name}: rln{column} is "{text}"{_more(len(bad))}; '
                f"expected {expected}, repair the file or leave the row out"
            )
        return values

    def integers(self, column: str) -> NDArray[np.int64]:
        values = self.numbers(column)
        bad = np.flatnonzero((values != np.rint(values)) | (np.abs(values) >= 10**_INDEX_DIGITS))
        if len(bad):
            raise InputError(
                f"{self.path}, row {bad[0] + 1} of data_{self.name}: rln{column} is {values[bad[0]]:g}; "
                f"expected a whole number of at most {_INDEX_DIGITS} digits"
            )
        return values.astype(np.int64)


def _number(text: str) -> float:
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _more(count: int) -> str:
    return f" (and {count - 1} more rows)" if count > 1 else ""


def _remedy(column: str) -> str:
    if column.startswith("Angle"):
        return (
            "emsplat needs particles with known orientations, take the STAR file of a refinement, or find them with "
            "`emsplat abinitio`"
        )
    if column.startswith(("Defocus", "Voltage", "Spherical")):
        return "emsplat needs CTF parameters, take the STAR file of a job that came after CTF estimation"
    if column in ("DetectorPixelSize", "Magnification"):
        return "without data_optics the pixel size follows from these two, or from rlnImagePixelSize; add one"
    return "take the STAR file of a refinement"


def find_tables(file: StarFile) -> tuple[Block, Block | None]:
    """The particles and, from RELION 3.1 on, the optics groups."""
    optics = file.table("optics")
    found = [table for table in file.tables("_rlnImageName") if table.has("_rlnImageName") and table.name != "optics"]
    _refuse_tomography([*(found or file.tables("_rln")), *([] if optics is None else [optics])])
    if not found:
        raise InputError(f"{file.path}: no table has a column rlnImageName; expected a STAR file of particles")
    if len(found) > 1:
        names = " and ".join(f"data_{table.name}" for table in found[:2])
        raise InputError(
            f"{file.path}: {names} both have a column rlnImageName; expected one table of particles, give files one by "
            "one with --merge"
        )
    return Block(found[0]), None if optics is None else Block(optics)


def _refuse_tomography(tables: Sequence[Table]) -> None:
    for block in map(Block, tables):
        found = next((name for name in block.columns if name in _TOMOGRAPHY or name.startswith("Tomo")), None)
        if block.has("ImageDimensionality") and (block.table.numbers("_rlnImageDimensionality") == 3).any():
            found = "ImageDimensionality 3"
        if found is not None:
            raise InputError(
                f"{block.path}: data_{block.name} has rln{found}, as tomography has it; tilt series and subtomograms "
                "are not read, expected single particles: one image and one orientation in each row"
            )


def read_rotations(path: Path) -> Float[Tensor, "p 3 3"]:
    """Orientations of the particles of a STAR file alone, float64; images need not exist.

    Raises:
        InputError: unreadable file, missing column, a value that is no finite number.
    """
    particles, _ = find_tables(read_star_file(path))
    angles = [torch.from_numpy(particles.numbers(f"Angle{name}")) for name in ("Rot", "Tilt", "Psi")]
    return euler_to_matrix(torch.deg2rad(torch.stack(angles, 1)))


def read_star(
    path: Path, datadir: Path | None = None, *, need_stacks: bool = True, need_poses: bool = True
) -> ParticleTable:
    """Particles of a STAR file in house units; angles, CTF and origins as in docs/conventions.md.

    A CTF value is taken from the particle table first, from the optics table second; what is assumed where both lack it
    is said in ``warnings`` (docs/conventions.md, 12). Stacks are found by the rule of `emsplat.io.paths`; without
    ``need_stacks`` they may be missing; without ``need_poses`` angles may, and are 0 then.

    Raises:
        InputError: unreadable file, missing column or stack, a value that is no finite number, an optics group that
            is not in the optics table or not named where there are several, astigmatism without an angle, an origin of
            one axis alone, images that were corrected for their CTF, an image name that does not say which image of a
            stack, tilt series and subtomograms.
    """
    particles, optics = find_tables(read_star_file(path))
    row_of_group, groups, group = _optics_groups(particles, optics)
    columns = _Columns(particles, optics, row_of_group[group])
    ctf_values = _optics(columns)
    pixel_size = np.array([g.pixel_size for g in groups])[group]
    angles = _angles(columns, need_poses)
    shift, shift_notes = _origins(particles, optics, pixel_size)
    found, image = _images(particles, path, datadir, need_stacks)
    micrographs = particles.text("MicrographName") if particles.has("MicrographName") else []
    coordinates, micrograph_pixel_size = _coordinates(particles, optics, pixel_size, columns.optics_row)
    return ParticleTable(
        sources=(path,),
        source=torch.zeros(len(group), dtype=torch.int64),
        row=torch.arange(len(group)),
        poses=Poses(euler_to_matrix(angles), shift),
        optics=ctf_values,
        groups=groups,
        optics_group=torch.from_numpy(group),
        half=_half_sets(particles),
        micrograph=group_equal(micrographs) if micrographs else found.stack,
        stacks=found.paths,
        stack=found.stack,
        image=image,
        particle_class=torch.from_numpy(particles.integers("ClassNumber")) if particles.has("ClassNumber") else None,
        micrograph_names=tuple(dict.fromkeys(micrographs)),
        origin=_before(particles, found.folders),
        coordinates=coordinates,
        micrograph_pixel_size=micrograph_pixel_size,
        warnings=(*_assumptions(columns), *shift_notes, *doubts(path, ctf_values), *found.notes),
        folders=found.folders,
        sign=_contrast(particles),
    )


@dataclass(frozen=True)
class _Columns:
    """Columns that either table may have: each particle has its own value, or that of its optics group."""

    particles: Block
    optics: Block | None
    optics_row: NDArray[np.int64]  # of each particle

    def has(self, name: str) -> bool:
        return self.particles.has(name) or (self.optics is not None and self.optics.has(name))

    def take(self, name: str, default: float | Tensor | None = None) -> Tensor:
        """One value for each particle, float64.

        Raises:
            InputError: neither table has the column, and there is no default.
        """
        if not self.has(name) and default is not None:
            return torch.as_tensor(default, dtype=torch.float64).expand(len(self.optics_row)).clone()
        if self.particles.has(name) or self.optics is None or not self.optics.has(name):
            return torch.from_numpy(self.particles.numbers(name))
        return torch.from_numpy(self.optics.numbers(name)[self.optics_row])


def _angles(columns: _Columns, needed: bool) -> Float[Tensor, "p 3"]:
    """Angles in rad; 0 where the table lacks some and they are not ``needed``."""
    names = [f"Angle{name}" for name in ("Rot", "Tilt", "Psi")]
    if not needed and not all(columns.has(name) for name in names):
        return torch.zeros(len(columns.optics_row), 3, dtype=torch.float64)
    return torch.stack([torch.deg2rad(columns.take(name)) for name in names], 1)


def _assumptions(columns: _Columns) -> list[str]:
    """What is taken for granted where the tables are silent."""
    path, particles, optics = columns.particles.path, columns.particles, columns.optics
    notes = [*particles.table.notes, *(optics.table.notes if optics is not None else ()), *_pixel_size_note(optics)]
    if not particles.has("MicrographName") and not particles.has("RandomSubset"):
        notes.append(
            f"{path}: no columns rlnRandomSubset and rlnMicrographName; half-sets are drawn per stack, or particle by "
            "particle where there is one stack"
        )
    return notes + [f"{path}: no column rln{name}; {what}" for name, what in _ASSUMED.items() if not columns.has(name)]


def _optics(columns: _Columns) -> Optics:
    """What the CTF of each particle depends on."""
    path, take = columns.particles.path, columns.take
    if take(_CORRECTED, 0.0).any():
        raise InputError(
            f"{path}: rln{_CORRECTED} is set; emsplat needs images that were not corrected for their CTF (flipping "
            "phases or multiplying by it is fine), extract the particles again without it"
        )
    defocus_u = take("DefocusU")
    values = Optics(
        voltage=take("Voltage"),
        cs=take("SphericalAberration"),
        amplitude_contrast=take("AmplitudeContrast", 0.0),
        defocus_u=defocus_u,
        defocus_v=take("DefocusV", defocus_u),
        defocus_angle=torch.deg2rad(take("DefocusAngle", 0.0)),
        phase_shift=torch.deg2rad(take("PhaseShift", 0.0)),
        b_factor=take("CtfBfactor", 0.0),
        scale=take("CtfScalefactor", 1.0),
        treatment=_treatment(columns),
    )
    astigmatism = (values.defocus_u - values.defocus_v).abs()
    if not columns.has("DefocusAngle") and bool((astigmatism > 0).any()):  # no rule would give it
        raise InputError(
            f"{path}: no column rlnDefocusAngle, but rlnDefocusU and rlnDefocusV differ by up to "
            f"{float(astigmatism.max()):.5g} Å; add the angle, or make both the same if there is no astigmatism"
        )
    refuse_impossible(path, values, ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"))
    return replace(values, aberrations=_aberrations(columns, values))


def _origins(particles: Block, optics: Block | None, pixel_size: NDArray[np.float64]) -> tuple[Tensor, list[str]]:
    """Origins (x, y) in Å, from those in Å or else from those in pixels of the images, and what is assumed."""
    unit = next((unit for unit in ("Angst", "") if any(particles.has(f"Origin{axis}{unit}") for axis in "XY")), None)
    if unit is None:
        note = (
            f"{particles.path}: no columns rlnOriginXAngst and rlnOriginYAngst; the particles are taken to be centred"
        )
        return torch.zeros(len(pixel_size), 2, dtype=torch.float64), [note]
    shift = np.stack([particles.numbers(f"Origin{axis}{unit}") for axis in "XY"], 1)
    if unit == "Angst":
        return torch.from_numpy(shift), []
    note = (
        f"{particles.path}: rlnOriginX and rlnOriginY are taken in pixels of the images, up to "
        f"{pixel_size.max():.5g} Å, as RELION 3.0 has them beside no optics table; newer ones write rlnOriginXAngst"
    )
    return torch.from_numpy(shift * pixel_size[:, None]), [] if optics is None else [note]


def _optics_groups(
    particles: Block, optics: Block | None
) -> tuple[NDArray[np.int64], tuple[OpticsGroup, ...], NDArray[np.int64]]:
    """Row of each group in the optics table, the groups, and the group of each particle."""
    count = len(particles.text("ImageName"))
    if optics is None:
        size = _old_pixel_size(particles)
        return np.zeros(1, np.int64), (OpticsGroup("all", size, None),), np.zeros(count, np.int64)
    numbers = optics.integers("OpticsGroup")
    if len(np.unique(numbers)) != len(numbers):
        raise InputError(f"{particles.path}: data_optics names an rlnOpticsGroup twice; number the groups 1, 2, ...")
    if len(numbers) > 1 and not particles.has("OpticsGroup"):
        raise InputError(
            f"{particles.path}: data_{particles.name} has no column rlnOpticsGroup, but data_optics has {len(numbers)} "
            "groups, between which nothing decides; add the column, or leave one group in data_optics"
        )
    asked = particles.integers("OpticsGroup") if particles.has("OpticsGroup") else np.full(count, numbers[0])
    unknown = np.flatnonzero(~np.isin(asked, numbers))
    if len(unknown):
        raise InputError(
            f"{particles.path}, row {unknown[0] + 1} of data_{particles.name}: rlnOpticsGroup {asked[unknown[0]]} is "
            f"not in data_optics, which has {sorted(numbers.tolist())}; repair the optics table"
        )
    names = optics.text("OpticsGroupName") if optics.has("OpticsGroupName") else [str(n) for n in numbers]
    source = next((name for name in _PIXEL_SIZES if optics.has(name)), None)
    if source is None:
        raise InputError(f"{particles.path}: data_optics has no rlnImagePixelSize; add it, in Å")
    pixel_sizes = optics.numbers(source)
    boxes = optics.integers("ImageSize").tolist() if optics.has("ImageSize") else [None] * len(numbers)
    if not pixel_sizes.min() > 0:
        raise InputError(f"{particles.path}: rln{source} in data_optics is {pixel_sizes.min():g}; expected Å above 0")
    column = "MicrographOriginalPixelSize"
    original = optics.numbers(column).tolist() if optics.has(column) else [None] * len(numbers)
    groups = tuple(OpticsGroup(*values) for values in zip(names, pixel_sizes.tolist(), boxes, original, strict=True))
    order = np.argsort(numbers)
    return np.arange(len(numbers)), groups, order[np.searchsorted(numbers, asked, sorter=order)]


def _pixel_size_note(optics: Block | None) -> list[str]:
    source = None if optics is None else next((name for name in _PIXEL_SIZES if optics.has(name)), None)
    if optics is None or source in (None, _PIXEL_SIZES[0]):
        return []
    sizes = " and ".join(f"{size:.5g}" for size in np.unique(optics.numbers(str(source)))[:3])
    return [
        f"{optics.path}: data_optics has no rlnImagePixelSize; the pixel size of the images is taken from rln{source}, "
        f"{sizes} Å, which is right only if they were not binned; add rlnImagePixelSize"
    ]


def _old_pixel_size(particles: Block) -> float:
    """Pixel size in Å of a file without optics table: from the image itself, else from detector and magnification."""
    for name in _PIXEL_SIZES[:1]:
        if particles.has(name):
            sizes = particles.numbers(name)
            break
    else:
        detector, magnification = particles.numbers("DetectorPixelSize"), particles.numbers("Magnification")
        if not (magnification > 0).all():
            raise InputError(f"{particles.path}: rlnMagnification is not above 0 everywhere; repair the column")
        with np.errstate(over="ignore"):  # refused below
            sizes = np.minimum(1e4 * detector / magnification, _LARGEST)
    if not 0 < sizes.min() <= sizes.max() < _LARGEST or sizes.max() - sizes.min() > 1e-4 * sizes.max():
        raise InputError(
            f"{particles.path}: pixel sizes from {sizes.min():g} to {sizes.max():g} Å; expected one for all particles, "
            "select the particles of one microscope setting"
        )
    return float(sizes[0])


def _coordinates(
    particles: Block, optics: Block | None, pixel_size: NDArray[np.float64], row: NDArray[np.int64]
) -> tuple[Tensor | None, Tensor | None]:
    """Where the boxes lie in their micrographs, in pixels, and the pixel size of those, which the optics table tells;
    None where that is not said."""
    if not all(particles.has(name) for name in ("MicrographName", "CoordinateX", "CoordinateY")):
        return None, None
    for name in ("MicrographPixelSize", "MicrographOriginalPixelSize"):
        if optics is not None and optics.has(name):
            pixel_size = optics.numbers(name)[row]
            break
    # Nothing but the search for neighbours asks for them: what is no number is a place that is not known.
    pixels = np.stack([particles.table.numbers(f"_rlnCoordinate{axis}") for axis in "XY"], 1)
    pixels[~(np.abs(pixels) <= _LARGEST).all(1)] = np.nan
    return torch.from_numpy(pixels), torch.from_numpy(pixel_size)


def _before(particles: Block, folders: Sequence[Path]) -> Tensor | None:
    """Equal numbers for rows that were one image before something was subtracted from it (rlnImageOriginalName); -1
    where that is not said. Names of two projects, which start from different folders, give different numbers; where
    images have absolute names, the folder of the file stands for the project."""
    if not particles.has("ImageOriginalName"):
        return None
    project = next((folder for folder in folders if folder.parent != folder), particles.path.absolute().parent)
    number_of: dict[str, int] = {}
    for name in dict.fromkeys(particles.text("ImageOriginalName")):
        index, at, file = name.partition("@")
        text = f"{project} {index.lstrip('0')} {os.path.normpath(file)}"
        digest = hashlib.blake2b(os.fsencode(text), digest_size=7).digest()
        number_of[name] = int.from_bytes(digest, "little") if at else -1
    return torch.tensor([number_of[name] for name in particles.text("ImageOriginalName")])


def _treatment(columns: _Columns) -> Tensor | None:
    """What was done to the CTF of each image; None where nothing was."""
    treatment = torch.zeros(len(columns.optics_row), dtype=torch.int64)
    for name, value in TREATMENTS.items():
        treatment[columns.take(name, 0.0) != 0] = value
    return treatment if treatment.any() else None


def _aberrations(columns: _Columns, optics: Optics) -> Aberrations | None:
    """Anisotropic magnification and Zernike coefficients, beam tilt among them; None where there is nothing."""
    path, column = columns.particles.path, columns.take
    odd, even = (_zernikes(columns, f"{kind}Zernike") for kind in ("Odd", "Even"))
    tilt = torch.stack([column("BeamTiltX", 0.0), column("BeamTiltY", 0.0)], 1)
    if not (tilt.abs() < _LARGEST_TILT).all():
        raise InputError(f"{path}: rlnBeamTiltX or Y is up to {tilt.abs().max():.3g}; expected a few mrad")
    if tilt.any():
        coma = beam_tilt(tilt, optics.voltage, optics.cs)
        odd = torch.nn.functional.pad(odd, (0, max(0, coma.shape[1] - odd.shape[1])))
        odd[:, : coma.shape[1]] += coma
    matrix = torch.stack([column(name, float(name in ("MagMat00", "MagMat11"))) for name in MAGNIFICATION], 1)
    if not ((matrix - torch.tensor([1.0, 0, 0, 1])).abs() < 0.3).all():
        raise InputError(
            f"{path}: rlnMagMat00 ... 11 differ from 1 0 0 1 by 0.3 or more; expected the small stretch that CTF "
            "refinement finds, repair or remove these columns"
        )
    neutral = not odd.any() and not even.any() and bool((matrix == torch.tensor([1.0, 0, 0, 1])).all())
    return None if neutral else Aberrations(matrix.reshape(-1, 2, 2), odd, even)


def _zernikes(columns: _Columns, name: str) -> Float[Tensor, "p z"]:
    """The coefficients of each particle's optics group, written as [a,b,...]; shorter lists end in zeros."""
    optics = columns.optics
    if optics is None or not optics.has(name):
        return torch.zeros(len(columns.optics_row), 0, dtype=torch.float64)
    rows = []
    for number, text in enumerate(optics.text(name)):
        inner = text.strip().removeprefix("[").removesuffix("]")
        values = [_number(part) for part in inner.split(",")] if inner.strip() else []
        if len(values) > _ZERNIKES or not all(abs(value) <= _LARGEST for value in values):
            raise InputError(
                f'{optics.path}, row {number + 1} of data_optics: rln{name} is "{text[:80]}"; expected at most '
                f"{_ZERNIKES} numbers in brackets, as in [0.1,0,-0.3]"
            )
        rows.append(values)
    width = max(map(len, rows), default=0)
    of_group = np.array([row + [0.0] * (width - len(row)) for row in rows], np.float64).reshape(len(rows), width)
    return torch.from_numpy(of_group[columns.optics_row])


def _contrast(particles: Block) -> float:
    """The factor that makes protein bright; 1 where no column says it, as RELION has it."""
    tag = f"_{CONTRAST}"
    found = set(particles.table.text(tag)) if particles.table.has(tag) else {"1"}
    if not found <= {"1", "-1"} or len(found) != 1:
        raise InputError(
            f"{particles.path}: {CONTRAST} is {', '.join(sorted(found)[:5])}; expected 1 (protein is bright) or -1 of "
            "all particles"
        )
    return float(found.pop())


def _half_sets(particles: Block) -> Tensor | None:
    if not particles.has("RandomSubset"):
        return None
    half = particles.integers("RandomSubset")
    bad = np.flatnonzero((half != 1) & (half != 2))
    if len(bad):
        raise InputError(
            f"{particles.path}, row {bad[0] + 1} of data_{particles.name}: rlnRandomSubset is {half[bad[0]]}"
            f"{_more(len(bad))}; expected 1 or 2, or no such column at all"
        )
    return torch.from_numpy(half)


def _images(particles: Block, path: Path, datadir: Path | None, need_stacks: bool) -> tuple[Stacks, Tensor]:
    """Stacks, and the 0-based index of each image in its own."""
    index, files = _image_names(particles)
    found = find_stacks(files, path, datadir, required=need_stacks)
    bare = np.flatnonzero(index < 0)
    sections: dict[int, int] = {}
    for row, number in zip(bare.tolist(), found.stack[bare].tolist(), strict=True):
        if number not in sections:
            sections[number] = _sections(found.paths[number])
        if sections[number] > 1:
            raise InputError(
                f'{path}, row {row + 1} of data_{particles.name}: rlnImageName is "{files[row]}", and '
                f"{found.paths[number]} has {sections[number]} sections; expected index@stack.mrcs with an index from 1"
            )
    return found, torch.from_numpy(index.clip(min=0))


def _sections(path: Path) -> int:
    """Sections of an MRC file; 1 for one that is missing or that its own reader will refuse."""
    try:
        return count_sections(path)
    except InputError:
        return 1


def _image_names(particles: Block) -> tuple[NDArray[np.int64], list[str]]:
    """0-based index and stack of each image, from index@stack; the index is -1 where the name has none."""
    names = particles.text("ImageName")
    index = np.zeros(len(names), np.int64)
    files = []
    for row, name in enumerate(names):
        number, at, file = name.partition("@") if "@" in name else ("", "", name)
        digits = number.lstrip("0")
        whole = number.isascii() and number.isdecimal() and 1 <= len(digits) <= _INDEX_DIGITS
        if (at and not whole) or not file.strip(" >/."):
            raise InputError(
                f'{particles.path}, row {row + 1} of data_{particles.name}: rlnImageName is "{name}"; expected '
                "index@stack.mrcs with an index from 1"
            )
        index[row] = int(digits) - 1 if at else -1
        files.append(file)
    return index, files


def star_image_keys(path: Path) -> Iterator[tuple[int, str]]:
    """0-based index and stack of each particle, as written.

    Raises:
        InputError: unreadable file, no images.
    """
    particles, _ = find_tables(read_star_file(path))
    index, files = _image_names(particles)
    return zip(index.clip(min=0).tolist(), files, strict=True)
