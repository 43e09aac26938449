// The dual route of SvmSolver for the hinge with many support vectors: coordinate descent on one multiplier after
// another, w kept up to date (Hsieh et al., ICML 2008).
#pragma once

#include "svm_solver.hpp"

namespace ttt4as {

template <class T, class Samples>
void SvmSolver<T, Samples>::coordinate() {
    const std::int64_t dims = points.dims;
    const auto& kernels = svm_kernels();
    // Features side by side: a copy where they are not, the size of the points.
    const T* data = points.data;
    std::int64_t stride = points.stride;
    if (points.channels_first) {
        stride = padded(dims);
        transposed_.resize(static_cast<std::size_t>(points.points * stride));
        for (std::int64_t c0 = 0; c0 < dims; c0 += 16) {
            for (std::int64_t p = 0; p < points.points; ++p) {
                for (std::int64_t c = c0; c < std::min(dims, c0 + 16); ++c) {
                    transposed_[p * stride + c] = points.data[c * points.stride + p];
                }
            }
        }
        data = transposed_.data();
    }
    PointMatrix<T> side = points;
    side.data = data;
    side.stride = stride;
    side.channels_first = false;
    sample_.resize(static_cast<std::size_t>(points.dims));
    alpha_.resize(static_cast<std::size_t>(n_));
    order_.resize(static_cast<std::size_t>(n_));
    padded_vector(u_, points.points);
    // The working set's multipliers where it comes first, else those that w suggests: at the bound where a margin is
    // violated.
    evaluate();
    scan(values.data(), b * sigma_);
    const bool warm = !from_set_ && norm2(w.data()) + b * b > 0;
    for (std::int64_t i = 0; i < n_; ++i) {
        order_[i] = static_cast<std::int32_t>(i);
        alpha_[i] = warm && labels[i] * f_[i] < 1 ? weight(i) : 0.0;
    }
    for (std::int64_t j = 0; from_set_ && j < set_; ++j) alpha_[ids_[j]] = a_[j];
    // w, b, the values and the gap of alpha_.
    double dual = 0;
    const auto settle = [&] {
        std::fill(u_.data(), u_.data() + points.points, 0.0);
        double sum = 0, pull = 0;
        for (std::int64_t i = 0; i < n_; ++i) {
            if (alpha_[i] == 0) continue;
            samples.scatter(i, alpha_[i] * labels[i], u_.data());
            sum += alpha_[i];
            pull += alpha_[i] * labels[i];
        }
        points.from_points(u_.data(), w.data());
        for (std::int64_t c = 0; c < dims; ++c) w[c] *= sigma_;
        b = pull * sigma_;
        evaluate();
        const double losses = scan(values.data(), b * sigma_);
        const double square = norm2(w.data()) + b * b;
        dual = sum - 0.5 * square;
        return set_gap(0.5 * square + losses, dual);
    };
    settle();
    if (!(dual >= 0)) {  // worse than none
        std::fill(alpha_.begin(), alpha_.end(), 0.0);
        settle();
    }
    std::uint64_t state = 0x9E3779B97F4A7C15u;  // the order is shuffled the same way in every call
    int next_check = 1;
    for (int epoch = 0; result_.n_iter < max_iter_; ++epoch) {
        ++result_.n_iter;
        for (std::int64_t i = n_ - 1; i > 0; --i) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            std::swap(order_[i], order_[state % static_cast<std::uint64_t>(i + 1)]);
        }
        for (std::int64_t k = 0; k < n_; ++k) {
            const std::int64_t i = order_[k];
            const double upper = weight(i);
            if (!(upper > 0)) continue;
            const T* x;
            if constexpr (Samples::kIsPoint) {
                if (sigma_ == 1) {
                    x = data + i * stride;
                } else {
                    samples.gather(i, side, sigma_, sample_.data());
                    x = sample_.data();
                }
            } else {
                samples.gather(i, side, sigma_, sample_.data());
                x = sample_.data();
            }
            double norm = sigma_ * sigma_, value = b * sigma_;
            if constexpr (sizeof(T) == 4) {
                value += kernels.dot_f(x, w.data(), dims);
                norm += kernels.square_f(x, dims);
            } else {
                value += kernels.dot(x, w.data(), dims);
                norm += kernels.dot(x, x, dims);
            }
            const double gradient = labels[i] * value - 1;
            const double next = std::min(upper, std::max(0.0, alpha_[i] - gradient / norm));
            const double move = (next - alpha_[i]) * labels[i];
            if (move == 0) continue;
            alpha_[i] = next;
            if constexpr (sizeof(T) == 4) {
                kernels.axpy_f(move, x, w.data(), dims);
            } else {
                kernels.axpy(move, x, w.data(), dims);
            }
            b += move * sigma_;
        }
        if (epoch + 1 >= next_check || result_.n_iter >= max_iter_) {
            next_check = epoch + 1 + std::max(1, epoch / 4);
            if (settle() <= tol_) {
                result_.converged = true;
                return;
            }
        }
    }
}

}  // namespace ttt4as
