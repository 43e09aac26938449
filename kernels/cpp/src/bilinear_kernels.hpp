// The loops of bilinear.cpp and upsample.hpp that depend on the instruction set. None of them fuses a multiplication
// with an addition: all sets, layouts and places in a vector give the same bits.
#pragma once

#include <cstdint>

#include "ttt4as/types.hpp"

namespace ttt4as {

// T: what is stored; C: what it is computed in.
template <class T, class C = typename Element<T>::Compute>
struct BilinearKernels {
    // out[i] = a[i] * weight_a + b[i] * weight_b for i < n: from elements as they are stored, or to such.
    void (*blend)(const T* a, const T* b, C weight_a, C weight_b, std::int64_t n, C* out);
    void (*mix)(const C* a, const C* b, C weight_a, C weight_b, std::int64_t n, T* out);
    // out[i] = row[lower[i]] * weight_lower[i] + row[upper[i]] * weight_upper[i] for i < n, with `width` elements in a
    // row.
    void (*spread)(const C* row, std::int64_t width, const std::int32_t* lower, const std::int32_t* upper,
                   const C* weight_lower, const C* weight_upper, std::int64_t n, T* out);
    // out[i] = (top_left[i] * left + top_right[i] * right) * top + (bottom_left[i] * left + ...) * bottom for i < n;
    // taps: top_left, top_right, bottom_left, bottom_right; weights: left, right, top, bottom.
    void (*sample)(const T* const* taps, const C* weights, std::int64_t n, C* out);
};

struct BilinearTable {
    BilinearKernels<Half> half;
    BilinearKernels<BFloat16> bfloat16;
    BilinearKernels<float> f;
    BilinearKernels<double> d;
    // out[i] = top[i] + weight * (bottom[i] - top[i]), and whether that is > 0, for i < n.
    void (*decide)(const float* top, const float* bottom, float weight, std::int64_t n, float* out,
                   std::uint8_t* positive);
};

const BilinearTable& bilinear_table() noexcept;

namespace generic {
extern const BilinearTable bilinear_table;
}
namespace avx2 {
extern const BilinearTable bilinear_table;
}
namespace avx512 {
extern const BilinearTable bilinear_table;
}

}  // namespace ttt4as
