#include "bindings.hpp"
namespace ttt4as { void bind_coreset(py::module_&) {} }
