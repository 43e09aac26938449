// Fitting sketches to a sample: frame, directions and steps; see sketch.hpp.
#include <algorithm>
#include <cmath>

#include "sketch.hpp"
#include "sketch_errors.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

constexpr std::int64_t kMostWhole = 1 << 15;  // columns; the squared distance of more codes could overflow
constexpr std::int64_t kSample = 4096;
constexpr int kIterations = 4;

// The steps that serve bounds best, beside those that keep points best. Rounding adds to the errors of both points of a
// pair, while clipping takes nothing where both are clipped alike: whole codes, of points that lie near each other,
// gain by a smaller step. Coarse and raw ones lose by it for queries far from the bank. Fine codes' rounding is little
// beside the coarse codes', so that clipping is what costs. By what searches left over: features of a network (152 to
// 1536 channels, 13,000 and 30,000 rows), white noise, and queries of another subspace than the bank's.
constexpr double kCoarse = 0.9, kFine = 1.8, kWhole = 0.65, kRaw = 0.9;

std::vector<std::int64_t> sample_of(std::int64_t rows) {
    const std::int64_t count = std::min(rows, kSample);
    std::vector<std::int64_t> sample(count);
    for (std::int64_t i = 0; i < count; ++i)
        sample[i] = static_cast<std::int64_t>(double(i) * double(rows) / double(count));
    return sample;
}

template <class T>
T median(std::vector<T> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

// Columns of v (rows, cols), row-major, made orthonormal from the first on; a column within the span of those before it
// becomes zero.
void orthonormalise(std::vector<double>& v, std::int64_t rows, std::int64_t cols) {
    std::vector<double> before(cols), dots(cols);
    for (std::int64_t j = 0; j < cols; ++j) {
        double squared = 0;
        for (std::int64_t i = 0; i < rows; ++i) squared += v[i * cols + j] * v[i * cols + j];
        if (j == 0) {
            for (std::int64_t k = 0; k < cols; ++k) {
                for (std::int64_t i = 0; i < rows; ++i) before[k] += v[i * cols + k] * v[i * cols + k];
            }
        }
        const double factor = squared > 1e-20 * before[j] && squared > 0 ? 1.0 / std::sqrt(squared) : 0.0;
        std::fill(dots.begin(), dots.end(), 0.0);
        for (std::int64_t i = 0; i < rows; ++i) {
            const double value = v[i * cols + j] *= factor;
            for (std::int64_t k = j + 1; k < cols; ++k) dots[k] += value * v[i * cols + k];
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            const double value = v[i * cols + j];
            for (std::int64_t k = j + 1; k < cols; ++k) v[i * cols + k] -= value * dots[k];
        }
    }
}

// An upper bound of the greatest singular value of v (rows, cols), near 1 if its columns are nearly orthonormal or
// zero.
double norm_bound(const std::vector<double>& v, std::int64_t rows, std::int64_t cols) {
    std::vector<double> gram(cols * cols);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) {
            for (std::int64_t k = 0; k < cols; ++k) gram[j * cols + k] += v[i * cols + j] * v[i * cols + k];
        }
    }
    double off = 0;  // |G - P|_F, P the projection that keeps the columns which are not zero
    for (std::int64_t j = 0; j < cols; ++j) {
        for (std::int64_t k = 0; k < cols; ++k) {
            const double want = j == k && gram[j * cols + j] > 0 ? 1.0 : 0.0;
            off += (gram[j * cols + k] - want) * (gram[j * cols + k] - want);
        }
    }
    return std::sqrt(1.0 + std::sqrt(off)) * kSlack;
}

// Replaces columns [begin, end) by their combinations with the orthogonal DCT-II matrix, so that each gets its share of
// the leading one: one step then fits all.
void mix(std::vector<double>& v, std::int64_t rows, std::int64_t cols, std::int64_t begin, std::int64_t end) {
    const std::int64_t n = end - begin;
    std::vector<double> matrix(n * n), row(n);
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t k = 0; k < n; ++k) {
            const double angle = 3.14159265358979323846 * double(j) * (double(k) + 0.5) / double(n);
            matrix[j * n + k] = std::cos(angle) * std::sqrt((j ? 2.0 : 1.0) / double(n));
        }
    }
    for (std::int64_t i = 0; i < rows; ++i) {
        std::fill(row.begin(), row.end(), 0.0);
        for (std::int64_t j = 0; j < n; ++j) {
            for (std::int64_t k = 0; k < n; ++k) row[k] += v[i * cols + begin + j] * matrix[j * n + k];
        }
        std::copy(row.begin(), row.end(), v.begin() + i * cols + begin);
    }
}

