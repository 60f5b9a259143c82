"""`emsplat heterogeneity`: both engines, going on after an interruption, and sums that are used again."""

import json
import time

import pytest
import torch
from tests.test_heterogeneity import half, labels, particles  # noqa: F401 (a fixture)
from tests.test_proof import confirming

from emsplat.config import HeterogeneityConfig, configure
from emsplat.errors import InputError, Interrupted
from emsplat.heterogeneity.half import read_half
from emsplat.io.columns import read_columns
from emsplat.io.mrc import read_map
from emsplat.models.cryospire import Hierarchy
from emsplat.process import threads
from emsplat.programs import heterogeneity as program
from emsplat.programs import state_engines
from emsplat.programs.heterogeneity import heterogeneity
from emsplat.run import stop
from emsplat.run.stop import Checkpoints

SHORT = {"components": 1, "resolution": 6.0, "points": 2, "gaussians": 512, "threads": 1, "first": 300}
ON_IMAGES = SHORT | {"engine": "images", "epochs": (3, 1), "gaussians": 256}


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    """What is asked here does not depend on how well a decoder fits."""
    monkeypatch.setattr("emsplat.heterogeneity.states._FINE", (0.2,))
    monkeypatch.setattr("emsplat.heterogeneity.states._FINE_STEPS", 20)
    monkeypatch.setattr("emsplat.heterogeneity.states._FEWEST_STEPS", 8)
    monkeypatch.setattr("emsplat.heterogeneity.states._FIRST", 512)


def latents(folder):
    return torch.tensor([float(value) for value in read_columns(folder / "latents.csv", ["z1"])["z1"]])


def same_results(one, other):
    assert (one / "latents.csv").read_bytes() == (other / "latents.csv").read_bytes()
    for path in sorted((one / "states").glob("*.mrc")):
        assert torch.equal(read_map(path)[0], read_map(other / "states" / path.name)[0]), path.name


