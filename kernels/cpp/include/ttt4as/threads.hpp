// One pool of threads for the whole library, and how many of them a call may use.
//
// Why a pool and not OpenMP: a process that loads torch, scikit-learn and this library holds three OpenMP runtimes,
// each with its own team per calling thread; none survives fork(); and ThreadSanitizer cannot see into them. Here
//   - the pool belongs to the process: two callers at once share it (the second runs its work on its own thread), so
//     the machine is never given more than `callers + limit - 1` busy threads;
//   - idle threads sleep: a thread spins for some 30 microseconds at most, and only after it has worked;
//   - a forked child starts with an empty pool of its own;
//   - work is cut into tasks whose number and bounds never depend on the number of threads: results are the same to the
//     bit on any of them.
#pragma once

#include <cstdint>
#include <functional>
#include <type_traits>

#include "ttt4as/common.hpp"

namespace ttt4as {

// The most threads a call uses unless it is given fewer: what set_num_threads said, else TTT4AS_NUM_THREADS, else the
// first number of OMP_NUM_THREADS, else the processors this process may run on. The environment is read once.
TTT4AS_API int max_threads() noexcept;

// Limits every later call in the process; n < 1 returns to the default.
TTT4AS_API void set_num_threads(int n) noexcept;

// `requested` clipped to [1, max_threads()]; 0 or less asks for all.
TTT4AS_API int resolve_threads(int requested) noexcept;

namespace detail {
using Task = void (*)(void* context, std::int64_t task, int worker);
TTT4AS_API void run_tasks(std::int64_t n_tasks, int threads, Task task, void* context);
}  // namespace detail

// Calls body(task, worker) for every task in [0, n_tasks), each once, on at most `threads` threads (the caller is one
// of them; 0: max_threads()). `worker` < the number of threads is different for tasks that run at the same time: index
// scratch with it, and resolve `threads` once for both, because max_threads() may change in between. Tasks are handed
// out in order, one at a time. Returns when all are done. The first exception thrown by a task stops the handing out
// and is thrown again here. A call from inside a task that the pool runs stays on that task's thread. A task that the
// caller runs alone, because it is the only one or because other callers have the pool, may use the pool itself.
// The caller is worker 0. Allocates nothing once the pool's threads exist.
template <class Body>
void parallel_for(std::int64_t n_tasks, int threads, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    detail::run_tasks(
        n_tasks, threads,
        [](void* context, std::int64_t task, int worker) { (*static_cast<Plain*>(context))(task, worker); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// While it lives, its thread calls `ask` before every task that it takes of any parallel_for. What `ask` throws ends
// that call as an exception of the task does.
class TTT4AS_API BetweenTasks {
  public:
    explicit BetweenTasks(std::function<void()> ask);
    ~BetweenTasks();
    BetweenTasks(const BetweenTasks&) = delete;
    BetweenTasks& operator=(const BetweenTasks&) = delete;

  private:
    std::function<void()> ask_;
    const std::function<void()>* outer_;
};

}  // namespace ttt4as
