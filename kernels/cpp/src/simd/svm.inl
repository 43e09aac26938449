// The loops of svm_kernels.hpp, compiled once per instruction set (see ttt4as/simd.hpp).
#include "simd/vec.hpp"
#include "svm_kernels.hpp"

namespace ttt4as {
namespace TTT4AS_ISA {
namespace {

// Four partial sums hide the latency of the adds; their order is fixed.
double dot(const double* a, const double* b, std::int64_t n) {
    vd sum[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kD <= n; i += 4 * kD) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sum[k] += loadd(a + i + k * kD) * loadd(b + i + k * kD);
    }
    for (; i + kD <= n; i += kD) sum[0] += loadd(a + i) * loadd(b + i);
    double total = hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; ++i) total += a[i] * b[i];
    return total;
}

double dot_f(const float* a, const double* b, std::int64_t n) {
    vd sum[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kD <= n; i += 4 * kD) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sum[k] += widen(a + i + k * kD) * loadd(b + i + k * kD);
    }
    double total = hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; ++i) total += static_cast<double>(a[i]) * b[i];
    return total;
}

double square_f(const float* a, std::int64_t n) {
    vd sum[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kD <= n; i += 4 * kD) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sum[k] += widen(a + i + k * kD) * widen(a + i + k * kD);
    }
    double total = hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; ++i) total += static_cast<double>(a[i]) * a[i];
    return total;
}

void axpy(double alpha, const double* x, double* y, std::int64_t n) {
    const vd s = setd(alpha);
    std::int64_t i = 0;
    for (; i + kD <= n; i += kD) store(y + i, loadd(y + i) + s * loadd(x + i));
    for (; i < n; ++i) y[i] += alpha * x[i];
}

void axpy_f(double alpha, const float* x, double* y, std::int64_t n) {
    const vd s = setd(alpha);
    std::int64_t i = 0;
    for (; i + kD <= n; i += kD) store(y + i, loadd(y + i) + s * widen(x + i));
    for (; i < n; ++i) y[i] += alpha * static_cast<double>(x[i]);
}

void hinge_line(const double* margin, const double* step, const double* weight, std::int64_t n, double t, double* slope,
                double* curve) {
    vd slopes[2] = {}, curves[2] = {};
    const vd zero = {}, one = zero + 1, at = setd(t);
    std::int64_t i = 0;
    for (; i + 2 * kD <= n; i += 2 * kD) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            const vd s = loadd(step + i + k * kD), m = loadd(margin + i + k * kD) - at * s;
            const vd w = weight ? loadd(weight + i + k * kD) : one;
            const vd ws = m > zero ? w * s : zero;
            slopes[k] += ws * m;
            curves[k] += ws * s;
        }
    }
    double a = hsum(slopes[0] + slopes[1]), b = hsum(curves[0] + curves[1]);
    for (; i < n; ++i) {
        const double m = margin[i] - t * step[i];
        if (!(m > 0)) continue;
        const double ws = (weight ? weight[i] : 1) * step[i];
        a += ws * m;
        b += ws * step[i];
    }
    *slope = a;
    *curve = b;
}

// By rows: entry (i, j) needs the first j entries of rows i and j, which lie side by side. Four rows at a time share
// row j. A pivot lost to rounding (equal samples, no diagonal) is replaced by a tiny one: the step it leads to is
// checked later.
void cholesky(double* m, std::int64_t first, std::int64_t n, std::int64_t stride) {
    constexpr std::int64_t kBlock = 4;
    for (std::int64_t i0 = first; i0 < n; i0 += kBlock) {
        const std::int64_t i1 = i0 + kBlock < n ? i0 + kBlock : n;
        if (i1 - i0 == kBlock) {
            double* r0 = m + i0 * stride;
            double *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
            for (std::int64_t j = 0; j < i0; ++j) {
                const double* other = m + j * stride;
                vd s0 = {}, s1 = {}, s2 = {}, s3 = {};
                std::int64_t k = 0;
                for (; k + kD <= j; k += kD) {
                    const vd v = loadd(other + k);
                    s0 += v * loadd(r0 + k);
                    s1 += v * loadd(r1 + k);
                    s2 += v * loadd(r2 + k);
                    s3 += v * loadd(r3 + k);
                }
                double t0 = hsum(s0), t1 = hsum(s1), t2 = hsum(s2), t3 = hsum(s3);
                for (; k < j; ++k) {
                    t0 += other[k] * r0[k];
                    t1 += other[k] * r1[k];
                    t2 += other[k] * r2[k];
                    t3 += other[k] * r3[k];
                }
                const double inverse = 1 / other[j];
                r0[j] = (r0[j] - t0) * inverse;
                r1[j] = (r1[j] - t1) * inverse;
                r2[j] = (r2[j] - t2) * inverse;
                r3[j] = (r3[j] - t3) * inverse;
            }
        }
        for (std::int64_t i = i0; i < i1; ++i) {
            double* row = m + i * stride;
            for (std::int64_t j = i1 - i0 == kBlock ? i0 : 0; j < i; ++j) {
                row[j] = (row[j] - dot(row, m + j * stride, j)) / m[j * stride + j];
            }
            const double least = 1e-13 * row[i];
            const double pivot = row[i] - dot(row, row, i);
            row[i] = __builtin_sqrt(pivot > least ? pivot : least);
        }
    }
}

// Rows below `index` move up; each has one entry beyond its new diagonal, which rotations of neighbouring columns take
// away.
void cholesky_remove(double* m, std::int64_t index, std::int64_t n, std::int64_t stride, double* rotations) {
    for (std::int64_t i = index; i + 1 < n; ++i) {
        const double* from = m + (i + 1) * stride;
        double* to = m + i * stride;
        for (std::int64_t j = 0; j < index; ++j) to[j] = from[j];
        double carry = from[index];
        for (std::int64_t j = index; j < i; ++j) {
            const double c = rotations[2 * j], s = rotations[2 * j + 1], next = from[j + 1];
            to[j] = c * carry + s * next;
            carry = c * next - s * carry;
        }
        const double diagonal = from[i + 1], length = __builtin_sqrt(carry * carry + diagonal * diagonal);
        rotations[2 * i] = carry / length;
        rotations[2 * i + 1] = diagonal / length;
        to[i] = length;
    }
}

void solve(const double* factor, std::int64_t n, std::int64_t stride, double* x) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = (x[i] - dot(factor + i * stride, x, i)) / factor[i * stride + i];
    for (std::int64_t i = n - 1; i >= 0; --i) {
        x[i] /= factor[i * stride + i];
        axpy(-x[i], factor + i * stride, x, i);
    }
}

}  // namespace

extern const SvmKernels svm_table;
const SvmKernels svm_table = {cholesky, cholesky_remove, solve, dot, axpy, axpy_f, dot_f, square_f, hinge_line};

}  // namespace TTT4AS_ISA
}  // namespace ttt4as
