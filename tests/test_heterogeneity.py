"""`emsplat heterogeneity` from particles to states: cells, decoder, models of the halves, the run folder."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import together

from emsplat.cli import main
from emsplat.config import HeterogeneityConfig, ReconstructConfig, SimulateConfig, StatesConfig, configure
from emsplat.errors import InputError, OutputError
from emsplat.heterogeneity.cells import (
    Cells,
    empirical_map,
    few_memberships,
    gather_cells,
    information_of,
    joined,
    joint_maps,
    overlap,
)
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.frames import Frame
from emsplat.heterogeneity.half import HalfModel, on_grid, read_half
from emsplat.heterogeneity.paths import along
from emsplat.heterogeneity.refresh import evidence
from emsplat.heterogeneity.search import search
from emsplat.heterogeneity.states import DecoderStage, orders
from emsplat.heterogeneity.subspace import Space, consensus
from emsplat.imaging.project import voxelize
from emsplat.io.columns import read_columns
from emsplat.io.gaussians import read_gaussians
from emsplat.io.mrc import read_map, write_map
from emsplat.io.particles import read_particles
from emsplat.io.pickles import load_arrays
from emsplat.io.relion.read import find_tables
from emsplat.io.star import read_star_file
from emsplat.models.decoder import Decoder, Shape, read_decoder
from emsplat.parallel import ALONE
from emsplat.particles.choose import open_stack
from emsplat.programs.heterogeneity import _of_both, _warn_of_empty_halves, heterogeneity
from emsplat.programs.simulate import simulate
from emsplat.programs.state_particles import Views
from emsplat.programs.states import read_models, states
from emsplat.report import write_report
from emsplat.run.files import EXPLORER
from emsplat.run.log import Log
from emsplat.sums.equations import relative_gain
from emsplat.sums.lattice import Lattice
from emsplat.sums.spectra import read_all_spectra
from emsplat.sums.statistics import _equations_by_grid, equations_of, in_one_grey
from emsplat.types import Grid

GRID = Grid(32, 3.0)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def molecule(path):
    """Three globules of carbon atoms, one per chain."""
    generator = np.random.default_rng(0)
    lines = []
    for chain, centre in (("A", (0, 0, 0)), ("B", (20, 0, 4)), ("C", (-12, 16, -6))):
        for number, place in enumerate(generator.normal(centre, 5.0, (300, 3)), 1):
            x, y, z = place
            lines.append(
                f"ATOM  {len(lines) + 1:5d}  CA  ALA {chain}{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00"
                "           C"
            )
    path.write_text("\n".join([*lines, "END", ""]))
    return path


@pytest.fixture(scope="module")
def particles(tmp_path_factory):
    """600 images of a molecule that lacks a globule in half of them."""
    folder = tmp_path_factory.mktemp("two")
    config = configure(
        SimulateConfig, particles=600, box=32, pixel_size=3.0, snr=0.2, shift=1.0, missing=("chain B",), seed=1
    )
    return simulate(config, molecule(folder / "model.pdb"), folder / "particles")


@pytest.fixture(scope="module")
def run(particles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    config = configure(HeterogeneityConfig, components=2, resolution=10.0, gaussians=2048)
    return folder, heterogeneity(config, particles, folder)


def labels(particles):
    path = particles.parent / "truth" / "labels.csv"
    return torch.tensor([int(value) for value in read_columns(path, ["row", "state"])["state"]])


@pytest.mark.slow
def test_two_states_are_found(run, particles):
    folder, summary = run
    found = summary["heterogeneity"]
    assert found["found"]
    assert found["gain"] > 3 * found["gain_error"] > 0
    assert found["components"] == 1
    assert json.loads((folder / "summary.json").read_text())["heterogeneity"] == found
    table = read_columns(folder / "latents.csv", ["row", "half", "z1", "gain"])
    assert [int(row) for row in table["row"]] == list(range(1, 601))
    latent = torch.tensor([float(value) for value in table["z1"]])
    truth = (labels(particles) == 1).float()
    assert torch.corrcoef(torch.stack([latent, truth]))[0, 1].abs() > 0.85
    assert np.allclose(load_arrays(folder / "z.pkl")[:, 0], latent.numpy(), atol=1e-4)
    half = torch.tensor([int(value) for value in table["half"]])
    for number in (1, 2):  # both halves in one frame
        assert torch.corrcoef(torch.stack([latent[half == number], truth[half == number]]))[0, 1].abs() > 0.8


@pytest.mark.slow
def test_maps_of_the_states_are_like_the_truth(run, particles):
    folder, summary = run
    truth = [read_map(particles.parent / "truth" / f"{number:03d}.mrc")[0] for number in (0, 1)]
    rows = summary["heterogeneity"]["states"]
    maps = [read_map(folder / "states" / f"{row['state'] - 1:03d}.mrc")[0] for row in rows]
    change = (truth[0] - truth[1]).flatten()
    latent = torch.tensor([float(value) for value in read_columns(folder / "latents.csv", ["z1"])["z1"]]).double()
    models = read_models(folder)
    high, low = (
        torch.stack([model.map(latent[labels(particles) == label].mean()[None]) for model in models]).mean(0)
        for label in (1, 2)
    )
    found = (high - low).flatten()
    assert torch.corrcoef(torch.stack([found, change]))[0, 1] > 0.8
    for volume, true in ((high, truth[0]), (low, truth[1])):
        assert torch.corrcoef(torch.stack([volume.flatten(), true.flatten()]))[0, 1] > 0.9
    assert sum(row["population"] for row in rows) == pytest.approx(1.0, abs=1e-3)
    for row in rows:
        halves = [read_map(folder / "states" / f"{row['state'] - 1:03d}_half{half}.mrc")[0] for half in (1, 2)]
        assert torch.allclose((halves[0] + halves[1]) / 2, maps[row["state"] - 1], atol=1e-5)
        local, spread = (
            read_map(folder / "states" / f"{row['state'] - 1:03d}_local_resolution.mrc")[0],
            row["local_resolution"],
        )
        assert 6.0 <= float(local.min()) < float(local.max()) <= spread["window"] * (1 + 1e-6)
        assert 6.0 <= spread["p5"] <= spread["median"] <= spread["p95"] <= spread["window"] * (1 + 1e-6)
    assert (folder / "consensus.mrc").is_file()
    assert (folder / "heterogeneity.html").stat().st_size > 1e5


@pytest.fixture(scope="module")
def several_grids(particles):
    """The particles with 300 of the same molecule in a larger box of finer pixels."""
    folder = particles.parent
    config = configure(
        SimulateConfig, particles=300, box=48, pixel_size=2.5, snr=0.1, shift=1.0, missing=("chain B",), seed=4
    )
    finer = simulate(config, folder.parent / "model.pdb", folder / "finer")
    return together(particles, finer, folder / "mixed.star")


@pytest.mark.slow
def test_several_boxes_and_pixel_sizes(several_grids, particles):
    stack = in_one_grey(open_stack(HeterogeneityConfig(), several_grids).with_halves(0))
    halves = [stack.only(half) for half in (1, 2)]
    coarse = Grid(32, stack.grid.length / 32)
    for half in halves:
        assert [part.grid for part in half.parts()] == [Grid(32, 3.0), Grid(48, 2.5)]
        assert torch.equal(half.rows, torch.cat([part.rows for part in half.parts()]))
        one, other = _equations_by_grid(half, coarse, ALONE)
        assert relative_gain(one, other) == pytest.approx(1, abs=2e-3)
    spectra = (read_all_spectra(halves[0], 10), read_all_spectra(halves[1], 10))
    images = halves[0].image_of_view, halves[1].image_of_view
    searched = search(spectra, images, 2, 10, None, 0, None, lambda text: None)
    assert searched.found is not None
    assert searched.found.count == 1
    truth = torch.cat([labels(particles), labels(several_grids.parent / "finer" / "particles.star")])
    for half, own in enumerate(halves):
        latent, state = searched.found.latents[half][half].mean[:, 0], truth[own.rows].double()
        parts = torch.tensor_split(torch.stack([latent, state]), [len(own.parts()[0])], dim=1)
        likeness = [torch.corrcoef(part)[0, 1] for part in parts]
        assert min(map(abs, likeness)) > 0.6
        assert likeness[0] * likeness[1] > 0  # one sign in both boxes


@pytest.mark.slow
def test_cells_and_evidence_of_several_grids(several_grids):
    stack = in_one_grey(open_stack(HeterogeneityConfig(), several_grids).with_halves(0)).only(1)
    coarse, (first, second) = Grid(32, stack.grid.length / 32), stack.parts()
    one, other, both = (
        next(gather_cells(own, torch.ones(len(own), 1), torch.zeros(1, 1), 32, coarse))
        for own in (first, second, stack)
    )
    torch.testing.assert_close(both.linear, one.linear + other.linear, rtol=1e-4, atol=1e-5 * float(both.linear.max()))
    subspace = consensus(Space(Lattice(8)), read_all_spectra(stack, 8))
    maps = subspace.maps * torch.tensor([0.9, 1.1])[:, None, None, None]
    seen, alone = (evidence(maps, subspace, own, torch.zeros(len(own), 2).double()) for own in (stack, first))
    assert seen.shape == (len(stack), 2)
    torch.testing.assert_close(seen[: len(first)], alone)
    assert (seen[len(first) :].abs() > 0).all()


@pytest.mark.slow
def test_scores_of_the_run(run, particles, capsys):
    folder, _ = run
    assert main(["score-states", str(folder), "--truth", str(particles.parent), "--images", "4"]) == 0
    assert "per conformation, AUC" in capsys.readouterr().out
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert all(float(row["auc"]) > float(row["consensus_auc"]) for row in rows)


@pytest.mark.slow
def test_maps_at_a_table_of_latents(run, tmp_path):
    folder, summary = run
    table = read_columns(folder / "states" / "states.csv", ["state", "z1"])
    at = tmp_path / "z.csv"
    at.write_text("z1\n" + "\n".join(table["z1"]) + "\n")
    paths = states(folder, StatesConfig(at=at), tmp_path / "maps")
    assert [path.name for path in paths] == [f"{number:03d}.mrc" for number in range(len(table["z1"]))]
    for path in paths:
        volume, grid = read_map(path)
        assert grid == GRID
        assert torch.allclose(volume, read_map(folder / "states" / path.name)[0], atol=2e-3 * float(volume.max()))
    with pytest.raises(OutputError, match="--overwrite"):
        states(folder, StatesConfig(at=at), tmp_path / "maps")
    half = states(folder, StatesConfig(at=at, half=2, gaussians=True), tmp_path / "half")
    assert (tmp_path / "half" / "000_half2.ply").is_file()
    # The model on disk has its residual in half precision.
    own = read_map(folder / "states" / "000_half2.mrc")[0]
    assert torch.allclose(read_map(half[0])[0], own, atol=2e-3 * float(own.max()))
    way = states(folder, StatesConfig(path=(1, 2), frames=3), tmp_path / "way")
    assert len(way) == 3
    assert torch.equal(read_map(way[0])[0], read_map(paths[0])[0])
    assert len(summary["heterogeneity"]["states"]) >= 2


@pytest.mark.slow
def test_populations_have_intervals(run, particles):
    folder, summary = run
    found = summary["heterogeneity"]
    rows = found["states"]
    assert sum(row["population"] for row in rows) == pytest.approx(1.0, abs=1e-6)
    assert min(row["free_energy"] for row in rows) == 0
    for row in rows:
        low, high = row["population_interval"]
        assert low <= row["population"] <= high
        assert row["population_error"] > 0
    assert "600 particles (there are only 6 micrographs)" in found["populations_over"]
    table = read_columns(folder / "states" / "states.csv", ["state", "population", "population_low", "population_high"])
    assert [float(value) for value in table["population"]] == pytest.approx([r["population"] for r in rows], abs=1e-4)
    # By the sign of the latent: half of the particles lack a globule, and the half-sets agree.
    density = read_columns(folder / "density.csv", ["half", "z1", "weight", "low", "high"])
    point, weight = (torch.tensor([float(value) for value in density[name]]) for name in ("z1", "weight"))
    half = torch.tensor([int(value) for value in density["half"]])
    for number in (1, 2):
        assert float(weight[half == number].sum()) == pytest.approx(1, abs=1e-3)
        assert float(weight[(half == number) & (point > 0)].sum()) == pytest.approx(0.5, abs=0.12)


@pytest.mark.slow
def test_particles_come_back_with_their_states(run, particles):
    folder, summary = run
    rows = summary["heterogeneity"]["states"]
    own, used = read_particles(particles), read_particles(folder / "run_data.star")
    assert len(used) == len(own) == 600
    assert torch.equal(used.half, own.half)
    assert used.stacks == own.stacks
    assert torch.equal(used.image, own.image)
    block = read_star_file(folder / "run_data.star")
    table = find_tables(block)[0]
    latents = read_columns(folder / "latents.csv", ["row", "z1", "gain"])
    z = [float(value) for value in latents["z1"]]
    assert np.allclose([float(text) for text in table.text("EmsplatLatent1")], z, atol=1e-4)
    membership = np.array([float(text) for text in table.text("EmsplatMembership")])
    assert ((membership >= 0) & (membership <= 1)).all()
    before = find_tables(read_star_file(particles))[0]
    for tag in before.table.tags:
        if tag not in ("_rlnImageName", "_rlnClassNumber"):
            assert list(table.table.text(tag)) == list(before.table.text(tag))
    seen = 0
    for number in range(len(rows)):
        part = read_particles(folder / "states" / f"{number:03d}.star")
        assert set(part.particle_class.tolist()) == {number + 1}
        assert part.stacks == own.stacks
        seen += len(part)
    assert seen == 600


@pytest.mark.slow
def test_the_run_says_what_latents_follow(run):
    folder, summary = run
    tests = summary["heterogeneity"]["follows"]
    of_images = {"viewing direction", "angle in the image", "defocus"}
    assert {row["what"] for row in tests} == of_images | {"grey scale", "position of the whole"}
    assert not any(row["warns"] for row in tests)
    assert "do latents follow the images" in (folder / "run.log").read_text()


@pytest.mark.slow
def test_what_opens_in_chimerax_is_there(run):
    folder, summary = run
    text = (folder / "chimerax.cxc").read_text()
    opened = [word for line in text.splitlines() if line.startswith("open ") for word in line.split()[1:]]
    opened = [word for word in opened if word.endswith(".mrc")]
    assert "consensus.mrc" in opened
    assert len(opened) > len(summary["heterogeneity"]["states"])
    assert all((folder / word).is_file() for word in opened)
    gaussians, grid = read_gaussians(folder / "states" / "000.ply")
    volume = sum(read_map(folder / "states" / f"000_half{half}.mrc")[0] for half in (1, 2)) / 2
    assert torch.corrcoef(torch.stack([voxelize(gaussians, grid).flatten(), volume.flatten()]))[0, 1] > 0.95
    assert json.loads((folder / "parts" / "parts.json").read_text())["parts"][0]["number"] == 1


@pytest.mark.slow
@pytest.mark.report
def test_the_report_of_a_run_with_states(run):
    folder, _ = run
    page = write_report(folder).read_text(encoding="utf-8")
    for said in (
        "nats per image",
        "Is there anything?",
        "classes of latents",
        "viewing direction",
        "part 1,",
        EXPLORER,
    ):
        assert said in page
    assert "Not shown" not in page
    assert (folder / "states.png").stat().st_size > 10000


@pytest.mark.report
def test_the_report_of_a_run_without_states(tmp_path):
    gains = [{"value": 0.0, "error": 0.0}, {"value": -0.2, "error": 0.1}]
    found = {"found": False, "gain": 0.0, "gain_error": 0.01, "components": 0, "points": 0, "gain_by_components": gains}
    (tmp_path / "summary.json").write_text(json.dumps({"heterogeneity": found | {"gain_by_points": {}}}))
    (tmp_path / "config.toml").write_text("")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No heterogeneity that these images support" in page
    assert "Not shown" not in page
    for absent in ('id="states"', 'id="landscape"', 'id="follows"', 'id="parts"'):
        assert absent not in page


@pytest.mark.slow
def test_selected_particles(run, particles, tmp_path, capsys):
    folder, _ = run
    latents = read_columns(folder / "latents.csv", ["row", "half", "z1"])
    z = np.array([float(value) for value in latents["z1"]])
    assert main(["states", str(folder), "--select", "z1=0:", "half=1", "-o", str(tmp_path / "high")]) == 0
    half = np.array([int(value) for value in latents["half"]])
    right = np.flatnonzero((z >= 0) & (half == 1))
    assert f"{len(right):,} of 600 selected, half-sets {len(right):,} + 0" in capsys.readouterr().out
    star = read_particles(tmp_path / "high" / "selected.star")
    assert np.array_equal(star.image.numpy(), right)
    cs = read_particles(tmp_path / "high" / "selected.cs")
    assert np.array_equal(cs.image.numpy(), right)
    assert torch.allclose(cs.poses.rotation, star.poses.rotation, atol=1e-5)
    index = load_arrays(tmp_path / "high" / "selected.pkl")
    assert index.dtype.kind == "i"
    assert np.array_equal(index, right)
    # The same by the files that the explorer and cryoDRGN write.
    (tmp_path / "rows.txt").write_text("row\n" + "".join(f"{row + 1}\n" for row in right))
    (tmp_path / "bare.txt").write_text("".join(f"{row + 1}\n" for row in right))
    (tmp_path / "table.csv").write_text("row,z1\n" + "".join(f"{row + 1},0\n" for row in right))
    for number, name in enumerate(("rows.txt", "bare.txt", "table.csv", "high/selected.pkl")):
        config = StatesConfig(select=(str(tmp_path / name),))
        paths = states(folder, config, tmp_path / str(number))
        assert np.array_equal(read_particles(paths[0]).image.numpy(), right)
    states_of = find_tables(read_star_file(folder / "run_data.star"))[0].text("ClassNumber")
    chosen = states(folder, StatesConfig(select=("class=1,2",)), tmp_path / "classes")
    assert len(read_particles(chosen[0])) == sum(text in ("1", "2") for text in states_of)
    with pytest.raises(OutputError, match="--overwrite"):
        states(folder, StatesConfig(select=("class=1",)), tmp_path / "classes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("select", "said"),
    [
        (("nothing",), "no such file and no condition"),
        (("z9=0:1",), "z9 is none of class, half, z1, gain"),
        (("z1=1:0",), "ranges such as"),
        (("z1=a:b",), "ranges such as"),
        (("z1=3",), "ranges such as"),
        (("class=99",), "there is no class 99; there are 1, 2"),
        (("class=one",), "expected a file of row numbers"),
        (("z1=1000:",), "no particle of .* is left"),
        (("rows.txt",), "row 601 is not in"),
        (("text.txt",), "cannot be read"),
        (("empty.txt",), "lists no rows"),
    ],
)
def test_selections_that_are_refused(run, tmp_path, monkeypatch, select, said):
    (tmp_path / "rows.txt").write_text("1\n601\n")
    (tmp_path / "text.txt").write_text("first\n")
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        states(run[0], StatesConfig(select=select), tmp_path / "chosen")


@pytest.mark.slow
def test_a_traversal_and_its_movie(run, tmp_path):
    paths = states(run[0], StatesConfig(traverse=1, frames=3, movie=True), tmp_path / "way")
    assert len(paths) == 3
    assert (tmp_path / "way" / "movie.webp").stat().st_size > 1000
    assert "000.mrc 001.mrc 002.mrc vseries true" in (tmp_path / "way" / "chimerax.cxc").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either --at"),
        ({"traverse": 9}, "component from 1 to"),
        ({"traverse": 1, "path": (1, 2)}, "either --at"),
        ({"select": ("z1=0:",), "path": (1, 2)}, "--path with --select: it belongs to maps"),
        ({"select": ("z1=0:",), "half": 1}, "--half with --select: it belongs to maps"),
        ({"path": (1, 2, 2)}, "2 follows 2"),
        ({"traverse": 1, "straight": True}, "--straight belongs to --path"),
        ({"path": (1,)}, "two states or more"),
        ({"path": (1, 99)}, "from 1 to"),
        ({"path": (1, 2), "frames": 1}, "at least 2 frames"),
        ({"path": (1, 2), "half": 3}, "--half 3: expected 1 or 2"),
    ],
)
def test_latents_that_are_refused(run, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        states(run[0], StatesConfig(**options), tmp_path / "maps")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("z1\nnan\n", "row 1, column z1: nan; expected a finite number"),
        ("z1\n1\ninf\n", "row 2, column z1: inf"),
        ("z2\n1\n", "expected a CSV table with columns z1"),
        ("z1,z2\n1,0\n", "column z2, but this run has 1 components"),
        ("z1\n", "no rows"),
    ],
)
def test_tables_of_latents_that_are_refused(run, tmp_path, text, said):
    (tmp_path / "z.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        states(run[0], StatesConfig(at=tmp_path / "z.csv"), tmp_path / "maps")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (None, "without a voxel above 0.5"),
        (0, "nothing of the mask is left within the sphere"),
    ],
)
def test_a_focus_that_leaves_nothing(particles, tmp_path, where, said):
    mask = torch.zeros(32, 32, 32)
    if where is not None:
        mask[where, where, where] = 1.0
    write_map(tmp_path / "mask.mrc", mask, 3.0)
    config = configure(HeterogeneityConfig, focus=tmp_path / "mask.mrc", components=2, resolution=8.0)
    with pytest.raises(InputError, match=said):
        heterogeneity(config, particles, tmp_path / "run")


def test_a_half_set_without_particles_of_a_state_confirms_none():
    states = torch.tensor([[-2.0], [0.0], [2.0], [9.0]], dtype=torch.float64)
    one, other = (torch.tensor(own, dtype=torch.float64)[:, None] for own in ([-2.0, 0.1, 1.9], [-1.8, -0.9, 0.2]))
    assert _of_both((one, other), states, [0, 1, 2, 3]) == [0, 1]
    assert _of_both((one, other), states, [1, 2]) == [1]
    assert _of_both((one, one), states, [0, 2]) == [0, 2]
    assert _of_both((one, other), states, []) == []


def test_a_state_that_a_half_set_lacks_is_said(capsys):
    ones = torch.ones(4, dtype=torch.int64)
    state = torch.tensor([0, 0, 1, 1])
    views = Views(
        ones,
        torch.tensor([1, 2, 1, 1]),
        ones,
        torch.zeros(4, 1),
        torch.zeros(4),
        torch.ones(4),
        state,
        state,
        torch.ones(4),
    )
    log = Log()
    _warn_of_empty_halves(log, views, 2)
    assert len(log.warnings) == 1
    assert log.warnings[0].startswith("half-set 2 has no particle of state 2; its half map")


@pytest.mark.slow
def test_a_folder_of_another_kind(run, simulated, tmp_path):
    star = simulated(particles=60, box=32, pixel_size=3.0, snr=0.5, atoms=300, seed=3)
    for options in ({"path": (1, 2)}, {"select": ("class=1",)}, {"traverse": 1}):
        with pytest.raises(InputError, match="expected the folder of an emsplat heterogeneity that has found"):
            states(star.parent, StatesConfig(**options), tmp_path / "maps")
    damaged = shutil.copytree(run[0], tmp_path / "damaged")
    (damaged / "model_half2.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not the model of a half-set, or damaged"):
        states(damaged, StatesConfig(traverse=1), tmp_path / "maps")
    shutil.copy(star, damaged / "run_data.star")
    with pytest.raises(InputError, match=r"60 particles, but 600 in .*; expected those of one run"):
        states(damaged, StatesConfig(select=("class=1",)), tmp_path / "maps")


def test_a_folder_without_states(particles, tmp_path):
    with pytest.raises(InputError, match="no models of states"):
        states(particles.parent, StatesConfig(path=(1, 2)), tmp_path / "maps")


def test_one_state_gives_no_states(simulated, tmp_path, capsys):
    star = simulated(particles=400, box=32, pixel_size=3.0, snr=0.1, atoms=600, seed=3)
    assert (
        main(["heterogeneity", str(star), "-o", str(tmp_path / "run"), "--components", "2", "--resolution", "8"]) == 0
    )
    assert "no heterogeneity that these images support" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["heterogeneity"]
    assert found["found"] is False
    assert found["components"] == found["points"] == 0
    assert not (tmp_path / "run" / "states").exists()
    assert not (tmp_path / "run" / "latents.csv").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"components": 500}, "fewer --components"),
        ({"resolution": 2.0}, "at least 4 cycles"),
        ({"components": 0}, "1 c"),
        ({"parts": 0}, "--parts 0: expected at least 1"),
        ({"points": 1}, "--points 1: expected at least 2"),
        ({"states": 1}, "--states 1: expected at least 2"),
        ({"resolution": float("nan")}, "--resolution nan: expected cycles per box"),
        ({"engine": "images", "batch": -5}, "--batch -5: expected at least 1"),
        ({"gaussians": 3}, "--gaussians 3: expected at least 10"),
        ({"first": 20}, "particles for 12 components; take more"),
    ],
)
def test_options_that_cannot_be(particles, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        heterogeneity(configure(HeterogeneityConfig, **options), particles, tmp_path / "run")


@pytest.fixture(scope="module")
def stack(particles):
    return open_stack(configure(ReconstructConfig), particles).only(1)


def test_one_cell_of_all_particles_is_their_equations(stack):
    """½ VᵀKV - bᵀV of a cell that everything belongs to is that of the one-pass sums."""
    member = torch.ones(len(stack), 1, dtype=torch.float64)
    (cell,) = gather_cells(stack, member, torch.zeros(1, 1, dtype=torch.float64), 24)
    equations = equations_of(stack)
    assert torch.allclose(cell.linear[0], equations.linear[4:28, 4:28, 4:28], rtol=1e-4, atol=1e-3)
    assert float(cell.particles) == len(stack)
    assert float(cell.noise) == 1.0


def test_a_cell_holds_all_copies_of_its_particles(simulated):
    """Also where as many of them have each element of the symmetry."""
    stack = open_stack(configure(ReconstructConfig, symmetry="C2"), simulated(particles=60)).only(1)
    (cell,) = gather_cells(stack, torch.ones(2 * len(stack), 1), torch.zeros(1, 1), 24)
    whole, inside = equations_of(stack), slice(stack.grid.size // 2 - 12, stack.grid.size // 2 + 12)
    linear = whole.linear[inside, inside, inside]
    assert float((cell.linear[0] - linear).norm() / linear.norm()) < 1e-5


def test_cells_add_up(stack):
    generator = drawn(1)
    member = torch.softmax(torch.randn(len(stack), 2, generator=generator, dtype=torch.float64), 1)
    cells = joined(list(gather_cells(stack, member, torch.zeros(2, 1, dtype=torch.float64), 24)))
    (whole,) = gather_cells(stack, member.sum(1, keepdim=True), torch.zeros(1, 1, dtype=torch.float64), 24)
    scale = float(whole.linear.abs().max())
    assert torch.allclose(cells.linear.sum(0), whole.linear[0], atol=1e-4 * scale)
    # Where there are no data, each is cut off at 0 by itself.
    difference = (cells.response.sum(0) - whole.response[0]).abs().mean()
    assert difference < 5e-4 * whole.response.max()
    assert torch.allclose(cells.noise.double(), (member**2).sum(0) / member.sum(0), rtol=1e-4)


def test_a_point_that_is_nobodys_says_nothing(stack):
    """Views keep their largest memberships only, so that cells may be empty; the others must not suffer from one."""
    member = torch.ones(len(stack), 2, dtype=torch.float64) * torch.tensor([1.0, 0.0])
    both = joined(list(gather_cells(stack, member, torch.zeros(2, 1, dtype=torch.float64), 24)))
    alone = joined(list(gather_cells(stack, member[:, :1], torch.zeros(1, 1, dtype=torch.float64), 24)))
    assert both.particles[1] == both.noise[1] == 0
    torch.testing.assert_close(empirical_map(both, torch.ones(2)), empirical_map(alone, torch.ones(1)))
    information = information_of(both)
    design = torch.ones(2, 1)
    assert bool(torch.isfinite(joint_maps(both, both.linear, information, design, [1.0])).all())


def random_cells(size=16, count=3):
    generator = drawn(2)
    side = 3 * size // 2
    noise = torch.randn(count, side, side, side, generator=generator)
    response = torch.fft.rfftn(noise, dim=(1, 2, 3)).abs()
    linear = torch.randn(count, size, size, size, generator=generator)
    return Cells(Grid(size, 3.0), linear, response, torch.zeros(count, 2), torch.ones(count), torch.ones(count))


def test_gradient_of_a_cell():
    cells = random_cells()
    volume = torch.randn(16, 16, 16, generator=drawn(3))
    step = torch.randn(16, 16, 16, generator=drawn(4))
    _, gradient = cells.error_and_gradient(1, volume)
    after, before = (cells.error_and_gradient(1, volume + sign * 0.01 * step)[0] for sign in (1, -1))
    slope = torch.dot(gradient.flatten(), step.flatten())
    assert float((after - before) / 0.02) == pytest.approx(float(slope), rel=1e-3)


def test_coarser_cells_say_the_same_of_smooth_maps(stack):
    """On larger voxels, a wide mixture fits as well as on the voxels of the images."""
    from emsplat.heterogeneity.states import render
    from emsplat.types import Gaussians

    member = torch.ones(len(stack), 1, dtype=torch.float64)
    (cells,) = gather_cells(stack, member, torch.zeros(1, 1, dtype=torch.float64), 32)
    mean = torch.tensor([[3.0, -4.0, 2.0], [-8.0, 5.0, 0.0]])
    mixture = Gaussians(mean, 64 * torch.eye(3).expand(2, 3, 3), torch.tensor([5.0, 9.0]))
    fine, _ = cells.error_and_gradient(0, render(mixture, cells))
    coarse = cells.coarse(12.0)
    assert coarse.grid.size == 16
    found, _ = coarse.error_and_gradient(0, render(mixture, coarse))
    assert float(found) == pytest.approx(float(fine), rel=0.02)


def test_memberships_are_few_and_add_up_to_one():
    member = torch.softmax(3 * torch.randn(50, 8, generator=drawn(5), dtype=torch.float64), 1)
    few = few_memberships(member)
    assert torch.allclose(few.sum(1), torch.ones(50, dtype=torch.float64))
    assert ((few > 0).sum(1) <= 3).all()
    assert (few.argmax(1) == member.argmax(1)).all()
    assert torch.diagonal(overlap(few)) == pytest.approx(1.0)
    # An image that says nothing belongs somewhere.
    assert torch.allclose(few_memberships(torch.full((2, 64), 1 / 64)).sum(1), torch.ones(2))


def test_the_empirical_map_of_noise_is_empty():
    """b with exactly its own noise carries no signal, and the filter shuts."""
    size, side = 16, 24
    generator = drawn(6)
    response = torch.ones(1, side, side, side // 2 + 1)  # K = δ: every voxel by itself
    signal = torch.zeros(size, size, size)
    signal[6:10, 6:10, 6:10] = 20.0
    noise = torch.randn(size, size, size, generator=generator)

    def filtered(linear):
        cells = Cells(Grid(size, 3.0), linear[None], response, torch.zeros(1, 1), torch.ones(1), torch.ones(1))
        return empirical_map(cells, torch.ones(1))

    assert float(filtered(noise).square().mean()) < 0.1
    kept = filtered(signal + noise)
    assert torch.corrcoef(torch.stack([kept.flatten(), signal.flatten()]))[0, 1] > 0.95


def decoder(count=40, latents=2):
    generator = drawn(7)
    centre = 10 * torch.randn(count, 3, generator=generator)
    return Decoder(centre, torch.full((count,), 4.0), torch.ones(count), Shape(latents, 3), generator=generator)


def test_the_decoder_is_its_formula():
    model = decoder()
    latent = torch.randn(5, 2, generator=drawn(8))
    with torch.no_grad():
        for weight in model.weights:
            weight.mul_(3)  # motions that are seen
        position, amplitude = model(latent)
        numbers = model.trunk(latent)
        rotation, shift = model.motions(numbers)
        weight = model.parts()
        mass = weight * torch.nn.functional.softplus(model.amplitude)[:, None]
        for state in range(5):
            for i in (0, 17, 39):
                expected = torch.zeros(3)
                for p in range(3):
                    origin = (mass[:, p, None] * model.centre).sum(0) / mass[:, p].sum()
                    turned = rotation[state, p] @ (model.centre[i] - origin) + origin + shift[state, p]
                    expected += weight[i, p] * turned
                expected += numbers[state, 27:35] @ model.bend[i]
                assert torch.allclose(position[state, i], model.length * expected, rtol=1e-4, atol=1e-4)
                raw = model.amplitude[i] + numbers[state, 35:] @ model.change[i]
                assert torch.allclose(amplitude[state, i], torch.nn.functional.softplus(raw), rtol=1e-4)
        assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5)
        assert torch.allclose(torch.linalg.det(rotation), torch.ones(5, 3), atol=1e-5)


def test_a_split_decoder_draws_the_same_molecule():
    model = decoder()
    narrow = model.split(8, 3.0, drawn(9))
    assert len(narrow) == 8 * len(model)
    latent = torch.zeros(1, 2)
    with torch.no_grad():
        before, after = (voxelize(one.mixtures(latent)[0], Grid(32, 3.0)) for one in (model, narrow))
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-3)
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.9


def half(frame=None):
    frame = frame or Frame(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    density = Density(torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), torch.tensor([0.5, 0.5]).double())
    residual = torch.randn(2, 16, 16, 16, generator=drawn(10))
    precision = 50 * torch.eye(2, dtype=torch.float64)
    return HalfModel(decoder(), density, precision, residual, Grid(16, 3.0), GRID, frame)


def test_fits_of_decoders_do_not_import_the_compiler():
    """Which takes 1.5 s and 120 MB; classes of torch.optim do."""
    code = """
