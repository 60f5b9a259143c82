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

// The gradients of scale and quaternion for an upstream gradient of 9 numbers.
template <class T>
void covariance_gradient(const T* scale, const T* quaternion, const T* up, T* of_scale, T* of_quaternion) {
    const Turn<T> t(quaternion);
    T g[3][3];  // of the rotation: (U + Uᵀ) R S²
    for (int k = 0; k < 3; ++k) {
        of_scale[k] = 0;
        for (int i = 0; i < 3; ++i) {
            T sum = 0;
            for (int j = 0; j < 3; ++j) sum += (up[3 * i + j] + up[3 * j + i]) * t.r[j][k];
            of_scale[k] += scale[k] * sum * t.r[i][k];
            g[i][k] = scale[k] * scale[k] * sum;
        }
    }
    const T w = t.w, x = t.x, y = t.y, z = t.z;
    const T d[4] = {2 * (w * (g[0][0] + g[1][1] + g[2][2]) + x * (g[2][1] - g[1][2]) + y * (g[0][2] - g[2][0]) +
                         z * (g[1][0] - g[0][1])),
                    2 * (x * (g[0][0] - g[1][1] - g[2][2]) + w * (g[2][1] - g[1][2]) + y * (g[0][1] + g[1][0]) +
                         z * (g[0][2] + g[2][0])),
                    2 * (y * (g[1][1] - g[0][0] - g[2][2]) + w * (g[0][2] - g[2][0]) + x * (g[0][1] + g[1][0]) +
                         z * (g[1][2] + g[2][1])),
                    2 * (z * (g[2][2] - g[0][0] - g[1][1]) + w * (g[1][0] - g[0][1]) + x * (g[0][2] + g[2][0]) +
                         y * (g[1][2] + g[2][1]))};
    // A longer quaternion is the same rotation.
    const T along = w * d[0] + x * d[1] + y * d[2] + z * d[3];
    const T unit[4] = {w, x, y, z};
    for (int i = 0; i < 4; ++i) of_quaternion[i] = t.inverse * (d[i] - along * unit[i]);
}

}  // namespace emsplat
