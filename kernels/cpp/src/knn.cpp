// The search of knn.hpp. Eight queries at a time meet one segment of the bank after the other; see Searcher::segment.
#include "ttt4as/knn.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "knn_candidates.hpp"
#include "knn_dense.hpp"
#include "sketch.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

// Queries that share a pass over the codes, and strips whose keys lie in the cache at once: 512 KiB of them in all.
// Many queries where the codes are those of all coordinates, which come from farther away.
constexpr std::int64_t kGroup = 8, kSegment = 256;
constexpr std::int64_t kRawGroup = 32, kRawSegment = 64;
constexpr double kRawPatience = 1.0 / 16;       // a survivor costs as much as the products with as many points
constexpr std::int64_t kProbes = 16;            // queries that tell whether a set of them has structure to use
constexpr std::int64_t kRawColumns = 8192;      // more would overflow a key
constexpr std::int64_t kWideColumns = 320;      // from here on two lines of fine codes a point pay
constexpr std::int32_t kLeastKey = -(1 << 29);  // below the key of every point there is, above that of every absent one
constexpr std::int32_t kMostKey = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kFirstLines = 512;  // bytes of a row to ask for early: the processor then sees the stream
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What one thread needs; grows to its size once.
struct Scratch {
    Encoded encoded[kRawGroup / kQuad];
    Buffer<double> rows;  // the queries in double
    Buffer<std::int32_t> keys, best;
    std::vector<std::int32_t> order;
    Buffer<std::int32_t> positions, survivor_keys;  // of those that the coarse bound leaves over
    Buffer<std::int32_t> distances;                 // between codes
    std::vector<std::uint64_t> candidates;          // of the fine bound
    Nearest nearest[kRawGroup];
    std::int64_t fine = 0, whole = 0, measured = 0;
};

double measure(const SketchKernels& kernels, const double* query, const float* row, std::int64_t n, double limit) {
    return kernels.squared_float(query, row, n, limit);
}
double measure(const SketchKernels& kernels, const double* query, const double* row, std::int64_t n, double limit) {
    return kernels.squared_double(query, row, n, limit);
}

// At most one above `value`.
std::int32_t to_key(double value) {
    if (!(value > kLeastKey)) return kLeastKey;
    return value < kMostKey ? static_cast<std::int32_t>(value) : kMostKey;
}

void fetch(const void* memory, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(memory) + i);
}

}  // namespace

class KnnIndex::Impl {
  public:
    virtual ~Impl() = default;
    virtual std::int64_t size() const noexcept = 0;
    virtual std::int64_t dim() const noexcept = 0;
    virtual std::int64_t bytes() const noexcept = 0;
    virtual void save(const BlockWriter::Sink& sink) const = 0;
    virtual void search(Matrix<const float>, std::int64_t, float*, std::int64_t*, int) const = 0;
    virtual void search(Matrix<const double>, std::int64_t, float*, std::int64_t*, int) const = 0;

    mutable std::atomic<std::int64_t> queries{0}, unstructured{0}, dense{0}, fine{0}, whole{0}, measured{0};
};

namespace {

// A sketch with the codes of the whole bank.
struct View {
    const Sketch* sketch;
    const Strips* strips;
    std::int64_t group, segment;
    double patience;  // the share of the points that may be left over before a query is given up
};

template <class T>
class IndexOf final : public KnnIndex::Impl {
  public:
    IndexOf(Matrix<const T> bank, int threads) : bank_(bank), kernels_(sketch_kernels()) {
        check_bank();
        if (raw_only_) {
            sketch_.fit_raw(bank, threads);
        } else {
            sketch_.fit_directions(bank, bank.cols < kWideColumns ? 1 : 2, threads);
        }
        const std::vector<std::int32_t> order = order_by_norm(sketch_, bank, threads);
        order_.resize(order.size());
        std::copy(order.begin(), order.end(), order_.own());
        strips_.build(sketch_, bank, order, threads);
    }

