"""Particles in several states: selections, trajectories, structures, and images that show the state they should."""

import csv
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch

import fuzz
from emsplat.cli import main
from emsplat.config import SimulateConfig, StateOptions, configure
from emsplat.errors import InputError
from emsplat.imaging.ctf import ctf
from emsplat.io.atoms import read_atoms, read_sites
from emsplat.io.dcd import open_dcd
from emsplat.io.mrc import read_map
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.relion.read import read_star
from emsplat.programs.simulate import simulate
from emsplat.simulation.images import clean_images, make_scene, project_atoms, project_scene, truth_map, truth_maps
from emsplat.simulation.protein import place_atoms, place_states
from emsplat.simulation.selection import select
from emsplat.simulation.states import draw_contrast, draw_states, load_states, turn_angles, turned
from emsplat.simulation.truth import read_truth
from emsplat.types import Grid, Poses


def pdb(path, sites):
    """Carbon atoms (chain, residue number, residue name, atom name, x, y, z)."""
    lines = [
        f"ATOM  {i + 1:5d}  {name:<3} {residue} {chain}{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00"
        "           C\n"
        for i, (chain, number, residue, name, x, y, z) in enumerate(sites)
    ]
    path.write_text("".join(lines) + "END\n")
    return path


def spread(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 8, (count, 3)).round(3)


@pytest.fixture
def molecule(tmp_path):
    """Chain A (residues 1 to 20), B (1 to 10), C (11 to 20); each residue an atom CA."""
    place = spread(40)
    names = [("A", i + 1, "ALA") for i in range(20)] + [("B", i + 1, "GLY") for i in range(10)]
    names += [("C", i + 11, "SER") for i in range(10)]
    return pdb(tmp_path / "m.pdb", [(*name, "CA", *xyz) for name, xyz in zip(names, place, strict=True)])


# --- selections


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("chain A", 20),
        ("chain B C", 20),
        ("resid 1-3 20", 3 + 1 + 3 + 1),
        ("chain A and resid 5-7", 3),
        ("not chain A", 20),
        ("not chain A and resid 11-12", 2),
        ("not (chain A or chain B)", 10),
        ("(chain A and resid 1-2) or chain C", 12),
        ("chain C or chain A and resid 1", 11),
        ("resname GLY", 10),
        ("name CA", 40),
        ("all", 40),
        ("resid 5:7 and chain B", 3),
    ],
)
def test_selections(molecule, text, count):
    assert int(select(read_sites(molecule), text, "--rotate").sum()) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing where a selection has to begin"),
        ("chain", "nothing behind chain"),
        ("chain Z", "selects no atom; expected some; the chains are A B C"),
        ("chain A resid 1", 'not understood from "resid 1" on'),
        ("(chain A", "a parenthesis is not closed"),
        ("chain A)", 'not understood from "\\)" on'),
        ("resid 1-x", "resid 1-x; expected numbers"),
        ("resid 9-1", "ends before it begins"),
        ("chains A", '"chains" where a selection'),
        ("chain A and", "nothing where"),
        ("(" * 5000, "a selection of 5,000 words"),
    ],
)
def test_selections_that_are_refused(molecule, text, said):
    with pytest.raises(InputError, match=said) as caught:
        select(read_sites(molecule), text, "--rotate")
    assert "\n" not in str(caught.value)


def test_negative_residue_numbers(tmp_path):
    sites = read_sites(pdb(tmp_path / "m.pdb", [("A", n, "ALA", "CA", n, 0, 0) for n in range(-3, 4)]))
    assert select(sites, "resid -2-1", "").tolist() == [False, True, True, True, True, False, False]
    assert select(sites, "resid -3--2", "").sum() == 2


# --- hinge and missing pieces


