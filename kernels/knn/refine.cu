// The exact neighbours of one query a block, as `refine_kernel` of gpu_kernels.py finds them. A warp measures a row by
// itself and always in the same order: copies of a row have the same sum to the bit, warps never wait for each other
// within a row, and (distance, row) orders all rows.
//
// Reads 8 bytes a group (of the first 512; 12 of others), D values for each of the k seeds and for each row that may be
// nearer, and 2 D bytes for each row of a group that may hold more of these than the proposals name.
#include "device.cuh"

using namespace ttt4as;

namespace {

constexpr int NONE = 0x7fffffff;
constexpr int SEEDED = int(0x80000000u);
constexpr int MAX_THREADS = 128;                // a power of two of warps
constexpr int MAX_K = 64;                       // that of gpu.py
constexpr int LISTS = 256;                      // of pairs of groups, of which each gives a seed at most
constexpr int SPAN = 4;                         // groups that a thread looks at at once
constexpr int LISTED = 2 * SPAN * MAX_THREADS;  // of each group two rows, or all of it
constexpr int CHANNELS = 512;                   // the query is filled up to a multiple of them with zeros
constexpr int ROUND = 128;                      // rows that are measured before the nearest are chosen anew

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

// The query in shared memory as doubles.
template <typename T, int N>
__device__ void keep_query(double* kept, const void* query, long long start, long long step, int dim) {
    const typename T::Bits* const from = static_cast<const typename T::Bits*>(query) + start;
    const int padded = (dim + CHANNELS - 1) / CHANNELS * CHANNELS;
#pragma unroll 8
    for (int d = threadIdx.x; d < padded; d += blockDim.x)
        kept[place_of<N>(d)] = d < dim ? T::raw(from[d * step]) * T::scale : 0;
}
// That of one whose numbers lie as the bank's, in two steps: each thread has some copied, and keeps them once they are
// there.
template <typename T, int N>
__device__ void copy_query(uint4* copied, const typename T::Bits* query, int dim) {
    const int pieces = (dim + CHANNELS - 1) / CHANNELS * (CHANNELS / N);
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces; i += blockDim.x)
        copy_async(reinterpret_cast<float4*>(copied + i), reinterpret_cast<const float*>(query + i * N), i * N < dim);
}
template <typename T, int N>
__device__ void keep_copied(double2* kept, const uint4* copied, int dim) {
    const int pieces = (dim + CHANNELS - 1) / CHANNELS * (CHANNELS / N);
    copies_wait<0>();
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
        const Piece<T, N> piece{copied[i]};
        double2* const to = kept + i / 32 * (16 * N) + i % 32;
#pragma unroll
        for (int j = 0; j < N; j += 2) to[j / 2 * 32] = double2{piece.raw(j) * T::scale, piece.raw(j + 1) * T::scale};
    }
}

// The squared distance of a row, by the lanes of a warp, each of which gets it. Once the first of it is being read,
// `meanwhile` is done.
template <typename T, int N, typename Work>
__device__ double measure(const double* query, const typename T::Bits* row, long long step, int dim, Work meanwhile) {
    constexpr int AHEAD = N == 1 ? 16 : N == 2 ? 4 : 8;  // reads in flight
    constexpr int AT_ONCE = CHANNELS / (32 * N) < AHEAD ? CHANNELS / (32 * N) : AHEAD;
    const int lane = threadIdx.x & 31;
    double sums[4] = {0, 0, 0, 0};
    for (int first = 0; first < dim; first += 32 * N * AHEAD) {
        Piece<T, N> pieces[AHEAD];
        const typename T::Bits* const own = row + (first + lane * N) * (N > 1 ? 1 : step);
        if (N > 1 && first + 32 * N * AHEAD <= dim) {  // no lane has to ask what exists
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) pieces[j].read(own + 32 * N * j, true);
        } else {
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const int d = 32 * N * j;
                pieces[j].read(own + (N > 1 ? d : d * step), first + lane * N + d < dim);
            }
        }
        if (first == 0) meanwhile();
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

