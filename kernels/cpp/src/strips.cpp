// The codes of a whole point set; see sketch.hpp.
#include <algorithm>

#include "sketch.hpp"
#include "sketch_errors.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

// The codes of point p into those of its strip; returns their squared length.
std::int64_t interleave(const std::int8_t* from, std::int64_t dims, std::int64_t p, std::uint8_t* strip) {
    std::int64_t squared = 0;
    for (std::int64_t d = 0; d < dims; ++d) {
        squared += from[d] * from[d];
        strip[(d / kQuad * kStrip + p) * kQuad + d % kQuad] = static_cast<std::uint8_t>(from[d] + 128);
    }
    return squared;
}

void raise(Kept<double>& errors, std::int64_t at, double error) { errors.own()[at] = std::max(errors[at], error); }

}  // namespace

template <class T>
void Strips::build(const Sketch& sketch, const Matrix<const T>& rows, const std::vector<std::int32_t>& order,
                   int threads) {
    const std::int64_t count = static_cast<std::int64_t>(order.size());
    n_strips_ = (count + kStrip - 1) / kStrip;
    dims_ = sketch.coarse_dims();
    second_dims_ = sketch.second_dims();
    fine_dims_ = sketch.fine_dims();
    whole_dims_ = sketch.whole_dims();
    codes_.resize(n_strips_ * kStrip * dims_);
    second_.resize(n_strips_ * kStrip * second_dims_);
    second_half_norms_.resize(second_dims_ ? n_strips_ * kStrip : 0);
    second_errors_.resize(second_dims_ ? n_strips_ : 0);
    std::fill_n(second_errors_.own(), second_errors_.size(), 0.0);
    fine_.resize(n_strips_ * kStrip * fine_dims_);
    whole_.resize(n_strips_ * kStrip * whole_dims_);
    half_norms_.resize(n_strips_ * kStrip);
    for (Kept<double>* errors : {&coarse_errors_, &errors_, &whole_errors_}) {
        errors->resize(n_strips_);
        std::fill_n(errors->own(), n_strips_, 0.0);
    }
    point_errors_.resize(n_strips_ * kStrip);
    std::fill_n(point_errors_.own(), n_strips_ * kStrip, 0.0f);
    threads = resolve_threads(threads);  // once, for scratch and tasks alike: the limit may change meanwhile
    std::vector<Encoded> scratch(threads);
    parallel_for(n_strips_, threads, [&](std::int64_t s, int worker) {
        Encoded& encoded = scratch[worker];
        std::uint8_t* codes = codes_.own() + s * kStrip * dims_;
        for (std::int64_t p = 0; p < kStrip; p += kQuad) {
            const std::int64_t first = s * kStrip + p;
            const int n = static_cast<int>(std::max<std::int64_t>(0, std::min<std::int64_t>(kQuad, count - first)));
            const T* points[kQuad] = {};
            for (int q = 0; q < n; ++q) points[q] = rows.row(order[first + q]);
            sketch.encode(points, n, encoded);
            for (int q = 0; q < kQuad; ++q) {
                const std::int8_t* from = encoded.coarse.data() + q * dims_;
                const std::int64_t squared = interleave(from, dims_, p + q, codes);
                half_norms_.own()[first + q] = q < n ? static_cast<std::int32_t>(squared / 2) : kAbsent;
                std::copy_n(encoded.fine.data() + q * fine_dims_, fine_dims_, fine_.own() + (first + q) * fine_dims_);
                std::copy_n(encoded.whole.data() + q * whole_dims_, whole_dims_,
                            whole_.own() + (first + q) * whole_dims_);
                if (second_dims_) {
                    std::int8_t* more = encoded.second.data() + q * second_dims_;
                    const std::int32_t last = from[dims_ - 1];
                    more[second_dims_ - 2] = static_cast<std::int8_t>(last);  // a point's own sign, see Encoded
                    const std::int64_t squares =
                        interleave(more, second_dims_, p + q, second_.own() + s * kStrip * second_dims_);
                    second_half_norms_.own()[first + q] = static_cast<std::int32_t>((squares - 2 * last * last) >> 1);
                    if (q < n) raise(second_errors_, s, encoded.second_error[q]);
                }
                if (q < n) {
                    raise(whole_errors_, s, whole_dims_ ? encoded.whole_error[q] : 0.0);
                    raise(coarse_errors_, s, encoded.coarse_error[q]);
                    raise(errors_, s, encoded.error[q]);
                    point_errors_.own()[first + q] = static_cast<float>(encoded.coarse_error[q] * kSlack);
                }
            }
        }
    });
}

std::int64_t Strips::bytes() const noexcept {
    return static_cast<std::int64_t>(codes_.bytes() + fine_.bytes() + whole_.bytes() + half_norms_.bytes() +
                                     coarse_errors_.bytes() + errors_.bytes() + whole_errors_.bytes() +
                                     point_errors_.bytes() + second_.bytes() + second_half_norms_.bytes() +
                                     second_errors_.bytes());
}

bool Strips::fits(const Sketch& sketch, std::int64_t rows) const noexcept {
    const auto n = static_cast<std::size_t>(n_strips_), points = n * kStrip;
    return n_strips_ == (rows + kStrip - 1) / kStrip && dims_ == sketch.coarse_dims() &&
           fine_dims_ == sketch.fine_dims() && whole_dims_ == sketch.whole_dims() && half_norms_.size() == points &&
           point_errors_.size() == points && coarse_errors_.size() == n && errors_.size() == n &&
           whole_errors_.size() == n && second_dims_ == sketch.second_dims() &&
           second_errors_.size() == (second_dims_ ? n : 0) &&
           second_half_norms_.size() == (second_dims_ ? points : 0) &&
           second_.size() == points * static_cast<std::size_t>(second_dims_) &&
           codes_.size() == points * static_cast<std::size_t>(dims_) &&
           fine_.size() == points * static_cast<std::size_t>(fine_dims_) &&
           whole_.size() == points * static_cast<std::size_t>(whole_dims_);
}

#define TTT4AS_INSTANTIATE(T) \
    template void Strips::build(const Sketch&, const Matrix<const T>&, const std::vector<std::int32_t>&, int);
TTT4AS_INSTANTIATE(float)
TTT4AS_INSTANTIATE(double)
#undef TTT4AS_INSTANTIATE

}  // namespace ttt4as
