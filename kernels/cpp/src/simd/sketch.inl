// The loops of sketch_kernels.hpp, compiled once per instruction set (see ttt4as/simd.hpp).
//
// `keys` is where a search spends its time: dims multiply-adds a pair, of which one VNNI instruction does 64 (AVX-512)
// or 32 (AVX-VNNI), AVX2 16 in two instructions and SSE2 8. All paths, and sketch_amx.cpp, compute the same integers.
#include "simd/candidates.inl"
#include "simd/vec.hpp"
#include "sketch_kernels.hpp"

namespace ttt4as {
namespace TTT4AS_ISA {
namespace {

#if defined(TTT4AS_BUILD_VNNI)

// kLanes sums in a vector; of kTogether vectors of points those of four queries fit the registers.
#if defined(TTT4AS_BUILD_AVX512)
typedef __m512i Sums;
constexpr int kLanes = 16, kTogether = 4;
TTT4AS_INLINE Sums load_sums(const void* p) { return _mm512_loadu_si512(p); }
TTT4AS_INLINE void store_sums(void* p, Sums v) { _mm512_storeu_si512(p, v); }
TTT4AS_INLINE Sums all(std::int32_t value) { return _mm512_set1_epi32(value); }
TTT4AS_INLINE Sums dot(Sums sums, Sums codes, Sums query) { return _mm512_dpbusd_epi32(sums, codes, query); }
TTT4AS_INLINE Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
TTT4AS_INLINE Sums subtract(Sums a, Sums b) { return _mm512_sub_epi32(a, b); }
TTT4AS_INLINE Sums greater(Sums a, Sums b) { return _mm512_max_epi32(a, b); }
TTT4AS_INLINE std::uint64_t reaching(Sums a, Sums least) { return _mm512_cmpge_epi32_mask(a, least); }
TTT4AS_INLINE __m256i halves(Sums v) {
    return _mm256_max_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
#else
typedef __m256i Sums;
constexpr int kLanes = 8, kTogether = 2;
TTT4AS_INLINE Sums load_sums(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TTT4AS_INLINE void store_sums(void* p, Sums v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
TTT4AS_INLINE Sums all(std::int32_t value) { return _mm256_set1_epi32(value); }
TTT4AS_INLINE Sums dot(Sums sums, Sums codes, Sums query) { return _mm256_dpbusd_avx_epi32(sums, codes, query); }
TTT4AS_INLINE Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
TTT4AS_INLINE Sums subtract(Sums a, Sums b) { return _mm256_sub_epi32(a, b); }
TTT4AS_INLINE Sums greater(Sums a, Sums b) { return _mm256_max_epi32(a, b); }
TTT4AS_INLINE std::uint64_t reaching(Sums a, Sums least) {
    return ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(least, a))) & 0xFF;
}
TTT4AS_INLINE __m256i halves(Sums v) { return v; }
#endif

TTT4AS_INLINE std::int32_t greatest(Sums sums) {
    const __m256i half = halves(sums);
    __m128i v = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4E));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0xB1));
    return _mm_cvtsi128_si32(v);
}

// Of V vectors of points and Q queries, less the offsets. Every loop over sums is unrolled, or the compiler keeps them
// in memory; that over dimensions by four, which takes a quarter less time on Zen 5.
template <int Q, int V>
TTT4AS_INLINE void accumulate(const std::uint8_t* codes, const std::int8_t* bytes, std::int64_t dims,
                              const std::int32_t* offset, Sums (&sums)[Q][V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
        const Sums start = subtract(all(0), load_sums(offset + kLanes * v));
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) sums[q][v] = start;
    }
#pragma GCC unroll 4
    for (std::int64_t d = 0; d < dims; d += kQuad, codes += kQuad * kStrip) {
        Sums points[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) points[v] = load_sums(codes + kQuad * kLanes * v);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            std::int32_t quad;
            __builtin_memcpy(&quad, bytes + q * dims + d, sizeof quad);
            const Sums query = all(quad);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[q][v] = dot(sums[q][v], points[v], query);
        }
    }
}

