// Linear SVMs solved to a stated duality gap: min 1/2 (|w|^2 + b^2) + sum_i C_i L(1 - y_i (w.x_i + b)), C_i = C s_i,
// L(m) = max(0, m)^2 or max(0, m): the objective of scikit-learn's LinearSVC with intercept_scaling = 1.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "ttt4as/common.hpp"

namespace ttt4as {

enum class Loss { squared_hinge = 0, hinge = 1 };

// Which solver runs; `automatic` chooses by the rule in src/svm_solver.hpp.
enum class SvmRoute { automatic = 0, working_set = 1, newton = 2, coordinate = 3 };

struct SvmOptions {
    double C = 1e-3;
    Loss loss = Loss::squared_hinge;
    double tol = 1e-4;    // stop at this relative duality gap, (primal - dual) / primal
    int max_iter = 1000;  // rounds of the working set, or Newton steps, or epochs
    int threads = 0;      // 0: max_threads()
    SvmRoute route = SvmRoute::automatic;
    const double* sample_weight = nullptr;  // s_i, finite and >= 0, or all 1
    const double* initial = nullptr;        // w and then b to start from, dims + 1 values
    // Asked every now and then, by the caller's thread: true ends the fit with what it has, as max_iter does.
    std::function<bool()> interrupted;
};

struct SvmResult {
    double intercept = 0;
    int n_iter = 0;
    double gap = 0;  // at the returned w and b, in double precision
    double objective = 0;
    bool converged = false;
    SvmRoute route = SvmRoute::automatic;  // the one that finished
    int passes = 0;                        // over the points: of the working set's rounds, or Newton's Hessian products
};

// Solves one problem after another in memory that it keeps and only grows: at most 1.1 times the samples' bytes, 200
// MiB, and 300 bytes a sample and a feature. Not for two threads at once. T: float, double. Deterministic: the same
// input gives the same bits on any number of threads.
template <class T>
class TTT4AS_API LinearSvm {
  public:
    LinearSvm();
    ~LinearSvm();
    LinearSvm(LinearSvm&&) noexcept;
    LinearSvm& operator=(LinearSvm&&) noexcept;

    // samples: (n, dims), finite; y: n values, > 0 for the positive class, no NaN; coef: dims values, written.
    // Throws InvalidArgument for an empty or non-finite problem, std::bad_alloc.
    SvmResult fit(Matrix<const T> samples, const double* y, const SvmOptions& options, double* coef);

    // Bytes kept from one fit for the next.
    std::size_t memory() const noexcept;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace ttt4as
