"""The tutorial in Python as a notebook: docs/python.md is the source of both, and its code is run by a test."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the code is also run without Sphinx
    from sphinx.application import Sphinx

CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def code_of(page: str) -> str:
    """All code of a page, in order."""
    return "\n".join(CODE.findall(page))


def as_notebook(page: str) -> dict[str, Any]:
    """Text and code of a page in turn, without its pictures: the notebook draws its own."""
    cells = []
    for number, part in enumerate(CODE.split(page)):
        text = part if number % 2 else re.sub(r"^(!\[.*|\{download.*)\n", "", part, flags=re.MULTILINE)
        if not text.strip():
            continue
        cell: dict[str, Any] = {"cell_type": "code" if number % 2 else "markdown", "metadata": {}}
        cell |= {"id": f"part{number}", "source": text.strip().splitlines(keepends=True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if number % 2 else {}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def write_notebook(app: Sphinx) -> None:
    folder = Path(app.srcdir)
    target = folder / "generated" / "tutorial.ipynb"
    target.parent.mkdir(exist_ok=True)
    text = json.dumps(as_notebook((folder / "python.md").read_text()), indent=1, ensure_ascii=False) + "\n"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
