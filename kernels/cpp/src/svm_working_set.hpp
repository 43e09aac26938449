// The dual route of SvmSolver: a small set of samples, solved exactly.
//
// The samples that violate their margin most join the set, eight or more at a time; one pass over the points gives
// their products with every point. Few samples become support vectors, so few passes are made.
#pragma once

#include "svm_solver.hpp"

namespace ttt4as {

// True when solved; false when the set is full or no longer gains, with w and b where it got.
template <class T, class Samples>
bool SvmSolver<T, Samples>::working_set() {
    const std::size_t cap = static_cast<std::size_t>(capacity_);
    rows_.resize(cap * static_cast<std::size_t>(row_stride_));
    q_.resize(cap * cap);
    for (Buffer<double>* buffer : {&a_, &gradient_, &d_, &upper_, &diagonal_, &target_, &constant_, &fixed_, &ridge_})
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

// Up to kBatch samples of each class, evenly spread: where nothing is known all violate alike.
template <class T, class Samples>
int SvmSolver<T, Samples>::spread_choice() {
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
template <class T, class Samples>
int SvmSolver<T, Samples>::choose() {
    const int most = std::min<int>(kMostChosen, std::max<int>(kBatch, static_cast<int>(set_ / 4 / kBatch * kBatch)));
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
template <class T, class Samples>
void SvmSolver<T, Samples>::join(int count) {
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
template <class T, class Samples>
void SvmSolver<T, Samples>::resynchronise() {
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

template <class T, class Samples>
void SvmSolver<T, Samples>::objective(double* quadratic, double* dual) const {
    double q = 0, sum = 0, penalty = 0;
    for (std::int64_t j = 0; j < set_; ++j) {
        q += a_[j] * (gradient_[j] + 1 - d_[j] * a_[j]);
        sum += a_[j];
        penalty += d_[j] * a_[j] * a_[j];
    }
    *quadratic = q;
    *dual = sum - 0.5 * q - 0.5 * penalty;
}

// Solves the dual of the set alone by Lawson and Hanson's active set method: the minimiser over the free
// coordinates, walking back to the first bound it would cross. The Cholesky factor of the free ones is kept from
// call to call; samples come and go by rows.
template <class T, class Samples>
void SvmSolver<T, Samples>::improve() {
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
template <class T, class Samples>
bool SvmSolver<T, Samples>::unsettled() const {
    for (std::int64_t r = 0; r < n_free_; ++r) {
        if (ridge_[free_[r]] > 0 && std::abs(gradient_[free_[r]]) > kSettled) return true;
    }
    return false;
}

// Frees the coordinates at a bound that want to leave it, all or the one that wants it most; false if there is
// none.
template <class T, class Samples>
bool SvmSolver<T, Samples>::release(bool all) {
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

// One step towards the minimiser over the free coordinates; true if it was reached. Where their matrix may be
// singular (the hinge, or an enormous C) it is the minimiser of the objective plus a small pull to where they are.
template <class T, class Samples>
bool SvmSolver<T, Samples>::minimise_free() {
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

template <class T, class Samples>
double SvmSolver<T, Samples>::linear_part(std::int64_t j) const {
    return svm_kernels().dot(q_.data() + j * capacity_, a_.data(), set_) + d_[j] * a_[j];
}

// w, b and the points' values from a in double; returns the relative gap there.
template <class T, class Samples>
double SvmSolver<T, Samples>::verify() {
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

}  // namespace ttt4as
