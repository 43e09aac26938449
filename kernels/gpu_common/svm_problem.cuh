// The problem that `svm.cu` solves: its samples, their losses, and what Newton's method asks of them. One block an
// image.
#pragma once
#include "device.cuh"

namespace ttt4as {

#define VECTORS 12
#define PAD 16  // vectors, and rows and columns of K, are padded with zeros to a multiple of this
#define STENCIL 9
#define MOMENTS 9
#define PIXEL_DOUBLES 5  // that are kept of a labelled pixel,
#define CELL_DOUBLES 12  // and of a cell
#define GATHERERS 16     // threads that share a patch at most, and ever fewer where there are many: 4 at least

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
    // the map: labels, the cells that the labelled pixels look at and the places of all cells among those
    const signed char* labels;
    const int *cells, *slot;
    const int *row_start, *col_start;
    const float *row_weight, *col_weight;
    int width, h, w;
    bool own_points;
    // points
    const signed char* point_sign;  // null: all -1
    const double* point_scale;      // null: all 1
    // losses: alpha = clip(slope * margin, 0, cap), scaled for points by point_scale
    double C, slope, cap, inverse;  // inverse: 1 / slope
    bool hinge;
    // what is kept of labelled pixels and of cells, in shared memory where it fits
    double *by_pixel, *by_cell;

    // Of labelled pixels: decision, its change, weights of the lower row and the right column, twice the patch, plus 1
    // for an anomalous one, and what `linearise` finds of each: loss'' and alpha y. A patch is the pixels between four
    // cells; it has the number of the cell above and left, and its pixels lie beside each other.
    __device__ double& f(int i) const { return by_pixel[i]; }
    __device__ double& fd(int i) const { return by_pixel[n_pixels + i]; }
    __device__ float2& weight(int i) const { return reinterpret_cast<float2*>(by_pixel + 2ll * n_pixels)[i]; }
    __device__ int& patch(int i) const { return reinterpret_cast<int*>(by_pixel + 3ll * n_pixels)[i]; }
    __device__ double sign(int i) const { return patch(i) & 1 ? 1 : -1; }
    __device__ float& curvature(int i) const {
        return reinterpret_cast<float*>(by_pixel + 3ll * n_pixels)[n_pixels + i];
    }
    __device__ double& pull(int i) const { return by_pixel[4ll * n_pixels + i]; }
    // Of cells, in their order: a row of N (in float32: a direction needs no more), the cells around it (itself for one
    // that no pixel looks at, whose entry of N is 0, so that no branch holds up a load), the bounds of its patch among
    // the pixels, and the patch's cells: above, then below, left and right (itself for one of no weight).
    __device__ float* stencil(int i) const { return reinterpret_cast<float*>(by_cell) + (long long)STENCIL * i; }
    __device__ int* neighbour(int i) const {
        return reinterpret_cast<int*>(by_cell) + (long long)STENCIL * n_cells + (long long)STENCIL * i;
    }
    __device__ int2& bounds(int i) const { return reinterpret_cast<int2*>(by_cell + (long long)STENCIL * n_cells)[i]; }
    __device__ int2* corners(int i) const {
        return reinterpret_cast<int2*>(by_cell + (long long)(STENCIL + 1) * n_cells) + 2 * i;
    }
};

// SHARED: vectors, pixels and cells are all in shared memory, which the compiler may know: addresses are shorter, and
// loads sooner there.
template <bool SHARED>
__device__ void assume_shared(const Problem& p) {
    if (SHARED) __builtin_assume(__isShared(p.by_pixel) && __isShared(p.by_cell));
}

__device__ inline int padded(int m) { return (m + PAD - 1) / PAD * PAD; }

// What `solve` keeps in p.vectors: coefficients, decisions, the residual of the Newton system and a direction, each of
// these two before its product with K, N of the points, and room for five more.
struct Vectors {
    double *beta, *z, *r, *kr, *x, *kx, *diagonal, *work;
};
template <bool SHARED>
__device__ Vectors vectors_of(const Problem& p) {
    const int length = padded(p.m);
    double* const beta = p.vectors;
    if (SHARED) __builtin_assume(__isShared(beta));
    double *r = beta + 2 * length, *x = r + 2 * length, *diagonal = x + 2 * length;
    return Vectors{beta, beta + length, r, r + length, x, x + length, diagonal, diagonal + length};
}

__device__ inline double point_sign(const Problem& p, int i) { return p.point_sign ? p.point_sign[i] : -1; }
__device__ inline double point_scale(const Problem& p, int i) { return p.point_scale ? p.point_scale[i] : 1; }

