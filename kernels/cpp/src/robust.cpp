// The robust preset, fused. The features are read twice: once to standardise them and mix the samples, sixteen channels
// at a time while they are in the cache, and once for the decision, on their own grid. Whether they are finite is found
// on the way.
#include "ttt4as/robust.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "options.hpp"
#include "robust_labels.hpp"
#include "segment_parts.hpp"
#include "svm_solver.hpp"
#include "upsample.hpp"

namespace ttt4as {
namespace {

// A channel whose deviation is below this share of its root mean square is constant; so are classes whose means are as
// near, in margins.
constexpr double kConstant = 1e-5;
constexpr std::int64_t kChannels = 16;     // a cache line of floats
constexpr std::int64_t kSerial = 1 << 16;  // feature values below which one thread does it
// Recentring stretches what the gap leaves open: the SVM is solved to this share of `tol`, where that is possible.
constexpr double kAim = 1e-4;
constexpr std::int64_t kMostSolver = std::int64_t(1) << 20;  // bytes of the SVM's working set beside its vectors

}  // namespace

template <class T>
struct BasicRobustSegmenter<T>::State {
    // A sample as a mixture of four of the grid's points, by their place among those touched.
    struct Mixture {
        std::int32_t at[4];
        T share[4];
    };

    RobustOptions options;
    RobustLabels<T> labels;
    SvmSolver<T, PointSamples<T>> solver;
    MapTaps taps;
    Buffer<std::int32_t> touched, place;
    Buffer<Mixture> mixtures;
    Buffer<T> staged, samples;
    Buffer<double> centre, scale, down, weights, cells;
    Buffer<float> lines;

