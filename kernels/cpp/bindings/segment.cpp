// NumPy arrays in and out of ttt4as/segmenter.hpp and ttt4as/robust.hpp: a batch is spread over threads, a single image
// is given all of them.

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "signals.hpp"
#include "ttt4as/robust.hpp"
#include "ttt4as/segmenter.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

// The segmenter of T that takes these options.
template <class T, class Options>
using SegmenterOf =
    std::conditional_t<std::is_same_v<Options, RobustOptions>, BasicRobustSegmenter<T>, BasicSegmenter<T>>;

// Segmenters that wait for a caller, with their memory: as many as calls and threads ever ran at once.
template <class T, class Options>
class Shelf {
  public:
    using Segmenter = SegmenterOf<T, Options>;

    std::unique_ptr<Segmenter> take(const Options& options) {
        std::unique_ptr<Segmenter> found;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!kept_.empty()) {
                found = std::move(kept_.back());
                kept_.pop_back();
            }
        }
        if (!found) found = std::make_unique<Segmenter>();
        found->set_options(options);
        return found;
    }
    void give(std::unique_ptr<Segmenter> segmenter) {
        std::lock_guard<std::mutex> lock(mutex_);
        kept_.push_back(std::move(segmenter));
    }
    std::size_t clear() {
        std::lock_guard<std::mutex> lock(mutex_);
        std::size_t bytes = 0;
        for (const auto& segmenter : kept_) bytes += segmenter->memory();
        kept_.clear();
        return bytes;
    }

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Segmenter>> kept_;
};

// Never destroyed: a thread may still hold one of its segmenters while the process ends.
template <class T, class Options>
Shelf<T, Options>& shelf() {
    static auto* the_shelf = new Shelf<T, Options>;
    return *the_shelf;
}

// Pixels that may be nominal samples, and how many of them are.
struct Candidates {
    const std::int64_t* pixels = nullptr;
    std::int64_t count = 0, limit = 0;
};

// (B, C, h, w) as it can be read without a copy: images contiguous, channels first or last.
enum class Layout { channels_first, channels_last, other };

Layout layout_of(const py::array& x) {
    const py::ssize_t item = x.itemsize(), C = x.shape(1), h = x.shape(2), w = x.shape(3);
    const auto is = [&](py::ssize_t axis, py::ssize_t stride) {
        return x.shape(axis) == 1 || x.strides(axis) == stride * item;
    };
    if (x.strides(0) % item != 0 || !x.attr("flags").attr("aligned").cast<bool>()) return Layout::other;
    if (is(1, h * w) && is(2, w) && is(3, 1)) return Layout::channels_first;
    if (is(1, 1) && is(2, w * C) && is(3, C)) return Layout::channels_last;
    return Layout::other;
}

template <class T, class Options>
py::tuple segment(const py::array_t<T, py::array::c_style>& map, py::array features, const Options& options,
                  const Candidates& candidates, const bool* skip) {
    if (layout_of(features) == Layout::other)
        features = py::array::ensure(features.attr("copy")(py::arg("order") = "C"));
    const bool channels_last = layout_of(features) == Layout::channels_last;
    const std::int64_t batch = map.shape(0), height = map.shape(1), width = map.shape(2), size = height * width;
    py::array_t<bool> mask({batch, height, width});
    py::array_t<float> decision({batch, height, width});
    py::array_t<std::int8_t> labels({batch, height, width});
    py::array_t<std::int8_t> status(batch);
    auto* mask_out = reinterpret_cast<std::uint8_t*>(mask.mutable_data());
    float* decision_out = decision.mutable_data();
    std::int8_t* labels_out = labels.mutable_data();
    std::int8_t* status_out = status.mutable_data();
    const std::int64_t stride = features.strides(0) / features.itemsize();
    SegmentInput<T> first;
    first.anomaly_map = map.data();
    first.height = height;
    first.width = width;
    first.features = static_cast<const T*>(features.data());
    first.channels = features.shape(1);
    first.feature_height = features.shape(2);
    first.feature_width = features.shape(3);
    first.channels_last = channels_last;
    first.candidates = candidates.pixels;
    first.n_candidates = candidates.count;
    first.limit = candidates.limit;
    std::vector<SegmentResult> results(static_cast<std::size_t>(batch));
    {
        Signals signals;
        py::gil_scoped_release release;
        const int threads = resolve_threads(options.threads);
        const int workers = static_cast<int>(std::min<std::int64_t>(threads, batch));
        Options each = options;
        each.threads = batch > 1 ? 1 : threads;
        std::vector<std::unique_ptr<SegmenterOf<T, Options>>> segmenters(static_cast<std::size_t>(workers));
        parallel_for(batch, workers, [&](std::int64_t i, int worker) {
            if (worker == 0) signals.check();  // the thread that called
            if (skip && skip[i]) {
                std::fill_n(mask_out + i * size, size, std::uint8_t{0});
                std::fill_n(decision_out + i * size, size, 0.0f);
                std::fill_n(labels_out + i * size, size, std::int8_t{0});
                status_out[i] = static_cast<std::int8_t>(SegmentStatus::nominal);
                return;
            }
            if (!segmenters[worker]) segmenters[worker] = shelf<T, Options>().take(each);
            SegmentInput<T> input = first;
            input.anomaly_map += i * size;
            input.features += i * stride;
            results[i] =
                (*segmenters[worker])(input, {mask_out + i * size, decision_out + i * size, labels_out + i * size});
            status_out[i] = static_cast<std::int8_t>(results[i].status);
        });
        for (auto& segmenter : segmenters) {
            if (segmenter) shelf<T, Options>().give(std::move(segmenter));
        }
    }
    for (std::int64_t i = 0; i < batch; ++i) {
        if (results[i].bad == BadInput::none) continue;
        const std::string name = results[i].bad == BadInput::features ? "features" : "anomaly_map";
        throw py::value_error(name + ": expected finite values, got NaN or infinity in image " + std::to_string(i));
    }
    py::list details;
    for (const SegmentResult& one : results) {
        details.append(py::make_tuple(one.n_anomalous, one.n_nominal, one.svm.n_iter, one.svm.passes, one.svm.gap,
                                      static_cast<int>(one.svm.route)));
    }
    return py::make_tuple(mask, decision, labels, status, details);
}

