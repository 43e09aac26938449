// Where the robust preset puts its level, and which pixels it learns from: kernels/segment_robust/labels.py, to the
// sample.
#pragma once

#include <cstdint>

#include "ttt4as/common.hpp"
#include "ttt4as/peaks.hpp"
#include "ttt4as/robust.hpp"

namespace ttt4as {

template <class T>
class RobustLabels {
  public:
    struct Pixel {
        std::int32_t row, col;
    };
    double unit = 1;             // a power of two, by which scores are multiplied before anything is made of them
    double level = 0, peak = 0;  // in these units
    std::int64_t n = 0, n_anomalous = 0;
    Buffer<Pixel> pixels;       // the anomalous ones first
    Buffer<double> weights;     // what each counts for
    Buffer<std::int8_t> sides;  // 1 or -1

    // Labels of a map (height, width) from `least` to `greatest` over features of (h, w) cells; false, and none, where
    // no level lies between these.
    bool find(const T* map, std::int64_t height, std::int64_t width, std::int64_t h, std::int64_t w, double least,
              double greatest, const RobustOptions& options);
    // Bytes held.
    std::size_t memory() const noexcept {
        return pixels.bytes() + weights.bytes() + sides.bytes() + values_.bytes() + places_.bytes() + hard_.bytes() +
               keys_.bytes() + scratch_.values.bytes();
    }

  private:
    struct Place {
        std::int32_t row, col;  // of the lattice
        T score;
    };
    void find_level(std::int64_t step, double least, const RobustOptions& options);
    double steepest(std::int64_t step, double base);
    template <class Take>
    std::int64_t collect(std::int64_t step, Take&& take);
    std::int64_t take(const Place* places, std::int64_t count, std::int64_t limit, std::int64_t step, double weight,
                      std::int8_t side);
    void anomalous(std::int64_t spacing, const RobustOptions& options);
    void nominal(std::int64_t spacing, const RobustOptions& options);

    const T* map_ = nullptr;
    std::int64_t height_ = 0, width_ = 0, cells_ = 0;
    Buffer<T> values_;
    Buffer<Place> places_, hard_;
    Buffer<std::uint64_t> keys_;
    PeakScratch<T> scratch_;
};

}  // namespace ttt4as
