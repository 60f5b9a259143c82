"""What the report says: names of curves, rules of resolutions, meanings, files of a run folder, what to check."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

# The most telling curve first: figures and legends follow this order, unknown columns come last.
CURVE_NAMES = {
    "emsplatCrossValidated": "cross-validated (models against unseen data)",
    "emsplatBackprojectionMasked": "classical half maps, masked",
    "rlnFourierShellCorrelationCorrected": "half maps, masked and corrected",
    "rlnFourierShellCorrelationMaskedMaps": "half maps, masked",
    "rlnFourierShellCorrelationUnmaskedMaps": "half maps, unmasked",
    "rlnFourierShellCorrelationParticleMaskFraction": "half maps, unmasked, scaled to the particle's volume",
    "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": "half maps, phases randomised, masked",
    "emsplatCryodrgnMaskedMaps": "half maps, masked, cryoDRGN's shells",
    "emsplatReferenceMasked": "full map against the reference, masked",
}

_RELION = "last shell before the first drop (RELION's rule)"
# The rule behind each key under "resolution" in summary.json.
_RULES = {
    "cross_validated": "FSC 0.5, where the interpolated curve first crosses it",
    "backprojection_masked": f"classical half maps, masked; FSC 0.143, {_RELION}",
    "half_map_unmasked": f"unmasked; FSC 0.143, {_RELION}",
    "half_map_masked": f"masked; FSC 0.143, {_RELION}",
    "half_map_corrected": f"masked and corrected by randomised phases; FSC 0.143, {_RELION}",
    "half_map_masked_cryodrgn": "masked; FSC 0.143, cryoDRGN's shells, last shell above the threshold",
}
# The order of the headline: what to quote first, what to compare last.
_ORDER = (
    *("cross_validated", "backprojection_masked", "half_map_corrected", "half_map_masked", "half_map_unmasked"),
    *("half_map_masked_cryodrgn", "reference_masked"),
)


def rank(curve: str) -> int:
    """The place of a curve in the headline; those unknown to this version come last."""
    return _ORDER.index(curve) if curve in _ORDER else len(_ORDER)


def rule(curve: str, threshold: str) -> str:
    """How a resolution was read from a curve; ``threshold`` is empty where its key names none."""
    if threshold:
        return f"FSC {threshold}, {_RELION}"
    return _RULES.get(curve, f"{curve.replace('_', ' ')}; this version of the report does not know its rule")


# Part of a key under "resolution" in summary.json, what the number is, what it means; the first match counts.
MEANINGS = (
    (
        "cross",
        "Cross-validated",
        "The Gaussians of one half against the plain back-projection of the other half, whose noise they "
        "have never seen: an estimate of the correlation with the truth. This is the number to quote.",
    ),
    (
        "backproj",
        "Back-projections",
        "Agreement of the plain back-projections of the two halves, which no prior has touched.",
    ),
    (
        "corrected",
        "Half maps, mask corrected",
        "Agreement of the Gaussians fitted to each half, less what the mask alone contributes. The prior's part in it "
        "remains: use it to compare runs.",
    ),
    (
        "cryodrgn",
        "Half maps, for comparison with cryoDRGN",
        "The masked half maps read as cryoDRGN and CryoBench read theirs. Its shells and rule are more lenient: "
        "compare it with nothing else.",
    ),
    (
        "half_map",
        "Half maps of the Gaussians",
        "Agreement of the Gaussians fitted to each half. It overestimates: use it to compare runs, "
        "not to claim a resolution.",
    ),
    ("reference", "Against the reference", "Agreement of the full map with the reference map that was given."),
    ("truth", "Against the truth", "Agreement with the map that the images were simulated from."),
)
CAUTION = (
    "The half-map FSC of a Gaussian model overestimates its resolution. Both halves are fitted with the same "
    "kind of compact, smooth Gaussians, so the two maps agree in what the model imposes and not only in what "
    "the images show. Expect the true resolution to be worse than the half-map numbers, and look at the "
    "map before you believe them. The model of one half against the plain back-projection of the other "
    "lacks this bias."
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

# What the files of a run folder are; the first pattern that matches counts.
_FILES = (
    ("run_half[12]_class*_unfil.mrc", "half map: the Gaussians of one half-set; no mask, filter or sharpening"),
    ("run_class*.mrc", "full map: the Gaussians fitted to all particles"),
    ("backprojection_half[12].mrc", "classical half map: back-projection of one half-set"),
    ("backprojection_*.mrc", "classical map: back-projection of all particles"),
    ("postprocess.mrc", "full map, sharpened and filtered"),
    ("postprocess_masked.mrc", "full map, sharpened, filtered and masked"),
    ("local_resolution_half_maps.mrc", "local resolution in Å from the half maps of the Gaussians"),
    ("local_resolution*.mrc", "local resolution in Å"),
    ("sampling.mrc", "weight of the data in Fourier space, relative to the mean of its shell"),
    ("examples.mrcs", "particle, projection and residual of some particles"),
    ("run_data.star", "the particles as used, with their half-sets (RELION)"),
    ("*mask*.mrc", "mask"),
    ("*.mrc", "map"),
    ("fsc.star", "Fourier shell correlation of the half maps, in RELION's columns"),
    ("*fsc*.xml", "Fourier shell correlation for deposition in EMDB"),
    ("*.star", "table in RELION's format"),
    ("summary.json", "the numbers on this page"),
    ("config.toml", "the settings of the run"),
    ("convergence.csv", "loss at each step of each fit"),
    ("scores.csv", "mean cross-validated FSC after each epoch"),
    ("directions.csv", "resolution, sampling and particles by direction"),
    ("residual.csv", "power of noise and residuals by frequency"),
    ("fsc.*", "figure: Fourier shell correlation"),
    ("slices.*", "figure: central slices and projections"),
    ("convergence.*", "figure: convergence of the fits"),
    ("local_resolution.*", "figure: distribution of the local resolution"),
    ("local_resolution_slices.*", "figure: local resolution over the map"),
    ("directions.*", "figure: resolution and views by direction"),
    ("residual.*", "figure: residuals against the noise"),
    ("gaussians.*", "figure: sizes and shapes of the Gaussians"),
    ("*.safetensors", "Gaussians: means, covariances, amplitudes"),
    ("*.ply", "Gaussians for splat viewers"),
    ("*.log", "log of the run"),
    ("report.html", "this page"),
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
        "The cross-validated resolution is much worse than that of the half maps",
        "Overfitting: both models describe what the other half's images do not contain. Fewer Gaussians, fewer "
        "epochs or a larger smallest width help. The residuals of the other half above those of the own half say the "
        "same.",
    ),
    (
        "The resolution is exactly the limit of the pixel size",
        "The images were cropped in Fourier space too far. Extract them again with smaller pixels.",
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
    (
        "Spikes and needles of density",
        "Very long or very thin Gaussians: see the distribution of their widths. They follow noise; use fewer of them "
        "or a larger smallest width.",
    ),
)
