// Covariances of Gaussians from their scales and quaternions, C = R S² Rᵀ, and the way back of their gradients.
#pragma once

#include <cmath>

namespace emsplat {

template <class T>
struct Turn {
    T w, x, y, z, inverse;  // the unit quaternion, and 1 / length of the one that was given
    T r[3][3];

    explicit Turn(const T* q) {
        const T length = std::sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
        inverse = T(1) / (length > T(1e-12) ? length : T(1e-12));
        w = q[0] * inverse, x = q[1] * inverse, y = q[2] * inverse, z = q[3] * inverse;
        const T ww = w * w, xx = x * x, yy = y * y, zz = z * z;
        const T all[3][3] = {{ww + xx - yy - zz, 2 * (x * y - w * z), 2 * (x * z + w * y)},
                             {2 * (x * y + w * z), ww - xx + yy - zz, 2 * (y * z - w * x)},
                             {2 * (x * z - w * y), 2 * (y * z + w * x), ww - xx - yy + zz}};
        for (int i = 0; i < 3; ++i)
            for (int k = 0; k < 3; ++k) r[i][k] = all[i][k];
    }
};

// scale: 3 numbers, quaternion (w, x, y, z): 4, out: 9.
template <class T>
void covariance(const T* scale, const T* quaternion, T* out) {
    const Turn<T> turn(quaternion);
    const T square[3] = {scale[0] * scale[0], scale[1] * scale[1], scale[2] * scale[2]};
    for (int i = 0; i < 3; ++i)
        for (int j = i; j < 3; ++j) {
            T sum = 0;
            for (int k = 0; k < 3; ++k) sum += turn.r[i][k] * square[k] * turn.r[j][k];
            out[3 * i + j] = out[3 * j + i] = sum;
        }
}

// The gradients of scale and quaternion for an upstream gradient of 9 numbers. A turn ω about the Gaussian's own axes
// changes the loss by Σ M_jk (s_j² - s_k²) ω_i over cyclic i, j, k, M = Rᵀ (U + Uᵀ) R: exactly nothing where it is round.
template <class T>
void covariance_gradient(const T* scale, const T* quaternion, const T* up, T* of_scale, T* of_quaternion) {
    const Turn<T> t(quaternion);
    T half[3][3], inner[3][3];
    for (int i = 0; i < 3; ++i)
        for (int k = 0; k < 3; ++k) {
            half[i][k] = 0;
            for (int j = 0; j < 3; ++j) half[i][k] += (up[3 * i + j] + up[3 * j + i]) * t.r[j][k];
        }
    for (int i = 0; i < 3; ++i)
        for (int k = i; k < 3; ++k) {
            T sum = 0;
            for (int j = 0; j < 3; ++j) sum += t.r[j][i] * half[j][k];
            inner[i][k] = inner[k][i] = sum;
        }
    T turn[3];
    for (int i = 0; i < 3; ++i) {
        const int j = (i + 1) % 3, k = (i + 2) % 3;
        of_scale[i] = scale[i] * inner[i][i];
        turn[i] = inner[j][k] * (scale[j] - scale[k]) * (scale[j] + scale[k]);
    }
    const T twice = 2 * t.inverse;  // dq = q (0, ω) / 2; a longer quaternion is the same rotation
    of_quaternion[0] = -twice * (t.x * turn[0] + t.y * turn[1] + t.z * turn[2]);
    of_quaternion[1] = twice * (t.w * turn[0] + t.y * turn[2] - t.z * turn[1]);
    of_quaternion[2] = twice * (t.w * turn[1] + t.z * turn[0] - t.x * turn[2]);
    of_quaternion[3] = twice * (t.w * turn[2] + t.x * turn[1] - t.y * turn[0]);
}

}  // namespace emsplat
