// The rules and their reasons are in kernels/segment_robust/labels.py, whose constants these are. Operations are in its
// order and, as there, never fused: a pixel may lie on the level.
#include "robust_labels.hpp"

#include <algorithm>
#include <cmath>

#include "point_matrix.hpp"

namespace ttt4as {
namespace {

constexpr int kBins = 24, kSmoothing = 8;
constexpr double kLowest = 0.2, kSteepest = 0.75;  // heights
constexpr double kTied = 1e-12;
constexpr std::int64_t kEnough = 8, kHard = 8;
constexpr double kWide = 0.75, kSize = 8, kLeastFactor = 0.7, kMostFactor = 1.3, kHighest = 0.93, kPlace = 0.25;
constexpr std::uint32_t kRowStep = 3242174889u, kColStep = 2447445414u;

std::int64_t lattice_size(std::int64_t n, std::int64_t step) { return (n - step / 2 + step - 1) / step; }

double scaled(double height, double factor) { return std::min(height * factor, std::max(height, kHighest)); }

// Sums over a binomial kernel of kSmoothing bins to each side.
void smooth(const double* histogram, double* out) {
    double kernel[2 * kSmoothing + 1] = {1};
    for (int k = 1; k <= 2 * kSmoothing; ++k) kernel[k] = kernel[k - 1] * (2 * kSmoothing + 1 - k) / k;
    for (int b = 0; b < kBins; ++b) {
        out[b] = 0;
        for (int k = -kSmoothing; k <= kSmoothing; ++k) {
            if (b - k >= 0 && b - k < kBins) {
                out[b] += std::ldexp(kernel[k + kSmoothing], -2 * kSmoothing) * histogram[b - k];
            }
        }
    }
}

}  // namespace

template <class T>
bool RobustLabels<T>::find(const T* map, std::int64_t height, std::int64_t width, std::int64_t h, std::int64_t w,
                           double least, double greatest, const RobustOptions& options) {
    map_ = map;
    // Squares of float64 scores may leave its range, and so may their range itself: those of floats do not.
    unit = sizeof(T) == 8 ? normaliser(std::max(std::abs(least), std::abs(greatest))) : 1.0;
    least *= unit;
    greatest *= unit;
    height_ = height;
    width_ = width;
    cells_ = h * w;
    peak = greatest;
    n = n_anomalous = 0;
    if (!(least < greatest)) return false;
    const double cell = std::min(static_cast<double>(height) / static_cast<double>(h),
                                 static_cast<double>(width) / static_cast<double>(w));
    const auto spacing = std::max<std::int64_t>(1, static_cast<std::int64_t>(std::nearbyint(cell / 2)));
    find_level(std::max<std::int64_t>(1, spacing / 2), least, options);
    if (!(level < peak && std::isfinite(1 / (peak - level)))) return false;
    const auto most = static_cast<std::size_t>(std::min(options.n_core, height * width) +
                                               std::min(options.n_background, height * width));
    pixels.resize(most);
    weights.resize(most);
    sides.resize(most);
    anomalous(spacing, options);
    n_anomalous = n;
    nominal(spacing, options);
    return true;
}

template <class T>
void RobustLabels<T>::find_level(std::int64_t step, double least, const RobustOptions& options) {
    const std::int64_t rows = lattice_size(height_, step), cols = lattice_size(width_, step);
    values_.resize(static_cast<std::size_t>(rows * cols));
    for (std::int64_t r = 0; r < rows; ++r) {
        const T* from = map_ + (step / 2 + r * step) * width_ + step / 2;
        for (std::int64_t c = 0; c < cols; ++c) values_[r * cols + c] = from[c * step] * static_cast<T>(unit);
    }
    double base = map_quantile(values_.data(), rows * cols, options.base_quantile, scratch_);
    if (base >= peak) base = least;
    const double per = 1 / (peak - base);
    if (!std::isfinite(per)) {  // their distance is too small to divide by
        level = peak;
        return;
    }
    const double height = options.height ? *options.height : steepest(step, base);
    std::int64_t wide = 0;
    for (const T value : values_) wide += (static_cast<double>(value) - base) * per > kWide;
    const double covered = static_cast<double>(wide) / static_cast<double>(rows * cols) * static_cast<double>(cells_);
    double factor = std::pow(kSize / std::max(covered, 0.5), options.size_exponent);
    factor = std::min(std::max(factor, kLeastFactor), kMostFactor);
    const double nominal = options.nominal_level.value_or(0) * unit;
    const bool usual_map = options.nominal_level && nominal >= peak;
    if (usual_map) factor = std::max(factor, 1.0);
    level = base + scaled(height, factor) * (peak - base);
    if (!options.nominal_level || usual_map) return;
    const double usual = std::max(nominal, base);
    const double theirs = usual + scaled(options.nominal_share, factor) * (peak - usual);
    level = (1 - options.nominal_weight) * level + options.nominal_weight * theirs;
}

template <class T>
double RobustLabels<T>::steepest(std::int64_t step, double base) {
    const std::int64_t rows = lattice_size(height_, step), cols = lattice_size(width_, step);
    double counts[kBins] = {}, totals[kBins] = {}, count[kBins], total[kBins];
    const double per = 1 / (peak - base);
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t y = step / 2 + r * step;
        const std::int64_t above = std::max<std::int64_t>(y - 1, 0), below = std::min(y + 1, height_ - 1);
        const double run_y = static_cast<double>(std::max<std::int64_t>(below - above, 1));
        for (std::int64_t c = 0; c < cols; ++c) {
            const double height = (static_cast<double>(values_[r * cols + c]) - base) * per;
            if (!(height >= 0)) continue;
            const std::int64_t x = step / 2 + c * step;
            const std::int64_t left = std::max<std::int64_t>(x - 1, 0), right = std::min(x + 1, width_ - 1);
            const double run_x = static_cast<double>(std::max<std::int64_t>(right - left, 1));
            const auto at = [&](std::int64_t i, std::int64_t j) {
                return static_cast<double>(map_[i * width_ + j]) * unit;
            };
            const double dy = (at(below, x) - at(above, x)) / run_y, dx = (at(y, right) - at(y, left)) / run_x;
            const int bin = std::min(static_cast<int>(height * kBins), kBins - 1);
            counts[bin] += 1;
            totals[bin] += std::sqrt(dy * dy + dx * dx);
        }
    }
    smooth(counts, count);
    smooth(totals, total);
    double mean[kBins], most = -1;
    for (int b = 0; b < kBins; ++b) {
        const double centre = (b + 0.5) / kBins;
        mean[b] = centre >= kLowest && centre <= kSteepest && count[b] > 0 ? total[b] / count[b] : -1;
        most = std::max(most, mean[b]);
    }
    int best = 0;
    while (most >= 0 && mean[best] < most * (1 - kTied)) ++best;
    return (best + 0.5) / kBins;
}

