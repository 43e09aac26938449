// The loops of linear.hpp, compiled once per instruction set (see ttt4as/simd.hpp).
//
// Cost of `product` and `transposed` with R vectors: the matrix is read once, 2 R operations an element. R = 8 reaches
// the arithmetic limit, R = 1 the bandwidth of the cache that holds the matrix.
#include "linear.hpp"
#include "simd/vec.hpp"

namespace ttt4as {
namespace TTT4AS_ISA {
namespace {

// How T and X are multiplied: in vectors V of N lanes, at most `kStretch` terms a lane-sum before it is widened.
template <class T, class X>
struct Lane;
template <>
struct Lane<float, float> {
    using V = vf;
    using Scalar = float;
    static constexpr int N = kF;
    TTT4AS_INLINE V matrix(const float* p) { return loadf(p); }
    TTT4AS_INLINE V vector(const float* p) { return loadf(p); }
    TTT4AS_INLINE V splat(float x) { return setf(x); }
    TTT4AS_INLINE double sum(V v) { return hsum_wide(v); }
    TTT4AS_INLINE void add_to(double* out, V v) {
        store(out, loadd(out) + widen_low(v));
        store(out + kD, loadd(out + kD) + widen_high(v));
    }
};
template <>
struct Lane<float, double> {
    using V = vd;
    using Scalar = double;
    static constexpr int N = kD;
    TTT4AS_INLINE V matrix(const float* p) { return widen(p); }
    TTT4AS_INLINE V vector(const double* p) { return loadd(p); }
    TTT4AS_INLINE V splat(double x) { return setd(x); }
    TTT4AS_INLINE double sum(V v) { return hsum(v); }
    TTT4AS_INLINE void add_to(double* out, V v) { store(out, loadd(out) + v); }
};
template <>
struct Lane<double, double> {
    using V = vd;
    using Scalar = double;
    static constexpr int N = kD;
    TTT4AS_INLINE V matrix(const double* p) { return loadd(p); }
    TTT4AS_INLINE V vector(const double* p) { return loadd(p); }
    TTT4AS_INLINE V splat(double x) { return setd(x); }
    TTT4AS_INLINE double sum(V v) { return hsum(v); }
    TTT4AS_INLINE void add_to(double* out, V v) { store(out, loadd(out) + v); }
};

constexpr std::int64_t kColStretch = 1024;  // columns of `product` summed in V before widening
constexpr std::int64_t kRowStretch = 128;   // rows of `transposed` summed in V before widening
#if defined(TTT4AS_BUILD_AVX512)
constexpr int kRegisters = 16;  // accumulators that fit beside the operands
#else
constexpr int kRegisters = 8;
#endif

TTT4AS_INLINE std::int64_t row_of(const std::int32_t* rows, std::int64_t i) { return rows ? rows[i] : i; }

template <class T, class X, int R, int I>
TTT4AS_INLINE void product_rows(const T* const* m, std::int64_t cols, const X* x, std::int64_t x_stride, double* out,
                                std::int64_t out_stride) {
    using L = Lane<T, X>;
    using V = typename L::V;
    double total[R][I] = {};
    for (std::int64_t c0 = 0; c0 < cols; c0 += kColStretch) {
        const std::int64_t c1 = c0 + kColStretch < cols ? c0 + kColStretch : cols;
        const std::int64_t whole = c0 + (c1 - c0) / L::N * L::N;
        V acc[R][I] = {};
        for (std::int64_t c = c0; c < whole; c += L::N) {
            V row[I];
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) row[i] = L::matrix(m[i] + c);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const V v = L::vector(x + r * x_stride + c);
#pragma GCC unroll 8
                for (int i = 0; i < I; ++i) acc[r][i] += row[i] * v;
            }
        }
        if (whole < c1) {
            for (int i = 0; i < I; ++i) {
                T last[L::N] = {};
                __builtin_memcpy(last, m[i] + whole, (c1 - whole) * sizeof(T));
                const V row = L::matrix(last);
                for (int r = 0; r < R; ++r) acc[r][i] += row * L::vector(x + r * x_stride + whole);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) total[r][i] += L::sum(acc[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < I; ++i) out[r * out_stride + i] = total[r][i];
}

template <class T, class X, int R>
void product(const T* m, std::int64_t stride, std::int64_t cols, const std::int32_t* rows, std::int64_t begin,
             std::int64_t end, const X* x, std::int64_t x_stride, double* out, std::int64_t out_stride) {
    constexpr int I = R == 1 ? 4 : (kRegisters / R > 0 ? kRegisters / R : 1);
    std::int64_t i = begin;
    for (; i + I <= end; i += I) {
        const T* row[I];
        for (int k = 0; k < I; ++k) row[k] = m + row_of(rows, i + k) * stride;
        product_rows<T, X, R, I>(row, cols, x, x_stride, out + i, out_stride);
    }
    for (; i < end; ++i) {
        const T* row[1] = {m + row_of(rows, i) * stride};
        product_rows<T, X, R, 1>(row, cols, x, x_stride, out + i, out_stride);
    }
}

// One stretch of rows, P vectors of columns: out += .
template <class T, class X, int R, int P>
TTT4AS_INLINE void transposed_block(const T* m, std::int64_t stride, const std::int32_t* rows, std::int64_t i0,
                                    std::int64_t i1, const X* x, double* out, std::int64_t out_stride) {
    using L = Lane<T, X>;
    using V = typename L::V;
    V acc[R][P] = {};
    for (std::int64_t i = i0; i < i1; ++i) {
        const T* row = m + row_of(rows, i) * stride;
        V v[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) v[p] = L::matrix(row + p * L::N);
        __builtin_prefetch(row + P * L::N);
        if (P * L::N * sizeof(T) > 64) __builtin_prefetch(row + P * L::N + 64 / sizeof(T));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const V s = L::splat(x[i * R + r]);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) acc[r][p] += v[p] * s;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) L::add_to(out + r * out_stride + p * L::N, acc[r][p]);
    }
}

// One vector: whole rows are read, a few at a time, into sums that stay in the first cache. Reading down the columns
// instead, rows a power of two apart would share its lines.
template <class T, class X>
void transposed_one(const T* m, std::int64_t stride, std::int64_t n, const std::int32_t* rows, std::int64_t begin,
                    std::int64_t end, const X* x, double* out) {
    using L = Lane<T, X>;
    using V = typename L::V;
    using Scalar = typename L::Scalar;
    constexpr std::int64_t kColumns = 1024;
    constexpr int kRows = 8;
    alignas(64) Scalar sums[kColumns];
    for (std::int64_t p = begin; p < end; ++p) out[p] = 0.0;
    for (std::int64_t p0 = begin; p0 < end; p0 += kColumns) {
        const std::int64_t width = end - p0 < kColumns ? end - p0 : kColumns, whole = width / L::N * L::N;
        for (std::int64_t i0 = 0; i0 < n; i0 += kRowStretch) {
            const std::int64_t i1 = i0 + kRowStretch < n ? i0 + kRowStretch : n;
            for (std::int64_t p = 0; p < width; ++p) sums[p] = 0;
            std::int64_t i = i0;
            for (; i + kRows <= i1; i += kRows) {
                const T* row[kRows];
                V s[kRows];
#pragma GCC unroll 8
                for (int k = 0; k < kRows; ++k) {
                    row[k] = m + row_of(rows, i + k) * stride + p0;
                    s[k] = L::splat(x[i + k]);
                }
                for (std::int64_t p = 0; p < whole; p += L::N) {
                    V next[kRows];  // all loaded before the first is used, or GCC keeps the sum in memory
#pragma GCC unroll 8
                    for (int k = 0; k < kRows; ++k) next[k] = L::matrix(row[k] + p);
                    V sum = load<V>(sums + p);
#pragma GCC unroll 8
                    for (int k = 0; k < kRows; ++k) sum += next[k] * s[k];
                    store(sums + p, sum);
                }
                for (std::int64_t p = whole; p < width; ++p) {
                    for (int k = 0; k < kRows; ++k) sums[p] += static_cast<Scalar>(row[k][p]) * x[i + k];
                }
            }
            for (; i < i1; ++i) {
                const T* row = m + row_of(rows, i) * stride + p0;
                const V s = L::splat(x[i]);
                for (std::int64_t p = 0; p < whole; p += L::N)
                    store(sums + p, load<V>(sums + p) + L::matrix(row + p) * s);
                for (std::int64_t p = whole; p < width; ++p) sums[p] += static_cast<Scalar>(row[p]) * x[i];
            }
            for (std::int64_t p = 0; p < width; ++p) out[p0 + p] += static_cast<double>(sums[p]);
        }
    }
}

template <class T, class X, int R>
void transposed(const T* m, std::int64_t stride, std::int64_t n, const std::int32_t* rows, std::int64_t begin,
                std::int64_t end, const X* x, double* out, std::int64_t out_stride) {
    if constexpr (R == 1) return transposed_one<T, X>(m, stride, n, rows, begin, end, x, out);
    using L = Lane<T, X>;
    constexpr int P = kRegisters / R > 4 ? 4 : (kRegisters / R > 0 ? kRegisters / R : 1);
    constexpr std::int64_t kWide = P * L::N;
    for (int r = 0; r < R; ++r)
        for (std::int64_t p = begin; p < end; ++p) out[r * out_stride + p] = 0.0;
    for (std::int64_t i0 = 0; i0 < n; i0 += kRowStretch) {
        const std::int64_t i1 = i0 + kRowStretch < n ? i0 + kRowStretch : n;
        std::int64_t p = begin;
        for (; p + kWide <= end; p += kWide) {
            transposed_block<T, X, R, P>(m + p, stride, rows, i0, i1, x, out + p, out_stride);
        }
        for (; p + L::N <= end; p += L::N) {
            transposed_block<T, X, R, 1>(m + p, stride, rows, i0, i1, x, out + p, out_stride);
        }
        if (p < end) {  // fewer columns than lanes: through a copy, so that nothing past the row is read
            T last[kRowStretch * L::N] = {};
            double sums[R * L::N] = {};
            for (std::int64_t i = i0; i < i1; ++i) {
                __builtin_memcpy(last + (i - i0) * L::N, m + row_of(rows, i) * stride + p, (end - p) * sizeof(T));
            }
            transposed_block<T, X, R, 1>(last, L::N, nullptr, 0, i1 - i0, x + i0 * R, sums, L::N);
            for (int r = 0; r < R; ++r)
                for (std::int64_t k = 0; k < end - p; ++k) out[r * out_stride + p + k] += sums[r * L::N + k];
        }
    }
}

// Magnitudes compare as the integers of their bits, and those of infinity and NaN are above all others.
template <class T, class V, class Bits, class Word, int N>
T max_abs(const T* x, std::int64_t n) {
    constexpr Word kMagnitude = static_cast<Word>(~(Word(1) << (sizeof(Word) * 8 - 1)));
    Bits most[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * N <= n; i += 4 * N) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const Bits bits = load<Bits>(x + i + k * N) & kMagnitude;
            most[k] = bits > most[k] ? bits : most[k];
        }
    }
    Word lane[4 * N];
    for (int k = 0; k < 4; ++k) store(lane + k * N, most[k]);
    Word best = 0;
    for (int k = 0; k < 4 * N; ++k) best = lane[k] > best ? lane[k] : best;
    for (; i < n; ++i) {
        Word bits;
        __builtin_memcpy(&bits, x + i, sizeof bits);
        bits &= kMagnitude;
        best = bits > best ? bits : best;
    }
    T result;
    __builtin_memcpy(&result, &best, sizeof result);
    return result;
}

