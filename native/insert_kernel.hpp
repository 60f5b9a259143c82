// Insertion of central slices into a volume; included by splat_kernels.hpp, once per instruction set.
//
// Each Fourier pixel of an image lies at k = kx a0 + ky a1, with a0 and a1 the first two rows of the rotation, and adds
// itself to the 4 x 4 x 4 voxels around that point. A point with x < 0 is replaced by its Hermitian mirror. Planes of
// constant z are what threads share: in one row of a slice z is linear in kx, so the pixels that touch a slab of planes
// are an interval that need not be searched for.
#pragma once

#include <stddef.h>

#include "kernels.hpp"

namespace emsplat {
namespace {  // as everything in splat_kernels.hpp

typedef float quad __attribute__((vector_size(16)));
typedef float eight __attribute__((vector_size(32)));
typedef float loose_quad __attribute__((vector_size(16), aligned(4)));
typedef float loose_eight __attribute__((vector_size(32), aligned(4)));

// The four weights of a point `fraction` beyond the second tap.
inline quad taps(const float* polynomials, float fraction) {
    quad value = *reinterpret_cast<const loose_quad*>(polynomials);
    for (int power = 1; power <= DEGREE; ++power)
        value = value * fraction + *reinterpret_cast<const loose_quad*>(polynomials + TAPS * power);
    return value;
}

// Narrows [first, last] to where low <= offset + slope * k <= high, to be on the safe side by one.
inline void narrow(float offset, float slope, float low, float high, int& first, int& last) {
    if (slope < 0) {
        const float swap = low;
        low = -high, high = -swap, offset = -offset, slope = -slope;
    }
    if (slope < 1e-6f) {
        if (offset < low - 1 || offset > high + 1) last = first - 1;
        return;
    }
    const float from = (low - offset) / slope - 1, to = (high - offset) / slope + 1;
    if (from > float(first)) first = from < 1e6f ? int(from) : 1000000;
    if (to < float(last)) last = to > -1e6f ? int(to) : -1000000;
}

void insert(const Slices& slices, const HalfSpace& space, int z0, int z1) {
    const int box = slices.box, columns = box / 2 + 1, side = space.side(), width = space.width();
    const float middle = float(space.reach + 1);
    for (int image = 0; image < slices.images; ++image) {
        const float* a = slices.rotation + 9 * image;
        for (int row = 0; row < box; ++row) {
            const int ky = row < box / 2 ? row : row - box;
            const float room = slices.radius * slices.radius - float(ky) * float(ky);
            if (room <= 0) continue;
            const size_t start = (size_t(image) * box + row) * columns;
            const float* values = slices.numerator + 2 * start;
            const float* weights = slices.weight + start;
            for (int flip = 0; flip < 2; ++flip) {
                const float sign = flip ? -slices.step : slices.step;
                const float dx = sign * a[0], dy = sign * a[1], dz = sign * a[2];
                const float x0 = sign * a[3] * ky, y0 = sign * a[4] * ky, zz = sign * a[5] * ky + middle;
                int first = 0, last = columns - 1;
                narrow(zz, dz, float(z0) - 2, float(z1) + 1, first, last);
                // Pixels of column kx = 0 stand in the half plane twice, as themselves and as their mirrors.
                for (int kx = first; kx <= last && float(kx) * float(kx) < room; ++kx) {
                    const float x = x0 + kx * dx;
                    if (flip ? !(x > 0) : x < 0) continue;
                    const float y = y0 + kx * dy + middle, z = zz + kx * dz;
                    // Positions are above 0 here, so that truncation rounds down.
                    const int ix = int(x), iy = int(y), iz = int(z);
                    const int from = iz - 1 > z0 ? iz - 1 : z0, to = iz + 3 < z1 ? iz + 3 : z1;
                    if (from >= to) continue;
                    const quad wx = taps(slices.polynomials, x - ix);
                    const quad wy = taps(slices.polynomials, y - iy);
                    const quad wz = taps(slices.polynomials, z - iz);
                    const float share = kx ? 1.0f : 0.5f;
                    const float re = share * values[2 * kx], im = share * (flip ? -values[2 * kx + 1] : values[2 * kx + 1]);
                    const eight value = {wx[0] * re, wx[0] * im, wx[1] * re, wx[1] * im,
                                         wx[2] * re, wx[2] * im, wx[3] * re, wx[3] * im};
                    const quad weight = wx * (share * weights[kx]);
                    for (int plane = from; plane < to; ++plane) {
                        const float along = wz[plane - iz + 1];
                        const size_t corner = (size_t(plane) * side + (iy - 1)) * width + ix;
                        for (int tap = 0; tap < TAPS; ++tap) {
                            const float factor = along * wy[tap];
                            const size_t at = corner + size_t(tap) * width;
                            loose_eight* numerator = reinterpret_cast<loose_eight*>(space.numerator + 2 * at);
                            loose_quad* total = reinterpret_cast<loose_quad*>(space.weight + at);
                            *numerator = *numerator + value * factor;
                            *total = *total + weight * factor;
                        }
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace emsplat