// The lattice places whose score `take` accepts, in raster order, in places_; returns how many.
template <class T>
template <class Take>
std::int64_t RobustLabels<T>::collect(std::int64_t step, Take&& take) {
    const std::int64_t rows = lattice_size(height_, step), cols = lattice_size(width_, step);
    places_.resize(static_cast<std::size_t>(rows * cols));
    std::int64_t count = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
        const T* from = map_ + (step / 2 + r * step) * width_ + step / 2;
        for (std::int64_t c = 0; c < cols; ++c) {
            const T score = from[c * step] * static_cast<T>(unit);
            places_[count] = {static_cast<std::int32_t>(r), static_cast<std::int32_t>(c), score};
            count += take(static_cast<double>(score));
        }
    }
    return count;
}

// At most `limit` of the places as samples, evenly spread over the plane, in their order; returns how many.
template <class T>
std::int64_t RobustLabels<T>::take(const Place* places, std::int64_t count, std::int64_t limit, std::int64_t step,
                                   double weight, std::int8_t side) {
    const std::int64_t kept = std::min(count, limit);
    keys_.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
        const auto key =
            static_cast<std::uint32_t>(places[i].row) * kRowStep + static_cast<std::uint32_t>(places[i].col) * kColStep;
        keys_[i] = static_cast<std::uint64_t>(key) << 32 | static_cast<std::uint64_t>(i);
    }
    if (kept < count) {
        std::nth_element(keys_.begin(), keys_.begin() + kept, keys_.end());
        const auto index = [](std::uint64_t key) { return static_cast<std::uint32_t>(key); };
        std::sort(keys_.begin(), keys_.begin() + kept,
                  [&](std::uint64_t a, std::uint64_t b) { return index(a) < index(b); });
    }
    for (std::int64_t k = 0; k < kept; ++k, ++n) {
        const Place& place = places[keys_[k] & 0xffffffffu];
        pixels[n] = {static_cast<std::int32_t>(place.row * step + step / 2),
                     static_cast<std::int32_t>(place.col * step + step / 2)};
        weights[n] = weight;
        sides[n] = side;
    }
    return kept;
}

