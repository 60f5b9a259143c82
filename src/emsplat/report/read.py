"""Reading a run folder for its report, without torch; what cannot be used is an InputError that names the file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emsplat.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FULL_MAP = "run_class001.mrc"
FULL_MODEL = "run_class001.ply"
MASK = "mask.mrc"
LOCAL_RESOLUTION = "local_resolution.mrc"
LOCAL_RESOLUTION_HALF_MAPS = "local_resolution_half_maps.mrc"
SUMMARIES = ("summary.json", "nulltest.json", "check.json")
BAND = ("emsplatCrossValidatedLow", "emsplatCrossValidatedHigh")

_ABSCISSAE = ("rlnSpectralIndex", "rlnResolution", "rlnAngstromResolution")
_PLY_TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1"}


@dataclass(frozen=True)
class Volume:
    """A map [z, y, x] and its pixel size in Å."""

    values: NDArray[np.float32]
    pixel_size: float


@dataclass(frozen=True)
class Shells:
    """The table of ``fsc.star``: frequencies in 1/Å, curves by column, and the band of the cross-validated curve."""

    frequency: list[float]
    curves: dict[str, list[float]]
    band: tuple[list[float], list[float]] | None


@dataclass(frozen=True)
class Directions:
    """Maps [tilt, rot] of ``directions.csv``; cell centres in degrees; density 1 where views are uniform."""

    tilt: NDArray[np.float64]
    rot: NDArray[np.float64]
    fslc: NDArray[np.float64]
    conical_resolution: NDArray[np.float64]  # Å
    sampling: NDArray[np.float64] | None  # both None where the run knows no particles
    density: NDArray[np.float64] | None


@dataclass(frozen=True)
class Widths:
    """The standard deviations of every Gaussian in Å, (g, 3), smallest axis first."""

    sigma: NDArray[np.float64]

    @property
    def anisotropy(self) -> NDArray[np.float64]:
        """Largest over smallest standard deviation, (g)."""
        return self.sigma[:, 2] / self.sigma[:, 0]


def read_fsc(run: Path) -> Shells:
    """The curves of ``fsc.star``; entries that are not numbers become NaN."""
    from gemmi import cif

    path = run / "fsc.star"
    try:
        block = cif.read(str(path)).find_block("fsc")
        loops = [item.loop for item in block or () if item.loop is not None]
        columns = {
            tag.removeprefix("_"): [cif.as_number(value) for value in block.find_loop(tag)]
            for loop in loops
            for tag in loop.tags
        }
    except (OSError, ValueError, RuntimeError) as error:
        raise unreadable(path, error, "a STAR file") from error
    frequency = columns.get("rlnResolution", [])
    columns = {name: values for name, values in columns.items() if len(values) == len(frequency)}
    curves = {name: values for name, values in columns.items() if name not in (*_ABSCISSAE, *BAND)}
    if not curves or len(frequency) < 2 or not all(0 < k < math.inf for k in frequency[1:]):
        raise InputError(
            f"{path}: no FSC curve; expected data_fsc with rlnResolution and "
            "rlnFourierShellCorrelationUnmaskedMaps; run the reconstruction again"
        )
    low, high = (columns.get(name) for name in BAND)
    return Shells(frequency, curves, (low, high) if low and high else None)


def read_convergence(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and losses of each fit, in the order of the file."""
    fits: dict[str, tuple[list[float], list[float]]] = {}
    for row in _rows(run / "convergence.csv", ("step", "loss"), ("fit",)):
        steps, losses = fits.setdefault(str(row["fit"]), ([], []))
        steps.append(float(row["step"]))
        losses.append(float(row["loss"]))
    return fits


def read_scores(run: Path) -> dict[str, list[tuple[float, float, float]]]:
    """Epoch, number of Gaussians and score of each fit, in the order of ``scores.csv``."""
    fits: dict[str, list[tuple[float, float, float]]] = {}
    for row in _rows(run / "scores.csv", ("epoch", "gaussians", "score"), ()):
        entry = float(row["epoch"]), float(row["gaussians"]), float(row["score"])
        fits.setdefault(str(row.get("fit") or "all"), []).append(entry)
    return fits


