// Vectors as wide as the instruction set this file is compiled for: 64, 32 or 16 bytes. GCC and Clang vector
// extensions, so that + - * / and comparisons are operators, the 16-byte case is SSE2 and NEON alike, and a*b+c becomes
// a fused multiply-add where there is one. For use in src/simd/*.inl only; everything has internal linkage (see
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
// kD floats, widened.
TTT4AS_INLINE vd widen(const float* p) { return __builtin_convertvector(load<vfh>(p), vd); }
TTT4AS_INLINE vf setf(float x) { return vf{} + x; }
TTT4AS_INLINE vd setd(double x) { return vd{} + x; }

template <class V>
TTT4AS_INLINE V vmax(V a, V b) {
    return a > b ? a : b;
}
template <class V>
TTT4AS_INLINE V vmin(V a, V b) {
    return a < b ? a : b;
}

// A mask (all bits of a lane set or none) as one bit a lane, lane 0 lowest.
TTT4AS_INLINE unsigned bits(vi mask) {
#if defined(TTT4AS_BUILD_AVX512)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(TTT4AS_BUILD_AVX2)
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
#if defined(TTT4AS_BUILD_AVX512)
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#elif defined(TTT4AS_BUILD_AVX2)
    return static_cast<unsigned>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#elif defined(__SSE2__)
    return static_cast<unsigned>(_mm_movemask_pd(reinterpret_cast<__m128d>(mask)));
#else
    unsigned result = 0;
    for (int i = 0; i < kD; ++i) result |= (mask[i] ? 1u : 0u) << i;
    return result;
#endif
}

// Sums of the lanes, halving: the order is fixed.
TTT4AS_INLINE float hsum(vf v) {
    float lane[kF];
    store(lane, v);
    for (int width = kF / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}
TTT4AS_INLINE double hsum(vd v) {
    double lane[kD];
    store(lane, v);
    for (int width = kD / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}
// The sum of a vector of floats as a double.
TTT4AS_INLINE double hsum_wide(vf v) {
    float lane[kF];
    store(lane, v);
    return hsum(widen(lane) + widen(lane + kD));
}

}  // namespace
}  // namespace TTT4AS_ISA
}  // namespace ttt4as
