// Python binding of the CPU kernels: memory, threads and the choice of the instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/complex.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <complex>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "covariance.hpp"
#include "kernels.hpp"

namespace nb = nanobind;
using namespace emsplat;

namespace {

std::vector<const InstructionSet*> available() {
    std::vector<const InstructionSet*> sets{&baseline};
#ifdef EMSPLAT_X86_64
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        sets.push_back(&avx512);
#endif
    return sets;
}

const InstructionSet* chosen = available().back();

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels() { return chosen->single; }
template <>
const Kernels<double>& kernels() { return chosen->twice; }

// Runs work(task) for every task, each exactly once, on up to `threads` threads. The first exception of any of them ends
// the work and is the caller's.
template <class Work>
void share(int tasks, int threads, Work&& work) {
    std::atomic<int> next{0};
    std::exception_ptr failure;
    std::once_flag failed;
    auto loop = [&]() noexcept {
        try {
            for (int task = next++; task < tasks; task = next++) work(task);
        } catch (...) {
            std::call_once(failed, [&] { failure = std::current_exception(); });
            next = tasks;
        }
    };
    std::vector<std::thread> others;
    others.reserve(size_t(std::max(threads, 1)));
    try {
        for (int i = 1; i < std::min(tasks, threads); ++i) others.emplace_back(loop);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that there are do the work.
    }
    loop();
    for (auto& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array3 = nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array4 = nb::ndarray<const T, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Result = nb::ndarray<nb::numpy, T, nb::ndim<N>, nb::c_contig>;

// Numbers on their way to Python.
template <class T>
using Numbers = std::unique_ptr<std::vector<T>>;

template <class T>
Numbers<T> numbers(size_t count) {
    return std::make_unique<std::vector<T>>(count);
}

template <class T, int N>
Result<T, N> adopt(Numbers<T> data, const size_t (&shape)[N]) {
    nb::capsule owner(data.get(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return Result<T, N>(data.release()->data(), N, shape, owner);
}

// A mixture as it comes: a row of 3, 9 and 1 numbers for each Gaussian.
template <class T>
struct Rows {
    const T *mean, *covariance, *amplitude;
    size_t count;
};

template <class T>
Rows<T> rows(const Array2<T>& mean, const Array3<T>& covariance, const Array1<T>& amplitude) {
    const size_t n = mean.shape(0);
    if (mean.shape(1) != 3 || covariance.shape(0) != n || covariance.shape(1) != 3 || covariance.shape(2) != 3 ||
        amplitude.shape(0) != n)
        throw std::invalid_argument("expected mean (g, 3), covariance (g, 3, 3), amplitude (g)");
    return {mean.data(), covariance.data(), amplitude.data(), n};
}

// The mixtures of all images, one behind the other.
template <class T>
std::vector<Rows<T>> rows_of_each(const Array3<T>& mean, const Array4<T>& covariance, const Array2<T>& amplitude,
                                  size_t images) {
    const size_t n = mean.shape(1);
    if (mean.shape(0) != images || mean.shape(2) != 3 || covariance.shape(0) != images || covariance.shape(1) != n ||
        covariance.shape(2) != 3 || covariance.shape(3) != 3 || amplitude.shape(0) != images || amplitude.shape(1) != n)
        throw std::invalid_argument("expected mean (p, g, 3), covariance (p, g, 3, 3), amplitude (p, g)");
    std::vector<Rows<T>> out;
    for (size_t p = 0; p < images; ++p)
        out.push_back({mean.data() + 3 * n * p, covariance.data() + 9 * n * p, amplitude.data() + n * p, n});
    return out;
}

// The mixture as columns; symmetric parts of the covariance.
template <class T>
struct Columns {
    std::vector<T> data;
    Mixture<T> mixture;

    explicit Columns(const Rows<T>& rows) : data(COLUMNS * rows.count) {
        const size_t n = rows.count;
        for (size_t j = 0; j < n; ++j) {
            const T *m = rows.mean + 3 * j, *c = rows.covariance + 9 * j;
            const T row[COLUMNS] = {m[0], m[1], m[2], c[0], (c[1] + c[3]) / 2, (c[2] + c[6]) / 2,
                                    c[4], (c[5] + c[7]) / 2, c[8], rows.amplitude[j]};
            for (int k = 0; k < COLUMNS; ++k) data[k * n + j] = row[k];
        }
        for (int k = 0; k < COLUMNS; ++k) mixture.column[k] = data.data() + k * n;
        mixture.count = int(n);
    }
};

// Images with room behind each row for a whole vector.
template <class T>
std::vector<T> padded(const T* source, size_t rows, size_t size, size_t stride) {
    std::vector<T> out(rows * stride);
    for (size_t row = 0; row < rows; ++row) std::copy_n(source + row * size, size, out.data() + row * stride);
    return out;
}

template <class T>
struct GradientColumns {
    std::vector<T> data;
    T* column[COLUMNS];

    explicit GradientColumns(size_t count) : data(COLUMNS * count) {
        for (int k = 0; k < COLUMNS; ++k) column[k] = data.data() + k * count;
    }
};

// Gradient columns of Gaussians [first, last) back to (mean, covariance, amplitude), 13 numbers per Gaussian.
template <class T>
void gather(T* const* columns, size_t first, size_t last, T* out) {
    static const int order[13] = {MX, MY, MZ, SXX, SXY, SXZ, SXY, SYY, SYZ, SXZ, SYZ, SZZ, AMPLITUDE};
    for (size_t j = first; j < last; ++j)
        for (int k = 0; k < 13; ++k) out[13 * j + k] = columns[order[k]][j];
}

// Gaussians per task of a backward pass: does not depend on the number of threads, so neither does any sum.
int chunk_of(int count) { return std::clamp((count + 63) / 64, 32, 1024); }

template <class T>
std::vector<View<T>> views(const Array3<T>& rotation, const Array2<T>& shift, int size, double pixel_size,
                           double cutoff) {
    if (rotation.shape(1) != 3 || rotation.shape(2) != 3 || shift.shape(0) != rotation.shape(0) || shift.shape(1) != 2)
        throw std::invalid_argument("expected rotation (p, 3, 3), shift (p, 2)");
    std::vector<View<T>> out;
    for (size_t p = 0; p < rotation.shape(0); ++p)
        out.push_back({rotation.data() + 9 * p, shift.data() + 2 * p, T(pixel_size), size, T(cutoff)});
    return out;
}

// Draws rows [row0, row1) of an image of size x size pixels.
template <class T>
void draw(const Mixture<T>& mixture, const View<T>& view, int row0, int row1, T* image) {
    const int size = view.size, stride = size + kernels<T>().lanes;
    std::vector<T> band(size_t(row1 - row0) * stride);
    kernels<T>().project(mixture, view, band.data(), stride, row0, row1);
    for (int row = row0; row < row1; ++row)
        std::copy_n(band.data() + size_t(row - row0) * stride, size, image + size_t(row) * size);
}

template <class T>
Result<T, 3> project(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, Array3<T> rotation, Array2<T> shift,
                     int size, double pixel_size, double cutoff, int threads) {
    const auto view = views<T>(rotation, shift, size, pixel_size, cutoff);
    const auto given = rows(mean, covariance, amplitude);
    const size_t images = view.size(), area = size_t(size) * size;
    auto out = numbers<T>(images * area);
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(given);
        const int bands = images >= size_t(threads) ? 1 : int((threads + images - 1) / std::max<size_t>(images, 1));
        share(int(images) * bands, threads, [&](int task) {
            const int p = task / bands, band = task % bands;
            draw(g.mixture, view[p], size * band / bands, size * (band + 1) / bands, out->data() + p * area);
        });
    }
    const size_t shape[3] = {images, size_t(size), size_t(size)};
    return adopt<T, 3>(std::move(out), shape);
}

template <class T>
Result<T, 3> project_each(Array3<T> mean, Array4<T> covariance, Array2<T> amplitude, Array3<T> rotation,
                          Array2<T> shift, int size, double pixel_size, double cutoff, int threads) {
    const auto view = views<T>(rotation, shift, size, pixel_size, cutoff);
    const size_t images = view.size(), area = size_t(size) * size;
    const auto given = rows_of_each(mean, covariance, amplitude, images);
    auto out = numbers<T>(images * area);
    {
        nb::gil_scoped_release unlocked;
        share(int(images), threads, [&](int p) {
            const Columns<T> g(given[p]);
            draw(g.mixture, view[p], 0, size, out->data() + p * area);
        });
    }
    const size_t shape[3] = {images, size_t(size), size_t(size)};
    return adopt<T, 3>(std::move(out), shape);
}

template <class T>
void require_upstream(const Array3<T>& upstream, size_t images) {
    if (upstream.shape(0) != images || upstream.shape(1) != upstream.shape(2))
        throw std::invalid_argument("expected an upstream gradient (p, size, size)");
}

template <class T>
std::pair<Result<T, 2>, Result<T, 2>> project_gradient(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, Array3<T> rotation,
                           Array2<T> shift, Array3<T> upstream, double pixel_size, double cutoff, bool with_pose,
                           int threads) {
    const int size = int(upstream.shape(1));
    const auto view = views<T>(rotation, shift, size, pixel_size, cutoff);
    const auto given = rows(mean, covariance, amplitude);
    const size_t images = view.size(), n = given.count;
    require_upstream(upstream, images);
    auto gathered = numbers<T>(13 * n), poses = numbers<T>(images * POSE_COLUMNS);
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(given);
        const int stride = size + kernels<T>().lanes;
        const auto images_padded = padded(upstream.data(), images * size, size, stride);
        const int chunk = chunk_of(int(n)), tasks = (int(n) + chunk - 1) / chunk;
        GradientColumns<T> gradient(n);
        std::vector<T> partial(with_pose ? size_t(tasks) * images * POSE_COLUMNS : 0);
        share(tasks, threads, [&](int task) {
            const int first = task * chunk, last = std::min(first + chunk, int(n));
            for (size_t p = 0; p < images; ++p)
                kernels<T>().project_gradient(
                    g.mixture, view[p], images_padded.data() + p * size * stride, stride, first, last, gradient.column,
                    with_pose ? partial.data() + (size_t(task) * images + p) * POSE_COLUMNS : nullptr);
            gather(gradient.column, first, last, gathered->data());
        });
        for (size_t i = 0; i < partial.size(); ++i) (*poses)[i % poses->size()] += partial[i];
    }
    const size_t shape[2] = {n, 13}, pose_shape[2] = {images, POSE_COLUMNS};
    return std::make_pair(adopt<T, 2>(std::move(gathered), shape), adopt<T, 2>(std::move(poses), pose_shape));
}

template <class T>
std::pair<Result<T, 3>, Result<T, 2>> project_each_gradient(Array3<T> mean, Array4<T> covariance, Array2<T> amplitude, Array3<T> rotation,
                                Array2<T> shift, Array3<T> upstream, double pixel_size, double cutoff, bool with_pose,
                                int threads) {
    const int size = int(upstream.shape(1));
    const auto view = views<T>(rotation, shift, size, pixel_size, cutoff);
    const size_t images = view.size(), n = mean.shape(1);
    const auto given = rows_of_each(mean, covariance, amplitude, images);
    require_upstream(upstream, images);
    auto gathered = numbers<T>(images * 13 * n), poses = numbers<T>(images * POSE_COLUMNS);
    {
        nb::gil_scoped_release unlocked;
        const int stride = size + kernels<T>().lanes;
        share(int(images), threads, [&](int p) {
            const Columns<T> g(given[p]);
            const auto image = padded(upstream.data() + size_t(p) * size * size, size, size, stride);
            GradientColumns<T> gradient(n);
            kernels<T>().project_gradient(g.mixture, view[p], image.data(), stride, 0, int(n), gradient.column,
                                          with_pose ? poses->data() + size_t(p) * POSE_COLUMNS : nullptr);
            gather(gradient.column, 0, n, gathered->data() + size_t(p) * 13 * n);
        });
    }
    const size_t shape[3] = {images, n, 13}, pose_shape[2] = {images, POSE_COLUMNS};
    return std::make_pair(adopt<T, 3>(std::move(gathered), shape), adopt<T, 2>(std::move(poses), pose_shape));
}

template <class T>
Result<T, 3> voxelize(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, int size, double pixel_size,
                      double cutoff, int threads) {
    const auto given = rows(mean, covariance, amplitude);
    auto out = numbers<T>(size_t(size) * size * size);
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(given);
        // Every voxel receives its terms in the order of the Gaussians, however slices are shared out. Few slabs: each
        // works out anew what the Gaussians are that it has a part of.
        const int stride = size + kernels<T>().lanes, slab = std::max(4, size / (4 * std::max(threads, 1)));
        share((size + slab - 1) / slab, threads, [&](int task) {
            const int z0 = task * slab, z1 = std::min(z0 + slab, size);
            std::vector<T> slices(size_t(z1 - z0) * size * stride);
            kernels<T>().voxelize(g.mixture, T(pixel_size), size, T(cutoff), slices.data(), stride, z0, z1);
            for (size_t row = 0; row < size_t(z1 - z0) * size; ++row)
                std::copy_n(slices.data() + row * stride, size, out->data() + (size_t(z0) * size + row) * size);
        });
    }
    const size_t shape[3] = {size_t(size), size_t(size), size_t(size)};
    return adopt<T, 3>(std::move(out), shape);
}

template <class T>
Result<T, 2> voxelize_gradient(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, Array3<T> upstream,
                               double pixel_size, double cutoff, int threads) {
    const int size = int(upstream.shape(0));
    const auto given = rows(mean, covariance, amplitude);
    const size_t n = given.count;
    if (upstream.shape(1) != size_t(size) || upstream.shape(2) != size_t(size))
        throw std::invalid_argument("expected an upstream gradient (size, size, size)");
    auto gathered = numbers<T>(13 * n);
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(given);
        const int stride = size + kernels<T>().lanes;
        const auto volume = padded(upstream.data(), size_t(size) * size, size, stride);
        GradientColumns<T> gradient(n);
        const int chunk = chunk_of(int(n)), tasks = (int(n) + chunk - 1) / chunk;
        share(tasks, threads, [&](int task) {
            const int first = task * chunk, last = std::min(first + chunk, int(n));
            kernels<T>().voxelize_gradient(g.mixture, T(pixel_size), size, T(cutoff), volume.data(), stride, first,
                                           last, gradient.column);
            gather(gradient.column, first, last, gathered->data());
        });
    }
    const size_t shape[2] = {n, 13};
    return adopt<T, 2>(std::move(gathered), shape);
}

using Slots = nb::ndarray<std::complex<float>, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Spectra = nb::ndarray<const std::complex<float>, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// Adds slices to the half space (numerator, weight), in place.
void insert(Slots numerator, Weights weight, Spectra values, Array3<float> weights, Array3<float> rotation,
            Array2<float> polynomials, double radius, double step, int threads) {
    const int images = int(values.shape(0)), box = int(values.shape(1)), side = int(numerator.shape(0));
    Slices slices{reinterpret_cast<const float*>(values.data()), weights.data(), rotation.data(), polynomials.data(),
                  images, box, float(radius), float(step)};
    HalfSpace space{reinterpret_cast<float*>(numerator.data()), weight.data(), (side - 3) / 2};
    auto same = [](const auto& a, const auto& b) {
        return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1) && a.shape(2) == b.shape(2);
    };
    if (side != space.side() || int(numerator.shape(1)) != side || int(numerator.shape(2)) != space.width() ||
        !same(numerator, weight) || !same(values, weights) || int(values.shape(2)) != box / 2 + 1 ||
        int(rotation.shape(0)) != images || rotation.shape(1) != 3 || rotation.shape(2) != 3 ||
        polynomials.shape(0) != DEGREE + 1 || polynomials.shape(1) != TAPS)
        throw std::invalid_argument("expected a half space (s, s, (s + 3) / 2), slices (p, n, n / 2 + 1)");
    if (!(radius <= box / 2) || !(radius * step <= space.reach))
        throw std::invalid_argument("the slices reach beyond the half space");
    nb::gil_scoped_release unlocked;
    const int slab = std::max(8, (side + 4 * threads - 1) / (4 * threads));
    share((side + slab - 1) / slab, threads,
          [&](int task) { chosen->insert(slices, space, task * slab, std::min((task + 1) * slab, side)); });
}