def test_a_hinge_keeps_distances_within_its_parts_and_closes(molecule):
    sites = read_sites(molecule)
    chosen = torch.from_numpy(select(sites, "chain A and resid 1-9", ""))
    states = list(turned(sites, "chain A and resid 1-9", ("10", "A:15"), turn_angles(8, 360.0)))
    start = sites.atoms.position
    torch.testing.assert_close(states[0], start, rtol=0, atol=1e-9)
    for position in states:
        assert torch.equal(position[~chosen], start[~chosen])
        torch.testing.assert_close(
            torch.cdist(position[chosen], position[chosen]), torch.cdist(start[chosen], start[chosen])
        )
        # Both atoms of the axis keep their distance to everything that turns.
        axis = start[[9, 14]]
        torch.testing.assert_close(torch.cdist(position[chosen], axis), torch.cdist(start[chosen], axis))
    # Eight equal steps: each is the last turned by 45°, and the first follows the eighth.
    step = [torch.linalg.vector_norm(a - b) for a, b in zip(states, states[1:] + states[:1], strict=True)]
    torch.testing.assert_close(torch.stack(step), step[0].expand(8))
    assert float(step[0]) > 1


def test_a_hinge_turns_by_the_right_hand(tmp_path):
    model = pdb(
        tmp_path / "m.pdb",
        [("A", 1, "ALA", "CA", 0, 0, 0), ("A", 2, "ALA", "CA", 0, 0, 5), ("A", 3, "ALA", "CA", 3, 0, 1)],
    )
    (position,) = turned(read_sites(model), "resid 3", ("1", "2"), [90.0])
    torch.testing.assert_close(position[2].tolist(), [0.0, 3.0, 1.0], atol=1e-9, rtol=0)


def test_angles():
    assert turn_angles(4, 360.0) == [0, 90, 180, 270]
    assert turn_angles(3, 90.0) == [0, 45, 90]
    assert turn_angles(3, -90.0) == [0, -45, -90]


def test_missing_pieces_are_all_combinations_or_those_named(molecule):
    states = load_states(StateOptions(missing=("chain B", "chain C and resid 11-14")), molecule)
    assert list(map(len, states.atoms)) == [40, 30, 36, 26]
    assert states.coordinates == {"missing": ("none", "1", "2", "1+2")}
    named = load_states(StateOptions(missing=("chain B", "chain C"), missing_states=("2", "none")), molecule)
    assert list(map(len, named.atoms)) == [30, 40]


def test_motion_and_composition_are_mixed(molecule):
    options = StateOptions(
        rotate="chain A and resid 1-9", about=("A:10", "A:15"), angles=3, turn=90.0, missing=("chain B",)
    )
    states = load_states(options, molecule)
    assert states.coordinates["angle"] == (0, 0, 45, 45, 90, 90)
    assert states.coordinates["missing"] == ("none", "1") * 3
    assert list(map(len, states.atoms)) == [40, 30] * 3
    assert torch.equal(states.atoms[2].position[:20], states.atoms[3].position[:20])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rotate": "chain A", "about": ("1", "15")}, None),
        ({"rotate": "chain A"}, "--rotate: needs --about"),
        ({"about": ("1", "2")}, "--about: needs --rotate"),
        ({"rotate": "chain A", "about": ("1",)}, "--about: 1 residues; expected two"),
        ({"rotate": "all", "about": ("1", "2")}, "selects every atom"),
        ({"rotate": "chain A", "about": ("1", "x")}, "--about 1 x: expected residue numbers"),
        ({"rotate": "chain A B", "about": ("1", "5")}, "chains A B have both residues; name the chain"),
        ({"rotate": "chain A", "about": ("1", "99")}, "none of the chains A has both residues"),
        ({"rotate": "chain A", "about": ("A:1", "C:99")}, "--about C:99: no such residue"),
        ({"rotate": "chain A", "about": ("3", "3")}, "both are at one place"),
        ({"rotate": "chain A", "about": ("1", "5"), "angles": 1}, "--angles 1: expected 2 to"),
        ({"rotate": "chain A", "about": ("1", "5"), "turn": 400.0}, "--turn 400: expected up to 360"),
        ({"missing": ("all",)}, "there are no atoms"),
        ({"missing": ("chain A", "chain Z")}, "selects no atom"),
        ({"missing": ("chain A",), "missing_states": ("2",)}, "numbers of blocks from 1 to 1"),
        ({"missing": ("chain A",), "missing_states": ("1", "1")}, "names a state twice"),
        ({"missing_states": ("1",)}, "--missing-states: needs --missing"),
        ({"missing": ("chain A",) * 11}, "--missing: 11 blocks"),
        ({"missing": ("chain A",), "populations": (1.0,)}, "--populations: 1 numbers for 2 states"),
        ({"missing": ("chain A",), "populations": (1.0, -1.0)}, "expected numbers above 0"),
        ({"missing": ("chain A",), "populations": (1.0, math.nan)}, "expected numbers above 0"),
        ({"populations": (1.0, 1.0)}, "--populations: expected several states"),
        ({"angles": 3, "missing": ("chain A",)}, "--angles: needs --rotate"),
        ({"turn": 90.0}, "--turn: needs --rotate"),
        ({"frames": 3}, "--frames: needs --trajectory"),
    ],
)
def test_options_that_belong_together(molecule, options, said):
    if said is None:
        assert len(load_states(StateOptions(**options), molecule)) == 100
        return
    with pytest.raises(InputError, match=said) as caught:
        load_states(StateOptions(**options), molecule)
    assert "\n" not in str(caught.value)