    SegmentResult run(const SegmentInput<T>& in, const SegmentOutput& out);
    void mix(std::int64_t n_points);
    bool gather(const PointMatrix<T>& features);
    bool standard(const PointMatrix<T>& features, std::int64_t channel);
    SvmResult train();
    double mean(std::int64_t begin, std::int64_t end) const;
};

// How each sample is mixed, and of which points of the grid.
template <class T>
void BasicRobustSegmenter<T>::State::mix(std::int64_t n_points) {
    place.resize(static_cast<std::size_t>(n_points));
    std::fill(place.begin(), place.end(), std::int32_t{-1});
    touched.resize(static_cast<std::size_t>(std::min(n_points, 4 * labels.n)));
    mixtures.resize(static_cast<std::size_t>(labels.n));
    std::int32_t count = 0;
    for (std::int64_t i = 0; i < labels.n; ++i) {
        const GridTap& y = taps.rows[labels.pixels[i].row];
        const GridTap& x = taps.cols[labels.pixels[i].col];
        const std::int32_t corners[4] = {y.lower + x.lower, y.lower + x.upper, y.upper + x.lower, y.upper + x.upper};
        const double shares[4] = {(1 - y.weight) * (1 - x.weight), (1 - y.weight) * x.weight, y.weight * (1 - x.weight),
                                  y.weight * x.weight};
        for (int k = 0; k < 4; ++k) {
            if (place[corners[k]] < 0) {
                touched[count] = corners[k];
                place[corners[k]] = count++;
            }
            mixtures[i].at[k] = place[corners[k]];
            mixtures[i].share[k] = static_cast<T>(shares[k]);
        }
    }
    touched.resize(static_cast<std::size_t>(count));
}

// Centre and scale of a channel; false if a value is not finite. `down` scales what has squares beyond double's range.
template <class T>
bool BasicRobustSegmenter<T>::State::standard(const PointMatrix<T>& features, std::int64_t channel) {
    const std::int64_t n = features.points;
    const T* first = features.data + (features.channels_first ? channel * features.stride : channel);
    const double shift = static_cast<double>(*first);
    double sum = 0, square = 0;
    if (features.channels_first) {
        moments_kernel<T>()(first, n, shift, &sum, &square);
    } else {
        for (std::int64_t p = 0; p < n; ++p) {
            const double d = static_cast<double>(first[p * features.stride]) - shift;
            sum += d;
            square += d * d;
        }
    }
    double shrink = 1;
    constexpr double kTiny = 1e-200;  // squares of floats stay above it
    if (!std::isfinite(square) || (sizeof(T) == 8 && square < kTiny)) {
        const std::int64_t step = features.channels_first ? 1 : features.stride;
        double most = 0;
        for (std::int64_t p = 0; p < n; ++p) {
            if (!std::isfinite(first[p * step])) return false;
            most = std::max(most, std::abs(static_cast<double>(first[p * step])));
        }
        shrink = normaliser(most);
        sum = square = 0;
        for (std::int64_t p = 0; p < n; ++p) {
            const double d = static_cast<double>(first[p * step]) * shrink - shift * shrink;
            sum += d;
            square += d * d;
        }
    }
    const double count = static_cast<double>(n), moved = sum / count;
    centre[channel] = shift * shrink + moved;
    down[channel] = shrink;
    const double variance = std::max(square / count - moved * moved, 0.0);
    const double spread = std::sqrt(variance), size = std::sqrt(variance + centre[channel] * centre[channel]);
    scale[channel] = 1 / (spread > kConstant * size ? spread : size > 0 ? size : 1);  // a constant one by its size
    if (!options.standardize) centre[channel] = 0, scale[channel] = down[channel] = 1;
    return true;
}

// The samples' features, standardised, a row each; false if the features are not finite.
template <class T>
bool BasicRobustSegmenter<T>::State::gather(const PointMatrix<T>& features) {
    const std::int64_t stride = spaced(features.dims), tasks = (features.dims + kChannels - 1) / kChannels;
    const std::int64_t move = features.channels_first ? features.stride : 1;
    const std::int64_t step = features.channels_first ? 1 : features.stride;
    const auto n_touched = static_cast<std::int64_t>(touched.size());
    const int threads = features.points * features.dims < kSerial
                            ? 1
                            : static_cast<int>(std::min<std::int64_t>(tasks, features.threads));
    samples.resize(static_cast<std::size_t>(labels.n * stride));
    staged.resize(static_cast<std::size_t>(threads * n_touched * kChannels));
    for (Buffer<double>* buffer : {&centre, &scale, &down}) buffer->resize(static_cast<std::size_t>(features.dims));
    std::atomic<bool> finite{true};
    parallel_for(tasks, threads, [&](std::int64_t task, int worker) {
        const std::int64_t begin = task * kChannels, count = std::min(kChannels, features.dims - begin);
        T* stage = staged.data() + worker * n_touched * kChannels;
        if (count < kChannels) std::fill(stage, stage + n_touched * kChannels, T(0));
        for (std::int64_t j = 0; j < count; ++j) {
            const std::int64_t c = begin + j;
            if (!standard(features, c)) {
                finite.store(false, std::memory_order_relaxed);
                return;
            }
            const T* from = features.data + c * move;
            const double shrink = down[c], middle = centre[c], factor = scale[c];
            for (std::int64_t k = 0; k < n_touched; ++k) {
                const double value = static_cast<double>(from[touched[k] * step]);
                stage[k * kChannels + j] = static_cast<T>((value * shrink - middle) * factor);
            }
        }
        for (std::int64_t i = 0; i < labels.n; ++i) {
            const Mixture& m = mixtures[i];
            const T* a = stage + m.at[0] * kChannels;
            const T* b = stage + m.at[1] * kChannels;
            const T* c = stage + m.at[2] * kChannels;
            const T* d = stage + m.at[3] * kChannels;
            T* out = samples.data() + i * stride + begin;
            for (std::int64_t j = 0; j < kChannels; ++j) {
                out[j] = m.share[0] * a[j] + m.share[1] * b[j] + m.share[2] * c[j] + m.share[3] * d[j];
            }
        }
    });
    return finite;
}

template <class T>
SvmResult BasicRobustSegmenter<T>::State::train() {
    solver.points.data = samples.data();
    solver.points.channels_first = false;
    solver.points.stride = spaced(solver.points.dims);
    solver.points.points = solver.samples.n = labels.n;
    solver.labels = labels.sides.data();
    solver.sample_weight = labels.weights.data();
    T magnitude = 0;
    for (std::int64_t i = 0; i < labels.n; ++i) {
        magnitude =
            std::max(magnitude, max_abs_kernel<T>()(samples.data() + i * solver.points.stride, solver.points.dims));
    }
    solver.magnitude = static_cast<double>(magnitude);
    solver.most_bytes = kMostSolver + labels.n * solver.points.stride * static_cast<std::int64_t>(sizeof(T));
    SvmOptions svm;
    svm.C = options.C;
    svm.loss = options.loss;
    svm.tol = options.tol;
    solver.aim = std::max(kAim * options.tol, solver.kOptimal);
    svm.max_iter = options.max_iter;
    return solver.solve(svm);
}

// The mean decision of samples [begin, end) by their weights.
template <class T>
double BasicRobustSegmenter<T>::State::mean(std::int64_t begin, std::int64_t end) const {
    double sum = 0, weight = 0;
    for (std::int64_t i = begin; i < end; ++i) {
        sum += labels.weights[i] * solver.values[i];
        weight += labels.weights[i];
    }
    return sum / weight + solver.b;
}

template <class T>
SegmentResult BasicRobustSegmenter<T>::State::run(const SegmentInput<T>& in, const SegmentOutput& out) {
    const std::int64_t size = in.height * in.width, n_points = in.feature_height * in.feature_width;
    SegmentResult result;
    const PointMatrix<T> features = feature_points(in, resolve_threads(options.threads));
    const MapRange<T> range = map_range(in.anomaly_map, size);
    if (!range.finite) {
        result.bad = BadInput::anomaly_map;
        result.status = SegmentStatus::non_finite;
        return result;
    }
    const bool usable = labels.find(in.anomaly_map, in.height, in.width, in.feature_height, in.feature_width,
                                    static_cast<double>(range.least), static_cast<double>(range.greatest), options);
    taps.set(in);
    mix(n_points);
    if (!gather(features)) {
        result.bad = BadInput::features;
        result.status = SegmentStatus::non_finite;
        return result;
    }
    std::memset(out.pseudo_labels, 0, static_cast<std::size_t>(size));
    if (!usable) {
        clear_decision(in, out);
        result.status = SegmentStatus::degenerate;
        return result;
    }
    result.tau = labels.level / labels.unit;
    result.n_anomalous = labels.n_anomalous;
    result.n_nominal = labels.n - labels.n_anomalous;
    for (std::int64_t i = 0; i < labels.n; ++i) {
        out.pseudo_labels[labels.pixels[i].row * in.width + labels.pixels[i].col] = labels.sides[i];
    }
    solver.points.dims = in.channels;
    solver.points.threads = features.threads;
    result.svm = train();
    if (!result.svm.converged) result.status = SegmentStatus::not_converged;

    double stretch = 1, offset = result.svm.intercept;
    if (options.recentre) {
        const double high = mean(0, labels.n_anomalous), low = mean(labels.n_anomalous, labels.n);
        if (high - low > kConstant) {
            stretch = 2 / (high - low);
            offset = (2 * offset - high - low) / (high - low);
        }
    }
    // A linear classifier commutes with bilinear interpolation, and standardising folds into it.
    padded_vector(weights, in.channels);
    const auto weight = [&](std::int64_t c) { return stretch * solver.w[c] * scale[c]; };
    bool beyond = false;
    for (std::int64_t c = 0; c < in.channels; ++c) {
        offset -= weight(c) * centre[c];
        weights[c] = weight(c) * down[c];
        beyond = beyond || !std::isfinite(weights[c]);
    }
    for (std::int64_t c = 0; beyond && c < in.channels; ++c) {
        if (!std::isfinite(weights[c])) weights[c] = 0;
    }
    cells.resize(static_cast<std::size_t>(n_points));
    features.to_points(weights.data(), cells.data());
    for (std::int64_t p = 0; p < n_points; ++p) cells[p] += offset;
    // Channels so small that their weights leave the range are scaled first, one by one.
    for (std::int64_t c = 0; beyond && c < in.channels; ++c) {
        if (std::isfinite(weight(c) * down[c])) continue;
        const T* first = features.data + (features.channels_first ? c * features.stride : c);
        const std::int64_t step = features.channels_first ? 1 : features.stride;
        for (std::int64_t p = 0; p < n_points; ++p) cells[p] += first[p * step] * down[c] * weight(c);
    }
    lines.resize(static_cast<std::size_t>(2 * in.width));
    upsample_decision(cells.data(), taps.rows.data(), taps.cols.data(), in.height, in.width, lines.data(),
                      out.decision_map, out.pred_mask);
    const double per = options.score_weight / (labels.peak - labels.level);
    for (std::int64_t i = 0; i < size; ++i) {
        const double score = static_cast<double>(in.anomaly_map[i]) * labels.unit;
        out.decision_map[i] += static_cast<float>((score - labels.level) * per);
        out.pred_mask[i] = out.decision_map[i] > 0;
    }
    return result;
}

template <class T>
BasicRobustSegmenter<T>::BasicRobustSegmenter(const RobustOptions& options) : state_(new State) {
    set_options(options);
}
template <class T>
BasicRobustSegmenter<T>::~BasicRobustSegmenter() = default;
template <class T>
BasicRobustSegmenter<T>::BasicRobustSegmenter(BasicRobustSegmenter&&) noexcept = default;
template <class T>
BasicRobustSegmenter<T>& BasicRobustSegmenter<T>::operator=(BasicRobustSegmenter&&) noexcept = default;

template <class T>
void BasicRobustSegmenter<T>::set_options(const RobustOptions& options) {
    const auto check_within = [](const char* name, double x, double low, double high, const char* takes) {
        check_option(x >= low && x <= high, name, x, takes);
    };
    if (options.nominal_level)
        check_option(std::isfinite(*options.nominal_level), "nominal_level", *options.nominal_level, "a finite number");
    check_within("nominal_share", options.nominal_share, 0, 0.99, "a number in [0, 0.99]");
    check_within("nominal_weight", options.nominal_weight, 0, 1, "a number in [0, 1]");
    if (options.height) check_within("height", *options.height, 0.01, 0.99, "a number in [0.01, 0.99]");
    check_within("base_quantile", options.base_quantile, 0, 1, "a number in [0, 1]");
    check_within("core", options.core, 0, 0.99, "a number in [0, 0.99]");
    check_count("n_core", options.n_core);
    check_count("n_background", options.n_background);
    check_positive("core_weight", options.core_weight);
    check_positive("background_weight", options.background_weight);
    check_within("hard_share", options.hard_share, 0, 1, "a number in [0, 1]");
    check_within("size_exponent", options.size_exponent, 0, 2, "a number in [0, 2]");
    check_option(options.score_weight >= 0 && std::isfinite(options.score_weight), "score_weight", options.score_weight,
                 "a finite number >= 0");
    check_solver(options.C, options.loss, options.tol, options.max_iter);
    state_->options = options;
}

template <class T>
SegmentResult BasicRobustSegmenter<T>::operator()(const SegmentInput<T>& input, const SegmentOutput& output) {
    check_images(input, output);
    return state_->run(input, output);
}

template <class T>
std::size_t BasicRobustSegmenter<T>::memory() const noexcept {
    const State& s = *state_;
    return s.labels.memory() + s.solver.memory() + s.taps.memory() + s.touched.bytes() + s.place.bytes() +
           s.mixtures.bytes() + s.staged.bytes() + s.samples.bytes() + s.centre.bytes() + s.scale.bytes() +
           s.down.bytes() + s.weights.bytes() + s.cells.bytes() + s.lines.bytes();
}

template class BasicRobustSegmenter<float>;
template class BasicRobustSegmenter<double>;

}  // namespace ttt4as
