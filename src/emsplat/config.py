"""Every option of every command: frozen dataclasses, whose field docstrings are the help texts of the command line.

A command's options are composed of groups; a group is a panel of the help and what a function takes that needs no more.
On the command line and in config.toml options stand under their own names, whatever group they are in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from emsplat.errors import InputError

if TYPE_CHECKING:
    from emsplat.maths.groups import Symmetry

T = TypeVar("T")


@dataclass(frozen=True)
class Name:
    """What an option is called where Python has taken its name."""

    text: str


# What a value is, for the help.
File = Annotated[Path, "FILE"]
Folder = Annotated[Path, "FOLDER"]
MapFile = Annotated[Path, "MAP"]
Angstrom = Annotated[float, "Å"]
Degrees = Annotated[float, "DEGREES"]
Pixels = Annotated[int, "PIXELS"]


# Groups


@dataclass(frozen=True)
class ChoiceOptions:
    """Which particles, and in which hand."""

    symmetry: Annotated[str, "GROUP"] = "C1"
    """Point group in RELION's setting: C1, C4, D2, T, O, I (= I2), I1, I2, I3, I4."""

    datadir: Folder | None = None
    """Folder that the image paths start from, where they do not from that of the particle file or a parent of it; the
    last parts of a path suffice below it."""

    poses: File | None = None
    """cryoDRGN's poses.pkl, for an image stack (.mrcs or a .txt that lists stacks)."""

    ctf: File | None = None
    """cryoDRGN's ctf.pkl, for an image stack."""

    passthrough: tuple[File, ...] = ()
    """cryoSPARC's *_passthrough_particles.cs of the same job, for fields that a .cs file lacks; without it those beside
    the file."""

    merge: tuple[File, ...] = ()
    """Further particle files, STAR or .cs, whose particles are added. They may differ in optics, box and pixel size."""

    subset: File | None = None
    """Only these particles: a .star or .cs file that names them, row numbers counted from 0 (.txt with one per line,
    .npy, or cryoDRGN's .pkl), or a table with a column row, which counts from 1 (latents.csv, rows.txt of the
    explorer)."""

    particle_class: Annotated[int | None, Name("class")] = None
    """Only particles of this class (rlnClassNumber, alignments3D/class)."""

    unique: bool = False
    """Only the first row of each image (among those that --subset and --class leave): copies, and the further poses of
    a symmetry-expanded set, are left out. So are further images of a particle, by uid or rlnImageOriginalName, under
    the same pose."""

    first: int | None = None
    """Only the first so many particles (of those that the options above leave)."""

    part: Annotated[str | None, "N/M"] = None
    """Only the N-th of M parts of the particles (of those that the options above leave), all images of a particle in
    one; their sums can be made apart and added (--keep-statistics, --add-statistics)."""

    flip_hand: bool = False
    """Reconstruct the mirror image. The images do not tell which hand is right."""

    @cached_property
    def point_group(self) -> Symmetry:
        """What ``symmetry`` means.

        Raises:
            InputError: it is no point group.
        """
        from emsplat.maths.groups import parse_symmetry  # loads torch

        return parse_symmetry(self.symmetry)


@dataclass(frozen=True)
class ImageOptions:
    """How their images are read."""

    box: Pixels | None = None
    """Bring the images to so many pixels while they are read: the whole image on fewer pixels, or with --pixel-size the
    middle of it."""

    pixel_size: Angstrom | None = None
    """Bring the images to about this pixel size in Å while they are read; it becomes the one nearest to it for which
    the image is an even number of pixels wide."""

    diameter: Angstrom | None = None
    """Diameter of the particle in Å: outside it is background, for normalisation, noise and the mask of the FSC.
    Without it 0.9 of the box."""

    invert: bool = False
    """Invert the contrast. A STAR file means bright protein, a .cs file says which; use this where that is wrong."""

    trust_star_pixel_size: bool = False
    """Go by the STAR file where the headers of the stacks give another pixel size."""


