// What the binding files share: their entry points, and checks of NumPy arrays whose messages name the argument.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "ttt4as/svm.hpp"
#include "ttt4as/types.hpp"

namespace ttt4as {

namespace py = pybind11;

void bind_bilinear(py::module_& module);
void bind_coreset(py::module_& module);
void bind_knn(py::module_& module);
void bind_peaks(py::module_& module);
void bind_segment(py::module_& module);
void bind_svm(py::module_& module);
void bind_threads(py::module_& module);

inline Loss loss_of(const std::string& name) {
    if (name != "squared_hinge" && name != "hinge")
        throw py::value_error("loss: expected squared_hinge or hinge, got " + name);
    return name == "hinge" ? Loss::hinge : Loss::squared_hinge;
}

// "(3, 0, 5)", as Python prints a shape.
inline std::string shape_text(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

// True if `array` holds elements of this kind ('f', 'i', ...) and size in the machine's byte order.
inline bool is_dtype(const py::array& array, char kind, py::ssize_t itemsize) {
    const py::dtype dtype = array.dtype();
    return dtype.kind() == kind && dtype.itemsize() == itemsize && dtype.attr("isnative").cast<bool>();
}

// `array` itself if its strides are whole elements at aligned addresses, else a C-contiguous copy.
inline py::array element_strided(py::array array) {
    bool ok = array.attr("flags").attr("aligned").cast<bool>();
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) ok = ok && array.strides(axis) % array.itemsize() == 0;
    return ok ? array : py::array::ensure(array.attr("copy")(py::arg("order") = "C"));
}

// The last three axes of `array` as a feature map, at `index` of the first axis where there are four.
template <class T>
FeatureView<T> feature_view(const py::array& array, py::ssize_t index = 0) {
    const py::ssize_t first = array.ndim() - 3, size = array.itemsize();
    const auto* base = static_cast<const char*>(array.data()) + (first == 1 ? index * array.strides(0) : 0);
    return {reinterpret_cast<const T*>(base), array.shape(first),          array.shape(first + 1),
            array.shape(first + 2),           array.strides(first) / size, array.strides(first + 1) / size,
            array.strides(first + 2) / size};
}

// Raises ValueError unless `array` has from `low` to `high` axes, none empty.
inline void check_axes(const py::array& array, const char* name, py::ssize_t low, py::ssize_t high) {
    if (array.ndim() < low || array.ndim() > high) {
        const std::string takes =
            low == high ? std::to_string(low) : std::to_string(low) + " or " + std::to_string(high);
        throw py::value_error(std::string(name) + ": expected " + takes + " dimensions, got shape " +
                              shape_text(array));
    }
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        if (array.shape(axis) == 0) {
            throw py::value_error(std::string(name) + ": expected no empty axis, got shape " + shape_text(array));
        }
    }
}

// Whether `array` holds bfloat16, which NumPy lacks: 16 bits in a record of one field "bfloat16", or the dtype that
// other packages register under that name.
inline bool is_bfloat16(const py::array& array) {
    const py::dtype dtype = array.dtype();
    if (!is_dtype(array, 'V', sizeof(BFloat16))) return false;
    const py::object names = dtype.attr("names");
    const py::object name = names.is_none() ? dtype.attr("name") : names.attr("__getitem__")(0);
    return py::str(name).cast<std::string>() == "bfloat16";
}

// Calls function(T{}) with the element type of a float16, bfloat16, float32 or float64 array; raises TypeError for
// another dtype.
template <class Function>
auto with_float_type(const py::array& array, const char* name, Function&& function) {
    if (is_dtype(array, 'f', sizeof(Half))) return function(Half{});
    if (is_dtype(array, 'f', sizeof(float))) return function(float{});
    if (is_dtype(array, 'f', sizeof(double))) return function(double{});
    if (is_bfloat16(array)) return function(BFloat16{});
    throw py::type_error(std::string(name) +
                         ": expected dtype float16, bfloat16, float32 or float64 in native byte order, got " +
                         py::str(array.dtype()).cast<std::string>());
}

}  // namespace ttt4as
