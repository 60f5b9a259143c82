"""Every knob of a run: frozen dataclasses whose field docstrings are the help texts of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
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


@dataclass(frozen=True)
class ChoiceConfig:
    """Which particles, and in which hand."""

    symmetry: str = "C1"
    """Point group in RELION's setting: C1, C4, D2, T, O, I (= I2), I1, I2, I3, I4."""

    datadir: Path | None = None
    """Folder that the image paths start from, where they do not from that of the particle file or a parent of it; the
    last parts of a path suffice below it."""

    poses: Path | None = None
    """cryoDRGN's poses.pkl, for an image stack (.mrcs or a .txt that lists stacks)."""

    ctf: Path | None = None
    """cryoDRGN's ctf.pkl, for an image stack."""

    passthrough: tuple[Path, ...] = ()
    """cryoSPARC's *_passthrough_particles.cs of the same job, for fields that a .cs file lacks; default: those beside
    it."""

    merge: tuple[Path, ...] = ()
    """Further particle files, STAR or .cs, whose particles are added. They may differ in optics, box and pixel size."""

    subset: Path | None = None
    """Only these particles: a .star or .cs file that names them, or row numbers counted from 0 (.txt with one per line,
    .npy, or cryoDRGN's .pkl)."""

    particle_class: int | None = field(default=None, metadata={"name": "class"})
    """Only particles of this class (rlnClassNumber, alignments3D/class)."""

    unique: bool = False
    """Only the first row of each image (among those that --subset and --class leave): copies, and the further poses of
    a symmetry-expanded set, are left out. So are further images of a particle, by uid or rlnImageOriginalName, under
    the same pose."""

    first: int | None = None
    """Only the first so many particles (of those that the options above leave)."""

    flip_hand: bool = False
    """Reconstruct the mirror image. The images do not tell which hand is right."""


@dataclass(frozen=True)
class ImagesConfig(ChoiceConfig):
    """How their images are read."""

    box: int | None = None
    """Bring the images to so many pixels while they are read: the whole image on fewer pixels, or with --pixel-size the
    middle of it."""

    pixel_size: float | None = None
    """Bring the images to about this pixel size in Å while they are read; it becomes the one nearest to it for which
    the image is an even number of pixels wide."""

    diameter: float | None = None
    """Diameter of the particle in Å: outside it is background, for normalisation, noise and the mask of the FSC.
    Default: 0.9 of the box."""

    invert: bool = False
    """Invert the contrast. A STAR file means bright protein, a .cs file says which; use this where that is wrong."""

    trust_star_pixel_size: bool = False
    """Go by the STAR file where the headers of the stacks give another pixel size."""


@dataclass(frozen=True)
class SourceConfig(ImagesConfig):
    """Particles in two half-sets."""

    redraw_halves: bool = False
    """Draw new half-sets, whatever the files say; micrographs and copies of an image stay together."""

    seed: int = 0
    """Seed of half-sets (where the file has none, or with --redraw-halves), start and order of the images."""


@dataclass(frozen=True)
class ConvertConfig(ChoiceConfig):
    """Settings of a conversion."""

    box: int | None = None
    """Box of the map that an atomic model lies in, in pixels; files of particles or Gaussians say theirs."""

    pixel_size: float | None = None
    """Pixel size of that map in Å."""

    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class PreprocessConfig(ImagesConfig):
    """Settings of a new particle stack."""

    normalise: bool = True
    """Bring the background to mean 0 and standard deviation 1."""

    recentre: bool = True
    """Move images by whole pixels so that what is left of the origins is below one."""

    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the images."""

    threads: int | None = None
    """Threads of the computation; default: as many as cores were granted (affinity, CPU quota, batch system,
    OMP_NUM_THREADS)."""

    overwrite: bool = False
    """Write into an output folder that is not empty."""


@dataclass(frozen=True)
class InputConfig(SourceConfig):
    """How particles are read, and where results go: common to everything that starts from particles."""

    mask: Path | None = None
    """MRC map with values from 0 to 1 for the FSC; default: made from the classical map."""

    mask_diameter: float | None = None
    """Diameter in Å of a spherical mask for the FSC, in place of one along the density."""

    skip_bad: bool = False
    """Read all images first and leave out those that are constant or hold values that are not finite."""

    add_statistics: tuple[Path, ...] = ()
    """Run folders with sums that --keep-statistics left there, of other particles in the same frame: they are added
    half to half."""

    keep_statistics: bool = False
    """Keep the sums over the particles in the run folder, for --add-statistics and for fits without the images."""

    naming: Literal["relion", "cryosparc", "cryodrgn"] = "relion"
    """Results have RELION's names; with another program here they and the particles stand under its names as well, in a
    folder of the run."""

    threads: int | None = None
    """Threads of the computation; default: as many as cores were granted (affinity, CPU quota, batch system,
    OMP_NUM_THREADS)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: on a GPU (cuda) or on the CPU; auto takes the GPU if there is one that can be used."""

    checkpoint_every: float = 60.0
    """Seconds between checkpoints."""

    overwrite: bool = False
    """Remove the results of an earlier run from the output folder first."""

    resume: bool = False
    """Go on with the interrupted run in the output folder; a finished one is left as it is."""

    force: bool = False
    """Exit with 0 also where the particles do not have the symmetry that is asked for."""


@dataclass(frozen=True)
class CheckConfig(SourceConfig):
    """Settings of a check of the input."""

    metadata_only: bool = False
    """Leave the images alone: the metadata can be checked without them."""


@dataclass(frozen=True)
class AssessConfig:
    """Settings of an assessment of a run folder."""

    mask: Path | None = None
    """MRC map with values from 0 to 1; default: the mask of the run. It becomes the mask of the run."""

    mask_diameter: float | None = None
    """Diameter in Å of a spherical mask for the FSC, in place of the mask of the run."""

    reference: Path | None = None
    """What the full map is compared with as well: an MRC map on the same grid, or an atomic model (.cif, .pdb, also
    packed with gzip) or Gaussians that lie in it."""

    window: float | None = None
    """Width of the moving window of the local resolution in Å; default: 25, or five times the resolution of the
    back-projections where that is more."""

    threads: int | None = None
    """Threads of the computation; default: as many as cores were granted (affinity, CPU quota, batch system,
    OMP_NUM_THREADS)."""


@dataclass(frozen=True)
class PostprocessConfig:
    """Settings of sharpening."""

    mask: Path | None = None
    """MRC map with values from 0 to 1; default: the mask of the run."""

    b_factor: float | None = None
    """B factor in Å²; negative sharpens. Default: that of the signal in the back-projections (docs/resolution.md)."""

    b_factor_from: float = 10.0
    """Spacing in Å where the line of Guinier's plot begins; it ends at the resolution."""

    threads: int | None = None
    """Threads of the computation; default: as many as cores were granted (affinity, CPU quota, batch system,
    OMP_NUM_THREADS)."""


