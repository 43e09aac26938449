// Sketches: one byte a direction of each point, from which distances are bounded from below, exactly.
//
// A point x becomes c = (x - mean) * 2^k in float, and c its coordinates t = B^T c in a few directions (the leading
// principal ones of a sample, mixed so that all spread alike) with the length of what these leave out,
// r = sqrt(|c|^2 - |t|^2). B is scaled to be a contraction, B B^T <= I whatever the rounding, so that
//     |c_x - c_y|^2 = |t_x - t_y|^2 + |(I - B B^T)^(1/2) (c_x - c_y)|^2 >= |t_x - t_y|^2 + (r_x - r_y)^2,
// the second term by the triangle inequality. (t, r) is rounded to integer codes times a step, and `error` bounds how
// far this rounding and all before it moved it, so that
//     2^k |x - y| >= step * |codes_x - codes_y| - error_x - error_y.
// Codes end at +-127, which is no error: clipping both points to a box brings them no farther apart.
// How good the directions are decides how many pairs the bound leaves over, never the answer.
#pragma once

#include <cstdint>
#include <vector>

#include "prepared.hpp"
#include "sketch_kernels.hpp"
#include "ttt4as/common.hpp"

namespace ttt4as {

// Codes of up to four points. Coarse codes are compared with every point, second ones with the strips of which these
// leave many over, fine ones with each point left over, and whole ones, of all coordinates of c, with the last few.
struct Encoded {
    Buffer<std::int8_t> coarse;  // (4, coarse_dims)
    Buffer<std::int16_t> words;  // the same, widened
    // kPanel each: more directions with the step of the coarse codes, less the last coarse code, and the rest's length.
    // A square is taken out again by the code of a point times that of a query with the other sign, which is here.
    Buffer<std::int8_t> second;
    Buffer<std::int16_t> second_words;
    Buffer<std::int8_t> fine;   // (4, fine_dims)
    Buffer<std::int8_t> whole;  // (4, whole_dims)
    std::int64_t level[kQuad];  // |coarse|^2 + 256 sum(coarse): |coarse - point|^2 = level - 2 (key + |point|^2 mod 2)
    std::int64_t second_level[kQuad];  // as `level`, for the sum of both keys
    double coarse_error[kQuad];        // in units of c; infinite where the point is out of range
    double second_error[kQuad];        // of coarse and second codes together
    double error[kQuad];               // of coarse and fine codes together
    double whole_error[kQuad];
    double norm[kQuad];  // |c|
    // Scratch of Sketch::encode.
    Buffer<float> centred, coordinates;
    float second_rest[kQuad];
};

class Sketch {
  public:
    // Fits to a sample of the rows. Coarse codes: 63 directions and the rest's length. Fine ones: 64 * fine_panels - 2
    // more directions, the last coarse code once more, and the rest's length. Second ones: the first 62 of these
    // directions. fine_panels 0: coarse codes alone.
    template <class T>
    void fit_directions(const Matrix<const T>& rows, int fine_panels, int threads);
    // Coarse codes of the coordinates of c themselves, and no others.
    template <class T>
    void fit_raw(const Matrix<const T>& rows, int threads);

    std::int64_t coarse_dims() const noexcept { return coarse_dims_; }
    std::int64_t second_dims() const noexcept { return fine_dims_ ? kPanel : 0; }
    std::int64_t fine_dims() const noexcept { return fine_dims_; }
    std::int64_t whole_dims() const noexcept { return whole_dims_; }
    double scale() const noexcept { return scale_; }  // 2^k
    double coarse_step() const noexcept { return coarse_step_; }
    double fine_step() const noexcept { return fine_step_; }
    double whole_step() const noexcept { return whole_step_; }
    // Points with a longer c are better kept apart: clipped codes tell little of them.
    double usual_norm() const noexcept { return usual_norm_; }

    // The codes of n <= 4 rows; codes of the missing ones are zero.
    template <class T>
    void encode(const T* const* rows, int n, Encoded& out) const;
    // Codes (4, kPanel) that tell where n <= 4 rows lie: in the coarse directions, or in the first coordinates of c.
    template <class T>
    void place(const T* const* rows, int n, Encoded& scratch, std::int8_t* codes) const;

    // Every field, for BlockWriter and BlockReader.
    template <class Self, class Archive>
    static void fields(Self& self, Archive& archive) {
        archive(self.raw_), archive(self.columns_), archive(self.coarse_dims_), archive(self.fine_dims_);
        archive(self.whole_dims_), archive(self.lifted_), archive(self.coarse_directions_);
        archive(self.fine_directions_), archive(self.scale_), archive(self.usual_norm_), archive(self.coarse_step_);
        archive(self.fine_step_), archive(self.whole_step_), archive(self.coarse_rest_), archive(self.fine_rest_);
        archive(self.second_rest_);
        archive(self.mean_), archive(self.signs_), archive(self.padded_), archive(self.mixed_rows_);
        archive(self.mix_factor_), archive(self.projection_error_);
        std::uint64_t panels = self.panels_.size();
        archive(panels);
        if constexpr (Archive::kReads) {
            archive.require(panels <= 64);
            self.panels_.resize(panels);
        }
        for (auto& panel : self.panels_) archive(panel);
    }
    // Whether what was read fits together, for points of `columns` coordinates.
    bool fits(std::int64_t columns) const noexcept;

