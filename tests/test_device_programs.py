"""Poses from nothing and molecules in several states as on the CPU: on a device without hardware, and on a GPU."""

import pytest
import torch

from emsplat.config import AbinitioConfig, HeterogeneityConfig, configure
from emsplat.fitting.state import Optimiser
from emsplat.io.particles import read_particles
from emsplat.poses.starts import Verdict
from emsplat.programs.abinitio import abinitio
from emsplat.programs.heterogeneity import heterogeneity
from test_device import likeness, on
from test_heterogeneity import particles  # noqa: F401 (a fixture)
from test_state_engines import ON_IMAGES, SHORT, few_epochs  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow


@pytest.fixture(params=["virtual", pytest.param("cuda", marks=pytest.mark.gpu)])
def accelerator(request):
    if request.param == "virtual":
        return request.getfixturevalue("virtual_gpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


def test_a_start_is_the_same_on_a_device(accelerator, simulated, tmp_path, monkeypatch):
    """Also where the images say little: the verdict of two short starts is given."""
    star = simulated(particles=240, snr=1.0, shift=2.0)
    monkeypatch.setattr("emsplat.poses.starts.decide", lambda *_: Verdict("uncertain", 0.4, 8, 1.0, 0.1))
    monkeypatch.setattr("emsplat.poses.starts._LOOKS", 0)
    config = configure(AbinitioConfig, steps=2, batch=60, starts=1, offset=3.0, diameter=115.0, threads=1)
    abinitio(config, star, tmp_path / "cpu")
    on(monkeypatch, accelerator)
    summary = abinitio(config, star, tmp_path / "gpu")
    assert summary["device"] != "cpu"
    here, there = (read_particles(tmp_path / name / "run_data.star").poses.rotation for name in ("cpu", "gpu"))
    away = (here - there).abs().amax((1, 2))
    assert away.quantile(0.9) < 1e-2  # an image may have two poses that are equally good
    assert likeness(tmp_path / "cpu", tmp_path / "gpu", "run_class001.mrc") > 0.99


def same_states(config, images, folder, monkeypatch, chosen):
    expected = heterogeneity(config, images, folder / "cpu")["heterogeneity"]
    on(monkeypatch, chosen)
    summary = heterogeneity(config, images, folder / "gpu")
    assert summary["device"] != "cpu"
    found = summary["heterogeneity"]
    assert found["found"] == expected["found"]
    assert found["gain"] == pytest.approx(expected["gain"], rel=1e-3)
    assert found["points"] == expected["points"]
    assert found["states_gain"] == pytest.approx(expected["states_gain"], rel=0.05)
    if found["found"]:
        assert likeness(folder / "cpu", folder / "gpu", "consensus.mrc") > 0.999


def test_states_are_the_same_on_a_device(accelerator, particles, tmp_path, monkeypatch):  # noqa: F811
    same_states(configure(HeterogeneityConfig, **SHORT), particles, tmp_path, monkeypatch, accelerator)


def test_states_fitted_to_images_stay_on_a_device(virtual_gpu, particles, tmp_path, monkeypatch):  # noqa: F811
    """All but the gradients, which the device without hardware cannot carry: there, a step moves nothing."""
    backward, step = torch.Tensor.backward, Optimiser.step
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(loss) if loss.device.type == "cpu" else None)

    def step_here(optimiser, rate):
        if all(one.device.type == "cpu" for one in optimiser.parameters.values()):
            step(optimiser, rate)

    monkeypatch.setattr(Optimiser, "step", step_here)
    on(monkeypatch, virtual_gpu)
    summary = heterogeneity(configure(HeterogeneityConfig, **ON_IMAGES), particles, tmp_path / "gpu")
    assert summary["device"] != "cpu"
    assert summary["heterogeneity"]["states_tried"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", ["default", "cryospire"])
def test_states_fitted_to_images_on_a_gpu(particles, tmp_path, monkeypatch, recipe):  # noqa: F811
    config = configure(HeterogeneityConfig, **ON_IMAGES, recipe=recipe)
    same_states(config, particles, tmp_path, monkeypatch, torch.device("cuda", 0))
