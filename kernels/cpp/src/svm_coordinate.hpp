// The dual route of SvmSolver for the hinge with many support vectors: coordinate descent on one multiplier after
// another (Hsieh et al., ICML 2008). Samples that are points keep w up to date. Mixtures of few points keep the points'
// values up to date instead, by the points' products with each other: to look at a sample then costs four numbers and
// not four vectors, and most samples, whose multiplier rests at a bound, are only looked at.
#pragma once

#include "svm_solver.hpp"

namespace ttt4as {

template <class T, class Samples>
void SvmSolver<T, Samples>::coordinate() {
    const std::int64_t dims = points.dims, side = padded(points.points);
    alpha_.resize(static_cast<std::size_t>(n_));
    order_.resize(static_cast<std::size_t>(n_));
    norms_.resize(static_cast<std::size_t>(n_));
    mean_.resize(static_cast<std::size_t>(n_));
    v_.resize(static_cast<std::size_t>(points.points));
    kept_.resize(w.size());
    padded_vector(u_, points.points);
    best_primal_ = std::numeric_limits<double>::infinity();
    best_dual_ = -best_primal_;
    // The working set's multipliers where it comes first, else those that w suggests: at the bound where a margin is
    // violated.
    evaluate();
    scan(values.data(), b * sigma_);
    const bool warm = !from_set_ && norm2(w.data()) + b * b > 0;
    for (std::int64_t i = 0; i < n_; ++i) {
        order_[i] = static_cast<std::int32_t>(i);
        norms_[i] = 0;
        alpha_[i] = warm && labels[i] * f_[i] < 1 ? weight(i) : 0.0;
    }
    for (std::int64_t j = 0; from_set_ && j < set_; ++j) alpha_[ids_[j]] = a_[j];
    if (settle(alpha_.data()); !(best_dual_ >= 0)) {  // worse than none
        std::fill(alpha_.begin(), alpha_.end(), 0.0);
        settle(alpha_.data());
    }

    if (!Samples::kIsPoint && points.points <= kMostProducts * dims) {
        form_products(side);
        std::int32_t at[4];
        double by[4];
        descend([&](std::int64_t i) { return samples.value(i, v_.data()); },
                [&](std::int64_t i) {
                    const int n = samples.taps(i, at, by);
                    double norm = 0;
                    for (int r = 0; r < n; ++r) {
                        for (int c = 0; c < n; ++c) norm += by[r] * by[c] * point_products_[at[r] * side + at[c]];
                    }
                    return norm;
                },
                [&](std::int64_t i, double move) {
                    const int n = samples.taps(i, at, by);
                    for (int r = 0; r < n; ++r) {
                        add_to(v_.data(), move * by[r], point_products_.data() + at[r] * side, points.points);
                    }
                });
    } else {
        const PointMatrix<T> rows = side_by_side();
        sample_.resize(static_cast<std::size_t>(dims));
        const T* x = nullptr;
        descend(
            [&](std::int64_t i) {
                if (Samples::kIsPoint && sigma_ == 1) {
                    x = rows.data + i * rows.stride;
                } else {
                    samples.gather(i, rows, sigma_, sample_.data());
                    x = sample_.data();
                }
                return b * sigma_ + dot(x, w.data(), dims);
            },
            [&](std::int64_t) { return sigma_ * sigma_ + square(x, dims); },
            [&](std::int64_t, double move) {
                add_to(w.data(), move, x, dims);
                b += move * sigma_;
            });
    }
    if (result_.objective < settled_primal_) {
        std::copy(kept_.begin(), kept_.end(), w.begin());
        b = kept_b_;
        evaluate();
    }
}

// Epochs until the gap is closed. value(i) is what w and b say of sample i, norm(i) its squared length, both asked in
// this order, and move(i, by) adds `by` times sample i to w.
template <class T, class Samples>
template <class Value, class Norm, class Move>
void SvmSolver<T, Samples>::descend(Value&& value, Norm&& norm, Move&& move) {
    constexpr double kAny = std::numeric_limits<double>::infinity();
    std::uint64_t state = 0x9E3779B97F4A7C15u;  // the order is shuffled the same way in every call
    // A multiplier that rests at its bound more firmly than any moved in the last epoch is left out until the next
    // check.
    std::int64_t active = n_;
    double firm_low = kAny, firm_high = -kAny;
    int next_check = 1, last_check = 0;
    std::fill(mean_.begin(), mean_.end(), 0.0);
    std::uint32_t visits = 0;
    for (int epoch = 0; !spent(); ++epoch) {
        ++result_.n_iter;
        for (std::int64_t i = active - 1; i > 0; --i) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            std::swap(order_[i], order_[state % static_cast<std::uint64_t>(i + 1)]);
        }
        double most = 0, least = 0;  // gradients of those that moved
        for (std::int64_t k = 0; k < active;) {
            if (++visits % 1024 == 0 && stopped()) break;
            const std::int64_t i = order_[k];
            const double upper = weight(i);
            const double gradient = upper > 0 ? labels[i] * value(i) - 1 : 0.0;
            if (!(upper > 0) || (alpha_[i] == 0 && gradient > firm_low) ||
                (alpha_[i] == upper && gradient < firm_high)) {
                std::swap(order_[k], order_[--active]);
                continue;
            }
            ++k;
            if (norms_[i] == 0) norms_[i] = norm(i);
            const double next = std::min(upper, std::max(0.0, alpha_[i] - gradient / norms_[i]));
            if (next == alpha_[i]) continue;
            most = std::max(most, gradient);
            least = std::min(least, gradient);
            move(i, (next - alpha_[i]) * labels[i]);
            alpha_[i] = next;
        }
        firm_low = most > 0 ? most : kAny;
        firm_high = least < 0 ? least : -kAny;
        for (std::int64_t i = 0; i < n_; ++i) mean_[i] += alpha_[i];
        if (epoch + 1 < next_check && !spent()) continue;
        // What single moves make the objective swing by is not in the mean of the epochs since the last check.
        if (epoch > last_check) {
            for (std::int64_t i = 0; i < n_; ++i) mean_[i] /= epoch + 1 - last_check;
            settle(mean_.data());
        }
        settle(alpha_.data());
        if ((result_.converged = result_.gap <= tol_)) return;
        last_check = epoch + 1;
        next_check = last_check + std::max(1, epoch / 4);
        std::fill(mean_.begin(), mean_.end(), 0.0);
        active = n_;
        firm_low = kAny;
        firm_high = -kAny;
    }
}

