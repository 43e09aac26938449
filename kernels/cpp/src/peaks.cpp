// Percentile by selection, peaks and dilation. See ttt4as/peaks.hpp; the loops over the map are in simd/peaks.inl.
#include "ttt4as/peaks.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "by_isa.hpp"
#include "peaks_kernels.hpp"

namespace ttt4as {
namespace {

const PeakTable& table() noexcept { return TTT4AS_BY_ISA(peak_table); }
template <class T>
const PeakKernels<T>& kernels() noexcept {
    if constexpr (std::is_same_v<T, float>) {
        return table().f;
    } else {
        return table().d;
    }
}

constexpr std::int64_t kSample = 1024;

template <class T>
struct OrderStatistics {
    T at, next;  // the values of rank k and k + 1 (k where there is no further one)
};

// Ranks k and k + 1 of values that may be reordered.
template <class T>
OrderStatistics<T> select_in_place(T* values, std::int64_t n, std::int64_t k) {
    std::nth_element(values, values + k, values + n);
    const T at = values[k];
    return {at, k + 1 < n ? *std::min_element(values + k + 1, values + n) : at};
}

// Ranks k and k + 1 without memory: 11 bits of the rank-k key are found per pass, keys being ordered as the values are.
template <class T>
OrderStatistics<T> select_by_radix(const T* x, std::int64_t n, std::int64_t k) {
    using Word = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    constexpr int kBits = 11, kWidth = sizeof(Word) * 8;
    constexpr Word kSign = Word(1) << (kWidth - 1);
    const auto key = [](T value) {
        value += T(0);  // -0 equals 0
        Word word;
        std::memcpy(&word, &value, sizeof word);
        return word & kSign ? static_cast<Word>(~word) : static_cast<Word>(word | kSign);
    };
    Word prefix = 0, known = 0;
    std::int64_t rank = k, equal = n;
    for (int shift = kWidth; shift > 0;) {
        const int take = shift < kBits ? shift : kBits;
        shift -= take;
        std::int64_t counts[1 << kBits] = {};
        for (std::int64_t i = 0; i < n; ++i) {
            const Word word = key(x[i]);
            if ((word & known) == prefix) ++counts[(word >> shift) & ((Word(1) << take) - 1)];
        }
        Word bucket = 0;
        while (rank >= counts[bucket]) rank -= counts[bucket++];
        equal = counts[bucket];
        prefix |= bucket << shift;
        known |= ((Word(1) << take) - 1) << shift;
    }
    Word word = prefix & kSign ? static_cast<Word>(prefix & ~kSign) : static_cast<Word>(~prefix);
    T at;
    std::memcpy(&at, &word, sizeof at);
    if (rank + 1 < equal || k + 1 == n) return {at, at};
    T next = std::numeric_limits<T>::infinity();
    for (std::int64_t i = 0; i < n; ++i) next = x[i] > at && x[i] < next ? x[i] : next;
    return {at, next};
}

template <class T>
OrderStatistics<T> order_statistics(const T* x, std::int64_t n, std::int64_t k, PeakScratch<T>& scratch) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    if (n <= 4 * kSample) {
        scratch.values.resize(static_cast<std::size_t>(n));
        std::copy(x, x + n, scratch.values.data());
        return select_in_place(scratch.values.data(), n, k);
    }
    // One value from each of kSample equal stretches, at a place that wanders, brackets the rank: the band is four
    // standard deviations of a sample's rank to either side.
    T sample[kSample];
    std::uint32_t wander = 12345;
    for (std::int64_t i = 0; i < kSample; ++i) {
        const std::int64_t begin = i * n / kSample, end = (i + 1) * n / kSample;
        wander = wander * 1664525u + 1013904223u;
        sample[i] = x[begin + static_cast<std::int64_t>((wander >> 8) % static_cast<std::uint32_t>(end - begin))];
    }
    const double share = static_cast<double>(k) / static_cast<double>(n);
    const double reach = 4 * std::sqrt(share * (1 - share) / kSample) + 2.0 / kSample;
    const auto first = static_cast<std::int64_t>(std::floor((share - reach) * kSample));
    const auto last = static_cast<std::int64_t>(std::ceil((share + reach) * kSample));
    T low = -kInfinity, high = kInfinity;
    if (first >= 0) {
        std::nth_element(sample, sample + first, sample + kSample);
        low = sample[first];
    }
    if (last < kSample) {
        std::nth_element(sample + std::max<std::int64_t>(0, first), sample + last, sample + kSample);
        high = sample[last];
    }
    const std::int64_t capacity = n / 8 + 8 * kSample;
    scratch.values.resize(static_cast<std::size_t>(capacity));
    std::int64_t in_band = 0;
    const std::int64_t below = kernels<T>().collect(x, n, low, high, scratch.values.data(), capacity, &in_band);
    const std::int64_t needed = k + 1 < n ? k + 1 : k;
    if (in_band > capacity || below > k || below + in_band <= needed) return select_by_radix(x, n, k);
    return select_in_place(scratch.values.data(), in_band, k - below);
}

// The least T that is >= tau as doubles compare.
template <class T>
T round_up(double tau) {
    T value = static_cast<T>(tau);
    if (static_cast<double>(value) < tau) value = std::nextafter(value, std::numeric_limits<T>::infinity());
    return value;
}

template <class Run>
void paint(std::uint8_t* labels, std::int64_t height, std::int64_t width, std::int64_t radius, const Run* runs,
           std::int64_t n_runs) {
    for (std::int64_t i = 0; i < n_runs; ++i) {
        const std::int64_t top = std::max<std::int64_t>(0, runs[i].row - radius);
        const std::int64_t bottom = std::min(height - 1, runs[i].row + radius);
        for (std::int64_t y = top; y <= bottom; ++y) {
            std::memset(labels + y * width + runs[i].begin, 1, static_cast<std::size_t>(runs[i].end - runs[i].begin));
        }
    }
}

// Collects what dilation paints: runs of columns, grown already, per row. Switches to the dense way when there are so
// many that painting each of them 2 * radius + 1 times would cost more.
template <class T>
class Dilation {
  public:
    Dilation(std::int64_t height, std::int64_t width, std::int64_t radius, std::uint8_t* labels,
             PeakScratch<T>& scratch)
        : height_(height), width_(width), radius_(std::min(radius, std::max(height, width))), labels_(labels) {
        scratch.runs.resize(kMostRuns);
        runs_ = scratch.runs.data();
        scratch.columns.resize(static_cast<std::size_t>(2 * width));
        reach_ = scratch.columns.data() + width;
        std::memset(labels, 0, static_cast<std::size_t>(height * width));
    }

