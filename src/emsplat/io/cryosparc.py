"""cryoSPARC's particle files (.cs): numpy structured arrays, one row per particle (docs/conventions.md, 5)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from emsplat.errors import InputError
from emsplat.imaging.ctf import beam_tilt, tilt_of_coma
from emsplat.io.files import replacing, require_file, require_finite
from emsplat.io.paths import Names, find_stacks, group_equal
from emsplat.io.table import OpticsGroup, ParticleTable, doubts, refuse_impossible
from emsplat.types import Aberrations, Optics, Poses

Array = NDArray[Any]

_NPY = b"\x93NUMPY"
_LONGEST_HEADER = 100_000  # bytes: wide tables exceed numpy's own limit
_STAR = "rln/"  # fields of our own, for columns of STAR files
_GROUP_NAME = f"{_STAR}OpticsGroupName"
# What a `ParticleTable` carries from one format to another.
_CARRIED = {
    *("uid", "blob/path", "blob/idx", "blob/shape", "blob/psize_A", "blob/sign", "ctf/type", "ctf/exp_group_id"),
    *("ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast", "ctf/df1_A", "ctf/df2_A", "ctf/df_angle_rad", "ctf/bfactor"),
    *("ctf/phase_shift_rad", "ctf/scale", "ctf/tilt_A", "ctf/anisomag", "alignments3D/split", "alignments3D/shift"),
    *("alignments3D/pose", "alignments3D/psize_A", "alignments3D/class", "alignments3D/alpha"),
    *("location/micrograph_path", "location/micrograph_uid", "location/micrograph_shape"),
    *("location/micrograph_psize_A", "location/center_x_frac", "location/center_y_frac"),
}
_TOO_MANY = 10**9  # images of a stack, pixels of a box
_COUNTED = 2**48
_SIGNS = (-1.0, 1.0)
_TOMOGRAPHY = re.compile(r"(sub)?tomo|tilt_?series", re.IGNORECASE)
_POSE = re.compile(r"(alignments3D|alignments3D_multi|alignments_class_\d+)/pose")
_METAFILE = re.compile(r"^\s*metafile:\s*['\"]?>?([^'\"\n]+?\.cs)['\"]?\s*$", re.MULTILINE)
_LARGEST = float(np.finfo(np.float32).max)


def read_cs(
    path: Path,
    datadir: Path | None = None,
    passthrough: Sequence[Path] = (),
    *,
    need_stacks: bool = True,
    need_poses: bool = True,
) -> ParticleTable:
    """Particles of a .cs file in house units.

    Fields that the file lacks are taken from ``passthrough`` files, or else from files named
    ``*passthrough_particles*.cs`` beside it, joined on ``uid``. Poses: ``alignments3D``, else the class of highest
    posterior of ``alignments3D_multi`` or ``alignments_class_<i>``; shifts are in pixels of ``alignments3D/psize_A``.
    ``blob/sign`` is the contrast. Copies of a symmetry-expanded particle go to one half-set. Without ``need_stacks``
    image stacks may be missing, without ``need_poses`` poses.

    Raises:
        InputError: unreadable file, missing fields or stacks, values that are not finite, images of both signs.
    """
    fields = _Fields(path, passthrough)
    _refuse_tomography(fields)
    names = [name.lstrip(">") for name in fields.text("blob/path")]
    index, shape = fields.integers("blob/idx"), fields.integers("blob/shape", 2)
    if (index < 0).any() or (shape < 1).any() or (shape[:, 0] != shape[:, 1]).any():
        raise InputError(f"{path}: blob/idx below 0 or images without size or not square; expected extracted particles")
    pixel_size = fields.numbers("blob/psize_A")
    if not pixel_size.min() > 0:
        raise InputError(f"{path}: blob/psize_A is {pixel_size.min():g}; expected a pixel size above 0")
    notes = list[str]()
    optics = _optics(fields, notes)
    alignment, rotation, shift, particle_class = _poses(fields, pixel_size, need_poses)
    optics = replace(optics, scale=optics.scale * _alpha(fields, alignment, notes))
    notes += doubts(path, optics)
    group, groups = _optics_groups(fields, pixel_size, shape[:, 0], optics)
    source = _sources(fields)
    sign = _sign(fields)
    found = find_stacks(names, path, datadir, required=need_stacks)
    coordinates, micrograph_pixel_size = _coordinates(fields)
    uid = torch.from_numpy(fields.raw("uid").astype(np.uint64).view(np.int64)) if _is_whole(fields, "uid") else None
    micrograph = next(
        (fields.text(name) for name in ("location/micrograph_uid", "location/micrograph_path") if fields.has(name)),
        names,
    )
    return ParticleTable(
        sources=(path,),
        source=torch.zeros(len(fields), dtype=torch.int64),
        row=torch.arange(len(fields)),
        poses=Poses(rotation, torch.from_numpy(shift)),
        optics=optics,
        groups=groups,
        optics_group=torch.from_numpy(group),
        half=_half_sets(fields, alignment.groups[0], source),
        micrograph=group_equal(micrograph),
        stacks=found.paths,
        stack=found.stack,
        image=torch.from_numpy(index),
        particle_class=particle_class,
        micrograph_names=_micrograph_names(fields, micrograph),
        uid=uid,
        origin=_drawn(uid) if source is None else torch.from_numpy(source.view(np.int64)),
        warnings=(*fields.warnings, *notes, *found.notes),
        notes=tuple(fields.notes),
        sign=sign,
        folders=found.folders,
        passthrough=tuple(passthrough),
        coordinates=coordinates,
        micrograph_pixel_size=micrograph_pixel_size,
    )


def read_group(path: Path) -> tuple[Path, list[Path]]:
    """The .cs file that a .csg file of cryoSPARC stands for, and the passthrough files that it lists with it.

    Raises:
        InputError: it cannot be read, or names no .cs file.
    """
    require_file(path, "a cryoSPARC .csg file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a cryoSPARC .csg file") from error
    names = list(dict.fromkeys(_METAFILE.findall(text)))
    if not names:
        raise InputError(f"{path}: names no metafile that ends with .cs; give the .cs file itself")
    files = [path.parent / name for name in names]
    own = next((file for file in files if "passthrough" not in file.name), files[0])
    return own, [file for file in files if file != own]


def cs_columns(table: ParticleTable) -> tuple[dict[str, list[str]], list[str]]:
    """What .cs files hold besides that which a table carries: columns of a STAR file that `write_cs` has kept, with the
    text of each particle, and the names of other fields.

    Raises:
        InputError: a source is no longer readable.
    """
    passthrough = table.passthrough if len(table.sources) == 1 else ()
    own = [_Fields(path, passthrough).joined() for path in table.sources]
    names = [list(data.dtype.names or ()) for data in own]
    ours = [name for name in names[0] if name.startswith(_STAR) and all(name in other for other in names)]
    kept = [name for name in ours if name != _GROUP_NAME]
    places = list(zip(table.source.tolist(), table.row.tolist(), strict=True))
    columns = {}
    for name in kept:
        texts = [[value.decode(errors="replace") for value in data[name].astype("S").tolist()] for data in own]
        columns[name.removeprefix(_STAR)] = [texts[source][row] for source, row in places]
    other = dict.fromkeys(name for one in names for name in one if name not in {*_CARRIED, *ours})
    return columns, list(other)


def cs_names(path: Path) -> list[str]:
    """Fields of a .cs file and its passthrough files that a table does not carry.

    Raises:
        InputError: it cannot be read.
    """
    return [name for name in dict.fromkeys(_Fields(path, ()).names) if name not in _CARRIED]


def cs_image_keys(path: Path) -> Iterator[tuple[int, str]]:
    """0-based index and stack of each particle, as written."""
    fields = _Fields(path, ())
    index = fields.integers("blob/idx").tolist()
    return zip(index, (name.lstrip(">") for name in fields.text("blob/path")), strict=True)


def _refuse_tomography(fields: _Fields) -> None:
    volumes = fields.has("blob/shape") and fields.raw("blob/shape").shape[1:] == (3,)
    field = next((name for name in fields.names if _TOMOGRAPHY.match(name)), None)
    if volumes or field is not None:
        raise InputError(
            f"{fields.path}: {'images of three dimensions (blob/shape)' if volumes else f'a field {field}'}, as "
            "tomography has it; tilt series and subtomograms are not read, expected single particles"
        )


class _Fields:
    """The columns of a .cs file and of the files that pass through what it lacks."""

    def __init__(self, path: Path, passthrough: Sequence[Path]) -> None:
        self.path = path
        self._own = _read(path)
        if not len(self._own):
            raise InputError(f"{path}: holds no particles; expected at least one")
        self._others: list[tuple[Path, Array, Array]] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []  # what was done and is right: no warning
        self._named = bool(passthrough)  # and then the first that has a field is meant
        # A link to the file of a job has its passthrough files beside its target.
        near = dict.fromkeys((path.absolute().parent, path.resolve().parent)) if not passthrough else {}
        beside = [p for folder in near for p in sorted(folder.glob("*passthrough_particles*.cs"))]
        for other in passthrough or [p for p in beside if p not in (path.absolute(), path.resolve())]:
            rows = self._join(other, required=bool(passthrough))
            if rows is not None:
                self._others.append((other, *rows))

    def __len__(self) -> int:
        return len(self._own)

    def _join(self, other: Path, *, required: bool) -> tuple[Array, Array] | None:
        """The other file and its row for each of ours."""
        data = _read(other)
        mine, theirs = (a["uid"] if "uid" in (a.dtype.names or ()) else None for a in (self._own, data))
        if mine is None or theirs is None or not _identify(mine) or not _identify(theirs):
            raise InputError(f"{other}: no field uid to join it with {self.path}; expected a file of the same job")
        order = np.argsort(theirs, kind="stable")
        place = np.searchsorted(theirs, mine, sorter=order).clip(max=max(len(theirs) - 1, 0))
        if not len(theirs) or (theirs[order[place]] != mine).any():
            if required:
                raise InputError(
                    f"{other}: lacks some of the particles of {self.path} (by uid); expected a file of the same job"
                )
            return None
        return data, order[place]

    def has(self, name: str) -> bool:
        return any(name in (data.dtype.names or ()) for data in (self._own, *(d for _, d, _ in self._others)))

    @property
    def own(self) -> list[str]:
        """The columns of the file itself."""
        return list(self._own.dtype.names or ())

    @property
    def names(self) -> list[str]:
        return [name for data in (self._own, *(d for _, d, _ in self._others)) for name in data.dtype.names or ()]

    def raw(self, name: str) -> Array:
        """A column as it is in the file."""
        if name in (self._own.dtype.names or ()):
            return np.asarray(self._own[name])
        having = [(other, data[name][rows]) for other, data, rows in self._others if name in (data.dtype.names or ())]
        if not having:
            raise InputError(f"{self.path}: no field {name}; {_remedy(name)}")
        other, values = having[0]
        for another, others in having[1:] if not self._named else []:
            if values.dtype.kind != others.dtype.kind or not np.array_equal(values, others):
                raise InputError(
                    f"{self.path}: {name} may be that of {other} or of {another}, which differ; name the one that is "
                    "meant with --passthrough"
                )
        note = f"{self.path}: fields that it lacks are taken from {other}"
        if note not in self.notes:
            self.notes.append(note)
        return np.asarray(values)

    def joined(self) -> Array:
        """The file with what it lacks from the files that pass it through, but for columns in which these differ."""
        columns = {}
        for name in dict.fromkeys(self.names):
            with suppress(InputError):
                columns[name] = self.raw(name)
        return _with(self._own, columns)

    def text(self, name: str) -> list[str]:
        values = self.raw(name)
        if values.ndim != 1:
            raise InputError(f"{self.path}: {name} has {values.ndim} dimensions; expected one value per particle")
        if values.dtype.kind == "S":
            try:
                return [value.decode("utf-8") for value in values.tolist()]
            except UnicodeDecodeError as error:
                raise InputError(f"{self.path}: {name} is not UTF-8 text ({error}); repair the file") from error
        return [str(value) for value in values.tolist()]

    def numbers(self, name: str, *inner: int, default: float | None = None, finite: bool = True) -> NDArray[np.float64]:
        """A numeric column with ``inner`` values per particle (0: any number of them), every value ``finite``."""
        if default is not None and not self.has(name):
            return np.full((len(self), *inner), default)
        raw = self.raw(name)
        wanted = len(inner) == raw.ndim - 1 and all(a in (0, b) for a, b in zip(inner, raw.shape[1:], strict=False))
        if raw.dtype.kind not in "fiub" or not wanted:
            raise InputError(
                f"{self.path}: {name} has type {raw.dtype} and shape {raw.shape[1:]} per particle; expected "
                f"{inner or 'one'} numbers"
            )
        with np.errstate(invalid="ignore", over="ignore"):  # not a number, or too large a one: refused below
            values = raw.astype(np.float64)
        if finite:
            self.require_finite(lambda _: name, values)
        return values

    def require_finite(self, name: Callable[[int], str], values: NDArray[np.float64]) -> None:
        """
        Raises:
            InputError: a value is not; the row and the ``name`` of its column are said.
        """
        bad = np.flatnonzero(~(np.abs(values) <= _LARGEST).reshape(len(values), -1).all(1))
        if len(bad):
            raise InputError(
                f"{self.path}, row {bad[0] + 1}: {name(int(bad[0]))} is {values[bad[0]]}; expected finite numbers, "
                "repair the file or leave the particle out"
            )

    def integers(self, name: str, *inner: int) -> NDArray[np.int64]:
        return self.whole(name, self.numbers(name, *inner))

    def whole(self, name: str, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Values of a column as integers."""
        if ((values != np.rint(values)) | (np.abs(values) >= _TOO_MANY)).any():
            raise InputError(f"{self.path}: {name} has values up to {values.max():g}; expected whole numbers")
        return values.astype(np.int64)

    def first(self, name: str) -> NDArray[np.float64]:
        """A number per particle; the first of its classes where there is one for each."""
        if self.raw(name).ndim == 1:
            return self.numbers(name)
        values = self.numbers(name, 0)
        if not values.shape[1]:
            raise InputError(f"{self.path}: {name} has no values; expected one for each class")
        return values[:, 0]


