// What competes in a search of knn.cpp: the nearest points so far, and candidates in the order of their bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "sketch_kernels.hpp"

namespace ttt4as {

// The nearest points so far, farthest on top, ties by index: what is kept is the k least of (squared distance, id).
struct Nearest {
    struct Entry {
        double squared;
        std::int32_t id;
        bool operator<(const Entry& other) const {
            return squared < other.squared || (squared == other.squared && id < other.id);
        }
    };
    std::vector<Entry> heap;
    std::size_t k = 0;

    void start(std::size_t size) {
        k = size;
        heap.clear();
    }
    double worst() const { return heap.size() < k ? std::numeric_limits<double>::infinity() : heap.front().squared; }
    void offer(double squared, std::int32_t id) {
        const Entry entry{squared, id};
        if (heap.size() < k) {
            heap.push_back(entry);
            std::push_heap(heap.begin(), heap.end());
        } else if (entry < heap.front()) {
            std::pop_heap(heap.begin(), heap.end());
            heap.back() = entry;
            std::push_heap(heap.begin(), heap.end());
        }
    }
    // Distances, or their squares, and ids, nearest first; the heap is none afterwards.
    void write(float* distances, std::int64_t* ids, bool as_squares) {
        std::sort_heap(heap.begin(), heap.end());
        for (std::size_t i = 0; i < heap.size(); ++i) {
            distances[i] = static_cast<float>(as_squares ? heap[i].squared : std::sqrt(heap[i].squared));
            ids[i] = heap[i].id;
        }
    }
};

// A candidate as one integer that sorts by bound, then position: floats that are not negative compare as their bits do.
inline std::uint64_t pack(double bound, std::int32_t position) {
    const float rounded = static_cast<float>(std::max(0.0, bound) * (1.0 - 1e-6));  // never above the bound
    std::uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return std::uint64_t(bits) << 32 | static_cast<std::uint32_t>(position);
}
inline double bound_of(std::uint64_t candidate) {
    const std::uint32_t bits = static_cast<std::uint32_t>(candidate >> 32);
    float bound;
    std::memcpy(&bound, &bits, sizeof bound);
    return bound;
}
inline std::int32_t position_of(std::uint64_t candidate) { return static_cast<std::int32_t>(candidate & 0xFFFFFFFFu); }

}  // namespace ttt4as
