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
// (I + N K) x = A^T (alpha y) - beta with N = A^T diag(loss'') A, a 3 x 3 stencil on the cells and a diagonal on the
// points: conjugate gradients in the metric of K, one product with K and one reduction a step. alpha is feasible for
// the dual as it is, so each iterate has a duality gap at no further cost. The hinge is the limit of Huber-smoothed
// hinges, loss'' = C / mu; the gap that stops the descent of mu is the hinge's own.
//
// K is stored in float32. Iterates, decisions, gradients and gaps are float64: with float32 vectors the gap stalls
// above 1e-4 for the hinge and for C >= 1 (features of two backbones on real parts). A direction is good enough in
// float32, which spares converting K to float64 at each product, for as long as it brings the gap down; then it is
// float64 too. A K that fits lives in shared memory, a larger one in global memory, and where m exceeds the capacity of
// K products go through U itself: slower, and as correct.
#include "svm_problem.cuh"

using namespace ttt4as;

#define OK 0
#define NOT_CONVERGED 3
#define NON_FINITE 4
#define MAX_THREADS 512
#define VECTORS 12
#define PAD 16  // vectors are padded with zeros to a multiple of this

#define CG_LIMIT 400     // steps of conjugate gradients for one direction
#define SEARCH_LIMIT 40  // evaluations of one line search
#define OVERSHOOT 0.01   // the squared hinge is solved to this share of tol: the last Newton step is the cheap one
#define SMOOTHING 0.25   // a smoothed problem is left at this share of tol, and mu shrinks by the same factor
#define NEAR 0.1         // from this gap on Newton's steps should tell: one that leaves
#define PROGRESS 0.5     // more than this of it is followed by directions in float64

__device__ int padded(int m) { return (m + PAD - 1) / PAD * PAD; }

// log2 of the threads that share a row of a K in shared memory: as many as leave a row to each, four at most.
__device__ int sharers(int m) { return m * 4 <= int(blockDim.x) ? 2 : (m * 2 <= int(blockDim.x) ? 1 : 0); }

// Floats from a row of a K in shared memory to the next. The 8 threads that read 16 bytes each at a time hold 2, 4 or 8
// rows, which must not meet in a bank.
__device__ int pitch(int m) { return (padded(m) + 31) / 32 * 32 + (4 << sharers(m)); }

__device__ float dot4(float4 k, const float* in) {
    const float4 v = *reinterpret_cast<const float4*>(in);
    return k.x * v.x + k.y * v.y + (k.z * v.z + k.w * v.w);
}
__device__ double dot4(float4 k, const double* in) {
    const double2 v = reinterpret_cast<const double2*>(in)[0], u = reinterpret_cast<const double2*>(in)[1];
    return k.x * v.x + k.y * v.y + (k.z * u.x + k.w * u.y);
}

