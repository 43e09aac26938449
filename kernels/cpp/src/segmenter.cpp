// The fused method: one pass for the map's percentile, one for its peaks, the SVM on the few vectors that its samples
// are made of (a linear classifier commutes with bilinear interpolation, so neither samples nor decision are ever
// upsampled in all channels), one channel upsampled. The features are read three times: are they finite, the vectors,
// the decision.
#include "ttt4as/segmenter.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "grid_basis.hpp"
#include "options.hpp"
#include "segment_parts.hpp"
#include "svm_solver.hpp"
#include "ttt4as/peaks.hpp"
#include "upsample.hpp"

namespace ttt4as {
template <class T>
struct BasicSegmenter<T>::State {
    using Pixel = typename GridSamples<T>::Pixel;

    static constexpr std::int64_t kLittle = 1 << 19;  // bytes that the solver may have for any features

    SegmenterOptions options;
    PeakScratch<T> peaks;
    SvmSolver<T, GridSamples<T>> solver;
    GridBasis<T> basis;
    MapTaps taps;
    Buffer<double> cells;
    Buffer<Pixel> pixels;
    Buffer<std::int8_t> labels;
    Buffer<T> magnitudes;
    Buffer<float> lines;
    Buffer<std::int64_t> grid;
    std::int64_t grid_height = 0, grid_width = 0, grid_n = 0;

