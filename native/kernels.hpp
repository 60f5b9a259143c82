// The work units of the CPU kernels: what one thread does with some of the Gaussians on some of the pixels.
//
// Each instruction set compiles splat_kernels.hpp into its own table of these functions. Threads, memory and the
// Python types belong to bindings.cpp.
#pragma once

#include <stddef.h>

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

// Taps of the interpolation kernel per axis, and the degree of the polynomial that gives each from the fraction.
constexpr int TAPS = 4;
constexpr int DEGREE = 7;

// Central slices of one box: half planes in rfft order, only |k| < radius.
struct Slices {
    const float* numerator;    // complex, interleaved: images x box x (box / 2 + 1)
    const float* weight;       // real, the same shape
    const float* rotation;     // 3 x 3 per image, object to image
    const float* polynomials;  // DEGREE + 1 rows of TAPS coefficients, highest power first
    int images;
    int box;
    float radius;  // pixels of the image transform
    float step;    // voxels of the volume per pixel of the image transform
};

// The half space x >= 0 of a volume about its origin, with room for the taps: (z + reach + 1, y + reach + 1, x + 1).
struct HalfSpace {
    float* numerator;  // complex, interleaved: side x side x width
    float* weight;
    int reach;

    int side() const { return 2 * reach + 3; }
    int width() const { return reach + 3; }
};

// Fourier coefficients of images at some frequencies, in units of their noise. A view is an image in one pose; several
// views may show one image.
struct Coefficients {
    const float* value;        // complex, interleaved: images x stride
    const float* transfer;     // images x stride
    const float* frequency;    // x and y of each point, in voxels of the field
    const int* image;          // of each view
    const float* rotation;     // 3 x 3 per view, object to image
    const float* polynomials;  // as in Slices
    int views;
    int points;  // how many of the `stride` coefficients are used
    int stride;
};

constexpr int MAX_PITCH = 640;

// A half space like HalfSpace, whose voxels hold `pitch` numbers (a multiple of eight).
struct Field {
    float* data;
    int reach, pitch;
    int channels;  // complex numbers among them, the first ones

    int side() const { return 2 * reach + 3; }
    int width() const { return reach + 3; }
};

// One half space of complex numbers, laid out as HalfSpace.
struct Volume {
    const float* data;  // interleaved
    int reach;

    int side() const { return 2 * reach + 3; }
    int width() const { return reach + 3; }
};

// An image about to be compared with slices of a volume: coefficients in units of their noise, as in Coefficients.
struct Sight {
    const float* value;          // complex, interleaved
    const float* transfer;
    const int* point;            // kx >= 0 and ky of each, in cycles per image
    const float* magnification;  // 2 x 2
    const float* polynomials;    // DEGREE + 1 rows: TAPS coefficients as in Slices, then those of their derivatives;
                                 // aligned to whole rows
    float step;                  // voxels of the volume per cycle per image
    int points, reach;           // reach: the largest of kx and |ky|
};

constexpr int PLACE_COLUMNS = 7;  // image, model, three turns, two shifts

struct InstructionSet {
    const char* name;
    Kernels<float> single;
    Kernels<double> twice;
    // Adds slices to planes [z0, z1) of the half space. Every voxel receives its terms in the order of the images,
    // however the planes are shared out.
    void (*insert)(const Slices&, const HalfSpace&, int z0, int z1);
    // What one view shows of the channels of a field, as columns of 2 x points numbers, `stride` apart: the image,
    // channel 0 seen through its CTF, with `with_pose` (channels 1 to 3 are then its gradient) the derivatives of that
    // by turns about x, y, z of the image and by shifts, and the other channels.
    void (*slice)(const Coefficients&, const Field&, bool with_pose, int view, float* columns, size_t stride);
    // PLACE_COLUMNS columns of 2 x points numbers, `stride` apart: the image, moved by `phase`; the volume seen in a pose
    // through the CTF; the derivatives of that by turns about x, y, z of the image, and by shifts of the model in units
    // of the box over 2 pi. `phase` holds the factors of kx = 0 ... reach, then those of ky = -reach ... reach.
    void (*pose_columns)(const Sight&, const Volume&, const float* rotation, const float* phase, float* columns,
                         size_t stride);
    // All inner products of `count` columns.
    void (*multiply)(const float* columns, size_t stride, int count, int points, float* out);
    // Adds all views to planes [z0, z1) of a field. `moments` has `pitch` factors for each view: of the image times
    // its CTF (`means` pairs), then of the squared CTF.
    void (*spread)(const Coefficients&, const float* moments, int means, const Field&, int z0, int z1);
};

extern const InstructionSet baseline;
#ifdef EMSPLAT_X86_64
extern const InstructionSet avx2;
extern const InstructionSet avx512;
#endif

}  // namespace emsplat
