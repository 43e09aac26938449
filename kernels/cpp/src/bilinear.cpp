// Upsampling goes row by row: two input rows are blended once, then spread along the width, so the inner loops touch
// one input row and one output row, or with channels last one pixel of it after the other. Channels first from channels
// last goes by blocks of channels, so that neighbours in a block share cache lines.

#include "ttt4as/bilinear.hpp"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "bilinear_kernels.hpp"
#include "by_isa.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {

const BilinearTable& bilinear_table() noexcept { return TTT4AS_BY_ISA(bilinear_table); }

namespace {

constexpr std::int64_t kChannelBlock = 16;
constexpr std::int64_t kRowElements = 1 << 13;  // of a blended row with channels last: it stays in the first cache
constexpr std::int64_t kFew = 16;  // channels below which a whole output row is made at once, not pixel by pixel
constexpr std::int64_t kSerial = 1 << 18;  // output pixels below which a second thread costs more than it brings

template <class T>
const BilinearKernels<T>& kernels() noexcept {
    if constexpr (std::is_same_v<T, Half>) {
        return bilinear_table().half;
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        return bilinear_table().bfloat16;
    } else if constexpr (std::is_same_v<T, float>) {
        return bilinear_table().f;
    } else {
        return bilinear_table().d;
    }
}

// Taps of a whole axis, split by field so that the loops over it vectorise.
template <class Compute>
struct AxisTaps {
    std::vector<std::int32_t> lower, upper;
    std::vector<Compute> weight_lower, weight_upper;