def _identify(uid: Array) -> bool:
    return uid.ndim == 1 and uid.dtype.kind in "iu"


def _read(path: Path) -> Array:
    require_file(path, "a cryoSPARC .cs file")
    try:
        with path.open("rb") as file:
            start = file.read(12)
        if not start.startswith(_NPY):
            raise InputError(
                f"{path}: not a numpy array; newer cryoSPARC can write compressed CSDAT files, which only its own "
                "tools read; expected a plain .cs file, export the particles from their job"
            )
        header = int.from_bytes(start[8 : 10 if start[6] == 1 else 12], "little") if len(start) == 12 else 0
        if header > min(_LONGEST_HEADER, path.stat().st_size):
            raise ValueError(f"a header of {header} bytes")
        # Mapped, so that the word of the header is compared with the length of the file before memory is taken.
        data = np.array(np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=_LONGEST_HEADER))
    except InputError:
        raise
    except Exception as error:
        text = str(error)[:200] or type(error).__name__
        raise InputError(f"{path}: cannot be read ({text}); expected a cryoSPARC .cs file; was it cut off?") from error
    if not isinstance(data, np.ndarray) or data.dtype.names is None or data.ndim != 1:
        raise InputError(f"{path}: not a table of particles; expected a cryoSPARC .cs file")
    return data


