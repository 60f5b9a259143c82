"""What the GPU kernels could reach at best, worked out without a GPU: `roofline.py` prints the arithmetic.

The splatting kernels are bound by issuing instructions. Their machine code (sm_90, made by Triton's own compiler and
read with its own disassembler) has three nested loops: per view (geometry), per column of tiles, per tile. Footprints
of the mixture at hand say how many tiles there are. One warp draws one Gaussian, so

    instructions = views x (view + columns x (column + rows x tile)),   time >= instructions / (SMs x 4 x clock).

A tile has 4 exponentials per lane, for which the multifunction units (4 of a quarter of a multiprocessor) need 32 of
the 53 or more cycles that issuing its instructions takes: they are not the bound.

Images, transforms and CTFs are bound by memory: bytes read and written by each operation of PyTorch (`STEP_BYTES`, per
pixel of an image), over the bandwidth. The insertion is bound by the atomic units of the L2 cache: a coefficient adds
12 numbers to each of 16 rows of voxels, which lie in 3.1 sectors of 32 bytes on average (8 numbers from any even
place: 1.75; 4 from any place: 1.375), one sector per clock and slice.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from common import globule, random_poses
from emsplat.types import Gaussians, Grid, Poses

# Bytes per pixel of an image, a transform having half as many complex numbers: rfft and irfft 16 each (two passes),
# shift 16, CTF 7 operations of 26 in all, residual and power 30, gradient 20.
STEP_BYTES = 3 * 16 + 16 + 26 + 30 + 20
OBSERVE_BYTES = 16 + 16 + 26
SECTORS = 16 * (1.75 + 1.375)  # of atomic additions per Fourier coefficient


@dataclass(frozen=True)
class Machine:
    """What counts of a GPU."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s
    slices: int  # of the L2 cache

    @property
    def issue(self) -> float:
        """Warp instructions per second."""
        return 4 * self.multiprocessors * self.clock


H100 = Machine("H100 SXM, as its data sheet says", 132, 1.755e9, 3.35e12, 80)


@dataclass(frozen=True)
class Loops:
    """Machine instructions of a splatting kernel, those of inner loops not counted in outer ones."""

    view: int
    column: int
    tile: int


@cache
def splat_loops(name: str, capability: int = 90) -> Loops:
    """The loops of project, project_gradient, voxelize or voxelize_gradient (for the last two a view is a slice)."""
    lengths = []
    code = _disassemble(name, capability)
    labels = {}
    instructions = []
    for line in code.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    for place, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*\.(L_x_\d+)", instruction)
        if branch and labels[branch[1]] < place:
            lengths.append(place - labels[branch[1]] + 1)
    if len(lengths) != 3:
        raise RuntimeError(f"{name}: {len(lengths)} loops in the machine code; expected 3, count again")
    tile, column, view = sorted(lengths)
    return Loops(view - column, column - tile, tile)


def compiled(kernel, capability: int, **constants: int):
    """Machine code of a Triton kernel for GPUs of a compute capability (90 for 9.0), as `emsplat.kernels.gpu` launches
    it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = dict.fromkeys(("scale", "cutoff", "radius", "step"), "fp32")
    counts = ("images", "gaussians", "parts", "per_program", "apart", "size", "box", "side", "points", "stride")
    whole = dict.fromkeys((*counts, "furthest"), "i32") | dict.fromkeys(("point", "image"), "*i32")
    pixels = {"image": "*fp32"} if "point" not in kernel.arg_names else {}  # not a number of one, but images
    kinds = {name: (numbers | whole | pixels).get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _disassemble(name: str, capability: int) -> str:
    import triton

    from emsplat.kernels import gpu, splat_triton

    code = compiled(getattr(splat_triton, f"{name}_kernel"), capability, **gpu.TILE).asm["cubin"]
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([disassembler, "-c", file.name], check=True, capture_output=True, text=True).stdout


def _tiles(centre, half, size):
    """Tiles along x and along y of footprints."""
    from emsplat.kernels.gpu import TILE

    first, last = torch.ceil(centre - half).clamp(0, size), (torch.floor(centre + half) + 1).clamp(0, size)
    columns, rows = (last - first).unbind(-1)
    return torch.ceil(columns / TILE["COLUMNS"]), torch.ceil(rows / TILE["ROWS"])


def project_instructions(loops: Loops, gaussians: Gaussians, poses: Poses, grid: Grid, cutoff: float = 4.0) -> float:
    """Warp instructions per view, the mean over the poses."""
    rows = poses.rotation[:, None, :2]
    covariance = rows @ gaussians.covariance @ rows.mT / grid.pixel_size**2
    centre = (rows @ gaussians.mean[:, :, None]).squeeze(-1) / grid.pixel_size + grid.size // 2
    half = cutoff * covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    columns, lines = _tiles(centre, half, grid.size)
    return float((loops.view + columns * (loops.column + lines * loops.tile)).sum(1).mean())


def voxelize_instructions(loops: Loops, gaussians: Gaussians, grid: Grid, cutoff: float = 4.0) -> float:
    """Warp instructions of a volume, every slice of a Gaussian as wide as the middle one."""
    variance = gaussians.covariance.diagonal(dim1=-2, dim2=-1) / grid.pixel_size**2
    centre, half = gaussians.mean / grid.pixel_size + grid.size // 2, cutoff * variance.sqrt()
    slices = 2 * half[:, 2]
    columns, lines = _tiles(centre[:, :2], half[:, :2], grid.size)
    return float((slices * (loops.view + columns * (loops.column + lines * loops.tile))).sum())


def step_seconds(machine: Machine, instructions: float, size: int, batch: int) -> float:
    """Least time of an image-domain step, its splatting and its transforms one after the other."""
    return batch * (instructions / machine.issue + STEP_BYTES * size**2 / machine.bandwidth)


def accumulation_seconds(machine: Machine, size: int) -> float:
    """Least time of an image in the accumulation: half the coefficients within Nyquist, and the image."""
    coefficients = torch.pi * (size / 2) ** 2 / 2
    atomics = coefficients * SECTORS / (machine.slices * machine.clock)
    return atomics + OBSERVE_BYTES * size**2 / machine.bandwidth


def main():
    names = ("project", "project_gradient", "voxelize", "voxelize_gradient")
    loops = {name: splat_loops(name) for name in names}
    for name, counted in loops.items():
        print(f"{name}: instructions per view or slice {counted.view}, column {counted.column}, tile {counted.tile}")
    print(f"{H100.name}: {H100.issue:.2e} warp instructions/s, {H100.bandwidth:.2e} bytes/s")
    print("box  Gaussians  σ/px  million instructions per image  images/s at most")
    for size in (128, 192, 256):
        for count in (2_048, 10_000, 30_000, 50_000, 500_000):
            grid = Grid(size, 1.0)
            sigma = spacing(size, count)
            mixture, poses = globule(count, grid, sigma), random_poses(4)
            work = sum(project_instructions(loops[name], mixture, poses, grid) for name in names[:2])
            rate = 1 / step_seconds(H100, work, size, 1)
            print(f"{size}  {count:>9,}  {sigma:4.2f}  {work / 1e6:7.1f}  {rate:10,.0f}")
        print(f"{size}  accumulation: {1 / accumulation_seconds(H100, size):,.0f} images/s at most")


def spacing(size: int, count: int) -> float:
    """Width in pixels of so many Gaussians that fill a ball of 0.6 box lengths, 0.45 of their spacing."""
    return max(0.6, 0.45 * (4 / 3 * torch.pi * (0.3 * size) ** 3 / count) ** (1 / 3))


if __name__ == "__main__":
    main()
