// The C functions of ttt4as/c_api.h: every exception becomes a code and a message.
#include "ttt4as/c_api.h"

#include <cstdio>
#include <exception>
#include <new>

#include "ttt4as/knn.hpp"
#include "ttt4as/segmenter.hpp"
#include "ttt4as/threads.hpp"

struct ttt4as_segmenter {
    ttt4as::Segmenter segmenter;
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
    } catch (const std::exception& error) {
        return fail(TTT4AS_UNKNOWN_ERROR, error.what());
    } catch (...) {
        return fail(TTT4AS_UNKNOWN_ERROR, "unknown error");
    }
}

}  // namespace

extern "C" {

const char* ttt4as_version(void) { return TTT4AS_VERSION; }
const char* ttt4as_last_error(void) { return message; }
int ttt4as_get_num_threads(void) { return ttt4as::max_threads(); }
void ttt4as_set_num_threads(int n) { ttt4as::set_num_threads(n); }

void ttt4as_default_options(ttt4as_options* options) {
    const ttt4as::SegmenterOptions defaults;
    *options = {defaults.percentile, defaults.neighbor_radius, defaults.n_nominal, defaults.C, TTT4AS_SQUARED_HINGE,
                defaults.tol,        defaults.max_iter,        defaults.threads};
}

ttt4as_segmenter* ttt4as_segmenter_create(const ttt4as_options* options) {
    ttt4as_segmenter* made = nullptr;
    guarded([&] {
        ttt4as::SegmenterOptions wanted;
        if (options) {
            if (options->loss != TTT4AS_SQUARED_HINGE && options->loss != TTT4AS_HINGE) {
                throw ttt4as::InvalidArgument("loss: expected TTT4AS_SQUARED_HINGE or TTT4AS_HINGE");
            }
            wanted.percentile = options->percentile;
            wanted.neighbor_radius = options->neighbor_radius;
            wanted.n_nominal = options->n_nominal;
            wanted.C = options->C;
            wanted.loss = options->loss == TTT4AS_HINGE ? ttt4as::Loss::hinge : ttt4as::Loss::squared_hinge;
            wanted.tol = options->tol;
            wanted.max_iter = options->max_iter;
            wanted.threads = options->threads;
        }
        made = new ttt4as_segmenter{ttt4as::Segmenter(wanted)};
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
        const auto result = segmenter->segmenter(input, {pred_mask, decision_map, pseudo_labels});
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
        if (!bank) throw ttt4as::InvalidArgument("bank: expected an address, got NULL");
        made = new ttt4as_knn_index{ttt4as::KnnIndex(ttt4as::Matrix<const float>{bank, rows, cols, cols}, threads)};
        return 0;
    });
    return made;
}

void ttt4as_knn_destroy(ttt4as_knn_index* index) { delete index; }

int ttt4as_knn_search(const ttt4as_knn_index* index, const float* query, int64_t rows, int64_t k, float* distances,
                      int64_t* indices, int threads) {
    if (!index) return fail(TTT4AS_INVALID_ARGUMENT, "index: expected a handle, got NULL");
    return guarded([&] {
        if (!query || !distances || !indices) throw ttt4as::InvalidArgument("query, distances, indices: got NULL");
        const std::int64_t dim = index->index.dim();
        index->index.search(ttt4as::Matrix<const float>{query, rows, dim, dim}, k, distances, indices, threads);
        return 0;
    });
}

}  // extern "C"
