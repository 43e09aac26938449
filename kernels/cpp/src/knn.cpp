// The index of knn.hpp: the codes of a bank, what is saved of them, and which way each query goes.
#include "ttt4as/knn.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "knn_dense.hpp"
#include "knn_group.hpp"
#include "late.hpp"
#include "options.hpp"
#include "sketch.hpp"
#include "ttt4as/threads.hpp"

namespace ttt4as {
namespace {

// Queries that share a pass over the codes, and strips whose keys lie in the cache at once: 512 KiB of them in all.
// Many queries where the codes are those of all coordinates, which come from farther away.
constexpr std::int64_t kGroup = 8, kSegment = 256;
constexpr std::int64_t kRawGroup = kMostGroup, kRawSegment = 64;
constexpr double kRawPatience = 1.0 / 16;   // a survivor costs as much as the products with as many points
constexpr std::int64_t kProbes = 16;        // queries that tell whether a set of them has structure to use
constexpr std::int64_t kRawColumns = 8192;  // more would overflow a key
constexpr std::int64_t kWideColumns = 320;  // from here on two lines of fine codes a point pay

}  // namespace

class KnnIndex::Impl {
  public:
    // Where the k neighbours of each query go.
    struct Results {
        std::int64_t k;
        float* distances;
        std::int64_t* indices;
        bool squared;

        void take(std::int64_t query, Nearest& nearest) const {
            nearest.write(distances + query * k, indices + query * k, squared);
        }
    };

    virtual ~Impl() = default;
    virtual std::int64_t size() const noexcept = 0;
    virtual std::int64_t dim() const noexcept = 0;
    virtual std::int64_t bytes() const noexcept = 0;
    virtual void save(const BlockWriter::Sink& sink) const = 0;
    virtual void search(Matrix<const float>, const Results&, int) const = 0;
    virtual void search(Matrix<const double>, const Results&, int) const = 0;

    mutable std::atomic<std::int64_t> queries{0}, unstructured{0}, dense{0}, fine{0}, whole{0}, measured{0};
};

namespace {

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
        const std::vector<std::int32_t> order = order_by_place(sketch_, bank, kRawSegment, threads);
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
        auto raw = std::make_unique<Raw>();
        fields(*this, *raw, reader);
        const auto rows = static_cast<std::size_t>(bank.rows);
        bool fits = order_.size() == rows && sketch_.fits(bank.cols) && strips_.fits(sketch_, bank.rows);
        if (raw->strips.strips())
            fits = fits && raw->sketch.fits(bank.cols) && raw->strips.fits(raw->sketch, bank.rows);
        for (std::size_t i = 0; fits && i < rows; ++i) fits = order_[i] >= 0 && order_[i] < bank.rows;
        reader.require(fits);
        if (raw->strips.strips()) raw_.set(std::move(raw));
    }

    std::int64_t size() const noexcept override { return bank_.rows; }
    std::int64_t dim() const noexcept override { return bank_.cols; }
    std::int64_t bytes() const noexcept override {
        const Raw* raw = raw_.get();
        const Buffer<double>* lengths = lengths_.get();
        return strips_.bytes() + (raw ? raw->strips.bytes() : 0) +
               static_cast<std::int64_t>(order_.bytes() + (lengths ? lengths->bytes() : 0));
    }
    void search(Matrix<const float> q, const Results& to, int threads) const override { run(q, to, threads); }
    void search(Matrix<const double> q, const Results& to, int threads) const override { run(q, to, threads); }

    void save(const BlockWriter::Sink& sink) const override {
        // What is there now: what a search makes meanwhile is not part of it, and the sink may ask the index anything.
        const Raw none, *made = raw_.get();
        const Raw& raw = made ? *made : none;
        BlockHeader head = header();
        for (const BlockWriter::Sink* to : {static_cast<const BlockWriter::Sink*>(nullptr), &sink}) {
            if (to) sink(&head, sizeof head);
            BlockWriter writer(to);
            writer(fingerprint());
            fields(*this, raw, writer);
            if (!to) writer.finish(head);
        }
    }

  private:
    // Codes of all coordinates.
    struct Raw {
        Sketch sketch;
        Strips strips;
    };
    using Scratch = std::unique_ptr<std::vector<GroupScratch>>;

