// NumPy arrays in and out of ttt4as/knn.hpp: float32 or float64 rows, the GIL released.

#include "ttt4as/knn.hpp"

#include <memory>
#include <string>

#include "matrix.hpp"

namespace ttt4as {
namespace {

// The index and the array that it points into.
struct PyKnnIndex {
    py::array bank;
    std::unique_ptr<KnnIndex> index;

    PyKnnIndex(py::array array, int threads) : bank(std::move(array)) {
        with_matrix(bank, "bank", [&](auto view) {
            py::gil_scoped_release release;
            index = std::make_unique<KnnIndex>(view, threads);
        });
    }

    py::tuple search(const py::array& query, std::int64_t k, int threads) const {
        return with_matrix(query, "query", [&](auto view) -> py::tuple {
            if (view.cols != index->dim()) {
                throw py::value_error("query: expected " + std::to_string(index->dim()) + " columns, got shape " +
                                      shape_text(query));
            }
            if (k < 1 || k > index->size()) {
                throw py::value_error("k: expected an integer in [1, " + std::to_string(index->size()) + "], got " +
                                      std::to_string(k));
            }
            py::array_t<float> distances({static_cast<py::ssize_t>(view.rows), static_cast<py::ssize_t>(k)});
            py::array_t<std::int64_t> indices({static_cast<py::ssize_t>(view.rows), static_cast<py::ssize_t>(k)});
            float* to_distances = distances.mutable_data();
            std::int64_t* to_indices = indices.mutable_data();
            {
                py::gil_scoped_release release;
                index->search(view, k, to_distances, to_indices, threads);
            }
            return py::make_tuple(distances, indices);
        });
    }
};

}  // namespace

void bind_knn(py::module_& module) {
    py::class_<PyKnnIndex>(module, "KnnIndex",
                           "Exact nearest neighbours of rows of a bank, which it keeps a reference to.")
        .def(py::init<py::array, int>(), py::arg("bank"), py::arg("threads") = 0)
        .def("search", &PyKnnIndex::search, py::arg("query"), py::arg("k"), py::arg("threads") = 0,
             "(Q, D) -> Euclidean distances (Q, k) float32 and rows of the bank (Q, k) int64, nearest first.")
        .def_property_readonly("size", [](const PyKnnIndex& self) { return self.index->size(); })
        .def_property_readonly("dim", [](const PyKnnIndex& self) { return self.index->dim(); })
        .def_property_readonly(
            "nbytes", [](const PyKnnIndex& self) { return self.index->bytes(); }, "Bytes held beside the bank.")
        .def_property_readonly(
            "counts",
            [](const PyKnnIndex& self) {
                const KnnIndex::Counts counts = self.index->counts();
                py::dict result;
                result["queries"] = counts.queries;
                result["unstructured"] = counts.unstructured;
                result["fine"] = counts.fine;
                result["whole"] = counts.whole;
                result["measured"] = counts.measured;
                return result;
            },
            "How the pairs of the searches so far were decided.");
}

}  // namespace ttt4as