using Values = nb::ndarray<const std::complex<float>, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Voxels = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Numbers1 = nb::ndarray<const int, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Coefficients coefficients(const Values& values, const Array2<float>& transfer, const Array2<float>& frequency,
                          const Numbers1& image, const Array3<float>& rotation, const Array2<float>& polynomials) {
    const size_t images = values.shape(0), stride = values.shape(1), views = image.shape(0);
    if (transfer.shape(0) != images || transfer.shape(1) != stride || frequency.shape(0) > stride ||
        frequency.shape(1) != 2 || rotation.shape(0) != views || rotation.shape(1) != 3 || rotation.shape(2) != 3 ||
        polynomials.shape(0) != DEGREE + 1 || polynomials.shape(1) != TAPS)
        throw std::invalid_argument("expected values and transfer (i, s), frequency (k, 2), image (v), rotation (v, 3, 3)");
    for (size_t v = 0; v < views; ++v)
        if (image.data()[v] < 0 || size_t(image.data()[v]) >= images)
            throw std::invalid_argument("a view of an image that there is not");
    return {reinterpret_cast<const float*>(values.data()), transfer.data(), frequency.data(), image.data(),
            rotation.data(), polynomials.data(), int(views), int(frequency.shape(0)), int(stride)};
}

// Where all points of all views lie within a half space that is `reach` voxels wide.
void require_within(const Coefficients& seen, int reach) {
    float furthest = 0, stretch = 0;
    for (int p = 0; p < seen.points; ++p)
        furthest = std::max(furthest, seen.frequency[2 * p] * seen.frequency[2 * p] +
                                          seen.frequency[2 * p + 1] * seen.frequency[2 * p + 1]);
    bool finite = true;
    for (int v = 0; v < seen.views; ++v) {
        const float* a = seen.rotation + 9 * v;
        float sum = 0;
        for (int k = 0; k < 6; ++k) sum += a[k] * a[k];
        finite = finite && sum < 1e6f;
        const float xx = a[0] * a[0] + a[1] * a[1] + a[2] * a[2], yy = a[3] * a[3] + a[4] * a[4] + a[5] * a[5];
        const float xy = a[0] * a[3] + a[1] * a[4] + a[2] * a[5], half = (xx - yy) / 2;
        stretch = std::max(stretch, (xx + yy) / 2 + std::sqrt(half * half + xy * xy));
    }
    if (!finite || !(furthest * stretch * 0.9999f <= float(reach) * float(reach)))
        throw std::invalid_argument("a view reaches beyond the half space");
}

