"""RELION's STAR files, out: tables of any format, and files rewritten with all their columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emsplat.imaging.ctf import tilt_of_coma
from emsplat.io.files import require_finite
from emsplat.io.paths import Names
from emsplat.io.relion.read import CARRIED, CONTRAST, MAGNIFICATION, TREATMENTS, Block, find_tables
from emsplat.io.star import StarFile, Table, Words, read_star_file, write_star_file
from emsplat.io.table import OpticsGroup, ParticleTable
from emsplat.maths.geometry import matrix_to_euler
from emsplat.types import PHASE_FLIPPED, Grid, Optics, Poses

_TILTS = ("BeamTiltX", "BeamTiltY")


def rewrite_star(
    source: Path,
    target: Path,
    rows: Tensor,
    half: Tensor | None,
    columns: Mapping[str, Sequence[str]] | None = None,
    optics: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """The STAR file ``source`` with only these particle rows and with rlnRandomSubset = ``half`` (one per row).

    ``columns`` (names without "rln", one text per row) take the place of those of the particle table, ``optics`` of
    those of the optics table, which is made where there is none. Every other table and column keeps its text.

    Raises:
        InputError: the source is no longer readable.
        OutputError: the target cannot be written.
    """
    _rewrite(read_star_file(source), target, rows, half, columns or {}, optics or {})


def split_star(source: Path, parts: Mapping[Path, Tensor]) -> None:
    """Rows of the particle table of a STAR file as STAR files of their own, with its other tables. They lie where its
    image names lead to the same stacks.

    Raises:
        InputError: the source is no longer readable.
        OutputError: a target cannot be written.
    """
    file = read_star_file(source)
    for target, rows in parts.items():
        _rewrite(file, target, rows, None, {}, {})


def _rewrite(
    file: StarFile,
    target: Path,
    rows: Tensor,
    half: Tensor | None,
    columns: Mapping[str, Sequence[str]],
    optics: Mapping[str, Sequence[str]],
) -> None:
    particles, table = find_tables(file)
    halves = {} if half is None else {"RandomSubset": [str(value) for value in half.tolist()]}
    kept = particles.table.take(rows.numpy())
    name = particles.name if table is not None or not optics else "particles"
    written: dict[str, tuple[str, Mapping[str, Sequence[str] | Words]]] = {
        particles.name: (name, _with_columns(kept, {**columns, **halves}))
    }
    if table is not None and optics:
        written["optics"] = "optics", _with_columns(table.table, optics)
    blocks = [written.get(block, file.content[start:stop]) for block, start, stop in file.blocks]
    if table is None and optics:
        blocks.insert(0, ("optics", _named(optics)))
    write_star_file(target, blocks)


def _with_columns(table: Table, columns: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str] | Words]:
    """The columns of a table with some (without "rln") in the place of those that it has, or at its end."""
    return {**{tag: table.words(tag) for tag in table.tags}, **_named(columns)}


def _named(columns: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str] | Words]:
    """Columns under their full names; those of emsplat itself are called so."""
    return {f"_{name}" if name.startswith("emsplat") else f"_rln{name}": texts for name, texts in columns.items()}


def rewrite_table(
    table: ParticleTable,
    target: Path,
    half: Tensor | None,
    *,
    new_images: bool,
    more: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """The STAR file that a table was read from with its rows alone; hand, half-sets and what has ``changed`` are those
    of the table. ``more`` are further columns, as in `rewrite_star`.

    What RELION 5 asks of an optics table is added where it is missing; a 3.0 file becomes a 3.1 file. Image names stay
    where they lead to the same stacks from ``target`` too, else they become absolute. With ``new_images``, which lie
    beside ``target``, image names, origins, boxes and pixel sizes are those of the table. ``more`` are further columns
    (without "rln"), or others in the place of the source's.

    Raises:
        InputError: the source is no longer readable.
        OutputError: the target cannot be written.
    """
    source = table.sources[0]
    file = read_star_file(source)
    particles, optics = find_tables(file)
    columns = _contrast(table, particles.table.has(f"_{CONTRAST}"))
    groups: dict[str, list[str]] = {}
    moved = "poses" in table.changed
    if table.mirrored or moved:
        angles = torch.rad2deg(matrix_to_euler(table.poses.rotation)).T.tolist()
        names = ("AngleRot", "AngleTilt", "AnglePsi")
        turned = {name: [f"{v:.7f}" for v in values] for name, values in zip(names, angles, strict=True)}
        # Priors of the other hand would lead local searches astray; where there are none RELION takes the angles.
        columns |= turned | {f"{name}Prior": turned[name] for name in names if particles.has(f"{name}Prior")}
    if optics is None:
        recorded, rows = _recorded_alike(table.optics, table.groups, table.optics_group)
        columns["OpticsGroup"] = [str(number + 1) for number in recorded.tolist()]
        groups = {name: [row[name] for row in rows] for name in rows[0]}
        if "OddZernike" in groups:  # which a beam tilt is in now
            columns |= {name: ["0"] * len(table.row) for name in _TILTS if particles.has(name)}
    else:
        groups = _missing_optics(table, optics)
    if not new_images:
        texts = particles.text("ImageName")
        written = [texts[row] for row in table.row.tolist()]
        kept = _kept_names(target, table, written)
        columns |= {"ImageName": kept} if kept != written else {}
    else:
        columns["ImageName"] = _new_names(target, table, target.parent)
        columns |= _flags_of_flipped(particles, table.row) | _places(table, particles)
        pixel_size = torch.tensor([own.pixel_size for own in table.groups], dtype=torch.float64)[table.optics_group]
        if particles.has("Magnification"):
            # 3.0 has the pixel size as that of the detector, in µm, over the magnification.
            detector = pixel_size.numpy() * particles.numbers("Magnification")[table.row.numpy()] / 1e4
            columns["DetectorPixelSize"] = [f"{value:.8f}" for value in detector]
        if particles.has("ImagePixelSize"):
            columns["ImagePixelSize"] = [f"{value:.7f}" for value in pixel_size.tolist()]
        if optics is not None:
            groups["ImagePixelSize"] = [f"{own.pixel_size:.7f}" for own in table.groups]
            groups["ImageSize"] = [str(own.box) for own in table.groups]
            groups |= _flags_of_flipped(optics)
    if "ctf" in table.changed:
        own = table.optics
        numbers = {"DefocusU": own.defocus_u, "DefocusV": own.defocus_v}
        numbers |= {"CtfBfactor": own.b_factor, "CtfScalefactor": own.scale}
        columns |= {name: [f"{value:.7f}" for value in values.tolist()] for name, values in numbers.items()}
    if "aberrations" in table.changed and optics is not None and table.optics.aberrations is not None:
        odd = table.optics.aberrations.odd[_first_of_groups(table)]
        if any(optics.has(name) for name in _TILTS):
            # RELION 5 adds a tilt to the polynomials. 3.1 puts its coma, also that of a tilt of 0, in the place of
            # theirs and leaves what compensates it, which shifts the images.
            own = table.optics[torch.tensor(_first_of_groups(table))]
            tilt, odd = tilt_of_coma(odd, own.voltage, own.cs)
            groups |= {
                name: [f"{value:.7f}" for value in own] for name, own in zip(_TILTS, tilt.T.tolist(), strict=True)
            }
        groups["OddZernike"] = [f"[{','.join(f'{value:.9g}' for value in row)}]" for row in odd.tolist()]
        # That of a particle is in its group's now.
        columns |= {name: ["0"] * len(table.row) for name in _TILTS if particles.has(name)}
    if new_images or optics is None or moved:
        require_finite(target, "origins", table.poses.shift)
        for axis, values in zip("XY", table.poses.shift.T, strict=True):
            origins = [f"{value:.7f}" for value in values.tolist()]
            columns[f"Origin{axis}Angst"] = origins
            if (new_images or moved) and particles.has(f"Origin{axis}PriorAngst"):
                columns[f"Origin{axis}PriorAngst"] = origins
    _rewrite(file, target, table.row, half, {**columns, **(more or {})}, groups)


def _contrast(table: ParticleTable, asked: bool) -> dict[str, list[str]]:
    """What says that protein is dark: a column of our own, where it is or is ``asked`` for."""
    return {CONTRAST: [f"{table.sign:.0f}"] * len(table)} if asked or table.sign < 0 else {}


def _places(table: ParticleTable, particles: Block) -> dict[str, list[str]]:
    """Coordinates of new boxes, in which particles may lie elsewhere than in those of the source; its own where the
    size of a micrograph's pixels is not known."""
    if table.coordinates is None:
        return {}
    places = {}
    for name, values in zip(("CoordinateX", "CoordinateY"), table.coordinates.T.tolist(), strict=True):
        texts = particles.text(name)
        before = [texts[row] for row in table.row.tolist()]
        places[name] = [f"{v:.6f}" if math.isfinite(v) else text for v, text in zip(values, before, strict=True)]
    return places


