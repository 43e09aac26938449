// Kernels of the `peaks` operation: one block a map.
#include "peaks.cuh"

using namespace ttt4as;

template <typename T>
__device__ void local_maxima(const T* maps, bool* out, int height, int width, double percentile) {
    const long long offset = (long long)blockIdx.x * height * width;
    const T* map = maps + offset;
    const int n = height * width;
    const Range<T> range = range_of(map, n);
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[offset + i] = false;
    if (!range.finite) return;  // no percentile exists; the caller reports it
    const Percentile<T> found = percentile_of(map, n, percentile, range);  // threads meet in it
    each_peak(map, height, width, found, [=](int row, int col) { out[offset + row * width + col] = true; });
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    local_maxima_f32(const float* maps, bool* out, int height, int width, double percentile) {
    local_maxima(maps, out, height, width, percentile);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    local_maxima_f64(const double* maps, bool* out, int height, int width, double percentile) {
    local_maxima(maps, out, height, width, percentile);
}

// `scratch`: two bit maps an image.
extern "C" __global__ void __launch_bounds__(1024, 1)
    dilate(const bool* masks, bool* out, u32* scratch, int height, int width, int radius) {
    const int words = (width + 31) / 32;
    const long long offset = (long long)blockIdx.x * height * width;
    const bool* mask = masks + offset;
    u32* bits = scratch + (long long)blockIdx.x * 2 * height * words;
    fill_bits(
        bits, height, width, [=](int row, int col) { return mask[row * width + col]; },
        [](int, int, bool set) { return set; });
    bits = dilate_bits(bits, bits + height * words, height, width, radius);
    spread_bits(bits, height, width, out + offset);
}
