// NumPy arrays in and out of ttt4as/coreset.hpp: float32 or float64 rows, the GIL released.

#include "ttt4as/coreset.hpp"

#include <memory>
#include <mutex>
#include <string>

#include "matrix.hpp"
#include "signals.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

// A selection under way and the array that it points into. One thread at a time: others wait.
struct PyGreedyCoreset {
    py::array points;
    std::unique_ptr<GreedyCoreset> coreset;
    std::int64_t rows = 0;
    std::mutex mutex;

    PyGreedyCoreset(py::array array, std::int64_t start, int threads) : points(std::move(array)) {
        with_matrix(points, "points", [&](auto view) {
            if (start < 0 || start >= view.rows) {
                throw py::value_error("start: expected an integer in [0, " + std::to_string(view.rows - 1) + "], got " +
                                      std::to_string(start));
            }
            rows = view.rows;
            Signals signals;
            py::gil_scoped_release release;
            const BetweenTasks ask([&] { signals.check(); });
            coreset = std::make_unique<GreedyCoreset>(view, start, threads);
        });
    }

    py::array_t<std::int64_t> pick(std::int64_t count, int threads) {
        if (count < 0 || count > rows) {
            throw py::value_error("count: expected an integer in [0, " + std::to_string(rows) + "], got " +
                                  std::to_string(count));
        }
        py::array_t<std::int64_t> picks(static_cast<py::ssize_t>(count));
        std::int64_t* out = picks.mutable_data();
        std::int64_t left;
        Signals signals;
        {
            py::gil_scoped_release release;
            std::lock_guard<std::mutex> lock(mutex);
            left = rows - coreset->picked();
            for (std::int64_t i = 0; count <= left && i < count && !signals(); ++i) coreset->pick(1, out + i, threads);
        }
        signals.rethrow();
        if (count > left) {
            throw py::value_error("count: expected an integer in [0, " + std::to_string(left) + "], got " +
                                  std::to_string(count));
        }
        return picks;
    }

    std::int64_t measured() {
        py::gil_scoped_release release;
        std::lock_guard<std::mutex> lock(mutex);
        return coreset->measured();
    }
};

}  // namespace

void bind_coreset(py::module_& module) {
    py::class_<PyGreedyCoreset>(module, "GreedyCoreset", "Greedy k-center over rows of an array, which it keeps.")
        .def(py::init<py::array, std::int64_t, int>(), py::arg("points"), py::arg("start") = 0, py::arg("threads") = 0)
        .def("pick", &PyGreedyCoreset::pick, py::arg("count"), py::arg("threads") = 0,
             "The next `count` picks, int64; the first of all is `start`.")
        .def_property_readonly(
            "nbytes", [](const PyGreedyCoreset& self) { return self.coreset->bytes(); },
            "Bytes held beside the points.")
        .def_property_readonly("measured", &PyGreedyCoreset::measured, "Distances that were computed so far.");
}

}  // namespace ttt4as
