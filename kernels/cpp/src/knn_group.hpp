// The search of knn.cpp for one group of queries, which meet one segment of the bank after the other: keys for all its
// points from the coarse codes, the points of the highest keys measured, and of the rest what the bounds leave over,
// by coarser and finer codes in turn.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "knn_candidates.hpp"
#include "sketch.hpp"

namespace ttt4as {

constexpr std::int64_t kMostGroup = 32;         // queries
constexpr std::int32_t kLeastKey = -(1 << 29);  // below the key of every point there is, above that of every absent one
constexpr std::int32_t kMostKey = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kFirstLines = 512;  // bytes of a row to ask for early: the processor then sees the stream

// What one thread needs; grows to its size once.
struct GroupScratch {
    Encoded encoded[kMostGroup / kQuad];
    Buffer<double> rows;  // the queries in double
    Buffer<std::int32_t> keys, best;
    std::vector<std::int32_t> order;
    Buffer<std::int32_t> positions, survivor_keys;  // of those that the coarse bound leaves over
    Buffer<std::int32_t> distances, rests;          // between codes
    Buffer<double> bounds;                          // of what the fine codes leave over
    std::vector<std::uint64_t> candidates;          // of the fine bound
    Nearest nearest[kMostGroup];
    std::int64_t fine = 0, whole = 0, measured = 0;
};

inline double measure(const SketchKernels& kernels, const double* query, const float* row, std::int64_t n,
                      double limit) {
    return kernels.squared_float(query, row, n, limit);
}
inline double measure(const SketchKernels& kernels, const double* query, const double* row, std::int64_t n,
                      double limit) {
    return kernels.squared_double(query, row, n, limit);
}

// At most one above `value`.
inline std::int32_t to_key(double value) {
    if (!(value > kLeastKey)) return kLeastKey;
    return value < kMostKey ? static_cast<std::int32_t>(value) : kMostKey;
}

inline void fetch(const void* memory, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(memory) + i);
}

// A sketch with the codes of the whole bank.
struct CodeView {
    const Sketch* sketch;
    const Strips* strips;
    std::int64_t group, segment;
    double patience;  // the share of the points that may be left over before a query is given up
};

template <class T>
class GroupSearch {
  public:
    // `order`: the points' ids by their position in the codes.
    GroupSearch(Matrix<const T> bank, const std::int32_t* order, const SketchKernels& kernels, CodeView view,
                GroupScratch& scratch)
        : bank_(bank), order_(order), kernels_(kernels), view_(view), scratch_(scratch) {}

    // The k nearest of the queries `ids`, `n` of them -> scratch.nearest; hard[id] where the bounds leave too much.
    template <class Q>
    void search(Matrix<const Q> query, const std::int64_t* ids, int n, std::int64_t k,
                std::vector<std::uint8_t>& hard) {
        const std::int64_t columns = bank_.cols, dims = view_.sketch->coarse_dims(), strips = view_.strips->strips();
        const std::int64_t segment = std::min(view_.segment, strips), stride = segment * kStrip;
        scratch_.rows.resize(view_.group * columns);
        scratch_.keys.resize(view_.group * stride);
        scratch_.best.resize(view_.group * segment);
        for (auto* of_points : {&scratch_.positions, &scratch_.survivor_keys, &scratch_.distances, &scratch_.rests})
            of_points->resize(stride + kSpill);
        scratch_.bounds.resize(stride);
        for (int q = 0; q < n; ++q) {
            for (std::int64_t i = 0; i < columns; ++i) scratch_.rows[q * columns + i] = double(query.row(ids[q])[i]);
            scratch_.nearest[q].start(static_cast<std::size_t>(k));
        }
        const int quads = (n + kQuad - 1) / kQuad;
        for (int b = 0; b < quads; ++b) {
            const double* rows[kQuad] = {};
            const int m = std::min<int>(kQuad, n - b * kQuad);
            for (int q = 0; q < m; ++q) rows[q] = scratch_.rows.data() + (b * kQuad + q) * columns;
            view_.sketch->encode(rows, m, scratch_.encoded[b]);
        }
        for (std::int64_t begin = 0; begin < strips; begin += segment) {
            const std::int64_t here = std::min(segment, strips - begin);
            for (std::int64_t s = 0; s < here; ++s) {
                for (int b = 0; b < quads; ++b) {
                    const Encoded& encoded = scratch_.encoded[b];
                    kernels_.keys(view_.strips->strip(begin + s), encoded.coarse.data(), encoded.words.data(), dims,
                                  view_.strips->half_norms(begin + s),
                                  scratch_.keys.data() + b * kQuad * stride + s * kStrip, stride,
                                  scratch_.best.data() + b * kQuad * segment + s, segment);
                }
            }
            for (int q = 0; q < n; ++q) {
                if (hard[ids[q]]) continue;
                if (!search_segment(q, begin, here, stride, segment)) hard[ids[q]] = 1;
            }
        }
    }

