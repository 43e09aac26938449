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
    // The points that sample i is made of and their shares; returns how many.
    int taps(std::int64_t i, std::int32_t* at, double* by) const {
        at[0] = static_cast<std::int32_t>(i);
        by[0] = 1;
        return 1;
    }
    // out = scale * sample i.
    void gather(std::int64_t i, const PointMatrix<T>& m, double scale, T* out) const {
        const T* row = m.data + i * m.stride;
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

// Sample i is pixel `pixels[i]` of the upsampled grid. The points are the grid's, or, with `place`, the vectors of a
// GridBasis: then the first `n_mixtures` pixels are mixtures of points `place[grid point]`, and pixel i after them is
// point `own + i`.
template <class T>
struct GridSamples {
    struct Pixel {
        std::int32_t row, col;
    };
    const Pixel* pixels = nullptr;
    std::int64_t n = 0;
    const GridTap* rows = nullptr;  // positions are multiples of the grid's width
    const GridTap* cols = nullptr;
    const std::int32_t* place = nullptr;
    std::int64_t n_mixtures = 0, own = 0;

    std::int64_t size() const { return n; }
    double value(std::int64_t i, const double* v) const {
        if (is_point(i)) return v[own + i];
        const Corners at = corners(i);
        const double x = cols[pixels[i].col].weight, y = rows[pixels[i].row].weight;
        const double top = v[at.a] + x * (v[at.b] - v[at.a]);
        const double bottom = v[at.c] + x * (v[at.d] - v[at.c]);
        return top + y * (bottom - top);
    }
    void scatter(std::int64_t i, double amount, double* u) const {
        if (is_point(i)) {
            u[own + i] += amount;
            return;
        }
        const Corners at = corners(i);
        const double x = cols[pixels[i].col].weight;
        const double bottom = amount * rows[pixels[i].row].weight, top = amount - bottom;
        u[at.a] += top * (1 - x);
        u[at.b] += top * x;
        u[at.c] += bottom * (1 - x);
        u[at.d] += bottom * x;
    }
    int taps(std::int64_t i, std::int32_t* at, double* by) const {
        if (is_point(i)) {
            at[0] = static_cast<std::int32_t>(own + i);
            by[0] = 1;
            return 1;
        }
        const Corners corner = corners(i);
        const double x = cols[pixels[i].col].weight, y = rows[pixels[i].row].weight;
        const std::int64_t points[4] = {corner.a, corner.b, corner.c, corner.d};
        const double shares[4] = {(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x};
        for (int k = 0; k < 4; ++k) at[k] = static_cast<std::int32_t>(points[k]);
        std::copy(shares, shares + 4, by);
        return 4;
    }
    void gather(std::int64_t i, const PointMatrix<T>& m, double scale, T* out) const {
        mix(i, m, scale, 0, m.dims, [&](std::int64_t c, T value) { out[c] = value; });
    }
    // put(c, value) for the features c of sample i in [begin, end).
    template <class Put>
    void mix(std::int64_t i, const PointMatrix<T>& m, double scale, std::int64_t begin, std::int64_t end,
             Put&& put) const {
        const std::int64_t step = m.channels_first ? 1 : m.stride, move = m.channels_first ? m.stride : 1;
        if (is_point(i)) {
            const T* from = m.data + (own + i) * step;
            for (std::int64_t c = begin; c < end; ++c) put(c, static_cast<T>(from[c * move] * scale));
            return;
        }
        const Corners at = corners(i);
        const T *a = m.data + at.a * step, *b = m.data + at.b * step, *c = m.data + at.c * step,
                *d = m.data + at.d * step;
        const double x = cols[pixels[i].col].weight, y = rows[pixels[i].row].weight;
        const T wa = static_cast<T>(scale * (1 - y) * (1 - x)), wb = static_cast<T>(scale * (1 - y) * x);
        const T wc = static_cast<T>(scale * y * (1 - x)), wd = static_cast<T>(scale * y * x);
        for (std::int64_t k = begin; k < end; ++k) {
            put(k, wa * a[k * move] + wb * b[k * move] + wc * c[k * move] + wd * d[k * move]);
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

  private:
    struct Corners {
        std::int64_t a, b, c, d;
    };
    bool is_point(std::int64_t i) const { return place && i >= n_mixtures; }
    Corners corners(std::int64_t i) const {
        const GridTap& y = rows[pixels[i].row];
        const GridTap& x = cols[pixels[i].col];
        const Corners at = {y.lower + x.lower, y.lower + x.upper, y.upper + x.lower, y.upper + x.upper};
        if (!place) return at;
        return {place[at.a], place[at.b], place[at.c], place[at.d]};
    }
};

}  // namespace ttt4as
