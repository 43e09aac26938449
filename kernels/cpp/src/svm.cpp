// LinearSvm: the solver on samples given as a matrix.
#include "ttt4as/svm.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "options.hpp"
#include "svm_samples.hpp"
#include "svm_solver.hpp"

namespace ttt4as {

template <class T>
struct LinearSvm<T>::State {
    SvmSolver<T, PointSamples<T>> solver;
    Buffer<std::int8_t> labels;
    Buffer<T> magnitudes;
    static constexpr std::int64_t kSerial = 1 << 18;  // values that one thread looks at sooner than two
};

template <class T>
LinearSvm<T>::LinearSvm() : state_(new State) {}
template <class T>
LinearSvm<T>::~LinearSvm() = default;
template <class T>
LinearSvm<T>::LinearSvm(LinearSvm&&) noexcept = default;
template <class T>
LinearSvm<T>& LinearSvm<T>::operator=(LinearSvm&&) noexcept = default;

template <class T>
SvmResult LinearSvm<T>::fit(Matrix<const T> samples, const double* y, const SvmOptions& options, double* coef) {
    const std::int64_t n = samples.rows, dims = samples.cols;
    check_matrix("X", samples, std::numeric_limits<std::int32_t>::max());
    check_address("y", y);
    check_address("coef", coef);
    check_solver(options.C, options.loss, options.tol, options.max_iter);
    check_option(options.route >= SvmRoute::automatic && options.route <= SvmRoute::coordinate, "route",
                 static_cast<std::int64_t>(options.route), "one of SvmRoute");
    for (std::int64_t i = 0; i < n; ++i) {
        check_option(!std::isnan(y[i]), "y", y[i], "numbers");
        if (!options.sample_weight) continue;
        const double weight = options.sample_weight[i];
        check_option(weight >= 0 && std::isfinite(weight), "sample_weight", weight, "finite numbers >= 0");
    }
    for (std::int64_t c = 0; options.initial && c <= dims; ++c) {
        check_option(std::isfinite(options.initial[c]), "initial", options.initial[c], "finite numbers");
    }
    constexpr std::int64_t kRows = 64;
    const auto max_abs = max_abs_kernel<T>();
    const int threads = resolve_threads(options.threads);
    State& state = *state_;
    const std::int64_t tasks = (n + kRows - 1) / kRows;
    state.magnitudes.resize(static_cast<std::size_t>(tasks));
    parallel_for(tasks, n * dims < State::kSerial ? 1 : threads, [&](std::int64_t task, int) {
        T most = 0;
        for (std::int64_t i = task * kRows; i < std::min(n, (task + 1) * kRows) && std::isfinite(most); ++i) {
            const T row = max_abs(samples.row(i), dims);
            if (!(row <= most)) most = row;  // NaN, too
        }
        state.magnitudes[task] = most;
    });
    T magnitude = 0;
    for (std::int64_t task = 0; task < tasks; ++task) {
        if (!std::isfinite(state.magnitudes[task]))
            throw InvalidArgument("X: expected finite values, got a non-finite one in rows " +
                                  std::to_string(task * kRows) + " to " +
                                  std::to_string(std::min(n, (task + 1) * kRows) - 1));
        magnitude = std::max(magnitude, state.magnitudes[task]);
    }
    state.labels.resize(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) state.labels[i] = y[i] > 0 ? 1 : -1;
    auto& solver = state.solver;
    solver.points.data = samples.data;
    solver.points.stride = samples.stride;
    solver.points.points = n;
    solver.points.dims = dims;
    solver.points.channels_first = false;
    solver.points.threads = threads;
    solver.samples.n = n;
    solver.labels = state.labels.data();
    solver.sample_weight = options.sample_weight;
    solver.initial = options.initial;
    solver.magnitude = static_cast<double>(magnitude);
    solver.most_bytes = n * dims * static_cast<std::int64_t>(sizeof(T)) + (std::int64_t(1) << 26);
    const SvmResult result = solver.solve(options);
    for (std::int64_t c = 0; c < dims; ++c) coef[c] = solver.w[c];
    return result;
}

template <class T>
std::size_t LinearSvm<T>::memory() const noexcept {
    return state_->solver.memory() + state_->labels.bytes() + state_->magnitudes.bytes();
}

template class LinearSvm<float>;
template class LinearSvm<double>;

}  // namespace ttt4as
