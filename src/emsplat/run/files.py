"""The names of the files in a run folder, each written here and nowhere else. Loads nothing, so that all may ask."""

from __future__ import annotations

HALVES = {"half1": 1, "half2": 2}  # the fits of half-sets and the numbers of these; that of all is "class001"


def model_name(fit: str) -> str:
    """The Gaussians of a fit."""
    return f"run_{fit}.ply"


def backprojection_name(fit: str) -> str:
    """The classical map of the images of a fit."""
    return f"backprojection_{fit}.mrc"


# What went in, and how.
SETTINGS = "config.toml"
LOG = "run.log"
JOURNAL = "journal.jsonl"
TRACE = "trace.json"  # where the time went, for the profiler of a browser
PARTICLES = "run_data.star"
REFINEMENT = "refinement.safetensors"  # poses after the last round
POSES = "poses.csv"  # how far each particle moved, and from which direction it is seen


def start_name(half: str, number: int) -> str:
    """The map that a start without poses came to, counted from 1."""
    return f"abinitio_{half}_start{number:02d}.safetensors"


# Maps, called as RELION calls those of a refinement, and models.
HALF_MAPS = ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc")
FULL_MAP = "run_class001.mrc"
FULL_MODEL = model_name("class001")
BACKPROJECTIONS = (backprojection_name("half1"), backprojection_name("half2"))
MASK = "mask.mrc"
SAMPLING = "sampling.mrc"
SHARPENED = "postprocess.mrc"
SHARPENED_MASKED = "postprocess_masked.mrc"
LOCAL_RESOLUTION = "local_resolution.mrc"
LOCAL_RESOLUTION_HALF_MAPS = "local_resolution_half_maps.mrc"
EXAMPLES = "examples.mrcs"  # particle, projection and residual in turn

# Tables.
FSC = "fsc.star"
POSTPROCESS = "postprocess.star"
FSC_XML = "postprocess_fsc.xml"
CONVERGENCE = "convergence.csv"
SCORES = "scores.csv"
DIRECTIONS = "directions.csv"
RESIDUAL = "residual.csv"

# Heterogeneity: latents of particles, ours and cryoDRGN's; what a plain folder of maps calls its consensus;
# the page of all states.
SEARCH = "linear_stage.safetensors"
LATENTS = "latents.csv"
CRYODRGN_LATENTS = "z.pkl"
CONSENSUS = "consensus.mrc"
CORRECTED = "consensus_corrected.mrc"  # with motions taken back, beside its half maps
STATES = "states"  # folder of maps of states
STATES_TABLE = "states.csv"
EXPLORER = "heterogeneity.html"
DENSITY = "density.csv"  # points of the latents' density
FREE_ENERGY = "free_energy.csv"  # along each component
LANDSCAPE = "landscape.csv"  # over the first two
PARTS = "parts"  # folder of masks of rigid parts
PARTS_TABLE = "parts.json"
PARTS_TEXT = "parts.txt"
CHIMERAX = "chimerax.cxc"
MOVIE = "movie.webp"
SELECTED = "selected.star"  # of `emsplat states --select`, beside it as .cs, and row numbers from 0 for cryoDRGN
SELECTED_INDEX = "selected.pkl"

# What was found: of a run, of `check` and of `nulltest`.
SUMMARY = "summary.json"
CHECK = "check.json"
CHECK_MAP = "check.mrc"
NULL_TESTS = "nulltest.json"
NULL_TESTS_TABLE = "nulltest.csv"
SUMMARIES = (SUMMARY, NULL_TESTS, CHECK)
NULL_RUN = "run"  # the run folder of a null test, in the folder of its name
REPORT = "report.html"

# Figures, each as PNG and beside it as SVG.
FSC_FIGURE = "fsc.png"
SLICES_FIGURE = "slices.png"
CONVERGENCE_FIGURE = "convergence.png"
LOCAL_RESOLUTION_FIGURE = "local_resolution.png"
LOCAL_RESOLUTION_SLICES_FIGURE = "local_resolution_slices.png"
DIRECTIONS_FIGURE = "directions.png"
RESIDUAL_FIGURE = "residual.png"
GAUSSIANS_FIGURE = "gaussians.png"
STATES_FIGURE = "states.png"
POSES_FIGURE = "poses.png"


def map_name(fit: str) -> str:
    """The map of a fit."""
    return FULL_MAP if fit == "class001" else HALF_MAPS[HALVES[fit] - 1]


def state_name(fit: str) -> str:
    """The finished fit."""
    return f"run_{fit}.safetensors"


MEAN = "mean"


def component_name(number: int) -> str:
    """A component of the linear stage, from 1, for `slices_name`."""
    return f"component{number}"


def slices_name(fit: str) -> str:
    """Central slices of the map of a fit that is on its way, or of the `MEAN` and a `component_name` of the linear
    stage; gone in the end. A pattern with "*"."""
    return f"run_{fit}_slices.mrcs"


def checkpoint_name(fit: str) -> str:
    """The fit on its way."""
    return f"run_{fit}.checkpoint.safetensors"


def course_name(fits: str) -> str:
    """The course of fits in step on its way."""
    return f"course_{fits}.checkpoint.safetensors"


def statistics_name(fit: str, part: int | str = "") -> str:
    """The sums over the images of a fit; of some kinds of images where there are several. A pattern with "*"."""
    return f"run_{fit}_statistics{part}.safetensors"


def cells_name(half: int, fine: bool = False) -> str:
    """The sums of all cells of a half-set: of those of the linear stage, or of those of a decoder."""
    return f"{'fine_' if fine else ''}cells_half{half}.safetensors"


def coarse_model_name(half: int) -> str:
    """The model of a half-set before its particles were placed anew."""
    return f"coarse_half{half}.safetensors"


def half_model_name(half: int) -> str:
    """The model of all states of a half-set."""
    return f"model_half{half}.safetensors"


def part_mask_name(part: int) -> str:
    """The mask of a rigid part, counted from 1."""
    return f"part{part}_mask.mrc"


def state_star_name(state: int) -> str:
    """The particles of a state, counted from 0."""
    return f"{state:03d}.star"


def state_local_name(state: int) -> str:
    """The local resolution of the map of a state, counted from 0."""
    return f"{state:03d}_local_resolution.mrc"


def state_map_name(state: int, half: int | None = None) -> str:
    """The map of a state, counted from 0, or that of one half-set."""
    return f"{state:03d}.mrc" if half is None else f"{state:03d}_half{half}.mrc"
