// Upsampling goes row by row: two input rows are blended once, then spread along the width, so the inner loops touch
// one input row and one output row. Channels are handled in blocks: with channels last, neighbours in a block share
// cache lines, and with channels first a block of small planes stays in the cache while all pixels are gathered from
// it.

#include "ttt4as/bilinear.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

constexpr std::int64_t kChannelBlock = 16;
constexpr std::int64_t kSerial = 1 << 18;  // output pixels below which a second thread costs more than it brings

// Taps of a whole axis, split by field so that the loops over it vectorise.
template <class Compute>
struct AxisTaps {
    std::vector<std::int32_t> lower, upper;
    std::vector<Compute> weight_lower, weight_upper;

    AxisTaps(std::int64_t out_size, std::int64_t in_size)
        : lower(out_size), upper(out_size), weight_lower(out_size), weight_upper(out_size) {
        for (std::int64_t i = 0; i < out_size; ++i) {
            const Tap tap = bilinear_tap(i, out_size, in_size);
            lower[i] = static_cast<std::int32_t>(tap.lower);
            upper[i] = static_cast<std::int32_t>(tap.upper);
            weight_lower[i] = static_cast<Compute>(1.0 - tap.weight);
            weight_upper[i] = static_cast<Compute>(tap.weight);
        }
    }
};

// One plane with adjacent columns -> one output plane. `row` holds `width` elements.
template <class T, class Compute>
void upsample_plane(const Compute* plane, std::int64_t stride_row, std::int64_t width,
                    const AxisTaps<Compute>& vertical, const AxisTaps<Compute>& horizontal, Compute* row, T* out) {
    const std::int64_t out_height = static_cast<std::int64_t>(vertical.lower.size());
    const std::int64_t out_width = static_cast<std::int64_t>(horizontal.lower.size());
    const std::int32_t* left = horizontal.lower.data();
    const std::int32_t* right = horizontal.upper.data();
    const Compute* weight_left = horizontal.weight_lower.data();
    const Compute* weight_right = horizontal.weight_upper.data();
    for (std::int64_t y = 0; y < out_height; ++y) {
        const Compute* top = plane + vertical.lower[y] * stride_row;
        const Compute* bottom = plane + vertical.upper[y] * stride_row;
        const Compute weight_top = vertical.weight_lower[y];
        const Compute weight_bottom = vertical.weight_upper[y];
        for (std::int64_t x = 0; x < width; ++x) row[x] = top[x] * weight_top + bottom[x] * weight_bottom;
        T* out_row = out + y * out_width;
        for (std::int64_t x = 0; x < out_width; ++x) {
            out_row[x] = Element<T>::store(row[left[x]] * weight_left[x] + row[right[x]] * weight_right[x]);
        }
    }
}

// Channels [begin, end) -> packed planes (end - begin, h, w) in the compute type.
template <class T>
void pack(const FeatureView<T>& features, std::int64_t begin, std::int64_t end, typename Element<T>::Compute* packed) {
    const std::int64_t plane = features.height * features.width;
    for (std::int64_t y = 0; y < features.height; ++y) {
        for (std::int64_t x = 0; x < features.width; ++x) {
            const T* source = features.at(begin, y, x);
            auto* target = packed + y * features.width + x;
            for (std::int64_t c = 0; c < end - begin; ++c) {
                target[c * plane] = Element<T>::load(source[c * features.stride_channel]);
            }
        }
    }
}

// kAdjacent: channels lie side by side, which the compiler can then vectorise.
template <bool kAdjacent, class T>
void sample_block(const FeatureView<T>& features, const Tap& vertical, const Tap& horizontal, std::int64_t begin,
                  std::int64_t end, typename Element<T>::Compute* out) {
    using Compute = typename Element<T>::Compute;
    const std::int64_t stride = kAdjacent ? 1 : features.stride_channel;
    const T* top_left = features.at(begin, vertical.lower, horizontal.lower);
    const T* top_right = features.at(begin, vertical.lower, horizontal.upper);
    const T* bottom_left = features.at(begin, vertical.upper, horizontal.lower);
    const T* bottom_right = features.at(begin, vertical.upper, horizontal.upper);
    const Compute right = static_cast<Compute>(horizontal.weight), left = static_cast<Compute>(1.0 - horizontal.weight);
    const Compute bottom = static_cast<Compute>(vertical.weight), top = static_cast<Compute>(1.0 - vertical.weight);
    for (std::int64_t c = 0; c < end - begin; ++c) {
        const std::int64_t i = c * stride;
        const Compute upper = Element<T>::load(top_left[i]) * left + Element<T>::load(top_right[i]) * right;
        const Compute lower = Element<T>::load(bottom_left[i]) * left + Element<T>::load(bottom_right[i]) * right;
        out[c] = upper * top + lower * bottom;
    }
}

}  // namespace

