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

// The four weights of a point `fraction` beyond the second tap, and behind them their derivatives.
struct Weights {
    eight both;

    Weights(const float* polynomials, float fraction) {
        const eight* rows = reinterpret_cast<const eight*>(polynomials);
        both = rows[0];
        for (int power = 1; power <= DEGREE; ++power) both = both * fraction + rows[power];
    }
    float value(int tap) const { return both[tap]; }
    float slope(int tap) const { return both[TAPS + tap]; }
};

// Four complex neighbours, weighted.
inline void sum_pairs(const eight& v, const eight& w, int first, float& re, float& im) {
    re = (v[0] * w[first] + v[2] * w[first + 1]) + (v[4] * w[first + 2] + v[6] * w[first + 3]);
    im = (v[1] * w[first] + v[3] * w[first + 1]) + (v[5] * w[first + 2] + v[7] * w[first + 3]);
}

// The value at a point (in voxels from the origin) and its derivatives along x, y, z, complex.
inline void sample(const Volume& volume, const float* polynomials, float x, float y, float z, float out[8]) {
    const bool mirrored = x < 0;
    if (mirrored) x = -x, y = -y, z = -z;
    const float middle = float(volume.reach + 1);
    y += middle, z += middle;
    const int ix = int(x), iy = int(y), iz = int(z);  // not negative, so that truncation rounds down
    const Weights along_x(polynomials, x - ix), along_y(polynomials, y - iy), along_z(polynomials, z - iz);
    const size_t side = volume.side(), width = volume.width();
    const float* plane = volume.data + 2 * ((size_t(iz - 1) * side + (iy - 1)) * width + ix);
    eight plain = {}, by_y = {}, by_z = {};
    for (int tz = 0; tz < TAPS; ++tz, plane += 2 * side * width) {
        eight value = {}, slope = {};
        for (int ty = 0; ty < TAPS; ++ty) {
            const eight row = *reinterpret_cast<const loose_eight*>(plane + 2 * ty * width);
            value += row * along_y.value(ty);
            slope += row * along_y.slope(ty);
        }
        plain += value * along_z.value(tz);
        by_y += slope * along_z.value(tz);
        by_z += value * along_z.slope(tz);
    }
    sum_pairs(plain, along_x.both, 0, out[0], out[1]);
    sum_pairs(plain, along_x.both, TAPS, out[2], out[3]);
    sum_pairs(by_y, along_x.both, 0, out[4], out[5]);
    sum_pairs(by_z, along_x.both, 0, out[6], out[7]);
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
