// Fitting and computing sketches; see sketch.hpp for the bound and what each error stands for.
#include "sketch.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ttt4as/simd.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

constexpr double kUnit = 0x1p-24;             // half an ulp of float at 1
constexpr double kFarthest = 1e9;             // |c| above which codes mean nothing and float sums might overflow
constexpr std::int64_t kMostWhole = 1 << 15;  // columns; the squared distance of more codes could overflow
constexpr std::int64_t kSample = 4096;
constexpr std::int64_t kSecond = kPanel - 2;  // directions of the second codes
constexpr int kIterations = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSlack = 1.0 + 1e-6;  // covers the double arithmetic on errors themselves

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

// The length of what is left of |c| beside |t|, and how far the computed one may be off when t is off by `off`.
double rest_of(double norm, double projected_squared, double off, double* error) {
    const double squared = std::max(0.0, norm * norm - projected_squared), rest = std::sqrt(squared);
    const double uncertain = (2.1 * norm + off) * off + 1e-12 * norm * norm;
    *error = std::min(std::sqrt(uncertain), rest > 0 ? uncertain / rest : kInfinity);
    return rest;
}

// An upper bound of how far rounding n coordinates of a vector of length `norm` to codes moved it.
double moved_by(float squared, std::int64_t n, double norm) {
    return std::sqrt(double(squared)) * (1.0 + double(n + 16) * kUnit) + 4 * kUnit * norm;
}

}  // namespace

const SketchKernels& sketch_kernels() noexcept {
#if defined(TTT4AS_HAVE_X86_VARIANTS)
    static const bool vnni = __builtin_cpu_supports("avx512vnni");
    if (isa() == Isa::avx512) return vnni ? avx512::sketch_table_vnni : avx512::sketch_table;
    if (isa() == Isa::avx2) return avx2::sketch_table;
#endif
    return generic::sketch_table;
}

template <>
double Sketch::centre(const float* row, float* out) const {
    const double squared = sketch_kernels().centre_float(row, mean_.data(), scale_, columns_, out);
    return squared <= kFarthest * kFarthest ? std::sqrt(squared) : kInfinity;  // false for NaN, too
}
template <>
double Sketch::centre(const double* row, float* out) const {
    const double squared = sketch_kernels().centre_double(row, mean_.data(), scale_, columns_, out);
    return squared <= kFarthest * kFarthest ? std::sqrt(squared) : kInfinity;
}

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

void Sketch::lift(Encoded& out) const {
    const SketchKernels& kernels = sketch_kernels();
    if (!raw_) {
        for (std::size_t p = 0; p < panels_.size(); ++p) {
            kernels.project(out.centred.data(), padded_, columns_, panels_[p].data(),
                            out.coordinates.data() + p * kPanel, lifted_);
        }
        for (int q = 0; q < kQuad; ++q) {
            float* t = out.coordinates.data() + q * lifted_;
            const double norm = std::isfinite(out.norm[q]) ? out.norm[q] : 0.0, off = projection_error_ * norm;
            double squared = 0, rest_error = 0;
            for (std::int64_t i = 0; i < coarse_directions_; ++i) squared += double(t[i]) * double(t[i]);
            t[kPanel - 1] = static_cast<float>(rest_of(norm, squared, off, &rest_error) - coarse_rest_);
            out.coarse_error[q] = out.error[q] = off + rest_error + 4 * kUnit * (norm + coarse_rest_);
            if (fine_dims_) {
                std::int64_t i = kPanel;
                for (; i < kPanel + std::min(kSecond, fine_directions_); ++i) squared += double(t[i]) * double(t[i]);
                out.second_rest[q] = static_cast<float>(rest_of(norm, squared, off, &rest_error) - second_rest_);
                out.second_error[q] = off + rest_error + 4 * kUnit * (norm + second_rest_);
                for (; i < kPanel + fine_directions_; ++i) squared += double(t[i]) * double(t[i]);
                t[lifted_ - 1] = static_cast<float>(rest_of(norm, squared, off, &rest_error) - fine_rest_);
                out.error[q] = off + rest_error + 4 * kUnit * (norm + fine_rest_);
            }
        }
    }
    for (int q = 0; q < kQuad; ++q) {
        float* c = out.centred.data() + q * padded_;
        const bool mixed = raw_ ? columns_ > kPanel : whole_dims_ > 0;
        if (mixed) kernels.mix(c, signs_.data(), padded_, mixed_rows_, mix_factor_);
        out.whole_error[q] = 24 * kUnit * out.norm[q];
        if (raw_) {
            std::copy_n(c, lifted_, out.coordinates.data() + q * lifted_);
            out.coarse_error[q] = out.error[q] = out.whole_error[q];
        }
    }
}

