"""Warnings of a whole run: particles whose states go with the images that show them."""

import mrcfile
import numpy as np
import pytest
from tests.test_heterogeneity import labels, molecule

from emsplat.config import HeterogeneityConfig, SimulateConfig, configure
from emsplat.programs.heterogeneity import heterogeneity
from emsplat.programs.simulate import simulate


@pytest.fixture
def entangled(tmp_path):
    """Particles that lack a globule are seen from above, at high defocus, and come out brighter."""
    config = configure(
        SimulateConfig,
        particles=2400,
        box=32,
        pixel_size=3.0,
        snr=0.2,
        shift=1.0,
        missing=("chain B",),
        micrograph_particles=20,
        defocus_min=8000.0,
        defocus_max=20000.0,
        seed=5,
    )
    path = simulate(config, molecule(tmp_path / "model.pdb"), tmp_path / "particles")
    state = labels(path).numpy()
    lines = path.read_text().splitlines()
    rows = [number for number, line in enumerate(lines) if "@" in line]
    assert len(rows) == len(state) == 2400
    tags = [line.split()[0] for line in lines if line.startswith("_rln")]
    tags = tags[tags.index("_rlnImageName") :]
    values = [dict(zip(tags, lines[row].split(), strict=True)) for row in rows]
    tilt, defocus = (np.array([float(own[tag]) for own in values]) for tag in ("_rlnAngleTilt", "_rlnDefocusU"))
    kept = ((state == 1) == (tilt < 90)) & ((state == 1) == (defocus < np.median(defocus)))
    path.write_text(
        "\n".join([*lines[: rows[0]], *(lines[row] for row, own in zip(rows, kept, strict=True) if own), ""])
    )
    with mrcfile.open(path.with_suffix(".mrcs"), mode="r+") as file:
        file.data[state == 2] *= 1.3
    return path


@pytest.mark.slow
@pytest.mark.report
def test_latents_that_follow_the_images_are_named(entangled, tmp_path, monkeypatch):
    for name, value in (("_FINE", (0.2,)), ("_FINE_STEPS", 20), ("_FEWEST_STEPS", 8), ("_FIRST", 512)):
        monkeypatch.setattr(f"emsplat.heterogeneity.states.{name}", value)
    options = {"components": 1, "resolution": 8.0, "points": 2, "gaussians": 512, "threads": 1}
    summary = heterogeneity(configure(HeterogeneityConfig, **options), entangled, tmp_path / "run")
    found = {row["what"]: row for row in summary["heterogeneity"]["follows"]}
    expected = {"viewing direction", "defocus", "micrograph", "grey scale of micrographs"}
    assert {what for what, row in found.items() if row["warns"]} == expected
    said = (tmp_path / "run" / "run.log").read_text()
    for what in expected:
        assert found[what]["explained"] > 0.3
        assert f"molecule alone: {what}: explains" in said
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count(">look<") == len(expected)
    assert f"Latents follow {', '.join(what for what, row in found.items() if row['warns'])}: see below." in page
