// The C functions of ttt4as/c_api.h: every exception becomes a code and a message.
#include "ttt4as/c_api.h"

#include <cmath>
#include <cstdio>
#include <exception>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "linear.hpp"
#include "options.hpp"
#include "ttt4as/knn.hpp"
#include "ttt4as/robust.hpp"
#include "ttt4as/segmenter.hpp"
#include "ttt4as/threads.hpp"

struct ttt4as_segmenter {
    std::variant<ttt4as::Segmenter, ttt4as::RobustSegmenter> segmenter;
};
struct ttt4as_knn_index {
    ttt4as::KnnIndex index;
};

namespace {

thread_local char message[512] = "";

int fail(int code, const char* text) noexcept {
    std::snprintf(message, sizeof message, "%s", text);
    return code;
}

// Runs body; its result, or the code of what it threw.
template <class Body>
int guarded(Body&& body) noexcept {
    try {
        return body();
    } catch (const ttt4as::InvalidArgument& error) {
        return fail(TTT4AS_INVALID_ARGUMENT, error.what());
    } catch (const std::bad_alloc&) {
        return fail(TTT4AS_OUT_OF_MEMORY, "out of memory");
    } catch (const std::length_error&) {  // more than any memory holds
        return fail(TTT4AS_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception& error) {
        return fail(TTT4AS_UNKNOWN_ERROR, error.what());
    } catch (...) {
        return fail(TTT4AS_UNKNOWN_ERROR, "unknown error");
    }
}

ttt4as::Loss loss_of(std::int32_t loss) {
    if (loss != TTT4AS_SQUARED_HINGE && loss != TTT4AS_HINGE) {
        throw ttt4as::InvalidArgument("loss: expected TTT4AS_SQUARED_HINGE or TTT4AS_HINGE, got " +
                                      std::to_string(loss));
    }
    return loss == TTT4AS_HINGE ? ttt4as::Loss::hinge : ttt4as::Loss::squared_hinge;
}

bool flag(std::int32_t value, const char* name) {
    if (value != 0 && value != 1)
        throw ttt4as::InvalidArgument(std::string(name) + ": expected 0 or 1, got " + std::to_string(value));
    return value == 1;
}

std::optional<double> known(double value) { return std::isnan(value) ? std::nullopt : std::optional<double>(value); }

double or_nan(const std::optional<double>& value) { return value.value_or(std::numeric_limits<double>::quiet_NaN()); }

struct Stopped {
    int code;
};

// The values of `rows` x `cols`, which must be finite.
ttt4as::Matrix<const float> finite(const char* name, const float* values, std::int64_t rows, std::int64_t cols) {
    ttt4as::check_address(name, values);
    const auto possible = [](std::int64_t n) { return n >= 1 && n <= std::numeric_limits<std::int32_t>::max(); };
    if (possible(rows) && possible(cols) && !std::isfinite(ttt4as::max_abs_kernel<float>()(values, rows * cols)))
        throw ttt4as::InvalidArgument(std::string(name) + ": expected finite values, got NaN or infinity");
    return {values, rows, cols, cols};
}

}  // namespace

extern "C" {

const char* ttt4as_version(void) { return TTT4AS_VERSION; }
const char* ttt4as_last_error(void) { return message; }
int ttt4as_get_num_threads(void) { return ttt4as::max_threads(); }
void ttt4as_set_num_threads(int n) { ttt4as::set_num_threads(n); }

void ttt4as_default_options(ttt4as_options* options) {
    if (!options) return;
    const ttt4as::SegmenterOptions defaults;
    *options = {defaults.percentile, defaults.neighbor_radius, defaults.n_nominal, defaults.C, TTT4AS_SQUARED_HINGE,
                defaults.tol,        defaults.max_iter,        defaults.threads};
}

ttt4as_segmenter* ttt4as_segmenter_create(const ttt4as_options* options) {
    ttt4as_segmenter* made = nullptr;
    guarded([&] {
        ttt4as::SegmenterOptions wanted;
        if (options) {
            wanted.percentile = options->percentile;
            wanted.neighbor_radius = options->neighbor_radius;
            wanted.n_nominal = options->n_nominal;
            wanted.C = options->C;
            wanted.loss = loss_of(options->loss);
            wanted.tol = options->tol;
            wanted.max_iter = options->max_iter;
            wanted.threads = options->threads;
        }
        made = new ttt4as_segmenter{ttt4as::Segmenter(wanted)};
        return 0;
    });
    return made;
}

void ttt4as_default_robust_options(ttt4as_robust_options* options) {
    if (!options) return;
    const ttt4as::RobustOptions defaults;
    *options = {or_nan(defaults.nominal_level),
                defaults.nominal_share,
                defaults.nominal_weight,
                or_nan(defaults.height),
                defaults.base_quantile,
                defaults.core,
                defaults.n_core,
                defaults.n_background,
                defaults.core_weight,
                defaults.background_weight,
                defaults.hard_share,
                defaults.size_exponent,
                defaults.standardize,
                defaults.recentre,
                defaults.score_weight,
                defaults.C,
                TTT4AS_SQUARED_HINGE,
                defaults.tol,
                defaults.max_iter,
                defaults.threads};
}

ttt4as_segmenter* ttt4as_robust_segmenter_create(const ttt4as_robust_options* options) {
    ttt4as_segmenter* made = nullptr;
    guarded([&] {
        ttt4as::RobustOptions wanted;
        if (options) {
            wanted.nominal_level = known(options->nominal_level);
            wanted.nominal_share = options->nominal_share;
            wanted.nominal_weight = options->nominal_weight;
            wanted.height = known(options->height);
            wanted.base_quantile = options->base_quantile;
            wanted.core = options->core;
            wanted.n_core = options->n_core;
            wanted.n_background = options->n_background;
            wanted.core_weight = options->core_weight;
            wanted.background_weight = options->background_weight;
            wanted.hard_share = options->hard_share;
            wanted.size_exponent = options->size_exponent;
            wanted.standardize = flag(options->standardize, "standardize");
            wanted.recentre = flag(options->recentre, "recentre");
            wanted.score_weight = options->score_weight;
            wanted.C = options->C;
            wanted.loss = loss_of(options->loss);
            wanted.tol = options->tol;
            wanted.max_iter = options->max_iter;
            wanted.threads = options->threads;
        }
        made = new ttt4as_segmenter{ttt4as::RobustSegmenter(wanted)};
        return 0;
    });
    return made;
}

void ttt4as_segmenter_destroy(ttt4as_segmenter* segmenter) { delete segmenter; }

int ttt4as_segment(ttt4as_segmenter* segmenter, const float* anomaly_map, int64_t height, int64_t width,
                   const float* features, int64_t channels, int64_t feature_height, int64_t feature_width,
                   int channels_last, uint8_t* pred_mask, float* decision_map, int8_t* pseudo_labels) {
    if (!segmenter) return fail(TTT4AS_INVALID_ARGUMENT, "segmenter: expected a handle, got NULL");
    return guarded([&] {
        ttt4as::SegmentInput<float> input;
        input.anomaly_map = anomaly_map;
        input.height = height;
        input.width = width;
        input.features = features;
        input.channels = channels;
        input.feature_height = feature_height;
        input.feature_width = feature_width;
        input.channels_last = channels_last != 0;
        const ttt4as::SegmentOutput output{pred_mask, decision_map, pseudo_labels};
        const auto result = std::visit([&](auto& chosen) { return chosen(input, output); }, segmenter->segmenter);
        if (result.bad != ttt4as::BadInput::none) {
            throw ttt4as::InvalidArgument(result.bad == ttt4as::BadInput::features
                                              ? "features: expected finite values, got NaN or infinity"
                                              : "anomaly_map: expected finite values, got NaN or infinity");
        }
        return static_cast<int>(result.status);
    });
}

ttt4as_knn_index* ttt4as_knn_create(const float* bank, int64_t rows, int64_t cols, int threads) {
    ttt4as_knn_index* made = nullptr;
    guarded([&] {
        made = new ttt4as_knn_index{ttt4as::KnnIndex(finite("bank", bank, rows, cols), threads)};
        return 0;
    });
    return made;
}

void ttt4as_knn_destroy(ttt4as_knn_index* index) { delete index; }

int ttt4as_knn_save(const ttt4as_knn_index* index, ttt4as_sink sink, void* context) {
    if (!index || !sink) return fail(TTT4AS_INVALID_ARGUMENT, "index, sink: expected both, got NULL");
    return guarded([&] {
        try {
            index->index.save([&](const void* data, std::size_t bytes) {
                if (const int code = sink(context, data, bytes)) throw Stopped{code};
            });
        } catch (const Stopped& stopped) {
            return stopped.code;
        }
        return 0;
    });
}

ttt4as_knn_index* ttt4as_knn_open(const float* bank, int64_t rows, int64_t cols, const void* prepared, size_t bytes,
                                  int verify) {
    ttt4as_knn_index* made = nullptr;
    guarded([&] {
        const ttt4as::Matrix<const float> points{bank, rows, cols, cols};
        made = new ttt4as_knn_index{ttt4as::KnnIndex(points, prepared, bytes, verify != 0)};
        return 0;
    });
    return made;
}

int ttt4as_knn_search(const ttt4as_knn_index* index, const float* query, int64_t rows, int64_t k, float* distances,
                      int64_t* indices, int threads) {
    if (!index) return fail(TTT4AS_INVALID_ARGUMENT, "index: expected a handle, got NULL");
    return guarded([&] {
        index->index.search(finite("query", query, rows, index->index.dim()), k, distances, indices, threads);
        return 0;
    });
}

}  // extern "C"
