"""The explorer of latent space: what the page holds, and the page in a browser, against the decoder in PyTorch."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from browser import Page, browsing
from emsplat.errors import InputError
from emsplat.models.decoder import Decoder, Shape
from emsplat.report.explorer import (
    DecoderNumbers,
    ExplorerNumbers,
    ParticleNumbers,
    StateNumbers,
    write_explorer,
)

LATENTS, GAUSSIANS, PARTICLES = 3, 400, 600
SHAPE = Shape(LATENTS, parts=3, bends=4, changes=2)
FRAME = np.array([[0.9, 0.1, 0.0, 0.2], [-0.1, 1.1, 0.0, 0.0], [0.0, 0.3, 1.0, -0.1]])  # of half 2


def make_decoder(seed: int, gaussians: int = GAUSSIANS, shape: Shape = SHAPE) -> Decoder:
    """A rod of Gaussians whose parts turn by tens of degrees, bend by some Å and change their amplitudes."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(gaussians, 3, generator=generator) * torch.tensor([30.0, 9.0, 6.0])
    width = 2 + 2 * torch.rand(gaussians, generator=generator)
    amplitude = 0.5 + torch.rand(gaussians, generator=generator)
    decoder = Decoder(centre, width, amplitude, shape, unit=0.3, generator=generator)
    with torch.no_grad():
        decoder.weights[2].copy_(0.15 * torch.randn(decoder.weights[2].shape, generator=generator))
        decoder.bend.copy_(0.2 * torch.randn(decoder.bend.shape, generator=generator))
        decoder.change.copy_(torch.randn(decoder.change.shape, generator=generator))
    return decoder


def numbers_of(decoder: Decoder, half: int = 0, frame: np.ndarray | None = None) -> DecoderNumbers:
    own = {name: value.detach().numpy() for name, value in decoder.named_parameters()}
    return DecoderNumbers(
        **{name: own[name] for name in ("centre", "width", "amplitude", "logits", "bend", "change")},
        weights=[own[f"weights.{number}"] for number in range(3)],
        biases=[own[f"biases.{number}"] for number in range(3)],
        length=decoder.length,
        unit=decoder.unit,
        half=half,
        frame=frame,
    )


def make_numbers(particles: int = PARTICLES, name: str = "run") -> ExplorerNumbers:
    generator = np.random.default_rng(3)
    latent = generator.normal(size=(particles, LATENTS))
    points = generator.normal(size=(5, LATENTS))
    rows = np.sort(generator.choice(10 * particles, particles, replace=False)) + 1
    return ExplorerNumbers(
        name,
        [numbers_of(make_decoder(1), 1), numbers_of(make_decoder(2), 2, FRAME)],
        ParticleNumbers(
            row=rows,
            half=1 + np.arange(particles) % 2,
            latent=latent,
            gain=generator.gamma(2.0, 2.0, particles),
            cluster=np.arange(particles) % 3,
            defocus=generator.uniform(8000, 20000, particles),
            micrograph=np.arange(particles) // 10,
            grey=generator.normal(1, 0.1, particles),
        ),
        points,
        np.full(5, 0.2),
        latent.mean(0),
        [
            StateNumbers("open", points[0], 0.25, (0.2, 0.3), 5.25),
            StateNumbers("closed", points[1], 0.05, None, None),
        ],
        ["600 particles"],
        ["latents follow the defocus"],
    )


def held(path: Path) -> dict[str, Any]:
    """The numbers within a page."""
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    raw = np.frombuffer(
        base64.b64decode(packed["data"]), {"float32": "<f4", "int32": "<i4", "uint16": "<u2"}[packed["kind"]]
    )
    table = raw.reshape(packed["shape"])
    return table if packed["kind"] != "uint16" else np.array(packed["low"]) + table * np.array(packed["step"])


