// Percentile, peaks and dilation against their plain statements.
#include <algorithm>

#include "check.hpp"
#include "ttt4as/peaks.hpp"

namespace {

double plain_percentile(std::vector<double> values, double percentile) {
    std::sort(values.begin(), values.end());
    const double place = static_cast<double>(values.size() - 1) * (percentile / 100);
    const auto k = static_cast<std::size_t>(place);
    const double a = values[k], b = values[std::min(k + 1, values.size() - 1)], t = place - static_cast<double>(k);
    return t >= 0.5 ? b - (b - a) * (1 - t) : a + (b - a) * t;
}

template <class T>
void compare(const std::vector<T>& map, std::int64_t height, std::int64_t width, double percentile,
             std::int64_t radius) {
    ttt4as::PeakScratch<T> scratch;
    const double tau = ttt4as::map_percentile(map.data(), height * width, percentile, scratch);
    CHECK(tau == plain_percentile({map.begin(), map.end()}, percentile));
    std::vector<std::uint8_t> peaks(map.size(), 9), grown(map.size(), 9), labels(map.size(), 9);
    ttt4as::mark_peaks(map.data(), height, width, tau, peaks.data(), scratch);
    ttt4as::dilate(peaks.data(), height, width, radius, grown.data(), scratch);
    const std::int64_t count =
        ttt4as::mark_dilated_peaks(map.data(), height, width, tau, radius, labels.data(), scratch);
    CHECK(count == std::count(labels.begin(), labels.end(), 1));
    CHECK(labels == grown);
    for (std::int64_t y = 0; y < height; ++y) {
        for (std::int64_t x = 0; x < width; ++x) {
            bool peak = static_cast<double>(map[y * width + x]) >= tau, near = false;
            for (std::int64_t v = std::max<std::int64_t>(0, y - 1); v <= std::min(height - 1, y + 1); ++v) {
                for (std::int64_t u = std::max<std::int64_t>(0, x - 1); u <= std::min(width - 1, x + 1); ++u) {
                    peak = peak && map[v * width + u] <= map[y * width + x];
                }
            }
            for (std::int64_t v = std::max<std::int64_t>(0, y - radius); v <= std::min(height - 1, y + radius); ++v) {
                for (std::int64_t u = std::max<std::int64_t>(0, x - radius); u <= std::min(width - 1, x + radius);
                     ++u) {
                    near = near || peaks[v * width + u];
                }
            }
            CHECK(peaks[y * width + x] == peak);
            CHECK(grown[y * width + x] == near);
        }
    }
}

template <class T>
void all_kinds() {
    Random random(7);
    const std::int64_t sizes[][2] = {{1, 1}, {1, 9}, {9, 1}, {17, 35}, {40, 33}, {90, 71}};
    for (const auto& size : sizes) {
        for (int kind = 0; kind < 4; ++kind) {
            std::vector<T> map(static_cast<std::size_t>(size[0] * size[1]));
            for (T& value : map) {
                value = kind == 0   ? static_cast<T>(random.normal())
                        : kind == 1 ? static_cast<T>(random.below(3))
                        : kind == 2 ? T(1)
                                    : static_cast<T>(random.uniform() < 0.98 ? 0.0 : random.uniform() * 1e30);
            }
            for (double percentile : {0.0, 50.0, 99.0, 100.0}) {
                for (std::int64_t radius : {0, 1, 5, 200}) compare(map, size[0], size[1], percentile, radius % 120);
            }
        }
    }
}

// The memory that peaks.hpp states.
template <class T>
void scratch_is_bounded(std::size_t most) {
    Random random(8);
    for (const std::int64_t side : {9, 64, 100, 300}) {
        std::vector<T> map(static_cast<std::size_t>(side * side));
        for (T& value : map) value = random.normal();
        std::vector<std::uint8_t> labels(map.size());
        ttt4as::PeakScratch<T> scratch;
        const double tau = ttt4as::map_percentile(map.data(), side * side, 99.0, scratch);
        ttt4as::mark_dilated_peaks(map.data(), side, side, tau, 5, labels.data(), scratch);
        const std::size_t held = scratch.values.bytes() + scratch.columns.bytes() + scratch.runs.bytes();
        CHECK(held <= map.size() * sizeof(T) / 8 + 8 * static_cast<std::size_t>(side) + most);
    }
}

}  // namespace

int main() {
    scratch_is_bounded<float>(82000);
    scratch_is_bounded<double>(115000);
    all_kinds<float>();
    all_kinds<double>();
    return 0;
}
