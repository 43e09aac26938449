// Vectors as wide as the instruction set this file is compiled for: 64, 32 or 16 bytes. GCC and Clang vector
// extensions, so that + - * / and comparisons are operators, the 16-byte case is SSE2 and NEON alike, and a*b+c becomes
// a fused multiply-add where there is one. For use in src/simd only; everything has internal linkage (see
// simd.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(TTT4AS_BUILD_AVX512)
#define TTT4AS_ISA avx512
#define TTT4AS_VECTOR_BYTES 64
#elif defined(TTT4AS_BUILD_AVX2)
#define TTT4AS_ISA avx2
#define TTT4AS_VECTOR_BYTES 32
#else
#define TTT4AS_ISA generic
#define TTT4AS_VECTOR_BYTES 16
#endif

#define TTT4AS_INLINE static inline __attribute__((always_inline))

namespace ttt4as {
namespace TTT4AS_ISA {
namespace {

typedef float vf __attribute__((vector_size(TTT4AS_VECTOR_BYTES)));         // floats
typedef double vd __attribute__((vector_size(TTT4AS_VECTOR_BYTES)));        // doubles
typedef std::int32_t vi __attribute__((vector_size(TTT4AS_VECTOR_BYTES)));  // 32-bit integers, and masks of vf
typedef std::int64_t vl __attribute__((vector_size(TTT4AS_VECTOR_BYTES)));  // 64-bit integers, and masks of vd
typedef float vfh __attribute__((vector_size(TTT4AS_VECTOR_BYTES / 2)));    // half a vf: as many floats as a vd holds
typedef std::int32_t vih __attribute__((vector_size(TTT4AS_VECTOR_BYTES / 2)));

constexpr int kF = TTT4AS_VECTOR_BYTES / 4;  // lanes of vf
constexpr int kD = TTT4AS_VECTOR_BYTES / 8;  // lanes of vd

// V wherever it lies. Not through memcpy: GCC keeps what a copy of 64 bytes has touched in memory, accumulators among
// it.
template <class V>
struct Unaligned {
    typedef V type __attribute__((aligned(1), may_alias));
};
template <class V, class T>
TTT4AS_INLINE V load(const T* p) {
    return *reinterpret_cast<const typename Unaligned<V>::type*>(p);
}
template <class V, class T>
TTT4AS_INLINE void store(T* p, V v) {
    *reinterpret_cast<typename Unaligned<V>::type*>(p) = v;
}
TTT4AS_INLINE vf loadf(const float* p) { return load<vf>(p); }
TTT4AS_INLINE vd loadd(const double* p) { return load<vd>(p); }
// One instruction each; of the vector extension's conversions between elements of different sizes GCC makes five.
TTT4AS_INLINE vd widen(vfh x) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vd>(_mm512_maskz_cvtps_pd(0xFF, reinterpret_cast<__m256>(x)));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vd>(_mm256_cvtps_pd(reinterpret_cast<__m128>(x)));
#else
    return __builtin_convertvector(x, vd);
#endif
}
TTT4AS_INLINE vd widen(vih x) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vd>(_mm512_maskz_cvtepi32_pd(0xFF, reinterpret_cast<__m256i>(x)));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vd>(_mm256_cvtepi32_pd(reinterpret_cast<__m128i>(x)));
#else
    return __builtin_convertvector(x, vd);
#endif
}
TTT4AS_INLINE vfh narrow(vd x) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vfh>(_mm512_maskz_cvtpd_ps(0xFF, reinterpret_cast<__m512d>(x)));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vfh>(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(x)));
#else
    return __builtin_convertvector(x, vfh);
#endif
}
// kD floats or doubles as doubles.
TTT4AS_INLINE vd widen(const float* p) { return widen(load<vfh>(p)); }
TTT4AS_INLINE vd widen(const double* p) { return loadd(p); }
TTT4AS_INLINE vf setf(float x) { return vf{} + x; }
TTT4AS_INLINE vd setd(double x) { return vd{} + x; }