@dataclass(frozen=True)
class HalfSetOptions:
    """Half-sets and chance."""

    redraw_halves: bool = False
    """Draw new half-sets, whatever the files say; micrographs and copies of an image stay together."""

    seed: int = 0
    """Seed of half-sets (where the file has none, or with --redraw-halves), start and order of the images."""


@dataclass(frozen=True)
class MaskOptions:
    """Mask of the FSC."""

    mask: MapFile | None = None
    """MRC map with values from 0 to 1. Without it one is made from the classical map; a run that is assessed again
    keeps its own, or gets this one for good."""

    mask_diameter: Angstrom | None = None
    """Diameter in Å of a spherical mask, in place of one along the density."""


@dataclass(frozen=True)
class ModelOptions:
    """What is fitted."""

    gaussians: int | None = None
    """Number of Gaussians at the start; without it from the volume of the particle. Given with the one-pass engine, it
    stays the number unless --growth is given too."""

    growth: Annotated[int, "TIMES"] | None = None
    """One-pass: how often the number of Gaussians may grow by half, each time unless the cross-validated FSC loses by
    it, beyond its error."""

    init: Annotated[str, "map|ball|uniform|FILE"] | None = None
    """Where the Gaussians start: map (the classical map of the same images), ball, uniform (in the box), or a file:
    Gaussians (.ply, .cif, .pdb), an atomic model (.cif, .pdb) fitted into a map of this box with MRC origin 0, or a map
    (.mrc) of any box and pixel size, which is low-passed at 20 Å. Both half-sets start from it, unless half1 in its
    name tells where the other half's is."""

    min_scale: Annotated[float, "PIXELS"] | None = None
    """Smallest standard deviation of a Gaussian, in pixels."""

    isotropic: bool = False
    """Round Gaussians (one scale each)."""

    rotation: bool = True
    """Let the Gaussians' axes turn."""


@dataclass(frozen=True)
class FitOptions:
    """How it is fitted; what is not given follows from the recipe."""

    recipe: Literal["default", "cryosplat", "gem"] = "default"
    """Settings that belong together: emsplat's own, or those of one of the two papers (engine: images)."""

    engine: Literal["one-pass", "images"] | None = None
    """Fit to sums accumulated in one pass over the images (that of the default recipe), or image by image."""

    independent_halves: bool = False
    """One-pass: let no number pass between the half-sets; the course of the fits is fixed beforehand."""

    residual: bool | None = None
    """One-pass: add to the maps what the Gaussians leave and both half-sets agree on, unless the cross-validated FSC
    loses by it (the default, but for independent halves)."""

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

    split_after: tuple[Annotated[int, "EPOCH"], ...] = ()
    """Images: after these epochs the number of Gaussians doubles, e.g. --split-after 2 4."""


@dataclass(frozen=True)
class RunOptions:
    """The run."""

    threads: int | None = None
    """Threads of the computation; without it as many as cores were granted (affinity, CPU quota, batch system,
    OMP_NUM_THREADS)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: on a GPU (cuda) or on the CPU; auto takes the GPU if there is one that can be used."""

    resume: bool = False
    """Go on with the interrupted run in the output folder; a finished one is left as it is."""

    overwrite: bool = False
    """Remove the results of an earlier run from the output folder first."""

    checkpoint_every: Annotated[float, "SECONDS"] = 60.0
    """Seconds between checkpoints."""

    time_limit: Annotated[str | None, "D-HH:MM:SS"] = None
    """Stop in order after so long, with what --resume needs; some minutes less than the queue gives. Minutes,
    hours:minutes:seconds or days-hours:minutes:seconds. SIGUSR1 does the same at once."""

    skip_bad: bool = False
    """Read all images first and leave out those that are constant, hold values that are not finite or above 1e15, or
    have a quarter of their variance in a single pixel."""

    naming: Literal["relion", "cryosparc", "cryodrgn"] = "relion"
    """Results have RELION's names; with another program here they and the particles stand under its names as well, in a
    folder of the run."""

    keep_statistics: bool = False
    """Keep the sums over the particles in the run folder, for --add-statistics and for fits without the images."""

    add_statistics: tuple[Folder, ...] = ()
    """Run folders with sums that --keep-statistics left there, of other particles in the same frame: they are added
    half to half."""

    force: bool = False
    """Exit with 0 also where the particles do not have the symmetry that is asked for."""

    profile: bool = False
    """Print where the time went, and write it into the run folder as trace.json, for the profiler of a browser."""


