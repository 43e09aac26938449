// The problem that `svm.cu` solves: its samples, their losses, and what Newton's method asks of them. One block an
// image.
#pragma once
#include "device.cuh"

namespace ttt4as {

#define STENCIL 9
#define PIXEL_DOUBLES 5  // that are kept of a labelled pixel,
#define CELL_DOUBLES 10  // and of a cell
#define GATHERERS 16     // threads that share a cell

// One a block, in shared memory: registers are few. A function with loops takes it by value, and so holds the fields
// that it uses, and no others, for as long as it runs.
struct Problem {
    const float* gram;             // (m, ld), null where products go through `basis`
    const unsigned short* coarse;  // (m, padded(m)), of a K that is not in shared memory itself; null: there is none
    float unit;                    // K is unit * (coarse - 32768), nearly
    const float* basis;            // (m, dim)
    double* through;               // (dim) scratch of products through `basis`
    double* vectors;               // VECTORS times padded(m), those of `solve`
    int ld, dim, m, n_points, n_pixels, n_cells;
    bool gram_shared, small;  // small: a thread can keep its part of K in registers
    int sharers;              // threads that share rows of a K in shared memory
    // the map: labels, the labelled pixels, the cells that they look at and the places of all cells among those
    const signed char* labels;
    const int *pixels, *cells, *slot;
    const int *row_lower, *row_start, *col_lower, *col_start;
    const float *row_weight, *col_weight;
    int width, h, w;
    bool own_points;
    // points
    const signed char* point_sign;  // null: all -1
    const double* point_scale;      // null: all 1
    // losses: alpha = clip(slope * margin, 0, cap), scaled for points by point_scale
    double C, slope, cap, inverse;  // inverse: 1 / slope
    bool hinge;
    // what is kept of labelled pixels and of cells, in shared memory where it fits, and lists that are made once
    double *by_pixel, *by_cell;
    int *members, *places;

    // Of labelled pixels, in their order: decision, its change, weights of the lower row and the right column, twice
    // the cell above and left, plus 1 for an anomalous one, and what `linearise` finds of each: loss'' and alpha y.
    __device__ double& f(int i) const { return by_pixel[i]; }
    __device__ double& fd(int i) const { return by_pixel[n_pixels + i]; }
    __device__ float2& weight(int i) const { return reinterpret_cast<float2*>(by_pixel + 2ll * n_pixels)[i]; }
    __device__ int& corner(int i) const { return reinterpret_cast<int*>(by_pixel + 3ll * n_pixels)[i]; }
    __device__ double sign(int i) const { return corner(i) & 1 ? 1 : -1; }
    __device__ float& curvature(int i) const {
        return reinterpret_cast<float*>(by_pixel + 3ll * n_pixels)[n_pixels + i];
    }
    __device__ double& pull(int i) const { return by_pixel[4ll * n_pixels + i]; }
    // The pixels that look at each cell, between the bounds of a cell: four a pixel at most.
    __device__ int& member(int k) const { return members[k]; }
    // Of cells, in their order: a row of N (in float32: a direction needs no more), the cells around it (itself for one
    // that no pixel looks at, whose entry of N is 0, so that no branch holds up a load), and its bounds.
    __device__ float* stencil(int i) const { return reinterpret_cast<float*>(by_cell) + (long long)STENCIL * i; }
    __device__ int* neighbour(int i) const {
        return reinterpret_cast<int*>(by_cell) + (long long)STENCIL * n_cells + (long long)STENCIL * i;
    }
    __device__ int2& bounds(int i) const { return reinterpret_cast<int2*>(by_cell + (long long)STENCIL * n_cells)[i]; }
};

__device__ inline double point_sign(const Problem& p, int i) { return p.point_sign ? p.point_sign[i] : -1; }
__device__ inline double point_scale(const Problem& p, int i) { return p.point_scale ? p.point_scale[i] : 1; }

// The pixels around a cell, `across` a row.
struct Window {
    int top, left, across, size;
};
__device__ inline Window window_of(const Problem& p, int cell) {
    const int cy = cell / p.w, cx = cell % p.w;
    Window window;
    window.top = p.row_start[cy > 0 ? cy - 1 : 0];
    window.left = p.col_start[cx > 0 ? cx - 1 : 0];
    window.across = p.col_start[cx + 1] - window.left;
    window.size = (p.row_start[cy + 1] - window.top) * window.across;
    return window;
}

// Fill in what the arrays of pixels and cells hold for good. A cell's members are in the order of the pixels, so that
// every sum over them has one order, whatever the block and the batch.
__device__ inline void arrange(const Problem p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int i = threadIdx.x; i < p.n_pixels; i += blockDim.x) {
        const int pixel = p.pixels[i], row = pixel / p.width, col = pixel % p.width;
        p.weight(i) = float2{p.row_weight[row], p.col_weight[col]};
        p.corner(i) = 2 * (p.row_lower[row] * p.w + p.col_lower[col]) + (p.labels[pixel] > 0);
        p.places[pixel] = i;
    }
    int before = 0;
    for (int first = 0; first < p.n_cells; first += blockDim.x) {
        const int i = first + threadIdx.x;
        int all;
        const int start = before + block_scan(i < p.n_cells ? window_of(p, p.cells[i]).size : 0, all);
        if (i < p.n_cells) {
            p.bounds(i).x = start;
            const int cy = p.cells[i] / p.w, cx = p.cells[i] % p.w;
            for (int k = 0; k < STENCIL; ++k) {
                const int y = cy + k / 3 - 1, x = cx + k % 3 - 1;
                const int other = y < 0 || y >= p.h || x < 0 || x >= p.w ? -1 : p.slot[y * p.w + x];
                p.neighbour(i)[k] = other < 0 ? i : other;
            }
        }
        before += all;
    }
    __syncthreads();
    for (int i = warp; i < p.n_cells; i += warps) {
        const int cy = p.cells[i] / p.w, cx = p.cells[i] % p.w;
        const Window window = window_of(p, p.cells[i]);
        int end = p.bounds(i).x;
        for (int first = 0; first < window.size; first += 32) {
            const int k = first + lane;
            int pixel = 0;
            bool looks = false;
            if (k < window.size) {
                const int row = window.top + k / window.across, col = window.left + k % window.across;
                pixel = row * p.width + col;
                const int label = p.labels[pixel];
                // A pixel between this cell and the next looks at this one unless it lies on the next.
                // No branch, so that all five loads are under way at once.
                looks = (label > 0 || (label < 0 && !p.own_points)) &
                        ((p.row_lower[row] == cy) | (p.row_weight[row] > 0)) &
                        ((p.col_lower[col] == cx) | (p.col_weight[col] > 0));
            }
            const u32 ballot = __ballot_sync(FULL_WARP, looks);
            if (looks) p.member(end + __popc(ballot & ((1u << lane) - 1))) = p.places[pixel];
            end += __popc(ballot);
        }
        if (lane == 0) p.bounds(i).y = end;
    }
    __syncthreads();
}

