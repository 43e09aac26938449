// The search of knn.cpp for one group of queries, which meet one segment of the bank after the other: keys for all its
// points from the coarse codes, the points of the highest keys measured, and of the rest what the bounds leave over,
// by coarse, second, fine and whole codes in turn.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "knn_candidates.hpp"
#include "sketch.hpp"

namespace ttt4as {

constexpr std::int64_t kMostGroup = 32;    // queries
constexpr std::int64_t kMany = 12;         // points of a strip, for four queries, from which its second codes pay
constexpr std::int64_t kLong = 1024;       // candidates of which the nearest bounds come first
constexpr std::int64_t kKeyGap = 16;       // between the keys of two queries, or all would share the same cache sets
constexpr std::int64_t kFirstLines = 512;  // bytes of a row to ask for early: the processor then sees the stream

// What one thread needs; grows to its size once.
struct GroupScratch {
    Encoded encoded[kMostGroup / kQuad];
    Buffer<double> rows;         // the queries in double
    Buffer<std::int8_t> bytes;   // their coarse codes, one query after the other
    Buffer<std::int16_t> words;  // the same, widened
    Buffer<std::int32_t> keys, best;
    Buffer<std::uint64_t> bits;   // (kQuad, segment): the points of each strip that the coarse bound leaves over
    Buffer<std::int32_t> counts;  // (segment): of them for four queries
    // Of what the first bounds leave over, for each of four queries.
    Buffer<std::int32_t> positions[kQuad], survivor_keys[kQuad];
    std::int64_t left[kMostGroup];          // how many, in all segments
    Buffer<std::int32_t> distances, rests;  // between codes
    Buffer<double> bounds;                  // of what the fine codes leave over
    std::vector<std::uint64_t> candidates;  // of the fine bound
    Nearest nearest[kMostGroup];
    std::int64_t fine = 0, whole = 0, measured = 0;
};

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
        const std::int64_t segment = std::min(view_.segment, strips), stride = segment * kStrip + kKeyGap;
        scratch_.rows.resize(view_.group * columns);
        scratch_.bytes.resize(view_.group * dims);
        scratch_.words.resize(view_.group * dims);
        scratch_.keys.resize(view_.group * stride);
        scratch_.best.resize(view_.group * segment);
        scratch_.bits.resize(kQuad * segment);
        scratch_.counts.resize(segment);
        for (int q = 0; q < kQuad; ++q) {
            scratch_.positions[q].resize(stride + kSpill);
            scratch_.survivor_keys[q].resize(stride + kSpill);
        }
        scratch_.distances.resize(stride + kSpill);
        scratch_.rests.resize(stride + kSpill);
        scratch_.bounds.resize(stride + kSpill);
        for (int q = 0; q < n; ++q) {
            std::copy_n(query.row(ids[q]), columns, scratch_.rows.data() + q * columns);
            scratch_.nearest[q].start(static_cast<std::size_t>(k));
            scratch_.left[q] = 0;
        }
        const int quads = (n + kQuad - 1) / kQuad;
        for (int b = 0; b < quads; ++b) {
            const double* rows[kQuad] = {};
            const int m = std::min<int>(kQuad, n - b * kQuad);
            for (int q = 0; q < m; ++q) rows[q] = scratch_.rows.data() + (b * kQuad + q) * columns;
            Encoded& encoded = scratch_.encoded[b];
            view_.sketch->encode(rows, m, encoded);
            std::copy_n(encoded.coarse.data(), kQuad * dims, scratch_.bytes.data() + b * kQuad * dims);
            std::copy_n(encoded.words.data(), kQuad * dims, scratch_.words.data() + b * kQuad * dims);
        }
        const QueryCodes codes = {scratch_.bytes.data(), scratch_.words.data(), quads * kQuad, dims};
        for (std::int64_t begin = 0; begin < strips; begin += segment) {
            const std::int64_t here = std::min(segment, strips - begin);
            kernels_.keys(view_.strips->strip(begin), here, codes, view_.strips->half_norms(begin),
                          scratch_.keys.data(), stride, scratch_.best.data(), segment);
            for (int b = 0; b < quads; ++b) {
                bool active[kQuad] = {};
                const int m = std::min<int>(kQuad, n - b * kQuad);
                for (int q = 0; q < m; ++q) active[q] = !hard[ids[b * kQuad + q]];
                search_segment(b, active, begin, here, stride, segment);
                for (int q = 0; q < m; ++q) hard[ids[b * kQuad + q]] |= !active[q];
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

    // The points of a strip whose bit is set are left over for query q.
    void collect(int q, std::int64_t strip, const std::int32_t* keys, std::uint64_t bits, std::int64_t& left) {
        const int lane = q % kQuad;
        left += kernels_.collect(keys, bits, static_cast<std::int32_t>(strip * kStrip),
                                 scratch_.positions[lane].data() + left, scratch_.survivor_keys[lane].data() + left);
    }

    // The points of the highest keys fill the heap: they are hard to beat. False if they are all of the segment.
    bool fill(int q, std::int64_t begin, std::int64_t strips, const std::int32_t* keys, const std::int32_t* best,
              std::int32_t& seen) {
        const Nearest& nearest = scratch_.nearest[q];
        const std::int64_t wanted = static_cast<std::int64_t>(nearest.k - nearest.heap.size());
        const std::int64_t points = std::min(strips * kStrip, bank_.rows - begin * kStrip);
        if (wanted == 0) return true;
        // Each strip's best stands for it, where there are strips enough.
        seen = kLeastKey;
        if (wanted < points)
            seen = 2 * wanted <= strips ? kernels_.nth_greatest(best, strips, wanted)
                                        : kernels_.nth_greatest(keys, strips * kStrip, wanted);
        const std::int32_t *positions = scratch_.positions[q % kQuad].data(),
                           *found = scratch_.survivor_keys[q % kQuad].data();
        std::int64_t count = 0;
        for (std::int64_t s = 0; s < strips; ++s) {
            if (best[s] < seen) continue;
            const std::int32_t* of_strip = keys + s * kStrip;
            collect(q, begin + s, of_strip, kernels_.between(of_strip, seen, kMostKey), count);
        }
        const std::int64_t enough = 2 * wanted;
        if (enough < count)
            seen = kernels_.nth_greatest(found, count, enough);  // the bounds may rule out the others yet
        for (std::int64_t i = 0; i < count; ++i) {
            if (found[i] >= seen) fetch(bank_.row(order_[positions[i]]), kFirstLines);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (found[i] >= seen) measure_at(q, positions[i]);
        }
        return wanted < points;
    }

    // Of one query in one segment.
    struct Bounds {
        const std::int32_t *keys, *best;
        double reach;                  // how far one of the nearest may be
        std::int32_t seen = kMostKey;  // points with a key from here on have been measured
        std::int64_t left = 0;
    };

    // Lets the points of one segment compete for four queries. A query of which the bounds leave too much is active no
    // longer.
    void search_segment(int quad, bool (&active)[kQuad], std::int64_t begin, std::int64_t strips, std::int64_t stride,
                        std::int64_t segment) {
        const double scale = view_.sketch->scale() * (1.0 + 1e-6);
        Bounds bounds[kQuad];
        bool searched[kQuad] = {};
        for (int lane = 0; lane < kQuad; ++lane) {
            if (!active[lane]) continue;
            const int q = quad * kQuad + lane;
            Bounds& mine = bounds[lane];
            mine.keys = scratch_.keys.data() + q * stride;
            mine.best = scratch_.best.data() + q * segment;
            searched[lane] = fill(q, begin, strips, mine.keys, mine.best, mine.seen);
            mine.reach = std::sqrt(scratch_.nearest[q].worst()) * scale;
        }
        leave_over(quad, active, searched, bounds, begin, strips, stride);
        for (int lane = 0; lane < kQuad; ++lane) {
            if (!active[lane] || !searched[lane]) continue;
            rank(quad * kQuad + lane, bounds[lane]);
            measure_candidates(quad * kQuad + lane);
        }
    }

    // What the coarse bound leaves over, and the second one in strips where that is much.
    void leave_over(int quad, bool (&active)[kQuad], const bool (&searched)[kQuad], Bounds (&bounds)[kQuad],
                    std::int64_t begin, std::int64_t strips, std::int64_t stride) {
        const Encoded& encoded = scratch_.encoded[quad];
        const std::int64_t most = 64 + static_cast<std::int64_t>(view_.patience * static_cast<double>(bank_.rows));
        std::fill_n(scratch_.counts.data(), strips, 0);
        for (int lane = 0; lane < kQuad; ++lane) {
            std::uint64_t* bits = scratch_.bits.data() + lane * strips;
            if (!active[lane] || !searched[lane]) {
                std::fill_n(bits, strips, std::uint64_t{0});
                continue;
            }
            const Bounds& mine = bounds[lane];
            const CoarseBound bound = {double(encoded.level[lane]), 1.0 / view_.sketch->coarse_step(),
                                       mine.reach + encoded.coarse_error[lane], mine.seen};
            kernels_.leave_strips(bound, view_.strips->coarse_errors() + begin, mine.keys, mine.best, strips, bits,
                                  scratch_.counts.data());
        }
        for (std::int64_t s = 0; s < strips; ++s) {
            if (scratch_.counts[s] == 0) continue;
            std::uint64_t bits[kQuad];
            for (int lane = 0; lane < kQuad; ++lane) bits[lane] = scratch_.bits[lane * strips + s];
            if (scratch_.counts[s] >= kMany && view_.sketch->second_dims())
                refine(quad, begin + s, begin, stride, bounds, bits);
            for (int lane = 0; lane < kQuad; ++lane) {
                if (!bits[lane] || !active[lane]) continue;
                const std::int64_t before = bounds[lane].left;
                collect(quad * kQuad + lane, begin + s, bounds[lane].keys + s * kStrip, bits[lane], bounds[lane].left);
                std::int64_t& all = scratch_.left[quad * kQuad + lane];
                all += bounds[lane].left - before;
                if (all > most) active[lane] = false;
            }
        }
    }

    // Of the points `bits` of a strip, those that the second codes leave over.
    void refine(int quad, std::int64_t s, std::int64_t begin, std::int64_t stride, const Bounds (&bounds)[kQuad],
                std::uint64_t (&bits)[kQuad]) {
        const Encoded& encoded = scratch_.encoded[quad];
        const double inverse = 1.0 / view_.sketch->coarse_step();
        std::int32_t least[kQuad] = {};
        std::uint64_t left[kQuad];
        for (int lane = 0; lane < kQuad; ++lane) {
            if (!bits[lane]) continue;
            const double radius =
                inverse * (bounds[lane].reach + encoded.second_error[lane] + view_.strips->second_error(s));
            least[lane] = to_key((double(encoded.second_level[lane]) - radius * radius) * 0.5 - 2.0);
        }
        kernels_.refine(view_.strips->second(s), encoded.second.data(), encoded.second_words.data(),
                        view_.sketch->second_dims(), view_.strips->second_half_norms(s),
                        scratch_.keys.data() + quad * kQuad * stride + (s - begin) * kStrip, stride, least, left);
        for (int lane = 0; lane < kQuad; ++lane) bits[lane] &= left[lane];
    }

    // Measures the candidates that the whole codes leave over, as long as their bounds are within the k-th nearest.
    void measure_candidates(int q) {
        constexpr std::size_t kBatch = 64;
        const std::int64_t whole_dims = view_.sketch->whole_dims();
        const double scale = view_.sketch->scale() * (1.0 + 1e-6);
        const Nearest& nearest = scratch_.nearest[q];
        const std::vector<std::uint64_t>& candidates = scratch_.candidates;
        double limit = std::sqrt(nearest.worst()) * scale;
        for (std::size_t begin = 0; begin < candidates.size(); begin += kBatch) {
            const std::size_t end = std::min(begin + kBatch, candidates.size());
            std::uint64_t batch[kBatch];
            std::size_t count = 0;
            for (std::size_t i = begin; i < end; ++i) {
                batch[count] = candidates[i];
                count += bound_of(candidates[i]) <= limit ? 1 : 0;
            }
            if (whole_dims) count = bound_by_whole_codes(q, limit, batch, count);
            std::sort(batch, batch + count);  // the likely ones first: what comes after them has less of a chance
            for (std::size_t i = 0; i < count; ++i) fetch(bank_.row(order_[position_of(batch[i])]), kFirstLines);
            for (std::size_t i = 0; i < count; ++i) {
                if (bound_of(batch[i]) > limit) break;
                measure_at(q, position_of(batch[i]));
                limit = std::sqrt(nearest.worst()) * scale;
            }
        }
    }

    // The candidates that whole codes leave over, with the bounds that these give. Returns how many.
    std::size_t bound_by_whole_codes(int q, double limit, std::uint64_t* batch, std::size_t count) {
        const Encoded& encoded = scratch_.encoded[q / kQuad];
        const int lane = q % kQuad;
        const std::int64_t dims = view_.sketch->whole_dims();
        const double step = view_.sketch->whole_step() * (1.0 - 1e-9);
        std::int32_t* positions = scratch_.positions[lane].data();
        for (std::size_t i = 0; i < count; ++i) positions[i] = position_of(batch[i]);
        kernels_.code_distances(encoded.whole.data() + lane * dims, view_.strips->whole(0), dims, positions,
                                static_cast<std::int64_t>(count), scratch_.distances.data(), nullptr);
        scratch_.whole += static_cast<std::int64_t>(count);
        std::size_t kept = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const double squared = step * step * double(scratch_.distances[i]);
            const double error = encoded.whole_error[lane] + view_.strips->whole_error(positions[i] / kStrip);
            if (squared > (limit + error) * (limit + error)) continue;
            batch[kept++] = pack(std::sqrt(squared) - error, positions[i]);
        }
        return kept;
    }

    // What the fine bound leaves of the survivors -> the candidates.
    void rank(int q, const Bounds& found) {
        const Encoded& encoded = scratch_.encoded[q / kQuad];
        const int lane = q % kQuad;
        std::int32_t* positions = scratch_.positions[lane].data();
        const std::int64_t fine_dims = view_.sketch->fine_dims(), left = found.left;
        const double coarse = view_.sketch->coarse_step(), fine = view_.sketch->fine_step();
        FineBound bound = {double(encoded.level[lane]), coarse * coarse, fine * fine, encoded.coarse_error[lane],
                           found.reach};
        const double* strip_errors = view_.strips->coarse_errors();
        if (fine_dims) {
            // The fine codes know better what the coarse directions leave out than its length, the last coarse code.
            bound.error = encoded.error[lane];
            strip_errors = view_.strips->errors();
            kernels_.code_distances(encoded.fine.data() + lane * fine_dims, view_.strips->fine(0), fine_dims, positions,
                                    left, scratch_.distances.data(), scratch_.rests.data());
            scratch_.fine += left;
        } else {
            std::fill_n(scratch_.distances.data(), left, 0);
            std::fill_n(scratch_.rests.data(), left, 0);
        }
        const std::int64_t kept =
            kernels_.leave(bound, scratch_.survivor_keys[lane].data(), scratch_.distances.data(), scratch_.rests.data(),
                           strip_errors, positions, left, scratch_.bounds.data());
        scratch_.candidates.resize(static_cast<std::size_t>(kept));
        for (std::int64_t i = 0; i < kept; ++i) scratch_.candidates[i] = pack(scratch_.bounds[i], positions[i]);
        // The reach is near its end already, so that order pays for a long list only.
        if (kept > kLong)
            std::nth_element(scratch_.candidates.begin(), scratch_.candidates.begin() + kLong / 8,
                             scratch_.candidates.end());
    }

    Matrix<const T> bank_;
    const std::int32_t* order_;
    const SketchKernels& kernels_;
    CodeView view_;
    GroupScratch& scratch_;
};

}  // namespace ttt4as
