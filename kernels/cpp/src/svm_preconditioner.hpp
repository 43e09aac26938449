// The Hessian of the squared hinge on some of the samples, factored: a preconditioner for the steps that follow, until
// the active samples are others. H = I + A' W A, a row of A being a sample and its constant feature, W = 2 C.
//
// Fewer samples than features: the samples' own matrix, K = A A' + inverse(W), by
//     inverse(H) = I - A' inverse(K) A                                                      (Woodbury).
// Else H itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "point_matrix.hpp"
#include "svm_kernels.hpp"

namespace ttt4as {

template <class T>
class HessianFactor {
  public:
    static constexpr std::int64_t kMost = 4096;  // rows and columns of what is factored

    void forget() noexcept { size_ = 0; }
    explicit operator bool() const noexcept { return size_ > 0; }

    // Multiply-adds to factor `count` samples, in units of those of a pass over the points; infinite where the result
    // would not fit or, by rounding, not serve. `weight` is the least 2 C, `square` a typical |x|^2.
    static double cost(std::int64_t count, std::int64_t dims, double weight, double square) {
        const bool dual = is_dual(count, dims, weight, square);
        const auto side = static_cast<double>(dual ? count : dims), other = static_cast<double>(dual ? dims : count);
        if (side > kMost) return std::numeric_limits<double>::infinity();
        return side * side * other / 2 / kFormSpeed + side * side * side / 6 / kFactorSpeed;
    }

    // Factors the samples `ids`, rows of `points`; weights(i) is 2 C of point i.
    template <class Weight>
    void factor(const PointMatrix<T>& points, const std::int32_t* ids, std::int64_t count, Weight&& weights,
                double least_weight, double square) {
        dual_ = is_dual(count, points.dims, least_weight, square);
        side_ = dual_ ? count : points.dims + 1;
        stride_ = padded(side_);
        matrix_.resize(static_cast<std::size_t>((side_ + kMaxRhs) * stride_));
        if (dual_) {
            ids_.resize(static_cast<std::size_t>(count));
            std::copy(ids, ids + count, ids_.data());
            form_dual(points, weights);
        } else {
            form_primal(points, ids, count, weights);
        }
        svm_kernels().cholesky(matrix_.data(), 0, side_, stride_);
        size_ = count;
    }

    // x = inverse(H) x, dims + 1 values, the constant feature's last.
    void solve(const PointMatrix<T>& points, double* x) {
        if (!dual_) {
            svm_kernels().solve(matrix_.data(), side_, stride_, x);
            return;
        }
        const std::int64_t dims = points.dims;
        vector_.resize(static_cast<std::size_t>(padded(dims)));
        coefficients_.resize(static_cast<std::size_t>(padded(side_)));
        values_.resize(static_cast<std::size_t>(side_));
        moved_.resize(static_cast<std::size_t>(padded(dims)));
        const double up = 1 / narrow(x, dims, vector_);
        const std::int64_t work = side_ * dims;
        const int threads = work < kSerial ? 1 : points.threads;
        const auto there = linear_kernels<T, T>().product[0];
        const auto back = linear_kernels<T, T>().transposed[0];
        parallel_for((side_ + kRows - 1) / kRows, threads, [&](std::int64_t task, int) {
            there(points.data, points.stride, dims, ids_.data(), task * kRows, std::min(side_, (task + 1) * kRows),
                  vector_.data(), padded(dims), values_.data(), 0);
        });
        for (std::int64_t k = 0; k < side_; ++k) values_[k] = values_[k] * up + x[dims];
        svm_kernels().solve(matrix_.data(), side_, stride_, values_.data());
        const double down = 1 / narrow(values_.data(), side_, coefficients_);
        parallel_for((dims + kColumns - 1) / kColumns, threads, [&](std::int64_t task, int) {
            back(points.data, points.stride, side_, ids_.data(), task * kColumns, std::min(dims, (task + 1) * kColumns),
                 coefficients_.data(), moved_.data(), 0);
        });
        double pull = 0;
        for (std::int64_t k = 0; k < side_; ++k) pull += values_[k];
        for (std::int64_t c = 0; c < dims; ++c) x[c] -= down * moved_[c];
        x[dims] -= pull;
    }