    SegmentResult run(const SegmentInput<T>& in, const SegmentOutput& out);
    bool scan_features(const SegmentInput<T>& in, double* magnitude);
    void nominal_grid(std::int64_t height, std::int64_t width);
    SvmResult train(const PointMatrix<T>& grid_points, const GridSamples<T>& grid_samples, std::int64_t n_anomalous,
                    double magnitude);
};

// The features' largest magnitude; false if one is not finite.
template <class T>
bool BasicSegmenter<T>::State::scan_features(const SegmentInput<T>& in, double* magnitude) {
    constexpr std::int64_t kPiece = 1 << 16;
    const std::int64_t size = in.channels * in.feature_height * in.feature_width;
    const std::int64_t pieces = (size + kPiece - 1) / kPiece;
    magnitudes.resize(static_cast<std::size_t>(pieces));
    const auto max_abs = max_abs_kernel<T>();
    parallel_for(pieces, pieces > 4 ? solver.points.threads : 1, [&](std::int64_t piece, int) {
        const std::int64_t begin = piece * kPiece;
        magnitudes[piece] = max_abs(in.features + begin, std::min(kPiece, size - begin));
    });
    T most = 0;
    for (std::int64_t i = 0; i < pieces; ++i) {
        if (!std::isfinite(magnitudes[i])) return false;
        most = std::max(most, magnitudes[i]);
    }
    *magnitude = static_cast<double>(most);
    return true;
}

template <class T>
void BasicSegmenter<T>::State::nominal_grid(std::int64_t height, std::int64_t width) {
    if (height == grid_height && width == grid_width && grid_n == options.n_nominal) return;
    const std::int64_t area = height * width / options.n_nominal;
    auto step = static_cast<std::int64_t>(std::sqrt(static_cast<double>(area)));
    while (step * step > area) --step;
    while ((step + 1) * (step + 1) <= area) ++step;
    step = std::max<std::int64_t>(1, step);
    const auto count = [&](std::int64_t n) { return (n - step / 2 + step - 1) / step; };
    grid_n = 0;  // no grid, should memory run out
    grid.resize(static_cast<std::size_t>(count(height) * count(width)));
    std::size_t at = 0;
    for (std::int64_t y = step / 2; y < height; y += step) {
        for (std::int64_t x = step / 2; x < width; x += step) grid[at++] = y * width + x;
    }
    grid_height = height;
    grid_width = width;
    grid_n = options.n_nominal;
}

template <class T>
SegmentResult BasicSegmenter<T>::State::run(const SegmentInput<T>& in, const SegmentOutput& out) {
    const std::int64_t size = in.height * in.width, n_points = in.feature_height * in.feature_width;
    SegmentResult result;
    solver.points.threads = resolve_threads(options.threads);
    const MapRange<T> range = map_range(in.anomaly_map, size);
    if (!range.finite) {
        result.bad = BadInput::anomaly_map;
        result.status = SegmentStatus::non_finite;
        return result;
    }
    double magnitude = 0;
    if (!scan_features(in, &magnitude)) {
        result.bad = BadInput::features;
        result.status = SegmentStatus::non_finite;
        return result;
    }

    // Pseudo-labels, in the caller's memory.
    result.tau = map_percentile(in.anomaly_map, size, options.percentile, peaks);
    auto* label = reinterpret_cast<std::uint8_t*>(out.pseudo_labels);
    result.n_anomalous =
        mark_dilated_peaks(in.anomaly_map, in.height, in.width, result.tau, options.neighbor_radius, label, peaks);
    const std::int64_t* candidates = in.candidates;
    std::int64_t n_candidates = in.n_candidates, limit = in.limit;
    if (!candidates) {
        nominal_grid(in.height, in.width);
        candidates = grid.data();
        limit = n_candidates = static_cast<std::int64_t>(grid.size());
    }
    const std::int64_t most = std::min({limit, n_candidates, size - result.n_anomalous});
    pixels.resize(static_cast<std::size_t>(result.n_anomalous + most));
    labels.resize(pixels.size());
    std::int64_t n = 0;
    for (std::int64_t y = 0; y < in.height; ++y) {
        const std::uint8_t* row = label + y * in.width;
        for (std::int64_t x = 0; x < in.width; ++x) {
            if (x + 8 <= in.width) {
                std::uint64_t eight;
                std::memcpy(&eight, row + x, sizeof eight);
                if (!eight) {
                    x += 7;
                    continue;
                }
            }
            if (row[x]) pixels[n++] = {static_cast<std::int32_t>(y), static_cast<std::int32_t>(x)};
        }
    }
    std::memset(labels.data(), 1, static_cast<std::size_t>(n));
    for (std::int64_t k = 0; k < n_candidates && result.n_nominal < most; ++k) {
        const std::int64_t at = candidates[k];
        if (at < 0 || at >= size)
            throw InvalidArgument("candidates: expected pixels of the map, got " + std::to_string(at));
        if (out.pseudo_labels[at]) continue;
        out.pseudo_labels[at] = -1;
        pixels[n] = {static_cast<std::int32_t>(at / in.width), static_cast<std::int32_t>(at % in.width)};
        labels[n++] = -1;
        ++result.n_nominal;
    }
    if (range.least == range.greatest || !result.n_anomalous || !result.n_nominal) {
        clear_decision(in, out);
        result.status = SegmentStatus::degenerate;
        return result;
    }

    taps.set(in);
    const PointMatrix<T> grid_points = feature_points(in, solver.points.threads);
    GridSamples<T> grid_samples;
    grid_samples.pixels = pixels.data();
    grid_samples.n = n;
    grid_samples.rows = taps.rows.data();
    grid_samples.cols = taps.cols.data();
    result.svm = train(grid_points, grid_samples, result.n_anomalous, magnitude);
    if (!result.svm.converged) result.status = SegmentStatus::not_converged;

    for (std::int64_t p = 0; p < n_points; ++p) cells[p] += result.svm.intercept;
    lines.resize(static_cast<std::size_t>(2 * in.width));
    upsample_decision(cells.data(), taps.rows.data(), taps.cols.data(), in.height, in.width, lines.data(),
                      out.decision_map, out.pred_mask);
    return result;
}

// The SVM on the samples' own vectors, or on the grid where those are not fewer; leaves x_p . w of the grid in `cells`.
template <class T>
SvmResult BasicSegmenter<T>::State::train(const PointMatrix<T>& grid_points, const GridSamples<T>& grid_samples,
                                          std::int64_t n_anomalous, double magnitude) {
    solver.points = grid_points;
    solver.samples = grid_samples;
    // Mixtures of enormous vectors may overflow before the solver scales them: those it makes itself.
    const bool compact = magnitude <= SvmSolver<T, GridSamples<T>>::kEnormous &&
                         basis.choose(grid_samples, n_anomalous, grid_points.points);
    if (compact) {
        basis.gather(grid_points, grid_samples, n_anomalous);
        solver.points = basis.points(grid_points);
        solver.samples = basis.samples(grid_samples, n_anomalous);
    }
    solver.labels = labels.data();
    solver.magnitude = magnitude;
    solver.aim = solver.kOptimal;
    const std::int64_t spare = grid_points.points - (compact ? solver.points.points : 0);
    solver.most_bytes =
        std::max<std::int64_t>(kLittle, spare * grid_points.dims * static_cast<std::int64_t>(sizeof(T)));
    SvmOptions svm;
    svm.C = options.C;
    svm.loss = options.loss;
    svm.tol = options.tol;
    svm.max_iter = options.max_iter;
    const SvmResult found = solver.solve(svm);
    cells.resize(static_cast<std::size_t>(grid_points.points));
    if (compact) {
        grid_points.to_points(solver.w.data(), cells.data());
    } else {
        std::copy(solver.values.begin(), solver.values.end(), cells.begin());
    }
    return found;
}

template <class T>
BasicSegmenter<T>::BasicSegmenter(const SegmenterOptions& options) : state_(new State) {
    set_options(options);
}
template <class T>
BasicSegmenter<T>::~BasicSegmenter() = default;
template <class T>
BasicSegmenter<T>::BasicSegmenter(BasicSegmenter&&) noexcept = default;
template <class T>
BasicSegmenter<T>& BasicSegmenter<T>::operator=(BasicSegmenter&&) noexcept = default;

template <class T>
void BasicSegmenter<T>::set_options(const SegmenterOptions& options) {
    check_option(options.percentile >= 0 && options.percentile <= 100, "percentile", options.percentile,
                 "a number in [0, 100]");
    check_option(options.neighbor_radius >= 0, "neighbor_radius", options.neighbor_radius, "an integer >= 0");
    check_count("n_nominal", options.n_nominal);
    check_solver(options.C, options.loss, options.tol, options.max_iter);
    state_->options = options;
}

template <class T>
SegmentResult BasicSegmenter<T>::operator()(const SegmentInput<T>& input, const SegmentOutput& output) {
    check_images(input, output);
    check_option(!input.candidates || input.n_candidates >= 0, "n_candidates", input.n_candidates, "an integer >= 0");
    check_option(!input.candidates || input.limit >= 0, "limit", input.limit, "an integer >= 0");
    return state_->run(input, output);
}

template <class T>
std::size_t BasicSegmenter<T>::memory() const noexcept {
    const State& s = *state_;
    return s.solver.memory() + s.basis.memory() + s.cells.bytes() + s.peaks.values.bytes() + s.peaks.columns.bytes() +
           s.peaks.runs.bytes() + s.taps.memory() + s.pixels.bytes() + s.labels.bytes() + s.magnitudes.bytes() +
           s.lines.bytes() + s.grid.bytes();
}

template class BasicSegmenter<float>;
template class BasicSegmenter<double>;

}  // namespace ttt4as
