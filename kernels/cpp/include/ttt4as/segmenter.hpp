// Test-time training, whole: an anomaly map and the features of one image in, a binary mask out.
#pragma once

#include <cstdint>
#include <memory>

#include "ttt4as/common.hpp"
#include "ttt4as/svm.hpp"

namespace ttt4as {

enum class SegmentStatus : std::int8_t {
    ok = 0,
    nominal = 1,        // gated by the caller: everything is zero
    degenerate = 2,     // a constant map, or a class without a pixel: labels as found, the rest zero
    not_converged = 3,  // the mask comes from the last iterate
    non_finite = 4,     // NaN or infinity in what `bad` names: nothing was computed and the outputs hold nothing
};

// Ranges are those of ttt4as_options in c_api.h.
struct SegmenterOptions {
    double percentile = 99.0;          // of the anomaly map: the least value of a peak
    std::int64_t neighbor_radius = 5;  // pixels by which peaks grow
    std::int64_t n_nominal = 100;      // nominal samples aimed at, on a grid
    double C = 1e-3;
    Loss loss = Loss::squared_hinge;
    double tol = 1e-4;
    int max_iter = 1000;
    int threads = 0;  // 0: max_threads()
};

// Where a value that is not finite was found.
enum class BadInput { none = 0, anomaly_map = 1, features = 2 };

// One image. Maps are float or double, features float or double; T of both is the same. Everything is the caller's
// memory.
template <class T>
struct SegmentInput {
    const T* anomaly_map = nullptr;  // (height, width), contiguous
    std::int64_t height = 0, width = 0;
    const T* features = nullptr;  // (channels, feature_height, feature_width)
    std::int64_t channels = 0, feature_height = 0, feature_width = 0;
    bool channels_last = false;  // (feature_height, feature_width, channels) in memory
    // Pixels that may be nominal samples, in the order they are taken; null: the grid.
    const std::int64_t* candidates = nullptr;
    std::int64_t n_candidates = 0;
    std::int64_t limit = 0;  // how many of them are taken, at most
};

struct SegmentOutput {
    std::uint8_t* pred_mask = nullptr;     // (height, width), 0 or 1
    float* decision_map = nullptr;         // (height, width)
    std::int8_t* pseudo_labels = nullptr;  // (height, width), 1 anomalous, -1 nominal, 0 not used
};

struct SegmentResult {
    SegmentStatus status = SegmentStatus::ok;
    BadInput bad = BadInput::none;
    double tau = 0;
    std::int64_t n_anomalous = 0, n_nominal = 0;
    SvmResult svm;
};

// Segments one image after another in memory that it keeps and only grows, with the shapes and the number of labelled
// pixels: a call that needs no more than those before allocates nothing. That memory is at most twice the features
// (with the hinge seven times; channels count as the next odd multiple of 16), plus 120 bytes a feature position, 60 a
// labelled pixel, 32 a row or column, an eighth of the map and 1 MiB. An object serves one thread at a time; make one
// for each. The result is the same to the bit on any number of threads.
template <class T>
class TTT4AS_API BasicSegmenter {
  public:
    // Throws InvalidArgument for an option out of range.
    explicit BasicSegmenter(const SegmenterOptions& options = {});
    ~BasicSegmenter();
    BasicSegmenter(BasicSegmenter&&) noexcept;
    BasicSegmenter& operator=(BasicSegmenter&&) noexcept;

    // Throws InvalidArgument for empty or impossible shapes, std::bad_alloc.
    SegmentResult operator()(const SegmentInput<T>& input, const SegmentOutput& output);

    // Replaces the options; the memory is kept.
    void set_options(const SegmenterOptions& options);
    // Bytes held.
    std::size_t memory() const noexcept;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

using Segmenter = BasicSegmenter<float>;

}  // namespace ttt4as
