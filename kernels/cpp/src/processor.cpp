// CPUID and what the system says to it.
#include "processor.hpp"

#if defined(TTT4AS_HAVE_X86_VARIANTS)
#include <cpuid.h>

#include <cstdint>
#endif
#if defined(TTT4AS_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ttt4as {

#if defined(TTT4AS_HAVE_X86_VARIANTS)
bool has_f16c() noexcept {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx_vnni() noexcept {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#else
bool has_f16c() noexcept { return false; }
bool has_avx_vnni() noexcept { return false; }
#endif

#if defined(TTT4AS_HAVE_AMX)
bool has_amx() noexcept {
    constexpr unsigned kSaves = 1u << 27, kTile = 1u << 24, kInt8 = 1u << 25;  // in CPUID
    constexpr std::uint64_t kTileState = 3u << 17;                             // in XCR0: configuration and data
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaves)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kInt8)) != (kTile | kInt8)) return false;
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileState) == kTileState;
}
bool request_amx() noexcept {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_amx() noexcept { return false; }
bool request_amx() noexcept { return false; }
#endif

}  // namespace ttt4as
