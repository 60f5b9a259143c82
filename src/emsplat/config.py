"""Every knob of a run: frozen dataclasses whose field docstrings are the help texts of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SimulateConfig:
    """Settings of `emsplat simulate`."""

    box: int = 96
    """Box size of the images in pixels (even)."""

    pixel_size: float = 1.5
    """Pixel size in Å."""

    particles: int = 5000
    """Number of images."""

    snr: float = 0.05
    """Variance of the CTF-modulated noise-free images over all their pixels, divided by the variance of the
    noise; inf for images without noise."""

    noise: Literal["white", "coloured"] = "white"
    """Spectrum of the noise: flat, or with power that falls smoothly by a factor of 14 from k = 0 to Nyquist."""

    shift: float = 3.0
    """Standard deviation of the in-plane shifts along x and along y, in Å."""

    defocus_min: float = 8000.0
    """Smallest defocus of a micrograph, in Å of underfocus."""

    defocus_max: float = 22000.0
    """Largest defocus of a micrograph, in Å of underfocus."""

    defocus_spread: float = 100.0
    """Standard deviation of a particle's defocus about that of its micrograph, in Å."""

    astigmatism: float = 400.0
    """Largest difference of a micrograph's two defoci, in Å; drawn uniformly from 0 up."""

    voltage: float = 300.0
    """Acceleration voltage in kV."""

    cs: float = 2.7
    """Spherical aberration in mm."""

    amplitude_contrast: float = 0.1
    """Fraction of amplitude contrast."""

    phase_shift: float = 0.0
    """Phase shift of a phase plate in degrees."""

    micrograph_particles: int = 100
    """Particles per micrograph; they share a defocus and an astigmatism."""

    b_factor: float = 60.0
    """Overall B factor in Å²: amplitudes fall as exp(-B k²/4). B factors in the model file are not used."""

    atoms: int = 4000
    """Approximate number of atoms of the procedural protein, where no model is given."""

    model_seed: int = 0
    """Seed of the procedural protein."""

    keep_frame: bool = False
    """Take the model to be fitted into a map of this box and pixel size with MRC origin 0, instead of moving
    its centre of mass to the centre of the box."""

    pose_error: float = 0.0
    """Root-mean-square angle in degrees between the true orientations and those written to the STAR file."""

    noise_only: bool = False
    """Write images of noise alone, with the metadata and the noise that a real run would have."""

    half_sets: bool = True
    """Divide the particles at random into two half-sets of equal size (rlnRandomSubset)."""

    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the images."""

    seed: int = 0
    """Seed of orientations, shifts, optics, noise and half-sets."""

    overwrite: bool = False
    """Write into an output folder that is not empty."""
