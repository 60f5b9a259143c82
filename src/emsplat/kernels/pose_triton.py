"""Device code of what images say of their poses (Triton); `emsplat.kernels.gpu` launches it.

An image is compared with a slice of a volume, and with the derivatives of that slice by turns and shifts: the window's
own derivatives, so that a search sees one function. One warp takes POINTS coefficients at a time; the four complex
neighbours of each along x lie next to each other in memory and serve the value and all three derivatives. Sums are in a
fixed order, the same in each run. native/pose_kernel.hpp does the same on a CPU.
"""

import triton
import triton.language as tl

from emsplat.kernels.insert_triton import taps

# Of a view: twice the overlap of image and model less its power, that power, slope (5), upper half of the Hessian (15).
SUMS = tl.constexpr(22)


@triton.jit
def _sample(space, polynomials, slopes, x, y, z, here, side, DEGREE: tl.constexpr):
    """Values at points (voxels from the origin) and their derivatives along x, y, z, each real and imaginary."""
    flip = tl.where(x < 0, -1.0, 1.0)
    middle = side // 2  # reach + 1
    width = side // 2 + 2
    # Positions are above 0 here, so that truncation rounds down.
    x, y, z = flip * x, flip * y + middle, flip * z + middle
    ix, iy, iz = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
    x, y, z = x - ix, y - iy, z - iz
    tap = tl.arange(0, 4)[None, :]
    at = space + 2 * (((iz - 1).to(tl.int64) * side + (iy - 1)) * width + ix)[:, None] + 2 * tap
    mask = here[:, None]
    plain_re = 0.0 * x[:, None] + 0.0 * tap
    plain_im, re_by_y, im_by_y, re_by_z, im_by_z = plain_re, plain_re, plain_re, plain_re, plain_re
    for plane in range(4):  # not unrolled: all rows at once would not fit the registers
        row_re, row_im, re_by, im_by = 0.0 * plain_re, 0.0 * plain_re, 0.0 * plain_re, 0.0 * plain_re
        for line in tl.static_range(4):
            along, slope = taps(polynomials, y, line, DEGREE)[:, None], taps(slopes, y, line, DEGREE - 1)[:, None]
            row = at + 2 * line * width
            re, im = tl.load(row, mask=mask, other=0.0), tl.load(row + 1, mask=mask, other=0.0)
            row_re += re * along
            row_im += im * along
            re_by += re * slope
            im_by += im * slope
        along, slope = taps(polynomials, z, plane, DEGREE)[:, None], taps(slopes, z, plane, DEGREE - 1)[:, None]
        plain_re += row_re * along
        plain_im += row_im * along
        re_by_y += re_by * along
        im_by_y += im_by * along
        re_by_z += row_re * slope
        im_by_z += row_im * slope
        at += 2 * side * width
    along, slope = taps(polynomials, x[:, None], tap, DEGREE), taps(slopes, x[:, None], tap, DEGREE - 1)
    re, im = tl.sum(plain_re * along, 1), tl.sum(plain_im * along, 1)
    re_x, im_x = tl.sum(plain_re * slope, 1), tl.sum(plain_im * slope, 1)
    re_y, im_y = tl.sum(re_by_y * along, 1), tl.sum(im_by_y * along, 1)
    re_z, im_z = tl.sum(re_by_z * along, 1), tl.sum(im_by_z * along, 1)
    # The value at -k is the conjugate of that at k, the gradient minus the conjugate.
    return re, flip * im, flip * re_x, im_x, flip * re_y, im_y, flip * re_z, im_z