    IndexOf(Matrix<const T> bank, const void* prepared, std::size_t bytes, bool verify)
        : bank_(bank), kernels_(sketch_kernels()) {
        check_bank();
        BlockReader reader(prepared, bytes, header(), verify);
        std::uint64_t print = 0;
        reader(print);
        if (print != fingerprint()) throw InvalidArgument("prepared: expected the codes of this bank, got another's");
        fields(*this, reader);
        const auto rows = static_cast<std::size_t>(bank.rows);
        bool fits = order_.size() == rows && sketch_.fits(bank.cols) && strips_.fits(sketch_, bank.rows);
        if (raw_strips_.strips())
            fits = fits && raw_sketch_.fits(bank.cols) && raw_strips_.fits(raw_sketch_, bank.rows);
        for (std::size_t i = 0; fits && i < rows; ++i) fits = order_[i] >= 0 && order_[i] < bank.rows;
        reader.require(fits);
    }

    std::int64_t size() const noexcept override { return bank_.rows; }
    std::int64_t dim() const noexcept override { return bank_.cols; }
    std::int64_t bytes() const noexcept override {
        std::lock_guard<std::mutex> lock(raw_mutex_);
        return strips_.bytes() + raw_strips_.bytes() + static_cast<std::int64_t>(order_.bytes() + lengths_.bytes());
    }
    void search(Matrix<const float> q, std::int64_t k, float* d, std::int64_t* i, int threads) const override {
        run(q, k, d, i, threads);
    }
    void search(Matrix<const double> q, std::int64_t k, float* d, std::int64_t* i, int threads) const override {
        run(q, k, d, i, threads);
    }

    void save(const BlockWriter::Sink& sink) const override {
        std::lock_guard<std::mutex> lock(raw_mutex_);
        BlockHeader head = header();
        for (const BlockWriter::Sink* to : {static_cast<const BlockWriter::Sink*>(nullptr), &sink}) {
            if (to) sink(&head, sizeof head);
            BlockWriter writer(to);
            writer(fingerprint());
            fields(*this, writer);
            if (!to) writer.finish(head);
        }
    }

  private:
    void check_bank() {
        const Matrix<const T>& bank = bank_;
        if (bank.rows < 1 || bank.cols < 1 || bank.rows > std::numeric_limits<std::int32_t>::max() - kStrip) {
            throw InvalidArgument("bank: expected 1 to 2147483583 rows and at least 1 column, got (" +
                                  std::to_string(bank.rows) + ", " + std::to_string(bank.cols) + ")");
        }
        raw_only_ = bank.cols <= kPanel;
    }

    BlockHeader header() const {
        BlockHeader head = {};
        std::memcpy(head.magic, BlockHeader::kMagic, sizeof head.magic);
        head.version = BlockHeader::kVersion;
        head.element = sizeof(T);
        head.rows = bank_.rows;
        head.cols = bank_.cols;
        return head;
    }

    // A checksum of 64 rows, evenly spread.
    std::uint64_t fingerprint() const {
        constexpr std::int64_t kRows = 64;
        Checksum sum;
        for (std::int64_t i = 0; i < std::min(kRows, bank_.rows); ++i) {
            const double place =
                double(i) * double(bank_.rows - 1) / double(std::max<std::int64_t>(1, std::min(kRows, bank_.rows) - 1));
            sum.add(bank_.row(static_cast<std::int64_t>(place)), static_cast<std::size_t>(bank_.cols) * sizeof(T));
        }
        return sum.value();
    }

    template <class Self, class Archive>
    static void fields(Self& self, Archive& archive) {
        Sketch::fields(self.sketch_, archive);
        Sketch::fields(self.raw_sketch_, archive);
        archive(self.order_);
        Strips::first_fields(self.strips_, archive);
        Strips::first_fields(self.raw_strips_, archive);
        archive.rest();
        Strips::other_fields(self.strips_, archive);
        Strips::other_fields(self.raw_strips_, archive);
    }

