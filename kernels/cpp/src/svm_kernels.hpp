// The dense double-precision loops of the SVM solver that depend on the instruction set.
#pragma once

#include <cstdint>

namespace ttt4as {

// min 1/2 a'(Q + diag(d))a - sum a over 0 <= a <= upper, the dual of a linear SVM on a few samples (labels inside Q).
// Everything is at least `n` long and Q has `stride` doubles a row; gradient = (Q + diag(d))a - 1 always.
struct DualProblem {
    const double* q;
    std::int64_t stride;
    std::int64_t n;
    const double* d;         // 1 / (2 C_i) for the squared hinge, 0 for the hinge
    const double* upper;     // infinity for the squared hinge, C_i for the hinge
    const double* loss;      // C_i: weight of the primal loss
    const double* diagonal;  // q_ii + d_i
    double* a;
    double* gradient;
    double* gain;            // scratch
    bool squared;
};

struct SvmKernels {
    // Coordinate descent, each step on the coordinate that lowers the objective most, until the duality gap of this problem is
    // at most tol times its primal value, or max_steps. Returns whether it got there.
    bool (*descend)(const DualProblem& problem, double tol, std::int64_t max_steps);
    // The lower Cholesky factor in place of the lower triangle of (n, stride), of which the first rows are factored already.
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
