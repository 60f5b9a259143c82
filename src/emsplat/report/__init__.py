"""Figures and one HTML page from a run folder alone, without torch.

`write_report` draws the figures as PNG and SVG into the run folder and writes ``report.html``: one file with everything
inside, interactive, without network. What is missing from the folder or damaged is named in the page. Each kind of run
has its own headline and sections.

`read` reads the folder, `verdict` says what the numbers mean, to the terminal as well, `figures` draws for papers,
`surface` and `plots` for the screen, `page` writes the parts of the page, `words` holds what they say and `style` what
they look like. `explorer` writes the page of a heterogeneous run, whose parts are in ``assets``.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from emsplat.errors import InputError
from emsplat.io.files import replacing
from emsplat.process import shared_out
from emsplat.report import figures, page
from emsplat.report.read import read_summary_or_nothing
from emsplat.report.style import CSS, PAGE, SCRIPT
from emsplat.report.verdict import Kind, kind_of
from emsplat.run.files import PARTS, REPORT, STATES

_Part = Callable[[Path], str]
_FITTED = frozenset({Kind.ONE_PASS, Kind.IMAGES})
_MEASURED = _FITTED | {Kind.CLASSICAL, Kind.HALF_MAPS}
_STATES = frozenset({Kind.STATES})
_MAPPED = _MEASURED | {Kind.CHECK}
# Anchor, title, parts, and the kinds of runs that have the section; one without content is left out.
_SECTIONS: tuple[tuple[str, str, tuple[_Part, ...], frozenset[Kind]], ...] = (
    ("understood", "What was understood of the input", (page.items,), frozenset({Kind.CHECK})),
    ("tests", "What stays silent", (page.null_tests, page.null_curves), frozenset({Kind.NULL_TESTS})),
    ("resolution", "Resolution", (page.headline,), _MEASURED),
    ("surface", "Map in 3D", (page.surface,), _MEASURED),
    ("slices", "Slices", (page.slices, page.local_resolution_slices), _MAPPED),
    ("fsc", "Fourier shell correlation", (page.fsc,), _MEASURED),
    ("local", "Local resolution", (page.local_resolution, page.local_resolution_table), _MEASURED),
    ("directions", "Directions", (page.directional_table, page.directions), _MAPPED),
    ("poses", "Poses", (page.poses,), _FITTED),
    ("residuals", "Particles and residuals", (page.examples, page.residual), _FITTED),
    ("convergence", "Convergence", (page.stages, page.scores, page.convergence), _FITTED),
    ("gaussians", "Gaussians", (page.gaussians,), _FITTED),
    ("gain", "Is there anything?", (page.gain, page.gain_curves), _STATES),
    ("states", "States", (page.states, page.populations), _STATES),
    ("landscape", "Free energy", (page.landscape,), _STATES),
    ("follows", "Do latents follow the molecule?", (page.follows,), _STATES),
    ("parts", "Parts", (page.parts,), _STATES),
    ("settings", "Input and settings", (page.numbers, page.config), _MEASURED | _STATES),
    ("checks", "What to check when something looks wrong", (page.checks,), _MAPPED),
)


# What takes longest is drawn first, so that no process waits for another at the end.
_LONGEST = (
    page.directions,
    page.surface,
    page.gaussians,
    page.local_resolution_slices,
    page.slices,
    page.convergence,
    page.fsc,
    page.local_resolution,
)

Timed = Callable[[str], AbstractContextManager[None]]  # notes what the work within takes, by its name


def _untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def prepare(processes: int) -> None:
    """Begins to import what a report takes, beside the work whose report it will be; where processes share a report out
    there is a core for it."""
    # A variable of the environment, as `figures.load_matplotlib` does it for others, must not change beside threads.
    if processes > 1 and figures.always_there():
        threading.Thread(target=figures.load_back_ends, name="imports of the report", daemon=True).start()


def write_report(run: Path, timed: Timed = _untimed, processes: int = 1) -> Path:
    """Draw the figures of a run folder and write ``report.html``; return its path. Each part is drawn within
    ``timed(its name)``, and ``processes`` share them out.

    A missing or damaged part of the folder is named in the page, whose other parts are written all the same.

    Raises:
        InputError: ``run`` is not a folder.
        OutputError: the page or a figure cannot be written.
    """
    from plotly.offline import get_plotlyjs

    if not run.is_dir():
        raise InputError(f"{run}: not a folder; expected a folder that emsplat wrote; check the path")
    kind = kind_of(read_summary_or_nothing(run))
    wanted = [(anchor, title, parts) for anchor, title, parts, kinds in _SECTIONS if kind in kinds]
    if processes > 1:
        with timed("matplotlib"):
            figures.load_back_ends()  # once for all
    parts = sorted(
        (part for _, _, own in wanted for part in own),
        key=lambda part: _LONGEST.index(part) if part in _LONGEST else len(_LONGEST),
    )
    drawn = dict(zip(parts, shared_out([partial(_drawn, run, part, timed) for part in parts], processes), strict=True))
    sections = [(anchor, title, "".join(drawn[part] for part in own)) for anchor, title, own in wanted]
    target = run / REPORT
    # Listed last and with the page itself, so that the list shows what the reader finds.
    shown = (f.name for f in run.iterdir() if f.is_file() or f.name in (STATES, PARTS))
    files = page.file_table({*shown, target.name})
    sections = [section for section in sections if section[2]] + [("files", "Files", files)]
    body = "\n".join(f'<section id="{id_}"><h2>{title}</h2>\n{content}</section>' for id_, title, content in sections)
    text = PAGE.format(
        name=html.escape(run.resolve().name),
        kind=kind.value,
        facts=page.facts(run),
        warnings=page.warnings(run),
        style=CSS,
        links="".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections),
        body=body,
        plotly=get_plotlyjs(),
        script=SCRIPT,
    )
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def _drawn(run: Path, part: _Part, timed: Timed) -> str:
    with timed(part.__name__.replace("_", " ")):
        return page.part(partial(part, run))
