// The points that an SVM's samples are made of, as a matrix in either orientation, and its products with vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "linear.hpp"
#include "ttt4as/common.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {

inline std::int64_t padded(std::int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// From one vector to the next where several are read side by side: `padded`, and an odd number of cache lines of
// floats, because lines a power of two apart share a place in the first cache.
inline std::int64_t spaced(std::int64_t n) { return padded(n) + (padded(n) / kPad % 2 ? 0 : kPad); }

// A vector with zeros up to a multiple of kPad.
template <class X>
X* padded_vector(Buffer<X>& buffer, std::int64_t n) {
    buffer.resize(static_cast<std::size_t>(padded(n)));
    std::fill(buffer.data() + n, buffer.data() + padded(n), X(0));
    return buffer.data();
}

// The power of two that brings `magnitude` (finite) to [1, 2), or the greatest there is, for subnormal ones; 1 for
// zero.
inline double normaliser(double magnitude) {
    return magnitude > 0 ? std::ldexp(1.0, std::min(-std::ilogb(magnitude), 1023)) : 1.0;
}

// `from` in T, scaled so that its largest magnitude is in [1, 2) times `headroom`, and zeros up to a multiple of kPad,
// for which `to` has room. Returns the scale, a power of two if `headroom` is one.
template <class T>
double narrow(const double* from, std::int64_t n, Buffer<T>& to, double headroom = 1) {
    double most = 0;
    for (std::int64_t k = 0; k < n; ++k) most = std::max(most, std::abs(from[k]));
    const double scale = normaliser(most) * headroom;
    for (std::int64_t k = 0; k < n; ++k) to[k] = static_cast<T>(from[k] * scale);
    std::fill(to.data() + n, to.data() + padded(n), T(0));
    return scale;
}

// `points` vectors of `dims` features: rows of length `dims` (row-major samples, channels-last maps), or, with
// `channels_first`, columns of a (dims, points) matrix.
template <class T>
class PointMatrix {
  public:
    const T* data = nullptr;
    std::int64_t stride = 0;
    std::int64_t points = 0;
    std::int64_t dims = 0;
    bool channels_first = false;
    int threads = 1;

    // v[p] = x_p . w, every term in the precision of X: double, or T. `w` is padded.
    template <class X>
    void to_points(const X* w, double* v) const {
        if (channels_first) {
            by_columns(w, v, points);
        } else {
            by_rows(w, v, points);
        }
    }
    // w = sum_p u[p] x_p, likewise. `u` is padded.
    template <class X>
    void from_points(const X* u, double* w) const {
        if (channels_first) {
            by_rows(u, w, dims);
        } else {
            by_columns(u, w, points);
        }
    }
    // w = sum_k u[k] x_some[k] of `count` points given as rows. `u` is padded.
    template <class X>
    void from_some(const std::int32_t* some, std::int64_t count, const X* u, double* w) const {
        by_columns(u, w, count, some);
    }
    // out[r * out_stride + p] = x_p . q_r for r < count, kMaxRhs vectors at a time, of points in rows. Vectors lie
    // spaced(dims) apart, padded, and room for a multiple of kMaxRhs of them is readable. A piece of the points stays
    // in the cache for all vectors.
    void products(const T* q, int count, double* out, std::int64_t out_stride) const {
        split(points, 64, points * dims * count, [&](std::int64_t begin, std::int64_t end) {
            for (int done = 0; done < count; done += kMaxRhs) {
                const int left = count - done, n = left <= 1 ? 0 : left <= 2 ? 1 : left <= 4 ? 2 : 3;
                const T* batch = q + done * spaced(dims);
                double* to = out + done * out_stride;
                if (n == 3) {
                    product_with_all(data, stride, dims, nullptr, begin, end, batch, spaced(dims), to, out_stride);
                } else {
                    linear_kernels<T, T>().product[n](data, stride, dims, nullptr, begin, end, batch, spaced(dims), to,
                                                      out_stride);
                }
            }
        });
    }
    // v[k] = x_k . p, then w = sum_k turn(k, v[k]) x_k, over some of the points (all without `subset`) in the precision
    // of T, for points in rows. One pass: the points of a block are in the first or second cache when they are needed
    // again. Vectors are padded, and `scratch` keeps what this needs. `headroom` scales what is summed in T, where the
    // points are enormous.
    struct RoundTrip {
        Buffer<double> sums;
        Buffer<T> turned;
    };
    template <class Turn>
    void round_trip(const T* p, const std::int32_t* subset, std::int64_t count, Turn&& turn, double headroom, double* v,
                    double* w, RoundTrip& scratch) const {
        const std::int64_t tasks = (count + kTaskPoints - 1) / kTaskPoints;
        scratch.sums.resize(static_cast<std::size_t>(2 * tasks * dims));
        scratch.turned.resize(static_cast<std::size_t>(tasks * kBlockPoints));
        const auto there = linear_kernels<T, T>().product[0];
        const auto back = linear_kernels<T, T>().transposed[0];
        parallel_for(tasks, 2 * count * dims < kSerial ? 1 : threads, [&](std::int64_t task, int) {
            T* turned = scratch.turned.data() + task * kBlockPoints;
            double *sums = scratch.sums.data() + 2 * task * dims, *part = sums + dims;
            std::fill(sums, sums + dims, 0.0);
            const std::int64_t end = std::min(count, (task + 1) * kTaskPoints);
            for (std::int64_t begin = task * kTaskPoints; begin < end; begin += kBlockPoints) {
                const std::int64_t n = std::min(kBlockPoints, end - begin);
                const T* rows = subset ? data : data + begin * stride;
                const std::int32_t* some = subset ? subset + begin : nullptr;
                there(rows, stride, dims, some, 0, n, p, padded(dims), v + begin, 0);
                double most = 0;
                for (std::int64_t k = 0; k < n; ++k) most = std::max(most, std::abs(turn(begin + k, v[begin + k])));
                const double down = normaliser(most) * headroom, up = 1 / down;  // T may have a small range
                for (std::int64_t k = 0; k < n; ++k) turned[k] = static_cast<T>(turn(begin + k, v[begin + k]) * down);
                back(rows, stride, n, some, 0, dims, turned, part, 0);
                for (std::int64_t c = 0; c < dims; ++c) sums[c] += up * part[c];
            }
        });
        std::fill(w, w + dims, 0.0);
        for (std::int64_t task = 0; task < tasks; ++task) {
            for (std::int64_t c = 0; c < dims; ++c) w[c] += scratch.sums[2 * task * dims + c];
        }
    }

  private:
    static constexpr std::int64_t kSerial =
        1 << 19;  // multiply-adds below which a second thread costs more than it brings
    static constexpr std::int64_t kTaskPoints = 128, kBlockPoints = 32;  // of a round trip

    // Tasks are the same whatever the number of threads, and no sum crosses one.
    template <class Body>
    void split(std::int64_t n, std::int64_t grain, std::int64_t work, Body&& body) const {
        const std::int64_t tasks = (n + grain - 1) / grain;
        parallel_for(tasks, work < kSerial ? 1 : threads,
                     [&](std::int64_t task, int) { body(task * grain, std::min(n, (task + 1) * grain)); });
    }
    // The matrix's rows, of which there are `rows`, times the vector.
    template <class X>
    void by_rows(const X* x, double* out, std::int64_t rows) const {
        const std::int64_t cols = channels_first ? points : dims;
        const auto kernel = linear_kernels<T, X>().product[0];
        split(rows, 64, rows * cols, [&](std::int64_t begin, std::int64_t end) {
            kernel(data, stride, cols, nullptr, begin, end, x, padded(cols), out, 0);
        });
    }
    // The vector times the matrix's rows.
    template <class X>
    void by_columns(const X* x, double* out, std::int64_t rows, const std::int32_t* some = nullptr) const {
        const std::int64_t cols = channels_first ? points : dims;
        const std::int64_t length = channels_first ? dims : rows;
        const auto kernel = linear_kernels<T, X>().transposed[0];
        // A column's sum is the same wherever the columns are cut: as long pieces as there are threads to take them.
        const std::int64_t grain = std::max<std::int64_t>(128, (cols / std::max(threads, 1) + 63) / 64 * 64);
        split(cols, grain, length * cols,
              [&](std::int64_t begin, std::int64_t end) { kernel(data, stride, length, some, begin, end, x, out, 0); });
    }
};

}  // namespace ttt4as