@runtime_checkable  # shapes and types are checked while tests run
class SourceConfig(Protocol):
    """Commands that start from particles in two half-sets."""

    @property
    def choice(self) -> ChoiceOptions: ...
    @property
    def images(self) -> ImageOptions: ...
    @property
    def halves(self) -> HalfSetOptions: ...


@runtime_checkable
class RunConfig(SourceConfig, Protocol):
    """Commands that make a run folder of them."""

    @property
    def mask(self) -> MaskOptions: ...
    @property
    def run(self) -> RunOptions: ...


# Commands


@dataclass(frozen=True)
class BackprojectConfig:
    """Classical maps."""

    choice: ChoiceOptions = ChoiceOptions()
    images: ImageOptions = ImageOptions()
    halves: HalfSetOptions = HalfSetOptions()
    mask: MaskOptions = MaskOptions()
    run: RunOptions = RunOptions()


@dataclass(frozen=True)
class ReconstructConfig:
    """A reconstruction."""

    choice: ChoiceOptions = ChoiceOptions()
    images: ImageOptions = ImageOptions()
    halves: HalfSetOptions = HalfSetOptions()
    model: ModelOptions = ModelOptions()
    fit: FitOptions = FitOptions()
    mask: MaskOptions = MaskOptions()
    run: RunOptions = RunOptions()


@dataclass(frozen=True)
class RefineOptions:
    """How poses are refined."""

    refine: Annotated[str, "WHAT,..."] = "poses"
    """What is refined: poses, and with a comma defocus, scale (grey scale and B factor) of each particle, and tilt (the
    beam tilt of each optics group)."""

    rounds: int = 3
    """Rounds at most. A round makes maps, fits Gaussians to each half and finds every particle's pose against those of
    its own half; the last is that after which the maps no longer gain."""

    reference: Literal["gaussians", "map"] = "gaussians"
    """What particles are compared with: the Gaussians of their half within its mask, or its classical map."""

    search: Annotated[str, "DEGREES|global|poor"] | None = None
    """Look further than local steps lead, in the first round: within so many degrees of the pose that was given, among
    all orientations, or among all for particles of poor likelihood alone."""

    angle_error: Degrees | None = None
    """Standard deviation about each axis of the angles that were given; without it from the data."""

    shift_error: Angstrom | None = None
    """Standard deviation along x and y of the shifts that were given; without it from the data."""

    states: Folder | None = None
    """Run folder of `emsplat heterogeneity` with these particles: each is compared with the map of its own state, so
    that motion is not mistaken for a wrong pose. One round."""

    shared_to: Angstrom | None = None
    """The poses that are given were found with one map of all particles, of this resolution: what is coarser both
    half-sets share, and no resolution counts it."""


@dataclass(frozen=True)
class RefineConfig(ReconstructConfig):
    """Poses refined, then a reconstruction."""

    refinement: RefineOptions = RefineOptions()


@dataclass(frozen=True)
class AbinitioOptions:
    """How poses are looked for."""

    starts: int = 4
    """Starts of each half-set at most. They end with the first two, one of each half, that agree."""

    steps: int = 240
    """Steps of a start at most, without symmetry; it ends where it has settled."""

    batch: Annotated[int, "IMAGES"] = 200
    """Images of a step."""

    classes: int = 1
    """Maps that compete for the images of a start. That which most go to is taken, and particles that fit another one
    better are of another class in the result: junk, other states, wrong minima."""

    sample: Annotated[int, "IMAGES"] = 5000
    """Images of each half-set that starts are made from, at most; all are given poses in the end."""

    offset: Angstrom = 10.0
    """How far particles lie from the centres of their images: standard deviation along x and y, to begin with. It
    follows the images later. Origins of the file are not used."""


