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
from emsplat.run import files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from emsplat.measures.curves import Curves


@dataclass(frozen=True)
class Volume:
    """A map [z, y, x] and its pixel size in Å."""

    values: NDArray[np.float32]
    pixel_size: float


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


def read_fsc(run: Path) -> Curves:
    """The curves of ``fsc.star``; entries that are not numbers are NaN."""
    import numpy as np

    from emsplat.run.fsc_star import read_fsc_star

    path = _there(run / files.FSC, "a STAR file")
    curves = read_fsc_star(path)
    frequency = curves.frequency
    if not curves.values or len(frequency) < 2 or not (np.isfinite(frequency) & (frequency > 0))[1:].all():
        raise InputError(f"{path}: no FSC curve; expected some over frequencies above 0; run the reconstruction again")
    return curves


def read_convergence(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and losses of each fit, in the order of the file."""
    fits: dict[str, tuple[list[float], list[float]]] = {}
    for row in _rows(run / files.CONVERGENCE, ("step", "loss"), ("fit",)):
        steps, losses = fits.setdefault(str(row["fit"]), ([], []))
        steps.append(float(row["step"]))
        losses.append(float(row["loss"]))
    return fits


def read_scores(run: Path) -> dict[str, list[tuple[float, float, float]]]:
    """Epoch, number of Gaussians and score of each fit, in the order of ``scores.csv``."""
    fits: dict[str, list[tuple[float, float, float]]] = {}
    for row in _rows(run / files.SCORES, ("epoch", "gaussians", "score"), ()):
        entry = float(row["epoch"]), float(row["gaussians"]), float(row["score"])
        fits.setdefault(str(row.get("fit") or "all"), []).append(entry)
    return fits


def read_residual(run: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of ``residual.csv``: frequency in 1/Å, and power per shell as noise, own and other."""
    import numpy as np

    names = ("frequency", "noise", "own", "other")
    rows = list(_rows(run / files.RESIDUAL, names, ()))
    table = {name: np.array([float(row[name]) for row in rows]) for name in names}
    if not np.isfinite(table["frequency"]).all():
        raise InputError(
            f"{run / files.RESIDUAL}: a frequency is not a number; expected 1/Å; run the reconstruction again"
        )
    return table


def read_poses(run: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of ``poses.csv``: rot and tilt of each particle before ("given") and after, how far it moved and what is
    left uncertain, in degrees and Å."""
    import numpy as np

    names = ["rot_given", "tilt_given", "rot", "tilt"]
    names += ["angle_moved", "shift_moved", "angle_uncertainty", "shift_uncertainty"]
    rows = list(_rows(run / files.POSES, names, ()))
    table = {name: np.array([float(row[name]) for row in rows]) for name in names}
    for name, values in table.items():
        if not np.isfinite(values).all():
            raise InputError(f"{run / files.POSES}: {name} is not a number in some row; run the refinement again")
    return table


def read_directions(run: Path) -> Directions:
    """The grid of ``directions.csv``; cells that the file leaves out are NaN."""
    import numpy as np

    path = run / files.DIRECTIONS
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
    from emsplat.io.mrc_arrays import read_array

    stored = read_array(_there(path, "an MRC volume"))
    return Volume(stored.values, stored.pixel_size)


def shown_map(run: Path) -> str:
    """The map that a folder is about: the full map of a run, or the quick look of a check."""
    is_check = (run / files.CHECK_MAP).exists() and not (run / files.FULL_MAP).exists()
    return files.CHECK_MAP if is_check else files.FULL_MAP


def read_full_map(run: Path) -> Volume:
    """The full map, all its values finite."""
    import numpy as np

    volume = read_volume(run / shown_map(run))
    if not np.isfinite(volume.values).all():
        raise InputError(
            f"{run / shown_map(run)}: holds values that are not finite; expected a map; did the fit diverge?"
        )
    return volume


def read_mask(run: Path, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Where ``mask.mrc`` exceeds 0.5; None where the folder has no mask."""
    return _same_grid(run / files.MASK, shape) > 0.5 if (run / files.MASK).exists() else None


def read_local_resolution(run: Path, shape: tuple[int, ...], name: str = files.LOCAL_RESOLUTION) -> NDArray[np.float32]:
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
    import numpy as np

    from emsplat.io.mrc_arrays import StackFile

    path = _there(run / files.EXAMPLES, "a stack of images")
    stack = StackFile(path)
    if stack.count % 3:
        raise InputError(
            f"{path}: {stack.count} images; expected particle, projection and residual for each example; run the "
            "reconstruction again"
        )
    images = np.zeros((min(stack.count, 3 * most), stack.box, stack.box), np.float32)
    stack.read_into(images, range(len(images)), range(len(images)))
    images = np.nan_to_num(images, posinf=0, neginf=0)
    return [(images[i], images[i + 1], images[i + 2]) for i in range(0, len(images), 3)]


def read_widths(run: Path) -> Widths:
    """Standard deviations of the Gaussians of the full model, from the ``scale_*`` of its PLY file."""
    import numpy as np

    from emsplat.io.ply_arrays import read_vertices

    path = _there(run / files.FULL_MODEL, "a PLY file of Gaussians")
    logarithm = read_vertices(path).columns("scale_0", "scale_1", "scale_2")
    with np.errstate(over="ignore"):
        sigma = np.exp(logarithm.astype(np.float64))
    if not np.isfinite(sigma).all() or not (sigma > 0).all():
        raise InputError(f"{path}: scale_* hold numbers that are no widths; expected ln(sigma in Å)")
    return Widths(np.sort(sigma, 1))


def read_summary(run: Path) -> dict[str, Any]:
    """The object that says what a folder holds: ``summary.json`` of a run, or what `check` and `nulltest` write."""
    return read_json(next((run / name for name in files.SUMMARIES if (run / name).exists()), run / files.SUMMARIES[0]))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
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


def pair(summary: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Two numbers inside the summary; NaN where they are absent or something else."""
    match summary.get(name):
        case [int() | float() as one, int() | float() as other]:
            return float(one), float(other)
        case _:
            return math.nan, math.nan


def read_landscape(run: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of ``landscape.csv``; free energies are NaN where too few images are."""
    import numpy as np

    names = ("z1", "z2", "free_energy", "error")
    rows = list(_rows(run / files.LANDSCAPE, names, ()))
    return {name: np.array([row[name] for row in rows]) for name in names}


def read_free_energy(run: Path) -> dict[str, dict[str, list[float]]]:
    """Place, free energy, error and both halves' along each component, from ``free_energy.csv``."""
    names = ("place", "free_energy", "error", "half1", "half2")
    found: dict[str, dict[str, list[float]]] = {}
    for row in _rows(run / files.FREE_ENERGY, names, ("component",)):
        own = found.setdefault(str(row["component"]), {name: [] for name in names})
        for name in names:
            own[name].append(row[name])
    return found


def unreadable(path: Path, error: Exception, expected: str) -> InputError:
    """What the report says of a file that is missing or damaged."""
    reason = "missing" if not path.exists() else f"cannot be read ({' '.join(str(error).split())})"
    return InputError(f"{path}: {reason}; expected {expected}; was the run interrupted or the folder changed?")


def _there(path: Path, expected: str) -> Path:
    """The path of a file that has to be there."""
    if not path.exists():
        raise unreadable(path, FileNotFoundError(), expected)
    return path


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