def test_numbers_survive_the_page(tmp_path: Path) -> None:
    """Exactly, or within half of a 65,535th of their column's range."""
    numbers = make_numbers()
    data = held(write_explorer(tmp_path / "page.html", numbers))
    particles, own = data["particles"], data["decoders"][1]
    for name in ("row", "half", "cluster", "micrograph"):
        np.testing.assert_array_equal(unpacked(particles[name]), getattr(numbers.particles, name))
    for name in ("latent", "gain", "defocus", "grey"):
        values = getattr(numbers.particles, name)
        step = np.ptp(values, axis=0) / 65535
        assert (np.abs(unpacked(particles[name]) - values) <= 0.51 * step).all(), name
    for name in ("centre", "width", "amplitude", "logits"):
        np.testing.assert_array_equal(unpacked(own[name]), getattr(numbers.decoders[1], name))
    np.testing.assert_array_equal(unpacked(own["frame"]), FRAME.astype(np.float32))
    bend = np.reshape(numbers.decoders[1].bend, (GAUSSIANS, -1))
    assert (np.abs(unpacked(own["bend"]) - bend) <= 0.51 * np.ptp(bend, axis=0) / 65535).all()
    assert data["states"][0] == {
        "name": "open",
        "latent": numbers.points[0].tolist(),
        "population": 0.25,
        "interval": [0.2, 0.3],
        "resolution": 5.25,
    }
    assert data["states"][1]["interval"] is data["states"][1]["resolution"] is None


def test_a_column_of_one_value(tmp_path: Path) -> None:
    numbers = make_numbers()
    same = replace(numbers.particles, defocus=np.full(PARTICLES, 12345.0))
    data = held(write_explorer(tmp_path / "page.html", replace(numbers, particles=same)))
    np.testing.assert_array_equal(unpacked(data["particles"]["defocus"]), 12345.0)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    numbers = make_numbers()
    bare = replace(numbers.particles, cluster=None, defocus=None, micrograph=None, grey=None)
    data = held(write_explorer(tmp_path / "page.html", replace(numbers, particles=bare, states=())))
    assert set(data["particles"]) == {"row", "half", "latent", "gain"}
    assert data["states"] == []


def test_page_fetches_nothing_and_names_are_escaped(tmp_path: Path) -> None:
    nasty = "</script><script>alert('x')</script> & \"quoted\" {braces}"
    numbers = make_numbers(name=nasty)
    state = replace(numbers.states[0], name=nasty)
    path = write_explorer(tmp_path / "page.html", replace(numbers, states=[state], facts=[nasty], warnings=[nasty]))
    text = path.read_text()
    assert "<script>alert" not in text
    assert held(path)["states"][0]["name"] == held(path)["name"] == nasty
    assert "default-src 'none'" in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    rest = text.replace(scripts[0], "")  # the library names its home page in its licence
    assert "twgl.js 7.0.0" in scripts[0]
    assert not re.search(r"<link|@import|url\(|https?://|<script src|fetch\(|XMLHttpRequest|WebSocket|\beval\b", rest)


def test_large_page_stays_below_12_megabytes(tmp_path: Path) -> None:
    """100,000 particles with all columns and eight latents, and 8,192 Gaussians for each half."""
    generator = np.random.default_rng(0)
    shape, count = Shape(8), 100_000
    decoders = [numbers_of(make_decoder(half, 8192, shape), half) for half in (1, 2)]
    column = generator.normal(size=count)
    whole = np.arange(count)
    particles = ParticleNumbers(
        whole + 1, 1 + whole % 2, generator.normal(size=(count, 8)), column, whole % 9, column, whole // 50, column
    )
    page = ExplorerNumbers("large", decoders, particles, np.zeros((1, 8)), np.ones(1), np.zeros(8))
    assert write_explorer(tmp_path / "page.html", page).stat().st_size < 12e6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: replace(n, decoders=[]), "no decoder"),
        (lambda n: replace(n, consensus=np.zeros(2)), r"consensus have shape \(2,\); expected 3"),
        (lambda n: replace(n, weights=np.ones(4)), r"weights of the density have shape \(4,\); expected 5"),
        (
            lambda n: replace(n, particles=replace(n.particles, latent=np.full((PARTICLES, 3), np.nan))),
            "not all finite",
        ),
        (lambda n: replace(n, particles=replace(n.particles, gain=np.zeros(3))), r"gain of particles .*expected 600"),
        (lambda n: replace(n, states=[replace(n.states[0], population=np.nan)]), "state open: population"),
        (lambda n: replace(n, decoders=[replace(n.decoders[1], frame=None)], points=n.points[:, :2]), "points of the"),
        (lambda n: replace(n, decoders=[replace(n.decoders[0], frame=np.eye(3))]), r"frame of .*expected 3 × 4"),
        (lambda n: replace(n, decoders=[replace(n.decoders[0], bend=np.zeros((4, 4, 3)))]), "displacements of"),
    ],
)
def test_numbers_that_do_not_belong_together(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        write_explorer(tmp_path / "page.html", change(make_numbers()))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_assets_belong_to_the_package() -> None:
    """A built package holds every file of the source folder; here, that none is missing or unused."""
    from emsplat.report import explorer

    folder = Path(explorer.__file__).parent / "assets"
    names = {file.name for file in folder.iterdir()}
    assert names == {*explorer._SCRIPTS, "explorer.html", "explorer.css", "twgl.min.js", "twgl.LICENSE.txt"}
    assert "Permission is hereby granted" in (folder / "twgl.LICENSE.txt").read_text()


def test_imports_no_torch() -> None:
    code = "import sys; import emsplat.report.explorer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def decoded(page: Page, latent: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    found = page.evaluate(
        f"(() => {{ const d = explorer.decode({latent.tolist()}, {half - 1});"
        " return [Array.from(d.position), Array.from(d.amplitude)]; })()"
    )
    return np.reshape(found[0], (-1, 3)), np.array(found[1])


