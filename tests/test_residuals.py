"""Residuals: noise where the model is right, signal where it is not, overfitting where it fitted noise."""

import csv

import mrcfile
import pytest
import torch

from emsplat.assessment.residuals import write_residuals
from emsplat.config import ReconstructConfig, configure
from emsplat.particles.open import open_particles
from emsplat.programs.reconstruct import reconstruct
from emsplat.run.log import Log
from emsplat.types import Gaussians


@pytest.fixture(scope="module")
def stack(simulated):
    return open_particles(simulated(particles=400))


@pytest.fixture(scope="module")
def model(stack, tmp_path_factory):
    from emsplat.io.ply import read_ply

    run = tmp_path_factory.mktemp("r") / "run"
    with (run.parent / "log").open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("emsplat.report.write_report", lambda run, *_: None)
        reconstruct(configure(ReconstructConfig, epochs=8, gaussians=800), stack.table.sources[0], run, Log(file))
    return read_ply(run / "run_class001.ply")[0]


def table(folder):
    with (folder / "residual.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def test_residual_of_a_good_model_is_the_noise(stack, model, tmp_path):
    write_residuals(stack, {1: model, 2: model}, tmp_path)
    found = table(tmp_path)
    assert len(found["noise"]) == 16
    torch.testing.assert_close(found["own"], found["other"])
    ratio = found["own"] / found["noise"]
    assert float((ratio - 1).abs().mean()) < 0.1


def test_missing_signal_stays_in_the_residual(stack, model, tmp_path):
    nothing = Gaussians(model.mean, model.covariance, 1e-6 * model.amplitude)
    write_residuals(stack, {1: model, 2: nothing}, tmp_path)
    found = table(tmp_path)
    # Half of the particles were compared with nothing in either column.
    assert float((found["own"] / found["noise"])[:6].mean()) > 1.5
    assert float((found["other"] / found["noise"])[:6].mean()) > 1.5


def test_examples_are_triples(stack, model, tmp_path):
    about = write_residuals(stack, {1: model, 2: model}, tmp_path)
    with mrcfile.open(tmp_path / "examples.mrcs") as file:
        images = torch.from_numpy(file.data.copy())
    assert images.shape == (3 * len(about), 32, 32)
    assert [one["half"] for one in about] == [1, 1, 2, 2]
    for particle, projection, rest in images.reshape(-1, 3, 32, 32):
        torch.testing.assert_close(particle - projection, rest, atol=1e-4, rtol=0)
        assert float((particle * projection).sum() / projection.square().sum()) == pytest.approx(1, abs=0.4)
    rows = [one["row"] - 1 for one in about]
    assert stack.half[rows].tolist() == [1, 1, 2, 2]
