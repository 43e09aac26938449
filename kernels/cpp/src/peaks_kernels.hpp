// The loops of peaks.cpp that depend on the instruction set.
#pragma once

#include <cstdint>

namespace ttt4as {

template <class T>
struct PeakKernels {
    // The least, the greatest and the largest magnitude of n >= 1 values; the last is not finite if any value is not.
    void (*range)(const T* x, std::int64_t n, T* least, T* greatest, T* magnitude);
    // How many values are below `low`; those in [low, high] go to `out` as long as they fit, `*in_band` counts them
    // all.
    std::int64_t (*collect)(const T* x, std::int64_t n, T low, T high, T* out, std::int64_t capacity,
                            std::int64_t* in_band);
    // Columns of `row` that are >= tau and >= their neighbours in the three rows, in order; `above`, `below` may be
    // null.
    std::int64_t (*peaks)(const T* above, const T* row, const T* below, std::int64_t width, T tau,
                          std::int32_t* columns);
};

struct PeakTable {
    PeakKernels<float> f;
    PeakKernels<double> d;
};

namespace generic {
extern const PeakTable peak_table;
}
namespace avx2 {
extern const PeakTable peak_table;
}
namespace avx512 {
extern const PeakTable peak_table;
}

}  // namespace ttt4as
