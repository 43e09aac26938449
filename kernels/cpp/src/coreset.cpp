// The picks of coreset.hpp.
#include "ttt4as/coreset.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "options.hpp"
#include "sketch.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kPicked = -1.0;          // below any squared distance, so that duplicates never bring a pick back
constexpr std::int64_t kTask = 256;       // strips of one task
constexpr std::int64_t kParallel = 1024;  // strips from which waking other threads for one pick pays
constexpr std::int32_t kNever = 1 << 30;  // no key less this reaches a threshold
constexpr std::int32_t kAlways = -(1 << 30);

}  // namespace

class GreedyCoreset::Impl {
  public:
    virtual ~Impl() = default;
    virtual void pick(std::int64_t count, std::int64_t* picks, int threads) = 0;
    virtual std::int64_t bytes() const noexcept = 0;

    std::int64_t picked = 0, measured = 0;
};

namespace {

template <class T>
class CoresetOf final : public GreedyCoreset::Impl {
  public:
    CoresetOf(Matrix<const T> points, std::int64_t start, int threads)
        : points_(points), kernels_(sketch_kernels()), next_(start) {
        check_matrix("points", points, std::numeric_limits<std::int32_t>::max() - kStrip);
        if (start < 0 || start >= points.rows) {
            throw InvalidArgument("start: expected an integer in [0, " + std::to_string(points.rows - 1) + "], got " +
                                  std::to_string(start));
        }
        if (points.cols <= kPanel) {
            sketch_.fit_raw(points, threads);
        } else {
            sketch_.fit_directions(points, 0, threads);
        }
        order_.resize(points.rows);
        for (std::int64_t i = 0; i < points.rows; ++i) order_[i] = static_cast<std::int32_t>(i);
        strips_.build(sketch_, points, order_, threads);
        order_ = {};  // points stay where they are: neighbours in an image are neighbours in a strip
        const std::int64_t strips = strips_.strips();
        nearest_.resize(strips * kStrip);
        limits_.resize(strips * kStrip);
        std::fill(nearest_.begin(), nearest_.begin() + points.rows, kInfinity);
        std::fill(nearest_.begin() + points.rows, nearest_.end(), kPicked);
        std::fill(limits_.begin(), limits_.begin() + points.rows, kAlways);
        std::fill(limits_.begin() + points.rows, limits_.end(), kNever);
        for (std::int64_t s = 0; s < strips; ++s) farthest_.push_back({kInfinity, s * kStrip});
        centre_.resize(points.cols);
        // Most picks are usual points; what the error of an unusual one adds is made up for in `reach_of`.
        std::vector<double> errors(points.rows);
        for (std::int64_t i = 0; i < points.rows; ++i) errors[i] = strips_.point_error(i);
        std::nth_element(errors.begin(), errors.begin() + errors.size() * 9 / 10, errors.end());
        usual_error_ = std::isfinite(errors[errors.size() * 9 / 10]) ? errors[errors.size() * 9 / 10] : 0.0;
    }

    std::int64_t bytes() const noexcept override {
        return strips_.bytes() +
               static_cast<std::int64_t>(nearest_.bytes() + limits_.bytes() + farthest_.size() * sizeof(Farthest));
    }

    void pick(std::int64_t count, std::int64_t* picks, int threads) override {
        if (count < 0 || count > points_.rows - picked) {
            throw InvalidArgument("count: expected an integer in [0, " + std::to_string(points_.rows - picked) +
                                  "], got " + std::to_string(count));
        }
        if (count > 0) check_address("picks", picks);
        for (std::int64_t i = 0; i < count; ++i) {
            picks[i] = next_;
            if (picked + 1 < points_.rows) add(next_, threads);  // may throw: then it is not picked
            ++picked;
        }
    }

  private:
    struct Farthest {
        double squared;
        std::int64_t point;
    };

    // Takes `pick` as a centre, and finds the next.
    void add(std::int64_t pick, int threads) {
        const T* row = points_.row(pick);
        for (std::int64_t i = 0; i < points_.cols; ++i) centre_[i] = double(row[i]);
        sketch_.encode(&row, 1, encoded_);
        nearest_[pick] = kPicked;
        limits_[pick] = kNever;
        const std::int32_t reach = reach_of(encoded_);
        const std::int64_t strips = strips_.strips(), tasks = (strips + kTask - 1) / kTask;
        counts_.assign(tasks, 0);
        parallel_for(tasks, strips < kParallel ? 1 : threads, [&](std::int64_t task, int) {
            for (std::int64_t s = task * kTask; s < std::min(strips, (task + 1) * kTask); ++s) {
                const bool holds_pick = s == pick / kStrip;
                if (update(s, reach, counts_[task]) || holds_pick) find_farthest(s);
            }
        });
        Farthest best{-kInfinity, 0};
        for (std::int64_t s = 0; s < strips; ++s) {
            if (farthest_[s].squared > best.squared) best = farthest_[s];
        }
        next_ = best.point;
        for (const std::int64_t count : counts_) measured += count;
    }

