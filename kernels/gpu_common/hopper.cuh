// What compute capability 9.0 has and others have not: copies of tiles by the hardware, which barriers in shared memory
// count, and products of a warpgroup (128 threads) from shared memory. Compiled for sm_90a alone.
#pragma once
#include "device.cuh"

namespace ttt4as {

#ifndef TTT4AS_HOST
struct alignas(64) TensorMap {  // CUtensorMap: a tensor in global memory and the box that is copied of it
    u64 opaque[16];
};
typedef u64 Barrier;

__device__ inline u32 shared_address(const void* place) { return u32(__cvta_generic_to_shared(place)); }

__device__ inline void barrier_init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// The copies' hardware sees barriers that were made before; threads see them past the next __syncthreads.
__device__ inline void barriers_made() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The same, and the phase ends no sooner than `bytes` have been copied.
__device__ inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Until the phase of that parity is over: 0 for the first.
__device__ inline void barrier_wait(Barrier* barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred over;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// The box of a matrix at (row, column), or of a tensor of five dimensions at (last, 0, 0, 0, column), to `to`; zeros
// where there is nothing.
__device__ inline void copy_box(void* to, const TensorMap& map, Barrier* barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}
__device__ inline void copy_box_of_five(void* to, const TensorMap& map, Barrier* barrier, int column, int last) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %3, "
        "%4}], [%5];" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(0), "r"(last), "r"(shared_address(barrier))
        : "memory");
}

// Products are under way from the first to `products_end`; registers of theirs may be used past `products_wait`.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
template <int N>
__device__ void products_settle(float (&sums)[N]) {  // the compiler may not use them any sooner
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

template <int registers>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
// The threads of a warpgroup meet.
__device__ inline void warpgroup_meets(int warpgroup) {
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}
// Two warpgroups take turns: one waits until the other, number 0 or 1, says that its own is over.
__device__ inline void turn_begins(int warpgroup) { asm volatile("bar.sync %0, 256;" ::"r"(warpgroup + 3) : "memory"); }
__device__ inline void turn_ends(int warpgroup) { asm volatile("bar.arrive %0, 256;" ::"r"(4 - warpgroup) : "memory"); }
#endif

// Rows of 128 bytes in shared memory, their 16-byte parts in the order that copies and products have (swizzled), as a
// product takes them: a multiple of 1024, or that and a multiple of 32 below 128 for what starts at a later channel.
__device__ inline u64 rows_of_128_bytes(const void* place) {
#ifndef TTT4AS_HOST
    const u64 address = shared_address(place);
#else
    const u64 address = host::shared_offset(place);
#endif
    return (address >> 4) | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

}  // namespace ttt4as
