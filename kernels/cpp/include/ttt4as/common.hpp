// What every part of the library shares: the error type, strided views of the caller's memory, and aligned scratch that
// only grows. Knows neither Python nor torch. The headers throw: code built without exceptions has c_api.h. An object
// that has been moved from can be assigned to and destroyed, no more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(_WIN32)
#define TTT4AS_API
#else
#define TTT4AS_API __attribute__((visibility("default")))
#endif

namespace ttt4as {

// An argument the library cannot serve; the message names it, what it got and what it takes.
class TTT4AS_API InvalidArgument : public std::invalid_argument {
  public:
    using std::invalid_argument::invalid_argument;
};

// Uninitialised memory for plain values, aligned to a cache line, that keeps its capacity: `resize` allocates only when
// it must grow, so that a call that needs no more than those before allocates nothing.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(std::size_t size) { resize(size); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer() { release(); }

    // The contents are lost when the buffer grows, and kept otherwise.
    void resize(std::size_t size) {
        if (size > capacity_) {
            release();
            if (size > (SIZE_MAX - 2 * kAlign) / sizeof(T)) throw std::bad_alloc();
            // One line past the end is readable, so that a vector load of the last element stays inside.
            const std::size_t bytes = (size * sizeof(T) + 2 * kAlign - 1) / kAlign * kAlign;
            data_ = static_cast<T*>(::operator new(bytes, std::align_val_t(kAlign)));
            capacity_ = size;
        }
        size_ = size;
    }
    void release() noexcept {
        ::operator delete(data_, std::align_val_t(kAlign));
        data_ = nullptr;
        size_ = capacity_ = 0;
    }

    T* data() noexcept { return data_; }
    const T* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }
    std::size_t bytes() const noexcept { return capacity_ * sizeof(T); }
    T& operator[](std::size_t i) noexcept { return data_[i]; }
    const T& operator[](std::size_t i) const noexcept { return data_[i]; }
    T* begin() noexcept { return data_; }
    T* end() noexcept { return data_ + size_; }
    const T* begin() const noexcept { return data_; }
    const T* end() const noexcept { return data_ + size_; }

  private:
    static constexpr std::size_t kAlign = 64;

    void swap(Buffer& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(capacity_, other.capacity_);
    }

    T* data_ = nullptr;
    std::size_t size_ = 0;
    std::size_t capacity_ = 0;
};

// A matrix in the caller's memory; `stride` is the distance between rows in elements, `cols` unless it is given.
template <class T>
struct Matrix {
    T* data = nullptr;
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::int64_t stride = cols;

    T* row(std::int64_t i) const noexcept { return data + i * stride; }
};

}  // namespace ttt4as