#if __CUDA_ARCH__ >= 800
// sums += the products of the query and two rows, by tensor cores: of 16 channels, lanes 4 i to 4 i + 3 hold four each
// for the same rows; the query's are the same in all of the warp.
__device__ inline void add_products(float (&sums)[4], uint2 a, uint2 b, uint2 query) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.x), "r"(b.x), "r"(a.y), "r"(b.y), "r"(query.x), "r"(query.y));
}
__device__ inline float total(float sum) { return sum; }

// A read that brings the 256 bytes around it to the L2 cache.
__device__ inline uint4 read_of_256(const uint4* from) {
    uint4 read;
    asm volatile("ld.global.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(read.x), "=r"(read.y), "=r"(read.z), "=r"(read.w)
                 : "l"(from));
    return read;
}
#else
__device__ inline void add_products(float (&sums)[4], uint2 a, uint2 b, uint2 query) {
    const auto number = [](uint2 x, int i) {
        return float(F16::raw((unsigned short)((i < 2 ? x.x : x.y) >> 16 * (i & 1))) * F16::scale);
    };
    for (int i = 0; i < 4; ++i) {
        sums[0] = fmaf(number(a, i), number(query, i), sums[0]);
        sums[2] = fmaf(number(b, i), number(query, i), sums[2]);
    }
}
__device__ inline float total(float sum) {  // the lanes have summed their own channels
    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
    return sum + __shfl_xor_sync(FULL_WARP, sum, 2);
}
__device__ inline uint4 read_of_256(const uint4* from) { return *from; }
#endif

// The products of the query with 16 rows, all in float16, over the pieces from `begin` to `end`, multiples of 4. Lanes
// 4 i to 4 i + 3 bring two rows and get their products. Of each 256 bytes of a row the first 64 are read first: only
// they are waited for from memory.
__device__ float2 products_of_low(const uint4* query, const uint4* a, const uint4* b, int begin, int end) {
    constexpr int AHEAD = 4;  // reads in flight, of each row
    const int own = threadIdx.x & 3;
    float sums[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int first = begin; first < end; first += (first + 4 - begin) & 15 ? 4 : 16 * AHEAD - 12) {
        uint4 x[AHEAD], y[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int piece = min(first + 16 * j, end - 4) + own;
            x[j] = read_of_256(a + piece), y[j] = read_of_256(b + piece);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int piece = first + 16 * j;  // no branches: all is read before any of it is waited for
            const uint4 q = piece < end ? query[piece + own] : uint4{0, 0, 0, 0};
            add_products(sums, uint2{x[j].x, x[j].y}, uint2{y[j].x, y[j].y}, uint2{q.x, q.y});
            add_products(sums, uint2{x[j].z, x[j].w}, uint2{y[j].z, y[j].w}, uint2{q.z, q.w});
        }
    }
    return float2{total(sums[0]), total(sums[2])};
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
#pragma unroll 1
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
#pragma unroll 1
    for (int j = threadIdx.x & 31; j < k; j += 32) {
        high = Max()(high, u32(u64(__double_as_longlong(found.distance[half][j])) >> 32));
    }
    const double worst = __longlong_as_double((long long)(u64(~warp_min(~high)) << 32 | 0xffffffffu));
    const u32 bits = __float_as_uint(to_float((worst + bound) * unit));
    if (bound != bound) return -NONE;
    return bits < 0x7f800000u ? int(bits + 1) | 31 : NONE - 1;
}

constexpr int SAME = 4;  // a `kind` of queries, as `refine` says