// out = K in. Threads meet before (so that `in` may have just been written) and after.
template <typename V>
__device__ void product(const Problem& p, V* out, const V* in) {
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    if (p.gram_shared) {
        __builtin_assume(__isShared(p.gram) && __isShared(in));
        const int bits = sharers(p.m), part = threadIdx.x & ((1 << bits) - 1), rows = blockDim.x >> bits;
        for (int first = 0; first < p.m; first += rows) {
            const int row = first + (threadIdx.x >> bits);
            V even = 0, odd = 0;
            if (row < p.m) {
                const float4* k = reinterpret_cast<const float4*>(p.gram + row * p.ld);
                const int step = 1 << bits, end = padded(p.m) / 4;
                int j = part;
#pragma unroll 2
                for (; j + step < end; j += 2 * step) {
                    even += dot4(k[j], in + 4 * j);
                    odd += dot4(k[j + step], in + 4 * (j + step));
                }
                if (j < end) even += dot4(k[j], in + 4 * j);
            }
            V sum = even + odd;
            for (int distance = 1 << bits >> 1; distance; distance >>= 1)
                sum += __shfl_xor_sync(FULL_WARP, sum, distance);
            if (row < p.m && part == 0) out[row] = sum;
        }
    } else if (p.gram) {
        for (int row = warp; row < p.m; row += warps) {
            const float* k = p.gram + (long long)row * p.ld;
            V sum = 0;
#pragma unroll 4
            for (int j = lane; j < p.m; j += 32) sum += V(k[j]) * in[j];
            for (int distance = 16; distance; distance >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
            if (lane == 0) out[row] = sum;
        }
    } else {
        double total[1] = {0};
        for (int j = threadIdx.x; j < p.m; j += blockDim.x) total[0] += in[j];
        block_sum(total);
        for (int c = threadIdx.x; c < p.dim; c += blockDim.x) {
            double sum = 0;
#pragma unroll 4
            for (int j = 0; j < p.m; ++j) sum += double(p.basis[(long long)j * p.dim + c]) * in[j];
            p.through[c] = sum;
        }
        __syncthreads();
        for (int row = warp; row < p.m; row += warps) {
            const float* u = p.basis + (long long)row * p.dim;
            double sum = 0;
#pragma unroll 4
            for (int c = lane; c < p.dim; c += 32) sum += double(u[c]) * p.through[c];
            for (int distance = 16; distance; distance >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
            if (lane == 0) out[row] = V(sum + total[0]);
        }
    }
    __syncthreads();
}

// x with (I + N K) x = residual, until the error in the metric of K has shrunk by eta. `work` holds five vectors of V.
// False where arithmetic in V does not get there. One reduction a step, after Chronopoulos and Gear (1989).
template <typename V>
__device__ bool direction(const Problem& p, const double* residual, const double* k_residual, double rho, double eta,
                          const double* diagonal, void* work, double* x) {
    const int m = p.m, length = padded(m);
    V *r = static_cast<V*>(work), *kr = r + length, *q = kr + length, *d = q + length, *s = d + length;
    const double inverse = sqrt(rho), scale = 1 / inverse;  // so that V neither overflows nor loses small residuals
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
        r[i] = i < m ? V(residual[i] * scale) : V(0);
        if (i < m) kr[i] = V(k_residual[i] * scale), d[i] = s[i] = 0, x[i] = 0;
    }
    __syncthreads();
    const V enough = V(eta * eta);
    V a = 1, inverse_before = 0;
    bool reached = false;
    for (int step = 0; step < CG_LIMIT; ++step) {
        V sums[2] = {0, 0};
        for (int i = threadIdx.x; i < m; i += blockDim.x) {
            q[i] = r[i] + curved(p, diagonal, kr, i);
            sums[0] += r[i] * kr[i];
            sums[1] += q[i] * kr[i];
        }
        block_sum_once(sums);  // the product's barriers come between two
        const V b = sums[0] * inverse_before, energy = sums[1] - b * sums[0] / a;
        reached = sums[0] <= enough;
        if (reached || !(energy > 0)) break;
        a = sums[0] / energy;
        inverse_before = 1 / sums[0];
        for (int i = threadIdx.x; i < m; i += blockDim.x) {
            d[i] = r[i] + b * d[i];
            s[i] = q[i] + b * s[i];
            x[i] += double(a * d[i]) * inverse;
            r[i] -= a * s[i];
        }
        product(p, kr, r);
    }
    return reached;
}

struct Outcome {
    double gap;
    int iterations;
    bool finite;
};

// vectors: VECTORS times padded(m) doubles. Leaves beta in vectors[0 .. m).
__device__ Outcome solve(Problem& p, double* vectors, double tol, int max_iter) {
    const int m = p.m, length = padded(m);
    double *beta = vectors, *z = beta + length, *r = z + length, *kr = r + length, *x = kr + length, *kx = x + length,
           *diagonal = kx + length, *work = diagonal + length;
    const double target = p.hinge ? tol : OVERSHOOT * tol;
    double mu = 1, previous = 1e300, remaining = 1e300;
    bool precise = false;
    p.cap = p.hinge ? p.C : 1e300;
    for (int i = threadIdx.x; i < length; i += blockDim.x) beta[i] = z[i] = r[i] = x[i] = 0;
    arrange(p);
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
        ++outcome.iterations;
        if (p.hinge && smooth_gap <= SMOOTHING * tol) {
            mu *= SMOOTHING;
            remaining = 1e300;
            continue;
        }

        // Newton's direction. Early ones need not be exact.
        const double rho = products[2], eta = outcome.iterations <= 12 ? 0.1 : 0.01;
        precise = precise || (remaining < NEAR && smooth_gap > PROGRESS * remaining);
        remaining = smooth_gap;
        precise = precise || !direction<float>(p, r, kr, rho, eta, diagonal, work, x);
        if (precise) direction<double>(p, r, kr, rho, eta, diagonal, work, x);
        product(p, kx, x);

        // The exact minimum along x: the slope is piecewise linear and grows, Newton within a bracket finds its zero.
        for (int i = threadIdx.x; i < p.n_pixels; i += blockDim.x) p.fd(i) = blend(p, kx, i);
        double energies[3] = {0, 0, 0};
        for (int i = threadIdx.x; i < m; i += blockDim.x) {
            energies[0] += beta[i] * kx[i];
            energies[1] += x[i] * kx[i];
            energies[2] -= r[i] * kx[i];  // the slope at 0
        }
        block_sum(energies);
        double low = 0, high = 1e300, t = 1;
        for (int step = 0; step < SEARCH_LIMIT; ++step) {
            double ends[2];
            along(p, z, kx, t, ends);
            const double slope = energies[0] + t * energies[1] + ends[0], curvature = energies[1] + ends[1];
            if (!(fabs(slope) > 0.01 * fabs(energies[2]))) break;
            if (slope > 0)
                high = t;
            else
                low = t;
            double next = t - slope / curvature;
            if (!(next > low && next < high)) next = high < 1e300 ? 0.5 * (low + high) : 2 * t;
            t = next;
        }
        for (int i = threadIdx.x; i < m; i += blockDim.x) beta[i] += t * x[i], z[i] += t * kx[i];
        __syncthreads();
    }
}