def _remedy(name: str) -> str:
    if name.startswith(("blob/", "ctf/")):
        return "give the job's *_passthrough_particles.cs with --passthrough, or export the particles"
    return "take the .cs file of a refinement"


def _optics(fields: _Fields, notes: list[str]) -> Optics:
    values: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(fields.numbers(f"ctf/{field}", default=default)))
        for name, field, default in (
            ("voltage", "accel_kv", None),
            ("cs", "cs_mm", None),
            ("amplitude_contrast", "amp_contrast", None),
            ("defocus_u", "df1_A", None),
            ("defocus_v", "df2_A", None),
            ("defocus_angle", "df_angle_rad", None),
            ("phase_shift", "phase_shift_rad", 0.0),
            ("b_factor", "bfactor", 0.0),
            ("scale", "scale", 1.0),
        )
    }
    optics = Optics(**values)
    refuse_impossible(fields.path, optics, ("ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast"))
    return replace(optics, aberrations=_aberrations(fields, optics, notes))


def _aberrations(fields: _Fields, optics: Optics, notes: list[str]) -> Aberrations | None:
    """Beam tilt and anisotropic magnification; None where both are 0. What else is set is noted.

    ``ctf/tilt_A`` is Cs times the sine of the tilt, ``ctf/anisomag`` the matrix on frequencies less the identity.
    """
    unused = [
        f"ctf/{name}"
        for name, width in (("shift_A", 2), ("trefoil_A", 2), ("tetra_A", 4))
        if fields.has(f"ctf/{name}") and np.abs(fields.numbers(f"ctf/{name}", width)).max(initial=0) > 1e-6
    ]
    if unused:
        notes.append(
            f"{fields.path}: {', '.join(unused)} are set, whose units are not published; they are not used, and detail "
            "finer than about 3 Å may suffer; refine them in RELION to have them in the STAR file"
        )
    tilt = fields.numbers("ctf/tilt_A", 2, default=0.0)
    stretch = fields.numbers("ctf/anisomag", 4, default=0.0)
    if not tilt.any() and not stretch.any():
        return None
    if not (np.abs(stretch) < 0.3).all():
        raise InputError(f"{fields.path}: ctf/anisomag is up to {np.abs(stretch).max():.3g}; expected a small stretch")
    cs = 1e7 * optics.cs.numpy()
    sine = np.divide(tilt, cs[:, None], out=np.zeros_like(tilt), where=cs[:, None] != 0)
    if not (np.abs(sine) < 0.1).all():
        raise InputError(f"{fields.path}: ctf/tilt_A stands for {np.abs(sine).max():.3g} rad; expected mrad")
    return Aberrations(
        torch.from_numpy(np.eye(2) + stretch.reshape(-1, 2, 2)),
        beam_tilt(torch.from_numpy(1e3 * np.arcsin(sine)), optics.voltage, optics.cs),
        torch.zeros(len(tilt), 0, dtype=torch.float64),
    )


