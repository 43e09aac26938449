/* The library for other languages: plain C types, opaque handles, no exception ever crosses.
 *
 * A function that can fail returns a negative ttt4as_error (or NULL); ttt4as_last_error() then has the message, of the
 * last failure on the calling thread, until the next. Handles serve one thread at a time; different handles any number.
 *
 * The library is C++: in CMake enable both languages, else link with -lttt4as -lstdc++ -lm -pthread. It keeps threads
 * and so must stay loaded: the shared library does by itself; a plugin that has the static one within must not be
 * unloaded (on Linux: link it with -Wl,-z,nodelete).
 */
#ifndef TTT4AS_C_API_H
#define TTT4AS_C_API_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TTT4AS_C_API
#else
#define TTT4AS_C_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum ttt4as_error { TTT4AS_INVALID_ARGUMENT = -1, TTT4AS_OUT_OF_MEMORY = -2, TTT4AS_UNKNOWN_ERROR = -3 };

enum ttt4as_status { /* what ttt4as_segment returns when it succeeds */
                     TTT4AS_OK = 0,
                     TTT4AS_DEGENERATE = 2,   /* a constant map, or a class without a pixel: an empty mask */
                     TTT4AS_NOT_CONVERGED = 3 /* the mask comes from the last iterate */
};

enum ttt4as_loss { TTT4AS_SQUARED_HINGE = 0, TTT4AS_HINGE = 1 };

typedef struct ttt4as_options {
    double percentile;       /* of the anomaly map, [0, 100]: the least value of a peak */
    int64_t neighbor_radius; /* pixels by which peaks grow, >= 0 */
    int64_t n_nominal;       /* nominal samples aimed at, >= 1 */
    double C;                /* weight of the SVM's losses, > 0 */
    int32_t loss;            /* ttt4as_loss */
    double tol;              /* relative duality gap, > 0 */
    int32_t max_iter;        /* >= 1 */
    int32_t threads;         /* 0: the process's limit */
} ttt4as_options;

typedef struct ttt4as_robust_options { /* see ttt4as/robust.hpp */
    double nominal_level;              /* NAN: not known */
    double nominal_share;              /* [0, 0.99] */
    double nominal_weight;             /* [0, 1] */
    double height;                     /* [0.01, 0.99]; NAN: where the map is steepest */
    double base_quantile;              /* [0, 1] */
    double core;                       /* [0, 0.99] */
    int64_t n_core;                    /* >= 1 */
    int64_t n_background;              /* >= 1 */
    double core_weight;                /* > 0 */
    double background_weight;          /* > 0 */
    double hard_share;                 /* [0, 1] */
    double size_exponent;              /* [0, 2] */
    int32_t standardize;               /* 0 or 1 */
    int32_t recentre;                  /* 0 or 1 */
    double score_weight;               /* >= 0 */
    double C;                          /* > 0 */
    int32_t loss;                      /* ttt4as_loss */
    double tol;                        /* > 0 */
    int32_t max_iter;                  /* >= 1 */
    int32_t threads;                   /* 0: the process's limit */
} ttt4as_robust_options;

typedef struct ttt4as_segmenter ttt4as_segmenter;
typedef struct ttt4as_knn_index ttt4as_knn_index;

TTT4AS_C_API const char* ttt4as_version(void);
TTT4AS_C_API const char* ttt4as_last_error(void);

/* The most threads any call uses; n < 1 returns to the default. */
TTT4AS_C_API int ttt4as_get_num_threads(void);
TTT4AS_C_API void ttt4as_set_num_threads(int n);

TTT4AS_C_API void ttt4as_default_options(ttt4as_options* options);
TTT4AS_C_API void ttt4as_default_robust_options(ttt4as_robust_options* options);

/* By the paper's labels, or by the robust preset's. NULL options: the defaults. NULL on failure. */
TTT4AS_C_API ttt4as_segmenter* ttt4as_segmenter_create(const ttt4as_options* options);
TTT4AS_C_API ttt4as_segmenter* ttt4as_robust_segmenter_create(const ttt4as_robust_options* options);
TTT4AS_C_API void ttt4as_segmenter_destroy(ttt4as_segmenter* segmenter);

/* anomaly_map (height, width) and features (channels, feature_height, feature_width), or with channels_last
 * (feature_height, feature_width, channels) -> pred_mask 0 or 1, decision_map, pseudo_labels 1, -1 or 0, each (height,
 * width). Returns a ttt4as_status, or a ttt4as_error. A call that needs no more memory than those before allocates
 * none: it grows with the shapes and the number of labelled pixels.
 */
TTT4AS_C_API int ttt4as_segment(ttt4as_segmenter* segmenter, const float* anomaly_map, int64_t height, int64_t width,
                                const float* features, int64_t channels, int64_t feature_height, int64_t feature_width,
                                int channels_last, uint8_t* pred_mask, float* decision_map, int8_t* pseudo_labels);

/* An index over bank (rows, cols), finite, which must outlive it. NULL on failure. */
TTT4AS_C_API ttt4as_knn_index* ttt4as_knn_create(const float* bank, int64_t rows, int64_t cols, int threads);
TTT4AS_C_API void ttt4as_knn_destroy(ttt4as_knn_index* index);

/* Hands what was prepared to sink, piece after piece: one block of bytes. Anything but 0 from sink stops it, and is
 * what ttt4as_knn_save returns, so let it be positive. */
typedef int (*ttt4as_sink)(void* context, const void* data, size_t bytes);
TTT4AS_C_API int ttt4as_knn_save(const ttt4as_knn_index* index, ttt4as_sink sink, void* context);

/* The index again from that block, aligned to 64 bytes, and the same bank; both must outlive it and may be
 * memory-mapped. verify 0 leaves out the checksum over most of the block, which reads all of it. NULL on failure. */
TTT4AS_C_API ttt4as_knn_index* ttt4as_knn_open(const float* bank, int64_t rows, int64_t cols, const void* prepared,
                                               size_t bytes, int verify);

/* query (rows, cols as the bank), finite -> Euclidean distances and indices of the k nearest rows of the bank, (rows,
 * k), nearest first. Returns 0, or a ttt4as_error. Safe from many threads. */
TTT4AS_C_API int ttt4as_knn_search(const ttt4as_knn_index* index, const float* query, int64_t rows, int64_t k,
                                   float* distances, int64_t* indices, int threads);

#ifdef __cplusplus
}
#endif

#endif