template <class T>
void Sketch::centre(const T* const* rows, int n, Encoded& out) const {
    out.centred.resize(kQuad * padded_);
    for (int q = 0; q < kQuad; ++q) {
        float* to = out.centred.data() + q * padded_;
        out.norm[q] = q < n ? centre(rows[q], to) : 0.0;
        const bool empty = q >= n || !std::isfinite(out.norm[q]);
        std::fill(to + (empty ? 0 : columns_), to + padded_, 0.0f);
    }
}

template <class T>
void Sketch::place(const T* const* rows, int n, Encoded& scratch, std::int8_t* codes) const {
    const SketchKernels& kernels = sketch_kernels();
    centre(rows, n, scratch);
    float coordinates[kQuad * kPanel];
    if (raw_) {
        for (int q = 0; q < kQuad; ++q)
            std::copy_n(scratch.centred.data() + q * padded_, kPanel, coordinates + q * kPanel);
    } else {
        kernels.project(scratch.centred.data(), padded_, columns_, panels_[0].data(), coordinates, kPanel);
    }
    kernels.quantise(coordinates, kQuad * kPanel, static_cast<float>(coarse_step_), codes);
}

template <class T>
void Sketch::encode(const T* const* rows, int n, Encoded& out) const {
    const SketchKernels& kernels = sketch_kernels();
    out.coordinates.resize(kQuad * lifted_);
    out.coarse.resize(kQuad * coarse_dims_);
    out.words.resize(kQuad * coarse_dims_);
    out.second.resize(kQuad * second_dims());
    out.second_words.resize(kQuad * second_dims());
    out.fine.resize(kQuad * fine_dims_);
    out.whole.resize(kQuad * whole_dims_);
    centre(rows, n, out);
    lift(out);
    for (int q = 0; q < kQuad; ++q) {
        const float* t = out.coordinates.data() + q * lifted_;
        const double length = out.norm[q] + coarse_rest_ + second_rest_ + fine_rest_;
        std::int8_t* coarse = out.coarse.data() + q * coarse_dims_;
        const float moved = kernels.quantise(t, coarse_dims_, static_cast<float>(coarse_step_), coarse);
        std::int32_t squared = 0, sum = 0;
        for (std::int64_t i = 0; i < coarse_dims_; ++i) {
            out.words[q * coarse_dims_ + i] = coarse[i];
            squared += coarse[i] * coarse[i];
            sum += coarse[i];
        }
        out.level[q] = std::int64_t(squared) + 256 * std::int64_t(sum);
        out.coarse_error[q] = (out.coarse_error[q] + moved_by(moved, coarse_dims_, length)) * kSlack + 1e-30;
        if (fine_dims_) {
            std::int8_t* fine = out.fine.data() + q * fine_dims_;
            const float more = kernels.quantise(t + coarse_dims_, fine_dims_, static_cast<float>(fine_step_), fine);
            fine[fine_dims_ - 2] = coarse[coarse_dims_ - 1];
            out.error[q] = (out.error[q] + moved_by(moved + more, lifted_, length)) * kSlack + 1e-30;
            encode_second(q, moved, length, out);
        } else {
            out.error[q] = out.coarse_error[q];
        }
        if (whole_dims_) {
            const float off = kernels.quantise(out.centred.data() + q * padded_, whole_dims_,
                                               static_cast<float>(whole_step_), out.whole.data() + q * whole_dims_);
            out.whole_error[q] = (out.whole_error[q] + moved_by(off, whole_dims_, out.norm[q])) * kSlack + 1e-30;
        }
        if (!std::isfinite(out.norm[q]))
            out.coarse_error[q] = out.second_error[q] = out.error[q] = out.whole_error[q] = kInfinity;
    }
}