    // Columns [begin, end) of `row` are set; rows come in order, and columns within a row.
    void add(std::int64_t row, std::int64_t begin, std::int64_t end) {
        begin = std::max<std::int64_t>(0, begin - radius_);
        end = std::min(width_, end + radius_);
        if (dense_) {
            std::memset(labels_ + row * width_ + begin, 1, static_cast<std::size_t>(end - begin));
            return;
        }
        if (n_runs_ && runs_[n_runs_ - 1].row == row && runs_[n_runs_ - 1].end >= begin) {
            runs_[n_runs_ - 1].end = static_cast<std::int32_t>(end);
            return;
        }
        if (n_runs_ == kMostRuns || n_runs_ * (2 * radius_ + 1) > height_ * width_ / 16) {
            dense_ = true;
            for (std::int64_t i = 0; i < n_runs_; ++i) {
                std::memset(labels_ + runs_[i].row * width_ + runs_[i].begin, 1,
                            static_cast<std::size_t>(runs_[i].end - runs_[i].begin));
            }
            std::memset(labels_ + row * width_ + begin, 1, static_cast<std::size_t>(end - begin));
            return;
        }
        runs_[n_runs_++] = {static_cast<std::int32_t>(row), static_cast<std::int32_t>(begin),
                            static_cast<std::int32_t>(end)};
    }

    void finish() {
        if (!dense_) return paint(labels_, height_, width_, radius_, runs_, n_runs_);
        spread(0, 1);
        spread(height_ - 1, -1);
    }

  private:
    static constexpr std::size_t kMostRuns = 4096;

    // Rows in one direction: a pixel at most `radius_` rows after a set one is set. What the first sweep has set is
    // within reach of an original pixel that the second sweep meets later, so that it reaches no farther.
    void spread(std::int64_t first, std::int64_t step) {
        std::fill(reach_, reach_ + width_, 0);
        const std::int32_t radius = static_cast<std::int32_t>(radius_);
        for (std::int64_t i = 0; i < height_; ++i) {
            std::uint8_t* row = labels_ + (first + i * step) * width_;
            std::int32_t* reach = reach_;
            for (std::int64_t x = 0; x < width_; ++x) {
                const std::int32_t covered = reach[x] > 0;
                reach[x] = row[x] ? radius : reach[x] - covered;
                row[x] = row[x] || covered;
            }
        }
    }

    std::int64_t height_, width_, radius_;
    std::uint8_t* labels_;
    typename PeakScratch<T>::Run* runs_;
    std::int32_t* reach_;
    std::int64_t n_runs_ = 0;
    bool dense_ = false;
};

// Calls found(row, columns, count) for every row that has peaks.
template <class T, class Found>
void for_each_peak_row(const T* map, std::int64_t height, std::int64_t width, double tau, std::int32_t* columns,
                       Found&& found) {
    const T least = round_up<T>(tau);
    for (std::int64_t y = 0; y < height; ++y) {
        const T* row = map + y * width;
        const std::int64_t count = kernels<T>().peaks(y > 0 ? row - width : nullptr, row,
                                                      y + 1 < height ? row + width : nullptr, width, least, columns);
        if (count) found(y, columns, count);
    }
}

}  // namespace

