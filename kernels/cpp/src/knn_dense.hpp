// Search without codes, for queries that the bounds of codes do not help: those far outside the bank, above all, whose
// distances to all of it differ by little. Inner products of many queries with each block of the bank, in the precision
// of T, give every squared distance to within their rounding; what may be among the nearest is measured.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "knn_candidates.hpp"
#include "linear.hpp"
#include "ttt4as/common.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {

// The lengths of all rows.
template <class T>
void measure_lengths(const Matrix<const T>& rows, int threads, double* lengths) {
    constexpr std::int64_t kRows = 256;
    const auto moments = moments_kernel<T>();
    parallel_for((rows.rows + kRows - 1) / kRows, threads, [&](std::int64_t task, int) {
        for (std::int64_t i = task * kRows; i < std::min(rows.rows, (task + 1) * kRows); ++i) {
            double sum, square;
            moments(rows.row(i), rows.cols, 0.0, &sum, &square);
            lengths[i] = std::sqrt(square);
        }
    });
}

// found(query id, Nearest&) for each of the queries `which`. exact(row of doubles, bank row id, limit): their squared
// distance, or anything above `limit` where it is.
// Cost: bank.rows * bank.cols multiply-adds a query; the bank is read once for 64 queries. Scratch, a thread: 64
// queries in T and in double.
template <class T, class Q, class Exact, class Found>
void dense_search(const Matrix<const T>& bank, const double* lengths, const Matrix<const Q>& query,
                  const std::vector<std::int64_t>& which, std::int64_t k, int threads, Exact&& exact, Found&& found) {
    constexpr std::int64_t kQueries = 64, kRows = 64;
    // A sum of products in T, over at most 1024 terms in four lanes, in double from there on (linear.hpp).
    constexpr double kRounding = 260 * 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon());
    // Products below T's range are lost altogether.
    const double lost = 4 * static_cast<double>(bank.cols) * static_cast<double>(std::numeric_limits<T>::min());
    const auto count = static_cast<std::int64_t>(which.size());
    const std::int64_t columns = bank.cols, stride = (columns + kPad - 1) / kPad * kPad;
    const std::int64_t share = (count + threads - 1) / threads;
    const std::int64_t each = std::min(kQueries, (share + kMaxRhs - 1) / kMaxRhs * kMaxRhs);
    struct Scratch {
        std::vector<T> packed;
        std::vector<double> rows;
        Nearest nearest[kQueries];
    };
    std::vector<Scratch> scratch(static_cast<std::size_t>(std::max(threads, 1)));
    parallel_for((count + each - 1) / each, threads, [&](std::int64_t task, int worker) {
        Scratch& mine = scratch[worker];
        const std::int64_t* ids = which.data() + task * each;
        const std::int64_t n = std::min(each, count - task * each);
        double squares[kQueries] = {}, dots[kMaxRhs * kRows];
        mine.packed.assign(static_cast<std::size_t>((n + kMaxRhs - 1) / kMaxRhs * kMaxRhs * stride), T(0));
        mine.rows.resize(static_cast<std::size_t>(n * columns));
        for (std::int64_t q = 0; q < n; ++q) {
            mine.nearest[q].start(static_cast<std::size_t>(k));
            for (std::int64_t c = 0; c < columns; ++c) {
                const Q value = query.row(ids[q])[c];
                mine.packed[q * stride + c] = static_cast<T>(value);
                mine.rows[q * columns + c] = static_cast<double>(value);
                squares[q] += static_cast<double>(value) * static_cast<double>(value);
            }
        }
        for (std::int64_t begin = 0; begin < bank.rows; begin += kRows) {
            const std::int64_t end = std::min(bank.rows, begin + kRows);
            for (std::int64_t first = 0; first < n; first += kMaxRhs) {
                product_with_all(bank.row(begin), bank.stride, columns, nullptr, 0, end - begin,
                                 mine.packed.data() + first * stride, stride, dots, kRows);
                for (std::int64_t q = first; q < std::min(n, first + kMaxRhs); ++q) {
                    Nearest& nearest = mine.nearest[q];
                    const double* dot = dots + (q - first) * kRows;
                    const double off = 2 * kRounding * std::sqrt(squares[q]), slack = 1 - 1e-12;
                    for (std::int64_t i = begin; i < end; ++i) {
                        const double squared = (squares[q] + lengths[i] * lengths[i]) * slack;
                        const double least = squared - 2 * dot[i - begin] - off * lengths[i] - lost;
                        if (least > nearest.worst() && std::isfinite(dot[i - begin])) continue;  // it may overflow
                        const double* row = mine.rows.data() + q * columns;
                        nearest.offer(exact(row, i, nearest.worst()), static_cast<std::int32_t>(i));
                    }
                }
            }
        }
        for (std::int64_t q = 0; q < n; ++q) found(ids[q], mine.nearest[q]);
    });
}

}  // namespace ttt4as