void keys_of_quad(const std::uint8_t* strip, const std::int8_t* bytes, const std::int16_t*, std::int64_t dims,
                  const std::int32_t* offset, std::int32_t* out, std::int64_t key_stride, std::int32_t* best,
                  std::int64_t best_stride) {
    Sums most[kQuad];
#pragma GCC unroll 4
    for (int p = 0; p < kStrip; p += kLanes * kTogether) {
        Sums sums[kQuad][kTogether];
        accumulate(strip + kQuad * p, bytes, dims, offset + p, sums);
#pragma GCC unroll 4
        for (int q = 0; q < kQuad; ++q) {
            Sums here = sums[q][0];
#pragma GCC unroll 4
            for (int v = 0; v < kTogether; ++v) {
                store_sums(out + q * key_stride + p + kLanes * v, sums[q][v]);
                here = greater(here, sums[q][v]);
            }
            most[q] = p ? greater(most[q], here) : here;
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) best[q * best_stride] = greatest(most[q]);
}

void refine(const std::uint8_t* strip, const std::int8_t* bytes, const std::int16_t*, std::int64_t dims,
            const std::int32_t* offset, const std::int32_t* keys, std::int64_t key_stride, const std::int32_t* least,
            std::uint64_t* left) {
    for (int q = 0; q < kQuad; ++q) left[q] = 0;
#pragma GCC unroll 4
    for (int p = 0; p < kStrip; p += kLanes * kTogether) {
        Sums sums[kQuad][kTogether];
        accumulate(strip + kQuad * p, bytes, dims, offset + p, sums);
#pragma GCC unroll 4
        for (int q = 0; q < kQuad; ++q) {
            const Sums bound = all(least[q]);
#pragma GCC unroll 4
            for (int v = 0; v < kTogether; ++v) {
                const int at = p + kLanes * v;
                left[q] |= reaching(add(load_sums(keys + q * key_stride + at), sums[q][v]), bound) << at;
            }
        }
    }
}

std::uint64_t reach(const std::uint8_t* strip, const std::int8_t* bytes, const std::int16_t*, std::int64_t dims,
                    const std::int32_t* offset, std::int32_t least) {
    Sums sums[1][kStrip / kLanes];
    accumulate(strip, bytes, dims, offset, sums);
    const Sums bound = all(least);
    std::uint64_t result = 0;
#pragma GCC unroll 8
    for (int v = 0; v < kStrip / kLanes; ++v) result |= reaching(sums[0][v], bound) << (kLanes * v);
    return result;
}

#else

// Sums of 8 points and Q queries at a time, widened to 16 bits.
template <int Q>
TTT4AS_INLINE void accumulate(const std::uint8_t* codes, const std::int16_t* words, std::int64_t dims,
                              std::int32_t (&sums)[Q][8]) {
#if defined(__AVX2__)
    __m256i low[Q], high[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) low[q] = high[q] = _mm256_setzero_si256();
    for (std::int64_t d = 0; d < dims; d += kQuad) {
        const __m128i* at = reinterpret_cast<const __m128i*>(codes + d * kStrip);
        const __m256i first = _mm256_cvtepu8_epi16(_mm_loadu_si128(at));
        const __m256i second = _mm256_cvtepu8_epi16(_mm_loadu_si128(at + 1));
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            long long quad;
            __builtin_memcpy(&quad, words + q * dims + d, sizeof quad);
            const __m256i query = _mm256_set1_epi64x(quad);
            low[q] = _mm256_add_epi32(low[q], _mm256_madd_epi16(first, query));
            high[q] = _mm256_add_epi32(high[q], _mm256_madd_epi16(second, query));
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {  // pairs of partial sums, then the halves into order
        const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[q], high[q]), 0xD8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[q]), sum);
    }
