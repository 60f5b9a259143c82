// The work units of the CPU kernels: what one thread does with some of the Gaussians on some of the pixels.
//
// Each instruction set compiles splat_kernels.hpp into its own table of these functions. Threads, memory and the
// Python types belong to bindings.cpp.
#pragma once

namespace emsplat {

// Columns of a mixture, one array per number ("structure of arrays"), in the caller's units.
enum Column { MX, MY, MZ, SXX, SXY, SXZ, SYY, SYZ, SZZ, AMPLITUDE, COLUMNS };

// Columns of the gradient with respect to a pose: the first two rows of the rotation, and the shift.
constexpr int POSE_COLUMNS = 8;

template <class T>
struct Mixture {
    const T* column[COLUMNS];
    int count;
};

template <class T>
struct View {
    const T* rotation;  // 3 x 3, row by row
    const T* shift;     // x, y
    T pixel_size;
    int size;
    T cutoff;  // footprint in standard deviations
};

template <class T>
struct Kernels {
    // Adds all Gaussians to rows [row0, row1) of an image, `stride` numbers per row; `image` points at row0.
    void (*project)(const Mixture<T>&, const View<T>&, T* image, int stride, int row0, int row1);
    // Adds the gradient of Gaussians [first, last) to `gradient` (COLUMNS arrays), given the padded upstream gradient
    // of one image; pose, if not null, receives POSE_COLUMNS sums.
    void (*project_gradient)(const Mixture<T>&, const View<T>&, const T* upstream, int stride, int first, int last,
                             T* const* gradient, T* pose);
    // The same for slices [z0, z1) of a volume; `volume` points at slice z0.
    void (*voxelize)(const Mixture<T>&, T pixel_size, int size, T cutoff, T* volume, int stride, int z0, int z1);
    void (*voxelize_gradient)(const Mixture<T>&, T pixel_size, int size, T cutoff, const T* upstream, int stride,
                              int first, int last, T* const* gradient);
    int lanes;  // how many numbers beyond the end of a row may be touched
};

struct InstructionSet {
    const char* name;
    Kernels<float> single;
    Kernels<double> twice;
};

extern const InstructionSet baseline;
#ifdef EMSPLAT_X86_64
extern const InstructionSet avx2;
extern const InstructionSet avx512;
#endif

}  // namespace emsplat