// w, b and the values that the multipliers `a` make, and the gap between the best w and the best multipliers so far:
// the objective goes up and down on its way.
template <class T, class Samples>
void SvmSolver<T, Samples>::settle(const double* a) {
    std::fill(u_.data(), u_.data() + points.points, 0.0);
    double sum = 0, pull = 0;
    for (std::int64_t i = 0; i < n_; ++i) {
        if (a[i] == 0) continue;
        samples.scatter(i, a[i] * labels[i], u_.data());
        sum += a[i];
        pull += a[i] * labels[i];
    }
    points.from_points(u_.data(), w.data());
    for (std::int64_t c = 0; c < points.dims; ++c) w[c] *= sigma_;
    b = pull * sigma_;
    evaluate();
    const double losses = scan(values.data(), b * sigma_), square = norm2(w.data()) + b * b;
    for (std::int64_t p = 0; p < points.points; ++p) v_[p] = values[p] + b * sigma_;
    settled_primal_ = 0.5 * square + losses;
    if (settled_primal_ < best_primal_) {
        best_primal_ = settled_primal_;
        std::copy(w.begin(), w.end(), kept_.begin());
        kept_b_ = b;
    }
    best_dual_ = std::max(best_dual_, sum - 0.5 * square);
    set_gap(best_primal_, best_dual_);
}

// The points with their features side by side: a copy, the size of the points, where they are not.
template <class T, class Samples>
PointMatrix<T> SvmSolver<T, Samples>::side_by_side() {
    PointMatrix<T> rows = points;
    if (!points.channels_first) return rows;
    rows.stride = padded(points.dims);
    point_rows_.resize(static_cast<std::size_t>(points.points * rows.stride));
    copy_rows(1.0, rows.stride);
    rows.data = point_rows_.data();
    rows.channels_first = false;
    return rows;
}

template <class T, class Samples>
void SvmSolver<T, Samples>::copy_rows(double scale, std::int64_t stride) {
    const std::int64_t step = points.channels_first ? 1 : points.stride,
                       move = points.channels_first ? points.stride : 1;
    constexpr std::int64_t kPiece = 16;  // a cache line of floats
    for (std::int64_t c0 = 0; c0 < points.dims; c0 += kPiece) {
        for (std::int64_t p = 0; p < points.points; ++p) {
            for (std::int64_t c = c0; c < std::min(points.dims, c0 + kPiece); ++c) {
                point_rows_[p * stride + c] = static_cast<T>(points.data[p * step + c * move] * scale);
            }
        }
    }
}

// The products of the scaled points with each other, the constant feature's added, in rows `side` apart. They are good
// to the precision of T; what that leaves is made up for by every `settle`.
template <class T, class Samples>
void SvmSolver<T, Samples>::form_products(std::int64_t side) {
    PointMatrix<T> rows = points;
    rows.stride = spaced(points.dims);
    rows.channels_first = false;
    point_rows_.resize(static_cast<std::size_t>((points.points + kBatch) * rows.stride));
    std::fill(point_rows_.begin(), point_rows_.end(), T(0));
    copy_rows(sigma_, rows.stride);
    rows.data = point_rows_.data();
    point_products_.resize(static_cast<std::size_t>(points.points * side));
    products_.resize(static_cast<std::size_t>(kBatch * side));
    for (std::int64_t p = 0; p < points.points; p += kBatch) {
        const int count = static_cast<int>(std::min<std::int64_t>(kBatch, points.points - p));
        rows.products(rows.data + p * rows.stride, count, products_.data(), side);
        for (int r = 0; r < count; ++r) {
            T* to = point_products_.data() + (p + r) * side;
            const double* from = products_.data() + r * side;
            for (std::int64_t q = 0; q < points.points; ++q) to[q] = static_cast<T>(from[q] + sigma_ * sigma_);
        }
    }
}

}  // namespace ttt4as
