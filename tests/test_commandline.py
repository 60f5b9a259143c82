"""The face of the program: help, examples, hints at misspelt words, completion, the folder that results go to."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from emsplat import cli, relion_job
from emsplat import config as config_module
from emsplat.cli import commands, main
from emsplat.commandline import completion
from emsplat.commandline.arguments import command_of
from emsplat.commandline.help import Page, command_help, program_help, terminal
from emsplat.commandline.parse import call, did_you_mean, parse
from emsplat.config import Angstrom, Name, ReconstructConfig, change, configure, flat, names
from emsplat.errors import InputError
from emsplat.run.folder import check_same_run

EVERY = [*commands().values(), command_of(relion_job.job, "emsplat-relion")]
each_command = pytest.mark.parametrize("command", EVERY, ids=lambda command: command.program)


@dataclass(frozen=True)
class Inner:
    """How it is read."""

    size: int = 3
    """Size in
    pixels."""

    scale: Angstrom | None = None
    """A length."""


@dataclass(frozen=True)
class Outer:
    """What is done."""

    inner: Inner = Inner()
    kind: Literal["fast", "exact"] = "fast"
    """How."""

    batch: int | Literal["auto"] | None = None
    """Images at once."""

    files: tuple[Path, ...] = ()
    """More files."""

    turn: bool = True
    """Let it turn."""

    loud: bool = False
    """Say more."""

    label: Annotated[str, Name("class"), "CLASS"] = "a"
    """Which one."""


def work(first: Path, second: Path | None = None, /, output: Path | None = None, config: Outer = Outer()):
    """Does a thing. And more.

    Args:
        first: The first
            file.
        second: Another.
        output: Where to.

    Examples:
        # the usual
        prog a --size 4
    """
    return first, second, output, config


COMMAND = command_of(work, "prog work")


def test_values_reach_the_nested_dataclass():
    words = "--size=4 a -o out --scale -2.5e1 --batch auto --files x y --files z --no-turn --loud --class q -- --odd"
    first, second, output, config = call(COMMAND, words.split())
    assert (first, second, output) == (Path("a"), Path("--odd"), Path("out"))
    files = (Path("x"), Path("y"), Path("z"))
    assert config == Outer(Inner(4, -25.0), "fast", "auto", files, False, True, "q")
    assert call(COMMAND, ["a"]) == (Path("a"), None, None, Outer())
    assert call(COMMAND, ["a", "--batch", "7", "--turn"])[-1] == Outer(batch=7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "FIRST is missing: The first file."),
        ("a b c", "c: one argument too many"),
        ("a --sise 3", "--sise: no such option; did you mean --size?"),
        ("a --xyzzy", "--xyzzy: no such option (see"),
        ("a --size x", "--size x: expected a whole number"),
        ("a --size", "--size: expected one argument"),
        ("a --batch many", "--batch many: expected a whole number or auto"),
        ("a --kind exct", "--kind exct: expected fast or exact; did you mean exact?"),
        ("a --loud=3", "--loud"),
        ("a --siz 3", "--siz: no such option"),  # no abbreviations: they would change their meaning with a new option
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(words, said):
    with pytest.raises(InputError) as caught:
        call(COMMAND, words.split())
    assert said in str(caught.value)
    assert str(caught.value).startswith("work ")
    assert str(caught.value).endswith("(see prog work --help)")


def test_help_is_panels_with_the_docstrings_of_the_fields():
    text = command_help(COMMAND, Page(70))
    assert text.startswith("Usage: prog work FIRST [SECOND] [OPTIONS]\n\nDoes a thing. And more.\n")
    panels = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert panels == ["Arguments", "Options", "What is done", "How it is read", "Examples"]
    for line in (
        "  FIRST                     The first file.",
        "  -o, --output PATH         Where to.",
        "  --size N                  Size in pixels. [default: 3]",
        "  --scale Å                 A length.",
        "  --kind fast|exact         How. [default: fast]",
        "  --batch N|auto            Images at once.",
        "  --files PATH ...          More files.",
        "  --[no-]turn               Let it turn. [default: yes]",
        "  --loud                    Say more.",
        "  --class CLASS             Which one. [default: a]",
    ):
        assert line in text.splitlines()


@each_command
@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_of_every_command(command, width):
    text = command_help(command, Page(width))
    assert "None" not in text
    assert "config" not in "".join(panel.title for panel in command.panels)
    for line in text.partition("\nExamples:")[0].splitlines():
        assert len(line) <= min(width, 100) or line.startswith("Usage")
    for argument in command.arguments:
        assert argument.help, argument.name
        assert argument.help[0].isupper() or argument.help.startswith(("cryo", "mmCIF", "bash"))
    flags = [flag for argument in command.arguments for flag in argument.flags]
    assert len(set(flags)) == len(flags)
    names = [argument.name for argument in command.arguments if argument.flags]
    assert len(set(names)) == len(names)


@each_command
def test_examples_are_command_lines_that_can_be_read(command):
    if command.program == "emsplat-relion":
        return
    lines = [line for line in command.examples if not line.startswith("#")]
    assert len(lines) == 3
    for line in lines:
        program, name, *words = shlex.split(line.partition(" > ")[0])
        assert [program, name] == command.program.split()
        parse(command, words)


def test_threads_and_output_have_short_names_everywhere():
    for command in commands().values():
        for argument in command.arguments:
            if argument.name in ("threads", "output") and argument.flags:
                assert argument.flags == ({"threads": "-j", "output": "-o"}[argument.name], f"--{argument.name}")
    # The rest computes nothing.
    without = {name for name, one in commands().items() if "threads" not in {own.name for own in one.arguments}}
    assert without == {"convert", "report", "view", "completion"}


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["help", "fsc"], ["fsc", "a", "-h"]])
def test_help_goes_to_standard_output(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Usage: emsplat")
    assert printed.err == ""


def test_help_of_the_program_names_every_command(capsys):
    assert main([]) == 2
    text = capsys.readouterr().out
    for name in commands():
        assert f"\n  {name} " in text
    assert program_help("About.", {}, (), Page(10)).startswith("Usage: emsplat")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reconstrct"], "emsplat: reconstrct: no such command; did you mean reconstruct? (see emsplat --help)\n"),
        (["xyzzy"], "emsplat: xyzzy: no such command (see emsplat --help)\n"),
        (["--verison"], "emsplat: --verison: no such command (see emsplat --help)\n"),
        (
            ["reconstruct", "a.star", "--symetry", "D2"],
            "emsplat: reconstruct --symetry: no such option; did you mean --symmetry? (see emsplat",
        ),
        (["voxelize", "a.ply"], "emsplat: voxelize -o, --output MAP is missing: MRC map to write."),
    ],
)
def test_misspelt_words(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(said)
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_option_may_be_called_as_an_argument_is(monkeypatch, tmp_path):
    """`emsplat nulltest particles.star --particles 500`."""
    monkeypatch.chdir(tmp_path)
    positional, given = parse(commands()["nulltest"], ["a.star", "--particles", "500"])
    assert (positional, given) == ([Path("a.star")], {"particles": 500})
    assert main(["nulltest", "none.star", "--particles", "500"]) == 2
    with pytest.raises(InputError, match="PARTICLES is missing"):
        parse(commands()["nulltest"], ["--particles", "500"])
    with pytest.raises(InputError, match="completion zhs: expected bash, zsh or fish; did you mean zsh"):
        parse(commands()["completion"], ["zhs"])


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal().color
    assert "\033[1mOptions:\033[0m\n" in command_help(COMMAND, Page(80, color=True))
    assert "\033" not in command_help(COMMAND, Page(80))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal().color


def test_hints():
    assert did_you_mean("backprojct", commands()) == "; did you mean backproject?"
    assert did_you_mean("zzz", commands()) == ""


# Options in their groups


def test_options_by_their_names():
    config = configure(ReconstructConfig, symmetry="D2", epochs=3, mask=Path("m.mrc"), resume=True)
    assert (config.choice.symmetry, config.fit.epochs, config.mask.mask, config.run.resume) == (
        *("D2", 3, Path("m.mrc"), True),
    )
    assert change(config, epochs=None, mask=None, resume=False) == configure(ReconstructConfig, symmetry="D2")
    assert list(flat(config)) == list(names(ReconstructConfig))
    assert flat(config)["particle_class"] is None
    assert configure(ReconstructConfig, **flat(config)) == config
    for wrong in (configure, change):
        with pytest.raises(TypeError, match="ReconstructConfig has no option epoch"):
            wrong(ReconstructConfig if wrong is configure else config, epoch=3)


def test_older_runs_are_resumed_by_the_names_of_their_options(tmp_path):
    """config.toml is flat, as before there were groups."""
    text = 'particles = "a.star"\n[settings]\nengine = "one-pass"\n[options]\nsymmetry = "D2"\nclass = 1\nepochs = 3\n'
    (tmp_path / "config.toml").write_text(text.replace("class", "particle_class"))
    config = configure(ReconstructConfig, symmetry="D2", particle_class=1, epochs=3, resume=True, threads=2)
    check_same_run(config, Path("a.star"), tmp_path)
    with pytest.raises(InputError, match="was run with another epochs, seed; resume"):
        check_same_run(change(config, epochs=4, seed=1), Path("a.star"), tmp_path)


def test_panels_of_a_reconstruction():
    titles = [panel.title for panel in commands()["reconstruct"].panels]
    assert titles == [
        *("Arguments", "Options", "Which particles, and in which hand", "How their images are read"),
        *("Half-sets and chance", "What is fitted", "How it is fitted; what is not given follows from the recipe"),
        *("Mask of the FSC", "The run"),
    ]


def test_every_option_is_read_by_somebody():
    """As an attribute, somewhere outside of the command line."""
    source = Path(cli.__file__).parent
    read = {
        node.attr
        for path in source.rglob("*.py")
        if path.name not in ("config.py", "cli.py") and path.parent.name != "commandline"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    configs = [value for name, value in vars(config_module).items() if name.endswith("Config") and is_dataclass(value)]
    assert len(configs) == 15
    for kind in configs:
        assert set(names(kind)) <= read, kind.__name__


def test_options_load_no_command_line():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, emsplat.config; print(*sys.modules)"], capture_output=True, text=True
    )
    loaded = set(done.stdout.split())
    assert "emsplat.config" in loaded
    assert not {name for name in loaded if name.startswith("emsplat.commandline")} | {"argparse", "torch"} & loaded


# Completion


def run_bash(tmp_path, words):
    """What bash offers behind these words, the last of which is begun."""
    (tmp_path / "script").write_text(completion.script("bash", commands()))
    quoted = " ".join(map(shlex.quote, words))
    code = (
        f"source ./script; COMP_WORDS=({quoted}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_emsplat emsplat "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices(tmp_path):
    assert run_bash(tmp_path, ["emsplat", "re"]) == ["reconstruct", "refine", "report"]
    assert run_bash(tmp_path, ["emsplat", "reconstruct", "--sym"]) == ["--symmetry"]
    assert run_bash(tmp_path, ["emsplat", "reconstruct", "--recipe", "c"]) == ["cryosplat"]
    assert run_bash(tmp_path, ["emsplat", "fsc", "--recipe", "c"]) == []
    assert run_bash(tmp_path, ["emsplat", "completion", "z"]) == ["zsh"]
    assert run_bash(tmp_path, ["emsplat", "reconstruct", "part"]) == []  # bash itself offers files


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_scripts_hold_everything_and_can_be_read(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "# Install:" in text
    for command in commands().values():
        for argument in command.arguments:
            for flag in argument.flags:
                assert re.search(rf"\W{flag.lstrip('-') if shell == 'fish' else flag}\W", text), flag
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", "script"], cwd=tmp_path, check=True)
    assert all(line.count("'") % 2 == 0 for line in text.splitlines())


def test_the_face_loads_nothing_heavy():
    code = (
        "import sys, emsplat.cli as c; c.main(['completion', 'bash']); c.main(['reconstruct', '--help'])\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "rich", "gemmi", "matplotlib"} & set(done.stdout.splitlines()[-1].split())


# The folder that results go to


def test_results_without_a_folder_go_into_the_next_free_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["simulate", "--box", "16", "--pixel-size", "9", "--particles", "4", "--atoms", "100"]
    assert main(small) == 0
    assert capsys.readouterr().out.splitlines()[0] == "output: simulate_001 (new; -o names another)"
    (tmp_path / "simulate_007").mkdir()
    (tmp_path / "simulate_old").mkdir()
    assert main(small) == 0
    assert (tmp_path / "simulate_008" / "particles.star").is_file()


@pytest.mark.parametrize("name", ["reconstruct", "backproject", "preprocess", "nulltest"])
def test_nothing_is_left_of_a_folder_that_nothing_was_written_into(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([name, "none.star"]) == 2
    assert capsys.readouterr().out == f"output: {name}_001 (new; -o names another)\n"
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_has_to_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reconstruct", "none.star", "--resume"]) == 2
    assert capsys.readouterr().err == "emsplat: --resume: say of which run, with -o FOLDER\n"
    for number in ("001", "002", "010"):
        (tmp_path / f"reconstruct_{number}").mkdir()
    assert main(["reconstruct", "none.star", "--overwrite"]) == 2
    assert "; the newest here is -o reconstruct_010\n" in capsys.readouterr().err


def test_a_number_that_another_process_takes_is_left_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reconstruct_001").touch()  # a file is in the way as well
    with cli._folder(None, "reconstruct") as one, cli._folder(None, "reconstruct") as other:
        assert [one.name, other.name] == ["reconstruct_002", "reconstruct_003"]
    assert [path.name for path in tmp_path.iterdir()] == ["reconstruct_001"]
