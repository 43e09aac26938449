// The SVM: the gap it states is the gap there is, every route finds the same optimum, bits do not depend on threads.
#include <algorithm>
#include <limits>
#include <utility>

#include "allocations.hpp"
#include "check.hpp"
#include "ttt4as/svm.hpp"
#include "ttt4as/threads.hpp"

namespace {

using ttt4as::Loss;
using ttt4as::Matrix;
using ttt4as::SvmOptions;
using ttt4as::SvmResult;
using ttt4as::SvmRoute;

template <class T>
double objective(const std::vector<T>& x, const std::vector<double>& y, std::int64_t dims, const std::vector<double>& w,
                 double b, double C, Loss loss) {
    double value = b * b;
    for (double c : w) value += c * c;
    value *= 0.5;
    for (std::size_t i = 0; i < y.size(); ++i) {
        double f = b;
        for (std::int64_t c = 0; c < dims; ++c) f += w[c] * static_cast<double>(x[i * dims + c]);
        const double m = std::max(0.0, 1 - y[i] * f);
        value += C * (loss == Loss::squared_hinge ? m * m : m);
    }
    return value;
}

template <class T>
void routes_agree(std::int64_t n, std::int64_t dims, double C, Loss loss, std::uint64_t seed) {
    Random random(seed);
    std::vector<T> x(static_cast<std::size_t>(n * dims));
    std::vector<double> y(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
        y[i] = i % 3 ? 1 : -1;
        for (std::int64_t c = 0; c < dims; ++c)
            x[i * dims + c] = random.normal() + static_cast<T>(0.3 * y[i] * (c % 2));
    }
    const Matrix<const T> samples{x.data(), n, dims, dims};
    double best = std::numeric_limits<double>::infinity();
    std::vector<SvmRoute> all = {SvmRoute::automatic, SvmRoute::working_set};
    all.push_back(loss == Loss::hinge ? SvmRoute::coordinate : SvmRoute::newton);
    for (SvmRoute route : all) {
        std::vector<double> first;
        for (int threads : {1, 3}) {
            ttt4as::LinearSvm<T> svm;
            SvmOptions options;
            options.C = C;
            options.loss = loss;
            options.threads = threads;
            options.route = route;
            options.max_iter = 20000;
            std::vector<double> w(static_cast<std::size_t>(dims));
            const SvmResult result = svm.fit(samples, y.data(), options, w.data());
            const double value = objective(x, y, dims, w, result.intercept, C, loss);
            CHECK(std::abs(value - result.objective) <= 1e-10 * value);
            best = std::min(best, value);
            if (result.converged) {
                CHECK(result.gap <= options.tol);
                CHECK(value <= best * (1 + 2 * options.tol));
            }
            CHECK(result.converged || route == SvmRoute::working_set || route == SvmRoute::coordinate);
            w.push_back(result.intercept);
            if (first.empty()) first = w;
            CHECK(first == w);
        }
    }
}

// From wherever it starts, a fit ends at the optimum, and what it says of the result is true of it.
template <class T>
void check_far_starts(SvmRoute route) {
    constexpr std::int64_t kSamples = 200, kDims = 20;
    constexpr double kC = 1e-2;
    Random random(9);
    std::vector<T> x(kSamples * kDims);
    std::vector<double> y(kSamples), w(kDims), initial(kDims + 1);
    for (T& value : x) value = random.normal();
    for (double& label : y) label = random.below(2) ? 1 : -1;
    const Matrix<const T> samples{x.data(), kSamples, kDims, kDims};
    SvmOptions options;
    options.C = kC;
    options.route = route;
    ttt4as::LinearSvm<T> svm;
    const double best = svm.fit(samples, y.data(), options, w.data()).objective;
    for (const double far : {0.0, 1.0, 1e4, 1e8, 1e12}) {
        for (double& value : initial) value = random.normal() * far;
        options.initial = initial.data();
        const SvmResult result = svm.fit(samples, y.data(), options, w.data());
        const double value = objective(x, y, kDims, w, result.intercept, kC, Loss::squared_hinge);
        CHECK(std::abs(value - result.objective) <= 1e-9 * value);
        CHECK(result.converged && result.gap <= options.tol && value <= best * (1 + 2 * options.tol));
    }
}

// Nothing to lose: w = 0 is the optimum, and found to be.
void check_weights_of_zero() {
    Random random(10);
    const std::vector<float> x = random.normals(40);
    const std::vector<double> y = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1}, none(10, 0.0);
    std::vector<double> w(4);
    for (const Loss loss : {Loss::squared_hinge, Loss::hinge}) {
        for (const SvmRoute route :
             {SvmRoute::automatic, SvmRoute::working_set, SvmRoute::newton, SvmRoute::coordinate}) {
            SvmOptions options;
            options.loss = loss;
            options.route = route;
            options.sample_weight = none.data();
            const SvmResult result = ttt4as::LinearSvm<float>().fit({x.data(), 10, 4, 4}, y.data(), options, w.data());
            CHECK(result.converged && result.gap == 0 && result.n_iter <= 1 && w == std::vector<double>(4, 0.0));
        }
    }
}

