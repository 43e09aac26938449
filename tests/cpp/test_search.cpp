// KnnIndex and GreedyCoreset on data that take every path: structure, noise, outliers, far and huge points, duplicates,
// more than one segment; several threads on one index, whose second set of codes is made on demand.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "allocations.hpp"
#include "check.hpp"
#include "ttt4as/coreset.hpp"
#include "ttt4as/knn.hpp"
#include "ttt4as/threads.hpp"

namespace {

enum Kind { kStructured, kNoise, kOutliers, kFar, kHuge, kConstant, kDuplicates, kKinds };

std::vector<float> points(Random& random, Kind kind, std::int64_t n, std::int64_t dims) {
    constexpr std::int64_t kRank = 8;
    const std::vector<float> basis = random.normals(kRank * dims);
    std::vector<float> result(static_cast<std::size_t>(n * dims));
    for (std::int64_t i = 0; i < n; ++i) {
        float weights[kRank];
        for (std::int64_t r = 0; r < kRank; ++r) weights[r] = random.normal() / static_cast<float>(r + 1);
        const float factor = kind == kHuge ? 1e30f : (kind == kOutliers && i % 9 == 0 ? 1e5f : 1.0f);
        for (std::int64_t c = 0; c < dims; ++c) {
            float value = kind == kNoise ? random.normal() : 0.05f * random.normal();
            for (std::int64_t r = 0; kind != kNoise && r < kRank; ++r) value += weights[r] * basis[r * dims + c];
            if (kind == kConstant) value = 2.5f;
            if (kind == kDuplicates && i >= n / 4 + 1) value = result[(i % (n / 4 + 1)) * dims + c];
            result[i * dims + c] = kind == kFar ? value + 1e4f : value * factor;
        }
    }
    return result;
}

double squared(const float* a, const float* b, std::int64_t dims) {
    double sum = 0;
    for (std::int64_t c = 0; c < dims; ++c) {
        const double move = static_cast<double>(a[c]) - static_cast<double>(b[c]);
        sum += move * move;
    }
    return sum;
}

void check_search(const ttt4as::KnnIndex& index, const std::vector<float>& bank, const std::vector<float>& query,
                  std::int64_t k, int threads) {
    const std::int64_t dims = index.dim(), n = index.size(), count = static_cast<std::int64_t>(query.size()) / dims;
    std::vector<float> distances(static_cast<std::size_t>(count * k));
    std::vector<std::int64_t> indices(distances.size());
    index.search(ttt4as::Matrix<const float>{query.data(), count, dims, dims}, k, distances.data(), indices.data(),
                 threads);
    for (std::int64_t q = 0; q < count; ++q) {
        std::vector<std::pair<double, std::int64_t>> all;
        for (std::int64_t i = 0; i < n; ++i) all.emplace_back(squared(&query[q * dims], &bank[i * dims], dims), i);
        std::partial_sort(all.begin(), all.begin() + k, all.end());
        for (std::int64_t r = 0; r < k; ++r) {
            const std::int64_t found = indices[q * k + r];
            CHECK(found >= 0 && found < n);
            const double own = squared(&query[q * dims], &bank[found * dims], dims);
            CHECK(found == all[r].second || std::abs(own - all[r].first) <= 1e-12 * own);  // else a tie up to rounding
            CHECK(std::abs(distances[q * k + r] - std::sqrt(all[r].first)) <= 1e-6 * std::sqrt(all[r].first));
            for (std::int64_t other = 0; other < r; ++other) CHECK(indices[q * k + other] != found);
        }
    }
}

// What was saved answers as the index that saved it, and is refused where it has changed or belongs to another bank.
void check_saved(const ttt4as::KnnIndex& index, std::vector<float> bank, const std::vector<float>& query) {
    const std::int64_t dims = index.dim(), n = index.size(), count = static_cast<std::int64_t>(query.size()) / dims;
    std::vector<char> bytes;
    index.save([&](const void* data, std::size_t size) {
        bytes.insert(bytes.end(), static_cast<const char*>(data), static_cast<const char*>(data) + size);
    });
    ttt4as::Buffer<char> block(bytes.size());
    std::copy(bytes.begin(), bytes.end(), block.data());
    const ttt4as::Matrix<const float> view{bank.data(), n, dims, dims};
    const ttt4as::KnnIndex opened(view, block.data(), bytes.size());
    CHECK(opened.bytes() == 0);
    check_search(opened, bank, query, std::min<std::int64_t>(n, 9), 2);
    CHECK(opened.counts().unstructured <= count);
    CHECK_THROWS(ttt4as::InvalidArgument, ttt4as::KnnIndex(view, block.data(), bytes.size() - 64));
    CHECK_THROWS(ttt4as::InvalidArgument, ttt4as::KnnIndex(view, block.data(), 10));
    CHECK_THROWS(ttt4as::InvalidArgument, ttt4as::KnnIndex(view, block.data() + 1, bytes.size() - 1));
    for (const std::size_t at : {std::size_t(0), std::size_t(8), std::size_t(90), bytes.size() / 2, bytes.size() - 1}) {
        block[at] ^= 16;
        CHECK_THROWS(ttt4as::InvalidArgument, ttt4as::KnnIndex(view, block.data(), bytes.size()));
        block[at] ^= 16;
    }
    bank[0] += 1;
    CHECK_THROWS(ttt4as::InvalidArgument, ttt4as::KnnIndex(view, block.data(), bytes.size()));
}

void check_coreset(const std::vector<float>& data, std::int64_t n, std::int64_t dims, std::int64_t count) {
    ttt4as::GreedyCoreset coreset(ttt4as::Matrix<const float>{data.data(), n, dims, dims}, n / 2);
    std::vector<std::int64_t> picks(static_cast<std::size_t>(count));
    coreset.pick(count / 3, picks.data());
    coreset.pick(count - count / 3, picks.data() + count / 3);
    CHECK(coreset.picked() == count && picks[0] == n / 2);
    CHECK_THROWS(ttt4as::InvalidArgument, coreset.pick(n - count + 1, picks.data()));
    std::vector<double> nearest(static_cast<std::size_t>(n), INFINITY);
    for (std::int64_t p = 0; p + 1 < count; ++p) {
        double most = -1;
        for (std::int64_t i = 0; i < n; ++i) {
            nearest[i] = std::min(nearest[i], squared(&data[i * dims], &data[picks[p] * dims], dims));
            if (i == picks[p]) nearest[i] = -1;
            most = std::max(most, nearest[i]);
        }
        CHECK(nearest[picks[p + 1]] >= most * (1 - 1e-12));  // exactly plain greedy's but for ties up to rounding
        if (most == 0) break;
    }
}

#if defined(COUNTS_ALLOCATIONS)
// Where memory runs out in the middle, the next call finds everything as it should be.
void check_without_memory() {
    Random random(6);
    constexpr std::int64_t kRows = 300, kDims = 80, kCount = 20;
    const std::vector<float> bank = points(random, kNoise, kRows, kDims);
    const ttt4as::Matrix<const float> view{bank.data(), kRows, kDims, kDims};
    std::vector<std::int64_t> want(kCount), picks(kCount);
    ttt4as::GreedyCoreset(view, 7).pick(kCount, want.data());
    with_every_failure(
        1, [&] { return ttt4as::GreedyCoreset(view, 7); },
        [&](ttt4as::GreedyCoreset& coreset) { coreset.pick(kCount, picks.data()); },
        [&](ttt4as::GreedyCoreset& coreset) {
            const std::int64_t picked = coreset.picked();
            coreset.pick(kCount - picked, picks.data() + picked);
            CHECK(picks == want);
        });
    constexpr std::int64_t kQueries = 20;
    std::vector<float> query = points(random, kNoise, kQueries, kDims), distances(kQueries);
    for (std::int64_t q = 0; q < kQueries; q += 2) query[q * kDims] += 2e18f;  // by products, the others by all codes
    std::vector<std::int64_t> indices(kQueries), nearest(kQueries);
    const auto search = [&](const ttt4as::KnnIndex& index) {
        index.search({query.data(), kQueries, kDims, kDims}, 1, distances.data(), indices.data());
    };
    const auto make = [&] { return ttt4as::KnnIndex(view); };
    search(make());
    nearest = indices;
    with_every_failure(5, make, search, [&](const ttt4as::KnnIndex& index) {
        search(index);
        CHECK(indices == nearest && index.counts().dense > 0);
    });
}
#endif

// While an index is saved it may be asked anything; a search makes the second codes, which are not part of what is
// saved.
void check_a_sink_that_asks() {
    Random random(7);
    constexpr std::int64_t kRows = 500, kDims = 100;
    const std::vector<float> bank = points(random, kNoise, kRows, kDims), query = points(random, kNoise, 20, kDims);
    const ttt4as::Matrix<const float> view{bank.data(), kRows, kDims, kDims};
    const ttt4as::KnnIndex index(view);
    const std::int64_t before = index.bytes();
    std::vector<char> bytes;
    index.save([&](const void* data, std::size_t size) {
        if (bytes.empty()) check_search(index, bank, query, 3, 2);
        CHECK(index.bytes() > before);
        bytes.insert(bytes.end(), static_cast<const char*>(data), static_cast<const char*>(data) + size);
    });
    ttt4as::Buffer<char> block(bytes.size());
    std::copy(bytes.begin(), bytes.end(), block.data());
    check_search(ttt4as::KnnIndex(view, block.data(), bytes.size()), bank, query, 3, 2);
}

// Children forked while another thread makes the second codes, which they need too.
void check_forked_searches() {
// The allocator of a sanitizer is left locked in a child, where another thread is in it.
#if defined(COUNTS_ALLOCATIONS) && !defined(TTT4AS_TEST_WITHOUT_FORK)
    Random random(8);
    constexpr std::int64_t kRows = 4000, kDims = 130;
    const std::vector<float> bank = points(random, kNoise, kRows, kDims), query = points(random, kNoise, 16, kDims);
    const ttt4as::KnnIndex index(ttt4as::Matrix<const float>{bank.data(), kRows, kDims, kDims});
    const auto search = [&] {
        std::vector<float> distances(16);
        std::vector<std::int64_t> indices(16);
        index.search(ttt4as::Matrix<const float>{query.data(), 16, kDims, kDims}, 1, distances.data(), indices.data());
    };
    std::atomic<bool> done{false};
    std::thread other([&] {
        search();
        done = true;
    });
    std::vector<pid_t> children;
    while (!done && children.size() < 4) {
        usleep(2000);
        children.push_back(fork());
        if (children.back() == 0) {
            alarm(60);
            search();
            _exit(0);
        }
    }
    other.join();
    for (const pid_t child : children) {
        int status = 1;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
#endif
}

// Indexes are built and searched while another thread changes how many threads a call may use.
void check_threads_that_come_and_go() {
    Random random(5);
    constexpr std::int64_t kRows = 1000, kDims = 16, kQueries = 12;
    const std::vector<float> bank = points(random, kNoise, kRows, kDims);
    std::vector<float> distances(kQueries);
    std::vector<std::int64_t> indices(kQueries);
#if defined(COUNTS_ALLOCATIONS)
    constexpr int kRounds = 200;
#else
    constexpr int kRounds = 30;  // a sanitizer sees at once what else has to hit something
#endif
    std::atomic<bool> stop{false};
    std::thread other([&] {
        for (int n = 1; !stop; n = 4 - n) ttt4as::set_num_threads(n);
    });
    for (int round = 0; round < kRounds; ++round) {
        const ttt4as::KnnIndex index(ttt4as::Matrix<const float>{bank.data(), kRows, kDims, kDims});
        index.search(ttt4as::Matrix<const float>{bank.data(), kQueries, kDims, kDims}, 1, distances.data(),
                     indices.data());
        for (std::int64_t q = 0; q < kQueries; ++q) CHECK(indices[q] == q);
    }
    stop = true;
    other.join();
    ttt4as::set_num_threads(0);
}

}  // namespace

// No address, more columns than there can be, no stride, and objects that were moved from and assigned to.
void check_misuse() {
    using ttt4as::InvalidArgument;
    using ttt4as::Matrix;
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
    Random random(77);
    const std::vector<float> points = random.normals(40 * 6);
    const Matrix<const float> bank{points.data(), 40, 6};
    CHECK(bank.stride == 6);
    const Matrix<const float> nowhere{nullptr, 40, 6, 6}, wide{points.data(), 40, kMost, 6};
    std::vector<float> distances(40);
    std::vector<std::int64_t> indices(40);
    CHECK_THROWS(InvalidArgument, ttt4as::KnnIndex(nowhere));
    CHECK_THROWS(InvalidArgument, ttt4as::KnnIndex(wide));
    CHECK_THROWS(InvalidArgument, ttt4as::KnnIndex(bank, nullptr, std::size_t(5000)));
    ttt4as::KnnIndex first(bank);
    ttt4as::KnnIndex index = std::move(first);
    CHECK_THROWS(InvalidArgument, index.search(nowhere, 1, distances.data(), indices.data()));
    CHECK_THROWS(InvalidArgument, index.search(bank, 1, nullptr, indices.data()));
    CHECK_THROWS(InvalidArgument, index.search(bank, 1, distances.data(), nullptr));
    index.search(Matrix<const float>{nullptr, 0, 6}, 1, nullptr, nullptr);
    first = ttt4as::KnnIndex(bank);
    first.search(bank, 1, distances.data(), indices.data());
    for (std::int64_t i = 0; i < 40; ++i) CHECK(indices[i] == i && distances[i] == 0);

    CHECK_THROWS(InvalidArgument, ttt4as::GreedyCoreset(nowhere, 0));
    CHECK_THROWS(InvalidArgument, ttt4as::GreedyCoreset(wide, 0));
    ttt4as::GreedyCoreset coreset(bank, 3);
    CHECK_THROWS(InvalidArgument, coreset.pick(1, nullptr));
    coreset.pick(0, nullptr);
    coreset.pick(1, indices.data());
    CHECK(indices[0] == 3 && coreset.picked() == 1);
}

int main() {
    check_threads_that_come_and_go();
#if defined(COUNTS_ALLOCATIONS)
    check_without_memory();
#endif
    check_a_sink_that_asks();
    check_forked_searches();
    Random random(11), other(23);
    for (int kind = 0; kind < kKinds; ++kind) {
        for (const auto& shape :
             {std::pair<std::int64_t, std::int64_t>{1, 1}, {64, 64}, {65, 65}, {700, 130}, {300, 530}}) {
            const auto [n, dims] = shape;
            const std::vector<float> bank = points(random, static_cast<Kind>(kind), n, dims);
            // An exact allocation, so that a sanitizer sees the first byte read past it.
            const ttt4as::KnnIndex index(ttt4as::Matrix<const float>{bank.data(), n, dims, dims}, 2);
            check_search(index, bank, points(random, static_cast<Kind>(kind), 11, dims), std::min<std::int64_t>(n, 9),
                         2);
            check_search(index, bank, points(random, kOutliers, 5, dims), std::min<std::int64_t>(n, 64), 1);
            check_search(index, bank, std::vector<float>(bank.begin(), bank.begin() + dims), n, 1);
            if (kind == kStructured || kind == kNoise) check_saved(index, bank, points(other, kNoise, 20, dims));
            check_coreset(bank, n, dims, n);
        }
    }
    {
        const std::vector<float> bank = points(random, kStructured, 20000, 70);
        const ttt4as::KnnIndex index(ttt4as::Matrix<const float>{bank.data(), 20000, 70, 70});
        check_search(index, bank, points(random, kStructured, 9, 70), 3, 2);
        check_coreset(bank, 20000, 70, 40);
        CHECK(index.counts().unstructured == 0 && index.bytes() > 20000 * 64);
    }
    {
        const std::vector<float> bank = points(random, kNoise, 1500, 300);
        const ttt4as::KnnIndex index(ttt4as::Matrix<const float>{bank.data(), 1500, 300, 300});
        const std::vector<float> query = points(random, kNoise, 12, 300);
        std::vector<std::thread> threads;
        for (int t = 0; t < 4; ++t) threads.emplace_back([&] { check_search(index, bank, query, 5, 2); });
        for (std::thread& thread : threads) thread.join();
        CHECK(index.counts().unstructured == 48);
        check_saved(index, bank, query);
        CHECK_THROWS(ttt4as::InvalidArgument, check_search(index, bank, query, 1501, 1));
        float distance = 0;
        std::int64_t place = 0;
        for (const std::int64_t rows : {std::int64_t(-1), std::numeric_limits<std::int64_t>::max()}) {
            const ttt4as::Matrix<const float> odd{query.data(), rows, 300, 300};
            CHECK_THROWS(ttt4as::InvalidArgument, index.search(odd, 1, &distance, &place, 1));
        }
    }
    {
        // Queries far out along one coordinate: no code reaches there, and all points are nearly as far away.
        for (const std::int64_t dims : {20, 120}) {
            const std::vector<float> bank = points(random, kNoise, 1500, dims);
            const ttt4as::KnnIndex index(ttt4as::Matrix<const float>{bank.data(), 1500, dims, dims});
            std::vector<float> query = points(random, kNoise, 70, dims);
            for (std::int64_t q = 0; q < 70; ++q) query[q * dims + q % dims] += q % 7 ? 5e3f : 2e18f;
            check_search(index, bank, query, 5, 2);
            CHECK(index.counts().dense > 35 && index.counts().unstructured >= index.counts().dense);
        }
    }
    CHECK_THROWS(ttt4as::InvalidArgument, ttt4as::KnnIndex(ttt4as::Matrix<const float>{nullptr, 0, 3, 3}));
    const float one = 1;
    CHECK_THROWS(ttt4as::InvalidArgument, ttt4as::GreedyCoreset(ttt4as::Matrix<const float>{&one, 1, 1, 1}, 1));
    check_misuse();
    return 0;
}