// The blend of a labelled pixel.
__device__ inline double blend(const Problem& p, const double* z, int i) {
    const double dy = p.weight(i).x, dx = p.weight(i).y;
    const int* slot = p.slot + (p.corner(i) >> 1);
    z += p.n_points;
    // A cell with no weight need not exist; one with weight does.
    double top = 0, bottom = 0;
    if (dx < 1) top = (1 - dx) * z[slot[0]];
    if (dx > 0) top += dx * z[slot[1]];
    if (dy > 0) {
        bottom = (1 - dx) * z[slot[p.w]];
        if (dx > 0) bottom += dx * z[slot[p.w + 1]];
    }
    return (1 - dy) * top + dy * bottom;
}

// Its loss smoothed and true, alpha, alpha's conjugate and the curvature of one sample.
struct Sample {
    double smooth, loss, alpha, conjugate, curvature;
};
__device__ inline double clip(double x, double high) { return x < 0 ? 0 : (x > high ? high : x); }
__device__ inline Sample sample(const Problem& p, double margin, double scale) {
    const double slope = p.slope * scale, cap = p.cap * scale, linear = slope * margin;
    Sample s;
    s.alpha = clip(linear, cap);
    s.curvature = margin > 0 && linear < cap ? slope : 0;
    // alpha^2 / (2 slope), without a division where one can be spared
    const double positive = margin > 0 ? margin : 0;
    s.conjugate = 0.5 * s.alpha * positive;
    if (linear >= cap && slope > 0) s.conjugate = 0.5 * cap * cap * (scale == 1 ? p.inverse : p.inverse / scale);
    s.smooth = s.alpha * positive - s.conjugate;
    s.loss = p.hinge ? p.C * scale * positive : s.smooth;
    return s;
}