    // Scratch of one call, kept for the next.
    struct Lease {
        const IndexOf& index;
        std::unique_ptr<std::vector<Scratch>> scratch;

        Lease(const IndexOf& owner, int threads) : index(owner) {
            std::unique_lock<std::mutex> lock(index.scratch_mutex_);
            if (!index.free_scratch_.empty()) {
                scratch = std::move(index.free_scratch_.back());
                index.free_scratch_.pop_back();
            }
            lock.unlock();
            if (!scratch) scratch = std::make_unique<std::vector<Scratch>>();
            if (scratch->size() < static_cast<std::size_t>(threads)) scratch->resize(threads);
        }
        Lease(const Lease&) = delete;
        ~Lease() {
            std::lock_guard<std::mutex> lock(index.scratch_mutex_);
            if (index.free_scratch_.size() < kKeptScratch) index.free_scratch_.push_back(std::move(scratch));
        }
    };

    template <class Q>
    void run(Matrix<const Q> query, std::int64_t k, float* distances, std::int64_t* indices, int threads) const {
        if (query.cols != bank_.cols) {
            throw InvalidArgument("query: expected " + std::to_string(bank_.cols) + " columns, got " +
                                  std::to_string(query.cols));
        }
        if (k < 1 || k > bank_.rows) {
            throw InvalidArgument("k: expected an integer in [1, " + std::to_string(bank_.rows) + "], got " +
                                  std::to_string(k));
        }
        if (query.rows < 1) return;
        std::vector<std::int64_t> probes, others, raw;
        for (std::int64_t i = 0; i < query.rows; ++i) {
            const bool probe = query.rows <= kProbes || i * kProbes / query.rows != (i - 1) * kProbes / query.rows;
            (i == 0 || probe ? probes : others).push_back(i);
        }
        std::vector<std::uint8_t> hard(query.rows, 0);
        const auto search_some = [&](const std::vector<std::int64_t>& which) {
            pass(query, which, directions(), hard, k, distances, indices, threads);
            for (const std::int64_t i : which) {
                if (hard[i]) raw.push_back(i);
            }
        };
        search_some(probes);
        // Where every probe was in vain the others are spared the attempt: theirs would be, most likely.
        if (raw.size() == probes.size()) {
            raw.insert(raw.end(), others.begin(), others.end());
        } else {
            search_some(others);
        }
        queries += query.rows;
        unstructured += static_cast<std::int64_t>(raw.size());
        if (raw.empty()) return;
        std::vector<std::int64_t> rest;
        if (!raw_only_ && bank_.cols <= kRawColumns) {
            std::fill(hard.begin(), hard.end(), std::uint8_t{0});
            pass(query, raw, raw_view(threads), hard, k, distances, indices, threads);
            for (const std::int64_t i : raw) {
                if (hard[i]) rest.push_back(i);
            }
        } else {
            rest.swap(raw);
        }
        if (!rest.empty()) search_densely(query, rest, k, distances, indices, resolve_threads(threads));
    }

    template <class Q>
    void search_densely(Matrix<const Q> query, const std::vector<std::int64_t>& which, std::int64_t k, float* distances,
                        std::int64_t* indices, int threads) const {
        {
            std::lock_guard<std::mutex> lock(raw_mutex_);
            if (lengths_.size() == 0) {
                lengths_.resize(static_cast<std::size_t>(bank_.rows));
                measure_lengths(bank_, threads, lengths_.data());
            }
        }
        std::atomic<std::int64_t> pairs{0};
        dense_search(
            bank_, lengths_.data(), query, which, k, threads,
            [&](const double* row, std::int64_t id, double limit) {
                pairs.fetch_add(1, std::memory_order_relaxed);
                return measure(kernels_, row, bank_.row(id), bank_.cols, limit);
            },
            [&](std::int64_t id, Nearest& nearest) { nearest.write(distances + id * k, indices + id * k); });
        dense += static_cast<std::int64_t>(which.size());
        measured += pairs;
    }

