// The pool: every task once, exceptions, nesting, several callers at once, a forked child.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "ttt4as/threads.hpp"

using ttt4as::parallel_for;

namespace {

void every_task_once(std::int64_t n, int threads) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
    std::vector<std::atomic<int>> busy(64);
    parallel_for(n, threads, [&](std::int64_t i, int worker) {
        CHECK(worker >= 0 && worker < 64);
        CHECK(busy[worker].fetch_add(1) == 0);  // nobody else has this worker's scratch
        seen[i].fetch_add(1);
        busy[worker].fetch_sub(1);
    });
    for (auto& count : seen) CHECK(count == 1);
}

#if defined(__linux__)
// By default as many threads as the process may use processors: of all, one here.
void check_affinity() {
    unsetenv("TTT4AS_NUM_THREADS");
    unsetenv("OMP_NUM_THREADS");
    cpu_set_t all, one;
    CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu) {
        if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &one);
    }
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(ttt4as::max_threads() == 1);  // found out once
    CHECK(sched_setaffinity(0, sizeof all, &all) == 0);
}
#endif

#if defined(__x86_64__)
// Every thread of a call computes as its caller does, who may take subnormal numbers for zero.
void check_arithmetic() {
    const unsigned usual = _mm_getcsr();
    for (const unsigned mode : {usual, usual | 0x8040, usual}) {
        _mm_setcsr(mode);
        std::atomic<int> others{0};
        const std::thread::id self = std::this_thread::get_id();
        for (int round = 0; round < 1000 && others == 0; ++round) {
            parallel_for(64, 4, [&](std::int64_t, int) {
                CHECK((_mm_getcsr() & 0x8040) == (mode & 0x8040));
                if (std::this_thread::get_id() == self) {
                    usleep(100);
                } else {
                    ++others;
                }
            });
        }
        CHECK(others > 0);
        CHECK((_mm_getcsr() & 0x8040) == (mode & 0x8040));
    }
}
#endif

// Only the thread that wants to be asked is, before each of its tasks, and what it throws ends the call.
void check_between_tasks() {
    const std::thread::id self = std::this_thread::get_id();
    int asked = 0, own = 0;
    const auto work = [&](std::int64_t, int worker) {
        CHECK((worker == 0) == (std::this_thread::get_id() == self));
        if (worker == 0) ++own;
    };
    for (int threads : {1, 4}) {
        asked = own = 0;
        ttt4as::BetweenTasks outer([&] { ++asked; });
        parallel_for(100, threads, work);
        CHECK(asked == own);
        bool caught = false;
        try {
            ttt4as::BetweenTasks inner([] { throw std::runtime_error("stop"); });
            parallel_for(100, threads, [](std::int64_t, int) { parallel_for(100, 1, [](std::int64_t, int) {}); });
        } catch (const std::runtime_error&) {
            caught = true;
        }
        // The others may have taken every task.
        CHECK(caught || threads > 1);
        CHECK(asked == own);
        parallel_for(100, 1, work);
        CHECK(asked == own);
    }
    const int before = asked;
    parallel_for(100, 1, work);
    CHECK(asked == before);
}

}  // namespace

int main() {
#if defined(__linux__)
    check_affinity();
#endif
#if defined(__x86_64__)
    ttt4as::set_num_threads(4);
    check_arithmetic();
#endif
    CHECK(ttt4as::max_threads() >= 1);
    ttt4as::set_num_threads(4);
    CHECK(ttt4as::max_threads() == 4);
    CHECK(ttt4as::resolve_threads(0) == 4 && ttt4as::resolve_threads(9) == 4 && ttt4as::resolve_threads(2) == 2);
    for (int round = 0; round < 50; ++round) {
        for (int threads : {0, 1, 2, 3, 4, 100}) every_task_once(round * 7, threads);
    }

    bool caught = false;
    try {
        parallel_for(100, 4, [](std::int64_t i, int) {
            if (i == 37) throw std::runtime_error("37");
        });
    } catch (const std::runtime_error&) {
        caught = true;
    }
    CHECK(caught);
    every_task_once(100, 4);  // the pool is usable after an exception
    check_between_tasks();

    std::atomic<int> inner{0};
    parallel_for(8, 4, [&](std::int64_t, int) { parallel_for(8, 4, [&](std::int64_t, int) { inner.fetch_add(1); }); });
    CHECK(inner == 64);

    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) {
        callers.emplace_back([] {
            for (int round = 0; round < 50; ++round) every_task_once(33, 4);
        });
    }
    for (auto& caller : callers) caller.join();

// Neither ThreadSanitizer nor an emulator follows a fork of a process with threads.
#if !defined(TTT4AS_TEST_WITHOUT_FORK)
    const pid_t child = fork();
    if (child == 0) {
        every_task_once(100, 4);
        _exit(0);
    }
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
#endif
    every_task_once(100, 4);
    return 0;
}
