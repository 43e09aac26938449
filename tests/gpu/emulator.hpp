// CUDA's intrinsics for one block at a time on the host; see emulator.py.
#pragma once
#include <ucontext.h>

#include "intrinsics.hpp"

#define ALL_STORE(place, value) ((place) = (value))

alignas(1024) static char dynamic_shared[256 * 1024];
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace host {

static inline unsigned thread_number() { return threadIdx.x; }

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    int meeting = 0;  // the kind of meeting point it waits at: 1 block, 2 warp
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
alignas(16) static char slots[1024][16];  // what a thread shows its warp

static void meet(int kind) {
    const int self = current;
    fibers[self].meeting = kind;
    swapcontext(&fibers[self].context, &scheduler);
    threadIdx.x = unsigned(self);
}

// What threads change, and wait for: one that waits lets the others run; where nobody does anything, the block hangs.
static long changes;
static bool paused;
struct Monitor {
    template <typename F>
    void change(F work) {
        work();
        ++changes;
    }
    template <typename P>
    void wait(P holds) {
        const int self = current;
        while (!holds()) {
            paused = true;
            swapcontext(&fibers[self].context, &scheduler);
            threadIdx.x = unsigned(self);
        }
    }
};

static void (*body)();
static void entry() {
    threadIdx.x = unsigned(current);
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// A warp's fibers pass a warp meeting together, a block's a block meeting.
static int run_block(int threads, bool backwards) {
    fibers.assign(threads, Fiber{});
    for (Meanwhile& of_thread : copies) of_thread.groups.clear();
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(64 * 1024);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, entry, 0);
    }
    while (true) {
        int running = 0;
        const long before = changes;
        for (int k = 0; k < threads; ++k) {
            const int i = backwards ? threads - 1 - k : k;
            if (fibers[i].done || fibers[i].meeting) continue;
            current = i;
            threadIdx.x = unsigned(i);
            paused = false;
            swapcontext(&scheduler, &fibers[i].context);
            running += !paused;
        }
        bool finished = true, block = true;
        for (const Fiber& fiber : fibers) {
            finished = finished && fiber.done;
            block = block && !fiber.done && fiber.meeting == 1;
        }
        if (finished) return 0;
        bool released = false;
        for (int warp = 0; warp < threads; warp += 32) {
            bool together = true;
            for (int i = warp; i < warp + 32; ++i) together = together && !fibers[i].done && fibers[i].meeting == 2;
            if (!together) continue;
            for (int i = warp; i < warp + 32; ++i) fibers[i].meeting = 0;
            released = true;
        }
        if (block) {
            for (Fiber& fiber : fibers) fiber.meeting = 0;
            released = true;
        }
        if (!released && !running && changes == before) return 1;
    }
}

template <typename... A>
static int launch(void (*kernel)(A...), int blocks, int threads, long long shared, int backwards, int count,
                  void** values) {
    if (count != int(sizeof...(A)) || shared > (long long)sizeof dynamic_shared) return 2;
    static void (*function)(A...);
    static void** arguments;
    function = kernel;
    arguments = values;
    body = [] { call(function, arguments, std::index_sequence_for<A...>{}); };
    gridDim.x = unsigned(blocks);
    blockDim.x = unsigned(threads);
    for (int block = 0; block < blocks; ++block) {
        blockIdx.x = unsigned(backwards ? blocks - 1 - block : block);
        std::memset(dynamic_shared, 0xff, sizeof dynamic_shared);
        if (int code = run_block(threads, backwards != 0)) return code;
    }
    return 0;
}

template <typename T>
static T exchange(T value, int lane) {
    const int self = current, base = self & ~31;
    std::memcpy(slots[self], &value, sizeof value);
    meet(2);
    T other = value;
    if (lane >= 0 && lane < 32) std::memcpy(&other, slots[base + lane], sizeof other);
    meet(2);
    return other;
}

}  // namespace host

static inline void __syncthreads() { host::meet(1); }
static inline void __syncwarp(unsigned = 0xffffffffu) { host::meet(2); }
template <typename T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
    return host::exchange(value, (host::current & 31) ^ mask);
}
template <typename T>
static T __shfl_sync(unsigned, T value, int lane) {
    return host::exchange(value, lane);
}
template <typename T>
static T __shfl_up_sync(unsigned, T value, int delta) {
    return host::exchange(value, (host::current & 31) - delta);
}
static inline unsigned __ballot_sync(unsigned, bool predicate) {
    const int self = host::current, base = self & ~31;
    std::memcpy(host::slots[self], &predicate, sizeof predicate);
    host::meet(2);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) {
        bool one;
        std::memcpy(&one, host::slots[base + lane], sizeof one);
        ballot |= unsigned(one) << lane;
    }
    host::meet(2);
    return ballot;
}
template <typename T>
static T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}
template <typename T>
static T atomicOr(T* address, T value) {
    const T before = *address;
    *address |= value;
    return before;
}
#define HOST_LAUNCHER(name)                                                                                          \
    extern "C" int host_##name(int blocks, int threads, long long shared, int backwards, int count, void** values) { \
        return host::launch(name, blocks, threads, shared, backwards, count, values);                                \
    }
