// The loops of peaks_kernels.hpp, compiled once per instruction set (see ttt4as/simd.hpp). Each reads the map once; few
// vectors hold anything near a high percentile, so the tests that follow a hit cost nothing.
#include "peaks_kernels.hpp"
#include "simd/vec.hpp"

namespace ttt4as {
namespace TTT4AS_ISA {
namespace {

template <class T>
struct Vector;
template <>
struct Vector<float> {
    using V = vf;
    using Bits = vi;
    using Word = std::int32_t;
    static constexpr int N = kF;
};
template <>
struct Vector<double> {
    using V = vd;
    using Bits = vl;
    using Word = std::int64_t;
    static constexpr int N = kD;
};

template <class T>
void range(const T* x, std::int64_t n, T* least, T* greatest, T* magnitude) {
    using V = typename Vector<T>::V;
    using Bits = typename Vector<T>::Bits;
    using Word = typename Vector<T>::Word;
    constexpr int N = Vector<T>::N;
    constexpr Word kMagnitude = static_cast<Word>(~(Word(1) << (sizeof(Word) * 8 - 1)));
    V low = V{} + x[0], high = low;
    Bits most = {};
    std::int64_t i = 0;
    for (; i + N <= n; i += N) {
        const V v = load<V>(x + i);
        const Bits bits = load<Bits>(x + i) & kMagnitude;
        low = vmin(v, low);
        high = vmax(v, high);
        most = bits > most ? bits : most;
    }
    T lows[N], highs[N];
    Word words[N];
    store(lows, low);
    store(highs, high);
    store(words, most);
    T a = x[0], b = x[0];
    Word m = 0;
    for (int k = 0; k < N; ++k) {
        a = lows[k] < a ? lows[k] : a;
        b = highs[k] > b ? highs[k] : b;
        m = words[k] > m ? words[k] : m;
    }
    for (; i < n; ++i) {
        Word word;
        __builtin_memcpy(&word, x + i, sizeof word);
        word &= kMagnitude;
        a = x[i] < a ? x[i] : a;
        b = x[i] > b ? x[i] : b;
        m = word > m ? word : m;
    }
    *least = a;
    *greatest = b;
    __builtin_memcpy(magnitude, &m, sizeof m);
}

template <class T>
std::int64_t collect(const T* x, std::int64_t n, T low, T high, T* out, std::int64_t capacity, std::int64_t* in_band) {
    using V = typename Vector<T>::V;
    using Bits = typename Vector<T>::Bits;
    constexpr int N = Vector<T>::N;
    const V l = V{} + low, h = V{} + high;
    Bits below = {};
    std::int64_t total_below = 0, found = 0, i = 0;
    while (i + N <= n) {
        // A lane counts at most this many before it is added up, so that 32 bits never overflow.
        std::int64_t stop = i + (std::int64_t(1) << 24) * N;
        stop = stop < n - N + 1 ? stop : n - N + 1;
        for (; i < stop; i += N) {
            const V v = load<V>(x + i);
            below -= v < l;
            unsigned hits = at_least(v, l) & at_least(h, v);
            while (hits) {
                if (found < capacity) out[found] = x[i + __builtin_ctz(hits)];
                ++found;
                hits &= hits - 1;
            }
        }
        typename Vector<T>::Word lane[N];
        store(lane, below);
        for (int k = 0; k < N; ++k) total_below += lane[k];
        below = Bits{};
    }
    for (; i < n; ++i) {
        total_below += x[i] < low;
        if (x[i] >= low && x[i] <= high) {
            if (found < capacity) out[found] = x[i];
            ++found;
        }
    }
    *in_band = found;
    return total_below;
}

template <class T>
inline bool is_peak(const T* above, const T* row, const T* below, std::int64_t width, std::int64_t x, T tau) {
    const T v = row[x];
    if (!(v >= tau)) return false;
    const std::int64_t first = x > 0 ? x - 1 : 0, last = x + 1 < width ? x + 1 : x;
    for (std::int64_t k = first; k <= last; ++k) {
        if (row[k] > v || (above && above[k] > v) || (below && below[k] > v)) return false;
    }
    return true;
}

template <class T>
std::int64_t peaks(const T* above, const T* row, const T* below, std::int64_t width, T tau, std::int32_t* columns) {
    using V = typename Vector<T>::V;
    constexpr int N = Vector<T>::N;
    const V least = V{} + tau;
    const T* up = above ? above : row;  // a missing row changes no maximum if the middle one stands in
    const T* down = below ? below : row;
    std::int64_t found = 0, x = 0;
    if (width > N + 2) {
        if (is_peak(above, row, below, width, x, tau)) columns[found++] = 0;
        for (x = 1; x + N < width; x += N) {
            const V v = load<V>(row + x);
            unsigned hits = at_least(v, least);
            if (!hits) continue;
            V most = vmax(load<V>(row + x - 1), load<V>(row + x + 1));
            for (int k = -1; k <= 1; ++k) most = vmax(most, vmax(load<V>(up + x + k), load<V>(down + x + k)));
            for (hits &= at_least(v, most); hits; hits &= hits - 1) {
                columns[found++] = static_cast<std::int32_t>(x + __builtin_ctz(hits));
            }
        }
    }
    for (; x < width; ++x) {
        if (is_peak(above, row, below, width, x, tau)) columns[found++] = static_cast<std::int32_t>(x);
    }
    return found;
}

}  // namespace

extern const PeakTable peak_table;
const PeakTable peak_table = {{range<float>, collect<float>, peaks<float>},
                              {range<double>, collect<double>, peaks<double>}};

}  // namespace TTT4AS_ISA
}  // namespace ttt4as
