"""Curves by name, there and back through STAR files, and the resolutions that are read from them."""

import math

import numpy as np
import pytest
import torch
from gemmi import cif

from emsplat.errors import InputError
from emsplat.measures.curves import Curves, Line, crossing, ends_undefined, last_crossing, never_falls, resolution
from emsplat.run.fsc_star import _COLUMNS, read_fsc_star, write_fsc_star
from emsplat.types import Curve

SHELLS = 9
FREQUENCY = np.arange(SHELLS) / 64.0  # six digits hold them


def made():
    """Every curve that has a name, in steps that six digits hold, undefined at its end; and one that has none."""
    values = {name: np.round(1 - 0.1 * np.arange(SHELLS) - 0.01 * i, 6) for i, name in enumerate(_COLUMNS)}
    for value in values.values():
        value[-1] = math.nan
    return Curves(FREQUENCY, values | {"somebodysOwn": np.full(SHELLS, 0.25)})


def test_there_and_back(tmp_path):
    curves = made()
    write_fsc_star(tmp_path / "fsc.star", {"resolution": 12.5, "resolution_rule": "RELION", "own": None}, curves)
    again = read_fsc_star(tmp_path / "fsc.star")
    np.testing.assert_array_equal(again.frequency, FREQUENCY)
    assert list(again.values) == list(curves.values)
    for name, value in curves.values.items():
        np.testing.assert_array_equal(again[name].value, value, err_msg=name)
    general = cif.read(str(tmp_path / "fsc.star")).find_block("general")
    found = [general.find_value(f"_{name}") for name in ("rlnFinalResolution", "emsplatResolutionRule", "own")]
    assert found == ["12.5", "RELION", "?"]


def test_columns_of_relion(tmp_path):
    """Names, and spacings of which the first is 999 Å, as relion_postprocess writes them."""
    write_fsc_star(tmp_path / "fsc.star", {}, made())
    block = cif.read(str(tmp_path / "fsc.star")).find_block("fsc")
    spacing = [float(text) for text in block.find_loop("_rlnAngstromResolution")]
    assert spacing[:3] == [999, 64, 32]
    assert [int(text) for text in block.find_loop("_rlnSpectralIndex")] == list(range(SHELLS))
    (tmp_path / "relion.star").write_text(
        "# version 30001\n\ndata_general\n\n_rlnFinalResolution 7.5\n\n\ndata_fsc\n\nloop_\n_rlnSpectralIndex #1\n"
        "_rlnResolution #2\n_rlnAngstromResolution #3\n_rlnFourierShellCorrelationUnmaskedMaps #4\n"
        "0 0.0 999.0 1.0\n1 0.015625 64.0 0.5\n\n\ndata_guinier\n\nloop_\n_rlnResolutionSquared #1\n0.1\n"
    )
    curves = read_fsc_star(tmp_path / "relion.star")
    assert list(curves.values) == ["unmasked"]
    assert curves["unmasked"].value.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(("block", "column"), [("other", "rlnResolution"), ("fsc", "rlnSpectralIndex")])
def test_files_without_curves_are_refused(tmp_path, block, column):
    (tmp_path / "fsc.star").write_text(f"data_{block}\nloop_\n_{column}\n0.1\n")
    with pytest.raises(InputError, match=r"fsc.star: no FSC curve; expected data_fsc with rlnResolution"):
        read_fsc_star(tmp_path / "fsc.star")


def test_tensors_and_arrays_are_read_alike():
    """And as the definitions say, of random values with one that is undefined."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        value = rng.random(SHELLS)
        value[5] = math.nan
        line, curve = Line(FREQUENCY, value), Curve(torch.from_numpy(FREQUENCY), torch.from_numpy(value))
        for read in (resolution, crossing, last_crossing, never_falls, ends_undefined):
            assert read(line, 0.2) == read(curve, 0.2), read
        fallen = next(shell for shell in range(1, SHELLS) if not value[shell] >= 0.2)
        assert resolution(line, 0.2) == (64 / (fallen - 1) if fallen > 1 else None)
        assert last_crossing(line, 0.2) == 64 / max(shell for shell in range(1, SHELLS) if value[shell] >= 0.2)