def rigid_motion(before: np.ndarray, after: np.ndarray, mass: np.ndarray) -> tuple[float, float]:
    """Angle (degrees) of the rotation that fits best (Kabsch 1976), and how far the centre of mass goes."""
    centres = [np.average(points, axis=0, weights=mass) for points in (before, after)]
    u, _, v = np.linalg.svd(((after - centres[1]) * mass[:, None]).T @ (before - centres[0]))
    rotation = u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v
    angle = np.degrees(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1)))
    return float(angle), float(np.linalg.norm(centres[1] - centres[0]))


@pytest.mark.slow
def test_browser_decodes_as_pytorch_does(tmp_path: Path) -> None:
    """Positions and amplitudes, for both halves and a frame between them; rigid motions of parts as Kabsch has them."""
    numbers = make_numbers()
    decoders = {1: make_decoder(1), 2: make_decoder(2)}
    part = decoders[1].parts().argmax(1).numpy()
    part[::7] = (part[::7] + 1) % SHAPE.parts  # some are shown as another than the one that they belong to most
    shown = [replace(numbers.decoders[0], part=part), numbers.decoders[1]]
    path = write_explorer(tmp_path / "page.html", replace(numbers, decoders=shown))
    with browsing(tmp_path / "profile") as page:
        page.open(path)
        for latent in np.random.default_rng(5).normal(size=(4, LATENTS)):
            for half, decoder in decoders.items():
                own = latent if half == 1 else FRAME[:, :-1] @ latent + FRAME[:, -1]
                with torch.no_grad():
                    expected = [value[0].numpy() for value in decoder(torch.tensor(own[None], dtype=torch.float32))]
                for found, wanted in zip(decoded(page, latent, half), expected, strict=True):
                    # Float32 sums, and fields of 16 bits: 1e-5 of their largest value, well below this.
                    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)
                    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
        mass = torch.nn.functional.softplus(decoders[1].amplitude).detach().numpy()
        before, _ = decoded(page, np.asarray(numbers.consensus), 1)
        latent = np.array([1.5, -1.0, 0.5])
        after, _ = decoded(page, latent, 1)
        for number in range(SHAPE.parts):
            own = part == number
            motion = page.evaluate(f"explorer.motion({latent.tolist()}, {number})")
            turn, shift = rigid_motion(before[own], after[own], mass[own])
            values = (
                [motion["rotation"][str(k)] for k in range(4)]
                if isinstance(motion["rotation"], dict)
                else motion["rotation"]
            )
            assert np.degrees(2 * np.arccos(values[0])) == pytest.approx(turn, abs=0.02)
            assert np.linalg.norm(motion["shift"]) == pytest.approx(shift, abs=0.01)
            assert turn > 1
        assert page.problems == []


