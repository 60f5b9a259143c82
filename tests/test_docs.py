"""The pages do what they say, and the packages agree with pyproject.toml."""

import json
import re
import tomllib
from pathlib import Path

import matplotlib
import pytest

from emsplat.measures.curves import resolution
from notebook import as_notebook, code_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
# Names that conda-forge gives to packages of the Python index.
CONDA = {"torch": "pytorch", "tomli-w": "tomli-w", "matplotlib": "matplotlib-base"}


@pytest.mark.slow
def test_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib, "rcParams", matplotlib.rcParams.copy())
    matplotlib.use("agg")
    names = {}
    exec(compile(code_of(PAGE), "python.md", "exec"), names)
    said = capsys.readouterr().out
    grid, found, with_truth = names["grid"], names["run"].resolution, names["with_truth"]
    # The full map has twice the particles of the halves that the cross-validated number speaks of.
    assert resolution(with_truth["Gaussians"], 0.5) < 1.02 * found
    assert with_truth["Gaussians"].value.mean() > with_truth["classical map"].value.mean()
    assert 2 * grid.pixel_size < found < 15
    assert float(names["image"].sum()) == pytest.approx(float(names["finer"].sum()), rel=2e-3)
    assert "1,000 particles of 48 pixels of 3 Å" in said


def test_notebook_is_the_page():
    notebook = json.loads(json.dumps(as_notebook(PAGE)))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "\n".join(code).split() == code_of(PAGE).split()
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any("](images/" in line for cell in notebook["cells"] for line in cell["source"])


@pytest.mark.parametrize("file", ["environment.yml", "packaging/conda/recipe.yaml"])
def test_conda_asks_for_what_pip_asks_for(file):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"])
    needed = {CONDA.get(name, name): bound for name, bound in needed.items()} | {"python": project["requires-python"]}
    text = (ROOT / file).read_text(encoding="utf-8")
    given = dict(re.findall(r"^ +- ([\w-]+) ([<>=][\d.,<>=]+)$", text, re.MULTILINE))
    assert {name: given.get(name) for name in needed} == needed
