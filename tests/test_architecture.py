"""The house stays as docs/architecture.md and docs/conventions.md say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emsplat.run import files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "emsplat"
_ROW = re.compile(r"^\| (\d+) \| ([\w, ]+) \|", re.MULTILINE)
_TABLE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Floors")[2].partition("\n## ")[0]
FLOOR = {name: int(floor) for floor, names in _ROW.findall(_TABLE) for name in names.split(", ")}


def room(path):
    """The module or package directly below emsplat that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emsplat"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names if alias.name in FLOOR]


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py" or path.parent != SOURCE]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_modules_import_from_floors_below(path):
    for other in imported_rooms(path):
        own = room(path)
        assert other == own or FLOOR[other] < FLOOR[own], f"{own} imports {other}"


def test_every_room_has_a_floor():
    rooms = {room(path) for path in MODULES}
    assert rooms | {"_native"} == set(FLOOR)


def test_modules_of_a_room_import_each_other_without_a_circle():
    """Imports that are run when a module is loaded."""
    below = {}
    for path in MODULES:
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        found = [node.module.removeprefix("emsplat.") for node in nodes if (node.module or "").startswith("emsplat.")]
        below[name] = {other for other in found if other.split(".")[0] == name.split(".")[0] and other != name}

    def reached(name, seen=()):
        assert name not in seen, f"a circle: {' -> '.join([*seen, name])}"
        for other in below.get(name, ()):
            reached(other, (*seen, name))

    for name in below:
        reached(name)


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_emsplat_is_cheap():
    assert not {"torch", "matplotlib", "argparse", "rich", "gemmi"} & loaded_after("import emsplat")


@pytest.mark.parametrize(
    "forbidden",
    [
        r"\bpickle\.(load|loads|dump|dumps)\b",
        r"import pickle",
        r"allow_pickle=True",
        r"torch\.(load|save)\(",
        r"\burllib\.request|\brequests\b|\bsocket\b",
    ],
)
def test_no_pickle_and_no_network(forbidden):
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if path.name == "pickles.py":  # arrays for cryoDRGN and back, read without running them
            text = text.replace("import pickle\nimport pickletools\n", "").replace("pickle.dumps(", "")
        assert not re.search(forbidden, text), path


def test_every_convention_names_a_test_that_exists():
    text = (ROOT / "docs" / "conventions.md").read_text()
    named = re.findall(r"tests/(\w+\.py)::(\w+)", text)
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
    assert "(test:" not in text


def test_no_error_is_swallowed_unseen():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"
                assert [type(line) for line in node.body] != [ast.Pass], f"{path}:{node.lineno}"


def named_files():
    """The names of run/files.py, and for its functions what their names begin and end with, as patterns."""
    for value in vars(files).values():
        for name in value if isinstance(value, tuple) else [value]:
            if isinstance(name, str) and re.fullmatch(r"[a-z0-9_]+\.[a-z]+", name):
                yield re.escape(name)
    yield from (r"^run_$", r"^backprojection_$", r"_statistics")


def texts(path):
    """The strings of a module that are no docstrings, with their lines."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_files_of_a_run_folder_are_named_once():
    """In run/files.py: elsewhere they are asked for, also in messages."""
    names = list(named_files())
    assert len(names) > 30
    own = [text for _, text in texts(SOURCE / "run" / "files.py") if re.fullmatch(r"[a-z0-9_]+\.[a-z]+", text)]
    assert len(set(own)) == len(own)
    written = re.compile("|".join(rf"(?<![\w.])(?:{name})(?![\w])" if name[0] != "^" else name for name in names))
    again = [
        f"{path.relative_to(SOURCE)}:{line}: {text}"
        for path in MODULES
        if path != SOURCE / "run" / "files.py"
        for line, text in texts(path)
        if written.search(text)
    ]
    assert not again, again


def test_relions_names_of_curves_are_written_in_one_place():
    """Elsewhere curves have names of the house."""
    column = re.compile(
        r"(rln|emsplat)(Fourier|CorrectedFourier|CrossValidated|Backprojection|Cryodrgn|Reference|LogAmp)"
    )
    found = {path.relative_to(SOURCE).as_posix() for path in MODULES for _, text in texts(path) if column.search(text)}
    assert found == {"run/fsc_star.py"}


def test_symmetries_are_parsed_at_the_doors():
    """Options, Python's interface, the settings of a run folder; below, a symmetry is a value."""
    found = {path.relative_to(SOURCE).as_posix() for path in MODULES if "parse_symmetry(" in path.read_text()}
    assert found == {"maths/groups.py", "config.py", "interface.py", "assessment/maps.py"}


def test_the_report_has_no_readers_of_its_own():
    """STAR, MRC and PLY are read by `io`, whose readers load no torch."""
    for path in (SOURCE / "report").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"\b(gemmi|mrcfile|np\.frombuffer|np\.fromfile|end_header|loop_)\b", text), path
    assert "torch" not in loaded_after("import emsplat.io.mrc_arrays, emsplat.io.ply_arrays, emsplat.run.fsc_star")
