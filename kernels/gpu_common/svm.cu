// The batched SVM solver: one block trains one image, from labels to weights, without a word to the host.
//
// Samples are bilinear blends of m basis vectors u_1 .. u_m (nominal samples are basis vectors themselves, the other
// labelled pixels blend four feature cells), so w = sum_j beta_j u_j, the decision at the basis is z = K beta with
// K = U U^T + 1 (the 1 is the penalised intercept, b = sum_j beta_j), and a sample's decision f is a blend of z. With A
// the sparse matrix of blends, the problem is
//
//     min over beta of  1/2 beta^T K beta + sum_i loss_i(1 - y_i (A K beta)_i)
//
// whose gradient in the metric of K is beta - A^T (alpha y), alpha = loss'. Newton's direction solves
// (I + N K) p = A^T (alpha y) - beta with N = A^T diag(loss'') A, a 3 x 3 stencil on the cells and a diagonal on the
// points: conjugate gradients in the metric of K, one product with K a step. alpha is feasible for the dual as it is,
// so each iterate has a duality gap at no further cost. The hinge is the limit of Huber-smoothed hinges, loss'' = C /
// mu; the gap that stops the descent of mu is the hinge's own.
//
// K is stored in float32 and everything else is float64: with float32 vectors the gap stalls above 1e-4 for the hinge
// and for C >= 1 (features of two backbones on real parts). A K that fits lives in shared memory, a larger one in
// global memory, and where m exceeds the capacity of K products go through U itself: slower, and as correct.
#include "device.cuh"

using namespace ttt4as;

#define OK 0
#define NOT_CONVERGED 3
#define NON_FINITE 4
#define MAX_THREADS 512
#define VECTORS 9
#define STENCIL 9
#define LANES 4  // threads that share a row of K in shared memory

#define CG_LIMIT 400     // steps of conjugate gradients for one direction
#define SEARCH_LIMIT 40  // evaluations of one line search
#define OVERSHOOT 0.01   // the squared hinge is solved to this share of tol: the last Newton step is the cheap one
#define SMOOTHING 0.25   // a smoothed problem is left at this share of tol, and mu shrinks by the same factor

struct Problem {
    const float* gram;   // (m, ld), null where products go through `basis`
    const float* basis;  // (m, dim)
    double* through;     // (dim) scratch of products through `basis`
    int ld, dim, m, n_points, n_pixels, n_cells;
    bool gram_shared;
    // blends of the cells
    const signed char* labels;
    const int *pixels, *cells, *slot;
    const int *row_lower, *row_start, *col_lower, *col_start;
    const float *row_weight, *col_weight;
    int width, h, w, own_points;
    // points
    const signed char* point_sign;  // null: all -1
    const double* point_scale;      // null: all 1
    // losses: alpha = clip(slope * margin, 0, cap), scaled for points by point_scale
    double C, slope, cap;
    bool hinge;
    double *f, *fd;  // decision and its change, by pixel
    double* stencil;
    int* neighbour;
};

