// Interpolation in every element type and layout against its plain statement, bit for bit.
#include <cstring>
#include <limits>

#include "check.hpp"
#include "ttt4as/bilinear.hpp"

namespace {

using ttt4as::Element;

// One channel of one output pixel: rows first, as an upsampling does, or columns first, as a sample does.
template <class T>
typename Element<T>::Compute plain(const ttt4as::FeatureView<T>& features, std::int64_t channel, std::int64_t y,
                                   std::int64_t x, std::int64_t height, std::int64_t width, bool rows_first) {
    using Compute = typename Element<T>::Compute;
    const ttt4as::Tap v = ttt4as::bilinear_tap(y, height, features.height);
    const ttt4as::Tap h = ttt4as::bilinear_tap(x, width, features.width);
    const auto at = [&](std::int64_t row, std::int64_t col) {
        return Element<T>::load(*features.at(channel, row, col));
    };
    const auto blend = [](Compute a, Compute b, double weight) {
        return a * static_cast<Compute>(1.0 - weight) + b * static_cast<Compute>(weight);
    };
    if (rows_first) {
        return blend(blend(at(v.lower, h.lower), at(v.upper, h.lower), v.weight),
                     blend(at(v.lower, h.upper), at(v.upper, h.upper), v.weight), h.weight);
    }
    return blend(blend(at(v.lower, h.lower), at(v.lower, h.upper), h.weight),
                 blend(at(v.upper, h.lower), at(v.upper, h.upper), h.weight), v.weight);
}

template <class T>
bool same(T a, T b) {
    return std::memcmp(&a, &b, sizeof a) == 0;
}

template <class T>
void compare(const ttt4as::FeatureView<T>& features, std::int64_t height, std::int64_t width, int threads) {
    using Compute = typename Element<T>::Compute;
    const std::int64_t channels = features.channels;
    std::vector<T> first(static_cast<std::size_t>(channels * height * width)), last(first.size());
    ttt4as::bilinear_upsample(features, height, width, first.data(), threads);
    ttt4as::bilinear_upsample_last(features, height, width, last.data(), threads);
    std::vector<std::int64_t> rows, cols;
    for (std::int64_t y = 0; y < height; ++y) {
        for (std::int64_t x = 0; x < width; ++x) {
            rows.push_back(y);
            cols.push_back(x);
            for (std::int64_t c = 0; c < channels; ++c) {
                const T expected = Element<T>::store(plain(features, c, y, x, height, width, true));
                CHECK(same(first[(c * height + y) * width + x], expected));
                CHECK(same(last[(y * width + x) * channels + c], expected));
            }
        }
    }
    std::vector<Compute> samples(rows.size() * static_cast<std::size_t>(channels));
    ttt4as::bilinear_sample(features, height, width, rows.data(), cols.data(), static_cast<std::int64_t>(rows.size()),
                            samples.data());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        for (std::int64_t c = 0; c < channels; ++c) {
            CHECK(same(samples[i * channels + c], plain(features, c, rows[i], cols[i], height, width, false)));
        }
    }
}

template <class T>
void all_layouts(std::int64_t channels, std::int64_t h, std::int64_t w, std::int64_t height, std::int64_t width) {
    Random random(channels * 31 + h * 7 + w);
    std::vector<T> data;
    for (std::int64_t i = 0; i < channels * h * w; ++i) {
        data.push_back(Element<T>::store(static_cast<typename Element<T>::Compute>(random.normal())));
    }
    for (const int threads : {1, 3}) {
        compare<T>({data.data(), channels, h, w, h * w, w, 1}, height, width, threads);
        compare<T>({data.data(), channels, h, w, 1, w * channels, channels}, height, width, threads);
        compare<T>({data.data(), channels, h, w, w, w * channels, 1}, height, width, threads);
        compare<T>({data.data() + channels * h * w - 1, channels, h, w, -h * w, -w, -1}, height, width, threads);
    }
    compare<T>({data.data(), channels, h, w, 0, 0, 0}, height, width, 1);
}

template <class T>
void all_shapes() {
    all_layouts<T>(1, 1, 1, 1, 1);
    all_layouts<T>(3, 2, 5, 7, 11);
    all_layouts<T>(17, 4, 3, 5, 37);
    all_layouts<T>(33, 5, 32, 9, 65);  // a row that just fits two vectors, and one that does not
    all_layouts<T>(67, 3, 33, 2, 71);
    all_layouts<T>(150, 6, 40, 50, 50);  // threads, and more than one block of channels
    all_layouts<T>(2, 9, 9, 4, 3);
}

// Every bfloat16 comes back as it was, and floats round to the nearest, ties to even.
void bfloat16_rounds() {
    using ttt4as::BFloat16;
    std::vector<BFloat16> every;
    for (std::uint32_t bits = 0; bits < 65536; ++bits) every.push_back({static_cast<std::uint16_t>(bits)});
    for (const BFloat16 value : every) {
        const float wide = ttt4as::to_float(value);
        CHECK(std::isnan(wide) ? std::isnan(ttt4as::to_float(ttt4as::to_bfloat16(wide)))
                               : ttt4as::to_bfloat16(wide).bits == value.bits);
    }
    CHECK(ttt4as::to_bfloat16(std::numeric_limits<float>::max()).bits == 0x7F80);  // beyond the greatest
    CHECK(ttt4as::to_bfloat16(1.0f + 0x1p-8f).bits == ttt4as::to_bfloat16(1.0f).bits);
    CHECK(ttt4as::to_bfloat16(1.0f + 0x3p-8f).bits == ttt4as::to_bfloat16(1.0f + 0x1p-6f).bits);
    // The vectors round as the scalar does: means of neighbours are ties.
    std::vector<BFloat16> means(every.size() - 1);
    for (std::size_t i = 0; i + 1 < every.size(); ++i) {
        ttt4as::bilinear_upsample<BFloat16>({&every[i], 1, 1, 2, 2, 2, 1}, 1, 1, &means[i]);
    }
    std::vector<BFloat16> pairs(2 * means.size()), together(means.size());
    for (std::size_t i = 0; i < means.size(); ++i) {
        pairs[2 * i] = every[i];
        pairs[2 * i + 1] = every[i + 1];
    }
    const auto count = static_cast<std::int64_t>(means.size());
    ttt4as::bilinear_upsample_last<BFloat16>({pairs.data(), count, 1, 2, 2, 2, 1}, 1, 1, together.data(), 2);
    for (std::size_t i = 0; i < means.size(); ++i) {
        const float a = ttt4as::to_float(every[i]), b = ttt4as::to_float(every[i + 1]);
        if (std::isfinite(a) && std::isfinite(b)) {
            const BFloat16 expected = ttt4as::to_bfloat16(a * 0.5f + b * 0.5f);
            CHECK(means[i].bits == expected.bits && together[i].bits == expected.bits);
        } else {  // infinity times a weight of 0
            CHECK(std::isnan(ttt4as::to_float(means[i])) && std::isnan(ttt4as::to_float(together[i])));
        }
    }
}

}  // namespace

int main() {
    all_shapes<float>();
    all_shapes<double>();
    all_shapes<ttt4as::Half>();
    all_shapes<ttt4as::BFloat16>();
    bfloat16_rounds();
    return 0;
}
