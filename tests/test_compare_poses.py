"""Two sets of poses of the same particles in one frame."""

import json
import math

import mrcfile
import pytest
import torch
from gemmi import cif

from emsplat.cli import main
from emsplat.errors import InputError
from emsplat.io.particles import write_used
from emsplat.maths.geometry import random_rotations, vector_to_matrix
from emsplat.maths.groups import C1, cyclic, dihedral, octahedral
from emsplat.particles.open import open_particles
from emsplat.poses.compare import compare_poses
from emsplat.types import Poses

COUNT = 500
FLIP = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(count, seed):
    return random_rotations(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("group", [C1, cyclic(7), dihedral(2), octahedral()], ids=lambda group: group.symbol)
def test_frame_hand_and_centre_are_found(group, mirrored):
    """Poses that differ by all that two programs may differ by, and by a known error."""
    first = Poses(drawn(COUNT, 1), 5 * normal(COUNT, 2, seed=2))
    error = math.radians(2) * normal(COUNT, 3, seed=3)
    element = torch.randint(group.order, (COUNT,), generator=torch.Generator().manual_seed(4))
    frame, centre = drawn(1, 5)[0], torch.tensor([4.0, -3.0, 6.0]).double()
    if group.order > 1:  # about the main axis, or nowhere at all
        centre = centre * torch.tensor([0.0, 0.0, float(group.symbol[0] == "C")])
    rotation = vector_to_matrix(error) @ first.rotation @ group.elements[element]
    shift = first.shift - (rotation[:, :2] @ centre) + 0.5 * normal(COUNT, 2, seed=6)
    second = Poses(rotation @ frame.T, shift)
    if mirrored:
        second = Poses(FLIP @ second.rotation @ FLIP, second.shift)
    found = compare_poses(first, second, group)
    expected = torch.linalg.vector_norm(error, dim=1)
    # The frame is known to the error of a particle over the root of their number.
    assert (found.angle - expected).abs().max() < math.radians(0.5)
    assert found.shift.median() == pytest.approx(0.5 * math.sqrt(2 * math.log(2)), rel=0.15)
    assert found.mirrored is mirrored


@pytest.mark.parametrize("group", [cyclic(7), dihedral(2), octahedral()], ids=lambda group: group.symbol)
def test_a_turn_by_an_element_is_no_turn(group):
    first = Poses(drawn(COUNT, 1), torch.zeros(COUNT, 2).double())
    element = torch.randint(group.order, (COUNT,), generator=torch.Generator().manual_seed(4))
    numbers = compare_poses(first, Poses(first.rotation @ group.elements[element], first.shift), group).numbers()
    assert numbers["frame_turn"] < 1e-4
    assert numbers["p90"] < 1e-4


def test_half_of_the_poses_may_be_wrong():
    first = Poses(drawn(COUNT, 1), torch.zeros(COUNT, 2).double())
    rotation = vector_to_matrix(math.radians(1) * normal(COUNT, 3, seed=2)) @ first.rotation @ drawn(1, 3)[0]
    rotation[::2] = drawn(COUNT // 2, 4)
    numbers = compare_poses(first, Poses(rotation, first.shift), C1).numbers()
    assert numbers["within_5"] == pytest.approx(0.5, abs=0.02)
    assert numbers["p90"] > 90


def test_equal_poses_are_equal():
    first = Poses(drawn(COUNT, 1), normal(COUNT, 2, seed=2))
    numbers = compare_poses(first, first, C1).numbers()
    assert numbers["p90"] < 1e-5
    assert numbers["shift_p90"] < 1e-9
    assert numbers["frame_turn"] < 1e-5
    assert numbers["mirrored"] is False


def test_particles_are_matched_by_their_images(simulated, capsys):
    star = simulated(particles=60)
    stack = open_particles(star)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    write_used(stack.table.take(order), star.parent / "some.star", stack.table.half[order])
    assert main(["compare-poses", str(star), str(star.parent / "some.star"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["particles"] == 40
    assert found["of"] == [60, 40]
    assert found["matched_by"] == "image"
    assert found["p90"] < 1e-3
    assert main(["compare-poses", str(star), str(star.parent / "some.star"), "--symmetry", "D2"]) == 0
    assert "40 particles in both" in capsys.readouterr().out


def placed(star, rows, folder):
    """Images of some particles of a file in a stack of the same name elsewhere, with their places in a micrograph."""
    folder.mkdir()
    stack = star.parent / "particles.mrcs"
    with mrcfile.new(folder / "particles.mrcs") as file:
        file.set_data(mrcfile.read(stack)[rows])
        file.set_image_stack()
    document = cif.read_file(str(star))
    block = document.find_block("particles")
    loop = block.find_loop("_rlnImageName").get_loop()
    columns = {tag: [loop[row, column] for row in rows] for column, tag in enumerate(loop.tags)}
    block.find_loop("_rlnImageName").erase()
    columns["_rlnImageName"] = [f"{number + 1}@particles.mrcs" for number in range(len(rows))]
    columns["_rlnMicrographName"] = ["mic.mrc"] * len(rows)
    for number, axis in enumerate("XY"):
        columns[f"_rlnCoordinate{axis}"] = [str(40 + 15 * (row // 8 if number else row % 8)) for row in rows]
    block.init_loop("", list(columns)).set_all_values(list(columns.values()))
    document.write_file(str(folder / "particles.star"))
    return folder / "particles.star"


def test_stacks_of_one_name_are_not_one_stack(simulated, tmp_path, capsys):
    """Extracted again, with one particle fewer: images of one number are different ones."""
    star = simulated(particles=60)
    one, other = placed(star, list(range(60)), tmp_path / "one"), placed(star, list(range(1, 60)), tmp_path / "two")
    assert main(["compare-poses", str(one), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matched_by"] == "place in the micrograph"
    assert found["particles"] == 59
    assert found["p90"] < 1e-3
    # Where one of the stacks is not there its name has to do.
    (tmp_path / "two" / "particles.mrcs").unlink()
    other.write_text(other.read_text().replace("mic.mrc", "else.mrc"))
    assert main(["compare-poses", str(one), str(other)]) == 0
    assert "matched by names of stacks" in capsys.readouterr().out


def test_other_particles_are_refused(simulated, capsys):
    one, other = simulated(particles=60), simulated(particles=40)
    text = other.read_text().replace("particles.mrcs", "other.mrcs")
    (other.parent / "particles.mrcs").rename(other.parent / "other.mrcs")
    other.write_text(text)
    assert main(["compare-poses", str(one), str(other)]) == InputError("").exit_code
    assert "fewer than two have the same image" in capsys.readouterr().err
