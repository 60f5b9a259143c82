"""The house stays as docs/architecture.md and docs/conventions.md say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "emsplat"
FLOORS = [
    {"errors"},
    {"types", "process", "device", "parallel", "_native"},
    {"kernels", "maths"},
    {"imaging", "measures"},
    {"io"},
    {"config", "models"},
    {"run"},
    {"particles", "report"},
    {"sums"},
    {"fitting", "assessment"},
    {"programs"},
    {"cli", "relion_job"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


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


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_emsplat_is_cheap():
    assert not {"torch", "matplotlib", "tyro", "rich", "gemmi"} & loaded_after("import emsplat")


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