@dataclass(frozen=True)
class _Alignment:
    """Which fields say how particles are aligned, and which class each belongs to where they say it for several."""

    groups: tuple[str, ...] = ("alignments3D",)  # one, or one for each class
    best: NDArray[np.int64] | None = None  # place of the class, in ``groups`` or in the values of a particle
    within: int = 0  # classes whose values a particle has in one field

    def missing(self, fields: _Fields, name: str) -> list[str]:
        """The fields of this name that are not there."""
        return [field for group in self.groups if not fields.has(field := f"{group}/{name}")]

    def name_of(self, name: str, row: int) -> str:
        """The field that a particle's value stands in."""
        place = 0 if self.best is None or self.within else int(self.best[row])
        return f"{self.groups[place]}/{name}"

    def numbers(self, fields: _Fields, name: str, *inner: int) -> NDArray[np.float64]:
        """``inner`` values of each particle, those of its class; of other classes they need not be finite."""
        first = f"{self.groups[0]}/{name}"
        rows = np.arange(len(fields))
        if self.best is None:
            return fields.numbers(first, *inner) if inner else fields.first(first)
        if self.within and not inner and fields.raw(first).shape[1:] in ((), (1,)):  # the same for all classes
            return fields.first(first)
        if self.within:
            values = fields.numbers(first, self.within, *inner, finite=False)[rows, self.best]
        else:
            each = [fields.numbers(f"{group}/{name}", *inner, finite=False) for group in self.groups]
            values = np.stack(each)[self.best, rows]
        fields.require_finite(lambda row: self.name_of(name, row), values)
        return values


