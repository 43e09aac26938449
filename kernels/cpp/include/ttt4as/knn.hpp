// Exact nearest neighbours under the Euclidean distance, over a bank of vectors prepared once.
//
// Every distance that is returned, and every decision between candidates, comes from sums of squared differences in
// double. What makes it fast is which pairs are never measured: one byte in each of 63 leading principal directions
// (and one for the rest's length) bounds all distances of a query from below (src/sketch.hpp), at one instruction
// for 64 multiply-adds where the processor has VNNI (for 32 with AVX-VNNI). Points that lie near each other lie
// together, so what that leaves does too: 62 more directions rule out most of it, wherever there is much, strip by
// strip; 64 or 128 bytes of what is left rule out most again, and one byte a coordinate almost all; the rest is
// measured. A query for which the first bounds leave too much is searched again with the bytes of all coordinates
// against the whole bank, which is what data without structure needs. If that leaves too much as well, because the
// query is so far outside the bank that all points are about equally far, it is searched by inner products, whose
// rounding is bounded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "ttt4as/common.hpp"

namespace ttt4as {

class TTT4AS_API KnnIndex {
  public:
    // The bank (rows >= 1, cols >= 1, finite) stays the caller's: it must outlive the index, and may be memory-mapped.
    // The index adds 210 (from 320 columns on 274) + cols bytes a row, and cols + 17 more once a search has met a query
    // without structure; cols counts as the next multiple of 64 (up to 64 columns: 13 + cols, and 8 more). Each thread
    // of a search has 1.5 MiB of scratch at most, and 1 KiB a column and a neighbour, which the index keeps for the
    // searches after it (of four at once at most; `bytes` leaves it out).
    // Throws InvalidArgument, std::bad_alloc. T: float, double.
    explicit KnnIndex(Matrix<const float> bank, int threads = 0);
    explicit KnnIndex(Matrix<const double> bank, int threads = 0);
    // The same from what `save` wrote for that very bank, without preparing anything: `prepared`, aligned to 64 bytes,
    // is read in place, stays the caller's, must outlive the index and may be memory-mapped. Always checked: version,
    // lengths, that it belongs to this bank (by 64 of its rows), and a checksum over all that keeps a search within
    // bounds (34 bytes a row). `verify` checks the rest too, which reads all of it. Throws InvalidArgument.
    KnnIndex(Matrix<const float> bank, const void* prepared, std::size_t bytes, bool verify = true);
    KnnIndex(Matrix<const double> bank, const void* prepared, std::size_t bytes, bool verify = true);
    ~KnnIndex();
    KnnIndex(KnnIndex&&) noexcept;
    KnnIndex& operator=(KnnIndex&&) noexcept;

    std::int64_t size() const noexcept;   // rows of the bank
    std::int64_t dim() const noexcept;    // its columns
    std::int64_t bytes() const noexcept;  // held beside the bank

    // The k nearest rows of each finite query, nearest first, ties by lowest index -> Euclidean distances (`squared`:
    // their squares, infinite beyond float's range) and indices, both C-contiguous (query.rows, k). 1 <= k <= size().
    // The results do not depend on `threads`, nor a query's on the others. Safe from many threads. Throws
    // InvalidArgument, std::bad_alloc.
    void search(Matrix<const float> query, std::int64_t k, float* distances, std::int64_t* indices, int threads = 0,
                bool squared = false) const;
    void search(Matrix<const double> query, std::int64_t k, float* distances, std::int64_t* indices, int threads = 0,
                bool squared = false) const;

    // Hands what was prepared to `sink`, piece after piece: a block of bytes for the constructor above, on machines of
    // the same byte order. Searches of other threads go on, and `sink` may ask the index anything.
    void save(const std::function<void(const void*, std::size_t)>& sink) const;

    // How the queries and pairs of the searches so far were decided, for tests and tuning: queries whose structure did
    // not help, and of these those that all coordinates' codes did not help; pairs the fine codes saw, those the codes
    // of all coordinates saw, and those measured.
    struct Counts {
        std::int64_t queries = 0, unstructured = 0, dense = 0, fine = 0, whole = 0, measured = 0;
    };
    Counts counts() const noexcept;

    class Impl;

  private:
    std::unique_ptr<Impl> impl_;
};

}  // namespace ttt4as