template <class T>
void bilinear_upsample(const FeatureView<T>& features, std::int64_t out_height, std::int64_t out_width, T* out,
                       int threads) {
    using Compute = typename Element<T>::Compute;
    const AxisTaps<Compute> vertical(out_height, features.height), horizontal(out_width, features.width);
    const bool direct = std::is_same_v<T, Compute> && features.stride_col == 1;
    const std::int64_t plane = features.height * features.width, out_plane = out_height * out_width;
    const std::int64_t block = std::min(kChannelBlock, features.channels);
    const std::int64_t tasks = (features.channels + block - 1) / block;
    parallel_for(tasks, features.channels * out_plane < kSerial ? 1 : threads, [&](std::int64_t task, int) {
        const std::int64_t begin = task * block, end = std::min(begin + block, features.channels);
        std::vector<Compute> row(features.width);
        if constexpr (std::is_same_v<T, Compute>) {
            if (direct) {
                for (std::int64_t c = begin; c < end; ++c) {
                    upsample_plane(features.at(c, 0, 0), features.stride_row, features.width, vertical, horizontal,
                                   row.data(), out + c * out_plane);
                }
                return;
            }
        }
        std::vector<Compute> packed(block * plane);
        pack(features, begin, end, packed.data());
        for (std::int64_t c = begin; c < end; ++c) {
            upsample_plane(packed.data() + (c - begin) * plane, features.width, features.width, vertical, horizontal,
                           row.data(), out + c * out_plane);
        }
    });
}

template <class T>
void bilinear_sample(const FeatureView<T>& features, std::int64_t out_height, std::int64_t out_width,
                     const std::int64_t* rows, const std::int64_t* cols, std::int64_t count,
                     typename Element<T>::Compute* out) {
    const bool adjacent = features.stride_channel == 1;
    // Side by side, all channels of a pixel are one stream; else blocks keep their planes in the cache over all pixels.
    const std::int64_t block = adjacent ? features.channels : kChannelBlock;
    for (std::int64_t begin = 0; begin < features.channels; begin += block) {
        const std::int64_t end = std::min(begin + block, features.channels);
        for (std::int64_t i = 0; i < count; ++i) {
            const Tap vertical = bilinear_tap(rows[i], out_height, features.height);
            const Tap horizontal = bilinear_tap(cols[i], out_width, features.width);
            auto* target = out + i * features.channels + begin;
            if (adjacent) {
                sample_block<true>(features, vertical, horizontal, begin, end, target);
            } else {
                sample_block<false>(features, vertical, horizontal, begin, end, target);
            }
        }
    }
}

template void bilinear_upsample(const FeatureView<Half>&, std::int64_t, std::int64_t, Half*, int);
template void bilinear_upsample(const FeatureView<float>&, std::int64_t, std::int64_t, float*, int);
template void bilinear_upsample(const FeatureView<double>&, std::int64_t, std::int64_t, double*, int);
template void bilinear_sample(const FeatureView<Half>&, std::int64_t, std::int64_t, const std::int64_t*,
                              const std::int64_t*, std::int64_t, float*);
template void bilinear_sample(const FeatureView<float>&, std::int64_t, std::int64_t, const std::int64_t*,
                              const std::int64_t*, std::int64_t, float*);
template void bilinear_sample(const FeatureView<double>&, std::int64_t, std::int64_t, const std::int64_t*,
                              const std::int64_t*, std::int64_t, double*);

}  // namespace ttt4as