def read_residual(run: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of ``residual.csv``: frequency in 1/Å, and power per shell as noise, own and other."""
    import numpy as np

    names = ("frequency", "noise", "own", "other")
    rows = list(_rows(run / "residual.csv", names, ()))
    table = {name: np.array([float(row[name]) for row in rows]) for name in names}
    if not np.isfinite(table["frequency"]).all():
        raise InputError(
            f"{run / 'residual.csv'}: a frequency is not a number; expected 1/Å; run the reconstruction again"
        )
    return table


def read_directions(run: Path) -> Directions:
    """The grid of ``directions.csv``; cells that the file leaves out are NaN."""
    import numpy as np

    path = run / "directions.csv"
    names = ["tilt", "rot", "fslc", "conical_resolution"]
    rows = list(_rows(path, names, ()))
    views = [name for name in ("sampling", "particles") if name in rows[0]]
    if len(views) == 2:
        names += views
        rows = list(_rows(path, names, ()))
    table = {name: np.array([float(row[name]) for row in rows]) for name in names}
    tilt, row = np.unique(table["tilt"], return_inverse=True)
    rot, column = np.unique(table["rot"], return_inverse=True)
    if len(tilt) < 2 or len(rot) < 2 or not np.isfinite([*tilt, *rot]).all():
        raise InputError(
            f"{path}: {len(tilt)} values of tilt and {len(rot)} of rot; expected a grid over the sphere; "
            "run the reconstruction again"
        )

    def grid(name: str) -> NDArray[np.float64]:
        values = np.full((len(tilt), len(rot)), np.nan)
        values[row, column] = table[name]
        return values

    if len(views) < 2:
        return Directions(tilt, rot, grid("fslc"), grid("conical_resolution"), None, None)
    particles = grid("particles")
    half = np.diff(tilt).min() / 2
    top, bottom = (np.radians(np.clip(tilt + shift, 0, 180)) for shift in (-half, half))
    solid_angle = (np.cos(top) - np.cos(bottom))[:, None] / (2 * len(rot))  # part of the sphere per cell
    density = particles / max(np.nansum(particles), 1) / np.maximum(solid_angle, 1e-12)
    return Directions(tilt, rot, grid("fslc"), grid("conical_resolution"), grid("sampling"), density)


def read_volume(path: Path) -> Volume:
    """A map as an array [z, y, x] of float32, with its pixel size."""
    import mrcfile
    import numpy as np

    try:
        with mrcfile.open(path) as file:
            values, pixel_size = np.array(file.data, dtype=np.float32), float(file.voxel_size.x)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, "an MRC volume") from error
    if values.ndim != 3 or min(values.shape) < 2 or not pixel_size > 0:
        raise InputError(
            f"{path}: array of {values.ndim} dimensions with pixel size {pixel_size:g} Å; "
            "expected a volume and a pixel size > 0; write the map again"
        )
    return Volume(values, pixel_size)


def read_full_map(run: Path) -> Volume:
    """The full map, all its values finite."""
    import numpy as np

    volume = read_volume(run / FULL_MAP)
    if not np.isfinite(volume.values).all():
        raise InputError(f"{run / FULL_MAP}: holds values that are not finite; expected a map; did the fit diverge?")
    return volume


def read_mask(run: Path, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Where ``mask.mrc`` exceeds 0.5; None where the folder has no mask."""
    return _same_grid(run / MASK, shape) > 0.5 if (run / MASK).exists() else None


def read_local_resolution(run: Path, shape: tuple[int, ...], name: str = LOCAL_RESOLUTION) -> NDArray[np.float32]:
    """Local resolution in Å, NaN where the map gives none."""
    import numpy as np

    path = run / name
    values = _same_grid(path, shape)
    known = np.isfinite(values) & (values > 0)
    if not known.any():
        raise InputError(f"{path}: no voxel has a resolution; expected Å; run the reconstruction again")
    return np.where(known, values, np.float32(np.nan))


def _same_grid(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = read_volume(path).values
    if values.shape != shape:
        raise InputError(
            f"{path}: {values.shape} voxels, but the map has {shape}; expected one grid; was a file replaced?"
        )
    return values


def read_examples(run: Path, most: int) -> list[tuple[NDArray[np.float32], ...]]:
    """Up to ``most`` triples of particle, projection and residual from ``examples.mrcs``."""
    import mrcfile
    import numpy as np

    path = run / "examples.mrcs"
    try:
        with mrcfile.open(path) as file:
            images = np.array(file.data, dtype=np.float32)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, "a stack of images") from error
    if images.ndim != 3 or len(images) == 0 or len(images) % 3 or min(images.shape[1:]) < 2:
        raise InputError(
            f"{path}: array of shape {images.shape}; expected particle, projection and residual for each example; "
            "run the reconstruction again"
        )
    images = np.nan_to_num(images, posinf=0, neginf=0)
    return [(images[i], images[i + 1], images[i + 2]) for i in range(0, min(len(images), 3 * most), 3)]


def read_widths(run: Path) -> Widths:
    """Standard deviations of the Gaussians of the full model, from the ``scale_*`` of its PLY file."""
    import numpy as np

    path = run / FULL_MODEL
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error, "a PLY file of Gaussians") from error
    head, found, body = content.partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    counts = [
        int(words[2]) for words in lines if words[:2] == ["element", "vertex"] and " ".join(words[2:]).isdecimal()
    ]
    fields = [(words[2], _PLY_TYPES.get(words[1])) for words in lines if words[:1] == ["property"] and len(words) == 3]
    names = [name for name, _ in fields]
    scales = [f"scale_{axis}" for axis in range(3)]
    known = all(kind for _, kind in fields) and len(set(names)) == len(names) and {*scales} <= {*names}
    if not found or ["format", "binary_little_endian", "1.0"] not in lines or len(counts) != 1 or not known:
        raise InputError(f"{path}: not a PLY file of Gaussians; expected one that emsplat wrote; write it again")
    record = np.dtype([(name, kind) for name, kind in fields if kind])
    if not 0 < counts[0] * record.itemsize <= len(body):
        raise InputError(
            f"{path}: {counts[0]} Gaussians need {counts[0] * record.itemsize} bytes and {len(body)} are there; "
            "expected at least one, and all of it; write it again"
        )
    table = np.frombuffer(body, record, counts[0])
    with np.errstate(over="ignore"):
        sigma = np.exp(np.stack([table[name] for name in scales], 1).astype(np.float64))
    if not np.isfinite(sigma).all() or not (sigma > 0).all():
        raise InputError(f"{path}: scale_* hold numbers that are no widths; expected ln(sigma in Å)")
    return Widths(np.sort(sigma, 1))


