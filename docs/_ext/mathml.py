"""Formulas as MathML, which browsers set themselves: no script, no font, no network."""

import re
import unicodedata
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def as_mathml(formula: str, display: str = "inline") -> str:
    """LaTeX as MathML. Script letters are characters of their own there: browsers know no other way."""

    def script(match: re.Match[str]) -> str:
        name = f"SCRIPT CAPITAL {match[1]}"
        kept = match[1] in "BEFHILMR"  # these are older than the block of mathematical letters
        return f"<mi>{unicodedata.lookup(name if kept else f'MATHEMATICAL {name}')}</mi>"

    return re.sub(r'<mi mathvariant="script">([A-Z])</mi>', script, convert(formula, display=display))


def visit_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(as_mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(writer: Any, node: nodes.math_block) -> None:
    number = f"<span>({node['number']})</span>" if node.get("number") else ""
    label = f' id="equation-{node["label"]}"' if node.get("label") else ""
    writer.body.append(f'<div class="equation"{label}>{as_mathml(node.astext(), "block")}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