// Where classes overlap, an enormous C only scales the multipliers of the hinge. Rounding in their sums must not keep
// the working set going.
void check_steps_of_an_enormous_C() {
    constexpr std::int64_t kSamples = 600, kDims = 8;
    Random random(13);
    std::vector<double> x(kSamples * kDims), y(kSamples), w(kDims);
    for (double& value : x) value = random.normal();
    for (double& label : y) label = random.below(2) ? 1 : -1;
    const auto steps = [&](double C) {
        int asked = 0;  // once a step
        SvmOptions options;
        options.C = C;
        options.loss = Loss::hinge;
        options.route = SvmRoute::working_set;
        options.interrupted = [&] { return ++asked < 0; };
        const Matrix<const double> samples{x.data(), kSamples, kDims, kDims};
        CHECK(ttt4as::LinearSvm<double>().fit(samples, y.data(), options, w.data()).converged);
        return asked;
    };
    CHECK(steps(1e7) < 3 * steps(1e2));
}

// Who asks for an end gets it soon, with what there is by then.
void check_an_interrupted_fit(SvmRoute route, Loss loss) {
    constexpr std::int64_t kSamples = 600, kDims = 50;
    Random random(12);
    const std::vector<double> y = [&] {
        std::vector<double> labels(kSamples);
        for (double& label : labels) label = random.below(2) ? 1 : -1;
        return labels;
    }();
    std::vector<double> w(kDims);
    const std::vector<double> x = [&] {
        std::vector<double> values(kSamples * kDims);
        for (double& value : values) value = random.normal();
        return values;
    }();
    for (const int patience : {0, 1, 5}) {
        int asked = 0;
        SvmOptions options;
        options.C = 1e6;
        options.tol = 1e-12;
        options.max_iter = 1000000;
        options.loss = loss;
        options.route = route;
        options.interrupted = [&] { return ++asked > patience; };
        const SvmResult result =
            ttt4as::LinearSvm<double>().fit({x.data(), kSamples, kDims, kDims}, y.data(), options, w.data());
        CHECK(asked == patience + 1 && !result.converged);
        const double value = objective(x, y, kDims, w, result.intercept, options.C, loss);
        CHECK(std::abs(value - result.objective) <= 1e-9 * value);
    }
}

// A second fit of the same shape allocates nothing and finds the same bits.
void memory_is_kept(SvmRoute route, Loss loss) {
    constexpr std::int64_t kSamples = 700, kDims = 300;
    Random random(99);
    std::vector<float> x(kSamples * kDims);
    std::vector<double> y(kSamples), w(kDims), again(kDims);
    for (float& value : x) value = random.normal();
    for (std::int64_t i = 0; i < kSamples; ++i) y[i] = i % 2 ? 1 : -1;
    ttt4as::LinearSvm<float> svm;
    SvmOptions options;
    options.C = 0.1;
    options.loss = loss;
    options.route = route;
    options.threads = 2;
    const Matrix<const float> samples{x.data(), kSamples, kDims, kDims};
    svm.fit(samples, y.data(), options, w.data());
    [[maybe_unused]] const long before = allocations;
    svm.fit(samples, y.data(), options, again.data());
#if defined(COUNTS_ALLOCATIONS)
    CHECK(allocations == before);
#endif
    CHECK(w == again);
    CHECK(svm.memory() > 0 && svm.memory() < (std::size_t(1) << 24));
}

