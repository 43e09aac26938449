// The linear SVM solver behind ttt4as/svm.hpp and the fused segmentation. Three routes to the same optimum:
//
// working_set  The dual, on a small set of samples that grows by those that violate their margin most, eight or more at
//              a time. The dual of the set alone is solved exactly by an active set method, and one pass over the
//              points a round tells who violates. Cost: the rounds, 5 to 25 of them, and the set's own products.
// newton       The primal, squared hinge only: Newton steps by conjugate gradients, with an exact line search; two
//              passes over the points for each inner iteration. When that gets expensive and samples are points, the
//              Hessian is formed and factored once in a while as the preconditioner.
// coordinate   The dual, hinge with more support vectors than the working set holds: coordinate descent with shrinking.
//
// The rule (see `solve`), measured on features of an EfficientNet, raw and standardised, and on overlapping Gaussians:
// newton for the squared hinge if 2 C |x|^2 is below 4 for mixtures, below 2 for points, below n / 100 for more than
// 1000 points or n / 20 where they are also more than 16 a feature (nearly all samples are support vectors, and the
// Hessian is near the identity), or above 1e9 (a hard margin to within rounding); working_set otherwise, as long as its
// set fits its memory and, among points, violators become fewer: reviewed at 160 members, or 48 where newton is about
// as fast. Where they do not, or support vectors are more than twice the features, samples cannot be separated, and
// newton takes over.
//
// Whatever the route, the duality gap is computed at the end from w itself with every product in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "point_matrix.hpp"
#include "svm_kernels.hpp"
#include "svm_preconditioner.hpp"
#include "ttt4as/svm.hpp"

namespace ttt4as {

template <class T, class Samples>
class SvmSolver {
  public:
    // The problem, set before `solve`. `magnitude` is the largest one among the points.
    PointMatrix<T> points;
    Samples samples;
    const std::int8_t* labels = nullptr;    // +1 or -1
    const double* sample_weight = nullptr;  // or null
    const double* initial = nullptr;        // w and b, or null
    double magnitude = 0;
    std::int64_t most_bytes = 0;                 // for the working set
    static constexpr double kEnormous = 0x1p40;  // magnitudes above it are scaled
    static constexpr double kOptimal = 1e-9;     // a gap at the optimum in single precision
    // The gap to go on to, below `tol`, where that is possible.
    double aim = std::numeric_limits<double>::infinity();

    // The solution: w (dims), b, and the points' values x_p . w, all in double.
    Buffer<double> w;
    double b = 0;
    Buffer<double> values;

    SvmResult solve(const SvmOptions& options) {
        prepare(options);
        patience_ = kMostSet;
        SvmRoute route = options.route;
        if (route == SvmRoute::automatic) {
            const bool small = capacity_ >= n_ && n_ <= 64;
            const double strength = squared_ ? coupling() : std::numeric_limits<double>::infinity();
            const double n = static_cast<double>(n_);
            const double weak =
                !Samples::kIsPoint
                    ? kWeakMixtures
                    : std::max(kWeak,
                               n_ > kLarge ? (n_ < kTall * points.dims ? kWeakPerSample : kFairPerSample) * n : 0);
            const bool newton = !small && (capacity_ < 2 * kBatch || strength < weak);
            if (Samples::kIsPoint && squared_) patience_ = n_ > kLarge && strength < kFairPerSample * n ? kFew : kMany;
            const bool strong = squared_ && strength > kStrong;
            route = newton || strong ? fallback() : SvmRoute::working_set;
        }
        if (route == SvmRoute::newton && !squared_) route = SvmRoute::coordinate;
        if (route == SvmRoute::coordinate && squared_) route = SvmRoute::newton;
        if (route == SvmRoute::working_set && capacity_ < std::min<std::int64_t>(2 * kBatch, n_)) route = fallback();
        if (route == SvmRoute::working_set) {
            result_.route = route;
            if (working_set(options.route == SvmRoute::working_set) || options.route == SvmRoute::working_set ||
                spent())
                return finish();
            route = fallback();
            // A set that was cut short may be worse than w = 0, whose objective this is.
            double nothing = 0;
            for (std::int64_t i = 0; i < n_; ++i) nothing += weight(i);
            from_set_ = result_.objective <= nothing;
            if (!from_set_) start_over();
        }
        result_.route = route;
        if (route == SvmRoute::newton) {
            newton();
        } else {
            coordinate();
        }
        return finish();
    }