    // A survivor costs about 60 cycles, the codes of all coordinates one for 64 of them.
    View directions() const {
        const double patience =
            raw_only_ ? kRawPatience : static_cast<double>(std::min<std::int64_t>(bank_.cols, 1920)) / 3840;
        return {&sketch_, &strips_, kGroup, kSegment, patience};
    }

    // Codes of all coordinates, made when they are first needed.
    View raw_view(int threads) const {
        std::lock_guard<std::mutex> lock(raw_mutex_);
        if (raw_strips_.strips() == 0) {
            raw_sketch_.fit_raw(bank_, threads);
            raw_strips_.build(raw_sketch_, bank_, {order_.data(), order_.data() + order_.size()}, threads);
        }
        return {&raw_sketch_, &raw_strips_, kRawGroup, kRawSegment, kRawPatience};
    }

    template <class Q>
    void pass(Matrix<const Q> query, const std::vector<std::int64_t>& which, View view, std::vector<std::uint8_t>& hard,
              std::int64_t k, float* distances, std::int64_t* indices, int threads) const {
        const std::int64_t count = static_cast<std::int64_t>(which.size());
        Lease lease(*this, resolve_threads(threads));
        std::vector<Scratch>& scratch = *lease.scratch;
        const std::int64_t each = view.group;
        parallel_for((count + each - 1) / each, threads, [&](std::int64_t group, int worker) {
            const std::int64_t* ids = which.data() + group * each;
            const int n = static_cast<int>(std::min(each, count - group * each));
            search_group(query, ids, n, view, hard, k, scratch[worker]);
            for (int q = 0; q < n; ++q) {
                if (hard[ids[q]]) continue;
                scratch[worker].nearest[q].write(distances + ids[q] * k, indices + ids[q] * k);
            }
        });
        for (Scratch& part : scratch) {
            fine += part.fine;
            whole += part.whole;
            measured += part.measured;
            part.fine = part.whole = part.measured = 0;
        }
    }

    template <class Q>
    void search_group(Matrix<const Q> query, const std::int64_t* ids, int n, View view, std::vector<std::uint8_t>& hard,
                      std::int64_t k, Scratch& scratch) const {
        const std::int64_t columns = bank_.cols, dims = view.sketch->coarse_dims(), strips = view.strips->strips();
        const std::int64_t segment = std::min(view.segment, strips), stride = segment * kStrip;
        scratch.rows.resize(view.group * columns);
        scratch.keys.resize(view.group * stride);
        scratch.best.resize(view.group * segment);
        scratch.positions.resize(stride);
        scratch.survivor_keys.resize(stride);
        scratch.distances.resize(stride);
        for (int q = 0; q < n; ++q) {
            for (std::int64_t i = 0; i < columns; ++i) scratch.rows[q * columns + i] = double(query.row(ids[q])[i]);
            scratch.nearest[q].start(static_cast<std::size_t>(k));
        }
        const int quads = (n + kQuad - 1) / kQuad;
        for (int b = 0; b < quads; ++b) {
            const double* rows[kQuad] = {};
            const int m = std::min<int>(kQuad, n - b * kQuad);
            for (int q = 0; q < m; ++q) rows[q] = scratch.rows.data() + (b * kQuad + q) * columns;
            view.sketch->encode(rows, m, scratch.encoded[b]);
        }
        for (std::int64_t begin = 0; begin < strips; begin += segment) {
            const std::int64_t here = std::min(segment, strips - begin);
            for (std::int64_t s = 0; s < here; ++s) {
                for (int b = 0; b < quads; ++b) {
                    const Encoded& encoded = scratch.encoded[b];
                    kernels_.keys(view.strips->strip(begin + s), encoded.coarse.data(), encoded.words.data(), dims,
                                  view.strips->half_norms(begin + s),
                                  scratch.keys.data() + b * kQuad * stride + s * kStrip, stride,
                                  scratch.best.data() + b * kQuad * segment + s, segment);
                }
            }
            for (int q = 0; q < n; ++q) {
                if (hard[ids[q]]) continue;
                if (!search_segment(view, q, begin, here, stride, segment, scratch)) hard[ids[q]] = 1;
            }
        }
    }

