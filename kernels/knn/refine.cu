// The exact neighbours of one query a block, as `refine_kernel` of gpu_kernels.py finds them. A warp measures a row by
// itself and always in the same order: copies of a row have the same sum to the bit, warps never wait for each other
// within a row, and (distance, row) orders all rows.
//
// Reads 12 bytes a group, D values for each of the k seeds and for each row that may be nearer, and 2 D bytes for each
// row of a group that may hold several of these.
#include "device.cuh"

using namespace ttt4as;

namespace {

constexpr int NONE = 0x7fffffff;
constexpr int MAX_THREADS = 128;
constexpr int MAX_K = 64;      // that of gpu.py
constexpr int LISTS = 256;     // of groups, of which each gives a seed at most
constexpr int SPAN = 8;        // groups that a thread looks at at once
constexpr int CHANNELS = 512;  // the query is filled up to a multiple of them with zeros
constexpr int ROUND = 128;     // rows that are measured before the nearest are chosen anew

// How numbers are read: `raw` makes a double of the bits by shifts, without the exponent's offset; times `scale` that
// is the number, of a subnormal one too, and a multiply-add has the factor for nothing. Conversions would take longer.
struct F32 {
    typedef u32 Bits;
    static constexpr double scale = 0x1p896;
    __device__ static double raw(Bits bits) {
        const u32 high = u32(int(bits) >> 3) & 0x8fffffffu;
        return __longlong_as_double((long long)(u64(high) << 32 | bits << 29));
    }
};
struct BF16 {
    typedef unsigned short Bits;
    static constexpr double scale = F32::scale;
    __device__ static double raw(Bits bits) { return F32::raw(u32(bits) << 16); }
};
struct F16 {
    typedef unsigned short Bits;
    static constexpr double scale = 0x1p1008;
    __device__ static double raw(Bits bits) {
        const u32 high = (bits & 0x8000u) << 16 | (bits & 0x7fffu) << 10;
        return __longlong_as_double((long long)(u64(high) << 32));
    }
};
struct F64 {
    typedef u64 Bits;
    static constexpr double scale = 1;
    __device__ static double raw(Bits bits) { return __longlong_as_double((long long)bits); }
};

// N numbers beside each other, 16 bytes that one instruction reads, or one number. Nothing is read of what does not
// exist: zeros.
template <typename T, int N>
struct Piece {
    uint4 words;
    __device__ void read(const typename T::Bits* from, bool exists) {
        words = exists ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
    }
    __device__ double raw(int i) const {
        const u32 all[4] = {words.x, words.y, words.z, words.w};
        if (N == 8) return T::raw(typename T::Bits(all[i / 2] >> 16 * (i & 1)));
        if (N == 4) return T::raw(typename T::Bits(all[i]));
        return T::raw(typename T::Bits(u64(all[2 * i + 1]) << 32 | all[2 * i]));
    }
};
template <typename T>
struct Piece<T, 1> {
    typename T::Bits bits;
    __device__ void read(const typename T::Bits* from, bool exists) { bits = exists ? *from : 0; }
    __device__ double raw(int) const { return T::raw(bits); }
};

// Where channel `d` of the query is kept: of the N that a lane takes of 32 N, two at a time, beside other lanes' two.
template <int N>
__device__ int place_of(int d) {
    if (N == 1) return d;
    const int i = d % N, lane = d / N % 32;
    return d / (32 * N) * (32 * N) + i / 2 * 64 + lane * 2 + i % 2;
}

// The query in shared memory as doubles, by the threads from `first` on.
template <typename T, int N>
__device__ void keep_query(double* kept, const void* query, long long start, long long step, int dim, int first) {
    const typename T::Bits* const from = static_cast<const typename T::Bits*>(query) + start;
    const int threads = int(blockDim.x) - first;
    const int padded = (dim + CHANNELS - 1) / CHANNELS * CHANNELS;
#pragma unroll 8
    for (int d = int(threadIdx.x) - first; d < padded; d += threads)
        kept[place_of<N>(d)] = d < dim ? T::raw(from[d * step]) * T::scale : 0;
}

// The squared distance of a row, by the lanes of a warp, each of which gets it.
template <typename T, int N>
__device__ double measure(const double* query, const typename T::Bits* row, long long step, int dim) {
    constexpr int AHEAD = N == 1 ? 16 : N == 2 ? 4 : 8;  // reads in flight
    constexpr int AT_ONCE = CHANNELS / (32 * N) < AHEAD ? CHANNELS / (32 * N) : AHEAD;
    const int lane = threadIdx.x & 31;
    double sums[4] = {0, 0, 0, 0};
    for (int first = 0; first < dim; first += 32 * N * AHEAD) {
        Piece<T, N> pieces[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int d = first + (32 * j + lane) * N;
            pieces[j].read(row + (N > 1 ? d : d * step), d < dim);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int begin = first + 32 * N * j;
            if (j % AT_ONCE == 0 && begin >= dim) break;
            const double2* const pairs = reinterpret_cast<const double2*>(query + begin) + lane;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                double q;
                if (N == 1)
                    q = query[begin + lane];
                else
                    q = i % 2 ? pairs[i / 2 * 32].y : pairs[i / 2 * 32].x;
                const double difference = fma(pieces[j].raw(i), -T::scale, q);
                double& sum = sums[(j * N + i) % 4];
                sum = fma(difference, difference, sum);
            }
        }
    }
    return warp_reduce((sums[0] + sums[1]) + (sums[2] + sums[3]), Add());
}

