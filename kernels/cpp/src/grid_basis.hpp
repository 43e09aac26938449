// The vectors that the samples of one image are made of. Anomalous pixels lie in blocks, a few feature cells each, so
// that all of them are mixtures of the few grid points they touch; nominal pixels lie apart, so that each is a vector
// of its own. Together these are a fraction of the grid's points, and the SVM, which passes over its points many times,
// passes over them instead: they stay in the second cache where the features of an image do not.
#pragma once

#include <algorithm>
#include <cstdint>

#include "svm_samples.hpp"

namespace ttt4as {

template <class T>
class GridBasis {
  public:
    // Chooses the vectors of the pixels of `grid`, of which those before `n_anomalous` are mixtures. False where they
    // would be more than half as many as the grid's points: then the grid itself serves.
    bool choose(const GridSamples<T>& grid, std::int64_t n_anomalous, std::int64_t n_points) {
        const std::int64_t most = n_points / 2 - (grid.n - n_anomalous);
        if (most < 4) return false;
        touched_.resize(static_cast<std::size_t>(most));
        place_.resize(static_cast<std::size_t>(n_points));
        std::fill(place_.begin(), place_.end(), std::int32_t{-1});
        n_touched_ = 0;
        for (std::int64_t i = 0; i < n_anomalous; ++i) {
            const GridTap& y = grid.rows[grid.pixels[i].row];
            const GridTap& x = grid.cols[grid.pixels[i].col];
            for (const std::int32_t at : {y.lower + x.lower, y.lower + x.upper, y.upper + x.lower, y.upper + x.upper}) {
                if (place_[at] >= 0) continue;
                if (n_touched_ == most) return false;
                place_[at] = static_cast<std::int32_t>(n_touched_);
                touched_[n_touched_++] = at;
            }
        }
        return true;
    }

    // Gathers the vectors from the features, a row each. Cost: the cache lines of the features that hold them, read
    // once, and rows * dims values written.
    void gather(const PointMatrix<T>& features, const GridSamples<T>& grid, std::int64_t n_anomalous) {
        rows_ = n_touched_ + grid.n - n_anomalous;
        stride_ = spaced(features.dims);
        vectors_.resize(static_cast<std::size_t>(rows_ * stride_));
        const std::int64_t tasks = (features.dims + kChannels - 1) / kChannels;
        const std::int64_t move = features.channels_first ? features.stride : 1;
        const std::int64_t step = features.channels_first ? 1 : features.stride;
        parallel_for(tasks, rows_ * features.dims < kSerial ? 1 : features.threads, [&](std::int64_t task, int) {
            const std::int64_t begin = task * kChannels, end = std::min(features.dims, begin + kChannels);
            T* out = vectors_.data();
            for (std::int64_t k = 0; k < n_touched_; ++k, out += stride_) {
                const T* from = features.data + touched_[k] * step;
                for (std::int64_t c = begin; c < end; ++c) out[c] = from[c * move];
            }
            for (std::int64_t i = n_anomalous; i < grid.n; ++i, out += stride_) {
                grid.mix(i, features, 1.0, begin, end, [&](std::int64_t c, T value) { out[c] = value; });
            }
        });
    }

    // The vectors as the solver's points, and the pixels as samples of them.
    PointMatrix<T> points(const PointMatrix<T>& features) const {
        PointMatrix<T> found = features;
        found.data = vectors_.data();
        found.stride = stride_;
        found.points = rows_;
        found.channels_first = false;
        return found;
    }
    GridSamples<T> samples(GridSamples<T> grid, std::int64_t n_anomalous) const {
        grid.place = place_.data();
        grid.n_mixtures = n_anomalous;
        grid.own = n_touched_ - n_anomalous;
        return grid;
    }

    // Bytes held.
    std::size_t memory() const noexcept { return touched_.bytes() + place_.bytes() + vectors_.bytes(); }

  private:
    static constexpr std::int64_t kChannels = 16;     // a cache line of floats
    static constexpr std::int64_t kSerial = 1 << 16;  // values below which a second thread costs more than it brings
    std::int64_t n_touched_ = 0, rows_ = 0, stride_ = 0;
    Buffer<std::int32_t> touched_, place_;
    Buffer<T> vectors_;
};

}  // namespace ttt4as
