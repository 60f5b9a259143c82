"""The report: complete and damaged run folders, text that must be escaped, a real browser, and no torch."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from plotly.offline import get_plotlyjs
from scipy.ndimage import gaussian_filter

from emsplat.errors import InputError
from emsplat.io.ply import read_ply, write_ply
from emsplat.report import figures, page, plots, read, surface, verdict, write_report
from emsplat.report.resample import resample
from emsplat.report.words import CURVE_NAMES
from emsplat.run.fsc_star import _COLUMNS as COLUMNS
from emsplat.types import Grid

PNG = b"\x89PNG\r\n\x1a\n"
SIZE, PIXEL_SIZE = 32, 3.54
FIGURES = ("fsc", "slices", "convergence", "local_resolution", "local_resolution_slices", "directions", "residual")
FIGURES += ("gaussians",)
EXAMPLES = 2


def write_volume(path: Path, values: np.ndarray) -> None:
    with mrcfile.new(path, values.astype(np.float32), overwrite=True) as file:
        file.voxel_size = PIXEL_SIZE


def blobs(size: int) -> np.ndarray:
    """Three blobs that differ along every axis, and a cloud of small ones for detail."""
    z, y, x = np.meshgrid(*[np.arange(size) - size // 2] * 3, indexing="ij")
    unit = size / 48
    centres = [(0, 0, 0, 5.0), (0, 0, 11, 3.0), (0, 12, 0, 2.0), (-10, 0, 0, 4.0)]
    volume = sum(
        np.exp(-((x - c * unit) ** 2 + (y - b * unit) ** 2 + (z - a * unit) ** 2) / (2 * (w * unit) ** 2))
        for a, b, c, w in centres
    )
    detail = gaussian_filter(np.random.default_rng(2).normal(0, 1, volume.shape), 1.2)
    return volume * (1 + 3 * detail)


def write_maps(folder: Path, size: int) -> None:
    volume = blobs(size)
    noise = np.random.default_rng(0).normal(0, 0.01, volume.shape)
    for name in ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc", "run_class001.mrc"):
        write_volume(folder / name, volume + noise)
    mask = (gaussian_filter(volume, 1.5) > 0.08).astype(float)
    write_volume(folder / "mask.mrc", gaussian_filter(mask, 1))
    radius = np.sqrt(sum((axis - size // 2) ** 2 for axis in np.indices(volume.shape)))
    local = np.where(mask > 0, 2.2 * PIXEL_SIZE + 8 * radius / size, np.nan)
    write_volume(folder / "local_resolution.mrc", local)
    write_volume(folder / "local_resolution_half_maps.mrc", 0.9 * local)


def write_table(path: Path, columns: dict[str, Any]) -> None:
    rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(rows) + "\n")


def write_directions(path: Path, step: float = 10) -> None:
    tilt, rot = (np.arange(step / 2, end, step) for end in (180, 360))
    e, a = (grid.ravel() for grid in np.meshgrid(tilt, rot, indexing="ij"))
    belt = np.exp(-(((e - 90) / 30) ** 2))
    write_table(
        path,
        {
            "tilt": e,
            "rot": a,
            "fslc": 0.95 + 0.03 * belt,
            "conical_resolution": np.where(e < 10, np.nan, 9 - belt),
            "sampling": 0.5 + belt,
            "particles": np.random.default_rng(3).poisson(20 * belt * np.sin(np.radians(e))),
        },
    )


def write_residual(path: Path, size: int) -> None:
    frequency = np.arange(1, size // 2 + 1) / (size * PIXEL_SIZE)
    noise = 1 + 0.02 / frequency
    write_table(path, {"frequency": frequency, "noise": noise, "own": 0.98 * noise, "other": 1.01 * noise})


def write_examples(path: Path, size: int) -> None:
    generator = np.random.default_rng(4)
    images = []
    for axis in range(EXAMPLES):
        projection, noise = blobs(size).sum(axis), generator.normal(0, 3, (size, size))
        images += [projection + noise, projection, noise]
    write_volume(path, np.array(images))


def write_gaussians(path: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    mean, quaternion = torch.randn(count, 3, generator=generator), torch.randn(count, 4, generator=generator)
    scale = 2 + torch.rand(count, 3, generator=generator)
    write_ply(path, mean * 20, scale, quaternion, torch.ones(count), Grid(SIZE, PIXEL_SIZE), "test")


def write_fsc(path: Path, size: int) -> None:
    """RELION's and emsplat's columns, with a value that is undefined."""
    shells = np.arange(size // 2 + 1)
    frequency = shells / (size * PIXEL_SIZE)
    curves = {
        COLUMNS[name]: 1 / (1 + np.exp((frequency - 0.08 - 0.004 * place) / 0.01))
        for place, name in enumerate([*CURVE_NAMES, "cross_validated_low", "cross_validated_high"])
    }
    curves["emsplatCrossValidatedLow"] = curves["emsplatCrossValidated"] - 0.03
    curves["emsplatCrossValidatedHigh"] = curves["emsplatCrossValidated"] + 0.03
    curves["emsplatCrossValidatedLow"][0] = curves["emsplatReferenceMasked"][-1] = np.nan
    columns = {
        "rlnSpectralIndex": shells,
        "rlnResolution": frequency,
        "rlnAngstromResolution": np.append(999, 1 / frequency[1:]),
        **curves,
    }
    header = "".join(f"_{name} #{i + 1}\n" for i, name in enumerate(columns))
    rows = "".join(" ".join(f"{v:.6g}" for v in row) + "\n" for row in zip(*columns.values(), strict=True))
    general = "# version 50001\n\ndata_general\n\n_rlnFinalResolution 8.5\n\n\n"
    path.write_text(f"{general}data_fsc\n\nloop_\n{header}{rows}")


def write_convergence(path: Path, steps: int = 400) -> None:
    generator = np.random.default_rng(1)
    lines = ["fit,epoch,step,images,loss"]
    for offset, fit in enumerate(("half 1", "half 2", "full")):
        for step in range(steps):
            loss = offset * 0.01 - 1 + math.exp(-step / 60) + generator.normal(0, 0.02)
            lines.append(f"{fit},{step // 100},{step},{step * 32},{loss:.6f}")
    path.write_text("\n".join(lines) + "\n")


def write_scores(path: Path) -> None:
    epochs = np.arange(12)
    write_table(path, {"epoch": epochs % 6, "gaussians": 2000 + 1000 * (epochs // 6), "score": 1 - 0.5**epochs})


SUMMARY: dict[str, Any] = {
    "evident": True,
    "limit": {"nyquist": 2 * PIXEL_SIZE, "reached_by": ["half_map_masked"], "ends_with_data": False},
    "resolution": {
        "half_map_unmasked": 10.6,
        "half_map_unmasked_0.5": 11.71,
        "half_map_masked": 7.08,
        "half_map_masked_0.5": None,
        "half_map_corrected": 8.71,
        "half_map_masked_cryodrgn": 7.12,
        "backprojection_masked": 9.87,
        "cross_validated": 9.31,
        "cross_validated_interval": [9.72, 9.05],
        "reference_masked_0.5": 9.44,
    },
    "local_resolution": {
        "half_maps": {"mean": 8.01, "median": 7.9, "p5": 7.1, "p25": 7.5, "p75": 8.4, "p95": 9.8},
        "cross_validated": {"mean": 9.13, "median": 9.0, "p5": 8.1, "p25": 8.5, "p75": 9.4, "p95": 10.8},
        "window": 42.5,
    },
    "directional": {
        "fslc_mean": 0.9721,
        "fslc_std": 0.0123,
        "band": [30.0, 8.5],
        "conical_best": 8.25,
        "conical_worst": 9.75,
        "sampling_compensation": 0.871,
        "unsampled": 0.0,
    },
    "examples": [{"row": 17, "half": 1, "defocus": 12345.0}, {"row": 91, "half": 2, "defocus": 9876.0}],
    "course": [{"gaussians": 2740, "epochs": 11, "score": 0.909344, "kept": True}],
    "input": {
        "file": "particles.star",
        "particles": 2374,
        "half_sets": [1187, 1187],
        "box": SIZE,
        "pixel_size": PIXEL_SIZE,
        "defocus_range": [8133, 11523],
    },
    "fits": {"half1": {"gaussians": 4000, "seconds": 41.25}, "half2": {"gaussians": 4000}},
    "settings": {"engine": "one-pass", "epochs": 4},
    "options": {"symmetry": "D2"},
    "versions": {"emsplat": "0.1.0"},
    "warnings": ["half-sets were drawn at random: the star file has no rlnRandomSubset"],
    "notes": ["images are read from /data/project"],
    "seed": 7,
}


def write_run(folder: Path, size: int = SIZE, gaussians: int = 500) -> Path:
    """A run folder as `emsplat reconstruct` leaves it."""
    folder.mkdir()
    write_maps(folder, size)
    write_fsc(folder / "fsc.star", size)
    write_convergence(folder / "convergence.csv")
    write_scores(folder / "scores.csv")
    write_directions(folder / "directions.csv")
    write_residual(folder / "residual.csv", size)
    write_examples(folder / "examples.mrcs", size)
    write_gaussians(folder / "run_class001.ply", gaussians)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.toml").write_text('out = "<run>"\n')
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run <1> & co"
    shutil.copytree(template, folder)
    return folder


@pytest.fixture
def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering with matplotlib takes most of the time; what it draws is still read and checked."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **options: path.write_bytes(PNG))


class Checker(HTMLParser):
    """Collects text, images and figures, and insists that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.scripts: list[str] = []
        self.plots: list[dict[str, Any]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name == "src"]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("br", "img", "meta"):
            self.open.append("json" if ("type", "application/json") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (("script", "json") if tag == "script" else (tag,))

    def handle_data(self, data: str) -> None:
        match self.open[-1:]:
            case ["json"]:
                self.plots.append(json.loads(data))
            case ["script"]:
                self.scripts.append(data)
            case ["style"]:
                pass
            case _:
                self.texts.append(data)


def read_page(path: Path) -> tuple[Checker, str]:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert checker.open == []
    return checker, " ".join(" ".join(checker.texts).split())


def traces(checker: Checker) -> list[dict[str, Any]]:
    return [trace for plot in checker.plots for trace in plot["data"]]


@pytest.mark.parametrize("size", [(40, 25), (41, 24), (40, 40)])
def test_fewer_samples_are_those_of_scipy(size: tuple[int, int]) -> None:
    from scipy import signal

    old, new = size
    values = np.random.default_rng(0).normal(size=(5, old, 6))
    np.testing.assert_allclose(resample(values, new, 1), signal.resample(values, new, axis=1), atol=1e-12)


@pytest.mark.slow
def test_processes_draw_the_same_page(run: Path, tmp_path: Path) -> None:
    """Everything but names that matplotlib draws by lot for the clip paths of an SVG."""
    alone = tmp_path / "alone" / run.name
    shutil.copytree(run, alone)
    noted = []

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        noted.append(name)
        yield

    write_report(alone)
    write_report(run, timed, processes=3)
    assert noted[0] == "matplotlib"
    assert (run / "report.html").read_bytes() == (alone / "report.html").read_bytes()
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert (run / "directions.png").read_bytes() == (alone / "directions.png").read_bytes()


def test_whole_folder(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    checker, text = read_page(path)
    assert len(checker.sources) == 2 + 3 * EXAMPLES
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    for expected in (
        *("Reconstruction with Gaussians in one pass", "2,374 particles", "1,187 + 1,187", "0.81 to 1.15 µm"),
        *("10.60 Å", "Upper limit", "not reached", "7.08 Å or finer", "7.12 Å", "half 1", "41.25"),
        *("rlnRandomSubset", "images are read from /data/project", "run <1> & co"),
        *("95 % interval: 9.72 Å to 9.05 Å", "the number to quote", "cryoDRGN's rule"),
        *("9.13 Å", "8.01 Å", "42.50 Å", "30.00 to 8.50 Å", "9.75 Å", "0.871", "missing wedge"),
        *("row 17, half 1, defocus 1.23 µm", "row 91", "2740", "0.909344", "What to check", "overfitting"),
        *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")),
    ):
        assert expected in text, expected
    # Settings are shown once, as config.toml; nothing is said to be reduced that was not; no bare keys.
    assert text.count('out = "<run>"') == 1
    for absent in ("educed to voxels", "epochs 4", "half_sets", "half sets", "shift_rms", "elevation", "azimuth"):
        assert absent not in text, absent
    assert "Not shown" not in text
    assert "Not coloured" not in text
    kinds = [sorted({trace["type"] for trace in plot["data"]}) for plot in checker.plots]
    curves, bars = ["scatter"], ["bar"]
    assert kinds == [["mesh3d"], curves, curves, bars, *[["heatmap"]] * 4, curves, curves, curves, bars, bars]
    for name in FIGURES:
        assert (run / f"{name}.png").read_bytes().startswith(PNG)
        assert "</svg>" in (run / f"{name}.svg").read_text()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_headline_starts_with_what_to_quote(run: Path, no_rendering: None) -> None:
    """After it the others, the reference first and cryoDRGN's number last; warnings before all of them."""
    _, text = read_page(write_report(run))
    places = [text.index(f"{number:.2f} Å") for number in (9.31, 9.44, 9.87, 8.71, 7.08, 10.6, 7.12)]
    assert places == sorted(places)
    assert text.index("rlnRandomSubset") < text.index("images are read from") < places[0]


def summary_of(kind: str) -> dict[str, Any]:
    """What each kind of run leaves in its summary."""
    classical = {"half_map_unmasked": 11.0, "half_map_masked": 9.8, "half_map_corrected": 9.9, "cross_validated": None}
    measured = {key: SUMMARY[key] for key in ("evident", "limit", "local_resolution", "directional")}
    match kind:
        case "images":
            return SUMMARY | {"settings": {"engine": "images"}, "course": []}
        case "classical":
            return measured | {"resolution": classical, "fits": {}, "input": SUMMARY["input"], "options": {}}
        case "half maps":
            return measured | {"resolution": classical, "assessment": {"mask": "mine.mrc"}}
        case "no particle":
            silent = dict.fromkeys(SUMMARY["resolution"])
            return SUMMARY | {"evident": False, "resolution": silent, "local_resolution": None, "directional": None}
        case "null test":
            return SUMMARY | {"altered": "poses"}
        case _:
            return SUMMARY


GAUSSIANS_ONLY = ("Convergence", "Particles and residuals", "cross-validated", "Upper limit", "Spikes and needles")


@pytest.mark.parametrize(
    ("kind", "said", "unsaid"),
    [
        ("one-pass", ("in one pass", "9.31 Å Cross-validated FSC 0.5", *GAUSSIANS_ONLY), ()),
        ("images", ("trained on images", "9.31 Å Cross-validated FSC 0.5", *GAUSSIANS_ONLY), ("added in stages",)),
        (
            "classical",
            ("Classical back-projection", "9.90 Å Classical half maps, masked and corrected", "at 0.143", "Map in 3D"),
            (*GAUSSIANS_ONLY, "not reached", "Not shown", "Cross-validated FSC"),
        ),
        (
            "half maps",
            ("Two half maps, measured", "9.90 Å Half maps, masked and corrected", "In the mask mine.mrc"),
            (*GAUSSIANS_ONLY, "not reached", "Not shown", "classical half maps"),
        ),
        (
            "no particle",
            ("No resolution No particle was found", "Not drawn: the surface of a map without a particle"),
            ("not reached", "Not shown", "Upper limit", "Local resolution", "9.31 Å"),
        ),
        ("null test", ("Null test: poses and shifts have changed hands",), ()),
    ],
)
def test_each_kind_of_run_has_its_own_words(
    run: Path, no_rendering: None, kind: str, said: tuple[str, ...], unsaid: tuple[str, ...]
) -> None:
    (run / "summary.json").write_text(json.dumps(summary_of(kind)))
    if kind in ("classical", "half maps"):  # no curve of Gaussians in the table either
        star = run / "fsc.star"
        star.write_text(re.sub("_emsplat(CrossValidated|Backprojection|Reference)", r"_rlnOther\1", star.read_text()))
        for name in ("run_class001.ply", "convergence.csv", "scores.csv", "residual.csv", "examples.mrcs"):
            (run / name).unlink()
    _, text = read_page(write_report(run))
    body = text[: text.rindex("Files")]
    for expected in said:
        assert expected in body, expected
    for absent in unsaid:
        assert absent not in body, absent


def test_tables_of_the_page_give_bounds_at_the_limit_of_the_pixels(tmp_path: Path) -> None:
    nyquist = 2 * PIXEL_SIZE
    local = {"half_maps": {"median": nyquist, "p95": 7.5}, "window": 25.0}
    directional = {"conical_best": nyquist, "conical_worst": 7.5, "band": [30.0, nyquist]}
    summary = SUMMARY | {"local_resolution": local, "directional": directional}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for table in (page.local_resolution_table(tmp_path), page.directional_table(tmp_path)):
        assert table.count("7.08 Å or finer") == 1
        assert "7.50 Å<" in table


def test_terminal_says_what_the_page_says() -> None:
    """The headline, what limits it, and a bound for every number that is the limit of the pixel size."""
    nyquist = 2 * PIXEL_SIZE
    found = dict.fromkeys(SUMMARY["resolution"], nyquist) | {"cross_validated_interval": [nyquist, 7.16]}
    summary = SUMMARY | {"resolution": found, "options": {"box": 64}}
    first, *rest = verdict.lines(summary)
    assert first.startswith("resolution: 7.08 Å or finer (cross-validated FSC 0.5")
    assert "limit of the pixel size, 2 × 3.54 Å" in "".join(rest)
    assert "run again without --box, or extract the particles again with smaller pixels" in "".join(rest)
    assert "95 % interval: 7.16 Å to 7.08 Å or finer." in "".join(rest)
    # Once as the number, once as the end of its interval, and not at every other curve that ends there too.
    assert sum("7.08 Å" in line for line in (first, *rest)) == 2
    (others,) = [line for line in rest if line.startswith("  at the limit of the pixel size: ")]
    assert others.count(";") == 5

    (line,) = [line for line in verdict.lines(SUMMARY) if "95 % interval" in line]
    assert line == "  95 % interval: 9.72 Å to 9.05 Å."
    narrow = {
        (9.8501, 9.8502): "within one shell, at 9.85 Å.",  # the curve ends there with the data
        (9.84, 9.46): "9.84 Å to 9.46 Å, within one shell.",  # 226.56 Å / 23.02 and 23.95
        (9.86, 9.46): "9.86 Å to 9.46 Å.",
        (nyquist, nyquist): "7.08 Å or finer at both ends.",
    }
    for ends, said in narrow.items():
        found = SUMMARY["resolution"] | {"cross_validated_interval": list(ends)}
        summary = SUMMARY | {"resolution": found, "input": {"box": 64, "pixel_size": PIXEL_SIZE}}
        assert f"  95 % interval: {said}" in verdict.lines(summary)

    ended = SUMMARY | {"limit": {"nyquist": nyquist, "ends_with_data": True}}
    assert "the data cannot show more" in "".join(verdict.lines(ended))
    silent = verdict.lines(summary_of("no particle"))
    assert silent[0].startswith("no resolution: no particle was found")
    assert not any("Å" in line for line in silent)


def write_null_tests(folder: Path, template: Path) -> Path:
    """A folder as `emsplat nulltest` leaves it."""
    folder.mkdir()
    tests = []
    for name in ("unaltered", "noise", "phases", "poses"):
        (folder / name / "run").mkdir(parents=True)
        shutil.copy(template / "fsc.star", folder / name / "run")
        silent = {} if name == "unaltered" else {"cross_validated": True, "half_map_masked": name == "poses"}
        tests.append(
            {"name": name, "expected": "none", "cross_validated": None, "half_map_masked": 8.0} | {"silent": silent}
        )
    (folder / "nulltest.json").write_text(json.dumps({"passed": True, "tests": tests}))
    return folder


def test_page_of_null_tests(template: Path, tmp_path: Path, no_rendering: None) -> None:
    checker, text = read_page(write_report(write_null_tests(tmp_path / "null", template)))
    for expected in ("Null tests", "Passed", "8.00 Å, not silent", "8.00 Å, silent", "none, silent", "changed hands"):
        assert expected in text, expected
    assert "Not shown" not in text
    assert "NOT SILENT" not in text
    assert [len(plot["data"]) for plot in checker.plots] == [4, 4]
    result = json.loads((tmp_path / "null" / "nulltest.json").read_text())
    result["tests"][1]["silent"]["cross_validated"] = result["passed"] = False
    (tmp_path / "null" / "nulltest.json").write_text(json.dumps(result))
    _, text = read_page(write_report(tmp_path / "null"))
    assert "Failed" in text
    assert "none, NOT SILENT" in text


def test_page_of_a_check(run: Path, no_rendering: None) -> None:
    """What asks for a look comes first, and no resolution is claimed."""
    for name in ("summary.json", "config.toml", "mask.mrc", "local_resolution.mrc", "fsc.star"):
        (run / name).unlink()
    items = [{"name": name, "verdict": v, "text": f"about {name}"} for name, v in (("optics", "ok"), ("hand", "look"))]
    (run / "check.json").write_text(json.dumps({"particles": 12345, "items": items}))
    checker, text = read_page(write_report(run))
    assert text.index("about hand") < text.index("about optics")
    assert "12,345 particles" in text
    assert "Not shown" not in text
    assert "Resolution" not in text[: text.index("What to check")]
    assert sum(trace["type"] == "heatmap" for trace in traces(checker)) == 4


def test_page_needs_nothing_else(run: Path, no_rendering: None) -> None:
    """Neither the page nor its script name another file; the browser is told to fetch nothing."""
    path = write_report(run)
    checker, _ = read_page(path)
    assert [script == get_plotlyjs() for script in checker.scripts] == [True, False]
    rest = path.read_text().replace(get_plotlyjs(), "")
    assert not re.search(r"<link|@import|url\(|https?://|<script src", rest)
    assert "default-src 'none'" in rest


def test_text_is_escaped(run: Path, no_rendering: None) -> None:
    nasty = "</script><script>alert('x')</script> & \"quoted\""
    summary = {nasty: {nasty: nasty}, "warnings": [nasty], "resolution": {nasty: nasty}}
    summary |= {"directional": {nasty: nasty}, "examples": [{"row": nasty}], "course": [{"gaussians": nasty}]}
    summary |= {"local_resolution": {"half_maps": {"mean": nasty}}, "notes": [nasty], "fits": {nasty: {nasty: nasty}}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.toml").write_text(nasty)
    (run / "a <b> & c.star").write_text("")
    named = "<script>alert('y')</script>"
    (run / "convergence.csv").write_text(f"fit,step,loss\n{named},1,2\n{named},2,1\n")
    star = run / "fsc.star"
    star.write_text(star.read_text().replace("_emsplatReferenceMasked", f"_{named.replace(' ', '')}"))
    checker, text = read_page(write_report(run))
    assert len(checker.scripts) == 2
    assert text.count(nasty) >= 7
    assert "a <b> & c.star" in text
    names = [trace.get("name", "") for trace in traces(checker)]
    assert sum("&lt;script&gt;" in name for name in names) == 2
    assert not any("<script" in name for name in names)


# How many interactive figures and how many pictures the page loses with each file.
LOSSES = {
    "run_class001.mrc": (1, 2),
    "mask.mrc": (2, 1),
    "local_resolution.mrc": (1, 1),
    "local_resolution_half_maps.mrc": (1, 0),
    "fsc.star": (2, 0),
    "directions.csv": (4, 0),
    "examples.mrcs": (0, 3 * EXAMPLES),
    "residual.csv": (1, 0),
    "convergence.csv": (1, 0),
    "scores.csv": (1, 0),
    "run_class001.ply": (2, 0),
    "summary.json": (0, 0),
    "config.toml": (0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "cut short"])
def test_damaged_part_is_named(run: Path, no_rendering: None, name: str, damage: str) -> None:
    """The page is still written with everything else, and says which file failed."""
    content = (run / name).read_bytes()
    if damage == "missing":
        (run / name).unlink()
    else:
        kinds = {"garbage": b"\xff\x00 not what it should be", "empty": b"", "cut short": content[: len(content) // 3]}
        (run / name).write_bytes(kinds[damage])
    checker, text = read_page(write_report(run))
    lost = 13 - len(checker.plots), 2 + 3 * EXAMPLES - len(checker.sources)
    text_before_files = text[: text.rindex("Files")]
    match name, damage:
        case ("config.toml", "empty" | "cut short") | (_, "cut short") if name.endswith((".csv", ".star", ".toml")):
            pass  # shown as far as it goes
        case ("scores.csv" | "local_resolution_half_maps.mrc", "missing"):
            assert "Not shown" not in text
        case ("mask.mrc", "missing"):
            assert "there is no mask.mrc" in text
            assert lost == (0, 0)
        case _:
            assert lost == LOSSES[name]
            assert "Not shown" in text
            assert re.search(rf"{name}(, line \d+)?: ", text_before_files)


def test_empty_folder(tmp_path: Path) -> None:
    checker, text = read_page(write_report(tmp_path))
    assert text.count("Not shown") == 15
    assert not checker.plots
    assert "What to check" in text


def test_run_without_particles_has_no_views(run: Path, no_rendering: None) -> None:
    table = (run / "directions.csv").read_text().splitlines()
    (run / "directions.csv").write_text("\n".join(",".join(line.split(",")[:4]) for line in table))
    checker, text = read_page(write_report(run))
    assert sum(trace["type"] == "heatmap" for trace in traces(checker)) == 2
    assert "Not shown" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("residual.csv", "frequency,noise,own,other\nnan,1,1,1\n"),
        ("residual.csv", "frequency,noise,own\n0.1,1,1\n"),
        ("convergence.csv", "fit,step,loss\nhalf 1\n"),
        ("directions.csv", "tilt,rot,fslc,conical_resolution\n5,5,1,8\n"),
        ("scores.csv", "epoch,gaussians,score\n1,many,0.9\n"),
        ("fsc.star", "data_fsc\nloop_\n_rlnResolution\n_emsplatCrossValidated\n0 1\n0 0.5\n"),
        ("run_class001.ply", "ply\nformat binary_little_endian 1.0\nelement vertex 0\nend_header\n"),
        ("run_class001.ply", "ply\nformat binary_little_endian 1.0\nelement vertex\nend_header\n"),
        ("summary.json", "[1]"),
    ],
)
def test_wrong_content_is_named(run: Path, no_rendering: None, name: str, content: str) -> None:
    (run / name).write_text(content)
    checker, text = read_page(write_report(run))
    assert 13 - len(checker.plots) == LOSSES[name][0]
    assert f"{name}: " in text


def test_maps_on_another_grid_are_named(run: Path, no_rendering: None) -> None:
    write_volume(run / "local_resolution.mrc", np.ones((8, 8, 8)))
    _, text = read_page(write_report(run))
    assert "local_resolution.mrc: (8, 8, 8) voxels, but the map has (32, 32, 32)" in text


def test_undefined_values_are_drawn_as_gaps(run: Path) -> None:
    """No direction with a resolution, no noise in a shell: nothing to see there, and no warning."""
    table = (run / "directions.csv").read_text().splitlines()
    rows = [",".join([*line.split(",")[:3], "nan", *line.split(",")[4:]]) for line in table[1:]]
    (run / "directions.csv").write_text("\n".join([table[0], *rows]))
    (run / "residual.csv").write_text("frequency,noise,own,other\n0.1,0,1,1\n0.2,1,nan,1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_page(write_report(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"resolution": None, "local_resolution": None, "directional": None, "course": None, "examples": None},
        {"resolution": {}, "warnings": None, "course": [], "examples": [], "directional": {"band": None}},
        {"resolution": {"new_kind": 5}, "input": 3, "course": [3], "examples": [None], "directional": {"band": [1]}},
        {"resolution": {"cross_validated": None, "cross_validated_interval": None, "half_map_masked": "x"}},
        {"local_resolution": {"half_maps": {"mean": None}, "cross_validated": 3, "window": None}},
        {"directional": {"conical_best": None, "unsampled": "x", "new": [1]}, "examples": [{"defocus": None}] * 9},
        {"resolution": {"cross_validated": math.nan, "half_map_masked": math.inf, "half_map_masked_0.5": True}},
    ],
)
def test_sparse_summary(run: Path, no_rendering: None, summary: dict[str, Any]) -> None:
    (run / "summary.json").write_text(json.dumps({"fits": {"half1": {}}} | summary))
    checker, _ = read_page(write_report(run))
    assert len(checker.plots) == 13


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: not a folder; expected a folder that emsplat wrote"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FIGURES)
def test_figures(run: Path, name: str) -> None:
    draw = getattr(figures, f"draw_{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(run) == run / f"{name}.png"
    assert (run / f"{name}.png").read_bytes().startswith(PNG)
    assert "<svg" in (run / f"{name}.svg").read_text()


def test_unknown_curves_are_drawn_too(run: Path) -> None:
    """A column that this version does not know, undefined in places, does not stop the figure."""
    star = run / "fsc.star"
    lines = star.read_text().splitlines()
    rows = [f"{line} {'nan' if i % 5 == 0 else '0.4'}" if line[:1].isdigit() else line for i, line in enumerate(lines)]
    at = max(i for i, line in enumerate(rows) if line.startswith("_emsplat"))
    star.write_text("\n".join([*rows[: at + 1], "_emsplatNewCurve #99", *rows[at + 1 :]]))
    assert figures.draw_fsc(run).read_bytes().startswith(PNG)
    names = [trace.name for trace in plots.plot_fsc(run)[1].data]
    assert any("emsplatNewCurve" in name for name in names)


def test_curves_of_one_figure_estimate_one_thing(run: Path) -> None:
    """Against the truth: the cross-validated curve, its band, the reference, and what two FSC between halves imply."""
    truth, between = plots.plot_fsc(run)
    band, *curves = truth.data
    assert [trace.name.split(",")[0].split(":")[0] for trace in curves] == [
        "cross-validated",
        "full map against the reference",
        "classical half maps",
        "half maps of the Gaussians",
    ]
    assert band.fill == "toself"
    assert all(math.isfinite(y) for y in band.y)  # the first shell of the band is undefined
    found = read.read_fsc(run)
    for place, name in ((2, "backprojection"), (3, "corrected")):
        values = found[name].value[1:]
        np.testing.assert_allclose(curves[place].y, np.sqrt(2 * values / (1 + values)))
    # Read where the FSC is 0.143, so that the number is that of the other figure and of the headline.
    assert curves[3].name.split(": ")[1] == next(t.name for t in between.data if "corrected" in t.name).split(": ")[1]
    # Random phases share nothing: no resolution. What few ask for waits to be asked for.
    assert len(between.data) == len(CURVE_NAMES) - 2
    assert "Å" not in next(trace.name for trace in between.data if "randomised" in trace.name)
    assert sum(trace.visible == "legendonly" for trace in between.data) == 2


def test_an_fsc_implies_a_correlation_with_the_truth() -> None:
    assert figures.implied([1, 1 / 7, 0.6, 0.0, 0.9])[:3] == pytest.approx([1, 0.5, math.sqrt(0.75)])
    assert all(math.isnan(value) for value in figures.implied([1, 1 / 7, 0.6, 0.0, 0.9])[3:])
    assert math.isnan(figures.implied([math.nan])[0])


def test_lines_look_alike_on_screen_and_paper() -> None:
    """The same dashes, in line widths there and in pixels here; no two lines of one colour or one dash."""
    assert len({dashes for _, dashes in figures.LINES}) == len({colour for colour, _ in figures.LINES}) == 9
    for place, (colour, dashes) in enumerate(figures.LINES):
        line = plots._line(place)
        assert line["color"] == colour
        drawn = [] if line["dash"] == "solid" else [float(part.removesuffix("px")) for part in line["dash"].split(",")]
        assert drawn == pytest.approx([length * line["width"] for length in dashes])


def test_colours_of_a_local_resolution_span_more_than_its_error() -> None:
    narrow = np.linspace(7.08, 7.18, 100).astype(np.float32)
    low, high = figures.resolution_range(narrow)
    assert low == pytest.approx(7.085, abs=0.001)
    assert high == pytest.approx(1.2 * low)
    assert figures.resolution_range(np.float32([4, 9, np.nan])) == pytest.approx((4.25, 8.75))


def test_a_small_gap_between_residuals_looks_small() -> None:
    near = {"own": np.array([0.99, 1.0]), "other": np.array([math.nan, 1.01])}
    assert figures.residual_range(near) == pytest.approx((0.9, 1.1))
    assert figures.residual_range(near | {"own": np.array([0.5, 1.6])}) == pytest.approx((0.48, 1.62))


def test_widths_are_those_of_the_gaussians(run: Path) -> None:
    gaussians, _ = read_ply(run / "run_class001.ply")
    expected = torch.linalg.eigvalsh(gaussians.covariance.double()).sqrt()
    widths = read.read_widths(run)
    np.testing.assert_allclose(widths.sigma, expected, rtol=1e-4)
    np.testing.assert_allclose(widths.anisotropy, expected[:, 2] / expected[:, 0], rtol=1e-4)


def test_uniform_views_are_flat(run: Path) -> None:
    """Particles in proportion to the solid angle of a cell have density 1 everywhere, at the poles too."""
    write_directions(run / "directions.csv", 5)
    tilt, rot = (np.arange(2.5, end, 5) for end in (180, 360))
    e, a = (grid.ravel() for grid in np.meshgrid(tilt, rot, indexing="ij"))
    particles = np.cos(np.radians(e - 2.5)) - np.cos(np.radians(e + 2.5))
    columns = {"tilt": e, "rot": a, "fslc": a, "conical_resolution": e, "sampling": e, "particles": particles}
    write_table(run / "directions.csv", columns)
    found = read.read_directions(run)
    np.testing.assert_allclose(found.density, 1, rtol=1e-6)
    assert found.fslc.shape == (36, 72)
    np.testing.assert_allclose(found.fslc[3], rot)
    np.testing.assert_allclose(found.conical_resolution[:, 5], tilt)


def make_ball(size: int, centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """A soft ball whose value is 0.5 at ``radius`` voxels from its centre (x, y, z)."""
    z, y, x = np.meshgrid(*[np.arange(size) - size // 2] * 3, indexing="ij")
    distance = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
    return (1 / (1 + np.exp((distance - radius) / 1.5))).astype(np.float32)


@pytest.mark.parametrize("size", [40, 41, 100])
def test_surface_lies_where_the_density_is(size: int) -> None:
    """In Å from the centre voxel, x first, cropped or reduced or not; with the local resolution of its place."""
    centre, radius = (0.1 * size, -0.06 * size, 0.04 * size), 0.2 * size
    ball = make_ball(size, centre, radius)
    local = (10 + 0.1 * (np.arange(size) - size // 2)) * np.ones((size, size, size))  # grows along x
    mask = make_ball(size, centre, radius + 0.1 * size) > 0.5
    found = surface.make_surface(read.Volume(ball, 2.0), mask, local.astype(np.float32), Path())
    for mesh in found.meshes:
        value = mesh.level * ball.std()
        expected = radius + 1.5 * math.log(1 / value - 1)
        points = mesh.vertices * surface.UNIT / 2.0
        distance = np.linalg.norm(points - centre, axis=1)
        assert abs(distance.mean() - expected) < 0.15
        assert distance.std() < 0.15
        # The corners of each triangle go round anticlockwise as seen from outside.
        a, b, c = (mesh.vertices[mesh.triangles[:, corner]] * surface.UNIT / 2.0 for corner in range(3))
        volume = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6
        assert volume == pytest.approx(4 / 3 * math.pi * expected**3, rel=0.05)
        assert mesh.resolution is not None
        np.testing.assert_allclose(mesh.resolution, 10 + 0.1 * points[:, 0], atol=0.02)
    assert not found.is_reduced
    assert found.voxel == 2.0
    levels = [mesh.level for mesh in found.meshes]
    assert levels == sorted(levels)
    assert len(levels) >= 5
    enclosed = (ball[mask] > levels[found.default] * ball.std()).mean()
    assert enclosed == pytest.approx(0.4, abs=0.08)


def test_surface_stands_above_the_noise_around_the_particle() -> None:
    """One body and few crumbs, and no detail lost to them."""
    ball = make_ball(48, (0, 0, 0), 12)
    noisy = ball + np.random.default_rng(0).normal(0, 0.3, ball.shape).astype(np.float32)
    mask = make_ball(48, (0, 0, 0), 16) > 0.5
    found = surface.make_surface(read.Volume(noisy, 2.0), mask, None, Path())
    assert len(found.meshes) >= 3
    assert not found.is_reduced
    for mesh in found.meshes:
        assert mesh.level * noisy.std() > 2.9 * 0.3


def test_surfaces_of_noise_stay_small() -> None:
    noise = np.random.default_rng(0).normal(size=(96, 96, 96)).astype(np.float32)
    found = surface.make_surface(read.Volume(noise, 1.0), None, None, Path())
    assert 0 < sum(mesh.nbytes for mesh in found.meshes) <= 2_200_000
    assert found.meshes[0].resolution is None
    assert found.is_reduced
    assert found.voxel > 1.0


def test_flat_map_has_no_surface() -> None:
    flat = read.Volume(np.zeros((16, 16, 16), np.float32), 1.0)
    with pytest.raises(InputError, match=r"no level has a surface.*is it empty\?"):
        surface.make_surface(flat, None, None, Path("run"))
    dark = -np.pad(np.ones((8, 8, 8), np.float32), 4)
    with pytest.raises(InputError, match=r"is it inverted \(protein dark\)\?"):
        surface.make_surface(read.Volume(dark, 1.0), None, None, Path("run"))


def test_slider_shows_one_level_at_a_time(run: Path, no_rendering: None) -> None:
    checker, _ = read_page(write_report(run))
    plot = checker.plots[0]
    (slider,) = plot["layout"]["sliders"]
    count = len(plot["data"])
    assert 5 <= count <= 8
    assert [trace["visible"] for trace in plot["data"]] == [i == slider["active"] for i in range(count)]
    for i, step in enumerate(slider["steps"]):
        assert step["args"] == [{"visible": [other == i for other in range(count)]}]


def test_light_comes_from_the_side_of_the_viewer(run: Path, no_rendering: None) -> None:
    """Relative to the camera z points away from him: with light from there nothing that he sees is shaded."""
    checker, _ = read_page(write_report(run))
    assert all(trace["lightposition"]["z"] < 0 for trace in checker.plots[0]["data"])


def test_scale_bar_is_round() -> None:
    assert [figures.round_length(x) for x in (0.7, 1.0, 4.9, 56.6, 130.0)] == [0.5, 1.0, 2.0, 50.0, 100.0]


@pytest.mark.slow
def test_large_run_stays_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "large", 128, 20_000)
    write_directions(folder / "directions.csv", 5)
    write_convergence(folder / "convergence.csv", 3000)
    path = write_report(folder)
    assert len(read_page(path)[0].plots) == 13
    assert path.stat().st_size < 10e6


@pytest.mark.slow
def test_browser_draws_every_figure(run: Path, tmp_path: Path) -> None:
    """In a real browser, offline: no error, no refused access, every figure there, WebGL and slider included."""
    names = ("chromium", "google-chrome", "chromium-browser")
    browser = next((found for found in map(shutil.which, names) if found), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(names)} is on PATH")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=15000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,6000", "--dump-dom"]
    url = write_report(run).as_uri()
    done = subprocess.run([browser, *options, url], capture_output=True, text=True, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if re.search(r"Uncaught|[Ee]rror|Refused|violates", line)]
    shown = re.sub(r"<(script|style)\b.*?</\1>", "", done.stdout, flags=re.DOTALL)
    assert "cannot be drawn here" not in shown
    assert "no-webgl" not in shown
    assert shown.count("js-plotly-plot") == 13
    assert shown.count('class="main-svg"') >= 13
    assert re.search(r'class="gl-container".*?<canvas', shown, re.DOTALL)
    assert shown.count('class="slider-group"') == 1
    assert shown.count('class="slider-label-group"') >= 5
    assert shown.count('class="js-line"') >= len(CURVE_NAMES)
    assert shown.count('class="hm"') >= 4
    # What stands in for WebGL on paper, shaded: no flat silhouette of a few colours.
    picture = re.search(r'<img class="for-print" alt="Isosurface[^>]*src="data:image/png;base64,([^"]{1000,})"', shown)
    assert picture
    pixels = imread(io.BytesIO(base64.b64decode(picture.group(1))))[200:420, 300:600, :3].reshape(-1, 3)
    coloured = pixels[np.ptp(pixels, axis=1) > 0.05]
    assert len(coloured) > 2000
    assert len(np.unique((coloured * 32).astype(int), axis=0)) > 60
    # Plotly's own button that uploads a figure.
    assert 'class="modebar' in shown
    assert not re.search(r"cloud|[Ss]hare chart", shown)


def test_imports_no_torch() -> None:
    """Reading a report must not wait for torch, nor importing the module for matplotlib."""
    code = (
        "import sys, importlib.util as u\n"
        "import types; package = types.ModuleType('emsplat'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['emsplat'] = package\n"
        "import emsplat.report\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'plotly', 'skimage', 'scipy'} & set(sys.modules), 'heavy import'\n"
    )
    import emsplat.report

    folder = str(Path(emsplat.report.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, folder], check=True, env={**os.environ, "PYTHONPATH": ""})


def test_reads_without_torch(run: Path) -> None:
    """Every file of a run folder."""
    code = (
        "import sys; from pathlib import Path; from emsplat.report import read; run = Path(sys.argv[1])\n"
        "shape = read.read_full_map(run).values.shape\n"
        "read.read_mask(run, shape); read.read_local_resolution(run, shape)\n"
        "read.read_fsc(run); read.read_examples(run, 8); read.read_widths(run)\n"
        "read.read_directions(run); read.read_residual(run); read.read_convergence(run); read.read_scores(run)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
