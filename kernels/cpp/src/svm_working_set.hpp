// The dual route of SvmSolver: a small set of samples, solved exactly.
//
// The samples that violate their margin most join the set, eight or more at a time, with the products among the set's
// members. After every change of the multipliers all margins come from w that they make, in one pass over the points.
#pragma once

#include "svm_solver.hpp"

namespace ttt4as {

// True when solved; false when the set is full or no longer gains, with w and b where it got. `alone`: no other route
// follows, so that an initial w with too many violators is no reason not to begin.
template <class T, class Samples>
bool SvmSolver<T, Samples>::working_set(bool alone) {
    const std::size_t cap = static_cast<std::size_t>(capacity_);
    members_.stride = spaced(points.dims);
    members_.dims = points.dims;
    members_.points = 0;
    members_.threads = points.threads;
    rows_.resize(static_cast<std::size_t>((capacity_ + kBatch) * members_.stride));
    members_.data = rows_.data();
    // Images come one after the other and allocate nothing: what the largest set takes is there at once.
    width_ = Samples::kIsPoint ? std::min(capacity_, std::max(widest_, kNarrow)) : capacity_;
    side_ = apart(width_);
    for (Buffer<double>* square : {&q_, &factor_}) square->resize(static_cast<std::size_t>(width_ * side_));
    for (Buffer<double>* buffer : {&a_, &gradient_, &d_, &upper_, &diagonal_, &target_, &constant_, &fixed_, &ridge_})
        buffer->resize(cap);
    padded_vector(coefficients_, capacity_);
    rotations_.resize(2 * cap);
    ids_.resize(cap);
    in_set_.resize(static_cast<std::size_t>(n_));
    outside_.resize(static_cast<std::size_t>(n_));
    std::fill(in_set_.begin(), in_set_.end(), std::uint8_t{0});
    offset_.resize(static_cast<std::size_t>(points.points));
    v_.resize(static_cast<std::size_t>(points.points));
    products_.resize(static_cast<std::size_t>(kMostChosen * apart(capacity_)));
    padded_vector(vector_, points.dims);
    free_.resize(cap);
    state_.resize(cap);
    set_ = n_free_ = 0;
    refined_ = false;
    // To aim at kOptimal is to go on until nothing violates, a round or two more than the gap takes: the decision is
    // then that of the optimum to single precision, whatever the order of the rounds.
    double inner_tol = std::min(aim, 0.7 * tol_);
    int refinements = 0, idle = 0;
    std::int64_t review = patience_, before = 2 * n_ / 3;
    bool usable = initial != nullptr;
    if (usable) {
        evaluate();
        scan(values.data(), b * sigma_);
        std::int64_t violators = 0;
        for (std::int64_t i = 0; i < n_; ++i) violators += labels[i] * f_[i] < 1 && weight(i) > 0;
        usable = violators <= capacity_ / 2;
        if (!usable && !alone) return false;
    }
    if (usable) {
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
    set_gradient();
    double previous = std::numeric_limits<double>::infinity();
    while (!spent()) {
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
        // More support vectors than features: Newton's method solves for these. Samples that cannot be separated go on
        // violating, however many join.
        if (patience_ < kMostSet && n_free_ > 2 * points.dims) break;
        if (set_ >= review) {
            if (4 * violators_ > 3 * before) break;
            before = violators_;
            review *= 2;
        }
        if (found) join(found);
        set_gradient();
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
    violators_ = n_free_;
    std::int64_t outside = 0;
    for (std::int64_t i = 0; i < n_; ++i) {  // no branch: which ones violate is hard to foresee
        outside_[outside] = static_cast<std::int32_t>(i);
        outside += static_cast<int>(labels[i] * f_[i] < 1) & static_cast<int>(in_set_[i] == 0);
    }
    for (std::int64_t next = 0; next < outside; ++next) {
        const std::int64_t i = outside_[next];
        const double m = 1 - labels[i] * f_[i];
        if (!(weight(i) > 0)) continue;
        ++violators_;
        if (found == most && m <= score[most - 1]) continue;
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

// Widens the set's matrices for `count` more.
template <class T, class Samples>
void SvmSolver<T, Samples>::make_room(int count) {
    if (set_ + count <= width_) return;
    const std::int64_t from = side_;
    width_ = std::min(capacity_, std::max(2 * width_, set_ + count));
    widest_ = std::max(widest_, width_);
    side_ = apart(width_);
    for (Buffer<double>* square : {&q_, &factor_}) {
        Buffer<double> wider(static_cast<std::size_t>(width_ * side_));
        for (std::int64_t r = 0; r < set_; ++r) {
            std::copy(square->data() + r * from, square->data() + r * from + set_, wider.data() + r * side_);
        }
        *square = std::move(wider);
    }
}

// Adds chosen_[0, count) with a = 0, and their products with the set's members.
template <class T, class Samples>
void SvmSolver<T, Samples>::join(int count) {
    make_room(count);
    T* fresh = rows_.data() + set_ * members_.stride;
    std::fill(fresh, fresh + (count + kBatch - 1) / kBatch * kBatch * members_.stride, T(0));
    for (int r = 0; r < count; ++r) {
        samples.gather(chosen_[r], points, sigma_, fresh + r * members_.stride);
        ids_[set_ + r] = static_cast<std::int32_t>(chosen_[r]);
    }
    members_.points = set_ + count;
    members_.products(fresh, count, products_.data(), side_);
    const double bias = sigma_ * sigma_;
    for (int r = 0; r < count; ++r) {
        const double* product = products_.data() + r * side_;
        const std::int64_t i = chosen_[r];
        in_set_[i] = 1;
        for (std::int64_t k = 0; k <= set_; ++k) {
            const double entry = labels[i] * labels[ids_[k]] * (product[k] + bias);
            q_[set_ * side_ + k] = entry;
            q_[k * side_ + set_] = entry;
        }
        const double c = weight(i);
        d_[set_] = squared_ ? 0.5 / c : 0.0;
        upper_[set_] = squared_ ? std::numeric_limits<double>::infinity() : c;
        diagonal_[set_] = q_[set_ * side_ + set_] + d_[set_];
        ridge_[set_] = std::max(0.0, kRidge * q_[set_ * side_ + set_] - d_[set_]);
        a_[set_] = 0;
        state_[set_] = kLower;
        ++set_;
    }
}

// w and b that the multipliers make, in double.
template <class T, class Samples>
void SvmSolver<T, Samples>::set_weights() {
    double pull = 0;
    for (std::int64_t j = 0; j < set_; ++j) {
        coefficients_[j] = a_[j] * labels[ids_[j]];
        pull += coefficients_[j];
    }
    std::fill(coefficients_.data() + set_, coefficients_.data() + padded(set_), 0.0);
    members_.from_points(coefficients_.data(), w.data());
    b = pull * sigma_;
}

// The points' values v = x_p . w with the constant feature's, plus offset.
template <class T, class Samples>
void SvmSolver<T, Samples>::resynchronise() {
    set_weights();
    const double up = sigma_ / narrow(w.data(), points.dims, vector_, headroom_), bias = b * sigma_;
    points.to_points(vector_.data(), v_.data());
    ++result_.passes;
    for (std::int64_t p = 0; p < points.points; ++p) {
        v_[p] = v_[p] * up + bias;
        if (refined_) v_[p] += offset_[p];
    }
}

template <class T, class Samples>
void SvmSolver<T, Samples>::set_gradient() {
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
    rounding_ = 0;
    for (std::int64_t round = 0; round < 3 * set_ + 20; ++round) {
        if (!release(round == 0) && !unsettled()) return;
        for (std::int64_t step = 0; step < 2 * n_free_ + 2; ++step) {
            if (minimise_free() || stopped()) break;
        }
        double size = 0;  // |w| at most
        for (std::int64_t j = 0; j < set_; ++j) {
            gradient_[j] = linear_part(j) + constant_[j];
            size += length(j) * a_[j];
        }
        rounding_ = std::numeric_limits<double>::epsilon() * size;
        if (stopped()) return;
    }
}

// Whether proximal steps have still to bring a free coordinate's gradient to zero, or to its rounding.
template <class T, class Samples>
bool SvmSolver<T, Samples>::unsettled() const {
    for (std::int64_t r = 0; r < n_free_; ++r) {
        const std::int64_t j = free_[r];
        if (ridge_[j] > 0 && std::abs(gradient_[j]) > std::max(kSettled, rounding_ * length(j))) return true;
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
        if (wish <= (all ? kRelease : std::max(most, rounding_ * length(j)))) continue;
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
        for (std::int64_t c = 0; c < r; ++c) factor_[r * side_ + c] = q_[free_[r] * side_ + free_[c]];
        factor_[r * side_ + r] = diagonal_[free_[r]] + ridge_[free_[r]];
    }
    svm_kernels().cholesky(factor_.data(), before, n_free_, side_);
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
        if (bounded) target_[r] -= svm_kernels().dot(q_.data() + j * side_, fixed_.data(), set_);
    }
    svm_kernels().solve(factor_.data(), n_free_, side_, target_.data());
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
        svm_kernels().cholesky_remove(factor_.data(), r, n_free_, side_, rotations_.data());
        std::copy(free_.data() + r + 1, free_.data() + n_free_, free_.data() + r);
        --n_free_;
    }
    return reached;
}

template <class T, class Samples>
double SvmSolver<T, Samples>::linear_part(std::int64_t j) const {
    return svm_kernels().dot(q_.data() + j * side_, a_.data(), set_) + d_[j] * a_[j];
}

// w, b and the points' values from a in double; returns the relative gap there.
template <class T, class Samples>
double SvmSolver<T, Samples>::verify() {
    set_weights();
    evaluate();
    const double losses = scan(values.data(), b * sigma_);
    const double square = norm2(w.data()) + b * b;
    double sum = 0, penalty = 0;
    for (std::int64_t j = 0; j < set_; ++j) {
        sum += a_[j];
        penalty += d_[j] * a_[j] * a_[j];
    }
    return set_gap(0.5 * square + losses, sum - 0.5 * square - 0.5 * penalty);
}

}  // namespace ttt4as
