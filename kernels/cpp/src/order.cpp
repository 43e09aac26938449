// In which order the points of sketch.hpp lie in strips: halved along their longest axis until a strip is left, as in a
// k-d tree along principal directions. A search rules whole strips out, and what it finds in them lies together.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "sketch.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

constexpr std::int64_t kSample = 128;  // points that tell the longest axis
constexpr int kIterations = 3;

using Codes = Buffer<std::int8_t>;  // (rows, kPanel)

// The longest axis of some of the points, nearly: power iteration with their scatter.
void longest_axis(const Codes& codes, const std::int32_t* ids, std::int64_t count, float* axis) {
    const std::int64_t n = std::min(count, kSample);
    float points[kSample][kPanel], mean[kPanel] = {};
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int8_t* from = codes.data() + std::int64_t(ids[i * count / n]) * kPanel;
        for (int d = 0; d < kPanel; ++d) {
            points[i][d] = from[d];
            mean[d] += points[i][d] / static_cast<float>(n);
        }
    }
    float most = -1.0f;
    for (std::int64_t i = 0; i < n; ++i) {
        float squared = 0.0f;
        for (int d = 0; d < kPanel; ++d) {
            points[i][d] -= mean[d];
            squared += points[i][d] * points[i][d];
        }
        if (squared <= most) continue;
        most = squared;
        std::copy_n(points[i], kPanel, axis);
    }
    for (int iteration = 0; iteration < kIterations; ++iteration) {
        float next[kPanel] = {}, squared = 0.0f;
        for (std::int64_t i = 0; i < n; ++i) {
            float dot = 0.0f;
            for (int d = 0; d < kPanel; ++d) dot += points[i][d] * axis[d];
            for (int d = 0; d < kPanel; ++d) next[d] += dot * points[i][d];
        }
        for (int d = 0; d < kPanel; ++d) squared += next[d] * next[d];
        if (!(squared > 0.0f)) return;  // all points are one
        for (int d = 0; d < kPanel; ++d) axis[d] = next[d] / std::sqrt(squared);
    }
}

// Halves [begin, end) of `order`; the first half fills its strips. Returns where the second begins.
std::int64_t halve(const Codes& codes, std::vector<std::int32_t>& order, std::vector<float>& along, std::int64_t begin,
                   std::int64_t end) {
    float axis[kPanel];
    longest_axis(codes, order.data() + begin, end - begin, axis);
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int8_t* from = codes.data() + std::int64_t(order[i]) * kPanel;
        float dot = 0.0f;
        for (int d = 0; d < kPanel; ++d) dot += static_cast<float>(from[d]) * axis[d];
        along[order[i]] = dot;
    }
    const std::int64_t strips = (end - begin + kStrip - 1) / kStrip, middle = begin + strips / 2 * kStrip;
    std::nth_element(
        order.begin() + begin, order.begin() + middle, order.begin() + end,
        [&](std::int32_t a, std::int32_t b) { return along[a] < along[b] || (along[a] == along[b] && a < b); });
    return middle;
}

// The full strips in another order: every so many of them, then the ones after these, and so on.
std::vector<std::int32_t> spread(const std::vector<std::int32_t>& order, std::int64_t segment) {
    const std::int64_t strips = static_cast<std::int64_t>(order.size()) / kStrip;
    const std::int64_t apart = std::max<std::int64_t>(1, (strips + segment - 1) / segment);
    std::vector<std::int32_t> result;
    result.reserve(order.size());
    for (std::int64_t first = 0; first < apart; ++first) {
        for (std::int64_t s = first; s < strips; s += apart)
            result.insert(result.end(), order.begin() + s * kStrip, order.begin() + (s + 1) * kStrip);
    }
    result.insert(result.end(), order.begin() + strips * kStrip, order.end());
    return result;
}

}  // namespace

template <class T>
std::vector<std::int32_t> order_by_place(const Sketch& sketch, const Matrix<const T>& rows, std::int64_t segment,
                                         int threads) {
    constexpr std::int64_t kBlock = 1024;
    Codes codes(rows.rows * kPanel);
    std::vector<float> norms(rows.rows), along(rows.rows);
    threads = resolve_threads(threads);  // once, for scratch and tasks alike: the limit may change meanwhile
    std::vector<Encoded> scratch(threads);
    parallel_for((rows.rows + kBlock - 1) / kBlock, threads, [&](std::int64_t block, int worker) {
        for (std::int64_t i = block * kBlock; i < std::min(rows.rows, (block + 1) * kBlock); i += kQuad) {
            const int n = static_cast<int>(std::min<std::int64_t>(kQuad, rows.rows - i));
            const T* quad[kQuad] = {};
            std::int8_t found[kQuad * kPanel];
            for (int q = 0; q < n; ++q) quad[q] = rows.row(i + q);
            sketch.place(quad, n, scratch[worker], found);
            std::copy_n(found, n * kPanel, codes.data() + i * kPanel);
            for (int q = 0; q < n; ++q) norms[i + q] = static_cast<float>(scratch[worker].norm[q]);
        }
    });
    std::vector<std::int32_t> order, far;
    order.reserve(rows.rows);
    for (std::int64_t i = 0; i < rows.rows; ++i) {
        (double(norms[i]) <= sketch.usual_norm() ? order : far).push_back(static_cast<std::int32_t>(i));
    }
    std::vector<std::pair<std::int64_t, std::int64_t>> ranges = {{0, static_cast<std::int64_t>(order.size())}};
    while (ranges.back().second - ranges.back().first > kStrip) {  // of the last, which has the most strips
        std::vector<std::pair<std::int64_t, std::int64_t>> halves(2 * ranges.size());
        parallel_for(static_cast<std::int64_t>(ranges.size()), threads, [&](std::int64_t i, int) {
            const auto [begin, end] = ranges[i];
            const std::int64_t middle = end - begin > kStrip ? halve(codes, order, along, begin, end) : end;
            halves[2 * i] = {begin, middle};
            halves[2 * i + 1] = {middle, end};
        });
        ranges.clear();
        for (const auto& range : halves) {
            if (range.first < range.second) ranges.push_back(range);
        }
    }
    order = spread(order, segment);
    std::stable_sort(far.begin(), far.end(), [&](std::int32_t a, std::int32_t b) { return norms[a] < norms[b]; });
    order.insert(order.end(), far.begin(), far.end());
    return order;
}

template std::vector<std::int32_t> order_by_place(const Sketch&, const Matrix<const float>&, std::int64_t, int);
template std::vector<std::int32_t> order_by_place(const Sketch&, const Matrix<const double>&, std::int64_t, int);

}  // namespace ttt4as