Field field_of(float* data, size_t side, size_t rows, size_t width, size_t pitch, int channels) {
    Field field{data, int(side - 3) / 2, int(pitch), channels};
    if (side < 3 || int(side) != field.side() || rows != side || int(width) != field.width() || pitch % 8 ||
        pitch > size_t(MAX_PITCH) || channels < 1 || size_t(2 * channels) > pitch)
        throw std::invalid_argument("expected a half space (s, s, (s + 3) / 2, c), c a multiple of 8 of at most 640");
    return field;
}

// The inner products of each view's image with what it shows of the field's channels (InstructionSet::slice).
Result<float, 3> view_products(Array4<float> data, int channels, bool with_pose, Values values, Array2<float> transfer,
                               Array2<float> frequency, Numbers1 image, Array3<float> rotation,
                               Array2<float> polynomials, int threads) {
    const Coefficients seen = coefficients(values, transfer, frequency, image, rotation, polynomials);
    const Field field = field_of(const_cast<float*>(data.data()), data.shape(0), data.shape(1), data.shape(2),
                                 data.shape(3), channels);
    if (with_pose && channels < 4) throw std::invalid_argument("a gradient takes three channels");
    require_within(seen, field.reach);
    const int count = channels + (with_pose ? 3 : 1);
    auto out = numbers<float>(size_t(seen.views) * count * count);
    {
        nb::gil_scoped_release unlocked;
        const size_t stride = 2 * size_t(seen.points);
        const int chunk = 32;
        share((seen.views + chunk - 1) / chunk, threads, [&](int task) {
            std::vector<float> columns(stride * count);
            for (int view = task * chunk; view < std::min((task + 1) * chunk, seen.views); ++view) {
                chosen->slice(seen, field, with_pose, view, columns.data(), stride);
                chosen->multiply(columns.data(), stride, count, seen.points, out->data() + size_t(view) * count * count);
            }
        });
    }
    const size_t shape[3] = {size_t(seen.views), size_t(count), size_t(count)};
    return adopt<float, 3>(std::move(out), shape);
}