__device__ double blend(const Problem& p, const double* z, int pixel) {
    const int row = pixel / p.width, col = pixel % p.width;
    const double dy = p.row_weight[row], dx = p.col_weight[col];
    const int* slot = p.slot + p.row_lower[row] * p.w + p.col_lower[col];
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

// out = K in. Threads meet before (so that `in` may have just been written) and after.
__device__ void product(const Problem& p, double* out, const double* in) {
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    if (p.gram_shared) {
        const int part = threadIdx.x % LANES, rows = blockDim.x / LANES;
        for (int first = 0; first < p.m; first += rows) {
            const int row = first + threadIdx.x / LANES;
            double even = 0, odd = 0;
            if (row < p.m) {
                const float* k = p.gram + row * p.ld;
                int j = part;
                for (; j + LANES < p.m; j += 2 * LANES) {
                    even += double(k[j]) * in[j];
                    odd += double(k[j + LANES]) * in[j + LANES];
                }
                if (j < p.m) even += double(k[j]) * in[j];
            }
            double sum = even + odd;
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            if (row < p.m && part == 0) out[row] = sum;
        }
    } else if (p.gram) {
        for (int row = warp; row < p.m; row += warps) {
            const float* k = p.gram + (long long)row * p.ld;
            double sum = 0;
            for (int j = lane; j < p.m; j += 32) sum += double(k[j]) * in[j];
            for (int distance = 16; distance; distance >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
            if (lane == 0) out[row] = sum;
        }
    } else {
        double total[1] = {0};
        for (int j = threadIdx.x; j < p.m; j += blockDim.x) total[0] += in[j];
        block_sum(total);
        for (int c = threadIdx.x; c < p.dim; c += blockDim.x) {
            double sum = 0;
            for (int j = 0; j < p.m; ++j) sum += double(p.basis[(long long)j * p.dim + c]) * in[j];
            p.through[c] = sum;
        }
        __syncthreads();
        for (int row = warp; row < p.m; row += warps) {
            const float* u = p.basis + (long long)row * p.dim;
            double sum = 0;
            for (int c = lane; c < p.dim; c += 32) sum += double(u[c]) * p.through[c];
            for (int distance = 16; distance; distance >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
            if (lane == 0) out[row] = sum + total[0];
        }
    }
    __syncthreads();
}

__device__ double clip(double x, double high) { return x < 0 ? 0 : (x > high ? high : x); }

// Its loss smoothed and true, alpha, alpha's conjugate and the curvature of one sample.
struct Sample {
    double smooth, loss, alpha, conjugate, curvature;
};
__device__ Sample sample(const Problem& p, double margin, double scale) {
    const double slope = p.slope * scale, cap = p.cap * scale, linear = slope * margin;
    Sample s;
    s.alpha = clip(linear, cap);
    s.curvature = margin > 0 && linear < cap ? slope : 0;
    s.conjugate = slope > 0 ? s.alpha * s.alpha / (2 * slope) : 0;
    s.smooth = s.alpha * (margin > 0 ? margin : 0) - s.conjugate;
    s.loss = p.hinge ? p.C * scale * (margin > 0 ? margin : 0) : s.smooth;
    return s;
}

__device__ double point_sign(const Problem& p, int i) { return p.point_sign ? p.point_sign[i] : -1; }
__device__ double point_scale(const Problem& p, int i) { return p.point_scale ? p.point_scale[i] : 1; }

// At the decisions z of the basis: f at the pixels; A^T (alpha y) into `force`, the stencil of N, and the sums
// {smoothed loss, true loss, sum of alpha, sum of conjugates}. A warp gathers a cell from the pixels around it, in
// pixel order, so that no atomic and no batch decides a sum.
__device__ void linearise(const Problem& p, const double* z, double* force, double* diagonal, double (&sums)[4]) {
    for (int i = 0; i < 4; ++i) sums[i] = 0;
    for (int i = threadIdx.x; i < p.n_points; i += blockDim.x) {
        const double y = point_sign(p, i);
        const Sample s = sample(p, 1 - y * z[i], point_scale(p, i));
        force[i] = s.alpha * y;
        diagonal[i] = s.curvature;
        sums[0] += s.smooth, sums[1] += s.loss, sums[2] += s.alpha, sums[3] += s.conjugate;
    }
    for (int i = threadIdx.x; i < p.n_pixels; i += blockDim.x) {
        const int pixel = p.pixels[i];
        const double f = blend(p, z, pixel);
        p.f[pixel] = f;
        const Sample s = sample(p, 1 - p.labels[pixel] * f, 1);
        sums[0] += s.smooth, sums[1] += s.loss, sums[2] += s.alpha, sums[3] += s.conjugate;
    }
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int i = warp; i < p.n_cells; i += warps) {
        const int cell = p.cells[i], cy = cell / p.w, cx = cell % p.w;
        const int top = p.row_start[cy > 0 ? cy - 1 : 0], bottom = p.row_start[cy + 1];
        const int left = p.col_start[cx > 0 ? cx - 1 : 0], right = p.col_start[cx + 1];
        const int across = right - left, window = (bottom - top) * across;
        double gathered[1 + STENCIL] = {};
        for (int k = lane; k < window; k += 32) {
            const int row = top + k / across, col = left + k % across, pixel = row * p.width + col;
            const int label = p.labels[pixel];
            if (label == 0 || (p.own_points && label < 0)) continue;
            const double dy = p.row_weight[row], dx = p.col_weight[col];
            const bool lower_row = p.row_lower[row] < cy, lower_col = p.col_lower[col] < cx;
            const double own_y = lower_row ? dy : 1 - dy, own_x = lower_col ? dx : 1 - dx;
            const double own = own_y * own_x;
            if (own == 0) continue;
            const Sample s = sample(p, 1 - label * p.f[pixel], 1);
            gathered[0] += own * s.alpha * label;
            // The pixel's other row lies above this cell or below it, and its other column left or right of it.
            const double y0 = lower_row ? 1 - dy : 0, y2 = lower_row ? 0 : dy;
            const double x0 = lower_col ? 1 - dx : 0, x2 = lower_col ? 0 : dx;
            const double weight = own * s.curvature;
            gathered[1] += weight * (y0 * x0), gathered[2] += weight * (y0 * own_x), gathered[3] += weight * (y0 * x2);
            gathered[4] += weight * (own_y * x0), gathered[5] += weight * own, gathered[6] += weight * (own_y * x2);
            gathered[7] += weight * (y2 * x0), gathered[8] += weight * (y2 * own_x), gathered[9] += weight * (y2 * x2);
        }
        for (int k = 0; k <= STENCIL; ++k)
            for (int distance = 16; distance; distance >>= 1)
                gathered[k] += __shfl_xor_sync(FULL_WARP, gathered[k], distance);
        if (lane == 0) {
            force[p.n_points + i] = gathered[0];
            for (int k = 0; k < STENCIL; ++k) p.stencil[i * STENCIL + k] = gathered[1 + k];
        }
    }
    block_sum(sums);
}

// Entry i of N q.
__device__ double curved(const Problem& p, const double* diagonal, const double* q, int i) {
    if (i < p.n_points) return diagonal[i] * q[i];
    const double* stencil = p.stencil + (i - p.n_points) * STENCIL;
    const int* neighbour = p.neighbour + (i - p.n_points) * STENCIL;
    double sum = 0;
    for (int k = 0; k < STENCIL; ++k)
        if (neighbour[k] >= 0) sum += stencil[k] * q[p.n_points + neighbour[k]];
    return sum;
}

// The eight cells around each used one, and itself, as places in `cells`; -1 where there is none.
__device__ void find_neighbours(const Problem& p) {
    for (int i = threadIdx.x; i < p.n_cells; i += blockDim.x) {
        const int cy = p.cells[i] / p.w, cx = p.cells[i] % p.w;
        for (int k = 0; k < STENCIL; ++k) {
            const int y = cy + k / 3 - 1, x = cx + k % 3 - 1;
            p.neighbour[i * STENCIL + k] = y < 0 || y >= p.h || x < 0 || x >= p.w ? -1 : p.slot[y * p.w + x];
        }
    }
}

__device__ double dot(const double* a, const double* b, int n) {
    double sum[1] = {0};
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum[0] += a[i] * b[i];
    block_sum(sum);
    return sum[0];
}

// Slope and curvature at step t along the direction whose change of decision is fd (pixels) and kx (points).
__device__ void along(const Problem& p, const double* z, const double* kx, double t, double (&sums)[2]) {
    sums[0] = sums[1] = 0;
    for (int i = threadIdx.x; i < p.n_points + p.n_pixels; i += blockDim.x) {
        double y, f, change, scale = 1;
        if (i < p.n_points) {
            y = point_sign(p, i), f = z[i], change = kx[i], scale = point_scale(p, i);
        } else {
            const int pixel = p.pixels[i - p.n_points];
            y = p.labels[pixel], f = p.f[pixel], change = p.fd[pixel];
        }
        const Sample s = sample(p, 1 - y * (f + t * change), scale);
        sums[0] -= s.alpha * y * change;
        sums[1] += s.curvature * change * change;
    }
    block_sum(sums);
}

struct Outcome {
    double gap;
    int iterations;
    bool finite;
};

// vectors: VECTORS times m doubles. Leaves beta in vectors[0 .. m).
__device__ Outcome solve(Problem& p, double* vectors, double tol, int max_iter) {
    const int m = p.m;
    double *beta = vectors, *z = beta + m, *r = z + m, *kr = r + m, *d = kr + m, *kd = d + m, *x = kd + m, *kx = x + m,
           *diagonal = kx + m;
    const double target = p.hinge ? tol : OVERSHOOT * tol;
    double mu = 1, previous = 1e300;
    p.cap = p.hinge ? p.C : 1e300;
    for (int i = threadIdx.x; i < m; i += blockDim.x) beta[i] = 0, z[i] = 0;
    find_neighbours(p);
    __syncthreads();
    Outcome outcome = {1e300, 0, true};
    while (true) {
        p.slope = p.hinge ? p.C / mu : 2 * p.C;
        double sums[4];
        linearise(p, z, r, diagonal, sums);
        for (int i = threadIdx.x; i < m; i += blockDim.x) r[i] -= beta[i];
        product(p, kr, r);
        double products[3] = {0, 0, 0};  // |w|^2, |A^T alpha y|^2 in the metric of K, and the residual's
        for (int i = threadIdx.x; i < m; i += blockDim.x) {
            products[0] += beta[i] * z[i];
            products[1] += (r[i] + beta[i]) * (kr[i] + z[i]);
            products[2] += r[i] * kr[i];
        }
        block_sum(products);
        const double half = 0.5 * products[0], dual = sums[2] - 0.5 * products[1];
        const double primal = half + sums[1], smooth = half + sums[0], smooth_dual = dual - sums[3];
        const double gap = primal > 0 ? (primal - (p.hinge ? dual : smooth_dual)) / primal : 0;
        const double smooth_gap = smooth > 0 ? (smooth - smooth_dual) / smooth : 0;
        outcome.gap = gap;
        outcome.finite = Ordered<double>::finite(primal) && Ordered<double>::finite(dual);
        if (!outcome.finite || gap <= target || outcome.iterations >= max_iter) return outcome;
        if (gap <= tol && gap > 0.5 * previous) return outcome;  // rounding's floor
        previous = gap;
        if (p.hinge && smooth_gap <= SMOOTHING * tol) {
            mu *= SMOOTHING;
            ++outcome.iterations;
            continue;
        }

        // Newton's direction x and kx = K x. Early directions need not be exact.
        const double eta = outcome.iterations < 12 ? 0.1 : 0.01;
        double rho = products[2];
        const double enough = eta * eta * rho;
        for (int i = threadIdx.x; i < m; i += blockDim.x) x[i] = kx[i] = 0, d[i] = r[i], kd[i] = kr[i];
        __syncthreads();
        for (int step = 0; step < CG_LIMIT && rho > enough; ++step) {
            double energy[1] = {0};
            for (int i = threadIdx.x; i < m; i += blockDim.x) energy[0] += (d[i] + curved(p, diagonal, kd, i)) * kd[i];
            block_sum(energy);
            if (!(energy[0] > 0)) break;
            const double a = rho / energy[0];
            for (int i = threadIdx.x; i < m; i += blockDim.x) {
                x[i] += a * d[i];
                kx[i] += a * kd[i];
                r[i] -= a * (d[i] + curved(p, diagonal, kd, i));
            }
            product(p, kr, r);
            const double next = dot(r, kr, m), b = next / rho;
            for (int i = threadIdx.x; i < m; i += blockDim.x) d[i] = r[i] + b * d[i], kd[i] = kr[i] + b * kd[i];
            __syncthreads();
            rho = next;
        }

        // The exact minimum along x: the slope is piecewise linear and grows, Newton within a bracket finds its zero.
        for (int i = threadIdx.x; i < p.n_pixels; i += blockDim.x) p.fd[p.pixels[i]] = blend(p, kx, p.pixels[i]);
        double energies[2] = {0, 0};
        for (int i = threadIdx.x; i < m; i += blockDim.x) energies[0] += beta[i] * kx[i], energies[1] += x[i] * kx[i];
        block_sum(energies);
        double ends[2];
        along(p, z, kx, 0, ends);
        const double start = energies[0] + ends[0];
        double low = 0, high = 1e300, t = 1;
        for (int step = 0; step < SEARCH_LIMIT; ++step) {
            along(p, z, kx, t, ends);
            const double slope = energies[0] + t * energies[1] + ends[0], curvature = energies[1] + ends[1];
            if (!(fabs(slope) > 0.01 * fabs(start))) break;
            if (slope > 0)
                high = t;
            else
                low = t;
            double next = t - slope / curvature;
            if (!(next > low && next < high)) next = high < 1e300 ? 0.5 * (low + high) : 2 * t;
            t = next;
        }
        for (int i = threadIdx.x; i < m; i += blockDim.x) beta[i] += t * x[i];
        product(p, z, beta);
        ++outcome.iterations;
    }
}

// gram      (B, capacity, capacity) float32; images with m > capacity go through `basis` (B, rows, dim) float32
// counts    (B, 3) points, pixels and cells of each image
// status    (B,) in: 0 to train; out: 0, 3 or 4
// beta      (B, rows) out: coefficients of the basis, 0 beyond m
// report    (B, 3) out: gap, iterations, intercept
// scratch   (B, scratch_size) doubles: through, stencil, f, fd, neighbours, and the vectors where they do not fit
// Shared memory: the vectors of the largest problem (if vectors_shared), and K where it fits the rest.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)
    svm_solve(const float* gram, const float* basis, const int* counts, const signed char* point_signs,
              const double* point_scales, const signed char* labels, const int* pixels, const int* cells,
              const int* slot, const int* row_lower, const float* row_weight, const int* row_start,
              const int* col_lower, const float* col_weight, const int* col_start, int* status, double* beta,
              double* report, double* scratch, long long scratch_size, int capacity, int rows, int dim, int height,
              int width, int h, int w, int own_points, int hinge, int max_iter, int vectors_shared, int shared_bytes,
              double C, double tol) {
    DYNAMIC_SHARED(double, shared);
    const int image = blockIdx.x;
    const long long n = (long long)height * width;
    beta += (long long)image * rows;
    report += image * 3;
    counts += image * 3;
    if (status[image] != OK) {
        for (int i = threadIdx.x; i < rows; i += blockDim.x) beta[i] = 0;
        if (threadIdx.x < 3) report[threadIdx.x] = 0;
        return;
    }
    scratch += image * scratch_size;
    Problem p;
    p.n_points = counts[0], p.n_pixels = counts[1], p.n_cells = counts[2];
    p.m = p.n_points + p.n_cells;
    p.dim = dim;
    p.basis = basis + (long long)image * rows * dim;
    p.labels = labels + image * n;
    p.pixels = pixels + image * n;
    p.cells = cells + (long long)image * h * w;
    p.slot = slot + (long long)image * h * w;
    p.row_lower = row_lower, p.row_start = row_start, p.col_lower = col_lower, p.col_start = col_start;
    p.row_weight = row_weight, p.col_weight = col_weight;
    p.width = width, p.h = h, p.w = w, p.own_points = own_points;
    p.point_sign = point_signs;
    p.point_scale = point_scales;
    p.C = C;
    p.hinge = hinge != 0;
    p.through = scratch;
    p.stencil = p.through + dim;
    p.f = p.stencil + (long long)STENCIL * h * w;
    p.fd = p.f + n;
    p.neighbour = reinterpret_cast<int*>(p.fd + n);
    double* vectors = vectors_shared ? shared : p.fd + n + (STENCIL * (long long)h * w + 1) / 2;

    // Rows of K in shared memory start 4 banks apart, so that the 8 rows a warp works on do not collide.
    const int used = vectors_shared ? VECTORS * p.m * int(sizeof(double)) : 0;
    const int ld = (p.m + 27) / 32 * 32 + LANES;
    p.gram = p.m <= capacity ? gram + (long long)image * capacity * capacity : nullptr;
    p.ld = capacity;
    p.gram_shared = p.gram && used + (long long)ld * p.m * int(sizeof(float)) <= shared_bytes;
    if (p.gram_shared) {
        float* copy = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + used);
        for (int i = threadIdx.x; i < p.m * p.m; i += blockDim.x)
            copy[i / p.m * ld + i % p.m] = p.gram[(long long)(i / p.m) * capacity + i % p.m];
        p.gram = copy;
        p.ld = ld;
    }
    __syncthreads();
    const Outcome outcome = solve(p, vectors, tol, max_iter);
    double intercept[1] = {0};
    for (int i = threadIdx.x; i < p.m; i += blockDim.x) intercept[0] += vectors[i];
    block_sum(intercept);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) beta[i] = i < p.m ? vectors[i] : 0;
    if (threadIdx.x == 0) {
        status[image] = !outcome.finite ? NON_FINITE : (outcome.gap <= tol ? OK : NOT_CONVERGED);
        report[0] = outcome.gap;
        report[1] = outcome.iterations;
        report[2] = intercept[0];
    }
}
