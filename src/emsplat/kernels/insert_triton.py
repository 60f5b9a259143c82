"""Device code of the insertion of Fourier slices (Triton); `emsplat.kernels.gpu` launches it.

Each Fourier pixel of an image lies at k = kx a0 + ky a1, with a0 and a1 the first two rows of the rotation, and adds
itself to the 4 x 4 x 4 voxels around that point; one with x < 0 gives way to its Hermitian mirror. The voxels are added
to with atomic operations in float32, the four along x next to each other in memory: terms in any order, so that a sum
may differ from run to run by its rounding, n ε Σ|terms| at most and in practice √n ε of it for n terms.
"""

import triton
import triton.language as tl


@triton.jit
def taps(polynomials, fraction, tap, DEGREE: tl.constexpr):
    """The window, or its slope, at taps ``tap`` (broadcast against the fractions): polynomials, highest power first."""
    value = tl.load(polynomials + tap) + 0.0 * fraction
    for power in tl.static_range(1, DEGREE + 1):
        value = value * fraction + tl.load(polynomials + 4 * power + tap)
    return value


@triton.jit(do_not_specialize=("box", "side"))
def insert_kernel(
    numerator,
    weight,
    rotation,
    polynomials,
    total,
    total_weight,
    box,
    side,
    radius,
    step,
    DEGREE: tl.constexpr,
    POINTS: tl.constexpr,
):
    """POINTS coefficients (program axis 0) of one image (axis 1)."""
    image = tl.program_id(1)
    columns = box // 2 + 1
    point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    row, kx = point // columns, (point % columns).to(tl.float32)
    ky = tl.where(row < box // 2, row, row - box).to(tl.float32)
    at = rotation + 9 * image
    x = step * (kx * tl.load(at) + ky * tl.load(at + 3))
    y = step * (kx * tl.load(at + 1) + ky * tl.load(at + 4))
    z = step * (kx * tl.load(at + 2) + ky * tl.load(at + 5))
    here = (row < box) & (kx * kx + ky * ky < radius * radius)
    flip = tl.where(x < 0, -1.0, 1.0)
    middle = side // 2  # reach + 1
    x, y, z = flip * x, flip * y + middle, flip * z + middle
    # Positions are above 0 here, so that truncation rounds down.
    ix, iy, iz = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
    x, y, z = x - ix, y - iy, z - iz

    source = image.to(tl.int64) * box * columns + point
    # Coefficients of column kx = 0 stand in the half plane twice, as themselves and as their mirrors.
    share = tl.where(kx == 0, 0.5, 1.0)
    re = share * tl.load(numerator + 2 * source, mask=here, other=0.0)
    im = share * flip * tl.load(numerator + 2 * source + 1, mask=here, other=0.0)
    w = share * tl.load(weight + source, mask=here, other=0.0)

    width = side // 2 + 2
    four, eight = tl.arange(0, 4)[None, :], tl.arange(0, 8)[None, :]
    values = taps(polynomials, x[:, None], eight // 2, DEGREE) * tl.where(eight % 2 == 0, re[:, None], im[:, None])
    weights = taps(polynomials, x[:, None], four, DEGREE) * w[:, None]
    corner = ((iz - 1).to(tl.int64) * side + (iy - 1)) * width + ix
    mask = here[:, None]
    for plane in tl.static_range(4):
        along_z = taps(polynomials, z, plane, DEGREE)
        for line in tl.static_range(4):
            factor = (along_z * taps(polynomials, y, line, DEGREE))[:, None]
            start = (corner + (plane * side + line) * width)[:, None]
            tl.atomic_add(total + 2 * start + eight, values * factor, mask=mask, sem="relaxed")
            tl.atomic_add(total_weight + start + four, weights * factor, mask=mask, sem="relaxed")