template <class T>
void RobustLabels<T>::anomalous(std::int64_t spacing, const RobustOptions& options) {
    const double core = level + options.core * (peak - level);
    const auto in_core = [&](double score) { return score > core || score == peak; };
    std::int64_t step = spacing, count = collect(step, in_core);
    while (count < kEnough && step > 1) {
        step /= 2;
        count = collect(step, in_core);
    }
    const double stands_for = std::min(kPlace * static_cast<double>(count), options.core_weight);
    const std::int64_t kept = std::min(count, options.n_core);
    take(places_.data(), count, kept, step, stands_for / static_cast<double>(kept), 1);
}

template <class T>
void RobustLabels<T>::nominal(std::int64_t spacing, const RobustOptions& options) {
    const auto below = [&](double score) { return score <= level; };
    std::int64_t step = spacing, count = collect(step, below);
    if (!count) count = collect(step = 1, below);
    const std::int64_t limit = std::min(options.n_background, height_ * width_);
    auto n_hard = static_cast<std::int64_t>(options.hard_share * static_cast<double>(limit));
    const std::int64_t n_top = count / kHard;
    std::int64_t hard = 0;
    if (count > limit && n_hard && n_top) {
        values_.resize(static_cast<std::size_t>(count));
        for (std::int64_t i = 0; i < count; ++i) values_[i] = places_[i].score;
        std::nth_element(values_.begin(), values_.begin() + (count - n_top), values_.end());
        const T least = values_[count - n_top];
        hard_.resize(static_cast<std::size_t>(count));
        std::int64_t others = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            if (places_[i].score >= least) {
                hard_[hard++] = places_[i];
            } else {
                places_[others++] = places_[i];
            }
        }
        n_hard = std::min(hard, std::max(n_hard, limit - (count - hard)));
    } else {
        n_hard = 0;
    }
    const std::int64_t n_rest = std::min(count - hard, limit - n_hard);
    const std::int64_t stood_for = (n_hard ? hard : 0) + (n_rest ? count - hard : 0);
    const double share = std::min(kPlace * static_cast<double>(count), options.background_weight);
    const auto each = [&](std::int64_t part, std::int64_t kept) {
        return share * static_cast<double>(part) / static_cast<double>(stood_for * std::max<std::int64_t>(kept, 1));
    };
    take(hard_.data(), hard, n_hard, step, each(hard, n_hard), -1);
    take(places_.data(), count - hard, n_rest, step, each(count - hard, n_rest), -1);
}

template class RobustLabels<float>;
template class RobustLabels<double>;

}  // namespace ttt4as
