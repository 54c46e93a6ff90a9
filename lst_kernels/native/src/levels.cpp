#include "levels.h"

#include <atomic>
#include <cstdint>

#include "common.h"

namespace lst {
namespace {

Level best_level() {
#if defined(LST_HAS_X86_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return kAvx2;
  }
#endif
  return kPortable;
}

std::atomic<int> highest_allowed{kAvx512};

}  // namespace

Level level() {
  static const Level best = best_level();
  const int allowed = highest_allowed.load(std::memory_order_relaxed);
  return allowed < best ? static_cast<Level>(allowed) : best;
}

}  // namespace lst

// Allows no level above `highest` from now on (0 portable, 1 AVX2, 2 AVX-512; for tests), and
// answers the level that then runs.
LST_EXPORT int32_t lst_set_level(int32_t highest) {
  lst::highest_allowed.store(highest, std::memory_order_relaxed);
  return lst::level();
}
