// How many threads the core may use, and which instruction set it runs on.

#include "ttt4as/threads.hpp"

#include "bindings.hpp"
#include "ttt4as/c_api.h"
#include "ttt4as/simd.hpp"

namespace ttt4as {

void bind_threads(py::module_& module) {
    // Named here so that the linker keeps them: threadpoolctl looks the C functions up in the loaded module.
    module.attr("_c_api") = py::make_tuple(reinterpret_cast<std::uintptr_t>(&ttt4as_get_num_threads),
                                           reinterpret_cast<std::uintptr_t>(&ttt4as_set_num_threads));
    module.def("max_threads", &max_threads, "The most threads a call uses.");
    module.def("set_num_threads", &set_num_threads, py::arg("n"),
               "Limit every later call; n < 1: back to the default.");
    module.def("isa", [] { return isa_name(isa()); }, "The instruction set in use: generic, avx2, avx512 or amx.");
}

}  // namespace ttt4as
