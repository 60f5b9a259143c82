// Slices of one volume with their derivatives by the pose; included by splat_kernels.hpp, once per instruction set.
//
// The derivative is that of what is interpolated: the window's own, so that a search sees one function. A row of four
// taps along x is one vector, and serves the value and all three derivatives.
#pragma once

#include <stddef.h>

#include "insert_kernel.hpp"
#include "kernels.hpp"

namespace emsplat {
namespace {  // as everything in splat_kernels.hpp

// The derivatives of the four weights by the fraction.
inline quad tap_slopes(const float* polynomials, float fraction) {
    quad value = float(DEGREE) * *reinterpret_cast<const loose_quad*>(polynomials);
    for (int power = 1; power < DEGREE; ++power)
        value = value * fraction +
                float(DEGREE - power) * *reinterpret_cast<const loose_quad*>(polynomials + TAPS * power);
    return value;
}

// Real and imaginary parts of four neighbours, weighted.
inline void sum_pairs(const eight& v, const quad& w, float& re, float& im) {
    re = (v[0] * w[0] + v[2] * w[1]) + (v[4] * w[2] + v[6] * w[3]);
    im = (v[1] * w[0] + v[3] * w[1]) + (v[5] * w[2] + v[7] * w[3]);
}

// The value at a point (in voxels from the origin) and its derivatives along x, y, z, complex.
inline void sample(const Volume& volume, const float* polynomials, float x, float y, float z, float out[8]) {
    const bool mirrored = x < 0;
    if (mirrored) x = -x, y = -y, z = -z;
    const float middle = float(volume.reach + 1);
    y += middle, z += middle;
    const int ix = int(x), iy = int(y), iz = int(z);  // not negative, so that truncation rounds down
    const quad wx = taps(polynomials, x - ix), wy = taps(polynomials, y - iy), wz = taps(polynomials, z - iz);
    const quad dy = tap_slopes(polynomials, y - iy), dz = tap_slopes(polynomials, z - iz);
    const size_t side = volume.side(), width = volume.width();
    eight plain = {}, along_y = {}, along_z = {};
    for (int tz = 0; tz < TAPS; ++tz)
        for (int ty = 0; ty < TAPS; ++ty) {
            const eight row = *reinterpret_cast<const loose_eight*>(
                volume.data + 2 * ((size_t(iz - 1 + tz) * side + (iy - 1 + ty)) * width + ix));
            plain += row * (wz[tz] * wy[ty]);
            along_y += row * (wz[tz] * dy[ty]);
            along_z += row * (dz[tz] * wy[ty]);
        }
    sum_pairs(plain, wx, out[0], out[1]);
    sum_pairs(plain, tap_slopes(polynomials, x - ix), out[2], out[3]);
    sum_pairs(along_y, wx, out[4], out[5]);
    sum_pairs(along_z, wx, out[6], out[7]);
    // The value at -k is the conjugate of that at k, the gradient minus the conjugate.
    if (mirrored) out[1] = -out[1], out[2] = -out[2], out[4] = -out[4], out[6] = -out[6];
}

void pose_columns(const Sight& seen, const Volume& volume, const float* rotation, const float* phase, float* columns,
                  size_t stride) {
    const float *a = rotation, *m = seen.magnification;
    float *image = columns, *model = columns + stride, *turn[3], *shift[2];
    for (int k = 0; k < 3; ++k) turn[k] = columns + (2 + k) * stride;
    for (int k = 0; k < 2; ++k) shift[k] = columns + (5 + k) * stride;
    const float *of_x = phase, *of_y = phase + 2 * (seen.reach + 1) + 2 * seen.reach;
    for (int point = 0; point < seen.points; ++point) {
        const int jx = seen.point[2 * point], jy = seen.point[2 * point + 1];
        const float kx = float(jx), ky = float(jy), c = seen.transfer[point];
        // Frequency k of the image lies at M k of the undistorted one.
        const float ux = seen.step * (m[0] * kx + m[1] * ky), uy = seen.step * (m[2] * kx + m[3] * ky);
        float found[8];
        sample(volume, seen.polynomials, ux * a[0] + uy * a[3], ux * a[1] + uy * a[4], ux * a[2] + uy * a[5], found);
        const float ex = of_x[2 * jx], fx = of_x[2 * jx + 1], ey = of_y[2 * jy], fy = of_y[2 * jy + 1];
        const float cosine = ex * ey - fx * fy, sine = ex * fy + fx * ey;
        const float re = seen.value[2 * point], im = seen.value[2 * point + 1];
        const size_t at = 2 * size_t(point);
        image[at] = re * cosine - im * sine, image[at + 1] = re * sine + im * cosine;
        for (int part = 0; part < 2; ++part) {
            const float *g = found + 2 + part, value = c * found[part];
            const float gx = c * (a[0] * g[0] + a[1] * g[2] + a[2] * g[4]);
            const float gy = c * (a[3] * g[0] + a[4] * g[2] + a[5] * g[4]);
            const float gz = c * (a[6] * g[0] + a[7] * g[2] + a[8] * g[4]);
            model[at + part] = value;
            turn[0][at + part] = -uy * gz, turn[1][at + part] = ux * gz, turn[2][at + part] = uy * gx - ux * gy;
        }
        shift[0][at] = -kx * model[at + 1], shift[0][at + 1] = kx * model[at];
        shift[1][at] = -ky * model[at + 1], shift[1][at + 1] = ky * model[at];
    }
}

}  // namespace
}  // namespace emsplat
