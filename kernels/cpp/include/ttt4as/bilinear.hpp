// Bilinear interpolation of feature maps with half-pixel centres and clamped edges: what
// torch.nn.functional.interpolate(mode="bilinear", align_corners=False) computes.
#pragma once

#include <cstdint>

#include "ttt4as/types.hpp"

namespace ttt4as {

// Where an output position lies between the input positions of its axis:
// value = (1 - weight) * x[lower] + weight * x[upper].
struct Tap {
    std::int64_t lower, upper;
    double weight;  // of `upper`, in [0, 1)
};

// The tap of output position `position` in [0, out_size), for out_size >= 1 and in_size >= 1.
inline Tap bilinear_tap(std::int64_t position, std::int64_t out_size, std::int64_t in_size) {
    const double last = static_cast<double>(in_size - 1);
    const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
    double centre = (static_cast<double>(position) + 0.5) * scale - 0.5;
    centre = centre < 0.0 ? 0.0 : (centre > last ? last : centre);
    const std::int64_t lower = static_cast<std::int64_t>(centre);
    return {lower, lower + 1 < in_size ? lower + 1 : lower, centre - static_cast<double>(lower)};
}

// (channels, h, w) -> out, C-contiguous (channels, out_height, out_width). T: Half, BFloat16, float, double.
// All sizes are at least 1. Blocks of 16 channels are shared among the threads (0: max_threads()). Throws
// std::bad_alloc, or std::length_error for sizes that no memory holds; scratch: 2 * (out_height + out_width) taps and,
// for each thread, one input row, and for inputs without adjacent columns 16 channels of the input.
template <class T>
TTT4AS_API void bilinear_upsample(const FeatureView<T>& features, std::int64_t out_height, std::int64_t out_width,
                                  T* out, int threads = 1);

// The same with channels last: out, C-contiguous (out_height, out_width, channels). Fast where the features' channels
// are adjacent too. Rows are shared among the threads; scratch: the taps, those of the width once a channel below 16 of
// them, and, for each thread, some channels of a row.
template <class T>
TTT4AS_API void bilinear_upsample_last(const FeatureView<T>& features, std::int64_t out_height, std::int64_t out_width,
                                       T* out, int threads = 1);

// Pixels (rows[i], cols[i]) of the upsampled map -> out, C-contiguous (count, channels), in Element<T>::Compute.
// The caller has checked 0 <= rows[i] < out_height and 0 <= cols[i] < out_width. Allocates nothing.
template <class T>
TTT4AS_API void bilinear_sample(const FeatureView<T>& features, std::int64_t out_height, std::int64_t out_width,
                                const std::int64_t* rows, const std::int64_t* cols, std::int64_t count,
                                typename Element<T>::Compute* out);

}  // namespace ttt4as