@dataclass(frozen=True)
class AbinitioConfig:
    """Poses from nothing, and classical maps with them."""

    choice: ChoiceOptions = ChoiceOptions()
    images: ImageOptions = ImageOptions()
    halves: HalfSetOptions = HalfSetOptions()
    abinitio: AbinitioOptions = AbinitioOptions()
    mask: MaskOptions = MaskOptions()
    run: RunOptions = RunOptions()


@dataclass(frozen=True)
class HeterogeneityOptions:
    """What may move and change."""

    components: int = 12
    """Directions offered to the linear stage; those that the images do not support vanish."""

    points: int | None = None
    """Points of the density of latents, which are the cells that maps are made from; by default as many as predict the
    other half best, at most 64."""

    resolution: Annotated[float, "CYCLES"] = 20.0
    """Finest frequency of the linear stage, in cycles per box."""

    focus: MapFile | None = None
    """Mask of the region whose heterogeneity is looked for: the linear stage varies only there."""

    engine: Literal["cells", "images"] | None = None
    """Fit to the sums of cells of particles, or to the images themselves with a latent for each, as CryoSPIRE does; by
    default what the recipe says."""

    recipe: Literal["default", "cryospire"] = "default"
    """Where the fit to images starts from. cryospire is the paper's: networks, latents at random, 20 and 10 epochs."""

    decoder: Literal["separable", "perceptron"] | None = None
    """Images: rigid parts with soft borders, or the paper's networks and parts."""

    start: Literal["linear", "random"] | None = None
    """Images: latents of the linear stage or random ones to start from."""

    epochs: tuple[int, ...] = ()
    """Images: epochs of the coarse and of the fine stage."""

    learning_rate: float | None = None
    """Images: of the coarse stage; the fine one follows."""

    batch: int | None = None
    """Images: how many are seen in each step."""

    from_run: Annotated[Path | None, Name("from")] = None
    """Folder of an earlier run of the same particles: its linear stage, and its sums of cells where it has kept them
    (--keep-statistics), are used again."""

    parts: int | None = None
    """Rigid parts that the decoder may move; by default 5, and as many as the data show with the paper's networks."""

    gaussians: int | None = None
    """Gaussians of a state; by default about one per voxel of the molecule, at most 24,576. With --engine cells it
    becomes the nearest multiple of 2,048, at least that."""

    states: int = 10
    """Maps that are written where latents form no classes: centres of as many groups. Classes have one map each."""

    motion_corrected: bool = False
    """Also a consensus of all particles in the state of most of them, the rigid motions of the parts taken back. Takes
    minutes."""


@dataclass(frozen=True)
class HeterogeneityConfig:
    """Molecules that move and change."""

    choice: ChoiceOptions = ChoiceOptions()
    images: ImageOptions = ImageOptions()
    halves: HalfSetOptions = HalfSetOptions()
    heterogeneity: HeterogeneityOptions = HeterogeneityOptions()
    mask: MaskOptions = MaskOptions()
    run: RunOptions = RunOptions()


@dataclass(frozen=True)
class StatesConfig:
    """Maps of a heterogeneous run."""

    at: File | None = None
    """Table of latents, one row per map: columns z1, z2, ... as in latents.csv."""

    half: Annotated[int | None, "1|2"] = None
    """Only the map of one half-set; by default the mean of both."""

    path: tuple[int, ...] = ()
    """Two or more states of the run, by their numbers in states.csv: maps along the way between them, through places
    where there are particles."""

    straight: bool = False
    """The way of --path goes straight, whatever lies there."""

    traverse: int | None = None
    """Maps along a principal component of the maps, from the 5th to the 95th percentile of the particles: 1 for the
    first."""

    frames: int = 20
    """Maps on the way."""

    movie: bool = False
    """Also a movie of the maps, movie.webp."""

    select: Annotated[tuple[str, ...], "WHAT"] = ()
    """No maps but particles, as .star, .cs and cryoDRGN's row numbers: a file of row numbers (rows.txt or particles.csv
    of the explorer), class=2 (the state, in run_data.star), half=1, or ranges such as z1=-0.5:1.2 and gain=2:. Of
    several all have to hold."""

    gaussians: bool = False
    """Also the Gaussians of each map, as .ply."""

    overwrite: bool = False
    """Replace maps of the same names."""

    threads: int | None = None
    """Threads of the computation; without it as many as cores were granted."""