    // A point p may come nearer only if key_p - limit_p >= reach. From
    //     step |codes_c - codes_p| <= |c - p| + error_c + error_p < nearest_p + error_c + error_p,
    // squared, 2 key_p >= |codes_c|^2 + 256 sum(codes_c) + |codes_p|^2 - ((nearest_p + error_c + error_p) / step)^2.
    // limit_p holds what depends on p, with the usual error for error_c; an unusual one widens the square by at most
    // (error_c - usual) (2 (farthest + greatest error_p) + usual + error_c).
    std::int32_t reach_of(const Encoded& encoded) {
        const double error = encoded.coarse_error[0], step = sketch_.coarse_step();
        double level = double(encoded.level[0]);
        if (error > usual_error_) {
            double farthest = 0, greatest = 0;
            for (std::int64_t s = 0; s < strips_.strips(); ++s) {
                farthest = std::max(farthest, farthest_[s].squared);
                greatest = std::max(greatest, strips_.coarse_error(s));
            }
            farthest = std::sqrt(farthest) * sketch_.scale();
            level -= (error - usual_error_) * (2 * (farthest + greatest) + usual_error_ + error) / (step * step) *
                     (1 + 1e-6);
        }
        return floor_key(level * 0.5 - 1.0);
    }

    // At most `value`, or kAlways.
    static std::int32_t floor_key(double value) {
        if (!(value > double(kAlways))) return kAlways;
        return static_cast<std::int32_t>(std::min(value, double(kNever)) - (value < 0 ? 1.0 : 0.0));
    }

    std::int32_t limit_of(std::int64_t point) const {
        const double near = std::sqrt(nearest_[point]) * sketch_.scale() * (1.0 + 1e-6);
        const double radius = (near + usual_error_ + strips_.point_error(point)) / sketch_.coarse_step();
        const double half = double(strips_.half_norms(point / kStrip)[point % kStrip]);
        return floor_key(half - radius * radius * 0.5 - 2.0);
    }

    // Measures the points of a strip that the bound leaves over. True if any came nearer.
    bool update(std::int64_t s, std::int32_t reach, std::int64_t& count) {
        std::uint64_t hits;
        if (reach <= kAlways / 2) {
            hits = ~std::uint64_t(0);  // a pick whose codes say nothing
        } else {
            hits = kernels_.reach(strips_.strip(s), encoded_.coarse.data(), encoded_.words.data(),
                                  sketch_.coarse_dims(), limits_.data() + s * kStrip, reach);
        }
        bool changed = false;
        for (; hits; hits &= hits - 1) {
            const std::int64_t point = s * kStrip + __builtin_ctzll(hits);
            if (nearest_[point] < 0) continue;
            ++count;
            const double squared = measure(kernels_, centre_.data(), points_.row(point), points_.cols, nearest_[point]);
            if (squared < nearest_[point]) {
                nearest_[point] = squared;
                limits_[point] = limit_of(point);
                changed = true;
            }
        }
        return changed;
    }

    void find_farthest(std::int64_t s) {
        Farthest best{-kInfinity, s * kStrip};
        for (std::int64_t i = s * kStrip; i < (s + 1) * kStrip; ++i) {
            if (nearest_[i] > best.squared) best = {nearest_[i], i};
        }
        farthest_[s] = best;
    }

    Matrix<const T> points_;
    const SketchKernels& kernels_;
    std::int64_t next_;
    Sketch sketch_;
    Strips strips_;
    std::vector<std::int32_t> order_;
    Buffer<double> nearest_;          // squared distance of each point to the picks, kPicked for these
    Buffer<std::int32_t> limits_;     // see reach_of
    std::vector<Farthest> farthest_;  // of each strip
    std::vector<double> centre_;
    std::vector<std::int64_t> counts_;
    Encoded encoded_;
    double usual_error_ = 0.0;
};

}  // namespace

GreedyCoreset::GreedyCoreset(Matrix<const float> points, std::int64_t start, int threads)
    : impl_(new CoresetOf<float>(points, start, threads)) {}
GreedyCoreset::GreedyCoreset(Matrix<const double> points, std::int64_t start, int threads)
    : impl_(new CoresetOf<double>(points, start, threads)) {}
GreedyCoreset::~GreedyCoreset() = default;
GreedyCoreset::GreedyCoreset(GreedyCoreset&&) noexcept = default;
GreedyCoreset& GreedyCoreset::operator=(GreedyCoreset&&) noexcept = default;

void GreedyCoreset::pick(std::int64_t count, std::int64_t* picks, int threads) { impl_->pick(count, picks, threads); }
std::int64_t GreedyCoreset::picked() const noexcept { return impl_->picked; }
std::int64_t GreedyCoreset::bytes() const noexcept { return impl_->bytes(); }
std::int64_t GreedyCoreset::measured() const noexcept { return impl_->measured; }

}  // namespace ttt4as
