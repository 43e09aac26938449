// What is made when it is first needed, once, and does not change from then on.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

namespace ttt4as {

// Held while something is made. One for the process; a forked child gets a fresh one, since a thread that it lacks may
// have held the old one.
std::mutex& making();

template <class T>
class Late {
  public:
    Late() = default;
    Late(const Late&) = delete;
    Late& operator=(const Late&) = delete;
    ~Late() { delete made_.load(std::memory_order_relaxed); }

    // Null where it is not made yet. Takes no lock.
    const T* get() const noexcept { return made_.load(std::memory_order_acquire); }
    // make(T&) fills a fresh one, which is dropped if it throws: the next call tries again.
    template <class Make>
    const T& get(Make&& make) const {
        if (const T* made = get()) return *made;
        std::lock_guard<std::mutex> lock(making());
        if (const T* made = get()) return *made;
        auto fresh = std::make_unique<T>();
        make(*fresh);
        set(std::move(fresh));
        return *get();
    }
    void set(std::unique_ptr<T> fresh) const noexcept { made_.store(fresh.release(), std::memory_order_release); }

  private:
    mutable std::atomic<const T*> made_{nullptr};
};

}  // namespace ttt4as
