// Checks of options: the message names the option, what it takes and what it got.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>

#include "ttt4as/common.hpp"
#include "ttt4as/svm.hpp"

namespace ttt4as {

inline std::string shown(std::int64_t value) { return std::to_string(value); }

inline std::string shown(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
}

template <class Number>
void check_option(bool holds, const char* name, Number got, const char* takes) {
    if (!holds) throw InvalidArgument(std::string(name) + ": expected " + takes + ", got " + shown(got));
}

inline void check_positive(const char* name, double value) {
    check_option(value > 0 && std::isfinite(value), name, value, "a finite number > 0");
}

inline void check_count(const char* name, std::int64_t value) {
    check_option(value >= 1, name, value, "an integer >= 1");
}

inline void check_solver(double C, Loss loss, double tol, std::int64_t max_iter) {
    check_positive("C", C);
    check_option(loss == Loss::squared_hinge || loss == Loss::hinge, "loss", static_cast<std::int64_t>(loss),
                 "Loss::squared_hinge or Loss::hinge");
    check_positive("tol", tol);
    check_count("max_iter", max_iter);
}

inline void check_address(const char* name, const void* address) {
    if (!address) throw InvalidArgument(std::string(name) + ": expected an address, got NULL");
}

template <class T>
void check_matrix(const char* name, const Matrix<T>& matrix, std::int64_t most_rows) {
    constexpr std::int64_t kMostCols = std::numeric_limits<std::int32_t>::max();
    if (matrix.rows < 1 || matrix.rows > most_rows || matrix.cols < 1 || matrix.cols > kMostCols) {
        throw InvalidArgument(std::string(name) + ": expected 1 to " + std::to_string(most_rows) + " rows and 1 to " +
                              std::to_string(kMostCols) + " columns, got (" + std::to_string(matrix.rows) + ", " +
                              std::to_string(matrix.cols) + ")");
    }
    check_address(name, matrix.data);
}

}  // namespace ttt4as
