// Greedy k-center: points picked one by one, each the farthest from those picked before.
//
// The picks are those of the plain algorithm on squared distances, sums of squared differences in double: every
// distance that could change a minimum is measured so. What is skipped is proven not to matter: one byte in each of 63
// leading principal directions (src/sketch.hpp) bounds a point's distance to the new pick from below, and where the
// bound reaches the point's distance to the picks so far, nothing can change. A strip of 64 points keeps its farthest,
// so that only strips where something changed are looked through for the next pick.
#pragma once

#include <cstdint>
#include <memory>

#include "ttt4as/common.hpp"

namespace ttt4as {

// An object serves one thread at a time.
class TTT4AS_API GreedyCoreset {
  public:
    // points (rows >= 1, cols >= 1, finite) stay the caller's and must outlive this. Adds 85 bytes a row to them,
    // whatever the number of columns; up to 64 columns, cols (as the next multiple of 16) + 21. 0 <= start < rows is
    // the first pick. Throws InvalidArgument, std::bad_alloc.
    GreedyCoreset(Matrix<const float> points, std::int64_t start, int threads = 0);
    GreedyCoreset(Matrix<const double> points, std::int64_t start, int threads = 0);
    ~GreedyCoreset();
    GreedyCoreset(GreedyCoreset&&) noexcept;
    GreedyCoreset& operator=(GreedyCoreset&&) noexcept;

    // The next `count` picks -> picks, at most as many as there are rows in all. Ties go to the lowest row; once every
    // point coincides with a pick, so do the rest. The picks do not depend on `threads`. Throws InvalidArgument,
    // std::bad_alloc.
    void pick(std::int64_t count, std::int64_t* picks, int threads = 0);

    std::int64_t picked() const noexcept;
    std::int64_t bytes() const noexcept;     // held beside the points
    std::int64_t measured() const noexcept;  // distances that were computed

    class Impl;

  private:
    std::unique_ptr<Impl> impl_;
};

}  // namespace ttt4as