  private:
    template <class T>
    void fit_frame(const Matrix<const T>& rows, std::vector<std::int64_t>& sample);
    void fit_basis(const std::vector<float>& sample, std::int64_t rows, int threads);
    template <class T>
    void fit_steps(const Matrix<const T>& rows, const std::vector<std::int64_t>& sample, int threads);
    void fit_mixing();
    template <class T>
    double centre(const T* row, float* out) const;
    template <class T>
    void centre(const T* const* rows, int n, Encoded& out) const;
    // (t, r) of four rows of out.centred -> out.coordinates, and out.centred mixed; their errors before rounding to
    // codes.
    void lift(Encoded& out) const;
    void encode_second(int q, float moved, double length, Encoded& out) const;

    bool raw_ = false;
    std::int64_t columns_ = 0, coarse_dims_ = 0, fine_dims_ = 0, whole_dims_ = 0, lifted_ = 0;
    std::int64_t coarse_directions_ = 0, fine_directions_ = 0;
    double scale_ = 1.0, usual_norm_ = 0.0;
    double coarse_step_ = 1.0, fine_step_ = 1.0, whole_step_ = 1.0;
    double coarse_rest_ = 0.0, second_rest_ = 0.0, fine_rest_ = 0.0;  // means of r, subtracted
    std::vector<double> mean_;
    std::vector<Buffer<float>> panels_;  // (columns, kPanel) each
    // Coordinates that a few points have large would set the step for all: they are spread over others first.
    Buffer<float> signs_;
    std::int64_t padded_ = 0, mixed_rows_ = 1;
    float mix_factor_ = 1.0f;
    double projection_error_ = 0.0;
};

template <>
double Sketch::centre(const float* row, float* out) const;
template <>
double Sketch::centre(const double* row, float* out) const;

// The coarse codes of a point set in strips, and what a threshold on keys needs of each point.
class Strips {
  public:
    // order: point ids by position.
    template <class T>
    void build(const Sketch& sketch, const Matrix<const T>& rows, const std::vector<std::int32_t>& order, int threads);

    std::int64_t strips() const noexcept { return n_strips_; }
    const std::uint8_t* strip(std::int64_t s) const noexcept { return codes_.data() + s * dims_ * kStrip; }
    // floor(|codes|^2 / 2) of the 64 points of a strip; kAbsent where there is none.
    const std::int32_t* half_norms(std::int64_t s) const noexcept { return half_norms_.data() + s * kStrip; }
    // The same of the second codes; floor((|codes|^2 - 2 last coarse code^2) / 2).
    const std::uint8_t* second(std::int64_t s) const noexcept { return second_.data() + s * second_dims_ * kStrip; }
    const std::int32_t* second_half_norms(std::int64_t s) const noexcept {
        return second_half_norms_.data() + s * kStrip;
    }
    const std::int8_t* fine(std::int64_t position) const noexcept { return fine_.data() + position * fine_dims_; }
    const std::int8_t* whole(std::int64_t position) const noexcept { return whole_.data() + position * whole_dims_; }
    double coarse_error(std::int64_t s) const noexcept { return coarse_errors_[s]; }  // the greatest in a strip
    const double* coarse_errors() const noexcept { return coarse_errors_.data(); }
    const double* errors() const noexcept { return errors_.data(); }
    double second_error(std::int64_t s) const noexcept { return second_errors_[s]; }
    double whole_error(std::int64_t s) const noexcept { return whole_errors_[s]; }
    double point_error(std::int64_t position) const noexcept { return point_errors_[position]; }
    std::int64_t bytes() const noexcept;

    static constexpr std::int32_t kAbsent = 1 << 30;

    // What a search compares every point with, then what it looks up of a few.
    template <class Self, class Archive>
    static void first_fields(Self& self, Archive& archive) {
        archive(self.n_strips_), archive(self.dims_), archive(self.second_dims_), archive(self.fine_dims_);
        archive(self.whole_dims_);
        archive(self.half_norms_), archive(self.coarse_errors_), archive(self.errors_), archive(self.whole_errors_);
        archive(self.point_errors_), archive(self.second_half_norms_), archive(self.second_errors_);
    }
    template <class Self, class Archive>
    static void other_fields(Self& self, Archive& archive) {
        archive(self.codes_), archive(self.second_), archive(self.fine_), archive(self.whole_);
    }
    // Whether what was read fits together, for `rows` points and their sketch.
    bool fits(const Sketch& sketch, std::int64_t rows) const noexcept;

  private:
    std::int64_t n_strips_ = 0, dims_ = 0, second_dims_ = 0, fine_dims_ = 0, whole_dims_ = 0;
    Kept<std::uint8_t> codes_, second_;
    Kept<std::int8_t> fine_, whole_;
    Kept<std::int32_t> half_norms_, second_half_norms_;
    Kept<double> coarse_errors_, second_errors_, errors_, whole_errors_;
    Kept<float> point_errors_;  // of the coarse codes, rounded up
};

// The squared distance of a query and a row; it stops early beyond `limit`, as the kernels do.
inline double measure(const SketchKernels& kernels, const double* query, const float* row, std::int64_t n,
                      double limit) {
    return kernels.squared_float(query, row, n, limit);
}
inline double measure(const SketchKernels& kernels, const double* query, const double* row, std::int64_t n,
                      double limit) {
    return kernels.squared_double(query, row, n, limit);
}

// Ids 0 to rows - 1, in strips of points that lie near each other; those whose c is longer than usual come last. Of the
// others, any `segment` strips in a row are spread over all there are.
template <class T>
std::vector<std::int32_t> order_by_place(const Sketch& sketch, const Matrix<const T>& rows, std::int64_t segment,
                                         int threads);

}  // namespace ttt4as