def read_summary(run: Path) -> dict[str, Any]:
    """The object that says what a folder holds: ``summary.json`` of a run, or what `check` and `nulltest` write."""
    path = next((run / name for name in SUMMARIES if (run / name).exists()), run / SUMMARIES[0])
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error, "a JSON object") from error
    if not isinstance(summary, dict):
        raise InputError(f"{path}: {type(summary).__name__}; expected a JSON object; run the reconstruction again")
    return summary


def read_summary_or_nothing(run: Path) -> dict[str, Any]:
    """The summary for what may be left out; the headline says what is wrong with it."""
    try:
        return read_summary(run)
    except InputError:
        return {}


def group(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A mapping inside the summary; empty where it is absent or something else."""
    found = summary.get(name)
    return found if isinstance(found, dict) else {}


def entries(summary: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A list of mappings inside the summary; empty where it is absent or something else."""
    found = summary.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def resolution(frequency: Sequence[float], values: Sequence[float], threshold: float) -> float | None:
    """`emsplat.assess.fsc.resolution` without torch; a test holds the two together."""
    shells = range(1, len(values))
    shell = next((s for s in shells if not values[s] >= threshold), len(values)) - 1
    return 1 / frequency[shell] if shell > 0 else None


def crossing(frequency: Sequence[float], values: Sequence[float], threshold: float) -> float | None:
    """`emsplat.assess.fsc.crossing` without torch; a test holds the two together."""
    shells = range(1, len(values))
    shell = next((s for s in shells if not values[s] >= threshold), len(values))
    if shell == 1:
        return None
    if shell == len(values) or math.isnan(values[shell]):
        return 1 / frequency[shell - 1]
    high, low = values[shell - 1 : shell + 1]
    start, end = frequency[shell - 1 : shell + 1]
    return 1 / (start + (end - start) * (high - threshold) / (high - low))


def last_crossing(frequency: Sequence[float], values: Sequence[float], threshold: float) -> float | None:
    """`emsplat.assess.fsc.last_crossing` without torch; a test holds the two together."""
    shell = max((s for s in range(1, len(values)) if values[s] >= threshold), default=0)
    return 1 / frequency[shell] if shell else None


def unreadable(path: Path, error: Exception, expected: str) -> InputError:
    """What the report says of a file that is missing or damaged."""
    reason = "missing" if not path.exists() else f"cannot be read ({' '.join(str(error).split())})"
    return InputError(f"{path}: {reason}; expected {expected}; was the run interrupted or the folder changed?")


def _rows(path: Path, numbers: Sequence[str], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a CSV table that has the named columns, ``numbers`` among them numeric."""
    expected = f"a CSV table with columns {', '.join((*texts, *numbers))}"
    count = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if any(row[name] is None for name in texts):
                    raise ValueError(f"row {count + 1} is cut short")
                yield row | {name: math.nan if row[name] == "" else float(row[name]) for name in numbers}
                count += 1
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise unreadable(path, error, expected) from error
    if not count:
        raise InputError(f"{path}: no rows; expected {expected}; was the run interrupted?")