ONE = {"position": [3.3, -1.7, 12.4], "amplitude": [7.0], "sigma": [4.0]}
SUMMED = """(() => {
  const { Density, Surface, Projection } = explorer, one = %s;
  const eye = { turn: [[1, 0, 0], [0, 1, 0], [0, 0, 1]], middle: [0, 0, 0] };
  const density = new Density(1).fill(one);
  const surface = new Surface().extract(density, %r, [10, 20, 30]);
  const projection = new Projection();
  projection.begin(80, 60);
  projection.add(one, eye, 1, (_, out) => out.set([0.5, 0, 0, 1]));
  return [surface.position.slice(0, 3 * surface.vertices), surface.normal.slice(0, 3 * surface.vertices),
    surface.triangles.slice(0, surface.indices), surface.colour.slice(0, 3), projection.sums].map((a) => Array.from(a));
})()"""


@pytest.mark.slow
def test_browser_sums_one_gaussian(tmp_path: Path) -> None:
    """Its isosurface is a closed sphere, seen from outside, of the radius that follows; its projection the formula."""
    centre, sigma, amplitude = np.array(ONE["position"]), ONE["sigma"][0], ONE["amplitude"][0]
    peak = amplitude / (2 * np.pi * sigma**2) ** 1.5
    level = 0.3 * peak
    path = write_explorer(tmp_path / "page.html", make_numbers())
    with browsing(tmp_path / "profile") as page:
        page.open(path)
        position, normal, triangles, colour, sums = map(np.array, page.evaluate(SUMMED % (json.dumps(ONE), level)))
    position, normal, triangles = (array.reshape(-1, 3) for array in (position, normal, triangles))
    radius = sigma * np.sqrt(-2 * np.log(0.3))
    distance = np.linalg.norm(position - centre, axis=1)
    # A vertex is the mean of points within a cell, √3 Å across: 3/8r below the sphere, and 1/8r for straight lines.
    assert np.abs(distance - radius).max() < 1 / (2 * radius)
    assert (normal * (position - centre)).sum(1).min() > 0.98 * radius
    edges = {(a, b) for three in triangles.tolist() for a, b in zip(three, three[1:] + three[:1], strict=True)}
    assert len(edges) == 3 * len(triangles)
    assert edges == {(b, a) for a, b in edges}  # closed, and all of one sense
    a, b, c = (position[triangles[:, corner]] - centre for corner in range(3))
    assert (a * np.cross(b, c)).sum() / 6 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)
    np.testing.assert_allclose(colour, [10, 20, 30], atol=1)  # bytes are cut off
    y, x = np.mgrid[:60, :80] - np.array([29.5, 39.5])[:, None, None]
    square = (x - centre[0]) ** 2 + (y - centre[1]) ** 2
    formula = amplitude / (2 * np.pi * sigma**2) * np.exp(-square / (2 * sigma**2))
    channels = sums.reshape(60, 80, 4)
    np.testing.assert_allclose(
        channels[..., 3], np.where(square <= (2.6 * sigma) ** 2, formula, 0), atol=1e-6 * formula.max()
    )
    np.testing.assert_allclose(channels[..., 0], 0.5 * channels[..., 3], rtol=1e-6)


