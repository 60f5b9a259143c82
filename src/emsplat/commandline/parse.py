"""From the words of a command line to the call of a function."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, NoReturn, get_type_hints

from emsplat.commandline.arguments import Argument, Command
from emsplat.commandline.help import command_help, terminal
from emsplat.config import configure, names
from emsplat.errors import InputError

_EXPECTED: dict[Any, str] = {int: "a whole number", float: "a number"}


def call(command: Command, words: list[str]) -> Any:
    """Runs the function of a command with the words that follow it, and returns what it returns; --help prints the help
    and runs nothing.

    Raises:
        InputError: a word that no argument takes, a value of another kind, or an argument that is missing.
    """
    if {"-h", "--help"} & set(words[: words.index("--")] if "--" in words else words):
        print(command_help(command, terminal()))
        return None
    positional, given = parse(command, words)
    hints = get_type_hints(command.run)
    named: dict[str, Any] = {}
    for name in list(signature(command.run).parameters)[len(positional) :]:
        if is_dataclass(hints[name]):
            own = [option for option in names(hints[name]) if option in given]
            named[name] = configure(hints[name], **{option: given[option] for option in own})
        elif name in given:
            named[name] = given[name]
    return command.run(*positional, **named)


def parse(command: Command, words: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """All positional arguments, and by their names the options that were given.

    Raises:
        InputError: as `call`.
    """
    parser = _Parser(command)
    before, after = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    try:
        found, rest = parser.parse_known_args(_spell(before))
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").rpartition("/")[2]
        parser.error(f"{name}{error.message if error.message.startswith(' ') else f': {error.message}'}")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()
    }
    for word in rest:
        if _is_option(word):
            name = word.partition("=")[0]
            flags = [flag for argument in command.arguments for flag in argument.flags]
            parser.error(f"{name}: no such option{did_you_mean(name, flags)}")
    rest += after
    positional: list[Any] = []
    for argument in command.arguments:
        missing = not rest if not argument.flags else argument.name not in given
        if missing and argument.required:
            parser.error(f"{argument.spelled} is missing: {argument.help}")
        if not argument.flags:
            try:
                positional.append(argument.default if missing else _value(argument, rest.pop(0)))
            except InputError as error:
                parser.error(str(error))
    if rest:
        parser.error(f"{rest[0]}: one argument too many; an option begins with --")
    return positional, given


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is most like another; empty where none is."""
    alike = get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {alike[0]}?" if alike else ""


class _Parser(argparse.ArgumentParser):
    """The options of a command; what is not given is not in the result."""

    def __init__(self, command: Command) -> None:
        super().__init__(
            prog=command.program,
            argument_default=argparse.SUPPRESS,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
        )
        for argument in command.arguments:
            if not argument.flags:
                continue
            if argument.is_switch:
                on, off = _pair(argument)
                self.add_argument(*on, dest=argument.name, action="store_const", const=True)
                self.add_argument(*off, dest=argument.name, action="store_const", const=False)
            elif argument.many:
                self.add_argument(
                    *argument.flags, dest=argument.name, action="extend", nargs="+", type=_reader(argument)
                )
            else:
                self.add_argument(*argument.flags, dest=argument.name, type=_reader(argument))

    def error(self, message: str) -> NoReturn:
        _, _, name = self.prog.partition(" ")
        raise InputError(f"{name} {message}".strip() + f" (see {self.prog} --help)")


def _pair(argument: Argument) -> tuple[list[str], list[str]]:
    """The spellings that turn a switch on and off; the help shows that which changes the default."""
    name = argument.flags[-1].removeprefix("--")
    name = name.removeprefix("no-") if argument.default is True else name
    return [f"--{name}"], [f"--no-{name}"]


def _reader(argument: Argument) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return _value(argument, text)
        except InputError as error:
            raise argparse.ArgumentTypeError(f" {error}") from error

    return read


def _value(argument: Argument, text: str) -> Any:
    if text in argument.choices:
        return text
    for kind in argument.kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    expected = [*(_EXPECTED[kind] for kind in argument.kinds), *argument.choices]
    words = " or ".join(filter(None, [", ".join(expected[:-1]), expected[-1]]))
    raise InputError(f"{text}: expected {words}{did_you_mean(text, argument.choices)}")


def _spell(words: list[str]) -> list[str]:
    """Names of options with hyphens, and negative numbers bound to their option, so that they are not taken for one."""
    spelled: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            spelled.append(name.replace("_", "-") + equals + value)
        elif word.startswith("-") and not _is_option(word) and spelled and re.fullmatch(r"--?\w[^=]*", spelled[-1]):
            spelled[-1] += f"={word}"
        else:
            spelled.append(word)
    return spelled


def _is_option(word: str) -> bool:
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False
