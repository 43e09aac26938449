// The linear SVM solver behind ttt4as/svm.hpp and the fused segmentation. Three routes to the same optimum:
//
// working_set  The dual, in the space of inner products. The samples that violate their margin most join a small
// working set,
//              eight or more at a time; one pass over the points gives their products with every point; the dual of the
//              set alone is solved exactly by an active set method. Few samples become support vectors, so few passes
//              are made. Cost: about n_sv * points * dims multiply-adds at arithmetic speed.
// newton       The primal, squared hinge only: Newton steps by conjugate gradients, with an exact line search; two
// passes over
//              the points for each inner iteration. When that gets expensive and samples are points, the Hessian is
//              formed and factored once in a while as the preconditioner.
// coordinate   The dual, hinge with more support vectors than the working set holds: liblinear's coordinate descent.
//
// The rule (see `solve`), measured on features of an EfficientNet, raw and standardised: newton for the squared hinge
// if 2 C |x|^2 < 8 (nearly all samples are support vectors, and the Hessian is near the identity; < n / 10 for n > 1000
// samples given as points), or if 2 C |x|^2 > 1e9 (a hard margin to within rounding); working_set otherwise, as long as
// its set fits its memory, or, with more than 4 samples a feature, has at most 160: samples that can be separated need
// no more, and others far more. The other routes take over from there.
//
// Whatever the route, the duality gap is computed at the end from w itself with every product in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
    std::int64_t most_bytes = 0;                 // for the working set's products
    static constexpr double kEnormous = 0x1p40;  // magnitudes above it are scaled
    bool refine = false;  // go on below `tol` to the optimum in single precision where that is cheap

    // The solution: w (dims), b, and the points' values x_p . w, all in double.
    Buffer<double> w;
    double b = 0;
    Buffer<double> values;

    SvmResult solve(const SvmOptions& options) {
        prepare(options);
        SvmRoute route = options.route;
        if (route == SvmRoute::automatic) {
            const bool many = Samples::kIsPoint && n_ > 4 * points.dims;
            const bool small = capacity_ >= n_ && n_ <= 64;
            const double weak = Samples::kIsPoint && n_ > kLarge ? kWeakPerSample * static_cast<double>(n_) : kWeak;
            const bool newton = !small && (capacity_ < 2 * kBatch || (squared_ && coupling() < weak));
            if (many && squared_) capacity_ = std::min(capacity_, kFew);
            const bool strong = squared_ && coupling() > kStrong;
            route = newton || strong ? fallback() : SvmRoute::working_set;
        }
        if (route == SvmRoute::newton && !squared_) route = SvmRoute::coordinate;
        if (route == SvmRoute::coordinate && squared_) route = SvmRoute::newton;
        if (route == SvmRoute::working_set) {
            result_.route = route;
            if (working_set() || options.route == SvmRoute::working_set || result_.n_iter >= max_iter_) return finish();
            route = fallback();
            // A set that was cut short may say less than nothing.
            double nothing = 0;
            for (std::int64_t i = 0; i < n_; ++i) nothing += weight(i);
            if (!(result_.objective <= nothing)) start_over();
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
        std::size_t bytes = rows_.bytes() + batch_.bytes() + sample_.bytes() + vector_.bytes() +
                            vector_points_.bytes() + round_trip_.turned.bytes() + subset_labels_.bytes() +
                            hessian_.memory() + transposed_.bytes() + ids_.bytes() + free_.bytes() + active_.bytes() +
                            order_.bytes() + in_set_.bytes() + state_.bytes();
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
                                             &alpha_}) {
            bytes += buffer->bytes();
        }
        return bytes;
    }

  private:
    static constexpr int kBatch = kMaxRhs;
    static constexpr int kMostChosen = 32;  // samples that join in one round
    static constexpr std::int64_t kMostSet = 1024;
    static constexpr std::int64_t kChunk = 4096;  // samples a task scans; fixed, so that sums do not depend on threads

    SvmRoute fallback() const { return squared_ ? SvmRoute::newton : SvmRoute::coordinate; }
    double weight(std::int64_t i) const { return sample_weight ? cost_ * sample_weight[i] : cost_; }

    void prepare(const SvmOptions& options) {
        n_ = samples.size();
        tol_ = options.tol;
        max_iter_ = options.max_iter;
        squared_ = options.loss == Loss::squared_hinge;
        result_ = SvmResult{};
        // Enormous features would overflow products in T. Scaling the points and the constant feature by a power of two
        // scales the objective: w' = w / sigma, C' = C / sigma^2, the same decisions.
        sigma_ = magnitude > kEnormous ? normaliser(magnitude) : 1.0;
        headroom_ = magnitude > kEnormous ? 0x1p-30 : 1.0;
        cost_ = options.C / (sigma_ * sigma_);
        f_.resize(static_cast<std::size_t>(n_));
        padded_vector(w, points.dims);
        values.resize(static_cast<std::size_t>(points.points));
        row_stride_ = padded(points.points);
        const auto bytes = [&](std::int64_t set) {
            return set * row_stride_ * static_cast<std::int64_t>(sizeof(T)) + set * set * 16;
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
        sample_.resize(static_cast<std::size_t>(points.batch_size(1)));
        std::fill(sample_.begin(), sample_.end(), T(0));
        for (std::int64_t i = 0; i < n_; i += step, ++count) {
            samples.gather(i, points, sigma_, sample_.data(), 0, 1);
            for (std::int64_t c = 0; c < points.dims; ++c) {
                sum += static_cast<double>(sample_[c]) * static_cast<double>(sample_[c]);
            }
        }
        const double norm = sum / static_cast<double>(count) + sigma_ * sigma_;
        return 2 * cost_ * norm;
    }
    static constexpr double kWeak = 8, kWeakPerSample = 0.1, kStrong = 1e9;
    static constexpr std::int64_t kLarge = 1000, kFew = 160;
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

    // ---- working set
    // ---------------------------------------------------------------------------------------------------

    // True when solved; false when the set is full or no longer gains, with w and b where it got.
    bool working_set() {
        const std::size_t cap = static_cast<std::size_t>(capacity_);
        rows_.resize(cap * static_cast<std::size_t>(row_stride_));
        q_.resize(cap * cap);
        for (Buffer<double>* buffer :
             {&a_, &gradient_, &d_, &upper_, &diagonal_, &target_, &constant_, &fixed_, &ridge_})
            buffer->resize(cap);
        padded_vector(coefficients_, capacity_);
        rotations_.resize(2 * cap);
        ids_.resize(cap);
        in_set_.resize(static_cast<std::size_t>(n_));
        std::fill(in_set_.begin(), in_set_.end(), std::uint8_t{0});
        offset_.resize(static_cast<std::size_t>(points.points));
        v_.resize(static_cast<std::size_t>(points.points));
        products_.resize(static_cast<std::size_t>(kMostChosen * row_stride_));
        batch_.resize(static_cast<std::size_t>(kMostChosen / kBatch * points.batch_size(kBatch)));
        factor_.resize(cap * cap);
        free_.resize(cap);
        state_.resize(cap);
        set_ = n_free_ = 0;
        refined_ = false;
        // To refine is to go on until nothing violates, which takes a round or two more than the gap: the decision is
        // then that of the optimum to single precision, whatever the order of the rounds.
        double inner_tol = refine ? std::min(0.7 * tol_, kOptimal) : 0.7 * tol_;
        int refinements = 0, idle = 0;
        if (initial) {
            points.to_points(w.data(), v_.data());
            scan(v_.data(), b);
            std::int64_t violators = 0;
            for (std::int64_t i = 0; i < n_; ++i) violators += labels[i] * f_[i] < 1 && weight(i) > 0;
            if (violators > capacity_ / 2) return false;
            for (std::int64_t i = 0; i < n_;) {
                int found = 0;
                for (; i < n_ && found < kBatch; ++i) {
                    if (labels[i] * f_[i] < 1 && weight(i) > 0) chosen_[found++] = i;
                }
                if (found) join(found);
            }
        } else {
            join(spread_choice());
        }
        resynchronise();
        double previous = std::numeric_limits<double>::infinity();
        while (result_.n_iter < max_iter_) {
            ++result_.n_iter;
            improve();
            resynchronise();
            const double losses = scan(v_.data(), 0.0);
            double quadratic, dual;
            objective(&quadratic, &dual);
            const double primal = 0.5 * quadratic + losses;
            const double gap = (primal - dual) / primal;
            if (!(gap > inner_tol)) {
                if (verify() <= tol_) return result_.converged = true;
                // The products in T misjudged the values; their error at this point is now known and carried along.
                if (++refinements > 4) break;
                for (std::int64_t p = 0; p < points.points; ++p) {
                    offset_[p] = values[p] + b * sigma_ - v_[p] + (refined_ ? offset_[p] : 0.0);
                }
                refined_ = true;
                inner_tol *= 0.5;
                resynchronise();
                scan(v_.data(), 0.0);
            }
            const int found = choose();
            idle = found == 0 && gap > 0.5 * previous ? idle + 1 : 0;
            previous = gap;
            if (idle > 2) break;
            if (set_ + found > capacity_) break;
            if (found) join(found);
            resynchronise();
        }
        return result_.converged = verify() <= tol_;
    }
    static constexpr double kOptimal = 1e-9;

    // Up to kBatch samples of each class, evenly spread: where nothing is known all violate alike.
    int spread_choice() {
        std::int64_t count[2] = {0, 0};
        for (std::int64_t i = 0; i < n_; ++i) count[labels[i] > 0] += weight(i) > 0;
        int found = 0;
        for (int side = 0; side < 2; ++side) {
            const std::int64_t want = std::min<std::int64_t>(kBatch / 2, count[side]);
            std::int64_t seen = 0, taken = 0;
            for (std::int64_t i = 0; i < n_ && taken < want; ++i) {
                if ((labels[i] > 0) != (side == 1) || !(weight(i) > 0)) continue;
                if (seen == (2 * taken + 1) * count[side] / (2 * want)) {
                    chosen_[found++] = i;
                    ++taken;
                }
                ++seen;
            }
        }
        return found;
    }

    // The samples outside the set that violate most, at most one of each group of near-equals; more as the set grows.
    int choose() {
        const int most =
            std::min<int>(kMostChosen, std::max<int>(kBatch, static_cast<int>(set_ / 4 / kBatch * kBatch)));
        int found = 0;
        double score[kMostChosen];
        for (std::int64_t i = 0; i < n_; ++i) {
            const double m = 1 - labels[i] * f_[i];
            if (!(m > 0) || in_set_[i] || (found == most && m <= score[most - 1]) || !(weight(i) > 0)) continue;
            int place = found;
            bool keep = true;
            for (int k = 0; k < found; ++k) {
                if (labels[i] == labels[chosen_[k]] && samples.neighbours(i, chosen_[k])) {
                    keep = m > score[k];
                    place = k;  // takes that one's place, then moves up
                    break;
                }
            }
            if (!keep) continue;
            if (place == found) {
                if (found < most) {
                    ++found;
                } else {
                    place = most - 1;
                }
            }
            for (; place > 0 && score[place - 1] < m; --place) {
                score[place] = score[place - 1];
                chosen_[place] = chosen_[place - 1];
            }
            score[place] = m;
            chosen_[place] = i;
        }
        return found;
    }

    // Adds chosen_[0, count) with a = 0: their products with every point, and the set's matrix.
    void join(int count) {
        const std::int64_t whole = points.batch_size(kBatch);
        for (int done = 0; done < count; done += kBatch) {
            const int width = points.batch_width(count - done);
            T* batch = batch_.data() + done / kBatch * whole;
            std::fill(batch, batch + points.batch_size(width), T(0));
            for (int r = 0; r < width && done + r < count; ++r) {
                samples.gather(chosen_[done + r], points, sigma_ * headroom_, batch, r, width);
            }
        }
        points.products(batch_.data(), count, products_.data(), row_stride_);
        const double bias = sigma_ * sigma_, scale = sigma_ / headroom_;
        for (int r = 0; r < count; ++r) {
            double* product = products_.data() + r * row_stride_;
            T* row = rows_.data() + set_ * row_stride_;
            for (std::int64_t p = 0; p < points.points; ++p) {
                product[p] = product[p] * scale + bias;
                row[p] = static_cast<T>(product[p]);
            }
            const std::int64_t i = chosen_[r];
            ids_[set_] = static_cast<std::int32_t>(i);
            in_set_[i] = 1;
            for (std::int64_t k = 0; k <= set_; ++k) {
                const double entry = labels[i] * labels[ids_[k]] * samples.value(ids_[k], product);
                q_[set_ * capacity_ + k] = entry;
                q_[k * capacity_ + set_] = entry;
            }
            const double c = weight(i);
            d_[set_] = squared_ ? 0.5 / c : 0.0;
            upper_[set_] = squared_ ? std::numeric_limits<double>::infinity() : c;
            diagonal_[set_] = q_[set_ * capacity_ + set_] + d_[set_];
            ridge_[set_] = std::max(0.0, kRidge * q_[set_ * capacity_ + set_] - d_[set_]);
            a_[set_] = 0;
            state_[set_] = kLower;
            ++set_;
            ++result_.passes;
        }
    }

    // v = sum_j a_j y_j (row j) + offset, and the set's gradient from it.
    void resynchronise() {
        for (std::int64_t j = 0; j < set_; ++j) coefficients_[j] = a_[j] * labels[ids_[j]];
        const auto kernel = linear_kernels<T, double>().transposed[0];
        const std::int64_t tasks = (points.points + 511) / 512;
        const bool serial = set_ * points.points < (1 << 18);
        parallel_for(tasks, serial ? 1 : points.threads, [&](std::int64_t task, int) {
            const std::int64_t begin = task * 512, end = std::min(points.points, begin + 512);
            kernel(rows_.data(), row_stride_, set_, nullptr, begin, end, coefficients_.data(), v_.data(), 0);
            if (refined_) {
                for (std::int64_t p = begin; p < end; ++p) v_[p] += offset_[p];
            }
        });
        for (std::int64_t j = 0; j < set_; ++j) {
            gradient_[j] = labels[ids_[j]] * samples.value(ids_[j], v_.data()) - 1 + d_[j] * a_[j];
        }
    }

    void objective(double* quadratic, double* dual) const {
        double q = 0, sum = 0, penalty = 0;
        for (std::int64_t j = 0; j < set_; ++j) {
            q += a_[j] * (gradient_[j] + 1 - d_[j] * a_[j]);
            sum += a_[j];
            penalty += d_[j] * a_[j] * a_[j];
        }
        *quadratic = q;
        *dual = sum - 0.5 * q - 0.5 * penalty;
    }

    enum State : std::uint8_t { kLower = 0, kFree = 1, kUpper = 2 };

    // Solves the dual of the set alone by Lawson and Hanson's active set method: the minimiser over the free
    // coordinates, walking back to the first bound it would cross. The Cholesky factor of the free ones is kept from
    // call to call; samples come and go by rows.
    void improve() {
        // The gradient is affine in a; its constant is -1 but for what the products in T misjudge.
        for (std::int64_t j = 0; j < set_; ++j) constant_[j] = gradient_[j] - linear_part(j);
        for (std::int64_t round = 0; round < 3 * set_ + 20; ++round) {
            if (!release(round == 0) && !unsettled()) return;
            for (std::int64_t step = 0; step < 2 * n_free_ + 2; ++step) {
                if (minimise_free()) break;
            }
            for (std::int64_t j = 0; j < set_; ++j) gradient_[j] = linear_part(j) + constant_[j];
        }
    }

    // Whether proximal steps have still to bring a free coordinate's gradient to zero.
    bool unsettled() const {
        for (std::int64_t r = 0; r < n_free_; ++r) {
            if (ridge_[free_[r]] > 0 && std::abs(gradient_[free_[r]]) > kSettled) return true;
        }
        return false;
    }
    static constexpr double kSettled = 1e-8;

    // Frees the coordinates at a bound that want to leave it, all or the one that wants it most; false if there is
    // none.
    bool release(bool all) {
        std::int64_t best = -1;
        double most = kRelease;
        const std::int64_t before = n_free_;
        for (std::int64_t j = 0; j < set_; ++j) {
            if (state_[j] == kFree) continue;
            const double wish = state_[j] == kLower ? -gradient_[j] : gradient_[j];
            if (wish <= (all ? kRelease : most)) continue;
            if (all) {
                free_[n_free_++] = static_cast<std::int32_t>(j);
            } else {
                most = wish;
                best = j;
            }
        }
        if (best >= 0) free_[n_free_++] = static_cast<std::int32_t>(best);
        for (std::int64_t r = before; r < n_free_; ++r) {
            state_[free_[r]] = kFree;
            for (std::int64_t c = 0; c < r; ++c) factor_[r * capacity_ + c] = q_[free_[r] * capacity_ + free_[c]];
            factor_[r * capacity_ + r] = diagonal_[free_[r]] + ridge_[free_[r]];
        }
        svm_kernels().cholesky(factor_.data(), before, n_free_, capacity_);
        return n_free_ > before || (all && before > 0);
    }
    static constexpr double kRidge = sizeof(T) == 4 ? 1e-6 : 1e-11;  // above the rounding of products in T
    static constexpr double kRelease = 1e-10;                        // margins are of order 1

    // One step towards the minimiser over the free coordinates; true if it was reached. Where their matrix may be
    // singular (the hinge, or an enormous C) it is the minimiser of the objective plus a small pull to where they are.
    bool minimise_free() {
        bool bounded = false;  // fixed at an upper bound: only the hinge has one
        for (std::int64_t j = 0; j < set_; ++j) {
            fixed_[j] = state_[j] == kUpper ? a_[j] : 0.0;
            bounded = bounded || state_[j] == kUpper;
        }
        for (std::int64_t r = 0; r < n_free_; ++r) {
            const std::int64_t j = free_[r];
            target_[r] = ridge_[j] * a_[j] - constant_[j];
            if (bounded) target_[r] -= svm_kernels().dot(q_.data() + j * capacity_, fixed_.data(), set_);
        }
        svm_kernels().solve(factor_.data(), n_free_, capacity_, target_.data());
        double step = 1;
        for (std::int64_t r = 0; r < n_free_; ++r) {
            const double from = a_[free_[r]], upper = upper_[free_[r]];
            if (target_[r] < 0) step = std::min(step, from / (from - target_[r]));
            if (target_[r] > upper) step = std::min(step, (upper - from) / (target_[r] - from));
        }
        bool reached = true;
        for (std::int64_t r = n_free_ - 1; r >= 0; --r) {
            const std::int64_t j = free_[r];
            const double from = a_[j], move = step * (target_[r] - from) * (1 + 1e-12);
            a_[j] = from + step * (target_[r] - from);
            const bool low = target_[r] < 0 && from <= -move;
            const bool high = target_[r] > upper_[j] && upper_[j] - from <= move;
            if (!low && !high) continue;
            a_[j] = low ? 0 : upper_[j];
            state_[j] = low ? kLower : kUpper;
            reached = false;
            svm_kernels().cholesky_remove(factor_.data(), r, n_free_, capacity_, rotations_.data());
            std::copy(free_.data() + r + 1, free_.data() + n_free_, free_.data() + r);
            --n_free_;
        }
        return reached;
    }

    double linear_part(std::int64_t j) const {
        return svm_kernels().dot(q_.data() + j * capacity_, a_.data(), set_) + d_[j] * a_[j];
    }

    // w, b and the points' values from a in double; returns the relative gap there.
    double verify() {
        padded_vector(u_, points.points);
        std::fill(u_.data(), u_.data() + points.points, 0.0);
        double pull = 0, sum = 0, penalty = 0;
        for (std::int64_t j = 0; j < set_; ++j) {
            const double signed_a = a_[j] * labels[ids_[j]];
            samples.scatter(ids_[j], signed_a, u_.data());
            pull += signed_a;
            sum += a_[j];
            penalty += d_[j] * a_[j] * a_[j];
        }
        points.from_points(u_.data(), w.data());
        for (std::int64_t c = 0; c < points.dims; ++c) w[c] *= sigma_;
        b = pull * sigma_;
        evaluate();
        const double losses = scan(values.data(), b * sigma_);
        const double square = norm2(w.data()) + b * b;
        return set_gap(0.5 * square + losses, sum - 0.5 * square - 0.5 * penalty);
    }

    // values = x_p . w, scaled points
    void evaluate() {
        points.to_points(w.data(), values.data());
        if (sigma_ != 1) {
            for (std::int64_t p = 0; p < points.points; ++p) values[p] *= sigma_;
        }
    }

    double set_gap(double primal, double dual) {
        result_.objective = primal;
        const double gap = (primal - dual) / primal;
        result_.gap =
            gap > 0 ? gap : (gap <= 0 ? 0.0 : std::numeric_limits<double>::infinity());  // NaN never counts as solved
        return result_.gap;
    }

    void newton();
    void newton_steps(double aim);
    void newton_from_subset();
    double dual_of_margins(double* dual);
    void conjugate_gradients(double tolerance, std::int64_t active);
    double narrow(const double* from, std::int64_t n, Buffer<T>& to) const;
    // Where most samples are active, products are made with all: the margins' step is then a sum of them.
    bool most_active(std::int64_t active) const { return 2 * active > n_; }
    bool step_is_gathered(std::int64_t active) const { return Samples::kIsPoint && !exact_ && most_active(active); }
    void apply_hessian(const double* p, std::int64_t active, double* out);
    void to_points(const Buffer<double>& p);
    double line_search();
    void coordinate();

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
    bool squared_ = true;
    SvmResult result_;

    std::int64_t capacity_ = 0, set_ = 0, n_free_ = 0, row_stride_ = 0;
    bool refined_ = false;
    std::int64_t chosen_[kMostChosen] = {};
    Buffer<T> rows_, batch_, sample_;
    Buffer<double> q_, a_, gradient_, d_, upper_, diagonal_, fixed_, ridge_, coefficients_, factor_, target_;
    Buffer<double> offset_, constant_, rotations_, v_, products_, u_, f_, partial_;
    Buffer<std::int32_t> ids_, free_;
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
    struct SvmSolverView {
        const std::int8_t* labels;
        const double* sample_weight;
    };
    HessianFactor<T> hessian_;  // of this step or an earlier one
    double square_ = 0;         // |x|^2 of a typical sample

    // coordinate
    Buffer<double> alpha_;
    Buffer<T> transposed_;
    Buffer<std::int32_t> order_;
};

}  // namespace ttt4as

#include "svm_coordinate.hpp"
#include "svm_newton.hpp"
