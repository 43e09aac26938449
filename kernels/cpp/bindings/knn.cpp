// NumPy arrays in and out of ttt4as/knn.hpp: float32 or float64 rows, the GIL released.

#include "ttt4as/knn.hpp"

#include <algorithm>
#include <memory>
#include <string>

#include "matrix.hpp"
#include "signals.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

constexpr std::int64_t kPart = 4096;  // queries between two looks for Ctrl-C

// The index and the array that it points into.
struct PyKnnIndex {
    py::array bank, prepared;
    std::unique_ptr<KnnIndex> index;

    PyKnnIndex(py::array array, int threads) : bank(std::move(array)) {
        with_matrix(bank, "bank", [&](auto view) {
            Signals signals;
            py::gil_scoped_release release;
            const BetweenTasks ask([&] { signals.check(); });
            index = std::make_unique<KnnIndex>(view, threads);
        });
    }

    // Opens what `save` wrote; `prepared` is kept, and read in place.
    PyKnnIndex(py::array array, py::array_t<std::uint8_t> block, bool verify)
        : bank(std::move(array)), prepared(std::move(block)) {
        if (prepared.ndim() != 1 || !(prepared.flags() & py::array::c_style)) {
            throw py::value_error("prepared: expected contiguous bytes, got shape " + shape_text(prepared));
        }
        const void* data = prepared.data();
        const auto bytes = static_cast<std::size_t>(prepared.size());
        with_matrix(bank, "bank", [&](auto view) {
            py::gil_scoped_release release;
            index = std::make_unique<KnnIndex>(view, data, bytes, verify);
        });
    }

    // The GIL is held in `write` only: the checksums read all there is.
    void save(const py::function& write) const {
        py::gil_scoped_release release;
        index->save([&](const void* data, std::size_t bytes) {
            py::gil_scoped_acquire acquire;
            write(py::memoryview::from_memory(data, static_cast<py::ssize_t>(bytes)));
        });
    }

    py::tuple search(const py::array& query, std::int64_t k, int threads, bool squared) const {
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
            Signals signals;
            {
                py::gil_scoped_release release;
                for (std::int64_t from = 0; from < view.rows && !signals(); from += kPart) {
                    auto part = view;
                    part.data = view.row(from);
                    part.rows = std::min(kPart, view.rows - from);
                    index->search(part, k, to_distances + from * k, to_indices + from * k, threads, squared);
                }
            }
            signals.rethrow();
            return py::make_tuple(distances, indices);
        });
    }
};

}  // namespace

void bind_knn(py::module_& module) {
    py::class_<PyKnnIndex>(module, "KnnIndex",
                           "Exact nearest neighbours of rows of a bank, which it keeps a reference to.")
        .def(py::init<py::array, int>(), py::arg("bank"), py::arg("threads") = 0)
        .def_static(
            "open",
            [](py::array bank, py::array_t<std::uint8_t> prepared, bool verify) {
                return std::make_unique<PyKnnIndex>(std::move(bank), std::move(prepared), verify);
            },
            py::arg("bank"), py::arg("prepared"), py::arg("verify") = true,
            "An index over a bank and the bytes that `save` wrote for it, which are read in place.")
        .def("save", &PyKnnIndex::save, py::arg("write"), "Calls write(bytes) with what was prepared, piece by piece.")
        .def("search", &PyKnnIndex::search, py::arg("query"), py::arg("k"), py::arg("threads") = 0,
             py::arg("squared") = false,
             "(Q, D) -> Euclidean distances (`squared`: their squares) (Q, k) float32 and rows of the bank (Q, k) "
             "int64, nearest first.")
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
                result["dense"] = counts.dense;
                result["fine"] = counts.fine;
                result["whole"] = counts.whole;
                result["measured"] = counts.measured;
                return result;
            },
            "How the pairs of the searches so far were decided.");
}

}  // namespace ttt4as