    // With `channels` elements side by side at every position.
    AxisTaps(std::int64_t out_size, std::int64_t in_size, std::int64_t channels = 1)
        : lower(out_size * channels),
          upper(out_size * channels),
          weight_lower(out_size * channels),
          weight_upper(out_size * channels) {
        for (std::int64_t i = 0; i < out_size; ++i) {
            const Tap tap = bilinear_tap(i, out_size, in_size);
            for (std::int64_t c = 0; c < channels; ++c) {
                const std::int64_t at = i * channels + c;
                lower[at] = static_cast<std::int32_t>(tap.lower * channels + c);
                upper[at] = static_cast<std::int32_t>(tap.upper * channels + c);
                weight_lower[at] = static_cast<Compute>(1.0 - tap.weight);
                weight_upper[at] = static_cast<Compute>(tap.weight);
            }
        }
    }
};

// One plane with adjacent columns, of T or of what it is computed in -> one output plane. `row` holds `width` elements.
template <class T, class P, class Compute>
void upsample_plane(const P* plane, std::int64_t stride_row, std::int64_t width, const AxisTaps<Compute>& vertical,
                    const AxisTaps<Compute>& horizontal, Compute* row, T* out) {
    const std::int64_t out_height = static_cast<std::int64_t>(vertical.lower.size());
    const std::int64_t out_width = static_cast<std::int64_t>(horizontal.lower.size());
    for (std::int64_t y = 0; y < out_height; ++y) {
        kernels<P>().blend(plane + vertical.lower[y] * stride_row, plane + vertical.upper[y] * stride_row,
                           vertical.weight_lower[y], vertical.weight_upper[y], width, row);
        kernels<T>().spread(row, width, horizontal.lower.data(), horizontal.upper.data(),
                            horizontal.weight_lower.data(), horizontal.weight_upper.data(), out_width,
                            out + y * out_width);
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

// Channels [begin, end) of the pixel where the two taps meet.
template <class T>
void sample_block(const FeatureView<T>& features, const Tap& vertical, const Tap& horizontal, std::int64_t begin,
                  std::int64_t end, typename Element<T>::Compute* out) {
    using Compute = typename Element<T>::Compute;
    const Compute weights[4] = {static_cast<Compute>(1.0 - horizontal.weight), static_cast<Compute>(horizontal.weight),
                                static_cast<Compute>(1.0 - vertical.weight), static_cast<Compute>(vertical.weight)};
    const T* taps[4] = {
        features.at(begin, vertical.lower, horizontal.lower), features.at(begin, vertical.lower, horizontal.upper),
        features.at(begin, vertical.upper, horizontal.lower), features.at(begin, vertical.upper, horizontal.upper)};
    if (features.stride_channel == 1) {
        kernels<T>().sample(taps, weights, end - begin, out);
        return;
    }
    if constexpr (std::is_same_v<T, Compute>) {
        for (std::int64_t c = 0; c < end - begin; ++c) {
            const std::int64_t i = c * features.stride_channel;
            out[c] = (taps[0][i] * weights[0] + taps[1][i] * weights[1]) * weights[2] +
                     (taps[2][i] * weights[0] + taps[3][i] * weights[1]) * weights[3];
        }
    } else {  // side by side they are converted in vectors
        T block[4][kChannelBlock];
        for (int k = 0; k < 4; ++k) {
            for (std::int64_t c = 0; c < end - begin; ++c) block[k][c] = taps[k][c * features.stride_channel];
            taps[k] = block[k];
        }
        kernels<T>().sample(taps, weights, end - begin, out);
    }
}

// Channels [begin, end) of two input rows, blended: pixel after pixel, `end - begin` elements each.
template <class T, class Compute>
void blend_rows(const FeatureView<T>& features, std::int64_t begin, std::int64_t end, std::int64_t lower,
                std::int64_t upper, Compute weight_lower, Compute weight_upper, Compute* row) {
    const std::int64_t n = end - begin;
    if (features.stride_channel == 1 && features.stride_col == n) {
        kernels<T>().blend(features.at(begin, lower, 0), features.at(begin, upper, 0), weight_lower, weight_upper,
                           features.width * n, row);
        return;
    }
    for (std::int64_t x = 0; x < features.width; ++x) {
        const T *a = features.at(begin, lower, x), *b = features.at(begin, upper, x);
        if (features.stride_channel == 1) {
            kernels<T>().blend(a, b, weight_lower, weight_upper, n, row + x * n);
            continue;
        }
        for (std::int64_t c = 0; c < n; c += kChannelBlock) {
            T block[2][kChannelBlock];
            const std::int64_t here = std::min(kChannelBlock, n - c);
            for (std::int64_t k = 0; k < here; ++k) {
                block[0][k] = a[(c + k) * features.stride_channel];
                block[1][k] = b[(c + k) * features.stride_channel];
            }
            kernels<T>().blend(block[0], block[1], weight_lower, weight_upper, here, row + x * n + c);
        }
    }
}

}  // namespace

template <class T>
void bilinear_upsample(const FeatureView<T>& features, std::int64_t out_height, std::int64_t out_width, T* out,
                       int threads) {
    using Compute = typename Element<T>::Compute;
    const AxisTaps<Compute> vertical(out_height, features.height), horizontal(out_width, features.width);
    const std::int64_t plane = features.height * features.width, out_plane = out_height * out_width;
    const std::int64_t block = std::min(kChannelBlock, features.channels);
    const std::int64_t tasks = (features.channels + block - 1) / block;
    parallel_for(tasks, features.channels * out_plane < kSerial ? 1 : threads, [&](std::int64_t task, int) {
        const std::int64_t begin = task * block, end = std::min(begin + block, features.channels);
        std::vector<Compute> row(features.width);
        if (features.stride_col == 1) {
            for (std::int64_t c = begin; c < end; ++c) {
                upsample_plane(features.at(c, 0, 0), features.stride_row, features.width, vertical, horizontal,
                               row.data(), out + c * out_plane);
            }
            return;
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
void bilinear_upsample_last(const FeatureView<T>& features, std::int64_t out_height, std::int64_t out_width, T* out,
                            int threads) {
    using Compute = typename Element<T>::Compute;
    const std::int64_t channels = features.channels, row_size = out_width * channels;
    // Positions have 32 bits.
    const bool few = channels < kFew && features.width * channels <= std::numeric_limits<std::int32_t>::max();
    const AxisTaps<Compute> vertical(out_height, features.height);
    const AxisTaps<Compute> horizontal(out_width, features.width, few ? channels : 1);
    const std::int64_t block =
        std::min(channels, std::max(std::int64_t{64}, kRowElements / features.width / kChannelBlock * kChannelBlock));
    parallel_for(out_height, out_height * row_size < kSerial ? 1 : threads, [&](std::int64_t y, int) {
        std::vector<Compute> row(features.width * block);
        T* out_row = out + y * row_size;
        for (std::int64_t begin = 0; begin < channels; begin += block) {
            const std::int64_t n = std::min(block, channels - begin);
            blend_rows(features, begin, begin + n, vertical.lower[y], vertical.upper[y], vertical.weight_lower[y],
                       vertical.weight_upper[y], row.data());
            if (few) {
                kernels<T>().spread(row.data(), features.width * n, horizontal.lower.data(), horizontal.upper.data(),
                                    horizontal.weight_lower.data(), horizontal.weight_upper.data(), row_size, out_row);
                continue;
            }
            for (std::int64_t x = 0; x < out_width; ++x) {
                kernels<T>().mix(row.data() + horizontal.lower[x] * n, row.data() + horizontal.upper[x] * n,
                                 horizontal.weight_lower[x], horizontal.weight_upper[x], n,
                                 out_row + x * channels + begin);
            }
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
            sample_block(features, vertical, horizontal, begin, end, out + i * features.channels + begin);
        }
    }
}

#define TTT4AS_INSTANTIATE(T)                                                                             \
    template void bilinear_upsample(const FeatureView<T>&, std::int64_t, std::int64_t, T*, int);          \
    template void bilinear_upsample_last(const FeatureView<T>&, std::int64_t, std::int64_t, T*, int);     \
    template void bilinear_sample(const FeatureView<T>&, std::int64_t, std::int64_t, const std::int64_t*, \
                                  const std::int64_t*, std::int64_t, Element<T>::Compute*);
TTT4AS_INSTANTIATE(Half)
TTT4AS_INSTANTIATE(BFloat16)
TTT4AS_INSTANTIATE(float)
TTT4AS_INSTANTIATE(double)
#undef TTT4AS_INSTANTIATE

}  // namespace ttt4as