// The second codes of point q, whose coarse codes have been made and moved it by `moved`, squared.
void Sketch::encode_second(int q, float moved, double length, Encoded& out) const {
    float coordinates[kPanel] = {};
    std::copy_n(out.coordinates.data() + q * lifted_ + kPanel, kSecond, coordinates);
    coordinates[kPanel - 1] = out.second_rest[q];
    std::int8_t* codes = out.second.data() + q * kPanel;
    const float more = sketch_kernels().quantise(coordinates, kPanel, static_cast<float>(coarse_step_), codes);
    const std::int32_t last = out.coarse[q * coarse_dims_ + coarse_dims_ - 1];
    codes[kSecond] = static_cast<std::int8_t>(-last);
    std::int32_t squared = -2 * last * last, sum = 0;
    for (int i = 0; i < kPanel; ++i) {
        out.second_words[q * kPanel + i] = codes[i];
        squared += codes[i] * codes[i];
        sum += codes[i];
    }
    out.second_level[q] = out.level[q] + std::int64_t(squared) + 256 * std::int64_t(sum);
    out.second_error[q] = (out.second_error[q] + moved_by(moved + more, 2 * kPanel, length)) * kSlack + 1e-30;
}

// Steps that lose least of the sample, by rounding, which adds to the error, and by clipping, which brings points
// nearer.
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
    const auto best_step = [](const std::vector<const float*>& points, std::int64_t begin, std::int64_t dims) {
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
        return double(static_cast<float>(best_step));
    };
    coarse_step_ = best_step(points, 0, coarse_dims_);
    if (fine_dims_) fine_step_ = best_step(points, coarse_dims_, fine_dims_);
    if (whole_dims_) whole_step_ = best_step(whole_points, 0, padded_);
}

bool Sketch::fits(std::int64_t columns) const noexcept {
    const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
    const std::int64_t padded = (columns + 63) / 64 * 64, fine_panels = fine_dims_ / kPanel;
    bool right = columns_ == columns && padded_ == padded && mean_.size() == size(columns) &&
                 signs_.size() == size(padded) && mixed_rows_ >= 1 && padded_ % (16 * mixed_rows_) == 0;
    if (raw_) {
        return right && fine_dims_ == 0 && whole_dims_ == 0 && lifted_ == coarse_dims_ && panels_.empty() &&
               coarse_dims_ == (columns <= kPanel ? (columns + 15) / 16 * 16 : padded);
    }
    for (const Buffer<float>& panel : panels_) right = right && panel.size() == size(columns * kPanel);
    return right && coarse_dims_ == kPanel && fine_panels >= 0 && fine_dims_ == fine_panels * kPanel &&
           lifted_ == coarse_dims_ + fine_dims_ && panels_.size() == size(1 + fine_panels) &&
           (whole_dims_ == 0 || whole_dims_ == padded) && coarse_directions_ >= 0 && coarse_directions_ < kPanel &&
           fine_directions_ >= 0 && fine_directions_ <= std::max<std::int64_t>(0, fine_dims_ - 2);
}

#define TTT4AS_INSTANTIATE(T)                                                        \
    template void Sketch::fit_directions(const Matrix<const T>&, int, int);          \
    template void Sketch::fit_raw(const Matrix<const T>&, int);                      \
    template void Sketch::place(const T* const*, int, Encoded&, std::int8_t*) const; \
    template void Sketch::encode(const T* const*, int, Encoded&) const;
TTT4AS_INSTANTIATE(float)
TTT4AS_INSTANTIATE(double)
#undef TTT4AS_INSTANTIATE

}  // namespace ttt4as