    // Bytes held.
    std::size_t memory() const noexcept {
        std::size_t bytes = rows_.bytes() + sample_.bytes() + vector_.bytes() + vector_points_.bytes() +
                            round_trip_.turned.bytes() + subset_labels_.bytes() + hessian_.memory() +
                            point_rows_.bytes() + point_products_.bytes() + ids_.bytes() + free_.bytes() +
                            active_.bytes() + order_.bytes() + in_set_.bytes() + state_.bytes() + outside_.bytes();
        for (const Buffer<double>* buffer : {&w,
                                             &values,
                                             &q_,
                                             &a_,
                                             &gradient_,
                                             &d_,
                                             &upper_,
                                             &diagonal_,
                                             &fixed_,
                                             &ridge_,
                                             &coefficients_,
                                             &factor_,
                                             &target_,
                                             &offset_,
                                             &constant_,
                                             &rotations_,
                                             &v_,
                                             &products_,
                                             &u_,
                                             &f_,
                                             &partial_,
                                             &gradient_w_,
                                             &step_,
                                             &residual_,
                                             &direction_,
                                             &image_,
                                             &dual_w_,
                                             &solved_,
                                             &f_step_,
                                             &margins_,
                                             &curvature_,
                                             &gathered_,
                                             &round_trip_.sums,
                                             &subset_weight_,
                                             &kept_,
                                             &alpha_,
                                             &mean_,
                                             &norms_}) {
            bytes += buffer->bytes();
        }
        return bytes;
    }

  private:
    static constexpr int kBatch = kMaxRhs;
    static constexpr int kMostChosen = 32;  // samples that join in one round
    static constexpr std::int64_t kMostSet = 1024, kNarrow = 128;
    static constexpr std::int64_t kChunk = 4096;  // samples a task scans; fixed, so that sums do not depend on threads

    // From row to row of a square matrix of doubles: an odd number of cache lines.
    static std::int64_t apart(std::int64_t n) { return (n + 7) / 8 * 8 + ((n + 7) / 8 % 2 ? 0 : 8); }

    SvmRoute fallback() const { return squared_ ? SvmRoute::newton : SvmRoute::coordinate; }
    double weight(std::int64_t i) const { return sample_weight ? cost_ * sample_weight[i] : cost_; }

    void prepare(const SvmOptions& options) {
        n_ = samples.size();
        tol_ = options.tol;
        max_iter_ = options.max_iter;
        interrupted_ = options.interrupted ? &options.interrupted : nullptr;
        stopped_ = false;
        squared_ = options.loss == Loss::squared_hinge;
        result_ = SvmResult{};
        from_set_ = false;
        // Enormous features would overflow products in T. Scaling the points and the constant feature by a power of two
        // scales the objective: w' = w / sigma, C' = C / sigma^2, the same decisions.
        sigma_ = magnitude > kEnormous ? normaliser(magnitude) : 1.0;
        headroom_ = magnitude > kEnormous ? 0x1p-30 : 1.0;
        cost_ = options.C / (sigma_ * sigma_);
        f_.resize(static_cast<std::size_t>(n_));
        padded_vector(w, points.dims);
        values.resize(static_cast<std::size_t>(points.points));
        const auto bytes = [&](std::int64_t set) {
            return (set + kBatch) * spaced(points.dims) * static_cast<std::int64_t>(sizeof(T)) + set * apart(set) * 16;
        };
        capacity_ = std::min(kMostSet, (n_ + kBatch - 1) / kBatch * kBatch);
        while (capacity_ > 0 && bytes(capacity_) > most_bytes) capacity_ -= kBatch;
        start_over();
        if (initial) {
            for (std::int64_t c = 0; c < points.dims; ++c) w[c] = initial[c] / sigma_;
            b = initial[points.dims] / sigma_;
        }
    }

    void start_over() {
        std::fill(w.begin(), w.end(), 0.0);
        b = 0;
    }

