// The Python module ttt4as_fast.kernels._core. Each operation binds itself in bindings/<operation>.cpp; nothing under
// include/ or src/ knows Python. The Python functions in kernels/<operation>/cpu.py are its only intended callers.

#include "bindings/bindings.hpp"

PYBIND11_MODULE(_core, module) {
    module.doc() = "The C++ core of ttt4as_fast; call it through ttt4as_fast.kernels.";
    module.attr("__version__") = TTT4AS_VERSION;
    ttt4as::bind_threads(module);
    ttt4as::bind_bilinear(module);
    ttt4as::bind_coreset(module);
    ttt4as::bind_knn(module);
    ttt4as::bind_peaks(module);
    ttt4as::bind_segment(module);
    ttt4as::bind_svm(module);
}
