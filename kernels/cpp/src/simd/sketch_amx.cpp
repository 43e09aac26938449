// The keys of sketch_kernels.hpp by the tiles of AMX: one instruction multiplies the codes of up to 16 queries with
// those of 16 points, 64 dimensions at a time. It computes the same integers as the others.
//
// A strip's codes lie as a tile wants them, 16 rows of four dimensions. The intrinsics take literals for tiles: 0 to 3
// hold the sums of a strip's 64 points, 4 the queries, 5 and 6 points.
#define TTT4AS_BUILD_AVX512
#include "simd/vec.hpp"
#include "sketch_kernels.hpp"

namespace ttt4as {
namespace avx512 {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;
constexpr int kLanes = 16;  // sums in a row of a tile

// The intrinsics of GCC 12 do not tell the compiler what memory they read.
TTT4AS_INLINE void written(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

void configure(int queries, int dims) {
    struct {  // as LDTILECFG reads it
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t row_bytes[16];
        std::uint8_t rows[16];
    } config = {};
    static_assert(sizeof config == 64, "the size of a configuration");
    config.palette = 1;
    for (int tile = 0; tile < 7; ++tile) {
        config.rows[tile] = static_cast<std::uint8_t>(tile < 5 ? queries : dims / kQuad);
        config.row_bytes[tile] = static_cast<std::uint16_t>(tile == 4 ? dims : kTileBytes);
    }
    written(&config);
    _tile_loadconfig(&config);
}

// What a strip's sums start with. A tile is slow to load what was written just before: make it one strip ahead.
TTT4AS_INLINE void negate(const std::int32_t* offset, std::int32_t* starts) {
#pragma GCC unroll 4
    for (int p = 0; p < kStrip; p += kLanes)
        _mm512_store_si512(starts + p, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(offset + p)));
    written(starts);
}

// The greatest of the keys of a strip, for four queries.
TTT4AS_INLINE __m128i greatest(const std::int32_t* keys, std::int64_t key_stride) {
    __m128i most[kQuad];
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) {
        const std::int32_t* of = keys + q * key_stride;
        const __m512i all = _mm512_max_epi32(
            _mm512_max_epi32(_mm512_loadu_si512(of), _mm512_loadu_si512(of + kLanes)),
            _mm512_max_epi32(_mm512_loadu_si512(of + 2 * kLanes), _mm512_loadu_si512(of + 3 * kLanes)));
        const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        most[q] = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }
    const __m128i a = _mm_max_epi32(_mm_unpacklo_epi32(most[0], most[1]), _mm_unpackhi_epi32(most[0], most[1]));
    const __m128i b = _mm_max_epi32(_mm_unpacklo_epi32(most[2], most[3]), _mm_unpackhi_epi32(most[2], most[3]));
    return _mm_max_epi32(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
}

// For as many queries as the tiles have been configured for.
void keys_of_tile(const std::uint8_t* codes, std::int64_t strips, const QueryCodes& queries, const std::int32_t* offset,
                  std::int32_t* keys, std::int64_t key_stride, std::int32_t* best, std::int64_t best_stride) {
    const std::int64_t dims = queries.dims, key_bytes = key_stride * static_cast<std::int64_t>(sizeof *keys);
    constexpr std::int64_t kRow = kStrip * kQuad;  // from four dimensions of a strip to the next
    alignas(64) std::int32_t starts[2][kStrip];
    negate(offset, starts[0]);
    _tile_loadd(4, queries.bytes, dims);
    for (std::int64_t s = 0; s < strips; ++s) {
        const std::int32_t* start = starts[s % 2];
        _tile_loadd(0, start, 0);  // the same row for every query
        _tile_loadd(1, start + kLanes, 0);
        _tile_loadd(2, start + 2 * kLanes, 0);
        _tile_loadd(3, start + 3 * kLanes, 0);
        if (s + 1 < strips) negate(offset + (s + 1) * kStrip, starts[(s + 1) % 2]);
        for (std::int64_t d = 0; d < dims; d += kTileBytes) {
            const std::uint8_t* at = codes + (s * dims + d) * kStrip;
            // What comes next, a strip's or the following one's: the rows of a tile lie too far apart for the processor
            // to see it.
#pragma GCC unroll 64
            for (int line = 0; line < kTileBytes; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(at + (kTileBytes + line) * kStrip), _MM_HINT_T0);
            if (dims > kTileBytes) _tile_loadd(4, queries.bytes + d, dims);
            _tile_loadd(5, at, kRow);
            _tile_loadd(6, at + kTileBytes, kRow);
            _tile_dpbsud(0, 4, 5);
            _tile_dpbsud(1, 4, 6);
            _tile_loadd(5, at + 2 * kTileBytes, kRow);
            _tile_loadd(6, at + 3 * kTileBytes, kRow);
            _tile_dpbsud(2, 4, 5);
            _tile_dpbsud(3, 4, 6);
        }
        std::int32_t* to = keys + s * kStrip;
        _tile_stored(0, to, key_bytes);
        _tile_stored(1, to + kLanes, key_bytes);
        _tile_stored(2, to + 2 * kLanes, key_bytes);
        _tile_stored(3, to + 3 * kLanes, key_bytes);
        for (std::int64_t q = 0; q < queries.count; q += kQuad) {
            const __m128i most = greatest(to + q * key_stride, key_stride);
            std::int32_t* of = best + q * best_stride + s;
            of[0] = _mm_extract_epi32(most, 0);
            of[best_stride] = _mm_extract_epi32(most, 1);
            of[2 * best_stride] = _mm_extract_epi32(most, 2);
            of[3 * best_stride] = _mm_extract_epi32(most, 3);
        }
    }
}

}  // namespace

void keys_by_tiles(const std::uint8_t* codes, std::int64_t strips, const QueryCodes& queries,
                   const std::int32_t* offset, std::int32_t* keys, std::int64_t key_stride, std::int32_t* best,
                   std::int64_t best_stride) {
    const std::int64_t dims = queries.dims;
    for (std::int64_t q = 0; q < queries.count; q += kTileRows) {
        const std::int64_t here = queries.count - q < kTileRows ? queries.count - q : kTileRows;
        configure(static_cast<int>(here), static_cast<int>(dims < kTileBytes ? dims : kTileBytes));
        keys_of_tile(codes, strips, {queries.bytes + q * dims, nullptr, here, dims}, offset, keys + q * key_stride,
                     key_stride, best + q * best_stride, best_stride);
    }
    _tile_release();
}

}  // namespace avx512
}  // namespace ttt4as