// At the decisions z of the basis: f at the pixels; A^T (alpha y) into `force`, N into `diagonal` and the stencil, and
// the sums {smoothed loss, true loss, sum of alpha, sum of conjugates}. A cell gathers from its members, so that no
// atomic and no batch decides a sum.
__device__ inline void linearise(const Problem p, const double* z, double* force, double* diagonal, double (&sums)[4]) {
    for (int i = 0; i < 4; ++i) sums[i] = 0;
    for (int i = threadIdx.x; i < p.n_points; i += blockDim.x) {
        const double y = point_sign(p, i);
        const Sample s = sample(p, 1 - y * z[i], point_scale(p, i));
        force[i] = s.alpha * y;
        diagonal[i] = s.curvature;
        sums[0] += s.smooth, sums[1] += s.loss, sums[2] += s.alpha, sums[3] += s.conjugate;
    }
    for (int i = threadIdx.x; i < p.n_pixels; i += blockDim.x) {
        const double f = blend(p, z, i);
        p.f(i) = f;
        const double y = p.sign(i);
        const Sample s = sample(p, 1 - y * f, 1);
        p.curvature(i) = float(s.curvature);
        p.pull(i) = s.alpha * y;
        sums[0] += s.smooth, sums[1] += s.loss, sums[2] += s.alpha, sums[3] += s.conjugate;
    }
    __syncthreads();
    const int part = threadIdx.x % GATHERERS, cells = blockDim.x / GATHERERS;
    for (int first = 0; first < p.n_cells; first += cells) {
        const int i = first + threadIdx.x / GATHERERS;
        double pull = 0;
        float around[STENCIL] = {};
        if (i < p.n_cells) {
            const int cell = p.cells[i];
            const int2 bounds = p.bounds(i);
#pragma unroll 4  // loads under way
            for (int k = bounds.x + part; k < bounds.y; k += GATHERERS) {
                const int pixel = p.member(k);
                const float dy = p.weight(pixel).x, dx = p.weight(pixel).y;
                // Which of the pixel's four cells this is; its other row lies above or below, its other column left
                // or right.
                const int from = cell - (p.corner(pixel) >> 1);
                const bool lower = from >= p.w, right = (lower ? from - p.w : from) == 1;
                pull += (lower ? double(dy) : 1 - double(dy)) * (right ? double(dx) : 1 - double(dx)) * p.pull(pixel);
                const float own_y = lower ? dy : 1 - dy, y0 = lower ? 1 - dy : 0, y2 = lower ? 0 : dy;
                const float own_x = right ? dx : 1 - dx, x0 = right ? 1 - dx : 0, x2 = right ? 0 : dx;
                const float weight = own_y * own_x * p.curvature(pixel);
                around[0] += weight * (y0 * x0), around[1] += weight * (y0 * own_x), around[2] += weight * (y0 * x2);
                around[3] += weight * (own_y * x0), around[4] += weight * (own_y * own_x);
                around[5] += weight * (own_y * x2);
                around[6] += weight * (y2 * x0), around[7] += weight * (y2 * own_x), around[8] += weight * (y2 * x2);
            }
        }
        for (int distance = GATHERERS / 2; distance; distance >>= 1) {
            pull += __shfl_xor_sync(FULL_WARP, pull, distance);
            for (int k = 0; k < STENCIL; ++k) around[k] += __shfl_xor_sync(FULL_WARP, around[k], distance);
        }
        if (i < p.n_cells && part == 0) {
            force[p.n_points + i] = pull;
            for (int k = 0; k < STENCIL; ++k) p.stencil(i)[k] = around[k];
        }
    }
    block_sum(sums);
}

// Entry i of N q.
template <typename V>
__device__ V curved(const Problem& p, const double* diagonal, const V* q, int i) {
    if (i < p.n_points) return V(diagonal[i]) * q[i];
    const float* stencil = p.stencil(i - p.n_points);
    const int* neighbour = p.neighbour(i - p.n_points);
    V sum = 0;
#pragma unroll(sizeof(V) == 4 ? 9 : 3)  // loads under way, as many as there are registers for
    for (int k = 0; k < STENCIL; ++k) sum += V(stencil[k]) * q[p.n_points + neighbour[k]];
    return sum;
}

// Slope and curvature of the losses at step t along the direction whose change of decision is fd (pixels) and kx
// (points).
__device__ inline void along(const Problem p, const double* z, const double* kx, double t, double (&sums)[2]) {
    sums[0] = sums[1] = 0;
    for (int i = threadIdx.x; i < p.n_points + p.n_pixels; i += blockDim.x) {
        double y, f, change, scale = 1;
        if (i < p.n_points) {
            y = point_sign(p, i), f = z[i], change = kx[i], scale = point_scale(p, i);
        } else {
            const int pixel = i - p.n_points;
            y = p.sign(pixel), f = p.f(pixel), change = p.fd(pixel);
        }
        const Sample s = sample(p, 1 - y * (f + t * change), scale);
        sums[0] -= s.alpha * y * change;
        sums[1] += s.curvature * change * change;
    }
    block_sum(sums);
}

}  // namespace ttt4as
