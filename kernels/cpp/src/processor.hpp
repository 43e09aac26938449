// What this processor and its system have beyond what __builtin_cpu_supports of every compiler in use knows.
#pragma once

namespace ttt4as {

bool has_f16c() noexcept;
bool has_avx_vnni() noexcept;
// The 8-bit integer tiles of AMX, which the system must know to save.
bool has_amx() noexcept;
// Asks the system to let this process use them: Linux grants it once, for all threads and children. Signal frames of
// threads that use tiles grow by 8 KiB, and it refuses where an alternate signal stack is too small for that.
bool request_amx() noexcept;

}  // namespace ttt4as
