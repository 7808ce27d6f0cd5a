// The one CUDA include of a .cu: CUDA itself under nvcc, and otherwise the host executor of
// tests/cuda_on_host, which runs the same source as C++20 on the CPU.
//
// A .cu is CUDA C++ but for what no C++ compiler parses:
//   VIOPS_SHARED(float, tile, [32][33]);   for   __shared__ float tile[32][33];
//   VIOPS_DYNAMIC_SHARED(memory);          for   extern __shared__ char memory[];   16-byte aligned
//   launch(kernel<T>, {grid, block, shared_bytes, stream}, arguments...)   for   kernel<<<...>>>(...)
// and inline PTX, whose place is common/ptx.cuh.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#define VIOPS_SHARED(type, name, extents) __shared__ type name extents
#define VIOPS_DYNAMIC_SHARED(name)                \
  extern __shared__ uint4 viops_dynamic_shared[]; \
  char* const name = reinterpret_cast<char*>(viops_dynamic_shared)

// What assert() calls, which is declared only where NDEBUG is not.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept;

// Stops the kernel and makes every later CUDA call of the process fail, as torch's own kernels do on an
// index out of range: there is no other way to raise from a device without waiting for it.
#define VIOPS_DEVICE_ASSERT(condition, text)                                                    \
  do {                                                                                          \
    if (!(condition)) __assert_fail(text, __FILE__, static_cast<unsigned>(__LINE__), __func__); \
  } while (0)

namespace viops {

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes;  // of dynamic shared memory
  cudaStream_t stream;
};

// Runs a kernel on the current device; no dimension of the grid may be zero.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (config.shared_bytes > kWithoutOptIn) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.shared_bytes)));
  }
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.shared_bytes;
  launch_config.stream = config.stream;
  check_cuda(cudaLaunchKernelEx(&launch_config, kernel, std::forward<Arguments>(arguments)...));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// How many multiprocessors the current device has.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// How much shared memory a block may have on the current device, static and dynamic together.
inline int64_t max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

}  // namespace viops

#else

#include "cuda_on_host.h"

#endif
