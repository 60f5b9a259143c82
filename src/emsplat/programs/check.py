"""What emsplat understood of a particle set, before the long run: metadata, images, and a quick look at the density."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emsplat import report
from emsplat.assessment.directions import directions
from emsplat.assessment.maps import is_evident, particle_mask
from emsplat.assessment.symmetry import examine_symmetry
from emsplat.config import CheckConfig
from emsplat.errors import InputError, OutputError
from emsplat.imaging.ctf import electron_wavelength
from emsplat.io.files import json_text
from emsplat.io.mrc import write_map
from emsplat.io.particles import count_stacks, is_star, lost_stacks
from emsplat.io.paths import say_folders
from emsplat.io.table import ParticleTable
from emsplat.maths.groups import Symmetry
from emsplat.measures.curves import resolution
from emsplat.measures.directional import fourier_sampling, sampling_compensation
from emsplat.measures.fsc import fsc_curve
from emsplat.particles.choose import open_images, read_source
from emsplat.particles.copies import copies, mixed_classes, particle_numbers, with_halves
from emsplat.particles.stack import ParticleStack
from emsplat.report.verdict import spacing
from emsplat.run.files import CHECK, CHECK_MAP, DIRECTIONS, DIRECTIONS_FIGURE, SETTINGS, SLICES_FIGURE
from emsplat.run.folder import write_text
from emsplat.run.log import counted, data_size, duration
from emsplat.sums.equations import contrast
from emsplat.sums.statistics import equations_of, memory_of_sums
from emsplat.types import Grid

_FEWEST = 4  # different particles, for two half-sets
_SAMPLE = 2000  # particles of the quick look
_VOXELS = 64  # at most, across its map
_SECONDS = 20.0
_CLOSE = 0.01  # of all particles, that share their place with one of the other half-set: from here on they mislead
_VERDICTS = ("ok", "look", "wrong")


@dataclass(frozen=True)
class Item:
    """One thing that was looked at: "ok", "look" (unusual, may be meant) or "wrong" (a run would fail or mislead)."""

    name: str
    verdict: str
    text: str


def check(config: CheckConfig, particles: Path, output: Path | None) -> dict[str, Any]:
    """Reads a particle set as a reconstruction would and says what was understood.

    With images: their headers, and a back-projection of up to 2,000 particles onto at most 64³ voxels. Its map, slices
    and views, the verdicts and a page with all of it go into ``output``. Returns "particles", "half_sets",
    "optics_groups", "shift_rms" (Å), "defocus_range" (Å), "missing_files", "image_folders" (that paths start from) and
    "items".

    Raises:
        InputError: the metadata cannot be read at all.
        OutputError: ``output`` holds a run or cannot be written.
    """
    if output is not None and (output / SETTINGS).exists():
        raise OutputError(f"{output}: holds a run, whose page would be replaced; choose another folder with -o")
    table = read_source(config, particles, need_stacks=False)
    missing = [] if config.metadata_only else lost_stacks(table)
    items = _of_the_metadata(table, config)
    if output is not None:
        _clear(output)
    stack: ParticleStack | None = None
    if config.metadata_only:
        items.append(Item("images", "ok", "not looked at (--metadata-only)"))
    elif missing:
        items.append(_missing(missing, table, config))
    else:
        try:
            stack = open_images(config.choice, config.images, table).with_halves(config.halves.seed)
        except InputError as error:
            items.append(Item("images", "wrong", str(error)))
    if stack is not None:
        items += _of_the_images(stack, table, output)
    elif (box := table.groups[0].box) is not None:
        items.append(_cost_of(len(table), box, 4 * len(table) * box**2))
    half = table.half
    result = {
        "source": str(particles),
        "particles": len(table),
        "half_sets": None if half is None else [int((half == number).sum()) for number in (1, 2)],
        "optics_groups": _groups(table, stack),
        "shift_rms": round(float(table.poses.shift.square().sum(1).mean().sqrt()), 3),
        "defocus_range": [round(float(value)) for value in _defocus(table).aminmax()],
        "missing_files": missing,
        "image_folders": [str(folder) for folder in table.folders],
        "items": [asdict(item) for item in items],
    }
    if output is not None:
        write_text(output / CHECK, json_text(result))
        report.write_report(output)
    return result


def _clear(output: Path) -> None:
    """The folder, without what a check before may have left in it: its page shows what is there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another with -o") from error
    if (output / CHECK).exists():
        figures = (output / name for name in (SLICES_FIGURE, DIRECTIONS_FIGURE))
        drawn = [path for figure in figures for path in (figure, figure.with_suffix(".svg"))]
        for path in (*drawn, *(output / name for name in (CHECK, CHECK_MAP, DIRECTIONS))):
            path.unlink(missing_ok=True)