#elif defined(__SSE2__)
    const __m128i zero = _mm_setzero_si128();
    __m128i partial[Q][4];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) partial[q][v] = zero;
    for (std::int64_t d = 0; d < dims; d += kQuad) {
        const __m128i* at = reinterpret_cast<const __m128i*>(codes + d * kStrip);
        const __m128i first = _mm_loadu_si128(at), second = _mm_loadu_si128(at + 1);
        const __m128i wide[4] = {_mm_unpacklo_epi8(first, zero), _mm_unpackhi_epi8(first, zero),
                                 _mm_unpacklo_epi8(second, zero), _mm_unpackhi_epi8(second, zero)};
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            __m128i query = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + q * dims + d));
            query = _mm_unpacklo_epi64(query, query);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) partial[q][v] = _mm_add_epi32(partial[q][v], _mm_madd_epi16(wide[v], query));
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            std::int32_t pair[4];
            _mm_storeu_si128(reinterpret_cast<__m128i*>(pair), partial[q][v]);
            sums[q][2 * v] = pair[0] + pair[1];
            sums[q][2 * v + 1] = pair[2] + pair[3];
        }
    }
#else
    for (int q = 0; q < Q; ++q)
        for (int p = 0; p < 8; ++p) sums[q][p] = 0;
    for (std::int64_t d = 0; d < dims; d += kQuad) {
        const std::uint8_t* at = codes + d * kStrip;
        for (int q = 0; q < Q; ++q)
            for (int p = 0; p < 8; ++p)
                for (int k = 0; k < kQuad; ++k) sums[q][p] += at[kQuad * p + k] * words[q * dims + d + k];
    }
#endif
}

#if defined(__AVX2__)
constexpr int kTogether = 4;  // queries whose sums fit the registers
#else
constexpr int kTogether = 2;
#endif

void keys_of_quad(const std::uint8_t* strip, const std::int8_t*, const std::int16_t* words, std::int64_t dims,
                  const std::int32_t* offset, std::int32_t* out, std::int64_t key_stride, std::int32_t* best,
                  std::int64_t best_stride) {
    for (int q = 0; q < kQuad; q += kTogether) {
        std::int32_t most[kTogether];
        for (int p = 0; p < kStrip; p += 8) {
            std::int32_t sums[kTogether][8];
            accumulate<kTogether>(strip + kQuad * p, words + q * dims, dims, sums);
            for (int r = 0; r < kTogether; ++r) {
                for (int i = 0; i < 8; ++i) {
                    const std::int32_t key = sums[r][i] - offset[p + i];
                    out[(q + r) * key_stride + p + i] = key;
                    most[r] = (p | i) && most[r] > key ? most[r] : key;
                }
            }
        }
        for (int r = 0; r < kTogether; ++r) best[(q + r) * best_stride] = most[r];
    }
}

void refine(const std::uint8_t* strip, const std::int8_t*, const std::int16_t* words, std::int64_t dims,
            const std::int32_t* offset, const std::int32_t* keys, std::int64_t key_stride, const std::int32_t* least,
            std::uint64_t* left) {
    for (int q = 0; q < kQuad; q += kTogether) {
        for (int r = 0; r < kTogether; ++r) left[q + r] = 0;
        for (int p = 0; p < kStrip; p += 8) {
            std::int32_t sums[kTogether][8];
            accumulate<kTogether>(strip + kQuad * p, words + q * dims, dims, sums);
            for (int r = 0; r < kTogether; ++r) {
                for (int i = 0; i < 8; ++i) {
                    const std::int32_t key = keys[(q + r) * key_stride + p + i] + sums[r][i] - offset[p + i];
                    left[q + r] |= static_cast<std::uint64_t>(key >= least[q + r]) << (p + i);
                }
            }
        }
    }
}

