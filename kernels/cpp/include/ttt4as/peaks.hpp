// Where pseudo-labels come from: the percentile of an anomaly map, its peaks, and their square neighbourhoods.
#pragma once

#include <cstdint>

#include "ttt4as/common.hpp"

namespace ttt4as {

// Memory that the functions below reuse from call to call, one thread at a time; at most an eighth of the map plus
// 8 W + 82,000 bytes, or 115,000 of doubles.
template <class T>
struct PeakScratch {
    Buffer<T> values;
    Buffer<std::int32_t> columns;
    struct Run {
        std::int32_t row, begin, end;
    };
    Buffer<Run> runs;
};

// What one pass over a map tells.
template <class T>
struct MapRange {
    T least, greatest;
    bool finite;  // `least` and `greatest` mean nothing where this is false
};

// T: float, double. The map is contiguous, n >= 1.
template <class T>
TTT4AS_API MapRange<T> map_range(const T* map, std::int64_t n) noexcept;

// numpy.percentile(map, percentile) of the values as doubles, linear interpolation, without sorting: values near the
// wanted rank, bracketed by a sample, are picked out in one pass; where the bracket misses (many equal values), a radix
// selection reads the map a few times more. The values are finite, percentile in [0, 100].
template <class T>
TTT4AS_API double map_percentile(const T* map, std::int64_t n, double percentile, PeakScratch<T>& scratch);

// numpy.quantile, likewise; quantile in [0, 1].
template <class T>
TTT4AS_API double map_quantile(const T* map, std::int64_t n, double quantile, PeakScratch<T>& scratch);

// Pixels of the contiguous (height, width) map that are >= tau and not below any of their up to 8 neighbours become 1
// in `peaks`, the others 0.
template <class T>
TTT4AS_API void mark_peaks(const T* map, std::int64_t height, std::int64_t width, double tau, std::uint8_t* peaks,
                           PeakScratch<T>& scratch);

// The same peaks, grown by `radius` >= 0 in each direction. Returns how many pixels are 1.
template <class T>
TTT4AS_API std::int64_t mark_dilated_peaks(const T* map, std::int64_t height, std::int64_t width, double tau,
                                           std::int64_t radius, std::uint8_t* labels, PeakScratch<T>& scratch);

// Nonzero pixels of `mask` grown by `radius` -> 0 or 1 in `out`, which is not `mask`.
template <class T>
TTT4AS_API void dilate(const std::uint8_t* mask, std::int64_t height, std::int64_t width, std::int64_t radius,
                       std::uint8_t* out, PeakScratch<T>& scratch);

}  // namespace ttt4as