template <class T>
MapRange<T> map_range(const T* map, std::int64_t n) noexcept {
    MapRange<T> range;
    T magnitude;
    kernels<T>().range(map, n, &range.least, &range.greatest, &magnitude);
    range.finite = std::isfinite(magnitude);
    return range;
}

template <class T>
double map_percentile(const T* map, std::int64_t n, double percentile, PeakScratch<T>& scratch) {
    return map_quantile(map, n, percentile / 100, scratch);
}

template <class T>
double map_quantile(const T* map, std::int64_t n, double quantile, PeakScratch<T>& scratch) {
    const double place = static_cast<double>(n - 1) * quantile;
    const std::int64_t k = std::min(static_cast<std::int64_t>(std::floor(place)), n - 1);
    const OrderStatistics<T> found = order_statistics(map, n, k, scratch);
    const double a = static_cast<double>(found.at), b = static_cast<double>(found.next);
    const double t = place - static_cast<double>(k);
    // The order of operations is NumPy's, and this file is compiled without fused multiply-adds: the last bit matters,
    // because a pixel can equal tau.
    return t >= 0.5 ? b - (b - a) * (1 - t) : a + (b - a) * t;
}

template <class T>
void mark_peaks(const T* map, std::int64_t height, std::int64_t width, double tau, std::uint8_t* peaks,
                PeakScratch<T>& scratch) {
    scratch.columns.resize(static_cast<std::size_t>(2 * width));
    std::memset(peaks, 0, static_cast<std::size_t>(height * width));
    for_each_peak_row(map, height, width, tau, scratch.columns.data(),
                      [&](std::int64_t y, const std::int32_t* columns, std::int64_t count) {
                          for (std::int64_t i = 0; i < count; ++i) peaks[y * width + columns[i]] = 1;
                      });
}

template <class T>
std::int64_t mark_dilated_peaks(const T* map, std::int64_t height, std::int64_t width, double tau, std::int64_t radius,
                                std::uint8_t* labels, PeakScratch<T>& scratch) {
    Dilation<T> dilation(height, width, radius, labels, scratch);
    for_each_peak_row(map, height, width, tau, scratch.columns.data(),
                      [&](std::int64_t y, const std::int32_t* columns, std::int64_t count) {
                          for (std::int64_t i = 0; i < count; ++i) dilation.add(y, columns[i], columns[i] + 1);
                      });
    dilation.finish();
    return std::count(labels, labels + height * width, std::uint8_t{1});
}

template <class T>
void dilate(const std::uint8_t* mask, std::int64_t height, std::int64_t width, std::int64_t radius, std::uint8_t* out,
            PeakScratch<T>& scratch) {
    Dilation<T> dilation(height, width, radius, out, scratch);
    for (std::int64_t y = 0; y < height; ++y) {
        const std::uint8_t* row = mask + y * width;
        for (std::int64_t x = 0; x < width;) {
            if (x + 8 <= width) {
                std::uint64_t eight;
                std::memcpy(&eight, row + x, sizeof eight);
                if (!eight) {
                    x += 8;
                    continue;
                }
            }
            if (!row[x]) {
                ++x;
                continue;
            }
            const std::int64_t begin = x;
            while (x < width && row[x]) ++x;
            dilation.add(y, begin, x);
        }
    }
    dilation.finish();
}

template MapRange<float> map_range(const float*, std::int64_t) noexcept;
template MapRange<double> map_range(const double*, std::int64_t) noexcept;
template double map_percentile(const float*, std::int64_t, double, PeakScratch<float>&);
template double map_percentile(const double*, std::int64_t, double, PeakScratch<double>&);
template double map_quantile(const float*, std::int64_t, double, PeakScratch<float>&);
template double map_quantile(const double*, std::int64_t, double, PeakScratch<double>&);
template void mark_peaks(const float*, std::int64_t, std::int64_t, double, std::uint8_t*, PeakScratch<float>&);
template void mark_peaks(const double*, std::int64_t, std::int64_t, double, std::uint8_t*, PeakScratch<double>&);
template std::int64_t mark_dilated_peaks(const float*, std::int64_t, std::int64_t, double, std::int64_t, std::uint8_t*,
                                         PeakScratch<float>&);
template std::int64_t mark_dilated_peaks(const double*, std::int64_t, std::int64_t, double, std::int64_t, std::uint8_t*,
                                         PeakScratch<double>&);
template void dilate(const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t, std::uint8_t*, PeakScratch<float>&);
template void dilate(const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t, std::uint8_t*,
                     PeakScratch<double>&);

}  // namespace ttt4as