std::uint64_t reach(const std::uint8_t* strip, const std::int8_t*, const std::int16_t* words, std::int64_t dims,
                    const std::int32_t* offset, std::int32_t least) {
    std::uint64_t result = 0;
    for (int p = 0; p < kStrip; p += 8) {
        std::int32_t sums[1][8];
        accumulate<1>(strip + kQuad * p, words, dims, sums);
        for (int i = 0; i < 8; ++i) {
            result |= static_cast<std::uint64_t>(sums[0][i] - offset[p + i] >= least) << (p + i);
        }
    }
    return result;
}

#endif

void keys(const std::uint8_t* codes, std::int64_t strips, const QueryCodes& queries, const std::int32_t* offset,
          std::int32_t* out, std::int64_t key_stride, std::int32_t* best, std::int64_t best_stride) {
    for (std::int64_t s = 0; s < strips; ++s) {
        for (std::int64_t q = 0; q < queries.count; q += kQuad) {
            keys_of_quad(codes + s * queries.dims * kStrip, queries.bytes + q * queries.dims,
                         queries.words + q * queries.dims, queries.dims, offset + s * kStrip,
                         out + q * key_stride + s * kStrip, key_stride, best + q * best_stride + s, best_stride);
        }
    }
}

float quantise(const float* x, std::int64_t n, float step, std::int8_t* codes) {
    typedef std::int8_t vb __attribute__((vector_size(kF)));
    const vf inverse = setf(1.0f / step), size = setf(step), most = setf(127.0f), edge = setf(127.0f * step);
    const vf magic = setf(12582912.0f);
    vf moved = {};
    for (std::int64_t i = 0; i < n; i += kF) {
        const vf value = loadf(x + i);
        const vf scaled = vmin(vmax(value * inverse, -most), most);
        const vf code = (scaled + magic) - magic;  // 1.5 * 2^23 leaves no room for a fraction
        const vf off = vmin(vmax(value, -edge), edge) - code * size;
        moved += off * off;
        store(codes + i, __builtin_convertvector(__builtin_convertvector(code, vi), vb));
    }
    return hsum(moved);
}

template <class T>
double centre(const T* row, const double* mean, double scale, std::int64_t n, float* out) {
    vd sums[2] = {};
    std::int64_t i = 0;
    for (; i + 2 * kD <= n; i += 2 * kD) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const vd value = (widen(row + i + v * kD) - loadd(mean + i + v * kD)) * scale;
            const vfh rounded = narrow(value);
            store(out + i + v * kD, rounded);
            const vd again = widen(rounded);
            sums[v] += again * again;
        }
    }
    double sum = hsum(sums[0] + sums[1]);
    for (; i < n; ++i) {
        out[i] = static_cast<float>((static_cast<double>(row[i]) - mean[i]) * scale);
        sum += static_cast<double>(out[i]) * static_cast<double>(out[i]);
    }
    return sum;
}

void mix(float* x, const float* signs, std::int64_t n, std::int64_t rows, float factor) {
    constexpr std::int64_t kRow = 16;
    for (std::int64_t i = 0; i < n; i += kF) store(x + i, loadf(x + i) * loadf(signs + i) * factor);
    for (std::int64_t half = kRow; half < rows * kRow; half *= 2) {
        for (std::int64_t begin = 0; begin < n; begin += 2 * half) {
            for (std::int64_t i = begin; i < begin + half; i += kF) {
                const vf a = loadf(x + i), b = loadf(x + i + half);
                store(x + i, a + b);
                store(x + i + half, a - b);
            }
        }
    }
}

#if defined(TTT4AS_BUILD_AVX512)
constexpr int kWide = 4;  // vectors of a panel row held at once, times four rows
#elif defined(TTT4AS_BUILD_AVX2)
constexpr int kWide = 2;
#else
constexpr int kWide = 2;
#endif

