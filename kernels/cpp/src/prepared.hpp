// What an index has prepared, written as one block of bytes and used again in place, from a mapped file say: a header,
// then one field after the other, each on a cache line of its own. Fields that a search relies on to stay within bounds
// come first, under a checksum that opening always verifies; a second one covers the rest.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "ttt4as/common.hpp"

namespace ttt4as {

// Values of one's own, or in a block that outlives them.
template <class T>
class Kept {
  public:
    void resize(std::size_t size) {
        own_.resize(size);
        data_ = own_.data();
        size_ = size;
    }
    void borrow(const T* data, std::size_t size) {
        own_.release();
        data_ = data;
        size_ = size;
    }
    T* own() noexcept { return own_.data(); }  // null where they are borrowed
    const T* data() const noexcept { return data_; }
    const T& operator[](std::size_t i) const noexcept { return data_[i]; }
    std::size_t size() const noexcept { return size_; }
    std::size_t bytes() const noexcept { return own_.bytes(); }  // of one's own

  private:
    Buffer<T> own_;
    const T* data_ = nullptr;
    std::size_t size_ = 0;
};

// Fletcher's checksum over 64-bit words: the sum of all, and the sum of the sums so far, which their order changes.
class Checksum {
  public:
    // Bytes up to the next multiple of 8 count as zeros.
    void add(const void* data, std::size_t bytes) noexcept {
        const char* at = static_cast<const char*>(data);
        for (; bytes >= sizeof(std::uint64_t); bytes -= sizeof(std::uint64_t), at += sizeof(std::uint64_t)) {
            add_word(at, sizeof(std::uint64_t));
        }
        if (bytes) add_word(at, bytes);
    }
    std::uint64_t value() const noexcept { return sum_ ^ (sums_ << 32 | sums_ >> 32); }

  private:
    void add_word(const char* at, std::size_t bytes) noexcept {
        std::uint64_t word = 0;
        std::memcpy(&word, at, bytes);
        sum_ += word;
        sums_ += sum_;
    }

    std::uint64_t sum_ = 1, sums_ = 0;  // so that zeros count, too
};

struct BlockHeader {
    static constexpr std::uint32_t kVersion = 2;
    static constexpr char kMagic[8] = {'T', 'T', 'T', '4', 'A', 'S', 'K', 'N'};

    char magic[8];
    std::uint32_t version;
    std::uint32_t element;  // bytes of one number of the bank
    std::int64_t rows, cols;
    std::uint64_t first_bytes, first_sum, rest_bytes, rest_sum;
};
static_assert(sizeof(BlockHeader) == 64, "fields start on a cache line");

constexpr std::size_t kFieldAlign = 64;

// Hands fields to `sink`, or only counts and sums them where there is none.
class BlockWriter {
  public:
    using Sink = std::function<void(const void*, std::size_t)>;
    static constexpr bool kReads = false;

    explicit BlockWriter(const Sink* sink) : sink_(sink) {}

    template <class T>
    void operator()(const T& scalar) {
        static_assert(std::is_trivially_copyable<T>::value && !std::is_pointer<T>::value, "a plain value");
        put(&scalar, sizeof scalar);
    }
    template <class T>
    void operator()(const Kept<T>& values) {
        array(values.data(), values.size());
    }
    template <class T>
    void operator()(const Buffer<T>& values) {
        array(values.data(), values.size());
    }
    template <class T>
    void operator()(const std::vector<T>& values) {
        array(values.data(), values.size());
    }
    // What follows is verified only if asked for.
    void rest() noexcept {
        first_bytes_ = bytes_;
        first_sum_ = sum_.value();
        sum_ = Checksum();
    }
    void finish(BlockHeader& header) const noexcept {
        header.first_bytes = first_bytes_;
        header.first_sum = first_sum_;
        header.rest_bytes = bytes_ - first_bytes_;
        header.rest_sum = sum_.value();
    }

  private:
    template <class T>
    void array(const T* data, std::size_t size) {
        const std::uint64_t count = size;
        put(&count, sizeof count);
        put(data, size * sizeof(T));
    }
    void put(const void* data, std::size_t bytes) {
        static const char zeros[kFieldAlign] = {};
        const std::size_t padding = (kFieldAlign - bytes % kFieldAlign) % kFieldAlign;
        bytes_ += bytes + padding;
        if (sink_) {
            if (bytes) (*sink_)(data, bytes);
            if (padding) (*sink_)(zeros, padding);
        } else {
            sum_.add(data, bytes);
            sum_.add(zeros, padding / 8 * 8);
        }
    }

    const Sink* sink_;
    Checksum sum_;
    std::uint64_t bytes_ = 0, first_bytes_ = 0, first_sum_ = 0;
};

// Reads the fields back, in the order in which they were written.
class BlockReader {
  public:
    static constexpr bool kReads = true;

    // Checks the block (aligned to kFieldAlign, of `bytes` bytes) against the bank's header fields and its first
    // checksum, and the second one if `verify`. Throws InvalidArgument, which says what is wrong.
    BlockReader(const void* block, std::size_t bytes, const BlockHeader& expected, bool verify);

    template <class T>
    void operator()(T& scalar) {
        static_assert(std::is_trivially_copyable<T>::value && !std::is_pointer<T>::value, "a plain value");
        std::memcpy(&scalar, take(sizeof scalar), sizeof scalar);
    }
    template <class T>
    void operator()(Kept<T>& values) {
        const std::size_t n = count(sizeof(T));
        values.borrow(reinterpret_cast<const T*>(take(n * sizeof(T))), n);
    }
    template <class T>
    void operator()(Buffer<T>& values) {
        copy(values);
    }
    template <class T>
    void operator()(std::vector<T>& values) {
        copy(values);
    }
    void rest() noexcept {}
    // Throws unless `holds`: what was read does not fit together.
    void require(bool holds) const;

  private:
    const char* take(std::size_t bytes);
    std::size_t count(std::size_t size);

    template <class Values>
    void copy(Values& values) {
        constexpr std::size_t kSize = sizeof(*values.data());
        const std::size_t n = count(kSize);
        values.resize(n);
        const char* from = take(n * kSize);
        if (n) std::memcpy(values.data(), from, n * kSize);
    }

    const char* at_;
    std::size_t left_;
};

}  // namespace ttt4as
