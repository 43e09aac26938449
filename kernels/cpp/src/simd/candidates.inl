// The loops of sketch_kernels.hpp over what is left of a strip or of a bank; part of sketch.inl.
#pragma once

#include "simd/vec.hpp"
#include "sketch_kernels.hpp"

namespace ttt4as {
namespace TTT4AS_ISA {
namespace {

std::uint64_t between(const std::int32_t* keys, std::int32_t low, std::int32_t high) {
    const vi least = vi{} + low, most = vi{} + high;
    std::uint64_t result = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kStrip; i += kF) {
        const vi key = load<vi>(keys + i);
        result |= static_cast<std::uint64_t>(at_least(key, least) & ~at_least(key, most)) << i;
    }
    return result;
}

std::int32_t nth_greatest(const std::int32_t* keys, std::int64_t n, std::int64_t wanted) {
    const std::int64_t whole = n / kF * kF;
    std::int32_t last[kF], low = keys[0], high = keys[0];
    for (int i = 0; i < kF; ++i) last[i] = whole + i < n ? keys[whole + i] : -kMostKey - 1;
    for (std::int64_t i = 0; i < n; ++i) {
        low = keys[i] < low ? keys[i] : low;
        high = keys[i] > high ? keys[i] : high;
    }
    if (wanted == 1) return high;
    // At least `wanted` reach `low`, fewer what is above `high`.
    while (low < high) {
        const std::int32_t middle = static_cast<std::int32_t>(low + (std::int64_t(high) - low + 1) / 2);
        const vi least = vi{} + middle;
        std::int64_t count = __builtin_popcount(at_least(load<vi>(last), least));
        for (std::int64_t i = 0; i < whole; i += kF) count += __builtin_popcount(at_least(load<vi>(keys + i), least));
        if (count == wanted) return middle;
        if (count > wanted)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// Nothing in bits[0] to bits[kD - 1] where the best key of a strip is below its least.
TTT4AS_INLINE void leave_some(const CoarseBound& bound, const double* strip_errors, const std::int32_t* keys,
                              const std::int32_t* best, std::uint64_t* left, std::int32_t* counts) {
    const vd radius = bound.inverse * (bound.reach + loadd(strip_errors));
    const vd value = (bound.level - radius * radius) * 0.5 - 2.0;
    const vih least = __builtin_convertvector(vmin(vmax(value, setd(kLeastKey)), setd(kMostKey)), vih);
    const vd highest = widen(load<vih>(best));
    std::int32_t low[kD];
    store(low, least);
    for (int i = 0; i < kD; ++i) left[i] = 0;
    for (unsigned hits = at_least(highest, widen(least)); hits; hits &= hits - 1) {
        const int i = __builtin_ctz(hits);
        left[i] = between(keys + i * kStrip, low[i], bound.seen);
        counts[i] += __builtin_popcountll(left[i]);
    }
}

void leave_strips(const CoarseBound& bound, const double* strip_errors, const std::int32_t* keys,
                  const std::int32_t* best, std::int64_t strips, std::uint64_t* left, std::int32_t* counts) {
    std::int64_t s = 0;
    for (; s + kD <= strips; s += kD)
        leave_some(bound, strip_errors + s, keys + s * kStrip, best + s, left + s, counts + s);
    if (s == strips) return;
    double errors[kD] = {};
    std::int32_t highest[kD], more[kD] = {};
    std::uint64_t last[kD];
    for (int i = 0; i < kD; ++i) {
        const bool there = s + i < strips;
        errors[i] = there ? strip_errors[s + i] : 0.0;
        highest[i] = there ? best[s + i] : kLeastKey - 1;
    }
    leave_some(bound, errors, keys + s * kStrip, highest, last, more);
    for (std::int64_t i = 0; s + i < strips; ++i) {
        left[s + i] = last[i];
        counts[s + i] += more[i];
    }
}

std::int64_t collect(const std::int32_t* keys, std::uint64_t hits, std::int32_t first, std::int32_t* positions,
                     std::int32_t* found) {
    std::int64_t count = 0;
#if defined(TTT4AS_BUILD_AVX512)
    __m512i position = _mm512_add_epi32(_mm512_set1_epi32(first),
                                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
        const auto some = static_cast<__mmask16>(hits >> (16 * v));
        const __m512i key = _mm512_loadu_si512(keys + 16 * v);
        // Compressed in a register: in memory it takes Zen 4 a hundred cycles.
        _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(some, key));
        _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(some, position));
        count += __builtin_popcount(some);
        position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
    }
#else
    for (; hits; hits &= hits - 1) {
        const int at = __builtin_ctzll(hits);
        positions[count] = first + at;
        found[count++] = keys[at];
    }
#endif
    return count;
}

// Distances of kPoints points at once: the query is widened once, and their sums are added up in fewer steps.
#if defined(__AVX2__)
constexpr int kPoints = 4;

TTT4AS_INLINE void add_up(const __m256i (&sums)[kPoints], std::int32_t* out) {
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sum);
}
#else
constexpr int kPoints = 1;
#endif

#if defined(TTT4AS_BUILD_AVX512)

TTT4AS_INLINE __m512i add_squares(__m512i sum, __m512i off) {
#if defined(TTT4AS_BUILD_VNNI)
    return _mm512_dpwssd_epi32(sum, off, off);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(off, off));
#endif
}

