// The splatting kernels, compiled once per instruction set (EMSPLAT_ISA, EMSPLAT_VECTOR_BYTES).
//
// A Gaussian with centre (x, y), conic (a, b, c) adds w exp(-½(a dx² + 2b dx dy + c dy²)). In a fixed column the values
// of successive rows obey
//     G(dy+1) = G(dy) S(dy),   S(dy+1) = S(dy) exp(-c),   S(dy) = exp(-c(dy+½) - b dx),
// so a block of columns costs two vector exponentials and then two multiplications and one addition per row. The
// recurrence starts afresh every RESTART rows, which bounds its rounding error, and is not used where one of its terms
// could underflow (very oblique, thin Gaussians).
//
// Everything is in an anonymous namespace, and no inline function of the standard library is used: the linker must
// never pick, for all processors, a copy that was compiled for one.
#include <math.h>

#include "insert_kernel.hpp"
#include "kernels.hpp"
#include "pose_kernel.hpp"
#include "subspace_kernel.hpp"

namespace emsplat {
namespace {

// A splat is a dozen numbers: in a call they would all go through memory, which takes longer than a small footprint.
#define EMSPLAT_INLINED __attribute__((always_inline))
#define EMSPLAT_INLINE inline EMSPLAT_INLINED

constexpr int RESTART = 16;
constexpr int CHUNK = 128;  // Gaussians whose geometry is worked out at a time

template <class T>
struct Simd {
    static constexpr int lanes = EMSPLAT_VECTOR_BYTES / sizeof(T);
    typedef T vec __attribute__((vector_size(EMSPLAT_VECTOR_BYTES)));
    typedef T loose __attribute__((vector_size(EMSPLAT_VECTOR_BYTES), aligned(sizeof(T))));
    static vec load(const T* p) { return *reinterpret_cast<const loose*>(p); }
    static void store(T* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
    static vec iota() {
        vec v;
        for (int i = 0; i < lanes; ++i) v[i] = T(i);
        return v;
    }
};

// The sum of all lanes, by parts of 16 bytes first.
template <class T>
inline T sum_lanes(typename Simd<T>::vec v) {
    typedef T part __attribute__((vector_size(16)));
    const part* parts = reinterpret_cast<const part*>(&v);
    part p = parts[0];
    for (int i = 1; i < EMSPLAT_VECTOR_BYTES / 16; ++i) p += parts[i];
    T total = p[0];
    for (int i = 1; i < int(16 / sizeof(T)); ++i) total += p[i];
    return total;
}

typedef Simd<float>::vec vfloat;
typedef int vint __attribute__((vector_size(EMSPLAT_VECTOR_BYTES)));
typedef Simd<double>::vec vdouble;

// exp with about 1 ulp: x = n ln 2 + r, a polynomial in r, n put into the exponent. Below -87 it is 0.
inline vfloat exponential(vfloat x) {
    const vfloat magic = vfloat{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const vint kept = x > -87.0f;
    x = x < 87.0f ? x : vfloat{} + 87.0f;
    vfloat shifted = x * 1.44269504088896341f + magic;
    vfloat n = shifted - magic;
    vfloat r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vfloat p = vfloat{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vfloat)(((vint)p + ((vint)shifted << 23)) & kept);
}

inline vdouble exponential(vdouble x) {
    for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = exp(x[i]);
    return x;
}

inline float exponential(float x) { return expf(x); }
inline double exponential(double x) { return exp(x); }
inline float root(float x) { return sqrtf(x); }
inline double root(double x) { return sqrt(x); }

// Values on their way to 0 must not take the slow path for denormal numbers.
struct FlushDenormals {
#ifdef EMSPLAT_X86_64
    unsigned before = __builtin_ia32_stmxcsr();
    FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
};

// Not those of the library: fmax is a call there, before which every vector register is saved.
template <class T>
inline T maximum(T a, T b) { return a > b ? a : b; }
template <class T>
inline T minimum(T a, T b) { return a < b ? a : b; }
template <class T>
inline T magnitude(T a) { return a < 0 ? -a : a; }

// floor and ceil of numbers that a pixel index can hold; anything further out is outside every image anyway. Without
// branches, so that a loop over them is one of vectors.
template <class T>
inline int floor_index(T x) {
    x = minimum(maximum(x, T(-1e6)), T(1e6));
    const int i = int(x);
    return i - (T(i) > x);
}
template <class T>
inline int ceil_index(T x) { return -floor_index(-x); }

template <class T>
struct Splat {
    T x, y;     // centre in pixels
    T a, b, c;  // conic, 1/pixel²
    T hx, hy;   // half extents of the footprint in pixels
    T decay;    // exp(-c)
    T leap;     // exp(-b lanes)
    T peak;     // logarithm of the value at the centre
    int x0, x1, y0, y1;  // first and last column and row of the footprint, in the image or not
};

// The values of a splat on N times `lanes` columns from `column`, row by row: visit(row, values). far_x is the largest
// |dx| of the columns that lie in the footprint; the others may underflow to 0. Two vectors side by side hide the time
// that a multiplication takes to give its result to the next row's.
template <class T, int N, class Visit>
EMSPLAT_INLINE void walk_block(const Splat<T>& s, int column, T far_x, int row0, int row1, Visit&& visit) {
    using V = typename Simd<T>::vec;
    const T half = T(0.5);
    V bdx[N], constant[N], g[N], step[N];
    for (int k = 0; k < N; ++k) {
        const V dx = (T(column + k * Simd<T>::lanes) - s.x) + Simd<T>::iota();
        bdx[k] = s.b * dx;
        constant[k] = s.peak - half * s.a * dx * dx;
    }
    auto values = [&](T dy) {
        const T across = half * s.c * dy * dy;
        for (int k = 0; k < N; ++k) g[k] = exponential(constant[k] - dy * bdx[k] - across);
    };
    // One exponential for all vectors of a row, unless a lane could leave the range of numbers on the way.
    const bool leaps = magnitude(s.b) * Simd<T>::lanes < T(20);
    const T far_y = maximum(T(row1 - 1) - s.y, s.y - T(row0));
    const T furthest = s.a * far_x * far_x + T(2) * magnitude(s.b) * far_x * far_y + s.c * far_y * far_y;
    if (furthest > T(100)) {  // exp(-50): still far from underflow
        for (int row = row0; row < row1; ++row) {
            values(T(row) - s.y);
            visit(row, g);
        }
        return;
    }
    for (int begin = row0; begin < row1; begin += RESTART) {
        const int end = minimum(begin + RESTART, row1);
        const T dy = T(begin) - s.y;
        values(dy);
        const T first = -s.c * (dy + half);
        step[0] = exponential(first - bdx[0]);
        for (int k = 1; k < N; ++k) step[k] = leaps ? step[k - 1] * s.leap : exponential(first - bdx[k]);
        for (int row = begin; row < end; ++row) {
            visit(row, g);
            for (int k = 0; k < N; ++k) {
                g[k] *= step[k];
                step[k] *= s.decay;
            }
        }
    }
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// All blocks of a splat: walk(vectors, column, far_x, row0, row1) with rows inside [clip0, clip1); vectors is Count<1>
// or Count<2>.
template <class T, class Walk>
EMSPLAT_INLINE void for_blocks(const Splat<T>& s, int size, int clip0, int clip1, Walk&& walk) {
    constexpr int lanes = Simd<T>::lanes;
    const int x0 = maximum(s.x0, 0), x1 = minimum(s.x1, size - 1);
    const int y0 = maximum(s.y0, clip0), y1 = minimum(s.y1 + 1, clip1);
    if (x1 < x0 || y1 <= y0) return;
    if (x1 - x0 < lanes) {
        walk(Count<1>(), x0, s.hx, y0, y1);
        return;
    }
    if (x1 - x0 < 2 * lanes) {
        walk(Count<2>(), x0, s.hx, y0, y1);
        return;
    }
    // Rows of the ellipse above [d0, d1]: its upper edge is highest at dx = +peak, its lower edge lowest at -peak.
    const T determinant = s.a * s.c - s.b * s.b, inverse = T(1) / s.c;
    const T limit = s.hx * s.hx * determinant;  // c * cutoff²
    const T peak = -s.b * s.hy / s.a;
    auto rows = [&](auto vectors, int column) EMSPLAT_INLINED {
        const T d0 = T(column) - s.x, d1 = T(minimum(column + vectors.value * lanes - 1, x1)) - s.x;
        const T up = minimum(maximum(peak, d0), d1), low = minimum(maximum(-peak, d0), d1);
        const T top = s.y + (-s.b * up + root(maximum(limit - determinant * up * up, T(0)))) * inverse;
        const T bottom = s.y + (-s.b * low - root(maximum(limit - determinant * low * low, T(0)))) * inverse;
        const int row0 = maximum(ceil_index(bottom), y0), row1 = minimum(floor_index(top) + 1, y1);
        if (row1 > row0) walk(vectors, column, maximum(magnitude(d0), magnitude(d1)), row0, row1);
    };
    int column = x0;
    for (; x1 - column >= lanes; column += 2 * lanes) rows(Count<2>(), column);
    if (column <= x1) rows(Count<1>(), column);
}

// `image` points at row clip0.
template <class T>
EMSPLAT_INLINE void add_splat(const Splat<T>& s, T weight, T* image, int stride, int size, int clip0, int clip1) {
    for_blocks(s, size, clip0, clip1, [&](auto vectors, int column, T far_x, int row0, int row1) EMSPLAT_INLINED {
        constexpr int N = decltype(vectors)::value;
        using V = typename Simd<T>::vec;
        T* base = image + column;
        walk_block<T, N>(s, column, far_x, row0, row1, [&](int row, const V(&g)[N]) {
            T* p = base + long(row - clip0) * stride;
            for (int k = 0; k < N; ++k)
                Simd<T>::store(p + k * Simd<T>::lanes, Simd<T>::load(p + k * Simd<T>::lanes) + weight * g[k]);
        });
    });
}

// Moments of upstream * exp(...) about the centre: 1, dx, dy, dx², dx dy, dy², each as a vector that adds up to it.
template <class T>
EMSPLAT_INLINE void splat_moments(const Splat<T>& s, const T* upstream, int stride, int size,
                          typename Simd<T>::vec (&moments)[6]) {
    using V = typename Simd<T>::vec;
    V m0{}, mx{}, my{}, mxx{}, mxy{}, myy{};
    for_blocks(s, size, 0, size, [&](auto vectors, int column, T far_x, int row0, int row1) EMSPLAT_INLINED {
        constexpr int N = decltype(vectors)::value;
        const T* base = upstream + column;
        // Only dy changes down a column, so three sums per row are enough.
        V s0[N] = {}, s1[N] = {}, s2[N] = {};
        V dy = V{} + (T(row0) - s.y);
        walk_block<T, N>(s, column, far_x, row0, row1, [&](int row, const V(&g)[N]) {
            const T* p = base + long(row) * stride;
            const V dy2 = dy * dy;
            for (int k = 0; k < N; ++k) {
                const V weighted = g[k] * Simd<T>::load(p + k * Simd<T>::lanes);
                s0[k] += weighted;
                s1[k] += weighted * dy;
                s2[k] += weighted * dy2;
            }
            dy += T(1);
        });
        for (int k = 0; k < N; ++k) {
            const V dx = (T(column + k * Simd<T>::lanes) - s.x) + Simd<T>::iota();
            m0 += s0[k];
            my += s1[k];
            myy += s2[k];
            mx += dx * s0[k];
            mxy += dx * s1[k];
            mxx += dx * dx * s0[k];
        }
    });
    const V all[6] = {m0, mx, my, mxx, mxy, myy};
    for (int i = 0; i < 6; ++i) moments[i] = all[i];
}

// What projection makes of CHUNK Gaussians.
template <class T>
struct Projected {
    T x[CHUNK], y[CHUNK], a[CHUNK], b[CHUNK], c[CHUNK], hx[CHUNK], hy[CHUNK];
    T decay[CHUNK], leap[CHUNK];
    int x0[CHUNK], x1[CHUNK], y0[CHUNK], y1[CHUNK];
    T norm[CHUNK];  // 1 / (2π √det)
    Splat<T> splat(int i) const {
        return {x[i], y[i], a[i], b[i], c[i], hx[i], hy[i], decay[i], leap[i], T(0), x0[i], x1[i], y0[i], y1[i]};
    }
};

template <class T>
inline void project_geometry(const Mixture<T>& m, const View<T>& view, int first, int last, Projected<T>& out) {
    const T* u = view.rotation;
    const T* v = view.rotation + 3;
    const T scale = T(1) / view.pixel_size, scale2 = scale * scale;
    const T centre = T(view.size / 2);
    const T ox = centre - view.shift[0] * scale, oy = centre - view.shift[1] * scale;
    for (int i = 0; i < last - first; ++i) {
        const int j = first + i;
        const T px = m.column[MX][j], py = m.column[MY][j], pz = m.column[MZ][j];
        const T sxx = m.column[SXX][j], sxy = m.column[SXY][j], sxz = m.column[SXZ][j];
        const T syy = m.column[SYY][j], syz = m.column[SYZ][j], szz = m.column[SZZ][j];
        // Σ uᵀ and Σ vᵀ
        const T ux = sxx * u[0] + sxy * u[1] + sxz * u[2];
        const T uy = sxy * u[0] + syy * u[1] + syz * u[2];
        const T uz = sxz * u[0] + syz * u[1] + szz * u[2];
        const T vx = sxx * v[0] + sxy * v[1] + sxz * v[2];
        const T vy = sxy * v[0] + syy * v[1] + syz * v[2];
        const T vz = sxz * v[0] + syz * v[1] + szz * v[2];
        const T cxx = (u[0] * ux + u[1] * uy + u[2] * uz) * scale2;
        const T cxy = (v[0] * ux + v[1] * uy + v[2] * uz) * scale2;
        const T cyy = (v[0] * vx + v[1] * vy + v[2] * vz) * scale2;
        const T determinant = cxx * cyy - cxy * cxy;
        const T inverse = T(1) / determinant;
        out.x[i] = (u[0] * px + u[1] * py + u[2] * pz) * scale + ox;
        out.y[i] = (v[0] * px + v[1] * py + v[2] * pz) * scale + oy;
        out.a[i] = cyy * inverse;
        out.b[i] = -cxy * inverse;
        out.c[i] = cxx * inverse;
        out.hx[i] = view.cutoff * root(cxx);
        out.hy[i] = view.cutoff * root(cyy);
        out.x0[i] = ceil_index(out.x[i] - out.hx[i]);
        out.x1[i] = floor_index(out.x[i] + out.hx[i]);
        out.y0[i] = ceil_index(out.y[i] - out.hy[i]);
        out.y1[i] = floor_index(out.y[i] + out.hy[i]);
        out.norm[i] = root(inverse) * T(0.15915494309189535);
    }
    for (int i = 0; i < last - first; i += Simd<T>::lanes) {
        Simd<T>::store(out.decay + i, exponential(-Simd<T>::load(out.c + i)));
        Simd<T>::store(out.leap + i, exponential(T(-Simd<T>::lanes) * Simd<T>::load(out.b + i)));
    }
}

template <class T>
void project(const Mixture<T>& m, const View<T>& view, T* image, int stride, int row0, int row1) {
    const FlushDenormals flush;
    Projected<T> g;
    for (int first = 0; first < m.count; first += CHUNK) {
        const int last = minimum(first + CHUNK, m.count);
        project_geometry(m, view, first, last, g);
        for (int i = 0; i < last - first; ++i)
            add_splat(g.splat(i), m.column[AMPLITUDE][first + i] * g.norm[i], image, stride, view.size, row0, row1);
    }
}

template <class T>
void project_gradient(const Mixture<T>& m, const View<T>& view, const T* upstream, int stride, int begin, int end,
                      T* const* gradient, T* pose) {
    const FlushDenormals flush;
    const T* u = view.rotation;
    const T* v = view.rotation + 3;
    const T scale = T(1) / view.pixel_size, scale2 = scale * scale;
    Projected<T> g;
    T moments[6][CHUNK];
    for (int first = begin; first < end; first += CHUNK) {
        const int last = minimum(first + CHUNK, end);
        project_geometry(m, view, first, last, g);
        for (int i = 0; i < last - first; ++i) {
            typename Simd<T>::vec of_one[6];
            splat_moments(g.splat(i), upstream, stride, view.size, of_one);
            for (int k = 0; k < 6; ++k) moments[k][i] = sum_lanes<T>(of_one[k]);
        }
        // What pose needs is kept, so that this loop is one of vectors.
        T gx[CHUNK], gy[CHUNK], qu[3][CHUNK], qv[3][CHUNK];
#pragma GCC ivdep
        for (int i = 0; i < last - first; ++i) {
            const int j = first + i;
            const T a = g.a[i], b = g.b[i], c = g.c[i], w = m.column[AMPLITUDE][j] * g.norm[i];
            const T m0 = moments[0][i], mx = moments[1][i], my = moments[2][i];
            const T mxx = moments[3][i], mxy = moments[4][i], myy = moments[5][i];
            // With P the conic and M the second moments: dL/dcentre = w P m, dL/dS = ½ w (P M P - m0 P).
            gx[i] = w * (a * mx + b * my) * scale;
            gy[i] = w * (b * mx + c * my) * scale;
            const T pxx = a * mxx + b * mxy, pxy = a * mxy + b * myy;
            const T pyx = b * mxx + c * mxy, pyy = b * mxy + c * myy;
            const T half = T(0.5) * w * scale2;
            const T dxx = half * (pxx * a + pxy * b - m0 * a);
            const T dxy = half * (pxx * b + pxy * c - m0 * b);
            const T dyy = half * (pyx * b + pyy * c - m0 * c);
            gradient[AMPLITUDE][j] += g.norm[i] * m0;
            gradient[MX][j] += u[0] * gx[i] + v[0] * gy[i];
            gradient[MY][j] += u[1] * gx[i] + v[1] * gy[i];
            gradient[MZ][j] += u[2] * gx[i] + v[2] * gy[i];
            // Uᵀ D U
            for (int k = 0; k < 3; ++k) {
                qu[k][i] = dxx * u[k] + dxy * v[k];
                qv[k][i] = dxy * u[k] + dyy * v[k];
            }
            gradient[SXX][j] += u[0] * qu[0][i] + v[0] * qv[0][i];
            gradient[SXY][j] += u[0] * qu[1][i] + v[0] * qv[1][i];
            gradient[SXZ][j] += u[0] * qu[2][i] + v[0] * qv[2][i];
            gradient[SYY][j] += u[1] * qu[1][i] + v[1] * qv[1][i];
            gradient[SYZ][j] += u[1] * qu[2][i] + v[1] * qv[2][i];
            gradient[SZZ][j] += u[2] * qu[2][i] + v[2] * qv[2][i];
        }
        for (int i = 0; pose && i < last - first; ++i) {
            const int j = first + i;
            const T px = m.column[MX][j], py = m.column[MY][j], pz = m.column[MZ][j];
            const T sxx = m.column[SXX][j], sxy = m.column[SXY][j], sxz = m.column[SXZ][j];
            const T syy = m.column[SYY][j], syz = m.column[SYZ][j], szz = m.column[SZZ][j];
            // dL/dU = g pᵀ + 2 D U Σ
            pose[0] += gx[i] * px + 2 * (qu[0][i] * sxx + qu[1][i] * sxy + qu[2][i] * sxz);
            pose[1] += gx[i] * py + 2 * (qu[0][i] * sxy + qu[1][i] * syy + qu[2][i] * syz);
            pose[2] += gx[i] * pz + 2 * (qu[0][i] * sxz + qu[1][i] * syz + qu[2][i] * szz);
            pose[3] += gy[i] * px + 2 * (qv[0][i] * sxx + qv[1][i] * sxy + qv[2][i] * sxz);
            pose[4] += gy[i] * py + 2 * (qv[0][i] * sxy + qv[1][i] * syy + qv[2][i] * syz);
            pose[5] += gy[i] * pz + 2 * (qv[0][i] * sxz + qv[1][i] * syz + qv[2][i] * szz);
            pose[6] -= gx[i];
            pose[7] -= gy[i];
        }
    }
}

// A 3D Gaussian cut at z = const is a 2D Gaussian whose conic does not depend on z.
template <class T>
struct Solid {
    T x, y, z;               // centre in voxels
    T a, b, c;               // conic of every slice
    T slope_x, slope_y;      // how the slice's centre moves with z
    T cxx, cyy;              // covariance of the slice, for its extent
    T szz, norm, cutoff2;    // norm = 1 / ((2π)^1.5 √det Σ)
    T decay, leap;           // exp(-c), exp(-b lanes)
    T inverse[6];            // Σ⁻¹: xx xy xz yy yz zz

    Solid(const Mixture<T>& m, int j, T scale, int size, T cutoff) {
        const T scale2 = scale * scale, centre = T(size / 2);
        x = m.column[MX][j] * scale + centre;
        y = m.column[MY][j] * scale + centre;
        z = m.column[MZ][j] * scale + centre;
        const T sxx = m.column[SXX][j] * scale2, sxy = m.column[SXY][j] * scale2, sxz = m.column[SXZ][j] * scale2;
        const T syy = m.column[SYY][j] * scale2, syz = m.column[SYZ][j] * scale2;
        szz = m.column[SZZ][j] * scale2;
        slope_x = sxz / szz;
        slope_y = syz / szz;
        cxx = sxx - sxz * slope_x;
        cyy = syy - syz * slope_y;
        const T cxy = sxy - sxz * slope_y;
        const T reciprocal = T(1) / (cxx * cyy - cxy * cxy);
        a = cyy * reciprocal;
        b = -cxy * reciprocal;
        c = cxx * reciprocal;
        decay = exponential(-c);
        leap = exponential(T(-Simd<T>::lanes) * b);
        norm = root(reciprocal / szz) * T(0.06349363593424097);
        cutoff2 = cutoff * cutoff;
        const T xz = -(a * slope_x + b * slope_y), yz = -(b * slope_x + c * slope_y);
        const T all[6] = {a, b, xz, c, yz, T(1) / szz - xz * slope_x - yz * slope_y};
        for (int i = 0; i < 6; ++i) inverse[i] = all[i];
    }

    T half_depth() const { return root(cutoff2 * szz); }

    // The splat of slice `slice`.
    bool cut(int slice, Splat<T>& s) const {
        const T dz = T(slice) - z, depth = dz * dz / szz;
        const T left = cutoff2 - depth;
        if (left <= 0) return false;
        const T hx = root(left * cxx), hy = root(left * cyy), cx = x + slope_x * dz, cy = y + slope_y * dz;
        s = {cx, cy, a, b, c, hx, hy, decay, leap, T(-0.5) * depth,
             ceil_index(cx - hx), floor_index(cx + hx), ceil_index(cy - hy), floor_index(cy + hy)};
        return true;
    }
};

template <class T>
void voxelize(const Mixture<T>& m, T pixel_size, int size, T cutoff, T* volume, int stride, int z0, int z1) {
    const FlushDenormals flush;
    const T scale = T(1) / pixel_size;
    for (int j = 0; j < m.count; ++j) {
        const T z = m.column[MZ][j] * scale + T(size / 2);
        const T depth = cutoff * scale * root(m.column[SZZ][j]);
        const int begin = maximum(ceil_index(z - depth), z0), end = minimum(floor_index(z + depth) + 1, z1);
        if (end <= begin) continue;
        const Solid<T> solid(m, j, scale, size, cutoff);
        Splat<T> s;
        for (int slice = begin; slice < end; ++slice)
            if (solid.cut(slice, s))
                add_splat(s, m.column[AMPLITUDE][j] * solid.norm,
                          volume + long(slice - z0) * size * stride, stride, size, 0, size);
    }
}

template <class T>
void voxelize_gradient(const Mixture<T>& m, T pixel_size, int size, T cutoff, const T* upstream, int stride, int first,
                       int last, T* const* gradient) {
    const FlushDenormals flush;
    const T scale = T(1) / pixel_size, scale2 = scale * scale;
    for (int j = first; j < last; ++j) {
        const Solid<T> solid(m, j, scale, size, cutoff);
        const T depth = solid.half_depth();
        const int begin = maximum(ceil_index(solid.z - depth), 0);
        const int end = minimum(floor_index(solid.z + depth) + 1, size);
        using V = typename Simd<T>::vec;
        V sums[10] = {};  // 1; x, y, z; xx, xy, xz, yy, yz, zz about the Gaussian's centre
        for (int slice = begin; slice < end; ++slice) {
            Splat<T> s;
            V mom[6];
            if (!solid.cut(slice, s)) continue;
            splat_moments(s, upstream + long(slice) * size * stride, stride, size, mom);
            // From the slice's centre to the Gaussian's.
            const T dz = T(slice) - solid.z, ex = solid.slope_x * dz, ey = solid.slope_y * dz;
            const V mx = mom[1] + ex * mom[0], my = mom[2] + ey * mom[0], mz = dz * mom[0];
            sums[0] += mom[0];
            sums[1] += mx;
            sums[2] += my;
            sums[3] += mz;
            sums[4] += mom[3] + ex * (mom[1] + mx);
            sums[5] += mom[4] + ex * mom[2] + ey * mx;
            sums[6] += dz * mx;
            sums[7] += mom[5] + ey * (mom[2] + my);
            sums[8] += dz * my;
            sums[9] += dz * mz;
        }
        T total[10];
        for (int k = 0; k < 10; ++k) total[k] = sum_lanes<T>(sums[k]);
        const T t0 = total[0], *t = total + 1, *tt = total + 4;
        const T* i = solid.inverse;
        const T p[3][3] = {{i[0], i[1], i[2]}, {i[1], i[3], i[4]}, {i[2], i[4], i[5]}};
        const T second[3][3] = {{tt[0], tt[1], tt[2]}, {tt[1], tt[3], tt[4]}, {tt[2], tt[4], tt[5]}};
        const T w = m.column[AMPLITUDE][j] * solid.norm;
        gradient[AMPLITUDE][j] += solid.norm * t0;
        T pm[3][3];
        for (int r = 0; r < 3; ++r) {
            gradient[MX + r][j] += w * scale * (p[r][0] * t[0] + p[r][1] * t[1] + p[r][2] * t[2]);
            for (int q = 0; q < 3; ++q)
                pm[r][q] = p[r][0] * second[0][q] + p[r][1] * second[1][q] + p[r][2] * second[2][q];
        }
        int column = SXX;
        for (int r = 0; r < 3; ++r)
            for (int q = r; q < 3; ++q)
                gradient[column++][j] +=
                    T(0.5) * w * scale2 * (pm[r][0] * p[0][q] + pm[r][1] * p[1][q] + pm[r][2] * p[2][q] - t0 * p[r][q]);
    }
}

template <class T>
constexpr Kernels<T> table() {
    return {project<T>, project_gradient<T>, voxelize<T>, voxelize_gradient<T>, Simd<T>::lanes};
}

#define EMSPLAT_NAME_OF(x) #x
#define EMSPLAT_NAME(x) EMSPLAT_NAME_OF(x)

}  // namespace

const InstructionSet EMSPLAT_ISA = {EMSPLAT_NAME(EMSPLAT_ISA), table<float>(), table<double>(), insert,
                                    slice, pose_columns, multiply, spread};

}  // namespace emsplat