def _alpha(fields: _Fields, alignment: _Alignment, notes: list[str]) -> Tensor:
    """cryoSPARC's scale of each particle, where there is a sensible one."""
    missing = alignment.missing(fields, "alpha")
    if missing and len(missing) < len(alignment.groups):
        notes.append(f"{fields.path}: no {missing[0]}, though other classes have it; it is not used of any")
    if missing:
        return torch.ones(len(fields), dtype=torch.float64)
    alpha = torch.from_numpy(np.ascontiguousarray(alignment.numbers(fields, "alpha")))
    below = (alpha <= 0).nonzero()[:, 0]
    if len(below):
        name = alignment.name_of("alpha", int(below[0]))
        notes.append(f"{fields.path}: {name} is not above 0 for all particles; it is not used")
        return torch.ones_like(alpha)
    return alpha


def _alignment(fields: _Fields) -> tuple[_Alignment, NDArray[np.int64] | None] | None:
    """How particles are aligned, and the number of each one's class; None where the file does not say.

    Fields of the file itself, of whatever kind, go before those of its passthrough files, which are of an earlier job.
    """
    names = next((names for names in (fields.own, fields.names) if any(map(_POSE.fullmatch, names))), [])
    if "alignments3D/pose" in names:
        single, name = _Alignment(), "alignments3D/class"
        return single, fields.whole(name, fields.first(name)) if fields.has(name) else None
    if "alignments3D_multi/pose" in names:
        name = "alignments3D_multi/class_posterior"
        posterior = fields.numbers(name, 0)
        if not posterior.shape[1]:
            raise InputError(f"{fields.path}: {name} has no classes; expected at least one")
        best = posterior.argmax(1)
        return _Alignment(("alignments3D_multi",), best, posterior.shape[1]), best
    numbers = {m[1]: int(m[2]) for name in names if (m := re.fullmatch(r"(alignments_class_(\d+))/pose", name))}
    if not numbers:
        return None
    classes = tuple(sorted(numbers, key=lambda group: numbers[group]))
    best = np.stack([fields.numbers(f"{group}/class_posterior") for group in classes]).argmax(0)
    return _Alignment(classes, best), np.array([numbers[group] for group in classes])[best]


def _poses(
    fields: _Fields, pixel_size: NDArray[np.float64], needed: bool
) -> tuple[_Alignment, Tensor, NDArray[np.float64], Tensor | None]:
    """Where they come from, rotations, shifts in Å, and the class of each particle."""
    found = _alignment(fields)
    if found is None and needed:
        raise InputError(
            f"{fields.path}: no 3D poses (alignments3D/pose); emsplat needs particles with known orientations, "
            "take the .cs file of a refinement, or find them with `emsplat abinitio`"
        )
    if found is None:
        unturned = torch.eye(3, dtype=torch.float64).repeat(len(fields), 1, 1)
        return _Alignment(), unturned, np.zeros((len(fields), 2)), None
    alignment, number = found
    pose, shift = alignment.numbers(fields, "pose", 3), alignment.numbers(fields, "shift", 2)
    spacing = _spacing(fields, alignment, pixel_size)
    # cryoSPARC's axis and angle turn image into object coordinates (docs/conventions.md, 2).
    rotation = Rotation.from_rotvec(pose).as_matrix().transpose(0, 2, 1)
    classes = None if number is None else torch.from_numpy(number.astype(np.int64))
    return alignment, torch.from_numpy(np.ascontiguousarray(rotation)), shift * spacing[:, None], classes


def _spacing(fields: _Fields, alignment: _Alignment, pixel_size: NDArray[np.float64]) -> NDArray[np.float64]:
    """The pixels in Å that shifts are counted in; those of the images where the file does not say."""
    missing = alignment.missing(fields, "psize_A")
    spacing = np.zeros(len(fields)) if missing else alignment.numbers(fields, "psize_A")
    unset = spacing == 0
    if (spacing < 0).any() or (unset.any() and not unset.all()):
        row = int(np.flatnonzero(spacing <= 0)[0])
        name = alignment.name_of("psize_A", row)
        raise InputError(
            f"{fields.path}, row {row + 1}: {name} is {spacing[row]:g}, but shifts are in pixels of this size; "
            "expected Å above 0, repair the file or leave such particles out"
        )
    if not unset.all():
        return spacing
    why = f"{missing[0]} is missing" if missing else f"{alignment.name_of('psize_A', 0)} is 0 for all particles"
    fields.warnings.append(f"{fields.path}: {why}; shifts are taken in pixels of the images (blob/psize_A)")
    return pixel_size


