// What the CUDA part asks of the runtime besides kernel launches.
#include <string>

#include "common/cuda.cuh"

namespace viops {

int count_cuda_devices(std::string& reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) reason = cudaGetErrorString(status);
  return count;
}

// Makes `device` the current one; gives the one before it.
int exchange_cuda_device(int device) {
  int previous = 0;
  check_cuda(cudaGetDevice(&previous));
  if (previous != device) check_cuda(cudaSetDevice(device));
  return previous;
}

}  // namespace viops
