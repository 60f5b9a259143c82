"""The report: complete and damaged run folders, text that must be escaped, and no torch."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch

from emsplat.assess.fsc import resolution
from emsplat.errors import InputError
from emsplat.report import _resolution, _round_length, draw_convergence, draw_fsc, draw_slices, write_report
from emsplat.types import Curve

PNG = b"\x89PNG\r\n\x1a\n"
SIZE, PIXEL_SIZE = 48, 3.54


def write_map(path: Path) -> None:
    """Three blobs that differ along every axis."""
    z, y, x = np.meshgrid(*[np.arange(SIZE) - SIZE // 2] * 3, indexing="ij")
    centres = [(0, 0, 0, 5.0), (0, 0, 11, 3.0), (0, 12, 0, 2.0), (-10, 0, 0, 4.0)]
    volume = sum(np.exp(-((x - c) ** 2 + (y - b) ** 2 + (z - a) ** 2) / (2 * w**2)) for a, b, c, w in centres)
    noise = np.random.default_rng(0).normal(0, 0.03, volume.shape)
    with mrcfile.new(path, (volume + noise).astype(np.float32), overwrite=True) as file:
        file.voxel_size = PIXEL_SIZE


def write_fsc(path: Path) -> None:
    frequency = np.arange(SIZE // 2 + 1) / (SIZE * PIXEL_SIZE)
    unmasked, masked = (1 / (1 + np.exp((frequency - middle) / 0.01)) for middle in (0.085, 0.105))
    rows = "".join(
        f"{s} {k:.6f} {1 / k if s else 999:.3f} {u:.6f} {m:.6f}\n"
        for s, (k, u, m) in enumerate(zip(frequency, unmasked, masked, strict=True))
    )
    path.write_text(
        "# version 50001\n\ndata_general\n\n_rlnFinalResolution 8.5\n\n\ndata_fsc\n\nloop_\n"
        "_rlnSpectralIndex #1\n_rlnResolution #2\n_rlnAngstromResolution #3\n"
        "_rlnFourierShellCorrelationUnmaskedMaps #4\n_rlnFourierShellCorrelationMaskedMaps #5\n" + rows
    )


def write_convergence(path: Path) -> None:
    generator = np.random.default_rng(1)
    lines = ["fit,epoch,step,images,loss"]
    for offset, fit in enumerate(("half 1", "half 2", "full")):
        for step in range(400):
            loss = offset * 0.01 - 1 + math.exp(-step / 60) + generator.normal(0, 0.02)
            lines.append(f"{fit},{step // 100},{step},{step * 32},{loss:.6f}")
    path.write_text("\n".join(lines) + "\n")


SUMMARY: dict[str, Any] = {
    "resolution": {
        "half_map_unmasked": 10.6,
        "half_map_unmasked_0.5": 11.71,
        "half_map_masked": 7.08,
        "half_map_masked_0.5": None,
    },
    "input": {"file": "particles.star", "particles": 2374, "box": SIZE, "pixel_size": PIXEL_SIZE},
    "fits": {"half 1": {"gaussians": 4000, "seconds": 41.25}, "half 2": {"gaussians": 4000}},
    "settings": {"epochs": 4, "symmetry": "D2", "learning_rates": [0.01, 0.001]},
    "versions": {"emsplat": "0.1.0"},
    "warnings": ["half-sets were drawn at random: the star file has no rlnRandomSubset"],
    "seed": 7,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as `emsplat reconstruct` leaves it."""
    folder = tmp_path / "run <1> & co"
    folder.mkdir()
    for name in ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc", "run_class001.mrc"):
        write_map(folder / name)
    write_fsc(folder / "fsc.star")
    write_convergence(folder / "convergence.csv")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.toml").write_text('out = "<run>"\n')
    return folder


