// The pool of threads.
#include "ttt4as/threads.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "late.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace ttt4as {
namespace {

constexpr int kMaxThreads = 1024;
// How often a thread looks for the next job, or for the end of this one, before it sleeps: some 30 microseconds. A
// solver's regions follow one another faster than a sleeping thread wakes.
constexpr int kLooks = 1500;

inline void pause_briefly() noexcept {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// How a thread rounds, and whether it takes subnormal numbers for zero.
#if defined(__x86_64__) || defined(_M_X64)
using Arithmetic = unsigned;
Arithmetic arithmetic() noexcept { return _mm_getcsr() & ~0x3Fu; }  // without the flags of what has happened
void set_arithmetic(Arithmetic mode) noexcept { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using Arithmetic = std::uint64_t;
Arithmetic arithmetic() noexcept {
    Arithmetic mode;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
void set_arithmetic(Arithmetic mode) noexcept { __asm__ __volatile__("msr fpcr, %0" : : "r"(mode)); }
#else
struct Arithmetic {};
Arithmetic arithmetic() noexcept { return {}; }
void set_arithmetic(Arithmetic) noexcept {}
#endif

// The processors this process may run on. The standard library of GCC counts all that are there.
int processors() noexcept {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

int positive_from_environment(const char* name) noexcept {
    const char* text = std::getenv(name);
    const long value = text ? std::strtol(text, nullptr, 10) : 0;  // "4,2" (nested levels) reads as 4
    return value > 0 ? static_cast<int>(value < kMaxThreads ? value : kMaxThreads) : 0;
}

int default_threads() noexcept {
    static const int count = [] {
        for (const char* name : {"TTT4AS_NUM_THREADS", "OMP_NUM_THREADS"}) {
            if (int n = positive_from_environment(name)) return n;
        }
        const int n = processors();
        return n < 1 ? 1 : (n < kMaxThreads ? n : kMaxThreads);
    }();
    return count;
}

std::atomic<int> limit{0};              // 0: default_threads()
thread_local bool inside_task = false;  // a nested call must not wait for the pool it runs in
thread_local const std::function<void()>* between_tasks = nullptr;

void run_task(detail::Task task, void* context, std::int64_t i, int worker) {
    if (between_tasks) (*between_tasks)();
    task(context, i, worker);
}

class Pool {
  public:
    std::mutex making;  // see late.hpp

    // Runs the job on the caller and up to threads - 1 others; false, with nothing done, if the pool is taken.
    bool run(std::int64_t n_tasks, int threads, detail::Task task, void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (n_threads_ < threads - 1) {
                try {
                    std::thread(&Pool::work, this, n_threads_).detach();
                } catch (const std::system_error&) {
                    break;  // the system gives no more threads: those that exist do the work
                }
                ++n_threads_;
            }
            task_ = task;
            context_ = context;
            n_tasks_ = n_tasks;
            arithmetic_ = arithmetic();
            next_.store(0, std::memory_order_relaxed);
            wanted_ = threads - 1 < n_threads_ ? threads - 1 : n_threads_;
            error_ = nullptr;
            ++job_;
        }
        wake_.notify_all();
        drain(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            wanted_ = 0;  // threads still asleep stay so: on a busy machine they would be waited for
        }
        for (int look = 0; look < kLooks && running_.load(std::memory_order_acquire); ++look) pause_briefly();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        if (error_) {
            std::exception_ptr error = error_;
            error_ = nullptr;
            lock.unlock();
            turn.unlock();
            std::rethrow_exception(error);
        }
        return true;
    }

  private:
    void drain(int worker) noexcept {
        inside_task = true;
        for (;;) {
            const std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
            if (i >= n_tasks_) break;
            try {
                run_task(task_, context_, i, worker);
            } catch (...) {
                next_.store(n_tasks_, std::memory_order_relaxed);
                std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
            }
        }
        inside_task = false;
    }

    void work(int index) noexcept {
        std::uint64_t seen = 0;
        for (bool worked = false;; worked = true) {
            for (int look = 0; worked && look < kLooks && job_.load(std::memory_order_acquire) == seen; ++look) {
                pause_briefly();
            }
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return job_ != seen && index < wanted_; });
                seen = job_;
                ++running_;
            }
            set_arithmetic(arithmetic_);  // the caller's, so that results do not depend on who does what
            drain(index + 1);
            {
                std::lock_guard<std::mutex> lock(mutex_);
                if (--running_ == 0) done_.notify_one();
            }
        }
    }

    std::mutex turn_;   // held by the caller whose job runs
    std::mutex mutex_;  // guards what follows, except next_
    std::condition_variable wake_, done_;
    int n_threads_ = 0;
    int wanted_ = 0;               // pool threads that may take part in the current job
    std::atomic<int> running_{0};  // pool threads that do; written under the mutex, as is job_
    std::atomic<std::uint64_t> job_{0};
    std::int64_t n_tasks_ = 0;
    Arithmetic arithmetic_{};
    detail::Task task_ = nullptr;
    void* context_ = nullptr;
    std::exception_ptr error_;
    std::atomic<std::int64_t> next_{0};
};

// Never destroyed: its threads sleep on it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

// Threads do not survive fork() and a mutex may have been held across it, so a child starts over.
void forget_pool() {
    the_pool.store(nullptr, std::memory_order_relaxed);
    inside_task = false;
}

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, forget_pool);
#endif
    });
    Pool* current = the_pool.load(std::memory_order_acquire);
    if (!current) {
        Pool* fresh = new Pool;
        if (the_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;  // another thread was first
    }
    return *current;
}

}  // namespace

int max_threads() noexcept {
    const int n = limit.load(std::memory_order_relaxed);
    return n > 0 ? n : default_threads();
}

void set_num_threads(int n) noexcept {
    limit.store(n < 1 ? 0 : (n < kMaxThreads ? n : kMaxThreads), std::memory_order_relaxed);
}

int resolve_threads(int requested) noexcept {
    const int most = max_threads();
    return requested < 1 || requested > most ? most : requested;
}

BetweenTasks::BetweenTasks(std::function<void()> ask)
    : ask_(std::move(ask)), outer_(std::exchange(between_tasks, &ask_)) {}

BetweenTasks::~BetweenTasks() { between_tasks = outer_; }

std::mutex& making() { return pool().making; }

void detail::run_tasks(std::int64_t n_tasks, int threads, Task task, void* context) {
    threads = resolve_threads(threads);
    if (threads > n_tasks) threads = static_cast<int>(n_tasks);
    if (threads > 1 && !inside_task && pool().run(n_tasks, threads, task, context)) return;
    for (std::int64_t i = 0; i < n_tasks; ++i) run_task(task, context, i, 0);
}

}  // namespace ttt4as
