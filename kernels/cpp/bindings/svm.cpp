// NumPy arrays in and out of ttt4as/svm.hpp, the GIL released.

#include "ttt4as/svm.hpp"

#include <functional>
#include <string>
#include <utility>

#include "signals.hpp"

namespace ttt4as {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

constexpr std::size_t kKept = std::size_t(1) << 24;  // bytes

const char* route_name(SvmRoute route) {
    switch (route) {
        case SvmRoute::working_set: return "working_set";
        case SvmRoute::newton: return "newton";
        case SvmRoute::coordinate: return "coordinate";
        default: return "automatic";
    }
}

SvmRoute route_of(const std::string& name) {
    for (SvmRoute route : {SvmRoute::automatic, SvmRoute::working_set, SvmRoute::newton, SvmRoute::coordinate}) {
        if (name == route_name(route)) return route;
    }
    throw py::value_error("route: expected automatic, working_set, newton or coordinate, got " + name);
}

template <class T>
py::tuple fit(const py::array& input, const Doubles& y, SvmOptions& options) {
    // Rows may lie apart; the features of one side by side.
    const py::array x = input.strides(1) == input.itemsize() && input.strides(0) % input.itemsize() == 0 &&
                                input.strides(0) >= 0 && input.attr("flags").attr("aligned").cast<bool>()
                            ? input
                            : py::array::ensure(input.attr("copy")(py::arg("order") = "C"));
    py::array_t<double> coef(x.shape(1));
    const Matrix<const T> samples{static_cast<const T*>(x.data()), x.shape(0), x.shape(1), x.strides(0) / x.itemsize()};
    double* out = coef.mutable_data();
    SvmResult result;
    Signals signals;
    options.interrupted = std::ref(signals);
    {
        py::gil_scoped_release release;
        // Fresh memory costs as much as a small problem: a thread keeps what its last fit took, within reason.
        // It is not there meanwhile: a signal's handler, which runs within this call, may fit another.
        thread_local LinearSvm<T> kept;
        LinearSvm<T> svm = std::exchange(kept, LinearSvm<T>());
        result = svm.fit(samples, y.data(), options, out);
        if (svm.memory() <= kKept) kept = std::move(svm);
    }
    signals.rethrow();
    return py::make_tuple(coef, result.intercept, result.n_iter, result.gap, result.converged, result.objective,
                          route_name(result.route), result.passes);
}

py::tuple fit_any(const py::array& x, const Doubles& y, double C, const std::string& loss, double tol, int max_iter,
                  const py::object& sample_weight, const py::object& initial, int threads, const std::string& route) {
    check_axes(x, "X", 2, 2);
    const py::ssize_t n = x.shape(0), dims = x.shape(1);
    if (y.ndim() != 1 || y.shape(0) != n)
        throw py::value_error("y: expected one label a sample, got shape " + shape_text(y));
    SvmOptions options;
    options.C = C;
    options.loss = loss_of(loss);
    options.tol = tol;
    options.max_iter = max_iter;
    options.threads = threads;
    options.route = route_of(route);
    Doubles weights, start;
    if (!sample_weight.is_none()) {
        weights = Doubles(sample_weight);
        if (weights.ndim() != 1 || weights.shape(0) != n) {
            throw py::value_error("sample_weight: expected one a sample, got shape " + shape_text(weights));
        }
        options.sample_weight = weights.data();
    }
    if (!initial.is_none()) {
        start = Doubles(initial);
        if (start.ndim() != 1 || start.shape(0) != dims + 1) {
            throw py::value_error("initial: expected coef and intercept, " + std::to_string(dims + 1) +
                                  " values, got shape " + shape_text(start));
        }
        options.initial = start.data();
    }
    if (is_dtype(x, 'f', sizeof(float))) return fit<float>(x, y, options);
    if (is_dtype(x, 'f', sizeof(double))) return fit<double>(x, y, options);
    throw py::type_error("X: expected dtype float32 or float64, got " + py::str(x.dtype()).cast<std::string>());
}

}  // namespace

void bind_svm(py::module_& module) {
    module.def("fit_linear_svm", &fit_any, py::arg("X"), py::arg("y"), py::arg("C"), py::arg("loss"), py::arg("tol"),
               py::arg("max_iter"), py::arg("sample_weight") = py::none(), py::arg("initial") = py::none(),
               py::arg("threads") = 0, py::arg("route") = "automatic",
               "(n, d) float32/64 and n labels -> coef, intercept, n_iter, gap, converged, objective, route, passes.");
}

}  // namespace ttt4as
