// x86-64 micro-architecture levels: each cpu.cpp is built once a level and chosen at load.
//
// A cpu.cpp keeps all it defines in an unnamed namespace and exports one table of functions,
// `extern const CpuKernels VIOPS_LEVEL_NAME(kernels)`.  It calls no inline function that another file could
// compile for another level, since the linker would keep either; the build checks that (check_levels.cmake).
#pragma once

#include <cstdint>

namespace viops {

#if defined(VIOPS_CUDA_ON_HOST)  // a build for tests, without CPU kernels
enum class CpuLevel { none };
constexpr int kCpuLevels = 1;
#define VIOPS_DECLARE_KERNELS(Kernels) constexpr Kernels kernels_none = {}
#define VIOPS_KERNELS_BY_LEVEL {&kernels_none}
#elif defined(VIOPS_X86_LEVELS)
enum class CpuLevel { v2, v3, v4 };
constexpr int kCpuLevels = 3;
#define VIOPS_DECLARE_KERNELS(Kernels) extern const Kernels kernels_v2, kernels_v3, kernels_v4
#define VIOPS_KERNELS_BY_LEVEL {&kernels_v2, &kernels_v3, &kernels_v4}
#else
enum class CpuLevel { baseline };
constexpr int kCpuLevels = 1;
#define VIOPS_DECLARE_KERNELS(Kernels) extern const Kernels kernels_baseline
#define VIOPS_KERNELS_BY_LEVEL {&kernels_baseline}
#endif

#define VIOPS_CONCATENATE_(a, b) a##_##b
#define VIOPS_CONCATENATE(a, b) VIOPS_CONCATENATE_(a, b)
#define VIOPS_LEVEL_NAME(name) VIOPS_CONCATENATE(name, VIOPS_CPU_LEVEL)

const char* name_of(CpuLevel level);

// The highest level that this machine has; throws std::runtime_error where it has not even the lowest.
CpuLevel highest_cpu_level();

// The level in use: the highest, or what VIOPS_CPU_LEVEL or set_cpu_level said.
CpuLevel cpu_level();

// Throws std::invalid_argument for a name that is no level or one that the machine lacks.
void set_cpu_level(const char* name);

// The size of the last cache that the operating system tells of, a usual one where it does not; at most
// 32 MB: it may tell of all last caches of a socket, of which a core uses one.
int64_t last_cache_bytes();

}  // namespace viops
