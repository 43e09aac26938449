// NumPy arrays in and out of ttt4as/segmenter.hpp: a batch is spread over threads, a single image is given all of them.

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "ttt4as/segmenter.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

// Segmenters that wait for a caller, with their memory: as many as calls and threads ever ran at once.
template <class T>
class Shelf {
  public:
    std::unique_ptr<BasicSegmenter<T>> take(const SegmenterOptions& options) {
        std::unique_ptr<BasicSegmenter<T>> found;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!kept_.empty()) {
                found = std::move(kept_.back());
                kept_.pop_back();
            }
        }
        if (!found) found = std::make_unique<BasicSegmenter<T>>();
        found->set_options(options);
        return found;
    }
    void give(std::unique_ptr<BasicSegmenter<T>> segmenter) {
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
    std::vector<std::unique_ptr<BasicSegmenter<T>>> kept_;
};

// Never destroyed: a thread may still hold one of its segmenters while the process ends.
template <class T>
Shelf<T>& shelf() {
    static auto* the_shelf = new Shelf<T>;
    return *the_shelf;
}

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

template <class T>
py::tuple segment(const py::array_t<T, py::array::c_style>& map, py::array features, const SegmenterOptions& options,
                  const std::int64_t* candidates, std::int64_t n_candidates, std::int64_t limit, const bool* skip) {
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
    first.candidates = candidates;
    first.n_candidates = n_candidates;
    first.limit = limit;
    std::vector<SegmentResult> results(static_cast<std::size_t>(batch));
    {
        py::gil_scoped_release release;
        const int threads = resolve_threads(options.threads);
        const int workers = static_cast<int>(std::min<std::int64_t>(threads, batch));
        SegmenterOptions each = options;
        each.threads = batch > 1 ? 1 : threads;
        std::vector<std::unique_ptr<BasicSegmenter<T>>> segmenters(static_cast<std::size_t>(workers));
        parallel_for(batch, workers, [&](std::int64_t i, int worker) {
            if (skip && skip[i]) {
                std::fill_n(mask_out + i * size, size, std::uint8_t{0});
                std::fill_n(decision_out + i * size, size, 0.0f);
                std::fill_n(labels_out + i * size, size, std::int8_t{0});
                status_out[i] = static_cast<std::int8_t>(SegmentStatus::nominal);
                return;
            }
            if (!segmenters[worker]) segmenters[worker] = shelf<T>().take(each);
            SegmentInput<T> input = first;
            input.anomaly_map += i * size;
            input.features += i * stride;
            results[i] =
                (*segmenters[worker])(input, {mask_out + i * size, decision_out + i * size, labels_out + i * size});
            status_out[i] = static_cast<std::int8_t>(results[i].status);
        });
        for (auto& segmenter : segmenters) {
            if (segmenter) shelf<T>().give(std::move(segmenter));
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

py::tuple segment_any(const py::array& map, const py::array& features, double percentile, std::int64_t radius,
                      const py::array_t<std::int64_t, py::array::c_style>& candidates, std::int64_t limit, double C,
                      const std::string& loss, double tol, int max_iter, const py::object& skip, int threads) {
    check_axes(map, "anomaly_map", 3, 3);
    check_axes(features, "features", 4, 4);
    if (features.shape(0) != map.shape(0)) {
        throw py::value_error("features: expected a batch of " + std::to_string(map.shape(0)) + ", got shape " +
                              shape_text(features));
    }
    if (candidates.ndim() != 1)
        throw py::value_error("candidates: expected 1 dimension, got shape " + shape_text(candidates));
    if (loss != "squared_hinge" && loss != "hinge")
        throw py::value_error("loss: expected squared_hinge or hinge, got " + loss);
    SegmenterOptions options;
    options.percentile = percentile;
    options.neighbor_radius = radius;
    options.C = C;
    options.loss = loss == "hinge" ? Loss::hinge : Loss::squared_hinge;
    options.tol = tol;
    options.max_iter = max_iter;
    options.threads = threads;
    py::array_t<bool, py::array::c_style> gate;
    if (!skip.is_none()) {
        gate = py::array_t<bool, py::array::c_style>(skip);
        if (gate.ndim() != 1 || gate.shape(0) != map.shape(0)) {
            throw py::value_error("skip: expected one flag an image, got shape " + shape_text(gate));
        }
    }
    const bool* flags = skip.is_none() ? nullptr : gate.data();
    // An empty array has no address worth passing on, and null means the default grid.
    static const std::int64_t none = 0;
    const std::int64_t* pixels = candidates.size() ? candidates.data() : &none;
    try {
        if (is_dtype(map, 'f', 4) && is_dtype(features, 'f', 4)) {
            return segment<float>(map, features, options, pixels, candidates.size(), limit, flags);
        }
        if (is_dtype(map, 'f', 8) && is_dtype(features, 'f', 8)) {
            return segment<double>(map, features, options, pixels, candidates.size(), limit, flags);
        }
    } catch (const InvalidArgument& error) {
        throw py::value_error(error.what());
    }
    throw py::type_error("anomaly_map, features: expected both float32 or both float64, got " +
                         py::str(map.dtype()).cast<std::string>() + " and " +
                         py::str(features.dtype()).cast<std::string>());
}

}  // namespace

void bind_segment(py::module_& module) {
    module.def("segment", &segment_any, py::arg("anomaly_map"), py::arg("features"), py::arg("percentile"),
               py::arg("neighbor_radius"), py::arg("candidates"), py::arg("limit"), py::arg("C"), py::arg("loss"),
               py::arg("tol"), py::arg("max_iter"), py::arg("skip") = py::none(), py::arg("threads") = 0,
               "(B, H, W) and (B, C, h, w), both float32 or both float64 -> mask, decision, labels, status, details.");
    module.def(
        "release_memory", [] { return shelf<float>().clear() + shelf<double>().clear(); },
        "Free the memory that segmentation keeps between calls; returns how many bytes.");
}

}  // namespace ttt4as