@pytest.mark.slow
def test_browser_moves_the_molecule(tmp_path: Path) -> None:
    """By pointer, click, keys, slider and path; each view is another picture, and nothing goes wrong."""
    path = write_explorer(tmp_path / "page.html", make_numbers())
    with browsing(tmp_path / "profile") as page:
        page.open(path)
        page.wait("explorer.counts.molecule > 0")
        left, top, width, height = page.box("#plane")

        def seen() -> bytes:
            page.frames(3)
            page.evaluate("new Promise((done) => setTimeout(done, 400))")  # until the fine picture
            page.frames(2)
            return page.picture("#molecule canvas")

        def latent() -> list[float]:
            return list(page.evaluate("Array.from(explorer.latent)"))

        # The pointer: what the plane says of a place is what the molecule shows.
        pictures = []
        for x, y in ((0.3, 0.4), (0.7, 0.6)):
            page.mouse("moved", left + x * width, top + y * height)
            pictures.append(seen())
            there = page.evaluate(
                f"Array.from(explorer.plane.latentAt(...explorer.plane.toPlane({x * width}, {y * height})))"
            )
            np.testing.assert_allclose(latent(), there, atol=0.01)
        assert pictures[0] != pictures[1]
        assert "open" in page.evaluate("document.getElementById('tip').textContent") or "closed" in page.evaluate(
            "document.getElementById('tip').textContent"
        )
        # A click holds it, another lets it go.
        page.click(left + 0.5 * width, top + 0.5 * height)
        page.frames(3)
        held_at = latent()
        page.mouse("moved", left + 0.2 * width, top + 0.3 * height)
        page.frames(3)
        assert latent() == held_at
        before = seen()
        # Views.
        for change in (
            "document.querySelector('#view [data-value=projection]').click()",
            "document.getElementById('difference').click()",
            "document.querySelector('#view [data-value=surface]').click()",
            "document.getElementById('difference').click(); document.getElementById('half').value = 1;"
            "document.getElementById('half').dispatchEvent(new Event('change'))",
            "document.getElementById('theme').click()",
        ):
            page.evaluate(change)
            after = seen()
            assert after != before, change
            before = after
        # Keys and a slider.
        page.evaluate("document.getElementById('plane').focus()")
        start = latent()
        page.key("ArrowRight")
        page.frames(3)
        assert latent()[0] > start[0]
        page.evaluate(
            "const s = document.getElementById('slider-3'); s.value = s.max; s.dispatchEvent(new Event('input'))"
        )
        page.frames(3)
        assert latent()[2] == pytest.approx(page.evaluate("Number(document.getElementById('slider-3').max)"), abs=0.05)
        # A path through two clicked points; every frame that is played shows another state.
        page.evaluate("document.activeElement.blur()")
        page.key("p")
        for x in (0.35, 0.65):
            page.click(left + x * width, top + 0.5 * height)
        assert "2 points" in page.evaluate("document.getElementById('path-note').textContent")
        page.key(" ")
        drawn = page.evaluate("explorer.counts.molecule")
        page.wait(f"explorer.counts.molecule > {drawn + 20}")
        assert page.evaluate("explorer.counts.frames") >= 20
        page.key(" ")
        # Every way to colour the particles.
        for value in page.evaluate("[...document.getElementById('particle-colour').options].map((o) => o.value)"):
            select = "document.getElementById('particle-colour')"
            page.evaluate(f"{select}.value = '{value}'; {select}.dispatchEvent(new Event('change'))")
            page.wait("!document.getElementById('plane-legend').textContent.includes('computing')")
            page.frames(2)
            assert page.evaluate("document.getElementById('plane-legend').childElementCount") == (value != "none")
        page.key("r")
        page.frames(3)
        assert page.problems == []
        assert page.evaluate("document.getElementById('failure').hidden")