def test_one_source_of_states(molecule):
    for options, model, said in [
        (StateOptions(states=(molecule,), missing=("chain A",)), None, "expected one source of states"),
        (StateOptions(states=(molecule,)), molecule, "a model beside --states"),
        (StateOptions(missing=("chain A",)), None, "no model; name"),
    ]:
        with pytest.raises(InputError, match=said):
            load_states(options, model)
    assert load_states(StateOptions(), molecule) is None


def test_states_keep_their_places_to_one_another(molecule):
    whole, part = load_states(StateOptions(missing=("chain B",)), molecule).atoms
    grid = Grid(32, 3.0)
    first, second = place_states([whole, part], [0.75, 0.25], grid, keep_frame=False)
    torch.testing.assert_close(first.position[:20] - second.position[:20], torch.zeros(20, 3).double())
    # The centre of the mean: atoms of chain B count three quarters.
    weight = torch.ones(40).double()
    weight[20:30] = 0.75
    torch.testing.assert_close((weight @ first.position).tolist(), [0.0] * 3, atol=1e-9, rtol=0)
    assert torch.equal(
        place_states([whole], [1.0], grid, keep_frame=False)[0].position, place_atoms(whole, grid).position
    )


# --- trajectories


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("marker", [4, 8])
@pytest.mark.parametrize("cell", [False, True])
def test_a_trajectory_comes_back(tmp_path, order, marker, cell):
    (tmp_path / "t.dcd").write_bytes(fuzz.dcd(order, marker, cell, frames=5, atoms=7))
    trajectory = open_dcd(tmp_path / "t.dcd")
    assert (trajectory.frames, trajectory.atoms) == (5, 7)
    frames = list(trajectory.read([4, 1], np.array([0, 6])))
    assert np.array_equal(frames, [[[0, 4, 0.5], [6, 4, 0.5]], [[0, 1, 0.5], [6, 1, 0.5]]])


