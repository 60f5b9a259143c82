"""States that the particles of the other half-set confirm, and what a run does with others."""

import json
from dataclasses import replace

import pytest
import torch
from tests.test_heterogeneity import drawn, particles  # noqa: F401 (a fixture)

from emsplat.cli import main
from emsplat.config import HeterogeneityConfig, StatesConfig, configure
from emsplat.errors import InputError
from emsplat.heterogeneity import search
from emsplat.heterogeneity.cells import Cells
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.embedding import Embedding
from emsplat.heterogeneity.evidence import Gain
from emsplat.heterogeneity.frames import identity
from emsplat.heterogeneity.half import HalfModel
from emsplat.measures.mask import soft_region
from emsplat.models.decoder import Decoder, Shape
from emsplat.programs import heterogeneity as program
from emsplat.programs.proof import Proof, _copies, local_of, proofs
from emsplat.programs.state_engines import StatesFitted
from emsplat.programs.states import states
from emsplat.types import Grid

GRID = Grid(24, 3.0)
NONE = (torch.zeros(0, dtype=torch.int64),) * 2


def globule(x, y, z):
    axis = torch.arange(24.0) - 12
    gap = (axis[:, None, None] - z) ** 2 + (axis[:, None] - y) ** 2 + (axis - x) ** 2
    return torch.exp(-gap / 8)


def half(maps):
    """A half-set's model that shows these maps at the latents 0, 1, ...: residuals, and Gaussians of no weight."""
    decoder = Decoder(torch.eye(3), torch.full((3,), 4.0), torch.ones(3), Shape(1, 1), generator=drawn(0))
    decoder.unit = 0.0
    point = torch.arange(len(maps)).double()[:, None]
    density = Density(point, torch.full((len(maps),), 1 / len(maps)).double())
    return HalfModel(decoder, density, 1e4 * torch.eye(1).double(), torch.stack(maps), GRID, GRID, identity(1))


def fitted(shown, true, noise, seed=0):
    """``shown[half]`` are the maps of each model, ``true`` those that the particles show, with K = 1 for each voxel."""
    generator, count, cells = drawn(seed), len(true), []
    for _ in (1, 2):
        linear = torch.stack([one + noise * torch.randn(24, 24, 24, generator=generator) for one in true])
        ones = torch.ones(count)
        cells.append(Cells(GRID, linear, torch.ones(count, 36, 36, 19), torch.zeros(count, 1), ones, ones))
    models = (half(shown[0]), half(shown[1]))
    nothing = torch.zeros(0, count).double()
    latent = torch.zeros(0, 1).double()
    place = Embedding(models[0].density, nothing, nothing, latent, latent, latent[:, 0], torch.eye(1).double())
    kernels = (torch.eye(count), torch.eye(count))
    both, latents, members, gain = (cells[0], cells[1]), (latent, latent), (nothing, nothing), Gain(1.0, 0.1)
    return StatesFitted(models, both, (place, place), latents, kernels, members, gain, None)


