// The hot loops under sketch.hpp, knn.cpp and coreset.cpp, one table per instruction set (see ttt4as/simd.hpp).
#pragma once

#include <cstdint>

namespace ttt4as {

constexpr int kStrip = 64;  // points whose codes lie together
constexpr int kQuad = 4;    // code bytes of a point that lie together, and queries that a kernel takes at once
constexpr int kPanel = 64;  // columns of a basis that `project` makes at once

constexpr int kSpill = 16;  // elements that a compressed store may write in vain

constexpr std::int32_t kLeastKey = -(1 << 29);  // below the key of every point there is, above that of every absent one
constexpr std::int32_t kMostKey = 0x7FFFFFFF;

// A point of a strip may be near enough if its key is at least (level - radius^2) / 2 - 2, where
// radius = inverse (reach + the strip's error), and is of interest below `seen`.
struct CoarseBound {
    double level, inverse, reach;
    std::int32_t seen;
};

// |q - p|^2 >= coarse (level - 2 key - 1) - coarse rest + fine (distance - rest) with an error of the query's own and
// its strip's, in units of c; of interest is what may be nearer than `reach`.
struct FineBound {
    double level, coarse, fine, error, reach;
};

// The codes of `count` queries, one after the other, as bytes and widened. `dims`, as everywhere, is a multiple of 4,
// and above 64 one of 64.
struct QueryCodes {
    const std::int8_t* bytes;
    const std::int16_t* words;
    std::int64_t count, dims;
};

// Codes of a strip: for every four dimensions, 64 points times 4 bytes, each code + 128.
struct SketchKernels {
    // Of strips that lie one after the other, and a multiple of 4 queries:
    // keys[q * key_stride + s * kStrip + p] = sum_d strip_s[d][p] * query_q[d] - offset[s * kStrip + p], and
    // best[q * best_stride + s] = the greatest of a strip's.
    void (*keys)(const std::uint8_t* codes, std::int64_t strips, const QueryCodes& queries, const std::int32_t* offset,
                 std::int32_t* keys, std::int64_t key_stride, std::int32_t* best, std::int64_t best_stride);
    // The points of a strip whose key for one query reaches `least`, one bit a point, point 0 lowest.
    std::uint64_t (*reach)(const std::uint8_t* strip, const std::int8_t* bytes, const std::int16_t* words,
                           std::int64_t dims, const std::int32_t* offset, std::int32_t least);
    // The keys in [low, high), one bit each.
    std::uint64_t (*between)(const std::int32_t* keys, std::int32_t low, std::int32_t high);
    // A bound that `wanted` of n >= wanted >= 1 keys reach; more of them only where keys are equal.
    std::int32_t (*nth_greatest)(const std::int32_t* keys, std::int64_t n, std::int64_t wanted);
    // The points of each strip that `bound` leaves over for one query, one bit each -> bits[s]; how many are added to
    // counts[s]. keys[s * kStrip + p], with best[s] the greatest of a strip.
    void (*leave_strips)(const CoarseBound& bound, const double* strip_errors, const std::int32_t* keys,
                         const std::int32_t* best, std::int64_t strips, std::uint64_t* bits, std::int32_t* counts);
    // left[q], for 4 queries: the points for which keys[q * key_stride + p] and what `keys` would find for this strip
    // add up to least[q] or more, one bit each.
    void (*refine)(const std::uint8_t* strip, const std::int8_t* bytes, const std::int16_t* words, std::int64_t dims,
                   const std::int32_t* offset, const std::int32_t* keys, std::int64_t key_stride,
                   const std::int32_t* least, std::uint64_t* left);
    // Of the 64 points from position `first` on, those whose bit is set: positions and keys, in order. Returns how
    // many. Writes up to kSpill elements beyond them.
    std::int64_t (*collect)(const std::int32_t* keys, std::uint64_t bits, std::int32_t first, std::int32_t* positions,
                            std::int32_t* found);
    // out[j] = sum (query[i] - codes[positions[j] * n + i])^2, n a multiple of 64, at most 2^15. Unless null,
    // rests[j] = the part of i = n - 2.
    void (*code_distances)(const std::int8_t* query, const std::int8_t* codes, std::int64_t n,
                           const std::int32_t* positions, std::int64_t count, std::int32_t* out, std::int32_t* rests);
    // The points that `bound` leaves over: their positions, in order and in place, and how far away they are at least.
    // Returns how many. Point j has the codes' distances and rests of `code_distances`, and the error of its strip.
    // Reads up to kSpill elements beyond all arrays, and writes as many beyond what it returns.
    std::int64_t (*leave)(const FineBound& bound, const std::int32_t* keys, const std::int32_t* distances,
                          const std::int32_t* rests, const double* strip_errors, std::int32_t* positions,
                          std::int64_t count, double* bounds);
    // codes[i] = x[i] / step, clipped to +-127 and rounded, n a multiple of 16. Returns the sum of squares by which the
    // rounding moved what was clipped.
    float (*quantise)(const float* x, std::int64_t n, float step, std::int8_t* codes);
    // out[i] = (row[i] - mean[i]) * scale. Returns the sum of their squares.
    double (*centre_float)(const float* row, const double* mean, double scale, std::int64_t n, float* out);
    double (*centre_double)(const double* row, const double* mean, double scale, std::int64_t n, float* out);
    // x becomes H (signs * x) * factor; H applies the unnormalised Hadamard matrix of order `rows` (a power of two) to
    // rows of 16 elements, over again for every 16 * rows of the n elements.
    void (*mix)(float* x, const float* signs, std::int64_t n, std::int64_t rows, float factor);
    // out[r * out_stride + j] = sum_i x[r * x_stride + i] * panel[i * kPanel + j] for 4 rows, j < kPanel.
    void (*project)(const float* x, std::int64_t x_stride, std::int64_t n, const float* panel, float* out,
                    std::int64_t out_stride);
    // panel[i * kPanel + j] += sum_r x[r * x_stride + i] * y[r * y_stride + j] for r < rows.
    void (*project_back)(const float* x, std::int64_t x_stride, std::int64_t n, const float* y, std::int64_t y_stride,
                         std::int64_t rows, float* panel);
    // sum (query[i] - point[i])^2 in double. Stops early, above `limit`, once the sum has passed it.
    double (*squared_float)(const double* query, const float* point, std::int64_t n, double limit);
    double (*squared_double)(const double* query, const double* point, std::int64_t n, double limit);
};

const SketchKernels& sketch_kernels() noexcept;

namespace generic {
extern const SketchKernels sketch_table;
}
namespace avx2 {
extern const SketchKernels sketch_table;
extern const SketchKernels sketch_table_vnni;  // where the compiler knows AVX-VNNI
}  // namespace avx2
namespace avx512 {
extern const SketchKernels sketch_table;
extern const SketchKernels sketch_table_vnni;
// SketchKernels::keys on AMX, where the compiler knows it and the processor and the system allow it.
void keys_by_tiles(const std::uint8_t* codes, std::int64_t strips, const QueryCodes& queries,
                   const std::int32_t* offset, std::int32_t* keys, std::int64_t key_stride, std::int32_t* best,
                   std::int64_t best_stride);
}  // namespace avx512

}  // namespace ttt4as
