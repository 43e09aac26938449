// The proposals of the nearest-neighbour search on compute capability 9.0: gpu_kernels.propose_kernel by the hardware's
// own instructions. A block takes tiles by turns; one thread has the hardware copy what two warpgroups multiply, some
// stages ahead of them. One multiplies while the other reduces its tile.
//
// The products' rows are the bank's vectors and their columns the queries, of which a tile has any multiple of 8: 784
// queries are six times 136 and not seven times 128. Rows are copied in such an order that a warp holds the vectors of
// one group, as `_place` of gpu_kernels.py says.
//
// 2 Q N D operations; a tile reads 2 D bytes a vector and a query, and writes 4 KEPT bytes a group and query.
//
// hopper.py defines QUERIES (of a tile), KEPT (of each group, its two or three least), SHARED_BYTES (dynamic shared
// memory of a block), PRODUCT (the instruction with its registers) and SUMS (those, as operands of `sums`).
#include "hopper.cuh"

using namespace ttt4as;

#define BANK 128                                      // vectors of a tile
#define GROUPS (BANK / 32)                            // of the tile, one a warp
#define STAGE_BYTES (128 * (BANK + QUERIES))          // 64 channels of all
#define STAGES ((SHARED_BYTES - 1024) / STAGE_BYTES)  // past the bytes that align them
#define WARPGROUPS 2                                  // that multiply, a tile each
#define THREADS (128 * WARPGROUPS + 128)
#define PER_THREAD (QUERIES / 2)

#ifndef TTT4AS_HOST
// sums = 64 rows of a by QUERIES rows of b over 16 channels, or that added to them.
__device__ inline void multiply(float (&sums)[PER_THREAD], u64 a, u64 b, int add) {
    asm volatile(PRODUCT : SUMS : "l"(a), "l"(b), "r"(add));
}
#endif

// The least of what several threads have seen, in order.
struct Least {
    int value[KEPT];
    __device__ void add(const Least& other) {
        const int *const a = value, *const b = other.value;
        const int least = min(a[0], b[0]), second = __vimin3_s32(max(a[0], b[0]), a[1], b[1]);
#if KEPT > 2
        value[2] = min(__vimin3_s32(a[2], b[2], max(a[1], b[0])), max(a[0], b[1]));
#endif
        value[0] = least, value[1] = second;
    }
};

__device__ inline Least least_of(int a, int b) {
    Least both;
    both.value[0] = min(a, b), both.value[1] = max(a, b);
    for (int i = 2; i < KEPT; ++i) both.value[i] = 0x7fffffff;
    return both;
}

__device__ inline Least exchanged(Least least, int distance) {
    for (int i = 0; i < KEPT; ++i) least.value[i] = __shfl_xor_sync(FULL_WARP, least.value[i], distance);
    return least;
}

// Of the first COUNT of `all`, those of even number for the lanes without `bit` in their number, and of odd number for
// those with it, over two lanes; where the last has no partner, both have it. Half of what one would do for each.
template <int COUNT, int N>
__device__ void halve(Least (&all)[N], int bit) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
        const Least low = all[i], high = all[i + 1 < COUNT ? i + 1 : i];
        Least own = upper ? high : low;
        own.add(exchanged(upper ? low : high, bit));
        all[i / 2] = own;
    }
}

