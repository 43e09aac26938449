// NumPy arrays in and out of ttt4as/peaks.hpp: batches spread over threads, the GIL released.

#include "ttt4as/peaks.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

template <class T>
py::array local_maxima(const py::array_t<T, py::array::c_style>& map, double percentile, int threads) {
    const std::int64_t batch = map.shape(0), height = map.shape(1), width = map.shape(2), size = height * width;
    if (width > (1 << 30) || height > (1 << 30))
        throw py::value_error("anomaly_map: expected at most 2^30 rows and columns");
    py::array_t<bool> peaks({batch, height, width});
    const T* in = map.data();
    auto* out = reinterpret_cast<std::uint8_t*>(peaks.mutable_data());
    std::int64_t bad = -1;
    {
        py::gil_scoped_release release;
        threads = static_cast<int>(std::min<std::int64_t>(resolve_threads(threads), batch));
        std::vector<PeakScratch<T>> scratch(static_cast<std::size_t>(threads));
        std::vector<std::uint8_t> finite(static_cast<std::size_t>(batch), 1);
        parallel_for(batch, threads, [&](std::int64_t i, int worker) {
            const T* one = in + i * size;
            finite[i] = map_range(one, size).finite;
            if (!finite[i]) return;
            const double tau = map_percentile(one, size, percentile, scratch[worker]);
            mark_peaks(one, height, width, tau, out + i * size, scratch[worker]);
        });
        for (std::int64_t i = batch - 1; i >= 0; --i) bad = finite[i] ? bad : i;
    }
    if (bad >= 0)
        throw py::value_error("anomaly_map: expected finite values, got a non-finite one in map " +
                              std::to_string(bad));
    return peaks;
}

py::array local_maxima_any(const py::array& map, double percentile, int threads) {
    check_axes(map, "anomaly_map", 3, 3);
    if (!(percentile >= 0 && percentile <= 100)) throw py::value_error("percentile: expected a number in [0, 100]");
    if (is_dtype(map, 'f', sizeof(double))) return local_maxima<double>(map, percentile, threads);
    if (is_dtype(map, 'f', sizeof(float))) return local_maxima<float>(map, percentile, threads);
    throw py::type_error("anomaly_map: expected dtype float32 or float64, got " +
                         py::str(map.dtype()).cast<std::string>());
}

py::array dilate_any(const py::array& mask, std::int64_t radius, int threads) {
    check_axes(mask, "mask", 3, 3);
    if (mask.dtype().kind() != 'b') {
        throw py::type_error("mask: expected dtype bool, got " + py::str(mask.dtype()).cast<std::string>());
    }
    if (radius < 0) throw py::value_error("radius: expected an integer >= 0, got " + std::to_string(radius));
    const py::array_t<bool, py::array::c_style> packed(mask);
    const std::int64_t batch = packed.shape(0), height = packed.shape(1), width = packed.shape(2),
                       size = height * width;
    if (width > (1 << 30) || height > (1 << 30)) throw py::value_error("mask: expected at most 2^30 rows and columns");
    py::array_t<bool> grown({batch, height, width});
    const auto* in = reinterpret_cast<const std::uint8_t*>(packed.data());
    auto* out = reinterpret_cast<std::uint8_t*>(grown.mutable_data());
    {
        py::gil_scoped_release release;
        threads = static_cast<int>(std::min<std::int64_t>(resolve_threads(threads), batch));
        std::vector<PeakScratch<float>> scratch(static_cast<std::size_t>(threads));
        parallel_for(batch, threads, [&](std::int64_t i, int worker) {
            dilate(in + i * size, height, width, radius, out + i * size, scratch[worker]);
        });
    }
    return grown;
}

}  // namespace

void bind_peaks(py::module_& module) {
    module.def("local_maxima", &local_maxima_any, py::arg("anomaly_map"), py::arg("percentile"), py::arg("threads") = 0,
               "(B, H, W) float32/64 -> (B, H, W) bool.");
    module.def("dilate", &dilate_any, py::arg("mask"), py::arg("radius"), py::arg("threads") = 0,
               "(B, H, W) bool -> the same, grown by a square of side 2 * radius + 1.");
}

}  // namespace ttt4as
