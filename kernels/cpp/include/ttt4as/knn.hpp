// Exact nearest neighbours under the Euclidean distance, over a bank of vectors prepared once.
//
// Every distance that is returned, and every decision between candidates, comes from sums of squared differences in
// double. What makes it fast is which pairs are never measured: one byte in each of 63 leading principal directions
// (and one for the rest's length) bounds all distances of a query from below (src/sketch.hpp), at one instruction for
// 64 multiply-adds where the processor has VNNI; of what that leaves, 64 or 128 more bytes rule out most, and one byte
// a coordinate almost all; the rest is measured, nearest bound first. A query for which the first bound leaves too much
// is searched again with the bytes of all coordinates against the whole bank, which is what data without structure
// needs.
#pragma once

#include <cstdint>
#include <memory>

#include "ttt4as/common.hpp"

namespace ttt4as {

class TTT4AS_API KnnIndex {
  public:
    // The bank (rows >= 1, cols >= 1, finite) stays the caller's: it must outlive the index, and may be memory-mapped.
    // The index adds 150 (from 320 columns on 214) + cols bytes a row, and cols more once a search has met a query
    // without structure.
    // Throws InvalidArgument, std::bad_alloc. T: float, double.
    explicit KnnIndex(Matrix<const float> bank, int threads = 0);
    explicit KnnIndex(Matrix<const double> bank, int threads = 0);
    ~KnnIndex();
    KnnIndex(KnnIndex&&) noexcept;
    KnnIndex& operator=(KnnIndex&&) noexcept;

    std::int64_t size() const noexcept;   // rows of the bank
    std::int64_t dim() const noexcept;    // its columns
    std::int64_t bytes() const noexcept;  // held beside the bank

    // The k nearest rows of each finite query, nearest first, ties by lowest index -> distances and indices, both
    // C-contiguous (query.rows, k). 1 <= k <= size(). The results do not depend on `threads`, nor a query's on the
    // others. Safe from many threads. Throws InvalidArgument, std::bad_alloc.
    void search(Matrix<const float> query, std::int64_t k, float* distances, std::int64_t* indices,
                int threads = 0) const;
    void search(Matrix<const double> query, std::int64_t k, float* distances, std::int64_t* indices,
                int threads = 0) const;

    // How the pairs of the searches so far were decided, for tests and tuning: those the fine codes saw, those the
    // codes of all coordinates saw, and those measured.
    struct Counts {
        std::int64_t queries = 0, unstructured = 0, fine = 0, whole = 0, measured = 0;
    };
    Counts counts() const noexcept;

    class Impl;

  private:
    std::unique_ptr<Impl> impl_;
};

}  // namespace ttt4as
