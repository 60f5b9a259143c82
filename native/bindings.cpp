// Python binding of the CPU kernels: memory, threads and the choice of the instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/complex.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <complex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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

// Runs work(task) for every task, each exactly once, on up to `threads` threads.
template <class Work>
void share(int tasks, int threads, Work&& work) {
    std::atomic<int> next{0};
    auto loop = [&] {
        for (int task = next++; task < tasks; task = next++) work(task);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < std::min(tasks, threads); ++i) others.emplace_back(loop);
    loop();
    for (auto& thread : others) thread.join();
}

template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array3 = nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Result = nb::ndarray<nb::numpy, T, nb::ndim<N>, nb::c_contig>;

template <class T, int N>
Result<T, N> adopt(std::vector<T>* data, const size_t (&shape)[N]) {
    nb::capsule owner(data, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return Result<T, N>(data->data(), N, shape, owner);
}

// The mixture as columns; symmetric parts of the covariance.
template <class T>
struct Columns {
    std::vector<T> data;
    Mixture<T> mixture;

    Columns(const Array2<T>& mean, const Array3<T>& covariance, const Array1<T>& amplitude) {
        const size_t n = mean.shape(0);
        if (mean.shape(1) != 3 || covariance.shape(0) != n || covariance.shape(1) != 3 || covariance.shape(2) != 3 ||
            amplitude.shape(0) != n)
            throw std::invalid_argument("expected mean (g, 3), covariance (g, 3, 3), amplitude (g)");
        data.resize(COLUMNS * n);
        const T *m = mean.data(), *s = covariance.data(), *a = amplitude.data();
        for (size_t j = 0; j < n; ++j) {
            const T* c = s + 9 * j;
            const T row[COLUMNS] = {m[3 * j], m[3 * j + 1], m[3 * j + 2], c[0], (c[1] + c[3]) / 2, (c[2] + c[6]) / 2,
                                    c[4], (c[5] + c[7]) / 2, c[8], a[j]};
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

// Gradient columns back to (mean, covariance, amplitude) in one array of 13 numbers per Gaussian.
template <class T>
std::vector<T>* gather(const std::vector<T>& columns, size_t n) {
    auto* out = new std::vector<T>(13 * n);
    static const int order[13] = {MX, MY, MZ, SXX, SXY, SXZ, SXY, SYY, SYZ, SXZ, SYZ, SZZ, AMPLITUDE};
    for (size_t j = 0; j < n; ++j)
        for (int k = 0; k < 13; ++k) (*out)[13 * j + k] = columns[order[k] * n + j];
    return out;
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

template <class T>
Result<T, 3> project(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, Array3<T> rotation, Array2<T> shift,
                     int size, double pixel_size, double cutoff, int threads) {
    const auto view = views<T>(rotation, shift, size, pixel_size, cutoff);
    const size_t images = view.size();
    auto* out = new std::vector<T>(images * size * size);
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(mean, covariance, amplitude);
        const int stride = size + kernels<T>().lanes;
        const int bands = images >= size_t(threads) ? 1 : int((threads + images - 1) / std::max<size_t>(images, 1));
        share(int(images) * bands, threads, [&](int task) {
            const int p = task / bands, band = task % bands;
            const int row0 = size * band / bands, row1 = size * (band + 1) / bands;
            std::vector<T> image(size_t(row1 - row0) * stride);
            kernels<T>().project(g.mixture, view[p], image.data(), stride, row0, row1);
            for (int row = row0; row < row1; ++row)
                std::copy_n(image.data() + size_t(row - row0) * stride, size,
                            out->data() + (size_t(p) * size + row) * size);
        });
    }
    const size_t shape[3] = {images, size_t(size), size_t(size)};
    return adopt<T, 3>(out, shape);
}

template <class T>
nb::tuple project_gradient(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, Array3<T> rotation,
                           Array2<T> shift, Array3<T> upstream, double pixel_size, double cutoff, bool with_pose,
                           int threads) {
    const int size = int(upstream.shape(1));
    const auto view = views<T>(rotation, shift, size, pixel_size, cutoff);
    const size_t images = view.size(), n = mean.shape(0);
    if (upstream.shape(0) != images || upstream.shape(2) != size_t(size))
        throw std::invalid_argument("expected an upstream gradient (p, size, size)");
    std::vector<T>* gathered = nullptr;
    auto* poses = new std::vector<T>(images * POSE_COLUMNS);
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(mean, covariance, amplitude);
        const int stride = size + kernels<T>().lanes;
        const auto images_padded = padded(upstream.data(), images * size, size, stride);
        std::vector<T> gradient(COLUMNS * n);
        T* columns[COLUMNS];
        for (int k = 0; k < COLUMNS; ++k) columns[k] = gradient.data() + k * n;
        const int chunk = chunk_of(int(n)), tasks = (int(n) + chunk - 1) / chunk;
        std::vector<T> partial(with_pose ? size_t(tasks) * images * POSE_COLUMNS : 0);
        share(tasks, threads, [&](int task) {
            const int first = task * chunk, last = std::min(first + chunk, int(n));
            for (size_t p = 0; p < images; ++p)
                kernels<T>().project_gradient(
                    g.mixture, view[p], images_padded.data() + p * size * stride, stride, first, last, columns,
                    with_pose ? partial.data() + (size_t(task) * images + p) * POSE_COLUMNS : nullptr);
        });
        for (size_t i = 0; i < partial.size(); ++i) (*poses)[i % poses->size()] += partial[i];
        gathered = gather(gradient, n);
    }
    const size_t shape[2] = {n, 13}, pose_shape[2] = {images, POSE_COLUMNS};
    return nb::make_tuple(adopt<T, 2>(gathered, shape), adopt<T, 2>(poses, pose_shape));
}

template <class T>
Result<T, 3> voxelize(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, int size, double pixel_size,
                      double cutoff, int threads) {
    auto* out = new std::vector<T>(size_t(size) * size * size);
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(mean, covariance, amplitude);
        const int stride = size + kernels<T>().lanes, slab = 4;
        share((size + slab - 1) / slab, threads, [&](int task) {
            const int z0 = task * slab, z1 = std::min(z0 + slab, size);
            std::vector<T> slices(size_t(z1 - z0) * size * stride);
            kernels<T>().voxelize(g.mixture, T(pixel_size), size, T(cutoff), slices.data(), stride, z0, z1);
            for (size_t row = 0; row < size_t(z1 - z0) * size; ++row)
                std::copy_n(slices.data() + row * stride, size, out->data() + (size_t(z0) * size + row) * size);
        });
    }
    const size_t shape[3] = {size_t(size), size_t(size), size_t(size)};
    return adopt<T, 3>(out, shape);
}

template <class T>
Result<T, 2> voxelize_gradient(Array2<T> mean, Array3<T> covariance, Array1<T> amplitude, Array3<T> upstream,
                               double pixel_size, double cutoff, int threads) {
    const int size = int(upstream.shape(0));
    const size_t n = mean.shape(0);
    if (upstream.shape(1) != size_t(size) || upstream.shape(2) != size_t(size))
        throw std::invalid_argument("expected an upstream gradient (size, size, size)");
    std::vector<T>* gathered = nullptr;
    {
        nb::gil_scoped_release unlocked;
        const Columns<T> g(mean, covariance, amplitude);
        const int stride = size + kernels<T>().lanes;
        const auto volume = padded(upstream.data(), size_t(size) * size, size, stride);
        std::vector<T> gradient(COLUMNS * n);
        T* columns[COLUMNS];
        for (int k = 0; k < COLUMNS; ++k) columns[k] = gradient.data() + k * n;
        const int chunk = chunk_of(int(n)), tasks = (int(n) + chunk - 1) / chunk;
        share(tasks, threads, [&](int task) {
            kernels<T>().voxelize_gradient(g.mixture, T(pixel_size), size, T(cutoff), volume.data(), stride,
                                           task * chunk, std::min((task + 1) * chunk, int(n)), columns);
        });
        gathered = gather(gradient, n);
    }
    const size_t shape[2] = {n, 13};
    return adopt<T, 2>(gathered, shape);
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

template <class T>
void bind(nb::module_& m) {
    m.def("project", &project<T>);
    m.def("project_gradient", &project_gradient<T>);
    m.def("voxelize", &voxelize<T>);
    m.def("voxelize_gradient", &voxelize_gradient<T>);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels of emsplat; see emsplat.kernels.cpu";
    bind<float>(m);
    bind<double>(m);
    m.def("insert", &insert);
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const auto* set : available()) names.emplace_back(set->name);
        return names;
    });
    m.def("instruction_set", [] { return std::string(chosen->name); });
    m.def("use_instruction_set", [](const std::string& name) {
        for (const auto* set : available())
            if (name == set->name) {
                chosen = set;
                return;
            }
        throw std::invalid_argument("this processor or build has no instruction set called " + name);
    });
}