// The greater or the lesser; b if either is NaN.
TTT4AS_INLINE vf vmax(vf a, vf b) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<vf>(_mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
    return a > b ? a : b;
#endif
}
TTT4AS_INLINE vd vmax(vd a, vd b) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vd>(_mm512_max_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vd>(_mm256_max_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<vd>(_mm_max_pd(reinterpret_cast<__m128d>(a), reinterpret_cast<__m128d>(b)));
#else
    return a > b ? a : b;
#endif
}
TTT4AS_INLINE vf vmin(vf a, vf b) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vf>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<vf>(_mm_min_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
    return a < b ? a : b;
#endif
}
TTT4AS_INLINE vd vmin(vd a, vd b) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vd>(_mm512_min_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vd>(_mm256_min_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<vd>(_mm_min_pd(reinterpret_cast<__m128d>(a), reinterpret_cast<__m128d>(b)));
#else
    return a < b ? a : b;
#endif
}

#if !defined(TTT4AS_BUILD_AVX512)  // which compares into masks of its own
// A mask (all bits of a lane set or none) as one bit a lane, lane 0 lowest.
TTT4AS_INLINE unsigned bits(vi mask) {
#if defined(TTT4AS_BUILD_AVX2)
    return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__)
    return static_cast<unsigned>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
    unsigned result = 0;
    for (int i = 0; i < kF; ++i) result |= (mask[i] ? 1u : 0u) << i;
    return result;
#endif
}
TTT4AS_INLINE unsigned bits(vl mask) {
#if defined(TTT4AS_BUILD_AVX2)
    return static_cast<unsigned>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#elif defined(__SSE2__)
    return static_cast<unsigned>(_mm_movemask_pd(reinterpret_cast<__m128d>(mask)));
#else
    unsigned result = 0;
    for (int i = 0; i < kD; ++i) result |= (mask[i] ? 1u : 0u) << i;
    return result;
#endif
}
#endif

// a >= b lane by lane, one bit each. Of a comparison that becomes a mask first, GCC makes four instructions of AVX-512.
TTT4AS_INLINE unsigned at_least(vi a, vi b) {
#if defined(TTT4AS_BUILD_AVX512)
    return _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
#else
    return bits(a >= b);
#endif
}
TTT4AS_INLINE unsigned at_least(vf a, vf b) {
#if defined(TTT4AS_BUILD_AVX512)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
#else
    return bits(a >= b);
#endif
}
TTT4AS_INLINE unsigned at_least(vd a, vd b) {
#if defined(TTT4AS_BUILD_AVX512)
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_GE_OQ);
#else
    return bits(reinterpret_cast<vl>(a >= b));  // Clang's is a vector of long long, another type
#endif
}

// The sum of the lanes, in a fixed order: those of both halves are added in pairs until one is left.
TTT4AS_INLINE float hsum(vf v) {
#if defined(__SSE2__)
#if defined(TTT4AS_BUILD_AVX512)
    const __m512 all = reinterpret_cast<__m512>(v);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#elif defined(TTT4AS_BUILD_AVX2)
    const __m256 eight = reinterpret_cast<__m256>(v);
#endif
#if defined(TTT4AS_BUILD_AVX512) || defined(TTT4AS_BUILD_AVX2)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
    const __m128 four = reinterpret_cast<__m128>(v);
#endif
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float lane[kF];
    store(lane, v);
    for (int width = kF / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
#endif
}
TTT4AS_INLINE double hsum(vd v) {
#if defined(__SSE2__)
#if defined(TTT4AS_BUILD_AVX512)
    const __m512d all = reinterpret_cast<__m512d>(v);
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(all), _mm512_extractf64x4_pd(all, 1));
#elif defined(TTT4AS_BUILD_AVX2)
    const __m256d four = reinterpret_cast<__m256d>(v);
#endif
#if defined(TTT4AS_BUILD_AVX512) || defined(TTT4AS_BUILD_AVX2)
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
#else
    const __m128d two = reinterpret_cast<__m128d>(v);
#endif
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
    double lane[kD];
    store(lane, v);
    for (int width = kD / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
#endif
}

// The halves of v, widened.
TTT4AS_INLINE vd widen_low(vf v) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vd>(_mm512_maskz_cvtps_pd(0xFF, _mm512_castps512_ps256(reinterpret_cast<__m512>(v))));
#else
    float lane[kF];
    store(lane, v);
    return widen(lane);
#endif
}
TTT4AS_INLINE vd widen_high(vf v) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vd>(_mm512_maskz_cvtps_pd(0xFF, _mm512_extractf32x8_ps(reinterpret_cast<__m512>(v), 1)));
#else
    float lane[kF];
    store(lane, v);
    return widen(lane + kD);
#endif
}
// The sum of a vector of floats as a double.
TTT4AS_INLINE double hsum_wide(vf v) { return hsum(widen_low(v) + widen_high(v)); }

}  // namespace
}  // namespace TTT4AS_ISA
}  // namespace ttt4as