// `segment` in the precision that both arrays have; `skip` is None or a flag an image.
template <class Options>
py::tuple segment_any(const py::array& map, const py::array& features, const Options& options,
                      const Candidates& candidates, const py::object& skip) {
    check_axes(map, "anomaly_map", 3, 3);
    check_axes(features, "features", 4, 4);
    if (features.shape(0) != map.shape(0)) {
        throw py::value_error("features: expected a batch of " + std::to_string(map.shape(0)) + ", got shape " +
                              shape_text(features));
    }
    py::array_t<bool, py::array::c_style> gate;
    if (!skip.is_none()) {
        gate = py::array_t<bool, py::array::c_style>(skip);
        if (gate.ndim() != 1 || gate.shape(0) != map.shape(0)) {
            throw py::value_error("skip: expected one flag an image, got shape " + shape_text(gate));
        }
    }
    const bool* flags = skip.is_none() ? nullptr : gate.data();
    if (is_dtype(map, 'f', 4) && is_dtype(features, 'f', 4)) {
        return segment<float>(map, features, options, candidates, flags);
    }
    if (is_dtype(map, 'f', 8) && is_dtype(features, 'f', 8)) {
        return segment<double>(map, features, options, candidates, flags);
    }
    throw py::type_error("anomaly_map, features: expected both float32 or both float64, got " +
                         py::str(map.dtype()).cast<std::string>() + " and " +
                         py::str(features.dtype()).cast<std::string>());
}

py::tuple segment_paper(const py::array& map, const py::array& features, double percentile, std::int64_t radius,
                        const py::array_t<std::int64_t, py::array::c_style>& candidates, std::int64_t limit, double C,
                        const std::string& loss, double tol, int max_iter, const py::object& skip, int threads) {
    if (candidates.ndim() != 1)
        throw py::value_error("candidates: expected 1 dimension, got shape " + shape_text(candidates));
    SegmenterOptions options;
    options.percentile = percentile;
    options.neighbor_radius = radius;
    options.C = C;
    options.loss = loss_of(loss);
    options.tol = tol;
    options.max_iter = max_iter;
    options.threads = threads;
    // An empty array has no address worth passing on, and null means the default grid.
    static const std::int64_t none = 0;
    return segment_any(map, features, options,
                       {candidates.size() ? candidates.data() : &none, candidates.size(), limit}, skip);
}

py::tuple segment_robust(const py::array& map, const py::array& features, std::optional<double> nominal_level,
                         double nominal_share, double nominal_weight, std::optional<double> height,
                         double base_quantile, double core, std::int64_t n_core, std::int64_t n_background,
                         double core_weight, double background_weight, double hard_share, double size_exponent,
                         bool standardize, bool recentre, double score_weight, double C, const std::string& loss,
                         double tol, int max_iter, const py::object& skip, int threads) {
    RobustOptions options;
    options.nominal_level = nominal_level;
    options.nominal_share = nominal_share;
    options.nominal_weight = nominal_weight;
    options.height = height;
    options.base_quantile = base_quantile;
    options.core = core;
    options.n_core = n_core;
    options.n_background = n_background;
    options.core_weight = core_weight;
    options.background_weight = background_weight;
    options.hard_share = hard_share;
    options.size_exponent = size_exponent;
    options.standardize = standardize;
    options.recentre = recentre;
    options.score_weight = score_weight;
    options.C = C;
    options.loss = loss_of(loss);
    options.tol = tol;
    options.max_iter = max_iter;
    options.threads = threads;
    return segment_any(map, features, options, {}, skip);
}

}  // namespace

void bind_segment(py::module_& module) {
    module.def("segment", &segment_paper, py::arg("anomaly_map"), py::arg("features"), py::arg("percentile"),
               py::arg("neighbor_radius"), py::arg("candidates"), py::arg("limit"), py::arg("C"), py::arg("loss"),
               py::arg("tol"), py::arg("max_iter"), py::arg("skip") = py::none(), py::arg("threads") = 0,
               "(B, H, W) and (B, C, h, w), both float32 or both float64 -> mask, decision, labels, status, details.");
    module.def("segment_robust", &segment_robust, py::arg("anomaly_map"), py::arg("features"), py::kw_only(),
               py::arg("nominal_level"), py::arg("nominal_share"), py::arg("nominal_weight"), py::arg("height"),
               py::arg("base_quantile"), py::arg("core"), py::arg("n_core"), py::arg("n_background"),
               py::arg("core_weight"), py::arg("background_weight"), py::arg("hard_share"), py::arg("size_exponent"),
               py::arg("standardize"), py::arg("recentre"), py::arg("score_weight"), py::arg("C"), py::arg("loss"),
               py::arg("tol"), py::arg("max_iter"), py::arg("skip") = py::none(), py::arg("threads") = 0,
               "As `segment`, by the robust preset.");
    module.def(
        "release_memory",
        [] {
            return shelf<float, SegmenterOptions>().clear() + shelf<double, SegmenterOptions>().clear() +
                   shelf<float, RobustOptions>().clear() + shelf<double, RobustOptions>().clear();
        },
        "Free the memory that segmentation keeps between calls; returns how many bytes.");
}

}  // namespace ttt4as