// What each view shows of the channels of a field, without its image.
nb::ndarray<nb::numpy, std::complex<float>, nb::ndim<3>, nb::c_contig> view_slices(
    Array4<float> data, int channels, Array2<float> frequency, Array3<float> rotation, Array2<float> polynomials,
    int threads) {
    const size_t views = rotation.shape(0), points = frequency.shape(0);
    const std::vector<float> ones(points, 1.0f), nothing(2 * points);
    const std::vector<int> first(views);
    const Field field = field_of(const_cast<float*>(data.data()), data.shape(0), data.shape(1), data.shape(2),
                                 data.shape(3), channels);
    if (frequency.shape(1) != 2 || rotation.shape(1) != 3 || rotation.shape(2) != 3 ||
        polynomials.shape(0) != DEGREE + 1 || polynomials.shape(1) != TAPS)
        throw std::invalid_argument("expected frequency (k, 2), rotation (v, 3, 3)");
    const Coefficients seen{nothing.data(), ones.data(), frequency.data(), first.data(), rotation.data(),
                            polynomials.data(), int(views), int(points), int(points)};
    require_within(seen, field.reach);
    auto out = numbers<std::complex<float>>(views * size_t(channels) * points);
    {
        nb::gil_scoped_release unlocked;
        const size_t stride = 2 * points;
        share(int(views), threads, [&](int view) {
            std::vector<float> columns(stride * (channels + 1));
            chosen->slice(seen, field, false, view, columns.data(), stride);
            std::copy_n(columns.data() + stride, stride * channels,
                        reinterpret_cast<float*>(out->data()) + size_t(view) * channels * stride);
        });
    }
    const size_t shape[3] = {views, size_t(channels), points};
    return adopt<std::complex<float>, 3>(std::move(out), shape);
}