    // 2 C |x|^2, of a typical sample. Below kWeak nearly every sample keeps violating its margin: the support vectors
    // are too many for the working set, and the Hessian is so near the identity that a few steps solve it. Above
    // kStrong the squared hinge is a hard constraint to within rounding, and the dual of samples that cannot be
    // separated grows without bound.
    double coupling() {
        double sum = 0;
        const std::int64_t step = std::max<std::int64_t>(1, n_ / 32);
        std::int64_t count = 0;
        sample_.resize(static_cast<std::size_t>(points.dims));
        for (std::int64_t i = 0; i < n_; i += step, ++count) {
            samples.gather(i, points, sigma_, sample_.data());
            for (std::int64_t c = 0; c < points.dims; ++c) {
                sum += static_cast<double>(sample_[c]) * static_cast<double>(sample_[c]);
            }
        }
        const double norm = sum / static_cast<double>(count) + sigma_ * sigma_;
        return 2 * cost_ * norm;
    }
    static constexpr double kWeak = 2, kWeakMixtures = 4, kWeakPerSample = 0.01, kFairPerSample = 0.05, kStrong = 1e9;
    static constexpr std::int64_t kLarge = 1000, kTall = 16, kFew = 48, kMany = 160;
    static constexpr std::int64_t kSubset = 8;
    static constexpr int kSubsetSteps = 8;
    static constexpr int kMostInner = 2000;  // conjugate gradient iterations in one Newton step

    // f = samples' values of `v` (points) plus b; the weighted losses, summed in a fixed order.
    double scan(const double* v, double bias) {
        const std::int64_t chunks = (n_ + kChunk - 1) / kChunk;
        partial_.resize(static_cast<std::size_t>(chunks));
        parallel_for(chunks, chunks > 1 ? points.threads : 1, [&](std::int64_t chunk, int) {
            double loss = 0;
            const std::int64_t end = std::min(n_, (chunk + 1) * kChunk);
            for (std::int64_t i = chunk * kChunk; i < end; ++i) {
                f_[i] = samples.value(i, v) + bias;
                const double m = 1 - labels[i] * f_[i];
                if (m > 0) loss += weight(i) * (squared_ ? m * m : m);
            }
            partial_[chunk] = loss;
        });
        double loss = 0;
        for (std::int64_t k = 0; k < chunks; ++k) loss += partial_[k];
        return loss;
    }

    double norm2(const double* x) const { return svm_kernels().dot(x, x, points.dims); }

    bool stopped() { return stopped_ || (interrupted_ && (stopped_ = (*interrupted_)())); }
    bool spent() { return result_.n_iter >= max_iter_ || stopped(); }

    bool working_set(bool alone);
    int spread_choice();
    int choose();
    void make_room(int count);
    void join(int count);
    void resynchronise();
    void set_gradient();
    void set_weights();
    void objective(double* quadratic, double* dual) const;
    void improve();
    bool unsettled() const;
    bool release(bool all);
    bool minimise_free();
    double linear_part(std::int64_t j) const;
    double length(std::int64_t j) const { return std::sqrt(q_[j * side_ + j]); }  // of a sample in the set
    double verify();
    enum State : std::uint8_t { kLower = 0, kFree = 1, kUpper = 2 };
    static constexpr double kSettled = 1e-8;
    static constexpr double kRidge = sizeof(T) == 4 ? 1e-6 : 1e-11;  // above the rounding of products in T
    static constexpr double kRelease = 1e-10;                        // margins are of order 1

    // values = x_p . w, scaled points
    void evaluate() {
        points.to_points(w.data(), values.data());
        if (sigma_ != 1) {
            for (std::int64_t p = 0; p < points.points; ++p) values[p] *= sigma_;
        }
    }

    double set_gap(double primal, double dual) {
        result_.objective = primal;
        const double gap = primal == 0 ? 0.0 : (primal - dual) / primal;  // nothing to lose: weights are all zero
        result_.gap =
            gap > 0 ? gap : (gap <= 0 ? 0.0 : std::numeric_limits<double>::infinity());  // NaN never counts as solved
        return result_.gap;
    }

    void newton();
    void newton_steps(double aim);
    void newton_from_subset();
    std::int64_t dual_of_margins(double* dual);
    void conjugate_gradients(double tolerance, std::int64_t active);
    // Where most samples are active, products are made with all: the margins' step is then a sum of them.
    bool most_active(std::int64_t active) const { return 2 * active > n_; }
    bool step_is_gathered(std::int64_t active) const { return Samples::kIsPoint && !exact_ && most_active(active); }
    void apply_hessian(const double* p, std::int64_t active, double* out);
    void to_points(const Buffer<double>& p);
    double line_search();