    void measure_at(int q, std::int32_t position, Scratch& scratch) const {
        Nearest& nearest = scratch.nearest[q];
        const std::int32_t id = order_[position];
        nearest.offer(
            measure(kernels_, scratch.rows.data() + q * bank_.cols, bank_.row(id), bank_.cols, nearest.worst()), id);
        ++scratch.measured;
    }

    // The points of the highest keys fill the heap: they are hard to beat. False if they are all of the segment.
    bool fill(int q, std::int64_t begin, std::int64_t strips, const std::int32_t* keys, const std::int32_t* best,
              std::int32_t& seen, Scratch& scratch) const {
        const Nearest& nearest = scratch.nearest[q];
        const std::int64_t wanted = static_cast<std::int64_t>(nearest.k - nearest.heap.size());
        const std::int64_t points = std::min(strips * kStrip, bank_.rows - begin * kStrip);
        if (wanted == 0) return true;
        seen = wanted < points ? nth_key(keys, best, strips, wanted, scratch.order) : kLeastKey;
        std::int64_t count = 0;
        for (std::int64_t s = 0; s < strips; ++s) {
            if (best[s] < seen) continue;
            for (std::uint64_t hits = kernels_.between(keys + s * kStrip, seen, kMostKey); hits; hits &= hits - 1) {
                const std::int64_t at = s * kStrip + __builtin_ctzll(hits);
                scratch.positions[count] = static_cast<std::int32_t>(begin * kStrip + at);
                scratch.survivor_keys[count++] = keys[at];
            }
        }
        if (2 * wanted < count) {  // the bounds may rule out the others yet
            scratch.order.assign(scratch.survivor_keys.data(), scratch.survivor_keys.data() + count);
            std::nth_element(scratch.order.begin(), scratch.order.begin() + (2 * wanted - 1), scratch.order.end(),
                             std::greater<std::int32_t>());
            seen = scratch.order[2 * wanted - 1];
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (scratch.survivor_keys[i] >= seen) fetch(bank_.row(order_[scratch.positions[i]]), kFirstLines);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (scratch.survivor_keys[i] >= seen) measure_at(q, scratch.positions[i], scratch);
        }
        return wanted < points;
    }

    // Lets the points of one segment compete for query q. False if the bounds leave too much.
    bool search_segment(View view, int q, std::int64_t begin, std::int64_t strips, std::int64_t stride,
                        std::int64_t segment, Scratch& scratch) const {
        const Encoded& encoded = scratch.encoded[q / kQuad];
        const int lane = q % kQuad;
        const std::int32_t* keys = scratch.keys.data() + q * stride;
        const std::int32_t* best = scratch.best.data() + q * segment;
        Nearest& nearest = scratch.nearest[q];
        const std::int64_t points = std::min(strips * kStrip, bank_.rows - begin * kStrip);

        const double level = double(encoded.level[lane]);  // |codes_q - codes_p|^2 >= level - 2 * key

        std::int32_t seen = kMostKey;  // points with a key from here on have been measured
        if (!fill(q, begin, strips, keys, best, seen, scratch)) return true;

        // What the coarse bound leaves over.
        const double step = view.sketch->coarse_step(), scale = view.sketch->scale();
        const double reach = std::sqrt(nearest.worst()) * scale * (1.0 + 1e-6);
        const std::int64_t most = 64 + static_cast<std::int64_t>(view.patience * static_cast<double>(points));
        const std::int64_t fine_dims = view.sketch->fine_dims();
        std::int64_t left = 0;
        const double own = reach + encoded.coarse_error[lane], inverse = 1.0 / step;
        for (std::int64_t s = 0; s < strips; ++s) {
            const double radius = (own + view.strips->coarse_error(begin + s)) * inverse;
            const std::int32_t least = to_key((level - radius * radius) * 0.5 - 2.0);
            if (best[s] < least || least >= seen) continue;
            for (std::uint64_t hits = kernels_.between(keys + s * kStrip, least, seen); hits; hits &= hits - 1) {
                const std::int64_t at = s * kStrip + __builtin_ctzll(hits);
                const auto position = static_cast<std::int32_t>(begin * kStrip + at);
                scratch.positions[left] = position;
                scratch.survivor_keys[left++] = keys[at];
                fetch(view.strips->fine(position), fine_dims);
            }
            if (left > most) return false;
        }

        // What the fine bound leaves over, nearest first.
        rank(view, q, level, left, scratch);
        measure_candidates(view, q, scratch);
        return true;
    }