template <class T>
void moments(const T* x, std::int64_t n, double shift, double* sum, double* square) {
    vd first[4] = {}, second[4] = {};
    const vd from = setd(shift);
    std::int64_t i = 0;
    for (; i + 4 * kD <= n; i += 4 * kD) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const vd d = widen(x + i + k * kD) - from;
            first[k] += d;
            second[k] += d * d;
        }
    }
    double a = hsum((first[0] + first[1]) + (first[2] + first[3]));
    double b = hsum((second[0] + second[1]) + (second[2] + second[3]));
    for (; i < n; ++i) {
        const double d = static_cast<double>(x[i]) - shift;
        a += d;
        b += d * d;
    }
    *sum = a;
    *square = b;
}

}  // namespace

extern const LinearTable linear_table;
const LinearTable linear_table = {
    {{product<float, float, 1>, product<float, float, 2>, product<float, float, 4>, product<float, float, 8>},
     {transposed<float, float, 1>, transposed<float, float, 2>, transposed<float, float, 4>,
      transposed<float, float, 8>}},
    {{product<float, double, 1>, product<float, double, 2>, product<float, double, 4>, product<float, double, 8>},
     {transposed<float, double, 1>, transposed<float, double, 2>, transposed<float, double, 4>,
      transposed<float, double, 8>}},
    {{product<double, double, 1>, product<double, double, 2>, product<double, double, 4>, product<double, double, 8>},
     {transposed<double, double, 1>, transposed<double, double, 2>, transposed<double, double, 4>,
      transposed<double, double, 8>}},
    max_abs<float, vf, vi, std::int32_t, kF>,
    max_abs<double, vd, vl, std::int64_t, kD>,
    moments<float>,
    moments<double>,
};

}  // namespace TTT4AS_ISA
}  // namespace ttt4as