@dataclass(frozen=True)
class SlurmConfig:
    """The job."""

    nodes: int = 1
    """Machines."""

    processes: int = 1
    """Processes on each machine, which share the particles out; with GPUs as many as these."""

    threads: int = 8
    """Threads, and cores, of each process."""

    gpu: bool = False
    """Ask for a GPU for each process."""

    parts: int = 0
    """No processes that talk to each other, but so many jobs that each make the sums of a part of the particles, and
    one that adds them."""

    time: Annotated[str | None, "D-HH:MM:SS"] = None
    """Time of the job; without it from the estimate. The run stops in order before, and goes on when the job is
    submitted again."""

    partition: str | None = None
    """Partition of the cluster."""

    account: str | None = None
    """Account that the time is booked on."""


@dataclass(frozen=True)
class ComparePosesConfig:
    """Two sets of poses."""

    symmetry: Annotated[str, "GROUP"] = "C1"
    """Point group in RELION's setting: poses that it makes equivalent are the same."""

    @cached_property
    def point_group(self) -> Symmetry:
        """What ``symmetry`` means.

        Raises:
            InputError: it is no point group.
        """
        return ChoiceOptions(self.symmetry).point_group


@dataclass(frozen=True)
class NullTestConfig:
    """The tests."""

    particles: int = 3000
    """How many particles each test takes, evenly from both half-sets."""

    randomise_from: Angstrom | None = None
    """Spacing in Å from which on the phases of the images are random in that test; without it twice the resolution of
    the unaltered particles."""

    reconstruct: ReconstructConfig = ReconstructConfig()


@dataclass(frozen=True)
class CheckConfig:
    """The check."""

    metadata_only: bool = False
    """Leave the images alone: the metadata can be checked without them."""

    choice: ChoiceOptions = ChoiceOptions()
    images: ImageOptions = ImageOptions()
    halves: HalfSetOptions = HalfSetOptions()


@dataclass(frozen=True)
class ConvertConfig:
    """The file."""

    box: Pixels | None = None
    """Box of the map that an atomic model lies in, in pixels; files of particles or Gaussians say theirs."""

    pixel_size: Angstrom | None = None
    """Pixel size of that map in Å."""

    overwrite: bool = False
    """Replace the file if it exists."""

    choice: ChoiceOptions = ChoiceOptions()


@dataclass(frozen=True)
class PreprocessConfig:
    """The new stack."""

    normalise: bool = True
    """Bring the background to mean 0 and standard deviation 1."""

    recentre: bool = True
    """Move images by whole pixels so that what is left of the origins is below one."""

    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the images."""

    skip_bad: bool = False
    """Read all images first and leave out those that are constant, hold values that are not finite or above 1e15, or
    have a quarter of their variance in a single pixel."""

    threads: int | None = None
    """Threads of the computation; without it as many as cores were granted."""

    overwrite: bool = False
    """Write into an output folder that is not empty."""

    choice: ChoiceOptions = ChoiceOptions()
    images: ImageOptions = ImageOptions()


@dataclass(frozen=True)
class AssessConfig:
    """The assessment."""

    reference: File | None = None
    """What the full map is compared with as well: an MRC map on the same grid, or an atomic model (.cif, .pdb, also
    packed with gzip) or Gaussians that lie in it."""

    window: Angstrom | None = None
    """Width of the moving window of the local resolution in Å; without it 25, or five times the resolution of the
    back-projections where that is more."""

    threads: int | None = None
    """Threads of the computation; without it as many as cores were granted."""

    mask: MaskOptions = MaskOptions()


@dataclass(frozen=True)
class PostprocessConfig:
    """Sharpening."""

    mask: MapFile | None = None
    """MRC map with values from 0 to 1; without it the mask of the run."""

    b_factor: Annotated[float, "Å²"] | None = None
    """B factor in Å²; negative sharpens. Without it that of the signal in the back-projections
    (docs/resolution.md)."""

    b_factor_from: Angstrom = 10.0
    """Spacing in Å where the line of Guinier's plot begins; it ends at the resolution."""

    threads: int | None = None
    """Threads of the computation; without it as many as cores were granted."""


