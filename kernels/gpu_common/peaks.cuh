// Percentile, local maxima and square dilation of one map by one block: exact, no host round trip, any shape.
//
// Cost a map of n pixels: one pass for the range, three (float) or six (double) at most for the order statistic, one
// for the maxima; the dilation works on bits, 2 log2(radius + 1) passes over n / 32 words.
#pragma once
#include "device.cuh"

namespace ttt4as {

#define HISTOGRAM_BITS 11
#define HISTOGRAM_BINS (1 << HISTOGRAM_BITS)

template <typename T>
struct Range {
    T lowest, highest;
    bool finite;
};

template <typename T>
__device__ Range<T> range_of(const T* values, int n) {
    typedef Ordered<T> O;
    typename O::Key low = ~typename O::Key(0), high = 0;
    int bad = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const T x = values[i];
        const typename O::Key key = O::key(x);
        bad |= !O::finite(x);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    low = block_reduce(low, Min());
    high = block_reduce(high, Max());
    bad = block_reduce(bad, Max());
    return Range<T>{O::value(low), O::value(high), bad == 0};
}

// The value of rank `rank` (from 0) among n finite numbers in [lowest, highest], and how many are <= it.
// Integer bins over the keys' own range: radix selection that does not waste bins on exponents nobody has.
template <typename T>
__device__ T order_statistic(const T* values, int n, int rank, T lowest, T highest, int& not_above) {
    typedef Ordered<T> O;
    typedef typename O::Key Key;
    __shared__ int histogram[HISTOGRAM_BINS];
    __shared__ int found_bin, found_below;
    Key low = O::key(lowest), high = O::key(highest);
    int below = 0;
    while (true) {
        const int width = O::bits(high - low);
        const int shift = width > HISTOGRAM_BITS ? width - HISTOGRAM_BITS : 0;
        for (int bin = threadIdx.x; bin < HISTOGRAM_BINS; bin += blockDim.x) histogram[bin] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const Key key = O::key(values[i]);
            if (key >= low && key <= high) atomicAdd(&histogram[int((key - low) >> shift)], 1);
        }
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
        if (shift == 0) {
            not_above = below + count;
            return O::value(low);
        }
        const Key end = low + ((Key(1) << shift) - 1);
        high = end < high ? end : high;
    }
}

// numpy.percentile(values, percentile) with linear interpolation, in float64 and to the bit.
template <typename T>
__device__ double percentile_of(const T* values, int n, double percentile, Range<T> range) {
    const double position = __dmul_rn(double(n - 1), percentile / 100.0);
    const int rank = int(position);
    const double part = position - rank;
    int not_above;
    const T lower = order_statistic(values, n, rank, range.lowest, range.highest, not_above);
    T upper = lower;
    if (not_above <= rank + 1 && rank + 1 < n) {
        typename Ordered<T>::Key next = Ordered<T>::key(range.highest);
        for (int i = threadIdx.x; i < n; i += blockDim.x)
            if (exact(values[i]) > exact(lower)) {
                const typename Ordered<T>::Key key = Ordered<T>::key(values[i]);
                next = key < next ? key : next;
            }
        upper = Ordered<T>::value(block_reduce(next, Min()));
    }
    const double a = exact(lower), b = exact(upper), difference = __dadd_rn(b, -a);
    if (part >= 0.5) return __dadd_rn(b, -__dmul_rn(difference, __dadd_rn(1.0, -part)));
    return __dadd_rn(a, __dmul_rn(difference, part));
}

template <typename T>
__device__ bool is_peak(const T* map, int height, int width, int row, int col, double tau) {
    const double value = exact(map[row * width + col]);
    if (!(value >= tau)) return false;
    const int top = row > 0 ? row - 1 : 0, bottom = row + 1 < height ? row + 1 : row;
    const int left = col > 0 ? col - 1 : 0, right = col + 1 < width ? col + 1 : col;
    for (int y = top; y <= bottom; ++y)
        for (int x = left; x <= right; ++x)
            if (exact(map[y * width + x]) > value) return false;
    return true;
}

// --- bit maps: `words` = ceil(width / 32) words a row, bit c % 32 of word c / 32 is column c ---

__device__ inline bool bit_at(const u32* bits, int words, int row, int col) {
    return bits[row * words + (col >> 5)] >> (col & 31) & 1u;
}

// bits = predicate(row, col), a warp a word.
template <typename Predicate>
__device__ void fill_bits(u32* bits, int height, int width, Predicate predicate) {
    const int words = (width + 31) / 32, lane = threadIdx.x & 31;
    for (int word = threadIdx.x >> 5; word < height * words; word += blockDim.x >> 5) {
        const int row = word / words, col = (word % words) * 32 + lane;
        const u32 ballot = __ballot_sync(FULL_WARP, col < width && predicate(row, col));
        if (lane == 0) bits[word] = ballot;
    }
    __syncthreads();
}

// The word at `col0` of a row shifted by `shift` columns: bit i is column col0 + i + shift.
__device__ inline u32 shifted_word(const u32* row, int words, int word, int shift) {
    const int offset = shift >= 0 ? shift / 32 : -((-shift + 31) / 32);
    const int bit = shift - offset * 32, index = word + offset;
    const u32 low = index >= 0 && index < words ? row[index] : 0u;
    if (bit == 0) return low;
    const u32 high = index + 1 >= 0 && index + 1 < words ? row[index + 1] : 0u;
    return low >> bit | high << (32 - bit);
}

// Grow by a square of side 2 * radius + 1. `bits` and `spare` swap roles; the one that holds the result is returned.
// Each step unites three copies: 1, 3, 7, 15, ... A step is at most reach + 1, since at a border only half of what a
// pixel has grown to is left to grow on.
__device__ inline u32* dilate_bits(u32* bits, u32* spare, int height, int width, int radius) {
    const int words = (width + 31) / 32, n = height * words;
    for (int vertical = 0; vertical < 2; ++vertical) {
        for (int reach = 0; reach < radius;) {
            const int step = reach + 1 < radius - reach ? reach + 1 : radius - reach;
            for (int i = threadIdx.x; i < n; i += blockDim.x) {
                const int row = i / words, word = i % words;
                u32 value = bits[i];
                if (vertical) {
                    if (row >= step) value |= bits[i - step * words];
                    if (row + step < height) value |= bits[i + step * words];
                } else {
                    value |= shifted_word(bits + row * words, words, word, step);
                    value |= shifted_word(bits + row * words, words, word, -step);
                    if (word == words - 1 && width % 32) value &= (1u << (width % 32)) - 1;
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
