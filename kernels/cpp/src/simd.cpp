// The choice of instruction set.
#include "ttt4as/simd.hpp"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "processor.hpp"

namespace ttt4as {
namespace {

Isa detect() noexcept {
    Isa best = Isa::generic;
#if defined(TTT4AS_HAVE_X86_VARIANTS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
        best = Isa::avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            best = __builtin_cpu_supports("avx512vnni") && has_amx() ? Isa::amx : Isa::avx512;
        }
    }
#endif
    if (const char* name = std::getenv("TTT4AS_ISA")) {
        for (Isa lesser : {Isa::generic, Isa::avx2, Isa::avx512}) {
            if (lesser < best && std::strcmp(name, isa_name(lesser)) == 0) best = lesser;
        }
    }
    return best;
}

}  // namespace

Isa isa() noexcept {
    static const Isa chosen = detect();
    return chosen;
}

const char* isa_name(Isa isa) noexcept {
    switch (isa) {
        case Isa::amx: return "amx";
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "generic";
    }
}

}  // namespace ttt4as