@dataclass(frozen=True)
class StateOptions:
    """A molecule in several states."""

    states: tuple[File, ...] = ()
    """Atomic models (mmCIF, PDB) of the states, in one common frame, in place of MODEL."""

    trajectory: File | None = None
    """Trajectory in DCD format whose frames are the states; frames are taken as they are, so superpose them first."""

    topology: File | None = None
    """PDB or mmCIF file with the atoms of --trajectory, all of them and in its order."""

    frames: int | None = None
    """So many frames, evenly spread from the first to the last; without it all, up to 200."""

    rotate: Annotated[str, "SELECTION"] | None = None
    """Atoms of MODEL that turn about the axis of --about against the rest, such as "(chain H and resid 1-213 220) or
    chain L"; selections are made of chain, segid, resid, resname, name, all, and, or, not and parentheses."""

    about: tuple[Annotated[str, "RESIDUE"], ...] = ()
    """Two residues whose CA atoms (P of nucleic acids) are on the axis: numbers in the chain of --rotate, or as
    H:213 H:244."""

    angles: int | None = None
    """Number of states of --rotate; without it 100."""

    turn: Degrees | None = None
    """Angle of --rotate between first and last state; without it 360, a full turn in equal steps, whose end is its
    beginning."""

    missing: tuple[Annotated[str, "SELECTION"], ...] = ()
    """Blocks of MODEL that may be missing, one selection each, such as "chain A B" "chain C": a state for every
    combination, with --rotate at every angle."""

    missing_states: tuple[Annotated[str, "BLOCKS"], ...] = ()
    """Only these combinations, each as the numbers of the blocks that are missing: none 1 2 1+2."""

    populations: tuple[float, ...] = ()
    """Shares of the particles in the order of the states, in any unit; without it all are equal."""

    contrast_spread: float = 0.0
    """Standard deviation of the particles' grey scales, whose mean is 1 (log-normal)."""