def _kept_names(target: Path, table: ParticleTable, written: Sequence[str]) -> list[str]:
    """Image names as they were written, with other paths where these do not lead to the stacks from ``target``."""
    names = Names(target)
    kept = []
    for name, image, stack in zip(written, table.image.tolist(), table.stack.tolist(), strict=True):
        file = name.partition("@")[2] or name
        place = names.kept(file, table.stacks[stack])
        kept.append(name if place == file else f"{image + 1:06d}@{place}")
    return kept


def _new_names(target: Path, table: ParticleTable, folder: Path | None) -> list[str]:
    """Image names by absolute paths, or from ``folder`` where that is given."""
    names = Names(target)
    files = [str(stack) if folder is None else names.below(folder, stack) for stack in table.stacks]
    return [f"{image + 1:06d}@{files[s]}" for image, s in zip(table.image.tolist(), table.stack.tolist(), strict=True)]


def _missing_optics(table: ParticleTable, optics: Block) -> dict[str, list[str]]:
    """Columns that RELION 5 wants of an optics table and this one has not."""
    particle = _first_of_groups(table)
    values = {
        "OpticsGroupName": [own.name for own in table.groups],
        "ImagePixelSize": [f"{own.pixel_size:.7f}" for own in table.groups],
        "ImageDimensionality": ["2"] * len(table.groups),
        "Voltage": [f"{value:.7f}" for value in table.optics.voltage[particle].tolist()],
        "SphericalAberration": [f"{value:.7f}" for value in table.optics.cs[particle].tolist()],
        "AmplitudeContrast": [f"{value:.7f}" for value in table.optics.amplitude_contrast[particle].tolist()],
    }
    if all(own.box is not None for own in table.groups):
        values["ImageSize"] = [str(own.box) for own in table.groups]
    return {name: texts for name, texts in values.items() if not optics.has(name)}


