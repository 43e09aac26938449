// The dense double-precision loops of the SVM solver that depend on the instruction set.
#pragma once

#include <cstdint>

namespace ttt4as {

struct SvmKernels {
    // The lower Cholesky factor in place of the lower triangle of (n, stride), of which the first rows are factored
    // already.
    void (*cholesky)(double* matrix, std::int64_t first, std::int64_t n, std::int64_t stride);
    // The factor without row and column `index`; `rotations` has 2 n doubles.
    void (*cholesky_remove)(double* factor, std::int64_t index, std::int64_t n, std::int64_t stride, double* rotations);
    // x = inverse(L L') x with a factor from `cholesky`.
    void (*solve)(const double* factor, std::int64_t n, std::int64_t stride, double* x);
    double (*dot)(const double* a, const double* b, std::int64_t n);
    void (*axpy)(double alpha, const double* x, double* y, std::int64_t n);
    void (*axpy_f)(double alpha, const float* x, double* y, std::int64_t n);
    double (*dot_f)(const float* a, const double* b, std::int64_t n);
    double (*square_f)(const float* a, std::int64_t n);
    // Sums over m = margin - t * step > 0 of weight * m * step and weight * step^2; a weight is 1 without `weight`.
    void (*hinge_line)(const double* margin, const double* step, const double* weight, std::int64_t n, double t,
                       double* slope, double* curve);
};

const SvmKernels& svm_kernels() noexcept;

namespace generic {
extern const SvmKernels svm_table;
}
namespace avx2 {
extern const SvmKernels svm_table;
}
namespace avx512 {
extern const SvmKernels svm_table;
}

}  // namespace ttt4as
