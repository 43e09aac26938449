// Products of one large matrix with one to eight vectors: what the SVM solver and the fused segmentation spend their
// time on. Sums of float products run in float over short stretches and in double from there on.
#pragma once

#include <cstdint>

namespace ttt4as {

constexpr int kMaxRhs = 8;         // vectors a product takes at once
constexpr std::int64_t kPad = 16;  // right-hand sides are padded with zeros to a multiple of this

// The hot loops for matrix elements T and vector elements X, one entry for 1, 2, 4 and 8 vectors.
template <class T, class X>
struct LinearKernels {
    // out[r * out_stride + i] = sum_c m[row(i) * stride + c] * x[r * x_stride + c] for i in [begin, end), r < R.
    // row(i) is rows[i], or i without `rows`. Each x_r is followed by zeros up to a multiple of kPad.
    void (*product[4])(const T* m, std::int64_t stride, std::int64_t cols, const std::int32_t* rows, std::int64_t begin,
                       std::int64_t end, const X* x, std::int64_t x_stride, double* out, std::int64_t out_stride);
    // out[r * out_stride + p] = sum_i m[row(i) * stride + p] * x[i * R + r] for p in [begin, end), i < n, r < R.
    void (*transposed[4])(const T* m, std::int64_t stride, std::int64_t n, const std::int32_t* rows, std::int64_t begin,
                          std::int64_t end, const X* x, double* out, std::int64_t out_stride);
};

// The largest magnitude among n values; infinity or NaN if any of them is not finite.
template <class T>
using MaxAbs = T (*)(const T* x, std::int64_t n);

// The sums of x - shift and of its square.
template <class T>
using Moments = void (*)(const T* x, std::int64_t n, double shift, double* sum, double* square);

// The tables for the instruction set in use.
template <class T, class X>
const LinearKernels<T, X>& linear_kernels() noexcept;
template <class T>
MaxAbs<T> max_abs_kernel() noexcept;
template <class T>
Moments<T> moments_kernel() noexcept;
template <>
const LinearKernels<float, float>& linear_kernels<float, float>() noexcept;
template <>
const LinearKernels<float, double>& linear_kernels<float, double>() noexcept;
template <>
const LinearKernels<double, double>& linear_kernels<double, double>() noexcept;
template <>
MaxAbs<float> max_abs_kernel<float>() noexcept;
template <>
MaxAbs<double> max_abs_kernel<double>() noexcept;
template <>
Moments<float> moments_kernel<float>() noexcept;
template <>
Moments<double> moments_kernel<double>() noexcept;

// `product` with kMaxRhs vectors: four at a time where eight would not stay in the first cache beside the rows. The
// same bits either way.
template <class T>
void product_with_all(const T* m, std::int64_t stride, std::int64_t cols, const std::int32_t* rows, std::int64_t begin,
                      std::int64_t end, const T* x, std::int64_t x_stride, double* out, std::int64_t out_stride) {
    constexpr std::int64_t kNear = 24 << 10;  // bytes
    const auto& kernels = linear_kernels<T, T>();
    if (kMaxRhs * cols * static_cast<std::int64_t>(sizeof(T)) <= kNear) {
        kernels.product[3](m, stride, cols, rows, begin, end, x, x_stride, out, out_stride);
        return;
    }
    for (int r = 0; r < kMaxRhs; r += 4) {
        kernels.product[2](m, stride, cols, rows, begin, end, x + r * x_stride, x_stride, out + r * out_stride,
                           out_stride);
    }
}

struct LinearTable {
    LinearKernels<float, float> ff;
    LinearKernels<float, double> fd;
    LinearKernels<double, double> dd;
    MaxAbs<float> max_abs_f;
    MaxAbs<double> max_abs_d;
    Moments<float> moments_f;
    Moments<double> moments_d;
};

namespace generic {
extern const LinearTable linear_table;
}
namespace avx2 {
extern const LinearTable linear_table;
}
namespace avx512 {
extern const LinearTable linear_table;
}

}  // namespace ttt4as
