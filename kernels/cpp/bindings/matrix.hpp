// NumPy matrices of float32 or float64 as ttt4as::Matrix, without a copy.
#pragma once

#include <string>

#include "bindings.hpp"
#include "ttt4as/common.hpp"

namespace ttt4as {

// A matrix of T whose rows are contiguous; the message names what it got.
template <class T>
Matrix<const T> matrix_view(const py::array& array, const char* name) {
    check_axes(array, name, 2, 2);
    const auto size = static_cast<py::ssize_t>(sizeof(T));
    const bool aligned = array.attr("flags").attr("aligned").cast<bool>();
    if (!aligned || (array.strides(1) != size && array.shape(1) > 1) || array.strides(0) % size != 0) {
        throw py::value_error(std::string(name) + ": expected aligned rows of adjacent elements, got strides " +
                              py::str(array.attr("strides")).cast<std::string>());
    }
    return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1), array.strides(0) / size};
}

// Calls function(view) for a float32 or float64 array; raises TypeError for another dtype.
template <class Function>
auto with_matrix(const py::array& array, const char* name, Function&& function) {
    if (is_dtype(array, 'f', sizeof(float))) return function(matrix_view<float>(array, name));
    if (is_dtype(array, 'f', sizeof(double))) return function(matrix_view<double>(array, name));
    throw py::type_error(std::string(name) + ": expected dtype float32 or float64 in native byte order, got " +
                         py::str(array.dtype()).cast<std::string>());
}

}  // namespace ttt4as
