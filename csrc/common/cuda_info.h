// What the CUDA part was built for; the same questions have answers where it was not built.
#pragma once

#include <string>
#include <vector>

namespace viops {

// As CMake names them, such as "80-real" and "90" (which has PTX too); empty without a CUDA part.
std::vector<std::string> cuda_architectures();

// The toolkit's version, or empty.
std::string cuda_version();

// Why there is no CUDA part, or empty.
std::string cuda_reason();

// The number of devices; throws std::runtime_error with the reason where none can be had.
int cuda_devices();

// An op's table of CUDA kernels, which its cuda.cu defines; empty where there is no CUDA part, and then
// CudaCall lets nobody come to it.
#if defined(VIOPS_CUDA)
#define VIOPS_DECLARE_CUDA_KERNELS(Kernels) extern const Kernels cuda_kernels
#else
#define VIOPS_DECLARE_CUDA_KERNELS(Kernels) constexpr Kernels cuda_kernels = {}
#endif

}  // namespace viops
