"""Scores of reconstructed states against the truth: their definitions, and what the command says."""

import csv
import math
import pickle

import numpy as np
import pytest
import torch

from emsplat.assessment.states import score, true_coordinates
from emsplat.cli import main
from emsplat.config import SimulateConfig, configure
from emsplat.errors import InputError
from emsplat.io.columns import read_latents
from emsplat.io.mrc import read_map, write_map
from emsplat.measures.fsc import fsc
from emsplat.measures.mask import soft_region
from emsplat.measures.states import (
    adjusted_rand_index,
    circular,
    common_mask,
    fsc_auc,
    moving_mask,
    nearest_rows,
    neighbourhood_similarity,
)
from emsplat.programs.simulate import simulate
from emsplat.simulation.truth import read_truth
from emsplat.types import Grid


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- area under the FSC


@pytest.mark.parametrize("size", [8, 16, 30])
def test_area_of_a_map_with_itself(size):
    volume = noise(size, size, size)
    assert fsc_auc(volume, volume, torch.ones(size, size, size)) == pytest.approx((size // 2 - 1) / size, abs=1e-6)
    assert fsc_auc(volume, -volume, torch.ones(size, size, size)) == pytest.approx(0.5 / size, abs=1e-6)  # FSC_0 is 1


def test_area_is_that_of_the_fsc_by_cryodrgns_shells():
    a, b = noise(24, 24, 24), noise(24, 24, 24, seed=1) + noise(24, 24, 24)
    mask = soft_region(noise(24, 24, 24, seed=2) > 1.5, 1.0, 1.0, 3.0)
    curve = fsc(a.double(), b.double(), mask.double(), rule="cryodrgn")[:12].clamp(0, 1)
    assert fsc_auc(a, b, mask) == pytest.approx(float(torch.trapezoid(curve) / 24), abs=1e-5)
    assert fsc_auc(3 * a, b, mask) == pytest.approx(fsc_auc(a, b, mask), abs=1e-6)


def test_shells_without_power_count_as_nothing():
    flat = torch.ones(8, 8, 8)
    assert fsc_auc(flat, flat, flat) == pytest.approx(1.5 / 8)  # shell 1 holds r < 1: FSC 1, 1, 0, 0
    zero = torch.zeros(8, 8, 8)
    assert fsc_auc(zero, flat, flat) == pytest.approx(0.5 / 8)


def test_masks():
    size = 40
    a, b = torch.zeros(2, size, size, size)
    a[18:22, 18:22, 10:14] = a[18:22, 18:22, 26:30] = b[18:22, 18:22, 26:30] = 1.0
    common = common_mask(torch.maximum(a, b), 2.0)
    assert (common[a > 0] == 1).all()
    assert float(common.mean()) < 0.2
    moving = moving_mask(a - b, 2.0)
    assert (moving[18:22, 18:22, 10:14] == 1).all()
    assert (moving[18:22, 18:22, 26:30] == 0).all()
    assert moving_mask(a - a, 2.0) is None
    with pytest.raises(InputError, match="no voxel of the true maps is above 0"):
        common_mask(torch.zeros(4, 4, 4), 1.0)


def test_a_soft_region_is_that_of_the_whole_box():
    region = noise(20, 22, 24) > 2.9
    assert 0 < region.sum() < 30
    place = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in region.shape), indexing="ij"), -1)
    distance = 1.5 * torch.cdist(place.reshape(-1, 3), place[region]).amin(1).reshape(region.shape) - 2.0
    expected = 0.5 + 0.5 * torch.cos(math.pi * (distance / 6.0).clamp(0, 1))
    torch.testing.assert_close(soft_region(region, 1.5, 2.0, 6.0), expected.float())
    assert not soft_region(torch.zeros(4, 4, 4, dtype=torch.bool), 1.0, 1.0, 1.0).any()


# --- latents


