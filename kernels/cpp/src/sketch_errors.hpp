// What fitting a sketch and encoding with it both need to bound their rounding.
#pragma once

#include <limits>

namespace ttt4as {

constexpr double kUnit = 0x1p-24;      // half an ulp of float at 1
constexpr double kSlack = 1.0 + 1e-6;  // covers the double arithmetic on errors themselves
constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace ttt4as
