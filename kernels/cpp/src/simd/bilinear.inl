// The loops of bilinear_kernels.hpp, compiled once per instruction set (see ttt4as/simd.hpp), without fused operations.
#include "bilinear_kernels.hpp"
#include "simd/vec.hpp"

namespace ttt4as {
namespace TTT4AS_ISA {
namespace {

// How a vector of T is loaded, computed on and stored.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    using V = vf;
    static constexpr int N = kF;
    TTT4AS_INLINE V get(const float* p) { return loadf(p); }
    TTT4AS_INLINE void put(float* p, V v) { store(p, v); }
};

template <>
struct Lanes<double> {
    using V = vd;
    static constexpr int N = kD;
    TTT4AS_INLINE V get(const double* p) { return loadd(p); }
    TTT4AS_INLINE void put(double* p, V v) { store(p, v); }
};

template <>
struct Lanes<Half> {
    using V = vf;
    static constexpr int N = kF;
#if defined(TTT4AS_BUILD_AVX512)
    TTT4AS_INLINE V get(const Half* p) {
        return reinterpret_cast<V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    }
    TTT4AS_INLINE void put(Half* p, V v) {
        const __m256i halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
    }
#elif defined(TTT4AS_BUILD_AVX2)
    TTT4AS_INLINE V get(const Half* p) {
        return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    TTT4AS_INLINE void put(Half* p, V v) {
        const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
    }
#else
    TTT4AS_INLINE V get(const Half* p) {
        float lane[N];
        for (int i = 0; i < N; ++i) lane[i] = to_float(p[i]);
        return loadf(lane);
    }
    TTT4AS_INLINE void put(Half* p, V v) {
        float lane[N];
        store(lane, v);
        for (int i = 0; i < N; ++i) p[i] = to_half(lane[i]);
    }
#endif
};

template <>
struct Lanes<BFloat16> {
    using V = vf;
    static constexpr int N = kF;
    TTT4AS_INLINE V get(const BFloat16* p) {
#if defined(TTT4AS_BUILD_AVX512)
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return reinterpret_cast<V>(_mm512_slli_epi32(wide, 16));
#elif defined(TTT4AS_BUILD_AVX2)
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return reinterpret_cast<V>(_mm256_slli_epi32(wide, 16));
#else
        std::uint32_t lane[N];
        for (int i = 0; i < N; ++i) lane[i] = static_cast<std::uint32_t>(p[i].bits) << 16;
        return load<V>(lane);
#endif
    }
    TTT4AS_INLINE void put(BFloat16* p, V v) {
        typedef std::uint32_t vu __attribute__((vector_size(TTT4AS_VECTOR_BYTES)));
        const vu bits = reinterpret_cast<vu>(v);
        const vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        const vu result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? vu{} + 0x7FC0u : rounded;
#if defined(TTT4AS_BUILD_AVX512)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(result)));
#elif defined(TTT4AS_BUILD_AVX2)
        const __m256i wide = reinterpret_cast<__m256i>(result);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
        std::uint32_t lane[N];
        store(lane, result);
        for (int i = 0; i < N; ++i) p[i].bits = static_cast<std::uint16_t>(lane[i]);
#endif
    }
};

// From `from` to `to`, `count` < N of N elements; with AVX-512 the others become zeros where all N are `kWhole`.
template <class T, bool kWhole>
TTT4AS_INLINE void copy_some(T* to, const T* from, std::int64_t count) {
#if defined(TTT4AS_BUILD_AVX512)
    const unsigned mask = (1u << count) - 1;
    if constexpr (sizeof(T) == 2) {
        const __m256i some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
        kWhole ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), some)
               : _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), some);
    } else if constexpr (sizeof(T) == 4) {
        const __m512i some = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
        kWhole ? _mm512_storeu_si512(to, some) : _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), some);
    } else {
        const __m512i some = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
        kWhole ? _mm512_storeu_si512(to, some) : _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), some);
    }
#else
    __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
#endif
}

// `count` < N elements, and zeros.
template <class T>
TTT4AS_INLINE typename Lanes<T>::V get_some(const T* p, std::int64_t count) {
    T lane[Lanes<T>::N] = {};
    copy_some<T, true>(lane, p, count);
    return Lanes<T>::get(lane);
}
template <class T>
TTT4AS_INLINE void put_some(T* p, typename Lanes<T>::V v, std::int64_t count) {
    T lane[Lanes<T>::N];
    Lanes<T>::put(lane, v);
    copy_some<T, false>(p, lane, count);
}

// From elements of A to such of B.
template <class A, class B, class C>
TTT4AS_INLINE void blend_vectors(const A* a, const A* b, C weight_a, C weight_b, std::int64_t n, B* out) {
    using V = typename Lanes<A>::V;
    constexpr int N = Lanes<A>::N;
    const V first = V{} + weight_a, second = V{} + weight_b;
    std::int64_t i = 0;
    for (; i + N <= n; i += N) Lanes<B>::put(out + i, Lanes<A>::get(a + i) * first + Lanes<A>::get(b + i) * second);
    if (i < n) put_some(out + i, get_some(a + i, n - i) * first + get_some(b + i, n - i) * second, n - i);
}