    // Measures the candidates that the whole codes leave over, until the bounds of the rest are beyond the k-th
    // nearest.
    void measure_candidates(View view, int q, Scratch& scratch) const {
        constexpr std::size_t kBatch = 8;
        const Encoded& encoded = scratch.encoded[q / kQuad];
        const int lane = q % kQuad;
        const std::int64_t whole_dims = view.sketch->whole_dims();
        const double step = view.sketch->whole_step() * (1.0 - 1e-9), scale = view.sketch->scale() * (1.0 + 1e-6);
        const std::int8_t* codes = encoded.whole.data() + lane * whole_dims;
        const Nearest& nearest = scratch.nearest[q];
        const std::vector<std::uint64_t>& candidates = scratch.candidates;
        double worst = nearest.worst(), limit = std::sqrt(worst) * scale;
        for (std::size_t begin = 0; begin < candidates.size(); begin += kBatch) {
            const std::size_t end = std::min(begin + kBatch, candidates.size());
            if (bound_of(candidates[begin]) > limit) return;
            std::int32_t positions[kBatch], distances[kBatch];
            for (std::size_t i = begin; i < end; ++i) positions[i - begin] = position_of(candidates[i]);
            for (std::size_t i = end; i < std::min(end + kBatch, candidates.size()); ++i) {
                const std::int32_t next = position_of(candidates[i]);
                if (whole_dims) {
                    fetch(view.strips->whole(next), whole_dims);
                } else {
                    fetch(bank_.row(order_[next]), kFirstLines);
                }
            }
            if (whole_dims) {
                kernels_.code_distances(codes, view.strips->whole(0), whole_dims, positions,
                                        static_cast<std::int64_t>(end - begin), distances);
                scratch.whole += static_cast<std::int64_t>(end - begin);
            }
            for (std::size_t i = begin; i < end; ++i) {
                if (bound_of(candidates[i]) > limit) return;
                const std::int32_t position = positions[i - begin];
                if (whole_dims) {
                    const double radius =
                        limit + encoded.whole_error[lane] + view.strips->whole_error(position / kStrip);
                    if (step * step * double(distances[i - begin]) > radius * radius) continue;
                }
                measure_at(q, position, scratch);
                if (nearest.worst() < worst) {
                    worst = nearest.worst();
                    limit = std::sqrt(worst) * scale;
                }
            }
        }
    }

