// Counts what is allocated by `new` in this program, where no sanitizer does so itself, and lets one of them fail.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "check.hpp"

namespace {
std::atomic<long> allocations{0}, until_failure{-1};  // how many succeed before one fails; negative: all
}

#if !defined(TTT4AS_TEST_SANITIZED)
#define COUNTS_ALLOCATIONS
// Not inlined: GCC would warn of `free` for what came from `new`.
#define NOT_INLINED __attribute__((noinline))
static bool fails() { return ++allocations, until_failure >= 0 && until_failure-- == 0; }
NOT_INLINED void* operator new(std::size_t size) {
    if (fails()) throw std::bad_alloc();
    if (void* p = std::malloc(size ? size : 1)) return p;
    throw std::bad_alloc();
}
NOT_INLINED void* operator new(std::size_t size, std::align_val_t align) {
    if (fails()) throw std::bad_alloc();
    const auto a = static_cast<std::size_t>(align);
    if (void* p = std::aligned_alloc(a, (size + a - 1) / a * a + (size ? 0 : a))) return p;
    throw std::bad_alloc();
}
NOT_INLINED void operator delete(void* p) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, std::size_t) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

// Lets the first allocation of a fresh `make()` in call(object) fail, then the second one, and so on until there are no
// more; what is left of the object goes to check(object) each time. Every `step`-th one is enough.
template <class Make, class Call, class Check>
void with_every_failure(long step, Make&& make, Call&& call, Check&& check) {
    for (long k = 0;; k += step) {
        auto object = make();
        bool thrown = false;
        until_failure = k;
        try {
            call(object);
        } catch (const std::bad_alloc&) {
            thrown = true;
        }
        const bool reached = until_failure.exchange(-1) < 0;
        if (!reached) return;
        CHECK(thrown);
        check(object);
    }
}
#endif
