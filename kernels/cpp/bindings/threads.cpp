// How many threads the core may use, and which instruction set it runs on.

#include "ttt4as/threads.hpp"

#include "bindings.hpp"
#include "ttt4as/simd.hpp"

// threadpoolctl finds the limit through these symbols of the loaded module.
extern "C" {
TTT4AS_API int ttt4as_get_num_threads() { return ttt4as::max_threads(); }
TTT4AS_API void ttt4as_set_num_threads(int n) { ttt4as::set_num_threads(n); }
}

namespace ttt4as {

void bind_threads(py::module_& module) {
    module.def("max_threads", &max_threads, "The most threads a call uses.");
    module.def("set_num_threads", &set_num_threads, py::arg("n"), "Limit every later call; n < 1: back to the default.");
    module.def("isa", [] { return isa_name(isa()); }, "The instruction set in use: generic, avx2 or avx512.");
}

}  // namespace ttt4as