// A patch on the map, `across` pixels a row.
struct Window {
    int top, left, across, size;
};
__device__ inline Window window_of(const Problem& p, int cell) {
    const int cy = cell / p.w, cx = cell % p.w;
    Window window;
    window.top = p.row_start[cy];
    window.left = p.col_start[cx];
    window.across = p.col_start[cx + 1] - window.left;
    window.size = (p.row_start[cy + 1] - window.top) * window.across;
    return window;
}

// Pixel k of a window: its place, and its label if it is a sample that no point stands for, else 0.
struct Labelled {
    int row, col, label;
};
__device__ inline Labelled labelled(const Problem& p, const Window& window, int k) {
    if (k >= window.size) return Labelled{0, 0, 0};
    const int row = window.top + k / window.across, col = window.left + k % window.across;
    const int label = p.labels[row * p.width + col];
    return Labelled{row, col, label > 0 || !p.own_points ? label : 0};
}

// Fill in what the arrays of pixels and cells hold for good. A patch's pixels are in their order, so that every sum
// over them has one order, whatever the block and the batch.
template <bool SHARED>
__device__ void arrange(const Problem p) {
    assume_shared<SHARED>(p);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int i = warp; i < p.n_cells; i += warps) {
        const Window window = window_of(p, p.cells[i]);
        int count = 0;
        for (int first = 0; first < window.size; first += 32)
            count += __popc(__ballot_sync(FULL_WARP, labelled(p, window, first + lane).label != 0));
        if (lane == 0) p.bounds(i).y = count;
    }
    __syncthreads();
    int before = 0;
    for (int first = 0; first < p.n_cells; first += blockDim.x) {
        const int i = first + threadIdx.x, count = i < p.n_cells ? p.bounds(i).y : 0;
        int all;
        const int start = before + block_scan(count, all);
        if (i < p.n_cells) {
            p.bounds(i) = int2{start, start + count};
            const int cy = p.cells[i] / p.w, cx = p.cells[i] % p.w;
            for (int k = 0; k < STENCIL; ++k) {
                const int y = cy + k / 3 - 1, x = cx + k % 3 - 1;
                const int other = y < 0 || y >= p.h || x < 0 || x >= p.w ? -1 : p.slot[y * p.w + x];
                p.neighbour(i)[k] = other < 0 ? i : other;
            }
            p.corners(i)[0] = int2{i, p.neighbour(i)[5]};
            p.corners(i)[1] = int2{p.neighbour(i)[7], p.neighbour(i)[8]};
        }
        before += all;
    }
    __syncthreads();
    for (int i = warp; i < p.n_cells; i += warps) {
        const Window window = window_of(p, p.cells[i]);
        int end = p.bounds(i).x;
        for (int first = 0; first < window.size; first += 32) {
            const Labelled found = labelled(p, window, first + lane);
            const u32 ballot = __ballot_sync(FULL_WARP, found.label != 0);
            if (found.label) {
                const int pixel = end + __popc(ballot & ((1u << lane) - 1));
                p.weight(pixel) = float2{p.row_weight[found.row], p.col_weight[found.col]};
                p.patch(pixel) = 2 * i + (found.label > 0);
            }
            end += __popc(ballot);
        }
    }
    __syncthreads();
}

