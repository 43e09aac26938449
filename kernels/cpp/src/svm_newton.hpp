// The primal route of SvmSolver: Newton steps for the squared hinge.
//
// The Hessian on the active samples (those that violate their margin) is I + 2 X' C X, bias included as a last feature.
// A step solves it by conjugate gradients in the precision of T, one pass over the points an iteration where samples
// are points. Margins follow the steps instead of being computed anew. Gradient and gap are in double near the end, and
// what decides that it is the end always is.
#pragma once

#include "svm_solver.hpp"

namespace ttt4as {

// From f_: the active samples, their multipliers 2 C m scattered onto the points, w of those multipliers (a feasible
// point of the dual), and the best dual value on the ray through it. Returns how many samples are active.
template <class T, class Samples>
std::int64_t SvmSolver<T, Samples>::dual_of_margins(double* dual) {
    if (!Samples::kIsPoint) std::fill(u_.data(), u_.data() + points.points, 0.0);
    double sum = 0, pull = 0, penalty = 0;
    std::int64_t active = 0;
    for (std::int64_t i = 0; i < n_; ++i) {
        const double m = 1 - labels[i] * f_[i];
        const double c = weight(i);
        curvature_[i] = m > 0 ? 2 * c : 0.0;
        if (!(curvature_[i] > 0)) continue;
        const double a = 2 * c * m;
        if constexpr (Samples::kIsPoint) {
            u_[active] = a * labels[i];
        } else {
            samples.scatter(i, a * labels[i], u_.data());
        }
        active_[active++] = static_cast<std::int32_t>(i);
        sum += a;
        pull += a * labels[i];
        penalty += a * m;  // a^2 / (2 C)
    }
    const std::int64_t n_vectors = Samples::kIsPoint ? active : points.points;
    const auto sum_up = [&](const auto* u) {
        if constexpr (Samples::kIsPoint) {
            points.from_some(active_.data(), active, u, dual_w_.data());
        } else {
            points.from_points(u, dual_w_.data());
        }
    };
    if (exact_) {
        std::fill(u_.data() + n_vectors, u_.data() + padded(n_vectors), 0.0);
        sum_up(u_.data());
    } else {
        const double down = narrow(u_.data(), n_vectors, vector_points_, headroom_);
        sum_up(vector_points_.data());
        for (std::int64_t c = 0; c < points.dims; ++c) dual_w_[c] *= 1 / down;
    }
    if (sigma_ != 1) {
        for (std::int64_t c = 0; c < points.dims; ++c) dual_w_[c] *= sigma_;
    }
    const double dual_b = pull * sigma_;
    gradient_b_ = b - dual_b;
    for (std::int64_t c = 0; c < points.dims; ++c) gradient_w_[c] = w[c] - dual_w_[c];
    const double square = norm2(dual_w_.data()) + dual_b * dual_b + penalty;
    *dual = square > 0 ? 0.5 * sum * sum / square : 0.0;
    return active;
}

// out = (I + 2 X' C X) p on the active samples, scaled points; p and out have dims + 1 values, the bias last. Leaves
// x . p of the active samples, or of all where most are active, in v_.
template <class T, class Samples>
void SvmSolver<T, Samples>::apply_hessian(const double* p, std::int64_t active, double* out) {
    const std::int64_t dims = points.dims;
    const double up = narrow(p, dims, vector_, headroom_), scale = sigma_ / up, bias = p[dims] * sigma_;
    double pull = 0;
    if constexpr (Samples::kIsPoint) {
        const bool all = most_active(active);
        const auto turn = [&](std::int64_t k, double value) {
            return curvature_[all ? k : active_[k]] * (value * scale + bias);
        };
        const std::int64_t count = all ? n_ : active;
        points.round_trip(vector_.data(), all ? nullptr : active_.data(), count, turn, headroom_, v_.data(), out,
                          round_trip_);
        for (std::int64_t k = 0; k < count; ++k) {
            pull += turn(k, v_[k]);
            v_[k] *= 1 / up;
        }
        for (std::int64_t c = 0; c < dims; ++c) out[c] = p[c] + out[c] * sigma_;
    } else {
        points.to_points(vector_.data(), v_.data());
        std::fill(u_.data(), u_.data() + points.points, 0.0);
        for (std::int64_t k = 0; k < active; ++k) {
            const std::int64_t i = active_[k];
            const double z = curvature_[i] * (samples.value(i, v_.data()) * scale + bias);
            samples.scatter(i, z, u_.data());
            pull += z;
        }
        const double down = narrow(u_.data(), points.points, vector_points_, headroom_);
        points.from_points(vector_points_.data(), out);
        for (std::int64_t c = 0; c < dims; ++c) out[c] = p[c] + out[c] * (sigma_ / down);
    }
    out[dims] = p[dims] + pull * sigma_;
}

// v_ = x_p . p: as precise as is needed now.
template <class T, class Samples>
void SvmSolver<T, Samples>::to_points(const Buffer<double>& p) {
    if (exact_) {
        points.to_points(p.data(), v_.data());
        return;
    }
    const double up = 1 / narrow(p.data(), points.dims, vector_, headroom_);
    points.to_points(vector_.data(), v_.data());
    for (std::int64_t k = 0; k < points.points; ++k) v_[k] *= up;
}

// step_ = -inverse(H) gradient to a relative residual of `tolerance`.
template <class T, class Samples>
void SvmSolver<T, Samples>::conjugate_gradients(double tolerance, std::int64_t active) {
    const std::int64_t side = points.dims + 1;
    const auto& kernels = svm_kernels();
    std::fill(step_.data(), step_.data() + side, 0.0);
    for (std::int64_t c = 0; c < points.dims; ++c) residual_[c] = -gradient_w_[c];
    residual_[points.dims] = -gradient_b_;
    const auto precondition = [&] {
        std::copy(residual_.data(), residual_.data() + side, solved_.data());
        if (hessian_) hessian_.solve(points, solved_.data());
    };
    precondition();
    std::copy(solved_.data(), solved_.data() + side, direction_.data());
    double rho = kernels.dot(residual_.data(), solved_.data(), side);
    const double goal = tolerance * tolerance * kernels.dot(residual_.data(), residual_.data(), side);
    const bool gathers = step_is_gathered(active);
    if (gathers) std::fill(gathered_.begin(), gathered_.end(), 0.0);
    for (inner_ = 0; inner_ < kMostInner;) {
        apply_hessian(direction_.data(), active, image_.data());
        ++inner_;
        const double curvature = kernels.dot(direction_.data(), image_.data(), side);
        if (!(curvature > 0) || !(rho > 0)) break;
        const double alpha = rho / curvature;
        kernels.axpy(alpha, direction_.data(), step_.data(), side);
        if (gathers) kernels.axpy(alpha, v_.data(), gathered_.data(), n_);
        kernels.axpy(-alpha, image_.data(), residual_.data(), side);
        if (kernels.dot(residual_.data(), residual_.data(), side) <= goal) break;
        if (inner_ % 16 == 0 && stopped()) break;
        precondition();
        const double next = kernels.dot(residual_.data(), solved_.data(), side);
        const double beta = next / rho;
        rho = next;
        for (std::int64_t c = 0; c < side; ++c) direction_[c] = solved_[c] + beta * direction_[c];
    }
    step_b_ = step_[points.dims];
}

// The minimiser along the step: the objective is piecewise quadratic in t, so Newton on its derivative ends after a few
// scans.
template <class T, class Samples>
double SvmSolver<T, Samples>::line_search() {
    const auto& kernels = svm_kernels();
    const double slope0 = kernels.dot(w.data(), step_.data(), points.dims) + b * step_b_;
    const double curve0 = kernels.dot(step_.data(), step_.data(), points.dims) + step_b_ * step_b_;
    double low = 0, high = std::numeric_limits<double>::infinity(), t = 1;
    margins_.resize(static_cast<std::size_t>(n_));
    for (std::int64_t i = 0; i < n_; ++i) {
        margins_[i] = 1 - labels[i] * f_[i];
        f_step_[i] *= labels[i];
    }
    for (int round = 0; round < 50; ++round) {
        double slope, curve;
        kernels.hinge_line(margins_.data(), f_step_.data(), sample_weight, n_, t, &slope, &curve);
        slope = slope0 + t * curve0 - 2 * cost_ * slope;
        curve = curve0 + 2 * cost_ * curve;
        (slope < 0 ? low : high) = t;
        double next = t - slope / curve;
        if (!(next > low && next < high)) next = std::isinf(high) ? 2 * t : 0.5 * (low + high);
        if (std::abs(next - t) <= 1e-12 * next) return next;
        t = next;
    }
    return t;
}

// Every kSubset-th sample alone, with C to match, solved roughly: the first Newton steps only find out which samples
// are active.
template <class T, class Samples>
void SvmSolver<T, Samples>::newton_from_subset() {
    const std::int64_t n = n_, count = (n + kSubset - 1) / kSubset;
    subset_labels_.resize(static_cast<std::size_t>(count));
    if (sample_weight) subset_weight_.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
        subset_labels_[i] = labels[i * kSubset];
        if (sample_weight) subset_weight_[i] = sample_weight[i * kSubset];
    }
    const auto whole_points = points;
    const auto whole_samples = samples;
    const auto* const whole_labels = labels;
    const auto* const whole_weight = sample_weight;
    labels = subset_labels_.data();
    if (sample_weight) sample_weight = subset_weight_.data();
    points.stride *= kSubset;
    points.points = samples.n = n_ = count;
    cost_ *= kSubset;
    const int all = max_iter_;
    max_iter_ = std::min(all, result_.n_iter + kSubsetSteps);
    newton_steps(0.05);
    max_iter_ = all;
    result_.converged = false;
    cost_ /= kSubset;
    points = whole_points;
    samples = whole_samples;
    labels = whole_labels;
    sample_weight = whole_weight;
    n_ = n;
}

