// The integer loops of a search: every instruction set that this processor has computes what the generic code does.
//
// TTT4AS_ISA names the most that may be used: here the tables below are called by themselves.
#include <algorithm>
#include <functional>
#include <vector>

#include "check.hpp"
#include "sketch_kernels.hpp"
#include "ttt4as/simd.hpp"

using ttt4as::kMostKey;
using ttt4as::kQuad;
using ttt4as::kSpill;
using ttt4as::kStrip;
using ttt4as::SketchKernels;

namespace {

template <class T>
std::vector<T> random_integers(Random& random, std::int64_t n, std::int64_t low, std::int64_t high) {
    std::vector<T> values(static_cast<std::size_t>(n));
    for (T& value : values) value = static_cast<T>(low + random.below(high - low + 1));
    return values;
}

struct Strip {
    std::vector<std::uint8_t> codes;
    std::vector<std::int8_t> bytes;
    std::vector<std::int16_t> words;
    std::vector<std::int32_t> offset;
};

// With `extreme` codes, all bytes are at the ends of their ranges: no sum may saturate.
Strip make_strip(Random& random, std::int64_t dims, bool extreme) {
    Strip strip{random_integers<std::uint8_t>(random, dims * kStrip, 0, 255),
                random_integers<std::int8_t>(random, dims * kQuad, -127, 127),
                {},
                random_integers<std::int32_t>(random, kStrip, -100000, 100000)};
    if (extreme) {
        for (auto& code : strip.codes) code = code < 20 ? 0 : 255;
        for (auto& byte : strip.bytes) byte = byte < -110 ? -127 : 127;
    }
    strip.words.assign(strip.bytes.begin(), strip.bytes.end());
    return strip;
}

void check_strips(const SketchKernels& table, const SketchKernels& plain) {
    Random random(1);
    constexpr std::int64_t kStride = kStrip + 3;
    for (const std::int64_t dims : {4, 8, 48, 64, 384, 1024}) {
        for (const bool extreme : {false, true}) {
            const Strip strip = make_strip(random, dims, extreme);
            const auto *codes = strip.codes.data(), *end = codes + strip.codes.size();
            CHECK(end - codes == dims * kStrip);
            std::vector<std::int32_t> keys[2], best[2];
            for (int i = 0; i < 2; ++i) {
                keys[i].assign(kQuad * kStride, 0);
                best[i].assign(kQuad * 2, 0);
                (i ? plain : table)
                    .keys(codes, 1, {strip.bytes.data(), strip.words.data(), kQuad, dims}, strip.offset.data(),
                          keys[i].data(), kStride, best[i].data(), 2);
            }
            CHECK(keys[0] == keys[1] && best[0] == best[1]);
            CHECK(best[0][0] == *std::max_element(keys[0].begin(), keys[0].begin() + kStrip));
            std::int32_t least[kQuad], twice[kQuad];
            for (int q = 0; q < kQuad; ++q) {
                least[q] = keys[0][q * kStride + 7 * q + 1];  // met, and not by all
                twice[q] = 2 * least[q];
            }
            std::uint64_t left[2][kQuad];
            for (int i = 0; i < 2; ++i) {
                (i ? plain : table)
                    .refine(codes, strip.bytes.data(), strip.words.data(), dims, strip.offset.data(), keys[0].data(),
                            kStride, twice, left[i]);
            }
            for (int q = 0; q < kQuad; ++q) {
                CHECK(left[0][q] == left[1][q] && (left[0][q] >> (7 * q + 1) & 1));
                const auto* bytes = strip.bytes.data() + q * dims;
                const auto* words = strip.words.data() + q * dims;
                const std::uint64_t reached = table.reach(codes, bytes, words, dims, strip.offset.data(), least[q]);
                CHECK(reached == plain.reach(codes, bytes, words, dims, strip.offset.data(), least[q]));
                CHECK(reached == left[0][q]);  // twice the key reaches twice the least where the key reaches the least
                CHECK(table.between(keys[0].data() + q * kStride, least[q], best[0][2 * q]) ==
                      plain.between(keys[0].data() + q * kStride, least[q], best[0][2 * q]));
            }
        }
    }
}

// As many keys reach the bound as are wanted, and more only where they are equal.
void check_greatest(const SketchKernels& table) {
    Random random(7);
    for (const std::int64_t n : {1, 2, 15, 16, 17, 43, 204}) {
        for (const std::int32_t most : {0, 2, 50, (1 << 30)}) {
            auto keys = random_integers<std::int32_t>(random, n, -most, most);
            keys[n / 2] = most ? kMostKey : 0;  // the farthest apart that there are
            keys[n / 3] = most ? -kMostKey - 1 : 0;
            auto falling = keys;
            std::sort(falling.begin(), falling.end(), std::greater<std::int32_t>());
            for (std::int64_t wanted = 1; wanted <= n; ++wanted) {
                const std::int32_t bound = table.nth_greatest(keys.data(), n, wanted);
                CHECK(bound <= falling[wanted - 1]);
                CHECK(wanted == n || falling[wanted] == falling[wanted - 1] || bound > falling[wanted]);
            }
        }
    }
}

// Several strips at once, for as many queries as a search has: what one strip and four queries give.
void check_groups(const SketchKernels& table, const SketchKernels& plain) {
    Random random(4);
    constexpr std::int64_t kStrips = 5, kStride = kStrips * kStrip + 16, kBestStride = kStrips + 2;
    for (const std::int64_t dims : {16, 64, 192}) {
        for (const std::int64_t count : {4, 8, 12, 16, 20, 32}) {
            const auto codes = random_integers<std::uint8_t>(random, kStrips * dims * kStrip, 0, 255);
            const auto bytes = random_integers<std::int8_t>(random, count * dims, -127, 127);
            const std::vector<std::int16_t> words(bytes.begin(), bytes.end());
            const auto offset = random_integers<std::int32_t>(random, kStrips * kStrip, 0, 1 << 30);
            std::vector<std::int32_t> keys(count * kStride, -1), best(count * kBestStride, -1);
            std::vector<std::int32_t> right_keys = keys, right_best = best;
            table.keys(codes.data(), kStrips, {bytes.data(), words.data(), count, dims}, offset.data(), keys.data(),
                       kStride, best.data(), kBestStride);
            for (std::int64_t s = 0; s < kStrips; ++s) {
                for (std::int64_t q = 0; q < count; q += kQuad) {
                    plain.keys(codes.data() + s * dims * kStrip, 1,
                               {bytes.data() + q * dims, words.data() + q * dims, kQuad, dims},
                               offset.data() + s * kStrip, right_keys.data() + q * kStride + s * kStrip, kStride,
                               right_best.data() + q * kBestStride + s, kBestStride);
                }
            }
            CHECK(keys == right_keys && best == right_best);  // and nothing written between them
        }
    }
}

void check_distances(const SketchKernels& table, const SketchKernels& plain) {
    Random random(2);
    constexpr std::int64_t kRows = 50;
    for (const std::int64_t n : {64, 128, 1024}) {
        for (const std::int64_t most : {3, 127}) {
            const auto query = random_integers<std::int8_t>(random, n, -most, most);
            const auto codes = random_integers<std::int8_t>(random, kRows * n, -most, most);
            for (const std::int64_t count : {0, 1, 3, 4, 5, 23}) {
                const auto positions = random_integers<std::int32_t>(random, count + kSpill, 0, kRows - 1);
                std::vector<std::int32_t> out[2], rests[2];
                for (int i = 0; i < 2; ++i) {
                    out[i].assign(count, -1);
                    rests[i].assign(count, -1);
                    (i ? plain : table)
                        .code_distances(query.data(), codes.data(), n, positions.data(), count, out[i].data(),
                                        rests[i].data());
                }
                CHECK(out[0] == out[1] && rests[0] == rests[1]);
            }
        }
    }
}

void check_collected(const SketchKernels& table, const SketchKernels& plain) {
    Random random(3);
    const auto keys = random_integers<std::int32_t>(random, kStrip, -1000, 1000);
    for (std::uint64_t bits : {std::uint64_t(0), ~std::uint64_t(0), random.bits(), random.bits() & random.bits()}) {
        std::vector<std::int32_t> positions[2], found[2];
        for (int i = 0; i < 2; ++i) {
            positions[i].resize(kStrip + kSpill);
            found[i].resize(kStrip + kSpill);
            const auto n = (i ? plain : table).collect(keys.data(), bits, 128, positions[i].data(), found[i].data());
            CHECK(n == __builtin_popcountll(bits));
            positions[i].resize(n);
            found[i].resize(n);
        }
        CHECK(positions[0] == positions[1] && found[0] == found[1]);
    }
}

}  // namespace

int main() {
    const SketchKernels& plain = ttt4as::generic::sketch_table;
    std::vector<const SketchKernels*> tables = {&plain, &ttt4as::sketch_kernels()};
#if defined(TTT4AS_HAVE_X86_VARIANTS)
    if (ttt4as::isa() >= ttt4as::Isa::avx2) tables.push_back(&ttt4as::avx2::sketch_table);
    if (ttt4as::isa() >= ttt4as::Isa::avx512) tables.push_back(&ttt4as::avx512::sketch_table);
    if (ttt4as::isa() >= ttt4as::Isa::avx512 && __builtin_cpu_supports("avx512vnni"))
        tables.push_back(&ttt4as::avx512::sketch_table_vnni);
#endif
    for (const SketchKernels* table : tables) {
        check_strips(*table, plain);
        check_groups(*table, plain);
        check_greatest(*table);
        check_distances(*table, plain);
        check_collected(*table, plain);
    }
    return 0;
}