  private:
    void measure_at(int q, std::int32_t position) {
        Nearest& nearest = scratch_.nearest[q];
        const std::int32_t id = order_[position];
        nearest.offer(
            measure(kernels_, scratch_.rows.data() + q * bank_.cols, bank_.row(id), bank_.cols, nearest.worst()), id);
        ++scratch_.measured;
    }

    // Points of strip s of the segment with a key in [low, high) -> positions and survivor_keys, from `at` on.
    std::int64_t collect(std::int64_t begin, std::int64_t s, const std::int32_t* keys, std::int32_t low,
                         std::int32_t high, std::int64_t at) {
        return kernels_.collect(keys + s * kStrip, low, high, static_cast<std::int32_t>((begin + s) * kStrip),
                                scratch_.positions.data() + at, scratch_.survivor_keys.data() + at);
    }

    // The points of the highest keys fill the heap: they are hard to beat. False if they are all of the segment.
    bool fill(int q, std::int64_t begin, std::int64_t strips, const std::int32_t* keys, const std::int32_t* best,
              std::int32_t& seen) {
        const Nearest& nearest = scratch_.nearest[q];
        const std::int64_t wanted = static_cast<std::int64_t>(nearest.k - nearest.heap.size());
        const std::int64_t points = std::min(strips * kStrip, bank_.rows - begin * kStrip);
        if (wanted == 0) return true;
        seen = wanted < points ? nth_key(keys, best, strips, wanted, scratch_.order) : kLeastKey;
        std::int64_t count = 0;
        for (std::int64_t s = 0; s < strips; ++s) {
            if (best[s] < seen) continue;
            count += collect(begin, s, keys, seen, kMostKey, count);
        }
        if (2 * wanted < count) {  // the bounds may rule out the others yet
            scratch_.order.assign(scratch_.survivor_keys.data(), scratch_.survivor_keys.data() + count);
            std::nth_element(scratch_.order.begin(), scratch_.order.begin() + (2 * wanted - 1), scratch_.order.end(),
                             std::greater<std::int32_t>());
            seen = scratch_.order[2 * wanted - 1];
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (scratch_.survivor_keys[i] >= seen) fetch(bank_.row(order_[scratch_.positions[i]]), kFirstLines);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (scratch_.survivor_keys[i] >= seen) measure_at(q, scratch_.positions[i]);
        }
        return wanted < points;
    }

    // Lets the points of one segment compete for query q. False if the bounds leave too much.
    bool search_segment(int q, std::int64_t begin, std::int64_t strips, std::int64_t stride, std::int64_t segment) {
        const Encoded& encoded = scratch_.encoded[q / kQuad];
        const int lane = q % kQuad;
        const std::int32_t* keys = scratch_.keys.data() + q * stride;
        const std::int32_t* best = scratch_.best.data() + q * segment;
        Nearest& nearest = scratch_.nearest[q];
        const std::int64_t points = std::min(strips * kStrip, bank_.rows - begin * kStrip);

        const double level = double(encoded.level[lane]);  // |codes_q - codes_p|^2 >= level - 2 * key

        std::int32_t seen = kMostKey;  // points with a key from here on have been measured
        if (!fill(q, begin, strips, keys, best, seen)) return true;

        // What the coarse bound leaves over.
        const double step = view_.sketch->coarse_step(), scale = view_.sketch->scale();
        const double reach = std::sqrt(nearest.worst()) * scale * (1.0 + 1e-6);
        const std::int64_t most = 64 + static_cast<std::int64_t>(view_.patience * static_cast<double>(points));
        std::int64_t left = 0;
        const double own = reach + encoded.coarse_error[lane], inverse = 1.0 / step;
        for (std::int64_t s = 0; s < strips; ++s) {
            const double radius = (own + view_.strips->coarse_error(begin + s)) * inverse;
            const std::int32_t least = to_key((level - radius * radius) * 0.5 - 2.0);
            if (best[s] < least || least >= seen) continue;
            left += collect(begin, s, keys, least, seen, left);
            if (left > most) return false;
        }

        // What the fine bound leaves over, nearest first.
        rank(q, level, left);
        measure_candidates(q);
        return true;
    }

