#include "common/cpu_level.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace viops {
namespace {

CpuLevel parse(const char* name) {
  std::string known;
  for (int level = 0; level <= static_cast<int>(highest_cpu_level()); ++level) {
    const char* candidate = name_of(static_cast<CpuLevel>(level));
    if (std::string(name) == candidate) return static_cast<CpuLevel>(level);
    known += (level ? ", " : "") + std::string(candidate);
  }
  throw std::invalid_argument("CPU level (VIOPS_CPU_LEVEL): '" + std::string(name) +
                              "' is not one that this machine has; it has: " + known);
}

std::atomic<CpuLevel>& current() {
  static std::atomic<CpuLevel> level = [] {
    const char* forced = std::getenv("VIOPS_CPU_LEVEL");
    return forced && *forced ? parse(forced) : highest_cpu_level();
  }();
  return level;
}

}  // namespace

#if defined(VIOPS_X86_LEVELS)

const char* name_of(CpuLevel level) {
  constexpr const char* names[kCpuLevels] = {"v2", "v3", "v4"};
  return names[static_cast<int>(level)];
}

CpuLevel highest_cpu_level() {
  __builtin_cpu_init();
  const auto has_v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const auto has_v3 = has_v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("f16c");
  const auto has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!has_v2) throw std::runtime_error("viops needs an x86-64-v2 CPU (SSE4.2); this one is older");
  return has_v4 ? CpuLevel::v4 : has_v3 ? CpuLevel::v3 : CpuLevel::v2;
}

#else

const char* name_of(CpuLevel) { return "baseline"; }

CpuLevel highest_cpu_level() { return CpuLevel::baseline; }

#endif

CpuLevel cpu_level() { return current().load(std::memory_order_relaxed); }

int64_t last_cache_bytes() {
  static const int64_t size = [] {
    constexpr int64_t usual = 16 << 20, most = 32 << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const int64_t told = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (told > 0) return std::min(told, most);
#endif
    return usual;
  }();
  return size;
}

void set_cpu_level(const char* name) { current().store(parse(name), std::memory_order_relaxed); }

}  // namespace viops