def test_neighbours_of_the_truth_are_its_own():
    truth = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).double()
    chance = (1 + 19 * 19 / 399) / 20
    assert neighbourhood_similarity(truth, truth) == (pytest.approx(1), pytest.approx(chance))
    turned = truth @ torch.tensor([[0.0, 3.0], [-3.0, 0.0]]).double() + 5  # Euclidean neighbours stay
    assert neighbourhood_similarity(turned, truth)[0] == pytest.approx(1)
    shuffled = truth[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    assert neighbourhood_similarity(shuffled, truth)[0] == pytest.approx(chance, abs=0.02)


def test_neighbours_by_hand():
    latents = torch.tensor([0.0, 1, 2.5, 10]).double()[:, None]
    truth = torch.tensor([0.0, 10, 1, 2.2]).double()[:, None]
    # Pairs with oneself: {0,1} {1,0} {2,1} {3,2} by latent; {0,2} {1,3} {2,0} {3,2} in truth.
    assert neighbourhood_similarity(latents, truth, 2)[0] == pytest.approx((1 + 1 + 1 + 2) / 8)


def test_equal_points_share_their_place_among_neighbours():
    truth = torch.arange(100).double()[:, None]
    same = torch.zeros(100, 3).double()
    # Each of 100 equal latents is a neighbour by 5 / 100.
    assert neighbourhood_similarity(same, truth)[0] == pytest.approx(0.05, abs=0.002)  # k or k + 1 are near in truth
    classes = torch.arange(100).double()[:, None] // 20  # 20 in each: all count as near in truth
    assert neighbourhood_similarity(classes, classes) == (pytest.approx(1), pytest.approx((1 + 4 * 19 / 99) / 5))


def test_angles_are_on_a_circle():
    points = circular(torch.tensor([0.0, 1, 90, 359]))
    distance = torch.cdist(points, points)
    assert float(distance[0, 3]) == pytest.approx(float(distance[0, 1]))
    assert float(distance[0, 2]) == pytest.approx(math.sqrt(2))


def test_adjusted_rand_index_of_known_partitions():
    a = torch.tensor([0, 0, 1, 1])
    assert adjusted_rand_index(a, torch.tensor([1, 1, 0, 0])) == 1
    # Hubert & Arabie's formula by hand: pairs together in both 1, in each 2 and 2, of 6.
    b, c = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1])
    assert adjusted_rand_index(b, c) == pytest.approx((1 - 1 * 2 / 6) / (1.5 - 1 * 2 / 6))
    assert adjusted_rand_index(torch.tensor([0, 1, 0, 1]), c) == pytest.approx((0 - 2 * 2 / 6) / (2 - 2 * 2 / 6))
    drawn = torch.randint(0, 5, (2, 20000), generator=torch.Generator().manual_seed(0))
    assert adjusted_rand_index(*drawn) == pytest.approx(0, abs=2e-3)
    assert adjusted_rand_index(torch.zeros(4).long(), torch.zeros(4).long()) == 1


def test_the_particle_nearest_to_the_mean_of_its_state():
    latents = torch.tensor([[0.0], [4.0], [5.0], [1.9], [20.0], [22.0]]).double()
    state = torch.tensor([0, 0, 1, 1, 2, 2])
    # Means 2, 3.45 and 21; ties go to the first.
    assert nearest_rows(latents, state, 3).tolist() == [3, 1, 4]
    with pytest.raises(InputError, match="state 4 has no particles"):
        nearest_rows(latents, state, 4)


