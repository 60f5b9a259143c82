"""Guinier's plot, B factors and weights on maps whose fall-off is known; EMDB's XML."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from emsplat.errors import InputError
from emsplat.maths.fourier import irfft, rfft, shell_index, shell_radius
from emsplat.measures.fsc import fsc_curve
from emsplat.measures.mask import spherical_mask
from emsplat.measures.sharpening import fsc_weight, fsc_xml, guinier, protein_amplitude, sharpen
from emsplat.simulation.images import truth_map
from emsplat.simulation.protein import place_atoms, procedural_protein
from emsplat.types import Curve, Grid

GRID = Grid(48, 1.5)
ONES = torch.ones(25, dtype=torch.float64)


def falling(b_factor):
    """A map whose amplitudes fall as exp(-B k²/4)."""
    k = shell_index(48, 3) / GRID.length
    white = rfft(torch.randn(48, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 3)
    return irfft(white / white.abs().clamp(min=1e-9) * torch.exp(-b_factor * k**2 / 4), 3)


def test_b_factor_is_found_and_undone():
    volume = falling(120.0)
    plot = guinier(volume, GRID, ONES)
    assert plot.line_b_factor == pytest.approx(-120, rel=1e-4)
    assert plot.correlation == pytest.approx(-1, abs=1e-6)
    level = guinier(sharpen(volume, GRID, plot.line_b_factor, ONES), GRID, ONES)
    # The map falls in steps, from shell to shell; what brings it back does not.
    assert level.slope == pytest.approx(0, abs=0.05)
    assert float(level.original[5] - level.original[20]) == pytest.approx(0, abs=5e-3)
    k2 = (shell_radius(GRID.size, 3) / GRID.length).square()
    inside = shell_index(GRID.size, 3) <= GRID.size // 2
    spectra = [rfft(one.float(), 3)[inside] for one in (sharpen(volume, GRID, -50.0, ONES), volume)]
    torch.testing.assert_close(spectra[0], spectra[1] * torch.exp(12.5 * k2[inside]).float(), rtol=1e-4, atol=1e-3)


def test_a_protein_is_not_made_level():
    """A map with a protein's own amplitudes and B = 120 Å² gets those 120 back, in a long range and in a short one."""
    k = shell_index(48, 3) / GRID.length
    volume = irfft(rfft(falling(120.0), 3) * protein_amplitude(k.double()).exp(), 3)
    for high in (3.0, 5.0, 7.0):
        assert guinier(volume, GRID, ONES, high=high).b_factor == pytest.approx(-120, abs=0.5)
    assert guinier(volume, GRID, ONES, high=7.0).line_b_factor < -240  # a level line amplifies what is noise there
    assert abs(guinier(volume, GRID, ONES, high=3.0).line_b_factor + 140) < 10


def test_b_factor_of_a_signal_in_noise():
    """In the mask and weighted, amplitudes are the signal's; without the mask the solvent's noise levels them."""
    grid = Grid(64, 1.5)
    truth = truth_map(place_atoms(procedural_protein(700, 0), grid), grid, 150.0)
    mask = spherical_mask(grid, 60.0, 8.0)
    noise = [torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    first, second = (truth + 0.5 * truth.std() * each for each in noise)
    weight = fsc_weight(fsc_curve(first, second, grid, mask).value)
    found = [
        guinier(volume, grid, weights, high=4.0).b_factor
        for volume, weights in (
            (truth, torch.ones(33)),
            (0.5 * (first + second) * mask, weight),
            (0.5 * (first + second), weight),
        )
    ]
    assert found[0] == pytest.approx(-150, abs=20)  # one protein is not the mean of six
    assert found[1] == pytest.approx(found[0], abs=3)
    assert found[2] > found[0] + 20


def test_weights_enter_the_plot_and_the_map():
    weight = torch.linspace(1, 0.5, 25, dtype=torch.float64)
    plot = guinier(falling(0.0), GRID, weight)
    torch.testing.assert_close(plot.weighted - plot.original, weight.log())
    assert plot.slope < -1
    weight[12:] = 0
    after = rfft(sharpen(falling(0.0), GRID, 0.0, weight), 3).abs()
    assert float(after[shell_index(48, 3) >= 12].max()) < 1e-4 * float(after.max())


def test_range_of_the_line():
    with pytest.raises(InputError, match="at least 3"):
        guinier(falling(10.0), GRID, ONES, low=10.0, high=9.5)


def test_fsc_weight():
    values = torch.tensor([1.0, 1.0, 0.5, 1 / 3, 0.0, 0.5, math.nan]).double()
    found = fsc_weight(values)
    expected = [1, 1, math.sqrt(2 / 3), math.sqrt(0.5), 0, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_xml_of_emdb():
    curve = Curve(torch.tensor([0.0, 0.0123, 0.02]).double(), torch.tensor([1.0, 0.98, math.nan]).double())
    root = ElementTree.fromstring(fsc_xml(curve, "half maps"))
    assert root.tag == "fsc"
    assert root.attrib == {"title": "half maps", "xaxis": "Resolution (A-1)", "yaxis": "Correlation Coefficient"}
    points = [(float(c.find("x").text), float(c.find("y").text)) for c in root.findall("coordinate")]
    assert points == [(0.0, 1.0), (0.0123, 0.98)]  # an undefined shell has no place in it
