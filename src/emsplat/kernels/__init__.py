"""Kernels: the operators of a Gaussian mixture, and Fourier slices in and out of a volume, per kind of device.

The contract, for flat tensors of one dtype on one device: ``project`` and ``voxelize`` return an image stack or a
volume, ``project_each`` draws into every image a mixture of its own; functions with ``gradient`` in their names take
the upstream gradient and return the gradients with respect to the inputs; ``insert`` adds slices to a half space in
place (`emsplat.sums.statistics`); ``place`` finds poses against a half space (`Kernels.place`). ``reference`` holds the
operators as plain differentiable PyTorch; every fast twin is tested against a slow one. The back end is chosen by the
device of the data (`backend`): ``cpu`` binds the C++ of native/, ``gpu`` launches Triton kernels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from emsplat.errors import EmsplatError


class Kernels(Protocol):
    """What a back end offers; shapes as in `emsplat.imaging.project`, ``pixel_size`` in Å, ``cutoff`` in σ."""

    def project(
        self,
        mean: Tensor,
        covariance: Tensor,
        amplitude: Tensor,
        rotation: Tensor,
        shift: Tensor,
        size: int,
        pixel_size: float,
        cutoff: float,
    ) -> Tensor: ...

    def project_gradient(
        self,
        mean: Tensor,
        covariance: Tensor,
        amplitude: Tensor,
        rotation: Tensor,
        shift: Tensor,
        upstream: Tensor,
        pixel_size: float,
        cutoff: float,
        with_pose: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def project_each(
        self,
        mean: Tensor,
        covariance: Tensor,
        amplitude: Tensor,
        rotation: Tensor,
        shift: Tensor,
        size: int,
        pixel_size: float,
        cutoff: float,
    ) -> Tensor: ...

    def project_each_gradient(
        self,
        mean: Tensor,
        covariance: Tensor,
        amplitude: Tensor,
        rotation: Tensor,
        shift: Tensor,
        upstream: Tensor,
        pixel_size: float,
        cutoff: float,
        with_pose: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def voxelize(
        self,
        mean: Tensor,
        covariance: Tensor,
        amplitude: Tensor,
        size: int,
        pixel_size: float,
        cutoff: float,
    ) -> Tensor: ...

    def voxelize_gradient(
        self,
        mean: Tensor,
        covariance: Tensor,
        amplitude: Tensor,
        upstream: Tensor,
        pixel_size: float,
        cutoff: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def insert(
        self,
        total: Tensor,
        total_weight: Tensor,
        numerator: Tensor,
        weight: Tensor,
        rotation: Tensor,
        polynomials: Tensor,
        radius: float,
        step: float,
    ) -> None: ...

    def place(
        self,
        space: Tensor,
        values: Tensor,
        transfer: Tensor,
        point: Tensor,
        magnification: Tensor,
        image: Tensor,
        rotation: Tensor,
        given: Tensor,
        move: Tensor,
        offset: Tensor,
        polynomials: Tensor,
        step: float,
        precision: tuple[float, float],
        most: int,
        enough: float,
        longest: float,
    ) -> Tensor:
        """Compares views with slices of a half space, and moves them downhill by Levenberg's method
        (`emsplat.poses.local`).

        Images are ``values``, ``transfer`` (i, s) and ``magnification`` (i, 2, 2) at frequencies ``point`` (k, 2) in
        cycles per box, k <= s. Of each view: the ``image`` it is of, ``rotation`` and ``move`` to start from, the
        prior's rotation ``given``, and the ``offset`` of the move from its middle, all in float64; shifts are in units
        of the box over 2π, ``precision`` is one over twice the variances of turn and shift. ``step`` are voxels of the
        space per cycle per box. At most ``most`` steps are made, none that would gain less than ``enough`` nats or turn
        by more than ``longest``.

        Returns 40 numbers of each view, in float64: rotation (9), move (2), Hessian of the data (25), gain at the start
        and at the end, how often it was compared, power of the model.
        """
        ...


def unpacked(packed: Float[Tensor, "*p g 13"]) -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariances and amplitudes, or gradients of these, from the rows in which kernels return them."""
    return packed[..., :3], packed[..., 3:12].reshape(*packed.shape[:-1], 3, 3), packed[..., 12]


def backend(device: torch.device) -> Kernels:
    """The kernels for data on ``device``."""
    if device.type == "cpu":
        from emsplat.kernels import cpu

        return cpu
    if device.type == "cuda":
        from emsplat.kernels import gpu

        return gpu
    raise EmsplatError(f"emsplat has no kernels for the device {device}; expected cpu or cuda")
