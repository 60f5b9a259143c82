"""emsplat: cryo-EM reconstruction with mixtures of anisotropic 3D Gaussians.

    import emsplat as em

    particles = em.read_particles("run_data.star", symmetry="D2")
    maps = em.backproject(particles)
    gaussians = em.fit(maps.equations[0], mask=maps.mask)
    half_map = em.voxelize(gaussians, particles.grid)

What is named here is the public interface. Modules below are for those who build on emsplat; names that begin with an
underscore are nobody else's. PyTorch is loaded when something is asked for that needs it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emsplat.errors import EmsplatError, InputError, Interrupted, OutputError
    from emsplat.imaging.project import project, voxelize
    from emsplat.interface import (
        Maps,
        RunFolder,
        accumulate,
        assess,
        backproject,
        fit,
        fsc_curve,
        read_gaussians,
        read_map,
        read_particles,
        read_run,
        reconstruct,
        refine,
        write_gaussians,
        write_map,
    )
    from emsplat.measures.curves import Curves
    from emsplat.particles.stack import ParticleStack
    from emsplat.sums.equations import NormalEquations
    from emsplat.types import Batch, Gaussians, Grid, Optics, Poses

_HOME = {
    "errors": ("EmsplatError", "InputError", "Interrupted", "OutputError"),
    "imaging.project": ("project", "voxelize"),
    "interface": (
        *("Maps", "RunFolder", "accumulate", "assess", "backproject", "fit", "fsc_curve"),
        *(
            "read_gaussians",
            "read_map",
            "read_particles",
            "read_run",
            "reconstruct",
            "refine",
            "write_gaussians",
            "write_map",
        ),
    ),
    "measures.curves": ("Curves",),
    "particles.stack": ("ParticleStack",),
    "sums.equations": ("NormalEquations",),
    "types": ("Batch", "Gaussians", "Grid", "Optics", "Poses"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Batch",
    "Curves",
    "EmsplatError",
    "Gaussians",
    "Grid",
    "InputError",
    "Interrupted",
    "Maps",
    "NormalEquations",
    "Optics",
    "OutputError",
    "ParticleStack",
    "Poses",
    "RunFolder",
    "accumulate",
    "assess",
    "backproject",
    "fit",
    "fsc_curve",
    "project",
    "read_gaussians",
    "read_map",
    "read_particles",
    "read_run",
    "reconstruct",
    "refine",
    "voxelize",
    "write_gaussians",
    "write_map",
]


def __getattr__(name: str) -> Any:
    """What is public, and ``__version__``, imported when it is asked for."""
    if name in _MODULE:
        from importlib import import_module

        return getattr(import_module(f"emsplat.{_MODULE[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("emsplat")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