// The squared distance between a point and its codes.
float lost(const float* point, const std::vector<std::int8_t>& codes, float step) {
    float squared = 0;
    for (std::size_t i = 0; i < codes.size(); ++i) {
        const float off = point[i] - step * static_cast<float>(codes[i]);
        squared += off * off;
    }
    return squared;
}

}  // namespace

// Mean and scale, twice over with far rows weighing less, so that a few of them cannot move the frame.
template <class T>
void Sketch::fit_frame(const Matrix<const T>& rows, std::vector<std::int64_t>& sample) {
    columns_ = rows.cols;
    sample = sample_of(rows.rows);
    std::vector<double> weights(sample.size(), 1.0), norms(sample.size());
    scale_ = 1.0;
    for (int round = 0; round < 3; ++round) {
        double total = 0;
        for (double weight : weights) total += weight;
        mean_.assign(columns_, 0.0);
        for (std::size_t s = 0; s < sample.size(); ++s) {
            const T* row = rows.row(sample[s]);
            const double share = weights[s] / total;
            for (std::int64_t i = 0; i < columns_; ++i) mean_[i] += share * double(row[i]);
        }
        for (std::size_t s = 0; s < sample.size(); ++s) {
            const T* row = rows.row(sample[s]);
            double most = 0, squared = 0;  // scaled by the greatest: squares of huge doubles overflow
            for (std::int64_t i = 0; i < columns_; ++i) most = std::max(most, std::abs(double(row[i]) - mean_[i]));
            for (std::int64_t i = 0; most > 0 && i < columns_; ++i) {
                const double value = (double(row[i]) - mean_[i]) / most;
                squared += value * value;
            }
            norms[s] = most * std::sqrt(squared);
        }
        const double middle = median(norms);
        for (std::size_t s = 0; s < sample.size(); ++s) weights[s] = norms[s] > middle ? middle / norms[s] : 1.0;
        if (!(middle > 0)) std::fill(weights.begin(), weights.end(), 1.0);
    }
    // 2^k brings the median length near 1: no float product over- or underflows for values that matter.
    double typical = median(norms);
    if (!(typical > 0)) typical = *std::max_element(norms.begin(), norms.end());
    int exponent = 0;
    if (typical > 0 && std::isfinite(typical)) std::frexp(typical, &exponent);
    scale_ = std::ldexp(1.0, std::min(1000, std::max(-1000, -exponent)));
    std::sort(norms.begin(), norms.end());
    usual_norm_ = std::max(2.5 * typical, norms[(norms.size() - 1) * 98 / 100]) * scale_;
}

void Sketch::fit_mixing() {
    padded_ = (columns_ + 63) / 64 * 64;
    signs_.resize(padded_);
    std::uint32_t state = 1;
    for (float& sign : signs_) {
        state = state * 1664525u + 1013904223u;
        sign = state >> 31 ? -1.0f : 1.0f;
    }
    mixed_rows_ = 1;
    while (mixed_rows_ < 64 && padded_ / 16 % (2 * mixed_rows_) == 0) mixed_rows_ *= 2;
    mix_factor_ = static_cast<float>((1.0 - 1e-7) / std::sqrt(double(mixed_rows_)));
}

template <class T>
void Sketch::fit_raw(const Matrix<const T>& rows, int threads) {
    std::vector<std::int64_t> sample;
    fit_frame(rows, sample);
    raw_ = true;
    fit_mixing();
    coarse_dims_ = lifted_ = columns_ <= kPanel ? (columns_ + 15) / 16 * 16 : padded_;
    fine_dims_ = whole_dims_ = 0;
    fit_steps(rows, sample, threads);
}

template <class T>
void Sketch::fit_directions(const Matrix<const T>& rows, int fine_panels, int threads) {
    std::vector<std::int64_t> sample;
    fit_frame(rows, sample);
    raw_ = false;
    coarse_dims_ = kPanel;
    fine_dims_ = fine_panels * std::int64_t(kPanel);
    fit_mixing();
    whole_dims_ = fine_panels && columns_ <= kMostWhole ? padded_ : 0;
    lifted_ = coarse_dims_ + fine_dims_;
    coarse_directions_ = std::min<std::int64_t>(kPanel - 1, columns_);
    fine_directions_ = fine_panels ? std::min<std::int64_t>(fine_dims_ - 2, columns_ - coarse_directions_) : 0;

    // The sample with every row brought to length 1: principal directions that far rows do not own.
    const std::int64_t count = static_cast<std::int64_t>(sample.size()), padded = (count + kQuad - 1) / kQuad * kQuad;
    std::vector<float> centred(padded * columns_, 0.0f);
    parallel_for((count + 63) / 64, threads, [&](std::int64_t task, int) {
        for (std::int64_t s = task * 64; s < std::min(count, task * 64 + 64); ++s) {
            float* to = centred.data() + s * columns_;
            const double length = centre(rows.row(sample[s]), to);
            const float factor = length > 0 && std::isfinite(length) ? static_cast<float>(1.0 / length) : 0.0f;
            for (std::int64_t i = 0; i < columns_; ++i) to[i] = factor == 0.0f ? 0.0f : to[i] * factor;
        }
    });
    fit_basis(centred, padded, threads);
    fit_steps(rows, sample, threads);
}

