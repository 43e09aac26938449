// K = U U^T + 1 of each image of a batch: basis vectors' products, in float32 on ordinary cores. (On tensor cores a sum
// of 1024 non-negative products is truncated, always downwards; the gap of `svm.cu` is to hold for the features given.)
#include "device.cuh"

using namespace ttt4as;

#define MOST_THREADS 512
// A block computes TILE rows and columns of K at a time, a thread of it ROWS rows, 8 apart, by COLS columns, 4 apart.
#define TILE 32
#define ROWS 4
#define COLS 8
// Their vectors come to shared memory CHUNK float4 at a time, in rows of PITCH, which lie in different banks. Of STAGES
// chunks all but one are under way while that one is used.
#define CHUNK 16
#define PITCH (CHUNK + 1)
#define STAGES 5

// One tile's vectors from channel `first` on into shared memory, zeros beyond m and dim; without waiting.
__device__ void fetch(float4 (*to)[PITCH], const float* basis, int row, int m, int dim, int first) {
    const bool whole = dim % 4 == 0 && reinterpret_cast<u64>(basis) % 16 == 0;  // so is where every vector starts
    for (int i = threadIdx.x; i < TILE * CHUNK; i += blockDim.x) {
        const int r = row + i / CHUNK, c = first + 4 * (i % CHUNK);
        const float* from = basis + (long long)r * dim + c;
        float4& place = to[i / CHUNK][i % CHUNK];
        if (whole) {
            const bool exists = r < m && c < dim;
            copy_async(&place, exists ? from : basis, exists);
        } else {
            float x[4];
            for (int k = 0; k < 4; ++k) x[k] = r < m && c + k < dim ? from[k] : 0;
            place = float4{x[0], x[1], x[2], x[3]};
        }
    }
}

// basis     (B, rows, dim): m vectors of each image, counts[b][0] + counts[b][2]
// gram      (B, capacity, capacity), capacity a multiple of 16: K, and zeros from m to the next multiple of 16; nothing
//           is written for an image that is not trained (status) or has more than `capacity` vectors
// Shared memory: STAGES * 2 * TILE * PITCH float4, and TILE * (TILE + 1) floats a warp, whichever is more.
// A tile is one block's: each warp sums a share of the channels, and the shares are added in the warps' order.
// Costs m^2 dim / 2 multiplications and reads the vectors m / (2 TILE) times, mostly from the L2.
// `programs` blocks share an image's tiles on or below the diagonal; what is above is mirrored.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    gram(const float* basis, float* gram, const int* counts, const int* status, int rows, int dim, int capacity,
         int programs) {
    DYNAMIC_SHARED(float4, shared);  // chunks of two times TILE vectors; later the warps' sums
    float4(*const vectors)[PITCH] = reinterpret_cast<float4(*)[PITCH]>(shared);
    const int image = blockIdx.x / programs, m = counts[image * 3] + counts[image * 3 + 2];
    if (status[image] != 0 || m > capacity) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int own_row = lane / 4, own_col = lane % 4, end = (m + 15) / 16 * 16;
    const int across = (m + TILE - 1) / TILE;
    basis += (long long)image * rows * dim;
    gram += (long long)image * capacity * capacity;
    for (int tile = blockIdx.x % programs; tile < across * (across + 1) / 2; tile += programs) {
        int i = 0, j = tile;
        while (j > i) j -= ++i;
        float sums[ROWS][COLS] = {};
        __syncthreads();  // the sums of the tile before have been read
        const int chunks = (dim + 4 * CHUNK - 1) / (4 * CHUNK);
        const auto bring = [&](int chunk) {
            float4(*const to)[PITCH] = vectors + chunk % STAGES * 2 * TILE;
            if (chunk < chunks) {
                fetch(to, basis, i * TILE, m, dim, chunk * 4 * CHUNK);
                fetch(to + TILE, basis, j * TILE, m, dim, chunk * 4 * CHUNK);
            }
            copies_end_group();
        };
        for (int chunk = 0; chunk < STAGES - 1; ++chunk) bring(chunk);
        for (int chunk = 0; chunk < chunks; ++chunk) {
            copies_wait<STAGES - 2>();
            __syncthreads();  // this chunk is there, and nobody reads the one before
            bring(chunk + STAGES - 1);
            const float4(*const a)[PITCH] = vectors + chunk % STAGES * 2 * TILE + own_row;
            const float4(*const b)[PITCH] = a - own_row + TILE + own_col;
            for (int k = warp; k < CHUNK; k += warps) {
                float4 x[ROWS], y[COLS];  // all loads before the first use: few warps hide little
                for (int r = 0; r < ROWS; ++r) x[r] = a[8 * r][k];
                for (int c = 0; c < COLS; ++c) y[c] = b[4 * c][k];
                for (int c = 0; c < COLS; ++c)
                    for (int r = 0; r < ROWS; ++r) sums[r][c] += x[r].x * y[c].x;
                for (int c = 0; c < COLS; ++c)
                    for (int r = 0; r < ROWS; ++r) sums[r][c] += x[r].y * y[c].y;
                for (int c = 0; c < COLS; ++c)
                    for (int r = 0; r < ROWS; ++r) sums[r][c] += x[r].z * y[c].z;
                for (int c = 0; c < COLS; ++c)
                    for (int r = 0; r < ROWS; ++r) sums[r][c] += x[r].w * y[c].w;
            }
        }
        __syncthreads();
        float* const shares = reinterpret_cast<float*>(shared);
        const int pitch = TILE + 1, size = TILE * pitch;
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLS; ++c)
                shares[warp * size + (own_row + 8 * r) * pitch + own_col + 4 * c] = sums[r][c];
        __syncthreads();
        for (int k = threadIdx.x; k < TILE * TILE; k += blockDim.x) {
            const int r = k / TILE, c = k % TILE, row = i * TILE + r, col = j * TILE + c;
            float* const share = shares + r * pitch + c;
            float sum = 0;
            for (int w = 0; w < warps; ++w) sum += share[w * size];
            sum = row < m && col < m ? sum + 1 : 0;
            if (row < end && col < end) gram[(long long)row * capacity + col] = sum;
            *share = sum;
        }
        __syncthreads();
        for (int k = threadIdx.x; k < TILE * TILE; k += blockDim.x) {
            const int c = k / TILE, r = k % TILE, row = i * TILE + r, col = j * TILE + c;
            if (i != j && row < end && col < end) gram[(long long)col * capacity + row] = shares[r * pitch + c];
        }
    }
}
