"""Scripts with which a shell completes commands, options and their values. They start no Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from emsplat.commandline.arguments import Argument, Command
from emsplat.commandline.help import summary

_NAME_LENGTH = 72  # characters of help that are shown beside a word


def _flags(command: Command) -> list[str]:
    return [flag for argument in command.arguments for flag in argument.flags] + ["--help"]


def _options(command: Command) -> Iterator[Argument]:
    return (argument for argument in command.arguments if argument.flags)


def _words(command: Command) -> Iterator[str]:
    """What the arguments without a name may be, where they are no files."""
    return (" ".join(argument.choices) for argument in command.arguments if argument.choices and not argument.flags)


def _short(text: str) -> str:
    """The first words of a help text, without characters that a shell would read."""
    plain = "".join(" " if character in "'\"`$\\:[]" else character for character in text.partition(". ")[0])
    plain = " ".join(plain.rstrip(".").split())
    return plain if len(plain) <= _NAME_LENGTH else plain[:_NAME_LENGTH].rpartition(" ")[0] + " ..."


def _bash(commands: dict[str, Command]) -> Iterator[str]:
    yield "# Install: emsplat completion bash > ~/.local/share/bash-completion/completions/emsplat"
    yield "# or, for this shell alone: source <(emsplat completion bash)"
    yield "_emsplat() {"
    yield "    local word=$2 before=$3"
    yield "    COMPREPLY=()"
    yield "    if ((COMP_CWORD == 1)); then"
    yield f'        COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$word"))'
    yield "        return"
    yield "    fi"
    yield '    case "${COMP_WORDS[1]} $before" in'
    for name, command in commands.items():
        for option in _options(command):
            if option.choices:
                pattern = "|".join(f'"{name} {flag}"' for flag in option.flags)
                yield f'    {pattern}) COMPREPLY=($(compgen -W "{" ".join(option.choices)}" -- "$word")); return ;;'
        for word in _words(command):
            yield f'    "{name} {name}") COMPREPLY=($(compgen -W "{word}" -- "$word")); return ;;'
    yield "    esac"
    yield "    [[ $word == -* ]] || return"  # files, by -o default
    yield '    case "${COMP_WORDS[1]}" in'
    for name, command in commands.items():
        yield f'    {name}) COMPREPLY=($(compgen -W "{" ".join(_flags(command))}" -- "$word")) ;;'
    yield "    esac"
    yield "}"
    yield "complete -o bashdefault -o default -F _emsplat emsplat"


def _zsh(commands: dict[str, Command]) -> Iterator[str]:
    yield "#compdef emsplat"
    yield "# Install: emsplat completion zsh > FOLDER/_emsplat, with a FOLDER of $fpath, before compinit"
    yield "# or, behind compinit in ~/.zshrc: source <(emsplat completion zsh)"
    yield "_emsplat() {"
    yield "    local -a commands"
    yield "    commands=("
    for name, command in commands.items():
        yield f"        '{name}:{_short(summary(command))}'"
    yield "    )"
    yield "    if ((CURRENT == 2)); then"
    yield "        _describe command commands"
    yield "        return"
    yield "    fi"
    yield "    local command=$words[2]"
    yield "    shift words"
    yield "    ((CURRENT--))"
    yield "    case $command in"
    for name, command in commands.items():
        yield f"    {name})"
        yield "        _arguments -s \\"
        for option in _options(command):
            value = "" if option.is_switch else f":{option.metavar}:{_zsh_values(option)}"
            if option.many:
                value = f":*-*{value}"  # up to the next option
            for flag in option.flags:
                yield f"            '{'*' if option.many else ''}{flag}[{_short(option.help)}]{value}' \\"
        yield "            '--help[Show the help]' \\"
        rest = next((f"({words})" for words in _words(command)), "_files")
        yield f"            '*:file:{rest}'"
        yield "        ;;"
    yield "    esac"
    yield "}"
    yield 'if [[ "${funcstack[1]}" == _emsplat ]]; then _emsplat "$@"; else compdef _emsplat emsplat; fi'


def _zsh_values(option: Argument) -> str:
    return f"({' '.join(option.choices)})" if option.choices else "_files"


def _fish(commands: dict[str, Command]) -> Iterator[str]:
    yield "# Install: emsplat completion fish > ~/.config/fish/completions/emsplat.fish"
    for name, command in commands.items():
        yield f"complete -c emsplat -n __fish_use_subcommand -f -a {name} -d '{_short(summary(command))}'"
    for name, command in commands.items():
        start = f"complete -c emsplat -n '__fish_seen_subcommand_from {name}'"
        for option in _options(command):
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            value = "" if option.is_switch else f" -x -a '{' '.join(option.choices)}'" if option.choices else " -r"
            yield f"{start} {flags}{value} -d '{_short(option.help)}'"
        for words in _words(command):
            yield f"{start} -f -a '{words}'"
        yield f"{start} -l help -d 'Show the help'"


SHELLS: dict[str, Callable[[dict[str, Command]], Iterator[str]]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}


def script(shell: str, commands: dict[str, Command]) -> str:
    """The script for one of `SHELLS`."""
    return "\n".join(SHELLS[shell](commands))
