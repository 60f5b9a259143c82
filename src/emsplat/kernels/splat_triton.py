"""Device code of the two operators (Triton); `emsplat.kernels.gpu` launches it.

One warp draws one Gaussian: its footprint in tiles of ROWS x COLUMNS pixels, as a rule a single one. The geometry of a
view is worked out where it is needed, 80 operations beside some 100 pixels, so that nothing is stored per Gaussian and
image. Going forward the warps add to the images with atomic operations in float32: terms in any order, so that a pixel
may differ from run to run by its rounding, n ε of its value at most for n overlapping Gaussians. Going back a warp
gathers: every gradient is a sum in a fixed order, the same in each run.

A Gaussian with centre (x, y) and conic (a, b, c) adds w exp(-½(a dx² + 2b dx dy + c dy²)) wherever the exponent is
within the cut. The factor -½ log2(e) is put into a, b, c beforehand, as exp2 is what the hardware computes.
"""

import triton
import triton.language as tl

HALF_LOG2E = tl.constexpr(0.7213475204444817)
INVERSE_2PI = tl.constexpr(0.15915494309189535)
INVERSE_2PI_15 = tl.constexpr(0.06349363593424097)  # (2π)^-1.5

# Counts that change from call to call: a kernel would be compiled anew for each that is 1 or a multiple of 16.
_COUNTS = ("gaussians", "images", "size", "parts", "per_program", "apart")


@triton.jit
def _area(size):
    """Pixels of an image, in 64 bits: a stack may have more than 32 can count."""
    return tl.full((), size, tl.int64) * size


@triton.jit
def _span(centre, half, size):
    """First pixel of a footprint and the one after its last; both inside the image, also for centres that are not
    finite."""
    first = tl.minimum(tl.maximum(tl.ceil(centre - half), 0.0), size)
    last = tl.minimum(tl.maximum(tl.floor(centre + half) + 1.0, 0.0), size)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _add_splat(image, x, y, a, b, c, hx, hy, weight, size, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds a splat to an image of ``size`` pixels; a, b, c and ``limit`` are of base 2, hx and hy half extents."""
    line, lane = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    first_row, last_row = _span(y, hy, size)
    first_column, last_column = _span(x, hx, size)
    for row0 in range(first_row, last_row, ROWS):
        row = row0 + line
        dy = (row - y)[:, None]
        for column0 in range(first_column, last_column, COLUMNS):
            column = column0 + lane
            dx = (column - x)[None, :]
            exponent = a * dx * dx + (2 * b * dx + c * dy) * dy
            inside = (exponent <= limit) & (row < last_row)[:, None] & (column < last_column)[None, :]
            value = weight * tl.exp2(-exponent)
            tl.atomic_add(image + row[:, None] * size + column[None, :], value, mask=inside, sem="relaxed")


@triton.jit
def _moments(upstream, x, y, a, b, c, hx, hy, size, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Moments of upstream * exp(...) about the centre: 1, dx, dy, dx², dx dy, dy², each as COLUMNS partial sums.

    The columns are added up by the caller, once for all images of a Gaussian.
    """
    line, lane = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    first_row, last_row = _span(y, hy, size)
    first_column, last_column = _span(x, hx, size)
    m0 = tl.zeros((COLUMNS,), dtype=x.dtype)
    mx, my, mxx, mxy, myy = m0, m0, m0, m0, m0
    for column0 in range(first_column, last_column, COLUMNS):
        column = column0 + lane
        dx = column - x
        # Only dy changes down a column, so three sums over the rows are enough.
        s0 = tl.zeros((ROWS, COLUMNS), dtype=x.dtype)
        s1, s2 = s0, s0
        for row0 in range(first_row, last_row, ROWS):
            row = row0 + line
            dy = (row - y)[:, None]
            exponent = a * (dx * dx)[None, :] + (2 * b * dx[None, :] + c * dy) * dy
            inside = (exponent <= limit) & (row < last_row)[:, None] & (column < last_column)[None, :]
            seen = tl.load(upstream + row[:, None] * size + column[None, :], mask=inside, other=0.0)
            value = seen * tl.exp2(-tl.where(inside, exponent, 0.0))
            s0 += value
            s1 += value * dy
            s2 += value * dy * dy
        t0, t1, t2 = tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0)
        m0 += t0
        mx += dx * t0
        my += t1
        mxx += dx * dx * t0
        mxy += dx * t1
        myy += t2
    return m0, mx, my, mxx, mxy, myy