@triton.jit(do_not_specialize=("points", "stride", "side", "furthest", "per_program", "parts"))
def pose_kernel(
    space,
    value,
    transfer,
    point,
    magnification,
    image,
    rotation,
    phases,
    polynomials,
    slopes,
    sums,
    points,
    stride,
    side,
    furthest,
    step,
    per_program,
    parts,
    DEGREE: tl.constexpr,
    POINTS: tl.constexpr,
):
    """The sums of one view (program axis 0) over ``per_program`` times POINTS coefficients (axis 1).

    ``rotation`` and ``phases`` are of views, ``image`` says of which image each is. ``phases`` move the image to where
    the model is: complex factors of kx = 0 to ``furthest``, then those of ky = -``furthest`` to ``furthest``. ``step``
    are voxels of the volume per cycle per image.
    """
    view = tl.program_id(0).to(tl.int64)
    own = tl.load(image + view).to(tl.int64)
    at = rotation + 9 * view
    a0, a1, a2 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    b0, b1, b2 = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    c0, c1, c2 = tl.load(at + 6), tl.load(at + 7), tl.load(at + 8)
    at = magnification + 4 * own
    m0, m1, m2, m3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    phases += 2 * view * (3 * furthest + 2)
    value += 2 * own * stride
    transfer += own * stride
    reach = (side // 2 - 1).to(tl.float32)

    gain = tl.zeros((POINTS,), dtype=tl.float32)
    power, s0, s1, s2, s3, s4 = gain, gain, gain, gain, gain, gain
    h00, h01, h02, h03, h04, h11, h12, h13 = gain, gain, gain, gain, gain, gain, gain, gain
    h14, h22, h23, h24, h33, h34, h44 = gain, gain, gain, gain, gain, gain, gain
    first = tl.program_id(1) * per_program
    for block in range(first, first + per_program):
        index = block * POINTS + tl.arange(0, POINTS)
        here = index < points
        jx, jy = tl.load(point + 2 * index, mask=here, other=0), tl.load(point + 2 * index + 1, mask=here, other=0)
        kx, ky = jx.to(tl.float32), jy.to(tl.float32)
        # Frequency k of the image lies at M k of the undistorted one.
        ux, uy = step * (m0 * kx + m1 * ky), step * (m2 * kx + m3 * ky)
        x, y, z = ux * a0 + uy * b0, ux * a1 + uy * b1, ux * a2 + uy * b2
        here = here & (tl.abs(x) < reach) & (tl.abs(y) < reach) & (tl.abs(z) < reach)
        x, y, z = tl.where(here, x, 0.0), tl.where(here, y, 0.0), tl.where(here, z, 0.0)
        re, im, re_x, im_x, re_y, im_y, re_z, im_z = _sample(space, polynomials, slopes, x, y, z, here, side, DEGREE)
        c = tl.load(transfer + index, mask=here, other=0.0)
        re, im = c * re, c * im
        # Along the axes of the image.
        re_0, im_0 = c * (a0 * re_x + a1 * re_y + a2 * re_z), c * (a0 * im_x + a1 * im_y + a2 * im_z)
        re_1, im_1 = c * (b0 * re_x + b1 * re_y + b2 * re_z), c * (b0 * im_x + b1 * im_y + b2 * im_z)
        re_2, im_2 = c * (c0 * re_x + c1 * re_y + c2 * re_z), c * (c0 * im_x + c1 * im_y + c2 * im_z)
        p0, q0, p1, q1 = -uy * re_2, -uy * im_2, ux * re_2, ux * im_2
        p2, q2 = uy * re_0 - ux * re_1, uy * im_0 - ux * im_1
        p3, q3, p4, q4 = -kx * im, kx * re, -ky * im, ky * re

        at_x, at_y = phases + 2 * jx, phases + 2 * (2 * furthest + 1 + jy)
        ex, fx = tl.load(at_x, mask=here, other=0.0), tl.load(at_x + 1, mask=here, other=0.0)
        ey, fy = tl.load(at_y, mask=here, other=0.0), tl.load(at_y + 1, mask=here, other=0.0)
        cosine, sine = ex * ey - fx * fy, ex * fy + fx * ey
        seen_re = tl.load(value + 2 * index, mask=here, other=0.0)
        seen_im = tl.load(value + 2 * index + 1, mask=here, other=0.0)
        image_re, image_im = seen_re * cosine - seen_im * sine, seen_re * sine + seen_im * cosine
        left_re, left_im = image_re - re, image_im - im
        own_power = re * re + im * im
        power += own_power
        gain += 2 * (image_re * re + image_im * im) - own_power
        s0 += left_re * p0 + left_im * q0
        s1 += left_re * p1 + left_im * q1
        s2 += left_re * p2 + left_im * q2
        s3 += left_re * p3 + left_im * q3
        s4 += left_re * p4 + left_im * q4
        h00 += p0 * p0 + q0 * q0
        h01 += p0 * p1 + q0 * q1
        h02 += p0 * p2 + q0 * q2
        h03 += p0 * p3 + q0 * q3
        h04 += p0 * p4 + q0 * q4
        h11 += p1 * p1 + q1 * q1
        h12 += p1 * p2 + q1 * q2
        h13 += p1 * p3 + q1 * q3
        h14 += p1 * p4 + q1 * q4
        h22 += p2 * p2 + q2 * q2
        h23 += p2 * p3 + q2 * q3
        h24 += p2 * p4 + q2 * q4
        h33 += p3 * p3 + q3 * q3
        h34 += p3 * p4 + q3 * q4
        h44 += p4 * p4 + q4 * q4

    out = sums + SUMS * (view * parts + tl.program_id(1))
    tl.store(out, tl.sum(gain, 0))
    tl.store(out + 1, tl.sum(power, 0))
    tl.store(out + 2, tl.sum(s0, 0))
    tl.store(out + 3, tl.sum(s1, 0))
    tl.store(out + 4, tl.sum(s2, 0))
    tl.store(out + 5, tl.sum(s3, 0))
    tl.store(out + 6, tl.sum(s4, 0))
    tl.store(out + 7, tl.sum(h00, 0))
    tl.store(out + 8, tl.sum(h01, 0))
    tl.store(out + 9, tl.sum(h02, 0))
    tl.store(out + 10, tl.sum(h03, 0))
    tl.store(out + 11, tl.sum(h04, 0))
    tl.store(out + 12, tl.sum(h11, 0))
    tl.store(out + 13, tl.sum(h12, 0))
    tl.store(out + 14, tl.sum(h13, 0))
    tl.store(out + 15, tl.sum(h14, 0))
    tl.store(out + 16, tl.sum(h22, 0))
    tl.store(out + 17, tl.sum(h23, 0))
    tl.store(out + 18, tl.sum(h24, 0))
    tl.store(out + 19, tl.sum(h33, 0))
    tl.store(out + 20, tl.sum(h34, 0))
    tl.store(out + 21, tl.sum(h44, 0))