    // Measures the candidates that the whole codes leave over, until the bounds of the rest are beyond the k-th
    // nearest.
    void measure_candidates(int q) {
        constexpr std::size_t kBatch = 8;
        const Encoded& encoded = scratch_.encoded[q / kQuad];
        const int lane = q % kQuad;
        const std::int64_t whole_dims = view_.sketch->whole_dims();
        const double step = view_.sketch->whole_step() * (1.0 - 1e-9), scale = view_.sketch->scale() * (1.0 + 1e-6);
        const std::int8_t* codes = encoded.whole.data() + lane * whole_dims;
        const Nearest& nearest = scratch_.nearest[q];
        const std::vector<std::uint64_t>& candidates = scratch_.candidates;
        double worst = nearest.worst(), limit = std::sqrt(worst) * scale;
        for (std::size_t begin = 0; begin < candidates.size(); begin += kBatch) {
            const std::size_t end = std::min(begin + kBatch, candidates.size());
            if (bound_of(candidates[begin]) > limit) return;
            std::int32_t positions[kBatch], distances[kBatch];
            for (std::size_t i = begin; i < end; ++i) positions[i - begin] = position_of(candidates[i]);
            for (std::size_t i = end; i < std::min(end + kBatch, candidates.size()); ++i) {
                const std::int32_t next = position_of(candidates[i]);
                if (whole_dims) {
                    fetch(view_.strips->whole(next), whole_dims);
                } else {
                    fetch(bank_.row(order_[next]), kFirstLines);
                }
            }
            if (whole_dims) {
                kernels_.code_distances(codes, view_.strips->whole(0), whole_dims, positions,
                                        static_cast<std::int64_t>(end - begin), distances, nullptr);
                scratch_.whole += static_cast<std::int64_t>(end - begin);
            }
            for (std::size_t i = begin; i < end; ++i) {
                if (bound_of(candidates[i]) > limit) return;
                const std::int32_t position = positions[i - begin];
                if (whole_dims) {
                    const double radius =
                        limit + encoded.whole_error[lane] + view_.strips->whole_error(position / kStrip);
                    if (step * step * double(distances[i - begin]) > radius * radius) continue;
                }
                measure_at(q, position);
                if (nearest.worst() < worst) {
                    worst = nearest.worst();
                    limit = std::sqrt(worst) * scale;
                }
            }
        }
    }

    // What the fine bound leaves of the first `left` survivors -> the candidates, nearest bound first.
    void rank(int q, double level, std::int64_t left) {
        const Encoded& encoded = scratch_.encoded[q / kQuad];
        const int lane = q % kQuad;
        const std::int64_t fine_dims = view_.sketch->fine_dims();
        const double coarse = view_.sketch->coarse_step(), fine = view_.sketch->fine_step();
        FineBound bound = {level, coarse * coarse, fine * fine, encoded.coarse_error[lane], 0.0};
        bound.reach = std::sqrt(scratch_.nearest[q].worst()) * view_.sketch->scale() * (1.0 + 1e-6);
        const double* strip_errors = view_.strips->coarse_errors();
        if (fine_dims) {
            // The fine codes know better what the coarse directions leave out than its length, the last coarse code.
            bound.error = encoded.error[lane];
            strip_errors = view_.strips->errors();
            kernels_.code_distances(encoded.fine.data() + lane * fine_dims, view_.strips->fine(0), fine_dims,
                                    scratch_.positions.data(), left, scratch_.distances.data(), scratch_.rests.data());
            scratch_.fine += left;
        } else {
            std::fill_n(scratch_.distances.data(), left, 0);
            std::fill_n(scratch_.rests.data(), left, 0);
        }
        const std::int64_t kept =
            kernels_.leave(bound, scratch_.survivor_keys.data(), scratch_.distances.data(), scratch_.rests.data(),
                           strip_errors, scratch_.positions.data(), left, scratch_.bounds.data());
        scratch_.candidates.resize(static_cast<std::size_t>(kept));
        for (std::int64_t i = 0; i < kept; ++i)
            scratch_.candidates[i] = pack(scratch_.bounds[i], scratch_.positions[i]);
        std::sort(scratch_.candidates.begin(), scratch_.candidates.end());
    }

    Matrix<const T> bank_;
    const std::int32_t* order_;
    const SketchKernels& kernels_;
    CodeView view_;
    GroupScratch& scratch_;
};

}  // namespace ttt4as