@triton.jit
def _load_gaussian(mean, covariance, amplitude, index):
    """Amplitude, mean and the six numbers of the covariance, whose two halves are averaged."""
    at = covariance + 9 * index
    sxy = 0.5 * (tl.load(at + 1) + tl.load(at + 3))
    sxz = 0.5 * (tl.load(at + 2) + tl.load(at + 6))
    syz = 0.5 * (tl.load(at + 5) + tl.load(at + 7))
    px, py, pz = tl.load(mean + 3 * index), tl.load(mean + 3 * index + 1), tl.load(mean + 3 * index + 2)
    return tl.load(amplitude + index), px, py, pz, tl.load(at), sxy, sxz, tl.load(at + 4), syz, tl.load(at + 8)


@triton.jit
def _load_view(rotation, shift, index):
    """The first two rows of a rotation, and the shift."""
    at = rotation + 9 * index
    u0, u1, u2 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    v0, v1, v2 = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    return u0, u1, u2, v0, v1, v2, tl.load(shift + 2 * index), tl.load(shift + 2 * index + 1)


@triton.jit
def _see(px, py, pz, sxx, sxy, sxz, syy, syz, szz, u0, u1, u2, v0, v1, v2, shift_x, shift_y, scale, size, cutoff):
    """Centre in pixels, conic, half extents of the footprint and 1/(2π√det) of a Gaussian seen in a view."""
    ux = sxx * u0 + sxy * u1 + sxz * u2
    uy = sxy * u0 + syy * u1 + syz * u2
    uz = sxz * u0 + syz * u1 + szz * u2
    vx = sxx * v0 + sxy * v1 + sxz * v2
    vy = sxy * v0 + syy * v1 + syz * v2
    vz = sxz * v0 + syz * v1 + szz * v2
    cxx = (u0 * ux + u1 * uy + u2 * uz) * scale * scale
    cxy = (v0 * ux + v1 * uy + v2 * uz) * scale * scale
    cyy = (v0 * vx + v1 * vy + v2 * vz) * scale * scale
    inverse = 1.0 / (cxx * cyy - cxy * cxy)
    x = (u0 * px + u1 * py + u2 * pz - shift_x) * scale + size // 2
    y = (v0 * px + v1 * py + v2 * pz - shift_y) * scale + size // 2
    hx, hy = cutoff * tl.sqrt(cxx), cutoff * tl.sqrt(cyy)
    return x, y, cyy * inverse, -cxy * inverse, cxx * inverse, hx, hy, tl.sqrt(inverse) * INVERSE_2PI


