// The CUDA that a .cu sees where it is built for the host: what csrc/common/cuda.cuh includes then.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "executor.h"
#include "host_atomics.h"
#include "host_math.h"
#include "host_types.h"
#include "host_unsupported.h"
#include "host_warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

#define VIOPS_SHARED(type, name, extents)                                         \
  typedef type name##_type extents;                                               \
  static const char name##_key = 0;                                               \
  name##_type& name = *static_cast<name##_type*>(viops::on_host::shared_variable( \
      &name##_key, sizeof(name##_type), alignof(name##_type), viops::on_host::Location::current()))

#define VIOPS_DYNAMIC_SHARED(name) \
  char* const name = viops::on_host::dynamic_shared(viops::on_host::Location::current())

#define VIOPS_DEVICE_ASSERT(condition, text)                                           \
  do {                                                                                 \
    if (!(condition)) viops::on_host::fail(text, viops::on_host::Location::current()); \
  } while (0)

using cudaStream_t = void*;

namespace viops {

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  on_host::Location where = on_host::Location::current();
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  static_assert((!std::is_reference_v<Parameters> && ...), "a kernel takes its parameters by value");
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  on_host::run_grid(
      config.grid, config.block, config.shared_bytes, [&] { std::apply(kernel, parameters); }, config.where);
}

inline int multiprocessors() { return 4; }
inline int64_t max_shared_bytes() { return 227 << 10; }  // of sm_90

}  // namespace viops
