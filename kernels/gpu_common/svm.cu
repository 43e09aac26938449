// The batched SVM solver: one block trains one image, from labels to weights, without synchronisation.
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
// K is stored in float32. Its rounding puts the gap in doubt where rows are long beside what tells them apart, as those
// of features far from zero: at the end that doubt is estimated, and where it exceeds the tolerance Newton goes on from
// there with products through U in float64, which are exact for the features given. Iterates, decisions, gradients and
// gaps are float64: with float32 vectors the gap stalls above 1e-4 for the hinge and for C >= 1 (features of two
// backbones on real parts). A direction is good enough in float32, which spares converting K to float64 at each
// product, for as long as it brings the gap down; then it is float64 too. A small K lives in registers while a
// direction is sought, one that fits in shared memory, a larger one in global memory, with a copy in 16 bits in shared
// memory to seek directions by, and where m exceeds the capacity of K products go through U itself: slower, and as
// correct.
#include "svm_problem.cuh"

using namespace ttt4as;

#define MAX_THREADS 512
#define ROWS 4            // of K that a thread has a part of at a time
#define HELD 2            // float4 of each of them that a thread can keep for a whole direction
#define SMALL_SHARERS 16  // threads that share ROWS rows of a K that is kept so
#define SMALL 128         // rows of one at most, those of SMALL_ADDERS warps
#define SMALL_ADDERS (SMALL / 32)
static_assert(SMALL <= 4 * HELD * SMALL_SHARERS, "a thread keeps its part of each row");

#define CG_LIMIT 400        // steps of conjugate gradients for one direction
#define SEARCH_LIMIT 40     // evaluations of one line search
#define OVERSHOOT 0.01      // the squared hinge is solved to this share of tol: the last Newton step is the cheap one
#define SMOOTHING 0.25      // a smoothed problem is left at this share of tol, and mu shrinks by the same factor
#define NEAR 0.1            // from this gap on Newton's steps should tell: one that leaves
#define PROGRESS 0.5        // more than this of it is followed by directions in float64
#define FLOOR 1e-9          // below it a gap that has not halved
#define STALLED 20          // times in a row, at no Newton step nor less smoothing, never will
#define GRAM_ERROR 0x1p-22  // of an entry of K: what summing in float32 loses, thrice its root mean square

// The threads that share ROWS rows of K: as many as leave some to each, a power of two between ROWS and a warp.
__device__ int sharers_of(int m) {
    int sharers = 32;
    while (sharers > ROWS && (m + ROWS - 1) / ROWS * sharers > int(blockDim.x)) sharers /= 2;
    return sharers;
}

__device__ float dot4(float4 k, const float* in) {
    const float4 v = *reinterpret_cast<const float4*>(in);
    return k.x * v.x + k.y * v.y + (k.z * v.z + k.w * v.w);
}
__device__ double dot4(float4 k, const double* in) {
    const double2 v = reinterpret_cast<const double2*>(in)[0], u = reinterpret_cast<const double2*>(in)[1];
    return k.x * v.x + k.y * v.y + (k.z * u.x + k.w * u.y);
}

// out = K in where K is at hand, padded with zeros: a load of `in` serves ROWS rows, of which AHEAD loads each are
// under way at once.
template <int AHEAD, typename V>
__device__ void rows_product(const float* gram, int ld, int m, int sharers, V* out, const V* in) {
    const int part = threadIdx.x & (sharers - 1), own = own_of_sums<ROWS>(part, sharers);
    const int shift = __popc(sharers - 1), end = padded(m) / 4, step = ld / 4;  // no division, as there
    for (int first = 0; first < m; first += ROWS * (blockDim.x >> shift)) {
        const int row = first + ROWS * (threadIdx.x >> shift);
        V sums[ROWS] = {};
        if (row < m) {
            const float4* k = reinterpret_cast<const float4*>(gram) + (long long)row * step;
#pragma unroll(AHEAD == 1 ? 2 : 1)
            for (int j = part; j < end; j += AHEAD * sharers) {
                float4 held[AHEAD][ROWS];
                for (int l = 0; l < AHEAD; ++l)
                    for (int i = 0; i < ROWS; ++i)
                        held[l][i] = j + l * sharers < end ? k[i * step + j + l * sharers] : float4{0, 0, 0, 0};
                for (int l = 0; l < AHEAD; ++l)
                    for (int i = 0; i < ROWS; ++i)
                        sums[i] += dot4(held[l][i], in + 4 * (j + l * sharers < end ? j + l * sharers : j));
            }
        }
        const V sum = one_of_sums(sums, part, sharers);
        if (own < ROWS && row + own < m) out[row + own] = sum;
    }
}