    void check_bank() {
        check_matrix("bank", bank_, std::numeric_limits<std::int32_t>::max() - kStrip);
        raw_only_ = bank_.cols <= kPanel;
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

    template <class Self, class RawCodes, class Archive>
    static void fields(Self& self, RawCodes& raw, Archive& archive) {
        Sketch::fields(self.sketch_, archive);
        Sketch::fields(raw.sketch, archive);
        archive(self.order_);
        Strips::first_fields(self.strips_, archive);
        Strips::first_fields(raw.strips, archive);
        archive.rest();
        Strips::other_fields(self.strips_, archive);
        Strips::other_fields(raw.strips, archive);
    }

    // GroupScratch of one call, kept for the next. Nobody waits for the lock, which a forked child may find taken.
    struct Lease {
        const IndexOf& index;
        Scratch scratch;

        Lease(const IndexOf& owner, int threads) : index(owner) {
            exchange([this](Scratch& free) {
                if (!scratch) scratch = std::move(free);
            });
            if (!scratch) scratch = std::make_unique<std::vector<GroupScratch>>();
            if (scratch->size() < static_cast<std::size_t>(threads)) scratch->resize(threads);
        }
        Lease(const Lease&) = delete;
        ~Lease() {
            exchange([this](Scratch& free) {
                if (!free) free = std::move(scratch);
            });
        }

      private:
        template <class Take>
        void exchange(Take&& take) {
            std::unique_lock<std::mutex> lock(index.scratch_mutex_, std::try_to_lock);
            for (Scratch& free : index.free_scratch_) {
                if (lock.owns_lock()) take(free);
            }
        }
    };

    template <class Q>
    void run(Matrix<const Q> query, const Results& to, int threads) const {
        if (query.cols != bank_.cols) {
            throw InvalidArgument("query: expected " + std::to_string(bank_.cols) + " columns, got " +
                                  std::to_string(query.cols));
        }
        if (to.k < 1 || to.k > bank_.rows) {
            throw InvalidArgument("k: expected an integer in [1, " + std::to_string(bank_.rows) + "], got " +
                                  std::to_string(to.k));
        }
        if (query.rows < 0 || query.rows > std::numeric_limits<std::int32_t>::max()) {
            throw InvalidArgument("query: expected 0 to 2147483647 rows, got " + std::to_string(query.rows));
        }
        if (query.rows < 1) return;
        check_address("query", query.data);
        check_address("distances", to.distances);
        check_address("indices", to.indices);
        threads = resolve_threads(threads);  // once, for scratch and tasks alike: the limit may change meanwhile
        std::vector<std::int64_t> probes, others, raw;
        for (std::int64_t i = 0; i < query.rows; ++i) {
            const bool probe = query.rows <= kProbes || i * kProbes / query.rows != (i - 1) * kProbes / query.rows;
            (i == 0 || probe ? probes : others).push_back(i);
        }
        std::vector<std::uint8_t> hard(query.rows, 0);
        const auto search_some = [&](const std::vector<std::int64_t>& which) {
            pass(query, which, directions(), hard, to, threads);
            for (const std::int64_t i : which) {
                if (hard[i]) raw.push_back(i);
            }
        };
        search_some(probes);
        // Where half of the probes or more were in vain the others are spared the attempt: it costs about as much as it
        // saves the others.
        if (2 * raw.size() >= probes.size()) {
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
            pass(query, raw, raw_view(threads), hard, to, threads);
            for (const std::int64_t i : raw) {
                if (hard[i]) rest.push_back(i);
            }
        } else {
            rest.swap(raw);
        }
        if (!rest.empty()) search_densely(query, rest, to, threads);
    }

    template <class Q>
    void search_densely(Matrix<const Q> query, const std::vector<std::int64_t>& which, const Results& to,
                        int threads) const {
        const Buffer<double>& lengths = lengths_.get([&](Buffer<double>& fresh) {
            fresh.resize(static_cast<std::size_t>(bank_.rows));
            measure_lengths(bank_, threads, fresh.data());
        });
        std::atomic<std::int64_t> pairs{0};
        dense_search(
            bank_, lengths.data(), query, which, to.k, threads,
            [&](const double* row, std::int64_t id, double limit) {
                pairs.fetch_add(1, std::memory_order_relaxed);
                return measure(kernels_, row, bank_.row(id), bank_.cols, limit);
            },
            [&](std::int64_t id, Nearest& nearest) { to.take(id, nearest); });
        dense += static_cast<std::int64_t>(which.size());
        measured += pairs;
    }

    // A survivor costs about 60 cycles, the codes of all coordinates one for 64 of them.
    CodeView directions() const {
        const double patience =
            raw_only_ ? kRawPatience : static_cast<double>(std::min<std::int64_t>(bank_.cols, 1920)) / 2880;
        return {&sketch_, &strips_, kGroup, kSegment, patience};
    }

    // Codes of all coordinates, made when they are first needed.
    CodeView raw_view(int threads) const {
        const Raw& raw = raw_.get([&](Raw& fresh) {
            fresh.sketch.fit_raw(bank_, threads);
            fresh.strips.build(fresh.sketch, bank_, {order_.data(), order_.data() + order_.size()}, threads);
        });
        return {&raw.sketch, &raw.strips, kRawGroup, kRawSegment, kRawPatience};
    }

    template <class Q>
    void pass(Matrix<const Q> query, const std::vector<std::int64_t>& which, CodeView view,
              std::vector<std::uint8_t>& hard, const Results& to, int threads) const {
        const std::int64_t count = static_cast<std::int64_t>(which.size());
        Lease lease(*this, threads);
        std::vector<GroupScratch>& scratch = *lease.scratch;
        const std::int64_t each = view.group;
        parallel_for((count + each - 1) / each, threads, [&](std::int64_t group, int worker) {
            const std::int64_t* ids = which.data() + group * each;
            const int n = static_cast<int>(std::min(each, count - group * each));
            GroupSearch<T>(bank_, order_.data(), kernels_, view, scratch[worker]).search(query, ids, n, to.k, hard);
            for (int q = 0; q < n; ++q) {
                if (!hard[ids[q]]) to.take(ids[q], scratch[worker].nearest[q]);
            }
        });
        for (GroupScratch& part : scratch) {
            fine += part.fine;
            whole += part.whole;
            measured += part.measured;
            part.fine = part.whole = part.measured = 0;
        }
    }

    Matrix<const T> bank_;
    const SketchKernels& kernels_;
    bool raw_only_ = false;
    Sketch sketch_;
    Strips strips_;
    Kept<std::int32_t> order_;  // ids by position
    Late<Raw> raw_;
    Late<Buffer<double>> lengths_;  // of the rows
    mutable std::mutex scratch_mutex_;
    mutable Scratch free_scratch_[4];  // of as many searches at once
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

void KnnIndex::search(Matrix<const float> query, std::int64_t k, float* distances, std::int64_t* indices, int threads,
                      bool squared) const {
    impl_->search(query, {k, distances, indices, squared}, threads);
}
void KnnIndex::search(Matrix<const double> query, std::int64_t k, float* distances, std::int64_t* indices, int threads,
                      bool squared) const {
    impl_->search(query, {k, distances, indices, squared}, threads);
}

}  // namespace ttt4as