template <typename T, int N>
__device__ void find(const void* queries, const typename T::Bits* bank, const uint4* low, const uint4* bank_low,
                     const float* norm, const int* least, const int* second, const int* third, const double* facts,
                     float* distances, long long* indices, int kind, int n_bank, int dim, int padded, int n_groups,
                     int k, int squared, long long q_n, long long q_d, long long b_n, long long b_d) {
    DYNAMIC_SHARED(double2, pairs);
    double* const query = reinterpret_cast<double*>(pairs);
    uint4* const copied = reinterpret_cast<uint4*>(query + (dim + CHANNELS - 1) / CHANNELS * CHANNELS);
    uint4* const query_low = copied;  // later
    __shared__ Found found;
    __shared__ int places[LISTS];           // of a list's least: 32 * its group + its place, SEEDED if it is a seed
    __shared__ int4 ahead[2][MAX_THREADS];  // the least and the second of the groups that a thread looks at next
    __shared__ int listed[LISTED];          // rows from its start, whole groups from its end
    u32* const keys = reinterpret_cast<u32*>(listed);  // before
    __shared__ int counts[2][2];  // of rows and of whole groups that a look listed; the next look has the other two
    __shared__ double told[4];    // the query's facts
    __shared__ float norms[ROUND], products[2][ROUND];  // of rows of whole groups
    const int thread = threadIdx.x, threads = blockDim.x;
    const long long block = blockIdx.x;
    // What one warp does is another's in every block of a multiprocessor, whose parts have a warp of each block.
    const int lane = thread & 31, warps = threads >> 5, warp = (thread >> 5) ^ ((blockIdx.x >> 7) & (warps - 1));
    least += block * n_groups;
    second += block * n_groups;
    if (thread < 4) told[thread] = facts[block * 4 + thread];

    const auto fetch = [&](int g) {  // what the thread looks at next
        if (g < n_groups) {
            copy_async(reinterpret_cast<float4*>(&ahead[0][thread]), reinterpret_cast<const float*>(least + g), true);
            copy_async(reinterpret_cast<float4*>(&ahead[1][thread]), reinterpret_cast<const float*>(second + g), true);
        }
        copies_end_group();
    };
    fetch(SPAN * thread);
    const long long start = block * q_n;
    if constexpr (N > 1)
        if (kind == SAME) copy_query<T, N>(copied, static_cast<const typename T::Bits*>(queries) + start, dim);
    copies_end_group();

    // Seeds: the k least of the lists' minima. Any k rows bound the k-th distance from above.
    copies_wait<1>();
    for (int list = 2 * thread; list < LISTS; list += 2 * threads) {
        int value[2] = {NONE, NONE}, group[2] = {0, 0};
        const auto add = [&](int g, int4 four) {
            if (four.x < value[0]) value[0] = four.x, group[0] = g;
            if (four.y < value[0]) value[0] = four.y, group[0] = g + 1;
            if (four.z < value[1]) value[1] = four.z, group[1] = g + 2;
            if (four.w < value[1]) value[1] = four.w, group[1] = g + 3;
        };
        const bool fetched = list == 2 * thread;
        if (fetched && 2 * list < n_groups) add(2 * list, ahead[0][thread]);
#pragma unroll 4
        for (int g = 2 * list + (fetched ? 2 * LISTS : 0); g < n_groups; g += 2 * LISTS)
            add(g, *reinterpret_cast<const int4*>(least + g));
        for (int i = 0; i < 2; ++i) {  // no two are equal: the number of the list takes the place of what orders little
            keys[list + i] = ((u32(value[i]) ^ 0x80000000u) & ~u32(LISTS - 1)) | u32(list + i);
            places[list + i] = group[i] * 32 + (value[i] & 31);
        }
    }
    if (thread < 2) counts[0][thread] = 0;
    __syncthreads();
    if (warp == 0) {
        u32 own[LISTS / 32];
        for (int i = 0; i < LISTS / 32; ++i) own[i] = keys[lane + 32 * i];
        u32 from = 0, picked[MAX_K / 32];  // seeds number `lane`, `lane` + 32, ...
#pragma unroll 1
        for (int j = 0; j < k; ++j) {
            u32 past[2] = {~0u, ~0u};
            for (int i = 0; i < LISTS / 32; ++i) past[i % 2] = Min()(past[i % 2], own[i] - from);  // those below wrap
            const u32 key = warp_min(Min()(past[0], past[1])) + from;
            from = key + 1;
            for (int i = 0; i < MAX_K / 32; ++i)
                if (j == lane + 32 * i) picked[i] = key;
        }
        for (int i = 0; i < MAX_K / 32; ++i) {
            const int j = lane + 32 * i;
            if (j >= k) break;
            const int list = picked[i] & (LISTS - 1), place = places[list];
            const int row = column(place / 32, place % 32);
            const bool exists = (picked[i] | (LISTS - 1)) != ~0u && row < n_bank;
            found.row[0][j] = exists ? row : -1;
            if (exists) places[list] = place | SEEDED;
        }
    }
    __syncthreads();

    // Rounds: rows are measured, the nearest become the list, and what its worst cannot exclude is up next.
    int half = 0, base = 0, count = k;  // entries to measure: first the list itself
    int next = 0, turn = 1, tasks = 0, task = 0;
    bool kept = false;  // the query, before the first row is measured
    while (true) {
        for (int i = base + warp; i < base + count || !kept; i += warps) {
            const int row = i < base + count ? found.row[half][i] : -1;
            double distance = __longlong_as_double(0x7ff0000000000000ll);
            if (row >= 0 || !kept) {
                const auto keep = [&] {
                    if (kept) return;
                    if constexpr (N > 1)
                        if (kind == SAME) keep_copied<T, N>(pairs, copied, dim);
                    if (kind == 0) keep_query<F16, N>(query, queries, start, q_d, dim);
                    if (kind == 1) keep_query<BF16, N>(query, queries, start, q_d, dim);
                    if (kind == 2) keep_query<F32, N>(query, queries, start, q_d, dim);
                    if (kind == 3) keep_query<F64, N>(query, queries, start, q_d, dim);
                    __syncthreads();
                    kept = true;
                };
                const double measured = measure<T, N>(query, bank + max(row, 0) * b_n, b_d, dim, keep);
                if (row >= 0) distance = measured;
            }
            if (lane == 0 && i < base + count) found.distance[half][i] = distance;
        }
        __syncthreads();
        if (task == tasks && next >= n_groups) break;
        if (base) {
            each_place(found, half, base + count, [&](int place, double distance, int row) {
                if (place < k) found.distance[1 - half][place] = distance, found.row[1 - half][place] = row;
            });
            half = 1 - half;
            __syncthreads();
        }
        base = k;
        while (task == tasks && next < n_groups) {
            turn ^= 1;
            const int limit = limit_of(found, half, k, told[2], told[3]), g = next + SPAN * thread;
            const auto look = [&](int group, int value, int other) {
                if (value > limit) return;
                if (other <= limit && (!third || third[block * n_groups + group] <= limit)) {
                    // no row of it is known to be too far
                    listed[LISTED - 1 - atomicAdd(&counts[turn][1], 1)] = group;
                    return;
                }
                if (other <= limit) listed[atomicAdd(&counts[turn][0], 1)] = column(group, other & 31);
                if (places[group / 2 % LISTS] != ((group * 32 + (value & 31)) | SEEDED))
                    listed[atomicAdd(&counts[turn][0], 1)] = column(group, value & 31);
            };
            copies_wait<0>();
            if (g < n_groups) {
                const int4 near = ahead[0][thread], far = ahead[1][thread];
                look(g, near.x, far.x), look(g + 1, near.y, far.y);
                look(g + 2, near.z, far.z), look(g + 3, near.w, far.w);
            }
            next += SPAN * threads;
            fetch(next + SPAN * thread);
            __syncthreads();
            tasks = counts[turn][0] + 32 * counts[turn][1], task = 0;
            if (thread < 2) counts[1 - turn][thread] = 0;  // which all have read
            if (tasks == 0) __syncthreads();
        }
        const int left = tasks - task, rows = counts[turn][0];
        if (left == 0) {
            count = 0;
            break;
        }
        count = left < ROUND ? left : ROUND;
        const int alone = rows > task ? rows - task : 0;  // the others are of whole groups
        if (alone < count)
#pragma unroll 1
            for (int i = thread; i < padded / 8; i += threads) query_low[i] = low[block * (padded / 8) + i];
#pragma unroll 1
        for (int i = thread; i < count; i += threads) {
            int row;
            if (task + i < rows) {
                row = listed[task + i];
            } else {
                const int place = (task + i - rows) & 31;
                const int group = listed[LISTED - 1 - ((task + i - rows) >> 5)];
                row = column(group, place);
                if (places[group / 2 % LISTS] == ((group * 32 + place) | SEEDED)) row = -1;
            }
            found.row[half][k + i] = row < n_bank ? row : -1;
            if (i >= alone) norms[i] = row >= 0 && row < n_bank ? norm[row] : 0;
        }
        task += count;
        __syncthreads();
        if (alone >= count) continue;
        // What the proposals do not say of a group's other rows is found anew, to spare the most of them the measure:
        // 16 rows and half of the channels at a time.
        for (int part = warp; alone + part / 2 * 16 < count; part += warps) {
            const int i = alone + part / 2 * 16 + lane / 4, pieces = padded / 8, middle = pieces / 2, end = part % 2;
            const uint4* rows_low[2];
            for (int j = 0; j < 2; ++j) {
                const int row = i + 8 * j < count ? found.row[half][k + i + 8 * j] : -1;
                rows_low[j] = bank_low + (long long)max(row, 0) * pieces;
            }
            const float2 two =
                products_of_low(query_low, rows_low[0], rows_low[1], end ? middle : 0, end ? pieces : middle);
            if (lane & 3) continue;
            if (i < count) products[end][i] = two.x;
            if (i + 8 < count) products[end][i + 8] = two.y;
        }
        __syncthreads();
        const int limit = limit_of(found, half, k, told[2], told[3]);
        const float ratio = to_float(told[0]), own = to_float(told[1]);
#pragma unroll 1
        for (int i = alone + thread; i < count; i += threads) {
            const float distance = fmaf(norms[i], ratio, own) - (products[0][i] + products[1][i]);
            if ((int(__float_as_uint(distance)) & ~31) > limit) found.row[half][k + i] = -1;
        }
        __syncthreads();
    }

    distances += block * k;
    indices += block * k;
    const double nan = __longlong_as_double(0x7ff8000000000000ll);
    if (told[2] != told[2]) {  // a query that is not finite
#pragma unroll 1
        for (int i = thread; i < k; i += threads) distances[i] = float(nan), indices[i] = -1;
        return;
    }
    each_place(found, half, base + count, [&](int place, double distance, int row) {
        if (place >= k) return;
        const bool number = distance <= 0x1.fffffffffffffp1023;
        distances[place] = to_float(!number ? nan : squared ? distance : sqrt(distance));
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
#if __CUDA_ARCH__ >= 900
#define RESIDENT BLOCKS
#else
#define RESIDENT (BLOCKS - 1)  // instructions are others, and take a few registers more
#endif

// `kind` is the query's type: 0 float16, 1 bfloat16, 2 float32, 3 float64; SAME if it is the bank's, and queries can be
// read 16 bytes at a time as the bank's rows can. `third` may be null, where proposals name two rows of a group.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, RESIDENT)
    refine(const void* queries, const TYPE::Bits* bank, const uint4* low, const uint4* bank_low, const float* norm,
           const int* least, const int* second, const int* third, const double* facts, float* distances,
           long long* indices, int kind, int n_bank, int dim, int padded, int n_groups, int k, int squared,
           long long q_n, long long q_d, long long b_n, long long b_d) {
    find<TYPE, WIDTH>(queries, bank, low, bank_low, norm, least, second, third, facts, distances, indices, kind, n_bank,
                      dim, padded, n_groups, k, squared, q_n, q_d, b_n, b_d);
}