template <class T, class C>
void blend(const T* a, const T* b, C weight_a, C weight_b, std::int64_t n, C* out) {
    blend_vectors(a, b, weight_a, weight_b, n, out);
}

template <class T, class C>
void mix(const C* a, const C* b, C weight_a, C weight_b, std::int64_t n, T* out) {
    blend_vectors(a, b, weight_a, weight_b, n, out);
}

// The N elements of a row at `positions`.
TTT4AS_INLINE vf gather(const float* row, const std::int32_t* positions) {
#if defined(TTT4AS_BUILD_AVX512)
    return reinterpret_cast<vf>(_mm512_i32gather_ps(_mm512_loadu_si512(positions), row, 4));
#elif defined(TTT4AS_BUILD_AVX2)
    return reinterpret_cast<vf>(
        _mm256_i32gather_ps(row, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions)), 4));
#else
    float lane[kF];
    for (int i = 0; i < kF; ++i) lane[i] = row[positions[i]];
    return loadf(lane);
#endif
}
TTT4AS_INLINE vd gather(const double* row, const std::int32_t* positions) {
    double lane[kD];
    for (int i = 0; i < kD; ++i) lane[i] = row[positions[i]];
    return loadd(lane);
}

// `pick` makes the vector of a row's elements at N positions.
template <class T, class C, class Pick>
TTT4AS_INLINE void spread_picked(const Pick& pick, const std::int32_t* lower, const std::int32_t* upper,
                                 const C* weight_lower, const C* weight_upper, std::int64_t n, T* out) {
    constexpr int N = Lanes<T>::N;
    std::int64_t i = 0;
    for (; i + N <= n; i += N) {
        Lanes<T>::put(out + i, pick(lower + i) * Lanes<C>::get(weight_lower + i) +
                                   pick(upper + i) * Lanes<C>::get(weight_upper + i));
    }
    if (i == n) return;
    const std::int64_t rest = n - i;
    std::int32_t left[N] = {}, right[N] = {};
    __builtin_memcpy(left, lower + i, static_cast<std::size_t>(rest) * sizeof *left);
    __builtin_memcpy(right, upper + i, static_cast<std::size_t>(rest) * sizeof *right);
    put_some(out + i, pick(left) * get_some(weight_lower + i, rest) + pick(right) * get_some(weight_upper + i, rest),
             rest);
}

template <class T, class C>
void spread(const C* row, std::int64_t width, const std::int32_t* lower, const std::int32_t* upper,
            const C* weight_lower, const C* weight_upper, std::int64_t n, T* out) {
#if defined(TTT4AS_BUILD_AVX512)
    if constexpr (sizeof(C) == sizeof(float)) {
        if (width <= 2 * kF) {  // a row in two registers
            float whole[2 * kF] = {};
            __builtin_memcpy(whole, row, static_cast<std::size_t>(width) * sizeof *whole);
            const __m512 low = _mm512_loadu_ps(whole), high = _mm512_loadu_ps(whole + kF);
            const auto pick = [&](const std::int32_t* positions) {
                return reinterpret_cast<vf>(_mm512_permutex2var_ps(low, _mm512_loadu_si512(positions), high));
            };
            spread_picked(pick, lower, upper, weight_lower, weight_upper, n, out);
            return;
        }
    }
#endif
    (void)width;
    const auto pick = [&](const std::int32_t* positions) { return gather(row, positions); };
    spread_picked(pick, lower, upper, weight_lower, weight_upper, n, out);
}

template <class T, class C>
void sample(const T* const* taps, const C* weights, std::int64_t n, C* out) {
    using V = typename Lanes<T>::V;
    constexpr int N = Lanes<T>::N;
    const V left = V{} + weights[0], right = V{} + weights[1], top = V{} + weights[2], bottom = V{} + weights[3];
    const auto at = [&](V a, V b, V c, V d) { return (a * left + b * right) * top + (c * left + d * right) * bottom; };
    std::int64_t i = 0;
    for (; i + N <= n; i += N) {
        store(out + i, at(Lanes<T>::get(taps[0] + i), Lanes<T>::get(taps[1] + i), Lanes<T>::get(taps[2] + i),
                          Lanes<T>::get(taps[3] + i)));
    }
    if (i == n) return;
    V some[4];
    for (int k = 0; k < 4; ++k) some[k] = get_some(taps[k] + i, n - i);
    put_some(out + i, at(some[0], some[1], some[2], some[3]), n - i);
}

void decide(const float* __restrict top, const float* __restrict bottom, float weight, std::int64_t n,
            float* __restrict out, std::uint8_t* __restrict positive) {
    for (std::int64_t i = 0; i < n; ++i) {
        const float value = top[i] + weight * (bottom[i] - top[i]);
        out[i] = value;
        positive[i] = value > 0;
    }
}

}  // namespace

extern const BilinearTable bilinear_table;
const BilinearTable bilinear_table = {
    {blend<Half>, mix<Half>, spread<Half>, sample<Half>},
    {blend<BFloat16>, mix<BFloat16>, spread<BFloat16>, sample<BFloat16>},
    {blend<float>, mix<float>, spread<float>, sample<float>},
    {blend<double>, mix<double>, spread<double>, sample<double>},
    decide,
};

}  // namespace TTT4AS_ISA
}  // namespace ttt4as