    // What the fine bound leaves of the first `left` survivors -> scratch.candidates, nearest bound first.
    void rank(View view, int q, double level, std::int64_t left, Scratch& scratch) const {
        const Encoded& encoded = scratch.encoded[q / kQuad];
        const int lane = q % kQuad;
        const std::int64_t fine_dims = view.sketch->fine_dims();
        const double coarse = view.sketch->coarse_step() * view.sketch->coarse_step();
        const double fine = view.sketch->fine_step() * view.sketch->fine_step();
        const double reach = std::sqrt(scratch.nearest[q].worst()) * view.sketch->scale() * (1.0 + 1e-6);
        const std::int8_t* codes = encoded.fine.data() + lane * fine_dims;
        const double own_error = fine_dims ? encoded.error[lane] : encoded.coarse_error[lane];
        scratch.candidates.resize(static_cast<std::size_t>(left));
        if (fine_dims) {
            kernels_.code_distances(codes, view.strips->fine(0), fine_dims, scratch.positions.data(), left,
                                    scratch.distances.data());
            scratch.fine += left;
        }
        std::size_t kept = 0;
        for (std::int64_t i = 0; i < left; ++i) {
            const std::int32_t position = scratch.positions[i];
            const std::int64_t s = position / kStrip;
            double apart = coarse * (level - 2.0 * double(scratch.survivor_keys[i]) - 1.0), error = own_error;
            if (fine_dims) {
                // The fine codes know better what the coarse directions leave out than its length, the last coarse
                // code.
                const int rest = codes[fine_dims - 2] - view.strips->fine(position)[fine_dims - 2];
                const double rest_squared = double(rest * rest);
                apart =
                    std::max(0.0, apart - coarse * rest_squared) + fine * (double(scratch.distances[i]) - rest_squared);
                error += view.strips->error(s);
            } else {
                error += view.strips->coarse_error(s);
            }
            const double most = (reach + error) * (1.0 + 1e-6);
            scratch.candidates[kept] = pack(std::sqrt(std::max(0.0, apart)) - error, position);
            kept += apart <= most * most || !(most < kInfinity) ? 1 : 0;
        }
        scratch.candidates.resize(kept);
        std::sort(scratch.candidates.begin(), scratch.candidates.end());
    }

    Matrix<const T> bank_;
    const SketchKernels& kernels_;
    bool raw_only_ = false;
    Sketch sketch_;
    Strips strips_;
    Kept<std::int32_t> order_;  // ids by position
    mutable std::mutex raw_mutex_;
    mutable Sketch raw_sketch_;
    mutable Strips raw_strips_;
    mutable Buffer<double> lengths_;                // of the rows, once a query needs them
    static constexpr std::size_t kKeptScratch = 4;  // searches at once that leave theirs behind
    mutable std::mutex scratch_mutex_;
    mutable std::vector<std::unique_ptr<std::vector<Scratch>>> free_scratch_;
};

}  // namespace

KnnIndex::KnnIndex(Matrix<const float> bank, int threads) : impl_(new IndexOf<float>(bank, threads)) {}
KnnIndex::KnnIndex(Matrix<const double> bank, int threads) : impl_(new IndexOf<double>(bank, threads)) {}
KnnIndex::KnnIndex(Matrix<const float> bank, const void* prepared, std::size_t bytes, bool verify)
    : impl_(new IndexOf<float>(bank, prepared, bytes, verify)) {}
KnnIndex::KnnIndex(Matrix<const double> bank, const void* prepared, std::size_t bytes, bool verify)
    : impl_(new IndexOf<double>(bank, prepared, bytes, verify)) {}
KnnIndex::~KnnIndex() = default;
KnnIndex::KnnIndex(KnnIndex&&) noexcept = default;
KnnIndex& KnnIndex::operator=(KnnIndex&&) noexcept = default;

std::int64_t KnnIndex::size() const noexcept { return impl_->size(); }
std::int64_t KnnIndex::dim() const noexcept { return impl_->dim(); }
std::int64_t KnnIndex::bytes() const noexcept { return impl_->bytes(); }
void KnnIndex::save(const std::function<void(const void*, std::size_t)>& sink) const { impl_->save(sink); }
KnnIndex::Counts KnnIndex::counts() const noexcept {
    return {impl_->queries, impl_->unstructured, impl_->dense, impl_->fine, impl_->whole, impl_->measured};
}

void KnnIndex::search(Matrix<const float> query, std::int64_t k, float* distances, std::int64_t* indices,
                      int threads) const {
    impl_->search(query, k, distances, indices, threads);
}
void KnnIndex::search(Matrix<const double> query, std::int64_t k, float* distances, std::int64_t* indices,
                      int threads) const {
    impl_->search(query, k, distances, indices, threads);
}

}  // namespace ttt4as