// Orthogonal iteration with X^T X, X the sample: its columns tend to the principal directions, leading first.
void Sketch::fit_basis(const std::vector<float>& sample, std::int64_t rows, int threads) {
    const SketchKernels& kernels = sketch_kernels();
    const std::int64_t n_panels = lifted_ / kPanel, cols = std::min(lifted_, columns_);
    std::vector<double> v(columns_ * cols);
    std::uint64_t state = 0x9E3779B97F4A7C15u;  // any fixed start
    for (double& value : v) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        value = double(static_cast<std::int64_t>(state) >> 11) * 0x1p-53;
    }
    orthonormalise(v, columns_, cols);
    panels_.clear();
    for (std::int64_t p = 0; p < n_panels; ++p) panels_.emplace_back(columns_ * kPanel);
    const auto to_panels = [&] {
        for (std::int64_t i = 0; i < columns_; ++i) {
            for (std::int64_t j = 0; j < lifted_; ++j) {
                panels_[j / kPanel][i * kPanel + j % kPanel] = j < cols ? static_cast<float>(v[i * cols + j]) : 0.0f;
            }
        }
    };
    std::vector<float> projected(rows * lifted_);
    for (int iteration = 0; iteration < kIterations; ++iteration) {
        to_panels();
        parallel_for(rows / kQuad, threads, [&](std::int64_t block, int) {
            for (std::int64_t p = 0; p < n_panels; ++p) {
                kernels.project(sample.data() + block * kQuad * columns_, columns_, columns_, panels_[p].data(),
                                projected.data() + block * kQuad * lifted_ + p * kPanel, lifted_);
            }
        });
        constexpr std::int64_t kColumns = 32;
        parallel_for((columns_ + kColumns - 1) / kColumns, threads, [&](std::int64_t block, int) {
            const std::int64_t begin = block * kColumns, width = std::min(kColumns, columns_ - begin);
            float sums[kColumns * kPanel];
            for (std::int64_t p = 0; p < n_panels; ++p) {
                std::fill(sums, sums + width * kPanel, 0.0f);
                kernels.project_back(sample.data() + begin, columns_, width, projected.data() + p * kPanel, lifted_,
                                     rows, sums);
                for (std::int64_t i = 0; i < width; ++i) {
                    for (std::int64_t j = 0; j < std::min<std::int64_t>(kPanel, cols - p * kPanel); ++j) {
                        v[(begin + i) * cols + p * kPanel + j] = double(sums[i * kPanel + j]);
                    }
                }
            }
        });
        orthonormalise(v, columns_, cols);
    }
    // Directions into their places: [0, 63) coarse, [64, ...) fine, a column left free for the rest's length.
    const std::int64_t used = coarse_directions_ + fine_directions_;
    std::vector<double> kept(columns_ * used);
    for (std::int64_t i = 0; i < columns_; ++i) {
        std::copy_n(v.begin() + i * cols, used, kept.begin() + i * used);
    }
    mix(kept, columns_, used, 0, coarse_directions_);
    for (std::int64_t begin = coarse_directions_; begin < used; begin += kPanel)
        mix(kept, columns_, used, begin, std::min<std::int64_t>(used, begin + kPanel));
    for (double& value : kept) value = double(static_cast<float>(value));
    const double contraction = 1.0 / (norm_bound(kept, columns_, used) * (1.0 + 2 * kUnit * std::sqrt(double(used))));
    for (auto& panel : panels_) std::fill(panel.begin(), panel.end(), 0.0f);
    for (std::int64_t i = 0; i < columns_; ++i) {
        for (std::int64_t j = 0; j < used; ++j) {
            const std::int64_t to = j < coarse_directions_ ? j : kPanel + j - coarse_directions_;
            panels_[to / kPanel][i * kPanel + to % kPanel] = static_cast<float>(kept[i * used + j] * contraction);
        }
    }
    // A sum of n products in float, in any order: off by (n + 2) u sum |b_i c_i|, so the vector of them by that |B|_F
    // |c|.
    projection_error_ = double(columns_ + 2) * kUnit * kSlack * std::sqrt(double(used));
}