def _optics_groups(
    fields: _Fields, pixel_size: NDArray[np.float64], box: NDArray[np.int64], optics: Optics
) -> tuple[NDArray[np.int64], tuple[OpticsGroup, ...]]:
    """Particles of one exposure group, pixel size, box, microscope and aberration belong together."""
    exposure = fields.numbers("ctf/exp_group_id", default=0.0)
    microscope = [values.numpy() for values in (optics.voltage, optics.cs, optics.amplitude_contrast)]
    bent = optics.aberrations
    bends = [] if bent is None else [*bent.magnification.reshape(-1, 4).numpy().T, *bent.odd.numpy().T]
    original = np.nan_to_num(fields.numbers("location/micrograph_psize_A", default=0.0, finite=False), posinf=0.0)
    keys = np.stack([exposure, pixel_size.round(5), box, *microscope, original, *bends], axis=1)
    unique, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    names = fields.text(_GROUP_NAME) if fields.has(_GROUP_NAME) else [f"exp_group_{int(number)}" for number in exposure]
    groups = tuple(
        OpticsGroup(names[row], float(values[1]), int(values[2]), float(original[row]) if original[row] > 0 else None)
        for row, values in zip(first.tolist(), unique, strict=True)
    )
    return group.reshape(-1).astype(np.int64), groups


def _coordinates(fields: _Fields) -> tuple[Tensor | None, Tensor | None]:
    """Where particles lie in their micrographs, in pixels from the first row and column as RELION counts them, and the
    size of these pixels in Å; None where that is not said.

    cryoSPARC has fractions, y from the last row (docs/conventions.md, 5). What is no number is a place that is not
    known.
    """
    if not all(fields.has(f"location/{name}") for name in ("center_x_frac", "center_y_frac", "micrograph_shape")):
        return None, None
    rows, columns = fields.numbers("location/micrograph_shape", 2, finite=False).T
    x, y = (fields.numbers(f"location/center_{axis}_frac", finite=False) for axis in "xy")
    pixels = np.stack([x * columns, (1 - y) * rows], 1)
    pixels[~(np.abs(pixels) <= _LARGEST).all(1)] = np.nan
    named = fields.has("location/micrograph_uid") or fields.has("location/micrograph_path")
    size = fields.numbers("location/micrograph_psize_A", default=0.0, finite=False)
    size[~((size > 0) & (size <= _LARGEST))] = np.nan
    return torch.from_numpy(pixels), torch.from_numpy(size) if named else None


def _micrograph_names(fields: _Fields, keys: Sequence[str]) -> tuple[str, ...]:
    """A name for each different key, in order of appearance, where the file tells micrographs apart."""
    if not fields.has("location/micrograph_path"):
        known = fields.has("location/micrograph_uid")
        return tuple(f"micrograph_{key}" for key in dict.fromkeys(keys)) if known else ()
    name_of: dict[str, str] = {}
    for key, name in zip(keys, fields.text("location/micrograph_path"), strict=True):
        name_of.setdefault(key, name.lstrip(">"))
    return tuple(name_of.values())


def _is_whole(fields: _Fields, name: str) -> bool:
    return fields.has(name) and _identify(fields.raw(name))