using Numbers2 = nb::ndarray<const int, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using HalfSpaceValues = nb::ndarray<const std::complex<float>, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

constexpr int PLACE = 5;  // unknowns of a pose: turns about x, y, z of the image, shifts along x, y

// Solves a symmetric positive system in place of its right side; false where it is not positive.
bool solve(const double* matrix, double* side) {
    double root[PLACE][PLACE];
    for (int i = 0; i < PLACE; ++i)
        for (int j = 0; j <= i; ++j) {
            double sum = matrix[i * PLACE + j];
            for (int k = 0; k < j; ++k) sum -= root[i][k] * root[j][k];
            if (i != j) {
                root[i][j] = sum / root[j][j];
            } else {
                if (!(sum > 0)) return false;
                root[i][i] = std::sqrt(sum);
            }
        }
    for (int i = 0; i < PLACE; ++i) {
        for (int k = 0; k < i; ++k) side[i] -= root[i][k] * side[k];
        side[i] /= root[i][i];
    }
    for (int i = PLACE - 1; i >= 0; --i) {
        for (int k = i + 1; k < PLACE; ++k) side[i] -= root[k][i] * side[k];
        side[i] /= root[i][i];
    }
    return true;
}

// exp([w]x) A.
void turned(const double* w, const double* a, double* out) {
    const double angle = std::sqrt(w[0] * w[0] + w[1] * w[1] + w[2] * w[2]);
    const double s = angle > 1e-8 ? std::sin(angle) / angle : 1.0;
    const double c = angle > 1e-8 ? (1 - std::cos(angle)) / (angle * angle) : 0.5;
    const double cross[3][3] = {{0, -w[2], w[1]}, {w[2], 0, -w[0]}, {-w[1], w[0], 0}};
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
            double sum = a[3 * i + j];
            for (int k = 0; k < 3; ++k) {
                double twice = 0;
                for (int l = 0; l < 3; ++l) twice += cross[i][l] * cross[l][k];
                sum += (s * cross[i][k] + c * twice) * a[3 * k + j];
            }
            out[3 * i + j] = sum;
        }
}

// The rotation vector of A Bᵀ, |w| <= pi.
void between(const double* a, const double* b, double* w) {
    double r[3][3];
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) r[i][j] = a[3 * i] * b[3 * j] + a[3 * i + 1] * b[3 * j + 1] + a[3 * i + 2] * b[3 * j + 2];
    w[0] = r[2][1] - r[1][2], w[1] = r[0][2] - r[2][0], w[2] = r[1][0] - r[0][1];
    const double sine = 0.5 * std::sqrt(w[0] * w[0] + w[1] * w[1] + w[2] * w[2]);
    const double angle = std::atan2(sine, 0.5 * (r[0][0] + r[1][1] + r[2][2] - 1));
    const double factor = sine > 1e-9 ? 0.5 * angle / sine : 0.5;
    for (int k = 0; k < 3; ++k) w[k] *= factor;
}

// One image and one pose of it, on the way downhill.
class Placing {
public:
    Placing(const Sight& seen, const Volume& volume, const double* given, double turn_precision, double shift_precision)
        : seen_(seen), volume_(volume), given_(given), precision_{turn_precision, shift_precision},
          columns_(size_t(PLACE_COLUMNS) * 2 * seen.points), phase_(2 * size_t(3 * seen.reach + 2)) {}