    void coordinate();
    template <class Value, class Norm, class Move>
    void descend(Value&& value, Norm&& norm, Move&& move);
    void settle(const double* a);
    PointMatrix<T> side_by_side();
    void copy_rows(double scale, std::int64_t stride);
    void form_products(std::int64_t side);
    static double dot(const T* x, const double* y, std::int64_t n) {
        if constexpr (sizeof(T) == 4) {
            return svm_kernels().dot_f(x, y, n);
        } else {
            return svm_kernels().dot(x, y, n);
        }
    }
    static double square(const T* x, std::int64_t n) {
        if constexpr (sizeof(T) == 4) {
            return svm_kernels().square_f(x, n);
        } else {
            return svm_kernels().dot(x, x, n);
        }
    }
    static void add_to(double* to, double factor, const T* x, std::int64_t n) {
        if constexpr (sizeof(T) == 4) {
            svm_kernels().axpy_f(factor, x, to, n);
        } else {
            svm_kernels().axpy(factor, x, to, n);
        }
    }
    static constexpr std::int64_t kMostProducts = 4;  // of a point with others, for each of its features

    SvmResult finish() {
        double check = b;
        for (std::int64_t c = 0; c < points.dims; ++c) check += 0 * w[c];
        for (std::int64_t p = 0; p < points.points; ++p) check += 0 * values[p];
        if (!std::isfinite(check)) {  // numbers beyond double's range: nothing was learnt
            start_over();
            std::fill(values.begin(), values.end(), 0.0);
            result_.converged = false;
            result_.gap = std::numeric_limits<double>::infinity();
        }
        result_.intercept = b * sigma_;
        result_.objective *= sigma_ * sigma_;
        if (sigma_ != 1) {
            for (std::int64_t c = 0; c < points.dims; ++c) w[c] *= sigma_;
        }
        b = result_.intercept;
        return result_;
    }

    std::int64_t n_ = 0;
    double tol_ = 0, cost_ = 0, sigma_ = 1;
    double headroom_ = 1;  // products of enormous points with vectors scaled by this stay in T's range
    int max_iter_ = 0;
    const std::function<bool()>* interrupted_ = nullptr;
    bool stopped_ = false;
    bool squared_ = true;
    SvmResult result_;

    std::int64_t capacity_ = 0, patience_ = 0, violators_ = 0, set_ = 0, n_free_ = 0;
    std::int64_t width_ = 0, side_ = 0;  // the set that its matrices hold, and from row to row
    std::int64_t widest_ = 0;            // that they ever held: a smaller problem in between does not narrow them
    double rounding_ = 0;                // of the gradient of a sample of length 1 in `improve`
    bool refined_ = false, from_set_ = false;
    std::int64_t chosen_[kMostChosen] = {};
    PointMatrix<T> members_;  // the set, a row each
    Buffer<T> rows_, sample_;
    Buffer<double> q_, a_, gradient_, d_, upper_, diagonal_, fixed_, ridge_, coefficients_, factor_, target_;
    Buffer<double> offset_, constant_, rotations_, v_, products_, u_, f_, partial_;
    Buffer<std::int32_t> ids_, free_, outside_;
    Buffer<std::uint8_t> in_set_, state_;

    // newton
    Buffer<double> gradient_w_, step_, residual_, direction_, image_, dual_w_, solved_, f_step_, margins_;
    Buffer<T> vector_, vector_points_;
    Buffer<std::int32_t> active_;
    Buffer<double> curvature_, gathered_;
    typename PointMatrix<T>::RoundTrip round_trip_;
    static constexpr double kExactBelow = 1e-5;  // a gap that products in single precision can tell
    bool exact_ = true;                          // gradient and margins' steps in double
    double gradient_b_ = 0, step_b_ = 0;
    int inner_ = 0;  // iterations of the last conjugate_gradients
    Buffer<std::int8_t> subset_labels_;
    Buffer<double> subset_weight_;
    HessianFactor<T> hessian_;  // of this step or an earlier one
    double square_ = 0;         // |x|^2 of a typical sample

    // coordinate
    Buffer<double> alpha_, mean_, norms_, kept_;  // kept_: w of the best objective
    Buffer<T> point_rows_, point_products_;
    double kept_b_ = 0, settled_primal_ = 0, best_primal_ = 0, best_dual_ = 0;
    Buffer<std::int32_t> order_;
};

}  // namespace ttt4as

#include "svm_coordinate.hpp"
#include "svm_newton.hpp"
#include "svm_working_set.hpp"