// Noise, on which every route goes all its way, in shapes where each kind of memory is the most: what a sample takes, a
// feature, the working set's rows, the factored Hessian.
template <class T>
void check_memory() {
    const std::pair<std::int64_t, std::int64_t> shapes[] = {{20000, 1}, {4, 20000}, {400, 300}, {200, 900}};
    Random random(8);
    for (const auto& [n, dims] : shapes) {
        std::vector<T> x(static_cast<std::size_t>(n * dims));
        for (T& value : x) value = static_cast<T>(random.normal());
        std::vector<double> y(static_cast<std::size_t>(n)), coef(static_cast<std::size_t>(dims));
        for (double& label : y) label = random.uniform() < 0.5 ? -1 : 1;
        y[0] = -y[1];
        for (const Loss loss : {Loss::squared_hinge, Loss::hinge}) {
            ttt4as::LinearSvm<T> svm;
            SvmOptions options;
            options.C = 1;
            options.loss = loss;
            options.max_iter = 20;
            svm.fit({x.data(), n, dims}, y.data(), options, coef.data());
            const double most =
                1.1 * static_cast<double>(x.size() * sizeof(T)) + 200 * 0x1p20 + 300.0 * static_cast<double>(n + dims);
            CHECK(static_cast<double>(svm.memory()) <= most);
        }
    }
}

}  // namespace

int main() {
    ttt4as::set_num_threads(4);
    std::uint64_t seed = 1;
    const std::int64_t shapes[][2] = {{2, 1}, {7, 3}, {60, 5}, {61, 200}, {300, 33}, {500, 97}};
    for (const auto& shape : shapes) {
        for (double C : {1e-3, 0.1, 10.0}) {
            routes_agree<float>(shape[0], shape[1], C, Loss::squared_hinge, ++seed);
            routes_agree<double>(shape[0], shape[1], C, Loss::squared_hinge, ++seed);
        }
        routes_agree<float>(shape[0], shape[1], 1e-3, Loss::hinge, ++seed);
        routes_agree<double>(shape[0], shape[1], 1e-3, Loss::hinge, ++seed);
    }
    for (const SvmRoute route : {SvmRoute::automatic, SvmRoute::working_set, SvmRoute::newton}) {
        check_far_starts<float>(route);
        check_far_starts<double>(route);
    }
    check_weights_of_zero();
    check_steps_of_an_enormous_C();
    check_an_interrupted_fit(SvmRoute::working_set, Loss::squared_hinge);
    check_an_interrupted_fit(SvmRoute::newton, Loss::squared_hinge);
    check_an_interrupted_fit(SvmRoute::automatic, Loss::hinge);
    check_an_interrupted_fit(SvmRoute::coordinate, Loss::hinge);
    memory_is_kept(SvmRoute::working_set, Loss::squared_hinge);
    memory_is_kept(SvmRoute::newton, Loss::squared_hinge);
    memory_is_kept(SvmRoute::coordinate, Loss::hinge);
    check_memory<float>();
    check_memory<double>();
    // Not finite, empty, absurd.
    std::vector<float> x = {1, 2, std::numeric_limits<float>::quiet_NaN(), 4};
    std::vector<double> y = {1, -1}, w(2);
    ttt4as::LinearSvm<float> svm;
    CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2, 2}, y.data(), {}, w.data()));
    CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 0, 2, 2}, y.data(), {}, w.data()));
    x = {1, 2, 3, 4};
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
    CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 1, kMost, 2}, y.data(), {}, w.data()));
    CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({nullptr, 2, 2}, y.data(), {}, w.data()));
    CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2}, nullptr, {}, w.data()));
    CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2}, y.data(), {}, nullptr));
    for (const int other : {-1, 2, 4}) {
        SvmOptions options;
        options.loss = static_cast<ttt4as::Loss>(other);
        CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2}, y.data(), options, w.data()));
        options.loss = ttt4as::Loss::hinge;
        options.route = static_cast<ttt4as::SvmRoute>(other == 2 ? 7 : other);
        CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2}, y.data(), options, w.data()));
    }
    const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
    for (const double bad : {-1.0, nan, inf}) {
        const std::vector<double> weight = {1, bad}, start = {0, bad, 0}, labels = {1, nan};
        SvmOptions options;
        options.sample_weight = weight.data();
        CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2, 2}, y.data(), options, w.data()));
        CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2, 2}, labels.data(), {}, w.data()));
        if (bad == -1) continue;
        options.sample_weight = nullptr;
        options.initial = start.data();
        CHECK_THROWS(ttt4as::InvalidArgument, svm.fit({x.data(), 2, 2, 2}, y.data(), options, w.data()));
    }
    for (float huge : {1e30f, 3e38f, 1e-30f, 1e-44f}) {
        x = {huge, 2 * (huge / 4), -huge, huge};
        const SvmResult result = svm.fit({x.data(), 2, 2, 2}, y.data(), {}, w.data());
        CHECK(std::isfinite(w[0]) && std::isfinite(w[1]) && std::isfinite(result.intercept));
    }
    return 0;
}
