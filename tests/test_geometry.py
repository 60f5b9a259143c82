"""Orientations and point groups in RELION's conventions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emsplat.errors import InputError
from emsplat.maths.geometry import (
    axis_rotation,
    euler_to_matrix,
    matrix_to_euler,
    matrix_to_quaternion,
    principal_axes,
    quaternion_to_matrix,
    random_rotations,
)
from emsplat.maths.groups import parse_symmetry

ANGLE = st.floats(-360, 360)


def test_euler_test_vector():
    angles = torch.deg2rad(torch.tensor([30.0, 50, 70], dtype=torch.float64))
    expected = [[-0.279454, 0.923721, -0.262003], [-0.694109, -0.005813, 0.719846], [0.663414, 0.383022, 0.642788]]
    torch.testing.assert_close(euler_to_matrix(angles), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@given(rot=ANGLE, tilt=st.sampled_from([0.0, 180.0, 1e-3]) | ANGLE, psi=ANGLE)
def test_euler_angles_of_a_matrix_give_the_matrix_again(rot, tilt, psi):
    matrix = euler_to_matrix(torch.deg2rad(torch.tensor([rot, tilt, psi], dtype=torch.float64)))
    torch.testing.assert_close(euler_to_matrix(matrix_to_euler(matrix)), matrix, atol=3e-6, rtol=0)


def test_third_row_is_the_viewing_direction():
    angles = torch.deg2rad(torch.tensor([[30.0, 50, 70], [-100, 20, 3]], dtype=torch.float64))
    rot, tilt, _ = angles.unbind(1)
    direction = torch.stack([tilt.sin() * rot.cos(), tilt.sin() * rot.sin(), tilt.cos()], 1)
    torch.testing.assert_close(euler_to_matrix(angles)[:, 2], direction)


def test_quaternions_give_proper_rotations_and_their_axis():
    rng = torch.Generator().manual_seed(0)
    matrices = quaternion_to_matrix(3 * torch.randn(50, 4, generator=rng, dtype=torch.float64))
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).double().expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(50).double())
    half = 0.35
    turn = quaternion_to_matrix(torch.tensor([math.cos(half), 0, 0, math.sin(half)], dtype=torch.float64))
    torch.testing.assert_close(turn, torch.from_numpy(axis_rotation([0, 0, 1], 2 * half)))


def test_random_rotations_are_uniform():
    rows = random_rotations(20_000, torch.Generator().manual_seed(0))[:, 2]
    assert rows.mean(0).abs().max() < 0.02
    torch.testing.assert_close(rows.T @ rows / 20_000, torch.eye(3).double() / 3, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("symbol", "order"),
    [("C1", 1), ("c4", 4), ("C17", 17), ("D2", 4), ("D7", 14), ("T", 12), ("O", 24)]
    + [(symbol, 60) for symbol in ("I", "I1", "I2", "I3", "I4")],
)
def test_groups_are_closed_and_of_the_right_order(symbol, order):
    symmetry = parse_symmetry(symbol)
    group = symmetry.elements
    assert (symmetry.symbol, symmetry.order, len(group)) == (symbol.upper(), order, order)
    torch.testing.assert_close(group[0], torch.eye(3).double())
    products = (group[:, None] @ group[None]).reshape(-1, 1, 3, 3)
    assert (products - group).abs().amax((2, 3)).min(1).values.max() < 1e-5


@pytest.mark.parametrize("symbol", ["C1", "C3", "C4", "D2", "D6", "T", "O", "I1", "I2", "I3", "I4"])
def test_turns_of_the_grid_and_their_cosets_make_up_the_group(symbol):
    group = parse_symmetry(symbol)
    turns, others = group.about_grid
    assert len(turns) * len(others) == group.order
    assert torch.equal(turns.abs().sum(1), torch.ones(len(turns), 3).long())  # signed permutations
    assert torch.equal(turns[0], torch.eye(3).long())
    products = (others[:, None] @ turns.double()).reshape(-1, 1, 3, 3)
    assert (products - group.elements).abs().amax((2, 3)).min(0).values.max() < 1e-5


# Axes of RELION's settings: order, x, y, z.
AXES = {
    "C4": [(4, 0, 0, 1)],
    "D3": [(3, 0, 0, 1), (2, 1, 0, 0)],
    "T": [(3, 0, 0, 1), (2, 0, 0.816497, 0.577350)],
    "O": [(4, 0, 0, 1), (3, 1, 1, 1)],
    "I1": [(2, 1, 0, 0), (5, 0.8506508, 0, -0.5257311), (3, 0.9341724, 0.3568221, 0)],
    "I2": [(2, 0, 0, 1), (2, 0, 1, 0), (5, 0.5257311, 0, 0.8506508), (3, 0, 0.3568221, 0.9341724)],
    "I": [(2, 0, 0, 1), (5, 0.5257311, 0, 0.8506508)],
    "I3": [(5, 0, 0, 1), (2, -0.5257311, 0, 0.8506508)],
    "I4": [(5, 0, 0, 1), (2, 0.5257311, 0, 0.8506508)],
}


@pytest.mark.parametrize("symbol", AXES)
def test_axes_lie_where_relion_puts_them(symbol):
    group = parse_symmetry(symbol).elements
    for order, *axis in AXES[symbol]:
        turn = torch.from_numpy(axis_rotation(axis, 2 * math.pi / order))
        assert (group - turn).abs().amax((1, 2)).min() < 1e-4


@pytest.mark.parametrize("symbol", ["", "C0", "D", "I5", "C1.5", "Q2", "tetrahedral"])
def test_unknown_groups_are_refused(symbol):
    with pytest.raises(InputError, match=r"--symmetry .*expected Cn, Dn"):
        parse_symmetry(symbol)


def test_quaternion_of_a_matrix_gives_the_matrix_again():
    matrix = random_rotations(50, torch.Generator().manual_seed(2))
    torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(matrix)), matrix)


def test_principal_axes_give_the_covariance_again():
    """Also for round, flat and needle-like Gaussians, and never as a mirror image."""
    rotation = random_rotations(40, torch.Generator().manual_seed(3))
    scale = torch.tensor([[1.0, 1, 1], [5, 5, 0.1], [0.1, 0.1, 9], [3, 2, 1]], dtype=torch.float64).repeat(10, 1)
    covariance = rotation @ torch.diag_embed(scale**2) @ rotation.mT
    found, quaternion = principal_axes(covariance)
    torch.testing.assert_close(found.sort(1).values, scale.sort(1).values)
    axes = quaternion_to_matrix(quaternion)
    torch.testing.assert_close(torch.linalg.det(axes), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(axes @ torch.diag_embed(found**2) @ axes.mT, covariance)