// As `_tile` of gpu_kernels: eight tiles of queries by all of the bank at a time.
__device__ inline int2 tile_of(int tile, int tiles_q, int tiles_n) {
    const int first = tile / (8 * tiles_n) * 8, height = min(tiles_q - first, 8), within = tile % (8 * tiles_n);
    return int2{first + within % height, within / height};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    propose(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap bank, const double* facts,
            const float* norm, int* least, int* second, int* third, int n_query, int n_bank, int padded_dim,
            int n_groups) {
    DYNAMIC_SHARED(char, shared);
    __shared__ Barrier full[STAGES], empty[STAGES];
    __shared__ float2 all_terms[WARPGROUPS][QUERIES];  // of a query: the scale of the bank's norms, and its own norm
    __shared__ int4 all_found[WARPGROUPS][KEPT][QUERIES];  // of the four groups
    char* const stages = shared + (1024 - reinterpret_cast<u64>(shared) % 1024) % 1024;
    const int tiles_q = (n_query + QUERIES - 1) / QUERIES, tiles_n = (n_bank + BANK - 1) / BANK;
    const int warpgroup = threadIdx.x >> 7, steps = padded_dim / 64;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 4);
        }
        barriers_made();
    }
    __syncthreads();
    if (warpgroup == WARPGROUPS) {
        give_registers<24>();
        if (threadIdx.x > 128 * WARPGROUPS) return;
        int stage = 0;
        u32 parity = 1;
        for (int tile = blockIdx.x; tile < tiles_q * tiles_n; tile += gridDim.x) {
            const int2 place = tile_of(tile, tiles_q, tiles_n);
            for (int step = 0; step < steps; ++step) {
                char* const to = stages + stage * STAGE_BYTES;
                barrier_wait(empty + stage, parity);
                barrier_arrive_expecting(full + stage, STAGE_BYTES);
                copy_box_of_five(to, bank, full + stage, 64 * step, place.y * (BANK / 64));
                copy_box(to + 128 * BANK, queries, full + stage, 64 * step, place.x * QUERIES);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        return;
    }
    take_registers<240>();
    const int thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp = thread >> 5;
    float2* const terms = all_terms[warpgroup];
    int4(*const found)[QUERIES] = all_found[warpgroup];
    int copied = warpgroup * steps;  // stages that were filled before
    for (int tile = blockIdx.x + warpgroup * gridDim.x; tile < tiles_q * tiles_n; tile += WARPGROUPS * gridDim.x) {
        const int2 place = tile_of(tile, tiles_q, tiles_n);
        const int first_query = place.x * QUERIES;
        double2 own[2];
        for (int i = 0; i < 2; ++i) {
            const int query = first_query + thread + 128 * i;
            own[i] = thread + 128 * i < QUERIES && query < n_query
                         ? *reinterpret_cast<const double2*>(facts + 4ll * query)
                         : double2{1, 0};
        }
        float norms[4];
        int places[4];
        for (int i = 0; i < 4; ++i) {  // this thread's rows of its group
            places[i] = 8 * i + lane / 4;
            const int row = place.y * BANK + (places[i] >> 1) * 8 + warp * 2 + (places[i] & 1);
            norms[i] = row < n_bank ? norm[row] : __uint_as_float(0x7f800000u);
        }
        int stage = copied % STAGES;
        u32 parity = copied / STAGES & 1;
        copied += WARPGROUPS * steps;
        float sums[2][PER_THREAD];
        if (tile != int(blockIdx.x)) turn_begins(warpgroup);
        for (int step = 0; step < steps; ++step) {
            const char* const rows = stages + stage * STAGE_BYTES;
            barrier_wait(full + stage, parity);
            const u64 a = rows_of_128_bytes(rows), b = rows_of_128_bytes(rows + 128 * BANK);
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // 32 bytes each
                multiply(sums[0], a + 2 * k, b + 2 * k, step | k);
                multiply(sums[1], a + 2 * k + (64 * 128 >> 4), b + 2 * k, step | k);
            }
            products_end();
            products_wait<1>();
            if (step && lane == 0) barrier_arrive(empty + (stage ? stage : STAGES) - 1);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        if (tile + int(gridDim.x) < tiles_q * tiles_n) turn_ends(warpgroup);
        products_wait<0>();
        products_settle(sums[0]);
        products_settle(sums[1]);
        if (lane == 0) barrier_arrive(empty + (stage ? stage : STAGES) - 1);
        for (int i = 0; i < 2; ++i)
            if (thread + 128 * i < QUERIES) terms[thread + 128 * i] = float2{to_float(own[i].x), to_float(own[i].y)};
        warpgroup_meets(warpgroup);
        // A thread has four rows of each of its columns, eight lanes have the group.
        Least pairs[QUERIES / 8];
#pragma unroll
        for (int j = 0; j < QUERIES / 8; ++j) {
            Least both[2];
            const float2* const of_j = terms + 8 * j + 2 * (lane & 3);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float2 term = of_j[k];
                int packed[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float distance = fmaf(norms[i], term.x, term.y) - sums[i >> 1][4 * j + 2 * (i & 1) + k];
                    packed[i] = int(__float_as_uint(distance) & ~31u) | places[i];
                }
                both[k] = least_of(packed[0], packed[1]);
                both[k].add(least_of(packed[2], packed[3]));
            }
            halve<2>(both, 16);
            pairs[j] = both[0];
            if (KEPT > 2 && j == QUERIES / 16) __syncwarp();  // all at once would not fit the registers
        }
        halve<QUERIES / 8>(pairs, 8);
        halve<(QUERIES / 8 + 1) / 2>(pairs, 4);
        const int odd = (lane >> 3 & 1) + 2 * (lane >> 2 & 1);
#pragma unroll
        for (int i = 0; i < (QUERIES / 8 + 3) / 4; ++i) {
            const int j = 4 * i + odd, column = 8 * j + 2 * (lane & 3) + (lane >> 4);
            if (j < QUERIES / 8)
                for (int which = 0; which < KEPT; ++which)
                    reinterpret_cast<int*>(&found[which][column])[warp] = pairs[i].value[which];
        }
        warpgroup_meets(warpgroup);
        const int out = place.y * GROUPS;
        if (out < n_groups)
            for (int column = thread; column < QUERIES && first_query + column < n_query; column += 128)
                for (int which = 0; which < KEPT; ++which) {
                    int* const to = which == 0 ? least : which == 1 ? second : third;
                    const long long at = (long long)(first_query + column) * n_groups + out;
                    *reinterpret_cast<int4*>(to + at) = found[which][column];
                }
    }
}