def _of_the_metadata(table: ParticleTable, config: CheckConfig) -> list[Item]:
    return [
        _counts(table),
        _half_sets(table, config),
        *_classes(table),
        *_optics(table),
        *_formation(table),
        _shifts(table),
        _views(table, config.choice.point_group),
        *(Item("metadata", "ok", note) for note in table.notes),
        *(Item("metadata", "look", warning) for warning in table.warnings),
        *_repeated(table, config),
    ]


def _of_the_images(stack: ParticleStack, table: ParticleTable, output: Path | None) -> list[Item]:
    items = [Item("images", "look", said) for said in stack.table.warnings if said not in table.warnings]
    items += [_headers(stack), _cost_of(len(stack), stack.grid.size, stack.stored)]
    try:
        items += _quick_look(stack, output)
        found = examine_symmetry(stack)
        items += [] if found is None else [Item("symmetry", found.verdict, found.text)]
    except InputError as error:
        items.append(Item("image values", "wrong", str(error)))
    return items


def exit_code(result: dict[str, Any]) -> int:
    """0 where all is ok, 1 where something asks for a look, 2 where something is wrong."""
    return max(_VERDICTS.index(item["verdict"]) for item in result["items"])


def describe(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    lines = [f"{result['source']}: {result['particles']:,} particles"]
    for group in result["optics_groups"]:
        box = "unknown box" if group["box"] is None else f"box {group['box']} px"
        lines.append(
            f"  {group['name']}: {group['particles']:,} particles, {box} of {group['pixel_size']:.5g} Å "
            f"({group['pixel_size_from']}), {group['voltage']:g} kV, Cs {group['cs']:g} mm, amplitude contrast "
            f"{group['amplitude_contrast']:g}"
        )
    lines += [f"{item['verdict']:>6}  {item['name']}: {item['text']}" for item in result["items"]]
    return "\n".join(lines)


def _groups(table: ParticleTable, stack: ParticleStack | None) -> list[dict[str, Any]]:
    kinds = dict.fromkeys("STAR file" if is_star(path) else path.suffix.lower() + " file" for path in table.sources)
    found = []
    for number, group in enumerate(table.groups):
        rows = (table.optics_group == number).nonzero()[:, 0]
        first = rows[:1]
        box = group.box if stack is None else stack.grids[number].size
        one = {
            "name": group.name,
            "particles": len(rows),
            "box": box,
            "pixel_size": group.pixel_size,
            "pixel_size_from": ", ".join(kinds),
        }
        for name in ("voltage", "cs", "amplitude_contrast"):
            values = getattr(table.optics, name)[first]
            one[name] = round(float(values[0]), 6) if len(values) else math.nan
        found.append(one)
    return [one for one in found if one["particles"]]


def _defocus(table: ParticleTable) -> Tensor:
    return 0.5 * (table.optics.defocus_u + table.optics.defocus_v)


def _counts(table: ParticleTable) -> Item:
    micrographs = len(torch.unique(table.micrograph))
    units = "from " + counted(micrographs, "micrograph or group", "micrographs or groups")
    if not table.micrograph_names and micrographs == len(table):
        units = "from micrographs that are not known"
    text = f"{len(table):,} in {counted(count_stacks(table), 'stack')} {units}"
    different = int(particle_numbers(table).max()) + 1
    if different < _FEWEST:
        same = f", which show {different}" if different < len(table) else ""
        return Item(
            "particles", "wrong", f"{text}{same}; expected at least {_FEWEST} different ones, 2 in each half-set"
        )
    return Item("particles", "ok", text)


def _classes(table: ParticleTable) -> list[Item]:
    text = mixed_classes(table)
    return [Item("classes", "look", text)] if text else []


def _half_sets(table: ParticleTable, config: CheckConfig) -> Item:
    if config.halves.redraw_halves:
        return Item("half-sets", "ok", "new ones are drawn (--redraw-halves)")
    if table.half is None:
        return Item("half-sets", "look", "the file has none: new ones will be drawn, alignments were not independent")
    one, two = (int((table.half == number).sum()) for number in (1, 2))
    if min(one, two) < 2:
        text = f"{one:,} + {two:,}; expected at least 2 in each: --redraw-halves draws new ones"
        return Item("half-sets", "wrong", text)
    return Item("half-sets", "look" if min(one, two) < 0.8 * max(one, two) else "ok", f"{one:,} + {two:,}: of the file")


def _optics(table: ParticleTable) -> list[Item]:
    optics = table.optics
    items = []
    for name, values, low, high, unit in (
        ("voltage", optics.voltage, 80, 400, "kV"),
        ("spherical aberration", optics.cs, 0.0, 6.0, "mm"),
        ("amplitude contrast", optics.amplitude_contrast, 0.02, 0.3, ""),
        ("pixel size", torch.tensor([group.pixel_size for group in table.groups]), 0.2, 15, "Å"),
    ):
        least, most = (float(value) for value in values.aminmax())
        odd = least < low or most > high
        span = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        text = f"{span} {unit}".rstrip() + (f"; {low:g} to {high:g} is usual" if odd else "")
        items.append(Item(name, "look" if odd else "ok", text))
    least, most = (float(value) for value in _defocus(table).aminmax())
    text = f"{least:,.0f} to {most:,.0f} Å of underfocus"
    if most == least == 0:
        items.append(
            Item("defocus", "wrong", "0 everywhere; expected the CTF parameters of a job after CTF estimation")
        )
    else:
        odd = least < 0 or most > 60_000
        items.append(Item("defocus", "look" if odd else "ok", text + ("; 2,000 to 60,000 is usual" if odd else "")))
    return items


def _formation(table: ParticleTable) -> list[Item]:
    """What was done to the images, what bends them, and how far the CTF spreads their detail."""
    optics, items = table.optics, []
    if optics.treatment is not None:
        counts = torch.bincount(optics.treatment, minlength=3).tolist()
        named = zip(("raw", "phase-flipped", "multiplied by their CTF"), counts, strict=True)
        items.append(Item("treatment", "ok", ", ".join(f"{count:,} {name}" for name, count in named if count)))
    if (bent := optics.aberrations) is not None:
        stretch = float((bent.magnification - torch.eye(2)).abs().max())
        kinds = [name for name, part in (("odd", bent.odd), ("even", bent.even)) if bool(part.any())]
        text = f"{' and '.join(kinds)} aberrations" if kinds else "no aberrations"
        items.append(Item("aberrations", "ok", f"{text}, magnification anisotropic by {stretch:.2%}; all are used"))
    boxes = torch.tensor([group.box or 0 for group in table.groups])[table.optics_group]
    pixel_size = torch.tensor([group.pixel_size for group in table.groups], dtype=torch.float64)[table.optics_group]
    reach = electron_wavelength(optics.voltage) * _defocus(table).abs() / (2 * pixel_size)
    share = torch.where(boxes > 0, reach / (0.5 * boxes.clamp(min=1) * pixel_size), 0.0)
    worst = int(share.argmax())
    text = f"detail at Nyquist is spread by up to {float(reach[worst]):.0f} Å"
    if float(share[worst]) > 2:
        text += f", far beyond the half box of {0.5 * float(boxes[worst] * pixel_size[worst]):.0f} Å; take a larger box"
        items.append(Item("delocalisation", "look", text))
    elif float(share[worst]) > 0:
        items.append(Item("delocalisation", "ok", text))
    return items


def _shifts(table: ParticleTable) -> Item:
    lengths = [group.pixel_size * (group.box or 0) for group in table.groups]
    length = torch.tensor(lengths, dtype=torch.float64)[table.optics_group]
    shift = table.poses.shift.norm(dim=1)
    rms, most = float(shift.square().mean().sqrt()), float(shift.max())
    text = f"root mean square {rms:.2f} Å, largest {most:.1f} Å"
    known = length > 0
    if bool((shift > 0.5 * length)[known].any()):
        return Item("shifts", "wrong", text + ": beyond half the box; are they in pixels of another size?")
    if bool((shift > 0.2 * length)[known].any()):
        return Item("shifts", "look", text + ": beyond a fifth of the box; recentre the particles if this is common")
    return Item("shifts", "ok", text)


def _views(table: ParticleTable, symmetry: Symmetry) -> Item:
    rotation = table.poses.rotation
    if float((rotation - rotation[:1]).abs().max()) < 1e-6 and len(table) > 1:
        return Item("orientations", "wrong", "all particles have the same; expected those of a refinement")
    factor, empty = sampling_compensation(fourier_sampling(rotation, symmetry.elements)[:, 3])
    text = f"sampling compensation factor {factor:.2f} (1 is uniform), {empty:.1%} of directions without a sample"
    return Item("orientations", "look" if factor < 0.6 or empty > 0.02 else "ok", text)


def _repeated(table: ParticleTable, config: CheckConfig) -> list[Item]:
    symmetry, items = config.choice.point_group, list[Item]()
    found = copies(table, symmetry)
    if not found.crossing:
        found = copies(with_halves(table, config.halves.seed), symmetry)
    if table.left_out:
        items.append(Item("repeated images", "ok", f"{table.left_out:,} rows are left out (--unique)"))
    if found.crossing:
        said = f"{found.crossing:,} rows are of images or particles in both half-sets"
        items.append(
            Item(
                "repeated images", "wrong", f"{found.text}; {said}: --redraw-halves, or --unique where that leaves one"
            )
        )
    elif found.expansion is not None:
        twice = f"; --symmetry {symmetry.symbol} adds nothing to that" if symmetry.order > 1 else ""
        items.append(Item("repeated images", "look" if twice else "ok", found.text + twice))
    elif found.text:
        said = "they stay in one half-set and count once where their poses agree, --unique leaves them out"
        text = f"{found.text}; {said}"
        items.append(Item("repeated images", "look", text))
    if found.close:
        share = found.close / len(table)
        verdict = "wrong" if share > _CLOSE and not found.drawn else "look"
        items.append(Item("repeated particles", verdict, found.near))
    return items


def _missing(missing: list[str], table: ParticleTable, config: CheckConfig) -> Item:
    text = f"missing are {len(missing):,} of {counted(count_stacks(table), 'stack')}, the first is {missing[0]}; "
    found = _helpful_folder(missing[0], table.sources[0])
    if found is not None:
        text += f"--datadir {found} would find it"
    elif config.choice.datadir is None:
        text += "give the folder that the paths start from with --datadir"
    else:
        text += f"it is not below {config.choice.datadir} either"
    return Item("images", "wrong", text)


def _helpful_folder(file: str, source: Path) -> Path | None:
    """A folder near the metadata below which the file lies, under its whole path or the last parts of it."""
    parts = Path(file).parts
    folder = source.absolute().parent
    near = [folder, *sorted(p for p in folder.iterdir() if p.is_dir()), *folder.parents[:2]]
    for place in near:
        if any((place / Path(*parts[i:])).is_file() for i in range(len(parts))):
            return place
    return None


def _headers(stack: ParticleStack) -> Item:
    kinds = ", ".join(f"{grid.size} px of {grid.pixel_size:.5g} Å" for grid in dict.fromkeys(stack.grids))
    table = stack.table
    return Item("images", "ok", f"{counted(count_stacks(table), 'stack')} found, {say_folders(table.folders)}; {kinds}")


def _cost_of(count: int, box: int, read: int) -> Item:
    """What a pass over so many images takes; ``read`` are their bytes on disk."""
    # Two cores of 2026 insert 6,000 images of 96² a second; the work grows with the pixels.
    seconds = count / (6000 * (96 / box) ** 2.7)
    text = (
        f"{data_size(read)} to read once, {data_size(memory_of_sums(box))} of memory for the sums; two cores take "
        f"{duration(seconds)} for the pass"
    )
    return Item("cost", "ok", text)


def _quick_look(stack: ParticleStack, output: Path | None) -> list[Item]:
    """Back-projections of a sample of each half at coarse voxels: contrast, signal, figures."""
    size = min(_VOXELS, stack.grid.size)
    halves = []
    for number in (1, 2):
        own = stack.only(number)
        rate = 4000 * (96 / stack.grid.size) ** 2
        count = min(len(own), _SAMPLE // 2, max(2, int(rate * _SECONDS / 2 / stack.symmetry.inserted)))
        sample = own.take(torch.linspace(0, len(own) - 1, count).long())
        halves.append(equations_of(sample, size if size < stack.grid.size else None))
    raw = tuple(part.solve() for part in halves)
    grid = Grid(size, stack.grid.length / size)
    whole = 0.5 * (raw[0] + raw[1])
    diameter = min(stack.diameter, 0.9 * grid.length)
    evident = is_evident((raw[0], raw[1]), grid, diameter)
    mask = particle_mask(whole, grid, diameter, evident)
    curve = fsc_curve(raw[0], raw[1], grid, mask)
    found = resolution(curve, 0.143)
    brightness = contrast(whole)
    count = sum(part.particles for part in halves)
    used = f"{count:,} particles on {size}³ voxels"
    said = spacing(found, 1 / float(curve.frequency[-1]))
    signal = Item("signal", "ok", f"half maps of a sample agree to {said} ({used})")
    if not evident:
        text = f"half maps of a sample do not agree ({used}): too few particles, wrong poses or wrong CTF?"
        signal = Item("signal", "look", text)
    kind = "bright" if stack.sign > 0 else "dark, and inverted"
    other = "without --invert" if stack.sign * stack.table.sign < 0 else "--invert"
    items = [signal]
    if brightness > 0.5:
        items.append(
            Item("contrast", "ok", f"protein is {kind}: the density stands {brightness:.1f} σ above its surroundings")
        )
    elif brightness < -0.5:
        text = f"the density is {-brightness:.1f} σ darker than its surroundings; try {other}"
        items.append(Item("contrast", "wrong" if evident else "look", text))
    else:
        items.append(
            Item("contrast", "look", f"taken as {kind}, but the sample does not tell; look at {SLICES_FIGURE}")
        )
    if output is not None:
        write_map(output / CHECK_MAP, whole, grid.pixel_size)
        directions(
            output,
            (raw[0] * mask, raw[1] * mask),
            None,
            grid,
            found or grid.nyquist,
            stack.table.poses.rotation[stack.rows],
            stack.symmetry,
        )
    return items
