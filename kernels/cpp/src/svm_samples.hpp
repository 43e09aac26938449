// What a sample of the SVM is: a point itself, or a bilinear mixture of four points of a grid.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "point_matrix.hpp"
#include "ttt4as/bilinear.hpp"

namespace ttt4as {

// Sample i is point i.
template <class T>
struct PointSamples {
    std::int64_t n = 0;

    std::int64_t size() const { return n; }
    double value(std::int64_t i, const double* v) const { return v[i]; }
    void scatter(std::int64_t i, double a, double* u) const { u[i] += a; }
    void gather(std::int64_t i, const PointMatrix<T>& m, double scale, T* q, int r, int n_batch) const {
        const T* row = m.data + i * m.stride;
        T* out = q + m.batch_at(r, n_batch, 0);
        for (std::int64_t c = 0; c < m.dims; ++c) out[c] = static_cast<T>(row[c] * scale);
    }
    bool neighbours(std::int64_t, std::int64_t) const { return false; }
    static constexpr bool kIsPoint = true;
};

// Taps of one axis with the position of the lower and upper neighbour times `step`.
struct GridTap {
    std::int32_t lower, upper;
    double weight;
};

// Sample i is pixel `pixels[i]` of the upsampled grid.
template <class T>
struct GridSamples {
    struct Pixel {
        std::int32_t row, col;
    };
    const Pixel* pixels = nullptr;
    std::int64_t n = 0;
    const GridTap* rows = nullptr;  // positions are multiples of the grid's width
    const GridTap* cols = nullptr;

    std::int64_t size() const { return n; }
    double value(std::int64_t i, const double* v) const {
        const GridTap& y = rows[pixels[i].row];
        const GridTap& x = cols[pixels[i].col];
        const double top = v[y.lower + x.lower] + x.weight * (v[y.lower + x.upper] - v[y.lower + x.lower]);
        const double bottom = v[y.upper + x.lower] + x.weight * (v[y.upper + x.upper] - v[y.upper + x.lower]);
        return top + y.weight * (bottom - top);
    }
    void scatter(std::int64_t i, double a, double* u) const {
        const GridTap& y = rows[pixels[i].row];
        const GridTap& x = cols[pixels[i].col];
        const double bottom = a * y.weight, top = a - bottom;
        u[y.lower + x.lower] += top * (1 - x.weight);
        u[y.lower + x.upper] += top * x.weight;
        u[y.upper + x.lower] += bottom * (1 - x.weight);
        u[y.upper + x.upper] += bottom * x.weight;
    }
    void gather(std::int64_t i, const PointMatrix<T>& m, double scale, T* q, int r, int n_batch) const {
        const GridTap& y = rows[pixels[i].row];
        const GridTap& x = cols[pixels[i].col];
        const std::int64_t step = m.channels_first ? 1 : m.stride;
        const T* a = m.data + (y.lower + x.lower) * step;
        const T* b = m.data + (y.lower + x.upper) * step;
        const T* c = m.data + (y.upper + x.lower) * step;
        const T* d = m.data + (y.upper + x.upper) * step;
        const T wa = static_cast<T>(scale * (1 - y.weight) * (1 - x.weight));
        const T wb = static_cast<T>(scale * (1 - y.weight) * x.weight);
        const T wc = static_cast<T>(scale * y.weight * (1 - x.weight));
        const T wd = static_cast<T>(scale * y.weight * x.weight);
        const std::int64_t move = m.channels_first ? m.stride : 1;
        const std::int64_t place = m.batch_at(r, n_batch, 0), next = m.batch_at(r, n_batch, 1) - place;
        for (std::int64_t k = 0; k < m.dims; ++k) {
            const std::int64_t at = k * move;
            q[place + k * next] = wa * a[at] + wb * b[at] + wc * c[at] + wd * d[at];
        }
    }
    // Whether two samples are nearly the same vector: in the same cell of the grid and few pixels apart.
    bool neighbours(std::int64_t i, std::int64_t j) const {
        return std::abs(pixels[i].row - pixels[j].row) <= kNear && std::abs(pixels[i].col - pixels[j].col) <= kNear &&
               rows[pixels[i].row].lower == rows[pixels[j].row].lower &&
               cols[pixels[i].col].lower == cols[pixels[j].col].lower;
    }
    static constexpr std::int32_t kNear = 4;
    static constexpr bool kIsPoint = false;
};

}  // namespace ttt4as