def _first_of_groups(table: ParticleTable) -> list[int]:
    """The first particle of each optics group, that of the table for groups without any."""
    return [int((table.optics_group == n).nonzero()[:1, 0].sum()) for n in range(len(table.groups))]


def _flags_of_flipped(block: Block, rows: Tensor | None = None) -> dict[str, list[str]]:
    """The flags of a table once its images that were multiplied by their CTF are phase-flipped ones."""
    flags = [name for name in TREATMENTS if block.has(name)]
    if not flags:
        return {}
    treated = np.any([block.numbers(name) != 0 for name in flags], axis=0)
    treated = treated if rows is None else treated[rows.numpy()]
    return {name: [str(int(value == PHASE_FLIPPED and t)) for t in treated] for name, value in TREATMENTS.items()}


def write_particles_star(
    path: Path,
    image_names: Sequence[str],
    micrographs: Sequence[str],
    poses: Poses,
    optics: Optics,
    grid: Grid,
    half: Tensor | None,
) -> None:
    """A RELION 3.1 STAR file of particles of one pixel size and box."""
    groups = (OpticsGroup("opticsGroup1", grid.pixel_size, grid.size, grid.pixel_size),)
    group = torch.zeros(len(image_names), dtype=torch.int64)
    _write_particles(path, image_names, micrographs, poses, optics, groups, group, half, None, {})


def common_columns(table: ParticleTable) -> dict[str, list[str]]:
    """The columns (without "rln") that the STAR files of a merged table share, with the text of each particle.

    Raises:
        InputError: a source is no longer readable.
    """
    tables = [find_tables(read_star_file(path))[0].table for path in table.sources]
    shared = [tag for tag in tables[0].tags if all(tag in other.tags for other in tables)]
    places = list(zip(table.source.tolist(), table.row.tolist(), strict=True))
    columns = {}
    for tag in (tag for tag in shared if tag.startswith("_rln")):
        texts = [one.text(tag) for one in tables]
        columns[tag.removeprefix("_rln")] = [texts[source][row] for source, row in places]
    return columns