// The blend of a labelled pixel. A cell of no weight may be any: decisions are finite, or the problem is given up.
__device__ inline double blend(const Problem& p, const double* z, int i) {
    const double dy = p.weight(i).x, dx = p.weight(i).y;
    const int2* corners = p.corners(p.patch(i) >> 1);
    const int2 above = corners[0], below = corners[1];
    z += p.n_points;
    const double top = (1 - dx) * z[above.x] + dx * z[above.y], bottom = (1 - dx) * z[below.x] + dx * z[below.y];
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

// At the decisions z of the basis: f at the pixels; A^T (alpha y) into r, N into `diagonal` and the stencil, and the
// sums {smoothed loss, true loss, sum of alpha, sum of conjugates}.
//
// N and A^T (alpha y) are sums over pixels of curvature or pull times weights of two cells or of one, which are
// products of a weight along the rows and one along the columns. A patch therefore sums 9 moments of the curvature,
// {above^2, above below, below^2} times the like across, and 4 of the pull; a cell puts together those of the four
// patches around it. No atomic and no batch decides a sum, and N is symmetric to the bit.
template <bool SHARED>
__device__ void linearise(const Problem p, const Vectors v, double (&sums)[4]) {
    assume_shared<SHARED>(p);
    for (int i = 0; i < 4; ++i) sums[i] = 0;
    for (int i = threadIdx.x; i < p.n_points; i += blockDim.x) {
        const double y = point_sign(p, i);
        const Sample s = sample(p, 1 - y * v.z[i], point_scale(p, i));
        v.r[i] = s.alpha * y;
        v.diagonal[i] = s.curvature;
        sums[0] += s.smooth, sums[1] += s.loss, sums[2] += s.alpha, sums[3] += s.conjugate;
    }
    for (int i = threadIdx.x; i < p.n_pixels; i += blockDim.x) {
        const double f = blend(p, v.z, i);
        p.f(i) = f;
        const double y = p.sign(i);
        const Sample s = sample(p, 1 - y * f, 1);
        p.curvature(i) = float(s.curvature);
        p.pull(i) = s.alpha * y;
        sums[0] += s.smooth, sums[1] += s.loss, sums[2] += s.alpha, sums[3] += s.conjugate;
    }
    __syncthreads();
    // Of patch i: its moments, and its pulls above left, above right, below left and below right. They take the places
    // of what is of the direction and the product to come; `diagonal` is of points alone.
    float* const moments = reinterpret_cast<float*>(v.work);
    const auto pulls = [&](int k) { return (k < 2 ? (k ? v.x : v.kr) : (k == 2 ? v.kx : v.diagonal)) + p.n_points; };
    u32 gatherers = GATHERERS;
    while (gatherers > 4 && gatherers * p.n_cells > blockDim.x) gatherers /= 2;
    const u32 part = threadIdx.x & (gatherers - 1), shift = __popc(gatherers - 1), patches = blockDim.x >> shift;
    const int own = own_of_sums<4>(part, gatherers);
    for (int first = 0; first < p.n_cells; first += patches) {
        const int i = first + (threadIdx.x >> shift);
        const int2 bounds = i < p.n_cells ? p.bounds(i) : int2{0, 0};
        // One after the other: registers are few, and each loop has loads under way.
        float moment[2][4] = {}, last[1] = {};
#pragma unroll 2
        for (int pixel = bounds.x + part; pixel < bounds.y; pixel += gatherers) {
            const float dy = p.weight(pixel).x, dx = p.weight(pixel).y, curvature = p.curvature(pixel);
            const float above = 1 - dy, left = 1 - dx;
            const float down[3] = {curvature * (above * above), curvature * (above * dy), curvature * (dy * dy)};
            const float across[3] = {left * left, left * dx, dx * dx};
            for (int k = 0; k < MOMENTS - 1; ++k) moment[k / 4][k % 4] += down[k / 3] * across[k % 3];
            last[0] += down[2] * across[2];
        }
        double pull[4] = {};
#pragma unroll 2
        for (int pixel = bounds.x + part; pixel < bounds.y; pixel += gatherers) {
            const double below = p.weight(pixel).x, right = p.weight(pixel).y, force = p.pull(pixel);
            const double upper = force * (1 - below), lower = force * below;
            pull[0] += upper * (1 - right), pull[1] += upper * right;
            pull[2] += lower * (1 - right), pull[3] += lower * right;
        }
        const float low = one_of_sums(moment[0], part, gatherers), high = one_of_sums(moment[1], part, gatherers);
        const float highest = one_of_sums(last, part, gatherers);
        const double pulled = one_of_sums(pull, part, gatherers);
        if (i < p.n_cells && own < 4) {
            pulls(own)[i] = pulled;
            moments[MOMENTS * i + own] = low;
            moments[MOMENTS * i + 4 + own] = high;
            if (own == 0) moments[MOMENTS * i + 8] = highest;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.n_cells; i += blockDim.x) {
        const int* const around = p.neighbour(i);
        float row[STENCIL] = {};
        double pull = 0;
        for (int which = 0; which < 4; ++which) {               // the patch above and left, above, left, its own
            const int below = which < 2, right = !(which & 1);  // where the cell is in it
            const int patch = around[(below ? 0 : 3) + (right ? 0 : 1)];
            const bool exists = which == 3 || patch != i;
            for (int k = 0; k < 4; ++k) {  // the cells of the patch
                const float moment = moments[MOMENTS * patch + 3 * (k / 2 + below) + (k % 2 + right)];
                row[3 * (1 + k / 2 - below) + (1 + k % 2 - right)] += exists ? moment : 0;
            }
            pull += exists ? pulls(2 * below + right)[patch] : 0;
        }
        for (int k = 0; k < STENCIL; ++k) p.stencil(i)[k] = row[k];
        v.r[p.n_points + i] = pull;
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

// The changes of the pixels' decisions by those of the basis.
template <bool SHARED>
__device__ void differentiate(const Problem p, const double* kx) {
    assume_shared<SHARED>(p);
    for (int i = threadIdx.x; i < p.n_pixels; i += blockDim.x) p.fd(i) = blend(p, kx, i);
}

// Slope and curvature of the losses at step t along the direction whose change of decision is fd (pixels) and kx
// (points).
template <bool SHARED>
__device__ void along(const Problem p, const double* z, const double* kx, double t, double (&sums)[2]) {
    assume_shared<SHARED>(p);
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
