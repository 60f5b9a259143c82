"""What the report says: names of curves, rules of resolutions, meanings, files of a run folder, what to check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from emsplat.run import files

# Names of `Curves`, the most telling first; unknown ones come last.
CURVE_NAMES = {
    "cross_validated": "cross-validated",
    "reference": "full map against the reference",
    "backprojection": "classical half maps, masked",
    "corrected": "masked and corrected",
    "masked": "masked",
    "unmasked": "unmasked",
    "random_phases": "masked, phases randomised",
    "particle": "unmasked, scaled to the particle",
    "masked_cryodrgn": "masked, cryoDRGN's shells",
}

RELIONS_RULE = "FSC 0.143 by RELION's rule, last shell before the first drop"


@dataclass(frozen=True)
class Measured:
    """What a curve of summary.json was measured on, and what it says of Gaussians and of classical maps."""

    name: str
    meaning: str
    classical: str


# Keys under "resolution" in summary.json, in the order of the table: what to look at first, what to compare last.
CURVES = {
    "reference_masked": Measured(
        "full map against the reference, masked",
        "Agreement with the map that was given; read at 0.5.",
        "Agreement with the map that was given; read at 0.5.",
    ),
    "backprojection_masked": Measured(
        "classical half maps, masked", "What the data of the two halves agree on before any model.", ""
    ),
    "half_map_corrected": Measured(
        "half maps, masked and corrected",
        "Upper limit: what all such models have in common counts as agreement. Compares runs.",
        "",
    ),
    "half_map_masked": Measured(
        "half maps, masked", "Upper limit, the mask's part in it as well.", "The mask adds to it."
    ),
    "half_map_unmasked": Measured(
        "half maps, unmasked",
        "Upper limit; needs no mask.",
        "Too coarse: the noise of the whole box counts.",
    ),
    "half_map_masked_cryodrgn": Measured(
        "half maps, masked, cryoDRGN's rule",
        "As cryoDRGN and CryoBench count: more lenient, comparable with nothing else.",
        "As cryoDRGN and CryoBench count: more lenient, comparable with nothing else.",
    ),
}

# What a page says of a run on particles that a null test has altered.
ALTERED = {
    "unaltered": "Null test: the particles as they are; the others are compared with this run.",
    "noise": "Null test: every image is replaced by noise of its own spectrum. There must be no resolution.",
    "phases": "Null test: phases are random beyond a known spacing. The resolution must stop there.",
    "poses": "Null test: poses and shifts have changed hands. What remains is the average over all rotations.",
}

CAUTION = (
    "Why not the half maps? Both halves are fitted with the same kind of compact, smooth Gaussians, so their maps "
    "agree in what the model imposes and not only in what the images show. The Gaussians of one half against the "
    "plain back-projection of the other, whose noise they have never seen, lack this bias."
)

LOCAL_RESOLUTION_KINDS = {
    "cross_validated": "Cross-validated (what the headline uses)",
    "half_maps": "Half maps of the Gaussians",
}
PERCENTILES = {
    "mean": "mean",
    "median": "median",
    "p5": "5th percentile",
    "p25": "25th percentile",
    "p75": "75th percentile",
    "p95": "95th percentile",
}

# Key under "directional" in summary.json: what it is, what it tells.
DIRECTIONAL = {
    "fslc_mean": (
        "FSLC, mean over directions",
        "Fourier slice correlation: the half maps seen along a direction, over the band.",
    ),
    "fslc_std": ("FSLC, standard deviation", "Near 0 where every direction is resolved alike."),
    "band": ("band of the FSLC", "The spacings over which directions are compared."),
    "conical_of": ("maps behind the conical resolutions", "FSC 0.143 in cones of 20° around each direction."),
    "conical_best": ("finest conical resolution", "The best direction, FSC in a cone around it."),
    "conical_worst": (
        "coarsest conical resolution",
        "The worst direction. Far from the finest, details are smeared along it.",
    ),
    "sampling_compensation": (
        "sampling compensation factor",
        "1 where views are uniform; small where few views carry many frequencies.",
    ),
    "unsampled": ("unsampled part of Fourier space", "Above 0 there is a missing wedge or cone that no fit can fill."),
}

# Keys of a stage under "course" in summary.json, as columns.
STAGES = {
    "gaussians": "Gaussians",
    "epochs": "epochs",
    "score": "mean cross-validated FSC",
    "gain": "gain",
    "gain_error": "its standard error",
    "kept": "kept",
}

# Columns of the table of null tests.
NULL_MEASURES = {
    "half_map_masked": "half maps, masked",
    "half_map_corrected": "half maps, corrected",
    "backprojection_masked": "classical half maps",
    "cross_validated": "cross-validated",
    "reported": "reported by the run",
}
DECISIVE = ("cross_validated", "reported")  # those that have to be silent for the test to pass
SILENT = "Silent: no resolution, or none finer than the test leaves true (the spacing that is expected)."

# Keys of summary.json in words, and those that have a place of their own in the page.
LABELS = {
    "file": "particle file",
    "half_sets": "half-sets",
    "half_sets_from": "half-sets are",
    "optics_groups": "optics groups",
    "box": "box (px)",
    "pixel_size": "pixel size",
    "diameter": "particle diameter, at most",
    "defocus_range": "defocus",
    "shift_rms": "shifts, root mean square",
    "symmetry_elements": "elements of the symmetry",
    "image_folders": "image paths start from",
    "skipped_rows": "rows left out as bad",
    "fraction": "part of the box inside the mask",
    "randomised_from": "phases randomised from (Å)",
    "random_phases": "mean FSC of random phases in the mask",
    "coverage": "part of Fourier space that is measured",
    "seconds": "seconds in all",
    "seconds_of_parts": "seconds of the parts",
    "peak_memory_mb": "most memory (MB)",
    "peak_gpu_memory_mb": "most memory of the GPU (MB)",
    "device": "device",
    "threads": "threads",
    "machine": "processor architecture",
    "seed": "seed",
}
ELSEWHERE = (
    *("evident", "resolution", "limit", "warnings", "notes", "local_resolution", "directional", "course", "examples"),
    *("settings", "options", "assessment", "input", "fits", "versions", "altered", "heterogeneity", "residual"),
)


def _both(figure: str) -> str:
    """The pattern of a figure as PNG and SVG."""
    return figure.replace(".png", ".*")


# What the files of a run folder are; the first pattern that matches counts.
_FILES = (
    ("run_half[12]_class*_unfil.mrc", "half map, of one half-set; no mask, filter or sharpening"),
    ("run_class*.mrc", "full map, of all particles"),
    ("backprojection_half[12].mrc", "classical half map: back-projection of one half-set"),
    ("backprojection_*.mrc", "classical map: back-projection of all particles"),
    (files.SHARPENED, "full map, sharpened and filtered"),
    (files.SHARPENED_MASKED, "full map, sharpened, filtered and masked"),
    (files.LOCAL_RESOLUTION_HALF_MAPS, "local resolution in Å from the half maps of the Gaussians"),
    ("local_resolution*.mrc", "local resolution in Å"),
    (files.SAMPLING, "weight of the data in Fourier space, relative to the mean of its shell"),
    ("*_slices.mrcs", "central slices of a map on its way, for `emsplat view`"),
    (files.EXAMPLES, "particle, projection and residual of some particles"),
    (files.PARTICLES, "the particles as used, with their half-sets (RELION)"),
    (files.CONSENSUS, "map of all particles, whatever their state"),
    ("consensus_corrected*.mrc", "consensus in one state, motions taken back; and its half maps"),
    (files.LATENTS, "latents of the particles, with class and gain"),
    (files.CRYODRGN_LATENTS, "the latents for cryoDRGN's tools"),
    (files.EXPLORER, "page in which the molecule moves with the pointer"),
    (files.DENSITY, "points of the latents' density with weights"),
    (files.FREE_ENERGY, "free energy along each component"),
    (files.LANDSCAPE, "free energy over the first two components"),
    (
        files.STATES,
        "folder: each state's maps, half maps, local resolution, Gaussians, particles; a table of them",
    ),
    (files.PARTS, "folder: masks of the rigid parts, what they do"),
    (files.CHIMERAX, "script: opens maps, states and parts in ChimeraX"),
    ("model_half[12].safetensors", "a half-set's model of all states, for `emsplat states`"),
    (_both(files.STATES_FIGURE), "figure: gain, populations and free energies"),
    (files.CHECK_MAP, "quick back-projection of a sample, for a look"),
    ("*mask*.mrc", "mask"),
    ("*.mrc", "map"),
    (files.FSC, "Fourier shell correlation of the half maps, in RELION's columns"),
    ("*fsc*.xml", "Fourier shell correlation for deposition in EMDB"),
    ("*.star", "table in RELION's format"),
    (files.SUMMARY, "the numbers on this page"),
    (files.NULL_TESTS, "the table of the null tests"),
    (files.NULL_TESTS_TABLE, "the table of the null tests"),
    (files.CHECK, "what was understood of the input"),
    (files.SETTINGS, "the settings of the run"),
    (files.JOURNAL, "what happened and when, one JSON object per line"),
    (files.TRACE, "where the time went, for the profiler of a browser"),
    (files.CONVERGENCE, "loss at each step of each fit"),
    (files.SCORES, "mean cross-validated FSC after each epoch"),
    (files.DIRECTIONS, "resolution, sampling and particles by direction"),
    (files.RESIDUAL, "power of noise and residuals by frequency"),
    (_both(files.FSC_FIGURE), "figure: Fourier shell correlation"),
    (_both(files.SLICES_FIGURE), "figure: central slices and projections"),
    (_both(files.CONVERGENCE_FIGURE), "figure: convergence of the fits"),
    (_both(files.LOCAL_RESOLUTION_FIGURE), "figure: distribution of the local resolution"),
    (_both(files.LOCAL_RESOLUTION_SLICES_FIGURE), "figure: local resolution over the map"),
    (_both(files.DIRECTIONS_FIGURE), "figure: resolution and views by direction"),
    (_both(files.RESIDUAL_FIGURE), "figure: residuals against the noise"),
    (_both(files.GAUSSIANS_FIGURE), "figure: sizes and shapes of the Gaussians"),
    (_both(files.POSES_FIGURE), "figure: how far poses moved, and orientations before and after"),
    (files.POSES, "how far each particle moved, its uncertainty and orientation"),
    (files.REFINEMENT, "poses after the last round"),
    ("*.safetensors", "Gaussians: means, covariances, amplitudes"),
    ("*.ply", "Gaussians for splat viewers"),
    ("*.log", "log of the run"),
    (files.REPORT, "this page"),
)


def describe(name: str) -> str:
    """What a file of a run folder holds; empty for files that emsplat does not write."""
    return next((text for pattern, text in _FILES if fnmatch(name, pattern)), "")


# What is seen, what it means and what to do about it.
CHECKS: Sequence[tuple[str, str]] = (
    (
        "The map is a hole in a bright box",
        "The contrast sign is wrong. RELION expects bright protein on a dark ground; run again with --invert if the "
        "images are as the camera took them.",
    ),
    (
        "The map looks right but helices turn the wrong way",
        "The hand is wrong: poses leave it undetermined. Look at α helices (finer than about 8 Å) or compare with a "
        "known structure, and mirror map and model together.",
    ),
    (
        "The FSC does not fall to 0, or falls and rises again",
        "Look at the curve of randomised phases: where it stays above 0.1 the mask is too tight or its edge too sharp, "
        "and the masked curve says nothing there. A plateau up to the last shell also comes from duplicated particles "
        "or from images that were masked or filtered alike before.",
    ),
    (
        "The resolution is exactly the limit of the pixel size",
        "The images were binned too far. Extract them again with smaller pixels.",
    ),
    (
        "The map is smeared along one axis, or the conical resolutions differ widely",
        "Preferred orientation. Look at the distribution of views and the sampling: if a belt or a pole is empty, "
        "collect tilted images or change the grids; a model cannot invent views.",
    ),
    (
        "Fine detail everywhere, also in the solvent",
        "The two halves are not independent: the same particle, or close neighbours picked twice, in both half-sets. "
        "Remove duplicates by distance and draw half-sets per micrograph.",
    ),
    (
        "Everything is a few per cent too large or too small",
        "The pixel size is off. Fit a known structure, correct the optics table, and run again: the CTF changes "
        "with it.",
    ),
    (
        "A sharp centre and a blurred rim",
        "Angles are uncertain, or the particle flexes: an error of 1° moves density 100 Å from the centre by 1.7 Å. "
        "Refine the poses further, or classify first.",
    ),
    (
        "Double or ring-shaped density, residuals that show the particle",
        "Poses or shifts are in another convention or were made for another pixel size or box; symmetry is wrong; or "
        "the defocus is. Residuals should look like noise: a dark or bright particle in all of them is a scale error, "
        "rings are a CTF error.",
    ),
)
CHECKS_OF_GAUSSIANS: Sequence[tuple[str, str]] = (
    (
        "The cross-validated resolution is much worse than that of the half maps",
        "Overfitting: both models describe what the other half's images do not contain. Fewer Gaussians, fewer "
        "epochs or a larger smallest width help. The residuals of the other half above those of the own half say the "
        "same.",
    ),
    (
        "Spikes and needles of density",
        "Very long or very thin Gaussians: see the distribution of their widths. They follow noise; use fewer of them "
        "or a larger smallest width.",
    ),
)
