"""Poses from nothing and molecules in several states on a device without hardware, as on the CPU."""

import pytest

from emsplat.config import AbinitioConfig, HeterogeneityConfig, configure
from emsplat.io.particles import read_particles
from emsplat.poses.starts import Verdict
from emsplat.programs.abinitio import abinitio
from emsplat.programs.heterogeneity import heterogeneity
from test_device import likeness, on
from test_heterogeneity import particles  # noqa: F401 (a fixture)
from test_state_engines import SHORT, few_epochs  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow


def test_a_start_is_the_same_on_a_device(virtual_gpu, simulated, tmp_path, monkeypatch):
    """Also where the images say little: the verdict of two short starts is given."""
    star = simulated(particles=240, snr=1.0, shift=2.0)
    monkeypatch.setattr("emsplat.poses.starts.decide", lambda *_: Verdict("uncertain", 0.4, 8, 1.0, 0.1))
    monkeypatch.setattr("emsplat.poses.starts._LOOKS", 0)
    config = configure(AbinitioConfig, steps=2, batch=60, starts=1, offset=3.0, diameter=115.0, threads=1)
    abinitio(config, star, tmp_path / "cpu")
    on(monkeypatch, virtual_gpu)
    summary = abinitio(config, star, tmp_path / "gpu")
    assert summary["device"] == "gpu"
    here, there = (read_particles(tmp_path / name / "run_data.star").poses.rotation for name in ("cpu", "gpu"))
    away = (here - there).abs().amax((1, 2))
    assert away.quantile(0.9) < 1e-2  # an image may have two poses that are equally good
    assert likeness(tmp_path / "cpu", tmp_path / "gpu", "run_class001.mrc") > 0.99


def test_states_are_the_same_on_a_device(virtual_gpu, particles, tmp_path, monkeypatch):  # noqa: F811
    config = configure(HeterogeneityConfig, **SHORT)
    expected = heterogeneity(config, particles, tmp_path / "cpu")["heterogeneity"]
    on(monkeypatch, virtual_gpu)
    summary = heterogeneity(config, particles, tmp_path / "gpu")
    assert summary["device"] == "gpu"
    found = summary["heterogeneity"]
    assert found["found"]
    assert found["gain"] == pytest.approx(expected["gain"], rel=1e-3)
    assert found["points"] == expected["points"]
    assert likeness(tmp_path / "cpu", tmp_path / "gpu", "consensus.mrc") > 0.999