__device__ inline float of_half(u32 bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
#else
    return float(F16::raw((unsigned short)bits) * F16::scale);
#endif
}

// The product of two float16 rows by 8 lanes beside each other, each of which gets it. Of rows, the lanes of a warp
// have four; `exists` is whether these have one.
__device__ float product_of_low(const uint4* a, const uint4* b, int padded, bool exists) {
    constexpr int AHEAD = 8;  // reads in flight
    const int pieces = exists ? padded / 8 : 0;
    float sums[2] = {0, 0};
    for (int first = threadIdx.x & 7; first < pieces; first += 8 * AHEAD) {
        uint4 read[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) read[j] = first + 8 * j < pieces ? b[first + 8 * j] : uint4{0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const uint4 other = first + 8 * j < pieces ? a[first + 8 * j] : uint4{0, 0, 0, 0};
            const u32 x[4] = {other.x, other.y, other.z, other.w}, y[4] = {read[j].x, read[j].y, read[j].z, read[j].w};
            for (int i = 0; i < 4; ++i) {
                sums[0] = fmaf(of_half(x[i] & 0xffffu), of_half(y[i] & 0xffffu), sums[0]);
                sums[1] = fmaf(of_half(x[i] >> 16), of_half(y[i] >> 16), sums[1]);
            }
        }
    }
    float sum = sums[0] + sums[1];
    for (int distance = 4; distance; distance >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
    return sum;
}

// As `_column` of gpu_kernels.py.
__device__ int column(int group, int place) {
    return (group >> 2) * 128 + (place >> 1) * 8 + (group & 3) * 2 + (place & 1);
}

// Rows and their squared distances: a list of k, and behind it those that may be nearer. A new list is the other half.
struct Found {
    double distance[2][MAX_K + ROUND];
    int row[2][MAX_K + ROUND];  // -1: none, at an infinite distance
};

// Tell `place` the place of each of `count` entries in the order of (distance, row); those without a row come last.
template <typename Place>
__device__ void each_place(const Found& found, int half, int count, Place place) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const double distance = found.distance[half][i];
        const int row = found.row[half][i];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < count; ++j) {
            const double other = found.distance[half][j];
            const int other_row = found.row[half][j];
            const bool row_before = (other_row < row) | ((other_row == row) & (j < i));  // no branches
            before += (other < distance) | ((other == distance) & row_before);
        }
        place(before, distance, row);
    }
}

// As `_limit` of gpu_kernels.py; from the upper halves of the distances, which make the worst too large by 2^-20 of it
// at most.
__device__ int limit_of(const Found& found, int half, int k, double bound, double unit) {
    u32 high = 0;
    for (int j = threadIdx.x & 31; j < k; j += 32) {
        high = Max()(high, u32(u64(__double_as_longlong(found.distance[half][j])) >> 32));
    }
    const double worst = __longlong_as_double((long long)(u64(~warp_min(~high)) << 32 | 0xffffffffu));
    const u32 bits = __float_as_uint(to_float((worst + bound) * unit));
    if (bound != bound) return -NONE;
    return bits < 0x7f800000u ? int(bits + 1) | 31 : NONE - 1;
}