@triton.jit(do_not_specialize=_COUNTS)
def project_kernel(
    mean,
    covariance,
    amplitude,
    rotation,
    shift,
    image,
    images,
    size,
    scale,
    cutoff,
    per_program,
    apart,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Draws one Gaussian (program axis 0) into ``per_program`` images (axis 1).

    ``apart`` is 0, or for images with mixtures of their own (one per program) how many Gaussians these have.
    """
    own = tl.program_id(0) + tl.program_id(1).to(tl.int64) * apart
    w, px, py, pz, sxx, sxy, sxz, syy, syz, szz = _load_gaussian(mean, covariance, amplitude, own)
    limit = cutoff * cutoff * HALF_LOG2E
    area = _area(size)
    first = tl.program_id(1) * per_program
    for index in range(first, tl.minimum(first + per_program, images)):
        u0, u1, u2, v0, v1, v2, shift_x, shift_y = _load_view(rotation, shift, index)
        x, y, a, b, c, hx, hy, norm = _see(
            px, py, pz, sxx, sxy, sxz, syy, syz, szz, u0, u1, u2, v0, v1, v2, shift_x, shift_y, scale, size, cutoff
        )
        at = image + index * area
        a, b, c = a * HALF_LOG2E, b * HALF_LOG2E, c * HALF_LOG2E
        _add_splat(at, x, y, a, b, c, hx, hy, w * norm, size, limit, ROWS, COLUMNS)


@triton.jit
def _plane_gradient(m0, mx, my, mxx, mxy, myy, a, b, c, weight, scale):
    """Gradients with respect to the centre in the image (Å) and its covariance (Å²) from the moments.

    With P the conic and M the second moments: w P m and ½ w (P M P - m0 P).
    """
    gx = weight * scale * (a * mx + b * my)
    gy = weight * scale * (b * mx + c * my)
    pxx, pxy = a * mxx + b * mxy, a * mxy + b * myy
    pyx, pyy = b * mxx + c * mxy, b * mxy + c * myy
    half = 0.5 * weight * scale * scale
    dxx = half * (pxx * a + pxy * b - m0 * a)
    dxy = half * (pxx * b + pxy * c - m0 * b)
    dyy = half * (pyx * b + pyy * c - m0 * c)
    return gx, gy, dxx, dxy, dyy


@triton.jit
def _store_gradient(at, gx, gy, gz, dxx, dxy, dxz, dyy, dyz, dzz, dw):
    """Mean, covariance (all nine entries) and amplitude, the partial sums added up."""
    tl.store(at, tl.sum(gx, 0))
    tl.store(at + 1, tl.sum(gy, 0))
    tl.store(at + 2, tl.sum(gz, 0))
    xx, xy, xz = tl.sum(dxx, 0), tl.sum(dxy, 0), tl.sum(dxz, 0)
    yy, yz, zz = tl.sum(dyy, 0), tl.sum(dyz, 0), tl.sum(dzz, 0)
    tl.store(at + 3, xx)
    tl.store(at + 4, xy)
    tl.store(at + 5, xz)
    tl.store(at + 6, xy)
    tl.store(at + 7, yy)
    tl.store(at + 8, yz)
    tl.store(at + 9, xz)
    tl.store(at + 10, yz)
    tl.store(at + 11, zz)
    tl.store(at + 12, tl.sum(dw, 0))


@triton.jit(do_not_specialize=_COUNTS)
def project_gradient_kernel(
    mean,
    covariance,
    amplitude,
    rotation,
    shift,
    upstream,
    gradient,
    gaussians,
    images,
    size,
    scale,
    cutoff,
    per_program,
    apart,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of one Gaussian (program axis 0) from ``per_program`` images (axis 1): 13 numbers each. ``apart`` as
    in `project_kernel`."""
    own = tl.program_id(0) + tl.program_id(1).to(tl.int64) * apart
    w, px, py, pz, sxx, sxy, sxz, syy, syz, szz = _load_gaussian(mean, covariance, amplitude, own)
    limit = cutoff * cutoff * HALF_LOG2E
    gx3 = tl.zeros((COLUMNS,), dtype=px.dtype)
    gy3, gz3, dw, dxx, dxy, dxz, dyy, dyz, dzz = gx3, gx3, gx3, gx3, gx3, gx3, gx3, gx3, gx3
    area = _area(size)
    first = tl.program_id(1) * per_program
    for index in range(first, tl.minimum(first + per_program, images)):
        u0, u1, u2, v0, v1, v2, shift_x, shift_y = _load_view(rotation, shift, index)
        x, y, a, b, c, hx, hy, norm = _see(
            px, py, pz, sxx, sxy, sxz, syy, syz, szz, u0, u1, u2, v0, v1, v2, shift_x, shift_y, scale, size, cutoff
        )
        at = upstream + index * area
        a2, b2, c2 = a * HALF_LOG2E, b * HALF_LOG2E, c * HALF_LOG2E
        m0, mx, my, mxx, mxy, myy = _moments(at, x, y, a2, b2, c2, hx, hy, size, limit, ROWS, COLUMNS)
        gx, gy, fxx, fxy, fyy = _plane_gradient(m0, mx, my, mxx, mxy, myy, a, b, c, w * norm, scale)
        dw += norm * m0
        gx3 += u0 * gx + v0 * gy
        gy3 += u1 * gx + v1 * gy
        gz3 += u2 * gx + v2 * gy
        # Uᵀ F U with the rows u and v of the rotation
        qu0, qu1, qu2 = fxx * u0 + fxy * v0, fxx * u1 + fxy * v1, fxx * u2 + fxy * v2
        qv0, qv1, qv2 = fxy * u0 + fyy * v0, fxy * u1 + fyy * v1, fxy * u2 + fyy * v2
        dxx += u0 * qu0 + v0 * qv0
        dxy += u0 * qu1 + v0 * qv1
        dxz += u0 * qu2 + v0 * qv2
        dyy += u1 * qu1 + v1 * qv1
        dyz += u1 * qu2 + v1 * qv2
        dzz += u2 * qu2 + v2 * qv2
    row = tl.program_id(1).to(tl.int64) * gaussians + tl.program_id(0)
    _store_gradient(gradient + 13 * row, gx3, gy3, gz3, dxx, dxy, dxz, dyy, dyz, dzz, dw)


@triton.jit(do_not_specialize=_COUNTS)
def pose_gradient_kernel(
    mean,
    covariance,
    amplitude,
    rotation,
    shift,
    upstream,
    gradient,
    gaussians,
    parts,
    size,
    scale,
    cutoff,
    per_program,
    apart,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of one image's pose (program axis 0) from ``per_program`` Gaussians (axis 1): the first two rows of
    the rotation and the shift, 8 numbers. ``apart`` as in `project_kernel`."""
    image = tl.program_id(0)
    before = image.to(tl.int64) * apart
    u0, u1, u2, v0, v1, v2, shift_x, shift_y = _load_view(rotation, shift, image)
    at = upstream + image * _area(size)
    limit = cutoff * cutoff * HALF_LOG2E
    r0 = tl.zeros((COLUMNS,), dtype=u0.dtype)
    r1, r2, r3, r4, r5, sum_x, sum_y = r0, r0, r0, r0, r0, r0, r0
    first = tl.program_id(1) * per_program
    for index in range(first, tl.minimum(first + per_program, gaussians)):
        w, px, py, pz, sxx, sxy, sxz, syy, syz, szz = _load_gaussian(mean, covariance, amplitude, before + index)
        x, y, a, b, c, hx, hy, norm = _see(
            px, py, pz, sxx, sxy, sxz, syy, syz, szz, u0, u1, u2, v0, v1, v2, shift_x, shift_y, scale, size, cutoff
        )
        a2, b2, c2 = a * HALF_LOG2E, b * HALF_LOG2E, c * HALF_LOG2E
        m0, mx, my, mxx, mxy, myy = _moments(at, x, y, a2, b2, c2, hx, hy, size, limit, ROWS, COLUMNS)
        gx, gy, fxx, fxy, fyy = _plane_gradient(m0, mx, my, mxx, mxy, myy, a, b, c, w * norm, scale)
        qu0, qu1, qu2 = fxx * u0 + fxy * v0, fxx * u1 + fxy * v1, fxx * u2 + fxy * v2
        qv0, qv1, qv2 = fxy * u0 + fyy * v0, fxy * u1 + fyy * v1, fxy * u2 + fyy * v2
        # g pᵀ + 2 F U Σ
        r0 += gx * px + 2 * (qu0 * sxx + qu1 * sxy + qu2 * sxz)
        r1 += gx * py + 2 * (qu0 * sxy + qu1 * syy + qu2 * syz)
        r2 += gx * pz + 2 * (qu0 * sxz + qu1 * syz + qu2 * szz)
        r3 += gy * px + 2 * (qv0 * sxx + qv1 * sxy + qv2 * sxz)
        r4 += gy * py + 2 * (qv0 * sxy + qv1 * syy + qv2 * syz)
        r5 += gy * pz + 2 * (qv0 * sxz + qv1 * syz + qv2 * szz)
        sum_x -= gx
        sum_y -= gy
    out = gradient + 8 * (image.to(tl.int64) * parts + tl.program_id(1))
    tl.store(out, tl.sum(r0, 0))
    tl.store(out + 1, tl.sum(r1, 0))
    tl.store(out + 2, tl.sum(r2, 0))
    tl.store(out + 3, tl.sum(r3, 0))
    tl.store(out + 4, tl.sum(r4, 0))
    tl.store(out + 5, tl.sum(r5, 0))
    tl.store(out + 6, tl.sum(sum_x, 0))
    tl.store(out + 7, tl.sum(sum_y, 0))


@triton.jit
def _solid(sxx, sxy, sxz, syy, syz, szz):
    """A 3D Gaussian cut at z = const is a 2D Gaussian whose conic does not depend on z: how its centre moves with z,
    its covariance, its conic, and 1/((2π)^1.5 √det Σ)."""
    slope_x, slope_y = sxz / szz, syz / szz
    cxx, cxy, cyy = sxx - sxz * slope_x, sxy - sxz * slope_y, syy - syz * slope_y
    inverse = 1.0 / (cxx * cyy - cxy * cxy)
    norm = tl.sqrt(inverse / szz) * INVERSE_2PI_15
    return slope_x, slope_y, cxx, cyy, cyy * inverse, -cxy * inverse, cxx * inverse, norm


@triton.jit(do_not_specialize=_COUNTS)
def voxelize_kernel(
    mean, covariance, amplitude, volume, size, scale, cutoff, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Draws every ``parts``-th slice of one Gaussian (program axis 0), starting with that of program axis 1."""
    w, px, py, pz, sxx, sxy, sxz, syy, syz, szz = _load_gaussian(mean, covariance, amplitude, tl.program_id(0))
    s2 = scale * scale
    szz = szz * s2
    slope_x, slope_y, cxx, cyy, a, b, c, norm = _solid(sxx * s2, sxy * s2, sxz * s2, syy * s2, syz * s2, szz)
    a, b, c = a * HALF_LOG2E, b * HALF_LOG2E, c * HALF_LOG2E
    x, y, z = px * scale + size // 2, py * scale + size // 2, pz * scale + size // 2
    first, last = _span(z, cutoff * tl.sqrt(szz), size)
    area = _area(size)
    for slice_ in range(first + tl.program_id(1), last, parts):
        dz = slice_ - z
        left = tl.maximum(cutoff * cutoff - dz * dz / szz, 0.0)
        weight = w * norm * tl.exp2(-(dz * dz / szz) * HALF_LOG2E)
        at = volume + slice_ * area
        hx, hy = tl.sqrt(left * cxx), tl.sqrt(left * cyy)
        _add_splat(
            at, x + slope_x * dz, y + slope_y * dz, a, b, c, hx, hy, weight, size, left * HALF_LOG2E, ROWS, COLUMNS
        )


@triton.jit(do_not_specialize=_COUNTS)
def voxelize_gradient_kernel(
    mean,
    covariance,
    amplitude,
    upstream,
    gradient,
    gaussians,
    size,
    scale,
    cutoff,
    parts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of one Gaussian (program axis 0) from every ``parts``-th slice (axis 1): 13 numbers each."""
    w, px, py, pz, sxx, sxy, sxz, syy, syz, szz = _load_gaussian(mean, covariance, amplitude, tl.program_id(0))
    s2 = scale * scale
    szz = szz * s2
    slope_x, slope_y, cxx, cyy, a, b, c, norm = _solid(sxx * s2, sxy * s2, sxz * s2, syy * s2, syz * s2, szz)
    a2, b2, c2 = a * HALF_LOG2E, b * HALF_LOG2E, c * HALF_LOG2E
    x, y, z = px * scale + size // 2, py * scale + size // 2, pz * scale + size // 2
    t0 = tl.zeros((COLUMNS,), dtype=px.dtype)
    tx, ty, tz, txx, txy, txz, tyy, tyz, tzz = t0, t0, t0, t0, t0, t0, t0, t0, t0
    first, last = _span(z, cutoff * tl.sqrt(szz), size)
    area = _area(size)
    for slice_ in range(first + tl.program_id(1), last, parts):
        dz = slice_ - z
        left = tl.maximum(cutoff * cutoff - dz * dz / szz, 0.0)
        weight = tl.exp2(-(dz * dz / szz) * HALF_LOG2E)
        at = upstream + slice_ * area
        hx, hy = tl.sqrt(left * cxx), tl.sqrt(left * cyy)
        ex, ey = slope_x * dz, slope_y * dz
        m0, mx, my, mxx, mxy, myy = _moments(
            at, x + ex, y + ey, a2, b2, c2, hx, hy, size, left * HALF_LOG2E, ROWS, COLUMNS
        )
        # From the slice's centre to the Gaussian's.
        nx, ny = mx + ex * m0, my + ey * m0
        t0 += weight * m0
        tx += weight * nx
        ty += weight * ny
        tz += weight * dz * m0
        txx += weight * (mxx + ex * (mx + nx))
        txy += weight * (mxy + ex * my + ey * nx)
        txz += weight * dz * nx
        tyy += weight * (myy + ey * (my + ny))
        tyz += weight * dz * ny
        tzz += weight * dz * dz * m0
    # With P = Σ⁻¹ and M the second moments: w P m and ½ w (P M P - m0 P).
    pxz, pyz = -(a * slope_x + b * slope_y), -(b * slope_x + c * slope_y)
    pzz = 1.0 / szz - pxz * slope_x - pyz * slope_y
    xx, xy, xz = a * txx + b * txy + pxz * txz, a * txy + b * tyy + pxz * tyz, a * txz + b * tyz + pxz * tzz
    yx, yy, yz = b * txx + c * txy + pyz * txz, b * txy + c * tyy + pyz * tyz, b * txz + c * tyz + pyz * tzz
    zx, zy, zz = pxz * txx + pyz * txy + pzz * txz, pxz * txy + pyz * tyy + pzz * tyz, pxz * txz + pyz * tyz + pzz * tzz
    first_order = w * norm * scale
    half = 0.5 * w * norm * s2
    row = tl.program_id(1).to(tl.int64) * gaussians + tl.program_id(0)
    _store_gradient(
        gradient + 13 * row,
        first_order * (a * tx + b * ty + pxz * tz),
        first_order * (b * tx + c * ty + pyz * tz),
        first_order * (pxz * tx + pyz * ty + pzz * tz),
        half * (xx * a + xy * b + xz * pxz - t0 * a),
        half * (xx * b + xy * c + xz * pyz - t0 * b),
        half * (xx * pxz + xy * pyz + xz * pzz - t0 * pxz),
        half * (yx * b + yy * c + yz * pyz - t0 * c),
        half * (yx * pxz + yy * pyz + yz * pzz - t0 * pyz),
        half * (zx * pxz + zy * pyz + zz * pzz - t0 * pzz),
        norm * t0,
    )