import sys
import torch
from emsplat.heterogeneity import images
from emsplat.heterogeneity.cells import Cells
from emsplat.heterogeneity.states import DecoderStage, run_stage
from emsplat.models.cryospire import Hierarchy, NetworkShape, PartDiscovery
from emsplat.models.decoder import Decoder, Shape
from emsplat.types import Grid
rng = torch.Generator().manual_seed(0)
centre = torch.randn(12, 3, generator=rng)
cells = Cells(
    Grid(8, 3.0), torch.randn(2, 8, 8, 8), torch.ones(2, 12, 12, 7), torch.zeros(2, 1), torch.ones(2), torch.ones(2)
)
for _ in run_stage(
    Decoder(centre, torch.full((12,), 4.0), torch.ones(12), Shape(1, 2), generator=rng),
    cells, DecoderStage(0.0, 1), rng, only=0,
):
    pass
shape, member = NetworkShape(4, 1, 4), torch.zeros(12, dtype=torch.int64)
before = PartDiscovery(centre, shape, length=4.0, generator=rng)
after = Hierarchy(centre, member, torch.zeros(1, 4), torch.zeros(1, 3), member[:1], shape, length=4.0, generator=rng)
images.inherit(after, before, member, torch.ones(12), torch.zeros(5, 1), torch.zeros(1, 1), rng)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_half_model_comes_back(tmp_path):
    model = half()
    model.save(tmp_path / "half.safetensors")
    found = read_half(tmp_path / "half.safetensors")
    latent = torch.tensor([0.3, -0.2], dtype=torch.float64)
    assert torch.allclose(found.map(latent), model.map(latent), atol=5e-3)  # the residual in half precision
    assert torch.equal(found.mixture(latent).mean, model.mixture(latent).mean)
    assert (found.grid, found.box) == (model.grid, model.box)
    again = read_decoder(model.decoder.state())
    assert torch.equal(again.centre, model.decoder.centre)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_half_models_are_refused(tmp_path, content):
    path = tmp_path / "half.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not the model of a half-set"):
        read_half(path)


