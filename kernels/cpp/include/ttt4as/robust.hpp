// Test-time training whose labels follow the shape of each peak, for defects of any size: the `robust` preset, whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "ttt4as/common.hpp"
#include "ttt4as/segmenter.hpp"

namespace ttt4as {

// Ranges are those of ttt4as_robust_options in c_api.h.
struct RobustOptions {
    std::optional<double> nominal_level;  // the score that pixels of nominal images hardly pass
    double nominal_share = 0.4;           // of the way from there to the peak, where the nominal images' own level lies
    double nominal_weight = 0.5;          // of that level against the map's own
    std::optional<double> height;  // of the map's own level on the way from background to peak: else the steepest
    double base_quantile = 0.25;   // of the map, which counts as background
    double core = 0.3;             // share of the way from level to peak above which samples are anomalous
    std::int64_t n_core = 50, n_background = 150;      // samples at most
    double core_weight = 50, background_weight = 400;  // what each class counts for at most
    double hard_share = 0.5;                           // of the nominal samples, from the eighth of the highest scores
    double size_exponent = 0.3;                        // by which the width of the peak moves the levels
    bool standardize = true;                           // each channel by its mean and deviation in the image
    bool recentre = true;                              // the SVM's decision, to means of 1 and -1 over its samples
    double score_weight = 1;                           // of the score in the decision
    double C = 1e-3;
    Loss loss = Loss::squared_hinge;
    double tol = 1e-4;
    int max_iter = 1000;
    int threads = 0;  // 0: max_threads()
};

// As BasicSegmenter: one image after another in memory that it keeps, one thread at a time, the same bits on any number
// of threads. `candidates` of the input are not used; `tau` of the result is the level. That memory is at most ten
// times the samples' features, 40 bytes for each place of a lattice of half a feature cell (of a pixel, where cells are
// smaller), 12 a feature position, 24 a row or column, 400 a channel, and 4 MiB, on any number of threads.
template <class T>
class TTT4AS_API BasicRobustSegmenter {
  public:
    // Throws InvalidArgument for an option out of range.
    explicit BasicRobustSegmenter(const RobustOptions& options = {});
    ~BasicRobustSegmenter();
    BasicRobustSegmenter(BasicRobustSegmenter&&) noexcept;
    BasicRobustSegmenter& operator=(BasicRobustSegmenter&&) noexcept;

    // Throws InvalidArgument for empty or impossible shapes, std::bad_alloc.
    SegmentResult operator()(const SegmentInput<T>& input, const SegmentOutput& output);

    // Replaces the options; the memory is kept.
    void set_options(const RobustOptions& options);
    // Bytes held.
    std::size_t memory() const noexcept;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

using RobustSegmenter = BasicRobustSegmenter<float>;

}  // namespace ttt4as
