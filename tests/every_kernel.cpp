// Every kernel of one instruction set on the same numbers, and what comes out on standard output as raw floats: for
// comparison of processors. Built and run by test_native.py.
#include <cstdio>
#include <cstdint>
#include <vector>

#include "../native/kernels.hpp"

using namespace emsplat;
typedef std::vector<float> Numbers;

// The same everywhere, unlike the distributions of the library.
struct Drawn {
    uint64_t state = 1;
    float operator()(float low, float high) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return low + (high - low) * float(state >> 40) / float(1 << 24);
    }
};

template <class T>
void tell(const std::vector<T>& values) {
    for (T value : values) {
        const float told = float(value);
        std::fwrite(&told, sizeof told, 1, stdout);
    }
}

template <class T>
void splatting(const Kernels<T>& kernels, Drawn drawn) {
    const int count = 300, size = 40, stride = size + kernels.lanes;
    std::vector<std::vector<T>> columns(COLUMNS, std::vector<T>(count));
    Mixture<T> mixture;
    mixture.count = count;
    for (int i = 0; i < count; ++i) {
        for (int axis = 0; axis < 3; ++axis) columns[MX + axis][i] = drawn(-22, 22);
        T root[3][3];  // a covariance is a product with itself
        for (auto& row : root)
            for (T& value : row) value = drawn(-2, 2);
        int column = SXX;
        for (int r = 0; r < 3; ++r)
            for (int q = r; q < 3; ++q) {
                T sum = r == q ? T(0.3) : T(0);
                for (int k = 0; k < 3; ++k) sum += root[r][k] * root[q][k];
                columns[column++][i] = sum;
            }
        columns[AMPLITUDE][i] = drawn(0, 1);
    }
    for (int k = 0; k < COLUMNS; ++k) mixture.column[k] = columns[k].data();
    const T rotation[9] = {0.36, 0.48, -0.8, -0.8, 0.6, 0, 0.48, 0.64, 0.6}, shift[2] = {1.3, -0.7};
    const View<T> view{rotation, shift, T(1.1), size, T(4)};
    std::vector<T> image(size * stride), upstream(size * stride), volume(size * size * stride), above(size * size * stride);
    kernels.project(mixture, view, image.data(), stride, 0, size);
    kernels.voxelize(mixture, T(1.1), size, T(4), volume.data(), stride, 0, size);
    for (T& value : upstream) value = drawn(-1, 1);
    for (T& value : above) value = drawn(-1, 1);
    std::vector<std::vector<T>> gradients(2 * COLUMNS, std::vector<T>(count));
    std::vector<T*> place;
    for (auto& column : gradients) place.push_back(column.data());
    std::vector<T> pose(POSE_COLUMNS);
    kernels.project_gradient(mixture, view, upstream.data(), stride, 0, count, place.data(), pose.data());
    kernels.voxelize_gradient(mixture, T(1.1), size, T(4), above.data(), stride, 0, count, place.data() + COLUMNS);
    // What lies behind the rows is nobody's.
    for (int row = 0; row < size; ++row) tell(std::vector<T>(&image[row * stride], &image[row * stride] + size));
    for (int row = 0; row < size * size; ++row) tell(std::vector<T>(&volume[row * stride], &volume[row * stride] + size));
    for (auto& column : gradients) tell(column);
    tell(pose);
}

void slices(const InstructionSet& set, Drawn drawn) {
    const int box = 16, columns = box / 2 + 1, images = 5, reach = 14;
    Numbers values(images * box * columns * 2), weights(images * box * columns), rotation(9 * images), taps(32);
    for (float& value : values) value = drawn(-1, 1);
    for (float& value : weights) value = drawn(0, 1);
    for (float& value : taps) value = drawn(-1, 1);
    const float some[9] = {0.36f, 0.48f, -0.8f, -0.8f, 0.6f, 0, 0.48f, 0.64f, 0.6f};
    for (int i = 0; i < 9 * images; ++i) rotation[i] = some[(i + i / 9 * 3) % 9];  // rows in another order each
    const Slices given{values.data(), weights.data(), rotation.data(), taps.data(), images, box, 7.9f, 1.5f};
    HalfSpace space{nullptr, nullptr, reach};
    Numbers numerator(size_t(2) * space.side() * space.side() * space.width()), weight(numerator.size() / 2);
    space.numerator = numerator.data();
    space.weight = weight.data();
    set.insert(given, space, 0, space.side());
    tell(numerator);
    tell(weight);
}

int main() {
    splatting<float>(baseline.single, Drawn());
    splatting<double>(baseline.twice, Drawn());
    slices(baseline, Drawn());
}