    // Bytes held.
    std::size_t memory() const noexcept {
        return matrix_.bytes() + panel_.bytes() + ids_.bytes() + vector_.bytes() + coefficients_.bytes() +
               values_.bytes() + moved_.bytes();
    }

  private:
    // Multiply-adds a unit of time, next to those of a pass: measured, see benchmarks.
    static constexpr double kFormSpeed = 4, kFactorSpeed = 1;
    static constexpr std::int64_t kRows = 64, kColumns = 512, kSerial = 1 << 18;

    // Products in T blur K by a few units of rounding of its diagonal: inverse(W) must stand above that.
    static bool is_dual(std::int64_t count, std::int64_t dims, double weight, double square) {
        return count < dims && 1 / weight > 100 * static_cast<double>(std::numeric_limits<T>::epsilon()) * square;
    }

    // The lower triangle, 8 rows a task.
    template <class Weight>
    void form_dual(const PointMatrix<T>& points, Weight&& weights) {
        const std::int64_t step = spaced(points.dims), panels = (side_ + kMaxRhs - 1) / kMaxRhs;
        panel_.resize(static_cast<std::size_t>(std::min<std::int64_t>(points.threads, panels) * kMaxRhs * step));
        parallel_for(panels, points.threads, [&](std::int64_t task, int worker) {
            const std::int64_t first = (panels - 1 - task) * kMaxRhs;  // long rows first: the last tasks are short
            T* panel = panel_.data() + worker * kMaxRhs * step;
            std::fill(panel, panel + kMaxRhs * step, T(0));
            const std::int64_t rows = std::min<std::int64_t>(kMaxRhs, side_ - first);
            for (std::int64_t r = 0; r < rows; ++r) {
                const T* row = points.data + ids_[first + r] * points.stride;
                std::copy(row, row + points.dims, panel + r * step);
            }
            double* out = matrix_.data() + first * stride_;
            product_with_all(points.data, points.stride, points.dims, ids_.data(), 0, first + rows, panel, step, out,
                             stride_);
            for (std::int64_t r = 0; r < rows; ++r) {
                for (std::int64_t k = 0; k <= first + r; ++k) out[r * stride_ + k] += 1;
                out[r * stride_ + first + r] += 1 / weights(ids_[first + r]);
            }
        });
    }

    // Likewise, 8 columns a task.
    template <class Weight>
    void form_primal(const PointMatrix<T>& points, const std::int32_t* ids, std::int64_t count, Weight&& weights) {
        const std::int64_t dims = points.dims, panels = (dims + kMaxRhs - 1) / kMaxRhs;
        panel_.resize(static_cast<std::size_t>(std::min<std::int64_t>(points.threads, panels) * count * kMaxRhs));
        const auto kernel = linear_kernels<T, T>().transposed[3];
        parallel_for(panels, points.threads, [&](std::int64_t task, int worker) {
            const std::int64_t first = (panels - 1 - task) * kMaxRhs;
            T* panel = panel_.data() + worker * count * kMaxRhs;
            for (std::int64_t k = 0; k < count; ++k) {
                const double factor = weights(ids[k]);
                const T* row = points.data + ids[k] * points.stride;
                for (int r = 0; r < kMaxRhs; ++r) {
                    panel[k * kMaxRhs + r] = first + r < dims ? static_cast<T>(factor * row[first + r]) : T(0);
                }
            }
            kernel(points.data, points.stride, count, ids, 0, std::min(dims, first + kMaxRhs), panel,
                   matrix_.data() + first * stride_, stride_);
        });
        double* last = matrix_.data() + dims * stride_;
        std::fill(last, last + side_, 0.0);
        for (std::int64_t k = 0; k < count; ++k) {
            const double factor = weights(ids[k]);
            const T* row = points.data + ids[k] * points.stride;
            for (std::int64_t c = 0; c < dims; ++c) last[c] += factor * static_cast<double>(row[c]);
            last[dims] += factor;
        }
        for (std::int64_t c = 0; c < side_; ++c) matrix_[c * stride_ + c] += 1;
    }

    bool dual_ = false;
    std::int64_t size_ = 0, side_ = 0, stride_ = 0;
    Buffer<double> matrix_, values_, moved_;
    Buffer<T> panel_, vector_, coefficients_;
    Buffer<std::int32_t> ids_;
};

}  // namespace ttt4as