def write_cs(
    path: Path,
    table: ParticleTable,
    half: Tensor | None,
    *,
    new_images: bool = False,
    more: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Particles as a .cs file; of one .cs file with all its fields and those of its passthrough files, else with those
    that cryoSPARC's refinements use. What the table has ``changed``, the other hand, and ``new_images``, which are
    others than those of the source, take the place of the source's fields.

    Paths of images stay where they lead to the same stacks from ``path`` too, else they are absolute. ``more`` are
    columns of a STAR file (without "rln") for which cryoSPARC has no field; they are kept as text in fields named
    rln/... of our own. Shifts are in pixels of ``alignments3D/psize_A``, which is the pixel size of the images.

    Raises:
        InputError: the source is no longer readable.
        OutputError: it cannot be written.
    """
    if len(table.sources) == 1 and table.sources[0].suffix.lower() == ".cs":
        data = _updated(
            _Fields(table.sources[0], table.passthrough).joined()[table.row.numpy()], table, half, new_images
        )
        if not new_images:
            data = _with(data, {"blob/path": _kept_paths(path, table, data["blob/path"])})
    else:
        data = _built(table, half, more or {})
        for name in data.dtype.names or ():
            if data.dtype[name].base.kind == "f":
                require_finite(path, name, data[name])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, data, allow_pickle=False)


def _updated(data: Array, table: ParticleTable, half: Tensor | None, new_images: bool) -> Array:
    """Rows of a .cs file with what is no longer as it was when they were read."""
    there = data.dtype.names or ()
    moved = new_images or table.mirrored or "poses" in table.changed
    stale = {name for name in there if moved and name.startswith(("alignments3D_multi/", "alignments_class_"))}
    fresh = set[str]()
    columns = dict[str, Array]()
    if moved:
        fresh |= {f"alignments3D/{name}" for name in ("pose", "shift", "psize_A")}
    if stale or "ctf" in table.changed:
        # The scale that was read or found stands for both factors of cryoSPARC's.
        fresh |= {"ctf/scale"}
        alphas = (name for name in there if name.startswith("alignments") and name.endswith("/alpha"))
        columns |= {name: np.ones_like(data[name]) for name in alphas if name not in stale}
    if stale:
        fresh |= {"alignments3D/class"}
    if new_images:
        stale |= {name for name in there if name.startswith("blob/")}
        fresh |= {f"blob/{name}" for name in ("path", "idx", "shape", "psize_A", "sign")}
        columns |= _places(data, table)
    if "ctf" in table.changed:
        fresh |= {f"ctf/{name}" for name in ("df1_A", "df2_A", "bfactor")}
    if "aberrations" in table.changed:
        fresh |= {"ctf/tilt_A", "ctf/anisomag"}
    if fresh:
        built = _built(table, half, {})
        columns |= {name: built[name] for name in built.dtype.names or () if name in fresh}
    if half is not None:
        groups = {name.partition("/")[0] for name in {*there, *columns} - stale if _POSE.fullmatch(name)}
        for name in (f"{group}/split" for group in groups or ("alignments3D",)):
            own = data[name] if name in there else np.zeros(len(data), np.uint32)
            split = (half.numpy() - 1).reshape(-1, *[1] * (own.ndim - 1))
            columns[name] = np.broadcast_to(split, own.shape).astype(own.dtype)
    return _with(data, columns, without=stale - columns.keys())


def _places(data: Array, table: ParticleTable) -> dict[str, Array]:
    """Where new boxes lie in their micrographs, as cryoSPARC counts it (`_coordinates`), where that is known."""
    names = [f"location/{name}" for name in ("center_x_frac", "center_y_frac", "micrograph_shape")]
    if table.coordinates is None or not all(name in (data.dtype.names or ()) for name in names):
        return {}
    x, y = table.coordinates.numpy().T
    rows, columns = data[names[2]].astype(np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        places = zip(names, (x / columns, 1 - y / rows), strict=False)
    return {name: np.where(np.isfinite(own), own, data[name]).astype(data[name].dtype) for name, own in places}


def _with(data: Array, columns: dict[str, Array], without: Set[str] = frozenset()) -> Array:
    """A table with these columns, in the place of its own ones or after them, and ``without`` others."""
    kept = {name: data[name] for name in data.dtype.names or () if name not in without} | columns
    new = np.empty(len(data), np.dtype([(name, values.dtype, values.shape[1:]) for name, values in kept.items()]))
    for name, values in kept.items():
        new[name] = values
    return new


def _kept_paths(target: Path, table: ParticleTable, written: Array) -> Array:
    names = Names(target)
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in written.tolist()]
    kept = [names.kept(text, table.stacks[s]) for text, s in zip(texts, table.stack.tolist(), strict=True)]
    return np.array([name.encode() for name in kept]) if written.dtype.kind == "S" else np.array(kept)


def _built(table: ParticleTable, half: Tensor | None, more: Mapping[str, Sequence[str]]) -> Array:
    optics, bent = table.optics, table.optics.aberrations
    group = table.optics_group
    if optics.treatment is not None and optics.treatment.any():
        raise InputError(
            f"{table.name}: images that were phase-flipped or multiplied by their CTF, for which a .cs file has no "
            "place; convert to a STAR file"
        )
    pixel_size = torch.tensor([own.pixel_size for own in table.groups], dtype=torch.float64)[group]
    box = torch.tensor([own.box or 0 for own in table.groups])[group]
    stacks = np.array([str(stack).encode() for stack in table.stacks])[table.stack.numpy()]
    columns: dict[str, tuple[str, Any]] = {
        "uid": ("<u8", _uids(stacks, table.image.numpy()) if table.uid is None else table.uid.numpy().view(np.uint64)),
        "blob/path": (stacks.dtype.str, stacks),
        "blob/idx": ("<u4", table.image),
        "blob/shape": ("<u4", torch.stack([box, box], 1)),
        "blob/psize_A": ("<f4", pixel_size),
        "blob/sign": ("<f4", torch.full_like(pixel_size, table.sign)),
        "ctf/type": ("|S9", b"imported"),
        "ctf/exp_group_id": ("<u4", group),
        "ctf/accel_kv": ("<f4", optics.voltage),
        "ctf/cs_mm": ("<f4", optics.cs),
        "ctf/amp_contrast": ("<f4", optics.amplitude_contrast),
        "ctf/df1_A": ("<f4", optics.defocus_u),
        "ctf/df2_A": ("<f4", optics.defocus_v),
        "ctf/df_angle_rad": ("<f4", optics.defocus_angle),
        "ctf/phase_shift_rad": ("<f4", optics.phase_shift),
        "ctf/scale": ("<f4", optics.scale),
        "ctf/bfactor": ("<f4", optics.b_factor),
        "alignments3D/split": ("<u4", torch.zeros_like(group) if half is None else half - 1),
        "alignments3D/shift": ("<f4", table.poses.shift / pixel_size[:, None]),
        "alignments3D/pose": ("<f4", Rotation.from_matrix(table.poses.rotation.transpose(1, 2).numpy()).as_rotvec()),
        "alignments3D/psize_A": ("<f4", pixel_size),
        "alignments3D/class": ("<u4", 0 if table.particle_class is None else table.particle_class.clamp(min=0)),
    }
    if bent is not None:
        tilt, rest = _tilt_of(bent, optics)
        if rest:
            raise InputError(
                f"{table.name}: has trefoil or even aberrations, whose units in a .cs file are not published; "
                "convert to a STAR file"
            )
        columns["ctf/tilt_A"] = ("<f4", tilt)
        columns["ctf/anisomag"] = ("<f4", (bent.magnification - torch.eye(2, dtype=torch.float64)).reshape(-1, 4))
    if table.micrograph_names:
        names = np.array([name.encode() for name in table.micrograph_names])[table.micrograph.numpy()]
        columns["location/micrograph_path"] = (names.dtype.str, names)
    original = [own.original_pixel_size for own in table.groups]
    if all(size is not None for size in original):
        columns["location/micrograph_psize_A"] = ("<f4", np.array(original, np.float64)[group.numpy()])
    kept = {"OpticsGroupName": [table.groups[number].name for number in group.tolist()], **more}
    for name, texts in kept.items():
        values = np.array([text.encode() for text in texts])
        columns[_STAR + name] = (values.dtype.str, values)
    arrays = {name: (kind, np.asarray(values)) for name, (kind, values) in columns.items()}
    data = np.zeros(len(table), np.dtype([(n, kind, values.shape[1:]) for n, (kind, values) in arrays.items()]))
    for name, (_, values) in arrays.items():
        data[name] = values
    return data


def _uids(stacks: Array, index: Array) -> NDArray[np.uint64]:
    """Numbers that follow from stack and index, different for different rows: copies of an image count on from 2³²."""
    names, which = np.unique(stacks, return_inverse=True)
    start = [int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") for name in names.tolist()]
    uid = np.array(start, np.uint64)[which.reshape(-1)] + index.astype(np.uint64)
    return uid + (_earlier(uid) << 32).astype(np.uint64)


def _earlier(values: Array) -> NDArray[np.int64]:
    """How many of the earlier values equal each."""
    order = np.argsort(values, kind="stable")
    _, first, count = np.unique(values[order], return_index=True, return_counts=True)
    earlier = np.empty(len(values), np.int64)
    earlier[order] = np.arange(len(values)) - np.repeat(first, count)
    return earlier


def _tilt_of(bent: Aberrations, optics: Optics) -> tuple[NDArray[np.float64], bool]:
    """``ctf/tilt_A`` of coma, and whether there are aberrations besides it."""
    mrad, rest = tilt_of_coma(bent.odd, optics.voltage, optics.cs)
    tilt = 1e7 * optics.cs[:, None] * torch.sin(1e-3 * mrad)
    largest = float(bent.odd.abs().max()) if bent.odd.numel() else 0.0
    return tilt.numpy(), bool((rest.abs() > 1e-6 * (1 + largest)).any()) or bool(bent.even.any())


def _sources(fields: _Fields) -> NDArray[np.uint64] | None:
    """The uid that each particle of a symmetry-expanded set had before, equal for its copies."""
    if not fields.has("sym_expand/src_uid"):
        return None
    uid = fields.raw("sym_expand/src_uid")
    if not _identify(uid):
        raise InputError(f"{fields.path}: sym_expand/src_uid has type {uid.dtype}; expected one integer per particle")
    return uid.astype(np.uint64)


def _drawn(uid: Tensor | None) -> Tensor | None:
    """The uid where it is cryoSPARC's, drawn from 64 bits and kept by jobs that write a particle into another stack;
    None where it was counted, and means another particle in another file."""
    return None if uid is None or bool((uid.abs() < _COUNTED).all()) else uid


def _half_sets(fields: _Fields, prefix: str, source: NDArray[np.uint64] | None) -> Tensor | None:
    name = next((f"{group}/split" for group in (prefix, "alignments3D") if fields.has(f"{group}/split")), None)
    if name is None:
        return None
    raw = fields.first(name)
    if not np.isin(raw, (0, 1)).all():
        raise InputError(f"{fields.path}: {name} is {raw.max():g}; expected 0 or 1 for each particle")
    half = raw.astype(np.int64) + 1
    if len(np.unique(half)) < 2:
        return None  # never split: a job without half-sets writes 0 everywhere
    if source is not None:
        _, first, own = np.unique(source, return_index=True, return_inverse=True)
        of_first = half[first[own.reshape(-1)]]
        if (of_first != half).any():
            fields.warnings.append(
                f"{fields.path}: copies of one symmetry-expanded particle were in both half-sets; each now goes where "
                "its first copy was"
            )
        half = of_first
    return torch.from_numpy(half)


def _sign(fields: _Fields) -> float:
    if not fields.has("blob/sign"):
        fields.warnings.append(f"{fields.path}: no blob/sign; protein is taken to be bright, else use --invert")
        return 1.0
    values = np.unique(fields.numbers("blob/sign"))
    if len(values) > 1 or values[0] not in _SIGNS:
        raise InputError(
            f"{fields.path}: blob/sign has the values {values.tolist()[:5]}; expected 1 or -1 for all particles, "
            "reconstruct from particles of one contrast"
        )
    return float(values[0])
