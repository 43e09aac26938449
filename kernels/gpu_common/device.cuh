// What every CUDA C++ kernel of the package uses: reductions, scans, ordered keys, exact arithmetic.
//
// The same text is compiled by NVRTC, by nvcc and, for tests, by a host C++ compiler that supplies these intrinsics;
// it therefore includes nothing. Kernels take any block size that is a multiple of 32 up to the bound they state (that
// of refine.cu 32 times a power of two, those of hopper.cuh one size alone), and every sum is formed in an order that
// depends on the block size alone.
#pragma once

#ifndef TTT4AS_HOST
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#if __CUDA_ARCH__ < 1000
#define APART __noinline__  // a long function that is called from several places: code has to be fetched, too
#else
#define APART  // there what lives across a call does not fit the registers that calls leave alone
#endif
#define ALL_STORE(place, value) ((place) = (value))  // by several threads at once, all of them the same value
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL_WARP 0xffffffffu
#define MAX_WARPS 32

namespace ttt4as {

// Codes of a segmentation; those of kernels/segment/__init__.py.
enum Status { OK = 0, NOMINAL = 1, DEGENERATE = 2, NOT_CONVERGED = 3, NON_FINITE = 4 };

// 16 bytes to shared memory, or zeros where nothing exists, without waiting; both addresses are multiples of 16.
__device__ inline void copy_async(float4* to, const float* from, bool exists) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const u32 place = u32(__cvta_generic_to_shared(to)), size = exists ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(size) : "memory");
#elif defined(TTT4AS_HOST)
    host::copy_async(to, exists ? from : nullptr);
#else
    *to = exists ? *reinterpret_cast<const float4*>(from) : float4{0, 0, 0, 0};
#endif
}
// The thread's copies since the last such call are a group.
__device__ inline void copies_end_group() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(TTT4AS_HOST)
    host::copies_end_group();
#endif
}
// Wait for the thread's copies but those of the last `pending` groups; others see them past the next barrier.
template <int pending>
__device__ void copies_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#elif defined(TTT4AS_HOST)
    host::copies_wait(pending);
#endif
}

// Operations, each with an element that changes no result: `neutral`, given one of the values that are combined.
struct Add {
    template <typename V>
    __device__ V operator()(V a, V b) const {
        return a + b;
    }
    template <typename V>
    __device__ V neutral(V) const {
        return V(0);
    }
};
struct Min {
    template <typename V>
    __device__ V operator()(V a, V b) const {
        return b < a ? b : a;
    }
    template <typename V>
    __device__ V neutral(V any) const {
        return any;
    }
};
struct Max {
    template <typename V>
    __device__ V operator()(V a, V b) const {
        return a < b ? b : a;
    }
    template <typename V>
    __device__ V neutral(V any) const {
        return any;
    }
};

// Combine one value a lane; every lane gets the result.
template <typename V, typename Op>
__device__ V warp_reduce(V value, Op op) {
    for (int distance = 16; distance; distance >>= 1) value = op(value, __shfl_xor_sync(FULL_WARP, value, distance));
    return value;
}

// The least of one key a lane, by one instruction; every lane gets it.
__device__ inline u32 warp_min(u32 key) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_min_sync(FULL_WARP, key);
#else
    return warp_reduce(key, Min());
#endif
}

// Combine one value a thread; every thread gets the result.
template <typename V, typename Op>
__device__ V block_reduce(V value, Op op) {
    __shared__ V slots[MAX_WARPS];
    const int lane = threadIdx.x & 31;
    value = warp_reduce(value, op);
    if (lane == 0) slots[threadIdx.x >> 5] = value;
    __syncthreads();
    const V total = warp_reduce(lane < int(blockDim.x >> 5) ? slots[lane] : op.neutral(slots[0]), op);
    __syncthreads();
    return total;
}

// The sums of N values over `sharers` lanes beside each other, of which each lane gets one: N and `sharers` are powers
// of two, N <= sharers <= 32. The first steps halve what is left to sum, which spares most of the shuffles.
template <int N, typename V>
__device__ V one_of_sums(V (&values)[N], u32 part, u32 sharers) {
    u32 distance = sharers / 2;
#pragma unroll
    for (int held = N; held > 1; held /= 2) {
        const bool upper = part & distance;
#pragma unroll
        for (int i = 0; i < held / 2; ++i) {
            const V other = __shfl_xor_sync(FULL_WARP, upper ? values[i] : values[i + held / 2], distance);
            values[i] = (upper ? values[i + held / 2] : values[i]) + other;
        }
        distance /= 2;
    }
    V sum = values[0];
    for (; distance; distance /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
    return sum;
}
// Which of them lane `part` has; N where another has it already. No division: the compiler is not told of powers of
// two.
template <int N>
__device__ int own_of_sums(u32 part, u32 sharers) {
    const u32 share = sharers / N;
    return int(part & (share - 1) ? N : part >> __popc(share - 1));
}

// Sum N values (a power of two) a thread at the price of one reduction; every thread gets all sums, in place. Another
// sum of N values of the same type needs a barrier in between. Only threads of the first `warps` warps have something
// to add.
template <int N, typename V>
__device__ void block_sum_once(V (&values)[N], int warps) {
    __shared__ V slots[MAX_WARPS][N];
    if (int(threadIdx.x >> 5) < warps) {
        const int lane = threadIdx.x & 31, own = own_of_sums<N>(lane, 32);
        const V sum = one_of_sums(values, lane, 32);
        if (own < N) slots[threadIdx.x >> 5][own] = sum;
    }
    __syncthreads();
    for (int i = 0; i < N; ++i) values[i] = 0;
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp)
        for (int i = 0; i < N; ++i) values[i] += slots[warp][i];
}

