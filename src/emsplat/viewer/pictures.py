"""Central slices of the maps that a run has written, as PNG, drawn once per change of a file."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emsplat.errors import InputError
from emsplat.report import figures, read
from emsplat.run import files
from emsplat.viewer.folders import has_file, inside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FITS = ("class001", *files.HALVES)
_STATES, _COMPONENTS = 6, 4  # shown at most
_STARTS = 8
_LARGEST = 2**30  # bytes of a map of which slices are drawn; a larger one would take the memory of the run
_GAP = 4  # pixels between planes
_KEPT = 64  # pictures in memory
_START = re.compile(re.escape(files.start_name("half0", 0)).replace("half0", r"(half[12])").replace("00", r"(\d\d)"))


@dataclass(frozen=True)
class Picture:
    """A map below a run folder, and what it is; ``version`` changes when the file does."""

    name: str  # relative to the run folder
    title: str
    version: str

    def described(self, key: str) -> dict[str, str]:
        """What a page needs to show it."""
        address = f"/slices/{key}?map={self.name}&version={self.version}"
        return {"title": self.title, "url": address, "name": self.name, "version": self.version}


def pictures_of(root: Path, folder: str) -> list[Picture]:
    """The maps to look at, the most telling first: those that are finished, or else slices of those on their way."""
    path = root / folder
    names = [(files.map_name(fit), figures.FITS[fit]) for fit in _FITS]
    names = [one for one in names if (path / one[0]).is_file()] or [
        (files.slices_name(fit), f"{figures.FITS[fit]}, so far") for fit in _FITS
    ]
    if files.FULL_MAP not in dict(names):
        names += [(files.CHECK_MAP, "quick look"), (files.CONSENSUS, "consensus")]
        names += [(f"{files.STATES}/{files.state_map_name(state)}", f"state {state + 1}") for state in range(_STATES)]
        names += _starts(path)
    if not (path / files.CONSENSUS).is_file():
        names.append((files.slices_name(files.MEAN), "mean of the linear stage, half 1"))
        components = range(1, _COMPONENTS + 1)
        names += [(files.slices_name(files.component_name(one)), f"component {one}, half 1") for one in components]
    shown = []
    for name, title in names:
        if has_file(root, folder, name):
            status = (path / name).stat()
            shown.append(Picture(name, title, f"{status.st_mtime_ns:x}-{status.st_size:x}"))
    return shown


def _starts(path: Path) -> list[tuple[str, str]]:
    """Maps that starts without poses came to."""
    found = sorted(path.glob(files.start_name("half?", 0).replace("00", "??")))
    named = [(one.name, match) for one in found if (match := _START.fullmatch(one.name))]
    return [(name, f"start {int(match[2])} of {figures.FITS[match[1]]}") for name, match in named[:_STARTS]]


class Pictures:
    """Slices that were drawn, the last ones kept in memory."""

    def __init__(self) -> None:
        self._drawn: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()

    def slices(self, root: Path, folder: str, name: str) -> bytes:
        """PNG of the central slices xy, xz and yz of a map in a run folder.

        Raises:
            InputError: it is none of `pictures_of`, or cannot be read.
        """
        picture = next((one for one in pictures_of(root, folder) if one.name == name), None)
        if picture is None:
            raise InputError(f"{name}: no map of this run; expected one that its page shows")
        return self.kept((folder, picture), lambda: _draw(planes_of(root, folder, name)))

    def kept(self, key: tuple[Any, ...], draw: Any) -> bytes:
        """What was drawn under a key, or is drawn now."""
        if key not in self._drawn:
            self._drawn[key] = draw()
            while len(self._drawn) > _KEPT:
                self._drawn.popitem(last=False)
        self._drawn.move_to_end(key)
        return self._drawn[key]


def planes_of(root: Path, folder: str, name: str) -> list[NDArray[np.float32]]:
    """The central slices xy, xz and yz of a map in a run folder.

    Raises:
        InputError: it cannot be read, or is very large.
    """
    import numpy as np

    path = inside(root, folder, name)
    if (size := path.stat().st_size) > _LARGEST:
        raise InputError(f"{name}: {size / 2**30:.1f} GB; slices are drawn of maps below 1 GB; open it in a viewer")
    if path.suffix == ".mrcs":
        from emsplat.io.mrc_arrays import StackFile

        stack = StackFile(path)
        images = np.zeros((min(stack.count, 3), stack.box, stack.box), np.float32)
        stack.read_into(images, range(len(images)), range(len(images)))
        return list(np.nan_to_num(images, posinf=0, neginf=0))
    values = _start_volume(path) if path.suffix == ".safetensors" else read.read_volume(path).values
    return [np.nan_to_num(figures.central(values, axis), posinf=0, neginf=0) for axis in range(3)]


def _start_volume(path: Path) -> NDArray[np.float32]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            values: NDArray[np.float32] = file.get_tensor("volume")
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path.name}: cannot be read ({error}); expected a map; was it half written?") from error
    if values.ndim != 3:
        raise InputError(f"{path.name}: {values.ndim} axes; expected a map of three")
    return values


def _draw(planes: list[NDArray[np.float32]]) -> bytes:
    """Planes side by side, the second axis up, in one grey scale as the slices of the report have it."""
    import numpy as np

    low, high = np.percentile(np.concatenate([plane.ravel() for plane in planes]), (0.5, 99.8))
    return png([np.clip((plane - low) / max(float(high - low), 1e-30), 0, 1) for plane in planes])


def png(planes: list[NDArray[Any]]) -> bytes:
    """Planes of grey (y, x) or colour (y, x, 3) from 0 to 1, side by side, the second axis up."""
    import numpy as np
    from PIL import Image

    rows = max(plane.shape[0] for plane in planes)
    strips = []
    for place, plane in enumerate(planes):
        grey = np.repeat(plane[..., None], 3, 2) if plane.ndim == 2 else plane
        strip = np.full((rows, plane.shape[1] + _GAP * (place > 0), 4), 0, np.uint8)
        strip[: plane.shape[0], _GAP * (place > 0) :, :3] = np.round(255 * grey[::-1])
        strip[: plane.shape[0], _GAP * (place > 0) :, 3] = 255
        strips.append(strip)
    file = io.BytesIO()
    Image.fromarray(np.concatenate(strips, 1)).save(file, "PNG")
    return file.getvalue()