// gram      (B, capacity, capacity) float32; images with m > capacity go through `basis` (B, rows, dim) float32
// counts    (B, 3) points, pixels and cells of each image
// status    (B,) in: 0 to train; out: 0, 3 or 4
// beta      (B, rows) out: coefficients of the basis, 0 beyond m
// report    (B, 3) out: gap, iterations, intercept
// scratch   (B, scratch_size) doubles: VECTORS padded(rows), dim, 15 h w, 6 H W
// Shared memory: the vectors of the solver where they take no more than half of it, and K where it fits the rest.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)
    svm_solve(const float* gram, const float* basis, const int* counts, const signed char* point_signs,
              const double* point_scales, const signed char* labels, const int* pixels, const int* cells,
              const int* slot, const int* row_lower, const float* row_weight, const int* row_start,
              const int* col_lower, const float* col_weight, const int* col_start, int* status, double* beta,
              double* report, double* scratch, long long scratch_size, int capacity, int rows, int dim, int height,
              int width, int h, int w, int own_points, int hinge, int max_iter, int shared_bytes, double C,
              double tol) {
    DYNAMIC_SHARED(double, shared);
    const int image = blockIdx.x;
    const long long n = (long long)height * width, grid = (long long)h * w;
    beta += (long long)image * rows;
    report += image * 3;
    counts += image * 3;
    if (status[image] != OK) {
        for (int i = threadIdx.x; i < rows; i += blockDim.x) beta[i] = 0;
        if (threadIdx.x < 3) report[threadIdx.x] = 0;
        return;
    }
    Problem p;
    p.n_points = counts[0], p.n_pixels = counts[1], p.n_cells = counts[2];
    p.m = p.n_points + p.n_cells;
    p.dim = dim;
    p.basis = basis + (long long)image * rows * dim;
    p.labels = labels + image * n;
    p.pixels = pixels + image * n;
    p.cells = cells + image * grid;
    p.slot = slot + image * grid;
    p.row_lower = row_lower, p.row_start = row_start, p.col_lower = col_lower, p.col_start = col_start;
    p.row_weight = row_weight, p.col_weight = col_weight;
    p.width = width, p.h = h, p.w = w, p.own_points = own_points != 0;
    p.point_sign = point_signs;
    p.point_scale = point_scales;
    p.C = C;
    p.hinge = hinge != 0;
    double* vectors = scratch + image * scratch_size;
    p.through = vectors + (long long)VECTORS * padded(rows);
    p.by_cell = p.through + dim;
    p.by_pixel = p.by_cell + 15 * grid;
    p.size = int(n), p.grid = int(grid);

    const int length = padded(p.m), used = VECTORS * length * int(sizeof(double));
    const bool vectors_shared = used <= shared_bytes / 2;
    if (vectors_shared) vectors = shared;
    const int ld = pitch(p.m);
    p.gram = p.m <= capacity ? gram + (long long)image * capacity * capacity : nullptr;
    p.ld = capacity;
    p.gram_shared = p.gram && vectors_shared && used + (long long)ld * p.m * int(sizeof(float)) <= shared_bytes;
    if (p.gram_shared) {
        float* copy = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + used);
        for (int row = threadIdx.x >> 5; row < p.m; row += blockDim.x >> 5)
            for (int col = threadIdx.x & 31; col < length; col += 32)
                copy[row * ld + col] = col < p.m ? p.gram[(long long)row * capacity + col] : 0;
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