def test_a_map_uses_the_residual_of_its_cell_and_its_own_frame():
    model = half()
    near = torch.tensor([1.0, 0.0], dtype=torch.float64)
    rest = model.map(near) - voxelize(model.mixture(near), GRID)
    assert torch.allclose(rest[8:24, 8:24, 8:24], model.residual[1], atol=1e-3)
    flipped = half(Frame(-torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)))
    assert torch.allclose(flipped.map(-near), model.map(near), atol=1e-5)


def test_the_middle_of_the_box_on_finer_voxels():
    axis = (torch.arange(16) - 8) * 6.0
    gap = axis**2 + axis[:, None] ** 2 + axis[:, None, None] ** 2
    coarse = torch.exp(-gap / (2 * 12.0**2))
    fine = on_grid(coarse, Grid(16, 6.0), GRID)
    axis = (torch.arange(32) - 16) * 3.0
    gap = axis**2 + axis[:, None] ** 2 + axis[:, None, None] ** 2
    expected = torch.exp(-gap / (2 * 12.0**2)) / 8  # plain sums stay
    assert float((fine - expected).abs().max()) < 1e-3 * float(expected.max())


def test_points_along_a_way():
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]])
    found = torch.stack(list(along(corners, 5)))
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [3.0, 1.0]])
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_cells_join_from_the_reference_on(count):
    """Each step takes cells that there are, and in the end each has been seen."""
    cells = random_cells(count=count)
    cells = replace(cells, point=torch.arange(2.0 * count).reshape(count, 2))
    steps = list(orders(cells, DecoderStage(40.0, 16, growing=True), 0, drawn(11)))
    assert {int(cell) for step in steps for cell in step} == set(range(count))
    assert all(len(step) <= 4 for step in steps)
    assert len(steps) >= 48  # fewer than 64 while cells join
    assert max(int(step.max()) for step in steps[:4]) <= 4