@pytest.mark.slow
def test_browser_exports_what_the_lasso_holds(tmp_path: Path) -> None:
    """Row numbers of the input, not places in a list; as a list and as a table."""
    numbers = make_numbers()
    path = write_explorer(tmp_path / "page.html", numbers)
    (tmp_path / "saved").mkdir()
    with browsing(tmp_path / "profile") as page:
        page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
        page.open(path)
        page.wait("explorer.counts.molecule > 0")
        left, top, width, height = page.box("#plane")
        place = np.array(
            page.evaluate(
                f"Array.from({{length: {PARTICLES}}}, (_, i) => explorer.plane.toScreen(explorer.plane.place[2 * i],"
                " explorer.plane.place[2 * i + 1]))"
            )
        )
        # The plane shows the first two components, the second upwards.
        assert np.corrcoef(place[:, 0], numbers.particles.latent[:, 0])[0, 1] > 0.999
        assert np.corrcoef(place[:, 1], numbers.particles.latent[:, 1])[0, 1] < -0.999
        low, high = np.array([0.4, 0.35]) * (width, height), np.array([0.55, 0.6]) * (width, height)
        page.key("l")
        corners = [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
        page.mouse("moved", left + low[0], top + low[1])
        page.mouse("pressed", left + low[0], top + low[1])
        for x, y in corners[1:]:
            page.mouse("moved", left + x, top + y, held=True)
        page.mouse("released", left + low[0], top + high[1])
        page.frames(2)
        rows = [int(line) for line in page.evaluate("explorer.rowsText()").split()[1:]]

        def within(margin: float) -> set[int]:
            inside = ((place > low - margin) & (place < high + margin)).all(1)
            return set(numbers.particles.row[inside].tolist())

        # A pixel of the pointer either way.
        assert within(-1.5) <= set(rows) <= within(1.5)
        assert 50 < len(rows) < PARTICLES // 2
        assert rows == sorted(set(rows))
        assert f"{len(rows)} of {PARTICLES} particles" in page.evaluate(
            "document.getElementById('selection-note').textContent"
        )
        for button in ("save-rows", "save-table"):
            page.evaluate(f"document.getElementById('{button}').click()")
            page.evaluate("new Promise((done) => setTimeout(done, 300))")
        saved = {file: tmp_path / "saved" / file for file in ("run_rows.txt", "run_particles.csv")}
        while not all(file.exists() for file in saved.values()):
            page.frames(5)
        assert [int(line) for line in saved["run_rows.txt"].read_text().split()[1:]] == rows
        head, *lines = saved["run_particles.csv"].read_text().splitlines()
        assert head == "row,half,z1,z2,z3,class,gain"
        assert [int(line.split(",")[0]) for line in lines] == rows
        place_of = {int(row): number for number, row in enumerate(numbers.particles.row)}
        values = np.array([[float(word) for word in line.split(",")] for line in lines])
        chosen = [place_of[row] for row in rows]
        np.testing.assert_allclose(values[:, 2:5], numbers.particles.latent[chosen], atol=2e-4)
        np.testing.assert_array_equal(values[:, 5], numbers.particles.cluster[chosen] + 1)  # as latents.csv
        # Shift adds to it, the button of a state takes those nearest to it.
        page.evaluate("document.querySelectorAll('#states td:last-child button')[1].click()")
        distance = ((numbers.particles.latent[:, None] - numbers.points[:2]) ** 2).sum(2)
        near = numbers.particles.row[distance.argmin(1) == 1]
        assert [int(line) for line in page.evaluate("explorer.rowsText()").split()[1:]] == near.tolist()
        assert page.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("latents", [1, 2])
def test_browser_shows_what_little_there_is(latents: int, tmp_path: Path) -> None:
    """One model, one component, two particles in two copies, no state and no point of a density."""
    latent = np.linspace(-1, 1, 4 * latents).reshape(4, latents)
    numbers = ExplorerNumbers(
        "small",
        [numbers_of(make_decoder(4, 12, Shape(latents, parts=1, bends=0, changes=0)))],
        ParticleNumbers(np.arange(4) // 2 + 1, np.zeros(4, int), latent, np.zeros(4), copy=np.arange(4) % 2 + 1),
        np.zeros((0, latents)),
        np.zeros(0),
        np.zeros(latents),
    )
    path = write_explorer(tmp_path / "page.html", numbers)
    with browsing(tmp_path / "profile", 500, 800) as page:
        page.open(path)
        page.wait("explorer.counts.molecule > 0")
        page.evaluate("explorer.plane.selected.fill(1)")
        assert page.evaluate("explorer.rowsText()") == "row,copy\n1,1\n1,2\n2,1\n2,2\n"
        assert page.evaluate("explorer.tableText()").startswith("row,copy,half,z1")
        page.evaluate("explorer.plane.selected.fill(0)")
        left, top, width, height = page.box("#plane")
        page.mouse("moved", left + 0.9 * width, top + 0.5 * height)
        page.frames(3)
        high = page.evaluate("explorer.latent[0]")
        page.mouse("moved", left + 0.1 * width, top + 0.5 * height)
        page.frames(3)
        assert page.evaluate("explorer.latent[0]") < high
        drawn = page.evaluate("explorer.counts.molecule")
        page.key(" ")
        page.wait(f"explorer.counts.molecule > {drawn + 5}")
        for change in (
            "document.getElementById('difference').click()",
            "document.querySelector('[data-value=projection]').click()",
        ):
            page.evaluate(change)
            page.frames(5)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.problems == []