@pytest.mark.parametrize("available", [1, 2, 4])
def test_fits_of_halves_go_side_by_side(available):
    """A share of the threads each; the one that is left has all of them."""
    models, seen, said = (half(), half()), [], []

    def fit(number, steps):
        for step in range(steps):
            seen.append((number, step, torch.get_num_threads()))
            yield f"step {step}" if step < 1 else ""
        return models[number]

    with threads(available):
        found = state_engines._results({0: fit(0, 2), 1: fit(1, 5)}, said.append)
        assert torch.get_num_threads() == available
    assert (found[0], found[1]) == models
    assert said == ["half 1: step 0", "half 2: step 0"]
    share = max(1, available // 2)
    # Both have a third turn, in which the first ends.
    assert sorted(seen) == [
        *((0, step, share) for step in (0, 1)),
        *((1, step, share if step < 3 else available) for step in range(5)),
    ]


@pytest.mark.parametrize("available", [1, 2])
def test_a_fit_that_fails_ends_both(available):
    def fit(fails):
        yield ""
        if fails:
            raise InputError("no")
        yield ""
        raise AssertionError("went on")

    with threads(available), pytest.raises(InputError, match="no"):
        state_engines._results({0: fit(False), 1: fit(True)}, lambda text: None)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(particles, tmp_path, monkeypatch):  # noqa: F811
    heterogeneity(configure(HeterogeneityConfig, **SHORT), particles, tmp_path / "whole")
    fit, seen = state_engines.fine_decoder, []

    def stopping(*args):
        if seen:
            raise KeyboardInterrupt
        seen.append(fit(*args))
        return seen[0]

    with monkeypatch.context() as during:
        during.setattr(state_engines, "fine_decoder", stopping)
        with pytest.raises(KeyboardInterrupt):
            heterogeneity(configure(HeterogeneityConfig, **SHORT), particles, tmp_path / "run")
    with monkeypatch.context() as during:
        during.setattr(program, "search", None)  # neither the linear stage nor sums of cells are made again
        during.setattr(state_engines, "cells_of", None)
        heterogeneity(configure(HeterogeneityConfig, **SHORT, resume=True), particles, tmp_path / "run")
    same_results(tmp_path / "run", tmp_path / "whole")
    assert not [*(tmp_path / "run").glob("*cells_*"), *(tmp_path / "run").glob("coarse_*")]
    again = heterogeneity(configure(HeterogeneityConfig, **SHORT, resume=True), particles, tmp_path / "run")
    assert again["heterogeneity"]["found"]
    with pytest.raises(InputError, match="another points"):
        heterogeneity(
            configure(HeterogeneityConfig, **(SHORT | {"points": 3}), resume=True), particles, tmp_path / "run"
        )


_INTERRUPTED = [  # where, and at which call of the run that goes on
    (program, "search", 1),
    (state_engines, "cells_of", 1),
    (state_engines, "cells_of", 2),
    (state_engines, "refreshed", 1),
    (state_engines, "cells_of", 1),
    (state_engines, "refreshed", 2),
    (state_engines, "cells_of", 1),
    (state_engines, "with_residuals", 2),
    (state_engines, "refreshed", 4),
    (program, "proofs", 1),
    (program, "write_particles", 1),
    (program, "write_parts", 1),
]


@pytest.mark.slow
def test_a_run_that_is_stopped_at_every_stage_ends_as_one_that_is_not(particles, tmp_path, monkeypatch):  # noqa: F811
    heterogeneity(configure(HeterogeneityConfig, **SHORT), particles, tmp_path / "whole")
    resume = False
    for where, name, call in _INTERRUPTED:
        kept, seen = getattr(where, name), []

        def stopping(*args, kept=kept, seen=seen, call=call, **options):
            seen.append(None)
            if len(seen) == call:
                raise KeyboardInterrupt
            return kept(*args, **options)

        with monkeypatch.context() as during:
            during.setattr(where, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                heterogeneity(configure(HeterogeneityConfig, **SHORT, resume=resume), particles, tmp_path / "run")
        resume = True
    summary = heterogeneity(configure(HeterogeneityConfig, **SHORT, resume=True), particles, tmp_path / "run")
    same_results(tmp_path / "run", tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())["heterogeneity"]
    assert json.loads(json.dumps(summary["heterogeneity"])) == whole


def test_a_time_limit_is_kept(particles, tmp_path, monkeypatch):  # noqa: F811
    """It stops between stages, and what is done is not done again."""
    options = SHORT | {"time_limit": "1"}
    monkeypatch.setattr(stop, "started", lambda: time.monotonic() - 61)
    with pytest.raises(Interrupted, match="--time-limit is reached: stopped in the linear stage, which begins anew"):
        heterogeneity(configure(HeterogeneityConfig, **options), particles, tmp_path / "run")
    monkeypatch.setattr(stop, "started", time.monotonic)
    kept = state_engines.cells_of

    def late(*args):
        monkeypatch.setattr(stop, "started", lambda: time.monotonic() - 61)
        return kept(*args)

    monkeypatch.setattr(state_engines, "cells_of", late)
    with pytest.raises(Interrupted, match=r"stopped after 1 of \d cells of half 1; go on with --resume"):
        heterogeneity(configure(HeterogeneityConfig, **options, resume=True), particles, tmp_path / "run")
    assert (tmp_path / "run" / "linear_stage.safetensors").is_file()


@pytest.mark.slow
def test_sums_of_another_run(particles, tmp_path, monkeypatch, capsys):  # noqa: F811
    first, second = tmp_path / "first", tmp_path / "second"
    heterogeneity(configure(HeterogeneityConfig, **SHORT, keep_statistics=True), particles, first)
    assert (first / "cells_half1.safetensors").is_file()
    own = {"gaussians": 512, "threads": 1, "from_run": first, "parts": 2, "first": 300}
    with monkeypatch.context() as during:
        during.setattr(program, "search", None)
        heterogeneity(configure(HeterogeneityConfig, **own), particles, second)
    assert "sums of cells from" in capsys.readouterr().out
    assert read_half(second / "model_half1.safetensors").decoder.shape.parts == 2
    with pytest.raises(InputError, match="other particles"):
        heterogeneity(configure(HeterogeneityConfig, **(own | {"first": 200})), particles, tmp_path / "fewer")
    with pytest.raises(InputError, match="--points with --from"):
        heterogeneity(configure(HeterogeneityConfig, **own, points=3), particles, tmp_path / "points")
    with pytest.raises(InputError, match=r"no linear_stage\.safetensors"):
        heterogeneity(configure(HeterogeneityConfig, from_run=tmp_path), particles, tmp_path / "nothing")


@pytest.mark.slow
def test_states_from_images(particles, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "whole"
    summary = heterogeneity(configure(HeterogeneityConfig, **ON_IMAGES), particles, folder)
    found = summary["heterogeneity"]
    assert found["states_gain"] > 3 * found["states_gain_error"] > 0
    truth = (labels(particles)[:300] == 1).float()
    assert torch.corrcoef(torch.stack([latents(folder), truth]))[0, 1].abs() > 0.7
    assert (folder / "heterogeneity.html").is_file()

    due, asked = Checkpoints.due, []

    def stop_at_step_four(self):
        if self._every < float("inf"):  # within a fit
            asked.append(None)
        if len(asked) == 4:
            self._stop.number = 15
        return due(self)

    with monkeypatch.context() as during:
        during.setattr(Checkpoints, "due", stop_at_step_four)
        with pytest.raises(Interrupted, match="half1 at step 4"):
            heterogeneity(configure(HeterogeneityConfig, **ON_IMAGES), particles, tmp_path / "run")
    heterogeneity(configure(HeterogeneityConfig, **ON_IMAGES, resume=True), particles, tmp_path / "run")
    same_results(tmp_path / "run", folder)


@pytest.mark.slow
def test_the_papers_networks(particles, tmp_path, monkeypatch):  # noqa: F811
    confirming(monkeypatch, range(10))  # after one epoch nothing is
    options = SHORT | {"recipe": "cryospire", "epochs": (1, 1), "gaussians": 256}
    summary = heterogeneity(configure(HeterogeneityConfig, **options), particles, tmp_path / "run")
    assert summary["heterogeneity"]["found"]
    assert isinstance(read_half(tmp_path / "run" / "model_half2.safetensors").decoder, Hierarchy)
    names = ["row", "z1", "z2", "z3", "z4"]
    assert len(read_columns(tmp_path / "run" / "latents.csv", names)["z4"]) == 300
    assert not (tmp_path / "run" / "heterogeneity.html").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "cryospire", "engine": "cells"}, "leave --engine cells out"),
        ({"decoder": "perceptron"}, "--decoder belongs to --engine images"),
        ({"epochs": (3, 2)}, "--epochs belongs to --engine images"),
        ({"engine": "images", "epochs": (3,)}, "two numbers above 0"),
        ({"engine": "images", "learning_rate": -1.0}, "a number above 0"),
    ],
)
def test_options_of_the_other_engine(particles, tmp_path, options, said):  # noqa: F811
    with pytest.raises(InputError, match=said):
        heterogeneity(configure(HeterogeneityConfig, **options), particles, tmp_path / "run")
