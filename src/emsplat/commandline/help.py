"""The help of a command, and of the program."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from emsplat.commandline.arguments import Argument, Command

_WIDEST = 100  # columns; longer lines are hard to read
_INDENT = 28  # columns before the help of an option
_BOLD, _PLAIN = "\033[1m", "\033[0m"


@dataclass(frozen=True)
class Page:
    """What a help is written for."""

    columns: int
    color: bool = False


def terminal() -> Page:
    """The terminal; no colour where its output goes to a file, nor where NO_COLOR is set (https://no-color.org)."""
    return Page(shutil.get_terminal_size().columns, sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def command_help(command: Command, page: Page) -> str:
    """The help of a command: what it does, how it is called, its arguments panel by panel, examples."""
    width, color = _fitting(page.columns), page.color
    lines = [f"{_title('Usage', color)} {_usage(command)}", ""]
    for paragraph in command.about.split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width, break_on_hyphens=False), ""]
    for panel in command.panels:
        lines += textwrap.wrap(_title(panel.title, color), width)
        for argument in panel.arguments:
            lines += _entry(argument.spelled, _described(argument), width, _INDENT)
        if panel.title == "Options":
            lines += _entry("-h, --help", "Show this help.", width, _INDENT)
        lines.append("")
    if not any(panel.title == "Options" for panel in command.panels):
        lines += [_title("Options", color), *_entry("-h, --help", "Show this help.", width, _INDENT), ""]
    if command.examples:
        lines += [_title("Examples", color), *(f"  {line}" for line in command.examples), ""]
    return "\n".join(lines).rstrip()


def program_help(about: str, groups: dict[str, dict[str, Command]], footer: Iterable[str], page: Page) -> str:
    """The help of the program: its commands, group by group, each with the first sentence of what it does."""
    width, color = _fitting(page.columns), page.color
    lines = [f"{_title('Usage', color)} emsplat COMMAND ...", "", *textwrap.wrap(about, width), ""]
    for title, commands in groups.items():
        lines.append(_title(title, color))
        for name, command in commands.items():
            lines += _entry(name, summary(command), width, 18)
        lines.append("")
    return "\n".join([*lines, *footer])


def summary(command: Command) -> str:
    """The first paragraph of what a command does, up to its first full stop."""
    paragraph = " ".join(command.about.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def _fitting(width: int) -> int:
    return max(min(width, _WIDEST), 2 * _INDENT)


def _title(text: str, color: bool) -> str:
    return f"{_BOLD}{text}:{_PLAIN}" if color else f"{text}:"


def _usage(command: Command) -> str:
    words = [command.program]
    for argument in command.arguments:
        if not argument.flags or argument.required:
            word = argument.spelled if not argument.flags else f"{argument.flags[0]} {argument.metavar}"
            words.append(word if argument.required else f"[{word}]")
    return " ".join([*words, "[OPTIONS]"])


def _entry(name: str, text: str, width: int, indent: int) -> list[str]:
    name = f"  {name}"
    wrapped = textwrap.wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False
    )
    if len(name) <= indent - 2 and wrapped:
        wrapped[0] = name.ljust(indent) + wrapped[0][indent:]
        return wrapped
    return [name, *wrapped]


def _described(argument: Argument) -> str:
    """The help of an argument with its default, where that is a value; where it is none, the text says what holds."""
    match argument.default:
        case True:
            said = "yes"
        case float(value):
            said = f"{value:g}"
        case int(value) | str(value) if value is not False:
            said = str(value)
        case _:
            said = ""
    return f"{argument.help} [default: {said}]" if said and argument.flags else argument.help
