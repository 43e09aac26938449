// Ctrl-C during a long call that has released the GIL.
#pragma once

#include <chrono>

#include "bindings.hpp"

namespace ttt4as {

class Signals {
  public:
    // True once Python was told to stop. The GIL is taken to look, every 50 ms at most.
    bool operator()() {
        if (raised_ || Clock::now() < next_) return raised_;
        py::gil_scoped_acquire acquire;
        raised_ = PyErr_CheckSignals() != 0;
        next_ = Clock::now() + kApart;
        return raised_;
    }
    // Throws what a signal's handler has raised, looking for one first. Without the GIL.
    void check() {
        if (!(*this)()) return;
        py::gil_scoped_acquire acquire;
        rethrow();
    }
    // Throws what a signal's handler has raised. With the GIL.
    void rethrow() const {
        if (raised_) throw py::error_already_set();
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds kApart{50};
    Clock::time_point next_ = Clock::now() + kApart;
    bool raised_ = false;
};

}  // namespace ttt4as