    struct State {
        double rotation[9], move[2], offset[2];  // offset: from where the prior has the shift
        double gain;                             // log p(y | pose) - log p(y | nothing)
        double power;                            // of the model
        double cost;                             // of the prior, less the gain
        double hessian[PLACE * PLACE], slope[PLACE], pull[PLACE];
    };

    void look(State& at) {
        fill_phases(at.move);
        float rotation[9];
        std::copy_n(at.rotation, 9, rotation);
        const size_t stride = 2 * size_t(seen_.points);
        chosen->pose_columns(seen_, volume_, rotation, phase_.data(), columns_.data(), stride);
        float product[PLACE_COLUMNS * PLACE_COLUMNS];
        chosen->multiply(columns_.data(), stride, PLACE_COLUMNS, seen_.points, product);
        at.power = double(product[PLACE_COLUMNS + 1]);
        at.gain = 2 * double(product[1]) - at.power;
        double away[3];
        between(at.rotation, given_, away);
        at.cost = -at.gain;
        for (int i = 0; i < PLACE; ++i) {
            const double distance = i < 3 ? away[i] : at.offset[i - 3], strength = precision_[i < 3 ? 0 : 1];
            at.cost += strength * distance * distance;
            at.pull[i] = strength * distance;
            at.slope[i] = double(product[i + 2]) - double(product[PLACE_COLUMNS + i + 2]);
            for (int j = 0; j < PLACE; ++j)
                at.hessian[i * PLACE + j] = product[(i + 2) * PLACE_COLUMNS + j + 2];
        }
    }

    // Levenberg's steps from a pose that was looked at; how often the image was compared.
    int descend(State& at, int most, double enough, double longest) {
        double damping = 1e-3;
        int looks = 1;
        for (State next = at; looks <= most;) {
            double matrix[PLACE * PLACE], step[PLACE], expected = 0;
            std::copy_n(at.hessian, PLACE * PLACE, matrix);
            for (int i = 0; i < PLACE; ++i) {
                matrix[i * PLACE + i] += precision_[i < 3 ? 0 : 1];
                matrix[i * PLACE + i] *= 1 + damping;
                matrix[i * PLACE + i] += 1e-12;
                step[i] = at.slope[i] - at.pull[i];
            }
            if (!solve(matrix, step)) break;
            for (int i = 0; i < PLACE; ++i) expected += step[i] * (at.slope[i] - at.pull[i]);
            if (!(expected > enough)) break;
            const double turn = std::sqrt(step[0] * step[0] + step[1] * step[1] + step[2] * step[2]);
            if (turn > longest)
                for (double& part : step) part *= longest / turn;
            turned(step, at.rotation, next.rotation);
            for (int k = 0; k < 2; ++k) {
                next.move[k] = at.move[k] + step[3 + k];
                next.offset[k] = at.offset[k] + step[3 + k];
            }
            look(next);
            ++looks;
            if (next.cost < at.cost) {
                at = next;
                damping = std::max(damping / 5, 1e-6);
            } else {
                damping *= 8;
                if (damping > 1e6) break;
            }
        }
        return looks;
    }

private:
    void fill_phases(const double* move) {
        const int reach = seen_.reach;
        for (int k = 0; k <= reach; ++k) set_phase(size_t(k), -move[0] * k);
        for (int k = -reach; k <= reach; ++k) set_phase(size_t(2 * reach + 1 + k), -move[1] * k);
    }
    void set_phase(size_t place, double angle) {
        phase_[2 * place] = float(std::cos(angle)), phase_[2 * place + 1] = float(std::sin(angle));
    }

    const Sight& seen_;
    const Volume& volume_;
    const double* given_;
    double precision_[2];
    std::vector<float> columns_, phase_;
};

// What a search found of each view (PLACED numbers): rotation (9), move of the shift (2), Hessian of the data alone
// (25), gain at the start and at the end, how often the image was compared, power of the model at the end.
constexpr int PLACED = 40;

