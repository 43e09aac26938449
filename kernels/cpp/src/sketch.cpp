// Computing sketches; see sketch.hpp for the bound and what each error stands for.
#include "sketch.hpp"

#include <algorithm>
#include <cmath>

#include "processor.hpp"
#include "sketch_errors.hpp"
#include "ttt4as/simd.hpp"

namespace ttt4as {
namespace {

constexpr std::int64_t kSecond = kPanel - 2;  // directions of the second codes
constexpr double kFarthest = 1e9;             // |c| above which codes mean nothing and float sums might overflow

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
#if defined(TTT4AS_HAVE_AMX)
    static const bool tiles = isa() == Isa::amx && request_amx();
    static const SketchKernels with_tiles = [] {
        SketchKernels table = avx512::sketch_table_vnni;
        table.keys = avx512::keys_by_tiles;
        return table;
    }();
    if (tiles) return with_tiles;
#endif
#if defined(TTT4AS_HAVE_X86_VARIANTS)
    static const bool vnni = __builtin_cpu_supports("avx512vnni");
    if (isa() >= Isa::avx512) return vnni ? avx512::sketch_table_vnni : avx512::sketch_table;
#if defined(TTT4AS_HAVE_AVX_VNNI)
    static const bool avx_vnni = has_avx_vnni();
    if (isa() == Isa::avx2 && avx_vnni) return avx2::sketch_table_vnni;
#endif
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
    template void Sketch::place(const T* const*, int, Encoded&, std::int8_t*) const; \
    template void Sketch::encode(const T* const*, int, Encoded&) const;
TTT4AS_INSTANTIATE(float)
TTT4AS_INSTANTIATE(double)
#undef TTT4AS_INSTANTIATE

}  // namespace ttt4as
