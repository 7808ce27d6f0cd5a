// Errors on purpose: that compute-sanitizer is silent about the kernels of viops means something only
// where it is not silent about these.  They are in the namespace by which the kernels are chosen.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace viops {

constexpr int kThreads = 64;

// x [kThreads]; `beyond` is how far behind its place each thread writes.
__global__ void planted_memcheck_kernel(float* x, int beyond) { x[threadIdx.x + beyond] = 1.0f; }

// Each thread reads what a thread of the other warp writes; `wait` says whether that is there by then.
__global__ void planted_racecheck_kernel(float* x, bool wait) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (wait) __syncthreads();
  x[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

}  // namespace viops

int main(int count, char** words) {
  const char* error = count > 1 ? words[1] : "";
  float* x = nullptr;
  if (cudaMalloc(&x, viops::kThreads * sizeof(float)) != cudaSuccess) return 1;
  viops::planted_memcheck_kernel<<<1, viops::kThreads>>>(x, std::strcmp(error, "memcheck") == 0 ? 1 : 0);
  viops::planted_racecheck_kernel<<<1, viops::kThreads>>>(x, std::strcmp(error, "racecheck") != 0);
  const cudaError_t status = cudaDeviceSynchronize();
  std::printf("%s: %s\n", error, cudaGetErrorString(status));
  return status == cudaSuccess || count > 1 ? 0 : 1;  // that of a planted error is the sanitizer's
}