// Steps by those for which the worst of a strip loses least on the sample: by rounding, which adds to its error, and by
// clipping, which brings it nearer to others. Queries lie farther out than the sample, so it is the worst that counts.
template <class T>
void Sketch::fit_steps(const Matrix<const T>& rows, const std::vector<std::int64_t>& sample, int threads) {
    const std::int64_t count = std::min<std::int64_t>(sample.size(), 2048), stride = sample.size() / count;
    const std::int64_t tasks = (count + kQuad - 1) / kQuad;
    std::vector<float> lifted(tasks * kQuad * lifted_), centred(whole_dims_ ? tasks * kQuad * padded_ : 0);
    std::vector<std::uint8_t> usual(tasks * kQuad);
    std::vector<float> second_rests(tasks * kQuad, 0.0f);
    coarse_rest_ = second_rest_ = fine_rest_ = 0.0;
    parallel_for(tasks, threads, [&](std::int64_t task, int) {
        Encoded encoded;
        encoded.centred.resize(kQuad * padded_);
        encoded.coordinates.resize(kQuad * lifted_);
        for (int q = 0; q < kQuad; ++q) {
            const std::int64_t s = std::min(task * kQuad + q, count - 1);
            float* to = encoded.centred.data() + q * padded_;
            encoded.norm[q] = centre(rows.row(sample[s * stride]), to);
            usual[task * kQuad + q] = encoded.norm[q] <= usual_norm_;
            std::fill(to + (std::isfinite(encoded.norm[q]) ? columns_ : 0), to + padded_, 0.0f);
        }
        lift(encoded);
        std::copy(encoded.coordinates.begin(), encoded.coordinates.end(), lifted.begin() + task * kQuad * lifted_);
        if (fine_dims_) std::copy_n(encoded.second_rest, kQuad, second_rests.begin() + task * kQuad);
        if (whole_dims_)
            std::copy(encoded.centred.begin(), encoded.centred.end(), centred.begin() + task * kQuad * padded_);
    });
    std::vector<const float*> points, whole_points;
    for (std::int64_t s = 0; s < count; ++s) {
        if (!usual[s]) continue;
        points.push_back(lifted.data() + s * lifted_);
        if (whole_dims_) whole_points.push_back(centred.data() + s * padded_);
    }
    const auto centre_rest = [&](std::int64_t column) {
        double sum = 0;
        for (const float* point : points) sum += double(point[column]);
        const double mean = points.empty() ? 0.0 : sum / double(points.size());
        for (const float* point : points) const_cast<float*>(point)[column] -= static_cast<float>(mean);
        return mean;
    };
    if (!raw_) {
        coarse_rest_ = centre_rest(kPanel - 1);
        if (fine_dims_) {
            fine_rest_ = centre_rest(lifted_ - 1);
            double sum = 0;
            for (std::int64_t s = 0; s < count; ++s) sum += usual[s] ? double(second_rests[s]) : 0.0;
            second_rest_ = points.empty() ? 0.0 : sum / double(points.size());
        }
    }
    const auto best_step = [](const std::vector<const float*>& points, std::int64_t begin, std::int64_t dims,
                              double share) {
        float range = 0;
        for (const float* point : points) {
            for (std::int64_t i = begin; i < begin + dims; ++i) range = std::max(range, std::abs(point[i]));
        }
        if (!(range > 0)) return 1.0;
        const SketchKernels& kernels = sketch_kernels();
        std::vector<std::int8_t> codes(dims);
        double best = kInfinity, best_step = 1.0, step = double(range) / 127.0;
        for (int candidate = 0; candidate < 8; ++candidate, step *= 0.8) {
            double sum = 0;
            for (std::size_t s = 0; s < points.size();) {
                double most = 0;
                for (const std::size_t end = std::min(points.size(), s + kStrip); s < end; ++s) {
                    const float* point = points[s] + begin;
                    kernels.quantise(point, dims, static_cast<float>(step), codes.data());
                    most = std::max(most, double(lost(point, codes, static_cast<float>(step))));
                }
                sum += std::sqrt(most);
            }
            if (sum < best) {
                best = sum;
                best_step = step;
            }
        }
        return double(static_cast<float>(share * best_step));
    };
    coarse_step_ = best_step(points, 0, coarse_dims_, raw_ ? kRaw : kCoarse);
    if (fine_dims_) fine_step_ = best_step(points, coarse_dims_, fine_dims_, kFine);
    if (whole_dims_) whole_step_ = best_step(whole_points, 0, padded_, kWhole);
}

#define TTT4AS_INSTANTIATE(T)                                               \
    template void Sketch::fit_directions(const Matrix<const T>&, int, int); \
    template void Sketch::fit_raw(const Matrix<const T>&, int);
TTT4AS_INSTANTIATE(float)
TTT4AS_INSTANTIATE(double)
#undef TTT4AS_INSTANTIATE

}  // namespace ttt4as
