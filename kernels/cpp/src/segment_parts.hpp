// What the two ways to segment an image have in common.
#pragma once

#include <cstring>
#include <string>

#include "svm_samples.hpp"
#include "ttt4as/segmenter.hpp"

namespace ttt4as {

// Throws unless the shapes are possible and every buffer is there.
template <class T>
void check_images(const SegmentInput<T>& in, const SegmentOutput& out) {
    constexpr std::int64_t kMostSide = std::int64_t(1) << 24, kMostPixels = std::int64_t(1) << 31,
                           kMostValues = std::int64_t(1) << 40;
    const auto check = [](bool holds, const char* takes, const std::string& got) {
        if (!holds) throw InvalidArgument(std::string(takes) + ", got " + got);
    };
    const auto side = [](std::int64_t n) { return n >= 1 && n <= kMostSide; };
    const auto size = [](std::int64_t n, std::int64_t m) { return std::to_string(n) + " x " + std::to_string(m); };
    check(in.anomaly_map && in.features, "anomaly_map, features: expected two addresses", "NULL");
    check(out.pred_mask && out.decision_map && out.pseudo_labels, "output: expected three addresses", "NULL");
    check(side(in.height) && side(in.width) && in.height * in.width < kMostPixels,
          "anomaly_map: expected sides of 1 to 2^24 and fewer than 2^31 pixels", size(in.height, in.width));
    check(in.channels >= 1, "features: expected at least one channel", std::to_string(in.channels));
    check(side(in.feature_height) && side(in.feature_width) && in.feature_height * in.feature_width < kMostPixels,
          "features: expected sides of 1 to 2^24 and fewer than 2^31 cells", size(in.feature_height, in.feature_width));
    check(in.channels < kMostValues / (in.feature_height * in.feature_width),
          "features: expected fewer than 2^40 values",
          std::to_string(in.channels) + " x " + size(in.feature_height, in.feature_width));
}

// Where each row and column of the map lies on the features' grid.
struct MapTaps {
    Buffer<GridTap> rows, cols;

    template <class T>
    void set(const SegmentInput<T>& in) {
        rows.resize(static_cast<std::size_t>(in.height));
        cols.resize(static_cast<std::size_t>(in.width));
        for (std::int64_t y = 0; y < in.height; ++y) {
            const Tap tap = bilinear_tap(y, in.height, in.feature_height);
            rows[y] = {static_cast<std::int32_t>(tap.lower * in.feature_width),
                       static_cast<std::int32_t>(tap.upper * in.feature_width), tap.weight};
        }
        for (std::int64_t x = 0; x < in.width; ++x) {
            const Tap tap = bilinear_tap(x, in.width, in.feature_width);
            cols[x] = {static_cast<std::int32_t>(tap.lower), static_cast<std::int32_t>(tap.upper), tap.weight};
        }
    }
    std::size_t memory() const noexcept { return rows.bytes() + cols.bytes(); }
};

// The features as vectors at the points of their grid.
template <class T>
PointMatrix<T> feature_points(const SegmentInput<T>& in, int threads) {
    PointMatrix<T> points;
    points.data = in.features;
    points.channels_first = !in.channels_last;
    points.points = in.feature_height * in.feature_width;
    points.stride = in.channels_last ? in.channels : points.points;
    points.dims = in.channels;
    points.threads = threads;
    return points;
}

template <class T>
void clear_decision(const SegmentInput<T>& in, const SegmentOutput& out) {
    const auto size = static_cast<std::size_t>(in.height * in.width);
    std::memset(out.pred_mask, 0, size);
    std::memset(out.decision_map, 0, size * sizeof(float));
}

}  // namespace ttt4as
