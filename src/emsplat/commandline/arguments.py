"""What a command takes, read from the signature and the docstring of its function.

A positional-only parameter is an argument without a name, any other one an option. A parameter that is a dataclass is
taken apart, however deep: its fields are options under their own names, and the docstrings below them their help. Each
dataclass that has options of its own is a panel of the help, under the first line of its docstring.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from emsplat.config import Name

_SHORT = {"output": "-o", "threads": "-j"}  # the same in every command
_VALUES: dict[Any, str] = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Argument:
    """One argument of a command."""

    name: str  # of the parameter or field
    flags: tuple[str, ...]  # a short one first; of a switch that which changes the default; none: a positional argument
    kinds: tuple[Any, ...]  # types that a value may have: int, float, str, Path, bool
    choices: tuple[str, ...]  # words that a value may be
    many: bool
    metavar: str
    help: str
    default: Any  # MISSING where the user has to say it

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_switch(self) -> bool:
        return self.kinds == (bool,)

    @property
    def spelled(self) -> str:
        """The argument with what follows it, as the help shows it."""
        if not self.flags:
            return self.metavar
        if self.is_switch:
            return self.flags[0].replace("--no-", "--[no-]") if self.default else self.flags[0]
        return f"{', '.join(self.flags)} {self.metavar}{' ...' if self.many else ''}"


@dataclass(frozen=True)
class Panel:
    """Arguments that belong together."""

    title: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Command:
    """What there is to know about a command before it runs."""

    program: str  # its words, as "emsplat fsc"
    run: Callable[..., Any]
    about: str  # paragraphs
    examples: tuple[str, ...]  # lines
    panels: tuple[Panel, ...]

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return tuple(argument for panel in self.panels for argument in panel.arguments)


@cache
def command_of(run: Callable[..., Any], program: str) -> Command:
    """The command that calls a function."""
    about, said, examples = _sections(inspect.getdoc(run) or "")
    hints = get_type_hints(run, include_extras=True)
    own: dict[str, list[Argument]] = {"Arguments": [], "Options": []}
    nested: list[Panel] = []
    for name, parameter in inspect.signature(run).parameters.items():
        if is_dataclass(hints[name]):
            nested += _panels(hints[name])
            continue
        named = parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
        default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
        own["Options" if named else "Arguments"].append(
            _argument(name, hints[name], default, said.get(name, ""), named=named)
        )
    panels = [Panel(title, tuple(arguments)) for title, arguments in own.items() if arguments]
    return Command(program, run, about, examples, (*panels, *nested))


def _panels(kind: Any) -> Iterator[Panel]:
    hints = get_type_hints(kind, include_extras=True)
    said = _docstrings(kind.__module__).get(kind.__name__, {})
    own = []
    below: list[Panel] = []
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            below += _panels(hints[field.name])
        else:
            own.append(_argument(field.name, hints[field.name], _default(field), said.get(field.name, "")))
    if own:
        yield Panel((inspect.getdoc(kind) or "").partition("\n")[0].rstrip("."), tuple(own))
    yield from below


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _argument(name: str, hint: Any, default: Any, text: str, *, named: bool = True) -> Argument:
    hint, own = _plain(hint)
    word = next((note.text for note in own if isinstance(note, Name)), name).replace("_", "-")
    many = get_origin(hint) is tuple
    parts = [_plain(part) for part in _members(get_args(hint)[0] if many else hint)]
    kinds = tuple(part for part, _ in parts if get_origin(part) is not Literal)
    choices = tuple(word for part, _ in parts if get_origin(part) is Literal for word in get_args(part))
    values = [
        next((note for note in (*notes, *own) if isinstance(note, str)), _VALUES.get(part, "")) for part, notes in parts
    ]
    metavar = "|".join([*filter(None, values), *choices]) if named else name.upper()
    long = f"--no-{word}" if kinds == (bool,) and default is True else f"--{word}"
    flags = (_SHORT[name], long) if name in _SHORT else (long,)
    return Argument(name, flags if named else (), kinds, choices, many, metavar, text, default)


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what is annotated to it."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union but None; a type that is none stands for itself."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(member for member in members if member is not NoneType)


def _sections(text: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """A docstring in Google's style: what stands above its sections, its arguments, and the lines of its examples."""
    above, _, rest = text.partition("\nArgs:\n")
    above, _, examples = above.partition("\nExamples:\n")
    if not examples:
        rest, _, examples = rest.partition("\nExamples:\n")
    said: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(rest).splitlines():
        if not line.startswith(" ") and line.strip():
            name, _, line = line.partition(":")
        if line.strip():
            said[name] = f"{said.get(name, '')} {line.strip()}".strip()
    return above.strip(), said, tuple(textwrap.dedent(examples).strip().splitlines())


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """The docstrings below the fields of the classes of a module: {class: {field: text}}."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            for line, below in zip(node.body, node.body[1:], strict=False):
                match line, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found.setdefault(node.name, {})[name] = " ".join(text.split())
    return found