template <typename T, int N>
__device__ void find(const void* queries, const typename T::Bits* bank, const uint4* low, const uint4* bank_low,
                     const float* norm, const int* least, const int* second, const double* facts, float* distances,
                     long long* indices, int kind, int n_bank, int dim, int padded, int n_groups, int k, long long q_n,
                     long long q_d, long long b_n, long long b_d) {
    DYNAMIC_SHARED(double2, pairs);
    double* const query = reinterpret_cast<double*>(pairs);
    __shared__ Found found;
    __shared__ int values[LISTS], groups[LISTS], seeded[LISTS];
    __shared__ int listed[SPAN * MAX_THREADS];  // rows from its start, whole groups from its end
    __shared__ int counts[2];
    const int thread = threadIdx.x, threads = blockDim.x;
    const int lane = thread & 31, warp = thread >> 5, warps = threads >> 5;
    const long long block = blockIdx.x;
    least += block * n_groups;
    second += block * n_groups;
    const double bound = facts[block * 4 + 2], unit = facts[block * 4 + 3];

    // Seeds: the k least of the lists' minima. Any k rows bound the k-th distance from above. One warp picks them while
    // the others fetch the query.
    for (int list = 2 * thread; list < LISTS; list += 2 * threads) {
        int value[2] = {NONE, NONE}, group[2] = {0, 0};
#pragma unroll 4
        for (int g = list; g < n_groups; g += LISTS) {
            const int2 two = *reinterpret_cast<const int2*>(least + g);
            if (two.x < value[0]) value[0] = two.x, group[0] = g;
            if (two.y < value[1]) value[1] = two.y, group[1] = g + 1;
        }
        for (int i = 0; i < 2; ++i) values[list + i] = value[i], groups[list + i] = group[i], seeded[list + i] = -1;
    }
    if (thread < 2) counts[thread] = 0;
    __syncthreads();
    if (warp == 0) {
        u32 keys[LISTS / 32];  // no two are equal: the number of the list takes the place of what orders little
        for (int i = 0; i < LISTS / 32; ++i) {
            const int list = lane + 32 * i;
            keys[i] = ((u32(values[list]) ^ 0x80000000u) & ~u32(LISTS - 1)) | u32(list);
        }
        u32 from = 0;
        for (int j = 0; j < k; ++j) {
            u32 past[2] = {~0u, ~0u};
            for (int i = 0; i < LISTS / 32; ++i) past[i % 2] = Min()(past[i % 2], keys[i] - from);  // those below wrap
            const u32 key = warp_min(Min()(past[0], past[1])) + from;
            from = key + 1;
            const int list = key & (LISTS - 1), value = values[list], group = groups[list];
            const int row = column(group, value & 31);
            const bool exists = value < NONE && row < n_bank;
            if (lane == 0) {
                found.row[0][j] = exists ? row : -1;
                if (exists) seeded[list] = group;
                if (N > 1 && exists) prefetch(bank + row * b_n, dim * int(sizeof *bank));
            }
        }
    }
    if (const int first = warps > 1 ? 32 : 0; thread >= first) {
        const long long start = block * q_n;
        if (kind == 0) keep_query<F16, N>(query, queries, start, q_d, dim, first);
        if (kind == 1) keep_query<BF16, N>(query, queries, start, q_d, dim, first);
        if (kind == 2) keep_query<F32, N>(query, queries, start, q_d, dim, first);
        if (kind == 3) keep_query<F64, N>(query, queries, start, q_d, dim, first);
    }
    __syncthreads();

    // Rounds: rows are measured, the nearest become the list, and what its worst cannot exclude is up next.
    int half = 0, base = 0, count = k;  // entries to measure: first the list itself
    int next = 0, rows = 0, wholes = 0, seen_rows = 0, seen_wholes = 0, task = 0;
    while (true) {
        for (int i = base + warp; i < base + count; i += warps) {
            const int row = found.row[half][i];
            double distance = __longlong_as_double(0x7ff0000000000000ll);
            if (row >= 0) distance = measure<T, N>(query, bank + row * b_n, b_d, dim);
            if (lane == 0) found.distance[half][i] = distance;
        }
        __syncthreads();
        if (task == rows + 32 * wholes && next >= n_groups) break;
        if (base) {
            each_place(found, half, base + count, [&](int place, double distance, int row) {
                if (place < k) found.distance[1 - half][place] = distance, found.row[1 - half][place] = row;
            });
            half = 1 - half;
            __syncthreads();
        }
        base = k;
        while (task == rows + 32 * wholes && next < n_groups) {
            const int limit = limit_of(found, half, k, bound, unit);
            int4 near[SPAN / 4], far[SPAN / 4];
            for (int i = 0; i < SPAN / 4; ++i) {
                const int g = next + (i * threads + thread) * 4;
                near[i] = far[i] = int4{NONE, NONE, NONE, NONE};
                if (g >= n_groups) continue;
                near[i] = *reinterpret_cast<const int4*>(least + g);
                far[i] = *reinterpret_cast<const int4*>(second + g);
            }
            for (int i = 0; i < SPAN / 4; ++i) {
                const int g = next + (i * threads + thread) * 4;
                const auto look = [&](int group, int value, int other) {
                    if (value > limit) return;
                    if (other <= limit)  // no row of it is known to be too far
                        listed[SPAN * MAX_THREADS - 1 - (atomicAdd(&counts[1], 1) - seen_wholes)] = group;
                    else if (seeded[group % LISTS] != group)
                        listed[atomicAdd(&counts[0], 1) - seen_rows] = column(group, value & 31);
                };
                look(g, near[i].x, far[i].x), look(g + 1, near[i].y, far[i].y);
                look(g + 2, near[i].z, far[i].z), look(g + 3, near[i].w, far[i].w);
            }
            __syncthreads();
            rows = counts[0] - seen_rows, wholes = counts[1] - seen_wholes;
            seen_rows += rows, seen_wholes += wholes;
            next += SPAN * threads, task = 0;
            if (rows + wholes == 0) __syncthreads();  // all have read the counts
        }
        const int left = rows + 32 * wholes - task;
        count = left < ROUND ? left : ROUND;
        const int alone = rows > task ? rows - task : 0;  // the others are of whole groups
        for (int i = thread; i < count; i += threads) {
            int row;
            if (task + i < rows) {
                row = listed[task + i];
            } else {
                const int place = (task + i - rows) & 31;
                const int group = listed[SPAN * MAX_THREADS - 1 - ((task + i - rows) >> 5)];
                row = column(group, place);
                if (seeded[group % LISTS] == group && (least[group] & 31) == place) row = -1;  // known as a seed
            }
            found.row[half][k + i] = row < n_bank ? row : -1;
        }
        task += count;
        __syncthreads();
        if (alone >= count) continue;
        // What the proposals do not say of a group's other rows is found anew, to spare the most of them the measure.
        const int limit = limit_of(found, half, k, bound, unit);
        const float ratio = to_float(facts[block * 4]), own = to_float(facts[block * 4 + 1]);
        for (int first = alone + 4 * warp; first < count; first += 4 * warps) {
            const int i = first + lane / 8, row = i < count ? found.row[half][k + i] : -1;
            const long long pieces = padded / 8;
            const float product = product_of_low(low + block * pieces, bank_low + row * pieces, padded, row >= 0);
            __syncwarp();  // all lanes have read the row
            if (row < 0 || lane & 7) continue;
            const int value = int(__float_as_uint(fmaf(norm[row], ratio, own) - product));
            if ((value & ~31) > limit) found.row[half][k + i] = -1;
        }
        __syncthreads();
    }

    distances += block * k;
    indices += block * k;
    const double nan = __longlong_as_double(0x7ff8000000000000ll);
    if (bound != bound) {  // a query that is not finite
        for (int i = thread; i < k; i += threads) distances[i] = float(nan), indices[i] = -1;
        return;
    }
    each_place(found, half, base + count, [&](int place, double distance, int row) {
        if (place >= k) return;
        const bool number = distance <= 0x1.fffffffffffffp1023;
        distances[place] = to_float(number ? sqrt(distance) : nan);
        indices[place] = number ? row : -1;
    });
}

}  // namespace

// Defined by gpu.py: the bank's type, how many of its numbers one instruction reads (16 bytes where rows allow that),
// and blocks that share a multiprocessor without spilling registers; of seven, 784 are one wave on 132 of them.
#ifndef TYPE
#define TYPE F32
#define WIDTH 4
#define BLOCKS 7
#endif

// `kind` is the query's type: 0 float16, 1 bfloat16, 2 float32, 3 float64.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    refine(const void* queries, const TYPE::Bits* bank, const uint4* low, const uint4* bank_low, const float* norm,
           const int* least, const int* second, const double* facts, float* distances, long long* indices, int kind,
           int n_bank, int dim, int padded, int n_groups, int k, long long q_n, long long q_d, long long b_n,
           long long b_d) {
    find<TYPE, WIDTH>(queries, bank, low, bank_low, norm, least, second, facts, distances, indices, kind, n_bank, dim,
                      padded, n_groups, k, q_n, q_d, b_n, b_d);
}
