// The choice among the tables of the src/simd files.
#pragma once

#include "ttt4as/simd.hpp"

// The table `name` of the instruction set in use: the namespace of each set has one.
#if defined(TTT4AS_HAVE_X86_VARIANTS)
#define TTT4AS_BY_ISA(name) (isa() >= Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : generic::name)
#else
#define TTT4AS_BY_ISA(name) generic::name
#endif