TTT4AS_INLINE void distances_of(const std::int8_t* query, const std::int8_t* const* codes, std::int64_t n,
                                std::int32_t* out) {
    __m512i sums[kPoints];
#pragma GCC unroll 4
    for (int p = 0; p < kPoints; ++p) sums[p] = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < n; i += 32) {
        const __m512i q = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + i)));
#pragma GCC unroll 4
        for (int p = 0; p < kPoints; ++p) {
            const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes[p] + i));
            sums[p] = add_squares(sums[p], _mm512_sub_epi16(q, _mm512_cvtepi8_epi16(code)));
        }
    }
    __m256i halves[kPoints];
#pragma GCC unroll 4
    for (int p = 0; p < kPoints; ++p)
        halves[p] = _mm256_add_epi32(_mm512_castsi512_si256(sums[p]), _mm512_extracti64x4_epi64(sums[p], 1));
    add_up(halves, out);
}

#elif defined(__AVX2__)

TTT4AS_INLINE __m256i add_squares(__m256i sum, __m256i off) {
#if defined(TTT4AS_BUILD_VNNI)
    return _mm256_dpwssd_avx_epi32(sum, off, off);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(off, off));
#endif
}

TTT4AS_INLINE void distances_of(const std::int8_t* query, const std::int8_t* const* codes, std::int64_t n,
                                std::int32_t* out) {
    __m256i sums[kPoints];
#pragma GCC unroll 4
    for (int p = 0; p < kPoints; ++p) sums[p] = _mm256_setzero_si256();
    for (std::int64_t i = 0; i < n; i += 16) {
        const __m256i q = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(query + i)));
#pragma GCC unroll 4
        for (int p = 0; p < kPoints; ++p) {
            const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[p] + i));
            sums[p] = add_squares(sums[p], _mm256_sub_epi16(q, _mm256_cvtepi8_epi16(code)));
        }
    }
    add_up(sums, out);
}

#else

TTT4AS_INLINE void distances_of(const std::int8_t* query, const std::int8_t* const* codes, std::int64_t n,
                                std::int32_t* out) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; i += 64) {
        for (int k = 0; k < 64; ++k) {
            const std::int16_t difference = static_cast<std::int16_t>(query[i + k] - codes[0][i + k]);
            sum += difference * difference;
        }
    }
    *out = sum;
}

#endif