// The same by the copy in 16 bits, whose entries are off by up to 2^-16 of the largest: 8 threads share ROWS rows.
__device__ void coarse_product(const Problem& p, float* out, const float* in) {
    const int sharers = 8, part = threadIdx.x & (sharers - 1), own = own_of_sums<ROWS>(part, sharers),
              across = padded(p.m) / 8;
    const float offset = 8388608.0f + 32768.0f;  // 2^23 with 16 bits in the last places of its mantissa is 2^23 + them
    __builtin_assume(__isShared(p.coarse) && __isShared(in) && __isShared(out));
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < p.m; first += ROWS * (blockDim.x / sharers)) {
        const int row = first + ROWS * (threadIdx.x / sharers);
        float sums[ROWS] = {};
        if (row < p.m) {
            const uint4* k = reinterpret_cast<const uint4*>(p.coarse) + row * across;
#pragma unroll 2
            for (int j = part; j < across; j += sharers) {
                const float4 v[2] = {reinterpret_cast<const float4*>(in)[2 * j],
                                     reinterpret_cast<const float4*>(in)[2 * j + 1]};
                const float x[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
                for (int i = 0; i < ROWS; ++i) {
                    const uint4 packed = k[i * across + j];
                    const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
                    for (int l = 0; l < 4; ++l) {
                        sums[i] += (__uint_as_float((pairs[l] & 0xffffu) | 0x4b000000u) - offset) * x[2 * l];
                        sums[i] += (__uint_as_float((pairs[l] >> 16) | 0x4b000000u) - offset) * x[2 * l + 1];
                    }
                }
            }
        }
        const float sum = one_of_sums(sums, part, sharers);
        if (own < ROWS && row + own < p.m) out[row + own] = p.unit * sum;
    }
    __syncthreads();
}

