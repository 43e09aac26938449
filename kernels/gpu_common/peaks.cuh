// Percentile, local maxima and square dilation of one map by one block: exact, no host round trip, any shape.
//
// Cost a map of n pixels: one pass for the range and one for the pixels that a high percentile can be among, where
// those are few. Otherwise three passes (float) or six (double) at most for the order statistic, one for the maxima.
// The dilation works on bits: radius / 32 passes over n / 32 words along the rows, 1 + log2(radius / 8) along the
// columns.
#pragma once
#include "device.cuh"

namespace ttt4as {

#define IN_FLIGHT 8  // loads that a thread issues before it uses the first: one block has no other way to hide latency
#define HISTOGRAM_BITS 11
#define HISTOGRAM_BINS (1 << HISTOGRAM_BITS)
#define SHORTLIST 4096  // pixels at most that are looked at again without passing over the map

template <typename T>
struct Range {
    typename Ordered<T>::Key lowest, highest;
    typename Ordered<T>::Key own;  // the highest of those that this thread has seen, 0 if it has seen none
    bool finite;
};

// visit(value, place) for all n values, by all threads of a block.
template <typename T, typename Visit>
__device__ void each_value(const T* values, int n, Visit visit) {
    const int stride = blockDim.x;
    int first = threadIdx.x;
    for (; first + (IN_FLIGHT - 1) * stride < n; first += IN_FLIGHT * stride) {
        T x[IN_FLIGHT];
        for (int k = 0; k < IN_FLIGHT; ++k) x[k] = values[first + k * stride];
        for (int k = 0; k < IN_FLIGHT; ++k) visit(x[k], first + k * stride);
    }
    for (; first < n; first += stride) visit(values[first], first);
}

template <typename T>
__device__ Range<T> range_of(const T* values, int n) {
    typedef Ordered<T> O;
    typename O::Key low = ~typename O::Key(0), high = 0;
    int bad = 0;
    each_value(values, n, [&](T x, int) {
        const typename O::Key key = O::key(x);
        bad |= !O::finite(x);
        low = key < low ? key : low;
        high = key > high ? key : high;
    });
    const typename O::Key own = high;
    low = block_reduce(low, Min());
    high = block_reduce(high, Max());
    bad = block_reduce(bad, Max());
    return Range<T>{low, high, own, bad == 0};
}

// The key of rank `rank` (from 0) among finite numbers, in [low, high], and how many are not above it; after `rounds`
// rounds, a key that is not above it. each(visit) calls visit(key, place) for all of them, by all threads.
// Integer bins over the keys' own range: radix selection that does not waste bins on exponents nobody has.
template <typename T, typename Each>
__device__ typename Ordered<T>::Key order_statistic(Each each, int rank, typename Ordered<T>::Key low,
                                                    typename Ordered<T>::Key high, int& not_above, int rounds = 64) {
    typedef Ordered<T> O;
    typedef typename O::Key Key;
    __shared__ int histogram[HISTOGRAM_BINS];
    __shared__ int found_bin, found_below;
    int below = 0;
    while (true) {
        const int width = O::bits(high - low);
        const int shift = width > HISTOGRAM_BITS ? width - HISTOGRAM_BITS : 0;
        for (int bin = threadIdx.x; bin < HISTOGRAM_BINS; bin += blockDim.x) histogram[bin] = 0;
        __syncthreads();
        each([&](Key key, int) {
            if (key >= low && key <= high) atomicAdd(&histogram[int((key - low) >> shift)], 1);
        });
        __syncthreads();
        const int share = (HISTOGRAM_BINS + blockDim.x - 1) / blockDim.x;
        const int first = threadIdx.x * share;
        const int last = first + share < HISTOGRAM_BINS ? first + share : HISTOGRAM_BINS;
        int mine = 0;
        for (int bin = first; bin < last; ++bin) mine += histogram[bin];
        int total;
        int before = below + block_scan(mine, total);
        if (rank >= before && rank < before + mine) {  // true for one thread
            int bin = first;
            while (rank >= before + histogram[bin]) before += histogram[bin++];
            found_bin = bin;
            found_below = before;
        }
        __syncthreads();
        const int bin = found_bin, count = histogram[found_bin];
        below = found_below;
        __syncthreads();
        low += Key(bin) << shift;
        if (shift == 0 || --rounds == 0) {
            not_above = below + count;
            return low;
        }
        const Key end = low + ((Key(1) << shift) - 1);
        high = end < high ? end : high;
    }
}

// The places of a block's map that may matter to its percentile; in no order.
__device__ inline int* shortlist() {
    __shared__ int places[SHORTLIST];
    return places;
}

// Fill it with all places whose values are among the `needed` highest, and some more, none of which has a higher value
// left out. Returns how many there are, and their least key at most in `least`; -1 where they do not fit.
template <typename T>
__device__ int list_highest(const T* values, int n, int needed, const Range<T>& range,
                            typename Ordered<T>::Key& least) {
    typedef Ordered<T> O;
    typedef typename O::Key Key;
    __shared__ int length;
    if (needed > int(blockDim.x)) return -1;
    // As many threads have seen a value that is not below this one, each another.
    int unused;
    least = order_statistic<T>([&](auto visit) { visit(range.own, 0); }, int(blockDim.x) - needed, Key(0),
                               range.highest, unused, 2);
    if (threadIdx.x == 0) length = 0;
    __syncthreads();
    int* const places = shortlist();
    each_value(values, n, [&](T x, int place) {
        if (O::key(x) < least) return;
        const int end = atomicAdd(&length, 1);
        if (end < SHORTLIST) places[end] = place;
    });
    __syncthreads();
    return length <= SHORTLIST ? length : -1;
}

template <typename T>
struct Percentile {
    typename Ordered<T>::Key least;
    int listed;  // places of the shortlist, which has all values from `least` on; -1: there is none
};

// The key of the least of the values that is not below their percentile: numpy.percentile with linear interpolation, in
// float64 and to the bit. It lies between two neighbouring values, so that one of them is the answer.
template <typename T>
__device__ Percentile<T> percentile_of(const T* values, int n, double percentile, const Range<T>& range) {
    typedef Ordered<T> O;
    typedef typename O::Key Key;
    const double position = __dmul_rn(double(n - 1), percentile / 100.0);
    const int rank = int(position);
    const double part = position - rank;
    Key low = range.lowest;
    const int listed = list_highest(values, n, n - rank, range, low);
    const auto each = [&](auto visit) {
        if (listed < 0) {
            each_value(values, n, [&](T x, int place) { visit(O::key(x), place); });
        } else {
            const int* const places = shortlist();
            for (int i = threadIdx.x; i < listed; i += blockDim.x) visit(O::key(values[places[i]]), places[i]);
        }
    };
    const int before = listed < 0 ? 0 : n - listed;  // values that are not listed, all of them lower
    int not_above;
    const Key lower =
        order_statistic<T>(each, rank - before, listed < 0 ? range.lowest : low, range.highest, not_above);
    if (part == 0 || before + not_above > rank + 1 || rank + 1 >= n) return Percentile<T>{lower, listed};
    Key upper = range.highest;
    each([&](Key key, int) {
        if (key > lower && key < upper) upper = key;
    });
    upper = block_reduce(upper, Min());
    const double a = exact(O::value(lower)), b = exact(O::value(upper)), difference = __dadd_rn(b, -a);
    const double tau = part >= 0.5 ? __dadd_rn(b, -__dmul_rn(difference, __dadd_rn(1.0, -part)))
                                   : __dadd_rn(a, __dmul_rn(difference, part));
    return Percentile<T>{a >= tau ? lower : upper, listed};
}

// Whether no neighbour is higher than `value`, which is the map's at (row, col).
template <typename T>
__device__ bool is_peak(const T* map, T value, int height, int width, int row, int col) {
    typedef Ordered<T> O;
    const typename O::Key key = O::key(value);
    const int top = row > 0 ? row - 1 : 0, bottom = row + 1 < height ? row + 1 : row;
    const int left = col > 0 ? col - 1 : 0, right = col + 1 < width ? col + 1 : col;
    for (int y = top; y <= bottom; ++y)
        for (int x = left; x <= right; ++x)
            if (O::key(map[y * width + x]) > key) return false;
    return true;
}

// visit(row, col) for every peak of the map, by one thread each.
template <typename T, typename Visit>
__device__ void each_peak(const T* map, int height, int width, const Percentile<T>& percentile, Visit visit) {
    const auto look = [&](T value, int place) {
        if (Ordered<T>::key(value) < percentile.least) return;
        const int row = place / width, col = place % width;
        if (is_peak(map, value, height, width, row, col)) visit(row, col);
    };
    if (percentile.listed < 0) {
        each_value(map, height * width, look);
    } else {
        const int* const places = shortlist();
        for (int i = threadIdx.x; i < percentile.listed; i += blockDim.x) look(map[places[i]], places[i]);
    }
}

// --- bit maps: `words` = ceil(width / 32) words a row, bit c % 32 of word c / 32 is column c ---

__device__ inline bool bit_at(const u32* bits, int words, int row, int col) {
    return bits[row * words + (col >> 5)] >> (col & 31) & 1u;
}

// visit(row, col, load(row, col)) for every pixel, all threads of a warp at once and a lane a column, so that no pixel
// needs a division; columns past the width are visited with what lies in the last.
template <typename Load, typename Visit>
__device__ void each_pixel(int height, int width, Load load, Visit visit) {
    for (int row = threadIdx.x >> 5; row < height; row += blockDim.x >> 5)
        for (int first = 0; first < width; first += IN_FLIGHT * 32) {
            const int col = first + (threadIdx.x & 31);
            decltype(load(0, 0)) x[IN_FLIGHT];
            for (int k = 0; k < IN_FLIGHT; ++k) x[k] = load(row, col + 32 * k < width ? col + 32 * k : width - 1);
            for (int k = 0; k < IN_FLIGHT; ++k)
                if (first + 32 * k < width) visit(row, col + 32 * k, x[k]);
        }
}

// bits = test(row, col, load(row, col)).
template <typename Load, typename Test>
__device__ void fill_bits(u32* bits, int height, int width, Load load, Test test) {
    const int words = (width + 31) / 32;
    each_pixel(height, width, load, [=](int row, int col, decltype(load(0, 0)) value) {
        const u32 ballot = __ballot_sync(FULL_WARP, col < width && test(row, col, value));
        if (col % 32 == 0) bits[row * words + col / 32] = ballot;
    });
    __syncthreads();
}

// out(row, col) = bits, a byte each. Threads do not meet after it.
template <typename T>
__device__ void spread_bits(const u32* bits, int height, int width, T* out) {
    static_assert(sizeof(T) == 1, "a byte each");
    const int words = (width + 31) / 32;
    if (width % 4 == 0 && reinterpret_cast<u64>(out) % 4 == 0) {
        const int lane = threadIdx.x & 31;
        for (int row = threadIdx.x >> 5; row < height; row += blockDim.x >> 5)
            for (int col = 4 * lane; col < width; col += 4 * 32) {
                const u32 four = bits[row * words + (col >> 5)] >> (col & 31) & 15u;
                *reinterpret_cast<u32*>(out + row * width + col) = four * 0x204081u & 0x01010101u;  // bit i to byte i
            }
        return;
    }
    each_pixel(
        height, width, [=](int row, int col) { return bits[row * words + (col >> 5)]; },
        [=](int row, int col, u32 word) {
            if (col < width) out[row * width + col] = T(word >> (col & 31) & 1u);
        });
}

#define ROWS_AT_ONCE 8  // by which a column grows in the first pass

// A word of a row grown by `reach` columns, 32 at most, to both sides.
__device__ inline u32 grown_word(const u32* row, int words, int word, int reach) {
    const u64 own = row[word], before = word > 0 ? row[word - 1] : 0, after = word + 1 < words ? row[word + 1] : 0;
    u64 up = own << 32 | before, down = after << 32 | own;
    for (int grown = 0; grown < reach;) {  // each step doubles what has been united
        const int step = grown + 1 < reach - grown ? grown + 1 : reach - grown;
        up |= up << step;
        down |= down >> step;
        grown += step;
    }
    return u32(up >> 32) | u32(down);
}

// Grow by a square of side 2 * radius + 1. `bits` and `spare` swap roles; the one that holds the result is returned.
// Rows grow by up to 32 columns a pass. Columns grow by up to ROWS_AT_ONCE rows first; each later pass unites three
// copies and takes them at most reach + 1 further, since at a border only half of what a pixel has grown to is left to
// grow on.
__device__ inline u32* dilate_bits(u32* bits, u32* spare, int height, int width, int radius) {
    const int words = (width + 31) / 32, n = height * words;
    for (int vertical = 0; vertical < 2; ++vertical) {
        for (int reach = 0; reach < radius;) {
            const int most = !vertical ? 32 : (reach ? reach + 1 : ROWS_AT_ONCE);
            const int step = most < radius - reach ? most : radius - reach;
            for (int i = threadIdx.x; i < n; i += blockDim.x) {
                const int row = i / words, word = i % words;
                u32 value = bits[i];
                if (!vertical) {
                    value = grown_word(bits + row * words, words, word, step);
                    if (word == words - 1 && width % 32) value &= (1u << (width % 32)) - 1;
                } else {
                    for (int far = reach ? step : 1; far <= step; ++far) {
                        if (row >= far) value |= bits[i - far * words];
                        if (row + far < height) value |= bits[i + far * words];
                    }
                }
                spare[i] = value;
            }
            __syncthreads();
            u32* swap = bits;
            bits = spare;
            spare = swap;
            reach += step;
        }
    }
    return bits;
}

}  // namespace ttt4as
