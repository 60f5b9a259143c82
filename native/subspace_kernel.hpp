// Slices of several volumes at once, their inner products with images, and the insertion of images into several sums;
// included by splat_kernels.hpp, once per instruction set.
//
// A voxel holds all its numbers side by side, so that one set of weights serves them all and the innermost loop is a
// few whole vectors.
#pragma once

#include <stddef.h>

#include "insert_kernel.hpp"
#include "kernels.hpp"

namespace emsplat {
namespace {  // as everything in splat_kernels.hpp

constexpr int BLOCKS = 6;  // vectors of eight that stay in registers

// Where a frequency of a view lies: the voxels of its taps and their weights. Points with x < 0 are replaced by their
// mirrors.
struct Place {
    quad wx, wy, wz;
    int x, y, z;
    bool mirrored;
};

inline Place place_of(const float* a, float kx, float ky, float middle, const float* polynomials) {
    float x = kx * a[0] + ky * a[3], y = kx * a[1] + ky * a[4], z = kx * a[2] + ky * a[5];
    Place p;
    p.mirrored = x < 0;
    if (p.mirrored) x = -x, y = -y, z = -z;
    y += middle, z += middle;
    p.x = int(x), p.y = int(y), p.z = int(z);  // not negative, so that truncation rounds down
    p.wx = taps(polynomials, x - p.x), p.wy = taps(polynomials, y - p.y), p.wz = taps(polynomials, z - p.z);
    return p;
}

// N blocks of the values around a place, weighted.
template <int N>
inline void gather_blocks(const Field& field, const Place& p, int block, float* out) {
    const size_t side = field.side(), width = field.width(), pitch = field.pitch;
    eight sum[N];
    for (int b = 0; b < N; ++b) sum[b] = eight{};
    for (int tz = 0; tz < TAPS; ++tz)
        for (int ty = 0; ty < TAPS; ++ty) {
            const float along = p.wz[tz] * p.wy[ty];
            const float* voxel = field.data + ((size_t(p.z - 1 + tz) * side + (p.y - 1 + ty)) * width + p.x) * pitch;
            for (int tx = 0; tx < TAPS; ++tx, voxel += pitch) {
                const float weight = along * p.wx[tx];
                for (int b = 0; b < N; ++b)
                    sum[b] += *reinterpret_cast<const loose_eight*>(voxel + 8 * (block + b)) * weight;
            }
        }
    for (int b = 0; b < N; ++b) *reinterpret_cast<loose_eight*>(out + 8 * (block + b)) = sum[b];
}

template <int N>
inline void scatter_blocks(const Field& field, const Place& p, int block, const float* value, int z0, int z1) {
    const size_t side = field.side(), width = field.width(), pitch = field.pitch;
    eight kept[N];
    for (int b = 0; b < N; ++b) kept[b] = *reinterpret_cast<const loose_eight*>(value + 8 * (block + b));
    for (int tz = 0; tz < TAPS; ++tz) {
        const int plane = p.z - 1 + tz;
        if (plane < z0 || plane >= z1) continue;
        for (int ty = 0; ty < TAPS; ++ty) {
            const float along = p.wz[tz] * p.wy[ty];
            float* voxel = field.data + ((size_t(plane) * side + (p.y - 1 + ty)) * width + p.x) * pitch;
            for (int tx = 0; tx < TAPS; ++tx, voxel += pitch) {
                const float weight = along * p.wx[tx];
                for (int b = 0; b < N; ++b) {
                    loose_eight* at = reinterpret_cast<loose_eight*>(voxel + 8 * (block + b));
                    *at = *at + kept[b] * weight;
                }
            }
        }
    }
}

inline void gather(const Field& field, const Place& p, float* out) {
    const int blocks = field.pitch / 8;
    int b = 0;
    for (; b + BLOCKS <= blocks; b += BLOCKS) gather_blocks<BLOCKS>(field, p, b, out);
    switch (blocks - b) {
        case 1: return gather_blocks<1>(field, p, b, out);
        case 2: return gather_blocks<2>(field, p, b, out);
        case 3: return gather_blocks<3>(field, p, b, out);
        case 4: return gather_blocks<4>(field, p, b, out);
        case 5: return gather_blocks<5>(field, p, b, out);
    }
}

inline void scatter(const Field& field, const Place& p, const float* value, int z0, int z1) {
    const int blocks = field.pitch / 8;
    int b = 0;
    for (; b + BLOCKS <= blocks; b += BLOCKS) scatter_blocks<BLOCKS>(field, p, b, value, z0, z1);
    switch (blocks - b) {
        case 1: return scatter_blocks<1>(field, p, b, value, z0, z1);
        case 2: return scatter_blocks<2>(field, p, b, value, z0, z1);
        case 3: return scatter_blocks<3>(field, p, b, value, z0, z1);
        case 4: return scatter_blocks<4>(field, p, b, value, z0, z1);
        case 5: return scatter_blocks<5>(field, p, b, value, z0, z1);
    }
}

// One column of the model at one point.
inline void put(float* columns, size_t stride, int column, int point, float re, float im) {
    float* at = columns + column * stride + 2 * size_t(point);
    at[0] = re, at[1] = im;
}

void slice(const Coefficients& seen, const Field& field, bool with_pose, int view, float* columns, size_t stride) {
    const float* a = seen.rotation + 9 * view;
    const float* value = seen.value + 2 * size_t(seen.image[view]) * seen.stride;
    const float* transfer = seen.transfer + size_t(seen.image[view]) * seen.stride;
    const float middle = float(field.reach + 1);
    const int others = field.channels - (with_pose ? 4 : 1);
    float found[MAX_PITCH];
    for (int point = 0; point < seen.points; ++point) {
        const float kx = seen.frequency[2 * point], ky = seen.frequency[2 * point + 1], c = transfer[point];
        const Place p = place_of(a, kx, ky, middle, seen.polynomials);
        gather(field, p, found);
        const float turn = p.mirrored ? -c : c;  // of imaginary parts
        put(columns, stride, 0, point, value[2 * point], value[2 * point + 1]);
        const float re = c * found[0], im = turn * found[1];
        put(columns, stride, 1, point, re, im);
        int column = 2, channel = 1;
        if (with_pose) {
            // The gradient at -k is minus the conjugate of that at k.
            float along[3][2];
            for (int row = 0; row < 3; ++row) {
                const float *g = found + 2, *axis = a + 3 * row;
                along[row][0] = turn * (axis[0] * g[0] + axis[1] * g[2] + axis[2] * g[4]);
                along[row][1] = c * (axis[0] * g[1] + axis[1] * g[3] + axis[2] * g[5]);
            }
            put(columns, stride, column++, point, -ky * along[2][0], -ky * along[2][1]);
            put(columns, stride, column++, point, kx * along[2][0], kx * along[2][1]);
            put(columns, stride, column++, point, ky * along[0][0] - kx * along[1][0],
                ky * along[0][1] - kx * along[1][1]);
            put(columns, stride, column++, point, kx * im, -kx * re);
            put(columns, stride, column++, point, ky * im, -ky * re);
            channel = 4;
        }
        for (int k = 0; k < others; ++k, ++channel)
            put(columns, stride, column++, point, c * found[2 * channel], turn * found[2 * channel + 1]);
    }
}

// The products of all columns with each other, both triangles.
void multiply(const float* columns, size_t stride, int count, int points, float* out) {
    const int whole = 2 * points / 8 * 8;
    for (int i = 0; i < count; ++i)
        for (int j = i; j < count; ++j) {
            const float *x = columns + i * stride, *y = columns + j * stride;
            eight sum = {};
            for (int k = 0; k < whole; k += 8)
                sum += *reinterpret_cast<const loose_eight*>(x + k) * *reinterpret_cast<const loose_eight*>(y + k);
            float total = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
            for (int k = whole; k < 2 * points; ++k) total += x[k] * y[k];
            out[i * count + j] = out[j * count + i] = total;
        }
}

void spread(const Coefficients& seen, const float* moments, int means, const Field& field, int z0, int z1) {
    const float middle = float(field.reach + 1);
    const int pitch = field.pitch;
    float value[MAX_PITCH];
    for (int view = 0; view < seen.views; ++view) {
        const float* a = seen.rotation + 9 * view;
        const float* y = seen.value + 2 * size_t(seen.image[view]) * seen.stride;
        const float* transfer = seen.transfer + size_t(seen.image[view]) * seen.stride;
        const float* moment = moments + size_t(view) * pitch;
        for (int point = 0; point < seen.points; ++point) {
            const float kx = seen.frequency[2 * point], ky = seen.frequency[2 * point + 1], c = transfer[point];
            float z = kx * a[2] + ky * a[5];
            if (kx * a[0] + ky * a[3] < 0) z = -z;
            z += middle;
            if (z + 3 < float(z0) || z - 2 > float(z1)) continue;
            const Place p = place_of(a, kx, ky, middle, seen.polynomials);
            const float re = c * y[2 * point], im = p.mirrored ? -c * y[2 * point + 1] : c * y[2 * point + 1];
            for (int k = 0; k < 2 * means; k += 2) value[k] = re * moment[k], value[k + 1] = im * moment[k + 1];
            for (int k = 2 * means; k < pitch; ++k) value[k] = c * c * moment[k];
            scatter(field, p, value, z0, z1);
        }
    }
}

}  // namespace
}  // namespace emsplat
