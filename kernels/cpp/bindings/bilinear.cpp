// NumPy arrays in and out of ttt4as/bilinear.hpp: any strides without a copy, the GIL released while it computes.

#include "ttt4as/bilinear.hpp"

#include <limits>
#include <string>
#include <vector>

#include "bindings.hpp"

namespace ttt4as {
namespace {

// Taps hold 32-bit positions; a map this large could not be allocated anyway.
void check_size(std::int64_t height, std::int64_t width) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    if (height < 1 || width < 1 || height > kMost || width > kMost) {
        throw py::value_error("size: expected height and width in [1, 2147483647], got (" + std::to_string(height) +
                              ", " + std::to_string(width) + ")");
    }
}

void check_features(const py::array& features, py::ssize_t most_axes) {
    check_axes(features, "features", 3, most_axes);
    check_size(features.shape(features.ndim() - 2), features.shape(features.ndim() - 1));
}

// Whether a batch of images lies pixel by pixel, all channels of one side by side, and not plane by plane.
bool is_channels_last(const py::array& batch) {
    if (batch.ndim() != 4 || batch.flags() & py::array::c_style) return false;
    py::ssize_t stride = batch.itemsize();
    for (const int axis : {1, 3, 2, 0}) {
        if (batch.shape(axis) > 1 && batch.strides(axis) != stride) return false;
        stride *= batch.shape(axis);
    }
    return true;
}

py::array upsample(py::array features, std::int64_t height, std::int64_t width, int threads) {
    check_features(features, 4);
    check_size(height, width);
    return with_float_type(features, "features", [&](auto zero) -> py::array {
        using T = decltype(zero);
        const py::array input = element_strided(features);
        const bool last = is_channels_last(input);
        std::vector<py::ssize_t> shape(input.shape(), input.shape() + input.ndim());
        shape[shape.size() - 2] = height;
        shape[shape.size() - 1] = width;
        if (last) shape = {shape[0], height, width, shape[1]};
        py::array output(input.dtype(), shape);
        T* out = static_cast<T*>(output.mutable_data());
        const std::int64_t batch = input.ndim() == 4 ? input.shape(0) : 1;
        const std::int64_t image = output.size() / batch;
        // Views are read from the array while the GIL is held.
        std::vector<FeatureView<T>> views;
        for (std::int64_t b = 0; b < batch; ++b) views.push_back(feature_view<T>(input, b));
        {
            py::gil_scoped_release release;
            for (std::int64_t b = 0; b < batch; ++b) {
                const auto run = last ? bilinear_upsample_last<T> : bilinear_upsample<T>;
                run(views[b], height, width, out + b * image, threads);
            }
        }
        if (last) return output.attr("transpose")(0, 3, 1, 2);
        return output;
    });
}

// Coordinates as C-contiguous int64, each in [0, limit).
py::array coordinates(const py::array& values, const char* name, std::int64_t limit) {
    if (!is_dtype(values, 'i', sizeof(std::int64_t))) {
        throw py::type_error(std::string(name) + ": expected dtype int64, got " +
                             py::str(values.dtype()).cast<std::string>());
    }
    if (values.ndim() != 1) {
        throw py::value_error(std::string(name) + ": expected 1 dimension, got shape " + shape_text(values));
    }
    py::array_t<std::int64_t, py::array::c_style> packed(values);
    for (py::ssize_t i = 0; i < packed.size(); ++i) {
        const std::int64_t value = packed.data()[i];
        if (value < 0 || value >= limit) {
            throw py::value_error(std::string(name) + ": expected pixels in [0, " + std::to_string(limit) + "), got " +
                                  std::to_string(value) + " at " + std::to_string(i));
        }
    }
    return packed;
}

py::array sample(py::array features, py::array rows, py::array cols, std::int64_t height, std::int64_t width) {
    check_features(features, 3);
    check_size(height, width);
    rows = coordinates(rows, "rows", height);
    cols = coordinates(cols, "cols", width);
    if (rows.size() != cols.size()) {
        throw py::value_error("cols: expected as many as rows (" + std::to_string(rows.size()) + "), got " +
                              std::to_string(cols.size()));
    }
    return with_float_type(features, "features", [&](auto zero) -> py::array {
        using T = decltype(zero);
        using Compute = typename Element<T>::Compute;
        const py::array input = element_strided(features);
        const FeatureView<T> view = feature_view<T>(input);
        py::array_t<Compute> output({rows.size(), input.shape(0)});
        Compute* out = output.mutable_data();
        const auto* row = static_cast<const std::int64_t*>(rows.data());
        const auto* col = static_cast<const std::int64_t*>(cols.data());
        const std::int64_t count = rows.size();
        {
            py::gil_scoped_release release;
            bilinear_sample(view, height, width, row, col, count, out);
        }
        return output;
    });
}

}  // namespace

void bind_bilinear(py::module_& module) {
    module.def("bilinear_upsample", &upsample, py::arg("features"), py::arg("height"), py::arg("width"),
               py::arg("threads") = 1,
               "(C, h, w) or (B, C, h, w), float16/32/64 or bfloat16 -> the same with height and width, in that dtype; "
               "four axes with channels last in memory stay so.");
    module.def("bilinear_sample", &sample, py::arg("features"), py::arg("rows"), py::arg("cols"), py::arg("height"),
               py::arg("width"),
               "(C, h, w) and N int64 pixels of the (height, width) grid -> (N, C), float32 (float64 for float64).");
}

}  // namespace ttt4as