def with_word(content, index, value):
    """The head with another integer."""
    at = 4 + 4 + 4 * index
    return content[:at] + int(value).to_bytes(4, "little", signed=True) + content[at + 4 :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: b"", "does not begin as a DCD file"),
        (lambda c: b"ATOM  " * 100, "does not begin as a DCD file"),
        (lambda c: c.replace(b"CORD", b"VELD"), "holds velocities"),
        (lambda c: with_word(c, 8, 3), "has 3 fixed atoms"),
        (lambda c: with_word(c, 11, 1), "four dimensions"),
        (lambda c: c[:150], "ends within its head"),
        (lambda c: c[:-10], "bytes beyond 1 frames of 3 atoms"),
        (lambda c: c[:200], "no whole frame of 3 atoms"),
        (lambda c: c[:-8] + b"\0\0\xc0\x7f" + c[-4:], "frame 2 of 2 has coordinates that are not finite"),
        (
            lambda c: c[:-8] + b"\x01\0\x80\x7f" + c[-4:],
            "frame 2 of 2 has coordinates that are not finite",
        ),  # signalling
        (lambda c: c[:-4] + b"\0\0\0\1", "frame 2 of 2: no record of 12 bytes"),
    ],
)
def test_trajectories_that_are_refused(tmp_path, change, said):
    path = tmp_path / "t.dcd"
    path.write_bytes(change(fuzz.dcd("<", 4, True)))

    def read():
        trajectory = open_dcd(path)
        list(trajectory.read(list(range(trajectory.frames)), np.arange(trajectory.atoms)))

    with pytest.raises(InputError, match=said) as caught:
        read()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_x_plor_trajectories_have_no_cell(tmp_path):
    """Without CHARMM's version the other words of the head mean something else."""
    content = with_word(with_word(fuzz.dcd("<", 4, False), 19, 0), 10, 1)
    (tmp_path / "t.dcd").write_bytes(content)
    assert open_dcd(tmp_path / "t.dcd").frames == 2


def test_frames_have_the_atoms_of_the_topology(tmp_path):
    """Waters and hydrogens count in the frames and are left out of the states."""
    sites = [("A", 1, "ALA", "N", 0, 0, 0), ("A", 1, "ALA", "HA", 1, 0, 0), ("A", 2, "ALA", "CA", 2, 0, 0)]
    sites += [("W", 3, "HOH", "O", 3, 0, 0), ("A", 4, "ALA", "CB", 4, 0, 0)]
    topology = pdb(tmp_path / "top.pdb", sites)
    lines = topology.read_text().splitlines(keepends=True)
    lines[1] = lines[1][:77] + "H\n"
    lines[0] = lines[0].replace("  1.00", "  0.00")  # as simulation programs leave it
    topology.write_text("".join(lines))
    (tmp_path / "t.dcd").write_bytes(fuzz.dcd(frames=9, atoms=5))
    options = StateOptions(trajectory=tmp_path / "t.dcd", topology=topology, frames=3)
    states = load_states(options, None)
    assert states.coordinates == {"frame": (1, 5, 9)}
    assert [atoms.position.tolist() for atoms in states.atoms] == [
        [[0, frame, 0.5], [2, frame, 0.5], [4, frame, 0.5]] for frame in (0.0, 4.0, 8.0)
    ]
    assert states.atoms[0].weight.tolist() == [1, 1, 1]
    for change, said in [
        ({"frames": 10}, "--frames 10: expected 1 to 9"),
        ({"frames": 0}, "--frames 0"),
        ({"topology": None}, "--trajectory: needs --topology"),
    ]:
        with pytest.raises(InputError, match=said):
            load_states(dataclasses.replace(options, **change), None)
    (tmp_path / "t.dcd").write_bytes(fuzz.dcd(frames=9, atoms=6))
    with pytest.raises(InputError, match=r"6 atoms in each frame, but .* has 5"):
        load_states(options, None)


def test_a_real_trajectory(shared_data):
    """From closed to open, as the two structures at its ends are."""
    models = shared_data / "models"
    options = StateOptions(trajectory=models / "adk_dims2.dcd", topology=models / "adk_open.pdb")
    states = load_states(options, None)
    assert len(states) == 102
    ends = [read_atoms(models / f"adk_{name}.pdb").position for name in ("closed", "open")]

    def shape(position):
        return torch.cdist(position, position)[::9, ::9]

    differences = [
        [float((shape(states.atoms[frame].position) - shape(end)).square().mean().sqrt()) for end in ends]
        for frame in (0, 101)
    ]
    assert differences[0][0] < 1 < 4 < differences[0][1]
    assert differences[1][1] < 2 < 4 < differences[1][0]


