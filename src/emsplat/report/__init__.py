"""Figures and one HTML page from a run folder alone, without torch.

`write_report` draws the figures as PNG and SVG into the run folder and writes ``report.html``: one file with everything
inside, interactive, without network. What is missing from the folder or damaged is named in the page.

`read` reads the folder, `figures` draws for papers, `surface` and `plots` for the screen, `page` writes the parts of
the page, `words` holds what they say and `style` what they look like.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from emsplat.errors import InputError
from emsplat.io.files import replacing
from emsplat.report import page
from emsplat.report.style import CSS, PAGE, SCRIPT

_Part = Callable[[Path], str]
_SECTIONS: tuple[tuple[str, str, tuple[_Part, ...]], ...] = (
    ("resolution", "Resolution", (page.headline,)),
    ("surface", "Map in 3D", (page.surface,)),
    ("slices", "Slices", (page.slices, page.local_resolution_slices)),
    ("fsc", "Fourier shell correlation", (page.fsc,)),
    ("local", "Local resolution", (page.local_resolution, page.local_resolution_table)),
    ("directions", "Directions", (page.directional_table, page.directions)),
    ("residuals", "Particles and residuals", (page.examples, page.residual)),
    ("convergence", "Convergence", (page.stages, page.convergence, page.scores)),
    ("gaussians", "Gaussians", (page.gaussians,)),
    ("settings", "Inputs and settings", (page.numbers, page.config)),
)


def write_report(run: Path) -> Path:
    """Draw the figures of a run folder and write ``report.html``; return its path.

    A missing or damaged part of the folder is named in the page, whose other parts are written all the same.

    Raises:
        InputError: ``run`` is not a folder.
        OutputError: the page or a figure cannot be written.
    """
    from plotly.offline import get_plotlyjs

    if not run.is_dir():
        raise InputError(f"{run}: not a folder; expected the run folder of `emsplat reconstruct`; check the path")
    sections = [(anchor, title, "".join(_shown(run, part) for part in parts)) for anchor, title, parts in _SECTIONS]
    target = run / "report.html"
    # Listed last and with the page itself, so that the list shows what the reader finds.
    files = page.file_table({*(f.name for f in run.iterdir() if f.is_file()), target.name})
    sections += [
        ("checks", "What to check when something looks wrong", page.checks()),
        ("files", "Files", files),
    ]
    body = "\n".join(f'<section id="{id_}"><h2>{title}</h2>\n{content}</section>' for id_, title, content in sections)
    text = PAGE.format(
        name=html.escape(run.resolve().name),
        style=CSS,
        links="".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections),
        body=body,
        plotly=get_plotlyjs(),
        script=SCRIPT,
    )
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def _shown(run: Path, part: _Part) -> str:
    return page.part(lambda: part(run))
