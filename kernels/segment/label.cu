// Pseudo-labels of one map by one block, and what the solver needs of them: the nominal samples in the order they are
// taken, the labelled pixels, and the feature cells that those look at.
#include "peaks.cuh"

using namespace ttt4as;

// The cells of a bilinear upsampling along one axis: see gpu_common/geometry.py.
struct Axis {
    const int* lower;
    const float* weight;
    int cells;
};

__device__ void touch(int* slot, const Axis& rows, const Axis& cols, int row, int col) {
    const int top = rows.lower[row], left = cols.lower[col];
    const bool down = rows.weight[row] > 0, right = cols.weight[col] > 0;
    // A weight below 1 touches the lower cell, one above 0 the upper.
    int* cell = slot + top * cols.cells + left;
    ALL_STORE(cell[0], 1);
    if (right) ALL_STORE(cell[1], 1);
    if (down) ALL_STORE(cell[cols.cells], 1);
    if (down && right) ALL_STORE(cell[cols.cells + 1], 1);
}

// labels      (B, H, W) 1 anomalous, -1 nominal, 0 neither
// status      (B,)
// counts      (B, 3) points, labelled pixels that are not points, and cells
// points      (B, limit) pixels of the nominal samples, in order; counts[b][0] of them
// cells       (B, h * w) cells that the labelled pixels look at which are not points, ascending; counts[b][2] of them
// slot        (B, h * w) the place of a cell in `cells`, or -1
// scratch     (B, 2, H * ceil(W / 32)) bits, null where they fit in the shared memory that the launch asks for
// With own_points the nominal samples are points; without, they are pixels like the anomalous ones.
template <typename T>
__device__ void label(const T* maps, const bool* skip, const int* candidates, signed char* labels, int* status,
                      int* points, int* cells, int* slot, int* counts, u32* scratch, Axis rows, Axis cols, int height,
                      int width, int n_candidates, int limit, int radius, int own_points, double percentile) {
    const int image = blockIdx.x, n = height * width, words = (width + 31) / 32, n_cells = rows.cells * cols.cells;
    const T* map = maps + (long long)image * n;
    labels += (long long)image * n;
    points += (long long)image * limit;
    cells += (long long)image * n_cells;
    slot += (long long)image * n_cells;
    counts += image * 3;
    DYNAMIC_SHARED(u32, shared);
    u32* const bits = scratch == nullptr ? shared : scratch + (long long)image * 2 * height * words;

    const bool gated = skip != nullptr && skip[image];
    const Range<T> range = range_of(map, n);
    if (gated || !range.finite) {
        for (int i = threadIdx.x; i < n; i += blockDim.x) labels[i] = 0;
        if (threadIdx.x < 3) counts[threadIdx.x] = 0;
        if (threadIdx.x == 0) status[image] = range.finite ? NOMINAL : NON_FINITE;
        return;
    }
    for (int i = threadIdx.x; i < height * words; i += blockDim.x) bits[i] = 0;
    const Percentile<T> found = percentile_of(map, n, percentile, range);  // threads meet in it
    each_peak(map, height, width, found,
              [=](int row, int col) { atomicOr(&bits[row * words + (col >> 5)], 1u << (col & 31)); });
    __syncthreads();
    u32* const listed = dilate_bits(bits, bits + height * words, height, width, radius);
    spread_bits(listed, height, width, labels);
    int n_anomalous = 0;
    for (int i = threadIdx.x; i < height * words; i += blockDim.x) n_anomalous += __popc(listed[i]);
    n_anomalous = block_reduce(n_anomalous, Add());
    for (int i = threadIdx.x; i < n_cells; i += blockDim.x) slot[i] = 0;
    __syncthreads();

    int n_points = 0;
    for (int first = 0; first < n_candidates && n_points < limit; first += blockDim.x) {
        const int i = first + threadIdx.x;
        const int pixel = i < n_candidates ? candidates[i] : 0;
        const bool free = i < n_candidates && !bit_at(listed, words, pixel / width, pixel % width);
        int taken;
        const int place = n_points + block_scan(free, taken);
        if (free && place < limit) {
            points[place] = pixel;
            labels[pixel] = -1;
        }
        n_points = n_points + taken < limit ? n_points + taken : limit;
    }
    __syncthreads();

    if (!own_points) {
        for (int i = threadIdx.x; i < n_points; i += blockDim.x) {
            const int row = points[i] / width, col = points[i] % width;
            atomicOr(&listed[row * words + (col >> 5)], 1u << (col & 31));
        }
        __syncthreads();
    }

    // A lane looks at a word; where one has pixels, all lanes of the warp take one each.
    const int lane = threadIdx.x & 31;
    for (int first = threadIdx.x - lane; first < height * words; first += blockDim.x) {
        const u32 own = first + lane < height * words ? listed[first + lane] : 0;
        for (u32 rest = __ballot_sync(FULL_WARP, own != 0); rest; rest &= rest - 1) {
            const int from = __ffs(int(rest)) - 1, i = first + from;
            const u32 word = __shfl_sync(FULL_WARP, own, from);
            if (word >> lane & 1u) touch(slot, rows, cols, i / words, i % words * 32 + lane);
        }
    }
    __syncthreads();

    int used = 0;
    for (int first = 0; first < n_cells; first += blockDim.x) {
        const int cell = first + threadIdx.x;
        const bool touched = cell < n_cells && slot[cell] != 0;
        int all;
        const int place = used + block_scan(touched, all);
        if (touched) cells[place] = cell;
        if (cell < n_cells) slot[cell] = touched ? place : -1;
        used += all;
    }
    if (threadIdx.x == 0) {
        counts[0] = own_points ? n_points : 0;
        counts[1] = own_points ? n_anomalous : n_anomalous + n_points;
        counts[2] = used;
        const bool constant = range.lowest == range.highest;
        status[image] = constant || n_anomalous == 0 || n_points == 0 ? DEGENERATE : OK;
    }
}

#define LABEL_KERNEL(name, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(1024, 1)                                                           \
        name(const T* maps, const bool* skip, const int* candidates, signed char* labels, int* status, int* points, \
             int* cells, int* slot, int* counts, u32* scratch, const int* row_lower, const float* row_weight,       \
             const int* col_lower, const float* col_weight, int height, int width, int h, int w, int n_candidates,  \
             int limit, int radius, int own_points, double percentile) {                                            \
        label(maps, skip, candidates, labels, status, points, cells, slot, counts, scratch,                         \
              Axis{row_lower, row_weight, h}, Axis{col_lower, col_weight, w}, height, width, n_candidates, limit,   \
              radius, own_points, percentile);                                                                      \
    }

LABEL_KERNEL(label_f32, float)
LABEL_KERNEL(label_f64, double)
