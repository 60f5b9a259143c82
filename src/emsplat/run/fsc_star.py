"""FSC curves as RELION writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emsplat import __version__
from emsplat.io.files import number_text
from emsplat.io.star import Words, pairs, write_star_file


def write_fsc_star(
    path: Path,
    general: Mapping[str, str],
    columns: Mapping[str, Sequence[float | int]],
    guinier: Mapping[str, Sequence[float | int]] | None = None,
) -> None:
    """Tables in the style of RELION's postprocess.star: pairs in data_general, curves in data_fsc and data_guinier."""
    blocks: list[bytes | tuple[str, Mapping[str, Sequence[str] | Words]]] = [
        pairs("general", {f"_{name}": value for name, value in {"emsplatVersion": __version__, **general}.items()})
    ]
    for table, curves in (("fsc", columns), ("guinier", guinier or {})):
        if curves:
            # What is undefined, as a curve beyond the end of the data, is unknown: "?", no number.
            texts = (
                [number_text(v, ".6f", "?") if isinstance(v, float) else str(v) for v in values]
                for values in curves.values()
            )
            blocks.append((table, dict(zip((f"_{name}" for name in curves), texts, strict=True))))
    write_star_file(path, blocks)