def further_columns(table: ParticleTable) -> tuple[dict[str, list[str]], list[str]]:
    """What STAR files hold besides that which a table carries: columns that they share, as in `common_columns`, and the
    names of those that only some have, or that belong to optics groups.

    Raises:
        InputError: a source is no longer readable.
    """
    columns = {name: texts for name, texts in common_columns(table).items() if name not in CARRIED}
    apart = [*_unshared(table), *(name for group in optics_columns(table) for name in group)]
    return columns, list(dict.fromkeys(apart))


def star_names(path: Path) -> list[str]:
    """Columns of a STAR file (without "rln"), of particles and optics groups, that a table does not carry.

    Raises:
        InputError: it cannot be read.
    """
    particles, optics = find_tables(read_star_file(path))
    names = [*particles.columns, *([] if optics is None else optics.columns)]
    return [name for name in dict.fromkeys(names) if name not in CARRIED]


def lost_in_merging(table: ParticleTable) -> list[str]:
    """Columns that only some of the merged STAR files have, and that a file of all therefore lacks.

    Raises:
        InputError: a source is no longer readable.
    """
    if len(table.sources) == 1:
        return []
    groups = optics_columns(table)
    some = [name for group in groups for name in group if not all(name in other for other in groups)]
    return list(dict.fromkeys([*_unshared(table), *some]))


def _unshared(table: ParticleTable) -> list[str]:
    if len(table.sources) == 1:
        return []
    own = [find_tables(read_star_file(path))[0].columns for path in table.sources]
    return [name for names in own for name in names if name not in CARRIED and not all(name in one for one in own)]


def optics_columns(table: ParticleTable) -> list[dict[str, str]]:
    """Of each optics group of a table from STAR files what these say besides that which a table carries; nothing of a
    3.0 file, which has no such groups.

    Raises:
        InputError: a source is no longer readable.
    """
    rows = []
    for path in table.sources:
        _, optics = find_tables(read_star_file(path))
        names = [] if optics is None else [name for name in optics.columns if name not in CARRIED]
        texts = [] if optics is None else [optics.text(name) for name in names]
        count = 1 if optics is None else len(optics.table)
        rows += [{name: own[row] for name, own in zip(names, texts, strict=True)} for row in range(count)]
    return rows


def write_table(
    path: Path,
    table: ParticleTable,
    half: Tensor | None,
    folder: Path | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
    more_of_groups: Sequence[Mapping[str, str]] = (),
) -> None:
    """A table from any format as a RELION 3.1 STAR file; images under their full paths, or under paths from ``folder``.

    ``more`` are further columns (without "rln"); those that the table itself has go before them. Where image names are
    among them, these stay if they lead to the same stacks from ``path``. ``more_of_groups`` are further columns of the
    optics groups; those that all have are written.

    Particles of one optics group that differ in voltage, Cs, amplitude contrast or aberrations become several groups.

    Raises:
        OutputError: it cannot be written.
    """
    written = None if more is None or folder is not None else more.get("ImageName")
    names = _new_names(path, table, folder) if written is None else _kept_names(path, table, written)
    named = table.micrograph_names
    micrographs = [named[n] for n in table.micrograph.tolist()] if named else None
    place = table.coordinates
    places_of = {} if place is None or not bool(torch.isfinite(place).all()) else dict(zip("XY", place.T, strict=True))
    # Those of the other hand, or of other images, would lead local searches astray.
    stale = {"AngleRotPrior", "AngleTiltPrior", "AnglePsiPrior"} if table.mirrored else set()
    stale |= {"OriginXPriorAngst", "OriginYPriorAngst"} if folder is not None else set()
    more = {name: texts for name, texts in (more or {}).items() if name not in stale}
    placed = {f"Coordinate{axis}": [f"{v:.6f}" for v in values.tolist()] for axis, values in places_of.items()}
    more = (placed | more if folder is None else more | placed) | _contrast(table, False)
    _write_particles(
        path,
        names,
        micrographs,
        table.poses,
        table.optics,
        table.groups,
        table.optics_group,
        half,
        table.particle_class,
        more,
        more_of_groups,
    )