@dataclass(frozen=True)
class SimulateConfig:
    """What is simulated."""

    box: Pixels = 96
    """Box size of the images in pixels (even)."""

    pixel_size: Angstrom = 1.5
    """Pixel size in Å."""

    particles: int = 5000
    """Number of images."""

    snr: Annotated[float, "RATIO"] = 0.05
    """Variance of the CTF-modulated noise-free images over all their pixels, divided by the variance of the
    noise; inf for images without noise."""

    noise: Literal["white", "coloured"] = "white"
    """Spectrum of the noise: flat, or with power that falls smoothly by a factor of 14 from k = 0 to Nyquist."""

    shift: Angstrom = 3.0
    """Standard deviation of the in-plane shifts along x and along y, in Å."""

    defocus_min: Angstrom = 8000.0
    """Smallest defocus of a micrograph, in Å of underfocus."""

    defocus_max: Angstrom = 22000.0
    """Largest defocus of a micrograph, in Å of underfocus."""

    defocus_spread: Angstrom = 100.0
    """Standard deviation of a particle's defocus about that of its micrograph, in Å."""

    astigmatism: Angstrom = 400.0
    """Largest difference of a micrograph's two defoci, in Å; drawn uniformly from 0 up."""

    voltage: Annotated[float, "kV"] = 300.0
    """Acceleration voltage in kV."""

    cs: Annotated[float, "mm"] = 2.7
    """Spherical aberration in mm."""

    amplitude_contrast: float = 0.1
    """Fraction of amplitude contrast."""

    phase_shift: Degrees = 0.0
    """Phase shift of a phase plate in degrees."""

    micrograph_particles: int = 100
    """Particles per micrograph; they share a defocus and an astigmatism."""

    b_factor: Annotated[float, "Å²"] = 60.0
    """Overall B factor in Å²: amplitudes fall as exp(-B k²/4). B factors in the model file are not used."""

    atoms: int = 4000
    """Approximate number of atoms of the procedural protein, where no model is given."""

    model_seed: int = 0
    """Seed of the procedural protein."""

    keep_frame: bool = False
    """Take the model to be fitted into a map of this box and pixel size with MRC origin 0, instead of moving
    its centre of mass to the centre of the box."""

    pose_error: Degrees = 0.0
    """Root-mean-square angle in degrees between the true orientations and those written to the STAR file."""

    noise_only: bool = False
    """Write images of noise alone, with the metadata and the noise that a real run would have."""

    half_sets: bool = True
    """Divide the particles at random into two half-sets of equal size (rlnRandomSubset)."""

    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the images."""

    seed: int = 0
    """Seed of orientations, shifts, optics, noise, half-sets, states and contrast."""

    overwrite: bool = False
    """Write into an output folder that is not empty."""

    heterogeneity: StateOptions = StateOptions()


@dataclass(frozen=True)
class ScoreStatesConfig:
    """How states are scored."""

    truth: Folder
    """Output folder of `emsplat simulate`, or the folder truth in it."""

    output: Folder | None = None
    """Folder for scores.csv; without it that of the run."""

    consensus: MapFile | None = None
    """Map that knows of no states, whose scores stand beside; without it consensus.mrc or run_class001.mrc of the
    folder."""

    mask: MapFile | None = None
    """MRC map with values from 0 to 1, for all states; without it one is made from the true maps."""

    images: int = 100
    """Particles, evenly spread, whose own maps are scored."""

    partial: bool = False
    """Only a part of the particles was reconstructed: latents.csv says which, in its column row."""

    threads: int | None = None
    """Threads of the computation; without it as many as cores were granted."""


# Options by their names


def configure(kind: type[T], /, **options: Any) -> T:
    """Options of a command by their names, each in its group; those that are missing have defaults.

    Raises:
        TypeError: a name that is none of the command's.
    """
    unknown = options.keys() - set(names(kind))
    if unknown:
        raise TypeError(f"{kind.__name__} has no option {', '.join(sorted(unknown))}")
    built: T = _build(kind, options)
    return built


def change(config: T, /, **options: Any) -> T:
    """The same options but for some, by their names.

    Raises:
        TypeError: through `configure`.
    """
    return configure(type(config), **(flat(config) | options))


def flat(config: Any) -> dict[str, Any]:
    """Every option of a command by its name, without groups."""
    found: dict[str, Any] = {}
    for own in fields(config):
        value = getattr(config, own.name)
        found |= flat(value) if is_dataclass(value) else {own.name: value}
    return found


def names(kind: Any) -> Iterator[str]:
    """The names of all options of a command."""
    yield from _hints(kind)


def checked(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options from Python code, of the kinds that the command line makes of words: numbers, switches, choices, paths.

    Raises:
        InputError: a value of another kind, or none of the choices.
    """
    hints = _hints(kind)
    return {name: _fitting(name, hints[name], value) if name in hints else value for name, value in options.items()}


def _hints(kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found |= _hints(hint) if is_dataclass(hint) else {name: hint}
    return found


def _fitting(name: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        kinds = get_args(hint)
        if value is None and NoneType in kinds:
            return None
        for kind in kinds[:-1]:
            try:
                return _fitting(name, kind, value)
            except InputError:
                continue
        return _fitting(name, next(kind for kind in kinds[::-1] if kind is not NoneType), value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{name}: {value!r}; expected one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise InputError(f"{name}: {value!r}; expected a list")
        return tuple(_fitting(name, get_args(hint)[0], one) for one in value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    allowed: dict[Any, Any] = {bool: bool, int: Integral, float: Real, str: str, Path: Path}
    if hint not in allowed or (isinstance(value, allowed[hint]) and (hint is bool or not isinstance(value, bool))):
        return value
    what = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}[hint]
    raise InputError(f"{name}: {value!r}; expected {what}")


def _build(kind: Any, options: dict[str, Any]) -> Any:
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            given[name] = _build(hint, options)
        elif name in options:
            given[name] = options[name]
    return kind(**given)