void project(const float* x, std::int64_t x_stride, std::int64_t n, const float* panel, float* out,
             std::int64_t out_stride) {
    for (int j = 0; j < kPanel; j += kWide * kF) {
        vf sums[4][kWide] = {};
        for (std::int64_t i = 0; i < n; ++i) {
            vf row[kWide];
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v) row[v] = loadf(panel + i * kPanel + j + v * kF);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const vf value = setf(x[r * x_stride + i]);
#pragma GCC unroll 4
                for (int v = 0; v < kWide; ++v) sums[r][v] += value * row[v];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v) store(out + r * out_stride + j + v * kF, sums[r][v]);
    }
}

void project_back(const float* x, std::int64_t x_stride, std::int64_t n, const float* y, std::int64_t y_stride,
                  std::int64_t rows, float* panel) {
    for (std::int64_t i = 0; i < n; i += 4) {
        const int width = n - i < 4 ? static_cast<int>(n - i) : 4;
        for (int j = 0; j < kPanel; j += kWide * kF) {
            vf sums[4][kWide] = {};
            for (std::int64_t r = 0; r < rows; ++r) {
                vf row[kWide];
#pragma GCC unroll 4
                for (int v = 0; v < kWide; ++v) row[v] = loadf(y + r * y_stride + j + v * kF);
                const float* at = x + r * x_stride + i;
                const float values[4] = {at[0], width > 1 ? at[1] : 0, width > 2 ? at[2] : 0, width > 3 ? at[3] : 0};
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
                    for (int v = 0; v < kWide; ++v) sums[k][v] += setf(values[k]) * row[v];
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                if (k >= width) break;
                float* to = panel + (i + k) * kPanel + j;
#pragma GCC unroll 4
                for (int v = 0; v < kWide; ++v) store(to + v * kF, loadf(to + v * kF) + sums[k][v]);
            }
        }
    }
}

// The sums do not depend on `limit` as long as it is not passed.
template <class T>
double squared(const double* query, const T* point, std::int64_t n, double limit) {
    constexpr int kSums = 16 / kD > 4 ? 8 : 4;
    constexpr std::int64_t kCheck = 256;
    vd sums[kSums] = {};
    std::int64_t i = 0;
    while (i + kSums * kD <= n) {
        const std::int64_t whole = n - kSums * kD, stop = i + kCheck - 1 < whole ? i + kCheck - 1 : whole;
        for (; i <= stop; i += kSums * kD) {
#pragma GCC unroll 8
            for (int v = 0; v < kSums; ++v) {
                const vd difference = loadd(query + i + v * kD) - widen(point + i + v * kD);
                sums[v] += difference * difference;
            }
        }
        if (i + kCheck <= n) {
            vd all = sums[0];
            for (int v = 1; v < kSums; ++v) all += sums[v];
            const double sum = hsum(all);
            if (sum > limit) return sum;
        }
    }
    for (; i + kD <= n; i += kD) {
        const vd difference = loadd(query + i) - widen(point + i);
        sums[0] += difference * difference;
    }
    vd all = sums[0];
    for (int v = 1; v < kSums; ++v) all += sums[v];
    double sum = hsum(all);
    for (; i < n; ++i) {
        const double difference = query[i] - static_cast<double>(point[i]);
        sum += difference * difference;
    }
    return sum;
}

}  // namespace

#if defined(TTT4AS_BUILD_VNNI)  // the file of the set without it once more, with one more instruction
#define TTT4AS_TABLE sketch_table_vnni
#else
#define TTT4AS_TABLE sketch_table
#endif
extern const SketchKernels TTT4AS_TABLE;
const SketchKernels TTT4AS_TABLE = {
    keys,    reach,          between,      nth_greatest,   leave_strips,   refine,
    collect, code_distances, leave,        quantise,       centre<float>,  centre<double>,
    mix,     project,        project_back, squared<float>, squared<double>};

}  // namespace TTT4AS_ISA
}  // namespace ttt4as
