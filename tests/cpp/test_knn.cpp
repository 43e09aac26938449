// Nearest neighbours through the C++ and the C interface, against brute force in double.
#include <algorithm>
#include <cstring>

#include "check.hpp"
#include "ttt4as/c_api.h"
#include "ttt4as/knn.hpp"

int main() {
    Random random(3);
    const std::int64_t shapes[][4] = {{1, 1, 1, 1}, {50, 3, 7, 5}, {400, 70, 33, 9}, {700, 200, 20, 1}};
    for (const auto& shape : shapes) {
        const std::int64_t n = shape[0], dims = shape[1], queries = shape[2], k = shape[3];
        const std::vector<float> bank = random.normals(n * dims), query = random.normals(queries * dims);
        std::vector<float> distances(static_cast<std::size_t>(queries * k)), again(distances.size());
        std::vector<std::int64_t> indices(distances.size()), indices_again(distances.size());
        const ttt4as::KnnIndex index(ttt4as::Matrix<const float>{bank.data(), n, dims, dims});
        index.search(ttt4as::Matrix<const float>{query.data(), queries, dims, dims}, k, distances.data(),
                     indices.data());
        ttt4as_knn_index* handle = ttt4as_knn_create(bank.data(), n, dims, 0);
        CHECK(handle &&
              ttt4as_knn_search(handle, query.data(), queries, k, again.data(), indices_again.data(), 1) == 0);
        CHECK(again == distances && indices_again == indices);
        CHECK(ttt4as_knn_search(handle, query.data(), queries, n + 1, again.data(), indices_again.data(), 1) < 0);
        std::vector<float> broken = query;
        broken.back() = std::numeric_limits<float>::quiet_NaN();
        CHECK(ttt4as_knn_search(handle, broken.data(), queries, k, again.data(), indices_again.data(), 1) ==
              TTT4AS_INVALID_ARGUMENT);
        broken.assign(bank.begin(), bank.end());
        broken[0] = std::numeric_limits<float>::infinity();
        CHECK(!ttt4as_knn_create(broken.data(), n, dims, 0));
        // Saved and opened again it finds the same; what is cut short is refused, and a sink that fails is heard.
        ttt4as::Buffer<char> prepared(std::size_t(1) << 22);
        struct Written {
            char* data;
            std::size_t size;
        } written{prepared.data(), 0};
        const auto append = [](void* context, const void* data, std::size_t bytes) {
            auto* to = static_cast<Written*>(context);
            std::memcpy(to->data + to->size, data, bytes);
            to->size += bytes;
            return 0;
        };
        CHECK(ttt4as_knn_save(handle, append, &written) == 0);
        CHECK(ttt4as_knn_save(handle, [](void*, const void*, std::size_t) { return 7; }, nullptr) == 7);
        CHECK(ttt4as_knn_save(handle, nullptr, nullptr) == TTT4AS_INVALID_ARGUMENT);
        ttt4as_knn_destroy(handle);
        CHECK(!ttt4as_knn_open(bank.data(), n, dims, written.data, written.size / 2, 1));
        CHECK(!ttt4as_knn_open(nullptr, n, dims, written.data, written.size, 1));
        ttt4as_knn_index* opened = ttt4as_knn_open(bank.data(), n, dims, written.data, written.size, 1);
        CHECK(opened &&
              ttt4as_knn_search(opened, query.data(), queries, k, again.data(), indices_again.data(), 1) == 0);
        CHECK(again == distances && indices_again == indices);
        ttt4as_knn_destroy(opened);
        for (std::int64_t q = 0; q < queries; ++q) {
            std::vector<std::pair<double, std::int64_t>> all;
            for (std::int64_t i = 0; i < n; ++i) {
                double sum = 0;
                for (std::int64_t c = 0; c < dims; ++c) {
                    const double move =
                        static_cast<double>(query[q * dims + c]) - static_cast<double>(bank[i * dims + c]);
                    sum += move * move;
                }
                all.emplace_back(std::sqrt(sum), i);
            }
            std::sort(all.begin(), all.end());
            for (std::int64_t r = 0; r < k; ++r) {
                CHECK(indices[q * k + r] == all[r].second);
                CHECK(std::abs(distances[q * k + r] - all[r].first) <= 1e-6 * all[r].first);
            }
        }
    }
    return 0;
}