def _write_particles(
    path: Path,
    image_names: Sequence[str],
    micrographs: Sequence[str] | None,
    poses: Poses,
    optics: Optics,
    groups: Sequence[OpticsGroup],
    group: Tensor,
    half: Tensor | None,
    particle_class: Tensor | None,
    more: Mapping[str, Sequence[str]],
    more_of_groups: Sequence[Mapping[str, str]] = (),
) -> None:
    recorded, tables = _recorded_alike(optics, groups, group, more_of_groups)
    columns_of = [name for name in tables[0] if all(name in table for table in tables)]
    angles = torch.rad2deg(matrix_to_euler(poses.rotation)).unbind(1)
    numeric = {
        "DefocusU": optics.defocus_u,
        "DefocusV": optics.defocus_v,
        "DefocusAngle": torch.rad2deg(optics.defocus_angle),
        "PhaseShift": torch.rad2deg(optics.phase_shift),
        "CtfBfactor": optics.b_factor,
        "CtfScalefactor": optics.scale,
        "AngleRot": angles[0],
        "AngleTilt": angles[1],
        "AnglePsi": angles[2],
        "OriginXAngst": poses.shift[:, 0],
        "OriginYAngst": poses.shift[:, 1],
    }
    for name, values in numeric.items():
        require_finite(path, f"values of rln{name}", values)
    columns: dict[str, list[str]] = {
        "ImageName": list(image_names),
        **({} if micrographs is None else {"MicrographName": list(micrographs)}),
        "OpticsGroup": [str(number + 1) for number in recorded.tolist()],
        "ClassNumber": ["1"] * len(image_names) if particle_class is None else list(map(str, particle_class.tolist())),
        **{name: [f"{value:.7f}" for value in values.tolist()] for name, values in numeric.items()},
    }
    if half is not None:
        columns["RandomSubset"] = [str(value) for value in half.tolist()]
    apart = {*columns, *TREATMENTS, *MAGNIFICATION, *_TILTS, "RandomSubset", "OriginX", "OriginY"}
    columns |= {name: list(texts) for name, texts in more.items() if name not in apart}
    recorded_as = {name: [table[name] for table in tables] for name in columns_of}
    write_star_file(path, [("optics", _named(recorded_as)), ("particles", _named(columns))])


def _recorded_alike(
    optics: Optics, groups: Sequence[OpticsGroup], group: Tensor, more: Sequence[Mapping[str, str]] = ()
) -> tuple[NDArray[np.int64], list[dict[str, str]]]:
    """For each particle the row of an optics table, and that table; RELION keeps these values nowhere else."""
    bent, treatment = optics.aberrations, optics.treatment
    keys = [group, optics.voltage, optics.cs, optics.amplitude_contrast]
    if treatment is not None:
        keys.append(treatment)
    if bent is not None:
        keys += [*bent.magnification.reshape(-1, 4).T, *bent.odd.T, *bent.even.T]
    _, first, recorded = np.unique(
        np.stack([key.double().numpy() for key in keys], 1), axis=0, return_index=True, return_inverse=True
    )
    alike, seen = Counter(group[torch.from_numpy(first)].tolist()), Counter[int]()
    tables: list[dict[str, str]] = []
    for particle in first.tolist():
        number = int(group[particle])
        own = groups[number]
        seen[number] += 1
        table = {
            "OpticsGroup": str(len(tables) + 1),
            "OpticsGroupName": own.name if alike[number] == 1 else f"{own.name}_{seen[number]}",
            **(
                {}
                if own.original_pixel_size is None
                else {"MicrographOriginalPixelSize": f"{own.original_pixel_size:.7f}"}
            ),
            "Voltage": f"{optics.voltage[particle]:.7f}",
            "SphericalAberration": f"{optics.cs[particle]:.7f}",
            "AmplitudeContrast": f"{optics.amplitude_contrast[particle]:.7f}",
            "ImagePixelSize": f"{own.pixel_size:.7f}",
            **({} if own.box is None else {"ImageSize": str(own.box)}),
            "ImageDimensionality": "2",
            **{
                name: str(int(treatment is not None and treatment[particle] == value))
                for name, value in TREATMENTS.items()
            },
        }
        if bent is not None:
            for name, coefficients in (("OddZernike", bent.odd), ("EvenZernike", bent.even)):
                table[name] = f"[{','.join(f'{value:.9g}' for value in coefficients[particle].tolist())}]"
            matrix = bent.magnification[particle].flatten().tolist()
            table |= {name: f"{value:.9g}" for name, value in zip(MAGNIFICATION, matrix, strict=True)}
        tables.append(table | dict(more[number] if more else {}))
    return recorded.reshape(-1), tables