# --- a folder of results


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three states, two blocks: particles, and a folder that holds the truth itself as a result."""
    folder = tmp_path_factory.mktemp("states")
    place = np.random.default_rng(0).normal(0, 12, (60, 3))
    place[40:50] += (20, 0, 0)
    place[50:] -= (0, 20, 0)
    chains = "A" * 40 + "B" * 10 + "C" * 10
    lines = [
        f"ATOM  {i + 1:5d}  CA  ALA {chain}{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           C\n"
        for i, (chain, (x, y, z)) in enumerate(zip(chains, place, strict=True))
    ]
    (folder / "m.pdb").write_text("".join(lines) + "END\n")
    states = {"missing": ("chain B", "chain C"), "missing_states": ("none", "1", "1+2")}
    config = configure(SimulateConfig, box=32, pixel_size=3.0, particles=90, b_factor=150.0, **states)
    simulate(config, folder / "m.pdb", folder / "particles")
    return folder / "particles"


@pytest.fixture
def result(made, tmp_path):
    """Latents that tell the states apart, and the true maps."""
    folder, truth = tmp_path / "run", read_truth(made)
    folder.mkdir()
    for i, path in enumerate(truth.maps):
        write_map(folder / f"{i:03d}.mrc", 5 * read_map(path)[0], 3.0)
    write_latents(folder / "latents.csv", truth.state, truth.state + 1)
    return folder


def write_latents(path, state, classes, z=None):
    rng = np.random.default_rng(0)
    z = state[:, None].numpy() * 4 + rng.normal(0, 0.5, (len(state), 2)) if z is None else z
    rows = [f"{i + 1},{i % 2 + 1},{a},{b},{int(c)},0.5\n" for i, ((a, b), c) in enumerate(zip(z, classes, strict=True))]
    path.write_text("row,half,z1,z2,class,gain\n" + "".join(rows))


def test_the_truth_scores_all_there_is(made, result, capsys):
    mean = read_map(made / "truth.mrc")[0]
    write_map(result / "consensus.mrc", mean, 3.0)
    assert main(["score-states", str(result), "--truth", str(made)]) == 0
    printed = capsys.readouterr().out
    assert "3 states, 90 particles, box 32 of 3 Å" in printed
    assert "per conformation, AUC          0.469 ± 0.000" in printed  # 15 / 32
    assert "of the 4 nearest particles by latent 1.000 are among the nearest in truth" in printed
    assert "adjusted Rand index of classes and true states 1.000" in printed
    with (result / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["1", "2", "3"]
    assert [row["particles"] for row in rows] == ["30", "30", "30"]
    for row in rows:
        assert float(row["auc"]) == pytest.approx(15 / 32, abs=1e-4)
        assert float(row["moving"]) == pytest.approx(15 / 32, abs=1e-4)
        assert float(row["consensus_auc"]) == pytest.approx(float(row["mean_auc"]), abs=1e-4)
        assert float(row["consensus_moving"]) < float(row["consensus_auc"]) < 15 / 32
    # Scored again it replaces its own table.
    assert main(["score-states", str(result), "--truth", str(made / "truth")]) == 0


def test_a_permuted_labelling_scores_lower(made):
    truth = read_truth(made)
    grid = truth.read(0)[1]
    maps = [truth.read(i)[0] for i in range(3)]
    z = 4 * truth.state[:, None] + noise(90, 2).double()

    def map_at(latents):
        for z in latents:
            yield maps[int((z / 4).mean().round().clamp(0, 2))]

    right = score(truth, grid, z, map_at=map_at, images=20)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    wrong = score(truth, grid, z[order], map_at=map_at, images=20)
    assert all(own.found.auc == pytest.approx(15 / 32, abs=1e-4) for own in right.states)
    assert len(right.images) == 20
    assert all(found.auc == pytest.approx(15 / 32, abs=1e-4) for found, _ in right.images)
    assert right.neighbours[0] > 0.95
    assert wrong.neighbours[0] < 0.6
    for kind in ("auc", "moving"):
        means = [np.mean([getattr(own.found, kind) for own in scores.states]) for scores in (right, wrong)]
        assert means[1] < means[0] - 0.005
        single = [np.mean([getattr(own, kind) for own, _ in scores.images]) for scores in (right, wrong)]
        assert single[1] < single[0] - 0.005


def test_cryodrgns_latents(made, result):
    truth = read_truth(made)
    (result / "latents.csv").unlink()
    z = (4 * truth.state[:, None] + noise(90, 8)).float().numpy()
    (result / "z.pkl").write_bytes(pickle.dumps(z))
    torch.testing.assert_close(read_latents(result / "z.pkl").z, torch.from_numpy(z).double())
    assert main(["score-states", str(result), "--truth", str(made)]) == 0
    (result / "z.pkl").write_bytes(pickle.dumps(z[:80]))
    assert main(["score-states", str(result), "--truth", str(made)]) == 2


def test_maps_without_latents_are_scored(made, result, capsys):
    (result / "latents.csv").unlink()
    assert main(["score-states", str(result), "--truth", str(made), "-o", str(result / "new")]) == 0
    assert "nearest particles" not in capsys.readouterr().out
    assert (result / "new" / "scores.csv").is_file()


def test_a_part_of_the_particles(made, result, capsys):
    lines = (result / "latents.csv").read_text().splitlines(keepends=True)
    (result / "latents.csv").write_text("".join(lines[:1] + lines[31:]))
    assert main(["score-states", str(result), "--truth", str(made)]) == 2
    assert "latents of 60 particles, but" in capsys.readouterr().err
    assert main(["score-states", str(result), "--truth", str(made), "--partial"]) == 0
    printed = capsys.readouterr().out
    assert "60 particles" in printed
    assert "adjusted Rand index of classes and true states 1.000" in printed  # of the right rows


def other_box(folder, made):
    write_map(folder / "001.mrc", torch.rand(16, 16, 16), 3.0)


def other_pixel(folder, made):
    write_map(folder / "000.mrc", torch.rand(32, 32, 32), 2.9)


def not_finite(folder, made):
    text = (folder / "latents.csv").read_text()
    (folder / "latents.csv").write_text(text.replace("\n2,2,", "\n2,2,nan", 1))


def more_particles(folder, made):
    with (folder / "latents.csv").open("a") as file:
        file.write("91,1,0,0,1,0\n")


def twice(folder, made):
    text = (folder / "latents.csv").read_text()
    (folder / "latents.csv").write_text(text.replace("\n2,", "\n1,", 1))


def fewer_maps(folder, made):
    (folder / "002.mrc").unlink()


def only_latents(folder, made):
    for i in range(3):
        (folder / f"{i:03d}.mrc").unlink()


def nothing(folder, made):
    only_latents(folder, made)
    (folder / "latents.csv").unlink()


def other_table(folder, made):
    (folder / "scores.csv").write_text("epoch,gaussians,score\n1,2,3\n")


def no_folder(folder, made):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_box, "001.mrc: box 16 at 3 Å, but"),
        (other_pixel, "000.mrc: box 32 at 2.9 Å, but"),
        (not_finite, "row 2, column z1: nan"),
        (more_particles, "latents.csv: row 91, but"),
        (twice, "column row; expected each particle once"),
        (fewer_maps, "002.mrc: no such file; expected a map for each of the 3 true states"),
        (only_latents, "has latents, but no maps"),
        (nothing, "neither latents.csv nor 000.mrc"),
        (other_table, "scores.csv: is a table of something else"),
        (no_folder, "no such folder"),
    ],
)
def test_results_that_are_refused(made, result, capsys, spoil, said):
    spoil(result, made)
    assert main(["score-states", str(result), "--truth", str(made)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("labels.csv", lambda text: text.replace(",3,", ",4,", 1), "states from 1 to 4; expected 1 to 3"),
        ("labels.csv", lambda text: text.replace("state", "stat", 1), "expected a CSV table with columns state"),
        ("labels.csv", lambda text: text.rpartition(",")[0].rpartition(",")[0], "cells; expected 4; was it cut off?"),
        ("states.csv", lambda text: text.replace("\n2,", "\n3,", 1), "column state; expected 1, 2, 3"),
        ("states.csv", lambda text: text.replace("0.33", "-0.33", 1), "column population; expected numbers above 0"),
        ("states.csv", lambda text: text.replace("002.mrc", "009.mrc", 1), "009.mrc: no such file"),
    ],
)
def test_truths_that_are_refused(made, tmp_path, name, change, said):
    folder = tmp_path / "truth"
    folder.mkdir()
    for path in (made / "truth").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / name).read_text()
    assert change(text) != text
    (folder / name).write_text(change(text))
    with pytest.raises(InputError) as caught:
        read_truth(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_truth(tmp_path, result, capsys):
    assert main(["score-states", str(result), "--truth", str(tmp_path / "none")]) == 2
    assert "labels.csv: no such file" in capsys.readouterr().err


def test_a_state_that_nobody_is_in(made, result, capsys):
    lines = (result / "latents.csv").read_text().splitlines(keepends=True)
    truth = read_truth(made)
    kept = [line for line, state in zip(lines[1:], truth.state.tolist(), strict=True) if state != 1]
    (result / "latents.csv").write_text("".join(lines[:1] + kept))
    latents = read_latents(result / "latents.csv")
    grid = Grid(32, 3.0)
    with pytest.raises(InputError, match="state 2 has no particles"):
        score(truth, grid, latents.z, rows=latents.row, map_at=lambda z: iter(()))


def test_true_coordinates(made):
    truth = read_truth(made)
    coordinates, k = true_coordinates(truth)
    assert k == 4
    assert coordinates.unique(dim=0).tolist() == [[0, 0], [1, 0], [1, 1]]


def test_a_mask_of_ones_own(made, result, tmp_path, capsys):
    write_map(tmp_path / "mask.mrc", torch.ones(32, 32, 32), 3.0)
    assert main(["score-states", str(result), "--truth", str(made), "--mask", str(tmp_path / "mask.mrc")]) == 0
    write_map(tmp_path / "mask.mrc", torch.zeros(32, 32, 32), 3.0)
    assert main(["score-states", str(result), "--truth", str(made), "--mask", str(tmp_path / "mask.mrc")]) == 2
    assert "mask without a voxel above 0.5" in capsys.readouterr().err


def test_a_row_for_each_copy_under_a_symmetry(tmp_path):
    """A table of emsplat's own is read, and one that repeats particles is not."""
    lines = [f"{row},1,{copy},{row / 10}" for row in (1, 2) for copy in (1, 2)]
    (tmp_path / "latents.csv").write_text("row,half,copy,z1\n" + "\n".join(lines) + "\n")
    assert read_latents(tmp_path / "latents.csv").row.tolist() == [0, 0, 1, 1]
    (tmp_path / "latents.csv").write_text("row,z1\n1,0.1\n1,0.2\n")
    with pytest.raises(InputError, match="expected each particle once"):
        read_latents(tmp_path / "latents.csv")