def test_the_hinge_of_an_antibody(shared_data):
    """1HZH: of the chains of one Fab only the heavy one has both residues of the hinge."""
    model = shared_data / "models" / "1hzh.pdb.gz"
    sites, text = read_sites(model), "(chain H and resid 1-213) or chain L"
    chosen = select(sites, text, "--rotate")
    (position,) = turned(sites, text, ("213", "244"), [90.0])
    moved = torch.linalg.vector_norm(position - sites.atoms.position, dim=1).numpy()
    assert not moved[~chosen].any()
    assert np.median(moved[chosen]) > 30
    hinge = chosen & (sites.chain == "H") & (sites.residue == 213) & (sites.name == "CA")
    assert moved[hinge] == pytest.approx(0, abs=1e-9)  # it lies on the axis


# --- which particle, which state


def test_populations_and_order():
    population = torch.tensor([0.7, 0.2, 0.1]).double()
    drawn = [draw_states(population, 1003, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.bincount(drawn[0]).tolist() == [702, 201, 100]
    # Not in blocks: a micrograph of 100 has them all.
    assert all(len(part.unique()) == 3 for part in drawn[0].split(100)[:10])
    with pytest.raises(InputError, match="state 3 of 3 gets none"):
        draw_states(population, 4, torch.Generator())


def test_contrast():
    drawn = draw_contrast(0.3, 20000, torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(1, abs=0.01)
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.03)
    assert drawn.min() > 0
    assert torch.equal(draw_contrast(0.0, 5, torch.Generator()), torch.ones(5).double())


# --- the programme

GRID = Grid(32, 3.0)
CLEAN = {"box": 32, "pixel_size": 3.0, "particles": 60, "snr": math.inf, "b_factor": 100.0, "micrograph_particles": 20}
HINGE = {"rotate": "chain A and resid 1-9", "about": ("10", "15"), "angles": 3, "turn": 120.0}


def images_of(folder):
    stack = StackFile(folder / "particles.mrcs")
    out = np.empty((stack.count, stack.box, stack.box), np.float32)
    stack.read_into(out, range(stack.count), range(stack.count))
    stack.close()
    return torch.from_numpy(out)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_scene_projects_each_image_from_its_structure(molecule):
    atoms = load_states(StateOptions(missing=("chain B", "chain A")), molecule).atoms
    poses = Poses(torch.eye(3)[None].repeat(5, 1, 1), torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    which = torch.tensor([3, 0, 2, 2, 1])
    spectra = project_scene(make_scene(atoms, GRID, 50.0), poses, which)
    for i, state in enumerate(which.tolist()):
        own = project_atoms(atoms[state], poses[torch.tensor([i])], GRID, 50.0)[0]
        torch.testing.assert_close(spectra[i], own)
    maps = list(truth_maps(make_scene(atoms, GRID, 50.0, dims=3)))
    for volume, own in zip(maps, atoms, strict=True):
        torch.testing.assert_close(volume, truth_map(own, GRID, 50.0))


def test_labels_are_those_of_the_images(molecule, tmp_path):
    """A noiseless image is the projection of the map of its own state, and of no other."""
    config = configure(SimulateConfig, **CLEAN, **HINGE, missing=("chain B",), contrast_spread=0.2)
    star = simulate(config, molecule, tmp_path / "out")
    truth, table, images = read_truth(tmp_path / "out"), read_star(star), images_of(tmp_path / "out")
    assert len(truth) == 6
    labels = rows_of(tmp_path / "out" / "truth" / "labels.csv")
    assert [row["row"] for row in labels] == [str(i + 1) for i in range(60)]
    states = load_states(config.heterogeneity, molecule)
    atoms = place_states(states.atoms, states.population.tolist(), GRID, keep_frame=False)
    scene = make_scene(atoms, GRID, 100.0, dtype=torch.float64)
    every = torch.stack(
        [clean_images(scene, table.poses, table.optics, torch.full((60,), state)) for state in range(6)]
    ).double()
    flat = torch.nn.functional.normalize(every.flatten(2), dim=2)
    alike = (flat * torch.nn.functional.normalize(images.double().flatten(1), dim=1)).sum(2)
    torch.testing.assert_close(alike.gather(0, truth.state[None])[0], torch.ones(60).double(), atol=1e-5, rtol=0)
    assert torch.equal(alike.argmax(0), truth.state)
    # The grey scale is that of the maps, times the contrast.
    contrast = torch.tensor([float(row["contrast"]) for row in labels]).double()
    own = every[truth.state, torch.arange(60)]
    factor = (images * own).sum((1, 2)) / own.square().sum((1, 2)) / contrast
    gain = float(truth.read(0)[0].sum() / truth_map(atoms[0], GRID, 100.0).sum())
    torch.testing.assert_close(factor, torch.full((60,), gain).double(), rtol=1e-4, atol=0)
    # All states together have the variance that noiseless images have.
    assert float(images.var()) == pytest.approx(1, rel=1e-3)


def test_truth_has_tables_and_maps(molecule, tmp_path):
    config = configure(SimulateConfig, **CLEAN, **HINGE, populations=(2.0, 1.0, 1.0))
    simulate(config, molecule, tmp_path / "out")
    folder = tmp_path / "out" / "truth"
    assert sorted(path.name for path in folder.iterdir()) == [
        "000.mrc",
        "001.mrc",
        "002.mrc",
        "labels.csv",
        "states.csv",
    ]
    states = rows_of(folder / "states.csv")
    assert [(row["state"], row["population"], row["angle"], row["file"]) for row in states] == [
        *(("1", "0.5", "0", "000.mrc"), ("2", "0.25", "60", "001.mrc"), ("3", "0.25", "120", "002.mrc")),
    ]
    labels = rows_of(folder / "labels.csv")
    assert [sum(row["state"] == str(i + 1) for row in labels) for i in range(3)] == [30, 15, 15]
    assert {(row["state"], row["angle"]) for row in labels} == {("1", "0"), ("2", "60"), ("3", "120")}
    maps = [read_map(folder / f"{i:03d}.mrc")[0] for i in range(3)]
    mean = 0.5 * maps[0] + 0.25 * maps[1] + 0.25 * maps[2]
    torch.testing.assert_close(read_map(tmp_path / "out" / "truth.mrc")[0], mean, atol=1e-6, rtol=1e-5)
    table = read_star(tmp_path / "out" / "particles.star")
    state = torch.tensor([int(row["state"]) for row in labels])
    assert all(len(state[table.micrograph == m].unique()) == 3 for m in table.micrograph.unique())


def test_one_state_has_no_truth_folder_unless_contrast_varies(molecule, tmp_path):
    simulate(configure(SimulateConfig, **CLEAN), molecule, tmp_path / "one")
    assert not (tmp_path / "one" / "truth").exists()
    simulate(configure(SimulateConfig, **CLEAN, contrast_spread=0.2), molecule, tmp_path / "grey")
    contrast = torch.tensor([float(row["contrast"]) for row in rows_of(tmp_path / "grey" / "truth" / "labels.csv")])
    plain, grey = images_of(tmp_path / "one"), images_of(tmp_path / "grey")
    ratio = (plain * grey).sum((1, 2)) / plain.square().sum((1, 2)) / contrast
    torch.testing.assert_close(ratio, ratio[0].expand(60), rtol=1e-5, atol=0)
    assert read_truth(tmp_path / "grey").read(0)[1] == GRID


def test_no_truth_of_earlier_particles_is_left(molecule, tmp_path):
    several = configure(SimulateConfig, **CLEAN, missing=("chain A", "chain B"), overwrite=True)
    simulate(several, molecule, tmp_path / "out")
    simulate(configure(SimulateConfig, **CLEAN, missing=("chain A",), overwrite=True), molecule, tmp_path / "out")
    assert len(list((tmp_path / "out" / "truth").glob("*.mrc"))) == len(read_truth(tmp_path / "out")) == 2
    simulate(configure(SimulateConfig, **CLEAN, overwrite=True), molecule, tmp_path / "out")
    assert not list((tmp_path / "out" / "truth").iterdir())


def test_snr_is_over_all_states(molecule, tmp_path):
    options = {"missing": ("chain A", "chain B"), "contrast_spread": 0.3}
    clean = configure(SimulateConfig, **CLEAN, **options)
    noisy = dataclasses.replace(clean, snr=0.2)
    for name, config in (("clean", clean), ("noisy", noisy)):
        simulate(config, molecule, tmp_path / name)
    signal = images_of(tmp_path / "clean") * math.sqrt(0.2)
    noise = images_of(tmp_path / "noisy") - signal
    assert float(noise.var()) == pytest.approx(1, rel=0.03)
    assert float(signal.var() / noise.var()) == pytest.approx(0.2, rel=0.03)


def test_states_from_files_and_frames_on_the_command_line(molecule, tmp_path, capsys):
    shutil.copy(molecule, tmp_path / "other.pdb")
    small = ["--box", "32", "--pixel-size", "3", "--particles", "10"]
    words = ["--states", str(molecule), str(tmp_path / "other.pdb"), "--populations", "0.7", "0.3"]
    assert main(["simulate", "-o", str(tmp_path / "files"), *small, *words]) == 0
    truth = read_truth(tmp_path / "files")
    assert torch.bincount(truth.state).tolist() == [7, 3]
    assert set(truth.columns) == {"model"}
    (tmp_path / "t.dcd").write_bytes(fuzz.dcd(frames=4, atoms=40))
    words = ["--trajectory", str(tmp_path / "t.dcd"), "--topology", str(molecule)]
    assert main(["simulate", "-o", str(tmp_path / "frames"), *small, *words]) == 0
    assert set(read_truth(tmp_path / "frames").columns["frame"]) == {"1", "2", "3", "4"}
    capsys.readouterr()
    for wrong in (["--states", "none.pdb"], ["--contrast-spread", "-1"], ["--rotate", "chain A"]):
        assert main(["simulate", "-o", str(tmp_path / "no"), *small, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "no").exists()


def test_a_state_that_leaves_the_box_is_named(molecule, tmp_path):
    far = pdb(tmp_path / "far.pdb", [("A", 1, "ALA", "CA", 200, 0, 0), ("A", 2, "ALA", "CA", -200, 0, 0)])
    config = configure(SimulateConfig, **CLEAN, states=(molecule, far))
    with pytest.raises(InputError, match=r"state 2 of 2: reaches .* use --box"):
        simulate(config, None, tmp_path / "out")


def test_keep_frame_holds_for_all_states(molecule, tmp_path):
    corner = pdb(tmp_path / "a.pdb", [("A", 1, "ALA", "CA", 48, 48, 48)])
    beside = pdb(tmp_path / "b.pdb", [("A", 1, "ALA", "CA", 60, 48, 48)])
    simulate(configure(SimulateConfig, **CLEAN, states=(corner, beside), keep_frame=True), None, tmp_path / "out")
    peaks = [int(read_map(tmp_path / "out" / "truth" / f"{i:03d}.mrc")[0].argmax()) for i in range(2)]
    middle = (16 * 32 + 16) * 32 + 16
    assert peaks == [middle, middle + 4]


def test_ctf_and_noise_do_not_depend_on_the_states(molecule, tmp_path):
    """The draws of one purpose leave those of the others as they are."""
    one, several = (configure(SimulateConfig, **CLEAN, **more) for more in ({}, {"missing": ("chain B",)}))
    tables = [read_star(simulate(config, molecule, tmp_path / str(i))) for i, config in enumerate((one, several))]
    assert torch.equal(tables[0].poses.rotation, tables[1].poses.rotation)
    assert torch.equal(ctf(tables[0].optics, GRID), ctf(tables[1].optics, GRID))
    assert torch.equal(tables[0].half, tables[1].half)
