"""The CTF against RELION's values (docs/conventions.md, 7)."""

import math

import pytest
import torch

from emsplat.imaging.ctf import ctf, ctf_at, electron_wavelength
from emsplat.maths.fourier import frequencies
from emsplat.types import Grid, Optics


def optics(**change):
    values = {
        "voltage": 300.0,
        "cs": 2.7,
        "amplitude_contrast": 0.1,
        "defocus_u": 15000.0,
        "defocus_v": 14000.0,
        "defocus_angle": math.radians(35),
        "phase_shift": 0.0,
        "b_factor": 0.0,
        "scale": 1.0,
    }
    return Optics(*(torch.tensor([v], dtype=torch.float64) for v in (values | change).values()))


def at(k, **change):
    return float(ctf_at(optics(**change), *(torch.tensor(v, dtype=torch.float64) for v in k)))


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        ((0, 0), 0.1),
        ((0.05, 0), 0.699663),
        ((0, 0.05), 0.736452),
        ((0.1, 0.05), -0.805456),
        ((-0.1, 0.05), -0.998588),
        ((0.1, -0.2), -0.970996),
    ],
)
def test_vectors(k, expected):
    assert at(k) == pytest.approx(expected, abs=1e-6)


def test_vectors_of_phase_plate_b_factor_and_scale():
    assert at((0.05, 0), phase_shift=math.pi / 2) == pytest.approx(-0.714473, abs=1e-6)
    assert at((0.1, 0.05), b_factor=100.0) == pytest.approx(-0.589284, abs=1e-6)
    assert at((0.1, 0.05), scale=0.5) == pytest.approx(-0.805456 / 2, abs=1e-6)


@pytest.mark.parametrize(("voltage", "wavelength"), [(300, 0.01968762), (200, 0.02507949), (100, 0.03701458)])
def test_wavelength(voltage, wavelength):
    assert float(electron_wavelength(torch.tensor([voltage]).double())) == pytest.approx(wavelength, abs=1e-8)


def test_on_the_grid_it_is_the_formula_particle_by_particle():
    grid = Grid(12, 1.7)
    many = Optics(
        **{
            name: None if value is None else torch.cat([value, getattr(optics(cs=1.4), name)])
            for name, value in vars(optics()).items()
        }
    )
    values = ctf(many, grid)
    ky, kx = frequencies(grid, dtype=torch.float64)
    assert values.shape == (2, 12, 7)
    for y, x in ((0, 0), (3, 2), (-2, 5)):
        assert float(values[0, y, x]) == pytest.approx(at((float(kx[0, x]), float(ky[y, 0]))))
        assert float(values[1, y, x]) == pytest.approx(at((float(kx[0, x]), float(ky[y, 0])), cs=1.4))


def test_at_zero_frequency_it_is_the_amplitude_contrast():
    for contrast in (0.0, 0.07, 0.3):
        assert at((0, 0), amplitude_contrast=contrast, defocus_u=3e4, b_factor=80.0) == pytest.approx(contrast)


def test_defocus_u_acts_along_its_angle_from_x_towards_y():
    for degrees in (0, 35, 90, 145):
        angle = math.radians(degrees)
        along = (0.06 * math.cos(angle), 0.06 * math.sin(angle))
        across = (-0.06 * math.sin(angle), 0.06 * math.cos(angle))
        for k, defocus in ((along, 16000.0), (across, 12000.0)):
            astigmatic = at(k, defocus_u=16000.0, defocus_v=12000.0, defocus_angle=angle)
            assert astigmatic == pytest.approx(at(k, defocus_u=defocus, defocus_v=defocus))


def test_single_precision_is_good_enough():
    grid = Grid(128, 1.0)
    double = ctf(optics(defocus_u=25000.0), grid)
    torch.testing.assert_close(
        ctf(optics(defocus_u=25000.0).to(torch.float32), grid).double(), double, atol=1e-3, rtol=0
    )
