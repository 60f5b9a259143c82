"""The Gaussians that a fit starts from."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from emsplat.models.gaussians import Bounds, GaussianField
from emsplat.models.start_files import read_start
from emsplat.models.starts import ball, dense_part, from_gaussians, from_map, uniform
from emsplat.programs.settings import Settings
from emsplat.types import Gaussians, Grid

FINEST_DETAIL = 0.4  # voxels as large as this part of the classical resolution are fine enough for the Gaussians


def start_model(
    raw: Float[Tensor, "z y x"],
    grid: Grid,
    settings: Settings,
    detail: float,
    name: str = "class001",
    support: int | None = None,
) -> GaussianField:
    """The start of a fit; ``detail`` (Å, at least a voxel) is the finest spacing that the data resolve, and ``support``
    how many voxels in the middle the fit looks at (None: all)."""
    length = grid.length if settings.length_unit is None else settings.length_unit * detail
    bounds = Bounds(length, 1.0, settings.min_scale * detail)
    shape = {"isotropic": settings.isotropic, "rotation": settings.rotation}
    given = read_start(settings.init, grid, name)
    if isinstance(given, Gaussians):
        return from_gaussians(given, bounds, **shape)
    fraction = 6 if settings.engine == "one-pass" and settings.growth else 3
    count = settings.gaussians or gaussian_count(raw, grid, detail, fraction, support)
    if settings.init in ("ball", "uniform"):
        start = ball if settings.init == "ball" else uniform
        return start(count, grid, bounds, settings.seed, **shape)
    return from_map(raw if given is None else given, grid, count, bounds, settings.seed, support=support, **shape)


def gaussian_count(
    raw: Float[Tensor, "z y x"], grid: Grid, detail: float, fraction: int, support: int | None = None
) -> int:
    """One Gaussian per ``fraction`` cells of ``detail``³ in the dense part of a classical map, in its middle
    ``support`` voxels; 1,000 to 100,000."""
    volume = int(dense_part(raw.numpy(), support)[1].sum()) * grid.pixel_size**3
    return int(min(max(volume / detail**3 / fraction, 1_000), 100_000))
