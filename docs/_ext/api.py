"""Pages of the public names of every room, from the sources alone: nothing is imported, compiled or written by hand.

Docstrings are Markdown, as the other pages are. A name in single backticks links to what it names where that has an
entry of its own; a field without a docstring is explained by the comment behind it.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe
from sphinx.application import Sphinx
from sphinx.util import logging

SOURCE = Path(__file__).parents[2] / "src"
SECTION = re.compile(r"^(Args|Raises|Returns|Yields):$", re.MULTILINE)
NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


def write_pages(app: Sphinx) -> None:
    """A page for each room, and one for the modules that stand alone."""
    logging.getLogger("griffe").setLevel("ERROR")
    package = griffe.load("emsplat", search_paths=[SOURCE], resolve_aliases=False)
    folder = Path(app.srcdir) / "generated" / "api"
    folder.mkdir(parents=True, exist_ok=True)
    rooms = {name: module for name, module in sorted(package.modules.items()) if not name.startswith("_")}
    targets = {path: path for module in rooms.values() for path in entries(module)}
    for path in list(targets):  # short names, where they are the only ones of their kind
        for short in (path.rsplit(".", 1)[1], ".".join(path.rsplit(".", 2)[1:])):
            targets[short] = path if targets.get(short, path) == path else ""
    pages = {name: [room, *room.modules.values()] for name, room in rooms.items() if room.modules}
    interface = rooms["interface"]
    alone = [room for name, room in rooms.items() if name not in pages and room is not interface]
    titles = {"interface": "import emsplat as em", "modules": "Modules on their own"}
    for name, modules in {**pages, "interface": [interface], "modules": alone}.items():
        body = [f"# {titles.get(name, f'emsplat.{name}')}"]
        if modules == [interface]:
            offered = {name: thing.target_path for name, thing in package.members.items() if thing.is_alias}
            names = sorted(offered.keys() - {"Any", "TYPE_CHECKING"}, key=str.lower)
            body.append(docstring(package, {}))
            body.append("\n".join(f"- {{py:obj}}`em.{name} <{offered[name]}>`" for name in names))
        body += [part for module in modules for part in described(module, targets, name in pages)]
        text = "\n\n".join(body) + "\n"
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text() != text:
            page.write_text(text)
    for page in folder.glob("*.md"):
        if page.stem not in {*pages, *titles}:
            page.unlink()


def public(thing: griffe.Object) -> Iterator[griffe.Object]:
    """What a module or class defines itself and does not hide, in the order of the source; of values those that have a
    type or an explanation."""
    members = [m for m in thing.members.values() if not m.is_alias and not m.is_module]
    for member in sorted(members, key=lambda m: m.lineno or 0):
        bare = member.is_attribute and member.annotation is None and thing.is_class
        if not member.name.startswith("_") and not (bare and member.docstring is None):
            yield member


def entries(module: griffe.Module) -> Iterator[str]:
    for inner in [module, *module.modules.values()]:
        for thing in public(inner):
            yield thing.path
            if thing.is_class:
                yield from (member.path for member in public(thing))


def described(module: griffe.Module, targets: dict[str, str], in_room: bool) -> Iterator[str]:
    """A module with its public names; the room's own docstring opens its page."""
    things = list(public(module))
    if not in_room or module.parent.name != "emsplat":
        yield f"## {module.path}"
    if things:
        yield f"```{{py:module}} {module.path}\n```"
    yield docstring(module, targets)
    for thing in things:
        yield entry(thing, targets)


def entry(thing: griffe.Object, targets: dict[str, str], fence: str = "::::") -> str:
    """The directive of a function, class or value."""
    module = thing.module.path
    name = thing.path.removeprefix(f"{module}.")
    options, inside = [f":module: {module}"], []
    if thing.is_function:
        kind, name = "method" if thing.parent.is_class else "function", f"{name}{signature(thing)}"
    elif thing.is_class:
        kind = "class"
        inside = [entry(member, targets, ":::") for member in public(thing)]
    else:
        kind = "property" if "property" in thing.labels else "attribute" if thing.parent.is_class else "data"
        if thing.annotation is not None:
            options.append(f":type: {flat(thing.annotation)}")
    for label in ("classmethod", "staticmethod"):
        if label in thing.labels:
            options.append(f":{label}:")
    body = "\n\n".join([docstring(thing, targets), *inside])
    return "\n".join([f"{fence}{{py:{kind}}} {name}", *options, "", body, fence])


def signature(function: griffe.Function) -> str:
    """Parameters with their types, without ``self``."""
    words: list[str] = []
    star = False
    for parameter in function.parameters:
        if function.parent.is_class and parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind
        if kind is griffe.ParameterKind.keyword_only and not star:
            words.append("*")
            star = True
        prefix = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        star = star or prefix == "*"
        word = prefix + parameter.name
        if parameter.annotation is not None:
            word += f": {flat(parameter.annotation)}"
        if parameter.default is not None and not prefix:
            word += f" = {flat(parameter.default)}"
        words.append(word)
    returns = f" -> {flat(function.returns)}" if function.returns is not None else ""
    return f"({', '.join(words)}){returns}"


def flat(expression: griffe.Expr | str) -> str:
    return re.sub(r"\s+", " ", str(expression))


def docstring(thing: griffe.Object, targets: dict[str, str]) -> str:
    """A docstring as Markdown, or the comment behind a field."""
    if thing.docstring is None:
        line = thing.module.source.splitlines()[thing.lineno - 1] if thing.is_attribute else ""
        comment = re.search(r"  # (.*)$", line)
        return comment[1] if comment else ""
    first, *sections = SECTION.split(thing.docstring.value)
    parts = [first.strip()]
    for title, items in zip(sections[::2], sections[1::2], strict=True):
        parts.append(f"**{'Arguments' if title == 'Args' else title}**")
        for item in re.split(r"\n(?=\S)", textwrap.dedent(items.strip("\n"))):
            name, colon, what = item.partition(":")
            text = " ".join((what if colon else item).split())
            parts.append(f"- `{name}`: {text}" if colon else f"- {text}")
    lines = "\n\n".join(part for part in parts if part).splitlines()
    return "\n".join(line if line.startswith("    ") else NAME.sub(linked(thing, targets), line) for line in lines)


def linked(thing: griffe.Object, targets: dict[str, str]):
    def link(match: re.Match[str]) -> str:
        name = match[1]
        places = [f"{thing.path}.{name}", f"{thing.parent.path if thing.parent else ''}.{name}"]
        places += [f"{thing.module.path}.{name}", name]
        found = next((targets[place] for place in places if targets.get(place)), None)
        return f"{{py:obj}}`{name} <{found}>`" if found and found != thing.path else f"`{name}`"

    return link


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
