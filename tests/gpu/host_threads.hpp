// CUDA's intrinsics with a thread of the host for each of a block, for sanitizers; see host_sanitizers.py.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "intrinsics.hpp"

#define ALL_STORE(place, value) __atomic_store_n(&(place), value, __ATOMIC_RELAXED)
#define UNSEEN __attribute__((no_sanitize_thread))

static char* dynamic_shared;
static thread_local Dim threadIdx;
static Dim blockIdx, blockDim, gridDim;

namespace host {

static inline unsigned thread_number() { return threadIdx.x; }

static pthread_barrier_t block;
struct Meeting {
    unsigned arrived = 0, round = 0;
};
static Meeting warps[32];
static uint64_t slots[1024];  // what a thread shows its warp

// A shuffle orders no memory accesses: ThreadSanitizer must not see that its threads meet. Who waits sleeps: threads
// that yield instead take the processor by turns, ten times as long where something else runs beside them.
UNSEEN static void meet() {
    Meeting& warp = warps[threadIdx.x >> 5];
    const unsigned round = __atomic_load_n(&warp.round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&warp.arrived, 1, __ATOMIC_ACQ_REL) == 32) {
        __atomic_store_n(&warp.arrived, 0u, __ATOMIC_RELEASE);
        __atomic_store_n(&warp.round, round + 1, __ATOMIC_RELEASE);
        syscall(SYS_futex, &warp.round, FUTEX_WAKE_PRIVATE, 31, nullptr, nullptr, 0);
    } else {
        while (__atomic_load_n(&warp.round, __ATOMIC_ACQUIRE) == round)
            syscall(SYS_futex, &warp.round, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
    }
}

template <typename T>
UNSEEN static T exchange(T value, int lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "");
    const unsigned self = threadIdx.x;
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    slots[self] = bits;
    meet();
    T other = value;
    if (lane >= 0 && lane < 32) {
        bits = slots[(self & ~31u) + unsigned(lane)];
        __builtin_memcpy(&other, &bits, sizeof other);
    }
    meet();
    return other;
}

UNSEEN static unsigned ballot(bool predicate) {
    slots[threadIdx.x] = predicate;
    meet();
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= unsigned(slots[(threadIdx.x & ~31u) + lane]) << lane;
    meet();
    return votes;
}

// What threads change, and wait for. Each has a lock of its own: those who share none are not ordered.
class Monitor {
    pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed_ = PTHREAD_COND_INITIALIZER;

  public:
    template <typename F>
    void change(F work) {
        pthread_mutex_lock(&lock_);
        work();
        pthread_cond_broadcast(&changed_);
        pthread_mutex_unlock(&lock_);
    }
    template <typename P>
    void wait(P holds) {
        pthread_mutex_lock(&lock_);
        while (!holds()) pthread_cond_wait(&changed_, &lock_);
        pthread_mutex_unlock(&lock_);
    }
};

// An argument in the file: its kind (0 null, 1 memory, 2 a value, 3 memory whose address begins the value that comes
// next), its bytes, and those.
struct Argument {
    int64_t head[2];
    std::vector<char> bytes;
    void* pointer;
    bool read(FILE* file) {
        if (std::fread(head, sizeof head, 1, file) != 1) return false;
        bytes.resize(size_t(head[1]));
        pointer = head[0] ? bytes.data() : nullptr;
        return bytes.empty() || std::fread(bytes.data(), bytes.size(), 1, file) == 1;
    }
};

template <typename... A>
static int run(void (*kernel)(A...), const char* path) {
    alarm(300);  // threads that meet different barriers wait for ever
    FILE* file = std::fopen(path, "rb");
    int64_t sizes[4];  // blocks, threads, bytes of shared memory, arguments
    if (!file || std::fread(sizes, sizeof sizes, 1, file) != 1 || sizes[3] != int64_t(sizeof...(A))) return 2;
    std::vector<Argument> arguments(sizeof...(A)), described;
    std::vector<void*> values;
    for (Argument& argument : arguments) {
        if (!argument.read(file)) return 2;
        if (argument.head[0] == 3) {
            described.push_back(std::move(argument));
            if (!argument.read(file)) return 2;
            std::memcpy(argument.bytes.data(), &described.back().pointer, sizeof(void*));
        }
        values.push_back(argument.head[0] == 2 ? static_cast<void*>(argument.bytes.data()) : &argument.pointer);
    }
    std::fclose(file);
    const unsigned blocks = unsigned(sizes[0]), threads = unsigned(sizes[1]);
    gridDim.x = blocks;
    blockDim.x = threads;
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx.x = i;
        // As large as was asked for and no larger, so that what is past its end is seen.
        void* shared;
        if (posix_memalign(&shared, 1024, size_t(sizes[2]))) return 2;
        dynamic_shared = static_cast<char*>(std::memset(shared, 0xff, size_t(sizes[2])));
        pthread_barrier_init(&block, nullptr, threads);
        for (Meanwhile& of_thread : copies) of_thread.groups.clear();
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < threads; ++thread)
            running.emplace_back([=, &values] {
                threadIdx.x = thread;
                call(kernel, const_cast<void**>(values.data()), std::index_sequence_for<A...>{});
            });
        for (std::thread& one : running) one.join();
        pthread_barrier_destroy(&block);
        std::free(shared);
    }
    return 0;
}

}  // namespace host

static inline void __syncthreads() { pthread_barrier_wait(&host::block); }
// What its lanes wrote and read before, they see and may write after: ThreadSanitizer is told.
static inline void __syncwarp(unsigned = 0xffffffffu) {
    static int met[32];
    const unsigned warp = threadIdx.x >> 5;
    __atomic_fetch_add(&met[warp], 1, __ATOMIC_ACQ_REL);
    host::meet();
    __atomic_fetch_add(&met[warp], 1, __ATOMIC_ACQ_REL);
}
template <typename T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
    return host::exchange(value, int(threadIdx.x & 31) ^ mask);
}
template <typename T>
static T __shfl_sync(unsigned, T value, int lane) {
    return host::exchange(value, lane);
}
template <typename T>
static T __shfl_up_sync(unsigned, T value, int delta) {
    return host::exchange(value, int(threadIdx.x & 31) - delta);
}
static inline unsigned __ballot_sync(unsigned, bool predicate) { return host::ballot(predicate); }
template <typename T>
static T atomicAdd(T* address, T value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
static T atomicOr(T* address, T value) {
    return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
