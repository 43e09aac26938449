// Checks of options: the message names the option, what it takes and what it got.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "ttt4as/common.hpp"

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

inline void check_solver(double C, double tol, std::int64_t max_iter) {
    check_positive("C", C);
    check_positive("tol", tol);
    check_count("max_iter", max_iter);
}

}  // namespace ttt4as