template <class T, class Samples>
void SvmSolver<T, Samples>::newton() {
    if constexpr (Samples::kIsPoint) {
        if (n_ >= kSubset * 128 && norm2(w.data()) == 0) newton_from_subset();
    }
    newton_steps(std::min(aim, 0.9 * tol_));
}

// Newton steps from w and b until the relative gap is `aim`.
template <class T, class Samples>
void SvmSolver<T, Samples>::newton_steps(double aim) {
    const std::int64_t dims = points.dims;
    for (Buffer<double>* buffer : {&gradient_w_, &step_, &residual_, &direction_, &image_, &dual_w_, &solved_}) {
        padded_vector(*buffer, dims + 1);
    }
    padded_vector(u_, points.points);
    padded_vector(vector_, dims);
    padded_vector(vector_points_, points.points);
    v_.resize(static_cast<std::size_t>(points.points));
    for (Buffer<double>* buffer : {&f_step_, &curvature_}) buffer->resize(static_cast<std::size_t>(n_));
    if constexpr (Samples::kIsPoint) {
        gathered_.resize(static_cast<std::size_t>(n_));
        square_ = coupling() / (2 * cost_);
    }
    active_.resize(static_cast<std::size_t>(n_));
    hessian_.forget();
    exact_ = sizeof(T) == 8;
    double last_gap = std::numeric_limits<double>::infinity();
    int unaided = 0;  // conjugate gradient iterations of the last step without a factor
    int stalls = 0;
    double last_objective = std::numeric_limits<double>::infinity(), fresh_objective = last_objective;
    bool fresh = true;  // the values are those of w, not what the steps since have made of them
    if (norm2(w.data()) > 0) {
        evaluate();
    } else {
        std::fill(values.begin(), values.end(), 0.0);
    }
    for (;;) {
        const double losses = scan(values.data(), b * sigma_);
        const double square = norm2(w.data()) + b * b;
        padded_vector(u_, points.points);
        double dual;
        const std::int64_t active = dual_of_margins(&dual);
        const double gap = set_gap(0.5 * square + losses, dual);
        if (!exact_ && (gap <= std::max(aim, kExactBelow) || spent())) {
            exact_ = fresh = true;  // what decides is computed in double
            evaluate();
            continue;
        }
        // Below the aim, or where rounding lets the objective fall no further.
        stalls = result_.objective > last_objective * (1 - 1e-9) ? stalls + 1 : 0;
        last_objective = result_.objective;
        const bool stuck = stalls > (gap <= tol_ ? 0 : 5);
        // Steps from an initial w far away leave their rounding in the values, which is the larger the farther it was.
        if (initial && !fresh && (gap <= aim || stuck || spent())) {
            exact_ = fresh = true;
            evaluate();
            if (result_.objective < fresh_objective * (1 - 1e-9)) stalls = 0;
            fresh_objective = result_.objective;
            continue;
        }
        if (gap <= aim || stuck || spent()) {
            result_.converged = gap <= tol_;
            return;
        }
        ++result_.n_iter;
        // Conjugate gradients that took longer than forming and factoring the Hessian would: do that.
        hessian_.forget();
        if constexpr (Samples::kIsPoint) {
            if (sigma_ == 1) {
                const double work = 2.0 * unaided * static_cast<double>(active * dims);
                double least = std::numeric_limits<double>::infinity();
                for (std::int64_t k = 0; k < active; ++k) least = std::min(least, curvature_[active_[k]]);
                if (work > HessianFactor<T>::cost(active, dims, least, square_)) {
                    hessian_.factor(
                        points, active_.data(), active, [&](std::int32_t i) { return 2 * weight(i); }, least, square_);
                }
            }
        }
        // Near the optimum the gap falls with the square of the residual; before, the active set changes anyway.
        const bool settled = last_gap < 0.1 && gap < 0.5 * last_gap;
        const double rough = hessian_ ? 1e-3 : 0.1;  // a factor makes a good direction cheap
        conjugate_gradients(settled ? std::clamp(std::sqrt(0.2 * aim / gap), 1e-4, rough) : rough, active);
        result_.passes += inner_;
        if (!hessian_) unaided = inner_;
        last_gap = gap;
        const double* moved = gathered_.data();  // x_p . step
        if (!step_is_gathered(active)) {
            to_points(step_);
            moved = v_.data();
        }
        for (std::int64_t i = 0; i < n_; ++i) f_step_[i] = samples.value(i, moved) * sigma_ + step_b_ * sigma_;
        const double t = line_search();
        svm_kernels().axpy(t, step_.data(), w.data(), dims);
        svm_kernels().axpy(t * sigma_, moved, values.data(), points.points);
        fresh = false;
        b += t * step_b_;
    }
}

}  // namespace ttt4as
