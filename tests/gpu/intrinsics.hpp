// What of CUDA C++ means the same for any way to run a block on the host.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define TTT4AS_HOST
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __shared__ static
#define __isShared(pointer) true
#define __builtin_assume(condition) ((void)(condition))

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) double2 {
    double x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Dim {
    unsigned x = 0, y = 1, z = 1;
};

#define APART
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(dynamic_shared)

namespace host {

// Call `kernel` with the arguments that `values` point to.
template <typename... A, std::size_t... I>
static void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(values[I])...);
}

// What a thread has the hardware do meanwhile, in groups, the last of which is not at its end: done no sooner than
// where the thread waits for it, so that one that does not wait finds what was there.
struct Meanwhile {
    std::deque<std::vector<std::function<void()>>> groups;
    template <typename F>
    void add(F work) {
        if (groups.empty()) groups.emplace_back();
        groups.back().emplace_back(work);
    }
    void end_group() {
        if (groups.empty()) groups.emplace_back();
        groups.emplace_back();
    }
    void wait(int pending) {
        for (; int(groups.size()) > pending + 1; groups.pop_front())
            for (const auto& work : groups.front()) work();
    }
};
static inline unsigned thread_number();
static Meanwhile copies[1024];
static inline void copy_async(float4* to, const float* from) {
    copies[thread_number()].add([=] { *to = from ? *reinterpret_cast<const float4*>(from) : float4{0, 0, 0, 0}; });
}
static inline void copies_end_group() { copies[thread_number()].end_group(); }
static inline void copies_wait(int pending) { copies[thread_number()].wait(pending); }

}  // namespace host

template <typename To, typename From>
static To bits_as(From x) {
    To to;
    static_assert(sizeof to == sizeof x, "");
    std::memcpy(&to, &x, sizeof to);
    return to;
}
static inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
static inline long long __double_as_longlong(double x) { return bits_as<long long>(x); }
static inline double __longlong_as_double(long long x) { return bits_as<double>(x); }
static inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline int min(int a, int b) { return b < a ? b : a; }
static inline int max(int a, int b) { return a < b ? b : a; }
static inline int __vimin3_s32(int a, int b, int c) { return min(min(a, b), c); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
