// Which instruction set the hot loops run on, chosen once at run time.
//
// How a hot loop is written: its file (src/simd/NAME.inl) is compiled once per instruction set by a file of one line
// (src/simd/NAME_generic.cpp, NAME_avx2.cpp, NAME_avx512.cpp) that CMake gives the flags. It uses the vector types of
// src/simd/vec.hpp, lives in namespace ttt4as::TTT4AS_ISA, includes no standard header with inline code (the linker
// would be free to keep the AVX-512 copy of std::vector for everyone) and exports one table of function pointers;
// the code that uses it picks the table by isa(), as src/by_isa.hpp does.
#pragma once

#include "ttt4as/common.hpp"

namespace ttt4as {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The best set that this processor, the operating system and this build have, or a lesser one named by TTT4AS_ISA
// (generic, avx2, avx512, amx); read once. Results may differ in the last bits between generic, avx2 and avx512, and
// between builds by other compilers or with other flags (Debug), never on the same one of the same build. What a search
// uses beside them changes no result: VNNI with avx2 and avx512, where the processor has it, and with amx the tiles,
// for which the first search asks the system; where that refuses, VNNI serves, and this still says amx. A process that
// has tiles needs alternate signal stacks of getauxval(AT_MINSIGSTKSZ) or more; TTT4AS_ISA=avx512 does not ask.
TTT4AS_API Isa isa() noexcept;

TTT4AS_API const char* isa_name(Isa isa) noexcept;

}  // namespace ttt4as
