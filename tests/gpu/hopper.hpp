// What gpu_common/hopper.cuh has of the hardware, on the host as NVIDIA documents it: included before the kernel, after
// what runs its threads.
#pragma once

struct TensorMap {
    long long address, dims[5], strides[5];  // in bytes, the innermost first
    int box[5], rank;
};
static_assert(sizeof(TensorMap) <= 128, "as large as the driver's");

struct Barrier {
    host::Monitor monitor;
    int arrivals, pending, bytes;
    unsigned phase;
    template <typename F>
    void change(F work) {
        monitor.change([&] {
            work();
            if (pending == 0 && bytes == 0) pending = arrivals, ++phase;
        });
    }
};

namespace ttt4as {

static void barrier_init(Barrier* barrier, int arrivals) {
    barrier->monitor.change([=] {
        barrier->arrivals = barrier->pending = arrivals;
        barrier->bytes = 0, barrier->phase = 0;
    });
}
static void barriers_made() {}
static void barrier_arrive(Barrier* barrier) {
    barrier->change([=] { --barrier->pending; });
}
static void barrier_arrive_expecting(Barrier* barrier, int bytes) {
    barrier->change([=] { --barrier->pending, barrier->bytes += bytes; });
}
static void barrier_wait(Barrier* barrier, unsigned parity) {
    barrier->monitor.wait([=] { return (barrier->phase & 1) != parity; });
}

// Of a box, row after row, 128 bytes each; the 16-byte parts of a row change places by its number (mod 8).
static void copy_box_at(char* to, const TensorMap& map, Barrier* barrier, const int (&start)[5]) {
    int rows = 1;
    for (int k = 1; k < map.rank; ++k) rows *= map.box[k];
    for (int row = 0; row < rows; ++row) {
        long long offset = 0;
        bool exists = true;
        for (int k = 1, rest = row; k < map.rank; rest /= map.box[k++]) {
            const long long place = start[k] + rest % map.box[k];
            exists = exists && place < map.dims[k];
            offset += place * map.strides[k];
        }
        for (int i = 0; i < 64; ++i) {
            unsigned short value = 0;
            if (exists && start[0] + i < map.dims[0])
                std::memcpy(&value, reinterpret_cast<const char*>(map.address) + offset + 2 * (start[0] + i), 2);
            std::memcpy(to + 128 * row + 16 * (i / 8 ^ row % 8) + 2 * (i % 8), &value, 2);
        }
    }
    barrier->change([=] { barrier->bytes -= 128 * rows; });
}
static void copy_box(char* to, const TensorMap& map, Barrier* barrier, int column, int row) {
    copy_box_at(to, map, barrier, {column, row, 0, 0, 0});
}
static void copy_box_of_five(char* to, const TensorMap& map, Barrier* barrier, int column, int last) {
    copy_box_at(to, map, barrier, {column, 0, 0, 0, last});
}

// A product is made no sooner than where its warpgroup waits for it; a warp's threads do so together.
static host::Meanwhile products[1024];
static void products_begin() {}
static void products_end() { products[threadIdx.x].end_group(); }
template <int pending>
static void products_wait() {
    products[threadIdx.x].wait(pending);
    __syncwarp();
}
template <int N>
static void products_settle(float (&)[N]) {}
template <int registers>
static void take_registers() {}
template <int registers>
static void give_registers() {}

// A numbered barrier, by those who have ever arrived.
struct Numbered {
    host::Monitor monitor;
    int arrived;
    void arrive() {
        monitor.change([this] { ++arrived; });
    }
    void meet(int threads) {
        int until;
        monitor.change([&] { until = (arrived++ / threads + 1) * threads; });
        monitor.wait([&] { return arrived >= until; });
    }
};
static Numbered numbered[5];
static void warpgroup_meets(int warpgroup) { numbered[1 + warpgroup].meet(128); }
static void turn_begins(int warpgroup) { numbered[3 + warpgroup].meet(256); }
static void turn_ends(int warpgroup) { numbered[4 - warpgroup].arrive(); }

// An element of rows of 128 bytes at an address in shared memory, as the products take it.
static float element(long address) {
    address ^= (address >> 7 & 7) << 4;
    unsigned short bits;
    std::memcpy(&bits, dynamic_shared + address, 2);
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24);
    return bits >> 15 ? -size : size;
}

// A thread's own share of the product of a warpgroup.
template <int N>
static void multiply(float (&sums)[N], unsigned long long a, unsigned long long b, int add) {
    products[threadIdx.x].add([=, &sums] {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
        const long first = long(a & 0x3fff) << 4, second = long(b & 0x3fff) << 4;
        for (int i = 0; i < N; ++i) {
            const int row = 16 * warp + lane / 4 + 8 * (i >> 1 & 1), column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
            float sum = add ? sums[i] : 0;
            for (int k = 0; k < 16; ++k)
                sum += element(first + 128 * row + 2 * k) * element(second + 128 * column + 2 * k);
            sums[i] = sum;
        }
    });
}

}  // namespace ttt4as

namespace host {
static unsigned long long shared_offset(const void* place) {
    return static_cast<unsigned long long>(static_cast<const char*>(place) - dynamic_shared);
}
}  // namespace host