class Checker(HTMLParser):
    """Collects text and links, and insists that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]
        if tag not in ("br", "img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read_page(path: Path) -> tuple[Checker, str]:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert checker.open == []
    return checker, " ".join(" ".join(checker.texts).split())


def test_whole_folder(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    checker, text = read_page(path)
    assert len(checker.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    for expected in (
        "10.60 Å",
        "overestimates",
        "not reached",
        "the limit set by the pixel size",
        "2374",
        "0.01, 0.001",
        "half 1 / seconds",
        "41.25",
        "rlnRandomSubset",
        "run <1> & co",
    ):
        assert expected in text
    assert "Not shown" not in text
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_page_needs_nothing_else(run: Path) -> None:
    page = write_report(run).read_text()
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)


def test_text_is_escaped(run: Path) -> None:
    nasty = "<script>alert('x')</script> & \"quoted\""
    summary = {nasty: {nasty: nasty}, "warnings": [nasty], "resolution": {nasty: nasty}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.toml").write_text(nasty)
    (run / "a <b> & c.star").write_text("")
    checker, text = read_page(write_report(run))
    assert "script" not in checker.tags
    assert nasty in text
    assert "a <b> & c.star" in text


@pytest.mark.parametrize("name", ["run_class001.mrc", "fsc.star", "convergence.csv", "summary.json", "config.toml"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "empty"])
def test_damaged_part_is_named(run: Path, name: str, damage: str) -> None:
    """The page is still written, and says which file failed; config.toml is shown as it is."""
    if damage == "missing":
        (run / name).unlink()
    else:
        (run / name).write_bytes(b"\xff\x00 not what it should be" if damage == "garbage" else b"")
    _, text = read_page(write_report(run))
    if not (name == "config.toml" and damage == "empty"):
        assert "Not shown" in text
        assert name in text


def test_empty_folder(tmp_path: Path) -> None:
    _, text = read_page(write_report(tmp_path))
    assert text.count("Not shown") == 6


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"resolution": None},
        {"resolution": {}, "warnings": None},
        {"resolution": {"new_kind": 5}, "input": 3},
    ],
)
def test_sparse_summary(run: Path, summary: dict[str, Any]) -> None:
    (run / "summary.json").write_text(json.dumps(summary))
    read_page(write_report(run))


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: not a folder; expected the run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("draw", "name"),
    [(draw_fsc, "fsc.png"), (draw_slices, "slices.png"), (draw_convergence, "convergence.png")],
)
def test_figures(run: Path, draw: Any, name: str) -> None:
    assert draw(run) == run / name
    assert (run / name).read_bytes().startswith(PNG)


def test_unknown_curves_are_drawn_too(run: Path) -> None:
    """A column that this version does not know, undefined in places, does not stop the figure."""
    star = run / "fsc.star"
    lines = star.read_text().splitlines()
    rows = [f"{line} {'nan' if i % 5 == 0 else '0.4'}" if line[:1].isdigit() else line for i, line in enumerate(lines)]
    at = next(i for i, line in enumerate(rows) if line.startswith("_rlnFourierShellCorrelationMasked"))
    star.write_text("\n".join([*rows[: at + 1], "_emsplatNewCurve #6", *rows[at + 1 :]]))
    assert draw_fsc(run).read_bytes().startswith(PNG)


def test_resolution_twin() -> None:
    """The report's rule is that of emsplat.assess.fsc."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.arange(12).double() / 60
    for _ in range(50):
        value = torch.rand(12, generator=generator, dtype=torch.float64)
        value[5] = math.nan
        expected = resolution(Curve(frequency, value), 0.2)
        assert _resolution(frequency.tolist(), value.tolist(), 0.2) == pytest.approx(expected)


def test_scale_bar_is_round() -> None:
    assert [_round_length(x) for x in (0.7, 1.0, 4.9, 56.6, 130.0)] == [0.5, 1.0, 2.0, 50.0, 100.0]


def test_imports_no_torch() -> None:
    """Reading a report must not wait for torch, nor importing the module for matplotlib."""
    code = (
        "import sys, importlib.util as u\n"
        "import types; package = types.ModuleType('emsplat'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['emsplat'] = package\n"
        "import emsplat.report\n"
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy import'\n"
    )
    import emsplat.report

    folder = str(Path(emsplat.report.__file__).parent)
    subprocess.run([sys.executable, "-c", code, folder], check=True, env={**os.environ, "PYTHONPATH": ""})