def everywhere(volume):
    return soft_region(volume > 0.1, 3.0, 6.0, 9.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_states_that_one_half_set_makes_up_are_not_confirmed(seed):
    body, arm = globule(0, 0, 0) + globule(3, -3, 2), globule(-5, 4, 0)
    made_up = [globule(5, 3, 4), globule(2, -6, -4)]  # in each half-set elsewhere
    true = [body, body + arm, body]
    shown = [[body, body + arm, body + 0.8 * own - 0.2 * arm] for own in made_up]
    found = proofs(
        fitted(shown, true, 0.3, seed),
        torch.arange(3).double()[:, None],
        torch.ones(3),
        sum(true) / 3,
        GRID,
        everywhere,
        10,
        NONE,
    )
    assert [one.confirmed for one in found] == [True, True, False]
    assert found[1].moving_resolution < 15


def test_local_resolution_of_a_state():
    """Where both halves have a globule and where one has made it up."""
    body, arm = globule(-4, 0, 0), globule(6, 4, 0)
    both = fitted([[body + arm, body], [body, body]], [body, body], 0.05)
    latent, halves = torch.zeros(1).double(), (body + arm, body)
    local = local_of(both, latent, halves, None, GRID)
    assert local.window == 25.0
    filled = local.filled(everywhere(body + arm))
    assert bool(filled.isfinite().all())
    assert float(filled[12, 12, 8]) + 2 < float(filled[12, 16, 18])
    assert local_of(both, latent, halves, None, Grid(24, 7.0)) is None


def test_a_rare_state_and_the_one_of_nearly_all_are_confirmed():
    """The latter is hardly another map than the consensus; it differs from the rest."""
    body, arm = globule(0, 0, 0) + globule(3, -3, 2), globule(-5, 4, 0)
    true = [body + arm, body]
    latents, weight = torch.arange(2).double()[:, None], torch.tensor([0.97, 0.03])
    found = proofs(fitted([true, true], true, 0.3), latents, weight, true[0], GRID, everywhere, 10, NONE)
    assert all(one.confirmed for one in found)


def test_the_same_structure_in_another_grey_scale_is_no_state_of_its_own():
    """Beside a state that is one, the mean of all others is another map than either of the twins."""
    body, arm = globule(0, 0, 0) + globule(3, -3, 2), globule(-5, 4, 0)
    true = [body, 1.5 * body, body + arm]
    latents, weight = torch.arange(3).double()[:, None], torch.tensor([1.0, 2.0, 1.5])
    found = proofs(fitted([true, true], true, 0.1), latents, weight, sum(true) / 3, GRID, everywhere, 10, NONE)
    assert [one.like for one in found] == [1, None, None]
    assert [one.confirmed for one in found] == [False, True, True]
    assert found[0].fsc_gain > 3 * found[0].fsc_gain_error  # better than the mean of the others it is
    assert "like" not in found[1].about


def test_data_of_a_symmetric_state_count_once():
    """Under C2: a state to which both views of an image belong, and one that has them singly."""
    both = fitted([[globule(0, 0, 0)] * 2] * 2, [globule(0, 0, 0)] * 2, 0.3)
    member = torch.tensor([[1.0, 0.0], [1.0, 0.0]] * 5 + [[0.0, 1.0], [1.0, 0.0]] * 5).double()
    # A point that was dropped when particles were placed for good is still a cell.
    both = replace(both, members=(member, member))
    images = (torch.arange(20) // 2,) * 2
    copies = [_copies(both, torch.tensor([float(state)]).double(), images) for state in range(2)]
    assert copies == pytest.approx([(5 * 4 + 5) / 15, 1.0])
    assert _copies(both, torch.zeros(1).double(), (torch.arange(20),) * 2) == 1.0


def test_one_state_alone_is_none():
    body = globule(0, 0, 0)
    (found,) = proofs(
        fitted([[body]] * 2, [body], 0.3), torch.zeros(1, 1).double(), torch.ones(1), body, GRID, everywhere, 10, NONE
    )
    assert not found.confirmed
    assert found.resolution is not None


def confirming(monkeypatch, kept):
    """Only some states are confirmed."""
    own = program.proofs

    def some(*args):
        found = own(*args)
        gains = [float(number in kept) for number in range(len(found))]
        return [
            replace(one, fsc_gain=gain, fsc_gain_error=0.1, like=None) for one, gain in zip(found, gains, strict=True)
        ]

    monkeypatch.setattr(program, "proofs", some)


SHORT = {"components": 1, "resolution": 6.0, "points": 2, "gaussians": 512, "threads": 1, "first": 300, "states": 4}


@pytest.fixture
def continuous(monkeypatch):
    monkeypatch.setattr("emsplat.heterogeneity.states._FINE", (0.2,))
    monkeypatch.setattr("emsplat.heterogeneity.states._FINE_STEPS", 20)
    monkeypatch.setattr("emsplat.heterogeneity.states._FEWEST_STEPS", 8)
    monkeypatch.setattr("emsplat.heterogeneity.states._FIRST", 512)
    monkeypatch.setattr("emsplat.heterogeneity.classes._AGREED", 2.0)


@pytest.mark.slow
@pytest.mark.report
@pytest.mark.usefixtures("continuous")
def test_a_run_whose_states_nobody_confirms(particles, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder = tmp_path / "run"
    confirming(monkeypatch, [2])
    options = [part for name, value in SHORT.items() for part in (f"--{name}", str(value))]
    assert main(["heterogeneity", str(particles), "-o", str(folder), *options]) == 0
    said = capsys.readouterr().out
    assert "no states: of 4 that were tried the half-sets confirm 1" in said
    assert "part 1" not in said
    found = json.loads((folder / "summary.json").read_text())["heterogeneity"]
    assert found["found"] is False
    assert found["gain"] > 3 * found["gain_error"]
    assert (found["components"], found["points"], found["states_tried"], found["states_confirmed"]) == (0, 0, 4, 1)
    for name in ("states", "parts", "latents.csv", "heterogeneity.html", "model_half1.safetensors", "chimerax.cxc"):
        assert not (folder / name).exists(), name
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "No states that both half-sets confirm" in page
    assert "Move through the states" not in page
    assert "Not shown" not in page
    with pytest.raises(InputError, match="that has found"):
        states(folder, StatesConfig(traverse=1), tmp_path / "maps")


@pytest.mark.report
@pytest.mark.usefixtures("continuous")
def test_only_confirmed_states_are_shown(particles, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder = tmp_path / "run"
    confirming(monkeypatch, [0, 2, 3])
    # After so short a fit, half-sets have no particle of some states.
    monkeypatch.setattr(program, "_of_both", lambda latent, states, kept: kept)
    summary = program.heterogeneity(configure(HeterogeneityConfig, **SHORT), particles, folder)
    assert "of 4 states that were tried the half-sets confirm 3" in capsys.readouterr().out
    rows = summary["heterogeneity"]["states"]
    assert [row["state"] for row in rows] == [1, 2, 3]
    assert sum(row["population"] for row in rows) == pytest.approx(1)
    assert sorted(path.name for path in (folder / "states").glob("???.mrc")) == [
        "000.mrc",
        "001.mrc",
        "002.mrc",
    ]
    assert (folder / "heterogeneity.html").is_file()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Of 4 states that were tried the half-sets confirm 3" in page
    assert "Free energy" in page  # no classes


@pytest.mark.report
def test_a_run_ends_where_no_density_of_the_latents_gains(particles, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A component may gain where no point does; states would be made of nothing."""
    folder = tmp_path / "run"
    nothing = lambda own, other, generator, points: [torch.full((len(other),), -0.2) for _ in points]  # noqa: E731
    monkeypatch.setattr(search, "point_gains", nothing)
    monkeypatch.setattr(program, "fit_cells", None)
    summary = program.heterogeneity(configure(HeterogeneityConfig, **SHORT), particles, folder)
    said = capsys.readouterr().out
    assert "no heterogeneity that these images support: best gain -0.200 ± 0.000 nats per image with any points" in said
    found = summary["heterogeneity"]
    assert (found["found"], found["components"], found["points"]) == (False, 0, 0)
    assert found["gain"] == pytest.approx(found["gain_by_points"]["2"]["value"]) == pytest.approx(-0.2)
    assert found["gain_by_components"][1]["value"] > 0
    assert not {"states_gain", "states_tried", "states"} & set(found)
    assert "No heterogeneity that these images support" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_is_confirmed():
    assert Proof(10.0, 12.0, 0.31, 0.1).confirmed
    assert not Proof(10.0, 12.0, 0.29, 0.1).confirmed
    assert not Proof(None, None, float("nan"), float("nan")).confirmed