@dataclass(frozen=True)
class ReconstructConfig(InputConfig):
    """Settings of a reconstruction; numbers that are not given follow from the recipe."""

    engine: Literal["one-pass", "images"] | None = None
    """Fit to sums accumulated in one pass over the images (the default), or image by image."""

    recipe: Literal["default", "cryosplat", "gem"] = "default"
    """Settings that belong together: emsplat's own, or those of one of the two papers (engine: images)."""

    gaussians: int | None = None
    """Number of Gaussians at the start. Given with the one-pass engine, it stays the number unless --growth is
    given too."""

    growth: int | None = None
    """One-pass: how often the number of Gaussians may grow by half, each time unless the cross-validated FSC
    loses by it, beyond its error."""

    independent_halves: bool = False
    """One-pass: let no number pass between the half-sets; the course of the fits is fixed beforehand."""

    init: str | None = None
    """Where the Gaussians start: map (the classical map of the same images), ball, uniform (in the box), or a file:
    Gaussians (.ply, .cif, .pdb), an atomic model (.cif, .pdb) fitted into a map of this box with MRC origin 0, or a map
    (.mrc) of any box and pixel size, which is low-passed at 20 Å. Both half-sets start from it, unless half1 in its
    name tells where the other half's is."""

    epochs: int | None = None
    """Images: how often every image is presented. One-pass: so many times ten steps where the number of Gaussians
    stays; two thirds of it before the number grows, and half of it after each growth."""

    batch: int | Literal["auto"] | None = None
    """Images: images per optimisation step; auto: those of the recipe, or on a GPU as many of them as fit its
    memory."""

    learning_rate: float | None = None
    """Learning rate of Adam, one for all parameters."""

    decay: float | None = None
    """Factor on the learning rate after each epoch."""

    weighting: Literal["none", "noise", "ramp"] | None = None
    """Images: weights of the squared error in Fourier space: none, 1/noise power, or |k|/noise power."""

    min_scale: float | None = None
    """Smallest standard deviation of a Gaussian, in pixels."""

    split_after: tuple[int, ...] = ()
    """Images: after these epochs the number of Gaussians doubles, e.g. --split-after 2 4."""

    isotropic: bool = False
    """Round Gaussians (one scale each)."""

    rotation: bool = True
    """Let the Gaussians' axes turn."""


@dataclass(frozen=True)
class NullTestConfig(ReconstructConfig):
    """Settings of null tests: those of a reconstruction, and what is done to the particles."""

    particles: int = 3000
    """How many particles each test takes, evenly from both half-sets."""

    randomise_from: float | None = None
    """Spacing in Å from which on the phases of the images are random in that test; default: twice the resolution of
    the unaltered particles."""


@dataclass(frozen=True)
class Recipe:
    """Defaults of a reconstruction that belong together; None where an option does not apply."""

    engine: Literal["one-pass", "images"]
    gaussians: int | None  # None: from the volume of the particle, see reconstruct.gaussian_count
    init: Literal["map", "ball", "uniform"]
    epochs: int
    batch: int | None
    learning_rate: float
    decay: float
    weighting: Literal["none", "noise", "ramp"] | None
    min_scale: float  # pixels
    length_unit: float | None  # pixels that one unit of means and scales stands for; None: the box
    growth: int | None = None


RECIPES = {
    "default": Recipe("one-pass", None, "map", 12, None, 2e-2, 0.75, None, 0.7, 10.0, 2),
    "images": Recipe("images", None, "map", 12, 128, 4e-2, 0.75, "ramp", 0.5, 10.0),
    # cryoSplat, section 4.1. The paper has no lower bound on the scale; 0.1 px keeps float32 away from zero.
    "cryosplat": Recipe("images", 30_000, "ball", 5, 1, 1e-3, 0.1, "none", 0.1, None),
    # GEM gives its number of Gaussians, start and batch size; rate and decay are cryoSplat's.
    "gem": Recipe("images", 50_000, "uniform", 5, 1, 1e-3, 0.1, "none", 0.1, None),
}