// out = K in. Threads meet before (so that `in` may have just been written) and after.
template <typename V>
__device__ APART void product(const Problem& p, V* out, const V* in) {
    __syncthreads();
    if (p.gram_shared) {
        __builtin_assume(__isShared(p.gram) && __isShared(in) && __isShared(out));
        rows_product<1>(p.gram, p.ld, p.m, p.sharers, out, in);
    } else if (p.gram) {
        rows_product<sizeof(V) == 4 ? 3 : 2>(p.gram, p.ld, p.m, 32, out, in);
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
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
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

// The product that a direction is sought by: float64 is for what coarse arithmetic does not bring down.
__device__ void seek_product(const Problem& p, float* out, const float* in) {
    if (p.coarse)
        coarse_product(p, out, in);
    else
        product(p, out, in);
}
__device__ void seek_product(const Problem& p, double* out, const double* in) { product(p, out, in); }

// x with (I + N K) x = residual, until the error in the metric of K has shrunk by eta. `work` holds five vectors of V.
// False where arithmetic in V does not get there. One reduction a step, after Chronopoulos and Gear (1989).
template <typename V>
__device__ APART bool direction(const Problem& p, double rho, double eta) {
    const Vectors v = vectors_of<false>(p);
    const int m = p.m, length = padded(m);
    double* x = v.x;
    V *r = reinterpret_cast<V*>(v.work), *kr = r + length, *q = kr + length, *d = q + length, *s = d + length;
    const double inverse = sqrt(rho), scale = 1 / inverse;  // so that V neither overflows nor loses small residuals
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
        r[i] = i < m ? V(v.r[i] * scale) : V(0);
        if (i < m) kr[i] = V(v.kr[i] * scale), d[i] = s[i] = 0, x[i] = 0;
    }
    __syncthreads();
    const V enough = V(eta * eta);
    const int adders = warps_of(m);
    V energy = 0, inverse_before = 0;
    bool reached = false;
    for (int step = 0; step < CG_LIMIT; ++step) {
        V sums[2] = {0, 0};
        for (int i = threadIdx.x; i < m; i += blockDim.x) {
            q[i] = r[i] + curved(p, v.diagonal, kr, i);
            sums[0] += r[i] * kr[i];
            sums[1] += q[i] * kr[i];
        }
        block_sum_once(sums, adders);  // the product's barriers come between two
        const V b = sums[0] * inverse_before;
        energy = sums[1] - b * b * energy;
        reached = sums[0] <= enough;
        if (reached || !(energy > 0)) break;
        const V a = sums[0] / energy;
        inverse_before = 1 / sums[0];
        for (int i = threadIdx.x; i < m; i += blockDim.x) {
            const V along = r[i] + b * d[i], change = q[i] + b * s[i];
            r[i] -= a * change;
            d[i] = along;
            s[i] = change;
            x[i] += double(a * along) * inverse;
        }
        seek_product(p, kr, r);
    }
    return reached;
}

// The same in float32 for a K that fits the registers (512 threads: m up to 128): each thread keeps its part of K, 32
// floats, and all that belongs to entry `threadIdx.x`. A step is three barriers, two loads of 16 bytes for the product
// and the decisions around a cell, all from shared memory; K in shared memory would cost eight more such loads.
__device__ APART bool small_direction(const Problem& p, double rho, double eta) {
    const Vectors v = vectors_of<true>(p);
    const int m = p.m, length = padded(m), i = threadIdx.x, end = length / 4;
    const int sharers = SMALL_SHARERS, part = i % sharers, own = own_of_sums<ROWS>(part, sharers);
    const int row = ROWS * (i / sharers);
    float *shown_r = reinterpret_cast<float*>(v.work), *shown_kr = shown_r + length;
    __builtin_assume(__isShared(p.gram));
    float4 held[HELD][ROWS];
    int column[HELD];
    for (int k = 0; k < HELD; ++k) {
        const int j = part + k * sharers;
        const bool exists = j < end && row < length;
        column[k] = exists ? 4 * j : 0;
        for (int l = 0; l < ROWS; ++l)
            held[k][l] = exists ? reinterpret_cast<const float4*>(p.gram)[(row + l) * end + j] : float4{0, 0, 0, 0};
    }
    // Row i of N; a point's is its own entry alone.
    float entry[STENCIL] = {};
    int around[STENCIL] = {};
    if (i < p.n_points) {
        entry[0] = float(v.diagonal[i]);
        around[0] = i;
    } else if (i < m) {
        for (int k = 0; k < STENCIL; ++k) {
            entry[k] = p.stencil(i - p.n_points)[k];
            around[k] = p.n_points + p.neighbour(i - p.n_points)[k];
        }
    }
    const double inverse = sqrt(rho), scale = 1 / inverse;
    float r = i < m ? float(v.r[i] * scale) : 0, d = 0, s = 0;
    double total = 0;
    if (i < length) shown_r[i] = r;
    if (i < m) shown_kr[i] = float(v.kr[i] * scale);
    __syncthreads();
    const float enough = float(eta * eta);
    float energy = 0, inverse_before = 0;
    bool reached = false;
    for (int step = 0; step < CG_LIMIT; ++step) {
        float q = r, sums[2] = {0, 0};
        if (i < m) {
            const float kr = shown_kr[i];
            float curved = 0;
            for (int k = 0; k < STENCIL; ++k) curved += entry[k] * shown_kr[around[k]];
            q += curved;
            sums[0] = r * kr;
            sums[1] = q * kr;
        }
        block_sum_once(sums, SMALL_ADDERS);
        const float b = sums[0] * inverse_before;
        energy = sums[1] - b * b * energy;
        reached = sums[0] <= enough;
        if (reached || !(energy > 0)) break;
        const float a = __fdividef(sums[0], energy);  // off by two units of the last place at most
        inverse_before = __fdividef(1, sums[0]);
        d = r + b * d;
        s = q + b * s;
        r -= a * s;
        total += double(a * d);
        if (i < m) shown_r[i] = r;
        __syncthreads();
        float rows[ROWS] = {};
        for (int k = 0; k < HELD; ++k)
            for (int l = 0; l < ROWS; ++l) rows[l] += dot4(held[k][l], shown_r + column[k]);
        const float sum = one_of_sums(rows, part, sharers);
        if (own < ROWS && row + own < m) shown_kr[row + own] = sum;
        __syncthreads();
    }
    if (i < m) v.x[i] = total * inverse;
    return reached;
}

struct Outcome {
    double gap;
    int iterations;
    bool finite;
};

// A step from the decisions of beta along x: to the exact minimum, for the slope is piecewise linear and grows, so that
// Newton within a bracket finds its zero.
template <bool SHARED>
__device__ void advance(const Problem& p) {
    const int m = p.m;
    const Vectors v = vectors_of<SHARED>(p);
    double *beta = v.beta, *z = v.z, *x = v.x, *kx = v.kx;
    product(p, kx, x);
    differentiate<SHARED>(p, kx);
    double energies[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < m; i += blockDim.x) {
        energies[0] += beta[i] * kx[i];
        energies[1] += x[i] * kx[i];
        energies[2] -= v.r[i] * kx[i];  // the slope at 0
    }
    block_sum(energies, warps_of(m));
    double low = 0, high = 1e300, t = 1;
    for (int step = 0; step < SEARCH_LIMIT; ++step) {
        double ends[2];
        along<SHARED>(p, z, kx, t, ends);
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

// Go on without K: products through the basis, in float64, and z = K beta by them.
__device__ APART void leave_gram(Problem& p, double* z, const double* beta) {
    __syncthreads();  // everybody has read `p`
    if (threadIdx.x == 0) p.gram = nullptr, p.coarse = nullptr, p.gram_shared = p.small = false;
    product(p, z, beta);
}

// Leaves beta in p.vectors[0 .. m).
template <bool SHARED>
__device__ Outcome solve(Problem& p, double tol, int max_iter) {
    const int m = p.m;
    const double target = p.hinge ? tol : OVERSHOOT * tol;
    double mu = 1, previous = 1e300, remaining = 1e300;
    bool precise = false;
    int stalled = 0;
    for (int i = threadIdx.x; i < VECTORS * padded(m); i += blockDim.x) p.vectors[i] = 0;
    arrange<SHARED>(p);
    Outcome outcome = {1e300, 0, true};
    const auto smooth = [&] {
        if (threadIdx.x == 0) p.slope = p.hinge ? p.C / mu : 2 * p.C, p.inverse = 1 / p.slope;
        __syncthreads();
    };
    smooth();
    while (true) {
        const Vectors v = vectors_of<SHARED>(p);
        double *beta = v.beta, *z = v.z, *r = v.r, *kr = v.kr;
        double sums[4];
        linearise<SHARED>(p, v, sums);
        for (int i = threadIdx.x; i < m; i += blockDim.x) r[i] -= beta[i];
        product(p, kr, r);
        // |w|^2, |A^T alpha y|^2 in the metric of K, the residual's, and the first two in that of K's diagonal.
        double products[4] = {0, 0, 0, 0};
        for (int i = threadIdx.x; i < m; i += blockDim.x) {
            const double ideal = r[i] + beta[i];
            products[0] += beta[i] * z[i];
            products[1] += ideal * (kr[i] + z[i]);
            products[2] += r[i] * kr[i];
            if (p.gram) products[3] += (beta[i] * beta[i] + ideal * ideal) * p.gram[(long long)i * p.ld + i];
        }
        block_sum(products, warps_of(m));
        const double half = 0.5 * products[0], dual = sums[2] - 0.5 * products[1];
        const double primal = half + sums[1], smoothed = half + sums[0], smooth_dual = dual - sums[3];
        const double gap = primal > 0 ? (primal - (p.hinge ? dual : smooth_dual)) / primal : 0;
        const double smooth_gap = !p.hinge ? gap : (smoothed > 0 ? (smoothed - smooth_dual) / smoothed : 0);
        outcome.gap = gap;
        outcome.finite = Ordered<double>::finite(primal) && Ordered<double>::finite(dual);
        if (!outcome.finite) return outcome;
        const bool last = gap <= tol || outcome.iterations >= max_iter;
        if (p.gram && (last || precise) && 0.5 * GRAM_ERROR * products[3] > tol * primal) {
            leave_gram(p, z, beta);
            previous = remaining = 1e300;
            continue;
        }
        if (gap <= target || outcome.iterations >= max_iter) return outcome;
        const bool halved = gap <= 0.5 * previous;
        if (gap <= tol && !halved) return outcome;  // rounding's floor
        stalled = halved || gap > FLOOR ? 0 : stalled + 1;
        if (stalled > STALLED) return outcome;
        previous = gap;
        ++outcome.iterations;
        if (p.hinge && smooth_gap <= SMOOTHING * tol) {
            mu *= SMOOTHING;
            remaining = 1e300;
            smooth();
            continue;
        }

        // Newton's direction. Early ones need not be exact.
        const double rho = products[2], eta = outcome.iterations <= 12 ? 0.1 : 0.01;
        precise = precise || (remaining < NEAR && smooth_gap > PROGRESS * remaining);
        remaining = smooth_gap;
        precise = precise || !(p.small ? small_direction(p, rho, eta) : direction<float>(p, rho, eta));
        if (precise) direction<double>(p, rho, eta);
        advance<SHARED>(p);
    }
}

// A number of at most 32767 in magnitude as 16 bits: its nearest integer, and 32768; one that is none as any.
__device__ u32 code(float x) {
    const float inside = x > 32767 ? 32767 : (x > -32767 ? x : -32767);
    return u32(int(inside + 32768.5f)) & 0xffffu;
}

// gram      (B, capacity, capacity) float32, capacity a multiple of PAD and rows and columns from m to padded(m) zero;
//           images with m > capacity go through `basis` (B, rows, dim) float32
// counts    (B, 3) points, pixels and cells of each image
// status    (B,) in: 0 to train; out: 0, 3 or 4
// beta      (B, rows) out: coefficients of the basis, 0 beyond m
// report    (B, 3) out: gap, iterations, intercept
// scratch   (B, scratch_size) doubles: VECTORS padded(rows), dim, CELL_DOUBLES h w, PIXEL_DOUBLES H W
// Shared memory: the vectors of the solver where they take no more than half of it, K where it fits the rest, in 16
// bits if need be, and then what is kept of cells, and of pixels.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)
    svm_solve(const float* gram, const float* basis, const int* counts, const signed char* point_signs,
              const double* point_scales, const signed char* labels, const int* cells, const int* slot,
              const float* row_weight, const int* row_start, const float* col_weight, const int* col_start, int* status,
              double* beta, double* report, double* scratch, long long scratch_size, int capacity, int rows, int dim,
              int height, int width, int h, int w, int own_points, int hinge, int max_iter, int shared_bytes, double C,
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
    __shared__ Problem p;
    const int m = counts[0] + counts[2], length = padded(m);
    const long long used = (long long)VECTORS * length * int(sizeof(double));
    const bool vectors_shared = used <= shared_bytes / 2, has_gram = m <= capacity;
    const bool gram_shared =
        has_gram && vectors_shared && used + (long long)length * length * int(sizeof(float)) <= shared_bytes;
    const bool coarse = has_gram && vectors_shared && !gram_shared &&
                        used + (long long)length * length * int(sizeof(unsigned short)) <= shared_bytes;
    gram += (long long)image * capacity * capacity;
    double* const after_vectors = shared + (vectors_shared ? VECTORS * length : 0);
    float* const copy = reinterpret_cast<float*>(after_vectors);
    double* const after_gram = after_vectors + (gram_shared ? length * length / 2 : (coarse ? length * length / 4 : 0));
    const double* const end = shared + shared_bytes / int(sizeof(double));
    const bool cells_shared = end - after_gram >= (long long)CELL_DOUBLES * counts[2];
    double* const after_cells = after_gram + (cells_shared ? CELL_DOUBLES * counts[2] : 0);
    const bool pixels_shared = end - after_cells >= (long long)PIXEL_DOUBLES * counts[1];
    double* const space = scratch + image * scratch_size;
    if (threadIdx.x == 0) {
        p.gram = !has_gram ? nullptr : (gram_shared ? copy : gram);
        p.ld = gram_shared ? length : capacity;
        p.gram_shared = gram_shared;
        p.coarse = coarse ? reinterpret_cast<unsigned short*>(copy) : nullptr;
        p.sharers = sharers_of(m);
        p.small = gram_shared && int(blockDim.x) >= 32 * SMALL_ADDERS && ROWS * int(blockDim.x) >= m * SMALL_SHARERS &&
                  length <= SMALL;
        p.n_points = counts[0], p.n_pixels = counts[1], p.n_cells = counts[2];
        p.m = m;
        p.vectors = vectors_shared ? shared : space;
        p.dim = dim;
        p.basis = basis + (long long)image * rows * dim;
        p.labels = labels + image * n;
        p.cells = cells + image * grid;
        p.slot = slot + image * grid;
        p.row_start = row_start, p.col_start = col_start;
        p.row_weight = row_weight, p.col_weight = col_weight;
        p.width = width, p.h = h, p.w = w, p.own_points = own_points != 0;
        p.point_sign = point_signs;
        p.point_scale = point_scales;
        p.C = C;
        p.hinge = hinge != 0;
        p.cap = p.hinge ? C : 1e300;
        p.through = space + (long long)VECTORS * padded(rows);
        double* const cell_space = p.through + dim;
        double* const pixel_space = cell_space + CELL_DOUBLES * grid;
        p.by_cell = cells_shared ? after_gram : cell_space;
        p.by_pixel = pixels_shared ? after_cells : pixel_space;
    }
    if (gram_shared) {
        const int across = length / 4;
#pragma unroll 8
        for (int i = threadIdx.x; i < length * across; i += blockDim.x)
            reinterpret_cast<float4*>(copy)[i] =
                reinterpret_cast<const float4*>(gram)[i / across * (capacity / 4) + i % across];
    }
    if (coarse) {
        // No entry of a Gram matrix is larger than the largest of its diagonal.
        float largest = 0;
        for (int i = threadIdx.x; i < m; i += blockDim.x) largest = fmaxf(largest, gram[(long long)i * capacity + i]);
        largest = block_reduce(largest, Max());
        const float per_unit = 32767 / largest;
        if (threadIdx.x == 0) p.unit = largest / 32767;
        const int across = length / 2;
#pragma unroll 4
        for (int i = threadIdx.x; i < length * across; i += blockDim.x) {
            const int row = i / across, pair = i % across;
            const float2 k = reinterpret_cast<const float2*>(gram + (long long)row * capacity)[pair];
            reinterpret_cast<u32*>(copy)[i] = code(k.x * per_unit) | code(k.y * per_unit) << 16;
        }
    }
    __syncthreads();
    const bool all_shared = vectors_shared && cells_shared && pixels_shared;
    const Outcome outcome = all_shared ? solve<true>(p, tol, max_iter) : solve<false>(p, tol, max_iter);
    double intercept[1] = {0};
    for (int i = threadIdx.x; i < p.m; i += blockDim.x) intercept[0] += p.vectors[i];
    block_sum(intercept);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) beta[i] = i < p.m ? p.vectors[i] : 0;
    if (threadIdx.x == 0) {
        status[image] = !outcome.finite ? NON_FINITE : (outcome.gap <= tol ? OK : NOT_CONVERGED);
        report[0] = outcome.gap;
        report[1] = outcome.iterations;
        report[2] = intercept[0];
    }
}