// Poses of views by Levenberg's method from `rotation` and `move`, a shift of the model; the prior lies at `given` and at a
// shift `offset` before the start, its precisions are 1 / (2 variance). Shifts are in units of the image's box over 2 pi.
Result<double, 2> place_views(HalfSpaceValues space, Values values, Array2<float> transfer, Numbers2 point,
                              Array3<float> magnification, Numbers1 image, Array3<double> rotation,
                              Array3<double> given, Array2<double> move, Array2<double> offset, Array2<float> polynomials,
                              double step, std::pair<double, double> precision, int most, double enough, double longest,
                              int threads) {
    const size_t views = image.shape(0), images = values.shape(0), stride = values.shape(1), points = point.shape(0);
    const Volume volume{reinterpret_cast<const float*>(space.data()), (int(space.shape(0)) - 3) / 2};
    auto square = [](const auto& a, size_t count, size_t size) {
        return a.shape(0) == count && a.shape(1) == size && a.shape(2) == size;
    };
    if (int(space.shape(0)) != volume.side() || int(space.shape(1)) != volume.side() ||
        int(space.shape(2)) != volume.width() || transfer.shape(0) != images || transfer.shape(1) != stride ||
        points > stride || point.shape(1) != 2 || !square(magnification, images, 2) || !square(rotation, views, 3) ||
        !square(given, views, 3) || offset.shape(0) != views || offset.shape(1) != 2 || move.shape(0) != views || move.shape(1) != 2 ||
        polynomials.shape(0) != DEGREE + 1 || polynomials.shape(1) != TAPS)
        throw std::invalid_argument("expected a half space (s, s, (s + 3) / 2), values and transfer (i, s), point (k, 2), "
                                    "magnification (i, 2, 2), rotation and given (v, 3, 3), move and offset (v, 2)");
    int reach = 0;
    float furthest = 0, stretch = 0;
    for (size_t p = 0; p < points; ++p) {
        const int kx = point.data()[2 * p], ky = point.data()[2 * p + 1];
        if (kx < 0) throw std::invalid_argument("a point beyond the half plane");
        reach = std::max({reach, kx, std::abs(ky)});
        furthest = std::max(furthest, float(kx) * kx + float(ky) * ky);
    }
    bool finite = true;
    for (size_t i = 0; i < images; ++i) {
        const float* m = magnification.data() + 4 * i;
        const float xx = m[0] * m[0] + m[2] * m[2], yy = m[1] * m[1] + m[3] * m[3], xy = m[0] * m[1] + m[2] * m[3];
        stretch = std::max(stretch, (xx + yy) / 2 + std::sqrt((xx - yy) * (xx - yy) / 4 + xy * xy));
        finite = finite && xx + yy < 1e6f;
    }
    for (size_t v = 0; v < views; ++v) {
        if (image.data()[v] < 0 || size_t(image.data()[v]) >= images)
            throw std::invalid_argument("a view of an image that there is not");
        for (size_t k = 0; k < 9; ++k) finite = finite && std::abs(rotation.data()[9 * v + k]) < 1.001;
    }
    // A hair more than a rotation may carry a frequency beyond the grid by rounding.
    if (!finite || !(furthest * stretch * float(step * step) * 1.001f <= float(volume.reach) * float(volume.reach)))
        throw std::invalid_argument("a view reaches beyond the half space");
    // Derivatives of polynomials beside them, in rows that are whole vectors.
    alignas(32) float weights[DEGREE + 1][2 * TAPS] = {};
    for (int power = 0; power <= DEGREE; ++power)
        for (int tap = 0; tap < TAPS; ++tap) {
            const float coefficient = polynomials.data()[power * TAPS + tap];
            weights[power][tap] = coefficient;
            if (power < DEGREE) weights[power + 1][TAPS + tap] = float(DEGREE - power) * coefficient;
        }
    auto out = numbers<double>(views * PLACED);
    {
        nb::gil_scoped_release unlocked;
        const int chunk = 8;
        share((int(views) + chunk - 1) / chunk, threads, [&](int task) {
            for (size_t v = size_t(task) * chunk; v < std::min(size_t(task + 1) * chunk, views); ++v) {
                const size_t i = size_t(image.data()[v]);
                const Sight seen{reinterpret_cast<const float*>(values.data()) + 2 * i * stride,
                                 transfer.data() + i * stride, point.data(), magnification.data() + 4 * i,
                                 weights[0], float(step), int(points), reach};
                Placing placing(seen, volume, given.data() + 9 * v, precision.first, precision.second);
                Placing::State at{};
                std::copy_n(rotation.data() + 9 * v, 9, at.rotation);
                std::copy_n(move.data() + 2 * v, 2, at.move);
                std::copy_n(offset.data() + 2 * v, 2, at.offset);
                placing.look(at);
                const double before = at.gain;
                const int looks = placing.descend(at, most, enough, longest);
                double* row = out->data() + v * PLACED;
                std::copy_n(at.rotation, 9, row);
                std::copy_n(at.move, 2, row + 9);
                std::copy_n(at.hessian, PLACE * PLACE, row + 11);
                row[36] = before, row[37] = at.gain, row[38] = looks, row[39] = at.power;
            }
        });
    }
    const size_t shape[2] = {views, size_t(PLACED)};
    return adopt<double, 2>(std::move(out), shape);
}

// Adds all views to a field, in place, with factors for each view (InstructionSet::spread).
void insert_views(Voxels data, int means, Array2<float> moments, Values values, Array2<float> transfer,
                  Array2<float> frequency, Numbers1 image, Array3<float> rotation, Array2<float> polynomials,
                  int threads) {
    const Coefficients seen = coefficients(values, transfer, frequency, image, rotation, polynomials);
    const Field field = field_of(data.data(), data.shape(0), data.shape(1), data.shape(2), data.shape(3), means);
    if (int(moments.shape(0)) != seen.views || int(moments.shape(1)) != field.pitch)
        throw std::invalid_argument("expected moments (v, c)");
    require_within(seen, field.reach);
    nb::gil_scoped_release unlocked;
    const int side = field.side(), slab = std::max(8, (side + 4 * threads - 1) / (4 * threads));
    share((side + slab - 1) / slab, threads, [&](int task) {
        chosen->spread(seen, moments.data(), means, field, task * slab, std::min((task + 1) * slab, side));
    });
}

constexpr int FEW = 2048;  // Gaussians of one task