void code_distances(const std::int8_t* query, const std::int8_t* codes, std::int64_t n, const std::int32_t* positions,
                    std::int64_t count, std::int32_t* out, std::int32_t* rests) {
    constexpr std::int64_t kAhead = 16;  // points whose codes are on their way
    for (std::int64_t j = 0; j < count; j += kPoints) {
        const std::int8_t* at[kPoints];
        std::int32_t found[kPoints];
        const int here = count - j < kPoints ? static_cast<int>(count - j) : kPoints;
        for (int p = 0; p < kPoints; ++p) {
            at[p] = codes + std::int64_t(positions[j + (p < here ? p : 0)]) * n;
            if (j + kAhead + p >= count) continue;
            const std::int8_t* next = codes + std::int64_t(positions[j + kAhead + p]) * n;
            for (std::int64_t i = 0; i < n; i += 64) __builtin_prefetch(next + i);
        }
        distances_of(query, at, n, found);
        for (int p = 0; p < here; ++p) {
            out[j + p] = found[p];
            if (!rests) continue;
            const int rest = query[n - 2] - at[p][n - 2];
            rests[j + p] = rest * rest;
        }
    }
}

// The errors of the strips of kD points, of which `here` are there.
TTT4AS_INLINE vd errors_of(const double* strip_errors, const std::int32_t* positions, std::int64_t here) {
#if defined(TTT4AS_BUILD_AVX512)
    const __m256i strips = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions)), 6);
    const auto some = static_cast<__mmask8>(here < kD ? (1u << here) - 1 : 255u);
    return reinterpret_cast<vd>(_mm512_mask_i32gather_pd(_mm512_setzero_pd(), some, strips, strip_errors, 8));
#else
    double errors[kD];
    for (int i = 0; i < kD; ++i) errors[i] = i < here ? strip_errors[positions[i] / kStrip] : 0.0;
    return loadd(errors);
#endif
}

std::int64_t leave(const FineBound& bound, const std::int32_t* keys, const std::int32_t* distances,
                   const std::int32_t* rests, const double* strip_errors, std::int32_t* positions, std::int64_t count,
                   double* bounds) {
    static_assert(kStrip == 64, "a shift by 6");
    const auto wide = [](const std::int32_t* p) { return widen(load<vih>(p)); };
    const vd none = {}, greatest = setd(__DBL_MAX__);
    std::int64_t kept = 0;
    for (std::int64_t j = 0; j < count; j += kD) {  // the arrays hold kSpill elements more
        const vd error = bound.error + errors_of(strip_errors, positions + j, count - j), rest = wide(rests + j);
        vd squared = bound.coarse * (bound.level - 2.0 * wide(keys + j) - 1.0) - bound.coarse * rest;
        squared = vmax(squared, none) + bound.fine * (wide(distances + j) - rest);
        const vd most = (bound.reach + error) * (1.0 + 1e-6);
        unsigned hits = at_least(most * most, squared) | ~at_least(greatest, most);  // also where that is no number
        hits &= (1u << (count - j < kD ? count - j : kD)) - 1;
        if (!hits) continue;
        squared = vmax(squared, none);
#if defined(TTT4AS_BUILD_AVX512)
        const __m512d lowest =
            _mm512_sub_pd(_mm512_sqrt_pd(reinterpret_cast<__m512d>(squared)), reinterpret_cast<__m512d>(error));
        const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions + j));
        const auto some = static_cast<__mmask8>(hits);
        _mm512_storeu_pd(bounds + kept, _mm512_maskz_compress_pd(some, lowest));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions + kept), _mm256_maskz_compress_epi32(some, at));
        kept += __builtin_popcount(hits);
#else
        double apart[kD], errors[kD];
        store(apart, squared);
        store(errors, error);
        for (; hits; hits &= hits - 1) {
            const int i = __builtin_ctz(hits);
            bounds[kept] = __builtin_sqrt(apart[i]) - errors[i];
            positions[kept++] = positions[j + i];
        }
#endif
    }
    return kept;
}

}  // namespace
}  // namespace TTT4AS_ISA
}  // namespace ttt4as