// One array for sums of any number of values: each instance of a template would have its own.
__device__ inline double* sum_slots() {
    __shared__ double slots[MAX_WARPS * 4];
    return slots;
}

// The same of up to four values, whose threads meet before it returns: no barrier is needed between two.
template <int N>
__device__ void block_sum(double (&values)[N], int warps) {
    static_assert(N <= 4, "a slot each");
    constexpr int M = N > 2 ? 4 : N;
    double* const slots = sum_slots();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (warp < warps) {
        double all[M] = {};
        for (int i = 0; i < N; ++i) all[i] = values[i];
        const int own = own_of_sums<M>(lane, 32);
        const double sum = one_of_sums(all, lane, 32);
        if (own < M) slots[warp * M + own] = sum;
    }
    __syncthreads();
    double total = 0;
    for (int i = lane; i < warps * M; i += 32) total += slots[i];  // a lane's are of one of the sums
    for (int distance = 16; distance >= M; distance >>= 1) total += __shfl_xor_sync(FULL_WARP, total, distance);
    for (int i = 0; i < N; ++i) values[i] = __shfl_sync(FULL_WARP, total, i);
    __syncthreads();
}
template <int N>
__device__ void block_sum(double (&values)[N]) {
    block_sum(values, int(blockDim.x >> 5));
}

// Warps of a block whose threads i, i + blockDim.x ... are below `count` for some i.
__device__ inline int warps_of(int count) { return (count < int(blockDim.x) ? count + 31 : int(blockDim.x)) >> 5; }

// The sum of `value` over the threads before this one; `total` becomes the sum over all.
__device__ inline int block_scan(int value, int& total) {
    __shared__ int slots[MAX_WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int sum = value;
    for (int distance = 1; distance < 32; distance <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) slots[warp] = sum;
    __syncthreads();
    const int all = lane < int(blockDim.x >> 5) ? slots[lane] : 0;
    total = warp_reduce(all, Add());
    const int before = warp_reduce(lane < warp ? all : 0, Add());
    __syncthreads();
    return before + sum - value;
}

// x as a double. CuPy compiles with -ftz=true, under which comparisons and conversions of float32 take subnormal
// numbers for 0: this conversion does not, and where two numbers of a map are compared, their keys are.
__device__ inline double exact(float x) {
    const u32 bits = __float_as_uint(x);
    if (bits & 0x7f800000u) return double(x);
    const double size = double(bits & 0x7fffffu) * 0x1p-149;
    return bits >> 31 ? -size : size;
}
__device__ inline double exact(double x) { return x; }
// The float32 nearest to x, subnormal numbers too.
__device__ inline float to_float(double x) {
#ifdef __CUDA_ARCH__
    float nearest;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(nearest) : "d"(x));
    return nearest;
#else
    return float(x);
#endif
}

// Unsigned keys in the order of the numbers: a < b exactly where key(a) < key(b).
template <typename T>
struct Ordered;
template <>
struct Ordered<float> {
    typedef u32 Key;
    __device__ static u32 key(float x) {
        const u32 bits = __float_as_uint(x), sign = bits >> 31 ? 0xffffffffu : 0x80000000u;
        return bits == 0x80000000u ? bits : bits ^ sign;  // -0 is +0
    }
    __device__ static float value(u32 key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }
    __device__ static bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
    __device__ static int bits(u32 x) { return 32 - __clz(int(x)); }
};
template <>
struct Ordered<double> {
    typedef u64 Key;
    __device__ static u64 key(double x) {
        const u64 bits = u64(__double_as_longlong(x)), top = 1ull << 63;
        return bits == top ? bits : bits ^ (bits & top ? ~0ull : top);
    }
    __device__ static double value(u64 key) {
        return __longlong_as_double((long long)(key ^ (key >> 63 ? 1ull << 63 : ~0ull)));
    }
    __device__ static bool finite(double x) {
        return (u64(__double_as_longlong(x)) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
    }
    __device__ static int bits(u64 x) { return 64 - __clzll((long long)x); }
};

}  // namespace ttt4as
