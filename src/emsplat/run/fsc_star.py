"""FSC curves in STAR files under RELION's names, and back. Loads no torch: the report reads them here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from emsplat import __version__
from emsplat.errors import InputError
from emsplat.io.files import number_text
from emsplat.io.star import Words, pairs, read_star_file, write_star_file
from emsplat.measures.curves import Curves, Values

# The columns of `Curves`.
_COLUMNS = {
    "corrected": "rlnFourierShellCorrelationCorrected",
    "particle": "rlnFourierShellCorrelationParticleMaskFraction",
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "random_phases": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    "masked_cryodrgn": "emsplatCryodrgnMaskedMaps",
    "backprojection": "emsplatBackprojectionMasked",
    "cross_validated": "emsplatCrossValidated",
    "cross_validated_low": "emsplatCrossValidatedLow",
    "cross_validated_high": "emsplatCrossValidatedHigh",
    "reference": "emsplatReferenceMasked",
}
_NAMES = {column: name for name, column in _COLUMNS.items()}
_SHELL, _FREQUENCY, _SPACING = "rlnSpectralIndex", "rlnResolution", "rlnAngstromResolution"
_GENERAL = {
    "resolution_rule": "emsplatResolutionRule",
    "resolution": "rlnFinalResolution",
    "b_factor": "rlnBfactorUsedForSharpening",
    "half_map_1": "rlnUnfilteredMapHalf1",
    "half_map_2": "rlnUnfilteredMapHalf2",
    "map": "rlnPostprocessedMap",
    "masked_map": "rlnPostprocessedMapMasked",
    "mask": "rlnMaskName",
    "particle_fraction": "rlnParticleBoxFractionSolventMask",
    "weight": "emsplatWeight",
    "randomised_from": "rlnRandomiseFrom",
    "slope": "rlnFittedSlopeGuinierPlot",
    "intercept": "rlnFittedInterceptGuinierPlot",
    "correlation": "rlnCorrelationFitGuinierPlot",
    "protein_slope": "emsplatSlopeOfProtein",
    "b_factor_against_protein": "emsplatBfactorAgainstProtein",
    "b_factor_by_relions_rule": "emsplatBfactorByRelionsRule",
}
_GUINIER = {
    "square_frequency": "rlnResolutionSquared",
    "original": "rlnLogAmplitudesOriginal",
    "weighted": "rlnLogAmplitudesWeighted",
    "sharpened": "rlnLogAmplitudesSharpened",
    "intercept": "rlnLogAmplitudesIntercept",
    "protein": "emsplatLogAmplitudesProtein",
}


def write_fsc_star(
    path: Path, general: Mapping[str, object], curves: Curves, guinier: Mapping[str, Values] | None = None
) -> None:
    """Tables in the style of RELION's postprocess.star: pairs in data_general, curves in data_fsc and data_guinier.

    What RELION has no name for keeps its own.

    Raises:
        OutputError: it cannot be written.
    """
    about = {"emsplatVersion": __version__, **{_GENERAL.get(name, name): _text(v) for name, v in general.items()}}
    blocks: list[bytes | tuple[str, Mapping[str, list[str] | Words]]] = [
        pairs("general", {f"_{name}": value for name, value in about.items()}),
        ("fsc", {f"_{name}": texts for name, texts in _fsc(curves).items()}),
    ]
    if guinier:
        blocks.append(("guinier", {f"_{_GUINIER.get(name, name)}": _texts(v) for name, v in guinier.items()}))
    write_star_file(path, blocks)


def read_fsc_star(path: Path) -> Curves:
    """The curves that `write_fsc_star` wrote, or RELION; columns of other names keep these.

    What is no number becomes NaN.

    Raises:
        InputError: it cannot be read, or holds no frequencies.
    """
    table = read_star_file(path).table("fsc")
    if table is None or not table.has(f"_{_FREQUENCY}"):
        raise InputError(f"{path}: no FSC curve; expected data_fsc with {_FREQUENCY}; run the reconstruction again")
    columns = {tag.removeprefix("_"): table.numbers(tag) for tag in table.tags}
    frequency = columns[_FREQUENCY]
    values = {_NAMES.get(name, name): v for name, v in columns.items() if name not in (_SHELL, _FREQUENCY, _SPACING)}
    return Curves(frequency, values)


def _fsc(curves: Curves) -> dict[str, list[str]]:
    shells, length = range(len(curves.frequency)), 1 / curves.frequency[1]
    return {
        _SHELL: [str(shell) for shell in shells],
        _FREQUENCY: _texts(curves.frequency),
        _SPACING: _texts(np.array([length / shell if shell else 999.0 for shell in shells])),
        **{_COLUMNS.get(name, name): _texts(values) for name, values in curves.values.items()},
    }


def _text(value: object) -> str:
    return "?" if value is None else str(value)


def _texts(values: Values) -> list[str]:
    """What is undefined, as a curve beyond the end of the data, is unknown: "?", no number."""
    return [number_text(value, ".6f", "?") for value in values.tolist()]