template <class T>
Result<T, 3> covariances(Array2<T> scale, Array2<T> quaternion, int threads) {
    const size_t n = scale.shape(0);
    if (scale.shape(1) != 3 || quaternion.shape(0) != n || quaternion.shape(1) != 4)
        throw std::invalid_argument("expected scale (g, 3), quaternion (g, 4)");
    auto out = numbers<T>(9 * n);
    {
        nb::gil_scoped_release unlocked;
        share(int((n + FEW - 1) / FEW), threads, [&](int task) {
            for (size_t j = size_t(task) * FEW; j < std::min(size_t(task + 1) * FEW, n); ++j)
                covariance(scale.data() + 3 * j, quaternion.data() + 4 * j, out->data() + 9 * j);
        });
    }
    const size_t shape[3] = {n, 3, 3};
    return adopt<T, 3>(std::move(out), shape);
}

template <class T>
std::pair<Result<T, 2>, Result<T, 2>> covariances_gradient(Array2<T> scale, Array2<T> quaternion, Array3<T> upstream,
                                                           int threads) {
    const size_t n = scale.shape(0);
    if (scale.shape(1) != 3 || quaternion.shape(0) != n || quaternion.shape(1) != 4 || upstream.shape(0) != n ||
        upstream.shape(1) != 3 || upstream.shape(2) != 3)
        throw std::invalid_argument("expected scale (g, 3), quaternion (g, 4), upstream (g, 3, 3)");
    auto scales = numbers<T>(3 * n), quaternions = numbers<T>(4 * n);
    {
        nb::gil_scoped_release unlocked;
        share(int((n + FEW - 1) / FEW), threads, [&](int task) {
            for (size_t j = size_t(task) * FEW; j < std::min(size_t(task + 1) * FEW, n); ++j)
                covariance_gradient(scale.data() + 3 * j, quaternion.data() + 4 * j, upstream.data() + 9 * j,
                                    scales->data() + 3 * j, quaternions->data() + 4 * j);
        });
    }
    const size_t shape[2] = {n, 3}, other[2] = {n, 4};
    return std::make_pair(adopt<T, 2>(std::move(scales), shape), adopt<T, 2>(std::move(quaternions), other));
}

template <class T>
void bind(nb::module_& m) {
    using nb::literals::operator""_a;
    m.def("project", &project<T>, "mean"_a, "covariance"_a, "amplitude"_a, "rotation"_a, "shift"_a, "size"_a,
          "pixel_size"_a, "cutoff"_a, "threads"_a);
    m.def("project_each", &project_each<T>, "mean"_a, "covariance"_a, "amplitude"_a, "rotation"_a, "shift"_a, "size"_a,
          "pixel_size"_a, "cutoff"_a, "threads"_a);
    m.def("project_gradient", &project_gradient<T>, "mean"_a, "covariance"_a, "amplitude"_a, "rotation"_a, "shift"_a,
          "upstream"_a, "pixel_size"_a, "cutoff"_a, "with_pose"_a, "threads"_a);
    m.def("project_each_gradient", &project_each_gradient<T>, "mean"_a, "covariance"_a, "amplitude"_a, "rotation"_a,
          "shift"_a, "upstream"_a, "pixel_size"_a, "cutoff"_a, "with_pose"_a, "threads"_a);
    m.def("covariances", &covariances<T>, "scale"_a, "quaternion"_a, "threads"_a);
    m.def("covariances_gradient", &covariances_gradient<T>, "scale"_a, "quaternion"_a, "upstream"_a, "threads"_a);
    m.def("voxelize", &voxelize<T>, "mean"_a, "covariance"_a, "amplitude"_a, "size"_a, "pixel_size"_a, "cutoff"_a,
          "threads"_a);
    m.def("voxelize_gradient", &voxelize_gradient<T>, "mean"_a, "covariance"_a, "amplitude"_a, "upstream"_a,
          "pixel_size"_a, "cutoff"_a, "threads"_a);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels of emsplat; see emsplat.kernels.cpu";
    bind<float>(m);
    bind<double>(m);
    using nb::literals::operator""_a;
    m.def("insert", &insert, "numerator"_a, "weight"_a, "values"_a, "weights"_a, "rotation"_a, "polynomials"_a,
          "radius"_a, "step"_a, "threads"_a);
    m.def("view_products", &view_products, "field"_a, "channels"_a, "with_pose"_a, "values"_a, "transfer"_a,
          "frequency"_a, "image"_a, "rotation"_a, "polynomials"_a, "threads"_a);
    m.def("view_slices", &view_slices, "field"_a, "channels"_a, "frequency"_a, "rotation"_a, "polynomials"_a,
          "threads"_a);
    m.def("place_views", &place_views, "space"_a, "values"_a, "transfer"_a, "point"_a, "magnification"_a, "image"_a,
          "rotation"_a, "given"_a, "move"_a, "offset"_a, "polynomials"_a, "step"_a, "precision"_a, "most"_a, "enough"_a,
          "longest"_a, "threads"_a);
    m.def("insert_views", &insert_views, "field"_a, "means"_a, "moments"_a, "values"_a, "transfer"_a, "frequency"_a,
          "image"_a, "rotation"_a, "polynomials"_a, "threads"_a);
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const auto* set : available()) names.emplace_back(set->name);
        return names;
    });
    m.def("instruction_set", [] { return std::string(chosen->name); });
    m.def(
        "use_instruction_set",
        [](const std::string& name) {
            for (const auto* set : available())
                if (name == set->name) {
                    chosen = set;
                    return;
                }
            throw std::invalid_argument("this processor or build has no instruction set called " + name);
        },
        "name"_a);
}
